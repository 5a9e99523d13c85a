"""Reads rows of JSON, a document a row, whatever form they have.

    for text, last in json_rows.read_json('rows.jsonl', options | plan, notes): ...    # plan: of survey.py

    lines                    each parsed on its own: one that is broken costs no other
    arrays, values, objects  json_values.py: one value after the other is in memory
"""
import codecs
import json

from mambino.prepare import files
from mambino.prepare.files import NO_MEMORY, Skip, open_bytes
from mambino.prepare.tables.cells import AS_IT_STANDS
from mambino.prepare.tables.columns import LONGEST_ROW
from mambino.prepare.tables.json_look import as_dict, parsed
from mambino.prepare.tables.json_objects import rows_of_columns
from mambino.prepare.tables.json_values import COSTLY, DECODER, Values, is_too_costly
from mambino.prepare.tables.rows import rows_of
from mambino.prepare.texts.encodings import is_wide, open_text
from mambino.prepare.texts.evidence import REPLACEMENT


def read_json(path, options, notes):
    """A document a row. options: a plan of survey.py among them; and 'part', [first byte, last + 1]
    of a file that is read in parts.
    """
    if options.get('part', [0])[0] == 0:
        notes += options.get('said', [])
    if options['layout'] == 'lines' and options['columns'] == [AS_IT_STANDS]:
        rows = (line.strip() for line, _ in lines_of(path, options, notes) if line)
    elif options['layout'] == 'lines':
        rows = rows_in_lines(path, options, notes)
    elif options['layout'] == 'columns':
        rows = whole_table(path, options)
    else:
        rows = other_rows(path, options, notes)
    yield from rows_of(rows, options, notes)


def rows_in_lines(path, options, notes):
    """Yields the row in each line."""
    names = options['names']
    decode = DECODER.decode
    memory = options['file_memory_mb'] * 1e6
    lost = 0
    first = 0
    long = 0
    try:
        for line, number in lines_of(path, options, notes):
            if line is None or len(line) > COSTLY and is_too_costly(line, memory):
                long += 1
                continue
            try:
                row = decode(line)
            except (ValueError, RecursionError):
                row = parsed(line)  # files that were put together have marks between them
                if row is None:
                    lost += not line.isspace()
                    first = first or lost and number
                    continue
            if type(row) is not dict:
                if row == names:
                    continue  # the header
                row = as_dict(row, names)
            yield row
    finally:
        if lost:
            first += lines_before(path, options)
            notes.lose(lost, f'lines were no JSON (first: line {first:,})')
        notes.lose(long, 'lines were too long')


def lines_before(path, options):
    """How many lines there are before this part of a file."""
    left = options.get('part', [0])[0]
    lines = 0
    if left:
        with open(path, 'rb') as f:
            while left and (data := f.read(min(left, files.CHUNK))):
                lines += data.count(b'\n')
                left -= len(data)
    return lines


def lines_of(path, options, notes):
    """Yields (line, its number) of a file, or of a part of it: those that begin there. One that is
    longer than LONGEST_ROW is None.
    """
    encoding = options['encoding']
    if is_wide(encoding):
        with open_text(path, encoding) as f:
            for number, (line, _) in enumerate(whole_lines(f, '\n'), 1):
                yield line and line.removeprefix('\ufeff'), number
        return
    start, end = options.get('part') or (0, None)
    mark = codecs.BOM_UTF8 if encoding == 'utf-8-sig' else b''
    encoding = 'utf-8' if mark else encoding
    wrong = 0
    with open_bytes(path) as f:
        at = begin_part(f, start)
        for number, (line, size) in enumerate(whole_lines(f, b'\n'), 1):
            if end is not None and at >= end:
                break
            if at == 0 and mark and line:
                line = line.removeprefix(mark)
            at += size
            try:
                text = line if line is None else line.decode(encoding)
            except UnicodeDecodeError:
                text = line.decode(encoding, 'replace')
                wrong += text.count('\ufffd') - line.count(REPLACEMENT)
            yield text, number
    if wrong and options.get('sampled'):
        notes.append(f'{wrong:,} bytes were no UTF-8')


def begin_part(f, start):
    """Goes to the first line that begins at `start` or behind it. Returns where that is."""
    if not start:
        return 0
    f.seek(start - 1)
    return start - 1 + next((size for _, size in whole_lines(f, b'\n')), 0)


def whole_lines(f, newline):
    """Yields (line, its length) of an open file; (None, its length) of one that is too long."""
    while line := f.readline(LONGEST_ROW):
        size = len(line)
        if size == LONGEST_ROW and line[-1:] != newline:
            line = None
            while more := f.readline(files.CHUNK):
                size += len(more)
                if more[-1:] == newline:
                    break
        yield line, size


def whole_table(path, options):
    """The rows of columns that lie side by side in one object."""
    with open_text(path, options['encoding']) as f:
        text = f.read(LONGEST_ROW + 1)
    if len(text) > LONGEST_ROW:
        raise Skip('one JSON object of more than 64 MB: write it as JSON lines')
    if is_too_costly(text, options['file_memory_mb'] * 1e6):
        raise Skip(NO_MEMORY)
    try:
        return rows_of_columns(json.loads(text.lstrip('\ufeff'), strict=False))
    except ValueError:
        raise Skip('broken JSON') from None


def other_rows(path, options, notes):
    """Yields the rows in an array or an object, or that just follow each other."""
    names = options['names']
    with open_text(path, options['encoding']) as f:
        values = Values(f, notes)
        if options['layout'] == 'object':
            rows = values.inside(options['inside'], options.get('keyed', False))
        else:
            rows = values.each(is_array=options['layout'] == 'array')
        for row in rows:
            if type(row) is not dict:
                if row == names:
                    continue
                row = as_dict(row, names)
            yield row
