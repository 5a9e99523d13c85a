"""generation.py: the next token, rows side by side, beams, losses; beyond a GPT's block_size."""
import pytest
import torch
from helpers.models import CONFIG, LLAMA, PEERS, SSM2, V, perturb, theirs
from helpers.sampling import PROMPTS, open_run

from mambino.sample import generation
from mambino.sample.generation import Rows, beam_search, generate, prefill, token_logits
from mambino.sample.next_token import fast_topk, logprobs_of, nucleus_candidates, sample_token
from mambino.weights.adapters import add_prefix
from model_gpt import GPT, GPTConfig


def token_nats(net, ids, before):
    """(T,) nats of ids after the ids `before`."""
    pieces = token_logits(net, ids, before)
    return torch.cat([torch.nn.functional.cross_entropy(*piece, reduction='none') for piece in pieces])


# --- the next token -------------------------------------------------------------------------------

def drawn(logits, n=2000, **sampling):
    """The share of each token among n draws."""
    logits = torch.tensor(logits).log().expand(n, -1)
    ids = sample_token(logits, generator=torch.Generator().manual_seed(0), **sampling)
    assert ids.shape == (n,) and ids.dtype == torch.int64
    return (torch.bincount(ids, minlength=logits.shape[1]) / n).tolist()


# probabilities 0.05, 0.5, 0.15, 0.3 and what the filters leave of them
@pytest.mark.parametrize('sampling, expected', [
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
    (dict(min_p=0.4, top_p=0.6), [0, 1, 0, 0]),     # 0.625 of what min-p left is enough, 0.5 is not
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),
])
def test_filters(sampling, expected):
    got = drawn([0.05, 0.5, 0.15, 0.3], **sampling)
    assert got == pytest.approx(expected, abs=0.05)
    assert [share > 0 for share in got] == [share > 0 for share in expected]


def test_a_large_vocabulary_is_not_sorted():
    """The same choice as with the whole of it in order."""
    for size in (33, 5000, 50_257):
        x = torch.randn(5, size)
        for k in (1, 7, 200):
            values, index = fast_topk(x, min(k, size))
            assert torch.equal(values, x.topk(min(k, size)).values)
            assert torch.equal(x.gather(1, index), values)
        for scale in (0.1, 9.0):                        # some hundred tokens are not, and are enough
            weights = (x * scale).softmax(-1)
            values, index = nucleus_candidates(weights, torch.full((5, 1), 0.9))
            order = weights.sort(descending=True)
            there = values > 0                          # a row that needs fewer has zeros behind them
            assert torch.equal(values[there], order.values[:, :values.shape[1]][there])
            assert (values.sum(-1) >= 0.9).all()
            assert torch.equal(weights.gather(1, index)[there], values[there])
            assert size < 5000 or scale == 0.1 or values.shape[1] < size
            got = {int(sample_token(x[:1] * scale, top_p=0.3)) for _ in range(40)}
            allowed = order.values[0].cumsum(-1) - order.values[0] < 0.3
            assert got <= set(order.indices[0][allowed].tolist())


def test_filters_work_row_by_row():
    logits = torch.tensor([[9., 8, -9, -9], [-9, -9, 8, 9]])
    for sampling in (dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1)):
        rows = torch.stack([sample_token(logits, **sampling) for _ in range(50)])
        assert set(rows[:, 0].tolist()) <= {0, 1} and set(rows[:, 1].tolist()) <= {2, 3}


@pytest.mark.parametrize('sampling', [
    dict(temperature=0), dict(temperature=2.0), dict(top_k=3), dict(top_p=0.9), dict(min_p=0.5)])
def test_padded_ids_are_never_drawn(sampling):
    net = GPT(GPTConfig(vocab_size=64, n_layer=1, n_embd=32, n_head=1, block_size=16,
                        tie_embeddings=False)).eval()
    seen = []

    def favour_padding(module, x, out):
        seen.append(out)
        return torch.cat((out[..., :50], out[..., 50:] + 99), -1)
    net.lm_head.register_forward_hook(favour_padding)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack(list(generate(net, [1], 20, 10, 50, generator=generator, **sampling)))
    assert seen, 'the logits were not edited'
    assert ids.shape == (10, 20) and ids.max() < 50


# --- rows side by side ----------------------------------------------------------------------------

