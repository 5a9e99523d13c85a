"""Each operation against plain float64, results and all gradients: by native.cpp, by PyTorch
anywhere, and as the model's file defines it."""
import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from helpers.models import V, assert_close, assert_same, perturb, random_dt, recurrence, tokens

import model_gpt
import model_mamba
from mambino import language_model
from mambino.kernels import anywhere, registry
from mambino.language_model import RMSNorm, gated_rms_norm, linear_cross_entropy, rms_norm
from model_gpt import apply_rope, rope_tables, swiglu
from model_mamba import causal_conv1d, mamba1_scan, mamba2_scan, selective_scan, ssd

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


OPERATIONS = {
    model_gpt: "attention apply_rope",
    model_mamba: "causal_conv1d selective_scan mamba1_scan ssd mamba2_scan",
    language_model: "rms_norm swiglu gated_rms_norm linear_cross_entropy",
}
MODULES = {name: module for module, names in OPERATIONS.items() for name in names.split()}  # where each is defined
every_way = pytest.mark.usefixtures("way")


def raw_dt(kind, shape):
    """What softplus turns into random_dt's steps."""
    dt = random_dt(kind, shape).double()
    return (dt + torch.log(-torch.expm1(-dt))).float()


@every_way
@pytest.mark.parametrize("through", ["both", "y, no state given", "last state"])
@pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
@pytest.mark.parametrize(
    "threads, batch, T, E, N",
    [(1, 2, 1, 24, 16), (2, 1, 37, 40, 8), (3, 3, 131, 70, 16), (1, 1, 16, 5, 32)],
)
def test_mamba1_scan(threads, batch, T, E, N, kind, through):
    torch.set_num_threads(threads)
    A = torch.empty(E, N).uniform_(-16, -0.01)
    A[0] = -16.0
    inputs = [torch.randn(batch, T, E), raw_dt(kind, (batch, T, E)), torch.randn(E) * 0.1, A, torch.randn(batch, T, N),
              torch.randn(batch, T, N), torch.randn(E), torch.randn(batch, T, E), torch.randn(batch, N, E)]

    def reference(x, raw, bias, A, B, C, D, z, h=None):
        h = 0 if h is None else h.transpose(1, 2)[:, :, None]
        y, h = recurrence(x[..., None], F.softplus(raw + bias), A, B[:, :, None], C[:, :, None], h)
        return (y[..., 0] + D * x) * F.silu(z), h[:, :, 0].transpose(1, 2)

    assert_same(
        mamba1_scan,
        reference,
        inputs[:8] if "no state" in through else inputs,
        {"y": 0, "l": 1}.get(through[0]),
    )


@every_way
@pytest.mark.parametrize("through", ["both", "y, no state given", "last state"])
@pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
@pytest.mark.parametrize(
    "threads, batch, T, H, G, P, N, Q",
    [
        (1, 2, 1, 4, 1, 16, 16, 64),
        (2, 1, 37, 4, 2, 32, 16, 16),
        (3, 3, 131, 6, 1, 16, 48, 32),
        (1, 1, 130, 2, 2, 64, 64, 64),
    ],
)
def test_mamba2_scan(threads, batch, T, H, G, P, N, Q, kind, through):
    torch.set_num_threads(threads)
    A = torch.empty(H).uniform_(-16, -0.01)
    A[0] = -16.0
    inputs = [
        torch.randn(batch, T, H * P + 2 * G * N),
        raw_dt(kind, (batch, T, H)),
        torch.randn(H) * 0.1,
        A,
        torch.randn(H),
        torch.randn(batch, H, P, N),
    ]

    def reference(xBC, raw, bias, A, D, h=0):
        x, B, C = xBC.split((H * P, G * N, G * N), -1)
        x = x.unflatten(-1, (H, P))
        y, h = recurrence(x, F.softplus(raw + bias), A[:, None], B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)), h)
        return y + D[:, None] * x, h

    assert_same(lambda xBC, raw, bias, A, D, h=None: mamba2_scan(xBC, raw, bias, A, D, G, P, Q, h), reference,
                inputs[:5] if "no state" in through else inputs, {"y": 0, "l": 1}.get(through[0]))


def scan(x, dt, A, B, C, *state):
    """selective_scan in the letters of `recurrence`: P = 1, G = 1."""
    y, state = selective_scan(x[..., 0], dt, A, B[:, :, 0], C[:, :, 0], *(h[:, :, 0].transpose(1, 2) for h in state))
    return y[..., None], state.transpose(1, 2)[:, :, None]


