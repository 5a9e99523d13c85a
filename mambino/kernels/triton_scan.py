"""Mamba-1's scan as two kernels of our own in Triton, which torch brings along for NVIDIA cards.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        dt_t = softplus(raw_t + bias)
    y_t = (C_t h_t + D x_t) silu(z_t)               (Gu & Dao 2023, eq. 2 and algorithm 2)

A channel's recurrence knows no other channel. So a program takes BLOCK_E channels of one sequence,
holds their states (BLOCK_E, N) in registers, and walks through time: x, dt, z, B, C are read once,
y is written once, and beside them only the states at the starts of chunks of CHUNK steps go to
memory, for the gradient. Backwards, chunk by chunk from the last, the states within the chunk are
made again, and with g the gradient of a state, dy that of the sum before the gate:

    g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}       dC_t = sum_e h_t dy_t, dB_t = sum_e g_t dt_t x_t
    dx_t = D dy_t + dt_t (g_t B_t)                  w_t  = g_t exp(dt_t A) h_{t-1}, of dt_t A
    dA   = sum_t w_t dt_t                           ddt_t = x_t (g_t B_t) + w_t A

The sums over e go beyond a program: each writes its part, (blocks, T, N), and PyTorch adds them up,
always in the same order. Bytes, with u those of one (B, T, E): 4 u forward, 7 u backward, and the
parts and chunk starts, N / (4 BLOCK_E) and N / CHUNK fp32 values a channel and token.

Letters of the shapes: B batch, T time, E inner width, N state size.
"""
import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64                  # steps between the states that are kept
BLOCK_E = 16                # channels a program: a sector of bf16; with 16 states each, a warp
FORWARD_STEPS = 4           # steps whose inputs are read at once
BACKWARD_STEPS = 4          # and whose states are in registers at once
LOG2E = tl.constexpr(1.4426950408889634)


