"""What a run comes to of which nothing is said, and how soon a model is as good as nanoGPT's on an A100."""
import os

from mambino.bench.evidence.losses import MODELS, THREE, flags_of, rate_of
from mambino.bench.trained import Runs

SPEED_STEPS = 40                # of runs for their speed alone
A100 = 1.4697                   # val loss of nanoGPT's config/train_shakespeare_char.py, by its README
LENGTHS = 800, 1100, 1500       # steps of which the first that suffice are told


def rivals_of(runs, plan, model):
    """{name: flags} of what else the time of a bare run could go to: how many steps is yet to be said."""
    kind = MODELS[model].split()[0]
    small = flags_of(model, '', plan, 1, rate_of(runs, plan, model), steps=0)
    return {'width 128, windows of 128': small,
            'steps of 2,048 tokens': [kind, '--tokens_per_step=2048', '--seed=1', f'--dtype={plan.dtype}',
                                      *plan.bare]}


def with_steps(flags, steps):
    left = [flag for flag in flags if not flag.startswith('--max_iters=')]
    return [*left, f'--max_iters={steps}', f'--eval_interval={steps}']


def bare(runs, plan):
    """Val loss of `python train.py --model=…` with nothing else said; beside what else the same seconds of training
    could have gone to, on one thread, seed 1: models of 0.85M as in `losses`, and the same models with smaller steps.
    words: the second text, if one is named, with the tokenizer that prepare.py makes. In brackets: steps."""
    corpora = [*plan.corpora, *(['words'] if runs.has('words') else [])]
    said = [f'--dtype={plan.dtype}', '--seed=1', *plan.bare]
    plain = runs.train({f'bare {corpus} {model}': [MODELS[model].split()[0], f'--dataset={corpus}', *said]
                        for corpus in corpora for model in THREE})
    others = {(corpus, model, way): [*flags, f'--dataset={corpus}']
              for corpus in corpora for model in THREE for way, flags in rivals_of(runs, plan, model).items()}
    few = min(SPEED_STEPS, plan.choice_steps)
    short = runs.train({f'speed of bare {" ".join(key)}': [*with_steps(flags, few), '--eval_iters=1']
                        for key, flags in others.items()})
    wanted = {}
    for (corpus, model, way), flags in others.items():
        tokens = next(int(flag.split('=')[1]) for flag in flags if flag.startswith('--tokens_per_step='))
        seconds = plain[f'bare {corpus} {model}']['seconds']
        steps = round(seconds * short[f'speed of bare {corpus} {model} {way}']['speed'] / tokens)
        wanted[f'bare {corpus} {model} {way}'] = with_steps(flags, max(1, steps))
    ended = plain | runs.train(wanted)

    yield '| val loss | ' + ' | '.join(corpora) + ' |\n| --- |' + ' --- |' * len(corpora)
    worst = 0
    for model in THREE:
        ways = ['', *rivals_of(runs, plan, model)]
        for way in ways:
            names = [f'bare {corpus} {model} {way}'.strip() for corpus in corpora]
            cells = [f'{ended[name]["val_loss"]:.3f} ({steps_of(runs, name)})' for name in names]
            yield f'| {model}, {way or "nothing said"} | ' + ' | '.join(cells) + ' |'
        for corpus in corpora:
            best = min(ended[f'bare {corpus} {model} {way}'.strip()]['val_loss'] for way in ways)
            worst = max(worst, ended[f'bare {corpus} {model}']['val_loss'] / best - 1)
    seconds = [line['seconds'] for line in plain.values()]
    yield (f'\nThe bare runs took {min(seconds):.0f} to {max(seconds):.0f} s; the largest loss beside the best of its '
           f'model and text is {worst:.1%} above it.')


def steps_of(runs, name):
    return runs.curve(name)[-1].step


def minutes(runs, plan):
    """How long each model of `losses` takes, on all cores at once, until its val loss on characters is at most 1.4697,
    that of nanoGPT's recipe for an A100: the first of some lengths, with a schedule as long, that suffices; seed 1."""
    alone = Runs(runs.folder, 1, os.cpu_count(), runs.results.path, runs.device)
    more = '--dataset=characters'
    yield '| | steps | val loss | minutes of training | tokens/s |\n| --- | --- | --- | --- | --- |'
    for model in MODELS:
        known = runs.results.lines.get(f'characters {model} 1', dict(val_loss=0))
        short = plan.steps if known['val_loss'] > A100 else 0       # so many did not suffice in `losses`
        for steps in [steps for steps in plan.lengths if steps > short] or plan.lengths[-1:]:
            flags = flags_of(model, f'{more} --eval_interval={steps}', plan, 1, rate_of(runs, plan, model), steps)
            name = f'minutes {model} {steps}'
            line = alone.train({name: flags})[name]
            if line['val_loss'] <= A100:
                break
        word = '' if line['val_loss'] <= A100 else ', not there yet'
        yield (f'| {model} | {steps} | {line["val_loss"]:.3f}{word} | {line["seconds"] / 60:.1f} '
               f'| {line["speed"]:,.0f} |')
    runs.used |= alone.used
    runs.results = alone.results
