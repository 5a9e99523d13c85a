"""Recognizes rows of JSON by what a file holds, whatever it is called.

    found = json_look.look('dump.json.gz', 'data', options)     # None: no rows of JSON
    found['plan']                                      # what read_json needs: {'layout': 'lines', ...}

    lines      a row a line; damage costs no more than its line, and parts of the file can be read alone
    values     rows one after the other, indented or not, with commas, RS or blanks between them
    array      [row, row, ...]
    object     {"version": 1, "data": [row, ...]}; or the rows by their keys: {"a1": row, "a2": row}
    columns    {"id": [1, 2], "text": ["a", "b"]}

A row is an object; or a list, with or without names above it; or a string.
"""
import codecs
import itertools
import os
import re

from mambino.configurator import split_list
from mambino.prepare import files
from mambino.prepare.files import Notes, Skip, is_packed
from mambino.prepare.tables.cells import text_of
from mambino.prepare.tables.columns import LONGEST_ROW, SAMPLE_ROWS
from mambino.prepare.tables.json_objects import look_inside
from mambino.prepare.tables.json_values import DECODER, Broken, Values, is_too_costly
from mambino.prepare.tables.looks import new_column, profile_of
from mambino.prepare.texts.encodings import encoding_of, encoding_of_bytes, is_wide, open_text

HEAD = 1 << 18        # characters that tell the layout
SAMPLE = 1 << 22      # characters of rows that are looked at, at the beginning;
PLACES = 10           # and in so many places of a large file,
PLACE_ROWS = 20       # so many rows in each
PLACE = 1 << 20       # bytes in which these should be
FIRST = 50            # rows whose columns are looked at, and of the others
FIFTH = 5             # every fifth one
UNPACKED = 8          # chunks of a packed file that tell its encoding
PART_BYTES = 8_000_000  # of a large file, that are read together
BEGINS = re.compile(r'\s*(?:\x1e|//[^\n]*\n|#[^\n]*\n|\s)*[\[{"]')
NAMES = {'lines': 'JSON lines', 'values': 'JSON values', 'array': 'JSON array', 'object': 'list in a JSON object',
         'columns': 'columns in a JSON object'}


def look(path, named, options):
    """{'kind', 'format', 'plan', 'profile', 'rows'} of a file with rows of JSON: their profile, of
    looks.py, and how many were looked at. None where it has none. named: the kind by its name.
    Skip for one that cannot be read.
    """
    if not begins_as_json(path, named):
        return None
    encoding, notes, is_sampled = encoding_at(path, options)
    head = beginning(path, encoding)
    layout = {'layout': 'lines'}
    share = 0.9 if named == 'text' else 0.5
    rows = list(line_rows(path, encoding)) if are_lines(head, share) else []
    if not rows or all(is_array(row) for row in rows):
        layout, rows = other_rows(path, encoding, share)
    if not rows:
        return no_rows(head, named)
    if named == 'text' and layout['layout'] == 'values' and all(isinstance(row, str) for row in rows):
        return None  # words in quotes
    if is_sampled and layout['layout'] != 'lines':
        encoding = encoding_of(path, notes, options, 'jsonl')
    plan = {'encoding': encoding, 'said': list(notes), 'sampled': is_sampled, 'names': []} | layout
    plan['names'] = plan['names'] or names_of(rows)
    dicts = [as_dict(row, plan['names']) for row in rows[:FIRST] + rows[FIRST::FIFTH]]
    if not any(dicts) or named == 'text' and all(isinstance(row, str) for row in rows):
        return no_rows(head, named)
    profile = {}
    if plan['layout'] == 'lines':
        plan['parts'] = parts_of(path, encoding)
        profile = {name: new_column() for name in later_columns(path, dicts, options['text_column'])}
    return {
        'kind': 'jsonl' if plan['layout'] == 'lines' else 'json',
        'format': NAMES[plan['layout']],
        'plan': plan,
        'facts': notes.facts,
        'profile': profile_of(dicts, profile),
        'rows': len(rows),
        'alone': plan.pop('alone', False),
    }


