"""What may happen to a run and must not harm it: kills between evaluations, scarce memory and disks, files that others
change, links that others lay."""
import errno
import os
import shutil
import weakref
from functools import partial

import pytest
import torch
from helpers.runs import POSIX, files, load, metrics, plain, refused, same_run, script, train

from mambino import files as whole_files
from mambino.language_model import LanguageModel
from mambino.train import progress, recovery
from mambino.weights import checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')


class Killed(BaseException):
    """In the place of a kill: nothing of ours catches it."""


def kill_at(monkeypatch, n):
    """The n-th step from now on does not come."""
    steps, advance = [], progress.Progress.advance

    def count(self, tokens):
        steps.append(1)
        if len(steps) == n:
            raise Killed
        advance(self, tokens)
    monkeypatch.setattr(progress.Progress, 'advance', count)


def killed(monkeypatch, n, *lines):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, n)
        train(*lines)


# --- between evaluations

def test_save_minutes_loses_nothing_and_changes_nothing(here, monkeypatch):
    flags = '--model=gpt --dropout=0.1 --eval_interval=9 --save_minutes=1e-9'
    saved, save = [], checkpoint.save_checkpoint

    def watched(path, contents):
        saved.append(path)
        save(path, contents)
    monkeypatch.setattr(checkpoint, 'save_checkpoint', watched)
    train(flags, '--out_dir=unbroken')
    assert saved.count('unbroken/ckpt.pt') >= 20 and saved.count('unbroken/best.pt') <= 3
    train(flags.replace('1e-9', '0'), '--out_dir=seldom')
    assert metrics('unbroken') == metrics('seldom')
    for part in ('weights', 'optimizers', 'counters', 'rng'):
        assert plain(load('unbroken/best.pt')[part]) == plain(load('seldom/best.pt')[part])
    killed(monkeypatch, 8, flags)
    assert load()['counters']['step'] == 7 and not os.path.exists('out/best.pt')
    train(flags)
    same_run('unbroken', 'out')


@pytest.mark.parametrize('value', ['-1', 'nan'])
def test_save_minutes_that_cannot_be(here, capsys, value):
    train(f'--model=gpt --save_minutes={value}', status=2)
    refused(capsys, 'save_minutes=')


def test_scratch_goes_on_with_what_it_began(finished, monkeypatch, capsys):
    before = files('out')
    flags = '--model=gpt --init_from=scratch --max_iters=12'
    killed(monkeypatch, 8, flags)
    capsys.readouterr()
    killed(monkeypatch, 3, flags)
    assert 'going on from out/ckpt.pt at step 5' in capsys.readouterr().out
    train(flags)
    kept = {path: data for path, data in files('out').items() if '.old' in path}
    assert kept == {path + '.old': data for path, data in before.items()}
    train(flags, '--out_dir=unbroken')
    same_run('unbroken', 'out')
    complete = files('out')
    train(flags, '--max_iters=2')                           # another command begins anew, and so does a complete run's
    train(flags, '--max_iters=2')
    now = files('out')
    assert all(now[f'out/ckpt.pt{end}'] for end in ('.old', '.old2', '.old3'))
    assert now['out/ckpt.pt.old2'] == complete['out/ckpt.pt'] and kept.items() <= now.items()
    assert list(metrics(key='loss')) == [1, 2]


def test_a_kill_while_a_run_is_set_aside(finished, monkeypatch):
    before = files('out')
    rename = os.rename

    def killed_at(calls, a, b):
        if not calls:
            raise Killed
        calls.pop()
        rename(a, b)
    for n in (0, 1, 1):                                     # so many files are renamed before
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, 'rename', partial(killed_at, [None] * n))
            train('--model=gpt --init_from=scratch --max_iters=2')
    train('--model=gpt --init_from=scratch --max_iters=2')
    assert {path: data for path, data in files('out').items() if '.old' in path} == \
        {path + '.old': data for path, data in before.items()}


