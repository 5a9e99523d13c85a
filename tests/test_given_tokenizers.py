"""A tokenizer.json that somebody gives: opened by its content, without what only its training was to
see, and tried on the texts: what it loses of them is said."""
import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers import foreign
from helpers.runs import script
from tokenizers import Tokenizer, models, normalizers

from mambino import tokenizer
from mambino.sample.score import around

# --- what only its training was to see ------------------------------------------------------------

def test_training_settings_are_off(tmp_path):
    own = tokenizer.build_tokenizer('bpe', foreign.TEXT, 300)
    for name, changes in {
            'dropout': {'model': {**json.loads(own.text)['model'], 'dropout': 0.2}},
            'truncation': {'truncation': {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst',
                                          'stride': 0}},
            'padding': {'padding': {'strategy': {'Fixed': 64}, 'direction': 'Right', 'pad_to_multiple_of': None,
                                    'pad_id': 0, 'pad_type_id': 0, 'pad_token': '!'}}}.items():
        path = foreign.save(own.hf, tmp_path / name, **changes)
        text = open(path, encoding='utf-8').read()
        for tok in (tokenizer.load_tokenizer(path), tokenizer.from_state({'kind': 'bpe', 'json': text})):
            for line in foreign.TEXT:
                assert np.array_equal(tok.encode(line), own.encode(line))
        assert tok.text == text                             # a checkpoint's own is left alone
        assert tokenizer.load_tokenizer(path).sha256() == own.sha256()
    hf = foreign.KINDS['llama']()
    path = foreign.save(hf, tmp_path / 'sp', model={**json.loads(hf.to_str())['model'], 'dropout': 0.9})
    tok = tokenizer.load_tokenizer(path)
    assert {tuple(tok.encode('the cat sat on the mat').tolist()) for _ in range(20)} == \
        {tuple(hf.encode('the cat sat on the mat').ids)}
    assert json.loads(tok.text)['model']['dropout'] is None


def test_nothing_to_turn_off_changes_nothing(tmp_path):
    for kind in ('char', 'byte', 'bpe'):
        tok = tokenizer.build_tokenizer(kind, foreign.TEXT, 300)
        tok.save(tmp_path)
        assert tokenizer.load_tokenizer(tmp_path).sha256() == tok.sha256() and tok.bos == [] == tok.opening()


# --- what it loses --------------------------------------------------------------------------------

def note_on(capsys, path, text):
    """(status of prepare.py with a tokenizer on this text, the note in meta.json, what was printed)"""
    with open('zoo.txt', 'w', encoding='utf-8') as f:
        f.write(text)
    shutil.rmtree('data/zoo', ignore_errors=True)
    capsys.readouterr()
    status = script('prepare.py', f'zoo.txt --tokenizer={path} --workers=1')
    out, err = capsys.readouterr()
    if status:
        return status, '', err
    with open('data/zoo/meta.json', encoding='utf-8') as f:
        notes = [entry['note'] for entry in json.load(f)['notes'] if entry['file'] == 'tokenizer.json']
    assert len(notes) <= 1 and (not notes or notes[0].removeprefix('the tokenizer ') in out)
    return status, ''.join(notes), out


