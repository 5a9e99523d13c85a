"""
What a file says: one reader for each kind of file, all of them giving Unicode text.

    for text, last in readers.guarded('pdf', 'paper.pdf', options, notes): ...    # its documents, long ones in pieces

    file ──► bytes (.gz .bz2 .xz .zst unpacked) ──► its encoding ──► documents ──► isolate.read(): clean()
               └► whatever is wrong with a file becomes Skip(reason) ──────────────► documents before that are kept

A document is a text that belongs together: a file, a row of a table, a notebook. A reader is a generator of (text, last):
`last` closes the document, so one of any length passes through in pieces. KINDS says which reader has which kind: a new
format is a function and a line there, and its extensions in sources.py.
"""
import bz2
import codecs
import contextlib
import csv
import gzip
import html.parser
import io
import itertools
import json
import lzma
import os
import re

CHUNK = 1 << 20        # bytes or characters that a reader takes at once
LONGEST_ROW = 1 << 26  # characters of a line of JSON, which is parsed as a whole
ROWS = 32              # of a table, that are in memory at once: each may be a book
COLUMNS = 'text content body document article story passage code'.split()  # what people call it

class Skip(Exception):
    """This file cannot be used; the message is the reason, a few words that can be counted."""

class Unreachable(Exception):
    """What an hf: input names cannot be had now. Unlike a broken file, that is reason to stop: later it may be there."""

# -----------------------------------------------------------------------------
# Bytes and encodings

def open_zst(path, mode):
    import pyarrow
    return pyarrow.CompressedInputStream(open(path, mode), 'zstd')

PACKED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': open_zst}

def open_bytes(path):
    """The file, unpacked if its name says that it is packed."""
    return PACKED.get(os.path.splitext(path)[1].lower(), open)(path, 'rb')

def open_text(path, encoding, newline=None):
    return io.TextIOWrapper(open_bytes(path), encoding, 'replace', newline=newline)

def chunks(path, most=0):
    """The bytes of a file in chunks of CHUNK. Skip where a packed file holds more than `most`, if given."""
    packed, size = os.path.splitext(path)[1].lower() in PACKED, 0
    with open_bytes(path) as f:
        while data := f.read(CHUNK):
            size += len(data)
            if packed and most and size > most:
                raise Skip(f'larger than {most / 1e6:g} MB unpacked')
            yield data

CONTROL = bytes(b for b in range(32) if b not in b'\t\n\f\r\b\x1b')
HIGH = bytes(range(128, 256))
# what cp1252 has for Western Europe; other languages' bytes, read as cp1252, also hit superscripts, eth and thorn
WESTERN = '€‚„…‘’“”•–—™œŒ¡£§©«®°´·»¿àáâãäåæçèéêëìíîïñòóôõöøùúûüÿßÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜ\xa0'.encode('cp1252')

def encoding_of(path, notes, whole=True, most=0):
    """
    The encoding of a text. `whole`: every byte is looked at, else the first 16 chunks. UTF-8 where that fits, or where all
    but a few bytes do; byte order marks; UTF-16 by its zeros; else a guess, which goes to notes. Skip('binary') for no text.
    """
    def parts():
        try:
            yield from chunks(path, most) if whole else itertools.islice(chunks(path), 16)
        except Exception:  # the rows before that place can be read
            if whole:
                raise

    head = next(parts(), b'')
    for mark in codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE:
        if head.startswith(mark):
            return 'utf-32' if len(mark) == 4 else 'utf-16'
    if len(head) - len(head.translate(None, CONTROL)) > 1 + 0.005 * len(head):
        encoding = guess_utf16(head[:1 << 16])
        if encoding is None:
            raise Skip('binary')
        notes.append('encoding guessed: ' + encoding)
        return encoding

    try:
        decoder = codecs.getincrementaldecoder('utf-8')()
        for part in parts():
            decoder.decode(part)
        decoder.decode(b'', final=whole)
        return 'utf-8-sig'
    except UnicodeDecodeError:
        pass
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    bad, good, doubtful = 0, 0, []  # bytes that are no UTF-8, bytes of letters beyond ASCII that are, lines with the former
    for part in parts():
        wrong = max(0, decoder.decode(part).count('\ufffd') - part.count('\ufffd'.encode()))
        bad, good = bad + wrong, good + len(part) - len(part.translate(None, HIGH)) - wrong
        if wrong and len(doubtful) < 1000:
            doubtful += re.findall(rb'[^\n]{0,400}[\x80-\xff][^\n]{0,400}', part)[:1000]
    bad += len(decoder.decode(b'', final=whole))
    if bad <= 0.05 * good:
        notes.append(f'{bad:,} bytes were no UTF-8')
        return 'utf-8-sig'
    encoding = guess_encoding(b'\n'.join(doubtful)[:1 << 16] or head[-1000:])
    if encoding is None:
        raise Skip('unknown encoding')
    notes.append(f'encoding guessed: {encoding}')
    return encoding

