"""The Mamba recurrences by mamba-ssm's kernels and the convolution by causal-conv1d's, on NVIDIA
cards where they can be imported and give the right numbers.

mamba-ssm's Triton parts are enough; its CUDA extension need not have been built. Its scan of
Mamba-2 is an operation to torch.compile, which does not look into it and fuses what stands around
it. Letters of the shapes as in anywhere.py.
"""
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types

import torch

from mambino.kernels import triton_kernels
from mambino.kernels.checked import aside_of_checkpoints, constant, first_line, works
from mambino.kernels.checked import notes as run_notes
from mambino.kernels.registry import DEFINITIONS, ORDER, describes, kernel, substituted

KIND = 'cuda'           # of the devices that all this is for
FUSED = {   # name: (package, its module, what is taken of it)
    'ssd': ('mamba_ssm', 'mamba_ssm.ops.triton.ssd_combined',
            ('_mamba_chunk_scan_combined_fwd', '_mamba_chunk_scan_combined_bwd')),
    'scan': ('mamba_ssm', 'mamba_ssm.ops.selective_scan_interface', ('selective_scan_fn',)),
    'conv': ('causal_conv1d', 'causal_conv1d', ('causal_conv1d_fn',)),
}
OLDEST = {'mamba_ssm': (2, 2, 6)}
OPERATIONS = {'ssd': 'mamba2_scan', 'scan': 'mamba1_scan', 'conv': 'causal_conv1d'}    # of the models' files
OWNERS = {'ssd': "mamba-ssm's ssd", 'scan': "mamba-ssm's scan", 'conv': 'causal-conv1d'}
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.04}   # of the largest value
CHUNK = 256             # tokens: what mamba-ssm's kernels are tuned for; results do not depend on it, nor on a model's


# --- what is there and works ----------------------------------------------------------------------

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


def fused(device='cuda', names=tuple(FUSED)):
    """({name: functions}, notes) of the kernels of others that can be imported and, on a small
    example on this device, give what the definitions give, gradients too. One that is there and
    does not work is left out, with a note. One answer for all devices of a kind: 'cuda', 'cuda:1'
    and a torch.device are the same."""
    kind = torch.device(device).type
    answers = {name: tried(name, kind) for name in names if OPERATIONS[name] in DEFINITIONS}
    found = {name: functions for name, (functions, _) in answers.items() if functions}
    return found, [note for _, note in answers.values() if note]


