"""The bytes of a file, unpacked; and what a reader has to say of it beside its text.

    for data in files.chunks('book.txt.gz'): ...    # bytes, unpacked
    raise Skip('not a PDF')                         # it cannot be used, and why
    notes.lose(3, 'lines were no JSON')             # it can, but for these
"""
import bz2
import gzip
import io
import lzma
import os

CHUNK = 1 << 20   # bytes or characters that a reader takes at once
TIMES = 200            # its size a packed file may hold, where --unpack_ratio says no other number: logs have 100
SMALL = 100_000_000    # bytes: but this much is nothing to fear
NO_MEMORY = 'needs too much memory: more than --file_memory_mb'
MOST_LOST = 0.2   # share of a file's rows: where more are lost than that, it is left out


class Skip(Exception):
    """This file cannot be used; the message is the reason, a few words that can be counted."""


class Bomb(Skip):
    """It unpacks to far more than anybody's files do; what came out of it so far is left out as well."""


class Notes(list):
    """What is worth knowing of a file that is taken: lines; and how much of it was read and how
    much was not, in numbers that the parts of a large file can be summed by.
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
    """(why a file is better left out or '', lines for its notes) from its Notes.taken and lost. Of
    parts that lost the same, '... (first: line 7)' and '... (first: line 90)', the first one
    counts.
    """
    bad = sum(lost.values())
    same = {}
    for what, n in lost.items():
        key = what.partition(' (first: ')[0]
        same.setdefault(key, [what, 0])[1] += n
    lines = [f'{n:,} {what}' for what, n in same.values()]
    if bad > MOST_LOST * (taken + bad):
        share = 'most' if bad > taken else 'too much'
        return f'{share} of it is lost: {", ".join(lines)} of {taken + bad:,}', []
    return '', lines


# -----------------------------------------------------------------------------
# Bytes

_times = TIMES  # for what this process unpacks


def allow(times):
    """From now on, a packed file may hold so many times its size."""
    global _times
    _times = times


def most_unpacked(size):
    """Bytes that a packed file of this size may hold."""
    return max(SMALL, int(_times * size))


def bomb_of(size):
    """The reason why a file of this size is read no further."""
    most = most_unpacked(size)
    return Bomb(f'unpacks to more than {most / 1e6:,.0f} MB, {most // max(1, size):,} times its size: '
                'if it is no bomb, raise --unpack_ratio')


class Limited(io.RawIOBase):
    """The bytes of an open file that is being unpacked: Bomb where they are more than a file of so
    many bytes may hold.
    """

    def __init__(self, f, size):
        super().__init__()
        self.f = f
        self.size = size
        self.left = most_unpacked(size)

    def readable(self):
        return True

    def seekable(self):
        return self.f.seekable()

    def readinto(self, buffer):
        data = self.f.read1(len(buffer))  # what can be had at once: of a damaged file what is before that place
        self.left -= len(data)
        if self.left < 0:
            raise bomb_of(self.size)
        buffer[:len(data)] = data
        return len(data)

    def seek(self, *place):
        return self.f.seek(*place)

    def tell(self):
        return self.f.tell()

    def close(self):
        self.f.close()
        super().close()


# how a packed file begins, and by whom it is unpacked; a key of PACKED, or whose it is
SIGNATURES = [
    (b'\x1f\x8b', '.gz'),
    (b'\xfd7zXZ\0', '.xz'),
    (b'\x28\xb5\x2f\xfd', '.zst'),
    (b'\x04\x22\x4d\x18', 'lz4'),
    (b'\x02\x21\x4c\x18', 'lz4'),
    (b'\x1f\x9d', 'compress (.Z)'),
    (b'LZIP', 'lzip'),
    (b'\x89LZO\0', 'lzop'),
    (b'\xff\x06\0\0sNaPpY', 'snappy'),
]
ANY_SIGNATURE = tuple(signature for signature, _ in SIGNATURES)
SKIPPABLE = b'\x2a\x4d\x18'  # of a frame of zstd that holds no text, behind a byte 0x50 to 0x5f
BUFFER = 1 << 14  # bytes that are unpacked together: of a damaged file a small buffer loses little
WIDEST = 27  # a window of 2 ** 27 bytes is what zstd itself allows without being asked


def open_zst(path, mode):
    """As gzip.open. Skip where its window is wider than what can be read without another package."""
    window = window_of(path)
    if window <= 1 << WIDEST:
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(open(path, mode), 'zstd'), BUFFER)
    try:
        from compression import zstd  # of Python 3.14
        return zstd.ZstdFile(path, options={zstd.DecompressionParameter.window_log_max: 31})
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise Skip(f'zstd window of {window / 2 ** 20:,.0f} MB: unpack it with zstd -d --long=31, '
                   'or pip install zstandard') from None
    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return io.BufferedReader(Frames(open(path, mode), frames.decompressobj), CHUNK)


class Frames(io.RawIOBase):
    """The bytes in the frames of a zstd file, one after the other. EOFError where it ends within one.
    """

    def __init__(self, f, new_frame):
        super().__init__()
        self.f = f
        self.new_frame = new_frame
        self.frame = None   # the one that is being unpacked
        self.packed = b''
        self.waiting = b''  # unpacked, and not yet taken

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.waiting:
            if not self.packed:
                self.packed = self.f.read(1 << 12)  # it may unpack to ten thousand times as much
            if not self.packed:
                if self.frame is not None:
                    raise EOFError('truncated')
                return 0
            self.frame = self.frame or self.new_frame()
            self.waiting = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.waiting))
        buffer[:n] = self.waiting[:n]
        self.waiting = self.waiting[n:]
        return n

    def close(self):
        self.f.close()
        super().close()


def window_of(path):
    """Bytes of the window of the first frame of a zstd file."""
    with open(path, 'rb') as f:
        while (head := f.read(8))[1:4] == SKIPPABLE:
            f.seek(int.from_bytes(head[4:8], 'little'), os.SEEK_CUR)
    if len(head) > 4 and head[4] & 3:
        raise Skip('packed by zstd with a dictionary: unpack it first')
    if len(head) < 6 or head[4] & 0x20:  # one segment: the window is its size
        return 0
    base = 1 << (10 + (head[5] >> 3))
    return base + base // 8 * (head[5] & 7)


PACKED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zst}


def extension_of(path):
    """The last extension, in lower case: '.gz' of Notes.TXT.GZ."""
    return os.path.splitext(path)[1].lower()


def packing_of(path):
    """How a file is packed, by its first bytes: a key of PACKED; '' where it is not. Skip where
    nobody unpacks that here.
    """
    with open(path, 'rb') as f:
        return packing_in(f.read(10), path)


def is_packed(path):
    """Whether the bytes on disk are not those of the content."""
    return packing_of(path) != ''


def packing_in(head, path):
    """The same, of the first 10 bytes."""
    if head[1:4] == SKIPPABLE and head[0] >> 4 == 5:
        return '.zst'
    if head.startswith(b'BZh') and head[4:] in (b'1AY&SY', b'\x17\x72\x45\x38\x50\x90'):
        return '.bz2'
    if head.startswith(b']\0\0') and extension_of(path) == '.lzma':
        return '.xz'
    if head.startswith(ANY_SIGNATURE):
        name = next(name for signature, name in SIGNATURES if head.startswith(signature))
        if name in PACKED:
            return name
        raise Skip(f'packed with {name}: unpack it first')
    if os.fspath(path)[-3:].lower() == '.br' and not (head.isascii() and head.decode().isprintable()):
        raise Skip('packed with brotli: unpack it first')
    return ''


def open_bytes(path):
    """The file, unpacked if it is packed, whatever it is called."""
    f = open(path, 'rb')
    try:
        packing = packing_in(f.peek(10)[:10], path)
    except BaseException:
        f.close()
        raise
    if packing:
        size = os.fstat(f.fileno()).st_size
        f.close()
        return io.BufferedReader(Limited(PACKED[packing](path, 'rb'), size), BUFFER)
    return f


def first_bytes(path, n):
    """The first n bytes of a file, unpacked; of one that is damaged there, those before that place."""
    with open(path, 'rb', buffering=0) as f:  # as a rule it is not packed, and this is sooner
        head = f.read(max(n, 10))
    if not packing_in(head[:10], path):
        return head[:n]
    pieces = []
    with open_bytes(path) as f:
        try:
            while n > 0 and (data := f.read1(n)):
                pieces.append(data)
                n -= len(data)
        except Exception:
            if not pieces:
                raise
    return b''.join(pieces)


def chunks(path, max_bytes=0):
    """The bytes of a file in chunks of CHUNK. Skip where a packed file holds more than `max_bytes`,
    unless that is 0.
    """
    size = 0
    with open_bytes(path) as f:
        while data := f.read(CHUNK):
            size += len(data)
            if max_bytes and size > max_bytes and packing_of(path):
                raise Skip(f'larger than {max_bytes / 1e6:g} MB unpacked')
            yield data
