"""sources.py: what it finds in made-up folders, in which order, and why it leaves out the rest."""
import itertools
import json
import os
import random

import pytest
from helpers import pace
from helpers.sources import look, names, posix, write

from mambino.prepare import sources
from mambino.prepare.sources import Source, find


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@posix
def test_the_order_of_inputs_is_of_no_account(here):
    for name in (
        'b/1.txt', 'b/deep/2.txt', 'b/deep/3.foo', 'a-b/4.txt', 'a/5.txt', 'a/.hidden', 'c/6.txt',
        'other/7.txt'):
        write(here / name)
    write(here / 'b' / '.gitignore', 'deep/2.txt\n')
    os.symlink('../b', here / 'a' / 'to_b')
    os.symlink('../a', here / 'b' / 'to_a')
    os.symlink('../../other', here / 'b' / 'deep' / 'to_other')
    os.symlink('../other', here / 'c' / 'to_other')
    os.symlink('b/1.txt', here / '0.txt')
    inputs = ['b', 'a', 'b/deep', 'a-b', 'b/1.txt', '0.txt', 'a/to_b/', 'c', 'hf:z/z', 'hf:a/a']
    results = [
        find(order + order[:3])
        for order in (random.Random(seed).sample(inputs, len(inputs)) for seed in range(200))
    ]
    assert all(result == results[0] for result in results)
    kept, skipped = results[0]
    files = [source.path for source in kept if source.kind != 'hf']
    assert [os.path.basename(path) for path in files] == [
        '4.txt', '5.txt', '0.txt', '2.txt', '6.txt',
    ]
    real = [os.fsencode(os.path.realpath(path)) for path in files]
    # a-b before a/, for so the bytes compare
    assert real == sorted(set(real)) and real[0] < real[1]
    assert kept[-2:] == [Source('hf:a/a', 'hf', 0, 0), Source('hf:z/z', 'hf', 0, 0)]
    real_skipped = [os.fsencode(os.path.realpath(entry['file'])) for entry in skipped]
    assert real_skipped == sorted(set(real_skipped)) and len(real_skipped) == 4
    assert {entry['file']: entry['reason'] for entry in skipped}['b/deep/to_other'] == sources.LINK


def test_a_further_input_takes_nothing_away(here):
    for name in ('p/a.log', 'p/src/b.log', 'p/src/c.txt', 'p/build/d.txt', 'p/.venv/e.txt'):
        write(here / name)
    write(here / 'p' / '.gitignore', '*.log\nbuild\n')
    assert names(look('p')[0]) == {'c.txt': 'text'}
    parts = ['p', 'p/src', 'p/build', 'p/.venv', 'p/a.log']
    for chosen in itertools.chain(*(itertools.permutations(parts, n) for n in range(1, 6))):
        assert {os.path.abspath(path) for path in look(*chosen)[0]} == \
            {os.path.abspath(path) for part in chosen for path in look(part)[0]}
    kept, skipped = look(*parts)
    assert names(kept).keys() == {'a.log', 'b.log', 'c.txt', 'd.txt', 'e.txt'}
    assert names(skipped) == {'.gitignore': 'hidden'}


def test_one_file_under_two_spellings(here):
    write(here / 'a.txt')
    write(here / 'm' / 'b.txt')
    full = str(here / 'a.txt')
    for inputs in (['a.txt', './a.txt', full], [full, 'a.txt', './a.txt']):
        assert list(look(*inputs)[0]) == ['./a.txt']
    assert list(look('m/', 'm', './m')[0]) == [os.path.join('./m', 'b.txt')]
    assert list(look('m', 'm/../m/b.txt')[0]) == [min(os.path.join('m', 'b.txt'), 'm/../m/b.txt')]


