"""score.py: how likely each token of a text is; the figures that --score, the API and the page have in common."""

import pytest
import torch
from helpers.sampling import open_run, small_net

from mambino.sample import generation, score


@pytest.fixture
def text(runs):
    with open('text.txt', encoding='utf-8') as f:
        return f.read()[:1500]


def test_each_token_with_the_likeliest_in_its_place(kind, text):
    net, tok = open_run(kind)
    ids = tok.encode(text).tolist()[:30]                            # within block_size
    scores = [row for piece in score.token_scores(net, tok, ids, top=3) for row in piece]
    assert len(scores) == len(ids)
    logits = net.step(torch.tensor([[*tok.context(), *ids[:-1]]]))[0][0, -len(ids):]
    want = logits.log_softmax(-1)
    own = torch.tensor([logprob for logprob, _ in scores])
    torch.testing.assert_close(own, want.gather(1, torch.tensor(ids)[:, None])[:, 0], atol=1e-3, rtol=0)
    for (logprob, likeliest), i in zip(scores, ids):
        assert len(likeliest) == 3 and logprob <= likeliest[0][1]
        assert likeliest == sorted(likeliest, key=lambda pair: -pair[1])
        assert dict(likeliest).get(i, logprob) == logprob          # of one array, to the last bit


def test_the_sum_is_that_of_score_to_the_last_bit(runs, text, monkeypatch):
    net, tok = open_run('char')
    ids = tok.encode(text).tolist()
    total, worst = score.surprises(net, tok, ids)
    logprobs = [row[0] for piece in score.token_scores(net, tok, ids, top=5) for row in piece]
    assert score.total_nats(logprobs) == total == score.total_nats(reversed(logprobs))
    assert worst[0] == (-min(logprobs), logprobs.index(min(logprobs)))
    monkeypatch.setattr(generation, 'PREFILL', 64)
    assert len(list(score.token_scores(net, tok, ids))) == -(-len(ids) // 32)      # of a GPT with this block_size


def test_a_score_keeps_nothing_for_gradients():
    """Each window's would stay in memory."""
    net = small_net('mamba2')
    made = []
    forward = type(net).forward

    def watched(self, idx, targets=None, factors=None):
        made.append(forward(self, idx, targets, factors)[1])
        return None, made[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(net), 'forward', watched)
        assert list(generation.window_losses(net, list(range(20))))
    assert made and not any(loss.requires_grad for loss in made)
