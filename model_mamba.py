"""Mamba-2 (state-space duality, the default) and Mamba-1 (selective scan), in plain PyTorch that is fast on a CPU too.

    config = MambaConfig(vocab_size=4096, n_layer=6, n_embd=384)   # version=1 for Mamba-1
    logits, loss = Mamba(config)(idx, targets)                     # training
    logits, state = Mamba(config).step(idx, state)                 # generation; the state's size never grows

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, P head size, G groups, N state size, Q chunk.
Both are a linear recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, whose dt, B and C depend on
the token. A loop over time under autograd would be some 100 times slower than what stands here:

    selective_scan (Mamba-1, A differs per channel and state): exact steps through buffers that stay in cache; the backward
                   pass keeps only the states at chunk starts and makes the rest again. No division, so no underflow.
    ssd            (Mamba-2, one A a head): within chunks of Q tokens a masked matrix product, between chunks a short loop.

Parameters have the names and shapes of transformers' MambaForCausalLM / Mamba2ForCausalLM; initialisation is that of the
reference implementation (state-spaces/mamba), on which quality depends more than on most things here.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model_gpt import LanguageModel, RMSNorm, at_least_one


@dataclass
class MambaConfig:
    version: int = 2
    block_size: int = 1024      # tokens in a training window; nothing in the model depends on it
    vocab_size: int = 50304
    n_layer: int = 24
    n_embd: int = 768
    state_size: int = 0         # N; 0: 128 (Mamba-2), 16 (Mamba-1)
    expand: int = 2             # E = expand * n_embd
    conv_kernel: int = 4
    head_dim: int = 64          # P, Mamba-2
    n_groups: int = 1           # G, Mamba-2: heads that share B and C
    time_step_rank: int = 0     # R, Mamba-1: rank of dt; 0: n_embd / 16, rounded up
    chunk_size: int = 64        # Q, Mamba-2: cost grows with Q inside chunks, and with 1/Q between them
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        if self.version not in (1, 2):
            raise ValueError(f'version={self.version}: Mamba comes as version 1 or 2')
        self.state_size = self.state_size or (128 if self.version == 2 else 16)
        self.time_step_rank = self.time_step_rank or -(-self.n_embd // 16)
        at_least_one(self, 'vocab_size block_size n_layer n_embd state_size expand conv_kernel')
        at_least_one(self, 'head_dim n_groups time_step_rank chunk_size')
        inner = self.expand * self.n_embd
        if self.version == 2 and (inner % self.head_dim or inner // self.head_dim % self.n_groups):
            raise ValueError(f'expand * n_embd = {inner} must be a multiple of head_dim * n_groups = '
                             f'{self.head_dim} * {self.n_groups}')


# --- the recurrence ---------------------------------------------------------------------------------------------------

class _SelectiveScan(torch.autograd.Function):
    """selective_scan with its backward pass by hand: states (N, E) are kept at the starts of chunks of 16 steps only.

    For each chunk the two factors of all its steps are made at once, then each step is one fused multiply-add."""
    CHUNK = 16  # 8, 16 and 32 measured alike; memory is that of T/16 states

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        K, (batch, T, E), N = _SelectiveScan.CHUNK, x.shape, A.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            At, u, y = A.t().contiguous(), dt * x, torch.empty_like(x)
            starts = x.new_empty(-(-T // K) + 1, batch, N, E)                   # the state before each chunk, and the last
            starts[0] = h
            decays, states = x.new_empty(2, batch, K, N, E)
            for c in range(len(starts) - 1):
                s = slice(c * K, min(T, c * K + K))
                k, h = s.stop - s.start, starts[c]
                decay = torch.mul(dt[:, s, None], At, out=decays[:, :k]).exp_()                  # (B, k, N, E)
                state = torch.mul(u[:, s, None], B[:, s, :, None], out=states[:, :k])
                for i in range(k):
                    h = state[:, i].addcmul_(decay[:, i], h)
                y[:, s] = torch.matmul(C[:, s, None], state).squeeze(2)
                starts[c + 1] = h
        ctx.save_for_backward(x, dt, A, B, C, starts)
        return y, starts[-1].clone()

    @staticmethod
    def backward(ctx, gy, g):
        K, (x, dt, A, B, C, starts) = _SelectiveScan.CHUNK, ctx.saved_tensors
        (batch, T, E), N = x.shape, A.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            At, u = A.t().contiguous(), dt * x
            gx, gdt, gB, gC, gA = (torch.empty_like(x), torch.empty_like(x), torch.empty_like(B), torch.empty_like(C),
                                   torch.zeros_like(At))
            decays, grads = x.new_empty(2, batch, K, N, E)
            states = x.new_empty(batch, K + 1, N, E)
            for c in reversed(range(len(starts) - 1)):
                s = slice(c * K, min(T, c * K + K))
                k = s.stop - s.start
                decay = torch.mul(dt[:, s, None], At, out=decays[:, :k]).exp_()
                before, state = states[:, :k], states[:, 1:k + 1]
                torch.mul(u[:, s, None], B[:, s, :, None], out=state)
                before[:, 0] = starts[c]
                for i in range(k):
                    state[:, i].addcmul_(decay[:, i], before[:, i])
                grad = torch.mul(C[:, s, :, None], gy[:, s, None], out=grads[:, :k])             # d loss / d h, step by step
                for i in reversed(range(k)):
                    g = grad[:, i].add_(g) * decay[:, i]
                gC[:, s] = torch.matmul(state, gy[:, s, :, None]).squeeze(-1)
                gB[:, s] = torch.matmul(grad, u[:, s, :, None]).squeeze(-1)
                gu = torch.matmul(B[:, s, None], grad).squeeze(2)                                # (B, k, E)
                grad.mul_(decay).mul_(before)                                                    # d loss / d (dt A)
                gA += torch.mul(grad, dt[:, s, None], out=decay).sum((0, 1))
                gdt[:, s] = torch.mul(grad, At, out=decay).sum(2).addcmul_(gu, x[:, s])
                gx[:, s] = gu.mul_(dt[:, s])
        return gx, gdt, gA.t(), gB, gC, g


def selective_scan(x, dt, A, B, C, state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t (Mamba, Gu & Dao 2023, eq. 2 and algorithm 2), in fp32.

    x, dt (B, T, E), A (E, N), B, C (B, T, N), state (B, N, E) or None for zeros → y (B, T, E), last state (B, N, E).
    Differentiable in everything, the state included."""
    x, dt, A, B, C = (u.float().contiguous() for u in (x, dt, A, B, C))
    if state is None:
        state = x.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    return _SelectiveScan.apply(x, dt, A, B, C, state)


