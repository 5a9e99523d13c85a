"""Which column of a table has the text, and the texts in it.

    column = columns.choose_column(names, texts, wanted)    # None: it is not clear

    rows ──► which column has the text? the wanted one, one with a usual name, or the only one
               ├► its values, as documents
               └► it is not clear: Skip for parquet and arrow, plain text for the others
"""
from mambino.prepare.files import Skip

LONGEST_ROW = 1 << 26  # characters of a line of JSON, which is parsed as a whole
ROWS = 32              # of a table, that are in memory at once: each may be a book
FIRST_ROWS = 20        # so many tell which column has the text
COLUMNS = 'text content body document article story passage code'.split()  # what people call it


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
