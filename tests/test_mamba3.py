"""Mamba-3's recurrence against its own definition's other form, in float64: a state that turns itself, one token
after another. By native.cpp, by PyTorch anywhere, and as model_mamba.py defines it."""
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import assert_close, assert_same, random_dt

from mambino.language_model import gated_heads
from model_mamba import mamba3_scan, ssd

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")
every_way = pytest.mark.usefixtures("way")


def paired(v, interleaved):
    """v (…, N) as (…, N/2) complex numbers, of the channels that are turned together."""
    v = v.unflatten(-1, (-1, 2)) if interleaved else v.unflatten(-1, (2, -1)).transpose(-1, -2)
    return torch.complex(*v.unbind(-1))


def apart(z, interleaved):
    """paired, undone."""
    v = torch.view_as_real(z)
    return (v if interleaved else v.transpose(-1, -2)).flatten(-2)


def turns_of(angles, half):
    """angles (…, A) → (…, half) complex numbers of length 1; those beyond A are 1."""
    angles = F.pad(angles, (0, half - angles.shape[-1]))
    return torch.polar(torch.ones_like(angles), angles)


def recurrence(interleaved, x, B, C, dt, log_decay, trap, rate, B_bias, C_bias, D, mimo_x, state=None):
    """h_t = exp(a_t) R_t (h_{t-1} + (1 - λ_t) dt_t x_{t-1} b_{t-1}) + λ_t dt_t x_t b_t, y_t = h_t c_t + D x_t: h turns,
    by -rate dt, B and C never. mamba3_scan keeps h, and the last b, turned on by all turns so far."""
    batch, T, H, P = x.shape
    repeats, half = H // B.shape[3], B.shape[-1] // 2
    b, c = (paired(u.repeat_interleave(repeats, 3) + bias.transpose(0, 1), interleaved)
            for u, bias in ((B, B_bias), (C, C_bias)))          # (B, T, R, H, N/2)
    xs = x[:, :, None] * mimo_x.transpose(0, 1)                 # (B, T, R, H, P)
    now = torch.einsum("btrhp,btrhn->bthpn", xs.to(b), b)       # (B, T, H, P, N/2)
    turn = rate.new_zeros(batch, H, rate.shape[-1])
    h = last = torch.zeros_like(now[:, 0])
    if state is not None:
        h, turn, last_b, last_x = state
        h = paired(h, interleaved) * turns_of(-turn, half)[:, :, None]
        last_b = paired(last_b, interleaved) * turns_of(-turn, half)[:, None]
        last = torch.einsum("bhp,hrp,brhn->bhpn", last_x.to(b), mimo_x.to(b), last_b)
    delta = rate[:, :, None] * dt[..., None]                    # (B, T, H, A)
    kept = log_decay.exp()[..., None, None] * turns_of(-delta, half)[:, :, :, None]
    before = torch.cat((last[:, None], now[:, :-1]), 1)
    added = kept * ((1 - trap) * dt)[..., None, None] * before + (trap * dt)[..., None, None] * now
    hs = []
    for t in range(T):
        h = kept[:, t] * h + added[:, t]
        hs.append(h)
    y = torch.einsum("bthpn,btrhn->btrhp", torch.stack(hs, 1), c.conj()).real + D[:, None] * xs
    turn = turn + delta.sum(1)
    h = apart(h * turns_of(turn, half)[:, :, None], interleaved)
    k = apart(b[:, -1] * turns_of(turn, half)[:, None], interleaved)
    return y, (h, turn, k, x[:, -1])


def flat(y, state):
    """Outputs to compare: of a turn, where it points to."""
    h, turn, last_b, last_x = state
    return y, h, turn.cos().to(h), turn.sin().to(h), last_b, last_x


def inputs_of(kind, batch, T, H, G, R, P, N, A):
    dt = random_dt(kind, (batch, T, H))
    decay = torch.empty(H).uniform_(0.01, 16)
    decay[0] = 16.0
    return [
        torch.randn(batch, T, H, P),
        torch.randn(batch, T, R, G, N),
        torch.randn(batch, T, R, G, N),
        dt,
        -dt * decay,
        torch.rand(batch, T, H),
        torch.empty(batch, T, A).uniform_(-math.pi, math.pi),
        torch.randn(H, R, N) * 0.3 + 1,
        torch.randn(H, R, N) * 0.3 + 1,
        torch.randn(H),
        torch.randn(H, R, P),
    ]


def state_of(batch, H, R, P, N, A):
    return [torch.randn(batch, H, P, N), torch.rand(batch, H, A) * 6, torch.randn(batch, R, H, N),
            torch.randn(batch, H, P)]


