"""The families of transformers' models that our Mamba computes, and the original checkpoints of
state-spaces/mamba."""
import math

from mambino.weights.families.common import Family, common_fields, number, refuse

ONLY = {  # as in common.py
    'use_bias': ([False], 'the projections of our Mamba have no biases'),
    'use_conv_bias': ([True], 'the convolution of our Mamba has a bias'),
    'time_step_limit': ([[0, math.inf]], 'our Mamba-2 does not limit its time steps'),
    'rms_norm': ([True], 'our Mamba norms by RMSNorm'),
    'norm_before_gate': ([False], 'our Mamba-2 gates first, then norms'),
}
# families by ssm_cfg.layer of an original checkpoint
ORIGINAL = {'Mamba1': 'mamba', 'Mamba2': 'mamba2'}
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


def from_original(theirs):
    """The config.json of an original Mamba checkpoint in transformers' keys."""
    ssm = theirs.get('ssm_cfg') or {}
    layer = ssm.get('layer', 'Mamba1')
    if layer not in list(ORIGINAL):
        refuse('ssm_cfg.layer', layer, f'supported are {", ".join(ORIGINAL)}')
    multiple = number(theirs, 'pad_vocab_size_multiple', 8)
    padded_vocab_size = -(-number(theirs, 'vocab_size') // multiple) * multiple
    return {
        **{SSM[key]: value for key, value in ssm.items() if key in SSM},
        'n_groups': ssm.get('ngroups', 1),
        'model_type': ORIGINAL[layer],
        'vocab_size': padded_vocab_size,
        'hidden_size': theirs.get('d_model'),
        'num_hidden_layers': theirs.get('n_layer'),
        'tie_word_embeddings': theirs.get('tie_embeddings', True),
        'rms_norm': theirs.get('rms_norm', True) and ssm.get('rmsnorm', True),
    }


def mamba_fields(theirs):
    """The fields of our MambaConfig that both versions have. chunk_size is left at ours: it decides
    the speed, not the result."""
    return common_fields(theirs) | dict(
        state_size=number(theirs, 'state_size'),
        expand=number(theirs, 'expand', 2),
        conv_kernel=number(theirs, 'conv_kernel', 4),
        norm_eps=number(theirs, 'layer_norm_epsilon', 1e-5, float),
    )


def mamba1_fields(theirs):
    ours = mamba_fields(theirs) | dict(version=1)
    if theirs.get('time_step_rank') != 'auto':                              # else ours is the same rule
        ours['time_step_rank'] = number(theirs, 'time_step_rank', 0)
    return ours


def mamba2_fields(theirs):
    return mamba_fields(theirs) | dict(
        version=2,
        head_dim=number(theirs, 'head_dim'),
        n_groups=number(theirs, 'n_groups'),
    )


FAMILIES = {
    'mamba': Family('mamba', mamba1_fields, dict(state_size=16, tie_word_embeddings=True), ONLY),
    'mamba2': Family('mamba', mamba2_fields, dict(state_size=128, head_dim=64, n_groups=8), ONLY),
}
REFUSED = {}    # {model_type: what differs}
