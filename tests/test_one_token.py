"""One token of each row on a card: our Triton kernels, in Triton's interpreter, and when they are taken."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'helpers', 'token_cases.py')


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton, which comes with torch for CUDA')
def test_kernels_give_what_pytorch_gives():
    environment = dict(os.environ, TRITON_INTERPRET='1')
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    deviations = json.loads(ran.stdout)
    assert len(deviations) == 14
    assert {case: error for case, error in deviations.items() if not error < 1e-5} == {}
