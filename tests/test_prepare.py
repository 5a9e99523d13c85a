"""prepare.py as its user meets it, run as a program on made-up folders: what a dataset is, and that
it is the same whoever makes it.
"""
import gzip
import importlib.util
import json
import os
import random
import warnings

import numpy as np
import pytest
from helpers.prepare import (
    OURS,
    blake,
    dataset,
    driven,
    environment,
    files,
    jsonl,
    nobody_left,
    parquet,
    prepare,
    prose,
    write,
)

from mambino.prepare import spool

# -----------------------------------------------------------------------------
# What a dataset is

def test_one_file_has_the_counts_of_nanogpt(tmp_path):
    rng = random.Random(0)
    alphabet = [chr(c) for c in range(32, 97)]  # 65 characters, as tinyshakespeare
    text = ''.join(alphabet) + ''.join(rng.choices(alphabet, k=1_115_394 - 65))
    write(tmp_path / 'input.txt', text)
    said = prepare(tmp_path, 'input.txt', '--tokenizer=char', '--out=data/char')
    made = dataset(tmp_path / 'data' / 'char')
    assert (len(made.ids['train']), len(made.ids['val']), made.tok.vocab_size, made.tok.eot) == (
        1_003_854, 111_540, 66, 65)
    assert made.docs['train'] + made.docs['val'] == [text[:1_003_854], text[1_003_854:]]
    assert said.splitlines()[-1] == 'now: python train.py --dataset=char'
    assert '1,003,854' in said and '111,540' in said


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe'])
def test_a_file_of_5_kb(tmp_path, kind):
    text = ('The quick brown fox; naïve café — 日本. ' * 200)[:5000]
    write(tmp_path / 'small.md', text)
    prepare(tmp_path, 'small.md', f'--tokenizer={kind}')
    made = dataset(tmp_path / 'data' / 'small')
    assert made.all == [text[:4500], text[4500:]] and made.tok.kind == kind
    assert made.meta['sources'] == ['small.md']
    assert made.meta['val_fraction'] == 0.1 and made.meta['split_seed'] == 1337
    assert made.meta['split_limit'] is None and 'created' not in made.meta
    assert 'guessed' not in made.meta


def test_documents_go_by_their_content(corpus):
    prepare(corpus, 'mine', '--vocab_size=300')
    made = dataset(corpus / 'data' / 'mine')
    originals = {p.read_text() for p in (corpus / 'mine').rglob('*.txt')}
    assert set(made.all) == originals and len(made.all) == 60 and 0 < len(made.docs['val']) < 20

    # other names and another order, with every document twice: the same sides, and no document on both
    names = list(range(120))
    random.Random(1).shuffle(names)
    for name, text in zip(names, sorted(originals) * 2):
        write(corpus / 'other' / f'{name}.py', text)
    prepare(corpus, 'other', '--vocab_size=300', '--dedupe=False')
    again = dataset(corpus / 'data' / 'other')
    assert all(sorted(again.docs[side]) == sorted(made.docs[side] * 2) for side in again.docs)
    assert again.meta['copies'] == 0
    prepare(corpus, 'mine', '--vocab_size=300', '--split_seed=5')
    assert set(dataset(corpus / 'data' / 'mine').docs['val']) != set(made.docs['val'])


def test_exact_copies_are_dropped(corpus):
    write(
        corpus / 'mine' / 'a.jsonl',
        jsonl(
            'twice', 'once', 'twice',
            'document 1\nsome words and more words\nsome words and more words\n'),
    )
    write(corpus / 'mine' / '3' / 'crlf.txt', 'document 5\r\nsome words and more words\r\n')
    said = prepare(corpus, 'mine', '--tokenizer=byte')
    made = dataset(corpus / 'data' / 'mine')
    assert len(made.all) == len(set(made.all)) == 62
    assert made.meta['copies'] == 3 and 'dropped 3 exact copies' in said
    prepare(corpus, 'mine', '--tokenizer=byte', '--dedupe=False')
    made = dataset(corpus / 'data' / 'mine')
    assert len(made.all) == 65 and made.meta['copies'] == 0 and made.all.count('twice') == 2


