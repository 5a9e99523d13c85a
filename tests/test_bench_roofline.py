"""The roofline of a card: its bytes and FLOPs against those counted by hand."""
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mambino.bench.gpu import models
from mambino.bench.gpu.roofline import account, cards, eager, fusion, graphs, standins, table
from mambino.bench.gpu.roofline.cards import Op
from mambino.weights import checkpoint

n = 64 * 1024           # numbers of a tensor here
x, y = torch.randn(2, 64, 1024).unbind()
half = torch.bfloat16


def fused(function, *inputs, merged=False):
    from torch._inductor.decomposition import select_decomp_table
    graph = make_fx(function, decomposition_table=select_decomp_table(),
                    tracing_mode='fake')(*inputs)
    return fusion.Fused(graph, 'forward', merged).ops


def all_bytes(ops):
    return sum(op.bytes for op in ops)


def test_a_chain_is_one_kernel():
    ops = fused(lambda a, b: torch.relu(a * 2 + b).to(half), x, y)
    assert len(ops) == 1 and all_bytes(ops) == n * (4 + 4 + 2)


def test_a_norm_is_one_kernel():
    def norm(a, w):
        return a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-5) * w
    ops = fused(norm, x, torch.randn(1024))
    assert all_bytes([op for op in ops if op.bytes > 64 * 4 * 3]) == pytest.approx(n * 8 + 1024 * 4, rel=0.01)


def test_a_softmax_reads_and_writes_once():
    ops = fused(lambda a: a.softmax(-1), x)
    assert all_bytes(ops) == pytest.approx(2 * n * 4, rel=0.02)


def test_sums_over_other_dimensions_are_two_kernels():
    ops = fused(lambda a: ((a * 2).sum(0), (a * 2).sum(1)), x)
    assert len(ops) == 2 and all_bytes(ops) == 2 * n * 4 + (64 + 1024) * 4


def test_what_is_read_in_another_order_is_another_kernel():
    def work(turn):
        def compute(a, b):
            c = torch.relu(a)
            return c, b + (c.t() if turn else c)
        return compute
    square = torch.randn(2, 256, 256).unbind()
    assert len(fused(work(False), *square)) == 1 and len(fused(work(True), *square)) == 2


def test_an_operand_of_a_product_is_stored_and_a_view_is_not():
    def work(a, w):
        b = torch.relu(a).to(half)
        return b @ w, b.t()
    w = torch.randn(1024, 32).to(half)
    ops = fused(work, x, w)
    product = next(op for op in ops if op.flops)
    assert product.bytes == n * 2 + 1024 * 32 * 2 + 64 * 32 * 2 and product.flops == 2 * 64 * 1024 * 32
    assert all_bytes(ops) == product.bytes + n * 4 + n * 2 and len(ops) == 2


def test_products_of_the_same_matrix_merge():
    def work(a, w, v):
        b = torch.relu(a)
        return b @ w, b @ v
    w, v = torch.randn(2, 1024, 32).unbind()
    apart, merged = fused(work, x, w, v), fused(work, x, w, v, merged=True)
    assert all_bytes(apart) - all_bytes(merged) == n * 4 and len(apart) - len(merged) == 1
    assert sum(op.flops for op in apart) == sum(op.flops for op in merged)


def test_products_that_are_added_up_merge():
    def work(a, b, w, v):
        return torch.relu(a @ w + b @ v)
    inputs = torch.randn(64, 128), torch.randn(64, 128), torch.randn(128, 32), torch.randn(128, 32)
    apart, merged = fused(work, *inputs), fused(work, *inputs, merged=True)
    assert all_bytes(apart) - all_bytes(merged) == 2 * 64 * 32 * 4      # one result less is written, and read


def test_kernels_that_wait_for_each_other_do_not_join():
    """relu(a) goes into a product whose result is added to it: one kernel could not be before and
    after."""
    def work(a, w):
        b = torch.relu(a)
        return b + b @ w
    ops = fused(work, x, torch.randn(1024, 1024))
    assert len(ops) == 3


