"""sample.py, generation.py, sessions.py: the next token, rows side by side, beams, where a text stops and how it goes on, what is refused."""
import io
import math
import os
import re
import shutil
import signal
import time
import types

import pytest
import torch
from helpers.models import CONFIG, LLAMA, PEERS, SSM2, V, perturb, theirs
from helpers.runs import cut, refused, script, write_text

from mambino import tokenizer
from mambino.sample import generation, sessions
from mambino.sample.generation import (
    Rows,
    beam_search,
    fast_topk,
    generate,
    logprobs_of,
    nucleus_candidates,
    prefill,
    sample_token,
    token_losses,
)
from mambino.sample.sessions import Session
from mambino.sample.text import Writer, chat_marks, chat_turn, encode_prompt
from mambino.weights import checkpoint, loading
from model_gpt import GPT, GPTConfig

KINDS = {'char': '--model=gpt', 'bpe': '--model=mamba'}


@pytest.fixture(scope='module', autouse=True)
def runs(tmp_path_factory):
    """A folder with two trained models, char/ and bpe/; the working directory of these tests."""
    folder, before = tmp_path_factory.mktemp('runs'), os.getcwd()
    os.chdir(folder)
    write_text('text.txt')
    for kind, model in KINDS.items():
        assert script('prepare.py', f'text.txt --tokenizer={kind} --vocab_size=400 --out=data/{kind}') == 0
        assert script('train.py', f'--dataset={kind} --out_dir={kind} {model} --n_layer=1 --n_embd=32 --block_size=32 '
                      '--batch_size=8 --tokens_per_step=256 --max_iters=60 --learning_rate=1e-2 --device=cpu') == 0
    yield folder
    os.chdir(before)


@pytest.fixture
def run(capsys):
    """run(kind, flags) → the text sample.py wrote."""
    def run(kind, flags=''):
        capsys.readouterr()
        assert script('sample.py', f'--out_dir={kind} --device=cpu --max_new_tokens=60 --start=e', flags) == 0
        return re.sub(r'\A(\w+ +=.*\n)+', '', capsys.readouterr().out)  # without the settings it repeats
    return run


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def open_run(kind):
    ckpt = checkpoint.load_checkpoint(kind)
    return loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)


# --- which token

@torch.no_grad()
def test_greedy_is_repeated_argmax_of_forward(run, kind):
    net, tok = open_run(kind)
    ids = tok.encode('e et').tolist()
    begin = len(ids)
    for _ in range(25):
        ids.append(int(net(torch.tensor([ids]))[0][0, -1, :tok.vocab_size].argmax()))
    got = [int(i[0]) for i in generate(net, ids[:begin], 1, 25, tok.vocab_size, temperature=0)]
    assert got == ids[begin:] and len(set(got)) > 2
    greedy = run(kind, '--start="e et" --temperature=0 --max_new_tokens=25')
    assert greedy == 'e et' + tok.decode(got[:got.index(tok.eot)] if tok.eot in got else got) + '\n'
    assert run(kind, '--start="e et" --top_k=1 --temperature=1.5 --max_new_tokens=25') == greedy


def test_seed_decides(run, kind):
    assert run(kind, '--seed=1') == run(kind, '--seed=1') != run(kind, '--seed=2')


def drawn(logits, n=2000, **how):
    """The share of each token among n draws."""
    ids = sample_token(torch.tensor(logits).log().expand(n, -1), generator=torch.Generator().manual_seed(0), **how)
    assert ids.shape == (n,) and ids.dtype == torch.int64
    return (torch.bincount(ids, minlength=len(logits)) / n).tolist()


@pytest.mark.parametrize('how, expected', [  # probabilities 0.05, 0.5, 0.15, 0.3 and what the filters leave of them
    (dict(), [0.05, 0.5, 0.15, 0.3]),
    (dict(temperature=0), [0, 1, 0, 0]),
    (dict(temperature=0.5), [0.0025 / 0.365, 0.25 / 0.365, 0.0225 / 0.365, 0.09 / 0.365]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_k=2), [0, 0.625, 0, 0.375]),
    (dict(top_k=99), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_p=0.45), [0, 1, 0, 0]),
    (dict(top_p=0.7), [0, 0.625, 0, 0.375]),             # the token that reaches top_p stays
    (dict(top_p=0.9), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    (dict(min_p=0.2), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    (dict(min_p=0.4), [0, 0.625, 0, 0.375]),
    (dict(min_p=1.0), [0, 1, 0, 0]),
    (dict(min_p=0.4, top_p=0.6), [0, 1, 0, 0]),          # 0.625 of what min-p left is enough, 0.5 would not be
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),
])
def test_filters(how, expected):
    got = drawn([0.05, 0.5, 0.15, 0.3], **how)
    assert got == pytest.approx(expected, abs=0.05)
    assert [share > 0 for share in got] == [share > 0 for share in expected]


