"""What is asked of a model that fills holes, as the jobs of its thread, and the answers.

    prompts, jobs = fills_of(served, values, ['To be [...20...] question'], count=3, most=100)     # Prompts, Fills

    "prompt": "a [...20...] b"              20 tokens between the two
    "prompt": "a", "suffix": "b"            max_tokens between them
    "prompt": "a"                           max_tokens behind it, or fewer where the text ends

The answer is the text from the first hole to the last one, and what is given between them. With the same seed it is
what sample.py writes there.
"""
import random
from dataclasses import replace

from mambino.sample.next_token import seed_of
from mambino.sample.text import without_mark
from mambino.sample.uncover import HOLE, with_holes
from mambino.serve.jobs import Prompt, check_length, check_rows, ids_prompt, marks_among
from mambino.serve.told import Refused
from mambino.serve.work import Done, Failed, Fill, Frame


def check_forwards(served, values):
    """Refused if holes are to be filled by a model that goes on from token to token."""
    for name in ('suffix', 'sampler', 'steps'):
        if getattr(values, name):
            raise Refused(f'{name}: the model {served.id} goes on from token to token; this takes one that fills holes '
                          f'(masked-diffusion, train.py --objective=masked): leave {name} out', param=name)
    check_no_holes(served, values.prompt)


def check_no_holes(served, prompts):
    """Refused if one of these prompts has a hole: the model would take its mark for text."""
    marks = [HOLE.search(prompt) for prompt in prompts if isinstance(prompt, str)]
    mark = next(filter(None, marks), None)
    if mark:
        raise Refused(f'{mark[0][:40]} is a hole in a text, and the model {served.id} has learned to go on alone: name '
                      'one that was trained with --objective=masked', param='prompt')


def check_fills(served, values):
    """Refused if something is asked for that only a model that goes on from token to token has."""
    asked = dict(
        logprobs=values.logprobs is not None,
        best_of=(values.best_of or values.n) > values.n,
        session=values.session,
        heal=values.heal,
        ignore_eos=values.ignore_eos,
        logit_bias=values.logit_bias,
        repetition_penalty=values.repetition_penalty != 1,
        presence_penalty=values.presence_penalty,
        frequency_penalty=values.frequency_penalty,
    )
    for name in [name for name, is_asked in asked.items() if is_asked]:
        raise Refused(f'{name}: the model {served.id} fills holes, and does not go on from token to token: leave '
                      f'{name} out', param=name)
    if values.sampler == 'threshold' and values.steps:
        raise Refused('steps: threshold takes as many steps as there are tokens it is not sure of: leave steps out, or '
                      'name another sampler', param='steps')


def fills_asked(served, values, limits):
    """→ (the Prompts, the Fills) of a request, prompt by prompt, n of each."""
    check_fills(served, values)
    check_rows(len(values.prompt) * values.n, served.scheduler)
    prompts, jobs = fills_of(served, values, values.prompt, values.n, limits.max_tokens)
    for prompt in prompts:
        check_length(prompt, limits, 'prompt')
    return prompts, jobs


def fills_of(served, values, texts, count, most):
    """→ (the Prompts of what is given, the Fills, `count` of each). most: tokens that are found in one."""
    seed = random.getrandbits(63) if values.seed is None else values.seed
    prompts, jobs = [], []
    for text in texts:
        prompt, job = fill_of(served, values, text, most)
        prompts.append(prompt)
        jobs += [replace(job, seed=seed_of(seed, len(jobs) + i)) for i in range(count)]
    return prompts, jobs


def fill_of(served, values, text, most):
    """→ (the Prompt, the Fill, whose seed is to be said) of a text, or of ids."""
    tok = served.tok
    hole = served.net.config.vocab_size - 1
    suffix = values.suffix
    pieces = HOLE.split(text) if isinstance(text, str) else []
    sizes = pieces[1::2]
    if HOLE.search(suffix):
        raise Refused('a hole in suffix: write the whole text as prompt, with all of its holes', param='suffix')
    if sizes and suffix:
        raise Refused('the prompt has holes of its own: write what stands behind them there, and leave suffix out',
                      param='suffix')
    if not (sizes or values.max_tokens):
        raise Refused('max_tokens is 0: this model fills holes, whose number it must know: say how many tokens',
                      param='max_tokens')
    param = 'prompt'
    try:
        if sum(map(int, sizes)) > most:
            raise ValueError(f'its holes have more than {most} tokens, which is what this server finds at most: ask '
                             'for fewer, or start it with a larger --max_tokens')
        if pieces:
            head, ids = without_mark(pieces[0]), with_holes(tok, text, hole)
        else:
            head, ids, *_ = ids_prompt(tok, text)
        if not sizes:
            param = 'suffix'
            behind = tok.encode(suffix, False).tolist() if suffix else []
            ids = [*ids, *[hole] * min(values.max_tokens, most), *behind]
    except ValueError as error:
        raise Refused(f'{param}: {error}', param=param) from None
    return Prompt(head, [i for i in ids if i != hole], ids), Fill(
        ids=ids,
        first=ids.index(hole),
        last=len(ids) - ids[::-1].index(hole),
        goes_on=not (sizes or suffix),
        head=head,
        tail=pieces[-1] if sizes else '',
        temperature=values.temperature,
        top_k=max(0, values.top_k),
        top_p=values.top_p,
        min_p=values.min_p,
        stops=values.stop,
        end_ids=marks_among(tok, values.stop),
        sampler=values.sampler or 'first',
        steps=values.steps or 0,
        frames=values.stream,
    )


class FilledChoice:
    """One answer while it is filled, in the place of answers.py's Choice. echo: whether the rest of the prompt stands
    around it."""
    unread = 'not all holes were filled'        # what is wrong where it has come to nothing
    listing = None                              # there are no logprobs

    def __init__(self, job, echo):
        self.head = job.head if echo else ''
        self.tail = job.tail if echo else ''
        self.frame = None                       # the text as it is now; None: as it was told
        self.text = ''                          # at the end
        self.reason = None                      # 'stop' or 'length', when it is over
        self.is_read = False                    # whether it is whole
        self.cached = 0
        self.tokens = 0                         # that were found

    def take(self, event):
        """Takes up an event; Refused if there is no answer."""
        kind = type(event)
        if kind is Frame:
            self.frame = self.head + event.text + self.tail
        elif kind is Done and event.reason != 'cancelled':
            tail = '' if event.reason == 'stop' else self.tail
            self.frame = self.text = self.head + event.text + tail
            self.reason = event.reason
            self.tokens = event.tokens
            self.is_read = True
        elif kind is Failed:
            raise Refused(event.message, event.status)

    def new(self):
        """→ (the text, the logprobs' entries), as a Choice has them."""
        return self.text, []
