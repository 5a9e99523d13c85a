"""Val loss of models of equal size: by rate, by tokens and time, in bits a byte, by position in long texts. Each
section yields lines of Markdown."""
import math
import os
import statistics

import torch

from mambino.bench.evidence import baselines
from mambino.bench.plot import write_picture

# 0.86M parameters for characters, all within 2% of each other
MODELS = {
    'GPT': '--model=gpt --n_layer=4 --n_head=2 --qk_norm=True',
    'Mamba-2': '--model=mamba --n_layer=8 --state_size=16',
    'hybrid': '--model=hybrid --n_layer=3 --n_head=2 --qk_norm=True --state_size=32 --intermediate_size=288'}
RECIPE = ('--optimizer=muon --schedule=wsd --decay_fraction=0.6 --warmup_iters=20 --log_interval=10 --block_size=128 '
          '--n_embd=128')
RATES = (3e-3, 1e-2, 2e-2, 4e-2)


def flags_of(model, more, plan, seed=1, rate=1e-2, steps=None):
    return (f'{RECIPE} {MODELS[model]} --tokens_per_step={plan.tokens_per_step} --batch_size=32 --dtype={plan.dtype} '
            f'--learning_rate={rate} --seed={seed} --max_iters={steps or plan.steps} {more}').split()


def rate_of(runs, plan, model):
    """The best of the sweep, if there was one."""
    names = {rate: f'sweep {model} {rate:g}' for rate in plan.rates}
    losses = {rate: runs.results.lines[name]['val_loss'] for rate, name in names.items() if name in runs.results.lines}
    return min(losses, key=losses.get, default=1e-2)


def mean_and_sd(values):
    spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{spread}'


def loss_at(curve, seconds):
    """The lowest val loss up to a time of training."""
    return min((point.loss for point in curve if point.seconds <= seconds), default=math.nan)


# --- A, B, C: the loss -----------------------------------------------------------------------------

