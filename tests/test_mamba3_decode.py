"""Generation with Mamba-3 on a CPU: a token by a plan, states in bf16, rows, sessions, rounded weights."""
import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from test_decode import build, cloned, model, tokens, walk
from test_state_dtype import BF16, agree

from mambino.cache import kept_as
from mambino.kernels import cpu, native
from mambino.sample import decode, sessions
from mambino.sample.generation import prefill
from mambino.sample.sessions import Session
from mambino.serve.rows import Rows
from mambino.weights import quantize
from mambino.weights.adapters import add_prefix
from model_mamba import Mamba3Mixer

compiled = pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = dict(version=3, state_size=16, head_dim=16)
SHAPES = [
    dict(), dict(n_groups=2), dict(state_size=48), dict(state_size=80, rope_fraction=0.7), dict(rope_fraction=1.0),
    dict(head_norm=True), dict(mimo_rank=2), dict(mimo_rank=3, n_groups=4), dict(mimo_rank=4, state_size=48),
    dict(mimo_rank=4, head_norm=True, rope_fraction=1.0)]
every_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)


def net_of(shape, **more):
    return build('mamba', **{**SMALL, **shape, **more})


def apart(one, other):
    """The largest difference of two states; angles, modulo a whole turn."""
    assert one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in one)
    turns = [name for name in one if name.startswith('turn')]
    largest = [(one[name] - other[name]).abs().max().item() for name in one if name not in turns]
    return max(largest + [math.pi - ((one[name] - other[name]).abs() - math.pi).abs().min().item() for name in turns])


# --- a token by a plan

@compiled
@every_shape
def test_a_plan_goes_on_from_any_cut_as_forward(shape):
    """From the states that the kernels, the plain operations and a plan leave, in turns: each may have any other's."""
    net, ids = net_of(shape), tokens(40, 3)
    want = net(ids)[0]
    logits, state = net.step(ids[:, :7])
    out = [logits]
    for i in range(7, 40):
        idx, before = ids[:, i:i + 1], cloned(state)
        assert decode.ready(net, idx, state, 0), 'no plan'
        logits, state = decode.step(net, idx, state)
        with cpu.portable():
            other, after = net.step(idx, before)
        assert (logits - other).abs().max() < 1e-5 and apart(state, after) < 1e-5
        state = after if i % 2 else state
        out.append(logits)
    assert (torch.cat(out, 1) - want).abs().max() < 2e-5


@compiled
@every_shape
def test_a_state_kept_in_bf16(shape):
    net = net_of(shape)
    state = kept_as(net.step(tokens(6, 3))[1], BF16)
    own = cloned(state)
    want, state = net.step(tokens(1, 3), state)
    assert decode.ready(net, tokens(1, 3), own, 0)
    got, own = decode.step(net, tokens(1, 3), own)
    assert (got - want).abs().max() < 1e-5 and own['ssm.0'].dtype == BF16 and own['turn.0'].dtype == torch.float64
    agree(own, state)


@compiled
@pytest.mark.parametrize('dtype', [torch.float32, BF16])
def test_one_thread_or_more_are_the_same_bits(dtype):
    net, got = net_of(dict(mimo_rank=2)), []
    state = kept_as(net.step(tokens(5, 16))[1], dtype)
    for n in (1, 3):
        torch.set_num_threads(n)
        got.append(walk(net, 3, cloned(state), B=16))
    torch.set_num_threads(1)
    assert torch.equal(got[0][0], got[1][0])
    assert all(torch.equal(got[0][1][name], got[1][1][name]) for name in state)


@compiled
def test_angles_after_many_tokens():
    """The same token again and again: the first layer's grow by the same, in float64; fp32 would be 1e-4 away."""
    net, idx, n = net_of(dict(), n_layer=1), torch.tensor([[3]]), 5000
    state = net.step(idx)[1]
    one = state['turn.0'].clone()
    for _ in range(n - 1):
        _, state = decode.step(net, idx, state)
    step = decode.step(net, idx, cloned(state))[1]['turn.0'] - state['turn.0']
    exact = (state['turn.0'] - one - step * (n - 1) + math.pi) % math.tau - math.pi
    assert exact.abs().max() < 1e-7


