"""How likely a text is to a model, and what it expected least.

    show_score(net, tok, 'book.txt', nullcontext(), page='book.html')
    show_bound(net, tok, 'book.txt', nullcontext())         # of a model that fills holes
    for piece in token_scores(net, tok, ids, top=5):        # the same, token by token
        for logprob, likeliest in piece: …

The figures are those of train.py's evaluation: of the same text and model the very numbers of
--eval_only. The text is read in windows of block_size tokens, each by itself, and the first token
is given. A second line has the figures where every token is predicted from all that stands before
it, behind end-of-text or the ids that begin a text; with a net.state_dtype token by token, as it is
generated.

    text ──► ids ──► windows ──► nats ──► loss, perplexity, bits/byte
              └────► one after another ──► the same, and what was expected least ──► heatmap.py
"""
import heapq
import math
import sys
import time
from array import array

import torch

from mambino.configurator import fail
from mambino.holes import DRAWS, for_evaluation, hiding, learnable, summed_up
from mambino.sample.generation import cut_in_windows, token_logits, window_losses
from mambino.sample.heatmap import TOKENS, TOP, Heat, write_heatmap
from mambino.sample.next_token import logprobs_of
from mambino.sample.text import read_text, token_text

SURPRISES = 10          # tokens that a score lists
BEFORE, AFTER = 12, 5   # tokens beside them
ROWS = 8                # windows at once


def show_score(net, tok, path, precision, page=''):
    """Prints how well the model predicts a text, as a document of its own, and the tokens that it
    expected least. precision: the context in which train.py evaluates; page: an HTML file to write,
    which shows it token by token."""
    ids, size = ids_of(tok, path)
    kept = []
    total, worst = surprises(net, tok, ids, kept, TOKENS if page else 0)
    with precision:
        evaluated = as_evaluated(net, tok, ids, size)
    lines = '\n'.join(figures(net, tok, ids, size, total, worst, evaluated))
    print(lines)
    if page:
        write_heatmap(page, 'standard input' if path == '-' else path, lines, Heat(tok, ids, kept))


def ids_of(tok, path):
    """The ids of a text, and its bytes."""
    text = read_text(path, f'score={path}')
    try:
        ids = tok.encode(text).tolist()
    except ValueError as error:
        fail(f'score={path}: {error}; score another text, or with another model')
    if not ids:
        why = "has no ids in this model's tokenizer" if text else 'is empty'
        fail(f'score={path}: {why}, there is nothing to score')
    return ids, len(text.encode('utf-8'))


@torch.no_grad()
def show_bound(net, tok, path, precision):
    """Prints the bound of a model that fills holes: how likely the text is to it at least."""
    ids, size = ids_of(tok, path)
    sequence, given, _ = windows_of(tok, ids, size)
    x, y = cut_in_windows(sequence, given, net.config.block_size, net.config.vocab_size - 1)
    counted = learnable(y)
    targets = int(counted.sum())
    if not targets:
        fail(f'score={path}: is too short, of a window its first token is given')
    sizes = tok.sizes()
    target_bytes = size * sizes[x[counted].numpy()].sum() / sizes[ids].sum()
    device = next(net.parameters()).device
    hide = hiding(net.config)
    nats = variance = 0.0
    began = time.perf_counter()
    with precision:
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            drawn = [net(*(tensor.to(device) for tensor in piece))[1].item()
                     for piece in for_evaluation(hide, x[rows], y[rows], 1)]
            own = summed_up(drawn, 1)
            nats, variance = nats + own[0], variance + own[1]
            show_progress(min(start + ROWS, len(x)) * x.shape[1], x.numel(), time.perf_counter() - began, 'in windows')
    print(f'tokens      {len(ids):,}')
    print(f'loss        <= {nats / targets:.4f} +- {math.sqrt(variance) / targets:.4f} nats/token')
    print(f'perplexity  <= {perplexity(nats / targets)}')
    print(f'bits/byte   <= {nats / math.log(2) / target_bytes:.4f}')
    print(f'a bound, by {DRAWS} draws of holes in windows of {net.config.block_size} tokens, as train.py evaluates')


