"""Who may ask: what stands before the API and the page."""
import asyncio
import os
import stat

import pytest

pytest.importorskip('fastapi')

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

from mambino.serve import guard as guards
from mambino.serve.guard import Guard, Rules, name_of
from mambino.serve.page_token import FILE, page_token
from mambino.serve.start import hosts_of, urls_of

POSIX = pytest.mark.skipif(os.name != 'posix', reason='modes and links of files')
HERE = '127.0.0.1:8000'
TOKEN = 'a-token-of-the-page-that-nobody-guesses'


async def echo(request: Request):
    body = await request.body()
    return PlainTextResponse(f'{request.method} {len(body)}')


async def broken(request):
    raise ZeroDivisionError('a bug')


async def chat(websocket):
    await websocket.accept()
    await websocket.send_text('hello')
    await websocket.close()


def guarded(**rules):
    """An app behind a guard."""
    methods = ['GET', 'POST', 'DELETE', 'PUT']
    paths = ('/health', '/v1/models', '/v1/completions', '/score', '/sessions/a/fork', '/', '/generate')
    routes = [Route(path, echo, methods=methods) for path in paths]
    routes += [Route('/v1/broken', broken), WebSocketRoute('/ws', chat)]
    return Starlette(routes=routes, middleware=[Middleware(Guard, rules=Rules(**rules))])


def asked(rules, method, path, headers=None, **options):
    """The httpx.Response. Without a Host in headers it is this machine's."""
    async def ask():
        transport = httpx.ASGITransport(guarded(**rules))
        async with httpx.AsyncClient(transport=transport, base_url=f'http://{HERE}') as client:
            return await client.request(method, path, headers=headers, **options)
    return asyncio.run(ask())


def answer_to_websocket(rules, headers):
    """The first message that an app sends to one who opens a websocket."""
    sent = []

    async def receive():
        return {'type': 'websocket.connect'}

    async def send(message):
        sent.append(message)
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = dict(type='websocket', path='/ws', headers=raw, query_string=b'', scheme='ws', subprotocols=[])
    asyncio.run(guarded(**rules)(scope, receive, send))
    return sent[0]['type']


# --- Host and Origin ------------------------------------------------------------------------------

@pytest.mark.parametrize('host, status', [
    ('127.0.0.1:8000', 200), ('127.0.0.1', 200), ('localhost:8000', 200), ('LocalHost.:9000', 200), ('[::1]:8000', 200),
    ('box.example.org', 200), ('box.example.org:443', 200),
    ('evil.example', 403), ('evil.example:8000', 403), ('127.0.0.1.evil.example', 403), ('localhost.evil.example', 403),
    ('', 403), ('127.0.0.1@evil.example', 403), ('127.0.0.1:8000, evil.example', 403), ('192.168.0.1:8000', 403),
])
def test_a_name_that_is_not_this_machine_s_is_refused(host, status):
    rules = dict(hosts=hosts_of('127.0.0.1', 'box.example.org', ''))
    for method in ('GET', 'POST'):
        for path in ('/health', '/v1/models', '/generate'):
            assert asked(rules, method, path, {'Host': host}).status_code == status
    assert answer_to_websocket(rules, {'Host': host}) == ('websocket.accept' if status == 200 else 'websocket.close')


def test_two_hosts_are_refused():
    rules = dict(hosts=hosts_of('127.0.0.1', '', ''))
    assert asked(rules, 'GET', '/v1/models', [('Host', HERE), ('Host', HERE)]).status_code == 403


def test_who_needs_a_key_may_call_it_as_he_likes():
    assert hosts_of('0.0.0.0', '', 'key') is None
    assert hosts_of('127.0.0.1', '', 'key') is not None
    assert hosts_of('0.0.0.0', 'box.example.org', 'key') is not None
    assert asked(dict(hosts=('*',)), 'GET', '/v1/models', {'Host': 'any.example'}).status_code == 200


@pytest.mark.parametrize('host, name', [
    ('a:80', 'a'), ('A.b.', 'a.b'), ('[::1]:80', '[::1]'), ('[::1]', '[::1]'), ('a:b', 'a:b'), ('', ''),
])
def test_names_of_hosts(host, name):
    assert name_of(host) == name


