"""Reads tables, a document a row: jsonl, lists in JSON, csv, parquet, arrow.

    for text, last in tables.read_jsonl('rows.jsonl', {'text_column': ''}, notes): ...

    rows ──► which column has the text? the wanted one, one with a usual name, or the only one
               ├► its values, as documents
               └► it is not clear: Skip for parquet and arrow, plain text for the others
"""
import csv
import itertools
import json
import re

from mambino.prepare import files
from mambino.prepare.encodings import encoding_of, open_text, read_text
from mambino.prepare.files import Skip, open_bytes

LONGEST_ROW = 1 << 26  # characters of a line of JSON, which is parsed as a whole
ROWS = 32              # of a table, that are in memory at once: each may be a book
FIRST_ROWS = 20        # so many tell which column has the text
COLUMNS = 'text content body document article story passage code'.split()  # what people call it


# -----------------------------------------------------------------------------
# The text column

def text_of(value):
    """The text in a cell of a table: a str, or a list of them, one a line; None for anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode('utf-8', 'replace')
    if isinstance(value, list) and value and all(isinstance(line, (str, bytes)) for line in value):
        return '\n'.join(map(text_of, value))
    return None


def choose_column(names, texts, wanted):
    """The column to read, of all `names` and of `texts`, those that hold texts; None where it is
    not clear.
    """
    if wanted:
        return wanted if wanted in names else None
    by_lower_case = {name.lower(): name for name in reversed(texts)}
    for name in COLUMNS:
        if name in by_lower_case:
            return by_lower_case[name]
    return texts[0] if len(texts) == 1 else None


def holds_text(rows, name):
    """Whether a column of the first rows has text; one with a usual name may also be empty there.
    """
    values = [row.get(name) for row in rows]
    if any(map(text_of, values)):
        return True
    return name.lower() in COLUMNS and all(value in (None, '') for value in values)


def no_column(names, wanted):
    """The Skip that says so."""
    missing = f'column {wanted}' if wanted else 'clear text column'
    dots = ', ...' if len(names) > 8 else ''
    return Skip(f'no {missing} among: {", ".join(names[:8])}{dots}')


def rows_of(values, column, notes):
    """Yields (text, True) for each of the values of a column that has text; counts the others."""
    empty = 0
    for value in values:
        text = text_of(value)
        if text is None:
            empty += 1
        else:
            yield text, True
    if empty:
        notes.append(f'{empty:,} rows without text in {column}')


# -----------------------------------------------------------------------------
# JSON

def table_of(read_rows, options, notes, usual_name=False):
    """rows_of the text column of rows of JSON, or of the rows where they are strings; None where it
    is not clear which. read_rows: a function that reads them, from the first one. usual_name: only
    a column with one of COLUMNS will do.
    """
    first = list(itertools.islice(read_rows(), FIRST_ROWS))
    dicts = [row for row in first if isinstance(row, dict)]
    if not dicts:
        strings = first and all(isinstance(row, str) for row in first)
        return rows_of(read_rows(), 'a line', notes) if strings and not usual_name else None
    names = list(dict.fromkeys(name for row in dicts for name in row))
    texts = [name for name in names if holds_text(dicts, name)]
    if usual_name:
        texts = [name for name in texts if name.lower() in COLUMNS]
    column = choose_column(names, texts, options['text_column'])
    if column is None and options['text_column'] and not usual_name:
        raise no_column(names, options['text_column'])
    if column is None:
        return None
    values = (row.get(column) if isinstance(row, dict) else None for row in read_rows())
    return rows_of(values, column, notes)


def read_jsonl(path, options, notes):
    """A document a line: its text column, or the line itself if it is a string. Without such a
    column: plain text.
    """
    encoding = encoding_of(path, notes, sample=True)
    bad = 0

    def read_rows():
        nonlocal bad
        bad = 0
        with open_text(path, encoding) as f:
            while line := f.readline(LONGEST_ROW):
                if len(line) == LONGEST_ROW and line[-1] != '\n':
                    bad += 1
                    while line and line[-1] != '\n':  # to its end
                        line = f.readline(files.CHUNK)
                elif not line.isspace():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError):
                        bad += 1

    rows = table_of(read_rows, options, notes)
    if rows is None:
        bad = 0
        notes[:] = ['no clear text column; taken as plain text']
        rows = read_text(path, options, notes)
    yield from rows
    if bad:
        notes.append(f'{bad:,} lines were no JSON')


def read_json(path, options, notes):
    """Plain text; but a list of objects with a text column is a table, as in jsonl."""
    rows = None
    with open_bytes(path) as f:
        data = f.read(LONGEST_ROW + 1)
    begins_as_list = data[:1000].lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'['
    if len(data) <= LONGEST_ROW and begins_as_list:
        text = data.decode('utf-8-sig', 'replace')
        del data  # it may be large
        try:
            # being the only column is not enough here
            rows = table_of(lambda: items_of(text), options, notes, usual_name=True)
        except (ValueError, RecursionError):
            pass
    yield from rows or read_text(path, options, notes)


def items_of(text):
    """The items of a list in JSON, one after the other: all at once they would need many times the
    memory of the text.
    """
    decoder = json.JSONDecoder()
    between = re.compile(r'[ \t\r\n]*,?[ \t\r\n]*')
    at = between.match(text, text.index('[') + 1).end()
    while text[at:at + 1] != ']':
        item, at = decoder.raw_decode(text, at)
        yield item
        at = between.match(text, at).end()


# -----------------------------------------------------------------------------
# csv

def read_csv(path, options, notes):
    """A document a row, if the header names a text column; else plain text."""
    csv.field_size_limit(LONGEST_ROW)
    wanted = options['text_column']
    with open_text(path, encoding_of(path, notes, sample=True), newline='') as f:
        head = f.readline(files.CHUNK)
        delimiter = max('\t,;|', key=head.count)
        if delimiter not in head:
            delimiter = '\x1f'  # one column: a row is a line, whatever is in it
        names = next(csv.reader([head], delimiter=delimiter), [])
        texts = [name for name in names if name.lower() in COLUMNS]
        column = choose_column(names, texts, wanted)
        if column is None and wanted:
            raise no_column(names, wanted)
        if column is not None and (len(names) > 1 or wanted or column.lower() == 'text'):
            i = names.index(column)
            rows = (row for row in csv.reader(f, delimiter=delimiter) if row)
            values = (row[i] if i < len(row) else None for row in rows)
            yield from rows_of(values, column, notes)
            return
    notes.clear()
    yield from read_text(path, options, notes)


# -----------------------------------------------------------------------------
# Parquet and Arrow: a batch of rows is in memory at a time

def read_parquet(path, options, notes):
    """A document a row, from the text column."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    pa.set_cpu_count(1)
    # not by name, which Arrow wants in UTF-8; not mapped, for that would count as memory
    with open(path, 'rb') as f:
        reader = pq.ParquetFile(f, pre_buffer=False, buffer_size=1 << 20)
        column = choose_arrow_column(reader.schema_arrow, options)
        batches = reader.iter_batches(batch_size=ROWS, columns=[column], use_threads=False)
        yield from rows_of(values_of(batches, column), column, notes)


