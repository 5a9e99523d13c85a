"""text.py: whole characters, where a text stops; the same time for every token."""
import time

import pytest
from helpers.sampling import KINDS, open_run

from mambino import tokenizer
from mambino.sample.text import Writer, encode_prompt, stops_of


def write(ids_or_text, stops=(), tok=None):
    """What a Writer shows for each id, and at the end; the pieces together must be its text."""
    tok = tok or tokenizer.build_tokenizer('byte')
    writer = Writer(tok, stops)
    ids = tok.encode(ids_or_text).tolist() if isinstance(ids_or_text, str) else ids_or_text
    pieces = [writer.feed(i) for i in ids] + [writer.close()]
    assert ''.join(pieces) == writer.text and writer.done and writer.close() == ''
    return pieces


def test_characters_are_never_split():
    assert write('é€😀!') == ['', 'é', '', '', '€', '', '', '', '😀', '!', '']
    assert write('é€😀!'.encode()[:-2]) == ['', 'é', '', '', '€', '', '', '', '\ufffd']


@pytest.mark.parametrize('text, stops, expected', [
    ('one END two', ['END'], 'one '),
    ('one END two', ['EN'], 'one '),
    ('one END two', ['two', 'END'], 'one '),
    ('one EN two', ['END'], 'one EN two'),
    ('one EN', ['END'], 'one EN'),              # held back, then released at the end
    ('aab', ['ab'], 'a'),
    ('aaaab', ['aaab'], 'a'),
    ('abcabd!', ['abd'], 'abc'),
    ('abcd', ['bcx', 'c'], 'ab'),
    ('END', ['END'], ''),
    ('x€😀y', ['€😀'], 'x'),
    ('x😀y', ['€'], 'x😀y'),
    ('no stops', [], 'no stops'),
])
def test_stop_strings(text, stops, expected):
    pieces = write(text, stops)
    assert ''.join(pieces) == expected
    # stops straddle its tokens, or begin inside one
    tok = tokenizer.build_tokenizer('bpe', [text * 20 + ' ' + text], vocab_size=300)
    assert ''.join(write(text, stops, tok)) == expected


def test_part_of_a_stop_string_is_held_back_no_longer_than_needed():
    assert write('a<b<ef', ['<e', '<f']) == ['a', '', '<b', '', '', '', '']
    assert write('a<b', ['<e']) == ['a', '', '<b', '']


def test_beginnings_of_a_stop_are_tried_where_their_last_character_came():
    """A long stop costs a token nothing where it cannot have begun."""
    class Counted(str):
        tried = 0

        def __getitem__(self, part):
            Counted.tried += isinstance(part, slice)
            return super().__getitem__(part)
    assert ''.join(write('a' * 50 + 'b', [Counted('b' * 200 + 'c')])) == 'a' * 50 + 'b'
    assert Counted.tried == 200


def test_end_of_text_stops():
    tok = tokenizer.build_tokenizer('byte')
    assert write([65, tok.eot, 66]) == ['A', '', '', '']
    assert write([65, 60, tok.eot, 66], ['<e']) == ['A', '', '<', '', '']
    assert write([0xe2, 0x82, tok.eot, 66]) == ['', '', '\ufffd', '', '']


def test_a_writer_takes_the_same_time_for_every_token():
    def written(n):
        writer, began = Writer(tok, ['ENDE']), time.process_time()
        for _ in range(n):
            writer.feed(65)
        return writer.text, time.process_time() - began

    tok = tokenizer.build_tokenizer('byte')
    rounds = [(written(20_000)[1], *written(80_000)) for _ in range(3)]  # a busy machine disturbs one or another
    few, text, many = (min(column) for column in zip(*rounds))
    assert many < 8 * few and len(text) == 80_000


@pytest.mark.usefixtures('runs')
def test_end_of_text_in_the_prompt():
    for kind in KINDS:
        tok = open_run(kind)[1]
        assert encode_prompt(tok, '<|endoftext|>e') == [tok.eot, *tok.encode('e')]
        assert encode_prompt(tok, '<|endoftext|>') == [tok.eot]


@pytest.mark.parametrize('setting, stops', [
    ('', []),
    ('a|b', ['a', 'b']),
    ('||a|', ['a']),
    (r'\n\n|User:', ['\n\n', 'User:']),
    (r'\|', ['|']),
    (r'a\|b|c', ['a|b', 'c']),
    ('\\\\', ['\\']),
    (r'\\n', [r'\n']),
    (r'\\|\|', ['\\', '|']),
    (r'\d', [r'\d']),
    ('<|never|>', ['<|never|>']),
    ('<|im_end|>|<|im_start|>|end', ['<|im_end|>', '<|im_start|>', 'end']),
    ('a<|b', ['a<', 'b']),
    ('<|>', ['<', '>']),
])
def test_the_setting_stop(setting, stops):
    assert stops_of(setting) == stops


def test_a_bar_alone_is_no_stop(capsys):
    for setting in '|', '||':
        with pytest.raises(SystemExit):
            stops_of(setting)
        assert r'a bar itself is written \|' in capsys.readouterr().err

