"""The models' operations in PyTorch that runs on any machine: fewer passes over memory than the
definitions, and far less of it.

    selective_scan          keeps states at chunk starts only; the backward pass makes the rest
    ssd                     products once a group, not once a head
    attention               scaled_dot_product_attention; in a window by blocks: time and memory
                            grow with T, not with T squared
    causal_conv1d           K shifted multiply-adds
    linear_cross_entropy    in chunks of tokens: the logits never exist at once
    experts_swiglu          fixed shapes: no GPU is waited for

Letters of the shapes: B batch, T time, D model width, E inner width, H heads, G groups or key
heads, P head size, N state size, Q chunk, V vocabulary.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels import cpu, cpu_mamba
from mambino.kernels.registry import kernel


@kernel
def rms_norm(x, weight, eps, dtype=None):
    if x.device.type == 'cpu':                                  # there it takes three times as long
        return NotImplemented
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype or x.dtype)


# --- attention ------------------------------------------------------------------------------------

@kernel
def attention(q, k, v, window=0, dropout=0.0, mask=None):
    T, S, H = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))            # (B, heads, T or S, P)
    if k.shape[1] != H:
        k, v = (u.repeat_interleave(H // u.shape[1], dim=1) for u in (k, v))
    if mask is None and S == T and 0 < window < T:
        y = attention_in_blocks(q, k, v, window, dropout)
    elif mask is None and S > T and (T > 1 or 0 < window < S):  # no cache is read in this way
        return NotImplemented
    else:
        causal = mask is None and S == T
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)                         # (B, T, H P)


def in_window(i, j, window):
    """Whether query i sees key j, one of the last `window`."""
    return (j <= i) & (j > i - window)


def attention_in_blocks(q, k, v, window, dropout):
    """Blocks of `window` queries that see their own block of keys and the one before. (B, H, T, P)
    all."""
    B, H, T, P = q.shape
    if 2 * window >= T:
        i = torch.arange(T, device=q.device)
        mask = in_window(i[:, None], i, window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    n = -(-T // window)
    q, k, v = (F.pad(u, (0, 0, 0, n * window - T)).view(B, H, n, window, P) for u in (q, k, v))
    k, v = (torch.cat((F.pad(u, (0, 0, 0, 0, 1, 0))[:, :, :-1], u), 3) for u in (k, v))  # (B, H, n, 2 window, P)
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device) - window
    block = torch.arange(n, device=q.device)[:, None, None]
    mask = in_window(i, j, window) & ((j >= 0) | (block > 0))   # (n, window, 2 window); before the first is nothing
    q, k, v = (u.transpose(1, 2).flatten(0, 1) for u in (q, k, v))  # (B n, H, window or 2 window, P)
    mask = mask.repeat(B, 1, 1)[:, None]                        # (B n, 1, window, 2 window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return y.view(B, n, H, window, P).transpose(1, 2).reshape(B, H, n * window, P)[:, :, :T]


# --- Mamba-1's recurrence -------------------------------------------------------------------------

STEPS = 16  # of a chunk: 8, 16 and 32 measured alike; memory is that of T/16 states


def scan_forward(x, dt, A, B, C, state):
    """selective_scan → y, the last state, and the states (N, E) at the starts of chunks of 16 steps: for
    each chunk the two factors of all its steps are made at once, then each step is one fused
    multiply-add."""
    batch, T, E = x.shape
    N = A.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        A_t = A.t().contiguous()                                # (N, E)
        dt_x = dt * x
        y = torch.empty_like(x)
        starts = x.new_empty(-(-T // STEPS) + 1, batch, N, E)   # the state before each chunk, and the last
        starts[0] = state
        decay_room, state_room = x.new_empty(2, batch, STEPS, N, E)
        for c in range(len(starts) - 1):
            span = slice(c * STEPS, min(T, c * STEPS + STEPS))
            steps = span.stop - span.start
            h = starts[c]
            decay = torch.mul(dt[:, span, None], A_t, out=decay_room[:, :steps]).exp_()
            states = torch.mul(dt_x[:, span, None], B[:, span, :, None], out=state_room[:, :steps])
            for i in range(steps):
                h = states[:, i].addcmul_(decay[:, i], h)
            y[:, span] = torch.matmul(C[:, span, None], states).squeeze(2)
            starts[c + 1] = h
    return y, starts[-1].clone(), starts


def scan_backward(grad_y, grad_state, x, dt, A, B, C, starts):
    """The gradients of x, dt, A, B, C and the state; the states within a chunk are made again."""
    batch, T, E = x.shape
    N = A.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        A_t = A.t().contiguous()
        dt_x = dt * x
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(u) for u in (x, dt, B, C))
        grad_A = torch.zeros_like(A_t)
        decay_room, grad_room = x.new_empty(2, batch, STEPS, N, E)
        state_room = x.new_empty(batch, STEPS + 1, N, E)
        for c in reversed(range(len(starts) - 1)):
            span = slice(c * STEPS, min(T, c * STEPS + STEPS))
            steps = span.stop - span.start
            decay = torch.mul(dt[:, span, None], A_t, out=decay_room[:, :steps]).exp_()
            before, states = state_room[:, :steps], state_room[:, 1:steps + 1]
            torch.mul(dt_x[:, span, None], B[:, span, :, None], out=states)
            before[:, 0] = starts[c]
            for i in range(steps):
                states[:, i].addcmul_(decay[:, i], before[:, i])
            grad_h = torch.mul(C[:, span, :, None], grad_y[:, span, None], out=grad_room[:, :steps])
            for i in reversed(range(steps)):
                grad_state = grad_h[:, i].add_(grad_state) * decay[:, i]
            grad_C[:, span] = torch.matmul(states, grad_y[:, span, :, None]).squeeze(-1)
            grad_B[:, span] = torch.matmul(grad_h, dt_x[:, span, :, None]).squeeze(-1)
            grad_dt_x = torch.matmul(B[:, span, None], grad_h).squeeze(2)  # (B, steps, E)
            grad_h.mul_(decay).mul_(before)                     # now of the exponent, dt A
            grad_A += torch.mul(grad_h, dt[:, span, None], out=decay).sum((0, 1))
            of_decay = torch.mul(grad_h, A_t, out=decay).sum(2)
            grad_dt[:, span] = of_decay.addcmul_(grad_dt_x, x[:, span])
            grad_x[:, span] = grad_dt_x.mul_(dt[:, span])
    return grad_x, grad_dt, grad_A.t(), grad_B, grad_C, grad_state


class Scan(NamedTuple):
    """A selective_scan with its backward pass by hand."""
    forward: Callable       # as scan_forward
    backward: Callable      # as scan_backward
    operation: Callable     # forward, as one operation that a compiler does not look into

    def __call__(self, x, dt, A, B, C, state):
        """→ y, the last state. All in fp32 and contiguous."""
        if torch.compiler.is_compiling():
            return self.operation(x, dt, A, B, C, state)[:2]
        return SelectiveScan.apply(self.forward, self.backward, x, dt, A, B, C, state)


class SelectiveScan(Function):

    @staticmethod
    def forward(ctx, forward, backward, x, dt, A, B, C, state):
        y, state, starts = forward(x, dt, A, B, C, state)
        ctx.save_for_backward(x, dt, A, B, C, starts)
        ctx.backward_of_scan = backward
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        return None, None, *ctx.backward_of_scan(grad_y, grad_state, *ctx.saved_tensors)


def make_scan(name, forward, backward, n_starts):
    """A Scan. To a compiler it is one operation: unrolled, its steps would compile for hours. n_starts: T →
    states that are kept."""
    inputs = 'Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C'
    scan = torch.library.custom_op(f'mambino::{name}', forward, mutates_args=(),
                                   schema=f'({inputs}, Tensor state) -> (Tensor, Tensor, Tensor)')
    gradients = torch.library.custom_op(
        f'mambino::{name}_backward', backward, mutates_args=(),
        schema=f'(Tensor grad_y, Tensor grad_state, {inputs}, Tensor starts) '
               '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')

    @scan.register_fake
    def _(x, dt, A, B, C, state):
        return torch.empty_like(x), torch.empty_like(state), state.new_empty(n_starts(x.shape[1]), *state.shape)

    @gradients.register_fake
    def _(grad_y, grad_state, x, dt, A, B, C, starts):
        grad_A = A.t().new_empty(A.t().shape).t()
        return *(torch.empty_like(u) for u in (x, dt)), grad_A, *(torch.empty_like(u) for u in (B, C, starts[0]))

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1], output[2])

    def differentiate(ctx, grad_y, grad_state, _):
        saved = ctx.saved_tensors                               # which a checkpoint gives once
        x, starts = saved[0], saved[-1]
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
        grad_state = torch.zeros_like(starts[0]) if grad_state is None else grad_state
        return gradients(grad_y, grad_state, *saved)

    scan.register_autograd(differentiate, setup_context=save)
    return Scan(forward, backward, scan)


portable_scan = make_scan('selective_scan', scan_forward, scan_backward, lambda T: -(-T // STEPS) + 1)


@kernel
def selective_scan(x, dt, A, B, C, state=None):
    x, dt, A, B, C = (u.float().contiguous() for u in (x, dt, A, B, C))
    if state is None:
        state = x.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    return portable_scan(x, dt, A, B, C, state)


# --- Mamba-2's recurrence -------------------------------------------------------------------------

@kernel
def ssd(x, dt, A, B, C, chunk_size=64, state=None):
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    R = H // G                                                  # heads a group
    Q = min(chunk_size, 1 << (T - 1).bit_length())
    pad = -T % Q
    if pad:                                                     # dt = 0 leaves the state as it is
        x, B, C = (F.pad(u, (0, 0, 0, 0, 0, pad)) for u in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    c = (T + pad) // Q
    dt = dt.float().view(batch, c, Q, H)

    # sums of dt A up to each token. Differences of large sums would lose the small ones, so they
    # are taken in fp64.
    exact = torch.float32 if x.device.type == 'mps' else torch.float64
    sums = (dt.to(exact) * A.to(exact)).cumsum(2).transpose(2, 3)  # (B, c, H, Q)
    hidden = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).float()   # (B, c, H, Q, Q): from token j to i
    decay = decay.masked_fill(hidden, -math.inf).exp()          # masked before exp: no inf, no NaN
    to_end = (sums[..., -1:] - sums).float().exp().transpose(2, 3)  # (B, c, Q, H)
    sums = sums.float()

    xdt = x.reshape(batch, c, Q, H, P) * dt[..., None]
    B, C = (u.reshape(batch, c, Q, G, N).transpose(2, 3) for u in (B, C))  # (B, c, G, Q, N)

    # inside a chunk: attention whose weights are C B^T, once a group, times the decay
    weights = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay.view(batch, c, G, R, Q, Q)
    y = weights.view(batch, c, H, Q, Q) @ xdt.transpose(2, 3)   # (B, c, H, Q, P)

    # what each chunk adds to the state, and the state each chunk starts from
    xdt_at_end = (xdt * to_end[..., None]).view(batch, c, Q, G, R * P).transpose(2, 3)
    added = (B.transpose(-1, -2) @ xdt_at_end).float()          # (B, c, G, N, R P)
    added = added.view(batch, c, G, N, R, P)
    kept = sums[..., -1].exp().view(batch, c, G, 1, R, 1)
    if state is None:
        h = x.new_zeros(batch, G, N, R, P, dtype=torch.float32)
    else:
        h = state.float().view(batch, G, R, P, N).permute(0, 1, 4, 2, 3)
    starts = []
    for i in range(c):
        starts.append(h)
        h = torch.addcmul(added[:, i], h, kept[:, i])
    from_start = C @ torch.stack(starts, 1).view(batch, c, G, N, R * P)  # (B, c, G, Q, R P)
    from_start = from_start.view(batch, c, G, Q, R, P).transpose(2, 3).reshape(batch, c, Q, H, P)
    y = torch.addcmul(y.transpose(2, 3).float(), from_start.float(), sums.exp().transpose(2, 3)[..., None])
    last = h.permute(0, 1, 3, 4, 2).reshape(batch, H, P, N)
    return y.reshape(batch, T + pad, H, P)[:, :T], last


# --- the short convolution of a Mamba -------------------------------------------------------------

class ConvSilu(Function):
    """silu of the causal depthwise convolution as K shifted multiply-adds, which beats a grouped
    convolution on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):                          # (B, T, E), (K, E), (E)
        K, T = weight.shape[0], x.shape[1]
        y = torch.addcmul(bias, x, weight[K - 1])
        for back in range(1, min(K, T)):
            y[:, back:].addcmul_(x[:, :T - back], weight[K - 1 - back])
        ctx.save_for_backward(x, weight, y)
        return F.silu(y)

    @staticmethod
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        K, T = weight.shape[0], y.shape[1]
        grad = torch.ops.aten.silu_backward(grad, y)
        grad_x = grad * weight[K - 1]
        grad_weight = torch.zeros_like(weight)
        for back in range(min(K, T)):
            if back:
                grad_x[:, :T - back].addcmul_(grad[:, back:], weight[K - 1 - back])
            grad_weight[K - 1 - back] = (grad[:, back:] * x[:, :T - back]).sum((0, 1))
        return grad_x, grad_weight, grad.sum((0, 1))


