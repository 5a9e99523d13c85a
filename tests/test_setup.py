"""run.sh: which torch it has pip install, and that it says so; with a python that only writes down what it is told.
.ci/run: a browser, where one can be had."""
import os
import re
import shutil
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = '''#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
    *m.version*) [ -n "$INSTALLED" ] && echo "$INSTALLED" ;;
    *"config list"*) echo "$CONFIG"; seq 100000 || exit 1 ;;
    *whl/cpu*) exit "${INDEX:-0}" ;;
    *"pip install"*) exit "${PIP:-0}" ;;
esac
'''
HAS_CARD = os.path.exists('/dev/nvidia0') or os.path.exists('/proc/driver/nvidia/version')
linux = pytest.mark.skipif(os.uname().sysname != 'Linux' or HAS_CARD, reason='elsewhere there is one torch only'
                           ) if hasattr(os, 'uname') else pytest.mark.skip(reason='of POSIX')
CPU = '--index-url https://download.pytorch.org/whl/cpu'
VERSION = re.search(r'torch==([\d.]+)', open(os.path.join(ROOT, 'requirements.txt')).read())[1]


@pytest.fixture
def run(tmp_path):
    """run(name=value) → (exit status, what it says, what pip was told to install)"""
    for name in 'run.sh', 'requirements.txt', 'pyproject.toml':
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / 'bin').mkdir()
    for name, text in (('.venv/bin/python', PYTHON), ('bin/nvidia-smi', '#!/bin/sh\nexit ${CARD:-9}\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments, **settings):
        log = tmp_path / 'log'
        log.write_text('')
        env = {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'LOG': str(log), **settings}
        done = subprocess.run(['bash', 'run.sh', *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        told = [line.partition('check ')[2] for line in log.read_text().split('\n') if 'pip install' in line]
        return done.returncode, done.stdout + done.stderr, told

    run.folder = tmp_path
    run.log = tmp_path / 'log'
    return run


@linux
def test_no_cuda_where_no_card_is(run):
    code, said, told = run()
    assert code == 0 and told == [f'torch=={VERSION}+cpu {CPU}', '-r .venv/wanted.txt'] and '200 MB' in said
    assert run()[2] == []                       # all is there
    code, said, told = run(TORCH='cuda', INSTALLED=f'{VERSION}+cpu')
    assert told == [f'--force-reinstall --no-deps torch=={VERSION}', '-r .venv/wanted.txt'] and '3 GB' in said


@linux
def test_what_the_person_has_decided_holds(run):
    for settings, words in (
            ({'CARD': '0'}, 'for the NVIDIA card here: about 3 GB'),
            ({'CONFIG': "global.index-url='https://mirror/simple'"}, ''),
            ({'CONFIG': ":env:.find-links='/opt/wheels'"}, ''),
            ({'INSTALLED': VERSION}, ''), ({'INSTALLED': f'{VERSION}+cpu'}, ''), ({'TORCH': 'cuda'}, '')):
        code, said, told = run(**settings)
        assert code == 0 and told == ['-r .venv/wanted.txt'] and words in said, settings
        os.remove(run.folder / '.venv' / 'installed-core.txt')
    assert run(TORCH='cpu', CARD='0', CONFIG="global.index-url='x'", INSTALLED=VERSION)[2][0].endswith(CPU)
    code, said, told = run(TORCH='gpu')
    assert code == 2 and told == [] and 'error: TORCH=gpu: it is cpu or cuda' in said


@linux
def test_an_index_that_cannot_be_reached(run):
    code, said, told = run(INDEX='1')
    assert code == 0 and told[1:] == ['-r .venv/wanted.txt'] and "now pip's usual torch" in said
    code, said, told = run(INDEX='1', PIP='1', TORCH='cpu')
    assert code == 2 and 'Run the same command again to go on' in said


@linux
def test_the_page_in_one_line(run):
    """What it needs is installed, and then serve.py has the place of the shell, with the arguments."""
    code, said, told = run('serve', '--port=9', '--page=false', INSTALLED=VERSION)
    assert code == 0 and told == ['-r .venv/wanted.txt']
    assert run.log.read_text().split('\n')[-2] == 'serve.py --port=9 --page=false'
    assert (run.folder / '.venv' / 'installed-serve.txt').exists()
    assert run('serve', INSTALLED=VERSION)[2] == []             # all is there
    code, said, told = run('sreve')
    assert code == 2 and "unknown argument 'sreve'" in said and './run.sh serve' in said


@pytest.mark.skipif(os.name != 'posix', reason='of POSIX')
@pytest.mark.parametrize('user, fetched, is_there', [(0, True, False), (0, False, False), (1000, True, False),
                                                     (0, True, True)])
def test_a_browser_where_one_can_be_had(tmp_path, user, fetched, is_there):
    """Fetched by who may, without a word; the tests run in any case."""
    programs = {
        'id': f'echo {user}',
        'apt-get': 'echo noise; echo "$@" >> "$LOG"; case "$*" in *install*) ' + (
            'cp "$HERE/id" "$HERE/chromium"' if fetched else 'exit 100') + ';; esac',
    }
    if is_there:
        programs['chromium'] = 'exit 0'
    (tmp_path / '.ci').mkdir()
    shutil.copy(os.path.join(ROOT, '.ci', 'run'), tmp_path / '.ci')
    (tmp_path / 'bin').mkdir()
    for name, text in programs.items():
        (tmp_path / 'bin' / name).write_text(f'#!/bin/sh\n{text}\n')
    (tmp_path / 'run.sh').write_text('#!/bin/sh\necho "run.sh $*"; exit 7\n')
    for path in (tmp_path / 'run.sh', *(tmp_path / 'bin').iterdir()):
        path.chmod(0o755)
    for name in ('bash', 'sh', 'dirname', 'timeout', 'env', 'cp'):
        os.symlink(shutil.which(name), tmp_path / 'bin' / name)
    env = {'PATH': str(tmp_path / 'bin'), 'LOG': str(tmp_path / 'log'), 'HERE': str(tmp_path / 'bin')}
    done = subprocess.run([str(tmp_path / '.ci' / 'run')], env=env, capture_output=True, text=True)
    assert done.returncode == 7 and done.stdout == 'run.sh test\n'
    has_browser = is_there or (user == 0 and fetched)
    assert ('the page is not tested' in done.stderr) == (not has_browser)
    log = (tmp_path / 'log').read_text() if (tmp_path / 'log').exists() else ''
    assert ('install -y --no-install-recommends chromium' in log) == (user == 0 and not is_there)
