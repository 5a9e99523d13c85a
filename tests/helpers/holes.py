"""Small models that fill holes, of each kind; the last id of V stands for what is hidden."""
import os
import shutil
from contextlib import contextmanager

import torch

from helpers.models import GPT_SIZE, HYBRID_SIZE, SSM_SIZE, perturb
from helpers.runs import script
from mambino.weights import checkpoint

V, T = 12, 16                   # the last id stands for what is hidden
MODELS = {
    'gpt': ('gpt', GPT_SIZE),
    'gpt-window': ('gpt', dict(GPT_SIZE, n_kv_head=2, qk_norm=True, window=6)),
    'gpt-experts': ('gpt', dict(GPT_SIZE, n_expert=4, intermediate_size=16)),
    'mamba1': ('mamba', dict(SSM_SIZE, version=1)),
    'mamba2': ('mamba', dict(SSM_SIZE, head_dim=16)),
    'mamba2-apart': ('mamba', dict(SSM_SIZE, head_dim=16, share_projections=False)),
    'mamba3': ('mamba', dict(SSM_SIZE, version=3, head_dim=16, intermediate_size=48)),
    'hybrid': ('hybrid', dict(HYBRID_SIZE, window=6)),
    'hybrid-delta': ('hybrid', dict(HYBRID_SIZE, layers='da', window=0, low_rank=8)),
}


def build(name, **changes):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    net = checkpoint.build(kind, settings | dict(vocab_size=V, block_size=T) | changes)
    return perturb(net, 0.2).eval()


def text(rows=2, length=T):
    return torch.randint(V - 1, (rows, length), generator=torch.Generator().manual_seed(3))


def batch(rows=2):
    """x, y of which all is learned."""
    ids = text(rows, T + 1)
    return ids[:, :-1], ids[:, 1:]


# --- runs that scripts open: hardly trained, which is enough to see what is done with them

RUNS = {
    'masked': '--model=hybrid --objective=masked',
    'block': '--model=mamba --objective=block --block_length=4',
    'gpt-block': '--model=gpt --objective=block --block_length=8',
}


@contextmanager
def runs_in(folder, trained_runs, names=RUNS):
    """A folder with some of RUNS, and char, which goes on from token to token; within it is the working directory."""
    for part in ('data/char', 'char'):
        shutil.copytree(trained_runs / part, folder / part)
    before = os.getcwd()
    os.chdir(folder)
    try:
        for name in names:
            assert script('train.py', f'--dataset=char --out_dir={name} {RUNS[name]} --n_layer=1 --n_embd=32',
                          '--block_size=32 --batch_size=8 --tokens_per_step=256 --max_iters=2 --optimizer=adamw',
                          '--learning_rate=1e-2 --warmup_iters=1 --device=cpu --dtype=float32') == 0
        yield folder
    finally:
        os.chdir(before)
