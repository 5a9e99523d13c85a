"""The GPT-like models that people have: each, with the flags of its published configs and small
sizes, gives transformers' logits here, and by steps what forward gives; others are refused by what
differs."""
import json
import re
import shutil

import pytest
import torch
from helpers import families
from helpers.models import V, assert_close, theirs, tokens

from mambino.sample import decode
from mambino.weights import dense, quantize
from mambino.weights import from_hf as hf
from model_gpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

SIZES = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    rms_norm_eps=1e-3, max_position_embeddings=256, attn_implementation='eager',
    pad_token_id=None, bos_token_id=None, eos_token_id=None)


def rope(kind, **keys):
    return dict(rope_type=kind, rope_theta=500.0, **keys)


LLAMA3 = rope(
    'llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32)
LLAMA32 = LLAMA3 | dict(factor=32.0)
PARTIAL = rope('default', partial_rotary_factor=0.75)
YARN = rope('yarn', factor=4.0, original_max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)
GRANITE = dict(
    embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22,
    logits_scaling=8.0)
BIASES = dict(attention_bias=True, mlp_bias=True)
SLIDES = dict(use_sliding_window=True, sliding_window=20)
FAMILIES = {
    'llama-3.1': ('Llama', dict(rope_parameters=LLAMA3, tie_word_embeddings=False)),
    'llama-3.2': ('Llama', dict(rope_parameters=LLAMA32, head_dim=32, tie_word_embeddings=True)),
    'llama-linear': ('Llama', dict(rope_parameters=rope('linear', factor=4.0))),
    'llama-yarn': ('Llama', dict(rope_parameters=YARN)),
    'llama-biases': ('Llama', BIASES),
    'qwen2.5': ('Qwen2', dict(tie_word_embeddings=True)),
    'qwen2.5-yarn': ('Qwen2', dict(rope_parameters=YARN | dict(attention_factor=1.3))),
    'qwen2-window': ('Qwen2', dict(SLIDES, max_window_layers=0)),
    'qwen3-biases': ('Qwen3', dict(attention_bias=True, head_dim=16)),
    'smollm3': ('SmolLM3', dict(no_rope_layer_interval=4, num_hidden_layers=5)),
    'smollm3-list': ('SmolLM3', dict(no_rope_layers=[0, 1], attention_bias=True)),
    'olmo2': ('Olmo2', {}),
    'olmo2-mha': ('Olmo2', dict(num_key_value_heads=4, attention_bias=True)),
    'phi-3': ('Phi3', dict(sliding_window=20)),
    'phi-4-partial': ('Phi3', dict(rope_parameters=PARTIAL)),
    'granite-3': ('Granite', dict(GRANITE, tie_word_embeddings=True)),
    'granite-biases': ('Granite', dict(GRANITE, **BIASES)),
    'qwen3-moe': ('Qwen3Moe', dict(EXPERTS, moe_intermediate_size=40, head_dim=16)),
    'olmoe': ('Olmoe', dict(EXPERTS, num_key_value_heads=4)),
}


def saved(name, folder):
    kind, keys = FAMILIES[name]
    keys = {**SIZES, 'rope_parameters': rope('default'), **keys}
    model = theirs(kind, keys)
    model.save_pretrained(folder)
    return model


def loaded(folder):
    """With places for all tokens in each expert, as transformers' models have."""
    return families.loaded(folder, capacity_factor=0)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """folders(name) → what transformers saved of this family, and its model; written once."""
    return families.written_once(tmp_path_factory, saved)


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, folders):
    folder, model = folders(name)
    idx = tokens(2, 83)
    want = model(idx).logits
    assert want.std() > 0.05
    assert_close(loaded(folder)(idx)[0], want, 1e-5 * want.std().item())


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_steps_give_what_forward_gives(name, folders):
    """A prompt, a few tokens, then one by one, by a plan where there can be one."""
    net = dense.read_few_rows(loaded(folders(name)[0]))
    idx = tokens(2, 70)
    want = net(idx)[0]
    pieces, state = [], None
    for piece in idx.split((30, 7, *[1] * 33), 1):
        logits, state = decode.step(net, piece, state)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), want, 1e-5 * want.std().item())
    has_plan = decode.ready(net, idx[:, :1], state, 0) is not None
    assert has_plan == (not net.config.mlp_bias and decode.cpu.applies(idx))


