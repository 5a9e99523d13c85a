"""Mamba-2 (state-space duality, the default), Mamba-1 (selective scan) and Mamba-3 (a state that turns), in
plain PyTorch that is fast on a CPU too.

    config = MambaConfig(vocab_size=4096, n_layer=6, n_embd=384)   # version=1 or 3 for the others
    logits, loss = Mamba(config)(idx, targets)                     # training
    logits, state = Mamba(config).step(idx, state)                 # generation: the state never grows

    idx ──► embedding ──► n_layer times: x + mixer(norm(x)) ──► norm ──► lm_head

All mixers are a linear recurrence whose dt, B and C depend on the token:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = C_t h_t + D x_t

    selective_scan      A differs by channel and state (Gu & Dao 2023)
    ssd                 one A a head, so that within chunks it is attention (Dao & Gu 2024)
    mamba3_scan         A from the token, two-sided steps, a state that turns (Lahoti et al. 2026)

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, P head size, G groups, N
state size, Q chunk, c chunks, K taps of the convolution, R rank of dt, of Mamba-3's B and C, A angles.
Parameters have the names and shapes of transformers' MambaForCausalLM / Mamba2ForCausalLM and of the
reference's Mamba3; initialisation is that of the reference (state-spaces/mamba), on which quality
depends more than on most things here.
What is marked @fast is the definition of an operation; mambino/kernels/ computes the same sooner.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.blocks import Blocks, Mixer, both_ways, check_objective, out_proj_init, way_back
from mambino.kernels import fast
from mambino.language_model import Gate, GatedRMSNorm, LanguageModel, RMSNorm, SwiGLU, check_at_least_one, gated_heads


@dataclass
class MambaConfig:
    version: int = 2
    block_size: int = 1024      # tokens in a training window; nothing in the model depends on it
    vocab_size: int = 50304
    n_layer: int = 24
    n_embd: int = 768
    intermediate_size: int = 0  # inner width of a SwiGLU after each mixer; 0: none
    state_size: int = 0         # N; 0: 128, of Mamba-1 16
    expand: int = 2             # E = expand * n_embd
    inner_size: int = 0         # E, where it is no multiple of n_embd; 0: by expand
    conv_kernel: int = 4        # K
    head_dim: int = 64          # P, Mamba-2 and -3
    n_groups: int = 1           # G, Mamba-2 and -3: heads that share B and C
    time_step_rank: int = 0     # R, Mamba-1: rank of dt; 0: n_embd / 16, rounded up
    part_norm_eps: float = 0.0  # Mamba-1: above 0, dt, B and C are normed (FalconMamba, Zuo et al. 2024)
    gated_norm: bool = True     # Mamba-2: RMSNorm after the gate; False: the gate alone
    chunk_size: int = 64        # Q, Mamba-2 and -3: cost grows with Q in chunks, with 1/Q between them
    mimo_rank: int = 1          # R, Mamba-3: columns of B and C; more write more into the same state
    rope_fraction: float = 0.5  # Mamba-3: part of a state's channels that are turned
    head_norm: bool = False     # Mamba-3: norm each head before its gate, which hybrids need
    objective: str = 'next'     # token; or 'masked', 'block': tokens that are hidden, see mambino/blocks.py
    block_length: int = 0
    shifted: bool = False       # what a token sees speaks of the next one, as where it was learned first
    share_projections: bool = True  # masked, block: both directions have one in_proj and one out_proj
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        check_objective(self)
        if self.version not in MIXERS:
            raise ValueError(f'version={self.version}: Mamba comes as version {" or ".join(map(str, MIXERS))}')
        self.state_size = self.state_size or (16 if self.version == 1 else 128)
        self.time_step_rank = self.time_step_rank or -(-self.n_embd // 16)
        self.inner_size = self.inner_size or self.expand * self.n_embd
        check_at_least_one(self, 'vocab_size block_size n_layer n_embd state_size expand inner_size')
        check_at_least_one(self, 'conv_kernel head_dim n_groups time_step_rank chunk_size mimo_rank')
        if self.intermediate_size < 0:
            raise ValueError(f'intermediate_size={self.intermediate_size} must be 0 (no MLP) or more')
        E, turned = self.inner_size, self.state_size * self.rope_fraction
        if self.version != 1 and (E % self.head_dim or E // self.head_dim % self.n_groups):
            raise ValueError(f'expand * n_embd = {E} must be a multiple of head_dim * n_groups = '
                             f'{self.head_dim} * {self.n_groups}')
        if self.version == 3 and (self.state_size % 2 or not 2 <= turned <= self.state_size):
            raise ValueError(f'state_size={self.state_size} must be even, and rope_fraction={self.rope_fraction} '
                             'of it from 2 to all: channels are turned in pairs')
        for name, default in dict(mimo_rank=1, rope_fraction=0.5, head_norm=False).items():
            if self.version != 3 and getattr(self, name) != default:
                raise ValueError(f'{name}={getattr(self, name)} is for Mamba-3 alone: version=3')


# --- the short convolution ------------------------------------------------------------------------

@fast
def causal_conv1d(x, weight, bias, state=None):
    """silu of the causal depthwise convolution. x (B, T, E), weight (E, 1, K), bias (E), state (B, K-1, E): the
    inputs before x, None for zeros → (B, T, E), new state."""
    B, T, E = x.shape
    K = weight.shape[-1]
    state = x.new_zeros(B, K - 1, E) if state is None else state
    x = torch.cat((state.to(x.dtype), x), 1)                    # (B, K-1 + T, E)
    y = F.conv1d(x.mT, weight.to(x.dtype), bias.to(x.dtype), groups=E).mT  # (B, T, E)
    return F.silu(y), x[:, T:].clone()                          # a copy: a view would keep all of x


class Conv1d(nn.Module):
    """The weight (E, 1, K) and bias (E) of causal_conv1d, initialised as nn.Conv1d does."""

    def __init__(self, channels, kernel):
        super().__init__()
        bound = kernel ** -0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x, state=None):
        return causal_conv1d(x, self.weight, self.bias, state)


# --- initialisation -------------------------------------------------------------------------------

def dt_bias_init(n):
    """(n,) biases b with softplus(b) log-uniform in [0.001, 0.1]."""
    dt = torch.exp(torch.rand(n) * math.log(100) + math.log(1e-3)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


# --- Mamba-1 --------------------------------------------------------------------------------------

@fast
def selective_scan(x, dt, A, B, C, state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t (Gu & Dao 2023, eq. 2 and algorithm 2), in fp32.

    x, dt (B, T, E), A (E, N), B, C (B, T, N), state (B, N, E) or None for zeros → y (B, T, E), last state."""
    x, dt, A, B, C = (u.float() for u in (x, dt, A, B, C))
    h = x.new_zeros(len(x), A.shape[1], A.shape[0]) if state is None else state # (B, N, E)
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, None] * A.T)                 # (B, N, E)
        h = decay * h + B[:, t, :, None] * (dt[:, t] * x[:, t])[:, None]
        ys.append((C[:, t, :, None] * h).sum(1))                # (B, E)
    return torch.stack(ys, 1), h


