"""What train.py computes and says: evaluations, samples, mixtures, precision, schedules, a
profile."""
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.runs import (
    TINY,
    files,
    load,
    metrics,
    plain,
    refused,
    same_run,
    script,
    train,
    write_text,
)

from mambino.train import batches
from mambino.weights import checkpoint, loading

pytestmark = pytest.mark.usefixtures('one_thread')


# --- evaluation

@pytest.mark.parametrize('model, more', [('gpt', '--dropout=0.2'), ('mamba', '')])
def test_val_loss_is_the_mean_over_the_split(here, capsys, model, more):
    train(f'--model={model} --max_iters=5', more)
    result = metrics()[-1]
    ckpt = checkpoint.load_checkpoint('out/ckpt.pt')
    net, tok = loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)
    ids = torch.from_numpy(np.fromfile('data/tiny/val.bin', '<i4')).long()
    nats = [
        F.cross_entropy(
            net(ids[None, s : s + 16])[0][0, : len(ids) - s - 1],
            ids[s + 1 : s + 17],
            reduction='none',
        )
        for s in range(0, len(ids) - 1, 16)
    ]
    nats = torch.cat(nats).double()
    assert len(nats) == len(ids) - 1
    assert result['val_loss'] == pytest.approx(nats.mean().item(), abs=1e-5)
    assert result['perplexity'] == pytest.approx(math.exp(nats.mean().item()), rel=1e-4)
    size = len(tok.decode(ids[1:].tolist()).encode('utf-8'))
    assert size > len(ids)  # the text has characters of several bytes
    assert result['bits_per_byte'] == pytest.approx(
        nats.sum().item() / math.log(2) / size, rel=1e-4
    )

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
    assert metrics() == metrics('sampled') and plain(load()['weights']) == plain(
        load('sampled/ckpt.pt')['weights']
    )
    assert metrics(key='loss') == metrics('seldom', 'loss') and list(
        metrics('seldom', 'val_loss')
    ) == [9, 18, 20]
    assert plain(load()['weights']) == plain(load('seldom/ckpt.pt')['weights'])


def test_samples_come_at_their_own_interval(here, capsys):
    train('--model=gpt --eval_interval=10 --sample_interval=4')
    assert [int(n) for n in re.findall(r'--- sample at step (\d+)', capsys.readouterr().out)] == [
        4,
        8,
        12,
        16,
        20,
    ]


def test_batch_size_does_not_change_the_val_loss(here):
    losses = []
    for n in (1, 3, 8):
        train(
            f'--model=hybrid --tokens_per_step=128 --batch_size={n} --learning_rate=1e-9 '
            f'--max_iters=1 --out_dir={n}'
        )
        losses.append(metrics(str(n), 'val_loss')[1])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_patience_stops_early(here, capsys):
    train(
        '--model=gpt --learning_rate=0.5 --warmup_iters=0 --eval_interval=1 --patience=3 --max_iters=60'
    )
    losses = list(metrics(key='val_loss').values())
    assert len(losses) < 60 and losses.index(min(losses)) == len(losses) - 4
    assert 'stopping: 3 evaluations' in capsys.readouterr().out
    assert load('out/best.pt')['metadata']['best_loss'] == min(losses)
    assert load('out/best.pt')['counters']['step'] == len(losses) - 3


# --- several datasets

