"""What PyTorch's own way through Mamba-3's scan promises beside its numbers (test_mamba3.py): little memory, no token
that sees the next, the same within torch.compile, one token in place."""
import math

import pytest
import torch
from helpers.models import assert_close, random_dt
from torch._subclasses import FakeTensorMode

from mambino.kernels import anywhere_mamba3, cpu_mamba3, native, one_token, registry
from mambino.kernels.cpu import portable
from mambino.language_model import gated_heads
from mambino.train.counting import LiveBytes
from model_mamba import mamba3_scan

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')
H, P, N, A = 4, 16, 32, 8


def inputs(T, R=1, batch=2, G=2, H=H):
    dt = random_dt('usual', (batch, T, H))
    return [torch.randn(batch, T, H, P), torch.randn(batch, T, R, G, N), torch.randn(batch, T, R, G, N), dt,
            -dt * torch.rand(H) * 16, torch.rand(batch, T, H), torch.empty(batch, T, A).uniform_(-math.pi, math.pi),
            torch.randn(H, R, N), torch.randn(H, R, N), torch.randn(H), torch.randn(H, R, P)]


def scan(*args, state=None, operation=mamba3_scan, interleaved=True):
    with portable():
        return operation(*args, interleaved, 16, state or (None,) * 4)


@pytest.mark.parametrize('R', [1, 3])
def test_no_token_sees_the_next(R):
    """Bit for bit, also where a chunk ends."""
    args = inputs(37, R)
    y, _ = scan(*args)
    for t in (16, 21, 36):
        changed = [u.clone() if u.shape[:2] == (2, 37) else u for u in args]
        for u in changed[:7]:
            u[:, t] = u[:, t] * 0.5
        again, _ = scan(*changed)
        assert torch.equal(again[:, :t], y[:, :t]) and not torch.equal(again[:, t], y[:, t])


@pytest.mark.parametrize('R', [1, 2])
def test_a_sequence_in_pieces_and_in_parts(R, monkeypatch):
    """Pieces of the kernel, of one chunk each, and parts that go on from a state."""
    args = [u.requires_grad_() for u in inputs(53, R)]
    whole = scan(*args)[0]
    weights = torch.randn_like(whole)
    grads = torch.autograd.grad(whole, args, weights)
    monkeypatch.setitem(anywhere_mamba3.PIECE, 'cpu', 1)
    y = scan(*args)[0]
    assert_close(y, whole, 1e-5)
    for got, want in zip(torch.autograd.grad(y, args, weights), grads):
        assert_close(got, want, 1e-5 * want.abs().max())
    state, ys = None, []
    with torch.no_grad():
        for cut in ((0, 1), (1, 20), (20, 52), (52, 53)):
            part = [u[:, slice(*cut)] if i < 7 else u for i, u in enumerate(args)]
            y, state = scan(*part, state=state)
            ys.append(y)
    assert_close(torch.cat(ys, 1), whole.detach(), 1e-5)


def test_B_and_C_of_each_head_are_never_all_in_memory(monkeypatch):
    """Neither at once nor for the backward pass: of what grows with T, no more than goes in and comes out."""
    monkeypatch.setitem(anywhere_mamba3.PIECE, 'cpu', 1 << 17)
    T, H = 4096, 16
    args = [u.requires_grad_() for u in inputs(T, batch=1, G=1, H=H)]
    given = sum(u.nbytes for u in args)
    with LiveBytes() as live:
        y, _ = scan(*args)
        kept = live.now - given - y.nbytes
        y.backward(torch.ones_like(y))
    peak = live.peaks['build'] - 2 * (given + y.nbytes)         # with their gradients
    all_of_one = 4 * T * H * N
    assert kept < all_of_one and peak < 2 * all_of_one, (kept, peak, all_of_one)


