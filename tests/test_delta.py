"""The gated delta rule: its recurrence against transformers' own and in float64, each way it is computed."""
import pytest
import torch
from helpers.models import assert_close, assert_same, perturb, random_dt, tokens

import model_hybrid
from mambino.cache import kept_as
from mambino.kernels import cpu_delta, native, portable
from mambino.sample import decode
from mambino.train.muon import row_kinds
from model_hybrid import Hybrid, HybridConfig, delta_scan

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")
every_way = pytest.mark.usefixtures("way")
SIZES = dict(n_layer=4, n_embd=32, n_head=2, vocab_size=97, layers="ddda", state_size=16, ssm_head_dim=16,
             chunk_size=16)


def one_by_one(qkv, log_decay, beta, G, P, S=None):
    """What the state S (B, H, P, N) answers to each key is moved towards its value, in the precision of qkv."""
    H = beta.shape[-1]
    N = (qkv.shape[-1] - H * P) // (2 * G)
    q, k, v = qkv.split((G * N, G * N, H * P), -1)
    q, k = (u.unflatten(-1, (G, N)) for u in (q, k))
    q, k = ((u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(H // G, 2) for u in (q, k))
    v, S = v.unflatten(-1, (H, P)), v.new_zeros(len(v), H, P, N) if S is None else S
    ys = []
    for t in range(v.shape[1]):
        kept = log_decay[:, t].exp()[..., None, None] * S
        change = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhpn,bhn->bhp", kept, k[:, t]))
        S = kept + torch.einsum("bhp,bhn->bhpn", change, k[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", S, q[:, t]) / N ** 0.5)
    return torch.stack(ys, 1), S


def case(kind, batch, T, H, G, P, N):
    """Inputs of delta_scan: log decays of usual, tiny and huge steps, strengths up to 2."""
    return [torch.randn(batch, T, 2 * G * N + H * P), -random_dt(kind, (batch, T, H)) * 8,
            torch.rand(batch, T, H) * 2, torch.randn(batch, H, P, N)]


@every_way
@pytest.mark.parametrize("through", ["both", "y, no state given", "last state"])
@pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
@pytest.mark.parametrize("threads, batch, T, H, G, P, N, Q", [
    (1, 2, 1, 4, 4, 16, 16, 64), (2, 1, 37, 4, 2, 32, 16, 16), (3, 3, 70, 6, 1, 16, 48, 32),
    (1, 1, 67, 2, 2, 64, 64, 64),
])
def test_delta_scan(threads, batch, T, H, G, P, N, Q, kind, through):
    torch.set_num_threads(threads)
    inputs = case(kind, batch, T, H, G, P, N)
    assert_same(lambda qkv, log_decay, beta, S=None: delta_scan(qkv, log_decay, beta, G, P, Q, S),
                lambda qkv, log_decay, beta, S=None: one_by_one(qkv, log_decay, beta, G, P, S),
                inputs[:3] if "no state" in through else inputs, {"y": 0, "l": 1}.get(through[0]))


@every_way
def test_as_transformers_has_it():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    batch, T, H, P, N = 2, 70, 3, 32, 16
    qkv, log_decay, beta, S = case("usual", batch, T, H, H, P, N)
    q, k, v = (u.unflatten(-1, (H, -1)) for u in qkv.split((H * N, H * N, H * P), -1))
    want, last = modeling.torch_chunk_gated_delta_rule(
        q, k, v, log_decay, beta, initial_state=S.mT, output_final_state=True, use_qk_l2norm_in_kernel=True)
    got, state = delta_scan(qkv, log_decay, beta, H, P, 64, S)
    assert_close(got, want, 1e-5)
    assert_close(state, last.mT, 1e-5)


def test_rounded_products_cost_chunks_no_more_than_tokens():
    """Of keys that are alike a chunk's system multiplies what is rounded in it."""
    H, G, P, N, T = 2, 2, 32, 32, 128
    qkv = torch.randn(1, 1, 2 * G * N + H * P) + 0.1 * torch.randn(1, T, 2 * G * N + H * P)
    qkv[..., 2 * G * N:] = torch.randn(1, T, H * P)
    inputs = qkv, torch.full((1, T, H), -0.001), torch.full((1, T, H), 2.0), G, P
    want = delta_scan.definition(*inputs)
    with torch.autocast("cpu", torch.bfloat16), portable():
        chunks, tokens = delta_scan(*inputs), delta_scan.definition(*inputs)
    for got, other, exact in zip(chunks, tokens, want):
        assert (got - exact).norm() < 2 * (other - exact).norm()


@every_way
@pytest.mark.parametrize("cuts", [(1, 36), (16, 21), (33, 3, 1)])
def test_cut_anywhere(cuts):
    qkv, log_decay, beta, S = case("usual", 2, 37, 4, 2, 16, 16)
    want, last = delta_scan(qkv, log_decay, beta, 2, 16, 16, S)
    ys = []
    for part in zip(*(u.split(cuts, 1) for u in (qkv, log_decay, beta))):
        y, S = delta_scan(*part, 2, 16, 16, S)
        ys.append(y)
    assert_close(torch.cat(ys, 1), want, 1e-5)
    assert_close(S, last, 1e-5)


@every_way
def test_no_token_sees_a_later_one():
    qkv, log_decay, beta, S = case("usual", 1, 40, 2, 2, 16, 16)
    before = delta_scan(qkv, log_decay, beta, 2, 16, 16, S)[0]
    qkv[:, 21:] += 1
    log_decay[:, 21:] *= 2
    assert torch.equal(delta_scan(qkv, log_decay, beta, 2, 16, 16, S)[0][:, :21], before[:, :21])


def test_it_forgets_what_it_overwrites():
    """With a strength of 1 a key's last value alone is left, which no sum of all values is."""
    key = torch.randn(16)
    values = torch.randn(8, 16)
    qkv = torch.cat((key.repeat(8, 2), values), 1)[None]
    y, _ = delta_scan(qkv, torch.zeros(1, 8, 1), torch.ones(1, 8, 1), 1, 16)
    assert_close(y[0, :, 0] * 16 ** 0.5, values, 1e-4)


def test_a_model_of_it_steps_as_it_computes():
    net = perturb(Hybrid(HybridConfig(**SIZES)), 0.05).eval()
    idx = tokens(2, 50)
    want = net(idx)[0]
    state, got = None, []
    for part in idx.split((20, 1, 1, 28), 1):
        logits, state = net.step(part, state)
        got.append(logits)
    assert_close(torch.cat(got, 1), want, 2e-5)
    assert {name.partition(".")[0] for name in state} == {"pos", "conv", "ssm", "k", "v"}


@pytest.mark.skipif(not native.library(), reason="there is no compiler")
def test_sizes_that_fit_no_vector_are_computed_all_the_same():
    inputs = case("usual", 1, 20, 2, 2, 8, 8)[:3]
    assert cpu_delta.delta_scan(*inputs, 2, 8) is NotImplemented
    assert_same(lambda *u: delta_scan(*u, 2, 8), lambda *u: one_by_one(*u, 2, 8), inputs)


@pytest.mark.parametrize("settings, says", [
    (dict(key_heads=3), "key_heads=3"), (dict(delta_max=2.5), "delta_max=2.5"), (dict(layers="xd"), "layers='xd'")])
def test_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        HybridConfig(**SIZES | settings)


def test_muon_knows_the_kinds_of_its_rows():
    net = Hybrid(HybridConfig(**SIZES, key_heads=2))
    assert row_kinds(net)[net.model.layers[0].mamba.in_proj.weight] == [64, 32, 32, 64, 4, 4]


def test_operation_is_known_to_kernels():
    assert model_hybrid.delta_scan.definition.__name__ == "delta_scan"


@pytest.mark.skipif(not native.library(), reason="there is no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, changes", [(1, {}), (3, dict(key_heads=2, delta_max=2.0)), (2, dict(ssm_head_dim=32))])
def test_the_plan_of_a_token(rows, changes, dtype):
    net = perturb(Hybrid(HybridConfig(**SIZES | changes)), 0.05).eval()
    idx = tokens(rows, 9)
    state = kept_as(decode.step(net, idx)[1], dtype)
    theirs = {name: value.clone() for name, value in state.items()}
    for t in tokens(4, rows, 1):
        want, theirs = net.step(t, theirs)
        got, state = decode.step(net, t, state)
        assert_close(got, want, 1e-4 if dtype == torch.float32 else 2e-2)
    assert decode.recipes[net].plans and state["ssm.0"].dtype == dtype


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["dt_bias", "A_log"])
def test_a_nan_of_a_weight_stays_one(name):
    """Of any bits: neither a step nor a rounded state takes it for a number."""
    net = perturb(Hybrid(HybridConfig(**SIZES)), 0.05).eval()
    _, state = net.step(tokens(2, 5))
    state = kept_as(state, torch.bfloat16)
    weight = getattr(net.model.layers[0].mamba, name).data
    weight[:] = torch.tensor([0x7fffffff], dtype=torch.int32).view(torch.float32)
    assert decode.ready(net, tokens(2, 1), state, 0) is not None
    logits, after = decode.step(net, tokens(2, 1), state)
    assert after["ssm.0"].isnan().all() and not logits.isfinite().any()
