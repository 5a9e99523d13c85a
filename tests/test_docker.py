"""Dockerfile: what it copies is there, its commands are sound, the page is for who knows a key. There need be no Docker
here: its commands are run as they stand, with programs that only write down what they are told."""
import fnmatch
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading

import pytest
from helpers.runs import ROOT

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='commands of a POSIX shell')
SPY = '''#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
[ -z "$MAMBINO_API_KEY" ] || echo "key $MAMBINO_API_KEY" >> "$LOG"
'''


def read(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read()


def instructions():
    """[(its name, its arguments), …] of the Dockerfile."""
    text = re.sub(r'^#.*\n', '', read('Dockerfile'), flags=re.M).replace('\\\n', ' ')
    return [tuple(line.split(None, 1)) for line in text.split('\n') if line.strip()]


def arguments_of(name):
    return [arguments for instruction, arguments in instructions() if instruction == name]


@pytest.fixture
def shell(tmp_path):
    """shell(command, **environment) → (status, what it said, what pip, apt-get, … were told)"""
    for name in ('pip', 'mambino', 'apt-get', 'rm', 'useradd', 'install'):
        (tmp_path / name).write_text(SPY)
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'python').symlink_to(sys.executable)

    def shell(command, **environment):
        log = tmp_path / 'log'
        log.write_text('')
        env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'LOG': str(log), **environment}
        done = subprocess.run(['sh', '-c', command], cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, log.read_text()
    return shell


def test_its_order():
    names = [name for name, _ in instructions()]
    assert names[:2] == ['FROM', 'ARG'] and names.index('USER') > max(i for i, n in enumerate(names) if n == 'RUN')
    assert arguments_of('USER') == ['mambino'] and arguments_of('VOLUME') == arguments_of('WORKDIR')[-1:] == ['/work']
    port, = re.findall(r'^port = (\d+)', read('serve.py'), re.M)
    assert arguments_of('EXPOSE') == [port] and f"'127.0.0.1', {port}" in arguments_of('HEALTHCHECK')[0]


def test_what_it_copies_is_there():
    ignored = [line for line in read('.dockerignore').split('\n') if line and line[0] not in '#!']
    assert not [line for line in ignored if line.startswith(('config', 'mambino', 'docs'))]
    needed = ['requirements.txt', 'pyproject.toml', 'README.md', 'LICENSE', '.ci/metadata.py', 'config', 'serve.py',
              'mambino']
    for path in [*needed, *(word for line in arguments_of('COPY') for word in line.split()[:-1])]:
        assert os.path.exists(os.path.join(ROOT, path)), path
        assert not any(fnmatch.fnmatch(path, pattern) for pattern in ignored), path
    assert {'.git', 'out*', '.mambino-token', 'data/*'} <= set(ignored)


@pytest.mark.parametrize('torch, told', [
    ('cpu', 'pip install --no-cache-dir torch=={} --index-url https://download.pytorch.org/whl/cpu\n'),
    ('cuda', 'pip install --no-cache-dir torch=={}\n'),
    ('gpu', ''),
])
def test_which_torch(shell, torch, told):
    command, = (line for line in arguments_of('RUN') if 'TORCH' in line)
    status, said, log = shell(command, TORCH=torch)
    version, = re.findall(r'^torch==(\S+)', read('requirements.txt'), re.M)
    assert log == told.format(version) and status == (0 if told else 2)
    assert told or said == 'TORCH=gpu: it is cpu or cuda\n'
    assert arguments_of('ARG') == ['TORCH=cpu']


def test_its_other_commands(shell):
    for command in arguments_of('RUN'):
        if 'TORCH' not in command:
            assert shell(command)[0] == 0, command
    extras, = re.findall(r"'\.\[(.*)\]'", read('Dockerfile'))
    groups = read('pyproject.toml').partition('[dependency-groups]')[2]
    assert all(re.search(rf'^{extra} = \[', groups, re.M) for extra in extras.split(','))


def test_it_opens_with_the_page_and_a_key(shell):
    command, = arguments_of('CMD')
    status, said, log = shell(command)
    key, = re.fullmatch(r'MAMBINO_API_KEY=([\w-]{32,})\n', said).groups()
    assert status == 0 and log == f'mambino serve --host=0.0.0.0\nkey {key}\n'
    assert shell(command)[1] != said                                # another one each time
    status, said, log = shell(command, MAMBINO_API_KEY='of its owner')
    assert said == '' and log.endswith('key of its owner\n')        # which is not told


def test_its_health():
    """Well as soon as it answers, with a model or without one; not where it is broken, or not there."""
    command = json.loads(arguments_of('HEALTHCHECK')[0].partition('CMD ')[2])
    statuses = [200, 503, 500]
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(statuses[len(asked) - 1])
            self.end_headers()

        def log_message(self, *arguments):
            pass
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = command[2].replace('8000', str(server.server_port))

    def is_well():
        return not subprocess.run([sys.executable, *command[1:2], code], capture_output=True).returncode
    assert command[0] == 'python' and [is_well() for _ in statuses] == [True, True, False]
    assert asked == ['/health'] * 3
    server.shutdown()
    server.server_close()
    assert not is_well()


def test_what_its_head_says_to_type():
    """The commands in its comments are docker's, and begin one of ours."""
    for line in re.findall(r'^#   (docker .*?)(?:  +#.*)?$', read('Dockerfile'), re.M):
        words = shlex.split(line)
        assert words[1] in ('build', 'run') and 'mambino' in words
