"""Attention against plain float64, by each way to compute it: windows, groups, dropout, odd scores."""
import math

import pytest
import torch
from helpers.models import assert_same

from mambino.blocks import Blocks
from model_gpt import attention

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")
every_way = pytest.mark.usefixtures("way")


def visible(T, window):
    i = torch.arange(T)
    return (i[:, None] >= i) & (i[:, None] - i < (window or T))


@every_way
@pytest.mark.parametrize("size", [1, 4])                        # of the scores
@pytest.mark.parametrize("window", [0, 1, 7, 64, 100, 1000])
@pytest.mark.parametrize(
    "threads, B, T, H, G, P",
    [(1, 2, 1, 2, 1, 16), (2, 1, 63, 3, 3, 32), (3, 2, 129, 4, 2, 16), (1, 1, 330, 2, 1, 64)],
)
def test_attention(threads, B, T, H, G, P, window, size):
    torch.set_num_threads(threads)
    inputs = [torch.randn(B, T, H, P) * size, torch.randn(B, T, G, P), torch.randn(B, T, G, P)]

    def reference(q, k, v):
        k, v = (u.repeat_interleave(H // G, 2) for u in (k, v))
        scores = torch.einsum("bihp,bjhp->bhij", q, k) / math.sqrt(P)
        weights = scores.masked_fill(~visible(T, window), -math.inf).softmax(-1)
        return [torch.einsum("bhij,bjhp->bihp", weights, v).flatten(2)]

    if T == 1 or window == 1:  # one key each: q and k do not matter
        q, k, v = inputs
        got = attention(q.requires_grad_(), k.requires_grad_(), v, window)
        assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad(got.sum(), (q, k)))
        assert_same(lambda v: [attention(q.detach(), k.detach(), v, window)],
                    lambda v: reference(q.detach().double(), k.detach().double(), v), [v])
    else:
        assert_same(lambda q, k, v: [attention(q, k, v, window)], reference, inputs)


@every_way
@pytest.mark.parametrize("B, T, K, H, G, P, window, dtype", [
    (2, 128, 0, 2, 1, 64, 0, None), (4, 100, 4, 2, 2, 32, 0, None), (6, 192, 64, 4, 2, 16, 40, None),
    (4, 65, 1, 2, 2, 16, 0, None), (4, 130, 13, 2, 1, 32, 0, torch.bfloat16)])
def test_attention_among_blocks(B, T, K, H, G, P, window, dtype):
    """Each sequence by the table of its share of the rows; bf16 no further from float64 than its definition."""
    blocks = Blocks(torch.zeros(B, T, dtype=torch.long), K, window)
    inputs = [torch.randn(B, T, H, P), torch.randn(B, T, G, P), torch.randn(B, T, G, P)]

    def attended(q, k, v, operation=attention):
        return [operation(q, *blocks.append(None, k, v), mask=blocks.mask)]

    def defined(q, k, v):
        return attended(q, k, v, attention.definition)

    if dtype is None:
        assert_same(attended, defined, inputs)
        return
    exact = defined(*(u.to(dtype).double() for u in inputs))[0]
    got, of_definition = (f(*(u.to(dtype) for u in inputs))[0] for f in (attended, defined))
    assert got.dtype == dtype
    assert (got - exact).norm() <= 1.1 * (of_definition - exact).norm()


@every_way
def test_a_hidden_key_is_never_looked_at():
    """Whatever it holds: nothing of it comes out, nor goes back to it."""
    q, k, v = (torch.randn(2, 70, 2, 16) for _ in "qkv")
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool)
    mask[1, ..., 66] = False
    k[1, 66], v[1, 66] = 1e4, 1e4
    k.requires_grad_(), v.requires_grad_()
    y = attention(q, k, v, mask=mask)
    grads = torch.autograd.grad(y[1].sum(), (k, v))
    assert y[1].abs().max() < 10
    assert all(not grad[1, 66].any() for grad in grads)


@every_way
def test_attention_of_very_low_scores():
    q, k, v = (
        torch.full((1, 70, 1, 16), -60.0),
        torch.full((1, 70, 1, 16), 60.0),
        torch.randn(1, 70, 1, 16),
    )  # scores of -14,400
    means = v.cumsum(1) / torch.arange(1, 71)[:, None, None]
    torch.testing.assert_close(attention(q, k, v), means.flatten(2))


@every_way
def test_attention_dropout():
    """The weights that stay are those that stay in the backward pass too, and a share of `dropout`
    goes."""
    T, P = 130, 16
    q, k = torch.randn(2, 1, T, 2, P).unbind()
    weights = torch.empty(1, T, 2, T)
    for start in range(0, T, P):  # v as unit vectors shows the weights
        v = torch.zeros(1, T, 2, P)
        v[0, range(start, min(T, start + P)), :, range(min(P, T - start))] = 1
        torch.manual_seed(5)
        weights[..., start:start + P] = attention(q, k, v, dropout=0.3).view(1, T, 2, P)[..., :min(P, T - start)]
    whole = torch.stack(
        [
            (q[0, :, h] @ k[0, :, h].T / P**0.5).masked_fill(~visible(T, 0), -math.inf).softmax(-1)
            for h in range(2)
        ],
        1,
    )
    kept = (weights[0] > 0).float()
    seen = visible(T, 0)[:, None].expand(T, 2, T)
    assert abs(1 - kept[seen].mean() - 0.3) < 0.02
    torch.testing.assert_close(weights[0], whole * kept / 0.7, atol=1e-6, rtol=1e-4)

    def run(q, k, v):
        torch.manual_seed(5)
        return [attention(q.float(), k.float(), v.float(), dropout=0.3)]

    def reference(q, k, v):
        w = torch.stack(
            [
                (q[0, :, h] @ k[0, :, h].T / P**0.5)
                .masked_fill(~visible(T, 0), -math.inf)
                .softmax(-1)
                for h in range(2)
            ]
        )
        w = w * kept.transpose(0, 1) / 0.7
        return [torch.stack([w[h] @ v[0, :, h] for h in range(2)], 1)[None].flatten(2)]

    assert_same(run, reference, [q, k, torch.randn(1, T, 2, P)])
    torch.manual_seed(6)
    assert (attention(q, k, v, dropout=0.3) > 0).ne(weights[..., -v.shape[-1]:].flatten(2) > 0).any()
