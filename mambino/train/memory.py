"""How much memory a training run takes, before it takes it; the micro-batch that fits; and sizes that suit a machine.

    found = estimate('gpt', dict(n_layer=12, n_head=8, n_embd=512, vocab_size=16384), batch=8, T=1024)
    batch, checkpointing = choose('gpt', config, sequences=128, T=1024, budget=available_memory('cuda'))

No formula for activations is in here. One step of training runs on fake tensors, which have sizes and lifetimes but no data
(FakeTensorMode), and every storage that is born or dies is counted: this is the exact peak of what is alive, whatever the models do.

    steps with 1 and 2 layers, 1 and 2 sequences ─► peak of each stretch of the step ─► linear in both ─► the largest

A stretch (the first layer's backward, the loss, the optimizer, …) is linear in layers and sequences; their maximum is not. The models
take their CPU paths, also for a GPU. Not counted is what libraries take for themselves, and memory that is held but not used: measured
on a CPU, the peak of the process is 1 to 2% above the estimate with MALLOC_MMAP_THRESHOLD_=65536 in the environment, and 17 to 67%
above it without, because glibc keeps what is freed. No GPU was measured.
"""
import dataclasses
import math
import types
import weakref
from bisect import bisect_right
from contextlib import nullcontext
from functools import lru_cache, partial

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambino import machine
from mambino.weights import adapters
from mambino.weights import checkpoint
from mambino.kernels import portable
from mambino.kernels.anywhere import loss_chunk
from mambino.configurator import fail
from mambino.train.muon import Muon

SIZES = {           # of about so many parameters, with a vocabulary of 16,384
    ('gpt', '50m'): dict(n_layer=13, n_embd=512),
    ('gpt', '150m'): dict(n_layer=20, n_embd=768),
    ('gpt', '400m'): dict(n_layer=30, n_embd=1024),
    ('mamba', '50m'): dict(n_layer=24, n_embd=512),
    ('mamba', '150m'): dict(n_layer=36, n_embd=768),
    ('mamba', '400m'): dict(n_layer=36, n_embd=1280),
    ('hybrid', '50m'): dict(n_layer=9, n_embd=512),
    ('hybrid', '150m'): dict(n_layer=13, n_embd=768),
    ('hybrid', '400m'): dict(n_layer=20, n_embd=1024),
}
OFTEN = dict(warmup_iters=200, eval_interval=500, eval_iters=100)
TRAINING = {        # 20 tokens a parameter (Hoffmann et al. 2022): 1.0, 3.0 and 7.9 billion
    '50m': dict(tokens_per_step=2**17, learning_rate=1e-3, max_iters=8000, **OFTEN),
    '150m': dict(tokens_per_step=2**18, learning_rate=6e-4, max_iters=11500, **OFTEN),
    '400m': dict(tokens_per_step=2**19, learning_rate=3e-4, max_iters=15000, **OFTEN),
}
BATCH = 16          # sequences at once where memory has them
SHARE = 0.92        # of the memory found is used: the rest is for what libraries take and for holes between blocks
ENOUGH = 4096       # tokens at once that keep a GPU busy; fewer are worth the third more work that checkpointing costs
SHORT = 32          # tokens of a Mamba-1's sequences in its simulation, and 64: its loop over time is slow on fake tensors, too
STRETCHES = ('step', 'forward', 'loss', 'head', 'top', 'bottom', 'embedding')


# --- counting ---------------------------------------------------------------------------------------------------------

class Live(TorchDispatchMode):
    """Counts the bytes of storages alive, and their peak in each stretch of a step; `stretch` names the present one."""

    def __init__(self):
        super().__init__()
        self.now, self.stretch, self.peaks, self.known = 0, 'build', {}, set()

    def enter(self, stretch, *_):
        self.stretch = stretch
        self.peaks[stretch] = max(self.now, self.peaks.get(stretch, 0))

    def free(self, key, size):
        self.known.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.stretch == 'build' and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0                                      # initialisation may ask for a number; no matter which
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.enter(self.stretch)
        return out


