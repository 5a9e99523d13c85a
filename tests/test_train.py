"""train.py as its user meets it: runs that are killed, stopped, refused, continued, shared by two processes.

Most runs happen in this process (`script`), for importing torch costs more than twenty steps of a tiny model; real processes
(`launch`) are for what needs one: signals, torchrun, limits of the system.
"""
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mambino.weights import loading
from mambino.weights import checkpoint
from helpers.runs import (POSIX, ROOT, TIMES, TINY, cut, files, launch, load, metrics, plain, refused, same_run, script, train,
                          wait_for_lines, write_text)

pytestmark = pytest.mark.usefixtures('one_thread')

# --- a run that was killed goes on as if nothing had happened

COMBOS = [f'{model} {optimizer} {accumulation}' for model in ('mamba', 'gpt', 'hybrid') for optimizer in ('adamw', 'muon')
          for accumulation in (1, 3)] + ['mamba adamw 1 --version=1', 'gpt adamw 3 --dataset=tiny:3,more:1',
                                                             'gpt adamw 3 --n_expert=4', 'gpt muon 1 --n_expert=4 --gradient_checkpointing=True']


@pytest.mark.parametrize('combo', COMBOS)
def test_kill_and_resume_is_bit_identical(here, combo):
    model, optimizer, micro_steps, *more = combo.split()
    flags = f'--model={model} --optimizer={optimizer} --tokens_per_step={32 * int(micro_steps)} ' + ' '.join(more)
    flags += '' if model == 'mamba' else ' --dropout=0.1'
    train(flags, '--out_dir=unbroken')
    rng = random.Random(combo)
    for attempt in range(5):  # a process that was too quick to be killed gets another chance
        shutil.rmtree('out', ignore_errors=True)
        process = launch(flags)
        wait_for_lines(process, rng.randint(2, 18))
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.communicate()
        if process.returncode != 0:
            break
    assert process.returncode == -9 and len(metrics()) < 24
    if rng.random() < 0.5:    # the machine went down while a line was being written
        with open('out/metrics.jsonl', 'a') as f:
            f.write('{"step": 1, "lo')
    train(flags)
    assert [line['step'] for line in metrics() if 'loss' in line] == list(range(1, 21))
    assert list(metrics(key='val_loss')) == [5, 10, 15, 20]
    same_run('unbroken', 'out')


@POSIX
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
    process = launch('--model=gpt', before=before)
    process.communicate()
    assert process.returncode == -9
    assert checkpoint.load_checkpoint('out/ckpt.pt')['counters']['step'] == 5
    train('--model=gpt')
    train('--model=gpt --out_dir=unbroken')
    same_run('unbroken', 'out')
    assert not [name for name in os.listdir('out') if name.endswith('.tmp')]


# --- two processes give the curve of one

@pytest.mark.parametrize('model, batch_size, more', [  # one and two micro-batches of a process
    ('gpt', 4, ''), ('mamba', 2, ''), ('gpt', 2, '--dataset=tiny:3,more:1'),
    # limits and the loss of balance are a micro-batch's own
    ('gpt', 4, '--n_expert=4 --capacity_factor=0 --aux_loss=0')])
def test_ddp_equals_one_process(here, model, batch_size, more):
    flags = f'--model={model} {more} --tokens_per_step=128 --learning_rate=1e-2 --warmup_iters=2 --schedule=wsd --decay_fraction=0'
    process = launch(flags, f'--batch_size={batch_size} --max_iters=10',
                     module='torch.distributed.run --standalone --nproc_per_node=2')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f'(2 x {4 // batch_size} x {batch_size} x 16)' in out and out.count('done: ') == 1
    train(flags)  # goes on from two processes with one
    train(flags, '--batch_size=8 --out_dir=one')
    for key in ('loss', 'val_loss', 'grad_norm'):
        a, b = metrics(key=key), metrics('one', key)
        assert a.keys() == b.keys() and list(a.values()) == pytest.approx(list(b.values()), abs=1e-5 if 'l' in key else 1e-4)
    assert metrics(key='loss')[20] < metrics(key='loss')[1] - (0.1 if 'dataset' in more else 0.2)  # there was a curve; a mixture's is flatter


# --- signals

