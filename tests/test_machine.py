"""machine.py: what it measures of a machine takes no longer where the machine is slow."""
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
