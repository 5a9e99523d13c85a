"""How a run begins, and what it needs: another model's weights, memory that does not suffice, sizes by name, experts, a profile."""
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from mambino.weights import loading
from mambino.train import batches
from mambino.weights import checkpoint
from mambino.train import memory as fit
from model_gpt import LanguageModel
from helpers.runs import (POSIX, TINY, files, launch, load, metrics, plain, refused, same_run, script, train,
                          wait_for_lines, write_text)

pytestmark = pytest.mark.usefixtures('one_thread')

STILL = '--learning_rate=1e-30 --max_iters=1'  # a step that changes no weight: the losses are those of the weights one begins with


@pytest.fixture
def base(finished, capsys):
    """In base/ a GPT whose best.pt is of step 10, and whose ckpt.pt, of step 13, is worse."""
    os.rename('out', 'base')
    train('--out_dir=base --max_iters=13 --learning_rate=5 --warmup_iters=0 --eval_interval=1')
    assert load('base/best.pt')['counters']['step'] == 10 < load('base/ckpt.pt')['counters']['step']
    capsys.readouterr()


def first_batch(n=4, T=16):
    """x, y of the first step of a tiny run."""
    return batches.open_dataset('tiny').batch(np.arange(n), T, 1337)


# --- weights of another run

def test_fine_tuning_begins_with_the_best_weights_and_nothing_else(base):
    before, best = files('base'), checkpoint.load_checkpoint('base/best.pt')
    train('--init_from=base', STILL)
    assert metrics(key='val_loss') == {1: best['counters']['best_loss']}
    net = loading.model_of(best)
    assert metrics(key='loss')[1] == pytest.approx(net(*first_batch())[1].item(), abs=1e-6)
    new = load()
    assert plain(new['weights']) == plain(best['weights']) and new['config'] == best['config']
    assert (new['counters']['step'], new['counters']['tokens_seen'], len(new['counters']['history'])) == (1, 64, 1)
    assert {state['step'].item() for opt in new['optimizers'] for state in opt['state'].values()} == {1}
    assert files('base') == before


def test_fine_tuning_that_was_killed_goes_on_by_the_same_command(base, capsys):
    flags = '--init_from=base --dropout=0.1 --optimizer=muon --dataset=more'
    train(flags, '--out_dir=unbroken')
    for n in (8, 7, 6, 5, 4):  # a process that was too quick to be killed gets another chance
        shutil.rmtree('out', ignore_errors=True)
        process = launch(flags)
        wait_for_lines(process, n)
        process.kill()
        process.communicate()
        if process.returncode != 0 and os.path.exists('out/ckpt.pt'):
            break
    assert 0 < load()['counters']['step'] < 20
    shutil.rmtree('base')      # it is not needed any more
    capsys.readouterr()
    train(flags)
    assert 'going on from out/ckpt.pt' in capsys.readouterr().out
    same_run('unbroken', 'out')


def test_fine_tuning_goes_on_with_the_same_text_alone(base, capsys):
    train('--init_from=base --max_iters=2')
    before = files('out')
    train('--init_from=base --max_iters=4 --dataset=more', status=2)
    refused(capsys, 'dataset=tiny', 'more')
    assert files('out') == before


def test_a_run_is_not_fine_tuned_in_its_own_place(base, capsys):
    """Whoever forgets --out_dir must not get the old run's next steps for fine-tuning."""
    before = files('base')
    train('--init_from=base --out_dir=./base/ --max_iters=30', status=2)
    refused(capsys, 'base', '--out_dir')
    assert files('base') == before


@pytest.mark.parametrize('flags', ['--n_layer=2', '--n_embd=64', '--model=mamba', '--tie_embeddings=False', '--window=8', '--n_head=2',
                                   '--qk_norm', '--rope_theta=500', '--n_expert=2'])
def test_fine_tuning_refuses_another_model(base, capsys, flags):
    train('--init_from=base', flags, status=2)
    refused(capsys, 'base', flags.lstrip('-').partition('=')[0])
    assert not os.path.exists('out')


def test_fine_tuning_accepts_what_the_model_has(base):
    train('--init_from=base --model=gpt --n_layer=1 --tie_embeddings=True --window=0', STILL)


