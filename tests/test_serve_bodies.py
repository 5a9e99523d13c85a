"""What the server sends: JSON of any size, in which nobody else waits."""
import json
import threading
import time

import pytest

pytest.importorskip('fastapi')

from mambino.serve.bodies import ENCODE, json_bytes

VALUES = [
    {}, [], '', None, {'a': []}, {'a': {}, 'b': [{}]}, [1, 'é', None, True, 0.5], [[1], [2]],
    {'ids': list(range(200))}, {'ids': list(range(64))},
    {'choices': [{'logprobs': {'tops': [None, {'é"': -1.5}] * 99}}]},
    [{'deep': [[], [1, [2, {'x': 'y'}]]]}] * 3, [[i] for i in range(130)],
]


@pytest.mark.parametrize('value', VALUES, ids=range(len(VALUES)))
def test_it_is_what_the_encoder_writes(value):
    assert json_bytes(value).decode() == json.dumps(value, separators=(',', ':'), ensure_ascii=False)
    assert json_bytes(value, ENCODE).decode() == json.dumps(value, separators=(',', ':'))


def test_what_is_no_character_is_an_escape():
    assert json.loads(json_bytes({'a': ['\ud800', 'é']})) == {'a': ['\ud800', 'é']}


def test_others_go_on_while_much_is_written():
    tops = [{f'token {i}': -1.5 for i in range(50)}] * 30_000
    gaps = []
    is_over = threading.Event()

    def watch():
        before = time.perf_counter()
        while not is_over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - before)
            before = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    json_bytes({'choices': [{'logprobs': {'top_logprobs': tops}}]})
    seconds = time.perf_counter() - began
    is_over.set()
    watcher.join()
    assert max(gaps) < seconds / 2


def test_a_body_of_a_million_lists_is_read_without_a_look_for_garbage():
    import asyncio
    import gc

    from mambino.serve.errors import body_of
    from mambino.serve.told import Refused

    class Request:
        raw = b'{"prompt":[' + b'[],' * 100_000 + b'[]]}'

        async def body(self):
            return self.raw

    phases = []

    def note(phase, _):
        phases.append(phase)

    gc.callbacks.append(note)
    try:
        assert len(asyncio.run(body_of(Request()))['prompt']) == 100_001
        Request.raw = b'[' * 200_000
        with pytest.raises(Refused):
            asyncio.run(body_of(Request()))
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled() and phases.count('start') < 20        # else more than 100
