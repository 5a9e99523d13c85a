"""Where a text may be cut without changing the ids that GPT-2's scheme gives it.

    for piece in cut(text): ...     # about PIECE characters each

A long text is encoded in pieces, which is faster and needs less memory.
"""
import re

PIECE = 1 << 18  # characters that are encoded at once: little enough to stay in cache
RUN = 10_000     # a longer "word" is cut: a million spaces overflow the stack of tiktoken's regex
WORD = 256       # nothing longer is learnt: the time that a BPE takes to train grows with the square of a word's length
# no GPT-2 word goes from non-space to space, so a cut here changes no id; only Python has U+001C to
# U+001F for spaces
SEAM = re.compile(r'\S(?=[^\S\x1c-\x1f])')


def long_runs(n):
    """A GPT-2 word is all in one of two classes: regular expressions for n or more characters of
    one, and for n // 2 of one, which a run of n has at a multiple of n // 2.
    """
    long = rf'[^\W_]{{{n},}}|[\W_]{{{n},}}'
    half = rf'[^\W_]{{{n // 2}}}|[\W_]{{{n // 2}}}'
    return re.compile(long), re.compile(half)


LONG = {n: long_runs(n) for n in (RUN, WORD)}


def cut(text, longest=RUN):
    """Pieces of about PIECE characters whose ids, one after another, are the ids of the whole; only
    within a run of `longest` characters of one class, which nobody would call a word, does a cut
    change the ids (never the text they stand for).
    """
    pieces = []
    start = 0
    while len(text) - start > PIECE:
        seam = SEAM.search(text, start + PIECE)
        end = seam.end() if seam else len(text)
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return [part for piece in pieces if piece for part in cut_runs(piece, longest)]


def cut_runs(piece, longest):
    """The parts of a piece in which no run of one class is longer than `longest`."""
    long, half = LONG[longest]
    if not any(half.match(piece, i) for i in range(0, len(piece), longest // 2)):
        return [piece]  # much faster than looking for a long one
    parts = []
    done = 0
    for match in long.finditer(piece):
        for end in range(match.start() + longest, match.end(), longest):
            parts.append(piece[done:end])
            done = end
    parts.append(piece[done:])
    return parts
