"""state_dtype: what is kept of a text between its tokens in bfloat16, in plans, rows, sessions, a server and scores."""
import re

import pytest
import torch
from helpers.jobs import Result, small_net, small_tok
from helpers.runs import refused, script
from helpers.sampling import open_run
from test_decode import KINDS, build, cloned, model, tokens, walk

from mambino.cache import is_rounded, kept_as
from mambino.kernels import native
from mambino.sample import decode, generation, score, sessions
from mambino.sample.generation import Rows, beam_search, generate, prefill
from mambino.sample.sessions import Session
from mambino.serve.rows import Rows as ServedRows
from mambino.serve.scheduler import Scheduler
from mambino.serve.states import size_of
from mambino.serve.work import Job, Room

BF16 = torch.bfloat16
every_kind = pytest.mark.parametrize('kind', KINDS)
several = pytest.mark.parametrize('kind', ['gpt', 'window', 'mamba1', 'mamba2', 'hybrid'])
compiled = pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
STEP = 2.0 ** -7                    # between two numbers of bf16, against their size: where fp32 differs in its last
                                    # bits, one may be rounded up, and the other down


def rounded(kind, way='float32'):
    """A model of KINDS whose states are kept in bf16."""
    net = model(kind, way)
    net.state_dtype = BF16
    return net


def dtypes(state):
    return {value.dtype for name, value in state.items() if is_rounded(name)}


def bytes_of(state):
    return sum(value.nbytes for name, value in state.items() if is_rounded(name))


def agree(one, other):
    """Whether two states, kept in bf16, are the same but for how numbers beside a tie were rounded."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        a, b = value.float(), other[name].float()
        assert value.dtype == other[name].dtype
        difference = (a - b).abs()
        assert bool((difference <= STEP * torch.maximum(a.abs(), b.abs()) + 1e-5).all()), name
        assert (difference > 1e-5).float().mean() < 0.02, name


# --- steps

@compiled
@pytest.mark.parametrize('B', [1, 3, 16])
@every_kind
def test_a_plan_has_the_numbers_of_the_model(kind, B):
    """Past a cache's 64 slots, and round a ring; each step from the same state."""
    net = model(kind)
    ids = tokens(70, B)
    state = kept_as(net.step(ids[:, :5])[1], BF16)
    for i in range(5, 70):
        idx = ids[:, i:i + 1]
        plan = decode.ready(net, idx, state, 0)
        assert plan or int(state['pos'].max()) == 64 and plan is None, 'a cache grows by net.step'
        own = cloned(state)
        want, state = net.step(idx, state)
        got, own = decode.step(net, idx, own)
        assert (got - want).abs().max() < 2e-3 * want.abs().max()       # a new key may be rounded otherwise
        assert dtypes(own) == dtypes(state) == {BF16}
        agree(own, state)


@compiled
@pytest.mark.parametrize('way', ['int8', 'bfloat16'])
@several
def test_a_plan_of_rounded_weights(kind, way):
    net = model(kind, way)
    state = kept_as(net.step(tokens(9))[1], BF16)
    own = cloned(state)
    want = net.step(tokens(1), state)[0]
    assert decode.ready(net, tokens(1), own, 0)
    assert (decode.step(net, tokens(1), own)[0] - want).abs().max() < 2e-2 * want.abs().max()


@compiled
@pytest.mark.parametrize('N', [16, 32, 48, 80])
def test_states_that_fill_no_two_vectors(N):
    net = build('mamba', state_size=N, head_dim=16, n_groups=2)
    state = kept_as(net.step(tokens(6, 3))[1], BF16)
    own = cloned(state)
    want, state = net.step(tokens(1, 3), state)
    assert decode.ready(net, tokens(1, 3), own, 0)
    got, own = decode.step(net, tokens(1, 3), own)
    assert (got - want).abs().max() < 1e-5                              # what is given out is not rounded
    agree(own, state)


@compiled
def test_one_thread_or_more_are_the_same_numbers():
    net = model('mamba2')
    state = kept_as(net.step(tokens(5, 16))[1], BF16)
    threads, got = torch.get_num_threads(), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        got.append(walk(net, 3, cloned(state), B=16))
    torch.set_num_threads(threads)
    for logits, after in got[1:]:
        assert torch.equal(logits, got[0][0]) and all(torch.equal(after[name], got[0][1][name]) for name in after)


