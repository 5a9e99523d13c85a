"""Windows that follow one another, and the states between them, in training."""
import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
from helpers.models import SSM_SIZE, assert_close, perturb
from helpers.runs import load, metrics, refused, script, train

from mambino.train import batches
from mambino.train.carried import Carried, state_bytes
from mambino.train.order import starts
from mambino.weights import checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')
T = 8


def model(version=2):
    torch.manual_seed(0)
    config = dict(SSM_SIZE, version=version, vocab_size=20, block_size=T)
    if version != 1:
        config['head_dim'] = 16
    return perturb(checkpoint.build('mamba', config), 0.2).train()


class Text:
    """Of a dataset what Carried asks."""
    streams = 4

    def windows(self, block_size):
        return 14                               # 3 in each stream, and two are left over


def test_streams_go_on_where_they_ended_and_read_each_window_once():
    n, slack, seed, streams = 61, 11, 5, 6
    long = n // streams
    begins = starts(np.arange(3 * long * streams), n, T, slack, seed, streams).reshape(3, long, streams)
    assert (np.diff(begins, axis=1) == T).all()                     # each goes on, to the end of an epoch
    for epoch in begins:
        assert len(np.unique(epoch)) == epoch.size and epoch.min() >= 0 and epoch.max() <= (n - 1) * T + slack - 1
    assert len({tuple(epoch[0]) for epoch in begins}) == 3          # another order each time
    alone = [starts(np.array([s]), n, T, slack, seed, streams)[0] for s in range(2 * long * streams)]
    assert alone == begins[:2].flatten().tolist()                   # a pure function of a sequence's number


@pytest.mark.parametrize('version', [1, 2, 3])
def test_a_window_begins_with_the_state_in_which_the_last_one_ended(version):
    """Its loss is that of the text as a whole, its gradient that of its own window."""
    net = model(version)
    ids = torch.randint(20, (4, 2 * T + 1))
    whole = net(ids[:, :-1])[0]
    carried = Carried(net, Text(), T, 4, 'cpu')
    for step in range(2):
        carried.begin(4 * step)
        for rows in (slice(0, 3), slice(3, 4)):                     # micro-batches, of any size
            x = ids[rows, step * T:step * T + T]
            assert_close(net(x)[0], whole[rows, step * T:step * T + T], 1e-5)
    carried.end()
    loss = torch.nn.functional.cross_entropy(whole[:, T:].flatten(0, 1), ids[:, T + 1:].flatten())
    assert not any(value.requires_grad for value in carried.states.values())
    carried.begin(4)
    carried.states = {name: value for name, value in net.eval().step(ids[:, :T])[1].items()}
    got = net.train()(ids[:, T:-1], ids[:, T + 1:])[1]
    assert_close(got, loss, 1e-5)
    net.eval()
    assert_close(net(ids[:, T:-1])[0][:, 0], net(ids[:, T:T + 1])[0][:, 0], 1e-6)   # an evaluation knows no state


def test_an_epoch_begins_with_nothing_and_a_step_that_failed_begins_again():
    net = model()
    carried = Carried(net, Text(), T, 4, 'cpu')
    ids = torch.randint(20, (4, T))
    carried.begin(0)
    first = net(ids)[0]
    of_first = carried.saved()['ssm.0']
    carried.begin(4)
    second = net(ids)[0]
    carried.again(4)                                                # memory did not suffice, say
    assert torch.equal(carried.saved()['ssm.0'], of_first)
    carried.begin(4)
    assert torch.equal(net(ids)[0], second) and not torch.equal(first, second)
    carried.begin(8)
    net(ids[:2])                                                    # stopped within
    saved = carried.saved()
    assert torch.equal(saved['ssm.0'], carried.states['ssm.0']) and len(saved['pos']) == 4
    carried.begin(12)                                               # 3 steps make an epoch
    assert torch.equal(net(ids)[0], first)


def test_each_stream_begins_at_its_own_place():
    """Where a step has numbers of two windows, as after another tokens_per_step."""
    net = model()
    carried = Carried(net, Text(), T, 4, 'cpu')                     # numbers 12 to 15 begin an epoch
    ids = torch.randint(20, (4, T))
    fresh = net.eval()(ids)[0]
    net.train()
    carried.begin(6)
    net(ids)
    for start, begins in ((10, [False, False, True, True]), (14, [True, True, False, False])):
        carried.begin(start)
        logits = net(ids)[0]
        assert [torch.allclose(a, b, atol=1e-6) for a, b in zip(logits, fresh)] == begins


