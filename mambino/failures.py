"""What an error tells of memory that does not suffice, and of a card that computes no more; and
scripts that have nothing to save and end in a line then.

    failures.end_in_a_line('lower --batch_size')    # from here on, for what nobody has caught
"""
import os
import re
import sys

import torch

from mambino.console import flush

EXHAUSTED = re.compile('out of memory|allocate memory|ALLOC_FAILED')    # CUDA, MPS, a CPU; cuBLAS
LOST = re.compile('CUDA (driver )?error|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)')
OF_PROGRAM = re.compile('device-side assert|no kernel image|invalid (argument|conf)|out of memory')


def is_exhausted(error):
    """Whether an error tells of memory. Only CUDA's is an OutOfMemoryError."""
    return isinstance(error, MemoryError) or bool(EXHAUSTED.search(str(error)))


def is_lost(error):
    """Whether an error tells of a card that computes no more: its driver, its power, its memory, or
    a bus. An assertion of a kernel is a mistake of the program, whose traceback is wanted."""
    text = str(error)
    is_of_card = isinstance(error, getattr(torch, 'AcceleratorError', ())) or bool(LOST.search(text))
    return is_of_card and not OF_PROGRAM.search(text)


def end_in_a_line(advice):
    """From here on an error that nobody expects and that tells of memory, or of a card that fails,
    ends the program in a line, with status 2: at once, since what PyTorch does at an end may wait
    for that card for good. advice: what takes less memory."""
    before = sys.excepthook

    def end(kind, error, trace):
        reason = str(error).strip().partition('\n')[0]
        if isinstance(error, (RuntimeError, MemoryError)) and is_exhausted(error):
            line = f'out of memory: {advice}'
        elif isinstance(error, RuntimeError) and is_lost(error):
            line = (f'the card failed: {reason}. Look what nvidia-smi says of it (and the log of the system, for lines '
                    'with Xid); --device=cpu does without it')
        else:
            before(kind, error, trace)
            return
        flush()
        print(f'\nerror: {line}', file=sys.stderr, flush=True)
        os._exit(2)
    sys.excepthook = end
