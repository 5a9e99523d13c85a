"""The server with models that fill holes: what sample.py writes, streams of frames, what is refused, who goes away."""
import json
import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.holes import RUNS, V, build, runs_in
from helpers.runs import script
from helpers.served import HELLO, serving, wait_until

from mambino.export import to_hf
from mambino.sample.filled import HIDDEN, continuation
from mambino.tokenizer import build_tokenizer

pytest.importorskip('fastapi')
pytestmark = pytest.mark.usefixtures('one_thread')
C = '/v1/completions'
SAMPLING = dict(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01)
LIKE_IT = '--temperature=0.8 --top_k=20 --top_p=0.95 --min_p=0.01 --device=cpu --dtype=float32'
RULE = '---------------\n'
every_run = pytest.mark.parametrize('name', RUNS)


@pytest.fixture(scope='module')
def server(trained_runs, tmp_path_factory):
    """With RUNS, and char, which goes on from token to token; their folder is the working directory."""
    from mambino.serve.work import Room
    with (runs_in(tmp_path_factory.mktemp('holes'), trained_runs) as folder,
          serving(folder, out_dir='masked', room=Room(rows=2, queue=3)) as server):
        yield server


@pytest.fixture
def by_hand(capsys):
    """by_hand(run, flags) → the texts that sample.py writes."""
    def by_hand(name, flags):
        capsys.readouterr()
        assert script('sample.py', f'--out_dir={name} {LIKE_IT}', flags) == 0
        lines = capsys.readouterr().out.splitlines(keepends=True)
        first = next(n for n, line in enumerate(lines) if ' = ' not in line)    # behind the settings it repeats
        return [text.removesuffix('\n') for text in ''.join(lines[first:]).split(RULE)]
    return by_hand


def completed(server, **body):
    status, _, answer = server.post(C, **{**SAMPLING, **body})
    assert status == 200, answer
    return answer


def chunks_of(raw):
    events = [line[6:] for line in raw.decode().split('\n') if line.startswith('data: ')]
    assert events[-1] == '[DONE]'
    return [json.loads(event) for event in events[:-1]]


# --- the same texts as sample.py ------------------------------------------------------------------

@every_run
def test_texts_are_those_of_sample(server, by_hand, name):
    """Of holes in the prompt, of a suffix, of a text that goes on; each of n with a seed of its own."""
    prompt = 'at [...9...] in [...30...]eno'
    texts = by_hand(name, f'--num_samples=2 --seed=7 --start="{prompt}" --sampler=ancestral --steps=5')
    body = dict(model=name, prompt=prompt, n=2, seed=7, sampler='ancestral', steps=5)
    answer = completed(server, **body)
    assert ['at ' + choice['text'] + 'eno' for choice in answer['choices']] == texts and len(set(texts)) == 2
    assert [choice['text'] for choice in completed(server, **body, echo=True)['choices']] == texts
    assert {choice['finish_reason'] for choice in answer['choices']} == {'length'}
    usage = answer['usage']
    assert (usage['prompt_tokens'], usage['completion_tokens'], usage['total_tokens']) == (3 + 4 + 3, 78, 88)

    text, = by_hand(name, '--seed=5 --start="tin [...20...] shrd"')
    answer = completed(server, model=name, prompt='tin ', suffix=' shrd', max_tokens=20, seed=5)
    assert 'tin ' + answer['choices'][0]['text'] + ' shrd' == text
    assert answer['usage']['prompt_tokens'] == 9 and answer['usage']['completion_tokens'] == 20
    with_echo = completed(server, model=name, prompt='tin ', suffix=' shrd', max_tokens=20, seed=5, echo=True)
    assert with_echo['choices'][0]['text'] + ' shrd' == text

    for stop in ('', 'e'):
        texts = by_hand(name, f'--seed=1 --num_samples=4 --start=tin --max_new_tokens=40 --stop={stop}')
        answer = completed(server, model=name, prompt='tin', max_tokens=40, seed=1, n=4, stop=stop)
        assert ['tin' + choice['text'] for choice in answer['choices']] == texts
        for choice, whole in zip(answer['choices'], texts):
            assert choice['finish_reason'] == ('length' if len(whole) == 43 else 'stop')
            assert not stop or stop not in choice['text']


