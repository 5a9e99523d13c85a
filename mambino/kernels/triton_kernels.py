"""Offers a Mamba's recurrences and convolution by Triton kernels of our own: triton_scan.py,
triton_ssd.py, triton_conv.py.

Triton comes with torch for Linux; where it is missing, nothing here applies. A kernel is tried in
the sizes and the precision in which it is first wanted: it must run, and on a small example give
what the definition gives in fp32, gradients too. If it does not, one line says so and others
compute.
"""
import functools
import importlib.util

import torch

from mambino.kernels.checked import compile_trouble, constant, notes, works
from mambino.kernels.registry import DEFINITIONS, describes, kernel, substituted

SCAN = "our Triton scan of Mamba-1"
SSD = "our Triton scan of Mamba-2"
CONV = "our Triton convolution"
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.05}    # of the largest value


@functools.cache
def has_triton():
    return importlib.util.find_spec('triton') is not None


def compare(definition, compute, inputs, has_state=True):
    """Raises if a kernel differs from the definition in fp32 in its results or a gradient. The last
    state has a gradient if there is a first one."""
    tolerance = TOLERANCE[inputs[0].dtype]
    grads_of = []
    results = []
    for function, dtype in ((definition, torch.float32), (compute, None)):
        leaves = [u.detach().to(dtype or u.dtype).requires_grad_() for u in inputs]
        with substituted():
            outputs = function(*leaves)[:2]
        # of a generator of its own: a run's dropout must not depend on what was tried
        grads_of = grads_of or [torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u) for u in outputs]
        grads = [g.to(u.dtype) for g, u in zip(grads_of, outputs)]
        used = 2 if has_state else 1
        results.append([*outputs, *torch.autograd.grad(outputs[:used], leaves, grads[:used])])
    names = ('y', 'the last state', *(f'the gradient of input {i}' for i in range(len(inputs))))
    for name, expected, computed in zip(names, *results):
        error = (computed.float() - expected).abs().max() / expected.abs().max()
        if not error <= tolerance:                              # also where it is NaN
            raise ValueError(f'{name} differs from plain PyTorch by {error:.1e} of the largest')


def attempt_with(make, definition, compute, has_state=True):
    """What `works` tries: compare with inputs drawn by make(randn). What is compiled for it should
    be what a run takes: so T is a multiple of 16, as a run's is, and there is a state only if the
    run has one."""
    def attempt():
        with torch.enable_grad(), torch.autocast('cuda', enabled=False):
            generator = torch.Generator().manual_seed(0)
            inputs = make(functools.partial(torch.randn, generator=generator))
            compare(definition, compute, inputs, has_state)
    return attempt


# --- Mamba-1 --------------------------------------------------------------------------------------

def scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    return torch.ops.mambino.triton_scan(x, dt, dt_bias, A, B, C, D, z, state)[:2]


@constant
def scan_works(kind, E, N, strides, dtype, has_state):
    """Whether the kernels of triton_scan.py work in these sizes, tried once. strides: the places
    from one step to the next in x, dt, B, C and z, for which they are compiled."""
    def make(randn):
        batch, T = 2, 112
        widths = E, E, N, N, E
        x, dt, B, C, z = (randn(batch, T, stride).to(kind, dtype)[..., :width]
                          for stride, width in zip(strides, widths))
        dt_bias, D = randn(2, E).to(kind)
        A = -randn(E, N).abs().to(kind) - 0.1
        state = randn(batch, N, E).to(kind)
        return [x, dt, dt_bias, A, B, C, D, z, *[state] * has_state]

    def attempt():
        from mambino.kernels import triton_scan  # noqa: F401, makes the operation
        attempt_with(make, DEFINITIONS['mamba1_scan'], scan, has_state)()
    return works(SCAN, (E, N, strides, dtype, has_state), attempt)


@kernel
def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    if not takes_scan(x.device.type, x, dt, A, B, C, z, state):
        return NotImplemented
    return scan(x, dt, dt_bias, A, B, C, D, z, state)


def takes_scan(kind, x, dt, A, B, C, z, state):
    """Whether triton_scan.py computes this on this kind of device."""
    if kind != 'cuda' or not has_triton() or x.dtype not in TOLERANCE or A.shape[1] > 128:
        return False
    strides = tuple(max(u.shape[2], u.stride(1)) for u in (x, dt, B, C, z))
    return scan_works(kind, *A.shape, strides, x.dtype, state is not None)


