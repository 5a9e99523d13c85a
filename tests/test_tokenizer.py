"""Every kind: exact round trips, ids equal to Hugging Face's, no way to forge end-of-text,
streaming, identity.
"""
import os
import random

import numpy as np
import pytest
import torch
from helpers import pace
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mambino import seams, tokenizer

SOURCE = open(os.__file__, encoding='utf-8').read()
VARIED = [
    '', ' ', '\n', 'a', 'Hello, world! It\'s 1234567 o\'clock; we\'ll see\'em',
    '  indented\n\n\n\tcode():\r\n    x = 1  \n', 'naïve café ﬁ Ǆ ß İ', '日本語のテキスト。改行なし',
    'привет мир', 'שלום עולם', 'हिन्दी पाठ', 'ไทย', '한국어', '👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽',
    'e\u0301 \u200b\u200d\u2028\u2029\x85\xa0\u3000x',
    ''.join(map(chr, range(256))),
    '\x00\x01\x1c\x1d\x1e\x1f\x7f', ' ' * 300 + 'x' + '\t' * 50, '-' * 200 + '=' * 7, '½ ² Ⅷ ٣ 𝟘',
    '\U0010ffff\ue000\ufffd', '<|endoftext|>', 'a<|endoftext|>b <|im_start|>',
    SOURCE[:5000],
    random.Random(1).randbytes(3000).decode('latin-1'),
    ''.join(
        chr(c) for c in random.Random(2).choices([*range(0xD800), *range(0xE000, 0x30000)], k=3000)
    ),
]
TRAIN = [SOURCE] + VARIED * 3


@pytest.fixture(scope='module', params=['char', 'byte', 'bpe'])
def tok(request):
    return tokenizer.build_tokenizer(request.param, TRAIN, vocab_size=1500)


@pytest.fixture(scope='module')
def bpe():
    return tokenizer.build_tokenizer('bpe', TRAIN, vocab_size=1500)


def hf_ids(tok, text):
    hf = Tokenizer.from_str(tok.text)
    hf.encode_special_tokens = True
    return hf.encode(text, add_special_tokens=False).ids


def test_round_trip(tok):
    for text, ids in zip(VARIED, tok.encode_batch(VARIED)):
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tok.decode(ids) == text
        assert tok.eot not in ids and (ids < tok.vocab_size).all() and (ids >= 0).all()
        assert np.array_equal(tok.encode(text), ids)
        assert b''.join(map(tok.token_bytes, ids)) == text.encode('utf-8')


def test_ids_are_those_of_hugging_face(tok):
    for text in VARIED:
        assert tok.encode(text).tolist() == hf_ids(tok, text), text


def test_opens_in_transformers(tok, tmp_path):
    from transformers import PreTrainedTokenizerFast
    assert tok.save(tmp_path) == 'tokenizer.json' and os.listdir(tmp_path) == ['tokenizer.json']
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    assert len(theirs) == tok.vocab_size
    assert theirs.convert_tokens_to_ids('<|endoftext|>') == tok.eot
    for text in VARIED:
        if '<|endoftext|>' not in text:  # which they take for the special token
            ids = tok.encode(text).tolist()
            assert theirs(text, add_special_tokens=False).input_ids == ids
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_bpe_takes_the_fast_path(bpe):
    assert bpe.fast is not None and bpe.vocab_size == 1500 and bpe.eot == 1499


def test_every_code_point_is_split_as_hugging_face_does():
    """tiktoken and tokenizers bring Unicode tables of their own; a token across 'a' and each byte
    shows where they cut.
    """
    names = [tokenizer.BYTE_TO_CHAR[b] for b in range(256)]
    merges = [(names[ord(a)], names[b]) for a in 'a1-' for b in range(128, 256)]
    vocab = {name: i for i, name in enumerate(sorted(names) + [a + b for a, b in merges])}
    tok = tokenizer.finish(tokenizer.byte_level(vocab, merges))
    assert tok.fast is not None
    text = [''.join(f'a{chr(c)}1{chr(c)}-{chr(c)}\n' for c in range(start, start + 64))
            for start in range(0, 0x32000, 64) if not 0xd800 <= start < 0xe000]
    theirs = tok.hf.encode_batch(text, add_special_tokens=False)
    assert all(ours.tolist() == other.ids for ours, other in zip(tok.encode_batch(text), theirs))


def test_same_texts_same_tokenizer(bpe):
    again = tokenizer.build_tokenizer('bpe', iter(TRAIN), vocab_size=1500)
    assert again.text == bpe.text and again.sha256() == bpe.sha256()
    assert tokenizer.build_tokenizer('bpe', TRAIN[::-1], vocab_size=1500).sha256() == bpe.sha256()
    assert tokenizer.build_tokenizer('bpe', TRAIN, vocab_size=1499).sha256() != bpe.sha256()


