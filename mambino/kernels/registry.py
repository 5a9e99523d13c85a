"""Finds for an operation what computes the same, sooner.

    @fast
    def swiglu(gate, up):           # in a model's file: what the operation is
        return F.silu(gate) * up

    @kernel
    def swiglu(gate, up):           # in a file of ORDER, such as cuda.py: the same name and arguments
        return NotImplemented       # or the result, where this kernel can have it

A call asks the kernels of that name one after another; where none applies, the definition itself
computes. With MAMBINO_KERNELS=0 in the environment there are no kernels: every number stays the
same, later.
"""
import functools
import os
from contextlib import contextmanager

ENABLED = os.environ.get('MAMBINO_KERNELS') != '0'
ORDER = (   # files of kernels, as asked
    'cpu', 'cpu_mamba', 'cpu_mamba3', 'cpu_delta', 'one_token', 'triton_kernels', 'fused', 'cuda', 'anywhere',
    'anywhere_mamba3', 'anywhere_delta')
KERNELS = {}                            # {name of an operation: its kernels, in that order}
DEFINITIONS = {}                        # {name of an operation: its definition}
DESCRIPTIONS = []                       # functions: kind of device, is_compiled → (kernels, notes), in words
_substitutes = None                     # {name of an operation: a function}, within `substituted`


def kernel(function):
    """Offers a function to the operation of its name."""
    kernels = KERNELS.setdefault(function.__name__, [])
    kernels.append(function)
    kernels.sort(key=lambda function: ORDER.index(function.__module__.rpartition('.')[2]))
    return function


def describes(function):
    """Offers what describe_kernels says of a kind of device: function(kind, is_compiled) →
    ([kernels], [notes]), some words each."""
    DESCRIPTIONS.append(function)
    return function


def fast(definition):
    """The operation that this function defines, by the first kernel that applies.
    `operation.definition` is the function itself."""
    name = definition.__name__
    DEFINITIONS[name] = definition

    @functools.wraps(definition)
    def operation(*args, **kwargs):
        if _substitutes is not None:
            return _substitutes.get(name, definition)(*args, **kwargs)
        for candidate in KERNELS.get(name, ()) if ENABLED else ():
            result = candidate(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return definition(*args, **kwargs)

    operation.definition = definition
    return operation


@contextmanager
def substituted(**functions):
    """Within, an operation is the function of its name, else its definition; no kernel computes.
    For a graph, which cannot hold kernels, nor some of the definitions."""
    global _substitutes
    before, _substitutes = _substitutes, functions
    try:
        yield
    finally:
        _substitutes = before
