"""Which documents are used, and which are val: decided when all are known and before one is
encoded.

    corpus = Corpus(tasks, reports, dropped, work) # of all tasks of spool.extract
    corpus.decide(val_fraction=0.1, dedupe=True)   # or what adds to a dataset that is there
    corpus.use                                     # DROP, TRAIN or VAL for each row
    corpus.limit                                   # documents with a hash below are val
    corpus.copies                                  # how many were dropped

It takes some hundred bytes of memory a document, whatever its length.
"""
import hashlib
import os

import numpy as np

from mambino.prepare import conversations
from mambino.prepare.spool import DROP, KINDS, ROW, TRAIN, VAL, digest, pieces_of, read_block

HASH = np.dtype([('hi', '<u8'), ('lo', '<u8')])


class TooLittle(Exception):
    """These documents make no dataset."""


class Corpus:
    """All pieces of all documents, as rows on disk in the order of the sources, and what becomes of
    each.
    """

    def __init__(self, tasks, reports, dropped, work):
        """dropped: {key of a task: [(begin, end) of rows that are not wanted]}."""
        self.work = work
        path = os.path.join(work, 'all.rows')
        self.blocks = []  # (key, (offset, packed, unpacked))
        with open(path, 'wb') as f:
            for task, report in zip(tasks, reports):
                rows = np.fromfile(os.path.join(work, task['key'] + '.rows'), ROW)
                rows['block'] += len(self.blocks)
                for begin, end in reversed(dropped.get(task['key'], [])):
                    rows = np.delete(rows, slice(begin, end))
                f.write(rows.tobytes())
                self.blocks += [(task['key'], block) for block in report['blocks']]
        size = os.path.getsize(path) // ROW.itemsize
        self.rows = np.memmap(path, ROW, 'r') if size else np.zeros(0, ROW)
        block_numbers = np.arange(len(self.blocks) + 1)
        self.starts = np.searchsorted(self.rows['block'], block_numbers)  # of each block's rows
        self.use = np.zeros(size, np.uint8)
        self.limit = None  # of the hashes' first halves, int; 0: split by position
        self.copies = 0
        self.cut = None    # one document alone: (row, characters or messages in it) where val begins

    def rows_of(self, block):
        """The slice of `rows` and `use` that is a block's."""
        return slice(int(self.starts[block]), int(self.starts[block + 1]))

    def decide(self, val_fraction, dedupe, copies=0, known=None, limit=None, bytes_before=0):
        """Fills `use`, `limit` and `copies`. copies: documents that were dropped before they were
        written. known, limit, bytes_before: {side: hashes}, limit and bytes of the dataset that is added
        to. A document that alone is more than val_fraction of all is for training, where there are
        others: it would be all of val, and nobody would learn from it.
        """
        known = known or {}
        self.limit = limit
        rows = self.rows
        is_first = rows['part'] == 0
        is_copy = np.zeros(len(rows), bool)
        if dedupe:
            is_copy = copies_in(rows, np.concatenate([np.zeros(0, HASH), *known.values()]))
        self.copies = copies + int(np.sum(is_copy & is_first))
        kept = ~is_copy
        if not kept.any():
            return
        document = np.cumsum(is_first) - 1  # its number, for each row
        size = np.bincount(document, np.where(kept, rows['size'], 0))
        small = kept & (size <= val_fraction * (size.sum() + bytes_before))[document]
        if limit is None:
            hashes = rows['hi'][kept]
            if hashes.min() == hashes.max():
                self.split_one(kept, val_fraction)
                return
            if not small.any():
                small = kept
            self.limit = self.choose_limit(val_fraction, kept, small, document, size)
        is_val = small & (rows['hi'] < np.uint64(self.limit))
        self.use[:] = np.where(is_copy, DROP, np.where(is_val, VAL, TRAIN))
        if not dedupe:
            for side, hashes in known.items():
                # a copy of what is there goes to its side
                self.use[np.isin(rows['hi'], hashes['hi'])] = side

    def choose_limit(self, val_fraction, kept, small, document, size):
        """val is every hash below the limit. With few documents that may be next to none: then it
        is raised until val has half of what it should, or half of what there is for it; but never
        so that nothing is left for training.
        """
        hi = self.rows['hi']
        first = np.flatnonzero(small & (self.rows['part'] == 0))
        first = first[np.argsort(hi[first], kind='stable')]
        sizes = np.cumsum(size[document[first]])
        enough = int(np.searchsorted(sizes, min(val_fraction * size.sum(), sizes[-1]) / 2))
        limit = max(int(val_fraction * 2 ** 64), int(hi[first[enough]]) + 1)
        if small.sum() == kept.sum():
            limit = min(limit, int(hi[kept].max()))
        return limit

    def split_one(self, kept, val_fraction):
        """A corpus of one document: its last val_fraction is val. A conversation is cut where a question
        begins."""
        # one of its copies, where they are not dropped
        kept &= np.cumsum((self.rows['part'] == 0) & kept) == 1
        self.limit = 0
        first = int(np.flatnonzero(kept)[0])
        if self.rows['talk'][first]:
            self.cut = first, self.cut_talk(first, val_fraction)
            self.use[first] = VAL
            return
        chars = int(self.rows['chars'][kept].sum())
        n = int(chars * (1 - val_fraction))
        if not 0 < n < chars:
            raise TooLittle(f'{chars} characters are too few to split at val_fraction={val_fraction}')
        before = np.cumsum(np.where(kept, self.rows['chars'], 0), dtype=np.int64)
        row = int(np.searchsorted(before, n, 'right'))
        self.cut = row, n - int(before[row] - self.rows['chars'][row])
        self.use[:] = np.where(kept, np.where(np.arange(len(kept)) < row, TRAIN, VAL), DROP)

    def cut_talk(self, row, val_fraction):
        """The number of messages of a conversation that are train."""
        key, block = self.blocks[int(self.rows['block'][row])]
        piece = next(pieces_of(read_block(self.work, key, block), self.rows[row:row + 1]))
        messages = conversations.unpack(piece)
        lengths = np.cumsum([0] + [len(text) for text in conversations.said(messages)])
        places = conversations.questions_within(messages)
        if not places:
            raise TooLittle('one conversation with one answer is too little to split into train and val')
        return min(places, key=lambda i: abs(int(lengths[i]) - int(lengths[-1] * (1 - val_fraction))))

    def talks(self):
        """How many of the documents that are used are conversations."""
        return int(self.rows['talk'][self.use != DROP].sum(dtype=np.int64))

    def decision(self):
        """A digest of all that decide() has decided."""
        keys = [key for key, _ in self.blocks]
        return digest([keys, hashlib.sha256(self.use.tobytes()).hexdigest(), self.cut])

    def totals(self):
        """{kind: {'documents', 'characters'}} of what is used."""
        used = self.use != DROP
        kinds = self.rows['kind'][used]

        def total(name):
            counts = np.bincount(kinds, self.rows[name][used].astype(np.float64), len(KINDS))
            return counts.astype(np.int64).tolist()

        totals = {}
        for kind, documents, characters in zip(KINDS, total('last'), total('chars')):
            if documents:
                totals[kind] = {'documents': documents, 'characters': characters}
        return totals

    def sample(self, sample_mb):
        """Yields (key, block, rows, characters of the last one) for about sample_mb of train,
        chosen by the hashes.
        """
        train = self.use == TRAIN
        if self.cut:
            train[self.cut[0]] = True  # up to where val begins
        share = sample_mb * 1e6 / max(1, int(self.rows['size'][train].sum(dtype=np.int64)))
        if share < 1:
            train &= mixed(self.rows) < np.uint64(int(share * 2 ** 64))
        for i, (key, block) in enumerate(self.blocks):
            inside = self.rows_of(i)
            rows = self.rows[inside][train[inside]]
            if len(rows):
                is_cut = self.cut and inside.start <= self.cut[0] < inside.stop
                yield key, block, rows, self.cut[1] if is_cut else None


def mixed(rows):
    """A hash for each piece, of its document's and its number: uint64."""
    mix = rows['lo'] + rows['part'] * np.uint64(0x9E3779B97F4A7C15)
    return (mix ^ (mix >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def copies_in(rows, known):
    """Marks the rows of documents that came before, in `rows` or among the hashes `known`:
    (len(rows),) bool.
    """
    first = np.flatnonzero(rows['part'] == 0)
    hi, lo = (np.concatenate([known[name], rows[name][first]]) for name in ('hi', 'lo'))
    order = np.lexsort((lo, hi))  # a stable sort: of equals, the one that came first comes first
    hi, lo = hi[order], lo[order]
    is_copy = np.zeros(len(order), bool)
    is_copy[order[1:]] = (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])
    return np.repeat(is_copy[len(known):], np.diff(np.append(first, len(rows))))
