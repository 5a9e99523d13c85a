"""The GPT-like models that people have, on their way out: read, tuned a few steps, and written as the
class of transformers, or the model of llama.cpp, that computes the same; what none has is refused."""
import copy

import pytest
import torch
from helpers.models import V, assert_close, tokens
from test_families_gpt import FAMILIES, loaded, saved

from mambino.export import compare, gguf_model, graphs, to_gguf, to_hf, to_peft
from mambino.train.building import build_optimizers
from mambino.weights import adapters, from_peft
from mambino.weights import from_hf as hf
from model_gpt import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.usefixtures('quiet_and_seeded')
CLASSES = {     # as which a family goes out; others as themselves
    'phi-3': 'MistralForCausalLM', 'phi-4-partial': 'Phi3ForCausalLM',
    'granite-3': 'LlamaForCausalLM', 'granite-biases': 'LlamaForCausalLM'}


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """tuned(name) → a model of this family after three steps of training."""
    made = {}

    @torch.enable_grad()
    def tune(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            saved(name, folder)
            made[name] = net = loaded(folder).train()
            before = {key: p.clone() for key, p in net.state_dict().items()}
            optimizers = build_optimizers(net, 'muon', 1e-3)
            for _ in range(3):
                idx = tokens(2, 33)
                net(idx[:, :-1], idx[:, 1:])[1].backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            assert not [key for key, p in net.eval().state_dict().items() if torch.equal(p, before[key])]
        return made[name]
    return tune


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_read_tuned_written_and_read_again(name, tuned, tmp_path):
    net = tuned(name)
    to_hf.write(net, None, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model).__name__ == CLASSES.get(name, FAMILIES[name][0] + 'ForCausalLM')
    idx = tokens(2, 83)
    want = net(idx)[0]
    assert_close(model(idx).logits, want, 1e-5 * want.std().item())
    _, config, weights, _ = hf.load_hf(tmp_path)
    assert config | dict(capacity_factor=0) == vars(net.config)
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[key], p) for key, p in net.state_dict().items())


def test_a_check_of_transformers_is_passed(tuned, tmp_path):
    net = tuned('smollm3')
    to_hf.write(net, None, tmp_path)
    found = to_hf.verify(net, None, tmp_path)
    assert found['ok'] and found['greedy'] == '64 of 64', found


