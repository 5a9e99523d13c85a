"""tables.py and hub.py: a document a row, whatever kind of table it is."""
import json
import random
import re

import pyarrow
import pyarrow as pa
import pyarrow.parquet
import pyarrow.parquet as pq
import pytest
from helpers.readers import OPTIONS, read, reason, save_arrow, write

from mambino.prepare import hub, isolate, sources, tables
from mambino.prepare.files import Notes, Skip


@pytest.fixture(scope='module', autouse=True)
def no_reader_left():
    yield
    isolate.stop_reader()


# -----------------------------------------------------------------------------
# Text

def lines(*rows):
    return ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)


def test_jsonl(tmp_path):
    def check(content, **options):
        return read(write(tmp_path / 'a.jsonl', content), **options)
    documents, notes = check(
        lines(
            {'id': 1, 'text': 'one\r\nmore'},
            '', '{bad',
            {'id': 2},
            {'text': None},
            {'text': 'two \ud83d\ude00 \ud800 \0'},
            [1],
        )
    )
    assert documents == ['one\nmore', 'two 😀 \ufffd ']
    assert notes == ['3 rows without text in text', '1 lines were no JSON']
    assert check(lines({'id': 'x', 'Content': 'so'}))[0] == ['so']
    assert check(lines({'n': 1, 'sentence': 'the only one'}))[0] == ['the only one']
    assert check(lines({'text': ['two', 'lines']}))[0] == ['two\nlines']
    assert check(lines({'text': 'a', 'story': 'b'}), text_column='story')[0] == ['b']
    assert check(lines(*map(json.dumps, ['a string', 'another'])))[0] == ['a string', 'another']
    assert check(lines({'text': 'BOM'}).encode('utf-8-sig'))[0] == ['BOM']
    assert check(json.dumps({'text': 'ж'}, ensure_ascii=False).encode('utf-16'))[0] == ['ж']
    assert check(lines({'text': 'u2028 \u2028'}))[0] == ['u2028 \u2028']
    for odd in (
        lines({'a': 'x', 'b': 'y'}),
        lines([1, 2]),
        'not JSON\nat all\n',
        lines({'a': 1}) * 30,
        '[' * 100_000, '1' * 5000 + '\n'):
        documents, notes = check(odd)
        assert documents == [odd] and len(notes) <= 1
    assert check('caf\xe9\n'.encode('cp1252'))[1] == [
        'no clear text column; taken as plain text', 'encoding guessed: cp1252',
    ]
    assert (
        reason(write(tmp_path / 'b.jsonl', lines({'a': 'x'})), text_column='b')
        == 'no column b among: a'
    )


def test_a_line_of_jsonl_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'LONGEST_ROW', 1000)
    long = [{'text': 'x' * n} for n in (980, 985, 990, 1200, 2500)]
    documents, notes = read(write(tmp_path / 'a.jsonl', lines({'text': 'a'}, *long, {'text': 'b'})))
    # {"text": ""} takes 12
    assert documents == ['a', 'x' * 980, 'x' * 985, 'b'] and notes == ['3 lines were no JSON']


def test_json(tmp_path):
    def check(content):
        return read(write(tmp_path / 'a.json', content))
    rows = [{'id': 1, 'text': 'one'}, {'id': 2}, 3] + [{'text': f'{i}'} for i in range(30)]
    for indent in (None, 1):
        documents, notes = check(json.dumps(rows[:2] + rows[3:] + rows[2:3], indent=indent))
        assert documents == ['one'] + [str(i) for i in range(30)]
        assert notes == ['2 rows without text in text']
    for plain in (
        '[]', '{"text": "one"}', '[1, 2]', '[{"only": "x"}]', '[{"text": 1}]', '', '[', '[{]',
        '[' * 100_000, '3'):
        assert check(plain)[0] == [plain]


