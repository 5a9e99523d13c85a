"""How much memory a training run takes, before it takes it; and how many sequences are computed at
once, so that it suffices.

    parts = estimate('gpt', dict(n_layer=12, n_embd=512, vocab_size=16384), batch=8, T=1024)
    n, checkpointing, parts = largest_micro_batch('gpt', config, sequences=128, T=1024, budget=8e9)

No formula for activations is in here. One step of training runs on fake tensors, which have sizes
and lifetimes but no data (FakeTensorMode), and every storage that is born or dies is counted: this
is the exact peak of what is alive, whatever the models do.

    steps with 1 and 2 layers, 1 and 2 sequences ─► peak of each stretch ─► linear in both ─► the largest

A stretch (the first layer's backward, the loss, the optimizer, …) is linear in layers and
sequences; their maximum is not. The models take their CPU paths, also for a GPU. Not counted is
what libraries take for themselves, some 0.3 GB for torch's code and data, and memory that is held
but not used. Of that a CPU has much: glibc keeps what is freed, in holes that fit nothing larger, and
the process grows to 1.2 to 1.7 times the estimate. Where so much is free, it may, and keeps all
(machine.keep_freed_memory): that is fastest. Where it is not, freed blocks go back at once
(machine.keep_no_freed_memory), and the estimate is what the process takes. No GPU was measured.
"""
import dataclasses
import math
import re
import weakref
from bisect import bisect_right
from contextlib import nullcontext
from functools import lru_cache, partial

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambino import machine
from mambino.configurator import fail
from mambino.kernels import portable
from mambino.kernels.anywhere import loss_chunk
from mambino.train import processes
from mambino.train.begin import BATCH_SIZE
from mambino.train.building import build_optimizers
from mambino.weights import adapters, checkpoint

# of the memory there is: the rest is for what libraries take and for holes between blocks
USABLE = 0.92
USABLE_CPU = 0.6    # where a CPU's allocator keeps what is freed, and cannot be told not to
KEPT = 1.7          # times the estimate that such a process may grow to
# tokens at once that keep a GPU busy; fewer are worth the third more work that checkpointing costs
ENOUGH = 4096
# tokens of a Mamba-1's sequences in its simulation, and 64: its loop over time is slow on fake
# tensors, too
SHORT = 32
STRETCHES = ('step', 'forward', 'loss', 'head', 'top', 'bottom', 'embedding')
PARTS = ('weights', 'gradients', 'optimizer', 'activations', 'temporary')


# --- counting -------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of training that is simulated."""
    kind: str
    config: tuple               # of the model: (field, value) pairs
    batch: int                  # sequences at once
    T: int                      # tokens in each
    # 'cpu', or another kind: then without the kernels that are compiled for a CPU
    device: str = 'cuda'
    dtype: str = 'bfloat16'
    optimizer: str = 'adamw'
    checkpointing: bool = False
    accumulate: bool = True     # gradients stay from micro-step to micro-step
    adapter: tuple = ()         # (name, value) pairs of what a checkpoint says of one


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages alive, and their peak in each stretch of a step; `stretch` names
    the present one."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.stretch = 'build'
        self.peaks = {}                                     # stretch → bytes
        self.known = set()                                  # the storages that are counted

    def enter(self, stretch, *_):
        self.stretch = stretch
        self.peaks[stretch] = max(self.now, self.peaks.get(stretch, 0))

    def release(self, key, size):
        self.known.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.stretch == 'build' and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # initialisation may ask for a number; no matter which
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.enter(self.stretch)
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self.release, key, size)


def simulate(workload, fake=True):
    """One step of training → {name: bytes}: what stands (weights, gradients, optimizer,
    activations), and a peak a stretch.

    fake: on tensors without data."""
    tensors = fake_tensor.FakeTensorMode() if fake else nullcontext()
    kernels = nullcontext() if workload.device == 'cpu' else portable()
    with kernels, torch.random.fork_rng(devices=[]), tensors, LiveBytes() as live:
        net = build(workload)
        sizes = dict(weights=live.now)
        idx = torch.randint(net.config.vocab_size, (workload.batch, workload.T))
        optimizers = build_optimizers(net, workload.optimizer)

        before = live.now
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        sizes['gradients'] = live.now - before

        before = live.now
        live.enter('step')
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
        sizes['optimizer'] = live.now - before
        if not workload.accumulate:
            net.zero_grad(set_to_none=True)

        last_layer = mark_stretches(net, live)
        before = live.now
        live.enter('forward')
        with machine.autocast('cpu', workload.dtype):
            loss = net(idx, idx)[1]
        sizes['activations'] = live.now - before
        live.enter('head')
        loss.backward()
        live.enter('embedding')
    peaks = {name: live.peaks.get(name, 0) for name in STRETCHES}
    peaks['top'] = live.peaks.get(f'backward {last_layer}', 0)
    peaks['bottom'] = live.peaks.get('backward 0', 0)
    return sizes | peaks


