"""pdf_text.py, pdf_engines.py and legible.py: the text of PDFs, and what is wrong with it."""
import importlib.util
import os

import pytest
from helpers.readers import make_pdf, raw_pdf, read, reason, write

from mambino.prepare import extract
from mambino.prepare.documents import legible, pdf_engines, pdf_text
from mambino.prepare.files import Notes, Skip

pytestmark = pytest.mark.usefixtures('no_reader_left')


def test_pdf(tmp_path, engine):
    path = write(
        tmp_path / 'a.pdf',
        make_pdf(['The first page, naïve café.\nIts second line.', '', 'The third one.']),
    )
    assert read(path, pdf=engine) == (
        ['The first page, naïve café.\nIts second line.\n\nThe third one.\n'],
        [],
    )
    os.rename(path, os.path.join(os.fsencode(tmp_path), b'\xff.pdf'))
    assert len(read(os.path.join(tmp_path, os.fsdecode(b'\xff.pdf')), pdf=engine)[0]) == 1
    assert (
        reason(write(tmp_path / 'c.pdf', make_pdf(['', ''])), pdf=engine)
        == 'no text in the PDF (scanned?)'
    )
    assert reason(write(tmp_path / 'd.pdf', b'no PDF at all'), pdf=engine) == 'not a PDF'
    assert reason(write(tmp_path / 'e.pdf', b'%PDF-1.4 and no more'), pdf=engine)


def test_a_hyphen_at_the_end_of_a_line(tmp_path, engine):
    """It goes where the document has the word in one."""
    words = raw_pdf(
        'BT /F 12 Tf 14 TL 50 700 Td (An exam-) Tj T* (ple of Jean-) Tj T* (Paul, a well-) Tj '
        'T* (known Example, 3-) Tj T* (4.) Tj ET'
    )
    assert read(write(tmp_path / 'b.pdf', words), pdf=engine)[0] == [
        'An example of Jean-\nPaul, a well-\nknown Example, 3-\n4.\n'
    ]


def test_hyphens_of_several_pages():
    pages = ['the long-\nest ex-\nam-\nple', 'longest', 'by the by-\nway', 'exam']
    pieces = list(pdf_text.join_words(pages))
    assert [piece for piece in pieces if piece] == [
        'the longest exam-\nple', 'longest', 'by the by-\nway', 'exam']
    assert pieces.count('') == 4  # it says that it goes on


def test_what_print_did_is_undone():
    assert (
        pdf_text.tidy_page(
            'e\ufb03cient \ufb01re\r\nexam\x02ple exam\ufffe\nple, so\xadft, воз-\nдух, 1-\n2  \n\n'
        )
        == 'efficient fire\nexam-\nple exam-\nple, soft, воз-\nдух, 1-\n2'
    )


def test_encrypted_pdf(tmp_path, engine):
    locked = make_pdf(['secret'], encryption=dict(owner_password='a', user_password='b'))
    assert reason(write(tmp_path / 'a.pdf', locked), pdf=engine) == 'encrypted'
    free = make_pdf(['for all to read'], encryption=dict(owner_password='a', user_password=''))
    assert read(write(tmp_path / 'b.pdf', free), pdf=engine)[0] == ['for all to read\n']
    # AES-256, which pypdf reads only with the package cryptography; the keys are made up, so no password opens it
    keys = ' '.join(
        f'/{name} <{"5a" * n}>'
        for name, n in (('O', 48), ('U', 48), ('OE', 32), ('UE', 32), ('Perms', 16))
    )
    aes = (
        f'/Encrypt << /Filter /Standard /V 5 /R 6 /Length 256 /P -4 {keys} '
        '/CF << /StdCF << /CFM /AESV3 /Length 32 >> >> '
        '/StmF /StdCF /StrF /StdCF >> /ID [<00> <00>]'
    )
    why = reason(write(tmp_path / 'c.pdf', raw_pdf('BT /F 12 Tf (x) Tj ET', aes)), pdf=engine)
    if engine == 'pypdf' and not importlib.util.find_spec('cryptography'):
        assert why.startswith('encrypted with AES') and why.endswith('pip install cryptography')
    else:
        assert why == 'encrypted'


def test_what_is_written_in_forms(tmp_path, engine):
    field = (b'<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (Ann of the hills) /Rect [50 600 300 620] '
             b'/AP << /N 7 0 R >> >>')
    look = b'BT /F 12 Tf 2 5 Td (Ann of the hills) Tj ET'
    look = (b'<< /Type /XObject /Subtype /Form /BBox [0 0 250 20] /Resources << /Font << /F 5 0 R >> >> '
            b'/Length %d >>\nstream\n%s\nendstream' % (len(look), look))
    for content, text in ('BT ET', ''), ('BT /F 12 Tf 50 700 Td (Your name:) Tj ET', 'Your name:\n'):
        form = raw_pdf(content, page='/Annots [6 0 R]', more=[field, look])
        assert read(write(tmp_path / 'a.pdf', form), pdf=engine)[0] == [text + 'Ann of the hills\n']