@kernel
def causal_conv1d(x, weight, bias, state=None):
    T, K = x.shape[1], weight.shape[-1]
    x = cpu_mamba.with_past(x, state, K)
    weight = weight[:, 0].t().to(x.dtype).contiguous()          # (K, E)
    bias = bias.to(x.dtype)
    if torch.compiler.is_compiling():  # the compiler fuses the steps by itself
        padded = F.pad(x, (0, 0, K - 1, 0))
        y = F.silu(bias + sum(padded[:, j:j + x.shape[1]] * weight[j] for j in range(K)))
    else:
        y = ConvSilu.apply(x, weight, bias)
    return y[:, x.shape[1] - T:], x[:, x.shape[1] - K + 1:].clone()  # a copy: a view would keep all of x


# --- the loss -------------------------------------------------------------------------------------

def cross_entropy_(logits, targets):
    """The sum of the cross-entropies of logits (n, V), in nats; the logits become its gradient,
    softmax less one-hot. A target below 0 does not count."""
    if cpu.applies(logits):
        return cpu.cross_entropy_(logits, targets)
    valid = (targets >= 0)[:, None]
    index = targets.clamp(min=0)[:, None]
    p = torch.log_softmax(logits, -1)
    total = -torch.where(valid, p.gather(1, index), 0).sum()
    p.exp_().scatter_add_(1, index, torch.full_like(p[:, :1], -1))
    torch.mul(p, valid, out=logits)
    return total


