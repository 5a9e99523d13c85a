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

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels import cpu, cpu_mamba
from mambino.kernels.checked import constant
from mambino.kernels.registry import kernel
from mambino.kernels.scans import portable_scan


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
        if mask is not None and 1 < len(mask) < len(q):
            mask = mask.repeat_interleave(len(q) // len(mask), 0)
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
    # are taken in fp64; on a card, to which that is slow, where the products are exact enough to show it.
    exact = cpu.exact_dtype(cpu.device_kind(x))
    sums = (dt.to(exact) * A.to(exact)).cumsum(2).transpose(2, 3)  # (B, c, H, Q)
    if cpu.device_kind(x) == 'cuda' and x.dtype in (torch.bfloat16, torch.float16):
        sums = sums.float()
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
    # unbound: an index would have a gradient as large as all chunks, for each of them
    for added_i, kept_i in zip(added.unbind(1), kept.unbind(1)):
        starts.append(h)
        h = torch.addcmul(added_i, h, kept_i)
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
    """The cross-entropies (n) of logits (n, V), in nats; the logits become their gradient, softmax less
    one-hot. Where a target is below 0, both are 0."""
    if cpu.applies(logits):
        return cpu.cross_entropy_(logits, targets)
    valid = (targets >= 0)[:, None]
    index = targets.clamp(min=0)[:, None]
    if torch.compiler.is_compiling() and cpu.device_kind(logits) != 'cpu':
        # each element by itself, so that a compiler reads the logits twice and writes the gradient, no more
        chosen = torch.arange(logits.shape[1], device=logits.device) == index
        logsumexp = logits.logsumexp(-1, keepdim=True)
        losses = torch.where(valid, logsumexp - torch.where(chosen, logits, 0).sum(-1, keepdim=True), 0)
        logits.copy_(((logits - logsumexp).exp() - chosen.float()) * valid)
        return losses[:, 0]
    p = torch.log_softmax(logits, -1)
    losses = -torch.where(valid, p.gather(1, index), 0)
    p.exp_().scatter_add_(1, index, torch.full_like(p[:, :1], -1))
    torch.mul(p, valid, out=logits)
    return losses[:, 0]


class LinearCrossEntropy(Function):
    """Cross-entropy of x @ weight.T in chunks of tokens, each chunk's gradient made with its loss.

    So the (tokens, V) logits never exist at once, and nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, factors, chunk):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wants_grad = any(ctx.needs_input_grad)
        wants_weight = ctx.needs_input_grad[1]  # under an adapter the weight is frozen
        count = (targets >= 0).sum().clamp(min=1) if factors is None else torch.ones((), device=x.device)
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
                losses = cross_entropy_(logits, targets[i:i + chunk])
                if factors is not None:
                    losses = losses * factors[i:i + chunk]
                total += losses.sum()
                if not wants_grad:
                    continue
                if factors is not None:
                    logits *= factors[i:i + chunk, None]
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
        return grad_x.to(ctx.dtype) * scale, grad_weight, None, None, None


@constant
def loss_chunk(V, kind='cpu'):
    """Tokens whose logits are alive at once. On a CPU a thousand; fewer where V is huge (256 MB of
    logits), more where it is small. A card has them in fp32 in a 64th of its memory, 1 GB at most:
    each chunk reads and writes the gradient of the head."""
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
def linear_cross_entropy(x, weight, targets, factors=None, chunk=0):
    """chunk: tokens whose logits are alive at once; 0: as loss_chunk says."""
    chunk = chunk or loss_chunk(len(weight), cpu.device_kind(x))
    factors = None if factors is None else factors.flatten()
    return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), factors, chunk)


# --- experts --------------------------------------------------------------------------------------

@kernel
def experts_swiglu(x, pairs, gate_up, down):
    """Shapes do not depend on data: an expert has as many slots as it may take tokens; where all
    may go to one, whole blocks of rows."""
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
    E = len(gate_up)
    rows, slot = into_slots(x, pairs, E)
    y = swiglus(rows.view(E, pairs.capacity, -1), gate_up, down)
    return out_of_slots(y, slot)


def into_slots(x, pairs, E):
    """x (n, D) → (E C, D), the tokens of each expert's first C pairs; (n k), the slot of each pair,
    E C for what is dropped."""
    C = pairs.capacity
    slot = torch.where(pairs.rank < C, pairs.expert * C + pairs.rank, E * C)
    source = torch.arange(E * C + 1, device=x.device) % len(x)  # an empty slot works for nobody
    source = source.scatter(0, slot, pairs.token)[:-1]
    return x.index_select(0, source), slot


def out_of_slots(y, slot):
    """What was made of them, (E C, D) → (n k, D), zeros for what is dropped."""
    return y.index_select(0, slot.clamp(max=len(y) - 1)) * (slot < len(y))[:, None]


def experts_by_blocks(x, pairs, gate_up, down):
    """All pairs: an expert's rows are filled up to whole blocks, each a product with a copy of the
    expert's matrices (the blocks of MegaBlocks, Gale et al. 2022). How many blocks are in use
    depends on the data, how many there are does not: half of an even share each, they are E more
    than all rows fill."""
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
