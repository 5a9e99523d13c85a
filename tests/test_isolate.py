"""isolate.py: readers that hang, eat all memory or crash."""
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import time
import uuid
import zipfile

import pytest
from helpers.prepare import wait_for
from helpers.readers import (
    OPTIONS,
    ROOT,
    alive,
    broken_files,
    evil_pdfs,
    good_files,
    linux,
    make_pdf,
    read,
    write,
)

from mambino.prepare import files, isolate, sources
from mambino.prepare.files import Notes, Skip

pytestmark = pytest.mark.usefixtures('no_reader_left')


@pytest.fixture
def new_reader():
    """For what is in the environment of the reader process: none before, none after."""
    isolate.stop_reader()
    yield
    isolate.stop_reader()


# -----------------------------------------------------------------------------
# PDFs that go wrong

@linux
def test_pdfs_that_cost_too_much(tmp_path, engine, new_reader):
    results = {}
    for name, data in evil_pdfs().items():
        began = time.monotonic()
        try:
            results[name] = read(
                write(tmp_path / f'{name}.pdf', data),
                pdf=engine, file_seconds=1, file_memory_mb=200)
        except Skip as reason:
            results[name] = str(reason)
        assert time.monotonic() - began < 120, name  # not for ever, however busy the machine is
    if engine == 'pypdf':
        assert results['burn'] in ('took longer than 1 s (--file_seconds)', files.NO_MEMORY)
    assert read(write(tmp_path / 'good.pdf', make_pdf(['all is well'])), pdf=engine)[0] == [
        'all is well\n'
    ]


# -----------------------------------------------------------------------------
# Readers that go wrong: in the reader process, pypdfium2 is the following, and does what the file says

DRIVER = '''
import os, re, signal, time
def begin():
    if 'BEGUN' in os.environ: open(os.environ['BEGUN'], 'w').close()
class PdfiumError(Exception): pass
class Page:
    def __init__(self, what): self.what = what
    def get_textpage(self): return self
    def count_chars(self): return 0
    def close(self): pass
    def get_text_bounded(self):
        begin()
        if self.what == 'crash': os.kill(os.getpid(), signal.SIGSEGV)
        if self.what == 'burn': re.match('(a+)+$', 'a' * 60 + 'b')  # and keeps Python's lock all the time
        if self.what == 'sleep': time.sleep(1000)
        if self.what == 'eat': self.eaten = [bytearray(1 << 24) for _ in range(1 << 20)]
        if self.what == 'keep': keep.append(bytearray(60_000_000))
        if self.what == 'need': bytearray(60_000_000)
        if self.what == 'exit': os._exit(3)
        if self.what == 'print': print('noise' * 100_000, flush=True)
        return 'text of ' + self.what
keep = []
class PdfDocument(list):
    def __init__(self, f): self += map(Page, f.read().decode().split()[1:])
    def close(self): pass
'''


RAW = '''
def FPDFPage_GetAnnotCount(page): return 0
def FPDFPage_CountObjects(page): return 0
'''


@pytest.fixture
def driver(tmp_path, monkeypatch, new_reader):
    """Reads a file that says what is to happen on its pages. It may take its time, on a busy machine."""
    (tmp_path / 'driver' / 'pypdfium2').mkdir(parents=True)
    write(tmp_path / 'driver' / 'pypdfium2' / '__init__.py', DRIVER)
    write(tmp_path / 'driver' / 'pypdfium2' / 'raw.py', RAW)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'driver'))
    def drive(what, **options):
        path = write(tmp_path / 'a.pdf', '%PDF-1.4 ' + what)
        return read(path, pdf='pypdfium2', **dict(file_seconds=60, file_memory_mb=300) | options)[0][
            0
        ]
    return drive


def why(call, *args, **options):
    with pytest.raises(Skip) as reason:
        call(*args, **options)
    return str(reason.value)


FINE = 'text of fine\n'


def test_readers_that_crash(driver):
    for what, fate in (('crash', 'SIGSEGV'), ('exit', 'status 3'), ('fine crash', 'SIGSEGV')):
        for _ in range(2):  # in a new process, and in one that has read before
            assert why(driver, what) == f'crashed its reader ({fate})'
            assert driver('fine') == FINE
    # what a library says is no answer
    assert driver('print') == 'text of print\n' and driver('fine') == FINE


def test_readers_that_hang(driver):
    began = time.monotonic()
    for what in ('burn', 'fine burn'):
        assert why(driver, what, file_seconds=1) == 'took longer than 1 s (--file_seconds)'
        assert driver('fine') == FINE
    # that takes no computing: the clock ends it
    assert why(driver, 'sleep', file_seconds=0.3) == 'took longer than 0.3 s (--file_seconds)'
    assert driver('fine') == FINE
    assert time.monotonic() - began < 300  # it would sleep longer, and burn for ever


@linux
def test_readers_that_eat(driver):
    for what in ('eat', 'fine eat'):
        assert why(driver, what) == files.NO_MEMORY
        assert driver('fine') == FINE
    # memory that an earlier file took does not count: the second one gets a process of its own
    isolate.stop_reader()
    assert driver('keep', file_memory_mb=100) == 'text of keep\n'
    first = isolate._process.pid
    assert driver('fine need', file_memory_mb=100) == 'text of fine\n\ntext of need\n'
    assert isolate._process.pid != first


