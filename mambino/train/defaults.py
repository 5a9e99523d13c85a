"""What a run is trained by where nobody names it: as measured, by what is trained.

    fill_recipe(settings, origin)       # optimizer, schedule, learning_rate, qk_norm
"""
RATES = {           # the peak of the learning rate, by what is trained and by the optimizer
    'small': dict(adamw=4e-3, muon=1e-2),       # a new model of a CPU's size, some hundred steps
    'large': dict(adamw=1e-3, muon=1e-3),       # of a GPU's, or of a named size
    'tuned': dict(adamw=3e-4, muon=3e-4),       # what a model knows is to stay
    'adapter': dict(adamw=1e-3),                # it begins with nothing
}


def what_is_trained(settings, origin):
    """The row of RATES."""
    if settings['adapter']:
        return 'adapter'
    if origin.base:
        return 'tuned'
    return 'small' if settings['device'] == 'cpu' and not settings['size'] else 'large'


def recipe_for(trained, origin):
    """The optimizer and the schedule where none is named: those of a run that goes on; Muon and a long
    linear decay where they were measured to be the better ones at equal time."""
    if origin.ckpt:
        kept = origin.ckpt['settings']
        return dict(optimizer=kept.get('optimizer') or 'adamw',
                    schedule=kept.get('schedule') or 'cosine')
    if trained == 'small':
        return dict(optimizer='muon', schedule='wsd')
    return dict(optimizer='adamw', schedule='cosine')


def fill_recipe(settings, origin):
    """Gives these of `settings` their values. Queries and keys are normalised in a new GPT, which then
    learns more from the same steps; a model that there is stays what it is."""
    trained = what_is_trained(settings, origin)
    for name, value in recipe_for(trained, origin).items():
        settings[name] = settings[name] or value
    settings['learning_rate'] = settings['learning_rate'] or RATES[trained][settings['optimizer']]
    if settings['qk_norm'] is None:
        config = origin.model['config'] if origin.model else dict(qk_norm=settings['model'] == 'gpt')
        settings['qk_norm'] = config.get('qk_norm')
    settings['qk_norm'] = bool(settings['qk_norm'])