def build(workload):
    """The model of a workload, with its adapter."""
    net = checkpoint.build(workload.kind, dict(workload.config))
    if workload.adapter:
        adapters.add_adapter(net, dict(workload.adapter))
    net.gradient_checkpointing = workload.checkpointing
    # attention keeps a seed of its dropout, no mask; but here it would ask
    for module in net.modules():
        # for that number, or take the (T, T) path of a CPU
        if isinstance(getattr(module, 'dropout', None), float):
            module.dropout = 0.0
    return net


def mark_stretches(net, live):
    """Hooks that name the stretches from the first layer's forward to its backward; returns the
    number of the last layer."""
    layers = next(module for name, module in net.named_modules() if name.endswith('layers'))
    last_layer = len(layers) - 1

    def mark(i, layer, args, out):
        """The gradient that reaches a layer's output begins its backward; the one that leaves the
        first ends them all."""
        out = out[0] if isinstance(out, tuple) else out
        if not out.requires_grad or live.stretch not in ('forward', 'loss'):
            return
        out.register_hook(partial(live.enter, f'backward {i}'))
        if i == 0 and args[0].requires_grad:                # not under an adapter
            args[0].register_hook(partial(live.enter, 'embedding'))
        if i == last_layer:
            live.enter('loss')
    for i, layer in enumerate(layers):
        layer.register_forward_hook(partial(mark, i))
    return last_layer


@lru_cache(None)
def peaks_of(workload):
    """`simulate`, once for each workload. A model whose course depends on its data (a router's)
    runs for real."""
    try:
        return simulate(workload, fake=True)
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
        return simulate(workload, fake=False)


def extrapolate(x, low, high, measure):
    """measure(x) → {name: bytes}, which grows linearly, from its values at low and at high."""
    if x in (low, high):
        return measure(x)
    a, b = measure(low), measure(high)
    return {name: a[name] + (b[name] - a[name]) * (x - low) / (high - low) for name in a}


# --- what a run takes -----------------------------------------------------------------------------

def estimate(kind, config, batch, T, device='cuda', dtype='bfloat16', optimizer='adamw',
             checkpointing=False, accumulate=True, world=1, shards=1, expert_parallel=1, adapter=None):
    """The peak of training and what it is made of, in bytes: {'weights', 'gradients', 'optimizer',
    'activations', 'temporary', 'total'}. Activations are what the backward pass needs; temporary is
    all else that is alive at the peak.

    config: the model's, a dict. batch: sequences of T tokens at once. device: 'cpu', 'cuda' or
    'mps'. accumulate: gradients stay from micro-step to micro-step. world: of more than one process
    DistributedDataParallel keeps the gradients a second time. shards: with FSDP each of so many has
    its share of weights, gradients and optimizer, and two layers and the embedding complete.
    expert_parallel: processes that share the experts, of which DistributedDataParallel has nothing.
    adapter: what a checkpoint says of one, which alone has gradients then. A second or two the
    first time."""
    copies = world > 1 and shards == 1  # DistributedDataParallel has its own gradients
    config = dataclasses.asdict(checkpoint.MODELS[kind][1](**config))
    workload = Workload(
        kind, tuple(config.items()), batch, T, device, dtype, optimizer, checkpointing, accumulate,
        tuple((adapter or {}).items()))
    sizes = extrapolate(config['n_layer'], 1, 2, partial(with_layers, workload))
    at_peak = max(STRETCHES, key=sizes.get)
    total = sizes[at_peak] + sizes['gradients'] * copies
    gradients_there = accumulate or at_peak in ('step', 'bottom', 'embedding')
    activations_there = at_peak in ('forward', 'loss', 'head', 'top')
    parts = dict(
        weights=sizes['weights'],
        optimizer=sizes['optimizer'],
        gradients=sizes['gradients'] * (gradients_there + copies),
        activations=sizes['activations'] * activations_there)
    parts['temporary'] = total - sum(parts.values())
    if shards > 1:
        two_layers = 2 * parts['weights'] / config['n_layer']
        embedding = 4 * config['vocab_size'] * config['n_embd']
        parts['temporary'] += two_layers + embedding
        for name in ('weights', 'gradients', 'optimizer'):
            parts[name] /= shards
    if expert_parallel > 1:
        of_all = 4 * 3 * config['n_embd'] * config['intermediate_size'] * config['n_expert'] * config['n_layer']
        elsewhere = of_all - of_all // expert_parallel
        if not adapter:                                     # else they are frozen
            parts['gradients'] -= elsewhere * gradients_there + of_all * copies
            parts['optimizer'] -= 2 * elsewhere
        parts['weights'] -= elsewhere
    parts['total'] = sum(parts.values())
    return {name: int(size) for name, size in parts.items()}


