"""Reads zip and tar archives: the documents that there would be if they were unpacked to a folder.

    for text, last in archive.read(source, options, notes): ...    # of any other file, as isolate.read

    archive ──► a member at a time, unpacked to a file ──► survey ──► isolate.read ──► documents
                  └► not taken, with the reason: hidden files and junk, as in a folder, archives in an
                     archive, what is encrypted, and more than a bomb could hold
"""
import collections
import contextlib
import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from typing import NamedTuple

from mambino.prepare import files, isolate, screen, sources, survey
from mambino.prepare.documents.office import open_zip
from mambino.prepare.files import CHUNK, Bomb, Notes, Skip, judge
from mambino.prepare.readers import reason_of
from mambino.prepare.tables import looking

KINDS = ('zip', 'tar')
HEAD = 1 << 13  # characters of a member by which it is judged
MOST_MEMBERS = 1_000_000
MOST_FACTS = 3  # different ones of its members, that are told of an archive
HELD = 1 << 24  # characters of a member that wait for the verdict on the whole of it


# what reading an archive raises
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError,
           EOFError, ValueError, OSError)


class Member(NamedTuple):
    """A file in an archive."""
    name: str
    size: int        # bytes, unpacked
    is_locked: bool
    open: object     # a function that opens it


def read(source, options, notes):
    """Yields (text, last) of a source, as isolate.read; of an archive those of its members."""
    pieces = read_members if source.kind in KINDS else isolate.read
    yield from pieces(source, options, notes)


def read_members(source, options, notes):
    """The documents of the members of an archive, whole ones. What is left out is noted."""
    left_out = collections.Counter()
    documents = 0
    try:
        for name, member in members(source, options, left_out):
            for text, last in documents_of(name, member, options, notes, left_out):
                documents += 1
                notes.taken += 1
                yield text, last
    except Bomb:
        raise
    except Skip as reason:
        if not documents:
            raise
        notes.append(f'stopped after {documents:,} documents: {reason}')
    if not documents:
        raise Skip(f'nothing readable in it ({said(left_out)})' if left_out else 'an empty archive')
    if left_out:
        notes.append(f'left out of it: {said(left_out)}')


def documents_of(name, member, options, notes, left_out):
    """Yields (document, last) of one member, a Source; last is True, or TALK for a conversation."""
    own_notes = Notes()
    pieces = []
    passed_on = False
    try:
        kind, plan = plan_of(member, options)
        member = isolate.look(member._replace(kind=kind), own_notes)
        if member.kind in KINDS:
            raise Skip('an archive in an archive')
        view = screen.Screen(member, options.get('document_separator', ''))
        waiting = []  # for the verdict on the whole member, if it is not too large
        size = 0
        head = ''
        for text, last in view.passed(isolate.read(member, options | plan, own_notes)):
            head += text[:max(0, HEAD - len(head))]
            pieces.append(text)
            size += len(text)
            if last:
                waiting.append((''.join(pieces), last))
                pieces.clear()
            if size > HELD and member.kind not in screen.PLAIN:
                passed_on = True
                yield from waiting
                waiting.clear()
        view.judge(head, own_notes, is_beginning=True)
        verdict, lines = judge(own_notes.taken, own_notes.lost)
        if verdict and not passed_on:
            raise Skip(f'{os.path.basename(name)}: {verdict}')
        yield from waiting
        own_notes += [verdict] if verdict else lines
        gather(notes.facts, own_notes.facts)
    except Skip as reason:
        if passed_on and isinstance(reason, Bomb):
            raise Bomb(f'{os.path.basename(name)} in it {reason}') from None
        left_out[str(reason)] += 1
    notes += [f'{os.path.basename(name)}: {line}' for line in own_notes]


def gather(facts, of_member):
    """Adds what was decided of a member to the facts of its archive."""
    for name, value in of_member.items():
        before = facts[name].split('; ') if name in facts else []
        if value not in before and len(before) <= MOST_FACTS:
            facts[name] = '; '.join([*before, value if len(before) < MOST_FACTS else '...'])


def plan_of(member, options):
    """(its kind, how it is read if it is a table)"""
    try:
        return looking.alone(member.kind, member.path, options, survey.look_apart)
    except Skip:
        raise
    except Exception as error:  # of whatever library
        raise Skip(reason_of(error)) from None


def said(left_out):
    """The reasons, the most frequent first."""
    return ', '.join(f'{n:,} {reason}' for reason, n in left_out.most_common())


# -----------------------------------------------------------------------------
# Members

