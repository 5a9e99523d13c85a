"""Models that fill holes: the bound, the blocks, the samplers, against what can be counted."""
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import GPT_SIZE, HYBRID_SIZE, SSM_SIZE, assert_close, perturb
from helpers.runs import TINY, script, write_text

from mambino.blocks import Blocks
from mambino.holes import DRAWS, draws, for_evaluation, hidden, learnable
from mambino.language_model import linear_cross_entropy
from mambino.sample.uncover import Filler, draw_each, grid, uncover
from mambino.train import batches
from mambino.train.evaluation import evaluate, with_losses
from mambino.train.objective import hiding, spread
from mambino.weights import checkpoint, loading

V, T = 12, 16                   # the last id stands for what is hidden
MODELS = {
    'gpt': ('gpt', GPT_SIZE),
    'gpt-window': ('gpt', dict(GPT_SIZE, n_kv_head=2, qk_norm=True, window=6)),
    'gpt-experts': ('gpt', dict(GPT_SIZE, n_expert=4, intermediate_size=16)),
    'mamba1': ('mamba', dict(SSM_SIZE, version=1)),
    'mamba2': ('mamba', dict(SSM_SIZE, head_dim=16)),
    'mamba2-apart': ('mamba', dict(SSM_SIZE, head_dim=16, share_projections=False)),
    'mamba3': ('mamba', dict(SSM_SIZE, version=3, head_dim=16, intermediate_size=48)),
    'hybrid': ('hybrid', dict(HYBRID_SIZE, window=6)),
    'hybrid-delta': ('hybrid', dict(HYBRID_SIZE, layers='da', window=0, low_rank=8)),
}
every_model = pytest.mark.parametrize('name', MODELS)


def build(name, **changes):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    net = checkpoint.build(kind, settings | dict(vocab_size=V, block_size=T) | changes)
    return perturb(net, 0.2).eval()


def text(rows=2, length=T):
    return torch.randint(V - 1, (rows, length), generator=torch.Generator().manual_seed(3))


def read(path):
    with open(path, encoding='utf-8') as f:
        return f.read()


def batch(rows=2):
    """x, y of which all is learned."""
    ids = text(rows, T + 1)
    return ids[:, :-1], ids[:, 1:]


# --- the network

@every_model
@pytest.mark.parametrize('K', [1, 4])
def test_a_block_in_training_is_what_it_is_when_it_is_generated(name, K):
    """After the state that steps over the clean blocks before it have made."""
    if name == 'mamba1' and K == 1:
        return                                                  # slow, and nothing that K = 4 does not show
    net = build(name, objective='block', block_length=K)
    clean = text()
    noisy = clean.masked_fill(torch.rand(clean.shape) < 0.5, V - 1)
    want = net(torch.cat((clean, noisy)))[0]
    state, got = None, []
    for ids, holes in zip(clean.split(K, 1), noisy.split(K, 1)):
        copy = state and {name: value.clone() for name, value in state.items()}
        got.append(net.step(holes, copy)[0])
        _, state = net.step(ids, state)
    assert want.std() > 0.3
    assert_close(torch.cat(got, 1), want, 1e-4)


