"""machine.py: what it measures of a machine takes no longer where the machine is slow; a dtype for each."""
import pytest

from mambino import machine


@pytest.mark.parametrize('row, rows', [(1.0, 2 * 16), (1e-6, 2**15)])
def test_matmul_peak_is_soon_there(monkeypatch, row, rows):
    """By a clock that only products advance, `row` seconds for each row: where one takes a second, as 16-bit numbers do
    in software, two small products must do."""
    clock, done = [0.0], []

    def multiply(a, b, out):
        clock[0] += row * len(a)
        done.append(len(a))
    monkeypatch.setattr(machine.time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(machine.torch, 'mm', multiply)
    assert machine.matmul_peak('cpu', 'float32') == pytest.approx(2 * 2048**2 / row)
    assert sum(done) <= rows or max(done) == 2048


@pytest.mark.parametrize('has_amx, dtype', [(True, 'bfloat16'), (False, 'float32')])
def test_a_cpu_computes_in_16_bits_where_its_hardware_does(monkeypatch, has_amx, dtype):
    monkeypatch.setattr(machine.torch.cpu, '_is_amx_tile_supported', lambda: has_amx, raising=False)
    assert machine.choose_dtype('auto', 'cpu') == dtype
    assert machine.choose_dtype('float32', 'cpu') == 'float32'