@fast
def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    """Mamba-1's recurrence with what stands around it: y = (C h + D x) silu(z), steps softplus(dt + dt_bias).

    x, dt, z (B, T, E), dt_bias, D (E), A (E, N), B, C (B, T, N), state (B, N, E) or None → y (B, T, E), state."""
    dt = F.softplus(dt.float() + dt_bias)
    y, state = selective_scan(x, dt, A, B, C, state)
    return torch.addcmul(y, x, D) * F.silu(z), state


class TimeStep(nn.Linear):
    """The projection of dt without its bias, which the scan adds in fp32. A module: what is hung on it counts."""

    def forward(self, x):
        return F.linear(x, self.weight)


class Mamba1Mixer(Mixer):
    """cache: {'conv': (B, K-1, E), 'ssm': (B, N, E)}"""
    state_names = ('conv', 'ssm')

    def __init__(self, config, n_residual):
        super().__init__()
        D, E = config.n_embd, config.inner_size
        N, R = config.state_size, config.time_step_rank
        self.split, self.part_norm_eps = [R, N, N], config.part_norm_eps
        self.in_proj = nn.Linear(D, 2 * E, bias=False)          # rows [x; z]
        self.conv1d = Conv1d(E, config.conv_kernel)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)       # rows [dt; B; C]
        self.dt_proj = TimeStep(R, E)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, D, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -R ** -0.5, R ** -0.5)
        self.dt_proj.bias.data.copy_(dt_bias_init(E))
        out_proj_init(self.out_proj, n_residual)

    @staticmethod
    def flops(config, T):
        """Forward operations a token, in sequences of T, of all that is no matrix."""
        E, N = config.inner_size, config.state_size
        return 2 * config.conv_kernel * E + 7 * E * N

    def recur(self, projected, cache=None):
        state = cache or {}
        x, z = projected.chunk(2, dim=-1)                       # (B, T, E) each
        x, conv = self.conv1d(x, state.get('conv'))
        parts = self.x_proj(x).split(self.split, dim=-1)
        if self.part_norm_eps:
            parts = [F.rms_norm(part, part.shape[-1:], None, self.part_norm_eps) for part in parts]
        dt, B, C = parts
        A = -torch.exp(self.A_log.float())
        y, ssm = mamba1_scan(x, self.dt_proj(dt), self.dt_proj.bias, A, B, C, self.D, z, state.get('ssm'))
        if cache is not None:
            cache.update(conv=conv, ssm=ssm)
        return y


