"""States of a model after prompts and answers, kept in memory so that no text is read twice.

    kept = Kept(0.25e9)
    kept.add(ids, state, logits)                    # after all of ids
    length, state, logits = kept.longest(ids)       # of those that ids begin with; (0, None, None)

A recurrent state cannot be cut back to an earlier token: what is found is what was kept, at the end
of a prompt and of an answer. So a conversation is read on from the last answer, and a prompt that
is asked for again is not read at all. What was used least recently leaves when there is no more
room.
"""
import hashlib
from array import array
from collections import OrderedDict
from typing import NamedTuple

from mambino.sample.generation import is_cache, resized


class Entry(NamedTuple):
    state: dict             # the model's, (1, …)
    logits: object          # (1, V) of the next token
    bytes: int


def trimmed(state, window):
    """A state (1, …) whose caches have no more slots than tokens, if they are no rings; a copy
    where anything was cut. window: the model's, 0 if it has none."""
    length = int(state['pos'].max())
    if window or not any(is_cache(name) and value.shape[2] > length for name, value in state.items()):
        return state
    return {name: resized(value, length).clone() if is_cache(name) else value for name, value in state.items()}


def cloned(state):
    """A state of its own: steps write into what they are given."""
    return {name: value.clone() for name, value in state.items()}


def size_of(state, logits):
    """Bytes."""
    return sum(value.numel() * value.element_size() for value in (*state.values(), logits))


class Kept:
    """See the top of the file. limit: bytes of all."""

    def __init__(self, limit):
        self.limit = limit
        self.entries = OrderedDict()        # {(length, digest): Entry}, the one used last at the end
        self.lengths = {}                   # {length: how many entries have it}
        self.bytes = 0

    def add(self, ids, state, logits):
        """Keeps a state after ids, which nobody writes into any more; not one that is larger than
        all the room there is."""
        size = size_of(state, logits) + 200
        if size > self.limit:
            return
        *_, (length, digest) = digests(ids, [len(ids)])
        self.drop((length, digest))
        self.entries[length, digest] = Entry(state, logits, size)
        self.lengths[length] = self.lengths.get(length, 0) + 1
        self.bytes += size
        while self.bytes > self.limit:
            self.drop(next(iter(self.entries)))

    def drop(self, key):
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.bytes -= entry.bytes
        self.lengths[key[0]] -= 1
        if not self.lengths[key[0]]:
            del self.lengths[key[0]]

    def clear(self):
        while self.entries:
            self.drop(next(iter(self.entries)))

    def longest(self, ids):
        """→ (how many of ids, the state after them, logits): not to be written into; (0, None,
        None) if none is kept."""
        lengths = sorted(length for length in self.lengths if length <= len(ids))
        for key in reversed(list(digests(ids, lengths))):
            if key in self.entries:
                self.entries.move_to_end(key)
                entry = self.entries[key]
                return key[0], entry.state, entry.logits
        return 0, None, None


def digests(ids, lengths):
    """Yields (length, hash of so many ids) of lengths in order."""
    whole = array('q', ids)
    digest = hashlib.blake2b(digest_size=16)
    done = 0
    for length in lengths:
        digest.update(whole[done:length].tobytes())
        done = length
        yield length, digest.digest()