@posix
def test_links_in_circles_pipes_and_what_is_gone(here):
    write(here / 'm' / '1' / 'a.txt')
    write(here / 'far' / 'b.txt')
    os.symlink('..', here / 'm' / '1' / 'up')
    os.symlink('.', here / 'm' / 'self')
    os.symlink(here / 'far', here / 'm' / '0far')
    os.symlink(here / 'm', here / 'far' / 'back')
    os.symlink('1/a.txt', here / 'm' / 'twice.txt')
    os.symlink('nowhere', here / 'm' / 'gone.txt')
    os.symlink('nowhere', here / 'm' / 'gone2.txt')
    os.symlink('round.txt', here / 'm' / 'round.txt')
    os.mkfifo(here / 'm' / 'pipe.txt')
    os.mkfifo(here / 'm' / '.gitignore')  # opening it would never end
    os.mkfifo(here / 'm' / 'state.json')
    write(here / 'm' / 'dataset_info.json')
    write(here / 'm' / 'x.arrow')
    kept, skipped = look('m')
    assert list(kept) == ['m/1/a.txt', 'm/x.arrow']
    assert names(skipped) == {
        **dict.fromkeys(('gone.txt', 'gone2.txt', 'round.txt'), 'a link that leads nowhere'),
        'pipe.txt': 'no regular file', '.gitignore': 'hidden', '0far': sources.LINK,
        **dict.fromkeys(('state.json', 'dataset_info.json'), 'describes a saved dataset'),
    }
    assert look('m/gone.txt', 'm/pipe.txt') == (
        {},
        {'m/gone.txt': 'a link that leads nowhere', 'm/pipe.txt': 'no regular file'},
    )


@posix
def test_links_out_of_a_folder(here, monkeypatch):
    """They may lead to anything on this machine: to what nobody meant to have read. A link to what is read
    anyway is not worth a word.
    """
    for name in ('far/b.txt', 'far/deep/c.txt', 'secret.txt', 'm/.env', 'm/a.txt', 'twin.txt'):
        write(here / name)
    for link, to in (
            ('README', '../secret.txt'), ('absolute.txt', here / 'secret.txt'), ('folder', '../far'),
            ('notes.txt', '.env'), ('same.txt', 'a.txt'), ('up', '..'), ('around.txt', '../m/a.txt'),
            ('null.txt', os.devnull)):
        os.symlink(to, here / 'm' / link)
    os.link(here / 'twin.txt', here / 'm' / 'twin.txt')
    kept, skipped = look('m')
    assert names(kept) == {'a.txt': 'text', 'twin.txt': 'text'}
    assert names(skipped).keys() == {'README', 'folder', 'up', 'null.txt', '.env'}
    assert {reason for name, reason in names(skipped).items() if name != '.env'} == {sources.LINK}
    assert 'a secret' in names(skipped)['.env']
    # named, they are followed; and what they lead to, where it is an input
    assert 'm/README' in look('m', 'm/README')[0]
    assert names(look('m', 'm/folder')[0]).keys() == {'a.txt', 'twin.txt', 'b.txt', 'c.txt'}
    assert names(look('m', 'far')[0]).keys() == {'a.txt', 'twin.txt', 'b.txt', 'c.txt'}
    assert look('m/*')[0].keys() >= {'m/README', 'm/folder/b.txt'}
    opened = []
    monkeypatch.setattr(sources.sniff, 'known_kind', opened.append)
    write(here / 'm' / 'proc.unknown', '')     # as those of /proc, that say 0 bytes and may be waited for
    assert names(look('m')[1])['proc.unknown'] == 'empty' and not opened


@posix
def test_a_folder_that_cannot_be_read(here, monkeypatch):
    write(here / 'm' / 'a.txt')
    write(here / 'm' / 'locked' / 'b.txt')
    scandir = os.scandir

    def guarded(path):  # for root, to whom nothing is forbidden
        if os.path.basename(path) == 'locked':
            raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', guarded)
    assert look('m') == ({'m/a.txt': 'text'}, {'m/locked': 'Permission denied'})


