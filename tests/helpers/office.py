"""Office files, e-books, mail and archives, made by hand."""
import datetime
import email.message
import io
import zipfile

WORD = ('xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" '
        'xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math" '
        'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"')
PACKAGE = 'http://schemas.openxmlformats.org/package/2006'
OFFICE = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
OPEN = 'urn:oasis:names:tc:opendocument:xmlns:'
XML = '<?xml version="1.0" encoding="UTF-8"?>'


def zipped(files):
    """A zip archive of {name: text or bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def paragraph(text, properties=''):
    return f'<w:p>{properties}<w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def make_docx(body, footnote='the footnote'):
    """A document of Word with this XML in its body."""
    main = 'application/vnd.openxmlformats-officedocument.wordprocessingml'
    return zipped({
        '[Content_Types].xml': (
            f'{XML}<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
            'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" '
            f'ContentType="application/xml"/><Override PartName="/word/document.xml" ContentType="{main}.document'
            '.main+xml"/></Types>'),
        '_rels/.rels': (
            f'{XML}<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" '
            f'Type="{OFFICE}/officeDocument" Target="word/document.xml"/></Relationships>'),
        'word/_rels/document.xml.rels': (
            f'{XML}<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r2" '
            f'Type="{OFFICE}/footnotes" Target="footnotes.xml"/></Relationships>'),
        'word/footnotes.xml': (
            f'{XML}<w:footnotes {WORD}><w:footnote w:id="2">{paragraph(footnote)}</w:footnote></w:footnotes>'),
        'word/document.xml': f'{XML}<w:document {WORD}><w:body>{body}</w:body></w:document>',
    })


def cell_xml(value):
    if isinstance(value, bool):
        return f'<c t="b"><v>{value:d}</v></c>'
    if isinstance(value, str):
        return f'<c t="inlineStr"><is><t xml:space="preserve">{value}</t></is></c>'
    if isinstance(value, datetime.date):
        return f'<c s="1"><v>{(value - datetime.date(1899, 12, 30)).days}</v></c>'
    return '<c/>' if value is None else f'<c><v>{value}</v></c>'


def make_xlsx(sheets):
    """A workbook of Excel: a list of rows of cells for each of its sheets."""
    main = 'http://schemas.openxmlformats.org/spreadsheetml/2006/main'
    numbers = range(1, len(sheets) + 1)
    files = {
        '[Content_Types].xml': (
            f'{XML}<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
            'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" '
            'ContentType="application/xml"/></Types>'),
        '_rels/.rels': (
            f'{XML}<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" '
            f'Type="{OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>'),
        'xl/workbook.xml': (
            f'{XML}<workbook xmlns="{main}" xmlns:r="{OFFICE}"><sheets>'
            + ''.join(f'<sheet name="Sheet {i}" sheetId="{i}" r:id="r{i}"/>' for i in numbers)
            + '</sheets></workbook>'),
        'xl/_rels/workbook.xml.rels': (
            f'{XML}<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="s" Type="{OFFICE}/styles" '
            'Target="styles.xml"/>' + ''.join(f'<Relationship Id="r{i}" Type="{OFFICE}/worksheet" '
                                              f'Target="worksheets/sheet{i}.xml"/>' for i in numbers)
            + '</Relationships>'),
        'xl/styles.xml': f'{XML}<styleSheet xmlns="{main}"><cellXfs><xf numFmtId="0"/><xf numFmtId="14"/></cellXfs>'
                         '</styleSheet>',
    }
    for i, rows in zip(numbers, sheets):
        lines = ''.join(f'<row>{"".join(map(cell_xml, row))}</row>' for row in rows)
        files[f'xl/worksheets/sheet{i}.xml'] = (
            f'{XML}<worksheet xmlns="{main}"><dimension ref="A1"/><sheetData>{lines}</sheetData></worksheet>')
    return zipped(files)


def content_xml(body):
    spaces = ' '.join(f'xmlns:{name}="{OPEN}{name}:1.0"' for name in ('office', 'text', 'table'))
    return (f'{XML}<office:document-content {spaces}><office:body>{body}</office:body>'
            '</office:document-content>')


def make_odt(body, manifest='<m/>'):
    """An OpenDocument file with this XML in its body."""
    return zipped({
        'mimetype': 'application/vnd.oasis.opendocument.text',
        'content.xml': content_xml(body), 'META-INF/manifest.xml': manifest,
    })


def make_epub(chapters, spine=None, more=None):
    """An e-book of {name: page}; spine: their names in order, as far as it is another one."""
    names = list(chapters)
    items = ''.join(f'<item id="i{i}" href="{name.replace(" ", "%20")}"/>' for i, name in enumerate(names))
    refs = ''.join(f'<itemref idref="i{names.index(name)}"/>' for name in spine or names)
    pages = {f'book/{name}': page for name, page in chapters.items() if page is not None}
    return zipped({
        'mimetype': 'application/epub+zip',
        'META-INF/container.xml': (
            f'{XML}<container xmlns="{OPEN}container"><rootfiles><rootfile full-path="book/package.opf"/>'
            '</rootfiles></container>'),
        'book/package.opf': (
            f'{XML}<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest>'
            f'<spine>{refs}</spine></package>'),
    } | pages | (more or {}))


def make_message(text, page='', attachment=b''):
    """A message as bytes."""
    message = email.message.EmailMessage()
    message['From'] = 'Ann Ärmel <ann@example.org>'
    message['To'] = 'Bob <bob@example.org>'
    message['Date'] = 'Mon, 02 Jan 2023 10:00:00 +0000'
    message['Subject'] = 'Grüße aus den Bergen'
    message.set_content(text)
    if page:
        message.add_alternative(page, subtype='html')
    if attachment:
        message.add_attachment(attachment, maintype='application', subtype='pdf', filename='a.pdf')
    return message.as_bytes()
