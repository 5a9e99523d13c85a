"""fit.py: its estimate beside what a process really takes, the choice of a micro-batch, and the recipes that rest on them."""
import json
import os
import re
import runpy
import subprocess
import sys
import time

import pytest
import torch

from mambino import machine
from mambino.weights import checkpoint
from mambino.train import memory as fit
from model_gpt import LanguageModel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECIPES = sorted(name for name in os.listdir(os.path.join(ROOT, 'config')) if re.fullmatch(r'\w+_\d+gb\.py', name))
GB = 2**30
SMALL = dict(n_layer=4, n_embd=256, vocab_size=1024)
MODELS = {'gpt': ('gpt', dict(SMALL, n_head=4)), 'mamba2': ('mamba', SMALL), 'mamba1': ('mamba', dict(SMALL, version=1, n_layer=3)),
          'hybrid': ('hybrid', dict(SMALL, n_head=4, n_layer=2))}


def recipe(name):
    """(settings of a recipe, its model's config)."""
    settings = runpy.run_path(os.path.join(ROOT, 'config', name))
    kind = settings['model']
    config = dict(fit.SIZES[kind, settings['size']], vocab_size=16384, block_size=settings['block_size'])
    return settings, config if kind == 'mamba' else dict(config, n_head=config['n_embd'] // 64)


MEASURE = '''
import json, sys
import torch
from mambino.weights import checkpoint
from mambino.machine import memory_used
from mambino.train.muon import Muon

def train(config, batch, T, steps):
    net = checkpoint.build(job['kind'], config)
    net.gradient_checkpointing = job['checkpointing']
    groups = net.optim_groups(0.1, muon=job['optimizer'] == 'muon')
    optimizers = [torch.optim.AdamW([g for g in groups if g['kind'] == 'adamw'], fused=True)]
    if job['optimizer'] == 'muon':
        optimizers.append(Muon([g for g in groups if g['kind'] == 'muon'], adjust_lr_fn='match_rms_adamw'))
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
before = memory_used('cpu')
train(job['config'], job['batch'], job['T'], 2)
print(memory_used('cpu', peak=True) - before)
'''


def measured(kind, config, batch, T, dtype='float32', optimizer='adamw', checkpointing=False, accumulate=True):
    """Bytes that training really takes at most, in a process whose allocator gives back what is freed."""
    job = dict(kind=kind, config=config, batch=batch, T=T, dtype=dtype, optimizer=optimizer, checkpointing=checkpointing,
               accumulate=accumulate)
    env = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '65536',
           'MALLOC_TRIM_THRESHOLD_': '65536'}
    run = subprocess.run([sys.executable, '-c', MEASURE, json.dumps(job)], capture_output=True, text=True, env=env, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc and glibc\'s settings')
@pytest.mark.parametrize('name, how', [
    ('gpt', dict(batch=1, T=64, optimizer='muon', dtype='bfloat16')),  # the peak is in Muon's step
    ('mamba2', dict(batch=4, T=256, accumulate=False)),
    ('mamba1', dict(batch=16, T=256)),
    ('hybrid', dict(batch=6, T=256, dtype='bfloat16')),
    ('gpt', dict(batch=16, T=256, checkpointing=True)),
])
def test_estimate_against_measured(name, how):
    if how.get('checkpointing') and not hasattr(LanguageModel, 'gradient_checkpointing'):
        pytest.skip('the models have no gradient checkpointing yet')
    kind, config = MODELS[name]
    if how.get('optimizer') == 'muon':
        config = dict(config, n_embd=512, n_head=8)
    found = fit.estimate(kind, config, **{'dtype': 'float32', 'device': 'cpu', **how})
    assert found['total'] > 0.1 * GB                                # else the test would compare libraries
    assert found['total'] == pytest.approx(measured(kind, config, **how), rel=0.15)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('accumulate', [True, False])
