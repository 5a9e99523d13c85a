"""native.py's Tape: one token after another without Python gives the very numbers of the layers, whatever happens in between."""
import copy

import pytest
import torch

from mambino.weights import adapters
from mambino.weights import checkpoint
from mambino.kernels import native
from mambino.kernels import ops
from mambino.weights import quantize
from helpers.models import perturb

pytestmark = pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
KINDS = dict(
    gpt=('gpt', dict(n_head=2, n_kv_head=1, qk_norm=True)), window=('gpt', dict(n_head=2, window=20)),
    mamba1=('mamba', dict(version=1)), mamba2=('mamba', dict(state_size=16, head_dim=16)),
    hybrid=('hybrid', dict(n_head=2, window=20, state_size=16, ssm_head_dim=16)),
    parallel=('hybrid', dict(n_head=2, window=0, state_size=16, ssm_head_dim=16, layout='parallel', gate=False, branch_norm=False)))


def model(kind, how='float32'):
    torch.manual_seed(0)
    kind, fields = KINDS[kind]
    net = perturb(checkpoint.build(kind, dict(fields, n_layer=2, n_embd=32, vocab_size=50, block_size=64))).eval()
    return net if how == 'float32' else quantize.quantize(net, how)


def walk(net, n, state=None, B=2, seed=0):
    """The logits of n tokens given one by one after a prompt of 5, and the state."""
    ids = torch.randint(50, (B, n), generator=torch.Generator().manual_seed(seed))
    if state is None:
        state = net.step(ids[:, :5])[1]
    out = []
    for i in range(n):
        logits, state = net.step(ids[:, i:i + 1], state)
        out.append(logits)
    return torch.cat(out, 1), state


@pytest.fixture
def plainly(monkeypatch):
    """plainly(f, …): f with the layers one by one, as if there were no tape."""
    def plainly(f, *args, **how):
        with monkeypatch.context() as patch:
            patch.setattr(native, 'layered', lambda net, layers, x, state, *how: layers(x, state, *how))
            return f(*args, **how)
    return plainly


def tapes(net):
    """The good tapes of a model."""
    return [tape for tape in native.Tape.of.get(net, {}).values() if tape and tape.good]


def replays(monkeypatch):
    """A list that grows with every replay."""
    seen, replay = [], native.Tape.replay
    monkeypatch.setattr(native.Tape, 'replay', lambda self, inputs: seen.append(1) or replay(self, inputs))
    return seen


