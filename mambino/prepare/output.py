"""Writes a dataset: in <out>.partial, which is the journal as well, until it takes the place of
<out> by a rename.

    with output.workplace(folder, target, 'bpe') as work:    # <out>.partial
        written = output.encode(corpus, tok, work, base)     # train, val: .bin, .idx, .hash
        meta = description.describe(...)                     # meta.json
        output.publish(work, folder, meta, tok)              # <out>

What a stopped or killed run has done in the workplace, the same command does not do again.
"""
import contextlib
import glob
import json
import os
import shutil
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from mambino import files
from mambino.configurator import fail
from mambino.plain import number, parse_json, whole
from mambino.prepare import exchange, pool, report, spool, tokens, vocabulary
from mambino.prepare.corpus import HASH, TooLittle
from mambino.prepare.progress import Progress
from mambino.prepare.sources import LOCK, OURS, PARTIAL
from mambino.prepare.spool import FORMAT, SIDES
from mambino.prepare.tables.hub import Unreachable
from mambino.tokenizer import FILE, UnknownCharacter, build_tokenizer, load_tokenizer

GOES_ON = '; the same command goes on from here'
JOURNAL = 'written'  # what of the dataset is written
COMMIT_SECONDS = 3  # so much encoding is lost at most when a run is killed


# -----------------------------------------------------------------------------
# The folder

def name_of(inputs):
    """What the dataset of these inputs is called, where nobody says."""
    if not inputs:
        return 'stdlib'
    path = inputs[0]
    if path.startswith('hf:'):
        return path[3:].split(':')[0].rstrip('/').split('/')[-1]
    parts = os.path.abspath(path).split(os.sep)
    if os.path.isdir(path):
        return parts[-1]
    if os.path.lexists(path):
        return parts[-1].split('.')[0] or parts[-1]
    plain = [part for part in parts if not any(c in part for c in '*?[')]
    return plain[-1]  # the last plain name in a pattern


def check_free(folder, target):
    """Ends the program where `folder` is something else than a dataset; `target`: as the person
    wrote it.
    """
    is_free = not os.path.lexists(folder)
    is_dataset = os.path.isdir(folder) and set(os.listdir(folder)) <= OURS | {'.DS_Store'}
    if not is_free and not is_dataset:
        fail(f'{target}: exists and is not just a dataset; it will not be overwritten, choose another --out')


def is_own(path, folder):
    """Whether this is the dataset to be written, or the workplace for it: where they lie in an
    input, nobody need know.
    """
    return os.path.realpath(path) in (folder, folder + PARTIAL)