def guess_utf16(sample):
    """utf-16-le, utf-16-be or None: the zeros of ASCII letters, or only of spaces, lie on one side."""
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if min(even, odd) > 0.05 * max(even, odd) or even == odd:
        return None
    encoding = 'utf-16-le' if odd > even else 'utf-16-be'
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    return encoding if text and sum(c.isspace() or c.isprintable() for c in text) > 0.97 * len(text) else None

def guess_encoding(sample):
    """The likely encoding of lines that are not UTF-8, or None. cp1252 where it reads as Western European."""
    high = re.findall(rb'[\x80-\xff]+', sample)
    n = sum(map(len, high))
    in_words = sum(len(run) for run in high if len(run) >= 3)  # Western accents stand alone; Cyrillic or Greek does not
    strange = len(b''.join(high).translate(None, WESTERN))
    if n <= 2 + 0.3 * len(sample) and in_words <= 0.1 * n and strange <= 0.03 * n:
        return 'cp1252'
    try:
        from charset_normalizer import from_bytes  # comes with tiktoken, which asks for requests
    except ImportError:
        return None
    found = from_bytes(sample).best()
    return found.encoding if found else None

def clean(text):
    """Newlines are \\n, no NUL, no half of a surrogate pair: a text that UTF-8 can hold and gives back."""
    if '\r' in text:
        text = text.replace('\r\n', '\n').replace('\r', '\n')
    if '\0' in text:
        text = text.replace('\0', '')
    if not text.isascii():
        try:
            text.encode('utf-8')  # much faster than looking for a surrogate
        except UnicodeEncodeError:
            text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
    return text

# -----------------------------------------------------------------------------
# Readers: (path, options, notes) -> (text, last), ...

def read_text(path, options, notes):
    """The whole file is one document."""
    most = options['max_file_mb'] * 1e6
    decoder = codecs.getincrementaldecoder(encoding_of(path, notes, most=most))('replace')
    for data in chunks(path, most):
        yield decoder.decode(data), False
    yield decoder.decode(b'', final=True), True

class Page(html.parser.HTMLParser):
    """Collects what a browser would show; white space counts in <pre> alone. A block is between \v, or \f with empty lines."""
    BLOCK = set('''address article aside body caption center dd details dialog div dt fieldset figcaption figure footer form head
        header hr html li main nav option section summary tbody tfoot thead title tr'''.split())
    SPACED = set('blockquote dl h1 h2 h3 h4 h5 h6 ol p pre table ul'.split())
    HIDDEN = set('iframe noscript object script style svg template'.split())
    KEPT = str.maketrans(' \n\t', '\1\2\3')

    def __init__(self):
        super().__init__()
        self.out, self.hidden, self.pre = [], 0, 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in self.HIDDEN
        self.pre += tag == 'pre'
        self.mark(tag)

    def handle_endtag(self, tag):
        self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
        self.pre = max(0, self.pre - (tag == 'pre'))
        if tag not in ('br', 'td', 'th'):
            self.mark(tag)

    def mark(self, tag):
        if not self.hidden:
            self.out.append('\v' if tag in self.BLOCK else '\f' if tag in self.SPACED else '\n' if tag == 'br' else
                            '\t' if tag in ('td', 'th') else '')

    def handle_data(self, data):
        if not self.hidden:
            self.out.append(data.translate(self.KEPT) if self.pre else re.sub('[ \t\n\r\f]+', ' ', data))

    def parse_marked_section(self, i, report=1):
        return self.parse_bogus_comment(i)  # <![ and what nobody knows: the library's own raises AssertionError

    def text(self):
        text = re.sub(' +', ' ', ''.join(self.out))
        text = re.sub('[ \v\f\n]*[\v\f\n][ \v\f\n]*', lambda m: '\n\n' if '\f' in m[0] or m[0].count('\n') > 1 else '\n', text)
        text = re.sub(' ?\t ?', '\t', text).replace('\n\t', '\n').replace('\n\2', '\n')  # a line that ends after <pre> is none
        text = text.strip(' \n\t\2').translate({new: old for old, new in self.KEPT.items()})
        return text + '\n' if text.strip() else ''

