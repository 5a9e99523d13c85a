"""What filling holes (masked diffusion) costs and gives beside the next token, from models trained here.

    python -m mambino.bench.holes input.txt                         # all sections: some hours of two cores
    python -m mambino.bench.holes input.txt --sections=objectives --seeds=1,2,3
    python -m mambino.bench.holes input.txt --sections=speed        # minutes, on a machine that does nothing else

A run that was stopped goes on: say the same command again. Sections:

    objectives      val loss of models of equal size that saw the same tokens: GPT, Mamba, hybrid; next token, any
                    hidden ones, blocks of 1 to 64. Characters of the text
    begun           val loss of models that learned the next token first, beside models begun with holes
    few             val loss over epochs of a text of 150 KB, of the next token with several dropouts, and of holes
    steps           tokens/s of writing in ever fewer steps, and what a model of the next token thinks of what came
    identifiers     names taken out of Python's sources: how many are found again, with and without what follows
    speed           training of a Mamba in two directions beside one in one, by turns

The tables are printed as Markdown, the curves of `few` are drawn as few.svg in the folder. Losses of holes are
bounds: no less than what the model knows; what the next token's say is exact.
"""
import math
import os
import re
import statistics
from functools import partial
from keyword import kwlist

import numpy as np
import torch

from mambino.bench.plot import write_picture
from mambino.bench.trained import Runs
from mambino.configurator import configure, fail
from mambino.console import end_quietly
from mambino.sample.terminal import RULE
from mambino.sample.uncover import Filler, draw_each, uncover

inputs = []             # a text, such as the works of Shakespeare in a megabyte
sections = 'objectives,begun,few,steps,identifiers,speed'
seeds = '1'             # of the runs in `objectives`
best_seeds = '1,2,3'    # of its two best rows
folder = 'holes'        # where runs are kept, and go on
workers = 2             # runs at once, of a thread each
dtype = 'auto'          # of training, see train.py
only = ''               # in `objectives`, rows of these names alone: 'gpt next,gpt masked'

STEP = ('--tokens_per_step=4096 --optimizer=muon --learning_rate=1e-2 --schedule=wsd --decay_fraction=0.6 '
        '--warmup_iters=20 --log_interval=50')
GPT = '--model=gpt --n_layer=4 --n_embd=128 --n_head=2 --qk_norm=True'              # 0.86M parameters, as the others
MAMBA = '--model=mamba --n_layer=8 --n_embd=128 --state_size=16'
APART = '--model=mamba --n_layer=4 --n_embd=128 --state_size=16 --share_projections=False'
HYBRID = '--model=hybrid --n_layer=3 --n_embd=128 --n_head=2 --qk_norm=True --state_size=32 --intermediate_size=240'
MASKED, BLOCK = '--objective=masked', '--objective=block --block_length='
OBJECTIVES = {
    'gpt next': GPT, 'mamba next': MAMBA, 'hybrid next': HYBRID,
    'gpt masked': f'{GPT} {MASKED}', 'mamba masked': f'{MAMBA} {MASKED}', 'hybrid masked': f'{HYBRID} {MASKED}',
    'mamba masked, projections apart': f'{APART} {MASKED}',
    'gpt masked, max_weight 4': f'{GPT} {MASKED} --max_weight=4',
    **{f'gpt block {K}': f'{GPT} {BLOCK}{K}' for K in (1, 4, 16, 64)},
    'mamba block 16': f'{MAMBA} {BLOCK}16'}
FEW = {
    **{f'next, dropout {p}': f'{GPT} --dropout={p}' for p in (0.0, 0.1, 0.2, 0.3)},
    'masked': f'{GPT} {MASKED}', 'block 16': f'{GPT} {BLOCK}16'}
PYTHON = {'next': GPT, 'masked': f'{GPT} {MASKED}'}
SPEED = {f'{name} {way}': f'--model={name} --n_layer=6 --n_embd=384 {more} {objective}'
         for name, more in (('gpt', '--n_head=6'), ('mamba', ''))
         for way, objective in (('next', ''), ('masked', MASKED), ('block 16', f'{BLOCK}16'))}
