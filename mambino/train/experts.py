"""Experts spread over processes: each process has some of a layer's, and computes them for the
tokens of others.

    form_groups(2, rank=0, world=4)     # all processes call each of these
    divide(net)                         # of every MoE this process keeps its share
    join_gradients(net)                 # once a step, after the last backward pass
    state = gather(state, optimizers)      # of a checkpoint: with all experts

With --expert_parallel=2, four processes and four experts:

    process     0      1      2      3
    experts     0 1    2 3    0 1    2 3
                └─group─┘     └─group─┘     tokens go to their experts and come back: all-to-all
                0 and 2, 1 and 3            have the same experts, whose gradients they add up

All else is data parallel: each process has its own sequences and all other parameters. The
processes of a group stand side by side, on one machine if it has as many, where tokens travel
fastest. A limit of the experts (capacity_factor) counts each process's tokens by themselves, as it
does without this: the same tokens are dropped. Then every expert has C slots for each process, so
that all sizes are known beforehand. Without a limit the processes first tell each other how many
tokens come: a GPU is waited for once a layer.

Letters of the shapes: n tokens of a process, k experts for each, D width, E experts, e of them
here, C slots, N processes of a group, m pairs that come here.
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn

from mambino.configurator import fail
from mambino.kernels.anywhere import into_slots, out_of_slots, swiglus
from mambino.language_model import whole_shape
from model_gpt import MoE, Pairs, experts_swiglu

N = 1               # processes in a group; `form_groups` decides
PLACE = 0           # of this process in its group
GROUP = None        # those that have the other experts
REPLICAS = None     # those that have the same experts; None: no other has


def require(n, world, is_sharded):
    """Ends the program in a line where experts cannot be spread over n of so many processes."""
    if n < 1:
        fail(f'expert_parallel={n} must be 1 (experts are not spread) or more')
    if n > 1 and world == 1:
        fail(f'expert_parallel={n} spreads experts over {n} processes, and this is one: start it with '
             f'torchrun --nproc_per_node={n} train.py, or leave it out')
    if n > 1 and is_sharded:
        fail(f'expert_parallel={n} does not go with parallel=fsdp, which shares every matrix among all processes, '
             'experts too: leave one of them out')
    if world % n:
        fail(f'expert_parallel={n} must divide the number of processes, which is {world}')


def form_groups(n, rank, world):
    """Each process finds its group, and those that have the same experts. All processes call it."""
    global N, PLACE, GROUP, REPLICAS
    N, PLACE = n, rank % n
    for first in range(0, world, n):
        group = dist.new_group(list(range(first, first + n)))
        if first == rank - PLACE:
            GROUP = group
    for place in range(n if n < world else 0):
        replicas = dist.new_group(list(range(place, world, n)))
        if place == PLACE:
            REPLICAS = replicas


# --- the model ------------------------------------------------------------------------------------

def divide(net):
    """Of each layer's experts, whole and alike in all processes, this one keeps its own. A model
    whose experts cannot be divided ends the program in a line."""
    n_expert = getattr(net.config, 'n_expert', 0)
    if not n_expert:
        fail(f'expert_parallel={N} spreads the experts of a model, and this one has none: set --n_expert, '
             'or leave it out')
    if n_expert % N:
        fail(f'expert_parallel={N} must divide the number of experts, which is {n_expert}')
    for module in list(net.modules()):
        if isinstance(module, MoE):
            module.experts = SpreadExperts(module.experts)


def own_part(whole):
    """This process's experts of a tensor (E, …) of all."""
    return whole.chunk(N)[PLACE]


class SpreadExperts(nn.Module):
    """model_gpt.Experts of which e are here. Its parameters have the same names and whole_shape,
    that of all."""

    def __init__(self, experts):
        super().__init__()
        for name, whole in experts.named_parameters():
            part = own_part(whole.detach()).clone()
            self.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))
        self.whole_shapes = {name: whole.shape for name, whole in experts.named_parameters()}
        self.mark()

    def mark(self):
        for name, p in self.named_parameters():
            p.whole_shape = self.whole_shapes[name]

    def _apply(self, change, recurse=True):
        """What moves a module, after which a parameter may have lost its marks."""
        super()._apply(change, recurse)
        self.mark()
        return self

    def forward(self, x, pairs):
        """x (n, D) and Pairs → (n k, D). All processes of the group call it."""
        matrices = self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype)
        has_limit = pairs.capacity < len(x)
        return (in_slots if has_limit else as_many_as_come)(x, pairs, *matrices)


def in_slots(x, pairs, gate_up, down):
    """x (n, D) → (n k, D), zeros for what is dropped: of each process C tokens to each expert. No
    size depends on the data."""
    C, D = pairs.capacity, x.shape[1]
    rows, slot = into_slots(x, pairs, len(pairs.counts))
    rows = Exchange.apply(rows)                                 # (E C, D): N times e slots
    rows = rows.view(N, -1, C, D).transpose(0, 1).flatten(1, 2)     # (e, N C, D)
    y = swiglus(rows, gate_up, down).view(-1, N, C, D)          # (e, N, C, D)
    y = Exchange.apply(y.transpose(0, 1).reshape(-1, D))        # (E C, D), as they were sent
    return out_of_slots(y, slot)


