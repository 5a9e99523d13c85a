"""The families of transformers' models that our GPT computes: Llama and what came of it."""
from typing import NamedTuple

import torch

from mambino.weights.families.common import Family, common_fields, number, refuse

ONLY = {  # as in common.py
    'attention_bias': ([False], 'our attention has no biases'),
    'mlp_bias': ([False], 'our MLP has no biases'),
    'partial_rotary_factor': ([1], 'our rotary positions turn whole heads'),
    'norm_topk_prob': ([True], 'the weights of the experts of a token sum to 1 in our models'),
    'decoder_sparse_step': ([1], 'our models have experts in every layer'),
    'mlp_only_layers': ([[]], 'our models have experts in every layer'),
}


# --- fields ---------------------------------------------------------------------------------------

def gpt_fields(theirs):
    """The fields of our GPTConfig."""
    return common_fields(theirs) | dict(
        n_head=number(theirs, 'num_attention_heads'),
        n_kv_head=number(theirs, 'num_key_value_heads', 0),
        head_dim=number(theirs, 'head_dim', 0),
        intermediate_size=number(theirs, 'intermediate_size'),
        block_size=number(theirs, 'max_position_embeddings'),
        norm_eps=number(theirs, 'rms_norm_eps', kind=float),
        window=window_of(theirs),
        rope_theta=rope_theta_of(theirs),
    )


def qwen3_fields(theirs):
    return gpt_fields(theirs) | dict(qk_norm=True)


def mixtral_fields(theirs):
    return gpt_fields(theirs) | dict(
        n_expert=number(theirs, 'num_local_experts'),
        n_expert_active=number(theirs, 'num_experts_per_tok'),
    )


def qwen3_moe_fields(theirs):
    key = 'num_local_experts' if theirs.get('num_local_experts') is not None else 'num_experts'
    inner = number(theirs, 'moe_intermediate_size')
    return qwen3_fields({**theirs, 'intermediate_size': inner}) | dict(
        n_expert=number(theirs, key),
        n_expert_active=number(theirs, 'num_experts_per_tok'),
    )


def rope_theta_of(theirs):
    """The base of the rotary positions: in rope_parameters since transformers 5, before that a key
    of its own."""
    source = theirs
    for key in ('rope_scaling', 'rope_parameters'):
        rope = theirs.get(key) or {}
        if not isinstance(rope, dict):
            refuse(key, rope, 'our rotary positions are not scaled')
        if rope.get('rope_type', rope.get('type', 'default')) != 'default':
            refuse(key, rope, 'our rotary positions are not scaled')
        if rope.get('partial_rotary_factor') not in (None, 1):
            refuse(key, rope, ONLY['partial_rotary_factor'][1])
        if 'rope_theta' in rope:
            source = rope
    return number(source, 'rope_theta', 1e4, float)


def window_of(theirs):
    """The attention window of all layers, 0 for none. Three keys may say which layers have one; our
    layers are all alike."""
    model_type = theirs['model_type']
    window = number(theirs, 'sliding_window', 0)
    layer_types = theirs.get('layer_types') or []
    if model_type == 'llama':
        window = 0
    if model_type.startswith('qwen3') and not theirs.get('use_sliding_window'):
        window = 0
    if model_type == 'qwen3' and window:                    # the only family where layer_types decides
        full = number(theirs, 'max_window_layers', 28)
        if not layer_types and 0 < full < number(theirs, 'num_hidden_layers'):
            refuse('max_window_layers', full, 'our layers have all the same window, or none')
        if set(layer_types) == {'full_attention'} or (full and not layer_types):
            return 0
    expected = 'sliding_attention' if window else 'full_attention'
    if layer_types and set(layer_types) != {expected}:
        refuse('layer_types', layer_types,
               'our layers have all the same window, or none; sliding_window is '
               f'{window or "not used"}')
    return window


# --- weights --------------------------------------------------------------------------------------

class Experts(NamedTuple):
    """Where a layer's experts are on the disk, and what the three matrices of one are called."""
    block: str
    gate: str
    up: str
    down: str


EXPERTS = {
    'mixtral': Experts('block_sparse_moe', 'w1', 'w3', 'w2'),
    'qwen3_moe': Experts('mlp', 'gate_proj', 'up_proj', 'down_proj'),
}


def stack_experts(weights, theirs):
    """The experts of each layer become two stacks, in place."""
    experts = EXPERTS[theirs['model_type']]
    routers = [name for name in weights if name.endswith(f'.{experts.block}.gate.weight')]
    for router in routers:
        old = router.removesuffix('gate.weight')
        new = old.replace(experts.block, 'mlp')
        if new + 'experts.gate_up_proj' in weights:                         # transformers 5 can write stacks too
            continue
        weights[new + 'gate.weight'] = weights.pop(router)                  # (E, D)
        names = [f'{old}experts.{e}' for e in range(len(weights[new + 'gate.weight']))]
        gate = torch.stack([weights.pop(f'{name}.{experts.gate}.weight') for name in names])
        up = torch.stack([weights.pop(f'{name}.{experts.up}.weight') for name in names])
        down = torch.stack([weights.pop(f'{name}.{experts.down}.weight') for name in names])
        weights[new + 'experts.gate_up_proj'] = torch.cat((gate, up), 1)    # (E, 2 I, D)
        weights[new + 'experts.down_proj'] = down                           # (E, D, I)


# --- the families ---------------------------------------------------------------------------------

FAMILIES = {
    'llama': Family('gpt', gpt_fields, dict(rms_norm_eps=1e-6), ONLY),
    'qwen3': Family('gpt', qwen3_fields, dict(rms_norm_eps=1e-6, head_dim=128), ONLY),
    'mistral': Family('gpt', gpt_fields, dict(rms_norm_eps=1e-6, sliding_window=4096), ONLY),
    'mixtral': Family(
        'gpt', mixtral_fields,
        dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        ONLY, stack_experts),
    'qwen3_moe': Family(
        'gpt', qwen3_moe_fields,
        dict(rms_norm_eps=1e-6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
             norm_topk_prob=False),
        ONLY, stack_experts),
}
REFUSED = {}    # {model_type: what differs}
