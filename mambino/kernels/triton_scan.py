"""Mamba-1's scan as two kernels of our own in Triton, which torch brings along for NVIDIA cards.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        dt_t = softplus(raw_t + bias)
    y_t = (C_t h_t + D x_t) silu(z_t)               (Gu & Dao 2023, eq. 2 and algorithm 2)

A channel's recurrence knows no other channel. So a program takes BLOCK_E channels of one sequence,
holds their states (BLOCK_E, N) in registers, and walks through time: x, dt, z, B, C are read once,
y is written once, and beside them only the states at the starts of chunks of CHUNK steps go to
memory, for the gradient. Backwards, half a chunk after the other from the last, its states are
made again, and with g the gradient of a state, dy that of the sum before the gate:

    g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}       dC_t = sum_e h_t dy_t, dB_t = sum_e g_t dt_t x_t
    dx_t = D dy_t + dt_t (g_t B_t)                  w_t  = g_t exp(dt_t A) h_{t-1}, of dt_t A
    dA   = sum_t w_t dt_t                           ddt_t = x_t (g_t B_t) + w_t A

The sums over e go beyond a program: each writes its part, (blocks, T, N), and PyTorch adds them up,
always in the same order. What a program reads is read before it is needed, some steps at once, for
that is what it waits for. Bytes, with u those of one (B, T, E): forward 5 u, backward 8 u, chunk
starts with N = CHUNK among them, and the parts of B and C, 8 N / BLOCK_E u, written and read.

Letters of the shapes: B batch, T time, E inner width, N state size.
"""
import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8                   # steps between the states that are kept
BLOCK_E = 8                 # channels a program: one warp, with 16 states each
MAX_REGISTERS = 168         # a thread, so that 12 warps of the backward pass fit on a multiprocessor
LOG2E = tl.constexpr(1.4426950408889634)


def on_card(x):
    """The card that x is on as the current one, where Triton starts kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows(x):
    """x, or a copy of it, whose last dimension is without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def softplus(x):
    """log(1 + exp(x)) and its slope: max(x, 0) + log(1 + u) with u = exp(-|x|) in (0, 1], whose log is
    2 artanh(u / (2 + u)), a short series and right for the smallest u."""
    u = tl.exp(-tl.abs(x))
    s = u / (2 + u)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2 * s * series, tl.where(x < 0, u, 1.0) / (1 + u)


@triton.jit
def read(ptr, stride: tl.constexpr, places, within, left, STEPS: tl.constexpr):
    """What is at these places in the next STEPS steps of (T, …); 0 where none is left."""
    values = ()
    for i in tl.static_range(STEPS):
        values += (tl.load(ptr + i * stride + places, mask=within & (i < left), other=0.0),)
    return values


@triton.jit
def advance(h, dt, x, B, A):
    """The recurrence. h, A (E, N), dt, x (E), B (N)."""
    return tl.exp2(dt[:, None] * A) * h + (dt * x.to(tl.float32))[:, None] * B.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=('T', 'E'))