def with_layers(workload, n_layer):
    """The peaks of a workload's model with so many layers, from two smaller batches."""
    config = dict(workload.config, n_layer=n_layer)
    batch, T = workload.batch, workload.T
    # sequences that make the loss of two chunks: fewer, and it is not linear
    low = -(-2 * loss_chunk(config['vocab_size']) // T)
    high = 2 * low
    if batch < low:
        low = high = batch
    tokens = None
    # the same tokens in shorter and more sequences: nearly the same memory
    if config.get('version') == 1 and T > 4 * SHORT:
        tokens = batch * T
        low, high = tokens // (2 * SHORT), tokens // SHORT

    def measure(sequences):
        length = tokens // sequences if tokens else T
        smaller = dict(config=tuple(config.items()), batch=sequences, T=length)
        return peaks_of(dataclasses.replace(workload, **smaller))
    return extrapolate(batch, low, high, measure)


def largest_micro_batch(kind, config, sequences, T, budget, checkpointing=None, share=USABLE,
                        needed=ENOUGH, **workload):
    """(micro-batch, checkpointing, estimate) of the largest micro-batch that divides this process's
    sequences of a step and fits.

    budget: bytes, of which a share may be used. checkpointing: with or without it; None: without if
    `needed` tokens are then computed at once; else with it, where that makes at least twice as
    many. workload: the other arguments of `estimate`. Ends the program in a line if nothing
    fits."""
    limit = share * budget
    sizes = divisors(sequences)
    options = (False, True) if checkpointing is None else (checkpointing,)
    fitting = {}                                            # checkpointing → what is returned
    for checkpointing in options:
        def estimated(n, checkpointing=checkpointing):
            return estimate(kind, config, n, T, checkpointing=checkpointing,
                            accumulate=n < sequences, **workload)
        n_fitting = bisect_right(sizes, limit, key=lambda n: estimated(n)['total'])
        if n_fitting:
            n = sizes[n_fitting - 1]
            fitting[checkpointing] = n, checkpointing, estimated(n)
            if not checkpointing and n * T >= min(needed, sequences * T):
                return fitting[False]
    if not fitting:
        refuse(estimated(1), T, budget, share, options[-1])
    if True in fitting and (False not in fitting or fitting[True][0] >= 2 * fitting[False][0]):
        return fitting[True]
    return fitting[False]


def divisors(n):
    """All of them, the least first."""
    small = [divisor for divisor in range(1, math.isqrt(n) + 1) if n % divisor == 0]
    return sorted({*small, *(n // divisor for divisor in small)})


def refuse(parts, T, budget, share, checkpointing):
    """Ends the program in a line that says how much is missing. parts: the estimate of one sequence
    of T tokens."""
    limit = share * budget
    at_rest = parts['total'] - parts['activations'] - parts['temporary']
    advice = '--n_layer or --n_embd' if at_rest > limit else '--block_size, or --n_layer or --n_embd'
    with_or_not = 'even with' if checkpointing else 'without'
    total, missing = parts['total'] / 2**30, (parts['total'] - limit) / 2**30
    fail(f'one sequence of {T} tokens takes {total:.2f} GB, {with_or_not} gradient checkpointing; '
         f'that is {missing:.2f} GB more than the {share:.0%} of {budget / 2**30:.2f} GB '
         f'that may be used: halve {advice}')


def memory_line(parts, budget, batch, checkpointing):
    """The estimate as a line for the reader."""
    sizes = ' + '.join(f'{name} {parts[name] / 2**30:.2f}' for name in PARTS)
    return (f'memory: {sizes} = {parts["total"] / 2**30:.2f} GB'
            + (f' of {budget / 2**30:.1f} GB free' if budget else '')
            + f'; micro-batch {batch}, {"with" if checkpointing else "no"} gradient checkpointing')


# --- what train.py asks ---------------------------------------------------------------------------

def choose_micro_batch(settings, net, adapter=None):
    """(micro_batch, line): how many of this process's sequences of a step are computed at once, and
    what is said of the memory.

    Of train.py's `settings` batch_size and gradient_checkpointing are filled in. adapter: what
    adapters.begin_adapter returned."""
    block_size, device = settings['block_size'], settings['device']
    sequences = settings['tokens_per_step'] // block_size // processes.WORLD
    if settings['vram'] == 'auto':
        free = machine.available_memory(device)
    else:
        free = float(settings['vram']) * 2**30
    free = free and processes.least(free)                   # all cut their steps alike
    named = settings['batch_size']
    micro_batch = max(n for n in divisors(sequences) if n <= (named or BATCH_SIZE))
    checkpointing = settings['gradient_checkpointing']
    line = ''
    if free and not settings['eval_only']:
        workload = dict(
            T=block_size, device=device.partition(':')[0], dtype=settings['dtype'],
            optimizer=settings['optimizer'], world=processes.WORLD,
            shards=processes.WORLD if processes.SHARDED else 1,
            expert_parallel=settings['expert_parallel'], adapter=adapter)
        micro_batch, checkpointing, line = fit_to_memory(
            settings['model'], checkpoint.config_of(net), net.num_params(), micro_batch, sequences,
            free, checkpointing, bool(named), **workload)
    if named >= 2 * micro_batch and micro_batch < sequences:
        processes.say(f'note: {sequences} sequences a step can only be cut '
                      f'into micro-batches of {micro_batch}, not {named}')
    if settings['vram'] != 'auto':
        line = line.replace(' GB free', ' GB that --vram says')
    settings['batch_size'] = named or micro_batch
    settings['gradient_checkpointing'] = bool(checkpointing)
    return micro_batch, line


def fit_to_memory(kind, config, parameters, batch, sequences, free, checkpointing, fixed,
                  device, T, **workload):
    """(micro-batch, checkpointing, line) with so many bytes free, where `batch` sequences would be
    computed at once, and must if `fixed`. parameters: how many the model has. checkpointing: None
    leaves it to the memory. workload: as in `estimate`."""
    rough = 20 * parameters + 500 * batch * T * config['n_layer'] * config['n_embd']
    if rough < 0.1 * free and (fixed or device == 'cpu'):   # an estimate takes a second or two
        line = f'memory: less than {rough / 2**30 + 0.1:.1f} GB, of {free / 2**30:.1f} GB free'
        if device == 'cpu':
            machine.keep_freed_memory()
        return batch, bool(checkpointing), line
    workload |= dict(T=T, device=device)
    obeys = device != 'cpu' or machine.glibc()
    share = USABLE if obeys else USABLE_CPU
    try:
        parts = estimate(kind, config, batch, checkpointing=bool(checkpointing),
                         accumulate=batch < sequences, **workload)
        if not fixed and (device != 'cpu' or parts['total'] > share * free):
            batch, checkpointing, parts = largest_micro_batch(
                kind, config, sequences, budget=free, checkpointing=checkpointing, share=share, **workload)
    except Exception as error:                              # must not stop a run that may well fit
        return batch, bool(checkpointing), f'memory: no estimate ({type(error).__name__}: {error})'
    line = memory_line(parts, free, batch, checkpointing)
    kept = KEPT * parts['total']
    if device == 'cpu' and kept < free:
        machine.keep_freed_memory()
        line += f'; up to {kept / 2**30:.2f} GB with what the allocator keeps'
    elif device == 'cpu' and obeys:
        machine.keep_no_freed_memory()
        line += '; what is freed goes back at once, which takes time'
    return batch, bool(checkpointing), line


def is_exhausted(error):
    """True of an error that tells of memory; another one is raised again."""
    # only CUDA's is an OutOfMemoryError
    if isinstance(error, MemoryError) or re.search('out of memory|allocate memory|ALLOC_FAILED', str(error)):
        return True
    raise error


def smaller_micro_batch(settings, net, micro_batch, sequences):
    """The micro-batch to go on with where the memory did not suffice: the next smaller one that
    divides this process's sequences; it is train.py's batch_size then, in settings, too. What the
    step has taken is given back. Where nothing smaller can be done the program ends in a line."""
    release(net)
    # several processes cannot agree on it in the middle of a step
    if micro_batch == 1 or processes.WORLD > 1:
        advice = 'halve --block_size, --n_layer or --n_embd'
        if not settings['gradient_checkpointing']:
            advice = 'go on with --gradient_checkpointing=True'
        if micro_batch > 1:
            advice = f'go on with --batch_size={micro_batch // 2}: the steps stay the same'
        fail(f'out of memory with {micro_batch} sequences at once; {advice}')
    smaller = max(n for n in divisors(sequences) if n < micro_batch)
    processes.say(f'\nout of memory: going on with micro-batches of {smaller}, '
                  f'{sequences // smaller} a step')
    if settings['device'] == 'cpu':
        machine.keep_no_freed_memory()
    settings['batch_size'] = smaller
    return smaller


def release(net):
    """Gives back what a step has taken that cannot be finished. No error of it may be alive any
    more: its traceback has the step's tensors."""
    net.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
