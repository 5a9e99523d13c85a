"""A run knows its data by content, and compares only losses that can be compared."""
import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers.runs import load, metrics, refused, script, train, write_text

from mambino.language_model import LanguageModel
from mambino.train import evaluation, identity
from mambino.train.batches import open_dataset
from mambino.train.progress import Progress

pytestmark = pytest.mark.usefixtures('one_thread')
MORE = '--model=gpt --max_iters=15'


def prepare(name, seed=3):
    """data/<name> anew, of other text in the tokenizer of tiny."""
    shutil.copytree('data/tiny', 'tok')
    write_text(f'{seed}.txt', 5000, seed=seed)
    assert script('prepare.py', f'{seed}.txt --tokenizer=tok --out=data/{name}') == 0


@pytest.fixture
def swapped(finished):
    """… and under the name that it has another text since."""
    prepare('tiny')


def test_other_text_under_the_name_is_refused(swapped, capsys):
    before = load()
    for flags in ('', '--dataset=tiny', '--init_from=resume'):
        capsys.readouterr()
        assert script('train.py', '--max_iters=15 --device=cpu', flags) == 2
        refused(capsys, 'out/ckpt.pt', 'the text of tiny', '--init_from=resume --dataset=tiny', '--out_dir')
    assert load()['counters'] == before['counters'] and not os.path.exists('out/best.pt.old')


def test_who_names_it_goes_on_and_the_best_is_counted_anew(swapped, capsys):
    then = load('out/best.pt')
    capsys.readouterr()
    train(MORE, '--init_from=resume --dataset=tiny --learning_rate=1e-9')
    said = capsys.readouterr().out
    assert 'note: out/ckpt.pt was trained on other data' in said and 'counted anew' in said
    assert load('out/best.pt')['counters']['step'] == 15 and load()['counters']['bad_evals'] == 0
    assert load()['counters']['best_loss'] == metrics(key='val_loss')[15]
    assert load('out/best.pt.old')['counters'] == then['counters']
    train('--model=gpt --max_iters=20')                     # it is the data of the run now
    assert 'counted anew' not in capsys.readouterr().out


def test_a_best_of_other_data_is_known_after_a_kill():
    """… that came before the first evaluation of the new data."""
    assert Progress(step=12, evaluated=10).has_other_best
    assert not Progress(step=12, evaluated=10, best_loss=2.0).has_other_best and not Progress().has_other_best


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_split_alone(finished, capsys, split):
    ids = np.fromfile(f'data/tiny/{split}.bin', '<i4')
    np.roll(ids, 1).tofile(f'data/tiny/{split}.bin')
    train(MORE, status=2)                                   # meta.json speaks of another file
    refused(capsys, f'data/tiny/{split}.bin', 'meta.json')
    with open('data/tiny/meta.json', encoding='utf-8') as f:
        meta = json.load(f)
    meta['sha256'].pop(f'{split}.bin')                      # as one made by hand
    with open('data/tiny/meta.json', 'w', encoding='utf-8') as f:
        json.dump(meta, f)
    train(MORE, status=2)
    refused(capsys, f'the {split} split of tiny')


def test_another_name_for_the_same_text_is_no_matter(finished, capsys):
    os.rename('data/tiny', 'data/renamed')
    capsys.readouterr()
    assert script('train.py', '--max_iters=12 --device=cpu') == 0       # nobody names it
    train(MORE, '--dataset=renamed')
    os.rename('data/renamed', 'elsewhere')
    train('--model=gpt --max_iters=18 --dataset=elsewhere')
    said = capsys.readouterr().out
    assert 'note' not in said and 'counted anew' not in said
    assert load()['settings']['dataset'] == 'elsewhere'


def test_data_that_changes_under_an_evaluation(finished, capsys, monkeypatch):
    path, forward = 'data/tiny/val.bin', LanguageModel.forward

    def change(*arguments):
        os.truncate(path, 400)
        return forward(*arguments)
    monkeypatch.setattr(LanguageModel, 'forward', change)
    monkeypatch.setattr(evaluation, 'TOKENS', 8)
    train('--eval_only', status=2)
    refused(capsys, path, 'changed', 'same command')


def test_a_mixture_with_one_part_changed(here, capsys):
    train('--model=gpt --max_iters=5 --dataset=tiny:3,more:1')
    prepare('more', seed=9)
    train(MORE, '--dataset=tiny:3,more:1', status=2)
    refused(capsys, 'the text of more')
    train(MORE, '--dataset=tiny:1,more:1 --init_from=resume')
    assert 'counted anew' in capsys.readouterr().out


def test_an_evaluation_of_other_data_says_so(swapped, capsys):
    train('--eval_only')
    assert 'note: out/ckpt.pt was trained on other data' in capsys.readouterr().out


