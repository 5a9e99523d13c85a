"""Between files and tokens: documents on disk, and the two tasks that many processes share.

    report = spool.extract(task)        # some sources → their documents, in a pair of files
    result = spool.encode(task)         # a block of documents → token ids

    sources ──► extract ──► <key>.text  blocks of about BLOCK bytes, zstd: documents as UTF-8, in
                                        pieces of at most LONGEST
                            <key>.rows  a ROW for each piece: which document, how long, in which block
                            <key>.json  the report; that it is there means that the task is done
    all rows ──► decide: duplicate, train or val? ──► encode, block by block

Both are functions of their arguments and of what is on disk; a task's result never depends on who
computes it, when, or with what else. A document is cut only where white space begins (or within a
run of LONGEST characters without any), where no tokenizer of GPT-2's kind would join the two sides,
so that its ids are those of the whole.
"""
import contextlib
import hashlib
import json
import os
import struct
import time

import numpy as np
import pyarrow

from mambino import tokenizer_json
from mambino.prepare import account, archive, isolate, screen
from mambino.prepare.files import PACKED, Notes, Skip, extension_of
from mambino.prepare.readers import READERS
from mambino.prepare.sources import Source
from mambino.seams import SEAM
from mambino.tokenizer import from_text

FORMAT = 2         # of a dataset
JOURNAL = 3        # of the reports on the way there
PIECE = 1 << 18    # characters: where the text goes on, a piece ends at the first seam beyond
LONGEST = 1 << 20  # characters: without a seam it ends here
BLOCK = 1 << 21    # bytes of text that are packed, and later encoded, together
JUDGED = 1 << 13   # characters: so much of a source's beginning tells whether it looks odd
SAMPLE = 80        # characters of its text, to be shown
KNOWN = 50_000     # documents of a source, that later ones are compared with
PACKING = 4        # times smaller than its text is a packed file, about
PULSE = 0.5        # seconds after which a task says how far it is
KINDS = [*READERS, *archive.KINDS]  # their order is that of the numbers in `kind`
ENDINGS = ('.text', '.rows', '.json')    # the report last: it says that the others are there
ROW = np.dtype([
    ('hi', '<u8'), ('lo', '<u8'),        # the document's hash
    ('block', '<u4'), ('size', '<u4'),   # of the piece: its block, bytes,
    ('at', '<u4'), ('chars', '<u4'),     # where in the block it begins, characters
    ('part', '<u4'),                     # 0 for the first piece of a document, then 1, 2, ...
    ('last', 'u1'), ('kind', 'u1'),      # the document ends with this piece; index in KINDS
])
DROP, TRAIN, VAL = 0, 1, 2               # what becomes of a row
SIDES = {TRAIN: 'train', VAL: 'val'}


def new_hash(seed, data=b''):
    """The hash of a document, to be updated with its UTF-8: BLAKE2b, keyed with the split seed."""
    return hashlib.blake2b(data, digest_size=16, key=str(seed).encode())


def hash_pair(document_hash):
    """(hi, lo): the 16 bytes of a hash as two integers of 64 bits."""
    return struct.unpack('>QQ', document_hash.digest())


