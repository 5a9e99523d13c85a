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
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    if '0' in (os.environ.get('MAMBINO_NATIVE'), os.environ.get('MAMBINO_KERNELS')) or os.name == 'nt' or not compiler():     # MinGW does not align its stack for vectors
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


# --- one token of each of a few sequences: past autograd and `launch`, which would take longer than the numbers ----------

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # of native.cpp


@functools.cache
def step_function(name, kinds):
    function = library()[name]                                                  # an object of its own: `launch` declares no types
    function.argtypes, function.restype = [ctypes.c_float if kind is float else ctypes.c_int64 for kind in kinds], None
    return function


def call(name, *args):
    """Calls a function of native.cpp that shares its task among threads itself. Tensors must be contiguous; 0 stands for none."""
    numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
    step_function(name, tuple(map(type, numbers)))(*numbers)
    if Tape.recording and Tape.recording.thread == threading.get_ident():
        Tape.recording.note(name, numbers, args)


def few(x):
    """Whether rows x (..., K) are so few that a matrix is best read as it is stored."""
    return x.numel() <= 32 * x.shape[-1]


def described(codes, scales, columns):
    """What native.cpp needs of a matrix (its struct Matrix); the tensors must live as long."""
    return (ctypes.c_int64 * 5)(FORMATS[codes.dtype], len(codes), columns, codes.data_ptr(), 0 if scales is None else scales.data_ptr())


def matrices(*modules):
    """Where the descriptions of these modules' matrices are, which each keeps; None if one is no plain matrix, or has something hung on it."""
    found = []
    for module in modules:
        codes = module._buffers.get('codes', module._parameters.get('weight'))
        if codes is None or module._forward_hooks or module._forward_pre_hooks:
            return None
        kept = module.__dict__.get('described')
        if kept is None or kept[0] != codes.data_ptr():                         # it has been moved, or copied
            if codes.dtype not in FORMATS or not codes.is_contiguous():
                return None
            module.described = kept = codes.data_ptr(), described(codes, module._buffers.get('scales'), getattr(module, 'columns', codes.shape[1]))
        found.append(ctypes.addressof(kept[1]))
    return found


