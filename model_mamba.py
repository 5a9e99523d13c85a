"""Mamba-2 (state-space duality, the default) and Mamba-1 (selective scan), in plain PyTorch that is
fast on a CPU too.

    config = MambaConfig(vocab_size=4096, n_layer=6, n_embd=384)   # version=1 for Mamba-1
    logits, loss = Mamba(config)(idx, targets)                     # training
    logits, state = Mamba(config).step(idx, state)                 # generation: the state never grows

    idx ──► embedding ──► n_layer times: x + mixer(norm(x)) ──► norm ──► lm_head

Both mixers are a linear recurrence whose dt, B and C depend on the token:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
    y_t = C_t h_t + D x_t

    selective_scan      A differs by channel and state (Gu & Dao 2023)
    ssd                 one A a head, so that within chunks it is attention (Dao & Gu 2024)

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, P head size, G
groups, N state size, Q chunk, c chunks, K taps of the convolution, R rank of dt. Parameters have
the names and shapes of transformers' MambaForCausalLM / Mamba2ForCausalLM; initialisation is that
of the reference implementation (state-spaces/mamba), on which quality depends more than on most
things here.

What is marked @fast is the definition of an operation; mambino/kernels/ computes the same sooner,
where it can.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.kernels import fast
from mambino.language_model import LanguageModel, RMSNorm, check_at_least_one, product_dtype


@dataclass
class MambaConfig:
    version: int = 2
    block_size: int = 1024      # tokens in a training window; nothing in the model depends on it
    vocab_size: int = 50304
    n_layer: int = 24
    n_embd: int = 768
    state_size: int = 0         # N; 0: 128 (Mamba-2), 16 (Mamba-1)
    expand: int = 2             # E = expand * n_embd
    conv_kernel: int = 4        # K
    head_dim: int = 64          # P, Mamba-2
    n_groups: int = 1           # G, Mamba-2: heads that share B and C
    time_step_rank: int = 0     # R, Mamba-1: rank of dt; 0: n_embd / 16, rounded up
    chunk_size: int = 64  # Q, Mamba-2: cost grows with Q in chunks, with 1/Q between them
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        if self.version not in MIXERS:
            versions = ' or '.join(map(str, MIXERS))
            raise ValueError(f'version={self.version}: Mamba comes as version {versions}')
        mixer = MIXERS[self.version]
        self.state_size = self.state_size or mixer.default_state_size
        self.time_step_rank = self.time_step_rank or -(-self.n_embd // 16)
        check_at_least_one(self, 'vocab_size block_size n_layer n_embd state_size expand')
        check_at_least_one(self, 'conv_kernel head_dim n_groups time_step_rank chunk_size')
        mixer.check(self)


# --- the short convolution ------------------------------------------------------------------------

@fast
def causal_conv1d(x, weight, bias, state=None):
    """silu of the causal depthwise convolution. x (B, T, E), weight (E, 1, K), bias (E), state (B,
    K-1, E): the inputs before x, None for zeros → (B, T, E), new state."""
    B, T, E = x.shape
    K = weight.shape[-1]
    if state is None:
        state = x.new_zeros(B, K - 1, E)
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


def out_proj_init(linear, n_residual):
    """Kaiming-uniform over the root of the number of residual branches: what is added to the stream
    shrinks with depth."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    with torch.no_grad():
        linear.weight /= math.sqrt(n_residual)


# --- Mamba-1 --------------------------------------------------------------------------------------

@fast
def selective_scan(x, dt, A, B, C, state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t (Gu & Dao 2023, eq. 2 and algorithm
    2), in fp32.

    x, dt (B, T, E), A (E, N), B, C (B, T, N), state (B, N, E) or None for zeros → y (B, T, E), last
    state (B, N, E)."""
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
    """Mamba-1's recurrence with what stands around it: y = (C h + D x) silu(z), steps softplus(dt +
    dt_bias).

    x, dt, z (B, T, E), dt_bias, D (E), A (E, N), B, C (B, T, N), state (B, N, E) or None → y (B, T,
    E), last state."""
    dt = F.softplus(dt.float() + dt_bias)
    y, state = selective_scan(x, dt, A, B, C, state)
    return torch.addcmul(y, x, D) * F.silu(z), state


class TimeStep(nn.Linear):
    """The projection of dt without its bias, which the scan adds in fp32. A module to call, so that
    what is hung on it counts."""

    def forward(self, x):
        return F.linear(x, self.weight)


class Mamba1Mixer(nn.Module):
    """x (B, T, D) → (B, T, D). cache: {'conv': (B, K-1, E), 'ssm': (B, N, E)}, None in it for
    zeros, is read and replaced."""
    state_names = ('conv', 'ssm')
    default_state_size = 16

    def __init__(self, config, n_residual):
        super().__init__()
        D, E = config.n_embd, config.expand * config.n_embd
        N, R = config.state_size, config.time_step_rank
        self.split = [R, N, N]
        self.in_proj = nn.Linear(D, 2 * E, bias=False)          # rows [x; z]
        self.conv1d = Conv1d(E, config.conv_kernel)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)       # rows [dt; B; C]
        self.dt_proj = TimeStep(R, E)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, D, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -R ** -0.5, R ** -0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt_bias_init(E))
        out_proj_init(self.out_proj, n_residual)

    @staticmethod
    def check(config):
        """ValueError where sizes of a config do not fit together: here all do."""

    @staticmethod
    def flops(config, T):
        """Forward operations a token of the recurrence and the convolution, beside the matrices',
        in sequences of T."""
        E, N = config.expand * config.n_embd, config.state_size
        return 2 * config.conv_kernel * E + 7 * E * N

    def forward(self, x, cache=None):
        state = cache or {}
        x, z = self.in_proj(x).chunk(2, dim=-1)                 # (B, T, E) each
        x, conv = self.conv1d(x, state.get('conv'))
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)
        A = -torch.exp(self.A_log.float())
        y, ssm = mamba1_scan(x, self.dt_proj(dt), self.dt_proj.bias, A, B, C, self.D, z,
                             state.get('ssm'))
        if cache is not None:
            cache.update(conv=conv, ssm=ssm)
        return self.out_proj(y)


# --- Mamba-2 --------------------------------------------------------------------------------------

def segsum(a):
    """a (..., Q) → (..., Q, Q): a_{j+1} + … + a_i where j ≤ i, else -inf. The sums are taken in
    fp64, where the device has it: differences of large ones would lose the small."""
    exact = torch.float32 if a.device.type == 'mps' else torch.float64
    sums = a.to(exact).cumsum(-1)
    hidden = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(hidden, -math.inf).to(a.dtype)


@fast
def ssd(x, dt, A, B, C, chunk_size=64, state=None):
    """The recurrence of selective_scan with one A a head, by chunks (Dao & Gu 2024, section 6 and
    listing 1).

    x (B, T, H, P), dt (B, T, H) fp32, A (H) fp32, B, C (B, T, G, N), state (B, H, P, N) or None → y
    (B, T, H, P), last state. T need not be a multiple of the chunk. dt, A, their sums and the
    carried state are fp32; the products follow autocast."""
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
    if state is None:
        state = x.new_zeros(batch, H, P, B.shape[-1], dtype=torch.float32)
    h = state.float()
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

    xBC (B, T, E + 2GN), dt (B, T, H), dt_bias, A, D (H), state (B, H, P, N) or None → y (B, T, H,
    P), last state."""
    x, B, C = split_heads(xBC, dt.shape[-1], groups, head_dim)
    y, state = ssd(x, F.softplus(dt.float() + dt_bias), A, B, C, chunk_size, state)
    return torch.addcmul(y, x, D[:, None]), state


