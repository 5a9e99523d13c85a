"""graphs.py: a token on a card is one launch, with the numbers of a CPU, whatever happens in between."""
import contextlib
import io
import random
import threading

import pytest
import torch
from helpers.card import pretended
from helpers.card_process import on_card
from helpers.jobs import Result, answer, scheduler_of, small_net
from helpers.models import build, every_model, perturb, tokens

from mambino.machine import autocast
from mambino.sample import decode, graphs
from mambino.sample.generation import Rows, beam_search, generate, prefill
from mambino.serve.work import Job
from mambino.weights.adapters import add_lora, add_prefix
from mambino.weights.loading import prepare_model
from model_mamba import Mamba2Mixer

torch.manual_seed(0)        # each test is in a process of its own, which begins here


def cloned(state):
    return {name: value.clone() for name, value in state.items()}


def walk(net, device, n, B=2, T=5, state=None, seed=0, step=decode.step):
    """Logits (n, B, V) of n tokens after a prompt of T, on the CPU, and the last state."""
    torch.manual_seed(seed)
    prompt, ids = tokens(B, T), tokens(n, B)
    if state is None:
        _, state = net.step(prompt.to(device))
    logits = []
    for i in ids:
        new, state = step(net, i[:, None].to(device), state)
        logits.append(new[:, 0].float().cpu())
    return torch.stack(logits), state


def plainly(net, n, **kwargs):
    """The same by net.step on the CPU."""
    return walk(net.to('cpu'), 'cpu', n, step=lambda net, idx, state: net.step(idx, state), **kwargs)


def made(net):
    """The graphs of a model."""
    return list(graphs.models[net].tokens.values())


@on_card
@every_model
def test_every_model(name):
    net = perturb(build(name))
    want, _ = plainly(net, 12)
    with pretended() as card:
        got, _ = walk(net.to('cuda'), 'cuda', 12)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert len(made(net)) == 1
        _, state = net.step(tokens(2, 5).to('cuda'))
        idx = tokens(2, 1).to('cuda')
        for _ in range(5):
            _, state = decode.step(net, idx, state)
        card.reset()
        decode.step(net, idx, state)
        assert card.launches <= 3 and card.waits == {}, (card.kernels, card.waits)


# --- states, and what becomes of them -------------------------------------------------------------

SOME = pytest.mark.parametrize('name', ['gpt', 'mamba2', 'hybrid'])


@on_card
@pytest.mark.parametrize('name, T, n, slots', [
    ('gpt', 55, 20, [64, 128]), ('gpt', 60, 80, [64, 128, 256]), ('hybrid', 15, 12, [20]),
    ('hybrid-plain-full', 60, 12, [64, 128])])
def test_caches_grow_and_rings_come_round(name, T, n, slots):
    net = perturb(build(name))
    want, _ = plainly(net, n, T=T)
    with pretended():
        got, state = walk(net.to('cuda'), 'cuda', n, T=T)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert {value.shape[2] for name, value in state.items() if name.startswith('k.')} == {slots[-1]}
        assert len(made(net)) == len(slots)


@on_card
def test_a_cache_that_has_grown_has_its_graph_soon():
    """Two tokens without one: the one that makes room, and one that loads what the new size needs."""
    net = perturb(build('gpt'))
    with pretended() as card:
        net.to('cuda')
        _, state = net.step(tokens(1, 60).to('cuda'))
        plain = []
        for n in range(12):
            card.reset()
            _, state = decode.step(net, tokens(1, 1), state)
            plain += [n] * (card.kernels['graph'] == 0)
        assert plain == [0, 1, 2, 4, 5], plain


@on_card
def test_beyond_block_size_a_window():
    net = perturb(build('gpt', block_size=24))
    ids = tokens(20).tolist()
    sampling = dict(num_samples=2, max_new_tokens=30, vocab_size=97, temperature=0)
    want = torch.stack(list(generate(net, ids, **sampling)))
    with pretended():
        got = torch.stack(list(generate(net.to('cuda'), ids, **sampling)))
        assert torch.equal(got, want) and len(made(net)) == 2


