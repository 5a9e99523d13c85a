"""Runs of train.py with --adapter go on bit by bit, know their base, and are sampled with it."""
import os
import shutil

import pytest
import torch
from helpers import forks
from helpers.adapters import LORA, PREFIX
from helpers.models import assert_close
from helpers.runs import files, forked, metrics, refused, same_run, script, train

from mambino.export import to_peft
from mambino.train.memory import estimate
from mambino.train.sizes import SIZES
from mambino.weights import checkpoint, loading

pytestmark = pytest.mark.usefixtures('quiet_and_seeded', 'one_thread')

KINDS = ['gpt', 'mamba', 'hybrid']


@pytest.fixture(scope='module')
def bases(template):
    """Finished runs of each kind to begin with: base-gpt, base-mamba, base-hybrid."""
    before = os.getcwd()
    os.chdir(template)
    for kind in KINDS:
        # far from its best, so that an adapter has something to learn
        train(f'--model={kind} --max_iters=5 --optimizer=adamw --learning_rate=1e-3 --out_dir=base-{kind}')
    os.chdir(before)
    return template


@pytest.fixture
def based(bases, here):
    for kind in KINDS:
        shutil.copytree(bases / f'base-{kind}', here / f'base-{kind}')
    return here


class Killed(BaseException):
    """What a process dies of."""


@pytest.mark.parametrize('how', ['lora gpt', 'lora mamba', 'prefix gpt', 'prefix mamba', 'prefix hybrid'])
def test_run_trains_the_adapter_alone_and_goes_on_bit_by_bit(based, capsys, monkeypatch, how):
    adapter, kind = how.split()
    before = files(f'base-{kind}')
    flags = f'--adapter={adapter} --init_from=base-{kind} --prefix_length=4 --learning_rate=1e-2 ' \
            '--lora_dropout=0.1'
    train(flags, '--out_dir=unbroken')
    assert 'parameters are trained' in capsys.readouterr().out
    update, steps = torch.optim.AdamW.step, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 13:
            raise Killed
        return update(*args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, 'step', dies)
        train(flags)
    assert 6 <= len(metrics()) < 24
    train('--init_from=resume' if kind == 'gpt' else flags)
    same_run('unbroken', 'out')
    assert files(f'base-{kind}') == before

    ckpt, base = checkpoint.load_checkpoint('out'), checkpoint.load_checkpoint(f'base-{kind}')
    assert all('lora_' in name or name.startswith('prefix.') for name in ckpt['weights'])
    moments = [t for state in ckpt['optimizers'][0]['state'].values() for t in state.values() if t.ndim]
    assert sum(t.numel() for t in moments) == 2 * sum(t.numel() for t in ckpt['weights'].values())
    net = loading.model_of(ckpt)
    for name, w in base['weights'].items():
        assert torch.equal(net.state_dict()[name], w)
    losses = metrics('out', 'val_loss')
    assert losses[20] < metrics(f'base-{kind}', 'val_loss')[5]
    capsys.readouterr()
    train('--eval_only')
    assert f'{losses[min(losses, key=losses.get)]:.4f}' in capsys.readouterr().out
    if adapter == 'lora':                                   # to begin with: the merged model
        merged = loading.load_base('out')
        fresh = checkpoint.build(merged['kind'], merged['config']).eval()
        fresh.load_state_dict(merged['weights'])
        assert_close(fresh(idx := torch.arange(9)[None])[0], net(idx)[0], 1e-5)
        train('--init_from=out --out_dir=upon --adapter=lora --max_iters=1')
        assert loading.model_of(checkpoint.load_checkpoint('upon'))
    else:
        train('--init_from=out --out_dir=more', status=2)
        refused(capsys, 'prefix', 'merged')


@pytest.mark.parametrize('flags, words', [
    ('--adapter=lora', 'adapter=lora needs a model --init_from'),
    ('--adapter=loar --init_from=base-gpt', 'adapter=loar lora or prefix'),
    ('--adapter=lora --init_from=base-gpt --lora_targets=q_porj', 'q_porj is no matrix q_proj'),
    ('--adapter=lora --init_from=base-gpt --lora_rank=0', 'lora_rank'),
    ('--adapter=lora --init_from=base-gpt --lora_rank=33', 'lora_rank=33 width 32'),
    ('--adapter=lora --init_from=base-gpt --lora_dropout=1', 'lora_dropout'),
    ('--adapter=lora --init_from=base-gpt --optimizer=muon', 'muon adapter'),
    ('--adapter=prefix --init_from=base-gpt --prefix_length=99', 'prefix_length=99 from 1 to 16'),
    ('--adapter=prefix --init_from=base-gpt --gradient_checkpointing=True', 'gradient_checkpointing prefix'),
])
def test_settings_that_cannot_be_are_one_line(based, capsys, flags, words):
    train(flags, status=2)
    refused(capsys, *words.split())


