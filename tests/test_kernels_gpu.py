"""What a GPU runs, as far as a CPU can tell: chunks that are compiled there; stand-ins for mamba-ssm's kernels."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.models import assert_close, assert_same
from torch._dynamo.backends.debugging import aot_eager

from mambino import kernels
from mambino.kernels import checked, cuda, fused, registry, triton_kernels
from model_gpt import rope_tables
from model_mamba import Mamba, MambaConfig, mamba1_scan, mamba2_scan

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


# mamba-ssm's two functions, by the definition
SSD = """
import torch
from model_mamba import ssd
from torch.nn.functional import softplus

def computed(x, dt, A, B, C, chunk_size, D, dt_bias, state):
    with registry.substituted():
        y, last = ssd(x, softplus(dt.float() + dt_bias), A, B, C, chunk_size, state)
    return y + D[:, None] * x, last

def _mamba_chunk_scan_combined_fwd(x, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus):
    assert dt_softplus
    y, last = computed(x, dt, A, B, C, chunk_size, D, dt_bias, initial_states)
    y = y.to(x.dtype)
    FORWARD
    return y, None, None, None, None, last

def _mamba_chunk_scan_combined_bwd(dout, x, dt, A, B, C, out, chunk_size, D, dt_bias, initial_states,
                                   dfinal_states, dt_softplus, dx, dB, dC):
    inputs = x, dt, A, B, C, D, dt_bias, initial_states
    def sums(*inputs):
        *inputs, D, dt_bias, state = inputs
        y, last = computed(*inputs, chunk_size, D, dt_bias, state)
        return y, last
    leaves = [u for u in inputs if u is not None]
    _, pull = torch.func.vjp(lambda *u: sums(*u, *[None] * (8 - len(u))), *leaves)
    last = torch.zeros(len(x), x.shape[2], x.shape[3], B.shape[3])
    ddx, ddt, dA, ddB, ddC, dD, dbias, *dstate = pull((dout.float(), last if dfinal_states is None else dfinal_states))
    BACKWARD
    dx.copy_(ddx), dB.copy_(ddB), dC.copy_(ddC)
    return dx, ddt, dA, dB, dC, dD, None, dbias, dstate[0] if dstate else None
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(forward, backward): mamba-ssm as pip leaves it without its CUDA extension: its __init__ fails,
    its Triton files would work, and do these lines before they return."""
    def make(forward="pass", backward="pass"):
        folder = tmp_path / "mamba_ssm" / "ops" / "triton"
        folder.mkdir(parents=True)
        (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise OSError('selective_scan_cuda.so')\n")
        (tmp_path / "mamba_ssm" / "ops" / "__init__.py").write_text("")
        (folder / "__init__.py").write_text("")
        (tmp_path / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(
            "import selective_scan_cuda_that_is_not_there\n"
        )
        text = "from mambino.kernels import registry\n" + SSD.replace("FORWARD", forward).replace("BACKWARD", backward)
        (folder / "ssd_combined.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    cached = fused.tried
    cached.cache_clear()
    monkeypatch.setattr(checked, "_answers", {})
    monkeypatch.setattr(checked, "notes", {})
    monkeypatch.setattr(fused, "run_notes", checked.notes)
    monkeypatch.setattr(fused, "_ssd", {})
    monkeypatch.setattr(triton_kernels, "has_triton", lambda: False)    # whose kernels come first
    yield make
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        del sys.modules[name]
    cached.cache_clear()


@pytest.mark.parametrize("forward, backward, says", [
    ("pass", "pass", "mamba-ssm's kernels (ssd)"),
    ("raise RuntimeError('no kernel image')", "pass", "does not work here (RuntimeError: no kernel image)"),
    ("pass", "raise RuntimeError('no kernel image')", "does not work here (RuntimeError: no kernel image)"),
    ("y = y * 1.1", "pass", "gives other numbers"),
    ("pass", "ddt = ddt * 1.1", "gives other numbers"),
    ("y = y * float('nan')", "pass", "gives other numbers"),
])
def test_fused_kernels_are_used_only_if_they_work(package, monkeypatch, forward, backward, says):
    package(forward, backward)
    found, notes = fused.fused("cpu")
    assert list(found) == (["ssd"] if "kernels (" in says else [])
    monkeypatch.setattr(fused, "fused", lambda kind, names: (found, notes))
    monkeypatch.setattr(cuda, "compile_trouble", lambda kind: "")
    assert says in kernels.describe_kernels("cuda:1")
    assert ("torch.compile makes" in kernels.describe_kernels("cuda", is_compiled=True)) == ("kernels (" not in says)
    assert "mamba_ssm" not in sys.modules  # whoever else imports it gets its own error


@pytest.mark.parametrize("version, is_used", [("2.2.2", False), ("2.2.6.post3", True), ("2.3.2.post1", True)])
def test_an_old_mamba_ssm_is_refused(package, tmp_path, version, is_used):
    package()
    folder = tmp_path / f"mamba_ssm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mamba-ssm\nVersion: {version}\n")
    found, notes = fused.fused("cpu")
    assert ("ssd" in found) == is_used and bool(notes) != is_used
    assert is_used or "version 2.2.2 has NaN in gradients" in notes[0]


def test_what_is_said_is_what_is_used(package, monkeypatch):
    """One answer for all names of a device, and the same within autocast, which rounds the definition's
    products and no kernel's."""
    package()
    calls = []
    monkeypatch.setattr(fused, "check", lambda *args: calls.append(torch.is_autocast_enabled("cpu")))
    answers = [fused.fused("cpu"), fused.fused("cpu:0"), fused.fused(torch.device("cpu"))]
    assert answers[0] == answers[1] == answers[2] and len(calls) == 1 and fused.is_fused("ssd", "cpu")
    fused.tried.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.fused("cpu") == answers[0]
    assert calls == [False, False]


