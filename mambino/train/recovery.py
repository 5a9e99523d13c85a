"""What a run does where memory does not suffice, or its card is gone.

    try: …
    except (RuntimeError, MemoryError) as error:
        recovery.require_exhausted(error)               # else it is raised again
    recovery.take_smaller_micro_batches(settings, net, loader, progress.tokens_seen)    # and the step again

    with recovery.no_way_back(progress, latest): …      # out of memory ends the program in a line
    recovery.tell_of_a_lost_card(progress, latest)      # so does a card that fails
"""
import atexit
import gc
import os
import sys
import threading
from contextlib import contextmanager

import torch

from mambino import machine
from mambino.configurator import fail
from mambino.failures import is_exhausted, is_lost
from mambino.train import processes

LAST_WORDS = 10         # seconds that loggers have for them


# --- memory ---------------------------------------------------------------------------------------

def require_exhausted(error):
    """True of an error that tells of memory; another one is raised again."""
    if not is_exhausted(error):
        raise error
    return True


def divisors(n):
    """All of them, the least first."""
    small = [divisor for divisor in range(1, int(n ** 0.5) + 1) if n % divisor == 0]
    return sorted({*small, *(n // divisor for divisor in small)})


def take_smaller_micro_batches(settings, net, loader, tokens_seen, is_agreed=False):
    """Where the memory did not suffice: loader cuts the step after so many tokens into the next
    smaller micro-batches that divide this process's sequences; so many are train.py's batch_size
    then, in settings, too. What the step has taken is given back. Where nothing smaller can be done
    the program ends in a line. is_agreed: all processes call it."""
    release(net)
    micro_batch, sequences = loader.micro_batch, loader.sequences
    # several processes cannot agree on it in the middle of a step
    if micro_batch == 1 or (processes.WORLD > 1 and not is_agreed):
        advice = 'halve --block_size, --n_layer or --n_embd'
        if settings.get('carry_state'):                 # which goes without gradient checkpointing
            advice = f'lower --tokens_per_step, of whose texts carry_state keeps the states, or {advice}'
        elif not settings['gradient_checkpointing']:
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
    if settings['compile']:             # of two sizes it would make code for all, which is slower
        torch.compiler.reset()
    loader.seek(tokens_seen, smaller)


@contextmanager
def no_way_back(progress, latest):
    """Within, out of memory ends the program in a line: what an optimizer has changed it has
    changed for good, so the step cannot be made again. latest: the path of the run's checkpoint."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        require_exhausted(error)
        fail(f'out of memory in the update of step {progress.step + 1}, where no activations are: the '
             "weights, their gradients and the optimizer's state alone are too much, or another program "
             f'has taken the memory; {checkpoint_line(progress, latest)}. Halve --n_layer or --n_embd, or '
             'share the weights among several cards with --parallel=fsdp')


def checkpoint_line(progress, latest):
    """Which good checkpoint there is."""
    if os.path.exists(latest):
        return f'the last good checkpoint is {latest}, of step {progress.saved}'
    return 'no checkpoint was made yet'


def release(net):
    """Gives back what a step has taken that cannot be finished. No error of it may be alive any
    more: its traceback has the step's tensors."""
    net.zero_grad(set_to_none=True)
    free_memory(next(net.parameters()).device.type)


def free_memory(device):
    """Gives back what a device's allocator keeps without using it."""
    gc.collect()                        # what holds itself in a circle
    if device.startswith('cuda'):
        torch.cuda.empty_cache()
    elif device == 'mps':
        torch.mps.empty_cache()


# --- a card that is gone --------------------------------------------------------------------------

def tell_of_a_lost_card(progress, latest):
    """From here on an error that nobody expects and that tells of a lost card ends the program in a
    line, with status 2: at once, since what PyTorch does at an end may wait for that card for
    good."""
    before = sys.excepthook

    def tell(kind, error, traceback):
        if not is_lost(error):
            before(kind, error, traceback)
            return
        reason = str(error).strip().partition('\n')[0]
        print(f'\nthe card failed at step {progress.step}: {reason}; {checkpoint_line(progress, latest)}. '
              'Look what nvidia-smi says of it (and the log of the system, for lines with Xid); once it '
              'computes again, or on another one, the same command goes on', file=sys.stderr, flush=True)
        timer = threading.Timer(LAST_WORDS, os._exit, [2])
        timer.daemon = True
        timer.start()
        atexit._run_exitfuncs()         # the loggers' last words
        os._exit(2)
    sys.excepthook = tell
