"""The thread of a model that fills holes: several texts by turns, a step of each.

    filling = Filling(net, tok, Room())         # in the place of a scheduler.py
    ticket = filling.submit(job, send)          # a Fill; Full if too many wait
    filling.close()

    waiting ──► begun, as many as a scheduler has rows ──► a step, by turns … ──► Done
                  └──► Read                                  └──► Frame, if wanted

A step is a call of the network for one window or one block, see sample/uncover.py. Each text has a generator of its
own, and is what it is alone. Between the layers other models have their turn, and whoever is cancelled ends.
"""
import math
import queue
import threading
import time
import traceback
from collections import deque
from contextlib import nullcontext

import torch

from mambino.sample.filled import end_of, going_on, text_of, written
from mambino.sample.uncover import Filler
from mambino.serve.named import told_of
from mambino.serve.scheduler import PATIENCE, RECENT, SMOOTH, Stopped
from mambino.serve.tickets import Ticket
from mambino.serve.told import told
from mambino.serve.turns import Turns
from mambino.serve.work import Done, Failed, Frame, Full, Read

PAUSE = 0.05            # seconds between two frames of a text, at least


class Text:
    """What is filled: its ids so far, and what goes on with them."""

    def __init__(self, ticket, net, tok, device):
        job = ticket.job
        self.ticket = ticket
        self.job = job
        self.tok = tok
        sampling = dict(temperature=job.temperature, top_k=job.top_k, top_p=job.top_p, min_p=job.min_p)
        self.filler = Filler(net, tok, device, job.sampler, job.steps, sampling, ends=job.goes_on)
        generator = torch.Generator().manual_seed(job.seed)
        if job.goes_on:
            self.steps = going_on(self.filler, tok, job.ids, generator, job.stops, job.end_ids)
        else:
            self.steps = self.filler.fill(job.ids, generator)
        self.ids = job.ids
        self.holes = self.hidden = job.ids.count(self.filler.mask_id)
        self.began = self.shown = time.perf_counter()

    def step(self):
        """→ how many tokens were found; None at the end."""
        ids = next(self.steps, None)
        if ids is None:
            return None
        before = self.hidden
        self.ids = ids
        self.hidden = ids.count(self.filler.mask_id)
        return before - self.hidden

    def frame(self):
        answer = self.ids[self.job.first:self.job.last]
        return Frame(text_of(self.tok, answer, self.filler.mask_id, begins=False), self.holes - self.hidden)

    def done(self):
        """The last event."""
        job = self.job
        writer = written(self.tok, self.ids[:job.last], job.first, job.stops, job.end_ids)
        reason = 'stop' if writer.done else 'length'
        if job.goes_on:
            return Done(reason, end_of(writer), writer.length)
        writer.close()
        return Done(reason, writer.text, self.holes)


