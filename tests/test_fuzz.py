"""What tests/fuzz.py breaks, a little of it: the scripts end as they promise."""
import gc
import os

import pytest

CASES = 99


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_scripts_end_as_they_promise(one_thread, capsys):
    import fuzz
    kinds = list(fuzz.KINDS)
    try:
        counts, faults = fuzz.run_cases(fuzz.cases_of(CASES, 1, kinds))
    finally:
        gc.unfreeze()
    assert not faults
    assert set(counts) == set(kinds) and all(count[0] >= CASES // len(kinds) for count in counts.values())
    assert sum(refused for _, refused in counts.values()) > CASES / 3          # something was broken


def test_a_fault_is_seen(tmp_path):
    import fuzz
    (tmp_path / 'stderr').write_text('error: all is well\n')
    assert fuzz.verdict(tmp_path, 2) == '' and fuzz.verdict(tmp_path, 0) == ''
    assert 'SIGSEGV' in fuzz.verdict(tmp_path, -11)
    (tmp_path / 'stderr').write_text('nothing\n')
    assert 'no line' in fuzz.verdict(tmp_path, 2)
    (tmp_path / 'stderr').write_text('Traceback (most recent call last):\nValueError: x\n')
    assert 'ValueError' in fuzz.verdict(tmp_path, 1)
    (tmp_path / 'canary').write_text('')
    assert 'was run' in fuzz.verdict(tmp_path, 0)
