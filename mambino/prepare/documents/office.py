"""Reads the files of office programs, by packages of pyproject.toml's group `office`.

    for text, last in office.read_docx('letter.docx', options, notes): ...    # one document
    for text, last in office.read_xlsx('sums.xlsx', options, notes): ...      # a document a sheet

    docx ──► mammoth ──► HTML ──► webpage.py ──► text      paragraphs, lists, notes
    pptx ──► python-pptx ──► the text of each slide, then its notes
    xlsx, xls, xlsb ──► python-calamine, row by row ──► cells with tabs between them
    rtf  ──► striprtf ──► text
What a program shows and these do not, formulas and drawings, is counted in the notes.
"""
import collections
import datetime
import io
import itertools
import os
import re
import zipfile

from mambino.prepare.documents.legible import SYMBOLS
from mambino.prepare.documents.webpage import text_of
from mambino.prepare.files import CHUNK, NO_MEMORY, Skip, bomb_of, most_unpacked, open_bytes
from mambino.prepare.tables.sheets import rows_of_sheets

SHEET_MEMORY = 1.6   # bytes of memory for each byte of the XML of a sheet
PIECE = 1 << 16      # characters of a sheet that are passed on together


def needs(kind, package):
    """The reason to skip a file whose reader is not installed."""
    return Skip(f'{kind}: needs the package {package}: pip install {package}')