def simulate(fake, kind, config, batch, T, device, dtype, optimizer, checkpointing, accumulate, adapter=()):
    """One step of training → {name: bytes}: what stands (weights, gradients, optimizer, activations), and a peak a stretch.

    fake: on tensors without data. config, adapter: tuples of (field, value). device: 'cpu', or another kind: then without the kernels that
    are compiled for a CPU."""
    with nullcontext() if device == 'cpu' else portable():
        return steps(fake, kind, config, batch, T, dtype, optimizer, checkpointing, accumulate, adapter)


def steps(fake, kind, config, batch, T, dtype, optimizer, checkpointing, accumulate, adapter):
    with torch.random.fork_rng(devices=[]), fake_tensor.FakeTensorMode() if fake else nullcontext(), Live() as live:
        net = checkpoint.build(kind, dict(config))
        if adapter:
            adapters.add_adapter(net, dict(adapter))
        net.gradient_checkpointing = checkpointing
        for module in net.modules():                        # attention keeps a seed of its dropout, no mask; but here it would ask
            if isinstance(getattr(module, 'dropout', None), float):  # for that number, or take the (T, T) path of a CPU
                module.dropout = 0.0
        found = dict(weights=live.now)
        idx = torch.randint(net.config.vocab_size, (batch, T))
        groups = net.optim_groups(0.1, muon=optimizer == 'muon')
        optimizers = [torch.optim.AdamW([g for g in groups if g['kind'] == 'adamw'], fused=True)]
        if optimizer == 'muon':
            optimizers.append(Muon([g for g in groups if g['kind'] == 'muon'], adjust_lr_fn='match_rms_adamw'))

        before = live.now
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        found['gradients'] = live.now - before
        before = live.now
        live.enter('step')
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
        found['optimizer'] = live.now - before
        if not accumulate:
            net.zero_grad(set_to_none=True)

        layers = next(module for name, module in net.named_modules() if name.endswith('layers'))

        def mark(i, layer, args, out):
            """The gradient that reaches a layer's output begins its backward; the one that leaves the first ends them all."""
            out = out[0] if isinstance(out, tuple) else out
            if out.requires_grad and live.stretch in ('forward', 'loss'):
                out.register_hook(partial(live.enter, f'backward {i}'))
                if i == 0 and args[0].requires_grad:        # not under an adapter
                    args[0].register_hook(partial(live.enter, 'embedding'))
                if i == len(layers) - 1:
                    live.enter('loss')
        for i, layer in enumerate(layers):
            layer.register_forward_hook(partial(mark, i))
        before = live.now
        live.enter('forward')
        with machine.autocast('cpu', dtype):
            loss = net(idx, idx)[1]
        found['activations'] = live.now - before
        live.enter('head')
        loss.backward()
        live.enter('embedding')
    peaks = live.peaks
    return found | {name: peaks.get(name, 0) for name in ('step', 'forward', 'loss', 'head', 'embedding')} | dict(
        top=peaks.get(f'backward {len(layers) - 1}', 0), bottom=peaks.get('backward 0', 0))


@lru_cache(None)
def corner(kind, config, n_layer, batch, T, *how):
    """`simulate` with so many layers. A model whose course depends on its data (a router's) runs for real."""
    config = (*config, ('n_layer', n_layer))
    try:
        return simulate(True, kind, config, batch, T, *how)
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
        return simulate(False, kind, config, batch, T, *how)


def extend(axes, measure, *at):
    """measure(x, y, …) → {name: bytes}, at a point from its values at two corners on each axis: [(low, high, where), …]."""
    if not axes:
        return measure(*at)
    low, high, x = axes[0]
    if x in (low, high):
        return extend(axes[1:], measure, *at, x)
    a, b = extend(axes[1:], measure, *at, low), extend(axes[1:], measure, *at, high)
    return {name: a[name] + (b[name] - a[name]) * (x - low) / (high - low) for name in a}


# --- what the zeros stand for -----------------------------------------------------------------------------------------

