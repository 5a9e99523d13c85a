"""mambino.bench at a tiny size: tables, their JSON, a picture, whole runs, and refusals."""
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ('--n_layer=1 --n_embd=64 --n_head=2 --vocab_size=64 --batch_size=2 --block_size=32 --rounds=1 '
        '--seconds=0.01 --threads=1 --device=cpu --prefill=16 --positions=4,24 --dtypes=float32 '
        '--lengths=32,128 --length_n_layer=1 --length_n_embd=32 --window=16').split()
RUN = ('--n_layer=1 --n_embd=64 --n_head=1 --vocab_size=7 --block_size=16 --batch_size=4 '
       '--tokens_per_step=64 --max_iters=4 --eval_interval=2')


@pytest.fixture
def bench(monkeypatch, capsys):
    def run(*arguments):
        """python -m mambino.bench in this process, which has imported torch."""
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', ['mambino.bench', *arguments])
        monkeypatch.chdir(HERE)
        monkeypatch.delitem(sys.modules, 'mambino.bench.__main__', raising=False)   # it is executed anew
        threads, status = torch.get_num_threads(), 0
        try:
            runpy.run_module('mambino.bench', run_name='__main__', alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        finally:
            torch.set_num_threads(threads)
        said = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)
    return run


def test_is_started_as_a_module(bench):
    command = [sys.executable, '-m', 'mambino.bench', '--help']
    done = subprocess.run(command, cwd=HERE, capture_output=True, encoding='utf-8',
                          env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
    assert done.returncode == 0 and done.stdout == bench('--help').stdout
    assert 'usage: python -m mambino.bench ' in done.stdout


def test_tiny_run_prints_tables_and_writes_json(bench, tmp_path):
    file = tmp_path / 'bench.json'
    # nanoGPT stands for a peer: without its folder it must be left out, by name, and the rest go on
    run = bench(*TINY, '--models=gpt', '--sections=train,sample,goals', '--peers=nanogpt',
                f'--json={file}')
    assert run.returncode == 0, run.stderr
    for words in ('matmul float32', 'training: 1 layers', 'sampling, one sequence',
                  'time a byte read at position 24 against 4'):
        assert words in run.stdout
    assert 'nanoGPT: name its folder' in run.stdout
    data = json.loads(file.read_text(encoding='utf-8'))
    rows = {(row['section'], row['name']): row for row in data['rows']}
    assert set(rows) == {(section, name) for section in ('train', 'sample') for name in ('gpt',)}
    for row in rows.values():
        assert row['tokens_per_second'] > 0 and len(row['times']) == 1
    assert rows['train', 'gpt']['mfu'] > 0 and rows['train', 'gpt']['flops'] > 6 * 64 * 64
    row = rows['sample', 'gpt']
    assert len(row['state']) == 2 and row['ms']['24'] > 0
    few, many = [row['weights'] + state for state in row['state']]
    assert few > 4 * 64 * 64
    assert row['a_byte'] == pytest.approx(row['ms']['24'] / row['ms']['4'] * few / many)
    assert data['machine']['peak_flops']['float32'][0] > 1e8


def test_compares_with_a_peer(bench, tmp_path):
    (tmp_path / 'model.py').write_text('''
import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
''', encoding='utf-8')
    run = bench(*TINY, '--models=gpt', '--sections=train', '--peers=nanogpt', f'--nanogpt={tmp_path}')
    assert run.returncode == 0, run.stderr
    ratios = run.stdout.split('ours / peer')[1]
    assert 'gpt float32' in ratios and 'nanoGPT' in ratios and '×' in ratios


@pytest.mark.slow
def test_lengths_are_compared_and_drawn(bench, tmp_path):
    if not importlib.util.find_spec('matplotlib'):
        pytest.skip('the picture needs matplotlib: pip install --group bench')
    file, picture = tmp_path / 'bench.json', tmp_path / 'bench.png'
    run = bench(*TINY, '--models=gpt', '--sections=train,length', '--peers=', f'--json={file}',
                f'--plot={picture}')
    assert run.returncode == 0, run.stderr
    data = json.loads(file.read_text(encoding='utf-8'))
    whole, = [row for row in data['rows'] if row['section'] == 'train']
    rows = {(row['name'], row['sizes']['block_size']): row
            for row in data['rows'] if row['section'] == 'length'}
    assert set(rows) == {(name, T) for name in ('gpt', 'gpt_window') for T in (32, 128)}
    assert {row['tokens'] for row in rows.values()} == {128}  # the same tokens a step at each length
    assert rows['gpt', 128]['parameters'] < whole['parameters']                 # length_n_embd
    if os.path.exists('/proc/self/status'):
        assert all(row['memory'] > 0 for row in rows.values())
    assert {(r['section'], r['ours'], r['peer']) for r in data['ratios']} == {
        ('length', f'{name} at 128', f'{name} at 32') for name in ('gpt', 'gpt_window')}
    assert picture.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n' and picture.stat().st_size > 10_000


def test_loss_needs_less_memory_than_pytorchs(bench, tmp_path):
    file = tmp_path / 'bench.json'
    run = bench(*TINY, '--sections=loss', '--loss_vocab_size=50257', '--loss_batch_size=1',
                '--loss_block_size=512', f'--json={file}')
    assert run.returncode == 0, run.stderr
    data = json.loads(file.read_text(encoding='utf-8'))
    pairs = [(r['ours'], r['peer']) for r in data['ratios']]
    assert pairs == [('linear_cross_entropy', 'F.cross_entropy')]
    if os.path.exists('/proc/self/status'):
        assert data['ratios'][0]['memory'] < 0.7  # at its default size, less than 0.25
        plain = [row for row in data['rows'] if row['name'] == 'cross_entropy'][0]['memory']
        assert plain > 2 * 512 * 50257 * 4 - 50257 * 64 * 4  # the logits and their gradient, all at once


def test_whole_runs_to_a_loss(bench, tmp_path, capsys):
    data, file = tmp_path / 'abc', tmp_path / 'bench.json'
    data.mkdir()
    for split in ('train', 'val'):
        (torch.arange(2000, dtype=torch.int32) % 7).numpy().tofile(data / f'{split}.bin')
    flags = f'--dataset={data} {RUN}'
    picture = tmp_path / 'loss.svg'
    drawn = [f'--plot={picture}'] if importlib.util.find_spec('matplotlib') else []
    run = bench(*TINY, '--models=gpt', '--sections=', f'--time_to_loss_run={flags}',
                '--time_to_loss=99', f'--json={file}', *drawn)
    assert run.returncode == 0, run.stderr
    row, = json.loads(file.read_text(encoding='utf-8'))['rows']
    assert 0 < row['seconds_to_loss'] < row['times'][0]['whole'][0] and len(row['losses']) == 2
    curve_of_run, = row['curves']
    assert [loss for _, loss in curve_of_run] == row['losses']
    assert 0 < curve_of_run[0][0] < curve_of_run[1][0] < row['times'][0]['whole'][0]
    if drawn:
        text = picture.read_text(encoding='utf-8')
        assert text.startswith('<?xml') and 'val loss' in text and 'GPT' in text
        assert len(text) < 100_000

    from mambino.bench import curve
    row['times'] = [dict(whole=[3.0], loss=[2.0]), dict(whole=[4.0])]  # one run of two never got there
    curve.show([row], SimpleNamespace(time_to_loss_run=flags, time_to_loss=99))
    assert re.search(r'gpt +not reached +3.5 +3.0–4.0', capsys.readouterr().out)
    assert row['seconds_to_loss'] is None


def test_the_processors_time_is_not_that_of_waiting():
    from mambino.bench import contenders

    def work():
        time.sleep(0.05)
        torch.randn(200, 200).sum()
    for clock in ('wall', 'cpu'):
        _, turn = contenders.by_turns({'work': work}, SimpleNamespace(clock=clock, device='cpu', seconds=1e-6))
        assert (min(turn()['work']) > 0.05) == (clock == 'wall')


def test_mamba_is_compared_with_gpt_at_their_sizes():
    from mambino.bench import steps

    def row(name, parameters, *seconds):
        times = [{'step': [s]} for s in seconds]
        return dict(steps.new_row('train', name, 'float32'), parameters=parameters, times=times)
    rows = [row('mamba2', 7e6, 1.0, 2.0, 1.0), row('gpt', 10e6, 1.0, 1.0, 3.0), row('mamba1', 1, 1.0)]
    pair, = steps.compare(rows, SimpleNamespace())
    assert (pair['ours'], pair['peer']) == ('mamba2', 'gpt')
    assert (pair['speed'], pair['low'], pair['high']) == (1.0, 0.5, 3.0)
    assert pair['size'] == 0.7 and pair['memory'] is None
    of_mamba3 = [(pair['ours'], pair['peer']) for pair in steps.compare(
        [row('mamba3', 7e6, 1.0), row('mamba3_r4', 7e6, 2.0), row('mamba2', 7e6, 1.0)], SimpleNamespace())]
    assert of_mamba3 == [('mamba3', 'mamba2'), ('mamba3_r4', 'mamba2')]


def test_a_checkout_is_compared_with_another(bench, tmp_path):
    """This one with itself, under another path."""
    for name in os.listdir(HERE):
        if name.endswith('.py') or name == 'mambino':
            os.symlink(os.path.join(HERE, name), tmp_path / name)
    file = tmp_path / 'bench.json'
    run = bench(*TINY, '--models=gpt', '--sections=train,sample', f'--against={tmp_path}',
                f'--json={file}')
    assert run.returncode == 0, run.stderr
    data = json.loads(file.read_text(encoding='utf-8'))
    assert not data['left_out'] and {row['root'] for row in data['rows']} == {HERE, str(tmp_path)}
    pairs = [(r['section'], r['work'], r['ours'], r['peer']) for r in data['ratios']]
    assert pairs == [('train', 'step', 'gpt', 'before: gpt')] + [
        ('sample', work, 'gpt', 'before: gpt') for work in ('prefill', '4', '24')]


@pytest.mark.parametrize('settings, message', [
    (dict(models='gpt,mambo2'), "--models: unknown 'mambo2' (did you mean mamba2?)"),
    (dict(sections=''), "--sections: unknown ''"),
    (dict(lengths='1024,many'), '--lengths=1024,many: expected whole numbers'),
    (dict(lengths='1000,1024'), 'must be a multiple'),
    (dict(window=0), '--window=0: at least 1'),
    (dict(against='no/such/folder'), 'no train.py in there'),
    (dict(kinds='gtp'), "--kinds: unknown 'gtp' (did you mean gpt?)"),
    (dict(prompts='32,0'), '--prompts=32,0: expected whole numbers'),
    (dict(batches='1,x'), '--batches=1,x: expected whole numbers'),
    (dict(time_to_loss=-1.0), '--time_to_loss=-1.0: expected'),
    (dict(plot='bench.jpg'), 'ends in .png'),
    (dict(plot='bench.png', sections='loss'), 'of the sections train, length'),
    (dict(plot='no/such/folder/bench.png'), 'No such file'),
    (dict(json='no/such/folder/bench.json'), 'No such file'),
    (dict(plot='bench.png', missing='matplotlib'), 'pip install matplotlib'),
])
def test_bad_values_are_refused_before_measuring(settings, message, monkeypatch, capsys):
    from mambino.bench import __main__ as bench
    missing = settings.get('missing')  # else matplotlib is there, and never imported
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name: None if name == missing else 'there')
    monkeypatch.setattr(bench, 'peak_flops', lambda *_: pytest.fail('it measures already'))
    for name in settings.keys() - {'missing'}:
        monkeypatch.setattr(bench, name, settings[name])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count('\n') == 1 and message in error, error