def as_many_as_come(x, pairs, gate_up, down):
    """x (n, D) → (n k, D): every token to all of its experts."""
    ours = pairs.counts.view(N, -1)                             # (N, e) pairs for each one's experts
    theirs = all_to_all(ours)                                   # (N, e) that each has for ours
    sent, received = torch.stack((ours.sum(1), theirs.sum(1))).tolist()
    rows = x.index_select(0, pairs.token)                       # (n k, D), by process, then expert
    rows = Exchange.apply(rows, sent, received)                 # (m, D), likewise

    counts = theirs.sum(0)                                      # (e)
    expert = torch.arange(len(counts), device=x.device).repeat(N)
    expert = expert.repeat_interleave(theirs.flatten(), output_size=len(rows))
    expert, order = expert.sort(stable=True)                    # (m) each
    rank = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[expert]
    pairs = Pairs(order, expert, rank, counts, len(rows))
    # not all kernels take nothing
    compute = experts_swiglu if len(rows) else experts_swiglu.definition
    y = compute(rows, pairs, gate_up, down)                     # (m, D), by expert
    y = torch.empty_like(y).index_copy(0, order, y)
    return Exchange.apply(y, received, sent)


class Exchange(torch.autograd.Function):
    """Rows go to the processes of the group, as many to each as `sent` says, and as `received` says
    come from each; None: equal parts. Their gradients go the other way."""

    @staticmethod
    def forward(ctx, x, sent=None, received=None):
        ctx.sent, ctx.received = sent, received
        return all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx, gradient):
        return all_to_all(gradient, ctx.received, ctx.sent), None, None


def all_to_all(x, sent=None, received=None):
    """Rows x (·, D) or numbers (·,) for each process of the group → those from each."""
    x_device = x.device
    if x.is_cuda and not dist.is_nccl_available():              # gloo exchanges a CPU's tensors
        x = x.cpu()
    x = x.contiguous()
    out = x.new_empty(len(x) if received is None else sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x, received, sent, group=GROUP)
    return out.to(x_device)


# --- training -------------------------------------------------------------------------------------

def is_share(p):
    """Whether a parameter is of the experts that this process has."""
    return hasattr(p, 'whole_shape')


def join_gradients(net, scaled=False):
    """Experts' gradients, each the sum over a group's tokens, become those of the mean of all
    processes' losses. scaled: for fp16, whose scale must fall everywhere alike, what is infinite in
    one process is in all."""
    gradients = [p.grad for p in net.parameters() if is_share(p) and p.grad is not None]
    if not gradients:
        return
    for gradient in gradients:
        if REPLICAS is not None:
            dist.all_reduce(gradient, group=REPLICAS)
    torch._foreach_div_(gradients, dist.get_world_size())
    if scaled:
        nothing = torch.stack(torch._foreach_norm(gradients, math.inf)).sum() * 0   # or nan
        dist.all_reduce(nothing, group=GROUP)
        gradients[0].add_(nothing)


def clip(net, limit):
    """Scales the gradient down to this norm, if it is larger; returns the norm it had, over all
    experts of all processes, each counted once."""
    params = [p for p in net.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if not is_share(p)])
    square = torch.nn.utils.get_total_norm([p.grad for p in params if is_share(p)]).square()
    dist.all_reduce(square, group=GROUP)
    norm = (norm.square() + square).sqrt()
    torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
    return norm


# --- checkpoints, which have all experts ----------------------------------------------------------

def gather(state, optimizers):
    """{'weights': {name: parameter}, 'optimizers': their states} with all experts, on the CPU of
    the first process, one tensor after another; the other processes get None in their places."""
    weights = {name: whole_of(p, p.detach()) for name, p in state['weights'].items()}
    for optimizer, saved in zip(optimizers, state['optimizers']):
        params = parameters_of(optimizer)
        saved['state'] = {i: {key: whole_of(params[i], value) for key, value in values.items()}
                          for i, values in saved['state'].items()}
    return dict(weights=weights, optimizers=state['optimizers'])


def parameters_of(optimizer):
    """An optimizer's parameters in the order in which its states are numbered."""
    return [p for group in optimizer.param_groups for p in group['params']]


def whole_of(p, value):
    """A tensor that belongs to a parameter: if that is a share, put together of all shares."""
    if not is_share(p) or value.ndim == 0:                      # a count of steps is the same for all
        return value
    if dist.get_rank() >= N:                                    # the first group is enough
        return None
    is_first = dist.get_rank() == 0
    whole = torch.empty(whole_shape(p), dtype=value.dtype) if is_first else None
    parts = list(whole.chunk(N)) if is_first else None
    dist.gather(value.cpu().contiguous(), parts, dst=0, group=GROUP)
    return whole


def share(optimizer, saved):
    """A saved state of an optimizer with this process's part of all experts."""
    params = parameters_of(optimizer)
    for i, values in saved['state'].items():
        for key, value in values.items():
            if is_share(params[i]) and value.ndim:
                values[key] = own_part(value).clone()
    return saved
