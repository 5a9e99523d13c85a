"""What a run comes to of which nothing is said; how soon a model is as good as nanoGPT's."""
import os

from mambino.bench.evidence.choices import SPEED_STEPS, changed
from mambino.bench.evidence.losses import MODELS, THREE, flags_of, rate_of
from mambino.bench.trained import Runs

A100 = 1.4697                   # val loss of nanoGPT's train_shakespeare_char.py, by its README
LENGTHS = 800, 1100, 1500       # steps of which the first that suffice are told


def bare(runs, plan):
    """Val loss of `python train.py --model=…` with nothing else said, on one thread, seed 1; beside
    what else the same seconds of training could have gone to: the models of `losses`, in windows
    of 128. In brackets: steps."""
    corpora = plan.corpora[:3]
    said = [f'--dtype={plan.dtype}', '--seed=1', *plan.bare]
    plain = {(corpus, model): f'bare {corpus} {model}' for model in THREE for corpus in corpora}
    ended = runs.train({name: [MODELS[model].split()[0], f'--dataset={corpus}', *said]
                        for (corpus, model), name in plain.items()})
    rates = {model: rate_of(runs, plan, model) for model in THREE}
    small = {(corpus, model): flags_of(model, f'--dataset={corpus}', plan, 1, rates[model])
             for corpus, model in plain}
    few = min(SPEED_STEPS, plan.choice_steps)
    lines = runs.train({f'speed of small {" ".join(key)}': changed(
        flags, f'--max_iters={few} --eval_iters=1 --dtype={ended[plain[key]]["dtype"]}')
        for key, flags in small.items()})
    speeds = {key: lines[f'speed of small {" ".join(key)}']['speed'] for key in small}
    steps = {key: max(1, round(ended[name]['seconds'] * speeds[key] / plan.tokens_per_step))
             for key, name in plain.items()}
    others = {key: f'small {" ".join(key)}' for key in small}
    ended |= runs.train({
        others[key]: changed(flags, f'--max_iters={steps[key]} --eval_interval={steps[key]}')
        for key, flags in small.items()})

    yield '| val loss | ' + ' | '.join(corpora) + ' |\n| --- |' + ' --- |' * len(corpora)
    for model in THREE:
        for words, names in (('nothing said', plain), ('0.85M', others)):
            row = [names[corpus, model] for corpus in corpora]
            cells = [f'{ended[name]["val_loss"]:.3f} ({runs.curve(name)[-1].step})' for name in row]
            yield f'| {model}, {words} | ' + ' | '.join(cells) + ' |'
    above = [ended[plain[key]]['val_loss'] / ended[others[key]]['val_loss'] - 1 for key in plain]
    seconds = [ended[name]['seconds'] for name in plain.values()]
    yield (f'\nThe bare runs took {min(seconds):.0f} to {max(seconds):.0f} s; their losses are '
           f'{min(above):+.1%} to {max(above):+.1%} off those of the others.')


def minutes(runs, plan):
    """How long each model of `losses` takes, on all cores at once, until its val loss on characters
    is at most 1.4697, that of nanoGPT's recipe for an A100: the first of some lengths, with a
    schedule as long, that suffices; seed 1."""
    alone = Runs(runs.folder, 1, os.cpu_count(), runs.results.path, runs.device)
    rows = {}
    for model in MODELS:
        known = runs.results.lines.get(f'characters {model} 1', dict(val_loss=0))
        short = plan.steps if known['val_loss'] > A100 else 0       # did not suffice in `losses`
        rate = rate_of(runs, plan, model)
        for steps in [steps for steps in plan.lengths if steps > short] or plan.lengths[-1:]:
            more = f'--dataset=characters --eval_interval={steps}'
            flags = flags_of(model, more, plan, 1, rate, steps)
            name = f'minutes {model} {steps}'
            line = alone.train({name: flags})[name]
            if line['val_loss'] <= A100:
                break
        rows[model] = steps, line
    tells = all('joules' in line for _, line in rows.values())
    yield f'| | steps | val loss | minutes of training | tokens/s |{" kJ, all of the run |" * tells}'
    yield '| --- | --- | --- | --- | --- |' + ' --- |' * tells
    for model, (steps, line) in rows.items():
        word = '' if line['val_loss'] <= A100 else ', not there yet'
        energy = f' {line["joules"] / 1000:.1f} |' if tells else ''
        yield (f'| {model} | {steps} | {line["val_loss"]:.3f}{word} | {line["seconds"] / 60:.1f} '
               f'| {line["speed"]:,.0f} |{energy}')
    yield '' if tells else '\nWhat energy they took this machine does not tell.'
    runs.used |= alone.used
    runs.results = alone.results
