"""The Mamba-like and hybrid models that people have: each, with the flags of its published configs and
small sizes, gives transformers' logits here, by steps what forward gives, and can be trained; others
are refused by what differs."""
import shutil

import pytest
import torch
from helpers.adapters import tuned_by_peft
from helpers.families import loaded, written_once
from helpers.models import HYBRID_SIZE, assert_close, perturb, theirs, tokens

from mambino.export import to_hf
from mambino.sample import decode
from mambino.train import memory
from mambino.weights import adapters, checkpoint, from_peft, tensor_files
from mambino.weights import from_hf as hf
from model_hybrid import Hybrid, HybridConfig

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

IDS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
MAMBA = dict(IDS, hidden_size=64, state_size=16, expand=2, conv_kernel=4)
SSM = dict(mamba_n_groups=1, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=16,
           mamba_conv_bias=True, mamba_proj_bias=False)
HYBRID = dict(
    IDS, **SSM, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, attn_implementation='eager')
# of Falcon-H1-0.5B: its flags and multipliers
FALCON_H1 = dict(
    HYBRID, head_dim=8, mamba_d_ssm=96, mamba_n_heads=6, mamba_d_head=16, mamba_rms_norm=False,
    mamba_norm_before_gate=False, projectors_bias=False, attention_in_multiplier=1.0,
    attention_out_multiplier=0.9375, embedding_multiplier=5.656854249492381, key_multiplier=0.390625,
    lm_head_multiplier=0.0390625, mlp_multipliers=[0.8838834764831844, 0.5859375],
    ssm_in_multiplier=1.25, ssm_out_multiplier=0.23570226039551587,
    ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    rope_theta=1e11, tie_word_embeddings=False)
# of Granite-4.0-H-350M
GRANITE = dict(
    HYBRID, mamba_n_heads=8, mamba_d_head=16, shared_intermediate_size=96, num_local_experts=0,
    num_experts_per_tok=0, num_hidden_layers=4, layer_types=['mamba', 'mamba', 'attention', 'mamba'],
    position_embedding_type='nope', attention_multiplier=0.015625, embedding_multiplier=12.0,
    logits_scaling=3.0, residual_multiplier=0.246, rms_norm_eps=1e-5, tie_word_embeddings=True)
FAMILIES = {
    'falcon-h1-0.5b': ('FalconH1', FALCON_H1),
    'falcon-h1-norm-tied': ('FalconH1', dict(
        FALCON_H1, mamba_rms_norm=True, mamba_n_groups=2, mamba_d_ssm=None, mamba_n_heads=8,
        attention_in_multiplier=0.7, tie_word_embeddings=True)),
    'granite-4-hybrid': ('GraniteMoeHybrid', GRANITE),
    'granite-4-dense': ('GraniteMoeHybrid', dict(
        GRANITE, layer_types=['attention'] * 4, position_embedding_type='rope', rope_theta=1e4,
        tie_word_embeddings=False)),
    'granite-4-mamba': ('GraniteMoeHybrid', dict(
        GRANITE, layer_types=None, mamba_n_groups=4, use_cache=False)),
    'bamba': ('Bamba', dict(
        HYBRID, num_hidden_layers=4, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16,
        rope_theta=1e4, tie_word_embeddings=False)),
    'bamba-turned': ('Bamba', dict(
        HYBRID, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, tie_word_embeddings=False,
        rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=1.0))),
    'falcon-mamba': ('FalconMamba', dict(
        MAMBA, layer_norm_epsilon=1e-5, mixer_rms_eps=1e-6, time_step_rank=4, tie_word_embeddings=False)),
    'falcon-mamba-eps': ('FalconMamba', dict(MAMBA, mixer_rms_eps=0.1)),
    'falcon-mamba-width': ('FalconMamba', dict(MAMBA | dict(expand=16), intermediate_size=128)),
    'mamba-width': ('Mamba', dict(MAMBA, intermediate_size=96)),
    'mamba-codestral': ('Mamba2', dict(
        MAMBA, num_heads=8, head_dim=16, n_groups=4, chunk_size=16, norm_before_gate=True, rms_norm=True,
        time_step_limit=[0.0, float('inf')], intermediate_size=128, tie_word_embeddings=False)),
}