@pytest.mark.parametrize("through", ["both", "y, no state given", "last state"])  # what the loss reads
@pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
@pytest.mark.parametrize("T", [1, 37, 131])
@pytest.mark.parametrize("form", ["scan", "ssd-1", "ssd-2", "ssd-4"])
def test_recurrence(form, T, kind, through):
    rand = random.Random(
        f"{form}, {T}, {kind}, {through}"
    )  # fixed: grad A, a sum over all tokens, may cancel to less than
    torch.manual_seed(rand.randrange(1 << 30))               # its rounding in some 1 of 500 draws, in any fp32 code
    batch, N, P, H, Q = (rand.choice(sizes) for sizes in ([1, 2, 3], [1, 4, 7], [1, 2, 5], [4, 8], [16, 64]))
    groups, P, A = (1, 1, torch.empty(H, N)) if form == "scan" else (int(form[-1]), P, torch.empty(H, 1))
    A.uniform_(-16, -0.01)[0] = -16.0
    inputs = [torch.randn(batch, T, H, P), random_dt(kind, (batch, T, H)), A, torch.randn(batch, T, groups, N),
              torch.randn(batch, T, groups, N), torch.randn(batch, H, P, N)]
    run = scan if form == "scan" else lambda x, dt, A, B, C, h=None: ssd(x, dt, A[:, 0], B, C, chunk_size=Q, state=h)
    assert_same(run, recurrence, inputs[:5] if "no state" in through else inputs, {"y": 0, "l": 1}.get(through[0]))


@every_way
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("cuts", [[1], [2, 1, 1], [50], [17, 1, 2, 30]])  # lengths of the parts
def test_causal_conv1d(cuts, given, K):
    T, E = sum(cuts), 6

    def run(x, weight, bias, state=None):
        ys = [None] * len(cuts)
        for i, part in enumerate(x.split(cuts, 1)):
            ys[i], state = causal_conv1d(part, weight, bias, state)
        return torch.cat(ys, 1), state

    def reference(x, weight, bias, state=None):
        x = F.pad(x, (0, 0, K - 1, 0)) if state is None else torch.cat((state, x), 1)
        return F.silu(F.conv1d(x.transpose(1, 2), weight, bias, groups=E)).transpose(1, 2), x[:, T:]

    inputs = [torch.randn(2, T, E), torch.randn(E, 1, K), torch.randn(E), torch.randn(2, K - 1, E)]
    assert_same(run, reference, inputs if given else inputs[:3])


