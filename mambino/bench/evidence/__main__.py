"""What these models can and cannot do, measured: docs/evidence.md, from one command.

    python -m mambino.bench.evidence input.txt                      # all sections, hours of two cores
    python -m mambino.bench.evidence input.txt --sections=recall    # one; input.txt is a text of a megabyte
    python -m mambino.bench.evidence input.txt --quick=True         # all of it in minutes: whether it runs

A run that was stopped goes on: say the same command again. What was measured is in <out>/results.jsonl, a line
each; tables and pictures beside it are written from that, and <out>.md from the tables there are. Sections:

    sweep       val loss by learning rate; the best one of each model is used in what follows
    losses      val loss at equal tokens and at equal time, of characters and of Python's sources
    bits        bits a byte, beside xz and five-grams
    length      loss by position, to 16 times the trained length; with and without carry_state
    recall      which value belongs to a key: by pairs, and by bytes of state
    copying     copy, induction, selective copy, to 64 times the trained length
    choices     one thing of the recipe changed: what it adds to the loss
    samples     the first text of each model

How fast they are says python -m mambino.bench, by its sections train, sample, generate.
"""
import os
import time
from types import SimpleNamespace

from mambino.bench.evidence.answers import copying, recall
from mambino.bench.evidence.choices import CHANGES, choices, samples
from mambino.bench.evidence.losses import RATES, bits, length, losses, sweep
from mambino.bench.trained import Runs
from mambino.configurator import configure, fail
from mambino.console import end_quietly
from mambino.machine import machine_name

SECTIONS = {    # in this order; minutes on two cores
    'sweep': (sweep, 25), 'losses': (losses, 60), 'bits': (bits, 2), 'length': (length, 20), 'recall': (recall, 60),
    'copying': (copying, 60), 'choices': (choices, 100), 'samples': (samples, 1)}

inputs = []             # a text, such as the works of Shakespeare in a megabyte
sections = ','.join(SECTIONS)
seeds = '1,2,3'
folder = 'evidence'     # where runs are kept, and go on
out = 'docs/evidence'   # results.jsonl and pictures; the page is <out>.md
workers = 2             # runs at once, of a thread each
dtype = 'auto'          # of training, see train.py
quick = False           # small and short: for a look, and for tests


def plan_of():
    if quick:
        return SimpleNamespace(
            seeds=[1], rates=(1e-2,), steps=20, tokens_per_step=512, corpora=('characters',), task_steps=3, times=2,
            pairs=[4], copy_times=(1, 2), most_bytes=20_000, changes={'no QK-norm': CHANGES['no QK-norm']})
    return SimpleNamespace(
        seeds=[int(seed) for seed in seeds.split(',')], rates=RATES, steps=800, tokens_per_step=4096,
        corpora=('characters', 'python'), task_steps=1000, times=16, pairs=[4, 8, 16, 32], copy_times=(1, 2, 4, 16, 64),
        most_bytes=10_000_000, changes=CHANGES)


def main():
    names = sections.split(',')
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        fail(f'sections={sections}: there is no {unknown[0]}; there are {", ".join(SECTIONS)}')
    if not all(seed.isdecimal() for seed in seeds.split(',')):
        fail(f'seeds={seeds}: write numbers with commas between them')
    if len(inputs) != 1 or not os.path.isfile(inputs[0]):
        fail('name one text: python -m mambino.bench.evidence input.txt')
    os.makedirs(out, exist_ok=True)
    runs = Runs(folder, workers, results=os.path.join(out, 'results.jsonl'))
    plan = plan_of()
    plan.dtype, plan.pictures = dtype, out
    runs.prepare('characters', inputs, ['--tokenizer=char'])
    if 'python' in plan.corpora:
        runs.prepare('python', [], ['--tokenizer=byte'])
    for name in names:
        measure, minutes = SECTIONS[name]
        begin = time.monotonic()
        print(f'{name}: {measure.__doc__.splitlines()[0]}', '' if quick else f'About {minutes} minutes.', flush=True)
        lines = [*measure(runs, plan)]
        print('\n'.join(lines), flush=True)
        said = ' '.join(measure.__doc__.split())
        with open(os.path.join(out, f'{name}.md'), 'w', encoding='utf-8') as f:
            f.write('\n'.join([f'## {name.capitalize()}', '', said, '', *lines, '']))
        print(f'{name}: {(time.monotonic() - begin) / 60:.1f} minutes\n', flush=True)
    with open(f'{out}.md', 'w', encoding='utf-8') as f:
        f.write(f'# Evidence\n\n{machine_name("cpu")}. Each table: `python -m mambino.bench.evidence input.txt '
                '--sections=`its name. Models have 0.86M parameters each, where nothing else is said.\n')
        for path in filter(os.path.exists, (os.path.join(out, f'{name}.md') for name in SECTIONS)):
            with open(path, encoding='utf-8') as part:
                f.write('\n' + part.read())
    print(f'written: {out}.md')


if __name__ == '__main__':
    end_quietly()
    configure(globals(), positional='inputs')
    main()
