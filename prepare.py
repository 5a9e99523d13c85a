"""
Turns whatever you have into a dataset: token ids for training and validation, and the tokenizer that made them.

    python prepare.py                                          # Python's own standard library -> data/stdlib
    python prepare.py my_folder notes.txt --out=data/mine      # text, code, PDF, parquet, ...: all that is found there
    python prepare.py --inspect data/mine                      # what is in a dataset, and whether it is sound

    find         sources.py     files, folders and patterns ──► sources, in an order of their own
    extract      readers.py     sources ──► documents: clean text, on disk; in many processes (isolate.py, spool.py, parallel.py)
    decide       corpus.py      copies are dropped; train or val
    tokenizer    tokenizer.py   given, or trained on a sample
    encode       spool.py       documents ──► ids; in many processes
    publish      here           <out>/{train,val}.bin, .idx, .hash, meta.json, tokenizer.json

A document goes to train or val by a hash of its content, so the split survives reordering and reruns, and copies
stay on one side; one that alone is more than val_fraction of the whole goes to train. Each is closed by the end-of-text id.
A corpus of one document is split by position instead, its last val_fraction being val, and gets no end-of-text.
Ids are flat little-endian int32.
    .idx   uint64: where the documents begin in the .bin, and at last where it ends
    .hash  16 bytes a document: the hash of its text

All of it happens in <out>.partial, which also is the journal: what a stopped or killed run has done there, the same command
does not do again. The finished folder takes the place of `out` by a rename. What is in it depends on the files and the
settings alone: not on the number of processes, the order of the arguments, or how often the run was interrupted.
"""
import glob
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from mambino.prepare import parallel
from mambino.prepare import report
from mambino.prepare import sources
from mambino.prepare import spool
from mambino.configurator import configure, fail, require
from mambino.prepare.corpus import HASH, Corpus, TooLittle
from mambino.prepare.readers import Unreachable, open_hf, unreachable
from mambino.prepare.spool import FORMAT, TRAIN, VAL
from mambino.tokenizer import UnknownCharacter, build_tokenizer, load_tokenizer

inputs = []  # files, folders, 'patterns/**/*.md', hf:name; none: the Python standard library, 12 MB of good code
# --- dataset ---
out = ''              # where to write; '' is data/<name of the first input>
append = False        # add the inputs to the dataset in `out`, with its tokenizer, instead of replacing it
dry_run = False       # only list what would be taken and what not
inspect = False       # the inputs are datasets: show and check them
# --- what is taken ---
exclude = ''          # what else to leave out of folders, as in a .gitignore: 'build/,*.log'; see JUNK for what always is
gitignore = True      # leave out what .gitignore files in the folders name
max_file_mb = 256.0   # larger files found in folders are skipped, most are dumps; tables and files you name are not (packed
                      # ones are, if they hold more)
text_column = ''      # of parquet, jsonl, csv, arrow and hf; '' is the only one, or one called text, content, body, ...
dedupe = True         # drop documents that are exactly like an earlier one; near copies stay
pdf = 'auto'          # pypdf; or pypdfium2, faster, a package of its own; auto is the latter when installed
file_seconds = 60.0   # of computing that a PDF or an HTML page may take; for a PDF half a second more with each page
file_memory_mb = 1024.0  # that it may need (Linux)
# --- tokens ---
tokenizer = 'bpe'     # char, byte, bpe (trained on these texts), gpt2, or the path of a tokenizer.json
vocab_size = 4096     # of a bpe trained here, at most: small, for the embedding of a small model is most of its weights
sample_mb = 100.0     # a bpe is trained on about so much, taken evenly from the train documents; its memory grows with it
# --- split ---
val_fraction = 0.1    # share of documents (or of the one document) kept for validation, between 0 and 1
split_seed = 1337     # another seed is another split
# --- machine ---
workers = 0           # processes; 0 is one for each core
engine = 'local'      # or ray: the same work on a Ray cluster with a shared file system; without a cluster, on this machine
# -----------------------------------------------------------------------------
explicit = configure(globals(), positional='inputs') if __name__ == '__main__' else {}

