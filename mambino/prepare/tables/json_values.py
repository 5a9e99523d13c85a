"""JSON values one after the other, out of a text of any length: no more than one is in memory.

    values = json_values.Values(f, notes)       # f: an open text
    for row in values.each(): ...                # of an array, or one after another; commas or not
    for row in values.inside([('data', 'rows')]): ...    # of the list in an object of objects

Between values may stand blanks, commas, line ends of any kind and the RS of RFC 7464. A value that
is no JSON is lost, and counted; what follows begins at the next line or the next object.
"""
import json
import re

from mambino.prepare.files import CHUNK, Skip
from mambino.prepare.tables.columns import LONGEST_ROW

BETWEEN = re.compile('[\\s,\x1e\ufeff\0]*')
# where the next value may begin after one that is broken: an object, or anything else
NEXT_OBJECT = re.compile('[\n\r\x1e][\\s,]*(?=\\{)|(?<=\\})\\s*,?\\s*(?=\\{)')
NEXT = re.compile('[\n\r\x1e]+')
NEAR = 12  # characters before the end of what was read: a word or an escape that is cut there looks broken
COSTLY = 1 << 22  # characters: of a shorter text, no value takes much memory
# bytes of memory that a value takes at most: those of its text, those of each object or list, of each item in one
OF_TEXT, OF_CONTAINER, OF_ITEM = 3, 72, 40
DECODER = json.JSONDecoder(strict=False)  # a tab within a string is a tab


def is_too_costly(text, memory=1e9):
    """Whether the value in a text may take more bytes of memory than that: '[{},{},{}]' takes 24
    times its length.
    """
    if len(text) < COSTLY:
        return False
    containers = text.count('{') + text.count('[')
    return OF_TEXT * len(text) + OF_CONTAINER * containers + OF_ITEM * text.count(',') > memory


class Broken(ValueError):
    """Here stands no JSON."""


class Values:
    """Values from an open text. notes: a Notes, for what is lost."""

    def __init__(self, f, notes):
        self.f = f
        self.notes = notes
        self.buffer = ''
        self.at = 0        # in the buffer
        self.passed = 0    # characters before the buffer
        self.lines = 1     # the line in which the buffer begins
        self.ended = False
        self.bad = 0
        self.first_bad = 0  # the line of the first one

    def read(self, size=CHUNK):
        """Reads on; what is behind is forgotten."""
        behind = self.buffer[:self.at]
        self.lines += behind.count('\n') or behind.count('\r')
        self.passed += self.at
        data = self.f.read(size)
        self.ended = not data
        self.buffer = self.buffer[self.at:] + data
        self.at = 0

    def position(self):
        """How many characters were passed."""
        return self.passed + self.at

    def peek(self):
        """The first character of what comes next, behind blanks and commas; '' at the end."""
        while True:
            self.at = BETWEEN.match(self.buffer, self.at).end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if self.ended:
                return ''
            self.read()

    def value(self, longest=LONGEST_ROW):
        """The value that begins here. Broken where there is none; EOFError where the text ends
        within it, or it is longer than that.
        """
        while True:
            error = None
            try:
                value, end = DECODER.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or self.ended:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as e:
                is_open = e.msg.startswith('Unterminated string') or e.pos >= len(self.buffer.rstrip())
                if not is_open and (self.ended or e.pos < len(self.buffer) - NEAR):
                    raise Broken(str(e)) from None
                error = e
            except (ValueError, RecursionError) as e:  # a number of 5,000 digits, or a hundred thousand [
                raise Broken(str(e)) from None
            if self.ended:
                raise EOFError(str(error))
            size = len(self.buffer) - self.at
            if size > longest or size > COSTLY and is_too_costly(self.buffer[self.at:]):
                raise EOFError('too long')
            self.read(max(CHUNK, size))

    def lose(self):
        """Goes on behind a value that is broken."""
        self.bad += 1
        if not self.first_bad:
            behind = self.buffer[:self.at]
            self.first_bad = self.lines + (behind.count('\n') or behind.count('\r'))
        pattern = NEXT_OBJECT if self.buffer[self.at] == '{' else NEXT
        self.at += 1
        while True:
            found = pattern.search(self.buffer, self.at)
            if found:
                self.at = found.end()
                return
            self.at = max(self.at, len(self.buffer) - 1)
            if self.ended:
                self.at = len(self.buffer)
                return
            self.read()

    def tell(self):
        """Says in the notes what was lost."""
        if self.bad:
            self.notes.lose(self.bad, f'rows were no JSON (first: line {self.first_bad:,})')

    # -------------------------------------------------------------------------
    # Rows

    def each(self, is_array=False):
        """Yields the values of an array, or of several arrays, or values that just follow each
        other. Skip('truncated') where the text ends within one.
        """
        inside = False
        try:
            while char := self.peek():
                if is_array and char == '[' and not inside:
                    inside = True
                    self.at += 1
                elif is_array and char == ']':
                    inside = False
                    self.at += 1
                else:
                    yield from self.one()
        finally:
            self.tell()

    def one(self):
        """Yields the value that begins here, or none where it is broken."""
        try:
            value = self.value()
        except Broken:
            self.lose()
        except EOFError as error:
            if str(error) != 'too long':
                raise Skip('truncated') from None
            self.lose()
        else:
            yield value

    def inside(self, paths, keyed=False):
        """Yields the values of the lists that stand at these paths of an object, tuples of its
        keys; keyed: of the objects that stand there, which are rows by their keys.
        """
        try:
            if self.peek() == '{':
                yield from self.walk(set(map(tuple, paths)), (), keyed)
        finally:
            self.tell()

    def walk(self, paths, path, keyed):
        """The same, from the { of the object at `path` on."""
        self.at += 1
        is_here = keyed and path in paths
        while (char := self.peek()) not in ('', '}'):
            key = self.key()
            below = path + (key,)
            char = self.peek()
            if is_here:
                yield from self.one()
            elif below in paths and char == '[':
                self.at += 1
                while self.peek() not in ('', ']'):
                    yield from self.one()
                self.at += 1
            elif char == '{' and any(p[:len(below)] == below for p in paths):
                yield from self.walk(paths, below, keyed)
            else:
                self.skip()
        if char == '':
            raise Skip('truncated')
        self.at += 1

    def skip(self):
        """Passes over a value."""
        for _ in self.one():
            pass

    def key(self):
        """The key that begins here, and its colon."""
        try:
            key = self.value()
            if self.peek() == ':':
                self.at += 1
                self.peek()
                return key
        except Broken:
            pass
        except EOFError:
            raise Skip('truncated') from None
        raise Skip('broken JSON')
