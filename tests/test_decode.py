"""decode.py: a token by a plan has the numbers of net.step, whatever happens in between; the rest takes net.step."""
import copy
import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
from helpers.models import perturb

import model_gpt
from mambino.kernels import cpu, native
from mambino.language_model import SwiGLU
from mambino.sample import decode, generation, parts
from mambino.weights import adapters, checkpoint, quantize

pytestmark = pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
MAMBA = dict(state_size=16, head_dim=16)
HYBRID = dict(n_head=2, window=20, state_size=16, ssm_head_dim=16)
KINDS = dict(
    gpt=('gpt', dict(n_head=2, n_kv_head=1, qk_norm=True)),
    window=('gpt', dict(n_head=2, window=20)),
    untied=('gpt', dict(n_head=2, tie_embeddings=False)),
    moe=('gpt', dict(n_head=2, n_expert=4)),
    mamba1=('mamba', dict(version=1)),
    mamba2=('mamba', MAMBA),
    groups=('mamba', dict(MAMBA, n_groups=2)),
    mamba3=('mamba', dict(MAMBA, version=3, intermediate_size=48)),
    mimo=('mamba', dict(MAMBA, version=3, mimo_rank=4, n_groups=2, head_norm=True)),
    hybrid=('hybrid', HYBRID),
    parallel=('hybrid', dict(HYBRID, window=0, layout='parallel', gate=False, branch_norm=False)),
    mixed=('hybrid', dict(HYBRID, layout='parallel', qk_norm=True)),
)
SEVERAL = pytest.mark.parametrize('kind', ['gpt', 'mamba1', 'mamba2', 'hybrid'])
CLOSE = 1e-5                                                # to what PyTorch computes in another order
# int8 and int4 are multiplied by x in 16 bits, and a difference of 1e-7 in x may be one of 3e-5 of its largest
# number in those: measured 3.3e-4
ROUNDED = 1e-3


def build(kind, **fields):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=32, vocab_size=50, block_size=64)
    return perturb(checkpoint.build(kind, {**sizes, **fields})).eval()


def model(kind, way='float32'):
    family, fields = KINDS[kind]
    net = build(family, **fields)
    return net if way == 'float32' else quantize.quantize_model(net, way)


def tokens(n, B=2, seed=0):
    return torch.randint(50, (B, n), generator=torch.Generator().manual_seed(seed))


def by_model(net, idx, state):
    return net.step(idx, state)


def by_new_plan(net, idx, state):
    decode.recipes.pop(net, None)
    return decode.step(net, idx, state)


def walk(net, n, state=None, B=2, seed=0, step=decode.step):
    """The logits of n tokens given one by one, if there is no state after their first 5; the state."""
    ids, out = tokens(n, B, seed), []
    if state is None:
        state = net.step(ids[:, :5])[1]
    for i in range(n):
        logits, state = step(net, ids[:, i:i + 1], state)
        out.append(logits)
    return torch.cat(out, 1), state


def cloned(state):
    return {name: value.clone() for name, value in state.items()}


def close(got, want, way='float32'):
    tolerance = ROUNDED if way in ('int8', 'int4') else CLOSE
    return got.shape == want.shape and bool((got - want).abs().max() < tolerance)


def plans(net):
    return list(decode.recipes[net].plans.values()) if net in decode.recipes else []


@pytest.fixture
def replays(monkeypatch):
    """A list that grows with every token that a plan computes."""
    seen, replay = [], decode.Plan.replay

    def counted(self, *args):
        seen.append(self)
        return replay(self, *args)
    monkeypatch.setattr(decode.Plan, 'replay', counted)
    return seen


# --- the numbers