@POSIX
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_says_how_to_go_on(here, capsys, number, status):
    process = launch('--model=gpt --max_iters=400 --eval_interval=150')
    wait_for_lines(process, 7)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and not err
    step = load()['counters']['step']
    assert step == metrics()[-1]['step'] < 400
    command = re.search(rf'stopped at step {step}, saved out/ckpt.pt; to go on: python (.*)\n', out).group(1)
    assert script(*command.split(' ', 1)) == 0
    assert f'going on from out/ckpt.pt at step {step}' in (said := capsys.readouterr().out) and 'done: 400 steps' in said
    assert sorted(metrics(key='loss')) == list(range(1, 401))


# --- numbers that are none, disks that are full

@pytest.mark.parametrize('rate, eval_interval', [(1e20, 1), (1e38, 1), (1e38, 3), (1e4, 1)])
def test_nan_ends_the_run_and_names_a_good_checkpoint(here, capsys, rate, eval_interval):
    flags = f'--model=mamba --grad_clip=0 --warmup_iters=0 --eval_interval={eval_interval} --weight_decay=1'
    train(flags, '--max_iters=6')
    train(flags, f'--max_iters=200 --learning_rate={rate}', status=2)
    good = load()
    refused(capsys, 'not a finite number', f'out/ckpt.pt, of step {good["counters"]["step"]}.', '--learning_rate')
    assert good['counters']['step'] >= 6
    assert all(w.isfinite().all() for w in good['weights'].values())
    assert all(math.isfinite(line['val_loss']) for line in good['counters']['history'])


def test_nan_before_any_checkpoint(here, capsys):
    train('--model=gpt --grad_clip=0 --warmup_iters=0 --learning_rate=1e38', status=2)
    refused(capsys, 'not a finite number', 'no checkpoint')
    assert not os.path.exists('out/ckpt.pt')


@POSIX
@pytest.mark.parametrize('limit', [30_000, 1500])  # room for the log alone; not even for that
def test_full_disk_does_not_stop_the_training(here, limit):
    import resource
    train('--model=gpt --max_iters=5')
    before = {path: data for path, data in files('out').items() if path.endswith('.pt')}
    process = launch('--model=gpt', preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith('error: out: ') and err.count('\n') == 1, err
    assert out.count('.pt could not be saved') == 3 and 'step     20/20' in out
    after = files('out')
    assert {path: after[path] for path in before} == before
    assert set(after) == {*before, 'out/metrics.jsonl'}
    train('--model=gpt')  # there is space again
    train('--model=gpt --out_dir=unbroken --max_iters=5')
    train('--model=gpt --out_dir=unbroken')
    same_run('unbroken', 'out')


# --- evaluation

@pytest.mark.parametrize('model, more', [('gpt', '--dropout=0.2'), ('mamba', '')])
def test_val_loss_is_the_mean_over_the_split(here, capsys, model, more):
    train(f'--model={model} --max_iters=5', more)
    result = metrics()[-1]
    ckpt = checkpoint.load_checkpoint('out/ckpt.pt')
    net, tok = loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)
    ids = torch.from_numpy(np.fromfile('data/tiny/val.bin', '<i4')).long()
    nats = [F.cross_entropy(net(ids[None, s:s + 16])[0][0, :len(ids) - s - 1], ids[s + 1:s + 17], reduction='none')
            for s in range(0, len(ids) - 1, 16)]
    nats = torch.cat(nats).double()
    assert len(nats) == len(ids) - 1
    assert result['val_loss'] == pytest.approx(nats.mean().item(), abs=1e-5)
    assert result['perplexity'] == pytest.approx(math.exp(nats.mean().item()), rel=1e-4)
    size = len(tok.decode(ids[1:].tolist()).encode('utf-8'))
    assert size > len(ids)  # the text has characters of several bytes
    assert result['bits_per_byte'] == pytest.approx(nats.sum().item() / math.log(2) / size, rel=1e-4)

    before, said = files('out'), []
    for _ in range(2):
        capsys.readouterr()
        train('--eval_only')
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and f'val_loss {result["val_loss"]:.4f}' in said[0]
    assert files('out') == before


