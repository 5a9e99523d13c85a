"""The recurrences of Mamba-1 and Mamba-2 and their convolution on this CPU, by native.cpp: as cpu.py
has the other operations, and with its letters. Where all that comes from products is bf16, so is
what is given back; states, steps, decays and sums are fp32.
"""
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels import native
from mambino.kernels.cpu import LANES, applies, compute, even_rows, kind_of
from mambino.kernels.native import expect, launch, thread_count
from mambino.kernels.registry import kernel

STATE_SIZES = (8, 16, 32, 64)   # of a Mamba-1's channel, that native.cpp is compiled for


def even_rows_of_one_kind(*tensors):
    """even_rows of each: as bf16 where all of them are, else as fp32."""
    if all(x.dtype == torch.bfloat16 for x in tensors):
        return [even_rows(x, torch.bfloat16) for x in tensors]
    return [even_rows(x) for x in tensors]


# --- Mamba-1 --------------------------------------------------------------------------------------

class Mamba1(Function):
    CHUNK = 8       # steps whose states the backward pass makes again

    @staticmethod
    def forward(ctx, x, dt, dt_bias, A, B, C, D, z, state):
        x, dt, B, C, z = even_rows_of_one_kind(x, dt, B, C, z)
        x = x.contiguous()                                      # (B, T, E)
        if B.stride(-2) != C.stride(-2):
            B, C = B.contiguous(), C.contiguous()
        batch, T, E = x.shape
        N = A.shape[1]
        expect('mamba1_scan', (dt, x.shape), (z, x.shape), (B, (batch, T, N)), (C, (batch, T, N)), (A, (E, N)),
               (dt_bias, (E,)), (D, (E,)), (state, (batch, N, E)))
        A, state = A.float(), state.float()
        A = A.t().contiguous()                                  # (N, E)
        state = state.clone(memory_format=torch.contiguous_format)  # (B, N, E)
        y = torch.empty_like(x)
        starts = None
        if any(ctx.needs_input_grad):
            starts = A.new_empty(-(-T // Mamba1.CHUNK), batch, N, E)  # the state before each chunk
        launch(f'mamba1_forward{kind_of(x)}', -(-E // native.lanes()), x.numel() * N // 2, N, batch, T, E, x, dt,
               dt.stride(-2), dt_bias, A, B, C, B.stride(-2), D, z, z.stride(-2), state, starts, y)
        ctx.save_for_backward(x, dt, dt_bias, A, B, C, D, z, starts)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, dt, dt_bias, A, B, C, D, z, starts = ctx.saved_tensors
        batch, T, E = x.shape
        N = len(A)
        tiles = -(-E // native.lanes())
        work = x.numel() * N
        grad_state = grad_state.clone(memory_format=torch.contiguous_format)
        grad_x, grad_dt, grad_z = (torch.empty_like(x) for _ in range(3))
        grad_bias, grad_A, grad_D = (torch.zeros_like(u) for u in (dt_bias, A, D))
        grad_B, grad_C = A.new_empty(2, thread_count(tiles, work), batch, T, N)  # each thread adds up its own
        launch(f'mamba1_backward{kind_of(x)}', tiles, work, N, batch, T, E, x, dt, dt.stride(-2), dt_bias,
               A, B, C, B.stride(-2), D, z, z.stride(-2), starts, grad_y.contiguous(), grad_state,
               grad_x, grad_dt, grad_bias, grad_A, grad_B, grad_C, grad_D, grad_z)
        return (grad_x, grad_dt, grad_bias, grad_A.t(), grad_B.sum(0), grad_C.sum(0), grad_D, grad_z,
                grad_state)


@kernel
def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    if A.shape[1] not in STATE_SIZES or not applies(x, dt_bias, D):
        return NotImplemented
    if state is None:
        state = x.new_zeros(len(x), A.shape[1], A.shape[0], dtype=torch.float32)
    return compute(Mamba1, x, dt, dt_bias, A, B, C, D, z, state)


# --- Mamba-2 --------------------------------------------------------------------------------------

class Mamba2(Function):

    @staticmethod
    def forward(ctx, xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size, state):
        xBC, dt = even_rows_of_one_kind(xBC, dt)                # (B, T, HP + 2GN), (B, T, H)
        batch, T, H = dt.shape
        P = head_dim
        N = (xBC.shape[-1] - H * P) // (2 * max(1, groups))
        if groups < 1 or H % groups or not N or chunk_size < 1:
            raise ValueError(f'mamba2_scan: {H} heads in {groups} groups, chunks of {chunk_size}')
        expect('mamba2_scan', (xBC, (batch, T, H * P + 2 * groups * N)), (dt, (batch, T, H)),
               (dt_bias, (H,)), (A, (H,)), (D, (H,)))
        if state is not None:
            expect('mamba2_scan', (state, (batch, H, P, N)))
            state = state.float().contiguous()
        y = xBC.new_empty(batch, T, H, P)
        last = xBC.new_empty(batch, H, P, N, dtype=torch.float32)
        starts = None
        if any(ctx.needs_input_grad):
            starts = xBC.new_empty(batch, H, -(-T // chunk_size), N, P)  # the state before each chunk
        parts = Mamba2.parts(batch * groups, H // groups)
        ctx.sizes = T, H, groups, P, N, chunk_size, parts
        ctx.work = y.numel() * N // 8
        launch(f'ssd_forward{kind_of(xBC)}', batch * groups * parts, ctx.work, *ctx.sizes, xBC,
               xBC.stride(-2), dt, dt.stride(-2), dt_bias, A, D, state, starts, y, last)
        ctx.save_for_backward(xBC, dt, dt_bias, A, D, starts)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def parts(groups, heads):
        """In how many parts, of whole heads, the threads take the heads of each group: in few, since
        what a group's heads share is computed for each."""
        threads = torch.get_num_threads()
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        even = (n for n in divisors if groups * n % threads == 0 or groups * n > 8 * threads)
        return next(even, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        xBC, dt, dt_bias, A, D, starts = ctx.saved_tensors
        batch, T, width = xBC.shape
        _, H, G, P, N, _, parts = ctx.sizes
        grad_y = xBC.new_zeros(batch, T, H, P) if grad_y is None else grad_y.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        grad_state = None
        if ctx.needs_input_grad[-1]:
            grad_state = A.new_empty(batch, H, P, N)
        grad_xBC = xBC.new_empty(batch, T, width)
        grad_BC = None
        if parts > 1:                                           # each adds up its own
            grad_BC = A.new_empty(parts, batch, T, 2 * G * N)
        grad_dt = A.new_empty(batch, T, H)
        grad_A, grad_D = A.new_zeros(batch, H), D.new_zeros(batch, H)
        launch(f'ssd_backward{kind_of(xBC)}', batch * G * parts, 2 * ctx.work, batch, *ctx.sizes, xBC,
               xBC.stride(-2), dt, dt.stride(-2), dt_bias, A, D, starts, grad_y, grad_last, grad_state,
               grad_xBC, grad_BC, grad_dt, grad_A, grad_D)
        if grad_BC is not None:
            grad_xBC[..., H * P:] = grad_BC.sum(0)
        return (grad_xBC, grad_dt, grad_dt.sum((0, 1)), grad_A.sum(0), grad_D.sum(0), None, None,
                None, grad_state)


@kernel
def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    batch, T, H = dt.shape
    N = (xBC.shape[-1] - H * head_dim) // (2 * max(1, groups))
    sizes = head_dim, N, chunk_size
    if any(size % LANES for size in sizes) or not applies(xBC, dt_bias, A, D):
        return NotImplemented
    step = 2 * LANES                                            # of bf16 numbers, in pairs
    if any(size % step for size in sizes):
        step = LANES
        xBC = xBC.float()
    chunk_size = min(chunk_size, -(-T // step) * step)
    return compute(Mamba2, xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size, state)


# --- the convolution ------------------------------------------------------------------------------

class ConvSilu(Function):
    STRIP = 256     # channels of an item

    @staticmethod
    def forward(ctx, x, weight, bias):                          # (B, T, E), (4, E), (E)
        x, = even_rows_of_one_kind(x)
        weight = weight.contiguous()
        B, T, E = x.shape
        expect('causal_conv1d', (weight, (4, E)), (bias, (E,)))
        y = x.new_empty(x.shape)
        ctx.items = B * -(-E // ConvSilu.STRIP)
        launch(f'conv_forward{kind_of(x)}', ctx.items, 2 * x.numel(), T, E, x.stride(-2), weight, bias,
               x, y)
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias = ctx.saved_tensors
        B, T, E = x.shape
        work = 3 * x.numel()
        grad_x = x.new_empty(x.shape)
        threads = thread_count(ctx.items, work)
        grad_weight = bias.new_zeros(threads, 4, E)             # each thread adds up its own
        grad_bias = bias.new_zeros(threads, E)
        launch(f'conv_backward{kind_of(x)}', ctx.items, work, T, E, x.stride(-2), weight, bias, x,
               grad_y.contiguous(), grad_x, grad_weight, grad_bias)
        return grad_x, grad_weight.sum(0), grad_bias.sum(0)


def with_past(x, state, K):
    """x (B, T, E) after the K-1 inputs before it, (B, K-1, E): → (B, K-1 + T, E). Where there are
    none, x alone if it is long enough to fill the next state."""
    B, T, E = x.shape
    if state is None and T < K - 1:
        state = x.new_zeros(B, K - 1, E)
    return x if state is None else torch.cat((state.to(x.dtype), x), 1)


@kernel
def causal_conv1d(x, weight, bias, state=None):
    K = weight.shape[-1]
    if K != 4 or not applies(x, weight, bias):
        return NotImplemented
    T = x.shape[1]
    x = with_past(x, state, K)
    y = compute(ConvSilu, x, weight[:, 0].t(), bias)
    return y[:, x.shape[1] - T:], x[:, x.shape[1] - K + 1:].clone()  # a copy: a view would keep all of x