def open_zip(path):
    """A zipfile.ZipFile. Skip where it is none, or a bomb."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise Skip('damaged (no zip archive inside)') from None
    size = os.path.getsize(path)  # not the sum of its parts, which may lie in each other
    if sum(entry.file_size for entry in archive.infolist()) > most_unpacked(size):
        archive.close()
        raise bomb_of(size)
    return archive


# -----------------------------------------------------------------------------
# Documents

# of the parts that mammoth does not know, those that have text
PARTS = {rb'<m:oMath[\s>]': 'formulas', rb'<w:altChunk[\s>]': 'inserted files'}
BOXES = (b'<wps:txbx', b'<v:textbox')  # text boxes, and the same again for old programs, which mammoth reads
# what stands around text without a meaning for it, and is unknown to mammoth
AROUND = re.compile(rb'</?w:(?:fldSimple|bdo|dir|moveTo|customXml|ruby|rubyBase)(?:\s[^>]*)?>')
READING = re.compile(rb'<w:rt>.*?</w:rt>|<w:rubyPr>.*?</w:rubyPr>|<w:moveFrom[\s>].*?</w:moveFrom>', re.S)
CELL = re.compile('(<t[dh][^>]*>)((?:(?!</?t[dh]\\b).)*)(?=</t[dh]>)', re.S)
TO_NOTE = re.compile(' ?<a href="#[^"]*">↑</a>')


def read_docx(path, options, notes):
    """A document of Word: headings, paragraphs, lists, a line for each row of a table, footnotes."""
    try:
        import mammoth
    except ImportError:
        raise needs('docx', 'mammoth') from None
    left_out = collections.Counter()
    slim = texts_of(path, left_out)
    page = mammoth.convert_to_html(slim, convert_image=mammoth.images.img_element(no_image))
    markup = CELL.sub(flat_cell, TO_NOTE.sub('', page.value))
    for what, n in left_out.items():
        notes.append(f'{n:,} {what} left out')
    yield text_of(markup).replace('\xad', ''), True


def texts_of(path, left_out):
    """The parts of a document of Word that have text, as a file in memory of the same format. What mammoth
    will leave out of the text itself is counted in `left_out`, a Counter.
    """
    slim = io.BytesIO()
    with open_zip(path) as archive, zipfile.ZipFile(slim, 'w') as out:
        for entry in archive.infolist():
            if entry.filename.endswith(('.xml', '.rels')):
                data = archive.read(entry)
                if entry.filename.startswith('word/'):
                    data = AROUND.sub(b'', READING.sub(b'', data))
                out.writestr(entry.filename, data)
                if entry.filename == 'word/document.xml':
                    counts = {what: len(re.findall(part, data)) for part, what in PARTS.items()}
                    counts['text boxes'] = max(0, data.count(BOXES[0]) - data.count(BOXES[1]))
                    left_out.update({what: n for what, n in counts.items() if n})
    slim.seek(0)
    return slim


def no_image(image):
    return {'src': ''}


def flat_cell(match):
    """A cell of a table with its paragraphs on one line."""
    return match[1] + match[2].replace('</p><p>', ' ').replace('<p>', '').replace('</p>', '')


def read_rtf(path, options, notes):
    """A document in the Rich Text Format."""
    try:
        from striprtf.striprtf import rtf_to_text
    except ImportError:
        raise needs('rtf', 'striprtf') from None
    with open_bytes(path) as f:
        data = f.read()
    if not data.lstrip(b'\xef\xbb\xbf \r\n').startswith(b'{\\rtf'):
        raise Skip('not an RTF document')
    source = data.decode('latin-1').replace('{\\footnote', '{')  # notes stay where they are called
    source = re.sub(r'\\(?:nest)?cell(?![a-z])', r'\\tab', source)
    source = re.sub(r'\\bin(?!\d)', '', source)  # striprtf wants a number there
    encoding = 'mac_roman' if re.search(r'\\mac\b', source[:200]) else 'cp1252'
    text = rtf_to_text(source, encoding, errors='replace').translate(SYMBOLS)
    damaged = text.count('\ufffd')
    if damaged:
        notes.append(f'{damaged:,} characters were unreadable')
    yield re.sub('[ \t]+\n', '\n', text), True


# -----------------------------------------------------------------------------
# Presentations

ON_EVERY_SLIDE = (13, 15, 16)  # PP_PLACEHOLDER's SLIDE_NUMBER, FOOTER and DATE


def read_pptx(path, options, notes):
    """The text of each slide, then what is noted on it for the speaker; an empty line between slides."""
    try:
        from pptx.package import Package
    except ImportError:
        raise needs('pptx', 'python-pptx') from None
    open_zip(path).close()
    presentation = Package.open(path).main_document_part.presentation  # as pptx.Presentation, and shows too
    drawings = 0
    written = False
    for slide in presentation.slides:
        lines = []
        for shape in slide.shapes:
            drawings += add_shape(shape, lines)
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            lines.append('')
            lines += slide.notes_slide.notes_text_frame.text.split('\n')
        text = '\n'.join(lines).replace('\v', '\n').strip('\n')
        if text:
            yield ('\n\n' if written else '') + text, False
            written = True
    if drawings:
        notes.append(f'{drawings:,} charts and drawings left out')
    yield '\n' if written else '', True


def add_shape(shape, lines):
    """Adds the text of a shape and of those in it to `lines`. Returns how many drawings have text
    that is left out.
    """
    if hasattr(shape, 'shapes'):
        return sum(add_shape(inner, lines) for inner in shape.shapes)
    if getattr(shape, 'has_table', False):
        for row in shape.table.rows:
            lines.append('\t'.join(' '.join(cell.text.split()) for cell in row.cells).rstrip())
    elif shape.is_placeholder and shape.placeholder_format.type in ON_EVERY_SLIDE:
        return 0
    elif shape.has_text_frame:
        lines += filter(str.strip, (paragraph.text for paragraph in shape.text_frame.paragraphs))
    else:
        return shape.element.tag.endswith('}graphicFrame')
    return 0


# -----------------------------------------------------------------------------
# Tables

# a cell with a formula and no value, as programs other than Excel write it
UNCOMPUTED = re.compile(rb'<c ([^<>]*)>(?:<f[^<>]*/>|<f[^<>]*>[^<]*</f>)(?:<v></v>|<v ?/>)?</c>')


def read_xlsx(path, options, notes):
    """A document a sheet of an Excel workbook, old or new: a line a row, tabs between the cells; or a
    document a row, of the columns that --text_column names.
    """
    with open(path, 'rb') as f:
        head = f.read(4)
    try:
        from python_calamine import CalamineWorkbook, PasswordError
    except ImportError:
        raise needs('xlsx', 'python-calamine') from None
    if head.startswith(b'PK'):
        with open_zip(path) as archive:
            largest = max((entry.file_size for entry in archive.infolist()), default=0)
        if SHEET_MEMORY * largest > options['file_memory_mb'] * 1e6:
            raise Skip(NO_MEMORY)
        uncomputed = count_uncomputed(path)
        if uncomputed:
            notes.append(f'{uncomputed:,} cells of formulas have no value: save it once with a spreadsheet program')
    with open(path, 'rb') as f:
        try:
            book = CalamineWorkbook.from_filelike(f)
        except PasswordError:
            raise Skip('encrypted') from None
        sheets = (lines_of(book.get_sheet_by_name(name).iter_rows()) for name in book.sheet_names)
        yield from rows_of_sheets(itertools.chain.from_iterable(sheets), options, notes)


def count_uncomputed(path):
    """How many cells of a workbook are formulas whose value nobody has computed."""
    n = 0
    with open_zip(path) as archive:
        for name in archive.namelist():
            if not name.startswith('xl/worksheets/sheet'):
                continue
            rest = b''
            with archive.open(name) as f:
                while data := f.read(CHUNK):
                    data = rest + data
                    end = data.rfind(b'<c ')  # the last cell may be cut
                    rest = data[end:] if end >= 0 else b''
                    n += uncomputed_in(data[:end] if end >= 0 else data)
            n += uncomputed_in(rest)
    return n


def uncomputed_in(xml):
    if b'<f' not in xml:
        return 0
    return sum(b't="str"' not in attributes for attributes in UNCOMPUTED.findall(xml))  # '' is a value of those


def lines_of(rows):
    """Yields the lines of a sheet in pieces, as readers do."""
    waiting = []
    size = 0
    for row in rows:
        line = '\t'.join(map(text_of_cell, row)).rstrip('\t')
        if line:
            waiting.append(line + '\n')
            size += len(line)
        if size > PIECE:
            yield ''.join(waiting), False
            waiting = []
            size = 0
    yield ''.join(waiting), True


def text_of_cell(value):
    """What a cell holds, on one line."""
    if isinstance(value, str):
        return ' '.join(value.split())
    if isinstance(value, datetime.datetime):
        return str(value).removesuffix(' 00:00:00')
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).upper() if isinstance(value, bool) else str(value)