@torch.no_grad()
def test_a_prompt_and_a_token_of_a_quantized_model_have_its_biases(folders):
    net = loaded(folders('qwen2.5')[0])
    for name, p in net.named_parameters():
        if name.endswith('.bias'):
            p.mul_(3)                       # so that nobody can overlook them
    idx = tokens(2, 40)
    want = net(idx)[0]
    quantize.quantize_model(net, 'int8')
    assert {name for name in net.state_dict() if name.endswith('.bias')} == {
        f'model.layers.{i}.self_attn.{p}_proj.bias' for i in range(2) for p in 'qkv'}
    got, state = decode.step(net, idx[:, :39])
    assert_close(got, want[:, :39], 0.2 * want.std().item())
    assert_close(decode.step(net, idx[:, 39:], state)[0], want[:, 39:], 0.2 * want.std().item())


def test_biases_begin_at_zero_and_do_not_decay():
    biased = dict(qkv_bias=True, o_bias=True, mlp_bias=True)
    net = GPT(GPTConfig(vocab_size=V, n_layer=1, n_embd=32, n_head=2, **biased))
    biases = {name: p for name, p in net.named_parameters() if name.endswith('bias')}
    assert len(biases) == 7 and not any(p.any() for p in biases.values())
    for muon in (False, True):
        for group in net.optim_groups(0.1, muon):
            of_biases = [p for p in group['params'] if any(p is bias for bias in biases.values())]
            assert not of_biases or (group['weight_decay'], group['kind']) == (0, 'adamw')


@pytest.fixture
def to_ours(folders):
    """to_ours(name, …) → the fields that a family's config.json gives, with some keys changed."""
    def to_ours(name, remove=(), **changes):
        config = json.loads((folders(name)[0] / 'config.json').read_text())
        config = {key: value for key, value in config.items() if key not in remove}
        return hf.to_ours({**config, **changes})[1]
    return to_ours


def test_configs_of_older_transformers(to_ours):
    """Before transformers 5 rope_theta is a key of its own, and rope_scaling says the rest."""
    for name in ('llama-3.1', 'llama-yarn', 'llama-linear'):
        old = dict(FAMILIES[name][1]['rope_parameters'])
        theta, kind = old.pop('rope_theta'), old.pop('rope_type')
        old = dict(rope_theta=theta, rope_scaling=old | dict(type=kind))
        assert to_ours(name, ['rope_parameters'], **old) == to_ours(name)
    plain = to_ours('llama-linear', ['rope_parameters'], rope_theta=500.0)
    assert to_ours('llama-linear', rope_parameters=rope('linear', factor=1.0)) == plain
    partial = dict(rope_theta=500.0, partial_rotary_factor=0.75)
    assert to_ours('phi-4-partial', ['rope_parameters'], **partial)['rope_dim'] == 12
    assert to_ours('smollm3', ['rope_parameters', 'no_rope_layers'])['rope_layers'] == '1110'
    assert to_ours('smollm3', ['rope_parameters'])['rope_theta'] == 2e6
    for full, window in ((-1, 20), (0, 20), (2, 0)):
        assert to_ours('qwen2-window', ['layer_types'], max_window_layers=full)['window'] == window


def test_yarn_is_as_sharp_as_it_says(to_ours):
    """attention_factor, or what DeepSeek's two shares come to; the length it was first trained on is
    that of the model if not said."""
    def fields(**keys):
        return to_ours('llama-yarn', rope_parameters=rope('yarn', **keys))
    assert fields(factor=4.0)['rope_length'] == 256
    assert fields(factor=4.0, attention_factor=0.7)['rope_amplitude'] == 0.7
    assert fields(factor=4.0, mscale=0.8, mscale_all_dim=0.8)['rope_amplitude'] == 1
    assert fields(original_max_position_embeddings=64)['rope_factor'] == 4
    usual = fields(factor=4.0)
    assert abs(usual['rope_amplitude'] - 1.1386294) < 1e-6
    assert (usual['rope_slow'], usual['rope_fast']) == (1, 32)