def test_fine_tuning_may_change_dropout_and_context(base):
    argv = TINY.replace('--block_size=16', '')
    assert script('train.py', argv, STILL, '--init_from=base --out_dir=same') == 0
    assert load('same/ckpt.pt')['config'] == load('base/best.pt')['config'] and load('same/ckpt.pt')['settings']['block_size'] == 16
    assert script('train.py', argv, '--init_from=base --dropout=0.3 --block_size=32 --max_iters=1') == 0
    assert load()['config'] == load('base/best.pt')['config'] | dict(dropout=0.3, block_size=32)
    assert metrics(key='loss') != metrics('same', 'loss')
    assert script('train.py', argv, '--init_from=base --max_iters=2') == 0   # and keeps them
    assert load()['config']['block_size'] == 32 and load()['config']['dropout'] == 0.3


@pytest.mark.parametrize('dataset', ['tiny', 'tiny:3,more:1', 'elsewhere/tiny'])
def test_another_tokenizer_is_refused_with_advice_that_works(here, capsys, dataset):
    if '/' in dataset:
        shutil.copytree('data/tiny', dataset)
    train(f'--model=gpt --max_iters=1 --out_dir=base --dataset={dataset}')
    train('--init_from=base --dataset=other', status=2)
    refused(capsys, 'other', 'another tokenizer', 'base', said := '--tokenizer=')
    train('--init_from=base --dataset=other', status=2)
    advice = re.search(rf'{said}(\S+)', capsys.readouterr().err)[1]
    write_text('again.txt', 3000, seed=5)
    assert script('prepare.py', f'again.txt --tokenizer={advice} --out=data/again') == 0
    train('--init_from=base --dataset=again', STILL)


NO_MODEL = {
    'nowhere': ('nowhere', 'nowhere must be auto, resume or scratch'),
    'empty folder': ('empty', 'empty holds no checkpoint'),
    'text file': ('tiny.txt', 'tiny.txt not a readable checkpoint'),
    'damaged': ('damaged', 'damaged/best.pt not a readable checkpoint'),
    'hf nowhere': ('hf:nowhere', 'hf:nowhere must be'),
    'hf of nothing': ('hf:', 'must be'),
    'hf of our own': ('hf:base', 'base/config.json no such file transformers'),
    'ours of hf': ('llama', 'llama holds no checkpoint'),
}


@pytest.mark.parametrize('case', NO_MODEL)
def test_no_model_to_begin_with(base, capsys, case):
    for folder in ('empty', 'damaged', 'llama'):
        os.mkdir(folder)
    write_text('tiny.txt', 99)
    shutil.copy('tiny.txt', 'damaged/best.pt')
    open('llama/config.json', 'w').write('{}')
    source, words = NO_MODEL[case]
    train(f'--init_from={source}', status=2)
    refused(capsys, *words.split())
    assert not os.path.exists('out')


# --- weights of transformers

def save_theirs(kind, vocab_size, tokenizer='tiny'):
    """A small model of transformers in hf/, with the tokenizer of a dataset or without one."""
    transformers = pytest.importorskip('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(5)
    sizes = dict(Llama=dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2),
                 Mamba2=dict(head_dim=16, num_heads=4, state_size=8, n_groups=2, initializer_range=0.2))[kind]
    config = getattr(transformers, kind + 'Config')(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, **sizes,
                                                    bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = getattr(transformers, kind + 'ForCausalLM')(config).eval()
    model.save_pretrained('hf')
    if tokenizer:
        shutil.copy(f'data/{tokenizer}/tokenizer.json', 'hf/tokenizer.json')
    return model


HF = TINY.replace('--n_layer=1 --n_embd=32', '')


@pytest.mark.parametrize('kind', ['Llama', 'Mamba2'])
@pytest.mark.parametrize('tokenizer, more', [('tiny', 0), ('', 0), ('tiny', 11)])  # more ids than the tokenizer has: a padded vocabulary
def test_fine_tuning_a_model_of_transformers(here, capsys, kind, tokenizer, more):
    model = save_theirs(kind, batches.open_dataset('tiny').vocab_size + more, tokenizer)
    assert script('train.py', HF, STILL, '--init_from=hf:hf --out_dir=still') == 0
    with torch.no_grad():
        def loss(x, y):
            return torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction='sum')
        pairs = list(batches.open_dataset('tiny').val_batches(8, 16))
        val = (sum(loss(x, y) for x, y in pairs) / sum(int((y >= 0).sum()) for _, y in pairs)).item()
        assert metrics('still', 'val_loss')[1] == pytest.approx(val, abs=1e-5)
        assert metrics('still', 'loss')[1] == pytest.approx(loss(*first_batch()).item() / 64, abs=1e-5)

    flags = '--init_from=hf:hf/ --learning_rate=1e-2 --lr_decay_iters=20 --warmup_iters=2'
    assert script('train.py', HF, flags, '--out_dir=unbroken') == 0
    assert metrics('unbroken', 'val_loss')[20] < val - 0.3
    assert script('train.py', HF, flags, '--max_iters=10') == 0
    shutil.rmtree('hf')
    assert script('train.py', HF, flags) == 0  # goes on without it
    same = ('weights', 'optimizers', 'config')
    assert metrics() == metrics('unbroken') and all(plain(load()[key]) == plain(load('unbroken/ckpt.pt')[key]) for key in same)
    capsys.readouterr()
    assert script('sample.py', '--max_new_tokens=20 --device=cpu --start=e') == 0


