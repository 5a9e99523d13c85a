"""Experts against a plain formula, their limits and their statistics; gradient checkpointing of
every kind of model.

What every model promises (transformers' logits, step equal to forward, training) test_models.py
tests for experts, too.
"""
import math
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.models import MODELS, V, assert_close, assert_same, build, every_model, perturb, tokens
from torch.nn.parallel import DistributedDataParallel

from mambino.kernels import portable
from model_gpt import GPT, GPTConfig, MoE

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

E, D, INNER, N = 4, 16, 24, 60  # experts, widths, tokens
OFTEN = [
    1.5,
    1.0,
    0.0,
    -9.0,
]  # how much more the experts' logits are: the first two have too many tokens, the last has none


@pytest.fixture(params=['by hand', 'in slots', 'in blocks'])
def both_ways(request):
    """Experts with a limit are computed in two ways: where native.cpp is used, and elsewhere. Those without
    are on a card computed by blocks."""
    if request.param == 'by hand':
        yield
    else:
        with portable('cuda' if request.param == 'in blocks' else None):
            yield


def moe(**settings):
    """A MoE in training, and inputs (1, N, D) that it sends to some experts more often."""
    module = MoE(GPTConfig(n_embd=D, n_head=1, n_expert=E, intermediate_size=INNER, **settings))
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, N, D)
    x[..., 0] = 1
    with torch.no_grad():
        module.gate.weight[:, 0] += torch.tensor(OFTEN)
    return module, x


def one_by_one(x, gate, gate_up, down, k, C):
    """Token after token and pair after pair → y, loss of balance, loss of large logits, pairs of
    each expert, pairs dropped."""
    logits = x @ gate.T
    probs, ys, pairs, dropped = logits.softmax(-1), [], [0] * E, 0
    for t in range(len(x)):
        y, best = torch.zeros_like(x[0]), probs[t].argsort(descending=True)[:k].tolist()
        for e in best:
            pairs[e] += 1
            if pairs[e] <= C:
                a, b = (gate_up[e] @ x[t]).chunk(2)
                y = y + probs[t, e] / sum(probs[t, best]) * (down[e] @ (a * torch.sigmoid(a) * b))
            dropped += pairs[e] > C
        ys.append(y)
    balance = E * sum(pairs[e] / sum(pairs) * probs[:, e].mean() for e in range(E))
    return torch.stack(ys), balance, (logits.exp().sum(-1).log() ** 2).mean(), pairs, dropped


@pytest.mark.parametrize('k', [1, 2, 3])
@pytest.mark.parametrize('capacity', [0, 0.3, 1.25])
def test_against_a_formula(k, capacity, both_ways):
    """Outputs, both losses and all gradients; what is dropped, and that it is the last tokens."""
    module, x = moe(n_expert_active=k, capacity_factor=capacity, aux_loss=0.7, z_loss=0.4)
    C = math.ceil(capacity * N * k / E) if capacity else N
    found = []

    def run(x, *weights):
        names = [name for name, _ in module.named_parameters()]
        y, (loss, statistics) = torch.func.functional_call(module, dict(zip(names, weights)), x[None])
        found.append(statistics.tolist())
        return y[0], loss

    def reference(x, *weights):
        y, balance, large, pairs, dropped = one_by_one(x, *weights, k, C)
        found.append([*pairs, dropped])
        return y, 0.7 * balance + 0.4 * large

    assert_same(run, reference, [x[0], *module.state_dict().values()])
    assert found[0] == found[1] and sum(found[0][:E]) == N * k
    assert (found[0][E] > 0) == (capacity > 0)


def test_no_limit_in_evaluation():
    limited, x = moe(capacity_factor=0.1)
    free = MoE(GPTConfig(n_embd=D, n_head=1, n_expert=E, intermediate_size=INNER, capacity_factor=0))
    free.load_state_dict(limited.state_dict())
    (y, routing), (want, _) = limited.eval()(x), free(x)
    assert torch.equal(y, want) and routing is None
    assert not torch.equal(limited.train()(x)[0], want)