@every_model
def test_who_sees_whom(name):
    """A window sees all of itself, or of a window of attention its neighbours; a block what is before it, clean,
    and itself; nothing another row."""
    def changed_by(net, place, rows):
        x = text(2 * rows)
        other = x.clone()
        other[:, place] = (other[:, place] + 1) % (V - 1)
        mixed = torch.cat((x[:1], other[1:]))
        a, b = (net(ids)[0] for ids in (x, mixed))
        assert torch.equal(a[:1], b[:1])                        # of another row nothing
        return ((a[1] - b[1]).abs().amax(-1) > 1e-7).tolist()
    reaches = 6 if name == 'gpt-window' else T                  # 2 layers
    seen = changed_by(build(name, objective='masked'), 8, 1)
    assert seen == [abs(i - 8) <= 2 * (reaches - 1) for i in range(T)]
    if 'experts' in name:
        return
    net = build(name, objective='block', block_length=4)
    x = text(2)
    for place in range(T):
        clean = x.clone()
        clean[:, place] = (clean[:, place] + 1) % (V - 1)
        a, b = (net(torch.cat((ids, x)))[0] for ids in (x, clean))
        changed = ((a - b).abs().amax((0, 2)) > 1e-7).tolist()
        assert not any(changed[:place // 4 * 4 + 4]), place     # own block, and those before: not by the clean text
        assert any(changed[place // 4 * 4 + 4:]) or place >= T - 4


def test_backwards_twice_is_forwards():
    blocks = Blocks(torch.zeros(2, T, dtype=torch.long), 4)
    u = torch.randn(2, T, 3)
    assert torch.equal(blocks.joined(blocks.cut(u)), u)
    assert torch.equal(blocks.back(lambda v: v, u), u)
    sums = blocks.back(lambda v: v.cumsum(1), u)                # of each block from its end
    assert_close(sums, u.view(2, 4, 4, 3).flip(2).cumsum(2).flip(2).view(2, T, 3), 1e-6)


def test_one_more_direction_starts_from_the_same_numbers():
    """A causal model's weights have the same names in one that fills holes."""
    for name in ('gpt', 'mamba2', 'hybrid'):
        names = [set(build(name, **changes).state_dict()) for changes in (
            {}, dict(objective='masked'), dict(objective='masked', share_projections=False))
            if name != 'gpt' or 'share_projections' not in changes]
        assert all(names[0] <= more for more in names[1:])


@pytest.mark.parametrize('changes, words', [
    (dict(objective='mask'), "objective='mask'"), (dict(objective='block'), 'block_length=0'),
    (dict(block_length=4), 'block_length=4'), (dict(objective='block', block_length=5), 'multiple of block_length=5')])
def test_what_cannot_be(changes, words):
    for name in ('gpt', 'mamba2', 'hybrid'):
        with pytest.raises(ValueError, match=words):
            build(name, **changes)


# --- the bound

def bound(net, x, y, us, noise, K=0):
    """Nats of the batch, by these draws."""
    with torch.no_grad():
        return net(*hidden(x, y, us, noise, V - 1, K))[1].item()


def every_draw(n):
    """All orders of n tokens behind the first, as noise."""
    for order in itertools.permutations(range(n)):
        yield torch.tensor([[0.0, *(rank / n for rank in order)]])


def test_the_bound_by_draws_is_that_of_all_draws():
    """Two tokens behind a given one: enumerated, once over k and what is hidden, once as the papers have it, each
    token hidden with probability t and 1/t."""
    net = build('gpt', objective='masked', block_size=3)
    ids = text(1, 4)
    x, y = ids[:, :3], ids[:, 1:]
    exact = np.mean([bound(net, x, y, torch.tensor([(k - 0.5) / 2]), noise)
                     for k in (1, 2) for noise in every_draw(2)])

    def nats(holes):
        with torch.no_grad():
            logits = net(x.masked_fill(torch.tensor([[False, *holes]]), V - 1))[0]
        losses = F.cross_entropy(logits[0], x[0], reduction='none')
        return sum(losses[i + 1].item() for i, hole in enumerate(holes) if hole)
    # the integral over t of t^(h - 1) (1 - t)^(2 - h): 1/2 of one hole, 1/2 of two
    papers = 0.5 * (nats((True, False)) + nats((False, True))) + 0.5 * nats((True, True))
    assert exact == pytest.approx(papers, abs=1e-5)

    rng = np.random.default_rng(0)
    n = 4000
    drawn = bound(net, x.expand(n, 3), y.expand(n, 3), torch.tensor(rng.random(n)).float(),
                  torch.tensor(rng.random((n, 3))).float()) / n
    assert drawn == pytest.approx(exact, abs=0.05)
    # and the mean over both orders of finding one token after the other: so it is a bound
    def one_by_one(first, second):
        both, one = x.clone(), x.clone()
        both[:, 1:], one[:, second] = V - 1, V - 1
        return sum(-net(z)[0][0, i].log_softmax(-1)[x[0, i]].item() for z, i in ((both, first), (one, second)))
    assert exact == pytest.approx((one_by_one(1, 2) + one_by_one(2, 1)) / 2, abs=1e-5)


@pytest.mark.parametrize('K', [0, 1, 4])
def test_a_network_that_knows_nothing_pays_for_each_token(K):
    net = build('gpt', objective='block' if K else 'masked', block_length=K)
    torch.nn.init.zeros_(net.lm_head.weight)
    x, y = batch(4)
    for idx, targets, factors in for_evaluation(hiding(net.config), x, y, 1):
        nats = net(idx, targets, factors)[1].item()
        assert nats == pytest.approx(4 * (T - 1) * math.log(V), rel=1e-6)


@every_model
def test_blocks_of_one_token_are_read_from_left_to_right(name):
    """Each predicted from what is before it, as the next token is."""
    net = build(name, objective='block', block_length=1)
    x, y = batch()
    with torch.no_grad():
        want, state = 0.0, None
        for i in range(T):
            copy = state and {name: value.clone() for name, value in state.items()}
            logits = net.step(torch.full((2, 1), V - 1), copy)[0]
            want += F.cross_entropy(logits[:, 0], x[:, i], reduction='sum').item() * (i > 0)
            _, state = net.step(x[:, i:i + 1], state)
    got = bound(net, x, y, torch.rand(2), torch.rand(2, T), K=1)
    assert got == pytest.approx(want, rel=1e-5)


def test_how_many_are_hidden():
    """k from 1 to L alike, over the sequences of a step evenly; never the first, nor what is not learned."""
    x, y = batch(60)
    y[:, 5:9] = -1
    may = learnable(y)
    assert may[0].tolist() == [False] + [True] * 5 + [False] * 4 + [True] * 6
    L = 11
    idx, targets, factors = hidden(x, y, spread(1, 600, range(600, 660), 60), draws(1, range(60), T), V - 1)
    holes = idx == V - 1
    k = holes.sum(1)
    assert not (holes & ~may).any() and torch.equal(targets >= 0, holes)
    assert torch.equal(targets[holes], x[holes]) and torch.equal(idx[~holes], x[~holes])
    assert all(5 <= n <= 6 for n in k.bincount(minlength=L + 1)[1:])        # 60 / 11
    assert_close(factors[:, 0], L / k, 1e-6)
    clipped = hidden(x, y, spread(1, 600, range(600, 660), 60), draws(1, range(60), T), V - 1, max_weight=3.0)[2]
    assert torch.equal(clipped, factors.clamp(max=3.0))
    # a sequence's holes are its own, whatever is beside it
    assert torch.equal(draws(1, [17, 18], T), draws(1, range(60), T)[17:19])


def test_an_evaluation_is_the_same_whatever_is_computed_at_once():
    net = build('mamba2', objective='masked')
    x, y = batch(6)
    hide = hiding(net.config)

    def nats(rows):
        return [net(*piece)[1].item() for piece in for_evaluation(hide, x[rows], y[rows], 1)]
    with torch.no_grad():
        together, first, rest = nats(slice(6)), nats(slice(2)), nats(slice(2, 6))
    assert len(together) == DRAWS and np.std(together) > 0
    assert together == pytest.approx([a + b for a, b in zip(first, rest)], rel=1e-5)
    nats, variance = with_losses(0.0, 0.0, [(torch.tensor([1.0, 2.0, 1.0, 2.0]), 10)])
    assert nats == 15 and variance == pytest.approx(100 * (1 / 3) / 4)


def test_factors_weigh_losses_and_gradients():
    x = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    targets, factors = torch.randint(-1, 30, (2, 5)), torch.rand(2, 5)
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy.definition):
        loss = function(x, weight, targets, factors)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    losses = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.clamp(min=0).flatten(), reduction='none')
    assert_close(results[0][0], (losses * factors.flatten())[targets.flatten() >= 0].sum(), 1e-5)
    for got, want in zip(*results):
        assert_close(got, want, 1e-5)


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
    for name, prompt, given in (('masked', 'the [...6...]en', ('the ', 'en')), ('block', 'the [...6...]', ('the ', ''))):
        flags = f'--out_dir={name} --device=cpu --num_samples=2'
        assert script('sample.py', flags, f'--start="{prompt}"') == 0
        texts = capsys.readouterr().out.split('---------------\n')
        texts[0] = texts[0].rpartition("'\n")[2]             # behind the settings
        assert len(texts) == 2
        for text in texts:
            assert text.startswith(given[0]) and text.removesuffix('\n').endswith(given[-1])
            assert len(text) == len(prompt.replace('[...6...]', '......')) + 1
    for sampler in ('ancestral', 'confidence', 'threshold', 'remask'):
        assert script('sample.py', '--out_dir=masked --device=cpu --max_new_tokens=40 --steps=8 --start=the',
                      f'--sampler={sampler}') == 0
        assert len(capsys.readouterr().out) > 20
    with open('holes.txt', 'w') as f:
        f.write('a[...3...]e')
    assert script('sample.py', '--out_dir=masked --device=cpu --start=FILE:holes.txt') == 0


@pytest.mark.parametrize('command, words', [
    ('sample.py --out_dir=next --start=a[...5...]b', 'learned to go on alone'),
    ('sample.py --out_dir=masked --beams=2 --stream=False', 'beams: the model in masked fills holes'),
    ('sample.py --out_dir=masked --session=x', 'session: the model in masked'),
    ('sample.py --out_dir=masked --score=text.txt --html=a.html', 'html: the model in masked'),
    ('sample.py --out_dir=masked --start=a[...0...]b', 'a hole is of 1 to'),
    ('sample.py --out_dir=masked --max_new_tokens=0', 'max_new_tokens=0'),
    ('sample.py --out_dir=masked --sampler=best', 'sampler=best must be one of'),
    ('train.py --dataset=tiny --objective=mask --out_dir=new', 'objective=mask must be one of'),
    ('train.py --dataset=tiny --objective=block --block_length=7 --out_dir=new', 'multiple of block_length=7'),
    ('train.py --dataset=tiny --block_length=4 --out_dir=new', 'block_length=4'),
    ('train.py --init_from=next --objective=masked --out_dir=new', 'objective=next, not masked'),
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


def test_a_text_is_scored_as_it_is_evaluated(there, capsys):
    """A dataset that is this text alone has the same bound."""
    ckpt = checkpoint.load_checkpoint('block')
    ids = checkpoint.tokenizer_of(ckpt).encode(read('text.txt')).astype(np.int32)
    os.makedirs('data/own', exist_ok=True)
    for split in ('train', 'val'):
        ids.tofile(f'data/own/{split}.bin')
    assert script('sample.py', '--out_dir=block --device=cpu --score=text.txt') == 0
    said = capsys.readouterr().out
    data = batches.open_dataset('own', vocab_size=int(ids.max()) + 1)
    want = evaluate(loading.model_of(ckpt), data, 16, 0, 'cpu', 'float32')
    assert f'loss        <= {want["val_loss"]:.4f} +- 0.' in said
    assert f'perplexity  <= {want["perplexity"]:,.2f}' in said


def test_they_are_tuned_rounded_and_kept(there, capsys):
    assert script('train.py', TINY, '--init_from=block --adapter=lora --dataset=tiny --out_dir=lora --max_iters=2') == 0
    assert script('sample.py', '--out_dir=lora --device=cpu --max_new_tokens=9') == 0
    assert script('sample.py', '--out_dir=masked --device=cpu --max_new_tokens=9 --quantize=int8') == 0
    assert script('export.py', '--out_dir=block --format=native --to=kept') == 0
    assert script('sample.py', '--out_dir=kept --device=cpu --max_new_tokens=9') == 0


def test_the_server_says_what_it_does_not_do(there):
    pytest.importorskip('fastapi')
    from mambino.serve.library import Library, NoModel
    from mambino.serve.work import Room
    library = Library('.', 'masked', 'cpu', 'float32', '', '', 0.0, Room(rows=2))
    library.says = list
    try:
        with pytest.raises(NoModel, match='fills holes'):
            library.get()
    finally:
        library.close()
