"""--parallel=fsdp as its user meets it: two processes that share the weights train as one does, are killed and go on, and leave what one
process would have left.

A process that has imported torch forks two for each run (`pair`): that takes a second; torchrun would take six.
"""
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from mambino.weights import checkpoint
from helpers.runs import ROOT, TINY, load, metrics, plain, refused, script, train

pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'), pytest.mark.usefixtures('one_thread')]
FSDP = '--parallel=fsdp --batch_size=2 --tokens_per_step=128 --learning_rate=1e-2 --warmup_iters=2 --schedule=wsd --decay_fraction=0'
FORKS = '''
import json, os, runpy, shlex, signal, sys
import torch
import torch._dynamo
import torch.distributed.device_mesh, torch.distributed.fsdp, torch.distributed.tensor
from mambino.weights import checkpoint
torch.set_num_threads(1)
children = {}                                               # {process id: rank}
signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, 9) for pid in children])
for line in sys.stdin:
    folder, port, lines, before = json.loads(line)
    signal.alarm(120)                                       # they wait for each other
    for rank in range(2):
        if not (pid := os.fork()):
            os.chdir(folder)
            for number, name in ((1, 'out'), (2, 'err')):
                os.dup2(os.open(f'{name}{rank}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            sys.argv = ['train.py', *shlex.split(lines)]
            status = 1
            try:
                exec(before)
                runpy.run_path(os.environ['TRAIN'], run_name='__main__')
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children[pid] = rank
    statuses = {}
    while len(statuses) < 2:
        pid, status = os.wait()
        statuses[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if os.WIFSIGNALED(status):                          # as torchrun does
            [os.kill(pid, 9) for pid in children]
    signal.alarm(0)
    print(json.dumps([statuses[0], statuses[1]]), flush=True)
'''


@pytest.fixture(scope='module')
def forks():
    env = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8', 'TRAIN': os.path.join(ROOT, 'train.py')}
    with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=env) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def pair(here, forks):
    def run(*lines, before='', statuses=(0, 0)):
        """Two processes train with these flags, each after the statements `before`, which know `rank`; returns what they said."""
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        print(json.dumps([str(here), port, ' '.join((TINY, FSDP, *lines)), before]), file=forks.stdin, flush=True)
        ended = json.loads(forks.stdout.readline())
        said = [open(f'{name}{rank}.txt', encoding='utf-8').read() for rank in range(2) for name in ('out', 'err')]
        assert tuple(ended) == statuses if statuses else all(ended), said
        return said
    return run


