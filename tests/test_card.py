"""The pretended card itself: what it finds, counts and refuses. See helpers/card.py."""
import os

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import card_device
from helpers.card import ROOT, pretended
from helpers.card_process import missing, on_card


def test_the_torch_that_is_asked_for_takes_the_card():
    """Or all tests on it would be skipped, and nobody the wiser."""
    if device_reason := card_device.missing():
        pytest.skip(f'no pretended card: the CUDA paths are NOT tested ({device_reason})')
    with open(os.path.join(ROOT, 'requirements.txt'), encoding='utf-8') as f:
        is_pinned = f'torch=={torch.__version__.partition("+")[0]}' in f.read()
    assert missing() == '' or not is_pinned, missing()


@on_card
def test_tensors_are_on_the_card():
    with pretended(gigabytes=8, capability=(8, 6), name='NVIDIA Some') as card:
        x = torch.ones(3, device='cuda', requires_grad=True)
        y = (x * 2).sum()
        y.backward()
        assert x.is_cuda and x.grad.is_cuda and str(y.device) == 'cuda:0' and card.waits == {}
        assert torch.cuda.get_device_capability() == (8, 6) and torch.cuda.get_device_name() == 'NVIDIA Some'
        free, total = torch.cuda.mem_get_info()
        assert total == 8 * 2**30 and free < total
        with torch.autocast('cuda', dtype=torch.bfloat16):
            assert nn.Linear(8, 8).to('cuda')(torch.ones(1, 8, device='cuda')).dtype == torch.bfloat16
        card.reset()
        assert float(y.detach()) == 6
        assert len(card.waits) == 1 and next(iter(card.waits)).startswith('item() at tests/test_card.py:'), card.waits
    assert not torch.cuda.is_available()


@on_card
def test_a_module_moves_as_it_does_to_a_card():
    net = nn.ModuleDict(dict(a=nn.Embedding(4, 8), b=nn.Linear(8, 4, bias=False)))
    net.b.weight = net.a.weight
    before = net.a.weight
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    with pretended():
        net.to('cuda')
        assert net.a.weight is before and net.b.weight is before and before.is_cuda
        assert optimizer.param_groups[0]['params'][0] is before
        net.b(net.a(torch.tensor([1], device='cuda'))).sum().backward()
        optimizer.step()
        assert optimizer.state[before]['exp_avg'].is_cuda
        net.to('cpu')
        assert net.a.weight is before and not before.is_cuda


WAITS = {
    'item': lambda x: x.sum().item(),
    'bool': lambda x: bool((x > 0).all()),
    'if': lambda x: 1 if x[0] > 0 else 0,
    'tolist': lambda x: x.tolist(),
    'nonzero': lambda x: x.nonzero(),
    'masked_select': lambda x: x.masked_select(x > 0),
    'a boolean index': lambda x: x[x > 0],
    'a boolean index that is written to': lambda x: x.__setitem__(x > 0, x[:1]),
    'an index of the CPU': lambda x: x[torch.tensor([0, 1])],
    'repeat_interleave': lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long).to('cuda', non_blocking=True)),
    'unique': lambda x: x.unique(),
    'cpu()': lambda x: x.cpu(),
    'a blocking copy to the card': lambda x: torch.ones(3).to('cuda'),
    'a tensor made of a list': lambda x: torch.tensor([1, 2], device='cuda'),
    'a blocking copy into a tensor': lambda x: x.copy_(torch.ones(3)),
    'copy into pageable memory': lambda x: torch.empty(3).copy_(x, non_blocking=True),
    'synchronize': lambda x: torch.cuda.synchronize(),
    'equal': lambda x: torch.equal(x, x),
}
NO_WAITS = {
    'a copy from pinned memory': lambda x: torch.ones(3).pin_memory().to('cuda', non_blocking=True),
    'a number': lambda x: x * 2 + 1,
    'fill': lambda x: x.fill_(3.0),
    'an index of the card': lambda x: x[torch.arange(2, device='cuda')],
    'a slice': lambda x: x[1:],
    'where': lambda x: torch.where(x > 0, x, 0),
    'empty': lambda x: torch.empty(3, device='cuda'),
    'numbers of the CPU in a sum': lambda x: x + torch.tensor(2.0),
    'copy that is not waited for': lambda x: x.to('cpu', non_blocking=True),
}


@on_card
def test_waits():
    with pretended() as card:
        for name, work in WAITS.items():
            x = torch.arange(3.0).to('cuda')
            card.reset()
            work(x)
            assert len(card.waits) == 1 and 'test_card.py:' in next(iter(card.waits)), (name, card.waits)
        for name, work in NO_WAITS.items():
            x = torch.arange(3.0).to('cuda')
            card.reset()
            work(x)
            assert not card.waits, (name, card.waits)


