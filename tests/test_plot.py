"""python -m mambino.bench.plot: the losses of runs, in the terminal and as a picture."""
import json
import os
import subprocess
import sys
import xml.dom.minidom

import pytest
from helpers.runs import ROOT

from mambino.bench import plot
from mambino.train import curves


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Two runs, one with a damaged log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '80')
    for name, factor in (('out-a', 1.0), ('out <b>', 0.5)):
        os.mkdir(name)
        with open(f'{name}/metrics.jsonl', 'wb') as f:
            for step in range(1, 301):
                line = dict(step=step, loss=5 * factor / step**0.2, tokens=64 * step, seconds=36.0 * step)
                f.write(json.dumps(line).encode() + b'\n')
                if step % 100 == 0:
                    f.write(json.dumps(dict(step=step, val_loss=2.5 * factor)).encode() + b'\n')
    with open('out-a/metrics.jsonl', 'ab') as f:
        f.write(b'{"step": null}\n\xff\xfe\n[]\n{"step": 301, "loss": null}\n{"step": 302, "lo')


def test_runs_overlaid(capsys):
    plot.main(['out-a', 'out <b>'], 'curves.svg', 'step')
    said = capsys.readouterr().out
    assert 'note: out-a: 4 lines that are damaged' in said and 'note: out <b>' not in said
    for label in ('out-a train', 'out-a val: 2.5000', 'out <b> train', 'out <b> val: 1.2500'):
        assert label in said
    assert max(map(len, said.split('\n'))) <= 80
    picture = xml.dom.minidom.parse('curves.svg')
    assert len(picture.getElementsByTagName('polyline')) == 4
    assert 'out <b> val: 1.2500' in ''.join(t.firstChild.data for t in picture.getElementsByTagName('text'))


@pytest.mark.parametrize('x, last', [('tokens', 64 * 300), ('hours', 3.0)])
def test_over_tokens_and_hours(capsys, x, last):
    run, _ = plot.read_run('out-a', x)
    assert run['train'][-1][0] == pytest.approx(last) and len(run['val']) == 3
    assert run['val'][-1][0] == pytest.approx(last)
    plot.main(['out-a'], 'curves.html', x)
    with open('curves.html', encoding='utf-8') as f:
        assert f.read().startswith('<!doctype html>') and x in capsys.readouterr().out


def test_what_is_between_axes():
    (left, right), (low, high) = curves.bounds([[(0.01, 3.0), (0.02, 2.0)]])
    assert (left, right, low, high) == (0.01, 0.02, 2.0, 3.0)
    assert curves.bounds([[(5, 1e-3), (9, 1e-3)]]) == ((5, 9), (0.5e-3, 1.5e-3))     # a level is in the middle
    level = [(at, 2.0 + at % 2 / 10) for at in range(100)]
    assert curves.bounds([[(0, 50.0), *level[1:]]])[1] == (2.0, 2.1)                # a beginning, out of sight
    assert curves.bounds([[*level[:-1], (99, 50.0)]])[1] == (2.0, 50.0)             # an end is to be seen


def test_one_point_and_none(capsys):
    with open('out-a/metrics.jsonl', 'w') as f:
        f.write('{"step": 1, "loss": 3.0}\n')
    plot.main(['out-a'], '', 'step')
    assert '3.0000' in capsys.readouterr().out
    for folder in ('missing', 'out-a'):
        open('out-a/metrics.jsonl', 'w').close()
        with pytest.raises(SystemExit) as end:
            plot.main([folder], '', 'step')
        assert end.value.code == 2
        assert 'error: ' in capsys.readouterr().err


def test_no_torch_is_needed():
    code = ('import runpy, sys; sys.argv = ["plot", "out-a"]; '
            'runpy.run_module("mambino.bench.plot", run_name="__main__"); print("torch" in sys.modules)')
    env = {**os.environ, 'PYTHONPATH': ROOT, 'PYTHONIOENCODING': 'ascii'}
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith('False\n'), run.stderr


def test_help_says_what_to_type():
    run = subprocess.run([sys.executable, '-m', 'mambino.bench.plot', '--help'], env={**os.environ, 'PYTHONPATH': ROOT},
                         capture_output=True, encoding='utf-8')
    assert run.returncode == 0 and 'usage: python -m mambino.bench.plot [file or folder' in run.stdout, run.stderr