@pytest.mark.parametrize('how', ['float32', 'int8', 'int4', 'bfloat16'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_tape_gives_the_very_numbers(kind, how, plainly, monkeypatch):
    net, seen = model(kind, how), replays(monkeypatch)
    got, state = walk(net, 90)                              # past a cache's 64 places, and round a ring
    assert len(seen) > 70
    want, wanted = plainly(walk, net, 90)
    assert len(seen) < 90 and torch.equal(got, want)
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in state)
    with torch.no_grad():
        ids = torch.cat([torch.randint(50, (2, 90), generator=torch.Generator().manual_seed(0))[:, :5]] +
                        [torch.randint(50, (2, 90), generator=torch.Generator().manual_seed(0))], 1)
        assert (net(ids)[0][:, 5:] - got).abs().max() < 1e-4


@pytest.mark.parametrize('kind', ['gpt', 'mamba2', 'hybrid'])
def test_sequences_in_turns_keep_apart(kind, plainly, monkeypatch):
    """Two conversations of one model, by turns, of different numbers of rows; an older state is not written to."""
    net = model(kind)
    a, b = walk(net, 9)[1], walk(net, 9, B=3, seed=1)[1]
    old = {name: value.clone() for name, value in a.items()}, dict(a)
    mine, yours, seen = [], [], replays(monkeypatch)
    for turn in range(4):
        out, a = walk(net, 7, a, seed=turn)
        mine.append(out)
        out, b = walk(net, 7, b, B=3, seed=10 + turn)
        yours.append(out)
    assert len(seen) > 48 and len(tapes(net)) == 2          # of 56 steps
    assert torch.equal(old[0]['pos'], old[1]['pos'])

    def again():
        a, b, out = walk(net, 9)[1], walk(net, 9, B=3, seed=1)[1], ([], [])
        for turn in range(4):
            more, a = walk(net, 7, a, seed=turn)
            out[0].append(more)
            more, b = walk(net, 7, b, B=3, seed=10 + turn)
            out[1].append(more)
        return out
    want = plainly(again)
    assert all(map(torch.equal, mine + yours, want[0] + want[1]))


@pytest.mark.parametrize('kind', ['gpt', 'mamba1', 'mamba2', 'hybrid'])
@pytest.mark.parametrize('change', ['data', 'copy', 'quantize', 'lora', 'merge', 'double', 'hook'])
def test_a_changed_model_is_not_replayed(kind, change, plainly):
    net = model(kind)
    state = walk(net, 8)[1]                                 # now there is a tape
    assert tapes(net)
    start = lambda: {name: value.clone() for name, value in state.items()}
    target = 'q_proj' if kind == 'gpt' else 'in_proj'
    if change == 'data':
        for p in net.parameters():
            p.data = p.data * 1.1
    elif change == 'copy':
        net = copy.deepcopy(net)
        with torch.no_grad():
            [p.mul_(1.1) for p in net.parameters()]
    elif change == 'quantize':
        quantize.quantize(net, 'int8')
    elif change in ('lora', 'merge'):
        adapters.lora(net, target)
        with torch.no_grad():
            [p.add_(0.1) for name, p in net.named_parameters() if '.lora.' in name]
        adapters.merge(net) if change == 'merge' else None
        net.eval()
    elif change == 'double':
        net.double().float()
        [setattr(p, 'data', p.data * 0.9) for p in net.parameters()]
    elif change == 'hook':
        net.get_submodule(next(n for n, _ in net.named_modules() if n.endswith(target))).register_forward_hook(lambda m, x, y: y * 2)
    got = walk(net, 8, {**state, 'pos': state['pos'].clone()} if change != 'copy' else start())[0]
    native.Tape.of.pop(net, None)
    assert got.isfinite().all()
    fresh = walk(model(kind), 8)[1]                         # the state before
    want = plainly(walk, net, 8, fresh)[0]
    assert torch.equal(got, want)


def test_an_interrupted_record_is_none(monkeypatch, plainly):
    net, ids = model('gpt'), torch.zeros(2, 1, dtype=torch.long)
    state = net.step(torch.zeros(2, 5, dtype=torch.long))[1]
    state = net.step(ids, state)[1]                         # its place is known: the next step is noted
    with monkeypatch.context() as patch:
        patch.setattr(native, 'mlp_step', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            net.step(ids, {name: value.clone() if name == 'pos' else value for name, value in state.items()})
    assert not native.Tape.recording and not tapes(net)
    assert walk(net, 8, state)[0].isfinite().all()


def test_a_state_in_another_order_of_memory(plainly):
    """Layers copy such a state and go on with the copy: it may be given twice."""
    net = model('mamba2')
    state = walk(net, 3)[1]
    odd = {name: value.transpose(0, 1).contiguous().transpose(0, 1) if value.ndim > 1 else value for name, value in state.items()}
    ids = torch.zeros(2, 1, dtype=torch.long)
    same = [net.step(ids, odd)[0] for _ in range(5)]
    assert all(torch.equal(one, same[0]) for one in same)


def test_what_pytorch_computes_is_never_left_out(monkeypatch):
    """Experts are PyTorch's work: no tape; nor one of odd sizes that native.cpp does not take."""
    seen = replays(monkeypatch)
    for kind, fields in (('gpt', dict(n_head=2, n_expert=4)), ('gpt', dict(n_head=4)), ('mamba', dict(state_size=8, head_dim=8))):
        torch.manual_seed(0)
        net = perturb(checkpoint.build(kind, dict(fields, n_layer=2, n_embd=32, vocab_size=50))).eval()
        got = walk(net, 12)[0]
        ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert (net(torch.cat((ids[:, :5], ids), 1))[0][:, 5:] - got).abs().max() < 1e-4
        assert not tapes(net)
    assert not seen


def test_training_takes_no_tape(monkeypatch):
    seen, net = replays(monkeypatch), model('gpt')
    state = walk(net, 8)[1]
    n = len(seen)
    net.train()
    net.step(torch.zeros(2, 1, dtype=torch.long), state)
    with torch.enable_grad():
        net.eval().body(torch.zeros(2, 1, dtype=torch.long), dict(state))
    with monkeypatch.context() as patch:
        patch.setattr(ops, 'use_native', lambda *tensors: False)
        net.step(torch.zeros(2, 1, dtype=torch.long), state)
    assert len(seen) == n
