"""The first hour on a card: its parts on a CPU, what it does with one that fails or hangs, its
reports."""
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch

from mambino.bench.gpu import __main__ as hour
from mambino.bench.gpu import check, kernel_checks, models, order, outcome, part, running, waits
from mambino.kernels.registry import KERNELS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def rows_of(tmp_path):
    path = tmp_path / 'x.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def recorder(tmp_path):
    return outcome.Recorder('x', str(tmp_path / 'x.jsonl'), time.monotonic() + 60)


def test_a_failure_is_a_result_and_the_rest_goes_on(tmp_path, recorder):
    with recorder.item('first'):
        raise RuntimeError('no kernel image')
    with recorder.item('second'):
        recorder.add('second', 'fine', passed=True)
    rows = rows_of(tmp_path)
    assert [row['passed'] for row in rows] == [False, True]
    assert rows[0]['name'] == 'first' and 'RuntimeError: no kernel image' in rows[0]['text']


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path):
    recorder = outcome.Recorder('x', str(tmp_path / 'x.jsonl'), time.monotonic() + 5)
    with recorder.item('the first', 60) as wanted:
        assert wanted                   # a part that was begun tries
    with recorder.item('long', 60) as wanted:
        assert not wanted
    row, = rows_of(tmp_path)
    assert row['name'] == 'long' and 'left out' in row['text'] and row['passed'] is None


PLANTED = """
import os, time
def run(recorder, device, out_dir):
    recorder.add('before', 'it knew this', passed=True)
    {}
"""


@pytest.mark.parametrize('does, says', [
    ('raise ValueError("planted")', 'ended with status 1'),
    ('os._exit(7)', 'ended with status 7'),
    ('time.sleep(60)', 'planted.py:5 run'),       # where it was
])
def test_a_part_that_dies_or_hangs(tmp_path, monkeypatch, does, says):
    """What it knew before is kept, why it ended is told, and the next part is not its concern."""
    (tmp_path / 'planted.py').write_text(PLANTED.format(does))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setattr(running, 'GRACE', 2)
    planted = order.Part('planted', 'planted', 1, 1, 'what is planted')
    starter = tmp_path / 'sitecustomize.py'     # so that the part's package finds the planted module
    starter.write_text(f'import mambino.bench.gpu\nmambino.bench.gpu.__path__.append({str(tmp_path)!r})\n')
    results = outcome.Results(str(tmp_path), 'command')
    running.run_part(planted, 4 if 'sleep' in does else 30, 'cpu', str(tmp_path), results)
    first, last = results.rows
    assert first['text'] == 'it knew this'
    assert last['passed'] is False and says in last['text']
    if 'ValueError' in does:
        assert 'planted' in last['text']


def test_reports(tmp_path, capsys):
    results = outcome.Results(str(tmp_path), 'python -m mambino.bench.gpu')
    results.add(dict(part='machine', name='card', passed=None, text='NVIDIA H100', figures={}))
    results.add(dict(part='check', name='gpt', passed=True, text='a | b', figures=dict(loss=1e-6)))
    results.add(dict(part='check', name='mamba', passed=False, text='4e-1', figures={}))
    results.write()
    report = json.loads((tmp_path / 'report.json').read_text())
    assert [row['name'] for row in report['results']] == ['card', 'gpt', 'mamba']
    assert report['results'][1]['figures'] == dict(loss=1e-6)
    table = (tmp_path / 'report.md').read_text()
    assert table.startswith('# NVIDIA H100\n') and '1 checks right, 1 wrong' in table
    assert '| check | gpt | ok | a \\| b |' in table and '| check | mamba | WRONG | 4e-1 |' in table
    assert results.show_sum() == 1
    assert 'WRONG  check mamba: 4e-1' in capsys.readouterr().out


def test_few_minutes_leave_out_the_last_parts(tmp_path, monkeypatch, capsys):
    """Each part here takes all the time it may: the most telling ones fill the minutes, none runs
    longer."""
    clock, runs = [0.0], []

    def run_part(each, seconds, device, out_dir, results):
        assert seconds <= each.most
        clock[0] += seconds
        runs.append(each.name)
        results.add(dict(part=each.name, name='x', passed=True, text='', figures={}))
    monkeypatch.setattr(hour, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(hour.running, 'run_part', run_part)
    monkeypatch.setattr(hour, 'out_dir', str(tmp_path))
    monkeypatch.setattr(hour, 'device', 'cpu')
    names = [each.name for each in order.PARTS]
    for minutes, expected in ((3.0, 2), (6.0, 3), (60.0, len(names))):
        clock[0], runs[:] = 0.0, []
        monkeypatch.setattr(hour, 'minutes', minutes)
        assert hour.main() == 0
        assert runs[:expected] == names[:expected] and clock[0] <= 60 * minutes
        rows = json.loads((tmp_path / 'report.json').read_text())['results']
        assert [row['part'] for row in rows if row['name'] == 'left out'] == [n for n in names if n not in runs]
    assert 'of --minutes=3 are left' in capsys.readouterr().out
    clock[0], runs[:] = 0.0, []
    monkeypatch.setattr(hour, 'minutes', 0.3)
    monkeypatch.setattr(hour, 'parts', 'speed_gpt')
    assert hour.main() == 0 and runs == ['speed_gpt'] and clock[0] <= 18    # named: it begins


def test_a_run_of_one_part(tmp_path):
    command = [sys.executable, '-m', 'mambino.bench.gpu', '--device=cpu', '--parts=machine',
               f'--out_dir={tmp_path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    rows = json.loads((tmp_path / 'report.json').read_text())['results']
    assert {'torch', 'card', 'gcc', 'kernels', 'copies'} <= {row['name'] for row in rows}
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_part_is_refused(tmp_path):
    command = [sys.executable, '-m', 'mambino.bench.gpu', '--parts=chek', f'--out_dir={tmp_path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'there is no chek' in done.stderr + done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card')
def test_without_a_card_a_line_and_no_part(tmp_path):
    command = [sys.executable, '-m', 'mambino.bench.gpu', f'--out_dir={tmp_path}/out']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith('error: device=cuda: ') and done.stderr.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_every_part_is_there():
    for each in order.PARTS:
        module = part.importlib.import_module(f'mambino.bench.gpu.{each.module}')
        assert callable(module.run) and each.least < each.most


@pytest.mark.parametrize('name', models.SMALL_MODELS)
def test_a_wrong_gradient_is_found(tmp_path, recorder, monkeypatch, name):
    """The check is right on the CPU itself, and wrong as soon as one gradient is."""
    references = {}
    check.check(recorder, name, name, 'float32', 'cpu', references)
    compute = check.compute

    def planted(*args):
        computed = compute(*args)
        parameter = list(computed['gradients'])[-1]
        computed['gradients'][parameter] *= 1.001
        return computed
    monkeypatch.setattr(check, 'compute', planted)
    check.check(recorder, name, name, 'float32', 'cpu', references)
    assert [row['passed'] for row in rows_of(tmp_path)] == [True, False]


@pytest.mark.parametrize('operation', ['ssd', 'attention', 'causal_conv1d'])
def test_a_wrong_kernel_is_found(tmp_path, recorder, operation):
    right = KERNELS[operation][-1]

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01
    for kernel in (right, wrong):
        kernel_checks.check_kernel(recorder, operation, operation, kernel, torch.float32, 'cpu')
    assert [row['passed'] for row in rows_of(tmp_path)] == [True, False]


def test_waits_run_on_a_cpu(tmp_path, recorder):
    waits.check(recorder, 'gpt', 'gpt', 'float32', 'cpu')
    assert len(rows_of(tmp_path)) == 1
