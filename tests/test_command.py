"""What pip install . makes: a wheel with every file in its place, and in any folder the command mambino."""
import email
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from helpers.runs import ROOT, wait_for_lines, write_text
from test_house import SCRIPTS, tracked

TINY = '--n_layer=1 --n_embd=32 --block_size=32 --batch_size=2 --tokens_per_step=64 --device=cpu --dtype=float32'


def command(*words, folder=None, **environment):
    """Runs a command; returns what it did, with what it said as text."""
    env = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'MAMBINO_COMMAND')}
    return subprocess.run(words, cwd=folder, env={**env, 'OMP_NUM_THREADS': '1', **environment}, capture_output=True,
                          text=True, encoding='utf-8')


def build(source, target):
    """The wheel of a folder's sources, made without a network."""
    pytest.importorskip('hatchling')
    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '--quiet', '--no-index', '--no-deps')
    done = command(*pip, '--no-build-isolation', '--wheel-dir', str(target), str(source))
    assert done.returncode == 0, done.stderr
    wheel, = target.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def mambino(wheel, tmp_path_factory):
    """mambino(words, folder) → what the installed command did. Its environment sees the packages of this one."""
    home = tmp_path_factory.mktemp('environment')
    assert command(sys.executable, '-m', 'venv', '--without-pip', str(home)).returncode == 0
    scripts = home / ('Scripts' if os.name == 'nt' else 'bin')
    python = str(scripts / 'python')
    packages = command(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip()
    with open(os.path.join(packages, 'others.pth'), 'w', encoding='utf-8') as f:
        for path in dict.fromkeys((sysconfig.get_path('purelib'), sysconfig.get_path('platlib'))):
            f.write(f'import site; site.addsitedir({path!r})\n')
    pip = (python, '-m', 'pip', '--disable-pip-version-check')          # that of this environment, for the new one
    done = command(*pip, 'install', '--quiet', '--no-index', '--no-deps', '--no-compile', str(wheel))
    assert done.returncode == 0, done.stderr

    def mambino(words, folder, **environment):
        return command(str(scripts / 'mambino'), *shlex.split(words), folder=folder, **environment)
    mambino.python, mambino.packages, mambino.program = python, packages, str(scripts / 'mambino')
    return mambino


def test_every_file_is_in_its_place(wheel):
    """Once: nothing of the package is left out, and no name at the top but ours."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if '.dist-info/' not in name]
    wanted = {path for path in tracked('mambino', 'model_*.py')}
    wanted |= {f'mambino/scripts/{path}' for path in tracked('config/*.py', *(f'{name}.py' for name in SCRIPTS))}
    assert len(names) == len(set(names)) and set(names) == wanted
    assert 'mambino/prepare/texts/letters.txt' in names and 'mambino/scripts/config/quick.py' in names


def test_what_it_requires_stands_in_one_place(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name, = (name for name in archive.namelist() if name.endswith('METADATA'))
        about = email.message_from_bytes(archive.read(name))
    required = about.get_all('Requires-Dist')
    assert 'torch==2.13.0' in required and {'serve', 'export', 'test'} <= set(about.get_all('Provides-Extra'))
    assert any(line.startswith('fastapi') and "extra == 'serve'" in line for line in required)
    assert any(line.startswith('fastapi') and "extra == 'test'" in line for line in required)       # included there
    with open(os.path.join(ROOT, 'requirements.txt'), encoding='utf-8') as f:
        assert sum('extra' not in line for line in required) == sum(line[0] not in '#\n' for line in f)


def test_a_source_archive_makes_the_same_wheel(wheel, tmp_path):
    done = command(sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', str(tmp_path), folder=ROOT)
    assert done.returncode == 0, done.stderr
    archive, = tmp_path.glob('*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    folder, = (path for path in tmp_path.iterdir() if path.is_dir())
    again = build(folder, tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {(entry.filename, entry.CRC) for entry in one.infolist()} == {
            (entry.filename, entry.CRC) for entry in other.infolist()}


@pytest.mark.slow
def test_from_files_to_an_export_in_another_folder(mambino, tmp_path):
    write_text(tmp_path / 'mine.txt')
    done = mambino('prepare mine.txt --tokenizer=char --out=data/mine', tmp_path)
    assert done.returncode == 0 and 'now: mambino train --dataset=mine' in done.stdout, done.stderr
    done = mambino(f'train config/quick.py --dataset=mine --max_iters=3 --state_size=8 {TINY}', tmp_path)
    assert done.returncode == 0 and (tmp_path / 'out-quick' / 'ckpt.pt').exists(), done.stderr
    assert "optimizer       = 'muon'" in done.stdout and 'mambino sample --out_dir=out-quick' in done.stdout
    done = mambino('sample --out_dir=out-quick --max_new_tokens=5 --device=cpu', tmp_path)
    assert done.returncode == 0, done.stderr
    done = mambino('export --out_dir=out-quick --format=safetensors', tmp_path)
    assert done.returncode == 0 and (tmp_path / 'out-quick-safetensors').is_dir(), done.stderr
    assert sorted(os.listdir(tmp_path)) == ['data', 'mine.txt', 'out-quick', 'out-quick-safetensors']


def test_a_recipe_of_this_folder_goes_before(mambino, tmp_path):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'quick.py').write_text('max_iters = 7\nno_such = 1\n')
    done = mambino('train config/quick.py', tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: config/quick.py:2: unknown setting 'no_such'")
    done = mambino('train config/quik.py', tmp_path)
    where = os.path.join(mambino.packages, 'mambino', 'scripts')
    assert done.returncode == 2 and done.stderr == (
        f'error: config/quik.py: no such config file, neither here nor in {where}, did you mean config/quick.py?\n')


@pytest.mark.slow
def test_what_it_says_of_itself(mambino, tmp_path):
    from mambino import __version__
    for words in ('', '--help', 'help'):
        done = mambino(words, tmp_path)
        assert done.returncode == 0 and all(f'\n  {name} ' in done.stdout for name in SCRIPTS)
        assert max(map(len, done.stdout.split('\n'))) <= 100
    assert mambino('--version', tmp_path).stdout == f'mambino {__version__}\n'
    done = mambino('trian', tmp_path)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr == "error: unknown command 'trian' (did you mean train?); mambino alone lists them\n"
    for name in SCRIPTS:
        done = mambino(f'{name} --help', tmp_path)
        assert done.returncode == 0 and f'\nusage: mambino {name} [' in done.stdout
        assert f'python {name}.py' not in done.stdout and f'node=2 {name}.py' not in done.stdout
        done = mambino(f'{name} --no_such=1', tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: --no_such=1: unknown setting")
    done = command(mambino.python, '-m', 'mambino', 'sample', '--out_dir=none', folder=tmp_path)
    assert done.returncode == 2 and 'train one with: mambino train' in done.stderr, done.stderr


def test_no_name_of_a_script_is_taken_from_others(mambino, tmp_path):
    code = ('import importlib.util as u; print(*(u.find_spec(name) is not None for name in '
            '["model_gpt", "model_mamba", "model_hybrid", "mambino.weights", "train", "config", "prepare", "serve"]))')
    done = command(mambino.python, '-c', code, folder=tmp_path)
    assert done.stdout.split() == ['True'] * 4 + ['False'] * 4


@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
def test_ctrl_c_ends_it_as_it_ends_a_script(mambino, tmp_path):
    write_text(tmp_path / 'mine.txt')
    assert mambino('prepare mine.txt --tokenizer=char --out=data/mine', tmp_path).returncode == 0
    words = shlex.split(f'train --model=gpt --max_iters=1000000 --log_interval=1 {TINY}')
    process = subprocess.Popen([mambino.program, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    wait_for_lines(process, 2, tmp_path / 'out' / 'metrics.jsonl')
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in error, said + error
    assert (tmp_path / 'out' / 'ckpt.pt').exists() and 'to go on: mambino train --init_from=resume' in said


def test_the_server_starts_the_scripts_that_were_installed_with_it(mambino, tmp_path):
    code = 'from mambino.serve import launch, recipes; print(launch.script_path("train.py"), *recipes.recipes())'
    done = command(mambino.python, '-c', code, folder=tmp_path)
    where = os.path.join(mambino.packages, 'mambino', 'scripts')
    script, *recipes = done.stdout.split()
    assert script == os.path.join(where, 'train.py')
    assert os.path.join(where, 'config', 'finetune_chat.py') in recipes


def test_in_a_checkout_it_runs_the_scripts_that_are_there(tmp_path):
    done = command(sys.executable, '-m', 'mambino', 'train', '--help', PYTHONPATH=ROOT, folder=tmp_path)
    assert done.returncode == 0 and 'usage: mambino train [config/file.py ...]' in done.stdout, done.stderr
