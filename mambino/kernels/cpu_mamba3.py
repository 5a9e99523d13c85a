"""Mamba-3's recurrence and its gate on this CPU, by native.cpp: as cpu_mamba.py has Mamba-2's, and with its
letters; R is the rank of B and C, A the number of angles. B and C of each head, with its bias and turned, are never all
in memory: they are made again for the backward pass.
"""
import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels.cpu import LANES, applies, compute, kind_of
from mambino.kernels.cpu_mamba import Mamba2, even_rows_of_one_kind
from mambino.kernels.native import expect, launch, thread_count
from mambino.kernels.registry import kernel


def bits(turns):
    """fp64 numbers for native.cpp."""
    return turns.view(torch.int64)


class Mamba3(Function):
    """The recurrence as mamba3_chunk.h has it: a token's input counts by `now` for its own y, by `weight` for all
    after it; state is what is there before the first token, without its own decay."""

    @staticmethod
    def forward(ctx, x, B, C, log_decay, weight, now, dt, rate, B_bias, C_bias, D, mimo_x, state, turn,
                interleaved, chunk_size):
        batch, T, H, P = x.shape
        R, G, N = B.shape[2:]
        A = rate.shape[-1]
        x, B, C = even_rows_of_one_kind(x.flatten(2), B, C)
        if G < 1 or H % G or R < 1 or chunk_size < 1 or not 1 <= A <= N // 2:
            raise ValueError(f'mamba3_scan: {H} heads in {G} groups of rank {R}, {A} angles of {N} channels, '
                             f'chunks of {chunk_size}')
        expect('mamba3_scan', (B, (batch, T, R, G, N)), (C, (batch, T, R, G, N)), (rate, (batch, T, A)),
               *((u, (batch, T, H)) for u in (log_decay, weight, now, dt)), (B_bias, (H, R, N)), (C_bias, (H, R, N)),
               (D, (H,)), (turn, (batch, H, A)))
        if mimo_x is not None:
            expect('mamba3_scan', (mimo_x, (H, R, P)))
            mimo_x = mimo_x.contiguous()
        if state is not None:
            expect('mamba3_scan', (state, (batch, H, P, N)))
            state = state.float().contiguous()
        inputs = [u.contiguous() for u in (B, C, log_decay, weight, now, dt, rate, B_bias, C_bias, D)]
        turn = turn.to(torch.float64, copy=True).contiguous()   # (B, H, A)
        tokens = max(1, min(chunk_size // R, T))                # of a chunk
        chunks = -(-T // tokens)
        y = x.new_empty(batch, T, R, H, P)
        last = x.new_empty(batch, H, P, N, dtype=torch.float32)
        starts = turns = None
        if any(ctx.needs_input_grad):                           # the state before each chunk
            starts = x.new_empty(batch, H, chunks, N, P)
            turns = turn.new_empty(batch, H, chunks, A)
        parts = Mamba2.parts(batch * G, H // G)
        ctx.sizes = T, R, H, G, P, N, A, tokens, parts, int(interleaved)
        ctx.work = y.numel() * N // 6
        launch(f'mamba3_forward{kind_of(x)}', batch * G * parts, ctx.work, *ctx.sizes, x, x.stride(-2), *inputs,
               mimo_x, state, bits(turn), starts, None if turns is None else bits(turns), y, last)
        ctx.save_for_backward(x, *inputs, mimo_x, starts, turns)
        ctx.set_materialize_grads(False)
        return y, last, turn

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last, grad_turn):
        x, *inputs, mimo_x, starts, turns = ctx.saved_tensors
        B, C, log_decay, _, _, _, rate, B_bias, _, _ = inputs
        T, R, H, G, P, N, A, _, parts, _ = ctx.sizes
        batch = len(x)
        grad_y = x.new_zeros(batch, T, R, H, P) if grad_y is None else grad_y.to(x.dtype).contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        if grad_turn is None:
            grad_turn = turns.new_zeros(batch, H, A)
        grad_turn = grad_turn.clone(memory_format=torch.contiguous_format)
        grad_state = None
        if ctx.needs_input_grad[12]:
            grad_state = rate.new_empty(batch, H, P, N)
        grad_x = rate.new_empty(batch, T, H, P)
        grad_B, grad_C = rate.new_empty(2, parts, *B.shape)     # each of a group's parts has its own
        grad_rate = rate.new_zeros(G * parts, *rate.shape)
        grad_decay, grad_weight, grad_now, grad_dt = rate.new_empty(4, *log_decay.shape)
        bias_B, bias_C = rate.new_empty(2, batch, *B_bias.shape)
        grad_D = rate.new_zeros(batch, H)
        grad_mimo = None if mimo_x is None else rate.new_zeros(batch, *mimo_x.shape)
        launch(f'mamba3_backward{kind_of(x)}', batch * G * parts, 2 * ctx.work, batch, *ctx.sizes, x, x.stride(-2),
               *inputs, mimo_x, starts, bits(turns), grad_y, grad_last, bits(grad_turn), grad_state, grad_x, grad_B,
               grad_C, grad_rate, grad_decay, grad_weight, grad_now, grad_dt, bias_B, bias_C, grad_D, grad_mimo)
        grad_mimo = None if mimo_x is None else grad_mimo.sum(0)
        return (grad_x, grad_B.sum(0), grad_C.sum(0), grad_decay, grad_weight, grad_now, grad_dt, grad_rate.sum(0),
                bias_B.sum(0), bias_C.sum(0), grad_D.sum(0), grad_mimo, grad_state, grad_turn, None, None)


def rotated(v, turn, interleaved):
    """v (…, N), whose channels (2i, 2i + 1), or (i, i + N/2), are turned by turn (…, A)."""
    A = turn.shape[-1]
    u, v = v.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(-1 if interleaved else -2)
    cos, sin = (F.pad(f(turn), (0, u.shape[-1] - A), value=rest) for f, rest in ((torch.cos, 1.0), (torch.sin, 0.0)))
    return torch.stack((u * cos - v * sin, u * sin + v * cos), -1 if interleaved else -2).flatten(-2)


@kernel
def mamba3_scan(x, B, C, dt, log_decay, trap, rate, B_bias, C_bias, D, mimo_x=None, interleaved=True, chunk_size=64,
                state=None):
    batch, T, H, P = x.shape
    R, N = B.shape[2], B.shape[-1]
    ones = D.new_ones(H, R, P) if mimo_x is None else mimo_x
    if P % LANES or N % (2 * LANES) or not applies(x, dt, log_decay, trap, rate, B_bias, C_bias, D, ones):
        return NotImplemented
    if P % (2 * LANES):                                         # bf16 numbers come in pairs
        x = x.float()
    h, turn, last_b, last_x = state or (None,) * 4
    expect('mamba3_scan', (dt, (batch, T, H)), (trap, (batch, T, H)))
    if last_b is not None:
        h = x.new_zeros(batch, H, P, N, dtype=torch.float32) if h is None else h
        expect('mamba3_scan', (h, (batch, H, P, N)), (turn, (batch, H, rate.shape[-1])), (last_b, (batch, R, H, N)),
               (last_x, (batch, H, P)), (ones, (H, R, P)))
    now = trap * dt                                             # the weight of a token's input, (B, T, H)
    later = (1 - trap) * dt                                     # and again with the next one
    if last_b is None:
        turn = x.new_zeros(batch, H, rate.shape[-1], dtype=torch.float64)
    else:
        # no product, which autocast would round: (B, R, H, P) by (B, R, H, N)
        rows = last_x.float()[:, None] * ones.transpose(0, 1) * later[:, :1, :, None]
        h = h + (rows[..., None] * last_b.float()[..., None, :]).sum(1)
    weight = now + F.pad(later[:, 1:], (0, 0, 0, 1))
    y, h, turn = compute(Mamba3, x, B, C, log_decay, weight, now, dt, rate, B_bias, C_bias, D,
                         ones if R > 1 else mimo_x, h, turn, interleaved, chunk_size)
    turn = turn % math.tau
    last_b = B[:, -1].float().repeat_interleave(H // B.shape[3], 2) + B_bias.transpose(0, 1)    # (B, R, H, N)
    last_b = rotated(last_b, turn[:, None].float(), interleaved)
    return y, (h, turn, last_b, x[:, -1].float().clone())


# --- the gate -------------------------------------------------------------------------------------

class GatedHeads(Function):

    @staticmethod
    def forward(ctx, y, z, mimo_z, mimo_o, norm, eps):
        B, T, R, H, P = y.shape
        y, z = even_rows_of_one_kind(y, z.flatten(2))
        y = y.contiguous()
        expect('gated_heads', (z, (B, T, H * P)), *((u, (H, R, P)) for u in (mimo_z, mimo_o) if u is not None))
        if norm is not None:
            expect('gated_heads', (norm, (H * P,)))
        scales = [None if u is None else u.contiguous() for u in (mimo_z, mimo_o, norm)]
        out = y.new_empty(B, T, H * P)
        ctx.sizes = R, H, P, float(eps), z.stride(-2)
        launch(f'heads_forward{kind_of(y)}', B * T, 2 * y.numel(), *ctx.sizes, *scales, y, z, out)
        ctx.save_for_backward(y, z, *scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, z, *scales = ctx.saved_tensors
        B, T, R, H, P = y.shape
        work = 4 * y.numel()
        threads = thread_count(B * T, work)                     # each adds up its own
        grad_y, grad_z = torch.empty_like(y), y.new_empty(B, T, H, P)
        mimo_z, mimo_o = y.new_zeros(2, threads, H, R, P, dtype=torch.float32)
        norm = y.new_zeros(threads, H * P, dtype=torch.float32)
        launch(f'heads_backward{kind_of(y)}', B * T, work, *ctx.sizes, *scales, y, z, grad.to(y.dtype).contiguous(),
               grad_y, grad_z, mimo_z, mimo_o, norm)
        return grad_y, grad_z, *(None if scale is None else grads.sum(0)
                                 for scale, grads in zip(scales, (mimo_z, mimo_o, norm))), None


@kernel
def gated_heads(y, z, mimo_z=None, mimo_o=None, norm=None, eps=1e-5):
    scales = [u for u in (mimo_z, mimo_o, norm) if u is not None]
    if y.shape[-1] % LANES or (mimo_z is None) != (mimo_o is None) or not applies(y, *scales):
        return NotImplemented
    return compute(GatedHeads, y, z, mimo_z, mimo_o, norm, eps)
