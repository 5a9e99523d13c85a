"""One thread owns the model and gives each answer a row of it, see work.py.

    scheduler = Scheduler(net, tok, Room())
    ticket = scheduler.submit(job, send)        # Full if too many wait
    future = scheduler.call(function)           # something else in the model's thread, between steps
    scheduler.close()

    waiting ──► reading: its prompt, by itself ──► a row ──► a token a step … ──► Done
                  │ between its layers                ▲          state and tokens ──► kept
                  └── the running rows have a step ───┘

All live rows have a step at once (batch.py), each draws its own token, and whoever is done makes
room for the next. What takes longer than a step, a prompt or a function of `call`, is computed as
ever, but between its layers the running rows have their turn whenever it took as long as a step of
theirs: so either side goes on at half of its speed at least, and a token never waits for a whole
prompt. Where many prompts wait that could all have rows they get more: all begin sooner, and steps
together are cheaper.
"""
import math
import queue
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from contextlib import nullcontext

import torch

from mambino.cache import DTYPES
from mambino.serve.batch import Batch
from mambino.serve.named import Named, told_of
from mambino.serve.reading import Reading
from mambino.serve.states import Kept, trimmed
from mambino.serve.tickets import Ticket, settle
from mambino.serve.turns import Turns
from mambino.serve.work import Done, Failed, Full, Read

RECENT = 5.0            # seconds whose tokens are the pace
PATIENCE = 600          # seconds of Full, at most
RUSH = 4                # rows for each prompt that waits, from which on rows have half of the time
SMOOTH = 0.2            # of a new measurement's weight in an average


class Stopped(BaseException):
    """What is computed is not wanted any more."""


