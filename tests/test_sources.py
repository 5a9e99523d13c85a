"""sources.py: what it finds in made-up folders, in which order, and why it leaves out the rest."""
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import time

import pytest

from mambino.prepare import sources
from mambino.prepare.sources import Source, find

posix = pytest.mark.skipif(os.name == 'nt', reason='links need rights on Windows')

def write(path, content='x\n'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))

def look(*inputs, **settings):
    """({path of what is read: kind}, {path of what is skipped: reason}) as they come."""
    found, skipped = find([str(path) for path in inputs], **settings)
    assert all(set(entry) == {'file', 'reason'} for entry in skipped)
    return {source.path: source.kind for source in found}, {entry['file']: entry['reason'] for entry in skipped}

def names(table):
    return {os.path.basename(path): value for path, value in table.items()}

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

# -----------------------------------------------------------------------------
# Order

@posix
def test_the_order_of_inputs_is_of_no_account(here):
    for name in ('b/1.txt', 'b/deep/2.txt', 'b/deep/3.foo', 'a-b/4.txt', 'a/5.txt', 'a/.hidden', 'c/6.txt', 'other/7.txt'):
        write(here / name)
    write(here / 'b' / '.gitignore', 'deep/2.txt\n')
    os.symlink('../b', here / 'a' / 'to_b')
    os.symlink('../a', here / 'b' / 'to_a')
    os.symlink('../../other', here / 'b' / 'deep' / 'to_other')
    os.symlink('../other', here / 'c' / 'to_other')
    os.symlink('b/1.txt', here / '0.txt')
    inputs = ['b', 'a', 'b/deep', 'a-b', 'b/1.txt', '0.txt', 'a/to_b/', 'c', 'hf:z/z', 'hf:a/a']
    results = [find(order + order[:3]) for order in (random.Random(seed).sample(inputs, len(inputs)) for seed in range(200))]
    assert all(result == results[0] for result in results)
    found, skipped = results[0]
    files = [source.path for source in found if source.kind != 'hf']
    assert [os.path.basename(path) for path in files] == ['4.txt', '5.txt', '0.txt', '2.txt', '6.txt', '7.txt']
    real = [os.fsencode(os.path.realpath(path)) for path in files]
    assert real == sorted(set(real)) and real[0] < real[1]  # a-b before a/, for so the bytes compare
    assert found[-2:] == [Source('hf:a/a', 'hf', 0, 0), Source('hf:z/z', 'hf', 0, 0)]
    places = [os.fsencode(os.path.realpath(entry['file'])) for entry in skipped]
    assert places == sorted(set(places)) and len(places) == 3

def test_a_further_input_takes_nothing_away(here):
    for name in ('p/a.log', 'p/src/b.log', 'p/src/c.txt', 'p/build/d.txt', 'p/.venv/e.txt'):
        write(here / name)
    write(here / 'p' / '.gitignore', '*.log\nbuild\n')
    assert names(look('p')[0]) == {'c.txt': 'text'}
    parts = ['p', 'p/src', 'p/build', 'p/.venv', 'p/a.log']
    for chosen in itertools.chain(*(itertools.permutations(parts, n) for n in range(1, 6))):
        assert {os.path.abspath(path) for path in look(*chosen)[0]} == \
            {os.path.abspath(path) for part in chosen for path in look(part)[0]}
    found, skipped = look(*parts)
    assert names(found).keys() == {'a.log', 'b.log', 'c.txt', 'd.txt', 'e.txt'} and names(skipped) == {'.gitignore': 'hidden'}

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
    found, skipped = look('m')
    assert list(found) == ['m/0far/b.txt', 'm/1/a.txt', 'm/x.arrow']  # in the order of far/b.txt and m/1/a.txt
    assert names(skipped) == {**dict.fromkeys(('gone.txt', 'gone2.txt', 'round.txt', 'pipe.txt'), 'no regular file'),
                              '.gitignore': 'hidden',
                              **dict.fromkeys(('state.json', 'dataset_info.json'), 'describes a saved dataset')}
    assert look('m/gone.txt', 'm/pipe.txt') == ({}, {'m/gone.txt': 'no regular file', 'm/pipe.txt': 'no regular file'})

