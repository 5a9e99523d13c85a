"""How a csv file writes its rows: delimiter, quotes, escapes, header. Found by trying, never assumed.

    dialect, rows = csv_dialect.find(csv_dialect.sample(path, encoding))    # None: no table

    sample ──► for each delimiter, each way of quoting: how many rows have one number of cells,
               how many quoted cells do not end as they should ──► the best
                 └► what stands before the header, whether there is one, what the columns look like
"""
import collections
import os
import re
from typing import NamedTuple

from mambino.prepare.files import Skip, is_packed
from mambino.prepare.tables import csv_header
from mambino.prepare.tables.csv_records import NULL, RULE, Dialect, fits, lines_of, masked, misfit, split
from mambino.prepare.texts.encodings import is_wide, open_text

HEADS = (1 << 18, 1 << 21, 1 << 24)  # characters of the beginning that are looked at: more where rows are long
ROWS = 3         # fewer are too few to tell,
RECORDS = 3000   # so many of a piece are enough
CELLS = 100_000  # so many of them tell what the columns look like
PIECES = 4       # and so many places after that beginning are looked at,
PIECE = 1 << 16  # with so many bytes each
ONE_COLUMN = '\x1f'
DELIMITERS = ['\t', ONE_COLUMN, '\x01', '|', ';', '^', '~', '¦', ',']
FITTING = 0.8    # share of rows that have as many cells as the most of them
NO_ROWS = 'empty: no rows below the header'
EXCEL = re.compile(r'"?sep=(.)"?\s*$', re.I)


# -----------------------------------------------------------------------------
# A sample

class Sample(NamedTuple):
    """Texts of whole lines from a file."""
    pieces: list  # of its beginning, then of places spread over it
    is_all: bool  # there is no more of it


