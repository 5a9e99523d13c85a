"""The operations of the models that are worth more than a line: each in plain PyTorch, and each again for the machine at hand.

    attention, selective_scan, ssd, conv_silu, rms_norm, swiglu, apply_rope, linear_cross_entropy

On a CPU with a C++ compiler native.cpp is compiled once, in some seconds, and kept in __pycache__: then an operation reads its
inputs once and writes its result once, on all of torch's threads, forward and backward. Elsewhere, under torch.compile, and where no
compiler is found, the PyTorch beside it computes the same; MAMBINO_NATIVE=0 asks for that. On CUDA the kernels of the package
mamba-ssm take over the recurrences if it can be imported. `describe_kernels()` says in a line what is in use.

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, G groups or key heads, P head size, N state size, Q chunk,
V vocabulary. All of it is differentiable once, and computes in fp32 what must be: softmax, norms, recurrences, the loss.
"""
import functools
import importlib.util
import math
import os
import sys
import types
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels import native


def describe_kernels(device='cpu'):
    """What computes on this kind of device, in some words."""
    if device == 'cpu' and native.library():
        return 'operations compiled for this CPU'
    if device == 'cpu':
        why = 'MAMBINO_NATIVE=0' if os.environ.get('MAMBINO_NATIVE') == '0' else 'no working C++ compiler was found'
        return f'operations in plain PyTorch, since {why}'
    found, notes = fused(device)
    return (f'mamba-ssm\'s kernels ({", ".join(found)})' if found else 'operations in plain PyTorch') + ''.join(f'; {note}' for note in notes)


def use_native(x, *others):
    """Whether an operation on x goes to native.cpp; the others, its parameters, must be fp32."""
    return (x.device.type == 'cpu' and x.dtype != torch.float64 and all(t.dtype == torch.float32 for t in others)
            and not torch.compiler.is_compiling() and native.library() is not None)


def one_token(x, *state):
    """Whether one token of each of a few sequences, x (B, 1, D), goes to native.cpp's last part: in fp32, without gradients, with a state."""
    return (x.shape[1] == 1 and not torch.is_grad_enabled() and all(t is not None and t.dtype == torch.float32 for t in (x, *state))
            and native.few(x) and use_native(x) and not torch.is_autocast_enabled('cpu'))


def import_past_init(package, module):
    """A module of a package whose own __init__ fails: mamba-ssm's imports a CUDA extension that may not have been built."""
    try:
        return importlib.import_module(module)
    except Exception:                                                           # not only ImportError: a library of another version, …
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise
        sys.modules[package] = stub = types.ModuleType(package)
        stub.__path__ = list(spec.submodule_search_locations)
        try:
            return importlib.import_module(module)
        finally:
            del sys.modules[package]


@functools.cache
def fused(device='cuda'):
    """({name: function}, notes) of mamba-ssm's kernels that can be imported and, on a small example on this device, give what plain
    PyTorch gives, gradients too. One that is there and does not work is left out, with a note."""
    found, notes = {}, []
    for name, module, function in (('ssd', 'mamba_ssm.ops.triton.ssd_combined', 'mamba_chunk_scan_combined'),
                                   ('scan', 'mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn')):
        try:
            function = getattr(import_past_init('mamba_ssm', module), function)
        except Exception:
            continue
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                check_fused(name, function, device)
            found[name] = function
        except Exception as error:
            notes.append(f'mamba-ssm\'s {name} does not work here ({type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ""})')
    return found, notes


def check_fused(name, function, device):
    """Raises if a fused kernel fails, or differs from the plain operation by more than 1% of the largest value."""
    B, T, H, P, N = 2, 96, 4, 32, 16
    plain, kernel = (plain_mamba2, fused_mamba2) if name == 'ssd' else (plain_mamba1, fused_mamba1)
    shapes = [(B, T, H * P + 2 * N), (B, T, H), (H,), (H,), (H,)] if name == 'ssd' else \
        [(B, T, P), (B, T, P), (P,), (P, N), (B, T, N), (B, T, N), (P,), (B, T, P)]
    inputs = [torch.randn(shape).to(device) for shape in shapes]
    inputs[3] = -inputs[3].abs() - 0.1                                          # A
    results = []
    for run in (plain, partial(kernel, function)):
        leaves = [u.clone().requires_grad_() for u in inputs]
        y = run(*leaves, 1, P, 32)[0] if name == 'ssd' else run(*leaves)[0]
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for want, got in zip(*results):
        if not (got.float() - want).abs().max() <= 0.01 * want.abs().max():     # also where it is NaN
            raise ValueError('gives other numbers than plain PyTorch')


