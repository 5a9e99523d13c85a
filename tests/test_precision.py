"""train/precision.py: what --dtype=auto takes on a CPU, kept by a run that goes on; measuring leaves no trace."""
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import load, train

from mambino import machine
from mambino.train import precision, processes
from mambino.weights import adapters, checkpoint

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')
SMALL = dict(n_layer=3, n_embd=64, vocab_size=128, block_size=32)
MODELS = {
    'gpt': ('gpt', dict(SMALL, n_head=2, dropout=0.1)),
    'experts': ('gpt', dict(SMALL, n_head=2, n_expert=4)),
    'mamba2': ('mamba', SMALL),
    'mamba1': ('mamba', dict(SMALL, version=1)),
    'mamba3': ('mamba', dict(SMALL, version=3)),
    'hybrid': ('hybrid', dict(SMALL, n_head=2)),
}
NEW = SimpleNamespace(ckpt=None)


def settings_of(**changes):
    return dict(device='cpu', dtype='auto', eval_only=False, max_iters=10**6, tokens_per_step=4096, block_size=32,
                batch_size=0) | changes


@pytest.fixture
def ratio(monkeypatch):
    """Sets what is measured; how often it was, is counted."""
    calls = []

    def set_to(value):
        def measure(*_):
            calls.append(value)
            if isinstance(value, Exception):
                raise value
            return value
        monkeypatch.setattr(precision, 'measure', measure)
        return calls
    return set_to


def build(name='gpt'):
    kind, config = MODELS[name]
    return checkpoint.build(kind, config)


@pytest.mark.parametrize('value, dtype, words', [
    (1.43, 'bfloat16', 'precision: bfloat16, 1.43x as fast as float32 here\n'),
    (1.01, 'float32', 'precision: float32; bfloat16 is 1.01x as fast here\n'),  # nearly equal: the exact one
    (0.5, 'float32', '0.50x'),
    (RuntimeError('out of memory\nand more'), 'float32', 'could not be tried here: RuntimeError: out of memory\n'),
    (MemoryError(), 'float32', 'could not be tried here: MemoryError'),
])
def test_the_faster_one_is_taken_in_a_line(ratio, capsys, value, dtype, words):
    settings = settings_of()
    calls = ratio(value)
    precision.choose(settings, {}, NEW, build())
    said = capsys.readouterr().out
    assert settings['dtype'] == dtype and words in said and said.count('\n') == 1 and len(calls) == 1


@pytest.mark.parametrize('changes', [
    dict(dtype='float32'), dict(dtype='bfloat16'), dict(max_iters=10), dict(eval_only=True)])
def test_nothing_is_measured_where_it_cannot_matter(ratio, monkeypatch, changes):
    calls = ratio(2.0)
    monkeypatch.setattr(machine, 'has_bfloat16', lambda device: True)
    settings = settings_of(**changes)
    precision.choose(settings, dict(dtype=settings['dtype']), NEW, build())
    assert not calls and settings['dtype'] == changes.get('dtype', 'float32')


def test_all_processes_do_as_the_first_one(ratio, monkeypatch):
    calls = ratio(0.5)
    monkeypatch.setattr(processes, 'RANK', 1)
    monkeypatch.setattr(processes, 'summed', lambda *values: [1.5 + value for value in values])
    settings = settings_of()
    precision.choose(settings, {}, NEW, build())
    assert settings['dtype'] == 'bfloat16' and not calls


@pytest.mark.parametrize('processor, dtype, value, words', [
    (None, 'float32', 3.0, ''),                 # of the same processor, or before it was noted
    ('another', 'float32', 3.0, '--dtype=bfloat16 is 3.00x as fast here'),
    ('another', 'bfloat16', 0.5, '--dtype=float32 is 2.00x as fast here'),
    ('another', 'bfloat16', 0.9, ''),
])
def test_a_run_that_goes_on_keeps_its_own(ratio, capsys, processor, dtype, value, words):
    ratio(value)
    settings = settings_of(dtype=dtype)
    origin = SimpleNamespace(ckpt=dict(metadata=dict(processor=processor) if processor else {}))
    precision.choose(settings, dict(dtype='auto'), origin, build())
    said = capsys.readouterr().out
    assert settings['dtype'] == dtype and (words in said if words else not said)


