"""One token of each row, in generation on what is no CPU: each operation in few kernels.

    project                 matrices that lie behind one another as one
    norms, rope, swiglu, mix    one kernel of our own each (triton_token.py), else PyTorch's fused ones
    attention               heads that share keys are queries side by side: keys are not repeated
    causal_conv1d, scans    the recurrence's single step, without chunks: one kernel of our own, else several;
                            of Mamba-3, some twenty of PyTorch's
    experts_swiglu          products with all experts, or with copies of those that are wanted: no number
                            of the data decides a shape, so the host waits for nothing

A kernel here takes no gradients, and writes the new state of a recurrence into the memory of the old one,
as a step may (language_model.py). So a CUDA graph of a token (sample/graphs.py) copies no states. A
CPU has its own, cpu.py and cpu_mamba.py.

Letters of the shapes: B batch, E inner width or experts, D model width, I inner width of an expert, H
heads, G groups or key heads, R heads a group, P head size, N state size, S cache slots, K taps.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.kernels.checked import works
from mambino.kernels.registry import DEFINITIONS, kernel
from mambino.kernels.triton_kernels import has_triton

MANY = 64               # tokens from which on experts are computed as in training
WIDEST = 16384          # channels that one program normalises
PLAIN = torch.Tensor, torch.nn.Parameter
# by which a kernel of our own may differ, of the largest value
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.04}


def applies(x):
    """Whether x (B, T, …) is one token a row of a generation on a GPU."""
    return x.device.type != 'cpu' and x.shape[1] == 1 and not torch.is_grad_enabled() \
        and not torch.compiler.is_compiling()


def exactly(x):
    """The context in which products are computed in their own precision."""
    return torch.autocast(x.device.type, enabled=False)


def outcome(compute, inputs):
    """What compute makes of copies of its inputs, and what it makes of them: tensors."""
    copies = [u.clone() if isinstance(u, torch.Tensor) else u for u in inputs]
    y = compute(*copies)
    return [y, *(u for u in copies if isinstance(u, torch.Tensor) and u.is_floating_point() and u.numel())]


def ours(name, plain, fast, *inputs, state=None):
    """fast(*inputs), a kernel of our own, where it works in these sizes and gives what plain gives, tried
    once on these very inputs; else plain(*inputs). The first input is x; rows lie without gaps. state: of a
    recurrence, which is the last input, too: a row of it is without gaps."""
    if state is not None:
        inputs = *inputs, state
        if not state[0].is_contiguous():
            return plain(*inputs)
    x = inputs[0]
    tensors = [u for u in inputs if isinstance(u, torch.Tensor)]
    if not x.is_cuda or type(x) not in PLAIN or not has_triton() or any(u.stride(-1) != 1 for u in tensors):
        return plain(*inputs)

    def attempt():
        for expected, computed in zip(outcome(plain, inputs), outcome(fast, inputs)):
            error = (computed.float() - expected.float()).abs().max()
            if not error <= TOLERANCE[x.dtype] * expected.float().abs().max():      # also where it is NaN
                raise ValueError(f'differs from plain PyTorch by {float(error):.1e}')
    sizes = tuple((u.dtype, u.shape[1:]) if isinstance(u, torch.Tensor) else u for u in inputs)
    try:
        compute = fast if works(f'our Triton kernel of {name} of one token', sizes, attempt) else plain
    except torch.OutOfMemoryError:      # there is no room for copies now
        compute = plain
    return compute(*inputs)


def triton_token():
    """The module, which needs Triton to be imported."""
    from mambino.kernels import triton_token
    return triton_token


# --- norms, MLP -----------------------------------------------------------------------------------

@kernel
def rms_norm(x, weight, eps, dtype=None):
    dtype = dtype or x.dtype
    if not applies(x) or x.shape[-1] > WIDEST or not x.is_contiguous():
        return NotImplemented

    def plain(x, weight):
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)

    def fast(x, weight):
        return triton_token().norm(x.view(-1, x.shape[-1]), None, weight, eps, 1, dtype).view(x.shape)
    return ours(f'RMSNorm to {dtype}', plain, fast, x, weight)


@kernel
def gated_rms_norm(y, z, weight, eps, groups, dtype=None):
    dtype = dtype or torch.float32
    if not applies(y) or y.shape[-1] > WIDEST:
        return NotImplemented

    def plain(y, z, weight):
        y = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))     # (B, 1, G, E/G)
        return (F.rms_norm(y, y.shape[-1:], None, eps).flatten(-2) * weight).to(dtype)

    def fast(y, z, weight):
        return triton_token().norm(y[:, 0], z[:, 0], weight, eps, groups, dtype)[:, None]
    return ours(f'gated RMSNorm to {dtype}', plain, fast, y, z, weight)


@kernel
def swiglu(gate, up):
    if gate.ndim != 3 or not applies(gate) or gate.dtype != up.dtype:
        return NotImplemented
    return ours('SwiGLU', lambda gate, up: F.silu(gate) * up,
                lambda gate, up: triton_token().swiglu(gate[:, 0], up[:, 0])[:, None], gate, up)


@kernel
def mix(h, outputs, norms, controller):
    if not applies(h) or norms is None or controller is None or controller._forward_hooks or len(outputs) > 3:
        return NotImplemented
    n, D = len(outputs), h.shape[-1]
    if D > WIDEST or not all(u.is_contiguous() for u in (h, *outputs)):
        return NotImplemented

    def plain(h, *tensors):
        return DEFINITIONS['mix'](h, tensors[:n], norms, controller)

    def fast(h, *tensors):
        outputs, weights, (matrix, bias) = tensors[:n], tensors[n:2 * n], tensors[2 * n:]
        rows = [y.view(-1, D) for y in outputs]
        return triton_token().mix(h.view(-1, D), matrix, bias, rows, weights, norms[0].eps).view(h.shape)
    weights = [norm.weight for norm in norms]
    return ours("a hybrid's branches", plain, fast, h, *outputs, *weights, controller.weight, controller.bias)


def joined(projections):
    """The matrices of Linears as one, if they lie behind one another (weights/dense.py) and nothing hangs on
    them; else None."""
    first = rows = 0
    for projection in projections:
        if not isinstance(projection, nn.Linear) or projection.bias is not None \
                or projection._forward_hooks or projection._forward_pre_hooks:
            return None
        weight = projection.weight
        if not rows:
            first, begin, (_, D) = weight, weight.data_ptr(), weight.shape
        place = begin + rows * D * first.element_size()
        if weight.dtype != first.dtype or weight.shape[1] != D or weight.data_ptr() != place:
            return None
        rows += len(weight)
    try:
        return first.as_strided((rows, D), (D, 1))
    except RuntimeError:                # they do so by chance: the memory of each ends with it
        return None


@kernel
def project(x, *projections):
    if not applies(x):
        return NotImplemented
    weight = joined(projections)
    if weight is None or (weight.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)):
        return NotImplemented
    y = F.linear(x.to(weight.dtype), weight)
    return y.split([len(projection.weight) for projection in projections], -1)


# --- attention ------------------------------------------------------------------------------------

@kernel
def apply_rope(x, rope):
    cos, sin = rope                                             # (B, 1, 1, P/2)
    if x.ndim != 4 or not applies(x) or cos.shape[0] != x.shape[0]:
        return NotImplemented

    def plain(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def fast(x, cos, sin):
        return triton_token().rope(x[:, 0], cos, sin)[:, None]
    return ours('RoPE', plain, fast, x, cos, sin)


def added_to_scores(mask, dtype):
    """0 where a key is seen, -inf where it is not; made by the first layer for all. mask as attention's."""
    bias = getattr(mask, 'bias', None)
    if bias is None or bias.dtype != dtype:
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float('-inf'))
        mask.bias = bias
    return bias


