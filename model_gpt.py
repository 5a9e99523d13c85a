"""A modern decoder-only transformer: RoPE, RMSNorm, SwiGLU, grouped-query attention; optional QK-norm, sliding window, experts.

    config = GPTConfig(vocab_size=4096, n_layer=6, n_head=6, n_embd=384)
    logits, loss = GPT(config)(idx, targets)      # training
    logits, state = GPT(config).step(idx, state)  # generation: a prompt at once, in chunks, or token by token

Letters of the shapes: B batch, T time, D model width, H heads, K key/value heads, P head size, S cache slots, V vocabulary; of
experts: E experts, k of them for a token, I inner width, n tokens, C tokens an expert takes at most.
Parameters have the names and shapes of transformers' LlamaForCausalLM (with `window`: MistralForCausalLM, with `qk_norm`:
Qwen3ForCausalLM, with `n_expert`: MixtralForCausalLM), so `load_state_dict` works in both directions. What the other models share —
attention with its cache, SwiGLU, the face of a model, the optimizer groups — is defined here, once; the operations are ops.py's.
"""
import functools
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mambino.kernels import native
from mambino.kernels import ops
from mambino.kernels.ops import apply_rope, attention, linear_cross_entropy, rms_norm, rope_tables, swiglu


def at_least_one(config, names):
    """ValueError if one of these fields of a config is below 1."""
    for name in names.split():
        if getattr(config, name) < 1:
            raise ValueError(f'{name}={getattr(config, name)} must be at least 1')


@dataclass
class GPTConfig:
    block_size: int = 1024      # tokens in a training window; RoPE needs no table, so sampling may go on beyond it
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0          # 0: as many as n_head; fewer is grouped-query attention (Ainslie et al. 2023)
    n_embd: int = 768
    head_dim: int = 0           # 0: n_embd / n_head
    intermediate_size: int = 0  # SwiGLU's inner width; 0: 8/3 n_embd, rounded up to a multiple of 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False       # RMSNorm on each head's queries and keys (Dehghani et al. 2023): steadier at high learning rates
    window: int = 0             # each token sees this many last tokens, itself included; 0: all
    n_expert: int = 0           # SwiGLUs a layer, of which a router chooses for each token (Mixtral, Jiang et al. 2024); 0: one, no router
    n_expert_active: int = 2    # experts a token goes to; with 1 its weight is always 1, and only aux_loss teaches the router
    capacity_factor: float = 1.25  # tokens an expert takes in training, in even shares; more it drops. 0: no limit, as always in inference
    aux_loss: float = 0.01      # weight, in each layer, of the loss that balances the experts (Fedus et al. 2021, eq. 4)
    z_loss: float = 0.001       # weight, in each layer, of the loss that keeps the router's logits small (Zoph et al. 2022, eq. 5)
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        at_least_one(self, 'vocab_size block_size n_layer n_embd n_head n_kv_head')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head} (or set head_dim)')
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f'head_dim={self.head_dim} must be even: RoPE turns pairs')
        self.intermediate_size = self.intermediate_size or -(-8 * self.n_embd // 3 // 64) * 64
        at_least_one(self, 'head_dim intermediate_size')
        if self.window < 0:
            raise ValueError(f'window={self.window} must be 0 (no window) or more')
        for name in ('n_expert', 'capacity_factor', 'aux_loss', 'z_loss'):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f'{name}={getattr(self, name)} must be 0 (none) or more')
        if self.n_expert and not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f'n_expert_active={self.n_expert_active} must be from 1 to n_expert={self.n_expert}')


# --- parts the models share -------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps).to(x.dtype)


