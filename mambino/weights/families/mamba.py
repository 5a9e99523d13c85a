"""The families of transformers' models that our Mamba computes, the original checkpoints of
state-spaces/mamba, and what export.py wrote of Mambas with a modelling file of their own.

Of Mamba-3 transformers has no class. The original's A comes from the token by f(v) = 1 + v, below
zero 1 / (1 - v), since June 2026; by softplus before that, which weights do not tell.
"""
import math

import torch

from mambino.weights.checkpoint import MambaConfig
from mambino.weights.families.common import Family, check_only, common_fields, number, own_fields, refuse

ONLY = {  # as in common.py
    'use_bias': ([False], 'the projections of our Mamba have no biases'),
    'use_conv_bias': ([True], 'the convolution of our Mamba has a bias'),
}
ONLY2 = ONLY | {
    'time_step_limit': ([[0, math.inf]], 'our Mamba-2 does not limit its time steps'),
}
# of an original checkpoint; transformers' classes have no such keys
ONLY_ORIGINAL = {
    'rms_norm': ([True], 'our Mamba norms by RMSNorm'),
    'norm_before_gate': ([False], 'our Mamba-2 gates first, then norms'),
}
# families by ssm_cfg.layer of an original checkpoint
ORIGINAL = {'Mamba1': 'mamba', 'Mamba2': 'mamba2', 'Mamba3': 'state-spaces/mamba3'}
# keys of an original checkpoint's ssm_cfg, and transformers' names of them; others change the
# shapes, or nothing
SSM = {
    'd_state': 'state_size',
    'd_conv': 'conv_kernel',
    'expand': 'expand',
    'headdim': 'head_dim',
    'ngroups': 'n_groups',
    'dt_rank': 'time_step_rank',
    'bias': 'use_bias',
    'conv_bias': 'use_conv_bias',
    'dt_limit': 'time_step_limit',
    'rmsnorm': 'rms_norm',
    'norm_before_gate': 'norm_before_gate',
}
SSM3 = {    # the same of a Mamba-3's, which are all that change its numbers or shapes
    'd_state': 'state_size',
    'expand': 'expand',
    'headdim': 'head_dim',
    'ngroups': 'n_groups',
    'rope_fraction': 'rope_fraction',
    'A_floor': 'A_floor',
    'A_activation': 'A_activation',
    'is_outproj_norm': 'head_norm',
    'is_mimo': 'is_mimo',
    'mimo_rank': 'mimo_rank',
}
# of a Mamba-3's, too: about its beginning, its speed, and what the reference takes and ignores
IGNORED3 = {
    'layer', 'dt_min', 'dt_max', 'dt_init_floor', 'chunk_size', 'fuse_pregate_headwise_norm',
    'dropout', 'd_conv', 'conv_init', 'conv_bias', 'bias', 'A_init_range', 'dt_limit', 'D_has_hdim',
    'd_ssm', 'rmsnorm', 'norm_before_gate', 'learnable_init_states', 'use_mem_eff_path',
    'sequence_parallel', 'process_group',
}
SOFTPLUS = ('its A is softplus of the token\'s v, that of our Mamba-3 is 1 + v, below zero '
            '1 / (1 - v), as in state-spaces/mamba since June 2026')
ONLY3 = {
    'is_mimo': ([False, True], 'must be true or false'),
    'head_norm': ([False, True], 'must be true or false'),
    'A_floor': ([1e-4], 'the A of our Mamba-3 is at most -1e-4'),
    'A_activation': (['heavy_tail'], SOFTPLUS),
}