@several
def test_a_state_keeps_the_precision_it_was_given(kind):
    """By the model itself, several tokens at once, and where caches grow."""
    net = model(kind)
    state = kept_as(net.step(tokens(5))[1], BF16)
    for t in (1, 7, 70, 1):
        state = net.step(tokens(t), state)[1]
        assert dtypes(state) == {BF16}
        assert all(value.dtype == torch.float32 for name, value in state.items() if name.startswith('conv'))


@compiled
def test_two_precisions_in_one_state_are_the_model_s():
    net = model('hybrid')
    state = net.step(tokens(5))[1]
    mixed = {name: value.to(BF16) if name.startswith('ssm') else value for name, value in state.items()}
    assert decode.ready(net, tokens(1), mixed, 0) is None
    assert decode.step(net, tokens(1), mixed)[0].isfinite().all()


@compiled
@pytest.mark.parametrize('payload', [0x7fc00000, 0x7f800001, 0x7fffffff, -1, -0x7fffff])
@pytest.mark.parametrize('kind, part, name', [
    ('gpt', 'v_proj.weight', 'v.0'), ('mamba1', 'conv1d.bias', 'ssm.0'), ('mamba2', 'conv1d.bias', 'ssm.0')])
def test_a_weight_that_is_no_number_makes_the_state_none(kind, part, name, payload):
    """A NaN of any bits: rounding must not carry it over into another sign and exponent."""
    net = build('mamba', state_size=48, head_dim=16) if kind == 'mamba2' else model(kind)
    state = kept_as(net.step(tokens(5))[1], BF16)
    for own, parameter in net.named_parameters():
        if own.endswith(part):
            parameter.data[:] = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    decode.recipes.pop(net, None)
    logits, after = decode.step(net, tokens(1), cloned(state))
    written = after[name][:, :, 5] if kind == 'gpt' else after[name]
    assert written.isnan().all() and not logits.isfinite().any()


