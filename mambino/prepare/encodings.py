"""What the bytes of a file say: their encoding, guessed where need be, and the text cleaned.

    encoding = encodings.encoding_of('old.txt', notes)      # 'utf-8-sig', 'cp1252', ...

    bytes ──► encoding_of ──► text ──► clean
                └► what is no text: Skip('binary')
"""
import codecs
import io
import itertools
import re

from mambino.prepare.files import Skip, chunks, open_bytes

SAMPLE_CHUNKS = 16     # so many tell the encoding of a table
GUESS_BYTES = 1 << 16  # so many of the doubtful ones tell an old encoding

MARKS = {
    codecs.BOM_UTF32_LE: 'utf-32',  # begins like the one of UTF-16, so it comes first
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}
CONTROL = bytes(b for b in range(32) if b not in b'\t\n\f\r\b\x1b')
HIGH = bytes(range(128, 256))
# what cp1252 has for Western Europe; other languages' bytes, read as cp1252, also hit superscripts,
# eth and thorn
WESTERN = ('€‚„…‘’“”•–—™œŒ¡£§©«®°´·»¿\xa0'
           'àáâãäåæçèéêëìíîïñòóôõöøùúûüÿßÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜ').encode('cp1252')


# -----------------------------------------------------------------------------
# Encodings

def encoding_of(path, notes, sample=False, max_bytes=0):
    """The encoding of a text. UTF-8 where that fits, or where all but a few bytes do; byte order
    marks; UTF-16 by its zeros; else a guess, which goes to notes. Skip('binary') for no text.
    sample: only the first SAMPLE_CHUNKS are looked at, as is enough for a table, whose rows are
    read as far as they go.
    """
    def parts():
        try:
            if sample:
                yield from itertools.islice(chunks(path), SAMPLE_CHUNKS)
            else:
                yield from chunks(path, max_bytes)
        except Exception:  # of a table, the rows before that place can be read
            if not sample:
                raise

    head = next(parts(), b'')
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    control = len(head) - len(head.translate(None, CONTROL))
    if control > 1 + 0.005 * len(head):
        encoding = guess_utf16(head[:GUESS_BYTES])
        if encoding is None:
            raise Skip('binary')
        notes.append('encoding guessed: ' + encoding)
        return encoding
    if is_utf8(parts(), complete=not sample):
        return 'utf-8-sig'

    bad, good, doubtful = count_utf8(parts(), complete=not sample)
    if bad <= 0.05 * good:
        notes.append(f'{bad:,} bytes were no UTF-8')
        return 'utf-8-sig'
    encoding = guess_encoding(b'\n'.join(doubtful)[:GUESS_BYTES] or head[-1000:])
    if encoding is None:
        raise Skip('unknown encoding')
    notes.append(f'encoding guessed: {encoding}')
    return encoding


def open_text(path, encoding, newline=None):
    """The same as text; what does not fit the encoding becomes U+FFFD."""
    return io.TextIOWrapper(open_bytes(path), encoding, 'replace', newline=newline)


def is_utf8(parts, complete):
    """Whether all the bytes are UTF-8. complete: no letter may be cut at their end."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    try:
        for part in parts:
            decoder.decode(part)
        decoder.decode(b'', final=complete)
        return True
    except UnicodeDecodeError:
        return False


def count_utf8(parts, complete):
    """(bytes that are no UTF-8, bytes of letters beyond ASCII that are, some lines near the former)
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    bad = 0
    good = 0
    doubtful = []
    for part in parts:
        written = part.count('\ufffd'.encode())  # on purpose
        wrong = max(0, decoder.decode(part).count('\ufffd') - written)
        high = len(part) - len(part.translate(None, HIGH))
        bad += wrong
        good += high - wrong
        if wrong and len(doubtful) < 1000:
            doubtful += re.findall(rb'[^\n]{0,400}[\x80-\xff][^\n]{0,400}', part)[:1000]
    bad += len(decoder.decode(b'', final=complete))
    return bad, good, doubtful


def guess_utf16(sample):
    """utf-16-le, utf-16-be or None: the zeros of ASCII letters, or only of spaces, lie on one side.
    """
    even = sample[::2].count(0)
    odd = sample[1::2].count(0)
    if min(even, odd) > 0.05 * max(even, odd) or even == odd:
        return None
    encoding = 'utf-16-le' if odd > even else 'utf-16-be'
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    readable = sum(c.isspace() or c.isprintable() for c in text)
    return encoding if text and readable > 0.97 * len(text) else None


def guess_encoding(sample):
    """The likely encoding of lines that are not UTF-8, or None. cp1252 where it reads as Western
    European.
    """
    high_runs = re.findall(rb'[\x80-\xff]+', sample)
    high = sum(map(len, high_runs))
    # Western accents stand alone; Cyrillic or Greek does not
    in_words = sum(len(letters) for letters in high_runs if len(letters) >= 3)
    strange = len(b''.join(high_runs).translate(None, WESTERN))
    if high <= 2 + 0.3 * len(sample) and in_words <= 0.1 * high and strange <= 0.03 * high:
        return 'cp1252'
    try:
        from charset_normalizer import from_bytes  # comes with tiktoken, which asks for requests
    except ImportError:
        return None
    best = from_bytes(sample).best()
    return best.encoding if best else None


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


# -----------------------------------------------------------------------------
# The reader that needs no more than this

def read_text(path, options, notes):
    """The whole file is one document: yields (text, last), in pieces."""
    max_bytes = options['max_file_mb'] * 1e6
    encoding = encoding_of(path, notes, max_bytes=max_bytes)
    decoder = codecs.getincrementaldecoder(encoding)('replace')
    for data in chunks(path, max_bytes):
        yield decoder.decode(data), False
    yield decoder.decode(b'', final=True), True
