"""Who opens the page, in a browser: the token, the cookie that takes its place, and pages of others."""
import http.server
import threading

import pytest
from helpers.browser import PATIENCE

ATTACK = """
<a id="link" href="{url}/generate">a link</a>
<script>
async function attack(path, options) {{
    try {{ return (await fetch('{url}' + path, options)).status }} catch (error) {{ return 'refused' }}
}}
function socket() {{
    return new Promise(resolve => {{
        const address = '{url}'.replace('http', 'ws') + '/_nicegui_ws/socket.io/?EIO=4&transport=websocket'
        const socket = new WebSocket(address)
        socket.onopen = () => resolve('open')
        socket.onerror = () => resolve('refused')
    }})
}}
</script>
"""


@pytest.fixture
def context(browser):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE * 1000)
    yield context
    context.close()


@pytest.fixture
def elsewhere(server):
    """The address of somebody else's page, of another site."""
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Type', 'text/html')
            self.end_headers()
            self.wfile.write(ATTACK.format(url=server.url).encode())

        def log_message(self, *arguments):
            pass
    other = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Page)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    yield f'http://localhost:{other.server_port}/'
    other.shutdown()
    other.server_close()


def test_the_token_is_gone_from_the_address_and_the_cookie_stays(context, server):
    page = context.new_page()
    assert page.goto(server.url).status == 401 and 'token=' in page.inner_text('body')
    page.goto(server.at('/generate'))
    assert page.url == f'{server.url}/generate'
    page.get_by_test_id('go-start').wait_for()
    assert page.evaluate('document.cookie') == ''           # no script sees it
    assert page.goto(f'{server.url}/runs').status == 200
    assert context.new_page().goto(server.url).status == 200


def test_a_link_in_another_page_opens_it_for_who_has_the_cookie(context, server, elsewhere):
    context.new_page().goto(server.at('/'))
    page = context.new_page()
    page.goto(elsewhere)
    page.click('#link')
    page.get_by_test_id('go-start').wait_for()


def test_another_page_does_nothing_in_its_visitor_s_name(context, server, elsewhere):
    context.new_page().goto(server.at('/'))
    page = context.new_page()
    page.goto(elsewhere)
    for options in ('{}', '{method: "POST", body: "{}"}', '{method: "DELETE"}', '{credentials: "include"}'):
        for path in ('/v1/models', '/generate', '/sessions/tale'):
            assert page.evaluate(f'attack({path!r}, {options})') == 'refused'       # it reads no answer
    page.evaluate('attack("/v1/completions", {method: "POST", mode: "no-cors", body: "{}"})')
    assert page.evaluate('socket()') == 'refused'
    figures = context.request.get(f'{server.url}/metrics').text()
    assert 'path="/v1/completions",status="403"' in figures and 'path="/v1/completions",status="200"' not in figures


def test_no_other_page_shows_it_in_a_frame(context, server, elsewhere):
    context.new_page().goto(server.at('/'))
    page = context.new_page()
    page.goto(elsewhere)
    with page.expect_event('requestfailed', lambda request: request.url.startswith(server.url)):
        page.evaluate(f'document.body.append(Object.assign(document.createElement("iframe"), {{src: {server.url!r}}}))')
    assert all('Mambino' not in frame.content() for frame in page.frames if frame != page.main_frame)
