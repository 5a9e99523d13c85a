"""What a person sees of sample.py: text as it grows, samples in order, tables of logprobs, a
conversation, rates.

    options = Options(sampling=dict(temperature=0.8, top_k=200), max_new_tokens=500)
    show_samples(net, tok, prompts, num_samples=3, batch_size=16, seed=1337, options=options)
    show_beams(net, tok, prompts, num_samples=1, beams=4, length_penalty=1.0, options=options)
    Dialogue(net, tok, session, options).answer(ids)        # goes on with a session's text
    converse(dialogue, opening, save)                       # … line by line, as it is typed

Text goes to stdout; rates, progress and hints, which are not part of it, to stderr.
"""
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mambino.cache import kept_as
from mambino.configurator import fail, shown
from mambino.machine import available_memory
from mambino.sample.conversation import Conversation
from mambino.sample.generation import Rows, beam_search, is_cache, prefill
from mambino.sample.healing import look_ahead, spelling_of
from mambino.sample.next_token import logprobs_of, seed_of
from mambino.sample.text import (
    CONTEXT,
    Writer,
    encode_prompt,
    healed,
    token_text,
    without_mark,
)

RULE = '---------------'
FEW = 64                # rows that need no look at the memory


@dataclass
class Options:
    """The settings of sample.py that all ways to go on with a text have in common."""
    sampling: dict                  # temperature, top_k, top_p, min_p: see next_token.sample_token
    max_new_tokens: int             # 0: without end
    repetition_penalty: float = 1.0
    stops: tuple = ()               # a sample ends before such a text
    logprobs: int = 0               # show each token's logprob, and of so many likeliest; 0: no table
    stream: bool = True             # show the (first) sample while it is generated
    heal: bool = True               # a prompt may end inside a token


# --- parts ----------------------------------------------------------------------------------------

@contextmanager
def patience():
    """A list that is no longer empty after Ctrl-C: a state must not be left half way. A second
    Ctrl-C ends the program."""
    interrupts = []

    def note(*_):
        interrupts.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def say(text):
    """Shows text at once."""
    print(text, end='', flush=True)


def show_table(tok, table):
    """Prints the logprobs of tokens, [(id, (logprob, [(id, logprob), …])), …]."""
    rows = []
    for i, (logprob, likeliest) in table:
        others = [f'{token_text(tok, j)} {other:.3f}' for j, other in likeliest]
        rows.append((token_text(tok, i), f'{logprob:.3f}', others))
    width = max([len(token) for token, _, _ in rows] + [5])
    columns = [max(map(len, column)) for column in zip(*(others for _, _, others in rows))]
    print(f'{"token":<{width}}  {"logprob":>8}  likeliest')
    for token, logprob, others in rows:
        likeliest = '  '.join(f'{other:<{n}}' for other, n in zip(others, columns))
        print(f'{token:<{width}}  {logprob:>8}  {likeliest}'.rstrip())


def show_rate(tokens, seconds, prompt_seconds, prompt_tokens):
    """Prints how fast tokens were drawn, and how long reading the prompt took."""
    if tokens and seconds:
        print(f'{tokens} tokens, {tokens / seconds:,.0f} tokens/s; '
              f'prompt of {prompt_tokens} read in {prompt_seconds:.2f} s', file=sys.stderr)


# --- samples, side by side ------------------------------------------------------------------------

class Sample:
    """One continuation of a prompt while it grows; with stream the first one shows itself."""

    def __init__(self, tok, number, prompt, seed, options):
        self.tok = tok
        self.number = number
        self.prompt = without_mark(prompt.text)
        self.live = options.stream and number == 0
        self.limit = options.max_new_tokens
        self.writer = Writer(tok, options.stops, prompt.ids, keep=not self.live, owed=prompt.owed)
        self.generator = torch.Generator().manual_seed(seed_of(seed, number))
        self.table = []                 # with logprobs, of each token
        if self.live:
            say(self.prompt)

    def feed(self, i, logprobs=None):
        """Takes the next token, and its logprobs if they are asked for."""
        new = self.writer.feed(i)
        if self.live and new:
            say(new)
        if logprobs:
            self.table.append((i, logprobs))

    def is_done(self):
        return self.writer.done or 0 < self.limit <= self.writer.length

    def show(self):
        """The sample is over: shows all of it, or if it was seen while it grew the rest."""
        rest = self.writer.close()
        if self.live:
            say(rest + '\n')
        else:
            rule = f'{RULE}\n' if self.number else ''
            print(rule + self.prompt + self.writer.text)
        if self.table:
            show_table(self.tok, self.table)


class Prompt(NamedTuple):
    """What comes before a sample."""
    text: str
    ids: list           # that are read
    owed: bytes         # what of the text is still to be spelled behind them, see healing.py


def prompt_of(tok, text, heal):
    """The Prompt of a text of the setting `start`."""
    ids = encode_prompt(tok, text)
    return Prompt(text, *(healed(tok, ids, text) if heal else (ids, b'')))


