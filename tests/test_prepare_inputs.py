"""prepare.py: what it reads, what it says of that, and what it refuses."""
import csv
import gzip
import importlib.util
import os
import re

import pytest
from helpers.prepare import (
    DIES_EARLY,
    OURS,
    dataset,
    driven,
    environment,
    files,
    jsonl,
    one_line,
    parquet,
    parts,
    posix,
    prepare,
    write,
)

from mambino.prepare import report

# -----------------------------------------------------------------------------
# What is taken

def test_every_skipped_file_has_its_reason(tmp_path):
    good = {
        'a.txt': 'plain\r\ntext\r\n',
        'Makefile': 'all:\n',
        'src/b.PY': 'x = 1\n',
        'bom.txt': b'\xef\xbb\xbfwith a mark',
        'utf16.txt': 'sixteen ä'.encode('utf-16'),
        'old.txt': 'Der Bär trägt Käse.'.encode('cp1252'),
    }
    bad = {
        'null.txt': (b'a\0\1b\0c', 'binary'),
        'empty.txt': (b'', 'empty'),
        'blank.md': (b' \n\n', 'empty'),
        'photo.jpg': (b'\xff\xd8\xff', 'unknown type .jpg'),
        '.secret': (b'x', 'hidden'),
        'program': (b'\x7fELF\0\0\1\2', 'a program'),
        'big.txt': (b'1,2\n' * 30_000, 'larger than 0.1 MB'),
        'half.txt.gz': (gzip.compress(os.urandom(900))[:-20], 'truncated'),
        'short.pdf': (b'no pdf', 'not a PDF'),
    }
    for name, content in good.items():
        write(tmp_path / 'in' / name, content)
    for name, (content, _) in bad.items():
        write(tmp_path / 'in' / 'sub' / name, content)
    write(tmp_path / 'in' / '.git' / 'config', 'hidden')
    said = prepare(tmp_path, 'in', '--tokenizer=byte', '--max_file_mb=0.1')
    made = dataset(tmp_path / 'data' / 'in')
    assert sorted(made.all) == sorted(
        ['plain\ntext\n', 'all:\n', 'x = 1\n', 'with a mark', 'sixteen ä', 'Der Bär trägt Käse.']
    )
    reasons = {os.path.basename(entry['file']): entry['reason'] for entry in made.meta['skipped']}
    assert reasons == {**{name: reason for name, (_, reason) in bad.items()}, '.git': 'hidden'}
    assert [(os.path.basename(n['file']), n['note']) for n in made.meta['notes']] == [
        ('old.txt', 'encoding guessed: cp1252, as in "Der Bär trägt"')
    ]
    assert 'skipped 10:' in said and re.search(r'^ +2  hidden: in', said, re.M)


def test_named_file_is_read_whatever_its_extension(tmp_path):
    write(tmp_path / 'story.xyz', 'once upon a time ' * 20)
    prepare(tmp_path, 'story.xyz', '--max_file_mb=0')
    assert dataset(tmp_path / 'data' / 'story')


@posix
def test_links_in_circles_and_pipes(corpus):
    os.symlink(corpus / 'mine', corpus / 'mine' / '1' / 'up')
    os.symlink('nowhere', corpus / 'mine' / 'dangling.txt')
    os.symlink(corpus / 'mine' / '1' / '1.txt', corpus / 'mine' / 'twice.txt')
    os.mkfifo(corpus / 'mine' / 'pipe.txt')
    prepare(corpus, 'mine')
    made = dataset(corpus / 'data' / 'mine')
    assert len(made.all) == 60 and made.meta['copies'] == 0
    assert {os.path.basename(e['file']): e['reason'] for e in made.meta['skipped']} == \
        {'dangling.txt': 'a link that leads nowhere', 'pipe.txt': 'no regular file'}


def test_junk_is_left_out_beside_what_exclude_names(corpus):
    for name in ('node_modules/a.js', 'build/b.js', 'c.js'):
        write(corpus / 'web' / name, f'let {name[0]} = 1')
    said = prepare(corpus, 'web', '--exclude=build/', '--dry_run')
    assert 'c.js' in said and not re.search(r'^code.*[ab]\.js', said, re.M)
    assert re.search(r'^ +1  excluded: web.build', said, re.M)
    assert re.search(r'^ +1  excluded by default \(node_modules/\): web.node_modules', said, re.M)
    assert re.search(
        r'^code.*a\.js', prepare(corpus, 'web', '--exclude=!node_modules/', '--dry_run'), re.M
    )


