"""Token ids and what comes after them: states, rows side by side, the next token, beams, the loss
of a text. Nothing is printed here.

    rows = Rows(net, tok.vocab_size)
    rows.add([prefill(net, ids) for ids in prompts])        # prompts of any lengths, side by side
    ids = rows.draw(temperature=0.8, generator=generators)  # (B,) the next token of each row
    rows.keep([0, 2])                                       # row 1 is done
    rows.advance(ids[[0, 2]])                               # one `step` of the model for the others

Prompts are read with states as they are computed; rows keep theirs in the precision
net.state_dtype.

A row is a state of the model and the logits of its next token; rows come and go between steps, and
none depends on its neighbours:

    prompt ids ──► prefill ──► state, logits ──► draw ──► ids ──► advance ──► state, logits ──► draw …

Letters of the shapes: B rows, t tokens of a step, V vocabulary.
"""
from itertools import count

import torch
import torch.nn.functional as F

from mambino.cache import bounded, is_cache, kept_as, resized
from mambino.configurator import fail
from mambino.sample import decode
from mambino.sample.graphs import Repeated, placed_in
from mambino.sample.next_token import NO_NUMBERS, choose, sample_token, uniform

PREFILL = 512           # tokens of a prompt read at once: bounds the memory of their logits


# --- states ---------------------------------------------------------------------------------------

def step(net, idx, state=None, last=False, out=None):
    """decode.step(net, idx (B, t), state, last, out=out), beyond block_size with a window of that
    length for a model that has none, see cache.bounded."""
    if state is None and net.initial_state:
        state = net.initial_state(len(idx))
    state, window = bounded(net, state, idx.shape[1])
    return decode.step(net, idx, state, last, window=window, out=out)


def chunks(net, ids):
    """ids, a list or tensor, as tensors (1, t) that `step` takes one after another."""
    ids = torch.as_tensor(ids, dtype=torch.long, device=next(net.parameters()).device)
    state_grows = getattr(net.config, 'window', 1) == 0
    length = min(PREFILL, net.config.block_size) if state_grows else PREFILL
    return ids[None].split(length, 1)


def require_finite(x):
    """x, or the end of the program in a line where it is not finite."""
    if not x.isfinite().all():
        fail('the model computes no numbers (nan or inf): its training diverged, or --dtype is too small '
             'for it; try --dtype=float32, or another checkpoint')
    return x


@torch.no_grad()
def prefill(net, ids, state=None):
    """Reads ids, one or more, after what `state` stands for → (logits (1, V) of the next token,
    state, ids)."""
    for chunk in chunks(net, ids):
        logits, state = step(net, chunk, state, last=True)
    return require_finite(logits[:, -1]), state, ids


def join_states(states):
    """One state of all rows of these states of one model; caches of different lengths are
    padded."""
    longest = 0
    for state in states:
        for name, value in state.items():
            if is_cache(name):
                longest = max(longest, value.shape[2])
    size = ring_size(states) or longest
    joined = {}
    for name in states[0]:
        values = [state[name] for state in states]
        if is_cache(name):
            values = [resized(value, size) for value in values]
        joined[name] = torch.cat(values)
    return joined


def ring_size(states):
    """The number of slots of a cache that has come round as a ring, which keeps its size; 0 if none
    has."""
    for state in states:
        seen = int(state['pos'].max())
        for name, value in state.items():
            if is_cache(name) and seen > value.shape[2]:
                return value.shape[2]
    return 0


def select_rows(tensor, rows):
    """tensor[rows], for a list of row numbers."""
    return tensor.index_select(0, torch.tensor(rows, dtype=torch.long, device=tensor.device))


# --- rows side by side ----------------------------------------------------------------------------

