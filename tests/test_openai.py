"""The API as OpenAI's own client sees it, and what it says beside what sample.py and the model say."""
import os
import shutil

import pytest
import torch
from helpers.runs import script
from helpers.sampling import open_run
from helpers.served import serving, wait_until

from mambino import chat
from mambino.sample.text import encode_prompt
from mambino.weights import checkpoint

openai = pytest.importorskip('openai')
pytestmark = pytest.mark.usefixtures('one_thread')
SAMPLING = dict(temperature=0.8, top_p=0.95, extra_body=dict(top_k=50))
LIKE_IT = '--temperature=0.8 --top_p=0.95 --top_k=50 --device=cpu --dtype=float32 --stream=False'
RULE = '---------------\n'
HELLO = [dict(role='system', content='tin 12.'), dict(role='user', content='Bra nit?')]


@pytest.fixture(scope='module')
def server(runs):
    """Of the runs char and bpe, and of tuned, the latter with a chat template."""
    shutil.copytree('bpe', 'tuned')
    for name in os.listdir('tuned'):
        if name.endswith('.pt'):
            contents = checkpoint.load_checkpoint(f'tuned/{name}')
            contents['tokenizer']['config'] = dict(chat_template=chat.CHATML)
            checkpoint.save_checkpoint(f'tuned/{name}', contents)
    with serving(runs, out_dir='bpe') as server:
        yield server


@pytest.fixture
def ask(server):
    """ask(prompt, **parameters) → the completion of a model, bpe."""
    client = server.client()

    def ask(prompt, model='bpe', **parameters):
        return client.completions.create(model=model, prompt=prompt, **parameters)
    return ask


@pytest.fixture
def talk(server):
    """talk(messages, **parameters) → the answer of a model, bpe."""
    client = server.client()

    def talk(messages=HELLO, model='bpe', **parameters):
        return client.chat.completions.create(model=model, messages=messages, **parameters)
    return talk


@pytest.fixture
def jobs(server, monkeypatch):
    """A list of the jobs that come to the models' schedulers."""
    seen = []
    for name in ('bpe', 'tuned', 'char'):
        scheduler = server.scheduler(name)

        def submit(job, send, before=scheduler.submit):
            seen.append(job)
            return before(job, send)
        monkeypatch.setattr(scheduler, 'submit', submit)
    return seen


@pytest.fixture
def by_hand(capsys):
    """by_hand(model, flags) → the texts that sample.py writes, prompts and all."""
    def by_hand(model, flags):
        capsys.readouterr()
        assert script('sample.py', f'--out_dir={model} {LIKE_IT}', flags) == 0
        lines = capsys.readouterr().out.splitlines(keepends=True)
        first = next(n for n, line in enumerate(lines) if ' = ' not in line)    # behind the settings it repeats
        samples = ''.join(lines[first:]).split(RULE)
        return [sample.removesuffix('\n').rstrip('\ufffd') for sample in samples]
    return by_hand


def parts_of(stream, chat=False):
    """{index: [text, finish_reason] that a stream comes to}, and no part of a character in it."""
    answers = {}
    for chunk in stream:
        for choice in chunk.choices:
            answer = answers.setdefault(choice.index, ['', None])
            new = choice.delta.content if chat else choice.text
            assert '\ufffd' not in (new or '')
            answer[0] += new or ''
            answer[1] = choice.finish_reason or answer[1]
    return answers


# --- the same texts as sample.py ------------------------------------------------------------------

def test_models(server):
    assert {model.id for model in server.client().models.list()} == {'bpe', 'char', 'tuned'}


def test_seeds_are_those_of_sample(ask, by_hand, kind):
    texts = by_hand(kind, '--num_samples=3 --seed=7 --start=e --max_new_tokens=40')
    whole = ask('e', model=kind, n=3, seed=7, max_tokens=40, **SAMPLING)
    assert ['e' + choice.text for choice in whole.choices] == texts and len(set(texts)) == 3
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    streamed = parts_of(ask('e', model=kind, n=3, seed=7, max_tokens=40, stream=True, **SAMPLING))
    assert ['e' + streamed[i][0] for i in range(3)] == texts
    assert all(reason in ('length', 'stop') for _, reason in streamed.values())