def read_html(path, options, notes):
    """What a browser would show of it."""
    encoding = encoding_of(path, notes, most=options['max_file_mb'] * 1e6)
    said = re.search(rb'charset\s*=\s*["\']?\s*([\w.:-]+)', next(chunks(path), b'')[:4096], re.I)
    if said and not encoding.startswith('utf'):  # the page knows better, if that is an encoding at all
        try:
            name = codecs.lookup(said[1].decode()).name
            if b'<p>'.decode(name) == '<p>' and name != 'utf-8':
                encoding = 'cp1252' if name in ('iso8859-1', 'ascii') else name  # as browsers do
                notes.clear()
        except (LookupError, ValueError):
            pass
    page = Page()
    with open_text(path, encoding) as f:
        while text := f.read(1 << 16):
            page.feed(text)
    page.close()
    yield page.text(), True

def read_notebook(path, options, notes):
    """The markdown and code cells, an empty line between them."""
    try:
        with open_bytes(path) as f:
            book = json.loads(f.read(LONGEST_ROW).decode('utf-8-sig'))
        cells = book['cells'] if 'cells' in book else [cell for sheet in book['worksheets'] for cell in sheet['cells']]
        sources = [cell.get('source', cell.get('input', '')) for cell in cells if cell['cell_type'] in ('code', 'markdown', 'heading')]
        sources = [''.join(source).strip('\n') for source in sources if source]
        yield '\n\n'.join(filter(str.strip, sources)) + '\n' if any(sources) else '', True
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise Skip('not a notebook') from None