def chances(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize('sampling', [
    dict(temperature=0), dict(temperature=1.0, top_k=20), dict(temperature=1.0, top_p=0.9)])
def test_a_row_is_what_it_is_alone(net, sampling):
    """Prompts of all lengths, before and beyond block_size; rows end at different times, and new ones
    take their places."""
    lengths = [9, 30, 3, 12, 20, 15]
    alone = [[int(i) for i in generate(net, prompt, 1, n, 50, 1.2, generator=[g], **sampling)]
             for prompt, n, g in zip(PROMPTS, lengths, chances(6))]
    rows = Rows(net, 50, 1.2)
    generators = chances(6)
    got = [[] for _ in PROMPTS]
    active = []
    waiting = list(range(6))
    while waiting or active:
        fresh, waiting = waiting[:3 - len(active)], waiting[3 - len(active):]
        if fresh:
            rows.add([prefill(net, PROMPTS[n]) for n in fresh])
        active += fresh
        ids = rows.draw(generator=[generators[n] for n in active], **sampling)
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
    got, _ = net.step(after, state)
    want = net(torch.cat((idx, after), 1))[0][:, -1:]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    prefill(net, list(range(50)))
    assert heads == [1, 1, 17] + [1] * (len(heads) - 3) and len(heads) > 3


# --- beyond the window a GPT was trained with -----------------------------------------------------

@pytest.mark.usefixtures('runs')
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


@torch.no_grad()
def test_beyond_block_size_a_token_sees_a_window_however_it_is_read():
    config = dict(vocab_size=60, n_layer=1, n_head=2, n_embd=32, block_size=16)
    net = perturb(GPT(GPTConfig(**config)), 0.3).eval()
    windowed = GPT(GPTConfig(**config, window=16)).eval()
    windowed.load_state_dict(net.state_dict())
    ids = torch.randint(60, (70,))
    want = windowed(ids[None])[0][0]
    assert (want - net(ids[None])[0][0])[16:].abs().max() > 0.1
    for place in (1, 10, 16, 20, 69):
        _, state, _ = prefill(net, ids[:place])
        got = prefill(net, ids[place:], state)[0][0]
        torch.testing.assert_close(got, want[-1], atol=1e-4, rtol=0)
    assert len(token_nats(net, ids, [5])) == 70


@torch.no_grad()
def test_a_learned_beginning_comes_first(net):
    add_prefix(net, 4)
    ids = [1, 2, 3]
    for _ in range(9):
        ids.append(int(net(torch.tensor([ids]))[0][0, -1, :50].argmax()))
    assert [int(i) for i in generate(net, ids[:3], 1, 9, 50, temperature=0)] == ids[3:]
    assert [int(i) for i in generate(net, [1], 1, 40, 50, temperature=0)]   # and beyond block_size
    nats = token_nats(net, ids[1:], ids[:1])
    loss = net(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1]
    assert nats.mean().item() == pytest.approx(loss.item(), abs=1e-4)


# --- against transformers -------------------------------------------------------------------------

@pytest.fixture(scope='module', params=['llama', 'mamba2'])
def pair(request):
    """The same small model, ours and transformers'."""
    settings = {
        'llama': ('Llama', dict(LLAMA, rms_norm_eps=1e-5)),
        'mamba2': ('Mamba2', dict(SSM2, n_groups=1)),
    }[request.param]
    torch.manual_seed(0)
    their = theirs(*settings)
    peer = PEERS[request.param]
    changes = dict(norm_eps=1e-5) if request.param == 'llama' else {}
    our = peer[2](CONFIG[peer[2]](vocab_size=V, n_layer=2, **{**peer[3], **changes})).eval()
    our.load_state_dict(their.state_dict())
    return our, their


@pytest.mark.parametrize('length_penalty, penalty, eos', [
    (1.0, 1.0, 3), (1.0, 1.0, None), (0.0, 1.0, 7), (2.0, 1.3, 11), (-1.0, 1.0, 3)])
def test_beams_are_those_of_transformers(pair, length_penalty, penalty, eos):
    our, their = pair
    prompt = [5, 17, 40, 5]
    if eos is not None:  # a token that ends many continuations
        beams = beam_search(our, prompt, 4, 6, V, lambda ids: False)
        eos = beams[eos % 4][1][2 + eos % 3]
    want = their.generate(
        torch.tensor([prompt]), num_beams=4, num_return_sequences=3, do_sample=False, max_new_tokens=14,
        length_penalty=length_penalty, repetition_penalty=penalty, eos_token_id=eos, pad_token_id=1,
        early_stopping=False, return_dict_in_generate=True, output_scores=True)
    got = beam_search(our, prompt, 4, 14, V, lambda ids: ids[-1] == eos, length_penalty, penalty)[:3]
    rows = want.sequences.tolist()
    for (score, ids), row, their_score in zip(got, rows, want.sequences_scores.tolist()):
        assert row[4:4 + len(ids)] == ids and score == pytest.approx(their_score, abs=1e-4)
        assert set(row[4 + len(ids):]) <= {1, eos}
    assert eos is None or length_penalty > 0 or any(ids[-1] == eos for _, ids in got)


def test_repetition_penalty_is_that_of_transformers(pair):
    our, their = pair
    prompt = [5, 17, 40, 5]
    want = their.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=20, repetition_penalty=1.5,
        eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    got = {penalty: [int(i) for i in generate(our, prompt, 1, 20, V, penalty, temperature=0)]
           for penalty in (1.0, 1.5)}
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
def test_token_logits_have_the_loss_of_transformers(pair, monkeypatch):
    our, their = pair
    ids = torch.randint(V, (90,))
    nats = token_nats(our, ids.tolist(), [9])
    whole = torch.cat((torch.tensor([9]), ids))
    loss = their(whole[None], labels=whole[None]).loss
    assert nats.mean().item() == pytest.approx(loss.item(), abs=1e-5)
    monkeypatch.setattr(generation, 'PREFILL', 7)
    torch.testing.assert_close(token_nats(our, ids, [9]), nats, atol=1e-4, rtol=0)
    want = torch.log_softmax(their(whole[None, :-1]).logits[0, -1], -1)
    (own, others), = logprobs_of(prefill(our, whole[:-1])[0], ids[-1:], 3, V)
    assert own == pytest.approx(want[ids[-1]].item(), abs=1e-4)
    assert [i for i, _ in others] == want.topk(3).indices.tolist()
    assert [p for _, p in others] == pytest.approx(want.topk(3).values.tolist(), abs=1e-4)
