"""native.cpp as a library: compiled once, in half a minute, kept in __pycache__ (where that cannot
be written, in the user's cache), called with tensors.

    launch('swiglu_forward', n, work, gate, up, y)  # items 0 to n, on as many threads as pay

cpu.py makes the models' operations of it, sample/decode.py their next token. MAMBINO_NATIVE=0, or
MAMBINO_KERNELS=0, asks for none of it.
"""
import contextlib
import ctypes
import functools
import glob
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from mambino.files import alone_in, sha256

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'native.cpp')
FLAGS = '-std=c++17', '-O3', '-fno-math-errno', '-fPIC', '-shared', '-w'
# the first that the compiler knows and whose library runs here
TARGETS = ('-march=native',), ('-mcpu=native',), ('-mavx2', '-mfma'), ()
TRIAL_SECONDS = 60      # that calling some functions of a library may take
SECONDS = 900           # that the compiler may take: some minutes on the slowest machines
ROOM = 8 << 20                                          # bytes that compiling needs on a disk


# --- compiling --------------------------------------------------------------------------------------
# What is kept is called native-KEY-DIGEST.so: of KEY it was made, source, flags, compiler and processor, and
# DIGEST is that of its own bytes, so that one cut short, or of another make, is known before it is loaded.

trouble = ''            # why `library` has none, or makes it anew at every start


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


def key():
    """What a library is made of, in 16 hex digits."""
    program = os.path.realpath(shutil.which(compiler()))
    made = os.stat(program)
    parts = program, made.st_size, made.st_mtime_ns, FLAGS, TARGETS, processor()
    return hashlib.sha256(source_text() + repr(parts).encode()).hexdigest()[:16]


@functools.cache
def library():
    """native.cpp as a library, compiled now if it has not been; None where there is no compiler, or
    where the environment asks for none. `trouble` then says why."""
    global trouble
    trouble = ''
    unwanted = '0' in (os.environ.get('MAMBINO_NATIVE'), os.environ.get('MAMBINO_KERNELS'))
    aligned = os.name != 'nt'           # MinGW does not align its stack for vectors
    if unwanted or not aligned:
        trouble = 'MAMBINO_NATIVE=0' if unwanted else 'Windows aligns no stack for it'
        return None
    if not compiler():
        trouble = 'no working C++ compiler was found'
        return None
    try:
        name = key()
        return kept(name) or made(name)
    except (OSError, subprocess.SubprocessError) as error:
        trouble = str(error)
        return None


def folder_of(user):
    """Where this user's libraries are kept."""
    return os.path.join(os.path.dirname(SOURCE), '__pycache__', f'native-{user}')


