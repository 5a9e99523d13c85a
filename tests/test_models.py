"""The models' promises: the same logits as transformers, as a plain recurrence, and as themselves
cut into steps.

All on a CPU with models of a few thousand parameters. Weights are perturbed wherever values are
compared, since at initialisation norms, biases, D and gates are ones and zeros and would hide a
mistake in their use.
"""
import io
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CONFIG, PEERS, V, assert_close, build, every_model, perturb, tokens

from model_gpt import GPTConfig
from model_hybrid import HybridConfig
from model_mamba import MambaConfig

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")

# --- transformers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("peer", PEERS)
def test_logits_and_gradients_are_those_of_transformers(peer):
    transformers = pytest.importorskip("transformers")
    kind, their_settings, cls, settings = PEERS[peer]
    theirs = getattr(transformers, kind + "Config")(vocab_size=V, num_hidden_layers=2, **their_settings)
    theirs = getattr(transformers, kind + "ForCausalLM")(theirs).float().eval()
    ours = cls(CONFIG[cls](vocab_size=V, n_layer=2, **settings)).eval()
    for giver, taker in ((theirs, ours), (ours, theirs)):
        taker.load_state_dict(perturb(giver).state_dict(), strict=True)
        for T in (1, 83):
            idx, targets = tokens(2, 2, T)
            want = theirs(idx).logits
            assert want.std() > 0.3                             # else closeness would mean little
            assert_close(ours(idx)[0], want)
        same = [(p, theirs.get_parameter(name)) for name, p in ours.named_parameters()]
        gots = torch.autograd.grad(ours(idx, targets)[1], [p for p, _ in same])
        wants = torch.autograd.grad(F.cross_entropy(want.flatten(0, 1), targets.flatten()), [p for _, p in same])
        for got, want in zip(gots, wants):
            assert_close(got, want, 1e-4 * want.abs().max().item())


# --- step and its state ---------------------------------------------------------------------------