def scan_inputs(T, state=True):
    """Of mamba2_scan: 2 groups, 4 heads of 8, N = 6."""
    shapes = [(2, T, 56), (2, T, 4), (4,), (4,), (4,)]
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[3] = -inputs[3].abs() - 0.1
    return inputs + [torch.randn(2, 4, 8, 6)] * state


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("through", [None, 0, 1])               # what the loss reads: both, y, the last state
@pytest.mark.parametrize("state", [True, False])
def test_mamba_ssm_is_one_operation(package, monkeypatch, state, through, is_compiled):
    """Its results and gradients are the definition's, also within torch.compile, of which it is a part."""
    package()
    fused.fused("cpu")
    reference = functools.partial(mamba2_scan.definition, groups=2, head_dim=8, chunk_size=16)

    def run(*inputs):
        inputs = list(inputs) + [None] * (6 - len(inputs))
        return fused.compute_ssd(*inputs[:5], 2, 8, inputs[5])

    if is_compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    with registry.substituted():
        assert_same(
            run, lambda *u: reference(*u[:5], state=u[5] if len(u) > 5 else None), scan_inputs(21, state), through
        )


def test_what_our_own_kernels_compute_is_not_said_to_be_mamba_ssms(package, monkeypatch):
    """Nor is it tried, unless ours do not work, or come later."""
    package()
    monkeypatch.setattr(fused, "KIND", "cpu")
    monkeypatch.setattr(triton_kernels, "has_triton", lambda: True)
    for order, failed, says in [("own first", False, []), ("own first", True, ["mamba-ssm's kernels (ssd)"]),
                                ("own last", False, ["mamba-ssm's kernels (ssd)"])]:
        names = ("triton_kernels", "fused") if order == "own first" else ("fused", "triton_kernels")
        monkeypatch.setattr(fused, "ORDER", names)
        monkeypatch.setattr(fused, "run_notes", {triton_kernels.SSD: "it fails"} if failed else {})
        assert fused.describe("cpu", True) == (says, [])


def test_a_compiled_mamba2_by_mamba_ssm(package, monkeypatch):
    """One graph, in which each layer's scan is one operation; a single token is not its business."""
    package()
    monkeypatch.setattr(fused, "KIND", "cpu")
    net = Mamba(MambaConfig(vocab_size=32, n_layer=2, n_embd=16, head_dim=8, state_size=6, n_groups=2))
    idx = torch.randint(32, (2, 21))
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    results = []
    for function in (torch.compile(net, backend=backend, fullgraph=True), net):
        net.zero_grad()
        loss = function(idx, idx)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
        monkeypatch.setattr(fused, "KIND", "cuda")
    names, = graphs
    assert sum("mambino" in name for name in names) == 2
    for got, want in zip(*results):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    xBC, dt, *parameters = scan_inputs(1, False)
    monkeypatch.setattr(fused, "KIND", "cpu")
    assert fused.mamba2_scan(xBC, dt, *parameters, 2, 8) is NotImplemented


