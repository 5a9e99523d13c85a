"""The parameters of a request: what each is called, may be, is where it is absent, and is for.

    values = read(COMPLETION, {'prompt': 'Once upon a time', 'max_tokens': 20})
    values.max_tokens, values.temperature       # 20, 1.0

    JSON ──► refuse what would mislead ──► of each parameter its kind ──► a namespace of plain values

null is the default. Keys that are in no table are ignored, since clients send many. A value of another
type or out of its range is refused, in a sentence that names the parameter; what a model here cannot
do, tools for one, is refused where it is asked for, not where a client sends it empty.
"""
import re
from types import SimpleNamespace
from typing import NamedTuple

from mambino.sample.sessions import is_name
from mambino.sample.uncover import SAMPLERS
from mambino.serve.told import Refused

MOST_STOPS = 16
LONGEST_STOP = 256          # characters: each token is compared with every beginning of it
MOST_LIKELIEST = 100        # beside each token
MOST_CHOICES = 128
MOST_PROMPTS = 10_000       # more than any queue; each takes time to look at
MOST_BIASES = 1024
MOST_STEPS = 10_000         # in which holes are filled
SEEDS = 2**63


# --- kinds: functions of a name and a value → the value as it is used; or Refused ------------------

def whole(least, most):
    """An int, be it written 5 or 5.0."""
    def kind(name, value):
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise Refused(f'{name} must be a whole number, not {shown(value)}', param=name)
        return within(name, value, least, most)
    return kind


def number(least, most):
    def kind(name, value):
        if type(value) not in (int, float):
            raise Refused(f'{name} must be a number, not {shown(value)}', param=name)
        return float(within(name, value, least, most))
    return kind


def within(name, value, least, most):
    if not least <= value <= most:
        raise Refused(f'{name} is {shown(value)}; it must be from {least} to {most}', param=name)
    return value


def flag(name, value):
    if type(value) is not bool:
        raise Refused(f'{name} must be true or false, not {shown(value)}', param=name)
    return value


def text(name, value):
    if not isinstance(value, str):
        raise Refused(f'{name} must be a text, not {shown(value)}', param=name)
    return value


def sampler(name, value):
    if value not in SAMPLERS:
        raise Refused(f'{name} must be one of {", ".join(SAMPLERS)}, not {shown(value)}', param=name)
    return value


def session_name(name, value):
    if not isinstance(value, str) or value and not is_name(value):
        raise Refused(f'{name} must be a name of letters, digits, ".", "-", "_" and spaces, at most 100 or 200 '
                      f'bytes, that begins with a letter or digit, not {shown(value)}', param=name)
    return value


def stops(name, value):
    """A tuple of texts; empty ones, which would end everything, count as none."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(stop, str) for stop in values):
        raise Refused(f'{name} must be a text or a list of texts, not {shown(value)}', param=name)
    values = [stop for stop in values if stop]
    if len(values) > MOST_STOPS:
        raise Refused(f'{name} has {len(values)} texts; at most {MOST_STOPS} can be looked for', param=name)
    if any(len(stop) > LONGEST_STOP for stop in values):
        raise Refused(f'{name}: a text to stop at has at most {LONGEST_STOP} characters', param=name)
    return tuple(values)


def biases(name, value):
    """{id: what is added to its logit}; that there are such ids is seen where the model is known."""
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise Refused(f'{name} must be an object of at most {MOST_BIASES} token ids, each with a number from -100 to '
                      '100, as {"50256": -100}', param=name)
    result = {}
    for key, bias in value.items():
        if not re.fullmatch(r'[0-9]{1,9}', key):
            raise Refused(f'{name}: {shown(key)} is no token id', param=name)
        result[int(key)] = number(-100, 100)(f'{name}.{key}', bias)
    return result


def prompts(name, value):
    """A list of prompts, each a text or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if all(type(part) is int for part in value):    # none at all begin a new document
            return [value]
        if len(value) > MOST_PROMPTS:
            raise Refused(f'{name} has {len(value):,} prompts; at most {MOST_PROMPTS:,} can wait', param=name)
        if all(isinstance(part, str) for part in value):
            return value
        if all(isinstance(part, list) and all(type(i) is int for i in part) for part in value):
            return value
    raise Refused(f'{name} must be a text, a list of texts, a list of token ids or a list of such lists', param=name)


def options(name, value):
    """The options of a stream: whether it ends with the usage."""
    if not isinstance(value, dict):
        raise Refused(f'{name} must be an object, as {{"include_usage": true}}', param=name)
    include = value.get('include_usage')
    return flag(f'{name}.include_usage', False if include is None else include)


