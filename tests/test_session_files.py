"""sessions.py: files that are not what they should be, and two processes with one session."""
import random
import types
import zipfile

import pytest
import torch
from helpers.runs import POSIX
from helpers.sampling import small_net

from mambino.sample import sessions
from mambino.sample.sessions import Session

TOK = types.SimpleNamespace(vocab_size=50, eot=49)  # all that generation asks of a tokenizer


def drawn_in(session, net, n, ids=()):
    """The next n tokens of a session."""
    drawn = session.go_on(net, TOK, list(ids), temperature=1.0, top_k=20)
    return [next(drawn)[0] for _ in range(n)]


def saved(net, path, n=30):
    session = Session(3)
    drawn_in(session, net, n, [1, 2, 3])
    session.save(str(path), 'x')
    return torch.load(path, weights_only=True)


def opened(net, path):
    session = sessions.load_session(str(path), 'x', 'cpu', 50)
    sessions.check_state(net, session, str(path))
    return session


def with_state(change):
    """A change of what is in a file: of each part of its state in turn."""
    def each(contents):
        for name, value in contents['state'].items():
            if name != 'pos':
                yield contents | dict(state=contents['state'] | {name: change(value)})
    return each


def without(contents, part):
    return {name: value for name, value in contents.items() if name != part}


def more_state(contents, **parts):
    return contents | dict(state=contents['state'] | parts)


HARMS = {
    'a position below 0': lambda c: [more_state(c, pos=torch.tensor([-7]))],
    'a position far away': lambda c: [more_state(c, pos=torch.tensor([2**40]))],
    'another position': lambda c: [more_state(c, pos=c['state']['pos'] + 1), more_state(c, pos=c['state']['pos'] - 1)],
    'positions of two rows': lambda c: [more_state(c, pos=c['state']['pos'].repeat(2))],
    'a position that is no integer': lambda c: [more_state(c, pos=c['state']['pos'].float())],
    'a position of another type': lambda c: [more_state(c, pos=int(c['state']['pos']))],
    'more rows': with_state(lambda value: value.repeat(2, *[1] * (value.ndim - 1))),
    'no rows': with_state(lambda value: value[:0].contiguous()),
    'one dimension less': with_state(lambda value: value[0].contiguous()),
    'a narrower state': with_state(lambda value: value[..., :-1].contiguous()),
    'a shorter state': with_state(lambda value: value[:, :, :1].contiguous()),
    'a wider state': with_state(lambda value: torch.cat((value, value), -1)),
    'a state of one number everywhere': with_state(lambda value: value[..., :1].expand(value.shape)),
    'integers': with_state(lambda value: value.long()),
    'complex numbers': with_state(lambda value: value.to(torch.complex64)),
    'not a number': with_state(lambda value: value * torch.nan),
    'infinite': with_state(lambda value: torch.full_like(value, torch.inf)),
    'no tensor': with_state(lambda value: value.tolist()),
    'a state less': lambda c: [c | dict(state=without(c['state'], name)) for name in c['state']],
    'a state more': lambda c: [more_state(c, **{'k.99': torch.zeros(1, 1, 64, 8)})],
    'no state': lambda c: [c | dict(state={}), c | dict(state=None)],
    'a part less': lambda c: [without(c, part) for part in sessions.CONTENTS],
    'tokens outside the vocabulary': lambda c: [c | dict(tokens=c['tokens'] + 50, unread=[c['unread'][0] + 50]),
                                                c | dict(tokens=c['tokens'] - 60, unread=[c['unread'][0] - 60])],
    'tokens of another kind': lambda c: [c | dict(tokens=c['tokens'].float()), c | dict(tokens=c['tokens'].tolist()),
                                         c | dict(tokens=c['tokens'][None])],
    'endless tokens': lambda c: [c | dict(tokens=torch.zeros(1, dtype=torch.int32).expand(2**40))],
    'fewer tokens': lambda c: [c | dict(tokens=c['tokens'][1:].clone()),
                               c | dict(tokens=c['tokens'][:0].clone(), unread=[])],
    'another unread token': lambda c: [c | dict(unread=[7 if c['unread'] != [7] else 8]), c | dict(unread=[1, 2]),
                                       c | dict(unread=['a']), c | dict(unread=3)],
    'a wrong generator': lambda c: [c | dict(generator=c['generator'][:-1].clone()), c | dict(generator=7),
                                    c | dict(generator=torch.full_like(c['generator'], 255))],
    'wrong logits': lambda c: [c | dict(logits=c['logits'][:, :9].clone()), c | dict(logits=c['logits'] * torch.nan),
                               c | dict(logits='a')],
    'no dict': lambda c: [list(c.items()), torch.zeros(3)],
}


@pytest.fixture(scope='module', params=['window', 'hybrid', 'mamba1'])
def kept(request, tmp_path_factory):
    """A model, and what is in a session of it."""
    net = small_net(request.param)
    return net, saved(net, tmp_path_factory.mktemp('kept') / 'a.pt')


