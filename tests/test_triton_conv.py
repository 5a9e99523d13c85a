"""Our Triton convolution gives what the definition gives, gradients too: in Triton's interpreter, on a CPU, in
fp32 (it cannot compute in bf16). On a card tests/gpu_kernels.py looks."""
import pytest
import torch
from helpers.triton_runs import interpreted

from mambino.kernels import triton_kernels

FEW = dict(SPAN=16, BLOCK_E=16)     # several programs in time and channels
CASES = [
    dict(batch=2, T=1, E=18, K=4, state=False, last=True),
    dict(batch=1, T=1, E=18, K=4, state=True, last=True),
    dict(batch=1, T=3, E=21, K=4, state=True, last=True),
    dict(batch=1, T=3, E=16, K=2, state=False, last=False),
    dict(batch=1, T=4, E=16, K=3, state=True, last=False),
    dict(batch=2, T=37, E=21, K=4, state=True, last=True),
    dict(batch=1, T=37, E=16, K=2, state=False, last=False),
    dict(batch=1, T=130, E=21, K=4, state=False, last=True),
]


def test_values_and_gradients():
    cases = [('conv', case, FEW) for case in CASES]
    cases.append(('conv', dict(CASES[-1], E=270), dict(SPAN=64, BLOCK_E=256)))
    for case, errors in zip(cases, interpreted(*cases)):
        assert max(errors) < 1e-5, (case, errors)


def test_in_half_precision():
    errors, = interpreted(('conv', dict(CASES[5], dtype='float16'), FEW))
    assert max(errors) < 5e-3, errors


def test_it_is_an_operation_of_pytorch():
    """To a compiler; within a checkpoint; with the same numbers each time."""
    cases = [('conv operation', dict(batch=2, T=5, E=8, K=4, state=state), {}) for state in (False, True)]
    for differences in interpreted(*cases):
        assert differences and not any(differences)


def test_when_it_is_taken(monkeypatch):
    """Not on a CPU, and on a card for as many taps as it was written for."""
    monkeypatch.setattr(triton_kernels, 'has_triton', lambda: True)
    monkeypatch.setattr(triton_kernels, 'conv_works', lambda kind, K, dtype: kind == 'cuda')
    monkeypatch.setattr(triton_kernels, 'conv', lambda *_: 'taken')
    weight, bias = torch.randn(8, 1, 4), torch.randn(8)
    assert triton_kernels.causal_conv1d(torch.randn(1, 5, 8), weight, bias) is NotImplemented
    on_card = OnCard(torch.float32)
    assert triton_kernels.causal_conv1d(on_card, weight, bias) == 'taken'
    assert triton_kernels.causal_conv1d(on_card, torch.randn(8, 1, 5), bias) is NotImplemented
    assert triton_kernels.causal_conv1d(OnCard(torch.float64), weight, bias) is NotImplemented


class OnCard:
    """What is asked of x before a kernel is taken."""
    device = torch.device('cuda')

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize('T', [1, 2, 5])
@pytest.mark.parametrize('given', [True, False])
def test_the_new_state(T, given, monkeypatch):
    """The last K-1 inputs, of the state before where there are fewer; a copy."""
    monkeypatch.setattr(torch.ops, 'mambino', Operations())
    x, state = torch.randn(2, T, 8), torch.randn(2, 3, 8)
    before = state if given else torch.zeros_like(state)
    _, new = triton_kernels.conv(x, torch.randn(8, 1, 4), torch.randn(8), state if given else None)
    assert new.equal(torch.cat((before, x), 1)[:, T:])
    assert new.untyped_storage().nbytes() == 2 * 3 * 8 * 4


class Operations:
    """In the place of torch.ops.mambino."""

    def triton_conv(self, x, weight, bias, state):
        return x
