"""prepare.py as its user meets it: run as a program on made-up folders, stopped, killed, starved; its output read back."""
import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mambino.prepare import report
from mambino.prepare import spool
from mambino import tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = ['meta.json', 'tokenizer.json', 'train.bin', 'train.hash', 'train.idx', 'val.bin', 'val.hash', 'val.idx']
posix = pytest.mark.skipif(os.name == 'nt', reason='signals, limits and /proc are of POSIX')

# -----------------------------------------------------------------------------
# Running it

def command(*argv):
    argv = [str(arg) for arg in argv]
    few = [] if any(arg.startswith('--workers') for arg in argv) or '--inspect' in argv else ['--workers=1']
    return [sys.executable, os.path.join(ROOT, 'prepare.py'), *argv, *few]

def environment(**more):
    return {**os.environ, 'PYTHONUTF8': '1', **{name: str(value) for name, value in more.items()}}

def one_line(text, words=''):
    """What a person is to see of an error: one line, no traceback."""
    lines = [line for line in text.split('\n') if line.strip()]
    assert len(lines) == 1 and words in lines[0], text
    return lines[0]

def finish(folder, argv, code=0, **how):
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, encoding='utf-8', timeout=120,
                          **{'env': environment(), **how})
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    if code == 2:
        assert one_line(done.stderr).startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
    return done.stderr if code else done.stdout

def prepare(folder, *argv, code=0, **how):
    """Runs prepare.py in `folder`; returns its stdout, or, where it must fail, the one line on stderr."""
    return finish(folder, command(*argv), code, **how)

DRIVER = '''
import os, sys
sys.path.insert(0, {root!r})
import prepare
from prepare import *
if __name__ == '__main__':
    prepare.explicit = prepare.configure(vars(prepare), positional='inputs')
{patch}
    prepare.main()
'''

def driven(folder, patch, *argv, code=0, **how):
    """The same with `patch` run before main(): what kills it at a certain place, or watches it there."""
    driver = folder / 'driver.pyw'
    lines = ''.join(f'    {line}\n' for line in patch.strip('\n').split('\n'))
    driver.write_text(DRIVER.format(root=ROOT, patch=lines), encoding='utf-8')
    try:
        return finish(folder, [sys.executable, str(driver), *command(*argv)[2:]], code, **how)
    finally:
        driver.unlink()

# what a shell starts in the background, it starts with Ctrl-C ignored; and so would be whatever that starts
heed = None if os.name == 'nt' else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)

@contextlib.contextmanager
def running(folder, *argv):
    """prepare.py at work, in a process group of its own, as from a shell; what is left of it at the end is killed."""
    process = subprocess.Popen(command(*argv), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               encoding='utf-8', env=environment(), start_new_session=True, preexec_fn=heed)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)

def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
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
    return sum(name.endswith('.json') and '.tmp' not in name for name in os.listdir(partial)) if partial.is_dir() else 0

def nobody_left(folder):
    wait_for(lambda: not processes_in(folder), 3)
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
    """meta, tok, and for each side the ids and the documents, after checking what must hold of every dataset."""
    assert sorted(os.listdir(folder)) == OURS
    assert not os.path.exists(f'{folder}.partial')
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    tok = tokenizer.load_tokenizer(folder)
    assert meta['format'] == 2 and meta['dtype'] == 'int32'
    assert (meta['vocab_size'], meta['eot']) == (tok.vocab_size, tok.eot)
    assert meta['tokenizer'] == {'kind': tok.kind, 'file': 'tokenizer.json', 'sha256': tok.sha256()}
    assert {'split_seed', 'val_fraction', 'split_limit', 'sources', 'copies', 'suspects', 'notes', 'skipped'} <= meta.keys()
    assert meta['sha256'] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OURS[2:]}
    by_hash, one = meta['split_limit'] is not None, []
    limit = int(meta['split_limit'] or '0', 16)
    result = SimpleNamespace(meta=meta, tok=tok, ids={}, docs={}, hashes={})
    total = sum(split['bytes'] for split in meta['splits'].values())
    for side in 'train', 'val':
        ids = np.fromfile(folder / f'{side}.bin', '<i4')
        ends = np.fromfile(folder / f'{side}.idx', '<u8').astype(np.int64)
        hashes = list(map(tuple, np.fromfile(folder / f'{side}.hash', '<u8').reshape(-1, 2).tolist()))
        docs = [tok.decode(ids[a:b]) for a, b in zip(ends, ends[1:])]
        assert meta['splits'][side] == {'tokens': len(ids), 'documents': len(docs), 'bytes': len(''.join(docs).encode('utf-8'))}
        assert len(docs) == len(hashes) > 0 and ends[0] == 0 and ends[-1] == len(ids) and (np.diff(ends) > 0).all()
        assert 0 <= ids.min() and ids.max() < tok.vocab_size
        # each document is closed by the end-of-text id, and there is no other one; a text of its own has none
        assert np.flatnonzero(ids == tok.eot).tolist() == ((ends[1:] - 1).tolist() if by_hash else [])
        if tok.kind == 'bpe' and '<|im_start|>' in tok.text:
            assert not (ids[ids != tok.eot] >= tok.vocab_size - 3).any()
        for i, (text, number) in enumerate(zip(docs, hashes)):
            if i == 0 and (not by_hash or meta.get('halves')):
                one.append((text, number))  # half of a document
                continue
            assert number == blake(text, meta['split_seed'])
            small = len(text.encode('utf-8')) <= meta['val_fraction'] * total
            assert number[0] < limit if side == 'val' else number[0] >= limit or not small or 'appended' in str(folder)
        result.ids[side], result.docs[side], result.hashes[side] = ids, docs, hashes
    if one:
        assert one[0][1] == one[1][1] == blake(one[0][0] + one[1][0], meta['split_seed'])
    kinds = meta['kinds'].values()
    assert sum(kind['tokens'] for kind in kinds) == sum(split['tokens'] for split in meta['splits'].values())
    assert sum(kind['documents'] for kind in kinds) == sum(split['documents'] for split in meta['splits'].values()) - bool(one)
    assert sum(kind['characters'] for kind in kinds) == len(''.join(result.docs['train'] + result.docs['val']))
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
    words = [''.join(rng.choices('etaoinshrdlcumwfgypbvk', k=rng.randint(1, 9))) for _ in range(3000)]
    return ' '.join(rng.choices(words, [1 / (i + 1) for i in range(3000)], k=60_000)).replace(' th', '.\nTh')

def prose(n, seed=0):
    """n characters of words that compress and merge as language does."""
    rng, parts = random.Random(seed), []
    while sum(map(len, parts)) < n:
        start = rng.randrange(len(pool()) - 9000)
        parts.append(pool()[start:start + 9000])
    return ''.join(parts)[:n]

@pytest.fixture
def corpus(tmp_path):
    """A folder of 60 short text files."""
    for i in range(60):
        write(tmp_path / 'mine' / f'{i % 7}' / f'{i}.txt', f'document {i}\n' + 'some words and more words\n' * (i % 5 + 1))
    return tmp_path

