"""How a run begins: with another model's weights, with transformers', in a size by name."""
import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.runs import (
    TINY,
    at_a_call,
    files,
    forked,
    load,
    metrics,
    plain,
    refused,
    same_run,
    script,
    train,
    write_text,
)

from mambino.train import batches, begin
from mambino.train.begin import SIZES
from mambino.weights import checkpoint, loading

pytestmark = pytest.mark.usefixtures('one_thread')


# a step that changes no weight: the losses are those of the weights one begins with
STILL = '--learning_rate=1e-30 --max_iters=1'


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
    assert (
        new['counters']['step'],
        new['counters']['tokens_seen'],
        len(new['counters']['history']),
    ) == (1, 64, 1)
    assert {
        state['step'].item() for opt in new['optimizers'] for state in opt['state'].values()
    } == {1}
    assert files('base') == before


def test_fine_tuning_that_was_killed_goes_on_by_the_same_command(base, capsys):
    flags = '--init_from=base --dropout=0.1 --optimizer=muon --dataset=more'
    train(flags, '--out_dir=unbroken')
    (status,), _ = forked(flags, before=at_a_call('os.kill(os.getpid(), 9)', lines=8))
    assert status != 0 and 0 < load()['counters']['step'] < 20
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


@pytest.mark.parametrize(
    'flags',
    [
        '--n_layer=2',
        '--n_embd=64',
        '--model=mamba',
        '--tie_embeddings=False',
        '--window=8',
        '--n_head=2',
        '--qk_norm=False',
        '--rope_theta=500',
        '--n_expert=2',
    ],
)
def test_fine_tuning_refuses_another_model(base, capsys, flags):
    train('--init_from=base', flags, status=2)
    refused(capsys, 'base', flags.lstrip('-').partition('=')[0])
    assert not os.path.exists('out')


def test_a_new_gpt_has_normalised_queries_and_keys(finished):
    assert load()['config']['qk_norm'] is True
    train('--model=gpt --out_dir=without --qk_norm=off --max_iters=1')
    train('--out_dir=without --max_iters=2')                        # it goes on, and is begun with
    train('--out_dir=tuned --init_from=without --max_iters=1')
    train('--out_dir=hybrid --model=hybrid --max_iters=1')
    for out_dir in ('without', 'tuned', 'hybrid'):
        assert load(f'{out_dir}/ckpt.pt')['config']['qk_norm'] is False
        assert load(f'{out_dir}/ckpt.pt')['settings']['qk_norm'] is False


@pytest.mark.parametrize('flags, n_layer, state_size', [
    ('--model=gpt', 4, None), ('--model=mamba', 8, 32), ('--model=mamba --version=1', 8, 16),
    ('--model=mamba --version=3', 8, 32), ('--model=mamba --n_layer=1', 1, 32),
    ('--model=mamba --n_layer=1 --state_size=64', 1, 64), ('--model=mamba --n_layer=1 --n_embd=192', 1, 128),
    ('--model=hybrid', 4, 32), ('--model=hybrid --layers=b', 4, 32), ('--model=hybrid --layers=d', 4, 64)])
def test_sizes_of_a_new_model_on_a_cpu(here, capsys, flags, n_layer, state_size):
    argv = TINY.replace('--n_layer=1', '').replace('--n_embd=32', '').replace('=20', '=1')
    assert script('train.py', argv, flags) == 0
    config, width = load()['config'], 192 if '192' in flags else 128
    assert (config['n_layer'], config['n_embd'], config.get('state_size')) == (n_layer, width, state_size)
    state = f'state {state_size}, ' if state_size else ''
    assert f', {n_layer} layers of width {width}, {state}context ' in capsys.readouterr().out


def test_fewer_steps_for_what_is_not_new_or_wider():
    assert begin.sizes_for('cpu', 'gpt')['max_iters'] == 800
    assert begin.sizes_for('cpu', 'gpt', 64)['max_iters'] == 800
    assert begin.sizes_for('cpu', 'gpt', is_new=False)['max_iters'] == 400
    assert begin.sizes_for('cpu', 'mamba', 256)['max_iters'] == 400
    assert begin.sizes_for('cpu', 'mamba', 256)['state_size'] == 0


