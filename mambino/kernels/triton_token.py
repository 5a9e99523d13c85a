"""One token of each row by kernels of our own in Triton: what one_token.py computes by several of
PyTorch's.

A generated token reads each weight once, in matrix products that PyTorch has; what stands between
them are a few thousand numbers, whose time is that of starting kernels. So each of these operations
is one kernel: it reads its inputs once, computes in fp32, writes its result once. A recurrence's
state is read and written in place. What is not a token, has gaps or other sizes is the caller's to
refuse (one_token.py).

Letters of the shapes: B batch, E inner width, H heads, R heads a group, G groups, P head size, N
state size, K taps, D width.
"""
import torch
import triton
import triton.language as tl

from mambino.kernels.triton_scan import on_card


def block_of(n, most=4096):
    return min(most, triton.next_power_of_2(n))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also where exp(x) is so small that 1 + exp(x) is rounded."""
    u = tl.exp(x)
    w = 1 + u
    return tl.where(x > 20, x, tl.where(w == 1, u, tl.log(w) * (u / (w - 1))))


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


# --- norms ----------------------------------------------------------------------------------------

@triton.jit
def norm_kernel(x_ptr, z_ptr, weight_ptr, y_ptr, width, groups, eps, x_row, z_row, GATED: tl.constexpr,
                BLOCK: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, BLOCK)
    there = place < width
    at = group * width + place
    x = tl.load(x_ptr + row * x_row + at, there, 0.0).to(tl.float32)
    if GATED:
        x *= silu(tl.load(z_ptr + row * z_row + at, there, 0.0).to(tl.float32))
    y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * tl.load(weight_ptr + at, there, 0.0)
    tl.store(y_ptr + row * groups * width + at, y.to(y_ptr.dtype.element_ty), there)


def norm(x, z, weight, eps, groups, dtype):
    """rms_norm, or with z gated_rms_norm in groups: x, z (rows, D), each row without gaps, weight (D) → (rows, D)."""
    rows, D = x.shape
    width = D // groups
    y = torch.empty(rows, D, dtype=dtype, device=x.device)
    z = x if z is None else z
    BLOCK = triton.next_power_of_2(width)
    with on_card(x):
        norm_kernel[rows, groups](x, z, weight, y, width, groups, eps, x.stride(0), z.stride(0), z is not x, BLOCK,
                                  num_warps=8 if BLOCK > 2048 else 4)
    return y


@triton.jit
def logit(h, controller_ptr, bias_ptr, branch, D, place, there):
    return tl.sum(h * tl.load(controller_ptr + branch * D + place, there, 0.0), 0) + tl.load(bias_ptr + branch)


@triton.jit
def normed(y_ptr, norm_ptr, row, D, place, there, eps):
    y = tl.load(y_ptr + row * D + place, there, 0.0).to(tl.float32)
    return y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * tl.load(norm_ptr + place, there, 0.0)


@triton.jit
def mix_kernel(h_ptr, controller_ptr, bias_ptr, y0_ptr, y1_ptr, y2_ptr, norm0_ptr, norm1_ptr, norm2_ptr, mixed_ptr,
               D, eps, THREE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    there = place < D
    h = tl.load(h_ptr + row * D + place, there, 0.0).to(tl.float32)
    first = logit(h, controller_ptr, bias_ptr, 0, D, place, there)
    second = logit(h, controller_ptr, bias_ptr, 1, D, place, there)
    third = logit(h, controller_ptr, bias_ptr, 2, D, place, there) if THREE else -float('inf')
    top = tl.maximum(tl.maximum(first, second), third)
    first, second, third = tl.exp(first - top), tl.exp(second - top), tl.exp(third - top)
    y = first * normed(y0_ptr, norm0_ptr, row, D, place, there, eps)
    y += second * normed(y1_ptr, norm1_ptr, row, D, place, there, eps)
    if THREE:
        y += third * normed(y2_ptr, norm2_ptr, row, D, place, there, eps)
    tl.store(mixed_ptr + row * D + place, y / (first + second + third), there)


def mix(h, controller, bias, outputs, norms, eps):
    """A hybrid's mix: h and two or three outputs (rows, D) without gaps, controller (branches, D),
    bias (branches), a norm's weight (D) for each → (rows, D) fp32."""
    rows, D = h.shape
    mixed = torch.empty(rows, D, device=h.device)
    is_three = len(outputs) == 3
    third = 2 if is_three else 0
    BLOCK = triton.next_power_of_2(D)
    with on_card(h):
        mix_kernel[(rows,)](h, controller, bias, outputs[0], outputs[1], outputs[third], norms[0], norms[1],
                            norms[third], mixed, D, eps, is_three, BLOCK, num_warps=8 if BLOCK > 2048 else 4)
    return mixed


