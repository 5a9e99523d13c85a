"""office.py, opendocument.py, epub.py, mail.py and archive.py: what office programs, readers of books
and mail write, and archives of it all.
"""
import datetime
import gzip
import io
import tarfile
import zipfile

import pytest
from helpers.office import make_docx, make_epub, make_message, make_odt, make_xlsx, paragraph, zipped
from helpers.readers import linux, make_pdf, read, reason, write

from mambino.prepare import isolate

pytestmark = pytest.mark.usefixtures('no_reader_left')


# -----------------------------------------------------------------------------
# Documents

def test_docx(tmp_path):
    pytest.importorskip('mammoth')
    cells = ''.join(f'<w:tc>{paragraph(a)}{paragraph(b)}</w:tc>' for a, b in (('a', 'b'), ('c', 'd')))
    body = (
        paragraph('The title', '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>') + paragraph('Fish &amp; chips, naïve')
        + f'<w:sdt><w:sdtContent>{paragraph("in a control")}</w:sdtContent></w:sdt>'
        + '<w:p><w:ins w:id="1"><w:r><w:t>put in</w:t></w:r></w:ins><w:del w:id="2"><w:r><w:delText>taken out'
        '</w:delText></w:r></w:del><w:r><w:footnoteReference w:id="2"/><w:br/><w:t>next so</w:t><w:softHyphen/>'
        '<w:t>ft</w:t></w:r></w:p>'
        + '<w:p><w:fldSimple w:instr="SEQ"><w:r><w:t>7</w:t></w:r></w:fldSimple><w:r><w:ruby><w:rt><w:r><w:t>kan</w:t>'
        '</w:r></w:rt><w:rubyBase><w:r><w:t>漢</w:t></w:r></w:rubyBase></w:ruby></w:r></w:p>'
        + f'<w:tbl><w:tr>{cells}</w:tr><w:tr>{cells}</w:tr></w:tbl>'
        + '<w:p><m:oMath><m:r><m:t>x</m:t></m:r></m:oMath><w:r><w:t>the end</w:t></w:r></w:p>')
    documents, notes = read(write(tmp_path / 'a.docx', make_docx(body)))
    assert documents == [
        'The title\n\nFish & chips, naïve\n\nin a control\n\nput in[1]\nnext soft\n\n7漢\n\n'
        'a b\tc d\na b\tc d\n\nthe end\n\n'
        'the footnote\n']
    assert notes == ['1 formulas left out']
    # whatever it is called
    assert read(write(tmp_path / 'a.doc', make_docx(paragraph('text')))) == (
        ['text\n'], ['is a Word document, whatever its name says'])
    assert reason(write(tmp_path / 'b.docx', make_docx(body)[:400])) == 'damaged docx'
    assert reason(write(tmp_path / 'c.docx', b'no\0text')) == 'damaged (no zip archive inside)'
    assert read(write(tmp_path / 'd.docx', 'text')) == (['text'], ['is plain text, whatever its name says'])


def test_what_is_left_out_of_a_docx_is_counted(tmp_path):
    pytest.importorskip('mammoth')
    formula = '<w:p><w:r><w:t>Let</w:t></w:r><m:oMath><m:r><m:t>x</m:t></m:r></m:oMath></w:p>'
    box = (f'<w:p><w:r><w:drawing xmlns:wps="urn:wps"><wps:txbx><w:txbxContent>{paragraph("in it")}'
           '</w:txbxContent></wps:txbx></w:drawing></w:r></w:p>')
    assert read(write(tmp_path / 'a.docx', make_docx(formula * 3 + box)))[1] == [
        '3 formulas left out', '1 text boxes left out']


def test_rtf(tmp_path):
    pytest.importorskip('striprtf')
    text = (r'{\rtf1\ansi\ansicpg1251{\fonttbl{\f0 Arial;}}{\info{\title hidden}}Two  words\par Second \b bold\b0 .'
            r"\line \u8364? \'cf\'f0\'e8\'e2\'e5\'f2{\footnote a note}\par{\pict 8950}\trowd a\cell b\cell\row end}")
    assert read(write(tmp_path / 'a.rtf', text)) == (
        ['Two  words\nSecond bold.\n€ Привет a note\na\tb\nend'], [])
    assert read(write(tmp_path / 'a.doc', r'{\rtf1 text\par}')) == (
        ['text\n'], ['is an RTF document, whatever its name says'])
    assert read(write(tmp_path / 'a.rtf.gz', gzip.compress(rb'{\rtf1 text\par}')))[0] == ['text\n']
    assert reason(write(tmp_path / 'b.rtf', 'no RTF')) == 'not an RTF document'


