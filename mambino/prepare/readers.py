"""What a file says: one reader for each kind of file, all of them giving Unicode text.

    for text, last in readers.guarded('pdf', 'paper.pdf', options, notes): ...    # its documents

    file ──► READERS[kind] ──► documents ──► isolate.read(): clean()
               │    encodings.py   text, code, data: bytes, unpacked, of whatever encoding
               │    webpage.py     html
               │    json_rows.py   jsonl, and json: rows in other forms
               │    csv_rows.py    csv
               │    arrow_rows.py  parquet, arrow
               │    pdf_text.py    pdf
               │    office.py      docx, pptx, xlsx, rtf
               │    opendocument.py, epub.py, mail.py
               │    hub.py         hf:, streamed
               └► whatever is wrong with a file becomes Skip(reason) ──► documents before that are kept

A document is a text that belongs together: a file, a row of a table, a notebook. A reader is a
generator of (text, last): `last` closes the document, so one of any length passes through in
pieces. A new format is a function and a line in READERS, and its extensions in sources.py.
"""
import json
import os

from mambino.prepare.documents.epub import read_epub
from mambino.prepare.documents.mail import read_mail
from mambino.prepare.documents.office import read_docx, read_pptx, read_rtf, read_xlsx
from mambino.prepare.documents.opendocument import read_odt
from mambino.prepare.documents.pdf_text import read_pdf
from mambino.prepare.documents.webpage import read_html
from mambino.prepare.files import NO_MEMORY, Skip, chunks
from mambino.prepare.tables.arrow_rows import read_arrow, read_parquet
from mambino.prepare.tables.csv_rows import read_csv
from mambino.prepare.tables.hub import Unreachable, read_hf
from mambino.prepare.tables.json_rows import read_json
from mambino.prepare.texts.encodings import decoded, read_text


def read_notebook(path, options, notes):
    """The markdown and code cells, an empty line between them."""
    data = b''.join(chunks(path, options['max_file_mb'] * 1e6))
    try:
        book = json.loads(decoded(data, notes, options.get('encoding', '')))
        if 'cells' in book:
            cells = book['cells']
        else:  # version 3
            cells = [cell for sheet in book['worksheets'] for cell in sheet['cells']]
        cells = [cell for cell in cells if cell['cell_type'] in ('code', 'markdown', 'heading')]
        sources = [cell.get('source', cell.get('input', '')) for cell in cells]
        sources = [''.join(source).strip('\n') for source in sources if source]
        yield '\n\n'.join(filter(str.strip, sources)) + '\n' if any(sources) else '', True
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise Skip('not a notebook') from None


def read_office(path, options, notes):
    """What is called as a file of an older office program and is none, as sniff.py has found."""
    try:
        yield from read_text(path, options, notes)
    except Skip:
        raise Skip('an unknown office format: save it as docx, xlsx, pptx or PDF') from None


READERS = {
    'text': read_text,
    'code': read_text,
    'data': read_text,
    'html': read_html,
    'notebook': read_notebook,
    'jsonl': read_json,
    'json': read_json,
    'csv': read_csv,
    'pdf': read_pdf,
    'parquet': read_parquet,
    'arrow': read_arrow,
    'hf': read_hf,
    'docx': read_docx,
    'pptx': read_pptx,
    'xlsx': read_xlsx,
    'odt': read_odt,
    'epub': read_epub,
    'rtf': read_rtf,
    'email': read_mail,
    'office': read_office,
}


def guarded(kind, path, options, notes):
    """The documents of a file; whatever goes wrong in there becomes Skip."""
    try:
        if 'again' in options:  # survey.py could not look at it
            raise OSError(options['again'], os.strerror(options['again']))
        yield from READERS[kind](path, options, notes)
    except (Skip, Unreachable):
        raise
    except Exception as error:  # readers stand on libraries that raise anything
        raise Skip(reason_of(error)) from None


def reason_of(error):
    """Why a file cannot be read, in a few words, from what a library raised."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, EOFError) or 'truncated' in str(error).lower():
        return 'truncated'
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, RecursionError):
        return 'unreadable (nested too deep)'
    name = type(error).__name__
    if name == 'BadZipFile':
        return 'damaged (zip archive inside)'
    if name.lower() == 'error':
        name = f'{type(error).__module__}.{name}'  # zlib.error
    return f'unreadable ({name})'
