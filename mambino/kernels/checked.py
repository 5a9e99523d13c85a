"""Whether something of others' works on this card, tried before a run depends on it: torch.compile,
and each kernel in the sizes in which it is first wanted.

    if works('flex_attention', (T, window, dtype), attempt): ...    # attempt(): forward and backward, once

What does not work is left out for the rest of the run, and one line says so. The answers are
constants to a compiler, which must not trace how they were found.
"""
import contextlib
import functools
import sys
import time

import torch

LONG = 3                # seconds of compiling that are worth a line
_answers = {}           # {(name of a kernel, sizes): whether it works}
notes = {}              # {name of a kernel: why it does not, in a line}


def first_line(error, width=100):
    """An exception in some words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0][:width]}' if lines else type(error).__name__


def aside_of_checkpoints():
    """A context in which what is saved for a gradient is none of the layer's that is being
    checkpointed: it would be missing when the layer is computed again."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def constant(function):
    """torch.compiler.assume_constant_result, without the import of torch._dynamo, two seconds of
    each start: a compiler calls the function and does not trace it."""
    function._dynamo_marked_constant = True
    return function


def works(name, sizes, attempt):
    """Whether attempt() ends without an error, tried once for a kernel and its sizes. That there is
    no memory for it says nothing of the kernel, and is raised."""
    key = name, sizes
    if key not in _answers:
        start = time.perf_counter()
        try:
            with aside_of_checkpoints():
                attempt()
            _answers[key] = True
            seconds = time.perf_counter() - start
            if seconds > LONG:
                print(f'note: {name} took {seconds:.0f} s to compile and try, as it does once on a card',
                      file=sys.stderr, flush=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:      # of any kind: Triton, its compilers and drivers have their own
            _answers[key] = False
            if name not in notes:
                notes[name] = f'{name} does not work here ({first_line(error)})'
                print(f'note: {notes[name]}; going on without', file=sys.stderr, flush=True)
    return _answers[key]


@functools.cache
def compile_trouble(kind):
    """'' where torch.compile works on this kind of device, else why it does not: no Triton, no C
    compiler, a card that is too old. Tried once, with a few numbers."""
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.zeros(8, device=kind))
        from torch._dynamo import config
        return 'it is switched off' * config.disable
    except Exception as error:
        return first_line(error)


@constant
def compiles(kind):
    """Whether torch.compile works on this kind of device. Within a compiled function it does."""
    return not compile_trouble(kind)