def test_a_large_vocabulary_is_not_sorted():
    """The same choice as with the whole of it in order."""
    for size in (33, 5000, 50_257):
        x = torch.randn(5, size)
        for k in (1, 7, 200):
            values, index = fast_topk(x, min(k, size))
            assert torch.equal(values, x.topk(min(k, size)).values) and torch.equal(x.gather(1, index), values)
        for scale in (0.1, 9.0):                                                # where some hundred tokens are not, and are enough
            weights = (x * scale).softmax(-1)
            values, index = nucleus_candidates(weights, torch.full((5, 1), 0.9))
            order = weights.sort(descending=True)
            assert torch.equal(values, order.values[:, :values.shape[1]]) and (values.sum(-1) >= 0.9).all()
            assert torch.equal(weights.gather(1, index), values) and (size < 5000 or scale == 0.1 or values.shape[1] < size)
            got = {int(sample_token(x[:1] * scale, top_p=0.3)) for _ in range(40)}
            allowed = order.values[0].cumsum(-1) - order.values[0] < 0.3
            assert got <= set(order.indices[0][allowed].tolist())


def test_filters_work_row_by_row():
    logits = torch.tensor([[9., 8, -9, -9], [-9, -9, 8, 9]])
    for how in (dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1)):
        rows = torch.stack([sample_token(logits, **how) for _ in range(50)])
        assert set(rows[:, 0].tolist()) <= {0, 1} and set(rows[:, 1].tolist()) <= {2, 3}


@pytest.mark.parametrize('how', [dict(temperature=0), dict(temperature=2.0), dict(top_k=3), dict(top_p=0.9), dict(min_p=0.5)])
def test_padded_ids_are_never_drawn(how):
    net = GPT(GPTConfig(vocab_size=64, n_layer=1, n_embd=32, n_head=1, block_size=16, tie_embeddings=False)).eval()
    seen = []
    net.lm_head.register_forward_hook(lambda module, x, out: seen.append(out) or torch.cat((out[..., :50], out[..., 50:] + 99), -1))
    ids = torch.stack(list(generate(net, [1], 20, 10, 50, generator=torch.Generator().manual_seed(0), **how)))
    assert seen, 'the logits were not edited'
    assert ids.shape == (10, 20) and ids.max() < 50


def test_samples_of_a_batch(run, kind):
    rows = run(kind, '--num_samples=3').split('---------------\n')
    assert len(rows) == 3 and len(set(rows)) == 3 and all(row.startswith('e') and len(row) > 2 for row in rows)


def test_streamed_text_is_the_text(run, kind):
    for flags in ('', '--num_samples=2', '--stop=et', '--max_new_tokens=1'):
        assert run(kind, flags) == run(kind, flags + ' --stream=False')


# --- beyond the window a GPT was trained with

@pytest.mark.parametrize('length', [1, 20, 50])
def test_gpt_goes_on_beyond_block_size_with_a_constant_state(length, monkeypatch):
    net, tok = open_run('char')
    assert net.config.window == 0 and net.config.block_size == 32
    sizes, step = [], generation.step

    def measured(*args, **more):
        logits, state = step(*args, **more)
        sizes.append(sum(value[0].numel() for value in state.values()))
        return logits, state
    monkeypatch.setattr(generation, 'step', measured)
    ids = list(generate(net, [1] * length, 2, 300, tok.vocab_size))
    assert len(ids) == 300 and net.config.window == 0
    assert len(set(sizes[40:])) == 1 and sizes[-1] == min(sizes)  # a ring of block_size tokens
    stopped = generate(net, [1], 1, 90, tok.vocab_size)
    next(stopped), stopped.close()
    assert net.config.window == 0


# --- whole characters, and where the text ends

def write(ids_or_text, stops=(), tok=None):
    """What a Writer shows for each id, and at the end; the pieces together must be its text."""
    tok = tok or tokenizer.build_tokenizer('byte')
    writer = Writer(tok, stops)
    ids = tok.encode(ids_or_text).tolist() if isinstance(ids_or_text, str) else ids_or_text
    pieces = [writer.feed(i) for i in ids] + [writer.close()]
    assert ''.join(pieces) == writer.text and writer.done and writer.close() == ''
    return pieces


def test_characters_are_never_split():
    assert write('é€😀!') == ['', 'é', '', '', '€', '', '', '', '😀', '!', '']
    assert write('é€😀!'.encode('utf-8')[:-2]) == ['', 'é', '', '', '€', '', '', '', '\ufffd']


@pytest.mark.parametrize('text, stops, expected', [
    ('one END two', ['END'], 'one '),
    ('one END two', ['EN'], 'one '),
    ('one END two', ['two', 'END'], 'one '),
    ('one EN two', ['END'], 'one EN two'),
    ('one EN', ['END'], 'one EN'),              # held back, then released at the end
    ('aab', ['ab'], 'a'),
    ('aaaab', ['aaab'], 'a'),
    ('abcabd!', ['abd'], 'abc'),
    ('abcd', ['bcx', 'c'], 'ab'),
    ('END', ['END'], ''),
    ('x€😀y', ['€😀'], 'x'),
    ('x😀y', ['€'], 'x😀y'),
    ('no stops', [], 'no stops'),
])
def test_stop_strings(text, stops, expected):
    pieces = write(text, stops)
    assert ''.join(pieces) == expected
    tok = tokenizer.build_tokenizer('bpe', [text * 20 + ' ' + text], vocab_size=300)  # stops straddle its tokens, or begin inside one
    assert ''.join(write(text, stops, tok)) == expected


