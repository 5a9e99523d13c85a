"""A training step of each model is one graph to torch.compile, with no break, and gives the numbers it gives
without."""
import types

import pytest
import torch
from helpers.models import V, tokens
from torch._dynamo.backends.debugging import aot_eager

from mambino import kernels
from mambino.kernels import anywhere, cpu, cuda, registry
from model_gpt import GPT, GPTConfig
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig, ssd

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")
SIZES = dict(vocab_size=V, n_layer=1, n_embd=32, block_size=64)
ATTENTION = dict(SIZES, n_head=4)
HYBRID = dict(ATTENTION, window=16, ssm_head_dim=16, state_size=16)
MODELS = {
    "gpt, groups, checkpointing": (GPT, GPTConfig(**ATTENTION, n_kv_head=2, qk_norm=True)),
    "gpt, window": (GPT, GPTConfig(**ATTENTION, window=16)),
    "gpt, dropout": (GPT, GPTConfig(**ATTENTION, dropout=0.1)),
    "gpt, experts": (GPT, GPTConfig(**ATTENTION, n_expert=4)),
    "gpt, experts without a limit": (GPT, GPTConfig(**ATTENTION, n_expert=4, capacity_factor=0)),
    "mamba-1": (Mamba, MambaConfig(**SIZES, version=1)),
    "mamba-1, checkpointing": (Mamba, MambaConfig(**SIZES, version=1)),
    "mamba-2, checkpointing": (Mamba, MambaConfig(**SIZES, head_dim=16, state_size=16)),
    "mamba-2, groups": (Mamba, MambaConfig(**SIZES, head_dim=16, state_size=16, n_groups=2)),
    "hybrid, checkpointing": (Hybrid, HybridConfig(**HYBRID)),
    "hybrid, parallel": (Hybrid, HybridConfig(**HYBRID, layout="parallel")),
    "hybrid, no gate, thin matrices": (Hybrid, HybridConfig(**HYBRID, gate=False, low_rank=8)),
}


def trained(net, idx, function):
    """The loss and all gradients of a step, in bf16 where a layer is computed twice."""
    net.zero_grad()
    torch.manual_seed(1)
    loss = function(idx, idx)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_graph(name):
    torch._dynamo.reset()
    model, config = MODELS[name]
    net = model(config).train()
    net.gradient_checkpointing = "checkpointing" in name

    def step(idx, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=net.gradient_checkpointing):
            return net(idx, targets)[1]

    idx = tokens(2, 48)
    with kernels.portable():
        expected = trained(net, idx, step)
    computed = trained(net, idx, torch.compile(step, backend="aot_eager", fullgraph=True))
    if config.dropout:          # other random numbers
        assert abs(computed[0] - expected[0]) < 0.01
        return
    limit = 0.1 if net.gradient_checkpointing else 1e-4
    for got, want in zip(computed, expected):
        assert (got - want).abs().max() <= limit * want.abs().max()