def sample(path, encoding, head=HEADS[0]):
    """The Sample of a file. head: characters of its beginning."""
    with open_text(path, encoding) as f:
        text = f.read(head)
        text += f.readline(HEADS[-1])
        is_all = head == HEADS[-1] or not f.read(1)  # of more than that, no more is looked at
    pieces = [text.removeprefix('\ufeff')]
    size = os.path.getsize(path)
    if is_all or is_packed(path) or is_wide(encoding) or size < 2 * (head + PIECES * PIECE):
        return Sample(pieces, is_all)
    with open(path, 'rb') as f:
        for i in range(1, PIECES + 1):
            f.seek(head + (size - head) * i // (PIECES + 1))
            data = f.read(PIECE).replace(b'\r\n', b'\n').replace(b'\r', b'\n')
            _, _, data = data.partition(b'\n')
            data, _, _ = data.rpartition(b'\n')
            if data:
                pieces.append(data.decode(encoding, 'replace') + '\n')
    return Sample(pieces, False)


# -----------------------------------------------------------------------------
# Trying a dialect

class Tally:
    """What comes out where a sample is read with a dialect."""

    def __init__(self, sample, dialect, trusting=True):
        self.dialect = dialect
        self.trusting = trusting  # quoted cells may have lines that look like rows
        self.records = []  # of the first piece, then of the others
        self.improper = 0  # quotes at the beginning of cells that do not end as they should
        self.proper = 0
        self.needed = 0
        first, *others = sample.pieces
        self.read(lines_of(masked(first, dialect)), sample.is_all)
        self.is_short = len(self.records) < ROWS and not sample.is_all
        self.head = len(self.records)
        self.count()
        if all(record.lines == 1 for record in self.records):
            for piece in others:  # where no cell has lines, a line begins a row
                before = len(self.records), self.improper, self.proper, self.needed
                self.read(lines_of(masked(piece, dialect)), sample.is_all)
                fitting = sum(len(record.cells) == self.width for record in self.records[before[0]:])
                if fitting < 0.5 * (len(self.records) - before[0]):  # it lies in a long cell
                    n, self.improper, self.proper, self.needed = before
                    del self.records[n:]
            self.count()

    def count(self):
        """How many cells the records have."""
        self.widths = collections.Counter(len(record.cells) for record in self.records)
        self.width = max(self.widths, key=lambda width: (self.widths[width], width), default=0)
        self.fit = self.widths[self.width] / max(1, len(self.records))

    def read(self, lines, is_all):
        """Adds the records of a piece."""
        at = 0
        delimiter = self.dialect.delimiter
        counts = collections.Counter(filter(None, (line.count(delimiter) for line in lines)))
        common = max(counts, key=counts.get, default=0)

        def line_at(i):
            nonlocal is_cut
            is_cut = is_cut or at + i >= len(lines)
            return lines[at + i] if at + i < len(lines) else ''

        def are_rows(some):
            return common and sum(line.count(delimiter) == common for line in some) > 0.8 * len(some)

        most = len(self.records) + RECORDS
        while at < len(lines) and len(self.records) < most:
            if not lines[at].strip():
                at += 1
                continue
            is_cut = False
            record = split(line_at, self.dialect, len(lines) + 1)
            if record is None and is_cut and not is_all and not are_rows(lines[at + 1:]):
                return  # it goes on behind the sample
            if record is not None and not self.trusting and record.lines > 5:
                if are_rows(lines[at + 1:at + record.lines]):
                    record = None
            if record is None:
                record = split(line_at, self.dialect, 1, lenient=True)
                self.improper += 1
            self.proper += record.quoted
            self.needed += record.needed
            self.records.append(record)
            at += record.lines

    @property
    def bad(self):
        """Share of records with another number of cells than most, or with quotes that do not fit."""
        return (1 - self.fit) + self.improper / max(1, len(self.records))


def tried(sample, dialect):
    """Its Tally. Only where all quotes fit, there may be tables within cells."""
    tally = Tally(sample, dialect)
    if tally.is_short:
        raise Empty('no row ends')
    return tally if not tally.improper else Tally(sample, dialect, trusting=False)


def quoting(sample, delimiter):
    """The Tally of the best way to quote, with this delimiter."""
    text = ''.join(sample.pieces)
    plain = Tally(sample, Dialect(delimiter, ''))
    if is_escaped(text, plain):
        plain = Tally(sample, Dialect(delimiter, '', escape=True, letters=True))
    tries = []
    for quote in '"', "'":
        if not re.search(f'(?:^|{re.escape(delimiter)}) *{quote}', text, re.M):
            continue
        tries.append(tried(sample, Dialect(delimiter, quote)))
        if '\\' + quote in text or '\\\n' in text or NULL in text:
            letters = only_letters(text)
            tries.append(tried(sample, Dialect(delimiter, quote, escape=True, letters=letters)))
    tries = [tally for tally in tries if tally.dialect.quote == '"' or tally.needed > 2]
    if not tries:
        if delimiter in ',;' or '"' not in text and delimiter != ONE_COLUMN and not plain.dialect.escape:
            return Tally(sample, plain.dialect._replace(quote='"'))  # there may be quotes later
        return plain
    prefers_escapes = only_quotes_are_escaped(text, delimiter)
    best = min(tries, key=lambda tally: (tally.bad, tally.dialect.escape != prefers_escapes))
    if plain.fit >= FITTING and plain.width > 1 or delimiter == ONE_COLUMN:
        is_mixed = best.proper < 0.9 * len(best.records)
        is_usual = delimiter in ',;' and best.improper < 0.05 * len(best.records)
        if best.improper > best.needed + 0.2 * best.proper and not is_usual:
            return plain
        if not best.needed and is_mixed and delimiter not in ',;' and not quoted_for_commas(best):
            return plain
    return best


def only_letters(text):
    r"""Whether each backslash of a text escapes something, as in \n, \t, \\."""
    backslashes = re.findall(r'\\(.|\n)', text)
    return bool(backslashes) and all(c in 'ntr0bZN\\"\'\n\t' for c in backslashes)


def is_escaped(text, plain):
    """Whether the backslashes of a text without quotes are escapes: databases write so."""
    if '\\' not in text:
        return False
    is_null = any(NULL in (cell.strip() for cell in record.cells) for record in plain.records)
    are_quotes = only_quotes_are_escaped(text, plain.dialect.delimiter)
    is_often = text.count('\\') > 2 and plain.dialect.delimiter != ONE_COLUMN
    return only_letters(text) and (is_null or are_quotes or is_often)


def only_quotes_are_escaped(text, delimiter):
    """Whether there are backslashes before quotes, and all other quotes are those around cells."""
    around = re.escape(delimiter)
    return '\\"' in text and not re.search(rf'(?<![\\\n{around}])"(?![\n{around}]|\Z)', text)


def quoted_for_commas(tally):
    """Whether the only column is quoted where it has commas, or another delimiter, and nowhere else."""
    cells = [(record.cells[0], bool(record.quoted)) for record in tally.records]
    for delimiter in ',;\t|':
        if all((delimiter in cell or '"' in cell or '\n' in cell) == is_quoted for cell, is_quoted in cells):
            return True
    return False


# -----------------------------------------------------------------------------
# The dialect

class Empty(Skip):
    """A header, and no whole row below it."""


def of_file(path, encoding, wanted=()):
    """What find() has for a file, from as much of it as that needs."""
    for head in HEADS:
        looked_at = sample(path, encoding, head)
        is_last = looked_at.is_all
        try:
            found = find(looked_at, wanted)
        except Empty:
            if is_last:
                raise
            continue
        if is_last or found and len(found[1]) >= ROWS:
            return found


def find(sample, wanted=()):
    """(Dialect, [rows] of the sample's beginning); None where it is no table. Skip where it is one
    that cannot be read: no rows, or too many that do not fit.
    """
    lines = lines_of(sample.pieces[0])
    skip = 0
    delimiters = DELIMITERS
    if lines and (excel := EXCEL.match(lines[0])):
        skip = 1
        delimiters = [excel[1]] if excel[1] in DELIMITERS else DELIMITERS
    above = re.compile(r'\s*$|#')
    if all(map(above.match, lines)):
        above = re.compile(r'\s*$')
    while skip < len(lines) and above.match(lines[skip]):
        skip += 1
    comments = any(line.startswith('#') for line in lines[:skip])
    if skip == len(lines):
        return None
    sample = sample._replace(pieces=[''.join(lines[skip:]), *sample.pieces[1:]])
    tallies = []
    for delimiter in delimiters:
        if delimiter != ONE_COLUMN and delimiter in sample.pieces[0]:
            tallies.append(quoting(sample, delimiter))
    usual_alone = lines[skip].strip().strip('"').lower() in {*csv_header.USUAL, *wanted}
    good = [tally for tally in tallies if is_table(tally, usual_alone)]
    if good:
        best = max(good, key=rank)
        return finished(with_rest(best, sample) or best, skip, comments, lines, wanted)
    one = one_column(sample, wanted)
    if one:
        return finished(one, skip, comments, lines, wanted)
    for tally in tallies:
        if tally.records and len(tally.records[0].cells) > 1 and csv_header.is_sure(tally.records[0].cells):
            rest = with_rest(tally, sample)
            if rest:
                return finished(rest, skip, comments, lines, wanted)
            refuse_misfits(tally)
    return None


def rank(tally):
    """Higher for the better of two that both seem right."""
    begins_well = len(tally.records[0].cells) == tally.width
    return begins_well, round(tally.fit, 1), tally.width, -DELIMITERS.index(tally.dialect.delimiter)


def is_table(tally, usual_alone):
    """Whether the rows have one number of cells, above 1; a file of few must also have a header."""
    n = len(tally.records)
    if tally.width < 2 or n - tally.widths[tally.width] > max(1, (1 - FITTING) * n):
        return False
    first = tally.records[0].cells
    if len(first) == 1 and usual_alone:
        return False  # the header of one column
    if len(first) > 1 and csv_header.is_sure(first) and has_prose_after(tally, len(first)):
        return False
    if n < 5:
        heads = [record.cells for record in tally.records if len(record.cells) == tally.width]
        names = heads[0]
        is_likely = csv_header.names_of(names) or csv_header.numeric(names)
        return csv_header.is_sure(names) or bool(tally.fit == 1 and is_likely)
    return True


def has_prose_after(tally, width):
    """Whether most rows go on, behind as many cells as the header has, with what follows a comma in
    a sentence.
    """
    rows = [record.cells for record in tally.records[1:]]
    longer = [row for row in rows if len(row) > width]
    spaced = [row for row in longer if row[width].startswith(' ') and not row[1].startswith(' ')]
    return tally.width > width + 1 or len(spaced) > FITTING * len(rows)


def one_column(sample, wanted):
    """The Tally of a table of one column; None where it is a text like another."""
    tally = quoting(sample, ONE_COLUMN)
    if not tally.records:
        return None
    first = tally.records[0].cells[0].strip()
    if len(tally.records) == 1:
        if first.lower() in csv_header.USUAL:
            raise Empty(NO_ROWS)
        return None
    if tally.proper >= 0.9 * (len(tally.records) - 1):
        names = re.split('[,;\t|]', first)
        if len(names) > 1 and csv_header.is_sure(names):
            raise Skip('each of its rows is in quotes as a whole: take them off')
        return tally
    if first.lower() in {*csv_header.USUAL, *wanted}:
        return tally
    is_spaced = re.search(r'\n\s*\n.', sample.pieces[0])
    is_name = len(first) <= 30 and first.count(' ') < 3 and csv_header.names_of([first])
    return tally if is_name and not is_spaced and len(tally.records) > 3 else None


def with_rest(tally, sample):
    """The Tally of a table whose last column has delimiters, without quotes around them, as prose has
    commas; None where that is not so.
    """
    header = tally.records[0].cells
    width = len(header)
    widths = [len(record.cells) for record in tally.records[1:]]
    shorter = sum(n < width for n in widths)
    more = [cell for record in tally.records[1:] for cell in record.cells[width:]]
    spaced = sum(cell.startswith(' ') for cell in more)  # as commas in a sentence are followed by a blank
    if tally.proper or width < 2 or not more or spaced < 0.5 * len(more) or not csv_header.is_sure(header):
        return None
    dialect = tally.dialect._replace(quote='', rest=True, names=('',) * width)
    again = Tally(sample, dialect)
    kinds = csv_header.kinds_of([record.cells for record in again.records[1:] if len(record.cells) == width], width)
    is_prose = kinds[-1] in 'tp' and set(kinds[:-1]) <= set('nw')
    return again if is_prose and shorter <= 0.02 * len(widths) else None


def refuse_misfits(tally):
    """Skip where most rows have another number of cells than the header."""
    width = len(tally.records[0].cells)
    rows = tally.records[1:]
    other = collections.Counter(len(record.cells) for record in rows)
    del other[width]
    if other:
        n = max(other, key=other.get)
        raise Skip(f'{other[n]:,} of the first {len(rows):,} {misfit(n, width)}')


def finished(tally, skip, comments, lines, wanted):
    """(Dialect, rows) with what can be said of the header and the columns."""
    width = tally.width
    dialect = tally.dialect
    records = tally.records[:tally.head]
    while len(records) > 1 and csv_header.is_title(records[0].cells, records[1].cells, width):
        skip += records.pop(0).lines
        while skip < len(lines) and not lines[skip].strip():
            skip += 1
    marked = [i for i, line in enumerate(lines[:skip]) if line.startswith('#')]
    if marked and not csv_header.names_of(records[0].cells):  # '#id,text' is a header
        cells = split([lines[marked[-1]].lstrip('# ')].__getitem__, dialect, 1, lenient=True).cells
        if len(cells) == width:
            skip = marked[-1]
            comments = len(marked) > 1
            records.insert(0, records[0]._replace(cells=cells))
    rows = [record.cells for record in records if len(record.cells) == width]
    first = records[0].cells
    below = [row for row in rows if row is not first and not RULE.fullmatch(' '.join(row))]
    if skip < len(lines) and len(rows) == 0:
        raise Empty('no rows that fit the header')
    some = below or rows
    kinds = csv_header.kinds_of(some[::len(some) * width // CELLS + 1], width)
    header = csv_header.is_header(first, below, kinds) or any(name.strip().lower() in wanted for name in first)
    if header and not below:
        raise Empty(NO_ROWS)
    elsewhere = [record.cells for record in tally.records[tally.head:] if len(record.cells) == width]
    below += [row for row in elsewhere if fits(row, kinds)]  # others may be lines of a cell
    if not header:
        below = rows[:rows[0] is first] + below
        first = [''] * width
    may_be_of_r = records[0].quoted or dialect.delimiter == '\t'
    names = names_for(first, below, kinds, may_be_of_r)
    if len(names) != width:
        raise Skip(f'{len(below):,} of the first {len(records) - 1:,} {misfit(width, len(names))}')
    dialect = dialect._replace(
        blanks=csv_header.has_blanks(below), comments=comments, skip=skip, header=header,
        names=tuple(csv_header.distinct(names)), kinds=kinds)
    return dialect, below


def names_for(first, rows, kinds, may_be_of_r):
    """The names in the first row, as many as there are columns: one less where each row ends with a
    delimiter, or begins with its own name, as R writes it, and one more where only the header ends
    with a delimiter.
    """
    width = len(kinds)
    if len(first) == width - 1 and all(not row[-1].strip() for row in rows):
        return first + ['']
    if len(first) == width - 1 and may_be_of_r and csv_header.are_names_of_rows(rows, kinds):
        return ['row'] + first
    if len(first) == width + 1 and not first[-1].strip():
        return first[:-1]
    return first