class Rows:
    """Sequences that are continued side by side, see the top of the file.

    vocab_size: the tokenizer's; a model's vocabulary may be padded beyond it, and those ids are
    never drawn. penalty: of repetition, of a row's prompt and of what was drawn since."""

    def __init__(self, net, vocab_size, penalty=1.0):
        self.net = net
        self.vocab_size = vocab_size
        self.penalty = penalty
        self.drawing, self.moving = Repeated(), Repeated()      # on a card
        self.clear()

    def clear(self):
        self.logits = None          # (B, V) of the next token
        self.state = None           # the model's
        self.factors = None         # (B, V) the penalty of ids that are there, else 1
        self.rests = []             # of each row what is still to be spelled of its prompt, or None
        self.room = {}              # on a card {name: memory of the state, the logits, factors}, for more rows or all

    @torch.no_grad()
    def add(self, prompts, rests=()):
        """New rows: of each prompt what prefill returned, (logits, state, ids); the ids may be
        more, and are only for the penalty. rests: of each what healing.look_ahead returned."""
        logits, states, texts = map(list, zip(*prompts))
        new_factors = [self.factors_of(texts).to(logits[0].device)] if self.penalty != 1 else []
        if self.state is not None:
            logits.insert(0, self.logits)
            states.insert(0, self.state)
            new_factors.insert(0, self.factors)
        self.rests = self.rests + list(rests or [None] * len(prompts))
        self.logits = torch.cat(logits)
        kept = {id(state): kept_as(state, self.net.state_dtype) for state in states}    # samples may share one
        self.state = join_states([kept[id(state)] for state in states])
        if self.penalty != 1:
            self.factors = torch.cat(new_factors)
        self.settle()

    def settle(self):
        """On a card: rows go on in the memory where rows were before, so that its graphs are good."""
        if not self.logits.is_cuda:
            return
        parts = dict(self.state, logits=self.logits, factors=self.factors)
        placed = {name: value for name, value in parts.items() if value is not None and name != 'pos'}
        placed = placed_in(self.room, placed)
        self.logits, self.factors = placed.pop('logits'), placed.pop('factors', None)
        self.state = {'pos': self.state['pos'], **placed}

    def factors_of(self, texts):
        """(rows, V) the penalty of the ids in each text, else 1."""
        factors = torch.ones(len(texts), self.vocab_size)
        for row, ids in zip(factors, texts):
            row[torch.as_tensor(ids, dtype=torch.long)] = self.penalty
        return factors

    def draw(self, **sampling):
        """The next token of each row, (B,), on the CPU. sampling: see next_token.sample_token."""
        if self.logits.is_cuda:
            return self.draw_on_card(**sampling)
        return sample_token(self.possible(self.logits), **sampling)

    def draw_on_card(self, generator=None, **sampling):
        """draw, by a few launches, after which the host waits once."""
        B = len(self.logits)
        u = None if sampling.get('temperature') == 0 else uniform(generator, B)
        places = [part.data_ptr() for part in (self.logits, self.factors) if part is not None]
        key = None if any(self.rests) else (B, *places, *sampling.items())
        ids = self.drawing(key, lambda u: choose(self.possible(self.logits), u, **sampling), u, self.logits.device)
        ids = ids.cpu()
        if int(ids.min()) < 0:
            fail(NO_NUMBERS)
        return ids

    def possible(self, scores):
        """Scores (B, V or more) of the tokenizer's ids, penalized; of a row that still has to spell
        its prompt only those that can, see healing.py."""
        scores = self.penalized(scores)
        if not any(self.rests):
            return scores
        return torch.stack([rest.add_to(row) if rest else row for row, rest in zip(scores, self.rests)])

    def penalized(self, scores):
        """Scores (B, V or more) of the tokenizer's ids; of what is there already divided by the
        penalty, or if negative multiplied (CTRL, Keskar et al. 2019)."""
        scores = scores[:, :self.vocab_size].float()
        if self.penalty == 1:
            return scores
        # twice as fast as asking for the sign
        choose = torch.minimum if self.penalty > 1 else torch.maximum
        return choose(scores * self.factors, scores / self.factors)

    @torch.no_grad()
    def advance(self, ids):
        """Reads one token of each row, (B,)."""
        if self.penalty != 1:
            self.factors.scatter_(1, ids[:, None].to(self.factors.device, non_blocking=True), self.penalty)
        if any(self.rests):
            self.rests = [rest and rest.following.get(i) for rest, i in zip(self.rests, ids.tolist())]
        if not self.room:
            logits, self.state = step(self.net, ids[:, None], self.state)
            self.logits = logits[:, -1]
        else:                                                   # on a card; what has grown lies elsewhere
            before = self.state
            _, self.state = step(self.net, ids[:, None], before, out=self.logits)
            self.room |= {name: new for name, new in self.state.items() if new is not before[name] and name != 'pos'}

    def keep(self, rows):
        """Only these rows go on, in this order; one may be there twice."""
        if not rows:
            self.clear()
        elif rows != list(range(len(self.logits))):
            self.rests = [self.rests[row] for row in rows]
            if self.room and len(rows) == len(self.logits):
                return self.reorder(rows)
            self.logits = select_rows(self.logits, rows)
            self.state = {name: select_rows(value, rows) for name, value in self.state.items()}
            if self.penalty != 1:
                self.factors = select_rows(self.factors, rows)
            self.settle()

    def reorder(self, rows):
        """keep, of as many rows on a card, in the memory where they are."""
        parts = [value for name, value in self.state.items() if name != 'pos']
        parts += [self.logits, *([] if self.factors is None else [self.factors])]

        def move(index):
            for part in parts:
                part.copy_(part.index_select(0, index))
        self.moving((len(rows), *(part.data_ptr() for part in parts)), move, torch.tensor(rows), self.logits.device)
        self.state = {**self.state, 'pos': self.state['pos'][rows]}


def generate(net, prompt, num_samples, max_new_tokens, vocab_size, repetition_penalty=1.0,
             **sampling):
    """Yields (num_samples,) ids again and again: the next token of each continuation of prompt (T ≥
    1 ids).

    max_new_tokens=0: without end. sampling: see next_token.sample_token. The prompt is read once,
    its state shared by all samples."""
    rows = Rows(net, vocab_size, repetition_penalty)
    rows.add([prefill(net, prompt)] * num_samples)
    for n in count(1):
        ids = rows.draw(**sampling)
        yield ids
        if n == max_new_tokens:
            return
        rows.advance(ids)


