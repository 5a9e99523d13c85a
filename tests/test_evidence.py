"""The evidence: its tasks, its baselines, and that a table goes on where it was stopped."""
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types
from collections import Counter

import pytest
import torch
from helpers.runs import ROOT, write_text

from mambino import language_model
from mambino.bench import energy
from mambino.bench.evidence import bare, baselines, losses, tasks, variants
from mambino.bench.evidence.learning import Setting, asked_at, learn
from mambino.bench.trained import Results, Runs, content_of
from mambino.train.loader import Loader
from mambino.weights import checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')


def generator():
    return torch.Generator().manual_seed(0)


# --- tasks

def test_each_key_asked_for_has_its_value_before():
    idx, targets = tasks.recall(50, 64, generator(), pairs=6)
    for row, said in zip(idx.tolist(), targets.tolist()):
        values = dict(zip(row[0:12:2], row[1:12:2]))
        asked = [at for at, value in enumerate(said) if value >= 0]
        assert len(values) == 6 and asked == [*range(12, 64, 2)]
        assert all(said[at] == row[at + 1] == values[row[at]] for at in asked)
    with pytest.raises(ValueError, match='there is no place'):
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
    found = losses.by_position(Counting().step, torch.zeros(1025, dtype=torch.int32).numpy(), 128, 4)
    assert found == {64: pytest.approx(0, abs=1e-9), **{end: pytest.approx(math.log(2)) for end in (128, 256, 512)}}


def test_a_result_is_kept_and_half_a_line_is_none(tmp_path):
    path = str(tmp_path / 'results.jsonl')
    Results(path).add('a', [1], value=2)
    with open(path, 'a') as f:
        f.write('{"name": "b", "as')                            # killed there
    again = Results(path)
    assert again.of('a', [1])['value'] == 2 and again.of('a', [2]) is None and again.of('b', [1]) is None
    again.add('é', [1], value=3)
    data = open(path, 'rb').read()
    with open(path, 'wb') as f:                                 # as an editor on Windows writes it
        f.write(data.replace(b'\n', b'\r\n'))
    Results(path).add('c', [1], value=4)
    assert {name: line['value'] for name, line in Results(path).lines.items()} == {'a': 2, 'é': 3, 'c': 4}


# --- what is trained, without training it

class Told:
    """Runs that were made: {name: line}; of others the loss and the speed that `of` says."""

    def __init__(self, of):
        self.of = of
        self.asked, self.used = {}, {}
        self.folder, self.device, self.results = '', 'cpu', types.SimpleNamespace(path='', lines={}, of=lambda *_: None)

    def train(self, wanted):
        self.asked |= wanted
        return {name: self.of(name) for name in wanted}

    def curve(self, name):
        steps = [flag.split('=')[1] for flag in self.asked[name] if flag.startswith('--max_iters=')]
        return [types.SimpleNamespace(step=int(steps[0]) if steps else 400)]


PLAN = types.SimpleNamespace(corpora=['characters'], rates=(1e-2,), steps=800, tokens_per_step=4096, dtype='float32',
                             choice_steps=400, bare=[], lengths=(800, 1100, 1500))


def test_what_stands_beside_a_bare_run_has_its_seconds():
    def line(name):
        return dict(seconds=100.0, speed=8192.0, dtype='bfloat16', val_loss=1.0 if name == 'small words GPT' else 1.25)
    runs = Told(line)
    plan = types.SimpleNamespace(**vars(PLAN) | {'corpora': ['characters', 'words']})
    table = '\n'.join(bare.bare(runs, plan))
    assert runs.asked['bare words GPT'] == ['--model=gpt', '--dataset=words', '--dtype=float32', '--seed=1']
    small = runs.asked['small characters hybrid']
    assert '--max_iters=200' in small and '--block_size=128' in small and '--dataset=characters' in small
    assert sum(flag.startswith('--max_iters=') for flag in small) == 1              # 100 s of 8,192 tokens
    assert '--dtype=bfloat16' in runs.asked['speed of small words GPT'] and '--dtype=float32' in small
    assert '| GPT, nothing said | 1.250 (400) | 1.250 (400) |' in table
    assert '| GPT, 0.85M | 1.250 (200) | 1.000 (200) |' in table
    assert table.endswith('took 100 to 100 s; their losses are +0.0% to +25.0% off those of the others.')


