"""Reads a PDF: the text of its pages, with what was done to it for print undone.

    for text, last in pdf_text.read_pdf('paper.pdf', options, notes): ...    # a page a piece

    page ──► the engine ──► can it be read? ─yes─► tidy_page ──► join_words ──► text
                               │ no                   ▲
                               └► the other engine ───┤ is it better there? that one, with a note
                                                      └ neither: left out, with a note
"""
import collections
import contextlib
import importlib.util
import re

from mambino.prepare.documents import legible
from mambino.prepare.documents.pdf_engines import ENGINES, LOST, UNSURE
from mambino.prepare.files import Skip
from mambino.prepare.texts.encodings import clean

LIGATURES = {0xfb00 + i: letters for i, letters in enumerate('ff fi fl ffi ffl st st'.split())}
SHAPES = LIGATURES | legible.SYMBOLS
HELD = 1 << 24     # characters that wait until all words of the document are known
MOST_EMPTY = 0.1   # share of pages without text that books have
FAILED = 'failed'  # an engine raised an error
# what may be wrong with a page, the worst first
PROBLEMS = [FAILED, legible.JUNK, LOST, legible.REVERSED, legible.APART, UNSURE, '']
NOTES = {
    FAILED: 'pages could not be read',
    legible.JUNK: 'pages left out: their fonts do not say which letters they show',
    LOST: 'pages have fewer letters than places with text: some may be missing',
    legible.REVERSED: 'pages with right-to-left text in reverse order',
    legible.APART: 'pages with blanks between the letters of words',
    UNSURE: 'pages whose fonts do not say which letters they show: some may be wrong',
}


def read_pdf(path, options, notes):
    """The text of the pages, an empty line between two. options['pdf']: a key of ENGINES;
    options['pdf_other']: another one, for pages that this one cannot read, or ''. A piece is '' while
    pages are being read.
    """
    with open(path, 'rb') as f:
        if b'%PDF-' not in f.read(1024):
            raise Skip('not a PDF')
    names = [options['pdf'], options.get('pdf_other', '')]
    with contextlib.closing(Book(path, [name for name in names if name])) as book:
        written = False
        for text in join_words(book.pages()):
            if text:
                yield ('\n\n' if written else '') + text, False
                written = True
            else:
                yield '', False
    lost = {what: n for what, n in book.problems.items() if what in (FAILED, legible.JUNK)}
    if not written:
        raise Skip(why_empty(lost))
    if sum(lost.values()) > 0.5 * book.with_text:
        raise Skip(f'most of it is lost: {", ".join(book.said(lost))}')
    notes.facts['reader'] = book.names[0]
    notes += book.said(book.problems)
    empty = book.size - book.with_text
    if empty > max(1, MOST_EMPTY * book.size):
        notes.append(f'{empty:,} of {book.size:,} pages have no text (scanned?)')
    if book.by_other:
        notes.append(f'{book.by_other:,} of {book.with_text:,} pages read by {names[1]}: {names[0]} could not')
    if book.odd:
        notes.append(f'{book.odd:,} characters were unreadable')
    yield '\n', True


def why_empty(lost):
    """The reason to skip a PDF without a page of text."""
    if legible.JUNK in lost:
        return 'its fonts do not say which letters they show'
    return 'unreadable pages' if lost else 'no text in the PDF (scanned?)'


class Book:
    """A PDF that is being read, by two engines if need be."""

    def __init__(self, path, names):
        self.path = path
        self.names = names
        self.engines = {}    # name -> Pypdf or Pdfium; None where it cannot open the file
        self.size = 0        # pages
        self.with_text = 0   # of those
        self.by_other = 0    # pages taken from the second engine
        self.odd = 0         # characters in pages that were taken
        self.problems = {}   # what is wrong with pages -> how many
        try:
            self.first = self.open(names[0])
        except Skip as reason:
            if str(reason) == 'encrypted' or len(names) == 1:
                raise
            self.names = names[1:]
            try:
                self.first = self.open(self.names[0])
            except MemoryError:
                raise
            except Exception:
                raise reason from None

    def open(self, name):
        """The engine; Skip where it cannot open the file."""
        self.engines[name] = None
        self.engines[name] = ENGINES[name](self.path)
        return self.engines[name]

    def close(self):
        for engine in self.engines.values():
            if engine is not None:
                engine.close()

    def second(self):
        """The other engine, or None."""
        if len(self.names) < 2:
            return None
        name = self.names[1]
        if name not in self.engines and importlib.util.find_spec(name):
            try:
                self.open(name)
            except MemoryError:
                raise
            except Exception:  # whatever is wrong with the file, it is the first one's to say
                pass
        return self.engines.get(name)

    def pages(self):
        """Yields the text of each page that has some."""
        self.size = len(self.first)
        for i in range(self.size):
            text, problem = read_page(self.first, i)
            if problem and self.second() is not None:
                text, problem = self.compare(i, text, problem)
            if problem:
                self.problems[problem] = self.problems.get(problem, 0) + 1
            self.with_text += bool(text or problem)
            if text and problem != legible.JUNK:
                self.odd += legible.count_odd(text)
                yield tidy_page(legible.close_up(text))

    def compare(self, i, text, problem):
        """(text, problem) of the engine that is the better one for page i."""
        other_text, other_problem = read_page(self.second(), i)
        size = legible.letters_in(text)
        other_size = legible.letters_in(other_text)
        if problem == UNSURE and not other_problem:
            if are_alike(text, other_text):
                return text, ''
            return text, problem
        if problem == LOST and not other_problem and other_size < 1.5 * size:
            return text, ''  # no more to be found: it has only blanks there
        worse = PROBLEMS.index(other_problem) <= PROBLEMS.index(problem)
        if worse or other_size < 0.7 * size:
            return text, problem
        self.by_other += 1
        return other_text, other_problem

    def said(self, problems):
        """The lines for the notes."""
        return [f'{n:,} of {self.with_text:,} {NOTES[what]}' for what, n in problems.items()]