def text_of(value):
    """The text in a cell of a table: a str, or a list of them, one a line; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode('utf-8', 'replace')
    if isinstance(value, list) and value and all(isinstance(line, (str, bytes)) for line in value):
        return '\n'.join(map(text_of, value))
    return None

def choose_column(names, texts, wanted):
    """The column to read, of all `names` and those that hold texts; None where it is not clear."""
    if wanted:
        return wanted if wanted in names else None
    lower = {name.lower(): name for name in reversed(texts)}
    return next((lower[name] for name in COLUMNS if name in lower), texts[0] if len(texts) == 1 else None)

def holds_text(rows, name):
    """Whether a column of the first rows has text; one with a usual name may also be empty there."""
    values = [row.get(name) for row in rows]
    return any(map(text_of, values)) or name.lower() in COLUMNS and all(value in (None, '') for value in values)

def no_column(names, wanted):
    return Skip(f'no {"column " + wanted if wanted else "clear text column"} among: '
                + ', '.join(names[:8]) + (', ...' if len(names) > 8 else ''))

def rows_of(values, column, notes):
    """(text, True) for each of the values of a column that has text; counts the others."""
    empty = 0
    for value in values:
        text = text_of(value)
        if text is None:
            empty += 1
        else:
            yield text, True
    if empty:
        notes.append(f'{empty:,} rows without text in {column}')

def table_of(read_rows, options, notes, named=False):
    """
    rows_of the text column of rows of JSON, or of the rows where they are strings; None where it is not clear what to take.
    read_rows: a function that reads them, from the first one. named: only a column with one of the usual names will do.
    """
    first = list(itertools.islice(read_rows(), 20))
    dicts = [row for row in first if isinstance(row, dict)]
    if not dicts:
        return rows_of(read_rows(), 'a line', notes) if first and all(isinstance(row, str) for row in first) and not named else None
    names = list(dict.fromkeys(name for row in dicts for name in row))
    texts = [name for name in names if holds_text(dicts, name) and (not named or name.lower() in COLUMNS)]
    column = choose_column(names, texts, options['text_column'])
    if column is None and options['text_column'] and not named:
        raise no_column(names, options['text_column'])
    values = (row.get(column) if isinstance(row, dict) else None for row in read_rows())
    return None if column is None else rows_of(values, column, notes)

def read_jsonl(path, options, notes):
    """A document a line: its text column, or the line itself if it is a string. Without such a column: plain text."""
    encoding, bad = encoding_of(path, notes, whole=False), 0

    def lines():
        nonlocal bad
        bad = 0
        with open_text(path, encoding) as f:
            while line := f.readline(LONGEST_ROW):
                if len(line) == LONGEST_ROW and line[-1] != '\n':
                    bad += 1
                    while line and line[-1] != '\n':
                        line = f.readline(CHUNK)
                elif not line.isspace():
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError):
                        bad += 1

    rows = table_of(lines, options, notes)
    if rows is None:
        notes[:] = ['no clear text column; taken as plain text']
        rows, bad = read_text(path, options, notes), 0
    yield from rows
    if bad:
        notes.append(f'{bad:,} lines were no JSON')

def read_json(path, options, notes):
    """Plain text; but a list of objects with a text column is a table, as in jsonl."""
    rows = None
    with open_bytes(path) as f:
        data = f.read(LONGEST_ROW + 1)
    if len(data) <= LONGEST_ROW and data[:1000].lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'[':
        text = data.decode('utf-8-sig', 'replace')
        del data
        try:
            rows = table_of(lambda: json_rows(text), options, notes, named=True)  # being the only column is not enough here
        except (ValueError, RecursionError):
            pass
    yield from rows or read_text(path, options, notes)

def json_rows(text):
    """The items of a list, one after the other: as a whole they would need many times the memory of the text."""
    decoder, between = json.JSONDecoder(), re.compile(r'[ \t\r\n]*,?[ \t\r\n]*')
    at = between.match(text, text.index('[') + 1).end()
    while text[at:at + 1] != ']':
        row, at = decoder.raw_decode(text, at)
        yield row
        at = between.match(text, at).end()

def read_csv(path, options, notes):
    """A document a row, if the header names a text column; else plain text."""
    csv.field_size_limit(LONGEST_ROW)
    with open_text(path, encoding_of(path, notes, whole=False), newline='') as f:
        head = f.readline(CHUNK)
        delimiter = max('\t,;|', key=head.count)
        delimiter = delimiter if delimiter in head else '\x1f'  # one column: a row is a line, whatever is in it
        names = next(csv.reader([head], delimiter=delimiter), [])
        column = choose_column(names, [name for name in names if name.lower() in COLUMNS], options['text_column'])
        if column is None and options['text_column']:
            raise no_column(names, options['text_column'])
        if column is not None and (len(names) > 1 or options['text_column'] or column.lower() == 'text'):
            i = names.index(column)
            rows = (row[i] if i < len(row) else None for row in csv.reader(f, delimiter=delimiter) if row)
            yield from rows_of(rows, column, notes)
            return
    notes.clear()
    yield from read_text(path, options, notes)

def read_table(path, options, notes):
    """Parquet and Arrow: a document a row, from the text column; a batch of rows is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    pa.set_cpu_count(1)
    # types of text, and the same without a promise of UTF-8
    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}

    def is_text(field):
        t = getattr(field.type, 'value_type', field.type)  # of a list or a dictionary
        return t in raw or t in raw.values() and field.name.lower() in COLUMNS  # bytes might be anything

    def checked(array):
        """Strings as bytes, for not all that says UTF-8 is; raises for offsets that lead outside."""
        array = array.view(raw.get(array.type, array.type))
        array.validate(full=True)
        return array

    with open(path, 'rb') as f:  # not by name, which Arrow wants in UTF-8; not mapped, for that would count as memory
        if path.lower().endswith('.arrow'):
            is_file = f.read(6) == b'ARROW1'
            f.seek(0)
            reader = pa.ipc.open_file(f) if is_file else pa.ipc.open_stream(f)
            schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        else:
            reader = pq.ParquetFile(f, pre_buffer=False, buffer_size=1 << 20)
            schema, batches = reader.schema_arrow, None
        column = choose_column(schema.names, [field.name for field in schema if is_text(field)], options['text_column'])
        if column is None:
            raise no_column(schema.names, options['text_column'])
        batches = batches or reader.iter_batches(batch_size=ROWS, columns=[column], use_threads=False)
        arrays = (checked(batch.column(batch.schema.names.index(column))) for batch in batches)
        rows = (array[start:start + ROWS].to_pylist() for array in arrays for start in range(0, len(array), ROWS))
        yield from rows_of(itertools.chain.from_iterable(rows), column, notes)

LIGATURES = {0xfb00 + i: letters for i, letters in enumerate('ff fi fl ffi ffl st st'.split())}

def tidy_page(text):
    """Undoes what was done to a text for print: ligatures, and words broken at the end of a line."""
    text = clean(text.translate(LIGATURES))
    text = re.sub(r'[\ufffe\x02]\n?', '-\n', text.replace('\xad\n', '').replace('\xad', ''))  # pdfium's marks for a broken word
    text = re.sub(r'(\w)[-‐] ?\n(?=(\w))', lambda m: m[1] if m[1].islower() and m[2].islower() else m[0], text)
    text = re.sub(r'[\x00-\x08\x0b\x0e-\x1f]', '', text)
    return re.sub(r'[ \t]+\n', '\n', text).strip('\n')