def ssd(x, dt, A, B, C, chunk_size=64, state=None):
    """The same recurrence with one A a head, by chunks (Mamba-2, Dao & Gu 2024, section 6 and listing 1).

    x (B, T, H, P), dt (B, T, H) fp32, A (H) fp32, B, C (B, T, G, N), state (B, H, P, N) or None → y (B, T, H, P), last state.
    T need not be a multiple of the chunk. dt, A, their sums and the carried state are fp32; the products follow autocast.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    Q, R = min(chunk_size, 1 << (T - 1).bit_length()), H // G                   # R heads a group
    pad = -T % Q
    if pad:                                                                     # dt = 0 leaves the state as it is
        x, B, C = (F.pad(u, (0, 0, 0, 0, 0, pad)) for u in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    c = (T + pad) // Q
    dt = dt.float().view(batch, c, Q, H)

    # sums of dt A up to each token. Differences of large sums would lose the small ones, so they are taken in fp64.
    exact = torch.float32 if x.device.type == 'mps' else torch.float64
    sums = (dt.to(exact) * A.to(exact)).cumsum(2).transpose(2, 3)               # (B, c, H, Q)
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).float()                   # (B, c, H, Q, Q): from token j to i
    decay = decay.masked_fill(hidden, -math.inf).exp()                          # masked before exp: no inf, no NaN
    to_end = (sums[..., -1:] - sums).float().exp().transpose(2, 3)              # (B, c, Q, H)
    sums = sums.float()

    xdt = x.reshape(batch, c, Q, H, P) * dt[..., None]
    B, C = (u.reshape(batch, c, Q, G, N).transpose(2, 3) for u in (B, C))       # (B, c, G, Q, N)

    # inside a chunk: attention whose weights are C B^T, once a group, times the decay
    weights = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay.view(batch, c, G, R, Q, Q)
    y = weights.view(batch, c, H, Q, Q) @ xdt.transpose(2, 3)                   # (B, c, H, Q, P)

    # what each chunk adds to the state, and the state each chunk starts from
    new = B.transpose(-1, -2) @ (xdt * to_end[..., None]).view(batch, c, Q, G, R * P).transpose(2, 3)  # (B, c, G, N, R P)
    kept = sums[..., -1].exp().view(batch, c, G, 1, R, 1)
    h = x.new_zeros(batch, G, N, R, P, dtype=torch.float32) if state is None else \
        state.float().view(batch, G, R, P, N).permute(0, 1, 4, 2, 3)
    starts = []
    for added, factor in zip(new.float().view(batch, c, G, N, R, P).unbind(1), kept.unbind(1)):
        starts.append(h)
        h = torch.addcmul(added, h, factor)
    past = C @ torch.stack(starts, 1).view(batch, c, G, N, R * P)               # (B, c, G, Q, R P)
    past = past.view(batch, c, G, Q, R, P).transpose(2, 3).reshape(batch, c, Q, H, P)
    y = torch.addcmul(y.transpose(2, 3).float(), past.float(), sums.exp().transpose(2, 3)[..., None])
    return y.reshape(batch, T + pad, H, P)[:, :T], h.permute(0, 1, 3, 4, 2).reshape(batch, H, P, N)


class _ConvSilu(torch.autograd.Function):
    """silu of the causal depthwise convolution as K shifted multiply-adds, which beats a grouped convolution on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):                                          # x (B, T, E), weight (K, E), bias (E)
        K, T = weight.shape[0], x.shape[1]
        y = torch.addcmul(bias, x, weight[K - 1])
        for s in range(1, min(K, T)):                                           # s tokens back
            y[:, s:].addcmul_(x[:, :T - s], weight[K - 1 - s])
        ctx.save_for_backward(x, weight, y)
        return F.silu(y)

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        K, T = weight.shape[0], y.shape[1]
        g = torch.ops.aten.silu_backward(g, y)
        dx, dw = g * weight[K - 1], torch.zeros_like(weight)
        for s in range(min(K, T)):
            if s:
                dx[:, :T - s].addcmul_(g[:, s:], weight[K - 1 - s])
            dw[K - 1 - s] = (g[:, s:] * x[:, :T - s]).sum((0, 1))
        return dx, dw, g.sum((0, 1))


