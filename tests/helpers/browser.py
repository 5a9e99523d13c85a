"""The server as a process of its own, and a Chromium that looks at its page.

    def test_it(page, server):              # fixtures of conftest.py; the folder has the runs char/ and bpe/
        page.goto(server.at('/generate'))
        page.get_by_test_id('prompt').fill('e')

    folder ──► serve.py, on a free port ──► Chromium ──► page: at the end of a test it has asked for nothing
                                                               but 127.0.0.1, and its console has no error
"""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--no-first-run']
PATIENCE = 30           # seconds until something that must come is given up
# of the console, what a server that goes away makes a browser say
BROKEN_OFF = ('ERR_CONNECTION', 'WebSocket connection', 'Failed to fetch', 'net::ERR_')


def free_port():
    """One that nobody listens at."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_for(condition, seconds=PATIENCE):
    """What condition() returns as soon as that is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, 'it has not come'
        time.sleep(0.05)
    return value


class Server:
    """serve.py in a folder."""

    def __init__(self, folder, *flags):
        self.folder = str(folder)
        self.flags = flags
        self.port = free_port()
        self.url = f'http://127.0.0.1:{self.port}'
        self.log = os.path.join(self.folder, 'server.log')
        self.process = None

    def start(self):
        """Starts it, and waits until it answers."""
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT, 'PYTHONIOENCODING': 'utf-8'}
        command = [sys.executable, os.path.join(ROOT, 'serve.py'), f'--port={self.port}', '--device=cpu', *self.flags]
        with open(self.log, 'a') as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        wait_for(self.answers, 90)
        return self

    def answers(self):
        """Whether it does; it must not have ended."""
        assert self.process.poll() is None, self.said()
        try:
            return urllib.request.urlopen(f'{self.url}/health', timeout=5).status == 200
        except urllib.error.HTTPError as error:
            return error.code != 503 or b'no model' in error.read()
        except OSError:
            return False

    def said(self):
        """All that it printed."""
        with open(self.log, encoding='utf-8') as f:
            return f.read()

    @property
    def token(self):
        """The page's secret; '' where there is none."""
        path = os.path.join(self.folder, '.mambino-token')
        if not os.path.exists(path):
            return ''
        with open(path) as f:
            return f.read().strip()

    def at(self, path='/'):
        """The address of a panel, with the secret."""
        return f'{self.url}{path}' + (f'?token={self.token}' if self.token else '')

    def kill(self, number=signal.SIGKILL):
        """Ends it at once, and waits for that."""
        self.process.send_signal(number)
        self.process.wait(30)

    def stop(self):
        """Ends it as Ctrl-C does."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()


def open_browser():
    """→ (playwright, a Chromium); skips the test where there is none."""
    api = pytest.importorskip('playwright.sync_api')
    path = next(filter(None, map(shutil.which, NAMES)), None)
    playwright = api.sync_playwright().start()
    try:
        return playwright, playwright.chromium.launch(executable_path=path, args=FLAGS)
    except api.Error as error:
        playwright.stop()
        pytest.skip(f'NO BROWSER HERE: the page is not tested ({str(error).splitlines()[0]})')


class Watched:
    """What a page asks for, and what it complains of."""

    def __init__(self, context):
        self.elsewhere = []
        self.errors = []
        context.on('request', self.on_request)
        context.on('console', self.on_console)
        context.on('weberror', lambda error: self.errors.append(str(error.error)))

    def on_request(self, request):
        if request.url.startswith(('data:', 'blob:', 'about:')):
            return
        if '//127.0.0.1:' not in request.url[:20]:
            self.elsewhere.append(request.url)

    def on_console(self, message):
        if message.type == 'error':
            self.errors.append(message.text)

    def forgive_broken_connections(self):
        """Takes out what was said because the server was ended."""
        self.errors = [error for error in self.errors if not any(part in error for part in BROKEN_OFF)]

    def check(self):
        assert not self.elsewhere
        assert not self.errors


def has_no_sideways_scroll(page):
    """Whether all of a page is as wide as its window."""
    return page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')


def choose(page, name, value):
    """Chooses one of a select's options, when the page is connected."""
    page.wait_for_function('window.did_handshake')
    page.get_by_test_id(name).click()
    option = page.get_by_role('option', name=value, exact=True).locator('visible=true')
    option.click()
    option.wait_for(state='hidden')
