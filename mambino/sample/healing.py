"""Token healing: a prompt may end anywhere, also inside a token.

    ids, owed = take_back(tok, tok.encode('def '), 'def ')      # 'def', and b' ' is owed
    prompt = prefill(net, ids)
    rows = Rows(net, tok.vocab_size)
    rows.add([prompt], [look_ahead(net, tok, prompt, owed)])    # draws ' main', ' test', …, never '('

A model knows 'def main' as 'def', ' main': in all that it was trained on, no name came after a
space alone. So the last ids of a prompt are taken back, as many as a token could reach across the
prompt's end, and their bytes are owed: of the next ids only those can be drawn that spell what is
owed, until all of it is there.

    'def ' ──► 'def', ' ' ──► 'def' is read, b' ' owed ──► ' main': b' ' is spelled, 'main' is new

What is drawn are the sequences of ids whose text goes on with the prompt, and no others, each as
likely as it is to the model among them. An id that spells all that is owed has the model's
probability; one that spells a part of it, that times the probability that the rest is spelled
behind it, which is looked up beforehand: ' ' may be ten times as likely as ' list', but what comes
behind it is hardly ever 'list'. Temperature, top-k, min-p, top-p choose from these probabilities:
what cannot be is taken out before.

Where an id has no bytes of its own, or a text does not come back from its ids (unknown words, a
tokenizer that knows small letters only), nothing is taken back.
"""
import math
from bisect import bisect_left, bisect_right
from functools import lru_cache

import torch

from mambino.sample.generation import Rows

MOST_IDS = 16           # that are taken back
MOST_BYTES = 256        # before a prompt's end, among which it is looked for ids that reach across
LEAST = 2**-24          # of all probability: ways that have less, no fp32 number tells from none
MOST_WAYS = 32          # to spell the same bytes, looked at side by side
MOST_MEMORY = 2**28     # bytes of their states


class Spelling:
    """What the ids of a tokenizer spell. table: the bytes of each id, b'' for none."""

    def __init__(self, table):
        self.table = table
        order = sorted((i for i, raw in enumerate(table) if raw), key=table.__getitem__)
        self.words = [table[i] for i in order]
        self.ids = torch.tensor(order, dtype=torch.long)        # of each word
        self.longest = max(map(len, self.words), default=0)

    def beginning_with(self, owed):
        """(first, last + 1) of the words that begin with these bytes, or are them."""
        return bisect_left(self.words, owed), bisect_left(self.words, owed + b'\xff' * self.longest)

    def reaches_across(self, owed):
        """Whether a word begins with these bytes and goes on."""
        first, last = self.beginning_with(owed)
        return bisect_right(self.words, owed, first) < last

    def possible(self, owed):
        """For each place in these bytes, and behind them: whether ids can spell all that comes."""
        possible = [False] * len(owed) + [True]
        for place in reversed(range(len(owed))):
            first, last = self.beginning_with(owed[place:])
            possible[place] = first < last or any(
                possible[end] and self.has(owed[place:end])
                for end in range(place + 1, min(place + self.longest, len(owed) - 1) + 1))
        return possible

    def has(self, word):
        place = bisect_left(self.words, word)
        return place < len(self.words) and self.words[place] == word

    def still_owed(self, owed, ids):
        """What is still owed behind ids."""
        for i in ids:
            owed = owed[len(self.table[i]):]
        return owed

    def next_ids(self, owed):
        """Two lists of ids that may come next: those that begin with all that is owed, and those
        that are a beginning of it behind which the rest can be spelled."""
        first, last = self.beginning_with(owed)
        possible = self.possible(owed)
        parts = []
        for end in range(1, min(self.longest, len(owed) - 1) + 1):
            if possible[end]:
                word = owed[:end]
                parts += self.ids[bisect_left(self.words, word):bisect_right(self.words, word)].tolist()
        return self.ids[first:last].tolist(), parts


class Rest:
    """What is still owed of a prompt at one place: the ids that may come there, and what they
    leave.

    ids (n,) int64. scores (n,): the log of the probability that what is left behind each is spelled
    as well. following: {id: Rest} of those that leave something."""

    def __init__(self, spelling, owed):
        self.spelling = spelling
        self.owed = owed
        self.whole, self.parts = spelling.next_ids(owed)
        self.ids = torch.tensor(self.whole + self.parts, dtype=torch.long)
        self.scores = torch.full((len(self.ids),), -torch.inf)
        self.scores[:len(self.whole)] = 0
        self.following = {}

    def is_inside(self, i):
        """Whether an id spells nothing but what is owed, and so no new text."""
        return len(self.spelling.table[i]) <= len(self.owed)

    def add_to(self, scores):
        """Scores (V) of all ids → with those of here; -inf for ids that cannot come."""
        ids = self.ids.to(scores.device)
        possible = torch.full_like(scores, -torch.inf)
        possible[ids] = scores[ids] + self.scores.to(scores.device)
        return possible