def test_prompts_side_by_side(ask, by_hand, runs):
    with open('prompts.txt', 'w', encoding='utf-8') as f:
        f.write('in the\n€ 12\n')
    texts = by_hand('bpe', '--num_samples=2 --seed=3 --start=LINES:prompts.txt --max_new_tokens=12')
    whole = ask(['in the', '€ 12'], n=2, seed=3, max_tokens=12, echo=True, extra_body=dict(top_k=50, heal=True),
                temperature=0.8, top_p=0.95)
    assert [choice.text for choice in whole.choices] == texts
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    tok = open_run('bpe')[1]
    ids = [encode_prompt(tok, text) for text in ('in the', '€ 12')]
    texts = by_hand('bpe', '--num_samples=2 --seed=3 --start=LINES:prompts.txt --max_new_tokens=12 --heal=False')
    assert [choice.text for choice in ask(ids, n=2, seed=3, max_tokens=12, echo=True, **SAMPLING).choices] == texts


def test_an_empty_prompt_begins_a_document(ask, by_hand, jobs):
    texts = by_hand('bpe', '--seed=3 --start="<|endoftext|>" --max_new_tokens=12')
    for prompt in ('', [], '<|endoftext|>'):
        assert ask(prompt, seed=3, max_tokens=12, **SAMPLING).choices[0].text == texts[0], prompt
    tok = open_run('bpe')[1]
    assert all(job.ids == [tok.eot] for job in jobs)


def test_greedy_is_greedy(ask, by_hand):
    text, = by_hand('bpe', '--start=tin --max_new_tokens=20 --temperature=0')
    assert 'tin' + ask('tin', max_tokens=20, temperature=0).choices[0].text == text


def test_what_is_not_given_is_as_documented(ask, jobs):
    assert ask('e', logprobs=None, stop=None, seed=None).usage.completion_tokens <= 16
    job, = jobs
    assert (job.max_tokens, job.temperature, job.top_p, job.top_k, job.min_p) == (16, 1.0, 1.0, 0, 0.0)
    assert (job.repetition_penalty, job.presence_penalty, job.frequency_penalty, job.logit_bias) == (1.0, 0, 0, {})
    assert (job.stops, job.logprobs, job.prompt_logprobs, job.session, job.ignore_eos) == ((), -1, -1, '', False)
    ask('e', max_tokens=1)
    assert jobs[1].seed != job.seed


def test_what_is_given_is_passed_on(ask, jobs):
    ask('e', max_tokens=3, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={'7': 3}, stop=['x', '', 'yz'],
        temperature=0.5, top_p=0.9, seed=-1, user='me',
        extra_body=dict(top_k=-1, min_p=0.1, repetition_penalty=1.2, ignore_eos=True, store=True, unheard_of=[1]))
    job, = jobs
    assert (job.presence_penalty, job.frequency_penalty, job.logit_bias) == (0.5, -0.5, {7: 3.0})
    assert (job.top_k, job.min_p, job.repetition_penalty, job.ignore_eos) == (0, 0.1, 1.2, True)
    assert (job.temperature, job.top_p, job.seed, job.stops) == (0.5, 0.9, 2**63 - 1, ('x', 'yz'))


def test_more_tokens_than_allowed_are_as_many_as_allowed(ask, jobs):
    ask('e', max_tokens=10**6, stop=['e', 't', 'i', 'n', ' '])
    assert jobs[0].max_tokens == 4096


def test_a_session_goes_on(ask, by_hand, server):
    """As sample.py's of the same name would."""
    def session(name):
        return dict(temperature=0.8, top_p=0.95, extra_body=dict(top_k=50, session=name))
    texts = by_hand('bpe', '--session=one --seed=5 --start=tin --max_new_tokens=9')
    texts += by_hand('bpe', '--session=one --start=" in" --max_new_tokens=9')
    texts += by_hand('bpe', '--session=one --max_new_tokens=9')
    ours = [ask('tin', seed=5, max_tokens=9, **session('two')), ask(' in', max_tokens=9, **session('two')),
            ask('', max_tokens=9, **session('two'))]
    assert [answer.choices[0].text for answer in ours] == texts and len(set(texts)) == 3


