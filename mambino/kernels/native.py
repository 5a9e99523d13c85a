"""native.cpp as a library: compiled once, in some seconds, kept in __pycache__, and called with tensors by torch's threads.

    launch('swiglu_forward', n, work, gate, up, y)      # items 0 to n, on as many threads as the work is worth

cpu.py makes the models' operations of it. MAMBINO_NATIVE=0, or MAMBINO_KERNELS=0, asks for none of it.
"""
import ctypes
import functools
import glob
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'native.cpp')


def processor():
    """What the compiled file depends on: the kind of processor and what it can do. A home folder may serve several machines."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line for line in f if line.startswith(('flags', 'Features')))
    except (OSError, StopIteration):
        return platform.platform() + platform.processor()


def compiler():
    """The C++ compiler's name: $CXX, or the first of the usual ones; None if there is none."""
    return shutil.which(os.environ.get('CXX') or '') or next(filter(shutil.which, ('g++', 'clang++', 'c++')), None)


def source_text():
    """native.cpp and the headers in cpp/ that it includes, as bytes."""
    headers = glob.glob(os.path.join(os.path.dirname(SOURCE), 'cpp', '*.h'))
    text = b''
    for path in (SOURCE, *sorted(headers)):
        with open(path, 'rb') as f:
            text += f.read()
    return text


@functools.cache
def library():
    """native.cpp as a library, compiled now if it has not been; None where there is no compiler, or MAMBINO_NATIVE=0."""
    unwanted = '0' in (os.environ.get('MAMBINO_NATIVE'), os.environ.get('MAMBINO_KERNELS'))
    if unwanted or os.name == 'nt' or not compiler():                           # MinGW does not align its stack for vectors
        return None
    name = hashlib.sha256(source_text() + (compiler() + processor()).encode()).hexdigest()[:16]
    path = os.path.join(os.path.dirname(SOURCE), '__pycache__', f'native-{name}.so')
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(path):
            compile_to(path)
        return ctypes.CDLL(path)
    except OSError:                                                             # cannot be written, or was written by another system
        pass
    except subprocess.CalledProcessError:
        return None
    folder = tempfile.mkdtemp(prefix='mambino-')                                # for this process alone
    try:
        compile_to(os.path.join(folder, 'native.so'))
        return ctypes.CDLL(os.path.join(folder, 'native.so'))
    except (OSError, subprocess.CalledProcessError):
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)                               # what is loaded stays


def compile_to(path):
    """native.cpp → a library at `path`, whole or not at all: several processes may compile at once."""
    handle, fresh = tempfile.mkstemp(dir=os.path.dirname(path), suffix='.so')
    try:
        for flags in (['-march=native'], ['-mcpu=native'], []):
            command = [compiler(), '-std=c++17', '-O3', '-fno-math-errno', '-fPIC', '-shared', '-w', *flags, SOURCE, '-o', fresh]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if done.returncode == 0:
                os.fsync(handle)
                return os.replace(fresh, path)
        done.check_returncode()
    finally:
        os.close(handle)
        if os.path.exists(fresh):
            os.remove(fresh)


@functools.cache
def pool():
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=pool.cache_clear)                        # threads do not come along


def thread_count(n, work):
    """How many threads share n items that take about so many nanoseconds: to wake one costs some 50,000."""
    return max(1, min(torch.get_num_threads(), n, work >> 16))


def has_data(t):
    return type(t).__name__ != 'FakeTensor'                                     # of fit.py's simulation; to import the class takes a second


def launch(name, n, work, *args):
    """Calls a function of native.cpp on items 0 to n, shared by thread_count(n, work) threads. Tensors go as pointers, ints as 64 bits, floats
    as 32. Tensors without data, with which a run's memory is estimated, are left as they are."""
    converted = []
    for a in args:
        if isinstance(a, torch.Tensor):
            if not has_data(a):
                return
            assert a.dtype in (torch.float32, torch.int64) and a.device.type == 'cpu', name
            assert a.stride(-1) == 1 or a.shape[-1] == 1 or not a.numel(), name
            assert type(a) in (torch.Tensor, torch.nn.Parameter), type(a)       # a tensor of tensors has no data to point to
            converted.append(ctypes.c_void_p(a.data_ptr()))
        else:
            converted.append((ctypes.c_float if type(a) is float else ctypes.c_void_p if a is None else ctypes.c_int64)(a))
    function, pieces = getattr(library(), name), thread_count(n, work)
    if pieces == 1:
        return function(ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(0), *converted)
    parts = [[ctypes.c_int64(i) for i in (n * p // pieces, n * (p + 1) // pieces, p)] for p in range(pieces)]
    call = lambda part, tensors: function(*part, *converted)                    # the tensors live as long as the call does
    others = [pool().submit(call, part, args) for part in parts[1:]]            # ctypes lets go of Python's lock
    function(*parts[0], *converted)
    for other in others:
        other.result()


# --- matrices by a few vectors ---------------------------------------------------------------------

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # of native.cpp's matrices


class Matrix(ctypes.Structure):
    """A matrix (rows, columns) as it is stored: native.cpp's struct of this name, addresses of codes and scales."""
    _fields_ = [(name, ctypes.c_int64) for name in ('format', 'rows', 'columns', 'codes', 'scales')]


def matrix_of(codes, scales, columns):
    """The Matrix of codes (rows, …), contiguous, and their scales or None; the tensors must live as long."""
    return Matrix(FORMATS[codes.dtype], len(codes), columns, codes.data_ptr(), 0 if scales is None else scales.data_ptr())


def few(x):
    """Whether rows x (..., K) are so few that a matrix is best read as it is stored."""
    return x.numel() <= 32 * x.shape[-1]


def linear(x, codes, scales):
    """x (..., K) fp32 times a quantized matrix (rows, K), transposed, as quantize.py keeps it."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(codes))
    count = x.numel() // x.shape[-1]
    matrix = matrix_of(codes, scales, x.shape[-1])
    arguments = torch.get_num_threads(), count, ctypes.addressof(matrix), x.data_ptr(), y.data_ptr()
    library().linear_step(*map(ctypes.c_int64, arguments))                      # past `launch`, which takes longer than one row
    return y
