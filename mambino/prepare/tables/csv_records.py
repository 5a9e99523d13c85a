"""Lines of a csv file into rows, whatever its quotes do.

    for row in csv_records.rows(lines, dialect, notes): ...    # lists of dialect.width cells

    lines ──► masked: what a backslash hides ──► csv.reader, strict ──► a row of the right width
                                                   └► anything else: careful(), one record alone
                                                        ├► a quote that never closes is a letter
                                                        └► no reading fits the header: lost, counted

A row is taken if it has as many cells as the header. A quoted cell that runs over lines which
look like rows themselves is one that was never closed: what it swallowed is read again.
"""
import collections
import csv
import itertools
import re
from typing import NamedTuple

LONGEST_CELL = 1 << 24  # characters of a row that goes over several lines
LEAST_PATIENCE = 1 << 16  # the same, after many that never ended
MANY = 256  # lines that are read at once

csv.field_size_limit(1 << 30)  # our own limits are lower

BLANKS = re.compile(' *')
NUMBER = re.compile(r'[-+\d.,:/ TZ%$€]*\d[-+\d.,:/ TZ%$€]*')
RULE = re.compile(r'[\s|:+=,;-]*--[\s|:+=,;-]*')  # a line drawn below the header
NULL = r'\N'  # of databases: no value
# what stands for an escaped character until the cells are apart: no text has these code points
MASKS = {'"': '\ufdd0', "'": '\ufdd1', '\\': '\ufdd2', '\n': '\ufdd3'}
LETTERS = {'n': '\ufdd4', 't': '\ufdd5', 'r': '\ufdd6', '0': '\ufdd7', 'b': '\ufdd8', 'Z': '\ufdd9'}
DELIMITER = '\ufdda'
UNMASK = {ord(mask): char for char, mask in MASKS.items()}
UNMASK |= {ord(mask): char for mask, char in zip(LETTERS.values(), '\n\t\n\0\b\x1a')}
MASKED = re.compile('[\ufdd0-\ufdda]')


class Dialect(NamedTuple):
    """How a file writes its rows: found by csv_dialect.find."""
    delimiter: str        # '\x1f', which is in no text, for one column
    quote: str = '"'      # or "'"; '' where quotes are letters like others
    escape: bool = False  # a backslash before a quote, a delimiter, a line end makes it a letter
    letters: bool = False  # and \n, \t are what they are in C
    blanks: bool = False  # after delimiters: no part of the cells
    rest: bool = False    # the last cell is not quoted, and has delimiters
    comments: bool = False  # lines that begin with # are no rows
    skip: int = 0         # lines before the header, or before the first row
    header: bool = True   # that line has the names
    names: tuple = ()     # of the columns
    kinds: str = ''       # of the columns: n numbers, w single words, p prose, t any text

    @property
    def width(self):
        """How many cells a row has."""
        return len(self.names)


def described(dialect):
    """The dialect in a few words: 'tab, no quotes'."""
    names = {',': 'comma', '\t': 'tab', ';': 'semicolon', '|': 'pipe', '\x1f': 'one column', '\x01': '^A'}
    quotes = {'"': 'quotes "', "'": "quotes '", '': 'no quotes'}
    words = [names.get(dialect.delimiter, dialect.delimiter), quotes[dialect.quote]]
    words += ['backslashes'] if dialect.escape else []
    words += ['the last column has the rest'] if dialect.rest else []
    words += [] if dialect.header else ['no header']
    return ', '.join(words)


def misfit(n, width):
    """What is wrong with rows of n cells."""
    return f'rows have {n} field{"s" if n != 1 else ""}, the header {width}'


# -----------------------------------------------------------------------------
# Backslashes

def masked(text, dialect):
    """A text of whole lines with what is escaped in it masked, without NUL. An escaped line end is
    masked too, so that its line goes on.
    """
    if '\0' in text:
        text = text.replace('\0', '')
    if not dialect.escape or '\\' not in text:
        return text
    masks = MASKS | {dialect.delimiter: DELIMITER}
    if dialect.letters:
        masks |= LETTERS
    escaped = f'\\\\([{re.escape("".join(masks))}])'
    return re.sub(escaped, lambda match: masks[match[1]], text)


def lines_of(text):
    """The lines of a text, each with its end."""
    lines = [line + '\n' for line in text.split('\n')]
    last = lines.pop()[:-1]
    return lines + [last] if last else lines


def unmasked(cell, delimiter):
    """The text of a cell of a masked text."""
    if cell.isascii() or not MASKED.search(cell):
        return cell
    return cell.translate(UNMASK | {ord(DELIMITER): delimiter})


# -----------------------------------------------------------------------------
# One record

class Record(NamedTuple):
    """A row, and how it was written."""
    cells: list
    lines: int   # it took
    quoted: int  # cells with quotes around them
    needed: int  # those that would be something else without