class Filling:
    """See the top of the file. context: in which the model computes; turns: shared with other models."""

    def __init__(self, net, tok, room, context=None, turns=None):
        self.net = net
        self.tok = tok
        self.room = room
        self.context = context or nullcontext()
        self.turns = turns or Turns()
        self.inbox = queue.SimpleQueue()        # tickets, None: to end
        self.count = 0                          # tickets that were handed in, and have not begun
        self.lock = threading.Lock()            # of count, is_over
        self.waiting = deque()                  # tickets
        self.texts = deque()                    # that have begun; the next one's turn is first
        self.current = None                     # whose turn it is
        self.totals = dict(jobs=0, steps=0, prompt_tokens=0, answer_tokens=0)
        self.recent = deque()                   # (time, tokens) of the latest steps
        self.job_seconds = 1.0                  # that a text takes, on average
        self.ending = False                     # its thread ends after this round
        self.is_closed = False                  # somebody wanted that
        self.is_over = False                    # it takes in nothing any more
        self.thread = threading.Thread(target=self.work, name='model', daemon=True)
        self.thread.start()

    # --- from other threads ---------------------------------------------------------------------------

    def submit(self, job, send):
        """→ a Ticket; Full where too many wait already. send(event) is called in the model's thread."""
        ticket = Ticket(job, send)
        with self.lock:
            if not self.is_over:
                late = self.count - self.room.queue - self.room.rows + len(self.texts)
                if late >= 0:
                    raise Full(min(PATIENCE, max(1, math.ceil(self.job_seconds * (late + 1) / self.room.rows))))
                self.count += 1
                self.inbox.put(ticket)
                return ticket
        self.tell(ticket, Failed('the model has stopped', 503 if self.is_closed else 500))
        return ticket

    def is_alive(self):
        """Whether its thread works."""
        return self.thread.is_alive()

    def stats(self):
        """{name: number} of texts, queue, tokens."""
        now = time.perf_counter()
        recent = [tokens for when, tokens in self.recent.copy() if when > now - RECENT]
        return dict(self.totals, rows=self.room.rows, rows_used=len(self.texts), queue=self.count,
                    tokens_per_second=sum(recent) / RECENT)

    def close(self):
        """Cancels all, and ends the thread."""
        self.is_closed = self.ending = True
        self.inbox.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    # --- the model's thread ---------------------------------------------------------------------------

    def work(self):
        end = Failed('the model has stopped', 500)
        try:
            device = next(self.net.parameters()).device
            if device.type == 'cuda':                       # each thread has a present card of its own
                torch.cuda.set_device(device)
            with self.context, torch.no_grad(), self.turns:
                if device.type == 'cpu':                    # elsewhere a layer is not computed when it returns
                    self.net.between_layers = self.between
                while not self.ending:
                    self.go_round(device)
            end = Done('cancelled', '', 0)
        except BaseException as error:
            traceback.print_exc()
            end = Failed(f'the model has stopped: {told_of(error)[0]}', 500)
        finally:
            self.net.between_layers = None
            with self.lock:
                self.is_over = True
                self.take_in(block=False)
                self.count = 0
            for ticket in [*(text.ticket for text in self.texts), *self.waiting]:
                self.tell(ticket, end)
            self.texts.clear()
            self.waiting.clear()

    def go_round(self, device):
        """Takes in what has come, and does a step of one text."""
        if not (self.waiting or self.texts):
            self.turns.leave()
            self.take_in(block=True)
            self.turns.take()
        self.take_in(block=False)
        if self.ending:
            return
        self.drop_cancelled()
        while self.waiting and len(self.texts) < self.room.rows:
            self.begin(self.waiting.popleft(), device)
        if self.texts:
            self.step()
        self.turns.give_way()

    def take_in(self, block):
        """What has come in meanwhile; block: there is something, or one waits for it."""
        while True:
            try:
                ticket = self.inbox.get(block)
            except queue.Empty:
                return
            block = False
            if ticket is not None:
                self.waiting.append(ticket)

    def drop_cancelled(self):
        """Whoever waits no longer."""
        for ticket in [ticket for ticket in self.waiting if ticket.is_cancelled]:
            self.waiting.remove(ticket)
            self.leave_queue()
            self.tell(ticket, Done('cancelled', '', 0))
        for text in [text for text in self.texts if text.ticket.is_cancelled]:
            self.finish(text, Done('cancelled', '', 0))

    def leave_queue(self):
        with self.lock:
            self.count -= 1

    def begin(self, ticket, device):
        """A text is begun."""
        try:
            text = Text(ticket, self.net, self.tok, device)
        except (Exception, SystemExit) as error:
            self.leave_queue()
            self.tell(ticket, Failed(*told_of(error)))
            return
        with self.lock:                         # at once: else one more could come in between
            self.count -= 1
            self.texts.append(text)
        given = len(text.ids) - text.holes
        self.totals['jobs'] += 1
        self.totals['prompt_tokens'] += given
        self.tell(ticket, Read(given, 0, []))
        if text.job.frames:
            self.tell(ticket, text.frame())

    def step(self):
        """A step of the text whose turn it is."""
        text = self.current = self.texts[0]
        self.texts.rotate(-1)
        try:
            with told(500):
                found = text.step()
                done = text.done() if found is None else None
        except Stopped:
            return                              # drop_cancelled tells it, or the end of all
        except (Exception, SystemExit) as error:
            self.finish(text, Failed(*told_of(error)))
            return
        finally:
            self.current = None
        if done:
            self.finish(text, done)
            return
        now = time.perf_counter()
        self.totals['steps'] += 1
        self.totals['answer_tokens'] += found
        self.recent.append((now, found))
        while self.recent[0][0] < now - RECENT:
            self.recent.popleft()
        if text.job.frames and now - text.shown >= PAUSE:
            text.shown = now
            self.tell(text.ticket, text.frame())

    def between(self):
        """Between two layers: other models have their turn."""
        if self.current is None or threading.current_thread() is not self.thread:
            return
        if self.ending or self.current.ticket.is_cancelled:
            raise Stopped
        self.turns.give_way()

    def finish(self, text, event):
        """A text is over."""
        self.texts.remove(text)
        self.job_seconds += SMOOTH * (time.perf_counter() - text.began - self.job_seconds)
        self.tell(text.ticket, event)

    def tell(self, ticket, event):
        """Sends an event; whoever cannot be told anything is cancelled."""
        try:
            ticket.send(event)
        except Exception:
            ticket.is_cancelled = True
