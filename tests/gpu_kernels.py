"""Our Triton kernels on a real card: are they right, how fast, and which way to run them is fastest.

    python tests/gpu_kernels.py                 # a minute or two; goes on after a part's failure
    python tests/gpu_kernels.py right scan      # some parts: right scan ssd conv others ways exact model

On a CPU, whether the script itself runs: TRITON_INTERPRET=1 python tests/gpu_kernels.py --rehearse
"""
import functools
import os
import sys
import time
import traceback

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mambino.kernels import anywhere, triton_conv, triton_kernels, triton_scan, triton_ssd  # noqa: E402
from mambino.kernels.registry import DEFINITIONS, substituted  # noqa: E402
from model_mamba import Mamba, MambaConfig  # noqa: E402

REHEARSE = '--rehearse' in sys.argv
END = time.perf_counter() + 75                      # no part begins later, unless it is asked for by name
DEVICE = 'cpu' if REHEARSE else 'cuda'
B, T = (1, 40) if REHEARSE else (8, 1024)
E, N1 = (32, 16) if REHEARSE else (1536, 16)        # Mamba-1
H, P, N2, G = (2, 16, 16, 1) if REHEARSE else (24, 64, 128, 1)
DTYPE = torch.float32 if REHEARSE else torch.bfloat16


def inputs_of(name, dtype, batch=B, time_steps=T, heads=H, groups=G, inner=E):
    """Those of mamba1_scan, mamba2_scan or causal_conv1d, as training has them."""
    randn = functools.partial(torch.randn, device=DEVICE)
    if name == 'conv':
        width = heads * P + 2 * groups * N2
        joined = randn(batch, time_steps, heads * P + width + heads, dtype=dtype)   # what in_proj gives: z, xBC, dt
        made = [joined[..., heads * P:heads * P + width].detach(), randn(width, 1, 4), randn(width)]
        halves = ()
    elif name == 'scan':
        wide = (batch, time_steps, inner)
        narrow = (batch, time_steps, N1)
        made = [randn(wide), randn(wide) - 3, randn(inner), -randn(inner, N1).abs() * 8 - 0.1, randn(narrow),
                randn(narrow), randn(inner), randn(wide)]
        halves = (0, 1, 4, 5, 7)
    else:
        width = heads * P + 2 * groups * N2
        made = [randn(batch, time_steps, width), randn(batch, time_steps, heads) - 3, randn(heads),
                -randn(heads).abs() * 8 - 0.1, randn(heads)]
        halves = (0, 1)
    made = [u.to(dtype) if i in halves else u for i, u in enumerate(made)]
    return [u.requires_grad_() for u in made]


def own(name, groups=G):
    if name == 'scan':
        return triton_kernels.scan
    if name == 'conv':
        return triton_kernels.conv
    return functools.partial(triton_kernels.ssd, groups=groups, head_dim=P)