# --- Mamba-2 --------------------------------------------------------------------------------------

def exact(a):
    """fp64, where the device has it: differences of large sums would lose the small."""
    return a.to(torch.float32 if a.device.type == 'mps' else torch.float64)


def segsum(a):
    """a (..., Q) → (..., Q, Q): a_{j+1} + … + a_i where j ≤ i, else -inf."""
    sums = exact(a).cumsum(-1)
    hidden = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(hidden, -math.inf).to(a.dtype)


@fast
def ssd(x, dt, A, B, C, chunk_size=64, state=None):
    """The recurrence of selective_scan with one A a head, by chunks (Dao & Gu 2024, section 6 and listing 1).

    x (B, T, H, P), dt (B, T, H), A (H), B, C (B, T, G, N), state (B, H, P, N) or None → y (B, T, H, P), last state.
    T need not be a multiple of Q. dt, A, their sums and the carried state are fp32; the products follow autocast."""
    batch, T, H, P = x.shape
    Q = min(chunk_size, T)
    pad = -T % Q                                                # dt = 0 leaves the state as it is
    x, dt, B, C = (F.pad(u, (0, 0) * (u.ndim - 2) + (0, pad)) for u in (x, dt, B, C))
    x, dt, B, C = (u.unflatten(1, (-1, Q)) for u in (x, dt.float(), B, C))  # (B, c, Q, …)
    B, C = (u.repeat_interleave(H // u.shape[3], dim=3) for u in (B, C))  # (B, c, Q, H, N)
    X = x * dt[..., None]                                       # (B, c, Q, H, P)
    a = (dt * A).permute(0, 1, 3, 2)                            # (B, c, H, Q)
    L = torch.exp(segsum(a))  # (B, c, H, Q, Q): the decay from token j to i
    from_start = torch.exp(a.cumsum(-1))                        # (B, c, H, Q)

    # 1. within each chunk: attention with the decay as its mask
    y = torch.einsum('bcihn,bcjhn,bchij,bcjhp->bcihp', C, B, L, X).float()
    # 2. what each chunk adds to the state
    added = torch.einsum('bcjhn,bchj,bcjhp->bchpn', B, L[..., -1, :], X).float()
    # 3. the state before each chunk, one after another
    h = x.new_zeros(batch, H, P, B.shape[-1], dtype=torch.float32) if state is None else state.float()
    before = []
    for c in range(X.shape[1]):
        before.append(h)
        h = from_start[:, c, :, -1, None, None] * h + added[:, c]
    # 4. what the state before a chunk gives to its tokens
    y = y + torch.einsum('bcihn,bchpn,bchi->bcihp', C, torch.stack(before, 1), from_start)
    return y.flatten(1, 2)[:, :T], h


@fast
def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    """Mamba-2's recurrence, by ssd, and its skip: y = C h + D x, steps softplus(dt + dt_bias).

    xBC (B, T, E + 2GN), dt (B, T, H), dt_bias, A, D (H), state (B, H, P, N) or None → y (B, T, H, P), state."""
    x, B, C = split_heads(xBC, dt.shape[-1], groups, head_dim)
    y, state = ssd(x, F.softplus(dt.float() + dt_bias), A, B, C, chunk_size, state)
    return torch.addcmul(y, x, D[:, None]), state


def split_heads(xBC, H, G, P):
    """xBC (B, T, HP + 2GN) → x (B, T, H, P), B and C (B, T, G, N)."""
    N = (xBC.shape[-1] - H * P) // (2 * G)
    x, B, C = xBC.split((H * P, G * N, G * N), dim=-1)
    return x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))


