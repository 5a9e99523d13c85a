"""Gated DeltaNet (Yang et al. 2025) in Mambino's hybrid, for modeling_mambino.py beside it.

It is plain PyTorch, made to be read; parameters have Mambino's names and shapes.

B batch, T time, Q tokens of a chunk, D width, E inner width, H heads, P head size, G heads that share queries
and keys, N state size, K taps of the convolution."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .modeling_mamba3 import RMSNorm, exact


def unit(u):
    return u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(q, k, v, log_decay, beta, S, chunk_size):
    """S_t = α_t S_{t-1} + u_t k_t^T, y_t = S_t q_t, where u_t = β_t (v_t - α_t S_{t-1} k_t): by chunks, whose u
    solve a triangular system.

    q, k (B, T, H, N), v (B, T, H, P), log α and β (B, T, H), S (B, H, P, N) → y (B, T, H, P), S."""
    ys, inputs = [], (q, k, v, log_decay, beta)
    for chunk in zip(*(u.split(chunk_size, 1) for u in inputs)):
        q, k, v, log_decay, beta = (u.transpose(1, 2) for u in chunk)           # (B, H, Q, …)
        a = exact(log_decay).cumsum(2)                                          # (B, H, Q) of the decay so far
        later = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool, device=a.device).triu(1)
        decay = (a[..., :, None] - a[..., None, :]).masked_fill(later, -torch.inf).exp().float()    # (B, H, Q, Q)
        decayed, left = a.exp().float()[..., None], (a[..., -1:] - a).exp().float()[..., None]
        beta = beta[..., None]                                                  # (B, H, Q, 1)
        system = beta * decay * (k @ k.mT)                                      # its diagonal counts as ones
        u = torch.linalg.solve_triangular(
            system, beta * (v - decayed * (k @ S.mT)), upper=False, unitriangular=True)
        ys.append((decayed * (q @ S.mT) + decay * (q @ k.mT) @ u).transpose(1, 2))
        S = decayed[:, :, -1:] * S + (left * u).mT @ k
    return torch.cat(ys, 1), S


class GatedDeltaNet(nn.Module):
    def __init__(self, c, projection):
        super().__init__()
        D, E, P, G = c.n_embd, c.ssm_inner_size, c.ssm_head_dim, c.key_heads
        self.config, self.H, GN = c, E // P, G * c.state_size
        self.rows, self.parts = [E, 2 * GN + E, self.H, self.H], [GN, GN, E]
        self.in_proj = projection(c, D, sum(self.rows))         # rows [z; q, k, v; β; α]
        self.conv1d = nn.Conv1d(2 * GN + E, 2 * GN + E, c.conv_kernel, groups=2 * GN + E, bias=False)
        self.dt_bias, self.A_log = (nn.Parameter(torch.zeros(self.H)) for _ in range(2))
        self.norm = RMSNorm(P, c.norm_eps)                      # of each head
        self.out_proj = projection(c, E, D)

    def forward(self, x, real, state):
        """x (B, T, D) → (B, T, D). real (B, T, 1): 0 at padding, which leaves the state as it is; or 1."""
        c, before = self.config, self.config.conv_kernel - 1
        z, qkv, beta, dt = self.in_proj(x * real).split(self.rows, -1)
        qkv = torch.cat((state.get('conv', qkv.new_zeros(len(x), before, qkv.shape[-1])), qkv), 1)
        state['conv'] = qkv[:, qkv.shape[1] - before:]
        q, k, v = F.silu(self.conv1d(qkv.mT).mT).float().split(self.parts, -1)
        shared = self.H // c.key_heads
        q, k = (unit(u.unflatten(-1, (c.key_heads, -1))).repeat_interleave(shared, 2) for u in (q, k))
        v = v.unflatten(-1, (self.H, -1))                       # (B, T, H, P)
        log_decay = -self.A_log.float().exp() * F.softplus(dt.float() + self.dt_bias) * real    # (B, T, H)
        beta = c.delta_max * beta.float().sigmoid() * real
        S = state.get('ssm', v.new_zeros(len(x), self.H, c.ssm_head_dim, c.state_size))
        y, state['ssm'] = delta_rule(q * c.state_size ** -0.5, k, v, log_decay, beta, S, c.chunk_size)
        y = self.norm(y).flatten(2) * F.silu(z.float())         # (B, T, E)
        return self.out_proj(y.to(z.dtype))
