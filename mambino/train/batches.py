"""Reads what prepare.py wrote: which tokens make the batch of a step, and which make an evaluation.

    data = open_dataset('stdlib')                                     # data/stdlib/{train,val}.bin, meta.json, tokenizer.json
    x, y = data.batch(sequences=np.arange(8), block_size=256, seed=1337)
    for x, y in data.val_batches(batch_size=8, block_size=256): ...
    data = open_dataset('code:0.6,docs:0.4')                          # a mixture: 6 of 10 sequences are code's

A .bin is one long row of token ids. An epoch cuts it into windows of block_size, from a start that differs each epoch, and
visits each window once in a shuffled order. So sequence number s of a run is a pure function of (seed, s): step i takes
sequences i*S to (i+1)*S - 1, and whoever knows the step knows the data. A resumed run needs no loader state, and any
number of processes that share the S sequences among them see, together, the same batch.

A mixture deals these sequence numbers out to its datasets, in rounds of 10,000 that hold exactly each one's share in a shuffled
order. The n-th that falls to a dataset is its own sequence number n: it is read as if it were trained on alone, epoch by epoch.
"""
import difflib
import functools
import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch

from mambino import tokenizer
from mambino.configurator import fail

IGNORE = -1     # a target that does not count
ROUND = 10_000  # sequences in which each dataset of a mixture comes exactly as often as its weight says


