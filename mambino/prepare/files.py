"""The bytes of a file, unpacked; and what a reader has to say of it beside its text.

    for data in files.chunks('book.txt.gz'): ...    # bytes, unpacked
    raise Skip('not a PDF')                         # it cannot be used, and why
    notes.lose(3, 'lines were no JSON')             # it can, but for these
"""
import bz2
import gzip
import lzma
import os

CHUNK = 1 << 20   # bytes or characters that a reader takes at once
MOST_LOST = 0.2   # share of a file's rows: where more are lost than that, it is left out


class Skip(Exception):
    """This file cannot be used; the message is the reason, a few words that can be counted."""


class Notes(list):
    """What is worth knowing of a file that is taken: lines; and how much of it was read and how much
    was not, in numbers that the parts of a large file can be summed by.
    """

    def __init__(self):
        super().__init__()
        self.taken = 0  # rows, lines or pages that were read
        self.lost = {}  # what could not be: 'lines were no JSON' -> how many
        self.facts = {}  # what was decided, for the tables: {'format', 'encoding', 'columns', ...} -> str

    def lose(self, n, what):
        """n of them could not be read; `what` reads on from a number: 'lines were no JSON'."""
        if n:
            self.lost[what] = self.lost.get(what, 0) + n


def judge(taken, lost):
    """(why a file is better left out or '', lines for its notes) from its Notes.taken and lost."""
    bad = sum(lost.values())
    lines = [f'{n:,} {what}' for what, n in lost.items()]
    if bad > MOST_LOST * (taken + bad):
        return f'most of it is lost: {", ".join(lines)} of {taken + bad:,}', []
    return '', lines


# -----------------------------------------------------------------------------
# Bytes

def open_zst(path, mode):
    """As gzip.open."""
    import pyarrow
    return pyarrow.CompressedInputStream(open(path, mode), 'zstd')


PACKED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zst}


def extension_of(path):
    """The last extension, in lower case: '.gz' of Notes.TXT.GZ."""
    return os.path.splitext(path)[1].lower()


def open_bytes(path):
    """The file, unpacked if its name says that it is packed."""
    opener = PACKED.get(extension_of(path), open)
    return opener(path, 'rb')


def chunks(path, max_bytes=0):
    """The bytes of a file in chunks of CHUNK. Skip where a packed file holds more than `max_bytes`,
    unless that is 0.
    """
    packed = extension_of(path) in PACKED
    size = 0
    with open_bytes(path) as f:
        while data := f.read(CHUNK):
            size += len(data)
            if packed and max_bytes and size > max_bytes:
                raise Skip(f'larger than {max_bytes / 1e6:g} MB unpacked')
            yield data