def own_cache():
    """Where they are kept if another user has installed this, and nobody else may write there."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(os.path.abspath(cache), 'mambino', f'native-{os.getuid()}')


def trusted(path):
    """Whether a file or folder is this user's or root's, and nobody else can write to it: what is
    in a library is run."""
    about = os.lstat(path)
    return about.st_uid in (0, os.getuid()) and not about.st_mode & 0o022 and not stat.S_ISLNK(about.st_mode)


def kept(name):
    """The library that is kept for this key, root's or this user's; None if there is none that is
    whole."""
    for folder in dict.fromkeys((folder_of(0), folder_of(os.getuid()), own_cache())):
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), f'native-{name}-*.so'))):
            try:
                if trusted(folder) and trusted(path) and path.endswith(f'-{sha256(path)[:32]}.so'):
                    return ctypes.CDLL(path)
            except OSError:             # gone meanwhile, not ours to read, or on a disk that runs nothing
                pass
    return None


def made(name):
    """The library, compiled now, once: into the first folder where it can be kept or, where there
    is none, for this process alone. OSError says why there is none."""
    global trouble
    for folder in (folder_of(os.getuid()), own_cache()):
        try:
            return made_in(folder, name)
        except CompilerError:
            raise
        except OSError as error:
            trouble = trouble or f'it is compiled at every start, since {folder} cannot be used: {reason(error)}'
    try:
        folder = tempfile.mkdtemp(prefix='mambino-')
    except OSError as error:
        raise OSError(f'{trouble}; nor can a temporary folder: {reason(error)}') from None
    try:
        try_room(folder)
        path, note = compile_to(folder, name)
        library = ctypes.CDLL(path)
        trouble = '; '.join(filter(None, (trouble, note)))
        return library
    except CompilerError:
        raise
    except OSError as error:
        raise OSError(f'{trouble}; nor can {folder}: {reason(error)}') from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)   # what is loaded stays


def made_in(folder, name):
    """The library, compiled into a folder to be kept there. OSError where that cannot be."""
    global trouble
    if folder == own_cache():
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if not trusted(folder):
        raise OSError('others can write to it')
    with alone_in(folder):              # of several processes one compiles, the others wait
        library, note = kept(name), ''
        if library is None:
            try_room(folder)
            path, note = compile_to(folder, name)
            library = ctypes.CDLL(path)
        trouble = note
        return library


class CompilerError(OSError):
    """The compiler itself fails: it would in any folder."""


def reason(error):
    """What an OSError says, without its number."""
    return error.strerror or str(error)


def try_room(folder):
    """OSError if a folder has no room for what a compiler writes."""
    handle, path = tempfile.mkstemp(dir=folder)
    try:
        with open(handle, 'wb') as f:
            f.write(bytes(ROOM))
    finally:
        os.remove(path)


def compile_to(folder, name):
    """native.cpp → (the path of its library in a folder, whole or not at all; what is to be said of
    it, or '')."""
    handle, unfinished = tempfile.mkstemp(dir=folder, suffix='.so')
    os.close(handle)
    try:
        note = compile_and_try(unfinished)
        with open(unfinished, 'rb') as f:
            os.fsync(f.fileno())
        path = os.path.join(folder, f'native-{name}-{sha256(unfinished)[:32]}.so')
        for old in glob.glob(os.path.join(glob.escape(folder), f'native-{name}-*.so')):
            os.remove(old)              # a damaged one
        os.replace(unfinished, path)
        return path, note
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def compile_and_try(path):
    """native.cpp → a library at a path that runs here, of the first target that makes one. Returns
    '' or, where that is none for this processor although the compiler knows it, a word about it.
    CompilerError if there is none."""
    said, note = '', ''
    for target in TARGETS:
        complaint = run_compiler(path, target)
        if not complaint:
            os.chmod(path, 0o755)
            complaint = tried(path)
            if not complaint:
                return note
            flags = ' '.join(target) or 'no flags'
            note = note or f'slower than they could be, since what {compiler()} makes with {flags} {complaint}'
        said = said or complaint        # of the first target: the others may be of another processor
    raise CompilerError(f'{compiler()} does not compile it: {note or said}')


def run_compiler(target_path, target):
    """native.cpp → a library at a path, for a target. Returns '', or what the compiler complains
    of; OSError where it cannot write, CompilerError where it takes too long."""
    environment = {**os.environ, 'TMPDIR': os.path.dirname(target_path), 'LC_ALL': 'C'}
    command = [compiler(), *FLAGS, *target, SOURCE, '-o', target_path]
    try:
        status, text = run_group(command, SECONDS, environment)
    except subprocess.TimeoutExpired:
        raise CompilerError(f'{compiler()} has not compiled it after {SECONDS / 60:.0f} minutes') from None
    if status == 0:
        return ''
    lines = text.strip().split('\n')
    line = next((line for line in lines if 'error' in line), lines[-1])
    line = ''.join(c if c.isprintable() else '?' for c in line)[:200] or ended(status)
    if any(word in line for word in ('No space', 'quota', 'Read-only', 'Permission denied')):
        raise OSError(line)
    return line


def run_group(command, seconds, environment=None):
    """(status, what it says) of a program and those that it starts: none of them outlives this."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=seconds)
    except BaseException:               # too long, or Ctrl-C, which does not reach them
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, said.decode('utf-8', 'replace')


def ended(status):
    """How a program ended that said nothing."""
    if status >= 0:
        return f'status {status}'
    try:
        return f'killed by {signal.Signals(-status).name}'
    except ValueError:
        return f'killed by signal {-status}'


def tried(path):
    """'', or what goes wrong with a library when some of its functions are called (trial.py): a
    compiler may believe the processor to have what a hypervisor hides, and an illegal instruction
    would end the user's run. So they are called in a process of its own."""
    if not sys.executable:
        return ''
    trial = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'trial.py')
    try:
        status, text = run_group([sys.executable, '-I', '-S', trial, path], TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return f'does not end within {TRIAL_SECONDS} s'
    if status == 0:
        return ''
    last = text.strip().split('\n')[-1][:200]
    return f'does not run here: {ended(status) if status < 0 else last or ended(status)}'


# --- calling ----------------------------------------------------------------------------------------

@functools.cache
def pool():
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=pool.cache_clear)    # threads do not come along


def thread_count(n, work):
    """How many threads share n items that take so many nanoseconds: to wake one costs some 50,000."""
    return max(1, min(torch.get_num_threads(), n, work >> 16))


def lanes():
    """How many numbers native.cpp computes side by side here: some functions' items are so many."""
    return library().lanes()


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
    dtypes = (torch.float32, torch.int64, torch.bfloat16) if name.endswith('_bf16') else (torch.float32, torch.int64)
    if argument.dtype not in dtypes or argument.device.type != 'cpu':
        raise ValueError(f'{name}: a tensor of {argument.dtype} on {argument.device}')
    if argument.stride(-1) != 1 and argument.shape[-1] != 1 and argument.numel():
        raise ValueError(f'{name}: a tensor whose rows are not in one piece')
    if type(argument) not in (torch.Tensor, torch.nn.Parameter):            # another may have no data
        raise ValueError(f'{name}: a {type(argument).__name__}')
    return ctypes.c_void_p(argument.data_ptr())


