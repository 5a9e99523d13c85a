"""prepare.py as its user runs it, things for it to read, and a dataset checked as a whole."""
import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from helpers import forks
from mambino import tokenizer

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
OURS = [
    'meta.json', 'tokenizer.json', 'train.bin', 'train.hash', 'train.idx', 'val.bin', 'val.hash',
    'val.idx',
]
posix = pytest.mark.skipif(os.name == 'nt', reason='signals, limits and /proc are of POSIX')


# -----------------------------------------------------------------------------
# Running it

def command(*argv):
    argv = [str(arg) for arg in argv]
    few = (
        []
        if any(arg.startswith('--workers') for arg in argv) or '--inspect' in argv
        else ['--workers=1']
    )
    return [sys.executable, os.path.join(ROOT, 'prepare.py'), *argv, *few]


def environment(**more):
    return {**os.environ, 'PYTHONUTF8': '1', **{name: str(value) for name, value in more.items()}}


def one_line(text, words=''):
    """What a person is to see of an error: one line, no traceback."""
    lines = [line for line in text.split('\n') if line.strip()]
    assert len(lines) == 1 and words in lines[0], text
    return lines[0]


def finish(folder, argv, code=0, **settings):
    done = subprocess.run(
        argv, cwd=folder, capture_output=True, text=True, encoding='utf-8',
        **{'env': environment(), **settings},
    )
    return as_expected(done.returncode, done.stdout, done.stderr, code)


def as_expected(status, out, err, code):
    """What it said, if it ended with this exit status; and if that is 2, in one line."""
    assert status == code, (status, out, err)
    if code == 2:
        assert one_line(err).startswith('error: '), err
        assert err.count('\n') == 1, err
    return err if code else out


def is_forked(argv, settings):
    """Whether a process that is forked will do: it starts no others, and is not to differ in what python is told."""
    is_alone = '--workers=1' in argv or '--inspect' in argv
    return forks.can_fork and is_alone and not settings and '--engine=ray' not in argv


def fork(folder, argv, code=0, before=''):
    (status,), (out, err) = forks.run('prepare.py', folder, argv, before)
    return as_expected(status, out, err, code)


def prepare(folder, *argv, code=0, **settings):
    """Runs prepare.py in `folder`; returns its stdout, or, where it must fail, the one line on
    stderr.
    """
    line = command(*argv)
    if is_forked(line, settings):
        return fork(folder, line[2:], code)
    return finish(folder, line, code, **settings)


DRIVER = '''
import os, runpy, sys
sys.path.insert(0, {root!r})
if __name__ == '__main__':
    from mambino.prepare import extract, files, output, spool, stdlib, vocabulary
{patch}
    runpy.run_path(os.path.join({root!r}, 'prepare.py'), run_name='__main__')
'''


def driven(folder, patch, *argv, code=0, **settings):
    """The same with `patch` run before main(): what kills it at a certain place, or watches it
    there.
    """
    line = command(*argv)
    if is_forked(line, settings):
        return fork(folder, line[2:], code, patch)
    driver = folder / 'driver.pyw'
    lines = ''.join(f'    {line}\n' for line in patch.strip('\n').split('\n'))
    driver.write_text(DRIVER.format(root=ROOT, patch=lines), encoding='utf-8')
    try:
        return finish(folder, [sys.executable, str(driver), *line[2:]], code, **settings)
    finally:
        driver.unlink()


DIES_EARLY = 'vocabulary.make_tokenizer = lambda *args: os._exit(9)'  # all is read by then
DIES = '''
add = output.Output.add
def stop(self, block, *more):
    add(self, block, *more)
    self.commit() if {commit} and block < {block} else [f.flush() for f in self.files.values()]
    if block == {block}:
        os._exit(9)
output.Output.add = stop
spool.BLOCK = 20_000
'''

# what a shell starts in the background, it starts with Ctrl-C ignored; and so would be whatever that starts
heed = None if os.name == 'nt' else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def running(folder, *argv):
    """prepare.py at work, in a process group of its own, as from a shell; what is left of it at the
    end is killed.
    """
    process = subprocess.Popen(
        command(*argv),
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8',
        env=environment(),
        start_new_session=True, preexec_fn=heed)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it does not come'
        time.sleep(0.002)


def processes_in(folder):
    """{pid: command line} of all processes that work in `folder` (Linux)."""
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc') if os.path.isdir('/proc') else ()):
        with contextlib.suppress(OSError):
            with open(f'/proc/{pid}/cmdline', 'rb') as f:
                line = f.read().replace(b'\0', b' ').decode('utf-8', 'replace').strip()
            if line and os.readlink(f'/proc/{pid}/cwd').startswith(os.path.realpath(folder)):
                found[int(pid)] = line
    return found


def parts(partial):
    """How many parts of the sources a journal says were read."""
    return (
        sum(name.endswith('.json') and '.tmp' not in name for name in os.listdir(partial))
        if partial.is_dir()
        else 0
    )