def test_prompts_of_ids_and_many(server):
    tok = server.library.get('masked').tok
    ids = tok.encode('tin').tolist()
    want = completed(server, prompt=['tin', 'an [...5...]', ''], seed=3, max_tokens=6)['choices']
    assert [choice['index'] for choice in want] == [0, 1, 2] and len(want[1]['text']) == 5
    assert completed(server, prompt=ids, seed=3, max_tokens=6)['choices'][0]['text'] == want[0]['text']


def test_no_text_ends_in_a_hole(server):
    """But one that goes on may."""
    wild = dict(temperature=5, top_k=0, top_p=1, min_p=0, max_tokens=300, seed=0)
    assert len(completed(server, prompt='a', suffix='e', **wild)['choices'][0]['text']) == 300
    choice, = completed(server, prompt='a', **wild)['choices']
    assert choice['finish_reason'] == 'stop' and len(choice['text']) < 300


def test_a_stop_cuts_what_was_found(server):
    text = completed(server, prompt='a [...30...] e', seed=2)['choices'][0]['text']
    stop = text[10:12]
    for echo, before in ((False, ''), (True, 'a ')):
        choice, = completed(server, prompt='a [...30...] e', seed=2, stop=stop, echo=echo)['choices']
        assert choice['text'] == before + text[:text.index(stop)] and choice['finish_reason'] == 'stop'


def test_behind_a_stop_nothing_is_looked_for(server):
    before = server.scheduler('block').stats()['steps']
    choice, = completed(server, model='block', prompt='a', max_tokens=2000, seed=2, stop=['e', 't', ' '])['choices']
    assert choice['finish_reason'] == 'stop' and server.scheduler('block').stats()['steps'] < before + 400


