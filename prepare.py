"""
Turns files and folders into a dataset: token ids for training and validation, and the tokenizer that made them.

    python prepare.py                                          # Python's own standard library -> data/stdlib
    python prepare.py my_folder notes.txt --out=data/mine      # text and source code, found recursively
    python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char

    find files ──► read, normalise, hash ──► documents (one temporary file) ──► build the tokenizer ──► encode
                      │ what cannot be read is skipped, with its reason in meta.json        │
                      ▼                                                                     ▼
              hash < val_fraction ? val : train                             train.bin, val.bin, meta.json

A document goes to train or val by a hash of its content, so the split survives reordering and reruns, and duplicates
stay on one side; each document is closed by the end-of-text id. A corpus of one document is split by position instead,
its last val_fraction being val, and gets no end-of-text. Ids are flat little-endian int32.
All of it is written to a temporary folder beside `out`, which takes its place at the very end: a run that is stopped,
or fills the disk, leaves an older dataset as it was.
"""
import collections
import datetime
import difflib
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import struct
import sys
import sysconfig
import time

import numpy as np

from configurator import configure, fail
from tokenizer import build

inputs = []  # files and folders; none: the Python standard library, some 12 MB of good code that everybody has
# --- dataset ---
out = ''              # where to write; '' is data/<name of the first input>
# --- tokens ---
tokenizer = 'bpe'     # char, byte, bpe (trained on these texts), gpt2, or the path of a tokenizer.json
vocab_size = 4096     # of a bpe trained here, at most: small, for the embedding of a small model is most of its weights
sample_mb = 100.0     # a bpe is trained on so much, taken evenly from the train documents; its memory grows with it
# --- split ---
val_fraction = 0.1    # share of documents (or of the one document) kept for validation, between 0 and 1
split_seed = 1337     # another seed is another split
# --- limits ---
max_file_mb = 256.0   # larger files found in folders are skipped, most are dumps; name such a file to have it read
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    configure(globals(), positional='inputs')

class Skip(Exception):
    """This file cannot be used; the message is the reason, a few words that can be counted."""

# -----------------------------------------------------------------------------
# Readers. A reader takes a path and yields the documents in it, as str, or raises Skip. READERS says which one is for
# which extension: a new format is a function and a line there.

def read_text(path):
    """One document: the whole file. The encoding is UTF-8, UTF-16/32 with a BOM, or, as a guess, cp1252."""
    with open(path, 'rb') as f:
        data = f.read()
    encoding = 'utf-8-sig'
    if data.startswith((b'\xff\xfe\0\0', b'\0\0\xfe\xff')):
        encoding = 'utf-32'
    elif data.startswith((b'\xff\xfe', b'\xfe\xff')):
        encoding = 'utf-16'
    elif b'\0' in data:
        raise Skip('binary')
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        # Western European text has few bytes above 127 and no control characters; all else would become noise
        control = sum(data.count(b) for b in range(32) if b not in b'\t\n\f\r\x1b')
        if control or len(data.translate(None, bytes(range(128)))) > 0.3 * len(data):
            raise Skip('neither UTF-8 nor Western text') from None
        try:
            text = data.decode('cp1252')
        except UnicodeDecodeError:
            raise Skip('neither UTF-8 nor Western text') from None
        guessed.append({'file': path, 'encoding': 'cp1252'})
    yield text

TEXT = '''
    txt text md markdown mdx rst adoc asciidoc org tex bib ltx sty cls log srt vtt po pot diff patch
    html htm xhtml css scss sass less xml xsl xsd svg json jsonl ndjson json5 yaml yml toml ini cfg conf properties env
    csv tsv sql graphql proto thrift ipynb
    py pyi pyx pxd js mjs cjs jsx ts tsx vue svelte java kt kts scala groovy clj cljs cljc c h cc cpp cxx hh hpp hxx inl
    cu cuh cl m mm cs fs fsi fsx vb go rs swift zig nim d v sv vhd vhdl rb pl pm php lua r rmd jl hs lhs ml mli elm erl
    hrl ex exs dart lisp lsp el scm rkt f f90 f95 f03 for pas pp ada adb ads cob asm s awk sed tcl sh bash zsh fish ps1
    bat cmd cmake mk mak gradle bazel bzl nix tf hcl dockerfile vim glsl hlsl wgsl metal sol coq lean agda idr
'''
READERS = {'.' + extension: read_text for extension in TEXT.split()}
READERS[''] = read_text  # Makefile, README, LICENSE; a binary is recognised by its content

