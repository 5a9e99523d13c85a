"""The texts that are kept under a name, as `sample.py --session` keeps them: list, copy, delete.

    GET    /sessions                        → {"data": [{"name", "tokens", "bytes", "written"}, …]}
    POST   /sessions/tale/fork {"to": "b"}  → {"name": "b", …}
    DELETE /sessions/tale                   → {"deleted": true}

All take `model`. To go on with one, name it in a request: "session": "tale".
"""
import os
import shutil

import torch
from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from mambino import files
from mambino.sample import sessions
from mambino.serve.errors import body_of
from mambino.serve.told import Refused, told


def add_sessions(app, library):
    """Puts these endpoints on an app."""

    @app.get('/sessions')
    def show(model: str = ''):
        run = library.find(model)
        folder = os.path.dirname(path_of(run, 'x'))
        names = sessions.names_in(folder) if os.path.isdir(folder) else []
        found = [described(name, os.path.join(folder, name + '.pt')) for name in names]
        return dict(object='list', model=run['id'], data=[session for session in found if session])

    @app.post('/sessions/{name}/fork')
    async def fork(name: str, request: Request):
        body = await body_of(request)
        to = body.get('to')
        if not isinstance(to, str):
            raise Refused('to is missing: the name of the copy', param='to')
        return await run_in_threadpool(copy, library.find(body.get('model') or ''), name, to)

    @app.delete('/sessions/{name}')
    def remove(name: str, model: str = ''):
        delete(library, library.find(model), name)
        return dict(name=name, deleted=True)


def busy_in(library, run):
    """Names of the sessions of a run that answers go on with."""
    named = getattr(library.schedulers().get(run['id']), 'named', None)     # a model that fills holes has none
    return list(named.busy) if named else []


def path_of(run, name, param='session'):
    """The file of a session; Refused for a name that could mean a file elsewhere."""
    try:
        with told(400):
            return sessions.path_of(run['out_dir'], name, param)
    except Refused as error:
        raise Refused(str(error), error.status, param=param) from None


def existing(run, name):
    """The same, of a session that is there."""
    path = path_of(run, name)
    if os.path.islink(path) or not os.path.isfile(path):
        raise Refused(f'no session {name!r} of the model {run["id"]}; GET /sessions lists those that there are', 404,
                      param='session')
    return path


def described(name, path):
    """What the list says of a session; None if it has gone, or is no file but a link."""
    try:
        if os.path.islink(path) or not os.path.isfile(path):
            return None
        status = os.stat(path)
    except OSError:
        return None
    try:
        tokens = len(torch.load(path, map_location='cpu', weights_only=True, mmap=True)['tokens'])
    except Exception:           # damaged: it is listed all the same, so that it can be deleted
        tokens = None
    return dict(name=name, tokens=tokens, bytes=status.st_size, written=int(status.st_mtime))


def delete(library, run, name):
    """Deletes a session, unless an answer goes on with it."""
    path = existing(run, name)
    if name in busy_in(library, run):
        raise Refused(f'session {name!r}: an answer goes on with it; wait for its end', 409, param='session')
    try:
        os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Refused(f'session {name!r} cannot be deleted: {error.strerror}') from None


def copy(run, name, to):
    """Copies a session under another name, which nobody has yet."""
    source = existing(run, name)
    path = path_of(run, to, 'to')
    try:
        with files.alone_in(os.path.dirname(path)):
            if os.path.lexists(path):
                raise Refused(f'there is a session {to!r} already, which would be lost', param='to')
            with open(source, 'rb') as original, files.whole(path) as f:
                shutil.copyfileobj(original, f)
    except OSError as error:
        raise Refused(f'session {to!r} cannot be written: {error.strerror}', 500) from None
    return described(to, path)