def test_part_of_a_stop_string_is_held_back_no_longer_than_needed():
    assert write('a<b<ef', ['<e', '<f']) == ['a', '', '<b', '', '', '', '']
    assert write('a<b', ['<e']) == ['a', '', '<b', '']


def test_end_of_text_stops():
    tok = tokenizer.build_tokenizer('byte')
    assert write([65, tok.eot, 66]) == ['A', '', '', '']
    assert write([65, 60, tok.eot, 66], ['<e']) == ['A', '', '<', '', '']
    assert write([0xe2, 0x82, tok.eot, 66]) == ['', '', '\ufffd', '', '']


def test_stop_in_the_script(run, kind):
    whole = run(kind, '--temperature=0')[1:-1]
    stop = whole[10:13]
    expected = whole[:whole.index(stop)]
    for flags in ('', ' --stream=False'):
        assert run(kind, '--temperature=0 --stop=' + f"'{stop}|never'".replace('\n', '\\n') + flags) == 'e' + expected + '\n'


def test_end_of_text_in_the_prompt():
    for kind in KINDS:
        tok = open_run(kind)[1]
        assert encode_prompt(tok, '<|endoftext|>e') == [tok.eot, *tok.encode('e')]
        assert encode_prompt(tok, '<|endoftext|>') == [tok.eot]


# --- prompts and checkpoints that cannot be used

def test_prompt_from_a_file(run):
    with open('prompt.txt', 'w', encoding='utf-8') as f:
        f.write('et\né')
    assert run('char', '--start=FILE:prompt.txt').startswith('et\né')


def damaged(name):
    os.makedirs(name, exist_ok=True)
    shutil.copy('char/ckpt.pt', name)
    cut(f'{name}/ckpt.pt')


def diverged(name):
    os.makedirs(name, exist_ok=True)
    ckpt = checkpoint.load_checkpoint('char')
    ckpt['weights'] = {name: torch.full_like(value, math.nan) for name, value in ckpt['weights'].items()}
    checkpoint.save_checkpoint(f'{name}/ckpt.pt', ckpt)


@pytest.mark.parametrize('flags, words, before', [
    ('--start=', 'start empty', None),
    ('--start=e~e', "start '~' --start", None),
    ('--start=FILE:nothing.txt', 'nothing.txt No such file', None),
    ('--start=FILE:char', 'char directory', None),
    ('--start=FILE:char/best.pt', 'best.pt text', None),
    ('--start=FILE:empty.txt', 'start empty', lambda: open('empty.txt', 'w').close()),
    ('--out_dir=data', 'data no checkpoint train.py', None),
    ('--out_dir=nowhere', 'nowhere no such checkpoint', None),
    ('--out_dir=damaged', 'damaged/ckpt.pt not a readable checkpoint', lambda: damaged('damaged')),
    ('--out_dir=text.txt', 'text.txt not a readable checkpoint', None),
    ('--out_dir=diverged', 'no numbers diverged', lambda: diverged('diverged')),
    ('--out_dir=diverged --start=LINES:text.txt --beams=2', 'no numbers diverged', None),
    ('--out_dir=diverged --score=text.txt', 'no numbers diverged', None),
    ('--num_samples=0', 'num_samples', None),
    ('--max_new_tokens=-1', 'max_new_tokens without end', None),
    ('--temperature=-1', 'temperature', None),
    ('--top_p=0', 'top_p', None),
    ('--min_p=2', 'min_p', None),
    ('--device=toaster', 'toaster', None),
    ('--dtype=int3', 'int3', None),
    ('--seed=99999999999999999999', 'seed', None),
    ('--top=5', 'top did you mean', None),
])
def test_unusable_input_is_one_line(capsys, flags, words, before):
    if before:
        before()
    capsys.readouterr()
    assert script('sample.py', '--out_dir=char --device=cpu --max_new_tokens=5', flags) == 2
    refused(capsys, *words.split())


# --- many rows

SMALL = {'gpt': dict(n_head=4, n_kv_head=2, block_size=16), 'window': dict(n_head=4, window=8, tie_embeddings=False),
         'mamba1': dict(version=1), 'mamba2': dict(head_dim=16), 'hybrid': dict(n_head=4, ssm_head_dim=16, window=0, block_size=16)}


@pytest.fixture(params=SMALL)
def net(request):
    """A small model of each kind, nothing in it 0 or 1, of 60 ids, the last 10 of them padding."""
    torch.manual_seed(0)
    kind = {'window': 'gpt'}.get(request.param, request.param).rstrip('12')
    state = {} if kind == 'gpt' else dict(state_size=8)
    return perturb(checkpoint.build(kind, dict(vocab_size=60, n_layer=2, n_embd=32, **state, **SMALL[request.param])), 0.3).eval()


PROMPTS = [[1, 2, 3], [4] * 21, [5], list(range(40)), [6, 7], [3, 2, 1]]