@posix
def test_a_folder_shows_its_own_path_if_it_has_one(here, monkeypatch):
    write(here / 'm' / 'real' / 'a.txt')
    write(here / 'far' / 'b.txt')
    for link, to in (('0', 'real'), ('z', 'real'), ('l1', '../far'), ('l2', '../far'), ('l3', '../far')):
        os.symlink(to, here / 'm' / link)
    assert look('m')[0].keys() == {'m/l1/b.txt', 'm/real/a.txt'}
    scandir = os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: contextlib.nullcontext(list(scandir(path))[::-1]))
    assert look('m')[0].keys() == {'m/l1/b.txt', 'm/real/a.txt'}  # in whatever order a file system lists them

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
    found, skipped = look(bad)
    assert list(found) == [os.path.join(bad, os.fsdecode(name)) for name in (b'\xc3\xa9.txt', b'\xff.txt')]
    assert {os.fsencode(os.path.basename(path)): reason for path, reason in skipped.items()} == \
        {b'.gitignore': 'hidden', b'skip\xe8.txt': 'ignored by .gitignore', b'\xe9.jpg': 'unknown type .jpg'}
    assert list(look(os.path.join(bad, os.fsdecode(b'\xff.txt')), bad)[0]) == list(found)

# -----------------------------------------------------------------------------
# Kinds

def test_every_kind(here):
    expected = {
        'a.txt': 'text', 'a.MD': 'text', 'README': 'text', 'Makefile': 'text', 'a.srt': 'text', 'a.tex': 'text', 'a.org': 'text',
        'a.py': 'code', 'a.RS': 'code', 'a.css': 'code', 'a.sql': 'code', 'a.sh': 'code', 'a.c++': 'code',
        'a.json': 'data', 'a.yaml': 'data', 'a.xml': 'data', 'a.svg': 'data', 'a.env': 'data', 'a.toml': 'data',
        'a.html': 'html', 'a.HTM': 'html', 'a.xhtml': 'html', 'a.ipynb': 'notebook', 'a.jsonl': 'jsonl', 'a.ndjson': 'jsonl',
        'a.csv': 'csv', 'a.tsv': 'csv', 'a.pdf': 'pdf', 'a.parquet': 'parquet', 'a.arrow': 'arrow',
        'b.txt.gz': 'text', 'b.py.bz2': 'code', 'b.json.xz': 'data', 'b.html.zst': 'html', 'b.ipynb.gz': 'notebook',
        'b.JSONL.GZ': 'jsonl', 'b.csv.zst': 'csv',
    }
    unknown = {'c.jpg': '.jpg', 'c.tar.gz': '.tar.gz', 'c.tgz': '.tgz', 'c.gz': '.gz', 'c.pdf.gz': '.pdf.gz',
               'c.parquet.zst': '.parquet.zst', 'c.arrow.xz': '.arrow.xz', 'c.txt.gz.gz': '.gz.gz', 'c.docx': '.docx'}
    for name in {**expected, **unknown}:
        write(here / 'm' / name)
    found, skipped = look('m')
    assert names(found) == expected
    assert names(skipped) == {name: f'unknown type {extension}' for name, extension in unknown.items()}
    assert set(expected.values()) == set(sources.EXTENSIONS)
    assert names(look(*(here / 'm').iterdir())[0]) == {**expected, **dict.fromkeys(unknown, 'text')}  # named: read anyway

def test_the_lists_of_extensions():
    words = ' '.join(sources.EXTENSIONS.values()).split()
    assert len(words) == len(set(words)) == len(sources.KINDS) and all(word == word.lower() for word in words)
    before = '''
        txt text md markdown mdx rst adoc asciidoc org tex bib ltx sty cls log srt vtt po pot diff patch
        html htm xhtml css scss sass less xml xsl xsd svg json jsonl ndjson json5 yaml yml toml ini cfg conf properties env
        csv tsv sql graphql proto thrift ipynb
        py pyi pyx pxd js mjs cjs jsx ts tsx vue svelte java kt kts scala groovy clj cljs cljc c h cc cpp cxx hh hpp hxx inl
        cu cuh cl m mm cs fs fsi fsx vb go rs swift zig nim d v sv vhd vhdl rb pl pm php lua r rmd jl hs lhs ml mli elm erl
        hrl ex exs dart lisp lsp el scm rkt f f90 f95 f03 for pas pp ada adb ads cob asm s awk sed tcl sh bash zsh fish ps1
        bat cmd cmake mk mak gradle bazel bzl nix tf hcl dockerfile vim glsl hlsl wgsl metal sol coq lean agda idr'''
    assert not set(before.split()) - set(words)  # what was once read stays readable

