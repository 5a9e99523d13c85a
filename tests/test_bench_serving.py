"""bench/serving.py, of a model that is no larger than it must be."""
import subprocess
import sys
from types import SimpleNamespace

from helpers.runs import ROOT
from helpers.served import serving as serving_runs

from mambino.bench import serving


def test_the_section_serve(monkeypatch, capsys):
    fields = dict(n_layer=1, n_embd=64, vocab_size=300)
    monkeypatch.setattr(serving, 'config_of', lambda kind, settings: ('mamba', fields))
    settings = SimpleNamespace(kinds='mamba', ways='float32,int8', rounds=1, seconds=0.05, vocab_size=300, prompt=4,
                               new_tokens=3, clients='1,2', long_prompt=1500)
    rows = serving.measure(settings)
    assert [row['label'] for row in rows] == ['mamba float32', 'mamba int8']
    for row in rows:
        assert set(row['speeds']) == {1, 2} and row['bytes_a_row'] > 0
        assert all(row[name] > 0 for name in ('against_rows', 'work', 'against_alone', 'mean_ratio', 'latest_ratio'))
    said = capsys.readouterr().out
    assert said.count('first token of 1,500 tokens beside 15 others') == 2
    assert said.count("16 clients against 16 rows of sample.py") == 2


def clients(*servers):
    """What the program says of servers, asked by one and by three clients."""
    command = [sys.executable, '-m', 'mambino.bench.clients', *servers]
    flags = ['--clients=1,3', '--rounds=1', '--tokens=5', '--words=4']
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)


def test_clients_of_servers(runs):
    with serving_runs(runs, out_dir='bpe') as server:
        place = f'127.0.0.1:{server.port}'
        run = clients(f'ours={place}/bpe', f'again={place}/')
        assert run.returncode == 0, run.stderr
        rows = [line.split() for line in run.stdout.splitlines()[-4:]]
        assert [row[:2] for row in rows] == [['1', 'ours'], ['1', 'again'], ['3', 'ours'], ['3', 'again']]
        assert rows[0][-3:] == rows[2][-3:] == ['1.00x', 'as', 'fast']
        # one to warm it up, then one and three: five tokens each, and those that only spell a prompt's end
        assert server.scheduler('bpe').stats()['answer_tokens'] >= 2 * (5 + 5 + 15)
        run = clients(f'nobody={place}/nobody')
        assert run.returncode == 2 and 'no model' in run.stderr and run.stderr.count('\n') == 1