def test_it_learns_what_is_further_back_than_a_window(here):
    """Which letter a text is of, which it says once in four tokens, as many as a window has."""
    rng = np.random.default_rng(0)
    texts = np.zeros((600, 64), np.int32)
    texts[:, 3::4] = 1 + rng.integers(0, 2, (600, 1))
    os.makedirs('data/letters')
    for split, part in (('train', texts[:500]), ('val', texts[500:])):
        part.tofile(f'data/letters/{split}.bin')
    losses = []
    for carry in (False, True):
        train('--dataset=letters --vocab_size=3 --block_size=4 --tokens_per_step=128 --batch_size=32 --max_iters=150 '
              f'--eval_interval=150 --learning_rate=1e-2 --carry_state={carry} --out_dir=carry-{carry}')
        of_step = metrics(f'carry-{carry}', 'loss')
        losses.append(np.mean([of_step[step] for step in range(101, 151)]))
    assert losses[1] < 0.06 and losses[0] > losses[1] + 0.05


def test_its_states_are_kept_and_others_begin_anew(here, capsys):
    train('--carry_state=True --max_iters=6')
    windows = batches.open_dataset('tiny').windows(16) // 4
    assert f'4 texts side by side, in which a state goes on for {windows} windows' in capsys.readouterr().out
    saved = load()['carried']
    assert {len(value) for value in saved.values()} == {4} and any(value.any() for value in saved.values())
    train('--carry_state=True --max_iters=8 --tokens_per_step=32')
    assert 'the run had 4 texts side by side, and has 2 now' in capsys.readouterr().out
    assert len(load()['carried']['pos']) == 2
    for flags, words in (
            ('--seed=2', 'the seed is another'), ('--init_from=resume --dataset=more', 'the text is another')):
        shutil.copytree('out', 'other')
        train('--carry_state=True --max_iters=9 --tokens_per_step=32 --out_dir=other', flags)
        assert f'note: {words}: the texts of carry_state begin with no state' in capsys.readouterr().out
        shutil.rmtree('other')
    train('--carry_state=False --max_iters=9 --tokens_per_step=32')
    assert 'begin with no state' not in capsys.readouterr().out and 'carried' not in load()
    train('--carry_state=True --max_iters=10 --tokens_per_step=32')
    assert 'note: the checkpoint has no states: ' in capsys.readouterr().out
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=4') == 0


def test_states_are_planned_with_and_stay_out_of_the_best_model(here, capsys, monkeypatch):
    save, tried = Carried.saved, []

    def saved(self):
        tried.append(1)
        if len(tried) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return save(self)
    monkeypatch.setattr(Carried, 'saved', saved)
    train('--carry_state=True --max_iters=6 --vram=1')
    said = capsys.readouterr().out
    assert 'of 1.0 GB that --vram says, 0.00 GB left to the states of carry_state' in said
    assert 'out/ckpt.pt could not be saved (DefaultCPUAllocator' in said and len(tried) == 2    # of steps 5 and 6
    assert 'carried' in load() and 'carried' not in load('out/best.pt')
    train('--carry_state=True --state_size=128 --vram=0.0002 --out_dir=small', status=2)
    refused(capsys, 'keeps the states of 4 texts', 'lower --tokens_per_step')


@pytest.mark.parametrize('version', [1, 2, 3])
def test_what_a_state_takes(version):
    of_three = dataclasses.asdict(model(version).config) | dict(n_layer=3)
    size = sum(value.nbytes for value in checkpoint.build('mamba', of_three).step(torch.zeros(1, 1).long())[1].values())
    assert state_bytes(of_three) == pytest.approx(size, abs=32)


@pytest.mark.parametrize('flags, words', [
    ('--model=gpt', 'not with a gpt'), ('--model=hybrid', 'not with a hybrid'),
    ('--objective=masked', 'not with objective=masked'), ('--compile=True', 'not with compile'),
    ('--gradient_checkpointing=True', 'not with gradient_checkpointing'), ('--dataset=tiny:1,more:1', 'a mixture'),
    ('--tokens_per_step=64000', 'lower --tokens_per_step'),
    ('--tokens_per_step=4000', 'has 1 window of 16 tokens for each')])
def test_where_it_cannot_be_is_said_in_a_line(here, capsys, flags, words):
    train('--carry_state=True', flags, status=2)
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


def test_a_dataset_is_read_at_random_again_without_it(here):
    data = batches.open_dataset('tiny')
    at_random = data.batch(np.arange(4), 16, 1)[0]
    data.streams = 4
    assert not torch.equal(data.batch(np.arange(4), 16, 1)[0], at_random)
