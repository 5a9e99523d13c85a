"""A prompt while it is read, piece by piece, by itself.

    reading = Reading(ticket, net, tok, kept, named)
    while not reading.is_done:
        reading.piece()                         # up to generation.PREFILL tokens
    reading.state, reading.logits, reading.rest, reading.logprobs

    ids ──► the longest beginning that is kept ──► pieces of the rest ──► what is owed, looked ahead

The pieces are those of generation.prefill, whoever else is there: a prompt gives the same numbers as in
sample.py. That others need not wait for a whole piece is the scheduler's care, which lets them have their
turns between its layers.
"""
import copy

import torch

from mambino.cache import kept_as
from mambino.sample.generation import chunks, step
from mambino.sample.healing import look_ahead
from mambino.sample.next_token import logprobs_of
from mambino.serve.states import cloned
from mambino.serve.told import Refused
from mambino.serve.work import Logprob

NO_NUMBERS = ('the model computes no numbers (nan or inf): its training diverged, or --dtype is too small for it',
              500)
SLICE = 64              # tokens whose logprobs are computed at once


class Reading:
    """See the top of the file."""

    def __init__(self, ticket, net, tok, kept, named):
        job = ticket.job
        self.ticket = ticket
        self.net = net
        self.tok = tok
        self.top = job.prompt_logprobs
        self.rest = None                        # what is owed, of healing.py
        self.logprobs = []
        self.state = None
        self.logits = None                      # (1, V)
        self.is_done = False
        session = ticket.session
        if session is not None:
            named.check(ticket, net)
            unread = session.take_up(tok, list(job.ids), job.owed, job.end_ids)
            self.ids = list(session.tokens)
            self.cached = len(self.ids) - len(unread)
            self.state, self.logits = session.state, session.logits
        else:
            self.ids = list(job.ids)
            self.cached = 0
            if self.top < 0:
                self.cached, state, self.logits = kept.longest(self.ids)
                self.state = state and cloned(state)
            unread = self.ids[self.cached:]
        if not self.ids:
            raise Refused('the prompt is empty: it needs one token at least', 400)
        if not all(0 <= i < tok.vocab_size for i in self.ids):
            raise Refused(f'the prompt has ids that are not in the vocabulary of {tok.vocab_size}', 400)
        self.pieces = list(chunks(net, unread)) if unread else []
        if self.top >= 0 and not session:
            self.logprobs = [Logprob(self.ids[0], None, [])]

    def for_another(self, ticket):
        """What was read, for another job of the same prompt."""
        other = copy.copy(self)
        other.ticket = ticket
        other.cached = len(self.ids)
        return other

    def left(self):
        """Tokens still to be read."""
        return sum(piece.shape[1] for piece in self.pieces)

    def piece(self):
        """Reads the next piece, or looks ahead behind the last."""
        if self.pieces:
            idx = self.pieces[0]                # (1, t)
            wants_all = self.top >= 0 and not self.ticket.session
            logits, self.state = step(self.net, idx, self.state, last=not wants_all)
            self.pieces.pop(0)
            self.logits = logits[:, -1].clone()
            if wants_all:
                self.note_logprobs(logits[0])
        if self.pieces:
            return
        if not bool(self.logits.isfinite().all()):
            raise Refused(*NO_NUMBERS)
        self.state = kept_as(self.state, self.net.state_dtype)      # for a row, and for who asks it again
        if self.ticket.job.owed:
            read = self.logits, self.state, self.ids
            self.rest = look_ahead(self.net, self.tok, read, self.ticket.job.owed)
        self.is_done = True

    def note_logprobs(self, logits):
        """Of the ids that come behind each of these (t, V)."""
        at = len(self.logprobs)
        targets = self.ids[at:at + len(logits)]
        for first in range(0, len(targets), SLICE):
            some = targets[first:first + SLICE]
            ids = torch.tensor(some, device=logits.device)
            found = logprobs_of(logits[first:first + len(some)], ids, self.top, self.tok.vocab_size)
            self.logprobs += [Logprob(i, *of_one) for i, of_one in zip(some, found)]
