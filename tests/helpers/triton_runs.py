"""Runs our Triton kernels in Triton's interpreter, in a process of its own (triton_cases.py)."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

CASES = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'triton_cases.py')


def has_interpreter():
    """Whether Triton's interpreter runs: it wants a triton, and a numpy that takes arrays of one for numbers."""
    if importlib.util.find_spec('triton') is None:
        return False
    import numpy
    return tuple(map(int, numpy.__version__.split('.')[:2])) < (2, 4)


def interpreted(*cases):
    """The deviations of each case: (kind, arguments, constants of its file)."""
    if not has_interpreter():
        pytest.skip('needs triton and numpy < 2.4: pip install triton "numpy<2.4"')
    environment = dict(os.environ, TRITON_INTERPRET='1')
    ran = subprocess.run([sys.executable, CASES, json.dumps(cases)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]