def test_linear_in_layers_and_sequences(name, accumulate):
    """What is extended from one and two layers is what a simulation of all of them counts."""
    kind, config = MODELS[name]
    config = dict(config, n_layer=4)
    T = 64 if name == 'mamba1' else 512
    found = fit.estimate(kind, config, 2**15 // T, T, accumulate=accumulate)
    direct = fit.simulate(True, kind, tuple(config.items()), 2**15 // T, T, 'cuda', 'bfloat16', 'adamw', False, accumulate)
    assert found['total'] == pytest.approx(max(direct[name] for name in fit.STRETCHES), rel=0.01)
    assert found['weights'] == pytest.approx(4 * checkpoint.build(kind, config).num_params(), rel=0.001)
    assert found['total'] == pytest.approx(sum(found.values()) - found['total'], abs=9)


def test_short_sequences_stand_for_long_ones():
    """Mamba-1's loop over time is simulated for a piece of the time."""
    config = dict(SMALL, version=1, n_layer=2)
    direct = fit.simulate(True, 'mamba', tuple(config.items()), 16, 192, 'cuda', 'float32', 'adamw', False, True)
    assert fit.estimate('mamba', config, 16, 192, dtype='float32')['total'] == pytest.approx(
        max(direct[name] for name in fit.STRETCHES), rel=0.05)


def test_parts_are_what_they_are_called():
    kind, config = MODELS['gpt']
    one, three = (fit.estimate(kind, config, n, 512) for n in (8, 24))
    muon, tied, ddp = (fit.estimate(kind, {**config, **other}, 8, 512, **how) for other, how in (
        ({}, dict(optimizer='muon')), (dict(tie_embeddings=False), {}), ({}, dict(processes=2))))
    assert one['gradients'] == one['weights'] and one['optimizer'] == pytest.approx(2 * one['weights'], rel=0.01)
    assert 2.5 < three['activations'] / one['activations'] < 3 and three['weights'] == one['weights']
    assert one['weights'] < muon['optimizer'] < one['optimizer']
    assert tied['weights'] - one['weights'] == 4 * 1024 * 256
    assert ddp['total'] - one['total'] == ddp['gradients'] - one['gradients'] == one['weights']


def test_random_numbers_stay_as_they_were():
    before = torch.get_rng_state()
    fit.simulate(True, 'gpt', tuple(MODELS['gpt'][1].items()), 1, 32, 'cpu', 'bfloat16', 'adamw', False, True)
    fit.simulate(False, 'gpt', tuple(dict(MODELS['gpt'][1], n_layer=1).items()), 1, 32, 'cpu', 'bfloat16', 'adamw', False, True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_looks_at_its_data_runs_for_real(monkeypatch):
    from model_gpt import SwiGLU
    plain = fit.estimate('gpt', dict(SMALL, n_head=4, n_layer=3), 2, 64)
    forward = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, 'forward', lambda self, x: forward(self, x[:, :int((x[0] == x[0]).all(-1).sum())]))
    fit.corner.cache_clear()
    assert fit.estimate('gpt', dict(SMALL, n_head=4, n_layer=3), 2, 64)['total'] == pytest.approx(plain['total'], rel=0.01)
    fit.corner.cache_clear()


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_dropout_and_low_rank_need_no_real_run(monkeypatch, device):
    simulate, runs = fit.simulate, []
    monkeypatch.setattr(fit, 'simulate', lambda fake, *rest: (runs.append(fake), simulate(fake, *rest))[1])
    fit.corner.cache_clear()
    found = [fit.estimate('hybrid', dict(SMALL, n_head=4, n_layer=2, **other), 2, 128, device)
             for other in ({}, dict(dropout=0.1), dict(low_rank=8))]
    assert runs and all(runs)
    assert found[1]['activations'] > found[0]['activations'] and found[2]['weights'] < found[0]['weights']


def test_choose_is_monotone_and_divides():
    config = dict(MODELS['gpt'][1], n_layer=8)
    last = False, 0                                                 # more memory is first for doing without checkpointing
    for budget in (0.35, 0.5, 1, 2, 4, 100):
        n, checkpointing, found = fit.choose('gpt', config, 24, 512, budget * GB)
        assert 24 % n == 0 and (not checkpointing, n) >= last and found['total'] <= fit.SHARE * budget * GB
        if not checkpointing and n < 24:                            # the next larger one would not have fitted
            larger = min(m for m in range(n + 1, 25) if 24 % m == 0)
            assert fit.estimate('gpt', config, larger, 512, accumulate=larger < 24)['total'] > fit.SHARE * budget * GB
        last = not checkpointing, n
    assert last == (True, 24)


@pytest.mark.parametrize('budget, words', [(0.01, 'halve --n_layer or --n_embd'), (0.2, 'halve --block_size, or')])
def test_choose_refuses_in_a_line(capsys, budget, words):
    with pytest.raises(SystemExit) as end:
        fit.choose('gpt', MODELS['gpt'][1], 4, 8192, budget * GB)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count('\n') == 1 and words in said and 'GB more than' in said


def test_checkpointing_when_it_makes_the_batch_larger(monkeypatch):
    def estimate(kind, config, n, T, checkpointing, accumulate):
        return dict(total=(1 + n * (0.25 if checkpointing else 1)) * GB)
    monkeypatch.setattr(fit, 'estimate', estimate)
    for budget, expected in ((10, (8, False)), (5, (4, False)), (3.5, (8, True)), (2, (4, True)), (1.5, (2, True))):
        assert fit.choose('gpt', {}, 16, 1024, budget * GB, share=1)[:2] == expected


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


def test_line_for_the_reader():
    found = dict(weights=GB, gradients=GB, optimizer=2 * GB, activations=3 * GB, temporary=GB // 2, total=7.5 * GB)
    assert fit.describe(found, 8 * GB, 4, True) == (
        'memory: weights 1.00 + gradients 1.00 + optimizer 2.00 + activations 3.00 + temporary 0.50 = 7.50 GB of 8.0 GB free; '
        'micro-batch 4, with gradient checkpointing')


# --- recipes

def test_recipes_are_all_there():
    assert len(RECIPES) == 18


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_is_of_its_size(name):
    settings, config = recipe(name)
    kind, gigabytes = re.fullmatch(r'(\w+)_(\d+)gb\.py', name).groups()
    assert (settings['model'], settings['vram']) == (kind, gigabytes)
    with torch.device('meta'):
        parameters = checkpoint.build(kind, config).num_params()
    assert parameters == pytest.approx(int(settings['size'].removesuffix('m')) * 1e6, rel=0.1)
    assert settings['max_iters'] * settings['tokens_per_step'] == pytest.approx(20 * parameters, rel=0.1)
    assert settings['tokens_per_step'] % settings['block_size'] == 0


@pytest.mark.parametrize('name', [name for name in RECIPES if '48' in name])
def test_largest_recipes_fit_and_are_counted_soon(name):
    settings, config = recipe(name)
    begin = time.process_time()
    found = fit.estimate(settings['model'], config, 1, settings['block_size'])
    assert time.process_time() - begin < 5
    assert found['total'] < 0.94 * fit.SHARE * float(settings['vram']) * GB