# --- norms, gates, rotary positions -----------------------------------------------------------------------------------

def rms_norm(x, weight, eps, gate=None, groups=1):
    """x / rms(x) * weight over the last dimension, or over each of so many groups of it (Zhang & Sennrich 2019), in fp32. gate, of x's
    shape: x * silu(gate) is normalised instead (Mamba-2's)."""
    if use_native(x, weight):
        if gate is None and groups == 1 and x.dtype == torch.float32 and native.few(x) and not torch.is_grad_enabled():
            return native.norm_step(x, weight, eps)
        return native.run(native.Norm, x, gate, weight, eps, groups)
    x = x.float() if gate is None else x.float() * F.silu(gate.float())
    if x.device.type != 'cpu' and groups == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    x = x.unflatten(-1, (groups, -1))
    if x.device.type == 'cpu':                                                  # F.rms_norm takes three times as long there
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    return F.rms_norm(x, x.shape[-1:], None, eps).flatten(-2) * weight


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020)."""
    if gate.dtype == torch.float32 and gate.numel() % 16 == 0 and use_native(gate):
        return native.run(native.SwiGLU, gate, up)
    return F.silu(gate) * up


def rope_tables(positions, dim, theta):
    """cos and sin of rotary positions (Su et al. 2021): positions (..., T) → two (..., T, 1, dim/2), fp32."""
    inv_freq = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.float()[..., None, None] * inv_freq
    return angles.cos(), angles.sin()


def apply_rope(x, rope):
    """Rotate (..., T, heads, P) by position; pairs are (i, i + P/2), as in Llama."""
    cos, sin = rope
    if x.dtype == torch.float32 and use_native(x):
        return native.run(native.Rope, x, cos, sin, 1.0)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --- attention --------------------------------------------------------------------------------------------------------

def attention(q, k, v, window=0, dropout=0.0):
    """Causal attention of T tokens to themselves. q (B, T, H, P), k, v (B, T, G, P), each key head for H/G query heads → (B, T, H P).

    window: each token sees so many last tokens, itself included; 0 is all. Time and memory then grow with T, not with T squared."""
    B, T, H, P = q.shape
    window = 0 if window >= T else window
    if P % 16 == 0 and use_native(q):
        seed = int(torch.randint(2**31, ())) if dropout else 0
        return native.run(native.Attention, q, k, v, window, float(dropout), seed).to(q.dtype)
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


def visible(i, j, window):
    """Whether query i sees key j, one of the last `window`."""
    return (j <= i) & (j > i - window)


def banded(q, k, v, window, dropout):
    """Attention in a window by blocks of `window` queries that see their own block of keys and the one before. (B, H, T, P) all."""
    B, H, T, P = q.shape
    if 2 * window >= T:
        i = torch.arange(T, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(i[:, None], i, window), dropout_p=dropout)
    n = -(-T // window)
    q, k, v = (F.pad(u, (0, 0, 0, n * window - T)).view(B, H, n, window, P) for u in (q, k, v))
    k, v = (torch.cat((F.pad(u, (0, 0, 0, 0, 1, 0))[:, :, :-1], u), 3) for u in (k, v))  # (B, H, n, 2 window, P)
    i, j = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device) - window
    mask = visible(i, j, window)                                                # (window, 2 window)
    mask = mask & ((j >= 0) | (torch.arange(n, device=q.device)[:, None, None] > 0))     # before the first block is nothing
    y = F.scaled_dot_product_attention(*(u.transpose(1, 2).flatten(0, 1) for u in (q, k, v)),
                                       attn_mask=mask.repeat(B, 1, 1)[:, None], dropout_p=dropout)
    return y.view(B, n, H, window, P).transpose(1, 2).reshape(B, H, n * window, P)[:, :, :T]


@functools.cache
def block_mask(T, window, device):
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda b, h, i, j: visible(i, j, window), None, None, T, T, device=device)


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


def scan_chunk(x, dt, A, B, C, h):
    """k steps of the recurrence, unrolled for a compiler. x, dt (B, k, E), A (N, E), B, C (B, k, N), h (B, N, E) → y (B, k, E), h."""
    ys = []
    for i in range(x.shape[1]):
        d = dt[:, i, None]
        h = torch.exp(d * A) * h + (d * x[:, i, None]) * B[:, i, :, None]
        ys.append((h * C[:, i, :, None]).sum(1))
    return torch.stack(ys, 1), h


def scan_chunk_backward(x, dt, A, B, C, h, gy, g):
    """The gradients of x, dt, B, C, A and h, from those of y and of the last h."""
    states, decays = [h], []
    for i in range(x.shape[1]):
        d = dt[:, i, None]
        decays.append(torch.exp(d * A))
        states.append(decays[i] * states[i] + (d * x[:, i, None]) * B[:, i, :, None])
    gx, gdt, gB, gC, gA = [], [], [], [], torch.zeros_like(A)
    for i in reversed(range(x.shape[1])):
        d = dt[:, i, None]
        gh = g + gy[:, i, None] * C[:, i, :, None]                              # (B, N, E)
        gC.append((states[i + 1] * gy[:, i, None]).sum(2))
        gB.append((gh * (d * x[:, i, None])).sum(2))
        gu = (gh * B[:, i, :, None]).sum(1)                                     # (B, E)
        g = gh * decays[i]
        gdecay = g * states[i]                                                  # of dt A
        gA = gA + (gdecay * d).sum(0)
        gdt.append((gdecay * A).sum(1) + gu * x[:, i])
        gx.append(gu * dt[:, i])
    return *(torch.stack(grads[::-1], 1) for grads in (gx, gdt, gB, gC)), gA, g


@functools.cache
def chunk_functions():
    """The two, compiled: on a GPU each is a few kernels where PyTorch would start a hundred."""
    return torch.compile(scan_chunk, dynamic=False), torch.compile(scan_chunk_backward, dynamic=False)


class _ScanByChunks(Function):
    """selective_scan by chunks of 8 steps, each one call of chunk_functions; T is a multiple of 8."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        At, ys, starts = A.t().contiguous(), [], []
        for part in zip(*(u.split(8, 1) for u in (x, dt, B, C))):
            starts.append(h)
            y, h = chunk_functions()[0](*part[:2], At, *part[2:], h)
            ys.append(y)
        ctx.save_for_backward(x, dt, At, B, C, torch.stack(starts))
        return torch.cat(ys, 1), h

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g):
        x, dt, At, B, C, starts = ctx.saved_tensors
        grads, gA = [], torch.zeros_like(At)
        for *part, h in reversed(list(zip(*(u.split(8, 1) for u in (x, dt, B, C, gy)), starts))):
            *some, more, g = chunk_functions()[1](*part[:2], At, *part[2:4], h, part[4], g)
            grads.append(some)
            gA += more
        gx, gdt, gB, gC = (torch.cat(parts[::-1], 1) for parts in zip(*grads))
        return gx, gdt, gA.t(), gB, gC, g


