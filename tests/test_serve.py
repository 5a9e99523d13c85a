"""serve.py as a process: how it starts, what it refuses, how it ends."""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip('fastapi')
pytest.importorskip('uvicorn')

from helpers.runs import POSIX, ROOT, cut
from helpers.served import wait_until

PATIENCE = 60           # seconds until something that must come is given up


class Process:
    """serve.py in a folder; what it prints is read line by line."""

    def __init__(self, folder, *flags, before='', key=''):
        code = (f'{before}\nimport runpy, sys; sys.argv = sys.argv[1:]; '
                'runpy.run_path(sys.argv[0], run_name="__main__")')
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT, 'PYTHONIOENCODING': 'utf-8'}
        environment['MAMBINO_API_KEY'] = key
        command = [sys.executable, '-c', code, os.path.join(ROOT, 'serve.py'), '--device=cpu', *flags]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, encoding='utf-8')
        self.lines = []
        self.errors = []
        self.readers = [threading.Thread(target=self.read, args=parts, daemon=True)
                        for parts in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))]
        for reader in self.readers:
            reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def read(self, stream, lines):
        for line in stream:
            lines.append(line.rstrip('\n'))

    def said(self, pattern):
        """The match of a pattern in what it has printed, which is waited for."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if match := re.search(pattern, '\n'.join([*self.lines, *self.errors])):
                return match
            assert self.process.poll() is None, self.errors
            time.sleep(0.02)
        raise AssertionError(f'{pattern} was not said: {self.lines} {self.errors}')

    def end(self, number=None):
        """Its status, after this signal."""
        if number:
            self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        for reader in self.readers:
            reader.join()
        return status

    @property
    def url(self):
        return self.said(r'API +(http://\S+)/v1')[1]

    def get(self, path, data=None, headers=None):
        """→ (status, text)."""
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def refused(folder, *flags, **options):
    """The one line with which it ends at once, with status 2."""
    with Process(folder, *flags, **options) as server:
        assert server.end() == 2, server.errors
        assert len(server.errors) == 1 and server.errors[0].startswith('error: '), server.errors
        return server.errors[0]


@pytest.fixture(scope='module')
def folder(trained_runs, tmp_path_factory):
    """With the runs bpe/ and char/."""
    folder = tmp_path_factory.mktemp('serve')
    for name in ('bpe', 'char'):
        shutil.copytree(trained_runs / name, folder / name)
    return folder


@pytest.fixture(scope='module')
def api(folder):
    """A server of the API alone."""
    no_page = 'import sys; sys.modules["nicegui"] = None'
    with Process(folder, '--page=false', '--port=0', '--out_dir=bpe', before=no_page) as server:
        server.said('loaded +bpe')
        yield server


# --- the start ------------------------------------------------------------------------------------

def test_it_says_all_that_one_needs(api, folder):
    port = int(api.url.rpartition(':')[2])
    assert port > 0 and api.said(r'model +bpe; .*char') and api.said(r'key +none') and api.said(r'rows +16')
    command = api.said(r'try +(curl .*)')[1]
    assert f'127.0.0.1:{port}/v1/completions' in command
    assert not any('token=' in line for line in api.lines) and not os.path.exists(folder / '.mambino-token')
    if shutil.which('curl'):
        said = subprocess.run(command + ' -s', shell=True, capture_output=True, text=True, timeout=PATIENCE).stdout
        assert json.loads(said)['choices'][0]['text']


def test_it_answers(api):
    assert api.get('/health') == (200, '{"status":"ok"}')
    status, text = api.get('/v1/completions', b'{"prompt": "e", "max_tokens": 2}')
    assert status == 200 and json.loads(text)['model'] == 'bpe'
    assert api.get('/generate')[0] == 404 and json.loads(api.get('/generate')[1])['error']


def test_a_port_in_use_is_told_with_one_that_is_not(api):
    port = int(api.url.rpartition(':')[2])
    error = refused(os.getcwd(), '--page=false', f'--port={port}')
    other = int(re.search(r'--port=(\d+) is free', error)[1])
    assert f'port={port}: is in use' in error and other != port


@pytest.mark.parametrize('flags, words', [
    ('--host=0.0.0.0', 'needs --api_key'), ('--host=:: --page=false', 'needs --api_key'),
    ('--host=no.such.host.example --api_key=k', 'host=no.such.host.example'), ('--port=70000', 'from 0 to 65535'),
    ('--out_dir=bqe', 'bpe'), ('--rows=0', 'from 1 to 256'), ('--adapters=char', '--out_dir'),
    ('--cors_origin=*', 'api_key'), ('--max_body=1e5', 'at most 10000'), ('--timeout=0', 'above 0'),
    ('--quantize=int3', 'int8'), ('--api_key=a\nb', 'printed'),
])
def test_what_cannot_be_is_told_in_a_line(folder, flags, words):
    assert words in refused(folder, *flags.split(' '))


@pytest.mark.parametrize('missing, flags', [
    ('fastapi', '--page=false'), ('uvicorn', '--page=false'), ('nicegui', ''),
])
def test_a_package_that_is_missing_is_told_with_how_to_get_it(folder, missing, flags):
    error = refused(folder, *filter(None, [flags]), before=f'import sys; sys.modules["{missing}"] = None')
    assert f'{missing} is not installed: pip install fastapi uvicorn nicegui' in error


def test_a_damaged_model_that_was_named_ends_it_in_a_line(folder, tmp_path):
    shutil.copytree(folder / 'bpe', tmp_path / 'bpe')
    for name in os.listdir(tmp_path / 'bpe'):
        if name.endswith('.pt'):
            cut(tmp_path / 'bpe' / name)
    error = refused(tmp_path, '--page=false', '--port=0', '--out_dir=bpe')
    assert 'not a readable checkpoint' in error
    shutil.copytree(folder / 'char', tmp_path / 'char')
    now = time.time() + 10
    for name in os.listdir(tmp_path / 'bpe'):
        os.utime(tmp_path / 'bpe' / name, (now, now))
    with Process(tmp_path, '--page=false', '--port=0') as server:       # it is the latest, and the other one answers
        server.said('note: .*not a readable checkpoint')
        status, text = server.get('/v1/completions', b'{"prompt": "e"}')
        assert status == 503 and 'not a readable checkpoint' in json.loads(text)['error']['message']
        assert server.get('/v1/completions', b'{"prompt": "e", "model": "char", "max_tokens": 1}')[0] == 200


def test_without_a_model_the_page_opens_and_the_api_says_so(tmp_path):
    pytest.importorskip('nicegui')
    with Process(tmp_path, '--port=0') as server:
        address = server.said(r'page +(http://\S+)')[1]
        server.said('model +none yet')
        assert server.get('/')[0] == 401
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(address, timeout=PATIENCE) as response:
            assert response.status == 200 and 'token=' not in response.url
        assert opener.open(server.url + '/generate', timeout=PATIENCE).status == 200
        status, text = server.get('/v1/completions', b'{"prompt": "e"}')
        assert status == 404 and 'train one' in json.loads(text)['error']['message']
        for path, data, expected in (('/v1/embeddings', b'{}', 404), ('/v1/completions', None, 405)):
            status, text = server.get(path, data)           # no page of the page's
            assert status == expected and json.loads(text)['error']['type'] == 'invalid_request_error'
        assert server.get('/health') == (503, '{"status":"no model"}')
        assert json.loads(server.get('/v1/models')[1])['data'] == []


# --- the end --------------------------------------------------------------------------------------

@POSIX
@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_what_is_answered_and_then_the_server(folder, number, status):
    flags = ['--page=false', '--port=0', '--out_dir=bpe', '--host=0.0.0.0']
    by_flag = number == signal.SIGINT                       # else it is in the environment
    with Process(folder, *flags, *['--api_key=secret'] * by_flag, key='' if by_flag else 'secret') as server:
        server.said('loaded +bpe')
        assert server.said('key +needed') and not any('secret' in line for line in server.lines)
        assert server.get('/v1/models')[0] == 401
        key = {'Authorization': 'Bearer secret', 'Host': 'any.example'}
        assert server.get('/v1/models', headers=key)[0] == 200
        host = server.url.removeprefix('http://')
        wire = http.client.HTTPConnection(host, timeout=PATIENCE)
        body = dict(prompt='e', max_tokens=4000, stream=True, ignore_eos=True)
        wire.request('POST', '/v1/completions', json.dumps(body), key)
        response = wire.getresponse()
        assert response.readline().startswith(b'data: ')
        began = time.monotonic()
        server.process.send_signal(number)
        events = [line[6:] for line in response.read().split(b'\n') if line.startswith(b'data: ')]
        assert server.end() == status
        assert time.monotonic() - began < 5
        assert events[-1] == b'[DONE]'
        reasons = [choice['finish_reason'] for event in events[:-1] for choice in json.loads(event).get('choices', ())]
        assert reasons[-1]
        assert not any('Traceback' in line for line in server.errors)


@POSIX
def test_a_server_that_was_killed_starts_again_with_the_same_token_and_port(folder):
    pytest.importorskip('nicegui')
    with Process(folder, '--port=0') as server:
        address = server.said(r'page +(http://\S+)')[1]
        assert server.get('/health')[0] in (200, 503)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    port = re.search(r':(\d+)/', address)[1]
    with Process(folder, f'--port={port}') as server:
        assert server.said(r'page +(http://\S+)')[1] == address
        assert server.end(signal.SIGTERM) == 0
        assert not server.errors


# --- connections ----------------------------------------------------------------------------------

@pytest.fixture
def connected(monkeypatch):
    """connected(bytes) → what a server sends back until it closes the connection."""
    from mambino.serve import listening
    monkeypatch.setattr(listening, 'HEAD_SECONDS', 0.3)
    monkeypatch.setattr(listening, 'WRITE_SECONDS', 0.3)

    async def app(scope, receive, send):
        if scope['type'] == 'http':
            body = b'much' * (4 << 20) if scope['path'] == '/much' else b'ok'
            length = str(len(body)).encode()
            await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', length)]})
            await send({'type': 'http.response.body', 'body': body})

    door = listening.open_door('127.0.0.1', 0)
    address = door.getsockname()
    monkeypatch.setattr(listening, 'SIGNALS', ())
    server = listening.Server(app, lambda: None)
    thread = threading.Thread(target=server.run, args=(door,), daemon=True)
    thread.start()

    def connected(data, more=b''):
        with socket.create_connection(address, timeout=PATIENCE) as wire:
            wire.sendall(data)
            answer = b''
            while part := wire.recv(4096):
                answer += part
                if more:
                    wire.sendall(more)
                    more = b''
            return answer
    connected.address = address
    connected.server = server
    yield connected
    server.should_exit = True
    thread.join(PATIENCE)


@pytest.mark.parametrize('data', [b'', b'GET / HTTP/1.1\r\nHost: 127', b'G'])
def test_a_head_that_does_not_come_is_not_waited_for(connected, data):
    began = time.monotonic()
    assert connected(data) == b''
    assert time.monotonic() - began < 10


def test_nor_is_a_second_one(connected):
    head = b'GET / HTTP/1.1\r\nHost: localhost\r\n'
    assert connected(head + b'\r\n', more=head).count(b'HTTP/1.1 200') == 1


@pytest.mark.parametrize('data', [b'\x16\x03\x01\x02\x00\x01\x00\n\r\n\r\n', b'GET\r\n\r\n', b'a: b\r\n\r\n',
                                  b'GET / HTTP/1.1\r\n\r\n', b'GET / HTTP/1.1\r\nHost: a\r\nx: ' + b'y' * 100_000])
def test_what_is_no_http_is_a_400_in_the_shape_of_errors(connected, data):
    head, _, body = connected(data).partition(b'\r\n\r\n')
    assert head.startswith(b'HTTP/1.1 400')
    assert json.loads(body)['error']['type'] == 'invalid_request_error'


def test_who_takes_nothing_is_not_waited_for(connected):
    with socket.create_connection(connected.address, timeout=PATIENCE) as wire:
        wire.sendall(b'GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n')
        wait_until(lambda: connected.server.server_state.connections)
        wait_until(lambda: not connected.server.server_state.connections)


def test_who_takes_it_slowly_gets_it_all(connected):
    size = 0
    with socket.create_connection(connected.address, timeout=PATIENCE) as wire:
        wire.sendall(b'GET /much HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
        while part := wire.recv(1 << 20):
            size += len(part)
            time.sleep(0.05)
    assert size > 16 << 20
