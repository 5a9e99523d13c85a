"""What tests/soak.py does for long, for a moment."""
import sys

import pytest

pytest.importorskip('fastapi')
pytest.importorskip('uvicorn')


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
def test_a_server_stays_as_it_was(capsys):
    import soak
    assert not soak.run(requests=300, clients=8)
    assert 'p95' in capsys.readouterr().out


def test_what_is_not_as_it_was_is_seen():
    from soak import problems_of
    as_it_was = dict(MB=100.0, files=10, threads=5, rows=0)
    assert not problems_of({('sound', 200): 9, ('malformed', 400): 1, ('cut off', 0): 1}, as_it_was, as_it_was, 0)
    for change in (dict(MB=200.0), dict(files=20), dict(threads=99), dict(rows=1)):
        assert len(problems_of({}, as_it_was, {**as_it_was, **change}, 0)) == 1
    for statuses in ({('sound', 500): 1}, {('sound', 'cut short'): 1}, {('malformed', 500): 1}):
        assert len(problems_of(statuses, as_it_was, as_it_was, 0)) == 1
    assert problems_of({}, as_it_was, as_it_was, 1)