@pytest.mark.parametrize('name, changes, says', [
    ('llama-3.1', dict(rope_parameters=rope('dynamic', factor=2.0)), 'dynamic changes the rotary'),
    ('phi-3', dict(rope_parameters=rope('longrope', factor=2.0)), 'longrope changes the rotary'),
    ('phi-3', dict(rope_parameters=rope('yarn', factor=2.0)), 'longrope changes the rotary'),
    ('llama-3.1', dict(rope_parameters=rope('mrope')), 'none of default, linear, llama3, yarn'),
    ('llama-3.1', dict(rope_parameters=[1]), r'rope_parameters=\[1\]: must say'),
    ('llama-3.1', dict(rope_parameters=dict(full_attention=PARTIAL)), 'have all the same rotary'),
    ('llama-3.1', dict(rope_parameters=rope('llama3', factor=2.0)), 'low_freq_factor is missing'),
    ('llama-yarn', dict(rope_parameters=YARN | dict(truncate=False)), 'truncate=false'),
    ('smollm3', dict(no_rope_layers=[1, 2, 1, 1, 1]), 'must be 5 ones and zeros'),
    ('smollm3', dict(SLIDES, layer_types=None), 'all the same window'),
    ('smollm3', dict(no_rope_layers=None, num_hidden_layers=2**31 - 1), 'more layers than any model'),
    ('smollm3', dict(layer_types=['sliding_attention'] * 5), 'all the same window'),
    ('qwen2.5', dict(SLIDES, max_window_layers=1, layer_types=None), 'max_window_layers=1'),
    ('granite-3', dict(logits_scaling=0), 'logits_scaling=0: must not be 0'),
    ('olmoe', dict(clip_qkv=8.0), 'clip_qkv=8.0: our models do not limit'),
    ('llama-3.1', dict(model_type='gemma3_text'), 'GELU in the place of SiLU'),
    ('llama-3.1', dict(model_type='gpt2'), 'learned positions.*LayerNorm.*GELU'),
    ('llama-3.1', dict(model_type='gpt_neox'), 'side by side.*LayerNorm'),
    ('llama-3.1', dict(model_type='rwkv'), 'a recurrence'),
    ('llama-3.1', dict(model_type='qwen2_moe'), 'every token takes'),
])
def test_what_differs_is_said(name, changes, says, to_ours):
    with pytest.raises(ValueError, match=says):
        to_ours(name, **changes)


def test_every_refused_family_is_refused_by_its_own_reason():
    assert not set(hf.REFUSED) & set(hf.FAMILIES)
    for family, reason in hf.REFUSED.items():
        with pytest.raises(ValueError, match=re.escape(reason)):
            hf.to_ours(dict(model_type=family))


def test_granite_says_what_becomes_of_its_multipliers(folders, capsys):
    hf.say_once.cache_clear()
    hf.load_hf(folders('granite-3')[0])
    assert 'its multipliers become part of the weights' in capsys.readouterr().err
    hf.load_hf(folders('qwen2.5')[0])
    assert 'note' not in capsys.readouterr().err


def test_a_tensor_without_a_dimension_is_said(folders, tmp_path, capsys):
    safetensors = pytest.importorskip('safetensors.torch')
    folder, _ = folders('olmoe')
    weights = safetensors.load_file(folder / 'model.safetensors')
    weights['model.layers.0.mlp.gate.weight'] = torch.tensor(1.0)
    shutil.copyfile(folder / 'config.json', tmp_path / 'config.json')
    safetensors.save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(SystemExit):
        hf.load_hf(tmp_path)
    assert 'not of the shapes that belong together' in capsys.readouterr().err


@pytest.mark.parametrize('changes, says', [
    (dict(rope_scaling='ntk'), 'rope_scaling='),
    (dict(rope_scaling='yarn'), 'rope_length=0 must be at least 1'),
    (dict(rope_factor=0.0), 'must be more than 0'),
    (dict(rope_slow=4.0), 'rope_fast more'),
    (dict(rope_dim=3), 'rope_dim=3 must be even'),
    (dict(rope_dim=18), 'at most 16'),
    (dict(rope_layers='12'), "rope_layers='12'"),
    (dict(qk_norm_whole=True), 'without qk_norm'),
    (dict(n_expert=4, mlp_bias=True), 'experts have no mlp_bias'),
    (dict(n_expert=4, norm_after=True), 'no norm_after'),
])
def test_configs_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        GPTConfig(n_embd=32, n_head=2, **changes)