def milliseconds(function, repeat=10):
    """The median time of a call."""
    if REHEARSE:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    for _ in range(3):
        function()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for start, end in marks:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)[repeat // 2]


def forward_backward(function, leaves):
    """Milliseconds of forward without gradient, and of forward and backward."""
    with torch.no_grad():
        forward = milliseconds(lambda: function(*leaves))
    y = function(*leaves)[0]
    dy = torch.randn_like(y)

    def both():
        torch.autograd.grad(function(*leaves)[0], leaves, dy)
    return forward, milliseconds(both)


def right():
    """Each kernel as it is trained with against the definition in fp32."""
    compare(DTYPE, ('scan', dict(inner=48)), ('ssd', dict(heads=3)), ('ssd', dict(heads=6, groups=2)), ('conv', {}),
            ('conv', dict(heads=3)))                            # in_proj's rows whole vectors apart, and not


def exact():
    """The same in fp32, whose products take long to compile."""
    compare(torch.float32, ('scan', dict(inner=33)), ('ssd', dict(heads=3)), ('conv', {}))


def compare(dtype, *cases):
    for name, sizes in cases:
        try:
            torch.manual_seed(0)
            start = time.perf_counter()
            groups = sizes.get('groups', 1)
            leaves = inputs_of(name, dtype, 2, 41 if REHEARSE else 300, **sizes)
            plain = {'scan': DEFINITIONS['mamba1_scan'], 'conv': DEFINITIONS['causal_conv1d'],
                     'ssd': lambda *u, groups=groups: DEFINITIONS['mamba2_scan'](*u, groups, P, 64)}[name]
            results = []
            for function, exact in ((plain, True), (own(name, groups), False)):
                used = [(u.float() if exact else u).detach().requires_grad_() for u in leaves]
                with substituted():
                    y, last = function(*used)
                torch.manual_seed(1)
                grads = [torch.randn(u.shape, device=DEVICE).to(u.dtype) for u in (y, last)]
                results.append([y, last, *torch.autograd.grad((y, last), used, grads)])
            errors = [((b.float() - a).abs().max() / a.abs().max()).item() for a, b in zip(*results)]
            print(f'right {name} {sizes} {str(dtype)[6:]:9} {time.perf_counter() - start:5.1f} s  '
                  + ' '.join(f'{error:.0e}' for error in errors), flush=True)
        except Exception:
            print(f'right {name} {sizes} {dtype}\n{traceback.format_exc()}', flush=True)


def gigabytes(name):
    """Bytes forward and backward by the kernels' own accounts."""
    size = torch.finfo(DTYPE).bits // 8
    if name == 'scan':
        u = B * T * E * size
        states = u * N1 / triton_scan.CHUNK
        parts = 2 * u * N1 / triton_scan.BLOCK_E
        return (4 * u + states) / 1e9, (7 * u + states + 2 * parts) / 1e9
    if name == 'conv':
        u = B * T * (H * P + 2 * G * N2) * size
        return 2 * u / 1e9, 3 * u / 1e9
    u = B * T * H * P * size
    states = u * N2 / 64
    return (3 * u + 2 * states) / 1e9, (8 * u + 5 * states) / 1e9


def profiled(function):
    """The kernels of five calls, the longest first."""
    from torch.profiler import ProfilerActivity, profile
    function()
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        for _ in range(5):
            function()
        torch.cuda.synchronize()
    return sorted(measured.key_averages(), key=lambda row: -row.device_time_total)


def by_kernel(function):
    """Prints the time of each kernel in a call."""
    for row in profiled(function)[:12]:
        print(f'    {row.device_time_total / 5e3:8.3f} ms  {row.count // 5:3} x {row.key[:90]}', flush=True)


def timed(name):
    torch.manual_seed(0)
    leaves = inputs_of(name, DTYPE)
    start = time.perf_counter()
    forward, both = forward_backward(own(name), leaves)
    ahead, back = gigabytes(name)
    backward = both - forward
    print(f'{name}: forward {forward:.3f} ms ({ahead:.3f} GB, {ahead / forward * 1e3:.0f} GB/s), '
          f'backward {backward:.3f} ms ({back:.3f} GB, {back / backward * 1e3:.0f} GB/s); '
          f'with compiling {time.perf_counter() - start:.1f} s', flush=True)
    if not REHEARSE:
        dy = torch.randn_like(own(name)(*leaves)[0])
        by_kernel(lambda: torch.autograd.grad(own(name)(*leaves)[0], leaves, dy))


def scan():
    timed('scan')


def ssd():
    timed('ssd')


def conv():
    """And other ways to run it, by the time of the kernels alone, which is less than that of a launch."""
    timed('conv')
    leaves = inputs_of('conv', DTYPE)
    dy = torch.randn_like(triton_kernels.conv(*leaves)[0])
    for constant, choices in (('SPAN', (32, 128)), ('BLOCK_E', (128,)),
                              ('FORWARD', [dict(STEPS=4, num_warps=2), dict(STEPS=8, num_warps=1)]),
                              ('BACKWARD', [dict(STEPS=2, num_warps=2), dict(STEPS=8, num_warps=2)])):
        default = getattr(triton_conv, constant)
        for choice in () if REHEARSE else choices:
            try:
                setattr(triton_conv, constant, choice)
                rows = profiled(lambda: torch.autograd.grad(triton_kernels.conv(*leaves)[0], leaves, dy))
                times = [f'{row.key} {row.device_time_total / 5e3:.3f}' for row in rows if row.key.startswith('conv_')]
                print(f'conv {constant} {choice}: {", ".join(times)} ms', flush=True)
            finally:
                setattr(triton_conv, constant, default)


def ways():
    """Other ways to run each kernel: the fastest belongs into the constants of its file."""
    torch.manual_seed(0)
    for module, name, constant, choices in (
            (triton_ssd, 'ssd', 'PROGRAMS', (128, 512)),
            (triton_ssd, 'ssd', 'OUTPUTS', [dict(num_warps=8, num_stages=1)]),
            (triton_ssd, 'ssd', 'VALUES', [dict(num_warps=8, num_stages=1)]),
            (triton_ssd, 'ssd', 'KEYS', [dict(num_warps=4, num_stages=2)]),
            (triton_ssd, 'ssd', 'STATES', [dict(num_warps=w, num_stages=s) for w, s in ((4, 3), (8, 2))]),
            (triton_scan, 'scan', 'MAX_REGISTERS', (128, 255)),
            (triton_scan, 'scan', 'BLOCK_E', (16,)),
            (triton_scan, 'scan', 'CHUNK', (16,))):
        default = getattr(module, constant)
        leaves = inputs_of(name, DTYPE)
        for choice in (default, *choices):
            if time.perf_counter() > END:
                print('no time left for the other ways', flush=True)
                return
            try:
                setattr(module, constant, choice)
                forward, both = forward_backward(own(name), leaves)
                print(f'ways {name} {constant} {choice}: {forward:.3f} {both - forward:.3f} ms'
                      + ' (as it is)' * (choice is default), flush=True)
            except Exception as error:
                print(f'ways {name} {constant} {choice}: {type(error).__name__} {str(error)[:200]}', flush=True)
            finally:
                setattr(module, constant, default)


def others():
    """Plain PyTorch, and mamba-ssm where it can be imported."""
    leaves = inputs_of('ssd', DTYPE)

    def plain(*u):
        with substituted(ssd=anywhere.ssd), torch.autocast(DEVICE, DTYPE, enabled=DTYPE == torch.bfloat16):
            return DEFINITIONS['mamba2_scan'](*u, G, P, 64)
    print('plain ssd: {:.3f} ms, forward and backward {:.3f} ms'.format(*forward_backward(plain, leaves)), flush=True)
    from mambino.kernels import fused
    found, notes = fused.fused(DEVICE)
    print(f'others there: {list(found)} {notes}', flush=True)
    for name in set(found) & {'ssd', 'scan'}:
        leaves = inputs_of(name, DTYPE)
        function = functools.partial(fused.fused_mamba1, found['scan']) if name == 'scan' else (
            lambda *u: fused.fused_mamba2(found['ssd'], *u, G, P, 256))
        print(f'mamba-ssm {name}: {forward_backward(function, leaves)} ms', flush=True)


def model():
    """Training steps of a few layers: eager, and as one graph under torch.compile."""
    for version in (2, 1):
        try:
            torch.manual_seed(0)
            config = MambaConfig(vocab_size=512, n_layer=2, n_embd=32 if REHEARSE else 768, version=version,
                                 state_size=16 if REHEARSE or version == 1 else 128, head_dim=P)
            net = Mamba(config).to(DEVICE)
            idx = torch.randint(512, (B, T), device=DEVICE)
            losses = {}
            for name, run in (('eager', net), ('compiled', torch.compile(net, fullgraph=True))):
                if REHEARSE and name == 'compiled':
                    continue
                start = time.perf_counter()

                def step(run=run, idx=idx):
                    with torch.autocast(DEVICE, DTYPE, enabled=DTYPE == torch.bfloat16):
                        loss = run(idx, idx)[1]
                    loss.backward()
                    return loss.item()
                losses[name] = step()
                first = time.perf_counter() - start
                took = milliseconds(step)
                print(f'model version {version} {name}: first step {first:.1f} s, then {took:.2f} ms, '
                      f'loss {losses[name]:.4f}', flush=True)
        except Exception:
            print(traceback.format_exc()[-3000:], flush=True)


def main():
    parts = [right, scan, ssd, conv, others, ways, exact, model]
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith('-')]
    if not REHEARSE:
        import triton
        print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), flush=True)
    for part in parts:
        if part.__name__ not in wanted if wanted else time.perf_counter() > END:
            print(f'{part.__name__}: left out', flush=True)
            continue
        start = time.perf_counter()
        try:
            part()
        except Exception:
            print(f'{part.__name__} failed\n{traceback.format_exc()[-3000:]}', flush=True)
        print(f'[{part.__name__} {time.perf_counter() - start:.1f} s]', flush=True)


if __name__ == '__main__':
    main()
