"""pages.py: what a token reads whole lies in large pages, with the numbers and the memory that it had."""
import re
from unittest import mock

import pytest
import torch

from mambino.kernels import native, pages
from mambino.sample import decode
from mambino.weights import checkpoint


def memory():
    """Bytes of this process that are in memory, and those of them in large pages."""
    with open('/proc/self/smaps_rollup', encoding='ascii') as f:
        text = f.read()
    return [int(re.search(rf'^{field}:\s*(\d+)', text, re.M)[1]) << 10 for field in ('Rss', 'AnonHugePages')]


def can_gather():
    """Whether this kernel gathers pages when it is told to."""
    return bool(pages.large_page()) and pages.gather([torch.zeros(4 * pages.large_page())]) > 0


@pytest.mark.skipif(not can_gather(), reason='Linux before 6.1, or no large pages')
def test_tensors_are_gathered_in_large_pages_where_they_are():
    size = pages.large_page()
    tensors = [torch.full((size // 8,), float(i)) for i in range(32)]       # of half a large page
    addresses = [tensor.data_ptr() for tensor in tensors]
    taken, large = memory()
    count = pages.gather([*tensors, tensors[0]])                            # which counts once
    taken_now, large_now = memory()
    assert 8 <= count <= 18
    assert large_now >= max(large, (count - 2) * size)                      # some may have been large before
    assert taken_now - taken <= 2 * size
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))


def test_without_large_pages_nothing_is_asked_for():
    with mock.patch.object(pages, 'large_page', lambda: 0), mock.patch.object(pages, 'madvise') as asked:
        assert pages.gather([torch.zeros(3 << 20)]) == 0
        assert not asked.called


@pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
def test_a_tokens_weights_and_large_states_are_gathered():
    fields = dict(n_layer=1, n_embd=32, vocab_size=50, block_size=64, state_size=16, head_dim=16)
    net = checkpoint.build('mamba', fields).eval()
    with mock.patch.object(pages, 'gather') as gather, mock.patch.object(decode, 'LARGE', 4 * 2 * 4 * 16 * 16):
        for B in (1, 2):                                                    # (B, H, P, N) of one row are less
            _, state = decode.step(net, torch.zeros(B, 1, dtype=torch.long), None)
            decode.step(net, torch.zeros(B, 1, dtype=torch.long), state)
    weights, one, two = [call.args[0] for call in gather.call_args_list]
    assert {tensor.data_ptr() for tensor in weights} == {p.data_ptr() for p in net.parameters()}
    assert one == []
    assert [tensor.data_ptr() for tensor in two] == [state['ssm.0'].data_ptr()]
