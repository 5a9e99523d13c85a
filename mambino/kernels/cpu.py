"""The models' operations on this CPU, forward and backward, by native.cpp, which native.py compiles
at the first start.

Each class is one operation for autograd: it makes the room for what is computed and hands both
passes to native.cpp, whose items torch's threads share. The functions marked `@kernel` have the
names and arguments of the definitions in the models' files.

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, G groups or key
heads, P head size, N state size, Q chunk, V vocabulary.
"""
import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels import native
from mambino.kernels.native import expect, launch, thread_count
from mambino.kernels.registry import kernel

PRECISIONS = (torch.float32, torch.bfloat16)    # of numbers that native.cpp reads and writes
BLOCK = 64          # queries, and keys, that attention.h looks at together
LANES = 16          # numbers that native.cpp computes side by side at most: what it takes is a multiple of it
_allowed = True
_estimated = None   # the kind of device that tensors on a CPU stand for


@contextmanager
def portable(kind=None):
    """Within, operations on a CPU are PyTorch's: for graphs, which could not hold others, and to
    estimate what another kind of device needs: they are then cut into pieces as for that."""
    global _allowed, _estimated
    before = _allowed, _estimated
    _allowed, _estimated = False, kind
    try:
        yield
    finally:
        _allowed, _estimated = before


def device_kind(x):
    """The kind of device that x is on, or stands for."""
    return _estimated or x.device.type


def exact_dtype(kind):
    """Of sums whose differences count: fp64, where this kind of device has it."""
    return torch.float32 if kind == 'mps' else torch.float64


def applies(x, *parameters):
    """Whether an operation on x goes to native.cpp; its parameters must be fp32."""
    return (_allowed and x.device.type == 'cpu' and x.dtype != torch.float64
            and all(p.dtype == torch.float32 for p in parameters)
            and not torch.compiler.is_compiling() and native.library() is not None)


class NoBackward:
    """What an operation's forward pass keeps things for, where there will be no backward pass."""
    needs_input_grad = ()

    def save_for_backward(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


def compute(operation, *args):
    """An operation below; past autograd, which costs more than one token's numbers, where no
    gradient is wanted."""
    if torch.is_grad_enabled():
        return operation.apply(*args)
    return operation.forward(NoBackward(), *args)


def even_rows(x, dtype=torch.float32):
    """x (..., n) in a precision, or as fp32, whose rows are at one distance, which native.cpp is
    told; a copy only if it must be."""
    x = x if x.dtype == dtype else x.float()
    even = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] or x.shape[i] == 1
               for i in range(x.ndim - 2))
    return x if even and x.stride(-1) == 1 else x.contiguous()


# --- norms, gates, rotary positions ---------------------------------------------------------------

def kind_of(*tensors):
    """What ends the name of native.cpp's function for tensors of these precisions: '' for fp32."""
    return '_bf16' if any(u is not None and u.dtype == torch.bfloat16 for u in tensors) else ''


class Norm(Function):
    """x in fp32 or bf16, gate in y's precision, which is `dtype`."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps, groups, dtype):
        x = even_rows(x, dtype).contiguous()
        gate = None if gate is None else even_rows(gate.to(dtype), dtype)
        gate_stride = 0 if gate is None else gate.stride(-2)
        expect('norm', (weight, x.shape[-1:]), (x if gate is None else gate, x.shape))
        n = x.numel() // x.shape[-1]
        size = x.shape[-1] // groups
        if size * groups != x.shape[-1]:
            raise ValueError(f'norm: {x.shape[-1]} channels in {groups} groups')
        y = torch.empty_like(x, dtype=dtype)
        rstd = weight.new_empty(n * groups)
        ctx.kind = kind_of(x) or '_to' * bool(kind_of(y)) + kind_of(y)
        launch(f'norm_forward{ctx.kind}', n, 2 * x.numel(), groups, size, float(eps), x, gate, gate_stride,
               weight, y, rstd)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.groups = groups
        ctx.dtype = dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, gate, weight, rstd = ctx.saved_tensors
        gate_stride = 0 if gate is None else gate.stride(-2)
        n = x.numel() // x.shape[-1]
        size = x.shape[-1] // ctx.groups
        work = 2 * x.numel()
        grad_y = grad_y.to(ctx.dtype).contiguous()
        grad_x = torch.empty_like(x)
        grad_gate = None if gate is None else torch.empty_like(grad_y)
        grad_weight = weight.new_zeros(thread_count(n, work), len(weight))  # each thread adds up its own
        launch(f'norm_backward{ctx.kind}', n, work, ctx.groups, size, x, gate, gate_stride, weight, rstd,
               grad_y, grad_x, grad_gate, grad_weight)
        return grad_x, grad_gate, grad_weight.sum(0), None, None, None


def norm_dtype(dtype, x):
    """The precision that a norm's kernel gives: bf16 if that is wanted, else fp32."""
    return torch.bfloat16 if (dtype or x.dtype) == torch.bfloat16 else torch.float32


@kernel
def rms_norm(x, weight, eps, dtype=None):
    if not applies(x, weight):
        return NotImplemented
    return compute(Norm, x, None, weight, eps, 1, norm_dtype(dtype, x)).to(dtype or x.dtype)


@kernel
def gated_rms_norm(y, z, weight, eps, groups, dtype=None):
    if not applies(y, weight):
        return NotImplemented
    dtype = dtype or torch.float32
    return compute(Norm, y, z, weight, eps, groups, norm_dtype(dtype, y)).to(dtype)


