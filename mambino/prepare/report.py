"""What prepare.py says: progress, the closing tables, and a look into a dataset that is there.

    python prepare.py --inspect data/mine      # report.inspect
    python prepare.py my_folder --dry_run      # report.show_plan
"""
import collections
import hashlib
import json
import os
import shutil
import sys
import time

import numpy as np

from mambino.configurator import fail
from mambino.prepare.spool import FORMAT, hash_pair, new_hash
from mambino.tokenizer import load_tokenizer


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line every half minute, and one at the
    end.
    """

    def __init__(self, label, total):
        self.label = label
        self.total = total  # bytes
        self.done = 0
        self.began = time.time()
        self.shown = 0.0

    def add(self, size):
        self.done += size
        is_terminal = sys.stdout.isatty()
        now = time.time()
        is_due = now - self.shown >= (0.2 if is_terminal else 30)
        if is_due and now - self.began >= (0.5 if is_terminal else 30):
            self.shown = now
            seconds_left = (self.total - self.done) / max(self.done / (now - self.began), 1)
            self.show(f'{seconds_left:5.0f} s left')

    def close(self):
        if self.total:
            self.show(f'in {time.time() - self.began:.1f} s', last=True)

    def show(self, remark, last=False):
        rate = self.done / max(time.time() - self.began, 1e-3)
        amount = f'{self.done / 1e6:9.1f} of {self.total / 1e6:.1f} MB'
        line = f'{self.label:<9} {amount} {rate / 1e6:7.1f} MB/s  {remark}'
        if sys.stdout.isatty():
            print(f'\r{line:<72}', end='\n' if last else '', flush=True)
        else:
            print(line, flush=True)


def sha256(path):
    """Of a file, as hex."""
    state = hashlib.sha256()
    with open(path, 'rb') as f:
        while data := f.read(1 << 22):
            state.update(data)
    return state.hexdigest()


# -----------------------------------------------------------------------------
# What was left out

def sort_skipped(skipped, reports):
    """Those that were skipped when looking for them, and those when reading them, in an order of
    their own.
    """
    entries = skipped + [entry for report in reports for entry in report['skipped']]
    return sorted(entries, key=lambda entry: (os.fsencode(entry['file']), entry['reason']))


def reasons(skipped, most=8):
    """How often each reason, the most frequent first."""
    counts = collections.Counter(entry['reason'] for entry in skipped).most_common()
    dots = ', ...' if len(counts) > most else ''
    return ', '.join(f'{n:,} {reason}' for reason, n in counts[:most]) + dots


def nothing_readable(inputs, skipped):
    """The message where there is no document at all."""
    why = f' ({reasons(skipped)})' if skipped else ''
    return f'{", ".join(inputs) or "standard library"}: nothing readable{why}'


def show_plan(sources, skipped):
    """What prepare.py would read, and what not."""
    for source in sources:
        print(f'{source.kind:<9}{source.size:>15,}  {source.path}')
    for entry in skipped:
        print(f'skip {entry["file"]}: {entry["reason"]}')
    print(f'\n{"":<9}{"files":>9}{"bytes":>18}')
    for kind in sorted({source.kind for source in sources}):
        sizes = [source.size for source in sources if source.kind == kind]
        print(f'{kind:<9}{len(sizes):>9,}{sum(sizes):>18,}')
    if skipped:
        print(f'skipped {len(skipped):,}: {reasons(skipped)}')
    print('nothing was read or written; without --dry_run, files may still turn out to be binary, '
          'empty or broken')


# -----------------------------------------------------------------------------
# A dataset

def show(folder, meta, tok):
    """The tables at the end of a run, and three windows of the text."""
    print(f'\n{"":<9}{"files":>9}{"documents":>12}{"characters":>16}{"tokens":>16}')
    for kind, n in sorted(meta['kinds'].items(), key=lambda item: -item[1]['tokens']):
        print(f'{kind:<9}{n["files"]:>9,}{n["documents"]:>12,}{n["characters"]:>16,}{n["tokens"]:>16,}')
    print(f'\n{"":<9}{"":>9}{"documents":>12}{"bytes":>16}{"tokens":>16}{"bytes/token":>14}')
    for split, n in meta['splits'].items():
        bytes_per_token = n['bytes'] / max(1, n['tokens'])
        print(f'{split:<9}{"":>9}{n["documents"]:>12,}{n["bytes"]:>16,}{n["tokens"]:>16,}{bytes_per_token:>14.2f}')
    tokens = {split: n['tokens'] for split, n in meta['splits'].items()}
    share = tokens['val'] / max(1, sum(tokens.values()))
    if not meta['val_fraction'] / 4 < share < meta['val_fraction'] * 2.5:
        print(f'val has {100 * share:.1f}% of the tokens, not {100 * meta["val_fraction"]:g}%: that '
              'happens with few documents, or very unequal ones: cut the large ones into chapters, '
              'or set --val_fraction')
    if meta['copies']:
        print(f'dropped {meta["copies"]:,} exact copies; near copies are left alone')
    if meta['skipped']:
        print(f'skipped {len(meta["skipped"]):,}: {reasons(meta["skipped"])}; meta.json names them')
    if meta['notes']:
        show_notes(meta['notes'])
    if meta['suspects']:
        print('most suspicious:')
        for _, path, why in meta['suspects']:
            print(f'  {path}: {why}')
    show_windows(folder, meta, tok)


def show_notes(notes, most=6):
    """How often each note was made; those that begin with a number differ only in that."""
    texts = []
    for entry in notes:
        note = entry['note']
        if note[:1].isdigit():
            note = ''.join('#' if c.isdigit() else c for c in note)
        texts.append(note)
    counts = collections.Counter(texts).most_common()
    dots = ', ...' if len(counts) > most else ''
    most_common = ', '.join(f'{n:,} {note}' for note, n in counts[:most])
    print(f'noted on {len(notes):,} files: {most_common}{dots}')


def show_windows(folder, meta, tok, n=3, length=80):
    """A decoded look at random places of the train split, always the same ones."""
    size = meta['splits']['train']['tokens']
    ids = np.memmap(os.path.join(folder, 'train.bin'), '<i4', 'r')
    width = shutil.get_terminal_size((120, 24)).columns - 4
    starts = np.random.default_rng(0).integers(0, max(1, size - length), n).tolist()
    for start in sorted(starts):
        text = tok.decode(ids[start:start + length]).strip('\n')
        print(f'\nfrom token {start:,}:')
        for line in text.split('\n')[:8]:
            print('  | ' + ''.join(c if c.isprintable() else ' ' for c in line)[:width - 2])


# -----------------------------------------------------------------------------
# Whether it is sound

def inspect(path):
    """Shows a dataset and checks it: the files against their hashes, the documents against theirs.
    Ends the program, with status 2 and one line, if it is damaged.
    """
    folder = path if os.path.isdir(path) else os.path.join('data', path)
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        if meta['format'] != FORMAT:
            fail(f'{path}: made by an older prepare.py, without offsets and hashes; prepare it again')
        wrong, lengths, checked = check(folder, meta)
        if wrong:
            fail(f'{folder}: damaged: {"; ".join(wrong)}; prepare it again')
        tok = load_tokenizer(folder)
        sources = ', '.join(meta['sources'])
        print(f'{folder}: {tok.kind} tokenizer of {tok.vocab_size:,} ids, from {sources}')
        show(folder, meta, tok)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = getattr(error, 'strerror', None) or type(error).__name__
        fail(f'{path}: not a dataset ({why}); prepare.py makes one')
    show_histogram(lengths)
    print(f'\nsound: the hashes of {len(meta["sha256"])} files are right, and {checked:,} documents '
          'decode to the text that was taken')


def check(folder, meta):
    """(list of what is wrong, lengths of all documents, how many of them were decoded)"""
    wrong = check_files(folder, meta)
    lengths = []
    checked = 0
    if wrong:
        return wrong, lengths, checked
    tok = load_tokenizer(folder)
    for split, n in meta['splits'].items():
        path = os.path.join(folder, split)
        is_small = n['tokens'] < 1000
        ids = np.fromfile(path + '.bin', '<i4') if is_small else np.memmap(path + '.bin', '<i4', 'r')
        offsets = np.fromfile(path + '.idx', '<u8').astype(np.int64)
        hashes = np.fromfile(path + '.hash', '<u8').reshape(-1, 2)
        if len(ids) != n['tokens'] or not len(offsets) == len(hashes) + 1 == n['documents'] + 1:
            wrong.append(f'meta.json does not fit {split}.bin and {split}.idx')
        elif offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
            wrong.append(f'{split}.idx does not fit {split}.bin')
        else:
            lengths.append(np.diff(offsets))
            damaged, decoded = check_documents(meta, tok, ids, offsets, hashes)
            checked += decoded
            if damaged is not None:
                wrong.append(f'document {damaged:,} of {split} does not decode to the text that was taken')
    return wrong, np.concatenate(lengths) if lengths else lengths, checked


def check_files(folder, meta):
    """The files against the hashes in meta.json: list of what is wrong."""
    wrong = []
    for name, expected in meta['sha256'].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            wrong.append(f'{name} is missing')
        elif sha256(path) != expected:
            wrong.append(f'{name} has changed')
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.isfile(path) or sha256(path) != meta['tokenizer']['sha256']:
        wrong.append('tokenizer.json is missing or has changed')
    return wrong


def check_documents(meta, tok, ids, offsets, hashes, most=1000):
    """The documents of a split against their hashes. (the first one that differs or None, how many
    of them were decoded)
    """
    if tok.kind == 'bpe' and not tok.fast:
        return None, 0  # others' tokenizers may change a text
    first = int(meta['halves'])  # half of a document bears the hash of the whole
    documents = range(first, len(hashes))
    if len(documents) > most:
        documents = np.random.default_rng(0).choice(documents, most, replace=False)
    for decoded, i in enumerate(documents, 1):
        text = tok.decode(ids[offsets[i]:offsets[i + 1]]).encode('utf-8')
        if hash_pair(new_hash(meta['split_seed'], text)) != tuple(hashes[i].tolist()):
            return i, decoded
    return None, len(documents)


def show_histogram(lengths):
    """Lengths of documents, in powers of two, as bars."""
    median, mean, longest = int(np.median(lengths)), int(lengths.mean()), int(lengths.max())
    print(f'\ntokens in a document: median {median:,}, mean {mean:,}, longest {longest:,}')
    powers = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    width = max(10, shutil.get_terminal_size((100, 24)).columns - 40)
    block = '█' if 'utf' in (sys.stdout.encoding or '').lower() else '#'
    for power in range(int(np.flatnonzero(powers)[0]), len(powers)):
        bar = block * round(width * powers[power] / powers.max())
        print(f'{2 ** power:>12,} .. {2 ** (power + 1) - 1:<12,}{powers[power]:>9,} {bar}')
