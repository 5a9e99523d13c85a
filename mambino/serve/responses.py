"""POST /v1/responses: OpenAI's newer API, on top of the conversations of chat_api.py.

    curl http://127.0.0.1:8000/v1/responses -d '{"input": "Hello", "instructions": "Be brief."}'

Nothing is stored, so a request has the whole conversation in its input.
"""
import asyncio
import secrets
import time
from types import SimpleNamespace

from fastapi import Request

from mambino.serve.answers import Answers, Choice, usage_of
from mambino.serve.chat_api import chat_jobs, messages_of
from mambino.serve.errors import body_of, error_of
from mambino.serve.parameters import FILTERS, RESPONSE, read
from mambino.serve.sending import ENCODE, Shape, opened, respond

# of what this API has no parameter for
NOTHING = dict({parameter.name: parameter.default for parameter in FILTERS}, logprobs=False, top_logprobs=0)


def add_responses(app, library, limits):
    """Puts it on an app."""

    @app.post('/v1/responses')
    async def responses(request: Request):
        deadline = asyncio.get_running_loop().time() + limits.timeout
        values = SimpleNamespace(**NOTHING, **vars(read(RESPONSE, await body_of(request))))
        messages = messages_of(values.input, 'input')
        if values.instructions:
            messages = [dict(role='system', content=values.instructions), *messages]
        served, (question, jobs) = await opened(
            library, values.model,
            lambda served: chat_jobs(served, values, messages, values.max_output_tokens, limits, 'input'))
        choices = [Choice(served.tok, jobs[0], strips=question.is_base)]
        shape = OneResponse(served, values, question.prompt, choices)
        return await respond(request, Answers(served.scheduler, jobs, deadline, values.stream), choices, shape)


class OneResponse(Shape):
    """The answer as this API has it."""

    def __init__(self, served, values, prompt, choices):
        super().__init__(choices)
        self.prompts = [prompt]
        self.pieces = []                # of the text
        self.events = 0
        self.message_id = f'msg_{secrets.token_hex(12)}'
        self.head = dict(
            id=f'resp_{secrets.token_hex(12)}', object='response', created_at=int(time.time()), model=served.id,
            error=None, incomplete_details=None, instructions=values.instructions or None, metadata={},
            max_output_tokens=values.max_output_tokens, temperature=values.temperature, top_p=values.top_p,
            parallel_tool_calls=False, tool_choice='none', tools=[], text=dict(format=dict(type='text')),
            truncation='disabled', store=False, previous_response_id=None, background=False,
        )

    def response(self, status, **more):
        return dict(self.head, **dict(dict(status=status, output=[], usage=None), **more))

    def message(self, status, parts):
        return dict(id=self.message_id, type='message', role='assistant', status=status, content=parts)

    def part(self, text):
        return dict(type='output_text', text=text, annotations=[], logprobs=[])

    def whole(self):
        choice, = self.choices
        self.pieces.append(choice.new()[0])
        usage = usage_of(self.prompts, self.choices)
        status = 'completed' if choice.reason == 'stop' else 'incomplete'
        more = {} if status == 'completed' else dict(incomplete_details=dict(reason='max_output_tokens'))
        message = self.message(status, [self.part(''.join(self.pieces))])
        return self.response(status, **more, output=[message], usage=dict(
            input_tokens=usage['prompt_tokens'],
            input_tokens_details=usage['prompt_tokens_details'],
            output_tokens=usage['completion_tokens'],
            output_tokens_details=dict(reasoning_tokens=0),
            total_tokens=usage['total_tokens'],
        ))

    def event(self, kind, **fields):
        data = dict(type=kind, sequence_number=self.events, **fields)
        self.events += 1
        return f'event: {kind}\ndata: {ENCODE(data)}\n\n'.encode()

    def of_part(self, kind, **fields):
        return self.event(kind, item_id=self.message_id, output_index=0, content_index=0, **fields)

    def begin(self):
        response = self.response('in_progress')
        return b''.join((
            self.event('response.created', response=response),
            self.event('response.in_progress', response=response),
            self.event('response.output_item.added', output_index=0, item=self.message('in_progress', [])),
            self.of_part('response.content_part.added', part=self.part('')),
        ))

    def news(self, choice, index):
        text, _ = choice.new()
        if not text:
            return b''
        self.pieces.append(text)
        return self.of_part('response.output_text.delta', delta=text, logprobs=[])

    def end(self):
        response = self.whole()
        message, = response['output']
        part, = message['content']
        return b''.join((
            self.of_part('response.output_text.done', text=part['text'], logprobs=[]),
            self.of_part('response.content_part.done', part=part),
            self.event('response.output_item.done', output_index=0, item=message),
            self.event(f'response.{response["status"]}', response=response),
        ))

    def failed(self, error):
        said = error_of(error.message, error.status)['error']
        return self.event('response.failed', response=self.response(
            'failed', error=dict(code='server_error', message=said['message'])))
