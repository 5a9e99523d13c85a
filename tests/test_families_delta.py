"""Models of Gated DeltaNet that people have: each, with the flags of its published configs and small sizes, gives
transformers' logits here, by steps what forward gives, and can be trained."""
import json

import pytest
import safetensors.torch
import torch
from helpers.adapters import tuned_by_peft
from helpers.families import loaded, written_once
from helpers.models import assert_close, theirs, tokens

from mambino.sample import decode
from mambino.weights import adapters, checkpoint, from_peft
from mambino.weights import from_hf as hf

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

# eps: with that of the published ones transformers' own two ways, by chunks and by tokens, differ by 3e-5
QWEN = dict(
    pad_token_id=None, bos_token_id=None, eos_token_id=None, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_key_head_dim=16, linear_value_head_dim=32,
    linear_num_key_heads=2, linear_num_value_heads=4, max_position_embeddings=256, rms_norm_eps=1e-3,
    attn_implementation='eager', tie_word_embeddings=False,
    rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=0.25))
FAMILIES = {
    'qwen3.5': ('Qwen3_5', dict(QWEN, rope_parameters=dict(
        rope_type='default', rope_theta=1e7, partial_rotary_factor=0.25, mrope_section=[2, 1, 1],
        mrope_interleaved=True))),
    'qwen3.5-tied': ('Qwen3_5', dict(
        QWEN, layer_types=['full_attention', *['linear_attention'] * 3], linear_num_key_heads=4,
        rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=1.0),
        linear_conv_kernel_dim=3, tie_word_embeddings=True)),
    'qwen3-next': ('Qwen3Next', dict(QWEN, num_experts=0)),
    'qwen3-next-mlps': ('Qwen3Next', dict(QWEN, mlp_only_layers=[0, 1, 2, 3], tie_word_embeddings=True)),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """folders(name) → what transformers saved of this family, and its model; written once."""
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers, 'Qwen3_5Config'):
        pytest.skip('this transformers has no Qwen3.5')

    def save(name, folder):
        model = theirs(*FAMILIES[name])
        model.save_pretrained(folder)
        return model
    return written_once(tmp_path_factory, save)


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, folders):
    folder, model = folders(name)
    idx = tokens(2, 83)
    want = model(idx).logits
    assert want.std() > 0.3
    assert_close(loaded(folder)(idx)[0], want, 1e-5)


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_steps_give_what_forward_gives(name, folders):
    net, idx = loaded(folders(name)[0]), tokens(2, 60)
    want = net(idx)[0]
    pieces, state = [], None
    for piece in idx.split((30, 7, *[1] * 23), 1):
        logits, state = decode.step(net, piece, state)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), want, 1e-5)


@pytest.mark.parametrize('name', ['qwen3.5', 'qwen3-next-mlps'])
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


@torch.no_grad()
def test_of_a_model_that_reads_images_the_text_is_taken(folders, tmp_path, capsys):
    """As it is published: the text model is a part, beside one for images and a layer that guesses further."""
    folder, model = folders('qwen3.5-tied')
    text = json.loads((folder / 'config.json').read_text())
    del text['tie_word_embeddings']
    config = dict(model_type='qwen3_5', text_config=text, vision_config=dict(depth=1), tie_word_embeddings=True)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    weights = {name.replace('model.', 'model.language_model.', 1): tensor for name, tensor in weights.items()}
    weights |= {'model.visual.blocks.0.attn.proj.weight': torch.ones(3), 'mtp.fc.weight': torch.ones(3)}
    safetensors.torch.save_file(weights, tmp_path / 'model.safetensors')
    idx = tokens(2, 20)
    assert_close(loaded(tmp_path)(idx)[0], model(idx).logits, 1e-5)
    assert 'what reads images is left out' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['qwen3.5', 'qwen3-next'])
@torch.no_grad()
def test_an_adapter_of_their_model_fits_ours(name, folders, tmp_path):
    """Of queries each second head is a gate there, and the numbers that turn come first."""
    folder, _ = folders(name)
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'out_proj']
    tuned = tuned_by_peft(folder, tmp_path, targets)
    net, idx = loaded(folder), tokens(2, 40)
    before, want = net(idx)[0], tuned(idx)
    assert (want - before).abs().max() > 0.01 * want.std()
    adapters.attach_adapter(net, from_peft.read_peft(tmp_path))
    assert_close(net(idx)[0], want, 1e-5)


def test_missing_keys_are_the_defaults_of_the_class(folders):
    import transformers
    small = dict(vocab_size=97, hidden_size=64, num_hidden_layers=8, num_attention_heads=4, intermediate_size=96)
    for model_type, kind, more in (('qwen3_5_text', 'Qwen3_5TextConfig', {}),
                                   ('qwen3_next', 'Qwen3NextConfig', dict(num_experts=0))):
        full = getattr(transformers, kind)(**small, **more).to_dict()
        assert hf.to_ours(full) == hf.to_ours(small | more | dict(model_type=model_type))


@pytest.mark.parametrize('name, changes, says', [
    ('qwen3.5', dict(attention_bias=True), 'attention_bias=true'),
    ('qwen3.5', dict(layer_types=['linear_attention']), 'must name each layer'),
    ('qwen3.5', dict(layer_types=['full_attention'] * 3 + ['moe']), 'layer_types="moe"'),
    ('qwen3.5', dict(linear_num_key_heads=3), 'key_heads=3'),
    ('qwen3.5', dict(rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=1e4)), 'not stretched'),
    ('qwen3.5', dict(model_type='qwen3_5_moe'), 'an expert that every token takes'),
    ('qwen3-next', dict(num_experts=4), 'an expert that every token takes'),
    ('qwen3-next-mlps', dict(mlp_only_layers=[0, 1, 2]), 'num_experts=512: it has an expert'),
    ('qwen3-next-mlps', dict(mlp_only_layers=3), 'must be numbers of layers'),
])
def test_what_differs_is_said(name, changes, says, folders):
    config = json.loads((folders(name)[0] / 'config.json').read_text())
    with pytest.raises(ValueError, match=says):
        kind, fields = hf.to_ours({**config, **changes})
        checkpoint.MODELS[kind][1](**fields)