@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """
    Files of most kinds, 12 MB in several parts, and the dataset that an undisturbed run by two processes makes of it.
    As long as it takes is the time in which other runs are disturbed.
    """
    folder = tmp_path_factory.mktemp('mixed')
    for i in range(300):
        write(folder / 'mine' / 'small' / f'{i}.md', f'# Note {i}\r\n' + prose(700, i))
    for i in range(3):
        write(folder / 'mine' / f'book{i}.txt', prose(1_500_000, 1000 + i))
    write(folder / 'mine' / 'rows.jsonl', jsonl(*(f'{i % 700}: ' + prose(3000, 2000 + i % 700) for i in range(1000))))
    parquet(folder / 'mine' / 'rows.parquet', text=[f'{i}. ' + prose(2000, 4000 + i) for i in range(1500)], n=list(range(1500)))
    for i in range(5):
        write(folder / 'mine' / 'pages' / f'{i}.html', f'<h1>Page {i}</h1><p>' + prose(2000, 6000 + i))
    with gzip.open(folder / 'mine' / 'packed.txt.gz', 'wb') as f:
        f.write(prose(600_000, 7000).encode())
    write(folder / 'mine' / 'cut.txt.gz', gzip.compress(prose(900_000, 7001).encode())[:-2000])
    began = time.time()
    prepare(folder, 'mine', '--workers=2', '--out=data/whole')
    seconds = time.time() - began
    return SimpleNamespace(folder=folder, seconds=seconds, files=files(folder / 'data' / 'whole'))

# -----------------------------------------------------------------------------
# What a dataset is

def test_one_file_has_the_counts_of_nanogpt(tmp_path):
    rng = random.Random(0)
    alphabet = [chr(c) for c in range(32, 97)]  # 65 characters, as tinyshakespeare
    text = ''.join(alphabet) + ''.join(rng.choices(alphabet, k=1_115_394 - 65))
    write(tmp_path / 'input.txt', text)
    said = prepare(tmp_path, 'input.txt', '--tokenizer=char', '--out=data/char')
    it = dataset(tmp_path / 'data' / 'char')
    assert (len(it.ids['train']), len(it.ids['val']), it.tok.vocab_size, it.tok.eot) == (1_003_854, 111_540, 66, 65)
    assert it.docs['train'] + it.docs['val'] == [text[:1_003_854], text[1_003_854:]]
    assert said.splitlines()[-1] == 'now: python train.py --dataset=char'
    assert '1,003,854' in said and '111,540' in said

@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_a_file_of_5_kb(tmp_path, kind):
    text = ('The quick brown fox; naïve café — 日本. ' * 200)[:5000]
    write(tmp_path / 'small.md', text)
    prepare(tmp_path, 'small.md', f'--tokenizer={kind}')
    it = dataset(tmp_path / 'data' / 'small')
    assert it.all == [text[:4500], text[4500:]] and it.tok.kind == kind
    assert it.meta['sources'] == ['small.md'] and it.meta['val_fraction'] == 0.1 and it.meta['split_seed'] == 1337
    assert it.meta['split_limit'] is None and 'created' not in it.meta and 'guessed' not in it.meta

def test_documents_go_by_their_content(corpus):
    prepare(corpus, 'mine', '--vocab_size=300')
    it = dataset(corpus / 'data' / 'mine')
    originals = {p.read_text() for p in (corpus / 'mine').rglob('*.txt')}
    assert set(it.all) == originals and len(it.all) == 60 and 0 < len(it.docs['val']) < 20

    # other names and another order, with every document twice: the same sides, and no document on both
    names = list(range(120))
    random.Random(1).shuffle(names)
    for name, text in zip(names, sorted(originals) * 2):
        write(corpus / 'other' / f'{name}.py', text)
    prepare(corpus, 'other', '--vocab_size=300', '--dedupe=False')
    again = dataset(corpus / 'data' / 'other')
    assert all(sorted(again.docs[side]) == sorted(it.docs[side] * 2) for side in again.docs) and again.meta['copies'] == 0
    prepare(corpus, 'mine', '--vocab_size=300', '--split_seed=5')
    assert set(dataset(corpus / 'data' / 'mine').docs['val']) != set(it.docs['val'])

def test_exact_copies_are_dropped(corpus):
    write(corpus / 'mine' / 'a.jsonl', jsonl('twice', 'once', 'twice', 'document 1\nsome words and more words\nsome words and more words\n'))
    write(corpus / 'mine' / '3' / 'crlf.txt', 'document 5\r\nsome words and more words\r\n')
    said = prepare(corpus, 'mine', '--tokenizer=byte')
    it = dataset(corpus / 'data' / 'mine')
    assert len(it.all) == len(set(it.all)) == 62 and it.meta['copies'] == 3 and 'dropped 3 exact copies' in said
    prepare(corpus, 'mine', '--tokenizer=byte', '--dedupe=False')
    it = dataset(corpus / 'data' / 'mine')
    assert len(it.all) == 65 and it.meta['copies'] == 0 and it.all.count('twice') == 2

def test_neither_split_is_empty(tmp_path):
    for fraction in ('1e-9', '0.999999999'):
        for i in range(3):
            write(tmp_path / 'few' / f'{i}.txt', f'document number {i}')
        prepare(tmp_path, 'few', f'--val_fraction={fraction}')
        it = dataset(tmp_path / 'data' / 'few')
        assert sorted(map(len, it.docs.values())) == [1, 2]
    for i in range(3):
        write(tmp_path / 'few' / f'{i}.txt', 'the same in all of them')  # one document, three times
    for dedupe in True, False:
        prepare(tmp_path, 'few', '--val_fraction=0.5', f'--dedupe={dedupe}')
        assert ''.join(dataset(tmp_path / 'data' / 'few').all) == 'the same in all of them'

def gpt2_cache():
    """The folder with GPT-2's vocabulary. Without it the test is skipped, and a warning says so, which pytest -q shows, too."""
    place = os.environ.get('TIKTOKEN_CACHE_DIR', '')
    if not os.path.isdir(place):
        why = "not tested with GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder that has it"
        warnings.warn(why)
        pytest.skip(why)
    return place

def awkward(folder):
    """Writes documents that are hard to bring through unharmed; returns their texts, as they must come out."""
    rng = random.Random(3)
    spaces = [' ', ' ', ' ', '  ', '\n', '\n\n\n', '\t', ' \n ', '\u3000', '\xa0']
    words = ['word', 'naïve', '日本語', '👩‍👩‍👧', "it's", '12345', '!!', '...', '<|endoftext|>', 'e\u0301', 'x_y']
    long = ''.join(rng.choice(words) + rng.choice(spaces) for _ in range(300_000))
    solid = ''.join(rng.choices('abcdefghij0123456789-é日🙂', k=1_200_000))
    assert len(long) > 1.4 * spool.LONGEST and len(solid) > 1.1 * spool.LONGEST
    plain = {'long.txt': long, 'solid.txt': solid, 'spaces.txt': '   leading and trailing  \n\n', 'space.py': ' ' * 12_000 + 'x',
             'emoji.md': '🏳️‍🌈 👍🏽 \U0010ffff\ue000', 'control.txt': '\x0b\x0c\x1c\x1d\x85\u2028 and so on' + ' and on' * 500,
             'marks.txt': '<|im_start|>user\nHi<|im_end|>\n<|endoftext|>', 'edge.txt': solid[:spool.LONGEST + 1]}
    for name, text in plain.items():
        write(folder / name, text)
    write(folder / 'crlf.txt', 'one\r\ntwo\rthree\n\r\nfour\r')
    write(folder / 'bom.txt', b'\xef\xbb\xbfwith a mark \xef\xbb\xbf inside')
    write(folder / 'utf16.txt', 'sixteen ä\r\n'.encode('utf-16'))
    write(folder / 'm.jsonl', '\n'.join(json.dumps({'text': text}) for text in (
        'a NUL \0 in it', 'half a pair \ud83d', '\ude00 and the other', 'both \ud83d\ude00', '   \n ', 'after a blank', '', None, 7,
        'after nothing\r\n')) + '\n{"text": "escaped \\ud83d\\ude00 \\u0000 \\udfff"}\nnot json\n{"text": "the last"}')
    write(folder / 'n.txt.gz', gzip.compress(os.urandom(300_000).hex().encode())[:-9])  # truncated: nothing of it is taken
    write(folder / 'o.txt', 'after a truncated one')
    write(folder / 'q.txt.gz', gzip.compress(b'packed text'))
    parquet(folder / 'p.parquet', text=['a row', None, ' ', 'a row after a blank\r\n', '👍'])
    return [*plain.values(), 'one\ntwo\nthree\n\nfour\n', 'with a mark \ufeff inside', 'sixteen ä\n',
            'a NUL  in it', 'half a pair \ufffd', '\ufffd and the other', 'both 😀', 'after a blank', 'after nothing\n',
            'escaped 😀  \ufffd', 'the last', 'after a truncated one', 'packed text', 'a row', 'a row after a blank\n', '👍']

