"""What a model makes of a text: its tokens, and how likely it is.

    POST /tokenize {"prompt": "Once"}                   → {"tokens": [7, 301], "count": 2, …}
    POST /detokenize {"tokens": [7, 301]}               → {"prompt": "Once"}
    GET  /tokenizer_info                                → {"eos_token": "<|endoftext|>", …}
    POST /score {"text": "Once upon a time", "top": 5}  → each token's logprob, perplexity, bits/byte

Every one takes `model`. Text is text: no mark written in it becomes an id, but where it is nothing
else (lm-eval asks so for the id of end-of-text). The numbers of /score are those of `sample.py
--score`, to the last bit.
"""
import asyncio
import functools
import math
from contextlib import nullcontext

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from mambino import chat
from mambino.plain import whole
from mambino.sample.generation import window_losses
from mambino.sample.score import ROWS, token_scores, total_nats, windows_of
from mambino.serve.bodies import json_bytes
from mambino.serve.errors import body_of
from mambino.serve.told import Refused, told

MOST_TOP = 100              # likeliest tokens in the place of each
MOST_SHOWN = 500_000        # of them in a response


def add_texts(app, library, limits):
    """Puts these endpoints on an app."""

    @app.post('/tokenize')
    async def tokenize(request: Request):
        body = await body_of(request)
        text = text_in(body, 'prompt', 'content')
        adds = body.get('add_special_tokens', True)
        tok, name, block_size = await tokenizer_named(body.get('model'))
        ids = await run_in_threadpool(ids_of, tok, text, bool(adds))
        return await answer(dict(tokens=ids, count=len(ids), max_model_len=block_size, model=name))

    @app.post('/detokenize')
    async def detokenize(request: Request):
        body = await body_of(request)
        ids = body.get('tokens')
        tok, name, _ = await tokenizer_named(body.get('model'))
        text = await run_in_threadpool(text_of, tok, ids)
        return await answer(dict(prompt=text, content=text, model=name))

    @app.get('/tokenizer_info')
    async def tokenizer_info(model: str = ''):
        tok, name, block_size = await tokenizer_named(model)
        return await answer(dict(
            dict.fromkeys(('bos_token', 'pad_token')),
            **{key: value for key, value in chat.names_of(tok).items() if isinstance(value, str)},
            tokenizer_class=tok.kind,
            vocab_size=tok.vocab_size,
            model_max_length=block_size,
            chat_template=template_of(tok),
            model=name,
        ))

    @app.post('/score')
    async def score(request: Request):
        body = await body_of(request)
        text = text_in(body, 'text', 'prompt')
        top = body.get('top', 0)
        if not whole(top, 0, MOST_TOP):
            raise Refused(f'top must be a whole number from 0 to {MOST_TOP}', param='top')
        served = await library.fetch(body.get('model') or '')
        if served.fills_holes:
            raise Refused(f'the model {served.id} fills holes, and has no logprob of a token after those before it: '
                          f'python sample.py --out_dir={served.out_dir} --score=FILE says a bound', param='model')
        ids = await run_in_threadpool(ids_of, served.tok, text, False, marks=False)
        if not ids:
            raise Refused('the text has no tokens, there is nothing to score', param='text')
        if len(ids) > limits.max_prompt:
            raise Refused(f'the text has {len(ids):,} tokens; at most {limits.max_prompt:,} are read at once',
                          param='text', code='context_length_exceeded')
        if len(ids) * top > MOST_SHOWN:
            raise Refused(f'top is {top}; of {len(ids):,} tokens at most {MOST_SHOWN // len(ids)} can be told',
                          param='top')
        scored = await in_model(request, served, lambda: scores(served, ids, top, text), limits.timeout)
        raw = await run_in_threadpool(shown, served, ids, text, *scored)
        return Response(raw, media_type='application/json')

    async def tokenizer_named(model):
        """→ (a model's tokenizer, its id, the tokens that it was trained on at once)."""
        served = await library.fetch(model or '')
        return served.tok, served.id, served.net.config.block_size


async def answer(value):
    return Response(await run_in_threadpool(json_bytes, value), media_type='application/json')