T = 150  # longer than two windows, than nine chunks, and than the 128 slots of a cache grown twice
CUTS = {"1": range(1, T), "7": range(7, T, 7), "64": [64, 128], "whole": [],
        **{f"irregular{i}": sorted({T // 2, T // 2 + 1, *random.Random(i).sample(range(1, T), 8)}) for i in range(4)}}


def run_steps(model, idx, cuts, state=None):
    """cuts: positions in idx (B, T) where a new step begins."""
    out = []
    for part in idx.tensor_split(list(cuts), 1):
        logits, state = model.step(part, state)
        out.append(logits)
    return torch.cat(out, 1), state


@pytest.mark.parametrize("cuts", CUTS)
@every_model
def test_step_equals_forward(name, cuts):
    model, idx = perturb(build(name)), tokens(2, T)
    got, state = run_steps(model, idx, CUTS[cuts])
    assert_close(got, model(idx)[0])
    assert state["pos"].tolist() == [T, T] and all(torch.is_tensor(u) and len(u) == 2 for u in state.values())


@every_model
def test_rows_of_different_positions_go_on_together(name):
    """Joined, reordered, repeated, saved and loaded; each row goes on as if it were alone."""
    model, prompts, more = perturb(build(name)), [3, 37, 70], 62
    texts, endings = tokens(3, max(prompts)), tokens(6, more)   # so the two copies of a row part
    states = [model.step(text[None, :n])[1] for text, n in zip(texts, prompts)]
    for key in (key for key in states[0] if key[0] in "kv"):
        slots = max(s[key].shape[2] for s in states)            # the longest cache decides
        for s in states:
            s[key] = F.pad(s[key], (0, 0, 0, slots - s[key].shape[2]))
    state = {key: torch.cat([s[key] for s in states])[[2, 0, 1]].repeat_interleave(2, 0) for key in states[0]}
    for cuts in (range(1, more), [30, 31, 32, 57]):
        torch.save(state, file := io.BytesIO())
        got, _ = run_steps(model, endings, cuts, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        again, after = run_steps(model, endings, cuts, {key: u.clone() for key, u in state.items()})
        assert torch.equal(got, again)
        for i, row in enumerate([2, 2, 0, 0, 1, 1]):
            n = prompts[row]
            assert_close(got[i], model(torch.cat((texts[row, :n], endings[i]))[None])[0][0, n:])
            assert after["pos"][i] == n + more


@pytest.mark.parametrize(
    "name",
    ["gpt-gqa-window", "mamba1", "mamba2", "mamba2-groups-untied", "hybrid", "hybrid-parallel"],
)
def test_state_never_grows(name):
    model = build(name)
    sizes = set()
    for length, cuts in (50, []), (500, []), (50, [49]), (500, [490, 497, 498, 499]):
        _, state = run_steps(model, tokens(1, length), cuts)
        sizes.add(
            sum(u.untyped_storage().nbytes() for u in state.values())
        )  # also what views keep alive: so does a file
    assert len(sizes) == 1, f"bytes: {sorted(sizes)}"


# --- training -------------------------------------------------------------------------------------

@every_model
def test_loss_and_bf16_autocast(name):
    model, (idx, targets) = perturb(build(name), 0.05), tokens(2, 4, 75)
    targets[:, :5] = -1
    logits, _ = model(idx)
    exact = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    with torch.no_grad():
        assert_close(model(idx, targets)[1], exact, 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
        stepped, _ = run_steps(model, idx, [50, 51])
    assert abs(loss - exact) <= 0.03 * exact
    wants, gots = (torch.autograd.grad(u, list(model.parameters())) for u in (exact, loss))
    for want, got in zip((logits, *wants), (stepped, *gots)):
        assert (got - want).norm() <= 0.1 * want.norm()         # also fails on NaN


@pytest.mark.parametrize("muon", [False, True])
@every_model
def test_optim_groups(name, muon):
    model = build(name)
    names, placed = {p: n for n, p in model.named_parameters()}, []
    for group in model.optim_groups(0.1, muon=muon):
        for n, p in ((names[p], p) for p in group["params"]):
            plain = re.search(r"norm|bias$|A_log$|\.D$|scale$|mimo_.$", n)
            hidden = p.ndim == 2 and "layers." in n and not plain
            assert group["weight_decay"] == (0 if plain else 0.1), n
            assert group["kind"] == "adamw" or (group["kind"] == "muon" and muon and hidden), n
            assert group["kind"] == "muon" or not (muon and hidden and "_proj" in n), n
            placed.append(n)
    assert sorted(placed) == sorted(names.values())             # each once


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "hybrid"])
@torch.no_grad()
def test_initialisation_is_the_reference_one(name):
    model = build(name, n_embd=512, **{"ssm_head_dim" if name == "hybrid" else "head_dim": 4})  # many heads: statistics
    for m in (module for module in model.modules() if hasattr(module, "A_log")):
        dt, A = F.softplus(m.dt_proj.bias if name == "mamba1" else m.dt_bias), m.A_log.exp()
        assert 0.99e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.101
        assert 0.006 < dt.median() < 0.017  # log-uniform: the geometric mean, 0.01
        if name == "mamba1":
            assert_close(A, torch.arange(1.0, 9).expand_as(A), 1e-5)
            assert m.dt_proj.weight.abs().max() == pytest.approx(32 ** -0.5, rel=0.02)  # R = 512 / 16
        else:
            assert 1 <= A.min() < 2 and 15 < A.max() <= 16.001 and 7 < A.mean() < 10
        assert (m.D == 1).all() and m.conv1d.weight.abs().max() == pytest.approx(0.5, rel=0.02)
        if name != "hybrid":  # E = 1024, over two residual branches
            assert m.out_proj.weight.abs().max() == pytest.approx((1024 * 2) ** -0.5, rel=0.02)


@every_model
def test_initial_loss_is_that_of_guessing(name):
    model = build(name, vocab_size=1000, n_embd=128)
    assert model.embedding().weight.std().item() == pytest.approx(0.02, rel=0.05)
    _, loss = model(*torch.randint(1000, (2, 4, 64)))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


@pytest.mark.parametrize("config, settings, says", [
    (GPTConfig, dict(n_embd=65, n_head=4), "n_embd=65.*n_head=4"),
    (GPTConfig, dict(n_head=6, n_kv_head=4), "n_head=6.*n_kv_head=4"),
    (GPTConfig, dict(n_head=4, n_kv_head=-1), "n_kv_head=-1"),
    (GPTConfig, dict(head_dim=15), "head_dim=15.*even"),
    (GPTConfig, dict(window=-1), "window=-1"),
    (MambaConfig, dict(version=4), "version=4"),
    (MambaConfig, dict(n_embd=96, head_dim=64, n_groups=2), "n_groups.* 2"),
    (MambaConfig, dict(n_groups=0), "n_groups"),
    (MambaConfig, dict(chunk_size=0), "chunk_size"),
    (HybridConfig, dict(layout="serial"), "layout='serial'.*parallel"),
    (HybridConfig, dict(low_rank=-1), "low_rank=-1"),
    (HybridConfig, dict(ssm_head_dim=7), "ssm_head_dim"),
])
def test_config_errors_name_the_setting(config, settings, says):
    with pytest.raises(ValueError, match=says):
        config(**settings)


@every_model
def test_overfits_one_batch(name):
    model, idx, targets = (
        build(name).train(),
        tokens(4, 32) % 16,
        tokens(4, 32),
    )  # 16 different tokens: context must tell
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
