"""Tokenizers of all kinds that people bring: no id stops a sample, bytes are those of the text, what
they ask for and what they lose is kept and said."""
import json
import os
import random
import re

import numpy as np
import pytest
from helpers import foreign
from helpers.runs import script, train
from tokenizers import normalizers

from mambino import detokenizer, tokenizer
from mambino.export import gguf_tokenizer, to_hf
from mambino.prepare import spool
from mambino.sample.text import Writer, encode_prompt, token_text
from mambino.train.batches import open_dataset
from model_gpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('one_thread')
TEXTS = ['the cat sat on the mat.', 'the dog ran home', '', 'é 中文 the cat', '中文 THE\n\tü  end ',
         'the</s> [SEP] <s>']


@pytest.fixture(params=foreign.KINDS)
def tok(request, foreign_tokenizers):
    return tokenizer.load_tokenizer(foreign_tokenizers / request.param)


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


def test_text_of_ids_is_what_their_maker_says(foreign_tokenizers):
    rng = random.Random(2)
    for kind in foreign.KINDS:
        tok = tokenizer.load_tokenizer(foreign_tokenizers / kind)
        for text in (*TEXTS, *(' '.join(rng.choices(foreign.WORDS, k=9)) for _ in range(9))):
            ids = tok.encode(text)
            assert streamed(tok, ids.tolist()) == tok.decode(ids)
            if kind in foreign.GIVES_BACK:
                assert tok.decode(ids) == text
            elif kind not in ('clip', 'strange'):           # whose maker leaves marks in it
                assert tok.decode(ids) == tok.hf.decode(ids.tolist())
            if tok.pieces and kind in foreign.GIVES_BACK:
                space = ' ' if tok.pieces.prefixed and text else ''
                assert b''.join(map(tok.token_bytes, ids)).decode('utf-8') == space + text


def test_bytes_that_are_no_character(foreign_tokenizers):
    for kind in 'llama', 'mistral', 'gemma', 'unigram_bytes', 'strange':
        tok = tokenizer.load_tokenizer(foreign_tokenizers / kind)

        def ids(text, data, tok=tok):
            return [*tok.encode(text).tolist(), *(tok.hf.token_to_id(f'<0x{b:02X}>') for b in data)]

        end = tok.encode(' cat', begins=False).tolist()
        for data in (b'\xc3\xa9\xc3', b'\xe4\xb8\xad\x80', b'\xc3\xa9\xff', b'\xff', b'\xe4\xb8'):
            text = streamed(tok, [*ids('the', data), *end])
            assert text.strip().startswith('the') and text.endswith(' cat') and '\ufffd' in text
            if tok.pieces:
                assert text == 'the' + data.decode('utf-8', 'replace') + ' cat'


def test_only_the_library_can_tell(foreign_tokenizers):
    tok = tokenizer.load_tokenizer(foreign_tokenizers / 'strange')
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


def test_a_text_that_goes_on_has_no_space_before_it(foreign_tokenizers):
    for kind in foreign.GIVES_BACK:
        tok = tokenizer.load_tokenizer(foreign_tokenizers / kind)
        for cut in range(24):
            text = 'the cat sat\non the  mat.'
            if text[cut:cut + 1] in ('', ' ') or not cut:
                first, rest = tok.encode(text[:cut]), tok.encode(text[cut:], begins=False)
                assert tok.decode(np.concatenate([first, rest])) == text
                assert tok.decode(rest, begins=False) == text[cut:] or not cut

    hf = foreign.byte_level(add_prefix_space=False)
    hf.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    tok = tokenizer.from_text(hf.to_str())
    assert tok.decode(tok.encode('  the cat')) == 'the cat'
    assert tok.decode(tok.encode(' the cat', begins=False), begins=False) == ' the cat'


def test_a_prompt_of_which_nothing_is_left_begins_a_text(foreign_tokenizers, tmp_path, monkeypatch, capsys):
    """As the newline that is the default, for a tokenizer that leaves them out."""
    monkeypatch.chdir(tmp_path)
    open('x.txt', 'w', encoding='utf-8').write('the cat sat on the mat. ' * 200)
    assert script('prepare.py', f'x.txt --tokenizer={foreign_tokenizers / "t5"} --workers=1') == 0
    train(SMALL, '--sample_interval=1')
    for flags in ('', '--start=" " --logprobs=2', '--start=" " --beams=2', '--session=a --start=" "',
                  '--session=a --start=" "'):
        assert script('sample.py', f'--device=cpu --max_new_tokens=4 {flags}') == 0
    tok = tokenizer.load_tokenizer(foreign_tokenizers / 't5')
    assert encode_prompt(tok, '\n') == [tok.eot] and encode_prompt(tok, '\n', begins=False) == []
    capsys.readouterr()
    open('n.txt', 'w').write('\n')
    assert script('sample.py', '--score=n.txt --device=cpu') == 2 and 'has no ids' in capsys.readouterr().err


