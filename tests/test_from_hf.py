"""from_hf.py: what transformers saved gives its logits here, in every form it is saved in; all else is
refused in one line."""
import importlib
import json
import os
import re
import shutil
import sys

import pytest
import torch
from helpers.models import LLAMA, PEERS, V, assert_close, theirs, tokens

from mambino import tokenizer
from mambino.weights import checkpoint, tensor_files
from mambino.weights import from_hf as hf
from model_gpt import GPTConfig

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

MIXTRAL = 'Mixtral', dict(
    LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=20, attn_implementation='eager')
QWEN3_MOE = 'Qwen3Moe', dict(
    LLAMA, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=40, norm_topk_prob=True,
    use_sliding_window=True, sliding_window=20, attn_implementation='eager')
SOURCES = {name: peer[:2] for name, peer in PEERS.items() if 'mixtral' not in name}
SOURCES['qwen3-window'] = 'Qwen3', dict(
    LLAMA, head_dim=16, use_sliding_window=True, sliding_window=20, max_window_layers=0,
    attn_implementation='eager')
NORM, FILE = 'model.norm.weight', 'model.safetensors'
HAS_EXPERTS = 'n_expert' in GPTConfig.__dataclass_fields__
UNLIMITED = dict(capacity_factor=0)  # the settings with which no expert ever drops a token


def assert_same_logits(folder, model):
    """What hf.load_hf makes of the folder computes what their model does; returns its config."""
    kind, config, weights, _ = hf.load_hf(folder)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    if config.get('n_expert'):
        config = {**config, **UNLIMITED}
    ours = checkpoint.build(kind, config).eval()
    ours.load_state_dict(weights, strict=True)
    idx = tokens(2, 83)
    with torch.no_grad():
        want = model.float()(idx).logits
        assert want.std() > 0.3  # else closeness would mean little
        assert_close(ours(idx)[0], want)
    return config


def edit(folder, remove=(), **changes):
    """Changes keys of a folder's config.json."""
    path = os.path.join(folder, 'config.json')
    with open(path) as f:
        config = json.load(f)
    with open(path, 'w') as f:
        changed = {**config, **changes}
        json.dump({key: value for key, value in changed.items() if key not in remove}, f)


def truncate(path, size):
    with open(path, 'r+b') as f:
        f.truncate(size)


def change_header(folder, change):
    """Rewrites the header of a model.safetensors by change(header)."""
    path = folder / FILE
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data[end:])


def save_bin(folder, state, shards):
    """state as pytorch_model.bin, or in so many files with an index."""
    names = sorted(state)
    files = {name: f'pytorch_model-{i % shards}.bin' if shards > 1 else 'pytorch_model.bin'
             for i, name in enumerate(names)}
    for file in set(files.values()):
        tensors = {name: state[name] for name in names if files[name] == file}
        torch.save(tensors, os.path.join(folder, file))
    if shards > 1:
        with open(os.path.join(folder, 'pytorch_model.bin.index.json'), 'w') as f:
            json.dump({'weight_map': files}, f)


@pytest.mark.parametrize('name', SOURCES)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = theirs(*SOURCES[name])
    model.save_pretrained(tmp_path)
    config = assert_same_logits(tmp_path, model)
    assert config['block_size'] == getattr(model.config, 'max_position_embeddings', 1024)


