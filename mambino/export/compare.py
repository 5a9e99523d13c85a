"""What the checks of all exports have in common: ids and texts to try a model with, and how far two results are apart.

    off = difference(theirs, net(some_ids(net, 2, 64))[0])
    ours = greedy(net, [1, 2, 3], 64)
"""
import logging
import random
import warnings
from contextlib import contextmanager

import torch

PIECES = ['a', 'The', ' the', '\n', '\n\n', '  ', '\t', '    ', '\r\n', ' def f(x):', 'return', '_name', '0', '1234567890', ' 3.14', '!', '"', "'s",
          "don't", '...', '{}', '->', '#!/', '\\n', 'é', 'ß', ' Ünï', 'Ω', 'привет', ' мир', '中文', '日本語', '한국어', 'العربية', 'עברית', 'हिन्दी', '😀',
          '👩‍👩‍👧', '🇩🇪', '\u200b', '\xa0', '\u3000', '\u2028', '\ufeff', 'e\u0301', '<|endoftext|>', '<|im_start|>', '</s>', '<s>', '▁', 'Ġ', '\x00', '\x7f',
          'A' * 40, ' ' * 17, '=' * 30, 'https://example.org/?q=1&b=2', 'x' * 3 + '1' * 3]


def some_ids(net, B, T):
    """(B, T) ids, always the same."""
    return torch.randint(net.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))


def some_texts(tok, n):
    """n texts, always the same: of words, code, scripts, emoji and white space, as far as this tokenizer has their characters; up to half
    of them have all its tokens, so that none can be another one unseen."""
    draw, own = random.Random(0), [text for text in map(tok.decode, ([i] for i in range(tok.vocab_size))) if text and '\ufffd' not in text]
    pieces = own if tok.kind == 'char' else PIECES
    rest = min(n // 2, len(own))
    mixed = [''.join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(n - 1 - rest)]
    apart = '' if tok.kind == 'char' else '\n'                                  # so that each stands alone, and is one token again
    return ['', *mixed, *(apart.join(own[i::rest]) for i in range(rest))]


def difference(theirs, ours):
    """The largest absolute difference of two tensors; infinite if one of them is not finite or the shapes differ."""
    off = (theirs.float() - ours.float()).abs().max() if theirs.shape == ours.shape else torch.tensor(torch.inf)
    return float(off) if off.isfinite() else float('inf')


def agree(ours, theirs):
    """'64 of 64': up to the first that differs."""
    n = len(ours)
    return f'{next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), n)} of {n}'


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
    """The n likeliest tokens after a prompt, each given those before. vocab_size: ids from there on are never taken."""
    ids, state = [], None
    logits, state = net.step(torch.tensor([prompt]), state)
    while True:
        ids.append(int(logits[0, -1, :vocab_size or None].argmax()))
        if len(ids) == n:
            return ids
        logits, state = net.step(torch.tensor([ids[-1:]]), state)
