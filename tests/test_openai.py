"""Completions as OpenAI's own client has them, and what sample.py and the model say beside."""
import pytest
from helpers.runs import script
from helpers.sampling import open_run
from helpers.served import logprobs_by_model, parts_of

from mambino.sample.text import encode_prompt

pytest.importorskip('openai')
pytestmark = pytest.mark.usefixtures('one_thread')
SAMPLING = dict(temperature=0.8, top_p=0.95, extra_body=dict(top_k=50))
LIKE_IT = '--temperature=0.8 --top_p=0.95 --top_k=50 --device=cpu --dtype=float32 --stream=False'
RULE = '---------------\n'


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


# --- the same texts as sample.py ------------------------------------------------------------------

def test_models(api):
    assert {model.id for model in api.client().models.list()} == {'bpe', 'char', 'tuned'}


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


def test_a_session_goes_on(ask, by_hand, api):
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


def test_ids_of_the_same_text_have_names_of_their_own():
    from mambino.serve.logprobs import Entry, as_completion

    class Twins:
        vocab_size = 3

        def token_bytes(self, i):
            return b'the'
    told = as_completion(Twins(), [Entry(2, 0, -2.0, [(0, -0.5), (1, -1.0)])])
    assert told['tokens'] == ['token_id:2'] and told['token_logprobs'] == [-2.0]
    assert told['top_logprobs'] == [{'the': -0.5, 'token_id:1': -1.0, 'token_id:2': -2.0}]


def test_best_of(ask, by_hand):
    every = ask('e', n=6, seed=2, max_tokens=20, logprobs=0)
    best = ask('e', n=2, best_of=6, seed=2, max_tokens=20, logprobs=0)
    scores = {}
    for choice in every.choices:
        scores[choice.text] = sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens)
    assert [choice.text for choice in best.choices] == sorted(scores, key=scores.get)[:-3:-1]
    assert best.usage.completion_tokens == every.usage.completion_tokens