def computed(pid):
    """Seconds that a process has computed (Linux)."""
    with open(f'/proc/{pid}/stat', 'rb') as f:
        user, system = f.read().rpartition(b')')[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')


def nobody_left(folder):
    """Whether all processes there end of themselves; none of them computes for three seconds more, however long that
    takes on a busy machine.
    """
    before = {}

    def have_ended():
        left = processes_in(folder)
        for pid in left:
            with contextlib.suppress(OSError):          # it has ended meanwhile
                assert computed(pid) - before.setdefault(pid, computed(pid)) < 3, left[pid]
        return not left

    wait_for(have_ended)
    return True


# -----------------------------------------------------------------------------
# Looking at what it made

def files(folder):
    """{name: bytes} of a folder."""
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def blake(text, seed=1337):
    digest = hashlib.blake2b(text.encode('utf-8'), digest_size=16, key=str(seed).encode()).digest()
    return int.from_bytes(digest[:8], 'big'), int.from_bytes(digest[8:], 'big')


def dataset(folder):
    """meta, tok, and for each side the ids and the documents, after checking what must hold of
    every dataset.
    """
    assert sorted(os.listdir(folder)) == OURS
    assert not os.path.exists(f'{folder}.partial')
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    tok = tokenizer.load_tokenizer(folder)
    assert meta['format'] == 2 and meta['dtype'] == 'int32'
    assert (meta['vocab_size'], meta['eot']) == (tok.vocab_size, tok.eot)
    assert meta['tokenizer'] == {'kind': tok.kind, 'file': 'tokenizer.json', 'sha256': tok.sha256()}
    assert {
        'split_seed', 'val_fraction', 'split_limit', 'sources', 'copies', 'suspects', 'notes',
        'skipped',
    } <= meta.keys()
    assert meta['sha256'] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OURS[2:]
    }
    by_hash, one = meta['split_limit'] is not None, []
    limit = int(meta['split_limit'] or '0', 16)
    result = SimpleNamespace(meta=meta, tok=tok, ids={}, docs={}, hashes={})
    total = sum(split['bytes'] for split in meta['splits'].values())
    for side in 'train', 'val':
        ids = np.fromfile(folder / f'{side}.bin', '<i4')
        offsets = np.fromfile(folder / f'{side}.idx', '<u8').astype(np.int64)
        hashes = list(
            map(tuple, np.fromfile(folder / f'{side}.hash', '<u8').reshape(-1, 2).tolist())
        )
        docs = [tok.decode(ids[a:b]) for a, b in zip(offsets, offsets[1:])]
        assert meta['splits'][side] == {
            'tokens': len(ids),
            'documents': len(docs),
            'bytes': len(''.join(docs).encode('utf-8')),
        }
        assert len(docs) == len(hashes) > 0 and offsets[0] == 0
        assert offsets[-1] == len(ids) and (np.diff(offsets) > 0).all()
        assert 0 <= ids.min() and ids.max() < tok.vocab_size
        # each document is closed by the end-of-text id, and there is no other one; a text of its own has none
        assert np.flatnonzero(ids == tok.eot).tolist() == (
            (offsets[1:] - 1).tolist() if by_hash else []
        )
        if tok.kind == 'bpe' and '<|im_start|>' in tok.text:
            assert not (ids[ids != tok.eot] >= tok.vocab_size - 3).any()
        for i, (text, number) in enumerate(zip(docs, hashes)):
            if i == 0 and (not by_hash or meta.get('halves')):
                one.append((text, number))  # half of a document
                continue
            assert number == blake(text, meta['split_seed'])
            small = len(text.encode('utf-8')) <= meta['val_fraction'] * total
            assert (
                number[0] < limit
                if side == 'val'
                else number[0] >= limit or not small or 'appended' in str(folder)
            )
        result.ids[side], result.docs[side], result.hashes[side] = ids, docs, hashes
    if one:
        assert one[0][1] == one[1][1] == blake(one[0][0] + one[1][0], meta['split_seed'])
    kinds = meta['kinds'].values()
    assert sum(kind['tokens'] for kind in kinds) == sum(
        split['tokens'] for split in meta['splits'].values()
    )
    assert sum(kind['documents'] for kind in kinds) == sum(
        split['documents'] for split in meta['splits'].values()
    ) - bool(one)
    assert sum(kind['characters'] for kind in kinds) == len(
        ''.join(result.docs['train'] + result.docs['val'])
    )
    result.all = result.docs['train'] + result.docs['val']
    return result


# -----------------------------------------------------------------------------
# Making things to read

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))


def jsonl(*texts):
    return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=500)


@functools.cache
def pool():
    rng = random.Random(0)
    words = [
        ''.join(rng.choices('etaoinshrdlcumwfgypbvk', k=rng.randint(1, 9))) for _ in range(3000)
    ]
    return ' '.join(rng.choices(words, [1 / (i + 1) for i in range(3000)], k=60_000)).replace(
        ' th', '.\nTh'
    )


def prose(n, seed=0):
    """n characters of words that compress and merge as language does."""
    rng, parts = random.Random(seed), []
    while sum(map(len, parts)) < n:
        start = rng.randrange(len(pool()) - 9000)
        parts.append(pool()[start:start + 9000])
    return ''.join(parts)[:n]
