"""Sends the API at random what no client should send, and looks whether it answers as it promises:
never a status of 500, never a wait without end, every refusal in the shape of errors, and in the
end no row taken.

    python tests/fuzz_api.py --cases=5000 --seed=1
    python tests/fuzz_api.py --seed=1 --only=17         # that one again, with what came

The app is asked in this process, by the bytes of a request: method, path, headers, body in pieces,
and a client that leaves. Case n is the same whatever the others are: its numbers come from (seed,
n). The models are the runs of tests/data/before.
"""
import asyncio
import collections
import json
import os
import random
import shutil
import sys
import tempfile
import time
from typing import NamedTuple
from urllib.parse import unquote

os.environ.setdefault('OMP_NUM_THREADS', '1')
TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

from helpers.mutations import damage_bytes, damage_json  # noqa: E402

BEFORE = os.path.join(TESTS, 'data', 'before')
MODELS = ('gpt', 'gpt-muon', 'mamba2', 'hybrid', 'bare')     # of characters, but for the second; the last one has none
SECONDS = 60            # that a case may take
TOGETHER = 12           # cases at once
SAMPLING = dict(temperature=0.8, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5,
                frequency_penalty=0.5, logit_bias={'5': 10, '6': -100}, seed=7, stop=['a', 'bc'], n=2,
                stream_options=dict(include_usage=True), user='me', metadata={'a': 'b'}, store=True, ignore_eos=True)
CHAT = [dict(role='system', content='Be brief.'), dict(role='user', content=[dict(type='text', text='a')]),
        dict(role='assistant', content='e'), dict(role='user', content='i')]
QUESTIONS = [
    ('POST', '/v1/completions', dict(prompt='at', max_tokens=5, logprobs=2, echo=True)),
    ('POST', '/v1/completions', dict(prompt=['a', 'in'], max_tokens=4, best_of=2)),
    ('POST', '/v1/completions', dict(prompt=[[5, 6], [7]], max_tokens=1, temperature=0, echo=True, logprobs=1)),
    ('POST', '/v1/completions', dict(prompt=[5, 6, 7], max_tokens=9, session='tale')),
    ('POST', '/v1/chat/completions', dict(messages=CHAT, max_tokens=5, logprobs=True, top_logprobs=3)),
    ('POST', '/v1/responses', dict(input='a', instructions='b', max_output_tokens=5, store=False)),
    ('POST', '/tokenize', dict(prompt='at in', add_special_tokens=False)),
    ('POST', '/detokenize', dict(tokens=[5, 6, 7])),
    ('POST', '/score', dict(text='at in at', top=3)),
    ('POST', '/sessions/tale/fork', dict(to='other')),
    ('GET', '/sessions?model=gpt', None), ('DELETE', '/sessions/other?model=gpt', None),
    ('GET', '/tokenizer_info?model=gpt', None), ('GET', '/v1/models', None), ('GET', '/v1/models/gpt', None),
    ('GET', '/health', None), ('GET', '/metrics', None), ('POST', '/v1/embeddings', dict(input='a')),
]
HEADERS = [
    ('content-type', 'text/plain'), ('content-type', 'multipart/form-data; boundary=x'), ('content-type', '\xff'),
    ('content-type', 'application/x-www-form-urlencoded'), ('content-encoding', 'gzip'), ('accept', 'text/html'),
    ('authorization', 'Bearer x'), ('authorization', '\xe9'), ('origin', 'http://localhost'), ('origin', 'null'),
    ('host', 'evil.example'), ('host', ''), ('cookie', 'a=b; ; =;\xff'), ('content-length', '-1'),
    ('content-length', '9' * 30), ('content-length', 'x'), ('range', 'bytes=0-'), ('x', 'y' * 9000),
    ('accept-encoding', '\x00'), ('expect', '100-continue'), ('transfer-encoding', 'chunked'), ('if-none-match', '*'),
]


