"""The gated delta rule in PyTorch that runs on any machine, by chunks (Yang et al. 2025, section 3.3): inside
one, what all its tokens write is the solution of a triangular system.

Letters of the shapes: B batch, T time, H heads, G groups, P head size, N state size, Q chunk, c chunks.
"""
import math

import torch
import torch.nn.functional as F

from mambino.kernels.cpu import device_kind, exact_dtype
from mambino.kernels.registry import kernel

EPS = 1e-6


@kernel
def delta_scan(qkv, log_decay, beta, groups, head_dim, chunk_size=64, state=None):
    batch, T, H = beta.shape
    P = head_dim
    GN = (qkv.shape[-1] - H * P) // 2
    Q = min(chunk_size, 1 << (T - 1).bit_length())
    pad = -T % Q                                                # β = 0 and no decay leave the state as it is
    qkv, log_decay, beta = (F.pad(u, (0, 0, 0, pad)) for u in (qkv, log_decay, beta))
    q, k, v = qkv.split((GN, GN, H * P), dim=-1)
    q, k = (u.view(batch, -1, Q, groups, GN // groups).transpose(2, 3).float() for u in (q, k))     # (B, c, G, Q, N)
    q, k = (u * torch.rsqrt(u.square().sum(-1, keepdim=True) + EPS) for u in (q, k))
    q = q * q.shape[-1] ** -0.5
    with torch.autocast(qkv.device.type, enabled=False):        # the system's solution makes its rounding larger
        gram = (k @ k.mT).repeat_interleave(H // groups, 2)     # (B, c, H, Q, Q)
    inside = (q @ k.mT).repeat_interleave(H // groups, 2)
    q, k = (u.repeat_interleave(H // groups, 2) for u in (q, k))    # (B, c, H, Q, N)
    v = v.view(batch, -1, Q, H, P).transpose(2, 3).float()      # (B, c, H, Q, P)
    log_decay, beta = (u.view(batch, -1, Q, H).transpose(2, 3) for u in (log_decay, beta))     # (B, c, H, Q)

    # of large sums fp32 would lose the small differences
    sums = log_decay.to(exact_dtype(device_kind(v))).cumsum(-1)
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=v.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).float().masked_fill(hidden, -math.inf).exp()     # (B, c, H, Q, Q)
    from_start, to_end = sums.float().exp(), (sums[..., -1:] - sums).float().exp()
    system = gram * decay * beta[..., None]                     # its diagonal counts as 1
    wanted = torch.cat((v, k * from_start[..., None]), -1) * beta[..., None]
    with torch.autocast(v.device.type, enabled=False):
        solved = torch.linalg.solve_triangular(system.float(), wanted.float(), upper=False, unitriangular=True)
    values, keys = solved.split((P, k.shape[-1]), -1)           # written, less what the state answers to keys
    inside = inside * decay
    q, k = q * from_start[..., None], k * to_end[..., None]
    S = v.new_zeros(batch, H, P, k.shape[-1]) if state is None else state.float()
    ys = []
    for values_i, keys_i, q_i, k_i, inside_i, sums_i in zip(*(u.unbind(1) for u in (values, keys, q, k, inside, sums))):
        written = values_i - keys_i @ S.mT                      # (B, H, Q, P)
        ys.append(q_i @ S.mT + inside_i @ written)
        S = (sums_i[..., -1, None, None].float().exp() * S + written.mT @ k_i).float()
    return torch.stack(ys, 1).transpose(2, 3).reshape(batch, T + pad, H, P)[:, :T], S