def test_a_mixture_is_drawn_and_evaluated_by_its_weights(here, capsys, monkeypatch):
    seen, batch = {'tiny': [], 'more': []}, batches.Dataset.batch

    def watched(self, indices, *rest):
        seen[self.name].extend(indices)
        return batch(self, indices, *rest)
    monkeypatch.setattr(batches.Dataset, 'batch', watched)
    train('--model=gpt --dataset=tiny:3,more:1')
    said, lines = capsys.readouterr().out, metrics()
    assert load()['settings']['dataset'] == 'more:0.25,tiny:0.75'
    for indices in seen.values():
        assert indices == list(range(len(indices)))  # each its own text, from the beginning
    last = lines[-1]
    assert last['drawn/tiny'] == 1 - last['drawn/more'] and last['step'] == 20
    # the last micro-batch was fetched for a step that did not come
    assert sum(map(len, seen.values())) == 82
    for name, indices in seen.items():
        assert 0 <= len(indices) - 80 * last[f'drawn/{name}'] <= 2
    assert (
        said.count('drawn: ') == 4
        and f'drawn: more {last["drawn/more"]:.1%}  tiny {last["drawn/tiny"]:.1%}\n' in said
    )
    tokens = {
        name: json.load(open(f'data/{name}/meta.json'))['splits']['train']['tokens']
        for name in seen
    }
    for name, weight in (('more', '0.2500'), ('tiny', '0.7500')):
        row = re.search(rf'\n  {name} +weight {weight} +([\d,]+) tokens +([\d.]+) epochs\n', said)
        assert row and row.group(1) == f'{tokens[name]:,}'
        assert float(row.group(2)) == pytest.approx(
            last[f'drawn/{name}'] * 80 * 16 / tokens[name], abs=0.051
        )

    # the val splits, told apart and together
    ckpt, loss, size = checkpoint.load_checkpoint('out/ckpt.pt'), 0, 0
    net, tok = loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)
    for name, weight in (('tiny', 0.75), ('more', 0.25)):
        ids = np.fromfile(f'data/{name}/val.bin', '<i4')
        with torch.no_grad():
            sums = [(net(x, y)[1].item() * int((y >= 0).sum()), int((y >= 0).sum()))
                    for x, y in batches.open_dataset(name).val_batches(8, 16)]
        nats = sum(s for s, _ in sums) / sum(n for _, n in sums)
        assert last[f'val_loss/{name}'] == pytest.approx(nats, abs=1e-5)
        loss, size = (
            loss + weight * nats,
            size + weight * len(tok.decode(ids[1:].tolist()).encode('utf-8')) / (len(ids) - 1),
        )
    assert last['val_loss/tiny'] != pytest.approx(last['val_loss/more'], abs=1e-3)
    assert last['val_loss'] == pytest.approx(loss, abs=1e-5)
    assert last['bits_per_byte'] == pytest.approx(loss / math.log(2) / size, rel=1e-4)

    before = files('out')
    assert script('train.py', '--eval_only --device=cpu') == 0
    said = capsys.readouterr().out
    assert all(
        f'{key} {last[key]:.4f}' in said for key in ('val_loss', 'val_loss/tiny', 'val_loss/more')
    )
    assert files('out') == before
    train('--eval_only --dataset=more')                        # one of them by itself
    assert f'val_loss {last["val_loss/more"]:.4f}' in capsys.readouterr().out


def test_a_mixture_goes_on_only_as_the_same(here, capsys):
    train('--model=gpt --dataset=tiny:3,more:1 --max_iters=15 --eval_interval=3 --out_dir=unbroken')
    for steps, dataset in ((3, 'tiny:3,more:1'), (6, 'more:.5,data/tiny:1.5')):
        train(
            f'--model=gpt --max_iters={steps} --warmup_iters=1 --lr_decay_iters=15 '
            f'--eval_interval=3 --dataset={dataset}'
        )
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
    # more has some 200 tokens to evaluate, tiny some 600
    assert load()['settings']['block_size'] == 128


# --- other data, other precision, other schedules

@pytest.mark.parametrize('dtype', ['int32', 'uint16'])
def test_bare_bin(here, capsys, dtype):
    os.makedirs('data/bare')
    for split, n in (('train', 3000), ('val', 200)):
        np.random.default_rng(n).integers(0, 40, n).astype(dtype).tofile(f'data/bare/{split}.bin')
    train(
        '--model=gpt --dataset=bare --vocab_size=40 --max_iters=3',
        '' if dtype == 'int32' else '--data_dtype=uint16',
    )
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
    # all other sizes are the defaults
    assert script('train.py', '--n_layer=1 --n_embd=32 --max_iters=2 --device=cpu') == 0
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
    assert (
        said.out.count('torch.compile: does not work here') == 1
        and 'many lines' not in said.out + said.err
    )
    train('--model=gpt --dropout=0.1 --max_iters=3 --out_dir=plain')
    assert metrics() == metrics('plain')


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which('g++') and not shutil.which('clang'),
    reason='torch.compile needs a C++ compiler',
)
def test_compile(here, capsys):
    train('--model=gpt --compile --max_iters=3')
    assert 'does not work here' not in capsys.readouterr().out
    train('--model=gpt --max_iters=3 --out_dir=plain')
    assert list(metrics(key='loss').values()) == pytest.approx(
        list(metrics('plain', 'loss').values()), abs=1e-4
    )


@pytest.mark.parametrize('model', ['mamba', 'mamba --version=3', 'gpt', 'hybrid'])
def test_bfloat16_trains(here, model):
    train(f'--model={model} --dtype=bfloat16 --learning_rate=1e-2')
    losses = metrics(key='loss')
    assert losses[20] < losses[1] - 0.1
    assert all(w.dtype == torch.float32 for w in load()['weights'].values())


