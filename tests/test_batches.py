"""batches.py: which tokens make a step, and which an evaluation."""
import numpy as np
import pytest
import torch

from batches import IGNORE, Dataset, shuffled


@pytest.fixture
def dataset(tmp_path):
    """make(train, val): a dataset whose tokens are their own positions, so that a batch tells where it was read."""
    def make(train=1000, val=100):
        paths = {}
        for split, n in (('train', train), ('val', val)):
            paths[split] = str(tmp_path / f'{split}.bin')
            np.arange(n, dtype='<i4').tofile(paths[split])
        return Dataset('positions', paths, 'int32', dict(train=train, val=val), max(train, val))
    return make


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100, 255, 256, 257, 1000, 4097, 65537])
def test_shuffled_is_a_permutation_that_the_key_names(n):
    orders = [shuffled(np.arange(n), n, key) for key in ((1, 0), (1, 1), (2, 0), (1, 0))]
    for order in orders:
        assert order.dtype == np.int64 and (np.sort(order) == np.arange(n)).all()
    assert (orders[0] == orders[3]).all()
    if n >= 31:
        assert not any((a == b).all() for a, b in [orders[:2], orders[1:3], (orders[0], orders[2]), (orders[0], np.arange(n))])
    one = [int(shuffled(np.array([i]), n, (1, 0))[0]) for i in range(min(n, 50))]
    assert one == orders[0][:50].tolist()  # each number alone goes where it goes among the others


def test_shuffled_is_shuffled():
    """Neighbours are torn apart and positions are not related, as in a random permutation."""
    for n in (1000, 4096, 5000):
        order = shuffled(np.arange(n), n, (7, n))
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.1
        assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.15)
        assert len(np.unique(np.diff(order))) > n / 4


@pytest.mark.parametrize('tokens, block_size', [(1000, 16), (1000, 7), (33, 16), (17, 16), (18, 16), (48, 16), (100, 99), (500, 1)])
def test_an_epoch_visits_every_window_once(dataset, tokens, block_size):
    data = dataset(tokens)
    n = data.windows(block_size)
    assert n >= 1 and tokens - n * block_size <= 2 * block_size + 1  # at most two windows are left out
    orders, shifts = set(), set()
    for epoch in range(6):
        x, _ = data.batch(np.arange(epoch * n, (epoch + 1) * n), block_size, 1337)
        starts = x[:, 0].sort().values
        assert (starts.diff() == block_size).all() and 0 <= starts[0] < max(1, block_size)
        assert (x == x[:, :1] + torch.arange(block_size)).all()
        orders.add(tuple((x[:, 0] - starts[0]).tolist()))
        shifts.add(int(starts[0]))
    if n > 10:
        assert len(orders) == 6
    if block_size > 5 and n > 10:
        assert len(shifts) > 1  # the cuts are elsewhere each epoch


def test_targets_are_the_next_tokens(dataset):
    data = dataset(777)
    x, y = data.batch(np.arange(300), 13, 5)  # several epochs in one batch
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (300, 13)
    assert x.is_contiguous() and y.is_contiguous()
    assert (y == x + 1).all()
    x, y = dataset(17).batch(np.arange(3), 16, 5)  # one window, all there is
    assert (x == torch.arange(16)).all() and (y == torch.arange(1, 17)).all()


def test_a_batch_depends_on_seed_and_numbers_alone(dataset):
    data, numbers = dataset(), np.arange(40, 88)
    x, y = data.batch(numbers, 16, 1337)
    again = dataset().batch(numbers, 16, 1337)
    np.random.seed(3), torch.manual_seed(3)  # neither is asked
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    once_more = data.batch(numbers, 16, 1337)
    assert (np.random.get_state()[1] == state[0]).all() and torch.equal(torch.get_rng_state(), state[1])
    for other in (again, once_more):
        assert torch.equal(x, other[0]) and torch.equal(y, other[1])
    assert not torch.equal(x, data.batch(numbers, 16, 1338)[0])
    assert not torch.equal(x, data.batch(numbers + 48, 16, 1337)[0])
    assert (numbers == np.arange(40, 88)).all()


@pytest.mark.parametrize('world, micro_steps', [(1, 3), (2, 1), (3, 2), (6, 1)])
def test_ranks_and_micro_batches_share_the_same_step(dataset, world, micro_steps):
    data, sequences, step = dataset(), 12, 7
    whole = data.batch(np.arange(step * sequences, (step + 1) * sequences), 16, 1)[0]
    share = sequences // world // micro_steps
    parts = [data.batch(step * sequences + (rank * micro_steps + micro) * share + np.arange(share), 16, 1)[0]
             for rank in range(world) for micro in range(micro_steps)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize('world', [1, 3])
@pytest.mark.parametrize('batch_size', [1, 3, 8, 100])
@pytest.mark.parametrize('tokens, block_size', [(100, 16), (97, 16), (98, 16), (96, 16), (17, 16), (5, 16), (50, 1), (1000, 33)])
def test_evaluation_covers_every_token_but_the_first(dataset, tokens, block_size, batch_size, world):
    data, targets = dataset(val=tokens), []
    for rank in range(world):
        for x, y in data.val_batches(batch_size, block_size, 0, rank, world):
            assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape
            assert 1 <= len(x) <= batch_size and x.shape[1] == block_size
            counts = y != IGNORE
            assert (y[counts] == x[counts] + 1).all() and (x >= 0).all()
            assert (counts[:, :-1] >= counts[:, 1:]).all()  # what does not count comes last, so no target sees it
            targets += y[counts].tolist()
    assert sorted(targets) == list(range(1, tokens))
    if world == 1:
        assert targets == sorted(targets)


def test_a_shorter_evaluation_is_the_beginning_of_the_whole(dataset):
    data = dataset(val=500)
    whole = list(data.val_batches(4, 16))
    for n in (1, 3, 99):
        part = list(data.val_batches(4, 16, n))
        assert len(part) == min(n, len(whole))
        assert all(torch.equal(a, b) for p, w in zip(part, whole) for a, b in zip(p, w))
    shared = [batch for rank in range(3) for batch in data.val_batches(4, 16, 5, rank, 3)]
    assert sorted(int(x[0, 0]) for x, _ in shared) == [int(x[0, 0]) for x, _ in whole[:5]]