def test_an_exported_model_is_not_trained_over(finished, capsys):
    assert script('export.py', '--out_dir=out --format=native --to=native --verify=False') == 0
    before = files('native')
    train('--model=gpt --out_dir=native', status=2)
    refused(capsys, 'native: holds an exported model', '--out_dir')
    assert files('native') == before
    train('--model=gpt --out_dir=native --init_from=scratch --max_iters=1')
    assert files('native')['native/best.pt.old'] == before['native/best.pt']


# --- what others do

@pytest.mark.parametrize('way', ['replaced', 'gone', 'shorter', 'val shorter'])
def test_data_that_changes_under_a_run(here, capsys, monkeypatch, way):
    train('--model=gpt --out_dir=unbroken')
    path = 'data/tiny/val.bin' if 'val' in way else 'data/tiny/train.bin'
    sound = open(path, 'rb').read()
    advance = progress.Progress.advance

    def change(self, tokens):
        advance(self, tokens)
        if self.step == 10 if 'val' in way else self.step == 7:
            if way == 'replaced':
                shutil.copytree('data/tiny', 'data/new')
                open('data/new/train.bin', 'wb').write(sound[::-1])
                os.rename('data/tiny', 'data/old')
                os.rename('data/new', 'data/tiny')
            elif way == 'gone':
                os.remove(path)
            else:
                os.truncate(path, 400)
    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, 'advance', change)
        train('--model=gpt', status=2)
    refused(capsys, path, 'changed', 'saved out/ckpt.pt', 'same command')
    assert load()['counters']['step'] in (7, 8, 10)
    open(path, 'wb').write(sound)
    train('--model=gpt')
    same_run('unbroken', 'out')


def test_data_that_only_seems_to_change(here, monkeypatch):
    """A backup or a touch changes times, and who prepares the same text again gets the same bytes."""
    train('--model=gpt --out_dir=unbroken')
    advance = progress.Progress.advance

    def change(self, tokens):
        advance(self, tokens)
        for split in ('train', 'val') if self.step in (4, 10) else ():
            path = f'data/tiny/{split}.bin'
            if self.step == 10:
                shutil.copy(path, 'other.bin')
                os.replace('other.bin', path)
            os.utime(path, (1, self.step))
    monkeypatch.setattr(progress.Progress, 'advance', change)
    train('--model=gpt')
    same_run('unbroken', 'out')


@POSIX
def test_links_in_a_folder_from_elsewhere(finished):
    """Nothing behind them is written or deleted."""
    os.makedirs('precious/home')
    for name in ('home/a', 'b'):
        open(f'precious/{name}', 'w').write('precious')
    before = files('precious')
    for name in ('ckpt.pt.tmp', 'best.pt.tmp', 'metrics.jsonl.tmp', 'train.lock', 'trace.json'):
        os.symlink('../precious/b', f'out/{name}')
    os.remove('out/metrics.jsonl')
    os.symlink('../precious/b', 'out/metrics.jsonl')
    os.symlink('../precious', 'out/ckpt.shards')
    os.makedirs('out/sessions')
    os.symlink('../../precious/b', 'out/sessions/tale.pt.try')
    train('--model=gpt --max_iters=14 --profile=1')
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=3 --session=tale') == 0
    assert files('precious') == before


