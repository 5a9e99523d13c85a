"""Val loss of models of equal size: by rate, by tokens and time, in bits a byte, by position in
long texts. Each section yields lines of Markdown."""
import math
import os
import statistics
from functools import partial

import torch

from mambino.bench.evidence import baselines
from mambino.bench.plot import write_picture
from mambino.configurator import fail
from mambino.sample import generation

# 0.85M parameters for characters, all within 2% of each other
MODELS = {
    'GPT': '--model=gpt --n_layer=4 --n_head=2 --qk_norm=True',
    'Mamba-2': '--model=mamba --n_layer=8 --state_size=16',
    'hybrid': '--model=hybrid --n_layer=3 --n_head=2 --qk_norm=True --state_size=32 '
              '--intermediate_size=280',
    'Mamba-1': '--model=mamba --version=1 --n_layer=5 --state_size=16 --n_embd=156',
    'Mamba-3': '--model=mamba --version=3 --n_layer=8 --state_size=16'}
THREE = ['GPT', 'Mamba-2', 'hybrid']        # where time is short
RECIPE = ('--optimizer=muon --schedule=wsd --decay_fraction=0.6 --warmup_iters=20 --log_interval=10 '
          '--block_size=128 --n_embd=128')
RATES = (3e-3, 1e-2, 2e-2, 4e-2)


def models_of(corpus):
    return [*MODELS] if corpus == 'characters' else THREE


def flags_of(model, more, plan, seed=1, rate=1e-2, steps=None):
    return (f'{RECIPE} {MODELS[model]} --tokens_per_step={plan.tokens_per_step} --batch_size=32 '
            f'--dtype={plan.dtype} --learning_rate={rate} --seed={seed} '
            f'--max_iters={steps or plan.steps} {more}').split()


def at_hand(runs, name):
    """A run's name, or, where its line alone is here, that of one that is trained alike."""
    return f'again {name}' if name in runs.results.lines and not runs.is_here(name) else name


