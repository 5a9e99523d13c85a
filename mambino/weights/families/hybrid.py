"""The families of transformers' models that our hybrid computes, and what export.py wrote of hybrids
with a modelling file of their own.

Falcon-H1 and Granite 4 multiply what goes into or comes out of their matrices by constants;
these go into the matrices here:

    factors(theirs)         {end of a tensor's name, ours: what its rows count}, of config.json
    to_our_weights          names, factors, and residual scales that those models do not have
"""
import math

import torch

from mambino.weights.checkpoint import HybridConfig
from mambino.weights.families.common import Family, attention_fields, common_fields, number, own_fields, refuse
from mambino.weights.families.gpt import head_dim_of, rope_fields, rope_of, turned_first, turned_numbers

ONLY = {  # as in common.py
    'attention_bias': ([False], 'our attention has no biases'),
    'mlp_bias': ([False], 'our MLP has no biases'),
    'projectors_bias': ([False], 'the projections of our Mamba-2 have no biases'),
    'mamba_proj_bias': ([False], 'the projections of our Mamba-2 have no biases'),
    'mamba_conv_bias': ([True], 'the convolution of our Mamba-2 has a bias'),
    'time_step_limit': ([[0, math.inf]], 'our Mamba-2 does not limit its time steps'),
    'mamba_rms_norm': ([False, True], 'must be true or false'),
    'mamba_norm_before_gate': ([False, True], 'must be true or false'),
    'num_local_experts': ([0], 'our hybrid has no experts'),
}
SSM = dict(     # what missing keys stand for
    mamba_n_heads=128, mamba_d_head='auto', mamba_n_groups=1, mamba_d_state=256, mamba_d_conv=4,
    mamba_expand=2)
FALCON_H1 = dict(
    SSM, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=8192, mamba_d_ssm=1024,
    mamba_rms_norm=False, mamba_norm_before_gate=True)
GRANITE = dict(
    SSM, rms_norm_eps=1e-6, max_position_embeddings=2048, shared_intermediate_size=1024,
    num_local_experts=8)
MULTIPLIERS = [f'{name}_multiplier' for name in (
    'embedding', 'lm_head', 'residual', 'attention', 'attention_in', 'attention_out', 'key', 'ssm_in',
    'ssm_out')]
BAMBA = dict(SSM, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=262144)
LETTERS = {     # of a layer in config.json, and in HybridConfig.layers
    'linear_attention': 'm',
    'mamba': 'm',
    'full_attention': 'a',
    'attention': 'a',
}


# --- fields ---------------------------------------------------------------------------------------

def mambino_fields(theirs):
    return own_fields(HybridConfig, theirs)


def plain_fields(theirs):
    """What Falcon-H1 and Granite 4 have in common: branches that are added as they are, a Mamba-2."""
    for key in (*MULTIPLIERS, 'logits_scaling'):
        multiplier(theirs, key)
    numbers(theirs, 'mlp_multipliers', 2)
    numbers(theirs, 'ssm_multipliers', 5)
    ours = common_fields(theirs) | attention_fields(theirs) | dict(
        layout='sequential', gate=False, branch_norm=False, embed_norm=False, window=0,
        rope_theta=rope_theta_of(theirs),
        state_size=number(theirs, 'mamba_d_state'),
        expand=number(theirs, 'mamba_expand'),
        n_groups=number(theirs, 'mamba_n_groups'),
        conv_kernel=number(theirs, 'mamba_d_conv'),
    )
    inner = number(theirs, 'mamba_d_ssm', ours['expand'] * ours['n_embd'])
    if inner != ours['expand'] * ours['n_embd']:
        ours['ssm_inner_size'] = inner
    heads = number(theirs, 'mamba_n_heads')
    ours['ssm_head_dim'] = inner // max(1, heads)
    if theirs['mamba_d_head'] != 'auto':
        ours['ssm_head_dim'] = number(theirs, 'mamba_d_head')
    if ours['ssm_head_dim'] * heads != inner:
        refuse('mamba_n_heads', heads, f'must divide the inner width of the SSM, {inner}, into heads '
                                       'of mamba_d_head')
    return ours


def rope_theta_of(theirs):
    fields = rope_fields(theirs)
    if len(fields) > 1:
        refuse(*rope_of(theirs), 'the rotary positions of our hybrid are not stretched')
    return fields['rope_theta']


