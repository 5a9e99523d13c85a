"""Reads csv, a document a row.

    for text, last in csv_rows.read_csv('rows.csv', {'text_column': ''}, notes): ...

    file ──► csv_dialect: how it writes rows ──► csv_records: its rows ──► cells of the text column
               └► no table at all: plain text, and that is said
"""
from mambino.prepare import csv_dialect
from mambino.prepare.columns import COLUMNS, choose_column, no_column, rows_of
from mambino.prepare.csv_records import LONGEST_CELL, NULL, Dialect, Rows, described, lines_of, masked, unmasked
from mambino.prepare.encodings import encoding_of, open_text, read_text

BLOCK = 1 << 18  # characters that are split at once
PLAIN = 'no table: taken as plain text'


def look(path, encoding):
    """{'dialect', 'names', 'rows': some, as dicts} of a csv file; None where it is no table. Skip
    where it is one that cannot be read.
    """
    found = csv_dialect.of_file(path, encoding)
    if found is None:
        return None
    dialect, rows = found
    rows = [dict(zip(dialect.names, cells_of(row, dialect))) for row in rows[:200]]
    return {'dialect': dialect._asdict(), 'names': list(dialect.names), 'rows': rows}


def cells_of(row, dialect):
    """The cells of a row as they are meant; None for those that are not there."""
    return [None if cell is None or cell == NULL else unmasked(cell, dialect.delimiter) for cell in row]


def blocks(f, dialect, notes):
    """Yields the lines of an open file, masked, some at a time; those that are too long are lost."""
    while text := f.read(BLOCK):
        text += f.readline(LONGEST_CELL)
        while dialect.escape and text.endswith('\\\n') and (more := f.readline(LONGEST_CELL)):
            text += more
        if len(text) > LONGEST_CELL and text[-1] != '\n':
            text = text[:text.rfind('\n') + 1]
            notes.lose(1, 'rows are too long')
            while (more := f.readline(LONGEST_CELL)) and more[-1] != '\n':
                pass
        yield lines_of(masked(text, dialect))


def read_csv(path, options, notes):
    """A document a row, from the columns that options['columns'] names; plain text where it is no
    table.
    """
    encoding = encoding_of(path, notes, options, 'csv')
    looked = options.get('dialect') or look(path, encoding)
    if looked is None:
        notes.append(PLAIN)
        yield from read_text(path, options, notes)
        return
    dialect = Dialect(**looked['dialect'])
    notes.facts['dialect'] = described(dialect)
    names = looked['names']
    texts = [name for name, kind in zip(names, dialect.kinds) if kind in 'tp' or name.lower() in COLUMNS]
    column = choose_column(names, texts, options['text_column'])
    if column is None:
        raise no_column(names, options['text_column'])
    yield from rows_of(cells(path, encoding, dialect, column, notes), column, notes)


def cells(path, encoding, dialect, column, notes):
    """Yields the cells of a column; counts in notes what could not be read."""
    i = dialect.names.index(column)
    escape = dialect.escape
    with open_text(path, encoding) as f:
        for _ in range(dialect.skip):
            f.readline()
        table = Rows(blocks(f, dialect, notes), dialect)
        if dialect.header:
            table.drop_header()
        for row in table:
            yield cells_of(row[i:i + 1], dialect)[0] if escape else row[i]
    table.tell(notes)