def test_eager_counts_what_pytorch_launches():
    """A layer of nothing but one product: the weight's cast and gradient, counted by hand."""
    with eager.FakeTensorMode(), eager.Counter() as counter:
        a, w = torch.randn(64, 1024, dtype=half), torch.randn(32, 1024)
        counter.phase = 'forward'
        torch.nn.functional.linear(a, w.to(half))
        torch.zeros(8)
        a.view(-1)
    assert [(op.name, op.bytes, op.flops) for op in counter.ops] == [
        ('_to_copy', 32 * 1024 * 6, 0), ('mm', 2 * (64 * 1024 + 32 * 1024 + 64 * 32),
                                         2 * 64 * 1024 * 32),
        ('zeros', 32, 0)]


@pytest.mark.parametrize('name', ['gpt', 'mamba-2'])
def test_flops_are_those_of_mfu(name):
    """Eager and compiled multiply as much as flops_per_token says; attention and scans are counted
    otherwise."""
    kind, config = models.SMALL_MODELS[name]
    config = models.SMALL | config
    net = checkpoint.build(kind, config)
    matrices = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    functions = (standins.mamba2_scan,) if kind == 'mamba' else ()
    ways = [eager.count(kind, config, 2, 64, functions=functions)]
    forward, backward = graphs.capture(kind, config, 2, 64, functions=functions)
    ways.append(fusion.Fused(forward, 'forward').ops + fusion.Fused(backward, 'backward').ops)
    for ops in ways:
        assert sum(op.flops for op in ops if op.numbers == 'half') == 6 * matrices * 2 * 64
        assert sum(op.flops for op in ops) == pytest.approx(net.flops_per_token(64) * 2 * 64,
                                                            rel=0.1)
    assert all_bytes(ways[1]) < 0.7 * all_bytes(ways[0])
    for ops in ways:            # each weight is rounded once in a micro-step, its 4 bytes to 2
        casts = [op for op in ops if op.name == eager.CAST]
        assert all_bytes(casts) == 6 * matrices


def test_seconds_are_the_larger_of_bytes_and_flops():
    card = cards.Card('x', 8, half=100e12, full=10e12, double=1e12, bandwidth=1e12, attention=0.5, scan=0.1)
    assert cards.seconds_of(Op('forward', 'a', 8.5e9), card) == pytest.approx(0.01)
    assert cards.seconds_of(Op('forward', 'a', 0, 75e10), card) == pytest.approx(0.01)
    assert cards.seconds_of(Op('forward', 'a', 0, 75e10, 'attention'),
                            card) == pytest.approx(0.015)
    assert cards.seconds_of(Op('forward', 'a', 4), card) == cards.KERNEL


def test_steps_and_their_table(tmp_path, monkeypatch, capsys):
    """Measures one after another, then each left out; the update is shared by a step's
    micro-steps."""
    ops = {1: [Op('forward', 'a', 1e9)], 2: [Op('forward', 'a', 1e9), Op('forward', 'b', 2e9)]}
    monkeypatch.setattr(account, 'ops_of', lambda kind, n_layer, B, measures: ops[n_layer])
    step = account.step_of('gpt', cards.CARDS[2], {'compile'})
    assert step.bytes == 1e9 + 19 * 2e9 and step.launches == 20
    micro_steps = account.TOKENS // (8 * 1024)
    parameters = models.on_device('gpt', models.LARGE_MODELS['gpt'][1], 'meta').num_params()
    update = (40 + 12 * (micro_steps - 1)) * parameters / (0.85 * 3350e9)
    assert step.whole == pytest.approx(micro_steps * step.micro + update)
    table.show(str(tmp_path), ('gpt',), ('compile', 'merged'))
    rows = [line.split(' | ')[0] for line in (tmp_path / 'model.md').read_text().splitlines() if line.startswith('| ')]
    assert rows[2:] == ['| eager', '| + torch.compile', '| + products of the same matrix merged',
                        '| all without torch.compile']