def from_original(theirs):
    """The config.json of an original Mamba checkpoint in transformers' keys."""
    ssm = theirs.get('ssm_cfg') or {}
    layer = ssm.get('layer', 'Mamba1')
    if layer not in list(ORIGINAL):
        refuse('ssm_cfg.layer', layer, f'supported are {", ".join(ORIGINAL)}')
    if theirs.get('attn_layer_idx'):
        refuse('attn_layer_idx', theirs['attn_layer_idx'], 'our Mamba has no layers of attention')
    known = SSM3 if layer == 'Mamba3' else SSM
    for key in ssm if layer == 'Mamba3' else ():
        if key not in known and key not in IGNORED3:
            refuse(f'ssm_cfg.{key}', ssm[key], 'no setting of a Mamba-3 that is known here')
    multiple = number(theirs, 'pad_vocab_size_multiple', 8)
    padded_vocab_size = -(-number(theirs, 'vocab_size') // multiple) * multiple
    is_rms_norm = layer == 'Mamba3' or ssm.get('rmsnorm', True)
    renamed = {
        **{known[key]: value for key, value in ssm.items() if key in known},
        'n_groups': ssm.get('ngroups', 1),
        'model_type': ORIGINAL[layer],
        'vocab_size': padded_vocab_size,
        'hidden_size': theirs.get('d_model'),
        'num_hidden_layers': theirs.get('n_layer'),
        'mlp_size': -(-number(theirs, 'd_intermediate', 0) // 128) * 128,
        'tie_word_embeddings': theirs.get('tie_embeddings', True),
        'rms_norm': theirs.get('rms_norm', True) and is_rms_norm,
    }
    check_only(renamed, ONLY_ORIGINAL)
    return renamed


def mamba_fields(theirs):
    """The fields of our MambaConfig that both versions have. chunk_size is left at ours: it decides
    the speed, not the result."""
    return common_fields(theirs) | dict(
        state_size=number(theirs, 'state_size'),
        expand=number(theirs, 'expand', 2),
        conv_kernel=number(theirs, 'conv_kernel', 4),
        intermediate_size=number(theirs, 'mlp_size', 0),
        norm_eps=number(theirs, 'layer_norm_epsilon', 1e-5, float),
    )


def mamba1_fields(theirs):
    ours = mamba_fields(theirs) | dict(version=1)
    D = max(1, ours['n_embd'])
    inner = number(theirs, 'intermediate_size', ours['expand'] * D)         # which counts, not expand
    ours |= dict(inner_size=inner) if inner % D else dict(expand=inner // D)
    if theirs.get('time_step_rank') != 'auto':                              # else ours is the same rule
        ours['time_step_rank'] = number(theirs, 'time_step_rank', 0)
    return ours


def falcon_mamba_fields(theirs):
    eps = number(theirs, 'mixer_rms_eps', 1e-6, float)
    if eps <= 0:
        refuse('mixer_rms_eps', eps, 'must be above 0')
    return mamba1_fields(theirs) | dict(part_norm_eps=eps)


def mamba2_fields(theirs):
    return mamba_fields(theirs) | dict(
        version=2,
        head_dim=number(theirs, 'head_dim'),
        n_groups=number(theirs, 'n_groups'),
    )


def mamba3_fields(theirs):
    return mamba_fields(theirs) | dict(
        version=3,
        head_dim=number(theirs, 'head_dim'),
        n_groups=number(theirs, 'n_groups'),
        mimo_rank=number(theirs, 'mimo_rank') if theirs.get('is_mimo') else 1,
        rope_fraction=number(theirs, 'rope_fraction', kind=float),
        head_norm=bool(theirs.get('head_norm')),
    )


def mambino_fields(theirs):
    return own_fields(MambaConfig, theirs)


# --- weights --------------------------------------------------------------------------------------

def split_mlp(weights, theirs):
    """An original's MLP, fc2(v * silu(g)) with v and g in one matrix, in place."""
    for name in [name for name in weights if name.endswith('.mlp.fc1.weight')]:
        prefix = name.removesuffix('fc1.weight')
        up, gate = weights.pop(name).chunk(2)                               # (F, D) each
        weights[prefix + 'up_proj.weight'] = up.clone()
        weights[prefix + 'gate_proj.weight'] = gate.clone()
    for name in [name for name in weights if name.endswith('.mlp.fc2.weight')]:
        weights[name.replace('fc2', 'down_proj')] = weights.pop(name)


def mamba3_weights(weights, theirs):
    """An original's MLP, and of a MIMO of rank 1 the mixer, in place: ours of rank 1 is a SISO."""
    split_mlp(weights, theirs)
    if theirs.get('is_mimo') and number(theirs, 'mimo_rank') == 1:
        for name in [name for name in weights if name.endswith('.mixer.mimo_x')]:
            mimo_to_siso(weights, name.removesuffix('mimo_x'), number(theirs, 'n_groups'))


def mimo_to_siso(weights, prefix, groups):
    """A mixer's weights, in place. The factors of x, z and y go into the matrices beside them. Its
    turned pairs of channels are (i, i + N/2), a SISO's (2i, 2i + 1), so they change their order."""
    x, z, o = (weights.pop(f'{prefix}mimo_{name}').flatten() for name in 'xzo')     # (E,) each
    E, N = len(x), len(weights[prefix + 'B_norm.weight'])
    in_proj = weights[prefix + 'in_proj.weight']
    GN = groups * N
    zx, B, C, scalars = in_proj.split((2 * E, GN, GN, len(in_proj) - 2 * (E + GN)))
    B, C = (paired(u.unflatten(0, (groups, N)), 1).flatten(0, 1) for u in (B, C))
    in_proj = torch.cat((zx * torch.cat((z, x))[:, None], B, C, scalars))
    weights[prefix + 'in_proj.weight'] = in_proj
    weights[prefix + 'out_proj.weight'] = weights[prefix + 'out_proj.weight'] * o
    for name in ('B_bias', 'C_bias', 'B_norm.weight', 'C_norm.weight'):
        u = weights[prefix + name]
        weights[prefix + name] = paired(u, u.ndim - 1)


def paired(u, dim):
    """Channels i and i + N/2 of a dimension side by side, as 2i and 2i + 1."""
    return u.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


# --- the families ---------------------------------------------------------------------------------

def formula_of_a(theirs):
    if theirs.get('A_activation'):
        return ''
    return ('its A is taken as 1 + v, below zero 1 / (1 - v), of the token\'s v, as in '
            'state-spaces/mamba since June 2026. Weights made before, with softplus, look the same and '
            'would be computed wrongly: say which they are in ssm_cfg, by "A_activation": "heavy_tail", '
            'or "softplus", which is refused')


MAMBA1 = dict(state_size=16, tie_word_embeddings=True)     # what a missing key stands for
FAMILIES = {
    'mamba': Family('mamba', mamba1_fields, MAMBA1, ONLY, split_mlp),
    'falcon_mamba': Family('mamba', falcon_mamba_fields, MAMBA1, ONLY),
    'mamba2': Family(
        'mamba', mamba2_fields, dict(state_size=128, head_dim=64, n_groups=8), ONLY2, split_mlp),
    'mambino_mamba': Family('mamba', mambino_fields),
    'state-spaces/mamba3': Family(
        'mamba', mamba3_fields,
        dict(state_size=128, head_dim=64, rope_fraction=0.5, mimo_rank=4),
        ONLY3, mamba3_weights, formula_of_a),
}
REFUSED = {     # {model_type: what differs}
    'mamba3': f'that of flash-linear-attention: {SOFTPLUS}; read is the form of state-spaces/mamba, '
              'without model_type, with ssm_cfg',
}
