"""Token ids and what comes after them: states, rows side by side, the next token, beams, the surprise of a text. Nothing is printed here.

    rows = Rows(net, tok.vocab_size)
    rows.add([prefill(net, ids) for ids in prompts])               # prompts of any lengths, side by side
    ids = rows.draw(temperature=0.8, generator=generators)      # (B,) the next token of each row
    rows.keep([0, 2]); rows.advance(ids[[0, 2]])                # row 1 is done; one `step` of the model for the others

A row is a state of the model and the logits of its next token; rows come and go between steps, and none depends on its neighbours:

    prompt ids ──► read ──► state, logits ──► draw ──► ids ──► advance ──► state, logits ──► draw …

Letters of the shapes: B rows, t tokens of a step, V vocabulary, K key/value heads, S cache slots, P head size.
"""
from itertools import count

import torch
import torch.nn.functional as F

from mambino.configurator import fail
from mambino.tokenizer import CHAT

PREFILL = 512           # tokens of a prompt read at once: bounds the memory of their logits
CONTEXT = 16            # tokens before a text that its first characters may hang on


# --- states -----------------------------------------------------------------------------------------------------------

def is_cache(name):
    return name[:2] in ('k.', 'v.')


def resized(cache, size):
    """A key/value cache (B, K, S, P) with so many slots. As long as no ring has come round, slot s holds position s."""
    return F.pad(cache, (0, 0, 0, size - cache.shape[2]))                       # a negative pad cuts


def step(net, idx, state=None, last=False):
    """net.step(idx (B, t), state, last), beyond block_size with a window of that length for a model that has none.

    Rotary positions are relative, so this is what it was trained on; and its state stops growing. An empty state takes t ≤ block_size."""
    if state is None and net.initial_state:
        state = net.initial_state(len(idx))
    size = net.config.block_size
    if state is None or getattr(net.config, 'window', 1) or int(state['pos'].max()) + idx.shape[1] <= size:
        return net.step(idx, state, last)
    state = {name: resized(value, size) if is_cache(name) and value.shape[2] != size else value for name, value in state.items()}
    return net.step(idx, state, last, window=size)


def chunks(net, ids):
    """ids, a list or tensor, as tensors (1, t) that `step` takes one after another."""
    ids = torch.as_tensor(ids, dtype=torch.long, device=next(net.parameters()).device)
    grows = getattr(net.config, 'window', 1) == 0
    return ids[None].split(min(PREFILL, net.config.block_size) if grows else PREFILL, 1)


def require_finite(x):
    """x, or the end of the program where not all of it are numbers."""
    if not x.isfinite().all():
        fail('the model computes no numbers (nan or inf): its training diverged, or --dtype is too small for it; try --dtype=float32, '
             'or another checkpoint')
    return x


@torch.no_grad()
def prefill(net, ids, state=None):
    """Reads ids, one or more, after what `state` stands for → (logits (1, V) of the next token, state, ids)."""
    for chunk in chunks(net, ids):
        logits, state = step(net, chunk, state, last=True)
    return require_finite(logits[:, -1]), state, ids


def join_states(states):
    """One state of all rows of these states of one model; caches of different lengths are padded."""
    sizes = [(int(state['pos'].max()), value.shape[2]) for state in states for name, value in state.items() if is_cache(name)]
    rings = [size for pos, size in sizes if pos > size]                         # a ring that has come round keeps its size
    size = rings[0] if rings else max((size for _, size in sizes), default=0)
    return {name: torch.cat([resized(state[name], size) if is_cache(name) else state[name] for state in states]) for name in states[0]}


def select_rows(tensor, rows):
    """tensor[rows], for a list of row numbers."""
    return tensor.index_select(0, torch.tensor(rows, dtype=torch.long, device=tensor.device))


# --- the next token ---------------------------------------------------------------------------------------------------