JUNK = '__pycache__/,node_modules/,site-packages/,*.min.js,*.min.css,*.map,*.lock,package-lock.json'  # --exclude='!*.lock' has them
TASK_BYTES, TASK_FILES = 8_000_000, 200  # sources are read in tasks of about so much
SIDES = {TRAIN: 'train', VAL: 'val'}

# -----------------------------------------------------------------------------
# Extract: sources to documents

def plan(found, work):
    """The tasks that turn the sources into documents; what a task is called says all that its result depends on."""
    engine_of_pdf = pdf_engine()
    options = dict(text_column=text_column, max_file_mb=max_file_mb, pdf=engine_of_pdf[0], file_seconds=file_seconds,
                   file_memory_mb=file_memory_mb)
    tasks, cost = [], 0
    for source in found:
        parts = shards_of(source.path) if source.kind == 'hf' else [None]
        for shard in parts:
            more = max(source.size * 20, 1_000_000) if source.kind == 'pdf' else source.size
            if not tasks or cost + more > TASK_BYTES or len(tasks[-1]['sources']) >= TASK_FILES or source.kind == 'hf':
                tasks.append(dict(folder=work, cwd=os.getcwd(), sources=[], seed=split_seed, chars=tokenizer == 'char',
                                  options=options | ({'shard': shard} if shard else {})))
                cost = 0
            tasks[-1]['sources'].append(list(source))
            cost += more
    for task in tasks:
        task['key'] = digest([FORMAT, engine_of_pdf, [task[name] for name in ('sources', 'seed', 'chars', 'options')]])[:32]
    return tasks

def pdf_engine():
    """(name, version) of what reads PDFs."""
    if pdf not in ('auto', 'pypdf', 'pypdfium2'):
        fail(f'pdf={pdf}: it is auto, pypdf or pypdfium2')
    for name in ['pypdfium2', 'pypdf'] if pdf == 'auto' else [pdf]:
        try:
            from importlib.metadata import PackageNotFoundError, version
            return name, version(name)
        except PackageNotFoundError:
            pass
    fail(f'pdf={pdf}: this package is not installed: pip install {name}')

def shards_of(spec):
    """[(number of shards, index)] of a streamed dataset, to be read side by side."""
    try:
        rows = open_hf(spec)
    except ImportError:
        fail(f'{spec}: needs the package datasets: pip install datasets')
    except Exception as error:  # the hub, the net, the formats behind it: anything
        fail(unreachable(spec, error))
    n = getattr(rows, 'num_shards', 1)
    return [(n, i) for i in range(n)]

def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

def extract_all(tasks, work):
    """Does what the journal has not yet. Returns the reports, in the order of the tasks."""
    done = {task['key']: spool.report_of(work, task['key']) for task in tasks}
    todo = [task for task in tasks if not done[task['key']] or done[task['key']]['again']]
    if len(todo) < len(tasks):
        print(f'going on: {len(tasks) - len(todo):,} of {len(tasks):,} parts were read before')
    total = sum(source[2] for task in todo for source in task['sources'])
    bar = report.Progress('reading', total)
    for size in parallel.run(spool.extract, todo, 64):
        bar.add(size)
    bar.close()
    done.update({task['key']: spool.report_of(work, task['key']) for task in todo})
    return [done[task['key']] for task in tasks]

# -----------------------------------------------------------------------------
# Tokenizer

def make_tokenizer(given, corpus, reports, work, decided):
    """The tokenizer, in `work`/tokenizer: the given one, or one that is built, unless a run before this one did that."""
    folder, began = os.path.join(work, 'tokenizer'), time.time()
    stamp = os.path.join(folder, 'made_of')
    made_of = given.sha256() if given else digest([tokenizer, vocab_size, sample_mb, split_seed, decided])
    if os.path.exists(stamp) and open(stamp, encoding='utf-8').read() == made_of:
        return given or load_tokenizer(folder)
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(stamp):
        os.remove(stamp)
    if given:
        given.save(folder)
    elif tokenizer == 'char':
        build_tokenizer('char', [done['chars'] for done in reports]).save(folder)
    else:
        task = dict(work=work, folder=folder, sample=list(corpus.sample(sample_mb)), vocab_size=vocab_size)
        if parallel.processes() == 1 or len(task['sample']) < 20:
            train_bpe(task)
        else:
            parallel.apart(train_bpe, task)
    tok = given or load_tokenizer(folder)
    with open(stamp, 'w', encoding='utf-8') as f:
        f.write(made_of)
    if not given:
        print(f'tokenizer {tok.vocab_size:9,} ids{"":<26}in {time.time() - began:.1f} s')
    return tok