class KVStep:
    """How one `step` of t tokens reads and writes the key/value caches; planned once, the same for every layer.

    Without a window slot s of a cache (B, K, S, P) holds position s and S grows by doubling; with one it is a ring of
    S = window slots, slot s holding the latest position p with p % S = s. Caches are written in place.
    pos: (B,) int64 on the CPU, the tokens each row has seen. A CPU tensor, so that planning never waits for a GPU.
    """

    def __init__(self, pos, t, window, device):
        self.pos, self.t, self.window, self.n, self.device = pos, t, window, int(pos.max()) + t, device
        self.empty = self.n == t
        self.query = pos[:, None] + torch.arange(t)                             # (B, t) positions of the new tokens
        self.positions = self.query.to(device)
        self.keep = min(t, window) if window else t                             # of a ring only the last tokens stay

    @functools.cached_property
    def places(self):
        """Where to write: rows (B, 1) and slots (B, keep)."""
        query = self.query[:, self.t - self.keep:]
        return torch.arange(len(query), device=self.device)[:, None], (query % self.window if self.window else query).to(self.device)

    @functools.cached_property
    def mask(self):
        """(B, 1, t, keys): which keys of `attend_to` each query sees; None: all."""
        pos, query, window = self.pos, self.query, self.window
        if window and (self.t > 1 or self.empty):
            last = pos[:, None] - 1                                             # ring before writing, then the new tokens
            key = torch.cat((last - (last - torch.arange(window)) % window, query), 1)
        elif window:
            key = query - (query - torch.arange(window)) % window               # ring after writing one token
        else:
            key = torch.arange(self.n)[None]
        mask = (key[:, None] >= 0) & (key[:, None] <= query[:, :, None])        # (B, t, keys)
        if window:
            mask &= key[:, None] > query[:, :, None] - window
        return None if bool(mask.all()) else mask[:, None].to(self.device)

    def make_room(self, cache, k, v):
        """Makes the caches {'k', 'v'} hold n tokens; k, v (B, K, t, P) are like what will be written."""
        if cache['k'] is None or (not self.window and self.n > cache['k'].shape[2]):
            size = self.window or max(64, 1 << (self.n - 1).bit_length())
            for name, like in (('k', k), ('v', v)):
                new = like.new_zeros(like.shape[0], like.shape[1], size, like.shape[3])
                if cache[name] is not None:
                    new[:, :, :cache[name].shape[2]] = cache[name]
                cache[name] = new

    def attend(self, layer, x, rope, cache):
        """An Attention of one token of each sequence by native.cpp, which reads and writes the caches in place; None if it cannot."""
        if layer.head_dim % 16 or not ops.one_token(x, cache['k'], cache['v']):
            return None
        self.make_room(cache, cache['k'], cache['v'])
        cache.update({name: cache[name].contiguous() for name in 'kv'})
        return native.attention_step(x, rope, self.pos, layer, cache['k'], cache['v'])

    def attend_to(self, cache, k, v):
        """Write k, v (B, K, t, P) to the caches {'k', 'v'}; returns keys and values to attend to, of any length."""
        self.make_room(cache, k, v)
        out = []
        for name, new in (('k', k), ('v', v)):
            old, tail = cache[name], new[:, :, self.t - self.keep:].transpose(1, 2)
            if self.window and self.t > 1:  # writing would overwrite what the chunk's first tokens still see
                out.append(torch.cat((old.to(new.dtype), new), 2))
            rows, slots = self.places
            old[rows, :, slots] = tail.to(old.dtype)                            # indexed dims first: (B, t, K, P)
            if not (self.window and self.t > 1):
                out.append((old if self.window else old[:, :, :self.n]).to(new.dtype))
        return out


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions. x (B, T, D) → (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, P = config.n_embd, config.head_dim
        self.heads, self.head_dim, self.window, self.dropout = config.n_head, P, config.window, config.dropout
        self.q_proj = nn.Linear(D, config.n_head * P, bias=False)
        self.k_proj = nn.Linear(D, config.n_kv_head * P, bias=False)
        self.v_proj = nn.Linear(D, config.n_kv_head * P, bias=False)
        self.o_proj = nn.Linear(config.n_head * P, D, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(P, config.norm_eps), RMSNorm(P, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x, rope, plan=None, cache=None):
        """rope: of x's positions. plan, cache: a KVStep and {'k', 'v'}; without them x is a whole sequence."""
        B, T, _ = x.shape
        if plan is not None and (y := plan.attend(self, x, rope, cache)) is not None:
            return y
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                        # (B, T, H, P)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)                        # (B, T, K, P)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if plan is not None:
            keys, values = plan.attend_to(cache, k.transpose(1, 2), v.transpose(1, 2))
        if plan is None or plan.empty:                                          # a first chunk attends as in training
            return self.o_proj(attention(q, k, v, self.window, self.dropout if self.training else 0.0))
        if keys.shape[1] != q.shape[2]:                                         # each key head serves H/K query heads
            keys, values = (u.repeat_interleave(q.shape[2] // u.shape[1], dim=1) for u in (keys, values))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=plan.mask)  # (B, H, T, P)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def plan_attention(config, idx, state=None):
    """What the attention of every layer needs for idx (B, T), made once: rope tables, and with a state a KVStep."""
    T = idx.shape[1]
    plan = KVStep(state['pos'], T, config.window, idx.device) if state else None
    positions = plan.positions if plan else torch.arange(T, device=idx.device)
    return rope_tables(positions, config.head_dim, config.rope_theta), plan


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020). (B, T, D) → (B, T, D)."""

    def __init__(self, D, inner):
        super().__init__()
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x):
        if ops.one_token(x) and (y := native.mlp_step(x, self)) is not None:
            return y
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """E SwiGLUs, their matrices stacked. x (E, C, D), or (rows, D) sorted by expert, of each so many as `counts` says → x's shape."""

    def __init__(self, E, D, inner):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, D))          # rows [gate; up]
        self.down_proj = nn.Parameter(torch.empty(E, D, inner))

    def forward(self, x, counts=None):
        gate_up, down = self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype)
        if counts is None:
            product = torch.bmm
        elif x.is_cuda and x.dtype == torch.bfloat16 and x.shape[1] % 8 == down.shape[2] % 8 == 0:
            product = partial(torch._grouped_mm, offs=counts.cumsum(0, dtype=torch.int32))
        else:                                                                   # a GPU is waited for
            each = zip(x.split(counts.tolist()), gate_up.unbind(), down.unbind())
            return torch.cat([F.linear(swiglu(*F.linear(rows, a).chunk(2, -1)), b) for rows, a, b in each if len(rows)])
        return product(swiglu(*product(x, gate_up.mT).chunk(2, -1)), down.mT)


