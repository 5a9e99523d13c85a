"""A model as one graph of tensor operations, for formats that keep a graph: to_onnx,
to_torchscript.

    logits, present = Graph(net)(ids, Graph(net).empty(B))      # a step: past in, present out
    logits = FullGraph(net)(ids)                                # a whole sequence at once

What is computed are the model's own layers, called as its `step` calls them. A graph cannot hold
what depends on data or is planned on the CPU, so for any number B of sequences, t of new tokens and
S of tokens in a cache there are here anew:

    caches of keys and values   grow by concatenation; cache.KVStep plans them
    attention                   reads a key head once for all the query heads that it serves
    scans                       with loops that stay loops, see graph_scans.py
    MoE                         every expert computes every token; how many are its own depends on data

    ids (B, t) ──► embedding ──► layers ──► norm ──► logits (B, t, V)
             past, a list of tensors ──┘└──► present, the same list after these tokens

    position (1,) int64   tokens seen so far; only with a sliding window, whose caches do not tell it
    k, v (B, G, S, P)     of each layer with attention; of a window the last tokens. Keys are rotated
    conv (B, K-1, E)      of each layer with a Mamba or DeltaNet: the last inputs of its convolution
    ssm                   the state of its recurrence: (B, N, E) of Mamba-1, else (B, H, P, N)
    turn (B, H, A) fp64   of a Mamba-3, which has no conv: the sum of all turns; of the last token
    last_b, last_x        (B, R, H, N), (B, H, P)

Letters of the shapes as in the models' files.
"""
import copy

import torch
import torch.nn as nn

from mambino.export.classes import check_modules, kind_of, look_up
from mambino.export.graph_scans import delta_scan, mamba3_scan, selective_scan, ssd
from mambino.export.special_tokens import special_tokens
from mambino.kernels import substituted
from mambino.language_model import swiglu
from mambino.weights import checkpoint
from model_gpt import GPT, MoE, rope_frequencies
from model_hybrid import Hybrid
from model_mamba import Mamba, Mamba3Mixer

TOOL = 'a graph'
NAMES = {   # of a layer's state: what it is called where it goes in, and where it comes out
    'k': ('past_key_values.{}.key', 'present.{}.key'),
    'v': ('past_key_values.{}.value', 'present.{}.value'),
    'conv': ('past_conv.{}', 'present_conv.{}'),
    'ssm': ('past_ssm.{}', 'present_ssm.{}'),
    'turn': ('past_turn.{}', 'present_turn.{}'),
    'last_b': ('past_last_b.{}', 'present_last_b.{}'),
    'last_x': ('past_last_x.{}', 'present_last_x.{}'),
}


# --- attention ------------------------------------------------------------------------------------

def attention(q, k, v, window=0, dropout=0.0, mask=None):
    """See model_gpt.attention; a mask there must be, window and dropout may not."""
    G, P = k.shape[2:]
    R = q.shape[2] // G                                                         # queries' heads of a key's
    q = (q * P ** -0.5).transpose(1, 2).unflatten(1, (G, R))                    # (B, G, R, t, P)
    k, v = (u.transpose(1, 2)[:, :, None] for u in (k, v))                      # (B, G, 1, S, P)
    weights = torch.where(mask, q @ k.transpose(3, 4), -torch.inf).softmax(-1)  # (B, G, R, t, S)
    return (weights @ v).flatten(1, 2).transpose(1, 2).flatten(2)               # (B, t, H P)


# --- caches ---------------------------------------------------------------------------------------

class Caches:
    """What cache.KVStep is to attention, for a graph: t new tokens after S in caches (B, G, S, P),
    which grow by concatenation.

    window: so many last tokens each token sees, itself included. kept: so many the new caches hold
    at most. Of both 0 is all."""
    is_first = False    # attend to the caches, be they empty

    def __init__(self, t, S, window, kept, device):
        self.kept = kept
        j = torch.arange(S + t, device=device)
        i = j[S:, None]
        seen = j <= i
        if window:
            seen = seen & (j > i - window)
        self.mask = seen[None, None]                                            # (1, 1, t, S + t)

    def append(self, cache, k, v):
        """Puts k, v (B, t, G, P) behind the caches {'k', 'v'} → keys and values (B, S + t, G, P) to
        attend to."""
        keys = torch.cat((cache['k'], k.transpose(1, 2)), 2)
        values = torch.cat((cache['v'], v.transpose(1, 2)), 2)
        cache['k'], cache['v'] = self.last(keys), self.last(values)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def last(self, tokens):
        """Of tokens (B, G, n, P) what the next step may see."""
        if not self.kept:
            return tokens
        if torch.compiler.is_exporting():                                       # which must know a number
            n = tokens.shape[2]
            return tokens[:, :, n - torch.sym_min(n, self.kept):]
        return tokens[:, :, -self.kept:]


