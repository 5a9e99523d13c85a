"""Mamba-3's recurrence in PyTorch that runs on any machine: one pass by chunks, and B and C, which it has once a
head, in memory for one piece of the sequence at a time.

With γ_t = λ_t Δ_t, what a token's input counts in its own step, and w_t = (1 - λ_t) Δ_t, what it counts in the
next, the state with the next step's share already in it is a plain recurrence with a weight of its own:

    U_t = e^{a_t} U_{t-1} + s_t x_t k_tᵀ,   s_t = γ_t + w_{t+1},
    y_t = e^{a_t} U_{t-1} q_t + γ_t (q_t · k_t) x_t + D x_t,        k, q: B and C, with biases, turned

A piece is some chunks of Q tokens. Backward has the inputs and the states before the pieces, and makes each piece
again. Letters of the shapes: B batch, T time, H heads, G groups, P head size, N state size, R rank, A angles, L
tokens of a piece, c its chunks, Q tokens of a chunk, M = QR its rows.
"""
import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mambino.kernels import cpu
from mambino.kernels.registry import DEFINITIONS, kernel

# bytes of all heads' B in fp32 that a piece may have, if it is not one chunk; what is no CPU wants much to do at once
PIECE = {'cpu': 1 << 22}
PIECE_ELSEWHERE = 1 << 25


def trapezoid(dt, trap):
    """Δ and λ (B, T, H) → γ (B, T, H), s (B, T, H), w (B, H) of the first token."""
    own = trap * dt
    before = (1 - trap) * dt
    return own, own + F.pad(before[:, 1:], (0, 0, 0, 1)), before[:, 0]


def in_halves(v):
    """(…, N) with pairs (2i, 2i + 1) → the same with pairs (i, i + N/2)."""
    return v.unflatten(-1, (-1, 2)).mT.flatten(-2)


def in_pairs(v):
    """in_halves undone."""
    return v.unflatten(-1, (2, -1)).mT.flatten(-2)


def turned(v, cos, sin):
    """v (…, N), whose pairs (i, i + N/2), i < A, are turned by the angles of cos and sin (…, A)."""
    A = cos.shape[-1]
    first, second = v.chunk(2, -1)
    a, b = first[..., :A], second[..., :A]
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), first[..., A:],
                      torch.addcmul(b * cos, a, sin), second[..., A:]), -1)


def turning(v, grad, A):
    """The gradient of the angles of the first A pairs of v, from v's: (…, N) both → (…, A)."""
    (a, b), (grad_a, grad_b) = (u.unflatten(-1, (2, -1))[..., :A].unbind(-2) for u in (v, grad))
    return torch.addcmul(a * grad_b, b, grad_a, value=-1)