def falcon_h1_fields(theirs):
    if theirs['mamba_rms_norm'] and theirs['mamba_norm_before_gate']:
        refuse('mamba_norm_before_gate', True, 'our Mamba-2 gates first, then norms')
    return plain_fields(theirs) | dict(gated_norm=bool(theirs['mamba_rms_norm']))


def granite_fields(theirs):
    ours = plain_fields({**theirs, 'intermediate_size': theirs['shared_intermediate_size']})
    if theirs.get('position_embedding_type') != 'rope':
        ours['rope_theta'] = 0.0
    return ours | dict(layers=layers_of(theirs))


def bamba_turned(theirs):
    """How many numbers of a head turn: half of them, whatever config.json says beside rope_parameters."""
    return turned_numbers({**theirs, 'partial_rotary_factor': 0.5})


def bamba_fields(theirs):
    rope = theirs.get('rope_parameters')
    rope = {**rope, 'partial_rotary_factor': None} if isinstance(rope, dict) else rope
    ours = plain_fields({**theirs, 'rope_parameters': rope, 'partial_rotary_factor': None})
    attends = theirs.get('attn_layer_indices') or []
    if not isinstance(attends, list) or not all(i in range(ours['n_layer']) for i in attends):
        refuse('attn_layer_indices', attends, 'must be numbers of layers')
    letters = ('a' if i in attends else 'm' for i in range(ours['n_layer']))
    turned = bamba_turned(theirs)
    return ours | dict(layers=''.join(letters), rope_dim=0 if turned == head_dim_of(theirs) else turned)


def layers_of(theirs):
    """Each layer's letter."""
    types = theirs.get('layer_types') or theirs.get('layers_block_type')
    types = types or ['linear_attention'] * number(theirs, 'num_hidden_layers')
    if not isinstance(types, list) or len(types) != number(theirs, 'num_hidden_layers'):
        refuse('layer_types', types, 'must name each layer')
    for layer_type in types:
        if layer_type not in list(LETTERS):
            refuse('layer_types', layer_type, 'the layers of our hybrid are attention or a Mamba-2')
    return ''.join(LETTERS[layer_type] for layer_type in types)


# --- weights --------------------------------------------------------------------------------------

def numbers(theirs, key, n):
    """n numbers of config.json, 1 where there are none."""
    value = theirs.get(key)
    value = [1.0] * n if value is None else value
    if not isinstance(value, list) or len(value) != n:
        refuse(key, value, f'must be {n} numbers')
    return [number({key: one}, key, kind=float) for one in value]


def multiplier(theirs, key):
    value = number(theirs, key, 1.0, float)
    if key in ('embedding_multiplier', 'logits_scaling') and value == 0:
        refuse(key, value, 'must not be 0')
    return value


def falcon_h1_factors(theirs):
    """{end of a tensor's name, ours: the factor of its rows}: numbers, or (rows,)."""
    ours = plain_fields(theirs)
    inner = ours.get('ssm_inner_size') or ours['expand'] * ours['n_embd']
    GN, H = ours['n_groups'] * ours['state_size'], inner // ours['ssm_head_dim']
    rows = torch.tensor([inner, inner, GN, GN, H])                          # of z, x, B, C and dt
    ssm_multipliers = torch.tensor(numbers(theirs, 'ssm_multipliers', 5), dtype=torch.float64)
    ssm_in = multiplier(theirs, 'ssm_in_multiplier') * ssm_multipliers.repeat_interleave(rows)
    attention_in = multiplier(theirs, 'attention_in_multiplier')
    gate, down = numbers(theirs, 'mlp_multipliers', 2)
    return {
        'self_attn.q_proj': attention_in,
        'self_attn.k_proj': attention_in * multiplier(theirs, 'key_multiplier'),
        'self_attn.v_proj': attention_in,
        'self_attn.o_proj': multiplier(theirs, 'attention_out_multiplier'),
        'mamba.in_proj': ssm_in,                                            # (2 E + 2 G N + H,)
        'mamba.out_proj': multiplier(theirs, 'ssm_out_multiplier'),
        'mlp.gate_proj': gate,
        'mlp.down_proj': down,
    }


def granite_factors(theirs):
    """As falcon_h1_factors."""
    return {'self_attn.q_proj': multiplier(theirs, 'attention_multiplier') * math.sqrt(head_dim_of(theirs))}


def no_factors(theirs):
    return {}


