"""Runs whose memory does not suffice, or is counted beforehand; gradient checkpointing, experts."""
import os
import re
import sys

import pytest
import torch
from helpers.runs import TINY, load, metrics, plain, refused, same_run, script, train

from mambino import machine
from mambino.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures('one_thread')


# --- memory that does not suffice

ERRORS = {
    'cuda': torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    'mps': RuntimeError(
        'MPS backend out of memory (MPS allocated: 17.36 GB, other allocations: 613.56 MB, max allowed: 18.13 GB)'
    ),
    'cpu': RuntimeError(
        '[enforce fail] DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes.'
    ),
}


@pytest.fixture
def scarce(monkeypatch):
    """scarce(n, error, calls): from the so many-th training forward on, more than n sequences at
    once do not fit."""
    forward = LanguageModel.forward  # once; to run out again is to replace what was set before

    def limit(n, error='cuda', calls=1, backward=False):
        done = []

        def fail(*_):
            raise ERRORS[error]

        def patched(self, idx, targets=None):
            out = forward(self, idx, targets)
            if self.training:
                done.append(len(idx))
                if len(idx) > n and len(done) >= calls:
                    out[1].register_hook(fail) if backward else fail()
            return out
        monkeypatch.setattr(LanguageModel, 'forward', patched)
        return done
    return limit


@pytest.mark.parametrize('error', ERRORS)
@pytest.mark.parametrize('backward', [False, True])
def test_out_of_memory_halves_the_micro_batch(here, capsys, scarce, error, backward):
    flags = '--model=gpt --tokens_per_step=128'
    train(flags, '--batch_size=2 --out_dir=two')
    sizes = scarce(2, error, backward=backward)
    train(flags, '--batch_size=8')
    assert capsys.readouterr().out.count('out of memory: going on with micro-batches of ') == 2
    assert sizes == [8, 4] + [2] * 80
    same_run('out', 'two')            # what was computed in vain has left no trace
    train(flags, '--max_iters=22')    # and the next run knows
    assert 'out of memory' not in capsys.readouterr().out and sizes[82:] == [2] * 8


# of the 40 halves of steps; in a second one gradients are there already
@pytest.mark.parametrize('calls', [1, 2, 13, 14, 40])
def test_out_of_memory_in_the_middle_of_a_step(here, capsys, scarce, calls):
    flags = '--model=mamba --learning_rate=1e-2 --tokens_per_step=192 --batch_size=6'
    train(flags, '--out_dir=plain')
    sizes = scarce(2, calls=calls)
    train(flags)
    # each divides the step's 12
    assert capsys.readouterr().out.count('out of memory') == 3 and sizes[calls - 1 : calls + 2] == [
        6,
        4,
        3,
    ]
    assert set(sizes[calls + 2:]) == {2}
    for key in ('loss', 'val_loss', 'grad_norm'):
        a, b = metrics(key=key), metrics('plain', key)
        assert list(a) == list(b) and list(a.values()) == pytest.approx(
            list(b.values()), abs=1e-5 if 'l' in key else 1e-4
        )
    assert load()['settings']['batch_size'] == 2


@pytest.mark.parametrize(
    'more, words',
    [
        ('', '--gradient_checkpointing=True'),
        ('--gradient_checkpointing=True', 'halve --block_size'),
        ('--model=mamba --carry_state=True', '1 sequences at once; lower --tokens_per_step halve --block_size'),
    ],
)
def test_out_of_memory_with_one_sequence(here, capsys, scarce, more, words):
    scarce(0)
    train('--model=gpt --batch_size=1', more, status=2)
    refused(capsys, 'out of memory with 1 sequences', *words.split())
    assert not os.path.exists('out/ckpt.pt')


def test_a_resumed_run_has_the_smaller_micro_batch(here, scarce):
    flags = '--model=gpt --tokens_per_step=128 --lr_decay_iters=20 --warmup_iters=2'
    train(flags, '--batch_size=4 --out_dir=unbroken')
    scarce(3)
    train(flags, '--batch_size=4 --max_iters=9')
    sizes = scarce(3)
    assert script('train.py', TINY.replace('--batch_size=2', ''), flags) == 0
    assert sizes == [2] * 44
    assert metrics(key='loss') == pytest.approx(metrics('unbroken', 'loss'), abs=1e-5)


def test_other_errors_are_not_taken_for_a_lack_of_memory(here, monkeypatch):
    monkeypatch.setitem(ERRORS, 'cuda', RuntimeError('mat1 and mat2 shapes cannot be multiplied'))

    def broken(self, idx, targets=None):
        raise ERRORS['cuda']
    monkeypatch.setattr(LanguageModel, 'forward', broken)
    with pytest.raises(RuntimeError, match='mat1'):
        train('--model=gpt')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='expandable segments are of Linux')
