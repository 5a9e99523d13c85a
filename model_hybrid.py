"""A hybrid of Mamba-2 or Mamba-3, local attention and SwiGLU, mixed token by token.

    config = HybridConfig(vocab_size=4096, n_layer=6, n_head=6, n_embd=384)
    logits, loss = Hybrid(config)(idx, targets)      # training
    logits, state = Hybrid(config).step(idx, state)  # generation; the window fixes the state's size

A recurrence carries a summary of everything so far, a short attention window recalls the last
tokens exactly, an MLP transforms what is there. Each branch reads the same normalised stream, is
normalised itself and enters by a weight that a light controller, one small matrix, predicts from
the token:

    layout='parallel'     x + scale * sum_b gate_b(x) norm_b(branch_b(norm(x))),
                          b over SSM, attention and MLP
    layout='sequential'   the same with SSM and attention alone,
                          then an MLP in a residual step of its own

Measured on two CPU cores, on Python's sources, 2.9M parameters (3 layers of 192), AdamW at 3e-3,
batches of 4,096 tokens, val loss after 131 to 134 s of training: sequential with gate 3.728 (214
steps), without 3.729 (216), parallel with gate 3.769 (212). So sequential is the default; at this
size the gate costs nothing and gains nothing.

`scale` is learned, per channel, and starts at DeepNet's (2 n_layer)^-1/4 (Wang et al. 2022, for
decoders): the depth then leaves the size of an update unchanged. `low_rank=r` makes every
projection a product of two thin matrices. `layers='mmma'` gives three layers the SSM alone, each
fourth attention alone, as Granite 4 and Bamba have it; 'ddda' has Gated DeltaNet in the SSM's place,
as Qwen3.5 and OLMo Hybrid have it. The other parts come from model_gpt.py and model_mamba.py; the
letters of the shapes are theirs.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.blocks import Mixer, both_ways, check_objective, way_back
from mambino.kernels import fast
from mambino.language_model import LanguageModel, RMSNorm, SwiGLU, gated_heads
from model_gpt import Attention, GPTConfig, prepare_attention
from model_mamba import MIXERS, Conv1d, MambaConfig, causal_conv1d, dt_bias_init


@dataclass
class HybridConfig:
    version: int = 2            # SSM: Mamba-2, or 3
    layout: str = 'sequential'  # or 'parallel'; see above
    gate: bool = True  # weights of the branches by token; False: each counts the same
    branch_norm: bool = True    # RMSNorm on each branch before mixing (Hymba, Dong et al. 2024)
    layers: str = ''            # by turns 'm' SSM, 'd' DeltaNet, 'a' attention alone, 'b' SSM and attention; '': 'b'
    embed_norm: bool = True     # RMSNorm on the embeddings; False: they enter as they are
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12            # attention
    n_kv_head: int = 0          # 0: as many as n_head
    head_dim: int = 0           # 0: n_embd / n_head
    window: int = 256  # last tokens that attention sees; 0: all, and the state grows
    qk_norm: bool = False
    attention_gate: bool = False    # what attention gives times sigmoid(g_proj(x)), as in Qwen3.5
    rope_theta: float = 10000.0  # 0: no positions but those that the SSM tells (NoPE)
    rope_dim: int = 0           # numbers of a head that turn, see GPTConfig; 0: all
    intermediate_size: int = 0  # inner width of SwiGLU; 0: 8/3 n_embd, rounded up to 64s
    state_size: int = 64        # SSM, DeltaNet: N
    expand: int = 2             # SSM: inner width / n_embd
    ssm_inner_size: int = 0     # SSM: E, where it is no multiple of n_embd; 0: expand * n_embd
    gated_norm: bool = True     # SSM: RMSNorm after the gate; False: the gate alone
    ssm_head_dim: int = 64      # SSM, DeltaNet: P
    key_heads: int = 0          # DeltaNet: G, heads that share queries and keys; 0: each has its own
    delta_max: float = 1.0      # DeltaNet: the largest β; above 1 it may turn a state over (Grazzi et al. 2025)
    n_groups: int = 1           # SSM: G
    conv_kernel: int = 4        # SSM: of Mamba-2; DeltaNet
    mimo_rank: int = 1          # SSM: Mamba-3's R
    rope_fraction: float = 0.5  # SSM: Mamba-3's
    chunk_size: int = 64        # SSM
    low_rank: int = 0           # rank of the projections; 0: full matrices
    objective: str = 'next'     # token; or 'masked', 'block': tokens that are hidden, see mambino/blocks.py
    block_length: int = 0
    shifted: bool = False       # what a token sees speaks of the next one, as where it was learned first
    share_projections: bool = True  # masked, block: both directions of the SSM have one in_proj and one out_proj
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        check_objective(self)
        if self.layout not in ('parallel', 'sequential'):
            raise ValueError(f"layout={self.layout!r} must be 'parallel' or 'sequential'")
        if self.version not in (2, 3):
            raise ValueError(f"version={self.version}: a hybrid's recurrence is that of Mamba-2 or 3")
        if self.low_rank < 0:
            raise ValueError(f'low_rank={self.low_rank} must be 0 (full matrices) or more')
        if set(self.layers) - set('mdab'):
            raise ValueError(f"layers={self.layers!r} must be of 'm' (SSM), 'd' (DeltaNet), 'a' (attention), 'b' (SSM "
                             'and attention)')
        if self.rope_theta < 0:
            raise ValueError(f'rope_theta={self.rope_theta} must be above 0, or 0 (no positions)')
        attention = self.attention
        self.n_kv_head, self.head_dim = attention.n_kv_head, attention.head_dim
        self.intermediate_size = attention.intermediate_size
        try:
            ssm = self.ssm                                      # a config that checks its own fields
        except ValueError as error:
            raise ValueError(str(error).replace('head_dim', 'ssm_head_dim')) from None
        self.state_size, self.ssm_inner_size = ssm.state_size, ssm.inner_size
        heads = self.ssm_inner_size // self.ssm_head_dim
        self.key_heads = self.key_heads or heads
        if self.key_heads < 0 or heads % self.key_heads:
            raise ValueError(f'key_heads={self.key_heads} must divide the {heads} heads of ssm_head_dim')
        if not 0 < self.delta_max <= 2:
            raise ValueError(f'delta_max={self.delta_max} must be above 0, and 2 at most: beyond, states grow')

    @property
    def kinds(self):
        """A letter of `layers` for each layer."""
        return ((self.layers or 'b') * self.n_layer)[:self.n_layer]

    @property
    def attention(self):
        names = ('n_layer n_embd n_head n_kv_head head_dim window qk_norm attention_gate rope_dim '
                 'intermediate_size objective block_size block_length norm_eps dropout')
        shared = {name: getattr(self, name) for name in names.split()}
        if not self.rope_theta:
            return GPTConfig(rope_layers='0', **shared)
        return GPTConfig(rope_theta=self.rope_theta, **shared)

    @property
    def ssm(self):
        names = ('version n_layer n_embd state_size expand gated_norm n_groups conv_kernel chunk_size '
                 'mimo_rank rope_fraction norm_eps')
        shared = {name: getattr(self, name) for name in names.split()}
        # Mamba-3 beside attention finds far less in long texts without it (Lahoti et al. 2026, table 4)
        head_norm = self.version == 3
        return MambaConfig(head_dim=self.ssm_head_dim, inner_size=self.ssm_inner_size, head_norm=head_norm, **shared)


@fast
def mix(h, outputs, norms, controller):
    """The weighted sum of the branches' outputs, each (B, T, D) and normed by its own norm if there are norms.
    The controller, if there is one, reads their weights from h (B, T, D); without one all count the same."""
    if norms is not None:
        outputs = [norm(y.float()) for norm, y in zip(norms, outputs)]
    if controller is None:
        return sum(outputs) / len(outputs)
    weights = controller(h).float().softmax(-1)                 # (B, T, branches)
    return sum(weights[..., i, None] * y for i, y in enumerate(outputs))


class LowRank(nn.Module):
    """up(down(x)), of rank r, in place of `linear`; the product starts with the variance the full
    matrix had."""

    def __init__(self, linear, r):
        super().__init__()
        self.down = nn.Linear(linear.in_features, r, bias=False)
        self.up = nn.Linear(r, linear.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=linear.in_features ** -0.5)
        std = 0.0 if linear.weight.is_meta else float(linear.weight.detach().std())
        nn.init.normal_(self.up.weight, std=std * (linear.in_features / r) ** 0.5)

    def forward(self, x):
        return self.up(self.down(x))


# --- Gated DeltaNet -------------------------------------------------------------------------------

def unit(u):
    """u (..., N) of length 1."""
    return u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6)


@fast
def delta_scan(qkv, log_decay, beta, groups, head_dim, chunk_size=64, state=None):
    """The gated delta rule (Yang et al. 2025, eq. 10): what the state, decayed, answers to a key is moved by β
    towards the value, so that it forgets what it overwrites.

        S_t = α_t S_{t-1} + β_t (v_t - α_t S_{t-1} k_t) k_t^T,      y_t = S_t q_t / √N,      q, k of length 1

    qkv (B, T, 2GN + HP), log_decay log α and beta (B, T, H) fp32, state (B, H, P, N) or None → y (B, T, H, P), the
    last state."""
    H, GN = beta.shape[-1], (qkv.shape[-1] - beta.shape[-1] * head_dim) // 2
    q, k, v = qkv.float().split((GN, GN, H * head_dim), dim=-1)
    q, k = (unit(u.unflatten(-1, (groups, -1))).repeat_interleave(H // groups, 2) for u in (q, k))  # (B, T, H, N)
    q, v = q * q.shape[-1] ** -0.5, v.unflatten(-1, (H, head_dim))      # v (B, T, H, P)
    S = v.new_zeros(*v[:, 0].shape, q.shape[-1]) if state is None else state
    ys = []
    for t in range(v.shape[1]):
        S = log_decay[:, t].exp()[..., None, None] * S
        error = v[:, t] - (S @ k[:, t, ..., None])[..., 0]              # (B, H, P)
        S = S + (beta[:, t, :, None] * error)[..., None] * k[:, t, :, None]
        ys.append((S @ q[:, t, ..., None])[..., 0])
    return torch.stack(ys, 1), S


class DeltaMixer(Mixer):
    """cache: {'conv': (B, K-1, 2GN + E), 'ssm': (B, H, P, N)}"""
    state_names = ('conv', 'ssm')

    def __init__(self, config):
        super().__init__()
        D, E, P, G = config.n_embd, config.ssm_inner_size, config.ssm_head_dim, config.key_heads
        GN, H = G * config.state_size, E // P
        self.head_dim, self.groups, self.chunk_size, self.delta_max = P, G, config.chunk_size, config.delta_max
        self.split = [E, 2 * GN + E, H, H]
        self.in_proj = nn.Linear(D, sum(self.split), bias=False)        # rows [z; q, k, v; β; α]
        self.conv1d = Conv1d(2 * GN + E, config.conv_kernel)
        self.conv1d.bias = None                                         # as in others' models
        self.dt_bias = nn.Parameter(dt_bias_init(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log_())
        self.norm = RMSNorm(P, config.norm_eps)          # of each head; see gated_heads
        self.out_proj = nn.Linear(E, D, bias=False)

    @staticmethod
    def flops(config, T):
        """Forward operations a token, in sequences of T, of all that is no matrix."""
        E, GN = config.ssm_inner_size, config.key_heads * config.state_size
        Q = min(config.chunk_size, T)
        return 2 * config.conv_kernel * (E + 2 * GN) + 6 * E * config.state_size + 2 * Q * (E + GN)

    def recur(self, projected, cache=None):
        state = cache or {}
        z, qkv, beta, dt = projected.split(self.split, dim=-1)
        weight = self.conv1d.weight                                     # (2GN + E, 1, K)
        qkv, conv = causal_conv1d(qkv, weight, weight.new_zeros(len(weight)), state.get('conv'))
        log_decay = -torch.exp(self.A_log.float()) * F.softplus(dt.float() + self.dt_bias)
        y, ssm = delta_scan(qkv, log_decay, self.delta_max * beta.float().sigmoid(), self.groups, self.head_dim,
                            self.chunk_size, state.get('ssm'))
        if cache is not None:
            cache.update(conv=conv, ssm=ssm)
        z = z.unflatten(-1, (-1, self.head_dim))                        # (B, T, H, P)
        weight = self.norm.weight.repeat(len(self.A_log))               # (E), the same for all heads
        return gated_heads(y[:, :, None], z, norm=weight, eps=self.norm.eps)


# --- the model ------------------------------------------------------------------------------------

class Layer(nn.Module):
    """kind: a letter of HybridConfig.layers. A branch that the layer has not is None."""

    def __init__(self, config, kind):
        super().__init__()
        D, eps = config.n_embd, config.norm_eps
        self.parallel = config.layout == 'parallel'
        first_scale = (2 * config.n_layer) ** -0.25             # DeepNet's alpha
        self.input_layernorm = RMSNorm(D, eps)
        self.mamba = self.back = None
        if kind != 'a':
            build = partial(DeltaMixer, config) if kind == 'd' else partial(MIXERS[config.version], config.ssm, 1)
            self.mamba, self.back = build(), way_back(config, build)
        self.self_attn = Attention(config.attention) if kind in 'ab' else None
        self.state_names = ('k', 'v') if kind in 'ab' else ()
        if kind != 'a':
            self.state_names += self.mamba.state_names
        self.mlp = SwiGLU(D, config.intermediate_size)
        branches = (kind != 'a') + (kind in 'ab') + self.parallel
        self.branch_norms = None
        if config.branch_norm:
            self.branch_norms = nn.ModuleList(RMSNorm(D, eps, in_stream=True) for _ in range(branches))
        # of one branch there is nothing to weigh
        self.controller = nn.Linear(D, branches) if config.gate and branches > 1 else None
        self.residual_scale = nn.Parameter(torch.full((D,), first_scale))
        if not self.parallel:
            self.pre_mlp_layernorm = RMSNorm(D, eps)
            self.mlp_norm = RMSNorm(D, eps, in_stream=True) if config.branch_norm else None
            self.mlp_residual_scale = nn.Parameter(torch.full((D,), first_scale))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, kv_step=None, cache=None):
        h = self.input_layernorm(x)
        outputs = []
        if self.mamba is not None:
            outputs.append(both_ways(self.mamba, self.back, h, kv_step if cache is None else None, cache))
        if self.self_attn is not None:
            outputs.append(self.self_attn(h, rope, kv_step, cache))
        if self.parallel:
            outputs.append(self.mlp(h))
        x = x + self.residual_scale * self.drop(mix(h, outputs, self.branch_norms, self.controller))
        if self.parallel:
            return x
        y = self.mlp(self.pre_mlp_layernorm(x))
        if self.mlp_norm is not None:
            y = self.mlp_norm(y.float())
        return x + self.mlp_residual_scale * self.drop(y)


class Hybrid(LanguageModel):
    """See the top of the file; `forward`, `step` and the rest of the face are LanguageModel's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attention = config.attention
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            # the stream starts at size 1, as `scale` supposes
            embed_norm=RMSNorm(config.n_embd, config.norm_eps, in_stream=True),
            layers=nn.ModuleList(Layer(config, kind) for kind in config.kinds),
            norm=RMSNorm(config.n_embd, config.norm_eps),
        ))
        if not config.embed_norm:
            del self.model['embed_norm']
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.ndim == 2 and '.mamba.' not in name and '.back.' not in name:
                nn.init.normal_(p, std=0.02)
            if name.endswith(('o_proj.weight', 'down_proj.weight', 'out_proj.weight')):
                p.data *= (8 * config.n_layer) ** -0.25         # DeepNet's beta
            if 'controller' in name:
                nn.init.zeros_(p)  # all branches count the same at first
        if config.low_rank:
            for module in list(self.model.layers.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.Linear) and name.endswith('_proj'):
                        setattr(module, name, LowRank(child, config.low_rank))

    def embedding(self):
        return self.model.embed_tokens

    def embed(self, idx):
        """idx (B, T) → the stream before the first layer (B, T, D)."""
        x = self.model.embed_tokens(idx)
        return self.model.embed_norm(x) if self.config.embed_norm else x

    def mixing_flops(self, T):
        config = self.config
        attention = 4 * config.n_head * config.head_dim * min(T / 2, config.window or T)
        ssm, delta = MIXERS[config.version].flops(config.ssm, T), DeltaMixer.flops(config, T)
        return sum(dict(a=attention, m=ssm, d=delta, b=attention + ssm)[kind] for kind in config.kinds)

    def hidden_states(self, idx, state=None, window=0):
        """idx (B, T) → normalised hidden states (B, T, D); the state, whose caches are read and
        written; no losses."""
        rope, kv_step = prepare_attention(self.attention, idx, state, window)
        x = self.embed(idx)                                     # (B, T, D)
        for i, layer in enumerate(self.model.layers):
            x = self.run_layer(i, layer, state, x, rope, kv_step)
        return self.model.norm(x), state, []
