"""The recurrences of Mamba-1, -2, -3 and Gated DeltaNet for a graph, in the part of Python that TorchScript keeps: with
loops that stay loops, where those of the definitions would be unrolled. By torch.export they are one
operation or one chunk.

Letters of the shapes as in model_mamba.py and model_hybrid.py.
"""
import math

import torch
from torch import Tensor


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor):
    """See model_mamba.selective_scan."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return exported_scan(x, dt, A, B, C, state)
    A = A.t().contiguous()                                                      # (N, E)
    h = state
    ys: list[Tensor] = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, None] * A) * h + B[:, t, :, None] * (dt[:, t] * x[:, t])[:, None]
        ys.append((C[:, t, None] @ h)[:, 0])
    return torch.stack(ys, 1), h


def exported_scan(x, dt, A, B, C, state):
    """The same for torch.export, which would unroll the loop."""
    A = A.t().contiguous()

    def step(h, inputs):
        dt_x, dt, B, C = inputs                                                 # (B, E) or (B, N)
        h = torch.exp(dt[:, None] * A) * h + B[:, :, None] * dt_x[:, None]
        return h, (C[:, None] @ h)[:, 0]
    inputs = tuple(u.transpose(0, 1) for u in (dt * x, dt, B, C))               # time first
    h, y = torch._higher_order_ops.scan(step, state.contiguous(), inputs)
    return y.transpose(0, 1), h


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, state: Tensor):
    """See model_mamba.ssd. An exported graph has one chunk of all tokens: chunks of symbolic sizes
    make an export take three times as long."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return ssd_chunk(x, dt, A, B, C, state)
    ys: list[Tensor] = []
    for i in range(0, x.shape[1], chunk_size):
        end = i + chunk_size
        y, state = ssd_chunk(x[:, i:end], dt[:, i:end], A, B[:, i:end], C[:, i:end], state)
        ys.append(y)
    return torch.cat(ys, 1), state


def ssd_chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor):
    """One chunk of all Q tokens: x (B, Q, H, P), dt (B, Q, H), A (H), B, C (B, Q, G, N),
    h (B, H, P, N) → y (B, Q, H, P), h."""
    Q = x.shape[1]
    G = B.shape[2]
    R = A.shape[0] // G                                                         # heads a group
    sums = (dt.double() * A.double()).cumsum(1).transpose(1, 2)                 # (B, H, Q), see segsum
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).float()                   # (B, H, Q, Q)
    decay = decay.masked_fill(hidden, -float('inf')).exp().unflatten(1, (G, R))
    from_start = sums.float().exp().unflatten(1, (G, R))[..., None]             # (B, G, R, Q, 1)
    to_end = (sums[..., -1:] - sums).float().exp().unflatten(1, (G, R))[..., None]
    over_chunk = sums[..., -1].float().exp()[..., None, None]                   # (B, H, 1, 1)

    B = B.transpose(1, 2)[:, :, None]                                           # (B, G, 1, Q, N)
    C = C.transpose(1, 2)[:, :, None]
    dt_x = (x * dt[..., None]).transpose(1, 2).unflatten(1, (G, R))             # (B, G, R, Q, P)
    y = (C @ B.transpose(3, 4) * decay) @ dt_x                                  # within the chunk
    y = y + C @ h.unflatten(1, (G, R)).transpose(3, 4) * from_start             # from before it
    added = (dt_x * to_end).transpose(3, 4) @ B                                 # (B, G, R, P, N)
    return y.flatten(1, 2).transpose(1, 2), h * over_chunk + added.flatten(1, 2)


def mamba3_scan(x: Tensor, B: Tensor, C: Tensor, dt: Tensor, log_decay: Tensor, trap: Tensor,
                rate: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, mimo_x: Tensor | None,
                interleaved: bool, chunk_size: int, state: list[Tensor]):
    """See model_mamba.mamba3_scan; of chunks as ssd here. What the next token will add of one is in
    the weight by which all later ones see it."""
    now = trap * dt                                                             # (B, T, H)
    before = (1 - trap) * dt
    weight = now + torch.cat((before, torch.zeros_like(before[:, :1])), 1)[:, 1:]
    h, turn, last_b, last = state
    last_x = x[:, -1].float()
    x = x.float()[:, :, None]                                                   # (B, T, 1, H, P)
    last = last[:, None]                                                        # (B, 1, H, P)
    if mimo_x is not None:
        x = x * mimo_x.transpose(0, 1)                                          # (B, T, R, H, P)
        last = last * mimo_x.transpose(0, 1)
    added = last.permute(0, 2, 3, 1) @ last_b.transpose(1, 2)                   # (B, H, P, N)
    h = h + before[:, 0, :, None, None] * added
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            y, h, turn, last_b = mamba3_chunk(
                x, B, C, dt, log_decay, now, weight, rate, B_bias, C_bias, interleaved, h, turn)
            return y + D[:, None] * x, (h, turn, last_b, last_x)
    ys: list[Tensor] = []
    for i in range(0, x.shape[1], chunk_size):
        end = i + chunk_size
        y, h, turn, last_b = mamba3_chunk(
            x[:, i:end], B[:, i:end], C[:, i:end], dt[:, i:end], log_decay[:, i:end],
            now[:, i:end], weight[:, i:end], rate[:, i:end], B_bias, C_bias, interleaved, h, turn)
        ys.append(y)
    return torch.cat(ys, 1) + D[:, None] * x, (h, turn, last_b, last_x)


