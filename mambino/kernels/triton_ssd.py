"""Mamba-2's scan as kernels of our own in Triton, which torch brings along for NVIDIA cards.

The recurrence by chunks of Q tokens (Dao & Gu 2024, section 6). Of one head and chunk, with sums_i
the sum of dt A up to its token i, and S (P, N) the state it starts from:

    y_i = sum_{j <= i} (C_i B_j) exp(sums_i - sums_j) dt_j x_j + exp(sums_i) S C_i + D x_i
    S'  = exp(sums_Q) S + sum_j exp(sums_Q - sums_j) dt_j x_j B_j^T

    sums      softplus(dt + bias) and its sums times A, (B, H, T) fp32
    states    one program a head walks from chunk to chunk, S in registers; writes each chunk's S
    outputs   a program takes a chunk and some heads of a group: C B^T once, then y head by head

Backwards, `states` runs in the other direction for U, the gradient of S': that of the chunk before
is exp(sums_Q) U + sum_i exp(sums_i) dy_i C_i^T. Then, with M_ij = exp(sums_i - sums_j) for j <= i,
else 0, and G_ij = M_ij dt_j (dy_i x_j), which is the gradient of C_i B_j:

    values    a chunk of a head: dX_j = sum_i (C_i B_j) M_ij dy_i + exp(sums_Q - sums_j) U B_j,
              dx = dt dX + D dy, ddt = x dX + A da, where da_t, the gradient of dt_t A, is what of
              y passes over t: (C_i B_j) G_ij for j < t <= i, S to t and after it, j < t to U, S to U
    keys      before it, a chunk of some heads of a group: dC_i = sum_j G_ij B_j + exp(sums_i) dy_i S,
              and of y what comes from S; again for dB_j = sum_i G_ij C_i + exp(sums_Q - sums_j)
              dt_j x_j U, and what goes to U

The sums over the heads of a group are taken in registers, and by PyTorch over the few programs that
share its heads. There are no atomics, so the same numbers come each time. C B^T of a group is kept
for the gradient; weights (Q, Q), B and C of each head are never in memory. Bytes, with u those of x
(B, T, H, P) and s = N / Q u those of the states: 3 u + 2 s forward, 8 u + 5 s backward. For 8 x
1,024 tokens, 24 heads of 64, N = 128, Q = 64, in bf16: u 25 MB, s 50 MB, 0.63 GB in all.

Products are of the precision of x (fp32: exact, unless PyTorch's own may be TF32), sums fp32.
Letters of the shapes: B batch, T time, H heads, G groups, R heads a group, P head size, N state
size, Q chunk.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from mambino.kernels.triton_scan import on_card, rows, softplus

PROGRAMS = 256              # for a card at least: heads are spread until there are so many
HEADS_AT_ONCE = tl.constexpr(16)
COUNTS = ('T', 'H', 'R', 'HEADS')     # of which a kernel is not compiled anew
SUMS = dict(num_warps=4)
STATES = dict(num_warps=4, num_stages=2)
OUTPUTS = dict(num_warps=4, num_stages=2)
VALUES = dict(num_warps=4, num_stages=1)
KEYS = dict(num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=COUNTS)
def sums_kernel(dt_ptr, bias_ptr, A_ptr, steps_ptr, sums_ptr, T, H,
                dt_b: tl.int64, dt_t: tl.int64, dt_h: tl.int64, Q: tl.constexpr):
    c = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    t = c * Q + tl.arange(0, Q)
    h = tl.program_id(2) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    h_in = h < H
    within = (t < T)[:, None] & h_in[None, :]
    dt_ptr += b * dt_b
    raw = tl.load(dt_ptr + t[:, None] * dt_t + h[None, :] * dt_h, mask=within, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=h_in, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h, mask=h_in, other=0.0).to(tl.float32)
    steps, _ = softplus(raw + bias[None, :])
    steps = tl.where(within, steps, 0.0)                        # beyond the end time stands still
    sums = tl.cumsum(steps * A[None, :], 0)
    places = (b * H + h[None, :]) * (tl.num_programs(0) * Q) + t[:, None]
    tl.store(steps_ptr + places, steps, mask=h_in[None, :])
    tl.store(sums_ptr + places, sums, mask=h_in[None, :])


@triton.jit(do_not_specialize=COUNTS)
def states_kernel(values_ptr, keys_ptr, steps_ptr, sums_ptr, first_ptr, states_ptr, last_ptr, starts_ptr, across_ptr,
                  T, H, R, values_b: tl.int64, values_t, keys_b: tl.int64, keys_t,
                  P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
                  BACKWARDS: tl.constexpr, HAS_FIRST: tl.constexpr,
                  BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """Values x and keys B give S; backwards in time, dy and C give U, and beside it, from S
    (starts), what goes from S to U."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    p_in = p < P
    n_in = n < N
    tile = p[:, None] * N + n[None, :]                          # of (P, N)
    tile_in = p_in[:, None] & n_in[None, :]
    chunks = tl.cdiv(T, Q)
    first = chunks - 1 if BACKWARDS else 0                      # the chunk to begin with
    way = -1 if BACKWARDS else 1
    values_ptr += b * values_b + h * P + first * Q * values_t.to(tl.int64)
    keys_ptr += b * keys_b + (h // R) * N + first * Q * keys_t.to(tl.int64)
    steps_ptr += ((b * H + h) * chunks + first) * Q
    sums_ptr += ((b * H + h) * chunks + first) * Q
    if HAS_FIRST:
        first_ptr += (b * H + h) * P * N
        state = tl.load(first_ptr + tile, mask=tile_in, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(chunks):
        c = first + way * i
        place = ((b * chunks + c) * H + h) * P * N
        tl.store(states_ptr + place + tile, state.to(states_ptr.dtype.element_ty), mask=tile_in)
        within = c * Q + q < T
        values_in = p_in[:, None] & within[None, :]
        values = tl.load(values_ptr + p[:, None] + q[None, :] * values_t, mask=values_in, other=0.0)  # (P, Q)
        keys_in = within[:, None] & n_in[None, :]
        keys = tl.load(keys_ptr + q[:, None] * keys_t + n[None, :], mask=keys_in, other=0.0)  # (Q, N)
        sums = tl.load(sums_ptr + q)
        total = tl.load(sums_ptr + Q - 1)
        if BACKWARDS:
            start = tl.load(starts_ptr + place + tile, mask=tile_in, other=0.0).to(tl.float32)
            across = tl.exp(total) * tl.sum(start * state, 1)   # (P), to be added up
            tl.store(across_ptr + ((b * H + h) * chunks + c) * P + p, across, mask=p_in)
            weights = tl.exp(sums)
        else:
            weights = tl.exp(total - sums) * tl.load(steps_ptr + q)
        weighted = (values * weights[None, :]).to(keys.dtype)
        state = tl.dot(weighted, keys, state * tl.exp(total), input_precision=PRECISION)
        values_ptr += way * Q * values_t
        keys_ptr += way * Q * keys_t
        steps_ptr += way * Q
        sums_ptr += way * Q
    tl.store(last_ptr + (b * H + h) * P * N + tile, state, mask=tile_in)


@triton.jit(do_not_specialize=COUNTS)
def outputs_kernel(x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, sums_ptr, states_ptr, y_ptr, CB_ptr,
                   T, H, R, HEADS, x_b: tl.int64, x_t, y_t, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    c = tl.program_id(0)
    splits = tl.cdiv(R, HEADS)
    g = tl.program_id(1) // splits
    b = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(0)
    q = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    within = c * Q + q < T
    row = c.to(tl.int64) * Q
    keys = q[:, None] * x_t + n[None, :]
    keys_in = within[:, None] & (n < N)[None, :]
    B = tl.load(B_ptr + b * x_b + row * x_t + g * N + keys, mask=keys_in, other=0.0)  # (Q, N)
    C = tl.load(C_ptr + b * x_b + row * x_t + g * N + keys, mask=keys_in, other=0.0)
    CB = tl.dot(C, tl.trans(B), input_precision=PRECISION)      # (Q, Q)
    if tl.program_id(1) % splits == 0:
        CB_ptr += ((b * chunks + c) * tl.cdiv(H, R) + g) * Q * Q
        tl.store(CB_ptr + q[:, None] * Q + q[None, :], CB)
    causal = q[:, None] >= q[None, :]
    values_in = within[:, None] & (p < P)[None, :]
    tile = p[:, None] * N + n[None, :]                          # of (P, N)
    state_in = (p < P)[:, None] & (n < N)[None, :]
    x_ptr += b * x_b + row * x_t
    y_ptr += (b * T + row) * y_t
    states_ptr += (b * chunks + c) * H * P * N
    steps_ptr += (b * H * chunks + c) * Q                       # of head 0
    sums_ptr += (b * H * chunks + c) * Q
    first = g * R + tl.program_id(1) % splits * HEADS
    for h in range(first, tl.minimum(first + HEADS, g * R + R)):
        steps = tl.load(steps_ptr + h * chunks * Q + q)
        sums = tl.load(sums_ptr + h * chunks * Q + q)
        x = tl.load(x_ptr + h * P + (q[:, None] * x_t + p[None, :]), mask=values_in, other=0.0)
        state = tl.load(states_ptr + h * P * N + tile, mask=state_in, other=0.0)
        y = tl.dot(C, tl.trans(state), input_precision=PRECISION) * tl.exp(sums)[:, None]
        # masked before exp: no inf, no NaN
        decay = tl.exp(tl.where(causal, sums[:, None] - sums[None, :], float('-inf')))
        y = tl.dot((CB * decay * steps[None, :]).to(x.dtype), x, y, input_precision=PRECISION)
        y += tl.load(D_ptr + h).to(tl.float32) * x
        tl.store(y_ptr + h * P + (q[:, None] * y_t + p[None, :]), y.to(y_ptr.dtype.element_ty),
                 mask=values_in)


@triton.jit(do_not_specialize=COUNTS)
def values_kernel(x_ptr, B_ptr, CB_ptr, dy_ptr, raw_ptr, bias_ptr, A_ptr, D_ptr, steps_ptr, sums_ptr,
                  ends_ptr, passing_ptr, leaving_ptr, across_ptr, dx_ptr, ddt_ptr, parts_ptr,
                  T, H, R, x_b: tl.int64, x_t, dy_t, dx_t, raw_b: tl.int64, raw_t, raw_h,
                  P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
                  BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    c = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    g = h // R
    chunks = tl.num_programs(0)
    q = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    within = c * Q + q < T
    row = c.to(tl.int64) * Q
    keys_in = within[:, None] & (n < N)[None, :]
    values_in = within[:, None] & (p < P)[None, :]
    state_in = (p < P)[:, None] & (n < N)[None, :]
    of_head = ((b * H + h) * chunks + c) * Q                    # of (B, H, T)
    steps = tl.load(steps_ptr + of_head + q)
    sums = tl.load(sums_ptr + of_head + q)
    total = tl.load(sums_ptr + of_head + Q - 1)

    # by the end of the chunk
    B = tl.load(B_ptr + b * x_b + row * x_t + g * N + (q[:, None] * x_t + n[None, :]), mask=keys_in, other=0.0)
    ends_ptr += ((b * chunks + c) * H + h) * P * N
    U = tl.load(ends_ptr + p[:, None] * N + n[None, :], mask=state_in, other=0.0)
    dX = tl.dot(B, tl.trans(U), input_precision=PRECISION) * tl.exp(total - sums)[:, None]  # (Q, P)

    # within it
    x_ptr += b * x_b + row * x_t + h * P
    dy_ptr += (b * T + row) * dy_t + h * P
    x = tl.load(x_ptr + q[:, None] * x_t + p[None, :], mask=values_in, other=0.0)
    dy = tl.load(dy_ptr + q[:, None] * dy_t + p[None, :], mask=values_in, other=0.0)
    CB_ptr += ((b * chunks + c) * tl.cdiv(H, R) + g) * Q * Q
    CB = tl.load(CB_ptr + q[:, None] * Q + q[None, :])
    causal = q[:, None] >= q[None, :]
    weights = CB * tl.exp(tl.where(causal, sums[:, None] - sums[None, :], float('-inf')))
    V = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * weights * steps[None, :]
    V = tl.where(q[:, None] > q[None, :], V, 0.0)
    passing = tl.load(passing_ptr + of_head + q) + tl.sum(V, 1) - tl.sum(V, 0)
    dX = tl.dot(tl.trans(weights.to(x.dtype)), dy, dX, input_precision=PRECISION)
    dx = dX * steps[:, None] + tl.load(D_ptr + h).to(tl.float32) * dy
    dx_ptr += (b * T + row) * dx_t + h * P
    tl.store(dx_ptr + q[:, None] * dx_t + p[None, :], dx.to(dx_ptr.dtype.element_ty), mask=values_in)

    # the steps: da sums up what goes over t
    leaving = tl.load(leaving_ptr + of_head + q)
    da = tl.cumsum(passing, 0, reverse=True) + tl.cumsum(leaving, 0) - leaving
    across_ptr += ((b * H + h) * chunks + c) * P
    da += tl.sum(tl.load(across_ptr + p, mask=p < P, other=0.0), 0)
    raw = tl.load(raw_ptr + b * raw_b + row * raw_t + h * raw_h + q * raw_t, mask=within, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + h).to(tl.float32)
    A = tl.load(A_ptr + h).to(tl.float32)
    ddt = tl.where(within, (tl.sum(dX * x, 1) + da * A) * tl.sigmoid(raw), 0.0)
    ddt_ptr += (b * T + row) * H + h
    tl.store(ddt_ptr + q * H, ddt.to(ddt_ptr.dtype.element_ty), mask=within)
    parts_ptr += ((b * chunks + c) * H + h) * 3                 # (B, chunks, H, 3): of dt_bias, A, D
    tl.store(parts_ptr, tl.sum(ddt, 0))
    tl.store(parts_ptr + 1, tl.sum(da * steps, 0))
    tl.store(parts_ptr + 2, tl.sum(tl.sum(dy.to(tl.float32) * x.to(tl.float32), 1), 0))


@triton.jit(do_not_specialize=COUNTS)
def keys_kernel(x_ptr, dy_ptr, keys_ptr, others_ptr, steps_ptr, sums_ptr, states_ptr, dkeys_ptr, over_ptr,
                T, H, R, HEADS, x_b: tl.int64, x_t, dy_t,
                P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, OF_B: tl.constexpr,
                BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """For keys C, with others B and states S: dC, and what passes over the chunk's start to each
    token. For keys B, with others C and states U: dB, and what leaves each token over the chunk's
    end."""
    c = tl.program_id(0)
    splits = tl.cdiv(R, HEADS)
    g = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    b = tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(0)
    q = tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    within = c * Q + q < T
    row = c.to(tl.int64) * Q
    keys_in = within[:, None] & (n < N)[None, :]
    values_in = within[:, None] & (p < P)[None, :]
    tile = p[:, None] * N + n[None, :]                          # of (P, N)
    state_in = (p < P)[:, None] & (n < N)[None, :]
    visible = q[:, None] <= q[None, :] if OF_B else q[:, None] >= q[None, :]
    dCB = tl.zeros([Q, Q], tl.float32)                          # for dB transposed
    dkeys = tl.zeros([Q, BLOCK_N], tl.float32)
    keys_ptr += b * x_b + row * x_t + g * N
    others_ptr += b * x_b + row * x_t + g * N
    keys = tl.load(keys_ptr + (q[:, None] * x_t + n[None, :]), mask=keys_in, other=0.0)
    x_ptr += b * x_b + row * x_t
    dy_ptr += (b * T + row) * dy_t
    states_ptr += (b * chunks + c) * H * P * N
    steps_ptr += (b * H * chunks + c) * Q                       # of head 0
    sums_ptr += (b * H * chunks + c) * Q
    over_ptr += (b * H * chunks + c) * Q
    first = g * R + split * HEADS
    for h in range(first, tl.minimum(first + HEADS, g * R + R)):
        steps = tl.load(steps_ptr + h * chunks * Q + q)
        sums = tl.load(sums_ptr + h * chunks * Q + q)
        total = tl.load(sums_ptr + h * chunks * Q + Q - 1)
        x = tl.load(x_ptr + h * P + (q[:, None] * x_t + p[None, :]), mask=values_in, other=0.0)
        dy = tl.load(dy_ptr + h * P + (q[:, None] * dy_t + p[None, :]), mask=values_in, other=0.0)
        states = tl.load(states_ptr + h * P * N + tile, mask=state_in, other=0.0)
        sums_from = sums[:, None] - sums[None, :]
        if OF_B:
            decay = tl.exp(tl.where(visible, -sums_from, float('-inf')))
            dCB += tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay * steps[:, None]
            weighted = (x * (tl.exp(total - sums) * steps)[:, None]).to(x.dtype)
        else:
            decay = tl.exp(tl.where(visible, sums_from, float('-inf')))
            dCB += tl.dot(dy, tl.trans(x), input_precision=PRECISION) * decay * steps[None, :]
            weighted = (dy * tl.exp(sums)[:, None]).to(x.dtype)
        dkeys = tl.dot(weighted, states, dkeys, input_precision=PRECISION)
        over = tl.dot(keys, tl.trans(states), input_precision=PRECISION) * weighted  # (Q, P)
        tl.store(over_ptr + h * chunks * Q + q, tl.sum(over, 1))
    others = tl.load(others_ptr + (q[:, None] * x_t + n[None, :]), mask=keys_in, other=0.0)
    dkeys = tl.dot(dCB.to(others.dtype), others, dkeys, input_precision=PRECISION)
    G = tl.cdiv(H, R)
    dkeys_ptr += (((b * splits + split) * T + row) * G + g) * N  # of (B, splits, T, G, N)
    tl.store(dkeys_ptr + q[:, None] * (G * N) + n[None, :], dkeys, mask=keys_in)


class Cut:
    """How xBC (B, T, H P + 2 G N) is cut among programs."""

    def __init__(self, xBC, H, G, P):
        self.batch, self.T, width = xBC.shape
        self.H, self.G, self.R = H, G, H // G
        self.N = (width - H * P) // (2 * G)
        self.Q = 32 if xBC.dtype == torch.float32 else 64       # by what a program may hold
        self.chunks = triton.cdiv(self.T, self.Q)
        wanted = triton.cdiv(PROGRAMS, self.chunks * self.batch * G)
        a_program = triton.cdiv(self.R, min(wanted, self.R))
        self.splits = triton.cdiv(self.R, a_program)            # programs a group and chunk
        self.heads = self.T, H, self.R, a_program
        exact = torch.get_float32_matmul_precision() == 'highest'
        self.sizes = dict(P=P, N=self.N, Q=self.Q, BLOCK_P=padded(P), BLOCK_N=padded(self.N))
        self.sizes['PRECISION'] = 'ieee' if exact else 'tf32'

    def states(self, values, keys, steps, sums, first, starts=None):
        """(states of the chunks (B, chunks, H, P, N), the last one in fp32, what goes across the
        chunks) of states_kernel; from starts backwards in time."""
        shape = self.batch, self.chunks, self.H, self.sizes['P'], self.N
        states = values.new_empty(shape)
        last = values.new_empty(self.batch, *shape[2:], dtype=torch.float32)
        across = None if starts is None else sums.new_empty(self.batch, self.H, self.chunks, shape[3])
        states_kernel[self.H, self.batch](
            values, keys, steps, sums, first, states, last, starts, across, self.T, self.H, self.R,
            *values.stride()[:2], *keys.stride()[:2],
            BACKWARDS=starts is not None, HAS_FIRST=first is not None, **self.sizes, **STATES)
        return states, last, across


def padded(size):
    """The next size that a matrix product on tensor cores can have."""
    return max(16, triton.next_power_of_2(size))


def parts_of(xBC, H, G, P):
    """x, B and C as they lie in xBC, (B, T, …)."""
    N = (xBC.shape[-1] - H * P) // (2 * G)
    return xBC.split((H * P, G * N, G * N), dim=-1)


# As operations of PyTorch: see triton_scan.py.

@torch.library.custom_op('mambino::triton_ssd', mutates_args=())
def ssd(xBC: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, state: Tensor | None,
        groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mamba2_scan of these arguments → y (B, T, H, P) in xBC's precision, the last state (B, H, P,
    N) in fp32, and for the gradient the states of chunks (B, chunks, H, P, N), steps and sums (B,
    H, chunks Q), and C B^T (B, chunks, G, Q, Q)."""
    xBC = rows(xBC)
    H = dt.shape[-1]
    cut = Cut(xBC, H, groups, head_dim)
    x, B, C = parts_of(xBC, H, groups, head_dim)
    steps = dt.new_empty(cut.batch, H, cut.chunks * cut.Q, dtype=torch.float32)
    sums = torch.empty_like(steps)
    y = xBC.new_empty(cut.batch, cut.T, H, head_dim)
    CB = xBC.new_empty(cut.batch, cut.chunks, groups, cut.Q, cut.Q, dtype=torch.float32)
    state = None if state is None else state.contiguous()
    with on_card(xBC):
        sums_kernel[cut.chunks, cut.batch, triton.cdiv(H, HEADS_AT_ONCE.value)](
            dt, dt_bias.contiguous(), A.contiguous(), steps, sums, cut.T, H, *dt.stride(),
            Q=cut.Q, **SUMS)
        states, last, _ = cut.states(x, B, steps, sums, state)
        outputs_kernel[cut.chunks, groups * cut.splits, cut.batch](
            x, B, C, D.contiguous(), steps, sums, states, y, CB, *cut.heads, *xBC.stride()[:2],
            y.stride(1), **cut.sizes, **OUTPUTS)
    return y, last, states, steps, sums, CB


@ssd.register_fake
def _(xBC, dt, dt_bias, A, D, state, groups, head_dim):
    H = dt.shape[-1]
    batch, T, width = xBC.shape
    N = (width - H * head_dim) // (2 * groups)
    Q = 32 if xBC.dtype == torch.float32 else 64
    chunks = (T + Q - 1) // Q
    steps, sums = (dt.new_empty(batch, H, chunks * Q, dtype=torch.float32) for _ in range(2))
    last = xBC.new_empty(batch, H, head_dim, N, dtype=torch.float32)
    states = xBC.new_empty(batch, chunks, H, head_dim, N)
    CB = xBC.new_empty(batch, chunks, groups, Q, Q, dtype=torch.float32)
    return xBC.new_empty(batch, T, H, head_dim), last, states, steps, sums, CB


@torch.library.custom_op('mambino::triton_ssd_backward', mutates_args=())
def ssd_backward(xBC: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, states: Tensor,
                 steps: Tensor, sums: Tensor, CB: Tensor, dy: Tensor, dlast: Tensor | None,
                 groups: int, head_dim: int) -> tuple[
                     Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of xBC, dt, dt_bias, A, D in their precisions, of the first state in fp32."""
    xBC = rows(xBC)
    H = dt.shape[-1]
    cut = Cut(xBC, H, groups, head_dim)
    x, B, C = parts_of(xBC, H, groups, head_dim)
    dy = dy.to(xBC.dtype).contiguous()
    dxBC = xBC.new_empty(xBC.shape)
    dx, dB, dC = parts_of(dxBC, H, groups, head_dim)
    ddt = dt.new_empty(dt.shape)
    shared = xBC.new_empty(2, cut.batch, cut.splits, cut.T, groups * cut.N, dtype=torch.float32)
    parts = xBC.new_empty(cut.batch * cut.chunks, H, 3, dtype=torch.float32)
    passing, leaving = torch.empty_like(sums), torch.empty_like(sums)
    dlast = None if dlast is None else dlast.contiguous()
    with on_card(xBC):
        ends, dstate, across = cut.states(dy, C, steps, sums, dlast, starts=states)
        for keys, others, carried, dkeys, over in ((C, B, states, shared[1], passing),
                                                   (B, C, ends, shared[0], leaving)):
            keys_kernel[cut.chunks, groups * cut.splits, cut.batch](
                x, dy, keys, others, steps, sums, carried, dkeys, over, *cut.heads,
                *xBC.stride()[:2], dy.stride(1), OF_B=keys is B, **cut.sizes, **KEYS)
        values_kernel[cut.chunks, H, cut.batch](
            x, B, CB, dy, dt, dt_bias.contiguous(), A.contiguous(), D.contiguous(), steps, sums,
            ends, passing, leaving, across, dx, ddt, parts, cut.T, H, cut.R,
            *xBC.stride()[:2], dy.stride(1), dxBC.stride(1), *dt.stride(), **cut.sizes, **VALUES)
    dB.copy_(shared[0].sum(1))
    dC.copy_(shared[1].sum(1))
    dbias, dA, dD = parts.sum(0).unbind(-1)
    dbias, dA, dD = (part.to(of.dtype, copy=True) for part, of in zip((dbias, dA, dD), (dt_bias, A, D)))
    return dxBC, ddt, dbias, dA, dD, dstate


@ssd_backward.register_fake
def _(xBC, dt, dt_bias, A, D, states, steps, sums, CB, dy, dlast, groups, head_dim):
    grads = [u.new_empty(u.shape) for u in (xBC, dt, dt_bias, A, D)]
    return *grads, states.new_empty(states.shape[0], *states.shape[2:], dtype=torch.float32)


def keep(ctx, inputs, output):
    *tensors, state, ctx.groups, ctx.head_dim = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.state_dtype = None if state is None else state.dtype


def differentiate(ctx, dy, dlast, *_):
    *tensors, states, steps, sums, CB = ctx.saved_tensors
    if dy is None:
        batch, T, H = tensors[1].shape
        dy = states.new_zeros(batch, T, H, ctx.head_dim)
    sizes = ctx.groups, ctx.head_dim
    *grads, dstate = ssd_backward(*tensors, states, steps, sums, CB, dy, dlast, *sizes)
    return *grads, None if ctx.state_dtype is None else dstate.to(ctx.state_dtype), None, None


ssd.register_autograd(differentiate, setup_context=keep)