def shape_of(x):
    """What a checkpoint is made of, without the values."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.device.type
    if isinstance(x, dict):
        return {k: shape_of(v) for k, v in x.items()}
    return [shape_of(v) for v in x] if isinstance(x, (list, tuple)) else type(x)


def same_run(a, b):
    assert metrics(a) == metrics(b)
    for name in ('ckpt.pt', 'best.pt'):
        assert plain(load(f'{a}/{name}')) == plain(load(f'{b}/{name}'))
    assert sorted(os.listdir(a)) == sorted(os.listdir(b)) == ['best.pt', 'ckpt.pt', 'metrics.jsonl']


@pytest.mark.parametrize('flags', [
    'gpt adamw --gradient_checkpointing=True', 'gpt muon --n_layer=3 --n_expert=4 --aux_loss=0 --capacity_factor=0',
    'mamba adamw --version=1', 'mamba muon --n_layer=1', 'hybrid adamw --n_layer=1', 'hybrid muon --tie_embeddings=False'])
def test_fsdp_equals_one_process(pair, flags):
    model, optimizer, *more = flags.split()
    flags = f'--model={model} --optimizer={optimizer} --n_layer=2 --n_embd=64 --eval_interval=4 ' + ' '.join(more)
    one = FSDP.replace('--parallel=fsdp --batch_size=2', '--batch_size=8')
    out = pair(flags, '--max_iters=8')[0]
    assert '(2 x 2 x 2 x 16)' in out and out.count('done: ') == 1
    train(one, flags, '--out_dir=one --max_iters=8')
    both = load(), load('one/ckpt.pt')
    assert both[0].keys() == both[1].keys() and 'shards' not in both[0]
    for part in ('weights', 'optimizers', 'config', 'tokenizer'):
        assert shape_of(both[0][part]) == shape_of(both[1][part])
    assert abs(os.path.getsize('out/ckpt.pt') / os.path.getsize('one/ckpt.pt') - 1) < 0.02  # tied weights are there once
    if model == 'gpt':
        train(one, flags, '--max_iters=12')                 # goes on from two processes with one, and with two again
        pair(flags, '--max_iters=16')
        train(one, flags, '--out_dir=one --max_iters=16')
    for key in ('loss', 'val_loss', 'grad_norm'):
        a, b = metrics(key=key), metrics('one', key)
        assert a.keys() == b.keys() and list(a.values()) == pytest.approx(list(b.values()), abs=1e-5 if 'l' in key else 1e-4)
    losses = list(metrics(key='loss').values())
    assert losses[-1] < losses[0] - 0.05                    # there was a curve


KILLS = [  # which process is killed: at the n-th call of a function for a path that ends so; where it then goes on
    (1, 'replace', 'rank-1-of-2.pt', 2, 5), (0, 'replace', 'ckpt.pt', 2, 5), (0, 'listdir', 'ckpt.shards', 2, 10),
    (0, 'replace', 'ckpt.pt', 3, 10), (0, 'rmdir', 'ckpt.shards', 1, 15)]


def test_kill_and_resume_is_bit_identical(pair):
    flags = '--model=gpt --dropout=0.1 --optimizer=muon --max_iters=15'
    pair(flags, '--out_dir=unbroken')
    for rank, function, end, n, step in KILLS:
        shutil.rmtree('out', ignore_errors=True)
        pair(flags, statuses=None, before=f'''
if rank == {rank}:
    calls, {function} = [], os.{function}
    def patched(*paths, **how):
        calls.extend(1 for path in paths[-1:] if str(path).endswith({end!r}))
        if len(calls) == {n}:
            os.kill(os.getpid(), 9)
        return {function}(*paths, **how)
    os.{function} = patched''')
        ckpt = load()
        assert ckpt['counters']['step'] == step
        if step == 15:                                      # the last checkpoint was whole
            assert 'shards' not in ckpt and os.path.exists('out/ckpt.shards')
        else:
            assert ckpt['weights'] is None and ckpt['shards'] == dict(step=step, world=2)
            sizes = [sum(w.numel() for w in load(path)['weights'].values())
                     for path in (checkpoint.shards_of('out/ckpt.pt', step, 0, 2), 'out/best.pt')]
            assert sizes[0] < 0.6 * sizes[1]
            assert f'going on from out/ckpt.pt at step {step}' in pair(flags)[0]
            same_run('unbroken', 'out')


def test_a_stop_saves_the_whole(pair, capsys):
    out = pair('--model=gpt', statuses=(143, 143), before='''
if rank == 1:                                               # right after a save in shards
    save = checkpoint.save_shard
    def patched(*how):
        save(*how)
        os.kill(os.getpid(), signal.SIGTERM)
    checkpoint.save_shard = patched''')[0]
    assert 'torchrun --nproc_per_node=2 train.py --init_from=resume --out_dir=out --device=cpu --parallel=fsdp\n' in out
    ckpt = load()
    assert ckpt['counters']['step'] == 5 and 'shards' not in ckpt and sorted(os.listdir('out')) == ['best.pt', 'ckpt.pt', 'metrics.jsonl']
    assert script('sample.py', '--out_dir=out/ckpt.pt --device=cpu --max_new_tokens=5') == 0


def test_evaluation_samples_and_patience(pair):
    """Neither hangs, though the processes have different numbers of batches to evaluate; and neither disturbs the training."""
    flags = '--model=hybrid --dropout=0.2 --window=8 --learning_rate=1e-3'
    pair(flags, '--max_iters=10 --eval_interval=10 --out_dir=seldom')
    out = pair(flags, '--max_iters=10 --eval_interval=4 --sample_interval=5')
    assert out[0].count('--- sample at step') == 2 and not out[2]
    assert metrics(key='loss') == metrics('seldom', 'loss') and plain(load()['weights']) == plain(load('seldom/ckpt.pt')['weights'])
    assert f'val_loss {metrics(key="val_loss")[10]:.4f}' in pair('--eval_only')[0]
    pair('--model=gpt --learning_rate=1 --patience=1 --eval_interval=1 --max_iters=50 --init_from=scratch')
    assert 'shards' not in load() and load()['counters']['step'] < 50


def test_a_disk_that_is_full_for_one(pair):
    out = pair('--model=gpt', before='''
if rank == 1:
    save, calls = checkpoint.save_checkpoint, []
    def patched(*how):
        calls.append(1)
        if len(calls) in (1, 3):
            raise OSError('no space left')
        save(*how)
    checkpoint.save_checkpoint = patched''')[0]
    assert out.count('ckpt.pt could not be saved') == 2 and 'done: 20 steps' in out and sorted(os.listdir('out')) == [
        'best.pt', 'ckpt.pt', 'metrics.jsonl']


def test_what_does_not_fit_is_one_line(pair, capsys):
    pair('--model=gpt', statuses=None, before='save = checkpoint.save_checkpoint\ndef patched(path, *how):\n    save(path, *how)\n'
         '    if path.endswith("ckpt.pt"):\n        os.kill(os.getpid(), 9)\ncheckpoint.save = patched')
    go_on = '2 processes torchrun --nproc_per_node=2 --parallel=fsdp --out_dir=out out/best.pt'.split()
    capsys.readouterr()
    for flags in ('', '--init_from=resume', '--init_from=out/ckpt.pt --out_dir=new'):
        train('--model=gpt', flags, status=2)
        refused(capsys, *go_on)
    assert script('sample.py', '--out_dir=out/ckpt.pt --device=cpu') == 2
    refused(capsys, *go_on)
    assert script('sample.py', '--device=cpu --max_new_tokens=5') == 0  # best.pt is whole
    capsys.readouterr()
    with pytest.raises(SystemExit):
        checkpoint.load_checkpoint('out/ckpt.pt', 2, 3)
    refused(capsys, *go_on)
    train('--model=gpt --out_dir=new --parallel=fsdp', status=2)
    refused(capsys, 'parallel=fsdp', 'torchrun')
    train('--model=gpt --out_dir=new --parallel=fdsp', status=2)
    refused(capsys, 'parallel=fdsp', 'ddp or fsdp')
    assert pair('--model=gpt --parallel=ddp', statuses=(2, 2))[1].startswith('error: out/ckpt.pt: was saved by 2')
    os.remove('out/ckpt.shards/5/rank-1-of-2.pt')
    for err in pair('--model=gpt', statuses=(2, 2))[1::2]:
        assert err.startswith('error: out/ckpt.shards/5/rank-1-of-2.pt: is missing') and err.count('\n') == 1
    pair('--model=gpt --init_from=scratch --max_iters=5')
    assert os.path.exists('out/ckpt.shards.old') and 'shards' not in load()


def test_fp16_scales_alike_everywhere(pair):
    pair('--model=gpt --dtype=float16 --optimizer=muon')
    assert metrics(key='loss')[20] < metrics(key='loss')[1] and load()['scaler']['scale'] > 0