def test_a_font_that_does_not_say_its_letters(tmp_path, engine):
    font = (b'<< /Type /Font /Subtype /Type0 /BaseFont /AAAA+X /Encoding /Identity-H /DescendantFonts [<< /Type /Font '
            b'/Subtype /CIDFontType2 /BaseFont /AAAA+X /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) '
            b'/Supplement 0 >> >>] >>')
    page = '/Resources << /Font << /G 6 0 R >> >>'
    junk = raw_pdf('BT /G 12 Tf 50 700 Td <00030004000500060007> Tj ET', page=page, more=[font])
    usual = b'/Resources << /Font << /F 5 0 R >> >>'
    junk = junk.replace(usual, b' ' * len(usual))
    path = write(tmp_path / 'a.pdf', junk)
    for other in '', 'pypdf':
        assert reason(path, pdf=engine, pdf_other=other) == 'its fonts do not say which letters they show'


# -----------------------------------------------------------------------------
# Two engines

class Fake:
    """An engine whose pages are [(text, doubt) or an error]."""

    def __init__(self, pages):
        self.pages = pages

    def __len__(self):
        return len(self.pages)

    def read(self, i):
        if isinstance(self.pages[i], Exception):
            raise self.pages[i]
        return self.pages[i]

    def close(self):
        pass


@pytest.fixture
def two_engines(tmp_path, monkeypatch):
    """(text, notes) of a PDF whose pages two engines read so."""
    path = write(tmp_path / 'a.pdf', b'%PDF-')

    def give(first, second):
        def opened(pages):
            def begin(path):
                if isinstance(pages, Exception):
                    raise pages
                return Fake(pages)
            return begin
        monkeypatch.setattr(pdf_text, 'ENGINES', {'pypdfium2': opened(first), 'pypdf': opened(second)})
        notes = Notes()
        pieces = pdf_text.read_pdf(path, {'pdf': 'pypdfium2', 'pdf_other': 'pypdf'}, notes)
        return ''.join(text for text, last in pieces), list(notes)
    return give


GOOD = 'Here is a page of plain text, that anybody can read.'
JUNK = 'pu\x03 \x04\x05\x06 with \x07\x01 signs \x03\x04 of \x04\x05\x06 nothing'
CIPHER = ''.join(chr(ord(c) - 29) if 'a' <= c else c for c in GOOD * 3)
OTHER = 'The other engine reads the page so, and it is right.'


@pytest.mark.parametrize('bad, good, text', [
    ((JUNK, ''), OTHER, OTHER),
    ((CIPHER, ''), OTHER * 3, OTHER * 3),
    ((ValueError(), ''), OTHER, OTHER),
    (('道德', pdf_engines.LOST), '道可道非常道名可名非常名', '道可道非常道名可名非常名'),
    (('םולש ךיא םתרבע', ''), 'שלום איך עברתם', 'שלום איך עברתם'),
    (('p u l l e d a p a r t a s i t i s', ''), 'pulled apart as it is', 'pulled apart as it is')])
def test_the_other_engine_is_tried(two_engines, bad, good, text):
    first = bad[0] if isinstance(bad[0], Exception) else bad
    assert two_engines([(GOOD, ''), first], [(GOOD, ''), (good, '')]) == (
        f'{GOOD}\n\n{text}\n', ['1 of 2 pages read by pypdf: pypdfium2 could not'])


def test_pages_that_no_engine_can_read(two_engines):
    assert two_engines([(GOOD, ''), (JUNK, ''), (GOOD, '')], [(GOOD, ''), (JUNK, ''), (GOOD, '')]) == (
        f'{GOOD}\n\n{GOOD}\n', ['1 of 3 pages left out: their fonts do not say which letters they show'])
    assert two_engines([(GOOD, ''), ValueError()], Skip('damaged')) == (
        GOOD + '\n', ['1 of 2 pages could not be read'])
    with pytest.raises(Skip, match='most of it is lost: 2 of 3 pages could not be read'):
        two_engines([(GOOD, ''), ValueError(), ValueError()], ValueError())
    apart = 'p u l l e d a p a r t a s i t i s'
    assert two_engines([(apart, '')], [(apart, '')]) == (
        apart + '\n', ['1 of 1 pages with blanks between the letters of words'])
    assert two_engines([(GOOD + '\uf8ff\x01', '')], [(GOOD, '')])[1] == ['2 characters were unreadable']


