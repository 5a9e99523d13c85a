"""Writes text with a model that learned to fill holes (masked diffusion): they are uncovered by steps.

    ids = with_holes(tok, 'To be [...20...] question')
    filler = Filler(net, tok, device, 'first', steps=0)
    for ids in filler.fill(ids, generator): …   # with fewer holes each time, at last with none

    ancestral       each hole at a time of its own, as t falls from 1 to 0 along a cosine (Shi et al. 2024): many
                    at once near the end; the model's distribution if steps are many
    first           one hole after another, in random order: exactly the model's distribution (Zheng et al. 2025);
                    with fewer steps than holes several at once, which then do not know of each other
    confidence      of what is drawn for all holes, the likeliest are kept (Nie et al. 2025): not the model's
                    distribution; less varied, and smoother
    threshold       all whose likeliest token has more than 0.9, one at least (Wu et al. 2025): as confidence
    remask          ancestral, and what was uncovered may be hidden again (Wang et al. 2025), so that more steps
                    than holes can mend it

What is drawn is drawn in fp64: Gumbel noise in fp32 would cut off what is rare, and look better than the model is
(Zheng et al. 2025). Letters of the shapes: K tokens, V vocabulary.
"""
import math
import re
from functools import partial

import torch
import torch.nn.functional as F

from mambino.blocks import of_the_one_before
from mambino.cache import bounded
from mambino.sample.generation import require_finite
from mambino.sample.next_token import chances, place_of
from mambino.sample.text import prompt_ids

SAMPLERS = 'ancestral', 'first', 'confidence', 'threshold', 'remask'
SURE = 0.9          # threshold
AGAIN = 0.1         # remask: at most so much of what is uncovered is hidden again in a step
MOST = 100_000      # tokens of a hole
HOLE = re.compile(r'\[\.\.\.(\d+)\.\.\.\]')       # in a prompt: so many tokens are to be found


