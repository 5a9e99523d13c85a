"""Our Triton kernels in Triton's interpreter: run by test_triton.py in a process of its own, since
TRITON_INTERPRET must be set before triton is imported.

Prints a line of JSON a case: the largest deviation of each result and gradient from the
definition's, as a share of its largest value.
"""
import functools
import json
import os
import sys

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from mambino.kernels import triton_conv, triton_kernels, triton_scan, triton_ssd  # noqa: E402
from mambino.kernels.registry import DEFINITIONS, substituted  # noqa: E402
from model_mamba import causal_conv1d, mamba1_scan, mamba2_scan  # noqa: E402, F401, to define them


def scan_case(batch, T, E, N, state, last):
    """As training has them: B and C beside dt in one tensor, z beside x."""
    B, C = torch.randn(batch, T, 2 * N + 3)[..., 3:].split(N, -1)
    inputs = [torch.randn(batch, T, E), torch.randn(batch, T, E) - 3, torch.randn(E), -torch.rand(E, N) * 8 - 0.1, B, C,
              torch.randn(E), torch.randn(batch, T, 2 * E)[..., E:]]
    if state:
        inputs.append(torch.randn(batch, N, E))
    return DEFINITIONS['mamba1_scan'], triton_kernels.scan, inputs, last


def ssd_case(batch, T, H, P, N, G, state, last, steep=1, dtype='float32'):
    width = H * P + 2 * G * N
    inputs = [torch.randn(batch, T, width + 3)[..., :width], torch.randn(batch, T, H) - 2, torch.randn(H),
              -torch.rand(H) * 8 * steep - 0.1, torch.randn(H)]
    inputs[:2] = (u.to(getattr(torch, dtype)) for u in inputs[:2])
    if state:
        inputs.append(torch.randn(batch, H, P, N))

    def definition(xBC, dt, dt_bias, A, D, state=None):
        return DEFINITIONS['mamba2_scan'](xBC, dt, dt_bias, A, D, G, P, 64, state)
    return definition, functools.partial(triton_kernels.ssd, groups=G, head_dim=P), inputs, last


def conv_case(batch, T, E, K, state, last, dtype='float32'):
    """x as training has it: a part of what in_proj gives."""
    x = torch.randn(batch, T, E + 13)[..., 5:5 + E].to(getattr(torch, dtype))
    inputs = [x, torch.randn(E, 1, K), torch.randn(E)]
    if state:
        inputs.append(torch.randn(batch, K - 1, E).to(x.dtype))
    return DEFINITIONS['causal_conv1d'], triton_kernels.conv, inputs, last


def operation_case(batch, T, E, K, state):
    """What PyTorch asks of an operation of its own: shapes, gradients and strides under a compiler, too. Then the
    differences of gradients made a second time, and within a checkpoint."""
    _, _, inputs, _ = conv_case(batch, T, E, K, state, False)
    leaves = [u.requires_grad_() for u in inputs]
    torch.library.opcheck(torch.ops.mambino.triton_conv.default, leaves + [None] * (not state))

    def run(*leaves):
        return triton_kernels.conv(*leaves)[0].sum()
    totals = run(*leaves), run(*leaves), checkpoint(run, *leaves, use_reentrant=False)
    first, *others = (torch.autograd.grad(total, leaves) for total in totals)
    return [(b - a).abs().max().item() for grads in others for a, b in zip(first, grads)]


def deviations(definition, compute, inputs, last):
    """last: whether the last state has a gradient, too."""
    results = []
    for function, is_kernel in ((definition, False), (compute, True)):
        leaves = [(u if is_kernel else u.float()).detach().requires_grad_() for u in inputs]
        with substituted():
            outputs = function(*leaves)[:2]
        torch.manual_seed(1)
        grads = [torch.randn(u.shape).to(u.dtype) for u in outputs]
        used = 2 if last else 1
        results.append([*outputs, *torch.autograd.grad(outputs[:used], leaves, grads[:used])])
    return [((b.float() - a).abs().max() / a.abs().max()).item() for a, b in zip(*results)]


CASES = dict(scan=scan_case, ssd=ssd_case, conv=conv_case)
MODULES = dict(scan=triton_scan, ssd=triton_ssd, conv=triton_conv)


def main():
    for kind, arguments, constants in json.loads(sys.argv[1]):
        for name, value in constants.items():
            setattr(MODULES[kind], name, value)
        torch.manual_seed(0)
        if kind == 'conv operation':
            print(json.dumps(operation_case(**arguments)), flush=True)
        else:
            print(json.dumps(deviations(*CASES[kind](**arguments))), flush=True)


if __name__ == '__main__':
    main()
