"""encodings.py, declared.py and guess.py: texts of every encoding, what they say of it, and what does
not fit.
"""
import random

import pytest
from helpers.readers import read, reason, write

from mambino.prepare.files import CHUNK, Notes
from mambino.prepare.texts import encodings, mixed
from mambino.prepare.texts.declared import check_encoding, codec_of

pytestmark = pytest.mark.usefixtures('no_reader_left')


WEST = 'Größe, naïve café: “ça coûte 10 €” – voilà.\nEl niño comió muchísimo, ¿verdad?\n' * 5
RUSSIAN = (
    'Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n'
    * 9
)
CHINESE = '道可道，非常道。名可名，非常名。\n无名天地之始；有名万物之母。故常无欲，以观其妙。\n' * 9
JAPANESE = '吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n' * 9
GREEK = 'Άνδρα μοι έννεπε, Μούσα, πολύτροπον, ος μάλα πολλά πλάγχθη.\n' * 9


@pytest.mark.parametrize('text', [WEST, RUSSIAN, CHINESE, JAPANESE, GREEK, 'plain ASCII\n'],
                         ids='west russian chinese japanese greek ascii'.split())
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_unicode_of_every_width(tmp_path, text, encoding):
    for name in 'a.txt', 'a.py':
        documents, notes = read(write(tmp_path / name, text.encode(encoding)))
        assert documents == [text]
        guessed = [f'encoding guessed: {encoding}, as in'] if encoding[-3:] in ('-le', '-be') else []
        assert [note.split(' "')[0] for note in notes] == guessed
    big = b'\xfe\xff' + text.encode('utf-16-be')
    assert read(write(tmp_path / 'big.txt', big))[0] == [text]


def test_a_pair_across_the_end_of_the_sample(tmp_path):
    for k in range(5):
        text = 'x' * k + 'abc🎈' * 9000
        assert read(write(tmp_path / 'a.txt', text.encode('utf-16-le')))[0] == [text]


@pytest.mark.parametrize('encoding, text', [
    ('cp1252', WEST), ('cp1251', RUSSIAN), ('koi8-r', RUSSIAN), ('gb18030', CHINESE),
    ('cp932', JAPANESE), ('cp1253', GREEK), ('cp1252', 'one café\n'),
    ('cp1252', 'x\n' * 5000 + 'naïve\n')])
def test_legacy_encodings_are_guessed_and_noted(tmp_path, encoding, text):
    documents, notes = read(write(tmp_path / 'old.txt', text.encode(encoding)))
    assert documents == [text] and len(notes) == 1 and notes[0].startswith(f'encoding guessed: {encoding}, as in "')


def test_a_short_text_that_was_cut_within_a_letter(tmp_path):
    """As `head -c` leaves it, and `tail -c`; there are few letters to tell by."""
    text = 'the cat Öl naïve\nStraße über\n'
    raw = text.encode()
    for data, shown in ((raw + 'ö'.encode()[:1], text + '\ufffd'), (raw + '中'.encode()[:2], text + '\ufffd'),
                        ('中'.encode()[1:] + raw, '\ufffd\ufffd' + text)):
        documents, notes = read(write(tmp_path / 'a.txt', data))
        assert documents == [shown] and notes == [f'{len(data) - len(raw)} bytes were no UTF-8']
    assert read(write(tmp_path / 'b.txt', b'un caf\xe9'))[0] == ['un café']