# --- beams, losses --------------------------------------------------------------------------------

def beam_search(net, prompt, beams, max_new_tokens, vocab_size, is_end, length_penalty=1.0,
                repetition_penalty=1.0, heal=None):
    """The likeliest continuations of a prompt that such a search finds: [(score, ids), …], best
    first, as many as beams if there are so many.

    score: the sum of the tokens' logprobs / number of tokens ** length_penalty. is_end(ids):
    whether a continuation ends here. It goes on until none of the running beams, were it to end
    now, is better than the worst that ended (transformers' early_stopping=False).

    heal: from what prefill returned to what is still to be spelled of the prompt, see healing.py.
    Tokens that only spell it have their scores as any, but are none of max_new_tokens; and a beam
    is chosen by how likely the rest is to follow, too."""
    rows = Rows(net, vocab_size, repetition_penalty)
    read = prefill(net, prompt)
    rows.add([read], [heal(read)] if heal else [])
    running = [(0.0, [], 0)]                            # (sum of logprobs, ids, those of new text)
    finished = []                                                       # (score, ids)
    for n in count(1):
        logprobs = rows.logits.float().log_softmax(-1)
        sums = torch.tensor([[total] for total, _, _ in running], device=logprobs.device)
        chances = rows.possible(logprobs) + sums                        # (B, V)
        sums = rows.penalized(logprobs) + sums                          # (B, V)
        candidates = min(2 * beams, sums.numel())   # enough, even if each beam has one that ends
        best, index = chances.flatten().topk(candidates)
        index = index[best > -torch.inf]
        parents = []
        before, running = running, []
        for rank, (total, place) in enumerate(zip(sums.flatten()[index].tolist(), index.tolist())):
            parent, token = divmod(place, vocab_size)
            _, ids, new = before[parent]
            ids = ids + [token]
            rest = rows.rests[parent]
            if not (rest and rest.is_inside(token)):
                new += 1
            if new == max_new_tokens or is_end(ids):
                if rank < beams:
                    finished.append((total / n ** length_penalty, ids))
            elif len(running) < beams:
                running.append((total, ids, new))
                parents.append(parent)
        finished = sorted(finished, key=lambda beam: -beam[0])[:beams]
        if not running:
            return finished
        best_running = max(total for total, _, _ in running)
        if len(finished) == beams and best_running / n ** length_penalty <= finished[-1][0]:
            return finished
        rows.keep(parents)
        rows.advance(torch.tensor([ids[-1] for _, ids, _ in running], device=sums.device))


@torch.no_grad()
def token_logits(net, ids, before):
    """Yields (logits (t, V), ids (t,)) of ids, a list, array or tensor, chunk after chunk: what the
    model expects of each after all that stand before it, the first one after the ids `before`.

    With a net.state_dtype token by token, as they are generated: the state is rounded after
    each."""
    ids = torch.as_tensor(ids, dtype=torch.long)
    *read, last = before
    state = kept_as(prefill(net, read)[1], net.state_dtype) if read else None
    inputs = torch.cat((torch.tensor([last]), ids[:-1]))
    for idx, targets in zip(chunks(net, inputs), chunks(net, ids)):     # (1, t) each
        if net.state_dtype is None:
            logits, state = step(net, idx, state)
        else:
            pieces = []
            for token in idx.split(1, 1):
                if net.between_layers is not None:          # a server's rows wait for no 512 tokens
                    net.between_layers()
                new, state = step(net, token, state)
                state = kept_as(state, net.state_dtype)
                pieces.append(new)
            logits = torch.cat(pieces, 1)
        yield require_finite(logits[0]), targets[0]


def cut_in_windows(ids, given, T, mask_id=None):
    """x, y (windows, T) of a text: y is x one later, -1 for the first ids, `given` of them, and behind the end.
    mask_id: of a model that fills holes, which sees what is behind the end: nothing that is known, as it is filled;
    and which finds the last token, too, in its own place."""
    sequence = torch.tensor(ids)
    targets = sequence[1:].clone()
    targets[:given - 1] = -1
    windows = -(-len(targets) // T)
    padding = windows * T - len(targets)
    x = F.pad(sequence[:-1], (0, padding), value=mask_id or 0)
    if mask_id is not None and padding:
        x[len(targets)] = sequence[-1]
    return x.view(windows, T), F.pad(targets, (0, padding), value=-1).view(windows, T)


@torch.no_grad()
def window_losses(net, ids, given=1, rows=8):
    """Yields the nats of all ids but the first `given`, some windows after others, as train.py
    evaluates: windows of block_size tokens, each read on its own; `rows` at once."""
    device = next(net.parameters()).device
    x, y = cut_in_windows(ids, given, net.config.block_size)
    for idx, targets in zip(x.split(rows), y.split(rows)):
        loss = net(idx.to(device), targets.to(device))[1]
        yield require_finite(loss).item() * int((targets >= 0).sum())
