"""Mamba-2 (state-space duality, the default) and Mamba-1 (selective scan), in plain PyTorch that is fast on a CPU too.

    config = MambaConfig(vocab_size=4096, n_layer=6, n_embd=384)   # version=1 for Mamba-1
    logits, loss = Mamba(config)(idx, targets)                     # training
    logits, state = Mamba(config).step(idx, state)                 # generation; the state's size never grows

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, P head size, G groups, N state size, Q chunk.
Both are a linear recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, whose dt, B and C depend on
the token. A loop over time under autograd would be some 200 times slower than what stands in ops.py:

    mamba1_scan (A differs per channel and state): exact steps; the backward pass keeps only the states at chunk starts and makes the
                rest again. No division, so no underflow.
    mamba2_scan (one A a head): within chunks of Q tokens masked matrix products, between chunks a short loop.

Parameters have the names and shapes of transformers' MambaForCausalLM / Mamba2ForCausalLM; initialisation is that of the
reference implementation (state-spaces/mamba), on which quality depends more than on most things here.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.kernels import native
from mambino.kernels import ops
from model_gpt import LanguageModel, RMSNorm, added, at_least_one
from mambino.kernels.ops import conv_silu, mamba1_scan, mamba2_scan, rms_norm


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


class TimeStep(nn.Linear):
    """The projection of dt without its bias, which the scan adds in fp32. A module to call, so that what is hung on it counts."""

    def forward(self, x):
        return F.linear(x, self.weight)


class Mamba1Mixer(nn.Module):
    """x (B, T, D) → (B, T, D), state. The state is {'conv': (B, K-1, E), 'ssm': (B, N, E)}."""

    def __init__(self, config, n_residual):
        super().__init__()
        D, E, N, R = config.n_embd, config.expand * config.n_embd, config.state_size, config.time_step_rank
        self.split = [R, N, N]
        self.in_proj = nn.Linear(D, 2 * E, bias=False)                          # rows [x; z]
        self.conv1d = Conv1d(E, config.conv_kernel)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)                       # rows [dt; B; C]
        self.dt_proj = TimeStep(R, E)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, D, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -R ** -0.5, R ** -0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt_bias_init(E))
        out_proj_init(self.out_proj, n_residual)

    def forward(self, x, state=None):
        state = state or {}
        if ops.one_token(x, state.get('conv'), state.get('ssm')):
            state = {name: value.contiguous() for name, value in state.items()}
            if (y := native.mamba1_step(x, self, state)) is not None:
                return y, state
        x, z = self.in_proj(x).chunk(2, dim=-1)                                 # (B, T, E) each
        x, conv = conv_silu(x, self.conv1d.weight, self.conv1d.bias, state.get('conv'))
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)
        y, ssm = mamba1_scan(x, self.dt_proj(dt), self.dt_proj.bias, -torch.exp(self.A_log.float()), B, C, self.D, z,
                             state.get('ssm'))
        return self.out_proj(y), {'conv': conv, 'ssm': ssm}


class GatedRMSNorm(RMSNorm):
    """RMSNorm(y * silu(z)) in G groups of channels. (B, T, E) both."""

    def __init__(self, E, groups, eps):
        super().__init__(E, eps)
        self.groups = groups

    def forward(self, y, z):
        return rms_norm(y, self.weight, self.eps, z, self.groups)


class Mamba2Mixer(nn.Module):
    """x (B, T, D) → (B, T, D), state. The state is {'conv': (B, K-1, E+2GN), 'ssm': (B, H, P, N)}."""

    def __init__(self, config, n_residual):
        super().__init__()
        D, E, N, G = config.n_embd, config.expand * config.n_embd, config.state_size, config.n_groups
        self.head_dim, self.groups, self.chunk_size = config.head_dim, G, config.chunk_size
        self.sizes_fit = config.head_dim % 16 == N % 16 == 0                    # what native.cpp wants of a single token
        H = E // config.head_dim
        self.split = [E, E + 2 * G * N, H]
        self.in_proj = nn.Linear(D, 2 * E + 2 * G * N + H, bias=False)          # rows [z; x, B, C; dt]
        self.in_proj.rows = [E, E, G * N, G * N, H]                             # each kind is a matrix of its own to Muon
        self.conv1d = Conv1d(E + 2 * G * N, config.conv_kernel)
        self.dt_bias = nn.Parameter(dt_bias_init(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log_())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(E, G, config.norm_eps)
        self.out_proj = nn.Linear(E, D, bias=False)
        out_proj_init(self.out_proj, n_residual)

    def forward(self, x, state=None):
        state = state or {}
        if self.sizes_fit and ops.one_token(x, state.get('conv'), state.get('ssm')):
            state = {name: value.contiguous() for name, value in state.items()}
            if (y := native.mamba2_step(x, self, state)) is not None:
                return y, state
        z, xBC, dt = self.in_proj(x).split(self.split, dim=-1)
        xBC, conv = conv_silu(xBC, self.conv1d.weight, self.conv1d.bias, state.get('conv'))
        y, ssm = mamba2_scan(xBC, dt, self.dt_bias, -torch.exp(self.A_log.float()), self.D, self.groups, self.head_dim, self.chunk_size,
                             state.get('ssm'))                                  # (B, T, H, P)
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
        return added(x, self.drop, y), state


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
        return self.backbone.norm_f(self.through(self.layers, x, state)), state

    def layers(self, x, state, *_):
        for i, block in enumerate(self.backbone.layers):
            layer_state = {n: state[f'{n}.{i}'] for n in ('conv', 'ssm') if f'{n}.{i}' in state} if state else None
            x, layer_state = self.run(block, state, x, layer_state)
            if state:
                state.update({f'{n}.{i}': value for n, value in layer_state.items()})
        return x


def mamba_flops(config, T):
    """Forward operations a token of one layer's recurrence and convolution, beside its matrices'."""
    E, N, Q = config.expand * config.n_embd, config.state_size, min(config.chunk_size, T)
    if config.version == 1:
        return 2 * config.conv_kernel * E + 7 * E * N
    return 2 * config.conv_kernel * (E + 2 * config.n_groups * N) + 4 * E * N + Q * (E + config.n_groups * N)