def text_in(body, *names):
    """The text that a body has under one of these names."""
    for name in names:
        if name in body:
            if not isinstance(body[name], str):
                raise Refused(f'{name} must be a text', param=name)
            return body[name]
    raise Refused(f'{names[0]} is missing: a text', param=names[0])


def ids_of(tok, text, begins, marks=True):
    """The ids of a text. begins: with those before it that begin every text; marks: one that is the
    name of a special token and nothing else is that token."""
    special = chat.marks_in(tok.text, '').get(text) if marks else None
    if special is not None:
        return [special]
    try:
        return [*(tok.bos if begins else []), *tok.encode(text).tolist()]
    except ValueError as error:
        raise Refused(str(error), param='prompt') from None


def text_of(tok, ids):
    """The text of a list of ids."""
    if not isinstance(ids, list) or not all(whole(i, 0, tok.vocab_size - 1) for i in ids):
        raise Refused(f'tokens must be a list of ids from 0 to {tok.vocab_size - 1}', param='tokens')
    return tok.decode(ids)


def template_of(tok):
    """The Jinja template of conversations; None where there is none."""
    try:
        return chat.template_of(tok)
    except ValueError:
        return None


# --- scores ---------------------------------------------------------------------------------------

async def in_model(request, served, pieces, seconds):
    """What the generator pieces() returns, which the model's thread goes through between the steps
    of others. It is given up where the client leaves, or after so many seconds."""
    def work():
        generator = pieces()
        while True:
            with told(500):
                try:
                    next(generator)
                except StopIteration as end:
                    return end.value
            yield

    future = asyncio.wrap_future(served.scheduler.call(work))
    left = asyncio.ensure_future(leaving(request))
    try:
        done, _ = await asyncio.wait({future, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        future.cancel()             # if it is not done: in the model's thread it ends between two layers
        left.cancel()
    if future in done:
        return future.result()
    if left in done:
        raise ClientDisconnect
    raise Refused(f'this was not done after {seconds:g} s', 503)


async def leaving(request):
    """Returns when the client has left."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass


def scores(served, ids, top, text):
    """A generator: of a text's ids [(logprob, [(id, logprob), …]), …], each with all the text
    before it, and (nats, how many targets, their bytes) in windows, as train.py evaluates."""
    net, tok = served.net, served.tok
    tokens = []
    for piece in token_scores(net, tok, ids, top):
        tokens.extend(piece)
        yield
    sequence, given, target_bytes = windows_of(tok, ids, len(text.encode()))
    nats = 0.0
    windows = window_losses(net, sequence, given, ROWS) if len(sequence) > given else iter(())
    while True:
        with served.precision or nullcontext():
            some = next(windows, None)
        if some is None:
            break
        nats += some
        yield
    return tokens, (nats, len(sequence) - given, target_bytes)


def shown(served, ids, text, tokens, windows):
    """The body of the response, bytes."""
    tok = served.tok
    names = functools.lru_cache(None)(lambda i: tok.decode([i], begins=False))
    stream = tok.stream()
    pieces = [stream.feed(i) for i in ids]
    pieces[-1] += stream.flush()
    listed = [dict(id=i, text=piece, logprob=logprob,
                   top=[dict(id=j, text=names(j), logprob=other) for j, other in likeliest])
              for i, piece, (logprob, likeliest) in zip(ids, pieces, tokens)]
    nats = total_nats(logprob for logprob, _ in tokens)
    totals = figures(nats, len(ids), len(text.encode()))
    in_windows = dict(figures(*windows), block_size=served.net.config.block_size)
    return json_bytes(dict(object='score', model=served.id, **totals, windows=in_windows, tokens=listed))


def figures(nats, count, size):
    """What is said of so many nats, of so many tokens and bytes."""
    loss = nats / count if count else None
    perplexity = math.exp(loss) if count and loss < 700 else None       # JSON has no infinity
    size = size if size > 0 else 0          # nan, where no token stands for any byte
    bits = nats / math.log(2) / size if size else None
    return dict(nats=nats, count=count, bytes=float(size), loss=loss, perplexity=perplexity, bits_per_byte=bits)
