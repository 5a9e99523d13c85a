"""The operations of the models that are worth more than a line: each in plain PyTorch, and each again for the machine at hand.

    attention, selective_scan, ssd, conv_silu, rms_norm, swiglu, apply_rope, linear_cross_entropy

On a CPU with a C++ compiler kernels.cpp is compiled once, in some seconds, and kept in __pycache__: then an operation reads its
inputs once and writes its result once, on all of torch's threads, forward and backward. Elsewhere, under torch.compile, and where no
compiler is found, the PyTorch beside it computes the same; MAMBINO_NATIVE=0 asks for that. On CUDA the kernels of the package
mamba-ssm take over the recurrences if it can be imported. `describe()` says in a line what is in use.

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, G groups or key heads, P head size, N state size, Q chunk,
V vocabulary. All of it is differentiable once, and computes in fp32 what must be: softmax, norms, recurrences, the loss.
"""
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'kernels.cpp')


# --- the compiled half ------------------------------------------------------------------------------------------------

def processor():
    """What the compiled file depends on: the kind of processor and what it can do. A home folder may serve several machines."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return next(line for line in f if line.startswith(('flags', 'Features')))
    except (OSError, StopIteration):
        return platform.platform() + platform.processor()


@functools.cache
def native():
    """kernels.cpp as a library, compiled now if it has not been; None where there is no compiler, or MAMBINO_NATIVE=0."""
    if os.environ.get('MAMBINO_NATIVE') == '0':
        return None
    compiler = os.environ.get('CXX') or next(filter(shutil.which, ('g++', 'clang++', 'c++')), None)
    if not compiler:
        return None
    with open(SOURCE, 'rb') as f:
        name = hashlib.sha256(f.read() + (compiler + processor()).encode()).hexdigest()[:16]
    folder = os.path.join(os.path.dirname(SOURCE), '__pycache__')
    path = os.path.join(folder, f'kernels-{name}.so')
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(path) and not os.access(folder, os.W_OK):
            path = os.path.join(tempfile.mkdtemp(prefix='mambino-'), 'kernels.so')  # nobody else's folder: what lies there is run
        if not os.path.exists(path):
            compile_to(path, compiler)
        return ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError):
        return None


def compile_to(path, compiler):
    """kernels.cpp → a library at `path`, whole or not at all: several processes may compile at once."""
    fresh = f'{path}.{os.getpid()}'
    for flags in (['-march=native'], ['-mcpu=native'], []):
        command = [compiler, '-std=c++17', '-O3', '-fno-math-errno', '-fPIC', '-shared', '-w', *flags, SOURCE, '-o', fresh]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done.returncode == 0:
            return os.replace(fresh, path)
    done.check_returncode()


def describe(device='cpu'):
    """What computes on this kind of device, in some words."""
    if device == 'cpu':
        return 'kernels compiled for this CPU' if native() else \
            'kernels in plain PyTorch (slower: ' + ('MAMBINO_NATIVE=0' if os.environ.get('MAMBINO_NATIVE') == '0' else 'no working C++ compiler') + ')'
    return 'kernels in plain PyTorch'


@functools.cache
def pool():
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1)))


def use_native(*tensors):
    """Whether these go to kernels.cpp."""
    return all(t.device.type == 'cpu' for t in tensors) and not torch.compiler.is_compiling() and native() is not None


def shares(n, work):
    """How many threads share n items that take about so many nanoseconds: to wake one costs some 50,000."""
    return max(1, min(torch.get_num_threads(), n, work >> 16))


def launch(name, n, work, *args):
    """Calls a function of kernels.cpp on items 0 to n, shared by shares(n, work) threads. Tensors go as pointers, ints as 64 bits, floats
    as 32. Tensors without data, with which a run's memory is estimated, are left as they are."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors):
        return
    for t in tensors:
        assert t.dtype in (torch.float32, torch.int64) and t.stride(-1) == 1 and t.device.type == 'cpu', name
    convert = {torch.Tensor: lambda t: ctypes.c_void_p(t.data_ptr()), torch.nn.Parameter: lambda t: ctypes.c_void_p(t.data_ptr()),
               int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}
    args = [convert[type(a)](a) for a in args]
    function, pieces = getattr(native(), name), shares(n, work)
    parts = [[ctypes.c_int64(i) for i in (n * p // pieces, n * (p + 1) // pieces, p)] for p in range(pieces)]
    others = [pool().submit(function, *part, *args) for part in parts[1:]]      # ctypes lets go of Python's lock
    function(*parts[0], *args)
    for other in others:
        other.result()


def rows(x):
    """x (..., n) as fp32 whose rows are at one distance, which kernels.cpp is told; a copy only if it must be."""
    x = x.float()
    if x.stride(-1) == 1 and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] or x.shape[i] == 1 for i in range(x.ndim - 2)):
        return x
    return x.contiguous()


def zeros_like_all(*tensors):
    return [torch.zeros_like(t) for t in tensors]


# --- norms, gates, rotary positions -----------------------------------------------------------------------------------

class _Norm(Function):

    @staticmethod
    def forward(ctx, x, gate, weight, eps, groups):
        x, gate = rows(x).contiguous(), None if gate is None else rows(gate)
        n, D = x.numel() // x.shape[-1], x.shape[-1] // groups
        y, rstd = torch.empty_like(x), x.new_empty(n * groups)
        launch('norm_forward', n, 2 * x.numel(), groups, D, eps, x, gate, 0 if gate is None else gate.stride(-2), weight, y, rstd)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, gate, weight, rstd = ctx.saved_tensors
        n, D = x.numel() // x.shape[-1], x.shape[-1] // ctx.groups
        gx, gz, gw = torch.empty_like(x), None if gate is None else torch.empty_like(x), x.new_zeros(shares(n, 2 * x.numel()), len(weight))
        launch('norm_backward', n, 2 * x.numel(), ctx.groups, D, x, gate, 0 if gate is None else gate.stride(-2), weight, rstd,
               rows(gy).contiguous(), gx, gz, gw)
        return gx, gz, gw.sum(0), None, None


def rms_norm(x, weight, eps, gate=None, groups=1):
    """x / rms(x) * weight over the last dimension, or over each of so many groups of it (Zhang & Sennrich 2019), in fp32. gate, of x's
    shape: x * silu(gate) is normalised instead (Mamba-2's)."""
    if use_native(x, weight):
        return _Norm.apply(x, gate, weight, eps, groups)
    x = x.float() if gate is None else x.float() * F.silu(gate.float())
    if x.device.type != 'cpu' and groups == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    x = x.unflatten(-1, (groups, -1))
    if x.device.type == 'cpu':                                                  # F.rms_norm takes three times as long there
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    return F.rms_norm(x, x.shape[-1:], None, eps).flatten(-2) * weight


class _SwiGLU(Function):

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        launch('swiglu_forward', gate.numel() // 16, gate.numel(), gate, up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        gate, up = ctx.saved_tensors
        ggate, gup = torch.empty_like(gate), torch.empty_like(up)
        launch('swiglu_backward', gate.numel() // 16, 2 * gate.numel(), gate, up, gy.contiguous(), ggate, gup)
        return ggate, gup


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020)."""
    if gate.dtype == torch.float32 and gate.numel() % 16 == 0 and use_native(gate):
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


class _Rope(Function):

    @staticmethod
    def forward(ctx, x, cos, sin, sign):
        ctx.save_for_backward(cos, sin)
        ctx.sign, x, y = sign, x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        half, heads = cos.shape[-1], x.shape[-2]
        launch('rope', x.numel() // (2 * half * heads), x.numel(), cos.numel() // half, heads, 2 * half, x, cos, sin, sign, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):                                                      # a rotation's gradient is the rotation back
        return _Rope.apply(gy, *ctx.saved_tensors, -ctx.sign), None, None, None


def rope_tables(positions, dim, theta):
    """cos and sin of rotary positions (Su et al. 2021): positions (..., T) → two (..., T, 1, dim/2), fp32."""
    inv_freq = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.float()[..., None, None] * inv_freq
    return angles.cos(), angles.sin()


def apply_rope(x, rope):
    """Rotate (..., T, heads, P) by position; pairs are (i, i + P/2), as in Llama."""
    cos, sin = rope
    if x.dtype == torch.float32 and use_native(x):
        return _Rope.apply(x, cos, sin, 1.0)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --- attention --------------------------------------------------------------------------------------------------------

class _Attention(Function):

    @staticmethod
    def forward(ctx, q, k, v, window, dropout, seed):
        q, k, v = (u.float().contiguous() for u in (q, k, v))                   # (B, T, H, P), (B, T, G, P) twice
        (B, T, H, P), G = q.shape, k.shape[2]
        ctx.how = (T, H, G, P, window, q, k, v, H * P, G * P, P ** -0.5, dropout, seed)
        y, lse = q.new_empty(B, T, H * P), q.new_empty(B, H, T)
        ctx.work = q.numel() * min(T, window or T) // 30
        launch('attention_forward', B * G, ctx.work, *ctx.how, y, lse)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.how = ctx.how[:5] + ctx.how[8:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        q, k, v, y, lse = ctx.saved_tensors
        grads = zeros_like_all(q, k, v)
        launch('attention_backward', len(q) * k.shape[2], 2 * ctx.work, *ctx.how[:5], q, k, v, *ctx.how[5:], y, lse,
               gy.float().contiguous(), *grads)
        return *grads, None, None, None


def attention(q, k, v, window=0, dropout=0.0):
    """Causal attention of T tokens to themselves. q (B, T, H, P), k, v (B, T, G, P), each key head for H/G query heads → (B, T, H P).

    window: each token sees so many last tokens, itself included; 0 is all. Time and memory then grow with T, not with T squared."""
    B, T, H, P = q.shape
    window = 0 if window >= T else window
    if P % 16 == 0 and use_native(q):
        seed = int(torch.randint(2**31, ())) if dropout else 0
        return _Attention.apply(q, k, v, window, float(dropout), seed).to(q.dtype)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))                            # (B, H, T, P)
    if k.shape[1] != H:
        k, v = (u.repeat_interleave(H // u.shape[1], dim=1) for u in (k, v))
    if not window:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    elif q.device.type == 'cuda' and not dropout and window * 2 <= T:
        y = flex(q, k, v, window)
    else:
        y = banded(q, k, v, window, dropout)
    return y.transpose(1, 2).reshape(B, T, H * P)


def window_mask(T, window, device):
    """(T, T) mask of a sliding window, True where visible."""
    i = torch.arange(T, device=device)
    return (i[:, None] >= i) & (i[:, None] - i < window)


def banded(q, k, v, window, dropout):
    """Attention in a window by blocks of `window` queries that see their own block of keys and the one before. (B, H, T, P) all."""
    B, H, T, P = q.shape
    if 2 * window >= T:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(T, window, q.device), dropout_p=dropout)
    n = -(-T // window)
    q, k, v = (F.pad(u, (0, 0, 0, n * window - T)).view(B, H, n, window, P) for u in (q, k, v))
    k, v = (torch.cat((F.pad(u, (0, 0, 0, 0, 1, 0))[:, :, :-1], u), 3) for u in (k, v))  # (B, H, n, 2 window, P)
    i, j = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device) - window
    mask = (j <= i) & (j > i - window)                                          # (window, 2 window)
    mask = mask & ((j >= 0) | (torch.arange(n, device=q.device)[:, None, None] > 0))     # before the first block is nothing
    y = F.scaled_dot_product_attention(*(u.transpose(1, 2).flatten(0, 1) for u in (q, k, v)),
                                       attn_mask=mask.repeat(B, 1, 1)[:, None], dropout_p=dropout)
    return y.view(B, n, H, window, P).transpose(1, 2).reshape(B, H, n * window, P)[:, :, :T]


@functools.cache
def block_mask(T, window, device):
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, T, T, device=device)


def flex(q, k, v, window):
    """The same by flex_attention, compiled, which skips the blocks that a window hides."""
    return compiled_flex()(q, k, v, block_mask=block_mask(q.shape[2], window, q.device))


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)


# --- the recurrences --------------------------------------------------------------------------------------------------

class _SelectiveScan(Function):
    """selective_scan with its backward pass by hand: states (N, E) are kept at the starts of chunks of 16 steps only.

    For each chunk the two factors of all its steps are made at once, then each step is one fused multiply-add."""
    CHUNK = 16  # 8, 16 and 32 measured alike; memory is that of T/16 states

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        K, (batch, T, E), N = _SelectiveScan.CHUNK, x.shape, A.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            At, u, y = A.t().contiguous(), dt * x, torch.empty_like(x)
            starts = x.new_empty(-(-T // K) + 1, batch, N, E)                   # the state before each chunk, and the last
            starts[0] = h
            decays, states = x.new_empty(2, batch, K, N, E)
            for c in range(len(starts) - 1):
                s = slice(c * K, min(T, c * K + K))
                k, h = s.stop - s.start, starts[c]
                decay = torch.mul(dt[:, s, None], At, out=decays[:, :k]).exp_()                  # (B, k, N, E)
                state = torch.mul(u[:, s, None], B[:, s, :, None], out=states[:, :k])
                for i in range(k):
                    h = state[:, i].addcmul_(decay[:, i], h)
                y[:, s] = torch.matmul(C[:, s, None], state).squeeze(2)
                starts[c + 1] = h
        ctx.save_for_backward(x, dt, A, B, C, starts)
        return y, starts[-1].clone()

    @staticmethod
    def backward(ctx, gy, g):
        K, (x, dt, A, B, C, starts) = _SelectiveScan.CHUNK, ctx.saved_tensors
        (batch, T, E), N = x.shape, A.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            At, u = A.t().contiguous(), dt * x
            gx, gdt, gB, gC, gA = (torch.empty_like(x), torch.empty_like(x), torch.empty_like(B), torch.empty_like(C),
                                   torch.zeros_like(At))
            decays, grads = x.new_empty(2, batch, K, N, E)
            states = x.new_empty(batch, K + 1, N, E)
            for c in reversed(range(len(starts) - 1)):
                s = slice(c * K, min(T, c * K + K))
                k = s.stop - s.start
                decay = torch.mul(dt[:, s, None], At, out=decays[:, :k]).exp_()
                before, state = states[:, :k], states[:, 1:k + 1]
                torch.mul(u[:, s, None], B[:, s, :, None], out=state)
                before[:, 0] = starts[c]
                for i in range(k):
                    state[:, i].addcmul_(decay[:, i], before[:, i])
                grad = torch.mul(C[:, s, :, None], gy[:, s, None], out=grads[:, :k])             # d loss / d h, step by step
                for i in reversed(range(k)):
                    g = grad[:, i].add_(g) * decay[:, i]
                gC[:, s] = torch.matmul(state, gy[:, s, :, None]).squeeze(-1)
                gB[:, s] = torch.matmul(grad, u[:, s, :, None]).squeeze(-1)
                gu = torch.matmul(B[:, s, None], grad).squeeze(2)                                # (B, k, E)
                grad.mul_(decay).mul_(before)                                                    # d loss / d (dt A)
                gA += torch.mul(grad, dt[:, s, None], out=decay).sum((0, 1))
                gdt[:, s] = torch.mul(grad, At, out=decay).sum(2).addcmul_(gu, x[:, s])
                gx[:, s] = gu.mul_(dt[:, s])
        return gx, gdt, gA.t(), gB, gC, g


def selective_scan(x, dt, A, B, C, state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t (Mamba, Gu & Dao 2023, eq. 2 and algorithm 2), in fp32.

    x, dt (B, T, E), A (E, N), B, C (B, T, N), state (B, N, E) or None for zeros → y (B, T, E), last state (B, N, E).
    Differentiable in everything, the state included."""
    x, dt, A, B, C = (u.float().contiguous() for u in (x, dt, A, B, C))
    if state is None:
        state = x.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    return _SelectiveScan.apply(x, dt, A, B, C, state)


class _Mamba1(Function):

    @staticmethod
    def forward(ctx, x, raw, bias, A, B, C, D, z, state):
        x, (raw, B, C, z) = x.float().contiguous(), (rows(u) for u in (raw, B, C, z))
        if B.stride(-2) != C.stride(-2):
            B, C = B.contiguous(), C.contiguous()
        (batch, T, E), N, At, last = x.shape, A.shape[1], A.t().contiguous(), state.clone()
        y, starts = torch.empty_like(x), x.new_empty(-(-T // 8), batch, N, E) if any(ctx.needs_input_grad) else None
        launch('mamba1_forward', -(-E // 16), x.numel() * N // 2, N, batch, T, E, x, raw, raw.stride(-2), bias, At, B, C, B.stride(-2), D, z, z.stride(-2),
               last, starts, y)
        ctx.save_for_backward(x, raw, bias, At, B, C, D, z, starts)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gstate):
        x, raw, bias, At, B, C, D, z, starts = ctx.saved_tensors
        (batch, T, E), N, gstate, tiles = x.shape, len(At), gstate.clone(), -(-x.shape[2] // 16)
        gx, graw, gz = (torch.empty_like(x) for _ in range(3))
        gbias, gA, gD = zeros_like_all(bias, At, D)
        gB, gC = x.new_empty(2, shares(tiles, x.numel() * N), batch, T, N)
        launch('mamba1_backward', tiles, x.numel() * N, N, batch, T, E, x, raw, raw.stride(-2), bias, At, B, C, B.stride(-2), D, z, z.stride(-2),
               starts, gy.contiguous(), gstate, gx, graw, gbias, gA, gB, gC, gD, gz)
        return gx, graw, gbias, gA.t(), gB.sum(0), gC.sum(0), gD, gz, gstate


def mamba1_scan(x, raw, bias, A, B, C, D, z, state=None):
    """Mamba-1's recurrence with what stands around it: (C h + D x) silu(z), h by selective_scan, dt = softplus(raw + bias).

    x, raw, z (B, T, E), bias, D (E), A (E, N), B, C (B, T, N), state (B, N, E) or None → y (B, T, E), last state."""
    if use_native(x) and A.shape[1] in (8, 16, 32, 64):
        state = x.new_zeros(len(x), A.shape[1], A.shape[0], dtype=torch.float32) if state is None else state
        return _Mamba1.apply(x, raw, bias, A, B, C, D, z, state)
    y, state = selective_scan(x, F.softplus(raw.float() + bias), A, B, C, state)
    return torch.addcmul(y, x, D) * F.silu(z), state


def ssd(x, dt, A, B, C, chunk_size=64, state=None):
    """The same recurrence with one A a head, by chunks (Mamba-2, Dao & Gu 2024, section 6 and listing 1).

    x (B, T, H, P), dt (B, T, H) fp32, A (H) fp32, B, C (B, T, G, N), state (B, H, P, N) or None → y (B, T, H, P), last state.
    T need not be a multiple of the chunk. dt, A, their sums and the carried state are fp32; the products follow autocast.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    Q, R = min(chunk_size, 1 << (T - 1).bit_length()), H // G                   # R heads a group
    pad = -T % Q
    if pad:                                                                     # dt = 0 leaves the state as it is
        x, B, C = (F.pad(u, (0, 0, 0, 0, 0, pad)) for u in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    c = (T + pad) // Q
    dt = dt.float().view(batch, c, Q, H)

    # sums of dt A up to each token. Differences of large sums would lose the small ones, so they are taken in fp64.
    exact = torch.float32 if x.device.type == 'mps' else torch.float64
    sums = (dt.to(exact) * A.to(exact)).cumsum(2).transpose(2, 3)               # (B, c, H, Q)
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).float()                   # (B, c, H, Q, Q): from token j to i
    decay = decay.masked_fill(hidden, -math.inf).exp()                          # masked before exp: no inf, no NaN
    to_end = (sums[..., -1:] - sums).float().exp().transpose(2, 3)              # (B, c, Q, H)
    sums = sums.float()

    xdt = x.reshape(batch, c, Q, H, P) * dt[..., None]
    B, C = (u.reshape(batch, c, Q, G, N).transpose(2, 3) for u in (B, C))       # (B, c, G, Q, N)

    # inside a chunk: attention whose weights are C B^T, once a group, times the decay
    weights = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay.view(batch, c, G, R, Q, Q)
    y = weights.view(batch, c, H, Q, Q) @ xdt.transpose(2, 3)                   # (B, c, H, Q, P)

    # what each chunk adds to the state, and the state each chunk starts from
    new = B.transpose(-1, -2) @ (xdt * to_end[..., None]).view(batch, c, Q, G, R * P).transpose(2, 3)  # (B, c, G, N, R P)
    kept = sums[..., -1].exp().view(batch, c, G, 1, R, 1)
    h = x.new_zeros(batch, G, N, R, P, dtype=torch.float32) if state is None else \
        state.float().view(batch, G, R, P, N).permute(0, 1, 4, 2, 3)
    starts = []
    for added, factor in zip(new.float().view(batch, c, G, N, R, P).unbind(1), kept.unbind(1)):
        starts.append(h)
        h = torch.addcmul(added, h, factor)
    past = C @ torch.stack(starts, 1).view(batch, c, G, N, R * P)               # (B, c, G, Q, R P)
    past = past.view(batch, c, G, Q, R, P).transpose(2, 3).reshape(batch, c, Q, H, P)
    y = torch.addcmul(y.transpose(2, 3).float(), past.float(), sums.exp().transpose(2, 3)[..., None])
    return y.reshape(batch, T + pad, H, P)[:, :T], h.permute(0, 1, 3, 4, 2).reshape(batch, H, P, N)


class _Mamba2(Function):

    @staticmethod
    def forward(ctx, xBC, raw, bias, A, D, groups, chunk, state):
        xBC, raw = xBC.float().contiguous(), rows(raw)
        batch, T, width = xBC.shape
        H, P, N = state.shape[1:]
        chunks = -(-T // chunk)
        starts, y = xBC.new_empty(batch, H, chunks + 1, N, P), xBC.new_empty(batch, T, H, P)
        starts[:, :, 0] = state.transpose(2, 3)
        ctx.how = T, H, groups, P, N, chunk
        ctx.work = y.numel() * N // 8
        launch('ssd_forward', batch * H, ctx.work, *ctx.how, xBC, width, raw, raw.stride(-2), bias, A, D, starts, y)
        ctx.save_for_backward(xBC, raw, bias, A, D, starts)
        return y, starts[:, :, -1].transpose(2, 3).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gstate):
        xBC, raw, bias, A, D, starts = ctx.saved_tensors
        (batch, T, width), (_, H, G, P, N, _) = xBC.shape, ctx.how
        gx, gBC = torch.empty_like(xBC), xBC.new_zeros(shares(batch * H, 2 * ctx.work), batch, T, 2 * G * N)
        graw, gA, gD = xBC.new_empty(batch, T, H), A.new_zeros(batch, H), D.new_zeros(batch, H)
        gstate = gstate.transpose(2, 3).contiguous()
        launch('ssd_backward', batch * H, 2 * ctx.work, batch, *ctx.how, xBC, width, raw, raw.stride(-2), bias, A, D, starts, gy.contiguous(), gstate,
               gx, gBC, graw, gA, gD)
        gx[..., H * P:] = gBC.sum(0) if len(gBC) > 1 else gBC[0]
        return gx, graw, graw.sum((0, 1)), gA.sum(0), gD.sum(0), None, None, gstate.transpose(2, 3)


def mamba2_scan(xBC, raw, bias, A, D, groups, head_dim, chunk_size=64, state=None):
    """Mamba-2's recurrence, by ssd, and its skip: y = C h + D x, dt = softplus(raw + bias).

    xBC (B, T, E + 2GN), raw (B, T, H), bias, A, D (H), state (B, H, P, N) or None → y (B, T, H, P), last state."""
    batch, T, H, P = *raw.shape, head_dim
    N = (xBC.shape[-1] - H * P) // (2 * groups)
    if use_native(xBC) and P % 16 == 0 and N % 16 == 0 and chunk_size % 16 == 0:
        state = xBC.new_zeros(batch, H, P, N, dtype=torch.float32) if state is None else state
        chunk = min(chunk_size, -(-T // 16) * 16)
        return _Mamba2.apply(xBC, raw, bias, A, D, groups, chunk, state)
    x, B, C = xBC.split((H * P, groups * N, groups * N), dim=-1)
    x = x.unflatten(-1, (H, P))                                                 # (B, T, H, P)
    B, C = (u.unflatten(-1, (groups, N)) for u in (B, C))                       # (B, T, G, N)
    y, state = ssd(x, F.softplus(raw.float() + bias), A, B, C, chunk_size, state)
    return torch.addcmul(y, x, D[:, None]), state


# --- the short convolution of a Mamba ---------------------------------------------------------------------------------

class _NativeConvSilu(Function):

    @staticmethod
    def forward(ctx, x, weight, bias):                                          # x (B, T, E), weight (4, E), bias (E)
        x, weight = rows(x), weight.contiguous()
        (B, T, E), y = x.shape, x.new_empty(x.shape)
        launch('conv_forward', B * -(-E // 64), 2 * x.numel(), T, E, x, x.stride(-2), weight, bias, y)
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight, bias = ctx.saved_tensors
        T, E = x.shape[1:]
        n = x.shape[0] * -(-E // 64)
        gx, gw, gb = x.new_empty(x.shape), *(x.new_zeros(shares(n, 3 * x.numel()), *size) for size in ((4, E), (E,)))
        launch('conv_backward', n, 3 * x.numel(), T, E, x, x.stride(-2), weight, bias, gy.contiguous(), gx, gw, gb)
        return gx, gw.sum(0), gb.sum(0)


class _ConvSilu(Function):
    """silu of the causal depthwise convolution as K shifted multiply-adds, which beats a grouped convolution on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):                                          # x (B, T, E), weight (K, E), bias (E)
        K, T = weight.shape[0], x.shape[1]
        y = torch.addcmul(bias, x, weight[K - 1])
        for s in range(1, min(K, T)):                                           # s tokens back
            y[:, s:].addcmul_(x[:, :T - s], weight[K - 1 - s])
        ctx.save_for_backward(x, weight, y)
        return F.silu(y)

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        K, T = weight.shape[0], y.shape[1]
        g = torch.ops.aten.silu_backward(g, y)
        dx, dw = g * weight[K - 1], torch.zeros_like(weight)
        for s in range(min(K, T)):
            if s:
                dx[:, :T - s].addcmul_(g[:, s:], weight[K - 1 - s])
            dw[K - 1 - s] = (g[:, s:] * x[:, :T - s]).sum((0, 1))
        return dx, dw, g.sum((0, 1))


def conv_silu(x, weight, bias, state=None):
    """silu of the causal depthwise convolution. x (B, T, E), weight (E, 1, K), bias (E), state (B, K-1, E): the inputs
    before x, None for zeros → (B, T, E), new state."""
    B, T, E = x.shape
    K = weight.shape[-1]
    if state is None and T < K - 1:
        state = x.new_zeros(B, K - 1, E)
    if state is not None:
        x = torch.cat((state.to(x.dtype), x), 1)
    if K == 4 and use_native(x):
        y = _NativeConvSilu.apply(x, weight[:, 0].t(), bias)
        return y[:, x.shape[1] - T:], x[:, x.shape[1] - K + 1:].clone()
    weight, bias = weight[:, 0].t().to(x.dtype).contiguous(), bias.to(x.dtype)
    if torch.compiler.is_compiling():                                           # the compiler fuses the steps by itself
        padded = F.pad(x, (0, 0, K - 1, 0))
        y = F.silu(bias + sum(padded[:, j:j + x.shape[1]] * weight[j] for j in range(K)))
    else:
        y = _ConvSilu.apply(x, weight, bias)
    return y[:, x.shape[1] - T:], x[:, x.shape[1] - K + 1:].clone()             # a copy: a view would keep all of x


# --- the loss ---------------------------------------------------------------------------------------------------------

def cross_entropy_(logits, targets):
    """The sum of the cross-entropies of logits (n, V), in nats; the logits become its gradient, softmax less one-hot. A target below 0
    does not count."""
    if use_native(logits):
        losses = logits.new_empty(len(targets))
        launch('cross_entropy', len(targets), 2 * logits.numel(), logits.shape[1], logits, targets.contiguous(), losses)
        return losses.sum()
    valid, index = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    p = torch.log_softmax(logits, -1)
    total = -torch.where(valid, p.gather(1, index), 0).sum()
    torch.mul(p.exp_().scatter_add_(1, index, torch.full_like(p[:, :1], -1)), valid, out=logits)
    return total


class _LinearCrossEntropy(Function):
    """Cross-entropy of x @ weight.T in chunks of tokens, each chunk's gradient made with its loss.

    So the (tokens, V) logits never exist at once, and nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        need = any(ctx.needs_input_grad)
        count = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            dx = torch.empty(x.shape, dtype=dtype, device=x.device) if need else None
            dw = torch.zeros_like(weight) if need else None
            for i in range(0, len(targets), chunk):
                xc = x[i:i + chunk].to(dtype)
                logits = (xc @ w.t()).float()                                   # (chunk, V)
                total += cross_entropy_(logits, targets[i:i + chunk])
                if need:
                    grad = logits.to(dtype)
                    torch.mm(grad, w, out=dx[i:i + chunk])
                    dw.addmm_(grad.t(), xc) if dtype == dw.dtype else dw.add_(grad.t() @ xc)
        if need:
            ctx.save_for_backward(dx, dw, count)
            ctx.dtype = x.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        return dx.to(ctx.dtype) * (grad / count), dw * (grad / count), None, None


def chunk_of(V):
    """Tokens whose logits are alive at once: a thousand; fewer where V is huge (256 MB of logits), more where it is small."""
    return max(256, min(1024, (1 << 26) // V), (1 << 22) // V)


def linear_cross_entropy(x, weight, targets, chunk=0):
    """Mean cross-entropy in nats of predicting targets (B, T) from x (B, T, D) by weight (V, D); targets of -1 do not count.

    chunk: tokens whose logits are alive at once; 0: as chunk_of says."""
    return _LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), chunk or chunk_of(len(weight)))
