"""train.py as its user meets it: runs that are killed, stopped, continued, shared by two processes.

Most runs happen in this process (`script`), for importing torch costs more than twenty steps of a
tiny model; others (`forked`) are for what needs one: signals, kills, torchrun.
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import forks
from helpers.runs import (
    POSIX,
    TIMES,
    at_a_call,
    files,
    forked,
    launch,
    load,
    metrics,
    refused,
    same_run,
    script,
    train,
)

from mambino.train import batches, building, identity
from mambino.weights import checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')


KILLED = (-9, 9)  # on Windows a status as others
CALLS = 3000      # of functions in a step with an evaluation and a save: some thousands


# --- a run that was killed goes on as if nothing had happened

COMBOS = [
    f'{model} {optimizer} {accumulation}'
    for model in ('mamba', 'gpt', 'hybrid')
    for optimizer in ('adamw', 'muon')
    for accumulation in (1, 3)
] + [
    'mamba adamw 1 --version=1',
    'mamba adamw 1 --version=3',
    'hybrid muon 1 --version=3',
    'mamba muon 3 --version=3 --mimo_rank=2 --intermediate_size=48 --dropout=0.1',
    'gpt adamw 3 --objective=masked --dataset=tiny:3,more:1',
    'hybrid muon 3 --objective=block --block_length=4',
    'mamba muon 3 --carry_state=True --batch_size=2',
    'mamba adamw 1 --carry_state=True --version=3',
    'gpt adamw 3 --n_expert=4',
    'gpt muon 1 --n_expert=4 --gradient_checkpointing=True',
]


@pytest.mark.parametrize('combo', COMBOS)
def test_kill_and_resume_is_bit_identical(here, combo):
    """The kill comes at any call of a function, in a step, an evaluation or a save."""
    model, optimizer, micro_steps, *more = combo.split()
    flags = (
        f'--model={model} --optimizer={optimizer} --tokens_per_step={32 * int(micro_steps)} '
        + ' '.join(more)
    )
    flags += '' if model == 'mamba' else ' --dropout=0.1'
    train(flags, '--out_dir=unbroken')
    rng = random.Random(combo)
    dies = at_a_call('os.kill(os.getpid(), 9)', lines=rng.randint(2, 18), calls=rng.randrange(CALLS))
    (status,), _ = forked(flags, before=dies)
    assert status in KILLED and len(metrics()) < 24
    if rng.random() < 0.5:    # the machine went down while a line was being written
        with open('out/metrics.jsonl', 'a') as f:
            f.write('{"step": 1, "lo')
    train(flags)
    assert [line['step'] for line in metrics() if 'loss' in line] == list(range(1, 21))
    assert list(metrics(key='val_loss')) == [5, 10, 15, 20]
    same_run('unbroken', 'out')


@pytest.mark.parametrize('moment', ['save', 'replace'])
def test_kill_during_the_save_leaves_the_checkpoint_before(here, moment):
    before = {'save': '''
import io, os, torch
save, n = torch.save, [0]
def patched(obj, f):
    n[0] += 1
    if n[0] == 3:  # 1 and 2 are ckpt.pt and best.pt of step 5
        save(obj, whole := io.BytesIO())
        f.write(whole.getvalue()[:9999]); f.flush(); os.kill(os.getpid(), 9)
    save(obj, f)
torch.save = patched''', 'replace': '''
import os
replace, n = os.replace, [0]
def patched(a, b):
    n[0] += b.endswith("ckpt.pt")
    if n[0] == 2:
        os.kill(os.getpid(), 9)
    replace(a, b)
os.replace = patched'''}[moment]
    (status,), _ = forked('--model=gpt', before=before)
    assert status in KILLED
    assert checkpoint.load_checkpoint('out/ckpt.pt')['counters']['step'] == 5
    train('--model=gpt')
    train('--model=gpt --out_dir=unbroken')
    same_run('unbroken', 'out')
    assert not [name for name in os.listdir('out') if name.endswith('.tmp')]


def test_kill_between_best_and_latest_loses_neither(here):
    train('--model=gpt --out_dir=unbroken')
    (status,), _ = forked('--model=gpt', before="""
