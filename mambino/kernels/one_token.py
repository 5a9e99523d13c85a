"""One token of each row, in generation on what is no CPU: each operation in few kernels.

    rms_norm's gated form   by PyTorch's fused norm
    attention               heads that share keys are queries side by side: keys are not repeated
    causal_conv1d, scans    the recurrence's single step, without chunks
    experts_swiglu          products with all experts, or with copies of those that are wanted: no number
                            of the data decides a shape, so the host waits for nothing

A kernel here takes no gradients, and writes the new state of a recurrence into the memory of the old one,
as a step may (language_model.py). So a CUDA graph of a token (sample/graphs.py) copies no states. A
CPU has its own, cpu.py and cpu_mamba.py.

Letters of the shapes: B batch, E inner width or experts, D model width, I inner width of an expert, H
heads, G groups or key heads, R heads a group, P head size, N state size, S cache slots, K taps.
"""
import torch
import torch.nn.functional as F

from mambino.kernels.registry import kernel

MANY = 64               # tokens from which on experts are computed as in training


def applies(x):
    """Whether x (B, T, …) is one token a row of a generation on a GPU."""
    return x.device.type != 'cpu' and x.shape[1] == 1 and not torch.is_grad_enabled() \
        and not torch.compiler.is_compiling()


def exactly(x):
    """The context in which products are computed in their own precision."""
    return torch.autocast(x.device.type, enabled=False)


# --- norms, attention -----------------------------------------------------------------------------

@kernel
def gated_rms_norm(y, z, weight, eps, groups, dtype=None):
    if not applies(y):
        return NotImplemented
    y = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))     # (B, 1, G, E/G)
    y = F.rms_norm(y, y.shape[-1:], None, eps).flatten(-2) * weight
    return y if dtype is None else y.to(dtype)


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
    G = k.shape[2]
    q = q.reshape(B, G, H // G, P)
    k, v = (u.transpose(1, 2) for u in (k, v))                  # (B, G, S, P)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=added_to_scores(mask, q.dtype))
    return y.reshape(B, 1, H * P)


# --- a Mamba's recurrences ------------------------------------------------------------------------

@kernel
def causal_conv1d(x, weight, bias, state=None):
    if state is None or not applies(x):
        return NotImplemented
    inputs = torch.cat((state.to(x.dtype), x), 1)               # (B, K, E)
    y = (inputs * weight[:, 0].t()).sum(1, keepdim=True) + bias  # in fp32, as weight is
    state.copy_(inputs[:, 1:])
    return F.silu(y).to(x.dtype), state


@kernel
def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    if state is None or not applies(x):
        return NotImplemented
    dt = F.softplus(dt.float() + dt_bias)                       # (B, 1, E)
    state.mul_(torch.exp(dt * A.t()))                           # (B, N, E)
    state.addcmul_(B.mT.float(), dt * x)
    with exactly(x):
        y = C.float() @ state                                   # (B, 1, E)
    return torch.addcmul(y, x, D) * F.silu(z), state


@kernel
def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    if state is None or not applies(xBC):
        return NotImplemented
    H, G, P = dt.shape[-1], groups, head_dim
    N = (xBC.shape[-1] - H * P) // (2 * G)
    x, B, C = xBC[:, 0].split((H * P, G * N, G * N), dim=-1)
    x = x.unflatten(-1, (H, P))                                 # (B, H, P)
    dt = F.softplus(dt[:, 0].float() + dt_bias)                 # (B, H)
    dtx = dt[..., None] * x                                     # (B, H, P)
    h = state.unflatten(1, (G, H // G))                         # (B, G, R, P, N)
    h.mul_(torch.exp(dt * A).view(-1, G, H // G, 1, 1))
    h.addcmul_(dtx.view(-1, G, H // G, P, 1), B.reshape(-1, G, 1, 1, N).float())
    with exactly(x):
        y = h.flatten(2, 3) @ C.reshape(-1, G, N, 1).float()    # (B, G, R P, 1)
    return torch.addcmul(y.view(-1, H, P), x, D[:, None])[:, None], state


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