@posix
def test_names_that_are_not_utf8(here):
    bad = os.fsdecode(b'caf\xe9')
    try:
        os.mkdir(bad)
    except OSError:
        pytest.skip('this file system refuses such names')
    for name in (b'\xff.txt', b'\xe9.jpg', b'\xc3\xa9.txt', b'skip\xe8.txt'):
        with open(os.path.join(bad, os.fsdecode(name)), 'w') as f:
            f.write('x')
    with open(os.path.join(bad, '.gitignore'), 'wb') as f:
        f.write(b'skip\xe8*\n')
    kept, skipped = look(bad)
    assert list(kept) == [
        os.path.join(bad, os.fsdecode(name)) for name in (b'\xc3\xa9.txt', b'\xff.txt')
    ]
    assert {os.fsencode(os.path.basename(path)): reason for path, reason in skipped.items()} == {
        b'.gitignore': 'hidden',
        b'skip\xe8.txt': 'ignored by .gitignore',
        b'\xe9.jpg': 'unknown type .jpg',
    }
    assert list(look(os.path.join(bad, os.fsdecode(b'\xff.txt')), bad)[0]) == list(kept)


def test_every_kind(here):
    expected = {
        'a.txt': 'text', 'a.MD': 'text', 'README': 'text', 'Makefile': 'text', 'a.srt': 'text',
        'a.tex': 'text', 'a.org': 'text', 'a.py': 'code', 'a.RS': 'code', 'a.css': 'code',
        'a.sql': 'code', 'a.sh': 'code', 'a.c++': 'code', 'a.json': 'data', 'a.yaml': 'data',
        'a.xml': 'data', 'a.svg': 'data', 'a.env': 'data', 'a.toml': 'data', 'a.html': 'html',
        'a.HTM': 'html', 'a.xhtml': 'html', 'a.ipynb': 'notebook', 'a.jsonl': 'jsonl',
        'a.ndjson': 'jsonl', 'a.csv': 'csv', 'a.tsv': 'csv', 'a.pdf': 'pdf',
        'a.parquet': 'parquet', 'a.arrow': 'arrow', 'b.txt.gz': 'text', 'b.py.bz2': 'code',
        'b.json.xz': 'data', 'b.html.zst': 'html', 'b.ipynb.gz': 'notebook',
        'b.JSONL.GZ': 'jsonl', 'b.csv.zst': 'csv', 'a.docx': 'docx', 'a.pptx': 'pptx', 'a.xlsx': 'xlsx',
        'a.odt': 'odt', 'a.ods': 'odt', 'a.epub': 'epub', 'a.rtf': 'rtf', 'a.eml': 'email', 'a.mbox': 'email',
        'c.gz': 'text', 'a.zip': 'zip', 'a.tar': 'tar', 'a.tar.gz': 'tar', 'a.tgz': 'tar', 'a.doc': 'office',
    }
    unknown = {
        'c.jpg': '.jpg',
        'c.pdf.gz': '.pdf.gz',
        'c.parquet.zst': '.parquet.zst',
        'c.arrow.xz': '.arrow.xz',
        'c.txt.gz.gz': '.gz.gz',
        'c.docx.gz': '.docx.gz',
    }
    for name in {**expected, **unknown}:
        write(here / 'm' / name)
    kept, skipped = look('m', exclude='!*.svg,!*.env')
    assert names(kept) == expected
    assert names(skipped) == {
        name: f'unknown type {extension}' for name, extension in unknown.items()
    }
    assert set(expected.values()) == set(sources.EXTENSIONS)
    # named: read anyway
    assert names(look(*(here / 'm').iterdir())[0]) == {**expected, **dict.fromkeys(unknown, 'text')}


def test_a_type_that_nobody_knows_is_told_by_its_content(here):
    write(here / 'm' / 'a.bin', '%PDF-1.4')
    write(here / 'm' / 'b.bin', '{\\rtf1 text}')
    write(here / 'm' / 'c.jar', 'PK\x05\x06' + '\0' * 18)
    write(here / 'm' / 'd.bin', 'plain text')
    kept, skipped = look('m')
    assert names(kept) == {'a.bin': 'pdf', 'b.bin': 'rtf'}
    assert names(skipped) == {'c.jar': 'unknown type .jar', 'd.bin': 'unknown type .bin'}
    write(here / 'm' / 'e.mobi', '\0' * 60 + 'BOOKMOBI')
    assert names(look('m')[1])['e.mobi'] == 'a Kindle book: convert it to epub'


