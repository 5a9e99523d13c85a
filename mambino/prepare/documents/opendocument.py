"""Reads OpenDocument files: texts, sheets and slides, as LibreOffice writes them.

    for text, last in opendocument.read_odt('letter.odt', options, notes): ...    # one document
    for text, last in opendocument.read_odt('sums.ods', options, notes): ...      # a document a sheet

All of them keep what they say in one XML file, content.xml, whose paragraphs and rows are taken as
they come, so that memory does not mind its length.
"""
import contextlib
import itertools
import xml.etree.ElementTree as ElementTree

from mambino.prepare.documents.office import PIECE, open_zip
from mambino.prepare.files import Skip
from mambino.prepare.tables.sheets import rows_of_sheets

NAMES = 'urn:oasis:names:tc:opendocument:xmlns:'
TEXT = f'{{{NAMES}text:1.0}}'
TABLE = f'{{{NAMES}table:1.0}}'
OFFICE = f'{{{NAMES}office:1.0}}'
PARAGRAPHS = (TEXT + 'p', TEXT + 'h')
CELLS = (TABLE + 'table-cell', TABLE + 'covered-table-cell')
# what nobody sees in the text: comments, deleted passages
UNSEEN = (OFFICE + 'annotation', TEXT + 'tracked-changes', TEXT + 'note-citation')
MOST_REPEATED = 1000  # cells or rows that a file says are alike


def read_odt(path, options, notes):
    """A text or slides: one document, an empty line between paragraphs, none between items of a list
    and rows of a table. Sheets: a document each, or each of their rows, as read_xlsx has it.
    """
    with contextlib.ExitStack() as stack:
        with open(path, 'rb') as f:
            is_zip = f.read(2) == b'PK'
        if is_zip:
            archive = stack.enter_context(open_zip(path))
            names = archive.namelist()
            if 'META-INF/manifest.xml' in names and b'encryption-data' in archive.read('META-INF/manifest.xml'):
                raise Skip('encrypted')
            if 'content.xml' not in names:
                raise Skip('damaged (no content.xml inside)')
            stream = stack.enter_context(archive.open('content.xml'))
        else:  # the flat form: all in one file of XML
            stream = stack.enter_context(open(path, 'rb'))
        try:
            content = Content(stream)
            documents = content.documents()
            first = next(documents, ('', True))  # by now it is known whether there are sheets
            documents = itertools.chain([first], documents)
            yield from rows_of_sheets(documents, options, notes) if content.is_sheets else documents
        except ElementTree.ParseError as error:
            raise Skip(f'damaged XML ({error})') from None


class Content:
    """Takes paragraphs, rows and sheets from a content.xml."""

    def __init__(self, stream):
        self.events = ElementTree.iterparse(stream, ('start', 'end'))
        self.parts = []       # text to pass on
        self.size = 0         # its characters
        self.before = ''      # what the last block was: 'paragraph', 'item' or 'row'
        self.depth = 0        # how many paragraphs are open: notes and frames stand inside others
        self.inner = []       # paragraphs that stand inside another
        self.unseen = 0       # how many elements are open that nobody sees
        self.items = 0        # how many lists
        self.rows = []        # the open rows: lists of cells
        self.cells = []       # the open cells: lists of paragraphs
        self.is_sheets = False

    def documents(self):
        """Yields (text, last)."""
        for event, element in self.events:
            if event == 'start':
                self.start(element)
                continue
            self.end(element)
            if self.is_sheets and element.tag == TABLE + 'table' and not self.rows:
                yield self.take() + '\n', True
                self.before = ''
            elif self.size > PIECE:
                yield self.take(), False
        if not self.is_sheets:
            yield self.take() + '\n', True

    def take(self):
        """The text to pass on."""
        text = ''.join(self.parts)
        self.parts = []
        self.size = 0
        return text

    def start(self, element):
        tag = element.tag
        self.unseen += tag in UNSEEN
        self.depth += tag in PARAGRAPHS
        self.items += tag == TEXT + 'list'
        self.is_sheets = self.is_sheets or tag == OFFICE + 'spreadsheet'
        if tag == TABLE + 'table-row':
            self.rows.append([])
        elif tag in CELLS:
            self.cells.append([])

    def end(self, element):
        tag = element.tag
        if tag in UNSEEN:
            self.unseen -= 1
            tail = element.tail
            element.clear()
            element.tail = tail
        elif tag in PARAGRAPHS:
            self.depth -= 1
            self.end_paragraph(element)
        elif tag == TEXT + 'list':
            self.items -= 1
        elif tag in CELLS and self.rows:
            text = ' '.join(filter(None, self.cells.pop()))
            self.rows[-1] += [text] * repeated(element, 'number-columns-repeated')
            element.clear()
        elif tag == TABLE + 'table-row':
            line = '\t'.join(self.rows.pop()).rstrip('\t')
            for _ in range(repeated(element, 'number-rows-repeated') if line.strip() else 0):
                self.add(line, 'row')
            element.clear()

    def end_paragraph(self, element):
        text = '' if self.unseen else ''.join(inline(element)).strip()
        tail = element.tail
        element.clear()
        element.tail = tail
        if self.depth:
            self.inner.append(text)
            return
        for block in [text, *self.inner]:
            self.add(block, 'item' if self.items else 'paragraph')
        self.inner.clear()

    def add(self, text, kind):
        """Takes a block of text, to the cell it stands in or to the document."""
        if not text:
            return
        if self.cells:
            self.cells[-1].append(' '.join(text.split()))
            return
        is_close = kind == self.before and kind != 'paragraph'
        gap = '' if not self.before else '\n' if is_close else '\n\n'
        self.parts.append(gap + text)
        self.size += len(text)
        self.before = kind


def repeated(element, attribute):
    """How often a cell or row stands there."""
    value = element.get(TABLE + attribute, '1')
    return min(int(value), MOST_REPEATED) if value.isdigit() else 1


def inline(element):
    """Yields the text in a paragraph."""
    yield collapse(element.text)
    for child in element:
        if child.tag == TEXT + 's':
            count = child.get(TEXT + 'c', '1')
            yield ' ' * (min(int(count), MOST_REPEATED) if count.isdigit() else 1)
        elif child.tag == TEXT + 'tab':
            yield '\t'
        elif child.tag == TEXT + 'line-break':
            yield '\n'
        else:
            yield from inline(child)
        yield collapse(child.tail)


def collapse(text):
    """White space of XML as it counts: runs of it are a blank."""
    if not text:
        return ''
    words = ' '.join(text.split())
    return (' ' if text[0].isspace() else '') + words + (' ' if words and text[-1].isspace() else '')