class LinearCrossEntropy(Function):
    """Cross-entropy of x @ weight.T in chunks of tokens, each chunk's gradient made with its loss.

    So the (tokens, V) logits never exist at once, and nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wants_grad = any(ctx.needs_input_grad)
        wants_weight = ctx.needs_input_grad[1]  # under an adapter the weight is frozen
        count = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        with torch.autocast(device, enabled=False):
            rounded = weight.to(dtype)
            grad_x = torch.empty(x.shape, dtype=dtype, device=x.device) if wants_grad else None
            grad_weight = torch.zeros_like(weight) if wants_weight else None
            for i in range(0, len(targets), chunk):
                part = x[i:i + chunk].to(dtype)
                logits = part @ rounded.t()                     # (chunk, V)
                if not (logits.dtype in cpu.PRECISIONS and cpu.applies(logits)):
                    logits = logits.float()
                total += cross_entropy_(logits, targets[i:i + chunk])
                if not wants_grad:
                    continue
                grad = logits.to(dtype)
                torch.mm(grad, rounded, out=grad_x[i:i + chunk])
                if wants_weight and dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.t(), part)
                elif wants_weight:
                    grad_weight.add_(grad.t() @ part)
        if wants_grad:
            ctx.save_for_backward(grad_x, grad_weight, count)
            ctx.dtype = x.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        if grad_weight is not None:
            grad_weight = grad_weight * scale
        return grad_x.to(ctx.dtype) * scale, grad_weight, None, None


@torch.compiler.assume_constant_result
def loss_chunk(V, kind='cpu'):
    """Tokens whose logits are alive at once. On a CPU a thousand; fewer where V is huge (256 MB of logits),
    more where it is small. A card has them in fp32 in a 64th of its memory, 1 GB at most: each chunk reads
    and writes the gradient of the head."""
    if kind != 'cuda':
        return max(256, min(1024, (1 << 26) // V), (1 << 22) // V)
    logits = min(1 << 30, card_memory() // 64) // 4
    return max(256, logits // V // 128 * 128)


def card_memory():
    """Bytes of the present card; where there is none to ask, of a small one."""
    if not torch.cuda.is_available():
        return 8 << 30
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


@kernel
def linear_cross_entropy(x, weight, targets, chunk=0):
    """chunk: tokens whose logits are alive at once; 0: as loss_chunk says."""
    chunk = chunk or loss_chunk(len(weight), cpu.device_kind(x))
    return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), chunk)


# --- experts --------------------------------------------------------------------------------------

@kernel
def experts_swiglu(x, pairs, gate_up, down):
    """Shapes do not depend on data: an expert has as many slots as it may take tokens; where all may go to
    one, whole blocks of rows."""
    if cpu.applies(x):
        return NotImplemented
    if pairs.capacity < len(x):
        return experts_by_slots(x, pairs, gate_up, down)
    if cpu.device_kind(x) == 'cpu' and not torch.compiler.is_compiling():
        return NotImplemented                                   # nothing waits there
    return experts_by_blocks(x, pairs, gate_up, down)


def swiglus(rows, gate_up, down):
    """rows (b, M, D) by matrices (b, 2I, D) and (b, D, I) → (b M, D)."""
    gate, up = torch.bmm(rows, gate_up.mT).chunk(2, -1)         # (b, M, I) each
    return torch.bmm(F.silu(gate) * up, down.mT).flatten(0, 1)


def experts_by_slots(x, pairs, gate_up, down):
    """An expert's first C pairs, as one product of C rows."""
    n, D = x.shape
    E = len(gate_up)
    C = pairs.capacity
    kept = pairs.rank < C                                       # (n k)
    slot = torch.where(kept, pairs.expert * C + pairs.rank, E * C)  # one more, for all that is dropped
    source = torch.arange(E * C + 1, device=x.device) % n       # an empty slot works for nobody
    source = source.scatter(0, slot, pairs.token)[:-1]
    y = swiglus(x.index_select(0, source).view(E, C, D), gate_up, down)
    return y.index_select(0, slot.clamp(max=E * C - 1)) * kept[:, None]  # (n k, D)


def experts_by_blocks(x, pairs, gate_up, down):
    """All pairs: an expert's rows are filled up to whole blocks, each a product with a copy of the expert's
    matrices (the blocks of MegaBlocks, Gale et al. 2022). How many blocks are in use depends on the data, how
    many there are does not: half of an even share each, they are E more than all rows fill."""
    n, D = x.shape
    E, n_pairs = len(gate_up), len(pairs.token)
    M = max(16, 1 << max(1, n_pairs // (2 * E)).bit_length() - 1)   # rows of a block
    blocks = n_pairs // M + E
    ends = (-(-pairs.counts // M)).cumsum(0)                    # (E) the block after each expert's last
    first = ends - -(-pairs.counts // M)
    slot = first[pairs.expert] * M + pairs.rank                 # (n k)
    source = torch.arange(blocks * M, device=x.device) % n      # an empty row works for nobody
    source = source.scatter(0, slot, pairs.token)
    expert = torch.searchsorted(ends, torch.arange(blocks, device=x.device), right=True).clamp(max=E - 1)
    rows = x.index_select(0, source).view(blocks, M, D)
    y = swiglus(rows, gate_up.index_select(0, expert), down.index_select(0, expert))
    return y.index_select(0, slot)