def test_size_and_time(here):
    write(here / 'm' / 'a.txt', 'twelve bytes')
    os.utime(here / 'm' / 'a.txt', ns=(1, 1_700_000_000_123_456_700))
    (source,), _ = find(['m'])
    assert source == (os.path.join('m', 'a.txt'), 'text', 12, os.stat('m/a.txt').st_mtime_ns)
    assert abs(source.stamp - 1_700_000_000_123_456_700) < 2e9

def test_large_and_empty(here):
    for name in ('a.txt', 'a.pdf', 'a.txt.gz', 'a.csv', 'a.jsonl', 'a.jsonl.gz', 'a.parquet', 'a.arrow'):
        write(here / 'm' / name, b'x' * 2001)
    write(here / 'm' / 'fits.txt', b'x' * 2000)
    write(here / 'm' / 'empty.txt', b'')
    write(here / 'm' / 'empty.csv', b'')
    found, skipped = look('m', max_file_mb=0.002)
    assert names(found).keys() == {'fits.txt', 'a.csv', 'a.jsonl', 'a.jsonl.gz', 'a.parquet', 'a.arrow'}
    assert names(skipped) == {**dict.fromkeys(('a.txt', 'a.pdf', 'a.txt.gz'), 'larger than 0.002 MB'),
                              **dict.fromkeys(('empty.txt', 'empty.csv'), 'empty')}
    assert look('m/a.txt', 'm/empty.txt', max_file_mb=0) == ({'m/a.txt': 'text'}, {'m/empty.txt': 'empty'})
    with open(here / 'm' / 'huge.txt', 'wb') as f:
        f.truncate(256_000_001)  # a hole: takes no space
    assert names(look('m')[1])['huge.txt'] == 'larger than 256 MB'

# -----------------------------------------------------------------------------
# Hidden, prepared, saved

def test_hidden(here):
    for name in ('m/a.txt', 'm/.b.txt', 'm/.git/config.txt', 'm/.git/deep/c.txt', '.d/e.txt', '.d/.f.txt'):
        write(here / name)
    write(here / 'm' / '.gitignore', '*.tmp')
    found, skipped = look('m')
    assert names(found) == {'a.txt': 'text'}
    assert names(skipped) == dict.fromkeys(('.b.txt', '.git', '.gitignore'), 'hidden')
    assert names(look('.d', 'm/.b.txt', 'm/.gitignore')[0]).keys() == {'e.txt', '.b.txt', '.gitignore'}

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
    found, skipped = look('m')
    assert names(found).keys() == {'my_notes.txt', 'meta.json', 'chapter.txt'}
    assert {name for name, reason in names(skipped).items() if reason == 'a prepared dataset'} == \
        {'old', 'new', 'dots', 'work.partial'}
    assert names(skipped).keys() == {'old', 'new', 'dots', 'work.partial', 'train.bin', 'val.bin'}
    assert look('m/new', 'm/work.partial/') == ({}, {'m/new': 'a prepared dataset', 'm/work.partial/': 'a prepared dataset'})
    os.remove(here / 'm' / 'old' / 'val.bin')
    assert [sources.is_dataset(here / 'm' / name) for name in ('new', 'dots', 'more', 'old')] == [True, True, False, False]

def save_by_hand(folder, rows, listed=True):
    """What save_to_disk of datasets leaves, with the cache of a map() beside it."""
    pa = pytest.importorskip('pyarrow')
    folder.mkdir(parents=True)
    table = pa.table({'text': rows})
    for name in ('data-00000-of-00001.arrow', 'cache-0123456789abcdef.arrow', 'my_cache.arrow'):
        with pa.OSFile(str(folder / name), 'wb') as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    state = {'_data_files': [{'filename': 'data-00000-of-00001.arrow'}], '_fingerprint': '0123456789abcdef',
             '_format_columns': None, '_format_kwargs': {}, '_format_type': None, '_output_all_columns': False, '_split': 'train'}
    write(folder / 'state.json', json.dumps(state, indent=2) if listed else 'not json')
    write(folder / 'dataset_info.json', json.dumps({'citation': '', 'features': {'text': {'dtype': 'string', '_type': 'Value'}}}))