def sweep_of(plan, model):
    """{rate: (the name, the flags)} of the runs that find a model's rate, with a quarter of the steps."""
    steps = max(20, plan.steps // 4)
    more = f'--dataset=characters --eval_interval={steps}'
    return {rate: (f'sweep {model} {rate:g}', flags_of(model, more, plan, 1, rate, steps))
            for rate in plan.rates}


def rate_of(runs, plan, model):
    """The best of the sweep, if there was one."""
    found = {rate: runs.results.of(name, sorted(flags))
             for rate, (name, flags) in sweep_of(plan, model).items()}
    losses = {rate: line['val_loss'] for rate, line in found.items() if line}
    if len(losses) < len(found):
        print(f'note: {model} has no whole sweep of rates here: it takes 1e-2', flush=True)
        return 1e-2
    return min(losses, key=losses.get)


def mean_and_sd(values):
    spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{spread}'


def compared(found, words):
    """A sentence of {model: losses by seed}: which is best, and which it is not told apart from."""
    best = min(found, key=lambda model: statistics.mean(found[model]))
    if len(found[best]) == 1:
        return f'{words} {best} is lowest, of one seed.'
    near = []
    for model, values in found.items():
        gaps = [value - lowest for value, lowest in zip(values, found[best])]
        if model != best and statistics.mean(gaps) < 2 * statistics.stdev(gaps):
            near.append(model)
    if not near:
        return f'{words} {best} is best.'
    return (f'{words} {best} is best; not told apart from it, by less than two standard deviations: '
            f'{", ".join(near)}.')


# --- A, B, C: the loss -----------------------------------------------------------------------------

def sweep(runs, plan):
    """Rates for each model, with a quarter of the steps; the best is used from here on."""
    ended = runs.train(dict(asked for model in MODELS for asked in sweep_of(plan, model).values()))
    yield '| val loss by rate | ' + ' | '.join(f'{rate:g}' for rate in plan.rates) + ' |'
    yield '| --- |' + ' --- |' * len(plan.rates)
    for model in MODELS:
        losses = {rate: ended[name]['val_loss'] for rate, (name, _) in sweep_of(plan, model).items()}
        best = min(losses, key=losses.get)
        yield f'| {model} | ' + ' | '.join(f'**{loss:.3f}**' if rate == best else f'{loss:.3f}'
                                           for rate, loss in losses.items()) + ' |'


def losses(runs, plan):
    """Val loss at equal tokens; and at equal time: with as many steps as each makes while the
    quickest makes all of them, its schedule as short."""
    for corpus in plan.corpora:
        models = models_of(corpus)
        more = f'--dataset={corpus} --eval_interval={max(1, plan.steps // 5)}'
        rates = {model: rate_of(runs, plan, model) for model in models}
        names = {(model, seed): f'{corpus} {model} {seed}' for model in models for seed in plan.seeds}
        ended = runs.train({name: flags_of(model, more, plan, seed, rates[model])
                            for (model, seed), name in names.items()})
        speeds = {model: statistics.median(ended[names[model, seed]]['speed'] for seed in plan.seeds)
                  for model in models}
        quickest = max(speeds, key=speeds.get)
        steps = {model: max(1, round(plan.steps * speeds[model] / speeds[quickest])) for model in models}
        shorter = {(model, seed): name if model == quickest else f'{name}, as long as {quickest}'
                   for (model, seed), name in names.items()}
        ended |= runs.train({name: flags_of(model, more, plan, seed, rates[model], steps[model])
                             for (model, seed), name in shorter.items()})
        at_end, in_time = (
            {model: [ended[which[model, seed]]['val_loss'] for seed in plan.seeds] for model in models}
            for which in (names, shorter))
        seconds = plan.steps * plan.tokens_per_step / speeds[quickest]
        lines = [ended[name] for name in (*names.values(), *shorter.values())]
        processors = {line['machine'].split(',')[0] for line in lines}
        tokens = plan.steps * plan.tokens_per_step
        yield f'\n{corpus}, {tokens / 1e6:.1f}M tokens, on {" and ".join(sorted(processors))}:\n'
        yield (f'| | parameters | val loss at equal tokens | in {seconds:.0f} s of training | steps then '
               '| tokens/s, one core |\n| --- | --- | --- | --- | --- | --- |')
        for model in models:
            parameters = ended[names[model, plan.seeds[0]]]['parameters']
            yield (f'| {model} | {parameters} | {mean_and_sd(at_end[model])} | {mean_and_sd(in_time[model])} '
                   f'| {steps[model]} | {speeds[model]:,.0f} |')
        yield '\n' + compared(at_end, 'At equal tokens') + ' ' + compared(in_time, 'At equal time')
        first = {model: names[model, plan.seeds[0]] for model in models}
        if all(map(runs.is_here, first.values())):              # else the picture stays
            curves = {f'{model} val': [(point.tokens, point.loss) for point in runs.curve(name)]
                      for model, name in first.items()}
            write_picture(os.path.join(plan.pictures, f'losses-{corpus}.svg'), curves, 'tokens')
        yield f'\n![val loss over tokens]({os.path.basename(plan.pictures)}/losses-{corpus}.svg)'


# --- D: bits a byte --------------------------------------------------------------------------------

def bytes_of(runs, dataset, split, most):
    """The text of a split as bytes, up to so many."""
    tok = runs.tokenizer(dataset)
    return tok.decode(runs.tokens(dataset, split)[:most].tolist()).encode('utf-8')[:most]


def bits(runs, plan):
    """Bits a byte of the val split, beside what needs no network, which has read the train split, of
    it 10 MB at most."""
    names = {(corpus, model, seed): f'{corpus} {model} {seed}'
             for corpus in plan.corpora for model in THREE for seed in plan.seeds}
    runs.need(names.values(), 'bits')
    yield '| bits a byte | ' + ' | '.join(plan.corpora) + ' |\n| --- |' + ' --- |' * len(plan.corpora)
    rows = {'every byte alike': [8.0] * len(plan.corpora), 'xz -9e': [],
            'the last four bytes (Kneser-Ney)': []}
    for corpus in plan.corpora:
        train, val = (bytes_of(runs, corpus, split, plan.most_bytes) for split in ('train', 'val'))
        rows['xz -9e'].append(baselines.packed(train, val))
        rows['the last four bytes (Kneser-Ney)'].append(baselines.n_gram(train, val))
    for model in THREE:
        rows[model] = [statistics.mean(runs.bits(names[corpus, model, seed], corpus) for seed in plan.seeds)
                       for corpus in plan.corpora]
    for name, values in rows.items():
        yield f'| {name} | ' + ' | '.join(f'{value:.3f}' for value in values) + ' |'


# --- E: length -------------------------------------------------------------------------------------

@torch.no_grad()
def by_position(step, ids, T, times):
    """{position: nats a token} in texts of T * times tokens, read by step(idx, state) → (logits,
    state); positions by octaves from T/2 on."""
    length = T * times
    n = min(24, (len(ids) - 1) // length)
    rows = torch.from_numpy(ids[:n * length + 1]).long()
    x, y = rows[:-1].view(n, length), rows[1:].view(n, length)
    state, nats = None, []
    for idx, targets in zip(x.split(64, 1), y.split(64, 1)):
        logits, state = step(idx, state)
        nats.append(torch.nn.functional.cross_entropy(logits.mT, targets, reduction='none'))     # (n, 64)
    nats = torch.cat(nats, 1).mean(0)                           # (length,)
    edges = [0] + [T // 2 * 2 ** i for i in range(int(math.log2(2 * times)) + 1)]
    return {end: nats[start:end].mean().item() for start, end in zip(edges, edges[1:])}


def length(runs, plan):
    """Loss by position far beyond the trained length, 128, of the models of `losses`: of a GPT that
    sees all that stands before, and of one that sees the last 128 tokens, as sample.py has it; of
    Mamba-2 also where states were carried in training. A column is of one text for all rows; each is
    of another text, of which some are harder."""
    corpus, seed = plan.corpora[0], plan.seeds[0]
    if len(runs.tokens(corpus)) <= 128 * plan.times:
        fail(f'length: a text takes {128 * plan.times + 1:,} tokens, and the val split of {corpus} has '
             f'{len(runs.tokens(corpus)):,}: name a longer text')
    ways = {model: (at_hand(runs, f'{corpus} {model} {seed}'), model, '')
            for model in models_of(corpus)}
    ways['Mamba-2, carry_state'] = (at_hand(runs, f'length {corpus} Mamba-2 {seed}'), 'Mamba-2',
                                    ' --carry_state=True')
    more = f'--dataset={corpus} --eval_interval={max(1, plan.steps // 5)}'
    runs.train({name: flags_of(model, more + flag, plan, seed, rate_of(runs, plan, model))
                for name, model, flag in ways.values()})
    found = {}
    for way, (name, model, _) in ways.items():
        net = runs.model(name)[0]
        steps = {way: net.step}
        if model == 'GPT':
            steps = {'GPT, seeing all': net.step, 'GPT, seeing 128': partial(generation.step, net)}
        for words, step in steps.items():
            found[words] = by_position(step, runs.tokens(corpus), 128, plan.times)
    ends = list(next(iter(found.values())))
    yield '| tokens from … to | ' + ' | '.join(f'{a:,}–{b:,}' for a, b in zip([0, *ends], ends)) + ' |'
    yield '| --- |' + ' --- |' * len(ends)
    for way, at in found.items():
        yield f'| {way} | ' + ' | '.join(f'{at[end]:.3f}' for end in ends) + ' |'
    curves = {f'{way} val': [(math.log2(end / 64), loss) for end, loss in at.items()]
              for way, at in found.items()}
    path = os.path.join(plan.pictures, 'length.svg')
    write_picture(path, curves, '64 tokens, doubled so many times')
    yield f'\n![loss by position]({os.path.basename(plan.pictures)}/length.svg)'
