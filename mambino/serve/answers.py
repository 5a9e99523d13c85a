"""The answers of one request on their way from the model's thread to the client.

    answers = Answers(served.scheduler, jobs, deadline)     # Full if they cannot wait
    async with answers.listening(receive):                  # and if the client goes away, they end
        while (events := await answers.events()) is not None:
            for index, event in events:
                choices[index].take(event)

    model's thread ──► Mailbox ──► Answers ──► Choice ──► text and logprobs that are new

The model's thread wakes the event loop once for all that it has sent meanwhile, and a request gets
all that is there for it at once: what a token costs beside the model is small.
"""
import asyncio
import weakref
from collections import deque
from contextlib import asynccontextmanager
from functools import partial

from mambino.detokenizer import BROKEN
from mambino.serve.logprobs import Listing
from mambino.serve.told import Refused
from mambino.serve.work import Done, Failed, Read, Token

PING = 10.0             # seconds of silence after which a stream says that it is alive
GRACE = 5.0             # seconds in which jobs that are cancelled end
LATE = 'the time of the request is over (--timeout)'
NO_RETRY = {'x-should-retry': 'false'}      # clients try again after 503 unless they are told not to


class Gone(Exception):
    """The client has closed the connection."""


class Mailbox:
    """Events on their way into an event loop."""

    def __init__(self, loop):
        self.loop = weakref.proxy(loop)
        self.events = deque()           # (Answers, index, event)
        self.is_called = False

    def put(self, answers, index, event):
        """Called in the model's thread, where nothing may be raised."""
        self.events.append((answers, index, event))
        if not self.is_called:
            self.is_called = True
            try:
                self.loop.call_soon_threadsafe(self.deliver)
            except (RuntimeError, ReferenceError):      # the loop is closed: nobody waits any more
                pass

    def deliver(self):
        self.is_called = False          # before the events are taken: none can be left without a call
        while self.events:
            answers, index, event = self.events.popleft()
            answers.inbox.append((index, event))
            if answers.streams or type(event) in (Done, Failed):
                answers.wake.set()


MAILBOXES = weakref.WeakKeyDictionary()             # {event loop: Mailbox}


def mailbox():
    """Of the event loop that is running."""
    loop = asyncio.get_running_loop()
    if loop not in MAILBOXES:
        MAILBOXES[loop] = Mailbox(loop)
    return MAILBOXES[loop]


class Answers:
    """See the top of the file. deadline: in the event loop's time, when the answers end as they
    are. streams: tokens are wanted as they come, else when one of the answers is over."""

    def __init__(self, scheduler, jobs, deadline, streams=True):
        self.deadline = deadline
        self.streams = streams
        self.inbox = []                 # (index of the job, event)
        self.wake = asyncio.Event()
        self.running = len(jobs)
        self.is_late = False
        self.is_gone = False
        self.is_stuck = False
        self.is_silent = False
        self.tickets = []
        put = mailbox().put
        try:
            for index, job in enumerate(jobs):
                self.tickets.append(scheduler.submit(job, partial(put, self, index)))
        except BaseException:           # Full, or the model has left
            self.cancel()
            raise

    def cancel(self):
        for ticket in self.tickets:
            ticket.cancel()

    @asynccontextmanager
    async def listening(self, receive):
        """While it lasts, jobs are cancelled at the deadline, and at once if the client goes away;
        behind it, all that still run. receive: of ASGI, after the request's body."""
        loop = asyncio.get_running_loop()
        watcher = asyncio.create_task(self.watch(receive))
        timers = [
            loop.call_at(self.deadline, self.expire),
            loop.call_at(self.deadline + GRACE, self.give_up),
        ]
        pulse = asyncio.create_task(self.pulse())
        try:
            yield self
        finally:
            for timer in (*timers, watcher, pulse):
                timer.cancel()
            if self.running:
                self.cancel()

    async def watch(self, receive):
        while (await receive())['type'] != 'http.disconnect':
            pass
        self.is_gone = True
        self.cancel()
        self.wake.set()

    async def pulse(self):
        while True:
            await asyncio.sleep(PING)
            self.is_silent = True
            self.wake.set()

    def expire(self):
        self.is_late = True
        self.cancel()

    def give_up(self):
        self.is_stuck = True
        self.wake.set()

    async def events(self):
        """[(index of the job, event), …] of all that came meanwhile; [] after a silence; None at
        the end. Gone if the client has."""
        while not self.is_gone:
            if self.inbox:
                events, self.inbox = self.inbox, []
                self.is_silent = False
                self.running -= sum(type(event) in (Done, Failed) for _, event in events)
                return events
            if not self.running:
                return None
            if self.is_stuck:
                raise Refused(f'{LATE}, and the model is still at something else', 503, headers=NO_RETRY)
            if self.is_silent:
                self.is_silent = False
                return []
            self.wake.clear()
            await self.wake.wait()
        raise Gone