def test_odt(tmp_path):
    text = ('<office:text><text:tracked-changes><text:p>gone</text:p></text:tracked-changes><text:h>Head</text:h>'
            '<text:p>One  <text:span>two</text:span><text:s text:c="2"/>three<text:tab/>four<text:line-break/>five'
            '<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>A note.</text:p>'
            '</text:note-body></text:note><office:annotation><text:p>hm</text:p></office:annotation> six.</text:p>'
            '<text:list><text:list-item><text:p>first</text:p></text:list-item><text:list-item><text:p>second'
            '</text:p></text:list-item></text:list><table:table><table:table-row><table:table-cell><text:p>a</text:p>'
            '<text:p>b</text:p></table:table-cell><table:table-cell><text:p>c</text:p></table:table-cell>'
            '</table:table-row></table:table><text:p>End.</text:p></office:text>')
    assert read(write(tmp_path / 'a.odt', make_odt(text)))[0] == [
        'Head\n\nOne two  three\tfour\nfive six.\n\nA note.\n\nfirst\nsecond\n\na b\tc\n\nEnd.\n']
    sheets = ('<office:spreadsheet><table:table><table:table-row><table:table-cell table:number-columns-repeated="2">'
              '<text:p>a</text:p></table:table-cell><table:table-cell table:number-columns-repeated="16000"/>'
              '</table:table-row><table:table-row table:number-rows-repeated="1000000"><table:table-cell/>'
              '</table:table-row><table:table-row><table:table-cell/><table:table-cell><text:p>b</text:p>'
              '</table:table-cell></table:table-row></table:table><table:table><table:table-row><table:table-cell>'
              '<text:p>c</text:p></table:table-cell></table:table-row></table:table></office:spreadsheet>')
    assert read(write(tmp_path / 'a.ods', make_odt(sheets)))[0] == ['a\ta\n\tb\n', 'c\n']
    assert reason(write(tmp_path / 'b.odt', make_odt(text, '<m><encryption-data/></m>'))) == 'encrypted'
    assert reason(write(tmp_path / 'c.odt', make_odt('<broken>'))).startswith('damaged XML')


def test_epub(tmp_path):
    page = ('<html><head><title>Book</title></head><body><h1>{0}</h1><script src="x"/><p>It is {0}, naïve.</p>'
            '</body></html>')
    chapters = {'b.xhtml': page.format('second'), 'a b.xhtml': page.format('first')}
    first, second = (f'{name}\n\nIt is {name}, naïve.\n' for name in ('first', 'second'))
    assert read(write(tmp_path / 'a.epub', make_epub(chapters, ['a b.xhtml', 'b.xhtml']))) == (
        [first + '\n' + second], [])
    many = {f'{i}.xhtml': page.format(i) for i in range(9)} | {'gone.xhtml': None}
    assert read(write(tmp_path / 'b.epub', make_epub(many)))[1] == ['1 of 10 chapters are missing']
    assert reason(write(tmp_path / 'c.epub', make_epub(chapters | {'gone.xhtml': None}))) == (
        'damaged epub (1 of 3 chapters are missing)')
    locked = {'META-INF/encryption.xml': '<e xmlns="x"><CipherReference URI="book/b.xhtml"/></e>'}
    assert reason(write(tmp_path / 'd.epub', make_epub(chapters, more=locked))) == 'encrypted'
    assert reason(write(tmp_path / 'e.epub', zipped({'mimetype': 'application/epub+zip'}))).startswith('damaged epub')


# -----------------------------------------------------------------------------
# Slides and sheets