def test_a_mamba1_is_compiled_by_one_operation():
    """Its steps are not unrolled: a compiler would take hours."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    net = Mamba(MambaConfig(**SIZES, version=1))
    torch.compile(net, backend=backend, fullgraph=True)(tokens(1, 200), tokens(1, 200))
    names, = graphs
    assert sum("mambino" in name for name in names) == 1 and len(names) < 120


def gradients(net, idx, function):
    net.zero_grad()
    loss = function(idx, idx)[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.fixture
def cpu_as_card(monkeypatch):
    """What only a card computes is computed here, within torch.compile, which does not ask for Triton then."""
    from torch.nn.attention import flex_attention
    monkeypatch.setattr(cuda, "KIND", "cpu")
    monkeypatch.setattr(cuda, "masks", types.SimpleNamespace())
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)     # refuses a backward pass on a CPU
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gpt", "hybrid, checkpointing"])
def test_a_window_is_compiled_with_flex_attention(monkeypatch, cpu_as_card, name):
    """One graph, which reads the window's mask and does not make it, and is not compiled again; q, k, v and gate,
    up are one product each."""
    is_hybrid = "hybrid" in name
    if is_hybrid:
        net = Hybrid(HybridConfig(**HYBRID, n_kv_head=2))
    else:
        net = GPT(GPTConfig(**ATTENTION | dict(n_layer=2), window=16))
    net.gradient_checkpointing = is_hybrid
    n_layer = len(net.model.layers)
    idx = tokens(2, 48)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for module in graph.modules() if hasattr(module, "graph")
                       for node in module.graph.nodes])
        return aot_eager(graph, inputs)

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    computed = gradients(net, idx, compiled)
    assert len(graphs) == 1 and graphs[0].count("flex_attention") == n_layer
    assert vars(cuda.masks).keys() == {"cpu_0_48_16"} and not any("vmap" in name for name in graphs[0])
    products = sum("linear" in name for name in graphs[0])
    gradients(net, tokens(2, 48), compiled)
    assert len(graphs) == 1
    assert products == n_layer * 4 if not is_hybrid else products < 10      # qkv, o; gate and up, down
    monkeypatch.setattr(cuda, "KIND", "cuda")
    with kernels.portable():
        expected = gradients(net, idx, net)
    for got, want in zip(computed, expected):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("vocabulary", [1000, 16384, 50304, 200000])
def test_chunks_of_the_loss(monkeypatch, vocabulary):
    """A CPU's are as they were; a card's are as large as its memory allows, and an estimate knows it."""
    assert anywhere.loss_chunk(vocabulary) == max(256, min(1024, (1 << 26) // vocabulary), (1 << 22) // vocabulary)
    for gigabytes, logits in ((8, 2**27), (24, 3 * 2**27), (80, 2**30)):    # bytes, in fp32
        monkeypatch.setattr(anywhere, "card_memory", lambda size=gigabytes: size << 30)
        chunk = anywhere.loss_chunk(vocabulary, "cuda")
        assert chunk == 256 or 0.7 * logits <= 4 * chunk * vocabulary <= logits
    x = torch.zeros(1)
    assert cpu.device_kind(x) == "cpu"
    with kernels.portable("cuda"):
        assert cpu.device_kind(x) == "cuda"
        with kernels.portable():
            assert cpu.device_kind(x) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_as_a_card_compiles_it(dtype):
    """Without a scatter: elementwise, so that it is part of one pass."""
    net = anywhere.linear_cross_entropy
    x, weight, targets = torch.randn(2, 30, 16), torch.randn(V, 16), tokens(2, 30)
    targets[0, :7] = -1
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for module in graph.modules() if hasattr(module, "graph")
                       for node in module.graph.nodes])
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    results = []
    for function in (net, torch.compile(net, backend=backend, fullgraph=True)):
        leaves = [u.clone().requires_grad_() for u in (x, weight)]
        with kernels.portable("cuda"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = function(*leaves, targets, chunk=32)
        results.append([loss.detach(), *torch.autograd.grad(loss * 3, leaves)])
    assert not any("scatter" in name or "gather" in name for name in graphs[0])
    for want, got in zip(*results):
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert (got - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("size", [0.1, 1, 16])
def test_sums_of_dt_A_on_a_card(size):
    """In fp32 where the products are bf16, they are as good as in fp64, down to thousands in a chunk."""
    B, T, H, P, N = 2, 256, 4, 16, 16
    x = torch.randn(B, T, H, P).bfloat16()
    dt = torch.rand(B, T, H) ** 4 * size
    A = -torch.rand(H) * 15 - 1
    matrices = torch.randn(2, B, T, 1, N).bfloat16().unbind()

    def run(function, *inputs):
        leaves = [u.clone().requires_grad_() for u in inputs]
        y, last = function(*leaves)
        torch.manual_seed(1)
        loss = (y.double() * torch.randn(y.shape)).sum() + (last.double() * torch.randn(last.shape)).sum()
        return [u.detach().double() for u in (y, last, *torch.autograd.grad(loss, leaves))]

    with registry.substituted():
        exact = run(ssd, *(u.double() for u in (x, dt, A, *matrices)))
    errors = []
    for kind in (None, "cuda"):
        with kernels.portable(kind), torch.autocast("cpu", torch.bfloat16):
            results = run(anywhere.ssd, x, dt, A, *matrices)
            errors.append([(got - want).abs().max() / want.abs().max() for got, want in zip(results, exact)])
    for in_fp64, in_fp32 in zip(*errors):
        assert in_fp32 <= 1.1 * in_fp64 + 1e-4
