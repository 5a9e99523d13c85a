"""What each choice of the recipes is worth: a run with one thing changed, beside the run without."""
import os
import re
import statistics

from mambino.bench.evidence.losses import THREE, at_hand, flags_of, models_of, rate_of

TWO = ['GPT', 'Mamba-2']
# what is changed: the models it means something to, flags. A first word without -- is one of
# variants.py. twice, third: steps, twice as many and a third more; tenth: of the rate
CHANGES = {
    'AdamW at 4e-3': (TWO, '--optimizer=adamw --learning_rate=4e-3'),
    'a cosine': (TWO, '--schedule=cosine'),
    'decay of all steps': (TWO, '--decay_fraction=1.0'),
    'steps of 2,048 tokens, twice as many': (TWO, '--tokens_per_step=2048 --batch_size=16 --max_iters={twice}'),
    'windows of 256': (TWO, '--block_size=256 --batch_size=16'),
    'an embedding of each two tokens, too': (TWO, 'bigrams'),
    'a share of the embedding before': (['GPT'], 'smear'),
    'embeddings in the values': (['GPT'], 'values'),
    'outputs that begin at zero': (TWO, 'zero'),
    'logits capped at 15': (TWO, 'softcap'),
    'no QK-norm': (['GPT', 'hybrid'], '--qk_norm=False'),
    'a state of 64': (['Mamba-2', 'hybrid'], '--state_size=64'),
    'no gate of the branches': (['hybrid'], '--gate=False'),
    'no norm of the branches': (['hybrid'], '--branch_norm=False')}
SCHEDULES = {
    'half of each step, for half of the steps': (THREE, 'fewer --max_iters={third}'),
    'windows of 32, for half of the steps': (THREE, 'shorter'),
    'a tenth of the rate at the end': (THREE, '--min_lr={tenth}'),
    'no weight decay': (THREE, '--weight_decay=0'),
    'AdamW at 4e-3': (['hybrid'], '--optimizer=adamw --learning_rate=4e-3'),
    'attention, Mamba and MLP side by side': (['hybrid'], '--layout=parallel')}
SPEED_STEPS = 40        # of runs for their speed alone


def changed(flags, change):
    """Flags with some of them replaced, those of variants.py first."""
    new = change.split()
    names = {flag.partition('=')[0] for flag in new}
    left = [flag for flag in flags if flag.partition('=')[0] not in names]
    return left + new if change.startswith('--') else new + left


def trained(runs, wanted):
    """{name: its line} of {name: flags}, by train.py or with a variant of the model."""
    own = {name: flags for name, flags in wanted.items() if flags[0].startswith('--')}
    others = {name: flags for name, flags in wanted.items() if name not in own}
    return runs.train(own) | runs.train(others, 'mambino.bench.evidence.variants')


def choices(runs, plan):
    """Val loss with one thing changed, at equal tokens, half of those of `losses`: what the change
    adds, seed 1; and tokens a second beside those of the run without it, in 40 steps, as exact as
    changes of the schedule alone show, which compute the same. SOAP is not in torch."""
    wanted = wanted_of(runs, plan, 'choice', plan.changes)
    for seed in plan.choice_seeds[1:]:
        for model in THREE:
            again = changed(wanted[f'choice {model}'], f'--seed={seed}')
            wanted[f'choice {model}, seed {seed}'] = again
    ended = trained(runs, wanted)
    speeds = {}
    if runs.device == 'cpu':
        short = f'--max_iters={min(plan.choice_steps, SPEED_STEPS)} --eval_iters=1'
        asked = {name: flags for name, flags in wanted.items() if ', seed' not in name}
        lines = trained(runs, {
            f'speed of {name}': changed(flags, f'{short} --dtype={ended[name]["dtype"]}')
            for name, flags in asked.items()})
        speeds = {name: lines[f'speed of {name}']['speed'] for name in asked}

    yield from head('choice', ended)
    if len(plan.choice_seeds) > 1:
        others = [f', seed {seed}' for seed in plan.choice_seeds[1:]]
        spread = [statistics.stdev(ended[f'choice {model}{other}']['val_loss'] for other in ('', *others))
                  for model in THREE]
        yield '| nothing: standard deviation of seeds | ' + ' | '.join(f'{sd:.3f}' for sd in spread) + ' |'
    yield from rows('choice', plan.changes, ended, speeds)


def schedules(runs, plan):
    """The same for batches and windows that grow, and for what else a run is trained by: what the change
    adds at equal tokens, seed 1; the standard deviation of seeds is that of `choices`."""
    ended = trained(runs, wanted_of(runs, plan, 'schedule', plan.schedules))
    yield from head('schedule', ended)
    yield from rows('schedule', plan.schedules, ended, {})


def wanted_of(runs, plan, word, changes):
    """{name: flags} of the runs without a change and with each."""
    more = f'--dataset={plan.corpora[0]} --eval_interval={4 * plan.steps}'
    rates = {model: rate_of(runs, plan, model) for model in THREE}
    steps = plan.choice_steps
    wanted = {f'{word} {model}': flags_of(model, more, plan, 1, rates[model], steps) for model in THREE}
    for name, (models, change) in changes.items():
        for model in models:
            flags = change.format(twice=2 * steps, third=round(steps * 4 / 3), tenth=rates[model] / 10)
            wanted[f'{word} {model}, {name}'] = changed(wanted[f'{word} {model}'], flags)
    return wanted


def head(word, ended):
    yield '| what is changed | ' + ' | '.join(THREE) + ' |\n| --- |' + ' --- |' * len(THREE)
    losses = [ended[f'{word} {model}']['val_loss'] for model in THREE]
    yield '| nothing: val loss | ' + ' | '.join(f'{loss:.3f}' for loss in losses) + ' |'


def rows(word, changes, ended, speeds):
    for name, (models, _) in changes.items():
        cells = [cell(ended, speeds, f'{word} {model}', name) if model in models else '' for model in THREE]
        yield f'| {name} | {" | ".join(cells)} |'


def cell(ended, speeds, base, name):
    own = f'{base}, {name}'
    said = f'{ended[own]["val_loss"] - ended[base]["val_loss"]:+.3f}'
    return f'{said}; {speeds[own] / speeds[base]:.2f}x' if own in speeds else said


def samples(runs, plan):
    """The first sample of each model at seed 1337, as sample.py gives it."""
    corpus, seed = plan.corpora[0], plan.seeds[0]
    names = {model: at_hand(runs, f'{corpus} {model} {seed}') for model in models_of(corpus)}
    runs.need(names.values(), 'samples')
    for model, name in names.items():
        words = [f'--out_dir={os.path.basename(runs.path(name))}', '--max_new_tokens=300', '--device=cpu']
        said = re.sub(r'\A(?:\w+ += .*\n)+', '', runs.script('sample.py', words).stdout)
        yield f'\n{model}:\n\n```\n{said.strip()}\n```'
