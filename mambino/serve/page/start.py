"""The first panel: what to do, in three steps, and how far one is."""
from nicegui import ui

from mambino.serve import datasets, launch
from mambino.serve.page import look


def state_of_data():
    """(whether there is a dataset, a sentence about it)."""
    names = datasets.names()
    if not names:
        return False, 'Nothing is prepared yet. Any folder will do: text, PDF, office files, tables, code.'
    try:
        size = f', {datasets.meta_of(names[0])["splits"]["train"]["tokens"]:,} tokens'
    except datasets.NoDataset:
        size = ''
    more = f'; {len(names) - 1} more' if len(names) > 1 else ''
    return True, f'{names[0]}{size}{more}'


def state_of_models(library):
    """The same of a model."""
    names = [run['id'] for run in library.names()]
    training = [name for name in launch.trainings() if name not in names]
    if training and not names:
        return False, f'{training[0]} is being trained: it can be talked to as soon as its first checkpoint is written.'
    if not names:
        return False, 'No model yet. A small one learns in minutes, on this machine.'
    more = f'; {len(names) - 1} more' if len(names) > 1 else ''
    return True, f'{names[0]}{more}'


def show(library):
    """Fills the panel."""
    look.title('A small language model from your own files',
               'Three steps. Everything stays on this machine.')
    has_data, data = state_of_data()
    has_model, models = state_of_models(library)
    talk = 'Ready: let it write, or ask it something.' if has_model else 'As soon as there is a model.'
    steps = (
        ('Your files', data, has_data, '/data', 'Add files' if has_data else 'Choose files', not has_data),
        ('Train', models, has_model, '/train', 'Train another' if has_model else 'Train', has_data and not has_model),
        ('Talk to it', talk, False, '/generate', 'Generate', has_model),
    )
    with ui.element('ol').classes('steps'):
        for number, (name, state, is_done, address, verb, is_next) in enumerate(steps, 1):
            with ui.element('li').classes('step' + ' done' * is_done).props(f'data-testid=step-{number}'):
                with ui.element('span').classes('mark'):
                    if is_done:
                        ui.icon('check')
                    else:
                        ui.label(str(number))
                with ui.element('div').classes('what'):
                    look.heading(name)
                    ui.label(state).classes('muted')
                look.Words('a', verb).classes('go' + ' next' * is_next).props(f'href={address}')