# --- where answers end ----------------------------------------------------------------------------

@pytest.mark.parametrize('stream', [False, True])
def test_stop(ask, kind, stream):
    text = ask('e', model=kind, seed=4, max_tokens=60).choices[0].text
    stop = text[20:27]                                  # whatever tokens that is in
    before = text[:text.index(stop)]
    answer = ask('e', model=kind, seed=4, max_tokens=60, stop=['no such', stop], stream=stream)
    if stream:
        assert parts_of(answer) == {0: [before, 'stop']}
    else:
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (before, 'stop')
        assert answer.usage.completion_tokens < 60


def test_a_mark_can_be_a_stop(ask, jobs):
    ask('e', max_tokens=1, stop='<|im_end|>')
    assert jobs[0].end_ids == (open_run('bpe')[1].hf.token_to_id('<|im_end|>'),)


@pytest.mark.parametrize('stream', [False, True])
def test_half_a_character_is_not_shown(ask, jobs, stream):
    """A character whose bytes are drawn one after another, wholly and not to its end."""
    tok = open_run('bpe')[1]
    byte_ids = [tok.table.index(bytes([byte])) for byte in '😀'.encode()]
    prompt = [*tok.encode('e').tolist(), *byte_ids[:-1]]
    answer = ask(prompt, max_tokens=1, logit_bias={str(byte_ids[-1]): 100}, echo=True, stream=stream)
    assert (parts_of(answer)[0][0] if stream else answer.choices[0].text) == 'e😀'
    answer = ask(prompt[:-1], max_tokens=1, logit_bias={str(byte_ids[-2]): 100}, stream=stream)
    assert (parts_of(answer)[0][0] if stream else answer.choices[0].text) == ''


# --- logprobs -------------------------------------------------------------------------------------

@torch.no_grad()
def logprobs_by_model(kind, ids):
    """(T − 1, V) of the ids behind the first."""
    net, tok = open_run(kind)
    return net.eval()(torch.tensor([ids]))[0][0].float().log_softmax(-1)[:-1, :]


def check_logprobs(kind, ids, logprobs, text):
    """Those of the last tokens of ids, of two likeliest, are the model's."""
    tok = open_run(kind)[1]
    n = len(logprobs.tokens)
    assert n == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    whole = logprobs_by_model(kind, ids)
    for place in range(1, n + 1):
        i = ids[-place]
        own = logprobs.token_logprobs[-place]
        top = logprobs.top_logprobs[-place]
        if own is None:
            assert place == len(ids) and top is None
            continue
        scores = whole[len(ids) - place - 1]
        assert own == pytest.approx(scores[i].item(), abs=1e-4)
        assert sorted(top.values())[-2:] == pytest.approx(scores[:tok.vocab_size].topk(2).values.flip(0).tolist(),
                                                          abs=1e-4)
        assert top[logprobs.tokens[-place]] == own and 2 <= len(top) <= 3
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        assert text[offset:].startswith(token) or token.startswith(('bytes:', 'token_id:', '<|'))


@pytest.mark.parametrize('stream', [False, True])
def test_logprobs(ask, kind, stream):
    tok = open_run(kind)[1]
    prompt = tok.encode('in a').tolist()
    answer = ask(prompt, model=kind, max_tokens=20, logprobs=2, seed=1, stream=stream)
    if not stream:
        text, logprobs = answer.choices[0].text, answer.choices[0].logprobs
    else:
        chunks = [chunk.choices[0] for chunk in answer]
        text = ''.join(chunk.text for chunk in chunks)
        logprobs = chunks[0].logprobs
        for chunk in chunks[1:]:
            for field in ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset'):
                getattr(logprobs, field).extend(getattr(chunk.logprobs, field))
    from mambino.serve.logprobs import names_of
    ids = [names_of(tok).index(token) for token in logprobs.tokens]
    assert tok.decode(ids, begins=False).rstrip('\ufffd') == text and len(ids) <= 20
    check_logprobs(kind, [*prompt, *ids], logprobs, text)


