"""What no checkpoint can be is refused where it is read, before anything is built of it."""
import math
import os
import time

import pytest
import torch

from mambino.sample import decode
from mambino.weights import checkpoint, fitting, loading, soundness

BEFORE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'before')
EMBEDDING = 'model.embed_tokens.weight'


def contents(name='gpt'):
    return torch.load(os.path.join(BEFORE, name, 'ckpt.pt'), weights_only=True)


def place(ckpt, path):
    """→ (the dict or list that has the last part of a path like 'settings.dataset', that part)."""
    *parents, last = path.split('/')
    for part in parents:
        ckpt = ckpt[int(part) if part.isdigit() else part]
    return ckpt, last


DAMAGES = {
    'config/n_layer': ['2', True, -1, 2**40, 1.0, None, [1]],
    'config/rope_theta': [math.nan, math.inf, -1.0],
    'config/tie_embeddings': [1, 'true'],
    'config/newer': [1],
    'config': [[], None, {1: 2}],
    'kind': [['gpt'], 'llama', None],
    'weights/' + EMBEDDING: [
        'x', None, torch.tensor([math.nan]), torch.eye(3).to_sparse(), torch.empty(3, device='meta'),
        torch.zeros(1).expand(2**33), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.complex64)],
    'weights': [[], {1: torch.zeros(1)}],
    'optimizers': [None, {}, [1], [{'state': [], 'param_groups': []}], [{'state': {}, 'param_groups': [{}]}]],
    'settings': [None, {}, {'dataset': 3}],
    'settings/lora_rank': [[1], {}, math.nan],
    'settings/adapter': ['lora'],
    'settings/model': ['mamba'],
    'counters': [None, {}, {'step': 'x'}],
    'counters/step': [-1, 1.5, None, 2**70],
    'counters/history': [{}, [1], [{'step': 1}]],
    'metadata': [None, {}],
    'metadata/recent': [[{'step': 1, 'val_loss': 'x'}]],
    'scaler': [{'scale': 'x'}, 3],
    'tokenizer': ['x', {}, {'json': 3}, {'json': '{}', 'bos': 5}],
    'adapter': ['x', {'type': 'lora'}, {'type': 'other'}],
    'data': ['x', {'parts': [1]}],
    'shards': [3, {'step': 'x'}],
}


@pytest.mark.parametrize('path', DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_a_line(path, tmp_path, capsys):
    for value in DAMAGES[path]:
        ckpt = contents()
        holder, last = place(ckpt, path)
        holder[last] = value
        torch.save(ckpt, tmp_path / 'ckpt.pt')
        with pytest.raises(SystemExit) as end:
            checkpoint.load_checkpoint(str(tmp_path))
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count('\n') == 1 and 'ckpt.pt' in error, (value, error)


def test_values_that_are_nested_too_deeply(tmp_path):
    ckpt, deep = contents(), []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match='too deeply'):
        soundness.check_contents(ckpt | dict(more=deep), checkpoint.MODELS['gpt'][1])


def test_what_a_newer_version_adds_may_stay(tmp_path):
    ckpt = contents() | dict(more={'a': [1]})
    ckpt['settings']['newer'] = 'x'
    ckpt['metadata']['newer'] = ckpt['counters']['newer'] = 1
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    assert loading.model_of(checkpoint.load_checkpoint(str(tmp_path)))


@pytest.mark.parametrize('field', ['n_layer', 'vocab_size', 'n_embd', 'intermediate_size', 'head_dim'])
def test_no_model_is_built_that_its_weights_do_not_fill(field, monkeypatch):
    ckpt = contents()
    ckpt['config'][field] = 100_000
    monkeypatch.setattr(fitting, 'build', lambda kind, config: built.append(torch.get_default_device())
                        or checkpoint.build(kind, config))
    built = []
    began = time.process_time()
    with pytest.raises(ValueError, match='layers|shape'):
        fitting.build_with('gpt', ckpt['config'], ckpt['weights'])
    assert time.process_time() - began < 5 and all(device.type == 'meta' for device in built)


@pytest.mark.parametrize('name', ['gpt', 'mamba1', 'mamba2', 'hybrid', 'hybrid-parallel', 'moe'])
def test_shapes_alone_are_those_of_the_model(name):
    ckpt = contents(name)
    fitting.check_fit(ckpt['kind'], ckpt['config'], ckpt['weights'])
    net = fitting.build_with(ckpt['kind'], ckpt['config'], ckpt['weights'])
    assert all(not tensor.is_meta for tensor in net.state_dict().values())


def test_an_optimizer_of_other_shapes_is_refused():
    from mambino.train.building import build_optimizers
    ckpt = contents()
    net = loading.model_of(ckpt)
    optimizer, = build_optimizers(net, 'adamw')
    saved, = ckpt['optimizers']
    soundness.check_optimizer(optimizer, saved)
    moments = saved['state'][0]
    for key, value in (('exp_avg', torch.zeros(3)), ('step', torch.zeros(4)), ('exp_avg', None)):
        with pytest.raises(ValueError, match='optimizer'):
            soundness.check_optimizer(optimizer, saved | dict(state={0: moments | {key: value}}))
    with pytest.raises(ValueError, match='other parameters'):
        soundness.check_optimizer(optimizer, saved | dict(param_groups=[]))


@pytest.mark.parametrize('name', ['gpt', 'mamba1', 'mamba2', 'hybrid'])
def test_a_state_of_other_sizes_never_reaches_compiled_code(name, one_thread):
    net = loading.model_of(contents(name))
    token = torch.ones(1, 1, dtype=torch.long)
    _, state = decode.step(net, torch.ones(1, 4, dtype=torch.long))
    for pos in (-1, -2**62):
        if 'k.0' in state:
            with pytest.raises(ValueError, match='position'):
                decode.step(net, token, state | dict(pos=torch.tensor([pos])))
    for key in state.keys() - {'pos'}:
        for change in (lambda t: t[..., :1], lambda t: t[:, :0], lambda t: t[:, :, :0], lambda t: t.double(),
                       lambda t: t[None], lambda t: t.expand(2, *t.shape[1:])):
            changed = state | {key: change(state[key].clone())}
            assert decode.ready(net, token, changed, 0) is None, (key, changed[key].shape)
    assert decode.step(net, token, state)[0].isfinite().all()


def test_a_model_without_finite_numbers_ends_in_a_line(capsys):
    from mambino.sample.next_token import sample_token
    with pytest.raises(SystemExit):
        sample_token(torch.full((1, 40), math.nan), top_k=5)
    assert 'no finite numbers' in capsys.readouterr().err