def test_evaluation_and_samples_leave_the_training_alone(here, capsys):
    flags = '--model=hybrid --dropout=0.2 --window=8'
    train(flags)
    capsys.readouterr()
    train(flags, '--out_dir=sampled --sample_interval=10')
    said = capsys.readouterr().out
    assert [int(n) for n in re.findall(r'--- sample at step (\d+)', said)] == [10, 20]
    assert re.search(r'--- sample at step 10\n[\s\S]{20,}\n---\n', said)
    train(flags, '--out_dir=seldom --eval_interval=9 --eval_iters=1')
    assert metrics() == metrics('sampled') and plain(load()['weights']) == plain(load('sampled/ckpt.pt')['weights'])
    assert metrics(key='loss') == metrics('seldom', 'loss') and list(metrics('seldom', 'val_loss')) == [9, 18, 20]
    assert plain(load()['weights']) == plain(load('seldom/ckpt.pt')['weights'])


def test_samples_come_at_their_own_interval(here, capsys):
    train('--model=gpt --eval_interval=10 --sample_interval=4')
    assert [int(n) for n in re.findall(r'--- sample at step (\d+)', capsys.readouterr().out)] == [4, 8, 12, 16, 20]


def test_batch_size_does_not_change_the_val_loss(here):
    losses = []
    for n in (1, 3, 8):
        train(f'--model=hybrid --tokens_per_step=128 --batch_size={n} --learning_rate=1e-9 --max_iters=1 --out_dir={n}')
        losses.append(metrics(str(n), 'val_loss')[1])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_patience_stops_early(here, capsys):
    train('--model=gpt --learning_rate=0.5 --warmup_iters=0 --eval_interval=1 --patience=3 --max_iters=60')
    losses = list(metrics(key='val_loss').values())
    assert len(losses) < 60 and losses.index(min(losses)) == len(losses) - 4
    assert 'stopping: 3 evaluations' in capsys.readouterr().out
    assert load('out/best.pt')['metadata']['best_loss'] == min(losses)
    assert load('out/best.pt')['counters']['step'] == len(losses) - 3


# --- going on, and beginning anew

def test_more_steps_go_on_and_a_finished_run_says_so(finished, capsys):
    before = files('out')
    train('--model=gpt --max_iters=10')
    assert 'has made its 10 steps' in capsys.readouterr().out and files('out') == before
    train('--model=gpt --max_iters=15')
    assert list(metrics(key='loss')) == list(range(1, 16)) and load()['counters']['step'] == 15
    assert metrics()[:12] == [json.loads(line, object_hook=lambda d: {k: v for k, v in d.items() if k not in TIMES})
                              for line in before['out/metrics.jsonl'].decode().splitlines()]


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
    train(f'--model=gpt --dataset={shlex.quote(str(here / "data" / "tiny"))} --max_iters=2 --out_dir=2')
    assert load('2/ckpt.pt')['settings']['dataset'] == 'tiny' and load('2/ckpt.pt')['counters']['step'] == 2


# --- several datasets

