"""A modern decoder-only transformer: RoPE, RMSNorm, SwiGLU, grouped-query attention; optional
QK-norm, sliding window, experts, and what the models that people have do otherwise: biases, norms
behind the layers' parts, RoPE for longer texts, in some layers or of a part of a head.

    config = GPTConfig(vocab_size=4096, n_layer=6, n_head=6, n_embd=384)
    logits, loss = GPT(config)(idx, targets)      # training
    logits, state = GPT(config).step(idx, state)  # generation: a prompt at once, or by tokens

    idx ──► embedding ──► layers: x + attention(norm(x)), then x + mlp(norm(x)) ──► norm ──► lm_head

Letters of the shapes: B batch, T time, D model width, H heads, G key/value heads, P head size, S
keys, V vocabulary; of experts: E experts, k of them for a token, I inner width, n tokens, C tokens
an expert takes at most. Parameters have the names and shapes of transformers' LlamaForCausalLM
(with `window`: MistralForCausalLM, with `qk_norm`: Qwen3ForCausalLM, with `qkv_bias`:
Qwen2ForCausalLM, with `norm_after`: Olmo2ForCausalLM, with `rope_layers`: SmolLM3ForCausalLM, with
`n_expert`: MixtralForCausalLM), so `load_state_dict` works in both directions.
What is marked @fast is the definition of an operation; mambino/kernels/ computes the same sooner.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.blocks import Blocks, check_objective
from mambino.cache import kv_step_of
from mambino.kernels import fast
from mambino.language_model import LanguageModel, RMSNorm, SwiGLU, check_at_least_one, project, swiglu


@dataclass
class GPTConfig:
    block_size: int = 1024      # tokens in a training window; sampling may go on beyond it
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0          # fewer: grouped-query attention (Ainslie et al. 2023); 0: n_head
    n_embd: int = 768
    head_dim: int = 0           # 0: n_embd / n_head
    intermediate_size: int = 0  # inner width of SwiGLU; 0: 8/3 n_embd, rounded up to 64s
    rope_theta: float = 10000.0
    # RoPE stretched, so that a model which was trained on rope_length tokens serves longer texts
    rope_scaling: str = ''      # 'linear', 'llama3' or 'yarn', see `stretched`; '': none
    rope_factor: float = 1.0    # pairs that turn slowly turn so many times more slowly:
    rope_length: int = 0        # in so many tokens
    rope_slow: float = 1.0      # less than so many turns;
    rope_fast: float = 4.0      # those that make more turns stay as they are
    rope_amplitude: float = 1.0     # of cos and sin; above 1 attention is sharper
    rope_dim: int = 0           # numbers of a head that turn, the first of both halves; 0: all
    rope_layers: str = ''       # by turns: '1110' is RoPE in all but each fourth layer; '': in all
    norm_eps: float = 1e-5
    norm_after: bool = False    # norms behind attention and MLP in the place of those before
    qk_norm: bool = False       # RMSNorm on heads' queries and keys (Dehghani et al. 2023)
    qk_norm_whole: bool = False     # on those of all heads at once
    attention_gate: bool = False    # what attention gives times sigmoid(g_proj(x)) (Qiu et al. 2025)
    qkv_bias: bool = False      # of the projections to queries, keys and values
    o_bias: bool = False        # of the one that leaves attention
    mlp_bias: bool = False      # of SwiGLU's three
    window: int = 0             # each token sees this many last tokens, itself included; 0: all
    # experts: SwiGLUs in the place of each MLP, of which a router chooses for each token
    n_expert: int = 0           # 0: one SwiGLU, no router
    n_expert_active: int = 2    # experts a token goes to; of 1 only aux_loss teaches the router
    capacity_factor: float = 1.25   # even shares of the tokens an expert takes in training; 0: all
    aux_loss: float = 0.01      # weight of the loss that balances the experts
    z_loss: float = 0.001       # weight of the loss that keeps the router's logits small
    norm_topk: bool = True      # weights of a token's experts sum to 1, else to their share of all
    objective: str = 'next'     # token; or 'masked', 'block': tokens that are hidden, see mambino/blocks.py
    block_length: int = 0
    shifted: bool = False       # what a token sees speaks of the next one, as where it was learned first
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        check_objective(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        check_at_least_one(self, 'vocab_size block_size n_layer n_embd n_head n_kv_head')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f'head_dim={self.head_dim}, which is n_embd / n_head, must be even: RoPE turns pairs')
        self.intermediate_size = self.intermediate_size or -(-8 * self.n_embd // 3 // 64) * 64
        check_at_least_one(self, 'head_dim intermediate_size')
        for name in ('window', 'n_expert', 'capacity_factor', 'aux_loss', 'z_loss'):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f'{name}={getattr(self, name)} must be 0 (none) or more')
        if self.n_expert and not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f'n_expert_active={self.n_expert_active} must be from 1 to n_expert={self.n_expert}')
        if self.n_expert and (self.mlp_bias or self.norm_after):
            raise ValueError('experts have no mlp_bias, and no norm_after')
        if self.qk_norm_whole and not self.qk_norm:
            raise ValueError('qk_norm_whole means nothing without qk_norm')
        if self.rope_scaling not in ('', 'linear', 'llama3', 'yarn'):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} must be linear, llama3 or yarn")
        if not (min(self.rope_theta, self.rope_factor, self.rope_amplitude) > 0 < self.rope_slow < self.rope_fast):
            raise ValueError('rope_theta, rope_factor, rope_amplitude, rope_slow must be more than 0, rope_fast more')
        if self.rope_scaling in ('llama3', 'yarn'):
            check_at_least_one(self, 'rope_length')
        if not 0 <= self.rope_dim <= self.head_dim or self.rope_dim % 2:
            raise ValueError(f'rope_dim={self.rope_dim} must be even, at most {self.head_dim}')
        if not set(self.rope_layers) <= set('01'):
            raise ValueError(f'rope_layers={self.rope_layers!r} must be ones and zeros, of layers')

    def turns(self, i):
        """Whether layer i turns queries and keys by their positions."""
        return not self.rope_layers or self.rope_layers[i % len(self.rope_layers)] == '1'


# --- attention ------------------------------------------------------------------------------------

def rope_frequencies(config, device=None):
    """By how much a position turns each pair (P/2) of a head: of the n numbers that turn
    theta^(-2i/n), perhaps stretched; the others stay."""
    n = config.rope_dim or config.head_dim
    pair = torch.arange(0, n, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pair / n)
    if config.rope_scaling:
        frequencies = stretched(frequencies, config)
    return F.pad(frequencies, (0, (config.head_dim - n) // 2))


def stretched(frequencies, config):
    """Frequencies (n/2) of a model that serves longer texts than the rope_length tokens it was first
    trained on. 'linear': all are rope_factor times lower (Chen et al. 2023). Else those that turn
    slowly, and others in part: by how often they turn ('llama3', Grattafiori et al. 2024), or by
    their place between slow and fast ones ('yarn', Peng et al. 2023)."""
    if config.rope_scaling == 'linear':
        return frequencies / config.rope_factor
    if config.rope_scaling == 'llama3':
        turns = config.rope_length * frequencies / (2 * math.pi)
        slow = (config.rope_fast - turns) / (config.rope_fast - config.rope_slow)
    else:
        n = len(frequencies)    # log theta: from the first pair to one n places on
        first, last = (n * math.log(config.rope_length / (2 * math.pi * turns)) / math.log(config.rope_theta)
                       for turns in (config.rope_fast, config.rope_slow))
        first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * n - 1)
        place = torch.arange(n, device=frequencies.device)
        slow = (place - first) / ((last - first) or 0.001)
    slow = slow.clamp(0, 1)
    return frequencies * (1 - slow) + frequencies / config.rope_factor * slow


@fast
def rope_tables(positions, frequencies, amplitude=1.0):
    """cos and sin of rotary positions (Su et al. 2021): positions (..., T), frequencies (P/2) → two
    (..., T, 1, P/2), fp32."""
    angles = positions.float()[..., None, None] * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude


@fast
def apply_rope(x, rope):
    """Rotate (..., T, heads, P) by position; pairs are (i, i + P/2), as in Llama."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@fast
