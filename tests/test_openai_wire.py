"""The API on bare sockets: streams as bytes, clients that go away, time that is over."""
import json
import threading
import time

import pytest
from helpers.served import serving, wait_until

pytest.importorskip('fastapi')
pytestmark = pytest.mark.usefixtures('one_thread')
C, T = '/v1/completions', '/v1/chat/completions'
LONG = dict(model='bpe', prompt='e', max_tokens=4000, ignore_eos=True)


@pytest.fixture(scope='module')
def server(runs):
    with serving(runs, out_dir='bpe') as server:
        server.scheduler('bpe')
        yield server


@pytest.fixture
def busy(server):
    """busy() → a function that frees the model's thread, which stands still until then."""
    held = []

    def busy():
        freed, begun = threading.Event(), threading.Event()
        held.append(freed)

        def hold():
            begun.set()
            freed.wait(60)
        server.scheduler('bpe').call(hold)
        assert begun.wait(20)
        return freed.set
    yield busy
    for freed in held:
        freed.set()
    wait_until(lambda: is_free(server))


def is_free(server):
    """Whether no row is used, and nobody waits for one."""
    scheduler = server.scheduler('bpe')
    stats = scheduler.stats()
    return not (stats['rows_used'] or stats['queue'] or scheduler.is_busy())


def read_until(wire, *words):
    """All bytes of a connection until each of the words has come, or it is closed."""
    data = b''
    while not all(word in data for word in words):
        some = wire.recv(65536)
        if not some:
            break
        data += some
    return data


def begun(server, path=C, **body):
    """A connection on which a stream has begun to come."""
    wire = server.begin(path, **{**LONG, **body}, stream=True)
    assert b'data: ' in read_until(wire, b'data: ')
    return wire


def test_bytes_of_a_stream(server):
    status, headers, raw = server.request('POST', C, dict(model='bpe', prompt='e', max_tokens=3, stream=True))
    assert status == 200 and headers['Content-Type'].startswith('text/event-stream')
    assert headers['Cache-Control'] == 'no-cache'
    events = raw.decode().split('\n\n')
    assert events[-1] == '' and events[-2] == 'data: [DONE]'
    for event in events[:-2]:
        assert event.startswith('data: ') and '\n' not in event
        body = json.loads(event.removeprefix('data: '))
        assert body['object'] == 'text_completion' and body['model'] == 'bpe' and 'usage' not in body


def test_a_text_with_line_ends_is_one_event(server):
    status, _, raw = server.request('POST', C, dict(model='bpe', prompt='a\n\nb', max_tokens=0, echo=True, stream=True))
    events = [json.loads(event.removeprefix(b'data: ')) for event in raw.split(b'\n\n')[:-2]]
    assert ''.join(event['choices'][0]['text'] for event in events) == 'a\n\nb'


# --- clients that go away -------------------------------------------------------------------------

def freed_in_a_second(server, connect):
    """Whether rows are free within a second of the end of a connection that connect() makes; the machine
    may have something else to do, so one of three will do."""
    for _ in range(3):
        wire = connect()
        wait_until(lambda: not is_free(server))
        wire.close()
        if wait_until(lambda: is_free(server)) < 1:
            return True
    return False


@pytest.mark.parametrize('n', [1, 4])
def test_rows_are_free_when_the_reader_of_a_stream_is_gone(server, n):
    assert freed_in_a_second(server, lambda: begun(server, n=n))


def test_rows_are_free_when_nobody_waits_for_a_whole_answer(server):
    assert freed_in_a_second(server, lambda: server.begin(C, **LONG))


@pytest.mark.parametrize('stream', [False, True])
def test_rows_are_free_in_the_middle_of_a_prompt(server, stream):
    before = server.scheduler('bpe').stats()['jobs']
    body = dict(model='bpe', prompt=[1, 2, 3] * 20_000, max_tokens=1, stream=stream)
    assert freed_in_a_second(server, lambda: server.begin(C, **body))
    assert server.scheduler('bpe').stats()['jobs'] == before        # it was never read to its end


def test_who_waits_and_goes_leaves_the_queue(server, busy):
    free = busy()
    wires = [server.begin(path, **LONG, messages=[dict(role='user', content='e')]) for path in (C, T)]
    wait_until(lambda: server.scheduler('bpe').scheduler.stats()['queue'] >= 2)
    for wire in wires:
        wire.close()
    free()
    wait_until(lambda: is_free(server))