def test_biases_that_no_class_leaves_out_are_zero(tmp_path):
    net = GPT(GPTConfig(vocab_size=V, n_layer=1, n_embd=32, n_head=2, block_size=50, o_bias=True)).eval()
    torch.nn.init.normal_(net.model.layers[0].self_attn.o_proj.bias)
    to_hf.write(net, None, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = tokens(2, 20)
    with torch.no_grad():
        assert_close(model(idx).logits, net(idx)[0], 1e-5)
    assert model.config.attention_bias and not model.model.layers[0].self_attn.q_proj.bias.any()


def gpt(**settings):
    return GPT(GPTConfig(vocab_size=V, n_layer=2, n_embd=32, n_head=2, block_size=64, **settings))


@pytest.mark.parametrize('settings, says', [
    (dict(qk_norm=True, mlp_bias=True), 'transformers has no model with mlp_bias, qk_norm together'),
    (dict(norm_after=True), 'transformers has no model with norm_after together'),
    (dict(rope_layers='10', window=8), 'rope_layers, window together'),
    (dict(rope_scaling='linear', rope_factor=2.0, rope_amplitude=1.1), 'rope_amplitude, rope_scaling'),
    (dict(n_expert=2, norm_topk=False), 'n_expert, norm_topk=False'),
])
def test_what_no_class_of_transformers_is(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        to_hf.write(gpt(**settings), None, tmp_path)


ARCHITECTURES = {
    'llama-3.1': 'llama', 'llama-yarn': 'llama', 'llama-biases': 'llama', 'qwen2.5': 'qwen2',
    'qwen2.5-yarn': 'qwen2', 'smollm3': 'smollm3', 'olmo2': 'olmo2', 'phi-3': 'mimo2',
    'phi-4-partial': 'llama', 'granite-biases': 'llama', 'olmoe': 'olmoe'}


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_gguf(name, tuned, tmp_path, monkeypatch):
    """By llama.cpp itself; its logits alone are compared, of the fewest positions there can be."""
    pytest.importorskip('gguf')
    net = tuned(name)
    monkeypatch.setattr(to_gguf, 'VALUES', 0)
    to_gguf.write(net, None, tmp_path)
    found = to_gguf.verify(net, None, tmp_path)
    assert found['ok'], found
    assert gguf_model.to_llama_cpp(net).architecture == ARCHITECTURES[name]


@pytest.mark.parametrize('settings, says', [
    (dict(qk_norm=True, qkv_bias=True), 'llama.cpp has no model with qk_norm, qkv_bias together'),
    (dict(rope_layers='10'), 'rope_layers=10; --format=hf'),
    (dict(qk_norm=True, rope_scaling='llama3', rope_length=32), 'no rope_scaling=llama3.*arch qwen3'),
    (dict(n_expert=2, qk_norm=True, norm_topk=False), 'n_expert, norm_topk=False, qk_norm together'),
    (dict(n_expert=2, qk_norm=True, qk_norm_whole=True, norm_topk=False, n_kv_head=1), 'n_kv_head=1'),
])
def test_what_no_model_of_llama_cpp_is(settings, says):
    with pytest.raises(ValueError, match=says):
        gguf_model.to_llama_cpp(gpt(**settings))


@pytest.mark.parametrize('name', ['llama-yarn', 'smollm3', 'olmo2', 'qwen3-moe'])
@torch.no_grad()
def test_graphs(name, tuned):
    """A graph, of which ONNX and TorchScript are made, gives what forward gives."""
    net = tuned(name)
    idx = tokens(2, 40)
    want = net(idx)[0]
    graph = graphs.Graph(net)
    got = compare.step_by_step(idx, graph.empty, graph)
    assert_close(got, want, 1e-5 * want.std().item())


@torch.no_grad()
def test_a_prefix_of_peft_has_its_keys_in_our_order(tuned, tmp_path):
    """Of Phi-4-mini's heads the numbers that turn come first there; both ways."""
    peft = pytest.importorskip('peft')
    net = tuned('phi-4-partial')
    to_hf.write(net, None, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=7)).eval()
    for p in (p for p in model.parameters() if p.requires_grad):
        p.normal_(std=0.5)
    model.save_pretrained(tmp_path / 'prefix')
    idx = tokens(2, 40)
    want = model(idx).logits
    adapter = from_peft.read_peft(tmp_path / 'prefix')
    tuned_net = adapters.attach_adapter(copy.deepcopy(net), adapter)
    assert (want - net(idx)[0]).abs().max() > 0.1
    assert_close(tuned_net(idx)[0], want, 1e-5)
    ckpt = dict(kind='gpt', config=vars(net.config), adapter=adapter['adapter'],
                weights=adapters.adapter_state(tuned_net, 'prefix'))
    to_peft.write(tuned_net, None, tmp_path, ckpt=ckpt, base='base')
    again = from_peft.read_peft(tmp_path)
    assert all(torch.equal(again['weights'][name], tensor) for name, tensor in adapter['weights'].items())


def test_an_adapter_of_folded_multipliers_has_another_base(tuned, tmp_path):
    """Beside Granite itself it would be another adapter, and nobody would see it."""
    saved('granite-3', tmp_path / 'granite')
    net = adapters.add_lora(copy.deepcopy(tuned('granite-3')), 'q_proj')
    spec = dict(type='lora', rank=8, alpha=16.0, dropout=0.0, targets='q_proj')
    ckpt = dict(kind='gpt', config=vars(net.config), adapter=spec, weights=adapters.adapter_state(net, 'default'))
    for base in (tmp_path / 'granite', f'hf:{tmp_path}/granite'):
        with pytest.raises(ValueError, match='granite is a granite, .* name with --base the folder'):
            to_peft.write(net, None, tmp_path, ckpt=ckpt, base=base)
    to_peft.write(net, None, tmp_path, ckpt=ckpt, base=tmp_path)


def test_an_adapter_of_fused_matrices_is_refused(tuned, tmp_path):
    """Phi-3 has q, k and v in one matrix, gate and up in another."""
    net = adapters.add_lora(tuned('phi-4-partial'), 'q_proj,o_proj')
    weights = adapters.adapter_state(net, 'default')
    spec = dict(type='lora', rank=8, alpha=16.0, dropout=0.0, targets='q_proj,o_proj')
    ckpt = dict(kind='gpt', config=vars(net.config), adapter=spec, weights=weights)
    with pytest.raises(ValueError, match='q_proj.*merged model'):
        to_peft.write(net, None, tmp_path, ckpt=ckpt, base='base')
