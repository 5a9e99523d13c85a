"""From what a request asks for to the jobs of a scheduler: prompts as ids, a job for each answer.

    prompt = text_prompt(tok, 'Once upon a time', heal=True)
    jobs = jobs_of(served, values, [prompt], count=3, max_tokens=100)       # prompt by prompt, count of each

A text is a prompt as sample.py reads it, and the seeds are sample.py's: number i of a request with
a seed is what `sample.py --seed=… --num_samples=…` draws for its sample i.
"""
import random
from typing import NamedTuple

from mambino.chat import marks_in
from mambino.sample.next_token import seed_of
from mambino.sample.text import healed, prompt_ids, without_mark
from mambino.serve.told import Refused
from mambino.serve.work import Job

PLACE = 4               # likeliest tokens take as much memory as what else is told of a token
MOST_LISTED = 8_000_000     # of both in the answers of a request: a GB or two


class Prompt(NamedTuple):
    """What an answer goes on with."""
    text: str               # as an echo shows it
    ids: list               # all of them
    read: list              # those that the model reads
    owed: bytes = b''       # of the text what it spells itself behind them, see sample/healing.py


def text_prompt(tok, text, heal, begins=True):
    """The Prompt of a text; '' begins a new document. begins: else it goes on with one."""
    try:
        ids = prompt_ids(tok, text, begins)
    except ValueError as error:
        raise Refused(f'the prompt is no text to this model: {error}', param='prompt') from None
    read, owed = healed(tok, ids, text, begins) if heal else (ids, b'')
    return Prompt(without_mark(text), ids, read, owed)


def ids_prompt(tok, ids, begins=True):
    """The Prompt of token ids, which are read as they are; none begin a new document. begins: as of
    text_prompt."""
    wrong = next((i for i in ids if not 0 <= i < tok.vocab_size), None)
    if wrong is not None:
        raise Refused(f'the prompt has a token id of {wrong}, which is not in the vocabulary of {tok.vocab_size}',
                      param='prompt')
    stream = tok.stream()
    text = ''.join([stream.feed(i) for i in ids])   # of half a character at its end the answer has the rest
    if begins:
        ids = ids or tok.context()
    return Prompt(text, ids, ids)


def check_length(prompt, limits, param):
    """Refused if a prompt is longer than the limit; in words that clients look for."""
    if len(prompt.ids) > limits.max_prompt:
        raise Refused(f'this server\'s maximum context length is {limits.max_prompt} tokens, but the prompt has '
                      f'{len(prompt.ids)}: shorten it, or start the server with a larger --max_prompt', param=param,
                      code='context_length_exceeded')


def check_rows(total, scheduler):
    """Refused if a request asks for more answers than could ever be at work and wait together."""
    most = scheduler.stats()['rows'] + scheduler.room.queue
    if total > most:
        raise Refused(f'the request asks for {total} answers, of each prompt n or best_of; this server takes {most} '
                      'at once: send fewer, or start it with a larger --queue', param='n')


def check_listed(values, prompts, count, more):
    """Refused if the logprobs of a request took more memory than one may have. more: of jobs_of."""
    asked = getattr(values, 'logprobs', None)
    if asked is None or asked is False:
        return
    places = 0 if values.stream else count * len(prompts) * more['max_tokens']
    if more.get('prompt_logprobs', -1) >= 0:
        places += count * sum(len(prompt.ids) for prompt in prompts)
    most = MOST_LISTED // (PLACE + more['logprobs'])
    if places > most:
        raise Refused(f'the request asks for the logprobs of up to {places:,} tokens, each with the {more["logprobs"]} '
                      f'likeliest; at most {most:,} can be told at once: send fewer prompts, or ask for less',
                      param='logprobs')


def jobs_of(served, values, prompts, count, **more):
    """The Jobs of prompts, `count` for each. values: what parameters.read returned; more: fields of
    all jobs besides."""
    check_listed(values, prompts, count, more)
    tok = served.tok
    seed = values.seed
    if seed is None and not more.get('session'):        # a session's generator goes on
        seed = random.getrandbits(63)
    unknown = next((i for i in values.logit_bias if i >= tok.vocab_size), None)
    if unknown is not None:
        raise Refused(f'logit_bias has a token id of {unknown}, which is not in the vocabulary of {tok.vocab_size}',
                      param='logit_bias')
    more['stops'] = (*values.stop, *more.get('stops', ()))
    more['end_ids'] = (*more.get('end_ids', ()), *marks_among(tok, values.stop))
    return [Job(
        ids=prompt.read,
        owed=prompt.owed,
        temperature=values.temperature,
        top_k=max(0, values.top_k),
        top_p=values.top_p,
        min_p=values.min_p,
        repetition_penalty=values.repetition_penalty,
        presence_penalty=values.presence_penalty,
        frequency_penalty=values.frequency_penalty,
        logit_bias=values.logit_bias,
        ignore_eos=values.ignore_eos,
        seed=None if seed is None else seed_of(seed, number),
        **more,
    ) for number, prompt in enumerate(prompt for prompt in prompts for _ in range(count))]


def marks_among(tok, stops):
    """Ids of the special tokens that are named among texts to stop at: the ids have no text that
    could be found."""
    if not stops:
        return ()
    marks = marks_in(tok.text, '')
    return tuple(marks[stop] for stop in stops if stop in marks)
