"""A model as one graph of plain tensor operations, for formats that keep a graph: ONNX (to_onnx.py) and TorchScript (to_torchscript.py).

    logits, present = Graph(net)(ids, Graph(net).empty(B))      # the state of `past` goes in, what it has become comes out
    logits = Whole(net)(ids)                                    # a whole sequence at once

The parameters and the modules that work on each token alone are the model's own. What has a state is here again, with nothing that
depends on data or is planned on the CPU, for any number B of sequences, t of new tokens and S of tokens in a key/value cache:

    ids (B, t) ──► embedding ──► layers: attend, scan, ssd ──► norm ──► logits (B, t, V)
                    past, a list of tensors ──┘   └──► present, the same list after these tokens

    position (1,) int64     tokens seen so far; only with a sliding window, whose caches do not tell it
    key, value (B, K, S, P) of each layer with attention; of a window the last tokens only. Keys are rotated
    conv (B, K-1, C)        of each layer with a Mamba: the last inputs of its convolution
    ssm                     the state of its recurrence: (B, N, E) of Mamba-1, (B, H, P, N) of Mamba-2

Letters of the shapes as in the models' files. Experts are all computed for all tokens, and weighted by the router: the same result.
`beside` runs what came of a graph and the model.
"""
import itertools
import statistics
import time
import types
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.weights import checkpoint
from mambino.kernels import portable
from model_gpt import apply_rope
from model_mamba import split_heads
from mambino.export.compare import agree, difference, greedy, silent


@contextmanager
def plain():
    """Within, silently, operations on a CPU are PyTorch's, not those of native.cpp, which no graph could hold."""
    with portable(), silent(), torch.no_grad():
        yield


# --- what has a state; in the part of Python that TorchScript knows ------------------------------------------------------

def smaller(a: int, b: int) -> int:
    if torch.jit.is_scripting():
        return min(a, b)
    return torch.sym_min(a, b)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, kept: int):
    """Queries (B, H, t, P) attend to a cache (B, K, S, P) and, causally, to the new k, v (B, K, t, P) → (B, H, t, P), new cache.
    window: so many last tokens each sees, itself included. kept: so many the new cache has at most; of both 0 is all."""
    keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)           # (B, K, n, P)
    B, K, n, P = keys.shape
    t = q.shape[2]
    j = torch.arange(n, device=q.device)
    i = j[n - t:, None]
    hidden = j > i
    if window > 0:
        hidden = hidden | (j <= i - window)
    q = q.reshape(B, K, q.shape[1] // K, t, P) * P ** -0.5                      # (B, K, H/K, t, P)
    weights = (q @ keys[:, :, None].transpose(3, 4)).masked_fill(hidden, -float('inf')).softmax(-1)
    y = (weights @ values[:, :, None]).flatten(1, 2)
    if kept > 0:
        start = n - smaller(n, kept)
        keys, values = keys[:, :, start:], values[:, :, start:]
    return y, keys, values


def scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, h: torch.Tensor):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t: Mamba-1's recurrence. x, dt (B, t, E), A (N, E), B, C (B, t, N),
    h (B, N, E) → y (B, t, E), last h."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return exported_scan(x, dt, A, B, C, h)
    ys: list[torch.Tensor] = []
    for i in range(x.shape[1]):
        h = torch.exp(dt[:, i, None] * A) * h + B[:, i, :, None] * (dt[:, i] * x[:, i])[:, None]
        ys.append((C[:, i, None] @ h)[:, 0])
    return torch.stack(ys, 1), h


def exported_scan(x, dt, A, B, C, h):
    """The same for torch.export, which would unroll the loop."""
    def step(h, now):
        u, dt, B, C = now
        h = torch.exp(dt[:, None] * A) * h + B[:, :, None] * u[:, None]
        return h, (C[:, None] @ h)[:, 0]
    h, y = torch._higher_order_ops.scan(step, h.contiguous(), tuple(u.transpose(0, 1) for u in (dt * x, dt, B, C)))
    return y.transpose(0, 1), h


