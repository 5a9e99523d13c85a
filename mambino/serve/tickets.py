"""A job on its way through the scheduler, and a Future that may be unwanted."""
from concurrent.futures import InvalidStateError


class Ticket:
    """A job on its way."""

    def __init__(self, job, send):
        self.job = job
        self.send = send
        self.is_cancelled = False
        self.problem = None             # why there is no answer: (message, status)
        self.session = None             # that the answer goes on with, a Session
        self.path = None                # of its file
        self.read = None                # a Reading of the same prompt, done

    def cancel(self):
        """Its row is free before the next step; Done('cancelled') is sent."""
        self.is_cancelled = True

    def key(self):
        """What two jobs have in common whose prompt is read once."""
        job = self.job
        return tuple(job.ids), job.owed, job.prompt_logprobs


def settle(future, result=None, error=None):
    """Gives a Future its result, unless nobody wants it."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass
