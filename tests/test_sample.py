"""sample.py: the next token, whole characters, where a text stops, and what is refused."""
import os
import re
import shutil

import pytest
import torch

import checkpoint
import tokenizer
from model_gpt import GPT, GPTConfig
from sample import Writer, encode_prompt, generate, pick
from test_train import cut, refused, script, write_text

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
    ckpt = checkpoint.load(kind)
    return checkpoint.model_of(ckpt), checkpoint.tokenizer_of(ckpt)


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
    ids = pick(torch.tensor(logits).log().expand(n, -1), generator=torch.Generator().manual_seed(0), **how)
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


def test_filters_work_row_by_row():
    logits = torch.tensor([[9., 8, -9, -9], [-9, -9, 8, 9]])
    for how in (dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1)):
        rows = torch.stack([pick(logits, **how) for _ in range(50)])
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
def test_gpt_goes_on_beyond_block_size_with_a_constant_state(length):
    net, tok = open_run('char')
    assert net.config.window == 0 and net.config.block_size == 32
    sizes, step = [], net.step
    net.step = lambda *args: (out := step(*args), sizes.append(sum(t.numel() for t in out[1].values())))[0]
    ids = list(generate(net, [1] * length, 2, 90, tok.vocab_size))
    assert len(ids) == 90 and net.config.window == 0
    assert len(set(sizes[1:])) == 1  # the first is of one sequence, the others of two
    stopped = generate(net, [1], 1, 90, tok.vocab_size)
    next(stopped), stopped.close()
    assert net.config.window == 0


# --- whole characters, and where the text ends

def write(ids_or_text, stops=(), tok=None):
    """What a Writer shows for each id, and at the end; the pieces together must be its text."""
    tok = tok or tokenizer.build('byte')
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
    tok = tokenizer.build('bpe', [text * 20 + ' ' + text], vocab_size=300)  # stops straddle its tokens, or begin inside one
    assert ''.join(write(text, stops, tok)) == expected


def test_part_of_a_stop_string_is_held_back_no_longer_than_needed():
    assert write('a<b<ef', ['<e', '<f']) == ['a', '', '<b', '', '', '', '']
    assert write('a<b', ['<e']) == ['a', '', '<b', '']


def test_end_of_text_stops():
    tok = tokenizer.build('byte')
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
    ('--num_samples=0', 'num_samples', None),
    ('--max_new_tokens=0', 'max_new_tokens', None),
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