@compiled
@pytest.mark.parametrize('value', [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize('kind, name', [('gpt', 'k.0'), ('mamba1', 'ssm.0'), ('mamba2', 'ssm.0')])
def test_a_state_that_is_no_number_stays_none(kind, name, value):
    net = build('mamba', state_size=48, head_dim=16) if kind == 'mamba2' else model(kind)
    state = kept_as(net.step(tokens(5))[1], BF16)
    state[name].flatten()[0] = value
    after = decode.step(net, tokens(1), state)[1]
    assert not after[name].flatten()[0].isfinite()


# --- rows, beams, sessions

@several
def test_rows_are_half_as_large(kind):
    net, full = rounded(kind), model(kind)
    read = prefill(net, [1, 2, 3])
    assert dtypes(read[1]) == {torch.float32}                           # prompts are read as ever
    rows, others = Rows(net, 50), Rows(full, 50)
    rows.add([read, read])
    others.add([prefill(full, [1, 2, 3])] * 2)
    assert dtypes(rows.state) == {BF16} and 2 * bytes_of(rows.state) == bytes_of(others.state)
    rows.advance(torch.tensor([4, 5]))
    rows.add([prefill(net, list(range(9)))])                            # one more, in fp32
    rows.keep([2, 0, 0])
    for _ in range(70):
        rows.advance(rows.draw(temperature=0))
    assert dtypes(rows.state) == {BF16} and rows.logits.isfinite().all()


def test_states_of_two_precisions_are_joined():
    net = model('mamba2')
    one, other = net.step(tokens(3))[1], kept_as(net.step(tokens(4))[1], BF16)
    joined = generation.join_states([one, other])
    assert dtypes(joined) == {torch.float32} and len(joined['pos']) == 4


@several
def test_beams_and_samples_with_rounded_states(kind):
    net = rounded(kind)
    found = beam_search(net, [1, 2], 3, 8, 50, lambda ids: False)
    assert len(found) == 3 and all(len(ids) == 8 for _, ids in found)
    assert sum(1 for _ in generate(net, [1, 2], 3, 80, 50)) == 80


class Tok:
    vocab_size, eot = 50, 49


def drawn(session, net, n, ids=()):
    it = session.go_on(net, Tok, list(ids), temperature=1.0)
    return [next(it)[0] for _ in range(n)]


@several
def test_a_session_goes_on_in_the_precision_of_today(kind, tmp_path):
    net = rounded(kind)
    whole = Session(3)
    want = drawn(whole, net, 30, [1, 2, 3])
    path = str(tmp_path / 'sessions' / 'a.pt')
    session, got = Session(3), []
    for n in (10, 20):
        got += drawn(session, net, n, [] if got else [1, 2, 3])
        session.save(path, 'x')
        session = sessions.load_session(path, 'x', 'cpu', 50)
        assert dtypes(session.state) == {BF16}                          # as it was saved
        sessions.check_state(net, session, path)
    assert got == want and dtypes(session.state) == {BF16}
    for dtype, kept in ((None, torch.float32), (BF16, BF16), (None, torch.float32)):
        net.state_dtype = dtype
        sessions.check_state(net, session, path)
        assert dtypes(session.state) == {kept}
        drawn(session, net, 5)
        assert dtypes(session.state) == {kept}
        session.save(path, 'x')
        session = sessions.load_session(path, 'x', 'cpu', 50)


@pytest.mark.parametrize('dtype', [torch.float64, torch.int32])
def test_a_session_of_another_kind_of_number_is_refused(dtype, tmp_path, capsys):
    net = model('mamba2')
    session = Session(3)
    drawn(session, net, 3, [1])
    session.state['ssm.0'] = session.state['ssm.0'].to(dtype)
    with pytest.raises(SystemExit):
        sessions.check_state(net, session, 'a.pt')
    assert 'ssm.0' in capsys.readouterr().err


# --- the server

@pytest.fixture
def served():
    """kind → a Scheduler of it, whose states are kept in bf16."""
    started = []

    def start(kind, **room):
        started.append(Scheduler(small_net(kind), small_tok(), Room(4, state_dtype='bfloat16', **room)))
        return started[-1]
    yield start
    for scheduler in started:
        scheduler.close()
        scheduler.net.state_dtype = None


@pytest.mark.parametrize('kind', ['gpt', 'mamba2', 'hybrid'])
def test_a_server_keeps_half(kind, served):
    net = small_net(kind)
    full = ServedRows(net, 4)
    scheduler = served(kind, kept_memory=0.1)
    job = Job([1, 2, 3, 4, 5], 20, temperature=0)
    result = Result(scheduler, job).wait()
    assert len(result.ids) == 20 or result.end.reason == 'stop'
    rows = scheduler.rows
    assert dtypes(rows.state) == {BF16} and rows.bytes_a_row(rows.slots) < full.bytes_a_row(full.slots)
    assert scheduler.stats()['bytes_a_row'] == rows.bytes_a_row(rows.slots)
    kept = [entry.state for entry in scheduler.kept.entries.values()]
    assert len(kept) == 2 and all(dtypes(state) == {BF16} for state in kept)
    assert scheduler.kept.bytes == sum(size_of(entry.state, entry.logits) + 200
                                       for entry in scheduler.kept.entries.values())
    again = Result(scheduler, job).wait()                               # from the kept state
    assert again.ids == result.ids and again.read.cached == 5
    rows = Rows(net, small_tok().vocab_size)                            # as sample.py draws
    rows.add([prefill(net, job.ids)])
    for i in result.ids:
        assert int(rows.draw(temperature=0)) == i
        rows.advance(torch.tensor([i]))


# --- scores, the command line

def test_a_score_is_that_of_generation(runs):
    net, tok = open_run('bpe')
    ids = tok.encode('e et al to the tale').tolist()
    want, _ = score.surprises(net, tok, ids)
    net.state_dtype = BF16
    got, _ = score.surprises(net, tok, ids)
    rows = Rows(net, tok.vocab_size)
    rows.add([prefill(net, tok.context())])
    nats = 0.0
    for i in ids:
        nats -= float(rows.logits.log_softmax(-1)[0, i])
        rows.advance(torch.tensor([i]))
    assert got != want and abs(got - want) < 0.02 * want
    assert abs(got - nats) < 1e-3 * nats


def test_the_setting_in_the_script(run, runs):
    said = run('bpe', '--score=text.txt --state_dtype=bfloat16')
    before = run('bpe', '--score=text.txt')
    pattern = r'with all the text before each token(, token by token, with states in bfloat16)?: loss ([\d.]+)'
    (words, rounded_loss), = re.findall(pattern, said)
    (none, loss), = re.findall(pattern, before)
    assert words and not none and abs(float(rounded_loss) - float(loss)) < 0.02
    assert said.split('\n')[:5] == before.split('\n')[:5]               # what train.py evaluates has no state
    texts = [run('bpe', f'--start="e et" --num_samples=2 --state_dtype={dtype}') for dtype in ('float32', 'bfloat16')]
    assert texts[0] == run('bpe', '--start="e et" --num_samples=2')
    assert texts[1].count('---------------') == 1


@pytest.mark.parametrize('name', ['sample', 'serve'])
def test_another_value_is_refused_in_a_line(name, capsys):
    assert script(f'{name}.py', '--state_dtype=float16') == 2
    refused(capsys, 'state_dtype=float16', 'float32 or bfloat16')
