"""The section inputs: of how many files in public collections the text comes out right.

    --legacy=FOLDER    folders named after encodings, each with texts in it, as in Ousret/char-dataset
    --pdfs=FOLDER      any PDFs, as pdf.js and pypdf have them for their tests

A text is right where it is the one that the encoding in its folder's name gives, or one that browsers
take for that name. A PDF is counted where some text comes out of it; pypdfium2 alone, each page as it
gives it, stands beside that. Odd is a text of which 1 in 100 letters are replacement, private or
control characters and that bears no note.
"""
import glob
import os
import subprocess
import sys

from mambino.prepare import isolate
from mambino.prepare.files import Notes, Skip
from mambino.prepare.sources import Source
from mambino.prepare.texts.declared import codec_of
from mambino.prepare.texts.encodings import clean

OPTIONS = {'text_column': '', 'encoding': '', 'max_file_mb': 1000, 'pdf': 'pypdfium2', 'pdf_other': 'pypdf',
           'file_seconds': 60, 'file_memory_mb': 1024}
# what a name also stands for, beside its codec
WIDER = {'big5': 'cp950 big5hkscs', 'euc_jp': 'euc_jis_2004 euc_jisx0213', 'iso8859_2': 'cp1250', 'iso8859_7': 'cp1253',
         'iso8859_8': 'cp1255', 'shift_jis': 'shift_jis_2004 shift_jisx0213',
         'iso2022_jp': 'iso2022_jp_2 iso2022_jp_3 iso2022_jp_ext'}
# reads a PDF with pypdfium2 alone, in a process that may crash
ALONE = '''import sys, pypdfium2
with pypdfium2.PdfDocument(sys.argv[1]) as document:
    sys.exit(not any(page.get_textpage().get_text_bounded().strip() for page in document))'''


def measure(settings):
    """Prints the counts. There are no times, so no rows."""
    if settings.legacy:
        measure_legacy(settings.legacy)
    if settings.pdfs:
        measure_pdfs(settings.pdfs)
    return []


def text_of(path, kind):
    """(text of a file as prepare.py reads it, its notes); the text is '' where it is skipped."""
    notes = Notes()
    try:
        pieces = [text for text, _ in isolate.read(Source(path, kind, 0, 0), OPTIONS, notes)]
        return ''.join(pieces), notes
    except Skip as reason:
        return '', [str(reason)]


def measure_legacy(folder):
    """How many texts are decoded right."""
    right = []
    wrong = []
    for path in sorted(glob.glob(os.path.join(folder, '*', '*'))):
        name = os.path.basename(os.path.dirname(path))
        if name == 'None' or not os.path.isfile(path):
            continue  # there are files that are no text
        text, notes = text_of(path, 'text')
        if text.lstrip('\ufeff') in texts_in(path, name):
            right.append(path)
        else:
            wrong.append(path)
            print(f'wrong: {os.path.relpath(path, folder)}: {"; ".join(notes)[:100]}')
    print(f'legacy encodings: {len(right)} of {len(right) + len(wrong)} texts decoded right', flush=True)


def texts_in(path, name):
    """What the bytes of a file are in the encoding of this name."""
    with open(path, 'rb') as f:
        data = f.read()
    codecs = [name.replace('ibm', 'cp').replace('windows_', 'cp'), codec_of(name), *WIDER.get(name, '').split()]
    return {clean(data.decode(codec, 'replace')).lstrip('\ufeff') for codec in filter(None, codecs)}


def measure_pdfs(folder):
    """How many PDFs have a text, here and with pypdfium2 alone; and how many texts are odd."""
    read = 0
    alone = 0
    odd = []
    paths = sorted(glob.glob(os.path.join(folder, '**', '*.pdf'), recursive=True))
    for path in paths:
        text, notes = text_of(path, 'pdf')
        read += bool(text.strip())
        if is_odd(text) and not notes:
            odd.append(path)
        try:
            done = subprocess.run([sys.executable, '-c', ALONE, path], timeout=60, capture_output=True)
            alone += done.returncode == 0
        except subprocess.TimeoutExpired:
            pass
    for path in odd:
        print(f'odd, without a note: {os.path.relpath(path, folder)}')
    print(f'PDF: {read} of {len(paths)} read, pypdfium2 alone {alone}; {len(odd)} odd ones without a note', flush=True)


def is_odd(text):
    """Whether 1 in 100 of its letters are characters that no text has."""
    strange = sum(c == '\ufffd' or '\ue000' <= c <= '\uf8ff' or c < ' ' and c not in '\n\t\f' for c in text)
    return strange > len(text) / 100
