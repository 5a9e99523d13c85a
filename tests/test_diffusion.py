"""Models that fill holes: who sees whom, and the bound, against what can be counted."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.holes import MODELS, T, V, batch, build, text
from helpers.models import HYBRID_SIZE, assert_close

from mambino.blocks import Blocks
from mambino.holes import DRAWS, draws, for_evaluation, hidden, hiding, learnable
from mambino.language_model import linear_cross_entropy
from mambino.sample.generation import cut_in_windows
from mambino.train.evaluation import with_losses
from mambino.train.objective import spread
from mambino.weights import checkpoint

every_model = pytest.mark.parametrize('name', MODELS)


# --- the network

@every_model
@pytest.mark.parametrize('K', [1, 4])
def test_a_block_in_training_is_what_it_is_when_it_is_generated(name, K):
    """After the state that steps over the clean blocks before it have made."""
    if name == 'mamba1' and K == 1:
        return                                                  # slow, and nothing that K = 4 does not show
    net = build(name, objective='block', block_length=K)
    clean = text()
    noisy = clean.masked_fill(torch.rand(clean.shape) < 0.5, V - 1)
    want = net(torch.cat((clean, noisy)))[0]
    state, got = None, []
    for ids, holes in zip(clean.split(K, 1), noisy.split(K, 1)):
        copy = state and {name: value.clone() for name, value in state.items()}
        got.append(net.step(holes, copy)[0])
        _, state = net.step(ids, state)
    assert want.std() > 0.3
    assert_close(torch.cat(got, 1), want, 1e-4)


@every_model
def test_who_sees_whom(name):
    """A window sees all of itself, or of a window of attention its neighbours; a block what is before it, clean,
    and itself; nothing another row."""
    def changed_by(net, place, rows):
        x = text(2 * rows)
        other = x.clone()
        other[:, place] = (other[:, place] + 1) % (V - 1)
        mixed = torch.cat((x[:1], other[1:]))
        a, b = (net(ids)[0] for ids in (x, mixed))
        assert torch.equal(a[:1], b[:1])                        # of another row nothing
        return ((a[1] - b[1]).abs().amax(-1) > 1e-7).tolist()
    reaches = 6 if name == 'gpt-window' else T                  # 2 layers
    seen = changed_by(build(name, objective='masked'), 8, 1)
    assert seen == [abs(i - 8) <= 2 * (reaches - 1) for i in range(T)]
    if 'experts' in name:
        return
    net = build(name, objective='block', block_length=4)
    x = text(2)
    for place in range(T):
        clean = x.clone()
        clean[:, place] = (clean[:, place] + 1) % (V - 1)
        a, b = (net(torch.cat((ids, x)))[0] for ids in (x, clean))
        changed = ((a - b).abs().amax((0, 2)) > 1e-7).tolist()
        assert not any(changed[:place // 4 * 4 + 4]), place     # own block, and those before: not by the clean text
        assert any(changed[place // 4 * 4 + 4:]) or place >= T - 4


def test_backwards_twice_is_forwards():
    blocks = Blocks(torch.zeros(2, T, dtype=torch.long), 4)
    u = torch.randn(2, T, 3)
    assert torch.equal(blocks.joined(blocks.cut(u)), u)
    assert torch.equal(blocks.back(lambda v: v, u), u)
    sums = blocks.back(lambda v: v.cumsum(1), u)                # of each block from its end
    assert_close(sums, u.view(2, 4, 4, 3).flip(2).cumsum(2).flip(2).view(2, T, 3), 1e-6)


def test_one_more_direction_starts_from_the_same_numbers():
    """A causal model's weights have the same names in one that fills holes."""
    for name in ('gpt', 'mamba2', 'hybrid'):
        names = [set(build(name, **changes).state_dict()) for changes in (
            {}, dict(objective='masked'), dict(objective='masked', share_projections=False))
            if name != 'gpt' or 'share_projections' not in changes]
        assert all(names[0] <= more for more in names[1:])