def uniform(generator, B, device):
    """(B,) numbers in [0, 1): from one generator, or from a list with one for each row, which then depends on no other."""
    if isinstance(generator, list):
        drawn = torch.cat([torch.rand(1, generator=g) for g in generator])
    else:
        drawn = torch.rand(B, generator=generator, device=generator.device if generator else 'cpu')
    return drawn.to(device, non_blocking=True)                                  # waits for no GPU


def fast_topk(x, k):
    """x.topk(k) of x (B, V) → (B, k) values in order, indices. On a CPU in half the time: among V/16 groups, only those with the k largest
    members can hold one of the k largest."""
    B, V = x.shape
    n = V // 16
    if x.device.type != 'cpu' or 4 * k > n:
        return x.topk(k)
    groups = x[:, :16 * n].view(B, 16, n).amax(1).topk(k, sorted=False).indices  # group g: g, g + n, g + 2n, …
    index = (groups[:, None] + torch.arange(0, 16 * n, n)[:, None]).flatten(1)  # (B, 16 k)
    index = torch.cat((index, torch.arange(16 * n, V).expand(B, -1)), 1)
    values, place = x.gather(1, index).topk(k)
    return values, index.gather(1, place)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Draws a token for each row of logits (B, V) → (B,) int64. The filters apply in the order top-k, min-p, top-p.

    generator: see `uniform`. min-p: Nguyen et al. 2024; top-p (nucleus): Holtzman et al. 2020."""
    logits, index = logits.float(), None
    if temperature == 0:
        return fast_topk(logits, 1)[1][:, 0]
    if 0 < top_k < logits.shape[-1]:
        logits, index = fast_topk(logits, top_k)                                  # what follows costs k, not V
    top = logits[:, :1] if index is not None else logits.amax(-1, keepdim=True)
    weights = ((logits - top) / max(temperature, 1e-30)).exp()                  # probabilities times a number of each row; the largest is 1
    if min_p > 0:
        weights = weights.masked_fill(weights < min_p, 0)
    if top_p < 1:
        enough = top_p * weights.sum(-1, keepdim=True)
        if index is None:
            weights, index = nucleus_candidates(weights, enough)
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= enough, 0)  # the token that reaches top_p stays
    below = weights.cumsum(-1)
    u = uniform(generator, len(weights), weights.device).clamp(max=1 - 2**-23)  # less than all, rounded or not
    place = torch.searchsorted(below, u[:, None] * below[:, -1:], right=True)   # (B, 1)
    return (place if index is None else index.gather(1, place))[:, 0]


def nucleus_candidates(weights, enough):
    """The largest of weights (B, V) in order, at least so many that they sum up to `enough` (B, 1), and their indices. Sorting all is what
    a CPU is slow at, and some hundred mostly do."""
    if weights.device.type == 'cpu' and weights.shape[-1] > 4096:
        values, index = fast_topk(weights, 512)
        if bool((values.sum(-1, keepdim=True) >= enough).all()):
            return values, index
    return weights.sort(descending=True)


def logprobs_of(logits, ids, n, vocab_size):
    """Of each row's token and of the n likeliest, under the model as it is: [(logprob, [(id, logprob), …]), …]."""
    scores = logits.float().log_softmax(-1)                                     # (B, V)
    values, index = scores[:, :vocab_size].topk(min(n, vocab_size))
    return [(own, list(zip(others, theirs))) for own, others, theirs in
            zip(scores.gather(1, ids[:, None])[:, 0].tolist(), index.tolist(), values.tolist())]


