"""The two graphs of a micro-step, forward and backward, as torch.compile would hand them to
Inductor: all that Python decided is decided, autograd and autocast are written out, large
operations are decomposed into small ones, and what the backward pass keeps or computes again is
chosen by the same min-cut.

Nothing is computed: the capture ends when both graphs are there."""

from mambino import machine
from mambino.bench.gpu.roofline import standins
from mambino.kernels import portable
from mambino.weights import checkpoint


class Captured(Exception):
    """Both graphs are there."""


def capture(kind, config, B, T, loss_chunk=0, functions=()):
    """[forward, backward] as torch.fx.GraphModules whose nodes say their shapes in meta['val'].
    functions: standins for a card's kernels."""
    import torch._functorch.config
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        if len(graphs) == 2:
            raise Captured
        return lambda *args: None
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table(),
                           partition_fn=min_cut_rematerialization_partition)
    net = checkpoint.build(kind, config).train()
    idx = torch.zeros(B, T, dtype=torch.long)

    def loss(x, y):
        with machine.autocast('cpu', 'bfloat16'):
            return net(x, y)[1]
    torch._dynamo.reset()
    try:
        stand = standins.in_place(*functions, loss_chunk=loss_chunk)
        with stand, portable(), torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            torch.compile(loss, backend=backend, fullgraph=True)(idx, idx)
    except Exception:
        if len(graphs) < 2:
            raise
    return graphs
