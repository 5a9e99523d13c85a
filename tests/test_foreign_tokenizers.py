"""Tokenizers of all kinds that people bring: no id stops a sample, bytes are those of the text, what
they ask for and what they lose is kept and said."""
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
from helpers import foreign
from helpers.runs import script, train
from tokenizers import Tokenizer, models, normalizers

from mambino import detokenizer, tokenizer
from mambino.export import gguf_tokenizer, to_hf
from mambino.prepare import spool
from mambino.sample.score import around
from mambino.sample.text import Writer, encode_prompt, token_text
from mambino.train.batches import open_dataset
from model_gpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread')
TEXTS = ['the cat sat on the mat.', 'the dog ran home', '', 'é 中文 the cat', '中文 THE\n\tü  end ',
         'the</s> [SEP] <s>']
GIVES_BACK = ('llama', 'gemma', 'mistral', 'unigram_bytes', 'llama3', 'prefix', 'gpt2')     # every text of TEXTS


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizers')
    for kind, make in foreign.KINDS.items():
        foreign.save(make(), folder / kind)
    return folder


@pytest.fixture(params=foreign.KINDS)
def tok(request, folder):
    return tokenizer.load_tokenizer(folder / request.param)


def streamed(tok, ids, begins=True):
    stream = tok.stream(begins)
    return ''.join([stream.feed(i) for i in ids]) + stream.flush()


# --- from ids to text -----------------------------------------------------------------------------

def test_no_ids_stop_a_sample(tok):
    rng = random.Random(1)
    for n in range(60):
        ids = rng.choices(range(tok.vocab_size), k=n)
        assert streamed(tok, ids) == tok.decode(ids)
        writer = Writer(tok, ['home'], before=ids[:3])
        assert all(isinstance(writer.feed(i), str) for i in ids[3:]) and isinstance(writer.close(), str)
        assert streamed(tok, [-1, *ids, tok.vocab_size, 10**9]).count('\ufffd') >= 1 or not tok.pieces


def test_text_of_ids_is_what_their_maker_says(folder):
    rng = random.Random(2)
    for kind in foreign.KINDS:
        tok = tokenizer.load_tokenizer(folder / kind)
        for text in (*TEXTS, *(' '.join(rng.choices(foreign.WORDS, k=9)) for _ in range(9))):
            ids = tok.encode(text)
            assert streamed(tok, ids.tolist()) == tok.decode(ids)
            if kind in GIVES_BACK:
                assert tok.decode(ids) == text
            elif kind not in ('clip', 'strange'):           # whose maker leaves marks in it
                assert tok.decode(ids) == tok.hf.decode(ids.tolist())
            if tok.pieces and kind in GIVES_BACK:
                space = ' ' if tok.pieces.prefixed and text else ''
                assert b''.join(map(tok.token_bytes, ids)).decode('utf-8') == space + text


def test_bytes_that_are_no_character(folder):
    for kind in 'llama', 'mistral', 'gemma', 'unigram_bytes', 'strange':
        tok = tokenizer.load_tokenizer(folder / kind)

        def ids(text, data, tok=tok):
            return [*tok.encode(text).tolist(), *(tok.hf.token_to_id(f'<0x{b:02X}>') for b in data)]

        end = tok.encode(' cat', begins=False).tolist()
        for data in (b'\xc3\xa9\xc3', b'\xe4\xb8\xad\x80', b'\xc3\xa9\xff', b'\xff', b'\xe4\xb8'):
            text = streamed(tok, [*ids('the', data), *end])
            assert text.strip().startswith('the') and text.endswith(' cat') and '\ufffd' in text
            if tok.pieces:
                assert text == 'the' + data.decode('utf-8', 'replace') + ' cat'


def test_only_the_library_can_tell(folder):
    tok = tokenizer.load_tokenizer(folder / 'strange')
    assert tok.pieces is None and tok.token_bytes(70) is None and tok.table is None
    assert token_text(tok, tok.encode('the')[0]) == "'the'" or token_text(tok, tok.encode('the')[0]) == "' the'"

    class Panic(BaseException):
        pass

    class Library:
        def decode(self, ids, skip_special_tokens):
            if 3 in ids:
                raise Panic
            return ''.join('abc'[i] for i in ids)

    stream = detokenizer.WindowStream(Library(), {9})
    assert [stream.feed(i) for i in (0, 9, 1, 3, 2)] + [stream.flush()] == ['a', '', 'b', '', '\ufffdc', '']