def split_heads(xBC, H, G, P):
    """xBC (B, T, HP + 2GN) → x (B, T, H, P), B and C (B, T, G, N)."""
    N = (xBC.shape[-1] - H * P) // (2 * G)
    x, B, C = xBC.split((H * P, G * N, G * N), dim=-1)
    return x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))


@fast
def gated_rms_norm(y, z, weight, eps, groups, dtype=None):
    """RMSNorm(y * silu(z)) in G groups of channels, in fp32, rounded to dtype if one is given. y, z (B,
    T, E), weight (E)."""
    y = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))  # (B, T, G, E/G)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y.flatten(-2) * weight
    return y if dtype is None else y.to(dtype)


class GatedRMSNorm(RMSNorm):
    """gated_rms_norm with its weight. (B, T, E) both."""

    def __init__(self, E, groups, eps):
        super().__init__(E, eps)
        self.groups = groups

    def forward(self, y, z):
        return gated_rms_norm(y, z, self.weight, self.eps, self.groups, product_dtype(y))


class Mamba2Mixer(nn.Module):
    """x (B, T, D) → (B, T, D). cache: {'conv': (B, K-1, E+2GN), 'ssm': (B, H, P, N)}, None in it
    for zeros, is read and replaced."""
    state_names = ('conv', 'ssm')
    default_state_size = 128

    def __init__(self, config, n_residual):
        super().__init__()
        D, E = config.n_embd, config.expand * config.n_embd
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
        self.norm = GatedRMSNorm(E, G, config.norm_eps)
        self.out_proj = nn.Linear(E, D, bias=False)
        out_proj_init(self.out_proj, n_residual)

    @staticmethod
    def check(config):
        """ValueError where sizes of a config do not fit together."""
        E = config.expand * config.n_embd
        if E % config.head_dim or E // config.head_dim % config.n_groups:
            raise ValueError(f'expand * n_embd = {E} must be a multiple of head_dim * n_groups = '
                             f'{config.head_dim} * {config.n_groups}')

    @staticmethod
    def flops(config, T):
        """Forward operations a token of the recurrence and the convolution, beside the matrices',
        in sequences of T."""
        E, GN = config.expand * config.n_embd, config.n_groups * config.state_size
        Q = min(config.chunk_size, T)
        return 2 * config.conv_kernel * (E + 2 * GN) + 4 * E * config.state_size + Q * (E + GN)

    def forward(self, x, cache=None):
        state = cache or {}
        z, xBC, dt = self.in_proj(x).split(self.split, dim=-1)
        xBC, conv = self.conv1d(xBC, state.get('conv'))
        A = -torch.exp(self.A_log.float())
        y, ssm = mamba2_scan(xBC, dt, self.dt_bias, A, self.D, self.groups, self.head_dim,
                             self.chunk_size, state.get('ssm'))
        if cache is not None:
            cache.update(conv=conv, ssm=ssm)
        return self.out_proj(self.norm(y.flatten(2), z))        # y (B, T, H, P)


MIXERS = {1: Mamba1Mixer, 2: Mamba2Mixer}   # by MambaConfig.version


# --- the model ------------------------------------------------------------------------------------

class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mixer = MIXERS[config.version](config, config.n_layer)
        self.state_names = self.mixer.state_names
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        return x + self.drop(self.mixer(self.norm(x), cache))


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
        """idx (B, T) → normalised hidden states (B, T, D); the state, which is read and written; no
        losses. A window means nothing."""
        x = self.backbone.embeddings(idx)                       # (B, T, D)
        for i, block in enumerate(self.backbone.layers):
            x = self.run_layer(i, block, state, x)
        return self.backbone.norm_f(x), state, []
