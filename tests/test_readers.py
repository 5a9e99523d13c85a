"""readers.py and webpage.py: texts, packed or not, pages and notebooks."""
import bz2
import gzip
import json
import lzma
import os
import random
import re

import pyarrow
import pyarrow as pa
import pyarrow.parquet
import pyarrow.parquet as pq
import pytest
from helpers.readers import (
    read,
    reason,
    write,
)

from mambino.prepare import files

pytestmark = pytest.mark.usefixtures('no_reader_left')


# -----------------------------------------------------------------------------
# Newlines, compression

WEST = 'Größe, naïve café: “ça coûte 10 €” – voilà.\nEl niño comió muchísimo, ¿verdad?\n' * 5


def test_newlines_and_long_lines(tmp_path):
    n = files.CHUNK
    assert read(write(tmp_path / 'a.txt', b'a\r\nb\rc\n\r\nd\r'))[0] == ['a\nb\nc\n\nd\n']
    for k in range(n - 2, n + 2):  # \r\n on both sides of the end of a chunk
        assert read(write(tmp_path / 'b.txt', b'x' * k + b'\r\n' + b'y\r\n' * 9))[0] == [
            'x' * k + '\n' + 'y\n' * 9
        ]
        assert read(write(tmp_path / 'b.txt', b'x' * k + b'\r\r\n'))[0] == ['x' * k + '\n\n']
    assert read(write(tmp_path / 'c.txt', 'é' * 5_000_000))[0] == ['é' * 5_000_000]


def zst(data):
    return pa.Codec('zstd').compress(data, asbytes=True)


@pytest.mark.parametrize('ending, pack', [
    ('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress), ('.zst', zst)])
def test_packed(tmp_path, ending, pack):
    some = ''.join(random.Random(1).choices('etaoin shrdlu\n', k=30_000))
    assert read(write(tmp_path / f'a.txt{ending}', pack(WEST.encode('cp1252'))))[0] == [WEST]
    assert read(write(tmp_path / f'b.TXT{ending.upper()}', pack(some.encode()) + pack(b'!')))[
        0
    ] == [some + '!']
    assert read(write(tmp_path / f'c.html{ending}', pack(b'<p>so</p>')))[0] == ['so\n']
    assert read(write(tmp_path / f'd.csv{ending}', pack(b'id,text\n1,so\n')))[0] == ['so']
    lines = ''.join(json.dumps({'text': f'{i} {some[i:i + 50]}'}) + '\n' for i in range(2000))
    assert len(read(write(tmp_path / f'e.jsonl{ending}', pack(lines.encode())))[0]) == 2000
    assert read(write(tmp_path / f'f.txt{ending}', pack(b'')))[0] == ['']
    packed = pack(some.encode())
    assert reason(write(tmp_path / f'g.txt{ending}', packed[:len(packed) // 2])) == 'truncated'
    assert read(write(tmp_path / f'h.txt{ending}', b'not packed at all'))[0] == ['not packed at all']
    assert read(write(tmp_path / 'k.txt', packed))[0] == [some]
    assert (
        reason(write(tmp_path / f'i.txt{ending}', pack(b'la ' * 500_000)), max_file_mb=1)
        == 'larger than 1 MB unpacked'
    )
    assert (
        reason(
            write(tmp_path / f'j.txt{ending}', pack(('la ' * 500_000).encode('utf-16'))),
            max_file_mb=1,
        )
        == 'larger than 1 MB unpacked'
    )
    os.rename(
        tmp_path / f'a.txt{ending}',
        os.path.join(os.fsencode(tmp_path), b'n\xff.txt' + ending.encode()),
    )
    assert read(os.path.join(tmp_path, os.fsdecode(b'n\xff.txt') + ending))[0] == [WEST]


def test_what_came_before_the_break_is_kept(tmp_path):
    rng = random.Random(2)
    texts = [' '.join(rng.randbytes(5).hex() for _ in range(80)) for _ in range(5000)]
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    packed = gzip.compress(lines.encode())
    documents, notes = read(write(tmp_path / 'a.jsonl.gz', packed[:len(packed) * 9 // 10]))
    assert 4000 < len(documents) < 5000
    assert notes == [f'stopped after {len(documents):,} documents: truncated']
    broken = write(tmp_path / 'a.json', b'[{"text": "one"}, {"text": "two"}, {"tex' + b' ' * 9)
    assert read(broken, text_column='text') == (['one', 'two'], ['stopped after 2 documents: truncated'])
    rows = json.dumps([{'text': f'row {i}'} for i in range(50)])
    documents, notes = read(write(tmp_path / 'a.json', rows[:-30]))
    assert len(documents) == 48
    assert notes == ['stopped after 48 documents: truncated']
    table = pa.table({'text': texts[:3000]})
    pq.write_table(table, tmp_path / 'a.parquet', row_group_size=500, compression='none')
    data = bytearray((tmp_path / 'a.parquet').read_bytes())
    middle = len(data) * 3 // 4
    data[middle:middle + 60_000] = bytes(60_000)
    documents, notes = read(write(tmp_path / 'a.parquet', data))
    assert len(documents) >= 1000 and documents[:1000] == table['text'].to_pylist()[:1000]
    assert len(documents) == 3000 or re.match(
        f'stopped after {len(documents):,} documents: |{3000 - len(documents)} rows without text', notes[0])


# -----------------------------------------------------------------------------
# Text with a structure

def test_notebooks_of_both_formats(tmp_path):
    cells = [
        {'cell_type': 'markdown', 'source': ['# Title\n', 'text']},
        {'cell_type': 'raw', 'source': 'no'},
        {'cell_type': 'code', 'source': 'x = 1\n', 'outputs': [{'text': 'no'}]},
        {'cell_type': 'code', 'source': []},
    ]
    assert read(write(tmp_path / 'a.ipynb', json.dumps({'cells': cells, 'nbformat': 4})))[0] == [
        '# Title\ntext\n\nx = 1\n'
    ]
    cells = [
        {'cell_type': 'heading', 'source': 'Title'},
        {'cell_type': 'code', 'input': ['x = 1\n', 'y']},
    ]
    assert read(
        write(tmp_path / 'b.ipynb', json.dumps({'worksheets': [{'cells': cells}], 'nbformat': 3}))
    )[0] == ['Title\n\nx = 1\ny\n']
    assert read(write(tmp_path / 'c.ipynb', '{"cells": []}'))[0] == ['']
    for bad in (
        '{"cells": [', '[]', '{}', '{"cells": [1]}', '{"cells": 3}', '[' * 100_000, b'\xff',
        '{"cells": [{"cell_type": "code", "source": 1}]}'):
        assert reason(write(tmp_path / 'd.ipynb', bad)) == 'not a notebook'
