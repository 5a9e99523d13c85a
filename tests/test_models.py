"""The models' promises: the same logits as transformers, as a plain recurrence, and as themselves cut into steps.

    python -m pytest tests/test_models.py

All on a CPU with models of a few thousand parameters. Weights are perturbed wherever values are compared, since at
initialisation norms, biases, D and gates are ones and zeros and would hide a mistake in their use.
"""
import io
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F

from model_gpt import GPT, GPTConfig, RMSNorm, linear_cross_entropy
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig, conv_silu, selective_scan, ssd

V, WINDOW = 97, 20
GPT_SIZE = dict(n_layer=2, n_embd=32, n_head=4)
SSM_SIZE = dict(n_layer=2, n_embd=32, state_size=8, chunk_size=16)
HYBRID_SIZE = dict(**GPT_SIZE, state_size=8, ssm_head_dim=16, chunk_size=16, window=WINDOW)
MODELS = {
    "gpt": (GPT, GPTConfig, GPT_SIZE),
    "gpt-gqa-window": (GPT, GPTConfig, dict(**GPT_SIZE, n_kv_head=2, window=WINDOW)),
    "gpt-qknorm-untied": (GPT, GPTConfig, dict(**GPT_SIZE, n_kv_head=1, head_dim=16, qk_norm=True, tie_embeddings=False)),
    "mamba1": (Mamba, MambaConfig, dict(**SSM_SIZE, version=1)),
    "mamba2": (Mamba, MambaConfig, dict(**SSM_SIZE, head_dim=16)),
    "mamba2-groups-untied": (Mamba, MambaConfig, dict(**SSM_SIZE, head_dim=8, n_groups=2, tie_embeddings=False)),
    "hybrid": (Hybrid, HybridConfig, HYBRID_SIZE),
    "hybrid-parallel": (Hybrid, HybridConfig, dict(HYBRID_SIZE, layout="parallel", n_kv_head=2, qk_norm=True, n_groups=2)),
    "hybrid-plain-full": (Hybrid, HybridConfig, dict(HYBRID_SIZE, gate=False, branch_norm=False, window=0)),
    "hybrid-low-rank": (Hybrid, HybridConfig, dict(HYBRID_SIZE, low_rank=8, tie_embeddings=False)),
}
CONSTANT_STATE = ["gpt-gqa-window", "mamba1", "mamba2", "mamba2-groups-untied", "hybrid", "hybrid-parallel"]
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only lose by more
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(name, **changes):
    cls, config, settings = MODELS[name]
    return cls(config(**dict(dict(settings, vocab_size=V), **changes))).eval()


@torch.no_grad()
def perturb(model, std=0.1):
    for p in model.parameters():
        p.add_(torch.randn_like(p) * std)
    return model


def tokens(*shape, vocab_size=V):
    return torch.randint(vocab_size, shape)


def assert_close(got, want, tolerance=1e-4):
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    assert error <= tolerance, f"differs by {error:.2g}"                        # also fails on NaN


def assert_same(run, reference, inputs, through=None):
    """run in fp32 and reference in float64: outputs, and gradients of all inputs, differ by 1e-5 of their largest value.

    through: indices of the outputs that the gradients come from; None: all."""
    results = []
    for function, dtype in ((run, torch.float32), (reference, torch.float64)):
        leaves = [u.to(dtype).requires_grad_() for u in inputs]
        outputs = function(*leaves)
        torch.manual_seed(1)
        weights = [torch.randn(u.shape).to(dtype) for u in outputs]
        pick = [range(len(outputs)), through][through is not None]
        results.append([*outputs, *torch.autograd.grad([outputs[i] for i in pick], leaves, [weights[i] for i in pick],
                                                       allow_unused=True, materialize_grads=True)])
    for i, (got, want) in enumerate(zip(*results)):
        name = f"output {i}" if i < len(outputs) else f"gradient of input {i - len(outputs)}"
        assert got.dtype == torch.float32 and torch.isfinite(got).all(), f"{name} is not finite fp32"
        floor = 1e-30  # a reference all below it, e.g. the gradient through exp(-800), has no digits in fp32
        error = ((got - want).abs().max() / want.abs().max().clamp(min=floor)).item()
        assert error <= 1e-5, f"{name} is off by {error:.2g} of its largest value"