def test_the_lists_of_extensions():
    words = ' '.join(sources.EXTENSIONS.values()).split()
    assert len(words) == len(set(words)) == len(sources.KIND_OF)
    assert all(word == word.lower() for word in words)
    before = '''
        txt text md markdown mdx rst adoc asciidoc org tex bib ltx sty cls log srt vtt po pot diff
        patch html htm xhtml css scss sass less xml xsl xsd svg json jsonl ndjson json5 yaml yml
        toml ini cfg conf properties env csv tsv sql graphql proto thrift ipynb py pyi pyx pxd js
        mjs cjs jsx ts tsx vue svelte java kt kts scala groovy clj cljs cljc c h cc cpp cxx hh hpp
        hxx inl cu cuh cl m mm cs fs fsi fsx vb go rs swift zig nim d v sv vhd vhdl rb pl pm php
        lua r rmd jl hs lhs ml mli elm erl hrl ex exs dart lisp lsp el scm rkt f f90 f95 f03 for
        pas pp ada adb ads cob asm s awk sed tcl sh bash zsh fish ps1 bat cmd cmake mk mak gradle
        bazel bzl nix tf hcl dockerfile vim glsl hlsl wgsl metal sol coq lean agda idr'''
    assert not set(before.split()) - set(words)  # what was once read stays readable


def test_size_and_time(here):
    write(here / 'm' / 'a.txt', 'twelve bytes')
    os.utime(here / 'm' / 'a.txt', ns=(1, 1_700_000_000_123_456_700))
    (source,), _ = find(['m'])
    assert source[:3] == (os.path.join('m', 'a.txt'), 'text', 12)
    status = os.stat('m/a.txt')
    assert source.stamp == max(status.st_mtime_ns, status.st_ctime_ns) > 1_700_000_000_123_456_700 - 2e9


def test_large_and_empty(here):
    for name in (
        'a.txt', 'a.pdf', 'a.txt.gz', 'a.csv', 'a.jsonl', 'a.jsonl.gz', 'a.parquet', 'a.arrow'):
        write(here / 'm' / name, b'x' * 2001)
    write(here / 'm' / 'fits.txt', b'x' * 2000)
    write(here / 'm' / 'empty.txt', b'')
    write(here / 'm' / 'empty.csv', b'')
    kept, skipped = look('m', max_file_mb=0.002)
    assert names(kept).keys() == {
        'fits.txt', 'a.csv', 'a.jsonl', 'a.jsonl.gz', 'a.parquet', 'a.arrow',
    }
    assert names(skipped) == {
        **dict.fromkeys(('a.txt', 'a.pdf', 'a.txt.gz'), 'larger than 0.002 MB'),
        **dict.fromkeys(('empty.txt', 'empty.csv'), 'empty'),
    }
    assert look('m/a.txt', 'm/empty.txt', max_file_mb=0) == (
        {'m/a.txt': 'text'},
        {'m/empty.txt': 'empty'},
    )
    with open(here / 'm' / 'huge.txt', 'wb') as f:
        f.truncate(256_000_001)  # a hole: takes no space
    assert names(look('m')[1])['huge.txt'] == 'larger than 256 MB'


def test_hidden(here):
    for name in (
        'm/a.txt', 'm/.b.txt', 'm/.git/config.txt', 'm/.git/deep/c.txt', '.d/e.txt', '.d/.f.txt'):
        write(here / name)
    write(here / 'm' / '.gitignore', '*.tmp')
    kept, skipped = look('m')
    assert names(kept) == {'a.txt': 'text'}
    assert names(skipped) == dict.fromkeys(('.b.txt', '.git', '.gitignore'), 'hidden')
    assert names(look('.d', 'm/.b.txt', 'm/.gitignore')[0]).keys() == {
        'e.txt', '.b.txt', '.gitignore',
    }


