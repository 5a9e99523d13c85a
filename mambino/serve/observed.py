"""A scheduler, of which it is counted what comes of its jobs.

    scheduler = Observed(Scheduler(…), metrics)     # metrics: see metrics.py, or None
    scheduler.submit(job, send)                     # as ever
    scheduler.is_busy()                             # whether anybody waits for it
"""
import threading
import time

from mambino.serve.told import NoModel
from mambino.serve.work import Done, Failed, Read, Token


class Observed:
    """See the top of the file; all that it has not is the scheduler's own."""

    def __init__(self, scheduler, metrics=None):
        self.scheduler = scheduler
        self.metrics = metrics
        self.lock = threading.Lock()
        self.at_work = 0                # jobs and calls that have not ended
        self.is_closed = False

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def is_busy(self):
        return self.at_work > 0

    def submit(self, job, send):
        watch = Watch(job, send, self)
        self.count(1)
        try:
            self.refuse_if_closed()
            return self.scheduler.submit(job, watch)
        except BaseException:
            watch.end()
            raise

    def call(self, function):
        self.count(1)
        try:
            self.refuse_if_closed()
            future = self.scheduler.call(function)
        except BaseException:
            self.count(-1)
            raise
        future.add_done_callback(lambda future: self.count(-1))
        return future

    def count(self, change):
        with self.lock:
            self.at_work += change

    def refuse_if_closed(self):
        if self.is_closed:
            raise NoModel('this model has left memory, or the server is ending: ask again', 503)

    def close(self):
        with self.lock:
            was_closed = self.is_closed
            self.is_closed = True
        if not was_closed:
            self.scheduler.close()


class Watch:
    """send(event) of a job, which passes on every event."""

    def __init__(self, job, send, observed):
        self.send = send
        self.observed = observed
        self.began = time.monotonic()
        self.latest = 0.0               # when the latest token came
        self.has_ended = False

    def __call__(self, event):
        metrics = self.observed.metrics
        if metrics:
            self.measure(event, metrics)
        if isinstance(event, (Done, Failed)):
            self.end()
        self.send(event)

    def measure(self, event, metrics):
        now = time.monotonic()
        if isinstance(event, Read):
            metrics.add('prompt_tokens', event.tokens)
            metrics.add('cached_tokens', event.cached)
        elif isinstance(event, Token):
            if self.latest:
                metrics.observe('between_tokens', now - self.latest)
            else:
                metrics.observe('first_token', now - self.began)
            self.latest = now
        elif isinstance(event, Done):
            metrics.add('generated_tokens', event.tokens)
            metrics.observe('answer', now - self.began)

    def end(self):
        if not self.has_ended:
            self.has_ended = True
            self.observed.count(-1)