def digest(value):
    """The sha256 of a value that JSON can hold: what the journal tells one run from another by."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------
# Extract

class Spool:
    """Takes documents, piece by piece, and writes the blocks and rows of a task."""

    def __init__(self, path, seed):
        self.file = open(path + '.text', 'wb')
        self.rows_file = open(path + '.rows', 'wb')
        self.new_hash = new_hash(seed).copy
        self.blocks = []   # (offset, packed, unpacked)
        self.rows = []     # tuples in the order of ROW, still to write
        self.waiting = []  # pieces of the block to come
        self.size = 0      # their bytes
        self.codec = pyarrow.Codec('zstd', compression_level=1)
        self.start(0)

    def start(self, kind):
        """A new source begins."""
        self.write_rows()
        self.kind = kind
        self.mark = self.rows_file.tell()
        self.bytes = 0      # of its text
        self.documents = 0
        self.known = set()  # hashes of its documents
        self.copies = 0     # documents that are among the known
        self.head = ''      # the beginning of the source, to judge it by
        self.sample = ''    # that of its first document, to be shown
        self.start_document()

    def forget(self):
        """Takes back what came from this source; its text stays in the blocks, but nothing points
        there.
        """
        self.rows.clear()
        self.rows_file.seek(self.mark)
        self.rows_file.truncate()
        self.documents = 0

    def rows_of_source(self):
        """[begin, end] of its rows in the file."""
        self.write_rows()
        return [self.mark // ROW.itemsize, self.rows_file.tell() // ROW.itemsize]

    def start_document(self):
        self.text = ''     # not yet cut into pieces
        self.pieces = []   # (block, size, at, chars)
        self.blank = True
        self.hash = self.new_hash()

    def add(self, text, last):
        """Takes more of the current document."""
        if len(self.head) < JUDGED:
            self.head += text[:JUDGED - len(self.head)]
            if not self.documents and len(self.sample) < SAMPLE:
                self.sample += text[:SAMPLE - len(self.sample)]
            if last and not self.head.endswith('\n'):
                self.head += '\n'
        self.text += text
        # no more than LONGEST is looked at: what is cut depends on the text, not on how it came
        while len(self.text) > LONGEST:
            seam = SEAM.search(self.text, PIECE, LONGEST)
            self.cut(seam.end() if seam else LONGEST)
        if last:
            self.cut(len(self.text))
            if not self.blank:
                self.end_document()
            elif not self.documents:
                self.sample = ''
            self.start_document()

    def end_document(self):
        """Writes the rows of the current document."""
        self.documents += 1
        pair = hash_pair(self.hash)
        if pair[0] in self.known:
            self.copies += 1
        elif len(self.known) < KNOWN:
            self.known.add(pair[0])
        for part, piece in enumerate(self.pieces):
            is_last = part == len(self.pieces) - 1
            self.rows.append((*pair, *piece, part, is_last, self.kind))
        if len(self.rows) > 50_000:
            self.write_rows()

    def cut(self, n):
        """The next n characters are a piece."""
        piece = self.text[:n]
        self.text = self.text[n:]
        data = piece.encode('utf-8')
        self.blank = self.blank and (not piece or piece.isspace())
        self.hash.update(data)
        self.pieces.append((len(self.blocks), len(data), self.size, len(piece)))
        self.waiting.append(data)
        self.size += len(data)
        self.bytes += len(data)
        if self.size >= BLOCK:
            self.write_block()

    def write_block(self):
        data = b''.join(self.waiting)
        packed = self.codec.compress(data, asbytes=True)
        self.blocks.append((self.file.tell(), len(packed), len(data)))
        self.file.write(packed)
        self.waiting = []
        self.size = 0

    def write_rows(self):
        if not self.rows:
            return
        self.rows_file.write(np.array(self.rows, ROW).tobytes())
        self.rows.clear()

    def close(self):
        """Writes all of it to the disk. Returns the sizes of the two files."""
        self.write_rows()
        if self.waiting:
            self.write_block()
        for f in (self.file, self.rows_file):
            f.flush()
            os.fsync(f.fileno())
            f.close()
        return [os.path.getsize(self.file.name), os.path.getsize(self.rows_file.name)]


def extract(task):
    """Reads the sources of a task and leaves their documents in `folder`. Returns the bytes of the
    sources. task: folder, key, cwd, seed, chars (whether to collect the characters), options (of
    isolate.read); and lists: sources, plans (of survey), parts ([number, of how many] or None), sizes
    (bytes of each source or part).
    """
    path = os.path.join(task['folder'], task['key'])
    work = f'{path}.{os.getpid()}.tmp'
    if os.getcwd() != task['cwd']:
        os.chdir(task['cwd'])  # on another machine of a cluster
    spool = Spool(work, task['seed'])
    pulse = Pulse(work + '.at')
    try:
        report = read_sources(task, spool, pulse)
        with open(work + '.json', 'w', encoding='utf-8') as f:
            json.dump(report, f)
        for ending in ENDINGS:
            os.replace(work + ending, path + ending)
    except BaseException:
        spool.file.close()
        spool.rows_file.close()
        for ending in ENDINGS:
            if os.path.exists(work + ending):
                os.remove(work + ending)
        raise
    finally:
        pulse.end()
    return sum(task['sizes'])


class Pulse:
    """Says in a file how many bytes of a task are done, for the one who waits for it."""

    def __init__(self, path):
        self.path = path
        self.said = time.monotonic()
        self.before = 0  # bytes of the sources that are done

    def beat(self, size, most):
        """size: of what has come of a source, about; most: bytes that the source has."""
        now = time.monotonic()
        if now - self.said > PULSE:
            self.said = now
            with contextlib.suppress(OSError):  # a full disk, say; it is only for show
                with open(self.path, 'w') as f:
                    f.write(str(self.before + min(size, most)))

    def end(self):
        with contextlib.suppress(OSError):  # it was not needed; or is being read, on Windows
            os.remove(self.path)


def unfinished(folder):
    """Bytes of the tasks at work in `folder` that are done, by their pulse."""
    total = 0
    for name in os.listdir(folder):
        if name.endswith('.tmp.at'):
            with contextlib.suppress(OSError, ValueError):  # it has ended
                with open(os.path.join(folder, name)) as f:
                    total += int(f.read())
    return total


def read_sources(task, spool, pulse):
    """Writes the documents of a task to the spool, closes it, and returns the report."""
    report = account.new_report() | {'parts': [], 'again': False}
    units = zip(map(Source._make, task['sources']), task['plans'], task['parts'], task['sizes'])
    for source, plan, part, size in units:
        entry, again = read_source(task, source, plan, part, size, spool, pulse)
        report['again'] |= again
        if part:
            report['parts'].append(entry)
        else:
            entry = account.whole([entry])
            account.book(report, entry)
            if entry['skip']:
                spool.forget()
        pulse.before += size
    sizes = spool.close()
    return report | {'blocks': spool.blocks, 'sizes': sizes, 'chars': ''.join(sorted(report['chars']))}


def read_source(task, source, plan, part, size, spool, pulse):
    """Writes the documents of one source, or of one part of it, to the spool. (its entry for
    account.py, whether the disk was at fault, so that it may be better next time)
    """
    spool.start(KINDS.index(source.kind))
    notes = Notes()
    options = task['options'] | plan
    view = None
    packing = PACKING if extension_of(source.path) in PACKED else 1
    chars = set()
    reason = ''
    again = False
    try:
        source = isolate.look(source, notes)
        spool.kind = KINDS.index(source.kind)
        view = screen.Screen(source, options.get('document_separator', ''))
        for text, last in view.passed(archive.read(source, options, notes)):
            spool.add(text, last)
            pulse.beat(spool.bytes // packing, size)
            if task['chars']:
                chars.update(text)
        view.judge(spool.head, notes, is_beginning=not part or part[0] == 0)
    except Skip as skip:
        spool.forget()
        chars.clear()
        reason = str(skip)
        again = bool(getattr(skip.__context__, 'errno', None))
    score, why = screen.suspicion(spool.head)
    entry = {
        'file': source.path, 'kind': source.kind, 'part': part, 'rows': spool.rows_of_source() if part else None,
        'documents': spool.documents, 'copies': spool.copies, 'separators': view.separators() if view else 0,
        'taken': notes.taken, 'lost': notes.lost, 'facts': notes.facts, 'notes': list(notes),
        'skip': reason, 'suspect': [round(score, 3), why], 'sample': spool.sample,
        'chars': ''.join(sorted(chars)),
    }
    return entry, again


def report_of(folder, key):
    """The report of a task that is done; None if it is not, or not wholly on the disk (a power
    cut).
    """
    path = os.path.join(folder, key)
    try:
        with open(path + '.json', encoding='utf-8') as f:
            report = json.load(f)
        sizes = [os.path.getsize(path + '.text'), os.path.getsize(path + '.rows')]
        return report if report['sizes'] == sizes else None
    except (OSError, ValueError):
        return None


# -----------------------------------------------------------------------------
# Encode

def read_block(folder, key, block):
    """The bytes of a block: (offset, packed, unpacked) in <key>.text."""
    offset, packed, unpacked = block
    with open(os.path.join(folder, key + '.text'), 'rb') as f:
        f.seek(offset)
        return pyarrow.Codec('zstd').decompress(f.read(packed), unpacked, asbytes=True)


def pieces_of(data, rows):
    """Yields the text of each of the rows, all of one block."""
    for at, size in zip(rows['at'].tolist(), rows['size'].tolist()):
        yield data[at:at + size].decode('utf-8')


class Side:
    """What one of train and val gets from a block."""

    def __init__(self):
        self.arrays = [np.zeros(0, np.int32)]  # of ids
        self.tokens = 0
        self.bytes = 0
        self.offsets = []  # where documents end among the ids
        self.rows = []     # the rows with which they end

    def result(self, rows):
        """(ids int32, offsets uint64: where documents end among them, their hashes (n, 2))"""
        hashes = np.stack([rows['hi'][self.rows], rows['lo'][self.rows]], 1)
        return np.concatenate(self.arrays).astype('<i4'), np.array(self.offsets, '<u8'), hashes


_tokenizers = {}  # what a task says of it → Tokenizer


def encode(task):
    """The ids of a block. task: folder, key, block; rows: those that are used, and `use`, TRAIN or
    VAL for each; tokenizer: (path, sha256, eot, bos); opening, closing: lists of ids before and after each
    document; cut: None or (number of a row, characters): where val begins. Returns {TRAIN: Side.result(), VAL:
    Side.result(), 'kinds': tokens by kind, 'bytes': by side}.
    """
    known_by = task['tokenizer']
    if known_by not in _tokenizers:
        path, _, eot, bos = known_by
        text, spec = tokenizer_json.read(path)
        _tokenizers[known_by] = from_text(text, eot, bos, spec)
    tok = _tokenizers[known_by]
    opening = np.array(task['opening'], np.int32)
    closing = np.array(task['closing'], np.int32)
    rows = task['rows']
    row_kinds = rows['kind'].tolist()
    cut_row, cut_chars = task['cut'] or (-1, 0)
    sides = {TRAIN: Side(), VAL: Side()}
    kinds = np.zeros(len(KINDS), np.int64)

    def add(side, i, text, first, last):
        ids = tok.encode(text, begins=first)
        if first and len(opening):
            ids = np.concatenate([opening, ids])
        if last:
            ids = np.concatenate([ids, closing])
            side.offsets.append(side.tokens + len(ids))
            side.rows.append(i)
        side.arrays.append(ids)
        side.tokens += len(ids)
        side.bytes += len(text.encode('utf-8'))
        kinds[row_kinds[i]] += len(ids)

    data = read_block(task['folder'], task['key'], task['block'])
    firsts = (rows['part'] == 0).tolist()
    pieces = zip(pieces_of(data, rows), task['use'].tolist(), firsts, rows['last'].tolist())
    for i, (text, use, first, last) in enumerate(pieces):
        if i == cut_row:
            add(sides[TRAIN], i, text[:cut_chars], first, True)
            add(sides[VAL], i, text[cut_chars:], True, last)    # a half begins as a text of its own does
        else:
            add(sides[use], i, text, first, last)
    results = {name: side.result(rows) for name, side in sides.items()}
    return results | {'kinds': kinds, 'bytes': {name: side.bytes for name, side in sides.items()}}
