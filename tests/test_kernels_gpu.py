"""What a GPU runs, as far as a CPU can tell: chunks that are compiled there; stand-ins for mamba-ssm's kernels."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.models import assert_close, assert_same, random_dt, recurrence

from mambino import kernels
from mambino.kernels import cuda
from model_mamba import mamba1_scan

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


@pytest.mark.parametrize("T", [8, 61])
def test_scan_by_chunks(monkeypatch, T):
    """The form that a GPU compiles, uncompiled."""
    monkeypatch.setattr(cuda, "chunk_functions", lambda: (cuda.scan_chunk, cuda.scan_chunk_backward))

    def run(x, dt, A, B, C, h):
        pad = -T % 8
        y, h = cuda.ScanByChunks.apply(
            *(F.pad(u, (0, 0, 0, pad)) for u in (x, dt)),
            A,
            *(F.pad(u, (0, 0, 0, pad)) for u in (B, C)),
            h,
        )
        return y[:, :T], h

    def reference(x, dt, A, B, C, h):
        y, h = recurrence(x[..., None], dt, A, B[:, :, None], C[:, :, None], h.transpose(1, 2)[:, :, None])
        return y[..., 0], h[:, :, 0].transpose(1, 2)

    assert_same(
        run,
        reference,
        [
            torch.randn(2, T, 6),
            random_dt("usual", (2, T, 6)),
            -torch.rand(6, 3) * 16,
            torch.randn(2, T, 3),
            torch.randn(2, T, 3),
            torch.randn(2, 3, 6),
        ],
    )


def fake_package(
    tmp_path,
    monkeypatch,
    ssd="return plain_ssd(*args, **how)",
    init="raise OSError('selective_scan_cuda.so')",
):
    """mamba-ssm as pip leaves it without its CUDA extension: its __init__ fails, its Triton files
    would work."""
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(init + "\n")
    (tmp_path / "mamba_ssm" / "ops" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (tmp_path / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(
        "import selective_scan_cuda_that_is_not_there\n"
    )
    (folder / "ssd_combined.py").write_text(
        "import torch\nfrom model_mamba import ssd\nfrom torch.nn.functional import softplus\n\n"
        "def plain_ssd(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus, initial_states, return_final_states):\n"
        "    y, h = ssd(x, softplus(dt + dt_bias), A, B, C, chunk_size, initial_states)\n"
        "    return y + D[:, None] * x, h\n\n"
        f"def mamba_chunk_scan_combined(*args, **how):\n    {ssd}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        monkeypatch.delitem(sys.modules, name)
    cuda.fused.cache_clear()


@pytest.mark.parametrize("ssd, says", [
    ("return plain_ssd(*args, **how)", "mamba-ssm's kernels (ssd)"),
    ("raise RuntimeError('no kernel image')", "does not work here (RuntimeError: no kernel image)"),
    ("y, h = plain_ssd(*args, **how); return y * 1.1, h", "gives other numbers"),
    ("y, h = plain_ssd(*args, **how); return y.detach() + 0 * y, h", "gives other numbers"),
    ("y, h = plain_ssd(*args, **how); return y * float('nan'), h", "gives other numbers"),
])
def test_fused_kernels_are_used_only_if_they_work(tmp_path, monkeypatch, ssd, says):
    fake_package(tmp_path, monkeypatch, ssd)
    try:
        found, notes = cuda.fused("cpu")
        assert list(found) == (["ssd"] if "kernels (" in says else [])
        monkeypatch.setattr(cuda, "fused", lambda device: (found, notes))
        assert says in kernels.describe_kernels("cuda")
        assert "mamba_ssm" not in sys.modules  # whoever else imports it gets its own error
    finally:
        for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
            del sys.modules[name]


def test_fused_mamba1_hands_over_the_right_arguments():
    """Against a stand-in with selective_scan_fn's signature, computed as its reference is
    written."""

    def selective_scan_fn(
        u,
        delta,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
    ):
        assert delta_softplus and return_last_state
        dt, h, ys = F.softplus(delta + delta_bias[:, None]), torch.zeros(len(u), *A.shape), []
        for t in range(u.shape[2]):
            h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
            ys.append((h * C[:, None, :, t]).sum(-1))
        return (torch.stack(ys, 2) + D[:, None] * u) * F.silu(z), h
    cuda.check_fused("scan", selective_scan_fn, "cpu")
    x, raw, z = torch.randn(3, 2, 20, 6).unbind()
    args = x, raw, torch.randn(6), -torch.rand(6, 4), torch.randn(2, 20, 4), torch.randn(2, 20, 4), torch.randn(6), z
    for got, want in zip(cuda.fused_mamba1(selective_scan_fn, *args), mamba1_scan.definition(*args)):
        assert_close(got, want, 1e-5)