def test_mamba_ssm_gets_chunks_of_its_own_size(package, monkeypatch):
    package()
    fused.fused("cpu")
    sizes = []
    forward = fused._ssd["forward"]
    monkeypatch.setitem(fused._ssd, "forward", lambda *args, **how: sizes.append(args[5]) or forward(*args, **how))
    for chunk_size in (16, 300):
        fused.fused_mamba2((fused._ssd["forward"], None), *scan_inputs(9, False), 2, 8, chunk_size)
    assert set(sizes) == {256}


def test_a_kernel_that_fails_when_it_is_needed(package, monkeypatch, capsys):
    """In sizes that a card has no room for: the run goes on in PyTorch, and one line says so."""
    package()
    fused.fused("cpu")
    small, large = 300, 2000

    def fails(*args):
        if args[0].shape[1] == large:
            raise RuntimeError("out of resource: shared memory")
        return ssd_forward(*args)

    ssd_forward = fused.ssd_forward
    monkeypatch.setattr(fused, "ssd_forward", fails)
    arguments = 2, 8, 6, torch.float32, True
    assert fused.ssd_works("cpu", 1, small, 4, *arguments)
    assert not fused.ssd_works("cpu", 1, large, 2, *arguments)
    assert not fused.ssd_works("cpu", 1, large, 2, *arguments)
    assert capsys.readouterr().err.count("mamba-ssm's ssd does not work here (RuntimeError: out of resource") == 1
    assert "out of resource" in fused.describe("cuda", False)[1][-1]


def test_no_memory_is_no_fault_of_a_kernel(monkeypatch):
    monkeypatch.setattr(checked, "_answers", {})

    def attempt():
        raise torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            checked.works("a kernel", (), attempt)
    assert checked.works("a kernel", (), lambda: None)


@pytest.mark.parametrize("seconds, says", [(9, "note: a kernel took 9 s to compile and try"), (1, "")])
def test_who_waits_for_a_kernel_is_told_why(monkeypatch, capsys, seconds, says):
    monkeypatch.setattr(checked, "_answers", {})
    clock = iter([0.0, float(seconds)])
    monkeypatch.setattr(checked.time, "perf_counter", lambda: next(clock))
    assert checked.works("a kernel", (), lambda: None)
    said = capsys.readouterr().err
    assert says in said and bool(says) == bool(said)


@pytest.mark.parametrize("error", [None, RuntimeError("Cannot find a working triton installation.\nMore of it")])
def test_where_nothing_compiles(monkeypatch, error):
    """A window is computed by blocks, a Mamba-1 by PyTorch, and the first lines say why."""
    def compiler(function, **settings):
        def call(*args):
            if error is not None:
                raise error
            return function(*args)
        return call

    checked.compile_trouble.cache_clear()
    monkeypatch.setattr(torch, "compile", compiler)
    try:
        assert checked.compiles("cpu") == (error is None)
        trouble = checked.compile_trouble("cpu")
        assert trouble == ("" if error is None else "RuntimeError: Cannot find a working triton installation.")
        monkeypatch.setattr(cuda, "compile_trouble", lambda kind: trouble)
        assert (f"does not work here ({trouble})" in kernels.describe_kernels("cuda")) == bool(error)
        assert "triton" not in kernels.describe_kernels("mps")
    finally:
        checked.compile_trouble.cache_clear()


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
    fused.check("scan", (selective_scan_fn,), "cpu")
    x, raw, z = torch.randn(3, 2, 20, 6).unbind()
    args = x, raw, torch.randn(6), -torch.rand(6, 4), torch.randn(2, 20, 4), torch.randn(2, 20, 4), torch.randn(6), z
    for got, want in zip(fused.fused_mamba1((selective_scan_fn,), *args), mamba1_scan.definition(*args)):
        assert_close(got, want, 1e-5)


def test_rope_tables_are_one_operation_to_a_compiler(monkeypatch):
    """Its graph has the operation, and no cosine; the numbers are those of the definition."""
    frequencies = 100.0 ** (-torch.arange(4) / 4)
    torch.library.opcheck(torch.ops.mambino.rope_tables.default, (torch.arange(5), frequencies, 1.0))
    monkeypatch.setattr(cuda, "KIND", "cpu")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    positions = torch.arange(7)
    compiled = torch.compile(lambda positions: rope_tables(positions, frequencies), backend=backend, fullgraph=True)
    for made, expected in zip(compiled(positions), rope_tables.definition(positions, frequencies)):
        assert torch.equal(made, expected)
    assert [node.target for node in graphs[0].graph.nodes if "cos" in str(node.target)] == []
    assert any("rope_tables" in str(node.target) for node in graphs[0].graph.nodes)
