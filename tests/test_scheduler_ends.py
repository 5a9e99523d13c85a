"""scheduler.py: who is cancelled, refused, fails or waits; functions in the model's thread; its end."""
import threading

import pytest
import torch
from helpers.jobs import DEADLINE, Result, answer, scheduler_of

from mambino.serve.work import Done, Failed, Full, Job, Read

# --- cancelled, refused, failed -------------------------------------------------------------------

def test_a_prompt_that_nobody_wants_any_more_is_not_read_on(monkeypatch):
    """Between two of its layers: not even the piece is finished. Nor is one that waits."""
    one = scheduler_of('mamba2', rows=1)
    layers = []
    tickets = []

    def between(before=one.between):
        layers.append(1)
        if len(layers) == 3:
            for ticket in tickets:
                ticket.cancel()
        before()

    assert one.call(lambda: None).result(DEADLINE) is None  # the thread has begun
    one.net.between_layers = between
    gate = threading.Event()
    blocked = one.call(lambda: gate.wait(DEADLINE))
    try:
        results = [Result(one, Job([1, 2, 3] * 900, 5)) for _ in range(2)]
        tickets += [result.ticket for result in results]
        gate.set()
        blocked.result(DEADLINE)
        for result in results:
            assert result.wait().events == [Done('cancelled', '', 0)]
        assert len(layers) == 3 and one.stats()['rows_used'] == one.stats()['queue'] == 0
    finally:
        one.close()


def test_a_row_is_free_before_the_next_step():
    one = scheduler_of('gpt', rows=2)
    try:
        endless = Result(one, Job([1], 10**9, ignore_eos=True), cancel_after=30)
        assert endless.wait().end.reason == 'cancelled' and len(endless.events) == 31
        assert one.call(lambda: one.stats()['rows_used']).result(DEADLINE) == 0
    finally:
        one.close()


def test_while_a_prompt_is_read_the_others_have_their_turns():
    one = scheduler_of('mamba1', rows=3)
    try:
        endless = Result(one, Job([1], 10**9, ignore_eos=True))
        counts = {}

        def take(event):
            counts[type(event)] = len(endless.events)
            if isinstance(event, Done):
                over.set()

        over = threading.Event()
        counts['begin'] = one.call(lambda: len(endless.events)).result(DEADLINE)
        one.submit(Job([3] * 4000, 1), take)
        assert over.wait(DEADLINE)
        assert counts[Read] - counts['begin'] >= 8          # pieces of 512 tokens
        endless.ticket.cancel()
        ids = endless.wait().ids
        assert ids == answer(one, Job([1], len(ids), ignore_eos=True)).ids
    finally:
        one.close()


@pytest.mark.parametrize('bad', ['send', 'ids', 'empty', 'numbers', 'writer', 'biases'])
def test_a_job_fails_alone(bad, monkeypatch):
    one = scheduler_of('gpt', rows=4)
    try:
        good = Job([1, 2, 3], 30, seed=4, repetition_penalty=2.0, ignore_eos=True)
        want = answer(one, good)
        neighbours = [Result(one, good) for _ in range(2)]
        if bad == 'send':
            def broken(event):
                raise RuntimeError('Event loop is closed')
            one.submit(good, broken)
        else:
            job = dict(ids=Job([10**6], 3), empty=Job([], 3), numbers=Job([1], 3, logit_bias={3: float('nan')}),
                       writer=Job([1], 3, stops=(5,)), biases=Job([1], 3, logit_bias={10**6: 1.0}))[bad]
            failed = answer(one, job)
            assert isinstance(failed.end, Failed) and failed.end.message
            assert failed.end.status == dict(ids=400, empty=400, numbers=500, writer=500, biases=500)[bad]
        for neighbour in neighbours:
            assert neighbour.wait().ids == want.ids
        assert answer(one, good).ids == want.ids and one.is_alive()
        assert one.stats()['rows_used'] == one.stats()['queue'] == 0
    finally:
        one.close()


@pytest.mark.parametrize('is_cancelled', [False, True])
def test_a_state_for_which_there_is_no_memory_is_not_kept(is_cancelled, monkeypatch):
    one = scheduler_of('gpt', rows=2, kept=0.01)
    try:
        job = Job([1, 2, 3], 9, seed=4, ignore_eos=True)
        want = answer(one, job).ids

        def broken(row):
            raise MemoryError('no more')
        monkeypatch.setattr(one.rows, 'state_of', broken)
        neighbour = Result(one, job)
        if is_cancelled:
            endless = Result(one, Job([5], 10**9, ignore_eos=True)).wait_for_token()
            endless.ticket.cancel()
            assert endless.wait().end.reason == 'cancelled'
        assert neighbour.wait().ids == want and neighbour.end.reason == 'length'
        assert answer(one, job).ids == want and one.is_alive()
    finally:
        one.close()