def expect(operation, *shapes):
    """ValueError unless each (tensor, shape) is so: what native.cpp reads and writes by address, it
    takes to be as large as it is told."""
    for tensor, shape in shapes:
        if tensor.shape != shape:
            raise ValueError(f'{operation}: a tensor of shape {tuple(tensor.shape)} in the place of {tuple(shape)}')


def launch(name, n, work, *args):
    """Calls a function of native.cpp on items 0 to n, shared by thread_count(n, work) threads.
    Where tensors have no data nothing is called."""
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


# --- sorting ----------------------------------------------------------------------------------------

def sort_above(x, least):
    """x (B, V), fp32 and nowhere below 0, as x.sort(descending=True, stable=True) has it, but only
    what is no less than least (B, 1) → values, indices, (B, k) both; where a row has fewer,
    zeros."""
    x, least = x.contiguous(), least.contiguous()
    expect('sort_above', (least, (len(x), 1)))
    V = x.shape[1]
    k = int((x >= least).sum(-1).max())
    values = x.new_empty(len(x), k)
    index = x.new_empty(len(x), k, dtype=torch.int64)
    launch('sort_above', len(x), len(x) * (3 * V + 15 * k), V, k, x, least, values, index)
    return values, index


# --- matrices by a few vectors ----------------------------------------------------------------------

GROUP = 64              # columns that share a scale in int4, matrices.h's
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # matrices.h's


class Matrix(ctypes.Structure):
    """A matrix (rows, columns) as it is stored, by address: native.cpp's struct of this name."""
    _fields_ = [(name, ctypes.c_int64) for name in ('format', 'rows', 'columns', 'codes', 'scales')]


def matrix_of(codes, scales, columns):
    """The Matrix of contiguous codes (rows, …) and their scales or None, which must live as long.
    ValueError if they are not those of a matrix of so many columns."""
    groups = -(-columns // GROUP)
    wanted = {
        torch.float32: (columns, None, None),
        torch.bfloat16: (columns, None, None),
        torch.int8: (columns, (len(codes),), torch.float32),
        torch.uint8: (groups * GROUP // 2, (len(codes), groups, 2), torch.bfloat16),
    }.get(codes.dtype)
    if wanted is None:
        raise ValueError(f'a matrix of {codes.dtype}')
    width, shape, dtype = wanted
    expect('matrix', (codes, (len(codes), width)), *([(scales, shape)] if shape else []))
    for tensor in (codes, scales) if shape else (codes,):
        if not tensor.is_contiguous() or tensor.device.type != 'cpu' or (tensor is scales and tensor.dtype != dtype):
            raise ValueError(f'a matrix of {tensor.dtype} on {tensor.device}')
    scales_at = 0 if scales is None else scales.data_ptr()
    return Matrix(FORMATS[codes.dtype], len(codes), columns, codes.data_ptr(), scales_at)


def few(x, of_prompts=16):
    """Whether rows x (..., K) are so few that a matrix is best read as it is stored: so many of
    prompts, (B, T, K), or 32 otherwise, of which a plan of sample/decode may have as many."""
    most = of_prompts if x.ndim > 2 and x.shape[-2] > 1 else 32
    return x.numel() <= most * x.shape[-1]


def linear(x, codes, scales):
    """x (..., K) fp32 times a quantized matrix (rows, K), transposed, as quantize.py keeps it."""
    return product_by('linear_step', x, codes, scales)


def tiles(x, codes, scales):
    """What linear computes, for many rows of x: tiles.h says what it rounds them to."""
    if codes.dtype == torch.float32:
        raise ValueError('a product by tiles with an fp32 matrix')
    return product_by('tiles_product', x, codes, scales)


def product_by(function, x, codes, scales):
    """x (..., K) times a matrix (rows, K), transposed, by a function of native.cpp."""
    x = x.contiguous()
    if x.dtype != torch.float32 or not x.numel():
        raise ValueError(f'a product with {x.dtype} of shape {tuple(x.shape)}')
    y = x.new_empty(*x.shape[:-1], len(codes))
    count = x.numel() // x.shape[-1]
    matrix = matrix_of(codes, scales, x.shape[-1])
    arguments = torch.get_num_threads(), count, ctypes.addressof(matrix), x.data_ptr(), y.data_ptr()
    getattr(library(), function)(*map(ctypes.c_int64, arguments))   # `launch` takes longer than a row
    return y
