"""The gated delta rule on this CPU, by native.cpp: as cpu_mamba.py has Mamba-2's recurrence, and with its
letters."""
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels.cpu import LANES, applies, compute, kind_of
from mambino.kernels.cpu_mamba import Mamba2, even_rows_of_one_kind
from mambino.kernels.native import expect, launch
from mambino.kernels.registry import kernel


class Delta(Function):

    @staticmethod
    def forward(ctx, qkv, log_decay, beta, groups, head_dim, chunk_size, state):
        qkv, = even_rows_of_one_kind(qkv)                       # (B, T, 2GN + HP)
        log_decay, beta = log_decay.contiguous(), beta.contiguous()
        batch, T, H = beta.shape
        P = head_dim
        N = (qkv.shape[-1] - H * P) // (2 * max(1, groups))
        if groups < 1 or H % groups or not N or chunk_size < 1:
            raise ValueError(f'delta_scan: {H} heads in {groups} groups, chunks of {chunk_size}')
        expect('delta_scan', (qkv, (batch, T, H * P + 2 * groups * N)), (log_decay, (batch, T, H)))
        if state is not None:
            expect('delta_scan', (state, (batch, H, P, N)))
            state = state.float().contiguous()
        y = qkv.new_empty(batch, T, H, P)
        last = qkv.new_empty(batch, H, P, N, dtype=torch.float32)
        starts = None
        if any(ctx.needs_input_grad):
            starts = qkv.new_empty(batch, H, -(-T // chunk_size), N, P)  # the state before each chunk
        parts = Mamba2.parts(batch * groups, H // groups)
        ctx.sizes = T, H, groups, P, N, chunk_size, parts
        ctx.work = y.numel() * N // 4
        launch(f'delta_forward{kind_of(qkv)}', batch * groups * parts, ctx.work, *ctx.sizes, qkv, qkv.stride(-2),
               log_decay, beta, state, starts, y, last)
        ctx.save_for_backward(qkv, log_decay, beta, starts)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        qkv, log_decay, beta, starts = ctx.saved_tensors
        batch, T, width = qkv.shape
        _, H, G, P, N, _, parts = ctx.sizes
        grad_y = qkv.new_zeros(batch, T, H, P) if grad_y is None else grad_y.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        grad_state = None
        if ctx.needs_input_grad[-1]:
            grad_state = beta.new_empty(batch, H, P, N)
        grad_qkv = qkv.new_empty(batch, T, width)
        copies = None
        if parts > 1:                                           # each adds up its own
            copies = beta.new_empty(parts, batch, T, 2 * G * N)
        grad_decay, grad_beta = (torch.empty_like(beta) for _ in range(2))
        launch(f'delta_backward{kind_of(qkv)}', batch * G * parts, 2 * ctx.work, batch, *ctx.sizes, qkv,
               qkv.stride(-2), log_decay, beta, starts, grad_y, grad_last, grad_state, grad_qkv, copies,
               grad_decay, grad_beta)
        if copies is not None:
            grad_qkv[..., :2 * G * N] = copies.sum(0)
        return grad_qkv, grad_decay, grad_beta, None, None, None, grad_state


@kernel
def delta_scan(qkv, log_decay, beta, groups, head_dim, chunk_size=64, state=None):
    T, H = beta.shape[1:]
    N = (qkv.shape[-1] - H * head_dim) // (2 * max(1, groups))
    if any(size % LANES for size in (head_dim, N, chunk_size)) or not applies(qkv, log_decay, beta):
        return NotImplemented
    chunk_size = min(chunk_size, -(-T // LANES) * LANES)
    return compute(Delta, qkv, log_decay, beta, groups, head_dim, chunk_size, state)