@pytest.mark.parametrize('name', MODELS)
def test_measuring_leaves_no_trace(name):
    """The very bits of a step are the same after it."""
    def loss_and_gradients(net):
        torch.manual_seed(3)
        idx = torch.randint(128, (2, 32))
        loss = net(idx, idx)[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters())]
    net, other = build(name), build(name)
    other.load_state_dict(net.state_dict())
    before, names = torch.get_rng_state(), [name for name, _ in net.named_parameters()]
    net.eval()
    assert 0.01 < precision.measure(net, 32, 2) < 100
    assert torch.equal(torch.get_rng_state(), before) and not net.training
    assert [name for name, _ in net.named_parameters()] == names
    assert all(p.grad is None for p in net.parameters()) and not net.expert_load()
    net.train()
    assert all(map(torch.equal, loss_and_gradients(net), loss_and_gradients(other)))


@pytest.mark.parametrize('allowed, last', [(0.5, (40, 32)), (0.1, (8, 32))])
def test_a_step_is_tried_in_its_own_shape_unless_that_takes_long(monkeypatch, allowed, last):
    """With few tokens, what a product costs besides its operations hides what a step gains."""
    shapes = []

    def stretches(net, layer, n_layer, idx, dtype, clock):
        shapes.append(tuple(idx.shape))
        time.sleep(0.1 if dtype == 'float32' else 0)
        return [1.0 if dtype == 'float32' else 0.5]
    monkeypatch.setattr(precision, 'stretches', stretches)
    monkeypatch.setattr(precision, 'TURN', allowed)
    assert precision.measure(build(), 32, 40) == 2.0 and shapes[-1] == last


def test_a_failure_in_the_middle_leaves_the_model_whole(monkeypatch):
    net = build()
    monkeypatch.setattr(precision, 'release', lambda net: None)
    monkeypatch.setattr(machine, 'autocast', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        precision.measure(net, 32, 2)
    assert len(net.model.layers) == 3 and not net.model.layers[0]._forward_hooks


@pytest.mark.parametrize('adapter', ['', 'lora'])
def test_a_layer_counts_as_often_as_there_are_layers(adapter):
    """By a clock that only layers, and what is around them, advance; under an adapter, whose gradients end there, the
    first layer's backward pass is the last stretch."""
    net = build()
    if adapter:
        adapters.add_adapter(net, dict(type='lora', rank=2, alpha=4.0, dropout=0.0, targets='q_proj'))
    clock = iter(range(100)).__next__
    with precision.first_layer_alone(net) as (layer, n_layer):
        times = precision.stretches(net, layer, n_layer, torch.zeros(1, 8, dtype=torch.long), 'float32', clock)
    assert times == ([1, 3, 1, 1, 3] if adapter else [1, 3, 1, 1, 3, 1])


def test_of_each_stretch_the_shortest_counts():
    """A turn that another program disturbs in one place is still of use in the others."""
    turns = [dict(float32=[1.0, 9.0], bfloat16=[0.5, 1.0]), dict(float32=[5.0, 2.0], bfloat16=[0.5, 7.0])]
    assert precision.ratio_of(turns) == 2.0


def test_a_run_keeps_its_precision_whatever_is_measured(here, monkeypatch):
    """Said again with --dtype=auto, too: it ends with the bits it would have had."""
    train('--model=gpt --dtype=bfloat16 --max_iters=2')
    monkeypatch.setattr(precision, 'SOON_DONE', 0)
    monkeypatch.setattr(precision, 'measure', lambda *_: 0.1)
    train('--model=gpt --dtype=auto --max_iters=4')
    assert load()['settings']['dtype'] == 'bfloat16'
    train('--model=gpt --dtype=float32 --max_iters=6')          # but told otherwise it changes
    assert load()['settings']['dtype'] == 'float32'