@pytest.mark.parametrize('flags, expected', [
    ('--model=gpt', ('muon', 1e-2, 'wsd')),
    ('--model=gpt --optimizer=adamw', ('adamw', 4e-3, 'wsd')),
    ('--model=gpt --learning_rate=0.5 --schedule=cosine', ('muon', 0.5, 'cosine')),
    ('--size=50m --model=gpt', ('adamw', 1e-3, 'cosine')),
    ('--init_from=base-gpt', ('adamw', 3e-4, 'cosine')),
    ('--init_from=base-gpt --adapter=lora', ('adamw', 1e-3, 'cosine')),
    ('--out_dir=base-gpt --optimizer= --learning_rate=0', ('adamw', 4e-3, 'wsd')),      # as it was begun
])
def test_optimizer_rate_and_schedule_are_by_what_is_trained(based, monkeypatch, flags, expected):
    monkeypatch.setitem(SIZES, ('gpt', '50m'), {})                  # its name alone
    train(flags, '--max_iters=6')
    out_dir = 'base-gpt' if '--out_dir' in flags else 'out'
    settings = checkpoint.load_checkpoint(out_dir)['settings']
    assert (settings['optimizer'], settings['learning_rate'], settings['schedule']) == expected


def test_base_that_moved_or_changed_is_named(based, capsys):
    train('--adapter=lora --init_from=base-gpt --max_iters=5')
    shutil.copytree('base-mamba', 'elsewhere/base-gpt')     # another model of that name is not taken for it
    os.chdir('elsewhere')
    assert script('sample.py', '--out_dir=../out --device=cpu --max_new_tokens=5 --start=e') == 0
    os.chdir('..')
    os.rename('base-gpt', 'moved')
    capsys.readouterr()
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=5 --start=e') == 2
    refused(capsys, 'base-gpt', '--init_from=', '--adapters=')
    train('--max_iters=10', status=2)
    refused(capsys, 'base-gpt')
    train('--max_iters=10 --init_from=moved')
    assert script('sample.py', '--out_dir=moved --adapters=out --device=cpu --max_new_tokens=5 --start=e') == 0
    # the run has taken note
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=5 --start=e') == 0
    train('--model=gpt --out_dir=moved --max_iters=10')     # trained further: other weights
    capsys.readouterr()
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=5 --start=e') == 2
    refused(capsys, 'moved', 'other weights')


def test_run_stays_what_it_is(based, capsys):
    train('--adapter=lora --init_from=base-gpt --max_iters=5')
    for flags in ('--lora_rank=4', '--adapter=prefix', '--lora_targets=q_proj', '--adapter='):
        capsys.readouterr()
        train(flags, status=2)
        # an adapter needs its base
        advice = 'scratch' if flags == '--adapter=' else 'or choose'
        refused(capsys, flags[2:].split('=')[0], advice)
    capsys.readouterr()
    train('--adapter=lora --out_dir=base-gpt', status=2)    # a whole model's run
    refused(capsys, 'adapter')


@pytest.mark.skipif(not forks.can_fork, reason='forks')
def test_two_processes_train_as_one(based):
    flags = '--adapter=lora --init_from=base-mamba --max_iters=6'
    statuses, said = forked(flags, world=2, joined=True)
    assert statuses == [0, 0], said
    train(flags, '--out_dir=one')
    for step, loss in metrics('one', 'loss').items():
        assert metrics('out', 'loss')[step] == pytest.approx(loss, rel=1e-5)


def test_what_peft_saved_is_sampled_with_our_base(based, capsys):
    pytest.importorskip('safetensors')
    train('--adapter=lora --init_from=base-gpt --max_iters=5 --learning_rate=0.1')
    os.mkdir('theirs')
    to_peft.write(None, None, 'theirs', ckpt=checkpoint.load_checkpoint('out'), base='base')
    said = []
    for flags in ('--out_dir=out', '--out_dir=base-gpt --adapters=theirs', '--out_dir=base-gpt'):
        capsys.readouterr()
        assert script('sample.py', flags, '--device=cpu --max_new_tokens=20 --start=e') == 0
        said.append(capsys.readouterr().out.rpartition("'e'\n")[2])
    assert said[0] == said[1] != said[2]
    for file, content, word in (
            ('adapter_config.json', b'{"peft_type": "LORA"}', 'KeyError'),
            ('adapter_config.json', b'[]', 'no JSON object'),
            ('adapter_config.json', b'{"peft', 'theirs'),
            ('adapter_model.safetensors', b'7', 'cut short'),
            ('adapter_model.safetensors', None, 'adapter_model.safetensors')):
        kept = files('theirs')
        open(f'theirs/{file}', 'wb').write(content) if content else os.remove(f'theirs/{file}')
        assert script('sample.py', '--out_dir=base-gpt --adapters=theirs --device=cpu') == 2
        refused(capsys, 'theirs', word)
        for path, content in kept.items():
            open(path, 'wb').write(content)


def test_memory_of_an_adapter():
    config = dict(n_layer=4, n_embd=64, n_head=2, vocab_size=512)
    place = dict(device='cpu', dtype='float32')
    whole = estimate('gpt', config, 4, 64, **place)
    part = estimate('gpt', config, 4, 64, **place, adapter=LORA)
    assert part['gradients'] < 0.2 * whole['gradients']
    assert part['optimizer'] < 0.2 * whole['optimizer'] and part['total'] < whole['total']
    mamba = dict(n_layer=4, n_embd=64, vocab_size=512)
    assert estimate('mamba', mamba, 2, 64, **place, adapter=PREFIX)['optimizer'] > 0