def read_arrow(path, options, notes):
    """The same from what Hugging Face's save_to_disk wrote: a file or a stream of batches."""
    import pyarrow as pa
    pa.set_cpu_count(1)
    with open(path, 'rb') as f:
        is_file = f.read(6) == b'ARROW1'
        f.seek(0)
        if is_file:
            reader = pa.ipc.open_file(f)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(f)
            batches = reader
        column = choose_arrow_column(reader.schema, options)
        yield from rows_of(values_of(batches, column), column, notes)


def raw_types():
    """{an Arrow type of text: the same without a promise of UTF-8}"""
    import pyarrow as pa
    return {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }


def choose_arrow_column(schema, options):
    """The name of the text column; Skip where it is not clear."""
    raw = raw_types()

    def is_text(field):
        type_ = getattr(field.type, 'value_type', field.type)  # of a list or a dictionary
        if type_ in raw:
            return True
        return type_ in raw.values() and field.name.lower() in COLUMNS  # bytes might be anything

    texts = [field.name for field in schema if is_text(field)]
    column = choose_column(schema.names, texts, options['text_column'])
    if column is None:
        raise no_column(schema.names, options['text_column'])
    return column


def values_of(batches, column):
    """Yields the values of a column. Strings come as bytes, for not all that says UTF-8 is; raises
    for bad offsets.
    """
    raw = raw_types()
    for batch in batches:
        array = batch.column(batch.schema.names.index(column))
        array = array.view(raw.get(array.type, array.type))
        array.validate(full=True)  # no offset leads outside
        for start in range(0, len(array), ROWS):
            yield from array[start:start + ROWS].to_pylist()
