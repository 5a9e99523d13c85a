"""healing.py: a prompt may end anywhere; what is drawn goes on with its text, as likely as it is to the model."""
import io
import itertools
import math
import random
import types

import pytest
import torch
from helpers.models import perturb
from helpers.sampling import open_run

from mambino import tokenizer
from mambino.detokenizer import Pieces
from mambino.sample import healing
from mambino.sample.generation import Rows, beam_search, prefill
from mambino.sample.healing import Spelling, look_ahead, spelling_of, take_back
from mambino.sample.next_token import sample_token
from mambino.sample.sessions import Session
from mambino.sample.text import CONTEXT, Writer, encode_prompt, healed
from mambino.train import evaluation
from model_gpt import GPT, GPTConfig
from model_mamba import Mamba, MambaConfig

WORDS = [b'a', b'b', b'ab', b'ba', b'aba', b'bb', b'']
EOT = 6
PROMPT = [EOT, 0]


class SmallTok(types.SimpleNamespace):
    """All that generation asks of a tokenizer."""
    table, vocab_size, eot, pieces = WORDS, len(WORDS), EOT, Pieces(WORDS)
    __hash__ = object.__hash__

    def context(self):
        return [self.eot]


def bytes_of(tok, ids):
    return b''.join(tok.table[i] for i in ids)


@pytest.fixture(scope='module')
def bpe():
    """Tokens of several words' parts, and of parts of characters."""
    texts = ['def main():\n    return self\n', 'naïve 😀 日本語 🙂 café', 'http://a.b/c  \n        x = 100',
             'while whilst self.x self..']
    return tokenizer.build_tokenizer('bpe', [text * 9 for text in texts for _ in range(3)], vocab_size=420)


# --- what is drawn, against brute force -----------------------------------------------------------

def logprobs_of(net, prompt, n, among):
    """{ids: log probability} of all n ids of WORDS behind a prompt, among so many ids of the model."""
    every = torch.tensor(list(itertools.product(range(len(WORDS)), repeat=n)))
    idx = torch.cat((torch.tensor(prompt).expand(len(every), -1), every), 1)
    with torch.no_grad():
        logits = net(idx)[0][:, len(prompt) - 1:-1, :among].double()
    logprobs = logits.log_softmax(-1).gather(2, every[:, :, None]).sum((1, 2))
    return dict(zip(map(tuple, every.tolist()), logprobs.tolist()))


def spells(ids, owed):
    """Whether ids begin with what is owed, and none of no bytes stands in it."""
    text = b''
    for i in ids:
        if len(text) >= len(owed):
            break
        if not WORDS[i]:
            return False
        text += WORDS[i]
    return text.startswith(owed)


@pytest.fixture(scope='module', params=['gpt', 'mamba'])
def small(request):
    """A model of WORDS, and its probabilities of all 4 ids behind PROMPT."""
    torch.manual_seed(1)
    size = dict(vocab_size=16, n_layer=1, n_embd=32)
    net = (GPT(GPTConfig(n_head=2, **size)) if request.param == 'gpt'
           else Mamba(MambaConfig(state_size=8, head_dim=16, **size)))
    net = perturb(net, 0.5).eval()
    every = logprobs_of(net, PROMPT, 4, among=len(WORDS))
    return net, {ids: math.exp(logprob) for ids, logprob in every.items()}


@pytest.mark.parametrize('owed', [b'ab', b'abab', b'b', b'bba', b''])
def test_probabilities_are_those_of_all_that_goes_on_with_the_prompt(small, owed):
    """Of all that spells what is owed, each sequence has the model's probability, divided by their sum."""
    net, every = small
    fitting = {ids: p for ids, p in every.items() if spells(ids, owed)}
    total = sum(fitting.values())
    tok = SmallTok()
    read = prefill(net, PROMPT)
    rest = look_ahead(net, tok, read, owed)
    rows = Rows(net, tok.vocab_size)
    rows.add([read] * len(fitting), [rest] * len(fitting))
    got = torch.ones(len(fitting), dtype=torch.double)
    for ids in torch.tensor(list(fitting)).T:
        shares = rows.possible(rows.logits).double().softmax(-1)            # (B, V)
        got *= shares.gather(1, ids[:, None])[:, 0]
        rows.advance(ids)
    want = torch.tensor(list(fitting.values()), dtype=torch.double) / total
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-7)
    assert got.sum().item() == pytest.approx(1, abs=1e-4) and len(fitting) > 20
    assert not owed or rest.log_probability == pytest.approx(math.log(total), abs=1e-4)