def attention(q, k, v, window=0, dropout=0.0, mask=None):
    """softmax(q k^T / sqrt(P)) v, causal (Vaswani et al. 2017, eq. 1): the T queries are the last
    of S positions.

    q (B, T, H, P), k, v (B, S, G, P), each key head for H/G query heads → (B, T, H P). window: each token sees so
    many last ones, itself included; 0: all. mask: (M, 1, T, S) bool, each for B/M sequences; True is seen."""
    B, T, H, P = q.shape
    S, G = k.shape[1:3]
    if mask is None:
        i = torch.arange(S - T, S, device=q.device)[:, None]
        j = torch.arange(S, device=q.device)
        mask = ((j <= i) & (j > i - (window or S)))[None, None]  # (1, 1, T, S)
    k, v = (u.repeat_interleave(H // G, dim=2) for u in (k, v))  # (B, S, H, P)
    scores = torch.einsum('bthp,bshp->bhts', q, k).float() / math.sqrt(P)
    hidden = ~mask.repeat_interleave(B // len(mask), 0)         # (B, 1, T, S)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)  # (B, H, T, S)
    weights = F.dropout(weights, dropout).to(v.dtype)
    return torch.einsum('bhts,bshp->bthp', weights, v).flatten(2)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions. x (B, T, D) → (B, T, D)."""

    def __init__(self, config, i=0):
        """i: of the layer."""
        super().__init__()
        D, P = config.n_embd, config.head_dim
        self.heads, self.head_dim = config.n_head, P
        self.window = config.window
        self.dropout = config.dropout
        self.qk_norm, self.qk_norm_whole = config.qk_norm, config.qk_norm_whole
        self.turns = config.turns(i)
        self.q_proj = nn.Linear(D, config.n_head * P, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, config.n_kv_head * P, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, config.n_kv_head * P, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * P, D, bias=config.o_bias)
        self.g_proj = nn.Linear(D, config.n_head * P, bias=False) if config.attention_gate else None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.n_head * P if config.qk_norm_whole else P, config.norm_eps)
            self.k_norm = RMSNorm(config.n_kv_head * P if config.qk_norm_whole else P, config.norm_eps)

    def forward(self, x, rope, kv_step=None, cache=None):
        """rope: of x's positions. kv_step, cache: a KVStep and {'k', 'v'}; without them x is a
        whole sequence."""
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (u.unflatten(-1, (-1, self.head_dim)) for u in (q, k, v))     # (B, T, H or G, P)
        if self.qk_norm and not self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.turns:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        dropout = self.dropout if self.training else 0.0
        if kv_step is not None:
            keys, values = kv_step.append(cache, k, v)          # (B, S, G, P)
        if kv_step is None or kv_step.is_first:  # a first chunk attends as in training
            y = attention(q, k, v, self.window, dropout)
        else:
            y = attention(q, keys, values, 0, dropout, kv_step.mask)
        if self.g_proj is not None:
            y = y * torch.sigmoid(self.g_proj(x))               # (B, T, H P)
        return self.o_proj(y)


def prepare_attention(config, idx, state=None, window=0):
    """What the attention of every layer needs for idx (B, T), made once: rope tables, and with a
    state a KVStep."""
    is_causal = config.objective == 'next'
    if state is not None:
        kv_step = kv_step_of(state['pos'], idx.shape[1], config.window or window, idx.device, is_causal)
    else:
        kv_step = None if is_causal else Blocks(idx, config.block_length, config.window)
    positions = torch.arange(idx.shape[1], device=idx.device) if kv_step is None else kv_step.positions
    return rope_tables(positions, rope_frequencies(config, idx.device), config.rope_amplitude), kv_step


# --- experts --------------------------------------------------------------------------------------

class Pairs(NamedTuple):
    """The n k pairs of a token and one of its experts, sorted by expert, an expert's by token."""
    token: torch.Tensor     # (n k) int64
    expert: torch.Tensor    # (n k)
    rank: torch.Tensor      # (n k) the pair's place among those of its expert
    counts: torch.Tensor    # (E) pairs of each expert
    capacity: int           # pairs that an expert computes, the first; what is beyond is dropped


@fast
def experts_swiglu(x, pairs, gate_up, down):
    """Each pair's token through the SwiGLU of its expert, zeros for what is dropped. x (n, D),
    gate_up (E, 2I, D), down (E, D, I) → (n k, D)."""
    ys = []
    tokens = pairs.token.split(pairs.counts.tolist())
    for token, gate_up_e, down_e in zip(tokens, gate_up.unbind(), down.unbind()):
        rows = x.index_select(0, token[:pairs.capacity])        # (≤ C, D)
        gate, up = F.linear(rows, gate_up_e).chunk(2, -1)       # (≤ C, I) each
        y = F.linear(swiglu(gate, up), down_e)
        ys.append(F.pad(y, (0, 0, 0, len(token) - len(rows))))
    return torch.cat(ys)


class Experts(nn.Module):
    """E SwiGLUs, their matrices stacked. x (n, D) and Pairs → (n k, D)."""

    def __init__(self, E, D, inner):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, D))  # rows [gate; up]
        self.down_proj = nn.Parameter(torch.empty(E, D, inner))

    def forward(self, x, pairs):
        return experts_swiglu(x, pairs, self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype))