@pytest.mark.parametrize('vocab_size, tokenizer, flags, words', [
    (5, '', '', 'tiny vocabulary hf:hf 5'), (-1, '', '', 'tiny vocabulary hf:hf'), (5, 'tiny', '', 'hf/tokenizer.json vocab_size=5'),
    (90, 'other', '', 'tiny another tokenizer hf:hf --tokenizer=hf/tokenizer.json'), (90, '', '--model=mamba', 'model=gpt mamba'),
    (90, '', '--n_layer=4', 'n_layer=2 4')])
def test_a_model_of_transformers_that_does_not_fit(here, capsys, vocab_size, tokenizer, flags, words):
    save_theirs('Llama', vocab_size % (batches.open_dataset('tiny').vocab_size if vocab_size < 0 else 1000), tokenizer)
    assert script('train.py', HF, '--init_from=hf:hf', flags) == 2
    refused(capsys, *words.split())
    assert not os.path.exists('out')


# --- memory that does not suffice

ERRORS = {'cuda': torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
          'mps': RuntimeError('MPS backend out of memory (MPS allocated: 17.36 GB, other allocations: 613.56 MB, max allowed: 18.13 GB)'),
          'cpu': RuntimeError('[enforce fail] DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes.')}


@pytest.fixture
def scarce(monkeypatch):
    """scarce(n, error, calls): from the so many-th training forward on, more than n sequences at once do not fit."""
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


@pytest.mark.parametrize('calls', [1, 2, 13, 14, 40])  # of the 40 halves of steps; in a second one gradients are there already
def test_out_of_memory_in_the_middle_of_a_step(here, capsys, scarce, calls):
    flags = '--model=mamba --learning_rate=1e-2 --tokens_per_step=192 --batch_size=6'
    train(flags, '--out_dir=plain')
    sizes = scarce(2, calls=calls)
    train(flags)
    assert capsys.readouterr().out.count('out of memory') == 3 and sizes[calls - 1:calls + 2] == [6, 4, 3]  # each divides the step's 12
    assert set(sizes[calls + 2:]) == {2}
    for key in ('loss', 'val_loss', 'grad_norm'):
        a, b = metrics(key=key), metrics('plain', key)
        assert list(a) == list(b) and list(a.values()) == pytest.approx(list(b.values()), abs=1e-5 if 'l' in key else 1e-4)
    assert load()['settings']['batch_size'] == 2


@pytest.mark.parametrize('more, words', [('', '--gradient_checkpointing=True'), ('--gradient_checkpointing=True', 'halve --block_size')])
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


# --- memory that is counted beforehand

LARGE = '--model=gpt --dataset=tiny --n_layer=4 --n_embd=64 --block_size=64 --tokens_per_step=1024 --max_iters=3 --log_interval=1 ' \
        '--eval_interval=5 --device=cpu --dtype=float32'


def test_memory_is_said_before_the_first_step(here, capsys):
    train('--model=gpt --max_iters=1')
    said = capsys.readouterr().out
    assert said.count('memory:') == 1 and 0 < said.index('memory:') < said.index('step      1/1')
    train('--model=gpt --max_iters=1 --out_dir=counted --vram=0.005')
    assert re.search(r'\nmemory: weights \d.*= \d+\.\d\d GB of 0\.0 GB free; micro-batch 2, no gradient checkpointing', capsys.readouterr().out)


