"""What the API refuses, and how: in the shape of OpenAI's errors, so that its client raises the right one."""
import pytest
from helpers.served import HELLO, wait_until

openai = pytest.importorskip('openai')
pytestmark = pytest.mark.usefixtures('one_thread')


# --- what cannot be -------------------------------------------------------------------------------

C, T, R = '/v1/completions', '/v1/chat/completions', '/v1/responses'
WRONG = [
    (C, dict(prompt=5), 'prompt', 'must be'),
    (C, dict(prompt=['a', 1]), 'prompt', 'must be'),
    (C, dict(prompt=[[1], [True]]), 'prompt', 'must be'),
    (C, dict(prompt=[[1, 9999]]), 'prompt', '9999'),
    (C, dict(prompt=[-1]), 'prompt', '-1'),
    (C, dict(prompt='e', max_tokens=-1), 'max_tokens', 'from 0'),
    (C, dict(prompt='e', max_tokens='5'), 'max_tokens', "'5'"),
    (C, dict(prompt='e', max_tokens=1.5), 'max_tokens', '1.5'),
    (C, dict(prompt='e', max_tokens=True), 'max_tokens', 'whole number'),
    (C, dict(prompt='e', temperature=-0.1), 'temperature', 'from 0'),
    (C, dict(prompt='e', temperature=10**400), 'temperature', 'from 0'),
    (C, dict(prompt='e', top_p=1.1), 'top_p', 'from 0 to 1'),
    (C, dict(prompt='e', presence_penalty=3), 'presence_penalty', 'from -2 to 2'),
    (C, dict(prompt='e', n=0), 'n', 'from 1'),
    (C, dict(prompt='e', n=1000), 'n', 'to 128'),
    (C, dict(prompt='e', n=100), 'n', '100 answers'),
    (C, dict(prompt=['e'] * 81), 'n', '81 answers'),
    (C, dict(prompt=[[]] * 10_001), 'prompt', '10,001 prompts'),
    (C, dict(prompt='e', n=2, best_of=1), 'best_of', 'at least n'),
    (C, dict(prompt='e', n=1, best_of=2, stream=True), 'best_of', 'stream'),
    (C, dict(prompt='e', logprobs=-1), 'logprobs', 'from 0'),
    (C, dict(prompt='e', logprobs=True), 'logprobs', 'whole number'),
    (C, dict(prompt='e', logprobs=1, heal=True), 'heal', 'logprobs'),
    (C, dict(prompt=[[1] * 2000] * 80, logprobs=100, echo=True, stream=False), 'logprobs', '161,280 tokens'),
    (C, dict(prompt='e', n=80, logprobs=100, max_tokens=10**6, stream=False), 'logprobs', '327,680 tokens'),
    (C, dict(prompt='e', logit_bias={'x': 1}), 'logit_bias', "'x'"),
    (C, dict(prompt='e', logit_bias={'1': 101}), 'logit_bias.1', 'from -100'),
    (C, dict(prompt='e', logit_bias={'5000': 1}), 'logit_bias', '5000'),
    (C, dict(prompt='e', logit_bias=[]), 'logit_bias', 'object'),
    (C, dict(prompt='e', stop=5), 'stop', 'text'),
    (C, dict(prompt='e', stop=['x'] * 17), 'stop', '17'),
    (C, dict(prompt='e', stop='x' * 300), 'stop', '256'),
    (C, dict(prompt='e', stream='yes'), 'stream', 'true or false'),
    (C, dict(prompt='e', stream_options=dict(include_usage=1)), 'stream_options.include_usage', 'true or false'),
    (C, dict(prompt='e', seed=2**64), 'seed', 'from'),
    (C, dict(prompt='e', suffix='end'), 'suffix', 'masked-diffusion'),
    (C, dict(prompt='e', model=['bpe']), 'model', 'text'),
    (C, dict(prompt='e', session='../x'), 'session', 'name'),
    (C, dict(prompt='e', session='\u6f22' * 100), 'session', 'name'),       # no file's name is as long
    (C, dict(prompt='e', session='tale', n=2), 'session', 'one answer'),
    (C, dict(prompt='e', session='tale', echo=True, logprobs=1), 'echo', 'logprobs'),
    (C, dict(prompt='z', model='char'), 'prompt', "'z'"),
    (T, dict(), 'messages', 'missing'),
    (T, dict(messages=[]), 'messages', 'list of messages'),
    (T, dict(messages='hi'), 'messages', 'list of messages'),
    (T, dict(messages=[dict(role='king', content='hi')]), 'messages[0].role', 'no such role'),
    (T, dict(messages=[dict(role=['user'], content='hi')]), 'messages[0].role', 'no such role'),
    (T, dict(messages=[dict(role='tool', content='hi')]), 'messages[0].role', 'no tools'),
    (T, dict(messages=[dict(role='user', content=5)]), 'messages[0].content', 'text'),
    (T, dict(messages=[dict(role='user', content=[dict(type='image_url', image_url={})])]), 'messages[0].content',
     'image_url'),
    (T, dict(messages=HELLO, tools=[dict(type='function')]), 'tools', 'no tools'),
    (T, dict(messages=HELLO, functions=[{}]), 'functions', 'no tools'),
    (T, dict(messages=HELLO, response_format=dict(type='json_object')), 'response_format', 'format'),
    (T, dict(messages=HELLO, top_logprobs=2), 'top_logprobs', 'logprobs: true'),
    (T, dict(messages=HELLO, logprobs=1), 'logprobs', 'true or false'),
    (T, dict(messages=HELLO, max_completion_tokens=-5), 'max_completion_tokens', 'from 0'),
    (R, dict(input='hi', store=True), 'store', 'stored'),
    (R, dict(input='hi', previous_response_id='resp_1'), 'previous_response_id', 'stored'),
    (R, dict(input='hi', tools=[{}]), 'tools', 'no tools'),
    (R, dict(input='hi', text=dict(format=dict(type='json_schema'))), 'text', 'format'),
    (R, dict(), 'input', 'missing'),
]