@pytest.mark.parametrize('theirs', ['', 'max_split_size_mb:64'])
def test_the_allocator_of_a_card_has_pieces_that_grow(here, monkeypatch, theirs):
    for name in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'):
        monkeypatch.delenv(name, raising=False)
    if theirs:                                      # what its user says holds
        monkeypatch.setenv('PYTORCH_CUDA_ALLOC_CONF', theirs)
    train('--model=gpt --max_iters=1')
    assert os.environ.get('PYTORCH_ALLOC_CONF') == (None if theirs else 'expandable_segments:True')


# --- memory that is counted beforehand

LARGE = (
    '--model=gpt --dataset=tiny --n_layer=4 --n_embd=64 --block_size=64 --tokens_per_step=1024 '
    '--max_iters=3 --log_interval=1 '
    '--eval_interval=5 --device=cpu --dtype=float32'
)


def test_memory_is_said_before_the_first_step(here, capsys):
    train('--model=gpt --max_iters=1')
    said = capsys.readouterr().out
    assert said.count('memory:') == 1 and 0 < said.index('memory:') < said.index('step      1/1')


@pytest.mark.skipif(not machine.glibc(), reason='glibc')
def test_what_is_said_of_freed_memory_holds_in_the_steps(here, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, 'keep_no_freed_memory', lambda: asked.append('goes back'))
    monkeypatch.setattr(machine, 'keep_freed_memory', lambda: asked.append('is kept'))
    train('--model=gpt --max_iters=1')
    assert asked == ['is kept']
    capsys.readouterr()
    train('--model=gpt --max_iters=1 --out_dir=counted --vram=0.005')
    assert re.search(
        r'\nmemory: weights \d.*= \d+\.\d\d GB of 0\.0 GB that --vram says; micro-batch 2, no gradient '
        r'checkpointing; (up to .* what the allocator keeps|what is freed goes back at once)',
        (said := capsys.readouterr().out),
    )
    assert asked[1:] == ['goes back' if 'goes back at once' in said else 'is kept']


def test_a_model_too_large_for_the_memory(here, capsys):
    train('--batch_size=0 --model=gpt --n_embd=384 --n_layer=4 --vram=0.05', status=2)
    refused(capsys, 'GB', 'halve', '--n_layer or --n_embd')
    assert not os.path.exists('out')


def pieces(said, out):
    """(micro-batch, checkpointing) as the output says them; the checkpoint agrees."""
    micro_batch = int(re.findall(r' tokens \(1 x \d+ x (\d+) x 64\)', said)[-1])
    checkpointing = 'with gradient checkpointing' in said
    settings = load(f'{out}/ckpt.pt')['settings']
    assert settings['batch_size'] == micro_batch and 'vram' not in settings
    assert settings['gradient_checkpointing'] == checkpointing
    return micro_batch, checkpointing


def test_less_memory_changes_the_pieces_but_not_the_steps(here, capsys):
    cuts = {}
    for out, flags in dict(much='--vram=4', less='--vram=0.02', little='--vram=0.0088',
                           plain='--vram=0.0088 --gradient_checkpointing=False').items():
        assert script('train.py', LARGE, flags, f'--out_dir={out}') == 0
        cuts[out] = pieces(capsys.readouterr().out, out)
    assert cuts['much'] == (16, False) and cuts['less'] in [(16, True), (8, False)]
    assert cuts['little'] == (8, True) and cuts['plain'] in [(4, False), (2, False)]
    for out in cuts:
        for key in ('loss', 'val_loss'):
            assert metrics(out, key) == pytest.approx(metrics('much', key), abs=1e-5)


def test_batch_size_wins_over_memory(here, capsys):
    assert script('train.py', LARGE, '--vram=0.0088 --batch_size=16') == 0
    assert pieces(capsys.readouterr().out, 'out') == (16, False)


@pytest.mark.parametrize('then', ['', '--vram=4', '--vram=0.0066'])
def test_a_resumed_run_keeps_its_pieces(here, capsys, then):
    flags = LARGE + ' --lr_decay_iters=6 --warmup_iters=1'
    assert script('train.py', flags, '--vram=0.0088 --max_iters=6 --out_dir=unbroken') == 0
    assert script('train.py', flags, '--vram=0.0088') == 0
    assert script('train.py', flags, then, '--max_iters=6') == 0
    said = capsys.readouterr().out
    assert pieces(said, 'out') == pieces(said, 'unbroken') == (8, True)
    assert metrics(key='loss') == metrics('unbroken', 'loss') and plain(load()['weights']) == plain(
        load('unbroken/ckpt.pt')['weights']
    )


