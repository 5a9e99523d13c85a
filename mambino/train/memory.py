"""How much memory a training run takes, before it takes it; and how many sequences are computed at
once, so that it suffices.

    parts = estimate('gpt', dict(n_layer=12, n_embd=512, vocab_size=16384), batch=8, T=1024)
    n, checkpointing, parts = largest_micro_batch('gpt', config, sequences=128, T=1024, budget=8e9)

One step of training is simulated, and all that it keeps is counted (counting.py):

    steps with 1 and 2 layers, 1 and 2 sequences ─► peak of each stretch ─► linear in both ─► the largest

A stretch (the first layer's backward, the loss, the optimizer, …) is linear in layers and
sequences; their maximum is not. Not counted is what libraries take for themselves, some 0.3 GB for
torch's code and data, and memory that is held but not used. Of that a CPU has much: glibc keeps
what is freed, in holes that fit nothing larger, and the process grows to 1.2 to 1.7 times the
estimate. Where so much is free, it may, and keeps all (machine.keep_freed_memory): that is fastest.
Where it is not, freed blocks go back at once (machine.keep_no_freed_memory), and the estimate is
what the process takes. On a card the budget is what is free there now, whatever it is sold as. """
import dataclasses
import math
import sys
from bisect import bisect_right
from collections import Counter
from functools import partial

from mambino import machine
from mambino.configurator import fail
from mambino.kernels.anywhere import loss_chunk
from mambino.train import carried, processes
from mambino.train.begin import BATCH_SIZE
from mambino.train.counting import STRETCHES, Workload, peaks_of
from mambino.train.recovery import divisors
from mambino.weights import checkpoint

# of the memory there is: the rest is for what libraries take and for holes between blocks
USABLE = 0.92
USABLE_CPU = 0.6    # where a CPU's allocator keeps what is freed, and cannot be told not to
USABLE_CUDA = 0.90
USABLE_WDDM = 0.85  # Windows lends a card memory of the CPU where its own is full: no error, but ten times slower
KEPT = 1.7          # times the estimate that such a process may grow to
# of what is free on a card, before a share is taken: cuBLAS's workspaces, the code of kernels; and
# NCCL's buffers
RESERVED = int(0.4 * 2**30)
CONTEXT = int(0.5 * 2**30)      # what a process takes of a card before its first tensor: of `vram` it is not free
RESERVED_NCCL = int(0.5 * 2**30)
# tokens at once that keep a GPU busy; fewer are worth the third more work that checkpointing costs
ENOUGH = 4096
ENOUGH_FAST = 8192      # … one of more than so many FLOP/s
FAST = 300e12
MOST = 32768            # tokens at once, above which a card is no faster
# tokens of a Mamba-1's sequences in its simulation, and 64: its loop over time is slow on fake
# tensors, too
SHORT = 32
PARTS = ('weights', 'gradients', 'optimizer', 'activations', 'temporary')


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
    sizes = of_all_layers(workload, config)
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


def of_all_layers(workload, config):
    """The peaks of a workload's model. One of layers of several kinds takes the mean of models that have each kind
    alone, by their shares: all are linear in layers."""
    n_layer = config['n_layer']
    kinds = getattr(checkpoint.MODELS[workload.kind][1](**config), 'kinds', '')
    if len(set(kinds)) < 2:
        return extrapolate(n_layer, 1, 2, partial(with_layers, workload))
    sizes = Counter()
    for kind in sorted(set(kinds)):
        alike = dataclasses.replace(workload, config=tuple(dict(config, layers=kind).items()))
        peaks = extrapolate(n_layer, 1, 2, partial(with_layers, alike))
        sizes.update({name: size * kinds.count(kind) / n_layer for name, size in peaks.items()})
    return sizes


def with_layers(workload, n_layer):
    """The peaks of a workload's model with so many layers, from two smaller batches."""
    config = dict(workload.config, n_layer=n_layer)
    batch, T = workload.batch, workload.T
    # sequences that make the loss of two chunks: fewer, and it is not linear
    low = -(-2 * loss_chunk(config['vocab_size'], workload.device) // T)
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
                        needed=ENOUGH, most=math.inf, **workload):
    """(micro-batch, checkpointing, estimate) of the largest micro-batch that divides this process's
    sequences of a step and fits.

    budget: bytes, of which a share may be used. checkpointing: with or without it; None: without if
    `needed` tokens are then computed at once; else with it, where that makes at least twice as
    many. most: tokens at once, but for a sequence that is longer. workload: the other arguments of
    `estimate`. Ends the program in a line if nothing fits."""
    limit = share * budget
    sizes = [n for n in divisors(sequences) if n == 1 or n * T <= most]
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
            if not checkpointing and n * T >= min(needed, sizes[-1] * T):
                return fitting[False]
    if not fitting:
        refuse(estimated(1), T, budget, share, options[-1])
    if True in fitting and (False not in fitting or fitting[True][0] >= 2 * fitting[False][0]):
        return fitting[True]
    return fitting[False]


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


def memory_line(parts, budget, batch, checkpointing, source='free'):
    """The estimate as a line for the reader. source: of the budget, in a word or two."""
    sizes = ' + '.join(f'{name} {parts[name] / 2**30:.2f}' for name in PARTS)
    return (f'memory: {sizes} = {parts["total"] / 2**30:.2f} GB'
            + (f' of {budget / 2**30:.1f} GB {source}' if budget else '')
            + f'; micro-batch {batch}, {"with" if checkpointing else "no"} gradient checkpointing')