def test_neither_split_is_empty(tmp_path):
    for fraction in ('1e-9', '0.999999999'):
        for i in range(3):
            write(tmp_path / 'few' / f'{i}.txt', f'document number {i}')
        prepare(tmp_path, 'few', f'--val_fraction={fraction}')
        made = dataset(tmp_path / 'data' / 'few')
        assert sorted(map(len, made.docs.values())) == [1, 2]
    for i in range(3):
        write(tmp_path / 'few' / f'{i}.txt', 'the same in all of them')  # one document, three times
    for dedupe in True, False:
        prepare(tmp_path, 'few', '--val_fraction=0.5', f'--dedupe={dedupe}')
        assert ''.join(dataset(tmp_path / 'data' / 'few').all) == 'the same in all of them'


def test_few_documents_are_split_by_their_size(tmp_path):
    """However the hashes fall, val is not most of the text, and is not next to nothing."""
    for i, size in enumerate([14_000, 7_000, 600, 600, 40]):
        write(tmp_path / 'few' / f'{i}.txt', (f'document {i} of {size} ' * size)[:size])
    for seed in range(10):
        prepare(tmp_path, 'few', '--tokenizer=byte', f'--split_seed={seed}')
        made = dataset(tmp_path / 'data' / 'few')
        assert 300 <= made.meta['splits']['val']['bytes'] <= 1300, seed


def gpt2_cache():
    """The folder with GPT-2's vocabulary. Without it the test is skipped, and a warning says so,
    which pytest -q shows, too.
    """
    place = os.environ.get('TIKTOKEN_CACHE_DIR', '')
    if not os.path.isdir(place):
        why = "not tested with GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder that has it"
        warnings.warn(why, stacklevel=2)
        pytest.skip(why)
    return place


