"""Who may ask, and how much: what stands before the API and the page, and sees each request first.

    app.add_middleware(Guard, rules=Rules(api_key='…'))

    request ──► Host ──► Origin ──► key, or the page's cookie ──► body, whole and not too large ──► app
                 403       403             401                      413, 408

What each is against:
    Host        another page's name that is made to point at this machine (DNS rebinding)
    Origin      a page of somebody else, which sends what its visitor's browser may send
    key         whoever else reaches the port: no request to the API without it
    cookie      the same, for the page, which starts processes: it is set where the address has the
                token that serve.py prints
    body        a client that sends more than anybody needs, or a byte a minute
Headers in every response say that the page is shown in no other one's frame, loads nothing from
elsewhere, and tells nobody its address.
"""
import asyncio
import hmac
import sys
import traceback
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response

from mambino.serve.errors import refusal, response_to
from mambino.serve.told import Refused

API = ('/v1', '/health', '/tokenize', '/detokenize', '/tokenizer_info', '/score', '/sessions', '/metrics')
PUBLIC = '/health'              # needs no key
THIS_MACHINE = ('localhost', '127.0.0.1', '[::1]')
BODY_SECONDS = 60               # in which a body must be there
MOST_READ = 256_000_000         # bytes of a body that is too large
COOKIE_SECONDS = 400 * 86400    # the most that browsers allow
METHODS = 'GET, POST, DELETE, OPTIONS'
HEADERS = {
    'X-Content-Type-Options': 'nosniff',
    'X-Frame-Options': 'DENY',
    'Referrer-Policy': 'no-referrer',           # the page's first address has its token
    'Cross-Origin-Opener-Policy': 'same-origin',
}
API_POLICY = "default-src 'none'; frame-ancestors 'none'"
# NiceGUI writes its scripts and styles into the page, and Vue compiles templates in the browser, so
# script-src needs 'unsafe-inline' and 'unsafe-eval' (without them nothing is shown): scripts that
# somebody smuggles in are kept out by showing what is not ours as text only. Nothing is sent to, or
# loaded from, elsewhere.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
NO_COOKIE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">{again}
<title>Mambino</title><body style="font-family: system-ui; max-width: 34em; margin: 15vh auto; padding: 0 1em">
<h1>{title}</h1><p>This page can start programs on the machine that it runs on, so it opens only for who started it.
Open the address that <code>serve.py</code> has printed, which ends in <code>?token=…</code>; after that this one works
too.
"""
AGAIN = '<meta http-equiv="refresh" content="0">'


class Rules(NamedTuple):
    """What is allowed."""
    api_key: str = ''               # '': the API needs none
    hosts: tuple = None             # names besides THIS_MACHINE that a request may call it; None: any
    origins: tuple = ()             # other pages that may use the API, as http://localhost:3000; '*': all
    token: str = ''                 # of the page; '': there is no page
    cookie: str = 'mambino'         # its name: a browser has one jar for all ports of a machine
    max_body: int = 8_000_000       # bytes


class Guard:
    """An ASGI app around another. count(scope, status): is told of every response, for /metrics."""

    def __init__(self, app, rules, count=None):
        self.app = app
        self.rules = rules
        self.count = count or (lambda scope, status: None)
        # headers are bytes of who knows which encoding
        self.keys = [rules.api_key.encode(encoding, 'replace') for encoding in ('utf-8', 'latin-1')]

    async def __call__(self, scope, receive, send):
        if scope['type'] == 'lifespan':
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        response = self.refuse(scope, headers)
        if scope['type'] == 'websocket':
            if response:
                return await send({'type': 'websocket.close', 'code': 1008})
            return await self.app(scope, receive, send)
        sender = Sender(send, self.added_headers(scope, headers))
        try:
            if not response and is_api(scope['path']):
                receive = await read_body(receive, headers, self.rules.max_body)
            await (response or self.app)(scope, receive, sender)
        except ClientDisconnect:
            pass
        except (Exception, SystemExit) as error:        # configurator.fail's, that no told() has heard
            if sender.status:                   # too late to say anything else; the connection is closed
                raise
            response = response_to(error)
            if response is None:
                traceback.print_exc(file=sys.stderr)
                response = refusal('the server has made a mistake, which it has written down', 500)
            await response(scope, receive, sender)
        finally:
            self.count(scope, sender.status)

    # --- who ------------------------------------------------------------------------------------

    def refuse(self, scope, headers):
        """The Response to a request that goes no further; None if it does."""
        hosts = headers.getlist('host')
        if len(hosts) != 1 or not self.is_own(hosts[0]):
            return refusal(f'Host: {", ".join(hosts) or "none"} is not what this server is called; serve.py '
                           '--allowed_hosts=NAME allows a name', 403, code='host')
        origin = headers.get('origin')
        method = scope.get('method', 'websocket')
        for_api = is_api(scope['path'])
        may_share = for_api and self.shares_with(origin)
        acts = method not in ('GET', 'HEAD') or not for_api      # the page's socket acts on what is read, too
        if origin is not None and acts and not may_share:
            if not self.is_same(origin, hosts[0]):
                return refusal(f'Origin: {origin} is another page; serve.py --cors_origin={origin} would let it use '
                               'the API', 403, code='origin')
        if method == 'OPTIONS' and may_share and 'access-control-request-method' in headers:
            return Response(status_code=204)
        if not for_api:
            return self.refuse_page(scope, headers) if self.rules.token else None
        if scope['path'] == PUBLIC or not self.rules.api_key:
            return None
        if self.has_key(headers) or self.has_cookie(headers):
            return None
        return refusal('this server needs its api_key: Authorization: Bearer KEY, which OpenAI\'s clients send as '
                       'api_key', 401, code='invalid_api_key', headers={'WWW-Authenticate': 'Bearer'})

    def is_own(self, host):
        """Whether a Host header names this machine. Its port may be another one: that of a tunnel."""
        name = name_of(host)
        hosts = self.rules.hosts
        return hosts is None or '*' in hosts or name in (*THIS_MACHINE, *hosts) or host.lower() in hosts

    def is_same(self, origin, host):
        """Whether an Origin is this server's own, by its Host header, or as a proxy before it is
        called. Its port counts: at another one is another server."""
        _, _, place = origin.lower().partition('://')
        return place == host.lower() or place in (self.rules.hosts or ())

    def shares_with(self, origin):
        origins = self.rules.origins
        return origin is not None and ('*' in origins or origin.rstrip('/').lower() in origins)

    def has_key(self, headers):
        kind, _, key = headers.get('authorization', '').partition(' ')
        raw = key.strip().encode('latin-1')             # as the header came
        matches = [hmac.compare_digest(raw, known) for known in self.keys]
        return kind.lower() == 'bearer' and any(matches)

    def has_cookie(self, headers):
        cookies = cookie_parser(headers.get('cookie', ''))
        return bool(self.rules.token) and self.is_token(cookies.get(self.rules.cookie, ''))

    def is_token(self, text):
        return hmac.compare_digest(text.encode('utf-8', 'replace'), self.rules.token.encode())

    # --- the page -------------------------------------------------------------------------------

    def refuse_page(self, scope, headers):
        """None for a browser that knows the page's secret. One that brings it in the address gets a
        cookie in its place, and an address without it."""
        query = parse_qsl(scope['query_string'].decode('latin-1'), keep_blank_values=True)
        tokens = [value for name, value in query if name == 'token']
        if tokens and scope.get('method') == 'GET' and self.is_token(tokens[-1]):
            rest = urlencode([(name, value) for name, value in query if name != 'token'])
            path = '/' + scope['path'].lstrip('/\\')    # //name would be another server
            response = RedirectResponse(path + (rest and '?' + rest), 303, {'Cache-Control': 'no-store'})
            response.set_cookie(self.rules.cookie, self.rules.token, COOKIE_SECONDS, httponly=True, samesite='strict',
                                secure=scope.get('scheme') == 'https')
            return response
        if self.has_cookie(headers):
            return None
        # A browser that follows a link in another page, or from the address above that such a link led to,
        # sends no strict cookie; it does when this page loads itself again.
        again = AGAIN if headers.get('sec-fetch-site') == 'cross-site' and not tokens else ''
        title = 'This token is not the one' if tokens else 'Who are you?'
        return HTMLResponse(NO_COOKIE.format(again=again, title=title), 403 if tokens else 401,
                            {'Cache-Control': 'no-store'})

    # --- what is said with every response -------------------------------------------------------

    def added_headers(self, scope, headers):
        for_api = is_api(scope['path'])
        added = dict(HEADERS)
        added['Content-Security-Policy'] = API_POLICY if for_api or not self.rules.token else PAGE_POLICY
        origin = headers.get('origin')
        if for_api and self.rules.origins:
            added['Vary'] = 'Origin'
        if for_api and self.shares_with(origin):
            added['Access-Control-Allow-Origin'] = origin
            if scope['method'] == 'OPTIONS':
                added['Access-Control-Allow-Methods'] = METHODS
                asked = headers.get('access-control-request-headers', 'authorization, content-type')
                added['Access-Control-Allow-Headers'] = asked
                added['Access-Control-Max-Age'] = '600'
        else:
            added['Cross-Origin-Resource-Policy'] = 'same-origin'
        return added


class Sender:
    """send of ASGI that adds headers. status: of the response; 0 as long as none has begun."""

    def __init__(self, send, headers):
        self.send = send
        self.headers = headers
        self.status = 0

    async def __call__(self, message):
        if message['type'] == 'http.response.start':
            self.status = message['status']
            headers = MutableHeaders(raw=list(message.get('headers', ())))
            for name, value in self.headers.items():
                headers[name] = value
            message = {**message, 'headers': headers.raw}
        await self.send(message)


def is_api(path):
    """Whether a path is the API's, and not the page's."""
    return any(path == own or path.startswith(own + '/') for own in API)


def name_of(host):
    """A Host header without its port."""
    name, colon, port = host.rpartition(':')
    if not colon or not port.isdecimal():
        name = host
    return name.lower().rstrip('.')


# --- the body -------------------------------------------------------------------------------------

async def read_body(receive, headers, most):
    """→ receive of ASGI that has the whole body at once, and then what comes behind it: that the
    client has gone. Refused if it is larger, or takes longer, than anybody needs."""
    length = headers.get('content-length', '')
    length = int(length[:20]) if length.isdecimal() else 0
    waits = headers.get('expect', '').lower() == '100-continue'         # to be told to send it
    if length > MOST_READ or length > most and waits:
        raise too_large(most)
    try:
        body = await asyncio.wait_for(all_of(receive, most), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(f'the body was not there after {BODY_SECONDS} s', 408, headers={'Connection': 'close'}) from None
    if body is None:
        raise too_large(most)
    messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def receive_again():
        return messages.pop() if messages else await receive()

    return receive_again


async def all_of(receive, most):
    """The bytes of a body; None where they are more than `most`, which are read all the same and
    kept nowhere: a client that still sends would see that it is cut off, and not why.
    ClientDisconnect if it leaves."""
    body = bytearray()
    size = 0
    while True:
        message = await receive()
        if message['type'] == 'http.disconnect':
            raise ClientDisconnect
        size += len(message.get('body', b''))
        if size > most:
            body.clear()
        else:
            body += message.get('body', b'')
        if size > MOST_READ:
            return None
        if not message.get('more_body'):
            return bytes(body) if size <= most else None


def too_large(most):
    return Refused(f'the body has more than {most / 1e6:g} MB', 413, headers={'Connection': 'close'})