# -----------------------------------------------------------------------------
# Find and read

skipped, guessed = [], []  # {'file', 'reason'} and {'file', 'encoding'}, for meta.json
OURS = {'train.bin', 'val.bin', 'meta.json', 'tokenizer.json'}
WORK = re.compile(r'\.tmp-\d+(-old)?$')  # how a temporary folder's name ends
NOT_STDLIB = {'test', 'tests', 'idle_test', 'testing', 'site-packages', 'dist-packages', '__pycache__'}

def is_dataset(folder):
    return {'train.bin', 'val.bin', 'meta.json'} <= set(os.listdir(folder)) <= OURS

def skip(path, reason):
    skipped.append({'file': path, 'reason': reason})

def find_files(paths):
    """Every usable-looking file under `paths`, once, as a sorted list of (path, reader); records the others."""
    found, seen = {}, set()  # path -> reader; real paths, for links may lead in circles

    def add(path, named):
        reader = READERS.get(os.path.splitext(path)[1].lower(), read_text if named else None)
        real = os.path.realpath(path)
        if reader is None:
            skip(path, f'unknown type {os.path.splitext(path)[1].lower()}')
        elif not os.path.isfile(path):
            skip(path, 'no regular file')
        elif not named and file_size(path) > max_file_mb * 1e6:
            skip(path, f'larger than {max_file_mb:g} MB')
        elif real not in seen:
            seen.add(real)
            found[path] = reader

    for path in paths:
        if not os.path.isdir(path):
            add(path, named=True)
            continue
        unreadable = lambda error: skip(error.filename, error.strerror)
        for folder, folders, files in os.walk(path, onerror=unreadable, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders[:] = []
                continue
            seen.add(real)
            for name in sorted(folders + files):
                full = os.path.join(folder, name)
                if name.startswith('.'):
                    skip(full, 'hidden')
                elif name in files:
                    add(full, named=False)
                elif WORK.search(name) or (os.access(full, os.R_OK) and is_dataset(full)):
                    skip(full, 'a prepared dataset')
                else:
                    continue
                if name in folders:
                    folders.remove(name)
            folders.sort()
    return sorted(found.items())

def find_stdlib():
    """The standard library's own .py files, without its tests."""
    found = []
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - NOT_STDLIB)
        found += [(os.path.join(folder, name), read_text) for name in files if name.endswith('.py')]
    return sorted(found)

def collect(files, spool):
    """
    Reads every file once and writes its documents into `spool`, each as (hash, length, UTF-8). Returns the number of
    documents and of bytes, and the smallest and largest hash.
    """
    total, done, began = sum(file_size(path) for path, _ in files), 0, time.time()
    count, size, low, high = 0, 0, 2 ** 64, -1
    with open(spool, 'wb') as f:
        for path, reader in files:
            before = count
            try:
                for data in reading(reader, path):
                    digest = hashlib.blake2b(data, digest_size=8, key=str(split_seed).encode()).digest()
                    number = int.from_bytes(digest, 'big')
                    f.write(struct.pack('<QQ', number, len(data)) + data)
                    count, size, low, high = count + 1, size + len(data), min(low, number), max(high, number)
                if count == before:
                    raise Skip('empty')
            except Skip as reason:
                skip(path, str(reason))
            done += file_size(path)
            progress('reading', done, total, began)
    progress('reading', total, total, began, last=True)
    return count, size, low, high

def reading(reader, path):
    """The documents of one file, as UTF-8; whatever goes wrong in there is a reason to skip the file, and no more."""
    try:
        for text in reader(path):
            if text.strip():
                yield text.replace('\r\n', '\n').encode('utf-8')
    except OSError as error:
        raise Skip(error.strerror or 'unreadable') from None
    except (ValueError, MemoryError) as error:
        raise Skip(f'unreadable ({type(error).__name__})') from None

