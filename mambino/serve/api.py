"""What clients may ask for: OpenAI's API, and what belongs to a language model besides.

    app = make_app(library, Limits(), api_key='', cors_origin='')       # an ASGI app

    GET  /health, /metrics                      here
    GET  /v1/models, /v1/models/{id}            here
    POST /tokenize, /detokenize, /score, …      texts.py
    GET  /sessions, …                           session_api.py
    POST /v1/completions                        completions.py
    POST /v1/chat/completions                   chat_api.py
    POST /v1/responses                          responses.py

guard.py sees each request first; what is refused is said in the shape of errors.py.
"""
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match

from mambino.serve.chat_api import add_chat
from mambino.serve.completions import add_completions
from mambino.serve.errors import add_handlers
from mambino.serve.guard import Guard, Rules, is_api
from mambino.serve.metrics import Metrics
from mambino.serve.responses import add_responses
from mambino.serve.session_api import add_sessions
from mambino.serve.texts import add_texts
from mambino.serve.told import NoModel


class Limits(NamedTuple):
    """Of one request."""
    max_tokens: int = 4096      # generated
    max_prompt: int = 65536     # tokens read
    max_body: int = 8_000_000   # bytes
    timeout: float = 600.0      # seconds


def make_app(library, limits, api_key='', cors_origin='', hosts=None, token='', cookie='mambino'):
    """The ASGI app of the API. hosts: names besides localhost by which it may be called, None: any; token,
    cookie: of the page, '' where there is none."""
    app = FastAPI(title='Mambino', docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    metrics = library.metrics = library.metrics or Metrics()
    rules = Rules(
        api_key=api_key,
        hosts=hosts,
        origins=tuple(origin.strip().rstrip('/').lower() for origin in cors_origin.split(',') if origin.strip()),
        token=token,
        cookie=cookie,
        max_body=limits.max_body,
    )
    app.add_middleware(Guard, rules=rules, count=metrics.count_request)
    add_handlers(app)

    @app.api_route('/health', methods=['GET', 'HEAD'])
    async def health():
        schedulers = library.schedulers()
        dead = [name for name, scheduler in schedulers.items() if not scheduler.is_alive()]
        if dead:
            return JSONResponse(dict(status='dead', models=dead), 500)
        if schedulers:
            return dict(status='ok')
        status = 'loading' if library.loading else 'no model'
        return JSONResponse(dict(status=status), 503)

    @app.get('/v1/models')
    def models():
        return dict(object='list', data=[model_of(run, library) for run in library.names()])

    @app.get('/v1/models/{name:path}')
    def model(name: str):
        for run in library.names():
            if run['id'] == name:
                return model_of(run, library)
        raise NoModel(f'no model {name[:100]!r}; GET /v1/models lists those that there are')

    @app.get('/metrics')
    async def measured():
        text = await run_in_threadpool(metrics.text, library)
        return PlainTextResponse(text, media_type='text/plain; version=0.0.4; charset=utf-8')

    add_completions(app, library, limits)
    add_chat(app, library, limits)
    add_responses(app, library, limits)
    add_texts(app, library, limits)
    add_sessions(app, library)
    app.router.routes.append(Nothing(list(app.router.routes)))
    return app


class Nothing(BaseRoute):
    """What answers at the API's paths where no other route does: the page, which is mounted below it at /,
    would answer there with a page. routes: the others."""

    def __init__(self, routes):
        self.others = routes

    def matches(self, scope):
        is_ours = scope['type'] == 'http' and is_api(scope['path'])
        return Match.FULL if is_ours else Match.NONE, {}

    async def handle(self, scope, receive, send):
        near = [route for route in self.others if route.matches(scope)[0] == Match.PARTIAL]
        if near:
            allowed = ', '.join(sorted(set().union(*(route.methods for route in near))))
            raise HTTPException(405, headers={'Allow': allowed})
        raise HTTPException(404)


def model_of(run, library):
    """A run as the list of models has it."""
    return dict(id=run['id'], object='model', created=run['created'], owned_by='mambino',
                fills_holes=library.fills_holes(run))
