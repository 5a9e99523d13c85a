"""batches.py: which tokens make a step, and which an evaluation."""
import math
import os
import shutil

import numpy as np
import pytest
import torch

from mambino.language_model import linear_cross_entropy
from mambino.train.batches import (
    IGNORE,
    ROUND,
    Dataset,
    Mixture,
    open_dataset,
)
from mambino.train.evaluation import val_result
from mambino.train.loader import Loader
from mambino.train.order import quotas_of, shuffled


@pytest.fixture
def dataset(tmp_path):
    """make(train, val): a dataset whose tokens are their own positions, so that a batch tells where
    it was read; with `first` to count from, it also tells from which dataset."""
    def make(train=1000, val=100, name='positions', first=0):
        os.makedirs(tmp_path / name, exist_ok=True)
        paths = {}
        for split, n in (('train', train), ('val', val)):
            paths[split] = str(tmp_path / name / f'{split}.bin')
            np.arange(first, first + n, dtype='<i4').tofile(paths[split])
        return Dataset(name, paths, 'int32', dict(train=train, val=val), first + max(train, val))
    return make


@pytest.mark.parametrize(
    'n', [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100, 255, 256, 257, 1000, 4097, 65537]
)
def test_shuffled_is_a_permutation_that_the_key_names(n):
    orders = [shuffled(np.arange(n), n, key) for key in ((1, 0), (1, 1), (2, 0), (1, 0))]
    for order in orders:
        assert order.dtype == np.int64 and (np.sort(order) == np.arange(n)).all()
    assert (orders[0] == orders[3]).all()
    if n >= 31:
        assert not any(
            (a == b).all()
            for a, b in [orders[:2], orders[1:3], (orders[0], orders[2]), (orders[0], np.arange(n))]
        )
    one = [int(shuffled(np.array([i]), n, (1, 0))[0]) for i in range(min(n, 50))]
    assert one == orders[0][:50].tolist()  # each number alone goes where it goes among the others


def test_shuffled_is_shuffled():
    """Neighbours are torn apart and positions are not related, as in a random permutation."""
    for n in (1000, 4096, 5000):
        order = shuffled(np.arange(n), n, (7, n))
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.1
        assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.15)
        assert len(np.unique(np.diff(order))) > n / 4


@pytest.mark.parametrize(
    'tokens, block_size',
    [(1000, 16), (1000, 7), (33, 16), (17, 16), (18, 16), (48, 16), (100, 99), (500, 1)],
)
def test_an_epoch_visits_every_window_once(dataset, tokens, block_size):
    data = dataset(tokens)
    n = data.windows(block_size)
    # at most two windows are left out
    assert n >= 1 and tokens - n * block_size <= 2 * block_size + 1
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
    data, indices = dataset(), np.arange(40, 88)
    x, y = data.batch(indices, 16, 1337)
    again = dataset(name='again').batch(indices, 16, 1337)
    np.random.seed(3), torch.manual_seed(3)  # neither is asked
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    once_more = data.batch(indices, 16, 1337)
    assert (np.random.get_state()[1] == state[0]).all() and torch.equal(
        torch.get_rng_state(), state[1]
    )
    for other in (again, once_more):
        assert torch.equal(x, other[0]) and torch.equal(y, other[1])
    assert not torch.equal(x, data.batch(indices, 16, 1338)[0])
    assert not torch.equal(x, data.batch(indices + 48, 16, 1337)[0])
    assert (indices == np.arange(40, 88)).all()


@pytest.mark.parametrize('world, micro_steps', [(1, 3), (2, 1), (3, 2), (6, 1)])
def test_ranks_and_micro_batches_share_the_same_step(dataset, world, micro_steps):
    data, sequences, step = dataset(), 12, 7
    together = data.batch(np.arange(step * sequences, (step + 1) * sequences), 16, 1)[0]
    share = sequences // world // micro_steps
    parts = [
        data.batch(
            step * sequences + (rank * micro_steps + micro) * share + np.arange(share), 16, 1
        )[0]
        for rank in range(world)
        for micro in range(micro_steps)
    ]
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize('world', [1, 3])
@pytest.mark.parametrize('batch_size', [1, 3, 8, 100])
@pytest.mark.parametrize(
    'tokens, block_size',
    [(100, 16), (97, 16), (98, 16), (96, 16), (17, 16), (5, 16), (50, 1), (1000, 33)],
)
def test_evaluation_covers_every_token_but_the_first(
    dataset, tokens, block_size, batch_size, world
):
    data, targets = dataset(val=tokens), []
    for rank in range(world):
        for x, y in data.val_batches(batch_size, block_size, 0, rank, world):
            assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape
            assert 1 <= len(x) <= batch_size and x.shape[1] == block_size
            counts = y != IGNORE
            assert (y[counts] == x[counts] + 1).all() and (x >= 0).all()
            # what does not count comes last, so no target sees it
            assert (counts[:, :-1] >= counts[:, 1:]).all()
            targets += y[counts].tolist()
    assert sorted(targets) == list(range(1, tokens))
    if world == 1:
        assert targets == sorted(targets)


