"""What a run does where memory does not suffice, or its card is gone.

    try: …
    except (RuntimeError, MemoryError) as error:
        recovery.require_exhausted(error)   # else it is raised again
    micro_batch = recovery.smaller_micro_batch(settings, net, micro_batch, sequences)   # and the step again
"""
import gc
import re

import torch

from mambino import machine
from mambino.configurator import fail
from mambino.train import processes

EXHAUSTED = re.compile('out of memory|allocate memory|ALLOC_FAILED')    # CUDA, MPS, a CPU; cuBLAS


# --- memory ---------------------------------------------------------------------------------------

def is_exhausted(error):
    """Whether an error tells of memory. Only CUDA's is an OutOfMemoryError."""
    return isinstance(error, MemoryError) or bool(EXHAUSTED.search(str(error)))


def require_exhausted(error):
    """True of an error that tells of memory; another one is raised again."""
    if not is_exhausted(error):
        raise error
    return True


def divisors(n):
    """All of them, the least first."""
    small = [divisor for divisor in range(1, int(n ** 0.5) + 1) if n % divisor == 0]
    return sorted({*small, *(n // divisor for divisor in small)})


def smaller_micro_batch(settings, net, micro_batch, sequences, is_agreed=False):
    """The micro-batch to go on with where the memory did not suffice: the next smaller one that
    divides this process's sequences; it is train.py's batch_size then, in settings, too. What the
    step has taken is given back. Where nothing smaller can be done the program ends in a line.
    is_agreed: all processes call it."""
    release(net)
    # several processes cannot agree on it in the middle of a step
    if micro_batch == 1 or (processes.WORLD > 1 and not is_agreed):
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
    gc.collect()                        # what holds itself in a circle
    device = next(net.parameters()).device.type
    if device == 'cuda':
        torch.cuda.empty_cache()
    elif device == 'mps':
        torch.mps.empty_cache()
