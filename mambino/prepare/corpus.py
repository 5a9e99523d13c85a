"""
Which documents are used, and which are val: what is decided when all are known and before one is encoded.

    corpus = Corpus(tasks, reports, work)                       # of all tasks of spool.extract
    limit, copies = corpus.decide(val_fraction=0.1, dedupe=True, known={TRAIN: hashes, VAL: hashes})
    corpus.use                                                  # DROP, TRAIN or VAL for each row

It takes some hundred bytes of memory a document, whatever its length.
"""
import os

import numpy as np

from mambino.prepare.spool import DROP, KINDS, ROW, TRAIN, VAL

HASH = np.dtype([('hi', '<u8'), ('lo', '<u8')])

class TooLittle(Exception):
    """These documents make no dataset."""

class Corpus:
    """All pieces of all documents, as rows on disk in the order of the sources, and what becomes of each."""

    def __init__(self, tasks, reports, work):
        path = os.path.join(work, 'all.rows')
        self.blocks, first = [], 0  # (key, (offset, packed, unpacked))
        with open(path, 'wb') as f:
            for task, done in zip(tasks, reports):
                rows = np.fromfile(os.path.join(work, task['key'] + '.rows'), ROW)
                rows['block'] += first
                f.write(rows.tobytes())
                self.blocks += [(task['key'], block) for block in done['blocks']]
                first += len(done['blocks'])
        size = os.path.getsize(path) // ROW.itemsize
        self.rows = np.memmap(path, ROW, 'r') if size else np.zeros(0, ROW)
        self.starts = np.searchsorted(self.rows['block'], np.arange(len(self.blocks) + 1))  # of each block's rows
        self.use = np.zeros(size, np.uint8)
        self.cut = None  # one document alone: (row, characters in it) where val begins

    def decide(self, val_fraction, dedupe, known, limit=None, before=0):
        """
        Fills `use`; returns (limit: documents with a hash below are val; number of copies that were dropped). known, limit, before:
        {side: hashes}, limit and bytes of the dataset that is added to. A document that alone is more than val_fraction of all is
        for training, where there are others: it would be all of val, and nobody would learn from it.
        """
        rows = self.rows
        copy = copies_in(rows, np.concatenate([np.zeros(0, HASH), *known.values()])) if dedupe else np.zeros(len(rows), bool)
        copies = int(np.sum(copy & (rows['part'] == 0)))
        kept = ~copy
        if not kept.any():
            return limit, copies
        number = np.cumsum(rows['part'] == 0) - 1  # of the document
        size = np.bincount(number, np.where(kept, rows['size'], 0))
        small = kept & (size <= val_fraction * (size.sum() + before))[number]
        if limit is None:
            hashes = rows['hi'][kept]
            if hashes.min() == hashes.max():
                return self.split_one(kept, val_fraction), copies
            small = small if small.any() else kept
            # val is every hash below the limit. With few documents that may be next to none: then it is raised until val has
            # half of what it should, or half of what there is for it; but never so that nothing is left for training
            first = np.flatnonzero(small & (rows['part'] == 0))
            first = first[np.argsort(rows['hi'][first], kind='stable')]
            sizes = np.cumsum(size[number[first]])
            enough = int(np.searchsorted(sizes, min(val_fraction * size.sum(), sizes[-1]) / 2))
            limit = max(int(val_fraction * 2 ** 64), int(rows['hi'][first[enough]]) + 1)
            if small.sum() == kept.sum():
                limit = min(limit, int(hashes.max()))
        self.use[:] = np.where(copy, DROP, np.where(small & (rows['hi'] < np.uint64(limit)), VAL, TRAIN))
        for side, there in known.items() if not dedupe else ():
            self.use[np.isin(rows['hi'], there['hi'])] = side  # a copy of what is there goes to its side
        return limit, copies

    def split_one(self, kept, val_fraction):
        """A corpus of one document: its last val_fraction is val."""
        kept &= np.cumsum((self.rows['part'] == 0) & kept) == 1  # one of its copies, where they are not dropped
        chars = int(self.rows['chars'][kept].sum())
        n = int(chars * (1 - val_fraction))
        if not 0 < n < chars:
            raise TooLittle(f'{chars} characters are too few to split at val_fraction={val_fraction}')
        before = np.cumsum(np.where(kept, self.rows['chars'], 0), dtype=np.int64)
        row = int(np.searchsorted(before, n, 'right'))
        self.cut = row, n - int(before[row] - self.rows['chars'][row])
        self.use[:] = np.where(kept, np.where(np.arange(len(kept)) < row, TRAIN, VAL), DROP)
        return 0

    def totals(self):
        """{kind: {'documents', 'characters'}} of what is used."""
        used = self.use != DROP
        kinds = self.rows['kind']
        count = lambda of: np.bincount(kinds[used], of[used].astype(np.float64), len(KINDS)).astype(np.int64).tolist()
        documents, characters = count(self.rows['last']), count(self.rows['chars'])
        return {name: {'documents': documents[i], 'characters': characters[i]} for i, name in enumerate(KINDS) if documents[i]}

    def sample(self, sample_mb):
        """Yields (key, block, rows, characters of the last one) for about sample_mb of train, chosen by the documents' hashes."""
        train = self.use == TRAIN
        if self.cut:
            train[self.cut[0]] = True  # up to where val begins
        share = sample_mb * 1e6 / max(1, int(self.rows['size'][train].sum(dtype=np.int64)))
        if share < 1:
            mix = self.rows['lo'] + self.rows['part'] * np.uint64(0x9E3779B97F4A7C15)
            mix = (mix ^ (mix >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            train &= mix < np.uint64(int(share * 2 ** 64))
        for (key, block), first, end in zip(self.blocks, self.starts, self.starts[1:]):
            rows = self.rows[first:end][train[first:end]]
            if len(rows):
                cut = self.cut and first <= self.cut[0] < end
                yield key, block, rows, self.cut[1] if cut else None

def copies_in(rows, known):
    """Marks the rows of documents that came before, in `rows` or among the hashes `known`: (len(rows),) bool."""
    first = np.flatnonzero(rows['part'] == 0)
    hi, lo = (np.concatenate([known[name], rows[name][first]]) for name in ('hi', 'lo'))
    order = np.lexsort((lo, hi))  # a stable sort: of equals, the one that came first comes first
    hi, lo = hi[order], lo[order]
    again = np.zeros(len(order), bool)
    again[order[1:]] = (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])
    return np.repeat(again[len(known):], np.diff(np.append(first, len(rows))))