def conv_silu(x, weight, bias, state=None):
    """silu of the causal depthwise convolution. x (B, T, E), weight (E, 1, K), bias (E), state (B, K-1, E): the inputs
    before x, None for zeros → (B, T, E), new state."""
    B, T, E = x.shape
    K = weight.shape[-1]
    if state is None and T < K - 1:
        state = x.new_zeros(B, K - 1, E)
    if state is not None:
        x = torch.cat((state.to(x.dtype), x), 1)
    weight, bias = weight[:, 0].t().to(x.dtype).contiguous(), bias.to(x.dtype)
    if torch.compiler.is_compiling():                                           # the compiler fuses the steps by itself
        padded = F.pad(x, (0, 0, K - 1, 0))
        y = F.silu(bias + sum(padded[:, j:j + x.shape[1]] * weight[j] for j in range(K)))
    else:
        y = _ConvSilu.apply(x, weight, bias)
    return y[:, x.shape[1] - T:], x[:, x.shape[1] - K + 1:].clone()             # a copy: a view would keep all of x


# --- the two mixers ---------------------------------------------------------------------------------------------------

class Conv1d(nn.Module):
    """The weight (E, 1, K) and bias (E) of a depthwise convolution, initialised as nn.Conv1d does."""

    def __init__(self, channels, kernel):
        super().__init__()
        bound = kernel ** -0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))


