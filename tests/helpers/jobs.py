"""Jobs for a scheduler, and what comes of them; small models of every kind with a tokenizer of their own."""
import functools
import threading

import torch

from helpers.models import perturb
from mambino import tokenizer
from mambino.sample.generation import Rows, prefill
from mambino.sample.healing import look_ahead
from mambino.sample.text import Writer
from mambino.serve.scheduler import Scheduler
from mambino.serve.work import Done, Failed, Read, Room, Token
from mambino.weights import checkpoint

KINDS = {
    'gpt': ('gpt', dict(n_head=2, n_kv_head=1, block_size=32)),
    'window': ('gpt', dict(n_head=2, window=8, tie_embeddings=False)),
    'experts': ('gpt', dict(n_head=2, n_expert=4, n_expert_active=3, intermediate_size=16, block_size=64)),
    'mamba1': ('mamba', dict(state_size=8, version=1)),
    'mamba2': ('mamba', dict(state_size=16, head_dim=16)),
    'hybrid': ('hybrid', dict(state_size=16, n_head=2, ssm_head_dim=16, window=12)),
    'hybrid-full': ('hybrid', dict(state_size=16, n_head=2, ssm_head_dim=16, window=0, block_size=32)),
}
DEADLINE = 60           # seconds, after which a test fails


@functools.cache
def small_tok():
    """A BPE of some words, so that a prompt may end inside a token."""
    return tokenizer.build_tokenizer('bpe', ['the model reads main memory and maintains a list of lists ' * 40],
                                     vocab_size=300)


@functools.cache
def small_net(kind):
    """A model of KINDS, nothing in it 0 or 1, with some more ids than small_tok."""
    torch.manual_seed(0)
    family, config = KINDS[kind]
    net = checkpoint.build(family, dict(vocab_size=small_tok().vocab_size + 4, n_layer=2, n_embd=32, **config))
    return perturb(net, 0.2).eval()


class Result:
    """What came of a job. cancel_after: events after which it is cancelled."""

    def __init__(self, scheduler, job, cancel_after=None, on_end=None):
        self.events = []
        self.begun = threading.Event()      # there is a token
        self.over = threading.Event()
        self.cancel_after = cancel_after
        self.on_end = on_end
        self.ticket = scheduler.submit(job, self.take)

    def take(self, event):
        self.events.append(event)
        if isinstance(event, Token):
            self.begun.set()
        if len(self.events) == self.cancel_after:
            self.ticket.cancel()
        if isinstance(event, (Done, Failed)):
            self.over.set()
            if self.on_end:
                self.on_end()

    def wait(self):
        assert self.over.wait(DEADLINE), 'no end'
        assert sum(isinstance(event, (Done, Failed)) for event in self.events) == 1
        return self

    def wait_for_token(self):
        assert self.begun.wait(DEADLINE), 'no token'
        return self

    @property
    def end(self):
        return self.events[-1]

    @property
    def read(self):
        return next(event for event in self.events if isinstance(event, Read))

    @property
    def tokens(self):
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    @property
    def text(self):
        return ''.join(token.text for token in self.tokens) + getattr(self.end, 'text', '')


def scheduler_of(kind, rows=4, queue=1000, kept=0.0, **more):
    return Scheduler(small_net(kind), small_tok(), Room(rows, queue, kept), **more)


def answer(scheduler, job):
    """A job by itself."""
    return Result(scheduler, job).wait()


@torch.no_grad()
def by_sample(kind, job):
    """The ids that sample.py's way gives for a job, of what it has settings for."""
    net, tok = small_net(kind), small_tok()
    read = prefill(net, job.ids)
    rows = Rows(net, tok.vocab_size, job.repetition_penalty)
    rows.add([read], [look_ahead(net, tok, read, job.owed)])
    writer = Writer(tok, job.stops, job.ids, job.end_ids, owed=job.owed)
    generator = [torch.Generator().manual_seed(job.seed)]
    ids = []
    while not writer.done and writer.length < job.max_tokens:
        drawn = rows.draw(generator=generator, temperature=job.temperature, top_k=job.top_k, top_p=job.top_p,
                          min_p=job.min_p)
        ids.append(int(drawn))
        writer.feed(ids[-1])
        if not writer.done:
            rows.advance(drawn)
    writer.close()
    return ids, writer.text
