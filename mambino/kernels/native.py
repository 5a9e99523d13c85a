"""native.cpp as a library: compiled once, in some seconds, kept in __pycache__, called with tensors.

    launch('swiglu_forward', n, work, gate, up, y)  # items 0 to n, on as many threads as pay

cpu.py makes the models' operations of it, sample/decode.py their next token. MAMBINO_NATIVE=0, or
MAMBINO_KERNELS=0, asks for none of it.
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
FLAGS = '-std=c++17', '-O3', '-fno-math-errno', '-fPIC', '-shared', '-w'
TARGETS = ('-march=native',), ('-mcpu=native',), ()     # the first that the compiler knows


# --- compiling --------------------------------------------------------------------------------------

def processor():
    """What the compiled file depends on: the processor and what it can do. A home folder may serve
    several machines."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line for line in f if line.startswith(('flags', 'Features')))
    except (OSError, StopIteration):
        return platform.platform() + platform.processor()


def compiler():
    """The C++ compiler's name: $CXX, or the first of the usual ones; None if there is none."""
    chosen = shutil.which(os.environ.get('CXX') or '')
    return chosen or next(filter(shutil.which, ('g++', 'clang++', 'c++')), None)


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
    """native.cpp as a library, compiled now if it has not been; None where there is no compiler, or
    where the environment asks for none."""
    unwanted = '0' in (os.environ.get('MAMBINO_NATIVE'), os.environ.get('MAMBINO_KERNELS'))
    aligned = os.name != 'nt'           # MinGW does not align its stack for vectors
    if unwanted or not aligned or not compiler():
        return None
    name = hashlib.sha256(source_text() + (compiler() + processor()).encode()).hexdigest()[:16]
    path = os.path.join(os.path.dirname(SOURCE), '__pycache__', f'native-{name}.so')
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(path):
            compile_to(path)
        return ctypes.CDLL(path)
    except OSError:                     # cannot be written, or was written by another system
        pass
    except subprocess.CalledProcessError:
        return None
    folder = tempfile.mkdtemp(prefix='mambino-')    # for this process alone
    try:
        path = os.path.join(folder, 'native.so')
        compile_to(path)
        return ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError):
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)   # what is loaded stays


def compile_to(path):
    """native.cpp → a library at `path`, all or nothing: several processes may compile at once."""
    handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path), suffix='.so')
    try:
        for target in TARGETS:
            command = [compiler(), *FLAGS, *target, SOURCE, '-o', unfinished]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if done.returncode == 0:
                os.fsync(handle)
                return os.replace(unfinished, path)
        done.check_returncode()
    finally:
        os.close(handle)
        if os.path.exists(unfinished):
            os.remove(unfinished)


# --- calling ----------------------------------------------------------------------------------------

@functools.cache
def pool():
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=pool.cache_clear)    # threads do not come along


def thread_count(n, work):
    """How many threads share n items that take so many nanoseconds: to wake one costs some 50,000."""
    return max(1, min(torch.get_num_threads(), n, work >> 16))


def has_data(tensor):
    """Whether a tensor has numbers: those that a run's memory is estimated with have none."""
    return type(tensor).__name__ != 'FakeTensor'    # to import the class takes a second


def converted(name, argument):
    """An argument of function `name` for ctypes: tensors are pointers, ints 64 bits, floats 32."""
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if not isinstance(argument, torch.Tensor):
        return ctypes.c_int64(argument)
    assert argument.dtype in (torch.float32, torch.int64) and argument.device.type == 'cpu', name
    assert argument.stride(-1) == 1 or argument.shape[-1] == 1 or not argument.numel(), name
    assert type(argument) in (torch.Tensor, torch.nn.Parameter), type(argument)  # with data
    return ctypes.c_void_p(argument.data_ptr())


def launch(name, n, work, *args):
    """Calls a function of native.cpp on items 0 to n, shared by thread_count(n, work) threads. Where
    tensors have no data nothing is called."""
    if not all(has_data(argument) for argument in args):
        return
    values = [converted(name, argument) for argument in args]
    function = getattr(library(), name)
    count = thread_count(n, work)

    def call(part, tensors):            # which live as long as the call does
        bounds = n * part // count, n * (part + 1) // count, part
        function(*map(ctypes.c_int64, bounds), *values)

    others = [pool().submit(call, part, args) for part in range(1, count)]
    call(0, args)                       # side by side: ctypes lets go of Python's lock
    for other in others:
        other.result()


# --- matrices by a few vectors ----------------------------------------------------------------------

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # matrices.h's


class Matrix(ctypes.Structure):
    """A matrix (rows, columns) as it is stored, by address: native.cpp's struct of this name."""
    _fields_ = [(name, ctypes.c_int64) for name in ('format', 'rows', 'columns', 'codes', 'scales')]


def matrix_of(codes, scales, columns):
    """The Matrix of contiguous codes (rows, …) and their scales or None, which must live as long."""
    scales_at = 0 if scales is None else scales.data_ptr()
    return Matrix(FORMATS[codes.dtype], len(codes), columns, codes.data_ptr(), scales_at)


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
    library().linear_step(*map(ctypes.c_int64, arguments))  # `launch` takes longer than a row
    return y
