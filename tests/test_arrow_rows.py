"""arrow_rows.py and hub.py: a document a row, whatever kind of table it is."""
import json
import random
import re

import pyarrow
import pyarrow as pa
import pyarrow.parquet
import pyarrow.parquet as pq
import pytest
from helpers.readers import OPTIONS, read, reason, save_arrow, write

from mambino.prepare import isolate, sources, survey
from mambino.prepare.files import Notes, Skip
from mambino.prepare.readers import READERS
from mambino.prepare.tables import arrow_rows, hub

pytestmark = pytest.mark.usefixtures('no_reader_left')


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
    assert check({'title': ['A title'], 'body': ['b']}, text_column='Title,body') == ['A title\n\nb']
    assert check({'text': pa.array([], pa.string())}) == []
    with pytest.raises(Skip, match='^no text in column text$'):
        check({'url': ['https://example.org'], 'text': pa.nulls(1)})
    with pytest.raises(Skip, match='^no clear text column among: a, b; say which with --text_column=a$'):
        check({'a': ['x'], 'b': ['y']})
    with pytest.raises(Skip, match='^text_column=c: no column c among: a$'):
        check({'a': ['x']}, text_column='c')
    with pytest.raises(Skip, match='^no clear text column among: 0, 1, 2, 3, 4, 5, 6, 7, ...: 0 holds numbers'):
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


def test_parts_give_the_same_rows(tmp_path, monkeypatch):
    table = pa.table({'id': range(3000), 'text': [f'Sentence {i} on bread and tea.' for i in range(3000)]})
    pq.write_table(table, tmp_path / 'a.parquet', row_group_size=100)
    save_arrow(table, tmp_path / 'a.arrow', 'file')
    save_arrow(table, tmp_path / 'b.arrow', 'stream')
    for name, n in ('a.parquet', 4000), ('a.arrow', 40_000), ('b.arrow', 40_000):
        path = str(tmp_path / name)
        options = OPTIONS | {'look': True}
        for setting in 'PART_BYTES', 'SKIPPED_BYTES':
            monkeypatch.setattr(arrow_rows, setting, n)
        (text, _), = READERS[path.rpartition('.')[2]](path, options, Notes())
        parts = json.loads(text)['plan']['parts']
        assert len(parts) > 2
        rows = [text for part in parts for text, _ in READERS[path.rpartition('.')[2]](
            path, OPTIONS | {'columns': ['text'], 'part': part}, Notes())]
        assert rows == table['text'].to_pylist() == read(path)[0]


def test_objects_of_any_names(tmp_path):
    texts = [[('en', f'Sentence {i} on bread and tea.'), ('de', f'Satz {i} von Brot und Tee.')] for i in range(9)]
    pq.write_table(pa.table({'id': range(9), 'text': pa.array(texts, pa.map_(pa.string(), pa.string()))}),
                   tmp_path / 'a.parquet')
    assert reason(tmp_path / 'a.parquet') == (
        'no clear text column among: id, text.en, text.de; say which with --text_column=text.en')
    assert read(tmp_path / 'a.parquet', text_column='text.de')[0][8] == 'Satz 8 von Brot und Tee.'


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
                r'unreadable \(\w+\)|truncated.*|needs too much memory.*|no parquet file|no Arrow file|empty',
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


def test_a_dataset_of_the_hub(monkeypatch, capsys):
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict(
        {'id': range(10), 'text': [f'text {i}' for i in range(9)] + [None]}
    ).to_iterable_dataset(num_shards=2)
    def read_hub(text_column='', **more):
        options = OPTIONS | {'text_column': text_column}
        (source,), (plan,), _ = survey.survey([sources.Source('hf:a/b', 'hf', 0, 0)], options)
        return [text for text, _ in isolate.read(source, options | plan | more, Notes())]

    monkeypatch.setattr(hub, 'open_hf', lambda spec: rows)
    assert (
        read_hub()
        == [f'text {i}' for i in range(9)]
        == read_hub(shard=(2, 0)) + read_hub(shard=(2, 1))
    )
    assert read_hub('Id,text')[1] == '1\n\ntext 1'
    with pytest.raises(SystemExit):
        read_hub('story')
    assert 'text_column=story: no column story among: id, text' in capsys.readouterr().err

    def gone(spec):
        raise ConnectionError('no net\nat all')
    monkeypatch.setattr(hub, 'open_hf', gone)
    with pytest.raises(SystemExit):
        read_hub()
    assert 'hf:a/b: ConnectionError: no net\n' in capsys.readouterr().err
