"""Models to sample from: two trained runs that sample.py opens, and small ones of each kind."""
import os

import torch

from helpers.models import perturb
from helpers.runs import script, write_text
from mambino.weights import checkpoint, loading

# of the runs, each with its tokenizer's name
KINDS = {'char': '--model=gpt --qk_norm=False', 'bpe': '--model=mamba'}

SMALL = {
    'gpt': ('gpt', dict(n_head=4, n_kv_head=2, block_size=16)),
    'window': ('gpt', dict(n_head=4, window=8, tie_embeddings=False)),
    'mamba1': ('mamba', dict(state_size=8, version=1)),
    'mamba2': ('mamba', dict(state_size=8, head_dim=16)),
    'mamba3': ('mamba', dict(state_size=8, head_dim=16, version=3)),
    'delta': ('hybrid', dict(state_size=8, n_head=4, ssm_head_dim=16, layers='da', block_size=16)),
    'hybrid': ('hybrid', dict(state_size=8, n_head=4, ssm_head_dim=16, window=0, block_size=16)),
}
# for SMALL, of all lengths
PROMPTS = [[1, 2, 3], [4] * 21, [5], list(range(40)), [6, 7], [3, 2, 1]]


def train_runs(folder):
    """Trains char/ and bpe/ in a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        write_text('text.txt')
        for kind, model in KINDS.items():
            assert script('prepare.py', f'text.txt --tokenizer={kind} --vocab_size=400',
                          f'--out=data/{kind}') == 0
            assert script('train.py', f'--dataset={kind} --out_dir={kind} {model} --n_layer=1',
                          '--n_embd=32',
                          '--block_size=32 --batch_size=8 --tokens_per_step=256 --max_iters=60',
                          '--optimizer=adamw --learning_rate=1e-2 --schedule=cosine --device=cpu --dtype=float32') == 0
    finally:
        os.chdir(before)


def open_run(kind):
    """→ (the model, the tokenizer) of a run in the working directory."""
    ckpt = checkpoint.load_checkpoint(kind)
    return loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)


def small_net(name):
    """A small model of SMALL, nothing in it 0 or 1, of 60 ids, the last 10 of them padding."""
    torch.manual_seed(0)
    kind, config = SMALL[name]
    net = checkpoint.build(kind, dict(vocab_size=60, n_layer=2, n_embd=32, **config))
    return perturb(net, 0.3).eval()
