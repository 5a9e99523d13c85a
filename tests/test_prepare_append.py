"""prepare.py --append: what is added to a dataset, and when that is refused."""
import os
import shutil

from helpers.prepare import DIES, blake, dataset, driven, files, jsonl, prepare, prose, write


def test_append(corpus):
    prepare(
        corpus, 'mine/1', 'mine/2', '--vocab_size=280', '--val_fraction=0.3', '--split_seed=7',
        '--out=data/appended')
    first, old = dataset(corpus / 'data' / 'appended'), files(corpus / 'data' / 'appended')
    write(
        corpus / 'new' / 'rows.jsonl',
        jsonl(*(f'row {i} is new' for i in range(50)), *first.all[:5], 'row 3 is new'),
    )
    write(corpus / 'new' / 'x.bin', b'?')
    prepare(corpus, 'new', '--append', '--out=data/appended')
    made = dataset(corpus / 'data' / 'appended')
    assert made.tok.sha256() == first.tok.sha256()
    assert made.meta['tokenizer'] == first.meta['tokenizer']
    assert all(
        made.meta[name] == first.meta[name]
        for name in ('split_seed', 'val_fraction', 'split_limit', 'vocab_size')
    )
    for side in 'train', 'val':  # the old ones as they were, then the new ones, in their order
        new = [f'row {i} is new' for i in range(50) if f'row {i} is new' in made.docs[side]]
        assert made.docs[side] == first.docs[side] + new and len(new) > 2
        for ending in 'bin', 'idx', 'hash':
            assert files(corpus / 'data' / 'appended')[f'{side}.{ending}'].startswith(
                old[f'{side}.{ending}']
            )
    limit = int(first.meta['split_limit'], 16)
    assert [
        text for text in made.all if blake(text, 7)[0] < limit and text.startswith('row')
    ] == made.docs['val'][len(first.docs['val']) :]
    assert made.meta['copies'] == 6 and made.meta['sources'] == ['mine/1', 'mine/2', 'new']
    assert made.meta['kinds']['text'] == first.meta['kinds']['text']
    assert made.meta['kinds']['jsonl']['documents'] == 50
    assert [entry['reason'] for entry in made.meta['skipped']] == ['unknown type .bin']

    before = {name: (data, os.stat(corpus / 'data' / 'appended' / name).st_mtime_ns)
              for name, data in files(corpus / 'data' / 'appended').items()}
    assert 'nothing new' in prepare(corpus, 'new', 'mine/2', '--append', '--out=data/appended')
    assert before == {name: (data, os.stat(corpus / 'data' / 'appended' / name).st_mtime_ns)
                      for name, data in files(corpus / 'data' / 'appended').items()}
    assert os.listdir(corpus / 'data') == ['appended']
    assert 'sound' in prepare(corpus, '--inspect', 'data/appended')


def test_append_to_one_document(corpus):
    text = 'a text of its own, split by position. ' * 200
    write(corpus / 'one.txt', text)
    prepare(corpus, 'one.txt', '--tokenizer=byte', '--out=data/appended')
    assert 'sound' in prepare(corpus, '--inspect', 'data/appended')
    prepare(corpus, 'mine', '--append', '--out=data/appended')
    made = dataset(corpus / 'data' / 'appended')
    assert made.docs['train'][0] + made.docs['val'][0] == text
    assert len(made.all) == 62 and len(made.docs['val']) > 1
    assert 'sound' in prepare(corpus, '--inspect', 'data/appended')
    assert 'nothing new' in prepare(corpus, 'one.txt', '--append', '--out=data/appended')
    write(corpus / 'new.txt', 'one more')
    prepare(corpus, 'new.txt', '--append', '--out=data/appended')
    assert len(dataset(corpus / 'data' / 'appended').all) == 63


def test_append_is_refused_in_one_line(corpus):
    prepare(corpus, 'mine/1', '--vocab_size=280', '--out=data/x')
    prepare(corpus, 'mine/2', '--vocab_size=270', '--out=data/y')
    old = files(corpus / 'data' / 'x')
    for words, *argv in (
        ('keeps it', '--tokenizer=byte'),
        ('keeps it', '--tokenizer=data/y'),
        ('keeps it', '--vocab_size=270'),
        ('val_fraction=0.1', '--val_fraction=0.2'),
        ('split_seed=1337', '--split_seed=1'),
    ):
        assert words in prepare(corpus, 'mine/3', '--append', '--out=data/x', *argv, code=2)
    assert 'no dataset to append to' in prepare(
        corpus, 'mine/3', '--append', '--out=data/none', code=2
    )
    assert sorted(os.listdir(corpus / 'data')) == ['x', 'y'] and files(corpus / 'data' / 'x') == old
    for name, change in (
        ('tokenizer.json', old['tokenizer.json'] + b'\n'),
        ('meta.json', old['meta.json'].replace(b'"format": 2', b'"format": 1')),
        ('meta.json', b'{}'),
        ('meta.json', b'[]'),
        ('meta.json', b'\xff'),
    ):
        (corpus / 'data' / 'x' / name).write_bytes(change)
        prepare(corpus, 'mine/3', '--append', '--out=data/x', code=2)
        (corpus / 'data' / 'x' / name).write_bytes(old[name])
    # the same
    prepare(
        corpus, 'mine/3', '--append', '--out=data/x', '--tokenizer=data/x', '--val_fraction=0.1',
        '--split_seed=1337')
    write(corpus / 'abc.txt', 'abc ' * 100)
    prepare(corpus, 'abc.txt', '--tokenizer=char', '--out=data/z')
    assert "'d' (U+0064)" in prepare(corpus, 'mine', '--append', '--out=data/z', code=2)


def test_append_that_is_killed(corpus):
    prepare(corpus, 'mine/1', '--vocab_size=280', '--out=data/x')
    old = files(corpus / 'data' / 'x')
    shutil.copytree(corpus / 'data' / 'x', corpus / 'data' / 'y')
    write(corpus / 'new.jsonl', jsonl(*(prose(500, i) for i in range(200))))
    prepare(corpus, 'new.jsonl', '--append', '--out=data/y')
    for block in 1, 3:
        driven(
            corpus, DIES.format(commit=True, block=block),
            'new.jsonl', '--append', '--out=data/x', code=9)
        assert files(corpus / 'data' / 'x') == old
    prepare(corpus, 'new.jsonl', '--append', '--out=data/x')
    assert files(corpus / 'data' / 'x') == files(corpus / 'data' / 'y')


def test_append_with_copies_keeps_them_on_one_side(corpus):
    text = 'a document that is large at first. ' * 30
    write(corpus / 'first' / 'large.txt', text)
    for i in range(4):
        write(corpus / 'first' / f'{i}.txt', f'small {i}')
    for i in range(60):
        write(corpus / 'more' / f'{i}.txt', f'{i} others that make it small. ' * 30)
    write(corpus / 'more' / 'copy.txt', text)
    for seed in range(8):
        shutil.rmtree(corpus / 'data', ignore_errors=True)
        prepare(corpus, 'first', '--tokenizer=byte', f'--split_seed={seed}', '--out=data/appended')
        prepare(corpus, 'more', '--append', '--dedupe=False', '--out=data/appended')
        assert [
            text in dataset(corpus / 'data' / 'appended').docs[side] for side in ('train', 'val')
        ] == [True, False], seed