@every_way
@pytest.mark.parametrize("scale, mean", [(1, 0), (1, 3), (1e-3, 0), (100, -50)])
def test_rms_norm(scale, mean):
    norm, x = (
        perturb(RMSNorm(48, eps=1e-5), 0.5),
        torch.randn(48, 5, 3).transpose(0, 2) * scale + mean,
    )  # not contiguous
    assert_same(lambda x, w: [torch.func.functional_call(norm, {"weight": w}, (x,))],
                lambda x, w: [x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w], [x, norm.weight.detach()])
    assert_close(torch.no_grad()(norm)(x), norm(x), 1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@every_way
@pytest.mark.parametrize("chunk", [64, 75, 149, 1000])  # of 150 tokens; only 75 divides them
def test_linear_cross_entropy(chunk):
    x, weight, targets = torch.randn(3, 50, 24), torch.randn(V, 24), tokens(3, 50)
    targets[0, :7] = targets[2, 40:] = -1
    loss = linear_cross_entropy
    if registry.ENABLED:
        loss = functools.partial(anywhere.linear_cross_entropy, chunk=chunk)
    assert_same(
        lambda x, w: [loss(x, w, targets)],
        lambda x, w: [F.cross_entropy((x @ w.T).flatten(0, 1), targets.flatten(), ignore_index=-1)],
        [x, weight],
    )
    nothing = loss(x.requires_grad_(), weight, torch.full_like(targets, -1))
    assert nothing == 0 and torch.autograd.grad(nothing, x)[0].count_nonzero() == 0


@every_way
def test_norms():
    for groups, gated in ((1, False), (1, True), (4, True)):
        x, z, w = torch.randn(3, 5, 40), torch.randn(3, 5, 80), torch.randn(40)

        def reference(x, z, w, groups=groups, gated=gated):
            x = x * F.silu(z[..., 40:]) if gated else x
            x = x.unflatten(-1, (groups, -1))
            return [(x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * w]

        def normed(x, z, w, groups=groups, gated=gated):
            return [gated_rms_norm(x, z[..., 40:], w, 1e-3, groups) if gated else rms_norm(x, w, 1e-3)]

        assert_same(normed, reference, [x, z, w])


@every_way
@pytest.mark.parametrize("shape", [(2, 3, 32), (1, 5)])
def test_swiglu(shape):
    assert_same(
        lambda g, u: [swiglu(g, u)],
        lambda g, u: [g * torch.sigmoid(g) * u],
        [torch.randn(shape) * 5, torch.randn(shape)],
    )


@every_way
@pytest.mark.parametrize("P", [4, 24, 64])
def test_rope(P):
    tables = rope_tables(torch.arange(7), 100.0 ** (-torch.arange(0, P, 2) / P))
    angles = torch.arange(7).double()[:, None] * 100.0 ** (-torch.arange(0, P, 2).double() / P)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def reference(x):
        y = torch.complex(x[..., :P // 2], x[..., P // 2:]) * turn
        return [torch.cat((y.real, y.imag), -1)]

    assert_same(lambda x: [apply_rope(x, tables)], reference, [torch.randn(2, 7, 3, P)])


@every_way
def test_extreme_numbers():
    x = torch.tensor([0.0, -1e-30, 1e-7, 3.0, -20.0, 50.0, -88.0, 88.0, -300.0, 300.0, 1e30, -1e4, 5.0, 6.0, 7.0, 8.0])
    got = swiglu(x, torch.ones(16))
    torch.testing.assert_close(got, F.silu(x.double()).float(), rtol=2e-6, atol=1e-33)
    bad = swiglu(torch.full((16,), math.nan), torch.ones(16))
    assert bad.isnan().all()


@every_way
def test_infinite_logits_show_in_the_loss():
    x, weight = torch.full((1, 64, 16), 1e30, requires_grad=True), torch.full((20, 16), 1e30)
    loss = linear_cross_entropy(x, weight, torch.zeros(1, 64, dtype=torch.long))
    assert not loss.isfinite()


# --- every kernel against the definition that a reader reads

def sizes_of(kind):
    """Inputs of each operation: {name: (tensors, what it takes beside them)}."""
    B, T, H, G, P, N, E = 2, 53, 4, 2, 16, 16, 24
    dt = random_dt(kind, (B, T, H))
    A = -torch.rand(H) * 15 - 0.1
    steps = random_dt(kind, (B, T, E))
    A_of_channels = -torch.rand(E, N) * 15 - 0.1
    states = torch.randn(B, T, N), torch.randn(B, T, N)
    return {
        "rms_norm": ([torch.randn(B, T, 48), torch.randn(48)], (1e-5,)),
        "gated_rms_norm": (
            [torch.randn(B, T, 48), torch.randn(B, T, 48), torch.randn(48)],
            (1e-5, 3),
        ),
        "swiglu": ([torch.randn(B, T, 32), torch.randn(B, T, 32)], ()),
        "apply_rope": ([torch.randn(B, T, H, P)], (rope_tables(torch.arange(T), 1e4 ** (-torch.arange(0, P, 2) / P)),)),
        "attention": (
            [torch.randn(B, T, H, P), torch.randn(B, T, G, P), torch.randn(B, T, G, P)],
            (20,),
        ),
        "causal_conv1d": (
            [torch.randn(B, T, E), torch.randn(E, 1, 4), torch.randn(E), torch.randn(B, 3, E)],
            (),
        ),
        "selective_scan": (
            [torch.randn(B, T, E), steps, A_of_channels, *states, torch.randn(B, N, E)],
            (),
        ),
        "mamba1_scan": (
            [
                torch.randn(B, T, E),
                raw_dt(kind, (B, T, E)),
                torch.randn(E),
                A_of_channels,
                *states,
                torch.randn(E),
                torch.randn(B, T, E),
                torch.randn(B, N, E),
            ],
            (),
        ),
        "ssd": (
            [torch.randn(B, T, H, P), dt, A, torch.randn(B, T, G, N), torch.randn(B, T, G, N)],
            (16,),
        ),
        "mamba2_scan": (
            [
                torch.randn(B, T, H * P + 2 * G * N),
                raw_dt(kind, (B, T, H)),
                torch.randn(H),
                A,
                torch.randn(H),
            ],
            (G, P, 16),
        ),
        "linear_cross_entropy": ([torch.randn(B, T, 24), torch.randn(V, 24)], (tokens(B, T),)),
    }


@pytest.mark.parametrize("way", ["compiled", "anywhere"], indirect=True)
@pytest.mark.parametrize("kind", ["usual", "extreme"])
@pytest.mark.parametrize("name", [*sizes_of("usual")])
def test_kernels_compute_what_the_model_file_says(name, kind, way, monkeypatch):
    """The definition itself is the oracle, in float64: there `float()`, by which it leaves bf16,
    must not round."""
    tensors, options = sizes_of(kind)[name]
    definition = registry.DEFINITIONS[name]

    def several(outputs):
        return outputs if isinstance(outputs, tuple) else [outputs]

    def exact(*inputs):
        with monkeypatch.context() as context:
            context.setattr(registry, "ENABLED", False)
            context.setattr(torch.Tensor, "float", lambda self: self)
            return several(definition(*inputs, *options))

    assert_same(lambda *inputs: several(getattr(MODULES[name], name)(*inputs, *options)), exact, tensors)


# --- what a library must not do

@every_way
def test_a_state_in_any_layout():
    B, T, E, N = 3, 12, 32, 16
    args = (
        torch.randn(B, T, E),
        torch.randn(B, T, E),
        torch.randn(E),
        -torch.rand(E, N),
        torch.randn(B, T, N),
        torch.randn(B, T, N),
        torch.randn(E),
        torch.randn(B, T, E),
    )
    h = torch.randn(N, B, E).transpose(0, 1)
    for got, want in zip(mamba1_scan(*args, h), mamba1_scan(*args, h.contiguous())):
        assert_close(got, want, 0)
    x = args[0].requires_grad_()
    w = torch.randn(B, E, N)
    grads = []
    for change in (lambda u: u, torch.clone):
        last = mamba1_scan(*args, h)[1]
        grads.append(torch.autograd.grad((change(last.transpose(1, 2)) * w).sum(), x)[0])
    assert_close(grads[0], grads[1], 1e-6)


@every_way
def test_an_eps_that_is_a_whole_number():
    assert rms_norm(torch.ones(2, 32), torch.ones(32), 3).unique().item() == pytest.approx(0.5)


@every_way
def test_parameters_in_other_precisions():
    x = torch.randn(2, 5, 32)
    for dtype in (torch.bfloat16, torch.float64):
        got = rms_norm(x.to(dtype), torch.ones(32, dtype=dtype), 1e-5)
        assert_close(got.float(), F.rms_norm(x, (32,), eps=1e-5), 0.05 if dtype == torch.bfloat16 else 1e-6)


# --- bf16

@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("name", ["rms_norm", "gated_rms_norm", "swiglu", "apply_rope"])
def test_bf16_is_rounded_once(name, way, monkeypatch):
    """Results and gradients are those of fp32 to half a unit of bf16's last place, 2^-8 of a number."""
    torch.manual_seed(0)
    tensors, options = sizes_of("usual")[name]
    tensors = [x.bfloat16() if x.ndim > 1 else x for x in tensors]
    if "norm" in name:
        options = (*options, torch.bfloat16)
    operation = getattr(MODULES[name], name)
    inputs = [x.clone().requires_grad_() for x in tensors]
    y = operation(*inputs, *options)
    assert y.dtype == torch.bfloat16
    weights = torch.randn(y.shape).bfloat16()
    grads = torch.autograd.grad(y, inputs, weights)

    exact = [x.float().requires_grad_() for x in tensors]
    options = options[:-1] if "norm" in name else options
    want = operation(*exact, *options)
    want_grads = torch.autograd.grad(want, exact, weights.float())
    for got, right in zip((y, *grads), (want, *want_grads)):
        error = (got.float() - right).abs()
        assert (error <= 2 ** -7.99 * right.abs() + 1e-6 * right.abs().max()).all()


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_a_norm_of_the_stream_is_rounded_for_the_product_that_reads_it(way):
    x = torch.randn(5, 48, requires_grad=True)
    for in_stream, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        norm = perturb(RMSNorm(48, in_stream=in_stream), 0.5)
        want = norm(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(x)
        assert y.dtype == dtype and torch.equal(y, want.to(dtype))
        grad = torch.randn(y.shape).to(dtype)
        got, = torch.autograd.grad(y, x, grad)
        assert_close(got, torch.autograd.grad(want, x, grad.float())[0], 1e-6)


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("size", [5, 64, 75])
def test_the_gradient_of_bf16_logits_is_rounded_once(size, way):
    logits = (torch.randn(9, size) * 3).bfloat16()
    targets = torch.randint(size, (9,))
    targets[3] = -1
    exact = logits.float()
    want = anywhere.cross_entropy_(exact, targets)
    losses = anywhere.cross_entropy_(logits, targets)
    assert losses.dtype == torch.float32 and torch.equal(losses, want)
    assert torch.equal(logits, exact.bfloat16())


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.parametrize("T, H, G, P, window", [(70, 4, 2, 32, 0), (131, 2, 2, 64, 40), (53, 2, 1, 48, 0)])
def test_attention_in_bf16_is_as_near_as_its_definition(T, H, G, P, window, way):
    """To float64: weights and their gradients are rounded for the products, sums are not."""
    tensors = [torch.randn(2, T, heads, P).bfloat16() for heads in (H, G, G)]
    weights = torch.randn(2, T, H * P).bfloat16()
    results = []
    for dtype, operation in ((torch.float64, model_gpt.attention.definition),
                             (torch.bfloat16, model_gpt.attention.definition),
                             (torch.bfloat16, model_gpt.attention)):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        y = operation(*inputs, window)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y, inputs, weights.to(dtype))))
    for exact, defined, got in zip(*results):
        assert got.isfinite().all()
        assert (got - exact).norm() <= (defined - exact).norm()
