"""Each operation against float64 as its paper has it; each model's step against its forward; a few
steps that learn."""
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import assert_close, assert_same, build, every_model, perturb, random_dt, recurrence, tokens

from mambino.language_model import gated_rms_norm, linear_cross_entropy, rms_norm
from model_gpt import apply_rope, attention, rope_tables, swiglu
from model_mamba import causal_conv1d, selective_scan, ssd

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


# --- operations: outputs and all gradients --------------------------------------------------------

@pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
@pytest.mark.parametrize("G, Q", [(1, 16), (2, 64)])
def test_ssd_is_the_recurrence(G, Q, kind):
    B, T, H, P, N = 2, 37, 4, 3, 5
    A = torch.empty(H, 1).uniform_(-16, -0.01)
    inputs = [torch.randn(B, T, H, P), random_dt(kind, (B, T, H)), A,
              torch.randn(B, T, G, N), torch.randn(B, T, G, N), torch.randn(B, H, P, N)]

    def chunked(x, dt, A, B, C, h):
        return ssd(x, dt, A[:, 0], B, C, chunk_size=Q, state=h)
    assert_same(chunked, recurrence, inputs)


@pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
def test_selective_scan_is_the_recurrence(kind):
    B, T, E, N = 2, 37, 6, 5
    A = torch.empty(E, N).uniform_(-16, -0.01)
    inputs = [torch.randn(B, T, E), random_dt(kind, (B, T, E)), A,
              torch.randn(B, T, N), torch.randn(B, T, N), torch.randn(B, N, E)]

    def reference(x, dt, A, B, C, h):
        h = h.transpose(1, 2)[:, :, None]                           # (B, E, 1, N)
        y, h = recurrence(x[..., None], dt, A, B[:, :, None], C[:, :, None], h)
        return y[..., 0], h[:, :, 0].transpose(1, 2)
    assert_same(selective_scan, reference, inputs)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("T, S", [(23, 23), (1, 23), (7, 23)])
def test_attention_is_softmax_of_scores(T, S, window):
    B, H, G, P = 2, 4, 2, 8

    def reference(q, k, v):
        k, v = (u.repeat_interleave(H // G, dim=2) for u in (k, v))
        scores = torch.einsum("bthp,bshp->bhts", q, k) / math.sqrt(P)
        i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
        hidden = (j > i) | (j <= i - (window or S))
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return [torch.einsum("bhts,bshp->bthp", weights, v).flatten(2)]

    inputs = [torch.randn(B, T, H, P), torch.randn(B, S, G, P), torch.randn(B, S, G, P)]
    assert_same(lambda q, k, v: [attention(q, k, v, window)], reference, inputs)


def test_rope_turns_pairs_by_their_position():
    x = torch.randn(2, 9, 3, 8)                                                 # (B, T, H, P)
    rope = rope_tables(torch.arange(9), 100.0 ** (-torch.arange(0, 8, 2) / 8))
    angles = torch.arange(9)[:, None, None] * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)

    def reference(x):
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
        return [torch.cat((turned.real, turned.imag), -1)]
    assert_same(lambda x: [apply_rope(x, rope)], reference, [x])


@pytest.mark.parametrize("cuts", [[20], [7, 1, 12]])
def test_convolution_sees_the_last_tokens(cuts):
    B, T, E, K = 2, sum(cuts), 6, 4

    def in_parts(x, weight, bias):
        state, ys = None, []
        for part in x.split(cuts, 1):
            y, state = causal_conv1d(part, weight, bias, state)
            ys.append(y)
        return [torch.cat(ys, 1)]

    def reference(x, weight, bias):
        before = torch.cat((x.new_zeros(B, K - 1, E), x), 1)
        return [F.silu(bias + sum(before[:, k:k + T] * weight[:, 0, k] for k in range(K)))]
    assert_same(in_parts, reference, [torch.randn(B, T, E), torch.randn(E, 1, K), torch.randn(E)])


def test_norms_activation_and_loss():
    x, z, weight = torch.randn(2, 7, 12), torch.randn(2, 7, 12), torch.randn(12)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def gated(y, z, weight):
        y = (y * F.silu(z)).unflatten(-1, (3, 4))
        return [norm(y).flatten(-2) * weight]
    assert_same(lambda x, w: [rms_norm(x, w, 1e-5)], lambda x, w: [norm(x) * w], [x, weight])
    assert_same(lambda y, z, w: [gated_rms_norm(y, z, w, 1e-5, 3)], gated, [x, z, weight])
    assert_same(lambda x, z: [swiglu(x, z)], lambda x, z: [F.silu(x) * z], [x, z])

    targets = torch.randint(50, (2, 7))
    targets[0, :3] = -1                                                         # these do not count
    assert_same(lambda x, w: [linear_cross_entropy(x, w, targets)],
                lambda x, w: [F.cross_entropy((x @ w.T).flatten(0, 1), targets.flatten(), ignore_index=-1)],
                [x, torch.randn(50, 12)])


# --- models ---------------------------------------------------------------------------------------

@every_model
@torch.no_grad()
def test_step_equals_forward(name):
    model = perturb(build(name, block_size=48))
    idx = tokens(2, 48)
    want = model(idx)[0]
    state, parts = None, []
    for part in idx.split([21, 1, 1, 25], 1):
        logits, state = model.step(part, state)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), want)
    rows = {key: tensor[[1, 0]] for key, tensor in state.items()}   # indexed as a batch is
    swapped = model.step(idx[[1, 0], :1], rows)[0]
    assert_close(swapped[[1, 0]], model.step(idx[:, :1], state)[0])


@every_model
def test_a_few_steps_learn(name):
    model = build(name, block_size=24).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    idx = tokens(4, 25)
    losses = []
    for _ in range(8):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(97), abs=0.6) and losses[-1] < losses[0] - 0.3
    assert model.flops_per_token(24) > 0 and model.num_params() > 0
