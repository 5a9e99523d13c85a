"""files.py: what packs a file is known by its first bytes, and rows of JSON by theirs."""
import gzip
import json
import lzma
import os
import sys

import pytest
from helpers.readers import read, reason
from helpers.sources import look, names, write

from mambino.prepare.sources import find

LATER = {'a.lz4': b'\x04\x22\x4d\x18', 'a.jsonl.br': b'\x1b\0\0', 'a.7z': b'7z\xbc\xaf\x27\x1c'}
ROWS = b''.join(b'{"body": "Comment %d on bread and tea."}\n' % i for i in range(5000))
TEXTS = [f'Comment {i} on bread and tea.' for i in range(5000)]


def test_rows_are_known_whatever_they_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = '{"text": "Bread and tea."}\n' * 9
    write(tmp_path / 'm' / 'RC_2010-01.gz', gzip.compress(rows.encode()))
    write(tmp_path / 'm' / 'dump.2010', rows)
    write(tmp_path / 'm' / 'list.db', json.dumps([{'text': 'Bread.'}] * 9))
    write(tmp_path / 'm' / 'app.state', json.dumps({'window': {'width': 9}}))
    kept, skipped = look('m')
    assert names(kept) == {'RC_2010-01.gz': 'text', 'dump.2010': 'jsonl', 'list.db': 'jsonl'}
    assert names(skipped) == {'app.state': 'unknown type .state'}
    for name, content in LATER.items():
        write(tmp_path / 'n' / name, content + bytes(9))
    assert sorted(look('n')[1].values()) == [
        'a 7z archive: unpack it first', 'packed with brotli: unpack it first', 'packed with lz4: unpack it first']
    write(tmp_path / 'm' / 'large.txt', rows)
    write(tmp_path / 'm' / 'letter.txt', 'Dear Anna,\n' * 30)
    kept, skipped = find(['m'], max_file_mb=0.0001)
    assert {source.kind for source in kept if source.path.endswith('large.txt')} == {'jsonl'}
    assert [entry['file'] for entry in skipped if 'larger' in entry['reason']] == [os.path.join('m', 'letter.txt')]


def frame(data, log):
    """A frame of zstd, its blocks as they are, with a window of 2 ** log bytes."""
    blocks = [data[i:i + 100_000] for i in range(0, len(data), 100_000)]
    packed = b'\x28\xb5\x2f\xfd' + bytes([0, (log - 10) << 3])
    for i, block in enumerate(blocks):
        packed += (len(block) << 3 | (i == len(blocks) - 1)).to_bytes(3, 'little') + block
    return packed


SKIPPED = b'\x50\x2a\x4d\x18\x04\0\0\0skip'


@pytest.mark.parametrize('log', [20, 27, 28, 31])
@pytest.mark.parametrize('name', ['a.jsonl.zst', 'RC_2010-01.zst', 'dump'])
def test_zstd_with_windows_of_any_size(tmp_path, log, name):
    if log > 27:
        pytest.importorskip('zstandard')
    write(tmp_path / name, SKIPPED + frame(ROWS, log) + SKIPPED + frame(b''.join(ROWS.splitlines(True)[:10]), log))
    assert read(tmp_path / name) == (TEXTS + TEXTS[:10], [])
    write(tmp_path / name, frame(ROWS, log)[:-30_000])
    documents, notes = read(tmp_path / name)
    assert 0 < len(documents) < 5000 and notes == [f'stopped after {len(documents):,} documents: truncated']


def test_a_wide_window_without_the_package_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'zstandard', None)
    monkeypatch.setitem(sys.modules, 'compression', None)
    write(tmp_path / 'a.jsonl.zst', frame(ROWS, 31))
    assert reason(tmp_path / 'a.jsonl.zst') == (
        'zstd window of 2,048 MB: unpack it with zstd -d --long=31, or pip install zstandard')


def test_a_name_only_suggests_how_a_file_is_packed(tmp_path):
    for name, content in {
        'packed.jsonl': gzip.compress(ROWS), 'plain.jsonl.gz': ROWS, 'other.jsonl.zst': gzip.compress(ROWS),
        'old.jsonl.lzma': lzma.compress(ROWS, lzma.FORMAT_ALONE),
        'members.jsonl.gz': gzip.compress(ROWS[:999]) + gzip.compress(ROWS[999:]),
    }.items():
        write(tmp_path / name, content)
        assert read(tmp_path / name) == (TEXTS, []), name