@kernel
def attention(q, k, v, window=0, dropout=0.0, mask=None):
    if mask is None or not applies(q):
        return NotImplemented
    B, _, H, P = q.shape
    q = q.reshape(B, k.shape[2], -1, P)                         # (B, G, R, P)
    k, v = (u.transpose(1, 2) for u in (k, v))                  # (B, G, S, P)

    def plain(q, k, v, *_):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added_to_scores(mask, q.dtype))
    last = getattr(mask, 'last', None)                          # of a cache.DeviceKVStep
    is_whole = k.stride()[2:] == v.stride()[2:] == (P, 1)
    if last is None or not is_whole or not q.dtype == k.dtype == v.dtype or q.shape[2] > 16:
        y = plain(q, k, v)
    else:
        y = ours('attention', plain, lambda *inputs: triton_token().attention(*inputs), q, k, v, last)
    return y.reshape(B, 1, H * P)


# --- a Mamba's recurrences ------------------------------------------------------------------------

@kernel
def causal_conv1d(x, weight, bias, state=None):
    if state is None or not applies(x) or not weight.is_contiguous():
        return NotImplemented

    def plain(x, weight, bias, state):
        inputs = torch.cat((state.to(x.dtype), x), 1)           # (B, K, E)
        y = (inputs * weight[:, 0].t()).sum(1, keepdim=True) + bias     # in fp32, as weight is
        state.copy_(inputs[:, 1:])
        return F.silu(y).to(x.dtype)

    def fast(x, weight, bias, state):
        return triton_token().conv(x[:, 0], weight, bias, state)[:, None]
    return ours('a convolution', plain, fast, x, weight, bias, state=state), state


@kernel
def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    if state is None or not applies(x) or state.dtype != torch.float32:
        return NotImplemented

    def plain(x, dt, dt_bias, A, B, C, D, z, state):
        dt = F.softplus(dt.float() + dt_bias)                   # (B, 1, E)
        state.mul_(torch.exp(dt * A.t()))                       # (B, N, E)
        state.addcmul_(B.mT.float(), dt * x)
        with exactly(x):
            y = C.float() @ state                               # (B, 1, E)
        return torch.addcmul(y, x, D) * F.silu(z)

    def fast(x, dt, dt_bias, A, B, C, D, z, state):
        token = (u[:, 0] for u in (x, dt, B, C, z))
        x, dt, B, C, z = token
        return triton_token().mamba1(x, dt, dt_bias, A, B, C, D, z, state)[:, None]
    return ours("Mamba-1's scan", plain, fast, x, dt, dt_bias, A.contiguous(), B, C, D, z, state=state), state