def scan_forward_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, state_ptr,
                        y_ptr, starts_ptr, last_ptr, T, E,
                        x_b: tl.int64, dt_b: tl.int64, B_b: tl.int64, C_b: tl.int64, z_b: tl.int64,
                        x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr,
                        z_t: tl.constexpr, y_t: tl.constexpr,
                        N: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_E: tl.constexpr,
                        BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    e_in = e < E
    n_in = n < N
    tile = e[:, None] * N + n[None, :]                          # of (E, N)
    tile_in = e_in[:, None] & n_in[None, :]
    A = tl.load(A_ptr + tile, mask=tile_in, other=0.0) * LOG2E  # exp(dt A) = exp2(dt A log2(e))
    D = tl.load(D_ptr + e, mask=e_in, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + e, mask=e_in, other=0.0).to(tl.float32)
    state = b * N * E + n[None, :] * E + e[:, None]             # of (B, N, E)
    if HAS_STATE:
        h = tl.load(state_ptr + state, mask=tile_in, other=0.0).to(tl.float32)
    else:
        h = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    x_ptr += b * x_b
    dt_ptr += b * dt_b
    z_ptr += b * z_b
    y_ptr += b * T * y_t
    B_ptr += b * B_b
    C_ptr += b * C_b
    chunks = tl.cdiv(T, CHUNK)
    starts_ptr += b * chunks * E * N
    for c in range(chunks):
        tl.store(starts_ptr + tile, h.to(starts_ptr.dtype.element_ty), mask=tile_in)
        starts_ptr += E * N
        for t0 in range(c * CHUNK, tl.minimum(c * CHUNK + CHUNK, T), STEPS):
            left = T - t0                                       # steps
            xs = read(x_ptr, x_t, e, e_in, left, STEPS)
            raws = read(dt_ptr, dt_t, e, e_in, left, STEPS)
            zs = read(z_ptr, z_t, e, e_in, left, STEPS)
            Bs = read(B_ptr, B_t, n, n_in, left, STEPS)
            Cs = read(C_ptr, C_t, n, n_in, left, STEPS)
            for i in tl.static_range(STEPS):
                dt, _ = softplus(raws[i].to(tl.float32) + bias)
                dt = tl.where(i < left, dt, 0.0)                # beyond the end time stands still
                h = advance(h, dt, xs[i], Bs[i], A)
                z = zs[i].to(tl.float32)
                y = tl.sum(h * Cs[i].to(tl.float32)[None, :], 1) + D * xs[i].to(tl.float32)
                y = y * z * tl.sigmoid(z)
                tl.store(y_ptr + i * y_t + e, y.to(y_ptr.dtype.element_ty), mask=e_in & (i < left))
            x_ptr += STEPS * x_t
            dt_ptr += STEPS * dt_t
            z_ptr += STEPS * z_t
            B_ptr += STEPS * B_t
            C_ptr += STEPS * C_t
            y_ptr += STEPS * y_t
    tl.store(last_ptr + state, h, mask=tile_in)