SIZES = [  # threads, batch, T, H, G, R, P, N, A, Q
    (1, 2, 1, 4, 1, 1, 16, 32, 8, 64),
    (2, 1, 37, 4, 2, 1, 32, 64, 16, 16),
    (1, 1, 131, 2, 2, 1, 64, 32, 16, 32),
    (1, 2, 1, 2, 1, 4, 32, 32, 8, 64),
    (3, 2, 37, 2, 1, 4, 32, 32, 16, 64),
    (2, 1, 37, 4, 2, 2, 16, 64, 5, 32),
    (1, 1, 37, 2, 1, 3, 16, 32, 3, 33),
]
sizes = pytest.mark.parametrize("threads, batch, T, H, G, R, P, N, A, Q", SIZES)
kinds = pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
NO_STATE = (None,) * 4


def scan(interleaved, *inputs, chunk_size=32):
    """mamba3_scan of inputs_of, and maybe of state_of."""
    return mamba3_scan(*inputs[:11], interleaved, chunk_size, inputs[11:] or NO_STATE)


@every_way
@kinds
@pytest.mark.parametrize("through", ["both", "y, no state given"])
@sizes
def test_mamba3_scan(threads, batch, T, H, G, R, P, N, A, Q, kind, through):
    torch.set_num_threads(threads)
    interleaved = (T + R) % 2 == 0
    inputs = inputs_of(kind, batch, T, H, G, R, P, N, A)
    if through == "both":
        inputs += state_of(batch, H, R, P, N, A)
    turns = {i: inputs[i] for i in (6, 12) if i < len(inputs)}  # their gradients: below

    def outputs(function, leaves):
        leaves = iter(leaves)
        dtype = torch.float32 if function is scan else torch.float64
        args = [turns[i].to(dtype) if i in turns else next(leaves) for i in range(len(inputs))]
        if function is scan:
            results = flat(*scan(interleaved, *args, chunk_size=Q))
        else:
            results = flat(*recurrence(interleaved, *args[:11], args[11:] or None))
        return results if through == "both" else results[:1]

    assert_same(lambda *leaves: outputs(scan, leaves), lambda *leaves: outputs(recurrence, leaves),
                [u for i, u in enumerate(inputs) if i not in turns])


@every_way
@kinds
@pytest.mark.parametrize("T, R", [(1, 1), (37, 2), (131, 1)])
def test_gradients_of_turns(T, R, kind):
    """They are differences of sums over all tokens, and those of rates dt times that: so is their error."""
    batch, H, G, P, N, A = 2, 4, 2, 16, 32, 8
    inputs = inputs_of(kind, batch, T, H, G, R, P, N, A) + state_of(batch, H, R, P, N, A)
    weights = torch.randn(batch, T, R, H, P)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [u.to(dtype, copy=True).requires_grad_() for u in inputs]
        if dtype == torch.float32:
            y, state = scan(True, *leaves)
        else:
            y, state = recurrence(True, *leaves[:11], leaves[11:])
        loss = (y * weights).sum() + (state[1].cos() * weights[0, 0, 0, 0, 0]).sum()
        grads.append(torch.autograd.grad(loss, [leaves[6], leaves[12], leaves[2]]))
    (rates, turns, _), (want_rates, want_turns, grad_C) = grads
    terms = (grad_C.norm(dim=-1) * (inputs[2].norm(dim=-1) + N ** 0.5)).max().item()
    assert_close(turns, want_turns.float(), 1e-5 * terms)
    assert_close(rates, want_rates.float(), 1e-5 * terms * inputs[3].max().item())


# --- what follows from it

def usual(T, R=1, G=1, batch=2, H=4, P=16, N=32, A=8):
    return inputs_of("usual", batch, T, H, G, R, P, N, A)


@every_way
@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("cuts", [[1, 1, 1, 50], [17, 36], [33, 3, 16, 1]])
def test_cut_anywhere_and_continued(cuts, R):
    inputs = usual(sum(cuts), R)
    y, last = scan(R == 1, *inputs)
    state = NO_STATE
    ys = []
    for part in range(len(cuts)):
        tokens = slice(sum(cuts[:part]), sum(cuts[:part + 1]))
        part_y, state = scan(R == 1, *(u[:, tokens] for u in inputs[:7]), *inputs[7:], *state)
        ys.append(part_y)
    for got, want in zip(flat(torch.cat(ys, 1), state), flat(y, last)):
        assert_close(got, want, 1e-5 * want.abs().max().item())


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_a_state_is_continued_in_fp32_within_autocast(way):
    inputs = usual(5, R=2) + state_of(2, 4, 2, 16, 32, 8)
    want = flat(*scan(False, *inputs))
    with torch.autocast("cpu", torch.bfloat16):
        got = flat(*scan(False, *inputs))
    for u, v in zip(got, want):
        assert torch.equal(u, v)


