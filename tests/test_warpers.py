"""Draws against transformers' warpers: what the filters leave, and how often each token comes (chi-square); beams
against brute force; settings at their ends."""
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.models import perturb

from mambino.sample.generation import Rows, beam_search, prefill
from mambino.sample.next_token import sample_token
from model_gpt import GPT, GPTConfig

DRAWS = 20_000


def warped(logits, prompt, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0, penalty=1.0):
    """The probabilities (V,) that transformers draws from after its warpers."""
    lib = pytest.importorskip('transformers')
    warpers = lib.LogitsProcessorList()
    if penalty != 1:
        warpers.append(lib.RepetitionPenaltyLogitsProcessor(penalty))
    warpers.append(lib.TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(lib.TopKLogitsWarper(top_k))
    if min_p:
        warpers.append(lib.MinPLogitsWarper(min_p))
    if top_p < 1:
        warpers.append(lib.TopPLogitsWarper(top_p))
    return warpers(torch.tensor([prompt]), logits[None].clone())[0].double().softmax(-1)


def chi_square(counts, probabilities):
    """The probability of counts as far from these probabilities as they are; few expected are taken together."""
    assert not counts[probabilities == 0].any(), 'what cannot be was drawn'
    expected = probabilities * counts.sum()
    order = expected.argsort(descending=True)
    counts, expected = counts[order].double(), expected[order]
    n = int((expected >= 10).sum())
    if n < len(expected) and expected[n:].sum() > 0:
        counts = torch.cat((counts[:n], counts[n:].sum()[None]))
        expected = torch.cat((expected[:n], expected[n:].sum()[None]))
    else:
        counts, expected = counts[:n], expected[:n]
    if len(counts) < 2:
        return 1.0
    distance = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), distance / 2).item()


FILTERS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=3.0),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.1),
    dict(penalty=1.3),
    dict(penalty=0.7),
    dict(temperature=0.8, top_k=20),
    dict(temperature=1.5, top_p=0.9),
    dict(top_k=12, top_p=0.7),
    dict(temperature=2.0, min_p=0.05),
    dict(top_k=15, min_p=0.02),
    dict(min_p=0.02, top_p=0.8),
    dict(temperature=1.2, top_k=25, min_p=0.01, top_p=0.95),
    dict(temperature=0.8, top_k=10, min_p=0.03, top_p=0.9, penalty=1.2),
]


@pytest.mark.parametrize('V', [40, 6000])
@pytest.mark.parametrize('number', range(len(FILTERS)))
def test_draws_are_those_of_transformers(number, V):
    if V > 40 and number not in (4, 14):      # where a large vocabulary takes other ways
        pytest.skip('the same as with a small vocabulary')
    settings = FILTERS[number]
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(V, generator=generator) * 2
    prompt = [3, 1, 4, 1, 5]
    want = warped(logits, prompt, **settings)
    sampling = {name: value for name, value in settings.items() if name != 'penalty'}
    rows = Rows(SimpleNamespace(state_dtype=None), V, settings.get('penalty', 1.0))
    rows.add([(logits[None], dict(pos=torch.zeros(1)), prompt)])
    scores = rows.possible(rows.logits)
    size = DRAWS if V == 40 else 500
    counts = torch.zeros(V, dtype=torch.long)
    for _ in range(DRAWS // size):
        ids = sample_token(scores.expand(size, -1), generator=generator, **sampling)
        counts += torch.bincount(ids, minlength=V)
    assert chi_square(counts, want) > 0.001
    if V == 40:                                     # the test itself tells what is otherwise
        assert chi_square(counts, warped(logits + torch.arange(V) * 0.02, prompt, **settings)
                          * (want > 0) + 1e-9 * (want > 0)) < 0.001 or (want > 0).sum() < 4


@pytest.mark.parametrize('V', [40, 6000])
@pytest.mark.parametrize('sampling', [
    dict(top_p=1e-50), dict(top_p=1e-320), dict(top_p=1e-9, top_k=7), dict(temperature=1e-320), dict(min_p=1.0),
    dict(temperature=1e-30, top_p=1e-30, min_p=1.0, top_k=1), dict(top_k=1)])
def test_the_smallest_values_leave_the_likeliest(sampling, V):
    logits = torch.randn(30, V)
    assert torch.equal(sample_token(logits, **sampling), logits.argmax(-1))


@pytest.mark.parametrize('sampling', [
    dict(temperature=1e300), dict(top_k=10**30), dict(temperature=1e300, top_k=10**18, top_p=0.5),
    dict(min_p=1e-320), dict(temperature=1e300, min_p=1.0)])
def test_the_largest_values_leave_what_is_possible(sampling):
    logits = torch.randn(200, 40)
    logits[:, ::2] = -torch.inf
    ids = sample_token(logits, **sampling)
    assert (ids % 2 == 1).all() and len(set(ids.tolist())) > 5


@pytest.mark.parametrize('length_penalty', [1.0, 0.0, -1.0, 2.0])
@pytest.mark.parametrize('penalty', [1.0, 1.4])
def test_beams_are_the_best_of_all_texts_of_five_tokens(length_penalty, penalty):
    """With as many beams as there are texts the search finds what brute force finds."""
    torch.manual_seed(2)
    V, end = 5, 4
    net = perturb(GPT(GPTConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=32)), 0.5).eval()
    prompt = [0, 3]
    scores = {}
    for n in range(1, 4):
        for ids in itertools.product(range(V), repeat=n):
            if end in ids[:-1] or (n < 3 and ids[-1] != end):
                continue
            total = 0.0
            for m, i in enumerate(ids):
                before = [*prompt, *ids[:m]]
                rows = Rows(net, V, penalty)
                rows.add([prefill(net, before)])
                total += rows.penalized(rows.logits.log_softmax(-1))[0, i].item()
            scores[ids] = total / n ** length_penalty
    got = beam_search(net, prompt, 200, 3, V, lambda ids: ids[-1] == end, length_penalty, penalty)
    want = sorted(scores, key=scores.get, reverse=True)
    assert len(got) == len(scores)
    assert [score for score, _ in got] == pytest.approx([scores[ids] for ids in want], abs=1e-4)
    assert [tuple(ids) for _, ids in got[:10]] == want[:10]