def messages(name, value):
    """A list of objects; what is in them is the template's business (chat_api.py)."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Refused(f'{name} must be a list of messages, as [{{"role": "user", "content": "Hello"}}]', param=name)
    return value


def talk(name, value):
    """The input of /v1/responses: a text, or messages."""
    return [dict(role='user', content=value)] if isinstance(value, str) else messages(name, value)


def text_format(name, value):
    """Nothing: text is all that there is."""
    if isinstance(value, dict) and value.get('format') not in (None, TEXT):
        raise Refused(NO_FORMAT.format(f'{name}.format'), param=name)


def shown(value):
    """A value as a sentence quotes it."""
    said = repr(value)
    return said if len(said) <= 60 else said[:60] + '…'


# --- what no model here can do: key, values that ask for nothing, why -----------------------------

NO_TOOLS = 'the models here call no tools: leave {} out'
NO_FORMAT = 'the models here are held to no format: leave {} out, or ask for text'
TEXT = dict(type='text')
REFUSED = [
    ('tools', ([],), NO_TOOLS),
    ('functions', ([],), NO_TOOLS),
    ('response_format', (TEXT,), NO_FORMAT),
    ('modalities', (['text'],), 'the models here write text: leave {} out'),
    ('audio', (), 'the models here write text: leave {} out'),
]
NO_SUFFIX = [       # of conversations
    ('suffix', ('',), 'a conversation has no {}: POST /v1/completions takes one, of a model that fills holes'),
]
NOT_STORED = [      # of /v1/responses; elsewhere clients ask for it by habit, and lose nothing
    ('store', (False,), 'nothing is stored here: send the whole conversation each time, and leave {} out'),
    ('previous_response_id', ('',), 'nothing is stored here: send the whole conversation as input, without {}'),
    ('conversation', ('',), 'nothing is stored here: send the whole conversation as input, without {}'),
]


# --- tables ---------------------------------------------------------------------------------------

REQUIRED = object()         # in the place of a default


class Parameter(NamedTuple):
    """name, kind, default, and what it is for."""
    name: str
    kind: object
    default: object
    purpose: str


MODEL = [
    Parameter('model', text, '', 'a run of the folder that is served; none: the one that answers by default'),
]
SAMPLING = [
    Parameter('temperature', number(0, 100), 1.0, 'below 1 is more careful, above 1 wilder; 0: the likeliest token'),
    Parameter('top_p', number(0, 1), 1.0, 'only the likeliest tokens that together have this probability'),
]
FILTERS = [     # what OpenAI's API has not got is called as vLLM and llama.cpp call it
    Parameter('top_k', whole(-1, 2**31), 0, 'only among so many likeliest tokens; 0 and -1: all'),
    Parameter('min_p', number(0, 1), 0.0, 'only tokens at least this times as likely as the likeliest'),
    Parameter('repetition_penalty', number(0.01, 100), 1.0, 'above 1 what is in the text is less likely'),
    Parameter('presence_penalty', number(-2, 2), 0.0, 'taken once from the logits of what was generated'),
    Parameter('frequency_penalty', number(-2, 2), 0.0, 'taken each time'),
    Parameter('logit_bias', biases, {}, 'added to the logits of token ids: {"id": -100 to 100}'),
    Parameter('seed', whole(-SEEDS, SEEDS - 1), None, 'the same request has the same answer; none: another each time'),
    Parameter('stop', stops, (), f'texts before which an answer ends, up to {MOST_STOPS}'),
    Parameter('ignore_eos', flag, False, 'end-of-text ends nothing: to measure'),
    Parameter('n', whole(1, MOST_CHOICES), 1, 'answers to each prompt'),
]
STREAM = [
    Parameter('stream', flag, False, 'tokens are sent as they come'),
    Parameter('stream_options', options, False, '{"include_usage": true}: the last event has the usage'),
]
COMPLETION = [
    *MODEL, *SAMPLING, *FILTERS, *STREAM,
    Parameter('prompt', prompts, [''], 'texts, or token ids; an empty one begins a new document'),
    Parameter('max_tokens', whole(0, 2**31), 16, 'of an answer; more than the server allows is that'),
    Parameter('suffix', text, '', 'what stands behind the answer, of a model that fills holes'),
    Parameter('sampler', sampler, None, 'of such a model: in which order holes are filled, see sample.py'),
    Parameter('steps', whole(0, MOST_STEPS), None, 'in how many, of a window or a block; 0: one a token'),
    Parameter('best_of', whole(1, MOST_CHOICES), None, 'so many are generated; the n likeliest are sent'),
    Parameter('echo', flag, False, 'the prompt stands before the answer'),
    Parameter('logprobs', whole(0, MOST_LIKELIEST), None, 'of each token, and of so many likeliest in its place'),
    Parameter('session', session_name, '', 'a name: the text is kept on disk, and the next prompt goes on with it'),
    Parameter('heal', flag, None, 'a text may end inside a token, see sample.py; as a rule so, but not with echo or '
                                  'logprobs'),
]
CHAT = [
    *MODEL, *SAMPLING, *FILTERS, *STREAM,
    Parameter('messages', messages, REQUIRED, 'of the roles system, developer, user and assistant'),
    Parameter('max_completion_tokens', whole(0, 2**31), None, 'of an answer'),
    Parameter('max_tokens', whole(0, 2**31), None, 'the same, as older clients call it'),
    Parameter('logprobs', flag, False, 'of each token of the answer'),
    Parameter('top_logprobs', whole(0, MOST_LIKELIEST), 0, 'and of so many likeliest in its place'),
]
RESPONSE = [
    *MODEL, *SAMPLING,
    Parameter('input', talk, REQUIRED, 'a text, or messages'),
    Parameter('instructions', text, '', 'the system message'),
    Parameter('max_output_tokens', whole(0, 2**31), None, 'of the answer'),
    Parameter('stream', flag, False, 'events are sent as tokens come'),
    Parameter('text', text_format, None, 'its format: text'),
]


def read(table, body):
    """A namespace with a value for each parameter of a table. body: a dict. Refused names the first
    parameter that is wrong."""
    no_suffix = [] if table is COMPLETION else NO_SUFFIX
    not_stored = NOT_STORED if table is RESPONSE else []
    for key, harmless, reason in [*REFUSED, *no_suffix, *not_stored]:
        value = body.get(key)
        if value is not None and value not in harmless:
            raise Refused(reason.format(key), param=key)
    values = SimpleNamespace()
    for name, kind, default, _ in table:
        value = body.get(name)
        if value is None and default is REQUIRED:
            raise Refused(f'{name} is missing', param=name)
        setattr(values, name, default if value is None else kind(name, value))
    return values
