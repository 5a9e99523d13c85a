"""Reads a PDF: the text of its pages, by pypdf or by pypdfium2, with what was done to it for print
undone.

    for text, last in pdf_text.read_pdf('paper.pdf', {'pdf': 'pypdf'}, notes): ...    # a page a piece
"""
import contextlib
import functools
import re

from mambino.prepare.encodings import clean
from mambino.prepare.files import Skip

LIGATURES = {0xfb00 + i: letters for i, letters in enumerate('ff fi fl ffi ffl st st'.split())}


def read_pdf(path, options, notes):
    """The text of the pages, an empty line between two; options['pdf']: a key of ENGINES."""
    with open(path, 'rb') as f:
        if b'%PDF-' not in f.read(1024):
            raise Skip('not a PDF')
    read_pages = ENGINES[options['pdf']]
    bad = 0
    written = False
    for read_page in read_pages(path):
        try:
            text = tidy_page(read_page())
        except MemoryError:
            raise
        except Exception:  # pypdf says that whatever comes is the caller's to catch
            bad += 1
            text = ''
        if text.strip():
            yield ('\n\n' if written else '') + text, False
            written = True
    if not written:
        raise Skip('unreadable pages' if bad else 'no text in the PDF (scanned?)')
    if bad:
        notes.append(f'{bad:,} pages could not be read')
    yield '\n', True


def pages_pypdf(path):
    """For each page a function that returns its text, or fails."""
    import logging

    import pypdf
    logging.disable(logging.CRITICAL)

    def read_page(i):
        return reader.pages[i].extract_text()

    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(pypdf.PdfReader(path))
            if reader.is_encrypted and not reader.decrypt(''):
                raise Skip('encrypted')
        except pypdf.errors.DependencyError:  # AES needs the package cryptography
            raise Skip('encrypted') from None
        for i in range(len(reader.pages)):
            yield functools.partial(read_page, i)


def pages_pdfium(path):
    """The same by pypdfium2, which is faster."""
    import pypdfium2

    def read_page(i):
        with contextlib.closing(document[i]) as page, contextlib.closing(page.get_textpage()) as text:
            return text.get_text_bounded()

    with open(path, 'rb') as f:  # not by name, which it wants in UTF-8
        try:
            document = pypdfium2.PdfDocument(f)
        except pypdfium2.PdfiumError as error:
            raise Skip('encrypted' if 'password' in str(error).lower() else 'damaged PDF') from None
        with contextlib.closing(document):
            for i in range(len(document)):
                yield functools.partial(read_page, i)


ENGINES = {'pypdf': pages_pypdf, 'pypdfium2': pages_pdfium}


def tidy_page(text):
    """Undoes what was done to a text for print: ligatures, and words broken at the end of a line.
    """
    def join(match):
        """A letter, a hyphen, the end of the line: joined with the letter after it, where both are
        small ones.
        """
        return match[1] if match[1].islower() and match[2].islower() else match[0]

    text = clean(text.translate(LIGATURES))
    text = text.replace('\xad\n', '').replace('\xad', '')
    text = re.sub(r'[\ufffe\x02]\n?', '-\n', text)  # pdfium's marks for a broken word
    text = re.sub(r'(\w)[-‐] ?\n(?=(\w))', join, text)
    text = re.sub(r'[\x00-\x08\x0b\x0e-\x1f]', '', text)
    return re.sub(r'[ \t]+\n', '\n', text).strip('\n')
