"""scheduler.py: each answer is what it is alone, whoever is there, comes and goes; what is kept, cancelled, refused."""
import random
import threading
from functools import partial

import pytest
import torch
from helpers.jobs import DEADLINE, KINDS, Result, answer, by_sample, scheduler_of, small_net, small_tok

from mambino.sample.generation import step
from mambino.sample.next_token import logprobs_of
from mambino.sample.text import encode_prompt, healed
from mambino.serve import reading
from mambino.serve.turns import Turns
from mambino.serve.work import Done, Job, Read

every_kind = pytest.mark.parametrize('kind', KINDS)
some_kinds = pytest.mark.parametrize('kind', ['gpt', 'mamba2', 'hybrid-full'])
TEXTS = ['the model rea', 'main', 'maintains a li', ' of lis', 'memory and ', 'l', 'the list of ', 'them']


def random_job(rnd, n, plain=False):
    tok = small_tok()
    if rnd.random() < 0.3:
        text = rnd.choice(TEXTS)
        ids, owed = healed(tok, encode_prompt(tok, text), text)
    else:
        ids, owed = [rnd.randrange(tok.vocab_size) for _ in range(rnd.choice([1, 2, 5, 17, 33, 60]))], b''
    job = Job(ids, rnd.choice([1, 2, 5, 12, 25, 40]), owed=owed, seed=n, temperature=rnd.choice([0, 0.7, 1, 1.5]),
              top_k=rnd.choice([0, 0, 3, 40]), top_p=rnd.choice([1, 0.9, 0.5]), min_p=rnd.choice([0, 0, 0.05]),
              repetition_penalty=rnd.choice([1, 1, 1.2]), stops=rnd.choice([(), ('e',), ('st', 'in')]),
              end_ids=rnd.choice([(), (7, 70)]))
    if not plain:
        job.presence_penalty = rnd.choice([0, 0, 0.8])
        job.frequency_penalty = rnd.choice([0, 0, 0.5])
        job.logit_bias = rnd.choice([{}, {}, {5: 3.0, tok.eot: -100.0}])
        job.logprobs = rnd.choice([-1, -1, 0, 3])
        job.ignore_eos = rnd.random() < 0.2
    return job


@every_kind
def test_in_company_as_alone(kind):
    """200 jobs in all, that arrive as others end; some are cancelled. Each gets what it gets alone."""
    rnd = random.Random(kind)
    jobs = [random_job(rnd, n) for n in range(29)]
    crowd = scheduler_of(kind, rows=5)
    results, waiting, lock = {}, list(range(len(jobs))), threading.Lock()
    all_in = threading.Event()

    def submit(count):
        for _ in range(count):
            with lock:
                if not waiting:
                    return all_in.set()
                n = waiting.pop(0)
            results[n] = Result(crowd, jobs[n], cancel_after=1 + n % 9 if n % 6 == 5 else None,
                                on_end=partial(submit, n % 3))

    submit(9)
    while not all_in.is_set():
        submit(1)
    for result in results.values():
        result.wait()
    all_left(crowd)
    alone = scheduler_of(kind, rows=1)
    for n, job in enumerate(jobs):
        got, want = results[n], answer(alone, job)
        if got.end.reason == 'cancelled':
            assert got.cancel_after and got.ids == want.ids[:len(got.ids)]
            assert len(got.events) <= got.cancel_after + 2
            continue
        assert got.ids == want.ids and got.text == want.text and got.end == want.end, job
        for mine, theirs in zip(got.tokens, want.tokens):
            assert (mine.logprob is None) == (job.logprobs < 0)
            if mine.logprob:
                assert mine.logprob.id == mine.id and len(mine.logprob.top) == job.logprobs
                assert mine.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)
    all_left(alone)


def all_left(one):
    """Ends a scheduler, in which nothing is left of anyone."""
    one.call(lambda: None).result(DEADLINE)
    stats = one.stats()
    assert (stats['rows_used'], stats['queue'], one.readings, one.batch.edits.jobs) == (0, 0, [], [])
    one.close()


@every_kind
def test_as_sample_has_it(kind):
    rnd = random.Random(3)
    jobs = [random_job(rnd, n, plain=True) for n in range(16)]
    crowd = scheduler_of(kind, rows=6)
    try:
        results = [Result(crowd, job) for job in jobs]
        for job, result in zip(jobs, results):
            assert (result.wait().ids, result.text) == by_sample(kind, job), job
            assert any(job.owed for job in jobs)
            spelled = [token for token in result.tokens if token.spells]
            assert result.end.tokens == len(result.tokens) - len(spelled)
            assert not spelled or job.owed
    finally:
        crowd.close()


def test_a_row_has_room_for_what_a_prompt_owes(monkeypatch):
    monkeypatch.setattr('mambino.serve.rows.FIRST', 8)
    one = scheduler_of('gpt')
    try:
        for owed in (b'xyzw', b'q1'):                       # a byte an id
            for length in (1, 2, 3, 9, 10, 11):
                job = Job([1, 2, 3, 4, 5], length, owed=owed, seed=length)
                assert (answer(one, job).ids, answer(one, job).text) == by_sample('gpt', job)
    finally:
        one.close()


