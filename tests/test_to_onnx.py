"""graphs.py, to_onnx.py, to_torchscript.py: onnxruntime, and PyTorch without these scripts, compute
what the models do."""
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers.models import V, assert_close, build, every_model, perturb, tokens

from mambino import tokenizer
from mambino.export import graph_scans, graphs, to_onnx, to_torchscript
from mambino.export.compare import silent
from mambino.kernels import registry, substituted
from mambino.language_model import rms_norm
from model_gpt import GPTConfig, MoE, swiglu
from model_mamba import selective_scan, ssd

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

KINDS = {'gpt-gqa-window': dict(n_layer=1, qk_norm=True, n_expert=4, intermediate_size=16),
         'mamba1': dict(n_layer=1),
         'mamba2-groups-untied': dict(n_layer=1), 'hybrid-parallel': dict(n_layer=1)}
CUTS = 1, 30, 1, 1, 17, 33          # more in all than the window and than several chunks


def model(name, **changes):
    return perturb(build(name, **changes))


@every_model
def test_a_graph_computes_what_the_model_does(name):
    net, idx = model(name), tokens(3, sum(CUTS))
    want = net.step(idx)[0]
    assert want.std() > 0.3  # else closeness would mean little
    with silent(), torch.no_grad():
        for graph in (graphs.Graph(net), graphs.Graph(net, scripted=True)):
            past, parts = graph.empty(3), []
            for piece in idx.split(CUTS, 1):
                logits, past = graph(piece, past)
                parts.append(logits)
            assert_close(torch.cat(parts, 1), want, 1e-5)
            if graph.window:
                caches = [u for name, u in zip(graph.names()[1], past) if name.endswith('.key')]
                assert past[0].tolist() == [sum(CUTS)] and caches[0].shape[2] == graph.window
        names = graph.names()
        assert len(names[0]) == len(names[1]) == len(past)
        assert names[0][-1].endswith('.1' if 'ssm.1' in graph.sizes else '.1.value')
        assert names[1][-1].startswith('present')
        assert_close(graphs.FullGraph(net)(idx), want, 1e-5)


# --- what graphs.py has anew is what the models define

def test_a_long_step_of_mamba2_is_cut_in_chunks():
    x, dt = torch.randn(2, 70, 4, 8), torch.rand(2, 70, 4)
    B, C = torch.randn(2, 2, 70, 2, 16)
    A, h = -torch.rand(4) * 16, torch.randn(2, 4, 8, 16)
    with silent():
        scripted = torch.jit.script(graphs.ssd)
    one_chunk = graph_scans.ssd_chunk(x, dt, A, B, C, h)
    for got in (graphs.ssd(x, dt, A, B, C, 16, h), one_chunk, scripted(x, dt, A, B, C, 16, h)):
        for result, defined in zip(got, ssd.definition(x, dt, A, B, C, 16, h)):
            assert_close(result, defined)


def test_the_scan_of_mamba1():
    x, dt = torch.randn(2, 70, 12), torch.rand(2, 70, 12)
    B, C = torch.randn(2, 2, 70, 8)
    A, h = -torch.rand(12, 8) * 16, torch.randn(2, 8, 12)
    with silent():
        scripted = torch.jit.script(graphs.selective_scan)
    defined = selective_scan.definition(x, dt, A, B, C, h)
    for scan in (graphs.selective_scan, scripted):
        for result, wanted in zip(scan(x, dt, A, B, C, h), defined):
            assert_close(result, wanted)


@torch.no_grad()
def test_every_expert():
    config = GPTConfig(n_embd=32, n_head=2, n_expert=8, n_expert_active=3, intermediate_size=24)
    moe = MoE(config).eval()
    for p in moe.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 30, 32)
    assert_close(graphs.EveryExpert(moe)(x)[0], moe(x)[0], 1e-3)


def test_a_graph_shares_the_weights():
    net = model('gpt-experts')
    graph = graphs.Graph(net)
    ours = dict(net.named_parameters())
    assert all(p is ours[name] for name, p in graph.net.named_parameters())
    assert isinstance(net.model.layers[0].mlp, MoE)


@pytest.fixture(scope='module')
def tok():
    # fewer ids than the model
    return tokenizer.build_tokenizer('char', [''.join(chr(97 + i) for i in range(20))])


# --- ONNX

@pytest.fixture
def needs_onnx():
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)


@pytest.mark.parametrize('name', KINDS)
def test_onnx(name, tok, tmp_path, capfd, needs_onnx):
    import onnx
    net = model(name, **KINDS[name])
    to_onnx.write(net, tok, tmp_path, '')
    assert capfd.readouterr() == ('', '')
    assert sorted(os.listdir(tmp_path)) == ['model.onnx', 'step.onnx', 'tokenizer.json']
    check = to_onnx.verify(net, tok, tmp_path, '')
    assert check['ok'] and check['logits'] <= 1e-4 == check['limit'] and check['greedy'] == '64 of 64', check
    assert 'onnxruntime' in check['tool'] and 'ms' in check['note']
    for file in to_onnx.FILES:
        graph = onnx.load(tmp_path / file)
        onnx.checker.check_model(graph)
        facts = {p.key: p.value for p in graph.metadata_props}
        assert facts['kind'] == name.split('-')[0].rstrip('12')
        assert facts['vocab_size'] == str(V) and facts['eot'] == str(tok.eot)
        assert facts['window'] == str(getattr(net.config, 'window', 0))
    graph = onnx.load(tmp_path / 'step.onnx').graph
    inputs, outputs = [value.name for value in graph.input], [value.name for value in graph.output]
    if name == 'gpt-gqa-window':
        assert inputs == ['input_ids', 'past_position', 'past_key_values.0.key', 'past_key_values.0.value']
        assert outputs == ['logits', 'present_position', 'present.0.key', 'present.0.value']
    if name == 'mamba1':
        assert inputs == ['input_ids', 'past_conv.0', 'past_ssm.0']
        assert outputs == ['logits', 'present_conv.0', 'present_ssm.0']
        perturb(net, 0.01)
        assert not to_onnx.verify(net, tok, tmp_path, '')['ok']                 # the check is one


