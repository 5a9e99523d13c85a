"""Reads csv, a document a row.

    for text, last in csv_rows.read_csv('rows.csv', {'text_column': ''}, notes): ...
"""
import csv

from mambino.prepare import files
from mambino.prepare.columns import COLUMNS, LONGEST_ROW, choose_column, no_column, rows_of
from mambino.prepare.encodings import encoding_of, open_text, read_text


def read_csv(path, options, notes):
    """A document a row, if the header names a text column; else plain text."""
    csv.field_size_limit(LONGEST_ROW)
    wanted = options['text_column']
    with open_text(path, encoding_of(path, notes, options, 'csv'), newline='') as f:
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
