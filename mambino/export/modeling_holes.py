"""Mambino's models that fill holes (masked diffusion) for transformers, which has no such class.

    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(ids).logits                      # a hole in ids is model.config.mask_token_id
    model.generate(ids)                             # ids with their holes filled
    model.generate(ids, max_new_tokens=100, sampler='ancestral', steps=20)

It is plain PyTorch, made to be read; parameters have Mambino's names and shapes. With objective='masked' each token
sees all of a text, before it and behind it; with 'block' its own block and those before it, of which a State is kept.

    body='gpt'      x + attention(norm(x)), then x + mlp(norm(x))
    body='mamba'    x + mixer(norm(x)), a Mamba-2 that reads in both directions, perhaps an MLP as above
    body='hybrid'   x + scale * sum_b gate_b(x) norm_b(branch_b(norm(x))), b over such a Mamba-2 and attention, with
                    layout='parallel' the MLP too, which else has a step of its own

B batch, T time, K tokens of a block, D width, E inner width, H heads, G key heads or groups, P head size, N state
size, S keys, V vocabulary."""
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MambinoHolesConfig(PretrainedConfig):
    model_type = 'mambino_holes'
    attribute_map = dict(hidden_size='n_embd', num_hidden_layers='n_layer', num_attention_heads='n_head',
                         max_position_embeddings='block_size')
    fields = dict(
        body='gpt', objective='masked', block_length=0, block_size=1024, vocab_size=256, n_layer=2, n_embd=64,
        shifted=False,              # a token is spoken of by what the one before it sees
        mask_token_id=255,          # what stands for a hole, the last id
        text_size=255,              # ids from there on stand for no text, and are never drawn
        intermediate_size=192, norm_eps=1e-5, low_rank=0,
        # attention; rope_frequencies: by how much a position turns each pair of a head's numbers (P/2)
        n_head=4, n_kv_head=4, head_dim=16, window=0, qk_norm=False, qk_norm_whole=False, attention_gate=False,
        qkv_bias=False, o_bias=False, mlp_bias=False, rope_frequencies=[1.0] * 8, rope_amplitude=1.0, rope_layers='',
        norm_after=False, n_expert=0, n_expert_active=2, norm_topk=True,
        # Mamba-2
        state_size=16, inner_size=128, n_groups=1, conv_kernel=4, chunk_size=64, share_projections=True,
        # hybrid
        layers='', layout='sequential', gate=True, branch_norm=True, embed_norm=False, ssm_inner_size=128,
        ssm_head_dim=16, gated_norm=True)

    def __init__(self, tie_word_embeddings=True, **settings):
        for name, default in self.fields.items():
            setattr(self, name, settings.pop(name, default))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **settings)


