"""A server in a thread of this process, on a port that the system chooses, with the runs of a folder.

    with serving(folder, out_dir='bpe') as server:
        server.client().completions.create(model='bpe', prompt='e')     # by the openai package
        server.post('/v1/completions', prompt='e')                      # (status, headers, the JSON that came)
        server.scheduler('bpe').stats()['rows_used']
        with server.socket() as wire: ...                               # bare bytes

A test of it is skipped where FastAPI is not installed.
"""
import contextlib
import http.client
import json
import os
import shutil
import socket
import threading
import time

import pytest
import torch

from helpers.sampling import open_run
from mambino import chat
from mambino.weights import checkpoint

HELLO = [dict(role='system', content='tin 12.'), dict(role='user', content='Bra nit?')]
PATIENCE = 20           # seconds until a condition holds, on the slowest machine


class Server:
    """See the top of the file."""

    def __init__(self, library, port, api_key):
        self.library = library
        self.port = port
        self.api_key = api_key
        self.url = f'http://127.0.0.1:{port}'

    def client(self, **options):
        """The client of the openai package."""
        openai = pytest.importorskip('openai')
        settings = dict(base_url=f'{self.url}/v1', api_key=self.api_key or 'none', timeout=60, max_retries=0)
        return openai.OpenAI(**{**settings, **options})

    def scheduler(self, name=''):
        """Of a model, which is loaded for it."""
        return self.library.get(name).scheduler

    def request(self, method, path, body=None, headers=None):
        """→ (status, headers, body in bytes). body: bytes, or what is sent as JSON."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        headers = dict(headers or {})
        if self.api_key:
            headers.setdefault('Authorization', f'Bearer {self.api_key}')
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault('Content-Type', 'application/json')
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, path, **body):
        """→ (status, headers, the JSON that came)."""
        status, headers, raw = self.request('POST', path, body)
        return status, headers, json.loads(raw)

    def get(self, path):
        """→ (status, headers, the JSON that came)."""
        status, headers, raw = self.request('GET', path)
        return status, headers, json.loads(raw)

    def socket(self):
        """A connection."""
        return socket.create_connection(('127.0.0.1', self.port), timeout=PATIENCE)

    def begin(self, path, **body):
        """A connection on which such a request is sent, and nothing was read yet."""
        wire = self.socket()
        raw = json.dumps(body).encode()
        head = f'POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n'
        if self.api_key:
            head += f'Authorization: Bearer {self.api_key}\r\n'
        wire.sendall(f'{head}Content-Length: {len(raw)}\r\n\r\n'.encode() + raw)
        return wire


def wait_until(holds, seconds=PATIENCE):
    """Waits for holds() to be true, and fails when it is not in that time; returns how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, 'waited in vain'
        time.sleep(0.005)
    return time.monotonic() - began


@contextlib.contextmanager
def serving(folder, out_dir='', room=None, limits=None, api_key='', cors_origin='', dtype='float32', memory=0.0):
    """A Server of the runs in a folder, on the CPU; it ends with the block. room, limits: see work.py and
    api.py."""
    pytest.importorskip('fastapi')
    from mambino.serve.api import Limits, make_app
    from mambino.serve.library import Library
    from mambino.serve.work import Room
    library = Library(str(folder), out_dir, 'cpu', dtype, '', '', memory, room or Room())
    app = make_app(library, limits or Limits(), api_key, cors_origin)
    with listening(app) as port:
        try:
            yield Server(library, port, api_key)
        finally:
            library.close()


@contextlib.contextmanager
def listening(app):
    """The port on which a thread serves this app."""
    uvicorn = pytest.importorskip('uvicorn')
    config = uvicorn.Config(app, host='127.0.0.1', port=0, log_level='warning', timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name='server', daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert thread.is_alive(), 'the server did not start'
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


# --- what is asked, and what comes of it ----------------------------------------------------------

def write_tuned():
    """The run tuned in the working directory: bpe with a chat template."""
    shutil.copytree('bpe', 'tuned')
    for name in os.listdir('tuned'):
        if name.endswith('.pt'):
            contents = checkpoint.load_checkpoint(f'tuned/{name}')
            contents['tokenizer']['config'] = dict(chat_template=chat.CHATML)
            checkpoint.save_checkpoint(f'tuned/{name}', contents)


def parts_of(stream):
    """{index: [text, finish_reason] that a stream comes to}, and no part of a character in it."""
    answers = {}
    for chunk in stream:
        for choice in chunk.choices:
            answer = answers.setdefault(choice.index, ['', None])
            new = choice.text if hasattr(choice, 'text') else choice.delta.content
            assert '\ufffd' not in (new or '')
            answer[0] += new or ''
            answer[1] = choice.finish_reason or answer[1]
    return answers


@torch.no_grad()
def logprobs_by_model(kind, ids):
    """(T − 1, V) of the ids behind the first."""
    net, tok = open_run(kind)
    return net.eval()(torch.tensor([ids]))[0][0].float().log_softmax(-1)[:-1, :]