def read_page(engine, i):
    """(text, what is wrong with it: one of PROBLEMS) of a page."""
    try:
        text, doubt = engine.read(i)
    except MemoryError:
        raise
    except Exception:  # pypdf says that whatever comes is the caller's to catch
        return '', FAILED
    text = unmark(clean(text))
    if not text.isascii() and max(text) >= '\uf000':
        text = text.translate(SHAPES)
    if not text.strip():
        return '', doubt if doubt == LOST else ''
    problem = legible.problem_of(text)
    return text, min(problem, doubt, key=PROBLEMS.index)


def are_alike(text, other):
    """Whether two engines have found the same letters."""
    letters, others = (collections.Counter(re.sub(r'\W', '', t)) for t in (text, other))
    return (letters & others).total() >= 0.95 * max(letters.total(), others.total())


# -----------------------------------------------------------------------------
# What was done for print

def unmark(text):
    """pdfium's marks for a word broken at the end of a line become a hyphen and that end."""
    if '\x02' not in text and '\ufffe' not in text:
        return text
    return re.sub(r'(?<=\w)[\ufffe\x02]\n?(?=\w)', '-\n', text)


def tidy_page(text):
    """Undoes what was done to a text for print: ligatures, soft hyphens, blanks at the ends of lines.
    """
    text = unmark(clean(text if text.isascii() else text.translate(LIGATURES)))
    text = text.replace('\xad\n', '').replace('\xad', '')
    if legible.count_odd(text):
        text = re.sub(r'[\x00-\x08\x0b\x0e-\x1f\ufffe]', '', text)
    return '\n'.join(line.rstrip(' \t') for line in text.split('\n')).strip('\n')


BREAK = re.compile(r'(?<=[^\W\d_])[-‐] ?\n(?=[^\W\d_])')  # a letter, a hyphen, the end of the line, a letter
WORD = re.compile(r'[^\W\d_]+')
LAST_WORD = re.compile(r'[^\W\d_]+\Z')
LONGEST_WORD = 80  # characters


def join_words(pages):
    """Yields the texts of pages, words that were broken at the end of a line joined: those that the
    document has elsewhere in one. Others may have had their hyphen before. Yields '' while it waits
    for all pages, or for HELD characters.
    """
    held = []
    size = 0
    for text in pages:
        yield ''
        held.append(text)
        size += len(text)
        if size > HELD:
            yield from joined(held)
            held = []
            size = 0
    yield from joined(held)


def joined(texts):
    """Yields the texts with broken words joined where one of the texts has them in one."""
    breaks = [list(breaks_of(text)) for text in texts]
    wanted = {word for some in breaks for _, _, word in some}
    known = set()
    if wanted:
        for text in texts:
            known.update(wanted.intersection(WORD.findall(text.lower())))
    for text, some in zip(texts, breaks):
        parts = []
        at = 0
        for start, end, word in some:
            if word in known:
                parts.append(text[at:start])
                at = end
        yield ''.join(parts) + text[at:]


def breaks_of(text):
    """Yields (start, end, word) for each hyphen at the end of a line: its place, that of the next line,
    and the word without it, in small letters.
    """
    for found in BREAK.finditer(text):
        before = LAST_WORD.search(text, max(0, found.start() - LONGEST_WORD), found.start())
        after = WORD.match(text, found.end())
        yield found.start(), found.end(), (before[0] + after[0]).lower()
