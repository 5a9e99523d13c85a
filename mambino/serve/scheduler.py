"""One thread owns the model and gives each answer a row of it, see work.py.

    scheduler = Scheduler(net, tok, Room())
    ticket = scheduler.submit(job, send)        # Full if too many wait
    future = scheduler.call(function)           # something else in the model's thread, between steps
    scheduler.close()
"""
import queue
import threading
from concurrent.futures import Future
from contextlib import nullcontext

import torch

from mambino.sample.generation import Rows, logprobs_of, prefill
from mambino.sample.healing import look_ahead
from mambino.sample.text import Writer
from mambino.serve.work import Done, Failed, Full, Logprob, Read, Token


class Ticket:
    """A job on its way."""

    def __init__(self, job, send):
        self.job = job
        self.send = send
        self.is_cancelled = False

    def cancel(self):
        self.is_cancelled = True


class Scheduler:
    """See the top of the file. context: in which the model computes."""

    def __init__(self, net, tok, room, context=None):
        self.net = net
        self.tok = tok
        self.room = room
        self.context = context or nullcontext()
        self.waiting = queue.Queue()
        self.thread = threading.Thread(target=self.work, name='model', daemon=True)
        self.thread.start()

    def submit(self, job, send):
        """→ a Ticket; Full where too many wait already. send(event) is called in the model's thread."""
        if self.waiting.qsize() >= self.room.queue:
            raise Full(1)
        ticket = Ticket(job, send)
        self.waiting.put(ticket)
        return ticket

    def call(self, function):
        """→ a Future of what function() returns, called in the model's thread between steps. One that is
        a generator function is gone through, a piece between steps: its value is what it returns."""
        future = Future()
        self.waiting.put((function, future))
        return future

    def is_alive(self):
        """Whether its thread works."""
        return self.thread.is_alive()

    def stats(self):
        """{name: number} of rows, queue, tokens, states."""
        return dict(rows=self.room.rows, rows_used=0, queue=self.waiting.qsize())

    def close(self):
        """Cancels all, and ends the thread."""
        self.waiting.put(None)
        self.thread.join()

    def work(self):
        with self.context, torch.no_grad():
            while (item := self.waiting.get()) is not None:
                if isinstance(item, tuple):
                    function, future = item
                    try:
                        result = function()
                        if hasattr(result, 'send'):
                            while True:
                                try:
                                    next(result)
                                except StopIteration as end:
                                    result = end.value
                                    break
                        future.set_result(result)
                    except BaseException as error:
                        future.set_exception(error)
                    continue
                try:
                    self.answer(item)
                except Exception as error:
                    item.send(Failed(f'{type(error).__name__}: {error}'))

    def answer(self, ticket):
        job = ticket.job
        V = self.tok.vocab_size
        read = prefill(self.net, job.ids)
        ticket.send(Read(len(job.ids), 0, []))
        rows = Rows(self.net, V, job.repetition_penalty)
        rows.add([read], [look_ahead(self.net, self.tok, read, job.owed)])
        writer = Writer(self.tok, job.stops, job.ids, job.end_ids, keep=False, owed=job.owed)
        generator = torch.Generator().manual_seed(job.seed)
        while not writer.done and writer.length < job.max_tokens and not ticket.is_cancelled:
            ids = rows.draw(generator=[generator], temperature=job.temperature, top_k=job.top_k, top_p=job.top_p,
                            min_p=job.min_p)
            i = int(ids)
            logprob = None
            if job.logprobs >= 0:
                own, top = logprobs_of(rows.logits, ids, job.logprobs, V)[0]
                logprob = Logprob(i, own, top)
            before = writer.length
            text = writer.feed(i)
            ticket.send(Token(i, text, logprob, writer.length == before))
            if not writer.done:
                rows.advance(ids)
        reason = 'cancelled' if ticket.is_cancelled else 'stop' if writer.done else 'length'
        ticket.send(Done(reason, writer.close(), writer.length))