def test_a_model_too_large_for_the_memory(here, capsys):
    train('--batch_size=0 --model=gpt --n_embd=384 --n_layer=4 --vram=0.05', status=2)
    refused(capsys, 'GB', 'halve', '--n_layer or --n_embd')
    assert not os.path.exists('out')


def pieces(said, out):
    """(micro-batch, checkpointing) as the output says them; the checkpoint agrees."""
    found = int(re.findall(r' tokens \(1 x \d+ x (\d+) x 64\)', said)[-1]), 'with gradient checkpointing' in said
    settings = load(f'{out}/ckpt.pt')['settings']
    assert (settings['batch_size'], settings['gradient_checkpointing']) == found and 'vram' not in settings
    return found


def test_less_memory_changes_the_pieces_but_not_the_steps(here, capsys):
    found = {}
    for out, flags in dict(much='--vram=4', less='--vram=0.03', little='--vram=0.0135',
                           plain='--vram=0.0135 --gradient_checkpointing=False').items():
        assert script('train.py', LARGE, flags, f'--out_dir={out}') == 0
        found[out] = pieces(capsys.readouterr().out, out)
    assert found['much'] == (16, False) and found['less'] in [(16, True), (8, False)]
    assert found['little'] == (8, True) and found['plain'] in [(4, False), (2, False)]
    for out in found:
        for key in ('loss', 'val_loss'):
            assert metrics(out, key) == pytest.approx(metrics('much', key), abs=1e-5)


def test_batch_size_wins_over_memory(here, capsys):
    assert script('train.py', LARGE, '--vram=0.0135 --batch_size=16') == 0
    assert pieces(capsys.readouterr().out, 'out') == (16, False)


@pytest.mark.parametrize('then', ['', '--vram=4', '--vram=0.01'])
def test_a_resumed_run_keeps_its_pieces(here, capsys, then):
    flags = LARGE + ' --lr_decay_iters=6 --warmup_iters=1'
    assert script('train.py', flags, '--vram=0.0135 --max_iters=6 --out_dir=unbroken') == 0
    assert script('train.py', flags, '--vram=0.0135') == 0
    assert script('train.py', flags, then, '--max_iters=6') == 0
    said = capsys.readouterr().out
    assert pieces(said, 'out') == pieces(said, 'unbroken') == (8, True)
    assert metrics(key='loss') == metrics('unbroken', 'loss') and plain(load()['weights']) == plain(load('unbroken/ckpt.pt')['weights'])


@pytest.mark.parametrize('value', ['abc', '-1', '0', '0.0', '', '4GB', 'nan', 'inf', '1e3'])
def test_memory_that_is_none(here, capsys, value):
    train(f'--model=gpt --vram={value}', status=2)
    refused(capsys, f'vram={value} must be auto, or a number of GB')


def test_accumulation_steps_may_stand_alone(here, capsys):
    """Without batch_size and tokens_per_step: those of the machine, so many times."""
    argv = TINY.replace('--batch_size=2', '').replace('--tokens_per_step=64', '')
    assert script('train.py', argv, '--model=gpt --max_iters=1 --gradient_accumulation_steps=2') == 0
    assert '(1 x 2 x 16 x 16)' in capsys.readouterr().out


# --- gradient checkpointing

@pytest.mark.parametrize('flags', ['--model=mamba', '--model=mamba --version=1', '--model=gpt --dropout=0.2', '--model=hybrid',
                                   '--model=gpt --n_expert=4'])
def test_gradient_checkpointing_changes_no_bit(here, monkeypatch, flags):
    calls, run = [], LanguageModel.run
    monkeypatch.setattr(LanguageModel, 'run', lambda self, *rest: calls.append(self.gradient_checkpointing) or run(self, *rest))
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


# --- sizes by name

@pytest.fixture
def wide(here):
    """A dataset with a vocabulary of 16,384, and a file in the place of out_dir: the run ends before its first step."""
    os.makedirs('data/wide')
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(0, 16384, 200).astype('int32').tofile(f'data/wide/{split}.bin')
    open('file', 'w').close()
    return '--dataset=wide --vocab_size=16384 --block_size=16 --tokens_per_step=32 --batch_size=2 --device=cpu --vram=1000 --out_dir=file'