FACTORS = {
    'falcon_h1': falcon_h1_factors,
    'granitemoehybrid': granite_factors,
    'bamba': no_factors,
}
NAMES = {       # parts of theirs, and ours
    '.feed_forward.': '.mlp.',
    '.pre_ff_layernorm.': '.pre_mlp_layernorm.',
    '.post_attention_layernorm.': '.pre_mlp_layernorm.',
    '.shared_mlp.output_linear.': '.mlp.down_proj.',
    'model.final_layernorm.': 'model.norm.',
}


def our_name(name):
    for part, ours in NAMES.items():
        name = name.replace(part, ours)
    return name


def scale(weights, name, factor):
    """weights[name] times a number, or times a number a row, in place, if it is there."""
    if name in weights:
        factor = torch.as_tensor(factor, dtype=torch.float64)
        rows = factor[:, None] if factor.ndim else factor
        weights[name] = (weights[name] * rows).float()


def to_our_weights(weights, theirs):
    """In place: our names, the factors of FACTORS in the matrices, those of embeddings and logits in
    the embedding and in the last norm or head, and scales of what is added to the stream."""
    for name in list(weights):
        weights[our_name(name)] = weights.pop(name)
    for name in list(weights):
        if name.endswith('.shared_mlp.input_linear.weight'):                # rows [gate; up]
            prefix = name.replace('.shared_mlp.input_linear.weight', '.mlp.')
            gate, up = weights.pop(name).chunk(2)
            weights[prefix + 'gate_proj.weight'] = gate.clone()
            weights[prefix + 'up_proj.weight'] = up.clone()
    factors = FACTORS[theirs['model_type']](theirs)
    for name in list(weights):
        scale(weights, name, factors.get('.'.join(name.split('.')[-3:-1]), 1.0))

    embedding = multiplier(theirs, 'embedding_multiplier')
    head = multiplier(theirs, 'lm_head_multiplier') / multiplier(theirs, 'logits_scaling')
    scale(weights, 'model.embed_tokens.weight', embedding)
    if theirs.get('tie_word_embeddings'):
        scale(weights, 'lm_head.weight', embedding)
        scale(weights, 'model.norm.weight', head / embedding)
    else:
        scale(weights, 'lm_head.weight', head)

    if theirs['model_type'] == 'bamba':
        P = head_dim_of(theirs)
        order = turned_first(P, bamba_turned(theirs))
        for name in weights:
            if name.endswith(('q_proj.weight', 'k_proj.weight')):
                weights[name] = weights[name].unflatten(0, (-1, P))[:, order].flatten(0, 1)

    residual = multiplier(theirs, 'residual_multiplier')
    branches = 2 if theirs['model_type'] == 'falcon_h1' else 1      # our layers take their mean
    for name in [name for name in weights if name.endswith('.input_layernorm.weight')]:
        prefix = name.removesuffix('input_layernorm.weight')
        ones = torch.ones_like(weights[name])
        weights[prefix + 'residual_scale'] = branches * residual * ones
        weights[prefix + 'mlp_residual_scale'] = residual * ones


FAMILIES = {
    'mambino_hybrid': Family('hybrid', mambino_fields),
    'falcon_h1': Family('hybrid', falcon_h1_fields, FALCON_H1, ONLY, to_our_weights),
    'granitemoehybrid': Family('hybrid', granite_fields, GRANITE, ONLY, to_our_weights),
    'bamba': Family('hybrid', bamba_fields, BAMBA, ONLY, to_our_weights),
}
CONVOLUTIONS = 'its layers without attention are short gated convolutions, which our models have not'
REFUSED = {     # {model_type: what differs}
    'jamba': 'its SSM is a Mamba-1 with norms inside, beside experts in every second layer; our hybrid '
             'has a Mamba-2, and no experts',
    'kimi_linear': 'its linear attention is a delta rule with a gate a channel, which our models have not',
    'lfm2': CONVOLUTIONS,
    'lfm2_moe': CONVOLUTIONS,
    'lfm3': CONVOLUTIONS,
    'minimax': 'its linear attention is lightning attention, which our models have not',
    'nemotron_h': 'each of its layers is a Mamba-2, an attention or an MLP with squared ReLU alone; '
                  'those of our hybrid have a SwiGLU each',
    'olmo_hybrid': 'its layers of attention norm what attention and MLP give, those of our hybrid what '
                   'they read',
    'recurrent_gemma': 'its recurrence is an RG-LRU, which our models have not',
    'xlstm': 'its recurrence is an mLSTM, which our models have not',
    'zamba': 'its attention layers share one set of weights, and read the embeddings once more',
    'zamba2': 'its attention layers share sets of weights, and read the embeddings once more',
}
