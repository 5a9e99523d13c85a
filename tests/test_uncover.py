"""Samplers of models that fill holes, and the scripts with such models."""
import itertools
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.holes import T, V, build, text
from helpers.models import assert_close
from helpers.runs import TINY, load, refused, script, write_text

from mambino import tokenizer
from mambino.sample.filled import going_on
from mambino.sample.generation import cut_in_windows
from mambino.sample.text import Writer
from mambino.sample.uncover import Filler, draw_each, grid, uncover
from mambino.train import batches
from mambino.train.evaluation import evaluate
from mambino.weights import checkpoint, loading

# --- samplers

STEPS = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])       # a Markov chain
FIRST = torch.tensor([0.5, 0.2, 0.3])
LENGTH, HIDDEN = 5, 3
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))              # all that can be
CHANCES = FIRST[TEXTS[:, 0]] * STEPS[TEXTS[:, :-1], TEXTS[:, 1:]].prod(1)


def posterior(z):
    """The chain's own log-probabilities (LENGTH, 3) of each token, given what of z is not hidden."""
    fits = ((z == HIDDEN) | (TEXTS == z)).all(1) * CHANCES
    return torch.stack([torch.zeros(3).index_add(0, TEXTS[:, i], fits) for i in range(LENGTH)]).log()