@pytest.mark.parametrize('hosts', [None, hosts_of('127.0.0.1', '', ''), hosts_of('127.0.0.1', 'box.example.org', '')])
@pytest.mark.parametrize('origin, status', [
    (None, 200), ('http://127.0.0.1:8000', 200), ('https://127.0.0.1:8000', 200), ('http://evil.example', 403),
    ('http://127.0.0.1:3000', 403), ('http://localhost:8000', 403), ('null', 403), ('', 403), ('evil', 403),
    ('http://127.0.0.1:8000.evil.example', 403), ('http://evil.example/127.0.0.1:8000', 403),
])
def test_another_page_may_send_nothing(origin, status, hosts):
    rules = dict(hosts=hosts)
    headers = {'Host': HERE} if origin is None else {'Host': HERE, 'Origin': origin}
    for method in ('POST', 'DELETE', 'PUT'):
        for path in ('/v1/completions', '/generate'):
            response = asked(rules, method, path, headers)
            assert response.status_code == status
    assert answer_to_websocket(rules, headers) == ('websocket.accept' if status == 200 else 'websocket.close')
    response = asked(rules, 'GET', '/v1/models', headers)   # which a browser shows to no other page
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith('access-control-')]
    for method in ('GET', 'HEAD'):      # by GET alone one gets a socket of the page
        response = asked(rules, method, '/_nicegui_ws/socket.io/', headers)
        assert (response.status_code == 403) == (status == 403)


def test_a_page_behind_a_proxy_has_the_proxy_s_name():
    rules = dict(hosts=hosts_of('127.0.0.1', 'box.example.org', ''))
    for origin, status in (('https://box.example.org', 200), ('https://box.example.org:444', 403)):
        headers = {'Host': HERE, 'Origin': origin}
        assert asked(rules, 'POST', '/v1/completions', headers).status_code == status


def test_a_page_that_is_named_may_use_the_api():
    rules = dict(origins=('http://localhost:3000',), api_key='key', token=TOKEN)
    ask = {'Host': HERE, 'Origin': 'http://localhost:3000', 'Access-Control-Request-Method': 'POST',
           'Access-Control-Request-Headers': 'authorization, content-type, x-stainless-os'}
    response = asked(rules, 'OPTIONS', '/v1/completions', ask)
    assert response.status_code == 204
    assert response.headers['Access-Control-Allow-Origin'] == 'http://localhost:3000'
    assert 'POST' in response.headers['Access-Control-Allow-Methods']
    assert response.headers['Access-Control-Allow-Headers'] == ask['Access-Control-Request-Headers']
    assert response.headers['Vary'] == 'Origin' and 'Access-Control-Allow-Credentials' not in response.headers
    own = {'Host': HERE, 'Origin': 'http://localhost:3000', 'Authorization': 'Bearer key'}
    response = asked(rules, 'POST', '/v1/completions', own)
    assert response.status_code == 200
    assert response.headers['Access-Control-Allow-Origin'] == 'http://localhost:3000'
    del own['Authorization']
    response = asked(rules, 'POST', '/v1/completions', own)     # and reads why it may not
    assert response.status_code == 401 and 'Access-Control-Allow-Origin' in response.headers
    for origin, path in (('http://localhost:3001', '/v1/completions'), ('http://localhost:3000', '/generate')):
        response = asked(rules, 'OPTIONS', path, {**ask, 'Origin': origin})
        assert response.status_code == 403 and 'Access-Control-Allow-Origin' not in response.headers


# --- the key --------------------------------------------------------------------------------------

@pytest.mark.parametrize('key', ['secret', 'ключ', 'clé'])
def test_the_api_needs_its_key(key):
    def status(path, *keys, method='GET'):
        headers = [(b'authorization', b'Bearer ' + one) for one in keys]
        return asked(dict(api_key=key), method, path, headers).status_code
    assert status('/v1/models', key.encode()) == 200
    assert status('/v1/models') == status('/v1/models', b'') == status('/v1/models', b'secrets') == 401
    assert status('/v1/models', 'é'.encode('latin-1')) == 401
    assert status('/score', method='POST') == status('/sessions/a/fork', method='POST') == 401
    assert status('/v1/broken') == 401
    assert status('/health') == 200
    for header in (key, f'Basic {key}', f'Bearer{key}'):
        assert asked(dict(api_key=key), 'GET', '/v1/models', {b'Authorization': header.encode()}).status_code == 401


def test_who_has_no_key_is_told_how():
    response = asked(dict(api_key='secret'), 'POST', '/v1/completions')
    error = response.json()['error']
    assert error['type'] == 'authentication_error' and error['code'] == 'invalid_api_key'
    assert response.headers['WWW-Authenticate'] == 'Bearer' and 'secret' not in response.text