def later_columns(path, dicts, wanted):
    """The columns that --text_column asks for and that these rows do not have, but others of the
    file may: their names stand in it.
    """
    names = {wanted, *(name.strip() for name in split_list(wanted, ','))} if wanted else set()
    sought = [name for name in names if not any(name in row for row in dicts)]
    keys = {key for name in sought for key in (name, *name.split('.'))}
    seen = set()
    tail = b''
    try:
        for data in files.chunks(path) if sought else ():
            data = tail + data
            seen.update(key for key in keys - seen if f'"{key}"'.encode() in data)
            tail = data[-1000:]
    except Exception:  # damaged: its reader says so
        pass
    return sorted(name for name in sought if name in seen or seen.issuperset(name.split('.')))


def encoding_at(path, options):
    """(encoding, Notes of it, whether only the beginning was looked at). A packed file is not
    unpacked twice for that, where its beginning is plain UTF-8: the reader counts what is not.
    """
    notes = Notes()
    if is_packed(path):
        try:
            head = list(itertools.islice(files.chunks(path), UNPACKED))
            name = encoding_of_bytes(lambda: iter(whole_lines(head)), notes, options.get('encoding', ''), 'jsonl')
            if name == 'utf-8' and not notes:
                return name, notes, True
        except Exception:  # it breaks off, say: that is seen below
            pass
        notes = Notes()
    return encoding_of(path, notes, options, 'jsonl'), notes, False


def whole_lines(chunks):
    """The chunks up to their last line end."""
    last = chunks[-1] if chunks else b''
    return [*chunks[:-1], last[:last.rfind(b'\n') + 1] or last]


def begins_as_json(path, named):
    """Whether the first characters may be those of rows of JSON."""
    if named == 'jsonl':
        return True
    try:
        head = files.first_bytes(path, 1 << 12)
    except Exception:  # whoever reads it says what is wrong with it
        return False
    return bool(BEGINS.match(head.decode('latin-1').removeprefix('ï»¿').replace('\0', '').lstrip('þÿ')))


def beginning(path, encoding):
    """The first characters of a text, as many as tell the layout; of a damaged one fewer."""
    decoder = codecs.getincrementaldecoder(encoding)('replace')
    pieces = []
    with files.open_bytes(path) as f:
        try:
            while sum(map(len, pieces)) < HEAD and (data := f.read1(1 << 16)):
                pieces.append(decoder.decode(data))
        except Exception:
            if not pieces:
                raise
    return ''.join(pieces)


def are_lines(head, share):
    """Whether this share of the first lines is JSON."""
    lines = head.split('\n')
    if len(lines) > 1 and len(head) >= HEAD:
        lines.pop()  # it goes on
    lines = [line for line in lines if line and not line.isspace()]
    values = [parsed(line) for line in lines[:200]]
    good = [value for value in values if value is not None]
    if len(lines) == 1 and not (isinstance(good[0] if good else None, dict) and '\n' in head):
        return False  # all of it in one line: an array, or an object of them
    return bool(good) and len(good) >= share * len(values)


