"""encodings.py, declared.py and guess.py: texts of every encoding, what they say of it, and what does
not fit.
"""
import random

import pytest
from helpers.readers import read, reason, write

from mambino.prepare import isolate


@pytest.fixture(scope='module', autouse=True)
def no_reader_left():
    yield
    isolate.stop_reader()


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