def test_a_flipped_bit_is_refused_with_advice(finished, capsys):
    whole = open('out/ckpt.pt', 'rb').read()
    weights = load()['weights']
    tensor = weights['lm_head.weight'].numpy().tobytes()
    at = whole.index(tensor) + len(tensor) // 2
    damaged = bytearray(whole)
    damaged[at] ^= 4
    open('out/ckpt.pt', 'wb').write(damaged)
    train('--model=gpt --max_iters=12', status=2)
    refused(capsys, 'out/ckpt.pt', 'not a readable checkpoint', 'CRC', 'copy out/best.pt to out/ckpt.pt')
    shutil.copy('out/best.pt', 'out/ckpt.pt')
    train('--model=gpt --max_iters=12')
    open('out/best.pt', 'wb').write(damaged)
    assert script('sample.py', '--out_dir=out --device=cpu') == 2
    refused(capsys, 'out/best.pt', '--out_dir=out/ckpt.pt')
    assert script('export.py', '--out_dir=out --format=safetensors') == 2
    assert script('sample.py', '--out_dir=out/ckpt.pt --device=cpu --session=tale --max_new_tokens=3') == 0
    capsys.readouterr()
    session = bytearray(open('out/sessions/tale.pt', 'rb').read())
    contents = torch.load('out/sessions/tale.pt', weights_only=True)
    state = max((value for value in contents['state'].values() if torch.is_tensor(value)), key=lambda t: t.numel())
    session[session.index(state.numpy().tobytes()) + 1] ^= 1
    open('out/sessions/tale.pt', 'wb').write(session)
    assert script('sample.py', '--out_dir=out/ckpt.pt --device=cpu --session=tale --max_new_tokens=3') == 2
    refused(capsys, 'tale.pt', 'not a readable session')


# --- memory and disks

def test_a_step_without_memory_is_forgotten_before_it_is_tried_again(here, monkeypatch):
    forward, release, held, alive = LanguageModel.forward, recovery.release, [], []

    class Activation(torch.Tensor):
        pass

    def watched(net):                   # what it can give back is what nobody has any more
        alive.extend(ref() is not None for ref in held)
        release(net)

    def short(self, idx, targets=None):
        if targets is None or len(idx) == 1 or not self.training:
            return forward(self, idx, targets)
        activation = torch.zeros(10).as_subclass(Activation)
        held.append(weakref.ref(activation))
        raise RuntimeError(f'out of memory: {activation.numel()}')
    monkeypatch.setattr(LanguageModel, 'forward', short)
    monkeypatch.setattr(recovery, 'release', watched)
    train('--model=gpt --max_iters=2 --batch_size=4')
    assert len(held) == 2 and alive and not any(alive)


def full_for(monkeypatch, is_full):
    """Writing to a temporary file of which is_full(path) says so finds no space."""
    create = whole_files.create

    def watched(name):
        if is_full(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(name)
    monkeypatch.setattr(whole_files, 'create', watched)


def test_a_best_that_cannot_be_saved_keeps_nothing_else(here, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        full_for(patch, lambda path: 'best.pt' in path)
        train('--model=gpt --max_iters=10')
    out = capsys.readouterr().out
    assert 'out/best.pt could not be saved (No space left on device); nothing was saved before' in out
    assert load()['counters']['step'] == 10 and load()['counters']['best_loss'] == float('inf')
    train('--model=gpt --max_iters=15')
    assert load('out/best.pt')['counters']['step'] == 15


def test_a_finished_model_is_saved_elsewhere(here, capsys, monkeypatch):
    os.mkdir('roomy')
    with monkeypatch.context() as patch:
        patch.setattr(progress.tempfile, 'gettempdir', lambda: 'roomy')
        full_for(patch, lambda path: path.startswith('out/') and '.pt' in path)
        train('--model=gpt --max_iters=7', status=2)
    name, = os.listdir('roomy')
    refused(capsys, 'out: the finished model', f'roomy/{name}', 'move that file to out/ckpt.pt')
    os.rename(f'roomy/{name}', 'out/ckpt.pt')
    train('--model=gpt --max_iters=7')
    assert 'has made its 7 steps' in capsys.readouterr().out
    assert list(metrics(key='loss')) == list(range(1, 8))


def test_a_finished_model_waits_for_space(here, capsys, monkeypatch):
    tries = []

    def is_full(path):
        tries.append(path)
        return '.pt' in path and len(tries) < 9
    monkeypatch.setattr(progress, 'SPACE_SECONDS', 3)
    full_for(monkeypatch, is_full)
    train('--model=gpt --max_iters=2')
    out = capsys.readouterr().out
    assert 'no space is left for the finished model' in out and load()['counters']['step'] == 2