@some_kinds
def test_what_is_kept_is_not_read_again(kind):
    one = scheduler_of(kind, kept=0.01)
    try:
        job = Job([5, 6, 7, 8] * 4, 12, seed=1, ignore_eos=True)
        first, again = answer(one, job), answer(one, job)
        assert (first.read, again.read) == (Read(16, 0, []), Read(16, 16, []))
        assert first.ids == again.ids
        # the turn after: all of the answer but its last id is known
        turn = Job(job.ids + first.ids + [9, 10], 12, seed=2, ignore_eos=True)
        told = answer(one, turn)
        assert told.read == Read(30, 27, [])
        fresh = scheduler_of(kind)
        assert answer(fresh, turn).ids == told.ids
        fresh.close()
        assert answer(one, Job([5, 6, 7], 1)).read.cached == 0
        assert one.stats()['kept_states'] >= 4 and one.stats()['cached_tokens'] == 43
    finally:
        one.close()


@some_kinds
@pytest.mark.parametrize('kept', [0.0, 0.01])
def test_answers_of_one_prompt_read_it_once(kind, kept, monkeypatch):
    read = []
    monkeypatch.setattr(reading, 'step', lambda net, idx, *rest, **more:
                        read.extend(idx[0].tolist()) or step(net, idx, *rest, **more))
    one = scheduler_of(kind, rows=3, kept=kept)
    try:
        ids = list(range(20))
        results = [Result(one, Job(ids, 6, seed=seed, ignore_eos=True)) for seed in range(7)]
        assert len({tuple(result.wait().ids) for result in results}) == 7
        assert read == ids and sorted(result.read.cached for result in results) == [0] + [20] * 6
        for seed, result in enumerate(results):
            job = Job(ids, 6, seed=seed)
            assert result.ids[:len(by_sample(kind, job)[0])] == by_sample(kind, job)[0]
    finally:
        one.close()


@some_kinds
@torch.no_grad()
def test_logprobs_of_a_prompt(kind):
    net, tok = small_net(kind), small_tok()
    one = scheduler_of(kind, kept=0.01)
    try:
        ids = [int(i) for i in torch.randint(tok.vocab_size, (90,), generator=torch.Generator().manual_seed(1))]
        for _ in range(2):                                  # it is read anew
            result = answer(one, Job(ids, 1, temperature=0, logprobs=1, prompt_logprobs=2))
            assert result.read.cached == 0
            first, *others = result.read.logprobs
            assert first == (ids[0], None, []) and [logprob.id for logprob in others] == ids[1:]
            logits, state = [], None
            for idx in torch.tensor([ids]).split(16, 1):
                some, state = step(net, idx, state)
                logits.append(some[0])
            want = logprobs_of(torch.cat(logits)[:-1], torch.tensor(ids[1:]), 2, tok.vocab_size)
            for got, (own, top) in zip(others, want):
                assert got.logprob == pytest.approx(own, abs=1e-4)
                assert [i for i, _ in got.top] == [i for i, _ in top]
                assert all(logprob == got.logprob for i, logprob in got.top if i == got.id)
        read_only = answer(one, Job(ids[:3], 0, prompt_logprobs=0))
        assert len(read_only.read.logprobs) == 3 and read_only.end == Done('length', '', 0)
    finally:
        one.close()


# --- other ways to compute ------------------------------------------------------------------------

def assert_as_sample(kind, one, jobs):
    try:
        results = [Result(one, job) for job in jobs]
        for job, result in zip(jobs, results):
            assert result.wait().ids == by_sample(kind, job)[0]
    finally:
        one.close()


@pytest.mark.parametrize('kind', ['gpt', 'window', 'mamba1', 'mamba2', 'hybrid-full'])
def test_without_plans(kind, monkeypatch):
    """net.step's way, as on a GPU or beside an adapter: its tensors are others after each step."""
    from mambino.sample import decode
    monkeypatch.setattr(decode, 'ready', lambda *_: None)
    rnd = random.Random(5)
    assert_as_sample(kind, scheduler_of(kind, rows=3), [random_job(rnd, n, plain=True) for n in range(9)])


@pytest.mark.parametrize('kind', ['gpt', 'mamba2'])
def test_more_rows_than_a_plan_takes(kind):
    rnd = random.Random(6)
    one = scheduler_of(kind, rows=40)
    assert_as_sample(kind, one, [random_job(rnd, n, plain=True) for n in range(45)])


@pytest.mark.parametrize('kind', ['gpt', 'window', 'mamba2'])
def test_behind_a_learned_beginning(kind, monkeypatch):
    from helpers import jobs as helpers

    from mambino.weights.adapters import add_prefix
    net = add_prefix(small_net.__wrapped__(kind), length=5).eval()
    monkeypatch.setattr(helpers, 'small_net', lambda name: net)
    rnd = random.Random(7)
    jobs = [random_job(rnd, n, plain=True) for n in range(8)]
    one = scheduler_of(kind, rows=3)
    try:
        results = [Result(one, job) for job in jobs]
        assert [result.wait().ids for result in results] == [by_sample(kind, job)[0] for job in jobs]
    finally:
        one.close()


def test_two_models_take_turns():
    turns = Turns()
    jobs = [Job([n + 1] * 9, 20, seed=n) for n in range(5)]
    schedulers = {kind: scheduler_of(kind, rows=2, turns=turns) for kind in ('gpt', 'mamba2')}
    results = {kind: [Result(one, job) for job in jobs] for kind, one in schedulers.items()}
    for kind in schedulers:
        assert [result.wait().ids for result in results[kind]] == [by_sample(kind, job)[0] for job in jobs]
    for one in schedulers.values():
        one.close()
    assert not turns.is_taken and not turns.waiting