def test_whoever_stops_reading_leaves_nothing_behind(driver, tmp_path):
    assert driver('fine') == FINE
    process = isolate._process
    path = write(tmp_path / 'b.pdf', '%PDF-1.4 ' + 'fine ' * 1000)
    documents = isolate.read(
        sources.Source(str(path), 'pdf', 0, 0), OPTIONS | {'pdf': 'pypdfium2'}, Notes()
    )
    next(documents)
    documents.close()
    assert process.poll() is not None and driver('fine') == FINE


@linux
@pytest.mark.parametrize('what', ['burn', 'sleep'])
def test_the_reader_goes_when_its_parent_is_killed(driver, tmp_path, what, monkeypatch):
    monkeypatch.setenv('MARK', mark := uuid.uuid4().hex)
    monkeypatch.setenv('BEGUN', str(tmp_path / 'begun'))
    path = write(tmp_path / 'a.pdf', f'%PDF-1.4 {what}')
    source, options = sources.Source(str(path), 'pdf', 0, 0), OPTIONS | {'pdf': 'pypdfium2', 'file_seconds': 1000}
    program = (
        f'from mambino.prepare.isolate import *; from mambino.prepare.sources import Source; '
        f'list(read({source}, {options}, Notes()))'
    )
    parent = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT)
    wait_for((tmp_path / 'begun').exists)  # it is in the middle of it
    assert len(alive(mark)) == 2
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(mark))


# -----------------------------------------------------------------------------
# All at once

def test_what_becomes_of_a_file_depends_on_it_alone(tmp_path, engine, new_reader):
    files = dict(broken_files(good_files(), seed=1, flips=6)) | {
        'circle.pdf': evil_pdfs()['circle'],
        'self.pdf': evil_pdfs()['self'],
    }
    orders, results = (
        [sorted(files), sorted(files)[::-1], random.Random(0).sample(sorted(files), len(files))],
        [],
    )
    for order in orders:
        result = {}
        for name in order:
            try:
                result[name] = read(write(tmp_path / name, files[name]), pdf=engine)
            except Skip as reason:
                result[name] = str(reason)
        isolate.stop_reader()
        results.append(result)
    assert results[0] == results[1] == results[2]
    assert len({str(result) for result in results[0].values()}) > 12


@linux
def test_a_hostile_folder(tmp_path):
    import resource
    folder = tmp_path / 'hostile'
    folder.mkdir()
    broken = dict(broken_files(good_files()))
    assert len(broken) >= 500
    for name, data in broken.items():
        write(folder / name, data)
    for name, data in evil_pdfs().items():
        write(folder / f'evil-{name}.pdf', data)
    write(
        folder / 'locked.pdf',
        make_pdf(['secret'], encryption=dict(owner_password='a', user_password='b')),
    )
    with zipfile.ZipFile(folder / 'zip.pdf', 'w') as z:
        z.writestr('a.txt', 'text')
    write(folder / 'line.txt', 'word ' * 2_000_000)
    os.mkfifo(folder / 'fifo.txt')
    write(folder / 'secret.txt', 'nobody may read this').chmod(0)
    write(folder / 'bomb.txt.gz', gzip.compress(b'la la ' * 50_000_000, 1))
    write(folder / 'half.txt.xz', lzma.compress(random.Random(0).randbytes(9999))[:5000])
    write(folder / 'nuls.txt', bytes(5000))
    write(
        folder / 'long.jsonl',
        '{"text": "short"}\n' * 9 + '{"text": "' + 'x' * 70_000_000 + '"}\n{"text": "short too"}\n')
    write(folder / 'nested.json', '[' * 1_000_000)
    write(folder / 'nested.html', '<div>' * 100_000 + 'deep')
    write(folder / 'open.html', '<a ' * 100_000 + '<!--')
    with open(os.path.join(os.fsencode(folder), b'not utf-8 \xff\xfe.txt'), 'w') as f:
        f.write('a name that is not UTF-8')
    os.symlink('.', folder / 'loop')
    os.symlink('nowhere', folder / 'nowhere.txt')
    paths = {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}

    mark = uuid.uuid4().hex
    command = [
        sys.executable,
        os.path.join(ROOT, 'prepare.py'),
        'hostile', '--workers=2', '--pdf=pypdf', '--tokenizer=byte', '--out=out',
        '--file_seconds=2', '--file_memory_mb=300', '--max_file_mb=100',
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True,
        env={**os.environ, 'PYTHONUTF8': '1', 'MARK': mark},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr.decode()
    assert b'Traceback' not in done.stderr and computed < 80
    assert not alive(mark)
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text(encoding='utf-8'))
    skipped = {os.path.join(tmp_path, entry['file']): entry['reason'] for entry in meta['skipped']}
    assert sum(kind['files'] for kind in meta['kinds'].values()) + len(skipped) == len(paths)
    assert set(skipped) <= paths and all(skipped.values()) and len(set(skipped.values())) < 60
    why = {os.path.basename(path): reason for path, reason in skipped.items()}
    assert 'zip.pdf' not in why and why['locked.pdf'] == 'encrypted'
    assert why['fifo.txt'] == 'no regular file'
    assert why['bomb.txt.gz'] == 'larger than 100 MB unpacked'
    assert why['nuls.txt'] == 'binary' and why['half.txt.xz'] == 'truncated'
    assert why.get('secret.txt') == (None if os.geteuid() == 0 else 'Permission denied')
    for name in ('line.txt', 'long.jsonl', 'nested.json', os.fsdecode(b'not utf-8 \xff\xfe.txt')):
        assert name not in why, why[name]
    assert meta['kinds']['pdf']['files'] > 20 and meta['kinds']['parquet']['files'] > 20