# --- experts --------------------------------------------------------------------------------------

class EveryExpert(nn.Module):
    """MoE, by all experts on all tokens, weighted by the router, whose weight is 0 for all but k.
    x (B, t, D) → (B, t, D), None."""

    def __init__(self, moe):
        super().__init__()
        self.k = moe.config.n_expert_active
        self.norm_topk = moe.config.norm_topk
        self.gate = moe.gate
        self.experts = moe.experts

    def forward(self, x):
        probs = self.gate(x).softmax(-1)                                        # (B, t, experts)
        weights, chosen = probs.topk(self.k)                                    # (B, t, k)
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = torch.zeros_like(probs).scatter(-1, chosen, weights)          # (B, t, experts)
        gate_up = x @ self.experts.gate_up_proj.flatten(0, 1).T                 # (B, t, experts 2I)
        gate, up = gate_up.unflatten(-1, (weights.shape[-1], -1)).chunk(2, -1)
        h = swiglu(gate, up) * weights[..., None]                               # (B, t, experts, I)
        return h.flatten(2) @ self.experts.down_proj.mT.flatten(0, 1), None     # which sums, too


class Apart(nn.Module):
    """A linear as two, of which one computes its last rows: those are no matrix to round."""

    def __init__(self, linear, rows):
        super().__init__()
        rounded, scalars = linear.weight.split((len(linear.weight) - rows, rows))
        self.rounded, self.scalars = (nn.Linear(1, 1, bias=False) for _ in range(2))
        self.rounded.weight, self.scalars.weight = nn.Parameter(rounded), nn.Parameter(scalars)

    def forward(self, x):
        return torch.cat((self.rounded(x), self.scalars(x)), -1)


def as_a_graph(net):
    """A copy of the model, with the same parameters, whose MoE are EveryExpert, and the projections
    into its Mamba-3 Apart."""
    net = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is MoE:
                setattr(module, name, EveryExpert(child))
        if type(module) is Mamba3Mixer:
            scalars = sum(module.split[4:])                                     # dt, A, trap, angles
            if type(module.in_proj) is nn.Linear:
                module.in_proj = Apart(module.in_proj, scalars)
            else:
                module.in_proj.up = Apart(module.in_proj.up, scalars)
    return net


# --- the graph ------------------------------------------------------------------------------------

def gpt_hidden_states(net, ids, state, rope, caches):
    x = net.model.embed_tokens(ids)                                             # (B, t, D)
    for i, layer in enumerate(net.model.layers):
        x, _ = net.run_layer(i, layer, state, x, rope, caches)
    return net.model.norm(x)


def mamba_hidden_states(net, ids, state, rope, caches):
    return net.hidden_states(ids, state)[0]


def hybrid_hidden_states(net, ids, state, rope, caches):
    x = net.embed(ids)                                                          # (B, t, D)
    for i, layer in enumerate(net.model.layers):
        x = net.run_layer(i, layer, state, x, rope, caches)
    return net.model.norm(x)


HIDDEN_STATES = {GPT: gpt_hidden_states, Mamba: mamba_hidden_states, Hybrid: hybrid_hidden_states}