def test_the_client_of_openai_inserts(server):
    client = server.client()
    models = {model.id: model.fills_holes for model in client.models.list()}
    assert models == dict.fromkeys(RUNS, True) | dict(char=False)
    asked = dict(model='block', prompt='tin ', suffix=' shrd', max_tokens=20, seed=5, temperature=0.8)
    more = dict(sampler='confidence', steps=4)
    text = client.completions.create(**asked, extra_body=more).choices[0].text
    assert len(text) == 20
    stream = client.completions.create(**asked, extra_body=more, stream=True, stream_options=dict(include_usage=True))
    chunks = list(stream)
    assert ''.join(choice.text for chunk in chunks for choice in chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 20


@pytest.mark.parametrize('out_dir', ['masked', 'masked/best.pt', 'hf:exported', 'char', 'hf:other'])
def test_what_fills_holes_is_known_before_it_is_loaded(server, out_dir):
    """By the checkpoint, or by the config.json of a folder of transformers."""
    from mambino.serve.library import Library
    from mambino.serve.work import Room
    folder = out_dir.removeprefix('hf:')
    if folder != out_dir:
        os.makedirs(folder)
        net = build('gpt', objective='masked' if folder == 'exported' else 'next')
        to_hf.write(net, None, folder)
    library = Library('nowhere', out_dir, 'cpu', 'float32', '', '', 0.0, Room())
    run, = library.names()
    assert library.fills_holes(run) == (folder in ('masked', 'masked/best.pt', 'exported')) and not library.loaded


# --- the page -------------------------------------------------------------------------------------

KNOBS = dict(length=30, temperature=0.7, top_k=9, top_p=0.9, min_p=0.05, repetition=1.2, answers=2, seed=11, steps=4,
             heal=False, sampler='confidence', stop=r'e|\n')


@pytest.mark.parametrize('name, changes, session, chat', [
    ('char', {}, '', False),
    ('char', dict(heal=True, stop=''), '', False),
    ('char', dict(stop='|'), '', False),
    ('char', dict(answers=1), 'tale', False),
    ('char', dict(answers=1), '', True),
    ('masked', dict(repetition=1.0), '', False)])
def test_the_page_says_how_the_api_does_the_same(server, name, changes, session, chat):
    """The jobs are the same, but that a page looks on; what is so anyway is left out."""
    pytest.importorskip('nicegui')
    from mambino.serve.api import Limits
    from mambino.serve.chat_api import chat_jobs
    from mambino.serve.completions import asked as asked_by_api
    from mambino.serve.page.answers import Asked, body_of, jobs_asked
    from mambino.serve.parameters import CHAT, COMPLETION, read
    served = server.library.get(name)
    messages = [dict(role='user', content='at')] if chat else None
    asked = Asked('at eno', messages, {**KNOBS, **changes}, session)
    body = json.loads(json.dumps(body_of(name, asked, served.fills_holes)))
    if chat:
        values = read(CHAT, body)
        jobs = chat_jobs(served, values, values.messages, values.max_tokens, Limits(), 'messages')[1]
    else:
        values = read(COMPLETION, body)
        jobs = asked_by_api(served, values, Limits())[1]
    assert ('stop' in body) == ('stop' not in changes) and ('session' in body) == bool(session)
    assert ('heal' in body) == (name == 'char' and not chat and 'heal' not in changes)
    assert ('repetition_penalty' in body) == (name == 'char')
    if changes.get('stop') != '|':      # with which the page has no answer
        shown = jobs_asked(served, asked)
        assert jobs == [job if served.fills_holes else replace(job, logprobs=-1) for job in shown]


# --- streams --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, prompt', [('masked', 'at [...50...]en'), ('block', 'at')])
def test_a_stream_shows_the_text_as_it_is_uncovered(server, monkeypatch, name, prompt):
    """Frames with fewer holes each time; the texts joined are the text."""
    monkeypatch.setattr('mambino.serve.filling.PAUSE', 0.0)
    body = dict(model=name, prompt=prompt, max_tokens=50, seed=4, n=2, echo=True, **SAMPLING)
    want = completed(server, **body)['choices']
    status, headers, raw = server.request('POST', C, dict(body, stream=True, stream_options=dict(include_usage=True)))
    *chunks, last = chunks_of(raw)
    assert status == 200 and headers['Content-Type'].startswith('text/event-stream') and last['choices'] == []
    for index, whole in enumerate(want):
        told = [choice for chunk in chunks for choice in chunk['choices'] if choice['index'] == index]
        assert ''.join(choice['text'] for choice in told) == whole['text'] == told[-1]['text']
        assert [choice['finish_reason'] for choice in told] == [None] * (len(told) - 1) + [whole['finish_reason']]
        frames = [choice['frame'] for choice in told]
        hidden = [frame.count(HIDDEN) for frame in frames]
        assert hidden[0] >= 45 and hidden[-1] == 0 and hidden == sorted(hidden, reverse=True) and len(set(hidden)) > 2
        assert frames[-1] == whole['text'] and all(frame.startswith('at') for frame in frames)
        if name == 'masked':
            assert all(len(frame) == 55 and frame.endswith('en') for frame in frames)


def test_frames_are_no_more_than_a_person_sees(server):
    raw = server.request('POST', C, dict(prompt='[...100...]', stream=True, seed=0))[2]
    assert 2 <= len(chunks_of(raw)) < 60


# --- beside others --------------------------------------------------------------------------------

def test_two_at_once_go_on_by_turns(server):
    """Each has the text that it has alone, and the short one is not behind the long one; models of tokens go on."""
    server.scheduler('char')
    long, short = dict(prompt='at [...800...]', seed=1), dict(prompt='in [...20...]', seed=2)
    alone = [completed(server, **body)['choices'][0]['text'] for body in (long, short)]
    scheduler = server.scheduler('masked')
    ends = []

    def ask(number, body):
        ends.append((number, completed(server, **body)['choices'][0]['text']))
    threads = [threading.Thread(target=ask, args=(0, long))]
    threads[0].start()
    wait_until(lambda: scheduler.stats()['rows_used'] == 1)
    for number, body in ((1, short), (2, dict(model='char', prompt='e', max_tokens=5))):
        threads.append(threading.Thread(target=ask, args=(number, body)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert ends[-1] == (0, alone[0]) and dict(ends)[1] == alone[1]


def is_free(server, name='masked'):
    scheduler = server.scheduler(name)
    stats = scheduler.stats()
    return not (stats['rows_used'] or stats['queue'] or scheduler.is_busy())


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('name', ['masked', 'block'])
def test_who_goes_away_stops_the_work(server, name, stream):
    scheduler = server.scheduler(name)
    with server.begin(C, model=name, prompt='a [...4000...]', stream=stream):
        wait_until(lambda: scheduler.stats()['rows_used'])
        steps = scheduler.stats()['steps']
    assert wait_until(lambda: is_free(server, name)) < 2
    assert scheduler.stats()['steps'] < steps + 3000


def test_a_layer_is_the_longest_that_others_wait(server, monkeypatch):
    """Between two layers other models have their turn."""
    filling = server.scheduler('masked')
    turns = []
    monkeypatch.setattr(filling.turns, 'give_way', lambda: turns.append(1))
    before = filling.stats()['steps']
    completed(server, prompt='a [...30...]')
    steps = filling.stats()['steps'] - before
    layers = server.library.get('masked').net.config.n_layer
    assert steps >= 30 and len(turns) >= steps * (1 + layers)


def test_who_is_cancelled_ends_between_two_layers():
    from mambino.serve.filling import Filling
    from mambino.serve.work import Done, Fill, Room

    class Tok:
        vocab_size = V - 1
        eot = 0
    net = build('gpt', objective='masked')
    filling = Filling(net, Tok, Room())
    layers, ended = [], threading.Event()

    run_layer = net.run_layer

    def hooked(*arguments):
        result = run_layer(*arguments)
        layers.append(1)
        filling.current.ticket.cancel()
        return result
    net.run_layer = hooked
    events = []

    def send(event):
        events.append(event)
        if isinstance(event, Done):
            ended.set()
    filling.submit(Fill([1, V - 1, V - 1], 1, 3, goes_on=False), send)
    try:
        assert ended.wait(20) and events[-1].reason == 'cancelled'
        assert len(layers) == 1 < net.config.n_layer
    finally:
        filling.close()


def test_half_a_character_at_the_end_is_not_shown():
    """Where a text goes on and was cut, as sample.py writes it; not where something stands behind it."""
    from mambino.serve.filling import Text
    from mambino.serve.work import Fill
    tok = build_tokenizer('byte')
    net = build('gpt', objective='masked', vocab_size=258)
    ids = list('né'.encode())[:2]
    for goes_on, text in ((True, 'n'), (False, 'n\ufffd')):
        filled = Text(SimpleNamespace(job=Fill([257, 257], 0, 2, goes_on=goes_on)), net, tok, 'cpu')
        filled.ids = ids
        assert filled.done().text == text
    assert continuation(tok, ids, 0, ()) == 'n' and continuation(tok, [*ids, 169], 0, ()) == 'né'


def test_the_queue_has_an_end(server):
    """Two rows, three may wait: who comes then is told to come back."""
    scheduler = server.scheduler('masked')
    wires = []

    def all_are_in():
        stats = scheduler.stats()
        return stats['rows_used'] + stats['queue'] == len(wires)
    try:
        for _ in range(5):
            wires.append(server.begin(C, prompt='a [...4000...]'))
            wait_until(all_are_in)
        wait_until(lambda: scheduler.stats()['rows_used'] == 2)
        status, headers, answer = server.post(C, prompt='a')
        assert status == 429 and int(headers['Retry-After']) >= 1 and answer['error']['code'] == 'queue_full'
    finally:
        for wire in wires:
            wire.close()
    wait_until(lambda: is_free(server))
    status, _, answer = server.post(C, prompt='a', n=6)
    assert status == 400 and answer['error']['param'] == 'n'


def test_time_that_is_over_is_said(server):
    """What is half filled is no answer."""
    from mambino.serve.api import Limits
    with serving('.', out_dir='masked', limits=Limits(timeout=0.5)) as quick:
        quick.scheduler()
        status, headers, answer = quick.post(C, prompt='a [...4000...]')
        assert status == 503 and 'not all holes were filled' in answer['error']['message']
        assert headers['x-should-retry'] == 'false'
        raw = quick.request('POST', C, dict(prompt='a [...4000...]', stream=True))[2]
        assert '"error"' in raw.decode() and 'not all holes were filled' in raw.decode()


def test_a_model_without_numbers_is_a_500(server):
    """And it goes on with the next request."""
    net = server.library.get('gpt-block').net
    weight = net.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float('nan'))
    try:
        status, _, answer = server.post(C, model='gpt-block', prompt='a', max_tokens=4)
        assert status == 500 and 'computes no numbers' in answer['error']['message']
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert completed(server, model='gpt-block', prompt='a', max_tokens=4)


# --- what cannot be -------------------------------------------------------------------------------

WRONG = [
    (C, dict(prompt='a', logprobs=0), 'logprobs', 'fills holes'),
    (C, dict(prompt='a', best_of=3, stream=False), 'best_of', 'fills holes'),
    (C, dict(prompt='a', session='tale'), 'session', 'fills holes'),
    (C, dict(prompt='a', heal=True), 'heal', 'fills holes'),
    (C, dict(prompt='a', ignore_eos=True), 'ignore_eos', 'fills holes'),
    (C, dict(prompt='a', logit_bias={'1': 2}), 'logit_bias', 'fills holes'),
    (C, dict(prompt='a', repetition_penalty=1.1), 'repetition_penalty', 'fills holes'),
    (C, dict(prompt='a', presence_penalty=1), 'presence_penalty', 'fills holes'),
    (C, dict(prompt='a', frequency_penalty=1), 'frequency_penalty', 'fills holes'),
    (C, dict(prompt='a', max_tokens=0), 'max_tokens', 'say how many'),
    (C, dict(prompt='a', sampler='best'), 'sampler', 'one of ancestral'),
    (C, dict(prompt='a', steps=10**6), 'steps', 'from 0 to'),
    (C, dict(prompt='a', sampler='threshold', steps=4), 'steps', 'leave steps out'),
    (C, dict(prompt='a [...5...]', suffix='e'), 'suffix', 'leave suffix out'),
    (C, dict(prompt='a', suffix='e [...5...]'), 'suffix', 'the whole text as prompt'),
    (C, dict(prompt='a', suffix='z'), 'suffix', "'z'"),
    (C, dict(prompt='z [...5...]'), 'prompt', "'z'"),
    (C, dict(prompt='a [...0...]'), 'prompt', 'a hole is of 1 to'),
    (C, dict(prompt='a [...3000...] [...3000...]'), 'prompt', '--max_tokens'),
    (C, dict(prompt='a [...' + '9' * 5000 + '...]'), 'prompt', 'prompt: '),
    (C, dict(prompt=[24]), 'prompt', 'vocabulary'),
    (C, dict(model='char', prompt='a', suffix='e'), 'suffix', '--objective=masked'),
    (C, dict(model='char', prompt='a', sampler='first'), 'sampler', 'goes on from token to token'),
    (C, dict(model='char', prompt='a', steps=5), 'steps', 'goes on from token to token'),
    (C, dict(model='char', prompt='a [...5...]'), 'prompt', 'learned to go on alone'),
    ('/v1/chat/completions', dict(messages=HELLO), 'model', '/v1/completions'),
    ('/v1/chat/completions', dict(messages=HELLO, model='char', suffix='e'), 'suffix', 'a conversation has no suffix'),
    ('/v1/responses', dict(input='hi'), 'model', '/v1/completions'),
    ('/score', dict(text='tin'), 'model', 'sample.py --out_dir='),
]


@pytest.mark.parametrize('path, body, param, words', WRONG, ids=[
    f'{path.rpartition("/")[2]}-{str(body)[:40]}' for path, body, _, _ in WRONG])
def test_what_cannot_be_is_a_400_that_says_what_to_do(server, path, body, param, words):
    for more in ({}, dict(stream=True)):
        status, _, answer = server.post(path, **{**more, **body})
        error = answer['error']
        assert status == 400 and error['type'] == 'invalid_request_error', answer
        assert error['param'] == param and words in error['message'], error


def test_what_asks_for_nothing_is_taken(server):
    nothing = dict(suffix='', best_of=1, heal=False, logit_bias={}, steps=0, user='me')
    assert completed(server, prompt='a', max_tokens=2, **nothing)
    assert completed(server, model='char', prompt='a', suffix=None, steps=0, max_tokens=2)
    assert server.post('/tokenize', prompt='tin', model='masked')[0] == 200
    assert server.get('/health')[0] == 200
    figures = server.request('GET', '/metrics')[2].decode()
    assert 'mambino_model_rows_used{model="masked"} 0' in figures
    assert server.request('DELETE', '/sessions/none?model=masked')[0] == 404
