"""Reads parquet and Arrow, a document a row. A batch of rows is in memory at a time.

    for text, last in arrow_rows.read_parquet('rows.parquet', options | plan, notes): ...  # of survey.py
    for text, last in arrow_rows.read_parquet('rows.parquet', options | {'look': True}, notes): ...

The second yields one text, what is in the file, as JSON: {'profile', 'rows', 'plan'}. Parsers that
may crash do so in a process of their own, and that is how survey.py looks into such files.
"""
import itertools
import json
import os

from mambino.prepare.files import Skip
from mambino.prepare.tables.cells import AS_IT_STANDS
from mambino.prepare.tables.columns import ROWS, SAMPLE_ROWS
from mambino.prepare.tables.looks import new_column, profile_of
from mambino.prepare.tables.rows import rows_of

PLACES = 10             # groups or batches of rows that are looked at, all over a file
SAMPLE_BYTES = 1 << 25  # of texts, at most, that are looked at together
PART_BYTES = 8_000_000  # of a large file, that are read together;
SKIPPED_BYTES = 64_000_000  # and where a part is reached only through those before it


def read_parquet(path, options, notes):
    """A document a row. options['part']: [first row group, last + 1]."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    pa.set_cpu_count(1)
    # not by name, which Arrow wants in UTF-8; not mapped, for that would count as memory
    check_ends(path)
    with open(path, 'rb') as f:
        reader = pq.ParquetFile(f, pre_buffer=False, buffer_size=1 << 20)

        def batches(columns, groups=None):
            return reader.iter_batches(batch_size=ROWS, columns=columns, row_groups=groups, use_threads=False)

        if options.get('look'):
            n = reader.num_row_groups
            sizes = [reader.metadata.row_group(i).total_byte_size for i in range(n)]
            sizes = [os.path.getsize(path) * size // max(1, sum(sizes)) for size in sizes]  # as it is packed
            groups = [batches(texts_of(reader.schema_arrow), [i]) for i in spread(n)]
            yield look(reader.schema_arrow, groups, grouped(sizes, PART_BYTES)), True
            return
        groups = range(*options['part']) if 'part' in options else None
        columns = columns_of(reader.schema_arrow, options['columns'])
        yield from rows_of(rows_in(batches(columns, groups), notes), options, notes)


def read_arrow(path, options, notes):
    """The same from what Hugging Face's save_to_disk wrote: a file or a stream of batches.
    options['part']: [first batch, last + 1].
    """
    import pyarrow as pa
    pa.set_cpu_count(1)
    with open(path, 'rb') as f:
        head = f.read(8)
        is_file = head[:6] == b'ARROW1'
        if not is_file and head[:4] != b'\xff\xff\xff\xff':
            raise Skip('no Arrow file')
        f.seek(0)
        if is_file:
            reader = pa.ipc.open_file(f)
            n = reader.num_record_batches
            batches = map(reader.get_batch, range(n)[slice(*options.get('part', [None]))])
        else:
            reader = pa.ipc.open_stream(f)
            batches = itertools.islice(reader, *options.get('part', [None]))
        if options.get('look'):
            size = os.path.getsize(path)
            if is_file:
                groups = [iter([reader.get_batch(i)]) for i in spread(n)]
                parts = grouped([size // max(1, n)] * n, PART_BYTES)
            else:
                groups = [list(itertools.islice(reader, PLACES))]
                n = len(groups[0]) + number_of(reader) if size > 2 * SKIPPED_BYTES else 1
                parts = grouped([size // n] * n, SKIPPED_BYTES)
            yield look(reader.schema, groups, parts), True
            return
        columns = columns_of(reader.schema, options['columns'])
        batches = (batch.select(columns) for batch in batches)
        yield from rows_of(rows_in(batches, notes), options, notes)


def number_of(batches):
    """How many there are; of a damaged stream, how many before that place."""
    n = 0
    try:
        for _ in batches:
            n += 1
    except Exception:
        pass
    return n


def check_ends(path):
    """Skip where a parquet file is none, is not whole, or is encrypted."""
    with open(path, 'rb') as f:
        head = f.read(4)
        f.seek(max(0, os.path.getsize(path) - 4))
        end = f.read()
    if b'PARE' in (head, end):
        raise Skip('encrypted')
    if head != b'PAR1':
        raise Skip('no parquet file')
    if end != b'PAR1':
        raise Skip('truncated: the list of its columns, at its end, is missing')


def spread(n):
    """At most PLACES of the numbers below n, all over."""
    return sorted({i * n // PLACES for i in range(PLACES)}) if n else []


def grouped(sizes, part_bytes):
    """[[first, last + 1], ...] of groups of rows of these sizes, about part_bytes together; [] where
    there is one.
    """
    parts = [[0, 0]]
    size = 0
    for i, more in enumerate(sizes):
        if size and size + more > part_bytes:
            parts.append([i, i])
            size = 0
        parts[-1][1] = i + 1
        size += more
    return parts if len(parts) > 1 else []


# -----------------------------------------------------------------------------
# Looking

def look(schema, groups, parts):
    """What is in a table, as JSON. groups: iterators of batches, from several places."""
    profile = {}
    texts = texts_of(schema)
    for field in schema:
        if field.name not in texts:
            profile[field.name] = new_column() | {'rows': 1, 'other': {kind_of(field.type): 1}}
    taken = 0
    sample = []
    size = 0
    for batches in groups:
        for row in itertools.islice(rows_in(batches), SAMPLE_ROWS // max(1, len(groups))):
            sample.append(row)
            size += sum(len(value) for value in row.values() if isinstance(value, (str, bytes)))
            if size > SAMPLE_BYTES // max(1, len(groups)):
                break
        taken += len(sample)
        profile_of(sample, profile)
        sample.clear()
        size = 0
    for field in schema:
        profile.setdefault(field.name, new_column())
    profile = {name: profile[name] for name in in_order(schema, profile)}
    return json.dumps({'profile': profile, 'rows': taken, 'plan': {'parts': parts}})


def in_order(schema, profile):
    """The columns as the schema has them; those of objects in their place."""
    order = {name: i for i, name in enumerate(schema.names)}
    parents = {column for name in profile for column in [name.rpartition('.')[0]] if column in order}
    names = [name for name in profile if name not in parents or profile[name]['rows']]
    return sorted(names, key=lambda name: next((order[part] for part in prefixes(name) if part in order), len(order)))


def prefixes(name):
    """'a.b.c', 'a.b', 'a'."""
    while name:
        yield name
        name = name.rpartition('.')[0]


def texts_of(schema):
    """The columns that may hold texts."""
    return [field.name for field in schema if kind_of(field.type) == '']


def kind_of(type_):
    """What a column holds, by its type, that is no text; '' where it may be one."""
    import pyarrow as pa
    types = pa.types
    if types.is_struct(type_) and 'bytes' in [field.name for field in type_]:
        return 'pictures or sounds'
    if types.is_boolean(type_) or types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_):
        return 'numbers'
    if types.is_temporal(type_):
        return 'dates'
    value_type = getattr(type_, 'value_type', None)
    if value_type is not None and not types.is_dictionary(type_) and kind_of(value_type):
        return f'lists of {kind_of(value_type)}'
    return ''


# -----------------------------------------------------------------------------
# Rows

def columns_of(schema, columns):
    """The names in the schema of the columns that are asked for; 'a.b' is in a, if not a name itself."""
    if columns == [AS_IT_STANDS]:
        return schema.names
    return list(dict.fromkeys(next(part for part in prefixes(name) if part in schema.names) for name in columns))


def raw_types():
    """{an Arrow type of text: the same without a promise of UTF-8}"""
    import pyarrow as pa
    return {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }


def rows_in(batches, notes=None):
    """Yields the rows of batches as dicts. Strings are read as bytes, for not all that says UTF-8 is;
    raises for bad offsets. notes: for the number of texts that are no UTF-8.
    """
    raw = raw_types()
    wrong = 0
    for batch in batches:
        names = batch.schema.names
        arrays = []
        for array in batch.columns:
            arrays.append(array.view(raw.get(array.type, array.type)))
            arrays[-1].validate(full=True)  # no offset leads outside
        strings = [array.type in raw for array in batch.columns]
        maps = [is_map(array) for array in arrays]
        for start in range(0, batch.num_rows, ROWS):
            columns = []
            for array, is_string, has_maps in zip(arrays, strings, maps):
                values = array[start:start + ROWS].to_pylist()
                if has_maps:
                    values = [value if value is None else dict(value) for value in values]
                if is_string:
                    try:
                        values = [value if value is None else value.decode() for value in values]
                    except UnicodeDecodeError:
                        wrong += sum(not is_utf8(value) for value in values)
                        values = [value if value is None else value.decode('utf-8', 'replace') for value in values]
                columns.append(values)
            for values in zip(*columns):
                yield dict(zip(names, values))
    if wrong and notes is not None:
        notes.append(f'{wrong:,} texts had bytes that were no UTF-8')


def is_map(array):
    """Whether its values are objects, with names of their own each."""
    import pyarrow as pa
    return pa.types.is_map(array.type)


def is_utf8(value):
    """Whether bytes, or None, are UTF-8."""
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False