def test_bytes_that_do_not_fit(tmp_path):
    documents, notes = read(write(tmp_path / 'a.txt', WEST.encode() + b'\xff\n' + WEST.encode()))
    assert documents == [WEST + '\ufffd\n' + WEST] and notes == ['1 bytes were no UTF-8']
    # the bad byte lies in a later chunk, the chunks begin in the middle of a letter
    late = 'é' * 2_000_000
    documents, notes = read(write(tmp_path / 'b.txt', b'x' + late.encode() + b'\xff'))
    assert documents == ['x' + late + '\ufffd'] and notes == ['1 bytes were no UTF-8']
    documents, notes = read(write(tmp_path / 'c.txt', 'a\ufffdb\n'))  # said on purpose
    assert documents == ['a\ufffdb\n'] and not notes
    assert read(write(tmp_path / 'd.txt', b'a log' * 100 + b'\0' + b' with a zero' * 100))[0] == [
        'a log' * 100 + ' with a zero' * 100
    ]
    assert read(write(tmp_path / 'e.txt', b'a\0b'))[0] == ['ab']
    for data, why in (
        (bytes(range(256)) * 9, 'binary'),
        (b'\x7fELF\2\1\1' + bytes(200), 'a program'),
        (b'\x89PNG\r\n\x1a\n' + random.Random(0).randbytes(9999), 'a PNG image'),
    ):
        assert reason(write(tmp_path / 'f.txt', data)) == why


def html(tmp_path, page):
    return read(write(tmp_path / 'page.html', page))[0][0]


def test_html_says_its_encoding(tmp_path):
    head = '<meta charset="{}"><p>'
    assert (
        html(tmp_path, (head.format('windows-1251') + RUSSIAN).encode('cp1251')).split()
        == RUSSIAN.split()
    )
    # as browsers do
    assert (
        html(tmp_path, (head.format('iso-8859-1') + '“so” 10 €').encode('cp1252')) == '“so” 10 €\n'
    )
    for wrong in ('utf-8', 'utf-16', 'none-such', 'hex', 'undefined', 'rot13'):
        assert (
            html(tmp_path, (head.format(wrong) + 'café, naïve').encode('cp1252')) == 'café, naïve\n'
        )
    assert html(tmp_path, (head.format('koi8-r') + 'café').encode()) == 'café\n'  # but it is UTF-8


# -----------------------------------------------------------------------------
# Guesses

SENTENCES = [
    ('cp1252', 'Hier soir nous avons longé la rivière, puis nous sommes rentrés dîner. Voilà l’été déjà.'),
    ('mac-roman', 'Hier soir nous avons longé la rivière, puis nous sommes rentrés dîner. Voilà l’été déjà.'),
    ('iso8859-15', 'Ce cœur léger coûte 10 € à la sœur aînée, déjà très émue.'),
    ('cp850', 'Gestern gingen wir lange am Fluß spazieren und fuhren später zurück. Schöne Grüße.'),
    ('cp1250', 'Árvíztűrő tükörfúrógép. Tegnap este hosszú sétát tettünk, aztán hazamentünk.'),
    ('iso8859-2', 'Wczoraj poszliśmy na długi spacer, a potem wróciliśmy do domu. Źdźbło trawy lśniło.'),
    ('cp852', 'Včera večer jsme dlouho šli podél řeky. Příliš žluťoučký kůň úpěl ďábelské ódy.'),
    ('cp1254', 'Dün akşam uzun bir yürüyüş yaptık, sonra eve dönüp çay içtik. Öğrenciler ışığı söndürdü.'),
    ('cp1257', 'Vakar vakare ilgai vaikščiojome palei upę, o paskui grįžome namo vakarienės.'),
    ('koi8-u', 'Учора ввечері ми довго гуляли вздовж річки, а потім повернулися додому. Їжак їсть її.'),
    ('cp866', 'Вчера вечером мы долго гуляли вдоль реки, а потом вернулись домой и поужинали.'),
    ('iso8859-5', 'Вчера вечером мы долго гуляли вдоль реки, а потом вернулись домой и поужинали.'),
    ('mac-cyrillic', 'Вчера вечером мы долго гуляли вдоль реки. А потом Все вернулись домой. Ужинали. Пили Чай.'),
    ('iso8859-7', 'Χθες το βράδυ περπατήσαμε πολλή ώρα δίπλα στο ποτάμι. Άλλη μια ημέρα, Έλληνες.'),
    ('cp1255', 'אתמול בערב הלכנו זמן רב לאורך הנהר, ואחר כך חזרנו הביתה לארוחת ערב.'),
    ('cp1256', 'مشينا مساء أمس طويلا على ضفة النهر، ثم عدنا إلى البيت وتناولنا العشاء.'),
    ('cp874', 'เมื่อวานตอนเย็นเราเดินเล่นริมแม่น้ำเป็นเวลานาน แล้วกลับบ้านไปดื่มชา'),
    ('gb18030', '他说今天的天气真好，我们一起去公园散步吧。她点了点头，没有回答。'),
    ('cp950', '他說今天的天氣真好，我們一起去公園散步吧。她點了點頭，沒有回答。'),
    ('big5hkscs', '佢哋話今日天氣好好，我哋一齊去公園散步啦。佢點咗頭，冇答，嗰陣時行返屋企。'),
    ('cp932', 'コンピュータのプログラムを試すために使います。昨日の夕方、川のそばを歩きました。'),
    ('euc_jp', 'コンピュータのプログラムを試すために使います。昨日の夕方、川のそばを歩きました。'),
    ('cp949', '어제 저녁에 강가를 오래 걸었습니다. 그리고 집에 돌아와 저녁을 먹었습니다.'),
    ('johab', '어제 저녁에 강가를 오래 걸었습니다. 그리고 집에 돌아와 저녁을 먹었습니다.'),
]