import os
from mambino.weights import checkpoint
save = checkpoint.save_checkpoint
def once(path, contents):
    save(path, contents)
    os.kill(os.getpid(), 9)
checkpoint.save_checkpoint = once""")
    assert status in KILLED
    train('--model=gpt')
    same_run('unbroken', 'out')


# --- two processes give the curve of one

@pytest.mark.parametrize('model, batch_size, more', [  # one and two micro-batches of a process
    pytest.param('gpt', 4, '', id='torchrun'), ('mamba', 2, ''), ('mamba', 4, '--version=3'),
    ('gpt', 2, '--dataset=tiny:3,more:1'), ('mamba', 2, '--objective=block --block_length=4 --state_size=128'),
    ('mamba', 2, '--carry_state=True'),
    # limits and the loss of balance are a micro-batch's own
    ('gpt', 4, '--n_expert=4 --capacity_factor=0 --aux_loss=0')])
def test_ddp_equals_one_process(request, here, model, batch_size, more):
    flags = (
        f'--model={model} {more} --tokens_per_step=128 --learning_rate=1e-2 --warmup_iters=2 '
        '--schedule=wsd --decay_fraction=0')
    mine = flags, f'--batch_size={batch_size} --max_iters=10'
    if not forks.can_fork or 'torchrun' in request.node.name:
        process = launch(*mine, module='torch.distributed.run --standalone --nproc_per_node=2')
        out, err = process.communicate()
        assert process.returncode == 0, err
    else:
        statuses, (out, err, *_) = forked(*mine, world=2, joined=True)
        assert statuses == [0, 0], err
    assert f'(2 x {4 // batch_size} x {batch_size} x 16)' in out and out.count('done: ') == 1
    train(flags)  # goes on from two processes with one
    train(flags, '--batch_size=8 --out_dir=one')
    for key in ('loss', 'val_loss', 'grad_norm'):
        a, b = metrics(key=key), metrics('one', key)
        assert a.keys() == b.keys() and list(a.values()) == pytest.approx(
            list(b.values()), abs=1e-5 if 'l' in key else 1e-4
        )
    # there was a curve; a mixture's, and a bound's, is flatter
    assert metrics(key='loss')[20] < metrics(key='loss')[1] - (0.1 if re.search('dataset|objective', more) else 0.2)


# --- signals

@POSIX
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_go_on(here, capsys, number, status):
    flags = '--model=gpt --max_iters=40 --eval_interval=15'
    told = at_a_call(f'os.kill(os.getpid(), {int(number)})', lines=7, calls=CALLS // 4)
    (ended,), (out, err) = forked(flags, before=told)
    assert ended == status and not err
    step = load()['counters']['step']
    assert step == metrics()[-1]['step'] < 40
    command = re.search(
        rf'stopped at step {step}, saved out/ckpt.pt; to go on: python (.*)\n', out
    ).group(1)
    assert script(*command.split(' ', 1)) == 0
    assert (
        f'going on from out/ckpt.pt at step {step}' in (said := capsys.readouterr().out)
        and 'done: 40 steps' in said
    )
    assert sorted(metrics(key='loss')) == list(range(1, 41))


# --- numbers that are none, disks that are full

@pytest.mark.parametrize('rate, eval_interval', [(1e13, 1), (1e15, 1), (1e15, 3), (1e4, 1)])
def test_nan_ends_the_run_and_names_a_good_checkpoint(here, capsys, rate, eval_interval):
    flags = f'--model=mamba --grad_clip=0 --warmup_iters=0 --eval_interval={eval_interval} --weight_decay=1'
    train(flags, '--max_iters=6')
    train(flags, f'--max_iters=200 --learning_rate={rate}', status=2)
    good = load()
    refused(
        capsys,
        'not a finite number',
        f'out/ckpt.pt, of step {good["counters"]["step"]}.',
        '--learning_rate',
    )
    assert good['counters']['step'] >= 6
    assert all(w.isfinite().all() for w in good['weights'].values())
    assert all(math.isfinite(line['val_loss']) for line in good['counters']['history'])


def test_nan_before_any_checkpoint(here, capsys):
    train('--model=gpt --grad_clip=0 --warmup_iters=0 --learning_rate=1e15', status=2)
    refused(capsys, 'not a finite number', 'no checkpoint')
    assert not os.path.exists('out/ckpt.pt')


@POSIX
@pytest.mark.parametrize('limit', [30_000, 1500])  # room for the log alone; not even for that
def test_full_disk_does_not_stop_the_training(here, capsys, limit):
    import resource
    train('--model=gpt --max_iters=5')
    before = {path: data for path, data in files('out').items() if path.endswith('.pt')}
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        train('--model=gpt', status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert err.startswith('error: out: ') and err.count('\n') == 1, err
    assert out.count('.pt could not be saved') == 3 and 'step     20/20' in out
    after = files('out')
    assert {path: after[path] for path in before} == before
    assert set(after) == {*before, 'out/metrics.jsonl'}
    train('--model=gpt')  # there is space again
    train('--model=gpt --out_dir=unbroken --max_iters=5')
    train('--model=gpt --out_dir=unbroken')
    same_run('unbroken', 'out')


# --- going on, and beginning anew

def test_more_steps_go_on_and_a_finished_run_says_so(finished, capsys):
    before = files('out')
    train('--model=gpt --max_iters=10')
    assert 'has made its 10 steps' in capsys.readouterr().out and files('out') == before
    train('--model=gpt --max_iters=15')
    assert list(metrics(key='loss')) == list(range(1, 16)) and load()['counters']['step'] == 15
    assert metrics()[:12] == [
        json.loads(line, object_hook=lambda d: {k: v for k, v in d.items() if k not in TIMES})
        for line in before['out/metrics.jsonl'].decode().splitlines()
    ]


def test_scratch_keeps_the_old_run_aside(finished):
    before = files('out')
    train('--model=mamba --init_from=scratch --max_iters=2')
    assert {path: data for path, data in files('out').items() if path.endswith('.old')} == \
        {path + '.old': data for path, data in before.items()}
    assert load()['kind'] == 'mamba' and list(metrics(key='loss')) == [1, 2]


def test_a_dataset_elsewhere_is_not_its_namesake_in_data(here, capsys):
    shutil.copytree('data/other', 'elsewhere/tiny')
    shutil.rmtree('data/other')
    train('--model=gpt --dataset=elsewhere/tiny --max_iters=1')
    train('--model=gpt --dataset=./elsewhere/tiny/ --max_iters=2')
    train('--model=gpt --dataset=tiny --max_iters=3', status=2)
    refused(capsys, 'dataset=elsewhere/tiny', 'not tiny:')
    train('--model=gpt --dataset=tiny --max_iters=1 --out_dir=2')
    train(
        f'--model=gpt --dataset={shlex.quote(str(here / "data" / "tiny"))} --max_iters=2 --out_dir=2'
    )
    assert (
        load('2/ckpt.pt')['settings']['dataset'] == 'tiny'
        and load('2/ckpt.pt')['counters']['step'] == 2
    )


def test_weight_decay_can_change_on_the_way(here):
    for optimizer in ('adamw', 'muon'):
        train(
            f'--model=gpt --optimizer={optimizer} --out_dir={optimizer} --max_iters=5 --weight_decay=0'
        )
        train(
            f'--model=gpt --optimizer={optimizer} --out_dir={optimizer} --max_iters=10 --weight_decay=0.5'
        )
        decays = [
            {group['weight_decay'] for group in opt['param_groups']}
            for opt in load(f'{optimizer}/ckpt.pt')['optimizers']
        ]
        assert set().union(*decays) == {0.0, 0.5}


def test_more_tokens_a_step_go_on_where_the_text_was(here, monkeypatch):
    from mambino.train import batches
    seen, batch = [], batches.Dataset.batch

    def watched(self, indices, *rest):
        seen.extend(indices)
        return batch(self, indices, *rest)
    monkeypatch.setattr(batches.Dataset, 'batch', watched)
    train('--model=gpt --max_iters=5')
    train('--model=gpt --max_iters=10 --tokens_per_step=128')
    used = list(dict.fromkeys(seen))          # each run fetches one step ahead
    assert used[:5 * 4 + 5 * 8] == list(range(60))


# --- the thread that fetches

@pytest.mark.parametrize('more', ['', '--batch_size=4'])
def test_a_foreign_id_in_the_middle_of_a_run(here, capsys, monkeypatch, more):
    """In a file too large to be checked at the start."""
    monkeypatch.setattr(
        batches.Dataset, '__post_init__', lambda self: vars(self).update(token_bytes=None, is_masked=False)
    )
    monkeypatch.setattr(identity, 'WHOLE', 0)
    ids = np.fromfile('data/tiny/train.bin', '<i4')
    # the first sequence of step 12, counted from 0
    x, _ = batches.open_dataset('tiny').batch(np.arange(4 * 12, 4 * 12 + 1), 16, 1337)
    where = next(i for i in range(len(ids) - 16) if ids[i:i + 16].tolist() == x[0].tolist())
    ids[where + 5] = 5000
    ids.tofile('data/tiny/train.bin')
    train('--model=gpt', more, status=2)
    refused(capsys, 'data/tiny/train.bin', 'token id 5000')
    assert load()['counters']['step'] == 10 and metrics()[-1]['step'] in (11, 12)


@POSIX
@pytest.mark.parametrize('module, owner, name', [
    ('mambino.language_model', 'LanguageModel', 'forward'),     # in the loop
    ('mambino.train.batches', 'Dataset', 'batch')])             # in the thread
def test_a_second_interrupt_ends_a_step_that_takes_forever(here, module, owner, name):
    """Both come from a thread, while the step, or the batch it waits for, takes forever."""
    (status,), (out, _) = forked('--model=gpt', before=f'''
import os, signal, threading, time
from mambino.train import progress
from {module} import {owner}
owner, name = {owner}, {name!r}
plain, calls = getattr(owner, name), []
asked = threading.Event()
catch = progress.catch_stop_signals
def caught():
    received = catch()
    threading.Thread(target=interrupt, daemon=True).start()
    return received
def interrupt():
    asked.wait()
    os.kill(os.getpid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        time.sleep(0.01)            # the first lets the step end
    print('asked', flush=True)
    os.kill(os.getpid(), signal.SIGINT)
def slow(*args):
    calls.append(1)
    if len(calls) == 6:
        asked.set()
        while True:
            time.sleep(0.01)
    return plain(*args)
progress.catch_stop_signals = caught
setattr(owner, name, slow)''')
    assert status == -signal.SIGINT and out.endswith('asked\n')


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_torchs_compiler_is_not_imported(here, optimizer):
    """It takes two seconds of each start, and compiles nothing here."""
    told = "import atexit, sys; atexit.register(lambda: print('torch._dynamo' in sys.modules))"
    process = launch(f'--max_iters=2 --eval_interval=1 --optimizer={optimizer}', before=told)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.split()[-1] == 'False'


def test_adamw_is_torchs():
    torch.manual_seed(0)
    start = torch.randn(5, 7)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizers = building.AdamW([mine], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(3):
        for p, optimizer in zip((mine, theirs), optimizers):
            p.grad = p.detach().sin()
            optimizer.step()
    assert torch.equal(mine, theirs) and not torch.equal(mine, start)
    ours, reference = (optimizer.state_dict() for optimizer in optimizers)
    assert ours['param_groups'] == reference['param_groups']
    for name, value in reference['state'][0].items():
        assert torch.equal(ours['state'][0][name], value)
    seen = []
    optimizers[0].register_step_post_hook(lambda *args: seen.append(1))
    optimizers[0].step()
    assert seen == [1]
