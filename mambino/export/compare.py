"""What the checks of all exports have in common: ids and texts to try a model with, and how far two
results are apart.

    off = difference(opened(ids), logits_of(net, ids))          # ids = some_ids(net, 2, 64)
    agreement = agree(greedy(net, [1, 2, 3], 64), tokens)       # '64 of 64'

A check is what a format's `verify` returns, a dict of

    tool            what opened the files, and its version
    ok              whether it computes what our model does
    logits, limit   largest difference of logits, and what may be; None where they are not compared
    greedy, ids     '64 of 64': equal greedy tokens, and texts with equal token ids
    note            what else there is to say
"""
import itertools
import logging
import random
import statistics
import time
import warnings
from contextlib import contextmanager

import torch

from mambino.blocks import of_the_one_before
from mambino.cache import bounded

PIECES = [
    'a', 'The', ' the', '\n', '\n\n', '  ', '\t', '    ', '\r\n', ' def f(x):', 'return', '_name',
    '0', '1234567890', ' 3.14', '!', ' ,', ' .', " n't", '"', "'s", "don't", '...', '{}', '->', '#!/', '\\n',
    'é', 'ß', ' Ünï', 'Ω', 'привет', ' мир', '中文', '日本語', '한국어', 'العربية', 'עברית', 'हिन्दी',
    '😀', '👩‍👩‍👧', '🇩🇪', '\u200b', '\xa0', '\u3000', '\u2028', '\ufeff', 'e\u0301',
    '<|endoftext|>', '<|im_start|>', '</s>', '<s>', '▁', 'Ġ', '\x00', '\x7f', 'A' * 40, ' ' * 17,
    '=' * 30, 'https://example.org/?q=1&b=2', 'x' * 3 + '1' * 3]


# --- what to try ----------------------------------------------------------------------------------

def some_ids(net, B, T):
    """(B, T) ids, always the same."""
    return torch.randint(net.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))


def some_texts(tok, n):
    """n texts, always the same: of words, code, scripts, emoji and white space, as far as this
    tokenizer has their characters; up to half of them have all its tokens, so that none can be
    another one unseen."""
    draw = random.Random(0)
    tokens = [tok.decode([i]) for i in range(tok.vocab_size)]
    # not those that are a part of a character
    tokens = [text for text in tokens if text and '\ufffd' not in text]
    n_of_tokens = min(n // 2, len(tokens))
    pieces = tokens if tok.kind == 'char' else PIECES
    n_mixed = n - 1 - n_of_tokens
    mixed = [''.join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(n_mixed)]
    apart = '' if tok.kind == 'char' else '\n'  # so that each stands alone, and is one token again
    return ['', *mixed, *(apart.join(tokens[i::n_of_tokens]) for i in range(n_of_tokens))]


# --- what a model says ----------------------------------------------------------------------------

@torch.no_grad()
def logits_of(net, idx):
    """Logits (B, T, V) of idx (B, T); of a model that fills holes in blocks, read block after block."""
    K = net.config.block_length
    if not K:
        return net(idx)[0]
    state, before, logits = None, None, []
    for block in idx.split(K, 1):
        state, window = bounded(net, state, block.shape[1])
        y, state = net.step(block, state, window=window)
        logits.append(told(net, y, before))
        before = y[:, -1:]
    return torch.cat(logits, 1)


def told(net, logits, before):
    """Logits (B, T, V) as they speak of each place; before (B, 1, V): the last of the text before, or None."""
    return of_the_one_before(logits, before) if net.config.shifted else logits


# --- how far apart --------------------------------------------------------------------------------

def difference(theirs, ours):
    """The largest absolute difference of two tensors; infinite if one of them is not finite or the
    shapes differ."""
    if theirs.shape != ours.shape:
        return float('inf')
    off = (theirs.float() - ours.float()).abs().max()
    return float(off) if off.isfinite() else float('inf')


def agree(ours, theirs):
    """'64 of 64': up to the first that differs."""
    n = len(ours)
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), n)
    return f'{equal} of {n}'


@contextmanager
def silent():
    """Within, what other libraries have to tell their own users and developers is not said."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)


@torch.no_grad()
def greedy(net, prompt, n, vocab_size=0):
    """The n likeliest tokens after a prompt, each given those before. vocab_size: ids from there on
    are never taken."""
    ids = []
    logits, state = net.step(torch.tensor([prompt]), None)
    while True:
        ids.append(int(logits[0, -1, :vocab_size or None].argmax()))
        if len(ids) == n:
            return ids
        logits, state = net.step(torch.tensor([ids[-1:]]), state)


# --- a model that others step ---------------------------------------------------------------------

@torch.no_grad()
def compare_steps(net, tok, empty, step, full, n=64):
    """The model beside what a format has of it: `step(ids, past)` → (logits, present), `empty(B)`
    for the past of no tokens, and `full(ids)` → logits of whole sequences. → dict(logits: the
    largest difference, in shares of the largest logit if that is above 1; greedy: '64 of 64'; same:
    whether all are; note: the time of a token)."""
    V = net.config.vocab_size
    window = min(getattr(net.config, 'window', 0), 2000)
    draw = torch.Generator().manual_seed(0)
    differences = []
    for B, T in ((1, 1), (2, 5), (3, 83), (1, max(300, window + 9))):
        ids = torch.randint(V, (B, T), generator=draw)
        logits = net.step(ids)[0]
        largest = max(1.0, logits.abs().max().item())
        for others in (step_by_step(ids, empty, step), full(ids)):
            differences.append(difference(others, logits) / largest)

    prompt = ids[0, :8].tolist()
    n_ids = tok.vocab_size if tok else V
    ours = Timed(net.step, lambda B: None)
    theirs = Timed(step, empty)
    texts = [greedy(timed, prompt, n, n_ids) for timed in (ours, theirs)]
    note = (f'a token takes {theirs.milliseconds():.2f} ms there, {ours.milliseconds():.2f} ms '
            'here; logits are compared in shares of the largest')
    return dict(logits=max(differences), greedy=agree(*texts), same=texts[0] == texts[1], note=note)


def step_by_step(ids, empty, step):
    """The logits of ids (B, T), some tokens at once, and others one by one."""
    past = empty(len(ids))
    parts = []
    sizes = [3, 1, 1, 20, 1, 40, 1, ids.shape[1]]
    for end, size in zip(itertools.accumulate(sizes), sizes):
        piece = ids[:, end - size:end]
        if piece.shape[1]:
            logits, past = step(piece, past)
            parts.append(logits)
    return torch.cat(parts, 1)


class Timed:
    """A step for `greedy`, which measures it. empty(B): the state before the first token."""

    def __init__(self, step, empty):
        self.step_itself = step
        self.empty = empty
        self.seconds = []

    def step(self, ids, state):
        began = time.perf_counter()
        result = self.step_itself(ids, self.empty(len(ids)) if state is None else state)
        self.seconds.append(time.perf_counter() - began)
        return result

    def milliseconds(self):
        """The median of all but the prompt."""
        return 1000 * statistics.median(self.seconds[1:])