def test_a_saved_dataset(here):
    save_by_hand(here / 'm' / 'all' / 'train', ['a'])
    save_by_hand(here / 'm' / 'all' / 'test', ['b'], listed=False)
    write(here / 'm' / 'all' / 'dataset_dict.json', '{"splits": ["train", "test"]}')
    for folder in ('plain', 'half'):
        for name in ('state.json', 'dataset_dict.json', 'cache-1.arrow' if folder == 'half' else 'dataset_info.json'):
            write(here / 'm' / folder / name, '{}')
    found, skipped = look('m')
    at = lambda table: {os.path.relpath(path, 'm').replace(os.sep, '/'): value for path, value in table.items()}
    assert at(found) == {
        'all/test/data-00000-of-00001.arrow': 'arrow', 'all/test/my_cache.arrow': 'arrow',  # nothing says what it is
        'all/train/data-00000-of-00001.arrow': 'arrow', 'half/cache-1.arrow': 'arrow', 'half/dataset_dict.json': 'data',
        'half/state.json': 'data', 'plain/dataset_dict.json': 'data', 'plain/dataset_info.json': 'data',
        'plain/state.json': 'data'}
    describes, cache = 'describes a saved dataset', 'cache of a saved dataset'
    assert at(skipped) == {
        'all/dataset_dict.json': describes, 'all/test/cache-0123456789abcdef.arrow': cache,
        'all/test/dataset_info.json': describes, 'all/test/state.json': describes,
        'all/train/cache-0123456789abcdef.arrow': cache, 'all/train/my_cache.arrow': cache,
        'all/train/dataset_info.json': describes, 'all/train/state.json': describes}
    for state in ('[]', '{"_data_files": 3}', '{"_data_files": [{"filename": []}]}', '[' * 100_000, b'\xff\xfe', ''):
        write(here / 'm' / 'all' / 'test' / 'state.json', state)
        assert list(at(look('m')[0]))[0] == 'all/test/data-00000-of-00001.arrow'

def test_a_dataset_saved_by_hugging_face(here):
    datasets = pytest.importorskip('datasets')
    whole = datasets.Dataset.from_dict({'text': ['a', 'b', 'c']})
    datasets.DatasetDict({'train': whole, 'test': whole}).save_to_disk('m')
    loaded = datasets.load_from_disk('m')['train']
    loaded.map(lambda row: {'text': row['text'] * 2})
    found, skipped = look('m')
    assert [path.replace(os.sep, '/') for path in found] == \
        ['m/test/data-00000-of-00001.arrow', 'm/train/data-00000-of-00001.arrow']
    assert set(skipped.values()) == {'describes a saved dataset', 'cache of a saved dataset'}

# -----------------------------------------------------------------------------
# Inputs

def test_patterns(here):
    for name in ('b/1.txt', 'b/deep/2.txt', 'b/deep/3.md', 'a.txt', 'c[1].txt', 'd/x.unknown', 'd/y.txt'):
        write(here / name)
    paths = lambda *inputs: [path.replace(os.sep, '/') for path in look(*inputs)[0]]
    assert paths('*.txt') == ['a.txt', 'c[1].txt']
    assert paths('**/*.txt') == ['a.txt', 'b/1.txt', 'b/deep/2.txt', 'c[1].txt', 'd/y.txt']
    assert paths('b/**/[23].*') == ['b/deep/2.txt', 'b/deep/3.md']
    assert paths('?.txt') == ['a.txt'] and paths('d*') == ['d/y.txt'] and paths('d/*') == ['d/x.unknown', 'd/y.txt']
    assert paths('c[1].txt') == ['c[1].txt']  # it exists as it is written

def test_hub_datasets_pass_through(here):
    write(here / 'a.txt')
    found, skipped = find(['hf:o/z:train[:10%]', 'a.txt', 'hf:o/a', 'hf:o/z:train[:10%]', 'hf:o/*'])
    assert found[1:] == [Source(spec, 'hf', 0, 0) for spec in ('hf:o/*', 'hf:o/a', 'hf:o/z:train[:10%]')] and skipped == []
    assert find([]) == ([], [])