def test_pptx(tmp_path):
    pptx = pytest.importorskip('pptx')
    from pptx.chart.data import CategoryChartData
    from pptx.enum.chart import XL_CHART_TYPE
    show = pptx.Presentation()
    slide = show.slides.add_slide(show.slide_layouts[1])
    slide.shapes.title.text = 'First slide'
    slide.placeholders[1].text = 'one\ntwo'
    table = slide.shapes.add_table(2, 2, 0, 0, 99, 99).table
    for row in range(2):
        for column in range(2):
            table.cell(row, column).text = f'{row}, {column}'
    slide.shapes.add_group_shape().shapes.add_textbox(0, 0, 9, 9).text_frame.text = 'in a group'
    slide.notes_slide.notes_text_frame.text = 'say this'
    slide = show.slides.add_slide(show.slide_layouts[5])
    slide.shapes.title.text = 'Second slide'
    chart = CategoryChartData()
    chart.categories = ['a']
    chart.add_series('b', (1,))
    slide.shapes.add_chart(XL_CHART_TYPE.PIE, 0, 0, 9, 9, chart)
    show.save(tmp_path / 'a.pptx')
    text = 'First slide\none\ntwo\n0, 0\t0, 1\n1, 0\t1, 1\nin a group\n\nsay this\n\nSecond slide\n'
    assert read(tmp_path / 'a.pptx') == ([text], ['1 charts and drawings left out'])
    # one that begins as a show, which python-pptx itself refuses
    with zipfile.ZipFile(tmp_path / 'a.pptx') as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files['[Content_Types].xml'] = files['[Content_Types].xml'].replace(b'presentation.main+xml', b'slideshow.main+xml')
    assert read(write(tmp_path / 'b.ppsx', zipped(files)))[0] == [text]


def test_xlsx(tmp_path):
    pytest.importorskip('python_calamine')
    rows = [['name', None, 'when'], ['Ann\nof the hills', 3.0, datetime.date(2020, 1, 2)], [], [True, 1.5, 'é']]
    data = make_xlsx([rows, [['second sheet']], []])
    documents = ['name\t\twhen\nAnn of the hills\t3\t2020-01-02\nTRUE\t1.5\té\n', 'second sheet\n', '']
    assert read(write(tmp_path / 'a.xlsx', data)) == (documents, [])
    for name in 'a.csv', 'a.txt', 'a.docx':
        assert read(write(tmp_path / name, data)) == (documents, ['is an Excel workbook, whatever its name says'])
    assert read(write(tmp_path / 'b.xls', 'a\tb\nc\td\n')) == (
        ['a\tb\nc\td\n'], ['is plain text, whatever its name says'])
    assert reason(write(tmp_path / 'c.xlsx', data), file_memory_mb=0.001) == (
        'needs too much memory: more than --file_memory_mb')


def test_formulas_that_nobody_has_computed_are_counted(tmp_path):
    pytest.importorskip('python_calamine')
    data = make_xlsx([[['a text', 'here']]])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    cells = ('<c r="C1"><f>1+1</f><v></v></c><c r="D1"><f>A1</f><v/></c><c r="E1"><f>1+1</f><v>2</v></c>'
             '<c r="F1" t="str"><f>""</f><v></v></c>')
    name = 'xl/worksheets/sheet1.xml'
    files[name] = files[name].replace(b'</row>', cells.encode() + b'</row>')
    documents, notes = read(write(tmp_path / 'a.xlsx', zipped(files)))
    assert documents[0].startswith('a text\there')
    assert notes == ['2 cells of formulas have no value: save it once with a spreadsheet program']


def test_the_column_of_a_sheet_that_is_asked_for(tmp_path):
    pytest.importorskip('python_calamine')
    rows = [['id', 'Body'], [1, 'bread and tea'], [2, None], [3, 'rain']]
    path = write(tmp_path / 'a.xlsx', make_xlsx([rows, [['id'], [1]]]))
    assert read(path, text_column='body') == (['bread and tea', 'rain'], [
        '1 rows without text in Body', 'a sheet was left out: no column body among: id'])
    assert read(path, text_column='id,body')[0] == ['1\n\nbread and tea', '2', '3\n\nrain']
    assert reason(path, text_column='bodi') == 'no column bodi among: id, Body, did you mean Body?'
    table = ''
    for row in rows:
        cells = [f'<table:table-cell><text:p>{cell or ""}</text:p></table:table-cell>' for cell in row]
        table += f'<table:table-row>{"".join(cells)}</table:table-row>'
    path = write(tmp_path / 'a.ods', make_odt(f'<office:spreadsheet><table:table>{table}'
                                              '</table:table></office:spreadsheet>'))
    assert read(path, text_column='body')[0] == ['bread and tea', 'rain']


# -----------------------------------------------------------------------------
# Mail

HEAD = 'From: Ann Ärmel\nTo: Bob\nDate: Mon, 02 Jan 2023 10:00:00 +0000\nSubject: Grüße aus den Bergen\n\n'