def train_bpe(task):
    """Trains it on the sample: {'work', 'folder', 'sample', 'vocab_size'}."""
    def texts():
        for key, block, rows, cut in task['sample']:
            some = list(spool.pieces_of(spool.read_block(task['work'], key, block), rows))
            yield from some[:-1]
            yield some[-1][:cut]

    build_tokenizer('bpe', texts(), task['vocab_size']).save(task['folder'])

# -----------------------------------------------------------------------------
# Encode: documents to ids

class Output:
    """
    The six files of the dataset, in <work>/dataset. commit() makes what was written last, and says so in the journal;
    a run that goes on cuts off whatever is beyond.
    """

    def __init__(self, work, made_of, base):
        self.folder, self.journal = os.path.join(work, 'dataset'), os.path.join(work, 'written')
        self.state = {}
        if os.path.exists(self.journal):
            with open(self.journal, encoding='utf-8') as f:
                self.state = json.load(f)
        if self.state.get('made_of') != made_of or not os.path.isdir(self.folder):
            self.begin(made_of, base)
        self.files = {}
        for name, size in self.state['sizes'].items():
            self.files[name] = open(os.path.join(self.folder, name), 'rb+')
            self.files[name].truncate(size)
            self.files[name].seek(size)
        self.time = time.time()

    def begin(self, made_of, base):
        if os.path.exists(self.journal):
            os.remove(self.journal)  # it spoke of files that are about to go
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        self.state = {'made_of': made_of, 'block': 0, 'sizes': {}, 'kinds': [0] * len(spool.KINDS),
                      'bytes': {side: base['splits'][side]['bytes'] if base else 0 for side in SIDES.values()}}
        for side in SIDES.values():
            for ending in ('.bin', '.idx', '.hash'):
                path = os.path.join(self.folder, side + ending)
                if base:
                    shutil.copyfile(os.path.join(base['folder'], side + ending), path)
                else:
                    with open(path, 'wb') as f:
                        f.write(bytes(8) if ending == '.idx' else b'')  # the first document begins at 0
            if base and base['split_limit'] is None:  # it was one document: now its halves are closed, as any other
                self.state['kinds'][spool.KINDS.index(next(iter(base['kinds'])))] += 1
                with open(os.path.join(self.folder, side + '.bin'), 'ab') as f:
                    f.write(np.array([base['eot']], '<i4').tobytes())
                    end = f.tell() // 4
                with open(os.path.join(self.folder, side + '.idx'), 'rb+') as f:
                    f.seek(8)
                    f.write(np.array([end], '<u8').tobytes())
        self.state['sizes'] = {name: os.path.getsize(os.path.join(self.folder, name)) for name in sorted(os.listdir(self.folder))}

    def add(self, block, result):
        """What spool.encode made of a block."""
        for side, name in SIDES.items():
            ids, ends, hashes = result[side]
            before = self.files[name + '.bin'].tell() // 4
            self.files[name + '.bin'].write(ids.tobytes())
            self.files[name + '.idx'].write((ends + np.uint64(before)).astype('<u8').tobytes())
            self.files[name + '.hash'].write(hashes.tobytes())
            self.state['bytes'][name] += result['bytes'][side]
        self.state['kinds'] = [a + int(b) for a, b in zip(self.state['kinds'], result['kinds'])]
        self.state['block'] = block + 1
        if time.time() - self.time > 3:
            self.commit()

    def commit(self):
        for name, f in self.files.items():
            f.flush()
            os.fsync(f.fileno())
            self.state['sizes'][name] = f.tell()
        with open(self.journal + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(self.state, f)
        os.replace(self.journal + '.tmp', self.journal)
        self.time = time.time()

    def close(self):
        """Returns {split: {'tokens', 'documents', 'bytes'}} and {name: sha256}."""
        self.commit()
        for f in self.files.values():
            f.close()
        sizes = self.state['sizes']
        splits = {name: {'tokens': sizes[name + '.bin'] // 4, 'documents': sizes[name + '.idx'] // 8 - 1,
                         'bytes': self.state['bytes'][name]} for name in SIDES.values()}
        return splits, {name: report.sha256(os.path.join(self.folder, name)) for name in sizes}

def encode_all(corpus, tok, work, base, closing, made_of):
    """Encodes what the journal has not yet; returns what Output.close does, and tokens by kind."""
    output = Output(work, made_of, base)
    first, blocks = output.state['block'], len(corpus.blocks)
    if first:
        print(f'going on: {first:,} of {blocks:,} blocks were encoded before')
    where = [slice(*ends) for ends in zip(corpus.starts.tolist(), corpus.starts[1:].tolist())]
    wanted = [i for i in range(first, blocks) if corpus.use[where[i]].any()]

    def tasks():
        for i in wanted:
            key, block = corpus.blocks[i]
            used = where[i].start + np.flatnonzero(corpus.use[where[i]])
            row, chars = corpus.cut or (-1, 0)
            yield dict(folder=work, key=key, block=block, rows=corpus.rows[used], use=corpus.use[used], closing=closing,
                       cut=(int(np.searchsorted(used, row)), chars) if row in used else None,
                       tokenizer=(os.path.join(work, 'tokenizer', 'tokenizer.json'), tok.sha256()))

    bar = report.Progress('encoding', sum(corpus.blocks[i][1][2] for i in wanted))
    for i, result in zip(wanted, parallel.run(spool.encode, tasks(), 4 * parallel.processes())):
        output.add(i, result)
        bar.add(corpus.blocks[i][1][2])
    bar.close()
    return *output.close(), output.state['kinds']

# -----------------------------------------------------------------------------
# The folder

def open_work(place):
    """<out>.partial, for this process alone: returns its lock, a file that is to stay open."""
    work = place + sources.PARTIAL
    if os.path.isdir(work) and os.listdir(work) and not os.path.exists(os.path.join(work, 'prepare.lock')):
        fail(f'{work}: is in the way, and not of prepare.py\'s making; move it, or choose another --out')
    os.makedirs(work, exist_ok=True)
    lock = open(os.path.join(work, 'prepare.lock'), 'a')
    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f'{work}: another prepare.py is at work there; wait for it, or choose another --out')
    except OSError:
        pass  # some network file systems have no locks
    old = os.path.join(work, 'old')
    if os.path.isdir(old) and not os.path.lexists(place):
        os.rename(old, place)  # a kill in the middle of publish(): the new one was not there yet
    shutil.rmtree(old, ignore_errors=True)
    for path in glob.glob(os.path.join(glob.escape(work), '*.tmp*')):
        os.remove(path)
    return lock

