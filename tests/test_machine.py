"""machine.py: what it measures of a machine takes no longer where the machine is slow; a dtype for each."""
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


@pytest.mark.parametrize('has_amx, dtype', [(True, 'bfloat16'), (False, 'float32')])
def test_a_cpu_computes_in_16_bits_where_its_hardware_does(monkeypatch, has_amx, dtype):
    monkeypatch.setattr(machine.torch.cpu, '_is_amx_tile_supported', lambda: has_amx, raising=False)
    assert machine.choose_dtype('auto', 'cpu') == dtype
    assert machine.choose_dtype('float32', 'cpu') == 'float32'