def test_ids_that_only_the_vocabulary_has(tmp_path):
    """A hole between the model's ids and those that were added."""
    hf = foreign.llama()
    path = foreign.save(hf, tmp_path)
    spec = json.load(open(path, encoding='utf-8'))
    spec['model']['vocab']['▁far'] = len(spec['model']['vocab']) + 50
    json.dump(spec, open(path, 'w', encoding='utf-8'))
    tok = tokenizer.load_tokenizer(path)
    assert tok.decode(range(tok.vocab_size - 51, tok.vocab_size)) == 'far'
    hole = tok.vocab_size - 9
    assert tok.token_bytes(hole) == b'' and token_text(tok, hole) == f'[{hole}]'


def test_a_text_forges_no_mark(tok):
    special = {token['id'] for token in json.loads(tok.text)['added_tokens']}
    unknown = tok.unknown
    for mark in (*foreign.MARKS[1:], *foreign.BERT[1:], '<|end_of_text|>', '<|begin_of_text|>'):
        for text in (mark, f'the {mark} cat', f'the{mark}'):
            assert not set(tok.encode(text).tolist()) & (special - {unknown})


def test_a_text_that_goes_on_has_the_spaces_of_its_words(tok):
    for text in (' the cat sat', '\nthe cat sat', 'the cat sat'):
        assert tok.decode(tok.encode(text, begins=False), begins=False).split() == ['the', 'cat', 'sat']


def test_a_text_that_goes_on_has_no_space_before_it(folder):
    for kind in GIVES_BACK:
        tok = tokenizer.load_tokenizer(folder / kind)
        for cut in range(24):
            text = 'the cat sat\non the  mat.'
            if text[cut:cut + 1] in ('', ' ') or not cut:
                first, rest = tok.encode(text[:cut]), tok.encode(text[cut:], begins=False)
                assert tok.decode(np.concatenate([first, rest])) == text
                assert tok.decode(rest, begins=False) == text[cut:] or not cut


# --- bits per byte --------------------------------------------------------------------------------

def evaluated(capsys, path):
    """bits per byte of the run in out/: of train.py's evaluation, and of sample.py's score of a file."""
    capsys.readouterr()
    train('--eval_only=True', SMALL, '--dtype=auto')
    ours = float(re.search(r'bits_per_byte ([\d.]+)', capsys.readouterr().out)[1])
    assert script('sample.py', f'--score={path} --device=cpu') == 0
    return ours, float(re.search(r'bits/byte +([\d.]+)', capsys.readouterr().out)[1])


SMALL = '--model=gpt --dataset=x --block_size=64 --batch_size=3 --tokens_per_step=192 --max_iters=2 --eval_interval=9'
SEVEN = ['char', 'byte', 'bpe', 'gpt2', 'llama', 'unigram', 'wordpiece']


