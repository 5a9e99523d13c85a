"""The datasets in data/, and the folders of this machine from which one chooses what becomes one.

    names()                         # the one prepared last first
    facts_of('stdlib')              # tokens, documents, tokenizer, sizes
    windows('stdlib', 3, seed=1)    # [(place, text), …] of random places
    lengths('stdlib')               # [(the least length, documents), …], in powers of two
    listing('/home/me')             # [Entry, …]: folders first

Only what stands in the files is read, and little of it: the tokens are mapped, not loaded.
"""
import os
from typing import NamedTuple

import numpy as np

from mambino import files
from mambino.chat import visible
from mambino.plain import parse_json
from mambino.prepare import tokens
from mambino.tokenizer import load_tokenizer

ROOT = 'data'
WINDOW = 120            # tokens of a look at a random place
MOST_ENTRIES = 500      # of a folder that are shown


class NoDataset(Exception):
    """It is not there, or not as it was made."""


# --- datasets -------------------------------------------------------------------------------------

def names():
    """Names of the datasets, the one prepared last first."""
    try:
        found = [name for name in os.listdir(ROOT) if not name.endswith('.partial')]
    except OSError:
        return []
    times = {}
    for name in found:
        try:
            times[name] = os.path.getmtime(os.path.join(ROOT, name, 'meta.json'))
        except OSError:
            pass
    return sorted(times, key=times.get, reverse=True)


def folder_of(name):
    """The folder of a dataset; NoDataset if there is none of this name."""
    if name not in names():
        raise NoDataset(f'{name}: no such dataset in {ROOT}/')
    return os.path.join(ROOT, name)


def meta_of(name):
    """Its meta.json; NoDataset if that cannot be read."""
    try:
        with files.open_plain(os.path.join(folder_of(name), 'meta.json')) as f:
            meta = parse_json(f.read().decode('utf-8'))
        splits = {split: (int(n['tokens']), int(n['documents'])) for split, n in meta['splits'].items()}
        if not {'train', 'val'} <= splits.keys():
            raise ValueError
        return meta
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise NoDataset(f'{name}: its meta.json is not as prepare.py wrote it') from None


def facts_of(name):
    """{'name', 'train', 'val', 'documents', 'tokenizer', 'vocab_size', 'bytes', 'sources',
    'skipped', 'conversations'} of a dataset."""
    meta = meta_of(name)
    folder = folder_of(name)
    splits = meta['splits']
    size = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))
    sources = meta.get('sources')
    return dict(
        name=name, train=splits['train']['tokens'], val=splits['val']['tokens'],
        documents=splits['train']['documents'] + splits['val']['documents'],
        tokenizer=str((meta.get('tokenizer') or {}).get('kind', '?')), vocab_size=meta.get('vocab_size', 0), bytes=size,
        sources=[str(source) for source in sources] if isinstance(sources, list) else [],
        skipped=len(meta.get('skipped') or ()), conversations=meta.get('conversations', 0))


def windows(name, n=3, seed=0, length=WINDOW):
    """[(place, text), …] of so many random places of the train split. NoDataset if it cannot be read."""
    folder = folder_of(name)
    size = meta_of(name)['splits']['train']['tokens']
    try:
        tok = load_tokenizer(folder)
        ids = np.memmap(os.path.join(folder, 'train.bin'), '<i4', 'r')
    except (OSError, ValueError) as error:
        raise NoDataset(f'{name}: cannot be read: {error}') from None
    size = min(size, len(ids))
    starts = np.random.default_rng(seed).integers(0, max(1, size - length), n).tolist()
    looks = []
    for start in sorted(starts):
        around = max(0, start - 3)
        nearby = visible(np.array(ids[around:start + length + 3]))
        first, last = tok.whole(nearby, start - around, min(size, start + length) - around)
        looks.append((start, tokens.readable(tok, nearby[first:last], begins=around + first == 0)))
    return looks


def lengths(name):
    """[(the least length, documents), …] of both splits, in powers of two; documents without a
    token count as of one."""
    found = []
    for split in ('train', 'val'):
        try:
            offsets = np.fromfile(os.path.join(folder_of(name), f'{split}.idx'), '<u8').astype(np.int64)
        except OSError:
            raise NoDataset(f'{name}: {split}.idx cannot be read') from None
        found.append(np.diff(offsets))
    found = np.concatenate(found)
    if not len(found) or found.min() < 0:
        return []
    powers = np.bincount(np.log2(np.maximum(found, 1)).astype(int))
    first = int(np.flatnonzero(powers)[0])
    return [(2 ** power, int(powers[power])) for power in range(first, len(powers))]


# --- folders --------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """What a folder holds."""
    name: str
    path: str
    is_folder: bool
    size: int           # bytes of a file


def listing(folder):
    """([Entry, …] of a folder, folders first, without hidden ones; how many more there are).
    OSError if it cannot be read."""
    entries = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith('.'):
                continue
            try:
                is_folder = entry.is_dir()
                size = 0 if is_folder else entry.stat().st_size
            except OSError:             # a link to nowhere
                continue
            entries.append(Entry(entry.name, entry.path, is_folder, size))
    entries.sort(key=lambda entry: (not entry.is_folder, entry.name.lower()))
    return entries[:MOST_ENTRIES], max(0, len(entries) - MOST_ENTRIES)