@pytest.mark.parametrize('way', ['float32', 'int8', 'int4', 'bfloat16'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_plan_gives_the_numbers_of_the_model(kind, way, replays):
    net = model(kind, way)
    got, state = walk(net, 90)                              # past a cache's 64 slots, and round a ring
    assert len(replays) >= 89 and len(set(map(id, replays))) <= 2
    want, reference = walk(net, 90, step=by_model)
    assert close(got, want, way) and state.keys() == reference.keys()
    assert all(close(state[name], reference[name], way) for name in state)
    want, reference = walk(net, 90, step=by_new_plan)
    assert torch.equal(got, want) and all(torch.equal(state[name], reference[name]) for name in state)
    with torch.no_grad(), cpu.portable():                   # many rows of rounded weights round x, too
        logits, _ = net(torch.cat((tokens(90)[:, :5], tokens(90)), 1))
    assert (logits[:, 5:] - got).abs().max() < (1e-4 if way in ('float32', 'bfloat16') else ROUNDED)


@pytest.mark.parametrize('way', ['float32', 'int8', 'int4', 'bfloat16'])
@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind not in ('groups', 'mimo', 'mixed')])
def test_sizes_that_fill_no_vector(kind, way, replays):
    """Widths that are no multiple of a vector or of a group, and rows up to the limit."""
    family, fields = KINDS[kind]
    widths = dict(gpt=dict(n_embd=72, head_dim=16), mamba=dict(n_embd=40), hybrid=dict(n_embd=40, head_dim=16))
    net = build(family, **{**fields, **widths[family], 'vocab_size': 51})
    net = net if way == 'float32' else quantize.quantize_model(net, way)
    for B in (1, 3, 7, 32):
        before = len(replays)
        assert close(walk(net, 4, B=B)[0], walk(net, 4, B=B, step=by_model)[0], way)
        assert len(replays) == before + 4


@SEVERAL
def test_the_first_token_after_a_prompt_takes_a_plan(kind, replays):
    net = model(kind)
    walk(net, 1)
    assert len(replays) == 1


def test_beyond_block_size_with_a_window(replays):
    """A model without one attends to the last block_size tokens from there on: generation.step."""
    net, ids = model('gpt'), tokens(150)

    def generate():
        state, out = net.step(ids[:, :60])[1], []
        for token in ids[:, 60:].split(1, 1):
            logits, state = generation.step(net, token, state)
            out.append(logits)
        return torch.cat(out, 1), state
    got, state = generate()
    assert len(replays) >= 89 and net.config.window == 0
    assert {value.shape[2] for name, value in state.items() if name[0] in 'kv'} == {64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, 'library', lambda: None)
        want, _ = generate()
    assert close(got, want)


def test_an_id_outside_the_vocabulary_is_refused_and_changes_nothing():
    net = model('mamba2')
    state = walk(net, 3)[1]
    before = cloned(state)
    with pytest.raises(IndexError):
        decode.step(net, torch.full((2, 1), 50), state)
    assert all(torch.equal(state[name], before[name]) for name in state)


# --- several states

@pytest.mark.parametrize('kind', ['gpt', 'mamba2', 'hybrid'])
def test_sequences_in_turns_keep_apart(kind, replays):
    """Two conversations by turns, of different numbers of rows; an older state is not written to."""
    net = model(kind)

    def converse(step):
        a, b, out = walk(net, 9, step=step)[1], walk(net, 9, B=3, seed=1, step=step)[1], ([], [])
        old = a['pos'], a['pos'].clone()
        for turn in range(4):
            logits, a = walk(net, 7, a, seed=turn, step=step)
            out[0].append(logits)
            logits, b = walk(net, 7, b, B=3, seed=10 + turn, step=step)
            out[1].append(logits)
        assert torch.equal(*old)
        return out[0] + out[1]
    got = converse(decode.step)
    assert len(replays) == 74 and len(plans(net)) == 2
    assert all(map(torch.equal, got, converse(by_new_plan)))
    assert all(map(close, got, converse(by_model)))


def test_only_a_few_plans_are_kept(replays):
    net = model('hybrid')
    states = [walk(net, 1, seed=seed)[1] for seed in range(7)]
    got = {}
    for turn in range(2):
        for seed, state in enumerate(states):
            got[seed], states[seed] = walk(net, 2, state, seed=turn)
    assert len(plans(net)) == decode.PLANS and len(replays) == 7 * 5
    for seed in range(7):
        state = walk(net, 1, seed=seed, step=by_model)[1]
        for turn in range(2):
            want, state = walk(net, 2, state, seed=turn, step=by_model)
        assert close(got[seed], want)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_that_are_taken_and_joined(kind, replays):
    net = model(kind)

    def shuffle(step):
        a, b = walk(net, 12, step=step)[1], walk(net, 70, B=1, seed=1, step=step)[1]
        state = generation.join_states([a, b])                     # caches of different lengths
        out, state = walk(net, 3, state, B=3, step=step)
        state = {name: generation.select_rows(value, [2, 0]) for name, value in state.items()}
        more, _ = walk(net, 3, state, step=step)
        return torch.cat((out.flatten(), more.flatten()))
    got = shuffle(decode.step)
    assert len(replays) >= 85
    assert close(got, shuffle(by_model))