def awkward(folder):
    """Writes documents that are hard to bring through unharmed; returns their texts, as they must
    come out.
    """
    rng = random.Random(3)
    spaces = [' ', ' ', ' ', '  ', '\n', '\n\n\n', '\t', ' \n ', '\u3000', '\xa0']
    words = [
        'word', 'naïve', '日本語', '👩‍👩‍👧', "it's", '12345', '!!', '...', '<|endoftext|>', 'e\u0301',
        'x_y',
    ]
    long = ''.join(rng.choice(words) + rng.choice(spaces) for _ in range(300_000))
    solid = ''.join(rng.choices('abcdefghij0123456789-é日🙂', k=1_200_000))
    assert len(long) > 1.4 * spool.LONGEST and len(solid) > 1.1 * spool.LONGEST
    plain = {
        'long.txt': long,
        'solid.txt': solid,
        'spaces.txt': '   leading and trailing  \n\n',
        'space.py': ' ' * 12_000 + 'x',
        'emoji.md': '🏳️‍🌈 👍🏽 \U0010ffff\ue000',
        'control.txt': '\x0b\x0c\x1c\x1d\x85\u2028 and so on' + ' and on' * 500,
        'marks.txt': '<|im_start|>user\nHi<|im_end|>\n<|endoftext|>',
        'edge.txt': solid[: spool.LONGEST + 1],
    }
    for name, text in plain.items():
        write(folder / name, text)
    write(folder / 'crlf.txt', 'one\r\ntwo\rthree\n\r\nfour\r')
    write(folder / 'bom.txt', b'\xef\xbb\xbfwith a mark \xef\xbb\xbf inside')
    write(folder / 'utf16.txt', 'sixteen ä\r\n'.encode('utf-16'))
    write(
        folder / 'm.jsonl',
        '\n'.join(
            json.dumps({'text': text})
            for text in (
                'a NUL \0 in it', 'half a pair \ud83d', '\ude00 and the other', 'both \ud83d\ude00',
                '   \n ', 'after a blank', '', None, 7, 'after nothing\r\n')
        )
        + '\n{"text": "escaped \\ud83d\\ude00 \\u0000 \\udfff"}\nnot json\n{"text": "the last"}',
    )
    # truncated: nothing of it is taken
    write(folder / 'n.txt.gz', gzip.compress(os.urandom(300_000).hex().encode())[:-9])
    write(folder / 'o.txt', 'after a truncated one')
    write(folder / 'q.txt.gz', gzip.compress(b'packed text'))
    parquet(folder / 'p.parquet', text=['a row', None, ' ', 'a row after a blank\r\n', '👍'])
    return [
        *plain.values(),
        'one\ntwo\nthree\n\nfour\n', 'with a mark \ufeff inside', 'sixteen ä\n', 'a NUL  in it',
        'half a pair \ufffd', '\ufffd and the other', 'both 😀', 'after a blank', 'after nothing\n',
        'escaped 😀  \ufffd', 'the last', 'after a truncated one', 'packed text', 'a row',
        'a row after a blank\n', '👍',
    ]


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe', 'gpt2'])
def test_every_document_comes_back_byte_for_byte(tmp_path, kind):
    settings = {'env': environment(TIKTOKEN_CACHE_DIR=gpt2_cache())} if kind == 'gpt2' else {}
    texts = awkward(tmp_path / 'in')
    prepare(tmp_path, 'in', f'--tokenizer={kind}', '--sample_mb=1', '--out=data/x', **settings)
    made = dataset(tmp_path / 'data' / 'x')
    assert len(made.all) == len(texts) and sorted(map(blake, made.all)) == sorted(map(blake, texts))
    assert [os.path.basename(entry['file']) for entry in made.meta['skipped']] == ['n.txt.gz']
    for side, docs in made.docs.items():  # its ids are those of the whole, however it was cut
        offsets = np.cumsum(
            [0]
            + [
                len(part)
                for part in np.split(
                    made.ids[side], np.flatnonzero(made.ids[side] == made.tok.eot) + 1
                )
            ]
        )
        for text, start, end in zip(docs, offsets, offsets[1:]):
            if text[:1000] != texts[1][:1000]:  # solid is cut where it must be
                assert np.array_equal(made.ids[side][start : end - 1], made.tok.encode(text)), text[
                    :50
                ]
    if kind == 'char':
        # no character of a text that was not taken
        assert made.tok.vocab_size == len(set(''.join(texts))) + 1


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_where_it_is_cut_is_seen_nowhere(tmp_path, kind):
    """Thousands of documents over tiny pieces, blocks and reads: the same dataset as over large
    ones.
    """
    rng = random.Random(4)
    bits = ['a', 'word', 'é', '日本', '12', "'s", '.', '\x1c', ' ', '  ', '\n', '\r\n', '\r', '\0']

    def text():
        return ''.join(rng.choices(bits, k=rng.randint(0, 80)))

    write(tmp_path / 'in' / 'a.jsonl', jsonl(*(text() for _ in range(1500))))
    for i in range(30):
        write(tmp_path / 'in' / f'{i}.txt', text().replace('\0', '').replace('\x1c', '') + '.')
    prepare(tmp_path, 'in', f'--tokenizer={kind}', '--vocab_size=500', '--out=data/x')
    assert len(dataset(tmp_path / 'data' / 'x').all) > 1400
    small = 'spool.PIECE, spool.LONGEST, spool.BLOCK = {}\nfiles.CHUNK = {}\nextract.TASK_FILES = 7'
    for sizes, chunk in ((20, 400, 90), 64), ((40, 300, 1), 100):
        argv = ('in', f'--tokenizer={kind}', '--vocab_size=500', '--out=data/y')
        driven(tmp_path, small.format(sizes, chunk), *argv)
        assert files(tmp_path / 'data' / 'x') == files(tmp_path / 'data' / 'y')


# -----------------------------------------------------------------------------
# The same dataset, whoever makes it

def test_same_bytes_whatever_the_order_of_arguments(corpus):
    prepare(corpus, 'mine/1', 'mine/2', 'mine/3/3.txt', '--out=data/a')
    prepare(corpus, 'mine/3/3.txt', 'mine/2', 'mine/1', '--out=data/b')
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')
    # and one thing twice
    prepare(corpus, 'mine/3/3.txt', 'mine/2', 'mine/1', 'mine/2/2.txt', '--out=data/c')
    assert all(
        (corpus / 'data/a' / name).read_bytes() == (corpus / 'data/c' / name).read_bytes()
        for name in OURS[1:]
    )