@compiled
def test_numbers_that_are_none_stay_so():
    """A NaN of any bits, in a state or a weight: rounding to bf16 carries it into no other number."""
    net = net_of(dict(state_size=48))
    state = kept_as(net.step(tokens(5))[1], BF16)
    for value in (torch.inf, torch.nan):
        broken = cloned(state)
        broken['ssm.0'].flatten()[0] = value
        assert not decode.step(net, tokens(1), broken)[1]['ssm.0'].flatten()[0].isfinite()
    for name in ('B_bias', 'dt_bias'):
        broken = copy.deepcopy(net)
        weight = getattr(broken.backbone.layers[0].mixer, name).data
        weight[:] = torch.tensor([0x7fffffff], dtype=torch.int32).view(torch.float32)
        logits, after = decode.step(broken, tokens(1), cloned(state))
        assert after['ssm.0'].isnan().all() and not logits.isfinite().any()


@compiled
@pytest.mark.parametrize('change', ['dt_bias', 'C_bias', 'mimo_z', 'norm', 'split', 'B_norm'])
def test_parts_of_other_sizes_take_no_plan(change):
    net = net_of(dict(mimo_rank=2, head_norm=True))
    state, mixer = net.step(tokens(4))[1], net.backbone.layers[1].mixer
    assert decode.ready(net, tokens(1), state, 0)
    if change == 'split':
        mixer.split = [*mixer.split[:-1], mixer.split[-1] - 1]
    elif 'norm' in change:
        norm = getattr(mixer, change)
        norm.weight = torch.nn.Parameter(norm.weight[:-1])
    else:
        setattr(mixer, change, torch.nn.Parameter(getattr(mixer, change)[:-1]))
    decode.recipes.pop(net)
    assert decode.ready(net, tokens(1), state, 0) is None


# --- rows, sessions

def test_rows_of_a_server_come_and_go():
    net, texts = model('mimo'), tokens(40, 4)
    rows = Rows(net, 4)
    states = [net.step(texts[i:i + 1, :n]) for i, n in enumerate((3, 9, 20, 5))]
    for logits, state in states[:3]:
        rows.add(state, logits[:, -1])
    at, lengths = [0, 1, 2], [3, 9, 20, 5]

    def advance(n):
        for _ in range(n):
            rows.advance(torch.stack([texts[i, lengths[i]] for i in at]))
            for i in at:
                lengths[i] += 1
    advance(3)
    rows.remove(0)
    at = [2, 1]
    rows.add(states[3][1], states[3][0][:, -1])
    at.append(3)
    advance(5)
    for row, i in enumerate(at):
        want = net(texts[i:i + 1, :lengths[i]])[0][:, -1]
        assert (rows.logits[row] - want).abs().max() < 1e-5
        state = rows.state_of(row)
        assert apart(state, net.step(texts[i:i + 1, :lengths[i]])[1]) < 1e-5
        assert state['turn.0'].dtype == torch.float64


class Tok:
    vocab_size, eot = 50, 49


def drawn(session, net, n, ids=()):
    it = session.go_on(net, Tok, list(ids), temperature=1.0)
    return [next(it)[0] for _ in range(n)]


GO_ON = """
import sys
sys.path[:0] = {paths!r}
from test_mamba3_decode import drawn, model, sessions
net = model('mamba3')
session = sessions.load_session({path!r}, 'x', 'cpu', 50)
sessions.check_state(net, session, {path!r})
assert str(session.state['turn.0'].dtype) == 'torch.float64'
print(drawn(session, net, 20))
"""


