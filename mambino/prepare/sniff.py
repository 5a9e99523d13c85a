"""What a file is by its first bytes, whatever its name says.

    sniff.true_kind(head, 'report.txt')            # 'pdf'; None: nothing speaks against the name
    sniff.kind_of('text', 'report.txt', notes)     # the same for a file, with a note that says so

    head ──► SIGNATURES ──► a kind of readers.READERS
         │                  └► Skip('a JPEG image'): nobody reads that here
         ├► PK ──► the names in the archive: docx, pptx, xlsx, odt, epub, or any other zip
         ├► D0 CF 11 E0 ──► the names in it: Office before 2007, encrypted files
         └► a text ──► a web page, a mailbox, RTF
"""
import json
import os
import re
import zipfile
import zlib

from mambino.prepare.files import Skip, first_bytes, open_bytes

ROWS_HEAD = 1 << 20  # and that tell whether it is rows of JSON
HEAD = 4096  # bytes of a file that tell what it is
NAMES = {    # of the kinds that contents tell, as they are said
    'pdf': 'a PDF', 'parquet': 'a parquet table', 'arrow': 'an Arrow table', 'html': 'a web page',
    'docx': 'a Word document', 'pptx': 'a presentation', 'xlsx': 'an Excel workbook',
    'odt': 'an OpenDocument file', 'epub': 'an e-book (epub)', 'rtf': 'an RTF document',
    'email': 'mail', 'text': 'plain text', 'zip': 'a zip archive', 'tar': 'a tar archive',
}
# offset, bytes, what it is: those that begin a text as well have more of them than programs look at
SIGNATURES = [
    (0, b'\xff\xd8\xff', 'a JPEG image'),
    (0, b'\x89PNG\r\n\x1a\n', 'a PNG image'),
    (0, b'GIF87a', 'a GIF image'),
    (0, b'GIF89a', 'a GIF image'),
    (0, b'II*\0', 'a TIFF image'),
    (0, b'MM\0*', 'a TIFF image'),
    (0, b'\0\0\1\0', 'an icon'),
    (0, b'8BPS\0\1', 'a Photoshop image'),
    (8, b'WEBPVP8', 'a WebP image'),
    (8, b'WAVEfmt ', 'a WAV recording'),
    (8, b'AVI LIST', 'an AVI video'),
    (4, b'ftypheic', 'a HEIC image'),
    (4, b'ftypavif', 'an AVIF image'),
    (4, b'ftypM4A', 'an audio file'),
    (4, b'ftyp', 'a video'),
    (4, b'moov\0', 'a video'),
    (0, b'\x1aE\xdf\xa3', 'a video'),
    (0, b'\0\0\1\xba', 'a video'),
    (0, b'OggS\0', 'an Ogg recording'),
    (0, b'fLaC\0', 'a FLAC recording'),
    (0, b'ID3\2', 'an MP3 recording'),
    (0, b'ID3\3', 'an MP3 recording'),
    (0, b'ID3\4', 'an MP3 recording'),
    (0, b'MThd\0', 'a MIDI file'),
    (0, b'\x7fELF', 'a program'),
    (0, b'\xfe\xed\xfa\xce', 'a program'),
    (0, b'\xfe\xed\xfa\xcf', 'a program'),
    (0, b'\xce\xfa\xed\xfe', 'a program'),
    (0, b'\xcf\xfa\xed\xfe', 'a program'),
    (0, b'\xca\xfe\xba\xbe\0', 'a compiled program'),
    (0, b'\0asm\1', 'a compiled program'),
    (0, b'SQLite format 3\0', 'a SQLite database'),
    (0, b'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
    (0, b'\x93NUMPY', 'a NumPy array'),
    (0, b'GGUF\2\0', 'a GGUF model'),
    (0, b'GGUF\3\0', 'a GGUF model'),
    (0, b'7z\xbc\xaf\x27\x1c', 'a 7z archive: unpack it first'),
    (0, b'Rar!\x1a\7', 'a RAR archive: unpack it first'),
    (0, b'MSCF\0\0\0\0', 'a CAB archive: unpack it first'),
    (0, b'!<arch>\n', 'an archive of compiled code'),
    (0, b'Obj\1', 'an Avro file: convert it to parquet or jsonl'),
    (0, b'ORC\n', 'an ORC file: convert it to parquet or jsonl'),
    (0, b'FEA1\0', 'an old Feather table: save it as parquet'),
    (0, b'\0\1\0\0\0', 'a font'),
    (0, b'OTTO\0', 'a font'),
    (0, b'wOFF\0', 'a font'),
    (0, b'wOF2\0', 'a font'),
    (0, b'bplist00', 'a binary property list'),
    (0, b'AT&TFORM', 'a DjVu book: convert it to PDF'),
    (60, b'BOOKMOBI', 'a Kindle book: convert it to epub'),
    (128, b'DICM', 'a DICOM image'),
    (0, b'version https://git-lfs.github.com/spec/v', 'a Git LFS pointer: run git lfs pull'),
    (0, b'ARROW1\0\0', 'arrow'),
    (0, b'%PDF-', 'pdf'),
    (257, b'ustar\x0000', 'tar'),
    (257, b'ustar  \0', 'tar'),
]
# offset -> any of the signatures there: one match is sooner than many comparisons
AT = {offset: re.compile(b'|'.join(re.escape(mark) for at, mark, _ in SIGNATURES if at == offset))
      for offset in {offset for offset, _, _ in SIGNATURES}}
OLE = b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1'
# a name in it -> what it is, the first that is there; each is there in two bytes a letter
OLD_OFFICE = {
    'EncryptedPackage': 'encrypted',
    'WordDocument': 'old Word format: save it as docx',
    'Workbook': 'xlsx',
    'Book': 'xlsx',
    'PowerPoint Document': 'old PowerPoint format: save it as pptx',
    '__substg1.0_': 'an Outlook message: save it as eml',
    '__properties_version1.0': 'an Outlook message: save it as eml',
    'VisioDocument': 'a Visio drawing',
}
PAGE = re.compile(rb'\s*(?:<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).)*-->\s*)*(?:<!doctype\s+html\b|<html[\s>])',
                  re.I | re.S)
MAILBOX = re.compile(rb'From \S+ +\w{3},? [^\n]{5,60}\d{4}[^\n]{0,20}\r?\n>?[A-Za-z][\w-]*:[ \t]')
PATCH = re.compile(rb'From [0-9a-f]{40} ')  # of git format-patch: a mailbox to look at, but code
MHTML = re.compile(rb'(?:[\w-]+:[^\n]*\n(?:[ \t][^\n]*\n)*){0,20}content-type:\s*multipart/related', re.I)
OPEN_DOCUMENT = b'application/vnd.oasis.opendocument'
ZIPPED = ('docx', 'pptx', 'xlsx', 'odt', 'epub')
DIRECTORY = 1 << 24  # bytes of names and places in a zip archive: more are no one's documents
# these keep their kind where the content is a text: templates begin like pages, for example
WRITTEN = ('code', 'html', 'notebook', 'hf')


def kind_of(kind, path, notes):
    """The kind of a file that is called `kind` by its name. Where the content is another one, that
    is noted. Skip where nobody reads that here; OSError as from open.
    """
    head = first_bytes(path, HEAD)
    true = true_kind(head, path, kind)
    if true in (None, kind):
        return kind
    notes.append(f'is {NAMES[true]}, whatever its name says')
    return true


def known_kind(path):
    """The kind of a file whose name says nothing; None unless its content surely is of one that is
    no plain text. An archive may be part of a program, so it is none.
    """
    try:
        with open(path, 'rb') as f:
            kind = true_kind(f.read(HEAD), path)
    except (Skip, OSError):
        return None
    if kind is None and has_rows(path):
        return 'jsonl'
    return None if kind in ('zip', 'tar', 'email') else kind


def remedy_for(path):
    """'a Kindle book: convert it to epub': what a file is and what can be done about it; '' where
    nothing can.
    """
    try:
        with open_bytes(path) as f:
            true_kind(f.read(HEAD), path)
    except Skip as reason:
        return str(reason) if ': ' in str(reason) else ''
    except Exception:  # damaged
        pass
    return ''


def has_rows(path):
    """Whether a file begins with rows of JSON: an object a line, or a list of them."""
    try:
        with open_bytes(path) as f:
            head = f.read(ROWS_HEAD).decode('utf-8-sig', 'replace')
        if re.match(r'\s*\[\s*\{\s*"', head):
            return True
        lines = [line for line in head.split('\n') if line.strip()]
        if len(head) < ROWS_HEAD:
            lines.append('')  # the last one is whole
        return len(lines) > 2 and all(isinstance(json.loads(line), dict) for line in lines[:-1][:3])
    except Exception:  # whatever is wrong with it: nobody asked for it
        return False


def true_kind(head, path, named='text'):
    """The kind that the first bytes of a file tell, a key of readers.READERS; None where they do
    not. Skip with what it is, where nobody reads that here. named: the kind by its name.
    """
    if any(pattern.match(head, offset) for offset, pattern in AT.items()):
        what = next(what for offset, signature, what in SIGNATURES if head.startswith(signature, offset))
        if what in NAMES:
            return what
        raise Skip(what)
    if head.startswith(b'PAR1\x15'):
        return 'parquet'
    if head.startswith((b'PK\3\4', b'PK\5\6')):
        return kind_of_zip(path, named)
    if head.startswith(OLE):
        return kind_of_ole(head, path)
    if head[:2] == b'MZ' and b'\0\0' in head[:64]:
        raise Skip('a program')
    head = head.removeprefix(b'\xef\xbb\xbf')
    if named in ('text', 'html') and MHTML.match(head):  # a page with all its pictures, as browsers save it
        return 'email'
    if named in WRITTEN:
        return None
    is_other = named in ZIPPED and named != 'odt' and head and b'\0' not in head  # a flat .odt is a text
    return kind_of_text(head) or ('text' if is_other else None)


def kind_of_text(head):
    """Which kind of text it surely is; None otherwise."""
    if head.startswith(b'{\\rtf'):
        return 'rtf'
    if PAGE.match(head):
        return 'html'
    if MAILBOX.match(head) and not PATCH.match(head):
        return 'email'
    return None


def kind_of_zip(path, named):
    """Which of the formats that are zip archives inside."""
    with open(path, 'rb') as f:
        f.seek(max(0, os.path.getsize(path) - (1 << 16)))
        _, mark, end = f.read().rpartition(b'PK\5\6')
    if mark and int.from_bytes(end[8:12], 'little') > DIRECTORY:
        raise Skip('a zip archive of too many files')
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            mimetype = b''
            if 'mimetype' in names:
                with archive.open('mimetype') as f:
                    mimetype = f.read(100)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, EOFError):
        raise Skip(f'damaged {named}' if named in ZIPPED else 'a damaged zip archive') from None
    tops = {name.partition('/')[0] for name in names}
    if mimetype.startswith(b'application/epub') or 'META-INF/container.xml' in names:
        return 'epub'
    if mimetype.startswith(OPEN_DOCUMENT) or {'content.xml', 'META-INF/manifest.xml'} <= set(names):
        return 'odt'
    if '[Content_Types].xml' in names:
        for top, kind in ('word', 'docx'), ('ppt', 'pptx'), ('xl', 'xlsx'):
            if top in tops:
                return kind
    if 'Index/Document.iwa' in names or 'Index.zip' in names:
        raise Skip('an Apple iWork document: export it as docx or PDF')
    return 'zip'


def kind_of_ole(head, path):
    """'xlsx' for a workbook of Excel before 2007. Skip for the other files of that Office: the
    names are in their directory.
    """
    with open_bytes(path) as f:
        sector = 1 << min(head[30], 16)
        f.seek((int.from_bytes(head[48:52], 'little') + 1) * sector)
        directory = head + f.read(1 << 16)
    for name, what in OLD_OFFICE.items():
        if name.encode('utf-16-le') in directory:
            if what in NAMES:
                return what
            raise Skip(what)
    raise Skip('an old Office format: save it as docx, xlsx or pptx')
