"""train/memory.py: its estimate beside what a process really takes, and the choice of a
micro-batch."""
import json
import os
import subprocess
import sys

import pytest
import torch

from mambino import machine
from mambino.train import counting, memory
from mambino.weights import checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GB = 2**30
SMALL = dict(n_layer=4, n_embd=256, vocab_size=1024)
MODELS = {
    'gpt': ('gpt', dict(SMALL, n_head=4)),
    'mamba2': ('mamba', SMALL),
    'mamba1': ('mamba', dict(SMALL, version=1, n_layer=3)),
    'mamba3': ('mamba', dict(SMALL, version=3, mimo_rank=2, intermediate_size=512)),
    'hybrid': ('hybrid', dict(SMALL, n_head=4, n_layer=2)),
}


def workload(kind, config, batch, T, **more):
    return counting.Workload(kind, tuple(config.items()), batch, T, **more)


MEASURE = '''
import json, sys
import torch
from mambino.weights import checkpoint
from mambino import machine
from mambino.machine import memory_used
from mambino.train.building import build_optimizers

def train(config, batch, T, steps):
    net = checkpoint.build(job['kind'], config)
    net.gradient_checkpointing = job['checkpointing']
    optimizers = build_optimizers(net, job['optimizer'])
    idx = torch.randint(config['vocab_size'], (batch, T))
    for step in range(steps):
        for micro in range(1 + job['accumulate']):
            with machine.autocast('cpu', job['dtype']):
                loss = net(idx, idx)[1]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
        net.zero_grad(set_to_none=True)

job = json.loads(sys.argv[1])
train(dict(job['config'], n_layer=1, n_embd=64, n_head=1) if job['kind'] != 'mamba' else
      dict(job['config'], n_layer=1, n_embd=64), 1, 32, 1)          # loads the libraries, which are not the model's
machine.keep_no_freed_memory()
before = memory_used('cpu')
train(job['config'], job['batch'], job['T'], 2)
print(memory_used('cpu', peak=True) - before)
'''


def measured(
    kind, config, batch, T, dtype='float32', optimizer='adamw', checkpointing=False, accumulate=True
):
    """Bytes that training really takes at most, beyond what the process had before, where memory is
    scarce."""
    job = dict(
        kind=kind,
        config=config,
        batch=batch,
        T=T,
        dtype=dtype,
        optimizer=optimizer,
        checkpointing=checkpointing,
        accumulate=accumulate,
    )
    env = {
        **os.environ,
        'PYTHONPATH': ROOT,
        'OMP_NUM_THREADS': '1',
    }
    process = subprocess.run(
        [sys.executable, '-c', MEASURE, json.dumps(job)],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    )
    return int(process.stdout)


@pytest.mark.skipif(
    not sys.platform.startswith('linux') or not machine.glibc(), reason='needs /proc and glibc')
@pytest.mark.parametrize('name, workload', [
    ('gpt', dict(batch=1, T=64, optimizer='muon', dtype='bfloat16')),  # the peak is in Muon's step
    ('mamba2', dict(batch=4, T=256, accumulate=False)),
    ('mamba1', dict(batch=16, T=256)),
    ('mamba3', dict(batch=4, T=256)),
    ('hybrid', dict(batch=6, T=256, dtype='bfloat16')),
    ('gpt', dict(batch=16, T=256, checkpointing=True)),
])
def test_estimate_against_measured(name, workload):
    kind, config = MODELS[name]
    if workload.get('optimizer') == 'muon':
        config = dict(config, n_embd=512, n_head=8)
    total = memory.estimate(kind, config, **{'dtype': 'float32', 'device': 'cpu', **workload})[
        'total'
    ]
    assert total > 0.1 * GB  # else the test would compare libraries
    assert total == pytest.approx(measured(kind, config, **workload), rel=0.15)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('accumulate', [True, False])