@pytest.mark.parametrize('layers', ['m', 'd'])
def test_both_directions_of_a_hybrid_begin_alike(layers):
    """With projections of the same spread, that of the Mamba's own initialisation."""
    torch.manual_seed(0)
    config = dict(HYBRID_SIZE, layers=layers, vocab_size=V, block_size=T, objective='masked', share_projections=False)
    layer = checkpoint.build('hybrid', config).model.layers[0]
    for name, p in layer.mamba.named_parameters():
        if name.endswith('_proj.weight'):
            assert layer.back.get_parameter(name).std().item() == pytest.approx(p.std().item(), rel=0.1), name


@pytest.mark.parametrize('changes, words', [
    (dict(objective='mask'), "objective='mask'"), (dict(objective='block'), 'block_length=0'),
    (dict(block_length=4), 'block_length=4'), (dict(objective='block', block_length=5), 'multiple of block_length=5')])
def test_what_cannot_be(changes, words):
    for name in ('gpt', 'mamba2', 'hybrid'):
        with pytest.raises(ValueError, match=words):
            build(name, **changes)


# --- the bound

def bound(net, x, y, us, noise, K=0):
    """Nats of the batch, by these draws."""
    with torch.no_grad():
        return net(*hidden(x, y, us, noise, V - 1, K))[1].item()


def every_draw(n):
    """All orders of n tokens behind the first, as noise."""
    for order in itertools.permutations(range(n)):
        yield torch.tensor([[0.0, *(rank / n for rank in order)]])


def test_the_bound_by_draws_is_that_of_all_draws():
    """Two tokens behind a given one: enumerated, once over k and what is hidden, once as the papers have it, each
    token hidden with probability t and 1/t."""
    net = build('gpt', objective='masked', block_size=3)
    ids = text(1, 4)
    x, y = ids[:, :3], ids[:, 1:]
    exact = np.mean([bound(net, x, y, torch.tensor([(k - 0.5) / 2]), noise)
                     for k in (1, 2) for noise in every_draw(2)])

    def nats(holes):
        with torch.no_grad():
            logits = net(x.masked_fill(torch.tensor([[False, *holes]]), V - 1))[0]
        losses = F.cross_entropy(logits[0], x[0], reduction='none')
        return sum(losses[i + 1].item() for i, hole in enumerate(holes) if hole)
    # the integral over t of t^(h - 1) (1 - t)^(2 - h): 1/2 of one hole, 1/2 of two
    papers = 0.5 * (nats((True, False)) + nats((False, True))) + 0.5 * nats((True, True))
    assert exact == pytest.approx(papers, abs=1e-5)

    rng = np.random.default_rng(0)
    n = 4000
    drawn = bound(net, x.expand(n, 3), y.expand(n, 3), torch.tensor(rng.random(n)).float(),
                  torch.tensor(rng.random((n, 3))).float()) / n
    assert drawn == pytest.approx(exact, abs=0.05)
    # and the mean over both orders of finding one token after the other: so it is a bound
    def one_by_one(first, second):
        both, one = x.clone(), x.clone()
        both[:, 1:], one[:, second] = V - 1, V - 1
        return sum(-net(z)[0][0, i].log_softmax(-1)[x[0, i]].item() for z, i in ((both, first), (one, second)))
    assert exact == pytest.approx((one_by_one(1, 2) + one_by_one(2, 1)) / 2, abs=1e-5)


@pytest.mark.parametrize('name', ['gpt', 'mamba2'])
@pytest.mark.parametrize('K', [0, 4])
def test_behind_a_short_text_nothing_is_known(name, K):
    """Its bound is the mean over both orders of finding one of two tokens after the other, as they are filled: behind
    them are holes, whatever token has id 0."""
    net = build(name, objective='block' if K else 'masked', block_length=K)
    ids = [3, 5, 0]
    x, y = cut_in_windows(ids, 1, T, V - 1)
    assert x[0].tolist() == [*ids, *[V - 1] * (T - 3)] and learnable(y)[0].nonzero()[:, 0].tolist() == [1, 2]
    noises = [torch.rand(1, T) for _ in range(2)]
    for noise, order in zip(noises, ([0.1, 0.2], [0.2, 0.1])):
        noise[0, 1:3] = torch.tensor(order)
    exact = np.mean([bound(net, x, y, torch.tensor([(k - 0.5) / 2]), noise, K) for k in (1, 2) for noise in noises])

    def nats(at, hidden_ones):
        z = x[:, :K or T].clone()
        z[:, hidden_ones] = V - 1
        return -net.step(z)[0][0, at].log_softmax(-1)[ids[at]].item()
    want = (nats(1, [1, 2]) + nats(2, [2]) + nats(2, [1, 2]) + nats(1, [1])) / 2
    assert exact == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize('K', [0, 1, 4])
