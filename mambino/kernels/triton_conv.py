"""A Mamba's short convolution as kernels of our own in Triton, which torch brings along for NVIDIA
cards.

With w_k (E) the tap k of K and b (E) the bias, x the inputs and before them the state:

    pre_t = b + sum_k w_k x_{t-K+1+k}           y_t = silu(pre_t)
    d_t = dy_t silu'(pre_t)                     dx_t = sum_k w_k d_{t+K-1-k}
    dw_k = sum_t d_t x_{t-K+1+k}                db = sum_t d_t

A program takes a block of channels and a span of tokens of one sequence, and walks over them in
time: of x, and backwards of d, a thread keeps the last K-1 of its channels in registers. So each
value is read once, and by few programs again, from a cache, where spans meet. x is read where it
lies, as a part of what in_proj gives. The backward pass makes pre again; nothing is kept for it but
what the operation was given. dx_t comes K-1 steps after t: what comes before token 0 is the
gradient of the state.

Each program writes its sums of dw and db, a second kernel adds those up. There are no atomics, so
the same numbers come each time. Bytes, with u those of x: 2 u forward, 3 u backward, and 2 (K+1)
fp32 values a channel and span. All is computed in fp32.

Letters of the shapes: B batch, T time, E channels, K taps.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambino.kernels.triton_scan import on_card, rows

BLOCK_E = 256               # channels a program, four a thread
SPAN = 64                   # tokens a program at most
SHORTEST = 16               # and at least; more than taps
PROGRAMS = 1024             # for a card at least: spans are halved until there are so many
FORWARD = dict(STEPS=8, num_warps=2)        # STEPS: tokens that are read at once
BACKWARD = dict(STEPS=4, num_warps=2)
ADD_UP = dict(BLOCK_E=32, BLOCK_PARTS=64, num_warps=4)

# Sizes are multiples of ALIGN, by which their arguments are divided: so the compiler knows that rows are
# read in whole vectors, whatever the width of a model. It needs no kernels of other lengths.
SIZES = 'T', 'E', 'SPAN', 'x_b', 'x_t', 'dy_b', 'dy_t', 'parts'


@triton.jit
def taps_of(weight_ptr, e, e_in, K: tl.constexpr):
    """The taps (K of (BLOCK_E)) of weight (E, 1, K)."""
    k = tl.arange(0, 2 if K <= 2 else 4)
    weight = tl.load(weight_ptr + e[:, None] * K + k[None, :], mask=e_in[:, None] & (k < K)[None, :], other=0.0)
    taps = ()
    for i in tl.static_range(K):
        taps += (tl.sum(tl.where(k[None, :] == i, weight.to(tl.float32), 0.0), 1),)
    return taps


@triton.jit
def inputs_before(x_ptr, state_ptr, start, x_t, E, e, e_in, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """The K-1 inputs before x_ptr, which is at token `start`; before token 0 those of the state."""
    window = ()
    for i in tl.static_range(K - 1):
        within = start > 0                                      # a span is longer than that
        x = tl.load(x_ptr - (K - 1 - i) * x_t + e, mask=e_in & within, other=0.0).to(tl.float32)
        if HAS_STATE:
            x += tl.load(state_ptr + i * E + e, mask=e_in & (start == 0), other=0.0).to(tl.float32)
        window += (x,)
    return window


@triton.jit
def weighted(bias, taps, window, K: tl.constexpr):
    """bias + sum_k taps_k window_k."""
    total = bias
    for k in tl.static_range(K):
        total += taps[k] * window[k]
    return total


@triton.jit
def slope(pre, dy):
    """dy silu'(pre)."""
    s = tl.sigmoid(pre)
    return dy * s * (1 + pre * (1 - s))


@triton.jit(do_not_specialize=SIZES)
def conv_forward_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, T, E, SPAN, x_b: tl.int64, x_t,
                   K: tl.constexpr, ALIGN: tl.constexpr, HAS_STATE: tl.constexpr,
                   BLOCK_E: tl.constexpr, STEPS: tl.constexpr):
    E = E * ALIGN
    x_t = x_t * ALIGN
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    start = tl.program_id(1) * SPAN
    b = tl.program_id(2).to(tl.int64)
    e_in = e < E
    taps = taps_of(weight_ptr, e, e_in, K)
    bias = tl.load(bias_ptr + e, mask=e_in, other=0.0).to(tl.float32)
    x_ptr += b * (x_b * ALIGN) + start.to(tl.int64) * x_t
    y_ptr += (b * T + start) * E
    state_ptr += b * (K - 1) * E
    window = inputs_before(x_ptr, state_ptr, start, x_t, E, e, e_in, K, HAS_STATE)
    for first in range(0, tl.minimum(SPAN, T - start), STEPS):
        xs = ()
        for i in tl.static_range(STEPS):
            within = e_in & (start + first + i < T)
            xs += (tl.load(x_ptr + (first + i) * x_t + e, mask=within, other=0.0),)
        for i in tl.static_range(STEPS):
            inputs = window + (xs[i].to(tl.float32),)           # K of them
            pre = weighted(bias, taps, inputs, K)
            y = pre * tl.sigmoid(pre)
            within = e_in & (start + first + i < T)
            tl.store(y_ptr + (first + i) * E + e, y.to(y_ptr.dtype.element_ty), mask=within)
            window = inputs[1:]