@pytest.mark.parametrize('capacity', [0, 1.25])
def test_expert_without_tokens_has_zero_gradient(capacity, both_ways):
    module, x = moe(capacity_factor=capacity)
    y, (loss, statistics) = module(x)
    (y.square().sum() + loss).backward()
    assert statistics[3] == 0 and (module.gate.weight.grad != 0).any(1).all()
    for p in (module.experts.gate_up_proj, module.experts.down_proj):
        assert (p.grad[3] == 0).all() and (p.grad[:3] != 0).flatten(1).any(1).all()


def test_router_is_exact_under_autocast(both_ways):
    module, x = moe()
    y, (loss, statistics) = module(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        rounded, (same, again) = module(x)
    assert torch.equal(loss, same) and torch.equal(statistics, again)
    assert rounded.dtype == torch.bfloat16 and 0 < (rounded - y).norm() < 0.02 * y.norm()


def test_router_reads_numbers_that_are_not_rounded():
    model, idx = build('gpt-experts'), tokens(2, 20)
    read = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: read.append(args[0].dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model(idx)
    assert read and set(read) == {torch.float32}


def test_loss_of_balance_balances():
    module, x = moe(capacity_factor=0, z_loss=0, aux_loss=1.0)
    optimizer, most = torch.optim.SGD([module.gate.weight], lr=1.0), []
    for _ in range(30):
        _, (loss, statistics) = module(x)
        most.append(statistics.max().item() / (N * 2 / E))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert most[0] > 1.6 and most[-1] < 1.45


# --- in a GPT -------------------------------------------------------------------------------------

def test_losses_are_added_in_training_alone():
    model, idx, targets, losses = perturb(build('gpt-experts', capacity_factor=0)), *tokens(2, 2, 40), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: losses.append(out[1][0]) if out[1] else None)
    pure = model(idx, targets)[1]
    assert not losses
    assert_close(pure, F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()), 1e-5)
    assert_close(model.train()(idx, targets)[1], pure + sum(losses), 1e-6)
    assert len(losses) == 2 and min(losses) > 0.01  # each layer's balance alone is that much


@pytest.mark.parametrize('checkpointing', [False, True])
def test_load(checkpointing):
    model, idx = build('gpt-experts', capacity_factor=0.75), tokens(2, 50)
    model.gradient_checkpointing = checkpointing
    names, seen = set(model.state_dict()), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(module.forward(*args)[1]))
    model(idx, idx)
    assert model.expert_load() is None and seen.pop() is seen.pop() is None  # an evaluation does not count
    for _ in range(3):
        model.train()(idx, idx)[1].backward()
    assert len(seen) == (12 if checkpointing else 6)  # computed twice, counted once
    total = (
        torch.stack([statistics for _, statistics in seen[:2]]).double() * 3
    )  # three times the same, for nothing was updated
    load, pairs, share = model.expert_load(), total[:, :8], 3 * 100 * 4 / 8
    assert load['expert_load_max'] == pytest.approx(pairs.max().item() / share)
    assert load['expert_load_min'] == pytest.approx(pairs.min().item() / share)
    assert load['dropped'] == pytest.approx(total[:, 8].sum().item() / (2 * 8 * share)) and 0.2 < load['dropped'] < 0.8
    assert model.expert_load() is None                          # read, and begun anew
    assert set(model.state_dict()) == names and not any('routed' in name for name in names)


def test_load_of_dense_models():
    for name in ('gpt', 'mamba2', 'hybrid'):
        model = build(name).train()
        model(tokens(1, 9))
        assert model.expert_load() is None