class MoE(nn.Module):
    """A router sends each token to k of E experts (Mixtral, Jiang et al. 2024); the result is their
    sum by its weights. In training an expert takes C tokens at most.

    x (B, T, D) → (B, T, D), None or in training (loss, statistics): of balance and of large logits,
    scaled; (E + 1) int64, the token-expert pairs of each expert and, last, those of all that were
    dropped."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config.n_expert, config.n_embd, config.intermediate_size)

    def forward(self, x):
        shape = x.shape
        x = x.flatten(0, 1)                                     # (n, D)

        # The router, in fp32: rounding must not choose the expert.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())  # (n, E)
        probs = logits.softmax(-1)
        weights, experts = probs.topk(self.config.n_expert_active)  # (n, k) each
        if self.config.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)

        # Its pairs, dispatched to the experts; what they make of them goes back to the tokens.
        pairs, order = self.dispatch(experts)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.experts(x, pairs) * weights.flatten()[order][:, None]  # (n k, D)
        y = torch.zeros_like(x).index_add(0, pairs.token, y.to(x.dtype)).view(shape)
        if not self.training:
            return y, None
        return y, (self.router_loss(logits, probs, pairs), self.statistics(pairs))

    def dispatch(self, experts):
        """experts (n, k) of each token → Pairs, and the order (n k) that sorts them."""
        n, k = experts.shape
        E = self.config.n_expert
        expert, order = experts.flatten().sort(stable=True)
        counts = expert.new_zeros(E).index_add(0, expert, torch.ones_like(expert))
        first = counts.cumsum(0) - counts  # (E) the place of an expert's first pair
        rank = torch.arange(n * k, device=experts.device) - first[expert]
        capacity = n
        if self.training and self.config.capacity_factor > 0:
            capacity = min(n, math.ceil(self.config.capacity_factor * n * k / E))
        return Pairs(order // k, expert, rank, counts, capacity), order

    def router_loss(self, logits, probs, pairs):
        """The loss that balances the experts (Fedus et al. 2021, eq. 4), and the one that keeps
        logits small (Zoph et al. 2022, eq. 5)."""
        share = pairs.counts / len(pairs.token)                 # (E) of all pairs
        balance = self.config.n_expert * (share * probs.mean(0)).sum()
        size = logits.logsumexp(-1).square().mean()
        return self.config.aux_loss * balance + self.config.z_loss * size

    def statistics(self, pairs):
        return torch.cat((pairs.counts, (pairs.counts - pairs.capacity).clamp(min=0).sum(0, keepdim=True)))


# --- the model ------------------------------------------------------------------------------------

class Layer(nn.Module):
    state_names = ('k', 'v')

    def __init__(self, config, i):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, i)
        self.sparse = config.n_expert > 0
        # a router reads it as it is: rounding must not choose the expert
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps, in_stream=self.sparse)
        self.mlp = MoE(config) if self.sparse else SwiGLU(config.n_embd, config.intermediate_size, config.mlp_bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, kv_step=None, cache=None):
        """x (B, T, D) → (B, T, D), and what MoE says of its routing, or None."""
        x = x + self.drop(self.self_attn(self.input_layernorm(x), rope, kv_step, cache))
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if self.sparse else (y, None)
        return x + self.drop(y), routing


class NormAfterLayer(nn.Module):
    """A layer that norms what attention and MLP give, not what they read (OLMo 2, 2024)."""
    state_names = ('k', 'v')

    def __init__(self, config, i):
        super().__init__()
        self.self_attn = Attention(config, i)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps, in_stream=True)
        self.mlp = SwiGLU(config.n_embd, config.intermediate_size, config.mlp_bias)
        self.post_feedforward_layernorm = RMSNorm(config.n_embd, config.norm_eps, in_stream=True)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, kv_step=None, cache=None):
        """x (B, T, D) → (B, T, D), and None: there is no router."""
        x = x + self.drop(self.post_attention_layernorm(self.self_attn(x, rope, kv_step, cache)))
        return x + self.drop(self.post_feedforward_layernorm(self.mlp(x))), None


class GPT(LanguageModel):
    """See the top of the file; `forward`, `step` and the rest of the face are LanguageModel's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        layer = NormAfterLayer if config.norm_after else Layer
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(layer(config, i) for i in range(config.n_layer)),
            norm=RMSNorm(config.n_embd, config.norm_eps),
        ))
        self.drop = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply_gpt2_init()
        if config.n_expert:  # the sums of MoE's statistics, for expert_load
            routed = torch.zeros(config.n_layer, config.n_expert + 1, dtype=torch.long)
            self.register_buffer('routed', routed, persistent=False)

    def apply_gpt2_init(self):
        """Normal weights; what is added to the residual stream shrinks with depth (GPT-2)."""
        for name, p in self.named_parameters():
            if name.endswith('.bias'):
                nn.init.zeros_(p)
            if p.ndim < 2:
                continue
            added = name.endswith(('o_proj.weight', 'down_proj.weight', 'down_proj'))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if added else 0.02)

    def embedding(self):
        return self.model.embed_tokens

    def hidden_states(self, idx, state=None, window=0):
        """idx (B, T) → normalised hidden states (B, T, D); the state, whose caches are read and
        written; in training the losses of routers."""
        rope, kv_step = prepare_attention(self.config, idx, state, window)
        router_losses = []
        x = self.drop(self.model.embed_tokens(idx))             # (B, T, D)
        for i, layer in enumerate(self.model.layers):
            x, routing = self.run_layer(i, layer, state, x, rope, kv_step)
            if routing is not None:
                loss, statistics = routing
                router_losses.append(loss)
                self.routed[i] += statistics  # not in the layer, which may be computed twice
        return self.model.norm(x), state, router_losses

    def mixing_flops(self, T):
        """Forward operations a token of attention, and of the experts it goes to: all that is no
        matrix of two dimensions."""
        config = self.config
        seen = min(T / 2, config.window or T)
        flops = 4 * config.n_head * config.head_dim * seen
        if config.n_expert:
            flops += 6 * config.n_embd * config.intermediate_size * config.n_expert_active
        return config.n_layer * flops

    def expert_load(self):
        """Over the training steps since the last call, in this process: {'expert_load_max',
        'expert_load_min': token-expert pairs of the most and the least loaded expert of any layer,
        in even shares; 'dropped': the share of all pairs}. None without experts or steps."""
        if not self.config.n_expert:
            return None
        routed = self.routed.cpu().double()                     # (n_layer, E + 1)
        if not routed.any():
            return None
        self.routed.zero_()
        pairs = routed[:, :-1]
        load = pairs / pairs.mean(1, keepdim=True)              # (n_layer, E)
        dropped = routed[:, -1].sum() / pairs.sum()
        return dict(expert_load_max=load.max().item(), expert_load_min=load.min().item(), dropped=dropped.item())
