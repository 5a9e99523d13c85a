"""Reads rows of JSON, a document a row: a row a line, or a list of them.

    for text, last in json_rows.read_jsonl('rows.jsonl', {'text_column': ''}, notes): ...
"""
import itertools
import json
import re

from mambino.prepare import files
from mambino.prepare.columns import COLUMNS, FIRST_ROWS, LONGEST_ROW, choose_column, holds_text, no_column, rows_of
from mambino.prepare.encodings import encoding_of, open_text, read_text
from mambino.prepare.files import open_bytes


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
    encoding = encoding_of(path, notes, options, 'jsonl')
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