def test_prepared_datasets(here):
    for name in ('train.bin', 'val.bin', 'meta.json'):
        for folder in ('old', 'new', 'more', 'dots'):
            write(here / 'm' / folder / name)
    for name in sources.OURS:
        write(here / 'm' / 'new' / name)
    write(here / 'm' / 'more' / 'my_notes.txt')
    write(here / 'm' / 'dots' / '.DS_Store')
    write(here / 'm' / 'work.partial' / 'prepare.lock')
    write(here / 'm' / 'work.partial' / 'documents.txt')
    write(here / 'm' / 'yours.partial' / 'chapter.txt')
    kept, skipped = look('m')
    assert names(kept).keys() == {'my_notes.txt', 'meta.json', 'chapter.txt'}
    assert {name for name, reason in names(skipped).items() if reason == 'a prepared dataset'} == \
        {'old', 'new', 'dots', 'work.partial'}
    assert names(skipped).keys() == {'old', 'new', 'dots', 'work.partial', 'train.bin', 'val.bin'}
    assert look('m/new', 'm/work.partial/') == (
        {},
        {'m/new': 'a prepared dataset', 'm/work.partial/': 'a prepared dataset'},
    )
    os.remove(here / 'm' / 'old' / 'val.bin')
    assert [sources.is_dataset(here / 'm' / name) for name in ('new', 'dots', 'more', 'old')] == [
        True, True, False, False,
    ]


def save_by_hand(folder, rows, listed=True):
    """What save_to_disk of datasets leaves, with the cache of a map() beside it."""
    pa = pytest.importorskip('pyarrow')
    folder.mkdir(parents=True)
    table = pa.table({'text': rows})
    for name in ('data-00000-of-00001.arrow', 'cache-0123456789abcdef.arrow', 'my_cache.arrow'):
        with (
            pa.OSFile(str(folder / name), 'wb') as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    state = {
        '_data_files': [{'filename': 'data-00000-of-00001.arrow'}],
        '_fingerprint': '0123456789abcdef',
        '_format_columns': None,
        '_format_kwargs': {},
        '_format_type': None,
        '_output_all_columns': False,
        '_split': 'train',
    }
    write(folder / 'state.json', json.dumps(state, indent=2) if listed else 'not json')
    write(
        folder / 'dataset_info.json',
        json.dumps({'citation': '', 'features': {'text': {'dtype': 'string', '_type': 'Value'}}}),
    )


def test_a_saved_dataset(here):
    save_by_hand(here / 'm' / 'all' / 'train', ['a'])
    save_by_hand(here / 'm' / 'all' / 'test', ['b'], listed=False)
    write(here / 'm' / 'all' / 'dataset_dict.json', '{"splits": ["train", "test"]}')
    for folder in ('plain', 'half'):
        for name in (
            'state.json', 'dataset_dict.json',
            'cache-1.arrow' if folder == 'half' else 'dataset_info.json'):
            write(here / 'm' / folder / name, '{}')
    kept, skipped = look('m')

    def at(table):
        return {os.path.relpath(path, 'm').replace(os.sep, '/'): value for path, value in table.items()}

    assert at(kept) == {
        'all/test/data-00000-of-00001.arrow': 'arrow',
        'all/test/my_cache.arrow': 'arrow',  # nothing says what it is
        'all/train/data-00000-of-00001.arrow': 'arrow',
        'half/cache-1.arrow': 'arrow',
        'half/dataset_dict.json': 'data',
        'half/state.json': 'data',
        'plain/dataset_dict.json': 'data',
        'plain/dataset_info.json': 'data',
        'plain/state.json': 'data',
    }
    describes, cache = 'describes a saved dataset', 'cache of a saved dataset'
    assert at(skipped) == {
        'all/dataset_dict.json': describes, 'all/test/cache-0123456789abcdef.arrow': cache,
        'all/test/dataset_info.json': describes, 'all/test/state.json': describes,
        'all/train/cache-0123456789abcdef.arrow': cache, 'all/train/my_cache.arrow': cache,
        'all/train/dataset_info.json': describes, 'all/train/state.json': describes}
    for state in (
        '[]', '{"_data_files": 3}', '{"_data_files": [{"filename": []}]}', '[' * 100_000,
        b'\xff\xfe', ''):
        write(here / 'm' / 'all' / 'test' / 'state.json', state)
        assert list(at(look('m')[0]))[0] == 'all/test/data-00000-of-00001.arrow'


def test_a_dataset_saved_by_hugging_face(here):
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'text': ['a', 'b', 'c']})
    datasets.DatasetDict({'train': rows, 'test': rows}).save_to_disk('m')
    loaded = datasets.load_from_disk('m')['train']
    loaded.map(lambda row: {'text': row['text'] * 2})
    kept, skipped = look('m')
    assert [path.replace(os.sep, '/') for path in kept] == \
        ['m/test/data-00000-of-00001.arrow', 'm/train/data-00000-of-00001.arrow']
    assert set(skipped.values()) == {'describes a saved dataset', 'cache of a saved dataset'}


