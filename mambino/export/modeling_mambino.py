"""Mambino's hybrid of Mamba-2 or -3, attention and SwiGLU for transformers, which has no such class.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer('Once upon a time', return_tensors='pt'), max_new_tokens=100)

It is plain PyTorch, made to be read; parameters have Mambino's names and shapes. A layer computes

    layout='parallel'    x + scale * sum_b gate_b(x) norm_b(branch_b(norm(x))), b over SSM, attention, MLP
    layout='sequential'  the same with SSM and attention alone, then an MLP in a residual step of its own
    layers='mmab'        … of the SSM (m), of attention (a), or of both (b), layer by layer; '' is all b

B batch, T time, D width, E inner width, H heads, K key/value heads, P head size, G groups, N state size, S keys."""
from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .modeling_delta import GatedDeltaNet
from .modeling_mamba3 import Generates, Mamba3, RMSNorm


class MambinoConfig(PretrainedConfig):
    model_type = 'mambino_hybrid'
    attribute_map = dict(hidden_size='n_embd', num_hidden_layers='n_layer', num_attention_heads='n_head',
                         num_key_value_heads='n_kv_head', max_position_embeddings='block_size')
    fields = dict(layout='sequential', gate=True, branch_norm=True, low_rank=0, block_size=1024, vocab_size=256,
                  n_layer=2, n_embd=64, n_head=4, n_kv_head=4, head_dim=16, window=0, qk_norm=False,
                  rope_theta=10000.0, intermediate_size=192, norm_eps=1e-5, state_size=16, expand=2,
                  ssm_head_dim=16, n_groups=1, conv_kernel=4, chunk_size=64, layers='', embed_norm=True,
                  ssm_inner_size=0, gated_norm=True, rope_dim=0, version=2, mimo_rank=1, rope_fraction=0.5,
                  key_heads=0, delta_max=1.0, attention_gate=False)

    def __init__(self, tie_word_embeddings=True, **settings):
        for name, default in self.fields.items():
            setattr(self, name, settings.pop(name, default))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **settings)


class State:
    """The tokens so far, of each layer: conv (B, K-1, E+2GN), ssm (B, H, P, N), k, v (B, K, S, P)."""
    is_compileable = is_croppable = False                                       # generate() asks

    def __init__(self, n_layer):
        self.seen, self.layers = 0, [{} for _ in range(n_layer)]
        self.is_padded = False                                  # after the text: then nothing can follow

    def get_seq_length(self, layer=0):
        return self.seen

    def reorder_cache(self, rows):
        """Beam search: row i goes on from what was row rows[i]."""
        self.layers = [{name: u[rows.to(u.device)] for name, u in layer.items()} for layer in self.layers]


def projection(c, inner, outer):
    if not c.low_rank:
        return nn.Linear(inner, outer, bias=False)
    return nn.Sequential(OrderedDict(down=nn.Linear(inner, c.low_rank, bias=False),
                                     up=nn.Linear(c.low_rank, outer, bias=False)))