@pytest.mark.parametrize('name', ['qwen3-untied', 'mamba2'])
@pytest.mark.parametrize('form', ['sharded', 'bfloat16', 'float16', 'float64', 'bin', 'bin-sharded'])
def test_forms_on_disk(form, name, tmp_path):
    model = theirs(*SOURCES[name], dtype=getattr(torch, form, torch.float32))
    model.save_pretrained(tmp_path, max_shard_size='20KB' if form == 'sharded' else '1GB')
    if form.startswith('bin'):
        os.remove(tmp_path / FILE)
        save_bin(tmp_path, model.state_dict(), 3 if form == 'bin-sharded' else 1)
    assert len(os.listdir(tmp_path)) > (4 if 'sharded' in form else 1)
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize('original_names', [True, False])
@pytest.mark.parametrize('shard', ['20KB', '1GB'])
@pytest.mark.parametrize('source', [MIXTRAL, QWEN3_MOE], ids=['mixtral', 'qwen3_moe'])
def test_experts_are_stacked(source, shard, original_names, tmp_path):
    model = theirs(*source)
    model.save_pretrained(tmp_path, max_shard_size=shard, save_original_format=original_names)
    weights = hf.read_weights(tmp_path)
    assert original_names == any('experts.3.' in name for name in weights)
    family, config = hf.family_of(json.loads((tmp_path / 'config.json').read_text()))
    family.convert(weights, config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.pop(name, model.lm_head.weight), tensor), name
    assert not weights
    kind, config = hf.to_ours(json.loads((tmp_path / 'config.json').read_text()))
    got = kind, config['n_expert'], config['n_expert_active'], config['window']
    assert got == ('gpt', 4, 2 if source is MIXTRAL else 3, 20)
    if HAS_EXPERTS:
        assert_same_logits(tmp_path, model)


