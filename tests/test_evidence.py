"""The evidence: its tasks, its baselines, and that a table goes on where it was stopped."""
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from helpers.runs import ROOT, write_text

from mambino.bench.evidence import baselines, losses, tasks
from mambino.bench.evidence.learning import Setting, learn
from mambino.bench.trained import Results, Runs

pytestmark = pytest.mark.usefixtures('one_thread')


def generator():
    return torch.Generator().manual_seed(0)


# --- tasks

def test_each_key_asked_for_has_its_value_before():
    idx, targets = tasks.recall(50, 64, generator(), pairs=6)
    for row, said in zip(idx.tolist(), targets.tolist()):
        values = dict(zip(row[0:12:2], row[1:12:2]))
        asked = [at for at, value in enumerate(said) if value >= 0]
        assert len(values) == len(asked) == 6 and min(asked) >= 12
        assert all(said[at] == values[row[at]] for at in asked)
    with pytest.raises(ValueError, match='do not fit'):
        tasks.recall(1, 16, generator(), pairs=8)


def test_what_is_to_be_copied_was_there():
    idx, targets = tasks.copy(5, 20, generator())
    assert torch.equal(targets[:, 10:], idx[:, :10]) and (targets[:, :10] == -1).all()
    assert torch.equal(idx[:, 11:], idx[:, :9]) and (idx[:, 10] == tasks.SIGN).all()
    idx, targets = tasks.selective(5, 40, generator(), count=4)
    for row, said in zip(idx.tolist(), targets.tolist()):
        assert said[-4:] == [letter for letter in row[:-4] if letter != tasks.NOISE] and row[-4:] == [tasks.SIGN] * 4
    idx, targets = tasks.induction(50, 30, generator())
    for row, said in zip(idx.tolist(), targets.tolist()):
        first = row.index(tasks.SIGN)
        assert first < 28 and row[-1] == tasks.SIGN and said[-1] == row[first + 1] and said[:-1] == [-1] * 29


def test_a_model_learns_one_and_the_same_seed_learns_the_same():
    setting = Setting('gpt', dict(n_layer=2, n_embd=32, n_head=1, qk_norm=True), 'induction', 1e-2, 150, T=12, batch=32,
                      asked=[12, 24])
    first, again = learn(setting), learn(setting)
    assert first['right']['12'] > 0.6 and set(first['right']) == {'12', '24'}
    assert {**first, 'seconds': 0} == {**again, 'seconds': 0}
    assert first['state'] == 2 * 2 * 12 * 32 * 4                # keys and values of two layers


# --- baselines

def test_five_grams_are_chances_and_know_what_they_read():
    rng = random.Random(0)
    text = bytes(rng.choice(b'abc') for _ in range(400)) + b'abcabcabc' * 20
    total = 0.0
    for byte in range(256):                                     # what comes after a context: all chances are 1
        total += 2 ** -(baselines.n_gram(text, b'abca' + bytes([byte]), order=3) * 5
                        - baselines.n_gram(text, b'abca', order=3) * 4)
    assert total == pytest.approx(1, rel=1e-9)
    assert baselines.n_gram(text, b'abc' * 50) < 0.7 < 7 < baselines.n_gram(text, bytes(range(120, 250)))
    counts = Counter(text)
    one = sum(-math.log2(counts[byte] / len(text)) for byte in text) / len(text)
    assert baselines.n_gram(text, text, order=1) == pytest.approx(one, abs=0.05)


def test_xz_has_read_what_came_before():
    text = random.Random(0).randbytes(3000)
    assert baselines.packed(text, text) < 1 < 7 < baselines.packed(b'', text)


# --- positions, times

def test_positions_are_those_of_the_text():
    class Counting:
        """Is sure of id 0 until 64 tokens are read, and of nothing behind."""
        def step(self, idx, state):
            start = 0 if state is None else state
            logits = torch.zeros(*idx.shape, 2)
            logits[..., 0] = (torch.arange(idx.shape[1]) + start < 64).float() * 50
            return logits, start + idx.shape[1]
    found = losses.by_position(Counting(), torch.zeros(1025, dtype=torch.int32).numpy(), 128, 4)
    assert found == {64: pytest.approx(0, abs=1e-9), **{end: pytest.approx(math.log(2)) for end in (128, 256, 512)}}


def test_a_result_is_kept_and_half_a_line_is_none(tmp_path):
    path = str(tmp_path / 'results.jsonl')
    Results(path).add('a', [1], value=2)
    with open(path, 'a') as f:
        f.write('{"name": "b", "as')                            # killed there
    again = Results(path)
    assert again.of('a', [1])['value'] == 2 and again.of('a', [2]) is None and again.of('b', [1]) is None


# --- the command

def evidence(folder, *flags, **options):
    command = [sys.executable, '-m', 'mambino.bench.evidence', *flags]
    env = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, **options)


def test_it_goes_on_where_it_was_stopped_and_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text('text.txt')
    flags = ['text.txt', '--quick=True', '--out=page/evidence', '--dtype=float32']
    done = evidence(tmp_path, *flags, '--sections=length,copying')
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'page/evidence.md').read_text()
    assert '| Mamba-2, carry_state | ' in page and 'selective, learned with 64 tokens' in page
    results = (tmp_path / 'page/evidence/results.jsonl').read_text().splitlines()
    (tmp_path / 'page/evidence/results.jsonl').write_text('\n'.join(results[:9]) + '\n' + results[9][:20])
    shutil.rmtree('evidence/length-GPT')
    again = evidence(tmp_path, *flags, '--sections=copying')
    assert again.returncode == 0, again.stderr
    copied = [json.loads(line) for line in (tmp_path / 'page/evidence/results.jsonl').read_text().splitlines()]
    before = {line['name']: line for line in map(json.loads, results)}
    assert all(line['right'] == before[line['name']]['right'] for line in copied if 'right' in line)
    assert page.split('## Copying')[1] == (tmp_path / 'page/evidence.md').read_text().split('## Copying')[1]


@pytest.mark.parametrize('flags, words', [
    (['--sections=loss'], 'there is no loss; there are sweep'), (['--seeds=x'], 'write numbers'),
    ([], 'name one text')])
def test_what_cannot_be_is_said_in_a_line(tmp_path, flags, words):
    done = evidence(tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1


def test_a_run_that_fails_says_why(tmp_path, capsys):
    with pytest.raises(SystemExit):
        Runs(str(tmp_path)).train({'a': ['--dataset=none']})
    assert 'train.py --dataset=none --out_dir=a: ended with status 2' in capsys.readouterr().err