def test_damaged_states_harm_no_one_who_comes_after():
    """A nan in a cache, that nobody sees, would still be one."""
    one = scheduler_of('gpt', rows=2)
    try:
        good = Job([1, 2, 3], 9, seed=4, ignore_eos=True)
        want = answer(one, good).ids

        def damage():
            one.rows.state['v.0'][0].fill_(torch.nan)

        failing = Result(one, Job([5] * 9, 10**9, ignore_eos=True))
        failing.wait_for_token()
        one.call(damage).result(DEADLINE)
        assert failing.wait().end.status == 500 and 'nan' in failing.end.message
        assert [answer(one, good).ids for _ in range(2)] == [want, want]
    finally:
        one.close()


def test_a_step_that_fails_fails_its_rows(monkeypatch):
    one = scheduler_of('mamba2', rows=2)
    try:
        want = answer(one, Job([1], 5, ignore_eos=True)).ids
        running = Result(one, Job([1], 10**9, ignore_eos=True))
        running.wait_for_token()

        def broken(ids):
            raise MemoryError('no more')

        with monkeypatch.context() as patch:
            patch.setattr(one.rows, 'advance', broken)
            assert running.wait().end == Failed('MemoryError: no more', 500)
        assert answer(one, Job([1], 5, ignore_eos=True)).ids == want
    finally:
        one.close()


def test_too_many_wait():
    one = scheduler_of('gpt', rows=2, queue=3)
    try:
        gate = threading.Event()
        one.call(lambda: None).result(DEADLINE)
        blocked = one.call(lambda: gate.wait(DEADLINE))
        results = [Result(one, Job([1], 2)) for _ in range(5)]
        with pytest.raises(Full) as full:
            one.submit(Job([1], 2), results.append)
        assert 1 <= full.value.seconds <= 600 and one.stats()['queue'] == 5
        gate.set()
        blocked.result(DEADLINE)
        for result in results:
            assert isinstance(result.wait().end, Done)
        assert isinstance(answer(one, Job([1], 2)).end, Done)
    finally:
        one.close()


# --- the thread -----------------------------------------------------------------------------------

def test_calls():
    one = scheduler_of('gpt', rows=2)
    try:
        endless = Result(one, Job([1], 10**9, ignore_eos=True))
        seen = []

        def pieces(name):
            for _ in range(3):
                seen.append((name, len(endless.events)))
                yield
            return name

        futures = [one.call(lambda name=name: pieces(name)) for name in 'ab']
        assert [future.result(DEADLINE) for future in futures] == ['a', 'b']
        assert [name for name, _ in seen] == list('ababab')
        assert one.call(lambda: threading.current_thread().name).result(DEADLINE) == 'model'
        assert one.call(lambda: torch.is_grad_enabled()).result(DEADLINE) is False
        with pytest.raises(ZeroDivisionError):
            one.call(lambda: 1 // 0).result(DEADLINE)
        with pytest.raises(SystemExit):
            one.call(lambda: exit(2)).result(DEADLINE)
        assert one.is_alive()
        endless.ticket.cancel()
        endless.wait()
    finally:
        one.close()


def test_a_thread_that_dies_is_told(monkeypatch, capsys):
    one = scheduler_of('gpt', rows=1)
    running, waiting = Result(one, Job([1], 10**9, ignore_eos=True)), Result(one, Job([1], 3))
    running.wait_for_token()

    def broken():
        raise RuntimeError('lost')
    monkeypatch.setattr(one, 'drop_cancelled', broken)
    for result in (running, waiting):
        assert result.wait().end.status == 500 and 'lost' in result.end.message
    one.thread.join(DEADLINE)
    assert not one.is_alive()
    assert answer(one, Job([1], 3)).end.status == 500
    with pytest.raises(RuntimeError):
        one.call(lambda: 1).result(DEADLINE)
    assert 'lost' in capsys.readouterr().err and one.stats()['queue'] == 0
    one.close()


def test_close_ends_all():
    one = scheduler_of('mamba2', rows=1, kept=0.01)
    results = [Result(one, Job([1], 10**9, ignore_eos=True)) for _ in range(3)]
    results[0].wait_for_token()
    one.close()
    assert [result.wait().end.reason for result in results] == ['cancelled'] * 3
    assert not one.is_alive() and one.net.between_layers is None
    assert not one.rows.state and one.stats()['kept_bytes'] == one.stats()['rows_used'] == 0     # memory, too


def test_it_waits_without_computing(monkeypatch):
    one = scheduler_of('gpt')
    try:
        answer(one, Job([1], 3))
        one.call(lambda: None).result(DEADLINE)
        rounds = []
        monkeypatch.setattr(one, 'drop_cancelled', lambda before=one.drop_cancelled: rounds.append(1) or before())
        one.call(lambda: None).result(DEADLINE)
        assert len(rounds) <= 3
    finally:
        one.close()


def test_of_each_number_of_rows_there_is_one_plan(monkeypatch):
    from mambino.sample import decode
    made = []
    plan = decode.Plan
    monkeypatch.setattr(decode, 'Plan', lambda *rest: made.append(1) or plan(*rest))
    one = scheduler_of('mamba2', rows=6)
    try:
        def rush():
            for result in [Result(one, Job([1, 2], 3 + n, seed=n, ignore_eos=True)) for n in range(14)]:
                result.wait()
        rush()
        if made:                                            # there is a compiler
            before = len(made)
            rush()
            assert len(made) == before <= 8
    finally:
        one.close()
