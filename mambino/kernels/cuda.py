"""The models' operations on NVIDIA cards: mamba-ssm's kernels where they can be imported and give
the right numbers, flex_attention for windows, grouped products for experts, and a Mamba-1's scan
compiled chunk by chunk.

mamba-ssm's Triton parts are enough; its CUDA extension need not have been built. Letters of the
shapes as in anywhere.py.
"""
import functools
import importlib
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels.anywhere import in_window
from mambino.kernels.registry import DEFINITIONS, kernel

PACKAGE = 'mamba_ssm'
FUSED = {   # name: the module of mamba-ssm, and its function
    'ssd': ('mamba_ssm.ops.triton.ssd_combined', 'mamba_chunk_scan_combined'),
    'scan': ('mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn'),
}
TOLERANCE = 0.01    # of the largest value, by which a fused kernel may differ


# --- mamba-ssm ------------------------------------------------------------------------------------

def import_past_init(package, module):
    """A module of a package whose own __init__ fails: mamba-ssm's imports a CUDA extension that may
    not have been built."""
    try:
        return importlib.import_module(module)
    except Exception:  # not only ImportError: a library of another version, …
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise
        sys.modules[package] = stub = types.ModuleType(package)
        stub.__path__ = list(spec.submodule_search_locations)
        try:
            return importlib.import_module(module)
        finally:
            del sys.modules[package]


@functools.cache
def fused(device='cuda'):
    """({name: function}, notes) of mamba-ssm's kernels that can be imported and, on a small example
    on this device, give what the definitions give, gradients too. One that is there and does not
    work is left out, with a note."""
    functions, notes = {}, []
    for name, (module, function) in FUSED.items():
        try:
            function = getattr(import_past_init(PACKAGE, module), function)
        except Exception:
            continue
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                check_fused(name, function, device)
            functions[name] = function
        except Exception as error:
            reason = str(error).splitlines()[0][:80] if str(error) else ''
            notes.append(f"mamba-ssm's {name} does not work here ({type(error).__name__}: {reason})")
    return functions, notes


def examples(name, device):
    """Small inputs of the operation that a fused kernel computes, and what it takes beside them."""
    B, T, H, P, N = 2, 96, 4, 32, 16
    shapes = {
        'ssd': [(B, T, H * P + 2 * N), (B, T, H), (H,), (H,), (H,)],  # xBC, dt, dt_bias, A, D
        # x, dt, dt_bias, A, B, C, D, z
        'scan': [(B, T, P), (B, T, P), (P,), (P, N), (B, T, N), (B, T, N), (P,), (B, T, P)],
    }
    inputs = [torch.randn(shape).to(device) for shape in shapes[name]]
    inputs[3] = -inputs[3].abs() - 0.1                          # A
    return inputs, {'ssd': (1, P, 32), 'scan': ()}[name]


def check_fused(name, function, device):
    """Raises if a fused kernel fails, or differs from the definition by more than TOLERANCE, in its
    result or a gradient."""
    operations = {'ssd': ('mamba2_scan', fused_mamba2), 'scan': ('mamba1_scan', fused_mamba1)}
    operation, kernel_of = operations[name]
    inputs, sizes = examples(name, device)
    results = []
    for compute in (DEFINITIONS[operation], functools.partial(kernel_of, function)):
        leaves = [u.clone().requires_grad_() for u in inputs]
        y = compute(*leaves, *sizes)[0]
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for expected, computed in zip(*results):
        error = (computed.float() - expected).abs().max()
        if not error <= TOLERANCE * expected.abs().max():       # also where it is NaN
            raise ValueError('gives other numbers than plain PyTorch')


def fused_mamba1(function, x, dt, dt_bias, A, B, C, D, z):
    x, dt, B, C, z = (u.transpose(1, 2).contiguous().to(x.dtype) for u in (x, dt, B, C, z))  # channels before time
    y, state = function(x, dt, A, B, C, D.float(), z, dt_bias.float(), delta_softplus=True,
                        return_last_state=True)
    return y.transpose(1, 2), state.transpose(1, 2)


@kernel
def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    if x.device.type != 'cuda' or state is not None or torch.compiler.is_compiling():
        return NotImplemented
    if 'scan' not in fused()[0]:
        return NotImplemented
    return fused_mamba1(fused()[0]['scan'], x, dt, dt_bias, A, B, C, D, z)


