"""The answers that have rows, and their steps.

    batch = Batch(net, tok, most, tell, over, is_kept)
    batch.add(reading)          # an answer to a prompt that is read
    batch.step()                # a token for each, sent by tell(ticket, event)
    batch.drop_cancelled()
                                # over(answer, event, state, logits, ids) of each that has ended; the
                                # state if is_kept(answer), or its session is

    rows.logits ──► edits, what is owed ──► choice ──► ids ──► text, events ──► rows.advance(ids)
                                                        └──► who is done leaves
"""
import time
import traceback

import torch

from mambino.sample.graphs import Repeated
from mambino.sample.next_token import logprobs_of
from mambino.sample.text import Writer
from mambino.serve.choice import Choice, Edits
from mambino.serve.named import told_of
from mambino.serve.reading import NO_NUMBERS
from mambino.serve.rows import Rows
from mambino.serve.work import Done, Failed, Logprob, Token


class Answer:
    """What has a row: its text as it grows, its chance, what of its prompt is still owed. reading: of its
    prompt, done."""

    def __init__(self, reading, tok):
        self.ticket = reading.ticket
        self.job = job = reading.ticket.job
        self.ids = reading.ids                  # that were read
        self.rest = reading.rest
        self.writer = Writer(tok, job.stops, reading.ids, job.end_ids, keep=False, owed=job.owed)
        if job.ignore_eos:
            self.writer.end_ids = set(job.end_ids)
        session = reading.ticket.session
        self.generator = session.generator if session else torch.Generator().manual_seed(job.seed or 0)
        self.drawn = []                         # ids
        self.began = time.perf_counter()

    def take(self, i, logprob):
        """The next id → the Token that is sent."""
        length = self.writer.length
        text = self.writer.feed(i)
        self.drawn.append(i)
        self.rest = self.rest and self.rest.following.get(i)
        return Token(i, text, logprob, self.writer.length == length)

    def is_over(self):
        return self.writer.done or self.writer.length >= self.job.max_tokens