def is_array(value):
    """Whether a value is a list of rows, and not one of the turns of a conversation."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and text_of(value) is None


def parsed(line):
    """What a line says in JSON; None where it is none, or null."""
    if is_too_costly(line):
        return None
    try:
        return DECODER.decode(line.lstrip('\ufeff'))
    except (ValueError, RecursionError):
        return None


def no_rows(head, named):
    """None, for what is no JSON at all; Skip where it seemed to be."""
    if named not in ('jsonl', 'data'):
        return None
    if re.match(r"\s*\[?\s*\{\s*'\w+':", head):
        raise Skip("its rows are Python's, with single quotes, and not JSON: write them with json.dumps")
    if named == 'jsonl' and BEGINS.match(head):
        raise Skip('broken JSON')
    return None


# -----------------------------------------------------------------------------
# Some rows

def line_rows(path, encoding):
    """Yields some rows of a file that has one in each line: of its beginning, and of places all
    over it where that is quick.
    """
    size = 0
    taken = 0
    line = ''
    with open_text(path, encoding) as f:
        try:
            while taken < SAMPLE_ROWS // 2 and size < SAMPLE and (line := f.readline(LONGEST_ROW)):
                size += len(line)
                row = parsed(line)
                if row is not None:
                    taken += 1
                    yield row
        except Exception:  # damaged: the rows before that place can be read
            if not taken:
                raise
    if not line or is_packed(path) or is_wide(encoding):
        return
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        for i in range(1, PLACES + 1):
            f.seek(size * i // (PLACES + 1))
            f.readline(PLACE)
            lines = (f.readline(PLACE) for _ in range(PLACE_ROWS))
            rows = (parsed(line.decode(encoding, 'replace')) for line in lines if line)
            yield from (row for row in rows if row is not None)


def other_rows(path, encoding, share):
    """({'layout', ...}, some rows) of a file that has no row a line; no rows where less than this
    share of them is JSON.
    """
    with open_text(path, encoding) as f:
        values = Values(f, Notes())
        first = values.peek()
        if first == '{':
            found = single_object(values)
            if found:
                return found
    with open_text(path, encoding) as f:
        values = Values(f, Notes())
        rows = []
        try:
            for row in itertools.islice(values.each(is_array=first == '['), SAMPLE_ROWS):
                rows.append(row)
                if values.position() > SAMPLE:
                    break
        except Exception:  # the same
            if not rows:
                raise
        if len(rows) < share * (len(rows) + values.bad):
            rows = []
    return {'layout': 'array' if first == '[' else 'values'}, rows


def single_object(values):
    """({'layout', ...}, rows) of a text that is one object; None where there are several."""
    try:
        value = values.value(HEAD)
        if values.peek():
            return None
    except Broken:
        value = None  # a comma too many, say
    except EOFError as error:
        if str(error) != 'too long':
            return None
        value = None  # large: looked at piece by piece
    try:
        found = look_inside(values, value)
    except Skip:
        return None
    if found:
        return found
    return ({'layout': 'values', 'alone': True}, [value]) if value else None


# -----------------------------------------------------------------------------
# Rows that are no objects

def names_of(rows):
    """The names of the columns of rows that are lists: of the first row, where it has them."""
    lists = [row for row in rows if isinstance(row, list)]
    if len(lists) < 0.9 * len(rows) or all(isinstance(row[0], dict) for row in lists if row):
        return []
    first = lists[0]
    are_names = first and all(isinstance(name, str) and 0 < len(name) <= 40 for name in first)
    others = [row for row in lists[1:] if len(row) == len(first)]
    if not are_names or len(set(first)) < len(first) or not others:
        return [str(i) for i in range(max(map(len, lists)))]
    values = [[row[i] for row in others] for i in range(len(first))]
    is_header = all(name not in column for name, column in zip(first, values)) and (
        any(not isinstance(value, str) for column in values for value in column)
        or all(re.fullmatch(r'[\w .-]+', name) for name in first))
    return first if is_header else [str(i) for i in range(len(first))]


def as_dict(row, names):
    """A row by its columns. names: those of rows that are lists, if they are."""
    if isinstance(row, dict):
        return row
    if isinstance(row, str):
        inner = parsed(row) if row.startswith('{') else None  # written as JSON twice
        return inner if isinstance(inner, dict) else {'string': row}
    if isinstance(row, list):
        return dict(zip(names, row)) if names else {'turns': row}
    return {}


# -----------------------------------------------------------------------------
# Parts

def parts_of(path, encoding):
    """[[first byte, last byte + 1], ...] of a file that is read in parts, each beginning with a
    line; [] for one that is not.
    """
    size = os.path.getsize(path)
    if size < 2 * PART_BYTES or is_packed(path) or is_wide(encoding):
        return []
    starts = [0]
    with open(path, 'rb') as f:
        for at in range(PART_BYTES, size - PART_BYTES // 2, PART_BYTES):
            if at <= starts[-1]:
                continue  # in a line that is longer than a part
            f.seek(at - 1)
            while (line := f.readline(files.CHUNK)) and line[-1:] != b'\n':
                pass
            if f.tell() < size:
                starts.append(f.tell())
    return [[start, end] for start, end in zip(starts, starts[1:] + [size])]