def read_pdf(path, options, notes):
    """The text of the pages, an empty line between two; by pypdfium2, which is faster, where that is wanted."""
    with open(path, 'rb') as f:
        if b'%PDF-' not in f.read(1024):
            raise Skip('not a PDF')
    pages, bad, found = (pages_pdfium if options['pdf'] == 'pypdfium2' else pages_pypdf)(path), 0, False
    for page in pages:
        try:
            text = tidy_page(page())
        except MemoryError:
            raise
        except Exception:  # pypdf says that whatever comes is the caller's to catch
            bad, text = bad + 1, ''
        if text.strip():
            yield ('\n\n' if found else '') + text, False
            found = True
    if not found:
        raise Skip('unreadable pages' if bad else 'no text in the PDF (scanned?)')
    if bad:
        notes.append(f'{bad:,} pages could not be read')
    yield '\n', True

def pages_pypdf(path):
    """For each page a function that returns its text, or fails."""
    import logging
    import pypdf
    logging.disable(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(pypdf.PdfReader(path))
            if reader.is_encrypted and not reader.decrypt(''):
                raise Skip('encrypted')
        except pypdf.errors.DependencyError:  # AES needs the package cryptography
            raise Skip('encrypted') from None
        for i in range(len(reader.pages)):
            yield lambda: reader.pages[i].extract_text()

def pages_pdfium(path):
    """The same by pypdfium2."""
    import pypdfium2

    def text_of_page():
        with contextlib.closing(document[i]) as page, contextlib.closing(page.get_textpage()) as text:
            return text.get_text_bounded()

    with open(path, 'rb') as f:  # not by name, which it wants in UTF-8
        try:
            document = pypdfium2.PdfDocument(f)
        except pypdfium2.PdfiumError as error:
            raise Skip('encrypted' if 'password' in str(error).lower() else 'damaged PDF') from None
        with contextlib.closing(document):
            for i in range(len(document)):
                yield text_of_page

def read_hf(path, options, notes):
    """A dataset of the Hugging Face hub, streamed: hf:name, hf:name:config or hf:name:config:split."""
    try:
        rows = open_hf(path)
        if 'shard' in options:
            rows = rows.shard(*options['shard'])
        first = list(itertools.islice(rows, 20))
        names = list(dict.fromkeys(name for row in first for name in row))
        column = choose_column(names, [name for name in names if holds_text(first, name)], options['text_column'])
        if first and column is None:
            raise no_column(names, options['text_column'])
        yield from rows_of((row.get(column) for row in rows), column, notes)
    except Skip:
        raise
    except Exception as error:  # the hub, the net, the file formats behind it: anything
        raise unreachable(path, error) from None

def unreachable(spec, error):
    """Unreachable with what went wrong, on one line."""
    said = str(error).partition('\n')[0]
    return Unreachable(f'{spec}: {type(error).__name__}: {said}')

def open_hf(spec):
    """hf:name[:config[:split]] → a streamed datasets.IterableDataset."""
    import datasets
    datasets.disable_progress_bars()
    name, config, split = (spec[3:].split(':') + ['', ''])[:3]
    return datasets.load_dataset(name, config or None, split=split or 'train', streaming=True)

KINDS = {'text': read_text, 'code': read_text, 'data': read_text, 'html': read_html, 'notebook': read_notebook, 'jsonl': read_jsonl,
         'csv': read_csv, 'pdf': read_pdf, 'parquet': read_table, 'arrow': read_table, 'hf': read_hf}

def guarded(kind, path, options, notes):
    """The documents of a file; whatever goes wrong in there becomes Skip."""
    read = read_json if kind == 'data' and re.search(r'\.json(\.\w+)?$', path.lower()) else KINDS[kind]
    try:
        yield from read(path, options, notes)
    except (Skip, Unreachable):
        raise
    except Exception as error:  # readers stand on libraries that raise anything
        name, errno = type(error).__name__, getattr(error, 'errno', None)
        name = f'{type(error).__module__}.{name}' if name.lower() == 'error' else name  # zlib.error
        raise Skip('needs too much memory' if isinstance(error, MemoryError) else
                   'truncated' if isinstance(error, EOFError) or 'truncated' in str(error).lower() else
                   os.strerror(errno) if isinstance(error, OSError) and errno else
                   'unreadable (nested too deep)' if isinstance(error, RecursionError) else f'unreadable ({name})') from None