class Rows:
    """Sequences that are continued side by side, see the top of the file. vocab_size: the tokenizer's; a model's vocabulary may be padded
    beyond it, and those ids are never drawn. penalty: of repetition, of a row's prompt and of what was drawn since."""

    def __init__(self, net, vocab_size, penalty=1.0):
        self.net, self.vocab_size, self.penalty = net, vocab_size, penalty
        self.logits = self.state = self.factors = None                          # (B, V); the model's; (B, V): the penalty of what is there, else 1

    @torch.no_grad()
    def add(self, prompts):
        """New rows: of each prompt what `prefill` returned, (logits, state, ids); the ids may be more, and are only for the penalty."""
        logits, states, texts = zip(*prompts)
        old = self.state is not None
        self.logits = torch.cat(([self.logits] if old else []) + list(logits))
        self.state = join_states(([self.state] if old else []) + list(states))
        if self.penalty != 1:
            factors = torch.ones(len(texts), self.vocab_size)
            for row, ids in zip(factors, texts):
                row[torch.as_tensor(ids, dtype=torch.long)] = self.penalty
            self.factors = torch.cat(([self.factors] if old else []) + [factors.to(self.logits.device)])

    def draw(self, **how):
        """The next token of each row, (B,). how: see `sample_token`."""
        return sample_token(self.penalized(self.logits), **how)

    def penalized(self, scores):
        """Scores (B, V or more) of the tokenizer's ids; of what is there already divided by the penalty, or if negative multiplied (CTRL,
        Keskar et al. 2019)."""
        scores = scores[:, :self.vocab_size].float()
        if self.penalty == 1:
            return scores
        choose = torch.minimum if self.penalty > 1 else torch.maximum           # twice as fast as asking for the sign
        return choose(scores * self.factors, scores / self.factors)

    @torch.no_grad()
    def advance(self, ids):
        """Reads one token of each row, (B,)."""
        if self.penalty != 1:
            self.factors.scatter_(1, ids[:, None], self.penalty)
        logits, self.state = step(self.net, ids[:, None], self.state)
        self.logits = logits[:, -1]

    def keep(self, rows):
        """Only these rows go on, in this order; one may be there twice."""
        if not rows:
            self.logits = self.state = self.factors = None
        elif rows != list(range(len(self.logits))):
            self.logits = select_rows(self.logits, rows)
            self.state = {name: select_rows(value, rows) for name, value in self.state.items()}
            self.factors = select_rows(self.factors, rows) if self.penalty != 1 else None


def generate(net, prompt, num_samples, max_new_tokens, vocab_size, repetition_penalty=1.0, **how):
    """Yields (num_samples,) ids again and again: the next token of each continuation of prompt (T ≥ 1 ids).

    max_new_tokens=0: without end. how: see `sample_token`. The prompt is read once, its state shared by all samples."""
    rows = Rows(net, vocab_size, repetition_penalty)
    rows.add([prefill(net, prompt)] * num_samples)
    for n in count(1):
        ids = rows.draw(**how)
        yield ids
        if n == max_new_tokens:
            return
        rows.advance(ids)


# --- beams, surprise --------------------------------------------------------------------------------------------------

def beam_search(net, prompt, beams, max_new_tokens, vocab_size, ends, length_penalty=1.0, repetition_penalty=1.0):
    """The likeliest continuations of a prompt that such a search finds: [(score, ids), …], best first, as many as beams.

    score: the sum of the tokens' logprobs / number of tokens ** length_penalty. ends(ids): whether a continuation ends here. It goes on
    until none of the running beams, were it to end now, is better than the worst that ended (transformers' early_stopping=False)."""
    rows = Rows(net, vocab_size, repetition_penalty)
    rows.add([prefill(net, prompt)])
    running, finished = [(0.0, [])], []                                         # (sum of logprobs, ids)
    for n in count(1):
        sums = torch.tensor([[total] for total, _ in running], device=rows.logits.device)
        sums = rows.penalized(rows.logits.float().log_softmax(-1)) + sums            # (B, V)
        best, index = sums.flatten().topk(min(2 * beams, sums.numel()))         # enough, even if each beam has one that ends
        before, parents, running = running, [], []
        for rank, (total, place) in enumerate(zip(best.tolist(), index.tolist())):
            parent, token = divmod(place, vocab_size)
            ids = before[parent][1] + [token]
            if n == max_new_tokens or ends(ids):
                if rank < beams:
                    finished.append((total / n ** length_penalty, ids))
            elif len(running) < beams:
                running.append((total, ids))
                parents.append(parent)
        finished = sorted(finished, key=lambda found: -found[0])[:beams]
        if not running or (len(finished) == beams and running[0][0] / n ** length_penalty <= finished[-1][0]):
            return finished
        rows.keep(parents)
        rows.advance(torch.tensor([ids[-1] for _, ids in running], device=sums.device))


