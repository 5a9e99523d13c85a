"""sample.py as its user starts it: samples, beams, logprobs, scores, other weights; what is refused."""
import io
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.models import perturb
from helpers.runs import POSIX, ROOT, cut, refused, script
from helpers.sampling import KINDS, open_run

from mambino import console, machine
from mambino.sample import score, terminal, text
from mambino.sample.generation import generate
from mambino.weights import adapters, checkpoint, loading

pytestmark = pytest.mark.usefixtures('runs')


def write_lines(name, lines):
    with open(name, 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines))


# --- samples --------------------------------------------------------------------------------------

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


def test_samples_of_a_batch(run, kind):
    rows = run(kind, '--num_samples=3').split('---------------\n')
    assert len(rows) == 3 and len(set(rows)) == 3
    assert all(row.startswith('e') and len(row) > 2 for row in rows)


def test_streamed_text_is_the_text(run, kind):
    for flags in ('', '--num_samples=2', '--stop=et', '--max_new_tokens=1'):
        assert run(kind, flags) == run(kind, flags + ' --stream=False')


def test_stop_in_the_script(run, kind):
    whole = run(kind, '--temperature=0')[1:-1]
    stop = whole[10:13]
    expected = whole[:whole.index(stop)]
    for flags in ('', ' --stream=False'):
        stops = f"'{stop}|never'".replace('\n', '\\n')
        assert run(kind, f'--temperature=0 --stop={stops}{flags}') == 'e' + expected + '\n'


def test_prompt_from_a_file(run):
    with open('prompt.txt', 'w', encoding='utf-8') as f:
        f.write('et\né')
    assert run('char', '--start=FILE:prompt.txt').startswith('et\né')


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'cp1252'])
def test_prompts_of_every_encoding(run, capsys, encoding):
    text = 'et tété é et e\net'
    results = []
    for name, data in ('plain', text.encode()), ('other', text.replace('\n', '\r\n').encode(encoding)):
        with open(f'{name}.txt', 'wb') as f:
            f.write(data)
        prompts = [run('char', f'--start={how}:{name}.txt --temperature=0') for how in ('FILE', 'LINES')]
        results.append([*prompts, run('char', f'--score={name}.txt --dtype=float32')])
    assert results[0] == results[1] and results[0][0].startswith(text)
    script('sample.py', '--out_dir=char --device=cpu --max_new_tokens=1 --start=FILE:other.txt')
    guessed = f'start=FILE:other.txt: encoding guessed: {encoding}, as in "et tété é et e'
    said = capsys.readouterr().err
    assert (guessed in said) == (encoding in ('utf-16-le', 'utf-16-be', 'cp1252'))


def test_prompts_from_lines(run, kind):
    lines = ['e', 'et et et e', '  e', 'tt' * 30, '<|endoftext|>e']
    write_lines('lines.txt', [*lines[:2], '', '\t', *lines[2:]])
    rule = '---------------\n'
    whole = [run(kind, f'--temperature=0 --start="{line}"') for line in lines]
    assert run(kind, '--temperature=0 --start=LINES:lines.txt') == rule.join(whole)
    drawn = run(kind, '--start=LINES:lines.txt --num_samples=2')
    assert drawn.count(rule) == 9 and len(set(drawn.split(rule))) == 10
    for size in (1, 3):
        flags = f'--start=LINES:lines.txt --num_samples=2 --batch_size={size} --stream=False'
        assert run(kind, flags) == drawn
    assert drawn.startswith(run(kind, '--start=e --num_samples=2'))