class Graph(nn.Module):
    """ids (B, t) int64, past: a list as `names` and `empty` say → logits (B, t, V), present: the
    list to go on with.

    scripted: with loops as TorchScript keeps them, for torch.jit.trace; else for torch.export.
    ValueError for a model with parts that have not been seen here."""

    def __init__(self, net, scripted=False):
        super().__init__()
        check_modules(net, TOOL)
        if net.initial_state:
            raise ValueError('a learned prefix is a state before the first token, which a graph cannot '
                             'begin with; export the model without it, or tune with LoRA, which is '
                             'merged into the weights')
        self.net = as_a_graph(net)
        self.hidden_states = look_up(HIDDEN_STATES, net, TOOL)
        _, state = net.step(torch.zeros(1, 1, dtype=torch.long))
        del state['pos']
        # {'conv.0': (K-1, E), …}, in the order of the list
        self.sizes = {name: u.shape[1:] for name, u in state.items()}
        self.dtypes = {name: u.dtype for name, u in state.items()}
        self.first_cache = next((name for name in state if name.startswith('k.')), '')
        self.attends = bool(self.first_cache)
        self.window = net.config.window if self.attends else 0
        self.kept = self.window
        if self.attends:
            config = getattr(net, 'attention', net.config)                      # of a hybrid
            self.amplitude = config.rope_amplitude
            # another library's power would round otherwise
            self.register_buffer('inv_freq', rope_frequencies(config), persistent=False)
        loops = dict(selective_scan=selective_scan, ssd=ssd, mamba3_scan=mamba3_scan, delta_scan=delta_scan)
        if scripted:
            loops = {name: torch.jit.script(loop) for name, loop in loops.items()}
        self.operations = dict(loops, attention=attention)

    def names(self):
        """What the tensors of the list are called, in its order, where they go in and where they
        come out."""
        past = ['past_position'] if self.window else []
        present = ['present_position'] if self.window else []
        for name in self.sizes:
            part, _, i = name.partition('.')
            past_name, present_name = NAMES[part]
            past.append(past_name.format(i))
            present.append(present_name.format(i))
        return past, present

    def empty(self, B):
        """The list before the first token of B sequences."""
        past = [torch.zeros(1, dtype=torch.long)] if self.window else []
        for name, size in self.sizes.items():
            if name[0] in 'kv':
                G, _, P = size
                size = G, 0, P
            past.append(torch.zeros(B, *size, dtype=self.dtypes[name]))
        return past

    def forward(self, ids, past):
        t = ids.shape[1]
        past = list(past)
        present = []
        seen = past.pop(0) if self.window else None
        state = dict(zip(self.sizes, past))
        rope = caches = None
        if self.attends:
            S = state[self.first_cache].shape[2]
            if self.window:
                present.append(seen + t)
            positions = torch.arange(t, device=ids.device) + (seen if self.window else S)
            angles = positions.float()[:, None, None] * self.inv_freq           # (t, 1, P/2)
            rope = angles.cos() * self.amplitude, angles.sin() * self.amplitude
            caches = Caches(t, S, self.window, self.kept, ids.device)
        with substituted(**self.operations):
            logits = self.net.lm_head(self.hidden_states(self.net, ids, state, rope, caches))
        return logits, present + [state[name] for name in self.sizes]


class FullGraph(nn.Module):
    """ids (B, T) int64 → logits (B, T, V)."""

    def __init__(self, net):
        super().__init__()
        self.steps = Graph(net)     # `graph` is a name that torch.export needs itself
        self.steps.kept = 0         # nobody reads the caches, and all sizes are simple

    def forward(self, ids):
        past = self.steps.empty(1)
        past = [u if u.dtype == torch.long else u.expand(ids.shape[0], *u.shape[1:]) for u in past]
        return self.steps(ids, past)[0]


def example(graph):
    """(ids, past) to export a graph with: no size that may change is 0 or 1."""
    past = [u if u.numel() else u.new_zeros(*u.shape[:2], 7, u.shape[3]) for u in graph.empty(3)]
    return torch.zeros(3, 5, dtype=torch.long), past


def metadata(net, tok):
    """What a program that has only the file wants to know of the model: names and values, all
    strings."""
    values = {'window': 0, **checkpoint.config_of(net)}
    values |= {'kind': kind_of(net), 'eot': tok.eot if tok else ''}
    if tok and tok.bos:
        values['bos'] = ' '.join(map(str, tok.bos))     # what every text begins with
    if tok and tok.config.get('chat_template'):         # of a model that knows conversations
        values['chat_template'] = tok.config['chat_template']
        values['ends'] = ' '.join(map(str, special_tokens(tok, net.config.vocab_size).ends()))
    return {name: str(value) for name, value in values.items()}