def test_csv(tmp_path):
    def check(content, name='a.csv', **options):
        return read(write(tmp_path / name, content), **options)
    documents, notes = check('id,text,n\r\n1,"two\r\nlines, ""quoted""",3\r\n\r\n2\r\n3,,4\r\n')
    assert documents == ['two\nlines, "quoted"', ''] and notes == ['1 rows without text in text']
    assert check('id\tText\n1\ta, b; c\n', 'a.tsv')[0] == ['a, b; c']
    assert check('\ufeffid;content\n1;ü\n')[0] == ['ü']
    assert check('id;content\n1;ü\n'.encode('cp1252'))[0] == ['ü']
    assert check('text\nhello, world\n')[0] == ['hello, world']
    assert check('a,b\n1,2\n', text_column='b')[0] == ['2']
    for plain in ('a,b\n1,2\n', 'body of the letter\n', '\n\n', '"'):
        assert check(plain)[0] == [plain]
    long = 'x' * 3_000_000  # csv's own limit is 131072
    assert check(f'id,text\n1,{long}\n')[0] == [long]
    assert check('id,text\n1,a\0b\n')[0] == ['ab']


def test_a_column_of_a_usual_name_may_begin_empty(tmp_path):
    rows = [{'url': f'http://{i}', 'text': None if i < 25 else f'text {i}'} for i in range(40)]
    path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, rows)))
    assert read(path) == ([f'text {i}' for i in range(25, 40)], ['25 rows without text in text'])
    path = write(tmp_path / 'one.csv', 'text\nhello\tworld, foo\n')
    assert read(path)[0] == ['hello\tworld, foo']


# -----------------------------------------------------------------------------
# Parquet and Arrow

TYPES = [
    pa.string(),
    pa.large_string(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.binary(),
    pa.large_binary(),
    pa.string_view(),
]


@pytest.mark.parametrize('type', TYPES, ids=str)
def test_text_of_every_type(tmp_path, type):
    texts = [f'row {i % 97} é' if i % 10 else None for i in range(1000)]
    table = pa.table({'id': range(1000), 'text': pa.array(texts).cast(type)})
    want = [text for text in texts if text]
    if type != pa.string_view():
        pq.write_table(table, tmp_path / 'a.parquet', row_group_size=300)
        assert read(tmp_path / 'a.parquet') == (want, ['100 rows without text in text'])
    for layout in 'file', 'stream':
        save_arrow(table, tmp_path / 'a.arrow', layout)
        assert read(tmp_path / 'a.arrow') == (want, ['100 rows without text in text'])


@pytest.mark.parametrize('list_of', [pa.list_, pa.large_list])
def test_lists_of_lines(tmp_path, list_of):
    table = pa.table(
        {'lines': pa.array([['a', 'b'], [], None, ['c'], [None]], list_of(pa.string()))}
    )
    pq.write_table(table, tmp_path / 'a.parquet')
    save_arrow(table, tmp_path / 'a.arrow', 'stream')
    for name in 'a.parquet', 'a.arrow':
        assert read(tmp_path / name) == (['a\nb', 'c'], ['3 rows without text in lines'])


def test_the_column_is_chosen(tmp_path):
    def check(columns, **options):
        pq.write_table(pa.table(columns), tmp_path / 'a.parquet')
        return read(tmp_path / 'a.parquet', **options)[0]
    assert check({'url': ['u'], 'text': ['t']}) == ['t']
    assert check({'x': [1], 'sentence': ['s']}) == ['s']
    assert check({'a': ['x'], 'b': ['y']}, text_column='b') == ['y']
    assert check({'a.text': ['x'], 'a': [{'text': 1}]}) == ['x']
    assert check({'image': [b'\0'], 'caption': ['c']}) == ['c']
    assert check({'x': [b'y']}, text_column='x') == ['y']
    assert check({'text': pa.array([], pa.string())}) == []
    with pytest.raises(Skip, match='^no clear text column among: a, b$'):
        check({'a': ['x'], 'b': ['y']})
    with pytest.raises(Skip, match='^no column c among: a$'):
        check({'a': ['x']}, text_column='c')
    with pytest.raises(Skip, match='^no clear text column among: 0, 1, 2, 3, 4, 5, 6, 7, ...$'):
        check({str(i): [i] for i in range(50)})


@pytest.mark.parametrize('type', [pa.string(), pa.large_string()], ids=str)
def test_strings_that_are_no_utf8(tmp_path, type):
    raw = pa.array(
        [b'good', b'b\xffd', None, b'good'],
        pa.binary() if type == pa.string() else pa.large_binary(),
    )
    pq.write_table(pa.table({'text': raw.view(type)}), tmp_path / 'a.parquet')
    save_arrow(pa.table({'text': raw.view(type)}), tmp_path / 'a.arrow', 'file')
    for name in 'a.parquet', 'a.arrow':
        assert read(tmp_path / name)[0] == ['good', 'b\ufffdd', 'good']
    # inside of a list or a dictionary such strings are not read, but nothing worse happens
    some = raw.drop_null().view(type)
    for values in (
        pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0]), some),
        pa.ListArray.from_arrays(pa.array([0, 1, 2, 2, 3]), some),
    ):
        pq.write_table(pa.table({'text': values}), tmp_path / 'a.parquet')
        assert reason(tmp_path / 'a.parquet') == 'unreadable (ArrowInvalid)'


