"""Linears in fp32 that read a short prompt: the numbers are nn.Linear's, and what must be PyTorch's is."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.models import MODELS, assert_close, build, tokens

from mambino.kernels import cpu, native
from mambino.sample import decode
from mambino.weights import quantize
from mambino.weights.dense import MOST, Dense, read_few_rows
from mambino.weights.loading import prepare_model

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler")


@pytest.fixture
def products(monkeypatch):
    """How many rows each product of native.cpp had."""
    counts = []
    multiply = native.linear

    def linear(x, codes, scales):
        counts.append(x.numel() // x.shape[-1])
        return multiply(x, codes, scales)
    monkeypatch.setattr(native, "linear", linear)
    return counts


@pytest.mark.parametrize("shape", [(1,), (3,), (1, MOST), (4, 1), (2, 16)])
def test_few_rows_are_native(shape, products):
    torch.manual_seed(0)
    dense = nn.Linear(100, 33, bias=False)
    read_few_rows(dense)
    x = torch.randn(*shape, 100)
    with torch.no_grad():
        got = dense(x)
    assert products == [x.numel() // 100]
    assert_close(got, F.linear(x.double(), dense.weight.double()).float(), 1e-6)


def test_all_else_is_pytorchs(products):
    dense = read_few_rows(nn.Linear(100, 33, bias=False))
    few = torch.randn(MOST, 100)
    dense(few).sum().backward()
    assert dense.weight.grad.abs().sum() > 0                        # with gradients
    with torch.no_grad():
        dense(torch.randn(MOST + 1, 100))                           # more rows
        dense(few[:0])                                              # none
        with torch.autocast("cpu", torch.bfloat16):
            assert dense(few).dtype == torch.bfloat16
        with cpu.portable():
            dense(few)
        assert dense.double()(few.double()).dtype == torch.float64
    assert products == []


def test_which_linears():
    """All that have no bias and are no router: what an expert is chosen by is as it was."""
    for name in MODELS:
        net = build(name).eval()
        read_few_rows(net)
        for path, module in net.named_modules():
            if isinstance(module, nn.Linear):
                plain = type(module) is nn.Linear
                kept = path.endswith(quantize.EXACT) or module.bias is not None
                assert plain == kept or type(module) not in (nn.Linear, Dense), path


@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_model_reads_the_same(name, products):
    torch.manual_seed(0)
    net = build(name).eval()
    prepared, _ = prepare_model(copy.deepcopy(net), "cpu", "float32")
    idx = tokens(1, 7)
    want, state = net.step(idx)
    got, own = decode.step(prepared, idx)
    assert 7 in products
    assert_close(got, want, 1e-5)
    token = tokens(1, 1)
    plan = decode.ready(prepared, token, own, 0)
    assert (plan is None) == (decode.ready(net, token, state, 0) is None)   # a Dense is known to plans
    assert_close(decode.step(prepared, token, own)[0], decode.step(net, token, state)[0], 1e-5)


@pytest.mark.parametrize("multiplies", [True, False])
def test_many_rows_of_bf16_are_unpacked_where_nothing_multiplies_it(multiplies, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: multiplies)
    calls = []
    monkeypatch.setattr(native, "tiles", lambda x, codes, scales: calls.append(len(x)) or x @ codes.float().T)
    linear = quantize.Linear((33, 100), "bfloat16").fill(torch.randn(33, 100))
    for count in (quantize.UNPACKED - 1, quantize.UNPACKED):
        x = torch.randn(count, 100)
        assert_close(linear(x), F.linear(x, linear.weight), 1e-5)
    assert calls == [quantize.UNPACKED - 1, quantize.UNPACKED][:1 + multiplies]