def test_a_session_goes_on_in_another_process(tmp_path):
    """Which has no kernels at all."""
    net, session = model('mamba3'), Session(3)
    want = drawn(Session(3), net, 30, [1, 2, 3])
    assert drawn(session, net, 10, [1, 2, 3]) == want[:10]
    path = str(tmp_path / 'sessions' / 'a.pt')
    session.save(path, 'x')
    here = os.path.dirname(os.path.abspath(__file__))
    code = GO_ON.format(paths=[here, os.path.dirname(here)], path=path)
    plain = {**os.environ, 'MAMBINO_KERNELS': '0'}
    said = subprocess.run([sys.executable, '-c', code], env=plain, capture_output=True, text=True)
    assert said.stdout.strip() == str(want[10:]), said.stderr
    again = sessions.load_session(path, 'x', 'cpu', 50)     # and here, with it
    sessions.check_state(net, again, path)
    assert drawn(again, net, 20) == want[10:]


@pytest.mark.parametrize('part, dtype', [
    ('turn.0', torch.int64), ('last_b.0', torch.float64), ('ssm.0', torch.float64)])
def test_a_session_of_other_numbers_is_refused(part, dtype, capsys):
    net, session = model('mamba3'), Session(3)
    drawn(session, net, 3, [1])
    session.state[part] = session.state[part].to(dtype)
    with pytest.raises(SystemExit):
        sessions.check_state(net, session, 'a.pt')
    assert part in capsys.readouterr().err


# --- rounded weights

@pytest.mark.parametrize('precision', quantize.PRECISIONS)
@pytest.mark.parametrize('kind, fields', [
    ('mamba', dict(SMALL)), ('hybrid', dict(version=3, n_head=2, state_size=16, ssm_head_dim=16, low_rank=8))])
def test_the_rows_of_scalars_are_exact(kind, fields, precision):
    net = build(kind, **fields)
    idx = tokens(9)
    for name, mixer in [(name, m) for name, m in net.named_modules() if isinstance(m, Mamba3Mixer)]:
        before = getattr(mixer.in_proj, 'up', mixer.in_proj).weight.detach().clone()
        rounded = quantize.quantize_model(copy.deepcopy(net), precision)
        mixer = rounded.get_submodule(name)
        matrix = getattr(mixer.in_proj, 'up', mixer.in_proj)
        n = sum(mixer.split[4:])
        assert torch.equal(matrix.weight[-n:], before[-n:])
        assert not torch.equal(matrix.weight[:-n], before[:-n])
        x = torch.randn(3, before.shape[1])
        assert (matrix(x)[:, -n:] - x @ before[-n:].T).abs().max() < 1e-5
    again = quantize.prepare_quantized(build(kind, **fields), precision)
    again.load_state_dict(rounded.state_dict())
    assert torch.equal(again(idx)[0], rounded(idx)[0])


@pytest.mark.parametrize('precision', quantize.PRECISIONS)
def test_rounding_costs_what_it_costs_a_mamba2(precision):
    """Of logits of 200 tokens, by root mean squares."""
    def lost(version):
        net, ids = build('mamba', n_embd=64, version=version, state_size=32, head_dim=16), tokens(200, 4)
        want = net(ids)[0]
        got = quantize.quantize_model(net, precision)(ids)[0]
        return float((got - want).norm() / want.norm())
    with torch.no_grad():
        assert lost(3) < 1.5 * lost(2)


def test_a_prefix_is_read_as_a_state():
    """A prompt's first token, by a plan or not, goes on from the learned angles."""
    base, ids = model('mamba3'), tokens(20, 1)
    net = add_prefix(copy.deepcopy(base), 6, ids[0, :6])
    assert {value.dtype for name, value in net.empty_state(1).items() if 'turn' in name} == {torch.float64}
    want = base(ids)[0][:, 6:]
    assert (net(ids[:, 6:])[0] - want).abs().max() < 1e-5
    _, state, _ = prefill(net, ids[0, 6:10].tolist())
    for i in range(10, 20):
        logits, state = decode.step(net, ids[:, i:i + 1], state)
        assert (logits - want[:, i - 6:i - 5]).abs().max() < 1e-5
