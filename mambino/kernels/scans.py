"""A Mamba-1's recurrence in PyTorch, with its backward pass by hand, as one operation to a compiler.

    portable_scan(x, dt, A, B, C, state) → y, the last state    # all in fp32 and contiguous

Letters of the shapes: B batch, T time, E inner width, N state size.
"""
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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


class SelectiveScan(Function):

    @staticmethod
    def forward(ctx, x, dt, A, B, C, state):
        y, state, starts = scan_forward(x, dt, A, B, C, state)
        ctx.save_for_backward(x, dt, A, B, C, starts)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        return scan_backward(grad_y, grad_state, *ctx.saved_tensors)


# --- to a compiler: one operation, whose steps it would unroll for hours --------------------------

INPUTS = 'Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C'
scan_operation = torch.library.custom_op(
    'mambino::selective_scan', scan_forward, mutates_args=(),
    schema=f'({INPUTS}, Tensor state) -> (Tensor, Tensor, Tensor)')
backward_operation = torch.library.custom_op(
    'mambino::selective_scan_backward', scan_backward, mutates_args=(),
    schema=f'(Tensor grad_y, Tensor grad_state, {INPUTS}, Tensor starts) '
           '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')


@scan_operation.register_fake
def scan_shapes(x, dt, A, B, C, state):
    starts = state.new_empty(-(-x.shape[1] // STEPS) + 1, *state.shape)
    return torch.empty_like(x), torch.empty_like(state), starts


@backward_operation.register_fake
def backward_shapes(grad_y, grad_state, x, dt, A, B, C, starts):
    grad_A = A.t().new_empty(A.t().shape).t()
    return *(torch.empty_like(u) for u in (x, dt)), grad_A, *(torch.empty_like(u) for u in (B, C, starts[0]))


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[2])


def differentiate(ctx, grad_y, grad_state, _):
    saved = ctx.saved_tensors                                   # which a checkpoint gives once
    x, starts = saved[0], saved[-1]
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
    grad_state = torch.zeros_like(starts[0]) if grad_state is None else grad_state
    return backward_operation(grad_y, grad_state, *saved)


scan_operation.register_autograd(differentiate, setup_context=save)


def portable_scan(x, dt, A, B, C, state):
    """→ y, the last state. All in fp32 and contiguous."""
    if torch.compiler.is_compiling():
        return scan_operation(x, dt, A, B, C, state)[:2]
    return SelectiveScan.apply(x, dt, A, B, C, state)
