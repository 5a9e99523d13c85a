"""tiles.h: products of rounded matrices with many rows, in every build, against float64."""
import copy
import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.models import perturb, tokens
from helpers.runs import ROOT

from mambino.kernels import native
from mambino.weights import checkpoint, quantize

# Of the root mean square of all numbers. x is rounded: to bf16, or for integers to 8 bits (64 columns share a
# scale) where a processor multiplies bytes, else to 16. Measured 0.003 in bf16 and 0.0064 in 8 bits; of a
# model's logits up to 0.004 and 0.011.
TOLERANCE = {"bfloat16": 0.01, "int8": 0.03, "int4": 0.03}
SIZES = [(7, 64, 1), (33, 100, 3), (64, 130, 6), (1, 1, 17), (100, 64, 33), (16, 200, 8), (130, 72, 601)]
BUILDS = ["", "-mavx2 -mfma", "-march=native"] if platform.machine() in ("x86_64", "AMD64") else [""]
every_precision = pytest.mark.parametrize("precision", quantize.PRECISIONS)


@pytest.fixture(scope="module", params=BUILDS, ids=lambda flags: flags or "no flags")
def build(request, tmp_path_factory):
    """tiles.h alone, compiled with these flags; the processor must know them."""
    flags = request.param.split()
    if native.library() is None:
        pytest.skip("no compiler")
    if "-mavx2" in flags and "avx2" not in native.processor():
        pytest.skip("no AVX2")
    folder = tmp_path_factory.mktemp("tiles")
    header = os.path.join(os.path.dirname(native.SOURCE), "cpp", "tiles.h")
    (folder / "tiles.cpp").write_text(f'#include "{header}"\n')
    target = str(folder / "tiles.so")
    subprocess.run([native.compiler(), *native.FLAGS, *flags, folder / "tiles.cpp", "-o", target], check=True)
    return ctypes.CDLL(target)


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@every_precision
def test_products_in_every_build(build, precision, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: build)
    torch.manual_seed(0)
    for rows, columns, count in SIZES:
        kept = quantize.Linear((rows, columns), precision).fill(torch.randn(rows, columns))
        x = torch.randn(count, columns) * torch.logspace(-3, 3, count)[:, None]
        got = native.tiles(x, kept.codes, getattr(kept, "scales", None))
        want = F.linear(x.double(), kept.weight.double())
        rows_error = (got - want).norm(dim=1) / want.norm(dim=1)    # a small row is rounded by itself
        assert rows_error.median() <= TOLERANCE[precision] and rows_error.max() <= 10 * TOLERANCE[precision]


@every_precision
def test_what_is_no_number_stays_none_and_nothing_is_zero(precision):
    kept = quantize.Linear((20, 100), precision).fill(torch.randn(20, 100))
    x = torch.randn(20, 100)
    x[3], x[5, 7], x[9, 99], x[11] = 0, torch.nan, -torch.inf, 1e-38
    got = native.tiles(x, kept.codes, getattr(kept, "scales", None))
    broken = torch.tensor([i in (5, 9) for i in range(20)])
    assert not got[broken].isfinite().any() and got[~broken].isfinite().all()
    assert not got[3].any() and got[11].abs().max() < 1e-35


@every_precision
@pytest.mark.parametrize("kind", ["gpt", "mamba", "hybrid"])
def test_a_prompt_read_at_once_is_the_one_read_by_tokens(kind, precision):
    """And a second time it gives the very same numbers, on any number of threads."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_layer=2, n_embd=128, **(dict(n_head=2) if kind != "mamba" else {}))
    net = perturb(checkpoint.build(kind, sizes)).eval()
    net, idx = quantize.quantize_model(net, precision), tokens(2, 40)
    at_once, state = net.step(idx)
    single = []
    slow = None
    for token in idx.split(1, 1):
        logits, slow = net.step(token, slow)
        single.append(logits)
    assert error(at_once, torch.cat(single, 1)) <= TOLERANCE[precision]
    follow = net.step(idx[:, :1], copy.deepcopy(state))[0]
    assert error(follow, net.step(idx[:, :1], slow)[0]) <= TOLERANCE[precision]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = net.step(idx)[0]
    torch.set_num_threads(threads)
    assert torch.equal(again, at_once)


@pytest.mark.skipif(sys.platform != 'linux' or not native.library(), reason='mprotect, and a compiler')
@pytest.mark.parametrize('precision', quantize.PRECISIONS)
def test_nothing_is_read_behind_a_matrix(precision):
    """Codes and scales end where a page begins that nobody may read: to read it ends the process."""
    code = f"""if True:
        import ctypes, mmap, torch
        from mambino.kernels import native
        from mambino.weights import quantize
        kept = []

        def before_a_wall(tensor):
            pages = -(-tensor.nbytes // mmap.PAGESIZE)
            kept.append(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE))
            end = pages * mmap.PAGESIZE
            wall = ctypes.addressof(ctypes.c_char.from_buffer(kept[-1])) + end
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0)
            copy = torch.frombuffer(kept[-1], dtype=tensor.dtype, count=tensor.numel(), offset=end - tensor.nbytes)
            return copy.view(tensor.shape).copy_(tensor)

        for rows, columns in ((1, 33), (17, 64), (33, 200)):
            matrix = quantize.Linear((rows, columns), {precision!r}).fill(torch.randn(rows, columns))
            codes, scales = (before_a_wall(t) if t is not None else None
                             for t in (matrix.codes, getattr(matrix, 'scales', None)))
            for multiply in (native.linear, native.tiles):
                multiply(before_a_wall(torch.randn(5, columns)), codes, scales)
    """
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