STEPS = 1000            # of training, in `objectives`
BEGUN = 250             # … in `begun`
FEW_BYTES, EPOCHS = 150_000, 50
WRITTEN = 127           # characters of a text in `steps`, behind a line's end
TEXTS = 16
NAMES = 400             # in `identifiers`


def flags_of(row, seed, steps, dataset, T=128, more=''):
    """What train.py is given: windows of T tokens, 4,096 of them a step."""
    return (f'{STEP} --block_size={T} --batch_size={4096 // T} {row} --dtype={dtype} --seed={seed} --max_iters={steps} '
            f'--dataset={dataset} {more}').split()


def learn_characters(runs, text, names, seeds='1'):
    """Trains these rows of OBJECTIVES with each seed, as runs 'gpt next 1'."""
    runs.prepare('characters', [text], ['--tokenizer=char'])
    runs.train({f'{name} {seed}': flags_of(OBJECTIVES[name], seed, STEPS, 'characters', more='--eval_interval=500')
                for seed in seeds.split(',') for name in names})


# --- objectives -----------------------------------------------------------------------------------

def objectives(runs, text):
    names = [name.strip() for name in only.split(',')] if only else [*OBJECTIVES]
    learn_characters(runs, text, names, seeds)
    of_holes = [name for name in names if not name.endswith('next')]
    best = sorted(of_holes, key=lambda name: runs.results.lines[f'{name} {seeds.split(",")[0]}']['val_loss'])[:2]
    learn_characters(runs, text, best, best_seeds)
    print('| | parameters | nats a character | bits a character | seeds |\n| --- | --- | --- | --- | --- |')
    for name in names:
        ended = [line for key, line in runs.results.lines.items() if key.rpartition(' ')[0] == name]
        losses = [line['val_loss'] for line in ended]
        loss, error = statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0
        sign = '' if name.endswith('next') else '<= '
        drawn = f', drawing {ended[0]["val_error"]:.3f}' if ended[0]['val_error'] else ''
        spread = f' ± {error:.3f}' if error else ''
        print(f'| {name} | {ended[0]["parameters"]} | {sign}{loss:.3f}{spread}{drawn} | {sign}{loss / math.log(2):.3f} '
              f'| {len(losses)} |')


# --- few data, many epochs ------------------------------------------------------------------------