def test_what_a_tokenizer_loses_is_said(foreign_tokenizers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = 'the cat sat on the mat and the dog ran home\n' * 300
    for kind in foreign.GIVES_BACK:
        assert note_on(capsys, foreign_tokenizers / kind, text.replace('cat', 'Čat 中文'))[:2] == (0, '')
    assert note_on(capsys, 'byte', text)[1] == note_on(capsys, 'bpe', text)[1] == ''
    status, note, _ = note_on(capsys, foreign_tokenizers / 'wordpiece', text.replace('the cat', 'THE cät'))
    assert status == 0 and 'capitals become small letters' in note and 'accents are dropped' in note
    assert '100% of the newlines are lost' in note and 'unknown' not in note
    lower = foreign.save(foreign.unigram(normalizers.Lowercase()), tmp_path / 'lower')
    status, note, _ = note_on(capsys, lower, text.replace('the dog', 'The Dog 中文'))
    assert 'of the characters are unknown to it' in note and 'capitals' in note and 'newlines' not in note
    status, note, _ = note_on(capsys, foreign_tokenizers / 't5', text.replace('the ', '  the\t'))
    assert '100% of the newlines are lost, 100% of the tabs are lost' in note and 'spaces are lost' in note
    note = note_on(capsys, foreign_tokenizers / 'words', text.replace(' mat', '.'))[1]
    assert 'spaces are put where none were' in note
    status, _, err = note_on(capsys, foreign_tokenizers / 'unigram', text + 'ПРИВЕТ МИР ' * 3000)
    assert status == 2 and re.search(r'unigram: [67]\d% of the characters of these texts are unknown', err)
    assert '--tokenizer=bpe' in err and err.count('\n') == 1 and not os.path.exists('data/zoo')


def test_a_tokenizer_at_a_loss_is_one_line(tmp_path, monkeypatch, capsys):
    """No id for what it does not know, neither bytes."""
    monkeypatch.chdir(tmp_path)
    hf = foreign.KINDS['unigram']()
    model = json.loads(hf.to_str())['model']
    path = foreign.save(hf, tmp_path / 'none', model={**model, 'unk_id': None})
    status, _, err = note_on(capsys, path, 'the cat 中文 ' * 300)
    assert status == 2 and 'no ids for this text' in err and '--tokenizer=bpe' in err and err.count('\n') == 1
    drops = Tokenizer(models.BPE({c: i for i, c in enumerate(['</s>', *'thecats '])}, []))
    status, note, _ = note_on(capsys, foreign.save(drops, tmp_path / 'drops'), 'the cat sat 中文 ' * 300)
    assert status == 0 and re.search(r'1\d% of the characters come back as others or not at all', note)
    status, _, err = note_on(capsys, tmp_path / 'drops', '中文 the ' * 3 + '中文中文' * 300)
    assert status == 2 and 'unknown to it' in err


def test_unknown_white_space_is_no_unknown_character(tmp_path, monkeypatch, capsys):
    """Nor is a table refused for its tabs."""
    monkeypatch.chdir(tmp_path)
    hf = foreign.llama()
    path = foreign.save(hf, tmp_path / 'no_bytes', model={**json.loads(hf.to_str())['model'], 'byte_fallback': False})
    status, note, _ = note_on(capsys, path, 'a\tt\tm\tn\n\n' * 300)
    assert status == 0 and '100% of the newlines are lost, 100% of the tabs are lost' in note and 'unknown' not in note
    ends = foreign.save(hf, tmp_path / 'ends', model={
        **json.loads(hf.to_str())['model'], 'byte_fallback': False, 'unk_token': '</s>'})
    assert '% of the characters are unknown to it, and end a text where they stand' in note_on(
        capsys, ends, 'the cat é ' * 300)[1]
    assert script('prepare.py', '--inspect data/zoo') == 0 and 'no document was decoded' in capsys.readouterr().out


def test_a_beginning_that_only_the_config_asks_for_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, hf in enumerate((foreign.llama(), foreign.byte_level(add_prefix_space=False),
                                 foreign.with_marks(foreign.llama()))):
        path = foreign.save(hf, tmp_path / str(number))
        (tmp_path / str(number) / 'tokenizer_config.json').write_text(
            '{"add_bos_token": true, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}', encoding='utf-8')
        for given in (path, number):
            note = note_on(capsys, given, 'the cat sat on the mat\n' * 300)[1]
            assert ('asks for <s> before every text' in note) == (number < 2)
    assert tokenizer.load_tokenizer(path).bos == [1]


def test_what_is_lost_is_found_in_few_large_pieces(foreign_tokenizers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = 'The cat sat\n' * 200_000
    assert 'newlines are lost' in note_on(capsys, foreign_tokenizers / 't5', text)[1]


# --- a part of a text -----------------------------------------------------------------------------

def test_a_part_never_begins_within_a_character(foreign_tokenizers):
    text = 'aé中😀b'
    for tok in (tokenizer.build_tokenizer('byte'), tokenizer.load_tokenizer(foreign_tokenizers / 'llama')):
        ids = tok.encode(text).tolist()
        for start in range(len(ids) + 1):
            for end in range(start, len(ids) + 1):
                a, b = tok.whole(ids, start, end)
                shown = tok.decode(ids[a:b], begins=a == 0)
                assert a <= start <= end <= b and '\ufffd' not in shown and shown in text
        before, token, after = around(tok, ids, ids.index(tok.encode('中').tolist()[-1]))
        assert (before, token, after) == ('aé', '中 [ad]', '😀b')
    assert tok.whole(ids, 0, len(ids)) == (0, len(ids)) and tok.whole([], 0, 0) == (0, 0)
    broken = [0x80] * 9                             # of no character
    assert tokenizer.build_tokenizer('byte').whole(broken, 4, 5) == (1, 8)


# --- the file -------------------------------------------------------------------------------------

def test_a_tokenizer_is_opened_by_its_content(tmp_path):
    text = foreign.KINDS['llama']().to_str()
    known = tokenizer.from_text(text)
    for encoding in ('utf-8-sig', 'utf-16', 'utf-16-le', 'utf-32'):
        path = tmp_path / encoding
        path.write_bytes(text.encode(encoding))
        tok = tokenizer.load_tokenizer(path)
        assert tok.sha256() == known.sha256() and tok.decode(tok.encode('the é cat')) == 'the é cat'
    spec = json.loads(foreign.KINDS['gpt2']().to_str())
    spec['model'].pop('type')                       # as in the first files of this format
    for name in ('truncation', 'padding', 'normalizer', 'post_processor'):
        spec.pop(name)
    (tmp_path / 'old.json').write_text(json.dumps(spec), encoding='utf-8')
    tok = tokenizer.load_tokenizer(tmp_path / 'old.json')
    assert tok.fast and tok.decode(tok.encode('the é cat')) == 'the é cat'


@pytest.mark.parametrize('name, raw, words', [
    ('empty.json', b'', 'empty'),
    ('half.json', b'{"model": {"type": "BPE", "voc', 'damaged JSON'),
    ('other.json', b'{"a": 1}', 'has a model'),
    ('list.json', b'[1]', 'has a model'),
    ('model.json', b'{"model": {"type": "Foo", "vocab": {}}}', 'Foo WordPiece'),
    ('spiece.model', b'\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02', 'SentencePiece from_pretrained'),
    ('a.tiktoken', b'IQ== 0\nIg== 1\nIw== 2\n', 'ranks from_pretrained'),
    ('merges.txt', b'#version: 0.2\nt h\n', 'merges from_pretrained'),
    ('t.json.gz', b'\x1f\x8b\x08\x00', 'unpack'),
    ('deep.json', b'[' * 100_000, 'no JSON'),
    ('x.bin', bytes(range(256)), 'no JSON'),
    ('folder/vocab.json', b'{}', 'vocab.json from_pretrained'),
])
def test_what_is_no_tokenizer_is_one_line(tmp_path, capsys, name, raw, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    with pytest.raises(SystemExit) as stop:
        tokenizer.build_tokenizer(str(path.parent if 'folder' in name else path))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1
    assert all(word in err for word in words.split())
