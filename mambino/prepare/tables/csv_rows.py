"""Reads csv, a document a row.

    for text, last in csv_rows.read_csv('rows.csv', options | plan, notes): ...    # plan: of survey.py

    lines ──► csv_records: rows ──► cells of the columns that are wanted

How the file writes its rows was found out by csv_look.py.
"""
import io

from mambino.prepare.files import CHUNK
from mambino.prepare.tables.cells import AS_IT_STANDS
from mambino.prepare.tables.csv_records import NULL, Dialect, Rows, lines_of, masked, unmasked
from mambino.prepare.tables.rows import rows_of
from mambino.prepare.texts.encodings import open_text

BLOCK = 1 << 18         # characters that are split at once
LONGEST_LINE = 1 << 25  # characters


def read_csv(path, options, notes):
    """A document a row. options: a plan of survey.py among them; and 'part', [first byte, last + 1] of
    a file that is read in parts.
    """
    if options.get('part', [0])[0] == 0:
        notes += options.get('said', [])
    yield from rows_of(rows_as_dicts(path, options, notes), options, notes)


def rows_as_dicts(path, options, notes):
    """Yields the rows, of each the columns that are wanted; counts in notes what could not be read."""
    dialect = Dialect(**options['dialect'])
    names = options['columns']
    if names == [AS_IT_STANDS]:
        names = dialect.names
    indexes = [dialect.names.index(name) for name in names]
    part = options.get('part')
    is_beginning = not part or part[0] == 0
    with open_part(path, options['encoding'], part) as f:
        for _ in range(dialect.skip if is_beginning else 0):
            f.readline(LONGEST_LINE)
        table = Rows(blocks(f, dialect, notes), dialect)
        if dialect.header and is_beginning:
            table.drop_header()
        if len(indexes) == 1 and not dialect.escape:  # most are, and quicker so
            name = names[0]
            i = indexes[0]
            for row in table:
                yield {name: row[i] if row[i] != NULL else None}
        else:
            for row in table:
                yield {name: meant(row[i], dialect) for name, i in zip(names, indexes)}
    table.tell(notes)


def meant(cell, dialect):
    """What a cell says, None where there is nothing."""
    if cell is None or cell == NULL:
        return None
    return unmasked(cell, dialect.delimiter) if dialect.escape else cell


def blocks(f, dialect, notes):
    """Yields the lines of an open file, masked, some at a time; those that are too long are lost."""
    while text := f.read(BLOCK):
        text += f.readline(LONGEST_LINE)
        while dialect.escape and text.endswith('\\\n') and len(text) < LONGEST_LINE:
            more = f.readline(LONGEST_LINE)
            if not more:
                break
            text += more
        if len(text) > LONGEST_LINE and text[-1] != '\n':
            text = text[:text.rfind('\n') + 1]
            notes.lose(1, 'rows are too long')
            while (more := f.readline(LONGEST_LINE)) and more[-1] != '\n':
                pass
        yield lines_of(masked(text, dialect))


# -----------------------------------------------------------------------------
# Parts of a large file

class Span(io.RawIOBase):
    """The bytes of a file from `start` to `end`."""

    def __init__(self, path, start, end):
        super().__init__()
        self.f = open(path, 'rb')
        self.f.seek(start)
        self.left = end - start

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.f.read(min(len(buffer), self.left))
        buffer[:len(data)] = data
        self.left -= len(data)
        return len(data)

    def close(self):
        self.f.close()
        super().close()


def open_part(path, encoding, part):
    """As open_text, of these bytes, or of all where part is None."""
    if not part:
        return open_text(path, encoding)
    return io.TextIOWrapper(io.BufferedReader(Span(path, *part), CHUNK), encoding, 'replace')