def few(runs, text):
    path = os.path.join(runs.folder, 'few.txt')
    with open(text, 'rb') as f, open(path, 'wb') as to:
        to.write(f.read(FEW_BYTES * 5 // 3))
    runs.prepare('few', [path], ['--tokenizer=char', '--val_fraction=0.4'])
    steps = EPOCHS * FEW_BYTES // 4096
    more = f'--eval_interval={steps // 25} --eval_iters=256'
    runs.train({f'few, {name}': flags_of(row, 1, steps, 'few', more=more) for name, row in FEW.items()})
    print('| | lowest val loss | at epoch | at the end |\n| --- | --- | --- | --- |')
    curves = {}
    for name in FEW:
        curve = runs.curve(f'few, {name}')
        curves[f'{name} val'] = [(point.epoch, point.loss) for point in curve]
        sign = '' if name.startswith('next') else '<= '
        best, end = min(curve, key=lambda point: point.loss), curve[-1]
        print(f'| {name} | {sign}{best.loss:.3f} | {best.epoch:.0f} | {sign}{end.loss:.3f} |')
    write_picture(os.path.join(runs.folder, 'few.svg'), curves, f'epochs of {FEW_BYTES // 1000} KB')


# --- begun as a model of the next token ------------------------------------------------------------

def begun(runs, text):
    learn_characters(runs, text, ['gpt next', 'mamba next'])
    more = f'--eval_interval={BEGUN // 5}'
    wanted = {}
    for kind, row in dict(gpt=GPT, mamba=MAMBA).items():
        wanted[f'begun, {kind} from nothing'] = flags_of(f'{row} {BLOCK}16', 1, BEGUN, 'characters', more=more)
        source = os.path.basename(runs.path(f'{kind} next 1'))
        begin = f'{BLOCK}16 --init_from={source}'
        wanted[f'begun, {kind} from the next token'] = flags_of(begin, 1, BEGUN, 'characters', more=more)
    ended = runs.train(wanted)
    print(f'| blocks of 16, val loss after steps | {" | ".join(str(BEGUN // 5 * i) for i in range(1, 6))} |')
    print('| --- |' + ' --- |' * 5)
    for name in ended:
        losses = [f'<= {point.loss:.3f}' for point in runs.curve(name)]
        print(f'| {name.removeprefix("begun, ")} | {" | ".join(losses)} |')


# --- few steps ------------------------------------------------------------------------------------

@torch.no_grad()
def judged(judge, tok, texts):
    """Nats a character that a model of the next token pays for texts that begin with a line's end."""
    ids = torch.stack([torch.from_numpy(tok.encode(text)).long()[:WRITTEN + 1] for text in texts])
    return judge(ids[:, :-1], ids[:, 1:])[1].item()


def written(runs, name, *flags):
    """(texts, tokens a second) of sample.py, one after another."""
    words = [f'--out_dir={os.path.basename(runs.path(name))}', '--start=\n', f'--num_samples={TEXTS}', '--batch_size=1',
             f'--max_new_tokens={WRITTEN}', '--temperature=1.0', '--top_k=0', '--device=cpu', *flags]
    done = runs.script('sample.py', words)
    said = re.sub(r'\A(?:\w+ += .*\n)+', '', done.stdout)        # the settings
    texts = [text.removesuffix('\n')[-WRITTEN - 1:] for text in said.split(f'{RULE}\n')]
    rates = re.findall(r'(\d+) tokens, ([\d,]+) tokens/s', done.stderr)
    tokens = sum(int(n) for n, _ in rates)
    return texts, tokens / sum(int(n) / int(rate.replace(',', '')) for n, rate in rates)


def steps(runs, text):
    learn_characters(runs, text, ['gpt next', 'gpt masked', 'gpt block 16', 'hybrid next'])
    judge, tok = runs.model('hybrid next 1')
    val = runs.tokens('characters')
    own = [tok.decode(val[i * 997:i * 997 + WRITTEN + 1].tolist()) for i in range(64)]
    print(f'the judge is `hybrid next`, which finds {math.exp(judged(judge, tok, own)):.2f} in what people wrote')
    print('| | steps | tokens/s | perplexity a character, by the judge |\n| --- | --- | --- | --- |')
    ways = [('gpt next', WRITTEN, ())]
    for sampler in ('first', 'confidence'):
        ways += [('gpt masked', S, (f'--sampler={sampler}', f'--steps={S}')) for S in (128, 64, 32, 16)]
        ways += [('gpt block 16', 8 * S, (f'--sampler={sampler}', f'--steps={S}')) for S in (16, 8, 4, 2)]
    speed = 0.0
    for name, S, flags in ways:
        texts, rate = written(runs, f'{name} 1', *flags)
        speed = speed or rate
        sampler = flags[0].partition('=')[2] if flags else ''
        print(f'| {name}{sampler and ", " + sampler} | {S} | {rate:,.0f} ({rate / speed:.2f}x) '
              f'| {math.exp(judged(judge, tok, texts)):.2f} |', flush=True)


# --- names taken out of Python ---------------------------------------------------------------------

def taken_out(val, T):
    """Yields windows (T,) of bytes, from where to where a name is in their middle, and the T bytes up to its end."""
    text = val.clip(0, 255).astype(np.uint8).tobytes()
    names = [m.span() for m in re.finditer(rb'(?<![\w"\'])[A-Za-z_]\w{3,11}(?!\w)', text)
             if m.start() > T and m.end() < len(text) - T and m.group().decode() not in kwlist]
    chosen = np.random.default_rng(0).choice(len(names), NAMES, replace=False)
    for start, end in (names[i] for i in chosen):
        first = (start + end) // 2 - T // 2
        yield val[first:first + T], start - first, end - first, val[end - T:end]


@torch.no_grad()
def identifiers(runs, text):
    T = 256
    runs.prepare('python', [], ['--tokenizer=byte'])
    runs.train({f'python {name}': flags_of(row, 1, 2000, 'python', T, '--eval_interval=1000 --eval_iters=512')
                for name, row in PYTHON.items()})
    val = runs.tokens('python')
    (next_net, _), (net, tok) = runs.model('python next'), runs.model('python masked')
    filler = Filler(net, tok, 'cpu')
    likeliest = partial(draw_each, temperature=0.0)
    found = dict.fromkeys(('next token, from the left', 'holes, from the left', 'holes, both sides'), 0)
    for window, start, end, before in taken_out(np.abs(val), T):
        window = torch.from_numpy(window).long()
        name = window[start:end]
        ids = torch.from_numpy(before[:T - len(name)]).long()[None]
        logits, state = next_net.step(ids)
        guess = []
        for _ in name:
            guess.append(int(logits[0, -1, :tok.vocab_size].argmax()))
            logits, state = next_net.step(torch.tensor([guess[-1:]]), state)
        found['next token, from the left'] += guess == name.tolist()
        for way, hides_right in (('holes, from the left', True), ('holes, both sides', False)):
            z = window.clone()
            z[start:end] = filler.mask_id
            if hides_right:
                z[end:] = filler.mask_id
            places = torch.arange(T)
            holes = (places >= start) & (places < end)
            *_, filled = uncover(filler.scores, z, holes, 'confidence', 0, likeliest, None, filler.mask_id)
            found[way] += filled[start:end].tolist() == name.tolist()
    print(f'| {NAMES} names of 4 to 12 letters | found |\n| --- | --- |')
    for way, n in found.items():
        print(f'| {way} | {n / NAMES:.1%} |')


# --- speed ----------------------------------------------------------------------------------------

def speed(runs, text):
    """Tokens a second of training, by turns; the first steps do not count."""
    runs.prepare('characters', [text], ['--tokenizer=char'])
    rates = {name: [] for name in SPEED}
    for turn in range(3):
        for name, row in SPEED.items():
            flags = ('--block_size=256 --batch_size=8 --tokens_per_step=2048 --max_iters=10 --log_interval=5 '
                     f'--eval_iters=1 --dataset=characters --init_from=scratch --out_dir=speed-{turn} --dtype={dtype}')
            runs.script('train.py', [*row.split(), *flags.split()])
            rates[name] += [line['tokens_per_s'] for line in runs.log(f'speed-{turn}') if 'tokens_per_s' in line][-1:]
    print('| | tokens/s | beside the next token |\n| --- | --- | --- |')
    for name, own in rates.items():
        base = rates[f'{name.split(" ")[0]} next']
        ratios = sorted(a / b for a, b in zip(own, base))
        print(f'| {name} | {statistics.median(own):,.0f} | {ratios[1]:.2f}x ({ratios[0]:.2f}–{ratios[2]:.2f}) |')


SECTIONS = {section.__name__: section for section in (objectives, begun, few, steps, identifiers, speed)}


def main():
    unknown = [name for name in sections.split(',') if name not in SECTIONS]
    if unknown:
        fail(f'sections={sections}: there are {", ".join(SECTIONS)}')
    if len(inputs) != 1 or not os.path.isfile(inputs[0]):
        fail('name one text: python -m mambino.bench.holes input.txt')
    runs = Runs(folder, workers)
    for name in sections.split(','):
        print(f'\n{name}', flush=True)
        SECTIONS[name](runs, inputs[0])


if __name__ == '__main__':
    end_quietly()
    configure(globals(), positional='inputs')
    main()
