"""Reads parquet and Arrow, a document a row. A batch of rows is in memory at a time.

    for text, last in arrow_rows.read_parquet('rows.parquet', {'text_column': ''}, notes): ...
"""
from mambino.prepare.columns import COLUMNS, ROWS, choose_column, no_column, rows_of


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