def mamba3_chunk(x: Tensor, B: Tensor, C: Tensor, dt: Tensor, log_decay: Tensor, now: Tensor,
                 weight: Tensor, rate: Tensor, B_bias: Tensor, C_bias: Tensor, interleaved: bool,
                 h: Tensor, turn: Tensor):
    """One chunk of all Q tokens: x (B, Q, R, H, P), B, C (B, Q, R, G, N), rate (B, Q, A), the others
    (B, Q, H), h (B, H, P, N), turn (B, H, A) → y (B, Q, R, H, P) without D x, h, turn, B of the last."""
    Q, R, H = x.shape[1:4]
    turns = (rate[:, :, None].double() * dt[..., None]).cumsum(1) + turn[:, None]
    turns = turns - math.tau * torch.floor(turns / math.tau)                    # (B, Q, H, A)
    B = turned(B, B_bias, turns, interleaved)                                   # (B, Q, R, H, N)
    C = turned(C, C_bias, turns, interleaved)
    last_b = B[:, -1]
    x, B, C = (u.permute(0, 3, 1, 2, 4).flatten(2, 3) for u in (x, B, C))       # (B, H, QR, …)

    sums = log_decay.double().cumsum(1).transpose(1, 2)                         # (B, H, Q)
    own = torch.eye(Q, device=x.device)
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu()         # its own too
    decay = (sums[..., :, None] - sums[..., None, :]).float()                   # (B, H, Q, Q)
    decay = decay.masked_fill(hidden, -float('inf')).exp() * weight.transpose(1, 2)[:, :, None]
    decay = decay + own * now.transpose(1, 2)[:, :, None]
    scores = (C @ B.transpose(2, 3)).unflatten(3, (Q, R)).unflatten(2, (Q, R))  # (B, H, Q, R, Q, R)
    scores = (scores * decay[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)
    from_start = sums.float().exp()[..., None, None]                            # (B, H, Q, 1, 1)
    y = scores @ x + ((C @ h.transpose(2, 3)).unflatten(2, (Q, R)) * from_start).flatten(2, 3)
    to_end = (sums[..., -1:] - sums).float().exp() * weight.transpose(1, 2)     # (B, H, Q)
    left = (x.unflatten(2, (Q, R)) * to_end[..., None, None]).flatten(2, 3)     # (B, H, QR, P)
    h = h * sums[..., -1].float().exp()[..., None, None] + left.transpose(2, 3) @ B
    return y.unflatten(2, (Q, R)).permute(0, 2, 3, 1, 4), h, turns[:, -1], last_b


def turned(u: Tensor, bias: Tensor, turns: Tensor, interleaved: bool):
    """B or C (B, Q, R, G, N) with its bias (H, R, N), turned by turns (B, Q, H, A) → (B, Q, R, H, N)."""
    H, R, N = bias.shape
    G, A = u.shape[3], turns.shape[3]
    u = u.float()[:, :, :, :, None] + bias.unflatten(0, (G, H // G)).permute(2, 0, 1, 3)
    shape = [N // 2, 2] if interleaved else [2, N // 2]
    pair = -1 if interleaved else -2
    u = u.flatten(3, 4).unflatten(-1, shape)                                    # (B, Q, R, H, …)
    first, second = u.select(pair, 0), u.select(pair, 1)                        # (B, Q, R, H, N/2)
    cos = turns.float().cos()[:, :, None]
    sin = turns.float().sin()[:, :, None]
    a, b = first[..., :A], second[..., :A]
    first = torch.cat((a * cos - b * sin, first[..., A:]), -1)
    second = torch.cat((a * sin + b * cos, second[..., A:]), -1)
    return torch.stack((first, second), pair).flatten(-2)


def delta_scan(qkv: Tensor, log_decay: Tensor, beta: Tensor, groups: int, head_dim: int, chunk_size: int,
               state: Tensor):
    """See model_hybrid.delta_scan; token by token, since not every format that keeps a graph solves triangular
    systems."""
    H = beta.shape[-1]
    GN = (qkv.shape[-1] - H * head_dim) // 2
    q, k, v = qkv.float().split([GN, GN, H * head_dim], dim=-1)
    q = per_head(q, groups, H) * (GN // groups) ** -0.5                         # (B, T, H, N)
    k = per_head(k, groups, H)
    v = v.unflatten(-1, [H, head_dim])                                          # (B, T, H, P)
    decay = log_decay.exp()[..., None, None]                                    # (B, T, H, 1, 1)
    beta = beta[..., None]
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return exported_delta_scan(q, k, v, decay, beta, state)
    S = state
    ys: list[Tensor] = []
    for t in range(v.shape[1]):
        S = decay[:, t] * S
        change = beta[:, t] * (v[:, t] - (S @ k[:, t, :, :, None])[..., 0])     # (B, H, P)
        S = S + change[..., None] * k[:, t, :, None]
        ys.append((S @ q[:, t, :, :, None])[..., 0])
    return torch.stack(ys, 1), S


def per_head(u: Tensor, groups: int, H: int):
    """(B, T, G N) → (B, T, H, N), of length 1."""
    u = u.unflatten(-1, [groups, u.shape[-1] // groups])
    u = u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6)
    return u.repeat_interleave(H // groups, 2)


def exported_delta_scan(q, k, v, decay, beta, state):
    """The same for torch.export, which would unroll the loop."""
    def step(S, inputs):
        q, k, v, decay, beta = inputs                                           # (B, H, N) or (B, H, P), …
        S = decay * S
        change = beta * (v - (S @ k[..., None])[..., 0])
        S = S + change[..., None] * k[:, :, None]
        return S, (S @ q[..., None])[..., 0]
    inputs = tuple(u.transpose(0, 1) for u in (q, k, v, decay, beta))           # time first
    S, y = torch._higher_order_ops.scan(step, state.contiguous(), inputs)
    return y.transpose(0, 1), S