@contextlib.contextmanager
def workplace(folder, target, tokenizer):
    """<folder>.partial, for this process alone. Once all is done it is deleted; also where there is
    nothing to go on with. Errors become one line; `target` and `tokenizer`: as the person wrote
    them.
    """
    work = folder + PARTIAL
    lock = None
    is_finished = False
    try:
        lock = open_work(folder)
        yield work
        is_finished = True
    except TooLittle as error:
        is_finished = True
        fail(error)
    except UnknownCharacter as error:
        is_finished = True
        fail(f'tokenizer={tokenizer}: {error}; choose another, or train one on these texts with --tokenizer=bpe')
    except Unreachable as error:
        fail(f'{error}{GOES_ON}')
    except BrokenProcessPool:
        fail(f'a process died, perhaps for want of memory{GOES_ON}; --workers=1 needs the least')
    except KeyboardInterrupt:
        print(f'\nstopped{GOES_ON}', file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        fail(f'{target}: {error.strerror or error}; nothing was changed' + (GOES_ON if lock else ''))
    finally:
        pool.stop()
        if lock:
            if is_finished or not any(name.endswith('.json') for name in os.listdir(work)):
                close_work(work, lock)
            lock.close()


def open_work(folder):
    """Makes <folder>.partial, or tidies up the one that is there. Returns its lock, a file that is
    to stay open.
    """
    work = folder + PARTIAL
    if os.path.isdir(work) and os.listdir(work) and not os.path.exists(os.path.join(work, LOCK)):
        fail(f'{work}: is in the way, and not of prepare.py\'s making; move it, or choose another --out')
    try:
        lock = take_lock(work)
    except files.Held as held:
        pid, host = held.holder.get('pid'), held.holder.get('host')
        who = f' (process {pid} on {host})' if pid else ''
        fail(f'{work}: another prepare.py{who} is at work there; wait for it, or choose another --out')
    old = os.path.join(work, 'old')
    if os.path.isdir(old) and not os.path.lexists(folder):
        os.rename(old, folder)  # a kill in the middle of publish(): the new one was not there yet
    shutil.rmtree(old, ignore_errors=True)
    for path in glob.glob(os.path.join(glob.escape(work), '*.tmp*')):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.remove(path)
    return lock


def take_lock(work):
    """The lock of a workplace, which is made, as an open file; files.Held where another process has it."""
    while True:
        os.makedirs(work, exist_ok=True)
        try:
            lock, _ = files.take(os.path.join(work, LOCK))
        except FileNotFoundError:  # who had it before was just done, and has removed it
            continue
        files.write_holder(lock, files.own_identity())
        return open(lock, 'r+b', buffering=0)


def close_work(work, lock):
    """Deletes it: first what says that something is done, the lock last, which tells whose the
    folder is. What cannot be deleted, the next run will find there.
    """
    done = [JOURNAL, *(name for name in os.listdir(work) if name.endswith('.json')), vocabulary.STAMP]
    for name in [*done, *(set(os.listdir(work)) - {LOCK, *done})]:
        path = os.path.join(work, name)
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.remove(path)
    if os.name == 'nt':
        lock.close()  # there, a file that is open cannot be deleted
    shutil.rmtree(work, ignore_errors=True)


def publish(work, folder, meta, tok):
    """Puts the finished dataset in its place, after making sure that it is on the disk. Where the
    system can, the old one and the new one change places at once, so that there always is one.
    """
    new = os.path.join(work, 'dataset')
    old = os.path.join(work, 'old')
    tok.save(new)
    with open(os.path.join(new, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
    for name in os.listdir(new):
        with open(os.path.join(new, name), 'rb+') as f:
            os.fsync(f.fileno())
    if os.path.isdir(folder):
        os.remove(os.path.join(work, JOURNAL))  # it speaks of the new one, and in its place will be the old one
        if exchange.exchange(new, folder):
            return
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        if os.path.isdir(old):
            os.rename(old, folder)
        raise


# -----------------------------------------------------------------------------
# The dataset that is added to

KINDS_OF_META = dict(splits=dict, kinds=dict, sources=list, decided=list, suspects=list, notes=list, skipped=list,
                     copies=int)


def open_base(folder, target, explicit):
    """(meta.json of the dataset with its 'folder', its tokenizer): its settings hold. Ends the
    program where there is none, or where what the person set is something else. explicit: {name:
    value} of what was set.
    """
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            base = parse_json(f.read())
        if base['format'] != FORMAT:
            fail(f'{target}: made by an older prepare.py; prepare it anew, with everything that is to be in it')
        tok = load_tokenizer(folder)
        if tok.sha256() != base['tokenizer']['sha256']:
            fail(f'{target}: its tokenizer.json is not the one it was made with')
        if not whole(base['split_seed'], most=2**63) or not number(base['val_fraction']):
            raise ValueError('its split_seed and val_fraction are no numbers')
        int(base['split_limit'] or '0', 16)
        for name, kind in KINDS_OF_META.items():
            if not isinstance(base.get(name, kind()), kind):
                raise ValueError(f'its {name} are damaged')
        if not all(whole(base['splits'][split]['bytes'], 0, 2**62) for split in SIDES.values()):
            raise ValueError('its splits have no bytes')
        for name in ('split_seed', 'val_fraction'):
            value = base[name]
            if explicit.get(name, value) != value:
                fail(f'{target} was made with {name}={value}, and --append keeps to it: leave --{name} out')
        kind = base['tokenizer']['kind']
        wanted = explicit.get('tokenizer', kind)
        is_other = wanted != kind
        if is_other and wanted not in ('char', 'byte', 'bpe'):
            is_other = build_tokenizer(wanted).sha256() != tok.sha256()
        if is_other or explicit.get('vocab_size', tok.vocab_size) < tok.vocab_size:
            fail(f'{target} has a tokenizer of kind {kind} with {tok.vocab_size} ids, and --append keeps it: '
                 'leave --tokenizer and --vocab_size out, or make another dataset with --out')
        return base | {'folder': folder}, tok
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f'{target}: no dataset to append to ({type(error).__name__}: {error}); '
             'prepare it without --append first')


def decided_before(base):
    """The arguments of Corpus.decide that a dataset to add to has for it; none without one."""
    if not base:
        return {}
    hashes = {}
    for side, name in SIDES.items():
        hashes[side] = np.fromfile(os.path.join(base['folder'], name + '.hash'), HASH)
    if base['split_limit']:
        limit = int(base['split_limit'], 16)
    else:  # it was one document
        limit = int(base['val_fraction'] * 2 ** 64)
    size = sum(split['bytes'] for split in base['splits'].values())
    return {'known': hashes, 'limit': limit, 'bytes_before': size}


# -----------------------------------------------------------------------------
# Documents to ids

class Written(NamedTuple):
    """What encode() has written."""
    splits: dict   # {'train', 'val'} -> {'tokens', 'documents', 'bytes'}; with conversations also 'learned'
    sha256: dict   # of each file
    kinds: list    # tokens by kind, in the order of spool.KINDS
    talks: int     # conversations
    mended: int    # of these, in which what the system says stands before the first question
    refused: list  # [kind, characters, why] of those that the tokenizer's template does not take


class Output:
    """The six files of the dataset, in <work>/dataset. commit() makes what was written last, and
    says so in the journal; a run that goes on cuts off whatever is beyond.
    """

    def __init__(self, work, made_of, base):
        self.folder = os.path.join(work, 'dataset')
        self.journal = os.path.join(work, JOURNAL)
        self.state = {}
        if os.path.exists(self.journal):
            with open(self.journal, encoding='utf-8') as f:
                self.state = parse_json(f.read())
        if self.state.get('made_of') != made_of or not os.path.isdir(self.folder):
            self.begin(made_of, base)
        self.files = {}
        for name, size in self.state['sizes'].items():
            self.files[name] = open(os.path.join(self.folder, name), 'rb+')
            self.files[name].truncate(size)
            self.files[name].seek(size)
        self.committed = time.time()

    def begin(self, made_of, base):
        """Nothing is written yet but what the base has."""
        if os.path.exists(self.journal):
            os.remove(self.journal)  # it spoke of files that are about to go
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        self.state = {
            'made_of': made_of,
            'block': 0,   # the next one
            'sizes': {},  # of the files, bytes
            'kinds': [0] * len(spool.KINDS),
            'bytes': dict.fromkeys(SIDES.values(), 0),
            'learned': dict.fromkeys(SIDES.values(), 0),
            'talks': base.get('conversations', 0),
            'mended': 0,
            'refused': [],
        }
        for name in SIDES.values():
            path = os.path.join(self.folder, name)
            if base:
                split = base['splits'][name]
                self.state['bytes'][name] = split['bytes']
                self.state['learned'][name] = split.get('learned', split['tokens'])
                for ending in ('.bin', '.idx', '.hash'):
                    shutil.copyfile(os.path.join(base['folder'], name + ending), path + ending)
            else:
                first = np.zeros(1, '<u8')  # the first document begins at 0
                for ending, data in ('.bin', b''), ('.idx', first.tobytes()), ('.hash', b''):
                    with open(path + ending, 'wb') as f:
                        f.write(data)
            if base and base['split_limit'] is None:
                self.close_half(name, base)  # it was one document: now its halves are closed
        for name in sorted(os.listdir(self.folder)):
            self.state['sizes'][name] = os.path.getsize(os.path.join(self.folder, name))

    def close_half(self, name, base):
        """Puts the end-of-text id behind a split that is half of one document; it is not learned
        behind a conversation."""
        path = os.path.join(self.folder, name)
        is_learned = not base.get('conversations')
        self.state['learned'][name] += is_learned
        kind = next(iter(base['kinds']))
        self.state['kinds'][spool.KINDS.index(kind)] += 1
        with open(path + '.bin', 'ab') as f:
            f.write(np.array([base['eot'] if is_learned else -1 - base['eot']], '<i4').tobytes())
            end = f.tell() // 4
        with open(path + '.idx', 'rb+') as f:
            f.seek(8)
            f.write(np.array([end], '<u8').tobytes())

    def add(self, block, result):
        """What tokens.encode made of a block."""
        for side, name in SIDES.items():
            ids, offsets, hashes = result[side]
            before = self.files[name + '.bin'].tell() // 4
            offsets = offsets + np.uint64(before)
            self.files[name + '.bin'].write(ids.tobytes())
            self.files[name + '.idx'].write(offsets.astype('<u8').tobytes())
            self.files[name + '.hash'].write(hashes.tobytes())
            self.state['bytes'][name] += result['bytes'][side]
            self.state['learned'][name] += result['learned'][side]
            self.state['talks'] += result['talks'][side]
            self.state['mended'] += result['mended'][side]
        self.state['refused'] += result['refused']
        self.state['kinds'] = [a + int(b) for a, b in zip(self.state['kinds'], result['kinds'])]
        self.state['block'] = block + 1
        if time.time() - self.committed > COMMIT_SECONDS:
            self.commit()

    def commit(self):
        for name, f in self.files.items():
            f.flush()
            os.fsync(f.fileno())
            self.state['sizes'][name] = f.tell()
        with open(self.journal + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(self.state, f)
        os.replace(self.journal + '.tmp', self.journal)
        self.committed = time.time()

    def close(self):
        """Returns Written."""
        self.commit()
        for f in self.files.values():
            f.close()
        sizes = self.state['sizes']
        splits = {}
        for name in SIDES.values():
            splits[name] = {
                'tokens': sizes[name + '.bin'] // 4,
                'documents': sizes[name + '.idx'] // 8 - 1,
                'bytes': self.state['bytes'][name],
            }
            if self.state['talks']:
                splits[name]['learned'] = self.state['learned'][name]
        sha256 = {name: report.sha256(os.path.join(self.folder, name)) for name in sizes}
        return Written(splits, sha256, *(self.state[name] for name in ('kinds', 'talks', 'mended', 'refused')))


def encode(corpus, tok, work, base):
    """Encodes the blocks that the journal has not yet, in many processes. Returns Written."""
    made_of = spool.digest([
        spool.JOURNAL, tok.sha256(), tok.eot, tok.bos, tok.config, corpus.decision(), base.get('sha256')])
    output = Output(work, made_of, base)
    first = output.state['block']
    blocks = len(corpus.blocks)
    if first:
        print(f'going on: {first:,} of {blocks:,} blocks were encoded before')
    wanted = [i for i in range(first, blocks) if corpus.use[corpus.rows_of(i)].any()]
    sizes = [corpus.blocks[i][1][2] for i in wanted]
    tasks = (encode_task(corpus, i, tok, work) for i in wanted)
    with Progress('encoding', sum(sizes)) as progress:
        results = pool.map_tasks(tokens.encode, tasks, window=4 * pool.processes())
        for i, size, result in zip(wanted, sizes, results):
            output.add(i, result)
            progress.add(size)
    with Progress('hashing', also='what was written'):
        return output.close()


def encode_task(corpus, i, tok, work):
    """The task for tokens.encode that is block i; a corpus of one document gets no end-of-text."""
    key, block = corpus.blocks[i]
    inside = corpus.rows_of(i)
    used = inside.start + np.flatnonzero(corpus.use[inside])
    cut = None
    if corpus.cut and corpus.cut[0] in used:
        row, chars = corpus.cut
        cut = int(np.searchsorted(used, row)), chars
    settings = json.dumps({'eot': tok.eot, 'bos': tok.bos, 'config': tok.config})
    return {
        'folder': work, 'key': key, 'block': block, 'rows': corpus.rows[used], 'use': corpus.use[used],
        'tokenizer': (os.path.join(work, 'tokenizer', FILE), tok.sha256(), settings),
        'opening': tok.opening(), 'closing': [tok.eot] if corpus.limit else [], 'cut': cut,
    }
