"""readers.py and isolate.py: every kind of file as it should be and as it should not, and readers that hang, eat or crash."""
import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
import zipfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mambino.prepare import isolate
from mambino.prepare import readers
from mambino.prepare import sources
from mambino.prepare.readers import Skip

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OPTIONS = dict(text_column='', max_file_mb=256, pdf='pypdf', file_seconds=20, file_memory_mb=1024)
linux = pytest.mark.skipif(sys.platform != 'linux', reason='limits of memory, and /proc, are of Linux')

def read(path, **options):
    """(documents, notes) of a file."""
    path = str(path)
    kind = sources.kind_of(os.path.basename(path))[0] or 'text'
    notes, documents, parts = [], [], []
    for text, last in isolate.read(sources.Source(path, kind, 0, 0), OPTIONS | options, notes):
        text.encode('utf-8')  # there is nothing in it that UTF-8 cannot hold
        assert '\r' not in text and '\0' not in text
        parts.append(text)
        if last:
            documents.append(''.join(parts))
            parts = []
    return documents, notes

def reason(path, **options):
    """Why a file is skipped: a few words on one line."""
    with pytest.raises(Skip) as why:
        read(path, **options)
    assert 0 < len(str(why.value)) < 200 and '\n' not in str(why.value)
    return str(why.value)

def write(path, content):
    path.write_bytes(content if isinstance(content, (bytes, bytearray)) else content.encode('utf-8'))
    return path

@pytest.fixture(scope='module', autouse=True)
def no_reader_left():
    yield
    isolate.stop_reader()

@pytest.fixture
def new_reader():
    """For what is in the environment of the reader process: none before, none after."""
    isolate.stop_reader()
    yield
    isolate.stop_reader()

# -----------------------------------------------------------------------------
# Encodings, newlines, compression

WEST = 'Größe, naïve café: “ça coûte 10 €” – voilà.\nEl niño comió muchísimo, ¿verdad?\n' * 5
RUSSIAN = 'Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n' * 9
CHINESE = '道可道，非常道。名可名，非常名。\n无名天地之始；有名万物之母。故常无欲，以观其妙。\n' * 9
JAPANESE = '吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n' * 9
GREEK = 'Άνδρα μοι έννεπε, Μούσα, πολύτροπον, ος μάλα πολλά πλάγχθη.\n' * 9

@pytest.mark.parametrize('text', [WEST, RUSSIAN, CHINESE, JAPANESE, GREEK, 'plain ASCII\n'],
                         ids='west russian chinese japanese greek ascii'.split())
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_unicode_of_every_width(tmp_path, text, encoding):
    for name in 'a.txt', 'a.py':
        documents, notes = read(write(tmp_path / name, text.encode(encoding)))
        assert documents == [text]
        assert notes == (['encoding guessed: ' + encoding] if encoding[-3:] in ('-le', '-be') else [])
    big = b'\xfe\xff' + text.encode('utf-16-be')
    assert read(write(tmp_path / 'big.txt', big))[0] == [text]

def test_a_pair_across_the_end_of_the_sample(tmp_path):
    for k in range(5):
        text = 'x' * k + 'abc🎈' * 9000
        assert read(write(tmp_path / 'a.txt', text.encode('utf-16-le')))[0] == [text]

@pytest.mark.parametrize('encoding, text', [('cp1252', WEST), ('cp1251', RUSSIAN), ('koi8-r', RUSSIAN), ('gb18030', CHINESE),
                                            ('shift_jis', JAPANESE), ('cp1253', GREEK), ('cp1252', 'one café\n'), ('cp1252', 'x\n' * 5000 + 'naïve\n')])
def test_legacy_encodings_are_guessed_and_noted(tmp_path, encoding, text):
    documents, notes = read(write(tmp_path / 'old.txt', text.encode(encoding)))
    assert documents == [text] and len(notes) == 1 and notes[0].startswith('encoding guessed: ')

def test_bytes_that_do_not_fit(tmp_path):
    documents, notes = read(write(tmp_path / 'a.txt', WEST.encode() + b'\xff\n' + WEST.encode()))
    assert documents == [WEST + '\ufffd\n' + WEST] and notes == ['1 bytes were no UTF-8']
    late = 'é' * 2_000_000  # the bad byte lies in a later chunk, the chunks begin in the middle of a letter
    documents, notes = read(write(tmp_path / 'b.txt', b'x' + late.encode() + b'\xff'))
    assert documents == ['x' + late + '\ufffd'] and notes == ['1 bytes were no UTF-8']
    documents, notes = read(write(tmp_path / 'c.txt', 'a\ufffdb\n'))  # said on purpose
    assert documents == ['a\ufffdb\n'] and not notes
    assert read(write(tmp_path / 'd.txt', b'a log' * 100 + b'\0' + b' with a zero' * 100))[0] == ['a log' * 100 + ' with a zero' * 100]
    assert read(write(tmp_path / 'e.txt', b'a\0b'))[0] == ['ab']
    for binary in bytes(range(256)) * 9, b'\x7fELF\2\1\1' + bytes(200), b'\x89PNG\r\n\x1a\n' + random.Random(0).randbytes(9999):
        assert reason(write(tmp_path / 'f.txt', binary)) == 'binary'

