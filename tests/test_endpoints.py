"""What the API has besides OpenAI's: tokens, scores, sessions, health and figures."""
import io
import json
import os
import re
import shutil
import sys
import threading

import pytest
from helpers.runs import script
from helpers.served import PATIENCE, serving, wait_until

pytest.importorskip('fastapi')

TEXT = 'etaoin shrdlu, 12 é€😀 and once more: etaoin\n' * 9
TEXTS = dict(bpe=TEXT, char='etaoin shrdlu\n etaoin' * 20)      # of a vocabulary of characters


@pytest.fixture(scope='module')
def server(trained_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('endpoints')
    shutil.copytree(trained_runs, folder, dirs_exist_ok=True)
    with serving(folder, out_dir='bpe') as server:
        server.folder = folder
        yield server


# --- models, health -------------------------------------------------------------------------------

def test_models(server):
    status, _, body = server.get('/v1/models')
    assert status == 200 and body['object'] == 'list'
    assert {model['id'] for model in body['data']} == {'bpe', 'char'}
    assert all(model['object'] == 'model' and model['created'] > 1e9 for model in body['data'])
    assert server.get('/v1/models/char')[2]['id'] == 'char'
    status, _, body = server.get('/v1/models/none')
    assert status == 404 and body['error']['code'] == 'model_not_found' and body['error']['param'] == 'model'


def test_health_is_503_until_a_model_is_loaded_and_500_when_its_thread_is_dead(trained_runs):
    with serving(trained_runs, out_dir='char') as server:
        assert server.get('/health')[::2] == (503, dict(status='no model'))
        scheduler = server.scheduler('char')
        assert server.get('/health')[::2] == (200, dict(status='ok'))
        scheduler.close()
        assert server.get('/health')[::2] == (500, dict(status='dead', models=['char']))


@pytest.mark.parametrize('path, method, status', [
    ('/v1/embeddings', 'POST', 404), ('/v1/audio/speech', 'POST', 404), ('/nothing', 'GET', 404),
    ('/v1/models', 'POST', 405), ('/tokenize', 'GET', 405), ('/sessions', 'DELETE', 405),
])
def test_what_is_not_there_is_said_in_the_shape_of_errors(server, path, method, status):
    got, headers, raw = server.request(method, path, b'{}' if method == 'POST' else None)
    error = json.loads(raw)['error']
    assert got == status and error['type'] == 'invalid_request_error' and error['message']
    assert set(error) == {'message', 'type', 'param', 'code'}
    assert headers['Content-Type'] == 'application/json'
    assert (status == 405) == ('Allow' in headers)


# --- tokens ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('model', ['bpe', 'char'])
def test_tokens_and_back(server, model):
    tok = server.library.get(model).tok
    text = TEXTS[model]
    status, _, body = server.post('/tokenize', prompt=text, model=model, add_special_tokens=False)
    assert status == 200 and body['tokens'] == tok.encode(text).tolist() and body['count'] == len(body['tokens'])
    assert server.post('/tokenize', content=text, model=model)[2]['tokens'] == tok.bos + body['tokens']
    assert server.post('/detokenize', tokens=body['tokens'], model=model)[2]['prompt'] == text


def test_a_character_that_a_model_does_not_have_is_a_400(server):
    status, _, body = server.post('/tokenize', prompt='日', model='char')
    assert status == 400 and '日' in body['error']['message']


def test_a_mark_is_a_token_only_where_it_is_all_there_is(server):
    tok = server.library.get('bpe').tok
    assert server.post('/tokenize', prompt='<|endoftext|>', add_special_tokens=False)[2]['tokens'] == [tok.eot]
    ids = server.post('/tokenize', prompt='a<|endoftext|>', add_special_tokens=False)[2]['tokens']
    assert tok.eot not in ids


def test_tokenizer_info_is_what_lm_eval_reads(server):
    status, _, info = server.get('/tokenizer_info')
    assert status == 200 and info['eos_token'] == '<|endoftext|>'
    assert {'bos_token', 'pad_token', 'chat_template'} <= info.keys() and info['vocab_size'] > 0
    utils = pytest.importorskip('lm_eval.utils')
    assert utils.check_remote_tokenizer_support(f'{server.url}/v1/completions')
    remote = utils.RemoteTokenizer(f'{server.url}/v1/completions')
    tok = server.library.get('bpe').tok
    assert remote.eos_token_id == tok.eot
    assert remote.encode(TEXT) == tok.encode(TEXT).tolist()
    assert remote.decode(remote.encode(TEXT)) == TEXT


@pytest.mark.parametrize('path, body', [
    ('/tokenize', {}), ('/tokenize', {'prompt': 5}), ('/tokenize', {'prompt': None}),
    ('/detokenize', {}), ('/detokenize', {'tokens': 'ab'}), ('/detokenize', {'tokens': [-1]}),
    ('/detokenize', {'tokens': [10**9]}), ('/detokenize', {'tokens': [True]}), ('/detokenize', {'tokens': [1.0]}),
    ('/score', {}), ('/score', {'text': ''}), ('/score', {'text': 'a', 'top': 101}),
    ('/score', {'text': 'a', 'top': True}), ('/tokenize', {'prompt': 'a', 'model': 7}),
])
def test_what_cannot_be_asked_is_a_400(server, path, body):
    status, _, answer = server.post(path, **body)
    assert status == 400 and answer['error']['type'] == 'invalid_request_error'


@pytest.mark.parametrize('raw', [b'', b'x', b'[]', b'null', b'{"prompt": NaN}', b'\xff\xfe', b'{"prompt": "\\ud800"}',
                                 b'[' * 100_000, b'{"prompt": ' * 5000])
def test_a_body_that_is_none_is_a_400(server, raw):
    status, _, answer = server.request('POST', '/tokenize', raw)
    assert status == 400 and json.loads(answer)['error']['message']


def test_a_model_that_is_not_there_is_a_404_that_names_those_that_are(server):
    status, _, body = server.post('/tokenize', prompt='a', model='../bpe')
    assert status == 404 and 'bpe, char' in body['error']['message'].replace('char, bpe', 'bpe, char')


# --- scores ---------------------------------------------------------------------------------------

def said_by_sample(folder, model, text, dtype, capsys):
    """The figures of sample.py --score: (windows, all before)."""
    path = folder / 'score.txt'
    path.write_bytes(text.encode())
    capsys.readouterr()
    assert script('sample.py', f'--out_dir={folder / model} --score={path} --device=cpu --dtype={dtype}') == 0
    out = capsys.readouterr().out
    windows = re.search(r'loss +(\S+) nats/token\nperplexity +(\S+)\nbits/byte +(\S+)', out).groups()
    before = re.search(r'each token: loss (\S+), perplexity (\S+), bits/byte (\S+)', out).groups()
    return windows, before


def printed(part):
    return f'{part["loss"]:.4f}', f'{part["perplexity"]:,.2f}', f'{part["bits_per_byte"]:.4f}'


@pytest.mark.parametrize('model', ['bpe', 'char'])
def test_a_score_is_that_of_sample(server, model, capsys):
    text = TEXTS[model]
    status, _, body = server.post('/score', text=text, model=model, top=5)
    assert status == 200
    assert ''.join(token['text'] for token in body['tokens']) == text
    expected = said_by_sample(server.folder, model, text, 'float32', capsys)
    assert (printed(body['windows']), printed(body)) == expected


@pytest.mark.parametrize('dtype', ['auto', 'bfloat16'])
def test_a_score_is_that_of_sample_in_every_precision(trained_runs, tmp_path, dtype, capsys):
    shutil.copytree(trained_runs / 'bpe', tmp_path / 'bpe')
    with serving(tmp_path, out_dir='bpe', dtype=dtype) as server:
        body = server.post('/score', text=TEXT)[2]
    expected = said_by_sample(tmp_path, 'bpe', TEXT, dtype, capsys)
    assert (printed(body['windows']), printed(body)) == expected


def test_a_score_is_that_of_sample_to_the_last_bit(server):
    from mambino.sample.score import as_evaluated, surprises, token_scores
    served = server.library.get('bpe')
    tok = served.tok
    ids = tok.encode(TEXT).tolist()
    size = len(TEXT.encode())
    body = server.post('/score', text=TEXT, model='bpe', top=3)[2]
    expected = [token for piece in token_scores(served.net, tok, ids, 3) for token in piece]
    assert [token['id'] for token in body['tokens']] == ids
    assert [token['logprob'] for token in body['tokens']] == [logprob for logprob, _ in expected]
    assert [[(other['id'], other['logprob']) for other in token['top']] for token in body['tokens']] == [
        top for _, top in expected]
    assert body['nats'] == surprises(served.net, tok, ids)[0]
    windows = body['windows']
    assert (windows['nats'], windows['count'], windows['bytes']) == as_evaluated(served.net, tok, ids, size)


def test_a_score_that_is_too_long_is_refused(trained_runs):
    from mambino.serve.api import Limits
    with serving(trained_runs, out_dir='char', limits=Limits(max_prompt=10)) as server:
        status, _, body = server.post('/score', text='e' * 11)
        assert status == 400 and body['error']['code'] == 'context_length_exceeded'
        assert server.post('/score', text='e' * 10)[0] == 200


def test_a_score_that_nobody_waits_for_is_given_up(trained_runs, monkeypatch):
    """Because the client has left, or time is over."""
    from mambino.serve.api import Limits
    begun = threading.Event()

    def endless(*arguments):
        while True:
            begun.set()
            yield
    monkeypatch.setattr('mambino.serve.texts.scores', endless)
    with serving(trained_runs, out_dir='char', limits=Limits(timeout=60)) as server:
        with server.begin('/score', text='e'):
            assert begun.wait(PATIENCE) and server.scheduler().is_busy()
        wait_until(lambda: not server.scheduler().is_busy())
    with serving(trained_runs, out_dir='char', limits=Limits(timeout=0.1)) as server:
        assert server.post('/score', text='e')[0] == 503
        wait_until(lambda: not server.scheduler().is_busy())


# --- sessions -------------------------------------------------------------------------------------

def test_sessions_are_listed_copied_and_deleted(server, monkeypatch):
    monkeypatch.chdir(server.folder)
    assert script('sample.py', '--out_dir=bpe --session=tale --start=e --max_new_tokens=5 --device=cpu') == 0
    data = server.get('/sessions?model=bpe')[2]['data']
    assert [session['name'] for session in data] == ['tale'] and data[0]['tokens'] >= 5 and data[0]['bytes'] > 0
    status, _, copied = server.post('/sessions/tale/fork', to='other', model='bpe')
    assert status == 200 and copied['tokens'] == data[0]['tokens']
    assert server.post('/sessions/tale/fork', to='other', model='bpe')[0] == 400           # it is there already
    assert script('sample.py', '--out_dir=bpe --session=other --max_new_tokens=3 --device=cpu') == 0
    status, _, raw = server.request('DELETE', '/sessions/other?model=bpe')
    assert status == 200 and json.loads(raw) == dict(name='other', deleted=True)
    assert server.request('DELETE', '/sessions/other?model=bpe')[0] == 404
    assert [session['name'] for session in server.get('/sessions?model=bpe')[2]['data']] == ['tale']


def test_a_session_that_an_answer_goes_on_with_is_not_deleted(server):
    server.library.get('bpe')
    assert server.post('/v1/completions', prompt='e', max_tokens=2, session='kept', model='bpe')[0] == 200
    busy = server.scheduler('bpe').named.busy
    busy['kept'] = None
    try:
        status, _, raw = server.request('DELETE', '/sessions/kept?model=bpe')
        assert status == 409 and 'wait' in json.loads(raw)['error']['message']
    finally:
        del busy['kept']
    assert server.request('DELETE', '/sessions/kept?model=bpe')[0] == 200


@pytest.mark.parametrize('name', [
    '..', '.', '%2e%2e', '..%2Fckpt', '%2Fetc%2Fpasswd', '-a', 'a%00b', 'a' * 101, 'a%5Cb',
])
def test_a_session_leaves_its_folder_by_no_name(server, name):
    before = sorted(os.listdir(server.folder / 'bpe'))
    for method, path in (('DELETE', f'/sessions/{name}?model=bpe'), ('POST', f'/sessions/{name}/fork')):
        assert server.request(method, path, b'{"to": "x"}' if method == 'POST' else None)[0] in (400, 404, 405)
    status, _, answer = server.post('/sessions/tale/fork', to=f'../{name}', model='bpe')
    assert status in (400, 404)
    assert status == 404 or answer['error']['param'] == 'to'
    assert sorted(os.listdir(server.folder / 'bpe')) == before


def test_a_link_among_the_sessions_is_none(server, tmp_path):
    if os.name != 'posix':
        pytest.skip('links')
    folder = server.folder / 'char' / 'sessions'
    folder.mkdir(exist_ok=True)
    (tmp_path / 'secret').write_text('secret')
    os.symlink(tmp_path / 'secret', folder / 'link.pt')
    assert server.get('/sessions?model=char')[2]['data'] == []
    assert server.post('/sessions/link/fork', to='x', model='char')[0] == 404


# --- figures --------------------------------------------------------------------------------------

def test_figures_for_prometheus(server):
    server.post('/v1/completions', model='bpe', prompt='e', max_tokens=3)
    server.get('/not/counted/by/name')
    status, headers, raw = server.request('GET', '/metrics')
    assert status == 200 and headers['Content-Type'].startswith('text/plain; version=0.0.4')
    lines = raw.decode().splitlines()
    for line in lines:
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{(\w+="[^"]*",?)+\})? [-+\d.e]+', line), line
    values = dict(line.rsplit(' ', 1) for line in lines if not line.startswith('#'))
    assert int(values['mambino_requests_total{method="POST",path="/v1/completions",status="200"}']) >= 1
    assert int(values['mambino_requests_total{method="GET",path="other",status="404"}']) >= 1
    assert int(values['mambino_generated_tokens_total']) >= 1
    assert values['mambino_first_token_seconds_count'] == values['mambino_first_token_seconds_bucket{le="+Inf"}']
    assert int(values['mambino_models_loaded_total']) >= 1
    assert 'mambino_model_rows{model="bpe"}' in values
    if sys.platform == 'linux':
        assert int(values['mambino_process_resident_bytes']) > 1e6


# --- mistakes -------------------------------------------------------------------------------------

@pytest.mark.parametrize('bug', [ZeroDivisionError, SystemExit])
def test_a_bug_is_a_500_in_the_shape_of_errors_and_is_written_down(server, monkeypatch, bug):
    def broken(*arguments, **options):
        raise bug('a bug')
    said = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', said)
    monkeypatch.setattr(type(server.library.get('bpe').tok), 'decode', broken)
    status, _, body = server.post('/detokenize', tokens=[1], model='bpe')
    assert status == 500 and body['error']['type'] == 'server_error' and 'a bug' not in body['error']['message']
    assert 'Traceback' in said.getvalue() and f'{bug.__name__}: a bug' in said.getvalue()
    monkeypatch.undo()
    assert server.post('/detokenize', tokens=[1], model='bpe')[0] == 200
