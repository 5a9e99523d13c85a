"""train.py with a model, or batches, changed in a way for which it has no flag:

    python -m mambino.bench.evidence.variants zero --model=gpt --dataset=…      # then as train.py

    zero        what is added to the residual stream begins at zero
    bigrams     to a token's embedding, one of the token and the one before it is added
    smear       … a learned share of the embedding before it
    values      … to attention's values, another embedding of the token
    softcap     logits end at 15, by a tanh (as in Gemma 2, Riviere et al. 2024)
    shorter     the first half of the steps in windows of a quarter, four times as many of them
    fewer       the first half of the steps with half of their windows; the log counts all
"""
import os
import runpy
import sys
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino import language_model
from mambino.bench.turns import HERE
from mambino.configurator import fail
from mambino.train.loader import Loader
from mambino.weights import checkpoint

ADDED = 'o_proj.weight', 'down_proj.weight', 'out_proj.weight'      # written into the stream
BUCKETS = 8192          # of pairs of tokens, where a vocabulary has more
CAP = 15.0
GATED_BY = 24           # channels of the embedding
HALF = 1                # of the run's steps, by main


def before(idx):
    """The token before each; the first of a window has itself. (B, T)."""
    return torch.cat((idx[:, :1], idx[:, :-1]), 1)


def zero(net):
    for name, p in net.named_parameters():
        if name.endswith(ADDED):
            nn.init.zeros_(p)


def bigrams(net):
    embedding = net.embedding()
    V, D = embedding.weight.shape
    embedding.pairs = nn.Embedding(min(V * V, BUCKETS), D)
    nn.init.zeros_(embedding.pairs.weight)

    def add(_, inputs, x):
        pair = (before(inputs[0]) * V + inputs[0]) % embedding.pairs.num_embeddings
        return x + embedding.pairs(pair)
    embedding.register_forward_hook(add)


def smear(net):
    embedding = net.embedding()
    embedding.smear = nn.Linear(GATED_BY, 1, bias=False)
    embedding.share = nn.Parameter(torch.zeros(1))
    nn.init.zeros_(embedding.smear.weight)

    def add(_, inputs, x):
        share = embedding.share * embedding.smear(x[..., :GATED_BY]).sigmoid()      # (B, T, 1)
        return x + share * F.pad(x[:, :-1], (0, 0, 1, 0))
    embedding.register_forward_hook(add)


def values(net):
    read = []

    def remember(_, inputs):
        read[:] = inputs
    embedding = net.embedding()
    embedding.register_forward_pre_hook(remember)
    tables = nn.ModuleList()
    for name, projection in [*net.named_modules()]:
        if name.endswith('v_proj'):
            table = nn.Embedding(len(embedding.weight), projection.out_features)
            nn.init.zeros_(table.weight)
            tables.append(table)
            projection.register_forward_hook(lambda _, __, v, table=table: v + table(read[0]).to(v.dtype))
    if not tables:
        raise SystemExit('values: this model has no attention')
    embedding.values = tables


def softcap(net):
    def capped(x, weight, targets, factors=None):
        logits = CAP * torch.tanh(F.linear(x, weight).float() / CAP)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    language_model.linear_cross_entropy = capped


def at_first(change):
    """What change(ids (B, T)) makes of idx and targets in the first HALF steps."""
    as_it_is = Loader.next

    def changed(loader):
        is_first = loader.step_start < HALF * loader.sequences * loader.world
        *batch, weight = as_it_is(loader)
        return *(map(change, batch) if is_first else batch), weight
    Loader.next = changed


def shorter(ids):
    return ids.view(4 * len(ids), -1)


def fewer(ids):
    return ids[:(len(ids) + 1) // 2]


VARIANTS = dict(zero=zero, bigrams=bigrams, smear=smear, values=values, softcap=softcap)
BATCHES = dict(shorter=shorter, fewer=fewer)


def at_each_model(change):
    """change(net) where a model is built, also where a run goes on."""
    def changed(model, config):
        net = model(config)
        change(net)
        return net
    for kind, (model, fields) in checkpoint.MODELS.items():
        checkpoint.MODELS[kind] = partial(changed, model), fields


def main():
    global HALF
    name = ''.join(sys.argv[1:2])
    if name not in VARIANTS | BATCHES:
        fail(f'name a change first: {", ".join(VARIANTS | BATCHES)}; then what train.py takes')
    del sys.argv[1]
    if name in BATCHES:
        steps = [flag.partition('=')[2] for flag in sys.argv if flag.startswith('--max_iters=')]
        if not steps or not steps[-1].isdecimal():
            fail(f'{name}: name the steps, --max_iters=')
        HALF = int(steps[-1]) // 2
        at_first(BATCHES[name])
    else:
        at_each_model(VARIANTS[name])
    sys.argv[0] = os.path.join(HERE, 'train.py')
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