def ssd(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, h: torch.Tensor, chunk: int):
    """The same with one A a head: Mamba-2's. x (B, t, H, P), dt (B, t, H), A (H), B, C (B, t, G, N), h (B, H, P, N) → y (B, t, H, P),
    last h. An exported graph has one chunk of all t tokens: chunks of symbolic sizes make an export take three times as long."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return ssd_chunk(x, dt, A, B, C, h)
    ys: list[torch.Tensor] = []
    for i in range(0, x.shape[1], chunk):
        y, h = ssd_chunk(x[:, i:i + chunk], dt[:, i:i + chunk], A, B[:, i:i + chunk], C[:, i:i + chunk], h)
        ys.append(y)
    return torch.cat(ys, 1), h


def ssd_chunk(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, h: torch.Tensor):
    """The products within a chunk, and with the state before it: Mamba-2 (Dao & Gu 2024), listing 1."""
    G, R, t = B.shape[2], A.shape[0] // B.shape[2], x.shape[1]                  # R heads a group
    sums = (dt.double() * A.double()).cumsum(1).transpose(1, 2)                 # (B, H, t); fp64: differences of large sums
    hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).float().masked_fill(hidden, -float('inf')).exp()  # (B, H, t, t): from j to i
    B, C = B.transpose(1, 2)[:, :, None], C.transpose(1, 2)[:, :, None]         # (B, G, 1, t, N)
    x = (x * dt[..., None]).transpose(1, 2).unflatten(1, (G, R))                # (B, G, R, t, P)
    y = (C @ B.transpose(3, 4) * decay.unflatten(1, (G, R))) @ x
    y = y + C @ h.unflatten(1, (G, R)).transpose(3, 4) * sums.float().exp().unflatten(1, (G, R))[..., None]
    to_end = (sums[..., -1:] - sums).float().exp().unflatten(1, (G, R))[..., None]
    added = (x * to_end).transpose(3, 4) @ B                                    # (B, G, R, P, N)
    return y.flatten(1, 2).transpose(1, 2), h * sums[..., -1].float().exp()[..., None, None] + added.flatten(1, 2)


# --- the parts of a layer -------------------------------------------------------------------------------------------------

def experts(moe, x):
    """All experts on all tokens, weighted by the router, whose weight is 0 for all but k. (B, t, D) → (B, t, D)."""
    probs = moe.gate(x).softmax(-1)
    weights, chosen = probs.topk(moe.config.n_expert_active)                    # (B, t, k)
    weights = torch.zeros_like(probs).scatter(-1, chosen, weights / weights.sum(-1, keepdim=True))
    gate, up = (x[:, None] @ moe.experts.gate_up_proj.mT).chunk(2, -1)          # (B, E, t, I)
    y = (F.silu(gate) * up) @ moe.experts.down_proj.mT                          # (B, E, t, D)
    return (y * weights.transpose(1, 2)[..., None]).sum(1)


def convolved(conv, x, past):
    """silu of the causal convolution of x (B, t, C) after past (B, K-1, C) → (B, t, C), new past."""
    whole = torch.cat((past, x), 1)
    return F.silu(F.conv1d(whole.mT, conv.weight, conv.bias, groups=conv.weight.shape[0]).mT), whole[:, x.shape[1]:]


class Graph(nn.Module):
    """ids (B, t) int64, past: a list as `names` and `empty` say → logits (B, t, V), present: the list to go on with.

    scripted: with the functions above as TorchScript keeps them, for torch.jit.trace; else for torch.export. Use it in `plain`."""

    def __init__(self, net, scripted=False):
        super().__init__()
        if net.initial_state:
            raise ValueError('a learned prefix is a state before the first token, which a graph cannot begin with; export the model '
                             'without it, or tune with LoRA, which is merged into the weights')
        self.net, self.c = net, net.config
        self.body = net.backbone if hasattr(net, 'backbone') else net.model
        attention = self.c.attention if hasattr(self.c, 'attention') else None if hasattr(self.c, 'version') else self.c
        self.window = self.kept = attention.window if attention else 0
        self.attends, self.recurs = attention is not None, attention is not self.c
        if attention:
            P = attention.head_dim
            self.register_buffer('inv_freq', attention.rope_theta ** (-torch.arange(0, P, 2, dtype=torch.float32) / P), persistent=False)
        as_is = torch.jit.script if scripted else lambda function: function
        self.attend, self.ssd, self.scan = (as_is(function) for function in (attend, ssd, scan))

    def names(self):
        """What the tensors of the list are called, in its order, where they go in and where they come out."""
        each = ['key', 'value'] * self.attends + ['conv', 'ssm'] * self.recurs
        all_ = [(i, name) for i in range(self.c.n_layer) for name in each]
        return tuple([f'{when}_position'] * bool(self.window) + [
            f'{cache}.{i}.{name}' if name in ('key', 'value') else f'{when}_{name}.{i}' for i, name in all_]
            for when, cache in (('past', 'past_key_values'), ('present', 'present')))

    def empty(self, B):
        """The list before the first token of B sequences."""
        past = [torch.zeros(1, dtype=torch.long)] * bool(self.window)
        for layer in self.body.layers:
            if self.attends:
                P = layer.self_attn.head_dim
                past += [torch.zeros(B, self.c.n_kv_head, 0, P)] * 2
            if self.recurs:
                mixer = layer.mamba if self.attends else layer.mixer
                C, _, K = mixer.conv1d.weight.shape
                N = (C - mixer.split[0]) // (2 * mixer.groups) if hasattr(mixer, 'groups') else mixer.split[1]
                past += [torch.zeros(B, K - 1, C),
                         torch.zeros(B, mixer.split[2], mixer.head_dim, N) if hasattr(mixer, 'groups') else torch.zeros(B, N, C)]
        return past

    def attention(self, module, x, rope, past, present):
        q, k, v = (proj(x).unflatten(-1, (-1, module.head_dim)) for proj in (module.q_proj, module.k_proj, module.v_proj))
        if module.qk_norm:
            q, k = module.q_norm(q), module.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        y, keys, values = self.attend(*(u.transpose(1, 2) for u in (q, k, v)), next(past), next(past), self.window, self.kept)
        present += [keys, values]
        return module.o_proj(y.transpose(1, 2).flatten(2))

    def mamba1(self, mixer, x, past, present):
        x, z = mixer.in_proj(x).chunk(2, dim=-1)                                # (B, t, E) each
        x, conv = convolved(mixer.conv1d, x, next(past))
        dt, B, C = mixer.x_proj(x).split(mixer.split, dim=-1)
        dt = F.softplus(mixer.dt_proj(dt) + mixer.dt_proj.bias)
        y, ssm = self.scan(x, dt, -mixer.A_log.exp().t().contiguous(), B, C, next(past))
        present += [conv, ssm]
        return mixer.out_proj((y + x * mixer.D) * F.silu(z))

    def mamba2(self, mixer, x, past, present):
        z, xBC, dt = mixer.in_proj(x).split(mixer.split, dim=-1)
        xBC, conv = convolved(mixer.conv1d, xBC, next(past))
        x, B, C = split_heads(xBC, dt.shape[-1], mixer.groups, mixer.head_dim)
        y, ssm = self.ssd(x, F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp(), B, C, next(past), mixer.chunk_size)
        present += [conv, ssm]
        return mixer.out_proj(mixer.norm((y + x * mixer.D[:, None]).flatten(2), z))

    def layer(self, layer, x, rope, past, present):
        if not self.attends:
            mixer = self.mamba1 if self.c.version == 1 else self.mamba2
            return x + mixer(layer.mixer, layer.norm(x), past, present)
        h = layer.input_layernorm(x)
        attended = self.attention(layer.self_attn, h, rope, past, present)
        if not self.recurs:
            x = x + attended
            h = layer.post_attention_layernorm(x)
            return x + (experts(layer.mlp, h) if layer.sparse else layer.mlp(h))
        outputs = [self.mamba2(layer.mamba, h, past, present), attended]
        if layer.parallel:
            return x + layer.residual_scale * layer.mix(h, outputs + [layer.mlp(h)])
        x = x + layer.residual_scale * layer.mix(h, outputs)
        y = layer.mlp(layer.pre_mlp_layernorm(x))
        return x + layer.mlp_residual_scale * (y if layer.mlp_norm is None else layer.mlp_norm(y))

    def forward(self, ids, past):
        t, before, rope, present = ids.shape[1], iter(past), None, []
        if self.attends:
            seen = next(before) if self.window else past[0].shape[2]
            if self.window:
                present.append(seen + t)
            positions = torch.arange(t, device=ids.device) + seen
            angles = positions.float()[:, None, None] * self.inv_freq           # (t, 1, P/2)
            rope = angles.cos(), angles.sin()
        x = self.net.embedding()(ids)                                           # (B, t, D)
        if 'embed_norm' in self.body:
            x = self.body['embed_norm'](x)
        for layer in self.body.layers:
            x = self.layer(layer, x, rope, before, present)
        x = (self.body.norm_f if 'norm_f' in self.body else self.body.norm)(x)
        return self.net.lm_head(x), present


class Whole(nn.Module):
    """ids (B, T) int64 → logits (B, T, V)."""

    def __init__(self, net):
        super().__init__()
        self.steps = Graph(net)                                                 # `graph` is a name that torch.export needs itself
        self.steps.kept = 0                                                     # nobody reads the caches, and all sizes are simple

    def forward(self, ids):
        past = self.steps.empty(1)
        return self.steps(ids, [u if u.dtype == torch.long else u.expand(ids.shape[0], *u.shape[1:]) for u in past])[0]


def example(graph):
    """(ids, past) to export a graph with: no size that may change is 0 or 1."""
    cached = [torch.zeros(*u.shape[:2], 7, u.shape[3]) if u.ndim == 4 and not u.numel() else u for u in graph.empty(3)]
    return torch.zeros(3, 5, dtype=torch.long), cached


def metadata(net, tok):
    """What a program that has only the file wants to know of the model: names and values, all strings."""
    kind = next(kind for kind, (model, _) in checkpoint.MODELS.items() if type(net) is model)
    found = {'window': 0, **checkpoint.config_of(net), 'kind': kind, 'eot': tok.eot if tok else ''}
    return {name: str(value) for name, value in found.items()}


# --- what came of it ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def beside(net, tok, start, step, whole, n=64):
    """The model and what came of its graphs: `step(ids, past)` → (logits, present) with `start(B)` for the past of no tokens, and
    `whole(ids)` → logits. → dict(logits: the largest difference, in shares of the largest logit if that is above 1; greedy: '64 of 64';
    same: whether all are; note: the time of a token)."""
    draw = torch.Generator().manual_seed(0)
    V, off = net.config.vocab_size, []
    for B, T in ((1, 1), (2, 5), (3, 83), (1, max(300, min(getattr(net.config, 'window', 0), 2000) + 9))):
        ids = torch.randint(V, (B, T), generator=draw)
        want, past, parts = net.step(ids)[0], start(B), []
        pieces = [3, 1, 1, 20, 1, 40, 1, T]                                     # some tokens at once, and one by one
        for end, size in zip(itertools.accumulate(pieces), pieces):
            piece = ids[:, end - size:end]
            if piece.shape[1]:
                logits, past = step(piece, past)
                parts.append(logits)
        off += [difference(got, want) / max(1.0, want.abs().max().item()) for got in (torch.cat(parts, 1), whole(ids))]
    prompt, texts, times = ids[0, :8].tolist(), [], []
    for begin, run in ((lambda B: None, net.step), (start, step)):
        times.append([])
        texts.append(greedy(types.SimpleNamespace(step=timed(run, begin, times[-1])), prompt, n, tok.vocab_size if tok else V))
    ours, theirs = (1000 * statistics.median(some[1:]) for some in times)
    return dict(logits=max(off), greedy=agree(*texts), same=texts[0] == texts[1],
                note=f'a token takes {theirs:.2f} ms there, {ours:.2f} ms here; logits are compared in shares of the largest')


def timed(step, start, times):
    """A step that begins with `start` and writes down its seconds."""
    def run(ids, state):
        began = time.perf_counter()
        result = step(ids, start(len(ids)) if state is None else state)
        times.append(time.perf_counter() - began)
        return result
    return run