def draw_each(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Draws a token for each row of scores (n, V) → ids (n,), and the probability that the model itself, at
    temperature 1 and without filters, gives each."""
    exact = scores.double()
    if temperature == 0:
        ids = exact.argmax(-1, keepdim=True)                    # (n, 1)
    else:
        cumulative, index = chances(exact, temperature, top_k, top_p, min_p)
        u = torch.rand(len(exact), generator=generator, dtype=torch.float64)
        place = place_of(u, cumulative)
        ids = place if index is None else index.gather(1, place)
    return ids[:, 0], exact.softmax(-1).gather(1, ids)[:, 0]


def grid(steps):
    """Times t from 1 to 0, steps + 1 of them, along a cosine."""
    return [math.cos(math.pi / 2 * i / steps) for i in range(steps)] + [0.0]


def uncover(call, z, holes, sampler, steps, draw, generator, mask_id):
    """Fills the holes of z (K,), where `holes` (K,) is True, in about so many steps (0: one a hole); yields z after
    each, also where nothing came. call(z) → scores (K, V); draw(scores) → ids (n,), the probabilities of each."""
    z = z.masked_fill(holes, mask_id)
    steps = steps or int(holes.sum())
    known = None                                            # scores of z as it is
    times = grid(steps)
    step = 0
    while bool((holes & (z == mask_id)).any()):
        hidden = (holes & (z == mask_id)).nonzero()[:, 0]   # (n,)
        if known is None:
            known = call(z)
        ids, sure = draw(known[hidden])
        t, s = times[min(step, steps - 1)], times[min(step, steps - 1) + 1]
        if sampler == 'first':
            n = math.ceil(len(hidden) / max(1, steps - step))
            chosen = torch.randperm(len(hidden), generator=generator)[:n]
        elif sampler == 'confidence':
            n = math.ceil(len(hidden) / max(1, steps - step))
            chosen = sure.topk(n).indices
        elif sampler == 'threshold':
            likeliest = known[hidden].double().softmax(-1).amax(-1)
            chosen = (likeliest > SURE).nonzero()[:, 0]
            if not len(chosen):
                chosen = likeliest.argmax()[None]
        else:
            again = 0.0
            if sampler == 'remask' and s > 0:
                again = min(AGAIN, s / (1 - t)) if t < 1 else 0.0
            leaves = ((1 - s) - (1 - again) * (1 - t)) / t      # the chance of a hole to be uncovered
            u = torch.rand(len(hidden), generator=generator, dtype=torch.float64)
            chosen = (u < leaves).nonzero()[:, 0]
            if again:
                v = torch.rand(len(z), generator=generator, dtype=torch.float64)
                hide = holes & (z != mask_id) & (v < again)
                if bool(hide.any()):
                    z = z.masked_fill(hide, mask_id)
                    known = None
        step += 1
        if len(chosen):
            z = z.clone()
            z[hidden[chosen]] = ids[chosen]
            known = None
        yield z


# --- texts ----------------------------------------------------------------------------------------

def with_holes(tok, text, mask_id, begins=True):
    """The ids of a prompt in which [...20...] stands for 20 tokens that are to be found, list of int."""
    ids = []
    for place, piece in enumerate(HOLE.split(text)):
        if place % 2 == 0:
            ids += prompt_ids(tok, piece, begins) if begins and place == 0 else tok.encode(piece, False).tolist()
        elif not 1 <= int(piece) <= MOST:
            raise ValueError(f'[...{piece}...]: a hole is of 1 to {MOST} tokens')
        else:
            ids += [mask_id] * int(piece)
    return ids


class Filler:
    """Fills texts of any length: as one window after another, or block after block."""

    def __init__(self, net, tok, device, sampler='first', steps=0, sampling=None, ends=True, block=0):
        """ends: whether a hole may be the end of the text. block: of a window so many tokens are found before those
        behind them (Nie et al. 2025); 0: all together."""
        self.net, self.device = net, device
        self.sampler, self.steps, self.sampling = sampler, steps, sampling or {}
        self.vocab_size = tok.vocab_size
        self.never = [] if ends else [tok.eot]
        self.mask_id = net.config.vocab_size - 1
        self.T, self.K = net.config.block_size, net.config.block_length
        self.at_once = block or self.T

    def fill(self, ids, generator):
        """Yields ids, list of int, after each call of the network, with fewer and fewer holes, at last with none."""
        ids = torch.tensor(ids)
        pieces = self.blocks(ids, generator) if self.K else self.windows(ids, generator)
        for filled in pieces:
            yield filled.tolist()

    def windows(self, ids, generator):
        """Each window of T tokens: half of one, at least, is what was there before, where there is so much."""
        while bool((ids == self.mask_id).any()):
            first = int((ids == self.mask_id).nonzero()[0])
            start = max(0, min(first - self.T // 2, len(ids) - self.T))
            window = ids[start:start + self.T]
            # a short text stands at the beginning of a window of holes that stay: so it was learned
            z = F.pad(window, (0, self.T - len(window)), value=self.mask_id)
            end = min(len(window), first - start + self.at_once)
            for filled in self.uncovered(self.scores, z, end, generator):
                ids = ids.clone()
                ids[start:start + self.T] = filled[:len(window)]
                yield ids

    def blocks(self, ids, generator):
        """Each block of K tokens to the last with holes, after the state that those before it leave."""
        state = before = None
        last = max((ids == self.mask_id).nonzero()[:, 0].tolist(), default=-1)
        for start in range(0, last + 1, self.K):
            block = ids[start:start + self.K]
            z = F.pad(block, (0, self.K - len(block)), value=self.mask_id)
            for filled in self.uncovered(partial(self.scores, state=state, before=before), z, len(block), generator):
                ids = ids.clone()
                ids[start:start + self.K] = filled[:len(block)]
                yield ids
            if start + self.K <= last:
                state, window = bounded(self.net, state, self.K)
                logits, state = self.net.step(ids[None, start:start + self.K].to(self.device), state, window=window)
                before = logits[:, -1:]
                yield ids

    def uncovered(self, scores, z, n, generator):
        holes = z == self.mask_id
        holes[n:] = False
        draw = partial(draw_each, generator=generator, **self.sampling)
        return uncover(scores, z, holes, self.sampler, self.steps, draw, generator, self.mask_id)

    def scores(self, z, state=None, before=None):
        """Scores (K, V) of a window's or a block's tokens (K,), after a state, which stays as it is; before (1, 1, V):
        the logits that led to it."""
        state = state and {name: value.clone() for name, value in state.items()}
        state, window = bounded(self.net, state, len(z))
        logits = self.net.step(z[None].to(self.device), state, window=window)[0]    # (1, K, V)
        if self.net.config.shifted:
            logits = of_the_one_before(logits, before)
        scores = require_finite(logits[0, :, :self.vocab_size].float().cpu())
        scores[:, self.never] = -math.inf
        return scores
