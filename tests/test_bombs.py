"""Files that unpack to far more than they are: what is left out, and that honest ones are read."""
import bz2
import copy
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import pyarrow
import pytest
from helpers.readers import OPTIONS, linux, read, reason, write

from mambino.prepare import account, files, isolate, sniff, sources, spool
from mambino.prepare.documents.office import open_zip
from mambino.prepare.files import Bomb
from mambino.prepare.tables import json_rows, json_values

pytestmark = pytest.mark.usefixtures('no_reader_left', 'small')
PACK = {
    'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress,
    'zst': lambda data: pyarrow.Codec('zstd').compress(data, asbytes=True),
}
SAID = 'if it is no bomb, raise --unpack_ratio'


@pytest.fixture
def small(monkeypatch):
    """20 kB are nothing to fear, and 10 times the size of a packed file."""
    monkeypatch.setattr(files, 'SMALL', 20_000)
    monkeypatch.setattr(files, 'TIMES', 10)
    monkeypatch.setattr(files, '_times', 10)


def rows(n, text='one row of many'):
    return ''.join(json.dumps({'text': f'{text} {i}'}) + '\n' for i in range(n)).encode()


@pytest.mark.parametrize('packing', PACK)
def test_packed_files(tmp_path, packing):
    bomb = write(tmp_path / f'a.txt.{packing}', PACK[packing](b'la ' * 100_000))
    with pytest.raises(Bomb, match=SAID):
        list(files.chunks(bomb))
    assert reason(bomb, unpack_ratio=10).startswith('unpacks to more than 0 MB')
    honest = PACK[packing](b'la ' * 6000)
    assert read(write(tmp_path / f'b.txt.{packing}', honest)) == (['la ' * 6000], [])
    assert len(read(bomb, unpack_ratio=100_000)[0][0]) == 300_000  # as the message says


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.csv.xz'])
def test_what_came_out_of_a_bomb_is_left_out_too(tmp_path, name):
    """Not only what would have come."""
    data = rows(5000) if 'json' in name else b'text\n' + b'a row like any other of them\n' * 5000
    bomb = write(tmp_path / name, (gzip if name.endswith('gz') else lzma).compress(data))
    assert SAID in reason(bomb)


def zipped(path, **members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace('_', '.'), data)
    return path


def test_office_documents(tmp_path):
    """docx, pptx, xlsx, odt and epub all open their file so."""
    with pytest.raises(Bomb, match=SAID):
        open_zip(zipped(tmp_path / 'a.docx', word_xml=b' ' * 100_000))
    open_zip(zipped(tmp_path / 'b.docx', word_xml=b' ' * 10_000)).close()


def test_members_that_lie_in_each_other(tmp_path):
    """The same packed bytes under many names: all of them together are more than the file has."""
    path = tmp_path / 'a.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('0.txt', os.urandom(3000).hex())
        for i in range(1, 50):
            archive.filelist.append(copy.copy(archive.filelist[0]))
            archive.filelist[-1].filename = f'{i}.txt'
    with pytest.raises(Bomb):
        open_zip(path)


def test_a_huge_mimetype_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, 'read', None)
    assert sniff.kind_of_zip(zipped(tmp_path / 'a.zip', mimetype=b'x' * 1_000_000), 'zip') == 'zip'


@pytest.mark.parametrize('kind', ['zip', 'tar', 'tgz'])
def test_archives_in_which_each_member_is_honest(tmp_path, kind):
    """A packed file, or a document, each of which may hold as much as it does: together they may not."""
    inner = {f'{i}.txt.gz': gzip.compress(b'la ' * 5000) for i in range(30)}
    inner['letter.odt'] = zipped(tmp_path / 'x.odt', content_xml=b' ' * 15_000).read_bytes()
    path = tmp_path / f'a.{kind}'
    for names in list(inner)[:1], list(inner):
        if kind == 'zip':
            with zipfile.ZipFile(path, 'w') as archive:
                for name in names:
                    archive.writestr(name, inner[name])
        else:
            with tarfile.open(path, 'w:gz' if kind == 'tgz' else 'w') as archive:
                for name in names:
                    entry = tarfile.TarInfo(name)
                    entry.size = len(inner[name])
                    archive.addfile(entry, io.BytesIO(inner[name]))
        if len(names) == 1:
            assert read(path)[0] == ['la ' * 5000]
    assert SAID in reason(path)


