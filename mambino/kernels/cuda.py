"""The models' operations on NVIDIA cards in PyTorch that needs one: flex_attention for windows, grouped
products for experts, products that read the same merged. (triton_kernels.py has kernels of our own, fused.py
those of others.)

Where torch.compile does not work on the card, anywhere.py computes. Letters of the shapes as in
anywhere.py.
"""
import functools
import types

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.kernels.anywhere import in_window
from mambino.kernels.checked import compile_trouble, compiles, constant, notes, works
from mambino.kernels.registry import DEFINITIONS, describes, kernel

KIND = 'cuda'   # of the devices that all this is for

# --- projections of one input ---------------------------------------------------------------------

MERGED = True       # within torch.compile, which fuses the casts of the weights with their concatenation


def is_plain(module):
    """Whether a module is a linear map and nothing more: no adapter, no hook, not quantized."""
    return type(module) is nn.Linear and module.bias is None and not module._forward_hooks \
        and not module._forward_pre_hooks


@kernel
def project(x, *projections):
    """As one product, in a compiled training step: x is read once, and so is the gradient of each result."""
    kind = x.device.type
    if kind != KIND or not MERGED or not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return NotImplemented
    if not all(is_plain(projection) for projection in projections):
        return NotImplemented
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    weight = torch.cat([projection.weight.to(dtype) for projection in projections])
    return F.linear(x, weight).split([len(projection.weight) for projection in projections], -1)


# --- rotary positions -----------------------------------------------------------------------------

@torch.library.custom_op('mambino::rope_tables', mutates_args=())
def made_rope_tables(positions: torch.Tensor, frequencies: torch.Tensor, amplitude: float
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    return DEFINITIONS['rope_tables'](positions, frequencies, amplitude)


@made_rope_tables.register_fake
def rope_table_shapes(positions, frequencies, amplitude):
    cos = positions.new_empty(*positions.shape, 1, len(frequencies), dtype=torch.float32)
    return cos, torch.empty_like(cos)


@kernel
def rope_tables(positions, frequencies, amplitude=1.0):
    """One operation to a compiler, which would make each cosine anew for every element that is turned, in
    every layer: of a GPT's step on a card a quarter."""
    if positions.device.type != KIND or not torch.compiler.is_compiling():
        return NotImplemented
    return torch.ops.mambino.rope_tables(positions, frequencies, float(amplitude))


# --- attention in a window ------------------------------------------------------------------------

masks = types.SimpleNamespace()     # of flex_attention, by mask_name: a compiler reads them, and makes none


@functools.lru_cache(8)
def block_mask(T, window, device):
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda b, h, i, j: in_window(i, j, window), None, None, T, T, device=device)


@constant
def mask_name(T, window, kind):
    """The attribute of `masks` that is the block mask of these sizes on the present device; made if there is
    none."""
    index = torch.cuda.current_device() if kind == 'cuda' else 0
    name = f'{kind}_{index}_{T}_{window}'
    if not hasattr(masks, name):
        setattr(masks, name, block_mask(T, window, torch.device(kind, index)))
    return name


def flex_attention(q, k, v, mask):
    """attention in the window of a block mask. q (B, H, T, P), k, v (B, G, T, P)."""
    from torch.nn.attention import flex_attention as flex
    return flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=False)


def flex_works(q, k, v, window):
    """Whether flex_attention runs on such q, k, v, and its backward pass."""
    def attempt():
        leaves = [u.detach().clone().requires_grad_() for u in (q, k, v)]
        y = compiled_flex_attention()(*leaves, block_mask(q.shape[2], window, q.device))
        torch.autograd.grad(y.sum(), leaves)
    return works('flex_attention', (*q.shape, k.shape[1], window, q.dtype), attempt)


@kernel
def attention(q, k, v, window=0, dropout=0.0, mask=None):
    """In a short window by flex_attention, compiled, which skips the blocks that the window hides. In training
    alone: of prompts, each length would be compiled anew."""
    T, S = q.shape[1], k.shape[1]
    kind = q.device.type
    if kind != KIND or dropout or mask is not None or S != T or not 0 < 2 * window <= T:
        return NotImplemented
    if not torch.is_grad_enabled():
        return NotImplemented
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))            # (B, heads, T, P)
    if torch.compiler.is_compiling():
        y = flex_attention(q, k, v, getattr(masks, mask_name(T, window, kind)))
    elif compiles(kind) and flex_works(q, k, v, window):
        y = compiled_flex_attention()(q, k, v, block_mask(T, window, q.device))
    else:
        return NotImplemented
    return y.transpose(1, 2).flatten(2)


# --- experts --------------------------------------------------------------------------------------

@constant
def has_grouped_products(kind, D, inner):
    """Whether this card has a kernel for grouped products that runs in these sizes: elsewhere torch waits for
    the card to read the groups' sizes, and loops over them."""
    def attempt():
        with torch.enable_grad():
            rows = torch.zeros(32, D, dtype=torch.bfloat16, device=kind, requires_grad=True)
            gate_up = rows.new_zeros(2, 2 * inner, D, requires_grad=True)
            ends = torch.full((2,), 16, dtype=torch.int32, device=kind).cumsum(0, dtype=torch.int32)
            y = grouped_product(rows, gate_up.mT, ends)
            torch.autograd.grad(y, (rows, gate_up), torch.zeros_like(y))    # of a sum it would have no strides
    capable = kind == KIND and torch.cuda.get_device_capability()[0] in (9, 10)
    return capable and works('grouped_mm', (D, inner), attempt)


def grouped_product(rows, weights, ends):
    """rows (n, K), sorted by group, times the matrix (K, M) of their group in weights (E, K, M); ends (E):
    where each group's rows end → (n, M)."""
    function = getattr(F, 'grouped_mm', None) or torch._grouped_mm
    return function(rows, weights, offs=ends)


@kernel
def experts_swiglu(x, pairs, gate_up, down):
    """All experts' products as one, where none of them has a limit: the card is not waited for."""
    fits = x.dtype == torch.bfloat16 and x.shape[1] % 8 == down.shape[2] % 8 == 0
    if not fits or pairs.capacity < len(x) or not has_grouped_products(x.device.type, x.shape[1], down.shape[2]):
        return NotImplemented
    ends = pairs.counts.cumsum(0, dtype=torch.int32)
    rows = x.index_select(0, pairs.token)                       # (n k, D), sorted by expert
    gate, up = grouped_product(rows, gate_up.mT, ends).chunk(2, -1)
    return grouped_product(F.silu(gate) * up, down.mT, ends)


@describes
def describe(kind, is_compiled):
    """What does not work of what this file has."""
    if kind != KIND:
        return [], []
    lines = [notes[name] for name in ('flex_attention', 'grouped_mm') if name in notes]
    if compile_trouble(kind):
        lines.append(f'windows without torch.compile, which does not work here ({compile_trouble(kind)})')
    return [], lines
