"""Texts with holes: which tokens see which in a model that learns to fill them (masked diffusion).

    blocks = Blocks(idx, K, window)             # of a model's `hidden_states`, in training
    blocks = Blocks(idx, 0, window)             # a whole window is one block

A hole sees its own block, before it and behind it, and the text before that block without its holes
(Arriola et al. 2025); a block as long as the window is plain masked diffusion (Sahoo et al. 2024). For
blocks both texts go through the model at once, the clean one in the first half of the rows:

    rows 0 to n      clean     sees the clean blocks up to its own
    rows n to 2 n    noisy     sees its own block here, and the clean blocks before it

A recurrence reads on from the state that the clean blocks leave; against the direction of reading
(`both_ways`) it begins anew in each block, so that what is finished is a state of fixed size.

Letters of the shapes: T tokens in a window, K in a block, D width, G key heads, P head size.
"""
import math

import torch
import torch.nn as nn

OBJECTIVES = 'next', 'masked', 'block'


def check_objective(config):
    """ValueError if a config's objective or block_length cannot be."""
    if config.objective not in OBJECTIVES:
        raise ValueError(f'objective={config.objective!r} must be one of {", ".join(OBJECTIVES)}')
    if (config.objective == 'block') != (config.block_length > 0):
        raise ValueError(f'block_length={config.block_length}: objective=block has blocks of 1 token or more, the '
                         'others have 0')
    if config.shifted and config.objective == 'next':
        raise ValueError('shifted is for objective=masked and block alone')
    if config.block_length and config.block_size % config.block_length:
        raise ValueError(f'block_size={config.block_size} must be a multiple of block_length={config.block_length}')


def fills_holes(config):
    """Whether a model of this config, as a checkpoint has it, fills holes; an older one has none."""
    return config.get('objective', 'next') != 'next'


def with_clean(idx, block_length):
    """What a model reads in training on idx (B, T) with holes, random ones say: in blocks as much clean text, too."""
    return torch.cat((idx, idx)) if block_length else idx


def of_the_one_before(x, before=None):
    """x (B, T, …) → of each place what its predecessor has; of the first `before` (B, 1, …), or its own."""
    return torch.cat((x[:, :1] if before is None else before, x[:, :-1]), 1)


def speaking(x, config):
    """Of the hidden states x (rows, T, D) of what `with_clean` gives, those that speak of each token of the text with
    holes (n, T, D): its own. Where `shifted`, those of the token before it, which of a block's first is clean; of
    a window's first none are."""
    K = config.block_length
    if not config.shifted:
        return x[len(x) // 2:] if K else x
    before = of_the_one_before(x)
    if not K:
        return before
    begins = torch.arange(x.shape[1], device=x.device) % K == 0
    clean, noisy = before.chunk(2)
    return torch.where(begins[:, None], clean, noisy)


class Blocks:
    """What the layers of a model need for idx (rows, T), in the place of a KVStep: there is no cache. K: tokens of
    a block, of which the first half of the rows is clean; 0: all is one block."""
    is_first = False

    def __init__(self, idx, K=0, window=0):
        rows, self.T = idx.shape
        self.K = K or self.T
        if self.T % self.K or K and rows % 2:
            raise ValueError(f'idx {tuple(idx.shape)} is not clean rows and as many with holes, in blocks of {K}')
        self.clean = rows // 2 if K else 0                      # rows without holes
        self.positions = torch.arange(self.T, device=idx.device)
        i, j = self.positions[:, None], self.positions
        near = (i - j).abs() < (window or self.T)
        own = (i // self.K == j // self.K) & near               # (T, T)
        if not self.clean:
            self.mask = own[None, None]                         # (1, 1, T, T)
            return
        before = (j // K < i // K) & near
        of_clean = torch.cat((before | own, torch.zeros_like(own)), 1)      # (T, 2 T)
        of_noisy = torch.cat((before, own), 1)
        self.mask = torch.stack((of_clean, of_noisy))[:, None]   # (2, 1, T, 2 T)

    def append(self, cache, k, v):
        """Keys and values (rows, T or 2 T, G, P) that queries attend to, of k, v (rows, T, G, P)."""
        if not self.clean:
            return k, v
        return [torch.cat((u[:self.clean].repeat(2, 1, 1, 1), u), 1) for u in (k, v)]

    def forth(self, recur, u):
        """recur(u), u (rows, T, …); a noisy block begins with the state that the clean ones before it leave."""
        if not self.clean:
            return recur(u)
        clean, noisy = u[:self.clean], u[self.clean:]
        cache, before, ys = {}, [], []
        for block in clean.split(self.K, 1):
            before.append(dict(cache))
            ys.append(recur(block, cache))
        before[0] = {name: torch.zeros_like(value) for name, value in cache.items()}
        state = {name: torch.stack([each[name] for each in before], 1).flatten(0, 1) for name in cache}
        return torch.cat((torch.cat(ys, 1), self.joined(recur(self.cut(noisy), state))))

    def back(self, recur, u):
        """recur(u) from the last token of each block to its first."""
        return self.joined(recur(self.cut(u).flip(1)).flip(1))

    def cut(self, u):
        """(rows, T, …) → (rows T/K, K, …)"""
        return u.unflatten(1, (-1, self.K)).flatten(0, 1)

    def joined(self, y):
        return y.unflatten(0, (-1, self.T // self.K)).flatten(1, 2)


# --- recurrences ----------------------------------------------------------------------------------

class Mixer(nn.Module):
    """in_proj, a recurrence, out_proj. x (B, T, D) → (B, T, D); cache: the state, None for zeros, is replaced."""

    def forward(self, x, cache=None):
        return self.out_proj(self.recur(self.in_proj(x), cache))


def out_proj_init(linear, n_residual):
    """Kaiming-uniform over the root of the residual branches: what is added to the stream shrinks with depth."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    with torch.no_grad():
        linear.weight /= math.sqrt(n_residual)


def way_back(config, build):
    """A mixer for the way from the last token to the first, from build(); None where there is no such way. One
    that shares has no projections of its own."""
    if config.objective == 'next':
        return None
    mixer = build()
    if config.share_projections:
        mixer.in_proj = mixer.out_proj = None
    return mixer


def both_ways(mixer, back, x, blocks=None, cache=None):
    """mixer(x), x (B, T, D), plus, if there is one, what `back` makes of it from the last token to the first
    (Sahoo et al. 2024). A back without projections has the mixer's. With a cache, x is one block."""
    def read(forth, reverse, u):
        if blocks is None:
            return forth(u, cache) + reverse(u.flip(1)).flip(1)
        return blocks.forth(forth, u) + blocks.back(reverse, u)
    if back is None:
        return mixer(x, cache)
    if back.in_proj is not None:
        return read(mixer, back, x)
    return mixer.out_proj(read(mixer.recur, back.recur, mixer.in_proj(x)))
