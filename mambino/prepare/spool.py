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
import hashlib
import json
import os
import string
import struct
import zlib

import numpy as np
import pyarrow

from mambino.prepare import isolate
from mambino.prepare.files import Notes, Skip, judge
from mambino.prepare.readers import READERS
from mambino.prepare.sources import Source
from mambino.tokenizer import SEAM, load_tokenizer

FORMAT = 2         # of a dataset, and of the journal on the way there
PIECE = 1 << 18    # characters: where the text goes on, a piece ends at the first seam beyond
LONGEST = 1 << 20  # characters: without a seam it ends here
BLOCK = 1 << 21    # bytes of text that are packed, and later encoded, together
JUDGED = 1 << 13   # characters: so much of a source's beginning tells whether it looks odd
LETTERS = string.ascii_letters.encode() + bytes(range(128, 256))
KINDS = list(READERS)  # their order is that of the numbers in `kind`
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
        self.seed = seed
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
        self.documents = 0
        self.head = ''  # the beginning of the source, to judge it by
        self.start_document()

    def forget(self):
        """Takes back what came from this source; its text stays in the blocks, but nothing points
        there.
        """
        self.rows.clear()
        self.rows_file.seek(self.mark)
        self.rows_file.truncate()
        self.documents = 0

    def start_document(self):
        self.text = ''     # not yet cut into pieces
        self.pieces = []   # (block, size, at, chars)
        self.blank = True
        self.hash = new_hash(self.seed)

    def add(self, text, last):
        """Takes more of the current document."""
        if len(self.head) < JUDGED:
            self.head += text[:JUDGED - len(self.head)]
        self.text += text
        # no more than LONGEST is looked at: what is cut depends on the text, not on how it came
        while len(self.text) > LONGEST:
            seam = SEAM.search(self.text, PIECE, LONGEST)
            self.cut(seam.end() if seam else LONGEST)
        if last:
            self.cut(len(self.text))
            if not self.blank:
                self.end_document()
            self.start_document()

    def end_document(self):
        """Writes the rows of the current document."""
        self.documents += 1
        pair = hash_pair(self.hash)
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
        self.blank = self.blank and not piece.strip()
        self.hash.update(data)
        self.pieces.append((len(self.blocks), len(data), self.size, len(piece)))
        self.waiting.append(data)
        self.size += len(data)
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
    sources. task: folder, key, cwd, sources, plans (of survey, one a source), seed, chars (whether to
    collect the characters), options (of isolate.read).
    """
    path = os.path.join(task['folder'], task['key'])
    work = f'{path}.{os.getpid()}.tmp'
    if os.getcwd() != task['cwd']:
        os.chdir(task['cwd'])  # on another machine of a cluster
    spool = Spool(work, task['seed'])
    try:
        report = read_sources(task, spool)
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
    return sum(Source(*source).size for source in task['sources'])


def read_sources(task, spool):
    """Writes the documents of a task to the spool, closes it, and returns the report."""
    report = {'files': {}, 'skipped': [], 'notes': [], 'suspects': [], 'again': False}
    chars = set()
    for source, plan in zip(map(Source._make, task['sources']), task['plans']):
        spool.start(KINDS.index(source.kind))
        notes = Notes()
        source_chars = set()
        try:
            for text, last in isolate.read(source, task['options'] | plan, notes):
                spool.add(text, last)
                if task['chars']:
                    source_chars.update(text)
            if not spool.documents:
                raise Skip('empty')
            reason, lines = judge(notes.taken, notes.lost)
            if reason:
                raise Skip(reason)
        except Skip as reason:
            spool.forget()
            report['skipped'].append({'file': source.path, 'reason': str(reason)})
            if getattr(reason.__context__, 'errno', None):
                report['again'] = True  # the disk's fault: it may be better next time
            continue
        chars |= source_chars
        report['files'][source.kind] = report['files'].get(source.kind, 0) + 1
        report['notes'] += [{'file': source.path, 'note': note} for note in [*notes, *lines]]
        score, why = suspicion(spool.head)
        if why:
            report['suspects'].append([round(score, 3), source.path, why])
    sizes = spool.close()
    report.update(blocks=spool.blocks, chars=''.join(sorted(chars)), sizes=sizes)
    report['suspects'] = worst(report['suspects'])
    return report


def worst(suspects, most=10):
    """The most suspicious of [score, path, why], in an order of their own."""
    return sorted(suspects, key=lambda suspect: (-suspect[0], suspect[1]))[:most]


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


def suspicion(head):
    """(score, why) a source may be no text worth learning, judged by its beginning; why is '' where
    nothing is odd.
    """
    if len(head) < 200:
        return 0, ''
    data = head.encode('utf-8')
    chars_a_line = len(head) / (head.count('\n') + 1)
    packed = len(zlib.compress(data, 1)) / len(data)
    broken = head.count('\ufffd') / len(head)
    letters = 1 - len(data.translate(None, LETTERS)) / len(data)
    spaces = 1 - len(data.translate(None, b' \t\n')) / len(data)
    reasons = []
    if broken > 0.001:
        reasons.append((20 * broken, f'{100 * broken:.1f}% of it are replacement characters'))
    if packed > 0.7 and len(data) > 2000:
        reasons.append((packed, f'hardly compressible ({packed:.2f}): encoded or encrypted data?'))
    if packed < 0.04:
        reasons.append((1 - packed, f'repeats itself ({1 / packed:.0f} times compressible)'))
    if letters < 0.25:
        reasons.append((1 - letters, f'only {100 * letters:.0f}% letters'))
    if spaces < 0.02:
        reasons.append((0.8 - spaces, f'hardly any spaces ({100 * spaces:.1f}%)'))
    if chars_a_line > 2000:
        reasons.append((min(1, chars_a_line / 1e4), f'lines of {int(chars_a_line):,} characters'))
    return max(reasons, default=(0, ''))


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


_tokenizers = {}  # sha256 → Tokenizer


def encode(task):
    """The ids of a block. task: folder, key, block; rows: those that are used, and `use`, TRAIN or
    VAL for each; tokenizer: (path, sha256); closing: list of ids after each document; cut: None or
    (number of a row, characters): where val begins. Returns {TRAIN: Side.result(), VAL:
    Side.result(), 'kinds': tokens by kind, 'bytes': by side}.
    """
    path, sha256 = task['tokenizer']
    if sha256 not in _tokenizers:
        _tokenizers[sha256] = load_tokenizer(path)
    tok = _tokenizers[sha256]
    closing = np.array(task['closing'], np.int32)
    rows = task['rows']
    row_kinds = rows['kind'].tolist()
    cut_row, cut_chars = task['cut'] or (-1, 0)
    sides = {TRAIN: Side(), VAL: Side()}
    kinds = np.zeros(len(KINDS), np.int64)

    def add(side, i, text, last):
        ids = tok.encode(text)
        if last:
            ids = np.concatenate([ids, closing])
            side.offsets.append(side.tokens + len(ids))
            side.rows.append(i)
        side.arrays.append(ids)
        side.tokens += len(ids)
        side.bytes += len(text.encode('utf-8'))
        kinds[row_kinds[i]] += len(ids)

    data = read_block(task['folder'], task['key'], task['block'])
    pieces = zip(pieces_of(data, rows), task['use'].tolist(), rows['last'].tolist())
    for i, (text, use, last) in enumerate(pieces):
        if i == cut_row:
            add(sides[TRAIN], i, text[:cut_chars], True)
            add(sides[VAL], i, text[cut_chars:], last)
        else:
            add(sides[use], i, text, last)
    results = {name: side.result(rows) for name, side in sides.items()}
    return results | {'kinds': kinds, 'bytes': {name: side.bytes for name, side in sides.items()}}