def test_a_packed_tar_is_limited_as_a_whole(tmp_path):
    with tarfile.open(tmp_path / 'a.tgz', 'w:gz') as archive:
        entry = tarfile.TarInfo('a.txt')
        entry.size = 300_000
        archive.addfile(entry, io.BytesIO(b'la ' * 100_000))
    assert SAID in reason(tmp_path / 'a.tgz')


# -----------------------------------------------------------------------------
# On the way to the disk

def extracted(tmp_path, path, **options):
    """(report, the rows) of a file."""
    task = {
        'folder': str(tmp_path), 'key': 'key', 'cwd': os.getcwd(), 'seed': 1337, 'chars': False,
        'options': OPTIONS | {'unpack_ratio': 10} | options, 'sizes': [os.path.getsize(path)], 'parts': [None],
        'sources': [list(sources.Source(str(path), 'text', os.path.getsize(path), 0))], 'plans': [{}],
    }
    spool.extract(task)
    report = spool.report_of(str(tmp_path), 'key')
    return report, (tmp_path / 'key.rows').read_bytes()


def test_text_that_no_limit_before_has_seen(tmp_path, monkeypatch):
    """A column of one value a million times, as parquet may hold it; rows of nothing cost as well."""
    path = write(tmp_path / 'a.txt', 'x' * 100)
    for text in 'long enough ' * 100, 'x':
        monkeypatch.setattr(
            spool.archive, 'read', lambda *args, text=text: ((f'{i} {text}', True) for i in range(10_000)))
        report, rows = extracted(tmp_path, path)
        assert SAID in report['skipped'][0]['reason'] and rows == b''


def test_a_table_of_copies_is_no_bomb_at_once(tmp_path, monkeypatch):
    """They take no room; but without end they are one."""
    path = write(tmp_path / 'a.txt', 'x' * 100)
    for n, is_bomb in (100, False), (3000, True):
        monkeypatch.setattr(spool.archive, 'read', lambda *args, n=n: (('long enough ' * 100, True) for _ in range(n)))
        report, _ = extracted(tmp_path, path, dedupe=True)
        assert bool(report['skipped']) == is_bomb
        assert is_bomb or report['copies'] == n - 1
    assert SAID in report['skipped'][0]['reason']


def test_copies_are_dropped_before_they_are_written(tmp_path, monkeypatch):
    path = write(tmp_path / 'a.txt', 'x' * 100_000)
    monkeypatch.setattr(spool, 'BLOCK', 5000)
    texts = ['the same again ' * 20, 'once', 'the same again ' * 20] * 100
    monkeypatch.setattr(spool.archive, 'read', lambda *args: ((text, True) for text in texts))
    report, rows = extracted(tmp_path, path, dedupe=True)
    assert len(rows) == 2 * spool.ROW.itemsize and report['copies'] == 298
    assert sum(unpacked for _, _, unpacked in report['blocks']) == len(texts[0] + texts[1])
    assert account.settle([{'key': 'key'}], [report])['copies'] == 298
    report, rows = extracted(tmp_path, path, dedupe=False)
    assert len(rows) == 300 * spool.ROW.itemsize and report['copies'] == 0


# -----------------------------------------------------------------------------
# What takes far more memory than it is long

def test_a_row_of_json_that_takes_too_much_memory(tmp_path, monkeypatch):
    for module in json_rows, json_values:
        monkeypatch.setattr(module, 'COSTLY', 1000)
    bad = b'{"text": "bad", "a": [' + b'{},' * 30_000 + b'{}]}\n'
    path = write(tmp_path / 'a.jsonl', rows(9) + bad + rows(2))
    documents, notes = read(path, file_memory_mb=1)
    assert len(documents) == 11 and notes == ['1 lines were too long']
    assert len(read(path)[0]) == 12


@linux
def test_a_large_notebook_is_read_within_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(isolate, 'HEAVY', 1000)
    cell = {'cell_type': 'code', 'source': 'print(1)\n' * 200}
    path = write(tmp_path / 'a.ipynb', json.dumps({'cells': [cell]}))
    assert read(path)[0] == ['print(1)\n' * 200]
    write(path, '{"cells": [' + '{},' * 300_000 + '{}]}')
    assert reason(path, file_memory_mb=15) == files.NO_MEMORY