def test_what_is_missing_ends_the_program(here, capsys, monkeypatch):
    write(here / 'mine' / 'letters.txt')
    monkeypatch.setattr(sources, 'walk', lambda *args: pytest.fail('walked before all inputs were checked'))
    for path, words in (('mime', 'mime: no such file or folder, did you mean mine?'),
                        ('*.nothing', '*.nothing: no file or folder matches'),
                        ('mine/leters.txt', f'did you mean {os.path.join("mine", "letters.txt")}?'),
                        ('no/way/x.txt', 'no/way/x.txt: no such file or folder\n'), ('mine/letters.txt/x', 'no such file')):
        with pytest.raises(SystemExit) as left:
            find(['mine', path])
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.startswith('error: ') and said.count('\n') == 1 and words in said, said

def test_the_standard_library():
    found, skipped = sources.find_stdlib()
    assert skipped == [] and 400 < len(found) and {source.kind for source in found} == {'code'}
    inside = [os.path.relpath(source.path, os.path.dirname(os.__file__)) for source in found]
    assert {'os.py', 'argparse.py', os.path.join('json', 'decoder.py')} <= set(inside)
    assert not any(sources.NOT_STDLIB & set(path.split(os.sep)) for path in inside)
    assert found == sorted(found, key=lambda source: os.fsencode(source.path))
    assert all(source[2:] == (os.stat(source.path).st_size, os.stat(source.path).st_mtime_ns) for source in found[:20])

# -----------------------------------------------------------------------------
# exclude and .gitignore

def test_exclude(here):
    for name in ('m/a.txt', 'm/a.log', 'm/keep.log', 'm/build/b.txt', 'm/src/build/c.txt', 'm/src/top.txt', 'm/top.txt',
                 'n/top.txt', 'n/é.txt'):
        write(here / name)
    write(here / 'm' / '.gitignore', 'a.txt\n!a.log\n!build/\n')
    kept = lambda exclude, *inputs: {p.replace(os.sep, '/') for p in look(*(inputs or ['m', 'n']), exclude=exclude)[0]}
    every = kept('')
    assert len(every) == 8
    assert every - kept('*.log, build/ ,') == {'m/a.log', 'm/keep.log', 'm/build/b.txt', 'm/src/build/c.txt'}  # despite the '!'
    assert every - kept('/top.txt') == {'m/top.txt', 'n/top.txt'}  # relative to each input
    assert every - kept('*.log,!keep.log') == {'m/a.log'}
    assert every - kept('src/**/c.txt') == {'m/src/build/c.txt'}
    assert kept('!a.txt') - every == {'m/a.txt'}  # the word of the command line is above that of a file
    assert every - kept('?.txt') == {'m/build/b.txt', 'm/src/build/c.txt', 'n/é.txt'}
    assert kept('*', 'm/a.txt', 'm/a.log') == {'m/a.txt', 'm/a.log'}  # named
    skipped = look('m', exclude='build,a.*')[1]
    assert names(skipped) == {'build': 'excluded', 'a.txt': 'excluded', 'a.log': 'excluded', '.gitignore': 'hidden'}
    assert sorted(map(os.path.normpath, skipped))[2:] == [os.path.normpath(p) for p in ('m/a.txt', 'm/build', 'm/src/build')]

def test_gitignore_counts_from_the_input_down(here):
    for name in ('p/x.tmp', 'p/q/x.tmp', 'p/q/r/x.tmp', 'p/q/r/y.tmp', 'p/out/deep/z.txt', 'p/q/a.txt'):
        write(here / name)
    write(here / 'p' / '.gitignore', 'out/\na.txt\n')
    write(here / 'p' / 'q' / '.gitignore', '*.tmp\n!a.txt\n')
    write(here / 'p' / 'q' / 'r' / '.gitignore', '!x.tmp\n')
    tmp = lambda *args, **settings: {p.replace(os.sep, '/'): r for p, r in look(*args, **settings)[1].items() if 'ignored' in r}
    assert tmp('p') == dict.fromkeys(('p/out', 'p/q/r/y.tmp', 'p/q/x.tmp'), 'ignored by .gitignore')
    assert tmp('p', gitignore=False) == {}
    assert tmp('p/q/r') == tmp('p/out') == {} and list(look('p/out')[0]) == [os.path.join('p/out', 'deep', 'z.txt')]
    assert tmp('p/q/x.tmp') == {} and names(look('p', 'p/q/x.tmp')[0])['x.tmp'] == 'text'