class State(NamedTuple):
    """What is kept of the blocks so far. It never changes: what is read after it makes another one."""
    seen: int       # tokens
    layers: list    # of each layer a dict: k, v (B, S, G, P); conv (B, taps - 1, E + 2GN), ssm (B, H, P, N)
    last: torch.Tensor = None       # (B, 1, D) what the last token sees


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over each of so many groups of the last dimension, in fp32."""

    def __init__(self, dim, eps, groups=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.groups = eps, groups

    def forward(self, x):
        y = x.float().unflatten(-1, (self.groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y.flatten(-2) * self.weight).to(x.dtype)


def projection(c, inner, outer, bias=False):
    if not c.low_rank:
        return nn.Linear(inner, outer, bias=bias)
    return nn.Sequential(OrderedDict(down=nn.Linear(inner, c.low_rank, bias=False),
                                     up=nn.Linear(c.low_rank, outer, bias=False)))


def rotate(x, cos, sin):
    """Rotary positions; pairs are (i, i + P/2), as in Llama. x (B, T, H, P), cos, sin (T, 1, P/2)"""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        D, P, H, G = c.n_embd, c.head_dim, c.n_head, c.n_kv_head
        self.config = c
        self.turns = not c.rope_layers or c.rope_layers[i % len(c.rope_layers)] == '1'
        self.q_proj, self.o_proj = projection(c, D, H * P, c.qkv_bias), projection(c, H * P, D, c.o_bias)
        self.k_proj, self.v_proj = (projection(c, D, G * P, c.qkv_bias) for _ in 'kv')
        self.g_proj = projection(c, D, H * P) if c.attention_gate else None
        if c.qk_norm:
            self.q_norm = RMSNorm(H * P if c.qk_norm_whole else P, c.norm_eps)
            self.k_norm = RMSNorm(G * P if c.qk_norm_whole else P, c.norm_eps)

    def forward(self, x, rope, mask, cache):
        """x (B, T, D) → (B, T, D); mask (B or 1, 1, T, S) over the cache's keys and the new ones."""
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.qk_norm and c.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (u.unflatten(-1, (-1, c.head_dim)) for u in (q, k, v))        # (B, T, H or G, P)
        if c.qk_norm and not c.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.turns:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if 'k' in cache:
            k, v = torch.cat((cache['k'], k), 1), torch.cat((cache['v'], v), 1)
        cache.update(k=k, v=v)
        k, v = (u.repeat_interleave(c.n_head // c.n_kv_head, 2) for u in (k, v))
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.o_proj(y if self.g_proj is None else y * self.g_proj(x).sigmoid())


def ssd(x, dt, A, B, C, state, chunk_size):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, by chunks (Mamba-2, Dao & Gu 2024).
    x (B, T, H, P), dt (B, T, H), A (H), B, C (B, T, H, N), state (B, H, P, N) → y like x, state."""
    ys, chunks = [], zip(*(u.split(chunk_size, 1) for u in (x, dt, B, C)))
    for x, dt, B, C in chunks:
        a = (dt * A).cumsum(1)                                  # (B, Q, H) logarithm of the decay so far
        later = torch.ones(a.shape[1], a.shape[1], dtype=torch.bool, device=a.device).triu(1)
        between = (a[:, :, None] - a[:, None]).masked_fill(later[:, :, None], -torch.inf)
        weights = torch.einsum('bthn,bshn->btsh', C, B) * between.exp() * dt[:, None]
        y = torch.einsum('btsh,bshp->bthp', weights, x)
        ys.append(y + torch.einsum('bthn,bhpn->bthp', C, state) * a.exp()[..., None])
        left = x * ((a[:, -1:] - a).exp() * dt)[..., None]      # of each token, at the end of the chunk
        state = a[:, -1].exp()[..., None, None] * state + torch.einsum('bshp,bshn->bhpn', left, B)
    return torch.cat(ys, 1), state


class Mamba2(nn.Module):
    """One direction; without projections it has those of the other one."""

    def __init__(self, c, has_projections=True):
        super().__init__()
        E, P = (c.inner_size, c.head_dim) if c.body == 'mamba' else (c.ssm_inner_size, c.ssm_head_dim)
        GN = c.n_groups * c.state_size
        self.config, self.H = c, E // P
        self.rows, self.parts = [E, E + 2 * GN, self.H], [E, GN, GN]
        self.in_proj = projection(c, c.n_embd, sum(self.rows)) if has_projections else None     # rows [z; x, B, C; dt]
        self.conv1d = nn.Conv1d(E + 2 * GN, E + 2 * GN, c.conv_kernel, groups=E + 2 * GN)
        self.dt_bias, self.A_log = (nn.Parameter(torch.zeros(self.H)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = RMSNorm(E, c.norm_eps, c.n_groups) if c.gated_norm else nn.Identity()
        self.out_proj = projection(c, E, c.n_embd) if has_projections else None

    def recur(self, u, real, cache):
        """u (B, T, …) of in_proj → (B, T, E). real (B or 1, T, 1): 0 at padding, which leaves the state."""
        c, before = self.config, self.config.conv_kernel - 1
        z, xBC, dt = (u * real.to(u.dtype)).split(self.rows, -1)
        xBC = torch.cat((cache.get('conv', xBC.new_zeros(len(xBC), before, xBC.shape[-1])), xBC), 1)
        cache['conv'] = xBC[:, xBC.shape[1] - before:]
        xBC = F.silu(self.conv1d(xBC.mT).mT).float()
        dt = F.softplus(dt.float() + self.dt_bias) * real       # (B, T, H)
        x, B, C = xBC.split(self.parts, -1)
        x = x.unflatten(-1, (self.H, -1))                       # (B, T, H, P)
        B, C = (v.unflatten(-1, (c.n_groups, -1)).repeat_interleave(self.H // c.n_groups, 2) for v in (B, C))
        ssm = cache.get('ssm', x.new_zeros(len(x), self.H, x.shape[-1], c.state_size))
        y, cache['ssm'] = ssd(x, dt, -self.A_log.float().exp(), B, C, ssm, c.chunk_size)
        y = (y + self.D[:, None] * x).flatten(2) * F.silu(z.float())    # (B, T, E)
        return self.norm(y).to(u.dtype)


def both_ways(mixer, back, x, real, cache):
    """What `mixer` makes of x (B, T, D), going on from the cache, plus what `back` makes of it from the last token to
    the first, beginning anew (Sahoo et al. 2024)."""
    u = mixer.in_proj(x)
    v = u if back.in_proj is None else back.in_proj(x)
    y = mixer.recur(u, real, cache)
    z = back.recur(v.flip(1), real.flip(1), {}).flip(1)
    return mixer.out_proj(y + z) if back.out_proj is None else mixer.out_proj(y) + back.out_proj(z)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (projection(c, c.n_embd, c.intermediate_size, c.mlp_bias) for _ in range(2))
        self.down_proj = projection(c, c.intermediate_size, c.n_embd, c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Each token goes to a few MLPs that a router chooses; none is ever full."""

    def __init__(self, c):
        super().__init__()
        D, inner = c.n_embd, c.intermediate_size
        self.config = c
        self.gate = nn.Linear(D, c.n_expert, bias=False)
        self.experts = nn.ParameterDict(dict(
            gate_up_proj=nn.Parameter(torch.zeros(c.n_expert, 2 * inner, D)),   # rows [gate; up]
            down_proj=nn.Parameter(torch.zeros(c.n_expert, D, inner))))

    def forward(self, x):
        rows = x.flatten(0, 1)                                  # (n, D)
        probs = F.linear(rows.float(), self.gate.weight.float()).softmax(-1)
        weights, chosen = probs.topk(self.config.n_expert_active)       # (n, k)
        if self.config.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for e in range(self.config.n_expert):
            row, place = (chosen == e).nonzero(as_tuple=True)
            gate, up = F.linear(rows[row], self.experts['gate_up_proj'][e]).chunk(2, -1)
            part = F.linear(F.silu(gate) * up, self.experts['down_proj'][e])
            y = y.index_add(0, row, (part * weights[row, place, None]).to(y.dtype))
        return y.view_as(x)


class GPTLayer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.norm_after = c.norm_after                          # norms behind attention and MLP, not before
        if not c.norm_after:
            self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c, i)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MoE(c) if c.n_expert else MLP(c)
        if c.norm_after:
            self.post_feedforward_layernorm = RMSNorm(c.n_embd, c.norm_eps)

    def forward(self, x, rope, mask, real, cache):
        if self.norm_after:
            x = x + self.post_attention_layernorm(self.self_attn(x, rope, mask, cache))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MambaLayer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.mixer, self.back = Mamba2(c), Mamba2(c, not c.share_projections)
        self.norm2 = RMSNorm(c.n_embd, c.norm_eps) if c.intermediate_size else None
        self.mlp = MLP(c) if c.intermediate_size else None

    def forward(self, x, rope, mask, real, cache):
        x = x + both_ways(self.mixer, self.back, self.norm(x), real, cache)
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class HybridLayer(nn.Module):
    """Of Mamba-2 ('m' in c.layers), of attention ('a'), or of both ('b')."""

    def __init__(self, c, i):
        super().__init__()
        kind = ((c.layers or 'b') * c.n_layer)[i]
        self.parallel = c.layout == 'parallel'
        branches = (kind != 'a') + (kind != 'm') + self.parallel
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.mamba = self.back = None
        if kind != 'a':
            self.mamba, self.back = Mamba2(c), Mamba2(c, not c.share_projections)
        self.self_attn = Attention(c, i) if kind != 'm' else None
        self.mlp = MLP(c)
        Norm = RMSNorm if c.branch_norm else nn.Identity
        self.branch_norms = nn.ModuleList(Norm(c.n_embd, c.norm_eps) for _ in range(branches))
        self.controller = nn.Linear(c.n_embd, branches) if c.gate and branches > 1 else None
        self.residual_scale = nn.Parameter(torch.ones(c.n_embd))
        if not self.parallel:
            self.pre_mlp_layernorm = RMSNorm(c.n_embd, c.norm_eps)
            self.mlp_norm = Norm(c.n_embd, c.norm_eps)
            self.mlp_residual_scale = nn.Parameter(torch.ones(c.n_embd))

    def forward(self, x, rope, mask, real, cache):
        h = self.input_layernorm(x)
        outputs = [] if self.mamba is None else [both_ways(self.mamba, self.back, h, real, cache)]
        if self.self_attn is not None:
            outputs.append(self.self_attn(h, rope, mask, cache))
        if self.parallel:
            outputs.append(self.mlp(h))
        outputs = [norm(y) for norm, y in zip(self.branch_norms, outputs)]
        if self.controller is None:
            mixed = sum(outputs) / len(outputs)
        else:
            weights = self.controller(h).float().softmax(-1).to(x.dtype)    # (B, T, branches)
            mixed = sum(weights[..., i, None] * y for i, y in enumerate(outputs))
        x = x + self.residual_scale * mixed
        return x if self.parallel else x + self.mlp_residual_scale * self.mlp_norm(self.mlp(self.pre_mlp_layernorm(x)))


class MambinoHolesPreTrainedModel(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa = MambinoHolesConfig, 'model', True
    _no_split_modules = ['GPTLayer', 'MambaLayer', 'HybridLayer']


class MambinoHolesModel(MambinoHolesPreTrainedModel):
    """The model without its head: hidden states, for AutoModel."""

    def __init__(self, c):
        super().__init__(c)
        Layer = dict(gpt=GPTLayer, mamba=MambaLayer, hybrid=HybridLayer)[c.body]
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.embed_norm = RMSNorm(c.n_embd, c.norm_eps) if c.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        """input_ids (B, T), in blocks after those of past_key_values → hidden states (B, T, D)."""
        K, state = self.config.block_length, past_key_values or State(0, [{}] * self.config.n_layer)
        if not K:
            if state.seen:
                raise ValueError('past_key_values: this model reads a text at once, without a state')
            return BaseModelOutputWithPast(self.read(input_ids, state, attention_mask)[0])
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError('attention_mask has padding, which would move the blocks: give texts of one length')
        if state.seen % K:
            raise ValueError(f'past_key_values end after {state.seen} tokens: more follows only whole blocks, of {K}')
        xs = []
        for block in input_ids.split(K, 1):
            x, state = self.read(block, state)
            xs.append(x)
        return BaseModelOutputWithPast(torch.cat(xs, 1), past_key_values=state)

    def read(self, ids, state, attention_mask=None):
        """ids (B, T) that see all of each other → hidden states (B, T, D), the state after them."""
        c, device, T = self.config, ids.device, ids.shape[1]
        real = torch.ones(1, T, device=device) if attention_mask is None else attention_mask.float()
        cached = max([layer['k'].shape[1] for layer in state.layers if 'k' in layer], default=0)
        query, key = torch.arange(T, device=device)[:, None], torch.arange(-cached, T, device=device)
        reach = c.window or (c.block_size if c.block_length else cached + T)
        near = (query - key).abs() < reach                      # (T, S), counted from the first new token
        mask = near & F.pad(real, (cached, 0), value=1)[:, None].bool() | (query == key)    # padding sees itself
        angles = (state.seen + query)[..., None] * torch.tensor(c.rope_frequencies, device=device)
        rope = angles.cos() * c.rope_amplitude, angles.sin() * c.rope_amplitude     # (T, 1, P/2), padding may shift it
        x, layers = self.embed_norm(self.embed_tokens(ids)), []
        for layer, cache in zip(self.layers, state.layers):
            cache = dict(cache)
            x = layer(x, rope, mask[:, None], real[..., None], cache)
            kept = {name: u[:, max(0, u.shape[1] - reach + 1):] for name, u in cache.items() if name in 'kv'}
            layers.append(cache | kept if c.block_length else {})
        x = self.norm(x)
        before = x[:, :1] if state.last is None else state.last
        told = torch.cat((before, x[:, :-1]), 1) if c.shifted else x
        return told, State(state.seen + T, layers, x[:, -1:])


class MambinoHolesForMaskedLM(MambinoHolesPreTrainedModel):
    _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}

    def __init__(self, c):
        super().__init__(c)
        self.model = MambinoHolesModel(c)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        """input_ids (B, T) with holes → logits (B, T, V) of what stands at each place; in blocks after those of
        past_key_values, and past_key_values after these, which should have no holes."""
        out = self.model(input_ids, attention_mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=0, sampler='first', steps=0, temperature=1.0,
                 generator=None):
        """input_ids (B, T) with their holes filled, and with max_new_tokens so many more → (B, T + new).

        A hole of input_ids is never the end of the text; what is new may be, and behind it is padding.
        sampler         'first': one hole after another, in random order, which is exactly the model's distribution
                        'confidence': of what is drawn for all holes, the likeliest are kept
                        'ancestral': each at a time of its own, many at once near the end (Shi et al. 2024)
        steps           of a window, or of a block; 0: one a hole. With fewer, several holes are filled at once
        temperature     0: the likeliest token
        generator       a torch.Generator on the CPU, for texts that are the same again"""
        c, T = self.config, input_ids.shape[1]
        if sampler not in ('first', 'confidence', 'ancestral'):
            raise ValueError(f'sampler={sampler!r} must be first, confidence or ancestral')
        if min(steps, temperature, max_new_tokens) < 0:
            raise ValueError(f'steps={steps}, temperature={temperature}, max_new_tokens={max_new_tokens}: 0 or more')
        if not max_new_tokens and not bool((input_ids == c.mask_token_id).any()):
            raise ValueError(f'input_ids has no hole, {c.mask_token_id}, to be filled: say max_new_tokens to go on')
        ids = F.pad(input_ids.cpu(), (0, max_new_tokens), value=c.mask_token_id)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = F.pad(real.cpu(), (0, max_new_tokens), value=1).bool()
        for row, is_real in zip(ids, real):
            given = int(is_real[:T].sum())
            for text in self.fill(row[is_real], given, sampler, steps, temperature, generator):
                row[is_real] = text
        return ids.to(input_ids.device)

    def fill(self, ids, given, sampler='first', steps=0, temperature=1.0, generator=None):
        """Yields ids (T,) of one text, on the CPU, with fewer holes each time: block after block, or by windows, of
        which at least half is what was there before, if there is so much. Behind the first `given` it may end."""
        c, state, start = self.config, None, 0
        size = c.block_length or c.block_size
        ends = torch.tensor([] if c.eos_token_id is None else c.eos_token_id, dtype=torch.long).flatten()
        is_end = torch.isin(torch.arange(c.vocab_size), ends)   # (V,)
        while bool((ids[start:] == c.mask_token_id).any()):
            if not c.block_length:
                first = int((ids == c.mask_token_id).nonzero()[0])
                start = max(0, min(first - size // 2, len(ids) - size))
            piece, places = ids[start:start + size], torch.arange(size)
            # one that is too short stands at the beginning of holes that stay: so it was learned
            z = F.pad(piece, (0, size - len(piece)), value=c.mask_token_id)
            holes = (z == c.mask_token_id) & (places < len(piece))
            never = (torch.arange(c.vocab_size) >= c.text_size) | is_end & (places + start < given)[:, None]    # (K, V)
            for filled in self.uncover(z, holes, never, state, sampler, steps, temperature, generator):
                ids = ids.clone()
                ids[start:start + size] = filled[:len(piece)]
                is_filled = (ids != c.mask_token_id).cumprod(0).bool()          # up to the first hole
                over = (is_end[ids] & is_filled)[given:].nonzero()[:, 0]
                if len(over):
                    ids[given + int(over[0]) + 1:] = ends[0] if c.pad_token_id is None else c.pad_token_id
                yield ids
                if len(over):
                    return
            if c.block_length:
                state = self.model(ids[None, start:start + size].to(self.device), None, state).past_key_values
                start += size

    def uncover(self, z, holes, never, state, sampler, steps, temperature, generator):
        """Yields z (K,), after a state, with fewer of the holes (K,) each time; never drawn is what is so named (K, V).
        All is drawn in fp64: in fp32 what is rare would be cut off (Zheng et al. 2025)."""
        steps, step, scores = steps or int(holes.sum()), 0, None
        times = [math.cos(math.pi / 2 * i / steps) for i in range(steps)] + [0.0]   # from 1 to 0
        while bool(holes.any()):
            if scores is None:                                  # (K, V) of z as it is
                scores = self(z[None].to(self.device), None, state).logits[0].cpu().double()
                scores = scores.masked_fill(never, -torch.inf)
            hidden = holes.nonzero()[:, 0]                      # (n,)
            ids = scores[hidden].argmax(-1)
            if temperature > 0:
                weights = (scores[hidden] - scores[hidden].amax(-1, keepdim=True)) / temperature
                sums = weights.exp().cumsum(-1)                 # (n, V)
                u = torch.rand(len(hidden), generator=generator, dtype=torch.float64).clamp(max=1 - 2 ** -52)
                ids = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)[:, 0]
            n = math.ceil(len(hidden) / max(1, steps - step))
            if sampler == 'first':
                chosen = torch.randperm(len(hidden), generator=generator)[:n]
            elif sampler == 'confidence':
                chosen = scores[hidden].softmax(-1).gather(1, ids[:, None])[:, 0].topk(n).indices
            else:
                t, s = times[min(step, steps - 1):][:2]
                u = torch.rand(len(hidden), generator=generator, dtype=torch.float64)
                chosen = (u < (t - s) / t).nonzero()[:, 0]
            step += 1
            if len(chosen):
                z, holes, scores = z.clone(), holes.clone(), None
                z[hidden[chosen]], holes[hidden[chosen]] = ids[chosen], False
                yield z