# --- bits per byte --------------------------------------------------------------------------------

def evaluated(capsys, path):
    """bits per byte of the run in out/: of train.py's evaluation, and of sample.py's score of a file."""
    capsys.readouterr()
    train('--eval_only=True', SMALL, '--dtype=auto')
    ours = float(re.search(r'bits_per_byte ([\d.]+)', capsys.readouterr().out)[1])
    assert script('sample.py', f'--score={path} --device=cpu') == 0
    return ours, float(re.search(r'^bits/byte +([\d.]+)', capsys.readouterr().out, re.M)[1])


SMALL = '--model=gpt --dataset=x --block_size=64 --batch_size=3 --tokens_per_step=192 --max_iters=2 --eval_interval=9'
SEVEN = ['char', 'byte', 'bpe', 'gpt2', 'llama', 'unigram', 'wordpiece']


@pytest.mark.parametrize('kind', [*SEVEN, 'llama+bos', 'wordpiece+bos', 'strange'])
def test_an_evaluation_and_a_score_of_the_same_text_agree(foreign_tokenizers, tmp_path, monkeypatch, capsys, kind):
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
    all_bytes = data.token_bytes[data.read('val')].sum()
    assert len(targets) > 100 and all_bytes == pytest.approx(len(val.encode()))
    assert 0 <= all_bytes - data.token_bytes[targets].sum() < 9     # of the first token, which is given
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


def test_the_end_that_only_its_config_names(tmp_path, monkeypatch):
    """Those who encode know it too; nor does a text forge it."""
    monkeypatch.chdir(tmp_path)
    documents()
    (tmp_path / 'docs' / 'x.txt').write_text('the cat </s> sat <|fin|> on the mat', encoding='utf-8')
    spec = json.loads(foreign.unigram().to_str())
    spec['model']['vocab'].append(['<|fin|>', -1.0])
    for number, kind in enumerate((foreign.byte_level(['<|fin|>', '<|begin|>']).to_str(), json.dumps(spec))):
        folder = tmp_path / f'tokenizer{number}'
        folder.mkdir()
        (folder / 'tokenizer.json').write_text(kind, encoding='utf-8')
        (folder / 'tokenizer_config.json').write_text('{"eos_token": "<|fin|>"}', encoding='utf-8')
        assert script('prepare.py', f'docs --tokenizer={folder} --out=data/x --workers=1') == 0
        data = open_dataset('x')
        assert data.tokenizer.name_of(data.tokenizer.eot) == '<|fin|>'
        for split, counts in data.meta['splits'].items():
            assert (data.read(split) == data.tokenizer.eot).sum() == counts['documents']


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
    for kind in ('unigram', 't5', 'words'):                 # whose models find </s> in a text by themselves
        folder = tmp_path / kind
        tok = tokenizer.load_tokenizer(foreign.save(foreign.KINDS[kind](), folder))
        to_hf.write(net, tok, folder)
        same, texts = to_hf.same_ids(tok, folder, False)
        assert same == texts > 800
        assert 'name of a special token' in to_hf.verify(net, tok, folder)['note']
    tok = tokenizer.load_tokenizer(foreign.save(foreign.with_marks(foreign.KINDS['gpt2']()), tmp_path / 'x'))
    said = gguf_tokenizer.vocabulary(tok, 600)
    assert (said['bos_token_id'], said['eos_token_id'], said['add_bos_token']) == (1, 2, True)
    tok.bos = [1, 2]
    with pytest.raises(ValueError, match='2 tokens'):
        gguf_tokenizer.vocabulary(tok, 600)


def test_a_run_says_that_texts_begin_otherwise_now(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    documents()
    path = foreign.save(foreign.with_marks(foreign.llama()), tmp_path / 'tokenizer')
    assert script('prepare.py', f'docs --tokenizer={path} --out=data/x --workers=1') == 0
    train(SMALL)
    capsys.readouterr()
    train(SMALL, '--eval_only=True')
    assert 'before every text' not in capsys.readouterr().out
    with open('data/x/meta.json', encoding='utf-8') as f:
        meta = json.load(f)
    del meta['bos']                                         # as if it were made by a version that knew none
    with open('data/x/meta.json', 'w', encoding='utf-8') as f:
        json.dump(meta, f)
    train(SMALL, '--eval_only=True')
    assert 'stands <s> in what out was trained on, and nothing in dataset x' in capsys.readouterr().out