def test_newlines_and_long_lines(tmp_path):
    n = readers.CHUNK
    assert read(write(tmp_path / 'a.txt', b'a\r\nb\rc\n\r\nd\r'))[0] == ['a\nb\nc\n\nd\n']
    for k in range(n - 2, n + 2):  # \r\n on both sides of the end of a chunk
        assert read(write(tmp_path / 'b.txt', b'x' * k + b'\r\n' + b'y\r\n' * 9))[0] == ['x' * k + '\n' + 'y\n' * 9]
        assert read(write(tmp_path / 'b.txt', b'x' * k + b'\r\r\n'))[0] == ['x' * k + '\n\n']
    assert read(write(tmp_path / 'c.txt', 'é' * 5_000_000))[0] == ['é' * 5_000_000]

def zst(data):
    return pa.Codec('zstd').compress(data, asbytes=True)

@pytest.mark.parametrize('ending, pack', [('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress), ('.zst', zst)])
def test_packed(tmp_path, ending, pack):
    some = ''.join(random.Random(1).choices('etaoin shrdlu\n', k=30_000))
    assert read(write(tmp_path / f'a.txt{ending}', pack(WEST.encode('cp1252'))))[0] == [WEST]
    assert read(write(tmp_path / f'b.TXT{ending.upper()}', pack(some.encode()) + pack(b'!')))[0] == [some + '!']
    assert read(write(tmp_path / f'c.html{ending}', pack(b'<p>so</p>')))[0] == ['so\n']
    assert read(write(tmp_path / f'd.csv{ending}', pack(b'id,text\n1,so\n')))[0] == ['so']
    lines = ''.join(json.dumps({'text': f'{i} {some[i:i + 50]}'}) + '\n' for i in range(2000))
    assert len(read(write(tmp_path / f'e.jsonl{ending}', pack(lines.encode())))[0]) == 2000
    assert read(write(tmp_path / f'f.txt{ending}', pack(b'')))[0] == ['']
    packed = pack(some.encode())
    assert reason(write(tmp_path / f'g.txt{ending}', packed[:len(packed) // 2])) == 'truncated'
    assert reason(write(tmp_path / f'h.txt{ending}', b'not packed at all')).startswith('unreadable')
    assert reason(write(tmp_path / f'i.txt{ending}', pack(b'la ' * 500_000)), max_file_mb=1) == 'larger than 1 MB unpacked'
    assert reason(write(tmp_path / f'j.txt{ending}', pack(('la ' * 500_000).encode('utf-16'))), max_file_mb=1) == 'larger than 1 MB unpacked'
    os.rename(tmp_path / f'a.txt{ending}', os.path.join(os.fsencode(tmp_path), b'n\xff.txt' + ending.encode()))
    assert read(os.path.join(tmp_path, os.fsdecode(b'n\xff.txt') + ending))[0] == [WEST]

def test_what_came_before_the_break_is_kept(tmp_path):
    rng = random.Random(2)
    lines = ''.join(json.dumps({'text': rng.randbytes(400).hex()}) + '\n' for i in range(5000))
    packed = gzip.compress(lines.encode())
    documents, notes = read(write(tmp_path / 'a.jsonl.gz', packed[:len(packed) * 9 // 10]))
    assert 4000 < len(documents) < 5000 and notes == [f'stopped after {len(documents):,} documents: truncated']
    documents, notes = read(write(tmp_path / 'a.json', b'[{"text": "one"}, {"text": "two"}, {"tex' + b' ' * 9), text_column='text')
    assert documents[0].startswith('[{"text": "one"}')  # broken near its beginning: no table, but a text
    rows = json.dumps([{'text': f'row {i}'} for i in range(50)])
    documents, notes = read(write(tmp_path / 'a.json', rows[:-30]))
    assert len(documents) == 48 and notes == ['stopped after 48 documents: unreadable (JSONDecodeError)']
    table = pa.table({'text': [rng.randbytes(400).hex() for _ in range(3000)]})
    pq.write_table(table, tmp_path / 'a.parquet', row_group_size=500, compression='none')
    data = bytearray((tmp_path / 'a.parquet').read_bytes())
    middle = len(data) * 3 // 4
    data[middle:middle + 60_000] = bytes(60_000)
    documents, notes = read(write(tmp_path / 'a.parquet', data))
    assert len(documents) >= 1000 and documents[:1000] == table['text'].to_pylist()[:1000]
    assert len(documents) == 3000 or notes[0].startswith(f'stopped after {len(documents):,} documents: ')

# -----------------------------------------------------------------------------
# Text with a structure

def html(tmp_path, page):
    return read(write(tmp_path / 'page.html', page))[0][0]

def test_html_is_what_a_browser_shows(tmp_path):
    page = '''<!DOCTYPE html><html><head><title>The  title</title><style>p { color: red }</style><script>if (a < b) x("<p>no</p>")</script></head>
        <body><!-- nor this --><h1>Head &amp; shoulders</h1><p>One &lt;b&gt; <b>bo</b>ld
        word,&nbsp;&#8364; &#x20AC;.<p>Two<br>lines</p><ul><li>first<li> second </ul><svg><text>no</text></svg>
        <table><tr><td>a</td><td>b</td></tr><tr><td>c<td>d</table><pre>
def f():
    return  1


# end</pre>after <noscript>no</noscript><![foo[ x ]]> all'''
    assert html(tmp_path, page) == '''The title

Head & shoulders

One <b> bold word,\xa0€ €.

Two
lines

first
second

a\tb
c\td

def f():
    return  1


# end

after all
'''
    assert html(tmp_path, 'no tag at all') == 'no tag at all\n' and html(tmp_path, '<p> </p>') == ''
    long = '<p>' + 'word ' * 50_000 + '</p>' + '<pre>  kept</pre>' * 3  # the parser gets it in pieces
    assert html(tmp_path, long) == 'word ' * 49_999 + 'word' + '\n\n  kept' * 3 + '\n'
    assert html(tmp_path, '<p>a<object>no<br><p>no</object>b') == 'ab\n'

def test_html_says_its_encoding(tmp_path):
    head = '<meta charset="{}"><p>'
    assert html(tmp_path, (head.format('windows-1251') + RUSSIAN).encode('cp1251')).split() == RUSSIAN.split()
    assert html(tmp_path, (head.format('iso-8859-1') + '“so” 10 €').encode('cp1252')) == '“so” 10 €\n'  # as browsers do
    for wrong in ('utf-8', 'utf-16', 'none-such', 'hex', 'undefined', 'rot13'):
        assert html(tmp_path, (head.format(wrong) + 'café, naïve').encode('cp1252')) == 'café, naïve\n'
    assert html(tmp_path, (head.format('koi8-r') + 'café').encode()) == 'café\n'  # but it is UTF-8

def test_notebooks_of_both_formats(tmp_path):
    cells = [{'cell_type': 'markdown', 'source': ['# Title\n', 'text']}, {'cell_type': 'raw', 'source': 'no'},
             {'cell_type': 'code', 'source': 'x = 1\n', 'outputs': [{'text': 'no'}]}, {'cell_type': 'code', 'source': []}]
    assert read(write(tmp_path / 'a.ipynb', json.dumps({'cells': cells, 'nbformat': 4})))[0] == ['# Title\ntext\n\nx = 1\n']
    cells = [{'cell_type': 'heading', 'source': 'Title'}, {'cell_type': 'code', 'input': ['x = 1\n', 'y']}]
    assert read(write(tmp_path / 'b.ipynb', json.dumps({'worksheets': [{'cells': cells}], 'nbformat': 3})))[0] == ['Title\n\nx = 1\ny\n']
    assert read(write(tmp_path / 'c.ipynb', '{"cells": []}'))[0] == ['']
    for bad in ('{"cells": [', '[]', '{}', '{"cells": [1]}', '{"cells": 3}', '[' * 100_000, b'\xff', '{"cells": [{"cell_type": "code", "source": 1}]}'):
        assert reason(write(tmp_path / 'd.ipynb', bad)) == 'not a notebook'

def lines(*rows):
    return ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)

def test_jsonl(tmp_path):
    def check(content, **options):
        return read(write(tmp_path / 'a.jsonl', content), **options)
    documents, notes = check(lines({'id': 1, 'text': 'one\r\nmore'}, '', '{bad', {'id': 2}, {'text': None}, {'text': 'two \ud83d\ude00 \ud800 \0'}, [1]))
    assert documents == ['one\nmore', 'two 😀 \ufffd '] and notes == ['3 rows without text in text', '1 lines were no JSON']
    assert check(lines({'id': 'x', 'Content': 'so'}))[0] == ['so']
    assert check(lines({'n': 1, 'sentence': 'the only one'}))[0] == ['the only one']
    assert check(lines({'text': ['two', 'lines']}))[0] == ['two\nlines']
    assert check(lines({'text': 'a', 'story': 'b'}), text_column='story')[0] == ['b']
    assert check(lines(*map(json.dumps, ['a string', 'another'])))[0] == ['a string', 'another']
    assert check(lines({'text': 'BOM'}).encode('utf-8-sig'))[0] == ['BOM']
    assert check(json.dumps({'text': 'ж'}, ensure_ascii=False).encode('utf-16'))[0] == ['ж']
    assert check(lines({'text': 'u2028 \u2028'}))[0] == ['u2028 \u2028']
    for odd in (lines({'a': 'x', 'b': 'y'}), lines([1, 2]), 'not JSON\nat all\n', lines({'a': 1}) * 30, '[' * 100_000, '1' * 5000 + '\n'):
        documents, notes = check(odd)
        assert documents == [odd] and len(notes) <= 1
    assert check('caf\xe9\n'.encode('cp1252'))[1] == ['no clear text column; taken as plain text', 'encoding guessed: cp1252']
    assert reason(write(tmp_path / 'b.jsonl', lines({'a': 'x'})), text_column='b') == 'no column b among: a'

def test_a_line_of_jsonl_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, 'LONGEST_ROW', 1000)
    long = [{'text': 'x' * n} for n in (980, 985, 990, 1200, 2500)]
    documents, notes = read(write(tmp_path / 'a.jsonl', lines({'text': 'a'}, *long, {'text': 'b'})))
    assert documents == ['a', 'x' * 980, 'x' * 985, 'b'] and notes == ['3 lines were no JSON']  # {"text": ""} takes 12

def test_json(tmp_path):
    def check(content):
        return read(write(tmp_path / 'a.json', content))
    rows = [{'id': 1, 'text': 'one'}, {'id': 2}, 3] + [{'text': f'{i}'} for i in range(30)]
    for indent in (None, 1):
        documents, notes = check(json.dumps(rows[:2] + rows[3:] + rows[2:3], indent=indent))
        assert documents == ['one'] + [str(i) for i in range(30)] and notes == ['2 rows without text in text']
    for plain in ('[]', '{"text": "one"}', '[1, 2]', '[{"only": "x"}]', '[{"text": 1}]', '', '[', '[{]', '[' * 100_000, '3'):
        assert check(plain)[0] == [plain]

def test_csv(tmp_path):
    def check(content, name='a.csv', **options):
        return read(write(tmp_path / name, content), **options)
    documents, notes = check('id,text,n\r\n1,"two\r\nlines, ""quoted""",3\r\n\r\n2\r\n3,,4\r\n')
    assert documents == ['two\nlines, "quoted"', ''] and notes == ['1 rows without text in text']
    assert check('id\tText\n1\ta, b; c\n', 'a.tsv')[0] == ['a, b; c']
    assert check('\ufeffid;content\n1;ü\n')[0] == ['ü'] and check('id;content\n1;ü\n'.encode('cp1252'))[0] == ['ü']
    assert check('text\nhello, world\n')[0] == ['hello, world']
    assert check('a,b\n1,2\n', text_column='b')[0] == ['2']
    for plain in ('a,b\n1,2\n', 'body of the letter\n', '\n\n', '"'):
        assert check(plain)[0] == [plain]
    long = 'x' * 3_000_000  # csv's own limit is 131072
    assert check(f'id,text\n1,{long}\n')[0] == [long]
    assert check('id,text\n1,a\0b\n')[0] == ['ab']

# -----------------------------------------------------------------------------
# Tables

TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.large_binary(),
         pa.string_view()]

def save_arrow(table, path, form):
    with (pa.ipc.new_file if form == 'file' else pa.ipc.new_stream)(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=300)

@pytest.mark.parametrize('type', TYPES, ids=str)
def test_text_of_every_type(tmp_path, type):
    texts = [f'row {i % 97} é' if i % 10 else None for i in range(1000)]
    table = pa.table({'id': range(1000), 'text': pa.array(texts).cast(type)})
    want = [text for text in texts if text]
    if type != pa.string_view():
        pq.write_table(table, tmp_path / 'a.parquet', row_group_size=300)
        assert read(tmp_path / 'a.parquet') == (want, ['100 rows without text in text'])
    for form in 'file', 'stream':
        save_arrow(table, tmp_path / 'a.arrow', form)
        assert read(tmp_path / 'a.arrow') == (want, ['100 rows without text in text'])

@pytest.mark.parametrize('list_of', [pa.list_, pa.large_list])
def test_lists_of_lines(tmp_path, list_of):
    table = pa.table({'lines': pa.array([['a', 'b'], [], None, ['c'], [None]], list_of(pa.string()))})
    pq.write_table(table, tmp_path / 'a.parquet')
    save_arrow(table, tmp_path / 'a.arrow', 'stream')
    for name in 'a.parquet', 'a.arrow':
        assert read(tmp_path / name) == (['a\nb', 'c'], ['3 rows without text in lines'])

def test_the_column_is_chosen(tmp_path):
    def check(columns, **options):
        pq.write_table(pa.table(columns), tmp_path / 'a.parquet')
        return read(tmp_path / 'a.parquet', **options)[0]
    assert check({'url': ['u'], 'text': ['t']}) == ['t'] and check({'x': [1], 'sentence': ['s']}) == ['s']
    assert check({'a': ['x'], 'b': ['y']}, text_column='b') == ['y'] and check({'a.text': ['x'], 'a': [{'text': 1}]}) == ['x']
    assert check({'image': [b'\0'], 'caption': ['c']}) == ['c'] and check({'x': [b'y']}, text_column='x') == ['y']
    assert check({'text': pa.array([], pa.string())}) == []
    with pytest.raises(Skip, match='^no clear text column among: a, b$'):
        check({'a': ['x'], 'b': ['y']})
    with pytest.raises(Skip, match='^no column c among: a$'):
        check({'a': ['x']}, text_column='c')
    with pytest.raises(Skip, match='^no clear text column among: 0, 1, 2, 3, 4, 5, 6, 7, ...$'):
        check({str(i): [i] for i in range(50)})

@pytest.mark.parametrize('type', [pa.string(), pa.large_string()], ids=str)
def test_strings_that_are_no_utf8(tmp_path, type):
    raw = pa.array([b'good', b'b\xffd', None, b'good'], pa.binary() if type == pa.string() else pa.large_binary())
    pq.write_table(pa.table({'text': raw.view(type)}), tmp_path / 'a.parquet')
    save_arrow(pa.table({'text': raw.view(type)}), tmp_path / 'a.arrow', 'file')
    for name in 'a.parquet', 'a.arrow':
        assert read(tmp_path / name)[0] == ['good', 'b\ufffdd', 'good']
    some = raw.drop_null().view(type)  # inside of a list or a dictionary such strings are not read, but nothing worse happens
    for values in pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0]), some), pa.ListArray.from_arrays(pa.array([0, 1, 2, 2, 3]), some):
        pq.write_table(pa.table({'text': values}), tmp_path / 'a.parquet')
        assert reason(tmp_path / 'a.parquet') == 'unreadable (ArrowInvalid)'

def test_offsets_that_lead_outside(tmp_path):
    save_arrow(pa.table({'text': ['a' * 50] * 20}), tmp_path / 'a.arrow', 'file')
    data = (tmp_path / 'a.arrow').read_bytes()
    offsets = b''.join((50 * i).to_bytes(4, 'little') for i in range(21))
    for wrong in (1 << 30, 90_000, (1 << 32) - 5):
        broken = data.replace(offsets, offsets[:40] + wrong.to_bytes(4, 'little') + offsets[44:])
        assert broken != data and reason(write(tmp_path / 'b.arrow', broken)) == 'unreadable (ArrowInvalid)'

def test_a_dataset_that_was_saved(tmp_path):
    datasets = pytest.importorskip('datasets')
    datasets.disable_progress_bars()
    texts = [f'text number {i}' for i in range(3000)]
    datasets.Dataset.from_dict({'id': range(3000), 'text': texts}).save_to_disk(tmp_path / 'saved', num_shards=2)
    found, _ = sources.find([str(tmp_path / 'saved')])
    assert [source.kind for source in found] == ['arrow', 'arrow']
    assert [text for source in found for text in read(source.path)[0]] == texts

def test_a_dataset_of_the_hub(monkeypatch):
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'id': range(10), 'text': [f'text {i}' for i in range(9)] + [None]}).to_iterable_dataset(num_shards=2)
    def read_hub(**options):
        return [text for text, _ in isolate.read(sources.Source('hf:a/b', 'hf', 0, 0), OPTIONS | options, [])]
    monkeypatch.setattr(readers, 'open_hf', lambda spec: rows)
    assert read_hub() == [f'text {i}' for i in range(9)] == read_hub(shard=(2, 0)) + read_hub(shard=(2, 1))
    with pytest.raises(Skip, match='^no column story among: id, text$'):
        read_hub(text_column='story')
    def gone(spec):
        raise ConnectionError('no net\nat all')
    monkeypatch.setattr(readers, 'open_hf', gone)
    with pytest.raises(readers.Unreachable, match='^hf:a/b: ConnectionError: no net$'):
        read_hub()

def test_tables_that_are_none(tmp_path):
    for name in 'a.parquet', 'a.arrow':
        for bad in (b'PAR1', b'ARROW1', b'text', bytes(1000), b'PAR1' + bytes(100) + b'PAR1', random.Random(0).randbytes(5000)):
            assert re.fullmatch(r'unreadable \(\w+\)|truncated|needs too much memory', reason(write(tmp_path / name, bad)))

# -----------------------------------------------------------------------------
# PDF

def make_pdf(pages, font='Helvetica', encryption=None):
    fpdf = pytest.importorskip('fpdf')
    pdf = fpdf.FPDF()
    for i, text in enumerate(pages):
        pdf.add_page()
        pdf.set_font([font, 'Times', 'Courier'][i % 3], size=12)
        if text:
            pdf.multi_cell(0, text=text)
    if encryption:
        pdf.set_encryption(**encryption)
    return bytes(pdf.output())

def raw_pdf(content, extra='', page=''):
    """A PDF by hand, without a table of references: both engines find their way."""
    content = content if isinstance(content, (bytes, bytearray)) else b'<< /Length %d >>\nstream\n%s\nendstream' % (len(content), content.encode('latin-1'))
    objects = [b'<< /Type /Catalog /Pages 2 0 R >>', b'<< /Type /Pages /Kids [3 0 R] /Count 1 >>',
               f'<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> {page} >>'.encode(),
               content, b'<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>']
    out, places = b'%PDF-1.7\n', []
    for i, body in enumerate(objects, 1):
        places.append(len(out))
        out += b'%d 0 obj\n%s\nendobj\n' % (i, body)
    table = ''.join(f'{place:010d} 00000 n \n' for place in places)
    return out + f'xref\n0 6\n0000000000 65535 f \n{table}trailer << /Size 6 /Root 1 0 R {extra} >>\nstartxref\n{len(out)}\n%%EOF'.encode()

@pytest.fixture(params=['pypdf', 'pypdfium2'])
def engine(request):
    pytest.importorskip(request.param)
    return request.param

def test_pdf(tmp_path, engine):
    path = write(tmp_path / 'a.pdf', make_pdf(['The first page, naïve café.\nIts second line.', '', 'The third one.']))
    assert read(path, pdf=engine) == (['The first page, naïve café.\nIts second line.\n\nThe third one.\n'], [])
    os.rename(path, os.path.join(os.fsencode(tmp_path), b'\xff.pdf'))
    assert len(read(os.path.join(tmp_path, os.fsdecode(b'\xff.pdf')), pdf=engine)[0]) == 1
    words = raw_pdf('BT /F 12 Tf 14 TL 50 700 Td (An exam-) Tj T* (ple of Jean-) Tj T* (Paul and 3-) Tj T* (4.) Tj ET')
    assert read(write(tmp_path / 'b.pdf', words), pdf=engine)[0] == ['An example of Jean-\nPaul and 3-\n4.\n']
    assert reason(write(tmp_path / 'c.pdf', make_pdf(['', ''])), pdf=engine) == 'no text in the PDF (scanned?)'
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as z:
        z.writestr('a.txt', 'text')
    assert reason(write(tmp_path / 'd.pdf', archive.getvalue()), pdf=engine) == 'not a PDF'
    assert reason(write(tmp_path / 'e.pdf', b'%PDF-1.4 and no more'), pdf=engine)

def test_what_print_did_is_undone():
    assert readers.tidy_page('e\ufb03cient \ufb01re\r\nexam\x02ple exam\ufffe\nple, so\xadft, воз-\nдух, Jean-\nPaul, 1-\n2  \n\n') \
        == 'efficient fire\nexample example, soft, воздух, Jean-\nPaul, 1-\n2'

def test_encrypted_pdf(tmp_path, engine):
    locked = make_pdf(['secret'], encryption=dict(owner_password='a', user_password='b'))
    assert reason(write(tmp_path / 'a.pdf', locked), pdf=engine) == 'encrypted'
    free = make_pdf(['for all to read'], encryption=dict(owner_password='a', user_password=''))
    assert read(write(tmp_path / 'b.pdf', free), pdf=engine)[0] == ['for all to read\n']
    # AES-256, which pypdf reads only with the package cryptography; the keys are made up, so no password opens it
    keys = ' '.join(f'/{name} <{"5a" * n}>' for name, n in (('O', 48), ('U', 48), ('OE', 32), ('UE', 32), ('Perms', 16)))
    aes = f'/Encrypt << /Filter /Standard /V 5 /R 6 /Length 256 /P -4 {keys} /CF << /StdCF << /CFM /AESV3 /Length 32 >> >> ' \
        '/StmF /StdCF /StrF /StdCF >> /ID [<00> <00>]'
    assert reason(write(tmp_path / 'c.pdf', raw_pdf('BT /F 12 Tf (x) Tj ET', aes)), pdf=engine) == 'encrypted'

# -----------------------------------------------------------------------------
# Readers that go wrong: in the reader process, pypdfium2 is the following, and does what the file says

DRIVER = '''
import os, re, signal, time
class PdfiumError(Exception): pass
class Page:
    def __init__(self, what): self.what = what
    def get_textpage(self): return self
    def close(self): pass
    def get_text_bounded(self):
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

@pytest.fixture
def driver(tmp_path, monkeypatch, new_reader):
    """Reads a file that says what is to happen on its pages."""
    (tmp_path / 'driver').mkdir()
    write(tmp_path / 'driver' / 'pypdfium2.py', DRIVER)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'driver'))
    def drive(what, **options):
        path = write(tmp_path / 'a.pdf', '%PDF-1.4 ' + what)
        return read(path, pdf='pypdfium2', **dict(file_seconds=1, file_memory_mb=300) | options)[0][0]
    return drive

def why(call, *args, **options):
    with pytest.raises(Skip) as reason:
        call(*args, **options)
    return str(reason.value)

FINE = 'text of fine\n'

def test_readers_that_crash(driver):
    for what, reason in (('crash', 'SIGSEGV'), ('exit', 'status 3'), ('fine crash', 'SIGSEGV')):
        for _ in range(2):  # in a new process, and in one that has read before
            assert why(driver, what) == f'crashed its reader ({reason})'
            assert driver('fine') == FINE
    assert driver('print') == 'text of print\n' and driver('fine') == FINE  # what a library says is no answer

def test_readers_that_hang(driver):
    began = time.monotonic()
    for what in ('burn', 'fine burn'):
        assert why(driver, what) == 'took longer than 1 s'
        assert driver('fine') == FINE
    assert why(driver, 'sleep', file_seconds=0.3) == 'took longer than 0.3 s'  # that takes no computing: the clock ends it
    assert driver('fine') == FINE and time.monotonic() - began < 12

@linux
def test_readers_that_eat(driver):
    for what in ('eat', 'fine eat'):
        assert why(driver, what) == 'needs too much memory'
        assert driver('fine') == FINE
    # memory that an earlier file took does not count: the second one gets a process of its own
    isolate.stop_reader()
    assert driver('keep', file_memory_mb=100) == 'text of keep\n'
    first = isolate._process.pid
    assert driver('fine need', file_memory_mb=100) == 'text of fine\n\ntext of need\n' and isolate._process.pid != first

def test_whoever_stops_reading_leaves_nothing_behind(driver, tmp_path):
    assert driver('fine') == FINE
    process = isolate._process
    path = write(tmp_path / 'b.pdf', '%PDF-1.4 ' + 'fine ' * 1000)
    documents = isolate.read(sources.Source(str(path), 'pdf', 0, 0), OPTIONS | {'pdf': 'pypdfium2'}, [])
    next(documents)
    documents.close()
    assert process.poll() is not None and driver('fine') == FINE

def alive(marks):
    """pids of processes with this in their environment."""
    pids = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/environ', 'rb') as f, open(f'/proc/{pid}/stat', 'rb') as g:
                if marks.encode() in f.read() and g.read().rsplit(b')')[1].split()[0] != b'Z':
                    pids.append(int(pid))
        except OSError:
            pass
    return pids

@linux
@pytest.mark.parametrize('what', ['burn', 'sleep'])
def test_the_reader_goes_when_its_parent_is_killed(driver, tmp_path, what, monkeypatch):
    monkeypatch.setenv('MARK', mark := uuid.uuid4().hex)
    path = write(tmp_path / 'a.pdf', f'%PDF-1.4 {what}')
    program = f'from mambino.prepare import isolate; from mambino.prepare import sources; list(isolate.read(sources.Source({str(path)!r}, "pdf", 0, 0), {OPTIONS | {"pdf": "pypdfium2"}}, []))'
    parent = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT)
    until = time.monotonic() + 10
    while len(alive(mark)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.7)  # it is in the middle of it now
    assert len(alive(mark)) == 2
    parent.kill()
    parent.wait()
    until = time.monotonic() + 2
    while alive(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(mark)

def flate(data, times=1):
    for _ in range(times):
        data = zlib.compress(data, 9)
    return b'<< /Length %d /Filter [%s] >>\nstream\n%s\nendstream' % (len(data), b'/FlateDecode ' * times, data)

def evil_pdfs():
    """{name: PDF} with constructs that are legal or nearly so, and cost a naive reader hours or gigabytes."""
    good = raw_pdf('BT /F 12 Tf 50 700 Td (text) Tj ET')
    return {
        'burn': raw_pdf(flate(b'BT /F 12 Tf (a) Tj ET\n' * 2_000_000)),         # 44 MB of operators in 100 kB
        'bomb': raw_pdf(flate(bytes(300_000_000), 2)),                            # 300 MB in a few hundred bytes
        'circle': good.replace(b'/Kids [3 0 R]', b'/Kids [2 0 R]'),               # the pages are their own child
        'crowd': good.replace(b'/Count 1', b'/Count 2000000000'),
        'deep': raw_pdf('[' * 200_000 + ' TJ'),
        'size': good.replace(b'/Size 6', b'/Size 2147483647'),
        'self': good.replace(b'/Contents 4 0 R', b'/Contents 3 0 R'),
        'length': good.replace(b'/Length 3', b'/Length 99999999999999999999'),
    }

def test_what_becomes_of_a_file_depends_on_it_alone(tmp_path, engine, new_reader):
    files = dict(broken_files(good_files(), seed=1, flips=6)) | {'circle.pdf': evil_pdfs()['circle'], 'self.pdf': evil_pdfs()['self']}
    orders, results = [sorted(files), sorted(files)[::-1], random.Random(0).sample(sorted(files), len(files))], []
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
def test_pdfs_that_cost_too_much(tmp_path, engine, new_reader):
    results = {}
    for name, data in evil_pdfs().items():
        began = time.monotonic()
        try:
            results[name] = read(write(tmp_path / f'{name}.pdf', data), pdf=engine, file_seconds=1, file_memory_mb=200)
        except Skip as reason:
            results[name] = str(reason)
        assert time.monotonic() - began < 6, name
    if engine == 'pypdf':
        assert results['burn'] in ('took longer than 1 s', 'needs too much memory')
    assert read(write(tmp_path / 'good.pdf', make_pdf(['all is well'])), pdf=engine)[0] == ['all is well\n']

# -----------------------------------------------------------------------------
# All at once

def good_files():
    """{name: bytes} of small PDFs and tables, to be broken."""
    rng = random.Random(3)
    words = [''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 8))) for _ in range(300)]
    text = lambda n: ' '.join(rng.choices(words, k=n))
    files = {'one.pdf': make_pdf([text(60)]), 'many.pdf': make_pdf([text(120) for _ in range(4)]),
             'plain.pdf': raw_pdf('BT /F 12 Tf 50 700 Td (' + text(50) + ') Tj ET')}
    for codec in ('none', 'snappy', 'zstd', 'gzip'):
        out = io.BytesIO()
        pq.write_table(pa.table({'id': range(200), 'text': [text(9) for _ in range(200)]}), out, row_group_size=60, compression=codec,
                       data_page_size=500, use_dictionary=codec == 'snappy')
        files[f'{codec}.parquet'] = out.getvalue()
    return files

def broken_files(files, seed=0, flips=62):
    """Yields (name, bytes): every file truncated at ten places, and with bytes flipped."""
    rng = random.Random(seed)
    for name, data in files.items():
        stem, ending = os.path.splitext(name)
        for i in range(10):
            yield f'{stem}-cut{i}{ending}', data[:len(data) * (i + 1) // 11]
        for i in range(flips):
            broken = bytearray(data)
            for _ in range(rng.choice((1, 3, 10, 50))):
                # half of them near the end, where both formats keep what leads to the rest
                at = rng.randrange(len(data)) if i % 2 else rng.randrange(max(0, len(data) - 600), len(data))
                broken[at] ^= 1 << rng.randrange(8)
            yield f'{stem}-flip{i}{ending}', bytes(broken)

@linux
def test_a_hostile_folder(tmp_path):
    folder = tmp_path / 'hostile'
    folder.mkdir()
    broken = dict(broken_files(good_files()))
    assert len(broken) >= 500
    for name, data in broken.items():
        write(folder / name, data)
    for name, data in evil_pdfs().items():
        write(folder / f'evil-{name}.pdf', data)
    write(folder / 'locked.pdf', make_pdf(['secret'], encryption=dict(owner_password='a', user_password='b')))
    with zipfile.ZipFile(folder / 'zip.pdf', 'w') as z:
        z.writestr('a.txt', 'text')
    write(folder / 'line.txt', 'word ' * 2_000_000)
    os.mkfifo(folder / 'fifo.txt')
    write(folder / 'secret.txt', 'nobody may read this').chmod(0)
    write(folder / 'bomb.txt.gz', gzip.compress(b'la la ' * 50_000_000, 1))
    write(folder / 'half.txt.xz', lzma.compress(random.Random(0).randbytes(9999))[:5000])
    write(folder / 'nuls.txt', bytes(5000))
    write(folder / 'long.jsonl', '{"text": "short"}\n{"text": "' + 'x' * 70_000_000 + '"}\n{"text": "short too"}\n')
    write(folder / 'nested.json', '[' * 1_000_000)
    write(folder / 'nested.html', '<div>' * 100_000 + 'deep')
    write(folder / 'open.html', '<a ' * 100_000 + '<!--')
    with open(os.path.join(os.fsencode(folder), b'not utf-8 \xff\xfe.txt'), 'w') as f:
        f.write('a name that is not UTF-8')
    os.symlink('.', folder / 'loop')
    os.symlink('nowhere', folder / 'nowhere.txt')
    paths = {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}

    mark = uuid.uuid4().hex
    command = [sys.executable, os.path.join(ROOT, 'prepare.py'), 'hostile', '--workers=2', '--pdf=pypdf', '--tokenizer=byte', '--out=out',
               '--file_seconds=2', '--file_memory_mb=300', '--max_file_mb=100']
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, env={**os.environ, 'PYTHONUTF8': '1', 'MARK': mark})
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr.decode()
    assert b'Traceback' not in done.stderr and took < 40
    assert not alive(mark)
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text(encoding='utf-8'))
    skipped = {os.path.join(tmp_path, entry['file']): entry['reason'] for entry in meta['skipped']}
    assert sum(kind['files'] for kind in meta['kinds'].values()) + len(skipped) == len(paths)
    assert set(skipped) <= paths and all(skipped.values()) and len(set(skipped.values())) < 60
    why = {os.path.basename(path): reason for path, reason in skipped.items()}
    assert why['zip.pdf'] == 'not a PDF' and why['locked.pdf'] == 'encrypted' and why['fifo.txt'] == 'no regular file'
    assert why['bomb.txt.gz'] == 'larger than 100 MB unpacked' and why['nuls.txt'] == 'binary' and why['half.txt.xz'] == 'truncated'
    assert why.get('secret.txt') == (None if os.geteuid() == 0 else 'Permission denied')
    for name in ('line.txt', 'long.jsonl', 'nested.json', os.fsdecode(b'not utf-8 \xff\xfe.txt')):
        assert name not in why, why[name]
    assert meta['kinds']['pdf']['files'] > 20 and meta['kinds']['parquet']['files'] > 20

def test_a_column_of_a_usual_name_may_begin_empty(tmp_path):
    rows = [{'url': f'http://{i}', 'text': None if i < 25 else f'text {i}'} for i in range(40)]
    path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, rows)))
    assert read(path) == ([f'text {i}' for i in range(25, 40)], ['25 rows without text in text'])
    path = write(tmp_path / 'one.csv', 'text\nhello\tworld, foo\n')
    assert read(path)[0] == ['hello\tworld, foo']