def file_size(path):
    """Bytes; 0 for a file that has vanished meanwhile, which is found out when it is read."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0

# -----------------------------------------------------------------------------
# Split, tokenize, write

def documents(spool, low, high):
    """Yields ('train' or 'val', text) in the order of the files."""
    # val is every hash below the limit, moved where needed so that neither side is empty
    limit = min(max(int(val_fraction * 2 ** 64), low + 1), high)
    with open(spool, 'rb') as f:
        while head := f.read(16):
            number, length = struct.unpack('<QQ', head)
            text = f.read(length).decode('utf-8')
            if low == high:  # one document
                n = int(len(text) * (1 - val_fraction))
                if not 0 < n < len(text):
                    fail(f'{len(text)} characters are too few to split at val_fraction={val_fraction}')
                yield 'train', text[:n]
                yield 'val', text[n:]
                return
            yield 'val' if number < limit else 'train', text

def sample(texts, total_bytes):
    """All of the texts, or where they are more than sample_mb every k-th stretch of them."""
    every = max(1, -int(-total_bytes // (sample_mb * 1e6)))
    stretch = 1 << 16
    number = 0
    for text in texts:
        if every == 1:
            yield text
            continue
        for start in range(0, len(text), stretch):
            if number % every == 0:
                yield text[start:start + stretch]
            number += 1

def write_splits(tok, docs, closing, total_bytes, folder):
    """Encodes `docs` into train.bin and val.bin; returns the counts of each split."""
    splits = {name: {'tokens': 0, 'documents': 0, 'bytes': 0} for name in ('train', 'val')}
    files = {name: open(os.path.join(folder, name + '.bin'), 'wb') for name in splits}
    began, batch, waiting = time.time(), [], 0

    def flush():
        try:
            encoded = tok.encode_batch([text for _, text in batch])
        except ValueError as error:  # a char vocabulary from elsewhere
            fail(f'tokenizer={tokenizer}: {error}')
        for (name, text), ids in zip(batch, encoded):
            ids = np.concatenate([ids, np.array(closing, dtype=np.int32)])
            files[name].write(ids.astype('<i4').tobytes())
            for key, n in (('tokens', len(ids)), ('documents', 1), ('bytes', len(text.encode('utf-8')))):
                splits[name][key] += n
        batch.clear()
        progress('encoding', sum(split['bytes'] for split in splits.values()), total_bytes, began)

    try:
        for name, text in docs:
            batch.append((name, text))
            waiting += len(text)
            if waiting > 4e6:  # characters: enough for all threads, and memory stays bounded
                flush()
                waiting = 0
        flush()
        progress('encoding', total_bytes, total_bytes, began, last=True)
    finally:
        for f in files.values():
            f.close()
    return splits

def replace_folder(new, old):
    """Puts the finished folder `new` in the place of `old`, after making sure that it is on the disk."""
    for name in os.listdir(new):
        with open(os.path.join(new, name), 'rb+') as f:
            os.fsync(f.fileno())
    aside = new + '-old'
    if os.path.isdir(old):
        os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        if os.path.isdir(aside):
            os.rename(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)

# -----------------------------------------------------------------------------
# Talk

_shown = 0.0  # when progress() last printed

def progress(what, done, total, began, last=False):
    """One line that is rewritten on a terminal; elsewhere a line every half minute, and one at the end."""
    global _shown
    terminal, now = sys.stdout.isatty(), time.time()
    if not last and (now - _shown < (0.2 if terminal else 30) or now - began < (0.5 if terminal else 30)):
        return  # too soon to say something new, or to know the rate
    _shown, seconds = now, max(now - began, 1e-3)
    rate = done / seconds
    left = f'{(total - done) / max(rate, 1):5.0f} s left' if not last else f'in {seconds:.1f} s'
    line = f'{what:<9} {done / 1e6:9.1f} of {total / 1e6:.1f} MB {rate / 1e6:7.1f} MB/s  {left}'
    print(f'\r{line:<72}' if terminal else line, end='' if terminal and not last else '\n', flush=True)

def show_result(splits, name):
    print(f'\n{"":<6}{"documents":>12}{"bytes":>16}{"tokens":>16}{"bytes/token":>14}')
    for split, n in splits.items():
        print(f'{split:<6}{n["documents"]:>12,}{n["bytes"]:>16,}{n["tokens"]:>16,}{n["bytes"] / n["tokens"]:>14.2f}')
    if skipped:
        print(f'skipped {len(skipped):,}: {reasons()}; meta.json names them')
    if guessed:
        print(f'guessed the encoding of {len(guessed):,}: cp1252')
    print(f'\nnow: python train.py --dataset={name}')

def reasons():
    counts = collections.Counter(entry['reason'] for entry in skipped).most_common()
    return ', '.join(f'{n:,} {reason}' for reason, n in counts[:8]) + (', ...' if len(counts) > 8 else '')

def check_input(path):
    if not os.path.lexists(path):
        parent = os.path.dirname(path)
        names = os.listdir(parent or '.') if os.path.isdir(parent or '.') else []
        near = difflib.get_close_matches(os.path.basename(path), names, n=1, cutoff=0.5)
        fail(f'{path}: no such file or folder' + (f', did you mean {os.path.join(parent, near[0])}?' if near else ''))

def main():
    if not 0 < val_fraction < 1:
        fail(f'val_fraction={val_fraction}: must lie between 0 and 1')
    if not sample_mb > 0:
        fail(f'sample_mb={sample_mb}: must be above 0')
    for path in inputs:
        check_input(path)
    first = os.path.basename(os.path.abspath(inputs[0])) if inputs else 'stdlib'
    if inputs and os.path.isfile(inputs[0]):
        first = os.path.splitext(first)[0]
    target = out or os.path.join('data', first)
    place = os.path.realpath(target)
    if os.path.lexists(place) and not (os.path.isdir(place) and (not os.listdir(place) or is_dataset(place))):
        fail(f'{target}: exists and is not just a dataset; it will not be overwritten, choose another --out')
    for path in glob.glob(glob.escape(place) + '.tmp-*'):
        print(f'note: {path} is from a run that was killed; unless it still runs, delete it')
    tok = build(tokenizer) if tokenizer not in ('char', 'bpe') else None  # first, for it may not exist

    files = find_files(inputs) if inputs else find_stdlib()
    work = f'{place}.tmp-{os.getpid()}'
    spool = os.path.join(work, 'documents.tmp')
    try:
        os.makedirs(work)
        count, size, low, high = collect(files, spool)
        if not count:
            fail(f'{", ".join(inputs) or "standard library"}: nothing readable' + (f' ({reasons()})' if skipped else ''))
        if tok is None:
            began = time.time()
            docs = documents(spool, low, high)
            texts = (text for split, text in docs if split == 'train' or tokenizer == 'char')
            tok = build(tokenizer, texts if tokenizer == 'char' else sample(texts, size), vocab_size)
            print(f'tokenizer {tok.vocab_size:9,} ids{"":<26}in {time.time() - began:.1f} s')
        closing = [] if low == high else [tok.eot]
        splits = write_splits(tok, documents(spool, low, high), closing, size, work)
        os.remove(spool)
        meta = {
            'format': 1, 'dtype': 'int32', 'vocab_size': tok.vocab_size, 'eot': tok.eot,
            'tokenizer': {'kind': tok.kind, 'file': tok.save(work), 'sha256': tok.sha256()},
            'splits': splits, 'split_seed': split_seed, 'val_fraction': val_fraction,
            'sources': inputs or [f'Python {platform.python_version()} standard library'],
            'skipped': skipped, 'guessed': guessed,
            'created': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        }
        with open(os.path.join(work, 'meta.json'), 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        replace_folder(work, place)
    except KeyboardInterrupt:
        print('\nstopped; nothing was changed', file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        fail(f'{target}: {error.strerror or error}; nothing was changed')
    finally:
        shutil.rmtree(work, ignore_errors=True)
    inside = os.path.relpath(place, os.path.realpath('data'))
    show_result(splits, target if inside.startswith('..') else inside)

if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that main's `finally` is reached
    main()
