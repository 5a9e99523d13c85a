"""Reads what prepare.py wrote: which tokens make the batch of a step, and which make an evaluation.

    data = open_dataset('stdlib')           # data/stdlib/{train,val}.bin, meta.json, tokenizer.json
    x, y = data.batch(sequences=np.arange(8), block_size=256, seed=1337)
    for x, y in data.val_batches(batch_size=8, block_size=256): ...
    data = open_dataset('code:0.6,docs:0.4')            # a mixture: 6 of 10 sequences are code's

A .bin is one long row of token ids. An epoch cuts it into windows of block_size, from a start that
differs each epoch, and visits each window once in a shuffled order. So sequence number s of a run
is a pure function of (seed, s): step i takes sequences i*S to (i+1)*S - 1, and whoever knows the
step knows the data. A resumed run needs no loader state, and any number of processes that share the
S sequences among them see, together, the same batch.

A token stored as −1 − id is read as id and not learned, a prompt before its answer: where it is a
target it does not count.

A mixture deals these sequence numbers out to its datasets, in rounds of 10,000 that hold exactly
each one's share in a shuffled order. The n-th that falls to a dataset is its own sequence number n:
it is read as if it were trained on alone, epoch by epoch.
"""
import difflib
import functools
import math
import os
import re
import shlex
from dataclasses import dataclass, field

import numpy as np
import torch

from mambino import tokenizer
from mambino.chat import visible
from mambino.configurator import fail, split_list
from mambino.files import sha256, stamp_of
from mambino.plain import parse_json, table, whole
from mambino.train import processes
from mambino.train.order import ROUND, deal, quotas_of, starts

IGNORE = -1     # a target that does not count
READ_AT_ONCE = 100_000_000      # tokens of a split that are looked through when it is opened


# --- a dataset, a mixture of several --------------------------------------------------------------

class Changed(Exception):
    """Somebody has written into a file of a dataset that is being read."""


