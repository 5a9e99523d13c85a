"""Answers on their way over the wire: whole, or as a stream of server-sent events.

    served, jobs = await opened(library, values.model, make)
    return await respond(request, answers, choices, shape)

    answers.streams? ──► yes: EventStream, events as they come
                     ──► no: collect, shape.whole() when all is there

A shape says what a request's answers look like in one of OpenAI's APIs. A stream begins at once and
says `: ping` in long silences, so that nobody in between takes the connection for dead; what goes
wrong then is an event, too.
"""
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from mambino.serve.answers import LATE, NO_RETRY, Gone
from mambino.serve.bodies import ENCODE, json_bytes
from mambino.serve.errors import error_of
from mambino.serve.told import Refused
from mambino.serve.work import Read

HEADERS = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}      # nginx would keep events until it has many
PING = b': ping\n\n'
DONE = b'data: [DONE]\n\n'
LONG = 64               # tokens with logprobs that the event loop does not deal with itself


class Shape:
    """What the answers of a request look like, of which a subclass says the rest. choices: see
    answers.py."""

    def __init__(self, choices):
        self.choices = choices

    def whole(self):
        """A dict, when all is there; made in a thread."""

    def begin(self):
        """Bytes of the events that a stream begins with."""
        return b''

    def news(self, choice, index):
        """Bytes of the events that say what is new of a choice."""

    def end(self):
        """Bytes of the events that a stream ends with."""
        return DONE

    def failed(self, error):
        """Bytes of the events that end it instead. error: a Refused."""
        return event_of(error_of(error.message, error.status, error.param, error.code)) + DONE


def event_of(value, is_long=False):
    """A server-sent event with JSON in it. is_long: see bodies.py; it takes longer, if it is not."""
    body = json_bytes(value, ENCODE) if is_long else ENCODE(value).encode()
    return b'data: ' + body + b'\n\n'


async def opened(library, name, make):
    """→ (the Served of this name, make(served)); that is made in a thread, since a long text may
    have to be encoded."""
    served = await library.fetch(name)
    return served, await run_in_threadpool(make, served)


async def respond(request, answers, choices, shape):
    """The Response with answers, as they come or when all are there."""
    if answers.streams:
        return EventStream(answers, choices, shape)
    return await collect(request, answers, choices, shape)


async def collect(request, answers, choices, shape):
    """The Response with all answers. If the client goes away meanwhile, nobody gets it."""
    try:
        async with answers.listening(request.receive):
            while (events := await answers.events()) is not None:
                await beside(events, take, choices, events)
            check_begun(answers, choices)
    except Gone:
        return Response(status_code=499)
    body = await run_in_threadpool(lambda: json_bytes(shape.whole()))      # logprobs of long prompts take a while
    return Response(body, media_type='application/json')


async def beside(events, function, *arguments):
    """function(*arguments), in a thread if events have the logprobs of a long prompt."""
    if any(type(event) is Read and len(event.logprobs) > LONG for _, event in events):
        return await run_in_threadpool(function, *arguments)
    return function(*arguments)


def take(choices, events):
    """Each choice takes its events → {index: the choice} of those that had one."""
    touched = {}
    for index, event in events:
        choices[index].take(event)
        touched[index] = choices[index]
    return touched


def check_begun(answers, choices):
    """Refused if time was over before a prompt was read, or holes were filled: what is there would look like an
    answer."""
    if not all(choice.is_read for choice in choices):
        why = LATE if answers.is_late else 'the model has left memory, or the server is ending'
        raise Refused(f'{why}, and {choices[0].unread}', 503, headers=NO_RETRY if answers.is_late else None)


class EventStream(StreamingResponse):
    """The Response with answers as they come."""

    def __init__(self, answers, choices, shape):
        super().__init__(iter(()), headers=HEADERS, media_type='text/event-stream')
        self.answers = answers
        self.choices = choices
        self.shape = shape

    async def __call__(self, scope, receive, send):
        async def write(body, more=True):
            await send({'type': 'http.response.body', 'body': body, 'more_body': more})

        await send({'type': 'http.response.start', 'status': 200, 'headers': self.raw_headers})
        try:
            async with self.answers.listening(receive):
                await write(self.shape.begin())
                while (events := await self.answers.events()) is not None:
                    body = await beside(events, self.told, events) if events else PING
                    if body:
                        await write(body)
                check_begun(self.answers, self.choices)
                await write(self.shape.end(), more=False)
        except Gone:
            pass
        except Refused as error:
            await write(self.shape.failed(error), more=False)

    def told(self, events):
        """Bytes that say what is new: of each answer at once all that has come."""
        touched = take(self.choices, events)
        return b''.join([self.shape.news(choice, index) for index, choice in touched.items()])