# --- what train.py asks ---------------------------------------------------------------------------

def budget_of(vram, device):
    """(bytes, their source in a word or two) to plan for; (None, …) where nothing tells. vram: the
    setting. A card has what is free on it now, and no more than vram says, less what libraries
    take."""
    free = machine.available_memory(device)
    source = 'free'
    if vram != 'auto':
        named = float(vram) * 2**30 - CONTEXT * device.startswith('cuda')
        if not device.startswith('cuda') or free is None or named < free:
            free, source = named, 'that --vram says'
    if free and device.startswith('cuda'):
        reserved = RESERVED + RESERVED_NCCL * (processes.WORLD > 1)
        free = max(1, free - reserved)
        source += f', {reserved / 2**30:.1f} GB left to libraries'
    return free, source


def usable_share(device):
    """The share of its budget that a device's tensors may take."""
    if device.startswith('cuda'):
        return USABLE_WDDM if sys.platform == 'win32' else USABLE_CUDA
    return USABLE if device != 'cpu' or machine.glibc() else USABLE_CPU


def choose_micro_batch(settings, net, adapter=None):
    """(micro_batch, line): how many of this process's sequences of a step are computed at once, and
    what is said of the memory.

    Of train.py's `settings` batch_size and gradient_checkpointing are filled in. adapter: what
    adapters.begin_adapter returned."""
    block_size, device = settings['block_size'], settings['device']
    sequences = settings['tokens_per_step'] // block_size // processes.WORLD
    free, source = budget_of(settings['vram'], device)
    free = free and processes.least(free)                   # all cut their steps alike
    named = settings['batch_size']
    micro_batch = max(n for n in divisors(sequences) if n <= (named or BATCH_SIZE))
    checkpointing = settings['gradient_checkpointing']
    line = ''
    if free and settings.get('carry_state') and not settings['eval_only']:
        states = 2 * sequences * carried.state_bytes(checkpoint.config_of(net))   # before a step, and after it
        if states > usable_share(device) * free:
            fail(f'carry_state=True keeps the states of {sequences} texts, twice: {states / 2**30:.2f} GB, and '
                 f'{free / 2**30:.2f} GB are free: lower --tokens_per_step, or make the model smaller')
        free -= states
        source += f', {states / 2**30:.2f} GB left to the states of carry_state'
    if free and not settings['eval_only']:
        workload = dict(
            T=block_size, device=device, dtype=settings['dtype'],
            optimizer=settings['optimizer'], world=processes.WORLD,
            shards=processes.WORLD if processes.SHARDED else 1,
            expert_parallel=settings['expert_parallel'], adapter=adapter)
        micro_batch, checkpointing, line = fit_to_memory(
            settings['model'], checkpoint.config_of(net), net.num_params(), micro_batch, sequences,
            free, checkpointing, bool(named), source=source, **workload)
    if settings.get('compile') and line:
        line += '; compiled it is less'
    if named >= 2 * micro_batch and micro_batch < sequences:
        processes.say(f'note: {sequences} sequences a step can only be cut '
                      f'into micro-batches of {micro_batch}, not {named}')
    settings['batch_size'] = named or micro_batch
    settings['gradient_checkpointing'] = bool(checkpointing)
    return micro_batch, line


def fit_to_memory(kind, config, parameters, batch, sequences, free, checkpointing, fixed,
                  device, T, source='free', **workload):
    """(micro-batch, checkpointing, line) with so many bytes free, where `batch` sequences would be
    computed at once, and must if `fixed`. parameters: how many the model has. checkpointing: None
    leaves it to the memory. source: see `memory_line`. workload: as in `estimate`."""
    rough = 20 * parameters + 500 * batch * T * config['n_layer'] * config['n_embd']
    if rough < 0.1 * free and (fixed or device == 'cpu'):   # an estimate takes a second or two
        line = f'memory: less than {rough / 2**30 + 0.1:.1f} GB, of {free / 2**30:.1f} GB {source}'
        if device == 'cpu':
            machine.keep_freed_memory()
        return batch, bool(checkpointing), line
    limits = dict(share=usable_share(device))
    if device.startswith('cuda'):
        peak = machine.known_peak(device) or 0
        limits |= dict(most=MOST, needed=ENOUGH_FAST if peak > FAST else ENOUGH)
    workload |= dict(T=T, device=device.partition(':')[0])
    try:
        parts = estimate(kind, config, batch, checkpointing=bool(checkpointing),
                         accumulate=batch < sequences, **workload)
        if not fixed and (device != 'cpu' or parts['total'] > limits['share'] * free):
            batch, checkpointing, parts = largest_micro_batch(
                kind, config, sequences, budget=free, checkpointing=checkpointing, **limits, **workload)
    except Exception as error:                              # must not stop a run that may well fit
        return batch, bool(checkpointing), f'memory: no estimate ({type(error).__name__}: {error})'
    line = memory_line(parts, free, batch, checkpointing, source)
    kept = KEPT * parts['total']
    if device == 'cpu' and kept < free:
        machine.keep_freed_memory()
        line += f'; up to {kept / 2**30:.2f} GB with what the allocator keeps'
    elif device == 'cpu' and machine.glibc():
        machine.keep_no_freed_memory()
        line += '; what is freed goes back at once, which takes time'
    return batch, bool(checkpointing), line