@triton.jit(do_not_specialize=SIZES)
def conv_backward_kernel(x_ptr, weight_ptr, bias_ptr, state_ptr, dy_ptr, dx_ptr, parts_ptr, dstate_ptr, T, E, SPAN,
                    x_b: tl.int64, x_t, dy_b: tl.int64, dy_t,
                    K: tl.constexpr, ALIGN: tl.constexpr, HAS_STATE: tl.constexpr,
                    BLOCK_E: tl.constexpr, STEPS: tl.constexpr):
    """The d of a span and of the K-1 tokens after it. The sums are of those whose d is the last of
    a dx, and at the beginning of all."""
    E = E * ALIGN
    x_t = x_t * ALIGN
    dy_t = dy_t * ALIGN
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    start = tl.program_id(1) * SPAN
    b = tl.program_id(2).to(tl.int64)
    e_in = e < E
    taps = taps_of(weight_ptr, e, e_in, K)
    bias = tl.load(bias_ptr + e, mask=e_in, other=0.0).to(tl.float32)
    x_ptr += b * (x_b * ALIGN) + start.to(tl.int64) * x_t
    dy_ptr += b * (dy_b * ALIGN) + start.to(tl.int64) * dy_t
    dx_ptr += (b * T + start) * E
    state_ptr += b * (K - 1) * E
    dstate_ptr += b * (K - 1) * E
    window = inputs_before(x_ptr, state_ptr, start, x_t, E, e, e_in, K, HAS_STATE)
    ds = ()
    sums = ()                                                   # of dw_0, …, db
    nothing = tl.zeros([BLOCK_E], tl.float32)
    for _ in tl.static_range(K - 1):
        ds += (nothing,)
    for _ in tl.static_range(K + 1):
        sums += (nothing,)
    for i in tl.static_range(K - 1):                            # the first tokens, whose dx are of the span before
        within = e_in & (start + i < T)
        x = tl.load(x_ptr + i * x_t + e, mask=within, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + i * dy_t + e, mask=within, other=0.0).to(tl.float32)
        inputs = window + (x,)
        d = slope(weighted(bias, taps, inputs, K), dy)
        grads = ds + (d,)
        if HAS_STATE:
            dx = weighted(nothing, taps, grads[::-1], K)
            tl.store(dstate_ptr + i * E + e, dx.to(dstate_ptr.dtype.element_ty), mask=e_in & (start == 0))
        sums = added(sums, tl.where(start == 0, d, 0.0), inputs, K)
        window = inputs[1:]
        ds = grads[1:]
    for first in range(0, tl.minimum(SPAN, T - start), STEPS):
        xs = ()
        dys = ()
        for i in tl.static_range(STEPS):
            within = e_in & (start + first + i + K - 1 < T)
            xs += (tl.load(x_ptr + (first + i + K - 1) * x_t + e, mask=within, other=0.0),)
            dys += (tl.load(dy_ptr + (first + i + K - 1) * dy_t + e, mask=within, other=0.0),)
        for i in tl.static_range(STEPS):
            inputs = window + (xs[i].to(tl.float32),)
            d = slope(weighted(bias, taps, inputs, K), dys[i].to(tl.float32))
            grads = ds + (d,)
            dx = weighted(nothing, taps, grads[::-1], K)
            within = e_in & (start + first + i < T)
            tl.store(dx_ptr + (first + i) * E + e, dx.to(dx_ptr.dtype.element_ty), mask=within)
            sums = added(sums, d, inputs, K)
            window = inputs[1:]
            ds = grads[1:]
    part = b * tl.num_programs(1) + tl.program_id(1)
    parts_ptr += part * (K + 1) * E                             # (B spans, K+1, E)
    for k in tl.static_range(K + 1):
        tl.store(parts_ptr + k * E + e, sums[k], mask=e_in)