class Prompts:
    """Reads prompts; samples of one prompt share what was read of it."""

    def __init__(self, net, tok):
        self.net = net
        self.tok = tok
        self.last = None                # a Prompt, and what was read of it
        self.seconds = 0.0

    def read(self, prompt):
        """→ what Rows.add takes: what prefill returned, and the Rest or None."""
        if self.last is None or self.last[0] is not prompt:
            began = time.perf_counter()
            read = prefill(self.net, prompt.ids)
            self.last = prompt, read, look_ahead(self.net, self.tok, read, prompt.owed)
            self.seconds += time.perf_counter() - began
        return self.last[1:]


def rows_that_fit(net, read, vocab_size):
    """How many rows, each of what prefill returned, memory has room for; 2**31 where nobody knows."""
    logits, state, _ = read
    row = 40 * max(vocab_size, logits.shape[-1]) + 2000         # scores, sums, an order; what Python holds
    for name, value in kept_as(state, net.state_dtype).items():
        grown = max(1, net.config.block_size // value.shape[2]) if is_cache(name) else 1
        row += value.numel() * value.element_size() * grown
    there = available_memory(next(net.parameters()).device)
    return 2**31 if there is None else max(1, int(there * 0.8) // row)


def show_samples(net, tok, texts, num_samples, batch_size, seed, options):
    """Continues each prompt num_samples times, at most batch_size rows side by side, and shows the
    results in order, the first as it grows."""
    encoded = [prompt_of(tok, text, options.heal) for text in texts]
    total = len(encoded) * num_samples
    prompts = Prompts(net, tok)
    if min(batch_size, total) > FEW:
        longest = max(encoded, key=lambda prompt: len(prompt.ids))
        most = rows_that_fit(net, prompts.read(longest)[0], tok.vocab_size)
        if most < min(batch_size, total):
            print(f'note: batch_size={batch_size} is more than memory has room for: {most} at once', file=sys.stderr)
            batch_size = most
    rows = Rows(net, tok.vocab_size, options.repetition_penalty)
    active = []                         # the samples of the rows
    finished = {}                       # {number: sample}, those that wait for an earlier one
    begun = shown = tokens = 0
    likeliest = None

    def finish(sample):
        nonlocal shown
        finished[sample.number] = sample
        while shown in finished:
            finished.pop(shown).show()
            shown += 1

    began = time.perf_counter()
    with patience() as interrupts:
        while (begun < total or active) and not interrupts:
            new_rows = []
            while begun < total and len(active) < batch_size:
                prompt = encoded[begun // num_samples]
                new_rows.append(prompts.read(prompt))
                active.append(Sample(tok, begun, prompt, seed, options))
                begun += 1
            if new_rows:
                rows.add(*zip(*new_rows))
                if begun == total:
                    prompts.last = None                     # its state was copied

            generators = [sample.generator for sample in active]
            next_ids = rows.draw(generator=generators, **options.sampling)      # (B,)
            if options.logprobs:
                likeliest = logprobs_of(rows.logits, next_ids, options.logprobs, tok.vocab_size)
            tokens += len(active)
            going_on = []
            for place, (sample, i) in enumerate(zip(active, next_ids.tolist())):
                sample.feed(i, likeliest and likeliest[place])
                if sample.is_done():
                    finish(sample)
                else:
                    going_on.append(place)
            if len(going_on) < len(active):
                active = [active[place] for place in going_on]
                rows.keep(going_on)
                next_ids = next_ids[going_on]
            if active and not interrupts:
                rows.advance(next_ids)
    for sample in active:
        finish(sample)
    if interrupts:
        print('interrupted', file=sys.stderr)
    seconds = time.perf_counter() - began - prompts.seconds
    show_rate(tokens, seconds, prompts.seconds, sum(len(prompt.ids) for prompt in encoded))


def show_beams(net, tok, texts, num_samples, beams, length_penalty, options):
    """The best num_samples of `beams` continuations of each prompt, with their scores."""
    longest = max((len(stop.encode()) for stop in options.stops), default=0)
    latest = longest + 4                                    # a token is a byte or more

    for text in texts:
        prompt = prompt_of(tok, text, options.heal)

        def is_end(ids, prompt=prompt):
            """Whether a continuation's last ids end it."""
            old = ids[:-latest]
            owed = spelling_of(tok).still_owed(prompt.owed, old) if prompt.owed else b''
            writer = Writer(tok, options.stops, [*prompt.ids, *old], owed=owed)
            for i in ids[-latest:]:
                writer.feed(i)
            return writer.done

        def heal(read, prompt=prompt):
            """The Rest of a prompt; where memory has no room for so many beams, the end."""
            if beams > FEW and beams > (most := rows_that_fit(net, read, tok.vocab_size)):
                fail(f'beams={beams}: is more than memory has room for: give at most {most}')
            return look_ahead(net, tok, read, prompt.owed)

        best = beam_search(net, prompt.ids, beams, options.max_new_tokens, tok.vocab_size, is_end,
                           length_penalty, options.repetition_penalty,
                           heal=heal)
        for score, ids in best[:num_samples]:
            writer = Writer(tok, options.stops, prompt.ids, owed=prompt.owed)
            for i in ids:
                writer.feed(i)
            writer.close()
            print(f'{RULE} score {score:.4f}, {len(ids)} tokens')
            print(without_mark(text) + writer.text)


# --- a session's text, a conversation -------------------------------------------------------------

class Dialogue:
    """A session's text that is gone on with. end_ids: ids that end an answer, besides
    end-of-text."""

    def __init__(self, net, tok, session, options, end_ids=()):
        self.net = net
        self.tok = tok
        self.session = session
        self.options = options
        self.end_ids = end_ids

    def answer(self, ids, text='', show_speed=True):
        """Reads ids, then draws and shows tokens until one ends the answer. text: what the ids say, if
        the answer goes on with it, and not behind a mark."""
        options = self.options
        session = self.session
        owed = b''
        if ids:
            session.reopen(self.tok, self.end_ids)
        if text and options.heal:
            ids, owed = healed(self.tok, ids, text, not session.tokens, session.needs_ids())
        before = [*session.tokens[-CONTEXT:], *ids]
        writer = Writer(self.tok, options.stops, before, self.end_ids, keep=not options.stream, owed=owed)
        drawn = session.go_on(self.net, self.tok, ids, options.repetition_penalty,
                              self.end_ids, owed, **options.sampling)
        table = []
        n = 0                                               # tokens
        first = None                                        # when the first one was there
        began = time.perf_counter()
        with patience() as interrupts:
            for i, logits in drawn:
                n += 1
                first = first or time.perf_counter()
                new = writer.feed(i)
                if options.stream and new:
                    say(new)
                if options.logprobs:
                    next_id = torch.tensor([i], device=logits.device)
                    likeliest, = logprobs_of(logits, next_id, options.logprobs, self.tok.vocab_size)
                    table.append((i, likeliest))
                if writer.owed:             # until it is spelled the session lacks what it was given
                    continue
                if writer.done or interrupts or 0 < options.max_new_tokens <= writer.length:
                    break
        seconds = time.perf_counter() - first
        rest = writer.close()
        say((rest if options.stream else writer.text) + '\n')
        if options.logprobs:
            show_table(self.tok, table)
        if show_speed and n > 1:                            # what the first took, the prompt took
            show_rate(n, seconds * n / (n - 1), first - began, len(ids))
        if interrupts:
            print('interrupted', file=sys.stderr)


def converse(dialogue, opening, chat, save):
    """Reads lines and answers each, until there are no more; after each answer save() is called, if
    there is one.

    opening: the text before the first line, with chat the system message; chat: lines and answers
    are messages."""
    tok = dialogue.tok
    session = dialogue.session
    talk = Conversation(tok, session, opening) if chat else None
    ids = encode_prompt(tok, opening, begins=not session.tokens) if opening and not chat else []
    text = '' if chat else opening      # what ids say
    if sys.stdin.isatty():
        edit_lines()
        print('Enter sends a line, Ctrl-C ends an answer, Ctrl-D the conversation', file=sys.stderr)
    while (line := read_typed()) is not None:
        try:
            if chat:
                turn = talk.ids_of(line)
            else:
                begins = not (session.tokens or ids)
                turn = ids + (tok.bos if begins and line else []) + tok.encode(line, begins).tolist()
                text += line
        except ValueError as error:
            print(shown(f'{error}; say it otherwise'), file=sys.stderr)
            continue
        try:
            dialogue.answer(turn, text, show_speed=False)
        finally:                        # also where nobody reads on
            if chat:
                talk.answered()
            if save:
                save()
        ids = []
        text = ''
    if sys.stdin.isatty():
        print()


def edit_lines():
    """From here on input() lets a person edit the line, and find earlier ones, where Python can."""
    try:
        import readline
    except ImportError:                 # Windows
        return
    readline.set_completer(None)
    if 'libedit' not in (readline.__doc__ or ''):
        readline.parse_and_bind('tab: self-insert')     # else it would complete names of files


def read_typed():
    """What the user types next, lines that end in \\ taken together; None at the end of the
    input."""
    lines = []
    is_person = sys.stdin.isatty()
    while not lines or lines[-1].endswith('\\'):
        try:
            lines.append(input('> ' if is_person else ''))
        except EOFError:
            if not lines:
                return None
            break
        except KeyboardInterrupt:       # meant for an answer that had just ended, or for the line
            if not is_person:
                raise
            lines = []
            print()
        except UnicodeDecodeError as error:
            fail(f'standard input is not UTF-8: {error}')
    return '\n'.join([line.removesuffix('\\') for line in lines[:-1]] + lines[-1:])
