"""adapters.py: what is added is what the papers say."""
import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import LORA, PREFIX, adapted, saved, trained
from helpers.models import MODELS, V, assert_close, build, perturb, tokens

from mambino.language_model import linear_cross_entropy
from mambino.train.sizes import SIZES
from mambino.weights import adapters, checkpoint

pytestmark = pytest.mark.usefixtures('quiet_and_seeded', 'one_thread')

NETS = list(MODELS)
KINDS = ['gpt', 'mamba', 'hybrid']
every_net = pytest.mark.parametrize('name', NETS)


# --- LoRA -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, targets', [(name, '') for name in NETS] + [
    ('mamba1', 'in_proj,x_proj,dt_proj,out_proj'), ('mamba2', 'out_proj'), ('hybrid', 'k_proj,out_proj,controller')])
def test_lora_begins_as_the_base_and_its_gradients_are_those_of_the_dense_change(name, targets):
    """Gradients of A and B are those by way of W + scale B A, made by autograd."""
    base = perturb(build(name))
    net = adapters.add_lora(copy.deepcopy(base), targets, rank=3, alpha=6.0)
    idx, targets = tokens(2, 2, 40)
    with torch.no_grad():
        assert torch.equal(net(idx)[0], base(idx)[0])
    for p in trained(net).values():
        p.data += 0.1 * torch.randn_like(p)
    dense, leaves, changed = {n: p.detach() for n, p in base.named_parameters()}, {}, 0
    for path, linear in adapters.with_lora(net).items():
        a, b = (p.detach().clone().requires_grad_() for p in linear.lora['default'].parameters())
        leaves[path] = a, b
        dense[path + '.weight'] = dense[path + '.weight'] + 2.0 * b @ a
        changed += 1
    assert changed and len(leaves) == len(adapters.with_lora(net))
    want = torch.func.functional_call(base, dense, (idx, targets))[1]
    got = net(idx, targets)[1]
    assert_close(got, want, 1e-5)
    wants = torch.autograd.grad(want, [leaf for pair in leaves.values() for leaf in pair])
    parameters = [p for linear in adapters.with_lora(net).values() for p in linear.lora.parameters()]
    gots = torch.autograd.grad(got, parameters)
    for a, b in zip(gots, wants):
        assert b.abs().max() > 0
        assert_close(a, b, 1e-4 * b.abs().max().item() + 1e-7)


@every_net
def test_merged_is_unmerged_and_steps_are_forward(name):
    base, net = adapted(name)
    idx = tokens(2, 33)
    with torch.no_grad():
        want = net(idx)[0]
        assert (want - base(idx)[0]).abs().max() > 0.1
        first, state = net.step(idx[:, :20])
        assert_close(torch.cat((first, net.step(idx[:, 20:], state)[0]), 1), want)
        adapters.merge_adapters(net)
        assert net.state_dict().keys() == base.state_dict().keys() and not adapters.with_lora(net)
        assert_close(net(idx)[0], want)


def test_lora_is_small_on_a_model_of_50_million():
    for kind in KINDS:
        size = SIZES[kind, '50m'] | ({} if kind == 'mamba' else dict(n_head=8))
        own, all_of_them = [], []
        for n_layer in (1, 2):                              # both grow by as much with each layer
            with torch.device('meta'):
                config = size | dict(n_layer=n_layer, vocab_size=16384)
                net = adapters.add_lora(checkpoint.build(kind, config), rank=8)
            own.append(sum(p.numel() for p in trained(net).values()))
            all_of_them.append(net.num_params())
        own, all_of_them = (one + (size['n_layer'] - 1) * (two - one)
                            for one, two in (own, all_of_them))
        assert 45e6 < all_of_them < 60e6 and 0 < own <= 0.02 * all_of_them


@pytest.mark.parametrize('name, targets, words', [
    ('gpt', 'q_proj,nothing', 'nothing is no matrix'),
    ('gpt', 'lm_head', 'lm_head takes no LoRA loss'),
    ('gpt', 'embed_tokens', 'embed_tokens look-up q_proj'),
    ('gpt-experts', 'gate', 'gate router q_proj'),
    ('gpt-experts', 'down_proj', 'down_proj stacks q_proj'),
    ('mamba1', 'conv1d', 'conv1d in_proj x_proj dt_proj out_proj'),
    ('mamba2', 'embeddings', 'embeddings look-up in_proj'),
])
def test_targets_that_cannot_be_are_named(name, targets, words):
    with pytest.raises(ValueError) as error:
        adapters.add_lora(build(name), targets)
    for word in words.split():
        assert word in str(error.value)


def test_targets_are_names_or_ends_of_paths():
    net = adapters.add_lora(build('gpt'), 'q_proj, layers.1.mlp.up_proj')
    assert list(adapters.with_lora(net)) == [
        'model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj', 'model.layers.1.mlp.up_proj']
    for name, targets in ('mamba1', {'in_proj', 'x_proj'}), ('mamba2', {'in_proj'}):
        assert {adapters.short_name(path) for path in adapters.find_targets(build(name), '')} == targets
    assert adapters.with_lora(adapters.add_lora(build('mamba2'), 'out_proj'))


def test_dropout_is_of_training_alone():
    base, net = adapted('gpt', dropout=0.5)
    idx = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(net(idx)[0], net(idx)[0])
        net.train()
        assert not torch.equal(net(idx)[0], net(idx)[0])


@pytest.mark.parametrize('name', ['gpt', 'mamba2', 'mamba1', 'hybrid'])
def test_with_gradient_checkpointing_the_gradients_are_the_same(name):
    _, net = adapted(name)
    net.train()
    idx, targets = tokens(2, 2, 20)
    want = torch.autograd.grad(net(idx, targets)[1], trained(net).values())
    net.gradient_checkpointing = True
    for a, b in zip(torch.autograd.grad(net(idx, targets)[1], trained(net).values()), want):
        assert_close(a, b, 1e-6)