@pytest.mark.parametrize('harm', HARMS)
def test_a_harmed_session_is_refused_before_anything_is_computed(kept, harm, tmp_path, capsys):
    """Also where no checksum tells: somebody may have made it so."""
    path = tmp_path / 'a.pt'
    net, contents = kept
    for changed in HARMS[harm](contents):
        torch.save(without(changed, 'sha256') if isinstance(changed, dict) else changed, path)
        with pytest.raises(SystemExit) as end:
            opened(net, path)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count('\n') == 1 and str(path) in said


def test_a_session_in_which_a_bit_changed_is_refused(tmp_path, capsys):
    net = small_net('mamba2')
    path = tmp_path / 'a.pt'
    saved(net, path)
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1:])
        try:
            session = opened(net, path)
        except SystemExit:
            continue
        # what fills the zip up, its dates and names, is nothing of the session
        path.write_bytes(data)
        intact = opened(net, path)
        assert session.tokens == intact.tokens and torch.equal(session.logits, intact.logits)
        assert all(torch.equal(value, intact.state[name]) for name, value in session.state.items())


def test_what_is_packed_small_is_not_unpacked(tmp_path, capsys):
    path = tmp_path / 'a.pt'
    net = small_net('mamba2')
    saved(net, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / 'b.pt', 'w', zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(SystemExit):
        opened(net, tmp_path / 'b.pt')
    assert 'compressed' in capsys.readouterr().err


def test_sessions_without_a_checksum_still_open(net, tmp_path):
    """As an older version wrote them, which kept no logits either."""
    path = tmp_path / 'a.pt'
    contents = saved(net, path)
    torch.save({name: contents[name] for name in sessions.CONTENTS}, path)
    session = opened(net, path)
    want = Session(3)
    assert drawn_in(want, net, 40, [1, 2, 3])[30:] == drawn_in(session, net, 10) and session.needs_ids() is False


def test_what_another_process_saved_is_not_lost(net, tmp_path, capsys):
    path = str(tmp_path / 'sessions' / 'tale.pt')
    saved(net, path)
    one, two = opened(net, path), opened(net, path)
    drawn_in(one, net, 5, [1])
    drawn_in(two, net, 5, [2])
    one.save(path, 'x')
    one.save(path, 'x')
    assert capsys.readouterr().err == ''
    two.save(path, 'x')
    assert 'another process' in (said := capsys.readouterr().err) and '--session=tale-2' in said
    drawn_in(two, net, 5)
    two.save(path, 'x')
    assert capsys.readouterr().err == '' and sessions.names_in(str(tmp_path / 'sessions')) == ['tale', 'tale-2']
    assert opened(net, path).tokens == one.tokens
    assert opened(net, tmp_path / 'sessions' / 'tale-2.pt').tokens == two.tokens
    new = Session(0)                            # begun in two places at once
    drawn_in(new, net, 5, [3])
    new.save(path, 'x')
    assert '--session=tale-3' in capsys.readouterr().err


@POSIX
def test_no_link_leads_a_session_to_another_file(net, tmp_path):
    folder = tmp_path / 'sessions'
    folder.mkdir()
    (tmp_path / 'precious').write_text('mine')
    for name in ('tale.pt.try', 'tale.pt.tmp'):
        (folder / name).symlink_to(tmp_path / 'precious')
    sessions.make_room(str(folder / 'tale.pt'))
    saved(net, folder / 'tale.pt')
    assert (tmp_path / 'precious').read_text() == 'mine'


def test_sessions_of_a_folder_that_vanished_are_nobody_elses(tmp_path):
    run = tmp_path / 'out-gone'
    for out_dir in (run, run / 'best.pt'):
        assert sessions.path_of(str(out_dir), 'tale') == str(run / 'sessions' / 'tale.pt')
    copy = tmp_path / 'copy'
    copy.write_bytes(b'')               # a checkpoint's file of another name
    assert sessions.path_of(str(copy), 'tale') == str(tmp_path / 'sessions' / 'tale.pt')


def test_a_session_moves_to_a_device_without_fp64(tmp_path, monkeypatch):
    """And back: there a Mamba-3's angles are kept in fp32."""
    def angles(state):
        return {value.dtype for name, value in state.items() if 'turn' in name}
    net = small_net('mamba3')
    path = tmp_path / 'text.pt'
    assert angles(saved(net, path)['state']) == {torch.float64}
    monkeypatch.setattr(sessions, 'exact_dtype', lambda kind: torch.float32)
    session = sessions.load_session(str(path), 'x', 'cpu', 50)
    assert angles(session.state) == {torch.float32}
    session.save(str(path), 'x')
    monkeypatch.undo()
    assert angles(opened(net, path).state) == {torch.float64}