def chances(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize('how', [dict(temperature=0), dict(temperature=1.0, top_k=20), dict(temperature=1.0, top_p=0.9)])
def test_a_row_is_what_it_is_alone(net, how):
    """Prompts of all lengths, before and beyond block_size; rows end at different times, and new ones take their places."""
    lengths = [9, 30, 3, 12, 20, 15]
    alone = [[int(i) for i in generate(net, prompt, 1, n, 50, generator=[g], repetition_penalty=1.2, **how)]
             for prompt, n, g in zip(PROMPTS, lengths, chances(6))]
    rows, got, active, waiting, generators = Rows(net, 50, 1.2), [[] for _ in PROMPTS], [], list(range(6)), chances(6)
    while waiting or active:
        fresh, waiting = waiting[:3 - len(active)], waiting[3 - len(active):]
        if fresh:
            rows.add([prefill(net, PROMPTS[n]) for n in fresh])
        active += fresh
        ids = rows.draw(generator=[generators[n] for n in active], **how)
        for n, i in zip(active, ids.tolist()):
            got[n].append(i)
        stay = [place for place, n in enumerate(active) if len(got[n]) < lengths[n]]
        active = [active[place] for place in stay]
        rows.keep(stay)
        if active:
            rows.advance(ids[stay])
    assert got == alone and len(set(sum(alone, []))) > 5 and max(sum(alone, [])) < 50


@torch.no_grad()
def test_of_a_prompt_only_the_last_logits_are_computed(net):
    """They are most of the work where the vocabulary is large."""
    idx, heads = torch.randint(60, (3, 16)), []
    want = net(idx)[0][:, -1:]
    net.lm_head.register_forward_hook(lambda module, x, out: heads.append(out.shape[1]))
    got, state = net.step(idx, last=True)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    after = idx.new_tensor([[1], [2], [3]])
    torch.testing.assert_close(net.step(after, state)[0], net(torch.cat((idx, after), 1))[0][:, -1:], atol=1e-4, rtol=0)
    prefill(net, list(range(50)))
    assert heads == [1, 1, 17] + [1] * (len(heads) - 3) and len(heads) > 3


@torch.no_grad()
def test_beyond_block_size_a_token_sees_a_window_however_it_is_read():
    net = perturb(GPT(GPTConfig(vocab_size=60, n_layer=1, n_head=2, n_embd=32, block_size=16)), 0.3).eval()
    windowed = GPT(GPTConfig(vocab_size=60, n_layer=1, n_head=2, n_embd=32, block_size=16, window=16)).eval()
    windowed.load_state_dict(net.state_dict())
    ids = torch.randint(60, (70,))
    want = windowed(ids[None])[0][0]
    assert (want - net(ids[None])[0][0])[16:].abs().max() > 0.1
    for place in (1, 10, 16, 20, 69):
        _, state, _ = prefill(net, ids[:place])
        torch.testing.assert_close(prefill(net, ids[place:], state)[0][0], want[-1], atol=1e-4, rtol=0)
    assert len(torch.cat(list(token_losses(net, ids, 5)))) == 70


def write_lines(name, lines):
    with open(name, 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines))


def test_prompts_from_lines(run, kind):
    lines = ['e', 'et et et e', '  e', 'tt' * 30, '<|endoftext|>e']
    write_lines('lines.txt', [*lines[:2], '', '\t', *lines[2:]])
    rule = '---------------\n'
    whole = [run(kind, f'--temperature=0 --start="{line}"') for line in lines]
    assert run(kind, '--temperature=0 --start=LINES:lines.txt') == rule.join(whole)
    drawn = run(kind, '--start=LINES:lines.txt --num_samples=2')
    assert drawn.count(rule) == 9 and len(set(drawn.split(rule))) == 10
    for size in (1, 3):
        assert run(kind, f'--start=LINES:lines.txt --num_samples=2 --batch_size={size} --stream=False') == drawn
    assert drawn.startswith(run(kind, '--start=e --num_samples=2'))


# --- against transformers

@pytest.fixture(scope='module', params=['llama', 'mamba2'])
def pair(request):
    """The same small model, ours and transformers'."""
    settings = {'llama': ('Llama', dict(LLAMA, rms_norm_eps=1e-5)), 'mamba2': ('Mamba2', dict(SSM2, n_groups=1))}[request.param]
    torch.manual_seed(0)
    their = theirs(*settings)
    peer = PEERS[request.param]
    changes = dict(norm_eps=1e-5) if request.param == 'llama' else {}
    our = peer[2](CONFIG[peer[2]](vocab_size=V, n_layer=2, **{**peer[3], **changes})).eval()
    our.load_state_dict(their.state_dict())
    return our, their


