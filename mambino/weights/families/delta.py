"""Families of transformers' models that mix Gated DeltaNet with attention: Qwen3-Next and Qwen3.5, dense.

Their norms multiply by 1 + weight, which becomes the weight here; half a projection to queries is the gate
of what attention gives; a Qwen3.5 that reads images gives its text model alone.
"""
import torch

from mambino.weights.families.common import Family, common_fields, number, refuse
from mambino.weights.families.gpt import head_dim_of, rope_fields, rope_of, turned_first, turned_numbers
from mambino.weights.families.refused import SHARED_EXPERT

ONLY = {  # as in common.py
    'attention_bias': ([False], 'our attention has no biases'),
}
QWEN = dict(    # what missing keys stand for
    rms_norm_eps=1e-6, max_position_embeddings=32768, head_dim=256, partial_rotary_factor=0.25,
    linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
    linear_num_value_heads=32, full_attention_interval=4)
QWEN3_NEXT = dict(
    QWEN, num_key_value_heads=2, num_experts=512, decoder_sparse_step=1, mlp_only_layers=[])
QWEN3_5 = dict(QWEN, num_key_value_heads=4)
LETTERS = dict(linear_attention='d', full_attention='a')    # of a layer in config.json, and in HybridConfig.layers


# --- fields ---------------------------------------------------------------------------------------

def text_of(theirs):
    """config.json of the text model alone, where it is of a model that reads images."""
    text = theirs.get('text_config')
    if theirs.get('model_type') != 'qwen3_5' or not isinstance(text, dict):
        return theirs
    tied = theirs.get('tie_word_embeddings')
    tied = text.get('tie_word_embeddings') if tied is None else tied
    return {**text, 'model_type': 'qwen3_5_text', 'tie_word_embeddings': tied, 'vision_config': {}}


def image_note(theirs):
    return 'its text model is taken; what reads images is left out' if 'vision_config' in theirs else ''


def layers_of(theirs):
    """Each layer's letter."""
    n_layer, types = number(theirs, 'num_hidden_layers'), theirs.get('layer_types')
    if types is None:
        interval = max(1, number(theirs, 'full_attention_interval'))
        return ''.join('a' if (i + 1) % interval == 0 else 'd' for i in range(n_layer))
    if not isinstance(types, list) or len(types) != n_layer:
        refuse('layer_types', types, 'must name each layer')
    for layer_type in types:
        if layer_type not in list(LETTERS):
            refuse('layer_types', layer_type, 'the layers of this model are linear_attention or full_attention')
    return ''.join(LETTERS[layer_type] for layer_type in types)


def qwen_fields(theirs):
    rope = theirs.get('rope_parameters')
    whole = {**rope, 'partial_rotary_factor': None} if isinstance(rope, dict) else rope
    fields = rope_fields({**theirs, 'rope_parameters': whole})
    if len(fields) > 1:
        refuse(*rope_of(theirs), 'the rotary positions of our hybrid are not stretched')
    turned, P = turned_numbers(theirs), number(theirs, 'linear_value_head_dim')
    return common_fields(theirs) | dict(
        layers=layers_of(theirs), layout='sequential', gate=False, branch_norm=False, embed_norm=False, window=0,
        qk_norm=True, attention_gate=True,
        n_head=number(theirs, 'num_attention_heads'),
        n_kv_head=number(theirs, 'num_key_value_heads'),
        head_dim=head_dim_of(theirs),
        rope_theta=fields['rope_theta'],
        rope_dim=0 if turned == head_dim_of(theirs) else turned,
        intermediate_size=number(theirs, 'intermediate_size'),
        block_size=number(theirs, 'max_position_embeddings'),
        norm_eps=number(theirs, 'rms_norm_eps', kind=float),
        ssm_head_dim=P,
        ssm_inner_size=P * number(theirs, 'linear_num_value_heads'),
        state_size=number(theirs, 'linear_key_head_dim'),
        key_heads=number(theirs, 'linear_num_key_heads'),
        conv_kernel=number(theirs, 'linear_conv_kernel_dim'),
    )