def dt_bias_init(n):
    """(n,) biases b with softplus(b) log-uniform in [0.001, 0.1]."""
    dt = torch.exp(torch.rand(n) * math.log(100) + math.log(1e-3)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def out_proj_init(linear, n_residual):
    """Kaiming-uniform over the root of the number of residual branches: what is added to the stream shrinks with depth."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    with torch.no_grad():
        linear.weight /= math.sqrt(n_residual)


class Mamba1Mixer(nn.Module):
    """x (B, T, D) → (B, T, D), state. The state is {'conv': (B, K-1, E), 'ssm': (B, N, E)}."""

    def __init__(self, config, n_residual):
        super().__init__()
        D, E, N, R = config.n_embd, config.expand * config.n_embd, config.state_size, config.time_step_rank
        self.split = [R, N, N]
        self.in_proj = nn.Linear(D, 2 * E, bias=False)                          # rows [x; z]
        self.conv1d = Conv1d(E, config.conv_kernel)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)                       # rows [dt; B; C]
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, D, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -R ** -0.5, R ** -0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt_bias_init(E))
        out_proj_init(self.out_proj, n_residual)

    def forward(self, x, state=None):
        state = state or {}
        x, z = self.in_proj(x).chunk(2, dim=-1)                                 # (B, T, E) each
        x, conv = conv_silu(x, self.conv1d.weight, self.conv1d.bias, state.get('conv'))
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias)
        y, ssm = selective_scan(x, dt, -torch.exp(self.A_log.float()), B, C, state.get('ssm'))
        y = torch.addcmul(y, x, self.D) * F.silu(z)
        return self.out_proj(y), {'conv': conv, 'ssm': ssm}


class GatedRMSNorm(RMSNorm):
    """RMSNorm(y * silu(z)) in G groups of channels. (B, T, E) both."""

    def __init__(self, E, groups, eps):
        super().__init__(E, eps)
        self.groups = groups

    def forward(self, y, z):
        y = y.float() * F.silu(z.float())
        if self.groups == 1:
            return super().forward(y)
        y = y.unflatten(-1, (self.groups, -1))
        return F.rms_norm(y, y.shape[-1:], None, self.eps).flatten(-2) * self.weight


class Mamba2Mixer(nn.Module):
    """x (B, T, D) → (B, T, D), state. The state is {'conv': (B, K-1, E+2GN), 'ssm': (B, H, P, N)}."""

    def __init__(self, config, n_residual):
        super().__init__()
        D, E, N, G = config.n_embd, config.expand * config.n_embd, config.state_size, config.n_groups
        self.head_dim, self.groups, self.chunk_size = config.head_dim, G, config.chunk_size
        H = E // config.head_dim
        self.split_in, self.split_conv = [E, E + 2 * G * N, H], [E, G * N, G * N]
        self.in_proj = nn.Linear(D, 2 * E + 2 * G * N + H, bias=False)          # rows [z; x, B, C; dt]
        self.conv1d = Conv1d(E + 2 * G * N, config.conv_kernel)
        self.dt_bias = nn.Parameter(dt_bias_init(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log_())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(E, G, config.norm_eps)
        self.out_proj = nn.Linear(E, D, bias=False)
        out_proj_init(self.out_proj, n_residual)

    def forward(self, x, state=None):
        state = state or {}
        z, xBC, dt = self.in_proj(x).split(self.split_in, dim=-1)
        xBC, conv = conv_silu(xBC, self.conv1d.weight, self.conv1d.bias, state.get('conv'))
        x, B, C = xBC.split(self.split_conv, dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))                                # (B, T, H, P)
        B, C = B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))  # (B, T, G, N)
        dt = F.softplus(dt.float() + self.dt_bias)                              # (B, T, H)
        y, ssm = ssd(x, dt, -torch.exp(self.A_log.float()), B, C, self.chunk_size, state.get('ssm'))
        y = torch.addcmul(y, x, self.D[:, None])
        return self.out_proj(self.norm(y.flatten(2), z)), {'conv': conv, 'ssm': ssm}


# --- the model --------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mixer = (Mamba1Mixer if config.version == 1 else Mamba2Mixer)(config, config.n_layer)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, state=None):
        y, state = self.mixer(self.norm(x), state)
        return x + self.drop(y), state


class Mamba(LanguageModel):
    """See the top of the file; `forward`, `step` and the rest of the face are LanguageModel's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict(dict(
            embeddings=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm_f=RMSNorm(config.n_embd, config.norm_eps),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)

    def embedding(self):
        return self.backbone.embeddings

    def mixing_flops(self, T):
        return self.config.n_layer * mamba_flops(self.config, T)

    def body(self, idx, state=None):
        """idx (B, T) → normalised hidden states (B, T, D); with a state, each layer's is read and written."""
        x = self.backbone.embeddings(idx)                                       # (B, T, D)
        for i, block in enumerate(self.backbone.layers):
            layer_state = {n: state[f'{n}.{i}'] for n in ('conv', 'ssm') if f'{n}.{i}' in state} if state else None
            x, layer_state = block(x, layer_state)
            if state:
                state.update({f'{n}.{i}': value for n, value in layer_state.items()})
        return self.backbone.norm_f(x), state


def mamba_flops(config, T):
    """Forward operations a token of one layer's recurrence and convolution, beside its matrices'."""
    E, N, Q = config.expand * config.n_embd, config.state_size, min(config.chunk_size, T)
    if config.version == 1:
        return 2 * config.conv_kernel * E + 7 * E * N
    return 2 * config.conv_kernel * (E + 2 * config.n_groups * N) + 4 * E * N + Q * (E + config.n_groups * N)
