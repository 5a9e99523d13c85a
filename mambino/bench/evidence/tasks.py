"""Tasks that a program makes, of which it is known what a model must keep to solve them.

    idx, targets = recall(64, 128, generator, pairs=8)      # (B, T) both; -1 where nothing is asked

    recall      keys and their values, each pair once, then these pairs in any order: which value has this key? (as in
                MQAR, Arora et al. 2023, where each key is asked once, and its value does not follow)
    copy        a text, a sign, the text again (Jelassi et al. 2024)
    induction   a sign and a letter somewhere, the sign again at the end: the letter (Olsson et al. 2022)
    selective   some letters among noise, then these in order (Gu & Dao 2023)

idx holds at each place what is read, targets what is to be said there. Ids: 0 a sign, 1 noise, then what counts.
"""
import torch

SIGN, NOISE, FIRST = 0, 1, 2


def drawn(n, most, count, generator):
    """(n, count) different numbers below `most` in each row."""
    return torch.rand(n, most, generator=generator).argsort(1)[:, :count]


def recall(n, T, generator, pairs=8, vocab=256):
    half = (vocab - FIRST) // 2
    places = (T - 2 * pairs) // 2
    if places < 1:
        raise ValueError(f'behind {pairs} pairs there is no place in {T} tokens')
    keys = FIRST + drawn(n, half, pairs, generator)                             # (n, pairs)
    values = FIRST + half + torch.randint(half, (n, pairs), generator=generator)
    asked = torch.randint(pairs, (n, places), generator=generator)
    order = torch.cat((torch.arange(pairs).expand(n, -1), asked), 1)            # (n, pairs + places)
    idx = torch.stack((keys.gather(1, order), values.gather(1, order)), 2).flatten(1)
    targets = torch.full_like(idx, -1)
    targets[:, 2 * pairs::2] = idx[:, 2 * pairs + 1::2]
    return idx, targets


def copy(n, T, generator, vocab=32):
    """T tokens are read: T/2 letters, a sign, and the letters but the last again."""
    letters = torch.randint(FIRST, vocab, (n, T // 2), generator=generator)
    idx = torch.cat((letters, torch.full((n, 1), SIGN), letters[:, :-1]), 1)
    return idx, torch.cat((torch.full_like(letters, -1), letters), 1)


def induction(n, T, generator, vocab=16):
    idx = torch.randint(FIRST, vocab, (n, T), generator=generator)
    at = torch.randint(T - 2, (n, 1), generator=generator)
    letters = idx.gather(1, at + 1)                                             # (n, 1)
    idx.scatter_(1, at, SIGN)
    idx[:, -1] = SIGN
    targets = torch.full((n, T), -1)
    targets[:, -1:] = letters
    return idx, targets


def selective(n, T, generator, count=8, vocab=16):
    """T tokens are read: noise with so many letters in it, then a sign for each of them."""
    letters = torch.randint(FIRST, vocab, (n, count), generator=generator)
    places = drawn(n, T - count, count, generator).sort(1).values
    idx = torch.full((n, T), NOISE).scatter_(1, places, letters)
    idx[:, -count:] = SIGN
    targets = torch.full((n, T), -1)
    targets[:, -count:] = letters
    return idx, targets


TASKS = {'recall': recall, 'copy': copy, 'induction': induction, 'selective': selective}
VOCABULARIES = {'recall': 256, 'copy': 32, 'induction': 16, 'selective': 16}