def figures(net, tok, ids, size, total, worst, evaluated):
    """Yields the lines that say it. size: bytes of the text; total, worst: of surprises; evaluated: of as_evaluated."""
    nats, targets, target_bytes = evaluated
    yield f'tokens      {len(ids):,}'
    if targets:
        yield f'loss        {nats / targets:.4f} nats/token'
        yield f'perplexity  {perplexity(nats / targets)}'
        yield f'bits/byte   {nats / math.log(2) / target_bytes:.4f}'
        yield f'in windows of {net.config.block_size} tokens, as train.py evaluates'
    states = ', token by token, with states in bfloat16' * (net.state_dtype is not None)
    yield (f'with all the text before each token{states}: loss {total / len(ids):.4f}, '
           f'perplexity {perplexity(total / len(ids))}, bits/byte {total / math.log(2) / size:.4f}')
    yield '\nleast expected, in nats:'
    for nats, at in worst:
        left, token, right = around(tok, ids, at)
        yield f'{nats:7.2f}  {left}  >>{token}<<  {right}'


def perplexity(loss):
    """e to the loss, in figures; inf where no float can hold it."""
    return f'{math.exp(loss) if loss < 99 else math.inf:,.2f}'


def as_evaluated(net, tok, ids, size):
    """(nats, how many targets, their bytes) of train.py's evaluation where this text is the val
    split. ids: of the whole text; size: its bytes."""
    sequence, given, target_bytes = windows_of(tok, ids, size)
    if len(sequence) <= given:
        return 0.0, 0, 0
    nats = 0.0
    seen = 0                                                # tokens
    began = time.perf_counter()
    for some in window_losses(net, sequence, given, ROWS):
        nats += some
        seen = min(seen + ROWS * net.config.block_size, len(sequence) - 1)
        show_progress(seen, len(sequence) - 1, time.perf_counter() - began, 'in windows')
    return nats, len(sequence) - given, target_bytes


def windows_of(tok, ids, size):
    """(the ids that are read in windows, how many of them are no targets, the bytes of the others)
    of the ids of a text of so many bytes."""
    opening = tok.opening()
    given = max(1, len(opening))
    sequence = [*opening, *ids]
    sizes = tok.sizes()
    share = sizes[sequence[given:]].sum() / sizes[ids].sum()
    return sequence, given, float(size * share)


def token_scores(net, tok, ids, top=0):
    """Yields lists of (logprob, [(id, logprob), …]), one for each of a text's ids and piece after
    piece: the id itself and so many likeliest in its place, with all the text before it."""
    for logits, targets in token_logits(net, ids, tok.context()):
        yield logprobs_of(logits, targets, top, tok.vocab_size)


def total_nats(logprobs):
    """The nats of all tokens of a text. Rounded once, so that the sum is the same to the last bit
    however the text came in pieces, and wherever it is shown."""
    return -math.fsum(logprobs)


def surprises(net, tok, ids, kept=(), most=0):
    """(nats of all ids, [(nats, position), …] of those that were expected least), each with all the
    text before it. kept: a list that gets the token_scores of so many first ids, each with the
    likeliest in its place."""
    logprobs = array('d')
    began = time.perf_counter()
    for piece in token_scores(net, tok, ids, TOP if most else 0):
        logprobs.extend(logprob for logprob, _ in piece)
        if len(kept) < most:
            kept += piece[:most - len(kept)]
        show_progress(len(logprobs), len(ids), time.perf_counter() - began, 'with all the text before')
    worst = heapq.nsmallest(SURPRISES, zip(logprobs, range(len(ids))))
    return total_nats(logprobs), [(-logprob, at) for logprob, at in worst]


def around(tok, ids, at):
    """[what stands before a token, itself, what stands behind it] as a table shows it. Of a token
    that is a part of a character, that character and which bytes of it are meant."""
    first, last = tok.whole(ids, at, at + 1)
    start, _ = tok.whole(ids, max(0, first - BEFORE), first)
    _, end = tok.whole(ids, last, min(len(ids), last + AFTER))
    shown = [repr(tok.decode(ids[a:b], begins=a == 0))[1:-1]
             for a, b in ((start, first), (first, last), (last, end))]
    if (first, last) != (at, at + 1):
        shown[1] += f' [{tok.token_bytes(ids[at]).hex(" ")}]'
    elif not shown[1]:
        shown[1] = token_text(tok, ids[at])
    return shown


def show_progress(seen, total, seconds, reading):
    """A line that changes, on a terminal, with rate and time left."""
    if not (sys.stderr and sys.stderr.isatty()):
        return
    rate = seen / max(seconds, 1e-9)
    line = f'{reading}: {seen:,} of {total:,} tokens, {rate:,.0f} tokens/s, {(total - seen) / rate:,.0f} s left   '
    print('\r' + line, end='\n' if seen == total else '', file=sys.stderr, flush=True)
