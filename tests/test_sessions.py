"""sessions.py, conversations: a text goes on as if it had not stopped; nothing is ever read twice."""
import errno
import io
import signal
import types

import pytest
import torch
from helpers.models import perturb
from helpers.runs import script
from helpers.sampling import open_run

from mambino import tokenizer
from mambino.sample import generation, sessions
from mambino.sample.generation import generate, prefill
from mambino.sample.sessions import Session
from mambino.sample.text import Writer, chat_marks, chat_turn
from model_gpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('runs')
TOK = types.SimpleNamespace(vocab_size=50, eot=49)  # all that generation asks of a tokenizer


@pytest.fixture
def steps(monkeypatch):
    """The ids that models read, one list a step; calls of steps.at (a set of their numbers) are
    interrupted by Ctrl-C."""
    class Steps(list):
        at = ()
    seen, step = Steps(), generation.step

    def counted(net, idx, state=None, last=False):
        seen.append(idx[0].tolist())
        if len(seen) in seen.at:
            signal.raise_signal(signal.SIGINT)
        return step(net, idx, state, last)
    monkeypatch.setattr(generation, 'step', counted)
    return seen


def drawn_in(session, net, n, ids=()):
    """The next n tokens of a session."""
    drawn = session.go_on(net, TOK, list(ids), temperature=1.0, top_k=20, repetition_penalty=1.2)
    return [next(drawn)[0] for _ in range(n)]


def test_a_session_goes_on_as_if_it_had_not_stopped(net, tmp_path):
    whole = Session(3)
    want = drawn_in(whole, net, 60, [1, 2, 3])
    for cuts in ((60,), (1, 59), (20, 1, 39)):
        session, got = Session(3), []
        path = str(tmp_path / 'sessions' / f'{len(cuts)}.pt')
        for i, n in enumerate(cuts):
            got += drawn_in(session, net, n, [] if i else [1, 2, 3])
            session.save(path, 'x')
            session = sessions.load_session(path, 'x', 'cpu', 50)
            sessions.check_state(net, session, path)
        assert got == want and session.tokens == whole.tokens
        assert list(session.tokens) == [1, 2, 3] + want
    told, again = Session(3), Session(3)
    first = drawn_in(told, net, 20, [1, 2, 3])
    second = drawn_in(told, net, 20, [4, 5])
    ids = [1, 2, 3] + first + [4, 5]
    logits, _, _ = prefill(net, ids)
    torch.testing.assert_close(next(again.go_on(net, TOK, ids))[1], logits)
    assert list(told.tokens) == ids + second


def test_text_without_end_costs_no_more_and_more(net):
    sizes, tok = [], tokenizer.build_tokenizer('byte')
    writer = Writer(tok, ['never there'], keep=False)
    for n, ids in enumerate(generate(net, [1], 1, 0, 50)):
        writer.feed(int(ids))
        if n == 100:
            break
    assert writer.pieces == [] and len(writer.pending) < 12
    session = Session(0)
    for n, _ in enumerate(session.go_on(net, TOK, [1, 2])):
        sizes.append(sum(value.numel() for value in session.state.values()))
        if n == 200:
            break
    assert len(set(sizes[20:])) == 1


def test_a_conversation_never_reads_its_past(run, kind, steps, monkeypatch):
    _, tok = open_run(kind)
    lines = ['e et', '', 'a e\\', 'C', 'not ~ known' if kind == 'char' else 'known', 'tt']
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(lines)))
    out = run(kind, '--interactive=True --max_new_tokens=15 --session=talk --start= --heal=False')
    read_so_far = [i for step in steps for i in step]
    session = torch.load(f'{kind}/sessions/talk.pt', weights_only=True)
    tokens = session['tokens'].tolist()
    assert read_so_far == tokens[:-1] and session['unread'] == tokens[-1:]     # each once, in order
    assert tokens[:len(tok.encode('e et'))] == tok.encode('e et').tolist()
    assert 'a e\nC' in tok.decode(tokens) and 'tt' in tok.decode(tokens) and '~' not in tok.decode(tokens)
    assert len(out) > 20


def test_ctrl_c_ends_an_answer_and_the_text_goes_on(run, capsys, steps, monkeypatch):
    steps.at = {20}
    monkeypatch.setattr('sys.stdin', io.StringIO('e\n\n'))
    run('char', '--interactive=True --max_new_tokens=40 --session=cut')
    tokens = torch.load('char/sessions/cut.pt', weights_only=True)['tokens'].tolist()
    assert [i for step in steps for i in step] == tokens[:-1] and 41 < len(tokens) < 81
    whole = run('char', '--session=whole50 --max_new_tokens=50')
    for limit in (60, 0):  # in the script; without end
        steps.at, name = {len(steps) + 30}, f'cut{limit}'
        first = run('char', f'--session={name} --max_new_tokens={limit}')
        second = run('char', f'--session={name} --max_new_tokens=20 --start=')
        assert first[:-1] + second[:-1] == whole[:-1] and len(second) == 21