REFUSED = {
    'two devices': (RuntimeError, 'same device', lambda x: x + torch.ones(4, 4)),
    'the other way round': (RuntimeError, 'same device', lambda x: torch.ones(4, 4) @ x),
    'into a tensor of the CPU': (RuntimeError, 'same device', lambda x: torch.ones(4, 4).add_(x)),
    'numpy': (TypeError, 'numpy', lambda x: x.numpy()),
    'asarray': (TypeError, 'numpy', lambda x: np.asarray(x)),
    'integers in a product': (NotImplementedError, 'not implemented', lambda x: x.long() @ x.long()),
    'a histogram': (NotImplementedError, 'CUDA', lambda x: torch.histogram(x, 3)),
    'mkldnn': (NotImplementedError, 'CUDA', lambda x: x.to_mkldnn()),
    "a CPU's quantized product": (NotImplementedError, 'CUDA', lambda x: torch.ops.onednn.qlinear_prepack(
        x.to(torch.int8), None)),
    'fp32 by bf16': (RuntimeError, 'dtype', lambda x: x @ x.bfloat16()),
    'attention of two dtypes': (RuntimeError, 'dtype', lambda x: nn.functional.scaled_dot_product_attention(
        x[None, None].bfloat16(), x[None, None], x[None, None])),
    'grouped products of fp32': (RuntimeError, 'bfloat16', lambda x: torch._grouped_mm(
        x, x[None], offs=torch.tensor([4], dtype=torch.int32, device='cuda'))),
    'a second card': (RuntimeError, 'ordinal', lambda x: torch.ones(1, device='cuda:1')),
    "a CPU's generator": (RuntimeError, 'generator', lambda x: torch.rand(
        2, device='cuda', generator=torch.Generator())),
}


@on_card
def test_what_a_card_refuses():
    with pretended():
        for name, (kind, words, work) in REFUSED.items():
            with pytest.raises(kind, match=words):
                work(torch.ones(4, 4).to('cuda'))
                print(name)


@on_card
def test_a_copy_that_nobody_waited_for_has_not_come():
    with pretended():
        x = torch.arange(3.0).to('cuda')
        y = x.to('cpu', non_blocking=True)
        assert y.is_pinned() and y.isnan().all()
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        assert y.tolist() == [0, 1, 2]


@on_card
def test_memory_is_counted_in_blocks_while_it_is_alive():
    with pretended(gigabytes=1) as card:
        x = torch.ones(1000, device='cuda')
        y = x[:10]
        assert card.alive_bytes == 4096 == torch.cuda.memory_allocated()
        z = x + 1
        del z, x
        assert (card.alive_bytes, card.peak_bytes) == (4096, 8192)
        del y
        assert card.alive_bytes == 0
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 0
        with pytest.raises(torch.cuda.OutOfMemoryError, match='CUDA out of memory'):
            torch.empty(2**28, device='cuda')
        assert card.alive_bytes == 0
    with pretended(gigabytes=24, inner='meta') as card:
        x = torch.empty(2**30, device='cuda', requires_grad=True)
        (x * 2).sum().backward()
        assert card.peak_bytes > 2**33


@on_card
def test_faults_are_raised_where_they_are_planted():
    with pretended() as card:
        x = torch.ones(3, device='cuda')
        card.plant_out_of_memory('mul', nth=2)
        x * 2 + 1
        with pytest.raises(torch.cuda.OutOfMemoryError):
            x * 2
        x * 2
        card.plant_loss(nth=2)
        x + 1
        for _ in range(2):
            with pytest.raises(torch.AcceleratorError, match='unspecified launch failure'):
                x.sum().item()


@on_card
def test_a_compiler_that_is_not_there():
    with pretended(compiles=False):
        with pytest.raises(RuntimeError, match='triton'):
            torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(1, device='cuda'))
    with pretended():
        assert torch.compile(lambda x: x + 1)(torch.ones(1, device='cuda')).is_cuda


@on_card
def test_a_graph_is_captured_and_replayed_in_its_own_memory():
    with pretended() as card:
        x, total = torch.ones(3, device='cuda'), torch.zeros(3, device='cuda')
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x * 2)[:2] + 1
            total += x
        assert y.isnan().all() and total.tolist() == [0, 0, 0]     # nothing has happened yet
        card.reset()
        for value in (3.0, 5.0):
            x.fill_(value)
            graph.replay()
            assert y.tolist() == [2 * value + 1] * 2
        assert total.tolist() == [8, 8, 8] and card.kernels['graph'] == 2 and card.launches == 4


@on_card
@pytest.mark.parametrize('work', ['item', 'a boolean index', 'a blocking copy to the card', 'tolist', 'synchronize'])
def test_what_waits_cannot_be_captured(work):
    with pretended():
        x = torch.ones(3, device='cuda')
        with pytest.raises(RuntimeError, match='capturing'):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                WAITS[work](x)
        x.tolist()                                                 # it is over


@on_card
def test_a_graph_of_memory_that_was_freed():
    with pretended():
        x = torch.ones(3, device='cuda')
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match='non-default stream'):
            graph.capture_begin()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            y = x[1:] + 1
            graph.capture_end()
        graph.replay()
        assert y.tolist() == [2, 2]
        kept = x[:1]                                               # of the same memory
        del x
        graph.replay()
        del kept
        with pytest.raises(RuntimeError, match='freed'):
            graph.replay()
