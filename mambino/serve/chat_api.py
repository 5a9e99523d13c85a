"""POST /v1/chat/completions: conversations that a model answers.

    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

A model that was tuned on conversations has their template in its tokenizer, and is asked by that. A
base model has none; it gets the conversation as people write one down, goes on behind the last
line, and ends where it would begin the user's next one:

    The system message, if there is one.

    User: Hello
    Assistant: Hello, what can I do for you?
    User: Sing a song
    Assistant:

A tokenizer that cannot write these names, as one of single characters may, has the contents alone,
each on a line, and an answer is a line. The conversation is written anew for each request; what the
scheduler keeps of earlier ones makes that cheap.
"""
import asyncio
import functools
import secrets
import time
from typing import NamedTuple

from fastapi import Request

from mambino import chat
from mambino.prepare.conversations import without_system
from mambino.serve.answers import Answers, Choice, usage_of
from mambino.serve.errors import body_of
from mambino.serve.jobs import Prompt, check_length, check_rows, jobs_of, text_prompt
from mambino.serve.logprobs import as_chat, names_of
from mambino.serve.parameters import CHAT, read
from mambino.serve.sending import DONE, Shape, event_of, opened, respond
from mambino.serve.told import Refused

ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant'}
PARTS = ('text', 'input_text', 'output_text')       # of a content; the latter two of /v1/responses
NAMES = {'user': 'User:', 'assistant': 'Assistant:'}
BASE_TOKENS = 512           # of an answer of a base model, which hardly knows an end, where no number is asked for


class Question(NamedTuple):
    """A conversation that waits for an answer."""
    prompt: Prompt
    stops: tuple            # texts that end the answer
    end_ids: tuple
    is_base: bool           # the model was not tuned on conversations


# --- conversations --------------------------------------------------------------------------------

def messages_of(messages, param):
    """Messages of a request as [{'role', 'content'}, …]; Refused if one is none."""
    result = []
    for place, message in enumerate(messages):
        where = f'{param}[{place}]'
        role = message.get('role')
        if not isinstance(role, str) or role not in ROLES:
            reason = 'the models here call no tools' if role in ('tool', 'function') else 'there is no such role'
            raise Refused(f'{where}.role is {str(role)[:40]!r}: {reason}; it must be one of {", ".join(ROLES)}',
                          param=f'{where}.role')
        if message.get('tool_calls') or message.get('function_call'):
            raise Refused(f'{where} calls tools, and the models here call none', param=where)
        result.append(dict(role=ROLES[role], content=content_of(message.get('content'), f'{where}.content')))
    return result


def content_of(content, param):
    """The text of a message's content: a text, or a list of parts that are."""
    if content is None:
        return ''
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f'{param} must be a text or a list of parts, as [{{"type": "text", "text": "Hello"}}]',
                      param=param)
    texts = []
    for part in content:
        kind = part.get('type', 'text') if isinstance(part, dict) else None
        if kind not in PARTS or not isinstance(part.get('text'), str):
            raise Refused(f'{param} has a part of type {str(kind)[:40]!r}; the models here read text alone',
                          param=param)
        texts.append(part['text'])
    return ''.join(texts)


def question_of(tok, messages, heal, param):
    """The Question that messages ask a model with this tokenizer."""
    if not tok.config.get('chat_template'):
        return written_down(tok, messages, heal)
    try:
        ids = rendered(tok, messages)
    except ValueError as error:
        raise Refused(f'the chat template of this model refuses the conversation: {error}', param=param) from None
    return Question(Prompt('', ids, ids), (), ends_of(tok), False)


def rendered(tok, messages):
    """ids by the tokenizer's template. Where that takes no system message, it is put before the
    first question, as prepare.py does with a dataset's, and sample.py with what is typed."""
    try:
        return chat.encode_prompt_of(tok, messages)
    except ValueError:
        mended = without_system(messages)
        if not mended:
            raise
        return chat.encode_prompt_of(tok, mended)


@functools.lru_cache(maxsize=4)
def ends_of(tok):
    return tuple(chat.end_ids(tok))


