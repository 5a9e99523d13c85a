"""A hybrid of Gated DeltaNet in other tools' formats: transformers' own class or a modelling file, and graphs."""
import pytest
import torch
from helpers.models import HYBRID_SIZE, assert_close, perturb, tokens

from mambino.export import graph_scans, to_gguf, to_hf
from mambino.export.graphs import FullGraph, Graph
from mambino.weights import from_hf
from mambino.weights.tensor_files import read_safetensors
from model_hybrid import Hybrid, HybridConfig, delta_scan

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

SIZE = dict(HYBRID_SIZE, vocab_size=97, norm_eps=1e-3, block_size=50, rope_theta=500.0)
PLAIN = dict(SIZE, gate=False, branch_norm=False, window=0, qk_norm=True)
CASES = {       # the class that it must become, its config
    'gated': ('Qwen3_5', dict(PLAIN, layers='dda', n_layer=3, n_kv_head=2, attention_gate=True, rope_dim=4,
                              embed_norm=False, key_heads=2, tie_embeddings=False)),
    'not gated': ('Qwen3_5', dict(PLAIN, layers='ad', conv_kernel=3, ssm_inner_size=48)),
    'norms': ('Mambino', dict(SIZE, layers='da', attention_gate=True, key_heads=2, delta_max=2.0)),
    'low rank': ('Mambino', dict(PLAIN, layers='dmb', n_layer=3, low_rank=8, attention_gate=True)),
}


def build(name):
    return perturb(Hybrid(HybridConfig(**CASES[name][1]))).eval()


@pytest.fixture
def transformers(own_code):
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers, 'Qwen3_5ForCausalLM'):
        pytest.skip('this transformers has no Qwen3.5')
    transformers.utils.logging.set_verbosity_error()
    return transformers


@pytest.mark.parametrize('name', CASES)
def test_transformers_computes_the_same(name, tmp_path, transformers):
    net = build(name)
    to_hf.write(net, None, tmp_path)
    check = to_hf.verify(net, None, tmp_path)
    assert check['note'] == f'opened as {CASES[name][0]}ForCausalLM'
    assert check['ok'] and check['logits'] <= 1e-5 and check['greedy'] == '64 of 64', check


@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_it_comes_back(name, tmp_path):
    """And goes out as it came in."""
    net, idx = build(name), tokens(2, 70)
    folders = tmp_path / 'first', tmp_path / 'again'
    for folder in folders:
        folder.mkdir()
        to_hf.write(net, None, folder)
        kind, config, weights, _ = from_hf.load_hf(folder)
        again = Hybrid(HybridConfig(**config)).eval()
        again.load_state_dict(weights)
        assert kind == 'hybrid'
        assert_close(again(idx)[0], net(idx)[0], 1e-5)
        net = again
    out = [dict(read_safetensors(folder / 'model.safetensors')) for folder in folders]
    assert out[0].keys() == out[1].keys() and all(torch.equal(out[0][key], out[1][key]) for key in out[0])


@torch.no_grad()
def test_padding_leaves_the_state_of_the_modelling_file(tmp_path, transformers):
    net = build('norms')
    to_hf.write(net, None, tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    idx = tokens(1, 30)
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), idx), 1)
    mask = torch.cat((torch.zeros(1, 7, dtype=torch.long), torch.ones_like(idx)), 1)
    assert_close(opened(padded, attention_mask=mask).logits[:, 7:], net(idx)[0], 1e-5)


@pytest.mark.parametrize('scripted', [False, True])
@torch.no_grad()
def test_a_graph_computes_the_same(scripted):
    net, idx = build('norms'), tokens(2, 40)
    want = net(idx)[0]
    graph = Graph(net, scripted)
    logits, past = graph(idx[:, :23], graph.empty(2))
    pieces = [logits]
    for t in range(23, 40):
        logits, past = graph(idx[:, t:t + 1], past)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), want, 1e-5)
    assert_close(FullGraph(net)(idx), want, 1e-5)


@torch.no_grad()
def test_an_exported_graph_takes_any_number_of_tokens():
    class Scan(torch.nn.Module):
        def forward(self, qkv, log_decay, beta, state):
            return graph_scans.delta_scan(qkv, log_decay, beta, 2, 8, 16, state)

    def inputs(T):
        return torch.randn(2, T, 80), -torch.rand(2, T, 4), torch.rand(2, T, 4), torch.randn(2, 4, 8, 12)
    T = torch.export.Dim('T', min=2, max=99)
    exported = torch.export.export(Scan(), inputs(5), dynamic_shapes=({1: T}, {1: T}, {1: T}, None)).module()
    qkv, log_decay, beta, state = inputs(21)
    for got, want in zip(exported(qkv, log_decay, beta, state),
                         delta_scan.definition(qkv, log_decay, beta, 2, 8, 16, state)):
        assert_close(got, want, 1e-5)


def test_llama_cpp_is_refused(tmp_path):
    pytest.importorskip('gguf')
    with pytest.raises(ValueError, match='layers=ad: Gated DeltaNet is not written for llama.cpp'):
        to_gguf.write(build('not gated'), None, tmp_path)