def test_a_shorter_evaluation_is_the_beginning_of_the_whole(dataset):
    data = dataset(val=500)
    everything = list(data.val_batches(4, 16))
    rows = [torch.cat(tensors) for tensors in zip(*everything)]
    for n in (1, 3, 4, 7, 99):
        for batch_size in (1, 4, 5):
            part = [torch.cat(tensors) for tensors in zip(*data.val_batches(batch_size, 16, n))]
            assert len(part[0]) == min(n, len(rows[0]))
            assert all(torch.equal(a, b[:n]) for a, b in zip(part, rows))
    shared = [batch for rank in range(3) for batch in data.val_batches(4, 16, 20, rank, 3)]
    assert sorted(int(x[0, 0]) for x, _ in shared) == [int(x[0, 0]) for x, _ in everything[:5]]


def test_a_dataset_alone_reads_what_it_always_read(dataset):
    """Runs from before there were mixtures go on with the same text."""
    starts = dataset().batch(np.arange(55, 67), 16, 1337)[0][:, 0]
    assert starts.tolist() == [829, 813, 61, 925, 909, 477, 264, 488, 392, 680, 56, 120]


# --- mixtures

@pytest.fixture
def mixture(dataset):
    """Three datasets, 55 % 30 % 15 %, of 61, 30 and 11 windows of 16 tokens."""
    return Mixture(
        [
            dataset(1000, name='a'),
            dataset(500, name='c', first=1000),
            dataset(200, name='b', first=1500),
        ],
        [11, 6, 3],
    )


def owner(x):
    """Which part of `mixture`, sorted by name, these rows were read from."""
    return (x[:, 0] >= 1500).long() + 2 * ((x[:, 0] >= 1000) & (x[:, 0] < 1500)).long()


def test_quotas_are_the_weights_to_a_ten_thousandth():
    rng = np.random.default_rng(1)
    cases = [rng.random(n) + 1e-3 for n in (1, 2, 3, 7, 50) for _ in range(20)]
    for weights in cases:
        quotas = quotas_of(list(weights))
        assert (
            sum(quotas) == ROUND
            and np.abs(np.array(quotas) - ROUND * weights / weights.sum()).max() < 1
        )
        # what the name says is what was meant
        assert quotas_of([float(f'{quota / ROUND:g}') for quota in quotas]) == quotas
    assert quotas_of([0.6, 0.4]) == (6000, 4000) and quotas_of([1, 1, 1]) == (3334, 3333, 3333)
    assert (
        quotas_of([1e-9, 1, 1e-300]) == (1, 9998, 1)
        and quotas_of([1e308, 1e308, 1e308, 1e308]) == (2500,) * 4
    )