class MoE(nn.Module):
    """A router sends each token to k of E experts; the result is their sum by its weights. In training an expert takes C tokens at most.

    x (B, T, D) → (B, T, D), None or in training (loss, statistics): of balance and of large logits, scaled; (E + 1) int64, the
    token-expert pairs of each expert and, last, those of all that were dropped."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config.n_expert, config.n_embd, config.intermediate_size)

    def forward(self, x):
        c, (B, T, D) = self.config, x.shape
        n, E, k, device = B * T, c.n_expert, c.n_expert_active, x.device.type
        x = x.reshape(n, D)
        with torch.autocast(device, enabled=False):                             # rounding must not choose the expert
            logits = F.linear(x.float(), self.gate.weight.float())              # (n, E)
        probs = logits.softmax(-1)
        weights, chosen = probs.topk(k)                                         # (n, k)
        weights = weights / weights.sum(-1, keepdim=True)
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

        # the n k pairs, sorted by expert, an expert's by token: so the first tokens are sure of their places
        expert, order = chosen.flatten().sort(stable=True)
        token, weights = order // k, weights.flatten()[order]
        counts = expert.new_zeros(E).index_add(0, expert, torch.ones_like(expert))
        place = torch.arange(n * k, device=x.device) - (counts.cumsum(0) - counts)[expert]
        limit = self.training and c.capacity_factor > 0
        C = min(n, math.ceil(c.capacity_factor * n * k / E)) if limit else n
        kept = place < C
        if limit and not ops.use_native(x):                                 # fixed shapes: no GPU is waited for, and it compiles
            slot = torch.where(kept, expert * C + place, E * C)                 # one more, for all that is dropped
            source = (torch.arange(E * C + 1, device=x.device) % n).scatter(0, slot, token)[:-1]  # an empty slot works for nobody
            y = self.experts(x.index_select(0, source).view(E, C, D)).view(E * C, D)
            y, weights = y.index_select(0, slot.clamp(max=E * C - 1)), weights * kept
        else:
            token, weights = (token[kept], weights[kept]) if limit else (token, weights)
            y = self.experts(x.index_select(0, token), counts.clamp(max=C))
        y = torch.zeros_like(x).index_add(0, token, (y * weights[:, None]).to(x.dtype)).view(B, T, D)
        if not self.training:
            return y, None
        loss = c.aux_loss * E * (counts / (n * k) * probs.mean(0)).sum() + c.z_loss * logits.logsumexp(-1).square().mean()
        return y, (loss, torch.cat((counts, (counts - C).clamp(min=0).sum(0, keepdim=True))))


def added(x, drop, y):
    """x + drop(y), a residual step."""
    return native.add_step(x, y) if not drop.training and ops.one_token(x, y) else x + drop(y)


def optim_groups(model, weight_decay, muon=False):
    """Parameter groups for the optimizers: [{'kind', 'params', 'weight_decay'}], kind 'adamw' or 'muon'.

    Decay falls on matrices alone: never on norms, biases, A_log, D, dt_bias or learned scales. With `muon` the hidden
    matrices (the layers' *_proj weights) go to Muon (Jordan et al. 2024); embeddings, conv filters, routers and the rest stay on
    AdamW, and so do experts: torch's Muon takes no stacks of matrices."""
    groups = {('adamw', True): [], ('adamw', False): [], ('muon', True): []}
    rows = []                                                                   # of Muon's: a Mamba-2's in_proj is five matrices in one
    for name, p in model.named_parameters():  # tied weights come once
        if p.requires_grad:
            matrix = name.endswith(('.weight', '_proj')) and p.ndim >= 2        # experts are stacks without '.weight'
            kind = 'muon' if muon and matrix and '_proj.' in name else 'adamw'
            groups[kind, matrix].append(p)
            if kind == 'muon':
                rows.append(getattr(model.get_submodule(name.rpartition('.')[0]), 'rows', None))
    return [dict(kind=kind, weight_decay=weight_decay if decay else 0.0, params=params, **(dict(rows=rows) if kind == 'muon' else {}))
            for (kind, decay), params in groups.items() if params]


class LanguageModel(nn.Module):
    """The face all models share. A subclass provides `body`, `embedding`, `mixing_flops` and its parameters' names."""
    gradient_checkpointing = False  # True: training keeps only what goes into each layer, and computes the rest again for the gradient
    initial = None                  # a function of B: the state before the first token of so many sequences, where it is learned (adapters.py)

    def run(self, layer, state, *args):
        """layer(*args) for `body`, which has this state; by gradient checkpointing (Chen et al. 2016) if it is wanted."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not state:  # caches are written only once
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
        return layer(*args)

    def through(self, layers, x, state, *how):
        """layers(x, state, …) for `body`; a single token on a CPU takes native.py's short way."""
        if state and not self.training and ops.one_token(x):
            return native.layered(self, layers, x, state, *how)
        return layers(x, state, *how)

    def forward(self, idx, targets=None):
        """Training: idx (B, T) int64 → (logits (B, T, V), None), or with targets (B, T) → (None, mean loss in nats).

        Targets of -1 do not count. With targets the logits are never all in memory. In training the losses of routers are added."""
        x, _, *losses = self.body(idx, self.initial and self.initial(len(idx)))
        if targets is None:
            return self.lm_head(x), None
        return None, sum(losses, linear_cross_entropy(x, self.lm_head.weight, targets))

    @torch.no_grad()
    def step(self, idx, state=None, last=False):
        """Inference: idx (B, t ≥ 1) and the state after the tokens before it → (logits (B, t, V), state).

        Logits equal forward's, however the tokens are cut into steps; with `last` only the last token's are computed, (B, 1, V), which of
        a large vocabulary saves a third of the time that a prompt takes. The state is a flat dict of batch-first tensors:
        index, repeat, concatenate, save each to do so with the sequences. 'pos' (B,) counts each row's tokens and stays on
        the CPU. A step writes into the state it is given: clone it first to go on from the same place twice."""
        if state is None:
            state = {name: value.clone() for name, value in self.initial(len(idx)).items()} if self.initial else \
                {'pos': torch.zeros(len(idx), dtype=torch.long)}
        x, state, *_ = self.body(idx, dict(state))
        state['pos'] = state['pos'] + idx.shape[1]
        return self.lm_head(x[:, -1:] if last else x), state

    def num_params(self):
        """Trainable and frozen parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations a token of forward and backward, in sequences of T: 6 a weight of every matrix
        product, plus the mixing of tokens (attention counted causally, at the half it needs)."""
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.ndim == 2 and not n.endswith('A_log'))
        if self.lm_head.weight is not self.embedding().weight:
            matrices -= self.embedding().weight.numel()                         # an untied input embedding is a look-up
        return 6 * matrices + 3 * self.mixing_flops(T)

    def optim_groups(self, weight_decay, muon=False):
        return optim_groups(self, weight_decay, muon)

    def expert_load(self):
        """What the log says of the experts; None if there are none."""