class Choice:
    """One answer while it grows. echo: the text of its prompt if that stands before it. lists:
    whether its logprobs are wanted. strips: white space at its beginning is none of it."""
    unread = 'the prompt was not read'      # what is wrong where it has come to nothing

    def __init__(self, tok, job, echo='', lists=False, strips=False):
        self.echo = echo
        self.end_ids = {tok.eot, *job.end_ids}
        self.strips = strips
        self.listing = None
        if lists:
            self.listing = Listing(tok, () if job.prompt_logprobs >= 0 else job.ids)
        if self.listing and job.prompt_logprobs < 0:
            self.listing.offset = len(echo)
        self.pieces = [echo] if echo else []
        self.length = len(echo)         # of the text, with white space that is left out
        self.entries = []               # logprobs that can be shown
        self.last = None                # id
        self.logprob = 0.0              # of all its tokens, if they were asked for
        self.reason = None              # 'stop' or 'length', when it is over
        self.is_read = False
        self.cached = 0                 # tokens of the prompt
        self.tokens = 0                 # of the answer

    def take(self, event):
        """Takes up an event; Refused if there is no answer."""
        kind = type(event)
        if kind is Token:
            self.last = event.id
            if not event.spells:
                self.tokens += 1
            if event.logprob:
                self.logprob += event.logprob.logprob
            if self.listing:
                self.listing.add(event.id, event.logprob)
            self.show(event.text)
        elif kind is Read:
            self.is_read = True
            self.cached = event.cached
            for logprob in event.logprobs if self.listing else ():
                self.listing.add(logprob.id, logprob)
            self.show('')
        elif kind is Done:
            self.end(event)
        elif kind is Failed:
            raise Refused(event.message, event.status)

    def show(self, text):
        self.length += len(text)
        if self.strips:
            text = text.lstrip()
            self.strips = not text
        if text:
            self.pieces.append(text)
        if self.listing:
            self.entries += self.listing.take(self.length)

    def end(self, event):
        """Of a character whose end the model did not write there is nothing to show."""
        self.reason = 'stop' if event.reason == 'stop' else 'length'
        self.tokens = event.tokens
        self.show(event.text.rstrip(BROKEN))
        is_stopped = self.reason == 'stop' and self.last not in self.end_ids
        if self.listing and not is_stopped:     # what stands behind a stop is not told
            self.entries += self.listing.take_rest()

    def new(self):
        """→ (the text, the logprobs' entries) since the last time."""
        text = ''.join(self.pieces)
        entries = self.entries
        self.pieces = []
        self.entries = []
        return text, entries


def usage_of(prompts, choices):
    """The usage of a request: choices belong to prompts in order, as many to each."""
    count = len(choices) // len(prompts)
    read = sum(len(prompt.ids) for prompt in prompts)
    cached = sum(choice.cached for choice in choices[::count])
    written = sum(choice.tokens for choice in choices)
    return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written,
                prompt_tokens_details=dict(cached_tokens=cached))