class Batch:
    """See the top of the file."""

    def __init__(self, net, tok, most, tell, over, is_kept):
        self.tok = tok
        self.is_kept = is_kept
        self.tell = tell
        self.over = over
        self.rows = Rows(net, most)
        self.edits = Edits(most, tok.vocab_size, self.rows.logits.device)
        self.answers = []                       # of rows
        self.choice = None                      # of the rows that there are; None: to be made
        self.drawing = Repeated()               # on a card

    def add(self, reading):
        """A row for an answer."""
        answer = Answer(reading, self.tok)
        row = self.rows.add(reading.state, reading.logits)
        try:
            self.edits.add(answer.job, answer.ids)
        except BaseException:
            self.rows.remove(row)
            raise
        self.answers.append(answer)
        self.choice = None

    def step(self):
        """A token for each row, then a step of the model for those that go on → how many tokens."""
        B = len(self.answers)
        try:
            self.take(*self.draw())
            if self.answers:
                latest = [answer.drawn[-1] for answer in self.answers]
                self.rows.advance(torch.tensor(latest))
        except (Exception, SystemExit) as error:        # nobody knows whose it is
            traceback.print_exc()
            for row in reversed(range(len(self.answers))):
                self.fail(row, told_of(error))
        return B

    def draw(self):
        """→ of each row the next id, whether it is one, {row: Logprob} of those that ask for it."""
        answers = self.answers
        logits = self.rows.logits[:len(answers)]
        if self.choice is None:
            self.choice = Choice([answer.job for answer in answers], self.tok.vocab_size, logits.device)
        if logits.is_cuda:
            return self.draw_on_card(logits)
        scores = self.possible(self.edits.applied(logits))
        ids, finite = self.choice.draw(scores, [answer.generator for answer in answers])
        return ids.tolist(), finite.tolist(), self.likeliest(logits, ids)

    def draw_on_card(self, logits):
        """draw, by a few launches, after which the host waits once."""
        choice, edits = self.choice, self.edits
        u = choice.chances([answer.generator for answer in self.answers])
        is_spelling = any(answer.rest for answer in self.answers)
        key = None if is_spelling else (choice, logits.data_ptr(), *edits.places())

        def pick(u):
            return choice.pick_or_none(self.possible(edits.applied(logits)), u)
        ids = self.drawing(key, pick, u, logits.device).cpu()
        drawn = ids.tolist()
        return drawn, [i >= 0 for i in drawn], self.likeliest(logits, ids.clamp(min=0))

    def possible(self, scores):
        """Scores (B, V); of a row that still has to spell its prompt only those of the ids that can."""
        if not any(answer.rest for answer in self.answers):
            return scores
        return torch.stack([answer.rest.add_to(row) if answer.rest else row
                            for answer, row in zip(self.answers, scores)])

    def likeliest(self, logits, ids):
        """{row: Logprob} of the rows that ask for it."""
        rows = [row for row, answer in enumerate(self.answers) if answer.job.logprobs >= 0]
        if not rows:
            return {}
        index = torch.tensor(rows)
        some = ids[index.to(ids.device)]
        index = index.to(logits.device)
        wanted = [self.answers[row].job.logprobs for row in rows]
        computed = logprobs_of(logits[index], some, max(wanted), self.tok.vocab_size)
        return {row: Logprob(i, own, top[:n])
                for row, n, i, (own, top) in zip(rows, wanted, some.tolist(), computed)}

    def take(self, ids, finite, likeliest):
        """The rows' next ids: sent, and who is done leaves."""
        ended = {}                              # {row: a reason, or a problem}
        for row, answer in enumerate(self.answers):
            if not finite[row]:
                ended[row] = NO_NUMBERS
                continue
            try:
                event = answer.take(ids[row], likeliest.get(row))
                self.edits.drawn(row, ids[row], not event.spells)
            except Exception as error:
                ended[row] = told_of(error)
                continue
            self.tell(answer.ticket, event)
            if answer.is_over():
                ended[row] = 'stop' if answer.writer.done else 'length'
        for row in sorted(ended, reverse=True):
            if isinstance(ended[row], str):
                self.end(row, ended[row])
            else:
                self.fail(row, ended[row])

    def drop_cancelled(self):
        """Between steps: what was drawn last has been read."""
        for row in reversed(range(len(self.answers))):
            if self.answers[row].ticket.is_cancelled:
                self.end(row, 'cancelled', is_read=True)

    def end_all(self):
        """Cancels all, between steps."""
        for row in reversed(range(len(self.answers))):
            self.end(row, 'cancelled', is_read=True)

    def end(self, row, reason, is_read=False):
        """An answer is over. is_read: all its ids are in its row's state, else all but the last."""
        answer = self.answers[row]
        event = Done(reason, answer.writer.close(), answer.writer.length)
        state = logits = None
        wanted = answer.ticket.session or self.is_kept(answer)
        if wanted and answer.drawn and not answer.rest:     # else a part of the prompt is not spelled yet
            try:
                if is_read and answer.ticket.session:
                    self.draw_one_more(row)     # a session ends with one that is not read
                    is_read = False
                state = self.rows.state_of(row)
                logits = self.rows.logits[row:row + 1].clone()
            except Exception as error:          # there may be no memory for it: no other answer suffers
                if answer.ticket.session:
                    self.fail(row, told_of(error))
                    return
                state = logits = None
        read = answer.drawn if is_read else answer.drawn[:-1]
        self.take_out(row)
        self.over(answer, event, state, logits, [*answer.ids, *read])

    def draw_one_more(self, row):
        answer = self.answers[row]
        scores = self.edits.applied(self.rows.logits[:len(self.answers)])[row:row + 1]
        choice = Choice([answer.job], self.tok.vocab_size, scores.device)
        answer.drawn += choice.draw(scores, [answer.generator])[0].tolist()

    def fail(self, row, problem):
        answer = self.answers[row]
        self.rows.clear(row)
        self.take_out(row)
        self.over(answer, Failed(*problem), None, None, [])

    def take_out(self, row):
        self.rows.remove(row)
        self.edits.remove(row)
        last = self.answers.pop()
        if row < len(self.answers):
            self.answers[row] = last
        self.choice = None