def test_a_run_that_cannot_be_is_refused(bench):
    run = bench(*TINY, '--sections=', '--time_to_loss=1',
                '--time_to_loss_run=config/shakespeare_cpu.py --dataset=never_made')
    assert run.returncode == 2 and run.stderr.count('\n') == 1, run.stderr
    assert 'data/never_made: no such dataset' in run.stderr


def test_a_run_needs_nanogpts_data(bench, tmp_path):
    (tmp_path / 'model.py').touch()
    run = bench('--time_to_loss=1.88', f'--nanogpt={tmp_path}')
    assert run.returncode == 2 and run.stderr.count('\n') == 1
    assert 'data/shakespeare_char/prepare.py' in run.stderr


def test_importing_it_is_cheap_and_peak_is_measured():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from mambino.bench import __main__ as b; "
            "assert 'transformers' not in sys.modules; print(b.peak_flops('cpu', 'float32') > 1e8)")
    run = subprocess.run([sys.executable, '-c', code, HERE], capture_output=True, text=True)
    assert run.stdout == 'True\n', run.stderr


def test_known_gpus(monkeypatch):
    from mambino import machine
    monkeypatch.setattr(machine, 'matmul_peak', lambda device, dtype: 1.0)
    card = {}
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: card['name'])
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: card['capability'])
    for name, capability, expected in [
            ('NVIDIA A100-SXM4-80GB', (8, 0), 312e12), ('NVIDIA A10', (8, 6), 125e12),
            ('NVIDIA H100 PCIe', (9, 0), 756e12), ('NVIDIA H100 80GB HBM3', (9, 0), 989e12),
            ('NVIDIA GeForce RTX 4090 Laptop GPU', (8, 9), 1.0), ('Tesla T4', (7, 5), 1.0),
            ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', (8, 0), 1.0), ('NVIDIA Unheard-of', (9, 0), 1.0)]:
        card.update(name=name, capability=capability)
        assert machine.peak_flops.__wrapped__('cuda', torch.bfloat16) == expected, name


def test_generation_beside_transformers(bench):
    """Of a Mamba-3, which it does not have, beside our Mamba-2."""
    pytest.importorskip('transformers')
    run = bench('--sections=generate', '--kinds=gpt,hybrid,mamba3', '--ways=int8',
                '--their_dtypes=float32', '--batches=1,2', '--rounds=1', '--new_tokens=2',
                '--prompts=4,8', '--vocab_size=64', '--seconds=0.01', '--llama=False')
    assert run.returncode == 0, run.stderr
    for name, tables in (('ours int8', 6), ('Mamba-2 int8', 2), ('transformers float32', 4)):
        assert len(re.findall(rf'^  {name} +\d+ +[\d.]+ ', run.stdout, re.M)) == tables, run.stdout
    for kind in ('gpt', 'hybrid', 'mamba3'):
        assert f'{kind}, 2 sequences' in run.stdout
    assert run.stdout.count('2 sequences against 1') == 3


def test_goals_are_ratios_of_what_was_measured(capsys):
    from mambino.bench import goals
    from mambino.bench.turns import HERE

    def generated(by, way, batch, seconds, root=HERE):
        times = [{'token': [seconds], 'prompt 32': [2 * seconds]}]
        return dict(section='generate', name='gpt', by=by, dtype=way, batch=batch, root=root, times=times)

    def trained(name, dtype, seconds, parameters=10):
        return dict(section='train', name=name, dtype=dtype, root=HERE, parameters=parameters,
                    times=[{'step': [seconds]}])
    rows = [
        trained('gpt', 'float32', 4.0), trained('gpt', 'bfloat16', 3.0), trained('mamba2', 'float32', 6.0, 5),
        trained('llama', 'float32', 5.0), trained('llama', 'bfloat16', 6.0),
        generated('ours', 'bfloat16', 1, 1.0), generated('ours', 'int8', 1, 0.5), generated('ours', 'int8', 16, 2.0),
        generated('ours', 'int8', 1, 1.0, '/before'), generated('transformers', 'bfloat16', 1, 3.0),
        generated('llama.cpp', 'int8', 1, 0.25), trained('mamba3', 'float32', 5.0)]
    rows += [dict(generated('ours', 'int8', 1, 2.0), name='mamba3')]
    rows += [dict(generated('Mamba-2', 'int8', 1, 1.0), name='mamba3')]
    found = goals.goals(rows, HERE, ['4', '24'])
    assert found == {
        "training gpt, best precision, against transformers' best": (1.25, 5 / 3),
        'training mamba2 against gpt, × size': (0.8, 0.25),
        'training mamba3 against mamba2': (0.8, 1.2),
        'mamba3 × 1, token, best, against mamba2': (0.95, 0.5),
        'gpt × 1, token, best, against transformers bf16': (3.0, 6.0),
        'gpt × 1, prompt 32, best, against transformers bf16': (1.2, 6.0),
        'gpt × 1, token, int8, against llama.cpp Q8_0': (1.0, 0.5),
        'gpt × 1, prompt 32, int8, against llama.cpp Q8_0': (1.0, 0.5),
        'gpt, int8, 16 rows against one': (5.0, 4.0)}
    goals.show(rows, SimpleNamespace(positions='4,24', against='/before'))
    shown = capsys.readouterr().out
    assert re.search(r'token, int8, against llama.cpp Q8_0 +no +1.00× +0.50× +0.25×', shown)
    assert re.search(r'training gpt.* +yes +1.25× +1.67×\n', shown)


@pytest.mark.parametrize('clock', ['wall', 'cpu'])
@pytest.mark.parametrize('by', ['ours', 'transformers', 'llama.cpp'])
def test_each_contender_takes_its_turn(by, clock, monkeypatch, tmp_path):
    """Two sequences at once, in this process: as contenders.py begins it."""
    pytest.importorskip({'ours': 'torch', 'transformers': 'transformers', 'llama.cpp': 'xllamacpp'}[by])
    monkeypatch.syspath_prepend(os.path.join(HERE, 'mambino', 'bench'))
    import generators
    fields = dict(vocab_size=64, n_layer=1, n_embd=32, n_head=2, block_size=24)
    job = dict(kind='gpt', by=by, dtype='float32', batch=2, prompts=[4, 8], fields=fields, folder=str(tmp_path))
    facts, warm_up, turn = generators.generate(job, SimpleNamespace(new_tokens=3, seconds=0.01, clock=clock))
    warm_up()
    times = turn()
    assert times.keys() == {'token', 'prompt 4', 'prompt 8'} and facts['weights'] > 64 * 32 * 4
    assert all(seconds >= 0 for work in times.values() for seconds in work) and times['token'] and times['prompt 8']
