"""Conversations as OpenAI's own client has them, in both of its APIs; usage."""
import pytest
from helpers.sampling import open_run
from helpers.served import HELLO, logprobs_by_model, parts_of

from mambino import chat
from mambino.sample.text import encode_prompt
from mambino.weights import checkpoint

openai = pytest.importorskip('openai')
pytestmark = pytest.mark.usefixtures('one_thread')


# --- usage ----------------------------------------------------------------------------------------

def test_usage(ask, talk):
    tok = open_run('bpe')[1]
    n = len(encode_prompt(tok, 'in a tin'))
    usage = ask('in a tin', n=2, max_tokens=5, extra_body=dict(ignore_eos=True)).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (n, 10, n + 10)
    assert usage.prompt_tokens_details.cached_tokens >= 0
    for options, last in (({}, None), (dict(stream_options=dict(include_usage=True)), 10)):
        chunks = list(ask('in a tin', n=2, max_tokens=5, stream=True, extra_body=dict(ignore_eos=True), **options))
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert (chunks[-1].usage and chunks[-1].usage.completion_tokens) == last
        assert (chunks[-1].choices == []) == bool(options)
    chunks = list(talk(max_tokens=5, stream=True, stream_options=dict(include_usage=True)))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens <= 5
    assert len({chunk.id for chunk in chunks}) == 1


# --- conversations --------------------------------------------------------------------------------

def test_a_base_model_is_asked_in_plain_words(talk, jobs):
    answer = talk(seed=1, max_tokens=20)
    tok = open_run('bpe')[1]
    job, = jobs
    assert tok.decode(job.ids) + job.owed.decode() == 'tin 12.\n\nUser: Bra nit?\nAssistant:'
    assert job.stops == ('\nUser:',) and job.max_tokens == 20
    message = answer.choices[0].message
    assert message.role == 'assistant' and message.content == message.content.lstrip()
    talk([*HELLO, dict(role='assistant', content='tin'), dict(role='user', content=[
        dict(type='text', text='in '), dict(type='text', text='é')])], max_completion_tokens=1, max_tokens=50)
    assert jobs[1].max_tokens == 1
    assert tok.decode(jobs[1].ids).startswith('tin 12.\n\nUser: Bra nit?\nAssistant: tin\nUser: in é\nAssistan')


def test_a_tokenizer_that_cannot_write_the_names_has_the_contents(talk, jobs):
    tok = open_run('char')[1]
    talk([dict(role='user', content='in a tin')], model='char', max_tokens=1)
    assert tok.decode(jobs[0].ids) == 'in a tin\n' and jobs[0].stops == ('\n',)


def test_a_tuned_model_is_asked_by_its_template(talk, jobs):
    tok = checkpoint.tokenizer_of(checkpoint.load_checkpoint('tuned'))
    whole = talk(model='tuned', seed=1, n=2, max_tokens=20, stop='no such', temperature=0.8)
    assert jobs[0].ids == chat.encode_prompt_of(tok, HELLO) and jobs[0].owed == b''
    assert set(jobs[0].end_ids) == set(chat.end_ids(tok)) and jobs[0].stops == ('no such',)
    streamed = talk(model='tuned', seed=1, n=2, max_tokens=20, stop='no such', temperature=0.8, stream=True)
    assert {i: answer[0] for i, answer in parts_of(streamed).items()} == {
        choice.index: choice.message.content for choice in whole.choices}
    talk(model='tuned', max_tokens=1, messages=[dict(HELLO[0], role='developer'), HELLO[1]])
    assert jobs[-1].ids == jobs[0].ids
    talk(model='tuned', stop=['e', 't', ' ', 'n', 'i'])
    assert jobs[-1].max_tokens == 4096


def test_chunks_of_a_conversation(talk):
    chunks = [chunk.choices[0] for chunk in talk(model='tuned', max_tokens=5, stream=True, seed=1)]
    assert chunks[0].delta.role == 'assistant' and chunks[0].finish_reason is None
    assert all(chunk.delta.role is None for chunk in chunks[1:])
    assert chunks[-1].delta.content is None and chunks[-1].finish_reason in ('length', 'stop')