class Case(NamedTuple):
    """A request. pieces: of its body; leaves: after so many messages of the answer its client is
    gone, -1: never."""
    method: str
    path: str
    headers: list
    pieces: list
    leaves: int


def case_of(seed, n):
    """Case n."""
    rng = random.Random(f'{seed}.{n}')
    method, path, body = rng.choice(QUESTIONS)
    raw = b'' if body is None else body_of(body, rng)
    headers = [('host', 'localhost:8000'), ('content-type', 'application/json')]
    kind = rng.random()
    if kind < 0.1:
        path = unquote(damage_bytes(path.encode(), rng).decode('latin-1'))
    elif kind < 0.15:
        method = rng.choice(['GET', 'POST', 'PUT', 'DELETE', 'HEAD', 'OPTIONS', 'PATCH', 'TRACE', 'X', 'get'])
    elif kind < 0.25:
        headers += rng.sample(HEADERS, rng.randint(1, 3))
    elif kind < 0.3:
        headers = headers[rng.randint(1, 2):]
    at = rng.randrange(len(raw) + 1) if rng.random() < 0.3 else len(raw)
    leaves = rng.choice((0, 1, 1, 2, 3)) if rng.random() < 0.1 else -1
    return Case(method, path, headers, [raw[:at], raw[at:]], leaves)


def body_of(body, rng):
    """The bytes of a body, of which most are damaged."""
    body = dict(body, model=rng.choice(MODELS))
    if rng.random() < 0.3:
        del body['model']
    for name in rng.sample(sorted(SAMPLING), rng.randrange(5)):
        body.setdefault(name, SAMPLING[name])
    if rng.random() < 0.3:
        body['stream'] = True
    raw = json.dumps(body).encode()
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        raw = damage_json(raw, rng)
    return raw


async def ask(app, case):
    """→ (status, {name: value} of headers, body) as the app sends them; status 0: it sent nothing."""
    pieces = list(case.pieces)
    sent = []
    gone = asyncio.Event()

    async def receive():
        if pieces:
            body = pieces.pop(0)
            return {'type': 'http.request', 'body': body, 'more_body': bool(pieces)}
        await gone.wait()
        return {'type': 'http.disconnect'}

    async def send(message):
        sent.append(message)
        if len(sent) == case.leaves or not message.get('more_body', True):
            gone.set()

    if case.leaves == 0:
        gone.set()
    path, _, query = case.path.partition('?')
    headers = [(name.encode('latin-1'), value.encode('latin-1')) for name, value in case.headers]
    scope = dict(type='http', asgi=dict(version='3.0', spec_version='2.3'), http_version='1.1', method=case.method,
                 scheme='http', path=path, raw_path=path.encode('utf-8', 'replace'), root_path='', headers=headers,
                 query_string=query.encode('latin-1', 'replace'), client=('127.0.0.1', 1), server=('127.0.0.1', 8000),
                 state={})
    await asyncio.wait_for(app(scope, receive, send), SECONDS)
    starts = [message for message in sent if message['type'] == 'http.response.start']
    if not starts:
        return 0, {}, b''
    body = b''.join(message.get('body', b'') for message in sent[1:])
    headers = {name.decode('latin-1').lower(): value.decode('latin-1') for name, value in starts[0]['headers']}
    return starts[0]['status'], headers, body


def verdict(case, status, headers, body):
    """What is wrong with an answer; '' if nothing."""
    if status == 0:
        return '' if case.leaves >= 0 else 'no answer'
    kind = headers.get('content-type', '').partition(';')[0]
    if kind == 'text/event-stream':
        return stream_verdict(case, body)
    if case.path == '/health' and status == 503:        # before a model is loaded
        return ''
    if case.method == 'HEAD' or case.leaves >= 0:
        return '' if status < 500 else f'status {status}'
    try:
        value = json.loads(body, parse_constant=refuse) if kind == 'application/json' else None
    except ValueError as error:
        return f'no JSON: {error}'
    if status < 400:
        return '' if status in (200, 204) else f'status {status}'
    error = value.get('error') if isinstance(value, dict) else None
    if not isinstance(error, dict) or set(error) != {'message', 'type', 'param', 'code'} or not error['message']:
        return f'an error of another shape: {body[:200]}'
    if status >= 500:
        return f'status {status}: {error["message"]}'
    return ''