@pytest.mark.parametrize('length_penalty, penalty, eos', [(1.0, 1.0, 3), (1.0, 1.0, None), (0.0, 1.0, 7), (2.0, 1.3, 11), (-1.0, 1.0, 3)])
def test_beams_are_those_of_transformers(pair, length_penalty, penalty, eos):
    our, their = pair
    prompt = [5, 17, 40, 5]
    if eos is not None:  # a token that ends many continuations
        eos = [ids for _, ids in beam_search(our, prompt, 4, 6, V, lambda ids: False)][eos % 4][2 + eos % 3]
    want = their.generate(torch.tensor([prompt]), num_beams=4, num_return_sequences=3, do_sample=False, max_new_tokens=14,
                          length_penalty=length_penalty, repetition_penalty=penalty, eos_token_id=eos, pad_token_id=1,
                          early_stopping=False, return_dict_in_generate=True, output_scores=True)
    found = beam_search(our, prompt, 4, 14, V, lambda ids: ids[-1] == eos, length_penalty, penalty)[:3]
    for (score, ids), row, their_score in zip(found, want.sequences.tolist(), want.sequences_scores.tolist()):
        assert row[4:4 + len(ids)] == ids and score == pytest.approx(their_score, abs=1e-4)
        assert set(row[4 + len(ids):]) <= {1, eos}
    assert eos is None or length_penalty > 0 or any(ids[-1] == eos for _, ids in found)


def test_repetition_penalty_is_that_of_transformers(pair):
    our, their = pair
    prompt = [5, 17, 40, 5]
    want = their.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, repetition_penalty=1.5, eos_token_id=None,
                          pad_token_id=0)[0, 4:].tolist()
    got = {penalty: [int(i) for i in generate(our, prompt, 1, 20, V, temperature=0, repetition_penalty=penalty)] for penalty in (1.0, 1.5)}
    assert got[1.5] == want != got[1.0]
    processor = pytest.importorskip('transformers').RepetitionPenaltyLogitsProcessor(1.7)
    rows, texts = Rows(our, V, 1.7), torch.tensor([[1, 2, 2, 3], [4, 5, 6, 7]])
    rows.add([prefill(our, ids) for ids in texts.tolist()])
    for _ in range(3):
        torch.testing.assert_close(rows.penalized(rows.logits), processor(texts, rows.logits))
        ids = rows.draw(temperature=0)
        texts = torch.cat((texts, ids[:, None]), 1)
        rows.advance(ids)


@torch.no_grad()
def test_token_losses_are_the_loss_of_transformers(pair, monkeypatch):
    our, their = pair
    ids = torch.randint(V, (90,))
    nats = torch.cat(list(token_losses(our, ids.tolist(), 9)))
    whole = torch.cat((torch.tensor([9]), ids))
    assert nats.mean().item() == pytest.approx(their(whole[None], labels=whole[None]).loss.item(), abs=1e-5)
    monkeypatch.setattr(generation, 'PREFILL', 7)
    torch.testing.assert_close(torch.cat(list(token_losses(our, ids, 9))), nats, atol=1e-4, rtol=0)
    want = torch.log_softmax(their(whole[None, :-1]).logits[0, -1], -1)
    (own, others), = logprobs_of(prefill(our, whole[:-1])[0], ids[-1:], 3, V)
    assert own == pytest.approx(want[ids[-1]].item(), abs=1e-4)
    assert [i for i, _ in others] == want.topk(3).indices.tolist()
    assert [p for _, p in others] == pytest.approx(want.topk(3).values.tolist(), abs=1e-4)


# --- beams, logprobs and score in the script

def test_beams_in_the_script(run, kind):
    blocks = run(kind, '--beams=4 --num_samples=3 --max_new_tokens=12 --start="e e"').split('--------------- score ')[1:]
    scores = [float(block.split(',')[0]) for block in blocks]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and scores[0] < 0
    texts = [block.split('\n', 1)[1] for block in blocks]
    assert len(set(texts)) == 3 and all(text.startswith('e e') for text in texts)
    stopped = run(kind, '--beams=2 --max_new_tokens=12 --start="e e" --length_penalty=0 --stop=l')
    assert 'l' not in stopped.split('\n', 1)[1] and int(re.search(r'(\d+) tokens', stopped)[1]) < 12


def test_logprobs_in_the_script(run):
    net, tok = open_run('char')
    out = run('char', '--logprobs=3 --max_new_tokens=4 --temperature=0 --start="et e"')
    text, table = out.split('token', 1)
    lines = table.splitlines()[1:]
    assert len(lines) == 4 and text.startswith('et e')
    own = tok.encode('et e').tolist()
    scores = net(torch.tensor([own]))[0][0, -1].log_softmax(-1)
    best = [(tok.decode([i]), f'{scores[i]:.3f}') for i in scores.topk(3).indices.tolist()]
    assert re.findall(r"'(.*?)' +(-[\d.]+)", lines[0]) == [best[0], *best]