def ssd(x, dt, A, B, C, state, chunk_size):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, by chunks (Mamba-2, Dao & Gu 2024).

    x (B, T, H, P), dt (B, T, H), A (H), B, C (B, T, H, N), state (B, H, P, N) → y like x, state."""
    ys, chunks = [], zip(*(u.split(chunk_size, 1) for u in (x, dt, B, C)))
    for x, dt, B, C in chunks:
        a = (dt * A).cumsum(1)                                  # (B, T, H) logarithm of the decay so far
        later = torch.ones(a.shape[1], a.shape[1], dtype=torch.bool, device=a.device).triu(1)
        between = (a[:, :, None] - a[:, None]).masked_fill(later[:, :, None], -torch.inf)
        weights = torch.einsum('bthn,bshn->btsh', C, B) * between.exp() * dt[:, None]
        y = torch.einsum('btsh,bshp->bthp', weights, x)
        ys.append(y + torch.einsum('bthn,bhpn->bthp', C, state) * a.exp()[..., None])
        left = x * ((a[:, -1:] - a).exp() * dt)[..., None]      # of each token, at the end of the chunk
        state = a[:, -1].exp()[..., None, None] * state + torch.einsum('bshp,bshn->bhpn', left, B)
    return torch.cat(ys, 1), state


class Mamba2(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, E, GN = c.n_embd, c.ssm_inner_size or c.expand * c.n_embd, c.n_groups * c.state_size
        self.config, self.H = c, E // c.ssm_head_dim
        self.rows, self.parts = [E, E + 2 * GN, self.H], [E, GN, GN]
        self.in_proj = projection(c, D, sum(self.rows))         # rows [z; x, B, C; dt]
        self.conv1d = nn.Conv1d(E + 2 * GN, E + 2 * GN, c.conv_kernel, groups=E + 2 * GN)
        self.dt_bias, self.A_log = (nn.Parameter(torch.zeros(self.H)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = RMSNorm(E, c.norm_eps, c.n_groups) if c.gated_norm else nn.Identity()
        self.out_proj = projection(c, E, D)

    def forward(self, x, real, state):
        """x (B, T, D) → (B, T, D). real (B, T, 1): 0 at padding, which leaves the state as it is; or 1."""
        c, before = self.config, self.config.conv_kernel - 1
        z, xBC, dt = self.in_proj(x * real).split(self.rows, -1)
        xBC = torch.cat((state.get('conv', xBC.new_zeros(len(x), before, xBC.shape[-1])), xBC), 1)
        state['conv'] = xBC[:, xBC.shape[1] - before:]
        xBC = F.silu(self.conv1d(xBC.mT).mT).float()
        dt = F.softplus(dt.float() + self.dt_bias) * real       # (B, T, H)
        x, B, C = xBC.split(self.parts, -1)
        x = x.unflatten(-1, (self.H, -1))                       # (B, T, H, P)
        B, C = (u.unflatten(-1, (c.n_groups, -1)).repeat_interleave(self.H // c.n_groups, 2) for u in (B, C))
        ssm = state.get('ssm', x.new_zeros(len(x), self.H, c.ssm_head_dim, c.state_size))
        y, state['ssm'] = ssd(x, dt, -self.A_log.float().exp(), B, C, ssm, c.chunk_size)
        y = (y + self.D[:, None] * x).flatten(2) * F.silu(z.float())    # (B, T, E)
        return self.out_proj(self.norm(y).to(z.dtype))


def mamba3(c):
    """Mamba-3's mixer, with norms of its heads, by the hybrid's settings and in its projections."""
    settings = vars(c) | dict(head_dim=c.ssm_head_dim, inner_size=c.ssm_inner_size, head_norm=True)
    mixer = Mamba3(SimpleNamespace(**settings))
    mixer.in_proj = projection(c, c.n_embd, sum(mixer.rows))
    mixer.out_proj = projection(c, c.ssm_inner_size, c.n_embd)
    return mixer


def rotate(x, cos, sin):
    """Rotary positions; pairs are (i, i + P/2), as in Llama. x (B, T, H, P)"""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, P = c.n_embd, c.head_dim
        self.config = c
        self.q_proj, self.o_proj = projection(c, D, c.n_head * P), projection(c, c.n_head * P, D)
        self.k_proj, self.v_proj = (projection(c, D, c.n_kv_head * P) for _ in 'kv')
        Norm = RMSNorm if c.qk_norm else nn.Identity
        self.q_norm, self.k_norm = Norm(P, c.norm_eps), Norm(P, c.norm_eps)
        self.g_proj = projection(c, D, c.n_head * P) if c.attention_gate else None

    def forward(self, x, rope, mask, state):
        """x (B, T, D) → (B, T, D); mask (B or 1, 1, T, S) over the state's keys and the new ones."""
        c, P = self.config, self.config.head_dim
        q, k, v = (f(x).unflatten(-1, (-1, P)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)     # (B, T, H or K, P)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        if 'k' in state:
            k, v = torch.cat((state['k'], k), 2), torch.cat((state['v'], v), 2)
        first = max(0, k.shape[2] - c.window + 1) if c.window else 0    # the next sees window - 1
        state['k'], state['v'] = k[:, :, first:], v[:, :, first:]
        k, v = (u.repeat_interleave(c.n_head // c.n_kv_head, 1) for u in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.o_proj(y if self.g_proj is None else y * self.g_proj(x).sigmoid())


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (projection(c, c.n_embd, c.intermediate_size) for _ in range(2))
        self.down_proj = projection(c, c.intermediate_size, c.n_embd)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(GradientCheckpointingLayer):
    def __init__(self, c, kind):
        super().__init__()
        self.parallel = c.layout == 'parallel'
        branches = (kind != 'a') + (kind in 'ab') + self.parallel
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        recurrences = dict(a=lambda c: None, d=lambda c: GatedDeltaNet(c, projection))
        self.mamba = recurrences.get(kind, mamba3 if c.version == 3 else Mamba2)(c)
        self.self_attn = Attention(c) if kind in 'ab' else None
        self.mlp = MLP(c)
        Norm = RMSNorm if c.branch_norm else nn.Identity
        self.branch_norms = nn.ModuleList(Norm(c.n_embd, c.norm_eps) for _ in range(branches))
        self.controller = nn.Linear(c.n_embd, branches) if c.gate and branches > 1 else None
        self.residual_scale = nn.Parameter(torch.ones(c.n_embd))
        if not self.parallel:
            self.pre_mlp_layernorm = RMSNorm(c.n_embd, c.norm_eps)
            self.mlp_norm = Norm(c.n_embd, c.norm_eps)
            self.mlp_residual_scale = nn.Parameter(torch.ones(c.n_embd))

    def forward(self, x, rope, mask, real, state):
        if self.gradient_checkpointing and self.training:
            state = dict(state)                                 # it is computed twice, each time from the same state
        h = self.input_layernorm(x)
        outputs = [] if self.mamba is None else [self.mamba(h, real, state)]
        if self.self_attn is not None:
            outputs.append(self.self_attn(h, rope, mask, state))
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


class MambinoPreTrainedModel(PreTrainedModel):
    config_class, base_model_prefix, _no_split_modules = MambinoConfig, 'model', ['Layer']
    _supports_sdpa = _is_stateful = supports_gradient_checkpointing = True      # a state cannot be cut to fewer tokens


class MambinoModel(MambinoPreTrainedModel):
    """The model without its head: hidden states, for AutoModel."""

    def __init__(self, c):
        super().__init__(c)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.embed_norm = RMSNorm(c.n_embd, c.norm_eps) if c.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Layer(c, kind) for kind in ((c.layers or 'b') * c.n_layer)[:c.n_layer])
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.post_init()

    def masks(self, attention_mask, T, state, device):
        """What attention may see (B or 1, 1, T, S); which new tokens are real (B, T, 1), or 1 for all."""
        cached = max([layer['k'].shape[2] for layer in state.layers if 'k' in layer], default=0)
        query = torch.arange(T, device=device)[:, None]         # counted from the first new token
        key = torch.arange(-cached, T, device=device)
        mask = key <= query                                     # (T, S)
        mask &= key > query - (self.config.window or cached + T)
        if attention_mask is None:
            return mask[None, None], 1
        if (n := attention_mask.shape[1]) != state.seen + T:
            raise ValueError(f'attention_mask covers {n} tokens; it must cover all {state.seen + T}, old and new')
        real = attention_mask.bool()
        if T > 1:
            is_last = real[:, :-1] & ~real[:, 1:]               # of a text, before padding
            if bool((is_last.cumsum(1)[:, :-1] * real[:, 2:]).any()):
                raise ValueError('attention_mask has padding within a text; this model reads texts without gaps')
            state.is_padded = bool(is_last.any())
        mask = mask & real[:, None, -mask.shape[1]:] | (key == query)   # padding sees itself, not nothing
        return mask[:, None], real[:, state.seen:, None]

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, position_ids=None, **_):
        """input_ids (B, T), after those of past_key_values → hidden states (B, T, D)."""
        if position_ids is not None:
            raise ValueError('position_ids: this model counts itself; several texts in one row would run together')
        c, T = self.config, input_ids.shape[1]
        state = State(c.n_layer) if past_key_values is None else past_key_values
        if state.is_padded:
            raise ValueError('padding after the text is in the state: to go on from it, pad on the left, '
                             'padding_side="left"')
        mask, real = self.masks(attention_mask, T, state, input_ids.device)
        n = c.rope_dim or c.head_dim                            # numbers of a head that turn
        exponents = -torch.arange(0, n, 2, device=input_ids.device).float() / n
        inv_freq = c.rope_theta ** exponents if c.rope_theta else 0 * exponents     # 0: no positions
        inv_freq = F.pad(inv_freq, (0, (c.head_dim - n) // 2))
        angles = torch.arange(state.seen, state.seen + T, device=input_ids.device).float()[:, None, None] * inv_freq
        rope = angles.cos(), angles.sin()                       # (T, 1, P/2); padding may shift all
        x = self.embed_norm(self.embed_tokens(input_ids))       # (B, T, D)
        for layer, layer_state in zip(self.layers, state.layers):
            x = layer(x, rope, mask, real, layer_state)
        state.seen += T
        keep = not self.training if use_cache is None else use_cache
        keep = keep and not (self.training and self.layers[0].gradient_checkpointing)
        return BaseModelOutputWithPast(self.norm(x), past_key_values=state if keep else None)


class MambinoForCausalLM(Generates, MambinoPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}

    def __init__(self, c):
        super().__init__(c)
        self.model = MambinoModel(c)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.post_init()