def test_a_tuned_run_says_the_sizes_of_its_model(here):
    train('--model=gpt --out_dir=base --max_iters=1')
    sizes_left_out = TINY.replace('--n_layer=1', '').replace('--n_embd=32', '')
    train('--out_dir=tuned --init_from=base --max_iters=1', sizes_left_out)
    config, settings = load('base/ckpt.pt')['config'], load('tuned/ckpt.pt')['settings']
    sizes = settings['n_layer'], settings['n_embd'], settings['n_head']
    assert sizes == (1, 32, config['n_head'])


def test_nought_is_no_and_none_is_nothing_said(here, capsys):
    train('--model=gpt --max_iters=1')
    assert script('train.py', TINY, '--max_iters=2 --qk_norm=0') == 2
    assert 'with qk_norm=True, not False' in capsys.readouterr().err
    train('--max_iters=2 --qk_norm=1')
    train('--model=mamba --out_dir=mamba --max_iters=1 --qk_norm=none')


def test_fine_tuning_accepts_what_the_model_has(base):
    train('--init_from=base --model=gpt --n_layer=1 --tie_embeddings=True --window=0', STILL)


def test_fine_tuning_may_change_dropout_and_context(base):
    argv = TINY.replace('--block_size=16', '')
    assert script('train.py', argv, STILL, '--init_from=base --out_dir=same') == 0
    assert (
        load('same/ckpt.pt')['config'] == load('base/best.pt')['config']
        and load('same/ckpt.pt')['settings']['block_size'] == 16
    )
    assert (
        script('train.py', argv, '--init_from=base --dropout=0.3 --block_size=32 --max_iters=1')
        == 0
    )
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
    sizes = dict(
        Llama=dict(
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        ),
        Mamba2=dict(head_dim=16, num_heads=4, state_size=8, n_groups=2, initializer_range=0.2),
        Mixtral=dict(
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            initializer_range=0.5,
        ),
    )[kind]
    config = getattr(transformers, kind + 'Config')(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        **sizes,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = getattr(transformers, kind + 'ForCausalLM')(config).eval()
    model.save_pretrained('hf')
    if tokenizer:
        shutil.copy(f'data/{tokenizer}/tokenizer.json', 'hf/tokenizer.json')
    return model


HF = TINY.replace('--n_layer=1 --n_embd=32', '')


@pytest.mark.parametrize('kind', ['Llama', 'Mamba2'])
# more ids than the tokenizer has: a padded vocabulary
@pytest.mark.parametrize('tokenizer, more', [('tiny', 0), ('', 0), ('tiny', 11)])
def test_fine_tuning_a_model_of_transformers(here, capsys, kind, tokenizer, more):
    model = save_theirs(kind, batches.open_dataset('tiny').vocab_size + more, tokenizer)
    assert script('train.py', HF, STILL, '--init_from=hf:hf --out_dir=still') == 0
    with torch.no_grad():
        def loss(x, y):
            return torch.nn.functional.cross_entropy(
                model(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction='sum'
            )
        pairs = list(batches.open_dataset('tiny').val_batches(8, 16))
        val = (
            sum(loss(x, y) for x, y in pairs) / sum(int((y >= 0).sum()) for _, y in pairs)
        ).item()
        assert metrics('still', 'val_loss')[1] == pytest.approx(val, abs=1e-5)
        assert metrics('still', 'loss')[1] == pytest.approx(
            loss(*first_batch()).item() / 64, abs=1e-5
        )

    flags = '--init_from=hf:hf/ --learning_rate=1e-2 --lr_decay_iters=20 --warmup_iters=2'
    assert script('train.py', HF, flags, '--out_dir=unbroken') == 0
    assert metrics('unbroken', 'val_loss')[20] < val - 0.3
    assert script('train.py', HF, flags, '--max_iters=10') == 0
    shutil.rmtree('hf')
    assert script('train.py', HF, flags) == 0  # goes on without it
    same = ('weights', 'optimizers', 'config')
    assert metrics() == metrics('unbroken') and all(
        plain(load()[key]) == plain(load('unbroken/ckpt.pt')[key]) for key in same
    )
    capsys.readouterr()
    assert script('sample.py', '--max_new_tokens=20 --device=cpu --start=e') == 0


def test_tuned_experts_take_all_their_tokens(here, capsys):
    model = save_theirs('Mixtral', batches.open_dataset('tiny').vocab_size)
    with torch.no_grad():
        x, y = first_batch()
        loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item()
    flags = '--init_from=hf:hf --max_iters=1 --aux_loss=0 --z_loss=0'
    assert script('train.py', HF, flags) == 0
    assert 'note: capacity_factor=0' in capsys.readouterr().out
    assert metrics('out', 'loss')[1] == pytest.approx(loss, abs=1e-5)
    assert script('train.py', HF, flags, '--capacity_factor=1 --out_dir=limited') == 0
    assert 'note: capacity_factor' not in capsys.readouterr().out
    assert abs(metrics('limited', 'loss')[1] - loss) > 1e-3


@pytest.mark.parametrize(
    'vocab_size, tokenizer, flags, words',
    [
        (5, '', '', 'tiny vocabulary hf:hf 5'),
        (-1, '', '', 'tiny vocabulary hf:hf'),
        (5, 'tiny', '', 'hf/tokenizer.json vocab_size=5'),
        (90, 'other', '', 'tiny another tokenizer hf:hf --tokenizer=hf/tokenizer.json'),
        (90, '', '--model=mamba', 'model=gpt mamba'),
        (90, '', '--n_layer=4', 'n_layer=2 4'),
    ],
)
def test_a_model_of_transformers_that_does_not_fit(
    here, capsys, vocab_size, tokenizer, flags, words
):
    save_theirs(
        'Llama',
        vocab_size % (batches.open_dataset('tiny').vocab_size if vocab_size < 0 else 1000),
        tokenizer,
    )
    assert script('train.py', HF, '--init_from=hf:hf', flags) == 2
    refused(capsys, *words.split())
    assert not os.path.exists('out')


# --- sizes by name

@pytest.fixture
def wide(here):
    """A dataset with a vocabulary of 16,384, and a file in the place of out_dir: the run ends
    before its first step."""
    os.makedirs('data/wide')
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(0, 16384, 200).astype('int32').tofile(
            f'data/wide/{split}.bin'
        )
    open('file', 'w').close()
    return (
        '--dataset=wide --vocab_size=16384 --block_size=16 --tokens_per_step=32 --batch_size=2 '
        '--device=cpu --vram=1000 --out_dir=file')


@pytest.mark.parametrize('model', ['mamba', 'gpt', 'hybrid'])
def test_size_is_a_number_of_parameters(wide, capsys, model):
    assert script('train.py', wide, f'--model={model} --size=50m') == 2
    said = capsys.readouterr()
    assert 'error: file: cannot be written to' in said.err
    assert 45 < float(re.search(rf'\n{model}: ([\d.]+)M parameters', said.out)[1]) < 55


def test_layers_and_width_win_over_size(wide, capsys):
    assert script('train.py', wide, '--model=gpt --size=50m --n_layer=2') == 2
    assert f', 2 layers of width {SIZES["gpt", "50m"]["n_embd"]},' in capsys.readouterr().out
    assert script('train.py', wide, '--model=gpt --size=400m --n_embd=64') == 2
    assert f', {SIZES["gpt", "400m"]["n_layer"]} layers of width 64,' in capsys.readouterr().out


@pytest.mark.parametrize('flags', ['--init_from=base', '--out_dir=base'])
def test_size_of_a_model_that_there_is(base, capsys, flags):
    """What size stands for must be the model's own, in fine-tuning and in going on."""
    argv = TINY.replace('--n_layer=1 --n_embd=32', '')
    assert script('train.py', argv, flags, '--size=150m') == 2
    refused(capsys, 'base', 'n_layer=1, not 20')
    assert script('train.py', argv, flags, '--n_layer=1 --size=50m') == 2
    refused(capsys, 'base', 'n_embd=32, not 512')
    assert script('train.py', argv, flags, '--n_layer=1 --n_embd=32 --size=50m --max_iters=14') == 0
    # the size that was said does not contradict the layers
    assert script('train.py', argv, flags, '--max_iters=15') == 0


@pytest.mark.parametrize('value', ['60m', '50M', '50', 'small'])
def test_unknown_size(here, capsys, value):
    train(f'--model=gpt --size={value}', status=2)
    refused(capsys, f'size={value} must be', '50m, 150m, 400m')
