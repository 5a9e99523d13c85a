"""Reads what prepare.py wrote: which tokens make the batch of a step, and which make an evaluation.

    data = open_dataset('stdlib')                                     # data/stdlib/{train,val}.bin, meta.json, tokenizer.json
    x, y = data.batch(sequences=np.arange(8), block_size=256, seed=1337)
    for x, y in data.val_batches(batch_size=8, block_size=256): ...

A .bin is one long row of token ids. An epoch cuts it into windows of block_size, from a start that differs each epoch, and
visits each window once in a shuffled order. So sequence number s of a run is a pure function of (seed, s): step i takes
sequences i*S to (i+1)*S - 1, and whoever knows the step knows the data. A resumed run needs no loader state, and any
number of processes that share the S sequences among them see, together, the same batch.
"""
import difflib
import json
import os
from dataclasses import dataclass

import numpy as np
import torch

import tokenizer
from configurator import fail

IGNORE = -1  # a target that does not count


@dataclass
class Dataset:
    name: str
    paths: dict                    # split -> file
    dtype: str                     # of the files
    tokens: dict                   # split -> number of tokens
    vocab_size: int                # every id is below
    tokenizer: object = None       # None for a bare .bin
    meta: dict = None

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


def open_dataset(name, vocab_size=0, dtype='int32', root='data'):
    """The dataset data/<name>, or the folder `name`. Without meta.json the bare .bin files are read as `dtype`
    (nanoGPT writes uint16), and vocab_size must be told. Whatever is wrong with the files ends the program in a line."""
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
        tok = tokenizer.load(os.path.join(folder, file))
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
    return Dataset(os.path.basename(os.path.normpath(folder)), paths, dtype, tokens, vocab_size, tok, meta)