def sweep(runs, plan):
    """Rates for each model, with a quarter of the steps; the best is used from here on."""
    steps = max(20, plan.steps // 4)
    names = {(model, rate): f'sweep {model} {rate:g}' for model in MODELS for rate in plan.rates}
    ended = runs.train({name: flags_of(model, f'--dataset=characters --eval_interval={steps}', plan, 1, rate, steps)
                        for (model, rate), name in names.items()})
    yield '| val loss by rate | ' + ' | '.join(f'{rate:g}' for rate in plan.rates) + ' |'
    yield '| --- |' + ' --- |' * len(plan.rates)
    for model in MODELS:
        losses = {rate: ended[names[model, rate]]['val_loss'] for rate in plan.rates}
        best = min(losses, key=losses.get)
        yield f'| {model} | ' + ' | '.join(f'**{loss:.3f}**' if rate == best else f'{loss:.3f}'
                                           for rate, loss in losses.items()) + ' |'


def losses(runs, plan):
    """Val loss at equal tokens, and at the time in which the quickest was done."""
    for corpus in plan.corpora:
        more = f'--dataset={corpus} --eval_interval={max(1, plan.steps // 10)}'
        names = {model: [f'{corpus} {model} {seed}' for seed in plan.seeds] for model in MODELS}
        ended = runs.train({name: flags_of(model, more, plan, seed, rate_of(runs, plan, model))
                            for model in MODELS for seed, name in zip(plan.seeds, names[model])})
        quickest = min(ended[name]['seconds'] for own in names.values() for name in own)
        yield f'\n{corpus}, {plan.steps * plan.tokens_per_step / 1e6:.1f}M tokens:\n'
        yield (f'| | parameters | val loss at equal tokens | in {quickest:.0f} s, the time of the quickest '
               '| tokens/s, one core |\n| --- | --- | --- | --- | --- |')
        for model, own in names.items():
            seconds = statistics.mean(ended[name]['seconds'] for name in own)
            at_end = mean_and_sd([ended[name]['val_loss'] for name in own])
            in_time = mean_and_sd([loss_at(runs.curve(name), quickest) for name in own])
            yield (f'| {model} | {ended[own[0]]["parameters"]} | {at_end} | {in_time} '
                   f'| {plan.steps * plan.tokens_per_step / seconds:,.0f} |')
        curves = {f'{model} val': [(point.tokens, point.loss) for point in runs.curve(own[0])]
                  for model, own in names.items()}
        write_picture(os.path.join(plan.pictures, f'losses-{corpus}.svg'), curves, 'tokens')
        yield f'\n![val loss over tokens](evidence/losses-{corpus}.svg)'


# --- D: bits a byte --------------------------------------------------------------------------------

def bytes_of(runs, dataset, split, most):
    """The text of a split as bytes, up to so many."""
    tok = runs.tokenizer(dataset)
    return tok.decode(runs.tokens(dataset, split)[:most].tolist()).encode('utf-8')[:most]


def bits(runs, plan):
    """Bits a byte of the val split, beside what needs no network."""
    yield '| bits a byte | ' + ' | '.join(plan.corpora) + ' |\n| --- |' + ' --- |' * len(plan.corpora)
    rows = {'every byte alike': [8.0] * len(plan.corpora), 'xz -9e, which has read the train split': [],
            'the last four bytes (Kneser-Ney)': []}
    for corpus in plan.corpora:
        train, val = (bytes_of(runs, corpus, split, plan.most_bytes) for split in ('train', 'val'))
        rows['xz -9e, which has read the train split'].append(baselines.packed(train, val))
        rows['the last four bytes (Kneser-Ney)'].append(baselines.n_gram(train, val))
    for model in MODELS:
        rows[model] = [statistics.mean(runs.bits(f'{corpus} {model} {seed}') for seed in plan.seeds)
                       for corpus in plan.corpora]
    for name, values in rows.items():
        yield f'| {name} | ' + ' | '.join(f'{value:.3f}' for value in values) + ' |'


# --- E: length -------------------------------------------------------------------------------------

@torch.no_grad()
def by_position(net, ids, T, times):
    """{position: nats a token} in texts of T * times tokens, read with all that stands before; positions by octaves
    from T/2 on."""
    length = T * times
    n = min(24, (len(ids) - 1) // length)
    rows = torch.from_numpy(ids[:n * length + 1]).long()
    x, y = rows[:-1].view(n, length), rows[1:].view(n, length)
    state, nats = None, []
    for idx, targets in zip(x.split(64, 1), y.split(64, 1)):
        logits, state = net.step(idx, state)
        nats.append(torch.nn.functional.cross_entropy(logits.mT, targets, reduction='none'))     # (n, 64)
    nats = torch.cat(nats, 1).mean(0)                           # (length,)
    edges = [0] + [T // 2 * 2 ** i for i in range(int(math.log2(2 * times)) + 1)]
    return {end: nats[start:end].mean().item() for start, end in zip(edges, edges[1:])}


def length(runs, plan):
    """Loss by position far beyond the trained length; of Mamba-2 also where states were carried in training."""
    ways = {model: (model, '') for model in MODELS} | {'Mamba-2, carry_state': ('Mamba-2', '--carry_state=True')}
    more = f'--dataset={plan.corpora[0]} --eval_interval={plan.steps}'
    runs.train({f'length {way}': flags_of(model, f'{more} {flag}', plan, 1, rate_of(runs, plan, model))
                for way, (model, flag) in ways.items()})
    found = {way: by_position(runs.model(f'length {way}')[0], runs.tokens(plan.corpora[0]), 128, plan.times)
             for way in ways}
    ends = list(next(iter(found.values())))
    yield '| tokens from … to | ' + ' | '.join(f'{a:,}–{b:,}' for a, b in zip([0, *ends], ends)) + ' |'
    yield '| --- |' + ' --- |' * len(ends)
    for way, at in found.items():
        yield f'| {way} | ' + ' | '.join(f'{at[end]:.3f}' for end in ends) + ' |'
