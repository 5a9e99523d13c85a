"""Between files and tokens: documents on disk, written by a task that many processes share.

    report = spool.extract(task)        # some sources → their documents, in a pair of files
    texts = spool.pieces_of(spool.read_block(folder, key, block), rows)

    sources ──► extract ──► <key>.text  blocks of about BLOCK bytes, zstd: documents as UTF-8, in
                                        pieces of at most LONGEST; a conversation in one, packed
                            <key>.rows  a ROW for each piece: which document, how long, in which block
                            <key>.json  the report; that it is there means that the task is done
    all rows ──► decide: duplicate, train or val? ──► tokens.encode, block by block

It is a function of its arguments and of what is on disk; a task's result never depends on who
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

from mambino.prepare import account, archive, conversations, files, isolate, rendered, screen
from mambino.prepare.conversations import TALK
from mambino.prepare.files import PACKED, Notes, Skip, extension_of
from mambino.prepare.readers import READERS
from mambino.prepare.sources import Source
from mambino.prepare.tables import talks
from mambino.seams import SEAM

FORMAT = 2         # of a dataset
JOURNAL = 5        # of the reports on the way there
PIECE = 1 << 18    # characters: where the text goes on, a piece ends at the first seam beyond
LONGEST = 1 << 20  # characters: without a seam it ends here
BLOCK = 1 << 21    # bytes of text that are packed, and later encoded, together
JUDGED = 1 << 13   # characters: so much of a source's beginning tells whether it looks odd
SAMPLE = 80        # characters of its text, to be shown
KNOWN = 50_000     # documents of a source, that later ones are compared with
PACKING = 4        # times smaller than its text is a packed file, about
COPIED = 0.1       # of its size a copy counts for what a file may hold: it takes time, and no room
PULSE = 0.5        # seconds after which a task says how far it is
KINDS = [*READERS, *archive.KINDS]  # their order is that of the numbers in `kind`
ENDINGS = ('.text', '.rows', '.json')    # the report last: it says that the others are there
ROW = np.dtype([
    ('hi', '<u8'), ('lo', '<u8'),        # the document's hash
    ('block', '<u4'), ('size', '<u4'),   # of the piece: its block, bytes,
    ('at', '<u4'), ('chars', '<u4'),     # where in the block it begins, characters that are said
    ('part', '<u4'),                     # 0 for the first piece of a document, then 1, 2, ...
    ('last', 'u1'), ('kind', 'u1'),      # the document ends with this piece; index in KINDS
    ('talk', 'u1'),                      # it is a conversation
])
DROP, TRAIN, VAL = 0, 1, 2               # what becomes of a row
SIDES = {TRAIN: 'train', VAL: 'val'}


def new_hash(seed, data=b''):
    """The hash of a document, to be updated with its UTF-8: BLAKE2b, keyed with the split seed."""
    return hashlib.blake2b(data, digest_size=16, key=str(seed).encode())


def talk_key(messages):
    """What the hash of a conversation is made of, and that of no text: none begins with NUL."""
    packed = conversations.pack([{'role': message['role'], 'content': message['content']} for message in messages])
    return b'\0' + packed.encode('utf-8')


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

    def __init__(self, path, seed, dedupe=False):
        self.dedupe = dedupe
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
        self.bytes = 0      # of its text, COPIED of that of copies
        self.documents = 0
        self.known = set()  # hashes of its documents
        self.copies = 0     # documents that are among the known,
        self.dropped = 0    # and those of them that are not written
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
        self.dropped = 0

    def rows_of_source(self):
        """[begin, end] of its rows in the file."""
        self.write_rows()
        return [self.mark // ROW.itemsize, self.rows_file.tell() // ROW.itemsize]

    def start_document(self):
        self.text = ''     # not yet cut into pieces
        self.pieces = []   # (block, size, at, chars)
        self.blank = True
        self.talk = False
        self.hash = self.new_hash()
        self.begun = (len(self.blocks), len(self.waiting), self.size)

    def add(self, text, last):
        """Takes more of the current document; a conversation comes in one, with TALK for `last`."""
        if last == TALK:
            self.add_talk(text)
            return
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

    def add_talk(self, packed):
        """Takes a conversation: it is one piece."""
        messages = conversations.unpack(packed)
        if len(self.head) < JUDGED:
            self.head += conversations.as_text(messages)[:JUDGED - len(self.head)] + '\n'
            self.sample = self.sample or self.head[:SAMPLE]
        self.text = packed
        self.talk = True
        self.cut(len(packed))
        self.hash = self.new_hash()
        self.hash.update(talk_key(messages))
        self.pieces[-1] = (*self.pieces[-1][:-1], sum(map(len, conversations.said(messages))))
        self.end_document()
        self.start_document()

    def end_document(self):
        """Writes the rows of the current document."""
        self.documents += 1
        pair = hash_pair(self.hash)
        if pair in self.known:
            self.copies += 1
            if self.dedupe:
                self.drop_document()
                return
        elif len(self.known) < KNOWN:
            self.known.add(pair)
        for part, piece in enumerate(self.pieces):
            is_last = part == len(self.pieces) - 1
            self.rows.append((*pair, *piece, part, is_last, self.kind, self.talk))
        if len(self.rows) > 50_000:
            self.write_rows()

    def drop_document(self):
        """Writes nothing of a document that is the same as an earlier one; what of its text is in a
        block already, stays there.
        """
        self.dropped += 1
        self.bytes -= int(sum(size for _, size, *_ in self.pieces) * (1 - COPIED))
        block, waiting, size = self.begun
        if block == len(self.blocks):
            del self.waiting[waiting:]
            self.size = size

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
    spool = Spool(work, task['seed'], task['options'].get('dedupe', False))
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
    options = task['options'] | plan | {'scratch': task['folder']}
    view = None
    files.allow(options.get('unpack_ratio', files.TIMES))
    most = files.most_unpacked(size)
    packing = PACKING if extension_of(source.path) in PACKED else 1
    chars = set()
    reason = ''
    again = False
    try:
        source = isolate.look(source, notes)
        spool.kind = KINDS.index(source.kind)
        view = screen.Screen(source, options.get('document_separator', ''))
        marks = rendered.Rendered(options.get('conversations') in (talks.AUTO, talks.ALWAYS))
        for text, last in marks.passed(view.passed(archive.read(source, options, notes))):
            spool.add(text, last)
            if spool.bytes + ROW.itemsize * spool.documents > most and source.kind != 'hf':
                raise files.bomb_of(size)
            pulse.beat(spool.bytes // packing, size)
            if task['chars']:
                chars.update(text)
        marks.tell(notes)
        view.judge(spool.head, notes, is_beginning=not part or part[0] == 0)
    except Skip as skip:
        spool.forget()
        chars.clear()
        reason = str(skip)
        again = bool(getattr(skip.__context__, 'errno', None))
    score, why = screen.suspicion(spool.head)
    entry = {
        'file': source.path, 'kind': source.kind, 'part': part, 'rows': spool.rows_of_source() if part else None,
        'documents': spool.documents, 'copies': spool.copies, 'dropped': spool.dropped,
        'separators': view.separators() if view else 0,
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
# What was written

def read_block(folder, key, block):
    """The bytes of a block: (offset, packed, unpacked) in <key>.text."""
    offset, packed, unpacked = block
    with open(os.path.join(folder, key + '.text'), 'rb') as f:
        f.seek(offset)
        return pyarrow.Codec('zstd').decompress(f.read(packed), unpacked, asbytes=True)


def pieces_of(data, rows):
    """Yields the text of each of the rows, all of one block; of a conversation it is packed."""
    for at, size in zip(rows['at'].tolist(), rows['size'].tolist()):
        yield data[at:at + size].decode('utf-8')


def texts_of(data, rows, cut, roles=False):
    """Yields (text, whether a document begins with it): what is said in each of the rows, of a
    conversation each message. cut: how many characters, or messages, of the last one; None for all;
    roles: those of messages too, as templates write them."""
    last = len(rows) - 1
    for i, (piece, talk, part) in enumerate(zip(pieces_of(data, rows), rows['talk'].tolist(), rows['part'].tolist())):
        end = cut if i == last else None
        if talk:
            for message in conversations.unpack(piece)[:end]:
                if roles:
                    yield f'{message["role"]}\n', False
                yield message['content'], False
        else:
            yield piece[:end], part == 0