def written_down(tok, messages, heal):
    """The Question in the plain template, see the top of the file."""
    names = NAMES if can_write(tok, '\n' + '\n'.join(NAMES.values()) + ' ') else {}
    lines = []
    for message in messages:
        name = names.get(message['role'])
        content = message['content'].strip()
        if name:
            lines.append(f'{name} {content}')
        else:
            lines.append(content + '\n' if names else content)      # the system's stands alone
    lines.append(names.get('assistant', ''))
    stop = '\n' + names['user'] if names else '\n'
    return Question(text_prompt(tok, '\n'.join(lines), heal), (stop,), (), True)


def can_write(tok, text):
    try:
        return tok.decode(tok.encode(text)) == text
    except ValueError:
        return False


def chat_jobs(served, values, messages, most, limits, param):
    """→ (the Question, the Jobs) of a conversation. most: tokens of an answer, or None."""
    if served.fills_holes:
        raise Refused(f'the model {served.id} fills holes, and answers no messages: POST /v1/completions asks it, or '
                      'name another model', param='model')
    check_rows(values.n, served.scheduler)
    question = question_of(served.tok, messages, not values.logprobs, param)
    check_length(question.prompt, limits, param)
    if values.logprobs:
        names_of(served.tok)            # now, in this thread
    if most is None:
        most = BASE_TOKENS if question.is_base else limits.max_tokens
    jobs = jobs_of(
        served, values, [question.prompt], values.n,
        max_tokens=min(most, limits.max_tokens),
        logprobs=values.top_logprobs if values.logprobs else -1,
        stops=question.stops,
        end_ids=question.end_ids,
    )
    return question, jobs


# --- the API --------------------------------------------------------------------------------------

def add_chat(app, library, limits):
    """Puts it on an app."""

    @app.post('/v1/chat/completions')
    async def chat_completions(request: Request):
        deadline = asyncio.get_running_loop().time() + limits.timeout
        values = read(CHAT, await body_of(request))
        if values.top_logprobs and not values.logprobs:
            raise Refused('top_logprobs needs logprobs: true', param='top_logprobs')
        messages = messages_of(values.messages, 'messages')
        most = values.max_tokens if values.max_completion_tokens is None else values.max_completion_tokens
        served, (question, jobs) = await opened(
            library, values.model, lambda served: chat_jobs(served, values, messages, most, limits, 'messages'))
        choices = [Choice(served.tok, job, lists=values.logprobs, strips=question.is_base) for job in jobs]
        shape = Chat(served, values, question.prompt, choices)
        return await respond(request, Answers(served.scheduler, jobs, deadline, values.stream), choices, shape)


class Chat(Shape):
    """The answers as this API has them."""

    def __init__(self, served, values, prompt, choices):
        super().__init__(choices)
        self.tok = served.tok
        self.values = values
        self.prompts = [prompt]
        kind = 'chat.completion.chunk' if values.stream else 'chat.completion'
        self.head = dict(id=f'chatcmpl-{secrets.token_hex(12)}', object=kind, created=int(time.time()), model=served.id,
                         system_fingerprint=f'fp_{served.fingerprint[:12]}')

    def whole(self):
        told = []
        for index, choice in enumerate(self.choices):
            text, entries = choice.new()
            message = dict(role='assistant', content=text, refusal=None)
            told.append(dict(index=index, message=message, logprobs=self.logprobs(choice, entries),
                             finish_reason=choice.reason))
        return dict(self.head, choices=told, usage=usage_of(self.prompts, self.choices))

    def logprobs(self, choice, entries):
        return as_chat(self.tok, entries) if choice.listing else None

    def begin(self):
        return b''.join([self.chunk(index, dict(role='assistant', content='')) for index in range(len(self.choices))])

    def news(self, choice, index):
        text, entries = choice.new()
        body = b''
        if text or entries:
            body = self.chunk(index, dict(content=text), self.logprobs(choice, entries))
        if choice.reason:
            body += self.chunk(index, {}, reason=choice.reason)
        return body

    def chunk(self, index, delta, logprobs=None, reason=None):
        choice = dict(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return self.event([choice])

    def event(self, choices, usage=None):
        body = dict(self.head, choices=choices)
        if self.values.stream_options:
            body['usage'] = usage
        return event_of(body)

    def end(self):
        if not self.values.stream_options:
            return DONE
        return self.event([], usage_of(self.prompts, self.choices)) + DONE