@pytest.mark.parametrize('path, body, param, words', WRONG, ids=[
    f'{path.rpartition("/")[2]}-{str(body)[:40]}' for path, body, _, _ in WRONG])
def test_what_is_wrong_is_named(api, path, body, param, words):
    for more in ({}, dict(stream=True)):
        status, _, answer = api.post(path, **{**more, **body})
        error = answer['error']
        assert status == 400 and set(error) == {'message', 'type', 'param', 'code'}, answer
        assert error['param'] == param and error['type'] == 'invalid_request_error' and words in error['message'], error


@pytest.mark.parametrize('body', [
    dict(tools=[], tool_choice='none', functions=[], response_format=dict(type='text'), modalities=['text']),
    dict(tools=None, stop=[], logit_bias={}, n=None, store=True, metadata=dict(a=1), parallel_tool_calls=True),
    dict(max_tokens=3.0, reasoning_effort='low', stream_options=dict(include_usage=True), service_tier='auto'),
])
def test_what_clients_send_by_habit_is_no_error(api, body):
    status, _, answer = api.post(T, **{'messages': HELLO, 'max_tokens': 2, **body})
    assert status == 200, answer


def test_errors_as_the_client_raises_them(ask, api):
    with pytest.raises(openai.NotFoundError) as caught:
        ask('e', model='nobody')
    assert caught.value.code == 'model_not_found' and 'bpe' in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        ask('e' * 200_000, extra_body=dict(heal=False))
    assert caught.value.code == 'context_length_exceeded'
    assert '65536' in caught.value.message and caught.value.param == 'prompt'


def test_the_client_waits_and_tries_again(api, monkeypatch):
    from mambino.serve.work import Full
    scheduler = api.scheduler('bpe')
    before, times = scheduler.submit, []

    def full_at_first(job, send):
        times.append(job)
        if len(times) < 3:
            raise Full(1)
        return before(job, send)
    monkeypatch.setattr(scheduler, 'submit', full_at_first)
    status, headers, answer = api.post(C, model='bpe', prompt='e')
    assert status == 429 and headers['Retry-After'] == '1' and answer['error']['code'] == 'queue_full'
    with pytest.raises(openai.RateLimitError):
        api.client().completions.create(model='bpe', prompt='e')
    times.clear()
    answer = api.client(max_retries=2).completions.create(model='bpe', prompt='e', max_tokens=2)
    assert len(times) == 3 and answer.usage.completion_tokens


def test_a_request_that_finds_no_room_for_all_leaves_none(api, monkeypatch):
    """What it has submitted is cancelled."""
    from mambino.serve.work import Full
    scheduler = api.scheduler('bpe')
    before, tickets = scheduler.submit, []

    def full_at_last(job, send):
        if len(tickets) == 3:
            raise Full(1)
        tickets.append(before(job, send))
        return tickets[-1]
    monkeypatch.setattr(scheduler, 'submit', full_at_last)
    assert api.post(C, model='bpe', prompt='e', n=4, max_tokens=4000, ignore_eos=True)[0] == 429
    wait_until(lambda: not scheduler.is_busy(), 5)


def test_a_failure_is_told(api, monkeypatch):
    from mambino.serve.work import Failed, Read, Token
    scheduler = api.scheduler('bpe')
    sent = []

    class Ticket:
        def cancel(self):
            sent.append('cancelled')

    def broken(job, send):
        for event in (Read(1, 0, []), Token(5, 'some', None), Failed('the model computes no numbers', 500)):
            send(event)
        return Ticket()
    monkeypatch.setattr(scheduler, 'submit', broken)
    with pytest.raises(openai.InternalServerError, match='no numbers'):
        api.client().completions.create(model='bpe', prompt='e')
    for path, body in ((C, dict(prompt='e')), (T, dict(messages=HELLO))):
        stream = api.client().post(path.removeprefix('/v1'), body=dict(body, model='bpe', stream=True), stream=True,
                                      cast_to=dict, stream_cls=openai.Stream[dict])
        with pytest.raises(openai.APIError, match='no numbers'):
            list(stream)
    events = list(api.client().responses.create(model='bpe', input='e', stream=True))
    assert events[-1].type == 'response.failed' and 'no numbers' in events[-1].response.error.message
