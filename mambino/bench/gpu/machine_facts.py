"""The part `machine`: the card, its driver and libraries, and how fast it multiplies and copies."""
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import time

import torch

from mambino import kernels, machine
from mambino.bench.gpu import models

PACKAGES = ('triton', 'mamba-ssm', 'causal-conv1d', 'transformers')


def run(recorder, device, out_dir):
    add = recorder.add
    is_cuda = device.startswith('cuda')
    add('torch', f'{torch.__version__} (CUDA {torch.version.cuda}), Python {platform.python_version()}')
    with recorder.item('card'):
        if is_cuda:
            card = torch.cuda.get_device_properties(device)
            free, total = torch.cuda.mem_get_info(device)
            add('card', f'{card.name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free, capability '
                f'{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors, '
                f'{torch.cuda.device_count()} of them', free=free, total=total)
        else:
            add('card', f'none: {machine.machine_name(device)}')
    with recorder.item('driver'):
        add('driver', first_line('nvidia-smi',
                                 '--query-gpu=driver_version,clocks.max.sm,power.limit',
                                 '--format=csv,noheader'))
    add('gcc', first_line('gcc', '--version'))
    for package in PACKAGES:
        add(package, version_of(package))
    with recorder.item('kernels'):
        add('kernels', kernels.describe_kernels(torch.device(device).type))
    with recorder.item('matrix products', 5):
        measure_products(recorder, device)
    with recorder.item('copies', 5):
        measure_copies(recorder, device)


def first_line(*command):
    """The first line that a program prints; 'none' where there is no such program."""
    if not shutil.which(command[0]):
        return 'none'
    printed = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (printed.stdout or printed.stderr).strip().partition('\n')[0]


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'none'


def seconds_of(work, device, repeat):
    """Seconds of one call, the least of three rounds."""
    rounds = []
    work()
    for _ in range(3):
        models.synchronize(device)
        begun = time.perf_counter()
        for _ in range(repeat):
            work()
        models.synchronize(device)
        rounds.append((time.perf_counter() - begun) / repeat)
    return min(rounds)


def measure_products(recorder, device):
    """bf16 products of a size that keeps a card busy; of the sheet's peak 60% are expected, or the
    card is shared, throttled or not what it says."""
    n = 8192 if device.startswith('cuda') else 512
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16).unbind()
    seconds = seconds_of(lambda: a @ b, device, 10)
    flops = 2 * n ** 3 / seconds
    with torch.no_grad():
        peak = machine.peak_flops(device, 'bfloat16')
    passed = flops >= 0.6 * peak if device.startswith('cuda') else None
    recorder.add('matrix products', f'{n} x {n} in bf16: {flops / 1e12:.1f} TFLOP/s, {flops / peak:.0%} of the '
                 f'{peak / 1e12:.0f} that MFU counts against', passed=passed, flops=flops,
                 peak=peak)


def measure_copies(recorder, device):
    n = (1 << 30) if device.startswith('cuda') else 1 << 24
    source = torch.ones(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, 5)
    recorder.add('copies', f'{2 * n / seconds / 1e9:,.0f} GB/s, read and written',
                 bandwidth=2 * n / seconds)
