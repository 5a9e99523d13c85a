"""mamba-ssm's kernels, of several releases, in Triton's interpreter against the definition: minutes, so they run where
they are asked for alone.

    pip install "triton>=3.8" einops --target /tmp/triton     # older ones do not interpret with numpy 2.4
    pip download mamba-ssm==2.3.2.post1 --no-binary :all: --no-deps     # and unpack it; more with ':' between
    PYTHONPATH=/tmp/triton MAMBINO_MAMBA_SSM=/tmp/mamba_ssm-2.3.2.post1 python -m pytest -m interpreter
"""
import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mambino.kernels import fused
from model_mamba import mamba1_scan

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = [folder for folder in os.environ.get('MAMBINO_MAMBA_SSM', '').split(os.pathsep) if folder]
CASES = {
    'odd T, state': dict(T=41, state=True),
    'groups': dict(B=2, T=32, groups=2),
    'groups of heads, state': dict(T=32, H=4, groups=2, state=True),
    'one token': dict(T=1, state=True),
    'less than a chunk': dict(T=9),
    'y alone': dict(reads_state=False),
    'a chunk that is no power of two': dict(chunk_size=24),
    'heads of 24': dict(T=16, P=24),
    'states of 24': dict(T=16, N=24),
    'fp16, state': dict(T=32, state=True, dtype='float16'),     # bf16 it does not know
}


def missing():
    """What there is not of what these tests need."""
    names = [name for name in ('triton', 'einops') if importlib.util.find_spec(name) is None]
    return names if SOURCES else [*names, 'MAMBINO_MAMBA_SSM, a folder with mamba_ssm/ in it']


pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(bool(missing()), reason=f'without {", ".join(missing())}')]


@pytest.mark.parametrize('folder', SOURCES or [''], ids=os.path.basename)
@pytest.mark.parametrize('case', CASES)
def test_mamba_ssm_in_the_interpreter(folder, case):
    """Results and all gradients differ by less than 1e-5 of the largest value; half precision rounds them."""
    command = [sys.executable, os.path.join(HERE, 'helpers', 'interpreted.py'), folder, json.dumps(CASES[case])]
    environment = dict(os.environ, TRITON_INTERPRET='1', MAMBINO_NATIVE='0')
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    deviations = json.loads(run.stdout.splitlines()[-1])
    limit = 5e-3 if 'dtype' in CASES[case] else 1e-5
    print(folder, case, deviations)
    assert all(deviation <= limit for deviation in deviations.values()), deviations


def reference_of(folder):
    """mamba-ssm's selective_scan_ref, in PyTorch, with selective_scan_fn's arguments."""
    import einops
    with open(os.path.join(folder, 'mamba_ssm', 'ops', 'selective_scan_interface.py'), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    tree.body = [node for node in tree.body if getattr(node, 'name', '') == 'selective_scan_ref']
    names = dict(torch=torch, F=F, rearrange=einops.rearrange, repeat=einops.repeat)
    exec(compile(tree, folder, 'exec'), names)
    return names['selective_scan_ref']


@pytest.mark.parametrize('folder', SOURCES or [''], ids=os.path.basename)
@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_mamba1_against_mamba_ssm(folder, dtype, limit):
    """Its CUDA extension runs on a card alone; what it is given and gives back is that of its reference."""
    torch.manual_seed(0)
    B, T, E, N = 2, 37, 24, 16
    shapes = (B, T, E), (B, T, E), (E,), (E, N), (B, T, N), (B, T, N), (E,), (B, T, E)
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[3] = -inputs[3].abs() - 0.1
    inputs = [u.to(dtype) if u.shape[:2] == (B, T) else u for u in inputs]
    results = []
    for function in (mamba1_scan.definition, lambda *u: fused.fused_mamba1((reference_of(folder),), *u)):
        leaves = [u.clone().requires_grad_() for u in inputs]
        y, last = function(*leaves)
        torch.manual_seed(1)
        loss = (y.float() * torch.randn(y.shape)).sum() + (last.float() * torch.randn(last.shape)).sum()
        results.append([y, last, *torch.autograd.grad(loss, leaves)])
    deviations = [((a.float() - b.float()).abs().max() / b.abs().max()).item() for b, a in zip(*results)]
    print(folder, dtype, deviations)
    assert max(deviations) <= limit