def test_logprobs_of_the_prompt(ask, kind):
    """As lm-eval asks for them: a token more than the prompt has."""
    tok = open_run(kind)[1]
    prompts = [tok.encode(text).tolist() for text in ('in a € tin', 'n', 'éB12 ' * 5)]
    answer = ask(prompts, model=kind, max_tokens=1, logprobs=2, echo=True, temperature=0, seed=1234)
    for prompt, choice in zip(prompts, answer.choices):
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(prompt) + 1
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        last = logprobs_by_model(kind, [*prompt, 0])[-1, :tok.vocab_size].argmax().item()
        check_logprobs(kind, [*prompt, last], logprobs, choice.text)
        assert choice.text.startswith(tok.decode(prompt))


def test_a_prompt_alone_can_be_scored(ask, kind):
    tok = open_run(kind)[1]
    choice = ask('in a tin', model=kind, max_tokens=0, logprobs=2, echo=True).choices[0]
    ids = encode_prompt(tok, 'in a tin')
    assert choice.text == 'in a tin' and choice.finish_reason == 'length'
    assert len(choice.logprobs.tokens) == len(ids)
    check_logprobs(kind, ids, choice.logprobs, choice.text)


def test_logprobs_end_where_the_text_ends(ask):
    text = ask('e', seed=4, max_tokens=60, extra_body=dict(heal=False)).choices[0].text
    stop = text[20:24]
    answer = ask('e', seed=4, max_tokens=60, logprobs=0, stop=stop).choices[0]
    assert answer.text == text[:text.index(stop)]
    assert all(offset < len(answer.text) for offset in answer.logprobs.text_offset)
    assert all(len(top) == 1 for top in answer.logprobs.top_logprobs)


def test_names_of_tokens_are_all_different(runs):
    from mambino.serve.logprobs import names_of
    for kind in ('char', 'bpe'):
        tok = open_run(kind)[1]
        names = names_of(tok)
        assert len(set(names)) == len(names) == tok.vocab_size
        assert names[tok.eot] == '<|endoftext|>'
    assert 'bytes:\\xf0' in names