class SwiGLU(Function):

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        expect('swiglu', (up, gate.shape))
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        launch(f'swiglu_forward{kind_of(gate)}', gate.numel() // native.lanes(), gate.numel(), gate, up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        n = gate.numel() // native.lanes()
        launch(f'swiglu_backward{kind_of(gate)}', n, 2 * gate.numel(), gate, up, grad_y.contiguous(),
               grad_gate, grad_up)
        return grad_gate, grad_up


@kernel
def swiglu(gate, up):
    if gate.dtype not in PRECISIONS or up.dtype != gate.dtype or gate.numel() % LANES or not applies(gate):
        return NotImplemented
    return compute(SwiGLU, gate, up)


class Rope(Function):

    @staticmethod
    def forward(ctx, x, cos, sin, sign):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        x = x.contiguous()
        expect('rope', (sin, cos.shape), (x, (*x.shape[:-1], 2 * cos.shape[-1])))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        half, heads = cos.shape[-1], x.shape[-2]
        n = x.numel() // (2 * half * heads)
        if not cos.numel() or n % (cos.numel() // half):
            raise ValueError(f'rope: tables of shape {tuple(cos.shape)} for {tuple(x.shape)}')
        launch(f'rope{kind_of(x)}', n, x.numel(), cos.numel() // half, heads, 2 * half, x, cos, sin, sign, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):  # a rotation's gradient is the rotation back
        return Rope.apply(grad_y, *ctx.saved_tensors, -ctx.sign), None, None, None


@kernel
def apply_rope(x, rope):
    cos, sin = rope
    if x.dtype not in PRECISIONS or not applies(x, cos, sin):
        return NotImplemented
    return compute(Rope, x, cos, sin, 1.0)


# --- attention ------------------------------------------------------------------------------------

@functools.cache
def multiplies(dtype):
    """Whether native.cpp has products of such numbers: of bf16 where the processor does."""
    return dtype == torch.float32 or (dtype == torch.bfloat16
                                      and hasattr(native.library(), 'attention_forward_bf16'))


class Attention(Function):

    @staticmethod
    def forward(ctx, q, k, v, window, dropout, seed, mask):
        q, k, v = (u.contiguous() for u in (q, k, v))           # (B, T, H, P), (B, S, G, P) twice
        B, T, H, P = q.shape
        S, G = k.shape[1:3]
        expect('attention', (k, (B, S, G, P)), (v, (B, S, G, P)))
        if not G or H % G or window < 0 or mask is None and S != T:
            raise ValueError(f'attention: {H} heads of {G} key heads, window {window}, {T} tokens and {S}')
        seen = kinds = None
        share = 0
        if mask is not None:
            share = B // len(mask)
            expect('attention', (mask, (len(mask), 1, T, S)), (q, (share * len(mask), T, H, P)))
            seen, kinds = table_of(mask)
        ctx.sizes = (T, S, H, G, P, window, P ** -0.5, dropout, seed, seen, kinds, share)
        ctx.work = q.numel() * min(S, window or S) // 30
        y = q.new_empty(B, T, H * P)
        logsumexp = q.new_empty(B, H, T, dtype=torch.float32)
        launch(f'attention_forward{kind_of(q)}', B * G, ctx.work, *ctx.sizes, q, k, v, y, logsumexp)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        q, k, v, y, logsumexp = ctx.saved_tensors
        grads = [torch.empty_like(u) for u in (q, k, v)]
        launch(f'attention_backward{kind_of(q)}', len(q) * k.shape[2], 2 * ctx.work, *ctx.sizes, q, k, v, y,
               logsumexp, grad_y.to(q.dtype).contiguous(), *grads)
        return *grads, None, None, None, None


def table_of(mask):
    """What attention.h reads of a mask (M, 1, T, S): its numbers (M, T, S rounded up), fp32, and of its blocks
    whether 0 none, 1 some or 2 all of them are seen."""
    M, _, T, S = mask.shape
    padded = F.pad(mask[:, 0], (0, -S % BLOCK, 0, -T % BLOCK))
    blocks = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))     # (M, T/BLOCK, BLOCK, S/BLOCK, BLOCK)
    kinds = blocks.any(4).any(2).long() + blocks.all(4).all(2).long()
    return padded[:, :T].float().contiguous(), kinds.contiguous()


@kernel
def attention(q, k, v, window=0, dropout=0.0, mask=None):
    B, T, H, P = q.shape
    if P % LANES or not applies(q) or (k.shape[1] != T if mask is None else T < BLOCK):
        return NotImplemented
    seed = int(torch.randint(2**31, ())) if dropout else 0
    window = 0 if window >= T else window
    dtype = q.dtype
    if P % (2 * LANES) or len({q.dtype, k.dtype, v.dtype}) > 1 or not multiplies(dtype):
        q, k, v = (u.float() for u in (q, k, v))
    return compute(Attention, q, k, v, window, float(dropout), seed, mask).to(dtype)


# --- the loss -------------------------------------------------------------------------------------

def cross_entropy_(logits, targets):
    """The cross-entropies (n), fp32, of logits (n, V) in fp32 or bf16, which become their gradient. Where a
    target is below 0, both are 0; IndexError of one that is V or more."""
    targets = targets.long().contiguous()
    expect('cross_entropy', (logits, (len(targets), logits.shape[-1])))
    if not logits.is_contiguous():
        raise ValueError('cross_entropy: logits that are not in one piece')
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    if native.has_data(targets) and len(targets) and int(targets.max()) >= logits.shape[1]:
        raise IndexError(f'target {int(targets.max())} is outside the vocabulary of {logits.shape[1]}')
    launch(f'cross_entropy{kind_of(logits)}', len(targets), 2 * logits.numel(), logits.shape[1], logits,
           targets, losses)
    return losses
