"""The machine: which device and precision to compute in, how fast it is, and how much memory it
has.

    device = choose_device('auto')
    with autocast(device, choose_dtype('auto', device)):
        ...
    mfu = tokens_per_second * net.flops_per_token(T) / peak_flops(device, 'bfloat16')
    megabytes = memory_used(device, peak=True) / 1e6
"""
import ctypes
import math
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import lru_cache

import torch

from mambino.configurator import fail

DTYPES = 'float32', 'bfloat16', 'float16'

# Dense FLOP/s of bf16 or fp16 matrix products that accumulate in fp32, from the makers' data sheets
# (which like to print the sparse figure, twice that; of a GeForce it is twice that of fp32, which
# its white paper has). T4, V100 and the 20 series know only fp16. The longer name comes first.
PEAKS = {
    'B200': 2250e12,
    'GH200': 989e12,
    'H200': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'A100': 312e12,
    'A40': 150e12,
    'A30': 165e12,
    'A10G': 70e12,
    'A10': 125e12,
    'L40S': 362e12,
    'L40': 181e12,
    'L4': 121e12,
    'T4': 65e12,
    'V100': 125e12,
    'RTX 6000 Ada': 364e12,
    'RTX A6000': 155e12,
    'RTX A5000': 111e12,
    'RTX A4000': 77e12,
    'RTX 5090': 210e12,
    'RTX 5080': 113e12,
    'RTX 5070 Ti': 88e12,
    'RTX 5070': 62e12,
    'RTX 5060 Ti': 47e12,
    'RTX 5060': 38e12,
    'RTX 4090 D': 147e12,
    'RTX 4090': 165e12,
    'RTX 4080 SUPER': 104e12,
    'RTX 4080': 97e12,
    'RTX 4070 Ti SUPER': 88e12,
    'RTX 4070 Ti': 80e12,
    'RTX 4070 SUPER': 71e12,
    'RTX 4070': 58e12,
    'RTX 4060 Ti': 44e12,
    'RTX 4060': 30e12,
    'RTX 3090 Ti': 80e12,
    'RTX 3090': 71e12,
    'RTX 3080 Ti': 68e12,
    'RTX 3080': 59.5e12,
    'RTX 3070 Ti': 43.5e12,
    'RTX 3070': 40.6e12,
    'RTX 3060 Ti': 32.4e12,
    'RTX 3060': 25.5e12,
    'RTX 2080 Ti': 53.8e12,
}
SLOWER = re.compile('laptop|max-q|mig', re.I)   # these share a name with something faster

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # malloc.h's

# In a cgroup: the limit, what is used, and the part of it that gives way (version 2, and version 1)
CGROUP_FILES = (
    ('memory.max', 'memory.current', 'inactive_file'),
    ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
)


# --- which device, which precision ----------------------------------------------------------------

def choose_device(device):
    """'auto' → the best device there is; why it is the CPU where a card is there is said on stderr.
    A device that is named and does not compute here ends the program in a line."""
    if device == 'auto':
        if torch.backends.mps.is_available():
            return 'mps'
        reason = trouble_of(own_card()) if torch.cuda.is_available() else unseen_card()
        if reason:
            say_once(f'note: no card is used, the CPU computes: {reason}')
        return 'cuda' if torch.cuda.is_available() and not reason else 'cpu'
    reason = trouble_of(device)
    if reason:
        fail(f'device={device}: {reason}')
    return device


@lru_cache(None)
def say_once(line):
    print(line, file=sys.stderr, flush=True)


def own_card():
    """The card of this process, of several that torchrun starts one each."""
    index = os.environ.get('LOCAL_RANK', '0')
    is_there = index.isascii() and index.isdigit() and int(index) < torch.cuda.device_count()
    return f'cuda:{index}' if is_there else 'cuda'


def trouble_of(device):
    """Why a device does not compute, in a line; '' if it does. That it is there is not enough:
    PyTorch may have no kernels for a card, or another program hold it for itself."""
    try:
        (torch.ones(1, device=device) + 1).item()           # which waits for it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition('\n')[0]
        if 'no kernel image' in reason:
            reason += (f': this PyTorch ({torch.__version__}) is not made for so old, or so new, a card: '
                       'https://pytorch.org/get-started/locally names one that is')
        return reason
    return ''


@lru_cache(None)
def unseen_card():
    """Why PyTorch does not see the card of NVIDIA that is here, in a line; '' if there is none, or
    it was hidden on purpose."""
    if os.environ.get('CUDA_VISIBLE_DEVICES', '0') in ('', '-1'):
        return ''
    try:
        done = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ''
    said = (done.stdout.strip() or done.stderr.strip()).partition('\n')[0]
    if done.returncode or not said.startswith('GPU'):       # its driver does not run
        return said and f'nvidia-smi says: {said}'
    if not torch.version.cuda:
        return (f'this PyTorch ({torch.__version__}) is made for CPUs; https://pytorch.org/get-started/locally '
                'names the one for CUDA')
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:         # the driver is too old
        return str(error).strip().partition('\n')[0]
    return f'CUDA {torch.version.cuda}, which this PyTorch is made for, finds none'