class Scheduler:
    """See the top of the file. context: in which the model computes. out_dir, fingerprint: where
    sessions are kept, and of which model. turns: shared by the schedulers of several models."""

    def __init__(self, net, tok, room, context=None, out_dir='', fingerprint='', turns=None):
        self.net = net
        self.net.state_dtype = DTYPES[room.state_dtype]
        self.tok = tok
        self.room = room
        self.context = context or nullcontext()
        self.turns = turns or Turns()
        self.named = Named(out_dir, fingerprint, tok, next(net.parameters()).device, self.hand_in)
        self.inbox = queue.SimpleQueue()        # tickets, calls, None: to end
        self.count = 0                          # jobs that were handed in, and have no row yet
        self.lock = threading.Lock()            # of count
        self.waiting = deque()                  # tickets
        self.readings = []                      # of prompts, the oldest first
        self.calls = deque()                    # (function or generator, Future)
        self.batch = None                       # of answers, made in the thread
        self.rows = None                        # the batch's
        self.kept = Kept(room.kept_memory * 1e9)
        self.totals = dict(jobs=0, steps=0, prompt_tokens=0, cached_tokens=0, answer_tokens=0)
        self.recent = deque()                   # (time, tokens) of the latest steps
        self.job_seconds = 1.0                  # that a row is taken, on average
        self.step_seconds = 0.0                 # of a step, the latest few
        self.owed_seconds = 0.0                 # that rows have waited since
        self.mark = None                        # since when; None: nothing else is computed
        self.wanted = lambda: True              # whether what is computed else is wanted still
        self.is_shortest = self.is_call = False # whose turn it was: of the shortest prompt, of a call
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
            free = self.rows.room - self.rows.live if self.rows else self.room.rows
            if self.count >= self.room.queue + free:
                raise Full(self.seconds_to_wait())
            self.count += 1
        if job.session:
            self.named.open(ticket)             # and then it is handed in
        else:
            self.hand_in(ticket)
        return ticket

    def hand_in(self, item):
        """What the thread is to take in; if it has ended that is told."""
        with self.lock:
            if not self.is_over:
                return self.inbox.put(item)
        if isinstance(item, Ticket):
            item.problem = item.problem or ('the model has stopped', 503 if self.is_closed else 500)
            self.leave(item)
        elif callable(item):
            item()
        else:
            settle(item[1], error=RuntimeError('the model has stopped'))

    def call(self, function):
        """→ a Future of what function() returns, called in the model's thread between steps. One
        that is a generator function is gone through, a piece between steps: its value is what it
        returns. A Future that is cancelled stops it."""
        future = Future()
        self.hand_in((function, future))
        return future

    def is_alive(self):
        """Whether its thread works."""
        return self.thread.is_alive()

    def seconds_to_wait(self):
        """After which a row may be free."""
        rows = self.rows.room if self.rows else self.room.rows
        return min(PATIENCE, max(1, math.ceil(self.job_seconds * (self.count - self.room.queue + 1) / rows)))

    def stats(self):
        """{name: number} of rows, queue, tokens, states."""
        rows = self.rows
        now = time.perf_counter()
        recent = [(when, tokens) for when, tokens in self.recent.copy() if when > now - RECENT]
        return dict(
            self.totals,
            rows=rows.room if rows else self.room.rows,
            rows_used=rows.live if rows else 0,
            queue=self.count,
            tokens_per_second=sum(tokens for _, tokens in recent) / RECENT,
            step_seconds=self.step_seconds,
            kept_states=len(self.kept.entries),
            kept_bytes=self.kept.bytes,
            bytes_a_row=rows.bytes_a_row(rows.slots) if rows else 0,
        )

    def close(self):
        """Cancels all, and ends the thread."""
        self.is_closed = self.ending = True
        self.inbox.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join()
        self.named.close()

    # --- the model's thread ---------------------------------------------------------------------------

    def work(self):
        reason = 'the model has stopped'
        try:
            device = next(self.net.parameters()).device
            if device.type == 'cuda':                       # each thread has a present card of its own
                torch.cuda.set_device(device)
            with self.context, torch.no_grad(), self.turns:
                self.batch = Batch(self.net, self.tok, self.room.rows, self.tell, self.over,
                                   self.is_kept)
                self.rows = self.batch.rows
                if self.rows.logits.device.type == 'cpu':   # elsewhere a layer is not computed when it returns
                    self.net.between_layers = self.between
                while not self.ending:
                    self.go_round()
                self.batch.end_all()
        except BaseException as error:
            reason = f'the model has stopped: {told_of(error)[0]}'
            traceback.print_exc()
        finally:
            self.net.between_layers = None
            self.end_all(reason)
            self.kept.clear()
            if self.rows:
                self.rows.free()

    def end_all(self, reason):
        """Nobody waits for ever."""
        cancelled = self.ending
        self.ending = True
        with self.lock:
            self.is_over = True
        self.take_in(block=False)
        with self.lock:
            self.count -= len(self.waiting) + len(self.readings)
        tickets = [*self.waiting, *(reading.ticket for reading in self.readings)]
        tickets += [answer.ticket for answer in self.batch.answers] if self.batch else []
        for ticket in tickets:
            self.tell(ticket, Done('cancelled', '', 0) if cancelled else Failed(reason, 500))
        for _, future in self.calls:
            settle(future, error=RuntimeError(reason))
        for some in (self.waiting, self.readings, self.calls, self.batch.answers if self.batch else []):
            some.clear()

    def go_round(self):
        """Takes in what has come, and does a piece of each kind of work there is."""
        is_idle = not (self.waiting or self.readings or self.calls or self.batch.answers)
        if is_idle:
            self.owed_seconds = 0.0
            self.turns.leave()
            self.take_in(block=True)
            self.turns.take()
        self.take_in(block=False)
        if self.ending:
            return
        self.drop_cancelled()
        self.admit()
        aside = self.next_aside()
        if aside is not None:
            self.do_aside(aside)
        if self.batch.answers and (aside is None or self.owed_seconds >= self.step_seconds):
            self.step()
        self.turns.give_way()

    def take_in(self, block):
        """What has come in meanwhile; block: there is something, or one waits for it."""
        while True:
            try:
                item = self.inbox.get(block)
            except queue.Empty:
                return
            block = False
            if isinstance(item, Ticket):
                self.waiting.append(item)
            elif callable(item):
                item()
            elif item is not None:
                self.calls.append(item)

    def drop_cancelled(self):
        """Whoever waits no longer."""
        for ticket in [ticket for ticket in self.waiting if ticket.is_cancelled or ticket.problem]:
            self.waiting.remove(ticket)
            self.leave(ticket)
        for reading in [reading for reading in self.readings if reading.ticket.is_cancelled]:
            self.readings.remove(reading)
            self.leave(reading.ticket)
        self.batch.drop_cancelled()

    def leave(self, ticket):
        """A job that has no row yet goes."""
        with self.lock:
            self.count -= 1
        self.tell(ticket, Failed(*ticket.problem) if ticket.problem else Done('cancelled', '', 0))
        self.named.release(ticket)

    def tell(self, ticket, event):
        """Sends an event; whoever cannot be told anything is cancelled."""
        try:
            ticket.send(event)
        except Exception:
            ticket.is_cancelled = True

    # --- beside the rows: prompts, functions ----------------------------------------------------------

    def next_aside(self):
        """What is computed next beside the rows: a Reading, or a call's; None if there is nothing."""
        reading = self.next_reading()
        self.is_call = not self.is_call
        if self.calls and (reading is None or self.is_call):
            return self.calls.popleft()
        return reading

    def next_reading(self):
        """Of the prompts for which there is a row the one that came first, and by turns the shortest."""
        free = self.rows.room - self.rows.live - len(self.readings)
        while self.waiting and free > 0 and len(self.readings) < 2:
            if not self.begin(self.waiting.popleft()):
                continue
            free -= 1
        some = [reading for reading in self.readings if not reading.is_done]
        if not some:
            return None
        self.is_shortest = not self.is_shortest
        return min(some, key=Reading.left) if self.is_shortest else some[0]

    def begin(self, ticket):
        """A ticket's Reading; whether there is one."""
        try:
            if ticket.read is not None:
                reading = ticket.read.for_another(ticket)
            else:
                reading = Reading(ticket, self.net, self.tok, self.kept, self.named)
        except (Exception, SystemExit) as error:
            ticket.problem = told_of(error)
            self.leave(ticket)
            return False
        self.readings.append(reading)
        if reading.is_done:
            self.admit()
        return True

    def do_aside(self, aside):
        """A piece of it; the rows have their turns meanwhile."""
        self.mark = time.perf_counter()
        try:
            if isinstance(aside, Reading):
                self.wanted = lambda: not aside.ticket.is_cancelled
                self.read(aside)
            else:
                self.wanted = lambda: not aside[1].cancelled()
                self.go_on_with(*aside)
        finally:
            if self.rows.logits.device.type == 'cuda':
                torch.cuda.synchronize()
            if self.mark is not None:
                self.note_aside()
            self.mark = None

    def note_aside(self):
        """What was computed beside the rows since the mark, they are owed: as much time, or less
        where several prompts could have rows, too, and the steps that wait for them are worth
        more."""
        seconds = time.perf_counter() - self.mark
        prompts = min(len(self.waiting) + len(self.readings), self.rows.room - self.rows.live)
        self.owed_seconds += seconds * (min(1, self.rows.live / (RUSH * prompts)) if prompts > 1 else 1)

    def between(self):
        """Between two layers of what is computed beside the rows: they have a step if it is their turn."""
        if self.mark is None or threading.current_thread() is not self.thread:
            return
        if self.ending or not self.wanted():
            raise Stopped
        self.note_aside()
        self.mark = None                        # a step has layers, too
        while self.batch.answers and self.owed_seconds >= self.step_seconds:
            self.take_in(block=False)
            self.batch.drop_cancelled()
            if self.batch.answers:
                self.step()
        if not self.batch.answers:
            self.owed_seconds = 0.0
        self.turns.give_way()
        self.mark = time.perf_counter()

    def read(self, reading):
        """A piece of a prompt."""
        try:
            reading.piece()
        except Stopped:
            return                              # drop_cancelled tells it
        except (Exception, SystemExit) as error:
            self.readings.remove(reading)
            reading.ticket.problem = told_of(error)
            self.leave(reading.ticket)
            return
        if reading.is_done:
            self.keep_read(reading)
            self.admit()

    def keep_read(self, reading):
        """What was read stays for later, and for those who wait with the same prompt."""
        if reading.ticket.session is not None:
            return
        if reading.top < 0:
            self.kept.add(reading.ids, trimmed(reading.state, self.rows.window), reading.logits)
        key = reading.ticket.key()
        for other in self.waiting:
            if not other.job.session and other.key() == key:
                other.read = reading
        for place, other in enumerate(self.readings):
            if other is not reading and not other.ticket.job.session and other.ticket.key() == key:
                self.readings[place] = reading.for_another(other.ticket)

    def admit(self):
        """Gives rows to those whose prompt is read."""
        for reading in [reading for reading in self.readings if reading.is_done]:
            job = reading.ticket.job
            most = len(reading.ids) + len(job.owed) + job.max_tokens    # an id may spell a single byte of it
            if job.max_tokens > 0 and not self.rows.has_room(most):
                break
            self.readings.remove(reading)
            with self.lock:
                self.count -= 1
            self.totals['jobs'] += 1
            self.totals['prompt_tokens'] += len(reading.ids)
            self.totals['cached_tokens'] += reading.cached
            self.tell(reading.ticket, Read(len(reading.ids), reading.cached, reading.logprobs))
            if job.max_tokens > 0:
                try:
                    self.batch.add(reading)
                except (Exception, SystemExit) as error:
                    self.finish(reading.ticket, Failed(*told_of(error)))
            else:
                self.named.finish(reading.ticket, reading.state, reading.logits, [])
                self.finish(reading.ticket, Done('length', '', 0))

    def go_on_with(self, function, future):
        """Calls a function, or goes on with a generator."""
        if future.cancelled():
            return
        try:
            result = next(function) if hasattr(function, '__next__') else function()
            if hasattr(result, '__next__') and not hasattr(function, '__next__'):
                self.calls.append((result, future))
            elif hasattr(function, '__next__'):
                self.calls.append((function, future))
            else:
                settle(future, result)
        except StopIteration as end:
            settle(future, end.value)
        except Stopped:
            settle(future, error=RuntimeError('the model has stopped'))
        except BaseException as error:
            settle(future, error=error)

    # --- the rows -------------------------------------------------------------------------------------

    def step(self):
        """A step of the rows; what it takes, they have had."""
        began = time.perf_counter()
        tokens = self.batch.step()
        now = time.perf_counter()
        seconds = now - began
        self.step_seconds += (seconds - self.step_seconds) * (SMOOTH if self.step_seconds else 1)
        self.owed_seconds = max(0.0, self.owed_seconds - seconds)
        self.totals['steps'] += 1
        self.totals['answer_tokens'] += tokens
        self.recent.append((now, tokens))
        while self.recent[0][0] < now - RECENT:
            self.recent.popleft()

    def over(self, answer, event, state, logits, ids):
        """An answer is over, and its row free; state: after all of ids, None if that is of no use."""
        ticket = answer.ticket
        if state is not None and ticket.session is not None:
            self.named.finish(ticket, state, logits, answer.drawn)
        elif state is not None:
            self.kept.add(ids, state, logits)
        self.finish(ticket, event)
        self.job_seconds += SMOOTH * (time.perf_counter() - answer.began - self.job_seconds)

    def is_kept(self, answer):
        """Whether its state at the end may be of use: not that of what is only scored."""
        return answer.job.prompt_logprobs < 0 and self.rows.bytes_a_row(0) < self.kept.limit

    def finish(self, ticket, event):
        """The last event of a job, after its session is on the disk."""
        if ticket.session is None:
            self.tell(ticket, event)
        else:
            self.named.close_after(ticket, event, lambda done: self.tell(ticket, done))