@pytest.mark.parametrize('encoding, sentence', SENTENCES, ids=[encoding for encoding, _ in SENTENCES])
def test_guesses(tmp_path, encoding, sentence):
    shapes = [
        sentence,
        ''.join(f'{i}: {sentence}\r\n' for i in range(50)),
        sentence.replace('\n', '') * (200_000 // len(sentence)),   # one line
        ''.join(f'def function_{i}(value):  # {sentence}\n    return value + {i}\n' for i in range(9)),
    ]
    for text in shapes:
        documents, notes = read(write(tmp_path / 'a.txt', text.encode(encoding)))
        assert documents == [text.replace('\r', '')]
        shown, = notes
        assert shown.startswith(f'encoding guessed: {encoding}, as in "')
        assert shown.split('"')[1].strip() in text.replace('\r\n', ' ') + ' '


def test_a_guess_is_put_down(tmp_path):
    notes = Notes()
    encodings.encoding_of(write(tmp_path / 'a.txt', 'Größe'.encode('cp1252')), notes)
    assert notes.facts == {'encoding': 'cp1252'}
    notes = Notes()
    encodings.encoding_of(write(tmp_path / 'a.txt', 'Größe'), notes)
    assert notes.facts == {} and not notes


@pytest.mark.parametrize('text, encoding', [('naïve', 'cp1252'), ('Le garçon était là', 'cp1252'),
                                            ('Быстрая лиса', 'koi8-r'), ('今天的天气真好', 'gbk')])
def test_the_first_odd_letter_comes_late(tmp_path, text, encoding):
    early = 'the cat sat on the mat and the dog ran home with a stick\n' * 40_000    # more than two chunks
    assert len(early) > 2 * CHUNK
    documents, notes = read(write(tmp_path / 'a.txt', (early + text + '\n').encode(encoding)))
    assert documents == [early + text + '\n'] and len(notes) == 1
    rows = 'text,id\n' + ''.join(f'{line},1\n' for line in (early + text).split('\n'))
    documents, _ = read(write(tmp_path / 'a.csv', rows.encode(encoding)), text_column='text')
    assert documents[-1] == text


def test_a_cut_never_splits_a_character(tmp_path):
    texts = {'gbk': '他说今天的天气真好', 'shift_jis': '昨日の夕方、川のそばを', 'big5': '他說今天的天氣真好'}
    for encoding, text in texts.items():
        for k in range(3):
            long = 'x' * k + text * (2 * CHUNK // len(text))    # no blank, no newline
            assert read(write(tmp_path / 'a.txt', long.encode(encoding)))[0] == [long]


def test_utf_16_without_a_mark(tmp_path):
    for text in '他说今天的天气真好，我们一起去', 'コンピュータのプログラム', 'Вчера', 'if a', 'αβγ δ', '어제 저녁에':
        for encoding in 'utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be':
            for end in '', '\n':
                documents, notes = read(write(tmp_path / 'a.txt', (text + end).encode(encoding)))
                assert documents == [text + end] and notes[0].startswith(f'encoding guessed: {encoding}')


def test_escapes(tmp_path):
    texts = {'iso2022_jp': 'abc 日本語の文章\n', 'iso2022_kr': 'abc 한국어 문장\n', 'hz': 'abc 中文\n'}
    for encoding, text in texts.items():
        assert read(write(tmp_path / 'a.txt', (text * 9).encode(encoding)))[0] == [text * 9]
    plain = '\x1b[31mred\x1b[0m costs \x1b$5 ~{x} ~/home\n'
    assert read(write(tmp_path / 'a.txt', plain))[0] == [plain]


def test_no_language(tmp_path):
    noise = random.Random(0).choices(range(128, 256), k=3000)
    assert reason(write(tmp_path / 'a.txt', bytes(noise))) == \
        'unknown encoding; if you know it, say it with --encoding='
    assert reason(write(tmp_path / 'a.txt', ('an old text of a mainframe ' * 40).encode('cp037'))) == \
        'EBCDIC; say which, as in --encoding=cp037'


# -----------------------------------------------------------------------------
# Damage, and two encodings in one file

def test_lines_of_another_encoding(tmp_path):
    lines = [f'{i} Größe und Maß, schöner Tag' for i in range(30)]
    data = b'\n'.join(line.encode('cp1252' if i % 7 == 3 else 'utf-8') for i, line in enumerate(lines))
    documents, notes = read(write(tmp_path / 'log.txt', data))
    assert documents == ['\n'.join(lines)]
    assert notes == ['4 lines were no UTF-8: encoding guessed: cp1252, as in "3 Größe und Maß, schöner Tag"']
    assert b'caf\xc3\xa9 \xe9\ncaf\xe9'.decode(mixed.name_of('cp1252'), 'replace') == 'café \ufffd\ncafé'


def test_damage_is_counted(tmp_path):
    line = 'Größe und Maß, schöner Tag\n'.encode()
    data = line * 400 + line.replace(b'\xb6', b'\xff') * 8
    documents, notes = read(write(tmp_path / 'a.txt', data))
    assert documents[0].count('\ufffd') == 32 and notes == ['32 bytes were no UTF-8, one in 395']
    stray = b'all of this is plain\n' * 200
    documents, notes = read(write(tmp_path / 'a.txt', stray + b'x\xffy\n' + stray))
    assert documents[0].count('\ufffd') == 1 and notes == ['1 bytes were no UTF-8']


def test_what_was_encoded_twice_is_noted(tmp_path):
    text = ('café à l’été'.encode().decode('cp1252', 'replace') + '\n') * 4
    assert read(write(tmp_path / 'a.txt', text)) == (
        [text], ['letters were encoded twice, as Ã© for é; that is left as it is'])


# -----------------------------------------------------------------------------
# What is declared, what is said

RUSSIAN_LINE = 'Все счастливые семьи\n'


@pytest.mark.parametrize('head', [
    '<?xml version="1.0" encoding="windows-1251"?>\n<a>',
    '# -*- coding: cp1251 -*-\n',
    '#!/usr/bin/python\n# vim: set fileencoding=windows-1251 :\n',
    'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=CP1251\\n"\n',
    '@charset "windows-1251";\n',
    '\\documentclass{article}\n\\usepackage[cp1251]{inputenc}\n',
    '/*!40101 SET NAMES cp1251 */;\n'])
def test_declared_encodings(tmp_path, head):
    text = head + RUSSIAN_LINE
    assert read(write(tmp_path / 'a.txt', text.encode('cp1251'))) == ([text], [])
    assert read(write(tmp_path / 'a.txt', text.encode('utf-8'))) == ([text], [])    # it is that all the same
    documents, notes = read(write(tmp_path / 'a.txt', (head + RUSSIAN_LINE * 9).encode('koi8-r')))
    assert documents == [head + RUSSIAN_LINE * 9]
    assert notes[0] == 'says that it is cp1251, and is not'


def test_names_as_browsers_take_them():
    for label, codec in [('gb2312', 'gb18030'), ('ISO-8859-1', 'cp1252'), ('Shift_JIS', 'cp932'), ('euc-kr', 'cp949'),
                         ('Big5', 'cp950'), ('windows1251', 'cp1251'), ('IBM850', 'cp850'), ('tis-620', 'cp874'),
                         ('x-sjis', 'cp932'), ('utf8', 'utf-8'), ('rot13', None), ('klingon', None), ('idna', None)]:
        assert codec_of(label) == codec


def test_an_encoding_that_is_said(tmp_path, capsys):
    text = 'Все счастливые семьи похожи\n'
    path = write(tmp_path / 'a.txt', text.encode('koi8-r'))
    assert read(path, encoding='koi8-r') == ([text], [])
    assert read(path, encoding='cp1251')[0] == [text.encode('koi8-r').decode('cp1251')]    # as you say
    assert reason(path, encoding='utf-8') == 'not utf-8: byte 1 does not fit'
    assert reason(path, encoding='gbk') == 'not gb18030: byte 3 does not fit'
    late = ('字' * 3000).encode('gbk')
    assert read(write(tmp_path / 'b.txt', late + b'\xff' + late), encoding='gb2312') == (
        ['字' * 3000 + '\ufffd' + '字' * 3000], ['1 bytes were no gb18030'])
    rows = write(tmp_path / 'c.csv', 'id,text\n1,семьи\n'.encode('koi8-r'))
    assert read(rows, encoding='koi8-r') == (['семьи'], [])
    check_encoding('Latin-1')
    with pytest.raises(SystemExit):
        check_encoding('cp12510')
    assert 'encoding=cp12510: no such encoding; the nearest are cp1251' in capsys.readouterr().err


def test_the_mark_of_utf8_before_lines_of_another_encoding(tmp_path):
    text = 'Größe über alles, schöne Grüße.\n' * 5
    for lines in text.encode('cp1252'), text.encode() + text.encode('cp1252'):
        documents, notes = read(write(tmp_path / 'a.txt', b'\xef\xbb\xbf' + lines))
        assert documents == [text * (len(documents[0]) // len(text))]
        assert notes[0].startswith('5 lines were no UTF-8: encoding guessed: cp1252, as in ')


def test_wide_blanks_are_not_those_of_a_mainframe(tmp_path):
    for encoding, text in (
        ('cp932', '　　　東京　　　大阪\n　　名古屋\n'), ('cp950', '　　　臺北　　　臺中\n　　我們的書\n')):
        assert read(write(tmp_path / 'a.txt', text.encode(encoding)))[0] == [text]


def test_a_width_that_is_said_and_not_marked(tmp_path):
    for order in 'le', 'be':
        path = write(tmp_path / 'a.txt', RUSSIAN.encode(f'utf-16-{order}'))
        assert read(path, encoding='utf-16') == ([RUSSIAN], [])


def test_an_encoding_that_is_said_of_utf8(tmp_path):
    note = 'taken as cp1252, as --encoding says; it is UTF-8 as well'
    assert read(write(tmp_path / 'a.txt', 'café'), encoding='cp1252') == (['cafÃ©'], [note])
    assert read(write(tmp_path / 'a.txt', 'plain'), encoding='cp1252') == (['plain'], [])
    assert 'UTF-8 as well' in read(write(tmp_path / 'a.txt', 'plain '), encoding='utf-16')[1][0]


def test_a_notebook_in_another_encoding(tmp_path):
    book = '{"cells": [{"cell_type": "markdown", "source": ["Größe, naïve café"]}]}'
    for encoding in 'utf-16', 'utf-8-sig':
        assert read(write(tmp_path / 'a.ipynb', book.encode(encoding)))[0] == ['Größe, naïve café\n']
    documents, notes = read(write(tmp_path / 'a.ipynb', book.encode('cp1252')))
    assert documents == ['Größe, naïve café\n'] and 'encoding guessed: cp1252' in notes[0]