# --- transformers -----------------------------------------------------------------------------------------------------

# an eps and a theta far from the defaults: mixing them up must show
LLAMA = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, rms_norm_eps=1e-3,
             tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0))
OURS = dict(n_embd=64, n_head=4, n_kv_head=2, intermediate_size=96, norm_eps=1e-3, rope_theta=500.0)
MAMBA = dict(hidden_size=72, state_size=16, layer_norm_epsilon=1e-3, tie_word_embeddings=True)
MAMBA2 = dict(MAMBA, head_dim=12, num_heads=12, chunk_size=16)
PEERS = {
    "llama": ("Llama", LLAMA, GPT, GPTConfig, OURS),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=16, tie_word_embeddings=False),
              GPT, GPTConfig, dict(OURS, qk_norm=True, tie_embeddings=False)),
    "qwen3-wide-heads": ("Qwen3", dict(LLAMA, head_dim=24), GPT, GPTConfig, dict(OURS, qk_norm=True, head_dim=24)),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=WINDOW, attn_implementation="eager"),
                GPT, GPTConfig, dict(OURS, window=WINDOW)),
    "mamba1": ("Mamba", MAMBA, Mamba, MambaConfig, dict(n_embd=72, version=1, norm_eps=1e-3)),
    "mamba1-conv3-untied": ("Mamba", dict(MAMBA, conv_kernel=3, expand=3, tie_word_embeddings=False), Mamba, MambaConfig,
                            dict(n_embd=72, version=1, norm_eps=1e-3, conv_kernel=3, expand=3, tie_embeddings=False)),
    "mamba2": ("Mamba2", dict(MAMBA2, n_groups=1), Mamba, MambaConfig,
               dict(n_embd=72, head_dim=12, state_size=16, chunk_size=16, norm_eps=1e-3)),
    "mamba2-groups-untied": ("Mamba2", dict(MAMBA2, n_groups=2, tie_word_embeddings=False), Mamba, MambaConfig,
                             dict(n_embd=72, head_dim=12, state_size=16, n_groups=2, chunk_size=32, norm_eps=1e-3,
                                  tie_embeddings=False)),
}


@pytest.mark.parametrize("peer", PEERS)
def test_logits_are_those_of_transformers(peer):
    transformers = pytest.importorskip("transformers")
    theirs, their_settings, cls, config, settings = PEERS[peer]
    their_config = getattr(transformers, theirs + "Config")(vocab_size=V, num_hidden_layers=2, **their_settings)
    theirs = getattr(transformers, theirs + "ForCausalLM")(their_config).float().eval()
    ours = cls(config(vocab_size=V, n_layer=2, **settings)).eval()
    for giver, taker in ((theirs, ours), (ours, theirs)):
        taker.load_state_dict(perturb(giver).state_dict(), strict=True)
        for T in (1, 83):
            idx = tokens(2, T)
            with torch.no_grad():
                want = theirs(idx).logits
            assert want.std() > 0.3                                             # else closeness would mean little
            assert_close(ours(idx)[0], want)                                    # with gradients: the path of training


# --- parts against plain float64 --------------------------------------------------------------------------------------

def recurrence(x, dt, A, B, C, h=0):
    """x (B, T, H, P), dt (B, T, H), A (H, 1 or N), B, C (B, T, G, N), h (B, H, P, N), one step after another."""
    ys = []
    B, C = (u.repeat_interleave(x.shape[2] // u.shape[2], 2) for u in (B, C))   # (B, T, H, N)
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)[:, :, None]                    # (B, H, 1, 1 or N)
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, 1), h


def scan(x, dt, A, B, C, *state):
    """selective_scan in the letters of `recurrence`: P = 1, G = 1."""
    y, state = selective_scan(x[..., 0], dt, A, B[:, :, 0], C[:, :, 0], *(h[:, :, 0].transpose(1, 2) for h in state))
    return y[..., None], state.transpose(1, 2)[:, :, None]


