"""Recognizes tables in csv, and tells what their reader needs.

    found = csv_look.look('rows.csv', 'csv', options)    # None: no table
    found['plan']                                        # {'dialect': ..., 'encoding': ..., 'parts': ...}

    file ──► csv_dialect: how it writes rows ──► some rows ──► profiles of the columns
               └► no table at all: plain text, and that is said
"""
import os
import re

from mambino.configurator import split_list
from mambino.prepare.files import CHUNK, Notes, Skip, is_packed, open_bytes
from mambino.prepare.tables import csv_dialect
from mambino.prepare.tables.columns import COLUMNS, SAMPLE_ROWS, shown
from mambino.prepare.tables.csv_header import is_sure
from mambino.prepare.tables.csv_records import Rows, described, fits, lines_of, masked
from mambino.prepare.tables.csv_rows import meant
from mambino.prepare.tables.json_look import PART_BYTES
from mambino.prepare.tables.looks import profile_of
from mambino.prepare.texts.encodings import encoding_of, is_wide

SAMPLE_CELLS = 30_000  # of a table, that are looked at
FEWEST = 5       # rows of a table in a file that is not called one
PROBE = 1 << 19  # bytes in which a part should begin
PROBED = 30      # lines, of which one should be its first
FEW_ROWS = 8     # that are as they should be tell that,
MANY_ROWS = 64   # or so many where quotes do not fit
NO_TABLE = {'kind': 'text', 'plan': {'said': ['no table: taken as plain text']}}


def may_be_json(path):
    """Whether a file begins as objects or lists of JSON do."""
    try:
        with open_bytes(path) as f:
            return bool(re.match(rb'(?:\xef\xbb\xbf)?\s*[\[{]', f.read(1 << 12)))
    except Exception:  # whoever reads it says what is wrong with it
        return False


def look_in_text(path, options):
    """look() for a file that is called a text: None unless it begins with names of columns, one of
    them usual for a text, and rows that fit below.
    """
    try:
        with open_bytes(path) as f:
            head = f.read(1 << 12).removeprefix(b'\xef\xbb\xbf')
        lines = head.replace(b'\0', b'').decode('latin-1').removeprefix('ÿþ').splitlines()
    except Exception:  # whoever reads it says what is wrong with it
        return None
    first = lines[0] if lines else ''
    names = [name.strip().strip('"') for name in re.split('[\t,;|]', first)]
    is_usual = any(name.lower() in COLUMNS for name in names)
    if len(names) < 2 or not is_usual or any(' ' in name for name in names) or not is_sure(names):
        return None
    try:
        found = look(path, options)
    except Skip:
        return None
    return found if found.get('rows', 0) >= FEWEST and found['plan']['dialect']['header'] else None


def look(path, options):
    """{'kind', 'format', 'plan', 'facts', 'profile', 'rows'} of a csv file, as json_look.look has
    them; of one that is no table a plan to read it as a text. Skip for one that cannot be read.
    """
    notes = Notes()
    encoding = encoding_of(path, notes, options, 'csv')
    wanted = options['text_column']
    names = [name.strip().lower() for name in split_list(wanted, ',')] if wanted else []
    found = csv_dialect.of_file(path, encoding, [wanted.lower(), *names] if wanted else [])
    if found is None:
        if wanted:
            raise Skip(f'no table, and so no column {shown(wanted)}')
        return NO_TABLE
    dialect, rows = found
    most = min(SAMPLE_ROWS, SAMPLE_CELLS // dialect.width + 1)
    rows = rows[::len(rows) // most + 1]
    dicts = [{name: meant(cell, dialect) for name, cell in zip(dialect.names, row)} for row in rows]
    return {
        'kind': 'csv',
        'format': 'csv',
        'plan': {
            'dialect': dialect._asdict(), 'encoding': encoding, 'said': list(notes), 'layout': 'lines',
            'parts': cut(path, encoding, dialect, PART_BYTES),
        },
        'facts': notes.facts | {'dialect': described(dialect)},
        'profile': profile_of(dicts),
        'rows': len(rows),
    }


# -----------------------------------------------------------------------------
# Parts of a large file

def cut(path, encoding, dialect, part_bytes):
    """[[first byte, last byte + 1], ...] of about so many bytes, each beginning with a row; [] for
    a file that is better read in one.
    """
    size = os.path.getsize(path)
    is_one = dialect.width == 1 and dialect.quote  # each line might be a row
    if is_one or size < 2 * part_bytes or is_packed(path) or is_wide(encoding):
        return []
    starts = [0]
    with open(path, 'rb') as f:
        for at in range(part_bytes, size - part_bytes // 2, part_bytes):
            start = row_start(f, starts[-1], at, encoding, dialect)
            if start:
                starts.append(start)
    if len(starts) == 1:
        return []
    return [[start, end] for start, end in zip(starts, starts[1:] + [size])]


def row_start(f, before, at, encoding, dialect):
    """The first byte behind `at` with which a row begins, 0 where that is not sure. Sure is: many
    rows as they should be from there on; or some, and as many quotes as close between there and
    `before`, where a row begins.
    """
    f.seek(at)
    data = f.read(PROBE)
    delimiter = dialect.delimiter.encode(encoding)
    start = data.find(b'\n') + 1
    tried = 0
    while start and tried < PROBED and (end := data.find(b'\n', start)) >= 0:
        first, _, rest = data[start:end].partition(delimiter)
        is_likely = (rest or dialect.width == 1) and fits([first.decode('latin-1').strip('"\' ')], dialect.kinds)
        if dialect.escape and data[start - 2:start - 1] == b'\\':
            is_likely = False  # the line before goes on
        if is_likely:
            tried += 1
            if not dialect.quote:
                return at + start
            need = FEW_ROWS if quotes_between(f, before, at + start, dialect.quote) % 2 == 0 else MANY_ROWS
            if are_rows(data[start:start + PROBE // 4].decode(encoding, 'replace'), dialect, need):
                return at + start
        start = end + 1
    return 0


def quotes_between(f, start, end, quote):
    """How many quotes there are in these bytes of a file."""
    f.seek(start)
    n = 0
    while start < end and (data := f.read(min(end - start, CHUNK))):
        n += data.count(quote.encode())
        start += len(data)
    return n


def are_rows(text, dialect, need):
    """Whether a text begins with so many rows of the table."""
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    rows = Rows([lines_of(masked(text, dialect))], dialect)
    fitting = 0
    for n, row in enumerate(rows, 1):
        fitting += None not in row and fits(row, dialect.kinds)
        if rows.lost or rows.mended or rows.short:
            return False
        if n == need:
            return fitting > 0.8 * need
    return False