@triton.jit(do_not_specialize=('T', 'E'))
def scan_backward_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dy_ptr, starts_ptr, dlast_ptr,
                         dx_ptr, ddt_ptr, dbias_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dstate_ptr,
                         T, E, x_b: tl.int64, dt_b: tl.int64, B_b: tl.int64, C_b: tl.int64,
                         z_b: tl.int64, dy_b: tl.int64,
                         x_t: tl.constexpr, dt_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr,
                         z_t: tl.constexpr, dy_t: tl.constexpr, dx_t: tl.constexpr,
                         N: tl.constexpr, HAS_DLAST: tl.constexpr, BLOCK_E: tl.constexpr,
                         BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    e_in = e < E
    n_in = n < N
    tile = e[:, None] * N + n[None, :]                          # of (E, N)
    tile_in = e_in[:, None] & n_in[None, :]
    A = tl.load(A_ptr + tile, mask=tile_in, other=0.0) * LOG2E
    D = tl.load(D_ptr + e, mask=e_in, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + e, mask=e_in, other=0.0).to(tl.float32)
    state = b * N * E + n[None, :] * E + e[:, None]             # of (B, N, E)
    if HAS_DLAST:
        carry = tl.load(dlast_ptr + state, mask=tile_in, other=0.0).to(tl.float32)  # exp(dt_{t+1} A) g_{t+1}
    else:
        carry = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    chunks = tl.cdiv(T, CHUNK)
    row = (2 * chunks - 1).to(tl.int64) * STEPS                 # the last half of a chunk, the first to be done
    x_ptr += b * x_b + row * x_t
    dt_ptr += b * dt_b + row * dt_t
    z_ptr += b * z_b + row * z_t
    dy_ptr += b * dy_b + row * dy_t
    B_ptr += b * B_b + row * B_t
    C_ptr += b * C_b + row * C_t
    dx_ptr += (b * T + row) * dx_t
    ddt_ptr += (b * T + row) * dx_t
    dz_ptr += (b * T + row) * dx_t
    part = b * tl.num_programs(0) + tl.program_id(0)
    dB_ptr += (part * T + row) * N                              # parts (B, blocks, T, N)
    dC_ptr += (part * T + row) * N
    starts_ptr += (b * chunks + chunks - 1) * E * N
    dA = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    dD = tl.zeros([BLOCK_E], tl.float32)
    dbias = tl.zeros([BLOCK_E], tl.float32)
    start = carry                                               # is read before it is used
    for back in range(2 * chunks):
        half = 2 * chunks - 1 - back
        left = T - half * STEPS                                 # steps
        if half % 2 == 1:                                       # through the first half to the second
            start = tl.load(starts_ptr + tile, mask=tile_in, other=0.0).to(tl.float32)
            starts_ptr -= E * N
            h = start
            xs = read(x_ptr - STEPS * x_t, x_t, e, e_in, left + STEPS, STEPS)
            raws = read(dt_ptr - STEPS * dt_t, dt_t, e, e_in, left + STEPS, STEPS)
            Bs = read(B_ptr - STEPS * B_t, B_t, n, n_in, left + STEPS, STEPS)
            for i in tl.static_range(STEPS):
                dt, _ = softplus(raws[i].to(tl.float32) + bias)
                dt = tl.where(i < left + STEPS, dt, 0.0)
                h = advance(h, dt, xs[i], Bs[i], A)
        else:
            h = start
        xs = read(x_ptr, x_t, e, e_in, left, STEPS)
        raws = read(dt_ptr, dt_t, e, e_in, left, STEPS)
        Bs = read(B_ptr, B_t, n, n_in, left, STEPS)
        zs = read(z_ptr, z_t, e, e_in, left, STEPS)
        Cs = read(C_ptr, C_t, n, n_in, left, STEPS)
        dys = read(dy_ptr, dy_t, e, e_in, left, STEPS)
        states = (h,)
        dts = ()
        slopes = ()
        for i in tl.static_range(STEPS):
            dt, slope = softplus(raws[i].to(tl.float32) + bias)
            dts += (tl.where(i < left, dt, 0.0),)               # beyond the end time stands still
            slopes += (tl.where(i < left, slope, 0.0),)
            states += (advance(states[i], dts[i], xs[i], Bs[i], A),)
        for i in tl.static_range(STEPS - 1, -1, -1):
            x = xs[i].to(tl.float32)
            B = Bs[i].to(tl.float32)
            C = Cs[i].to(tl.float32)
            z = zs[i].to(tl.float32)
            dout = dys[i].to(tl.float32)
            dt = dts[i]
            h = states[i + 1]
            # the gate: silu(z) = z s, its slope s (1 + z (1 - s))
            s = tl.sigmoid(z)
            y = tl.sum(h * C[None, :], 1) + D * x
            dz = dout * y * s * (1 + z * (1 - s))
            dy = dout * z * s
            # the recurrence
            g = carry + dy[:, None] * C[None, :]
            dC = tl.sum(h * dy[:, None], 0)
            dB = tl.sum(g * (dt * x)[:, None], 0)
            g_B = tl.sum(g * B[None, :], 1)
            carry = g * tl.exp2(dt[:, None] * A)
            w = carry * states[i]
            dA += w * dt[:, None]
            ddt = (x * g_B + tl.sum(w * A, 1) / LOG2E) * slopes[i]
            dbias += ddt
            dD += dy * x
            dx = D * dy + dt * g_B
            tl.store(dx_ptr + i * dx_t + e, dx.to(dx_ptr.dtype.element_ty), mask=e_in & (i < left))
            tl.store(ddt_ptr + i * dx_t + e, ddt.to(ddt_ptr.dtype.element_ty), mask=e_in & (i < left))
            tl.store(dz_ptr + i * dx_t + e, dz.to(dz_ptr.dtype.element_ty), mask=e_in & (i < left))
            tl.store(dB_ptr + i * N + n, dB.to(dB_ptr.dtype.element_ty), mask=n_in & (i < left))
            tl.store(dC_ptr + i * N + n, dC.to(dC_ptr.dtype.element_ty), mask=n_in & (i < left))
        x_ptr -= STEPS * x_t
        dt_ptr -= STEPS * dt_t
        z_ptr -= STEPS * z_t
        dy_ptr -= STEPS * dy_t
        B_ptr -= STEPS * B_t
        C_ptr -= STEPS * C_t
        dx_ptr -= STEPS * dx_t
        ddt_ptr -= STEPS * dx_t
        dz_ptr -= STEPS * dx_t
        dB_ptr -= STEPS * N
        dC_ptr -= STEPS * N
    tl.store(dstate_ptr + state, carry, mask=tile_in)
    tl.store(dA_ptr + b * E * N + tile, dA, mask=tile_in)       # parts (B, E, N), (B, E)
    tl.store(dD_ptr + b * E + e, dD, mask=e_in)
    tl.store(dbias_ptr + b * E + e, dbias, mask=e_in)