# --- the model --------------------------------------------------------------------------------------------------------

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.sparse = config.n_expert > 0
        self.mlp = MoE(config) if self.sparse else SwiGLU(config.n_embd, config.intermediate_size)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope, plan=None, cache=None):
        x = added(x, self.drop, self.self_attn(self.input_layernorm(x), rope, plan, cache))
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if self.sparse else (y, None)
        return added(x, self.drop, y), routing


class GPT(LanguageModel):
    """See the top of the file; `forward`, `step` and the rest of the face are LanguageModel's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(Layer(config) for _ in range(config.n_layer)),
            norm=RMSNorm(config.n_embd, config.norm_eps),
        ))
        self.drop = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():  # GPT-2's: what is added to the residual stream shrinks with depth
            if p.ndim >= 2:
                residual = name.endswith(('o_proj.weight', 'down_proj.weight', 'down_proj'))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        if config.n_expert:                                                     # the sums of MoE's statistics, for expert_load
            self.register_buffer('routed', torch.zeros(config.n_layer, config.n_expert + 1, dtype=torch.long), persistent=False)

    def embedding(self):
        return self.model.embed_tokens

    def mixing_flops(self, T):
        c = self.config
        seen = min(T / 2, c.window or T)
        experts = 6 * c.n_embd * c.intermediate_size * c.n_expert_active if c.n_expert else 0  # only those a token goes to
        return c.n_layer * (4 * c.n_head * c.head_dim * seen + experts)

    def expert_load(self):
        """Over the training steps since the last call, in this process: {'expert_load_max', 'expert_load_min': token-expert pairs of the
        most and the least loaded expert of any layer, in even shares; 'dropped': the share of all pairs}. None without experts or steps."""
        routed = self.routed.cpu().double() if self.config.n_expert else torch.zeros(1)
        if not routed.any():
            return None
        self.routed.zero_()
        pairs = routed[:, :-1]
        load = pairs / pairs.mean(1, keepdim=True)                              # (n_layer, E)
        return dict(expert_load_max=load.max().item(), expert_load_min=load.min().item(),
                    dropped=(routed[:, -1].sum() / pairs.sum()).item())

    def body(self, idx, state=None):
        """idx (B, T) → normalised hidden states (B, T, D), and the state, whose caches are read and written; from routers in
        training also their losses."""
        rope, plan = plan_attention(self.config, idx, state)
        x, losses = self.drop(self.model.embed_tokens(idx)), []                 # (B, T, D)
        x = self.through(partial(self.layers, losses), x, state, rope, plan)
        return self.model.norm(x), state, *losses

    def layers(self, losses, x, state, rope, plan):
        for i, layer in enumerate(self.model.layers):
            cache = {n: state.get(f'{n}.{i}') for n in 'kv'} if state else None
            x, routing = self.run(layer, state, x, rope, plan, cache)
            if routing:
                losses.append(routing[0])
                self.routed[i] += routing[1]                                    # not in the layer, which may be computed twice
            if state:
                state[f'k.{i}'], state[f'v.{i}'] = cache['k'], cache['v']
        return x
