"""Bits a byte of a text without a network: what a model must beat.

    n_gram(train, val, order=5)     # of bytes, by interpolated Kneser-Ney (Chen & Goodman 1999)
    packed(train, val)              # by xz -9e, which has read train
"""
import lzma
import math
from collections import defaultdict

DISCOUNT = 0.75


def packed(train, val):
    """xz of both less xz of train alone, so that val's text may point back into it."""
    def size(data):
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return 8 * (size(train + val) - size(train)) / len(val)


def n_gram(train, val, order=5):
    """Of val (bytes), by what stood behind up to order - 1 bytes in train (bytes)."""
    counts = [defaultdict(dict) for _ in range(order)]          # of each length of context: {context: {byte: count}}
    top = counts[-1]
    for i in range(order - 1, len(train)):
        own = top[train[i - order + 1:i]]
        own[train[i]] = own.get(train[i], 0) + 1
    for n in range(order - 1, 0, -1):                           # below: in how many contexts, not how often
        for context, own in counts[n].items():
            shorter = counts[n - 1][context[1:]]
            for byte in own:
                shorter[byte] = shorter.get(byte, 0) + 1
    totals = [{context: sum(own.values()) for context, own in level.items()} for level in counts]

    def chance(context, byte):
        p = 1 / 256
        for n in range(order):
            part = context[len(context) - n:] if n else b''
            own = counts[n].get(part)
            if own is None:
                break
            total = totals[n][part]
            p = max(own.get(byte, 0) - DISCOUNT, 0) / total + DISCOUNT * len(own) / total * p
        return p

    bits = sum(-math.log2(chance(val[max(0, i - order + 1):i], val[i])) for i in range(len(val)))
    return bits / len(val)