def linear(x, codes, scales):
    """x (..., K) fp32 times a quantized matrix (rows, K), transposed, as quantize.py keeps it."""
    y, x = x.new_empty(*x.shape[:-1], len(codes)), x.contiguous()
    matrix = described(codes, scales, x.shape[-1])
    call('linear_step', torch.get_num_threads(), x.numel() // x.shape[-1], ctypes.addressof(matrix), x, y)
    return y


def add_step(x, y):
    out, x, y = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous(), y.contiguous()
    call('add_step', x.numel(), x, y, out)
    return out


def norm_step(x, weight, eps):
    x = x.contiguous()
    y, rstd = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
    call('norm_forward', 0, len(rstd), 0, 1, x.shape[-1], float(eps), x, 0, 0, weight, y, rstd)
    return y


def mlp_step(x, mlp):
    """A SwiGLU of x (B, 1, D); None if its matrices are not plain."""
    found = matrices(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not found:
        return None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call('mlp_step', torch.get_num_threads(), len(x), *found, x.contiguous(), y)
    return y


def attention_step(x, rope, pos, layer, keys, values):
    """An Attention of x (B, 1, D) at positions pos (B,), caches (B, K, S, P); None if its matrices are not plain."""
    found = matrices(layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    if not found:
        return None
    (B, K, S, P), y, norms = keys.shape, torch.empty_like(x, memory_format=torch.contiguous_format), (0, 0, 0.0)
    if layer.qk_norm:
        norms = layer.q_norm.weight, layer.k_norm.weight, float(layer.q_norm.eps)
    call('attention_step', torch.get_num_threads(), B, layer.heads, K, P, S, *found, *norms, pos.contiguous(), *rope, keys, values, x.contiguous(), y)
    return y


def mamba1_step(x, mixer, state):
    """A Mamba1Mixer of x (B, 1, D), whose states are written to; None if its matrices are not plain."""
    found = matrices(mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if not found:
        return None
    (B, N, E), conv, y = state['ssm'].shape, mixer.conv1d, torch.empty_like(x, memory_format=torch.contiguous_format)
    call('mamba1_step', torch.get_num_threads(), B, E, N, conv.weight.shape[-1], mixer.split[0], *found, conv.weight, conv.bias, mixer.dt_proj.bias,
         mixer.A_log, mixer.D, state['conv'], state['ssm'], x.contiguous(), y)
    return y


def mamba2_step(x, mixer, state):
    """A Mamba2Mixer of x (B, 1, D), whose states are written to; None if its matrices are not plain."""
    found = matrices(mixer.in_proj, mixer.out_proj)
    if not found:
        return None
    (B, H, P, N), conv, y = state['ssm'].shape, mixer.conv1d, torch.empty_like(x, memory_format=torch.contiguous_format)
    call('mamba2_step', torch.get_num_threads(), B, H, mixer.groups, P, N, conv.weight.shape[-1], *found, conv.weight, conv.bias, mixer.dt_bias,
         mixer.A_log, mixer.D, mixer.norm.weight, float(mixer.norm.eps), state['conv'], state['ssm'], x.contiguous(), y)
    return y


def mix_step(x, h, branches, norms, controller, scale):
    """x + scale * the mixture of a hybrid's branches, all (B, 1, D); norms: one a branch, or None; the controller reads h, or is None."""
    pad, y = [0] * (3 - len(branches)), torch.empty_like(x, memory_format=torch.contiguous_format)
    weights = [norm.weight for norm in norms] + pad if norms else [0] * 3
    call('mix_step', len(x), x.shape[-1], len(branches), *(b.contiguous() for b in branches), *pad, *weights, float(norms[0].eps) if norms else 0.0,
         controller.weight if controller else 0, controller.bias if controller else 0, scale, h.contiguous(), x.contiguous(), y)
    return y


# --- the layers of a model as one call --------------------------------------------------------------------------------

REPLAYED = 'norm_forward', 'add_step', 'mlp_step', 'attention_step', 'mamba1_step', 'mamba2_step', 'mix_step'  # by native.cpp's numbers
TAPES = 4                                                                       # of a model: conversations by turns


class Watch(TorchDispatchMode):
    """Notes whether PyTorch computed anything, beside making room and looking at it otherwise."""
    seen = None

    @classmethod
    def _should_skip_dynamo(cls):
        return False                                                            # else the compiler is imported, which takes two seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not re.match(r'aten::(empty|new_empty|view|_unsafe_view|reshape|select|slice|unsqueeze|squeeze|expand|alias|detach|transpose|t$)',
                        function.name()):
            self.seen = function.name()
        return function(*args, **(kwargs or {}))


class Tape:
    """What the layers of a model called for one token: the same calls, on the same memory, are the next token's.

    A token of 50M parameters is 5 ms of reading weights, and was 2 ms of Python; this is a tenth of those. A tape is good as long as the
    states and the weights lie where they lay; what it reads that is new, x, the rotary tables and positions, is copied to where it was."""
    recording = None
    of = weakref.WeakKeyDictionary()                                            # {model: {place: tape}}, the latest few

    def __init__(self, net, place, inputs):
        self.inputs, self.calls, self.numbers, self.kept, self.good = inputs, 0, [], [], True
        self.theirs = {pointer for _, pointer, _ in place[1:]}                  # of the states, which are not ours to keep
        self.thread = threading.get_ident()
        modules = list(net.modules())
        self.hooks = [m._forward_hooks for m in modules]
        self.parts = [(part, name, what) for m in modules for part in (m._parameters, m._buffers, m._modules) for name, what in part.items()]
        self.weights = [(t, t.data_ptr()) for _, _, t in self.parts if isinstance(t, torch.Tensor)]

    def holds(self):
        """Whether the model's parts and weights are what and where they were, and nothing has been hung on them."""
        return (not any(self.hooks) and all(part.get(name) is what for part, name, what in self.parts)
                and all(t.data_ptr() == where for t, where in self.weights))

    def note(self, name, numbers, args):
        self.good = self.good and name in REPLAYED
        if self.good:
            self.numbers += [REPLAYED.index(name), *(int.from_bytes(struct.pack('=f', n), sys.byteorder) if type(n) is float else n for n in numbers)]
            self.calls += 1
            self.kept += [a for a in args if isinstance(a, torch.Tensor) and a.data_ptr() not in self.theirs]  # their memory must stay

    def record(self, layers, *args):
        Tape.recording = self
        try:
            with Watch() as watch:
                self.out = layers(*args)
        finally:
            Tape.recording = None
        self.good = self.good and not watch.seen
        self.numbers = (ctypes.c_int64 * len(self.numbers))(*self.numbers)
        return self.out

    def replay(self, inputs):
        for to, new in zip(self.inputs, inputs):
            to.copy_(new)
        library().replay(ctypes.c_int64(self.calls), self.numbers)
        return self.out


def layered(net, layers, x, state, rope=(), plan=None):
    """layers(x, state, rope, plan) of one token of each sequence, x (B, 1, D) → (B, 1, D). From the third token of the same sequences on
    without Python in between, where nothing but this file computes."""
    cache, known = state.get('k.0'), Tape.of.setdefault(net, {})
    if plan and (cache is None or not plan.window and plan.n > cache.shape[2]):            # a cache is made, or must grow
        return layers(x, state, rope, plan)
    place = torch.get_num_threads(), *((name, t.data_ptr(), t.shape) for name, t in state.items() if name != 'pos')
    tape = known.get(place)                                                     # None: never here; False: once, or something has changed
    if tape and tape.good and tape.holds():
        return tape.replay((x, *rope, *((plan.pos,) if plan else ())))
    if tape is False and all(t.is_contiguous() for t in state.values()):        # a layer would copy one that is not
        if plan:
            plan.pos = plan.pos.clone()                                         # the state's own is its owner's
        tape = Tape(net, place, (x, *rope, *((plan.pos,) if plan else ())))
        out = tape.record(layers, x, state, rope, plan)
        known[place] = tape                                                     # now that it is whole
        return out
    if not tape or tape.good:
        known.pop(next(iter(known))) if len(known) == TAPES else None
        known[place] = False
    return layers(x, state, rope, plan)
