"""The logprobs of an answer's tokens, in the shapes of OpenAI's two APIs.

    listing = Listing(tok, before=ids)      # ids of the prompt
    listing.add(i, logprob)                 # of each token, as the scheduler sends them
    entries = listing.take(len(text))       # those whose text is there, for as_completion, as_chat

Each id has a name that no other has, so that a client can look the chosen token up among the
likeliest: its text; 'bytes:\\\\xe2\\\\x82' where it is a part of a character; 'token_id:7' where
another id has the same text. An entry stays back until its text is shown, as the beginning of what
may become a stop does.
"""
import functools
from typing import NamedTuple

from mambino.sample.text import CONTEXT

LEAST = -9999.0             # in the place of -inf, which JSON has not got


class Entry(NamedTuple):
    """A token of an answer."""
    id: int
    offset: int             # in characters, where its text begins
    logprob: float          # None of the first token of a prompt
    top: list               # [(id, logprob), …]


class Listing:
    """See the top of the file. before: ids that the text continues; none where they are listed."""

    def __init__(self, tok, before=()):
        self.decoder = tok.stream()
        self.offset = 0
        self.entries = []           # that wait for their text
        for i in before[-CONTEXT:]:
            self.decoder.feed(i)

    def add(self, i, logprob):
        """logprob: a work.Logprob."""
        self.entries.append(Entry(i, self.offset, logprob.logprob, logprob.top))
        self.offset += len(self.decoder.feed(i))

    def take(self, length):
        """The entries that begin within the first so many characters; each is given once."""
        n = next((n for n, entry in enumerate(self.entries) if entry.offset >= length), len(self.entries))
        taken = self.entries[:n]
        self.entries = self.entries[n:]
        return taken

    def take_rest(self):
        """All that are left."""
        taken, self.entries = self.entries, []
        return taken


@functools.lru_cache(maxsize=4)
def names_of(tok):
    """The names of all ids of a tokenizer, no two alike. It takes a while once: not for an event loop."""
    taken = set()
    names = []
    for i in range(tok.vocab_size):
        name = name_of(tok, i)
        if name in taken:
            name = f'token_id:{i}'
        taken.add(name)
        names.append(name)
    return names


def name_of(tok, i):
    raw = tok.token_bytes(i)
    if raw is None:                     # only the library can tell
        return tok.decode([i], begins=False) or tok.name_of(i)
    if not raw:
        return tok.name_of(i)
    try:
        return raw.decode('utf-8')
    except UnicodeDecodeError:
        return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in raw)


def bytes_of(tok, i):
    """The bytes of an id as a list of numbers; None of one that stands for nothing."""
    raw = tok.token_bytes(i)
    if raw is None:
        raw = tok.decode([i], begins=False).encode('utf-8')
    return list(raw) or None


def finite(logprob):
    return max(logprob, LEAST)


def as_completion(tok, entries):
    """The logprobs of /v1/completions. In each place the chosen token is among the likeliest, as
    the very same number."""
    names = names_of(tok)
    tops = []
    for entry in entries:
        if entry.logprob is None:
            tops.append(None)
            continue
        top = {names[i]: finite(logprob) for i, logprob in entry.top}
        top[names[entry.id]] = finite(entry.logprob)
        tops.append(top)
    return dict(
        tokens=[names[entry.id] for entry in entries],
        token_logprobs=[None if entry.logprob is None else finite(entry.logprob) for entry in entries],
        top_logprobs=tops,
        text_offset=[entry.offset for entry in entries],
    )


def as_chat(tok, entries):
    """The logprobs of /v1/chat/completions."""
    names = names_of(tok)

    def told(i, logprob):
        return dict(token=names[i], logprob=finite(logprob), bytes=bytes_of(tok, i))

    content = [dict(told(entry.id, entry.logprob), top_logprobs=[told(i, logprob) for i, logprob in entry.top])
               for entry in entries]
    return dict(content=content, refusal=None)