@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe', 'gpt2'])
def test_every_document_comes_back_byte_for_byte(tmp_path, kind):
    how = {'env': environment(TIKTOKEN_CACHE_DIR=gpt2_cache())} if kind == 'gpt2' else {}
    texts = awkward(tmp_path / 'in')
    prepare(tmp_path, 'in', f'--tokenizer={kind}', '--sample_mb=1', '--out=data/x', **how)
    it = dataset(tmp_path / 'data' / 'x')
    assert len(it.all) == len(texts) and sorted(map(blake, it.all)) == sorted(map(blake, texts))
    assert [os.path.basename(entry['file']) for entry in it.meta['skipped']] == ['n.txt.gz']
    for side, docs in it.docs.items():  # its ids are those of the whole, however it was cut
        ends = np.cumsum([0] + [len(part) for part in np.split(it.ids[side], np.flatnonzero(it.ids[side] == it.tok.eot) + 1)])
        for text, start, end in zip(docs, ends, ends[1:]):
            if text[:1000] != texts[1][:1000]:  # solid is cut where it must be
                assert np.array_equal(it.ids[side][start:end - 1], it.tok.encode(text)), text[:50]
    if kind == 'char':
        assert it.tok.vocab_size == len(set(''.join(texts))) + 1  # no character of a text that was not taken

@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_where_it_is_cut_is_seen_nowhere(tmp_path, kind):
    """Thousands of documents over tiny pieces, blocks and reads: the same dataset as over large ones."""
    rng = random.Random(4)
    text = lambda: ''.join(rng.choices(['a', 'word', 'é', '日本', '12', "'s", '.', '\x1c', ' ', '  ', '\n', '\r\n', '\r', '\0'], k=rng.randint(0, 80)))
    write(tmp_path / 'in' / 'a.jsonl', jsonl(*(text() for _ in range(1500))))
    for i in range(30):
        write(tmp_path / 'in' / f'{i}.txt', text().replace('\0', '').replace('\x1c', '') + '.')
    prepare(tmp_path, 'in', f'--tokenizer={kind}', '--vocab_size=500', '--out=data/x')
    assert len(dataset(tmp_path / 'data' / 'x').all) > 1400
    small = 'spool.PIECE, spool.LONGEST, spool.BLOCK = {}\nfrom mambino.prepare import readers\nreaders.CHUNK = {}\nprepare.TASK_FILES = 7'
    for sizes, chunk in ((20, 400, 90), 64), ((40, 300, 1), 100):
        driven(tmp_path, small.format(sizes, chunk), 'in', f'--tokenizer={kind}', '--vocab_size=500', '--out=data/y')
        assert files(tmp_path / 'data' / 'x') == files(tmp_path / 'data' / 'y')

# -----------------------------------------------------------------------------
# The same dataset, whoever makes it