def test_onnx_int8_and_weights_beside_the_file(tmp_path, capfd, monkeypatch, needs_onnx):
    monkeypatch.setattr(to_onnx, 'LARGEST', 0)
    net = model('mamba1', n_embd=128, n_layer=1)
    to_onnx.write(net, None, tmp_path, 'int8')
    assert capfd.readouterr() == ('', '')
    assert sorted(os.listdir(tmp_path)) == ['model.onnx', 'model.onnx.data', 'step.onnx', 'step.onnx.data']
    size = sum(os.path.getsize(tmp_path / name) for name in ('step.onnx', 'step.onnx.data'))
    assert size < 0.6 * 4 * net.num_params()
    check = to_onnx.verify(net, None, tmp_path, 'int8')
    assert check['ok'] and 1e-4 < check['logits'] <= check['limit'], check


def test_onnx_int8_of_experts(tmp_path, needs_onnx):
    """All of a layer's experts are one matrix: onnxruntime has no int8 for stacks of them."""
    net = perturb(build('gpt-experts', n_layer=1, n_embd=64, intermediate_size=64), 0.02)
    to_onnx.write(net, None, tmp_path, 'int8')
    assert os.path.getsize(tmp_path / 'step.onnx') < 0.6 * 4 * net.num_params()
    check = to_onnx.verify(net, None, tmp_path, 'int8')
    assert check['ok'] and 1e-4 < check['logits'] <= check['limit'], check


def test_what_is_refused(tmp_path, monkeypatch):
    net = model('gpt')
    with pytest.raises(ValueError, match='int8'):
        to_onnx.write(net, None, tmp_path, 'int4')
    with pytest.raises(ValueError, match='ONNX for int8'):
        to_torchscript.write(net, None, tmp_path, 'int8')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError):
        to_onnx.write(net, None, tmp_path, '')
    net.initial_state = lambda B: {}
    with pytest.raises(ValueError, match='learned prefix'):
        to_torchscript.write(net, None, tmp_path, '')
    assert os.listdir(tmp_path) == []


def test_nothing_stays_swapped(tmp_path):
    def switches():
        return registry._substitutes, logging.root.manager.disable, torch.is_grad_enabled()

    def fail_within(*_):
        if registry._substitutes is not None:  # else it is the first step, for the sizes
            assert registry._substitutes.keys() == {'attention', 'selective_scan', 'ssd', 'mamba3_scan', 'delta_scan'}
            assert logging.root.manager.disable == logging.WARNING and not torch.is_grad_enabled()
            raise ZeroDivisionError
    net, before = model('mamba1'), switches()
    net.lm_head.register_forward_hook(fail_within)
    with pytest.raises(ZeroDivisionError):
        to_torchscript.write(net, None, tmp_path)
    assert before == switches() and before[0] is None


def test_no_kernel_computes_within(monkeypatch):
    def kernel(*_):
        raise AssertionError
    x, weight = torch.randn(3, 32), torch.ones(32)
    monkeypatch.setattr(registry, 'ENABLED', True)
    for name in registry.KERNELS:
        monkeypatch.setitem(registry.KERNELS, name, [kernel])
    with substituted(swiglu=lambda gate, up: 'another'):
        assert swiglu(x, x) == 'another'
        assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm.definition(x, weight, 1e-5))
    with pytest.raises(AssertionError):
        swiglu(x, x)


# --- TorchScript

ALONE = """
import json, sys, torch
for name in json.loads(sys.argv[1]):
    about = {'model.json': ''}
    step = torch.jit.load(name + '/step.ts', _extra_files=about)
    whole = torch.export.load(name + '/model.pt2').module()
    given = torch.load(name + '/ids.pt')
    past, parts = step.empty(len(given)), []
    for piece in given.split([1, 30, 1, 1, 17, 33], 1):
        logits, past = step(piece, past)
        parts.append(logits)
    assert len(json.loads(about['model.json'])['past']) == len(past)
    torch.save([torch.cat(parts, 1), whole(given)], name + '/logits.pt')
print([name for name in sys.modules if name.startswith(('model_', 'mambino'))])
"""


def test_torchscript_needs_nothing_of_ours(tok, tmp_path):
    nets = {name: model(name, **KINDS[name]) for name in ('mamba1', 'hybrid-parallel')}
    given = tokens(3, sum(CUTS))
    for name, net in nets.items():
        os.mkdir(tmp_path / name)
        to_torchscript.write(net, tok, tmp_path / name, '')
        assert sorted(os.listdir(tmp_path / name)) == ['model.pt2', 'step.ts', 'tokenizer.json']
        assert all(p.requires_grad for p in net.parameters())
        torch.save(given, tmp_path / name / 'ids.pt')
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    command = [sys.executable, '-I', '-W', 'ignore', '-c', ALONE, json.dumps(list(nets))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == '[]', done.stderr
    for name, net in nets.items():
        want = net.step(given)[0]
        for got in torch.load(tmp_path / name / 'logits.pt'):
            assert_close(got, want, 1e-5)
    check = to_torchscript.verify(net, tok, tmp_path / name, '')
    assert check['ok'] and check['logits'] <= 1e-5 == check['limit'] and check['greedy'] == '64 of 64', check
