"""What the checks of all exports have in common: ids and texts to try a model with, and how far two results are apart.

    off = difference(theirs, net(some_ids(net, 2, 64))[0])
    ours = greedy(net, [1, 2, 3], 64)
"""
import random

import torch

PIECES = ['a', 'The', ' the', '\n', '\n\n', '  ', '\t', '    ', '\r\n', ' def f(x):', 'return', '_name', '0', '1234567890', ' 3.14', '!', '"', "'s",
          "don't", '...', '{}', '->', '#!/', '\\n', 'é', 'ß', ' Ünï', 'Ω', 'привет', ' мир', '中文', '日本語', '한국어', 'العربية', 'עברית', 'हिन्दी', '😀',
          '👩‍👩‍👧', '🇩🇪', '\u200b', '\xa0', '\u3000', '\u2028', '\ufeff', 'e\u0301', '<|endoftext|>', '<|im_start|>', '</s>', '<s>', '▁', 'Ġ', '\x00', '\x7f',
          'A' * 40, ' ' * 17, '=' * 30, 'https://example.org/?q=1&b=2', 'x' * 3 + '1' * 3]


def some_ids(net, B, T):
    """(B, T) ids, always the same."""
    return torch.randint(net.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))


def some_texts(tok, n):
    """n texts of words, code, scripts, emoji and white space, always the same, as far as this tokenizer has their characters."""
    draw, pieces = random.Random(0), PIECES
    if tok.kind == 'char':
        pieces = [token.decode() for token in tok.table if token]
    return ['', *(''.join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(n - 1))]


def difference(theirs, ours):
    """The largest absolute difference of two tensors; infinite if one of them is not finite or the shapes differ."""
    off = (theirs.float() - ours.float()).abs().max() if theirs.shape == ours.shape else torch.tensor(torch.inf)
    return float(off) if off.isfinite() else float('inf')


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
