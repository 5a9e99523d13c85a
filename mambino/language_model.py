"""What every model is: RMSNorm, SwiGLU, the loss, and the face that training and generation know.

    logits, loss = net(idx, targets)              # training; the logits are never all in memory
    logits, state = net.step(idx, state)          # generation: a prompt at once, or by tokens

    idx ──► hidden_states: embedding ──► layers ──► norm ──► lm_head ──► logits, or the loss
                                state, of a step ──┘

Letters of the shapes: B batch, T time, D model width, V vocabulary.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mambino.blocks import speaking
from mambino.kernels import fast

# kinds of devices that have autocast; asked here, since the compiler of torch 2.11 cannot ask in a graph
AUTOCAST = {kind for kind in ('cpu', 'cuda', 'mps', 'xpu') if torch.amp.is_autocast_available(kind)}


def check_at_least_one(config, names):
    """ValueError if one of these fields of a config is below 1."""
    for name in names.split():
        if getattr(config, name) < 1:
            raise ValueError(f'{name}={getattr(config, name)} must be at least 1')


def whole_shape(p):
    """The shape of a parameter, of all of it where this process has a share."""
    return getattr(p, 'whole_shape', p.shape)


# --- norm, MLP and loss ---------------------------------------------------------------------------

@fast
def rms_norm(x, weight, eps, dtype=None):
    """x / rms(x) * weight over the last dimension, in fp32 (Zhang & Sennrich 2019, eq. 4), rounded to
    dtype, or to x's. x (..., D), weight (D)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    return y.to(dtype or x.dtype)


def product_dtype(x):
    """The precision in which a matrix product with x is computed: autocast's, or x's own."""
    device = x.device.type
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class RMSNorm(nn.Module):
    """rms_norm with its weight. (..., D) → (..., D), of the precision of the products that read it;
    in_stream: of x's, for what is added to the residual stream, or read by more than products."""

    def __init__(self, dim, eps=1e-5, in_stream=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.in_stream = in_stream

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, x.dtype if self.in_stream else product_dtype(x))


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


class Gate(nn.Module):
    """y silu(z), in the place of GatedRMSNorm. (B, T, E) both."""

    def forward(self, y, z):
        return (y.float() * F.silu(z.float())).to(product_dtype(y))


@fast
def gated_heads(y, z, mimo_z=None, mimo_o=None, norm=None, eps=1e-5):
    """y silu(z), of rank R the sum of mimo_o y silu(mimo_z z), heads normed before if norm (E) has
    weights. y (B, T, R, H, P), z (B, T, H, P), mimo_z, mimo_o (H, R, P) → (B, T, E)."""
    y, z = y.float(), z.float()[:, :, None]                     # (B, T, 1, H, P)
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.view(y.shape[3:])
    if mimo_z is not None:
        y, z = y * mimo_o.transpose(0, 1), z * mimo_z.transpose(0, 1)
    return (y * F.silu(z)).sum(2).flatten(2)


@fast
def project(x, *projections):
    """Each projection of x, one after another: (…, D) → a tuple of (…, its width)."""
    return tuple(projection(x) for projection in projections)


@fast
def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, eq. 5)."""
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). (B, T, D) → (B, T, D)."""

    def __init__(self, D, inner, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x):
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate, up))


@fast
def linear_cross_entropy(x, weight, targets, factors=None):
    """Mean cross-entropy in nats of predicting targets (B, T) from x (B, T, D) by weight (V, D); targets below 0 do
    not count. factors (B, T): the sum of the cross-entropies times these, instead."""
    logits = F.linear(x, weight).float()                        # (B, T, V)
    counted = targets >= 0
    losses = F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=0).flatten(), reduction='none')
    if factors is not None:
        return (losses * (counted * factors).flatten()).sum()
    return (losses * counted.flatten()).sum() / counted.sum().clamp(min=1)


# --- what optimizers are told ---------------------------------------------------------------------

def optim_groups(model, weight_decay, muon=False):
    """Parameter groups for the optimizers: [{'kind', 'params', 'weight_decay'}], kind 'adamw' or
    'muon'.

    Decay falls on matrices alone: never on norms, biases, A_log, D, dt_bias or learned scales. With
    `muon` the hidden matrices (the layers' *_proj weights) go to Muon (Jordan et al. 2024);
    embeddings, conv filters, routers and the rest stay on AdamW, and so do experts: torch's Muon
    takes no stacks of matrices."""
    groups = {('adamw', True): [], ('adamw', False): [], ('muon', True): []}
    for name, p in model.named_parameters():                    # tied weights come once
        if not p.requires_grad:
            continue
        matrix = name.endswith(('.weight', '_proj')) and p.ndim >= 2  # experts are stacks without '.weight'
        kind = 'muon' if muon and matrix and '_proj.' in name else 'adamw'
        groups[kind, matrix].append(p)
    return [dict(kind=kind, weight_decay=weight_decay if decays else 0.0, params=params)
            for (kind, decays), params in groups.items() if params]