@pytest.mark.parametrize('sampling', [
    dict(temperature=0), dict(temperature=0.5), dict(temperature=1.0, top_k=2),
    dict(temperature=2.0, min_p=0.3), dict(temperature=1.0, top_p=0.6, top_k=3)])
def test_filters_choose_among_what_is_possible(small, sampling):
    """What cannot be is taken out first: the draws are those from the probabilities of brute force."""
    net, every = small
    owed = b'ab'
    first = torch.zeros(len(WORDS), dtype=torch.double)
    for ids, p in every.items():
        if spells(ids, owed):
            first[ids[0]] += p
    tok = SmallTok()
    read = prefill(net, PROMPT)
    rows = Rows(net, tok.vocab_size)
    rows.add([read] * 3000, [look_ahead(net, tok, read, owed)] * 3000)
    got = rows.draw(generator=torch.Generator().manual_seed(5), **sampling)
    want = sample_token(first.log().float().expand(3000, -1), generator=torch.Generator().manual_seed(5), **sampling)
    assert (got != want).float().mean() < 2e-3 and {0, 2, 4} >= set(got.tolist())   # a, ab, aba


def test_beams_find_the_likeliest_of_all_that_goes_on_with_the_prompt(small):
    net, _ = small
    tok = SmallTok()
    owed = b'abb'
    got = beam_search(net, PROMPT, 300, 2, tok.vocab_size, lambda ids: ids[-1] == EOT, 0.0,
                      heal=lambda read: look_ahead(net, tok, read, owed))
    want = {}
    for n in range(1, 5):                       # as far as brute force goes
        for ids, logprob in logprobs_of(net, PROMPT, n, among=16).items():
            behind = [len(bytes_of(tok, ids[:m])) > len(owed) or ids[m - 1] == EOT for m in range(1, n + 1)]
            is_over = sum(behind) == 2 or ids[-1] == EOT
            if spells(ids, owed) and is_over and sum(behind[:-1]) < 2 and EOT not in ids[:-1]:
                want[ids] = logprob
    got = [(score, tuple(ids)) for score, ids in got if len(ids) < 5]
    assert [ids for _, ids in got[:20]] == sorted(want, key=want.get, reverse=True)[:20]
    assert [score for score, _ in got[:20]] == pytest.approx([want[ids] for _, ids in got[:20]], abs=1e-3)


# --- what is taken back ---------------------------------------------------------------------------

@pytest.mark.parametrize('text, read, owed', [
    ('def ', 'def', b' '),
    ('x = 10', 'x =', b' 10'),
    ('http:/', 'http', b':/'),                  # '://' reaches across from two ids before the end
    ('self.', 'self', b'.'),
    ('a', '', b'a'),                            # end-of-text stands before
    ('日本', None, None),
    ('<|endoftext|>def ', 'def', b' '),
    ('<|endoftext|>', '', b''),
])
def test_as_many_ids_are_taken_back_as_one_could_reach_across(bpe, text, read, owed):
    spelling = spelling_of(bpe)
    ids, got = healed(bpe, encode_prompt(bpe, text), text)
    said = text.removeprefix('<|endoftext|>')
    assert bytes_of(bpe, ids) + got == said.encode()
    assert owed is None or (got == owed and bpe.decode(ids) == read)
    assert ids and (bytes_of(bpe, ids) or ids == [bpe.eot])
    # nothing reaches across from further back, and something does from there or from inside the first id
    whole = said.encode()
    reaching = [at for at in range(len(whole)) if spelling.reaches_across(whole[at:])]
    assert not got or min(reaching) >= len(whole) - len(got)


def cut_anywhere(rng, text, n):
    for _ in range(n):
        a, b = sorted(rng.sample(range(len(text) + 1), 2))
        yield text[a:b]


def random_walk(rng, spelling, owed):
    """Ids that spell what is owed."""
    ids = []
    while owed:
        choice = rng.choice(sum(spelling.next_ids(owed), []))
        ids.append(choice)
        owed = spelling.still_owed(owed, [choice])
    return ids


