"""Adapters and rounded weights, served as sample.py takes them."""
import os
import shutil
import threading

import pytest

pytest.importorskip('fastapi')

from mambino.serve.library import Library
from mambino.serve.work import Done, Failed, Job, Room


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """A folder with a model, an adapter of it, and weights that are rounded; the working directory."""
    before = os.path.join(os.path.dirname(__file__), 'data', 'before')
    for name in ('gpt-muon', 'lora', 'int8'):
        shutil.copytree(os.path.join(before, name), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts_of(served, capsys, *flags):
    """(what a model answers, what sample.py writes), of one seed."""
    from helpers.runs import script
    events = []
    ended = threading.Event()

    def send(event):
        events.append(event)
        if isinstance(event, (Done, Failed)):
            ended.set()
    ids = served.tok.encode('at').tolist()
    served.scheduler.submit(Job(ids=ids, max_tokens=12, seed=7, temperature=0.8), send)
    assert ended.wait(20) and isinstance(events[-1], Done), events[-1]
    capsys.readouterr()
    settings = '--start=at --heal=false --max_new_tokens=12 --seed=7 --temperature=0.8 --top_k=0 --device=cpu'
    assert script('sample.py', settings, '--dtype=float32', *flags) == 0
    written = capsys.readouterr().out
    return ''.join(event.text for event in events if hasattr(event, 'text')), written


@pytest.mark.parametrize('out_dir, adapters', [
    ('lora', ''), ('gpt-muon', 'lora'), ('gpt-muon', 'lora:0.5'), ('int8', ''),
])
def test_adapters_answer_as_in_sample_py(adapted, capsys, out_dir, adapters):
    library = Library('.', out_dir, 'cpu', 'float32', '', adapters, 0.0, Room(rows=1))
    try:
        text, written = texts_of(library.get(), capsys, f'--out_dir={out_dir}', f'--adapters={adapters}')
        assert 'at' + text in written
        assert ('int8' in library.get().about) == (out_dir == 'int8')
        library.get('gpt-muon')                             # which they are not put on where they are not meant
    finally:
        library.close()
