"""The part `kernels`: every kernel that is offered to an operation against the operation's
definition, values and gradients; and single ones in the sizes where they could go wrong.

The definition computes in fp64 where it can, else in fp32, on the same device without TF32."""
import inspect

import torch
import torch.nn.functional as F

from mambino import kernels, machine
from mambino.bench.gpu import models
from mambino.kernels.registry import DEFINITIONS, KERNELS

TOLERANCE = dict(float32=1e-4, bfloat16=2e-2)
WINDOWS = [     # T and head size, the most telling first: each is compiled
    (1024, 64), (128, 32), (2048, 128), (256, 64), (128, 64), (1024, 32), (256, 32), (2048, 64),
    (1024, 128),
    (256, 128), (128, 128), (2048, 32)]
COMPILING = 25  # seconds that one may take


def run(recorder, device, out_dir):
    machine.compute_exactly()
    for dtype, operation, kernel in kernels_to_check():
        label = f'{operation} of {file_of(kernel)}.py, {dtype}'
        with recorder.item(label, 3) as wanted:
            if wanted:
                check_kernel(recorder, label, operation, kernel, getattr(torch, dtype), device)
    with recorder.item('ssd, dt A to -50', 3):
        check_long_steps(recorder, 'ssd, dt A to -50', device)
    with recorder.item('packages', 5):
        check_kernels_of_others(recorder, 'packages', device)
    for T, P in WINDOWS:
        label = f'attention in a window: T {T}, heads of {P}'
        with recorder.item(label, COMPILING if device.startswith('cuda') else 1) as wanted:
            if wanted:
                check_window(recorder, label, T, P, device)


def kernels_to_check():
    """(dtype, operation, kernel) of all that are not for CPUs alone; those that compile last."""
    each = [(dtype, operation, kernel) for dtype in TOLERANCE for operation in sorted(EXAMPLES)
            for kernel in KERNELS.get(operation, ()) if file_of(kernel) not in ('cpu', 'cpu_mamba')]
    return sorted(each, key=lambda row: file_of(row[2]) == 'cuda')


def file_of(kernel):
    return kernel.__module__.rpartition('.')[2]


# --- examples of each operation: tensors that have gradients, others, and arguments ---------------

def normal(*shape, scale=1.0):
    return torch.randn(shape) * scale


def attention(window):
    return [normal(2, 256, 4, 64) for _ in range(3)], dict(window=window)


def scan_inputs():
    E, N, T = 64, 16, 96
    return [normal(2, T, E), F.softplus(normal(2, T, E) - 3), -torch.rand(E, N) * 8 - 0.1,
            normal(2, T, N), normal(2, T, N)], {}


def mamba1_inputs():
    E, N, T = 64, 16, 96
    return [normal(2, T, E), normal(2, T, E), normal(E) - 3, -torch.rand(E, N) * 8 - 0.1,
            normal(2, T, N),
            normal(2, T, N), normal(E), normal(2, T, E)], {}


def ssd_inputs():
    H, P, G, N, T = 4, 64, 2, 64, 200
    return [normal(2, T, H, P), F.softplus(normal(2, T, H) - 3), -torch.rand(H) * 15 - 1,
            normal(2, T, G, N, scale=0.3), normal(2, T, G, N, scale=0.3)], {}


def mamba2_inputs():
    H, P, G, N, T = 4, 64, 1, 128, 200
    return [normal(2, T, H * P + 2 * G * N, scale=0.5), normal(2, T, H), normal(H) - 3,
            -torch.rand(H) * 15 - 1,
            normal(H)], dict(groups=G, head_dim=P)


EXAMPLES = {        # inputs whose gradients are compared, and other arguments
    'rms_norm': lambda: ([normal(64, 512), normal(512)], dict(eps=1e-5)),
    'gated_rms_norm': lambda: ([normal(2, 64, 512), normal(2, 64, 512), normal(512)],
                               dict(eps=1e-5, groups=2)),
    'swiglu': lambda: ([normal(2, 64, 512), normal(2, 64, 512)], {}),
    'causal_conv1d': lambda: ([normal(2, 200, 192), normal(192, 1, 4), normal(192)], {}),
    'linear_cross_entropy': lambda: ([normal(2, 512, 128), normal(2048, 128, scale=0.1)],
                                     dict(targets=torch.randint(-1, 2048, (2, 512)))),
    'attention': lambda: attention(64),
    'selective_scan': scan_inputs,
    'mamba1_scan': mamba1_inputs,
    'ssd': ssd_inputs,
    'mamba2_scan': mamba2_inputs,
}
# Inputs that stay fp32 where a model computes in 16 bits: steps, decays and what is added to them.
IN_FP32 = {
    'rms_norm': (1,), 'gated_rms_norm': (2,), 'causal_conv1d': (1, 2), 'linear_cross_entropy': (1,),
    'selective_scan': (1, 2), 'mamba1_scan': (2, 3, 6), 'ssd': (1, 2), 'mamba2_scan': (2, 3, 4)}