def test_vocab_size_is_an_upper_bound(capsys):
    assert tokenizer.build_tokenizer('bpe', ['ab ab'], vocab_size=4096).vocab_size < 264
    smallest = tokenizer.build_tokenizer('bpe', TRAIN, vocab_size=259)
    assert smallest.vocab_size == 259 and smallest.kind == 'bpe'
    assert smallest.decode(smallest.encode('né')) == 'né'
    with pytest.raises(SystemExit):
        tokenizer.build_tokenizer('bpe', TRAIN, vocab_size=258)
    err = capsys.readouterr().err
    assert 'at least 259' in err and '<|im_start|>' in err and err.count('\n') == 1


def test_chat_markers_are_kept_free(bpe):
    """ChatML's marks are the last ids before end-of-text, and no text can forge one of the three.
    """
    marks = ['<|im_start|>', '<|im_end|>', '<|endoftext|>']
    assert [bpe.hf.token_to_id(mark) for mark in marks] == [1497, 1498, 1499] and bpe.eot == 1499
    text = '<|im_start|>user\nHi<|im_end|>\n<|endoftext|>'
    # not even one that has learnt them
    often = tokenizer.build_tokenizer('bpe', [text * 1000], vocab_size=1500)
    assert [often.hf.token_to_id(mark) for mark in marks] == list(
        range(often.vocab_size - 3, often.vocab_size)
    )
    for tok in bpe, often:
        for some in (text, *marks, text.replace('\n', '')):
            ids = tok.encode(some)
            assert ids.max() < tok.vocab_size - 3 and tok.decode(ids) == some
            assert ids.tolist() == hf_ids(tok, some)
        assert [tok.token_bytes(tok.vocab_size - i) for i in (1, 2, 3)] == [b''] * 3
        assert tok.decode([tok.vocab_size - 3, *ids, tok.vocab_size - 2, tok.eot]) == some


def test_long_texts_are_cut_where_no_id_changes(bpe):
    text = ''.join(
        random.Random(3).choices(
            ['word', ' ', '\n', '  ', '12', ' x', '...', '日本', "'s"], k=600_000
        )
    )
    assert len(seams.cut(text)) > 3
    assert np.array_equal(bpe.encode(text), bpe.fast.encode_ordinary(text))


@pytest.mark.parametrize('space', ' \n\x1c\x1d\x1e\x1f\x85\xa0\u2028\u3000')
def test_every_kind_of_space_is_cut_where_no_id_changes(space):
    """Python takes some control characters for white space that GPT-2 does not."""
    word = f'x,{space}y! '
    tok = tokenizer.build_tokenizer('bpe', [word * 50 + f'.{space}' * 50], vocab_size=300)
    for shift in range(len(word)):
        text = 'z' * shift + word * 50_000
        assert np.array_equal(tok.encode(text), tok.fast.encode_ordinary(text)), shift


def test_learning_from_a_long_run():
    texts = [' ' * 50_000 + ' and ' + ' ' * 9_000 + 'b']
    tok, seconds = pace.seconds_of(lambda: tokenizer.build_tokenizer('bpe', texts, vocab_size=400))
    assert seconds < 3 and len(tok.encode(' ' * 64)) < 8


