"""One token of each row on a card: our Triton kernels, in Triton's interpreter, and when they are taken."""
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.card import pretended
from helpers.card_process import on_card
from helpers.card_tensor import CardTensor

from mambino.kernels import checked, one_token
from model_gpt import swiglu

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'helpers', 'token_cases.py')


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton, which comes with torch for CUDA')
def test_kernels_give_what_pytorch_gives():
    environment = dict(os.environ, TRITON_INTERPRET='1')
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    deviations = json.loads(ran.stdout)
    assert len(deviations) == 16
    assert {case: error for case, error in deviations.items() if not error < 1e-5} == {}


KERNELS = {
    'right': lambda gate, up: torch.nn.functional.silu(gate) * up,
    'wrong': lambda gate, up: 1.01 * torch.nn.functional.silu(gate) * up,
    'no numbers': lambda gate, up: gate * torch.nan,
    'none': lambda gate, up: [][0],
}


@on_card
@pytest.mark.parametrize('kind', KERNELS)
def test_a_kernel_is_tried_before_it_is_used(kind):
    """One that is wrong, or does not compile, is said once, and PyTorch computes."""
    calls = []

    def kernel(gate, up):
        calls.append(1)
        return KERNELS[kind](gate, up)
    one_token.PLAIN = CardTensor,
    one_token.has_triton = lambda: True
    one_token.triton_token = lambda: SimpleNamespace(swiglu=kernel)
    said = io.StringIO()
    gate, up = torch.randn(2, 3, 1, 40).unbind()
    with pretended(), torch.no_grad(), contextlib.redirect_stderr(said):
        for _ in range(3):
            got = swiglu(gate.to('cuda'), up.to('cuda')).cpu()
            assert torch.allclose(got, torch.nn.functional.silu(gate) * up)
    assert len(calls) == (4 if kind == 'right' else 1)      # tried once, then used, or not
    assert said.getvalue().count('note: ') == (kind != 'right')
    assert len(checked.notes) == (kind != 'right')