def close_work(work, lock):
    """Deletes it, the lock last: it tells whose the folder is."""
    for name in set(os.listdir(work)) - {'prepare.lock'}:
        path = os.path.join(work, name)
        shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.remove(path)
    if os.name == 'nt':
        lock.close()  # there, a file that is open cannot be deleted
    shutil.rmtree(work, ignore_errors=True)

def publish(work, place):
    """Puts the finished dataset in its place, after making sure that it is on the disk."""
    new, old = os.path.join(work, 'dataset'), os.path.join(work, 'old')
    for name in os.listdir(new):
        with open(os.path.join(new, name), 'rb+') as f:
            os.fsync(f.fileno())
    if os.path.isdir(place):
        os.rename(place, old)
    try:
        os.rename(new, place)
    except BaseException:
        if os.path.isdir(old):
            os.rename(old, place)
        raise

def open_base(place, target):
    """The meta.json of the dataset that is added to, with its folder; its settings hold."""
    global split_seed, val_fraction
    try:
        with open(os.path.join(place, 'meta.json'), encoding='utf-8') as f:
            base = json.load(f)
        if base['format'] != FORMAT:
            fail(f'{target}: made by an older prepare.py; prepare it anew, with everything that is to be in it')
        tok = load_tokenizer(place)
        if tok.sha256() != base['tokenizer']['sha256']:
            fail(f'{target}: its tokenizer.json is not the one it was made with')
        for name, value in (('split_seed', base['split_seed']), ('val_fraction', base['val_fraction'])):
            if name in explicit and explicit[name] != value:
                fail(f'{target} was made with {name}={value}, and --append keeps to it: leave --{name} out')
        kind = base['tokenizer']['kind']
        other = 'tokenizer' in explicit and tokenizer != kind and (tokenizer in ('char', 'byte', 'bpe')
                                                                  or build_tokenizer(tokenizer).sha256() != tok.sha256())
        if other or 'vocab_size' in explicit and vocab_size < tok.vocab_size:
            fail(f'{target} has a tokenizer of kind {kind} with {tok.vocab_size} ids, and --append keeps it: leave --tokenizer and '
                 '--vocab_size out, or make another dataset with --out')
        split_seed, val_fraction = base['split_seed'], base['val_fraction']
        return base | {'folder': place}, tok
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f'{target}: no dataset to append to ({type(error).__name__}: {error}); prepare it without --append first')

