"""machine.py: what it measures of a machine takes no longer where the machine is slow; a dtype for each."""
import platform
import subprocess
import sys

import pytest

from mambino import machine


@pytest.mark.parametrize('cell, most', [(1.0, 5e4), (1e-3, 500), (1e-9, 2.0)])
def test_matmul_peak_is_soon_there(monkeypatch, cell, most):
    """By a clock that only products advance, by `cell` seconds for each number of a row: as slow as 16-bit numbers are
    in software, or slower, and as fast as a real processor."""
    clock = [0.0]

    def multiply(a, b, out):
        assert out.shape == (len(a), b.shape[1])
        clock[0] += cell * len(a) * b.numel()
    monkeypatch.setattr(machine.time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(machine.torch, 'mm', multiply)
    assert machine.matmul_peak('cpu', 'float32') == pytest.approx(2 / cell)
    assert clock[0] < most


def test_a_precision_in_software_is_told(monkeypatch):
    speeds = {'float32': 1e11, 'float16': 2e8}
    monkeypatch.setattr(machine, 'peak_flops', lambda device, dtype: speeds[dtype])
    assert machine.slowdown('cpu', 'float16') == pytest.approx(500)
    assert machine.slowdown('cpu', 'float32') == machine.slowdown('cuda', 'float16') == 1


def test_a_cpu_computes_in_32_bits_unless_told_otherwise():
    assert machine.choose_dtype('auto', 'cpu') == 'float32'
    assert machine.choose_dtype('bfloat16', 'cpu') == 'bfloat16'
    with pytest.raises(SystemExit):
        machine.choose_dtype('float99', 'cpu')


@pytest.mark.parametrize('has_it, dtype, expected', [
    (True, 'bfloat16', 'bfloat16'),
    (False, 'bfloat16', 'float32'),     # in software it would take ages
    (True, 'float32', 'float32'),
    (True, 'float16', 'float32'),       # of a GPU's run
    (True, None, 'float32'),            # of no run: weights that were exported
])
def test_a_run_is_evaluated_in_its_own_precision(monkeypatch, has_it, dtype, expected):
    monkeypatch.setattr(machine, 'has_bfloat16', lambda device: has_it)
    assert machine.dtype_of_run(dtype, 'cpu') == expected


def test_16_bits_in_hardware_are_known(monkeypatch):
    def capabilities():
        return names
    monkeypatch.setattr(machine.torch.cpu, 'get_capabilities', capabilities, raising=False)
    names = dict(avx2=True, avx512_bf16=False, amx_bf16=False)
    assert not machine.has_bfloat16('cpu')
    names = dict(avx2=True, avx512_bf16=True, amx_bf16=False)
    assert machine.has_bfloat16('cpu')


@pytest.mark.skipif(sys.platform != 'linux' or platform.libc_ver()[0] != 'glibc', reason='glibc')
def test_freed_memory_is_kept_for_the_next_tensors():
    """In a process of its own: pages that it is given in rounds of six tensors of 12 MB."""
    code = """if True:
        import resource, torch
        from mambino import machine
        def pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                tensors = [torch.ones(3 << 20) for _ in range(6)]
                del tensors
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        machine.keep_freed_memory()
        print(min(pages() for _ in range(8)))    # once they are side by side
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