def blocks_of(E, N):
    """({sizes of a program}, programs a sequence, warps)."""
    block_n = triton.next_power_of_2(N)
    sizes = dict(N=N, BLOCK_E=BLOCK_E, BLOCK_N=block_n, CHUNK=CHUNK)
    return sizes, triton.cdiv(E, BLOCK_E), max(1, BLOCK_E * block_n // 128)


def steps_of(*tensors):
    """The strides of their batch, then those of time."""
    return [u.stride(i) for i in (0, 1) for u in tensors]


# PyTorch sees each kernel as an operation of its own, with the shapes of its results and its
# gradient: so autograd takes it, and torch.compile holds it in a graph without looking inside.

@torch.library.custom_op('mambino::triton_scan', mutates_args=())
def scan(x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
         state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """mamba1_scan of these arguments → y (B, T, E) in x's precision, the last state (B, N, E) in fp32
    and the states at the starts of chunks (B, chunks, E, N), for the gradient."""
    batch, T, E = x.shape
    N = A.shape[1]
    x, dt, B, C, z = map(rows, (x, dt, B, C, z))
    state = None if state is None else state.contiguous()
    sizes, blocks, warps = blocks_of(E, N)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    starts = x.new_empty(batch, triton.cdiv(T, CHUNK), E, N)
    last = x.new_empty(batch, N, E, dtype=torch.float32)
    with on_card(x):
        scan_forward_kernel[blocks, batch](
            x, dt, dt_bias.contiguous(), A.contiguous(), B, C, D.contiguous(), z, state, y, starts, last, T, E,
            *steps_of(x, dt, B, C, z), y.stride(1), HAS_STATE=state is not None, STEPS=CHUNK,
            num_warps=warps, **sizes)
    return y, last, starts


@scan.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, state):
    batch, T, E = x.shape
    N = A.shape[1]
    starts = x.new_empty(batch, (T + CHUNK - 1) // CHUNK, E, N)
    return x.new_empty(x.shape), x.new_empty(batch, N, E, dtype=torch.float32), starts


@torch.library.custom_op('mambino::triton_scan_backward', mutates_args=())
def scan_backward(x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
                  starts: Tensor, dy: Tensor, dlast: Tensor | None) -> tuple[
                      Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of scan's arguments, in their order and precisions."""
    batch, T, E = x.shape
    N = A.shape[1]
    x, dt, B, C, z, dy = map(rows, (x, dt, B, C, z, dy))
    dlast = None if dlast is None else dlast.contiguous()
    sizes, blocks, warps = blocks_of(E, N)
    dx, ddt, dz = (u.new_empty(u.shape) for u in (x, dt, z))
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # parts of a sum may be too small for fp16
    parts = x.new_empty(2, batch, blocks, T, N, dtype=wide)     # of dB and dC
    dA = x.new_empty(batch, E, N, dtype=torch.float32)
    dD, dbias = x.new_empty(2, batch, E, dtype=torch.float32)
    dstate = x.new_empty(batch, N, E, dtype=torch.float32)
    with on_card(x):
        scan_backward_kernel[blocks, batch](
            x, dt, dt_bias.contiguous(), A.contiguous(), B, C, D.contiguous(), z, dy, starts, dlast,
            dx, ddt, dbias, dA, parts[0], parts[1], dD, dz, dstate, T, E,
            *steps_of(x, dt, B, C, z, dy), dx.stride(1), HAS_DLAST=dlast is not None, STEPS=CHUNK // 2,
            num_warps=warps, maxnreg=MAX_REGISTERS, **sizes)
    dB, dC = (part.sum(1) for part in parts)
    return (dx, ddt, dbias.sum(0).to(dt_bias.dtype), dA.sum(0).to(A.dtype), dB.to(B.dtype), dC.to(C.dtype),
            dD.sum(0).to(D.dtype), dz, dstate)


@scan_backward.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, starts, dy, dlast):
    grads = [u.new_empty(u.shape) for u in (x, dt, dt_bias, A, B, C, D, z)]
    return *grads, x.new_empty(x.shape[0], A.shape[1], A.shape[0], dtype=torch.float32)


def keep(ctx, inputs, output):
    *tensors, state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])
    ctx.state_dtype = None if state is None else state.dtype


def differentiate(ctx, dy, dlast, _):
    *tensors, starts = ctx.saved_tensors
    if dy is None:
        dy = tensors[0].new_zeros(tensors[0].shape)
    *grads, dstate = scan_backward(*tensors, starts, dy, dlast)
    return *grads, None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)


scan.register_autograd(differentiate, setup_context=keep)