def describe(base, tok, corpus, reports, skipped, splits, hashes, kinds, limit, copies):
    """meta.json: nothing in it says when, where or by how many it was made."""
    table = {name: {'files': 0, 'documents': 0, 'characters': 0, 'tokens': 0} for name in spool.KINDS}
    for part in base.get('kinds', {}), corpus.totals(), {name: {'tokens': n} for name, n in zip(spool.KINDS, kinds)}, \
            *({name: {'files': n} for name, n in done['files'].items()} for done in reports):
        for name, counts in part.items():
            for what, n in counts.items():
                table[name][what] += n
    gather = lambda name: [entry for done in reports for entry in done[name]]
    suspects = sorted(gather('suspects') + base.get('suspects', []), key=lambda s: (-s[0], s[1]))[:10]
    return {
        'format': FORMAT, 'dtype': 'int32', 'vocab_size': tok.vocab_size, 'eot': tok.eot,
        'tokenizer': {'kind': tok.kind, 'file': 'tokenizer.json', 'sha256': tok.sha256()},
        'splits': splits, 'split_seed': split_seed, 'val_fraction': val_fraction,
        'split_limit': f'{limit:016x}' if limit else None,  # a document whose hash is below is val; null: split by position
        'halves': not limit or base.get('halves', False),  # the first document of each split is half of one
        'sources': base.get('sources', []) + (sorted(set(inputs)) or [f'Python {platform.python_version()} standard library']),
        'kinds': {name: counts for name, counts in table.items() if any(counts.values())},
        'copies': base.get('copies', 0) + copies, 'suspects': suspects, 'sha256': hashes,
        'notes': base.get('notes', []) + gather('notes'), 'skipped': base.get('skipped', []) + skipped,
    }

def name_of(path):
    """What a dataset made of this input is called, where nobody says."""
    if path.startswith('hf:'):
        return path[3:].split(':')[0].rstrip('/').split('/')[-1]
    parts = os.path.abspath(path).split(os.sep)
    if os.path.isdir(path):
        return parts[-1]
    if os.path.lexists(path):
        return parts[-1].split('.')[0] or parts[-1]
    return [part for part in parts if not any(c in part for c in '*?[')][-1]  # the last plain name in a pattern

def check_settings():
    require(globals(), {
        'between 0 and 1': dict(val_fraction=0 < val_fraction < 1),
        'between -2**63 and 2**63': dict(split_seed=abs(split_seed) < 2 ** 63),
        'above 0': dict(sample_mb=sample_mb > 0, file_seconds=file_seconds > 0, file_memory_mb=file_memory_mb > 0),
        '0 or more': dict(max_file_mb=max_file_mb >= 0),
        '0, or the number of processes': dict(workers=0 <= workers < 1000),
        'local or ray': dict(engine=engine in ('local', 'ray'))})
    if engine == 'ray':
        try:
            import ray  # noqa: F401
        except ImportError:
            fail('engine=ray: needs the package ray: pip install ray')

