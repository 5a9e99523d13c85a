"""The text in bytes, whatever its encoding. All texts are opened here.

    encoding = encodings.encoding_of('old.txt', notes, options)     # 'utf-8', 'cp1252', ...
    with encodings.open_text('old.txt', encoding) as f: ...
    text = encodings.read_whole('prompt.txt', notes)

    bytes ──► encoding_of ──► open_text ──► clean
                ├► a byte order mark                      utf-8-sig, utf-16, utf-32
                ├► options['encoding'], which must fit
                ├► zeros of UTF-16, escapes of ISO 2022   utf-16-le, iso2022_jp, ...
                ├► valid UTF-8
                ├► what the text declares, if it fits     declared.py
                ├► UTF-8 with damage, which is counted
                └► a guess, which is shown                guess.py
"""
import codecs
import io
import itertools
import re
import sys
from typing import NamedTuple

from mambino.prepare import guess
from mambino.prepare.declared import codec_of, declared
from mambino.prepare.files import Skip, chunks, open_bytes

MARKS = {
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF32_LE: 'utf-32',  # begins like the one of UTF-16, so it comes first
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}
ESCAPED = ('iso2022_jp', 'iso2022_jp_ext', 'iso2022_jp_2', 'iso2022_kr', 'hz')
ASCII = bytes(range(128))
BETWEEN = re.compile(rb'[\0-/]')  # bytes that are part of no longer character in any encoding
CONTROL = bytes(b for b in range(32) if b not in b'\t\n\f\r\b\x01\x0e\x0f\x1b\x1e\x1f')
REPLACEMENT = '\ufffd'.encode()  # a text may have it on purpose
MOST_WRONG = 0.001   # share of the bytes that need not fit an encoding that was said or declared
MOST_DAMAGED = 0.05  # share of the bytes beyond ASCII that need not fit UTF-8
GUESS_BYTES = 1 << 16   # so many tell an old encoding
LONGEST_LINE = 1 << 14  # so much of a line is looked at
SHOWN = 48           # characters of a line that are shown with a guess
TABLES = ('jsonl', 'json', 'csv')  # of these, rows before a damaged place can be read


# -----------------------------------------------------------------------------
# The encoding

def encoding_of(path, notes, options=None, kind='text', max_bytes=0):
    """The encoding of a text, a name for open_text. options['encoding'], if there, is obeyed. What is
    not plain UTF-8 is put down as notes.facts['encoding'], and what was guessed or does not fit in
    notes. kind: of readers.READERS; max_bytes: of a packed file. Skip('binary') for no text.
    """
    def parts():
        try:
            yield from chunks(path, max_bytes)
        except Exception:
            if kind not in TABLES:
                raise

    return encoding_of_bytes(parts, notes, (options or {}).get('encoding', ''), kind)


def encoding_of_bytes(parts, notes, said='', kind='text'):
    """The same for bytes: `parts` is a function that yields them, from the beginning each time. said:
    the encoding they are in, as the user says.
    """
    head = next(parts(), b'')
    name = marked(head)
    if name:
        count_wrong(parts, name).say(notes)
    elif said:
        name = obeyed(parts, codec_of(said), notes)
    else:
        name = found(parts, head, notes, kind)
    if name != 'utf-8':
        notes.facts['encoding'] = name
    return name


def marked(head):
    """The encoding whose byte order mark stands at the beginning; None without one."""
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    return None


def obeyed(parts, name, notes):
    """The encoding that the user says it is. Skip where the bytes do not fit."""
    wrong = count_wrong(parts, name)
    if wrong.share > MOST_WRONG:
        raise Skip(f'not {name}: byte {wrong.first + 1:,} does not fit')
    wrong.say(notes)
    return name


def found(parts, head, notes, kind):
    """The encoding of bytes that nobody has said anything of."""
    control = len(head) - len(head.translate(None, CONTROL))
    if control > 1 + 0.005 * len(head):
        name = guess.wide_encoding(head)
        if name is None:
            raise Skip('binary')
        say_guess(name, [head], notes)
        count_wrong(parts, name).say(notes)
        return name
    is_utf8, has_escapes = look_through(parts())
    name = escaped_encoding(parts) if has_escapes else None
    if name or is_utf8:
        return name or 'utf-8'

    evidence = gather(parts())
    name = declared(head, evidence.tail, kind)
    if name:
        wrong = count_wrong(parts, name)
        if wrong.share <= MOST_WRONG:
            wrong.say(notes)
            return name
        notes.append(f'says that it is {name}, and is not')
    if evidence.bad <= MOST_DAMAGED * evidence.good:
        count_wrong(parts, 'utf-8').say(notes)
        return 'utf-8'
    name = guess.encoding_of_lines(evidence.lines)
    if name is None:
        raise Skip('unknown encoding; if you know it, say it with --encoding=')
    say_guess(name, evidence.lines, notes)
    count_wrong(parts, name).say(notes)
    return name