def fill(settings, explicit, device, world, shortest):
    """{name: value} of train.py's settings that are left to the machine, or follow from others: sizes and steps. explicit: those that were
    said. device: 'cpu', 'cuda' or 'mps'. shortest: tokens of the smallest split. Ends the program in a line where they contradict."""
    s = types.SimpleNamespace(**settings)
    gigabytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30 if device == 'cuda' else 0
    if device == 'cpu':         # some minutes on a laptop
        sizes = dict(n_layer=4, n_embd=256, block_size=256, tokens_per_step=4096, max_iters=400)
    elif gigabytes < 20:        # 8 to 16 GB, or Apple's
        sizes = dict(n_layer=12, n_embd=512, block_size=512, tokens_per_step=2**15, max_iters=5000)
    else:
        sizes = dict(n_layer=12, n_embd=768, block_size=1024, tokens_per_step=2**17, max_iters=10000)
    sizes |= SIZES.get((s.model, s.size), {})
    n_embd = s.n_embd or sizes['n_embd']
    n_head = s.n_head or max(n for n in range(1, max(1, n_embd // 64) + 1) if n_embd % n == 0)
    max_iters, T = s.max_iters or sizes['max_iters'], s.block_size
    if not T:                   # a small text need not fill a large window
        T = min(sizes['block_size'], 1 << max(3, (shortest - 1).bit_length() - 1))

    asked = (explicit.get('batch_size') or BATCH) * T * s.gradient_accumulation_steps   # whatever memory made of it
    whole = math.lcm(s.batch_size or 1, world) * T
    tokens = s.tokens_per_step or asked or -(-sizes['tokens_per_step'] // whole) * whole
    if tokens % T:
        fail(f'tokens_per_step={tokens} must be a multiple of block_size={T}, such as {max(1, round(tokens / T)) * T}')
    if asked not in (0, tokens):
        fail(f'tokens_per_step={tokens} is not batch_size * block_size * gradient_accumulation_steps = {asked}: leave out one of them')
    if tokens // T % world:
        fail(f'{tokens // T} sequences a step cannot be shared by {world} processes: set --tokens_per_step to a multiple of {T * world}')
    return dict(n_layer=s.n_layer or sizes['n_layer'], n_embd=n_embd, n_head=n_head, block_size=T, max_iters=max_iters,
                warmup_iters=s.warmup_iters if s.warmup_iters >= 0 else min(100, max_iters // 10), tokens_per_step=tokens,
                gradient_accumulation_steps=0)              # tokens_per_step says it; a later run may cut the same step otherwise


# --- what is asked ----------------------------------------------------------------------------------------------------

def estimate(kind, config, batch, T, device='cuda', dtype='bfloat16', optimizer='adamw', checkpointing=False, accumulate=True,
             processes=1, shards=1, adapter=None):
    """The peak of training and what it is made of, in bytes: {'weights', 'gradients', 'optimizer', 'activations', 'temporary',
    'total'}. Activations are what the backward pass needs; temporary is all else that is alive at the peak.

    config: the model's, a dict. batch: sequences of T tokens at once. device: 'cpu', 'cuda' or 'mps'. accumulate: gradients stay from
    micro-step to micro-step. processes: with more than one, DistributedDataParallel keeps the gradients a second time. shards: with FSDP each of so many has its share
    of weights, gradients and optimizer, and two layers and the embedding whole. adapter: what a checkpoint says of one, which alone has
    gradients then.
    A second or two the first time."""
    processes = 1 if shards > 1 else processes
    full = dataclasses.asdict(checkpoint.MODELS[kind][1](**config))
    n_layer = full.pop('n_layer')
    some = -(-2 * loss_chunk(full['vocab_size']) // T)    # sequences that make the loss of two chunks: fewer, and it is not linear
    axis, times = (some, 2 * some, batch) if batch >= some else (batch, batch, batch), lambda n: T
    if full.get('version') == 1 and T > 4 * SHORT:          # the same tokens in shorter and more sequences: nearly the same memory
        axis, times = (batch * T // (2 * SHORT), batch * T // SHORT, batch), lambda n: batch * T // n
    found = extend([(1, 2, n_layer), axis], lambda layers, n: corner(
        kind, tuple(full.items()), layers, n, times(n), device, dtype, optimizer, checkpointing, accumulate,
        tuple((adapter or {}).items())))
    where = max(STRETCHES, key=found.get)
    parts = dict(weights=found['weights'], optimizer=found['optimizer'],
                 gradients=found['gradients'] * ((accumulate or where in ('step', 'bottom', 'embedding')) + (processes > 1)),
                 activations=found['activations'] * (where in ('forward', 'loss', 'head', 'top')))
    total = found[where] + found['gradients'] * (processes > 1)
    parts['temporary'] = total - sum(parts.values())
    if shards > 1:
        whole = 2 * parts['weights'] / n_layer + 4 * full['vocab_size'] * full['n_embd']
        parts.update({name: parts[name] / shards for name in ('weights', 'gradients', 'optimizer')}, temporary=parts['temporary'] + whole)
    return {name: int(size) for name, size in (parts | dict(total=sum(parts.values()))).items()}


def choose(kind, config, sequences, T, budget, checkpointing=None, share=SHARE, needed=ENOUGH, **how):
    """(micro-batch, checkpointing, estimate) of the largest micro-batch that divides this process's sequences of a step and fits.

    budget: bytes, of which a share may be used. checkpointing: with or without it; None: without if `needed` tokens are then computed at
    once; else with it, where that makes at least twice as many. how: the other arguments of `estimate`. Ends the program in a line if nothing fits."""
    limit = share * budget
    sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
    fits, options = {}, (False, True) if checkpointing is None else (checkpointing,)
    for checkpointing in options:
        def found(n):
            return estimate(kind, config, n, T, checkpointing=checkpointing, accumulate=n < sequences, **how)
        enough = bisect_right(sizes, limit, key=lambda n: found(n)['total'])
        if enough:
            n = sizes[enough - 1]
            fits[checkpointing] = n, checkpointing, found(n)
            if not checkpointing and n * T >= min(needed, sequences * T):
                return fits[False]
    if not fits:
        least = found(1)
        at_rest = least['total'] - least['activations'] - least['temporary']
        what = '--n_layer or --n_embd' if at_rest > limit else '--block_size, or --n_layer or --n_embd'
        fail(f'one sequence of {T} tokens takes {least["total"] / 2**30:.2f} GB, {"even with" if options[-1] else "without"} gradient '
             f'checkpointing; that is '
             f'{(least["total"] - limit) / 2**30:.2f} GB more than the {share:.0%} of {budget / 2**30:.2f} GB that may be '
             f'used: halve {what}')
    if True in fits and (False not in fits or fits[True][0] >= 2 * fits[False][0]):
        return fits[True]
    return fits[False]


def plan(kind, config, parameters, batch, sequences, free, checkpointing, fixed, device, T, **how):
    """(micro-batch, checkpointing, line for the reader) of a run with so many bytes free, that would take `batch` sequences at once, and
    must if `fixed`. parameters: how many the model has. checkpointing: None leaves it to the memory. how: the other arguments of `estimate`."""
    rough = 20 * parameters + 500 * batch * T * config['n_layer'] * config['n_embd']
    if rough < 0.1 * free and (fixed or device == 'cpu'):   # an estimate takes a second or two
        return batch, bool(checkpointing), f'memory: less than {rough / 2**30 + 0.1:.1f} GB, of {free / 2**30:.1f} GB free'
    how, share = how | dict(T=T, device=device), 0.6 if device == 'cpu' else SHARE
    try:
        found = estimate(kind, config, batch, checkpointing=bool(checkpointing), accumulate=batch < sequences, **how)
        if not fixed and (device != 'cpu' or found['total'] > share * free):
            batch, checkpointing, found = choose(kind, config, sequences, budget=free, checkpointing=checkpointing, share=share, **how)
    except Exception as error:                              # must not stop a run that may well fit
        return batch, bool(checkpointing), f'memory: no estimate ({type(error).__name__}: {error})'
    return batch, bool(checkpointing), describe(found, free, batch, checkpointing, device)


def describe(found, budget, batch, checkpointing, device='cuda'):
    """The estimate as a line for the reader."""
    parts = ' + '.join(f'{name} {found[name] / 2**30:.2f}' for name in ('weights', 'gradients', 'optimizer', 'activations', 'temporary'))
    return (f'memory: {parts} = {found["total"] / 2**30:.2f} GB' + (f' of {budget / 2**30:.1f} GB free' if budget else '')
            + f'; micro-batch {batch}, {"with" if checkpointing else "no"} gradient checkpointing'
            + ('; a CPU\'s allocator may hold a third more' if device == 'cpu' else ''))