def test_score_in_the_script(run, capsys, monkeypatch):
    net, tok = open_run('bpe')
    with open('text.txt', encoding='utf-8') as f:
        text = f.read()[:1500]
    write_lines('score.txt', [text])
    out = run('bpe', '--score=score.txt')
    ids = torch.tensor([tok.eot, *tok.encode(text)])
    loss = net(ids[None, :-1], ids[None, 1:])[1].item()
    figure = {name: float(value.replace(',', '')) for name, value in re.findall(r'^(\S+) +([\d.,]+)', out, re.M)}
    assert figure['tokens'] == len(ids) - 1 and figure['loss'] == pytest.approx(loss, abs=1e-3)
    assert figure['perplexity'] == pytest.approx(math.exp(loss), rel=1e-2)
    assert figure['bits/byte'] == pytest.approx(loss * (len(ids) - 1) / math.log(2) / len(text.encode()), abs=1e-3)
    worst = [float(line.split()[0]) for line in out.split('in nats:\n')[1].splitlines()]
    assert len(worst) == 10 and worst == sorted(worst, reverse=True) and worst[0] > loss
    monkeypatch.setattr('sys.stdin', open('score.txt', encoding='utf-8'))
    assert run('bpe', '--score=-') == out
    assert 'loss' in run('char', '--score=score.txt')
    monkeypatch.setattr(generation.F, 'cross_entropy', lambda logits, targets, reduction: torch.full((len(targets),), 800.0))
    assert re.search('perplexity +inf', run('char', '--score=score.txt'))      # which no float can hold


# --- sessions and conversations

@pytest.fixture
def steps(monkeypatch):
    """The ids that models read, one list a step; calls of steps.at (a set of their numbers) are interrupted by Ctrl-C."""
    class Steps(list):
        at = ()
    seen, step = Steps(), generation.step

    def counted(net, idx, state=None, last=False):
        seen.append(idx[0].tolist())
        if len(seen) in seen.at:
            signal.raise_signal(signal.SIGINT)
        return step(net, idx, state, last)
    monkeypatch.setattr(generation, 'step', counted)
    return seen


TOK = types.SimpleNamespace(vocab_size=50, eot=49)  # all that generation asks of a tokenizer


def drawn_in(session, net, n, ids=()):
    """The next n tokens of a session."""
    drawn = session.go_on(net, TOK, list(ids), temperature=1.0, top_k=20, repetition_penalty=1.2)
    return [next(drawn)[0] for _ in range(n)]


def test_a_session_goes_on_as_if_it_had_not_stopped(net, tmp_path):
    path = str(tmp_path / 'sessions' / 'a.pt')
    whole = Session(3)
    want = drawn_in(whole, net, 60, [1, 2, 3])
    for cuts in ((60,), (1, 59), (20, 1, 39)):
        session, got = Session(3), []
        for i, n in enumerate(cuts):
            got += drawn_in(session, net, n, [] if i else [1, 2, 3])
            session.save(path, 'x')
            session = sessions.load_session(path, 'x', 'cpu')
        assert got == want and session.tokens == whole.tokens and list(session.tokens) == [1, 2, 3] + want
    told, again = Session(3), Session(3)
    first = drawn_in(told, net, 20, [1, 2, 3])
    second = drawn_in(told, net, 20, [4, 5])
    ids = [1, 2, 3] + first + [4, 5]
    logits, _, _ = prefill(net, ids)
    torch.testing.assert_close(next(again.go_on(net, TOK, ids))[1], logits)
    assert list(told.tokens) == ids + second


def test_a_conversation_never_reads_its_past(run, kind, steps, monkeypatch):
    _, tok = open_run(kind)
    lines = ['e et', '', 'a e\\', 'C', 'not ~ known' if kind == 'char' else 'known', 'tt']
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(lines)))
    out = run(kind, '--interactive=True --max_new_tokens=15 --session=talk --start=')
    read_so_far = [i for step in steps for i in step]
    session = torch.load(f'{kind}/sessions/talk.pt', weights_only=True)
    tokens = session['tokens'].tolist()
    assert read_so_far == tokens[:-1] and session['unread'] == tokens[-1:]     # each once, in order
    assert tokens[:len(tok.encode('e et'))] == tok.encode('e et').tolist()
    assert 'a e\nC' in tok.decode(tokens) and 'tt' in tok.decode(tokens) and '~' not in tok.decode(tokens)
    assert len(out) > 20


def test_ctrl_c_ends_an_answer_and_the_text_goes_on(run, capsys, steps, monkeypatch):
    steps.at = {20}
    monkeypatch.setattr('sys.stdin', io.StringIO('e\n\n'))
    run('char', '--interactive=True --max_new_tokens=40 --session=cut')
    tokens = torch.load('char/sessions/cut.pt', weights_only=True)['tokens'].tolist()
    assert [i for step in steps for i in step] == tokens[:-1] and 41 < len(tokens) < 81
    whole = run('char', '--session=whole50 --max_new_tokens=50')
    for limit in (60, 0):  # in the script; without end
        steps.at, name = {len(steps) + 30}, f'cut{limit}'
        first = run('char', f'--session={name} --max_new_tokens={limit}')
        second = run('char', f'--session={name} --max_new_tokens=20 --start=')
        assert first[:-1] + second[:-1] == whole[:-1] and len(second) == 21


def test_ctrl_c_at_the_prompt_loses_no_conversation(run, monkeypatch):
    """Meant for an answer, it may come a moment late."""
    class Terminal(io.StringIO):
        isatty = lambda self: True

    def typed(prompt, lines=iter(['e et', 'a\\', KeyboardInterrupt, 't', EOFError])):
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line
    monkeypatch.setattr('sys.stdin', Terminal())
    monkeypatch.setattr('builtins.input', typed)
    run('char', '--interactive=True --session=late --max_new_tokens=2 --start=')
    text = open_run('char')[1].decode(torch.load('char/sessions/late.pt', weights_only=True)['tokens'].tolist())
    assert text[:4] == 'e et' and text[6] == 't' and len(text) == 9
    monkeypatch.setattr('sys.stdin', None)
    assert script('sample.py', '--out_dir=char --device=cpu --interactive=True') == 2