def choose_dtype(dtype, device):
    """'auto' → what a model computes in here: on a GPU 16 bits, bfloat16 where its hardware has it;
    on a CPU float32, the exact one. In which a CPU trains a model sooner is measured with that
    model (train/precision.py)."""
    if dtype not in ('auto', *DTYPES):
        fail(f'dtype={dtype} must be auto, {", ".join(DTYPES[:-1])} or {DTYPES[-1]}')
    if dtype != 'auto':
        return dtype
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return 'float32'


def has_bfloat16(device):
    """Whether the hardware of this device multiplies in bfloat16."""
    if device.startswith('cuda'):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != 'cpu':
        return False
    if not hasattr(torch.cpu, 'get_capabilities'):
        return getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()
    # avx512_bf16, amx_bf16, and what Arm calls bf16
    return any(has for name, has in torch.cpu.get_capabilities().items() if 'bf16' in name)


def dtype_of_run(dtype, device):
    """The precision to evaluate a run's model in: the run's own, so that its loss is the same
    everywhere; what `device` has where its hardware lacks that one. dtype: of its settings, or
    None."""
    if dtype == 'float32' or (dtype == 'bfloat16' and has_bfloat16(device)):
        return dtype
    if dtype == 'float16' and device.startswith('cuda'):
        return dtype
    return choose_dtype('auto', device)


def autocast(device, dtype, cache=True):
    """The context in which a model computes in `dtype` while its parameters stay fp32.

    cache: keep the rounded weights until it ends."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(device.partition(':')[0], dtype=getattr(torch, dtype), cache_enabled=cache)


def compute_exactly():
    """On a card products of fp32 are of fp32, not of TF32 with its ten bits, which PyTorch else takes
    for convolutions: who wants fewer says so by `dtype`. In 16 bits the few that there are, such as a
    router's, are to be exact."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False


def rounded_once(device, dtype):
    """The context in which a card rounds a parameter once for all `autocast` contexts within it,
    which else each begin anew: it is for as long as no parameter changes. Backward passes may stand
    in it: there nothing is cast. On a CPU it is nothing: the copies would only stay in memory for
    longer."""
    if dtype == 'float32' or not device.startswith('cuda'):
        return nullcontext()
    # what autocast has rounded is forgotten at the end of the outermost context, and this one casts
    # nothing
    return torch.autocast('cuda', enabled=False)


def sent(x, device):
    """x (on the CPU), on the device. To a card it goes without the host waiting: from pinned
    memory, after what the card has to do before it."""
    if device.startswith('cuda'):
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# --- speed ----------------------------------------------------------------------------------------

def timed(device, work):
    """Seconds that work() takes, until the device has done it."""
    on_accelerator = torch.device(device).type != 'cpu'
    if on_accelerator:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    work()
    if on_accelerator:
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def matmul_peak(device, dtype):
    """Measured FLOP/s of matrix products, the best of some: about 0.2 s, also where a CPU has this
    precision only in software, thousands of times slower. dtype: torch's or its name."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    n = 64

    def multiply():
        torch.mm(a[:rows], b, out=out[:rows])
    for larger in (256, 2048 if torch.device(device).type == 'cpu' else 4096):
        a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
        out = torch.empty_like(a)
        rows = 1
        timed(device, multiply)                             # wakes threads and libraries
        # one row of the larger size takes (larger / n)² times as long: too long, and n stays small
        if min(timed(device, multiply) for _ in range(3)) * (larger / n) ** 2 > 1:
            break
        n = larger
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    timed(device, multiply)
    seconds_a_row = math.inf
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        seconds_a_row = min(seconds_a_row, timed(device, multiply) / rows)
        rows = min(8 * rows, n)
    return 2 * n ** 2 / seconds_a_row


def known_peak(device):
    """FLOP/s of a card's 16-bit products as its data sheet has them; None of one that is not known,
    or of which there are slower ones of the same name."""
    if torch.device(device).type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    if SLOWER.search(name):
        return None
    return next((peak for known, peak in PEAKS.items() if re.search(rf'\b{known}\b', name, re.I)), None)


@lru_cache(None)
def peak_flops(device, dtype):
    """FLOP/s to count MFU against: the data sheet's for a known GPU, else what matmul_peak measures
    (once)."""
    half = str(dtype).removeprefix('torch.')
    if torch.device(device).type == 'cuda' and half in ('bfloat16', 'float16'):
        in_hardware = half == 'float16' or torch.cuda.get_device_capability(device) >= (8, 0)
        if in_hardware and known_peak(device):
            return known_peak(device)
    return matmul_peak(device, dtype)


def slowdown(device, dtype):
    """How many times slower a CPU is in this precision than in fp32: many, where it has it in
    software alone. 1 for what is no CPU."""
    if device != 'cpu' or dtype == 'float32':
        return 1.0
    return peak_flops(device, 'float32') / peak_flops(device, dtype)


def copy_bandwidth(device):
    """Bytes a second of copying 256 MB, counting what is read and what is written."""
    a = torch.ones(64 << 20, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(device, lambda: b.copy_(a)) for _ in range(4))


def machine_name(device):
    """The name of the GPU, or of the processor and how many threads compute on it."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{processor_name()}, {torch.get_num_threads()} threads'