def split(line_at, dialect, most=1, lenient=False):
    """The Record that begins with line_at(0), of at most so many lines; None where a quoted cell
    does not end by then, or goes on behind its quote. lenient: it may; on one line, a quote that
    does not end is a letter. line_at: a function that gives the i-th line, '' behind the last one.
    """
    text = line_at(0)
    lines = 1
    at = 0
    cells = []
    quoted = 0
    needed = 0
    while True:
        begin = BLANKS.match(text, at).end()
        end = -1
        if dialect.quote and text.startswith(dialect.quote, begin):
            text, lines, end = quoted_end(text, begin + 1, lines, line_at, dialect, most, lenient)
            if end < 0 and not (lenient and most == 1):
                return None
        if end >= 0:
            inner = text[begin + 1:end]
            quoted += 1
            needed += any(c in inner for c in (dialect.delimiter, '\n', dialect.quote))
            cells.append(inner.replace(dialect.quote * 2, dialect.quote))
            at = BLANKS.match(text, end + 1).end()
        else:
            is_last = dialect.rest and len(cells) == dialect.width - 1
            end = -1 if is_last else text.find(dialect.delimiter, at)
            if end < 0:
                end = len(text) - text.endswith('\n')
            cells.append(text[begin if dialect.blanks else at:end])
            at = end
        if at >= len(text) or text[at] == '\n':
            return Record(cells, lines, quoted, needed)
        at += len(dialect.delimiter)


def quoted_end(text, at, lines, line_at, dialect, most, lenient):
    """(text, lines, where the closing quote of the cell is that begins at `at`, or -1), the text
    made longer by the lines that are needed.
    """
    quote = dialect.quote
    line = text
    parts = [text]  # joined at the end: there may be many
    before = 0      # characters of the parts before this line
    while True:
        end = line.find(quote, at)
        if end < 0:
            more = line_at(lines) if lines < most else ''
            if not more:
                return text, lines, -1
            before += len(line)
            line = more
            parts.append(line)
            lines += 1
            at = 0
            continue
        if line.startswith(quote, end + 1):
            at = end + 2
            continue
        after = BLANKS.match(line, end + 1).end()
        if after == len(line) or line[after] == '\n' or line.startswith(dialect.delimiter, after):
            return ''.join(parts), lines, before + end
        if not lenient:
            return text, lines, -1
        at = end + 1


def fits(cells, kinds):
    """Whether the cells look like those of their columns."""
    for cell, kind in zip(cells, kinds):
        cell = cell.strip()
        if kind == 'n' and cell and not NUMBER.fullmatch(cell):
            return False
        if kind == 'w' and ' ' in cell or kind == 'p' and ' ' not in cell:
            return False
    return True


def looks_like_row(line, dialect):
    """Whether a line alone is a row as the others are."""
    if line.count(dialect.delimiter) < dialect.width - 1:
        return False
    record = split([line].__getitem__, dialect, lenient=True)
    return len(record.cells) == dialect.width and fits(record.cells, dialect.kinds)


def swallows(cells, dialect):
    """Whether one of the cells has rows within it: then the quote before it was not meant to be one.
    """
    for cell in cells:
        if '\n' in cell:
            delimiters = cell.count(dialect.delimiter)
            if delimiters and delimiters >= 0.8 * cell.count('\n') * (dialect.width - 1):
                if are_rows(cell.split('\n')[1:65], dialect):
                    return True
    return False


def holds_start(cells, dialect):
    """Whether a row begins in one of the cells."""
    for cell in cells:
        for line in cell.split('\n')[1:]:
            start = split([line].__getitem__, dialect, lenient=True).cells
            kinds = dialect.kinds[:len(start) - 1]
            if 'n' in kinds and len(start) <= dialect.width and fits(start[:-1], kinds):
                return True
    return False


def are_rows(lines, dialect):
    """Whether lines within a quoted cell are rows of the table."""
    n = sum(looks_like_row(line, dialect) for line in lines)
    if dialect.width < 2 or not n:
        return False
    if 'n' in dialect.kinds:
        return n >= 0.8 * len(lines) and (n >= 2 or dialect.width > 2)
    if dialect.width > 2 or dialect.delimiter != ',':
        return n >= 5 and n >= 0.8 * len(lines)
    return n >= 20 and n == len(lines)  # a poem may have a comma in each of its lines


# -----------------------------------------------------------------------------
# All rows

class Runaway(Exception):
    """A record goes on and on."""