@dataclass
class Dataset:
    name: str                      # as --dataset says it: the folder in data/, or its path
    paths: dict                    # split -> file
    dtype: str                     # of the files
    tokens: dict                   # split -> number of tokens
    vocab_size: int                # every id is below
    tokenizer: object = None       # None for a bare .bin
    meta: dict = None
    weights = (1.0,)               # by itself it is a mixture of one,
    parts = property(lambda self: [self])
    plan = shares = lambda self, *_: {}  # of which there is nothing to tell

    def __post_init__(self):
        self.token_bytes = None    # (V,) bytes of text an id stands for; None where nothing tells
        if self.tokenizer is not None:
            self.token_bytes = np.array([len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size)])
        for split, n in self.tokens.items():  # a foreign id would crash an embedding in the middle of a run
            if n <= 100_000_000:
                self.check(self.read(split), split)

    def read(self, split):
        """The tokens of a split. Opened anew each time: a memmap that stays open keeps every page it ever read."""
        if not self.tokens[split]:
            return np.zeros(0, self.dtype)
        return np.memmap(self.paths[split], dtype=self.dtype, mode='r')

    def check(self, ids, split):
        if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < self.vocab_size):
            wrong = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            fail(f'{self.paths[split]}: holds token id {wrong}, but the vocabulary has {self.vocab_size}: the file and its '
                 'meta.json or tokenizer do not belong together (or its dtype is not --data_dtype)')

    def windows(self, block_size, split='train'):
        """Windows of an epoch; the last stretch of up to two windows is left out, a different one each epoch."""
        return max(1, (self.tokens[split] - 1) // block_size - 1)

    def batch(self, sequences, block_size, seed):
        """sequences (B,) int64 numbers → x, y (B, T) int64 tensors; y is x one token later."""
        tokens, n = self.read('train'), self.windows(block_size)
        slack = self.tokens['train'] - n * block_size  # how far the first window may start, + 1
        starts = np.empty(len(sequences), np.int64)
        for epoch in np.unique(sequences // n):
            here = sequences // n == epoch
            shift = int(np.random.SeedSequence((seed, int(epoch), 1)).generate_state(1)[0]) % min(slack, block_size)
            starts[here] = shuffled(sequences[here] % n, n, (seed, int(epoch))) * block_size + shift
        rows = np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64)
        self.check(rows.ravel(), 'train')
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def val_batches(self, batch_size, block_size, max_batches=0, rank=0, world=1):
        """Yields (x, y) over the val split in order, each token but the first a target once. The last row is filled up
        with targets that do not count. max_batches: stop there, 0 is the whole split; each rank takes its share."""
        n = self.tokens['val'] - 1
        rows = -(-n // block_size)
        batches = -(-rows // batch_size)
        for b in range(rank, min(batches, max_batches or batches), world):
            tokens = self.read('val')
            x = np.zeros((min(batch_size, rows - b * batch_size), block_size), np.int64)
            y = np.full_like(x, IGNORE)
            for i in range(len(x)):
                s = (b * batch_size + i) * block_size
                length = min(block_size, n - s)
                x[i, :length], y[i, :length] = tokens[s:s + length], tokens[s + 1:s + length + 1]
            self.check(x, 'val')
            yield torch.from_numpy(x), torch.from_numpy(y)


class Mixture:
    """Several datasets of one tokenizer as one, with the face of a Dataset."""

    def __init__(self, parts, weights):
        """weights: one for each part, more than 0. The parts are sorted by name, so the order in which they come is no matter."""
        parts, weights = zip(*sorted(zip(parts, weights), key=lambda pair: pair[0].name))
        self.parts, self.quotas = parts, quotas_of(weights)
        self.weights = [quota / ROUND for quota in self.quotas]      # what is really drawn
        self.name = ','.join(f'{part.name}:{weight:g}' for part, weight in zip(parts, self.weights))
        self.tokens = {split: sum(part.tokens[split] for part in parts) for split in parts[0].tokens}
        self.vocab_size = max(part.vocab_size for part in parts)
        self.tokenizer, self.token_bytes = parts[0].tokenizer, parts[0].token_bytes

    def place(self, sequences, seed):
        """sequences (B,) → which part each is read from (B,), and its number among that part's own sequences (B,)."""
        rounds, places = np.divmod(sequences, ROUND)
        which, own = np.empty_like(sequences), np.empty_like(sequences)
        for number in np.unique(rounds):
            here = rounds == number
            order, before = deal(self.quotas, seed, int(number))
            which[here], own[here] = order[places[here]], before[places[here]]
        return which, own + rounds * np.array(self.quotas)[which]

    def batch(self, sequences, block_size, seed):
        """As Dataset.batch."""
        which, own = self.place(sequences, seed)
        x = torch.empty(len(sequences), block_size, dtype=torch.int64)  # (B, T)
        y = torch.empty_like(x)
        for i in np.unique(which):
            x[which == i], y[which == i] = self.parts[i].batch(own[which == i], block_size, seed)
        return x, y

    def counts(self, n, seed):
        """(parts,) how many of the first n sequences of a run are each part's."""
        rounds, rest = divmod(n, ROUND)
        return rounds * np.array(self.quotas) + np.bincount(deal(self.quotas, seed, rounds)[0][:rest], minlength=len(self.parts))

    def shares(self, n, seed):
        """{name: share} of the first n sequences."""
        return {part.name: int(count) / max(1, n) for part, count in zip(self.parts, self.counts(n, seed))}

    def plan(self, n, block_size, seed):
        """Lines for the reader: what each part is, and how often a run of n sequences passes over it."""
        width = max(len(part.name) for part in self.parts)
        for part, weight, count in zip(self.parts, self.weights, self.counts(n, seed)):
            yield (f'  {part.name:<{width}}  weight {weight:.4f}  {part.tokens["train"]:>14,} tokens  '
                   f'{count * block_size / max(1, part.tokens["train"]):6.1f} epochs')


def quotas_of(weights):
    """Whole numbers in proportion to the weights, 1 or more each, that sum to ROUND: what largest remainders give."""
    exact = np.array(weights, np.float64) / max(weights)             # a sum of huge ones would be infinite
    exact *= ROUND / exact.sum()
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    while rest := ROUND - int(quotas.sum()):                         # below 0: the smallest were raised to 1
        quotas[np.argmax(exact - quotas if rest > 0 else quotas)] += 1 if rest > 0 else -1
    return tuple(quotas.tolist())


@functools.lru_cache(maxsize=4)
def deal(quotas, seed, number):
    """Round `number` of a mixture: (ROUND,) the part each of its sequences is read from, and (ROUND,) how many before it in the
    round are of the same part."""
    slots = shuffled(np.arange(ROUND), ROUND, (seed, number, 2))     # 2: a key that no epoch has
    order = np.searchsorted(np.cumsum(quotas), slots, side='right')
    before = np.empty_like(order)
    for i, quota in enumerate(quotas):
        before[order == i] = np.arange(quota)
    return order, before


def val_result(data, sums):
    """{'val_loss', 'perplexity', 'bits_per_byte'} from the sums over each part's val split: nats, targets, bytes of text.
    The parts weigh as in training, whatever the sizes of their val splits; 'val_loss/<part>' tells them apart."""
    total = sum(count for _, count, _ in sums)
    scales = [weight * total / count for weight, (_, count, _) in zip(data.weights, sums)]  # 1 where there is one part
    nats, size = (sum(scale * part[i] for scale, part in zip(scales, sums)) for i in (0, 2))
    loss = nats / total
    result = dict(val_loss=loss, perplexity=math.exp(min(loss, 700)), bits_per_byte=nats / math.log(2) / size if size else None)
    if len(sums) > 1:
        result.update((f'val_loss/{part.name}', nats / count) for part, (nats, count, _) in zip(data.parts, sums))
    return result


def shuffled(i, n, key):
    """Where the numbers i (array, below n) come in a pseudo-random order of range(n) that `key`, a tuple, names.

    Multiply by an odd number, add, xor with the upper half: each maps the numbers of so many bits one to one. What lands
    at n or beyond goes round again until it lands below. No table: an epoch of any length costs nothing to start."""
    bits = max(1, int(n - 1).bit_length())
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(max(1, bits // 2))
    constants = np.random.SeedSequence(key).generate_state(8, np.uint64)
    x = np.asarray(i).astype(np.uint64)
    out = np.ones(x.shape, bool)
    while out.any():
        v = x[out]
        for factor, term in zip(constants[:4], constants[4:]):
            v = (v * (factor | np.uint64(1)) + term) & mask
            v ^= v >> shift
        x[out] = v
        out = x >= n
    return x.astype(np.int64)


def newest_dataset(root='data'):
    """The name of the dataset that was prepared last."""
    metas = {name: os.path.join(root, name, 'meta.json') for name in (os.listdir(root) if os.path.isdir(root) else [])}
    found = {name: os.path.getmtime(path) for name, path in metas.items() if os.path.isfile(path)}
    if not found:
        fail(f'{root}/: no dataset yet; run: python prepare.py (Python\'s own sources), or python prepare.py your/files')
    return max(found, key=found.get)


def open_dataset(text, vocab_size=0, dtype='int32', root='data'):
    """The dataset data/<text>, or the folder `text`, or a mixture of such: 'code:0.6,docs:0.4' (any weights above 0), or
    'code,docs' (as much of each as it has tokens, as if they were one). Whatever is wrong ends the program in a line."""
    items = [(text, None)]
    if not os.path.isdir(os.path.join(root, text)) and not os.path.isdir(text):  # else a folder may have any name
        items = [named_weight(item.strip()) for item in text.split(',')]
    for name, weight in items:
        if not name:
            fail(f'dataset={text}: a name is missing; write --dataset=code:0.6,docs:0.4')
        if weight is not None and not 0 < weight < math.inf:
            fail(f'dataset={text}: the weight of {name} must be a number above 0; leave {name} out to train without it')
        if (weight is None) != (items[0][1] is None):
            fail(f'dataset={text}: give all of them a weight, as in code:0.6,docs:0.4, or none')
    parts = [open_folder(name, vocab_size, dtype, root) for name, _ in items]
    folders = [os.path.dirname(part.paths['train']) for part in parts]
    for i, (part, folder) in enumerate(zip(parts, folders)):
        if any(os.path.samefile(folder, other) for other in folders[:i]):
            fail(f'dataset={text}: {part.name} stands there twice; name it once, with the sum of the weights')
        a, b = (0, i) if parts[0].tokenizer else (i, 0)              # a bare .bin has none to give
        if len({part.tokenizer and part.tokenizer.sha256() for part in (parts[a], parts[b])}) > 1:
            fail(f'dataset={text}: {parts[b].name} was not made with the tokenizer of {parts[a].name}, so their ids mean different '
                 f'text; prepare it again: python prepare.py your/files --tokenizer={folders[a]} --out={folders[b]}')
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, [max(1, part.tokens['train']) if weight is None else weight for part, (_, weight) in zip(parts, items)])


def named_weight(item):
    """'code:0.6' → ('code', 0.6); 'code' → ('code', None), and so is a path with a colon."""
    name, _, number = item.rpartition(':')
    try:
        return (name, float(number)) if name else (item, None)
    except ValueError:
        return item, None


def open_folder(name, vocab_size, dtype, root):
    """The Dataset data/<name>, or the folder `name`. Without meta.json the bare .bin files are read as `dtype` (nanoGPT writes
    uint16), and vocab_size must be told."""
    folder = os.path.join(root, name)
    if not os.path.isdir(folder):
        folder = name
    if not os.path.isdir(folder):
        known = sorted(os.listdir(root)) if os.path.isdir(root) else []
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        fail(f'{os.path.join(root, name)}: no such dataset' + (f' (did you mean --dataset={near[0]}?)' if near else '')
             + f'; make it: python prepare.py your/files --out={os.path.join(root, name)}')
    paths = {split: os.path.join(folder, split + '.bin') for split in ('train', 'val')}
    meta, tok, path = None, None, os.path.join(folder, 'meta.json')
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                meta = json.load(f)
            dtype, vocab_size, file = meta['dtype'], meta['vocab_size'], meta['tokenizer']['file']
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f'{path}: not readable as a dataset\'s description ({type(error).__name__}: {error}); run prepare.py again')
        tok = tokenizer.load_tokenizer(os.path.join(folder, file))
        if tok.sha256() != meta['tokenizer'].get('sha256'):
            fail(f'{os.path.join(folder, file)}: not the tokenizer this dataset was made with; run prepare.py again')
    elif vocab_size <= 0:
        fail(f'{path}: missing; for bare .bin files say --vocab_size=... (and --data_dtype=uint16 for nanoGPT\'s)')
    if dtype not in ('int32', 'uint16'):
        fail(f'{folder}: dtype {dtype!r} of the .bin files must be int32 or uint16')
    tokens, size = {}, np.dtype(dtype).itemsize
    for split, path in paths.items():
        if not os.path.exists(path):
            fail(f'{path}: missing; run prepare.py again')
        tokens[split], rest = divmod(os.path.getsize(path), size)
        expected = (meta or {}).get('splits', {}).get(split, {}).get('tokens', tokens[split])
        if rest or tokens[split] != expected:
            fail(f'{path}: has {os.path.getsize(path)} bytes, not the {expected} tokens of {size} bytes it should hold; '
                 'run prepare.py again')
    short = os.path.basename(os.path.normpath(folder))               # data/code/ and code are one dataset with one name
    known = os.path.join(root, short)
    name = short if os.path.isdir(known) and os.path.samefile(known, folder) else os.path.normpath(folder)
    return Dataset(name, paths, dtype, tokens, vocab_size, tok, meta)
