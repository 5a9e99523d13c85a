"""Rows side by side: choice.py, rows.py, states.py, turns.py."""
import random
import threading

import pytest
import torch
from helpers.jobs import DEADLINE, KINDS, small_net

from mambino.sample.generation import prefill
from mambino.sample.next_token import sample_token
from mambino.serve.choice import Choice, Edits
from mambino.serve.rows import Rows
from mambino.serve.states import Kept, cloned, trimmed
from mambino.serve.turns import Turns
from mambino.serve.work import Job

every_kind = pytest.mark.parametrize('kind', KINDS)


def settings(rnd, V):
    return dict(temperature=rnd.choice([0, 0.0, 0.3, 1.0, 1.7]), top_k=rnd.choice([0, 0, 1, 3, 50, V, 10**6]),
                top_p=rnd.choice([1.0, 1.0, 0.9, 0.2]), min_p=rnd.choice([0.0, 0.0, 0.1, 1.0]))


@pytest.mark.parametrize('V', [40, 5000, 20_011])
def test_each_row_gets_the_token_of_sample_token(V):
    rnd = random.Random(V)
    torch.manual_seed(V)
    for trial in range(25):
        B = rnd.choice([1, 2, 7, 16])
        jobs = [Job([1], 1, **settings(rnd, V)) for _ in range(B)]
        scores = torch.randn(B, V) * rnd.choice([0.1, 2, 9])
        if trial % 3 == 0:
            scores[:, V // 2:] = -torch.inf                 # ids that cannot be
        ids, finite = Choice(jobs, V).draw(scores, [torch.Generator().manual_seed(trial + n) for n in range(B)])
        want = [sample_token(scores[n:n + 1], job.temperature, job.top_k, job.top_p, job.min_p,
                             [torch.Generator().manual_seed(trial + n)]).item() for n, job in enumerate(jobs)]
        assert ids.tolist() == want and bool(finite.all())


def test_a_row_without_numbers_harms_no_other():
    jobs = [Job([1], 1, top_k=5), Job([1], 1), Job([1], 1, top_p=0.5), Job([1], 1, temperature=0)]
    scores = torch.randn(4, 60)
    good = Choice(jobs, 60).draw(scores, [torch.Generator().manual_seed(n) for n in range(4)])[0]
    for bad in range(3):
        broken = scores.clone()
        broken[bad] = torch.nan
        ids, finite = Choice(jobs, 60).draw(broken, [torch.Generator().manual_seed(n) for n in range(4)])
        assert finite.tolist() == [row != bad for row in range(4)]
        assert [i for row, i in enumerate(ids.tolist()) if row != bad] \
            == [i for row, i in enumerate(good.tolist()) if row != bad]


def edited(scores, job, prompt, answer):
    """One row's scores by the definitions."""
    scores = scores.clone()
    for i in {*prompt, *answer}:
        scores[i] = scores[i] / job.repetition_penalty if scores[i] > 0 else scores[i] * job.repetition_penalty
    for i in range(len(scores)):
        scores[i] += job.logit_bias.get(i, 0) - job.frequency_penalty * answer.count(i)
        scores[i] -= job.presence_penalty * (i in answer)
    return scores


def test_penalties_and_biases_are_those_of_the_row():
    rnd = random.Random(0)
    V, edits, rows = 30, Edits(5, 30), []                   # rows: (job, prompt, answer)
    for _ in range(120):
        if rows and (len(rows) == 5 or rnd.random() < 0.3):
            row = rnd.randrange(len(rows))
            edits.remove(row)
            rows[row] = rows[-1]
            rows.pop()
        else:
            job = Job([1], 9, repetition_penalty=rnd.choice([1, 1, 1.3, 0.8]), presence_penalty=rnd.choice([0, 0.7]),
                      frequency_penalty=rnd.choice([0, 0.4]), logit_bias=rnd.choice([{}, {3: 2.5, 7: -100.0}]))
            prompt = [rnd.randrange(V) for _ in range(4)]
            edits.add(job, prompt)
            rows.append((job, prompt, []))
        for row, (_, prompt, answer) in enumerate(rows):
            i = rnd.randrange(V)
            spells = rnd.random() < 0.2
            edits.drawn(row, i, not spells)
            (prompt if spells else answer).append(i)
        scores = torch.randn(len(rows), V + 2)
        if rows:
            want = torch.stack([edited(scores[row, :V], *one) for row, one in enumerate(rows)])
            torch.testing.assert_close(edits.applied(scores), want)


@every_kind
@torch.no_grad()
def test_a_row_is_the_state_that_was_put_there(kind):
    """Whoever was there before, and whoever moves."""
    net = small_net(kind)
    rows = Rows(net, 3)
    rnd = random.Random(1)
    texts = []
    for _ in range(30):
        if len(texts) == 3:
            row = rnd.randrange(3)
            rows.remove(row)
            texts[row] = texts[-1]
            texts.pop()
        ids = [rnd.randrange(200) for _ in range(rnd.choice([1, 5, 20, 30]))]
        logits, state, _ = prefill(net, ids)
        assert rows.has_room(len(ids) + 8)
        rows.add(state, logits)
        texts.append(ids)
        for _ in range(rnd.randrange(4)):
            latest = [rnd.randrange(200) for _ in texts]
            rows.advance(torch.tensor(latest))
            texts = [text + [i] for text, i in zip(texts, latest)]
        for row, text in enumerate(texts):
            logits, state, _ = prefill(net, text)
            torch.testing.assert_close(rows.logits[row:row + 1], logits, atol=1e-4, rtol=1e-4)
            kept = rows.state_of(row)
            assert kept['pos'].tolist() == state['pos'].tolist() == [len(text)]
            again = prefill(net, [9, 8], cloned(kept))[0]
            torch.testing.assert_close(again, prefill(net, text + [9, 8])[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_caches_grow_with_those_who_need_it(monkeypatch):
    from mambino.serve import rows as module
    monkeypatch.setattr(module, 'FIRST', 8)
    net = small_net('gpt')                                  # block_size 32
    rows = Rows(net, 4)
    assert rows.slots == 8
    for ids in ([1, 2], [3] * 12, [4] * 50):
        logits, state, _ = prefill(net, ids)
        assert rows.has_room(len(ids) + 3)
        rows.add(state, logits)
    assert rows.slots == 32
    rows.advance(torch.tensor([5, 6, 7]))
    for row, text in enumerate([[1, 2, 5], [3] * 12 + [6], [4] * 50 + [7]]):
        torch.testing.assert_close(rows.logits[row:row + 1], prefill(net, text)[0], atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(module, 'available_memory', lambda device: 3 * rows.bytes_a_row(32))
    assert Rows(net, 9).that_fit(32) == 2                   # 0.8 of what is free
    assert Rows(net, 9).room < 9


def test_what_is_kept_is_the_longest_and_the_latest():
    state = {'pos': torch.tensor([3]), 'ssm.0': torch.zeros(1, 250)}        # some 1,000 bytes
    logits = torch.zeros(1, 10)
    kept = Kept(4000)
    assert kept.longest([1, 2]) == (0, None, None)
    for ids in ([1], [1, 2, 3], [1, 2]):
        kept.add(ids, state, logits)
    assert [kept.longest(ids)[0] for ids in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 9], [1, 9], [2, 1])] == [3, 3, 2, 1, 0]
    kept.add([5], state, logits)                            # no room for four: [1, 2, 3] was used longest ago
    assert [kept.longest(ids)[0] for ids in ([1, 2, 3], [1], [5])] == [2, 1, 1]
    assert len(kept.entries) == 3 and kept.bytes <= 4000 and kept.lengths == {1: 2, 2: 1}
    kept.add([1] * 9, {'ssm.0': torch.zeros(1, 5000)}, logits)
    assert len(kept.entries) == 3
    for n in range(50):
        kept.add([n, 7, 7], state, logits)
    assert len(kept.entries) == 3 and kept.lengths == {3: 3}


def test_a_cache_is_kept_without_empty_slots():
    net = small_net('gpt')
    _, state, _ = prefill(net, [1, 2, 3])
    small = trimmed(state, 0)
    assert small['k.0'].shape[2] == 3 and state['k.0'].shape[2] > 3
    torch.testing.assert_close(prefill(net, [4], cloned(small))[0], prefill(net, [1, 2, 3, 4])[0])


def test_turns_are_taken_in_order():
    turns, order, ready = Turns(), [], threading.Event()

    def work(name):
        ready.wait(DEADLINE)
        with turns:
            for _ in range(20):
                order.append(name)
                if len(set(order)) < 2:                     # the others are waiting by then
                    while len(turns.waiting) < 2:
                        pass
                turns.give_way()

    threads = [threading.Thread(target=work, args=(name,)) for name in 'abc']
    for thread in threads:
        thread.start()
    ready.set()
    for thread in threads:
        thread.join(DEADLINE)
    assert all(set(order[n:n + 3]) == set('abc') for n in range(0, 54, 3)) and len(order) == 60
