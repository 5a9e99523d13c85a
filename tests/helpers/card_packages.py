"""mamba-ssm and causal-conv1d on a pretended card: stand-ins that compute what their kernels do, by the definitions,
take the arguments that they take, and refuse what they refuse.

    with pretended() as card:
        card_packages.install(card)             # for the rest of the process, before a model first computes
        ...; card.kernels['mamba-ssm, backward']
"""
import functools
import sys
import threading
import types

import torch
import torch.nn.functional as F

from helpers.card_rules import changed
from helpers.card_tensor import CardTensor
from mambino.kernels.registry import substituted
from model_mamba import causal_conv1d, selective_scan, ssd


def install(card, **fails):
    """Makes the packages importable. fails: {'ssd' or 'scan' or 'conv': a function that is called with the inputs
    before the kernel computes, and may raise what a kernel would}."""
    forward = kernel(card, 'mamba-ssm, forward', ssd_forward, fails.get('ssd'))
    backward = kernel(card, 'mamba-ssm, backward', ssd_backward)
    scan, conv = (differentiable(card, *one) for one in (
        ('mamba-ssm, scan', scan_forward, fails.get('scan')), ('causal-conv1d', conv_forward, fails.get('conv'))))
    modules = {
        'mamba_ssm.ops.triton.ssd_combined': dict(
            _mamba_chunk_scan_combined_fwd=forward, _mamba_chunk_scan_combined_bwd=backward),
        'mamba_ssm.ops.selective_scan_interface': dict(selective_scan_fn=scan),
        'causal_conv1d': dict(causal_conv1d_fn=conv),
    }
    for name, functions in modules.items():
        sys.modules[name] = types.SimpleNamespace(**functions)


# --- kernels of functions -------------------------------------------------------------------------

class Aside(threading.Thread):
    """A call in a thread of its own, which knows of no card, no autocast, no gradient that is being computed."""

    def __init__(self, compute, args, kwargs):
        super().__init__()
        self.call = functools.partial(compute, *args, **kwargs)
        self.out = self.error = None

    def run(self):
        try:
            self.out = self.call()
        except Exception as error:
            self.error = error

    def result(self):
        self.start()
        self.join()
        if self.error:
            raise self.error
        return self.out


def gradients(compute, tensors, grads):
    """Of tensors, from those of what compute(*tensors) returns; None of a result is zeros."""
    leaves = [u.detach().requires_grad_() for u in tensors]
    results = compute(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(u, grad) for u, grad in zip(results, grads) if grad is not None]
    return torch.autograd.grad([u for u, _ in pairs], leaves, [grad for _, grad in pairs])


def kernel(card, name, compute, fail=None):
    """A function of the card's tensors that is one launch. Tensors of the CPU are refused."""

    def inside(value):
        if isinstance(value, torch.Tensor) and not isinstance(value, CardTensor):
            raise RuntimeError(f'Expected {name} to be given tensors of the card')
        return value.inner if isinstance(value, CardTensor) else value

    def run(*args, **kwargs):
        if fail:
            fail(*args, **kwargs)
        args = changed(args, inside)
        kwargs = {key: inside(value) for key, value in kwargs.items()}
        out = Aside(compute, args, kwargs).result()
        card.launch(name)
        return changed(out, lambda u: card.take(u) if isinstance(u, torch.Tensor) else u)
    return run


def differentiable(card, name, compute, fail=None):
    """The same of a function with a gradient, which is another launch. Keyword arguments take no part in it."""

    def forward_of(kwargs):
        return kernel(card, name, lambda *tensors: compute(*tensors, **kwargs), fail)

    def backward(grads, tensors, kwargs):
        return gradients(lambda *inputs: compute(*inputs, **kwargs), tensors, grads)

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, kwargs, *tensors):
            ctx.save_for_backward(*tensors)
            ctx.kwargs = kwargs
            return forward_of(kwargs)(*tensors)

        @staticmethod
        def backward(ctx, *grads):
            grads_of = kernel(card, f'{name}, backward', backward)
            return None, *grads_of(grads, ctx.saved_tensors, ctx.kwargs)

    return lambda *tensors, **kwargs: Kernel.apply(kwargs, *tensors)


# --- what they compute ----------------------------------------------------------------------------

def ssd_result(x, dt, A, B, C, D, dt_bias, state):
    with substituted():
        y, last = ssd(x.float(), F.softplus(dt.float() + dt_bias), A, B.float(), C.float(), 64, state)
    return y + D[:, None] * x.float(), last


def ssd_forward(x, dt, A, B, C, chunk_size, *, D, dt_bias, initial_states, dt_softplus):
    assert dt_softplus and chunk_size == 1 << (chunk_size - 1).bit_length()
    assert x.dtype == B.dtype == C.dtype and A.dtype == D.dtype == dt_bias.dtype == torch.float32
    y, last = ssd_result(x, dt, A, B, C, D, dt_bias, initial_states)
    return y.to(x.dtype), None, None, None, None, last


def ssd_backward(dout, x, dt, A, B, C, out, chunk_size, *, D, dt_bias, initial_states, dfinal_states, dt_softplus,
                 dx, dB, dC):
    assert dout.dtype == out.dtype == x.dtype
    inputs = [x, dt, A, B, C, D, dt_bias] + [initial_states] * (initial_states is not None)
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias, *grad_state = gradients(
        lambda *u: ssd_result(*u, *[None] * (8 - len(u))), inputs, (dout.float(), dfinal_states))
    for room, grad in ((dx, grad_x), (dB, grad_B), (dC, grad_C)):
        room.copy_(grad)
    return None, grad_dt, grad_A, None, None, grad_D, None, grad_bias, grad_state[0] if grad_state else None


def scan_forward(u, delta, A, B, C, D, z, delta_bias, *, delta_softplus, return_last_state):
    """u, delta, z (B, E, T), A (E, N), B, C (B, N, T), D, delta_bias (E) → (B, E, T), last state (B, E, N)."""
    assert delta_softplus and return_last_state and u.dtype == delta.dtype == B.dtype == C.dtype == z.dtype
    dt = F.softplus(delta.float() + delta_bias[:, None])
    with substituted():
        y, last = selective_scan(u.mT.float(), dt.mT, A, B.mT.float(), C.mT.float())
    y = (y.mT + D[:, None] * u.float()) * F.silu(z.float())
    return y.to(u.dtype), last.mT


def conv_forward(x, weight, bias, *, activation):
    """x (B, E, T), weight (E, K), bias (E) → silu of the causal convolution (B, E, T)."""
    assert activation == 'silu' and x.dtype == weight.dtype == bias.dtype and 2 <= weight.shape[1] <= 4
    assert x.stride(1) == 1 and all(stride % 8 == 0 for stride in (x.stride(0), x.stride(2))) or x.stride(2) == 1
    with substituted():
        y, _ = causal_conv1d(x.mT, weight[:, None], bias)
    return y.mT + torch.zeros_like(x)                           # in the order in which x lies
