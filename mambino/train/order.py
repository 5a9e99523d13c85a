"""In which order the sequences of a run are read: pseudo-random, and known to whoever knows the seed.

    place = shuffled(np.arange(n), n, (seed, epoch))    # where each window of an epoch comes
    order, before = deal(quotas, seed, number)          # which dataset each sequence of a round is of
    starts(sequences, n, T, slack, seed)                # where in its file each begins
"""
import functools

import numpy as np

ROUND = 10_000  # sequences in which each dataset of a mixture has exactly its share


def quotas_of(weights):
    """Whole numbers in proportion to the weights, 1 or more each, that sum to ROUND: what largest
    remainders give."""
    exact = np.array(weights, np.float64) / max(weights)  # a sum of huge ones would be infinite
    exact *= ROUND / exact.sum()
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := ROUND - int(quotas.sum())) > 0:
        quotas[np.argmax(exact - quotas)] += 1
    while missing < 0:                                              # the smallest were raised to 1
        quotas[np.argmax(quotas)] -= 1
        missing += 1
    return tuple(quotas.tolist())


@functools.lru_cache(maxsize=4)
def deal(quotas, seed, number):
    """Round `number` of a mixture: (ROUND,) the part each of its sequences is read from, and
    (ROUND,) how many before it in the round are of the same part."""
    slots = shuffled(np.arange(ROUND), ROUND, (seed, number, 2))    # 2: a key that no epoch has
    order = np.searchsorted(np.cumsum(quotas), slots, side='right')
    before = np.empty_like(order)
    for i, quota in enumerate(quotas):
        before[order == i] = np.arange(quota)
    return order, before


def random_below(n, *key):
    return int(np.random.SeedSequence(key).generate_state(1)[0]) % n


def starts(sequences, n, T, slack, seed, streams=0):
    """Where in a split sequences (B,) begin: each of the n windows of T tokens once an epoch, in a shuffled order, the
    first by less than `slack` behind the split's beginning. With streams, so many sequences go on where the last so
    many ended: an epoch is cut into streams as long as can be, and what is left over is before them or behind them."""
    streams = streams or n
    long = n // streams                                         # windows of a stream
    steps, numbers = np.divmod(sequences, streams)
    epochs, places = np.divmod(steps, long)
    begins = np.empty(len(sequences), np.int64)
    for epoch in np.unique(epochs):
        its = epochs == epoch
        shift = random_below(min(slack, T), seed, int(epoch), 1)
        first = random_below(n - long * streams + 1, seed, int(epoch), 3)
        stream = shuffled(numbers[its], streams, (seed, int(epoch)))
        begins[its] = (first + stream * long + places[its]) * T + shift
    return begins


def shuffled(i, n, key):
    """Where the numbers i (array, below n) come in a pseudo-random order of range(n) that `key`, a
    tuple, names.

    Multiply by an odd number, add, xor with the upper half: each maps the numbers of so many bits
    one to one. What lands at n or beyond goes round again until it lands below. No table: an epoch
    of any length costs nothing to start."""
    bits = max(1, int(n - 1).bit_length())
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(max(1, bits // 2))
    constants = np.random.SeedSequence(key).generate_state(8, np.uint64)
    x = np.asarray(i).astype(np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        v = x[outside]
        for factor, term in zip(constants[:4], constants[4:]):
            v = (v * (factor | np.uint64(1)) + term) & mask
            v ^= v >> shift
        x[outside] = v
        outside = x >= n
    return x.astype(np.int64)