def test_a_mixture_is_drawn_and_evaluated_by_its_weights(here, capsys, monkeypatch):
    from mambino.train import batches
    seen, batch = {'tiny': [], 'more': []}, batches.Dataset.batch

    def watched(self, numbers, *rest):
        seen[self.name].extend(numbers)
        return batch(self, numbers, *rest)
    monkeypatch.setattr(batches.Dataset, 'batch', watched)
    train('--model=gpt --dataset=tiny:3,more:1')
    said, lines = capsys.readouterr().out, metrics()
    assert load()['settings']['dataset'] == 'more:0.25,tiny:0.75'
    for name, numbers in seen.items():
        assert numbers == list(range(len(numbers)))            # each its own text, from the beginning
    last = lines[-1]
    assert last['drawn/tiny'] == 1 - last['drawn/more'] and last['step'] == 20
    assert sum(map(len, seen.values())) == 82 and all(          # the last micro-batch was fetched for a step that did not come
        0 <= len(numbers) - 80 * last[f'drawn/{name}'] <= 2 for name, numbers in seen.items())
    assert said.count('drawn: ') == 4 and f'drawn: more {last["drawn/more"]:.1%}  tiny {last["drawn/tiny"]:.1%}\n' in said
    tokens = {name: json.load(open(f'data/{name}/meta.json'))['splits']['train']['tokens'] for name in seen}
    for name, weight in (('more', '0.2500'), ('tiny', '0.7500')):
        row = re.search(rf'\n  {name} +weight {weight} +([\d,]+) tokens +([\d.]+) epochs\n', said)
        assert row and row.group(1) == f'{tokens[name]:,}'
        assert float(row.group(2)) == pytest.approx(last[f'drawn/{name}'] * 80 * 16 / tokens[name], abs=0.051)

    ckpt, loss, size = checkpoint.load_checkpoint('out/ckpt.pt'), 0, 0    # the val splits, told apart and together
    net, tok = loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)
    for name, weight in (('tiny', 0.75), ('more', 0.25)):
        ids = np.fromfile(f'data/{name}/val.bin', '<i4')
        with torch.no_grad():
            sums = [(net(x, y)[1].item() * int((y >= 0).sum()), int((y >= 0).sum()))
                    for x, y in batches.open_dataset(name).val_batches(8, 16)]
        nats = sum(s for s, _ in sums) / sum(n for _, n in sums)
        assert last[f'val_loss/{name}'] == pytest.approx(nats, abs=1e-5)
        loss, size = loss + weight * nats, size + weight * len(tok.decode(ids[1:].tolist()).encode('utf-8')) / (len(ids) - 1)
    assert last['val_loss/tiny'] != pytest.approx(last['val_loss/more'], abs=1e-3)
    assert last['val_loss'] == pytest.approx(loss, abs=1e-5)
    assert last['bits_per_byte'] == pytest.approx(loss / math.log(2) / size, rel=1e-4)

    before = files('out')
    assert script('train.py', '--eval_only --device=cpu') == 0
    said = capsys.readouterr().out
    assert all(f'{key} {last[key]:.4f}' in said for key in ('val_loss', 'val_loss/tiny', 'val_loss/more'))
    assert files('out') == before
    train('--eval_only --dataset=more')                        # one of them by itself
    assert f'val_loss {last["val_loss/more"]:.4f}' in capsys.readouterr().out


def test_a_mixture_goes_on_only_as_the_same(here, capsys):
    train('--model=gpt --dataset=tiny:3,more:1 --max_iters=15 --eval_interval=3 --out_dir=unbroken')
    for steps, dataset in ((3, 'tiny:3,more:1'), (6, 'more:.5,data/tiny:1.5')):
        train(f'--model=gpt --max_iters={steps} --warmup_iters=1 --lr_decay_iters=15 --eval_interval=3 --dataset={dataset}')
    for other in ('tiny:2,more:1', 'tiny', 'tiny,more', ''):   # the last is the one prepared last
        train(f'--model=gpt --dataset={other} --max_iters=15', status=2)
        refused(capsys, 'dataset=more:0.25,tiny:0.75', '--init_from=scratch')
    argv = TINY.replace('--dataset=tiny', '')                  # left out altogether
    assert script('train.py', argv, '--model=gpt --max_iters=15 --eval_interval=3') == 0
    assert metrics() == metrics('unbroken')
    train('--model=gpt --init_from=resume --dataset=tiny,more --max_iters=16')
    assert load()['settings']['dataset'].startswith('more:0.2')


def test_the_smallest_split_of_a_mixture_bounds_the_context(here):
    train('--model=gpt --dataset=tiny,more --block_size=0 --tokens_per_step=0 --max_iters=1')
    assert load()['settings']['block_size'] == 128             # more has some 200 tokens to evaluate, tiny some 600


# --- bad input: one line, exit status 2, and nothing is harmed