@kernel
def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    if state is None or not applies(xBC) or state.dtype != torch.float32:
        return NotImplemented
    H, G, P = dt.shape[-1], groups, head_dim
    N = state.shape[-1]

    def plain(xBC, dt, dt_bias, A, D, state):
        x, B, C = xBC[:, 0].split((H * P, G * N, G * N), dim=-1)
        x = x.unflatten(-1, (H, P))                             # (B, H, P)
        dt = F.softplus(dt[:, 0].float() + dt_bias)             # (B, H)
        dtx = dt[..., None] * x                                 # (B, H, P)
        h = state.unflatten(1, (G, H // G))                     # (B, G, R, P, N)
        h.mul_(torch.exp(dt * A).view(-1, G, H // G, 1, 1))
        h.addcmul_(dtx.view(-1, G, H // G, P, 1), B.reshape(-1, G, 1, 1, N).float())
        with exactly(x):
            y = h.flatten(2, 3) @ C.reshape(-1, G, N, 1).float()    # (B, G, R P, 1)
        return torch.addcmul(y.view(-1, H, P), x, D[:, None])[:, None]

    def fast(xBC, dt, dt_bias, A, D, state):
        return triton_token().mamba2(xBC[:, 0], dt[:, 0], dt_bias, A, D, state, G)[:, None]
    return ours("Mamba-2's scan", plain, fast, xBC, dt, dt_bias, A, D, state=state), state


@kernel
def mamba3_scan(x, B, C, dt, log_decay, trap, rate, B_bias, C_bias, D, mimo_x=None, interleaved=True, chunk_size=64,
                state=None):
    if not applies(x) or state is None or any(u is None for u in state) or state[0].dtype != torch.float32:
        return NotImplemented
    if mimo_x is None and B.shape[2] > 1:
        return NotImplemented
    h, turn, last_b, last_x = state
    G, A = B.shape[3], rate.shape[-1]
    now = trap * dt                                             # (B, 1, H)
    decay = log_decay.exp()
    before = (dt - now) * decay
    turn.addcmul_(rate, dt.mT).remainder_(math.tau)             # (B, H, A); in its own precision, fp64
    angles = turn.float()[:, None]
    cos, sin = angles.cos(), angles.sin()                       # (B, 1, H, A)

    # B and C at once: with their biases, and turned
    biases = torch.stack((B_bias, C_bias)).transpose(1, 2).unflatten(2, (G, -1))    # (2, R, G, H/G, N)
    both = torch.stack((B[:, 0], C[:, 0]))[:, :, :, :, None] + biases[:, None]
    both = both.flatten(3, 4)                                   # (2, B, R, H, N)
    pairs = both.unflatten(-1, (-1, 2)) if interleaved else both.unflatten(-1, (2, -1)).mT
    first, second = pairs[..., :A, :].unbind(-1)                # (2, B, R, H, A), which lie in both
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    b, c = both                                                 # (B, R, H, N)

    # the last token's input and this one's as one product of 2R columns
    inputs = torch.stack((last_x * before[:, 0, :, None], x[:, 0] * now[:, 0, :, None]), 1)[:, :, None]
    if mimo_x is not None:
        inputs = inputs * mimo_x.transpose(0, 1)                # (B, 2, R, H, P)
    columns = torch.stack((last_b, b), 1).flatten(1, 2)         # (B, 2R, H, N)
    with exactly(x):
        added = inputs.flatten(1, 2).permute(0, 2, 3, 1) @ columns.transpose(1, 2)  # (B, H, P, N)
        torch.addcmul(added, h, decay.mT[..., None], out=h)
        y = h @ c.permute(0, 2, 3, 1)                           # (B, H, P, R)
    last_b.copy_(b)
    last_x.copy_(x[:, 0])
    own = last_x[:, None] if mimo_x is None else last_x[:, None] * mimo_x.transpose(0, 1)   # (B, R, H, P)
    y = torch.addcmul(y.permute(0, 3, 1, 2), own, D[:, None])
    return y[:, None], state


# --- experts --------------------------------------------------------------------------------------

@kernel
def experts_swiglu(x, pairs, gate_up, down):
    n, k = len(x), len(pairs.token) // max(1, len(x))
    if x.device.type == 'cpu' or torch.is_grad_enabled() or not 0 < n <= MANY or pairs.capacity < n:
        return NotImplemented
    # a copy of an expert is read, written and read again: three times what a product reads
    if 3 * n * k < len(gate_up):
        rows = x.index_select(0, pairs.token)[:, None]          # (n k, 1, D)
        gate, up = (rows @ gate_up.index_select(0, pairs.expert).mT).chunk(2, -1)
        return (F.silu(gate) * up @ down.index_select(0, pairs.expert).mT)[:, 0]
    gate, up = (x @ gate_up.mT).chunk(2, -1)                    # (E, n, I) each
    return (F.silu(gate) * up @ down.mT)[pairs.expert, pairs.token]
