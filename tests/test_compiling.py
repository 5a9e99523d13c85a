"""train/compiling.py: when a run's model is compiled, and what happens where that does not work."""
import types

import pytest
import torch
from helpers.runs import metrics, train

from mambino import kernels, machine
from mambino.train import compiling, processes

pytestmark = pytest.mark.usefixtures('one_thread')
NET = types.SimpleNamespace(flops_per_token=lambda T: 1e9)


@pytest.mark.parametrize('changes, step, expected', [
    (dict(), 0, True),                          # 1e18 operations at 40e12 a second: seven hours
    (dict(max_iters=70), 0, False),             # … three minutes
    (dict(), 9950, False),                      # nearly done
    (dict(device='cpu'), 0, False),
    (dict(device='mps'), 0, False),
    (dict(eval_only=True), 0, False),
    (dict(compile=False), 0, False),
    (dict(compile=True, device='cpu', max_iters=1), 0, True),       # as asked
])
def test_a_run_on_a_card_is_compiled_if_it_is_long_enough(monkeypatch, changes, step, expected):
    monkeypatch.setattr(machine, 'peak_flops', lambda device, dtype: 100e12)
    settings = dict(compile=None, device='cuda', dtype='bfloat16', eval_only=False, max_iters=10_000,
                    tokens_per_step=100_000, block_size=1024) | changes
    compiling.choose(settings, NET, None, step)
    assert settings['compile'] is expected


def test_all_processes_compile_or_none(monkeypatch):
    """Each measures its own card: that of another process is as fast that the run is too short."""
    monkeypatch.setattr(machine, 'peak_flops', lambda device, dtype: 100e12)
    monkeypatch.setattr(processes, 'least', lambda seconds: min(seconds, 1.0))
    settings = dict(compile=None, device='cuda', dtype='bfloat16', eval_only=False, max_iters=10_000,
                    tokens_per_step=100_000, block_size=1024)
    compiling.choose(settings, NET)
    assert settings['compile'] is False


@pytest.mark.parametrize('sharded, adapter, words', [
    (True, None, 'parallel=fsdp'), (False, dict(type='prefix'), 'adapter=prefix'), (False, dict(type='lora'), '')])
def test_what_cannot_be_compiled_is_told(monkeypatch, capsys, sharded, adapter, words):
    monkeypatch.setattr(processes, 'SHARDED', sharded)
    settings = dict(compile=True)
    compiling.choose(settings, NET, adapter)
    assert settings['compile'] is not bool(words)
    said = capsys.readouterr().out
    assert (words in said and 'left out' in said) if words else said == ''


def broken(error, above=0):
    """A torch.compile whose models fail with this error where more than so many sequences come at
    once."""
    def compiled(net):
        def forward(x, y):
            if len(x) > above:
                raise error
            return net(x, y)
        return forward
    return compiled


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'), MemoryError(),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory.")])
def test_too_little_memory_to_compile_means_smaller_micro_batches(here, capsys, monkeypatch, error):
    flags = '--model=gpt --tokens_per_step=128 --max_iters=3'
    train(flags, '--batch_size=2 --out_dir=two')
    capsys.readouterr()
    monkeypatch.setattr(kernels, 'compiled', broken(error, above=2))
    train(flags, '--batch_size=8 --compile')
    said = capsys.readouterr().out
    assert said.count('out of memory: going on with micro-batches of ') == 2 and 'does not work' not in said
    assert 'seconds, for faster steps' in said
    assert metrics() == metrics('two')


@pytest.mark.parametrize('text, words', [
    ('TritonMissing: Cannot find a working triton installation. Either …', 'pip install triton'),
    ('RuntimeError: Failed to find C compiler. Please specify via CC environment variable', 'no C compiler'),
    ('InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx', 'no C++ compiler'),
    ("CalledProcessError: Command '['/usr/bin/gcc', '/tmp/main.c']' returned non-zero exit status 1.", 'headers'),
    ('GPUTooOldForTriton: Found GTX 960 which is too old to be supported by the triton GPU compiler', 'too old'),
    ('ValueError: something else\nmany lines', 'ValueError: something else'),
])
def test_why_torch_does_not_compile_is_said_in_a_line(text, words):
    reason = compiling.reason_of(text)
    assert words in reason and '\n' not in reason and len(reason) < 170
