"""bench.py at a tiny size: a table, its JSON, and a refusal."""
import json
import os
import subprocess
import sys

import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--n_layer=1', '--n_embd=64', '--n_head=2', '--vocab_size=64', '--batch_size=2', '--block_size=32', '--rounds=1',
        '--seconds=0.01', '--threads=1', '--device=cpu', '--prefill=16', '--positions=4,24', '--dtypes=float32']


def bench(*arguments):
    return subprocess.run([sys.executable, os.path.join(HERE, 'bench.py'), *arguments], capture_output=True, text=True,
                          encoding='utf-8', env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})


def test_tiny_run_prints_tables_and_writes_json(tmp_path):
    file = tmp_path / 'bench.json'
    # nanoGPT stands for a peer: without its folder it must be left out, by name, and the rest go on
    run = bench(*TINY, '--models=gpt', '--sections=train,sample', '--peers=nanogpt', f'--json={file}')
    assert run.returncode == 0, run.stderr
    assert 'matmul float32' in run.stdout and 'training: 1 layers' in run.stdout and 'sampling, one sequence' in run.stdout
    assert 'nanoGPT: name its folder' in run.stdout
    data = json.loads(file.read_text(encoding='utf-8'))
    rows = {(row['section'], row['name']): row for row in data['rows']}
    assert set(rows) == {(section, name) for section in ('train', 'sample') for name in ('gpt',)}
    for row in rows.values():
        assert row['tokens_per_second'] > 0 and len(row['times']) == 1
    assert rows['train', 'gpt']['mfu'] > 0 and rows['train', 'gpt']['flops'] > 6 * 64 * 64
    assert len(rows['sample', 'gpt']['state']) == 2 and rows['sample', 'gpt']['ms']['24'] > 0
    assert data['machine']['peak_flops']['float32'][0] > 1e8


def test_compares_with_a_peer(tmp_path):
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


def test_unknown_model_is_refused():
    run = bench('--models=gpt,mambo2')
    assert run.returncode == 2 and run.stderr.count('\n') == 1
    assert "unknown 'mambo2'" in run.stderr and 'mamba2' in run.stderr


def test_importing_it_is_cheap_and_peak_is_measured():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import bench; assert 'transformers' not in sys.modules; "
            "print(bench.peak_flops('cpu', 'float32') > 1e8)")
    run = subprocess.run([sys.executable, '-c', code, HERE], capture_output=True, text=True)
    assert run.stdout == 'True\n', run.stderr


def test_known_gpus(monkeypatch):
    import bench
    monkeypatch.setattr(bench, 'matmul_peak', lambda device, dtype: 1.0)
    for name, capability, expected in (('NVIDIA A100-SXM4-80GB', (8, 0), 312e12), ('NVIDIA A10', (8, 6), 125e12),
                                       ('NVIDIA H100 PCIe', (9, 0), 756e12), ('NVIDIA H100 80GB HBM3', (9, 0), 989e12),
                                       ('NVIDIA GeForce RTX 4090 Laptop GPU', (8, 9), 1.0), ('Tesla T4', (7, 5), 1.0),
                                       ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', (8, 0), 1.0), ('NVIDIA Unheard-of', (9, 0), 1.0)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        assert bench.peak_flops.__wrapped__('cuda', torch.bfloat16) == expected, name