def by_heads(u, bias, Q):
    """u (B, L, R, G, N) and its bias (H, R, N) → their sum by heads and chunks, (B, H, c, Q, R, N) in fp32."""
    H, G = len(bias), u.shape[3]
    u = u.float().permute(0, 3, 1, 2, 4).unflatten(2, (-1, Q))[:, :, None]  # (B, G, 1, c, Q, R, N)
    return (u + bias.view(G, H // G, 1, 1, *bias.shape[1:])).flatten(1, 2)


# --- a piece --------------------------------------------------------------------------------------

class Piece:
    """What both passes make of a piece of L tokens, in chunks of Q; pairs are (i, i + N/2). Products are of dtype.

    x (B, L, H, P), B, C (B, L, R, G, N), dt, log_decay, own γ, s (B, L, H), rate (B, L, A), turn (B, H, A)"""

    def __init__(self, x, B, C, dt, log_decay, own, s, rate, B_bias, C_bias, D, mimo_x, turn, Q, dtype):
        self.R = B.shape[2]
        self.dtype = dtype
        # the sum of all turns, of which whole ones are dropped before it is rounded
        steps = rate[:, None].to(turn.dtype) * dt.mT[..., None]  # (B, H, L, A)
        turns = (turn[:, :, None] + steps.cumsum(2)) % math.tau
        self.turn = turns[:, :, -1].clone()
        angles = turns.float().unflatten(2, (-1, Q))[..., None, :]  # (B, H, c, Q, 1, A)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.b, self.c = by_heads(B, B_bias, Q), by_heads(C, C_bias, Q)  # (B, H, c, Q, R, N)
        self.k, self.q = (turned(u, self.cos, self.sin).flatten(3, 4).to(dtype) for u in (self.b, self.c))

        self.x = x.float().transpose(1, 2).unflatten(2, (-1, Q))[..., None, :]  # (B, H, c, Q, 1, P)
        rows = self.x if mimo_x is None else self.x * mimo_x[:, None, None]  # (B, H, c, Q, R, P)
        self.rows = rows.flatten(3, 4)                          # (B, H, c, M, P)
        log_decay, own, self.s = (u.mT.unflatten(2, (-1, Q)) for u in (log_decay, own, s))  # (B, H, c, Q)
        sums = log_decay.to(turn.dtype).cumsum(3)
        self.to_end = (sums[..., -1:] - sums).float().exp()
        self.from_start = sums.float().exp()
        # within a chunk: the decay to the tokens before, and what a token gives to itself
        i = torch.arange(Q, device=x.device)
        decay = (sums[..., :, None] - sums[..., None, :]).float()  # (B, H, c, Q, Q)
        self.decay = decay.masked_fill_(i[:, None] <= i, -math.inf).exp_()  # masked before exp: no NaN
        self.own = own
        self.weights = self.decay * self.s[..., None, :]
        self.D = D.view(-1, 1, 1, 1)

    def by_rows(self, u):
        """u (B, H, c, Q) → (B, H, c, M, 1)."""
        return u.repeat_interleave(self.R, -1)[..., None]

    def over_rows(self, u):
        """The sums of a token's rows: u (B, H, c, M) → (B, H, c, Q)."""
        return u.unflatten(-1, (-1, self.R)).sum(-1)

    def times(self, scores, weights):
        """scores (B, H, c, M, M) times weights (B, H, c, Q, Q)."""
        if self.R == 1:
            return scores * weights
        Q, R = weights.shape[-1], self.R
        return (scores.view(*weights.shape[:3], Q, R, Q, R) * weights[..., :, None, :, None]).view(scores.shape)

    def states(self, h):
        """h (B, H, P, N) → those before the chunks (B, H, c, P, N), and the one after."""
        added = ((self.rows * self.by_rows(self.to_end * self.s)).to(self.dtype).mT @ self.k).float()
        before = []
        for added_i, kept_i in zip(added.unbind(2), self.from_start[..., -1, None, None].unbind(2)):
            before.append(h)
            h = torch.addcmul(added_i, h, kept_i)
        return torch.stack(before, 2), h

    def forward(self, h):
        """→ y (B, H, c, M, P), h."""
        before, h = self.states(h)
        weights = self.weights.clone()
        weights.diagonal(0, -2, -1).copy_(self.own)
        weights = self.times(self.q @ self.k.mT, weights).to(self.dtype)  # (B, H, c, M, M)
        y = (weights @ self.rows.to(self.dtype)).float()
        past = (self.q @ before.to(self.dtype).mT).float()      # (B, H, c, M, P)
        return y.addcmul_(past, self.by_rows(self.from_start)).addcmul_(self.rows, self.D), h

    def backward(self, grad_y, grad_h, grad_turn, h):
        """grad_y (B, H, c, M, P), of the h and turn after the piece → of rows, log_decay, own, s, the steps' turns,
        b, c, D, the h and turn before."""
        dtype, R, A = self.dtype, self.R, self.cos.shape[-1]
        before, last = self.states(h)
        k, q, rows = self.k, self.q, self.rows
        grad_out = grad_y.to(dtype)
        grad_past = (grad_y * self.by_rows(self.from_start)).to(dtype)
        rounded = before.to(dtype)

        # the states, from the last to the first
        grads = (grad_past.mT @ q).float()                      # (B, H, c, P, N)
        after = []
        grad_end = grad_h
        for grad_i, kept_i in zip(reversed(grads.unbind(2)), reversed(self.from_start[..., -1, None, None].unbind(2))):
            after.append(grad_h)
            grad_h = torch.addcmul(grad_i, grad_h, kept_i)
        after = torch.stack(after[::-1], 2)                     # of the state after each chunk
        of_added = after.to(dtype)
        at_end = self.to_end * self.s
        grad_at_end = (k @ of_added.mT).float()                 # (B, H, c, M, P)
        to_state = self.over_rows((grad_at_end * rows).sum(-1))  # (B, H, c, Q)
        grad_rows = grad_at_end * self.by_rows(at_end) + self.D * grad_y
        grad_s = to_state * self.to_end
        grad_sums = -to_state * at_end
        kept = (after * before).sum((-2, -1)) * self.from_start[..., -1]  # (B, H, c)

        # within chunks; what is of a token and itself has no turn
        scores = q @ k.mT
        weights = self.weights.clone()
        weights.diagonal(0, -2, -1).copy_(self.own)
        grad_rows += self.times(scores, weights).to(dtype).mT @ grad_out
        grad_weights = (grad_out @ rows.to(dtype).mT).float()   # (B, H, c, M, M)
        grad_scores = self.times(grad_weights, self.weights).to(dtype)
        grad_q = (grad_scores @ k).float()
        grad_k = (grad_scores.mT @ q).float()
        blocks = grad_weights.unflatten(-1, (-1, R)).unflatten(-3, (-1, R))  # (B, H, c, Q, R, Q, R)
        own_blocks = blocks.diagonal(0, 3, 5).movedim(-1, 3) * self.own[..., None, None]  # (B, H, c, Q, R, R)
        both = (grad_weights * scores).unflatten(-1, (-1, R)).sum(-1).unflatten(-2, (-1, R)).sum(-2)
        grad_own = both.diagonal(0, -2, -1).clone()
        both *= self.decay                                      # (B, H, c, Q, Q)
        by_column = both.sum(-2)
        grad_s += by_column
        grad_sums += (both @ self.s[..., None])[..., 0] - by_column * self.s

        # from the states before
        of_past = (grad_past @ rounded).float()                 # (B, H, c, M, N)
        grad_sums += self.over_rows((of_past * q).sum(-1))
        grad_q += of_past
        grad_k += ((rows * self.by_rows(at_end)).to(dtype) @ of_added).float()

        grad_sums[..., -1] += kept + (to_state * at_end).sum(-1)
        grad_decay = grad_sums.flip(-1).cumsum(-1).flip(-1)
        # all turns from a token on: from a chunk's start on by what they do to states, within the chunk less those
        # of the tokens before. A sum over all tokens would gather the rounding of all, which no step forgets
        turns = [turning(u, grad, A).unflatten(3, (-1, R)).sum(4) for u, grad in ((q, grad_q), (k, grad_k))]
        turns = turns[0] + turns[1]                             # (B, H, c, Q, A)
        of_states = torch.cat((grad_h[:, :, None], after[:, :, :-1]), 2)  # of those before the chunks
        at_end_of_all = grad_turn + turning(last, grad_end, A).sum(-2)
        from_start = at_end_of_all[:, :, None] - turning(before, of_states, A).sum(-2)
        turns = from_start[..., None, :] - (turns.cumsum(3) - turns)
        grad_turn = from_start[:, :, 0].clone()                 # of the strides that a compiler is told
        grad_c, grad_b = (turned(u.unflatten(3, (-1, R)), self.cos, -self.sin) for u in (grad_q, grad_k))
        grad_c += own_blocks @ self.b
        grad_b += own_blocks.mT @ self.c
        return (grad_rows, grad_decay, grad_own, grad_s, turns, grad_b, grad_c,
                (grad_y * rows).sum((0, 2, 3, 4)), grad_h, grad_turn)


# --- all pieces -----------------------------------------------------------------------------------

def cuts(x, B, chunk_size):
    """[(first token, token after the last, Q)] of the pieces: of whole chunks, and the rest as one of its own."""
    T, H = x.shape[1:3]
    R, N = B.shape[2], B.shape[4]
    Q = max(1, chunk_size // R)
    limit = PIECE.get(cpu.device_kind(x), PIECE_ELSEWHERE)
    L = max(1, limit // (4 * len(x) * Q * R * H * N)) * Q
    whole = T - T % Q
    spans = [(begin, min(whole, begin + L), Q) for begin in range(0, whole, L)]
    return spans + [(whole, T, T - whole)] if whole < T else spans


def scan_forward(x, B, C, dt, log_decay, own, s, rate, B_bias, C_bias, D, mimo_x, h, turn, chunk_size, dtype):
    """→ y (B, T, R, H, P), the last h and turn, and those before each piece, (pieces, …)."""
    spans = cuts(x, B, chunk_size)
    R = B.shape[2]
    y = x.new_empty(*x.shape[:2], R, *x.shape[2:], dtype=torch.float32)
    starts = h.new_empty(len(spans), *h.shape)
    turns = turn.new_empty(len(spans), *turn.shape)
    with torch.autocast(x.device.type, enabled=False):
        for i, (begin, end, Q) in enumerate(spans):
            starts[i], turns[i] = h, turn
            part = (u[:, begin:end] for u in (x, B, C, dt, log_decay, own, s, rate))
            piece = Piece(*part, B_bias, C_bias, D, mimo_x, turn, Q, dtype)
            part, h = piece.forward(h)
            turn = piece.turn
            y[:, begin:end] = part.flatten(2, 3).unflatten(2, (-1, R)).permute(0, 2, 3, 1, 4)
    return y, h, turn, starts, turns


def scan_backward(grad_y, grad_h, grad_turn, x, B, C, dt, log_decay, own, s, rate, B_bias, C_bias, D, mimo_x, starts,
                  turns, chunk_size, dtype):
    """The gradients of what the recurrence is given, from x to turn."""
    inputs = x, B, C, dt, log_decay, own, s, rate
    R, G = B.shape[2:4]
    grads = [torch.empty_like(u) for u in inputs]
    grad_B_bias, grad_C_bias, grad_D = (torch.zeros_like(u) for u in (B_bias, C_bias, D))
    grad_mimo_x = None if mimo_x is None else torch.zeros_like(mimo_x)
    with torch.autocast(x.device.type, enabled=False):
        for i, (begin, end, Q) in reversed([*enumerate(cuts(x, B, chunk_size))]):
            part = [u[:, begin:end] for u in inputs]
            piece = Piece(*part, B_bias, C_bias, D, mimo_x, turns[i], Q, dtype)
            rows = grad_y[:, begin:end].permute(0, 3, 1, 2, 4)  # (B, H, L, R, P)
            rows = rows.float().flatten(2, 3).unflatten(2, (-1, Q * R))  # (B, H, c, M, P)
            of_rows, of_decay, of_own, of_s, of_steps, of_b, of_c, of_D, grad_h, grad_turn = piece.backward(
                rows, grad_h, grad_turn, starts[i])
            grad_D += of_D
            of_rows = of_rows.unflatten(3, (-1, R))             # (B, H, c, Q, R, P)
            if mimo_x is not None:
                grad_mimo_x += (of_rows * piece.x).sum((0, 2, 3))
                of_rows = of_rows * mimo_x[:, None, None]
            of_x = of_rows.sum(4).flatten(2, 3).transpose(1, 2)  # (B, L, H, P)
            grad_B_bias += of_b.sum((0, 2, 3))
            grad_C_bias += of_c.sum((0, 2, 3))
            of_b, of_c = (u.unflatten(1, (G, -1)).sum(2).flatten(2, 3).permute(0, 2, 3, 1, 4) for u in (of_b, of_c))
            of_steps = of_steps.flatten(2, 3).float()           # (B, H, L, A)
            of_rate = (of_steps * part[3].mT[..., None]).sum(1)  # (B, L, A)
            of_dt = (of_steps * part[7][:, None]).sum(-1).mT    # (B, L, H)
            of_decay, of_own, of_s = (u.flatten(2).mT for u in (of_decay, of_own, of_s))
            for grad, made in zip(grads, (of_x, of_b, of_c, of_dt, of_decay, of_own, of_s, of_rate)):
                grad[:, begin:end] = made
    return *grads, grad_B_bias, grad_C_bias, grad_D, grad_mimo_x, grad_h, grad_turn


class Scan(Function):

    @staticmethod
    def forward(ctx, *args):
        *inputs, _, _, chunk_size, dtype = args
        y, h, turn, starts, turns = scan_forward(*args)
        ctx.save_for_backward(*inputs, starts, turns)
        ctx.options = chunk_size, dtype
        return y, h, turn

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h, grad_turn):
        return *scan_backward(grad_y, grad_h, grad_turn, *ctx.saved_tensors, *ctx.options), None, None


# --- to a compiler: one operation, whose pieces it would unroll -----------------------------------

INPUTS = ('Tensor x, Tensor B, Tensor C, Tensor dt, Tensor log_decay, Tensor own, Tensor s, Tensor rate, '
          'Tensor B_bias, Tensor C_bias, Tensor D, Tensor? mimo_x')
OPTIONS = 'int chunk_size, ScalarType dtype'
scan_operation = torch.library.custom_op(
    'mambino::mamba3_scan', scan_forward, mutates_args=(),
    schema=f'({INPUTS}, Tensor h, Tensor turn, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)')
backward_operation = torch.library.custom_op(
    'mambino::mamba3_scan_backward', lambda *args: [u for u in scan_backward(*args) if u is not None], mutates_args=(),
    schema=f'(Tensor grad_y, Tensor grad_h, Tensor grad_turn, {INPUTS}, Tensor starts, Tensor turns, {OPTIONS}) '
           '-> Tensor[]')


@scan_operation.register_fake
def scan_shapes(x, B, C, dt, log_decay, own, s, rate, B_bias, C_bias, D, mimo_x, h, turn, chunk_size, dtype):
    n = len(cuts(x, B, chunk_size))
    y = x.new_empty(*x.shape[:2], B.shape[2], *x.shape[2:], dtype=torch.float32)
    return y, torch.empty_like(h), torch.empty_like(turn), h.new_empty(n, *h.shape), turn.new_empty(n, *turn.shape)


@backward_operation.register_fake
def backward_shapes(grad_y, grad_h, grad_turn, *args):
    *inputs, starts, turns, _, _ = args
    return [torch.empty_like(u) for u in (*inputs, starts[0], turns[0]) if u is not None]


def save(ctx, inputs, output):
    *tensors, _, _, chunk_size, dtype = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.options = chunk_size, dtype


def differentiate(ctx, grad_y, grad_h, grad_turn, *_):
    saved = ctx.saved_tensors                                   # which a checkpoint gives once
    grads = backward_operation(grad_y, grad_h, grad_turn, *saved, *ctx.options)
    if saved[11] is None:                                       # mimo_x
        grads.insert(11, None)
    return *grads, None, None


scan_operation.register_autograd(differentiate, setup_context=save)


# --- the operation --------------------------------------------------------------------------------

def product_dtype(x):
    """The precision of products of x: autocast's, or x's own."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


@kernel
def mamba3_scan(x, B, C, dt, log_decay, trap, rate, B_bias, C_bias, D, mimo_x=None, interleaved=True,
                chunk_size=64, state=None):
    batch, T, H, P = x.shape
    R, _, N = B.shape[2:]
    if mimo_x is None and R > 1:
        mimo_x = D.new_ones(H, R, P)
    dtype = product_dtype(x)
    h, turn, last_b, last_x = state or (None, None, None, None)
    if interleaved:                                             # to q · k the order of channels is all one
        B, C, B_bias, C_bias = (in_halves(u) for u in (B, C, B_bias, C_bias))
        h, last_b = (u if u is None else in_halves(u) for u in (h, last_b))
    own, s, w = trapezoid(dt, trap)
    h = dt.new_zeros(batch, H, P, N) if h is None else h.float()
    if last_b is None:
        turn = dt.new_zeros(batch, H, rate.shape[-1], dtype=cpu.exact_dtype(cpu.device_kind(dt)))
    else:
        turn = turn.to(cpu.exact_dtype(cpu.device_kind(turn)))
        last_x = last_x.float()[:, None]                        # (B, 1, H, P)
        if mimo_x is not None:
            last_x = last_x * mimo_x.transpose(0, 1)            # (B, R, H, P)
        with torch.autocast(x.device.type, enabled=False):
            added = last_x.permute(0, 2, 3, 1) @ last_b.float().transpose(1, 2)  # (B, H, P, N)
        h = torch.addcmul(h, added, w[..., None, None])
    args = x, B, C, dt, log_decay, own, s, rate, B_bias, C_bias, D, mimo_x, h, turn, chunk_size, dtype
    if torch.compiler.is_compiling():
        y, h, turn = scan_operation(*args)[:3]
    else:
        y, h, turn = cpu.compute(Scan, *args)
    angles = turn.float()
    last_b = by_heads(B[:, -1:], B_bias, 1)[:, :, 0, 0].transpose(1, 2)  # (B, R, H, N)
    last_b = turned(last_b, angles.cos()[:, None], angles.sin()[:, None])
    if interleaved:
        h, last_b = in_pairs(h), in_pairs(last_b)
    return y, (h, turn, last_b, x[:, -1].float().clone())


# --- the gate -------------------------------------------------------------------------------------

class GatedHeads(Function):
    """The definition, of which backward has what went in alone, and makes the rest again."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, eps = args
        ctx.save_for_backward(*tensors)
        ctx.eps = eps
        return DEFINITIONS['gated_heads'](*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = [u if u is None else u.detach().requires_grad_() for u in ctx.saved_tensors]
        leaves = [u for u in tensors if u is not None]
        with torch.enable_grad():
            out = DEFINITIONS['gated_heads'](*tensors, ctx.eps)
        grads = iter(torch.autograd.grad(out, leaves, grad))
        return *(u if u is None else next(grads) for u in tensors), None


@kernel
def gated_heads(y, z, mimo_z=None, mimo_o=None, norm=None, eps=1e-5):
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return NotImplemented
    return GatedHeads.apply(y, z, mimo_z, mimo_o, norm, eps)