def test_minutes_are_of_the_first_length_that_suffices(monkeypatch):
    enough = {'GPT': 1500, 'Mamba-2': 800, 'hybrid': 1100, 'Mamba-1': 1600, 'Mamba-3': 800}

    def line(name):
        _, model, steps = name.split(' ')
        return dict(seconds=60.0 * int(steps), speed=1.0, val_loss=1.4 if int(steps) >= enough[model] else 1.5)
    runs, alone = Told(line), Told(line)
    runs.results.lines['characters hybrid 1'] = dict(val_loss=1.48)                 # 800 steps are not tried again
    monkeypatch.setattr(bare, 'Runs', lambda *_: alone)
    table = [*bare.minutes(runs, PLAN)]
    assert [name for name in alone.asked if 'GPT' in name] == [f'minutes GPT {steps}' for steps in (800, 1100, 1500)]
    assert [name for name in alone.asked if 'hybrid' in name] == ['minutes hybrid 1100']
    assert '| Mamba-2 | 800 | 1.400 | 800.0 | 1 |' in table and 'energy' in table[-1]
    assert '| Mamba-1 | 1500 | 1.500, not there yet | 1500.0 | 1 |' in table and runs.results is alone.results


def test_what_a_run_took_is_told_where_the_machine_tells(tmp_path, monkeypatch):
    def package(name, microjoules, most=999_999):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / 'energy_uj').write_text(f'{microjoules}\n')
        (tmp_path / name / 'max_energy_range_uj').write_text(f'{most}\n')
    assert energy.joules(energy.counters(tmp_path / 'none'), energy.counters(tmp_path)) is None
    package('intel-rapl:0', 400_000)
    package('intel-rapl:1', 900_000)
    package('intel-rapl:0:0', 1)                                # part of the first
    before = energy.counters(tmp_path)
    package('intel-rapl:0', 650_000)
    package('intel-rapl:1', 100_000)                            # began anew
    assert energy.joules(before, energy.counters(tmp_path)) == pytest.approx(0.25 + 0.2)
    (tmp_path / 'intel-rapl:0/energy_uj').write_text('')
    assert energy.joules(before, energy.counters(tmp_path)) is None
    alone = Told(lambda name: dict(seconds=60.0, speed=1.0, val_loss=1.4, joules=2500.0))
    monkeypatch.setattr(bare, 'Runs', lambda *_: alone)
    assert '| GPT | 800 | 1.400 | 1.0 | 1 | 2.5 |' in [*bare.minutes(Told(None), PLAN)]


def test_recall_begins_with_few_pairs():
    setting = Setting('gpt', {}, 'recall', 1e-2, 80, asked=[4, 8, 16, 32])
    asked = [asked_at(setting, step) for step in range(80)]
    assert set(asked[:10]) == {4} and set(asked[10:20]) == {4, 8} and set(asked[20:30]) == {4, 8, 16}
    assert asked[40:48] == [4, 8, 16, 32] * 2
    assert asked_at(Setting('gpt', {}, 'copy', 1e-2, 80, T=32), 0) == 32


# --- the command

def evidence(folder, *flags, **options):
    command = [sys.executable, '-m', 'mambino.bench.evidence', *flags]
    env = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, **options)


def test_it_goes_on_where_it_was_stopped_and_the_same_seeds_give_the_same_numbers(tmp_path):
    write_text(tmp_path / 'text.txt')
    flags = ['text.txt', '--quick=True', '--dtype=float32', '--sections=length,recall']
    done = evidence(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'evidence-quick/page.md').read_text()
    assert '| Mamba-2, carry_state | ' in page and 'right answers, by pairs' in page
    all_of_it, windows = (re.search(rf'GPT, seeing {words} \|.*', page)[0].split('|') for words in ('all', '128'))
    assert all_of_it[1:3] == windows[1:3] and all_of_it[-2] != windows[-2]      # the same up to 128
    path = tmp_path / 'evidence-quick/page/results.jsonl'
    results = path.read_text().splitlines()
    left = [line for line in results if '"characters GPT 1"' not in line]
    path.write_text('\n'.join(left[:9]) + '\n' + left[9][:20])    # killed while it wrote the tenth
    shutil.rmtree(tmp_path / 'evidence-quick/characters-GPT-1')
    again = evidence(tmp_path, *flags)
    assert again.returncode == 0, again.stderr
    before, after = ({line['name']: line for line in map(json.loads, lines)}
                     for lines in (results, path.read_text().splitlines()))
    assert set(before) == set(after) and len(after) == len(path.read_text().splitlines())
    for name, line in after.items():
        same = ['right'] if 'right' in line else ['val_loss', 'best', 'parameters']
        assert [line[key] for key in same] == [before[name][key] for key in same]
    told = r'trained for\n[\d.]+ hours'
    assert re.sub(told, '', page) == re.sub(told, '', (tmp_path / 'evidence-quick/page.md').read_text())