@pytest.mark.parametrize(
    'flags, expected',
    [
        # {step of the log: rate}; the log's step n is the update n - 1, counted from 0
        (
            '--schedule=cosine --warmup_iters=4 --lr_decay_iters=16 --min_lr=1e-4',
            {1: 2e-4, 4: 8e-4, 5: 1e-3, 11: 5.5e-4, 17: 1e-4, 20: 1e-4},
        ),
        (
            '--schedule=cosine --warmup_iters=4',
            {1: 2e-4, 5: 1e-3, 13: 5e-4, 20: 5e-4 * (1 + math.cos(math.pi * 15 / 16))},
        ),
        (
            '--schedule=wsd --warmup_iters=4 --lr_decay_iters=16 --min_lr=1e-4 --decay_fraction=0.25',
            {1: 2e-4, 5: 1e-3, 13: 1e-3, 15: 5.5e-4, 17: 1e-4, 20: 1e-4},
        ),
        ('--schedule=wsd --warmup_iters=0 --decay_fraction=0.3', {1: 1e-3, 15: 1e-3, 18: 5e-4, 20: 1e-3 / 6}),
    ],
)
def test_schedule(here, flags, expected):
    train('--model=gpt --learning_rate=1e-3', flags)
    rates = metrics(key='lr')
    assert {step: rates[step] for step in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_fp16_with_a_scaler_trains(here, optimizer):
    train(f'--model=gpt --dtype=float16 --optimizer={optimizer}')
    losses = metrics(key='loss')
    assert losses[20] < losses[1] and load()['scaler']['scale'] > 0


# --- a profile

def test_profile_says_where_the_time_goes(here, capsys):
    flags = '--model=gpt --dropout=0.1 --tokens_per_step=64 --max_iters=10'
    train(flags, '--out_dir=plain')
    capsys.readouterr()
    train(flags, '--profile=4')
    said = capsys.readouterr().out
    shares = re.search(
        r'\n4 steps: data ([\d.]+)%, forward ([\d.]+)%, backward ([\d.]+)%, optimizer ([\d.]+)%\n',
        said,
    )
    assert shares and sum(map(float, shares.groups())) == pytest.approx(100, abs=0.3)
    rows = re.findall(
        r'^  \S.*? +([\d.]+)% +([\d.]+) +([\d.]+)$',
        said[shares.end() :].partition('\nstep ')[0],
        re.M,
    )
    assert len(rows) == 10 and [float(row[0]) for row in rows] == sorted(
        (float(row[0]) for row in rows), reverse=True
    )
    assert sum(float(row[0]) for row in rows) < 101
    same_run('out', 'plain')
    events = json.load(open('out/trace.json'))['traceEvents']
    times = {}
    for name, calls in (('data', 8), ('forward', 8), ('backward', 8), ('optimizer', 4)):
        spans = [
            event['dur']
            for event in events
            if event.get('name') == name
            and event.get('ph') == 'X'
            and event.get('cat') == 'user_annotation'
        ]
        assert len(spans) == calls and min(spans) > 0
        times[name] = sum(spans)
    for share, time in zip(shares.groups(), times.values()):
        assert float(share) == pytest.approx(100 * time / sum(times.values()), abs=0.1)
    assert any(event.get('name', '').startswith('aten::') for event in events)


@pytest.mark.parametrize('n', [5, 1000])  # the run is over before as many steps were traced
def test_profile_longer_than_the_run(here, capsys, n):
    train(f'--model=gpt --max_iters=7 --profile={n}')
    said = capsys.readouterr().out
    assert 'done: 7 steps' in said and load()['counters']['step'] == 7
    # what there was: all but the first three
    assert '4 steps: data ' in said and json.load(open('out/trace.json'))['traceEvents']
    train(f'--model=gpt --max_iters=2 --profile={n} --out_dir=two')
    assert 'done: 2 steps' in capsys.readouterr().out and not os.path.exists('two/trace.json')


def test_profile_that_cannot_be_written(here, capsys):
    os.makedirs('out/trace.json/folder')
    train('--model=gpt --profile=2')
    said = capsys.readouterr().out
    assert (
        '2 steps: data ' in said
        and 'warning: out/trace.json could not be written' in said
        and 'done: 20 steps' in said
    )
    assert 'the whole trace' not in said and sorted(os.listdir('out')) == [
        'best.pt',
        'ckpt.pt',
        'metrics.jsonl',
        'trace.json',
    ]


def test_profile_below_zero(here, capsys):
    train('--model=gpt --profile=-1', status=2)
    refused(capsys, 'profile=-1', '0 or more')
