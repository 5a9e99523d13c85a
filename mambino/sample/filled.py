"""Shows texts that are filled, as they are uncovered where a person looks on.

    show_filled(net, tok, device, prompts, num_samples=3, seed=1337, options=options, sampler='first', steps=0, block=0)

On a terminal the (first) text is drawn again with each step, hidden tokens as ░; elsewhere what is printed is the
text alone, once it is whole.
"""
import re
import shutil
import sys
import time

import torch

from mambino.configurator import fail
from mambino.detokenizer import BROKEN
from mambino.sample.next_token import seed_of
from mambino.sample.terminal import RULE
from mambino.sample.text import Writer, without_mark
from mambino.sample.uncover import HOLE, Filler, with_holes

HIDDEN = '░'
NEARLY = re.compile(r'\[ *(?:\.{2,}|…) *[\w-]* *(?:\.{2,}|…)? *\]')     # what may be meant as a hole
PAUSE = 0.05            # seconds between two pictures, at least


class Screen:
    """A text on a terminal that is drawn again in its place."""

    def __init__(self):
        self.lines = 0                  # below the first
        self.seconds = 0.0

    def show(self, text, at_once=False):
        now = time.monotonic()
        if not at_once and now - self.seconds < PAUSE:
            return
        self.seconds = now
        columns, rows = shutil.get_terminal_size()
        lines = [line[i:i + columns] for line in text.split('\n') for i in range(0, max(1, len(line)), columns)]
        lines = lines[-(rows - 1):]
        up = f'\x1b[{self.lines}A' if self.lines else ''
        sys.stdout.write(f'{up}\r\x1b[J' + '\n'.join(lines))
        sys.stdout.flush()
        self.lines = len(lines) - 1

    def clear(self):
        self.show('', at_once=True)


def text_of(tok, ids, mask_id, begins=True):
    """A text whose hidden tokens are shown as such. begins: whether it is the beginning of one."""
    pieces, run = [], []
    for i in [*ids, mask_id]:
        if i != mask_id:
            run.append(i)
            continue
        pieces.append(tok.decode(run, begins and not pieces) if run else '')
        run = []
    return HIDDEN.join(pieces)


def going_on(filler, tok, ids, generator, stops=(), end_ids=()):
    """As filler.fill, of ids behind whose holes nothing stands: they end as soon as the text does."""
    begin = ids[:ids.index(filler.mask_id)]
    writer, read = None, []             # which ids it has taken
    for filled in filler.fill(ids, generator):
        yield filled
        known = filled[:filled.index(filler.mask_id)] if filler.mask_id in filled else filled
        if writer is None or known[:len(read)] != read:     # what was found may be hidden again
            writer, read = Writer(tok, stops, begin, end_ids, keep=False), begin
        for i in known[len(read):]:
            writer.feed(i)
        read = known
        if writer.done:
            return


def written(tok, ids, given, stops=(), end_ids=()):
    """A Writer with what came behind the first `given` ids, to the end of the text or a stop."""
    writer = Writer(tok, stops, ids[:given], end_ids)
    for i in ids[given:]:
        writer.feed(i)
        if writer.done:
            break
    return writer


def end_of(writer):
    """The text of a Writer, closed; of a character whose end was not found there is nothing to show."""
    text = writer.text
    return text + writer.close().rstrip(BROKEN)


def show_filled(net, tok, device, prompts, num_samples, seed, options, sampler, steps, block):
    """Fills the holes of each prompt, or goes on with it, num_samples times."""
    tokens, begin = 0, time.perf_counter()
    for number in range(len(prompts) * num_samples):
        prompt = prompts[number // num_samples]
        goes_on = not HOLE.search(prompt)
        nearly = NEARLY.search(HOLE.sub('', prompt))
        if nearly and number % num_samples == 0:
            print(f'note: {nearly[0]} is text to this model; a hole of 20 tokens is [...20...]', file=sys.stderr)
        filler = Filler(net, tok, device, sampler, steps, options.sampling, goes_on, block)
        try:
            ids = with_holes(tok, prompt, filler.mask_id)
        except ValueError as error:
            fail(f'start: {error}')
        if goes_on and not options.max_new_tokens:
            fail('max_new_tokens=0: this model fills holes, whose number it must know: say how many tokens')
        given = len(ids)
        ids += [filler.mask_id] * (options.max_new_tokens if goes_on else 0)
        tokens += ids.count(filler.mask_id)
        screen = Screen() if options.stream and number == 0 and sys.stdout.isatty() else None
        generator = torch.Generator().manual_seed(seed_of(seed, number))
        pictures = going_on(filler, tok, ids, generator, options.stops) if goes_on else filler.fill(ids, generator)
        for ids in pictures:
            if screen:
                screen.show(text_of(tok, ids, filler.mask_id))
        if screen:
            screen.clear()
        text = tok.decode(ids) if not goes_on else without_mark(prompt) + continuation(tok, ids, given, options.stops)
        print((f'{RULE}\n' if number else '') + text, flush=True)
    seconds = time.perf_counter() - begin
    print(f'{tokens} tokens, {tokens / seconds:,.0f} tokens/s', file=sys.stderr)


def continuation(tok, ids, given, stops):
    """The text of what came behind the first `given` ids, to its end or a stop."""
    return end_of(written(tok, ids, given, stops))
