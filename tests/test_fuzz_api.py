"""What tests/fuzz_api.py sends the API, a little of it."""
import asyncio

import pytest

pytest.importorskip('fastapi')


def test_the_api_answers_as_it_promises(one_thread, tmp_path):
    import fuzz_api
    app, library = fuzz_api.make(str(tmp_path))
    try:
        cases = {n: fuzz_api.case_of(1, n) for n in range(300)}
        statuses, faults = asyncio.run(fuzz_api.run_cases(app, cases))
        assert not faults
        assert not fuzz_api.rows_left(library)
        assert all(scheduler.is_alive() for scheduler in library.schedulers().values())
    finally:
        library.close()
    assert statuses[200] > 60 and statuses[400] > 60 and statuses[404] > 20     # something was broken, not all


def test_a_fault_is_seen():
    from fuzz_api import Case, verdict
    case = Case('POST', '/v1/completions', [], [b''], -1)
    json = {'content-type': 'application/json'}
    error = b'{"error": {"message": "x", "type": "y", "param": null, "code": null}}'
    assert verdict(case, 200, json, b'{}') == '' and verdict(case, 400, json, error) == ''
    wrong = [(500, error), (400, b'{"detail": []}'), (200, b'{"a": NaN}'), (200, b''), (0, b''), (302, b'{}')]
    for status, body in wrong:
        assert verdict(case, status, json, body)
    stream = {'content-type': 'text/event-stream'}
    assert verdict(case, 200, stream, b'data: {"a": 1}\n\ndata: [DONE]\n\n') == ''
    for body in (b'', b'data: {"a": 1}\n\n', b'data: x\n\ndata: [DONE]\n\n',
                 b'data: {"error": {"type": "server_error", "message": "x"}}\n\ndata: [DONE]\n\n'):
        assert verdict(case, 200, stream, body)
