"""A model of the next token that goes on as one that fills holes: nothing of what it knows is lost."""
import dataclasses

import pytest
import torch
from helpers.holes import MODELS, T, V, build, text
from helpers.models import assert_close

from mambino.sample.uncover import Filler
from mambino.train.from_next import to_fill
from mambino.weights import fitting


class Ids:
    """In the place of a tokenizer, of which its size alone matters."""
    vocab_size, eot = V - 1, 0


def begun(name, objective, K=0, tokenizer=None, **changes):
    """(a model of the next token of V - 1 ids, or V of which its tokenizer has one less, what it becomes)."""
    net = build(name, vocab_size=V if tokenizer else V - 1, **changes)
    base = dict(kind=MODELS[name][0], config=dataclasses.asdict(net.config), weights=net.state_dict(),
                tokenizer=tokenizer)
    filled = to_fill(base, objective, K)
    return net, fitting.build_with(filled['kind'], filled['config'], filled['weights']).eval()


def holes_in(clean, share=0.5):
    return clean.masked_fill(torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)) < share, V - 1)


@pytest.mark.parametrize('name', [name for name in MODELS if name != 'mamba2-apart'])
def test_in_blocks_of_one_token_it_says_what_it_said(name):
    """Each is spoken of by the clean token before it, whatever stands in the holes."""
    net, new = begun(name, 'block', 1)
    clean = text()
    with torch.no_grad():
        want = net(clean)[0]
        got = new(torch.cat((clean, holes_in(clean))))[0]
    assert new.config.vocab_size == V and got.shape[-1] == V
    assert_close(got[:, 1:, :V - 1], want[:, :-1], 1e-5)


@pytest.mark.parametrize('name', ['mamba1', 'mamba2', 'mamba3'])
@pytest.mark.parametrize('K', [0, 4])
def test_a_mamba_is_at_first_what_it_was_asked_about_texts_with_holes(name, K):
    net, new = begun(name, 'block' if K else 'masked', K, Ids)
    assert new.config.vocab_size == V                           # the id that the tokenizer has not is taken
    clean = text()
    noisy = holes_in(clean)
    with torch.no_grad():
        got = new(torch.cat((clean, noisy)) if K else noisy)[0]
        for start in range(0, T, K or T):
            end = start + (K or T)
            want = net(torch.cat((clean[:, :start], noisy[:, start:end]), 1))[0][:, max(start, 1) - 1:end - 1]
            assert_close(got[:, max(start, 1):end], want, 1e-5)


@pytest.mark.parametrize('name', ['gpt', 'mamba2', 'hybrid-delta'])
def test_blocks_are_generated_as_they_are_learned(name):
    """The first token of a block is spoken of by the last one before it."""
    _, new = begun(name, 'block', 4)
    torch.manual_seed(0)
    for p in new.parameters():
        p.data += 0.05 * torch.randn_like(p)
    clean = text(rows=1)
    noisy = holes_in(clean)
    with torch.no_grad():
        want = new(torch.cat((clean, noisy)))[0][0, :, :V - 1]
    filler = Filler(new, Ids, 'cpu')
    state = before = None
    for start in range(0, T, 4):
        got = filler.scores(noisy[0, start:start + 4], state, before)
        assert_close(got[start == 0:], want[max(start, 1):start + 4], 1e-4)
        logits, state = new.step(clean[:, start:start + 4], state)
        before = logits[:, -1:]


def test_the_way_back_learns():
    """Of its weights out_proj has a gradient at once, all others after the first step."""
    _, new = begun('mamba2', 'masked')
    clean = text()
    noisy = holes_in(clean)
    targets = clean.masked_fill(noisy != V - 1, -1)
    opt = torch.optim.SGD(new.parameters(), 0.1)
    for step in range(2):
        opt.zero_grad()
        new(noisy, targets)[1].backward()
        with_gradient = {name for name, p in new.named_parameters() if '.back.' in name and p.grad.any()}
        assert {name.split('.')[-2] for name in with_gradient} >= {'out_proj', *('in_proj', 'conv1d') * step}
        opt.step()


def test_a_large_vocabulary_stays_round():
    net, new = begun('gpt', 'masked')
    weights = net.state_dict() | {'lm_head.weight': torch.randn(1024, net.config.n_embd)}
    weights['model.embed_tokens.weight'] = weights['lm_head.weight']
    config = dataclasses.asdict(net.config) | dict(vocab_size=1024)
    larger = to_fill(dict(kind='gpt', config=config, weights=weights, tokenizer=None), 'masked', 0)
    rows = larger['weights']['lm_head.weight']
    assert larger['config']['vocab_size'] == len(rows) == 1088
    assert torch.equal(rows[:1024], weights['lm_head.weight'])
    assert_close(rows[-1], weights['lm_head.weight'].mean(0), 1e-6)