def test_same_bytes_by_ray(corpus):
    if importlib.util.find_spec('ray') is None:
        pytest.skip('ray is not installed: pip install ray')
    write(corpus / 'mine' / 'rows.jsonl', jsonl(*(prose(500, i) for i in range(300))))
    prepare(corpus, 'mine', '--out=data/a', '--vocab_size=400')
    prepare(corpus, 'mine', '--out=data/b', '--vocab_size=400', '--engine=ray', '--workers=2',
            env=environment(RAY_ENABLE_UV_RUN_RUNTIME_ENV='0'))
    assert files(corpus / 'data' / 'a') == files(corpus / 'data' / 'b')
    assert nobody_left(corpus)


def test_ray_does_not_fall_back_from_a_cluster_that_was_named(corpus):
    pytest.importorskip('ray')
    assert 'RAY_ADDRESS' in prepare(
        corpus, 'mine', '--engine=ray', code=2, env=environment(RAY_ADDRESS='127.0.0.1:1')
    )


# -----------------------------------------------------------------------------
# Tokenizers

def test_a_given_tokenizer_is_kept(corpus):
    prepare(corpus, 'mine', '--vocab_size=280', '--out=data/a')
    prepare(corpus, 'mine/1', '--tokenizer=data/a', '--out=data/b')
    assert (
        dataset(corpus / 'data' / 'a').meta['tokenizer']
        == dataset(corpus / 'data' / 'b').meta['tokenizer']
    )
    write(corpus / 'x.txt', 'abc ' * 10)
    prepare(corpus, 'x.txt', '--tokenizer=char')
    assert "'d' (U+0064)" in prepare(corpus, 'mine', '--tokenizer=data/x', code=2)
    assert "'d' (U+0064)" in prepare(corpus, 'mine', '--tokenizer=data/x', '--workers=2', code=2)
    assert sorted(os.listdir(corpus / 'data')) == ['a', 'b', 'x']


@pytest.mark.parametrize('n', [3000, 500_000])
def test_bpe_learns_from_train_alone(tmp_path, n):
    # a text of its own, of one piece and of several
    write(tmp_path / 'x.txt', 'ab ' * n + 'zq ' * (n // 10))
    prepare(tmp_path, 'x.txt', '--val_fraction=0.1')
    tok = dataset(tmp_path / 'data' / 'x').tok
    assert len(tok.encode(' ab')) == 1 and len(tok.encode(' zq')) == 3


def test_bpe_learns_from_the_end_of_train(tmp_path):
    write(tmp_path / 'x.txt', 'ab ' * 330_000 + 'cd ' * 30_000 + 'zq ' * 30_000)
    prepare(tmp_path, 'x.txt', '--val_fraction=0.1')
    tok = dataset(tmp_path / 'data' / 'x').tok
    assert [len(tok.encode(word)) for word in (' ab', ' cd', ' zq')] == [1, 1, 3]


SPY = '''
import json
def spy(kind, texts=(), *more):
    texts = list(texts)
    json.dump(texts, open('seen.json', 'w'))
    return build(kind, texts, *more)
build = vocabulary.build_tokenizer
vocabulary.build_tokenizer = spy
'''


def test_bpe_is_trained_on_a_sample(tmp_path):
    texts = [chr(0x4e00 + i) + prose(8000, i) for i in range(150)]
    write(tmp_path / 'a.jsonl', jsonl(*texts))

    def seen():
        return json.loads((tmp_path / 'seen.json').read_text())

    driven(tmp_path, SPY, 'a.jsonl', '--sample_mb=0.3', '--vocab_size=600')
    some, first = seen(), dataset(tmp_path / 'data' / 'a')
    assert 200_000 < len(''.join(some)) < 400_000
    assert set(some) < set(first.docs['train']) and len(set(some)) == len(some)
    assert min(texts.index(text) for text in some) < 30
    assert max(texts.index(text) for text in some) > 120
    driven(tmp_path, SPY, 'a.jsonl', '--sample_mb=0.3', '--vocab_size=600', '--out=data/b')
    assert seen() == some and files(tmp_path / 'data' / 'a') == files(tmp_path / 'data' / 'b')
    driven(tmp_path, SPY, 'a.jsonl', '--vocab_size=600')
    assert seen() == first.docs['train']