def stream_verdict(case, body):
    """The same of a stream."""
    events = [line.removeprefix(b'data: ') for line in body.split(b'\n') if line.startswith(b'data: ')]
    for event in events:
        try:
            value = None if event == b'[DONE]' else json.loads(event, parse_constant=refuse)
        except ValueError as error:
            return f'an event that is no JSON: {error}'
        if isinstance(value, dict) and isinstance(value.get('error'), dict):
            if value['error']['type'] == 'server_error':
                return f'an error in a stream: {value["error"]["message"]}'
    is_whole = case.leaves >= 0 or events and (events[-1] == b'[DONE]' or b'"response.' in events[-1])
    return '' if is_whole else f'a stream without an end: {body[-200:]}'


def refuse(name):
    raise ValueError(f'{name} is not JSON')


async def run_cases(app, cases, tell=None):
    """→ (how many cases had each status, [(number, what is wrong), …]). cases: {number: Case}."""
    statuses = collections.Counter()
    faults = []
    numbers = iter(cases)

    async def work():
        for n in numbers:
            case = cases[n]
            answer = None
            try:
                answer = await ask(app, case)
                problem = verdict(case, *answer)
                statuses[answer[0]] += 1
            except asyncio.TimeoutError:
                problem = f'no answer after {SECONDS} s'
            except Exception as error:
                problem = f'{type(error).__name__}: {error}'
            if problem:
                faults.append((n, problem))
            if tell:
                tell(n, case, answer)

    await asyncio.gather(*(work() for _ in range(TOGETHER)))
    return statuses, faults


def make(folder):
    """→ (an app, its library) of runs in a folder."""
    from mambino.serve.api import Limits, make_app
    from mambino.serve.library import Library
    from mambino.serve.work import Room
    for name in MODELS:
        shutil.copytree(os.path.join(BEFORE, name), os.path.join(folder, name))
    library = Library(folder, os.path.join(folder, 'gpt'), 'cpu', 'float32', '', '', 0.0, Room(8, 64, 0.01))
    library.says = lambda line: None
    return make_app(library, Limits(16, 200, 100_000, 30.0), hosts=('localhost',)), library


def rows_left(library, seconds=5):
    """{model: rows and jobs that nobody waits for any more}, after some time to let go of them."""
    end = time.monotonic() + seconds
    while True:
        stats = {name: scheduler.stats() for name, scheduler in library.schedulers().items()}
        left = {name: stat['rows_used'] + stat['queue'] for name, stat in stats.items()}
        if not any(left.values()) or time.monotonic() > end:
            return {name: number for name, number in left.items() if number}
        time.sleep(0.02)


def main(argv):
    options = dict(cases='300', seed='1', only='')
    options |= dict(flag.removeprefix('--').split('=', 1) for flag in argv)
    numbers = [int(options['only'])] if options['only'] else range(int(options['cases']))
    cases = {n: case_of(options['seed'], n) for n in numbers}

    def tell(n, case, answer):
        if options['only']:
            print(case)
            print(answer)

    with tempfile.TemporaryDirectory() as folder:
        app, library = make(folder)
        began = time.monotonic()
        statuses, faults = asyncio.run(run_cases(app, cases, tell))
        left = rows_left(library)
        alive = all(scheduler.is_alive() for scheduler in library.schedulers().values())
        library.close()
    print(f'{len(cases)} cases in {time.monotonic() - began:.0f} s; statuses: '
          + ', '.join(f'{status}: {number}' for status, number in sorted(statuses.items())))
    for n, problem in sorted(faults):
        print(f'{n}: {problem}')
    if left or not alive:
        print(f'rows that are left: {left}; threads {"live" if alive else "are dead"}')
    return 1 if faults or left or not alive else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