def test_head_that_is_frozen_costs_no_gradient():
    x, weight, targets = torch.randn(1, 9, 8), torch.randn(V, 8), tokens(1, 9)
    want = torch.autograd.grad(F.cross_entropy((x.requires_grad_() @ weight.t())[0], targets[0]), x)[0]
    loss = linear_cross_entropy(x, weight, targets)
    assert all(kept is None or kept.shape != weight.shape for kept in loss.grad_fn.saved_tensors)
    assert_close(torch.autograd.grad(loss, x)[0], want, 1e-6)


# --- prefix tuning --------------------------------------------------------------------------------

@every_net
def test_prefix_is_what_was_read(name):
    """A prefix that was made from tokens has the effect of these tokens; forward and steps agree, and
    gradients reach all of it."""
    base = perturb(build(name))
    ids, (idx, targets) = tokens(7), tokens(2, 2, 30)
    net = adapters.add_prefix(copy.deepcopy(base), 7, ids)
    with torch.no_grad():
        want = base(torch.cat((ids.expand(2, 7), idx), 1))[0][:, 7:]
        assert_close(net(idx)[0], want)
        for pieces in ([30], [1, 9, 20], [1] * 30):
            state, out = None, []
            for part in idx.split(pieces, 1):
                logits, state = net.step(part, state)
                out.append(logits)
            assert_close(torch.cat(out, 1), want)
        assert_close(net(idx)[0], want)                     # nothing was written into it
        assert (net(idx)[0] - base(idx)[0]).abs().max() > 0.01
    own = trained(net)
    assert set(own) == {n for n in own if n.startswith('prefix.')}
    for train in (False, True):
        for n, g in zip(own, torch.autograd.grad(net.train(train)(idx, targets)[1], own.values())):
            assert torch.isfinite(g).all() and g.abs().max() > 0, n


@pytest.mark.parametrize('name', ['gpt', 'gpt-gqa-window', 'mamba1', 'mamba2', 'hybrid'])
def test_gradient_of_a_prefix_is_the_slope_of_the_loss(name):
    _, net = adapted(name, 'prefix')
    idx, targets = tokens(2, 2, 30)
    own = list(trained(net).values())
    grads = torch.autograd.grad(net(idx, targets)[1], own)
    ways = [torch.randn_like(g) for g in grads]
    slope = sum((g * way).sum() for g, way in zip(grads, ways)).item()
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            for p, way in zip(own, ways):
                p += sign * 1e-3 * way
            losses.append(net(idx, targets)[1].item())
            for p, way in zip(own, ways):
                p -= sign * 1e-3 * way
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_what_a_prefix_cannot_be():
    net = adapters.add_prefix(build('gpt'), 7)
    for text, action in (
            ('two prefixes', lambda: adapters.add_prefix(net, 7)),
            ('merged', lambda: adapters.merge_adapters(net)),
            ('from 1 to 20', lambda: adapters.add_prefix(build('gpt-gqa-window'), 21))):
        with pytest.raises(ValueError, match=text):
            action()


# --- several adapters -----------------------------------------------------------------------------

def test_loras_of_one_base_add_up(monkeypatch):
    base, one = adapted('gpt')
    other = adapters.add_lora(copy.deepcopy(base), 'q_proj', 4, 4.0)
    for p in trained(other).values():
        p.data += 0.1 * torch.randn_like(p)
    a, b = saved(one, LORA, base), saved(other, dict(LORA, targets='q_proj', rank=4, alpha=4.0), base)
    net = adapters.attach_adapter(adapters.attach_adapter(copy.deepcopy(base), a), b, 0.5)
    want = {name: w.clone() for name, w in base.state_dict().items()}
    for delta, weight in ((adapters.merge_adapters(one), 1), (adapters.merge_adapters(other), 0.5)):
        for name, w in delta.state_dict().items():
            want[name] += weight * (w - base.state_dict()[name])
    for name, w in adapters.merge_adapters(net).state_dict().items():
        assert_close(w, want[name], 1e-6)
    for text, action in (
            ('another base', lambda: adapters.attach_adapter(perturb(build('gpt')), a)),
            ('no weight', lambda: adapters.attach_adapter(copy.deepcopy(base), a, float('nan')))):
        with pytest.raises(ValueError, match=text):
            action()


def test_merged_weights_are_the_same_bits_on_every_machine():
    """In whatever order its sums are made, for a merged model has a fingerprint when it is a base."""
    base, net = adapted('gpt')
    want = {}
    for path, linear in adapters.with_lora(net).items():
        lora = linear.lora['default']
        want[f'{path}.weight'] = (lora.B.double()[:, :, None] * lora.A.double()).sum(1) * 2
    found = adapters.merge_adapters(net).state_dict()
    for name, change in want.items():
        assert torch.equal(found[name], base.state_dict()[name] + change.float())


def test_lora_and_prefix_stand_on_one_base():
    base, one = adapted('hybrid')
    _, two = base, adapters.add_prefix(copy.deepcopy(base), 7)
    net = copy.deepcopy(base)
    for ckpt in (saved(two, PREFIX, base), saved(one, LORA, base)):
        adapters.attach_adapter(net, ckpt)
    adapters.add_prefix(one, 7)
    for layer, value in trained(one).items():
        if layer.startswith('prefix'):
            value.data = dict(two.named_parameters())[layer].data
    idx = tokens(2, 20)
    with torch.no_grad():
        assert_close(net(idx)[0], one(idx)[0])
