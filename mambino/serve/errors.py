"""What a client is told that cannot have what it asked for, in the shape that OpenAI's clients
read.

    raise Refused('max_tokens is -1; it must be at least 1', param='max_tokens')    # status 400
    body = await body_of(request)       # a dict; Refused for all that is none
    add_handlers(app)                   # what anything else raises is said in that shape too

    {"error": {"message": "max_tokens is -1; …", "type": "invalid_request_error", "param": "max_tokens", "code": null}}

The clients try again by themselves after 408, 409, 429 and 5xx: a request that can never be
answered is refused with 400.
"""
import contextlib
import gc
import json

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mambino.plain import json_text, parse_json
from mambino.serve.bodies import json_bytes
from mambino.serve.told import Refused
from mambino.serve.work import Full

TYPES = {401: 'authentication_error', 403: 'permission_error', 429: 'rate_limit_error'}     # others by their hundreds
SAID = {                        # where all that is known is the status
    404: 'there is nothing at this path; GET /v1/models lists the models, and POST /v1/completions asks one',
    405: 'this path takes another method',
}
LONGEST = 1000                  # characters of a message: it may quote what a client has sent


def error_of(message, status, param=None, code=None):
    """{'error': …} as a body has it, or an event of a stream."""
    message = str(message)
    if len(message) > LONGEST:
        message = message[:LONGEST] + '…'
    default = 'server_error' if status >= 500 else 'invalid_request_error'
    return {'error': dict(message=message, type=TYPES.get(status, default), param=param, code=code)}


def refusal(message, status, param=None, code=None, headers=None):
    """The Response."""
    body = json_bytes(error_of(message, status, param, code))
    return Response(body, status, headers, 'application/json')


def response_to(error):
    """The Response to an exception that says what a client has to know; None for a bug."""
    if isinstance(error, Refused):
        return refusal(error.message, error.status, error.param, error.code, error.headers)
    if isinstance(error, Full):
        seconds = max(1, round(error.seconds))
        message = f'too many requests are waiting; try again in {seconds} s'
        return refusal(message, 429, None, 'queue_full', {'Retry-After': str(seconds)})
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        where = '.'.join(str(part) for part in problem['loc'][1:])
        return refusal(f'{where}: {problem["msg"]}', 400, where or None)
    if isinstance(error, HTTPException):
        said = SAID.get(error.status_code, error.detail)
        return refusal(said, error.status_code, headers=error.headers)
    return None


def add_handlers(app):
    """From here on an app says its refusals, and those of its routes, in this shape."""

    async def answer(request, error):
        return response_to(error)

    for kind in (Refused, Full, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


@contextlib.contextmanager
def uncollected():
    """Meanwhile no garbage is looked for: of a body of a million lists that takes ten times as long
    as to read it, and all others wait."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


async def body_of(request):
    """The JSON object in a request's body; Refused if it is none, or if a text in it holds half of
    a surrogate pair, which is no character."""
    raw = await request.body()
    try:
        with uncollected():
            body = parse_json(json_text(raw), parse_constant=refuse_constant)
        if b'\\u' in raw:
            json.dumps(body, ensure_ascii=False).encode('utf-8')
    except UnicodeEncodeError:
        raise Refused('a text in the body has half of a surrogate pair, which is no character') from None
    except (ValueError, RecursionError) as error:
        raise Refused(f'the body is no JSON: {error}') from None
    if not isinstance(body, dict):
        raise Refused('the body must be a JSON object, as {"prompt": "Once upon a time"}')
    return body


def refuse_constant(name):
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f'{name} is no number')