def make(target, place, work, found, skipped):
    """From sources to the finished dataset in `place`, all of it in `work`. Returns (meta, tokenizer); None if nothing is new."""
    base, given = open_base(place, target) if append else ({}, None)
    if tokenizer not in ('char', 'bpe'):
        given = given or build_tokenizer(tokenizer)  # now, for it may not exist
    elif not given:
        build_tokenizer(tokenizer, [], vocab_size)
    tasks = plan(found, work)
    reports = extract_all(tasks, work)
    skipped = sorted(skipped + [entry for done in reports for entry in done['skipped']],
                     key=lambda entry: (os.fsencode(entry['file']), entry['reason']))
    corpus = Corpus(tasks, reports, work)
    if not len(corpus.rows):
        raise TooLittle(f'{", ".join(inputs) or "standard library"}: nothing readable'
                        + (f' ({report.reasons(skipped)})' if skipped else ''))
    known, limit, before = {}, None, 0
    if base:
        known = {side: np.fromfile(os.path.join(place, name + '.hash'), HASH) for side, name in SIDES.items()}
        limit = int(base['split_limit'], 16) if base['split_limit'] else int(val_fraction * 2 ** 64)
        before = sum(split['bytes'] for split in base['splits'].values())
    limit, copies = corpus.decide(val_fraction, dedupe, known, limit, before)
    if not corpus.use.any():
        print(f'nothing new: all {copies:,} documents are in {target} already')
        return None
    decided = digest([[key for key, _ in corpus.blocks], hashlib.sha256(corpus.use.tobytes()).hexdigest(), corpus.cut])
    tok = make_tokenizer(given, corpus, reports, work, decided)
    made_of = digest([tok.sha256(), decided, base.get('sha256')])
    splits, hashes, kinds = encode_all(corpus, tok, work, base, [tok.eot] if limit else [], made_of)
    meta = describe(base, tok, corpus, reports, skipped, splits, hashes, kinds, limit, copies)
    tok.save(os.path.join(work, 'dataset'))
    with open(os.path.join(work, 'dataset', 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
    publish(work, place)
    return meta, tok

def main():
    check_settings()
    if inspect:
        for path in inputs or fail('--inspect: name a dataset: python prepare.py --inspect data/mine'):
            report.inspect(path)
        return
    target = out or os.path.join('data', name_of(inputs[0]) if inputs else 'stdlib')
    place = os.path.realpath(target)
    work = place + sources.PARTIAL
    found, skipped = sources.find(inputs, f'{JUNK},{exclude}', gitignore, max_file_mb) if inputs else sources.find_stdlib()
    skipped = [entry for entry in skipped if os.path.realpath(entry['file']) not in (place, work)]
    if dry_run:
        report.show_plan(found, skipped)
        return
    if os.path.lexists(place) and not (os.path.isdir(place) and set(os.listdir(place)) <= sources.OURS | {'.DS_Store'}):
        fail(f'{target}: exists and is not just a dataset; it will not be overwritten, choose another --out')
    parallel.begin(engine, workers)
    os.environ['RAYON_NUM_THREADS'] = str(parallel.processes())  # what trains the BPE

    lock, ended, goes_on = None, False, '; the same command goes on from here'
    try:
        lock = open_work(place)
        result = make(target, place, work, found, skipped)
        ended = True
    except (TooLittle, UnknownCharacter) as error:  # there is nothing to go on with
        ended = True
        fail(f'tokenizer={tokenizer}: {error}' if isinstance(error, UnknownCharacter) else error)
    except Unreachable as error:
        fail(f'{error}{goes_on}')
    except BrokenProcessPool:
        fail(f'a process died, perhaps for want of memory{goes_on}; --workers=1 needs the least')
    except KeyboardInterrupt:
        print(f'\nstopped{goes_on}', file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        fail(f'{target}: {error.strerror or error}; nothing was changed' + (goes_on if lock else ''))
    finally:
        parallel.stop()
        if lock:
            if ended or not any(name.endswith('.json') for name in os.listdir(work)):
                close_work(work, lock)
            lock.close()
    if result:
        report.show(place, *result)
        inside = os.path.relpath(place, os.path.realpath('data'))
        print(f'\nnow: python train.py --dataset={target if inside.startswith("..") else inside}')

if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that main's `finally` is reached
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    (os._exit if parallel.stuck else sys.exit)(status)