def random_dt(kind, shape):
    if kind == "usual":
        return torch.empty(shape).uniform_(1e-3, 0.1)
    if kind == "extreme":
        return torch.exp(torch.empty(shape).uniform_(math.log(1e-7), math.log(500))).clamp(1e-6, 50)  # often the ends
    dt = torch.full(shape, 1e-6)                                                # 'cliff': great steps among tiny ones, but
    dt[:, 5::40] = 50.0                                                         # not the last: nothing but zeros would be left
    return dt


@pytest.mark.parametrize("through", ["both", "y, no state given", "last state"])  # what the loss reads
@pytest.mark.parametrize("kind", ["usual", "extreme", "cliff"])
@pytest.mark.parametrize("T", [1, 2, 16, 37, 131])
@pytest.mark.parametrize("form", ["scan", "ssd-1", "ssd-2", "ssd-4"])
def test_recurrence(form, T, kind, through):
    rand = random.Random(f"{form}, {T}, {kind}, {through}")  # fixed: grad A, a sum over all tokens, may cancel to less than
    torch.manual_seed(rand.randrange(1 << 30))               # its rounding in some 1 of 500 draws, in any fp32 code
    batch, N, P, H, Q = (rand.choice(sizes) for sizes in ([1, 2, 3], [1, 4, 7], [1, 2, 5], [4, 8], [16, 64]))
    groups, P, A = (1, 1, torch.empty(H, N)) if form == "scan" else (int(form[-1]), P, torch.empty(H, 1))
    A.uniform_(-16, -0.01)[0] = -16.0
    inputs = [torch.randn(batch, T, H, P), random_dt(kind, (batch, T, H)), A, torch.randn(batch, T, groups, N),
              torch.randn(batch, T, groups, N), torch.randn(batch, H, P, N)]
    if through.startswith("y"):
        inputs.pop()
    run = scan if form == "scan" else lambda x, dt, A, B, C, h=None: ssd(x, dt, A[:, 0], B, C, chunk_size=Q, state=h)
    assert_same(run, recurrence, inputs, {"b": (0, 1), "y": (0,), "l": (1,)}[through[0]])


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("cuts", [[1], [2, 1, 1], [50], [17, 1, 2, 30]])
def test_conv_silu(cuts, given, K):
    T, E = sum(cuts), 6

    def run(x, weight, bias, state=None):
        ys = []
        for part in x.split(cuts, 1):
            y, state = conv_silu(part, weight, bias, state)
            ys.append(y)
        return torch.cat(ys, 1), state

    def reference(x, weight, bias, state=None):
        x = F.pad(x, (0, 0, K - 1, 0)) if state is None else torch.cat((state, x), 1)
        return F.silu(F.conv1d(x.transpose(1, 2), weight, bias, groups=E)).transpose(1, 2), x[:, T:]

    inputs = [torch.randn(2, T, E), torch.randn(E, 1, K), torch.randn(E), torch.randn(2, K - 1, E)]
    assert_same(run, reference, inputs if given else inputs[:3])