class Bomb:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def foreign_ids():
    ids = np.fromfile('data/tiny/train.bin', '<i4')
    ids[len(ids) // 2] = 5000
    ids.tofile('data/tiny/train.bin')


BAD = {  # flags, words of the message, what breaks things beforehand
    'unknown setting': ('--learning_rat=1', 'learning_rat did you mean --learning_rate'),
    'missing config': ('config/nothing.py', 'config/nothing.py no such config'),
    'no dataset': ('--dataset=tinny --out_dir=new', 'data/tinny no such dataset --dataset=tiny'),
    'val too short': ('--block_size=1024 --tokens_per_step=1024 --out_dir=new', 'val.bin block_size'),
    'foreign ids': ('', 'train.bin 5000 vocabulary', foreign_ids),
    'cut .bin': ('', 'train.bin bytes', lambda: cut('data/tiny/train.bin')),
    'empty .bin': ('', 'val.bin', lambda: open('data/tiny/val.bin', 'w').close()),
    'broken meta': ('', 'meta.json', lambda: cut('data/tiny/meta.json')),
    'no tokenizer': ('', 'tokenizer.json', lambda: os.remove('data/tiny/tokenizer.json')),
    'other tokenizer': ('--init_from=resume --dataset=other', 'tokenizer tiny'),
    'other dataset': ('--dataset=other', 'dataset=tiny other'),
    'other mixture': ('--dataset=tiny:3,more:1', 'dataset=tiny, not more:0.25,tiny:0.75'),
    'mixed tokenizers': ('--dataset=tiny,other', 'other tokenizer tiny --tokenizer=data/tiny --out=data/other'),
    'one tokenizer missing': ('--dataset=more,tiny --vocab_size=40', 'more tokenizer tiny --tokenizer=data/tiny --out=data/more',
                              lambda: os.remove('data/more/meta.json')),
    'mixture too short': ('--dataset=tiny,more --block_size=256 --tokens_per_step=256 --out_dir=new', 'data/more/val.bin block_size'),
    'bad weight': ('--dataset=tiny:1,more:0', 'dataset=tiny:1,more:0 weight more'),
    'cut checkpoint': ('', 'out/ckpt.pt not a readable checkpoint', lambda: cut('out/ckpt.pt')),
    'empty checkpoint': ('', 'out/ckpt.pt not a readable checkpoint', lambda: open('out/ckpt.pt', 'w').close()),
    'state dict': ('', 'out/ckpt.pt not one of', lambda: torch.save({'w': torch.ones(2)}, 'out/ckpt.pt')),
    'only weights': ('', 'out/ckpt.pt', lambda: torch.save({k: load()[k] for k in ('format', 'kind', 'config', 'weights')},
                                                           'out/ckpt.pt')),
    'text file': ('', 'out/ckpt.pt not a readable', lambda: open('out/ckpt.pt', 'w').write('hello\n' * 99)),
    'code': ('', 'out/ckpt.pt not a readable', lambda: torch.save({'format': 1, 'weights': Bomb()}, 'out/ckpt.pt')),
    'raw pickle': ('', 'out/ckpt.pt not a readable', lambda: pickle.dump(Bomb(), open('out/ckpt.pt', 'wb'))),
    'out_dir a file': ('--out_dir=file', 'file cannot be written', lambda: open('file', 'w').close()),
    'resume nothing': ('--init_from=resume --out_dir=new', 'new/ckpt.pt no such checkpoint'),
    'eval nothing': ('--eval_only --out_dir=new', 'new no'),
    'changed n_layer': ('--n_layer=2', 'n_layer=1 not 2 --init_from=scratch'),
    'changed model': ('--model=mamba', 'model=gpt not mamba'),
    'changed embedding': ('--tie_embeddings=False', 'tie_embeddings'),
    'n_head': ('--out_dir=new --n_head=3', 'n_head n_embd'),
    'inner width': ('--out_dir=new --model=mamba --n_embd=33', 'n_embd multiple'),
    'not of this model': ('--out_dir=new --model=mamba --window=8', 'window mamba'),
    'tokens_per_step': ('--out_dir=new --tokens_per_step=100', 'tokens_per_step block_size'),
    'two sizes': ('--out_dir=new --gradient_accumulation_steps=3', 'tokens_per_step=64 96'),
    'bad wandb': ('--out_dir=new --wandb_log', 'wandb not installed', lambda: sys.modules.__setitem__('wandb', None)),
    **{f'{key} {value}': (f'--out_dir=new --{key}={value}', f'{key} {value}') for key, value in dict(
        model='mambo', dtype='float99', device='toaster', schedule='never', optimizer='sgdd', init_from='scrach').items()},
    'version': ('--out_dir=new --model=mamba --version=3', 'version=3'),
    'layout': ('--out_dir=new --model=hybrid --layout=diagonal', 'layout diagonal'),
    'no vocab_size': ('--out_dir=new', 'meta.json missing --vocab_size', lambda: os.remove('data/tiny/meta.json')),
    'data_dtype': ('--out_dir=new --vocab_size=99 --data_dtype=int7', 'int7', lambda: os.remove('data/tiny/meta.json')),
    **{f'{flag} out of range': (f'--out_dir=new --{flag}', flag.partition('=')[0]) for flag in (
        'n_layer=-1 n_embd=-32 n_head=-2 block_size=-8 batch_size=-1 tokens_per_step=-16 gradient_accumulation_steps=-1 '
        'learning_rate=0 learning_rate=nan max_iters=-5 dropout=1 grad_clip=-1 eval_interval=0 log_interval=0 beta1=2 beta2=-1 '
        'weight_decay=-1 seed=-1 intermediate_size=-8 n_kv_head=-1 window=-3 eval_iters=-1 patience=-1 sample_interval=-1 '
        'min_lr=-1 lr_decay_iters=-1 decay_fraction=2').split()},
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(finished, capsys, monkeypatch, case):
    flags, words, *breaks = BAD[case]
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    for action in breaks:
        action()
    before = files('.')
    train('--model=gpt', flags, status=2)
    refused(capsys, *words.split())
    after = files('.')
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in set(after) - set(before) if path.endswith(('.pt', '.tmp'))]
    assert not os.path.exists('executed')


# --- other data, other precision, other schedules

@pytest.mark.parametrize('dtype', ['int32', 'uint16'])
def test_bare_bin(here, capsys, dtype):
    os.makedirs('data/bare')
    for split, n in (('train', 3000), ('val', 200)):
        np.random.default_rng(n).integers(0, 40, n).astype(dtype).tofile(f'data/bare/{split}.bin')
    train('--model=gpt --dataset=bare --vocab_size=40 --max_iters=3', '' if dtype == 'int32' else '--data_dtype=uint16')
    assert 3 < metrics()[-1]['val_loss'] < 4.5 and metrics()[-1]['bits_per_byte'] is None
    assert load()['config']['vocab_size'] == 40 and load()['tokenizer'] is None
    train('--dataset=bare --max_iters=5')  # vocab_size and data_dtype are remembered
    capsys.readouterr()
    assert script('sample.py', '--device=cpu') == 2
    refused(capsys, 'tokenizer')


@pytest.mark.parametrize('kind', ['char', 'bpe'])
@pytest.mark.parametrize('n', [5000, 300])
def test_small_text_end_to_end(here, capsys, kind, n):
    write_text('small.txt', n)
    assert script('prepare.py', f'small.txt --tokenizer={kind}') == 0
    assert script('train.py', '--n_layer=1 --n_embd=32 --max_iters=2 --device=cpu') == 0  # all other sizes are the defaults
    capsys.readouterr()
    assert script('sample.py', '--max_new_tokens=30 --device=cpu --start=e') == 0
    assert len(capsys.readouterr().out) > 10


@pytest.mark.parametrize('broken', ['call', 'first step'])
def test_compile_that_does_not_work_is_left_out(here, capsys, monkeypatch, broken):
    def fails(*_, **__):
        raise RuntimeError('no compiler\nmany lines')
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'compile', fails if broken == 'call' else lambda net: fails)
        train('--model=gpt --dropout=0.1 --compile --max_iters=3')
    said = capsys.readouterr()
    assert said.out.count('torch.compile does not work here') == 1 and 'many lines' not in said.out + said.err
    train('--model=gpt --dropout=0.1 --max_iters=3 --out_dir=plain')
    assert metrics() == metrics('plain')


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++') and not shutil.which('clang'), reason='torch.compile needs a C++ compiler')
def test_compile(here, capsys):
    train('--model=gpt --compile --max_iters=3')
    assert 'torch.compile does not work here' not in capsys.readouterr().out
    train('--model=gpt --max_iters=3 --out_dir=plain')
    assert list(metrics(key='loss').values()) == pytest.approx(list(metrics('plain', 'loss').values()), abs=1e-4)


