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
                ├► UTF-8 with damage, which is counted, or with other lines     mixed.py
                └► a guess, which is shown                guess.py
"""
import codecs
import io
import itertools
import sys

from mambino.prepare.files import Skip, chunks, open_bytes
from mambino.prepare.texts import guess, mixed
from mambino.prepare.texts.declared import codec_of, declared, is_ascii_like
from mambino.prepare.texts.evidence import count_wrong, cut_off, encoded_twice, escaped_encoding, gather, look_through

MARKS = {
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF32_LE: 'utf-32',  # begins like the one of UTF-16, so it comes first
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}
CONTROL = bytes(b for b in range(32) if b not in b'\t\n\f\r\b\x01\x1b\x1e\x1f')
MOST_CONTROL = 0.005    # share of them in a text
MOST_WRONG = 0.001      # of the bytes that need not fit an encoding that was said or declared
MOST_DAMAGED = 0.05     # of the bytes beyond ASCII that need not fit UTF-8
FEW_LETTERS = 6         # bytes beyond ASCII that are no UTF-8 by chance only
FEW_TWICE = 3           # letters that look like UTF-8 encoded twice may be on purpose
MUCH_WORSE = 1.4        # times the bits of another encoding: a declared one is wrong
COMPARED = 100          # lines
CONTEXT = 1 << 13       # bytes at the beginning that help to tell the language
SHOWN = 48              # characters of a line that are shown with a guess
WIDE = ('utf-16', 'utf_16', 'utf-32', 'utf_32', 'iso2022', 'hz')  # line ends are not one byte there
TABLES = ('jsonl', 'json', 'csv')  # of these, rows before a damaged place can be read


# -----------------------------------------------------------------------------
# The encoding

def encoding_of(path, notes, options=None, kind='text', max_bytes=0):
    """The encoding of a text, a name for open_text. options['encoding'], if there, is obeyed. What
    is not plain UTF-8 is put down as notes.facts['encoding'], and what was guessed or does not fit
    in notes. kind: of readers.READERS; max_bytes: of a packed file. Skip('binary') for no text.
    """
    def parts():
        try:
            yield from chunks(path, max_bytes)
        except Exception:
            if kind not in TABLES:
                raise

    return encoding_of_bytes(parts, notes, (options or {}).get('encoding', ''), kind)


def encoding_of_bytes(parts, notes, said='', kind='text'):
    """The same for bytes: `parts` is a function that yields them, from the beginning each time.
    said: the encoding they are in, as the user says.
    """
    head = next(parts(), b'')
    name = marked(head)
    if name:
        name = trusted(parts, name, head, notes)
    elif said:
        name = obeyed(parts, codec_of(said), head, notes)
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


def trusted(parts, name, head, notes):
    """The encoding of bytes that begin with its mark. What is no UTF-8 there may be lines that a
    program has appended.
    """
    wrong = count_wrong(parts, name)
    if name == 'utf-8-sig' and wrong.share > MOST_WRONG:
        evidence = gather(parts())
        best = guess.of_lines(evidence.lines, head[:CONTEXT])
        if best and best.is_sure:
            name = mixed.name_of(best.name)
            say_guess(best.name, evidence.lines, notes, f'{evidence.bad_lines:,} lines were no UTF-8: ')
            wrong = count_wrong(parts, name)
    wrong.say(notes)
    return name


def obeyed(parts, name, head, notes):
    """The encoding that the user says it is. Skip where the bytes do not fit."""
    if name in ('utf-16', 'utf-32'):  # without a mark
        best = guess.of_wide(head)
        name = best.name if best and best.name.startswith(name) else f'{name}-le'
    wrong = count_wrong(parts, name)
    if wrong.share > MOST_WRONG:
        raise Skip(f'not {name}: byte {wrong.first + 1:,} does not fit')
    if name != 'utf-8' and b'\0' not in head and look_through(parts())[0]:
        if not is_ascii_like(name) or not all(part.isascii() for part in parts()):
            notes.append(f'taken as {name}, as --encoding says; it is UTF-8 as well')
    wrong.say(notes)
    return name


def found(parts, head, notes, kind):
    """The encoding of bytes that nobody has said anything of."""
    control = len(head) - len(head.translate(None, CONTROL))
    if control > 1 + MOST_CONTROL * len(head) and b'\x1b$' not in head:
        best = guess.of_wide(head)
        if best is None:
            raise Skip('binary')
        name = best.name
        say_guess(name, [head], notes)
        count_wrong(parts, name).say(notes)
        return name
    is_utf8, has_escapes = look_through(parts())
    name = escaped_encoding(parts) if has_escapes else None
    if is_utf8 and encoded_twice(head) >= FEW_TWICE:
        notes.append('letters were encoded twice, as Ã© for é; that is left as it is')
    if name or is_utf8:
        return name or 'utf-8'
    evidence = gather(parts())
    return (declared_encoding(parts, head, evidence, notes, kind)
            or damaged_utf8(parts, head, evidence, notes)
            or guessed(parts, head, evidence, notes))


def declared_encoding(parts, head, evidence, notes, kind):
    """The encoding that a text says it is in; None where it says none, or one that does not fit."""
    name = declared(head, evidence.tail, kind)
    if name is None:
        return None
    wrong = count_wrong(parts, name)
    if wrong.share > MOST_WRONG or not reads_like(name, evidence.lines, head):
        notes.append(f'says that it is {name}, and is not')
        return None
    wrong.say(notes)
    return name


def reads_like(name, lines, head):
    """Whether lines are a language in this encoding, compared with the likeliest one."""
    best = guess.of_lines(lines, head[:CONTEXT])
    if best is None or not best.is_sure or not lines:
        return True
    some = lines[:COMPARED]
    return guess.bits_of(name, some) <= MUCH_WORSE * guess.bits_of(best.name, some)


def damaged_utf8(parts, head, evidence, notes):
    """The encoding of bytes of which the most are UTF-8; None where they are not. What is not may
    be lines of another encoding, or damage.
    """
    if evidence.good >= FEW_LETTERS and evidence.bad <= cut_off(head, evidence.tail):
        count_wrong(parts, 'utf-8').say(notes)
        return 'utf-8'
    others = [line for line in evidence.lines if mixed.is_of_other(line)]
    best = guess.of_lines(others, head[:CONTEXT]) if others and evidence.valid_lines else None
    if best and best.is_sure and guess.is_likelier_utf8(evidence.valid_lines, best.name):
        name = mixed.name_of(best.name)
        say_guess(best.name, others, notes, f'{evidence.bad_lines:,} lines were no UTF-8: ')
    elif evidence.bad <= MOST_DAMAGED * evidence.good:
        name = 'utf-8'
    else:
        return None
    count_wrong(parts, name).say(notes)
    return name


def guessed(parts, head, evidence, notes):
    """The encoding of bytes that say nothing of it."""
    if is_ebcdic(head):
        raise Skip('EBCDIC; say which, as in --encoding=cp037')
    best = guess.of_wide(head)
    best = best or guess.of_lines(evidence.lines + evidence.valid_lines, head[:CONTEXT])
    if evidence.bad <= MOST_WRONG * evidence.size and not (best and best.is_sure):
        count_wrong(parts, 'utf-8').say(notes)  # a stray byte is no language
        return 'utf-8'
    if best is None:
        raise Skip('unknown encoding; if you know it, say it with --encoding=')
    name = best.name
    say_guess(name, evidence.lines or [head], notes)
    count_wrong(parts, name).say(notes)
    return name


def is_wide(encoding):
    """Whether a line does not end with the one byte that ends it in ASCII."""
    return encoding.lower().startswith(WIDE)


def say_guess(name, lines, notes, what=''):
    """Notes a guess of `what`, with what it makes of the first of the lines."""
    text = lines[0].decode(name, 'ignore').strip()
    at = next((i for i, c in enumerate(text) if not c.isascii()), 0)
    start = max(0, at - SHOWN // 2)
    shown = ''.join(c if c.isprintable() else ' ' for c in text[start:start + SHOWN]).strip()
    notes.append(f'{what}encoding guessed: {name}, as in "{shown}"')


def is_ebcdic(head):
    """Whether the blanks are those of IBM's mainframes; the second byte of a wide blank, or of ァ, is none."""
    blanks = head.count(b'@') - sum(map(head.count, (b'\x81@', b'\x83@', b'\xa1@')))
    return blanks > 0.08 * len(head) and head.count(b' ') < 0.01 * len(head)


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
    return clean(decoded(data, notes, said))


def decoded(data, notes, said='', kind='text'):
    """The text in bytes that are in memory; said, kind, notes: of encoding_of_bytes."""
    encoding = encoding_of_bytes(lambda: iter([data]), notes, said, kind)
    return data.decode(encoding, 'replace')


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