@pytest.mark.parametrize("scale, mean", [(1, 0), (1, 3), (1e-3, 0), (100, -50)])
def test_rms_norm(scale, mean):
    norm, x = perturb(RMSNorm(48, eps=1e-5), 0.5), torch.randn(48, 5, 3).transpose(0, 2) * scale + mean  # not contiguous
    assert_same(lambda x, w: [torch.func.functional_call(norm, {"weight": w}, (x,))],
                lambda x, w: [x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w], [x, norm.weight.detach()])
    training = norm(x)
    with torch.no_grad():
        assert_close(norm(x), training, 1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("chunk", [64, 75, 149, 1000])                          # of 150 tokens; only 75 divides them
def test_linear_cross_entropy(chunk):
    x, weight, targets = torch.randn(3, 50, 24), torch.randn(V, 24), tokens(3, 50)
    targets[0, :7] = targets[2, 40:] = -1
    assert_same(lambda x, w: [linear_cross_entropy(x, w, targets, chunk_elements=chunk * V)],
                lambda x, w: [F.cross_entropy((x @ w.T).flatten(0, 1), targets.flatten(), ignore_index=-1)], [x, weight])
    nothing = linear_cross_entropy(x.requires_grad_(), weight, torch.full_like(targets, -1), chunk_elements=chunk * V)
    assert nothing == 0 and torch.autograd.grad(nothing, x)[0].count_nonzero() == 0


# --- step and its state -----------------------------------------------------------------------------------------------

T = 150  # longer than two windows, than nine chunks, and than the 128 slots of a cache grown twice


def run_steps(model, idx, cuts, state=None):
    out = []
    for part in idx.split(cuts, 1):
        logits, state = model.step(part, state)
        out.append(logits)
    return torch.cat(out, 1), state


def irregular(seed):
    rand = random.Random(seed)
    ends = sorted({rand.randrange(1, T) for _ in range(8)} | {T // 2, T // 2 + 1, T})  # one step of a single token at least
    return [b - a for a, b in zip([0, *ends], ends)]


CUTS = {"1": 1, "7": 7, "64": 64, "whole": T, **{f"irregular{i}": irregular(i) for i in range(4)}}


@pytest.mark.parametrize("cuts", CUTS)
@every_model
def test_step_equals_forward(name, cuts):
    model, idx = perturb(build(name)), tokens(2, T)
    got, state = run_steps(model, idx, CUTS[cuts])
    assert_close(got, model(idx)[0])
    assert state["pos"].tolist() == [T, T]
    assert all(isinstance(u, torch.Tensor) and len(u) == 2 for u in state.values())


def join(states):
    """One batch of several: caches that grow get as many slots as the largest has."""
    def grown(key):
        slots = max(s[key].shape[2] for s in states)
        return [F.pad(s[key], (0, 0, 0, slots - s[key].shape[2])) for s in states]
    return {key: torch.cat(grown(key) if key[:2] in ("k.", "v.") else [s[key] for s in states]) for key in states[0]}


@every_model
def test_rows_of_different_positions_go_on_together(name):
    """Joined, reordered, repeated, saved and loaded; each row goes on as if it were alone."""
    model, prompts, more = perturb(build(name)), [3, 37, 70], 62
    texts, endings = tokens(3, max(prompts)), tokens(6, more)                   # so the two copies of a row part
    state = join([model.step(text[None, :n])[1] for text, n in zip(texts, prompts)])
    state = {key: u[[2, 0, 1]].repeat_interleave(2, 0) for key, u in state.items()}
    for cuts in (1, [30, 1, 1, 25, 5]):
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        got, _ = run_steps(model, endings, cuts, torch.load(file, weights_only=True))
        again, after = run_steps(model, endings, cuts, {key: u.clone() for key, u in state.items()})
        assert torch.equal(got, again)
        for i, row in enumerate([2, 2, 0, 0, 1, 1]):
            n = prompts[row]
            assert_close(got[i], model(torch.cat((texts[row, :n], endings[i]))[None])[0][0, n:])
            assert after["pos"][i] == n + more


@pytest.mark.parametrize("name", CONSTANT_STATE)
def test_state_never_grows(name):
    model = build(name)

    def size(cuts):
        """Bytes that the state holds, also those its views keep alive: torch.save writes them all."""
        state = run_steps(model, tokens(1, sum(cuts)), cuts)[1]
        return sum(u.untyped_storage().nbytes() for u in state.values())
    assert size([50]) == size([500]) == size([49, 1]) == size([490, 7, 1, 1, 1])


# --- training ---------------------------------------------------------------------------------------------------------

@every_model
def test_loss_and_bf16_autocast(name):
    model, idx, targets = perturb(build(name), 0.05), tokens(4, 75), tokens(4, 75)
    targets[:, :5] = -1
    logits, _ = model(idx)
    _, exact = model(idx, targets)
    assert_close(exact, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1), 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
        logits, _ = run_steps(model, idx, [50, 1, 24])
    loss.backward()
    assert abs(loss - exact) <= 0.03 * exact
    assert abs(F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1) - exact) <= 0.03 * exact
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("muon", [False, True])
@every_model
def test_optim_groups(name, muon):
    model = build(name)
    names, placed = {p: n for n, p in model.named_parameters()}, []
    for group in model.optim_groups(0.1, muon=muon):
        for p in group["params"]:
            n = names[p]
            plain = re.search(r"norm|bias$|A_log$|\.D$|scale$", n)
            assert group["weight_decay"] == (0 if plain else 0.1), n
            hidden = p.ndim == 2 and "layers." in n and not plain
            allowed = {"muon"} if muon and hidden and "_proj" in n else {"muon", "adamw"} if muon and hidden else {"adamw"}
            assert group["kind"] in allowed, n
            placed.append(n)
    assert sorted(placed) == sorted(names.values())                             # each once


@pytest.mark.parametrize("name, mixer, n_residual", [("mamba1", "mixer", 2), ("mamba2", "mixer", 2), ("hybrid", "mamba", 0)])
@torch.no_grad()
def test_initialisation_is_the_reference_one(name, mixer, n_residual):
    wide = dict(n_embd=512, **({"ssm_head_dim": 4} if name == "hybrid" else {"head_dim": 4}))  # many heads: statistics
    model = build(name, **wide)
    for block in (model.backbone if mixer == "mixer" else model.model).layers:
        m = getattr(block, mixer)
        dt = F.softplus(m.dt_proj.bias if name == "mamba1" else m.dt_bias)
        assert 0.99e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.101
        assert 0.006 < dt.median() < 0.017                                      # log-uniform: the geometric mean, 0.01
        A = m.A_log.exp()
        if name == "mamba1":
            assert_close(A, torch.arange(1.0, 9).expand_as(A), 1e-5)
            assert m.dt_proj.weight.abs().max() == pytest.approx(32 ** -0.5, rel=0.02)  # R = 512 / 16
        else:
            assert 1 <= A.min() < 2 and 15 < A.max() <= 16.001 and 7 < A.mean() < 10
        assert (m.D == 1).all()
        assert m.conv1d.weight.abs().max() == pytest.approx(0.5, rel=0.02)
        if n_residual:
            assert m.out_proj.weight.abs().max() == pytest.approx((1024 * n_residual) ** -0.5, rel=0.02)


@every_model
def test_initial_loss_is_that_of_guessing(name):
    model = build(name, vocab_size=1000, n_embd=128)
    assert model.embedding().weight.std().item() == pytest.approx(0.02, rel=0.05)
    _, loss = model(tokens(4, 64, vocab_size=1000), tokens(4, 64, vocab_size=1000))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


@pytest.mark.parametrize("config, settings, says", [
    (GPTConfig, dict(n_embd=65, n_head=4), "n_embd=65.*n_head=4"),
    (GPTConfig, dict(n_head=6, n_kv_head=4), "n_head=6.*n_kv_head=4"),
    (GPTConfig, dict(n_head=4, n_kv_head=-1), "n_kv_head=-1"),
    (GPTConfig, dict(n_head=0), "n_head=0"),
    (GPTConfig, dict(head_dim=15), "head_dim=15.*even"),
    (GPTConfig, dict(window=-1), "window=-1"),
    (MambaConfig, dict(version=3), "version=3"),
    (MambaConfig, dict(n_embd=100, head_dim=64), "200.*head_dim.*64"),
    (MambaConfig, dict(n_embd=96, head_dim=64, n_groups=2), "n_groups.* 2"),
    (MambaConfig, dict(n_groups=0), "n_groups"),
    (MambaConfig, dict(chunk_size=0), "chunk_size"),
    (HybridConfig, dict(layout="serial"), "layout='serial'.*parallel"),
    (HybridConfig, dict(low_rank=-1), "low_rank=-1"),
    (HybridConfig, dict(n_embd=65, n_head=4), "n_embd=65.*n_head=4"),
    (HybridConfig, dict(ssm_head_dim=7), "ssm_head_dim"),
])
def test_config_errors_name_the_setting(config, settings, says):
    with pytest.raises(ValueError, match=says):
        config(**settings)


@every_model
def test_overfits_one_batch(name):
    model, idx = build(name).train(), tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(idx[:, :-1], idx[:, 1:])[1] < 0.5