def fused_mamba2(function, xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    E = dt.shape[-1] * head_dim
    N = (xBC.shape[-1] - E) // (2 * groups)
    x, B, C = xBC.split((E, groups * N, groups * N), dim=-1)
    x = x.unflatten(-1, (-1, head_dim))                         # (B, T, H, P)
    B, C = (u.unflatten(-1, (groups, N)) for u in (B, C))       # (B, T, G, N)
    return function(x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True,
                    initial_states=state, return_final_states=True)


@kernel
def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    if xBC.device.type != 'cuda' or torch.compiler.is_compiling() or 'ssd' not in fused()[0]:
        return NotImplemented
    return fused_mamba2(fused()[0]['ssd'], xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size, state)


# --- a Mamba-1's scan without mamba-ssm -----------------------------------------------------------

CHUNK = 8   # steps compiled as one: 4 are as fast, 16 take twice as long in the backward pass


def scan_chunk(x, dt, A, B, C, h):
    """Steps of the recurrence, unrolled for a compiler. x, dt (B, k, E), A (N, E), B, C (B, k, N),
    h (B, N, E) → y (B, k, E), h."""
    ys = []
    for i in range(x.shape[1]):
        dt_i = dt[:, i, None]                                   # (B, 1, E)
        h = torch.exp(dt_i * A) * h + (dt_i * x[:, i, None]) * B[:, i, :, None]
        ys.append((h * C[:, i, :, None]).sum(1))
    return torch.stack(ys, 1), h


def scan_chunk_backward(x, dt, A, B, C, h, grad_y, grad_h):
    """The gradients of x, dt, B, C, A and h, from those of y and of the last h."""
    states, decays = [h], []
    for i in range(x.shape[1]):
        dt_i = dt[:, i, None]
        decays.append(torch.exp(dt_i * A))
        states.append(decays[i] * states[i] + (dt_i * x[:, i, None]) * B[:, i, :, None])
    grads_x, grads_dt, grads_B, grads_C = [], [], [], []
    grad_A = torch.zeros_like(A)
    for i in reversed(range(x.shape[1])):
        dt_i = dt[:, i, None]
        grad = grad_h + grad_y[:, i, None] * C[:, i, :, None]   # (B, N, E), of the state after step i
        grads_C.append((states[i + 1] * grad_y[:, i, None]).sum(2))
        grads_B.append((grad * (dt_i * x[:, i, None])).sum(2))
        grad_dt_x = (grad * B[:, i, :, None]).sum(1)            # (B, E)
        grad_h = grad * decays[i]
        grad_exponent = grad_h * states[i]                      # of dt A
        grad_A = grad_A + (grad_exponent * dt_i).sum(0)
        grads_dt.append((grad_exponent * A).sum(1) + grad_dt_x * x[:, i])
        grads_x.append(grad_dt_x * dt[:, i])
    stacked = (torch.stack(grads[::-1], 1) for grads in (grads_x, grads_dt, grads_B, grads_C))
    return *stacked, grad_A, grad_h


@functools.cache
def chunk_functions():
    """The two, compiled: on a GPU each is a few kernels where PyTorch would start a hundred."""
    return torch.compile(scan_chunk, dynamic=False), torch.compile(scan_chunk_backward, dynamic=False)


class ScanByChunks(Function):
    """selective_scan by chunks, each one call of chunk_functions; T is a multiple of CHUNK."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        forward, _ = chunk_functions()
        A_t = A.t().contiguous()
        ys, starts = [], []
        for x_c, dt_c, B_c, C_c in zip(*(u.split(CHUNK, 1) for u in (x, dt, B, C))):
            starts.append(h)
            y, h = forward(x_c, dt_c, A_t, B_c, C_c, h)
            ys.append(y)
        ctx.save_for_backward(x, dt, A_t, B, C, torch.stack(starts))
        return torch.cat(ys, 1), h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, dt, A_t, B, C, starts = ctx.saved_tensors
        _, backward = chunk_functions()
        grads, grad_A = [], torch.zeros_like(A_t)
        chunks = list(zip(*(u.split(CHUNK, 1) for u in (x, dt, B, C, grad_y)), starts))
        for x_c, dt_c, B_c, C_c, grad_c, h in reversed(chunks):
            *of_chunk, of_A, grad_h = backward(x_c, dt_c, A_t, B_c, C_c, h, grad_c, grad_h)
            grads.append(of_chunk)
            grad_A += of_A
        grad_x, grad_dt, grad_B, grad_C = (torch.cat(parts[::-1], 1) for parts in zip(*grads))
        return grad_x, grad_dt, grad_A.t(), grad_B, grad_C, grad_h


@kernel
def selective_scan(x, dt, A, B, C, state=None):
    T = x.shape[1]
    if x.device.type != 'cuda' or T < CHUNK:
        return NotImplemented
    x, dt, A, B, C = (u.float().contiguous() for u in (x, dt, A, B, C))
    if state is None:
        state = x.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    x, dt, B, C = (F.pad(u, (0, 0, 0, -T % CHUNK)) for u in (x, dt, B, C))  # dt = 0 leaves the state as it is
    y, state = ScanByChunks.apply(x, dt, A, B, C, state)
    return y[:, :T], state


# --- attention and experts ------------------------------------------------------------------------

@functools.cache
def block_mask(T, window, device):
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda b, h, i, j: in_window(i, j, window), None, None, T, T, device=device)


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)


@kernel
def attention(q, k, v, window=0, dropout=0.0, mask=None):
    """In a short window by flex_attention, compiled, which skips the blocks that the window
    hides."""
    T, S, H = q.shape[1], k.shape[1], q.shape[2]
    if q.device.type != 'cuda' or dropout or mask is not None or S != T or not 0 < 2 * window <= T:
        return NotImplemented
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))            # (B, heads, T, P)
    if k.shape[1] != H:
        k, v = (u.repeat_interleave(H // u.shape[1], dim=1) for u in (k, v))
    y = compiled_flex_attention()(q, k, v, block_mask=block_mask(T, window, q.device))
    return y.transpose(1, 2).flatten(2)


@kernel
def experts_swiglu(x, pairs, gate_up, down):
    """All experts' products as one, where none of them has a limit: the card is not waited for."""
    fits = x.dtype == torch.bfloat16 and x.shape[1] % 8 == down.shape[2] % 8 == 0
    if not x.is_cuda or not fits or pairs.capacity < len(x):
        return NotImplemented
    ends = pairs.counts.cumsum(0, dtype=torch.int32)
    rows = x.index_select(0, pairs.token)                       # (n k, D), sorted by expert
    gate, up = torch._grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, -1)
    return torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
