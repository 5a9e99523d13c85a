"""named.py: a text with a name goes on in the server as in sample.py, and there as in the server."""
import os

import pytest
import torch
from helpers.jobs import DEADLINE, Result, answer
from helpers.sampling import open_run

from mambino.sample.text import encode_prompt, healed
from mambino.serve.scheduler import Scheduler
from mambino.serve.work import Done, Failed, Job, Room
from mambino.weights.checkpoint import fingerprint, load_checkpoint

pytestmark = pytest.mark.usefixtures('runs')
SAMPLING = dict(temperature=0.8, top_k=200)                 # sample.py's


def scheduler_of(kind):
    net, tok = open_run(kind)
    mark = fingerprint({f'0.{name}.1.0': tensor for name, tensor in load_checkpoint(kind)['weights'].items()})
    return Scheduler(net, tok, Room(3), out_dir=kind, fingerprint=mark), tok


def tokens_of(kind, name):
    return torch.load(f'{kind}/sessions/{name}.pt', weights_only=True)['tokens'].tolist()


def test_sessions_go_on_here_and_there(run, kind):
    whole = run(kind, '--session=whole --max_new_tokens=40 --start="e et"')
    one, tok = scheduler_of(kind)
    try:
        ids, owed = healed(tok, encode_prompt(tok, 'e et'), 'e et')
        first = answer(one, Job(ids, 15, owed=owed, seed=1337, session='both', **SAMPLING))
        assert first.end.reason == 'length' and first.read.cached == 0
        second = run(kind, '--session=both --max_new_tokens=10 --start=')
        before = tokens_of(kind, 'both')
        third = answer(one, Job([], 15, seed=None, session='both', **SAMPLING))
        assert 'e et' + first.text + second[:-1] + third.text == whole[:-1]
        assert (third.read.tokens, third.read.cached) == (len(before), len(before) - 1)
        assert tokens_of(kind, 'both') == tokens_of(kind, 'whole')
        # with more text, and another seed
        more = tok.encode(' B').tolist()
        mine = answer(one, Job(more, 5, seed=7, session='both', **SAMPLING))
        theirs = run(kind, '--session=whole --start=" B" --max_new_tokens=5 --seed=7 --heal=False')
        assert theirs[:-1] == ' B' + mine.text and tokens_of(kind, 'both') == tokens_of(kind, 'whole')
    finally:
        one.close()


def test_one_answer_at_a_time():
    one, tok = scheduler_of('char')
    try:
        ids = tok.encode('e').tolist()
        endless = Result(one, Job(ids, 10**9, session='taken', ignore_eos=True))
        second = Result(one, Job(ids, 5, session='taken')).wait()
        other = Result(one, Job(ids, 5, session='free', ignore_eos=True)).wait()
        assert second.end.status == 409 and 'taken' in second.end.message
        assert isinstance(other.end, Done)
        endless.wait_for_token()
        endless.ticket.cancel()
        assert endless.wait().end.reason == 'cancelled'
        kept = tokens_of('char', 'taken')                   # what came is kept, and one that is not read yet
        assert kept[:-1] == ids + endless.ids
        third = answer(one, Job([], 1, seed=None, session='taken'))
        assert third.read.tokens == len(kept) and third.read.cached == len(kept) - 1
    finally:
        one.close()
    assert answer(one, Job([], 1, session='taken')).end.status == 503 and not one.named.busy
    assert one.stats()['queue'] == 0


def test_what_cannot_be_gone_on_with(tmp_path):
    one, tok = scheduler_of('char')
    other, _ = scheduler_of('bpe')
    try:
        ids = tok.encode('e').tolist()
        answer(one, Job(ids, 3, session='mine', ignore_eos=True))
        os.makedirs('bpe/sessions', exist_ok=True)
        os.replace('char/sessions/mine.pt', 'bpe/sessions/mine.pt')
        with open('char/sessions/broken.pt', 'wb') as f:
            f.write(b'no session')
        if hasattr(os, 'mkfifo'):
            os.mkfifo('char/sessions/pipe.pt')              # which would be waited for, by all sessions
        else:
            os.mkdir('char/sessions/pipe.pt')
        failures = [
            answer(other, Job([1], 3, session='mine')),
            answer(one, Job(ids, 3, session='broken')),
            answer(one, Job(ids, 3, session='../out')),
            answer(one, Job(ids, 3, session='pipe')),
            answer(one, Job(ids, 3, session='\u6587' * 100)),       # too long a name of a file
        ]
        for failure in failures:
            assert isinstance(failure.end, Failed) and failure.end.status == 400, failure.end
            assert 'session' in failure.end.message
        assert not os.path.exists('out.pt')
        again = answer(one, Job(ids, 3, session='broken'))  # its name is free again
        assert again.end.status == 400
        assert isinstance(answer(one, Job(ids, 3, session='new', ignore_eos=True)).end, Done)
    finally:
        one.close()
        other.close()


def test_the_rows_of_others_go_on_while_a_disk_writes(monkeypatch):
    import threading

    from mambino.sample.sessions import Session
    one, tok = scheduler_of('char')
    gate, writes = threading.Event(), threading.Event()
    save = Session.save

    def slow(*rest):
        writes.set()
        gate.wait(DEADLINE)
        save(*rest)

    monkeypatch.setattr(Session, 'save', slow)
    try:
        ids = tok.encode('e').tolist()
        slowly = Result(one, Job(ids, 3, session='slow', ignore_eos=True))
        assert writes.wait(DEADLINE)
        assert isinstance(answer(one, Job(ids, 9, ignore_eos=True)).end, Done)
        assert not slowly.over.is_set()
        gate.set()
        assert isinstance(slowly.wait().end, Done)
    finally:
        gate.set()
        one.close()