@on_card
@SOME
def test_two_texts_by_turns_and_a_copy_of_one(name):
    """A graph is of one state's memory; a copy goes on from where it was made."""
    net = perturb(build(name))
    wants = [plainly(net, 12, seed=seed)[0] for seed in (1, 2)]
    with pretended():
        net.to('cuda')
        states, ids = [], []
        for seed in (1, 2):
            torch.manual_seed(seed)
            prompt, text = tokens(2, 5), tokens(12, 2)
            states.append(net.step(prompt.to('cuda'))[1])
            ids.append(text)
        copy, kept = None, []
        for n in range(12):
            for k in (0, 1):
                if n == 7 and k == 0:
                    copy = cloned(states[0])
                logits, states[k] = decode.step(net, ids[k][n][:, None].to('cuda'), states[k])
                kept.append((logits, logits.cpu()))
                assert (logits[:, 0].cpu() - wants[k][n]).abs().max() < 1e-3, (n, k)
        for n in range(7, 12):
            logits, copy = decode.step(net, ids[0][n][:, None].to('cuda'), copy)
            assert (logits[:, 0].cpu() - wants[0][n]).abs().max() < 1e-3, n
        for logits, then in kept:       # what was given out stays as it was
            assert torch.equal(logits.cpu(), then)
        assert len(made(net)) == 3


@on_card
@SOME
def test_back_to_an_earlier_place_in_the_same_memory(name):
    """Positions are those of the state, not those of the token before."""
    net = perturb(build(name))
    want, _ = plainly(net, 12)
    with pretended():
        net.to('cuda')
        torch.manual_seed(0)
        prompt, ids = tokens(2, 5), tokens(12, 2)
        state = net.step(prompt.to('cuda'))[1]
        for n in range(12):
            if n == 6:
                early = cloned(state)
            logits, state = decode.step(net, ids[n][:, None].to('cuda'), state)
        for name, value in early.items():
            if name != 'pos':
                state[name].copy_(value)
        state = {**state, 'pos': early['pos']}
        for n in range(6, 12):
            logits, state = decode.step(net, ids[n][:, None].to('cuda'), state)
            assert (logits[:, 0].cpu() - want[n]).abs().max() < 1e-3, n
        assert len(made(net)) == 1


@on_card
def test_graphs_that_are_kept_are_few():
    net = perturb(build('mamba2'))
    with pretended():
        net.to('cuda')
        for seed in range(graphs.GRAPHS + 3):
            walk(net, 'cuda', graphs.WARM + 2, B=1 + seed)
        assert len(made(net)) == graphs.GRAPHS
        assert len(graphs.models[net].warm) <= 4 * graphs.GRAPHS


# --- models that are more than their weights ------------------------------------------------------

@on_card
@pytest.mark.parametrize('name', ['gpt', 'gpt-experts', 'mamba1', 'mamba2', 'hybrid-low-rank'])
@pytest.mark.parametrize('precision', ['', 'bfloat16', 'int8', 'int4'])
def test_prepared_models(name, precision):
    """In bf16 and with rounded weights: what net.step computes of the same model."""
    net = perturb(build(name))
    with pretended() as card:
        net, context = prepare_model(net, 'cuda', 'auto', precision)
        with context:
            eager, _ = walk(net, 'cuda', 12, step=lambda net, idx, state: net.step(idx, state))
            got, state = walk(net, 'cuda', 12)
            assert (got - eager).abs().max() < 0.02 * eager.abs().max() and len(made(net)) == 1
            card.reset()
            decode.step(net, tokens(2, 1).to('cuda'), state)
        assert card.kernels['graph'] == 1
        if not precision:               # nothing is rounded for a token
            calls = made(net)[0].graph.graph.capture.calls
            large = [u.shape for function, args, _, _ in calls if 'to_copy' in str(function)
                     for u in args[:1] if u.numel() > 1000]
            assert not large, large
            products = sum(str(function).startswith('aten.mm') for function, *_ in calls)
            assert products == {'gpt': 2 * 4 + 1, 'mamba2': 2 * 2 + 1}.get(name, products)  # q, k, v are one


@on_card
def test_weights_are_rounded_as_autocast_rounds_them():
    for name in ('gpt', 'gpt-qknorm-untied', 'gpt-experts', 'mamba2', 'hybrid'):
        net = perturb(build(name))
        with pretended() as card:
            ids = tokens(2, 9)
            net.to('cuda')
            before = card.alive_bytes
            with autocast('cuda', 'bfloat16'):
                want = net.step(ids.to('cuda'))[0].cpu()
            net, context = prepare_model(net.to('cpu'), 'cuda')
            with context:
                assert torch.equal(net.step(ids.to('cuda'))[0].cpu(), want)
            assert card.alive_bytes < 0.85 * before
            assert net.embedding().weight.dtype == torch.float32