@pytest.mark.parametrize('kind', [*SEVEN, 'llama+bos', 'wordpiece+bos', 'strange'])
def test_an_evaluation_and_a_score_of_the_same_text_agree(folder, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    text = ''.join(f'{word}{rng.choice([" ", " ", ". ", chr(10)])}'
                   for word in rng.choices([*foreign.WORDS, 'Öl', 'THE', 'naïve'], k=1500))
    open('x.txt', 'w', encoding='utf-8', newline='').write(text)
    name, _, marks = kind.partition('+')
    path = kind
    if kind not in ('char', 'byte', 'bpe'):
        hf = foreign.KINDS[name]()
        if marks:
            hf = foreign.with_marks(hf, *(('[CLS]', '[SEP]') if name == 'wordpiece' else ('<s>',)))
        path = foreign.save(hf, tmp_path / 'tokenizer')
    assert script('prepare.py', f'x.txt --tokenizer={path} --vocab_size=300 --workers=1') == 0
    val = text[int(len(text) * 0.9):]
    open('val.txt', 'w', encoding='utf-8', newline='').write(val)
    train(SMALL)
    data = open_dataset('x')
    targets = np.concatenate([y[y >= 0] for _, y in data.val_batches(1, 64)])
    assert len(targets) > 100 and data.token_bytes[targets].sum() == pytest.approx(len(val.encode()))
    ours, score = evaluated(capsys, 'val.txt')
    assert ours == pytest.approx(score, abs=1e-4) and ours > 0.1


# --- what begins and ends a text ------------------------------------------------------------------

def documents(n=40):
    """n texts in docs/."""
    os.makedirs('docs', exist_ok=True)
    for i in range(n):
        with open(f'docs/{i}.txt', 'w', encoding='utf-8') as f:
            f.write(f'the cat sat on the mat{" and ran home" * i}.\n')


@pytest.mark.parametrize('kind, marks, bos, eot', [
    ('llama', ('<s>',), ['<s>'], '</s>'),
    ('llama', ('<s>', '</s>'), ['<s>'], '</s>'),
    ('llama', ('</s>',), ['</s>'], '</s>'),                 # as OPT's: one for both
    ('wordpiece', ('[CLS]', '[SEP]'), ['[CLS]'], '[SEP]'),
    ('unigram', ('', '</s>'), [], '</s>'),                  # as T5's
    ('gpt2', ('<s>',), ['<s>'], '</s>'),
    ('llama3', None, ['<|begin_of_text|>'], '<|end_of_text|>'),
    ('llama', None, [], '</s>'),
])
def test_documents_begin_as_the_tokenizer_asks(tmp_path, monkeypatch, kind, marks, bos, eot):
    monkeypatch.chdir(tmp_path)
    documents()
    hf = foreign.KINDS[kind]()
    path = foreign.save(foreign.with_marks(hf, *marks) if marks else hf, tmp_path / 'tokenizer')
    assert script('prepare.py', f'docs --tokenizer={path} --out=data/x --workers=1') == 0
    data = open_dataset('x')
    tok = data.tokenizer
    assert [tok.name_of(i) for i in tok.bos] == bos and tok.name_of(tok.eot) == eot
    assert data.meta.get('bos', []) == tok.bos and data.meta['eot'] == tok.eot
    for split, counts in data.meta['splits'].items():
        ids = data.read(split)
        ends = np.fromfile(f'data/x/{split}.idx', '<u8').astype(int)
        assert (ids == tok.eot).sum() == counts['documents'] and (ids[ends[1:] - 1] == tok.eot).all()
        if bos and bos != [eot]:
            assert (ids == tok.bos[0]).sum() == counts['documents'] and (ids[ends[:-1]] == tok.bos[0]).all()
        for start, end in zip(ends, ends[1:]):
            assert tok.decode(ids[start:end]).strip().startswith('the cat sat on the mat')
    again = tokenizer.from_state(tok.state())               # as in a checkpoint
    assert (again.eot, again.bos) == (tok.eot, tok.bos)
    text = tok.encode('the cat').tolist()
    goes_on = tok.encode('the cat', begins=False).tolist()
    assert encode_prompt(tok, 'the cat') == tok.bos + text
    assert encode_prompt(tok, '<|endoftext|>the cat') == (tok.bos or [tok.eot]) + text
    assert encode_prompt(tok, 'the cat', begins=False) == goes_on
    assert encode_prompt(tok, '<|endoftext|>the cat', begins=False) == [tok.eot, *tok.opening(), *text]


def test_a_long_document_begins_once(tmp_path, monkeypatch):
    """It is encoded in pieces, and so is what is appended; its halves are texts of their own."""
    monkeypatch.chdir(tmp_path)
    path = foreign.save(foreign.with_marks(foreign.llama()), tmp_path / 'tokenizer')
    text = 'the cat sat\non the mat. ' * 60_000
    open('x.txt', 'w', encoding='utf-8', newline='').write(text)
    open('y.txt', 'w', encoding='utf-8').write('the dog ran home')
    assert script('prepare.py', f'x.txt --tokenizer={path} --workers=1') == 0
    data = open_dataset('x')
    whole = data.tokenizer.encode(text[:1_296_000])
    assert len(text) > 3 * spool.PIECE and np.array_equal(data.read('train'), [1, *whole])
    assert data.read('val')[0] == 1 and (data.read('val') == 1).sum() == 1
    assert script('prepare.py', 'y.txt --append --out=data/x --workers=1') == 0
    both = [open_dataset('x').read(split) for split in ('train', 'val')]
    assert sum((ids == 1).sum() for ids in both) == 3 == sum((ids == 2).sum() for ids in both)


def test_what_was_made_before_goes_on_as_it_was(tmp_path):
    """A dataset and a checkpoint of a version that knew no begin of text have none."""
    path = foreign.save(foreign.with_marks(foreign.llama()), tmp_path)
    tok = tokenizer.load_tokenizer(path)
    assert tok.bos == [1]
    assert tokenizer.from_state({'kind': 'bpe', 'json': tok.text}).bos == []
    meta = {'eot': 2, 'tokenizer': {'sha256': tok.sha256()}}
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    assert tokenizer.load_tokenizer(tmp_path).bos == [] and tokenizer.build_tokenizer(str(path)).bos == []
    (tmp_path / 'meta.json').write_text(json.dumps({**meta, 'bos': [1]}), encoding='utf-8')
    assert tokenizer.load_tokenizer(path).bos == [1]
    (tmp_path / 'meta.json').write_text('{"tokenizer": {"sha256": "another"}}', encoding='utf-8')
    assert tokenizer.load_tokenizer(path).bos == [1]


def test_the_end_of_text_is_what_the_tokenizer_says(tmp_path):
    hf = foreign.byte_level(['<pad>', '<|eot|>', '<|im_end|>', '</s>'])
    path = foreign.save(hf, tmp_path)
    assert tokenizer.load_tokenizer(path).eot == 3          # a name that is known
    for said in ('<|eot|>', {'content': '<|eot|>'}):
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': said}), encoding='utf-8')
        assert tokenizer.load_tokenizer(path).eot == 1
    foreign.save(foreign.with_marks(hf, '<pad>', '<|im_end|>'), tmp_path)
    assert tokenizer.load_tokenizer(path).eot == 2 and tokenizer.load_tokenizer(path).bos == [0]


def test_exports_begin_a_text_as_training_did(tmp_path):
    transformers = pytest.importorskip('transformers')
    net = GPT(GPTConfig(vocab_size=600, n_layer=1, n_embd=32, n_head=2, block_size=32)).eval()
    asked = {'llama': ['<s>'], 'wordpiece': ['[CLS]', '[SEP]'], 'gpt2': ['<s>', '</s>'], 'llama3': None}
    for kind, marks in asked.items():
        hf = foreign.KINDS[kind]()
        folder = tmp_path / kind
        tok = tokenizer.load_tokenizer(foreign.save(foreign.with_marks(hf, *marks) if marks else hf, folder))
        for bos in (tok.bos, []):                           # of now, and of a run from before
            tok.bos = bos
            to_hf.write(net, tok, folder)
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            assert theirs('the cat sat')['input_ids'] == [*bos, *tok.encode('the cat sat').tolist()]
            assert theirs.bos_token_id == tok.context()[0] and theirs.eos_token_id == tok.eot
    tok = tokenizer.load_tokenizer(foreign.save(foreign.with_marks(foreign.KINDS['gpt2']()), tmp_path / 'x'))
    said = gguf_tokenizer.vocabulary(tok, 600)
    assert (said['bos_token_id'], said['eos_token_id'], said['add_bos_token']) == (1, 2, True)
    tok.bos = [1, 2]
    with pytest.raises(ValueError, match='2 tokens'):
        gguf_tokenizer.vocabulary(tok, 600)


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


def test_what_a_tokenizer_loses_is_said(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = 'the cat sat on the mat and the dog ran home\n' * 300
    for kind in GIVES_BACK:
        assert note_on(capsys, folder / kind, text.replace('cat', 'Čat 中文'))[:2] == (0, '')
    assert note_on(capsys, 'byte', text)[1] == note_on(capsys, 'bpe', text)[1] == ''
    status, note, _ = note_on(capsys, folder / 'wordpiece', text.replace('the cat', 'THE cät'))
    assert status == 0 and 'capitals become small letters' in note and 'accents are dropped' in note
    assert '100% of the newlines are lost' in note and 'unknown' not in note
    lower = foreign.save(foreign.unigram(normalizers.Lowercase()), tmp_path / 'lower')
    status, note, _ = note_on(capsys, lower, text.replace('the dog', 'The Dog 中文'))
    assert 'of the characters are unknown to it' in note and 'capitals' in note and 'newlines' not in note
    status, note, _ = note_on(capsys, folder / 't5', text.replace('the ', '  the\t'))
    assert '100% of the newlines are lost, 100% of the tabs are lost' in note and 'spaces are lost' in note
    assert 'spaces are put where none were' in note_on(capsys, folder / 'words', text.replace(' mat', '.'))[1]
    status, _, err = note_on(capsys, folder / 'unigram', text + 'ПРИВЕТ МИР ' * 3000)
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


def test_what_is_lost_is_found_in_few_large_pieces(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = 'The cat sat\n' * 200_000
    assert 'newlines are lost' in note_on(capsys, folder / 't5', text)[1]


# --- a part of a text -----------------------------------------------------------------------------

def test_a_part_never_begins_within_a_character(folder):
    text = 'aé中😀b'
    for tok in (tokenizer.build_tokenizer('byte'), tokenizer.load_tokenizer(folder / 'llama')):
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