def test_messages(tmp_path):
    both = make_message('Schöne Grüße = viele.\n', '<p>no', b'%PDF-1.4')
    assert read(write(tmp_path / 'a.eml', both)) == ([HEAD + 'Schöne Grüße = viele.\n'], ['1 attachments left out'])
    for page in (
        b'Content-Type: text/html; charset=windows-1251\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n'
        b'<title>no</title><p>=CF=F0=E8=E2=E5=F2<br>again</p>',
        'Content-Type: text/html\n\n<meta charset=utf-8><p>Привет<br>again'.encode(),
        'Content-Type: text/plain; charset=none-such\n\nПривет\nagain'.encode()):
        message = b'Subject: =?utf-8?B?w6k=?=\n' + page
        assert read(write(tmp_path / 'b.eml', message))[0] == ['Subject: é\n\nПривет\nagain\n']
    forwarded = (b'Subject: Fwd\nContent-Type: multipart/mixed; boundary=B\n\n--B\n\nSee below.\n--B\n'
                 b'Content-Type: message/rfc822\n\nSubject: Old\n\nThe old text.\n--B--\n')
    assert read(write(tmp_path / 'c.eml', forwarded))[0] == [
        'Subject: Fwd\n\nSee below.\n\nSubject: Old\n\nThe old text.\n']
    saved = (b'From: <Saved by a browser>\nSubject: Page\nContent-Type: multipart/related; boundary=B\n\n--B\n'
             b'Content-Type: text/html\n\n<p>the page\n--B\nContent-Type: image/png\n\nx\n--B--\n')
    assert read(write(tmp_path / 'd.mht', saved)) == (['the page\n'], [])
    assert read(write(tmp_path / 'd.html', saved)) == (['the page\n'], ['is mail, whatever its name says'])
    assert reason(write(tmp_path / 'e.eml', 'just a text')) == 'no mail'


def test_mailboxes(tmp_path):
    mailbox = (b'From ann@example.org Mon Jan  2 10:00:00 2023\n' + make_message('One.\n')
               + b'\nFrom bob Mon Jan  2 11:00:00 2023\nSubject: two\n\nTwo.\n>From here on\n\n'
               + b'From now on this is text\n')
    documents = [HEAD + 'One.\n', 'Subject: two\n\nTwo.\nFrom here on\n\nFrom now on this is text\n']
    assert read(write(tmp_path / 'a.mbox', mailbox)) == (documents, [])
    assert read(write(tmp_path / 'a.txt', mailbox)) == (documents, ['is mail, whatever its name says'])


def test_messages_that_are_more_than_they_seem(tmp_path):
    parts = 'Content-Type: text/{}\n\n{}\n'
    both = '--B\n'.join(['', parts.format('plain', 'See the page.'), parts.format('html', '<p>A long letter. ' * 9)])
    head = 'Subject: x\nContent-Type: multipart/alternative; boundary=B\n\n'
    assert read(write(tmp_path / 'a.eml', head + both))[0][0].count('A long letter.') == 9
    assert read(write(tmp_path / 'b.eml', head + 'No part begins.\n')) == (['Subject: x\n\nNo part begins.\n'], [])


def test_what_does_not_fit_the_encoding_of_a_message_is_counted(tmp_path):
    head = b'From a@example.org Mon Jan  2 10:00:00 2023\nSubject: x\nContent-Type: text/plain; charset='
    russian = 'Привет, как дела? Всё хорошо.'
    message = head + b'none\n\n' + russian.encode('cp1251') + b'\n\n'
    documents, notes = read(write(tmp_path / 'a.mbox', message * 3))
    assert documents == [f'Subject: x\n\n{russian}\n'] * 3
    assert notes == [f'encoding guessed: cp1251, as in "{russian}" (and 2 more like it)']
    wrong = head + b'gbk\n\n' + '你好，世界。'.encode('gbk') * 200 + b'\xff\n\n'
    assert read(write(tmp_path / 'b.mbox', wrong * 3))[1] == ['3 bytes were no gb18030']


def test_a_sentence_does_not_begin_a_message(tmp_path):
    text = 'One.\n\nFrom the beginning of 2001 we knew\nthat it was.\n'
    mailbox = f'From a@example.org Mon Jan  2 10:00:00 2023\nSubject: x\n\n{text}'
    assert read(write(tmp_path / 'a.mbox', mailbox))[0] == [f'Subject: x\n\n{text}']


def test_what_is_guessed_of_a_chapter_is_noted(tmp_path):
    chapter = '<html><body><p>Вчера вечером мы долго гуляли.</p></body></html>'.encode('cp1251')
    notes = read(write(tmp_path / 'a.epub', make_epub({'one.xhtml': chapter})))[1]
    assert len(notes) == 1 and notes[0].startswith('one.xhtml: encoding guessed: cp1251, as in ')


# -----------------------------------------------------------------------------
# Archives

