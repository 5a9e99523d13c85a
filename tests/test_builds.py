"""native.cpp as it is compiled for lesser processors: vectors of 8 and of 4 numbers in the place of 16."""
import ctypes
import itertools
import platform
import subprocess

import pytest
import torch
from helpers.models import MODELS, assert_close, build, perturb, tokens

from mambino.kernels import cpu, native
from mambino.sample import decode
from mambino.weights.quantize import quantize_model

pytestmark = pytest.mark.skipif(native.library() is None, reason='no compiler')
X86 = platform.machine() in ('x86_64', 'AMD64')
BUILDS = {8: ['-mavx2', '-mfma'], 4: []} if X86 else {4: []}
LANES = pytest.mark.parametrize('lanes', BUILDS)
SIZES = {                                   # multiples of 16, which the kernels take, and what is left over
    'gpt': dict(n_embd=96, n_head=2, head_dim=48, qk_norm=True),
    'gpt-gqa-window': dict(n_embd=64, n_head=4, head_dim=16),
    'mamba1': dict(n_embd=36),
    'mamba2': dict(n_embd=48, head_dim=16, state_size=48, chunk_size=32),
    'mamba2-groups-untied': dict(n_embd=32, head_dim=16, state_size=16, n_groups=2),
    'hybrid': dict(n_embd=64, state_size=32, ssm_head_dim=32),
}

MAMBA3 = {
    'mamba3': dict(version=3, n_embd=32, head_dim=16, state_size=32, chunk_size=32),
    'mamba3-mimo': dict(version=3, n_embd=32, head_dim=32, state_size=64, mimo_rank=4, head_norm=True),
}


@pytest.fixture(scope='module')
def libraries(tmp_path_factory):
    """{lanes: the library of native.cpp}, compiled side by side; those that this processor runs."""
    folder = tmp_path_factory.mktemp('builds')
    compiled = {}
    for lanes, flags in BUILDS.items():
        if '-mavx2' not in flags or 'avx2' in native.processor():
            target = folder / f'{lanes}.so'
            compiled[lanes] = target, subprocess.Popen(
                [native.compiler(), *native.FLAGS, *flags, native.SOURCE, '-o', target])
    assert not any(process.wait() for _, process in compiled.values())
    return {lanes: ctypes.CDLL(str(target)) for lanes, (target, _) in compiled.items()}


@pytest.fixture
def library(libraries, lanes, monkeypatch):
    if lanes not in libraries:
        pytest.skip('this processor has no AVX2')
    monkeypatch.setattr(native, 'library', lambda: libraries[lanes])
    cpu.multiplies.cache_clear()
    yield libraries[lanes]
    cpu.multiplies.cache_clear()


def model(name):
    torch.manual_seed(0)
    net = build('mamba2', **MAMBA3[name]) if name in MAMBA3 else build(name, **SIZES[name])
    return perturb(net, 0.05)


@LANES
def test_lanes(library, lanes):
    assert library.lanes() == native.lanes() == lanes


@LANES
@pytest.mark.parametrize('name', [*SIZES, *MAMBA3])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_loss_and_gradients_are_pytorchs(library, name, dtype):
    net = model(name)
    idx, targets = tokens(2, 75), tokens(2, 75)

    def run():
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
            loss = net(idx, targets)[1]
        return loss, torch.autograd.grad(loss, list(net.parameters()))
    loss, grads = run()
    with cpu.portable():
        wanted, wanted_grads = run()
    coarse = dtype == 'bfloat16'
    assert_close(loss, wanted, 2e-2 if coarse else 1e-5)
    for got, want in zip(grads, wanted_grads):
        assert (got - want).norm() <= (0.1 if coarse else 1e-4) * want.norm() + 1e-6


@LANES
@pytest.mark.parametrize('precision, name', [
    *itertools.product(['', 'bfloat16', 'int8', 'int4'], SIZES), *itertools.product([''], MAMBA3)])
def test_generation_is_pytorchs(library, name, precision):
    net = model(name)
    if precision:
        quantize_model(net, precision)
    states = [None, None]
    for idx in (tokens(3, 40), tokens(3, 1), tokens(3, 1)):
        got, states[0] = decode.step(net, idx, states[0])
        with cpu.portable():
            want, states[1] = net.step(idx, states[1])
        error = (got - want).norm() / want.norm()
        assert error <= (0.03 if precision else 1e-5)


@pytest.mark.skipif(not X86, reason='flags of x86')
@pytest.mark.parametrize('flags', ['-mavx', '-mavx2 -mfma -mavxvnni', '-march=skylake-avx512', '-march=cooperlake'])
def test_it_compiles_for_processors_that_are_not_here(flags):
    command = [native.compiler(), *native.FLAGS, *flags.split(), '-fsyntax-only', native.SOURCE]
    said = subprocess.run(command, capture_output=True, text=True)
    if 'unrecognized' in said.stderr or 'bad value' in said.stderr or 'unknown' in said.stderr:
        pytest.skip(f'a compiler without {flags}')
    assert said.returncode == 0, said.stderr


def test_every_kind_is_here():
    assert SIZES.keys() <= MODELS.keys()
