"""POST /v1/completions: texts that a model goes on with.

    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "Once upon a time", "max_tokens": 50}'

    body ──► parameters ──► prompts ──► jobs ──► answers ──► choices, whole or as a stream

Choice number p * n + i is answer i to prompt p. What a model that fills holes has in the place of jobs and choices
stands in fills.py.
"""
import asyncio
import os
import secrets
import time
from functools import partial

from fastapi import Request

from mambino.sample import sessions
from mambino.serve.answers import Answers, Choice, usage_of
from mambino.serve.errors import body_of
from mambino.serve.fills import FilledChoice, check_forwards, fills_asked
from mambino.serve.jobs import check_length, check_rows, ids_prompt, jobs_of, text_prompt
from mambino.serve.logprobs import as_completion, names_of
from mambino.serve.parameters import COMPLETION, read
from mambino.serve.sending import DONE, LONG, Shape, event_of, opened, respond
from mambino.serve.told import Refused


def add_completions(app, library, limits):
    """Puts it on an app. limits: see api.py."""

    @app.post('/v1/completions')
    async def completions(request: Request):
        deadline = asyncio.get_running_loop().time() + limits.timeout
        values = read(COMPLETION, await body_of(request))
        check(values)
        served, (prompts, jobs) = await opened(library, values.model, lambda served: asked(served, values, limits))
        if served.fills_holes:
            choices = [FilledChoice(job, values.echo) for job in jobs]
            shape = Frames(served, values, prompts, choices)
        else:
            count = values.best_of or values.n
            echoes = [prompt.text if values.echo else '' for prompt in prompts]
            choices = [Choice(served.tok, job, echoes[i // count], values.logprobs is not None)
                       for i, job in enumerate(jobs)]
            shape = Completions(served, values, prompts, choices)
        return await respond(request, Answers(served.scheduler, jobs, deadline, values.stream), choices, shape)


def check(values):
    """Refused if parameters do not go together."""
    best_of = values.best_of or values.n
    total = len(values.prompt) * best_of
    if best_of < values.n:
        raise Refused(f'best_of is {best_of}; it must be at least n, which is {values.n}', param='best_of')
    if values.stream and best_of > values.n:
        raise Refused('which answers are the best is known at the end: best_of and stream do not go together',
                      param='best_of')
    if values.session and total > 1:
        raise Refused('a session has one text: ask for one answer to one prompt', param='session')
    if values.session and values.echo and values.logprobs is not None:
        raise Refused('of a session only the answer has logprobs: leave echo out', param='echo')
    if values.heal and values.logprobs is not None:
        raise Refused('heal changes where tokens begin: it and logprobs do not go together', param='heal')


def asked(served, values, limits):
    """→ (the Prompts, the Jobs) of a request."""
    if served.fills_holes:
        return fills_asked(served, values, limits)
    check_forwards(served, values)
    tok = served.tok
    each = values.best_of or values.n
    check_rows(len(values.prompt) * each, served.scheduler)
    heals = values.heal
    if heals is None:
        heals = not values.echo and values.logprobs is None
    begins = not values.session or not os.path.lexists(sessions.path_of(served.out_dir, values.session))
    prompts = []
    for prompt in values.prompt:
        make = partial(text_prompt, heal=heals) if isinstance(prompt, str) else ids_prompt
        prompts.append(make(tok, prompt, begins=begins))
        check_length(prompts[-1], limits, 'prompt')
    listed = -1
    if values.logprobs is not None:
        names_of(tok)                   # now, in this thread
        listed = values.logprobs
    elif each > values.n:
        listed = 0                      # to know the best
    jobs = jobs_of(
        served, values, prompts, each,
        max_tokens=min(values.max_tokens, limits.max_tokens),
        logprobs=listed,
        prompt_logprobs=values.logprobs if values.echo and values.logprobs is not None else -1,
        session=values.session,
    )
    return prompts, jobs


class Completions(Shape):
    """The answers as this API has them."""

    def __init__(self, served, values, prompts, choices):
        super().__init__(choices)
        self.tok = served.tok
        self.values = values
        self.prompts = prompts
        self.head = dict(id=f'cmpl-{secrets.token_hex(12)}', object='text_completion', created=int(time.time()),
                         model=served.id, system_fingerprint=f'fp_{served.fingerprint[:12]}')

    def whole(self):
        n = self.values.n
        count = len(self.choices) // len(self.prompts)
        told = []
        for first in range(0, len(self.choices), count):
            answers = self.choices[first:first + count]
            if count > n:
                answers = sorted(answers, key=lambda choice: -choice.logprob / max(1, choice.tokens))[:n]
            told += [self.told(choice, first // count * n + i) for i, choice in enumerate(answers)]
        return dict(self.head, choices=told, usage=usage_of(self.prompts, self.choices))

    def told(self, choice, index):
        """A choice: what is new of it."""
        text, entries = choice.new()
        logprobs = as_completion(self.tok, entries) if choice.listing else None
        return dict(text=text, index=index, logprobs=logprobs, finish_reason=choice.reason)

    def news(self, choice, index):
        if not (choice.pieces or choice.entries or choice.reason):
            return b''
        is_long = len(choice.entries) > LONG
        return event_of(self.chunk([self.told(choice, index)]), is_long)

    def chunk(self, choices, usage=None):
        body = dict(self.head, choices=choices)
        if self.values.stream_options:
            body['usage'] = usage
        return body

    def end(self):
        if not self.values.stream_options:
            return DONE
        return event_of(self.chunk([], usage_of(self.prompts, self.choices))) + DONE


class Frames(Completions):
    """The same of texts that are uncovered out of order: a stream has each as it is now, and at the end its text."""

    def news(self, choice, index):
        if choice.frame is None:
            return b''
        told = dict(self.told(choice, index), frame=choice.frame)
        choice.frame = None
        return event_of(self.chunk([told]))