@pytest.mark.parametrize('name', ['mamba1', 'mamba2'])
def test_original_checkpoints_of_mamba(name, tmp_path):
    """Their vocabulary is padded, the embedding has another name, a missing setting another default."""
    kind, settings = SOURCES[name]
    settings = {**settings, 'layer_norm_epsilon': 1e-5, 'n_groups': 1}
    model = theirs(kind, settings)
    model.resize_token_embeddings(112)
    state = {key.replace('embeddings', 'embedding'): tensor
             for key, tensor in model.state_dict().items()}
    save_bin(tmp_path, state, 1)
    ssm = {'layer': 'Mamba2', 'd_state': 16, 'headdim': 12, 'chunk_size': 8} if name == 'mamba2' else {}
    config = dict(d_model=72, n_layer=2, vocab_size=V, ssm_cfg=ssm, rms_norm=True, fused_add_norm=True,
                  pad_vocab_size_multiple=16)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert assert_same_logits(tmp_path, model)['vocab_size'] == 112
    edit(tmp_path, ssm_cfg={'layer': 'Mamba3'})
    with pytest.raises(SystemExit):
        hf.load_hf(tmp_path)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """saved(name) → a folder with this model, written once and not to be changed."""
    folders = {}

    def save(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            sources = {'mixtral': MIXTRAL, 'qwen3_moe': QWEN3_MOE, **SOURCES}
            theirs(*sources[name]).save_pretrained(folders[name])
        return folders[name]
    return save


@pytest.fixture
def copy(saved, tmp_path):
    """copy(name) → such a folder of one's own."""
    return lambda name: shutil.copytree(saved(name), tmp_path / name)


@pytest.fixture
def refusal(capsys):
    """refusal(folder) → the line with which hf.load_hf ends the program."""
    def refusal(folder):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            hf.load_hf(folder)
        text = capsys.readouterr().err
        assert stopped.value.code == 2 and text.startswith('error: ') and text.count('\n') == 1, text
        return text
    return refusal


def test_needs_neither_transformers_nor_safetensors(saved, monkeypatch):
    folder = saved('llama')
    for name in ('transformers', 'safetensors', 'huggingface_hub'):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    importlib.reload(tensor_files)
    assert importlib.reload(hf).load_hf(folder)[0] == 'gpt'


def test_configs_of_older_transformers(copy):
    folder = copy('llama')
    new = hf.load_hf(folder)[1]
    assert new['rope_theta'] == 500
    edit(folder, remove=['rope_parameters', 'head_dim', 'attention_bias', 'mlp_bias'], rope_theta=500.0,
         rope_scaling=None)
    assert hf.load_hf(folder)[1] == new
    edit(folder, remove=['rope_theta'])
    assert hf.load_hf(folder)[1] == {**new, 'rope_theta': 10000}
    folder = copy('mamba2')
    new = hf.load_hf(folder)[1]
    edit(folder, time_step_limit=[0.0, float('inf')], rms_norm=True, norm_before_gate=False,
         time_step_rank='auto')
    assert hf.load_hf(folder)[1] == new


def test_old_names_and_tables(copy):
    folder = copy('mistral')
    want = hf.load_hf(folder)[2]
    os.remove(folder / FILE)
    save_bin(folder, {**want, 'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(8)}, 1)
    got = hf.load_hf(folder)[2]
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_tensors_in_any_order_in_the_file(copy):
    folder = copy('llama')
    want = hf.load_hf(folder)[2]

    def turn_round(header):
        for name in reversed(list(header)):
            header[name] = header.pop(name)
    change_header(folder, turn_round)
    got = hf.load_hf(folder)[2]
    assert list(got)[:3] != list(want)[:3]
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_tokenizer(copy, refusal):
    folder = copy('llama')
    assert hf.load_hf(folder)[3] is None
    tok = tokenizer.build_tokenizer('char', ['the quick brown fox'])
    tok.save(folder)
    assert hf.load_hf(folder)[3].sha256() == tok.sha256()  # of fewer ids than the model
    tokenizer.build_tokenizer('byte').save(folder)
    assert '257 ids' in refusal(folder) and f'vocab_size={V}' in refusal(folder)
    (folder / 'tokenizer.json').write_text('{"model": 1}')
    assert 'tokenizer.json: cannot be used' in refusal(folder)


FULL, SLIDING = ['full_attention'] * 2, ['sliding_attention'] * 2


@pytest.mark.parametrize('family, keys, window', [
    ('llama', dict(sliding_window=20), 0),  # which transformers' Llama does not look at
    ('mistral', {}, 4096),
    ('mistral', dict(sliding_window=None), 0),
    ('mistral', dict(sliding_window=20, layer_types=SLIDING), 20),
    ('mixtral', {}, 0),
    ('mixtral', dict(sliding_window=20), 20),
    ('qwen3_moe', dict(sliding_window=20, norm_topk_prob=True), 0),
    # of every layer
    ('qwen3_moe', dict(sliding_window=20, norm_topk_prob=True, use_sliding_window=True,
                       max_window_layers=28), 20),
    ('qwen3', dict(sliding_window=20, max_window_layers=0), 0),
    ('qwen3', dict(sliding_window=20, use_sliding_window=False, layer_types=FULL), 0),
    ('qwen3', dict(sliding_window=20, use_sliding_window=True), 0),  # from layer 28 on
    ('qwen3', dict(sliding_window=20, use_sliding_window=True, max_window_layers=0), 20),
    ('qwen3', dict(sliding_window=20, use_sliding_window=True, max_window_layers=0, layer_types=FULL), 0),
    ('qwen3', dict(sliding_window=20, use_sliding_window=True, layer_types=SLIDING), 20),
    ('qwen3', dict(use_sliding_window=True, max_window_layers=0), 4096),
    ('qwen2', dict(sliding_window=20), 0),
    ('qwen2', dict(sliding_window=20, use_sliding_window=True, max_window_layers=0), 20),
    ('phi3', dict(sliding_window=20), 20),
    ('phi3', {}, 0),
])
def test_windows(family, keys, window):
    sizes = dict(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=50)
    assert hf.to_ours({'model_type': family, **sizes, **keys})[1]['window'] == window


SCALED = {'rope_type': 'dynamic', 'rope_theta': 500.0, 'factor': 2.0}
HALF = {'rope_type': 'default', 'rope_theta': 500.0, 'partial_rotary_factor': 0.5}


@pytest.mark.parametrize('name, changes, says', [
    ('llama', dict(model_type='unheard_of'), 'model_type="unheard_of": supported are llama, '),
    ('llama', dict(model_type='lfm2'), 'model_type="lfm2": its layers without attention are short'),
    ('llama', dict(model_type='mambino_hybrid', gate='yes'), 'gate="yes": must be true or false'),
    ('llama', dict(model_type='mambino_hybrid', layout=3), 'layout=3: must be a string'),
    ('llama', dict(model_type='mambino_hybrid', layout='serial'), "layout='serial' must be"),
    ('llama', dict(model_type='mambino_hybrid', window=1.5), 'window=1.5: must be a whole number'),
    ('llama', dict(model_type=None), 'model_type=null'),
    ('llama', dict(rope_parameters=SCALED), 'rope_parameters={"rope_type": "dynamic".*grows long'),
    ('llama', dict(rope_scaling={'type': 'longrope'}), 'rope_scaling={"type": "longrope"'),
    ('llama', dict(rope_parameters=HALF), 'rope_parameters=.*0.5.*whole heads'),
    ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    ('llama', dict(attention_bias=1.5), 'attention_bias=1.5: must be true or false'),
    ('mistral', dict(attention_bias=True), 'attention_bias=true'),
    ('qwen3', dict(mlp_bias=True), 'mlp_bias=true'),
    ('llama', dict(hidden_act='gelu'), 'hidden_act="gelu"'),
    ('llama', dict(quantization_config={'bits': 4}), 'quantization_config={"bits": 4}'),
    ('llama', dict(layer_types=['sliding_attention'] * 2), 'layer_types'),
    ('llama', dict(hidden_size=None), 'hidden_size is missing'),
    ('llama', dict(hidden_size='64'), 'hidden_size="64": must be a whole number'),
    ('llama', dict(num_hidden_layers=1.5), 'num_hidden_layers=1.5'),
    ('llama', dict(num_key_value_heads=3), 'n_kv_head=3'),
    ('llama', dict(tie_word_embeddings='yes'), 'tie_word_embeddings="yes"'),
    ('mistral', dict(layer_types=['full_attention', 'sliding_attention']),
     'layer_types=.*sliding_window is 20'),
    ('qwen3', dict(layer_types=['full_attention', 'sliding_attention']), 'layer_types'),
    ('qwen3', dict(layer_types=['sliding_attention'] * 2), 'layer_types.*sliding_window is not used'),
    ('qwen3', dict(layer_types=None, use_sliding_window=True, sliding_window=20, max_window_layers=1),
     'max_window_layers=1'),
    ('mixtral', dict(num_local_experts='four'), 'num_local_experts="four"'),
    ('qwen3_moe', dict(norm_topk_prob='no'), 'norm_topk_prob="no"'),
    ('qwen3_moe', dict(decoder_sparse_step=2), 'decoder_sparse_step=2'),
    ('qwen3_moe', dict(mlp_only_layers=[0]), r'mlp_only_layers=\[0\]'),
    ('mamba1', dict(use_bias=True), 'use_bias=true'),
    ('mamba1', dict(use_conv_bias=False), 'use_conv_bias=false'),
    ('mamba1', dict(hidden_act='relu'), 'hidden_act="relu"'),
    ('mamba2', dict(use_bias=True), 'use_bias=true'),
    ('mamba2', dict(use_conv_bias=False), 'use_conv_bias=false'),
    ('mamba2', dict(time_step_limit=[0.0, 0.1]), r'time_step_limit=\[0.0, 0.1\]'),
    ('mamba2', dict(time_step_limit=[0.001, {'__float__': 'Infinity'}]),
     r'time_step_limit=\[0.001, Infinity\]'),
    ('mamba2', dict(head_dim=7), 'head_dim'),
])
def test_what_our_models_cannot_be(name, changes, says, copy, refusal):
    folder = copy(name)
    edit(folder, **changes)
    line = refusal(folder)
    assert 'config.json: ' in line
    assert re.search(says, line), line


def test_what_a_missing_key_stands_for():
    """transformers' Qwen3Moe does not make the weights of a token's experts sum to 1 unless it is told to."""
    config = dict(model_type='qwen3_moe', vocab_size=V, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                  max_position_embeddings=50)
    assert hf.to_ours({**config, 'norm_topk_prob': True})[1]['norm_topk']
    kind, ours = hf.to_ours(config)
    assert kind == 'gpt' and (ours['n_expert'], ours['n_expert_active'], ours['norm_topk']) == (128, 8, False)
    assert (ours['intermediate_size'], ours['norm_eps']) == (768, 1e-6)


DAMAGES = {
    'config.json: no such file': lambda d: os.remove(d / 'config.json'),
    'config.json: cannot be read': lambda d: truncate(d / 'config.json', 50),
    'config.json: not a JSON object': lambda d: (d / 'config.json').write_text('[]'),
    'holds no weights, none of model.safetensors': lambda d: os.remove(d / FILE),
    'model.safetensors: cannot be read: cut short, or damaged: its tensors have 271872 bytes, and there are 271871':
        lambda d: truncate(d / FILE, os.path.getsize(d / FILE) - 1),
    'model.safetensors: cannot be read: no safetensors file, or cut short':
        lambda d: truncate(d / FILE, 100),
    'model.safetensors: cannot be read: no safetensors': lambda d: truncate(d / FILE, 0),
    'model.norm.weight has dtype F8_E4M3':
        lambda d: change_header(d, lambda h: h[NORM].update(dtype='F8_E4M3')),
    r'damaged: model.norm.weight of shape \[63\]':
        lambda d: change_header(d, lambda h: h[NORM].update(shape=[63])),
    'model.safetensors: cannot be read: damaged: model.norm.weight has no shape and dtype':
        lambda d: change_header(d, lambda h: h[NORM].pop('dtype')),
    'model.norm.weight is missing': lambda d: change_header(d, lambda h: h.pop(NORM)),
    'its tensors have 272128 bytes, and there are 271872':      # two names of the same bytes
        lambda d: change_header(d, lambda h: h.update({'extra.weight': h[NORM]})),
    r'model.embed_tokens.weight has shape \(97, 64\), .* should be \(99, 64\)':
        lambda d: edit(d, vocab_size=99),
    r'model.layers.1.input_layernorm.weight \(and 8 more\) is not part':
        lambda d: edit(d, num_hidden_layers=1),
    'lm_head.weight is missing': lambda d: edit(d, tie_word_embeddings=False),
}


@pytest.mark.parametrize('says', DAMAGES)
def test_damaged_folders(says, copy, refusal):
    folder = copy('llama')
    DAMAGES[says](folder)
    assert re.search(says, refusal(folder))


def test_damaged_shards_and_heads(copy, refusal, tmp_path):
    theirs(*SOURCES['llama']).save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
    index = 'model.safetensors.index.json'
    path = next(path for path in sorted((tmp_path / 'shards').iterdir())
                if path.name.startswith('model-00002'))
    os.remove(path)
    assert f'{path}: no such file, but {index} names it' in refusal(tmp_path / 'shards')
    weight_map = {NORM: '../outside.safetensors'}
    (tmp_path / 'shards' / index).write_text(json.dumps({'weight_map': weight_map}))
    (tmp_path / 'outside.safetensors').write_bytes(b'')
    assert f"{index}: names '../outside.safetensors', a file elsewhere" in refusal(tmp_path / 'shards')
    (tmp_path / 'shards' / index).write_text('{}')
    assert f'{index}: has no weight_map' in refusal(tmp_path / 'shards')

    folder = copy('llama')
    weights = hf.load_hf(folder)[2]
    os.remove(folder / FILE)
    save_bin(folder, weights, 2)
    os.remove(folder / 'pytorch_model-1.bin')
    assert 'pytorch_model-1.bin: no such file, but pytorch_model.bin.index.json names it' in refusal(folder)
    save_bin(folder, {**weights, 'lm_head.weight': weights['lm_head.weight'] + 1}, 1)
    assert 'tie_word_embeddings=true, but lm_head.weight' in refusal(folder)
    save_bin(folder, {**weights, NORM: weights[NORM].int()}, 1)
    assert 'model.norm.weight is torch.int32' in refusal(folder)
    torch.save([1, 2], folder / 'pytorch_model.bin')
    assert 'pytorch_model.bin: cannot be read: not a dict of tensors' in refusal(folder)
    torch.save({NORM: os.system}, folder / 'pytorch_model.bin')  # code in a pickle is not run
    assert 'holds more than tensors (posix.system), and could run code' in refusal(folder)
    truncate(folder / 'pytorch_model.bin', 100)
    assert 'not a file of PyTorch tensors, or cut short' in refusal(folder)


@pytest.mark.skipif(not HAS_EXPERTS, reason='no experts in this GPT')
def test_incomplete_experts(copy, refusal):
    folder = copy('mixtral')
    change_header(folder, lambda h: h.pop('model.layers.1.block_sparse_moe.experts.2.w3.weight'))
    assert 'experts.2.w3.weight' in refusal(folder)