def test_shares_are_exact_in_a_round_and_near_at_any_moment(mixture):
    weights, n = np.array([0.55, 0.15, 0.3]), 3 * ROUND
    x, _ = mixture.batch(np.arange(n), 16, 7)
    # (n, parts) after each sequence
    drawn = (owner(x)[:, None] == torch.arange(3)).numpy().cumsum(0)
    for i in range(n):
        if (i + 1) % ROUND == 0:
            assert (drawn[i] == (i + 1) * weights).all()
    deviation = np.abs(drawn - np.arange(1, n + 1)[:, None] * weights)
    assert (
        deviation
        < 4.5
        * np.sqrt(np.minimum(np.arange(1, n + 1), ROUND / 4)[:, None] * weights * (1 - weights))
        + 1
    ).all()
    # the share that is told is the share that was drawn
    for i in (1, 2, 77, ROUND - 1, ROUND, ROUND + 1, n - 5):
        assert mixture.shares(i, 7) == dict(zip('abc', drawn[i - 1] / i))
    assert mixture.shares(0, 7) == dict(a=0, b=0, c=0) and mixture.shares(100, 7) != mixture.shares(
        100, 8
    )
    assert mixture.shares(10**12, 7) == dict(zip('abc', weights))
    rounds = drawn[ROUND - 1::ROUND] - drawn[ROUND // 2 - 1::ROUND]
    assert len(set(rounds[:, 0])) > 1                          # no two rounds have one order


def test_each_dataset_of_a_mixture_is_read_as_if_alone(mixture):
    """In its own order, epoch by epoch, each window once in each; whatever comes between."""
    x, y = mixture.batch(np.arange(ROUND - 700, ROUND + 700), 16, 7)
    assert (y == x + 1).all() and x.is_contiguous() and y.is_contiguous()
    before, after = mixture.counts(ROUND - 700, 7), mixture.counts(ROUND + 700, 7)
    for i, part in enumerate(mixture.parts):
        alone = part.batch(np.arange(before[i], after[i]), 16, 7)
        assert torch.equal(x[owner(x) == i], alone[0]) and torch.equal(y[owner(x) == i], alone[1])


def test_a_mixture_depends_on_seed_and_numbers_alone(mixture):
    indices = np.arange(ROUND - 24, ROUND + 24)
    x, y = mixture.batch(indices, 16, 1337)
    a, b, c = mixture.parts
    again = Mixture([c, b, a], [0.3, 0.15, 0.55])  # written in another order, to another sum
    assert again.name == mixture.name == 'a:0.55,b:0.15,c:0.3'
    assert all(torch.equal(*pair) for pair in zip((x, y), again.batch(indices, 16, 1337)))
    for share in (1, 8, 16):  # ranks and micro-batches
        pieces = [
            mixture.batch(indices[i : i + share], 16, 1337) for i in reversed(range(0, 48, share))
        ]
        assert torch.equal(torch.cat([piece[0] for piece in reversed(pieces)]), x)
    assert not torch.equal(x, mixture.batch(indices, 16, 1338)[0])
    assert not torch.equal(owner(x), owner(mixture.batch(indices, 16, 1338)[0]))
    assert (indices == np.arange(ROUND - 24, ROUND + 24)).all()


def test_the_loss_of_a_mixture_is_the_one_on_what_it_draws(mixture, dataset):
    # nats, targets, bytes, variance
    sums = [(2.0 * 100, 100, 400, 0.0), (1.0 * 900, 900, 900, 0.0), (3.0 * 50, 50, 100, 0.0)]
    result, loss = val_result(mixture, sums), 0.55 * 2 + 0.15 * 1 + 0.3 * 3
    assert result.pop('bits_per_byte') == pytest.approx(
        loss / math.log(2) / (0.55 * 4 + 0.15 * 1 + 0.3 * 2)
    )
    assert result.pop('perplexity') == pytest.approx(math.exp(loss))
    assert result == pytest.approx(
        {'val_loss': loss, 'val_loss/a': 2, 'val_loss/b': 1, 'val_loss/c': 3}
    )
    # variances of draws add up as the shares weigh them
    drawn = val_result(mixture, [(nats, n, size, 4.0) for nats, n, size, _ in sums])
    scales = [share * 1050 / n for share, n in zip((0.55, 0.15, 0.3), (100, 900, 50))]
    assert drawn['val_error'] == pytest.approx(2 * math.hypot(*scales) / 1050)
    assert val_result(mixture, [(nats, n, 0, 0.0) for nats, n, *_ in sums])['bits_per_byte'] is None
    assert val_result(
        dataset(), [(0.7, 3, 11, 0.0)]
    ) == dict(  # alone: to the last bit what it always was
        val_loss=0.7 / 3, perplexity=math.exp(0.7 / 3), bits_per_byte=0.7 / math.log(2) / 11
    )


@pytest.fixture
def bare(dataset, tmp_path, monkeypatch):
    """data/a, data/b, elsewhere/c: bare .bin files of 1000, 3000 and 1000 tokens."""
    for name, n in (('data/a', 1000), ('data/b', 3000), ('elsewhere/c', 1000)):
        dataset(n, name=name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    'text, name',
    {
        'a:1,b:3': 'a:0.25,b:0.75',
        'b:.75,a:.25': 'a:0.25,b:0.75',
        ' b:3e0 , ./data/a/:1': 'a:0.25,b:0.75',
        'b,a': 'a:0.25,b:0.75',
        'a:1,b:2': 'a:0.3333,b:0.6667',
        'b,elsewhere/c/,a': 'a:0.2,b:0.6,elsewhere/c:0.2',
        'a:1e9,b:1': 'a:0.9999,b:0.0001',
        'a': 'a',
        'a:7': 'a',
        'data/a': 'a',
        './elsewhere/c/': 'elsewhere/c',
    }.items(),
)
def test_a_mixture_has_one_name_however_it_is_written(bare, text, name):
    data = open_dataset(text, 3000)
    assert data.name == name and isinstance(data, Mixture if ',' in text else Dataset)
    again = open_dataset(name, 3000)  # as a resumed run does
    assert again.name == name
    assert all(
        torch.equal(*pair)
        for pair in zip(data.batch(np.arange(40), 16, 1), again.batch(np.arange(40), 16, 1))
    )
    assert sum(part.tokens['train'] for part in data.parts) == data.tokens['train']


@pytest.mark.skipif(os.name != 'posix', reason='names that Windows does not have')
@pytest.mark.parametrize('name', ['x,y', 'x:1', 'x,y:0.5', 'C:\\data'])
def test_a_folder_may_have_any_name(bare, name):
    shutil.copytree('data/a', f'data/{name}')
    assert isinstance(data := open_dataset(name, 1000), Dataset) and data.name == name
    shutil.copytree('data/a', 'data/q')
    written = name.replace(',', r'\,')
    for text in (f'{written},q', f'q:1,{written}:1', f'q:0.5,{written}:0.5'):
        mixture = open_dataset(text, 1000)
        assert {part.name for part in mixture.parts} == {name, 'q'} and mixture.weights == [0.5, 0.5]
        assert open_dataset(mixture.name, 1000).name == mixture.name


@pytest.mark.parametrize(
    'text, words',
    {
        'a:1,b': 'all of them weight none',
        'a,b:1': 'all of them weight none',
        'a:0,b:1': 'weight of a above 0',
        'a:1,b:-2': 'weight of b above 0',
        'a:nan,b:1': 'weight of a',
        'a:inf,b:1': 'weight of a',
        'a,': 'name is missing',
        ',': 'name is missing',
        'a,b,a': 'a twice',
        'a:1,./data/a:2': 'a twice',
        'a,bb': 'data/bb no such dataset',
        'a,b:x': 'data/b:x no such dataset',
        'a:0': 'weight of a',
        'a;b': 'data/a;b no such dataset',
    }.items(),
)
def test_a_mixture_that_cannot_be_is_one_line(bare, capsys, text, words):
    with pytest.raises(SystemExit) as end:
        open_dataset(text, 3000)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1
    assert all(word in err for word in words.split()), err


# --- what is read and not learned -----------------------------------------------------------------

@pytest.fixture
def masked(tmp_path):
    """A dataset of which runs of tokens, of many lengths and some longer than a window, are not learned."""
    rng = np.random.default_rng(0)
    paths = {}
    for split, n in (('train', 2000), ('val', 300)):
        ids = rng.integers(0, 50, n).astype('<i4')
        for start in range(0, n, 60):
            ids[start:start + rng.integers(0, 60)] ^= -1        # its complement
        paths[split] = str(tmp_path / f'{split}.bin')
        ids.tofile(paths[split])
    return Dataset('masked', paths, 'int32', dict(train=2000, val=300), 50)


def test_a_prompt_is_read_and_not_learned(masked):
    x, y = masked.batch(np.arange(100), 16, 7)
    rows = masked.rows(np.arange(100), 16, 7)
    assert x.min() >= 0 and torch.equal(x, torch.from_numpy(np.where(rows < 0, ~rows, rows)[:, :-1]))
    assert torch.equal(y, torch.from_numpy(np.where(rows < 0, IGNORE, rows)[:, 1:]))
    assert masked.learned(np.arange(100), 16, 7) == int((y >= 0).sum()) < 1600
    assert (y < 0).all(1).any()                                 # windows with nothing to learn, too
    pairs = list(masked.val_batches(4, 16))
    assert all(x.min() >= 0 for x, _ in pairs)
    assert sum(int((y >= 0).sum()) for _, y in pairs) == int((masked.read('val')[1:] >= 0).sum())


def test_weights_make_a_step_the_same_however_it_is_cut(masked, dataset):
    """Of micro-batches and processes with different numbers of targets."""
    def cut(data, micro_batch, world):
        total = 0
        for rank in range(world):
            loader = Loader(data, 16, 7, 'cpu', 12 // world, rank, world)
            loader.seek(12 * 16 * 3, micro_batch)
            for _ in range(loader.micro_steps):
                x, y, weight = loader.next()
                mean = (x * 2 + y)[y >= 0].double().sum().item() / max(1, int((y >= 0).sum()))
                total += mean * weight / loader.micro_steps / world
        return total

    sums = [cut(masked, micro_batch, world) for micro_batch, world in ((12, 1), (1, 1), (4, 1), (2, 2), (3, 4))]
    assert np.ptp(sums) < 1e-9 * sums[0]
    loader = Loader(dataset(), 16, 7, 'cpu', 12)
    loader.seek(0, 3)
    assert [loader.next()[2] for _ in range(4)] == [1.0] * 4


def test_nothing_to_learn_is_a_line_and_no_nan(masked, capsys):
    loss = linear_cross_entropy(torch.randn(1, 8, 4), torch.randn(9, 4), torch.full((1, 8), IGNORE))
    assert loss == 0
    with pytest.raises(SystemExit):
        val_result(masked, [(0.0, 0, 0, 0.0)])
    assert 'nothing that is learned' in capsys.readouterr().err


def test_a_mixture_counts_what_is_learned(masked, dataset):
    mixture = Mixture([masked, dataset(name='plain')], [1, 1])
    _, y = mixture.batch(np.arange(64), 16, 7)
    assert mixture.learned(np.arange(64), 16, 7) == int((y >= 0).sum())