def test_two_threads_at_once():
    """Each steps the model with states of its own, while the other makes plans of the same recipe."""
    net, out = model('hybrid'), {}
    want = {seed: walk(net, 60, seed=seed, step=by_new_plan)[0] for seed in range(6)}

    def work(seeds):
        for turn in range(4):
            out.update({(seed, turn): walk(net, 60, seed=seed)[0] for seed in seeds})
    threads = [threading.Thread(target=work, args=(seeds,)) for seeds in ((0, 1, 2), (3, 4, 5))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(out) == 24
    assert all(torch.equal(logits, want[seed]) for (seed, _), logits in out.items())


def test_a_plan_keeps_no_state_and_a_recipe_no_model():
    net = model('hybrid')
    state = walk(net, 3)[1]
    tensors = [weakref.ref(value) for value in state.values()]
    del state
    gc.collect()
    assert plans(net) and not any(tensor() is not None for tensor in tensors)
    known = weakref.ref(net)
    del net
    gc.collect()
    assert known() is None


# --- what changes between tokens

@SEVERAL
@pytest.mark.parametrize('change', [
    'data', 'copy', 'quantize', 'lora', 'merge', 'double', 'hook', 'pre_hook', 'module'])
def test_a_changed_model_takes_no_old_plan(kind, change, replays):
    net = model(kind)
    state = walk(net, 8)[1]                                 # now there is a plan
    assert plans(net)
    target = 'q_proj' if kind == 'gpt' else 'in_proj'
    path = next(path for path, _ in net.named_modules() if path.endswith(target))
    before = len(replays)
    if change == 'data':
        for p in net.parameters():
            p.data = p.data * 1.1
    elif change == 'copy':
        net = copy.deepcopy(net)
        with torch.no_grad():
            [p.mul_(1.1) for p in net.parameters()]
    elif change == 'quantize':
        quantize.quantize_model(net, 'int8')
    elif change in ('lora', 'merge'):
        adapters.add_lora(net, target)
        with torch.no_grad():
            [p.add_(0.1) for name, p in net.named_parameters() if '.lora.' in name]
        adapters.merge_adapters(net) if change == 'merge' else None
        net.eval()
    elif change == 'double':
        net.double().float()
        [setattr(p, 'data', p.data * 0.9) for p in net.parameters()]
    elif change == 'hook':
        net.get_submodule(path).register_forward_hook(lambda m, x, y: y * 2)
    elif change == 'pre_hook':
        net.get_submodule(path).register_forward_pre_hook(lambda m, x: (x[0] * 2,))
    elif change == 'module':
        new = torch.nn.Linear(*reversed(net.get_submodule(path).weight.shape), bias=False)
        net.set_submodule(path, new)
    old = cloned(state)
    got = walk(net, 8, state)[0]
    assert got.isfinite().all() and not close(got, walk(model(kind), 8, cloned(old))[0])
    assert (len(replays) > before + 8) == (change not in ('lora', 'hook', 'pre_hook'))
    way = 'int8' if change == 'quantize' else 'float32'
    assert close(got, walk(net, 8, cloned(old), step=by_model)[0], way)
    assert torch.equal(got, walk(net, 8, cloned(old), step=by_new_plan)[0])


def test_an_interrupted_plan_is_none(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    net, ids = model('gpt'), tokens(1)
    state = walk(net, 2)[1]
    decode.recipes.pop(net)
    with monkeypatch.context() as patch:
        patch.setitem(parts.PARTS, SwiGLU, interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode.step(net, ids, state)
    assert net not in decode.recipes and int(state['pos'][0]) == 4
    assert close(walk(net, 8, cloned(state))[0], walk(net, 8, cloned(state), step=by_model)[0])
    assert plans(net)


@SEVERAL
def test_a_cache_that_is_replaced_or_written_to(kind, replays):
    net = model(kind)
    state = walk(net, 6)[1]
    for change in (lambda value: value.clone(), lambda value: value.mul_(0.5)):
        state = {name: value if name == 'pos' else change(value) for name, value in state.items()}
        want = walk(net, 3, cloned(state), step=by_model)[0]
        got, state = walk(net, 3, state)
        assert close(got, want)
    assert len(replays) == 12


# --- what takes net.step

def test_a_state_in_another_order_of_memory(replays):
    """net.step computes with a copy of such a state: it may be given twice."""
    net = model('mamba2')
    state = walk(net, 3)[1]
    odd = dict(state)
    for name, value in state.items():
        if value.ndim > 1:
            odd[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
    before = len(replays)
    same = [decode.step(net, tokens(1), odd)[0] for _ in range(5)]
    assert all(torch.equal(one, same[0]) for one in same) and len(replays) == before


def test_what_pytorch_computes_is_never_left_out(replays, monkeypatch):
    """Experts are called; of odd sizes, which native.cpp does not take, there is no plan."""
    forward = mock.Mock(side_effect=model_gpt.MoE.forward)
    monkeypatch.setattr(model_gpt.MoE, 'forward', lambda self, x: forward(self, x))
    net = model('moe')
    walk(net, 12)
    assert len(replays) == 12 and forward.call_count == 2 * 13      # layers times the prompt and each token
    for kind, fields in (('gpt', dict(n_head=4)), ('mamba', dict(state_size=8, head_dim=8)),
                         ('hybrid', dict(HYBRID, low_rank=4)), ('hybrid', dict(HYBRID, n_head=4))):
        net = build(kind, **fields)
        got = walk(net, 12)[0]
        with torch.no_grad():
            logits, _ = net(torch.cat((tokens(12)[:, :5], tokens(12)), 1))
        assert (logits[:, 5:] - got).abs().max() < 1e-4
        assert not plans(net)
    assert len(replays) == 12


class Doubled(SwiGLU):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherNorm(model_gpt.RMSNorm):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize('path, new', [
    ('model.layers.1.mlp', Doubled), ('model.layers.0.input_layernorm', OtherNorm),
    ('model.norm', OtherNorm), ('model.layers.0.self_attn.q_norm', OtherNorm)])
def test_a_class_that_no_table_knows(path, new, replays):
    net = model('gpt')
    state = walk(net, 4)[1]
    before = len(replays)
    net.get_submodule(path).__class__ = new
    net = copy.deepcopy(net)
    got = walk(net, 4, cloned(state))[0]
    assert len(replays) == before and torch.equal(got, walk(net, 4, cloned(state), step=by_model)[0])


def test_a_model_of_another_class(replays):
    class Reversed(model_gpt.GPT):
        def step(self, *args, **settings):
            logits, state = super().step(*args, **settings)
            return -logits, state
    net = model('gpt')
    want, _ = walk(net, 4)
    before = len(replays)
    net.__class__ = Reversed
    decode.recipes.pop(net)
    assert close(walk(net, 4)[0], -want) and len(replays) == before


@SEVERAL
def test_other_dtypes(kind, replays):
    net = model(kind)
    state = walk(net, 3)[1]
    assert decode.ready(net, tokens(1), state, 0)
    half = {name: value if name == 'pos' else value.half() for name, value in state.items()}
    assert decode.ready(net, tokens(1), half, 0) is None
    with torch.autocast('cpu', torch.bfloat16):
        assert decode.step(net, tokens(1), cloned(state))[0].isfinite().all()
    assert len(replays) == 3
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            weight = p.data
            p.data = weight.bfloat16()
            assert decode.ready(net, tokens(1), state, 0) is None, name
            p.data = weight
    assert decode.ready(net, tokens(1), state, 0)


def test_many_rows_and_several_tokens(replays):
    net = model('hybrid')
    walk(net, 3, B=33)
    decode.step(net, tokens(2), net.step(tokens(5))[1])
    decode.step(net, tokens(1))
    decode.step(net, tokens(1), {'pos': torch.zeros(2, dtype=torch.long)})
    assert not replays


def test_training_takes_no_plan(replays, monkeypatch):
    net = model('gpt')
    state = walk(net, 8)[1]
    n = len(replays)
    decode.step(net.train(), tokens(1), cloned(state))
    net.eval()
    with monkeypatch.context() as patch:
        patch.setattr(native, 'library', lambda: None)
        decode.step(net, tokens(1), cloned(state))
    assert len(replays) == n
    with torch.enable_grad():
        logits, _ = decode.step(net, tokens(1), state)
    assert len(replays) == n + 1 and not logits.requires_grad


@pytest.mark.parametrize('switch', ['MAMBINO_NATIVE', 'MAMBINO_KERNELS'])
def test_compiled_code_can_be_turned_off(switch, replays, monkeypatch):
    net = model('hybrid')
    state = walk(net, 3)[1]
    n = len(replays)
    monkeypatch.setenv(switch, '0')
    monkeypatch.setattr(native, 'library', native.library.__wrapped__)
    assert decode.step(net, tokens(1), state)[0].isfinite().all() and len(replays) == n