@on_card
@pytest.mark.parametrize('name', ['gpt', 'mamba2'])
def test_adapters(name):
    net = perturb(build(name))
    add_prefix(net, 4, tokens(4))
    add_lora(net, rank=4)
    perturb(net)
    want, _ = plainly(net, 12)
    with pretended():
        net.to('cuda')
        got, state = walk(net, 'cuda', 12)
        assert (got - want).abs().max() < 1e-4 * want.abs().max() and len(made(net)) == 1
        # another one hangs there from now on
        add_lora(net, rank=2, name='other')
        perturb(net)
        idx = tokens(2, 1)
        want, _ = net.step(idx.to('cuda'), cloned(state))
        got, _ = decode.step(net, idx.to('cuda'), state)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@on_card
def test_what_hangs_on_a_module_is_called():
    net = perturb(build('gpt'))
    with pretended():
        net.to('cuda')
        _, state = walk(net, 'cuda', 6)
        seen = []
        net.model.norm.register_forward_hook(lambda module, args, out: seen.append(1))
        for n in range(6):
            _, state = decode.step(net, tokens(2, 1).to('cuda'), state)
            assert len(seen) == n + 1
        net.train()
        decode.step(net, tokens(2, 1).to('cuda'), state)


@on_card
def test_other_weights_are_seen():
    net = perturb(build('gpt'))
    with pretended():
        net.to('cuda')
        _, state = walk(net, 'cuda', 6)
        net.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(128, 32).to('cuda'))
        idx = tokens(2, 1).to('cuda')
        want, _ = net.step(idx, cloned(state))
        got, _ = decode.step(net, idx, state)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@on_card
@SOME
def test_an_empty_state_is_not_one_that_is_gone(name):
    net = perturb(build(name))
    with pretended():
        net.to('cuda')
        walk(net, 'cuda', 6, B=1)                               # a graph, whose state nobody has any more
        idx = tokens(1, 1).to('cuda')
        want, _ = net.step(idx)
        got, state = decode.step(net, idx, net.empty_state(1))
        assert torch.equal(got, want) and len(state) > 1


@on_card
def test_graphs_of_one_function_share_their_memory():
    """What a pool without graphs had is nobody's until the card is full: rows that come and go would fill it."""
    handles = []
    with pretended():
        handle = torch.cuda.graph_pool_handle
        torch.cuda.graph_pool_handle = lambda: handles.append(1) or handle()
        x, repeated, made = torch.ones(3).cuda(), graphs.Repeated(), []
        for key in range(3):
            for _ in range(graphs.WARM + 2):
                assert repeated(key, lambda u, key=key: x + u + key, torch.ones(3), x.device).tolist() == [2 + key] * 3
            made.append(repeated.graph)
        assert None not in made and len(set(made)) == 3 and len(handles) == 1
        assert repeated(None, lambda u: x + u, torch.ones(3), x.device).tolist() == [2] * 3
        assert repeated.graph is None and repeated.newest is made[-1]       # which the next one shares a pool with


@on_card
def test_what_cannot_be_recorded_is_said_once():
    """A driver or an operation that does not let itself be recorded: the same tokens, later."""
    net = perturb(build('mamba2'))
    want, _ = plainly(net, 12)
    said = io.StringIO()
    with pretended(), contextlib.redirect_stderr(said):
        net.to('cuda')
        step = Mamba2Mixer.forward
        Mamba2Mixer.forward = lambda self, x, cache=None: step(self, x * float(x.isfinite().all()), cache)
        got, _ = walk(net, 'cuda', 12)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert said.getvalue().count('note:') == said.getvalue().count('\n') == 1 and 'capturing' in said.getvalue()


# --- rows -----------------------------------------------------------------------------------------

def text_of(net, sampling, penalty, moves):
    """Ids of rows that come and go: after so many tokens keep those, or add as many."""
    torch.manual_seed(0)
    rows = Rows(net, 90, penalty)
    prompts = [prefill(net, tokens(n).tolist()) for n in (5, 9, 3)]
    rows.add(prompts)
    generators = [torch.Generator().manual_seed(n) for n in range(3)]
    drawn = []
    for n in range(24):
        ids = rows.draw(generator=generators, **sampling)
        drawn.append(ids.tolist())
        keep = moves.get(n)
        if isinstance(keep, list):
            rows.keep(keep)
            ids, generators = ids[keep], [generators[row] for row in keep]
        rows.advance(ids)
        if isinstance(keep, int):
            rows.add([prefill(net, tokens(keep).tolist())])
            generators = [*generators, torch.Generator().manual_seed(n)]
    return drawn


