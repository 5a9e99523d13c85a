"""Whether a Mamba keeps a state: the parity of bits, learned on short sequences, asked of longer ones.

    python -m mambino.bench.parity --versions=2,3 --seeds=0,1

A sequence is a start token and T random bits; after each of them the model says whether the number of ones so
far is odd. One layer, trained at lengths that grow from 3 to 160, is tested at 256 (the state tracking of
Lahoti et al. 2026): a state that turns by half a circle at each one knows the answer, a state that only decays
must forget it. Chance is 50%.
"""
import math
import time

import torch
import torch.nn.functional as F

from mambino.configurator import configure, fail
from mambino.console import end_quietly
from model_mamba import MIXERS, Mamba, MambaConfig

versions = '2,3'        # of Mamba, each with each seed
seeds = '0'
n_embd = 32             # D; one layer
state_size = 64         # N
head_dim = 16           # P
steps = 5000
batch_size = 32         # sequences a step
shortest = 3            # tokens at the first step
longest = 160           # tokens from step `growing` on; in between lengths grow by the same factor a step
growing = 0.4           # part of all steps
test_length = 256       # tokens of the test, of 512 sequences
learning_rate = 6e-3    # at the start; it falls to 0 along a half cosine
warmup = 50             # steps
weight_decay = 0.1
label_smoothing = 0.2   # answers stay as sure of late bits as of early ones: turns must be exact
threads = 1             # of torch

START, VOCAB = 2, 4     # the ids of bits are 0 and 1


def sequences(n, T, generator, mixed=False):
    """Ids (n, 1 + T), and the parity of the bits up to each, (n, 1 + T). mixed: half of them have a share of ones
    of their own, from none to all."""
    share = torch.full((n, 1), 0.5)
    if mixed:
        own = torch.rand(n, 1, generator=generator) < 0.5
        share = torch.where(own, torch.rand(n, 1, generator=generator), share)
    bits = (torch.rand(n, T, generator=generator) < share).long()
    start = torch.zeros(n, 1, dtype=torch.long)
    return torch.cat((start + START, bits), 1), torch.cat((start, bits.cumsum(1) % 2), 1)


@torch.no_grad()
def accuracy(net, T):
    """Of the answers at token T, and of all up to it."""
    idx, parity = sequences(512, T, torch.Generator().manual_seed(0))
    right = (net(idx)[0].argmax(-1) == parity).double()
    return right[:, -1].mean().item(), right.mean().item()


def train(version, seed):
    """A model of this version, trained."""
    torch.manual_seed(seed)
    net = Mamba(MambaConfig(version=version, vocab_size=VOCAB, n_layer=1, n_embd=n_embd, state_size=state_size,
                            head_dim=head_dim, chunk_size=32, tie_embeddings=False))
    generator = torch.Generator().manual_seed(seed + 1)
    opt = torch.optim.AdamW(net.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    for step in range(steps):
        grown = min(1, step / (growing * steps))
        T = round(shortest * (longest / shortest) ** grown)
        for group in opt.param_groups:
            group['lr'] = learning_rate * min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
        idx, parity = sequences(batch_size, T, generator, mixed=True)
        loss = F.cross_entropy(net(idx)[0].flatten(0, 1), parity.flatten(), label_smoothing=label_smoothing)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
    return net.eval()


def main():
    torch.set_num_threads(threads)
    print(f'parity of bits, learned at {shortest} to {longest} tokens: accuracy at token {test_length}, of all before, '
          f'at token {longest}')
    for version in map(int, versions.split(',')):
        for seed in map(int, seeds.split(',')):
            begin = time.process_time()
            net = train(version, seed)
            seconds = time.process_time() - begin
            last, before = accuracy(net, test_length)
            print(f'version {version}, seed {seed}: {last:7.2%} {before:7.2%} {accuracy(net, longest)[0]:7.2%}   '
                  f'{net.num_params():,} parameters, {seconds:.0f} s', flush=True)


if __name__ == '__main__':
    end_quietly()
    configure(globals())
    if not all(number.isdecimal() for number in f'{versions},{seeds}'.split(',')) \
            or not {int(version) for version in versions.split(',')} <= {*MIXERS}:
        fail(f'--versions={versions} --seeds={seeds}: write numbers with commas between them, versions of '
             f'{", ".join(map(str, MIXERS))}')
    main()
