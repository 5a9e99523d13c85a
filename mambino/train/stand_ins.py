"""What takes the memory of a card's kernels where a step is only counted (counting.py): tensors of
their shapes, and nothing computed.

    with in_place('cuda'):              # asked before all kernels for the operation of their name
        net(idx, idx)[1].backward()     # on tensors without data

A kernel that is an operation of torch's with shapes of its own stands for itself. Without a card to
ask, what needs a compiler or a package is taken to be missing: so what is counted is the most. """
from contextlib import contextmanager

import torch
from torch.autograd import Function
from torch.utils._python_dispatch import _disable_current_modes

from mambino.kernels import fused, triton_kernels
from mambino.kernels.checked import compiles
from mambino.kernels.registry import KERNELS


@contextmanager
def in_place(device):
    """Within, the stand-ins for this kind of device are asked first."""
    table = {} if device == 'cpu' else stand_ins(device)
    for name, function in table.items():
        KERNELS[name].insert(0, function)
    try:
        yield
    finally:
        for name, function in table.items():
            KERNELS[name].remove(function)


def stand_ins(device):
    """{operation: what stands for the kernel that computes it on this kind of device}."""
    table = dict(rms_norm=rms_norm)
    if device != 'cuda' or not torch.cuda.is_available():
        return table
    table |= dict(mamba1_scan=mamba1_scan, mamba2_scan=mamba2_scan)
    if compiles('cuda'):
        table |= dict(attention=attention)
    return table


# --- norms and attention --------------------------------------------------------------------------

class Norm(Function):
    """F.rms_norm, which keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.zeros_like(x)              # a model that looks at its numbers has some

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def rms_norm(x, weight, eps, dtype=None):
    return Norm.apply(x.float(), weight).to(dtype or x.dtype)


class Attention(Function):
    """A kernel that keeps what goes in and comes out, and one number a query and head. q (B, H, T,
    P)."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, sums = ctx.saved_tensors
        torch.empty_like(sums)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def attention(q, k, v, window=0, dropout=0.0, mask=None):
    """flex_attention, where a window is short."""
    T, S = q.shape[1], k.shape[1]
    if dropout or mask is not None or S != T or not 0 < 2 * window <= T:
        return NotImplemented
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))            # (B, heads, T, P)
    return Attention.apply(q, k, v).transpose(1, 2).flatten(2)


# --- the recurrences of a Mamba -------------------------------------------------------------------

def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    """Our Triton kernel, where the card runs it; what others do is counted as in plain PyTorch."""
    if on_the_card(triton_kernels.takes_scan, x, dt, A, B, C, z, state):
        return triton_kernels.scan(x, dt, dt_bias, A, B, C, D, z, state)
    return NotImplemented


def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    """Our Triton kernels, else mamba-ssm's, where the card runs them."""
    if on_the_card(triton_kernels.takes_ssd, xBC, dt, groups, head_dim, state):
        return triton_kernels.ssd(xBC, dt, dt_bias, A, D, state, groups=groups, head_dim=head_dim)
    if on_the_card(lambda kind: fused.is_fused('ssd', kind)):
        return by_mamba_ssm(xBC, dt, dt_bias, A, D, groups, head_dim, state)
    return NotImplemented


def by_mamba_ssm(xBC, dt, dt_bias, A, D, groups, head_dim, state=None):
    return fused.compute_ssd(xBC, dt, dt_bias, A, D, groups, head_dim, state)


def on_the_card(question, *args):
    """The answer of question('cuda', …), which tries something on the card itself: with real
    tensors."""
    with _disable_current_modes():
        return question('cuda', *args)