def test_a_network_that_knows_nothing_pays_for_each_token(K):
    net = build('gpt', objective='block' if K else 'masked', block_length=K)
    torch.nn.init.zeros_(net.lm_head.weight)
    x, y = batch(4)
    for idx, targets, factors in for_evaluation(hiding(net.config), x, y, 1):
        nats = net(idx, targets, factors)[1].item()
        assert nats == pytest.approx(4 * (T - 1) * math.log(V), rel=1e-6)


@every_model
def test_blocks_of_one_token_are_read_from_left_to_right(name):
    """Each predicted from what is before it, as the next token is."""
    net = build(name, objective='block', block_length=1)
    x, y = batch()
    with torch.no_grad():
        want, state = 0.0, None
        for i in range(T):
            copy = state and {name: value.clone() for name, value in state.items()}
            logits = net.step(torch.full((2, 1), V - 1), copy)[0]
            want += F.cross_entropy(logits[:, 0], x[:, i], reduction='sum').item() * (i > 0)
            _, state = net.step(x[:, i:i + 1], state)
    got = bound(net, x, y, torch.rand(2), torch.rand(2, T), K=1)
    assert got == pytest.approx(want, rel=1e-5)


def test_how_many_are_hidden():
    """k from 1 to L alike, over the sequences of a step evenly; never the first, nor what is not learned."""
    x, y = batch(60)
    y[:, 5:9] = -1
    may = learnable(y)
    assert may[0].tolist() == [False] + [True] * 5 + [False] * 4 + [True] * 6
    L = 11
    idx, targets, factors = hidden(x, y, spread(1, 600, range(600, 660), 60), draws(1, range(60), T), V - 1)
    holes = idx == V - 1
    k = holes.sum(1)
    assert not (holes & ~may).any() and torch.equal(targets >= 0, holes)
    assert torch.equal(targets[holes], x[holes]) and torch.equal(idx[~holes], x[~holes])
    assert all(5 <= n <= 6 for n in k.bincount(minlength=L + 1)[1:])        # 60 / 11
    assert_close(factors[:, 0], L / k, 1e-6)
    clipped = hidden(x, y, spread(1, 600, range(600, 660), 60), draws(1, range(60), T), V - 1, max_weight=3.0)[2]
    assert torch.equal(clipped, factors.clamp(max=3.0))
    # a sequence's holes are its own, whatever is beside it
    assert torch.equal(draws(1, [17, 18], T), draws(1, range(60), T)[17:19])


def test_an_evaluation_is_the_same_whatever_is_computed_at_once():
    net = build('mamba2', objective='masked')
    x, y = batch(6)
    hide = hiding(net.config)

    def nats(rows):
        return [net(*piece)[1].item() for piece in for_evaluation(hide, x[rows], y[rows], 1)]
    with torch.no_grad():
        together, first, rest = nats(slice(6)), nats(slice(2)), nats(slice(2, 6))
    assert len(together) == DRAWS and np.std(together) > 0
    assert together == pytest.approx([a + b for a, b in zip(first, rest)], rel=1e-5)
    nats, variance = with_losses(0.0, 0.0, [(torch.tensor([1.0, 2.0, 1.0, 2.0]), 10)])
    assert nats == 15 and variance == pytest.approx(100 * (1 / 3) / 4)


def test_factors_weigh_losses_and_gradients():
    x = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    targets, factors = torch.randint(-1, 30, (2, 5)), torch.rand(2, 5)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy.definition):
        loss = function(x, weight, targets, factors)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    losses = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.clamp(min=0).flatten(), reduction='none')
    assert_close(results[0][0], (losses * factors.flatten())[targets.flatten() >= 0].sum(), 1e-5)
    for got, want in zip(*results):
        assert_close(got, want, 1e-5)
