"""sniff.py: what a file is by its content."""
import functools
import io
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import pace
from helpers.readers import make_pdf, read, reason, write

from mambino.prepare import sniff
from mambino.prepare.texts.encodings import Skip


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name.replace('__', '/')), content)  # of no time: the test's name has it
    return out.getvalue()


def ole(name):
    """The beginning of an Office file before 2007 that has this name in its directory."""
    head = bytearray(1024)
    head[:8] = sniff.OLE
    head[30] = 9
    head[512:512 + 2 * len(name)] = name.encode('utf-16-le')
    return bytes(head)


def parquet():
    out = io.BytesIO()
    pq.write_table(pa.table({'text': ['one']}), out)
    return out.getvalue()


KINDS = {
    'pdf': make_pdf(['text']),
    'parquet': parquet(),
    'docx': zipped(**{'[Content_Types].xml': '', 'word__document.xml': ''}),
    'pptx': zipped(**{'ppt__presentation.xml': '', '[Content_Types].xml': ''}),
    'xlsx': zipped(**{'[Content_Types].xml': '', 'xl__workbook.xml': ''}),
    'xls': ole('Workbook'),
    'odt': zipped(mimetype='application/vnd.oasis.opendocument.text', **{'content.xml': ''}),
    'epub': zipped(mimetype='application/epub+zip'),
    'zip': zipped(**{'a.txt': 'text'}),
    'rtf': b'{\\rtf1 text}',
    'html': b'\xef\xbb\xbf\n<!-- saved --><!DOCTYPE HTML><html><p>text',
    'email': b'From ann@example.org Mon Jan  2 10:00:00 2023\nSubject: text\n\ntext\n',
}


@pytest.mark.parametrize('kind', KINDS)
def test_the_content_decides(tmp_path, kind):
    data = KINDS[kind]
    kind = 'xlsx' if kind == 'xls' else kind
    for name, named in ('a.txt', 'text'), ('a.csv', 'csv'), (f'a.{kind}', kind), ('a', 'text'):
        notes = []
        assert sniff.kind_of(named, str(write(tmp_path / name, data)), notes) == kind
        assert len(notes) == (named != kind)
        assert all(note.endswith('whatever its name says') for note in notes)


@pytest.mark.parametrize('data, reason', [
    (b'\x89PNG\r\n\x1a\n' + bytes(99), 'a PNG image'),
    (b'\xff\xd8\xff\xe0' + bytes(99), 'a JPEG image'),
    (b'\x7fELF\2\1\1' + bytes(99), 'a program'),
    (b'MZ\x90\0\3' + bytes(99), 'a program'),
    (b'SQLite format 3\0' + bytes(99), 'a SQLite database'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'a Git LFS pointer: run git lfs pull'),
    (b'7z\xbc\xaf\x27\x1c' + bytes(99), 'a 7z archive: unpack it first'),
    (ole('WordDocument'), 'old Word format: save it as docx'),
    (ole('PowerPoint Document'), 'old PowerPoint format: save it as pptx'),
    (ole('EncryptedPackage'), 'encrypted'),
    (KINDS['docx'][:60], 'damaged docx')])
def test_what_nobody_reads_is_named(tmp_path, data, reason):
    with pytest.raises(Skip) as why:
        sniff.kind_of('docx', str(write(tmp_path / 'a.docx', data)), [])
    assert str(why.value) == reason


@pytest.mark.parametrize('named, text', [
    ('text', 'From here on it rained.\nNote: all day.\n'),
    ('text', 'PARENTS and GIFTS, MZ and BM, Rar and PKs\n'),
    ('text', 'We write <!doctype html> at the top of a page, <html> below.\n'),
    ('text', 'From 0123456789abcdef0123456789abcdef01234567 Mon Sep 17 00:00:00 2001\nFrom: Ann\n'),
    ('code', '<!doctype html>\n<p>{{ name }}</p>\n'),
    ('csv', 'id,text\n1,%PDF-1.4\n'),
    ('text', '')])
def test_texts_stay_what_their_names_say(tmp_path, named, text):
    notes = []
    assert sniff.kind_of(named, str(write(tmp_path / 'a.txt', text)), notes) == named
    assert not notes


def test_a_table_that_is_none(tmp_path):
    """An error page that was saved as a table, an Excel workbook called so."""
    page = '<!doctype html>\n<p>Not found</p>\n'
    for name in 'a.parquet', 'a.jsonl', 'a.csv', 'a.json', 'a.arrow', 'a.pdf', 'a.txt', 'a.docx':
        assert read(write(tmp_path / name, page)) == (['Not found\n'], ['is a web page, whatever its name says'])
    assert reason(write(tmp_path / 'b.csv', b'\x89PNG\r\n\x1a\n' + bytes(99))) == 'a PNG image'


def test_many_comments_are_soon_looked_through():
    xsl = '<?xml version="1.0"?>\n' + '<!-- a -->\n' * 300 + '<xsl:template>'
    for text in ('<!-- a --> ' * 400, xsl, '<!--' * 1000):
        head = text.encode()[:sniff.HEAD]
        match, seconds = pace.seconds_of(functools.partial(sniff.PAGE.match, head))
        assert not match and seconds < 0.3
    assert sniff.PAGE.match(b'<!-- a -->\n<!-- b -->\n<html>')
