"""
What prepare.py says: progress, the closing tables, and a look into a dataset that is there.

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
from mambino.prepare.spool import FORMAT, new_hash, numbers_of
from mambino.tokenizer import load_tokenizer

class Progress:
    """One line that is rewritten on a terminal; elsewhere a line every half minute, and one at the end."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.began, self.shown = what, total, 0, time.time(), 0.0

    def add(self, size):
        self.done += size
        terminal, now = sys.stdout.isatty(), time.time()
        if now - self.shown >= (0.2 if terminal else 30) and now - self.began >= (0.5 if terminal else 30):
            self.shown = now
            self.show(f'{(self.total - self.done) / max(self.done / (now - self.began), 1):5.0f} s left')

    def close(self):
        if self.total:
            self.show(f'in {time.time() - self.began:.1f} s', last=True)

    def show(self, end, last=False):
        rate = self.done / max(time.time() - self.began, 1e-3)
        line = f'{self.what:<9} {self.done / 1e6:9.1f} of {self.total / 1e6:.1f} MB {rate / 1e6:7.1f} MB/s  {end}'
        terminal = sys.stdout.isatty()
        print(f'\r{line:<72}' if terminal else line, end='' if terminal and not last else '\n', flush=True)

def reasons(skipped, most=8):
    counts = collections.Counter(entry['reason'] for entry in skipped).most_common()
    return ', '.join(f'{n:,} {reason}' for reason, n in counts[:most]) + (', ...' if len(counts) > most else '')

def sha256(path):
    """Of a file, as hex."""
    state = hashlib.sha256()
    with open(path, 'rb') as f:
        while data := f.read(1 << 22):
            state.update(data)
    return state.hexdigest()

def show_plan(found, skipped):
    """What prepare.py would read, and what not."""
    for source in found:
        print(f'{source.kind:<9}{source.size:>15,}  {source.path}')
    for entry in skipped:
        print(f'skip {entry["file"]}: {entry["reason"]}')
    print(f'\n{"":<9}{"files":>9}{"bytes":>18}')
    for kind in sorted({source.kind for source in found}):
        sizes = [source.size for source in found if source.kind == kind]
        print(f'{kind:<9}{len(sizes):>9,}{sum(sizes):>18,}')
    if skipped:
        print(f'skipped {len(skipped):,}: {reasons(skipped)}')
    print('nothing was read or written; without --dry_run, files may still turn out to be binary, empty or broken')

def show(folder, meta, tok):
    """The tables at the end of a run, and three windows of the text."""
    print(f'\n{"":<9}{"files":>9}{"documents":>12}{"characters":>16}{"tokens":>16}')
    for kind, n in sorted(meta['kinds'].items(), key=lambda item: -item[1]['tokens']):
        print(f'{kind:<9}{n["files"]:>9,}{n["documents"]:>12,}{n["characters"]:>16,}{n["tokens"]:>16,}')
    print(f'\n{"":<9}{"":>9}{"documents":>12}{"bytes":>16}{"tokens":>16}{"bytes/token":>14}')
    for split, n in meta['splits'].items():
        print(f'{split:<9}{"":>9}{n["documents"]:>12,}{n["bytes"]:>16,}{n["tokens"]:>16,}{n["bytes"] / max(1, n["tokens"]):>14.2f}')
    tokens = {split: n['tokens'] for split, n in meta['splits'].items()}
    share = tokens['val'] / max(1, sum(tokens.values()))
    if not meta['val_fraction'] / 4 < share < meta['val_fraction'] * 2.5:
        print(f'val has {100 * share:.1f}% of the tokens, not {100 * meta["val_fraction"]:g}%: that happens with few documents, or very '
              'unequal ones: cut the large ones into chapters, or set --val_fraction')
    if meta['copies']:
        print(f'dropped {meta["copies"]:,} exact copies; near copies are left alone')
    if meta['skipped']:
        print(f'skipped {len(meta["skipped"]):,}: {reasons(meta["skipped"])}; meta.json names them')
    if meta['notes']:
        counts = collections.Counter(''.join('#' if c.isdigit() else c for c in n['note']) if n['note'][:1].isdigit() else n['note']
                                     for n in meta['notes']).most_common()
        print(f'noted on {len(meta["notes"]):,} files: ' + ', '.join(f'{n:,} {note}' for note, n in counts[:6])
              + (', ...' if len(counts) > 6 else ''))
    if meta['suspects']:
        print('most suspicious:')
        for _, path, why in meta['suspects']:
            print(f'  {path}: {why}')
    show_windows(folder, meta, tok)

