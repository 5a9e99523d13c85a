"""What a config file or a flag may do to a script's settings, and what is refused."""
import os
import subprocess
import sys

import pytest

from mambino.configurator import configure, fail, require, split_list

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SCRIPT = '''"""
Does a thing.

    python script.py --batch_size=2
"""
import math
from mambino.configurator import configure
inputs = []
# --- data ---
dataset = 'shakespeare'  # which data
batch_size = 12          # sequences at once,
                         # fewer if memory is short
# -----------------------------------------------------------------------------
# optimizer
learning_rate = 6e-4  # peak
max_iters = 1000  # -1 is never
lr_decay_iters = 1000

compile = False  # needs a compiler
device = None
dtype: str = 'float32'
_hidden = 1
UPPER = 2
betas = (0.9, 0.95)
if False:
    configure(globals())
later = 5  # no setting: it stands below
'''

@pytest.fixture
def script(tmp_path, monkeypatch):
    """Returns run(*argv) -> (overrides, globals after), in a folder with a config/ in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    (tmp_path / 'script.py').write_text(SCRIPT, encoding='utf-8')
    (tmp_path / 'config').mkdir()

    def run(*argv, positional='config'):
        namespace = {'__file__': str(tmp_path / 'script.py'), '__name__': 'script'}
        exec(compile(SCRIPT, 'script.py', 'exec'), namespace)
        return configure(namespace, positional=positional, argv=list(argv)), namespace
    return run

@pytest.fixture
def refused(script, capsys):
    """Returns refuse(*argv) -> the one line on stderr, after checking that it is one and that the status is
    2."""
    def refuse(*argv, **more):
        with pytest.raises(SystemExit) as stop:
            script(*argv, **more)
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ''
        assert captured.err.startswith('error: ') and captured.err.count('\n') == 1
        return captured.err
    return refuse

def config(name, text):
    with open(os.path.join('config', name), 'w', encoding='utf-8') as f:
        f.write(text)
    return 'config/' + name

@pytest.mark.parametrize('flag, value', [
    ('--batch_size=2', 2),
    ('--batch-size=2', 2),
    ('--batch_size=1e4', 10_000),
    ('--batch_size=4096.0', 4096),
    ('--batch_size=100_000', 100_000), ('--batch_size=-1', -1), ('--learning_rate=1', 1.0),
    ('--learning_rate=1e-3', 1e-3),
    ('--learning_rate=inf', float('inf')),
    ('--compile', True),
    ('--compile=ON', True),
    ('--compile=yes', True),
    ('--compile=1', True),
    ('--compile=False', False),
    ('--dataset=1e4', '1e4'),
    ('--dataset=', ''),
    ('--dataset=a=b=c', 'a=b=c'),
    ('--dataset=[1]', '[1]'),
    ('--dtype=None', 'None'),
    ('--device=cuda:0', 'cuda:0'), ('--device=none', None), ('--device=3', 3),
])
def test_flag_keeps_the_type(script, flag, value):
    name = flag.strip('-').split('=')[0].replace('-', '_')
    overrides, after = script(flag)
    assert overrides == {name: value} and type(overrides[name]) is type(value)
    assert after[name] == value and type(after[name]) is type(value)

@pytest.mark.parametrize('flag, words', [
    ('--lerning_rate=3', "unknown setting 'lerning_rate' (did you mean --learning_rate?)"),
    ('--later=3', "unknown setting 'later'"),
    ('--_hidden=3', 'unknown setting'),
    ('--UPPER=3', 'unknown setting'),
    ('--betas=3', 'unknown setting'), ('--inputs=3', 'unknown setting'),
    ('--batch_size=1.5', 'whole number'),
    ('--batch_size=inf', 'whole number'),
    ('--batch_size=1e999', 'whole number'),
    ('--batch_size=nan', 'nan'), ('--batch_size=', 'whole number'), ('--batch_size=two', "'two'"),
    ('--batch_size=True', 'whole number'),
    ('--learning_rate=nan', 'nan'),
    ('--learning_rate=x', 'number'), ('--learning_rate=1e400', 'larger than any'),
    ('--batch_size=9223372036854775808', 'below 2**63'), ('--dataset=a\0b', 'NUL'),
    ('--learning_rate=' + '1' * 400, 'a number'),
    ('--compile=maybe', 'true or false'),
    ('--compile=2', 'true or false'),
    ('--dataset', '--dataset=value'),
    ('-batch_size=2', '--name=value'), ('batch_size=2', '--batch_size=2'), ('--', '--name=value'),
])
def test_flag_refused(refused, flag, words):
    assert words in refused(flag)

def test_value_after_a_space_is_refused(refused):
    assert 'write --batch_size=2' in refused('--batch_size', '2')
    assert 'write --compile=false' in refused('--compile', 'false')

def test_file_and_flags_in_order(script):
    path = config('a.py', 'import math\nfrom pathlib import Path\n_n = 50\nmax_iters = 10 * _n\n'
                          'lr_decay_iters = max_iters\nbatch_size = int(math.sqrt(batch_size * 3))\n'
                          'assert Path(__file__).name == "a.py"\ndef f(): return batch_size\nlearning_rate = f()\n')
    overrides, after = script('--batch_size=27', '--max_iters=1', path, '--lr_decay_iters=7')
    assert overrides == {'batch_size': 9, 'max_iters': 500, 'lr_decay_iters': 7, 'learning_rate': 9.0}
    assert type(after['learning_rate']) is float and after['max_iters'] == 500

def test_explicit_even_if_equal_to_the_default(script, capsys):
    overrides, _ = script(config('a.py', 'batch_size = 12\n'), '--learning_rate=6e-4')
    assert overrides == {'batch_size': 12, 'learning_rate': 6e-4}
    assert capsys.readouterr().out == ''

@pytest.mark.parametrize('text, words', [
    ('\nlerning_rate = 3\n', "config/a.py:2: unknown setting 'lerning_rate' (did you mean --learning_rate?)"),
    ('batch_size = "3"\n', 'config/a.py:1: batch_size: expected a whole number'),
    ('batch_size = True\n', 'whole number'), ('batch_size = 2.5\n', 'whole number'),
    ('learning_rate = float("nan")\n', 'nan'), ('learning_rate = "1e-3"\n', 'a number'),
    ('dataset = 3\n', 'a string'),
    ('compile = "yes"\n', 'true or false'),
    ('batch_size = None\n', 'whole number'),
    ('x = 1\n_y = 1 / 0\n', 'config/a.py:2: ZeroDivisionError: division by zero'),
    ('batch_size = = 2\n', 'config/a.py:1: SyntaxError'),
    ('import no_such_module_at_all\n', 'config/a.py:1: Module'),
])
def test_file_refused(refused, text, words):
    assert words in refused(config('a.py', text))

def test_missing_file_names_the_nearest(refused):
    config('train_gpt.py', ''), config('sample.py', '')
    assert os.path.join('config', 'train_gpt.py') in refused('config/trian_gpt.py')
    assert os.path.join('config', 'train_gpt.py') in refused('train_gpt')
    open('notes.txt', 'w').close()
    assert 'ends in .py' in refused('notes.txt')

def test_prints_what_differs_aligned_once(script, capsys, monkeypatch):
    script('--batch_size=2', '--learning_rate=1', '--max_iters=1000')
    assert capsys.readouterr().out == 'batch_size    = 2\nlearning_rate = 1.0\n'
    script()
    assert capsys.readouterr().out == ''
    monkeypatch.setenv('RANK', '1')
    script('--batch_size=2')
    assert capsys.readouterr().out == ''

def test_inputs(script, refused, capsys):
    overrides, after = script('a.txt', '--batch_size=2', 'b', positional='inputs')
    assert after['inputs'] == ['a.txt', 'b'] and overrides == {'batch_size': 2}
    capsys.readouterr()
    assert 'unexpected' in refused('a.txt', positional=None)

def test_help_is_read_from_the_source(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script('--batch_size=2', '--help')
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'Does a thing.'
    rows = {line.split()[0]: line for line in lines if line.strip().startswith('--')}
    assert list(rows) == ['--dataset', '--batch_size', '--learning_rate', '--max_iters', '--lr_decay_iters',
                          '--compile', '--device', '--dtype']
    assert rows['--batch_size'].split(None, 2)[1:] == ['12', 'sequences at once, fewer if memory is short']
    assert rows['--max_iters'].endswith('-1 is never')
    assert lines.index('data:') < lines.index(rows['--dataset']) < lines.index('optimizer:') \
        < lines.index(rows['--learning_rate'])
    assert len({rows[name].index(rows[name].split()[1]) for name in rows}) == 1

def test_fail_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        fail('first\nsecond')
    assert stop.value.code == 2 and capsys.readouterr().err == 'error: first second\n'

def test_require_names_the_first_setting_that_is_wrong(capsys):
    settings = dict(batch_size=0, seed=-1, dataset='mine')
    require(settings, {'any': dict(batch_size=True, dataset=True), 'none': {}})
    assert capsys.readouterr() == ('', '')
    with pytest.raises(SystemExit) as stop:
        require(settings, {'a name': dict(dataset=True), '0 or more': dict(batch_size=True, seed=False),
                           '1 or more': dict(batch_size=False)})
    assert stop.value.code == 2 and capsys.readouterr().err == 'error: seed=-1 must be 0 or more\n'

@pytest.mark.parametrize('text, parts', [
    ('', ['']),
    ('a', ['a']),
    (' a,b ,', [' a', 'b ', '']),
    (r'a\,b,c', ['a,b', 'c']),
    (r'a\\,b', [r'a\\', 'b']),
    (r'a\\\,b', [r'a\\,b']),
    (r'C:\runs\a,\\host\b', [r'C:\runs\a', r'\\host\b']),
    ('a\\', ['a\\']),
    ('a\nb,\\\n', ['a\nb', '\\\n']),
])
def test_a_list_may_hold_its_separator(text, parts):
    assert split_list(text, ',') == parts
    assert split_list(text.replace(',', '|'), '|') == [part.replace(',', '|') for part in parts]

def test_a_recipe_is_found_beside_the_script_too(script, refused, tmp_path, monkeypatch, capsys):
    config('a.py', 'batch_size = 3\n')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert script('config/a.py')[0] == {'batch_size': 3}
    capsys.readouterr()
    where = f'neither here nor in {tmp_path}'
    assert refused('config/b.py') == f'error: config/b.py: no such config file, {where}, did you mean config/a.py?\n'
    for path in ('a.py', '../config/../elsewhere/a.py', 'config/../../elsewhere/b.py'):
        assert 'neither' not in refused(path)
    os.mkdir('config')
    config('a.py', 'batch_size = 4\n')
    assert script('config/a.py')[0] == {'batch_size': 4}        # the one here goes before
    capsys.readouterr()
    assert refused(config('bad.py', 'x = 1\n')).startswith('error: config/bad.py:1: unknown setting')
    os.remove('config/a.py')
    os.mkdir('config/a.py')
    assert 'a folder, no config file' in refused('config/a.py')


def test_as_a_program(tmp_path):
    source = SCRIPT.replace('if False', 'if True') + 'print(batch_size)\n'
    (tmp_path / 'script.py').write_text(source, encoding='utf-8')
    env = {**os.environ, 'PYTHONPATH': ROOT}

    def run(*argv):
        command = [sys.executable, 'script.py', *argv]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    wrong = run('--batch_sise=3')
    assert wrong.returncode == 2 and wrong.stdout == ''
    assert wrong.stderr == "error: --batch_sise=3: unknown setting 'batch_sise' (did you mean --batch_size?)\n"
    right = run('--batch_size=3')
    assert right.returncode == 0 and right.stdout == 'batch_size = 3\n3\n'


@pytest.mark.parametrize('head, encoding', [('', 'utf-8-sig'), ('', 'utf-16'), ('# coding: cp1252\n', 'cp1252'),
                                            ('#!/usr/bin/python\n# -*- coding: koi8-r -*-\n', 'koi8-r')])
def test_configs_of_every_encoding(script, head, encoding):
    name = 'даты' if encoding == 'koi8-r' else 'Größe'
    with open(os.path.join('config', 'other.py'), 'wb') as f:
        f.write(f"{head}dataset = '{name}'\r\n".encode(encoding))
    assert script('config/other.py')[0]['dataset'] == name


def test_a_config_of_no_encoding(refused):
    with open(os.path.join('config', 'other.py'), 'wb') as f:
        f.write("batch_size = 3\ndataset = 'Größe'\n".encode('cp1252'))
    assert refused('config/other.py') == \
        'error: config/other.py:2: SyntaxError: not utf-8, in which Python files are: save it so\n'