@torch.no_grad()
def look_ahead(net, tok, prompt, owed):
    """The Rest behind what prefill returned, `prompt`; None if nothing is owed."""
    if not owed:
        return None
    root = Rest(spelling_of(tok), owed)
    rows = Rows(net, tok.vocab_size)
    rows.add([prompt])
    size = sum(value.numel() * value.element_size() for value in rows.state.values())
    most = max(2, min(MOST_WAYS, MOST_MEMORY // size))
    levels = []                     # of places that are as many ids behind the prompt
    level = [(0.0, root)]           # (log of the probability of the ids until there, place)
    spelled = -math.inf             # log of the probability of all ways that were seen to the end
    while level:
        logprobs = rows.logits[:, :tok.vocab_size].float().log_softmax(-1).cpu()        # (B, V)
        ways = []                   # (log of the probability, row, id) that go on
        for row, (total, rest) in enumerate(level):
            rest.logprobs = logprobs[row, rest.ids].double()
            parts = rest.logprobs[len(rest.whole):].tolist()
            ways += [(total + logprob, row, i) for logprob, i in zip(parts, rest.parts)]
            ends = total + log_sum(rest.logprobs[:len(rest.whole)])
            spelled = log_sum(torch.tensor([spelled, ends], dtype=torch.double))
        ways = sorted(ways, reverse=True)[:most]
        ways = [way for way in ways if way[0] > spelled + math.log(LEAST)]
        levels.append(level)
        level = []
        for total, row, i in ways:
            before = levels[-1][row][1]
            before.following[i] = Rest(before.spelling, before.owed[len(before.spelling.table[i]):])
            level.append((total, before.following[i]))
        if level:
            rows.keep([row for _, row, _ in ways])
            rows.advance(torch.tensor([i for _, _, i in ways], device=rows.logits.device))
    for _, rest in [place for level in reversed(levels) for place in level]:
        for n, i in enumerate(rest.parts, len(rest.whole)):
            if i in rest.following:
                rest.scores[n] = rest.following[i].log_probability
        rest.log_probability = log_sum(rest.logprobs + rest.scores)
    return root


def log_sum(logs):
    """The log of a sum of numbers, from their logs (n,); -inf if there are none."""
    return torch.logsumexp(logs, 0).item() if len(logs) else -math.inf


@lru_cache(maxsize=2)
def spelling_of(tok):
    """The Spelling of a tokenizer whose ids have bytes."""
    return Spelling(tok.table)


def take_back(tok, ids, text, keep_one=False):
    """→ (the ids that are read, the bytes that are owed) of a text's ids; (ids, b'') where nothing
    is to be healed, or nothing can be.

    ids: they may begin with others than the text's, such as end-of-text, which are never taken
    back. keep_one: at least one is read."""
    ids = list(ids)
    taken = last_words(tok, ids[1:] if keep_one else ids)
    if not taken or not text:
        return ids, b''
    spelling = spelling_of(tok)
    written, spelled = as_spelled(tok, text, taken[0])
    reach = min(len(written), spelling.longest - 1, MOST_BYTES)
    starts = (place for place in range(len(written) - reach, len(written))
              if spelling.reaches_across(written[place:]))
    start = next(starts, None)
    if spelled is None or start is None:
        return ids, b''
    places = [len(spelled)]                     # in `written`, where the last ids begin, none first
    for n, word in enumerate(taken):
        place = places[n] - len(word)
        too_far = place < 0 or len(written) - place > 2 * MOST_BYTES
        if places[n] <= start or too_far or spelled[place:places[n]] != word:
            break
        places.append(place)
    for n in reversed(range(len(places))):      # as far as it is possible
        owed = written[places[n]:]
        if owed and spelling.possible(owed)[0]:
            return ids[:len(ids) - n], owed
    return ids, b''


def last_words(tok, ids):
    """The bytes of the last ids, the last one first, as far as they have any."""
    words = []
    for i in reversed(ids[-MOST_IDS:]):
        word = tok.table and tok.table[i]
        if not word:
            break
        words.append(word)
    return words


def as_spelled(tok, text, last):
    """→ (the bytes of a text, those that its ids spell), which differ in a space or white space at
    the end, in some kinds of tokenizers; last: the bytes of the last id. None for what ids spell if
    that is something else."""
    written = text.encode('utf-8', 'surrogatepass')
    if tok.pieces.prefixed:
        written = b' ' + written
    endings = [written, written.rstrip()]       # WordPiece has no id for a space at the end
    if tok.pieces.suffixed:
        endings.insert(1, written + b' ')       # a word's last id holds the space behind it
    return written, next((spelled for spelled in endings if spelled.endswith(last)), None)