class Rows:
    """The rows of a text; after the last one also how many could not be read, and were mended.
    blocks: lists of lines, masked.
    """

    def __init__(self, blocks, dialect):
        self.dialect = dialect
        self.names = list(dialect.names)
        self.blocks = iter(blocks)
        self.lines = []
        self.at = 0  # those before this one are done
        self.patience = LONGEST_CELL
        self.lost = collections.Counter()  # cells that they have -> rows
        self.mended = 0
        self.short = 0
        self.headers = 0
        self.comments = 0

    def line_at(self, i):
        """The i-th of the lines to come; '' behind the last one."""
        while self.at + i >= len(self.lines):
            block = next(self.blocks, None)
            if block is None:
                return ''
            self.lines = self.lines[self.at:] + block
            self.at = 0
        return self.lines[self.at + i]

    def __iter__(self):
        take = self.take_plain if self.dialect.quote == '' else self.take_quoted
        n = MANY
        while self.line_at(0):
            rows = take(n)
            if rows is not None:
                yield from rows
                n = min(MANY, 2 * n)
            elif n > 1:
                n = max(1, n // 8)
            else:
                row = self.careful()
                if row is not None:
                    yield row

    def take_plain(self, n):
        """The rows of the next n lines; None, and nothing is taken, where one is not as it should be.
        """
        lines = self.lines[self.at:self.at + n]
        most = self.dialect.width - 1 if self.dialect.rest else -1
        delimiter = self.dialect.delimiter
        rows = [line.rstrip('\n').split(delimiter, most) for line in lines if line != '\n']
        if not self.are_good(rows, lines):
            return None
        self.at += len(lines)
        if self.dialect.blanks:
            return [[cell.strip(' ') for cell in row] for row in rows]
        return rows

    def take_quoted(self, n):
        """The same where there may be quotes, up to the end of the record in the n-th line."""
        lines = self.lines[self.at:self.at + n]
        if self.dialect.quote not in ''.join(lines):
            return self.take_plain(n)
        reader = csv.reader(
            itertools.chain(lines, self.lines_after(len(lines))), strict=True,
            delimiter=self.dialect.delimiter, quotechar=self.dialect.quote, skipinitialspace=self.dialect.blanks)
        rows = []
        try:
            for row in reader:
                rows.append(row)
                if reader.line_num >= len(lines):
                    break
        except csv.Error:
            return None
        except Runaway:
            self.patience = max(LEAST_PATIENCE, self.patience // 2)
            return None
        if not all(rows):
            rows = [row for row in rows if row]  # without blank lines
        if not self.are_good(rows, lines):
            return None
        if reader.line_num > len(rows) and any(swallows(row, self.dialect) for row in rows):
            return None
        self.at += reader.line_num
        return rows

    def lines_after(self, n):
        """Yields the lines to come from the n-th on, for a record that goes on there."""
        begin = n
        size = 0
        while line := self.line_at(n):
            n += 1
            size += len(line)
            is_doubled = n - begin > 8 and (n - begin) & (n - begin - 1) == 0
            if size > self.patience or is_doubled and are_rows(self.lines[self.at + begin:self.at + n], self.dialect):
                raise Runaway
            yield line

    def are_good(self, rows, lines):
        """Whether all rows have the right width, and none is the header or a comment."""
        if not set(map(len, rows)) <= {self.dialect.width} or self.names in rows:
            return False
        return not (self.dialect.comments and any(line.startswith('#') for line in lines))

    def careful(self):
        """The row of the record ahead, read in whatever way it fits; None if there is none."""
        dialect = self.dialect
        line = self.line_at(0)
        is_comment = dialect.comments and line.startswith('#')
        if is_comment or not line.strip():
            self.comments += is_comment
            self.at += 1
            return None
        most = min(self.patience >> 6, 10_000)
        for lines, lenient in (most, False), (1, True), (200, True):
            record = split(self.line_at, dialect, lines, lenient)
            if record and len(record.cells) == dialect.width:
                is_doubtful = lenient and record.lines > 1 and holds_start(record.cells, dialect)
                if not is_doubtful and not swallows(record.cells, dialect):
                    self.at += record.lines
                    if record.cells == self.names:
                        self.headers += 1
                        return None
                    self.mended += lenient
                    return record.cells
        record = split(self.line_at, dialect, 1, lenient=True)
        plain = split(self.line_at, dialect._replace(quote=''), 1)
        self.at += 1
        if len(plain.cells) == dialect.width:
            self.mended += 1
            return plain.cells
        n = len(record.cells)
        is_start = n < dialect.width and set(dialect.kinds[:n]) & set('nw')
        if is_start and fits(record.cells, dialect.kinds):
            self.short += 1
            return record.cells + [None] * (dialect.width - n)
        self.lost[n] += 1
        return None

    def drop_header(self):
        """The record ahead has the names."""
        record = split(self.line_at, self.dialect, 100) or split(self.line_at, self.dialect, 1, lenient=True)
        self.at += record.lines
        if RULE.fullmatch(self.line_at(0)):
            self.at += 1

    def tell(self, notes):
        """Says in a file's notes what could not be read, and what was mended."""
        width = self.dialect.width
        for n, count in self.lost.most_common(3):
            notes.lose(count, misfit(n, width))
        rest = sum(self.lost.values()) - sum(count for _, count in self.lost.most_common(3))
        notes.lose(rest, f'rows have other numbers of fields than the header ({width})')
        if self.short:
            notes.append(f'{self.short:,} rows end early: the header has {width} fields')
        if self.mended:
            notes.append(f'{self.mended:,} rows have quotes that do not close: taken as they stand')
        if self.comments:
            notes.append(f'{self.comments:,} lines begin with #: left out as comments')
        if self.headers:
            notes.append(f'{self.headers:,} times the header again: left out')