@pytest.mark.parametrize('model', ['mamba', 'gpt', 'hybrid'])
def test_bfloat16_trains(here, model):
    train(f'--model={model} --dtype=bfloat16 --learning_rate=1e-2')
    losses = metrics(key='loss')
    assert losses[20] < losses[1] - 0.1
    assert all(w.dtype == torch.float32 for w in load()['weights'].values())


@pytest.mark.parametrize('flags, expected', [
    # {step of the log: rate}; the log's step n is the update n - 1, counted from 0
    ('--warmup_iters=4 --lr_decay_iters=16 --min_lr=1e-4', {1: 2e-4, 4: 8e-4, 5: 1e-3, 11: 5.5e-4, 17: 1e-4, 20: 1e-4}),
    ('--warmup_iters=4', {1: 2e-4, 5: 1e-3, 13: 5e-4, 20: 5e-4 * (1 + math.cos(math.pi * 15 / 16))}),
    ('--schedule=wsd --warmup_iters=4 --lr_decay_iters=16 --min_lr=1e-4 --decay_fraction=0.25',
     {1: 2e-4, 5: 1e-3, 13: 1e-3, 15: 5.5e-4, 17: 1e-4, 20: 1e-4}),
    ('--schedule=wsd --warmup_iters=0', {1: 1e-3, 15: 1e-3, 18: 5e-4, 20: 1e-3 / 6}),
])
def test_schedule(here, flags, expected):
    train('--model=gpt', flags)
    rates = metrics(key='lr')
    assert {step: rates[step] for step in expected} == pytest.approx(expected, rel=1e-9)