OTHERS = {      # not of Mamba, but with constants in its matrices as well
    'granite-3': ('Granite', dict(
        IDS, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        attention_multiplier=0.015625, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0)),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """folders(name) → what transformers saved of this family, and its model; written once."""

    def save(name, folder):
        model = theirs(*{**FAMILIES, **OTHERS}[name])
        model.save_pretrained(folder)
        return model
    return written_once(tmp_path_factory, save)


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, folders):
    folder, model = folders(name)
    idx = tokens(2, 83)
    want = model(idx).logits
    assert_close(loaded(folder)(idx)[0], want, 1e-5 * want.std().clamp(max=1).item())


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_steps_give_what_forward_gives(name, folders):
    """A prompt, a few tokens, then one by one, by a plan."""
    net, idx = loaded(folders(name)[0]), tokens(2, 60)
    want = net(idx)[0]
    pieces, state = [], None
    for piece in idx.split((30, 7, *[1] * 23), 1):
        logits, state = decode.step(net, piece, state)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), want, 1e-5 * want.std().item())
    has_plan = decode.ready(net, idx[:, :1], state, 0) is not None
    assert has_plan == decode.cpu.applies(idx) or net.config.head_dim % decode.cpu.LANES


@pytest.mark.parametrize('name', FAMILIES)
def test_it_can_be_trained(name, folders):
    net, idx = loaded(folders(name)[0]).train(), tokens(4, 33)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        _, loss = net(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


# --- what differs ---------------------------------------------------------------------------------

@pytest.fixture
def to_ours(folders):
    """to_ours(name, …) → the fields that a family's config.json gives, with some keys changed."""
    def to_ours(name, remove=(), **changes):
        config = tensor_files.read_json(folders(name)[0] / 'config.json')
        config = {key: value for key, value in config.items() if key not in remove}
        return hf.to_ours({**config, **changes})[1]
    return to_ours


def test_missing_keys_are_the_defaults_of_the_class(to_ours):
    """What older files have, too: layers_block_type, names of layers, rope_theta as a key."""
    transformers = pytest.importorskip('transformers')
    sizes = ('model_type', 'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
             'intermediate_size', 'tie_word_embeddings', 'mamba_n_heads', 'layer_types')
    for name, zero in (('falcon-h1-0.5b', {}), ('granite-4-hybrid', dict(num_local_experts=0))):
        kind, keys = FAMILIES[name]
        small = {key: keys.get(key) for key in sizes if key in keys} | zero | dict(vocab_size=97)
        small['num_hidden_layers'] = keys.get('num_hidden_layers', 2)
        if kind == 'FalconH1':
            small |= dict(mamba_n_heads=8, num_attention_heads=8)
        full = getattr(transformers, kind + 'Config')(**small).to_dict()
        full['time_step_limit'] = list(full['time_step_limit'])
        ours = [HybridConfig(**hf.to_ours(keys)[1])
                for keys in (full, small | dict(model_type=full['model_type']))]
        assert ours[0] == ours[1]
    old = dict(layers_block_type=['linear_attention'] * 2 + ['full_attention', 'linear_attention'])
    assert to_ours('granite-4-hybrid', ['layer_types'], **old) == to_ours('granite-4-hybrid')
    assert to_ours('granite-4-hybrid')['layers'] == 'mmam'
    assert to_ours('falcon-h1-0.5b', ['rope_parameters'], rope_theta=1e11) == to_ours('falcon-h1-0.5b')


LINEAR = dict(rope_type='linear', factor=2.0, rope_theta=1e4)


@pytest.mark.parametrize('name, changes, says', [
    ('falcon-h1-0.5b', dict(attention_bias=True), 'attention_bias=true'),
    ('falcon-h1-0.5b', dict(mlp_bias=True), 'mlp_bias=true'),
    ('falcon-h1-0.5b', dict(projectors_bias=True), 'projectors_bias=true'),
    ('falcon-h1-0.5b', dict(mamba_proj_bias=True), 'mamba_proj_bias=true'),
    ('falcon-h1-0.5b', dict(mamba_conv_bias=False), 'mamba_conv_bias=false'),
    ('falcon-h1-0.5b', dict(time_step_limit=[0.0, 0.1]), r'time_step_limit=\[0.0, 0.1\]'),
    ('falcon-h1-0.5b', dict(mamba_rms_norm=True, mamba_norm_before_gate=True), 'gates first, then norms'),
    ('falcon-h1-0.5b', dict(mamba_rms_norm='yes'), 'mamba_rms_norm="yes": must be true or false'),
    ('falcon-h1-0.5b', dict(mlp_multipliers=[1.0]), r'mlp_multipliers=\[1.0\]: must be 2 numbers'),
    ('falcon-h1-0.5b', dict(ssm_multipliers=[1, 1, 1, 1, 'x']), 'ssm_multipliers="x": must be a number'),
    ('falcon-h1-0.5b', dict(embedding_multiplier=0.0), 'embedding_multiplier=0.0: must not be 0'),
    ('falcon-h1-0.5b', dict(hidden_act='gelu'), 'hidden_act="gelu"'),
    ('falcon-h1-0.5b', dict(mamba_n_heads=5), 'mamba_n_heads=5: must divide'),
    ('falcon-h1-0.5b', dict(mamba_n_groups=4), 'ssm_head_dim . n_groups'),
    ('falcon-h1-0.5b', dict(rope_parameters=LINEAR), 'not stretched'),
    ('granite-4-hybrid', dict(num_local_experts=8), 'num_local_experts=8: our hybrid has no experts'),
    ('granite-4-hybrid', dict(layer_types=['mamba', 'moe', 'mamba', 'mamba']), 'layer_types="moe"'),
    ('granite-4-hybrid', dict(layer_types=['mamba']), 'must name each layer'),
    ('granite-4-hybrid', dict(logits_scaling=0), 'logits_scaling=0.0: must not be 0'),
    ('granite-4-hybrid', dict(residual_multiplier='x'), 'residual_multiplier="x"'),
    ('granite-4-hybrid', dict(num_hidden_layers=2**31 - 1, layer_types=None), 'more layers than any model'),
    ('bamba', dict(num_hidden_layers=2**31 - 1), 'more layers than any model'),
    ('bamba', dict(attn_layer_indices=[4]), 'must be numbers of layers'),
    ('falcon-mamba', dict(use_bias=True), 'use_bias=true'),
    ('falcon-mamba', dict(use_conv_bias=False), 'use_conv_bias=false'),
    ('falcon-mamba', dict(mixer_rms_eps='x'), 'mixer_rms_eps="x"'),
    ('falcon-mamba', dict(mixer_rms_eps=0), 'mixer_rms_eps=0.0: must be above 0'),
    ('mamba-codestral', dict(time_step_limit=[0.0, 0.1]), 'does not limit its time steps'),
    ('falcon-mamba', dict(model_type='nemotron_h'), 'MLP with squared ReLU'),
    ('falcon-mamba', dict(model_type='jamba'), 'Mamba-1 with norms inside'),
    ('falcon-mamba', dict(model_type='olmo_hybrid'), 'norm what attention and MLP give'),
    ('falcon-mamba', dict(model_type='zamba2'), 'share sets of weights'),
])
def test_what_differs_is_said(name, changes, says, to_ours):
    with pytest.raises(ValueError, match=says):
        kind, config = 'hybrid', to_ours(name, **changes)
        checkpoint.MODELS['mamba' if 'version' in config else kind][1](**config)


def test_the_original_code_has_the_keys_that_transformers_ignores():
    original = dict(d_model=64, n_layer=2, vocab_size=97, ssm_cfg=dict(layer='Mamba2'))
    assert hf.to_ours(original)[1]['version'] == 2
    for key, value in (('rmsnorm', False), ('norm_before_gate', True)):
        with pytest.raises(ValueError, match=key.replace('rmsnorm', 'rms_norm')):
            hf.to_ours(original | dict(ssm_cfg={'layer': 'Mamba2', key: value}))


# --- adapters that peft tuned there ---------------------------------------------------------------

ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
MLP = ['gate_proj', 'up_proj', 'down_proj']


@pytest.mark.parametrize('name, targets', [
    ('falcon-h1-0.5b', [*ATTENTION, *MLP, 'mamba.in_proj']),
    ('granite-4-hybrid', [*ATTENTION, 'input_linear', 'output_linear']),
    ('granite-3', [*ATTENTION, *MLP]),
    ('bamba', [*ATTENTION, *MLP, 'mamba.in_proj']),
])
@torch.no_grad()
def test_an_adapter_of_their_model_fits_ours(name, targets, folders, tmp_path):
    folder, _ = folders(name)
    tuned = tuned_by_peft(folder, tmp_path, targets)
    net, idx = loaded(folder), tokens(2, 40)
    before, want = net(idx)[0], tuned(idx)
    assert (want - before).abs().max() > 0.01 * want.std()
    adapters.attach_adapter(net, from_peft.read_peft(tmp_path))
    assert_close(net(idx)[0], want, 1e-5 * want.std().clamp(max=1).item())


@pytest.mark.parametrize('pattern, targets', [
    ('', [*ATTENTION, *MLP, 'mamba.in_proj']),
    ('ma', [*ATTENTION, 'output_linear']),
    ('da', ['k_proj', 'v_proj', 'o_proj', 'down_proj', 'out_proj']),
])
@torch.no_grad()
def test_an_adapter_of_an_exported_hybrid_fits_the_run(pattern, targets, tmp_path):
    """Scales are in the rows there, and beside the matrices here."""
    sizes = dict(HYBRID_SIZE, vocab_size=97, gate=False, branch_norm=False, window=0, layers=pattern,
                 qk_norm='d' in pattern)
    net, idx = perturb(Hybrid(HybridConfig(**sizes))).eval(), tokens(2, 40)
    (tmp_path / 'base').mkdir()
    to_hf.write(net, None, tmp_path / 'base')
    want = tuned_by_peft(tmp_path / 'base', tmp_path / 'lora', targets)(idx)
    assert (want - net(idx)[0]).abs().max() > 0.01
    read = from_peft.read_peft(tmp_path / 'lora')
    shutil.rmtree(tmp_path / 'base')
    with pytest.raises(ValueError, match='config.json is not there'):
        adapters.attach_adapter(net, read)
    to_hf.write(net, None, tmp_path / 'lora')
    read['adapter']['base'] = str(tmp_path / 'lora')
    assert_close(adapters.attach_adapter(net, read)(idx)[0], want, 1e-5)


# --- what knows of layers of several kinds --------------------------------------------------------

def test_the_memory_of_layers_of_several_kinds():
    sizes = dict(HYBRID_SIZE, vocab_size=97, block_size=32)
    total = {}
    for layers in ('m', 'a', 'mma'):
        config = dict(sizes, layers=layers, n_layer=6)
        parts = memory.estimate('hybrid', config, 2, 32, device='cpu', dtype='float32')
        weights = sum(p.nbytes for p in Hybrid(HybridConfig(**config)).parameters())
        assert abs(parts['weights'] - weights) < 100
        total[layers] = parts['total']
    assert abs(total['mma'] - (4 * total['m'] + 2 * total['a']) / 6) < 100