def test_same_bytes_whatever_the_order_of_arguments(corpus):
    prepare(corpus, 'mine/1', 'mine/2', 'mine/3/3.txt', '--out=data/a')
    prepare(corpus, 'mine/3/3.txt', 'mine/2', 'mine/1', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')
    prepare(corpus, 'mine/3/3.txt', 'mine/2', 'mine/1', 'mine/2/2.txt', '--out=data/c')  # and one thing twice
    assert all((corpus / 'data/a' / name).read_bytes() == (corpus / 'data/c' / name).read_bytes() for name in OURS[1:])

@pytest.mark.parametrize('workers', [1, 4])
def test_same_bytes_whatever_the_number_of_processes(mixed, workers):
    prepare(mixed.folder, 'mine', f'--workers={workers}', f'--out=data/by{workers}')
    it = dataset(mixed.folder / 'data' / f'by{workers}')
    assert files(mixed.folder / 'data' / f'by{workers}') == mixed.files
    assert {name: kind['files'] for name, kind in it.meta['kinds'].items()} == {'text': 304, 'jsonl': 1, 'parquet': 1, 'html': 5}
    assert it.meta['copies'] == 300 and it.tok.vocab_size == 4096

def test_same_bytes_by_ray(corpus):
    if importlib.util.find_spec('ray') is None:
        pytest.skip('ray is not installed: pip install ray')
    write(corpus / 'mine' / 'rows.jsonl', jsonl(*(prose(500, i) for i in range(300))))
    prepare(corpus, 'mine', '--out=data/a', '--vocab_size=400')
    prepare(corpus, 'mine', '--out=data/b', '--vocab_size=400', '--engine=ray', '--workers=2',
            env=environment(RAY_ENABLE_UV_RUN_RUNTIME_ENV='0'))
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')
    assert nobody_left(corpus)

# -----------------------------------------------------------------------------
# Stopped, killed, starved

@posix
@pytest.mark.parametrize('moments', [(0.2, 0.4, 0.7), (0.55, 0.3, 0.85)])
def test_killed_at_any_moment(mixed, moments):
    """kill -9 to the one process, again and again; then the same command makes what an undisturbed run does."""
    rng, out = random.Random(str(moments)), f'data/killed{moments[0]}'
    argv, said, where = ('mine', '--workers=2', f'--out={out}'), '', []
    for share in moments:
        with running(mixed.folder, *argv) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait((share + rng.uniform(-0.05, 0.05)) * mixed.seconds * (1 if not where else 0.6))
            process.kill()
            said += process.communicate(timeout=20)[0]
            where.append(share)
            assert nobody_left(mixed.folder)
        if process.returncode == 0:  # it was done before
            break
        assert not (mixed.folder / out).exists() and (mixed.folder / f'{out}.partial').is_dir()
    said += prepare(mixed.folder, *argv)
    assert files(mixed.folder / out) == mixed.files
    assert dataset(mixed.folder / out)
    assert 'going on: ' in said

DIES = '''
add = prepare.Output.add
def stop(self, block, *more):
    add(self, block, *more)
    self.commit() if {commit} and block < {block} else [f.flush() for f in self.files.values()]
    if block == {block}:
        os._exit(9)
prepare.Output.add = stop
spool.BLOCK = 20_000
'''

@pytest.mark.parametrize('commit', [True, False])
def test_going_on_in_the_middle_of_encoding(corpus, commit):
    write(corpus / 'mine' / 'rows.jsonl', jsonl(*(prose(500, i) for i in range(300))))
    prepare(corpus, 'mine', '--vocab_size=300', '--out=data/a')
    for block in (1, 4):
        driven(corpus, DIES.format(commit=commit, block=block), 'mine', '--vocab_size=300', '--out=data/b', code=9)
    assert not (corpus / 'data' / 'b').exists()
    said = driven(corpus, 'spool.BLOCK = 20_000', 'mine', '--vocab_size=300', '--out=data/b')
    assert ('going on: 4 of 8 blocks were encoded before' in said) == commit and 'parts were read before' in said
    assert 'tokenizer ' not in said  # it was made
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')

def test_another_run_between_is_not_mistaken_for_this_one(corpus):
    """Killed; killed with other settings before they wrote anything down; then the first ones again."""
    write(corpus / 'mine' / 'rows.jsonl', jsonl(*(prose(500, i) for i in range(300))))
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    driven(corpus, DIES.format(commit=True, block=4), 'mine', '--tokenizer=byte', '--out=data/b', code=9)
    driven(corpus, DIES.format(commit=False, block=2), 'mine', '--vocab_size=300', '--out=data/b', code=9)
    driven(corpus, 'spool.BLOCK = 20_000', 'mine', '--tokenizer=byte', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')

def test_changed_files_are_read_again(corpus):
    driven(corpus, 'prepare.make_tokenizer = lambda *args: os._exit(9)', 'mine', '--tokenizer=byte', code=9)
    write(corpus / 'mine' / '1' / '1.txt', 'something else by now')
    prepare(corpus, 'mine', '--tokenizer=byte')
    assert 'something else by now' in dataset(corpus / 'data' / 'mine').all

def test_what_lies_in_its_own_input_is_no_input(corpus):
    """`out` within a folder that is read: neither a broken run's journal nor the dataset changes what is found."""
    prepare(corpus, 'mine', '--out=mine/data', '--tokenizer=byte')
    first = files(corpus / 'mine' / 'data')
    shutil.rmtree(corpus / 'mine' / 'data')
    driven(corpus, 'prepare.make_tokenizer = lambda *args: os._exit(9)', 'mine', '--out=mine/data', '--tokenizer=byte', code=9)
    for _ in range(2):
        prepare(corpus, 'mine', '--out=mine/data', '--tokenizer=byte')
        assert files(corpus / 'mine' / 'data') == first and len(dataset(corpus / 'mine' / 'data').all) == 60
    write(corpus / 'mine' / 'other' / 'prepare.lock', '')
    prepare(corpus, 'mine', '--out=data/x', '--tokenizer=byte')  # a dataset of another is no input either
    it = dataset(corpus / 'data' / 'x')
    assert len(it.all) == 60 and 'a prepared dataset' in [entry['reason'] for entry in it.meta['skipped']]

BETWEEN = '''
rename, count = os.rename, []
def stop(a, b):
    rename(a, b)
    count.append(b)
    if len(count) == {n}:
        os._exit(9)
os.rename = stop
'''

@pytest.mark.parametrize('append', [False, True])
@pytest.mark.parametrize('n', [1, 2])
def test_killed_between_the_renames(corpus, append, n):
    prepare(corpus, 'mine/1', '--vocab_size=300')
    old = files(corpus / 'data' / '1')
    write(corpus / 'new' / 'a.txt', 'something new')
    write(corpus / 'new' / 'b.txt', 'and something else')
    argv = ('new', '--out=data/1', *(['--append'] if append else []))
    shutil.copytree(corpus / 'data' / '1', corpus / 'data' / '2')
    prepare(corpus, *argv[:1], '--out=data/2', *argv[2:])
    new = files(corpus / 'data' / '2')
    driven(corpus, BETWEEN.format(n=n), *argv, code=9)
    if n == 1:
        assert not (corpus / 'data' / '1').exists() and files(corpus / 'data' / '1.partial' / 'old') == old
    prepare(corpus, *argv)
    assert files(corpus / 'data' / '1') == new and dataset(corpus / 'data' / '1')

@posix
@pytest.mark.parametrize('number, code, workers', [(signal.SIGINT, 130, 1), (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2)])
def test_told_to_stop(mixed, number, code, workers):
    """Ctrl-C, which reaches the whole process group, and kill: prompt, in one line, and nothing is lost."""
    out = f'data/stopped{code}-{workers}'
    (mixed.folder / out).mkdir(parents=True)
    for name, data in (('train.bin', b'old'), ('val.bin', b'old'), ('meta.json', b'{}')):
        (mixed.folder / out / name).write_bytes(data)
    argv = ('mine', f'--workers={workers}', f'--out={out}')
    partial = mixed.folder / f'{out}.partial'
    workers_are_there = lambda: workers == 1 or any('spawn_main' in line for line in processes_in(mixed.folder).values())
    for stage in ('begins', 'reads', 'learns') if workers > 1 else ('reads',):
        before = parts(partial)
        shutil.rmtree(partial / 'tokenizer', ignore_errors=True)
        with running(mixed.folder, *argv) as process:
            wait_for(lambda: (partial / 'tokenizer').exists() or stage == 'reads' and parts(partial) > before
                     or stage == 'begins' and partial.exists() and workers_are_there())
            began = time.monotonic()
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            err = process.communicate(timeout=20)[1]
            assert process.returncode == code, (stage, err)
            assert time.monotonic() - began < (5 if stage == 'learns' else 1.5), stage  # what learns listens to nobody
            assert one_line(err, 'goes on from here').startswith('stopped') if code == 130 else err == '', err
            assert nobody_left(mixed.folder)
        assert (mixed.folder / out / 'train.bin').read_bytes() == b'old' and (stage == 'begins' or partial.is_dir())
    assert 'going on: ' in prepare(mixed.folder, *argv)
    assert files(mixed.folder / out) == mixed.files
    assert not partial.exists()

@posix
@pytest.mark.parametrize('limit, workers', [(100_000, 1), (100_000, 2), (3_000_000, 1)])
def test_full_disk(tmp_path, limit, workers):
    """Files can grow no further: while reading, and while writing the ids; which take four times the room."""
    import resource
    rng = random.Random(5)
    for i in range(3):
        write(tmp_path / 'in' / f'{i}.txt', ''.join(rng.choices('abcdefghijklmnop \n', k=600_000)))
    argv = ('in', '--tokenizer=byte', '--val_fraction=0.5', f'--workers={workers}')
    prepare(tmp_path, *argv, '--out=data/whole')
    write(tmp_path / 'old' / 'a.txt', 'an old text ' * 20)
    prepare(tmp_path, 'old', '--out=data/x', '--tokenizer=byte')
    old = files(tmp_path / 'data' / 'x')

    def starve():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = prepare(tmp_path, *argv, '--out=data/x', code=2, preexec_fn=starve)
    assert 'File too large' in said and 'nothing was changed' in said and 'goes on from here' in said
    assert files(tmp_path / 'data' / 'x') == old
    assert (tmp_path / 'data' / 'x.partial').is_dir() == (limit > 100_000)  # where not even one part was read, nothing is kept
    assert nobody_left(tmp_path)
    said = prepare(tmp_path, *argv, '--out=data/x')
    assert files(tmp_path / 'data' / 'x') == files(tmp_path / 'data' / 'whole') and dataset(tmp_path / 'data' / 'x')
    assert limit < 1_000_000 or 'going on: ' in said

@posix
def test_two_at_once(mixed):
    argv = ('mine', '--workers=2', '--out=data/both')
    partial = mixed.folder / 'data' / 'both.partial'
    with running(mixed.folder, *argv) as first:
        wait_for(lambda: parts(partial))
        for argv in argv, (*argv, '--append'), ('mine', '--out=data/both', '--tokenizer=byte'):
            said = prepare(mixed.folder, *argv, code=2)
            assert 'at work' in said or '--append' in argv
            assert parts(partial)
        out, err = first.communicate(timeout=60)
        assert first.returncode == 0, err
    assert files(mixed.folder / 'data' / 'both') == mixed.files

@posix
def test_a_worker_that_dies(mixed):
    """For want of memory, say: one line, and the same command goes on."""
    argv = ('mine', '--workers=2', '--out=data/died')
    partial = mixed.folder / 'data' / 'died.partial'
    with running(mixed.folder, *argv) as process:
        wait_for(lambda: parts(partial))
        os.kill(next(pid for pid, line in processes_in(mixed.folder).items() if 'spawn_main' in line), signal.SIGKILL)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 2 and one_line(err, 'the same command goes on from here').startswith('error: ')
    assert 'going on: ' in prepare(mixed.folder, *argv) and files(mixed.folder / 'data' / 'died') == mixed.files

# -----------------------------------------------------------------------------
# --append

def test_append(corpus):
    prepare(corpus, 'mine/1', 'mine/2', '--vocab_size=280', '--val_fraction=0.3', '--split_seed=7', '--out=data/appended')
    first, old = dataset(corpus / 'data' / 'appended'), files(corpus / 'data' / 'appended')
    write(corpus / 'new' / 'rows.jsonl', jsonl(*(f'row {i} is new' for i in range(50)), *first.all[:5], 'row 3 is new'))
    write(corpus / 'new' / 'x.bin', b'?')
    prepare(corpus, 'new', '--append', '--out=data/appended')
    it = dataset(corpus / 'data' / 'appended')
    assert it.tok.sha256() == first.tok.sha256() and it.meta['tokenizer'] == first.meta['tokenizer']
    assert all(it.meta[name] == first.meta[name] for name in ('split_seed', 'val_fraction', 'split_limit', 'vocab_size'))
    for side in 'train', 'val':  # the old ones as they were, then the new ones, in their order
        new = [f'row {i} is new' for i in range(50) if f'row {i} is new' in it.docs[side]]
        assert it.docs[side] == first.docs[side] + new and len(new) > 2
        for ending in 'bin', 'idx', 'hash':
            assert files(corpus / 'data' / 'appended')[f'{side}.{ending}'].startswith(old[f'{side}.{ending}'])
    limit = int(first.meta['split_limit'], 16)
    assert [text for text in it.all if blake(text, 7)[0] < limit and text.startswith('row')] == it.docs['val'][len(first.docs['val']):]
    assert it.meta['copies'] == 6 and it.meta['sources'] == ['mine/1', 'mine/2', 'new']
    assert it.meta['kinds']['text'] == first.meta['kinds']['text'] and it.meta['kinds']['jsonl']['documents'] == 50
    assert [entry['reason'] for entry in it.meta['skipped']] == ['unknown type .bin']

    before = {name: (data, os.stat(corpus / 'data' / 'appended' / name).st_mtime_ns)
              for name, data in files(corpus / 'data' / 'appended').items()}
    assert 'nothing new' in prepare(corpus, 'new', 'mine/2', '--append', '--out=data/appended')
    assert before == {name: (data, os.stat(corpus / 'data' / 'appended' / name).st_mtime_ns)
                      for name, data in files(corpus / 'data' / 'appended').items()}
    assert os.listdir(corpus / 'data') == ['appended']
    assert 'sound' in prepare(corpus, '--inspect', 'data/appended')

def test_append_to_one_document(corpus):
    text = 'a text of its own, split by position. ' * 200
    write(corpus / 'one.txt', text)
    prepare(corpus, 'one.txt', '--tokenizer=byte', '--out=data/appended')
    assert 'sound' in prepare(corpus, '--inspect', 'data/appended')
    prepare(corpus, 'mine', '--append', '--out=data/appended')
    it = dataset(corpus / 'data' / 'appended')
    assert it.docs['train'][0] + it.docs['val'][0] == text and len(it.all) == 62 and len(it.docs['val']) > 1
    assert 'sound' in prepare(corpus, '--inspect', 'data/appended')
    assert 'nothing new' in prepare(corpus, 'one.txt', '--append', '--out=data/appended')
    write(corpus / 'new.txt', 'one more')
    prepare(corpus, 'new.txt', '--append', '--out=data/appended')
    assert len(dataset(corpus / 'data' / 'appended').all) == 63

def test_append_is_refused_in_one_line(corpus):
    prepare(corpus, 'mine/1', '--vocab_size=280', '--out=data/x')
    prepare(corpus, 'mine/2', '--vocab_size=270', '--out=data/y')
    old = files(corpus / 'data' / 'x')
    for words, *argv in (('keeps it', '--tokenizer=byte'), ('keeps it', '--tokenizer=data/y'), ('keeps it', '--vocab_size=270'),
                         ('val_fraction=0.1', '--val_fraction=0.2'), ('split_seed=1337', '--split_seed=1')):
        assert words in prepare(corpus, 'mine/3', '--append', '--out=data/x', *argv, code=2)
    assert 'no dataset to append to' in prepare(corpus, 'mine/3', '--append', '--out=data/none', code=2)
    assert sorted(os.listdir(corpus / 'data')) == ['x', 'y'] and files(corpus / 'data' / 'x') == old
    for name, change in (('tokenizer.json', old['tokenizer.json'] + b'\n'), ('meta.json', old['meta.json'].replace(b'"format": 2', b'"format": 1')),
                         ('meta.json', b'{}'), ('meta.json', b'[]'), ('meta.json', b'\xff')):
        (corpus / 'data' / 'x' / name).write_bytes(change)
        prepare(corpus, 'mine/3', '--append', '--out=data/x', code=2)
        (corpus / 'data' / 'x' / name).write_bytes(old[name])
    prepare(corpus, 'mine/3', '--append', '--out=data/x', '--tokenizer=data/x', '--val_fraction=0.1', '--split_seed=1337')  # the same
    write(corpus / 'abc.txt', 'abc ' * 100)
    prepare(corpus, 'abc.txt', '--tokenizer=char', '--out=data/z')
    assert "'d' (U+0064)" in prepare(corpus, 'mine', '--append', '--out=data/z', code=2)

def test_append_that_is_killed(corpus):
    prepare(corpus, 'mine/1', '--vocab_size=280', '--out=data/x')
    old = files(corpus / 'data' / 'x')
    shutil.copytree(corpus / 'data' / 'x', corpus / 'data' / 'y')
    write(corpus / 'new.jsonl', jsonl(*(prose(500, i) for i in range(200))))
    prepare(corpus, 'new.jsonl', '--append', '--out=data/y')
    for block in 1, 3:
        driven(corpus, DIES.format(commit=True, block=block), 'new.jsonl', '--append', '--out=data/x', code=9)
        assert files(corpus / 'data' / 'x') == old
    prepare(corpus, 'new.jsonl', '--append', '--out=data/x')
    assert files(corpus / 'data' / 'x') == files(corpus / 'data' / 'y')

# -----------------------------------------------------------------------------
# Looking

def tree(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}

def test_dry_run_lists_and_writes_nothing(corpus):
    write(corpus / 'mine' / 'photo.jpg', b'\xff\xd8')
    before = tree(corpus)
    said = prepare(corpus, 'mine', 'hf:some/where', '--dry_run')
    assert tree(corpus) == before
    for i in range(60):
        path = os.path.join('mine', str(i % 7), f'{i}.txt')
        assert re.search(rf'^text +{os.path.getsize(corpus / path):,}  {re.escape(path)}$', said, re.M), path
    assert re.search(r'^skip mine.photo.jpg: unknown type .jpg$', said, re.M) and re.search(r'^hf .* hf:some/where$', said, re.M)
    assert re.search(r'^text +60 ', said, re.M) and 'skipped 1: 1 unknown type .jpg' in said

def test_inspect(corpus, capsys):
    def refused():
        """What report.inspect says of data/mine, here, for there are many ways to damage it."""
        with pytest.raises(SystemExit) as end:
            report.inspect(str(place))
        assert end.value.code == 2
        return one_line(capsys.readouterr().err)
    prepare(corpus, 'mine', '--vocab_size=300')
    good, place = files(corpus / 'data' / 'mine'), corpus / 'data' / 'mine'
    for name in 'data/mine', 'mine':
        os.makedirs(corpus / 'away', exist_ok=True)
        os.rename(corpus / 'mine', corpus / 'away' / 'mine')  # a name alone is sought in data/
        said = prepare(corpus, '--inspect', name)
        os.rename(corpus / 'away' / 'mine', corpus / 'mine')
        assert 'sound' in said and '60 documents decode to the text that was taken' in said and 'bpe tokenizer of' in said
        assert re.search(r'^text +60 +60 ', said, re.M) and re.search(r'^train +\d+ ', said, re.M) and '█' in said
        assert sum(int(n) for n in re.findall(r'^ *[\d,]+ \.\. [\d,]+ +(\d+) █*$', said, re.M)) == 60
    for name in OURS[1:]:
        for at in {0, len(good[name]) // 2, len(good[name]) // 2 // 4 * 4 + 3, len(good[name]) - 1}:
            data = bytearray(good[name])
            data[at] ^= 0xa5
            (place / name).write_bytes(data)
            assert name in refused(), (name, at)
        for damage in good[name][:len(good[name]) // 3 | 1], b'':
            (place / name).write_bytes(damage)
            assert name in refused()
        (place / name).unlink()
        assert name in refused()
        (place / name).write_bytes(good[name])
    meta = good['meta.json'].decode()
    for change in ('', '{}', '[]', meta[:-1], meta.replace('"tokens": ', '"tokens": 1', 1), meta.replace('"kinds"', '"kindz"'),
                   meta.replace('"documents": ', '"documents": 1')):
        (place / 'meta.json').write_bytes(change.encode())
        refused()
    (place / 'meta.json').write_bytes(good['meta.json'])
    assert 'sound' in prepare(corpus, '--inspect', 'data/mine') and files(place) == good
    assert 'not a dataset' in prepare(corpus, '--inspect', 'away', code=2)
    assert 'not a dataset' in prepare(corpus, '--inspect', 'nowhere', code=2)
    assert 'name a dataset' in prepare(corpus, '--inspect', code=2)

def test_what_looks_odd_is_named(corpus):
    write(corpus / 'mine' / 'base64.txt', os.urandom(3000).hex())
    write(corpus / 'mine' / 'latin.txt', 'Der Bär trägt Käse.\n'.encode('cp1252') * 20)
    write(corpus / 'mine' / 'rows.jsonl', jsonl('good') + 'bad\n' + jsonl('good as well'))
    said = prepare(corpus, 'mine', '--tokenizer=byte')
    meta = dataset(corpus / 'data' / 'mine').meta
    assert {os.path.basename(note['file']): note['note'] for note in meta['notes']} == \
        {'latin.txt': 'encoding guessed: cp1252', 'rows.jsonl': '1 lines were no JSON'}
    assert meta['suspects'] and os.path.basename(meta['suspects'][0][1]) == 'base64.txt' and 'base64.txt' in said
    assert 'noted on 2 files' in said

# -----------------------------------------------------------------------------
# What is taken

def test_every_skipped_file_has_its_reason(tmp_path):
    good = {'a.txt': 'plain\r\ntext\r\n', 'Makefile': 'all:\n', 'src/b.PY': 'x = 1\n', 'bom.txt': b'\xef\xbb\xbfwith a mark',
            'utf16.txt': 'sixteen ä'.encode('utf-16'), 'old.txt': 'Der Bär trägt Käse.'.encode('cp1252')}
    bad = {'null.txt': (b'a\0\1b\0c', 'binary'), 'empty.txt': (b'', 'empty'), 'blank.md': (b' \n\n', 'empty'),
           'photo.jpg': (b'\xff\xd8\xff', 'unknown type .jpg'), '.secret': (b'x', 'hidden'), 'program': (b'\x7fELF\0\0\1\2', 'binary'),
           'big.txt': (b'1,2\n' * 30_000, 'larger than 0.1 MB'), 'half.txt.gz': (gzip.compress(os.urandom(900))[:-20], 'truncated'),
           'short.pdf': (b'no pdf', 'not a PDF')}
    for name, content in good.items():
        write(tmp_path / 'in' / name, content)
    for name, (content, _) in bad.items():
        write(tmp_path / 'in' / 'sub' / name, content)
    write(tmp_path / 'in' / '.git' / 'config', 'hidden')
    said = prepare(tmp_path, 'in', '--tokenizer=byte', '--max_file_mb=0.1')
    it = dataset(tmp_path / 'data' / 'in')
    assert sorted(it.all) == sorted(['plain\ntext\n', 'all:\n', 'x = 1\n', 'with a mark', 'sixteen ä', 'Der Bär trägt Käse.'])
    reasons = {os.path.basename(entry['file']): entry['reason'] for entry in it.meta['skipped']}
    assert reasons == {**{name: reason for name, (_, reason) in bad.items()}, '.git': 'hidden'}
    assert [(os.path.basename(n['file']), n['note']) for n in it.meta['notes']] == [('old.txt', 'encoding guessed: cp1252')]
    assert 'skipped 10:' in said and '2 hidden' in said

def test_named_file_is_read_whatever_its_extension(tmp_path):
    write(tmp_path / 'story.xyz', 'once upon a time ' * 20)
    prepare(tmp_path, 'story.xyz', '--max_file_mb=0')
    assert dataset(tmp_path / 'data' / 'story')

@posix
def test_links_in_circles_and_pipes(corpus):
    os.symlink(corpus / 'mine', corpus / 'mine' / '1' / 'up')
    os.symlink('nowhere', corpus / 'mine' / 'dangling.txt')
    os.symlink(corpus / 'mine' / '1' / '1.txt', corpus / 'mine' / 'twice.txt')
    os.mkfifo(corpus / 'mine' / 'pipe.txt')
    prepare(corpus, 'mine')
    it = dataset(corpus / 'data' / 'mine')
    assert len(it.all) == 60 and it.meta['copies'] == 0
    assert {os.path.basename(e['file']): e['reason'] for e in it.meta['skipped']} == \
        {'dangling.txt': 'no regular file', 'pipe.txt': 'no regular file'}

def test_tables(tmp_path):
    write(tmp_path / 'in' / 'a.jsonl', jsonl('one', 'two'))
    parquet(tmp_path / 'in' / 'b.parquet', id=[1, 2], story=['three', 'four'])
    with open(tmp_path / 'in' / 'c.csv', 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([['id', 'text'], [1, 'fi,ve\nlines'], [2, 'six']])
    prepare(tmp_path, 'in', '--tokenizer=byte')
    assert sorted(dataset(tmp_path / 'data' / 'in').all) == ['fi,ve\nlines', 'four', 'one', 'six', 'three', 'two']
    parquet(tmp_path / 'no' / 'a.parquet', left=[1], right=[2])
    assert 'left, right' in prepare(tmp_path, 'no', code=2)
    parquet(tmp_path / 'two' / 'a.parquet', left=['a'], right=['b'])
    assert 'left, right' in prepare(tmp_path, 'two', code=2)
    assert 'no column centre' in prepare(tmp_path, 'two', '--text_column=centre', code=2)
    assert sorted(os.listdir(tmp_path / 'data')) == ['in']

def hub(folder, **more):
    if importlib.util.find_spec('datasets') is None:
        pytest.skip('datasets is not installed: pip install datasets')
    return {'env': environment(HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1, HF_HOME=folder / 'home', HF_DATASETS_CACHE=folder / 'cache', **more)}

@pytest.mark.parametrize('ending', ['parquet', 'jsonl'])
def test_a_dataset_of_hugging_face(tmp_path, ending):
    texts = [f'row {i} ' + 'of some length ' * (i % 4 + 1) for i in range(90)]
    for i in range(3):
        if ending == 'parquet':
            parquet(tmp_path / 'rows' / f'train-{i}.parquet', text=texts[i::3], id=list(range(30)))
        else:
            write(tmp_path / 'rows' / f'train-{i}.jsonl', jsonl(*texts[i::3]))
    said = prepare(tmp_path, 'hf:./rows', '--tokenizer=byte', f'--workers={1 + (ending == "jsonl")}', **hub(tmp_path))
    it = dataset(tmp_path / 'data' / 'rows')
    assert sorted(it.all) == sorted(texts) and it.meta['sources'] == ['hf:./rows'] and it.meta['kinds']['hf']['documents'] == 90
    assert 'now: python train.py --dataset=rows' in said
    if ending == 'jsonl':
        driven(tmp_path, 'prepare.make_tokenizer = lambda *args: os._exit(9)', 'hf:./rows', '--tokenizer=byte', '--out=data/c', code=9,
               **hub(tmp_path))
        os.rename(tmp_path / 'rows', tmp_path / 'away')  # what cannot be had now does not cost what was read before
        assert 'hf:./rows' in prepare(tmp_path, 'hf:./rows', '--tokenizer=byte', '--out=data/c', code=2, **hub(tmp_path))
        assert parts(tmp_path / 'data' / 'c.partial')

@pytest.mark.parametrize('package, argv', [('datasets', ['hf:owner/name', '--out=data/x']), ('ray', ['mine', '--engine=ray'])])
def test_packages_that_are_not_there(corpus, package, argv):
    write(corpus / 'shadow' / package / '__init__.py', f'raise ModuleNotFoundError("No module named {package!r}")')
    said = prepare(corpus, *argv, code=2, env=environment(PYTHONPATH=corpus / 'shadow'))
    assert f'pip install {package}' in said and not (corpus / 'data').exists() or os.listdir(corpus / 'data') == []

def test_standard_library_by_default(tmp_path):
    import sysconfig
    for name in ('argparse.py', 'bisect.py', 'colorsys.py', 'csv.py', 'fnmatch.py', 'glob.py', 'heapq.py', 'keyword.py'):
        write(tmp_path / 'lib' / name, open(os.path.join(sysconfig.get_path('stdlib'), name), 'rb').read())
    write(tmp_path / 'lib' / 'test' / 'test_x.py', 'never read')
    driven(tmp_path, "prepare.sources.sysconfig.get_path = lambda name: 'lib'", '--vocab_size=600')
    it = dataset(tmp_path / 'data' / 'stdlib')
    assert 'standard library' in it.meta['sources'][0] and len(it.all) == 8 and it.meta['kinds']['code']['files'] == 8

# -----------------------------------------------------------------------------
# Tokenizers

def test_a_given_tokenizer_is_kept(corpus):
    prepare(corpus, 'mine', '--vocab_size=280', '--out=data/a')
    prepare(corpus, 'mine/1', '--tokenizer=data/a', '--out=data/b')
    assert dataset(corpus / 'data' / 'a').meta['tokenizer'] == dataset(corpus / 'data' / 'b').meta['tokenizer']
    write(corpus / 'x.txt', 'abc ' * 10)
    prepare(corpus, 'x.txt', '--tokenizer=char')
    assert "'d' (U+0064)" in prepare(corpus, 'mine', '--tokenizer=data/x', code=2)
    assert "'d' (U+0064)" in prepare(corpus, 'mine', '--tokenizer=data/x', '--workers=2', code=2)
    assert sorted(os.listdir(corpus / 'data')) == ['a', 'b', 'x']

@pytest.mark.parametrize('n', [3000, 500_000])
def test_bpe_learns_from_train_alone(tmp_path, n):
    write(tmp_path / 'x.txt', 'ab ' * n + 'zq ' * (n // 10))  # a text of its own, of one piece and of several
    prepare(tmp_path, 'x.txt', '--val_fraction=0.1')
    tok = dataset(tmp_path / 'data' / 'x').tok
    assert len(tok.encode(' ab')) == 1 and len(tok.encode(' zq')) == 3

def test_bpe_learns_from_the_end_of_train(tmp_path):
    write(tmp_path / 'x.txt', 'ab ' * 330_000 + 'cd ' * 30_000 + 'zq ' * 30_000)
    prepare(tmp_path, 'x.txt', '--val_fraction=0.1')
    tok = dataset(tmp_path / 'data' / 'x').tok
    assert [len(tok.encode(word)) for word in (' ab', ' cd', ' zq')] == [1, 1, 3]

SPY = '''
import json
def spy(kind, texts=(), *more):
    texts = list(texts)
    json.dump(texts, open('seen.json', 'w'))
    return build(kind, texts, *more)
prepare.build = spy
'''

def test_bpe_is_trained_on_a_sample(tmp_path):
    texts = [chr(0x4e00 + i) + prose(8000, i) for i in range(150)]
    write(tmp_path / 'a.jsonl', jsonl(*texts))
    seen = lambda: json.loads((tmp_path / 'seen.json').read_text())
    driven(tmp_path, SPY, 'a.jsonl', '--sample_mb=0.3', '--vocab_size=600')
    some, first = seen(), dataset(tmp_path / 'data' / 'a')
    assert 200_000 < len(''.join(some)) < 400_000
    assert set(some) < set(first.docs['train']) and len(set(some)) == len(some)
    assert min(texts.index(text) for text in some) < 30 and max(texts.index(text) for text in some) > 120
    driven(tmp_path, SPY, 'a.jsonl', '--sample_mb=0.3', '--vocab_size=600', '--out=data/b')
    assert seen() == some and files(tmp_path / 'data' / 'a') == files(tmp_path / 'data' / 'b')
    driven(tmp_path, SPY, 'a.jsonl', '--vocab_size=600')
    assert seen() == first.docs['train']

# -----------------------------------------------------------------------------
# Mistakes

def test_errors_are_one_line_and_harm_nothing(corpus):
    prepare(corpus, 'mine', '--out=data/old', '--vocab_size=270')
    before = files(corpus / 'data' / 'old')
    write(corpus / 'pictures' / 'a.png', b'\x89PNG')
    write(corpus / 'pictures' / 'b.png', b'\x89PNG')
    write(corpus / 'letters' / 'to_mother.txt', 'dear mother')
    write(corpus / 'one.txt', 'x')
    write(corpus / 'blank.txt', ' \n')
    for words, *argv in (
        ('did you mean mine?', 'mime'),
        ('2 unknown type .png', 'pictures'), ('nothing readable (1 empty)', 'blank.txt'),
        ('val_fraction=1.0', 'mine', '--val_fraction=1'), ('val_fraction=0.0', 'mine', '--val_fraction=0'),
        ('tokenizer=bpee', 'mine', '--tokenizer=bpee'), ('259', 'mine', '--vocab_size=258'),
        ('engine=rai must be local or ray', 'mine', '--engine=rai'), ('workers=-1', 'mine', '--workers=-1'),
        ('pdf=word', 'mine', '--pdf=word'), ('sample_mb=0.0', 'mine', '--sample_mb=0'), ('max_file_mb=-1', 'mine', '--max_file_mb=-1'),
        ('did you mean --vocab_size?', 'mine', '--vocab_sise=300'),
        ('will not be overwritten', 'mine', '--out=letters'), ('will not be overwritten', 'mine', '--out=one.txt'),
        ('one.txt/data', 'mine', '--out=one.txt/data'),
        ('too few to split', 'one.txt'),
    ):
        out = [] if any(arg.startswith('--out') for arg in argv) else ['--out=data/old']
        assert words in prepare(corpus, *out, *argv, code=2).replace('\\', '/')
        assert os.listdir(corpus / 'data') == ['old'] and not (corpus / 'letters.partial').exists(), argv
    assert files(corpus / 'data' / 'old') == before
    assert (corpus / 'letters' / 'to_mother.txt').read_text() == 'dear mother'

    write(corpus / 'data' / 'old' / 'my_notes.txt', 'mine')  # now it is more than a dataset
    assert 'will not be overwritten' in prepare(corpus, 'mine', '--out=data/old', code=2)

def test_a_mistake_costs_no_journal(corpus):
    """A run was stopped; then the command is mistyped."""
    driven(corpus, 'prepare.make_tokenizer = lambda *args: os._exit(9)', 'mine', '--vocab_size=300', code=9)
    for wrong in ('--pdf=word', '--vocab_size=3', '--tokenizer=bpee', '--engine=rai'):
        prepare(corpus, 'mine', '--vocab_size=300', wrong, code=2)
    assert 'going on: ' in prepare(corpus, 'mine', '--vocab_size=300')

# -----------------------------------------------------------------------------
# What went wrong once

def test_hidden_files_in_a_dataset_are_not_deleted(corpus):
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    write(corpus / 'data' / 'a' / '.dvc', 'mine')
    assert 'will not be overwritten' in prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a', code=2)
    assert (corpus / 'data' / 'a' / '.dvc').read_text() == 'mine'

@pytest.mark.parametrize('ending', ['.text', '.rows', '.json'])
def test_a_power_cut_emptied_a_file_of_the_journal(corpus, ending):
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    driven(corpus, 'prepare.make_tokenizer = lambda *args: os._exit(9)', 'mine', '--tokenizer=byte', '--out=data/b', code=9)
    part = next(path for path in (corpus / 'data' / 'b.partial').iterdir() if path.suffix == ending and path.stem != 'all')
    part.write_bytes(b'')
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')

def test_what_the_disk_refused_is_asked_again(corpus):
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    path = corpus / 'mine' / '1' / '1.txt'
    fails = f'''
import builtins
from mambino.prepare import readers
real = builtins.open
def refuse(path, *args, **more):
    if str(path) == {os.path.join('mine', '1', '1.txt')!r}:
        raise OSError(5, 'Input/output error')
    return real(path, *args, **more)
readers.open = refuse
prepare.make_tokenizer = lambda *args: os._exit(9)
'''
    driven(corpus, fails, 'mine', '--tokenizer=byte', '--out=data/b', code=9)
    reports = [json.loads(p.read_text()) for p in (corpus / 'data' / 'b.partial').glob('*.json')]
    assert [os.path.basename(e['file']) for r in reports for e in r['skipped']] == [path.name] and any(r['again'] for r in reports)
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')

def test_junk_is_left_out_beside_what_exclude_names(corpus):
    for name in ('node_modules/a.js', 'build/b.js', 'c.js'):
        write(corpus / 'web' / name, f'let {name[0]} = 1')
    said = prepare(corpus, 'web', '--exclude=build/', '--dry_run')
    assert 'c.js' in said and not re.search(r'^code.*[ab]\.js', said, re.M) and '2 excluded' in said
    assert re.search(r'^code.*a\.js', prepare(corpus, 'web', '--exclude=!node_modules/', '--dry_run'), re.M)

def test_append_with_copies_keeps_them_on_one_side(corpus):
    text = 'a document that is large at first. ' * 30
    write(corpus / 'first' / 'large.txt', text)
    for i in range(4):
        write(corpus / 'first' / f'{i}.txt', f'small {i}')
    for i in range(60):
        write(corpus / 'more' / f'{i}.txt', f'{i} others that make it small. ' * 30)
    write(corpus / 'more' / 'copy.txt', text)
    for seed in range(8):
        shutil.rmtree(corpus / 'data', ignore_errors=True)
        prepare(corpus, 'first', '--tokenizer=byte', f'--split_seed={seed}', '--out=data/appended')
        prepare(corpus, 'more', '--append', '--dedupe=False', '--out=data/appended')
        assert [text in dataset(corpus / 'data' / 'appended').docs[side] for side in ('train', 'val')] == [True, False], seed

def test_a_stopped_run_leaves_no_tokenizer_of_another_split(tmp_path):
    """One document, cut elsewhere: the tokenizer has learnt from another text."""
    write(tmp_path / 'one.txt', prose(5000, 1) + 'but then something else, ' * 500)
    argv = ('one.txt', '--vocab_size=400')
    driven(tmp_path, 'prepare.encode_all = lambda *args: os._exit(9)', *argv, '--val_fraction=0.1', '--out=data/b', code=9)
    for name in 'a', 'b':
        prepare(tmp_path, *argv, '--val_fraction=0.7', f'--out=data/{name}')
    assert files(tmp_path / 'data' / 'a') == files(tmp_path / 'data' / 'b')

def test_limits_may_be_infinite_and_seeds_may_not(corpus):
    write(corpus / 'page.html', '<p>hello there</p>' * 20)
    prepare(corpus, 'page.html', '--tokenizer=byte', '--file_seconds=inf', '--file_memory_mb=inf')
    assert 'hello there' in dataset(corpus / 'data' / 'page').docs['train'][0]
    assert 'split_seed' in prepare(corpus, 'mine', f'--split_seed={2 ** 64}', code=2)

def test_ray_does_not_fall_back_from_a_cluster_that_was_named(corpus):
    pytest.importorskip('ray')
    assert 'RAY_ADDRESS' in prepare(corpus, 'mine', '--engine=ray', code=2, env=environment(RAY_ADDRESS='127.0.0.1:1'))

def test_few_documents_are_split_by_their_size(tmp_path):
    """However the hashes fall, val is not most of the text, and is not next to nothing."""
    for i, size in enumerate([14_000, 7_000, 600, 600, 40]):
        write(tmp_path / 'few' / f'{i}.txt', (f'document {i} of {size} ' * size)[:size])
    for seed in range(10):
        prepare(tmp_path, 'few', '--tokenizer=byte', f'--split_seed={seed}')
        it = dataset(tmp_path / 'data' / 'few')
        assert 300 <= it.meta['splits']['val']['bytes'] <= 1300, seed