def test_linear_in_layers_and_sequences(name, accumulate):
    """What is extended from one and two layers is what a simulation of all of them counts."""
    kind, config = MODELS[name]
    config = dict(config, n_layer=4)
    T = 64 if name == 'mamba1' else 512
    parts = memory.estimate(kind, config, 2**15 // T, T, accumulate=accumulate)
    direct = counting.simulate(workload(kind, config, 2**15 // T, T, accumulate=accumulate))
    assert parts['total'] == pytest.approx(max(direct[name] for name in memory.STRETCHES), rel=0.01)
    assert parts['weights'] == pytest.approx(
        4 * checkpoint.build(kind, config).num_params(), rel=0.001
    )
    assert parts['total'] == pytest.approx(sum(parts.values()) - parts['total'], abs=9)


def test_short_sequences_stand_for_long_ones():
    """Mamba-1's loop over time is simulated for a piece of the time."""
    config = dict(SMALL, version=1, n_layer=2)
    direct = counting.simulate(workload('mamba', config, 16, 192, dtype='float32'))
    assert memory.estimate('mamba', config, 16, 192, dtype='float32')['total'] == pytest.approx(
        max(direct[name] for name in memory.STRETCHES), rel=0.05)


def test_parts_are_what_they_are_called():
    kind, config = MODELS['gpt']
    one, three = (memory.estimate(kind, config, n, 512) for n in (8, 24))
    muon = memory.estimate(kind, config, 8, 512, optimizer='muon')
    tied = memory.estimate(kind, {**config, 'tie_embeddings': False}, 8, 512)
    ddp = memory.estimate(kind, config, 8, 512, world=2)
    assert one['gradients'] == one['weights'] and one['optimizer'] == pytest.approx(
        2 * one['weights'], rel=0.01
    )
    assert (
        2.5 < three['activations'] / one['activations'] < 3 and three['weights'] == one['weights']
    )
    assert one['weights'] < muon['optimizer'] < one['optimizer']
    assert tied['weights'] - one['weights'] == 4 * 1024 * 256
    assert ddp['total'] - one['total'] == ddp['gradients'] - one['gradients'] == one['weights']


def test_random_numbers_stay_as_they_were():
    before = torch.get_rng_state()
    for fake in (True, False):
        counting.simulate(
            workload('gpt', dict(MODELS['gpt'][1], n_layer=1), 1, 32, device='cpu'), fake
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_looks_at_its_data_runs_for_real(monkeypatch):
    from mambino.language_model import SwiGLU
    plain = memory.estimate('gpt', dict(SMALL, n_head=4, n_layer=3), 2, 64)
    forward = SwiGLU.forward
    monkeypatch.setattr(
        SwiGLU, 'forward', lambda self, x: forward(self, x[:, : int((x[0] == x[0]).all(-1).sum())])
    )
    counting.peaks_of.cache_clear()
    assert memory.estimate('gpt', dict(SMALL, n_head=4, n_layer=3), 2, 64)[
        'total'
    ] == pytest.approx(plain['total'], rel=0.01)
    counting.peaks_of.cache_clear()


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_dropout_and_low_rank_need_no_real_run(monkeypatch, device):
    simulate, runs = counting.simulate, []

    def watched(workload, fake=True):
        runs.append(fake)
        return simulate(workload, fake)
    monkeypatch.setattr(counting, 'simulate', watched)
    counting.peaks_of.cache_clear()
    plain, dropout, low_rank = (
        memory.estimate('hybrid', dict(SMALL, n_head=4, n_layer=2, **other), 2, 128, device)
        for other in ({}, dict(dropout=0.1), dict(low_rank=8))
    )
    assert runs and all(runs)
    assert dropout['activations'] > plain['activations'] and low_rank['weights'] < plain['weights']


def test_choose_is_monotone_and_divides():
    config = dict(MODELS['gpt'][1], n_layer=8)
    last = False, 0  # more memory is first for doing without checkpointing
    for budget in (0.35, 0.5, 1, 2, 4, 100):
        n, checkpointing, parts = memory.largest_micro_batch('gpt', config, 24, 512, budget * GB)
        assert (
            24 % n == 0
            and (not checkpointing, n) >= last
            and parts['total'] <= memory.USABLE * budget * GB
        )
        if not checkpointing and n < 24:  # the next larger one would not have fitted
            larger = min(m for m in range(n + 1, 25) if 24 % m == 0)
            assert (
                memory.estimate('gpt', config, larger, 512, accumulate=larger < 24)['total']
                > memory.USABLE * budget * GB
            )
        last = not checkpointing, n
    assert last == (True, 24)


@pytest.mark.parametrize(
    'budget, words', [(0.01, 'halve --n_layer or --n_embd'), (0.2, 'halve --block_size, or')]
)
def test_choose_refuses_in_a_line(capsys, budget, words):
    with pytest.raises(SystemExit) as end:
        memory.largest_micro_batch('gpt', MODELS['gpt'][1], 4, 8192, budget * GB)
    said = capsys.readouterr().err
    assert (
        end.value.code == 2 and said.count('\n') == 1 and words in said and 'GB more than' in said
    )


def test_checkpointing_when_it_makes_the_batch_larger(monkeypatch):
    def estimate(kind, config, n, T, checkpointing, accumulate):
        return dict(total=(1 + n * (0.25 if checkpointing else 1)) * GB)
    monkeypatch.setattr(memory, 'estimate', estimate)
    for budget, expected in (
        (10, (8, False)),
        (5, (4, False)),
        (3.5, (8, True)),
        (2, (4, True)),
        (1.5, (2, True)),
    ):
        assert memory.largest_micro_batch('gpt', {}, 16, 1024, budget * GB, share=1)[:2] == expected


def test_available(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert machine.available_memory('cpu', tmp_path) is None
    write('proc/meminfo', 'MemTotal: 900 kB\nMemAvailable:   800 kB\n')
    assert machine.available_memory('cpu', tmp_path) == 800 * 1024
    write('proc/self/cgroup', '0::/job/step\n')
    write('sys/fs/cgroup/job/step/memory.max', 'max\n')
    write('sys/fs/cgroup/job/step/memory.current', '100\n')
    assert machine.available_memory('cpu', tmp_path) == 800 * 1024
    write('sys/fs/cgroup/job/memory.max', '400000\n')
    write('sys/fs/cgroup/job/memory.current', '100000\n')
    write('sys/fs/cgroup/job/memory.stat', 'anon 1\ninactive_file 50000\n')
    assert machine.available_memory('cpu', tmp_path) == 350000
    write('proc/self/cgroup', '0::/\n5:memory:/box\n')              # version 1
    write('sys/fs/cgroup/memory/box/memory.limit_in_bytes', '300000\n')
    write('sys/fs/cgroup/memory/box/memory.usage_in_bytes', '100000\n')
    assert machine.available_memory('cpu', tmp_path) == 200000


@pytest.mark.parametrize('free, obeys, words, batch', [
    (4.0, True, 'up to 1.70 GB with what the allocator keeps', 8),  # there is room
    (1.5, True, 'what is freed goes back at once, which takes time', 8),
    (1.5, False, 'up to 0.85 GB with what the allocator keeps', 4),     # another allocator, which keeps what it likes
])
def test_a_cpu_keeps_freed_memory_where_there_is_room(monkeypatch, free, obeys, words, batch):
    def estimate(kind, config, n, T, checkpointing, accumulate, **workload):
        return dict.fromkeys(memory.PARTS, 0) | dict(total=int(n / 8 * GB))
    asked = []
    monkeypatch.setattr(memory, 'estimate', estimate)
    monkeypatch.setattr(machine, 'glibc', lambda: obeys)
    monkeypatch.setattr(machine, 'keep_no_freed_memory', lambda: asked.append('goes back'))
    monkeypatch.setattr(machine, 'keep_freed_memory', lambda: asked.append('is kept'))
    config = dict(n_layer=100, n_embd=1024)
    chosen, _, line = memory.fit_to_memory('gpt', config, 10**8, 8, 8, free * GB, False, False, 'cpu', 1024)
    assert chosen == batch and line.endswith(words)
    assert asked == ['goes back' if free < 1.7 and obeys else 'is kept']


def test_line_for_the_reader():
    parts = dict(
        weights=GB,
        gradients=GB,
        optimizer=2 * GB,
        activations=3 * GB,
        temporary=GB // 2,
        total=7.5 * GB,
    )
    assert memory.memory_line(parts, 8 * GB, 4, True) == (
        'memory: weights 1.00 + gradients 1.00 + optimizer 2.00 + activations 3.00 '
        '+ temporary 0.50 = 7.50 GB of 8.0 GB free; '
        'micro-batch 4, with gradient checkpointing'
    )


# --- cards

@pytest.mark.parametrize('vram, free, budget, words', [
    ('auto', 7.0, 6.6, 'free, 0.4 GB left to libraries'),
    ('8', 6.5, 6.1, 'free, '),                  # what the card has, not what it is sold as
    ('8', 23.0, 7.1, 'that --vram says, '),
    ('0.2', 7.0, 0.0, 'that --vram says'),
])
def test_the_budget_of_a_card_is_what_is_free_there(monkeypatch, vram, free, budget, words):
    monkeypatch.setattr(machine, 'available_memory', lambda device: int(free * GB))
    nbytes, source = memory.budget_of(vram, 'cuda')
    assert nbytes / GB == pytest.approx(budget, abs=0.01) and nbytes > 0 and words in source


def test_memory_that_windows_lends_is_not_planned_with(monkeypatch):
    assert memory.usable_share('cuda:0') == 0.90
    monkeypatch.setattr(memory.sys, 'platform', 'win32')
    assert memory.usable_share('cuda:0') == 0.85


def test_no_more_tokens_at_once_than_keep_a_card_busy(monkeypatch):
    def estimate(kind, config, n, T, checkpointing, accumulate, **workload):
        return dict.fromkeys(memory.PARTS, 0) | dict(total=n * (2 if not checkpointing else 1) * GB // 4)
    monkeypatch.setattr(memory, 'estimate', estimate)
    config = dict(n_layer=10, n_embd=1024)
    for peak, free, expected in ((25e12, 100, (32, False)), (989e12, 100, (32, False)),
                                 (25e12, 3.0, (4, False)),          # 4096 tokens keep a small card busy
                                 (989e12, 3.0, (8, True))):         # and leave a fast one idle
        monkeypatch.setattr(machine, 'known_peak', lambda device, peak=peak: peak)
        batch, checkpointing, _ = memory.fit_to_memory(
            'gpt', config, 10**8, 16, 128, free * GB, None, False, 'cuda', 1024)
        assert (batch, checkpointing) == expected
