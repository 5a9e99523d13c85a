"""stdlib.py: the default corpus is code, without tests and without tables."""
import os
import subprocess
import sys

from helpers import pace
from helpers.prepare import ROOT, TESTS, dataset, driven, write

from mambino.prepare import stdlib

TABLES = [
    'encodings/cp1252.py', 'encodings/iso8859_2.py', 'encodings/koi8_r.py',
    'encodings/mac_greek.py', 'html/entities.py', 'pydoc_data/topics.py',
]
CODE = [
    'os.py', 'argparse.py', 'json/decoder.py', 'ast.py', 'enum.py', 'codecs.py',
    'encodings/utf_8.py', 'heapq.py', 'html/parser.py', 'keyword.py', 'pydoc.py', 'sre_parse.py',
    'tokenize.py', 'turtle.py', 'typing.py',
]


def inside(path):
    return os.path.relpath(path, os.path.dirname(os.__file__)).replace(os.sep, '/')


def test_the_standard_library():
    (kept, skipped), seconds = pace.seconds_of(stdlib.find_stdlib)
    assert seconds < 2
    assert 400 < len(kept) and {source.kind for source in kept} == {'code'}
    paths = [inside(source.path) for source in kept]
    assert {'os.py', 'argparse.py', 'json/decoder.py'} <= set(paths)
    assert not any(stdlib.NOT_STDLIB & set(path.split('/')) for path in paths)
    assert kept == sorted(kept, key=lambda source: os.fsencode(source.path))
    for source in kept[:20]:
        status = os.stat(source.path)
        assert source[2:4] == (status.st_size, status.st_mtime_ns)

    assert {entry['reason'] for entry in skipped} == {'a table, not code'}
    tables = {inside(entry['file']) for entry in skipped}
    assert set(TABLES) <= tables and not tables & set(paths)
    assert not tables & set(CODE)
    assert 60 < len(tables) < 100
    share = sum(os.path.getsize(entry['file']) for entry in skipped) / sum(
        source.size for source in kept
    )
    assert 0.1 < share < 0.35


def test_a_table_is_told_by_its_content(tmp_path):
    rows = ''.join(f"    {i}: ('name {i}', -{i}.5, b'x', None),  # remark\n" for i in range(100))
    prose = ''.join(
        f'If this is line {i}, for it to be read, return here.\nAnd so on.\n' for i in range(90)
    )
    for text, expected in (
            ('"""Doc."""\nimport os\nTABLE = {\n' + rows + '}\n', True),
            ('text = (\n' + "    'a line'\n" * 300 + ')\n', True),
            ("topics = {'one': r\'\'\'" + 'Prose as it is.\n' * 300 + "\'\'\'}\n", True),
            ('"""' + 'A long docstring.\n' * 300 + '"""\nx = 1\n', False),
            ('"""' + prose + '"""\nx = [\n    1,\n]\n', False),
            ('def f(x):\n' + '    x += 1\n' * 300, False),
            ('TABLE = {\n' + rows + '}\n' + 'print(TABLE)\n' * 120, False),  # as much code as table
            ('TABLE = {\n' + rows * 3, False),  # no Python
            ('TABLE = [\n' + '    1,\n' * 50 + ']\n', False)):  # small
        write(tmp_path / 'x.py', text)
        assert stdlib.is_table(tmp_path / 'x.py') == expected, text[:80]


def test_tables_are_left_out_of_the_default_alone(tmp_path):
    table = 'TABLE = {\n' + ''.join(f'    {i}: {i * i},\n' for i in range(300)) + '}\n'
    write(tmp_path / 'lib' / 'table.py', table)
    for i in range(9):
        write(tmp_path / 'lib' / f'{i}.py', f'def f{i}(x):\n    return x + {i}\n')
    driven(tmp_path, "stdlib.sysconfig.get_path = lambda name: 'lib'", '--tokenizer=byte')
    made = dataset(tmp_path / 'data' / 'stdlib')
    assert len(made.all) == 9 and made.meta['kinds']['code']['files'] == 9
    assert made.meta['skipped'] == [
        {'file': os.path.join('lib', 'table.py'), 'reason': 'a table, not code'}
    ]
    driven(tmp_path, '', 'lib', '--tokenizer=byte')
    made = dataset(tmp_path / 'data' / 'lib')
    assert len(made.all) == 10 and table in made.all and made.meta['skipped'] == []


# -----------------------------------------------------------------------------
# It must start quickly, and so must each of its processes

HEAVY = {
    'torch', 'transformers', 'model_gpt', 'model_mamba', 'model_hybrid', 'mambino.language_model',
}


def test_neither_torch_nor_a_model_is_imported(tmp_path):
    argv = [sys.executable, '-X', 'importtime', 'prepare.py', '--dry_run', 'README.md']
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith('import time:')]
    names = {line.split('|')[-1].strip() for line in lines}
    assert 'mambino.prepare.spool' in names and not HEAVY & names


def test_nor_in_a_worker_process(tmp_path):
    for i in range(450):  # in three tasks
        write(tmp_path / 'in' / f'{i}.txt', f'document {i}')
    note = f'sys.path.insert(0, {TESTS!r})\nimport helpers.workers\nspool.extract = helpers.workers.extract_and_note'
    driven(tmp_path, note, 'in', '--tokenizer=byte', '--workers=2')
    notes = list(tmp_path.glob('modules-*'))
    assert len(dataset(tmp_path / 'data' / 'in').all) == 450 and notes
    for path in notes:
        names = set(path.read_text().split())
        assert 'mambino.prepare.spool' in names and not HEAVY & names