@pytest.mark.parametrize('flags', ['--help', '--start=e --num_samples=300 --max_new_tokens=60'])
def test_who_has_read_enough_ends_it_quietly(flags):
    """As `head` does, in a pipe."""
    program = [sys.executable, '-u', os.path.join(ROOT, 'sample.py'), '--out_dir=char', '--device=cpu']
    process = subprocess.Popen([*program, *flags.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 0


# --- beams, logprobs, a score ---------------------------------------------------------------------

def test_beams_in_the_script(run, kind):
    out = run(kind, '--beams=4 --num_samples=3 --max_new_tokens=12 --start="e e"')
    blocks = out.split('--------------- score ')[1:]
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
    out = run('bpe', '--score=score.txt --dtype=float32')
    ids = torch.tensor([tok.eot, *tok.encode(text)])
    # with all the text before, behind end-of-text; and in windows, each on its own, the first token given
    whole = net(ids[None, :-1], ids[None, 1:])[1].item()
    assert float(re.search(r'before each token: loss ([\d.]+)', out)[1]) == pytest.approx(whole, abs=1e-3)
    windows = zip(ids[1:-1].split(net.config.block_size), ids[2:].split(net.config.block_size))
    loss = sum(net(x[None], y[None])[1].item() * len(y) for x, y in windows) / (len(ids) - 2)
    pairs = re.findall(r'^(\S+) +([\d.,]+)', out, re.M)
    figure = {name: float(value.replace(',', '')) for name, value in pairs}
    assert figure['tokens'] == len(ids) - 1 and figure['loss'] == pytest.approx(loss, abs=1e-3)
    assert figure['perplexity'] == pytest.approx(math.exp(loss), rel=1e-2)
    bits = loss * (len(ids) - 2) / math.log(2)
    size = len(tok.decode(ids[2:].tolist()).encode())
    assert figure['bits/byte'] == pytest.approx(bits / size, abs=1e-3)
    worst = [float(line.split()[0]) for line in out.split('in nats:\n')[1].splitlines()]
    assert len(worst) == 10 and worst == sorted(worst, reverse=True) and worst[0] > loss
    monkeypatch.setattr('sys.stdin', open('score.txt', encoding='utf-8'))
    assert run('bpe', '--score=- --dtype=float32') == out
    assert 'loss' in run('char', '--score=score.txt')
    monkeypatch.setattr(score, 'logprobs_of', lambda logits, ids, n, vocab_size: [(-800.0, [])] * len(ids))
    # which no float can hold
    assert re.search('perplexity +inf', run('char', '--score=score.txt'))


# --- other weights --------------------------------------------------------------------------------

def test_smaller_weights_are_asked_for(run, monkeypatch):
    asked, whole = [], loading.quantize_model

    def counted(net, precision):
        asked.append(precision)
        return whole(net, precision)
    monkeypatch.setattr(loading, 'quantize_model', counted)
    for flags in ('', '--dtype=float32', '--dtype=bfloat16', '--quantize=int8',
                  '--quantize=int4 --dtype=bfloat16'):
        assert len(run('bpe', flags)) > 2
    assert asked == ['bfloat16', 'int8', 'int4']


def test_adapters_change_the_model_by_their_weight(run):
    net, _ = open_run('char')
    made_for = checkpoint.fingerprint(net.state_dict())
    adapters.add_lora(net, rank=4)
    perturb(torch.nn.ParameterList(p for p in net.parameters() if p.requires_grad), 0.3)
    ckpt = checkpoint.load_checkpoint('char')
    spec = dict(type='lora', rank=4, alpha=16.0, dropout=0.0, targets='', base='char',
                base_at=os.path.abspath('char'), base_fingerprint=made_for)
    os.makedirs('tuned', exist_ok=True)
    weights = adapters.adapter_state(net, 'default')
    settings = ckpt['settings'] | dict(adapter='lora')
    checkpoint.save_checkpoint('tuned/ckpt.pt', ckpt | dict(adapter=spec, weights=weights, settings=settings))
    plain, tuned = run('char'), run('char', '--adapters=tuned')
    assert tuned != plain == run('char', '--adapters=tuned:0')
    assert tuned == run('char', '--adapters=tuned:0.25,tuned:0.75') == run('tuned')


# --- what is refused, in one line -----------------------------------------------------------------

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


@POSIX
@pytest.mark.parametrize('flags', ['--score=/dev/zero', '--start=FILE:/dev/zero', '--start=LINES:/dev/random'])
def test_what_has_no_end_is_not_read(capsys, flags):
    assert script('sample.py', '--out_dir=char --device=cpu', flags) == 2
    refused(capsys, '/dev/', 'device')


def test_what_is_too_large_is_not_read(capsys, monkeypatch):
    monkeypatch.setattr(text, 'MOST_BYTES', 100)
    for flags in ('--score=text.txt', '--start=FILE:text.txt'):
        assert script('sample.py', '--out_dir=char --device=cpu', flags) == 2
        refused(capsys, 'text.txt', 'has more than')


def test_more_rows_than_memory_has_room_for(run, capsys, monkeypatch):
    want = run('char', '--num_samples=70 --max_new_tokens=2')
    for free, calls in ((1, 70), (10**12, 70)):
        monkeypatch.setattr(machine, 'available_memory', lambda device, free=free: free)
        monkeypatch.setattr(terminal, 'available_memory', machine.available_memory)
        assert script('sample.py', '--out_dir=char --device=cpu --start=e --max_new_tokens=2',
                      f'--num_samples={calls} --batch_size=2000000000') == 0
        said = capsys.readouterr()
        assert said.out.endswith(want) and ('1 at once' in said.err) == (free == 1)


def test_a_score_shows_its_progress(run, capsys, monkeypatch):
    want = run('char', '--score=text.txt')
    monkeypatch.setattr(console.Stream, 'isatty', lambda stream: True)
    assert script('sample.py', '--out_dir=char --device=cpu --score=text.txt') == 0
    said = capsys.readouterr()
    assert said.out.endswith(want)
    for reading in ('in windows', 'with all the text before'):
        assert re.search(rf'{reading}: [\d,]+ of [\d,]+ tokens, [\d,]+ tokens/s, 0 s left', said.err)


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
    ('--session=' + '語' * 99, 'at most 100 or 200 bytes'),
    ('--session=model', 'model.pt not a readable session'),
    ('--session=foreign', 'foreign.pt another model'),
    ('--chat=True', 'chat interactive'),
    ('--chat=True --interactive=True --start=x', 'chat <|im_start|>'),
    ('--num_samples=2147483648', 'num_samples=2147483648 from'),
    ('--batch_size=1e10', 'batch_size from'),
    ('--beams=2147483648', 'beams from'),
    ('--beams=2000000000 --num_samples=1 --start="e et"', 'beams=2000000000 memory at most'),
    ('--max_new_tokens=1e30', 'max_new_tokens from'),
    ('--logprobs=1001', 'logprobs from 0 to'),
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
            assert script('sample.py', f'--out_dir={kind} --device=cpu --max_new_tokens=1 --start=e',
                          '--session=whole') == 0
        shutil.copy('char/sessions/whole.pt', 'char/sessions/broken.pt')
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
