"""What a run learns: the next token, or tokens that are hidden (masked diffusion).

    us = spread(seed, step_start, numbers, n)       # of a step's sequences: how many tokens each hides

    next        - log p(x_i | x_1 … x_{i-1})
    masked      E_k  L/k  sum over the k hidden  - log p(x_i | the others of L)     (Sahoo et al. 2024, eq. 11)
    block       the sum over blocks of that, given the text before (Arriola et al. 2025, eq. 8)

The last two are no less than - log p(text): a bound. k is that of a number u from 0 to 1 for each sequence, evenly
spread over a step's: see mambino/holes.py.
"""
import numpy as np
import torch


def spread(seed, step_start, numbers, n):
    """u (B,) of sequences of a step that begins with number step_start and has n: evenly spread, moved by one
    random number for all."""
    moved = np.random.default_rng((seed, 8, step_start)).random()
    return torch.from_numpy((moved + (np.asarray(numbers) - step_start) / n) % 1).float()