@dataclass
class Dataset:
    """Its files are what they were when they were opened first: other ones that take their names
    are not read, and what is written into them is Changed. A touch, or the very same text put back,
    is no change."""
    name: str                       # as --dataset says it: the folder in data/, or its path
    paths: dict                     # split → file
    dtype: str                      # of the files
    tokens: dict                    # split → number of tokens
    vocab_size: int                 # every id is below
    tokenizer: object = None        # None for a bare .bin
    meta: dict = None
    files: dict = field(default_factory=dict)       # split → (its open file, its stamp)
    digests: dict = field(default_factory=dict)     # split → what it was, as identity.identity_of found it
    weights = (1.0,)                # by itself it is a mixture of one
    streams = 0                     # sequences of a step that each go on where the last step's ended; 0: at random

    def __post_init__(self):
        # (V,) bytes of text an id stands for, see text_bytes(); None for a bare .bin
        self.token_bytes = self.tokenizer and self.text_bytes()
        # whether there may be tokens that are not learned; what is not read now may have some
        is_talk = self.meta is None or bool(self.meta.get('conversations'))
        self.is_masked = is_talk and self.dtype == 'int32' and self.tokens['train'] > READ_AT_ONCE
        # a foreign id would crash an embedding in the middle of a run
        for split, n in self.tokens.items():
            if n <= READ_AT_ONCE:
                lowest = self.check(self.read(split), split)
                self.is_masked = self.is_masked or lowest < 0

    @property
    def parts(self):
        """The datasets of which it is the mixture."""
        return [self]

    def shares(self, n, seed):
        """As Mixture.shares: there is nothing to tell."""
        return {}

    def mixture_lines(self, n, block_size, seed):
        """As Mixture.mixture_lines: there is nothing to tell."""
        return []

    def epochs(self, n, block_size, seed):
        """As Mixture.epochs."""
        return {self.name: n * block_size / max(1, self.tokens['train'])}

    def read(self, split):
        """The tokens of a split. Mapped anew each time: a memmap that stays keeps every page it
        ever read. Changed if somebody has written into the file."""
        if not self.tokens[split]:
            return np.zeros(0, self.dtype)
        if split not in self.files:
            file = open(self.paths[split], 'rb')
            self.files[split] = file, stamp_of(file.fileno())
        file, then = self.files[split]
        if stamp_of(file.fileno()) != then and not self.is_same_text(split):
            if processes.WORLD > 1:     # the others are in the step, and cannot save without this one
                fail(f'{self.paths[split]}: was changed while training; put it back and run the same command again')
            raise Changed(self.paths[split])
        return np.memmap(self.files[split][0], dtype=self.dtype, mode='r')

    def is_same_text(self, split):
        """Whether the file at a split's path, which has another stamp than the one that is read,
        has its very bytes: then it is read from here on."""
        path, digest = self.paths[split], self.digests.get(split, '')
        try:
            stamp = stamp_of(path)
            is_known = len(digest) == 64 and stamp[0] == self.files[split][1][0]    # pieces of a file prove nothing
            if not is_known or sha256(path) != digest:
                return False
            file = open(path, 'rb')
        except OSError:
            return False
        if stamp_of(file.fileno()) != stamp:      # written while it was looked at
            file.close()
            return False
        self.files[split] = file, stamp
        return True

    def changed(self):
        """The path of a file that is not there any more, or not the one that is read; '' if all
        are."""
        for split, (_, then) in list(self.files.items()):
            try:
                now = stamp_of(self.paths[split])
            except OSError:
                now = None
            if now != then and not self.is_same_text(split):
                return self.paths[split]
        return ''

    def text_bytes(self):
        """(V,) float64: the bytes of text that each id stands for, so that those of val are as many
        as val's text has.

        They are what the vocabulary says, or the same for each where it does not say it. What is
        lost on the way to ids, as capitals or unknown characters, counts for the others."""
        sizes = self.tokenizer.sizes()
        if self.tokenizer.gives_back:
            return sizes                                    # nothing is lost: val need not be read for it
        counts = np.zeros(len(sizes), np.int64)             # of each id in val
        for start in range(0, self.tokens['val'], 10_000_000):
            ids = visible(self.read('val')[start:start + 10_000_000])
            counts += np.bincount(ids[ids < len(sizes)], minlength=len(sizes))
        total = counts @ sizes
        size = (self.meta or {}).get('splits', {}).get('val', {}).get('bytes')
        if size and total:
            return sizes * (size / total)
        return sizes if self.tokenizer.table else None

    def check(self, ids, split):
        """The lowest number of these ids, below 0 where some are not learned. Ends the program if
        an id is not in the vocabulary."""
        if not len(ids):
            return 0
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < -self.vocab_size or highest >= self.vocab_size:
            foreign = highest if highest >= self.vocab_size else -1 - lowest
            fail(f'{self.paths[split]}: holds token id {foreign}, but the vocabulary has {self.vocab_size}: the file '
                 'and its meta.json or tokenizer do not belong together (or its dtype is not --data_dtype)')
        return lowest

    def windows(self, block_size, split='train'):
        """Windows of an epoch; the last stretch of up to two windows is left out, a different one
        each epoch."""
        return max(1, (self.tokens[split] - 1) // block_size - 1)

    def rows(self, sequences, block_size, seed):
        """sequences (B,) int64 numbers → (B, T + 1) tokens as the file has them."""
        tokens = self.read('train')
        n = self.windows(block_size)
        slack = self.tokens['train'] - n * block_size  # how far the first window may start, + 1
        begins = starts(sequences, n, block_size, slack, seed, self.streams)    # (B,)
        rows = np.stack([tokens[start:start + block_size + 1] for start in begins]).astype(np.int64)
        self.check(rows.ravel(), 'train')
        return rows

    def batch(self, sequences, block_size, seed):
        """sequences (B,) int64 numbers → x, y (B, T) int64 tensors; y is x one token later, IGNORE
        where that is not learned."""
        rows = self.rows(sequences, block_size, seed)       # (B, T + 1)
        x, y = visible(rows[:, :-1]), np.maximum(rows[:, 1:], IGNORE)
        return torch.from_numpy(x).contiguous(), torch.from_numpy(y).contiguous()

    def learned(self, sequences, block_size, seed):
        """How many targets of these sequences count: B T of most datasets."""
        if not self.is_masked:
            return len(sequences) * block_size
        return int((self.rows(sequences, block_size, seed)[:, 1:] >= 0).sum())

    def val_batches(self, batch_size, block_size, max_rows=0, rank=0, world=1, mask_id=None):
        """Yields (x, y), (B, T) each, over the val split in order, each token but the first a
        target once, and of ids that begin the first text none, nor of those that are not learned.

        The last row is filled up with targets that do not count. max_rows: stop there, 0 is the
        whole split; each rank takes its share of the batches. mask_id: as in sample/generation.py's
        cut_in_windows."""
        targets = self.tokens['val'] - 1
        n_rows = -(-targets // block_size)
        n_rows = min(n_rows, max_rows or n_rows)
        for number in range(rank, -(-n_rows // batch_size), world):
            tokens = self.read('val')
            first_row = number * batch_size
            x = np.zeros((min(batch_size, n_rows - first_row), block_size), np.int64)
            y = np.full_like(x, IGNORE)
            for i in range(len(x)):
                start = (first_row + i) * block_size
                length = min(block_size, targets - start)
                seen = length if mask_id is None else min(block_size, length + 1)
                x[i, :seen] = visible(tokens[start:start + seen])
                y[i, :length] = np.maximum(tokens[start + 1:start + length + 1].astype(np.int64), IGNORE)
            if first_row == 0 and self.tokenizer:
                y[0, :max(0, len(self.tokenizer.bos) - 1)] = IGNORE     # the second of two that begin it
            self.check(x, 'val')
            if mask_id is not None:
                x[-1, seen:] = mask_id
            yield torch.from_numpy(x), torch.from_numpy(y)


class Mixture:
    """Several datasets of one tokenizer as one, with the face of a Dataset."""

    def __init__(self, parts, weights):
        """weights: one for each part, more than 0. The parts are sorted by name, so their order is
        no matter."""
        by_name = sorted(zip(parts, weights), key=lambda pair: pair[0].name)
        self.parts = [part for part, _ in by_name]
        self.quotas = quotas_of([weight for _, weight in by_name])
        self.weights = [quota / ROUND for quota in self.quotas]         # what is really drawn
        names = [part.name.replace(',', r'\,') for part in self.parts]  # as open_dataset() reads it
        self.name = ','.join(f'{name}:{weight:g}' for name, weight in zip(names, self.weights))
        self.tokens = {split: sum(part.tokens[split] for part in parts) for split in parts[0].tokens}
        self.vocab_size = max(part.vocab_size for part in parts)
        self.tokenizer = self.parts[0].tokenizer
        if self.tokenizer:              # that of a chat says more of its use
            self.tokenizer.config = functools.reduce(dict.__or__, (part.tokenizer.config for part in self.parts))
        self.token_bytes = self.parts[0].token_bytes

    def changed(self):
        """As Dataset.changed."""
        return next(filter(None, (part.changed() for part in self.parts)), '')

    def assign(self, sequences, seed):
        """sequences (B,) → which part each is read from (B,), and its number among that part's own
        sequences (B,)."""
        rounds, slots = np.divmod(sequences, ROUND)
        which, own = np.empty_like(sequences), np.empty_like(sequences)
        for number in np.unique(rounds):
            in_round = rounds == number
            order, before = deal(self.quotas, seed, int(number))
            which[in_round] = order[slots[in_round]]
            own[in_round] = before[slots[in_round]]
        return which, own + rounds * np.array(self.quotas)[which]

    def batch(self, sequences, block_size, seed):
        """As Dataset.batch."""
        which, own = self.assign(sequences, seed)
        x = torch.empty(len(sequences), block_size, dtype=torch.int64)  # (B, T)
        y = torch.empty_like(x)
        for i in np.unique(which):
            rows = which == i
            x[rows], y[rows] = self.parts[i].batch(own[rows], block_size, seed)
        return x, y

    def learned(self, sequences, block_size, seed):
        """As Dataset.learned."""
        which, own = self.assign(sequences, seed)
        return sum(part.learned(own[which == i], block_size, seed) for i, part in enumerate(self.parts) if i in which)

    def counts(self, n, seed):
        """(parts,) how many of the first n sequences of a run are each part's."""
        rounds, rest = divmod(n, ROUND)
        order, _ = deal(self.quotas, seed, rounds)
        return rounds * np.array(self.quotas) + np.bincount(order[:rest], minlength=len(self.parts))

    def shares(self, n, seed):
        """{name: share} of the first n sequences."""
        counts = self.counts(n, seed)
        return {part.name: int(count) / max(1, n) for part, count in zip(self.parts, counts)}

    def mixture_lines(self, n, block_size, seed):
        """Lines for the reader: what each part is, and how often a run of n sequences passes over
        it."""
        width = max(len(part.name) for part in self.parts)
        epochs = self.epochs(n, block_size, seed)
        for part, weight in zip(self.parts, self.weights):
            yield (f'  {part.name:<{width}}  weight {weight:.4f}  {part.tokens["train"]:>14,} tokens  '
                   f'{epochs[part.name]:6.1f} epochs')

    def epochs(self, n, block_size, seed):
        """{name: how often a run of n sequences passes over this dataset}."""
        return {part.name: int(count) * block_size / max(1, part.tokens['train'])
                for part, count in zip(self.parts, self.counts(n, seed))}


# --- opening them ---------------------------------------------------------------------------------

def newest_dataset(root='data'):
    """The name of the dataset that was prepared last."""
    times = {}
    for name in os.listdir(root) if os.path.isdir(root) else []:
        path = os.path.join(root, name, 'meta.json')
        if os.path.isfile(path):
            times[name] = os.path.getmtime(path)
    if not times:
        fail(f'{root}/: no dataset yet; run: python prepare.py (Python\'s own sources), '
             'or python prepare.py your/files')
    return max(times, key=times.get)


def open_dataset(text, vocab_size=0, dtype='int32', root='data'):
    """The dataset data/<text>, or the folder `text`, or a mixture of such: 'code:0.6,docs:0.4' (any
    weights above 0), or 'code,docs' (as much of each as it has tokens, as if they were one). A
    comma in a name is written as \\,. Whatever is wrong ends the program in a line."""
    items = [(text, None)]
    # else a folder may have any name
    if not os.path.isdir(os.path.join(root, text)) and not os.path.isdir(text):
        items = [named_weight(item.strip(), root) for item in split_list(text, ',')]
    for name, weight in items:
        if not name:
            fail(f'dataset={text}: a name is missing; write --dataset=code:0.6,docs:0.4')
        if weight is not None and not 0 < weight < math.inf:
            fail(f'dataset={text}: the weight of {name} must be a number above 0; leave {name} out to train without it')
        if (weight is None) != (items[0][1] is None):
            fail(f'dataset={text}: give all of them a weight, as in code:0.6,docs:0.4, or none')
    parts = [open_folder(name, vocab_size, dtype, root) for name, _ in items]
    if len(parts) == 1:
        return parts[0]
    check_parts(text, parts)
    weights = [weight for _, weight in items]
    if weights[0] is None:
        weights = [max(1, part.tokens['train']) for part in parts]
    return Mixture(parts, weights)


def check_parts(text, parts):
    """Ends the program if datasets are no mixture: one stands there twice, or they have different
    tokenizers, or templates of a chat."""
    folders = [os.path.dirname(part.paths['train']) for part in parts]
    for i, part in enumerate(parts):
        if any(os.path.samefile(folders[i], other) for other in folders[:i]):
            fail(f'dataset={text}: {part.name} stands there twice; name it once, with the sum of the weights')
        a, b = (0, i) if parts[0].tokenizer else (i, 0)             # a bare .bin has none to give
        if len({part.tokenizer and part.tokenizer.sha256() for part in (parts[a], parts[b])}) > 1:
            fail(f'dataset={text}: {parts[b].name} was not made with the tokenizer of '
                 f'{parts[a].name}, so their ids mean different text; '
                 'prepare it again: python prepare.py your/files '
                 f'--tokenizer={shlex.quote(folders[a])} --out={shlex.quote(folders[b])}')
    templates = {part.tokenizer.config.get('chat_template') for part in parts if part.tokenizer} - {None}
    if len(templates) > 1:
        fail(f'dataset={text}: their conversations were written by different chat templates; prepare them with one')


def named_weight(item, root):
    """'code:0.6' → ('code', 0.6); 'code' → ('code', None), and so is a path with a colon, or a
    folder of that very name."""
    name, _, number = item.rpartition(':')
    if os.path.isdir(os.path.join(root, item)) or os.path.isdir(item):
        return item, None
    try:
        return (name, float(number)) if name else (item, None)
    except ValueError:
        return item, None


def open_folder(name, vocab_size, dtype, root):
    """The Dataset data/<name>, or the folder `name`. Without meta.json the bare .bin files are read
    as `dtype` (nanoGPT writes uint16), and vocab_size must be told."""
    folder = find_folder(name, root)
    meta = tok = None
    path = os.path.join(folder, 'meta.json')
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                meta = parse_json(f.read())
            dtype, vocab_size = meta['dtype'], meta['vocab_size']
            if not whole(vocab_size, 1):
                raise ValueError(f'vocab_size={vocab_size!r} is no number of ids')
            for split in ('train', 'val'):
                if not table(meta.get('splits', {})) or not table(meta.get('splits', {}).get(split, {})):
                    raise ValueError(f'it does not describe {split}')
            tokenizer_path = os.path.join(folder, meta['tokenizer']['file'])
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f'{path}: not readable as a dataset\'s description ({type(error).__name__}: {error}); '
                 'run prepare.py again')
        tok = tokenizer.load_tokenizer(tokenizer_path)
        if tok.sha256() != meta['tokenizer'].get('sha256'):
            fail(f'{tokenizer_path}: not the tokenizer this dataset was made with; run prepare.py again')
    elif vocab_size <= 0:
        fail(f'{path}: missing; for bare .bin files say --vocab_size=... (and --data_dtype=uint16 for nanoGPT\'s)')
    if dtype not in ('int32', 'uint16'):
        fail(f'{folder}: dtype {dtype!r} of the .bin files must be int32 or uint16')
    paths = {split: os.path.join(folder, split + '.bin') for split in ('train', 'val')}
    tokens = {split: count_tokens(path, dtype, meta, split) for split, path in paths.items()}
    return Dataset(canonical_name(folder, root), paths, dtype, tokens, vocab_size, tok, meta)


def is_there(text, root='data'):
    """Whether this names a folder, or several and their weights: a mixture's are looked for later."""
    return ',' in text or any(os.path.isdir(path) for path in (os.path.join(root, text), text))


def find_folder(name, root):
    """The folder of a dataset: in data/, or anywhere."""
    in_root = os.path.join(root, name)
    for folder in (in_root, name):
        if os.path.isdir(folder):
            return folder
        if os.path.isdir(os.path.join(folder + '.partial', 'old')):  # systems on which folders cannot change places
            fail(f'{folder}: prepare.py was killed as it put the new dataset in its place; say the same command again')
    known = sorted(os.listdir(root)) if os.path.isdir(root) else []
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f' (did you mean --dataset={near[0]}?)' if near else ''
    options = ' --tokenizer=char' if re.search(r'(^|[_-])char($|[_-])', name) else ''  # as recipes call them
    files = '' if name == 'stdlib' else f' your/files{options} --out={shlex.quote(in_root)}'
    fail(f'{in_root}: no such dataset{advice}; make it: python prepare.py{files}')


def count_tokens(path, dtype, meta, split):
    """The tokens of a .bin; as many as meta.json says, if there is one."""
    if not os.path.exists(path):
        fail(f'{path}: missing; run prepare.py again')
    size, token_size = os.path.getsize(path), np.dtype(dtype).itemsize
    tokens, rest = divmod(size, token_size)
    expected = (meta or {}).get('splits', {}).get(split, {}).get('tokens', tokens)
    if rest or tokens != expected:
        fail(f'{path}: has {size} bytes, not the {expected} tokens of {token_size} bytes it should hold; '
             'run prepare.py again')
    return tokens


def canonical_name(folder, root):
    """What a dataset is called: data/code/ and code are one with one name; another is called by its
    path."""
    short = os.path.basename(os.path.normpath(folder))
    in_root = os.path.join(root, short)
    if os.path.isdir(in_root) and os.path.samefile(in_root, folder):
        return short
    return os.path.normpath(folder)
