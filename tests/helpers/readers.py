"""Files read as prepare.py reads them, and PDFs and tables to read, good ones and bad ones."""
import contextlib
import io
import os
import random
import sys
import zlib

import pyarrow
import pyarrow as pa
import pyarrow.parquet
import pyarrow.parquet as pq
import pytest

from mambino.prepare import archive, isolate, sources, survey
from mambino.prepare.files import Notes, Skip, judge

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OPTIONS = dict(text_column='', max_file_mb=256, pdf='pypdf', file_seconds=20, file_memory_mb=1024)
linux = pytest.mark.skipif(
    sys.platform != 'linux', reason='limits of memory, and /proc, are of Linux'
)


def read(path, **options):
    """(documents, notes) of a file."""
    path = str(path)
    kind = sources.kind_of(os.path.basename(path))[0] or 'text'
    notes, documents, parts = Notes(), [], []
    options = OPTIONS | options
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            kept, plans, skipped = survey.survey([sources.Source(path, kind, 0, 0)], options)
        except SystemExit:
            raise Skip(said.getvalue().strip().partition(': ')[2]) from None
    if skipped:
        raise Skip(skipped[0]['reason'])
    source = isolate.look(kept[0], notes)
    for text, last in archive.read(source, options | plans[0], notes):
        text.encode('utf-8')  # there is nothing in it that UTF-8 cannot hold
        assert '\r' not in text and '\0' not in text
        parts.append(text)
        if last:
            documents.append(''.join(parts))
            parts = []
    reason, lines = judge(notes.taken, notes.lost)
    if reason:
        raise Skip(reason)
    return documents, [*notes, *lines]


def reason(path, **options):
    """Why a file is skipped: a few words on one line."""
    with pytest.raises(Skip) as why:
        read(path, **options)
    assert 0 < len(str(why.value)) < 200 and '\n' not in str(why.value)
    return str(why.value)


def write(path, content):
    path.write_bytes(
        content if isinstance(content, (bytes, bytearray)) else content.encode('utf-8')
    )
    return path


def save_arrow(table, path, layout):
    with (pa.ipc.new_file if layout == 'file' else pa.ipc.new_stream)(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=300)


def alive(marks):
    """pids of processes with this in their environment."""
    pids = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/environ', 'rb') as f, open(f'/proc/{pid}/stat', 'rb') as g:
                if marks.encode() in f.read() and g.read().rsplit(b')')[1].split()[0] != b'Z':
                    pids.append(int(pid))
        except OSError:
            pass
    return pids


def make_pdf(pages, font='Helvetica', encryption=None):
    fpdf = pytest.importorskip('fpdf')
    pdf = fpdf.FPDF()
    for i, text in enumerate(pages):
        pdf.add_page()
        pdf.set_font([font, 'Times', 'Courier'][i % 3], size=12)
        if text:
            pdf.multi_cell(0, text=text)
    if encryption:
        pdf.set_encryption(**encryption)
    return bytes(pdf.output())


def raw_pdf(content, extra='', page='', more=()):
    """A PDF by hand. more: further objects, as bytes; the first of them is number 6."""
    if isinstance(content, str):
        stream = b'<< /Length %d >>\nstream\n%s\nendstream'
        content = stream % (len(content), content.encode('latin-1'))
    objects = [
        b'<< /Type /Catalog /Pages 2 0 R >>',
        b'<< /Type /Pages /Kids [3 0 R] /Count 1 >>',
        '<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R '
        f'/Resources << /Font << /F 5 0 R >> >> {page} >>'.encode(),
        content,
        b'<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>',
        *more,
    ]
    out = b'%PDF-1.7\n'
    offsets = []
    for i, text in enumerate(objects, 1):
        offsets.append(len(out))
        out += b'%d 0 obj\n%s\nendobj\n' % (i, text)
    table = ''.join(f'{offset:010d} 00000 n \n' for offset in offsets)
    n = len(objects) + 1
    trailer = f'trailer << /Size {n} /Root 1 0 R {extra} >>\nstartxref\n{len(out)}\n%%EOF'
    return out + f'xref\n0 {n}\n0000000000 65535 f \n{table}{trailer}'.encode()


def flate(data, times=1):
    for _ in range(times):
        data = zlib.compress(data, 9)
    stream = b'<< /Length %d /Filter [%s] >>\nstream\n%s\nendstream'
    return stream % (len(data), b'/FlateDecode ' * times, data)


def evil_pdfs():
    """{name: PDF} with constructs that are legal or nearly so, and cost a naive reader hours or
    gigabytes.
    """
    good = raw_pdf('BT /F 12 Tf 50 700 Td (text) Tj ET')
    return {
        # 44 MB of operators in 100 kB
        'burn': raw_pdf(flate(b'BT /F 12 Tf (a) Tj ET\n' * 2_000_000)),
        'bomb': raw_pdf(flate(bytes(300_000_000), 2)),  # 300 MB in a few hundred bytes
        'circle': good.replace(b'/Kids [3 0 R]', b'/Kids [2 0 R]'),  # the pages are their own child
        'crowd': good.replace(b'/Count 1', b'/Count 2000000000'),
        'deep': raw_pdf('[' * 200_000 + ' TJ'),
        'size': good.replace(b'/Size 6', b'/Size 2147483647'),
        'self': good.replace(b'/Contents 4 0 R', b'/Contents 3 0 R'),
        'length': good.replace(b'/Length 3', b'/Length 99999999999999999999'),
    }


def good_files():
    """{name: bytes} of small PDFs and tables, to be broken."""
    rng = random.Random(3)
    words = [''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 8))) for _ in range(300)]

    def text(n):
        return ' '.join(rng.choices(words, k=n))

    files = {'one.pdf': make_pdf([text(60)]), 'many.pdf': make_pdf([text(120) for _ in range(4)]),
             'plain.pdf': raw_pdf('BT /F 12 Tf 50 700 Td (' + text(50) + ') Tj ET')}
    for codec in ('none', 'snappy', 'zstd', 'gzip'):
        out = io.BytesIO()
        pq.write_table(
            pa.table({'id': range(200), 'text': [text(9) for _ in range(200)]}),
            out, row_group_size=60, compression=codec, data_page_size=500,
            use_dictionary=codec == 'snappy')
        files[f'{codec}.parquet'] = out.getvalue()
    return files


def broken_files(files, seed=0, flips=62):
    """Yields (name, bytes): every file truncated at ten places, and with bytes flipped."""
    rng = random.Random(seed)
    for name, data in files.items():
        stem, ending = os.path.splitext(name)
        for i in range(10):
            yield f'{stem}-cut{i}{ending}', data[:len(data) * (i + 1) // 11]
        for i in range(flips):
            broken = bytearray(data)
            for _ in range(rng.choice((1, 3, 10, 50))):
                # half of them near the end, where both formats keep what leads to the rest
                at = (
                    rng.randrange(len(data))
                    if i % 2
                    else rng.randrange(max(0, len(data) - 600), len(data))
                )
                broken[at] ^= 1 << rng.randrange(8)
            yield f'{stem}-flip{i}{ending}', bytes(broken)