def members_of_zip(stack, path):
    """Yields a Member for each file."""
    archive = stack.enter_context(open_zip(path))
    for entry in archive.infolist():
        if not entry.is_dir():
            is_locked = bool(entry.flag_bits & 1)
            yield Member(entry.filename, entry.file_size, is_locked, lambda entry=entry: archive.open(entry))


def members_of_tar(stack, path):
    """The same; links and devices are not there."""
    stream = stack.enter_context(files.open_bytes(path))
    try:
        archive = stack.enter_context(tarfile.open(fileobj=stream, mode='r:' if stream.seekable() else 'r|'))
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError):
        raise Skip('damaged tar archive') from None
    for entry in archive:
        if entry.isfile():
            yield Member(entry.name, entry.size, False, lambda entry=entry: archive.extractfile(entry))


def members(source, options, left_out):
    """Yields (name, a Source of the unpacked file) of what is to be read. What is not is counted in
    `left_out`, a Counter, by its reason. The file is gone when the next one comes.
    """
    excludes = sources.Excludes('')
    packed_size = os.path.getsize(source.path)
    room = files.most_unpacked(packed_size)
    find = members_of_zip if source.kind == 'zip' else members_of_tar
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(
            prefix='members-', suffix='.tmp', dir=options.get('scratch'), ignore_cleanup_errors=True))
        found = find(stack, source.path)
        for number in range(MOST_MEMBERS):
            try:
                member = next(found, None)
                if member is None:
                    return
                room -= member.size
                if room < 0:
                    raise files.bomb_of(packed_size)
                kind, reason = look(member, excludes, options['max_file_mb'])
                if reason:
                    left_out[reason] += 1
                    continue
                extension = sources.kind_of(os.path.basename(member.name))[1]
                path = os.path.join(folder, f'{number}{extension}')
                with member.open() as packed:
                    save(packed, path)
            except DiskFailed as failed:
                raise failed.error from None
            except DAMAGED as error:
                if getattr(error, 'errno', None):  # of the disk
                    raise Skip(os.strerror(error.errno)) from error
                if found.gi_frame is None:  # the archive itself has no end
                    raise Skip(f'damaged archive ({type(error).__name__})') from None
                left_out['damaged'] += 1
                continue
            room -= inside(path, room)
            if room < 0:
                raise files.bomb_of(packed_size)
            yield member.name, sources.Source(path, kind, member.size, 0)
            os.remove(path)
        raise Skip(f'an archive of more than {MOST_MEMBERS:,} files: unpack it first')


class DiskFailed(Exception):
    """What a file unpacks to could not be written: no fault of the archive."""

    def __init__(self, error):
        super().__init__(str(error))
        self.error = error


def save(packed, path):
    """Writes what an open member holds to a file."""
    with open(path, 'wb', buffering=0) as out:
        while data := packed.read(CHUNK):
            try:
                while data:
                    data = data[out.write(data):]
            except OSError as error:
                raise DiskFailed(error) from None


def inside(path, room):
    """Bytes that a member unpacks to itself, a packed one or a document of an office program; counted no
    further than beyond `room`.
    """
    size = 0
    try:
        with open(path, 'rb') as f:
            is_zip = f.read(2) == b'PK'
        if is_zip:
            with open_zip(path) as archive:
                return sum(entry.file_size for entry in archive.infolist())
        if files.is_packed(path):
            for data in files.chunks(path):
                size += len(data)
                if size > room:
                    break
    except (Skip, *DAMAGED):  # its reader says so
        pass
    return size


def look(member, excludes, max_file_mb):
    """(kind by its name, '') or (None, why a member is not read)."""
    parts = [part for part in member.name.replace('\\', '/').split('/') if part not in ('', '.')]
    name = '/'.join(parts)
    kind, extension = sources.kind_of(parts[-1] if parts else '')
    if not parts or any(part.startswith('.') or part == '__MACOSX' for part in parts):
        return None, 'hidden'
    folders = ['/'.join(parts[:i + 1]) for i in range(len(parts) - 1)]
    if excludes.is_secret(name, False):
        return None, 'a secret'
    if any(excludes.match(folder, True) for folder in folders) or excludes.match(name, False):
        return None, 'excluded by default'
    if kind is None:
        return None, f'unknown type {extension}'
    if kind in KINDS:
        return None, 'an archive in an archive'
    if member.is_locked:
        return None, 'encrypted'
    if member.size == 0:
        return None, 'empty'
    if kind not in sources.STREAMED and member.size > max_file_mb * 1e6:
        return None, f'larger than {max_file_mb:g} MB'
    return kind, ''
