"""Mambino's Mamba-3 for transformers, which has no such class.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer('Once upon a time', return_tensors='pt'), max_new_tokens=100)

It is plain PyTorch, made to be read; parameters have Mambino's names and shapes, the mixers' are
those of state-spaces/mamba. A layer computes x + mixer(norm(x)), and where it has an MLP then
x + mlp(norm2(x)).

B batch, T time, Q tokens of a chunk, D width, E inner width, H heads, P head size, G groups, N state
size, R columns of B and C (more than one: MIMO), A angles."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MambinoMambaConfig(PretrainedConfig):
    model_type = 'mambino_mamba'
    attribute_map = dict(hidden_size='n_embd', num_hidden_layers='n_layer',
                         max_position_embeddings='block_size')
    fields = dict(version=3, block_size=1024, vocab_size=256, n_layer=2, n_embd=64,
                  intermediate_size=0, state_size=128, expand=2, head_dim=64, n_groups=1,
                  chunk_size=64, mimo_rank=1, rope_fraction=0.5, head_norm=False, norm_eps=1e-5)

    def __init__(self, tie_word_embeddings=True, **settings):
        for name, default in self.fields.items():
            setattr(self, name, settings.pop(name, default))
        self.inner_size = self.expand * self.n_embd
        super().__init__(tie_word_embeddings=tie_word_embeddings, **settings)


class State:
    """The tokens so far, of each layer: ssm (B, H, P, N), turn (B, H, A), and of the last token
    last_b (B, R, H, N), last_x (B, H, P)."""
    is_compileable = is_croppable = False                       # generate() asks

    def __init__(self, n_layer):
        self.seen, self.layers = 0, [{} for _ in range(n_layer)]
        self.is_padded = False                                  # after the text: then nothing can follow

    def get_seq_length(self, layer=0):
        return self.seen

    def reorder_cache(self, rows):
        """Beam search: row i goes on from what was row rows[i]."""
        self.layers = [{name: u[rows.to(u.device)] for name, u in layer.items()}
                       for layer in self.layers]


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


def exact(a):
    """fp64, where the device has it: sums of many small angles and logarithms."""
    return a.to(torch.float32 if a.device.type == 'mps' else torch.float64)


def rotate(v, turn, interleaved):
    """v (..., N), of whose channels A pairs are turned by turn (..., A): (2i, 2i + 1), or (i, i + N/2)."""
    shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    first, second = v.unflatten(-1, shape).unbind(pair)         # (..., N/2) each
    A, cos, sin = turn.shape[-1], turn.cos(), turn.sin()
    a, b = first[..., :A], second[..., :A]
    first = torch.cat((a * cos - b * sin, first[..., A:]), -1)
    second = torch.cat((a * sin + b * cos, second[..., A:]), -1)
    return torch.stack((first, second), pair).flatten(-2)


class Mamba3(nn.Module):
    """The exponential-trapezoidal rule (Lahoti et al. 2026, prop. 4), R_t a turn of pairs of channels:

        h_t = exp(dt A) R_t (h_{t-1} + (1 - trap) dt B_{t-1} x_{t-1}) + trap dt B_t x_t
        y_t = C_t h_t + D x_t

    B and C are turned instead, by the sum of all turns so far. And a token's two parts come at once:
    later ones see it with a weight that has what the next one will add of it, itself by trap dt."""

    def __init__(self, c):
        super().__init__()
        D, E, P, N, R = c.n_embd, c.inner_size, c.head_dim, c.state_size, c.mimo_rank
        H = E // P
        self.H, self.columns, self.interleaved = H, (R, c.n_groups, N), R == 1
        self.chunk_size = max(1, c.chunk_size // R)             # tokens
        RGN, A = R * c.n_groups * N, int(N * c.rope_fraction) // 2
        self.rows = [E, E, RGN, RGN, H, H, H, A]                # z; x; B; C; dt; A; trap; angles
        self.in_proj = nn.Linear(D, sum(self.rows), bias=False)
        self.dt_bias, self.D = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.ones(H))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(H, R, N)) for _ in 'BC')
        self.B_norm, self.C_norm = (RMSNorm(N, c.norm_eps) for _ in 'BC')
        self.mimo_x = self.mimo_z = self.mimo_o = self.norm = None
        if R > 1:
            mimo = (nn.Parameter(torch.ones(H, R, P)) for _ in 'xzo')
            self.mimo_x, self.mimo_z, self.mimo_o = mimo
        if c.head_norm:
            self.norm = RMSNorm(E, c.norm_eps, H)
        self.out_proj = nn.Linear(E, D, bias=False)

    def in_columns(self, u, mimo):
        """u (B, T, H, P) times its factors of each column → (B, T, R, H, P)."""
        u = u[:, :, None]
        return u if mimo is None else u * mimo.float().transpose(0, 1)

    def forward(self, x, real, state):
        """x (B, T, D) → (B, T, D). real (B, T, 1): 0 at padding, which leaves the state; or 1."""
        dtype, rows = x.dtype, self.in_proj(x * real).split(self.rows, -1)
        z, x, B, C, dt, A, trap, angles = (u.float() for u in rows)
        z, x = (u.unflatten(-1, (self.H, -1)) for u in (z, x))              # (B, T, H, P)
        B, C = (u.unflatten(-1, self.columns) for u in (B, C))              # (B, T, R, G, N)
        dt = F.softplus(dt + self.dt_bias) * real                           # (B, T, H)
        A = A.clamp(min=0) + 1 / (1 + F.relu(-A))                           # 1 + A; below zero 1 / (1 - A)
        turns = math.pi * angles.tanh()[:, :, None] * dt[..., None]         # (B, T, H, A)
        y = self.recurrence(x, self.B_norm(B), self.C_norm(C), dt, -dt * A.clamp(min=1e-4),
                            trap.sigmoid(), turns, state)
        if self.norm is not None:
            y = self.norm(y.flatten(-2)).view_as(y)
        y = y * F.silu(self.in_columns(z, self.mimo_z))                     # (B, T, R, H, P)
        if self.mimo_o is not None:
            y = y * self.mimo_o.float().transpose(0, 1)
        return self.out_proj(y.sum(2).flatten(2).to(dtype))

    def recurrence(self, x, B, C, dt, decay, trap, turns, state):
        """x (B, T, H, P), B, C (B, T, R, G, N), dt, decay, trap (B, T, H), turns (B, T, H, A) →
        y (B, T, R, H, P)."""
        now, before = trap * dt, (1 - trap) * dt                            # (B, T, H)
        weight = now + F.pad(before[:, 1:], (0, 0, 0, 1))                   # the last one's next is not there yet
        x, last_x = self.in_columns(x, self.mimo_x), x[:, -1]               # (B, T, R, H, P)
        if 'ssm' in state:
            turn = state['turn']
            last = self.in_columns(state['last_x'][:, None], self.mimo_x)[:, 0]
            added = torch.einsum('brhp,brhn->bhpn', last, state['last_b'])
            h = state['ssm'] + before[:, 0, :, None, None] * added
        else:
            turn = exact(turns[:, 0] * 0)
            h = x.new_zeros(len(x), self.H, x.shape[-1], B.shape[-1])
        ys, inputs = [], (x, B, C, now, weight, decay, turns)
        for chunk in zip(*(u.split(self.chunk_size, 1) for u in inputs)):
            y, h, turn, last_b = self.chunk(*chunk, h, turn)
            ys.append(y)
        state.update(ssm=h, turn=turn, last_b=last_b, last_x=last_x)
        return torch.cat(ys, 1)

    def chunk(self, x, B, C, now, weight, decay, turns, h, turn):
        """Q tokens of the same, h (B, H, P, N), turn (B, H, A) → y, h, turn, B of the last token.
        Of all tokens at once B and C of each head would be far larger than all else."""
        angles = (turn[:, None] + exact(turns).cumsum(1)) % math.tau        # (B, Q, H, A)
        B, C = (self.turned(u, bias, angles) for u, bias in ((B, self.B_bias), (C, self.C_bias)))
        a = exact(decay).cumsum(1)                                          # (B, Q, H) logarithm of the decay so far
        own = torch.eye(a.shape[1], device=a.device)
        hidden = torch.ones_like(own).bool().triu()
        seen = (a[:, :, None] - a[:, None]).masked_fill(hidden[:, :, None], -torch.inf)
        seen = seen.exp().float() * weight[:, None] + now[:, None] * own[:, :, None]    # (B, Q, Q, H)
        scores = torch.einsum('bthrn,bshun->bhtrsu', C.transpose(2, 3), B.transpose(2, 3))
        scores = scores * seen.permute(0, 3, 1, 2)[:, :, :, None, :, None]
        y = torch.einsum('bhtrsu,bsuhp->btrhp', scores, x) + self.D.float()[:, None] * x
        from_start = a.exp().float()[:, :, None, :, None]
        y = y + torch.einsum('btrhn,bhpn->btrhp', C, h) * from_start
        to_end = (a[:, -1:] - a).exp().float() * weight
        added = torch.einsum('bsrhp,bsrhn->bhpn', x * to_end[:, :, None, :, None], B)
        return y, a[:, -1].exp().float()[..., None, None] * h + added, angles[:, -1], B[:, -1]

    def turned(self, u, bias, angles):
        """u (B, Q, R, G, N), bias (H, R, N), angles (B, Q, H, A) → (B, Q, R, H, N)."""
        u = u.repeat_interleave(self.H // u.shape[3], 3) + bias.float().transpose(0, 1)
        return rotate(u, angles[:, :, None].float(), self.interleaved)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(GradientCheckpointingLayer):
    def __init__(self, c):
        super().__init__()
        self.norm, self.mixer, self.mlp = RMSNorm(c.n_embd, c.norm_eps), Mamba3(c), None
        if c.intermediate_size:
            self.norm2, self.mlp = RMSNorm(c.n_embd, c.norm_eps), MLP(c)

    def forward(self, x, real, state):
        if self.gradient_checkpointing and self.training:
            state = dict(state)                                 # it is computed twice, from the same one
        x = x + self.mixer(self.norm(x), real, state)
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class MambinoMambaPreTrainedModel(PreTrainedModel):
    config_class, base_model_prefix = MambinoMambaConfig, 'backbone'
    _no_split_modules = ['Layer']
    _is_stateful = supports_gradient_checkpointing = True       # a state cannot be cut to fewer tokens


class MambinoMambaModel(MambinoMambaPreTrainedModel):
    """The model without its head: hidden states, for AutoModel."""

    def __init__(self, c):
        super().__init__(c)
        self.embeddings = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layer))
        self.norm_f = RMSNorm(c.n_embd, c.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, embeddings):
        self.embeddings = embeddings

    def real(self, attention_mask, T, state):
        """Which new tokens are real (B, T, 1), or 1 for all."""
        if attention_mask is None:
            return 1
        if (n := attention_mask.shape[1]) != state.seen + T:
            raise ValueError(f'attention_mask covers {n} tokens; it must cover all {state.seen + T}, '
                             'old and new')
        real = attention_mask.bool()
        if T > 1:
            is_last = real[:, :-1] & ~real[:, 1:]               # of a text, before padding
            if bool((is_last.cumsum(1)[:, :-1] * real[:, 2:]).any()):
                raise ValueError('attention_mask has padding within a text; this model reads texts '
                                 'without gaps')
            state.is_padded = bool(is_last.any())
        return real[:, state.seen:, None]

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None,
                position_ids=None, **_):
        """input_ids (B, T), after those of past_key_values → hidden states (B, T, D)."""
        if position_ids is not None:
            raise ValueError('position_ids: this model knows none; several texts in one row would run '
                             'together')
        state = State(len(self.layers)) if past_key_values is None else past_key_values
        if state.is_padded:
            raise ValueError('padding after the text is in the state: to go on from it, pad on the '
                             'left, padding_side="left"')
        real = self.real(attention_mask, input_ids.shape[1], state)
        x = self.embeddings(input_ids)                          # (B, T, D)
        for layer, layer_state in zip(self.layers, state.layers):
            x = layer(x, real, layer_state)
        state.seen += input_ids.shape[1]
        keep = not self.training if use_cache is None else use_cache
        keep = keep and not (self.training and self.layers[0].gradient_checkpointing)
        return BaseModelOutputWithPast(self.norm_f(x), past_key_values=state if keep else None)


class Generates:
    """What a model with a head makes of its body, whose State cannot be cut to fewer tokens."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False                                            # forward makes a State of its own

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None,
                                      use_cache=True, **_):
        seen = past_key_values.seen if past_key_values is not None else 0
        if not seen and attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError('padding after the text: to generate, pad on the left, '
                             'padding_side="left"')
        return dict(input_ids=input_ids[:, seen:], past_key_values=past_key_values,
                    attention_mask=attention_mask, use_cache=use_cache, logits_to_keep=1)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, position_ids=None, **others):
        """input_ids (B, T), after those of past_key_values → logits (B, T, V), or the last ones'."""
        body = getattr(self, self.base_model_prefix)
        out = body(input_ids, attention_mask, past_key_values, use_cache, position_ids)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss, logits, past_key_values=out.past_key_values)


class MambinoMambaForCausalLM(Generates, MambinoMambaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {'lm_head.weight': 'backbone.embeddings.weight'}

    def __init__(self, c):
        super().__init__(c)
        self.backbone = MambinoMambaModel(c)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.post_init()
