"""The models' operations, sooner: on this CPU by native.cpp (cpu.py, cpu_mamba.py), on NVIDIA by mamba-ssm and
flex_attention (cuda.py), and anywhere by PyTorch that saves memory and passes (anywhere.py). What
the operations are stands in the models' files, marked `@fast`; nothing there depends on what is
here.

    MAMBINO_KERNELS=0 python train.py       # the definitions alone: the same numbers, later
    MAMBINO_NATIVE=0 python train.py        # without native.cpp
"""
import torch

from mambino.kernels import anywhere, cpu, cpu_mamba, cuda, native, one_token  # noqa: F401, to offer their kernels
from mambino.kernels.cpu import portable
from mambino.kernels.registry import ENABLED, KERNELS, fast, substituted

__all__ = ['compiled', 'describe_kernels', 'fast', 'portable', 'substituted']


def describe_kernels(device='cpu'):
    """What computes on this kind of device, in some words."""
    if not ENABLED:
        return 'operations as they are defined, since MAMBINO_KERNELS=0'
    if device == 'cpu' and native.library():
        return f'operations compiled for this CPU{native.trouble and "; " + native.trouble}'
    if device == 'cpu':
        return f'operations in plain PyTorch, since {native.trouble}'
    functions, notes = cuda.fused(device)
    names = ', '.join(functions)
    line = f"mamba-ssm's kernels ({names})" if functions else 'operations in plain PyTorch'
    return '; '.join([line, *notes])


def compiled(net):
    """torch.compile of a model or a function of one. Mamba-1's scan stays out of it: unrolled, its
    steps would compile for hours."""
    KERNELS['selective_scan'] = [torch.compiler.disable(scan) for scan in KERNELS['selective_scan']]
    return torch.compile(net)