@triton.jit
def added(sums, d, inputs, K: tl.constexpr):
    """The sums of dw_k and db with those of one token."""
    result = ()
    for k in tl.static_range(K):
        result += (sums[k] + d * inputs[k],)
    return result + (sums[K] + d,)


@triton.jit(do_not_specialize=SIZES)
def conv_add_up_kernel(parts_ptr, dweight_ptr, dbias_ptr, parts, E, K: tl.constexpr,
                  BLOCK_E: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """parts (parts, K+1, E) → dweight (E, 1, K), dbias (E); a program takes one of K+1."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    k = tl.program_id(1)
    part = tl.arange(0, BLOCK_PARTS)
    e_in = e < E
    total = tl.zeros([BLOCK_PARTS, BLOCK_E], tl.float32)
    parts_ptr += k * E
    for first in range(0, parts, BLOCK_PARTS):
        at = (first + part).to(tl.int64) * ((K + 1) * E)
        within = (first + part < parts)[:, None] & e_in[None, :]
        total += tl.load(parts_ptr + at[:, None] + e[None, :], mask=within, other=0.0)
    grad = tl.sum(total, 0)
    tl.store(dweight_ptr + e * K + k, grad.to(dweight_ptr.dtype.element_ty), mask=e_in & (k < K))
    tl.store(dbias_ptr + e, grad.to(dbias_ptr.dtype.element_ty), mask=e_in & (k == K))


def span_of(batch, T, E):
    """Tokens a program."""
    span = SPAN
    while span > SHORTEST and batch * triton.cdiv(T, span) * triton.cdiv(E, BLOCK_E) < PROGRAMS:
        span //= 2
    return span


def divided(align, *sizes):
    """Sizes as kernels take them: see SIZES."""
    return [size // align for size in sizes]


# As operations of PyTorch: see triton_scan.py.

@torch.library.custom_op('mambino::triton_conv', mutates_args=())
def conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None) -> Tensor:
    """causal_conv1d's y (B, T, E), of x's precision, without gaps."""
    batch, T, E = x.shape
    K = weight.shape[-1]
    x = rows(x)
    state = None if state is None else state.contiguous()
    y = x.new_empty(x.shape)
    span = span_of(batch, T, E)
    align = math.gcd(8, E, *x.stride()[:2])
    with on_card(x):
        conv_forward_kernel[triton.cdiv(E, BLOCK_E), triton.cdiv(T, span), batch](
            x, weight.contiguous(), bias.contiguous(), x if state is None else state, y, T, E // align, span,
            *divided(align, *x.stride()[:2]), K=K, ALIGN=align, HAS_STATE=state is not None, BLOCK_E=BLOCK_E, **FORWARD)
    return y


@conv.register_fake
def _(x, weight, bias, state):
    return x.new_empty(x.shape)


@torch.library.custom_op('mambino::triton_conv_backward', mutates_args=())
def conv_backward(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None,
                  dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of conv's arguments in their precisions; that of no state is empty."""
    batch, T, E = x.shape
    K = weight.shape[-1]
    x, dy = rows(x), rows(dy)
    state = None if state is None else state.contiguous()
    dx, dweight, dbias = (u.new_empty(u.shape) for u in (x, weight, bias))
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    span = span_of(batch, T, E)
    spans = triton.cdiv(T, span)
    parts = x.new_empty(batch * spans, K + 1, E, dtype=torch.float32)
    strides = *x.stride()[:2], *dy.stride()[:2]
    align = math.gcd(8, E, *strides)
    with on_card(x):
        conv_backward_kernel[triton.cdiv(E, BLOCK_E), spans, batch](
            x, weight.contiguous(), bias.contiguous(), x if state is None else state, dy, dx, parts, dstate,
            T, E // align, span, *divided(align, *strides), K=K, ALIGN=align, HAS_STATE=state is not None,
            BLOCK_E=BLOCK_E, **BACKWARD)
        conv_add_up_kernel[triton.cdiv(E, ADD_UP['BLOCK_E']), K + 1](
            parts, dweight, dbias, len(parts), E, K=K, **ADD_UP)
    return dx, dweight, dbias, dstate


@conv_backward.register_fake
def _(x, weight, bias, state, dy):
    dstate = x.new_empty(0) if state is None else state.new_empty(state.shape)
    return *(u.new_empty(u.shape) for u in (x, weight, bias)), dstate


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate(ctx, dy):
    *tensors, state = ctx.saved_tensors                         # read once, as a checkpoint wants it
    *grads, dstate = conv_backward(*tensors, state, dy)
    return *grads, None if state is None else dstate


conv.register_autograd(differentiate, setup_context=keep)