def test_a_variant_of_a_model_is_trained_by_the_same_script(tmp_path):
    write_text(tmp_path / 'text.txt')
    where = ['--folder=runs', '--out=page/evidence']
    flags = ['text.txt', '--quick=True', *where, '--dtype=float32', '--sections=choices,schedules']
    done = evidence(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / 'page/evidence/results.jsonl').read_text().splitlines()]
    losses = {line['name']: line['val_loss'] for line in lines}
    assert losses['choice GPT, bigrams'] != losses['choice GPT']
    assert losses['schedule GPT, fewer'] != losses['schedule GPT'] == losses['choice GPT']
    page = (tmp_path / 'page/evidence.md').read_text()
    assert '| bigrams | ' in page and '| fewer | ' in page


@pytest.mark.parametrize('name', ['bigrams', 'smear', 'values', 'zero', 'softcap'])
def test_what_a_variant_adds_begins_with_nothing(name, monkeypatch):
    """Tables, shares: zeros, so that the model speaks as without; logits end; what writes into the
    stream is silent."""
    monkeypatch.setattr(language_model, 'linear_cross_entropy', language_model.linear_cross_entropy)
    torch.manual_seed(0)
    net = checkpoint.build('gpt', dict(vocab_size=20, n_layer=2, n_embd=32, n_head=2, block_size=16))
    idx = torch.randint(20, (2, 17), generator=generator())
    before = net(idx[:, :-1], idx[:, 1:])[1]
    variants.VARIANTS[name](net)
    loss = net(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    if name == 'zero':
        x = net.model.norm(net.embedding()(idx[:, :-1]))
        assert torch.equal(net(idx[:, :-1])[0], net.lm_head(x))
    elif name == 'softcap':
        net.lm_head.weight.data *= 1e4
        assert net(idx[:, :-1], idx[:, 1:])[1] <= 2 * variants.CAP + 3 < net(idx[:, :-1])[0].abs().max()
    else:
        assert torch.equal(loss, before)
        added = [p for parameter, p in net.named_parameters()
                 if re.search('pairs|share|values', parameter)]
        assert added and all(p.grad.abs().sum() > 0 for p in added)


def test_what_is_not_told_apart_is_said():
    found = {'a': [1.0, 1.1, 1.2], 'b': [1.001, 1.102, 1.2], 'c': [1.3, 1.41, 1.5]}
    said = losses.compared(found, 'Here')
    assert said == 'Here a is best; not told apart from it, by less than two standard deviations: b.'
    assert losses.compared({'a': [1.0], 'b': [2.0]}, 'Here') == 'Here a is lowest, of one seed.'


@pytest.mark.parametrize('flags, words', [
    (['--sections=loss'], 'there is no loss; there are sweep'), (['--seeds=x'], 'write numbers'),
    (['text', '--sections=bits', '--corpora=characters'], 'first --sections=losses'),
    (['text', '--corpora=latin'], 'there are characters, python'), ([], 'name a text'),
    (['text', 'none'], 'name a text'), (['text', 'a/text', 'b/Text.txt'], 'must have a name of its own'),
    (['text', 'a/Python.txt'], 'must have a name of its own'), (['text', 'a/two words.txt'], 'a name of letters'),
    (['text', '--quick=True', '--corpora=python'], 'of the first text alone'), (['text', '--workers=0'], '1 or more'),
    (['text', '--out=text'], 'out=text: File exists'), (['text', '--out=b'], 'b/results.jsonl: has a line that is no')])
def test_what_cannot_be_is_said_in_a_line(tmp_path, flags, words):
    for name in ('text', 'a/text', 'a/Python.txt', 'a/two words.txt', 'b/Text.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_text(tmp_path / name)
    (tmp_path / 'b/results.jsonl').write_text('[1]\n')
    done = evidence(tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1


def test_a_run_that_fails_says_why(tmp_path, capsys):
    with pytest.raises(SystemExit):
        Runs(str(tmp_path)).train({'a': ['--dataset=none']})
    assert '--out_dir=a --device=cpu --init_from=scratch: ended with status 2' in capsys.readouterr().err


TINY = ['--dataset=text', '--model=gpt', '--n_layer=1', '--n_embd=32', '--block_size=16',
        '--tokens_per_step=64', '--max_iters=3', '--eval_interval=3', '--dtype=float32']


@pytest.fixture
def runs(tmp_path):
    write_text(tmp_path / 'text.txt')
    runs = Runs(str(tmp_path / 'runs'))
    runs.prepare('text', [tmp_path / 'text.txt'], ['--tokenizer=char'])
    return runs


def test_a_run_of_other_flags_is_not_gone_on_with(runs):
    quick = runs.train({'a': [*TINY, '--learning_rate=0.1']})['a']
    slow = runs.train({'a': [*TINY, '--learning_rate=1e-5']})['a']
    assert slow['asked'] != quick['asked'] and slow['val_loss'] != quick['val_loss']
    assert [line['step'] for line in runs.log('a') if 'tokens' in line][0] == 1


def test_a_run_that_is_elsewhere_is_no_run_here(runs, capsys):
    assert losses.at_hand(runs, 'a') == 'a'
    runs.results.add('a', [], val_loss=1.0)
    assert losses.at_hand(runs, 'a') == 'again a'
    with pytest.raises(SystemExit):
        runs.curve('a')
    assert 'has the run "a", and' in capsys.readouterr().err


@pytest.mark.parametrize('words, said', [
    ([], 'name a change first: zero, '), (['nope', '--model=gpt'], 'name a change first: zero, '),
    (['fewer', '--model=gpt'], 'fewer: name the steps')])
def test_a_change_that_is_none_is_said_in_a_line(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, 'argv', ['variants', *words])
    with pytest.raises(SystemExit) as ended:
        variants.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_batches_are_cut_in_the_first_half_of_the_steps(runs, monkeypatch):
    """Also where a run goes on; the same tokens in shorter windows, or half of them."""
    shapes = []
    monkeypatch.setattr(Loader, 'next', lambda loader: (torch.arange(64).view(4, 16), torch.zeros(4, 16), 1.0))
    monkeypatch.setattr(variants, 'HALF', 2)
    for change, cut in ((variants.shorter, (16, 4)), (variants.fewer, (2, 16))):
        with monkeypatch.context() as within:
            within.setattr(Loader, 'next', Loader.next)
            variants.at_first(change)
            for step in range(4):
                loader = types.SimpleNamespace(step_start=8 * step, sequences=4, world=2)
                x, y, weight = Loader.next(loader)
                assert x.shape == y.shape and weight == 1.0 and torch.equal(x.flatten(), torch.arange(x.numel()))
                shapes.append(tuple(x.shape))
        assert shapes[-4:] == [cut, cut, (4, 16), (4, 16)]


def test_batches_are_cut_once(runs, tmp_path):
    """However often a model is built: in the first half of the steps."""
    spy = tmp_path / 'spy.py'
    spy.write_text('import sys\nfrom mambino.bench.evidence import variants\nfrom mambino import language_model\n'
                   'as_it_is = language_model.linear_cross_entropy\n'
                   'def told(x, *more):\n    print("targets", x.shape[0] * x.shape[1])\n    return as_it_is(x, *more)\n'
                   'language_model.linear_cross_entropy = told\nvariants.main()\n')
    for name, first in (('fewer', 32), ('shorter', 64)):
        done = subprocess.run([sys.executable, spy, name, *TINY, '--max_iters=4', f'--out_dir={name}'],
                              cwd=runs.folder, env={**os.environ, 'PYTHONPATH': ROOT}, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        counts = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith('targets')]
        assert counts[:3] == [first, first, 64]


@pytest.mark.parametrize('name', ['bigrams', 'zero', 'fewer'])
def test_a_variant_goes_on_with_what_it_learned(runs, name):
    runs.train({'a': [name, *TINY]}, 'mambino.bench.evidence.variants')
    learned = runs.curve('a')[-1].loss
    words = [name, *TINY, '--out_dir=a']
    said = runs.script('mambino.bench.evidence.variants', [*words, '--eval_only=True']).stdout
    assert f'{learned:.4f}' in said
    runs.script('mambino.bench.evidence.variants', [*words, '--max_iters=5'])
    assert runs.curve('a')[-1].step == 5


def test_a_corpus_may_be_a_folder(runs, tmp_path):
    (tmp_path / 'pages/deep').mkdir(parents=True)
    write_text(tmp_path / 'pages/deep/a.txt', seed=2)
    shutil.copy(tmp_path / 'text.txt', tmp_path / 'pages')
    before = content_of(tmp_path / 'pages')
    (tmp_path / 'pages/text.txt').rename(tmp_path / 'pages/deep/text.txt')
    assert content_of(tmp_path / 'pages') != before
    runs.prepare('pages', [tmp_path / 'pages'], ['--tokenizer=char'])
    assert len(runs.tokens('pages', 'train')) > len(runs.tokens('text', 'train'))


def test_another_text_is_no_dataset_that_there_is(runs, tmp_path, capsys):
    runs.prepare('text', [tmp_path / 'text.txt'], ['--tokenizer=char'])
    with open(tmp_path / 'text.txt', 'a') as f:
        f.write('more')
    with pytest.raises(SystemExit):
        runs.prepare('text', [tmp_path / 'text.txt'], ['--tokenizer=char'])
    assert 'was made of another text' in capsys.readouterr().err