def test_offsets_that_lead_outside(tmp_path):
    save_arrow(pa.table({'text': ['a' * 50] * 20}), tmp_path / 'a.arrow', 'file')
    data = (tmp_path / 'a.arrow').read_bytes()
    offsets = b''.join((50 * i).to_bytes(4, 'little') for i in range(21))
    for wrong in (1 << 30, 90_000, (1 << 32) - 5):
        broken = data.replace(offsets, offsets[:40] + wrong.to_bytes(4, 'little') + offsets[44:])
        assert broken != data
        assert reason(write(tmp_path / 'b.arrow', broken)) == 'unreadable (ArrowInvalid)'


def test_tables_that_are_none(tmp_path):
    for name in 'a.parquet', 'a.arrow':
        for bad in (
            b'PAR1', b'ARROW1', b'text',
            bytes(1000),
            b'PAR1' + bytes(100) + b'PAR1',
            random.Random(0).randbytes(5000),
        ):
            assert re.fullmatch(
                r'unreadable \(\w+\)|truncated|needs too much memory',
                reason(write(tmp_path / name, bad)),
            )


# -----------------------------------------------------------------------------
# Hugging Face

def test_a_dataset_that_was_saved(tmp_path):
    datasets = pytest.importorskip('datasets')
    datasets.disable_progress_bars()
    texts = [f'text number {i}' for i in range(3000)]
    datasets.Dataset.from_dict({'id': range(3000), 'text': texts}).save_to_disk(
        tmp_path / 'saved', num_shards=2
    )
    kept, _ = sources.find([str(tmp_path / 'saved')])
    assert [source.kind for source in kept] == ['arrow', 'arrow']
    assert [text for source in kept for text in read(source.path)[0]] == texts


def test_a_dataset_of_the_hub(monkeypatch):
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict(
        {'id': range(10), 'text': [f'text {i}' for i in range(9)] + [None]}
    ).to_iterable_dataset(num_shards=2)
    def read_hub(**options):
        return [
            text
            for text, _ in isolate.read(sources.Source('hf:a/b', 'hf', 0, 0), OPTIONS | options, Notes())
        ]
    monkeypatch.setattr(hub, 'open_hf', lambda spec: rows)
    assert (
        read_hub()
        == [f'text {i}' for i in range(9)]
        == read_hub(shard=(2, 0)) + read_hub(shard=(2, 1))
    )
    with pytest.raises(Skip, match='^no column story among: id, text$'):
        read_hub(text_column='story')
    def gone(spec):
        raise ConnectionError('no net\nat all')
    monkeypatch.setattr(hub, 'open_hf', gone)
    with pytest.raises(hub.Unreachable, match='^hf:a/b: ConnectionError: no net$'):
        read_hub()
