"""The models' operations, sooner: on this CPU by native.cpp (cpu.py and cpu_mamba*.py), on NVIDIA by kernels of
our own (triton_kernels.py), mamba-ssm (fused.py), flex_attention and torch.compile (cuda.py), on any GPU for
single tokens by few kernels (one_token.py), and anywhere by PyTorch that saves memory and passes
(anywhere.py). What the operations are stands in the models' files, marked `@fast`; nothing there depends on
what is here.

    MAMBINO_KERNELS=0 python train.py       # the definitions alone: the same numbers, later
    MAMBINO_NATIVE=0 python train.py        # without native.cpp
"""
import torch

from mambino.kernels import (  # noqa: F401, to offer their kernels
    anywhere,
    anywhere_delta,
    anywhere_mamba3,
    cpu,
    cpu_delta,
    cpu_mamba,
    cpu_mamba3,
    cuda,
    fused,
    native,
    one_token,
    triton_kernels,
)
from mambino.kernels.cpu import portable
from mambino.kernels.registry import DESCRIPTIONS, ENABLED, fast, substituted

__all__ = ['compiled', 'describe_kernels', 'fast', 'portable', 'substituted']


def describe_kernels(device='cpu', is_compiled=False):
    """What computes on this device, in some words; of our Triton kernels, which are tried in the sizes in
    which they are first wanted, as far as that is known by now. is_compiled: within torch.compile."""
    kind = device.partition(':')[0]
    if not ENABLED:
        return 'operations as they are defined, since MAMBINO_KERNELS=0'
    if kind == 'cpu' and is_compiled:
        return 'operations as torch.compile makes them'
    if kind == 'cpu' and native.library():
        return f'operations compiled for this CPU{native.trouble and "; " + native.trouble}'
    if kind == 'cpu':
        return f'operations in plain PyTorch, since {native.trouble}'
    described = [describe(kind, is_compiled) for describe in DESCRIPTIONS]
    names = [name for kernels, _ in described for name in kernels]
    notes = [note for _, notes in described for note in notes]
    plain = 'operations as torch.compile makes them' if is_compiled else 'operations in plain PyTorch'
    return '; '.join((names or [plain]) + notes)


def compiled(net):
    """torch.compile of a model or a function of one. What a compiler should not look into, such as a
    Mamba-1's scan, is one operation to it."""
    return torch.compile(net)