def selective_scan(x, dt, A, B, C, state=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t (Mamba, Gu & Dao 2023, eq. 2 and algorithm 2), in fp32.

    x, dt (B, T, E), A (E, N), B, C (B, T, N), state (B, N, E) or None for zeros → y (B, T, E), last state (B, N, E).
    Differentiable in everything, the state included."""
    x, dt, A, B, C = (u.float().contiguous() for u in (x, dt, A, B, C))
    if state is None:
        state = x.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    if x.device.type == 'cuda' and x.shape[1] >= 8:
        pad = -x.shape[1] % 8                                                   # dt = 0 leaves the state as it is
        y, state = _ScanByChunks.apply(*(F.pad(u, (0, 0, 0, pad)) for u in (x, dt)), A, *(F.pad(u, (0, 0, 0, pad)) for u in (B, C)), state)
        return y[:, :y.shape[1] - pad], state
    return _SelectiveScan.apply(x, dt, A, B, C, state)


def mamba1_scan(x, raw, bias, A, B, C, D, z, state=None):
    """Mamba-1's recurrence with what stands around it: (C h + D x) silu(z), h by selective_scan, dt = softplus(raw + bias).

    x, raw, z (B, T, E), bias, D (E), A (E, N), B, C (B, T, N), state (B, N, E) or None → y (B, T, E), last state."""
    if use_native(x, bias, D) and A.shape[1] in (8, 16, 32, 64):
        state = x.new_zeros(len(x), A.shape[1], A.shape[0], dtype=torch.float32) if state is None else state
        return native.run(native.Mamba1, x, raw, bias, A, B, C, D, z, state)
    if x.device.type == 'cuda' and state is None and not torch.compiler.is_compiling() and 'scan' in fused()[0]:
        return fused_mamba1(fused()[0]['scan'], x, raw, bias, A, B, C, D, z)
    return plain_mamba1(x, raw, bias, A, B, C, D, z, state)


def plain_mamba1(x, raw, bias, A, B, C, D, z, state=None):
    y, state = selective_scan(x, F.softplus(raw.float() + bias), A, B, C, state)
    return torch.addcmul(y, x, D) * F.silu(z), state


def fused_mamba1(function, x, raw, bias, A, B, C, D, z):
    x, raw, B, C, z = (u.transpose(1, 2).contiguous().to(x.dtype) for u in (x, raw, B, C, z))  # channels before time
    y, state = function(x, raw, A, B, C, D.float(), z, bias.float(), delta_softplus=True, return_last_state=True)
    return y.transpose(1, 2), state.transpose(1, 2)


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


def mamba2_scan(xBC, raw, bias, A, D, groups, head_dim, chunk_size=64, state=None):
    """Mamba-2's recurrence, by ssd, and its skip: y = C h + D x, dt = softplus(raw + bias).

    xBC (B, T, E + 2GN), raw (B, T, H), bias, A, D (H), state (B, H, P, N) or None → y (B, T, H, P), last state."""
    batch, T, H, P = *raw.shape, head_dim
    N = (xBC.shape[-1] - H * P) // (2 * groups)
    if use_native(xBC, bias, D) and P % 16 == 0 and N % 16 == 0 and chunk_size % 16 == 0:
        state = xBC.new_zeros(batch, H, P, N, dtype=torch.float32) if state is None else state
        chunk = min(chunk_size, -(-T // 16) * 16)
        return native.run(native.Mamba2, xBC, raw, bias, A, D, groups, chunk, state)
    if xBC.device.type == 'cuda' and not torch.compiler.is_compiling() and 'ssd' in fused()[0]:
        return fused_mamba2(fused()[0]['ssd'], xBC, raw, bias, A, D, groups, head_dim, chunk_size, state)
    return plain_mamba2(xBC, raw, bias, A, D, groups, head_dim, chunk_size, state)


def plain_mamba2(xBC, raw, bias, A, D, groups, head_dim, chunk_size=64, state=None):
    x, B, C = heads_of(xBC, raw, groups, head_dim)
    y, state = ssd(x, F.softplus(raw.float() + bias), A, B, C, chunk_size, state)
    return torch.addcmul(y, x, D[:, None]), state


def fused_mamba2(function, xBC, raw, bias, A, D, groups, head_dim, chunk_size=64, state=None):
    x, B, C = heads_of(xBC, raw, groups, head_dim)
    return function(x, raw, A, B, C, chunk_size, D=D, dt_bias=bias, dt_softplus=True, initial_states=state, return_final_states=True)


def heads_of(xBC, raw, groups, P):
    """xBC (B, T, E + 2GN) → x (B, T, H, P), B and C (B, T, G, N)."""
    E = raw.shape[-1] * P
    N = (xBC.shape[-1] - E) // (2 * groups)
    x, B, C = xBC.split((E, groups * N, groups * N), dim=-1)
    return x.unflatten(-1, (-1, P)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (groups, N))


# --- the short convolution of a Mamba ---------------------------------------------------------------------------------

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
    if K == 4 and use_native(x, bias):
        y = native.run(native.ConvSilu, x, weight[:, 0].t(), bias)
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
        return native.cross_entropy_(logits, targets)
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
        need, tune = any(ctx.needs_input_grad), ctx.needs_input_grad[1]         # under an adapter the weight is frozen
        count = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            dx = torch.empty(x.shape, dtype=dtype, device=x.device) if need else None
            dw = torch.zeros_like(weight) if tune else None
            for i in range(0, len(targets), chunk):
                xc = x[i:i + chunk].to(dtype)
                logits = (xc @ w.t()).float()                                   # (chunk, V)
                total += cross_entropy_(logits, targets[i:i + chunk])
                if need:
                    grad = logits.to(dtype)
                    torch.mm(grad, w, out=dx[i:i + chunk])
                if tune:
                    dw.addmm_(grad.t(), xc) if dtype == dw.dtype else dw.add_(grad.t() @ xc)
        if need:
            ctx.save_for_backward(dx, dw, count)
            ctx.dtype = x.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        return dx.to(ctx.dtype) * (grad / count), None if dw is None else dw * (grad / count), None, None


def chunk_of(V):
    """Tokens whose logits are alive at once: a thousand; fewer where V is huge (256 MB of logits), more where it is small."""
    return max(256, min(1024, (1 << 26) // V), (1 << 22) // V)


def linear_cross_entropy(x, weight, targets, chunk=0):
    """Mean cross-entropy in nats of predicting targets (B, T) from x (B, T, D) by weight (V, D); targets of -1 do not count.

    chunk: tokens whose logits are alive at once; 0: as chunk_of says."""
    return _LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), chunk or chunk_of(len(weight)))


def compiled(net):
    """torch.compile of a model or a function of one. Mamba-1's scan stays out of it: unrolled, its steps would compile for hours."""
    global selective_scan
    selective_scan = torch.compiler.disable(selective_scan)
    return torch.compile(net)