def test_archives(tmp_path):
    files = {
        'b/letter.odt': make_odt('<office:text><text:p>a letter</text:p></office:text>'),
        'a/old.txt': 'café, naïve\n'.encode('cp1252'),
        'rows.jsonl': '{"text": "row one"}\n{"text": "row two"}\n', 'paper.txt': make_pdf(['a paper']),
        'a.jpg': b'\xff\xd8\xff', '__MACOSX/._a.txt': 'x', '../out.txt': 'x', 'in.zip': 'x',
        'in.txt': zipped({'a.txt': 'x'}), 'node_modules/a.js': 'x', 'empty.txt': '', 'id_rsa': 'x',
        'key.txt': '-----BEGIN PRIVATE KEY-----\nx', 'rows.csv': 'id,text\n' + '1,a row of a table\n' * 3,
        'broken.pdf': '%PDF-',
    }
    documents = ['a letter\n', 'café, naïve\n', 'row one', 'row two', 'a paper\n'] + ['a row of a table'] * 3
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind in ('folder', tarfile.DIRTYPE), ('link.txt', tarfile.SYMTYPE):
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = '/etc/passwd'
            archive.addfile(member)
    for name, data in ('a.zip', zipped(files)), ('a.tar.gz', out.getvalue()), ('a.tgz', out.getvalue()):
        found, notes = read(write(tmp_path / name, data))
        assert found == documents
        assert notes[-1].startswith('left out of it: 2 hidden, 2 an archive in an archive, ')
        assert all(why in notes[-1] for why in ('1 unknown type .jpg', '1 excluded', '1 empty', '1 a secret, '))
        assert '1 a secret (private key)' in notes[-1]
        assert any(note.startswith('paper.txt: is a PDF') for note in notes)
    assert reason(write(tmp_path / 'b.zip', zipped({'a.jpg': 'x'}))) == 'nothing readable in it (1 unknown type .jpg)'
    assert reason(write(tmp_path / 'c.zip', zipped({}))) == 'an empty archive'


def test_a_table_in_an_archive_is_judged_as_a_whole(tmp_path):
    rows = '{"text": "a row of text"}\n' * 3 + '{"text": broken\n'
    documents, notes = read(write(tmp_path / 'a.zip', zipped({'rows.jsonl': rows, 'a.txt': 'A text.'})))
    assert documents == ['A text.']
    assert 'rows.jsonl: too much of it is lost: 1 lines were no JSON' in notes[-1]


def test_locked_archives(tmp_path):
    data = bytearray(zipped({'a.txt': 'secret'}))
    data[6] |= 1
    data[data.index(b'PK\1\2') + 8] |= 1
    assert reason(write(tmp_path / 'a.zip', data)) == 'nothing readable in it (1 encrypted)'


@linux
def test_bombs(tmp_path):
    nothing = bytes(150_000_000)
    for name, inside in ('a.zip', 'a.txt'), ('a.docx', 'word/document.xml'), ('a.epub', 'META-INF/container.xml'):
        bomb = zipped({'[Content_Types].xml': '', inside: nothing})
        assert 'unpacks to more than' in reason(write(tmp_path / name, bomb))
    laughs = '<!DOCTYPE d [<!ENTITY a "ha">' + ''.join(
        f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9)) + ']>'
    data = make_odt('<office:text><text:p>&j;</text:p></office:text>')
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files['content.xml'] = files['content.xml'].replace(b'?>', b'?>' + laughs.encode(), 1)
    assert reason(write(tmp_path / 'b.odt', zipped(files)), file_seconds=3, file_memory_mb=300)


# -----------------------------------------------------------------------------
# Without the packages

@pytest.mark.parametrize('kind, module, package', [
    ('docx', 'mammoth', 'mammoth'), ('pptx', 'pptx', 'python-pptx'), ('xlsx', 'python_calamine', 'python-calamine'),
    ('rtf', 'striprtf', 'striprtf')])
def test_a_missing_package_is_named(tmp_path, monkeypatch, kind, module, package):
    isolate.stop_reader()
    write(tmp_path / f'{module}.py', 'raise ImportError')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    top = {'docx': 'word', 'pptx': 'ppt', 'xlsx': 'xl'}.get(kind)
    data = zipped({'[Content_Types].xml': '', f'{top}/x.xml': ''}) if top else r'{\rtf1 text}'
    assert reason(write(tmp_path / f'a.{kind}', data)) == f'{kind}: needs the package {package}: pip install {package}'
    isolate.stop_reader()