def test_patterns(here):
    for name in (
        'b/1.txt', 'b/deep/2.txt', 'b/deep/3.md', 'a.txt', 'c[1].txt', 'd/x.unknown', 'd/y.txt'):
        write(here / name)

    def paths(*inputs):
        return [path.replace(os.sep, '/') for path in look(*inputs)[0]]

    assert paths('*.txt') == ['a.txt', 'c[1].txt']
    assert paths('**/*.txt') == ['a.txt', 'b/1.txt', 'b/deep/2.txt', 'c[1].txt', 'd/y.txt']
    assert paths('b/**/[23].*') == ['b/deep/2.txt', 'b/deep/3.md']
    assert paths('?.txt') == ['a.txt'] and paths('d*') == ['d/y.txt']
    assert paths('d/*') == ['d/x.unknown', 'd/y.txt']
    assert paths('c[1].txt') == ['c[1].txt']  # it exists as it is written


def test_hub_datasets_pass_through(here):
    write(here / 'a.txt')
    kept, skipped = find(['hf:o/z:train[:10%]', 'a.txt', 'hf:o/a', 'hf:o/z:train[:10%]', 'hf:o/*'])
    assert kept[1:] == [
        Source(spec, 'hf', 0, 0) for spec in ('hf:o/*', 'hf:o/a', 'hf:o/z:train[:10%]')
    ]
    assert skipped == []
    assert find([]) == ([], [])


def test_what_is_missing_ends_the_program(here, capsys, monkeypatch):
    write(here / 'mine' / 'letters.txt')
    monkeypatch.setattr(
        sources, 'walk', lambda *args: pytest.fail('walked before all inputs were checked')
    )
    for path, words in (
        ('mime', 'mime: no such file or folder, did you mean mine?'),
        ('*.nothing', '*.nothing: no file or folder matches'),
        ('mine/leters.txt', f'did you mean {os.path.join("mine", "letters.txt")}?'),
        ('no/way/x.txt', 'no/way/x.txt: no such file or folder\n'),
        ('mine/letters.txt/x', 'no such file'),
    ):
        with pytest.raises(SystemExit) as left:
            find(['mine', path])
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.startswith('error: '), said
        assert said.count('\n') == 1 and words in said, said


def test_twenty_thousand_files(here):
    for folder in range(100):
        os.makedirs(here / 'm' / f'{folder}')
        for name in range(200):
            with open(here / 'm' / f'{folder}' / f'{name}.txt', 'w') as f:
                f.write('x')
    write(
        here / 'm' / '.gitignore', '\n'.join(f'*.x{i}\nfolder{i}/\n/a/**/b{i}' for i in range(50))
    )
    (kept, _), seconds = pace.seconds_of(lambda: find(['m']))
    assert len(kept) == 20_000 and seconds < 5