# --- the face -------------------------------------------------------------------------------------

class LanguageModel(nn.Module):
    """The face all models share. A subclass provides `hidden_states`, `embedding`, `mixing_flops`
    and its parameters' names."""
    gradient_checkpointing = False  # True: only what goes into each layer is kept for the gradient
    initial_state = None            # B → the learned state before the first token (a prefix's)
    carried = None                  # in training, the states between windows that follow one another
    between_layers = None           # called before each layer: a server gives others a turn there
    state_dtype = None              # in which generation keeps a text's state between tokens; None: as computed

    def run_layer(self, i, layer, state, x, *args):
        """layer(x, …) for `hidden_states`: with its part of the state, which it changes; or by
        gradient checkpointing (Chen et al. 2016), if that is wanted and there is no state."""
        if self.between_layers is not None:
            self.between_layers()
        if state is None:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                return checkpoint(layer, x, *args, use_reentrant=False,
                                  preserve_rng_state=self.config.dropout > 0)
            return layer(x, *args)
        cache = {name: state.get(f'{name}.{i}') for name in layer.state_names}
        ssm = cache.get('ssm')
        is_rounded = ssm is not None and ssm.dtype == torch.bfloat16
        if is_rounded:                                          # only while it is kept
            cache['ssm'] = ssm.float()
        y = layer(x, *args, cache)
        if is_rounded:
            cache['ssm'] = cache['ssm'].bfloat16()
        state.update({f'{name}.{i}': value for name, value in cache.items()})
        return y

    def forward(self, idx, targets=None, factors=None):
        """Training: idx (B, T) int64 → (logits (B, T, V), None), or with targets (B, T) → (None,
        mean loss in nats), with factors (B, T) the sum of the losses times these.

        Targets of -1 do not count. With targets the logits are never all in memory. In training the
        losses of routers are added. Of an objective in blocks idx are (2 B, T) tokens, clean ones first; the
        logits, or the loss, are those of the others."""
        carried = self.carried if self.training else None
        state = self.initial_state(len(idx)) if self.initial_state else None
        if carried is not None:
            state = carried.take(len(idx))
        x, state, router_losses = self.hidden_states(idx, state)    # (B, T, D)
        if carried is not None:
            carried.put(state)
        if self.config.objective != 'next':
            x = speaking(x, self.config)
        if targets is None:
            return self.lm_head(x), None
        return None, sum(router_losses, linear_cross_entropy(x, self.lm_head.weight, targets, factors))

    @torch.no_grad()
    def step(self, idx, state=None, last=False, window=0):
        """Inference: idx (B, t ≥ 1) and the state after the tokens before it → (logits (B, t, V),
        state).

        Logits equal forward's, however the tokens are cut into steps; with `last` only the last
        token's are computed, (B, 1, V), which of a large vocabulary saves a third of the time that
        a prompt takes. The state is a flat dict of batch-first tensors: index, repeat, concatenate,
        save each to do so with the sequences. 'pos' (B,) counts each row's tokens and stays on the
        CPU. A step writes into the state it is given: clone it first to go on from the same place
        twice. window: where attention sees all, it sees this many last tokens only, and its caches
        are rings of that size; 0: no limit."""
        if state is None:
            state = self.empty_state(len(idx))
        x, state, _ = self.hidden_states(idx, dict(state), window)  # (B, t, D)
        state['pos'] = state['pos'] + idx.shape[1]
        return self.lm_head(x[:, -1:] if last else x), state

    def empty_state(self, B):
        """The state before the first token of B sequences."""
        if self.initial_state:
            return {name: value.clone() for name, value in self.initial_state(B).items()}
        return {'pos': torch.zeros(B, dtype=torch.long)}

    def num_params(self):
        """Trainable and frozen parameters, tied ones counted once."""
        return sum(whole_shape(p).numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations a token of forward and backward, in sequences of T: 6 a weight
        of every matrix product, plus the mixing of tokens (attention counted causally, at the half
        it needs)."""
        matrices = sum(p.numel() for name, p in self.named_parameters()
                       if p.ndim == 2 and not name.endswith('A_log'))
        if self.lm_head.weight is not self.embedding().weight:
            matrices -= self.embedding().weight.numel()  # an untied input embedding is a look-up
        mixing = self.mixing_flops(T)
        if self.config.objective != 'next':                     # to both sides
            mixing *= 2
        if self.config.block_length:                            # the clean text, too, but for the head
            matrices += matrices - self.lm_head.weight.numel()
            mixing *= 2
        return 6 * matrices + 3 * mixing

    def optim_groups(self, weight_decay, muon=False):
        return optim_groups(self, weight_decay, muon)

    def expert_load(self):
        """What the log says of the experts; None if there are none."""