def say_guess(name, lines, notes):
    """Notes a guess, with what it makes of the first of the lines."""
    text = lines[0][:1000].decode(name, 'ignore').strip()
    at = next((i for i, c in enumerate(text) if not c.isascii()), 0)
    start = max(0, at - SHOWN // 2)
    shown = ''.join(c if c.isprintable() else ' ' for c in text[start:start + SHOWN]).strip()
    notes.append(f'encoding guessed: {name}, as in "{shown}"')


# -----------------------------------------------------------------------------
# Looking through bytes

def look_through(parts):
    """(whether all of it is UTF-8, whether there may be escapes of ISO 2022 or HZ in it)"""
    decoder = codecs.getincrementaldecoder('utf-8')()
    has_escapes = False
    inside = False  # a letter
    try:
        for part in parts:
            has_escapes = has_escapes or b'\x1b$' in part or b'~{' in part
            if inside or not part.isascii():  # which is many times faster to see
                decoder.decode(part)
                inside = decoder.getstate()[0] != b''
        decoder.decode(b'', final=True)
    except UnicodeDecodeError:
        return False, False
    return True, has_escapes


def escaped_encoding(parts):
    """The encoding of 7 bits whose escapes these are; None where they are something else."""
    for name in ESCAPED:
        try:
            decoder = codecs.getincrementaldecoder(name)()
            is_other = any([not decoder.decode(part).isascii() for part in parts()])
            decoder.decode(b'', final=True)
            if is_other:
                return name
        except UnicodeDecodeError:
            continue
    return None


class Evidence(NamedTuple):
    """What gather found in bytes that are not UTF-8."""
    lines: list     # some that are not, from all over the file, GUESS_BYTES or more
    bad: int        # places that are no UTF-8
    good: int       # bytes of letters beyond ASCII that are
    tail: bytes     # the last ones


def gather(parts):
    """The Evidence in bytes: a look at every one, but only C's at most of them."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    lines = []
    size = 0
    step = 1  # one in so many lines is taken
    seen = 0
    bad = 0
    good = 0
    block = b''
    for block in whole_words(parts):
        wrong = decoder.decode(block).count('\ufffd') - block.count(REPLACEMENT)
        bad += wrong
        good += max(0, high_bytes(block) - wrong)
        if not wrong:
            continue
        for line in block.split(b'\n'):
            if line.isascii() or is_valid(line):
                continue
            seen += 1
            if seen % step == 0:
                lines.append(line[:LONGEST_LINE])
                size += len(lines[-1])
                if size > 2 * GUESS_BYTES:
                    lines = lines[::2]
                    size = sum(map(len, lines))
                    step *= 2
    bad += len(decoder.decode(b'', final=True))
    return Evidence(lines, bad, good, block)


def whole_words(parts):
    """The bytes again, in blocks that begin and end where no character of any encoding is cut. Where
    many have neither a blank nor a newline, some are left out.
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


def is_valid(data):
    """Whether it is UTF-8."""
    try:
        data.decode('utf-8')
        return True
    except UnicodeDecodeError:
        return False


def high_bytes(data):
    """How many of them are not ASCII."""
    return len(data.translate(None, ASCII))


class Wrong(NamedTuple):
    """What count_wrong found."""
    name: str
    count: int      # bytes that do not fit the encoding
    size: int       # of all of it
    first: int      # where the first one is, from 0

    @property
    def share(self):
        return self.count / max(1, self.size)

    def say(self, notes):
        """Notes it, if there is something to say."""
        if self.count:
            name = 'UTF-8' if self.name.startswith('utf-8') else self.name
            is_much = self.count >= 10 and self.share > MOST_WRONG
            much = f', one in {1 / self.share:,.0f}' if is_much else ''
            notes.append(f'{self.count:,} bytes were no {name}{much}')


def count_wrong(parts, name):
    """How many of the bytes do not fit an encoding: Wrong."""
    count = 0
    first = None
    size = 0
    base = 0  # where the bytes begin that are being decoded

    def replace(error):
        nonlocal count, first
        count += error.end - error.start
        if first is None:
            first = base + error.start
        return '\ufffd', error.end

    codecs.register_error('mambino.count', replace)
    decoder = codecs.getincrementaldecoder(name)('mambino.count')
    for part in parts():
        base = size - len(decoder.getstate()[0])
        size += len(part)
        decoder.decode(part)
    base = size - len(decoder.getstate()[0])
    decoder.decode(b'', final=True)
    return Wrong(name, count, size, first or 0)


# -----------------------------------------------------------------------------
# The text

def open_text(path, encoding, newline=None):
    """The same as text; what does not fit the encoding becomes U+FFFD."""
    return io.TextIOWrapper(open_bytes(path), encoding, 'replace', newline=newline)


def read_text(path, options, notes):
    """The whole file is one document: yields (text, last), in pieces."""
    max_bytes = options['max_file_mb'] * 1e6
    notes += options.get('said', [])  # what survey.py found out about it
    begin = list(itertools.islice(chunks(path, max_bytes), 2))

    def parts():
        return iter(begin) if len(begin) < 2 else chunks(path, max_bytes)  # a small file is opened once

    encoding = encoding_of_bytes(parts, notes, options.get('encoding', ''))
    decoder = codecs.getincrementaldecoder(encoding)('replace')
    for data in parts():
        yield decoder.decode(data), False
    yield decoder.decode(b'', final=True), True


def read_whole(path, notes, said=''):
    """The clean text of a file, or of standard input for '-'. Skip for what is no text; OSError as
    from open. said: its encoding, where it is known.
    """
    if path == '-':
        data = sys.stdin.buffer.read()
    else:
        with open_bytes(path) as f:
            data = f.read()
    encoding = encoding_of_bytes(lambda: iter([data]), notes, said)
    return clean(data.decode(encoding, 'replace'))


def clean(text):
    """Newlines are \\n, no NUL, no half of a surrogate pair: a text that UTF-8 can hold and gives
    back.
    """
    if '\r' in text:
        text = text.replace('\r\n', '\n').replace('\r', '\n')
    if '\0' in text:
        text = text.replace('\0', '')
    if not text.isascii():
        try:
            text.encode('utf-8')  # much faster than looking for a surrogate
        except UnicodeEncodeError:
            text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
    return text