def leaves_of(operation, inputs, dtype, device):
    kept = IN_FP32.get(operation, ())
    return [u.to(device).to(torch.float32 if i in kept else dtype).requires_grad_() for i,
            u in enumerate(inputs)]


def results_of(compute, leaves, arguments):
    """The first result and the gradients, as a loss weighted by a fixed random tensor gives them;
    NotImplemented where a kernel does not apply."""
    result = compute(*leaves, **arguments)
    if result is NotImplemented:
        return result
    y = result[0] if isinstance(result, tuple) else result
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    gradients = torch.autograd.grad((y.float() * weights).sum(), leaves, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(u) if g is None else g for u,
                          g in zip(leaves, gradients))]


def check_kernel(recorder, label, operation, kernel, dtype, device):
    torch.manual_seed(0)
    inputs, arguments = EXAMPLES[operation]()
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name,
                 value in arguments.items()}
    dtype_name = str(dtype).removeprefix('torch.')
    with machine.autocast(device, dtype_name):
        leaves = leaves_of(operation, inputs, dtype, device)
        computed = results_of(kernel, leaves, arguments)
    if computed is NotImplemented:
        recorder.add(label, 'does not apply here')
        return
    exact = [u.detach().float().requires_grad_() for u in leaves]   # the rounded inputs: not their rounding is judged
    expected = results_of(DEFINITIONS[operation], exact, arguments)
    names = ['y', *list(inspect.signature(DEFINITIONS[operation]).parameters)[:len(leaves)]]
    report(recorder, label, names, computed, expected, TOLERANCE[dtype_name])


def report(recorder, label, names, computed, expected, tolerance):
    errors = {name: models.relative_error(a, b) for name, a, b in zip(names, computed, expected)}
    worst = max(errors.values())
    text = f'{errors["y"]:.1e}, gradients ' + ' '.join(
        f'{name} {error:.1e}' for name, error in errors.items() if name != 'y')
    recorder.add(label, f'{text}; at most {tolerance:.0e}', passed=worst <= tolerance, worst=worst)


# --- single ones ----------------------------------------------------------------------------------

def kernel_in(file, operation):
    """The kernel of an operation that stands in a file of mambino/kernels; None if there is
    none."""
    return next((k for k in KERNELS.get(operation, ()) if file_of(k) == file), None)


def check_window(recorder, label, T, P, device):
    """flex_attention, as the card compiles it, against blocks of scaled_dot_product_attention."""
    torch.manual_seed(0)
    flex, blocks = kernel_in('cuda', 'attention'), kernel_in('anywhere', 'attention')
    leaves = [normal(2, T, 2, P).to(device, torch.bfloat16).requires_grad_() for _ in range(3)]
    arguments = dict(window=T // 4)
    computed = results_of(flex, leaves, arguments)
    if computed is NotImplemented:
        recorder.add(label, 'flex_attention does not apply here')
        return
    expected = results_of(blocks, [u.detach().float().requires_grad_() for u in leaves], arguments)
    report(recorder, label, ['y', 'q', 'k', 'v'], computed, expected, TOLERANCE['bfloat16'])


def check_long_steps(recorder, label, device):
    """dt A down to -50 a token: sums over a chunk reach -3,200, and differences of neighbours must
    stay."""
    torch.manual_seed(0)
    H, P, G, N, T = 4, 32, 1, 32, 256
    dt = torch.rand(2, T, H) ** 4
    inputs = [normal(2, T, H, P), dt, -torch.tensor([1.0, 8, 20, 50]),
              normal(2, T, G, N, scale=0.3),
              normal(2, T, G, N, scale=0.3)]
    leaves = [u.to(device).requires_grad_() for u in inputs]
    exact = [u.to(device, torch.float64).requires_grad_() for u in inputs]
    expected = results_of(recurrence, exact, {})
    for kernel in KERNELS['ssd']:
        computed = results_of(kernel, leaves, {})
        if computed is not NotImplemented:
            names = ['y', 'x', 'dt', 'A', 'B', 'C']
            report(recorder, f'{label}, {file_of(kernel)}.py', names, computed, expected, 1e-4)


def recurrence(x, dt, A, B, C):
    """ssd token by token, as its definition's first line has it, in the precision of its inputs."""
    H = x.shape[2]
    B, C = (u.repeat_interleave(H // u.shape[2], dim=2) for u in (B, C))    # (B, T, H, N)
    h = x.new_zeros(len(x), H, x.shape[3], B.shape[3])
    ys = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, 1)


def check_kernels_of_others(recorder, label, device):
    """Kernels of mamba-ssm and other packages are tried by the project itself: what it says of
    them."""
    line = kernels.describe_kernels(torch.device(device).type)
    recorder.add(label, line, passed=False if 'not work' in line or 'other numbers' in line else None)