# --- the page -------------------------------------------------------------------------------------

RULES = dict(token=TOKEN, cookie='mambino-8000')


def test_the_page_opens_for_who_knows_its_token_and_then_for_his_cookie():
    response = asked(RULES, 'GET', f'/generate?a=1&token={TOKEN}&b=%2F')
    assert response.status_code == 303 and response.headers['Location'] == '/generate?a=1&b=%2F'
    cookie = response.headers['Set-Cookie']
    assert f'mambino-8000={TOKEN}' in cookie and 'HttpOnly' in cookie and 'SameSite=strict' in cookie
    assert 'Path=/' in cookie and response.headers['Referrer-Policy'] == 'no-referrer'
    assert asked(RULES, 'GET', '/generate', {'Cookie': f'mambino-8000={TOKEN}'}).status_code == 200
    accepted = answer_to_websocket(RULES, {'Host': HERE, 'Cookie': f'mambino-8000={TOKEN}'})
    assert accepted == 'websocket.accept'


@pytest.mark.parametrize('path, headers, status', [
    ('/', {}, 401), ('/generate', {}, 401), ('/generate?token=', {}, 403), ('/generate?token=x', {}, 403),
    ('/generate?token=%C3%A9', {}, 403),
    ('/', {'Cookie': 'mambino-8000='}, 401), ('/', {'Cookie': 'mambino-8000=é'}, 401),
    ('/', {'Cookie': f'mambino-8001={TOKEN}'}, 401), ('/', {'Authorization': f'Bearer {TOKEN}'}, 401),
    ('/_nicegui/x.js', {}, 401), ('/v1models', {}, 401), ('/healthy', {}, 401), ('//v1/models', {}, 401),
])
def test_the_page_opens_for_nobody_else(path, headers, status):
    headers = {name: value.encode() for name, value in headers.items()}
    for method in ('GET', 'POST', 'DELETE'):
        response = asked(RULES, method, f'http://{HERE}{path}', headers)
        assert response.status_code == status
        assert 'printed' in response.text and TOKEN not in response.text and 'Set-Cookie' not in response.headers
    assert answer_to_websocket(RULES, {'Host': HERE, 'Cookie': f'mambino-8000={TOKEN}x'}) == 'websocket.close'


def test_the_token_leads_to_no_other_server():
    for path in ('//evil.example', '///evil.example', '/\\evil.example'):
        response = asked(RULES, 'GET', f'http://{HERE}{path}?token={TOKEN}')
        assert response.headers['Location'].rstrip('/') == '/evil.example'


def test_a_link_in_another_page_works_for_who_has_the_cookie():
    """A browser sends no strict cookie with it: the page loads itself again, once."""
    response = asked(RULES, 'GET', '/', {'Sec-Fetch-Site': 'cross-site'})
    assert response.status_code == 401 and 'http-equiv="refresh"' in response.text
    assert 'refresh' not in asked(RULES, 'GET', '/', {'Sec-Fetch-Site': 'same-origin'}).text


def test_the_page_may_use_the_api_without_the_key():
    rules = dict(RULES, api_key='key')
    cookie = {'Cookie': f'mambino-8000={TOKEN}'}
    assert asked(rules, 'POST', '/v1/completions', {**cookie, 'Origin': f'http://{HERE}'}).status_code == 200
    assert asked(rules, 'POST', '/v1/completions', {**cookie, 'Origin': 'http://evil.example'}).status_code == 403
    assert asked(dict(api_key='key'), 'POST', '/v1/completions', {'Cookie': 'mambino='}).status_code == 401


def test_every_response_says_what_a_browser_may_do_with_it():
    for rules, path, policy in (
            (RULES, '/health', "default-src 'none'"), (RULES, '/generate', "connect-src 'self'"),
            ({}, '/nothing', "default-src 'none'"), (RULES, f'/?token={TOKEN}', "frame-ancestors 'none'")):
        headers = asked(rules, 'GET', path).headers
        assert policy in headers['Content-Security-Policy'] and "frame-ancestors 'none'" in headers[
            'Content-Security-Policy']
        assert headers['X-Content-Type-Options'] == 'nosniff' and headers['Referrer-Policy'] == 'no-referrer'
        assert headers['X-Frame-Options'] == 'DENY'


# --- the body -------------------------------------------------------------------------------------

