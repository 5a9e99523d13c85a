"""UTF-8 in which some lines are in an older encoding, as logs and mailboxes are: a codec for that.

    b'caf\\xc3\\xa9\\ncaf\\xe9\\n'.decode(mixed.name_of('cp1252'))    # 'café\\ncafé\\n'

It is known to Python as soon as this module is imported. What is no UTF-8 and has no letters of UTF-8
either is of the other encoding, line by line.
"""
import codecs
import functools

PREFIX = 'utf-8+'
LONGEST = 1 << 20  # bytes: a line that is longer is cut at a blank


def name_of(other):
    """The name of the encoding: UTF-8, but for lines in `other`."""
    return PREFIX + other


def is_of_other(line):
    """Whether a line, bytes, is not UTF-8, not even damaged UTF-8."""
    try:
        line.decode('utf-8')
        return False
    except UnicodeDecodeError:
        text = line.decode('utf-8', 'replace')
        wrong = text.count('\ufffd')
        return sum(not c.isascii() for c in text) < 2 * wrong


def decode(data, errors='strict', other=''):
    """(text, how many bytes it was made of), as the codecs of Python are."""
    data = bytes(data)
    try:
        return data.decode('utf-8'), len(data)
    except UnicodeDecodeError:
        lines = [line.removeprefix(codecs.BOM_UTF8) for line in data.split(b'\n')]
        texts = [line.decode(other if is_of_other(line) else 'utf-8', errors) for line in lines]
        return '\n'.join(texts), len(data)


class IncrementalDecoder(codecs.BufferedIncrementalDecoder):
    """Decodes whole lines."""
    other = ''

    def _buffer_decode(self, data, errors, final):
        end = len(data) if final else data.rfind(b'\n') + 1
        if not end and len(data) > LONGEST:
            end = data.rfind(b' ') + 1 or len(data)
        return decode(data[:end], errors, self.other)


@functools.cache
def find(name):
    """The codec of a name, in which Python has made _ of other signs; None where it is none of these."""
    if not name.startswith('utf_8_'):
        return None
    try:
        other = codecs.lookup(name.removeprefix('utf_8_')).name
    except LookupError:
        return None
    decoder = type('Decoder', (IncrementalDecoder,), {'other': other})
    decode_other = functools.partial(decode, other=other)
    return codecs.CodecInfo(codecs.utf_8_encode, decode_other, incrementaldecoder=decoder, name=name)


codecs.register(find)