def test_a_bare_file_is_hashed(finished, capsys, monkeypatch):
    meta = open_dataset('tiny').meta
    os.remove('data/tiny/meta.json')
    bare = open_dataset('tiny', vocab_size=40)
    assert identity.digest(bare, 'val') == meta['sha256']['val.bin']
    monkeypatch.setattr(identity, 'WHOLE', 100)
    monkeypatch.setattr(identity, 'STRETCH', 64)
    sampled = identity.digest(bare, 'val')
    ids = np.fromfile('data/tiny/val.bin', '<i4')
    ids[::7] += 1
    ids.tofile('data/tiny/val.bin')
    assert identity.digest(open_dataset('tiny', vocab_size=99), 'val') != sampled


# --- what is evaluated

def test_eval_iters_counts_sequences(here, capsys):
    """… whatever is computed at once; also where memory gave out, and in several processes."""
    losses = set()
    train('--model=hybrid --max_iters=1')
    for flags in ('--batch_size=1', '--batch_size=4', '--batch_size=16 --vram=2'):
        capsys.readouterr()
        train('--eval_only --eval_iters=5', flags)
        losses |= set(re.findall(r'val_loss (\S+)', capsys.readouterr().out))
    assert len(losses) == 1
    train('--model=hybrid --max_iters=2 --eval_interval=1 --eval_iters=5')
    ids = open_dataset('tiny').read('val')
    assert len(ids) > 5 * 16 + 1
    assert [part['sequences'] for part in load()['data']['parts']] == [5]


def test_other_eval_iters_begin_a_comparison_anew(finished, capsys):
    then = load('out/best.pt')['counters']
    capsys.readouterr()
    train(MORE, '--eval_iters=2 --learning_rate=1e-9')
    assert 'eval_iters' in capsys.readouterr().out
    assert load('out/best.pt.old')['counters'] == then
    assert load('out/best.pt')['counters']['best_loss'] == metrics(key='val_loss')[15]


def test_batches_of_an_older_run_are_counted_again(finished, capsys):
    import torch
    ckpt = load()
    del ckpt['data']
    ckpt['settings']['eval_iters'] = 3
    torch.save(ckpt, 'out/ckpt.pt')
    capsys.readouterr()
    assert script('train.py', MORE, '--device=cpu') == 0
    said = capsys.readouterr().out
    assert 'eval_iters=6' in said and 'does not say by its content' in said and 'counted anew' not in said
    assert load()['settings']['eval_iters'] == 6 and load()['data']['parts'][0]['name'] == 'tiny'


def test_an_evaluation_that_memory_does_not_hold_is_made_in_parts(here, monkeypatch):
    from mambino.train.evaluation import evaluate
    from mambino.weights import checkpoint
    data, sizes = open_dataset('tiny'), []
    net = checkpoint.build('gpt', dict(vocab_size=40, n_layer=1, n_embd=32, n_head=2, block_size=16))
    whole = evaluate(net, data, 16, 0, 'cpu', 'float32')
    forward = type(net).forward

    def scarce(self, x, y):
        sizes.append(len(x))
        if len(x) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, x, y)
    monkeypatch.setattr(type(net), 'forward', scarce)
    assert evaluate(net, data, 16, 0, 'cpu', 'float32') == pytest.approx(whole, abs=1e-5)
    assert max(sizes) > 10 >= sizes[-1]


@pytest.mark.parametrize('kind, config', [
    ('gpt', dict(n_head=2)), ('gpt', dict(n_head=2, n_expert=4)), ('mamba', {}), ('hybrid', dict(n_head=2))])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_processes_share_an_evaluation(here, monkeypatch, kind, config, dtype):
    """The sums of two processes are those of one; what is computed at once is no other."""
    from mambino.train import evaluation
    from mambino.weights import checkpoint
    data, sums = open_dataset('tiny'), []
    net = checkpoint.build(kind, dict(vocab_size=40, n_layer=1, n_embd=32, block_size=16, **config))
    monkeypatch.setattr(evaluation, 'TOKENS', 64)
    monkeypatch.setattr(evaluation, 'summed', lambda *values: sums.append(values) or values)
    alone = evaluation.evaluate(net, data, 16, 9, 'cpu', dtype)['val_loss']
    monkeypatch.setattr(evaluation.processes, 'WORLD', 2)
    for rank in (0, 1):
        monkeypatch.setattr(evaluation.processes, 'RANK', rank)
        evaluation.evaluate(net, data, 16, 9, 'cpu', dtype)
    one, *two = sums
    assert sum(part[1] for part in two) == one[1] == 9 * 16 and all(part[1] for part in two)
    assert sum(part[0] for part in two) / one[1] == pytest.approx(alone, abs=1e-9)