def qwen3_next_fields(theirs):
    """Of a model without experts."""
    n_layer, step = number(theirs, 'num_hidden_layers'), max(1, number(theirs, 'decoder_sparse_step'))
    dense = theirs['mlp_only_layers'] or []
    if not isinstance(dense, list):
        refuse('mlp_only_layers', dense, 'must be numbers of layers')
    if number(theirs, 'num_experts') and any((i + 1) % step == 0 and i not in dense for i in range(n_layer)):
        refuse('num_experts', theirs['num_experts'], SHARED_EXPERT)
    return qwen_fields(theirs)


# --- weights --------------------------------------------------------------------------------------

def text_names(weights):
    """Renames in place the text model's tensors; drops those that read images, and those that guess tokens
    further on, which transformers drops, too."""
    for name in list(weights):
        if name.startswith(('model.visual.', 'mtp.')):
            del weights[name]
        elif name.startswith('model.language_model.'):
            weights['model.' + name.removeprefix('model.language_model.')] = weights.pop(name)


def joined_in_proj(weights, prefix, ours):
    """Pops a mixer's projections → the one of ours, rows [z; q, k, v; β; α]. ours: fields of HybridConfig."""
    if f'{prefix}in_proj_qkvz.weight' not in weights:
        return torch.cat([weights.pop(f'{prefix}in_proj_{part}.weight') for part in ('z', 'qkv', 'b', 'a')])
    G, N, E = ours['key_heads'], ours['state_size'], ours['ssm_inner_size']
    H = E // ours['ssm_head_dim']
    qkvz = weights.pop(f'{prefix}in_proj_qkvz.weight').unflatten(0, (G, -1))    # those of a key head together
    q, k, v, z = (u.flatten(0, 1) for u in qkvz.split((N, N, E // G, E // G), 1))
    ba = weights.pop(f'{prefix}in_proj_ba.weight').unflatten(0, (G, -1))
    return torch.cat((z, q, k, v, *(u.flatten(0, 1) for u in ba.split(H // G, 1))))


def to_our_weights(weights, theirs):
    """In place: our names, projections as ours, weights of norms, and scales of what is added to the stream."""
    ours, P = qwen_fields(theirs), head_dim_of(theirs)
    for name in list(weights):
        renamed = name.replace('.linear_attn.', '.mamba.').replace('.post_attention_layernorm.', '.pre_mlp_layernorm.')
        weights[renamed] = weights.pop(name)
    for name in list(weights):
        if name.endswith('.mamba.A_log'):
            prefix = name.removesuffix('A_log')
            weights[prefix + 'in_proj.weight'] = joined_in_proj(weights, prefix, ours)
        if name.endswith('.q_proj.weight'):
            q, gate = weights[name].unflatten(0, (-1, 2, P)).unbind(1)
            weights[name] = q.flatten(0, 1)
            weights[name.replace('q_proj', 'g_proj')] = gate.flatten(0, 1)
        if name.endswith(('layernorm.weight', '.q_norm.weight', '.k_norm.weight')) or name == 'model.norm.weight':
            weights[name] = 1 + weights[name]
        if name.endswith('.input_layernorm.weight'):
            prefix = name.removesuffix('input_layernorm.weight')
            for scale in ('residual_scale', 'mlp_residual_scale'):
                weights[prefix + scale] = torch.ones_like(weights[name])
    order = turned_first(P, ours['rope_dim'] or P)
    for name in weights:
        if name.endswith(('.q_proj.weight', '.k_proj.weight', '.q_norm.weight', '.k_norm.weight')):
            weights[name] = weights[name].unflatten(0, (-1, P))[:, order].flatten(0, 1)


FAMILIES = {
    'qwen3_5_text': Family('hybrid', qwen_fields, QWEN3_5, ONLY, to_our_weights, image_note),
    'qwen3_next': Family('hybrid', qwen3_next_fields, QWEN3_NEXT, ONLY, to_our_weights),
}
REFUSED = {     # {model_type: what differs}
    'qwen3_5_moe': SHARED_EXPERT,
    'qwen3_5_moe_text': SHARED_EXPERT,
}
