"""Kernels of others on a pretended card: they are taken where they are there, and what does not work is left out in a
line, with the same numbers."""
import functools

import pytest
from helpers import card_packages
from helpers.card_models import assert_as_on_a_cpu
from helpers.card_process import on_card


@on_card
@pytest.mark.parametrize('name, dtype, checkpointing', [
    ('mamba1', 'float32', False), ('mamba1', 'bfloat16', True), ('mamba2', 'float32', False),
    ('mamba2', 'bfloat16', True), ('mamba2-groups', 'bfloat16', False), ('hybrid', 'float32', True)])
def test_mamba_ssm(name, dtype, checkpointing):
    """In the first step, too, in which kernels are tried: within a checkpointed layer."""
    tried = ['copy to the card at mambino/kernels/', 'item() at mambino/kernels/'] if checkpointing else []
    result = assert_as_on_a_cpu(
        name, dtype, prepare=card_packages.install, checkpointing=checkpointing, may_wait=tried)
    recurrence = 'mamba-ssm, scan' if name == 'mamba1' else 'mamba-ssm, forward'
    for kernel in (recurrence, 'causal-conv1d', 'causal-conv1d, backward'):
        assert result.kernels[kernel], result.kernels


def no_image(*args, **kwargs):
    raise RuntimeError('CUDA error: no kernel image is available for execution on the device')


def no_room(x, *args, **kwargs):
    """In larger sizes than those of the check."""
    if x.shape[1] not in (96, 300):
        raise RuntimeError('out of resource: shared memory, Required: 147456, Hardware limit: 101376.')


@on_card
@pytest.mark.parametrize('name, kernel, fail, note', [
    ('mamba2', 'ssd', no_image, "mamba-ssm's ssd does not work here (RuntimeError: CUDA error: no kernel image"),
    ('mamba2', 'ssd', no_room, "mamba-ssm's ssd does not work here (RuntimeError: out of resource"),
    ('mamba1', 'scan', no_image, "mamba-ssm's scan does not work here (RuntimeError: CUDA error: no kernel image"),
    ('mamba1', 'conv', no_image, "causal-conv1d does not work here (RuntimeError: CUDA error: no kernel image"),
])
def test_a_kernel_that_fails_at_its_first_call(name, kernel, fail, note):
    install = functools.partial(card_packages.install, **{kernel: fail})
    assert_as_on_a_cpu(name, prepare=install, notes=[note])