@pytest.mark.parametrize('run', ['a', ' ', '\n', '日', '-_', '1a', '\x1c-'])
def test_a_million_without_a_break(bpe, run):
    text = 'start ' + run * (1_000_000 // len(run)) + 'x end'
    back, seconds = pace.seconds_of(lambda: bpe.decode(bpe.encode(text)))
    assert back == text and seconds < 10


@pytest.mark.parametrize('before', [0, 1234, 2499, 70_001])
@pytest.mark.parametrize('length', [seams.RUN + 1, seams.RUN * 3 // 2, seams.RUN * 5])
def test_no_run_is_left_too_long(before, length):
    text = 'a b ' * before + 'x' * length + ' c' * 10
    pieces = seams.cut(text)
    assert ''.join(pieces) == text
    assert max(piece.count('x') for piece in pieces) <= seams.RUN


def test_char_ids():
    tok = tokenizer.build_tokenizer('char', ['hello\n', 'world'])
    assert tok.vocab_size == 9 and tok.eot == 8 and tok.encode('\nd').tolist() == [0, 1]
    with pytest.raises(tokenizer.UnknownCharacter, match=r"'é' \(U\+00E9\)"):
        tok.encode('hé')
    assert issubclass(tokenizer.UnknownCharacter, ValueError)


def test_byte_ids():
    tok = tokenizer.build_tokenizer('byte')
    assert (tok.vocab_size, tok.eot) == (257, 256)
    assert tok.encode('aé').tolist() == list('aé'.encode())


def test_stream_says_what_decode_says(tok):
    rng = random.Random(4)
    streams = [tok.encode(text).tolist() for text in VARIED]
    streams += [rng.choices(range(tok.vocab_size), k=200) for _ in range(20)]  # mostly broken UTF-8
    for ids in streams:
        stream = tok.stream()
        parts = [stream.feed(i) for i in ids] + [stream.flush()]
        assert ''.join(parts) == tok.decode(ids)
    stream = tokenizer.build_tokenizer('byte').stream()
    assert [stream.feed(b) for b in '👍'.encode()] == ['', '', '', '👍'] and stream.flush() == ''


def test_special_and_foreign_ids(tok):
    assert tok.decode([tok.eot]) == '' and tok.token_bytes(tok.eot) == b''
    assert tok.decode(torch.tensor([tok.eot])) == '' and tok.decode([]) == ''
    for wrong in (tok.vocab_size, -1):
        with pytest.raises(ValueError, match=str(wrong)):
            tok.decode([0, wrong])
        with pytest.raises(ValueError):
            tok.token_bytes(wrong)


def test_through_a_checkpoint_and_a_folder(tok, tmp_path):
    torch.save({'tokenizer': tok.state()}, tmp_path / 'ckpt.pt')
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['tokenizer']
    tok.save(tmp_path)
    for other in (
        tokenizer.from_state(state),
        tokenizer.load_tokenizer(tmp_path),
        tokenizer.load_tokenizer(tmp_path / 'tokenizer.json'),
        tokenizer.build_tokenizer(str(tmp_path)),
    ):
        assert (other.kind, other.vocab_size, other.eot, other.sha256()) == \
            (tok.kind, tok.vocab_size, tok.eot, tok.sha256())
        assert np.array_equal(other.encode(VARIED[4]), tok.encode(VARIED[4]))


def test_load_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "BPE"}}', encoding='utf-8')
    nothing = Tokenizer(models.WordLevel({'a': 0}, unk_token='a'))
    nothing.save(str(tmp_path / 'no_eot.json'))
    for path, words in ((tmp_path, 'cannot be used'), (tmp_path / 'none', 'no such tokenizer'),
                        (tmp_path / 'no_eot.json', 'no end-of-text token')):
        with pytest.raises(SystemExit) as stop:
            tokenizer.load_tokenizer(path)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count('\n') == 1
    with pytest.raises(SystemExit):
        tokenizer.build_tokenizer('bqe')
    assert 'bqe' in capsys.readouterr().err


def foreign(kind):
    """Small tokenizers of the kinds that Llama-3 and Llama-2 use; none may take the fast path."""
    if kind == 'llama3':
        hf = Tokenizer(models.BPE())
        hf.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r'\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+'), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        hf.decoder = decoders.ByteLevel()
        special = ['<|begin_of_text|>', '<|end_of_text|>']
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == 'llama2':
        hf = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
        hf.normalizer = normalizers.Sequence(
            [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
        )
        hf.decoder = decoders.Sequence(
            [
                decoders.Replace('▁', ' '),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(' ', 1, 0),
            ]
        )
        special = ['<unk>', '<s>', '</s>']
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    text = [line for line in SOURCE.splitlines() if line.isascii()][:300]
    hf.train_from_iterator(text, trainer)
    return hf, text


@pytest.mark.parametrize('kind, eot', [('llama3', '<|end_of_text|>'), ('llama2', '</s>')])
def test_foreign_tokenizer(kind, eot, tmp_path):
    hf, text = foreign(kind)
    hf.save(str(tmp_path / 'tokenizer.json'))
    tok = tokenizer.load_tokenizer(tmp_path)
    assert tok.kind == 'bpe' and tok.fast is None and tok.eot == hf.token_to_id(eot)
    assert tok.vocab_size == hf.get_vocab_size()
    line = 'def walk(top, followlinks):  return os.path.join(top, 1)'
    ids = tok.encode(line)
    assert ids.tolist() == hf.encode(line, add_special_tokens=False).ids and tok.decode(ids) == line
    assert tok.eot not in tok.encode('the end' + eot)
    stream = tok.stream()
    assert ''.join([stream.feed(i) for i in ids]) + stream.flush() == line
    assert tok.decode([*ids, tok.eot]) == line


def test_gpt2():
    try:
        import tiktoken
        theirs = tiktoken.get_encoding('gpt2')
    except Exception as error:
        pytest.skip(f'tiktoken has no gpt2 here: {type(error).__name__}')
    tok = tokenizer.from_state(tokenizer.build_tokenizer('gpt2').state())
    assert (tok.kind, tok.vocab_size, tok.eot) == ('bpe', 50257, 50256) and tok.fast is not None
    for text in VARIED:
        ids = theirs.encode_ordinary(text)
        assert tok.encode(text).tolist() == ids == hf_ids(tok, text) and tok.decode(ids) == text


def test_gpt2_out_of_reach(monkeypatch, capsys):
    def offline(name):
        raise ConnectionError('no route\nto host')
    monkeypatch.setattr(tokenizer.tiktoken, 'get_encoding', offline)
    with pytest.raises(SystemExit) as stop:
        tokenizer.build_tokenizer('gpt2')
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count('\n') == 1
    assert 'TIKTOKEN_CACHE_DIR' in err and '--tokenizer=bpe' in err