def test_prompts_cut_anywhere(bpe):
    """Whatever may be drawn, the text goes on with the prompt, and a Writer shows what is beyond it."""
    rng = random.Random(0)
    text = 'def naïve():\n\n        return 日本語🙂😀 http://a.b/ccc   \n  café' * 2
    spelling = spelling_of(bpe)
    ends = set()
    for prompt in cut_anywhere(rng, text, 400):
        ids, owed = healed(bpe, encode_prompt(bpe, prompt), prompt)
        drawn = random_walk(rng, spelling, owed) + [rng.randrange(256) for _ in range(3)]
        whole = bpe.decode([*ids, *drawn])
        assert whole.startswith(prompt)
        writer = Writer(bpe, before=ids, owed=owed)
        for i in drawn:
            writer.feed(i)
        writer.close()
        assert prompt + writer.text == whole
        ends.add(len(owed))
    assert len(ends) > 5


def test_bytes_cut_anywhere(bpe):
    """A session's text may have ended inside a character; its ids, too, can be spelled again."""
    rng = random.Random(1)
    spelling = spelling_of(bpe)
    raw = '日本語🙂😀 é'.encode() * 3
    for _ in range(200):
        a, b = sorted(rng.sample(range(len(raw)), 2))
        assert spelling.possible(raw[a:b])[0]
        assert bytes_of(bpe, random_walk(rng, spelling, raw[a:b])).startswith(raw[a:b])


def test_what_leads_nowhere_is_not_begun():
    """'c' can only be spelled as a part of 'bc': after 'ab' the text could not go on."""
    spelling = Spelling([b'a', b'ab', b'bc', b'd', b''])
    assert spelling.next_ids(b'abc') == ([], [0])
    assert not spelling.possible(b'cd')[0] and spelling.possible(b'bcd')[0]


@pytest.mark.parametrize('kind', ['char', 'byte'])
def test_nothing_is_taken_back_where_ids_are_characters_or_bytes(kind):
    tok = tokenizer.build_tokenizer(kind, ['def main é'])
    for text in ('def ', 'é', 'm'):
        assert healed(tok, encode_prompt(tok, text), text) == (tok.encode(text).tolist(), b'')


def test_foreign_tokenizers_are_healed_where_it_is_exact(foreign_tokenizers):
    rng = random.Random(2)
    counts = {}
    for path in sorted(foreign_tokenizers.iterdir()):
        tok = tokenizer.load_tokenizer(str(path))
        counts[path.name] = 0
        for prompt in ('the ca', 'the', 'the cat ', 'The Cat', 'a ho', 'the cat sat on the ma', 'xyz ünknown', 't'):
            try:
                ids = encode_prompt(tok, prompt)
            except SystemExit:
                continue
            read, owed = healed(tok, ids, prompt)
            if not owed:
                assert read == ids
                continue
            counts[path.name] += 1
            drawn = random_walk(rng, spelling_of(tok), owed)
            writer = Writer(tok, before=read, owed=owed)
            for i in drawn:
                writer.feed(i)
            writer.close()
            if tok.decode(ids) == prompt:
                assert (prompt + writer.text).rstrip(' ') == tok.decode([*read, *drawn]).rstrip(' ')
    assert sum(n > 0 for n in counts.values()) >= 3, counts


def test_one_id_can_be_kept(bpe):
    ids = bpe.encode(' ').tolist()
    assert take_back(bpe, ids, ' ') == ([], b' ') and take_back(bpe, ids, ' ', keep_one=True) == (ids, b'')


# --- what a person sees ---------------------------------------------------------------------------

STARTS = ['e', ' et', 'et e', '\n', 'e é', 'e 😀']


def shown(run, kind, flags):
    return run(kind, flags + ' --max_new_tokens=12')


def test_texts_begin_with_the_prompt_and_rows_are_as_alone(run):
    alone = []
    for start in STARTS:
        flags = f'--start="{start}"'
        out = shown(run, 'bpe', flags)
        assert out.startswith(start)
        assert shown(run, 'bpe', flags + ' --stream=False') == out
        alone.append(shown(run, 'bpe', flags + ' --temperature=0'))
    lines = [start for start in STARTS if start.strip()]
    with open('healed.txt', 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines))
    together = shown(run, 'bpe', '--start=LINES:healed.txt --temperature=0 --batch_size=2')
    assert together.split('---------------\n') == [out for out, start in zip(alone, STARTS) if start.strip()]