@every_way
@pytest.mark.parametrize("R", [1, 2, 4])
def test_a_token_says_nothing_of_the_next(R):
    """Not by a bit: nothing that a later token gives is added and taken away again."""
    inputs = usual(40, R)
    changed = [u.clone() for u in inputs]
    for u, other in zip(changed[:7], usual(40, R)[:7]):
        u[:, 21:] = other[:, 21:]
    y, other = (scan(R == 1, *each)[0] for each in (inputs, changed))
    assert torch.equal(y[:, :21], other[:, :21]) and not torch.equal(y[:, 21:], other[:, 21:])


@every_way
def test_without_turns_it_is_ssd_twice_and_of_one_sided_steps_once():
    x, B, C, dt, _, trap, rate, B_bias, C_bias, D, _ = usual(70, G=2)
    A = -torch.empty(4).uniform_(0.1, 8)
    b, c = (u[:, :, 0].repeat_interleave(2, 2) + bias[:, 0] for u, bias in ((B, B_bias), (C, C_bias)))  # (B, T, H, N)

    def ssd_of(x, weight, b):
        """ssd of float64, whose step is input's weight and decay in one: the weight goes into x."""
        x, weight, b = (u.double() for u in (x, weight, b))
        y, _ = ssd.definition(x * (weight / dt)[..., None], dt.double(), A.double(), b, c.double(), 32)
        return y

    before = [F.pad(u[:, :-1], (0, 0, 0, 0, 1, 0)) for u in (x, b)]
    skip = D[:, None] * x
    for part in (trap, torch.ones_like(trap)):
        y, _ = mamba3_scan(x, B, C, dt, dt * A, part, rate * 0, B_bias, C_bias, D, None, True, 32, NO_STATE)
        want = ssd_of(x, part * dt, b) + ssd_of(before[0], (1 - part) * dt * torch.exp(dt * A), before[1]) + skip
        assert_close(y[:, :, 0].double(), want, 1e-5 * want.abs().max().item())


@every_way
def test_pairs_side_by_side_are_pairs_of_halves_after_a_permutation():
    inputs = usual(37)
    order = torch.arange(32).view(16, 2).t().flatten()          # even channels, then odd ones
    permuted = [u[..., order] if i in (1, 2, 7, 8) else u for i, u in enumerate(inputs)]
    (y, state), (want, want_state) = scan(False, *permuted), scan(True, *inputs)
    assert_close(y, want, 1e-5 * want.abs().max().item())
    for i in (0, 2):
        assert_close(state[i], want_state[i][..., order], 1e-5 * want_state[i].abs().max().item())


@every_way
def test_turns_add_up_over_a_long_text(way):
    """Where they are fp32, 100,000 tokens lose them."""
    T = 500 if way == "defined" else 100_000
    inputs = usual(T, batch=1, H=2, P=16)
    inputs[3] = inputs[3] * 10                                  # of up to a half turn
    with torch.no_grad():
        turn = scan(True, *inputs, chunk_size=64)[1][1]
    want = (inputs[6].double()[:, :, None] * inputs[3].double()[..., None]).sum(1)
    assert_close(turn.cos(), want.cos(), 1e-9)
    assert_close(turn.sin(), want.sin(), 1e-9)


# --- the gate

@every_way
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("R, P", [(1, 16), (1, 48), (4, 16), (2, 12)])
def test_gated_heads(R, P, normed):
    torch.set_num_threads(2)
    B, T, H = 2, 5, 3
    inputs = [torch.randn(B, T, R, H, P), torch.randn(B, T, 2 * H, P)]
    inputs += [torch.randn(H, R, P) for _ in "zo"] * (R > 1) + [torch.rand(H * P) + 0.5] * normed

    def scales(rest):
        return (rest[0], rest[1]) if R > 1 else (None, None), rest[-1] if normed else None

    def run(y, z, *rest):
        (mimo_z, mimo_o), norm = scales(rest)
        return [gated_heads(y, z[:, :, H:], mimo_z, mimo_o, norm, 1e-3)]

    def reference(y, z, *rest):
        (mimo_z, mimo_o), norm = scales(rest)
        total = 0
        for r in range(R):
            u, gate = y[:, :, r], z[:, :, H:]
            if normed:
                u = u / (u.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.view(H, P)
            if R > 1:
                u, gate = u * mimo_o[:, r], gate * mimo_z[:, r]
            total = total + u * gate * torch.sigmoid(gate)
        return [total.flatten(2)]

    assert_same(run, reference, inputs)
