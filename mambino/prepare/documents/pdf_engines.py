"""The two packages that read PDFs, behind one face.

    engine = pdf_engines.ENGINES['pypdfium2']('paper.pdf')    # Skip: encrypted, damaged
    for i in range(len(engine)):
        text, doubt = engine.read(i)    # of a page, as the package gives it; fails with anything
    engine.close()

`doubt` is what only the package knows: UNSURE where the fonts do not say which letters they show,
LOST where there are far fewer letters than there are places with text, '' otherwise.
"""
import contextlib
import logging

from mambino.prepare.documents.legible import letters_in
from mambino.prepare.files import Skip

UNSURE = 'unsure'
LOST = 'lost'
PROBED = 64          # letters of a page that are asked whether their font knows what they are
PROBED_OBJECTS = 20_000  # things drawn on a page that are looked at, whether they are text


class Pypdf:
    """By pypdf: in Python alone, installed with requirements.txt."""

    def __init__(self, path):
        import pypdf
        logging.disable(logging.CRITICAL)
        self.stack = contextlib.ExitStack()
        try:
            self.reader = self.stack.enter_context(pypdf.PdfReader(path))
            if self.reader.is_encrypted:
                if not self.reader.decrypt(''):
                    raise Skip('encrypted')
                self.try_first_page()
        except pypdf.errors.DependencyError:
            raise Skip('encrypted with AES, which pypdf reads with cryptography: pip install cryptography') from None

    def try_first_page(self):
        """Where a package is missing for AES of 128 bits, that is seen only here."""
        import pypdf
        try:
            self.reader.pages[0].get_contents()
        except pypdf.errors.DependencyError:
            raise
        except Exception:  # for read() to tell
            pass

    def __len__(self):
        return len(self.reader.pages)

    def close(self):
        self.stack.close()

    def read(self, i):
        """(text, doubt) of page i, what is written in its form fields at the end."""
        page = self.reader.pages[i]
        return '\n'.join([page.extract_text(), *self.fields(page)]), ''

    def fields(self, page):
        """What is written in the form fields and boxes of a page."""
        from pypdf.generic import TextStringObject
        texts = []
        for annotation in page.get('/Annots') or []:
            field = annotation.get_object()
            kind = field.get('/Subtype')
            value = field.get('/V') if kind == '/Widget' else field.get('/Contents') if kind == '/FreeText' else None
            if value is None and kind == '/Widget' and '/Parent' in field:
                value = field['/Parent'].get('/V')
            if isinstance(value, TextStringObject):
                texts.append(value)
        return texts


class Pdfium:
    """By pypdfium2, which is faster."""

    def __init__(self, path):
        import pypdfium2
        self.file = open(path, 'rb')  # not by name, which it wants in UTF-8
        try:
            self.document = pypdfium2.PdfDocument(self.file)
        except pypdfium2.PdfiumError as error:
            self.file.close()
            raise Skip('encrypted' if 'password' in str(error).lower() else 'damaged PDF') from None
        self.has_forms = False

    def __len__(self):
        return len(self.document)

    def close(self):
        self.document.close()
        self.file.close()

    def read(self, i):
        """(text, doubt) of page i, what is written in its form fields at the end."""
        with contextlib.closing(self.document[i]) as page, contextlib.closing(page.get_textpage()) as text_page:
            result = text_page.get_text_bounded()
            written_on = has_fields(page)
            doubt = doubt_of(page, text_page, result)
        if written_on:
            result = self.read_flat(i)
        return result, doubt

    def read_flat(self, i):
        """The text of a page with that of its form fields and boxes."""
        if not self.has_forms:
            self.has_forms = True
            self.document.init_forms()
        import pypdfium2.raw as pdfium
        with contextlib.closing(self.document[i]) as page:
            pdfium.FPDFPage_Flatten(page, pdfium.FLAT_NORMALDISPLAY)
        with contextlib.closing(self.document[i]) as page, contextlib.closing(page.get_textpage()) as text_page:
            return text_page.get_text_bounded()


def has_fields(page):
    """Whether a page of pdfium has form fields, or boxes with text on it."""
    import pypdfium2.raw as pdfium
    for k in range(pdfium.FPDFPage_GetAnnotCount(page)):
        annotation = pdfium.FPDFPage_GetAnnot(page, k)
        kind = pdfium.FPDFAnnot_GetSubtype(annotation)
        pdfium.FPDFPage_CloseAnnot(annotation)
        if kind in (pdfium.FPDF_ANNOT_WIDGET, pdfium.FPDF_ANNOT_FREETEXT):
            return True
    return False


def doubt_of(page, text_page, text):
    """What pdfium knows against the text of a page: UNSURE, LOST or ''."""
    import pypdfium2.raw as pdfium
    n = text_page.count_chars()
    probed = range(0, n, max(1, n // PROBED))
    unsure = sum(pdfium.FPDFText_HasUnicodeMapError(text_page, k) == 1 for k in probed)
    if unsure > 0.1 * len(probed):
        return UNSURE
    letters = letters_in(text)
    objects = pdfium.FPDFPage_CountObjects(page)
    if objects > letters:
        kinds = [pdfium.FPDFPageObj_GetType(pdfium.FPDFPage_GetObject(page, k))
                 for k in range(min(objects, PROBED_OBJECTS))]
        if letters < 0.7 * kinds.count(pdfium.FPDF_PAGEOBJ_TEXT):
            return LOST
    return ''


ENGINES = {'pypdf': Pypdf, 'pypdfium2': Pdfium}