class Mamba2Mixer(Mixer):
    """cache: {'conv': (B, K-1, E+2GN), 'ssm': (B, H, P, N)}"""
    state_names = ('conv', 'ssm')

    def __init__(self, config, n_residual):
        super().__init__()
        D, E = config.n_embd, config.inner_size
        N, G = config.state_size, config.n_groups
        H = E // config.head_dim
        self.head_dim = config.head_dim
        self.groups = G
        self.chunk_size = config.chunk_size
        self.split = [E, E + 2 * G * N, H]
        self.in_proj = nn.Linear(D, 2 * E + 2 * G * N + H, bias=False)  # rows [z; x, B, C; dt]
        self.conv1d = Conv1d(E + 2 * G * N, config.conv_kernel)
        self.dt_bias = nn.Parameter(dt_bias_init(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log_())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(E, G, config.norm_eps) if config.gated_norm else Gate()
        self.out_proj = nn.Linear(E, D, bias=False)
        out_proj_init(self.out_proj, n_residual)

    @staticmethod
    def flops(config, T):
        """Forward operations a token, in sequences of T, of all that is no matrix."""
        E, GN = config.inner_size, config.n_groups * config.state_size
        Q = min(config.chunk_size, T)
        return 2 * config.conv_kernel * (E + 2 * GN) + 4 * E * config.state_size + Q * (E + GN)

    def recur(self, projected, cache=None):
        state = cache or {}
        z, xBC, dt = projected.split(self.split, dim=-1)
        xBC, conv = self.conv1d(xBC, state.get('conv'))
        A = -torch.exp(self.A_log.float())
        y, ssm = mamba2_scan(xBC, dt, self.dt_bias, A, self.D, self.groups, self.head_dim,
                             self.chunk_size, state.get('ssm'))
        if cache is not None:
            cache.update(conv=conv, ssm=ssm)
        return self.norm(y.flatten(2), z)                       # y (B, T, H, P)


# --- Mamba-3 --------------------------------------------------------------------------------------

def rotate(v, turn, interleaved):
    """v (…, N), of whose channels A pairs are turned by turn (…, A): (2i, 2i + 1), or (i, i + N/2)."""
    shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    first, second = v.unflatten(-1, shape).unbind(pair)         # (…, N/2) each
    A, cos, sin = turn.shape[-1], turn.cos(), turn.sin()
    a, b = first[..., :A], second[..., :A]
    first = torch.cat((a * cos - b * sin, first[..., A:]), -1)
    second = torch.cat((a * sin + b * cos, second[..., A:]), -1)
    return torch.stack((first, second), pair).flatten(-2)


@fast
def mamba3_scan(x, B, C, dt, log_decay, trap, rate, B_bias, C_bias, D, mimo_x=None, interleaved=True,
                chunk_size=64, state=None):
    """The exponential-trapezoidal rule: a step counts its own input by λ, the last token's by 1 - λ; the state's
    channels turn by angles ωΔ, R_t (Lahoti et al. 2026, prop. 4). With B, C and x of rank R (MIMO):

        h_t = exp(ΔA) R_t (h_{t-1} + (1 - λ) Δ B_{t-1} x_{t-1}) + λ Δ B_t x_t,      y_t = C_t h_t + D x_t

    Only C_t R_t … R_{j+1} B_j is seen: so here B and C are turned by the sum of all turns, h never.

    x (B, T, H, P), B, C (B, T, R, G, N) normed, dt Δ, log_decay ΔA, trap λ (B, T, H), rate ω (B, T, A), all four
    fp32, B_bias, C_bias (H, R, N), D (H), mimo_x (H, R, P), None for ones, state (h (B, H, P, N), sum of turns
    (B, H, A) in fp64, B of the last token, turned, (B, R, H, N), its x (B, H, P)), None for zeros → y (B, T, R, H,
    P), the state after it."""
    x = x.float()[:, :, None]                                   # (B, T, 1, H, P)
    mimo_x = torch.ones_like(x[0, 0]) if mimo_x is None else mimo_x.transpose(0, 1)     # (R, H, P)
    B, C = (u.float().repeat_interleave(x.shape[3] // u.shape[3], 3) for u in (B, C))   # (B, T, R, H, N)
    h, turn, last_b, last_x = state or [None] * 4
    if last_b is None:
        turn, last_b, last_x = exact(rate[:, :1] * 0), torch.zeros_like(B[:, 0]), torch.zeros_like(x[:, 0, 0])
    h = 0 if h is None else h
    ys = []
    for t in range(x.shape[1]):
        decay, before, now = (u[..., None, None] for u in (
            log_decay[:, t].exp(), (1 - trap[:, t]) * dt[:, t], trap[:, t] * dt[:, t]))  # (B, H, 1, 1)
        turn = (turn + exact(rate[:, t, None]) * dt[:, t, :, None]) % math.tau
        b, c = (rotate(u[:, t] + bias.transpose(0, 1), turn[:, None].float(), interleaved)
                for u, bias in ((B, B_bias), (C, C_bias)))      # (B, R, H, N)
        h = decay * (h + before * torch.einsum('brhp,brhn->bhpn', last_x[:, None] * mimo_x, last_b))
        h = h + now * torch.einsum('brhp,brhn->bhpn', x[:, t] * mimo_x, b)
        ys.append(torch.einsum('bhpn,brhn->brhp', h, c) + D[:, None] * x[:, t] * mimo_x)
        last_b, last_x = b, x[:, t, 0]
    return torch.stack(ys, 1), (h, turn, last_b, last_x.clone())    # a view would keep all of x


class Mamba3Mixer(Mixer):
    """cache: mamba3_scan's state"""
    state_names = ('ssm', 'turn', 'last_b', 'last_x')

    def __init__(self, config, n_residual):
        super().__init__()
        D, E, P = config.n_embd, config.inner_size, config.head_dim
        R, G, N, H = config.mimo_rank, config.n_groups, config.state_size, E // P
        self.head_dim, self.chunk_size, self.columns = P, config.chunk_size, (R, G, N)
        self.interleaved = R == 1                               # which pairs are turned, as the reference has it
        self.split = [E, E, R * G * N, R * G * N, H, H, H, int(N * config.rope_fraction) // 2]
        self.in_proj = nn.Linear(D, sum(self.split), bias=False)  # rows [z; x; B; C; dt; A; trap; angles]
        self.dt_bias = nn.Parameter(dt_bias_init(H))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(H, R, N)) for _ in 'BC')
        self.B_norm, self.C_norm = (RMSNorm(N, config.norm_eps) for _ in 'BC')
        self.D = nn.Parameter(torch.ones(H))
        self.mimo_x = self.mimo_z = self.mimo_o = None
        if R > 1:
            self.mimo_x, self.mimo_o = (nn.Parameter(torch.full((H, R, P), 1 / R)) for _ in 'xo')
            self.mimo_z = nn.Parameter(torch.ones(H, R, P))
        self.norm = RMSNorm(E, config.norm_eps) if config.head_norm else None   # of each head; see gated_heads
        self.out_proj = nn.Linear(E, D, bias=False)
        out_proj_init(self.out_proj, n_residual)

    @staticmethod
    def flops(config, T):
        """Forward operations a token, in sequences of T, of all that is no matrix."""
        E, N, R = config.inner_size, config.state_size, config.mimo_rank
        Q = min(config.chunk_size, T * R)                       # rows of a chunk
        return R * (4 * E * N + Q * (E + E // config.head_dim * N))

    def recur(self, projected, cache=None):
        z, x, B, C, dt, A, trap, angles = projected.split(self.split, dim=-1)
        z, x = (u.unflatten(-1, (-1, self.head_dim)) for u in (z, x))   # (B, T, H, P)
        B, C = self.B_norm(B.unflatten(-1, self.columns)), self.C_norm(C.unflatten(-1, self.columns))
        dt, A = F.softplus(dt.float() + self.dt_bias), A.float()    # (B, T, H)
        heavy_tail = A.clamp(min=0) + 1 / (1 + F.relu(-A))      # 1 + A; below zero 1 / (1 - A)
        state = [(cache or {}).get(name) for name in self.state_names]
        y, state = mamba3_scan(x, B, C, dt, -dt * heavy_tail.clamp(min=1e-4), trap.float().sigmoid(),
                               math.pi * angles.float().tanh(), self.B_bias, self.C_bias, self.D, self.mimo_x,
                               self.interleaved, self.chunk_size, state)
        if cache is not None:
            cache.update(zip(self.state_names, state))
        norm, eps = (None, 0.0) if self.norm is None else (self.norm.weight, self.norm.eps)
        return gated_heads(y, z, self.mimo_z, self.mimo_o, norm, eps)


MIXERS = {1: Mamba1Mixer, 2: Mamba2Mixer, 3: Mamba3Mixer}  # by MambaConfig.version


# --- the model ------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mixer = MIXERS[config.version](config, config.n_layer)
        self.back = way_back(config, lambda: MIXERS[config.version](config, config.n_layer))
        self.state_names = self.mixer.state_names
        self.mlp = None
        if config.intermediate_size:
            self.norm2 = RMSNorm(config.n_embd, config.norm_eps)
            self.mlp = SwiGLU(config.n_embd, config.intermediate_size)
            out_proj_init(self.mlp.down_proj, config.n_layer)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, blocks=None, cache=None):
        x = x + self.drop(both_ways(self.mixer, self.back, self.norm(x), blocks, cache))
        return x if self.mlp is None else x + self.drop(self.mlp(self.norm2(x)))


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
        return self.config.n_layer * MIXERS[self.config.version].flops(self.config, T)

    def hidden_states(self, idx, state=None, window=0):
        """idx (B, T) → normalised hidden states (B, T, D); the state, which is changed; no losses."""
        blocks = None if state or self.config.objective == 'next' else Blocks(idx, self.config.block_length)
        x = self.backbone.embeddings(idx)                       # (B, T, D)
        for i, block in enumerate(self.backbone.layers):
            x = self.run_layer(i, block, state, x, blocks)
        return self.backbone.norm_f(x), state, []