def test_fonts_that_may_be_wrong(two_engines):
    unsure = (GOOD, pdf_engines.UNSURE)
    assert two_engines([unsure], [(GOOD.replace(' ', '\n'), '')]) == (GOOD + '\n', [])
    assert two_engines([unsure], [(CIPHER, '')]) == (
        GOOD + '\n', ['1 of 1 pages whose fonts do not say which letters they show: some may be wrong'])


def test_a_file_that_only_the_other_engine_opens(two_engines):
    assert two_engines(Skip('damaged PDF'), [(GOOD, '')]) == (GOOD + '\n', [])
    with pytest.raises(Skip, match='damaged PDF'):
        two_engines(Skip('damaged PDF'), ValueError())
    with pytest.raises(Skip, match='encrypted'):
        two_engines(Skip('encrypted'), [(GOOD, '')])


def test_the_engine_that_is_asked_for_reads_alone():
    assert extract.pdf_engines('pypdf') == ('pypdf', '')
    if extract.version_of('pypdfium2'):
        assert extract.pdf_engines('auto') == ('pypdfium2', 'pypdf')


# -----------------------------------------------------------------------------
# Whether it can be read

@pytest.mark.parametrize('text', [
    GOOD, 'Łódź, żółć, źdźbło: Szczęśliwe chrząszcze brzmią w trzcinie.', '道可道，非常道。名可名，非常名。',
    'مرحبا بالعالم، هذه مدرسة كبيرة في المدينة', 'שלום לכולם, איך עברתם את היום?',
    'Ελληνικά και עברית και русский',
    'x = 3 + 4 y\na b c d e', 'Tiếng Việt có dấu: được, những, người', '3Dレーザーレーダー 光学',
    'नमस्ते दुनिया', '1 2 3 4 5 6 7'])
def test_texts_that_can_be_read(text):
    assert legible.problem_of(text) == ''
    assert legible.close_up(text) == text


@pytest.mark.parametrize('text, problem', [
    (JUNK, legible.JUNK), (CIPHER, legible.JUNK), ('\ufffd\ufffd and \ue001\ue002\ue003', legible.JUNK),
    ('ɍɝɥɨɜɚɹ ɲɥɢɮɨɜɚɥɶɧɚɹ ɦɚɲɢɧɚ', legible.JUNK), ('⤶ĴاǎƶơйǎƹŎķຊا᧽ ǎķ㶜ຝ䆀䩱ط', legible.JUNK),
    ('Ä¿ ¡¡ ¡¡ Â¼ ¹Ø ÓÚ ºì ¾ü ×÷ Õ½ µÄ Ô Ôò £± ¡ ¡ ¡ ¡ ¡', legible.JUNK),
    ('ةنيدملا يف ةريبك ةسردم', legible.REVERSED), ('היה הז םיתעל', legible.REVERSED)])
def test_texts_that_cannot_be_read(text, problem):
    assert legible.problem_of(text) == problem


def test_letters_apart_are_closed_up():
    assert legible.close_up('全 世 界 无 产 者 ， 联 合 起 来 吧') == '全世界无产者，联合起来吧'
    assert legible.close_up('T w o  w o r d s  l i k e\nt h e s e  h e r e') == 'Two words like\nthese here'
    assert legible.close_up('一 二 三') == '一 二 三'


def test_aes_of_128_bits_without_its_package(tmp_path):
    if importlib.util.find_spec('cryptography') or importlib.util.find_spec('Crypto'):
        pytest.skip('the package is there')
    aes = ('/Encrypt << /Filter /Standard /V 4 /R 4 /Length 128 /P 4294967292 '
           '/O <65fbeeb76e4691b7dc4babe5b911ce87196f39d0cfda0f00920838327413a714> '
           '/U <54db5dc5d0303e6ab77b707b7489be4028bf4e5e4e758a4164004e56fffa0108> '
           '/CF << /StdCF << /AuthEvent /DocOpen /CFM /AESV2 /Length 16 >> >> /StmF /StdCF /StrF /StdCF >> '
           '/ID [<4269ea7e550fcb175f9fa0fddbe8d822> <4269ea7e550fcb175f9fa0fddbe8d822>]')
    path = write(tmp_path / 'a.pdf', raw_pdf('BT /F 12 Tf (what no one can read) Tj ET', aes))
    why = 'encrypted with AES, which pypdf reads with cryptography: pip install cryptography'
    assert reason(path, pdf='pypdf') == why


def test_pages_without_text_are_counted(tmp_path, engine):
    assert read(write(tmp_path / 'a.pdf', make_pdf(['Some text.', '', '', ''])), pdf=engine) == (
        ['Some text.\n'], ['3 of 4 pages have no text (scanned?)'])
