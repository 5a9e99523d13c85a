"""
Between files and tokens: documents on disk, and the two tasks that many processes share.

    report = spool.extract(task)        # some sources → their documents, in a pair of files
    result = spool.encode(task)         # a block of documents → token ids

    sources ──► extract ──► <key>.text  blocks of about BLOCK bytes, zstd: documents as UTF-8, in pieces of at most LONGEST
                            <key>.rows  a ROW for each piece: which document, how long, in which block
                            <key>.json  the report; that it is there means that the task is done
    all rows ──► decide: duplicate, train or val? ──► encode, block by block

Both are functions of their arguments and of what is on disk; a task's result never depends on who computes it, when, or
beside what. A document is cut only where white space begins (or within a run of LONGEST characters without any), where no
tokenizer of GPT-2's kind would join the two sides, so that its ids are those of the whole.
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
from mambino.prepare import readers
from mambino.prepare.sources import Source
from mambino.tokenizer import SEAM, load_tokenizer

FORMAT = 2         # of a dataset, and of the journal on the way there
PIECE = 1 << 18    # characters: where the text goes on, a piece ends at the first seam beyond
LONGEST = 1 << 20  # characters: without a seam it ends here
BLOCK = 1 << 21    # bytes of text that are packed, and later encoded, together
JUDGED = 1 << 13   # characters: so much of a source's beginning tells whether it looks odd
LETTERS = string.ascii_letters.encode() + bytes(range(128, 256))
KINDS = list(readers.KINDS)
ROW = np.dtype([
    ('hi', '<u8'), ('lo', '<u8'),        # the document's hash
    ('block', '<u4'), ('size', '<u4'),   # of the piece: its block, bytes,
    ('at', '<u4'), ('chars', '<u4'),     # where in the block it begins, characters
    ('part', '<u4'),                     # 0 for the first piece of a document, then 1, 2, ...
    ('last', 'u1'), ('kind', 'u1'),      # the document ends with this piece; index in KINDS
])
DROP, TRAIN, VAL = 0, 1, 2               # what becomes of a row

def new_hash(seed, data=b''):
    """The hash of a document, to be updated with its UTF-8: BLAKE2b, keyed with the split seed."""
    return hashlib.blake2b(data, digest_size=16, key=str(seed).encode())

def numbers_of(document_hash):
    """(hi, lo)"""
    return struct.unpack('>QQ', document_hash.digest())

# -----------------------------------------------------------------------------
# Extract

class Spool:
    """Takes documents, piece by piece, and writes the blocks and rows of a task."""

    def __init__(self, path, seed):
        self.file, self.rows_file = open(path + '.text', 'wb'), open(path + '.rows', 'wb')
        self.seed = seed
        self.blocks, self.rows = [], []           # (offset, packed, unpacked); tuples in the order of ROW, still to write
        self.waiting, self.size = [], 0           # pieces of the block to come
        self.codec = pyarrow.Codec('zstd', compression_level=1)
        self.start(0)

    def start(self, kind):
        """A new source begins."""
        self.write_rows()
        self.kind, self.mark, self.documents = kind, self.rows_file.tell(), 0
        self.head = ''                            # the beginning of the source, to judge it by
        self.fresh()

    def forget(self):
        """Takes back what came from this source; its text stays in the blocks, but nothing points there."""
        self.rows.clear()
        self.rows_file.seek(self.mark)
        self.rows_file.truncate()
        self.documents = 0

    def fresh(self):
        self.text, self.pieces, self.blank = '', [], True
        self.hash = new_hash(self.seed)

    def add(self, text, last):
        """Takes more of the current document."""
        if len(self.head) < JUDGED:
            self.head += text[:JUDGED - len(self.head)]
        self.text += text
        while len(self.text) > LONGEST:  # no more than LONGEST is looked at: what is cut depends on the text, not on how it came
            seam = SEAM.search(self.text, PIECE, LONGEST)
            self.cut(seam.end() if seam else LONGEST)
        if last:
            self.cut(len(self.text))
            if not self.blank:
                self.documents += 1
                number = numbers_of(self.hash)
                for i, piece in enumerate(self.pieces):
                    self.rows.append((*number, *piece, i, i == len(self.pieces) - 1, self.kind))
                if len(self.rows) > 50_000:
                    self.write_rows()
            self.fresh()

    def cut(self, n):
        piece, self.text = self.text[:n], self.text[n:]
        data = piece.encode('utf-8')
        self.blank = self.blank and not piece.strip()
        self.hash.update(data)
        self.pieces.append((len(self.blocks), len(data), self.size, len(piece)))
        self.waiting.append(data)
        self.size += len(data)
        if self.size >= BLOCK:
            self.flush()

    def flush(self):
        data = b''.join(self.waiting)
        packed = self.codec.compress(data, asbytes=True)
        self.blocks.append((self.file.tell(), len(packed), len(data)))
        self.file.write(packed)
        self.waiting, self.size = [], 0

    def write_rows(self):
        self.rows_file.write(np.array(self.rows, ROW).tobytes())
        self.rows.clear()

    def close(self):
        self.write_rows()
        if self.waiting:
            self.flush()
        for f in (self.file, self.rows_file):
            f.flush()
            os.fsync(f.fileno())
            f.close()
        self.sizes = [os.path.getsize(self.file.name), os.path.getsize(self.rows_file.name)]

def extract(task):
    """
    Reads the sources of a task and leaves their documents in `folder`. Returns the bytes of the sources.
    task: folder, key, cwd, sources, seed, chars (whether to collect the characters), options (of isolate.read).
    """
    path = os.path.join(task['folder'], task['key'])
    work = f'{path}.{os.getpid()}.tmp'
    report = {'files': {}, 'skipped': [], 'notes': [], 'suspects': [], 'again': False}
    if os.getcwd() != task['cwd']:
        os.chdir(task['cwd'])  # on another machine of a cluster
    spool, chars = Spool(work, task['seed']), set()
    try:
        for source in map(Source._make, task['sources']):
            spool.start(KINDS.index(source.kind))
            notes, mine = [], set()
            try:
                for text, last in isolate.read(source, task['options'], notes):
                    spool.add(text, last)
                    if task['chars']:
                        mine.update(text)
                if not spool.documents:
                    raise readers.Skip('empty')
            except readers.Skip as reason:
                spool.forget()
                report['skipped'].append({'file': source.path, 'reason': str(reason)})
                report['again'] |= bool(getattr(reason.__context__, 'errno', None))  # the disk's fault: it may be better next time
                continue
            chars |= mine
            report['files'][source.kind] = report['files'].get(source.kind, 0) + 1
            report['notes'] += [{'file': source.path, 'note': note} for note in notes]
            score, why = suspicion(spool.head)
            if why:
                report['suspects'].append([round(score, 3), source.path, why])
        spool.close()
        report.update(blocks=spool.blocks, chars=''.join(sorted(chars)), sizes=spool.sizes)
        report['suspects'] = sorted(report['suspects'], key=lambda s: (-s[0], s[1]))[:10]
        with open(work + '.json', 'w', encoding='utf-8') as f:
            json.dump(report, f)
        for ending in ('.text', '.rows', '.json'):  # the report last: it says that the others are there
            os.replace(work + ending, path + ending)
    except BaseException:
        spool.file.close()
        spool.rows_file.close()
        for ending in ('.text', '.rows', '.json'):
            if os.path.exists(work + ending):
                os.remove(work + ending)
        raise
    return sum(source[2] for source in task['sources'])

def report_of(folder, key):
    """The report of a task that is done; None if it is not, or not wholly on the disk (a power cut), or should be done again."""
    path = os.path.join(folder, key)
    try:
        with open(path + '.json', encoding='utf-8') as f:
            report = json.load(f)
        whole = report['sizes'] == [os.path.getsize(path + '.text'), os.path.getsize(path + '.rows')]
        return report if whole else None
    except (OSError, ValueError):
        return None

def suspicion(head):
    """(score, why) a source may be no text worth learning, judged by its beginning; why is '' where nothing is odd."""
    if len(head) < 200:
        return 0, ''
    data = head.encode('utf-8')
    packed = len(zlib.compress(data, 1)) / len(data)
    n = len(head)
    lines = head.count('\n') + 1
    broken = head.count('\ufffd') / n
    letters = 1 - len(data.translate(None, LETTERS)) / len(data)
    spaces = 1 - len(data.translate(None, b' \t\n')) / len(data)
    found = [(20 * broken, broken > 0.001, f'{100 * broken:.1f}% of it are replacement characters'),
             (packed, packed > 0.7 and len(data) > 2000, f'hardly compressible ({packed:.2f}): encoded or encrypted data?'),
             (1 - packed, packed < 0.04, f'repeats itself ({1 / packed:.0f} times compressible)'),
             (1 - letters, letters < 0.25, f'only {100 * letters:.0f}% letters'),
             (0.8 - spaces, spaces < 0.02, f'hardly any spaces ({100 * spaces:.1f}%)'),
             (min(1, n / lines / 1e4), n / lines > 2000, f'lines of {n // lines:,} characters')]
    found = [(score, why) for score, odd, why in found if odd]
    return max(found) if found else (0, '')

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

_tokenizers = {}  # sha256 → Tokenizer

def encode(task):
    """
    The ids of a block. task: folder, key, block; rows: those that are used, and `use`, TRAIN or VAL for each; tokenizer (path,
    sha256); closing: list of ids after each document; cut: None or (number of a row, characters): where val begins.
    Returns {TRAIN: (ids int32, ends: where documents end among them, their hashes (n, 2)), VAL: ..., 'kinds': tokens by kind,
    'bytes': by side}.
    """
    path, sha = task['tokenizer']
    if sha not in _tokenizers:
        _tokenizers[sha] = load_tokenizer(path)
    tok, closing = _tokenizers[sha], np.array(task['closing'], np.int32)
    data = read_block(task['folder'], task['key'], task['block'])
    out = {side: ([], [], []) for side in (TRAIN, VAL)}
    tokens, size = {TRAIN: 0, VAL: 0}, {TRAIN: 0, VAL: 0}
    kinds = np.zeros(len(KINDS), np.int64)

    def add(side, i, text, last):
        arrays, ends, ended = out[side]
        ids = tok.encode(text)
        if last:
            ids = np.concatenate([ids, closing])
            ends.append(tokens[side] + len(ids))
            ended.append(i)
        arrays.append(ids)
        kinds[rows['kind'][i]] += len(ids)
        tokens[side] += len(ids)
        size[side] += len(text.encode('utf-8'))

    rows = task['rows']
    for i, (text, side, last) in enumerate(zip(pieces_of(data, rows), task['use'].tolist(), rows['last'])):
        if task['cut'] and i == task['cut'][0]:
            n = task['cut'][1]
            add(TRAIN, i, text[:n], True)
            add(VAL, i, text[n:], last)
        else:
            add(side, i, text, last)
    none = np.zeros(0, np.int32)
    result = {side: (np.concatenate([none, *arrays]).astype('<i4'), np.array(ends, '<u8'),
                     np.stack([rows['hi'][ended], rows['lo'][ended]], 1)) for side, (arrays, ends, ended) in out.items()}
    return result | {'kinds': kinds, 'bytes': size}