def statistic(sampler, steps, n=700):
    """Chi-square of the pairs of neighbours in n texts, and its degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    holes = torch.ones(LENGTH, dtype=torch.bool)
    counts = torch.zeros(3, 3)
    for _ in range(n):
        *_, z = uncover(posterior, torch.zeros(LENGTH, dtype=torch.long), holes, sampler, steps,
                        lambda scores: draw_each(scores, generator=generator), generator, HIDDEN)
        counts[z[1], z[2]] += 1         # one pair a text: independent
    pairs = torch.zeros(9).index_add(0, TEXTS[:, 1] * 3 + TEXTS[:, 2], CHANCES) * n
    return ((counts.flatten() - pairs) ** 2 / pairs).sum().item()


def test_samplers_with_a_perfect_network():
    """One by one they draw the chain; several at once do not know of each other."""
    surely, never = 26.1, 60.0          # of 8 degrees of freedom: above the first once in a thousand
    assert statistic('first', 0) < surely
    assert statistic('ancestral', 60) < surely
    assert statistic('remask', 60) < surely                     # what it takes back it draws again
    assert statistic('first', 2) > never
    assert statistic('ancestral', 2) > never
    assert statistic('confidence', 0) > never                   # not the distribution, and called so


def test_a_grid_falls_from_one_to_zero():
    times = grid(8)
    assert times[0] == 1 and times[-1] == 0 and all(a > b for a, b in zip(times, times[1:]))


@pytest.mark.parametrize('sampler', ['ancestral', 'first', 'confidence', 'threshold', 'remask'])
@pytest.mark.parametrize('name', ['mamba2', 'hybrid'])
def test_texts_are_filled(name, sampler):
    """What is given stays, the id of what is hidden is never drawn, the same seed fills the same."""
    class Tok:
        vocab_size = V - 1
        eot = 0
    for K, length in ((0, 10), (0, 3 * T), (4, 10), (4, 2 * T)):
        net = build(name, objective='block' if K else 'masked', block_length=K)
        filler = Filler(net, Tok, 'cpu', sampler, steps=3, ends=False)
        given = text(1, length)[0].tolist()
        ids = [given[0]] + [V - 1 if i % 3 else i0 for i, i0 in enumerate(given[1:], 1)]
        texts = []
        for _ in range(2):
            pictures = list(filler.fill(ids, torch.Generator().manual_seed(5)))
            texts.append(pictures[-1])
            assert len(pictures) >= 1 and V - 1 not in pictures[-1] and len(pictures[-1]) == length
            assert all(b != Tok.eot for a, b in zip(ids, pictures[-1]) if a == V - 1)
            assert all(b == a or a == V - 1 for a, b in zip(ids, pictures[-1]))
        assert texts[0] == texts[1]


def test_others_may_have_a_turn_after_each_call():
    """Where a text is read, and where nothing came of a step, too; behind the last hole nothing is read."""
    class Tok:
        vocab_size = V - 1
        eot = 0
    net = build('mamba2', objective='block', block_length=4)
    calls = []
    step = net.step
    net.step = lambda *arguments, **more: calls.append(1) or step(*arguments, **more)
    ids = text(1, 40)[0].tolist() + [V - 1, V - 1] + text(1, 22)[0].tolist()
    assert len(list(Filler(net, Tok, 'cpu').fill(ids, torch.Generator()))) == len(calls) == 10 + 2
    pictures = list(Filler(net, Tok, 'cpu', 'ancestral', steps=50).fill(ids, torch.Generator().manual_seed(1)))
    assert len(pictures) > 10 + 2


def test_a_window_is_filled_from_left_to_right_in_blocks():
    """Of so many tokens each, each in so many steps; what is behind is hidden, and stays so."""
    class Tok:
        vocab_size, eot = V - 1, 0

    net, given = build('gpt', objective='masked'), [1, 2]
    filler = Filler(net, Tok, 'cpu', steps=2, ends=False, block=5)
    holes = [[place for place, i in enumerate(ids) if i == V - 1]
             for ids in filler.fill(given + [V - 1] * 12, torch.Generator().manual_seed(0))]
    firsts = [own[0] for own in holes if own]
    assert len(holes) == 6 and [len(own) for own in holes] == [9, 7, 4, 2, 1, 0]
    assert firsts == sorted(firsts) and holes[1] == [*range(7, 14)] and holes[3] == [12, 13]


@torch.no_grad()
@pytest.mark.parametrize('name, changes', [('gpt', {}), ('hybrid', dict(window=0, layers='a'))])
def test_blocks_see_no_further_than_in_training(name, changes):
    """Beyond block_size a block sees the last T tokens: caches grow no more, and a text that is cut has the same
    scores, of one layer, which sees no further by those before it."""
    class Tok:
        vocab_size, eot = V - 1, 0

    net = build(name, objective='block', block_length=4, n_layer=1, **changes)
    given = text(1, 5 * T)[0].tolist()
    slots, scores = [], []
    step = net.step

    def hooked(idx, state=None, **more):
        logits, state = step(idx, state, **more)
        slots.append(state['k.0'].shape[2])
        scores.append(logits.clone())
        return logits, state
    net.step = hooked
    found = []
    for ids in (given, given[-T:]):
        *_, filled = Filler(net, Tok, 'cpu', ends=False).fill(ids + 4 * [V - 1], torch.Generator().manual_seed(0))
        found.append((filled[-4:], scores[-1]))
        assert slots[-1] == T
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1], 1e-5)


def test_a_text_that_goes_on_is_read_once(monkeypatch):
    """Of each picture only what is new; where something was hidden again, anew. It ends where the text does."""
    tok = tokenizer.build_tokenizer('byte')
    fed = []
    feed = Writer.feed
    monkeypatch.setattr(Writer, 'feed', lambda writer, i: fed.append(i) or feed(writer, i))
    hole, text = 257, list(b'to be or not to be')

    def pictures(*sizes):
        filler = SimpleNamespace(mask_id=hole, fill=lambda ids, _: (
            text[:n] + (len(text) - n) * [hole] for n in sizes))
        ids = text[:2] + (len(text) - 2) * [hole]
        return len(list(going_on(filler, tok, ids, None, ['or']))), ids
    assert pictures(2, 3, 3, 5, 7)[0] == 5 and fed == text[2:7]
    fed.clear()
    assert pictures(5, 3, 6, 8, 9)[0] == 4 and fed == text[2:5] + text[2:8]


def test_draws_are_those_of_the_filters():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)
    ids, own = draw_each(scores, temperature=0.5, top_k=3, generator=generator)
    want = torch.tensor([4.0, 2.0, 0.0]).softmax(-1)
    assert_close(ids.bincount(minlength=4) / 20000, torch.cat((want, torch.zeros(1))), 0.02)
    assert_close(own, scores.double().softmax(-1).gather(1, ids[:, None])[:, 0], 1e-12)
    assert draw_each(scores, temperature=0)[0].eq(0).all()
    assert set(draw_each(scores, top_p=0.6, generator=generator)[0].tolist()) == {0}


# --- the scripts

def read(path):
    with open(path, encoding='utf-8') as f:
        return f.read()

FLAGS = '--learning_rate=1e-2 --warmup_iters=2 --max_iters=20 --eval_interval=10 --optimizer=adamw'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """masked/, block/ and next/, trained on a text in data/tiny."""
    folder = tmp_path_factory.mktemp('runs')
    before = os.getcwd()
    os.chdir(folder)
    try:
        write_text('text.txt')
        assert script('prepare.py', 'text.txt --tokenizer=char --out=data/tiny') == 0
        for name, flags in (('masked', '--model=hybrid --objective=masked'),
                            ('block', '--model=mamba --objective=block --block_length=4'), ('next', '--model=mamba')):
            assert script('train.py', TINY, FLAGS, f'--dataset=tiny --out_dir={name}', flags) == 0
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture
def there(runs, monkeypatch):
    monkeypatch.chdir(runs)


def test_a_run_learns_and_says_that_its_loss_is_a_bound(there, capsys):
    for name in ('masked', 'block'):
        lines = [json.loads(line) for line in open(f'{name}/metrics.jsonl')]
        losses = {line['step']: line['val_loss'] for line in lines if 'val_loss' in line}
        assert losses[20] < losses[10] and all(0 < line['val_error'] < 0.2 for line in lines if 'val_loss' in line)
        capsys.readouterr()
        assert script('train.py', f'--eval_only --out_dir={name} --device=cpu --dtype=float32') == 0
        said = capsys.readouterr().out
        assert f'val_loss <= {min(losses.values()):.4f} +- 0.' in said and 'perplexity <= ' in said
        assert script('train.py', TINY, FLAGS, f'--out_dir={name} --max_iters=22') == 0     # it goes on
    assert script('train.py', TINY, FLAGS, '--out_dir=masked --max_iters=24 --objective=next') == 2
    assert 'objective=masked, not next' in capsys.readouterr().err


def test_holes_of_a_prompt_are_filled(there, capsys):
    cases = ('masked', 'the [...6...]en', ('the ', 'en')), ('block', 'the [...6...]', ('the ', ''))
    for name, prompt, given in cases:
        flags = f'--out_dir={name} --device=cpu --num_samples=2'
        assert script('sample.py', flags, f'--start="{prompt}"') == 0
        texts = capsys.readouterr().out.split('---------------\n')
        texts[0] = texts[0].rpartition("'\n")[2]             # behind the settings
        assert len(texts) == 2
        for whole in texts:
            assert whole.startswith(given[0]) and whole.removesuffix('\n').endswith(given[-1])
            assert len(whole) == len(prompt.replace('[...6...]', '......')) + 1
    for sampler in ('ancestral', 'confidence', 'threshold', 'remask'):
        steps = '' if sampler == 'threshold' else '--steps=8'
        assert script('sample.py', '--out_dir=masked --device=cpu --max_new_tokens=40 --start=the', steps,
                      f'--sampler={sampler}') == 0
        assert len(capsys.readouterr().out) > 20
    with open('holes.txt', 'w') as f:
        f.write('a[...3...]e')
    assert script('sample.py', '--out_dir=masked --device=cpu --start=FILE:holes.txt') == 0
    with open('both.txt', 'w') as f:
        f.write('a[...3...]e\nthe\n')
    assert script('sample.py', '--out_dir=masked --device=cpu --start=LINES:both.txt --max_new_tokens=3 --stop=e') == 0
    assert 'note: stop=e is for the prompts without holes alone' in capsys.readouterr().err
    assert script('sample.py', '--out_dir=masked --device=cpu --start=a --suffix=en --max_new_tokens=3') == 0
    assert re.search(r'\na.{3}en\n$', capsys.readouterr().out, re.S)


@pytest.mark.parametrize('prompt, noted', [
    ('a[...]e', '[...]'), ('a[...3]e', '[...3]'), ('a[..3..]e', '[..3..]'), ('a […3…] e', '[…3…]'),
    ('a[...3...]e', ''), ('a[3]e', ''), ('a...e', '')])
def test_what_may_be_meant_as_a_hole_is_said(there, capsys, prompt, noted, monkeypatch):
    monkeypatch.setattr('mambino.tokenizer.CharTokenizer.encode', lambda tok, text, *_: np.zeros(len(text), np.int64))
    assert script('sample.py', '--out_dir=masked --device=cpu --max_new_tokens=2', f'--start="{prompt}"') == 0
    error = capsys.readouterr().err
    assert (f'note: {noted} is text to this model' in error) == bool(noted) and error.count('note: ') == bool(noted)


@pytest.mark.parametrize('command, words', [
    ('sample.py --out_dir=next --start=a[...5...]b', 'learned to go on alone'),
    ('sample.py --out_dir=masked --beams=2 --stream=False', 'beams: the model in masked fills holes'),
    ('sample.py --out_dir=masked --session=x', 'session: the model in masked'),
    ('sample.py --out_dir=masked --score=text.txt --html=a.html', 'html: the model in masked'),
    ('sample.py --out_dir=masked --repetition_penalty=1.2', 'repetition_penalty: the model in masked'),
    ('sample.py --out_dir=next --steps=4', 'steps: the model in next goes on'),
    ('train.py --dataset=tiny --max_weight=5 --out_dir=new', 'max_weight means nothing'),
    ('sample.py --out_dir=masked --start=a[...0...]b', 'a hole is of 1 to'),
    ('sample.py --out_dir=masked --max_new_tokens=0', 'max_new_tokens=0'),
    ('sample.py --out_dir=masked --max_new_tokens=0 --suffix=x', 'a hole of max_new_tokens=0'),
    ('sample.py --out_dir=masked --start=a[...3...] --suffix=x', 'has its own: leave one of them out'),
    ('sample.py --out_dir=masked --sampler=threshold --steps=8', 'steps=8: threshold takes as many'),
    ('sample.py --out_dir=masked --start=a[...3...] --stop=e', 'stop=e: holes are filled to the last one'),
    ('sample.py --out_dir=masked --start=a --suffix=x --stop=e', 'stop=e: holes are filled to the last one'),
    ('sample.py --out_dir=next --suffix=x', 'suffix: the model in next goes on'),
    ('sample.py --out_dir=next --block=4', 'block: the model in next goes on'),
    ('sample.py --out_dir=block --block=8', 'has learned blocks of 4 tokens'),
    ('sample.py --out_dir=masked --sampler=best', 'sampler=best must be one of'),
    ('train.py --dataset=tiny --objective=mask --out_dir=new', 'objective=mask must be one of'),
    ('train.py --dataset=tiny --objective=block --block_length=7 --out_dir=new', 'multiple of block_length=7'),
    ('train.py --dataset=tiny --block_length=4 --out_dir=new', 'block_length=4'),
    ('train.py --init_from=masked --objective=next --out_dir=new', 'objective=masked, not next'),
    ('train.py --init_from=masked --objective=block --out_dir=new', 'objective=masked, not block'),
    ('train.py --init_from=next --objective=block --block_length=7 --out_dir=new', 'multiple of block_length=7'),
    ('train.py --init_from=next --objective=masked --block_length=4 --out_dir=new', 'is for --objective=block'),
    ('train.py --init_from=next --objective=masked --adapter=lora --out_dir=new', 'weights of its own'),
    ('train.py --init_from=next --objective=masked --share_projections=True --out_dir=new', 'leave it out'),
    ('train.py --init_from=block --carry_state=True --dataset=tiny --out_dir=new', 'not with objective=block'),
    ('train.py --init_from=next --max_weight=5 --dataset=tiny --out_dir=new', 'max_weight means nothing'),
    ('train.py --init_from=resume --max_weight=5 --out_dir=next', 'max_weight means nothing'),
    ('train.py --init_from=masked --adapter=prefix --dataset=tiny --out_dir=new', 'take --adapter=lora'),
    ('export.py --out_dir=masked --format=gguf', 'native or safetensors can hold it'),
    ('export.py --out_dir=block --format=native,onnx', 'format=onnx: the model in block fills holes'),
])
def test_what_they_do_not_do_is_said_in_a_line(there, capsys, command, words):
    name, *flags = command.split()
    more = TINY if name == 'train.py' else ''
    assert script(name, *flags, more) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1
    assert not os.path.exists('new/ckpt.pt')


def test_a_model_of_the_next_token_goes_on_with_holes(there, capsys):
    begin = '--init_from=next --objective=block --block_length=1 --dataset=tiny --device=cpu --dtype=float32'
    losses = []
    for flags in ('--init_from=next --eval_only', f'{begin} --eval_only'):
        assert script('train.py', flags, '--device=cpu --dtype=float32 --dataset=tiny') == 0
        said = capsys.readouterr().out
        losses.append(float(re.search(r'val_loss (?:<= )?([\d.]+)', said)[1]))
    assert losses[0] < losses[1] < losses[0] + 0.2              # that of the hidden token's id, and no more
    begin = begin.replace('length=1', 'length=4')
    for steps in (6, 12):                                       # … and the run itself goes on
        assert script('train.py', begin, f'--out_dir=from-next --max_iters={steps} --eval_interval=6') == 0
    assert 'learns to fill holes from here on' in capsys.readouterr().out
    lines = [json.loads(line) for line in open('from-next/metrics.jsonl')]
    of_step = {line['step']: line['val_loss'] for line in lines if 'val_loss' in line}
    assert of_step[12] < of_step[6]
    assert script('sample.py', '--out_dir=from-next --device=cpu --num_samples=1 --start="the [...6...]en"') == 0
    assert re.search(r'\nthe .{6}en\n$', capsys.readouterr().out, re.S)


def test_what_goes_on_learns_what_it_learned(there):
    """Its settings say so, as those of the model it began with do."""
    for steps in (1, 2):
        flags = f'--init_from=block --model=mamba --dataset=tiny --out_dir=tuned --max_iters={steps}'
        assert script('train.py', TINY, flags) == 0
        settings = load('tuned/ckpt.pt')['settings']
        assert (settings['objective'], settings['block_length']) == ('block', 4)


def test_the_id_of_a_hidden_token_is_none_of_the_text(there, capsys):
    os.makedirs('data/bare', exist_ok=True)
    for split in ('train', 'val'):
        np.arange(400, dtype=np.int32).__mod__(20).tofile(f'data/bare/{split}.bin')
    bare = '--dataset=bare --model=gpt --max_iters=1'
    assert script('train.py', TINY, bare, '--objective=masked --vocab_size=20 --out_dir=bare') == 0
    assert script('train.py', TINY, bare, '--init_from=bare --vocab_size=20 --out_dir=bare-tuned') == 0
    capsys.readouterr()
    assert script('train.py', TINY, bare, '--init_from=bare --vocab_size=21 --out_dir=bare-other') == 2
    refused(capsys, 'has a vocabulary of 21, bare one of 20')


def test_a_text_is_scored_as_it_is_evaluated(there, capsys):
    """A dataset that is this text alone has the same bound, of the same windows: the last one ends in holes."""
    ckpt = checkpoint.load_checkpoint('block')
    ids = checkpoint.tokenizer_of(ckpt).encode(read('text.txt')).astype(np.int32)
    os.makedirs('data/own', exist_ok=True)
    for split in ('train', 'val'):
        ids.tofile(f'data/own/{split}.bin')
    data = batches.open_dataset('own', vocab_size=int(ids.max()) + 1)
    assert (len(ids) - 1) % 16
    x, y = cut_in_windows(ids.tolist(), 1, 16, 99)
    for parts, whole in zip(zip(*data.val_batches(7, 16, mask_id=99)), (x, y)):
        assert torch.equal(torch.cat(parts), whole)
    assert x.flatten()[:len(ids)].tolist() == ids.tolist() and (x.flatten()[len(ids):] == 99).all()
    assert script('sample.py', '--out_dir=block --device=cpu --score=text.txt') == 0
    said = capsys.readouterr().out
    want = evaluate(loading.model_of(ckpt), data, 16, 0, 'cpu', 'float32')
    assert f'loss        <= {want["val_loss"]:.4f} +- 0.' in said
    assert f'perplexity  <= {want["perplexity"]:,.2f}' in said
    with open('one.txt', 'w') as f:
        f.write('a')
    assert script('sample.py', '--out_dir=block --device=cpu --score=one.txt') == 2
    refused(capsys, 'score=one.txt: is too short')


def test_they_are_tuned_rounded_and_kept(there, capsys):
    assert script('train.py', TINY, '--init_from=block --adapter=lora --dataset=tiny --out_dir=lora --max_iters=2') == 0
    assert script('sample.py', '--out_dir=lora --device=cpu --max_new_tokens=9') == 0
    assert script('sample.py', '--out_dir=masked --device=cpu --max_new_tokens=9 --quantize=int8') == 0
    assert script('export.py', '--out_dir=block --format=native --to=kept') == 0
    assert script('sample.py', '--out_dir=kept --device=cpu --max_new_tokens=9') == 0


@pytest.mark.parametrize('precision', ['', 'int8'])
def test_blocks_of_any_length_are_kept(there, capsys, precision):
    """Also where they are no part of the text by which the export is checked."""
    name = f'six{precision}'
    assert script('train.py', TINY, '--model=gpt --n_head=2 --objective=block --block_length=6 --block_size=24',
                  f'--tokens_per_step=96 --max_iters=1 --dataset=tiny --out_dir={name}') == 0
    assert script('export.py', f'--out_dir={name} --format=native --quantize={precision} --to={name}-kept') == 0
    assert 'FAILED' not in capsys.readouterr().out