# --- attention's and the MLP's --------------------------------------------------------------------

@triton.jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, H, x_row, x_head, HALF: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < H * HALF
    head, pair = at // HALF, at % HALF
    cos = tl.load(cos_ptr + row * HALF + pair, there, 0.0)
    sin = tl.load(sin_ptr + row * HALF + pair, there, 0.0)
    source = x_ptr + row * x_row + head * x_head + pair
    a = tl.load(source, there, 0.0).to(tl.float32)
    b = tl.load(source + HALF, there, 0.0).to(tl.float32)
    target = y_ptr + (row * H + head) * 2 * HALF + pair
    tl.store(target, (a * cos - b * sin).to(y_ptr.dtype.element_ty), there)
    tl.store(target + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), there)


def rope(x, cos, sin):
    """apply_rope: x (B, H, P), a head without gaps, cos, sin (B, P/2) fp32 → (B, H, P)."""
    B, H, P = x.shape
    y = torch.empty(B, H, P, dtype=x.dtype, device=x.device)
    BLOCK = block_of(H * P // 2, 256)
    with on_card(x):
        rope_kernel[B, triton.cdiv(H * P // 2, BLOCK)](x, cos, sin, y, H, x.stride(0), x.stride(1), P // 2, BLOCK)
    return y


@triton.jit(do_not_specialize=['SPLITS'])
def attention_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, part_ptr, top_ptr, sum_ptr, S, PER, SPLITS, scale,
                     k_row, k_head, v_row, v_head, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                     BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):
    """Of one row and key head the slots of one split: their sum of values, weighted by exp(score - top)."""
    both, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = both // G, both % G
    r, p, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    is_query = (r < R)[:, None] & (p < P)[None]
    q = tl.load(q_ptr + (both * R + r)[:, None] * P + p[None], is_query, 0.0)
    end = tl.minimum(tl.minimum(tl.load(pos_ptr + row) + 1, S), (split + 1) * PER).to(tl.int32)
    top = tl.full((BLOCK_R,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    y = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for start in range(split * PER, end, BLOCK_S):
        there = start + s < end
        at = start + s[:, None]
        k = tl.load(k_ptr + row * k_row + head * k_head + at * P + p[None], there[:, None] & (p < P)[None], 0.0)
        v = tl.load(v_ptr + row * v_row + head * v_head + at * P + p[None], there[:, None] & (p < P)[None], 0.0)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision='ieee') * scale     # (R, S)
        scores = tl.where(there[None], scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(there[None], tl.exp(scores - higher[:, None]), 0.0)
        kept = tl.exp(top - higher)
        total = total * kept + tl.sum(weights, 1)
        y = y * kept[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision='ieee')
        top = higher
    part = (both * SPLITS + split) * R + r
    tl.store(part_ptr + part[:, None] * P + p[None], y, is_query)
    tl.store(top_ptr + part, top, r < R)
    tl.store(sum_ptr + part, total, r < R)


@triton.jit(do_not_specialize=['SPLITS'])
def attention_sum_kernel(part_ptr, top_ptr, sum_ptr, y_ptr, SPLITS, R: tl.constexpr, P: tl.constexpr,
                         BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of one query the splits' results as one."""
    query = tl.program_id(0).to(tl.int64)
    k, p = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    part = (query // R * SPLITS + k) * R + query % R
    there = k < SPLITS
    top = tl.load(top_ptr + part, there, -1e30)
    weight = tl.where(there, tl.exp(top - tl.max(top, 0)), 0.0)
    total = tl.sum(tl.load(sum_ptr + part, there, 0.0) * weight, 0)
    y = tl.load(part_ptr + part[:, None] * P + p[None], there[:, None] & (p < P)[None], 0.0)
    y = tl.sum(y * weight[:, None], 0) / total
    tl.store(y_ptr + query * P + p, y.to(y_ptr.dtype.element_ty), p < P)


def attention(q, k, v, pos):
    """One query of each head over slots 0 to pos of its cache, all if pos is beyond: q (B, G, R, P)
    without gaps, k, v (B, G, S, P), a head's slots without gaps, pos (B) int64 → (B, G, R, P).

    Slots are split over programs, so that a few rows, too, fill a card (Dao et al. 2023,
    Flash-Decoding)."""
    B, G, R, P = q.shape
    S = k.shape[2]
    BLOCK_S = 64
    SPLITS = max(1, min(triton.cdiv(S, BLOCK_S), 256 // (B * G)))
    PER = triton.cdiv(triton.cdiv(S, SPLITS), BLOCK_S) * BLOCK_S
    SPLITS = triton.cdiv(S, PER)
    parts = torch.empty(B * G * SPLITS * R * (P + 2), device=q.device)
    part, top, total = parts.split([B * G * SPLITS * R * P, B * G * SPLITS * R, B * G * SPLITS * R])
    y = torch.empty_like(q)
    BLOCK_P = max(16, triton.next_power_of_2(P))
    with on_card(q):
        attention_kernel[B * G, SPLITS](
            q, k, v, pos, part, top, total, S, PER, SPLITS, P ** -0.5,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), G, R, P,
            max(16, triton.next_power_of_2(R)), BLOCK_P, BLOCK_S)
        attention_sum_kernel[(B * G * R,)](part, top, total, y, SPLITS, R, P, BLOCK_P, triton.next_power_of_2(SPLITS))
    return y


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, width, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    gate = tl.load(gate_ptr + row * gate_row + at, there, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + at, there, 0.0).to(tl.float32)
    tl.store(y_ptr + row * width + at, (silu(gate) * up).to(y_ptr.dtype.element_ty), there)


def swiglu(gate, up):
    """gate, up (rows, I), each row without gaps → (rows, I)."""
    rows, width = gate.shape
    y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    BLOCK = block_of(width, 512)
    with on_card(gate):
        swiglu_kernel[rows, triton.cdiv(width, BLOCK)](gate, up, y, width, gate.stride(0), up.stride(0), BLOCK)
    return y


# --- a Mamba's ------------------------------------------------------------------------------------

@triton.jit
def conv_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, E, x_row, state_row, K: tl.constexpr,
                BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = e < E
    x = tl.load(x_ptr + row * x_row + e, there, 0.0)
    y = tl.load(bias_ptr + e, there, 0.0).to(tl.float32)
    y += x.to(tl.float32) * tl.load(weight_ptr + e * K + K - 1, there, 0.0)
    place = state_ptr + row * state_row + e
    for k in tl.static_range(K - 1):
        past = tl.load(place + k * E, there, 0.0)
        y += past.to(tl.float32) * tl.load(weight_ptr + e * K + k, there, 0.0)
        if k > 0:
            tl.store(place + (k - 1) * E, past, there)
    if K > 1:
        tl.store(place + (K - 2) * E, x.to(state_ptr.dtype.element_ty), there)
    tl.store(y_ptr + row * E + e, silu(y).to(y_ptr.dtype.element_ty), there)


def conv(x, weight, bias, state):
    """causal_conv1d: x (B, E), a row without gaps, weight (E, 1, K), bias (E), state (B, K-1, E),
    which is written to → (B, E)."""
    B, E = x.shape
    y = torch.empty(B, E, dtype=x.dtype, device=x.device)
    BLOCK = block_of(E, 256)
    with on_card(x):
        conv_kernel[B, triton.cdiv(E, BLOCK)](x, weight, bias, state, y, E, x.stride(0), state.stride(0),
                                              weight.shape[-1], BLOCK)
    return y


@triton.jit
def mamba1_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, state_ptr, y_ptr, E, x_row, dt_row, B_row,
                  C_row, z_row, state_row, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_N)
    there = e < E
    both = (n < N)[:, None] & there[None]
    x = tl.load(x_ptr + row * x_row + e, there, 0.0).to(tl.float32)
    dt = tl.load(dt_ptr + row * dt_row + e, there, 0.0).to(tl.float32) + tl.load(bias_ptr + e, there, 0.0)
    dt = softplus(dt)
    A = tl.load(A_ptr + e[None] * N + n[:, None], both, 0.0)    # (N, E)
    B = tl.load(B_ptr + row * B_row + n, n < N, 0.0).to(tl.float32)
    C = tl.load(C_ptr + row * C_row + n, n < N, 0.0).to(tl.float32)
    place = state_ptr + row * state_row + n[:, None] * E + e[None]
    h = tl.load(place, both, 0.0) * tl.exp(dt[None] * A) + (dt * x)[None] * B[:, None]
    tl.store(place, h, both)
    y = tl.sum(h * C[:, None], 0) + tl.load(D_ptr + e, there, 0.0) * x
    y *= silu(tl.load(z_ptr + row * z_row + e, there, 0.0).to(tl.float32))
    tl.store(y_ptr + row * E + e, y.to(y_ptr.dtype.element_ty), there)


def mamba1(x, dt, dt_bias, A, B, C, D, z, state):
    """mamba1_scan: x, dt, z (B, E), B, C (B, N), rows without gaps, dt_bias, D (E), A (E, N), fp32,
    state (B, N, E) fp32, which is written to → (B, E) of x's dtype."""
    rows, E = x.shape
    N = A.shape[1]
    y = torch.empty(rows, E, dtype=x.dtype, device=x.device)
    BLOCK = block_of(E, 64)
    with on_card(x):
        mamba1_kernel[rows, triton.cdiv(E, BLOCK)](
            x, dt, dt_bias, A, B, C, D, z, state, y, E,
            x.stride(0), dt.stride(0), B.stride(0), C.stride(0), z.stride(0), state.stride(0),
            N, triton.next_power_of_2(N), BLOCK, num_warps=2)
    return y


@triton.jit
def mamba2_kernel(xBC_ptr, dt_ptr, bias_ptr, A_ptr, D_ptr, state_ptr, y_ptr, H, R, x_row, dt_row, state_row,
                  P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr,
                  BLOCK_N: tl.constexpr):
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    there = p < P
    both = there[:, None] & (n < N)[None]
    dt = softplus(tl.load(dt_ptr + row * dt_row + h).to(tl.float32) + tl.load(bias_ptr + h))
    decay = tl.exp(dt * tl.load(A_ptr + h))
    source = xBC_ptr + row * x_row
    x = tl.load(source + h * P + p, there, 0.0).to(tl.float32)
    B_at = H * P + (h // R) * N + n
    B = tl.load(source + B_at, n < N, 0.0).to(tl.float32)
    C = tl.load(source + B_at + GROUPS * N, n < N, 0.0).to(tl.float32)
    place = state_ptr + row * state_row + (h * P + p[:, None]) * N + n[None]
    state = tl.load(place, both, 0.0) * decay + (dt * x)[:, None] * B[None]     # (P, N)
    tl.store(place, state, both)
    y = tl.sum(state * C[None], 1) + tl.load(D_ptr + h) * x
    tl.store(y_ptr + (row * H + h) * P + p, y, there)


def mamba2(xBC, dt, dt_bias, A, D, state, groups):
    """mamba2_scan: xBC (B, E + 2GN), dt (B, H), rows without gaps, dt_bias, A, D (H) fp32, state
    (B, H, P, N) fp32, which is written to → (B, H, P) fp32."""
    rows, H, P, N = state.shape
    y = torch.empty(rows, H, P, device=xBC.device)
    BLOCK_P = block_of(P, 16)
    with on_card(xBC):
        mamba2_kernel[rows, H, triton.cdiv(P, BLOCK_P)](
            xBC, dt, dt_bias, A, D, state, y, H, H // groups, xBC.stride(0), dt.stride(0), state.stride(0),
            P, N, groups, BLOCK_P, triton.next_power_of_2(N))
    return y
