"""decode.py's attention to caches of any length, by key heads and blocks of keys, on any number of threads; and the
nucleus that is sorted without the rest."""
import copy

import pytest
import torch
from helpers.models import perturb

from mambino.kernels import native
from mambino.sample import decode, next_token
from mambino.weights import checkpoint

pytestmark = pytest.mark.skipif(native.library() is None, reason='no C++ compiler')


def with_caches(net, pos, slots):
    """A state of rows at positions pos, whose caches hold anything."""
    generator = torch.Generator().manual_seed(1)
    state = {'pos': torch.tensor(pos)}
    for i in range(net.config.n_layer):
        for name in 'kv':
            shape = len(pos), net.config.n_kv_head, slots, net.config.head_dim
            state[f'{name}.{i}'] = torch.randn(shape, generator=generator) * 3
    return state


@pytest.mark.parametrize('heads, key_heads, head_dim', [(2, 2, 16), (6, 2, 48), (4, 1, 80)])
@pytest.mark.parametrize('pos, slots, window', [
    ([0, 1, 15], 16, 0), ([16, 40, 254, 255], 300, 0), ([256, 3, 511, 600], 601, 0), ([4999], 5000, 0),
    ([7, 39, 5000], 37, 37), ([100, 700, 10_000], 333, 333)])
def test_caches_of_any_length_and_any_number_of_threads(heads, key_heads, head_dim, pos, slots, window):
    """Beside the model in float64; the same bits with one thread and with two."""
    torch.manual_seed(0)
    fields = dict(n_layer=1, n_embd=32, vocab_size=50, block_size=slots, n_head=heads, n_kv_head=key_heads)
    net = perturb(checkpoint.build('gpt', dict(fields, head_dim=head_dim, window=window))).eval()
    state, ids = with_caches(net, pos, slots), torch.randint(50, (len(pos), 1))
    assert decode.ready(net, ids, state, 0)
    exact = {name: value.double() if name != 'pos' else value for name, value in state.items()}
    threads, got = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        got.append(decode.step(net, ids, {name: value.clone() for name, value in state.items()}))
    torch.set_num_threads(threads)
    assert torch.equal(got[0][0], got[1][0])
    assert all(torch.equal(got[0][1][name], got[1][1][name]) for name in state)
    want, after = copy.deepcopy(net).double().step(ids, exact)
    assert (got[0][0] - want).abs().max() < 1e-5
    assert all((got[0][1][name] - after[name]).abs().max() < 1e-5 for name in state)


@pytest.mark.parametrize('V', [3, 1000, 20_011])
@pytest.mark.parametrize('top_p', [1e-9, 0.3, 0.95, 0.9999])
def test_a_nucleus_is_sorted_as_all_are(V, top_p):
    """Equal weights stand in the order of their ids, as in torch's stable sort."""
    torch.manual_seed(V)
    weights = (torch.randn(7, V) * torch.logspace(-2, 1, 7)[:, None]).mul(8).round().div(8).exp()
    enough = top_p * weights.sum(-1, keepdim=True)
    values, index = next_token.nucleus_candidates(weights, enough)
    want, places = weights.sort(descending=True, stable=True)
    for row in range(7):
        needed = int((want[row].cumsum(0) - want[row] < enough[row]).sum())
        assert torch.equal(values[row, :needed], want[row, :needed])
        assert torch.equal(index[row, :needed], places[row, :needed])
    assert V < 1000 or next_token.nucleus_candidates(weights[6:], enough[6:])[0].shape[1] < V / 2


def test_a_row_without_numbers_has_a_nucleus_too():
    weights = torch.rand(3, 5000)
    weights[1] = torch.nan
    values, index = next_token.nucleus_candidates(weights, 0.5 * weights.sum(-1, keepdim=True))
    assert values.shape == index.shape and index.max() < 5000