def test_the_setting_heal(run):
    changed = [shown(run, 'bpe', f'--start="{start}" --seed={seed} --heal={heal}')
               for heal in (True, False) for start in STARTS[:3] for seed in (1, 2)]
    assert changed[:6] != changed[6:]
    assert run('char', '--heal=True') == run('char', '--heal=False')


def test_new_tokens_are_counted_behind_the_prompt(run):
    _, tok = open_run('bpe')
    for n in (1, 3):
        for start in ('et e', ' et'):
            out = run('bpe', f'--start="{start}" --max_new_tokens={n} --logprobs=2')
            text, table = out.split('token  ', 1) if 'token  ' in out else out.split('token', 1)
            assert text.startswith(start) and len(text) > len(start)
            assert len(table.splitlines()) - 1 >= n
            beams = run('bpe', f'--start="{start}" --max_new_tokens={n} --beams=3 --num_samples=2')
            assert all(part.split('\n', 1)[1].startswith(start) for part in beams.split('--------------- score ')[1:])


def test_a_stop_never_matches_inside_the_prompt(run):
    for flags in ('', ' --beams=2', ' --session=stops'):
        out = run('bpe', f'--start="et et" --stop=et --max_new_tokens=5{flags}')
        out = out.split('tokens\n')[-1]
        assert out.startswith('et et') and 'et' not in out[5:]


def test_sessions_keep_the_text_that_was_shown(run, monkeypatch):
    _, tok = open_run('bpe')

    def text_of(name):
        return tok.decode(torch.load(f'bpe/sessions/{name}.pt', weights_only=True)['tokens'].tolist())

    whole = run('bpe', '--session=h1 --start="et e" --max_new_tokens=9')
    assert text_of('h1') == whole[:-1] and whole.startswith('et e')
    parts = run('bpe', '--session=h2 --start="et e" --max_new_tokens=4')[:-1]
    parts += run('bpe', '--session=h2 --start= --max_new_tokens=5')
    assert parts == whole
    more = run('bpe', '--session=h3 --fork=h2 --start=" et" --max_new_tokens=5')
    assert text_of('h3') == text_of('h2') + more[:-1] and more.startswith(' et')
    monkeypatch.setattr('sys.stdin', io.StringIO('e et\n et\n'))
    out = run('bpe', '--session=h4 --interactive=True --start= --max_new_tokens=4').split('\n')
    assert text_of('h4').startswith('e et') and ' et' in text_of('h4')[4:] and len(out) >= 3


def test_an_answer_that_ended_goes_on_in_a_word(small):
    """End-of-text is taken back, and so may be all of what was typed: the state is where it was."""
    net, _ = small
    tok = SmallTok()
    session = Session(3)
    next(session.go_on(net, tok, PROMPT))
    session.unread[0] = session.tokens[-1] = EOT
    session.reopen(tok)
    ids, owed = healed(tok, [0], 'a', begins=False, keep_one=session.needs_ids())
    assert (ids, owed) == ([], b'a')
    drawn = session.go_on(net, tok, ids, owed=owed)
    got, logits = next(drawn)
    torch.testing.assert_close(logits, prefill(net, PROMPT)[0])
    assert WORDS[got].startswith(b'a') and list(session.tokens) == [*PROMPT, got]


@pytest.mark.usefixtures('runs')
def test_samples_while_training_are_healed(capsys):
    net, tok = open_run('bpe')
    for prompt in ('et e', 'e 😀'):
        evaluation.show_sample(net, tok, prompt, 1, 1, 'cpu', 'float32')
        said = capsys.readouterr().out
        assert said.startswith(f'--- sample at step 1\n{prompt}') and len(said) > 300


def test_what_is_healed_costs_nothing_more(small, monkeypatch):
    net, _ = small
    tok = SmallTok()
    read = prefill(net, PROMPT)
    rows = Rows(net, tok.vocab_size)
    rows.add([read], [look_ahead(net, tok, read, b'ab')])
    rows.advance(torch.tensor([2]))                         # 'ab'
    assert rows.rests == [None]
    monkeypatch.setattr(healing.Rest, 'add_to', None)
    rows.draw()
    assert CONTEXT >= healing.MOST_IDS