def test_tables(tmp_path):
    write(tmp_path / 'in' / 'a.jsonl', jsonl('one', 'two'))
    parquet(tmp_path / 'in' / 'b.parquet', id=[1, 2], story=['three', 'four'])
    with open(tmp_path / 'in' / 'c.csv', 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([['id', 'text'], [1, 'fi,ve\nlines'], [2, 'six']])
    prepare(tmp_path, 'in', '--tokenizer=byte')
    assert sorted(dataset(tmp_path / 'data' / 'in').all) == [
        'fi,ve\nlines', 'four', 'one', 'six', 'three', 'two',
    ]
    parquet(tmp_path / 'no' / 'a.parquet', left=[1], right=[2])
    assert 'left, right' in prepare(tmp_path, 'no', code=2)
    parquet(tmp_path / 'two' / 'a.parquet', left=['a'], right=['b'])
    assert 'left, right' in prepare(tmp_path, 'two', code=2)
    assert 'no column centre' in prepare(tmp_path, 'two', '--text_column=centre', code=2)
    assert sorted(os.listdir(tmp_path / 'data')) == ['in']


def offline_hub(folder, **more):
    if importlib.util.find_spec('datasets') is None:
        pytest.skip('datasets is not installed: pip install datasets')
    return {
        'env': environment(
            HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1, HF_HOME=folder / 'home',
            HF_DATASETS_CACHE=folder / 'cache', **more)
    }


@pytest.mark.parametrize('ending', ['parquet', 'jsonl'])
def test_a_dataset_of_hugging_face(tmp_path, ending):
    texts = [f'row {i} ' + 'of some length ' * (i % 4 + 1) for i in range(90)]
    for i in range(3):
        if ending == 'parquet':
            parquet(tmp_path / 'rows' / f'train-{i}.parquet', text=texts[i::3], id=list(range(30)))
        else:
            write(tmp_path / 'rows' / f'train-{i}.jsonl', jsonl(*texts[i::3]))
    said = prepare(
        tmp_path, 'hf:./rows', '--tokenizer=byte', f'--workers={1 + (ending == "jsonl")}',
        **offline_hub(tmp_path),
    )
    made = dataset(tmp_path / 'data' / 'rows')
    assert sorted(made.all) == sorted(texts)
    assert made.meta['sources'] == ['hf:./rows']
    assert made.meta['kinds']['hf']['documents'] == 90
    assert 'now: python train.py --dataset=rows' in said
    if ending == 'jsonl':
        driven(
            tmp_path, DIES_EARLY, 'hf:./rows',
            '--tokenizer=byte', '--out=data/c', code=9,
            **offline_hub(tmp_path),
        )
        # what cannot be had now does not cost what was read before
        os.rename(tmp_path / 'rows', tmp_path / 'away')
        assert 'hf:./rows' in prepare(
            tmp_path, 'hf:./rows', '--tokenizer=byte', '--out=data/c', code=2,
            **offline_hub(tmp_path),
        )
        assert parts(tmp_path / 'data' / 'c.partial')


def test_standard_library_by_default(tmp_path):
    import sysconfig
    for name in (
        'argparse.py', 'bisect.py', 'colorsys.py', 'csv.py', 'fnmatch.py', 'glob.py', 'heapq.py',
        'keyword.py'):
        write(
            tmp_path / 'lib' / name,
            open(os.path.join(sysconfig.get_path('stdlib'), name), 'rb').read(),
        )
    write(tmp_path / 'lib' / 'test' / 'test_x.py', 'never read')
    driven(tmp_path, "stdlib.sysconfig.get_path = lambda name: 'lib'", '--vocab_size=600')
    made = dataset(tmp_path / 'data' / 'stdlib')
    assert 'standard library' in made.meta['sources'][0] and len(made.all) == 8
    assert made.meta['kinds']['code']['files'] == 8


# -----------------------------------------------------------------------------
# Looking

def tree(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def test_dry_run_lists_and_writes_nothing(corpus):
    write(corpus / 'mine' / 'photo.jpg', b'\xff\xd8')
    before = tree(corpus)
    said = prepare(corpus, 'mine', 'hf:some/where', '--dry_run')
    assert tree(corpus) == before
    for i in range(60):
        path = os.path.join('mine', str(i % 7), f'{i}.txt')
        assert re.search(
            rf'^text +{os.path.getsize(corpus / path):,}  {re.escape(path)}$', said, re.M
        ), path
    assert re.search(r'^skip mine.photo.jpg: unknown type .jpg$', said, re.M)
    assert re.search(r'^hf .* hf:some/where$', said, re.M)
    assert re.search(r'^text +60 ', said, re.M)
    assert re.search(r'^skipped 1:\n +1  unknown type .jpg: mine.photo.jpg$', said, re.M)


def test_inspect(corpus, capsys):
    def refused():
        """What report.inspect says of data/mine, here, for there are many ways to damage it."""
        with pytest.raises(SystemExit) as end:
            report.inspect(str(place))
        assert end.value.code == 2
        return one_line(capsys.readouterr().err)
    prepare(corpus, 'mine', '--vocab_size=300')
    good, place = files(corpus / 'data' / 'mine'), corpus / 'data' / 'mine'
    for name in 'data/mine', 'mine':
        os.makedirs(corpus / 'away', exist_ok=True)
        os.rename(corpus / 'mine', corpus / 'away' / 'mine')  # a name alone is sought in data/
        said = prepare(corpus, '--inspect', name)
        os.rename(corpus / 'away' / 'mine', corpus / 'mine')
        assert 'sound' in said
        assert '60 documents decode to the text that was taken' in said
        assert 'bpe tokenizer of' in said
        assert re.search(r'^text +60 +60 ', said, re.M)
        assert re.search(r'^train +\d+ ', said, re.M) and '█' in said
        assert (
            sum(int(n) for n in re.findall(r'^ *[\d,]+ \.\. [\d,]+ +(\d+) █*$', said, re.M)) == 60
        )
    for name in OURS[1:]:
        for at in {0, len(good[name]) // 2, len(good[name]) // 2 // 4 * 4 + 3, len(good[name]) - 1}:
            data = bytearray(good[name])
            data[at] ^= 0xa5
            (place / name).write_bytes(data)
            assert name in refused(), (name, at)
        for damage in good[name][:len(good[name]) // 3 | 1], b'':
            (place / name).write_bytes(damage)
            assert name in refused()
        (place / name).unlink()
        assert name in refused()
        (place / name).write_bytes(good[name])
    meta = good['meta.json'].decode()
    for change in (
        '', '{}', '[]',
        meta[:-1],
        meta.replace('"tokens": ', '"tokens": 1', 1),
        meta.replace('"kinds"', '"kindz"'),
        meta.replace('"documents": ', '"documents": 1'),
    ):
        (place / 'meta.json').write_bytes(change.encode())
        refused()
    (place / 'meta.json').write_bytes(good['meta.json'])
    assert 'sound' in prepare(corpus, '--inspect', 'data/mine') and files(place) == good
    assert 'not a dataset' in prepare(corpus, '--inspect', 'away', code=2)
    assert 'not a dataset' in prepare(corpus, '--inspect', 'nowhere', code=2)
    assert 'name a dataset' in prepare(corpus, '--inspect', code=2)


def test_what_looks_odd_is_named(corpus):
    write(corpus / 'mine' / 'base64.txt', os.urandom(3000).hex())
    write(corpus / 'mine' / 'latin.txt', 'Der Bär trägt Käse.\n'.encode('cp1252') * 20)
    write(corpus / 'mine' / 'rows.jsonl', jsonl('good', 'better') + 'bad\n' + jsonl('good as well', 'so so', 'bye'))
    said = prepare(corpus, 'mine', '--tokenizer=byte')
    meta = dataset(corpus / 'data' / 'mine').meta
    assert {os.path.basename(note['file']): note['note'] for note in meta['notes']} == \
        {'latin.txt': 'encoding guessed: cp1252, as in "Der Bär trägt Käse."',
         'rows.jsonl': '1 lines were no JSON (first: line 3)'}
    assert meta['suspects']
    assert os.path.basename(meta['suspects'][0][1]) == 'base64.txt'
    assert 'base64.txt' in said
    assert 'noted on 2 files' in said and 'rows.jsonl: 1 lines were no JSON' in said


# -----------------------------------------------------------------------------
# Mistakes

def test_errors_are_one_line_and_harm_nothing(corpus):
    prepare(corpus, 'mine', '--out=data/old', '--vocab_size=270')
    before = files(corpus / 'data' / 'old')
    write(corpus / 'pictures' / 'a.png', b'\x89PNG')
    write(corpus / 'pictures' / 'b.png', b'\x89PNG')
    write(corpus / 'letters' / 'to_mother.txt', 'dear mother')
    write(corpus / 'one.txt', 'x')
    write(corpus / 'blank.txt', ' \n')
    for words, *argv in (
        ('did you mean mine?', 'mime'),
        ('2 unknown type .png', 'pictures'), ('nothing readable (1 empty)', 'blank.txt'),
        ('val_fraction=1.0', 'mine', '--val_fraction=1'), ('val_fraction=0.0', 'mine', '--val_fraction=0'),
        ('tokenizer=bpee', 'mine', '--tokenizer=bpee'), ('259', 'mine', '--vocab_size=258'),
        ('engine=rai must be local or ray', 'mine', '--engine=rai'), ('workers=-1', 'mine', '--workers=-1'),
        ('pdf=word', 'mine', '--pdf=word'), ('sample_mb=0.0', 'mine', '--sample_mb=0'),
        ('max_file_mb=-1', 'mine', '--max_file_mb=-1'),
        ('did you mean --vocab_size?', 'mine', '--vocab_sise=300'),
        ('will not be overwritten', 'mine', '--out=letters'), ('will not be overwritten', 'mine', '--out=one.txt'),
        ('one.txt/data', 'mine', '--out=one.txt/data'),
        ('too few to split', 'one.txt'),
    ):
        out = [] if any(arg.startswith('--out') for arg in argv) else ['--out=data/old']
        assert words in prepare(corpus, *out, *argv, code=2).replace('\\', '/')
        assert os.listdir(corpus / 'data') == ['old'], argv
        assert not (corpus / 'letters.partial').exists(), argv
    assert files(corpus / 'data' / 'old') == before
    assert (corpus / 'letters' / 'to_mother.txt').read_text() == 'dear mother'

    write(corpus / 'data' / 'old' / 'my_notes.txt', 'mine')  # now it is more than a dataset
    assert 'will not be overwritten' in prepare(corpus, 'mine', '--out=data/old', code=2)


@pytest.mark.parametrize('package, argv', [
    ('datasets', ['hf:owner/name', '--out=data/x']), ('ray', ['mine', '--engine=ray'])])
def test_packages_that_are_not_there(corpus, package, argv):
    write(
        corpus / 'shadow' / package / '__init__.py',
        f'raise ModuleNotFoundError("No module named {package!r}")')
    said = prepare(corpus, *argv, code=2, env=environment(PYTHONPATH=corpus / 'shadow'))
    assert (
        f'pip install {package}' in said
        and not (corpus / 'data').exists()
        or os.listdir(corpus / 'data') == []
    )


def test_hidden_files_in_a_dataset_are_not_deleted(corpus):
    prepare(corpus, 'mine', '--tokenizer=byte', '--out=data/a')
    write(corpus / 'data' / 'a' / '.dvc', 'mine')
    assert 'will not be overwritten' in prepare(
        corpus, 'mine', '--tokenizer=byte', '--out=data/a', code=2
    )
    assert (corpus / 'data' / 'a' / '.dvc').read_text() == 'mine'


def test_limits_may_be_infinite_and_seeds_may_not(corpus):
    write(corpus / 'page.html', '<p>hello there</p>' * 20)
    prepare(corpus, 'page.html', '--tokenizer=byte', '--file_seconds=inf', '--file_memory_mb=inf')
    assert 'hello there' in dataset(corpus / 'data' / 'page').docs['train'][0]
    assert 'split_seed' in prepare(corpus, 'mine', f'--split_seed={2 ** 64}', code=2)