CASES = [  # (lines of a .gitignore, paths)
    ('*.log\n!keep.log\n', 'a.log keep.log d/b.log d/keep.log'), ('build/\n', 'build/x d/build/x e/build'),
    ('/build\n', 'build d/build'), ('d/build\n', 'd/build e/d/build'), ('d/\n!d/keep\n', 'd/keep d/other'),
    ('d/*\n!d/keep\n', 'd/keep d/other d/e/keep'), ('/*\n!/d\n', 'a d/a e/a'), ('**/foo\n', 'foo d/foo d/e/foo foo2'),
    ('foo/**\n', 'foo/a foo/b/c d/foo/a'), ('a/**/b\n', 'a/b a/x/b a/x/y/b a/xb d/a/b'), ('**\n!a\n', 'a b d/a'),
    ('/**/\n', 'a d/a'), ('**/\n', 'a d/a'), ('a?c\n', 'abc ac a/c abbc'), ('[abc]x\n', 'ax bx dx'),
    ('[!abc]x\n[^d-f]y\n', 'ax dx dy ay'), ('[]a]x\n[!]a]y\n', ']x ax bx ]y by'),
    ('[a-]x\n[]-a]y\n[--0]z\n', '-x ax bx ]y ^y ay -z .z 0z'), ('[z-a]x\n[!z-a]y\n', 'ax zx ay'),
    ('[[:alpha:]]1\n[[:digit:][:upper:]]2\n[[:nothing:]]3\n[[:alpha:]-z]4\n', 'a1 11 A2 12 a2 a3 :3 a4 -4 14'),
    ('[[:alpha]x\n[[:]y\n[[:alpha:]\n', '[x ax :x [y :y a ['), ('[abc\n[!\n[\n', '[abc a [ [!'),
    ('[\\]a]x\n[\\a-\\c]y\n[\\\\]z\n', ']x ax bx by \\z z'), ('\\#x\n#y\n\\!z\n!!w\n', '#x #y !z !w'),
    ('a \nb\\ \nc\\  \n d\n', 'a b b\\  c d'), ('\\*x\na\\?b\n\\\\c\n', '*x xx a?b acb \\c c'),
    ('x\\\nfoo\\/\n', 'x x\\ foo/a'), ('*\n!*/\n!*.c\n', 'a.c d/a.c d/b e/f/a.c'), ('d/\n!d/\n', 'd/a'), ('!a\na\n', 'a'),
    ('\n\n/\n//\n!\n', 'a d/a'), ('foo//\na//b\n', 'foo/a a/b'), ('*/x\n', 'a/x a/b/x x'),
    ('d/**\n!d/**/\n!d/**/*.c\n', 'd/a d/a.c d/e/a.c d/e/b'), ('a/***/b\n***c\n', 'a/b a/x/b cc d/cc'),
    ('a/**\\/b\n', 'a/b a/x/b a/x/y/b'), ('/a[!b]c\n', 'a/c axc abc'), ('x?**/b\n', 'xa/b xab/b xa/c/b xab'),
    ('**a\na**\n', 'ba ab d/ba'),
    ('*é\n[a-c]ü\n', 'é aé aü dü'), ('\ufeffa\n', 'a'), ('a\r\n*.b\r\n', 'a x.b'), ('d/.x\n', 'd/a'), ('a\tb\nc\t\n', 'a c'),
    ('/d/e/\n!/d/e/f\n', 'd/e/f d/g'), ('*.[oa]\n!lib.a\n', 'x.o x.a lib.a lib.o'), ('d*/e\n', 'd/e dd/e dd/x/e'),
    ('.\n..\n./a\n', 'a d/a'),
]

def random_cases(count):
    """Made of few letters, so that the patterns match now and then."""
    rng = random.Random(1337)
    pieces = ['a', 'b', 'c', 'ab', '.', '*', '?', '[ab]', '[!a]', '[a-b]', '[]b]', '\\a', '[[:alpha:]]', '[', '*a', 'b*', '-',
              ' ']
    parts = ['**', '*', 'a', 'b']
    for number in range(count):
        lines = []
        for _ in range(rng.randint(1, 6)):
            words = [rng.choice(parts) if rng.random() < 0.5 else ''.join(rng.choices(pieces, k=rng.randint(1, 3)))
                     for _ in range(rng.choice((1, 1, 2, 2, 3)))]
            line = '!' * (rng.random() < 0.3) + '/' * (rng.random() < 0.2) + '/'.join(words) + '/' * (rng.random() < 0.2)
            # git takes the ** of ab**/c as if a slash were before it, against its manual; we follow the manual
            lines.append(re.sub(r'(?<=[^/])\*\*+', '*', line))
        name = lambda: ''.join(rng.choices('aabbc.-', k=rng.randint(1, 3))).strip('.') or 'a'
        paths = {'/'.join(name() for _ in range(rng.randint(1, 4))) for _ in range(30)}
        yield '\n'.join(lines), paths

