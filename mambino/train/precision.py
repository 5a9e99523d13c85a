"""The precision that a run trains in. Where `dtype` leaves it to a CPU it is measured, with the
very model, before the run begins:

    choose(settings, explicit, origin, net)     # settings['dtype'] is float32, bfloat16 or float16 then

    one layer, and the head with its loss, on some tokens ─► forward and backward, by turns in float32
        and in bfloat16 ─► the shortest time of each ─► those of a whole step ─► their ratio

No rule would do: whether 16 bits are worth it depends on the processor (AMX, AVX512-BF16 or
neither), on how wide the model's products are, and on the kernels between them. A GPU computes in
what its hardware has; a run that goes on keeps its precision, or it would not end with the same
bits.
"""
import time
from contextlib import contextmanager
from functools import partial

import torch

from mambino import machine
from mambino.blocks import with_clean
from mambino.train import processes
from mambino.train.begin import BATCH_SIZE
from mambino.train.recovery import release

CLEARLY = 1.03      # times as fast as float32, from which on bfloat16 is taken: it is the less exact one
FIRST = 64          # tokens that are tried first, to know how many can be afforded
FEWEST = 256        # with fewer, rounding the weights would weigh too much, which is done once a step
TURN = 0.2          # seconds that one turn may take, a pass in each precision
SECONDS = 0.3       # of turns, at least two
BUSY = 50           # times a second that a thread loses its core to another program on a busy machine
DTYPES = 'float32', 'bfloat16'
HOPELESS = 4        # times slower than float32: then it is in software, and no more tokens are tried
SOON_DONE = 2e12    # operations of a whole run, some ten seconds, in which nothing is to be gained
SLOWER = 1.25       # times slower than another precision: worth a note where a run keeps its own


def choose(settings, explicit, origin, net):
    """Gives train.py's setting `dtype` its value if it was left to the machine, and says what is
    worth knowing. origin: as begin.find_origin returned it. net: as begin.build_model did, on the
    CPU; it stays as it is, and so do the random numbers."""
    device, dtype = settings['device'], settings['dtype']
    is_measured = device == 'cpu' and not settings['eval_only'] and not is_soon_done(settings, net)
    if dtype == 'auto':
        settings['dtype'] = machine.choose_dtype('auto', device)
        if is_measured:
            measure_and_choose(settings, net)
        return
    is_kept = origin.ckpt and explicit.get('dtype', 'auto') == 'auto'
    if is_kept and is_measured and dtype != 'float16':
        note_if_slower(settings, origin, net)
    elif device == 'cpu' and not (dtype == 'bfloat16' and machine.has_bfloat16(device)):
        slowdown = machine.slowdown(device, dtype)
        if slowdown > HOPELESS:
            processes.say(f'note: this processor computes {dtype} {slowdown:.0f} times slower than float32: '
                          '--dtype=float32 is the faster one here, and more exact')


def is_soon_done(settings, net):
    """Whether a run is so short that its precision does not matter: it is float32, without
    measuring."""
    tokens = settings['max_iters'] * settings['tokens_per_step']
    return tokens * net.flops_per_token(settings['block_size']) < SOON_DONE


def measure_and_choose(settings, net):
    """The faster precision into the settings, in all processes that of the first; says which."""
    ratio, error = measured_by_first(settings, net)
    if error:
        processes.say(f'note: precision: float32, since bfloat16 could not be tried here: {error}')
        return
    settings['dtype'] = faster(ratio)
    if settings['dtype'] == 'bfloat16':
        processes.say(f'precision: bfloat16, {ratio:.2f}x as fast as float32 here')
    else:
        processes.say(f'precision: float32; bfloat16 is {ratio:.2f}x as fast here')


def faster(ratio):
    """The precision to take where bfloat16 is so many times as fast as float32."""
    return 'bfloat16' if ratio >= CLEARLY else 'float32'


def note_if_slower(settings, origin, net):
    """A word where a run was begun on another processor, and the precision it keeps is the slower
    one here."""
    processor = origin.ckpt['metadata'].get('processor')
    is_elsewhere = processor and processor != machine.processor_name()
    if not processes.summed(bool(processes.RANK == 0 and is_elsewhere))[0]:     # as the first process sees it
        return
    ratio, error = measured_by_first(settings, net)
    other = 'bfloat16' if settings['dtype'] == 'float32' else 'float32'
    times = ratio if other == 'bfloat16' else 1 / max(ratio, 1e-9)
    if not error and times > SLOWER:
        processes.say(f'note: this run goes on in {settings["dtype"]}, as it was begun on another processor; '
                      f'--dtype={other} is {times:.2f}x as fast here')