@pytest.mark.parametrize('R', [1, 2])
def test_in_a_compiled_function(R):
    args = [u.requires_grad_() for u in inputs(37, R)]
    want = scan(*args)[0]
    weights = torch.randn_like(want)
    compiled = torch.compile(lambda *args: mamba3_scan(*args, True, 16, (None,) * 4)[0], backend='aot_eager')
    y = compiled(*args)
    assert_close(y, want, 1e-5)
    for got, grad in zip(torch.autograd.grad(y, args, weights), torch.autograd.grad(want, args, weights)):
        assert_close(got, grad, 1e-5 * grad.abs().max())


def test_a_compiler_is_told_the_strides_of_all_gradients():
    """It fails where they are others, as those of a learned state's turns in more than one chunk."""
    x, B, C, dt, log_decay, trap, rate, *weights = inputs(37)
    h, turn = torch.randn(2, H, P, N), torch.zeros(2, H, A, dtype=torch.float64)
    given = x, B, C, dt, log_decay, trap, trap, rate, *weights
    options = 16, torch.float32
    y, *_, starts, turns = anywhere_mamba3.scan_operation(*given, h, turn, *options)
    args = torch.randn_like(y), torch.randn_like(h), torch.randn_like(turn), *given, starts, turns, *options
    with FakeTensorMode(allow_non_fake_inputs=True):
        told = anywhere_mamba3.backward_operation(*args)
    for got, expected in zip(anywhere_mamba3.backward_operation(*args), told, strict=True):
        assert got.stride() == expected.stride() and got.dtype == expected.dtype


@pytest.mark.parametrize('operation', [anywhere_mamba3.mamba3_scan, cpu_mamba3.mamba3_scan])
@pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
def test_a_rank_without_scales(operation):
    """Those of None are ones; a gate of None has none."""
    *args, _ = inputs(5, R=3)
    want, after = mamba3_scan.definition(*args)
    y, state = operation(*args)
    assert_close(y, want, 1e-5 * want.abs().max().item())
    one = [u[:, :1] if i < 7 else u for i, u in enumerate(args)]
    assert_close(operation(*one, state=state)[0], mamba3_scan.definition(*one, state=after)[0], 1e-4)
    assert_close(gated_heads(y, args[0]), gated_heads.definition(y, args[0]), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize('given', ['no state', 'no scales'])
def test_one_token_leaves_to_others_what_it_has_not(given, monkeypatch):
    monkeypatch.setattr(one_token, 'applies', lambda x: True)
    *args, mimo_x = inputs(1, 2)
    state = None
    if given == 'no scales':
        mimo_x, state = None, scan(*inputs(5, 2))[1]
    assert one_token.mamba3_scan(*args, mimo_x, state=state) is NotImplemented


@torch.no_grad()
@pytest.mark.parametrize('interleaved', [True, False])
@pytest.mark.parametrize('R', [1, 2])
def test_one_token_in_place(R, interleaved, monkeypatch):
    monkeypatch.setattr(one_token, 'applies', lambda x: True)
    _, state = scan(*inputs(5, R), interleaved=interleaved)
    args = inputs(1, R)
    want, after = scan(*args, state=state, operation=mamba3_scan.definition, interleaved=interleaved)
    y, new = one_token.mamba3_scan(*args, interleaved, 16, state)
    assert_close(y, want, 1e-5)
    for u, old, expected in zip(new, state, after):
        assert u is old
        assert_close(u, expected, 1e-5)


@pytest.mark.parametrize('R, norm', [(1, False), (1, True), (2, True)])
def test_gated_heads(R, norm, monkeypatch):
    y, z = torch.randn(2, 5, R, H, P), torch.randn(2, 5, H, P)
    mimo = [torch.randn(H, R, P) for _ in 'zo'] if R > 1 else [None] * 2
    args = [u if u is None else u.requires_grad_() for u in (y, z, *mimo, torch.randn(H * P) if norm else None)]
    leaves = [u for u in args if u is not None]
    weights = torch.randn(2, 5, H * P)
    results = []
    for enabled in (True, False):
        monkeypatch.setattr(registry, 'ENABLED', enabled)
        gated = gated_heads(*args, 1e-3)
        results.append([gated, *torch.autograd.grad(gated, leaves, weights)])
    for got, want in zip(*results):
        assert_close(got, want, 1e-5)