@pytest.mark.parametrize('stream', [False, True])
def test_logprobs_of_a_conversation(talk, jobs, stream):
    answer = talk(max_tokens=12, logprobs=True, top_logprobs=3, seed=1, stream=stream)
    if stream:
        told = [chunk.choices[0].logprobs for chunk in answer]
        content = [entry for logprobs in told if logprobs for entry in logprobs.content]
    else:
        content = answer.choices[0].logprobs.content
    tok = open_run('bpe')[1]
    ids = [tok.table.index(bytes(entry.bytes)) for entry in content]
    assert 0 < len(ids) <= 12
    scores = logprobs_by_model('bpe', [*jobs[0].ids, *ids])[-len(ids):]
    for row, i, entry in zip(scores, ids, content):
        assert entry.logprob == pytest.approx(row[i].item(), abs=1e-4)
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == pytest.approx(row[:tok.vocab_size].topk(3).values.tolist(), abs=1e-4)
        assert all(top.logprob == entry.logprob for top in entry.top_logprobs if top.token == entry.token)


def test_a_template_that_refuses(api, talk, monkeypatch):
    tok = api.library.get('tuned').tok
    template = "{{ raise_exception('Roles must alternate') }}"
    monkeypatch.setitem(tok.config, 'chat_template', template)
    with pytest.raises(openai.BadRequestError, match='Roles must alternate'):
        talk(model='tuned')


def test_a_template_without_a_system(api, talk, jobs, monkeypatch):
    tok = api.library.get('tuned').tok
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chat.CHATML
    monkeypatch.setitem(tok.config, 'chat_template', template)
    talk(model='tuned', max_tokens=1)
    said = [dict(role='user', content='tin 12.\n\nBra nit?')]
    assert jobs[0].ids == chat.encode_prompt_of(tok, said)


@pytest.mark.parametrize('model', ['bpe', 'tuned'])
def test_a_conversation_is_not_read_again(talk, model):
    messages, read = list(HELLO), 0
    for turn in range(3):
        answer = talk(messages, model=model, max_tokens=8, seed=turn)
        usage = answer.usage
        # of a text in plain words the last token waits for what comes (healing)
        assert usage.prompt_tokens_details.cached_tokens >= read - 2 and usage.prompt_tokens > read
        read = usage.prompt_tokens
        content = answer.choices[0].message.content
        messages += [dict(role='assistant', content=content), dict(role='user', content='nit 12 Bra')]


# --- responses ------------------------------------------------------------------------------------

def test_responses(api, talk, jobs):
    client = api.client()
    whole = client.responses.create(model='tuned', input='Bra nit?', instructions='tin 12.', max_output_tokens=9,
                                    temperature=0)
    assert whole.output_text == talk(model='tuned', temperature=0, max_tokens=9).choices[0].message.content
    assert jobs[0].ids == jobs[1].ids
    assert whole.status == ('incomplete' if whole.usage.output_tokens == 9 else 'completed')
    stream = client.responses.create(model='tuned', input=[dict(role='user', content=[dict(
        type='input_text', text='Bra nit?')])], instructions='tin 12.', max_output_tokens=9, temperature=0, stream=True)
    events = list(stream)
    kinds = [event.type.removeprefix('response.') for event in events]
    assert kinds[:4] == ['created', 'in_progress', 'output_item.added', 'content_part.added']
    assert kinds[-4:] == ['output_text.done', 'content_part.done', 'output_item.done', whole.status]
    assert ''.join(event.delta for event in events if event.type == 'response.output_text.delta') == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == whole.output_text
    with client.responses.stream(model='tuned', input='Bra nit?', max_output_tokens=9) as stream:
        assert [event.type for event in stream][-1] in ('response.completed', 'response.incomplete')