def test_best_of(ask, by_hand):
    every = ask('e', n=6, seed=2, max_tokens=20, logprobs=0)
    best = ask('e', n=2, best_of=6, seed=2, max_tokens=20, logprobs=0)
    scores = {}
    for choice in every.choices:
        scores[choice.text] = sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens)
    assert [choice.text for choice in best.choices] == sorted(scores, key=scores.get)[:-3:-1]
    assert best.usage.completion_tokens == every.usage.completion_tokens


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
    assert {i: answer[0] for i, answer in parts_of(streamed, chat=True).items()} == {
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


def test_a_template_that_refuses(server, talk, monkeypatch):
    tok = server.library.get('tuned').tok
    template = "{{ raise_exception('Roles must alternate') }}"
    monkeypatch.setitem(tok.config, 'chat_template', template)
    with pytest.raises(openai.BadRequestError, match='Roles must alternate'):
        talk(model='tuned')


def test_a_template_without_a_system(server, talk, jobs, monkeypatch):
    tok = server.library.get('tuned').tok
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chat.CHATML
    monkeypatch.setitem(tok.config, 'chat_template', template)
    talk(model='tuned', max_tokens=1)
    said = [dict(role='user', content='tin 12.\n\nBra nit?')]
    assert jobs[0].ids == chat.encode_prompt_of(tok, said)


# --- responses ------------------------------------------------------------------------------------

def test_responses(server, talk, jobs):
    client = server.client()
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
    (C, dict(prompt='e', n=2, best_of=1), 'best_of', 'at least n'),
    (C, dict(prompt='e', n=1, best_of=2, stream=True), 'best_of', 'stream'),
    (C, dict(prompt='e', logprobs=-1), 'logprobs', 'from 0'),
    (C, dict(prompt='e', logprobs=True), 'logprobs', 'whole number'),
    (C, dict(prompt='e', logprobs=1, heal=True), 'heal', 'logprobs'),
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
def test_what_is_wrong_is_named(server, path, body, param, words):
    for more in ({}, dict(stream=True)):
        status, _, answer = server.post(path, **{**more, **body})
        error = answer['error']
        assert status == 400 and set(error) == {'message', 'type', 'param', 'code'}, answer
        assert error['param'] == param and error['type'] == 'invalid_request_error' and words in error['message'], error


@pytest.mark.parametrize('body', [
    dict(tools=[], tool_choice='none', functions=[], response_format=dict(type='text'), modalities=['text']),
    dict(tools=None, stop=[], logit_bias={}, n=None, store=True, metadata=dict(a=1), parallel_tool_calls=True),
    dict(max_tokens=3.0, reasoning_effort='low', stream_options=dict(include_usage=True), service_tier='auto'),
])
def test_what_clients_send_by_habit_is_no_error(server, body):
    status, _, answer = server.post(T, **{'messages': HELLO, 'max_tokens': 2, **body})
    assert status == 200, answer


def test_errors_as_the_client_raises_them(ask, server):
    with pytest.raises(openai.NotFoundError) as caught:
        ask('e', model='nobody')
    assert caught.value.code == 'model_not_found' and 'bpe' in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        ask('e' * 200_000, extra_body=dict(heal=False))
    assert caught.value.code == 'context_length_exceeded'
    assert '65536' in caught.value.message and caught.value.param == 'prompt'


def test_the_client_waits_and_tries_again(server, monkeypatch):
    from mambino.serve.work import Full
    scheduler = server.scheduler('bpe')
    before, times = scheduler.submit, []

    def full_at_first(job, send):
        times.append(job)
        if len(times) < 3:
            raise Full(1)
        return before(job, send)
    monkeypatch.setattr(scheduler, 'submit', full_at_first)
    status, headers, answer = server.post(C, model='bpe', prompt='e')
    assert status == 429 and headers['Retry-After'] == '1' and answer['error']['code'] == 'queue_full'
    with pytest.raises(openai.RateLimitError):
        server.client().completions.create(model='bpe', prompt='e')
    times.clear()
    answer = server.client(max_retries=2).completions.create(model='bpe', prompt='e', max_tokens=2)
    assert len(times) == 3 and answer.usage.completion_tokens


def test_a_request_that_finds_no_room_for_all_leaves_none(server, monkeypatch):
    """What it has submitted is cancelled."""
    from mambino.serve.work import Full
    scheduler = server.scheduler('bpe')
    before, tickets = scheduler.submit, []

    def full_at_last(job, send):
        if len(tickets) == 3:
            raise Full(1)
        tickets.append(before(job, send))
        return tickets[-1]
    monkeypatch.setattr(scheduler, 'submit', full_at_last)
    assert server.post(C, model='bpe', prompt='e', n=4, max_tokens=4000, ignore_eos=True)[0] == 429
    wait_until(lambda: not scheduler.is_busy(), 5)


def test_a_failure_is_told(server, monkeypatch):
    from mambino.serve.work import Failed, Read, Token
    scheduler = server.scheduler('bpe')
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
        server.client().completions.create(model='bpe', prompt='e')
    for path, body in ((C, dict(prompt='e')), (T, dict(messages=HELLO))):
        stream = server.client().post(path.removeprefix('/v1'), body=dict(body, model='bpe', stream=True), stream=True,
                                      cast_to=dict, stream_cls=openai.Stream[dict])
        with pytest.raises(openai.APIError, match='no numbers'):
            list(stream)
    events = list(server.client().responses.create(model='bpe', input='e', stream=True))
    assert events[-1].type == 'response.failed' and 'no numbers' in events[-1].response.error.message