def test_a_connection_is_used_again(server):
    """Who has read an answer asks the next question on the same connection."""
    wire = server.begin(C, model='bpe', prompt='e', max_tokens=2)
    for _ in range(3):
        data = read_until(wire, b'"usage"', b'}}}')
        assert data.startswith(b'HTTP/1.1 200')
        body = b'{"model": "bpe", "prompt": "e", "max_tokens": 2}'
        wire.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s' % (
            len(body), body))
    wire.close()


# --- time -----------------------------------------------------------------------------------------

def test_a_stream_begins_at_once_and_says_that_it_is_alive(server, busy, monkeypatch):
    from mambino.serve import answers
    monkeypatch.setattr(answers, 'PING', 0.05)
    free = busy()
    wire = server.begin(T, model='bpe', messages=[dict(role='user', content='e')], stream=True, max_tokens=2)
    data = read_until(wire, b'"role":"assistant"', b': ping\n\n')
    assert data.startswith(b'HTTP/1.1 200') and b': ping\n\n' in data
    free()
    assert b'[DONE]' in read_until(wire, b'[DONE]')
    wire.close()


@pytest.fixture
def hurried(runs):
    """A server where a request has 0.5 s."""
    from mambino.serve.api import Limits
    with serving(runs, out_dir='bpe', limits=Limits(timeout=0.5, max_tokens=10**6)) as server:
        server.scheduler('bpe')
        yield server


def test_an_answer_ends_when_its_time_is_over(hurried):
    status, _, answer = hurried.post(C, **{**LONG, 'max_tokens': 10**6})
    assert status == 200 and answer['choices'][0]['finish_reason'] == 'length'
    assert 0 < answer['usage']['completion_tokens'] < 10**6
    _, _, raw = hurried.request('POST', C, dict(LONG, max_tokens=10**6, stream=True))
    events = raw.split(b'\n\n')
    assert json.loads(events[-3].removeprefix(b'data: '))['choices'][0]['finish_reason'] == 'length'
    assert events[-2] == b'data: [DONE]'
    wait_until(lambda: is_free(hurried), 1)


@pytest.mark.parametrize('stream', [False, True])
def test_a_prompt_that_is_never_read_in_time_is_an_error(hurried, stream, monkeypatch):
    """… that clients do not repeat: they would only make the queue longer."""
    from mambino.serve import answers
    monkeypatch.setattr(answers, 'GRACE', 0.1)
    freed = threading.Event()
    hurried.scheduler('bpe').call(lambda: freed.wait(60))
    try:
        status, headers, raw = hurried.request('POST', C, dict(LONG, stream=stream))
        if stream:
            assert status == 200 and raw.endswith(b'data: [DONE]\n\n')
            raw = raw.split(b'\n\n')[-3].removeprefix(b'data: ')
        else:
            assert status == 503 and headers['x-should-retry'] == 'false'
        assert '--timeout' in json.loads(raw)['error']['message']
    finally:
        freed.set()


# --- many at once ---------------------------------------------------------------------------------

def test_streams_side_by_side_do_not_mix(server):
    """Each has the text that it has alone."""
    def text(seed, stream):
        body = dict(model='bpe', prompt='e', max_tokens=30, seed=seed, stream=stream)
        _, _, raw = server.request('POST', C, body)
        if not stream:
            return json.loads(raw)['choices'][0]['text']
        events = [json.loads(event.removeprefix(b'data: ')) for event in raw.split(b'\n\n')[:-2]]
        return ''.join(event['choices'][0]['text'] for event in events)

    alone = {seed: text(seed, stream=False) for seed in range(8)}
    together = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: text(seed, stream=True)}))
               for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_events_wake_the_loop_once():
    """The model's thread may send many before the loop turns."""
    import asyncio

    from mambino.serve.answers import Mailbox

    class Reader:
        def __init__(self):
            self.inbox = []
            self.wake = asyncio.Event()
            self.streams = True

    async def main():
        loop = asyncio.get_running_loop()
        mailbox, reader, calls = Mailbox(loop), Reader(), []
        deliver = mailbox.deliver
        mailbox.deliver = lambda: (calls.append(time.monotonic()), deliver())

        def send():
            for n in range(100):
                mailbox.put(reader, 0, n)
        thread = threading.Thread(target=send)
        thread.start()
        thread.join()                   # the loop stands still meanwhile
        await asyncio.wait_for(reader.wake.wait(), 5)
        assert reader.inbox == [(0, n) for n in range(100)] and len(calls) == 1
        return mailbox

    mailbox = asyncio.run(main())
    mailbox.is_called = False
    mailbox.put(None, 0, 'late')        # the loop is closed: nothing is raised
