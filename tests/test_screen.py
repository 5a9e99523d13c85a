"""screen.py: what is cut and counted as texts pass, however they are cut into pieces."""
import random

import pytest

from mambino.prepare import screen
from mambino.prepare.files import Notes, Skip
from mambino.prepare.sources import Source


def in_pieces(text, seed):
    """(text, last) in pieces of random length."""
    rng = random.Random(seed)
    at = 0
    while True:
        n = rng.randint(0, 12)
        yield text[at:at + n], at + n >= len(text)
        at += n
        if at >= len(text):
            return


def passed(text, kind='text', separator='', seed=None, named=False):
    """(the documents that come out, the notes); Skip as it comes."""
    view = screen.Screen(Source('a', kind, 0, 0, named), separator)
    documents = ['']
    for piece, last in view.passed([(text, True)] if seed is None else in_pieces(text, seed)):
        documents[-1] += piece
        if last:
            documents.append('')
    assert documents.pop() == ''
    notes = Notes()
    view.judge(text[:8000], notes, is_beginning=True)
    return documents, list(notes)


@pytest.mark.parametrize('mark, text, documents', [
    ('<|endoftext|>', 'One.\n<|endoftext|>\n\nTwo.\n<|endoftext|>\nThree.\n', ['One.', 'Two.', 'Three.\n']),
    ('<|endoftext|>', 'One.<|endoftext|>Two.<|endoftext|>', ['One.', 'Two.', '']),
    ('\n***\n', 'One\n\n***\n\n\n***\nTwo ***', ['One', '', 'Two ***']),
    ('aab', 'aaab\naabaa\n', ['a', '', 'aa\n']),
    ('\f', '\fOne\n\n\f\n\nTwo\f', ['', 'One', 'Two', '']),
])
def test_documents_are_cut_at_a_separator(mark, text, documents):
    assert passed(text, separator=mark)[0] == documents
    for seed in range(60):
        assert passed(text, separator=mark, seed=seed)[0] == documents, seed


def test_rows_of_tables_are_not_cut():
    assert passed('a</s>b', 'jsonl', '</s>')[0] == ['a</s>b']


def test_data_in_base64_is_cut_out():
    long, short = 'iVBORw0KGgo+/' * 40, 'QUJD' * 20
    text = f'![a](data:image/png;base64,{long}==) and ;base64,{short}, ;base64, {long} a;base64,{long}'
    expected = f'![a](data:image/png;base64,) and ;base64,{short}, ;base64, {long} a;base64,'
    note = f'{2 * len(long) + 2:,} characters of data in base64 were cut out'
    assert passed(text) == ([expected], [note])
    for seed in range(30):
        assert passed(text, seed=seed) == ([expected], [note]), seed


def test_marks_between_documents_are_noted():
    text = 'One.\n<|endoftext|>\nTwo.<|endoftext|>Three.\n</s>\nFour, </s> in a line\n'
    for seed in (None, *range(20)):
        first, second = passed(text, seed=seed)[1]
        assert first.startswith('2 marks <|endoftext|> in it: --document_separator="<|endoftext|>"')
        assert second.startswith('1 marks </s> in it')
    assert passed(text, 'code')[1] == []
    assert len(passed(text, separator='<|endoftext|>')[1]) == 1


@pytest.mark.parametrize('kind, text, reason', [
    ('text', '-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn\n', 'a secret (private key)'),
    ('data', '\n-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQ\n', 'a secret (private key)'),
    ('data', '{"type": "x", "key": "-----BEGIN PRIVATE KEY-----\\nabc' + 'd' * 200 + '-----END PRIVATE KEY-----"}',
     'a secret (private key)'),
    ('code', 'var a=1;' * 2000, 'minified (100% of it'),
    ('code', '/* a line */\n' * 300 + 'x=' + '1,2,' * 2000, 'minified (67% of it'),
    ('code', '(() => { // webpackBootstrap\nlet a = 1\n})()', 'a bundle that webpack made'),
])
def test_what_nobody_wants_is_left_out_unless_it_is_named(kind, text, reason):
    for seed in None, 1:
        with pytest.raises(Skip) as skip:
            passed(text, kind, seed=seed)
        assert str(skip.value).startswith(reason) and 'name the file' in str(skip.value)
    assert passed(text, kind, named=True)[0] == [text]


def test_what_is_no_minified_code_stays():
    for kind, text in [('text', 'word ' * 3000), ('data', '{"a": 1}' * 900), ('code', ' ' * 9000 + 'x')]:
        assert passed(text, kind)[0] == [text]
    key = '-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----\n'
    assert passed('see this one:\n' * 20 + key)[1] == ['2 beginnings and ends of private keys in it']
    assert passed('<p class="a">hi</p>\n' * 30)[1] == ['85% of its beginning is markup']


def test_a_setting_may_have_escapes():
    assert screen.separator_of(r'\n***\n') == '\n***\n'
    assert screen.separator_of(r'\f\t\\n\x') == '\f\t\\n\\x'


def test_characters_that_were_lost_before_are_counted():
    note = '3 characters in it are U+FFFD, where others were lost before'
    assert passed('caf\ufffd na\ufffdve\n\ufffd')[1] == [note]
    assert passed('caf\ufffd na\ufffdve\n\ufffd', 'jsonl', seed=1)[1] == [note]