# --- recipes

@pytest.mark.parametrize('recipe', [name for name in sorted(os.listdir(os.path.join(ROOT, 'config')))
                                    if not re.search(r'[1-4].gb', name)])  # of the profiles those for 8 GB: the others differ in numbers
def test_every_recipe_runs(here, recipe):
    """In a size for a test: what is left of the recipe are its other settings, which must exist and fit its model."""
    if recipe.endswith('.py'):
        base = recipe.startswith('finetune')
        if base:
            train('--n_embd=192 --max_iters=1 --out_dir=base')
        train(os.path.join(ROOT, 'config', recipe), TINY, '--n_embd=192 --max_iters=2 --out_dir=out', '--init_from=base' if base else '')
        assert load()['counters']['step'] == 2


def test_one_recipe_serves_all_models(here):
    for model in ('gpt', 'mamba', 'hybrid'):  # in a file n_head does not disturb a mamba; as a flag it would mean nothing
        train(os.path.join(ROOT, 'config', 'shakespeare_cpu.py'), TINY, f'--model={model} --n_embd=96 --max_iters=1 --out_dir={model}')


def test_kill_between_best_and_latest_loses_neither(here):
    train('--model=gpt --out_dir=unbroken')
    process = launch('--model=gpt', before='import os, signal; from mambino.weights import checkpoint; save = checkpoint.save_checkpoint\n'
                     'def once(path, contents):\n    save(path, contents); os.kill(os.getpid(), signal.SIGKILL)\n'
                     'checkpoint.save_checkpoint = once')
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    train('--model=gpt')
    same_run('unbroken', 'out')


def test_weight_decay_can_change_on_the_way(here):
    for optimizer in ('adamw', 'muon'):
        train(f'--model=gpt --optimizer={optimizer} --out_dir={optimizer} --max_iters=5 --weight_decay=0')
        train(f'--model=gpt --optimizer={optimizer} --out_dir={optimizer} --max_iters=10 --weight_decay=0.5')
        decays = [{group['weight_decay'] for group in opt['param_groups']} for opt in load(f'{optimizer}/ckpt.pt')['optimizers']]
        assert set().union(*decays) == {0.0, 0.5}


def test_more_tokens_a_step_go_on_where_the_text_was(here, monkeypatch):
    from mambino.train import batches
    seen, batch = [], batches.Dataset.batch
    monkeypatch.setattr(batches.Dataset, 'batch', lambda self, numbers, *rest: (seen.extend(numbers), batch(self, numbers, *rest))[1])
    train('--model=gpt --max_iters=5')
    train('--model=gpt --max_iters=10 --tokens_per_step=128')
    used = list(dict.fromkeys(seen))          # each run fetches one step ahead
    assert used[:5 * 4 + 5 * 8] == list(range(60))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_fp16_with_a_scaler_trains(here, optimizer):
    train(f'--model=gpt --dtype=float16 --optimizer={optimizer}')
    losses = metrics(key='loss')
    assert losses[20] < losses[1] and load()['scaler']['scale'] > 0
