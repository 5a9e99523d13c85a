"""Hides tokens of texts, for a model that learns to fill holes, and for the bound of what a text is worth to it.

    hide = hiding(net.config)                           # None where the next token is learned
    idx, targets, factors = hide(x, y, us, noise)       # of a batch: what the model is called with
    for piece in for_evaluation(hide, x, y, targets): …                         # the same each time

In the papers each token is hidden by itself with probability t and counts 1/t (Sahoo et al. 2024, eq. 11); here
exactly k of L are, k from 1 to L alike, and count L/k. Both have the same expectation (Ou et al. 2025, eq. 11), this
one varies less, and a block of one token is always hidden: it is learned as the next token is.

The first token of a window is never hidden, nor are those that are not learned. Letters of the shapes: B batch,
T time, K tokens in a block.
"""
import statistics
import zlib
from functools import partial

import numpy as np
import torch

DRAWS = 4       # of holes, for each text in an evaluation


def learnable(y):
    """Which tokens x of a batch may be hidden: those that are targets. y (B, T): x one later, -1 where that is
    not learned → (B, T) bool."""
    first = torch.zeros_like(y[:, :1], dtype=torch.bool)
    return torch.cat((first, y[:, :-1] >= 0), 1)


def hidden(x, y, us, noise, mask_id, block_length=0, max_weight=0.0):
    """x, y (B, T) of a batch, us (B,) and noise (B, T) from 0 to 1 → idx (B, T) with holes, in blocks (2 B, T), clean
    rows first; targets (B, T), -1 but in holes; factors (B, T), by which their losses count."""
    B, T = x.shape
    K = block_length or T
    n = T // K
    may = learnable(y).view(B, n, K)
    L = may.sum(-1)                                             # (B, n) tokens of each block
    u = (us[:, None] + torch.arange(n) / n) % 1                 # of a window's blocks, evenly spread
    k = (1 + (u * L).long()).clamp(max=L)                       # of them so many are hidden: those that
    rank = noise.view(B, n, K).masked_fill(~may, 2.0).argsort(-1).argsort(-1)   # have the least noise
    holes = ((rank < k[..., None]) & may).view(B, T)
    weight = L / k.clamp(min=1)                                 # (B, n)
    if max_weight:
        weight = weight.clamp(max=max_weight)
    idx = x.masked_fill(holes, mask_id)
    factors = weight[..., None].expand(B, n, K).reshape(B, T)
    targets = x.masked_fill(~holes, -1)
    return torch.cat((x, idx)) if block_length else idx, targets, factors


def hiding(config, max_weight=0.0):
    """`hidden` as this model's objective has it, hide(x, y, us, noise); None where the next token is learned.
    max_weight: L/k counts so much at most, which learns sooner (Hang et al. 2023); 0: as it is, a bound."""
    if config.objective == 'next':
        return None
    return partial(hidden, mask_id=config.vocab_size - 1, block_length=config.block_length, max_weight=max_weight)


def draws(seed, numbers, T):
    """Noise (B, T) of sequences, by their numbers alone."""
    rows = [np.random.default_rng((seed, 7, int(number))).random(T, dtype=np.float32) for number in numbers]
    return torch.from_numpy(np.stack(rows))


def own_seed(row):
    """The seed of a text (T,) in an evaluation: by its tokens, wherever it stands."""
    return zlib.crc32(row.numpy().tobytes())


def for_evaluation(hide, x, y, targets):
    """Yields DRAWS times what `hide` makes of a batch, the same each time it is evaluated; the losses of its
    targets, so many, are to be meant."""
    seeds = [own_seed(row) for row in x]
    us = torch.tensor([np.random.default_rng(seed).random() for seed in seeds], dtype=torch.float32)
    for draw in range(DRAWS):
        noise = draws(draw, seeds, x.shape[1])
        idx, hidden_ids, factors = hide(x, y, (us + draw / DRAWS) % 1, noise)
        yield idx, hidden_ids, factors / max(1, targets)


def summed_up(means, targets):
    """(nats, their variance by the draws) of so many targets, whose mean loss was drawn once or several times."""
    nats = sum(means) / len(means) * targets
    variance = statistics.variance(means) / len(means) * targets ** 2 if len(means) > 1 else 0.0
    return nats, variance
