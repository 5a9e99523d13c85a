"""bench/serving.py, of a model that is no larger than it must be."""
from types import SimpleNamespace

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