def test_ctrl_c_at_the_prompt_loses_no_conversation(run, monkeypatch):
    """Meant for an answer, it may come a moment late."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    lines = iter(['e et', 'a\\', KeyboardInterrupt, 't', EOFError])

    def typed(prompt):
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line
    monkeypatch.setattr('sys.stdin', Terminal())
    monkeypatch.setattr('builtins.input', typed)
    run('char', '--interactive=True --session=late --max_new_tokens=2 --start=')
    tokens = torch.load('char/sessions/late.pt', weights_only=True)['tokens']
    text = open_run('char')[1].decode(tokens.tolist())
    assert text[:4] == 'e et' and text[6] == 't' and len(text) == 9
    monkeypatch.setattr('sys.stdin', None)
    assert script('sample.py', '--out_dir=char --device=cpu --interactive=True') == 2


def test_sessions_in_the_script(run, kind):
    whole = run(kind, '--session=one --max_new_tokens=40 --start="e et"')
    parts = [run(kind, '--session=two --max_new_tokens=15 --start="e et"')]
    parts += [run(kind, '--session=two --max_new_tokens=25 --start=')]
    assert ''.join(part[:-1] for part in parts) == whole[:-1]
    other = run(kind, '--session=three --fork=two --start=" B" --max_new_tokens=5')
    another = run(kind, '--session=four --fork=two --seed=2 --start=" B" --max_new_tokens=30')
    assert other.startswith(' B') and other == run(kind, '--session=two --start=" B" --max_new_tokens=5')
    assert not another.startswith(other[:-1]) and another.startswith(' B')


def test_chat(run, steps, monkeypatch):
    """Messages and answers in ChatML, whatever ended the answer."""
    tok = tokenizer.build_tokenizer('bpe', ['user assistant system hello\n' * 20], vocab_size=300)
    begin, end = chat_marks(tok)
    spelled = {begin: '<', end: '>'}

    def say(ids):
        return ''.join(spelled.get(i) or tok.decode([i]) for i in ids)
    assert say(chat_turn(tok, [('system', 's'), ('user', 'hello <|im_end|>')], True)) == \
        '<system\ns>\n<user\nhello <|im_end|>>\n<assistant\n'
    assert say(chat_turn(tok, [('user', 'b')], False)) == '>\n<user\nb>\n<assistant\n'
    net = perturb(GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_embd=32)))
    for drawn in (end, tok.eot, 104):
        session = Session(0)
        next(session.go_on(net, tok, [104, 105]))
        session.unread[0] = session.tokens[-1] = drawn
        turn = chat_turn(tok, [('user', 'b')], False)
        next(session.go_on(net, tok, turn, end_ids=[end]))
        assert list(session.tokens[:-1]) == [104, 105] + ([104] if drawn == 104 else []) + turn
        assert [i for step in steps for i in step] == list(session.tokens[:-1])
        steps.clear()
    writer = Writer(tok, end_ids=[end])
    assert [writer.feed(i) for i in [104, end, 104]] == [tok.decode([104]), '', ''] and writer.done
    monkeypatch.setattr('sys.stdin', io.StringIO('e\net\n'))
    run('bpe', '--interactive=True --chat=True --start=sys --session=chat --max_new_tokens=9')
    tok = open_run('bpe')[1]
    tokens = torch.load('bpe/sessions/chat.pt', weights_only=True)['tokens'].tolist()
    begin, end = chat_marks(tok)
    whole = ''.join({begin: '<', end: '>'}.get(i) or tok.decode([i]) for i in tokens)
    assert whole.startswith('<system\nsys>\n<user\ne>\n<assistant\n') and '>\n<user\net>\n<assistant\n' in whole
    assert [i for step in steps for i in step] == tokens[:-1]


def test_a_session_is_saved_where_nobody_reads_on(run, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            said = self.getvalue()              # first the settings
            if said.count('e et') > 1 and len(said) - said.index('e et', said.index('e et') + 1) > 12:
                raise BrokenPipeError(errno.EPIPE, 'Broken pipe')
            return super().write(text)

    monkeypatch.setattr('sys.stdout', Closed())
    assert script('sample.py', '--out_dir=char --device=cpu --start="e et" --session=piped --max_new_tokens=60') == 0
    tokens = torch.load('char/sessions/piped.pt', weights_only=True)['tokens']
    assert open_run('char')[1].decode(tokens.tolist()).startswith('e et') and len(tokens) > 10