def show_windows(folder, meta, tok, n=3, length=80):
    """A decoded look at random places of the train split, always the same ones."""
    size = meta['splits']['train']['tokens']
    ids = np.memmap(os.path.join(folder, 'train.bin'), '<i4', 'r')
    width = shutil.get_terminal_size((120, 24)).columns - 4
    for start in sorted(np.random.default_rng(0).integers(0, max(1, size - length), n).tolist()):
        text = tok.decode(ids[start:start + length]).strip('\n')
        print(f'\nfrom token {start:,}:')
        for line in text.split('\n')[:8]:
            print('  | ' + ''.join(c if c.isprintable() else ' ' for c in line)[:width - 2])

def inspect(path):
    """
    Shows a dataset and checks it: the files against their hashes, the documents against theirs. Ends the program, with
    status 2 and one line, if it is damaged.
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
        print(f'{folder}: {tok.kind} tokenizer of {tok.vocab_size:,} ids, from {", ".join(meta["sources"])}')
        show(folder, meta, tok)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(f'{path}: not a dataset ({getattr(error, "strerror", None) or type(error).__name__}); prepare.py makes one')
    histogram(lengths)
    print(f'\nsound: the hashes of {len(meta["sha256"])} files are right, and {checked:,} documents decode to the text that was taken')

def check(folder, meta, most=1000):
    """(list of what is wrong, lengths of all documents, how many of them were decoded: at most `most` of each split)"""
    wrong, lengths, checked = [], [], 0
    for name, expected in meta['sha256'].items():
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            wrong.append(f'{name} is missing')
        elif sha256(file) != expected:
            wrong.append(f'{name} has changed')
    file = os.path.join(folder, 'tokenizer.json')
    if not os.path.isfile(file) or sha256(file) != meta['tokenizer']['sha256']:
        wrong.append('tokenizer.json is missing or has changed')
    if wrong:
        return wrong, lengths, checked
    tok = load_tokenizer(folder)
    for split, n in meta['splits'].items():
        ids = np.fromfile(os.path.join(folder, split + '.bin'), '<i4') if n['tokens'] < 1000 else \
            np.memmap(os.path.join(folder, split + '.bin'), '<i4', 'r')
        ends = np.fromfile(os.path.join(folder, split + '.idx'), '<u8').astype(np.int64)
        hashes = np.fromfile(os.path.join(folder, split + '.hash'), '<u8').reshape(-1, 2)
        if len(ids) != n['tokens'] or not len(ends) == len(hashes) + 1 == n['documents'] + 1:
            wrong.append(f'meta.json does not fit {split}.bin and {split}.idx')
        elif ends[0] != 0 or ends[-1] != len(ids) or (np.diff(ends) < 0).any():
            wrong.append(f'{split}.idx does not fit {split}.bin')
        else:
            lengths.append(np.diff(ends))
            first = int(meta['halves'])  # half of a document bears the hash of the whole
            some = range(first, n['documents']) if tok.kind != 'bpe' or tok.fast else ()  # others' tokenizers may change a text
            if len(some) > most:
                some = np.random.default_rng(0).choice(some, most, replace=False)
            for i in some:
                text = tok.decode(ids[ends[i]:ends[i + 1]]).encode('utf-8')
                checked += 1
                if numbers_of(new_hash(meta['split_seed'], text)) != tuple(hashes[i].tolist()):
                    wrong.append(f'document {i:,} of {split} does not decode to the text that was taken')
                    break
    return wrong, np.concatenate(lengths) if lengths else lengths, checked

def histogram(lengths):
    """Lengths of documents, in powers of two, as bars."""
    print(f'\ntokens in a document: median {int(np.median(lengths)):,}, mean {int(lengths.mean()):,}, longest {int(lengths.max()):,}')
    powers = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    width = max(10, shutil.get_terminal_size((100, 24)).columns - 40)
    for power in range(int(np.flatnonzero(powers)[0]), len(powers)):
        bar = ('█' if 'utf' in (sys.stdout.encoding or '').lower() else '#') * round(width * powers[power] / powers.max())
        print(f'{2 ** power:>12,} .. {2 ** (power + 1) - 1:<12,}{powers[power]:>9,} {bar}')
