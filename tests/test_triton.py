"""Our Triton kernels give what the definitions give, gradients too: in Triton's interpreter, on a
CPU, in fp32 (it cannot compute in bf16). On a card tests/gpu_kernels.py looks."""
import functools
import sys

import pytest
import torch
from helpers.triton_runs import interpreted

from mambino.kernels import triton_kernels
from mambino.kernels.checked import notes
from mambino.kernels.registry import DEFINITIONS
from model_mamba import mamba1_scan, mamba2_scan

SCAN = [
    dict(batch=2, T=9, E=8, N=4, state=True, last=True),
    dict(batch=1, T=20, E=9, N=16, state=False, last=False),        # more than two chunks, an odd E
    dict(batch=1, T=1, E=8, N=24, state=True, last=True),
]
SSD = [
    dict(batch=2, T=9, H=4, P=16, N=16, G=1, state=True, last=True),
    dict(batch=1, T=41, H=4, P=24, N=40, G=2, state=True, last=False),
    dict(batch=1, T=64, H=3, P=16, N=16, G=1, state=False, last=True),
    dict(batch=1, T=130, H=3, P=32, N=16, G=1, state=True, last=True, steep=30),    # exp(sums) is 0 in fp32
]


def test_scan():
    for case, errors in zip(SCAN, interpreted(*(('scan', case, {}) for case in SCAN))):
        assert max(errors) < 1e-5, (case, errors)


def test_ssd():
    """Also where the heads of a group are spread over several programs, or all in one."""
    cases = [('ssd', case, dict(PROGRAMS=256)) for case in SSD] + [('ssd', SSD[1], dict(PROGRAMS=1))]
    for case, errors in zip(cases, interpreted(*cases)):
        assert max(errors) < 1e-5, (case, errors)


def test_ssd_in_half_precision():
    errors, = interpreted(('ssd', dict(SSD[0], T=70, dtype='float16'), {}))
    assert max(errors) < 5e-3, errors


# --- when they are taken --------------------------------------------------------------------------

def scan_inputs():
    return [torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.randn(8), -torch.rand(8, 4), torch.randn(1, 5, 4),
            torch.randn(1, 5, 4), torch.randn(8), torch.randn(1, 5, 8)]


def test_a_cpu_does_not_ask_for_them(monkeypatch):
    monkeypatch.setattr(triton_kernels, 'has_triton', lambda: True)
    monkeypatch.setattr(triton_kernels, 'works', lambda *_: pytest.fail('tried on a CPU'))
    assert triton_kernels.mamba1_scan(*scan_inputs()) is NotImplemented
    y, _ = mamba1_scan(*scan_inputs())
    assert y.shape == (1, 5, 8)
    heads = torch.randn(2), -torch.rand(2), torch.randn(2)
    y, _ = mamba2_scan(torch.randn(1, 5, 16), torch.randn(1, 5, 2), *heads, 1, 4)
    assert y.shape == (1, 5, 2, 4)


@pytest.mark.parametrize('input, wrong', [(0, 'y'), (4, 'the gradient of input')])
def test_other_numbers_are_noticed(input, wrong):
    """A kernel that is wrong in a result, or in a gradient alone."""
    definition = DEFINITIONS['mamba1_scan']
    inputs = scan_inputs()

    def mistaken(*inputs):
        y, last = definition(*inputs)
        doubled = 2 * inputs[input].sum()
        return y + (doubled if wrong == 'y' else doubled - doubled.detach()), last
    before = torch.get_rng_state()
    triton_kernels.compare(definition, definition, inputs)
    assert torch.equal(torch.get_rng_state(), before)           # a resumed run draws what it would have drawn
    with pytest.raises(ValueError, match=wrong):
        triton_kernels.compare(definition, mistaken, inputs)


def test_what_does_not_work_is_left_out(monkeypatch, capsys):
    """On a card where Triton does not compile: one line, once, and others compute."""
    monkeypatch.setattr('mambino.kernels.checked._answers', {})
    monkeypatch.setitem(notes, triton_kernels.SCAN, '')
    del notes[triton_kernels.SCAN]
    monkeypatch.setattr(triton_kernels, 'attempt_with', lambda *_: functools.partial(fail, 'no compiler'))
    monkeypatch.setitem(sys.modules, 'mambino.kernels.triton_scan', sys.modules[__name__])
    for _ in range(2):
        assert not triton_kernels.scan_works('cuda', 8, 4, (8, 8, 4, 4, 8), torch.float32, False)
    said = capsys.readouterr().err
    assert said.count('our Triton scan of Mamba-1 does not work here (RuntimeError: no compiler)') == 1
    monkeypatch.setattr(triton_kernels, 'has_triton', lambda: True)
    monkeypatch.setattr(triton_kernels, 'compile_trouble', lambda kind: '')
    kernels, said = triton_kernels.describe('cuda', False)
    assert len(kernels) == len(said) == 1 and 'no compiler' in said[0]


def test_what_cannot_be_compiled_is_not_promised(monkeypatch):
    monkeypatch.setattr(triton_kernels, 'has_triton', lambda: True)
    monkeypatch.setattr(triton_kernels, 'compile_trouble', lambda kind: 'there is no C compiler')
    assert triton_kernels.describe('cuda', False) == ([], [])


def fail(why):
    raise RuntimeError(why)
