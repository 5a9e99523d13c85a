"""What stands for a card's own kernels where operations are counted: each is one operation without
contents, with its shapes and gradients; and `costs`, what it moves and multiplies."""
import contextlib

import torch

from mambino.kernels.registry import KERNELS

NAMESPACE = 'mambino_roofline'
CHUNK = 64          # tokens of a chunk of our Triton scan


def operation(name, schema):
    """An operation of that name and schema that computes nothing: a function to register shapes and
    gradients with."""
    def compute(*args):
        raise NotImplementedError(f'{name} only stands for a kernel')
    return torch.library.custom_op(f'{NAMESPACE}::{name}', compute, mutates_args=(), schema=schema)


# --- rms_norm: one kernel each way ----------------------------------------------------------------

norm = operation('rms_norm', '(Tensor x, Tensor weight) -> Tensor')
norm_backward = operation('rms_norm_backward',
                          '(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)')
norm.register_fake(lambda x, weight: torch.empty_like(x))
norm_backward.register_fake(lambda grad, x, weight: (torch.empty_like(x), torch.empty_like(weight)))
norm.register_autograd(
    lambda ctx, grad: tuple(norm_backward(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def rms_norm(x, weight, eps, dtype=None):
    return norm(x.float(), weight).to(dtype or x.dtype)


# --- Mamba-2's scan as our Triton kernels have it -------------------------------------------------

INPUTS = 'Tensor xBC, Tensor dt, Tensor dt_bias, Tensor A, Tensor D'
scan = operation('mamba2_scan', f'({INPUTS}, int groups, int head_dim) -> (Tensor, Tensor, Tensor)')
scan_backward = operation(
    'mamba2_scan_backward', f'(Tensor grad_y, {INPUTS}, Tensor states, int groups, int head_dim) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)')


def sizes_of(xBC, dt, groups, head_dim):
    """B, T, H, P, N of the scan's inputs."""
    B, T, H = dt.shape
    return B, T, H, head_dim, (xBC.shape[-1] - H * head_dim) // (2 * groups)


@scan.register_fake
def _(xBC, dt, dt_bias, A, D, groups, head_dim):
    B, T, H, P, N = sizes_of(xBC, dt, groups, head_dim)
    last = xBC.new_empty(B, H, P, N, dtype=torch.float32)
    return xBC.new_empty(B, T, H, P), last, xBC.new_empty(B, -(-T // CHUNK), H, P, N)


@scan_backward.register_fake
def _(grad_y, xBC, dt, dt_bias, A, D, states, groups, head_dim):
    return tuple(torch.empty_like(u) for u in (xBC, dt, dt_bias, A, D))


def keep(ctx, inputs, output):
    *tensors, ctx.groups, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors, output[2])


def differentiate(ctx, grad_y, grad_last, _):
    xBC = ctx.saved_tensors[0]
    gradients = scan_backward(grad_y.to(xBC.dtype), *ctx.saved_tensors, ctx.groups, ctx.head_dim)
    return *gradients, None, None


scan.register_autograd(differentiate, setup_context=keep)


def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    y, last, _ = scan(xBC, dt, dt_bias, A, D, groups, head_dim)
    return y, last


def costs(name, args):
    """(bytes, FLOPs) of the scan, forward or backward, by the account that
    mambino/kernels/triton_ssd.py gives of itself: with u the bytes of x and s those of the states
    at chunk starts 3 u + 2 s forward and 8 u + 5 s backward, beside B, C and dt."""
    backward = name.endswith('backward')
    xBC, dt = args[1:3] if backward else args[:2]
    groups, head_dim = args[-2:]
    B, T, H, P, N = sizes_of(xBC, dt, groups, head_dim)
    u = B * T * H * P * xBC.element_size()
    s = u * N / CHUNK
    rest = (xBC.numel() * xBC.element_size() - u) + dt.numel() * (dt.element_size() + 8)
    flops = B * T * (4 * H * P * N + CHUNK * (H * P + groups * N))      # as Mamba2Mixer.flops counts them
    if backward:
        return 8 * u + 5 * s + 2 * rest, 2.5 * flops                    # some of the forward pass is made again
    return 3 * u + 2 * s + rest, flops


COSTS = {'mamba2_scan': costs, 'mamba2_scan_backward': costs}


# --- which of them stand in -----------------------------------------------------------------------

@contextlib.contextmanager
def in_place(*functions, loss_chunk=0):
    """Within, these functions are asked first for the operation of their name; the loss is cut into
    chunks of loss_chunk tokens, 0: as it is by itself."""
    before = {name: list(kernels) for name, kernels in KERNELS.items()}
    loss = next(k for k in KERNELS['linear_cross_entropy'] if k.__module__.endswith('.anywhere'))

    def linear_cross_entropy(x, weight, targets, factors=None):
        return loss(x, weight, targets, factors, chunk=loss_chunk)
    for function in (*functions, *([linear_cross_entropy] if loss_chunk else [])):
        KERNELS[function.__name__].insert(0, function)
    try:
        yield
    finally:
        for name, kernels in before.items():
            KERNELS[name][:] = kernels
