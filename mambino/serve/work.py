"""What is asked of a model, and what comes of it: all that the API and the scheduler say to each other.

    job = Job(ids=[5, 7, 9], max_tokens=100, seed=1, stops=('\\n',))
    ticket = scheduler.submit(job, send)    # send(event) is called in the model's thread
    ticket.cancel()                         # its row is free before the next step

    submit ──► Read ──► Token ──► Token ──► … ──► Done
                └──────────┴──► Failed, in the place of any

A job is one row: a request for n answers is n jobs, with a seed each. A model that fills holes has a Fill in the
place of a Job, and tells of it by Frames in the place of Tokens.
"""
from dataclasses import dataclass, field
from typing import NamedTuple


class Room(NamedTuple):
    """How much of everything a model's scheduler has."""
    rows: int = 16              # answers side by side
    queue: int = 64             # jobs that may wait
    kept_memory: float = 0.25   # GB of states after prompts and answers
    state_dtype: str = 'float32'        # of these states, and of the rows' (cache.py's DTYPES)


@dataclass
class Job:
    """One answer that is wanted."""
    ids: list                       # of the prompt, at least one; all are read
    max_tokens: int                 # of the answer; 0: the prompt is read, and that is all
    owed: bytes = b''               # of the prompt, still to be spelled behind ids (sample/healing.py)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0         # of ids in prompt and answer (CTRL)
    presence_penalty: float = 0.0           # taken once from the logits of ids in the answer so far
    frequency_penalty: float = 0.0          # taken from them each time
    logit_bias: dict = field(default_factory=dict)      # {id: what is added to its logit}
    seed: int = 0                   # of the row's own generator; None: a session's, where it stood
    stops: tuple = ()               # texts before which the answer ends
    end_ids: tuple = ()             # ids that end it, besides end-of-text
    logprobs: int = -1              # of the ids drawn, and of so many likeliest; -1: none
    prompt_logprobs: int = -1       # the same of the prompt's ids, of all but the first
    session: str = ''               # a name under which the text so far is kept on disk, and goes on
    ignore_eos: bool = False        # end-of-text ends nothing (to measure)


@dataclass
class Fill:
    """A text whose holes are to be filled; the answer is what stands from the first one to the last."""
    ids: list                       # of the whole text, with the model's id of a hole
    first: int                      # of the answer's ids
    last: int                       # the one behind them
    goes_on: bool                   # nothing stands behind the holes: the text may end in them
    head: str = ''                  # of the prompt, what stands before the answer
    tail: str = ''                  # and behind it
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stops: tuple = ()               # texts before which the answer ends
    end_ids: tuple = ()             # ids that end it, besides end-of-text
    sampler: str = 'first'          # see sample/uncover.py
    steps: int = 0
    frames: bool = False            # whether Frames are wanted


class Logprob(NamedTuple):
    """An id under the model as it is, with neither temperature nor filters."""
    id: int
    logprob: float                  # in nats; None of the first id of a prompt
    top: list                       # [(id, logprob), …] of the likeliest, in order


class Read(NamedTuple):
    """The prompt is read."""
    tokens: int                     # of the prompt
    cached: int                     # of them those that were not read again
    logprobs: list                  # [Logprob, …] of all ids, if they were asked for; else []


class Token(NamedTuple):
    """An id of the answer."""
    id: int
    text: str                       # that can be shown now: whole characters, nothing of a stop; often ''
    logprob: Logprob                # None if not asked for
    spells: bool = False            # it only spells what the prompt owed: no token of the answer


class Frame(NamedTuple):
    """An answer while it is filled."""
    text: str                       # what is hidden still stands there as ░
    tokens: int                     # that were found


class Done(NamedTuple):
    """The answer is over."""
    reason: str                     # 'stop', 'length', or 'cancelled'
    text: str                       # the rest that was held back; of a Fill all of it
    tokens: int                     # of the answer


class Failed(NamedTuple):
    """There is no answer, or no more of it."""
    message: str                    # to the person
    status: int = 500               # of HTTP


class Full(Exception):
    """No more can wait. seconds: after which it is worth another try."""

    def __init__(self, seconds):
        super().__init__(seconds)
        self.seconds = seconds
