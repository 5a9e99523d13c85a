"""triton_token.py in Triton's interpreter against what one_token.py computes by PyTorch: run by test_one_token.py in a
process of its own, since TRITON_INTERPRET must be set before triton is imported.

Prints a line of JSON: {case: the largest deviation of what is returned and written, of the largest value}.
"""
import json
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import model_hybrid  # noqa: E402, F401, to define mix
from mambino.kernels import one_token  # noqa: E402
from mambino.language_model import RMSNorm  # noqa: E402

deviations = {}


def compare(name, plain, fast, *inputs, state=None):
    """In the place of one_token.ours."""
    inputs = inputs if state is None else (*inputs, state)
    for expected, computed in zip(one_token.outcome(plain, inputs), one_token.outcome(fast, inputs)):
        error = (computed.float() - expected.float()).abs().max() / expected.float().abs().max()
        deviations[case] = max(deviations.get(case, 0.0), float(error))
    return plain(*inputs)


def attention(B, H, G, S, P, last):
    mask = (torch.arange(S) <= last[:, None])[:, None, None]
    mask.last = last
    keys, values = torch.randn(2, B, G, S, P).transpose(2, 3).unbind()  # (B, S, G, P)
    return one_token.attention(torch.randn(B, 1, H, P), keys, values, mask=mask)


def wide(B, width, extra=7):
    """(B, 1, width), a part of something wider."""
    return torch.randn(B, 1, width + extra)[..., :width]


def gated_norm(groups):
    return one_token.gated_rms_norm(torch.randn(3, 1, 48), wide(3, 48), torch.randn(48), 1e-5, groups)


def mamba2(B, H, P, N, G):
    return one_token.mamba2_scan(wide(B, H * P + 2 * G * N), wide(B, H), torch.randn(H) - 2, -torch.rand(H),
                                 torch.randn(H), G, P, 64, torch.randn(B, H, P, N))


def mamba1(B, E, N):
    return one_token.mamba1_scan(wide(B, E), torch.randn(B, 1, E) - 2, torch.randn(E), -torch.rand(E, N), wide(B, N),
                                 wide(B, N), torch.randn(E), wide(B, E), torch.randn(B, N, E))


def mix(branches, D=24):
    norms = [RMSNorm(D, in_stream=True) for _ in range(branches)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    return one_token.mix(torch.randn(3, 1, D), [torch.randn(3, 1, D) for _ in range(branches)], norms,
                         torch.nn.Linear(D, branches))


CASES = {
    'two branches': lambda: mix(2),
    'three branches': lambda: mix(3),
    'norm': lambda: one_token.rms_norm(torch.randn(3, 1, 40), torch.randn(40), 1e-5),
    'norm of heads': lambda: one_token.rms_norm(torch.randn(2, 1, 3, 24), torch.randn(24), 1e-3),
    'gated norm': lambda: gated_norm(1),
    'gated norm in groups': lambda: gated_norm(3),
    'swiglu': lambda: one_token.swiglu(wide(2, 700), torch.randn(2, 1, 700)),
    'rope': lambda: one_token.apply_rope(torch.randn(3, 1, 5, 12), (torch.randn(3, 1, 1, 6), torch.randn(3, 1, 1, 6))),
    'attention': lambda: attention(3, 4, 4, 64, 16, torch.tensor([0, 30, 63])),
    'attention, shared keys': lambda: attention(2, 6, 2, 300, 24, torch.tensor([299, 130])),
    'attention, a ring that has come round': lambda: attention(2, 3, 1, 100, 16, torch.tensor([20, 450])),
    'convolution': lambda: one_token.causal_conv1d(wide(3, 300), torch.randn(300, 1, 4), torch.randn(300),
                                                   torch.randn(3, 3, 300)),
    'convolution of two taps': lambda: one_token.causal_conv1d(wide(3, 30), torch.randn(30, 1, 2), torch.randn(30),
                                                               torch.randn(3, 1, 30)),
    'mamba1': lambda: mamba1(2, 100, 5),
    'mamba2': lambda: mamba2(2, 4, 24, 20, 1),
    'mamba2 in groups': lambda: mamba2(2, 6, 16, 16, 3),
}

if __name__ == '__main__':
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    one_token.applies = lambda x: x.shape[1] == 1           # as on a card
    one_token.ours = compare
    for case in CASES:
        CASES[case]()
    print(json.dumps(deviations))
