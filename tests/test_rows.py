"""matrices.h: a matrix as it is stored times a few rows, against products in 64 bits, as this processor, one with
AVX2 and one with neither compute it."""
import ctypes
import functools
import os
import shlex
import subprocess

import pytest
import torch
import torch.nn.functional as F

from mambino.kernels import native
from mambino.weights import quantize

pytestmark = pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
BUILDS = {'native': None, 'avx2': '-mavx2 -mfma', 'plain': ''}
FORMATS = ('float32', *quantize.PRECISIONS)
every_build = pytest.mark.parametrize('build', BUILDS)
every_format = pytest.mark.parametrize('precision', FORMATS)


@functools.cache
def library(build, folder):
    """linear_step alone, compiled for a processor."""
    if BUILDS[build] is None:
        return native.library()
    if build == 'avx2' and ' avx2 ' not in native.processor():
        pytest.skip('this processor has no AVX2')
    source = os.path.join(os.path.dirname(native.SOURCE), 'cpp', 'matrices.h')
    target = os.path.join(folder, f'{build}.so')
    subprocess.run([native.compiler(), *native.FLAGS, *shlex.split(BUILDS[build]), '-x', 'c++', source, '-o', target],
                   check=True, stderr=subprocess.DEVNULL)
    return ctypes.CDLL(target)


@pytest.fixture
def product(build, tmp_path_factory):
    """product(x, codes, scales): x times a matrix as native.linear computes it, by this build."""
    folder = str(tmp_path_factory.getbasetemp())

    def multiply(x, codes, scales, threads=1):
        y = torch.full((len(x), len(codes)), torch.nan)
        matrix = native.matrix_of(codes, scales, x.shape[1])
        arguments = threads, len(x), ctypes.addressof(matrix), x.data_ptr(), y.data_ptr()
        library(build, folder).linear_step(*map(ctypes.c_int64, arguments))
        return y
    return multiply


def stored(weight, precision):
    """A matrix → its codes, scales, and in 64 bits what they stand for."""
    if precision == 'float32':
        return weight, None, weight.double()
    kept = quantize.Linear(weight.shape, precision).fill(weight)
    return kept.codes, kept._buffers.get('scales'), kept.weight.double()


def bound(x, exact, precision):
    """What a product may differ by, (tokens, rows): sums in fp32 by what 24 bits lose each time, half a step of
    x's 16 bits a number in int8 and int4."""
    terms = F.linear(x.double().abs(), exact.abs())
    steps = x.double().abs().amax(1, keepdim=True) / 65534 * exact.abs().sum(1)
    return 2e-6 * terms + (1.01 * steps if precision in ('int8', 'int4') else 0) + 1e-30


@every_build
@every_format
def test_products_of_1_to_33_rows(product, precision):
    """And a row's are the same bits whatever rows are beside it."""
    torch.manual_seed(0)
    for rows, columns in ((1, 1), (7, 64), (33, 130), (16, 48), (50, 576), (3, 1100)):
        codes, scales, exact = stored(torch.randn(rows, columns), precision)
        x = torch.randn(33, columns) * torch.logspace(-6, 6, 33)[:, None]
        alone = torch.cat([product(row[None], codes, scales) for row in x])
        difference = (alone - F.linear(x.double(), exact)).abs()
        assert (difference <= bound(x, exact, precision)).all()
        for n in (*range(2, 10), 15, 16, 17, 18, 19, 32, 33):
            assert torch.equal(product(x[:n].contiguous(), codes, scales), alone[:n]), (rows, columns, n)
        assert torch.equal(product(x, codes, scales, threads=3), alone)


@every_build
@pytest.mark.parametrize('precision', ['int8', 'int4'])
def test_sums_of_the_largest_numbers_do_not_overflow(product, precision):
    x = torch.ones(5, 40000)
    weight = torch.ones(3, 40000)
    weight[2, ::2] = -1                                     # in int4, no group of one number
    codes, scales, exact = stored(weight, precision)
    got = product(x, codes, scales)
    assert torch.allclose(got.double(), F.linear(x.double(), exact), rtol=1e-4, atol=1)


@every_build
def test_products_of_int4_are_exact(product):
    """Of whole numbers x, whose largest is the largest code; and of all codes, in groups even and odd in number."""
    torch.manual_seed(0)
    x = torch.randint(-256, 257, (5, 64 * 9)).float()
    x[:, ::96] = torch.tensor([32767, -32767, 32640, -32640, 255, -1])
    for groups in (1, 2, 3, 8, 9):
        codes = torch.randint(256, (20, groups * 32), dtype=torch.uint8)
        scales = torch.tensor([1.0, 0.0]).bfloat16().expand(20, groups, 2).contiguous()
        low, high = (half.unflatten(1, (groups, 32)) for half in (codes & 15, codes >> 4))
        exact = torch.cat((low, high), -1).flatten(1).double()
        part = x[:, :64 * groups].contiguous()
        for n in (1, 5):
            assert torch.equal(product(part[:n], codes, scales).double(), F.linear(part[:n].double(), exact)), groups


@every_build
@every_format
def test_what_is_no_number_stays_in_its_row(product, precision):
    torch.manual_seed(0)
    codes, scales, _ = stored(torch.randn(20, 100), precision)
    x = torch.randn(6, 100)
    want = product(x, codes, scales)
    x[1, 3], x[4, 99] = torch.nan, torch.inf
    x[5] = 0
    got = product(x, codes, scales)
    assert not got[[1, 4]].isfinite().any() and not got[5].any()
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