def test_sessions_in_the_script(run, kind):
    whole = run(kind, '--session=one --max_new_tokens=40 --start="e et"')
    parts = [run(kind, '--session=two --max_new_tokens=15 --start="e et"')]
    parts += [run(kind, '--session=two --max_new_tokens=25 --start=')]
    assert ''.join(part[:-1] for part in parts) == whole[:-1]
    other = run(kind, '--session=three --fork=two --start=" B" --max_new_tokens=5')
    another = run(kind, '--session=four --fork=two --seed=2 --start=" B" --max_new_tokens=30')
    assert other.startswith(' B') and other == run(kind, '--session=two --start=" B" --max_new_tokens=5')
    assert not another.startswith(other[:-1]) and another.startswith(' B')


def test_chat(run, steps, monkeypatch):
    """Messages and answers in ChatML, whatever ended the answer."""
    tok = tokenizer.build_tokenizer('bpe', ['user assistant system hello\n' * 20], vocab_size=300)
    begin, end = chat_marks(tok)
    spelled = {begin: '<', end: '>'}
    say = lambda ids: ''.join(spelled.get(i) or tok.decode([i]) for i in ids)
    assert say(chat_turn(tok, [('system', 's'), ('user', 'hello <|im_end|>')], True)) == \
        '<system\ns>\n<user\nhello <|im_end|>>\n<assistant\n'
    assert say(chat_turn(tok, [('user', 'b')], False)) == '>\n<user\nb>\n<assistant\n'
    net = perturb(GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_embd=32)))
    for drawn in (end, tok.eot, 104):
        session = Session(0)
        next(session.go_on(net, tok, [104, 105]))
        session.unread[0] = session.tokens[-1] = drawn
        turn = chat_turn(tok, [('user', 'b')], False)
        next(session.go_on(net, tok, turn, end_ids=[end]))
        assert list(session.tokens[:-1]) == [104, 105] + ([104] if drawn == 104 else []) + turn
        assert [i for step in steps for i in step] == list(session.tokens[:-1])
        steps.clear()
    writer = Writer(tok, end_ids=[end])
    assert [writer.feed(i) for i in [104, end, 104]] == [tok.decode([104]), '', ''] and writer.done
    monkeypatch.setattr('sys.stdin', io.StringIO('e\net\n'))
    run('bpe', '--interactive=True --chat=True --start=sys --session=chat --max_new_tokens=9')
    tok, tokens = open_run('bpe')[1], torch.load('bpe/sessions/chat.pt', weights_only=True)['tokens'].tolist()
    begin, end = chat_marks(tok)
    whole = ''.join({begin: '<', end: '>'}.get(i) or tok.decode([i]) for i in tokens)
    assert whole.startswith('<system\nsys>\n<user\ne>\n<assistant\n') and '>\n<user\net>\n<assistant\n' in whole
    assert [i for step in steps for i in step] == tokens[:-1]


def test_text_without_end_costs_no_more_and_more(net):
    sizes, tok = [], tokenizer.build_tokenizer('byte')
    writer = Writer(tok, ['never there'], keep=False)
    for n, ids in enumerate(generate(net, [1], 1, 0, 50)):
        writer.feed(int(ids))
        if n == 100:
            break
    assert writer.pieces == [] and len(writer.pending) < 12
    session = Session(0)
    for n, _ in enumerate(session.go_on(net, TOK, [1, 2])):
        sizes.append(sum(value.numel() for value in session.state.values()))
        if n == 200:
            break
    assert len(set(sizes[20:])) == 1


def test_a_writer_takes_the_same_time_for_every_token():
    tok, seconds = tokenizer.build_tokenizer('byte'), []
    for n in (20_000, 80_000):
        writer, began = Writer(tok, ['ENDE']), time.process_time()
        for _ in range(n):
            writer.feed(65)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 8 * seconds[0] and len(writer.text) == 80_000


@torch.no_grad()
def test_a_learned_beginning_comes_first(net):
    pytest.importorskip('mambino.weights.adapters').add_prefix(net, 4)
    ids = [1, 2, 3]
    for _ in range(9):
        ids.append(int(net(torch.tensor([ids]))[0][0, -1, :50].argmax()))
    assert [int(i) for i in generate(net, ids[:3], 1, 9, 50, temperature=0)] == ids[3:]
    assert [int(i) for i in generate(net, [1], 1, 40, 50, temperature=0)]      # and beyond block_size
    nats = torch.cat(list(token_losses(net, ids[1:], ids[0])))
    assert nats.mean().item() == pytest.approx(net(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1].item(), abs=1e-4)