# --- Mamba-2 --------------------------------------------------------------------------------------

def ssd(xBC, dt, dt_bias, A, D, state=None, *, groups, head_dim):
    return torch.ops.mambino.triton_ssd(xBC, dt, dt_bias, A, D, state, groups, head_dim)[:2]


@constant
def ssd_works(kind, head_dim, N, dtype, has_state):
    """Whether the kernels of triton_ssd.py work with heads and states of these sizes, tried once."""
    def make(randn):
        batch, T, H, G = 2, 160, 6, 2
        xBC = randn(batch, T, H * head_dim + 2 * G * N).to(kind, dtype)
        dt = (randn(batch, T, H) - 2).to(kind, dtype)
        dt_bias, A, D = randn(3, H).to(kind)
        state = randn(batch, H, head_dim, N).to(kind)
        return [xBC, dt, dt_bias, -A.abs() - 0.1, D, *[state] * has_state]

    def definition(xBC, dt, dt_bias, A, D, state=None):
        return DEFINITIONS['mamba2_scan'](xBC, dt, dt_bias, A, D, 2, head_dim, 64, state)

    def attempt():
        from mambino.kernels import triton_ssd  # noqa: F401, makes the operation
        attempt_with(make, definition, functools.partial(ssd, groups=2, head_dim=head_dim), has_state)()
    return works(SSD, (head_dim, N, dtype, has_state), attempt)


@kernel
def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    if not takes_ssd(xBC.device.type, xBC, dt, groups, head_dim, state):
        return NotImplemented
    return ssd(xBC, dt, dt_bias, A, D, state, groups=groups, head_dim=head_dim)


def takes_ssd(kind, xBC, dt, groups, head_dim, state):
    """Whether triton_ssd.py computes this on this kind of device."""
    if kind != 'cuda' or not has_triton() or xBC.dtype not in TOLERANCE or xBC.shape[1] == 1:
        return False                                            # one token takes one step, not a chunk
    N = (xBC.shape[-1] - dt.shape[-1] * head_dim) // (2 * groups)
    if max(head_dim, N) > 128 or head_dim * N > 64 * 128:       # more than registers hold
        return False
    return ssd_works(kind, head_dim, N, xBC.dtype, state is not None)


# --- the convolution ------------------------------------------------------------------------------

def conv(x, weight, bias, state=None):
    y = torch.ops.mambino.triton_conv(x, weight, bias, state)
    T, K = x.shape[1], weight.shape[-1]
    if T >= K - 1:
        return y, x[:, T - K + 1:].clone()                      # a copy: a view would keep all of x
    past = x.new_zeros(x.shape[0], K - 1, x.shape[2]) if state is None else state.to(x.dtype)
    return y, torch.cat((past[:, T:], x), 1)


@constant
def conv_works(kind, K, dtype):
    """Whether the kernels of triton_conv.py work with K taps, tried once."""
    def make(randn):
        batch, T, E = 2, 100, 300
        x = randn(batch, T, E).to(kind, dtype)
        weight, bias = randn(E, 1, K).to(kind), randn(E).to(kind)
        return [x, weight, bias, randn(batch, K - 1, E).to(kind, dtype)]

    def attempt():
        from mambino.kernels import triton_conv  # noqa: F401, makes the operation
        attempt_with(make, DEFINITIONS['causal_conv1d'], conv)()
    return works(CONV, (K, dtype), attempt)


@kernel
def causal_conv1d(x, weight, bias, state=None):
    kind, K = x.device.type, weight.shape[-1]
    if kind != 'cuda' or not has_triton() or x.dtype not in TOLERANCE or not 2 <= K <= 4:
        return NotImplemented
    if not conv_works(kind, K, x.dtype):
        return NotImplemented
    return conv(x, weight, bias, state)


@describes
def describe(kind, is_compiled):
    if kind != 'cuda' or not has_triton() or compile_trouble(kind):
        return [], []
    said = [notes[name] for name in (SCAN, SSD, CONV) if name in notes]
    return ["Triton kernels of our own for the scans of Mamba-1 and Mamba-2 and their convolution"], said
