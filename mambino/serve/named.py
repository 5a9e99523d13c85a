"""Sessions: texts that have a name, kept on the disk as sample.py keeps them, one job at a time each.

    named = Named(out_dir, fingerprint, tok, device, hand_in)
    named.open(ticket)              # hand_in(ticket) when its session is there, or why it cannot be
    named.finish(ticket, state, logits, drawn)      # what the answer has added
    named.close_after(ticket, event, tell)          # writes it, then tell(event)

What a disk takes is taken by a thread of its own: no answer waits for it.
"""
import threading
from concurrent.futures import ThreadPoolExecutor

from mambino.sample.sessions import check_state, open_session
from mambino.serve.told import Refused, told
from mambino.serve.work import Failed


def told_of(error):
    """(message, status of HTTP) of what a job ended with."""
    if isinstance(error, Refused):
        return str(error), error.status
    return f'{type(error).__name__}: {error}', 500


class Named:
    """See the top of the file. fingerprint: of the model; without one there are no sessions."""

    def __init__(self, out_dir, fingerprint, tok, device, hand_in):
        self.out_dir = out_dir
        self.fingerprint = fingerprint
        self.tok = tok
        self.device = device
        self.hand_in = hand_in
        self.lock = threading.Lock()
        self.busy = {}                              # {name: the ticket that has it}
        self.disk = ThreadPoolExecutor(1, thread_name_prefix='sessions')

    def open(self, ticket):
        """Gets a ticket its session."""
        name = ticket.job.session
        with self.lock:
            if not self.fingerprint:
                ticket.problem = 'this server keeps no sessions', 400
            elif name in self.busy:
                ticket.problem = f'session {name!r}: another answer goes on with it; wait for its end', 409
            else:
                self.busy[name] = ticket
        if ticket.problem:
            self.hand_in(ticket)
        else:
            try:
                self.disk.submit(self.load, ticket)
            except RuntimeError:            # all has ended this moment: hand_in tells it
                self.hand_in(ticket)

    def load(self, ticket):
        seed = ticket.job.seed
        try:
            with told(400):
                ticket.session, ticket.path, goes_on = open_session(
                    self.out_dir, ticket.job.session, '', seed or 0, self.fingerprint, self.device,
                    self.tok.vocab_size)
            if goes_on and seed is not None:
                ticket.session.generator.manual_seed(seed)
        except Exception as error:
            ticket.problem = told_of(error)
        self.hand_in(ticket)

    def check(self, ticket, net):
        """Refuses a session whose state is none of this model; in the model's thread."""
        if ticket.session.state is not None:
            with told(400):
                check_state(net, ticket.session, ticket.path)

    def finish(self, ticket, state, logits, drawn):
        """What the session is after an answer: all of drawn but the last id is in the state."""
        session = ticket.session
        if session is None:
            return
        session.state = state
        session.logits = logits
        session.tokens.extend(drawn)
        session.unread = drawn[-1:]
        session.is_whole = True

    def close_after(self, ticket, event, tell):
        """Writes a session that is whole; then tell(event), or that it could not be written."""
        if not ticket.session.is_whole:
            self.release(ticket)
            tell(event)
            return

        def save():
            done = event
            try:
                with told(500):
                    ticket.session.save(ticket.path, self.fingerprint)
            except Exception as error:
                done = Failed(*told_of(error))
            self.release(ticket)
            self.hand_in(lambda: tell(done))

        self.disk.submit(save)

    def release(self, ticket):
        """Its session is free for others."""
        with self.lock:
            if self.busy.get(ticket.job.session) is ticket:
                del self.busy[ticket.job.session]

    def close(self):
        """Returns when all is written."""
        self.disk.shutdown()