def refuse_old(package):
    """ValueError for a version of a package whose gradients may be NaN: mamba-ssm 2.2.2's of dt, as
    Triton's interpreter finds."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return                                                  # a folder on sys.path
    numbers = tuple(int(part) for part in version.split('.')[:3] if part.isdigit())
    if package in OLDEST and numbers < OLDEST[package]:
        raise ValueError(f'version {version} has NaN in gradients, {".".join(map(str, OLDEST[package]))} has none')


@functools.cache
def tried(name, kind):
    """The functions of a fused kernel, None where it is not there or does not work; and then a note or ''."""
    package, module, functions = FUSED[name]
    try:
        module = import_past_init(package, module)
    except Exception:
        return None, ''
    try:
        refuse_old(package)
        functions = tuple(getattr(module, function) for function in functions)
        with torch.enable_grad(), torch.autocast(kind, enabled=False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with aside_of_checkpoints():
                check(name, functions, kind)
        return functions, ''
    except Exception as error:
        return None, f'{OWNERS[name]} does not work here ({first_line(error, 80)})'


@constant
def is_fused(name, kind):
    return tried(name, kind)[0] is not None


def half_precision(kind):
    """The precision in which a run on this kind of device computes, if nothing else is said."""
    if kind != 'cuda':
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def examples(name, device):
    """Small inputs of the operation that a fused kernel computes, those that products make in the
    precision of a run, and what it takes beside them. Of other sizes than a model's: what Triton
    finds to be fastest for an example must not be kept for a run. In one head dt A adds up to some
    -3,000 in a chunk."""
    B, T, H, P, N = 2, 300 if name == 'ssd' else 96, 4, 32, 16
    shapes = {
        'ssd': [(B, T, H * P + 2 * N), (B, T, H), (H,), (H,), (H,)],  # xBC, dt, dt_bias, A, D
        # x, dt, dt_bias, A, B, C, D, z
        'scan': [(B, T, P), (B, T, P), (P,), (P, N), (B, T, N), (B, T, N), (P,), (B, T, P)],
        'conv': [(B, T, P), (P, 1, 4), (P,)],                         # x, weight, bias
    }
    inputs = [torch.randn(shape).to(device) for shape in shapes[name]]
    inputs = [u.to(half_precision(device)) if u.shape[:2] == (B, T) else u for u in inputs]
    if name != 'conv':
        inputs[3] = -inputs[3].abs() - 0.1                          # A
        inputs[3][0] = -16.0
    return inputs, {'ssd': (1, P), 'scan': (), 'conv': ()}[name]


def check(name, functions, device):
    """Raises if a fused kernel fails, or differs from the definition in fp32 by more than
    TOLERANCE, in its result or a gradient."""
    of_kernel = {'ssd': fused_mamba2, 'scan': fused_mamba1, 'conv': fused_conv}[name]
    inputs, sizes = examples(name, device)
    tolerance = TOLERANCE[inputs[0].dtype]
    results = []
    for compute, is_kernel in ((DEFINITIONS[OPERATIONS[name]], False), (functools.partial(of_kernel, functions), True)):
        leaves = [(u if is_kernel else u.float()).detach().clone().requires_grad_() for u in inputs]
        with substituted():
            y = compute(*leaves, *sizes)[0].float()
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for expected, computed in zip(*results):
        error = (computed.float() - expected).abs().max()
        if not error <= tolerance * expected.abs().max():           # also where it is NaN
            raise ValueError('gives other numbers than plain PyTorch')


def is_overtaken(name):
    """Whether our own Triton kernels are asked before, and have not failed: then nothing is said of
    this one, and it need not be tried."""
    own = {'ssd': triton_kernels.SSD, 'scan': triton_kernels.SCAN, 'conv': triton_kernels.CONV}[name]
    comes_first = ORDER.index('triton_kernels') < ORDER.index('fused')
    return comes_first and triton_kernels.has_triton() and own not in run_notes


@describes
def describe(kind, is_compiled):
    if kind != KIND:
        return [], []
    names = [name for name in FUSED if not is_overtaken(name) and (name == 'ssd' or not is_compiled)]
    found, notes = fused(kind, names)
    recurrences = [name for name in found if name != 'conv']
    kernels = [f"mamba-ssm's kernels ({', '.join(recurrences)})"] if recurrences else []
    if 'conv' in found:
        kernels.append("causal-conv1d's convolution")
    return kernels, notes + [note for name, note in run_notes.items() if name in OWNERS.values()]


# --- Mamba-2 --------------------------------------------------------------------------------------

def split_heads(xBC, groups, head_dim, heads):
    """xBC (B, T, HP + 2GN) → x (B, T, H, P), B and C (B, T, G, N)."""
    E = heads * head_dim
    N = (xBC.shape[-1] - E) // (2 * groups)
    x, B, C = xBC.split((E, groups * N, groups * N), dim=-1)
    return x.unflatten(-1, (heads, head_dim)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (groups, N))


SSD_INPUTS = ('Tensor xBC, Tensor dt, Tensor dt_bias, Tensor A, Tensor D, Tensor? state, int groups, '
              'int head_dim, int chunk_size')
_ssd = {}       # mamba-ssm's two functions, which the operations' names stand for


@torch.library.custom_op('mambino::ssd', mutates_args=(), schema=f'({SSD_INPUTS}) -> (Tensor, Tensor)')
def ssd_forward(xBC, dt, dt_bias, A, D, state, groups, head_dim, chunk_size):
    """mamba2_scan's results y (B, T, H, P), of xBC's precision, and last state (B, H, P, N), fp32."""
    x, B, C = split_heads(xBC, groups, head_dim, dt.shape[-1])
    y, *_, last = _ssd['forward'](x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=state,
                                  dt_softplus=True)
    return y.contiguous(), last.contiguous()                    # they are; a compiler relies on it


@ssd_forward.register_fake
def _(xBC, dt, dt_bias, A, D, state, groups, head_dim, chunk_size):
    batch, T, H = dt.shape
    N = (xBC.shape[-1] - H * head_dim) // (2 * groups)
    last = xBC.new_empty(batch, H, head_dim, N, dtype=torch.float32)
    return xBC.new_empty(batch, T, H, head_dim), last


@torch.library.custom_op('mambino::ssd_backward', mutates_args=(),
                         schema=f'(Tensor grad_y, Tensor? grad_last, Tensor y, {SSD_INPUTS}) '
                                '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')
def ssd_backward(grad_y, grad_last, y, xBC, dt, dt_bias, A, D, state, groups, head_dim, chunk_size):
    """The gradients of xBC, dt, dt_bias, A, D and state; that of no state is empty."""
    x, B, C = split_heads(xBC, groups, head_dim, dt.shape[-1])
    grad_xBC = torch.empty_like(xBC, memory_format=torch.contiguous_format)
    grad_x, grad_B, grad_C = split_heads(grad_xBC, groups, head_dim, dt.shape[-1])   # which are written to
    _, grad_dt, grad_A, _, _, grad_D, _, grad_bias, grad_state = _ssd['backward'](
        grad_y.to(y.dtype), x, dt, A, B, C, y, chunk_size, D=D, dt_bias=dt_bias, initial_states=state,
        dfinal_states=grad_last, dt_softplus=True, dx=grad_x, dB=grad_B, dC=grad_C)
    grad_state = D.new_empty(0) if grad_state is None else grad_state.float()
    return grad_xBC, grad_dt.contiguous(), grad_bias, grad_A, grad_D, grad_state.contiguous()


@ssd_backward.register_fake
def _(grad_y, grad_last, y, xBC, dt, dt_bias, A, D, state, groups, head_dim, chunk_size):
    grad_state = D.new_empty(0) if state is None else torch.empty_like(state, dtype=torch.float32)
    grad_xBC, grad_dt = (torch.empty_like(u, memory_format=torch.contiguous_format) for u in (xBC, dt))
    return grad_xBC, grad_dt, *(torch.empty_like(u) for u in (dt_bias, A, D)), grad_state


def save_for_ssd(ctx, inputs, output):
    *tensors, ctx.groups, ctx.head_dim, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *tensors)


def gradients_of_ssd(ctx, grad_y, grad_last):
    y, *tensors = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(y)
    *grads, grad_state = ssd_backward(grad_y, grad_last, y, *tensors, ctx.groups, ctx.head_dim, ctx.chunk_size)
    return *grads, None if tensors[-1] is None else grad_state, None, None, None


ssd_forward.register_autograd(gradients_of_ssd, setup_context=save_for_ssd)


def fused_mamba2(functions, xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    _ssd['forward'], _ssd['backward'] = functions
    return compute_ssd(xBC, dt, dt_bias, A, D, groups, head_dim, state)


def compute_ssd(xBC, dt, dt_bias, A, D, groups, head_dim, state):
    if state is not None:
        state = state.float().contiguous()
    return ssd_forward(xBC, dt, dt_bias, A, D, state, groups, head_dim, CHUNK)


@constant
def ssd_works(kind, batch, T, H, groups, head_dim, N, dtype, needs_grad):
    """Whether mamba-ssm's scan runs in these sizes: a card may have too little shared memory for it."""
    def attempt():
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            width = H * head_dim + 2 * groups * N
            xBC = torch.zeros(batch, T, width, dtype=dtype, device=kind, requires_grad=needs_grad)
            dt = xBC.new_zeros(batch, T, H)
            bias, A, D = xBC.new_zeros(3, H, dtype=torch.float32)
            y, _ = compute_ssd(xBC, dt, bias, A, D, groups, head_dim, None)
            if needs_grad:
                torch.autograd.grad(y.float().sum(), xBC)
    return works(OWNERS['ssd'], (H, groups, head_dim, N, dtype, needs_grad), attempt)


@kernel
def mamba2_scan(xBC, dt, dt_bias, A, D, groups, head_dim, chunk_size=64, state=None):
    kind = xBC.device.type
    batch, T, H = dt.shape
    if kind != KIND or T == 1 or not is_fused('ssd', kind):   # one token takes one step, not a chunk
        return NotImplemented
    if torch.compiler.is_compiling():
        batch, T = 4, 1024                                      # which may have no fixed values there
    N = (xBC.shape[-1] - H * head_dim) // (2 * groups)
    if not ssd_works(kind, batch, T, H, groups, head_dim, N, xBC.dtype, torch.is_grad_enabled()):
        return NotImplemented
    return compute_ssd(xBC, dt, dt_bias, A, D, groups, head_dim, state)


# --- Mamba-1 --------------------------------------------------------------------------------------

def fused_mamba1(functions, x, dt, dt_bias, A, B, C, D, z):
    function, = functions
    x, dt, B, C, z = (u.transpose(1, 2).contiguous().to(x.dtype) for u in (x, dt, B, C, z))  # channels before time
    y, state = function(x, dt, A, B, C, D.float(), z, dt_bias.float(), delta_softplus=True,
                        return_last_state=True)
    return y.transpose(1, 2), state.transpose(1, 2)


@kernel
def mamba1_scan(x, dt, dt_bias, A, B, C, D, z, state=None):
    kind = x.device.type
    if kind != KIND or state is not None or torch.compiler.is_compiling() or not is_fused('scan', kind):
        return NotImplemented
    return fused_mamba1(tried('scan', kind)[0], x, dt, dt_bias, A, B, C, D, z)


# --- the convolution ------------------------------------------------------------------------------

def fused_conv(functions, x, weight, bias):
    function, = functions
    y = function(x.mT, weight[:, 0].to(x.dtype), bias.to(x.dtype), activation='silu').mT
    return y, x[:, x.shape[1] - weight.shape[-1] + 1:].clone()  # a copy: a view would keep all of x


@kernel
def causal_conv1d(x, weight, bias, state=None):
    kind = x.device.type
    K = weight.shape[-1]
    fits = 2 <= K <= 4 and x.shape[2] % 8 == x.stride(1) % 8 == x.stride(0) % 8 == 0 and x.stride(2) == 1
    if kind != KIND or state is not None or not fits or x.shape[1] < K:
        return NotImplemented
    if torch.compiler.is_compiling() or not is_fused('conv', kind):     # a compiler fuses it with its neighbours
        return NotImplemented
    return fused_conv(tried('conv', kind)[0], x, weight, bias)