@on_card
@pytest.mark.parametrize('name', ['gpt', 'mamba1', 'hybrid-parallel'])
@pytest.mark.parametrize('sampling, penalty', [
    (dict(temperature=0), 1.0),
    (dict(temperature=0.8, top_k=7), 1.3),
    (dict(temperature=1.0, top_p=0.8, min_p=0.01), 1.0),
])
def test_rows_come_and_go(name, sampling, penalty):
    net = perturb(build(name))
    moves = {5: [0, 2], 10: 4, 16: [2, 0, 1]}
    want = text_of(net, sampling, penalty, moves)
    with pretended():
        net.to('cuda')
        assert text_of(net, sampling, penalty, moves) == want
        # rows that came back found their graph: for 2 and 3 rows there is one each, and of larger caches
        assert len(made(net)) == 2


@on_card
@pytest.mark.parametrize('name', ['gpt', 'mamba2', 'gpt-experts'])
@pytest.mark.parametrize('sampling', [dict(temperature=0), dict(temperature=0.8, top_k=20), dict(top_p=0.9)])
def test_a_token_is_five_launches_and_one_wait(name, sampling):
    net = perturb(build(name))
    with pretended() as card:
        rows = Rows(net.to('cuda'), 97)
        rows.add([prefill(net, [1, 2, 3])] * 4)
        generators = [torch.Generator().manual_seed(n) for n in range(4)]
        with autocast('cuda', 'bfloat16'):
            for _ in range(8):
                card.reset()
                rows.advance(rows.draw(generator=generators, **sampling))
        assert card.launches <= 5, card.kernels
        assert sum(card.waits.values()) == 1, card.waits


@on_card
@pytest.mark.parametrize('name', ['gpt', 'mamba2'])
def test_beams(name):
    """They change places in their memory, by one launch."""
    net = perturb(build(name))
    ids = torch.randint(90, (6,)).tolist()
    want = beam_search(net, ids, 3, 14, 90, lambda ids: ids[-1] == 7, repetition_penalty=1.1)
    with pretended() as card:
        rows, advance = [], Rows.advance
        Rows.advance = lambda self, ids: (advance(self, ids), rows.append(card.launches), card.reset())
        got = beam_search(net.to('cuda'), ids, 3, 14, 90, lambda ids: ids[-1] == 7, repetition_penalty=1.1)
        assert [ids for _, ids in got] == [ids for _, ids in want]
        assert rows[-1] < 25 and len(made(net)) == 1, rows


@on_card
def test_numbers_that_are_none_end_the_program_in_a_line():
    net = build('gpt')
    with pretended():
        rows = Rows(net.to('cuda'), 97)
        rows.add([prefill(net, [1, 2, 3])] * 2)
        for n in range(8):
            if n in (2, 7):
                rows.logits[1] = torch.nan
                with pytest.raises(SystemExit):
                    rows.draw(temperature=0.7, top_k=5)
                rows.logits[1] = 0.0
            rows.advance(rows.draw(temperature=0.7, top_k=5))


# --- a server -------------------------------------------------------------------------------------

def random_job(rnd, n):
    return Job([rnd.randrange(90) for _ in range(rnd.choice([1, 5, 17]))], rnd.choice([5, 12, 25]), seed=n,
               temperature=rnd.choice([0, 0.7, 1]), top_k=rnd.choice([0, 3, 40]), top_p=rnd.choice([1, 0.9]),
               repetition_penalty=rnd.choice([1, 1.2]), presence_penalty=rnd.choice([0, 0.8]),
               logprobs=rnd.choice([-1, 2]), owed=rnd.choice([b'', b'm']))


@on_card
@pytest.mark.parametrize('kind', ['gpt', 'mamba2'])
def test_a_server(kind):
    """The answers on a card are those of a CPU; a step of all rows is a few launches and one wait."""
    rnd = random.Random(0)
    jobs = [random_job(rnd, n) for n in range(8)]
    for job in jobs:
        job.max_tokens += 10
    plain = scheduler_of(kind, rows=3)
    want = [answer(plain, job).ids for job in jobs]
    plain.close()
    with pretended() as card:
        small_net(kind).to('cuda')
        scheduler = scheduler_of(kind, rows=3)
        results = [Result(scheduler, job) for job in jobs]
        assert [result.wait().ids for result in results] == want
        scheduler.close()
        chosen = []                                             # the card of the model's thread
        torch.cuda.set_device = lambda device: chosen.append((threading.current_thread().name, str(device)))
        scheduler = scheduler_of(kind, rows=3)
        counted, step = [], scheduler.step

        def counting():
            card.reset()
            step()
            counted.append((card.launches, sum(card.waits.values())))
        scheduler.step = counting
        answer(scheduler, Job([1, 2, 3], 30, temperature=0.7, top_k=9, ignore_eos=True))
        scheduler.close()
        assert chosen == [('model', 'cuda:0')]
        # the last ones: the answer's end is another wait
        assert set(counted[10:28]) == {(5, 1)}, counted