async def never():
    raise AssertionError('the body was read')
    yield


async def pieces(*parts):
    for part in parts:
        yield part


def test_a_body_that_is_too_large_is_refused():
    rules = dict(max_body=1000)
    assert asked(rules, 'POST', '/v1/completions', content=b'x' * 1000).text == 'POST 1000'
    for content in (b'x' * 1001, pieces(b'x' * 600, b'x' * 401)):
        response = asked(rules, 'POST', '/v1/completions', content=content)
        assert response.status_code == 413 and response.json()['error']['message'] == 'the body has more than 0.001 MB'
    for headers in ({'Content-Length': '9' * 5000}, {'Content-Length': '1001', 'Expect': '100-continue'}):
        response = asked(rules, 'POST', '/v1/completions', headers, content=never())     # nothing of it is waited for
        assert response.status_code == 413


def test_who_sends_what_is_too_large_reads_why():
    sent = []

    async def many():
        for _ in range(50):
            sent.append(1)
            yield b'x' * 1000
    assert asked(dict(max_body=1000), 'POST', '/v1/completions', content=many()).status_code == 413
    assert len(sent) == 50


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(guards, 'BODY_SECONDS', 0.05)

    async def slow():
        yield b'x'
        await asyncio.sleep(60)
    response = asked({}, 'POST', '/v1/completions', content=slow())
    assert response.status_code == 408 and response.headers['Connection'] == 'close'


def test_a_client_that_leaves_is_no_error(capsys):
    sent = []

    async def receive():
        return {'type': 'http.disconnect'}

    async def send(message):
        sent.append(message)
    headers = [(b'host', b'localhost')]
    scope = dict(type='http', method='POST', path='/v1/completions', query_string=b'', headers=headers)
    asyncio.run(guarded()(scope, receive, send))
    assert not sent and not capsys.readouterr().err


def test_a_bug_is_said_in_the_shape_of_errors(capsys):
    response = asked({}, 'GET', '/v1/broken')
    assert response.status_code == 500 and response.json()['error']['type'] == 'server_error'
    assert 'ZeroDivisionError: a bug' in capsys.readouterr().err and 'a bug' not in response.text


# --- the file of the token ------------------------------------------------------------------------

def test_the_token_stays(tmp_path):
    token = page_token(tmp_path)
    assert page_token(tmp_path) == token and len(token) >= 32
    (tmp_path / 'other').mkdir()
    assert page_token(tmp_path / 'other') != token


@POSIX
def test_only_its_owner_reads_it(tmp_path):
    before = os.umask(0)
    try:
        page_token(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / FILE).st_mode) == 0o600


@POSIX
@pytest.mark.parametrize('how', ['others read it', 'a link', 'a second name', 'empty', 'no token', 'a pipe'])
def test_a_token_that_somebody_else_may_know_is_replaced(tmp_path, how, monkeypatch):
    from mambino.serve import page_token as module
    monkeypatch.setattr(module, 'PATIENCE', 0.05)
    path = tmp_path / FILE
    known = 'k' * 40
    if how == 'a link':
        (tmp_path / 'mine').write_text(known)
        os.symlink(tmp_path / 'mine', path)
    elif how == 'a pipe':
        os.mkfifo(path)
    else:
        path.write_text(dict({'empty': '', 'no token': 'a b c'}).get(how, known))
        path.chmod(0o644 if how == 'others read it' else 0o600)
    if how == 'a second name':
        os.link(path, tmp_path / 'second')
    token = page_token(tmp_path)
    assert token != known and page_token(tmp_path) == token
    assert not path.is_symlink() and stat.S_IMODE(os.stat(path).st_mode) == 0o600
    if how == 'a link':
        assert (tmp_path / 'mine').read_text() == known


@POSIX
def test_a_folder_that_cannot_be_written_has_a_token_for_now(tmp_path, capsys):
    (tmp_path / FILE).mkdir()
    token = page_token(tmp_path)
    assert len(token) >= 32 and page_token(tmp_path) != token
    assert capsys.readouterr().err.count('another one after each start') == 2


# --- addresses ------------------------------------------------------------------------------------

def test_addresses():
    assert urls_of('127.0.0.1', 80, '') == dict(API='http://127.0.0.1:80/v1')
    assert urls_of('::1', 80, 't')['page'] == 'http://[::1]:80/?token=t'
    assert urls_of('0.0.0.0', 80, 't')['API'] == 'http://127.0.0.1:80/v1'