def on_card(x):
    """The card that x is on as the current one, where Triton starts kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows(x):
    """x, or a copy of it, whose last dimension is without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also where exp(x) is so small that 1 + exp(x) is rounded."""
    u = tl.exp(x)
    w = 1 + u
    return tl.where(x > 20, x, tl.where(w == 1, u, tl.log(w) * (u / (w - 1))))


@triton.jit(do_not_specialize=('T', 'E'))
def scan_forward_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, state_ptr,
                        y_ptr, starts_ptr, last_ptr, T, E,
                        x_b: tl.int64, x_t: tl.int64, dt_b: tl.int64, dt_t: tl.int64, B_b: tl.int64, B_t: tl.int64,
                        C_b: tl.int64, C_t: tl.int64, z_b: tl.int64, z_t: tl.int64, y_t: tl.int64,
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
        tl.store(starts_ptr + c * E * N + tile, h, mask=tile_in)
        for t0 in range(c * CHUNK, tl.minimum(c * CHUNK + CHUNK, T), STEPS):
            xs = ()                                             # read before anything is computed: STEPS waits as one
            dts = ()
            zs = ()
            Bs = ()
            Cs = ()
            for i in tl.static_range(STEPS):
                t = t0 + i
                xs += (tl.load(x_ptr + t * x_t + e, mask=e_in & (t < T), other=0.0),)
                dts += (tl.load(dt_ptr + t * dt_t + e, mask=e_in & (t < T), other=0.0),)
                zs += (tl.load(z_ptr + t * z_t + e, mask=e_in & (t < T), other=0.0),)
                Bs += (tl.load(B_ptr + t * B_t + n, mask=n_in & (t < T), other=0.0),)
                Cs += (tl.load(C_ptr + t * C_t + n, mask=n_in & (t < T), other=0.0),)
            for i in tl.static_range(STEPS):
                t = t0 + i
                x = xs[i].to(tl.float32)
                z = zs[i].to(tl.float32)
                dt = tl.where(t < T, softplus(dts[i].to(tl.float32) + bias), 0.0)
                h = tl.exp2(dt[:, None] * A) * h + (dt * x)[:, None] * Bs[i].to(tl.float32)[None, :]
                y = tl.sum(h * Cs[i].to(tl.float32)[None, :], 1) + D * x
                y = y * z * tl.sigmoid(z)
                tl.store(y_ptr + t * y_t + e, y.to(y_ptr.dtype.element_ty), mask=e_in & (t < T))
    tl.store(last_ptr + state, h, mask=tile_in)


@triton.jit(do_not_specialize=('T', 'E'))
def scan_backward_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dy_ptr, starts_ptr, dlast_ptr,
                         dx_ptr, ddt_ptr, dbias_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dstate_ptr, room_ptr,
                         T, E, x_b: tl.int64, x_t: tl.int64, dt_b: tl.int64, dt_t: tl.int64,
                         B_b: tl.int64, B_t: tl.int64, C_b: tl.int64, C_t: tl.int64, z_b: tl.int64, z_t: tl.int64,
                         dy_b: tl.int64, dy_t: tl.int64, dx_t: tl.int64,
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
    x_ptr += b * x_b
    dt_ptr += b * dt_b
    z_ptr += b * z_b
    dy_ptr += b * dy_b
    dx_ptr += b * T * dx_t
    ddt_ptr += b * T * dx_t
    dz_ptr += b * T * dx_t
    B_ptr += b * B_b
    C_ptr += b * C_b
    part = b * tl.num_programs(0) + tl.program_id(0)
    dB_ptr += part * T * N                                      # parts (B, blocks, T, N)
    dC_ptr += part * T * N
    chunks = tl.cdiv(T, CHUNK)
    starts_ptr += b * chunks * E * N
    ROUNDS: tl.constexpr = CHUNK // STEPS
    ROOM: tl.constexpr = BLOCK_E * BLOCK_N
    room_ptr += part * ROUNDS * ROOM
    place = tl.arange(0, BLOCK_E)[:, None] * BLOCK_N + n[None, :]
    dA = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    dD = tl.zeros([BLOCK_E], tl.float32)
    dbias = tl.zeros([BLOCK_E], tl.float32)
    for back in range(chunks):
        c = chunks - 1 - back
        # the states before each STEPS of the chunk, into this program's own room (which a cache holds)
        h = tl.load(starts_ptr + c * E * N + tile, mask=tile_in, other=0.0)
        for s in range(ROUNDS):
            tl.store(room_ptr + s * ROOM + place, h)
            for i in tl.static_range(STEPS):
                t = c * CHUNK + s * STEPS + i
                x = tl.load(x_ptr + t * x_t + e, mask=e_in & (t < T), other=0.0).to(tl.float32)
                dt = tl.load(dt_ptr + t * dt_t + e, mask=e_in & (t < T), other=0.0).to(tl.float32)
                B = tl.load(B_ptr + t * B_t + n, mask=n_in & (t < T), other=0.0).to(tl.float32)
                dt = tl.where(t < T, softplus(dt + bias), 0.0)
                h = tl.exp2(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
        tl.debug_barrier()
        for s in range(ROUNDS):
            t0 = c * CHUNK + CHUNK - STEPS - s * STEPS
            h = tl.load(room_ptr + (ROUNDS - 1 - s) * ROOM + place)
            states = (h,)
            xs = ()
            raws = ()
            dts = ()
            for i in tl.static_range(STEPS):
                t = t0 + i
                x = tl.load(x_ptr + t * x_t + e, mask=e_in & (t < T), other=0.0).to(tl.float32)
                raw = tl.load(dt_ptr + t * dt_t + e, mask=e_in & (t < T), other=0.0).to(tl.float32) + bias
                B = tl.load(B_ptr + t * B_t + n, mask=n_in & (t < T), other=0.0).to(tl.float32)
                dt = tl.where(t < T, softplus(raw), 0.0)
                h = tl.exp2(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
                states += (h,)
                xs += (x,)
                raws += (raw,)
                dts += (dt,)
            for i in tl.static_range(STEPS - 1, -1, -1):
                t = t0 + i
                x = xs[i]
                dt = dts[i]
                h = states[i + 1]
                B = tl.load(B_ptr + t * B_t + n, mask=n_in & (t < T), other=0.0).to(tl.float32)
                C = tl.load(C_ptr + t * C_t + n, mask=n_in & (t < T), other=0.0).to(tl.float32)
                z = tl.load(z_ptr + t * z_t + e, mask=e_in & (t < T), other=0.0).to(tl.float32)
                dout = tl.load(dy_ptr + t * dy_t + e, mask=e_in & (t < T), other=0.0).to(tl.float32)
                # the gate: silu(z) = z s, its slope s (1 + z (1 - s))
                s_z = tl.sigmoid(z)
                y = tl.sum(h * C[None, :], 1) + D * x
                dz = dout * y * s_z * (1 + z * (1 - s_z))
                dy = dout * z * s_z
                # the recurrence
                g = carry + dy[:, None] * C[None, :]
                dC = tl.sum(h * dy[:, None], 0)
                dB = tl.sum(g * (dt * x)[:, None], 0)
                g_B = tl.sum(g * B[None, :], 1)
                carry = g * tl.exp2(dt[:, None] * A)
                w = carry * states[i]
                dA += w * dt[:, None]
                ddt = (x * g_B + tl.sum(w * A, 1) / LOG2E) * tl.sigmoid(raws[i])
                ddt = tl.where(t < T, ddt, 0.0)
                dbias += ddt
                dD += dy * x
                dx = D * dy + dt * g_B
                tl.store(dx_ptr + t * dx_t + e, dx.to(dx_ptr.dtype.element_ty), mask=e_in & (t < T))
                tl.store(ddt_ptr + t * dx_t + e, ddt.to(ddt_ptr.dtype.element_ty), mask=e_in & (t < T))
                tl.store(dz_ptr + t * dx_t + e, dz.to(dz_ptr.dtype.element_ty), mask=e_in & (t < T))
                tl.store(dB_ptr + t * N + n, dB, mask=n_in & (t < T))
                tl.store(dC_ptr + t * N + n, dC, mask=n_in & (t < T))
        tl.debug_barrier()                                      # the next chunk writes into the same room
    tl.store(dstate_ptr + state, carry, mask=tile_in)
    tl.store(dA_ptr + b * E * N + tile, dA, mask=tile_in)       # parts (B, E, N), (B, E)
    tl.store(dD_ptr + b * E + e, dD, mask=e_in)
    tl.store(dbias_ptr + b * E + e, dbias, mask=e_in)


def blocks_of(E, N):
    """({sizes of a program}, programs a sequence, warps)."""
    block_n = triton.next_power_of_2(N)
    sizes = dict(N=N, BLOCK_E=BLOCK_E, BLOCK_N=block_n, CHUNK=CHUNK)
    return sizes, triton.cdiv(E, BLOCK_E), max(1, BLOCK_E * block_n // 256)


def steps_of(*tensors):
    """The strides of their batch and time."""
    return [stride for u in tensors for stride in u.stride()[:2]]


# PyTorch sees each kernel as an operation of its own, with the shapes of its results and its
# gradient: so autograd takes it, and torch.compile holds it in a graph without looking inside.

@torch.library.custom_op('mambino::triton_scan', mutates_args=())
def scan(x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
         state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """mamba1_scan of these arguments → y (B, T, E) in x's precision, the last state (B, N, E) and the
    states at the starts of chunks (B, chunks, E, N), fp32."""
    batch, T, E = x.shape
    N = A.shape[1]
    x, dt, B, C, z = map(rows, (x, dt, B, C, z))
    state = None if state is None else state.contiguous()
    sizes, blocks, warps = blocks_of(E, N)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    starts = x.new_empty(batch, triton.cdiv(T, CHUNK), E, N, dtype=torch.float32)
    last = x.new_empty(batch, N, E, dtype=torch.float32)
    with on_card(x):
        scan_forward_kernel[blocks, batch](
            x, dt, dt_bias.contiguous(), A.contiguous(), B, C, D.contiguous(), z, state, y, starts, last, T, E,
            *steps_of(x, dt, B, C, z), y.stride(1), HAS_STATE=state is not None, STEPS=FORWARD_STEPS,
            num_warps=warps, **sizes)
    return y, last, starts


@scan.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, state):
    batch, T, E = x.shape
    N = A.shape[1]
    starts = x.new_empty(batch, (T + CHUNK - 1) // CHUNK, E, N, dtype=torch.float32)
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
    parts = x.new_empty(2, batch, blocks, T, N, dtype=torch.float32)  # of dB and dC
    dA = x.new_empty(batch, E, N, dtype=torch.float32)
    dD, dbias = x.new_empty(2, batch, E, dtype=torch.float32)
    dstate = x.new_empty(batch, N, E, dtype=torch.float32)
    room = x.new_empty(batch * blocks, CHUNK // BACKWARD_STEPS, BLOCK_E, sizes['BLOCK_N'], dtype=torch.float32)
    with on_card(x):
        scan_backward_kernel[blocks, batch](
            x, dt, dt_bias.contiguous(), A.contiguous(), B, C, D.contiguous(), z, dy, starts, dlast,
            dx, ddt, dbias, dA, parts[0], parts[1], dD, dz, dstate, room, T, E,
            *steps_of(x, dt, B, C, z, dy), dx.stride(1), HAS_DLAST=dlast is not None, STEPS=BACKWARD_STEPS,
            num_warps=warps, **sizes)
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