def test_gitignore_as_git_reads_it(here):
    """One repository with a folder for each .gitignore, one call of git for all of their paths."""
    if not shutil.which('git'):
        pytest.skip('git is not installed: .gitignore was NOT compared with it')
    cases = [(text, words(paths)) for text, paths in CASES] + list(random_cases(150))
    every = set()
    for number, (text, paths) in enumerate(cases):
        top = here / 'repo' / f'case{number}'
        write(top / '.gitignore', text)
        if number % 3 == 0 and any(path.startswith('a/') for path in paths) and number >= len(CASES):
            paths = {path for path in paths if path != 'a'}
            write(top / 'a' / '.gitignore', cases[number - 1][0] + '\n!b\n')  # one below the other
        for path in sorted(paths, key=lambda path: -path.count('/')):
            try:
                write(top / path)
            except OSError:  # a file and a folder of one name
                continue
            parts = f'case{number}/{path}'.split('/')
            every |= {'/'.join(parts[:n]) for n in range(2, len(parts) + 1)}
    env = {**os.environ, 'GIT_CONFIG_GLOBAL': os.devnull, 'GIT_CONFIG_SYSTEM': os.devnull, 'HOME': str(here)}
    subprocess.run(['git', 'init', '-q', 'repo'], check=True, env=env)
    settings = ['-c', 'core.excludesFile=', '-c', 'core.ignorecase=false']
    done = subprocess.run(['git', *settings, 'check-ignore', '-z', '--stdin'], cwd='repo', env=env, capture_output=True,
                          input='\0'.join(sorted(every)).encode('utf-8'), timeout=60)
    assert done.returncode in (0, 1), done.stderr
    git = set(done.stdout.decode('utf-8').split('\0')) - {''}

    found, skipped = look('repo')
    ignored = {os.path.relpath(path, 'repo').replace(os.sep, '/') for path, reason in skipped.items() if 'ignored' in reason}
    hidden = {path for path in every if any(part.startswith('.') for part in path.split('/'))}
    ours = {path for path in every if any('/'.join(path.split('/')[:n]) in ignored for n in range(path.count('/') + 2))}
    wrong = sorted((git ^ ours) - hidden)
    cause = lambda path: (path, 'git ignores it' if path in git else 'git keeps it', cases[int(path.split('/')[0][4:])][0])
    assert not wrong, (len(wrong), [cause(path) for path in wrong[:10]])
    assert len(every) > 4000 and len(every) * 0.2 < len(git) < len(every) * 0.8

def words(paths):
    """Paths between single spaces; two spaces stand for one in a name."""
    return {path.replace('\0', ' ') for path in paths.replace('  ', '\0').split(' ')}

def test_no_pattern_is_an_error():
    rng = random.Random(7)
    for _ in range(8_000):
        line = ''.join(rng.choices('ab/*?[]!^-\\:# .\0\nü\udcff{}()|+$&~', k=rng.randint(0, 12)))
        rules = [(0, sources.compile_rules([line, 'a']))]
        assert sources.is_ignored('d/a', False, rules) is not None or line.startswith('!')
    assert sources.compile_rules(['[[:alpha:]'] * 5000)

# -----------------------------------------------------------------------------

def test_twenty_thousand_files(here):
    for folder in range(100):
        os.makedirs(here / 'm' / f'{folder}')
        for name in range(200):
            with open(here / 'm' / f'{folder}' / f'{name}.txt', 'w') as f:
                f.write('x')
    write(here / 'm' / '.gitignore', '\n'.join(f'*.x{i}\nfolder{i}/\n/a/**/b{i}' for i in range(50)))
    began = time.perf_counter()
    found, _ = find(['m'])
    assert len(found) == 20_000 and time.perf_counter() - began < 5