def test_smaller_weights_are_asked_for(run, monkeypatch):
    asked, whole = [], loading.quantize_model
    monkeypatch.setattr(loading, 'quantize_model', lambda net, how: (asked.append(how), whole(net, how)))
    for flags in ('', '--dtype=float32', '--dtype=bfloat16', '--quantize=int8', '--quantize=int4 --dtype=bfloat16'):
        assert len(run('bpe', flags)) > 2
    assert asked == ['bfloat16', 'int8', 'int4']


def test_adapters_change_the_model_by_their_weight(run):
    adapters = pytest.importorskip('mambino.weights.adapters')
    net, _ = open_run('char')
    made_for = checkpoint.fingerprint(net.state_dict())
    adapters.add_lora(net, rank=4)
    perturb(torch.nn.ParameterList(p for p in net.parameters() if p.requires_grad), 0.3)
    ckpt = checkpoint.load_checkpoint('char')
    how = dict(type='lora', rank=4, alpha=16.0, dropout=0.0, targets='', base='char', base_at=os.path.abspath('char'), base_fingerprint=made_for)
    os.makedirs('tuned', exist_ok=True)
    checkpoint.save_checkpoint('tuned/ckpt.pt', ckpt | dict(adapter=how, weights=adapters.adapter_state(net, 'default')))
    plain, tuned = run('char'), run('char', '--adapters=tuned')
    assert tuned != plain == run('char', '--adapters=tuned:0')
    assert tuned == run('char', '--adapters=tuned:0.25,tuned:0.75') == run('tuned')


@pytest.mark.parametrize('flags, words', [
    ('--start=LINES:nothing.txt', 'start=LINES:nothing.txt No such file'),
    ('--start=LINES:blank.txt', 'LINES:blank.txt no prompt FILE:'),
    ('--start=LINES:bad.txt', "start '~' --start"),
    ('--batch_size=0', 'batch_size'),
    ('--beams=0', 'beams'),
    ('--beams=2 --num_samples=3', 'num_samples=3 beams=2'),
    ('--beams=2 --max_new_tokens=0', 'max_new_tokens=0'),
    ('--beams=2 --stream=True', 'beams=2 stream=True'),
    ('--beams=2 --interactive=True', 'beams=2 interactive=True'),
    ('--beams=2 --session=a', 'beams=2 session=a'),
    ('--beams=2 --logprobs=1', 'beams=2 logprobs=1'),
    ('--length_penalty=99', 'length_penalty'),
    ('--repetition_penalty=0', 'repetition_penalty'),
    ('--logprobs=-1', 'logprobs'),
    ('--score=nothing.txt', 'score=nothing.txt No such file'),
    ('--score=empty.txt', 'empty.txt nothing to score'),
    ('--score=bad.txt', "bad.txt '~'"),
    ('--score=char/best.pt', 'best.pt text'),
    ('--score=bad.txt --session=a', 'score session'),
    ('--interactive=True --num_samples=2', 'interactive=True num_samples=2'),
    ('--session=a --start=LINES:bad.txt', 'session=a start=LINES:bad.txt'),
    ('--session=../a', 'session=../a name'),
    ('--session=a/b', 'session=a/b name'),
    ('--session=.a', 'session=.a name'),
    ('--fork=a', 'fork=a --session'),
    ('--session=b --fork=none', 'none.pt no such session'),
    ('--session=b --fork=../b', 'fork=../b name'),
    ('--session=whole --fork=whole', 'session=whole already'),
    ('--session=broken', 'broken.pt not a readable session'),
    ('--session=folder', 'folder.pt cannot be read'),
    ('--session=' + '語' * 99, 'cannot be written name'),
    ('--session=model', 'model.pt not a readable session'),
    ('--session=foreign', 'foreign.pt another model'),
    ('--chat=True', 'chat interactive'),
    ('--chat=True --interactive=True --start=x', 'chat <|im_start|>'),
    ('--quantize=int5', 'quantize=int5'),
    ('--adapters=nowhere', 'nowhere no such checkpoint'),
    ('--adapters=char:much', 'adapters much weight'),
    ('--adapters=char', 'char whole model'),
])
def test_what_cannot_be_done_is_one_line(capsys, monkeypatch, flags, words):
    write_lines('blank.txt', ['', ' ', ''])
    write_lines('bad.txt', ['e', 'e~'])
    write_lines('empty.txt', [])
    if not os.path.exists('char/sessions/whole.pt'):
        for kind in KINDS:
            assert script('sample.py', f'--out_dir={kind} --device=cpu --max_new_tokens=1 --start=e --session=whole') == 0
        for name in ('broken', 'whole'):
            shutil.copy('char/sessions/whole.pt', f'char/sessions/{name}.pt') if name != 'whole' else None
        cut('char/sessions/broken.pt')
        os.makedirs('char/sessions/folder.pt')
        shutil.copy('char/best.pt', 'char/sessions/model.pt')
        shutil.copy('bpe/sessions/whole.pt', 'char/sessions/foreign.pt')
    monkeypatch.setattr('sys.stdin', io.StringIO('e\n'))
    before = sorted(os.listdir('char/sessions'))
    capsys.readouterr()
    assert script('sample.py', '--out_dir=char --device=cpu --max_new_tokens=5', flags) == 2
    refused(capsys, *words.split())
    assert sorted(os.listdir('char/sessions')) == before
