"""What can be seen in the bytes of a text before its encoding is known. All of a file is looked at,
at the speed of C; `parts` stands for a function that yields its bytes from the beginning.

    look_through(parts())        # (it is UTF-8, there may be escapes in it)
    evidence = gather(parts())   # what is UTF-8 and what is not, and lines of both
    wrong = count_wrong(parts, 'cp1252')
    wrong.say(notes)             # '12 bytes were no cp1252'
"""
import codecs
import re
from typing import NamedTuple

from mambino.prepare.texts.declared import TAIL

ESCAPED = ('iso2022_jp', 'iso2022_jp_ext', 'iso2022_jp_2', 'iso2022_kr', 'hz')
ASCII = bytes(range(128))
INSIDE = bytes(range(0x80, 0xC0))        # what a letter in UTF-8 goes on with
BETWEEN = re.compile(rb'[\0-/]')        # bytes that are part of no longer character in any encoding
REPLACEMENT = '\ufffd'.encode()         # a text may have it on purpose
TWICE_BEGINS = ('Ã'.encode() + b'\xc2', 'â'.encode() + b'\xe2')
TWICE = ('Ã©'.encode(), 'Ã¼'.encode(), 'â€'.encode(), 'Ã¡'.encode(), 'Ã³'.encode())
LINES_BYTES = 1 << 17   # so many lines tell an old encoding
VALID_LINES = 100       # and so many whether others are UTF-8
LONGEST_LINE = 1 << 14  # bytes: so much of a line is kept
FEW_BLOCKS = 8          # where all lines are of one kind, one in so many blocks is split into them
MUCH = 0.001            # share of the bytes: of more that do not fit, the share is said


# -----------------------------------------------------------------------------
# UTF-8, escapes

def look_through(parts):
    """(whether all of it is UTF-8, whether there may be escapes of ISO 2022 or HZ in it)"""
    decoder = codecs.getincrementaldecoder('utf-8')()
    has_escapes = False
    inside = False  # a letter
    try:
        for part in parts:
            # one byte is found many times faster than two
            has_escapes = has_escapes or 0x1b in part and b'\x1b$' in part or b'~' in part and b'~{' in part
            if inside or not part.isascii():
                decoder.decode(part)
                inside = decoder.getstate()[0] != b''
        decoder.decode(b'', final=True)
    except UnicodeDecodeError:
        return False, False
    return True, has_escapes


def encoded_twice(head):
    """How many letters in UTF-8 look like UTF-8 that was taken for cp1252 and encoded again."""
    if head.isascii() or not any(begin in head for begin in TWICE_BEGINS):
        return 0  # as a rule, and found out sooner
    return sum(map(head.count, TWICE))


def escaped_encoding(parts):
    """The encoding of 7 bits whose escapes these are; None where they are something else."""
    for name in ESCAPED:
        try:
            decoder = codecs.getincrementaldecoder(name)()
            is_ascii = all([decoder.decode(part).isascii() for part in parts()])
            decoder.decode(b'', final=True)
            if not is_ascii:
                return name
        except UnicodeDecodeError:
            continue
    return None


def is_valid(data):
    """Whether it is UTF-8."""
    try:
        data.decode('utf-8')
        return True
    except UnicodeDecodeError:
        return False


# -----------------------------------------------------------------------------
# What is not UTF-8

class Evidence:
    """What gather found."""

    def __init__(self):
        self.size = 0           # bytes
        self.good = 0           # of letters beyond ASCII in UTF-8
        self.bad = 0            # places that are no UTF-8
        self.lines = []         # some that are not UTF-8, from all over the file
        self.valid_lines = []   # some that are, and not ASCII
        self.bad_lines = 0      # how many are not
        self.tail = b''         # the last bytes
        self.step = 1           # one in so many lines is kept

    def add_block(self, block):
        """Takes the next bytes; whether they had places that are no UTF-8."""
        self.size += len(block)
        self.tail = (self.tail + block)[-TAIL:]
        if block.isascii():
            return False
        bad = block.decode('utf-8', 'replace').count('\ufffd') - block.count(REPLACEMENT)
        self.bad += bad
        self.good += max(0, len(block.translate(None, ASCII)) - bad)
        return bad > 0

    def add_lines(self, block):
        """Takes its lines."""
        for line in block.split(b'\n'):
            if line.isascii():
                continue
            if is_valid(line):
                if len(self.valid_lines) < VALID_LINES:
                    self.valid_lines.append(line[:LONGEST_LINE])
                continue
            self.bad_lines += 1
            if self.bad_lines % self.step == 0:
                self.lines.append(line[:LONGEST_LINE])
        while sum(map(len, self.lines)) > LINES_BYTES and len(self.lines) > 1:
            self.lines = self.lines[::2]
            self.step *= 2


def gather(parts):
    """The Evidence in bytes that are not UTF-8."""
    evidence = Evidence()
    for number, block in enumerate(whole_words(parts)):
        is_bad = evidence.add_block(block)
        is_plain = evidence.step > 1 and not evidence.valid_lines  # nothing is UTF-8
        if is_bad and (not is_plain or number % FEW_BLOCKS == 0):
            evidence.add_lines(block)
        elif not is_bad and len(evidence.valid_lines) < VALID_LINES:
            evidence.add_lines(block)
    return evidence


def whole_words(parts):
    """The bytes again, in blocks that begin and end where no character of any encoding is cut.
    Where many have neither a blank nor a newline, some are left out.
    """
    rest = b''
    is_cut = False
    for part in parts:
        part = rest + part
        if is_cut:
            between = BETWEEN.search(part)
            part = part[between.end():] if between else b''
        end = max(part.rfind(b'\n'), part.rfind(b' ')) + 1
        is_cut = end == 0
        yield part[:end] if end else part
        rest = part[end:] if end else b''
    yield rest


def cut_off(head, tail):
    """How many places are no UTF-8 for the sole reason that a text was cut within a letter, where
    it begins or ends. head, tail: its first and last bytes."""
    begins_within = len(head) - len(head.lstrip(INSIDE))
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    decoder.decode(tail[-4:])
    ends_within = decoder.getstate()[0] != b''
    return ends_within + (begins_within if begins_within < 4 else 0)


# -----------------------------------------------------------------------------
# What does not fit an encoding

class Wrong(NamedTuple):
    """What count_wrong found."""
    name: str       # of the encoding
    count: int      # bytes that do not fit it
    size: int       # of all of them
    first: int      # where the first one is, from 0

    @property
    def share(self):
        return self.count / max(1, self.size)

    def say(self, notes):
        """Notes it, if there is something to say."""
        if self.count:
            name = 'UTF-8' if self.name.startswith('utf-8') else self.name
            is_much = self.count >= 10 and self.share > MUCH
            much = f', one in {1 / self.share:,.0f}' if is_much else ''
            notes.append(f'{self.count:,} bytes were no {name}{much}')


def count_wrong(parts, name):
    """How many of the bytes do not fit an encoding, as Wrong."""
    count = 0
    first = 0
    size = 0
    begin = 0  # where the bytes begin that are being decoded

    def replace(error):
        nonlocal count, first
        if not count:
            first = begin + error.start
        count += error.end - error.start
        return '\ufffd', error.end

    codecs.register_error('mambino.count', replace)
    decoder = codecs.getincrementaldecoder(name)('mambino.count')
    for part in parts():
        begin = size - len(decoder.getstate()[0])
        size += len(part)
        decoder.decode(part)
    begin = size - len(decoder.getstate()[0])
    decoder.decode(b'', final=True)
    return Wrong(name, count, size, first)
