"""What clients may ask for: OpenAI's API, and what belongs to a language model besides.

    app = make_app(library, Limits(), api_key='', cors_origin='')       # an ASGI app
"""
from typing import NamedTuple

from fastapi import FastAPI


class Limits(NamedTuple):
    """Of one request."""
    max_tokens: int = 4096      # generated
    max_prompt: int = 65536     # tokens read
    max_body: int = 8_000_000   # bytes
    timeout: float = 600.0      # seconds


def make_app(library, limits, api_key='', cors_origin=''):
    """The ASGI app of the API."""
    app = FastAPI(title='Mambino', docs_url=None, redoc_url=None)

    @app.get('/health')
    def health():
        return dict(status='ok')

    @app.get('/v1/models')
    def models():
        data = [dict(id=run['id'], object='model', created=run['created'], owned_by='mambino')
                for run in library.names()]
        return dict(object='list', data=data)

    return app