def processor_name():
    """The name of the processor, as the system says it."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            name = re.search('model name.*: (.*)|$', f.read())[1] or name
    return name


# --- memory ---------------------------------------------------------------------------------------

@lru_cache(None)
def glibc():
    """The C library of Linux, whose allocator can be told what to keep; None elsewhere (macOS,
    Windows, musl)."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, 'gnu_get_libc_version') else None


def give_back_memory():
    """What this process has freed goes back to the system, where its allocator keeps it."""
    if glibc():
        glibc().malloc_trim(0)


# Of the next two the one that was called last holds; both are of glibc's allocator alone.

def keep_no_freed_memory():
    """From here on blocks of 0.5 MB and more go back to the system as soon as they are freed, so
    that the process has no more than it uses. It asks for each of them anew then, which makes
    training on a CPU a fifth to a third slower."""
    if glibc():
        glibc().mallopt(M_MMAP_THRESHOLD, 1 << 19)
        glibc().mallopt(M_TRIM_THRESHOLD, 1 << 17)
        give_back_memory()


def keep_freed_memory():
    """Lets this process keep what it frees for its next tensors. glibc gives it back to the system,
    which then hands it out page by page, filled with zeros: of a training step on a CPU 2 to 5%."""
    if glibc():
        glibc().mallopt(M_MMAP_THRESHOLD, 32 << 20)
        glibc().mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def memory_used(device, peak=False):
    """Bytes of this process on the device, now or at most so far; None where the system does not
    say."""
    kind = torch.device(device).type
    if kind == 'cuda':
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if kind == 'mps':
        return torch.mps.driver_allocated_memory()          # it knows no peak
    if os.path.exists('/proc/self/status'):
        # not getrusage: on Linux its peak begins with that of the parent process
        field = 'VmHWM' if peak else 'VmRSS'
        with open('/proc/self/status', encoding='utf-8') as f:
            return int(re.search(field + r':\s*(\d+)', f.read())[1]) * 1024
    try:
        from resource import RUSAGE_SELF, getrusage
        return getrusage(RUSAGE_SELF).ru_maxrss     # macOS: in bytes
    except ImportError:
        return None


def available_memory(device, root='/'):
    """Bytes on the device that this process may have, what it has of a GPU already included; None
    where the system does not say. root: of the file system, to read /proc and /sys from."""
    kind = torch.device(device).type
    if kind == 'cuda':
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if kind == 'mps':
        return torch.mps.recommended_max_memory()
    free = number_in(os.path.join(root, 'proc/meminfo'), r'^MemAvailable:\s*(\d+)')
    if free is None:                                        # not Linux
        return None
    limits = [free * 1024]
    for folder in cgroups(root):
        for limit_file, used_file, cache_field in CGROUP_FILES:
            limit = number_in(os.path.join(folder, limit_file))
            used = number_in(os.path.join(folder, used_file))
            if limit and used:
                # files in the cache count as used, but give way
                statistics = os.path.join(folder, 'memory.stat')
                cached = number_in(statistics, rf'^{cache_field} (\d+)') or 0
                limits.append(limit - used + cached)
    return max(0, min(limits))


def cgroups(root):
    """The folders of the cgroups that this process is in, whose limits of memory hold for it."""
    folders = ['sys/fs/cgroup', 'sys/fs/cgroup/memory']
    try:
        with open(os.path.join(root, 'proc/self/cgroup'), encoding='utf-8') as f:
            for line in f:
                _, controllers, path = line.strip().split(':', 2)
                # a parent's limit holds for its children
                while controllers in ('', 'memory') and path not in ('', '/'):
                    folders.append(f'sys/fs/cgroup/{controllers}{path}')
                    path = os.path.dirname(path)
    except OSError:
        pass
    return [os.path.join(root, folder) for folder in folders]


def number_in(path, pattern=r'(\d+)'):
    """The first number in a file, after a pattern; None if there is none, as in a limit of
    'max'."""
    try:
        with open(path, encoding='utf-8') as f:
            return int(re.search(pattern, f.read(), re.M)[1])
    except (OSError, TypeError):
        return None