@pytest.mark.parametrize('model', ['mamba', 'gpt', 'hybrid'])
def test_size_is_a_number_of_parameters(wide, capsys, model):
    assert script('train.py', wide, f'--model={model} --size=50m') == 2
    said = capsys.readouterr()
    assert 'error: file: cannot be written to' in said.err
    assert 45 < float(re.search(rf'\n{model}: ([\d.]+)M parameters', said.out)[1]) < 55


def test_layers_and_width_win_over_size(wide, capsys):
    assert script('train.py', wide, '--model=gpt --size=50m --n_layer=2') == 2
    assert f', 2 layers of width {fit.SIZES["gpt", "50m"]["n_embd"]},' in capsys.readouterr().out
    assert script('train.py', wide, '--model=gpt --size=400m --n_embd=64') == 2
    assert f', {fit.SIZES["gpt", "400m"]["n_layer"]} layers of width 64,' in capsys.readouterr().out


@pytest.mark.parametrize('flags', ['--init_from=base', '--out_dir=base'])
def test_size_of_a_model_that_there_is(base, capsys, flags):
    """What size stands for must be the model's own, in fine-tuning and in going on."""
    argv = TINY.replace('--n_layer=1 --n_embd=32', '')
    assert script('train.py', argv, flags, '--size=150m') == 2
    refused(capsys, 'base', 'n_layer=1, not 20')
    assert script('train.py', argv, flags, '--n_layer=1 --size=50m') == 2
    refused(capsys, 'base', 'n_embd=32, not 512')
    assert script('train.py', argv, flags, '--n_layer=1 --n_embd=32 --size=50m --max_iters=14') == 0
    assert script('train.py', argv, flags, '--max_iters=15') == 0  # the size that was said does not contradict the layers


@pytest.mark.parametrize('value', ['60m', '50M', '50', 'small'])
def test_unknown_size(here, capsys, value):
    train(f'--model=gpt --size={value}', status=2)
    refused(capsys, f'size={value} must be', '50m, 150m, 400m')


# --- experts

def test_experts_train_and_their_load_is_logged(here):
    train('--model=gpt --n_expert=4 --learning_rate=1e-2 --optimizer=muon --log_interval=2')
    lines = [line for line in metrics() if 'loss' in line]
    assert [line['step'] for line in lines] == [1, *range(2, 21, 2)]
    for line in lines:
        assert 0 <= line['expert_load_min'] <= 1 <= line['expert_load_max'] <= 4 and 0 <= line['dropped'] < 0.5
    assert any(line['dropped'] > 0 for line in lines) and len({line['expert_load_max'] for line in lines}) > 1
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.2
    train('--model=gpt --n_expert=4 --capacity_factor=0 --max_iters=3 --out_dir=unlimited')
    assert set(metrics('unlimited', 'dropped').values()) == {0.0}
    train('--model=gpt --max_iters=1 --out_dir=dense')
    assert not metrics('dense', 'dropped')


def test_experts_load_is_of_the_logged_step_alone(here, scarce):
    """As the loss beside it is: so it does not depend on where a run was stopped, or on what was computed in vain."""
    flags = '--model=gpt --n_expert=4 --lr_decay_iters=20 --warmup_iters=2'
    train(flags, '--log_interval=1 --out_dir=each')
    train(flags, '--log_interval=3 --max_iters=10')
    train(flags, '--log_interval=3')
    for key in ('expert_load_max', 'expert_load_min', 'dropped'):
        every = metrics('each', key)
        assert metrics(key=key) == {step: every[step] for step in (1, 3, 6, 9, 10, 12, 15, 18, 20)}
    scarce(2, calls=5)
    train(flags, '--batch_size=4 --log_interval=3 --max_iters=3 --capacity_factor=0 --out_dir=scarce')
    scarce(4)
    train(flags, '--batch_size=2 --log_interval=3 --max_iters=3 --capacity_factor=0 --out_dir=plenty')
    assert metrics('scarce', 'expert_load_max')[3] == pytest.approx(metrics('plenty', 'expert_load_max')[3], abs=0.05)


def test_experts_that_there_cannot_be(here, capsys):
    for flags, words in (('--model=gpt --n_expert=-1', 'n_expert=-1'), ('--model=gpt --n_expert=2 --n_expert_active=3', 'n_expert_active=3'),
                         ('--model=mamba --n_expert=2', 'n_expert mamba'), ('--model=gpt --n_expert=2 --capacity_factor=-1', 'capacity_factor')):
        train(flags, status=2)
        refused(capsys, *words.split())


# --- a profile