def test_numbers_of_parameters_and_operations():
    dense, sparse = build('gpt', intermediate_size=64), build('gpt-experts')  # four active experts of 16 are one of 64
    routers, experts = 2 * 8 * 32, 2 * 8 * 3 * 32 * 16
    assert sparse.num_params() - dense.num_params() == routers + experts // 2
    assert sparse.flops_per_token(50) - dense.flops_per_token(50) == 6 * routers


def test_initialisation():
    model = GPT(GPTConfig(vocab_size=V, n_layer=8, n_head=4, n_embd=64, n_expert=4))
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert layer.mlp.experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.mlp.experts.down_proj.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize('settings, says', [
    (dict(n_expert=-1), 'n_expert=-1'),
    (dict(n_expert=4, n_expert_active=5), 'n_expert_active=5 .*n_expert=4'),
    (dict(n_expert=4, n_expert_active=0), 'n_expert_active=0 .*n_expert=4'),
    (dict(n_expert=4, capacity_factor=-1.0), 'capacity_factor=-1'),
    (dict(n_expert=4, capacity_factor=math.nan), 'capacity_factor=nan'),
    (dict(n_expert=4, aux_loss=-0.1), 'aux_loss=-0.1'),
    (dict(n_expert=4, z_loss=-0.1), 'z_loss=-0.1'),
])
def test_config_errors_name_the_setting(settings, says):
    with pytest.raises(ValueError, match=says):
        GPTConfig(**settings)


# --- gradient checkpointing -----------------------------------------------------------------------

def large(name, **changes):
    """A model of which every operation is large enough for native.cpp, if it is there."""
    return build(name, n_embd=64, **({} if MODELS[name][0] is GPT else dict(state_size=16)), **changes).train()


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dropout', [0.0, 0.2])
@every_model
def test_checkpointing_changes_no_bit(name, dropout, autocast):
    model, idx, targets, calls, results = perturb(large(name, dropout=dropout)), *tokens(2, 2, 75), defaultdict(int), {}
    layers = next(module for path, module in model.named_modules() if path.endswith('layers'))
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.update({key: calls[key] + 1}))
    for key in (False, True):
        model.gradient_checkpointing = key
        torch.manual_seed(7)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            loss = model(idx, targets)[1]
        model.zero_grad()
        loss.backward()
        results[key] = [loss, torch.get_rng_state(), *(p.grad.clone() for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(results[False], results[True]))
    assert calls == {False: len(layers), True: 2 * len(layers)}
    if dropout:                                                 # it was at work
        assert not torch.equal(loss, model(idx, targets)[1])
    key = 'other'                                               # what computes nothing twice
    model.train().step(idx)
    model.eval()(idx, targets)[1].backward()
    assert calls['other'] == 2 * len(layers)


@every_model
def test_checkpointing_saves_memory(name):
    model, idx, sizes = large(name, n_layer=4), tokens(4, 128), {}
    for checkpointing in (False, True):
        model.gradient_checkpointing, kept = checkpointing, {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(u, kept=kept):
            kept[u.untyped_storage().data_ptr()] = u
            return u
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda u: u):
            loss = model(idx, idx)[1]
        sizes[checkpointing] = sum(u.untyped_storage().nbytes() for at, u in kept.items() if at not in weights)
        del loss
    assert sizes[True] < 0.3 * sizes[False], f'{sizes[True]:,} of {sizes[False]:,} bytes'


def test_every_parameter_has_a_gradient_under_ddp():
    """Else DistributedDataParallel would refuse the second step."""
    model, idx = build('gpt-experts').train(), tokens(1, 1)     # a token does not reach all experts of a layer
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for checkpointing in (False, False, True, True):
            model.gradient_checkpointing = checkpointing
            model.zero_grad()
            parallel(idx, idx)[1].backward()
            assert all(p.grad is not None for p in model.parameters())
            assert any(
                (p.grad == 0).flatten(1).all(1).any()
                for name, p in model.named_parameters()
                if 'experts' in name
            )
    finally:
        dist.destroy_process_group()