@pytest.mark.parametrize('value', ['abc', '-1', '0', '0.0', '', '4GB', 'nan', 'inf', '1e3'])
def test_memory_that_is_none(here, capsys, value):
    train(f'--model=gpt --vram={value}', status=2)
    refused(capsys, f'vram={value} must be auto, or a number of GB')


def test_accumulation_steps_may_stand_alone(here, capsys):
    """Without batch_size and tokens_per_step: those of the machine, so many times."""
    argv = TINY.replace('--batch_size=2', '').replace('--tokens_per_step=64', '')
    assert (
        script('train.py', argv, '--model=gpt --max_iters=1 --gradient_accumulation_steps=2') == 0
    )
    assert '(1 x 2 x 16 x 16)' in capsys.readouterr().out


# --- gradient checkpointing

@pytest.mark.parametrize(
    'flags',
    [
        '--model=mamba',
        '--model=mamba --version=1',
        '--model=gpt --dropout=0.2',
        '--model=hybrid',
        '--model=gpt --n_expert=4',
    ],
)
def test_gradient_checkpointing_changes_no_bit(here, monkeypatch, flags):
    calls, run_layer = [], LanguageModel.run_layer

    def watched(self, *rest):
        calls.append(self.gradient_checkpointing)
        return run_layer(self, *rest)
    monkeypatch.setattr(LanguageModel, 'run_layer', watched)
    for value in ('False', 'True'):
        train(flags, f'--gradient_checkpointing={value} --max_iters=6 --out_dir={value}')
        assert set(calls) == {value == 'True'}
        calls.clear()
    assert metrics('True') == metrics('False')
    assert plain(load('True/ckpt.pt')['weights']) == plain(load('False/ckpt.pt')['weights'])
    train(flags, '--max_iters=7 --out_dir=True')     # it is remembered
    assert set(calls) == {True}


@pytest.mark.parametrize('value', ['maybe', '2', '0.5'])
def test_gradient_checkpointing_is_yes_or_no(here, capsys, value):
    train(f'--model=gpt --gradient_checkpointing={value}', status=2)
    refused(capsys, f'gradient_checkpointing={value} must be true, false or left out')


# --- experts

def test_experts_train_and_their_load_is_logged(here):
    train('--model=gpt --n_expert=4 --learning_rate=1e-2 --optimizer=muon --log_interval=2')
    lines = [line for line in metrics() if 'loss' in line]
    assert [line['step'] for line in lines] == [1, *range(2, 21, 2)]
    for line in lines:
        assert (
            0 <= line['expert_load_min'] <= 1 <= line['expert_load_max'] <= 4
            and 0 <= line['dropped'] < 0.5
        )
    assert (
        any(line['dropped'] > 0 for line in lines)
        and len({line['expert_load_max'] for line in lines}) > 1
    )
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.2
    train('--model=gpt --n_expert=4 --capacity_factor=0 --max_iters=3 --out_dir=unlimited')
    assert set(metrics('unlimited', 'dropped').values()) == {0.0}
    train('--model=gpt --max_iters=1 --out_dir=dense')
    assert not metrics('dense', 'dropped')


def test_experts_load_is_of_the_logged_step_alone(here, scarce):
    """As the loss beside it is: so it does not depend on where a run was stopped, or on what was
    computed in vain."""
    flags = '--model=gpt --n_expert=4 --lr_decay_iters=20 --warmup_iters=2'
    train(flags, '--log_interval=1 --out_dir=each')
    train(flags, '--log_interval=3 --max_iters=10')
    train(flags, '--log_interval=3')
    for key in ('expert_load_max', 'expert_load_min', 'dropped'):
        every = metrics('each', key)
        assert metrics(key=key) == {step: every[step] for step in (1, 3, 6, 9, 10, 12, 15, 18, 20)}
    scarce(2, calls=5)
    train(
        flags, '--batch_size=4 --log_interval=3 --max_iters=3 --capacity_factor=0 --out_dir=scarce'
    )
    scarce(4)
    train(
        flags, '--batch_size=2 --log_interval=3 --max_iters=3 --capacity_factor=0 --out_dir=plenty'
    )
    assert metrics('scarce', 'expert_load_max')[3] == pytest.approx(
        metrics('plenty', 'expert_load_max')[3], abs=0.05
    )


def test_experts_that_there_cannot_be(here, capsys):
    for flags, words in (
        ('--model=gpt --n_expert=-1', 'n_expert=-1'),
        ('--model=gpt --n_expert=2 --n_expert_active=3', 'n_expert_active=3'),
        ('--model=mamba --n_expert=2', 'n_expert mamba'),
        ('--model=gpt --n_expert=2 --capacity_factor=-1', 'capacity_factor'),
    ):
        train(flags, status=2)
        refused(capsys, *words.split())