def test_profile_says_where_the_time_goes(here, capsys):
    flags = '--model=gpt --dropout=0.1 --tokens_per_step=64 --max_iters=10'
    train(flags, '--out_dir=plain')
    capsys.readouterr()
    train(flags, '--profile=4')
    said = capsys.readouterr().out
    shares = re.search(r'\n4 steps: data ([\d.]+)%, forward ([\d.]+)%, backward ([\d.]+)%, optimizer ([\d.]+)%\n', said)
    assert shares and sum(map(float, shares.groups())) == pytest.approx(100, abs=0.3) and float(shares[3]) > 5
    rows = re.findall(r'^  \S.*? +([\d.]+)% +([\d.]+) +([\d.]+)$', said[shares.end():].partition('\nstep ')[0], re.M)
    assert len(rows) == 10 and [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)
    assert sum(float(row[0]) for row in rows) < 101
    same_run('out', 'plain')
    events = json.load(open('out/trace.json'))['traceEvents']
    for name, times in (('forward', 8), ('backward', 8), ('data', 8), ('optimizer', 4)):
        spans = [event for event in events if event.get('name') == name and event.get('ph') == 'X' and event.get('cat') == 'user_annotation']
        assert len(spans) == times and all(event['dur'] > 0 for event in spans)
    assert any(event.get('name', '').startswith('aten::') for event in events)


@pytest.mark.parametrize('n', [5, 1000])  # the run is over before as many steps were traced
def test_profile_longer_than_the_run(here, capsys, n):
    train(f'--model=gpt --max_iters=7 --profile={n}')
    said = capsys.readouterr().out
    assert 'done: 7 steps' in said and load()['counters']['step'] == 7
    assert '4 steps: data ' in said and json.load(open('out/trace.json'))['traceEvents']  # what there was: all but the first three
    train(f'--model=gpt --max_iters=2 --profile={n} --out_dir=two')
    assert 'done: 2 steps' in capsys.readouterr().out and not os.path.exists('two/trace.json')


def test_profile_that_cannot_be_written(here, capsys):
    os.makedirs('out/trace.json/folder')
    train('--model=gpt --profile=2')
    said = capsys.readouterr().out
    assert '2 steps: data ' in said and 'warning: out/trace.json could not be written' in said and 'done: 20 steps' in said
    assert 'the whole trace' not in said and sorted(os.listdir('out')) == ['best.pt', 'ckpt.pt', 'metrics.jsonl', 'trace.json']


def test_profile_below_zero(here, capsys):
    train('--model=gpt --profile=-1', status=2)
    refused(capsys, 'profile=-1', '0 or more')


# --- the thread that fetches

@pytest.mark.parametrize('more', ['', '--batch_size=4'])
def test_a_foreign_id_in_the_middle_of_a_run(here, capsys, monkeypatch, more):
    """In a file too large to be checked at the start."""
    monkeypatch.setattr(batches.Dataset, '__post_init__', lambda self: setattr(self, 'token_bytes', None))
    ids = np.fromfile('data/tiny/train.bin', '<i4')
    x, _ = batches.open_dataset('tiny').batch(np.arange(4 * 12, 4 * 12 + 1), 16, 1337)  # the first sequence of step 12, counted from 0
    where = next(i for i in range(len(ids) - 16) if ids[i:i + 16].tolist() == x[0].tolist())
    ids[where + 5] = 5000
    ids.tofile('data/tiny/train.bin')
    train('--model=gpt', more, status=2)
    refused(capsys, 'data/tiny/train.bin', 'token id 5000')
    assert load()['counters']['step'] == 10 and metrics()[-1]['step'] in (11, 12)


@POSIX
@pytest.mark.parametrize('place', ['model_gpt.LanguageModel.forward', 'batches.Dataset.batch'])  # in the loop, in the thread
def test_a_second_interrupt_ends_a_step_that_takes_forever(here, place):
    process = launch('--model=gpt', before=f'''
import os, time, {place.partition('.')[0]}
owner, name = {place.rpartition('.')[0]}, {place.rpartition('.')[2]!r}
plain, calls = getattr(owner, name), []
def slow(*args):
    calls.append(1)
    if len(calls) == 6:
        open('slow', 'w').close()
        time.sleep(300)
    return plain(*args)
setattr(owner, name, slow)''')
    while process.poll() is None and not os.path.exists('slow'):
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None        # the first lets the step end
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