def measured_by_first(settings, net):
    """(ratio, ''), or (0, what went wrong), of `measure` in the first process."""
    ratio, error = 0.0, ''
    if processes.RANK == 0:
        sequences = settings['tokens_per_step'] // settings['block_size'] // processes.WORLD
        try:
            ratio = measure(net, settings['block_size'], min(sequences, settings['batch_size'] or BATCH_SIZE))
        except Exception as caught:             # must not stop a run that float32 may well carry
            error = f'{type(caught).__name__}: {str(caught).strip().partition(chr(10))[0]}'[:200]
    return processes.summed(ratio)[0], error


# --- measuring ------------------------------------------------------------------------------------

def measure(net, T, sequences):
    """How many times as fast as in float32 a CPU computes a step's forward and backward passes in
    bfloat16. T: tokens in a sequence. sequences: at most so many at once. The model, the random
    numbers and the memory are as before."""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(devices=[]), first_layer_alone(net) as (layer, n_layer):
            def turn(rows, length, clock=time.perf_counter):
                """{dtype: seconds of each stretch of a step}, and those of all together."""
                K = net.config.block_length or 1
                length = max(K, length - length % K)
                idx = torch.randint(net.config.vocab_size, (rows, length), generator=generator)
                start = time.perf_counter()
                times = {dtype: stretches(net, layer, n_layer, idx, dtype, clock) for dtype in DTYPES}
                return times, time.perf_counter() - start

            turn(1, min(T, FIRST))                          # wakes threads and libraries
            times, seconds = turn(1, min(T, FIRST))
            if ratio_of([times]) < 1 / HOPELESS:
                return ratio_of([times])
            tokens = max(FEWEST, int(FIRST * TURN / seconds))
            is_busy = False
            while True:     # a step's own shape, unless that takes long: few tokens are slow otherwise
                shape = max(1, min(sequences, tokens // T)), min(T, tokens)
                if turn(*shape)[1] > 2 * TURN:          # the first one prepares products of this shape
                    break
                before = preemptions()
                seconds = turn(*shape)[1]
                # other programs run: what the threads compute counts, not how long they wait for a core
                is_busy = preemptions() - before > BUSY * seconds
                if shape == (sequences, T) or seconds > TURN / 2:
                    break
                tokens *= 2
            clock = time.process_time if is_busy else time.perf_counter
            start = time.perf_counter()
            turns = []
            while len(turns) < 2 + 2 * is_busy or time.perf_counter() - start < SECONDS:
                turns.append(turn(*shape, clock)[0])
            return ratio_of(turns)
    finally:
        net.expert_load()                                   # counts from here on, as release forgets gradients
        release(net)
        machine.give_back_memory()


def preemptions():
    """How often a thread of this process had to leave its core to another program; 0 where the
    system does not say."""
    try:
        from resource import RUSAGE_SELF, getrusage
        return getrusage(RUSAGE_SELF).ru_nivcsw
    except ImportError:                                     # Windows
        return 0


def ratio_of(turns):
    """float32's time by bfloat16's: of each stretch the shortest, since another program that runs
    meanwhile disturbs some stretches of a turn, and seldom the same in all."""
    exact, rounded = (sum(map(min, zip(*(times[dtype] for times in turns)))) for dtype in DTYPES)
    return exact / rounded


@contextmanager
def first_layer_alone(net):
    """Within, a model has its first layer alone → (that layer, how many it has else)."""
    layers = next(module for name, module in net.named_modules() if name.endswith('layers'))
    others = list(layers[1:])
    n_layer = len(layers)
    was_training = net.training
    del layers[1:]
    net.train()
    try:
        yield layers[0], n_layer
    finally:
        layers.extend(others)
        net.train(was_training)


def stretches(net, layer, n_layer, idx, dtype, clock):
    """The seconds of a step's stretches: the embedding, n_layer times the layer's forward pass, the
    head with its loss, …, from a pass through one layer. idx (B, T)."""
    marks = []                                              # (n_layer or 1, its end)

    def mark(times, *_):
        marks.append((times, clock()))

    def before(layer, args):
        if args[0].requires_grad:                           # not under an adapter
            args[0].register_hook(partial(mark, n_layer))
        mark(1)

    def after(layer, args, out):
        mark(n_layer)
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.register_hook(partial(mark, 1))
    hooks = layer.register_forward_pre_hook(before), layer.register_forward_hook(after)
    try:
        start = clock()
        with machine.autocast('cpu', dtype):
            loss = net(with_clean(idx, net.config.block_length), idx)[1]
        mark(1)
        loss.backward()
        mark(1 if len(marks) == 5 else n_layer)
    finally:
        for hook in hooks:
            hook.remove()
        net.zero_grad(set_to_none=True)
    starts = [start, *(end for _, end in marks)]
    return [times * (end - begin) for begin, (times, end) in zip(starts, marks)]