@torch.no_grad()
def token_losses(net, ids, first):
    """Yields the nats (t,) of ids, an array or tensor, chunk after chunk; the first one's after the token `first`."""
    ids, state = torch.as_tensor(ids, dtype=torch.long), None
    for inputs, targets in zip(chunks(net, torch.cat((torch.tensor([first]), ids[:-1]))), chunks(net, ids)):
        logits, state = step(net, inputs, state)
        yield require_finite(F.cross_entropy(logits[0].float(), targets[0], reduction='none'))


# --- text ⇄ ids -------------------------------------------------------------------------------------------------------

class Writer:
    """Turns one sample's ids into text, whole characters only, and ends it at end-of-text or before a stop string.

    before: ids of what the text continues. ends: ids that end it. keep: whether `text` is wanted at the end."""

    def __init__(self, tok, stops=(), before=(), ends=(), keep=True):
        self.stops, self.ends, self.keep, self.decoder = stops, {tok.eot, *ends}, keep, tok.stream()
        self.pieces, self.held, self.done = [], '', False
        for i in before[-CONTEXT:]:
            self.decoder.feed(i)

    @property
    def text(self):
        return ''.join(self.pieces)

    def feed(self, i):
        """Takes the next id; returns the text that can be shown now."""
        if self.done:
            return ''
        self.done = i in self.ends
        return self.show(self.decoder.flush() if self.done else self.decoder.feed(i), self.done)

    def close(self):
        """Returns what was held back: an incomplete character, the beginning of a stop string."""
        if self.done:
            return ''
        self.done = True
        return self.show(self.decoder.flush(), True)

    def show(self, new, final):
        """What is held back and new, up to a stop string or what may become one, which is held back."""
        text = self.held + new
        ends = [at for at in (text.find(s) for s in self.stops) if at >= 0]
        end = len(text)
        if ends:
            end, self.done = min(ends), True
        elif not final:
            end -= max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        shown, self.held = text[:end], text[end:]
        if self.keep:
            self.pieces.append(shown)
        return shown


def encode_prompt(tok, text, setting='start'):
    """Ids of a prompt; <|endoftext|> at its beginning is the end-of-text id. Unusable text ends the program in a line
    that names the setting it came from."""
    ids = []
    if not text:
        fail(f'{setting} is empty: give a prompt, as in --{setting}="Once upon a time"; a newline alone will do')
    if text.startswith('<|endoftext|>'):
        ids, text = [tok.eot], text[len('<|endoftext|>'):]
    try:
        return ids + tok.encode(text).tolist()
    except ValueError as error:
        fail(f'{setting}: {error}, in {text[:60]!r}; choose another --{setting}')


def chat_marks(tok):
    """The ids of ChatML's marks, [begin, end]."""
    marks = [tok.hf.token_to_id(mark) if tok.kind == 'bpe' else None for mark in CHAT]
    if None in marks:
        fail(f'chat=True: this model\'s tokenizer has no {" and ".join(CHAT)}; leave it out, and mark the turns with text and --stop')
    return marks


def chat_turn(tok, messages, first):
    """The ids of messages [(role, text), …] in ChatML and of the beginning of the answer. first: else an answer ends here."""
    begin, end = chat_marks(tok)
    ids = [] if first else [end, *tok.encode('\n').tolist()]
    for role, text in messages:
        ids += [begin, *tok.encode(f'{role}\n{text}').tolist(), end, *tok.encode('\n').tolist()]
    return ids + [begin, *tok.encode('assistant\n').tolist()]


def token_text(tok, i):
    """A token as a table shows it: in quotes; bytes that are no characters as bytes."""
    if i == tok.eot:
        return '<|endoftext|>'
    raw = tok.token_bytes(i)
    try:
        return repr(raw.decode('utf-8'))
    except UnicodeDecodeError:
        return repr(raw)
