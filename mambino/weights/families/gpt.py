"""The families of transformers' models that our GPT computes: Llama, and what came of it."""
import math
from typing import NamedTuple

import torch

from mambino.weights.families.common import Family, attention_fields, common_fields, number, refuse

BOOLEAN = [False, True], 'must be true or false'
ONLY = {  # as in common.py
    'attention_bias': BOOLEAN,
    'mlp_bias': BOOLEAN,
    'norm_topk_prob': BOOLEAN,
    'partial_rotary_factor': ([1], 'our rotary positions turn whole heads'),
    'decoder_sparse_step': ([1], 'our models have experts in every layer'),
    'mlp_only_layers': ([[]], 'our models have experts in every layer'),
    'clip_qkv': ([None], 'our models do not limit queries, keys and values'),
}
ANY = None, ''      # it is looked at where it is used
NO_BIAS = [False], 'transformers has no such biases in this model'
NO_MLP_BIAS = ONLY | dict(mlp_bias=NO_BIAS)
NO_BIASES = NO_MLP_BIAS | dict(attention_bias=NO_BIAS)


# --- fields ---------------------------------------------------------------------------------------

def gpt_fields(theirs):
    """The fields of our GPTConfig."""
    return common_fields(theirs) | attention_fields(theirs) | rope_fields(theirs) | dict(
        window=window_of(theirs),
        qkv_bias=bool(theirs.get('attention_bias')),
        o_bias=bool(theirs.get('attention_bias')),
        mlp_bias=bool(theirs.get('mlp_bias')),
    )


def qwen2_fields(theirs):
    return gpt_fields(theirs) | dict(qkv_bias=True, o_bias=False)


def qwen3_fields(theirs):
    return gpt_fields(theirs) | dict(qk_norm=True)


def olmo2_fields(theirs):
    return gpt_fields(theirs) | dict(norm_after=True, qk_norm=True, qk_norm_whole=True)


def smollm3_fields(theirs):
    """Which layers have no rotary positions a list says, or their distance."""
    n_layer = number(theirs, 'num_hidden_layers')
    interval = number(theirs, 'no_rope_layer_interval', 4)
    turned = theirs.get('no_rope_layers')
    if turned is None:
        turned = [(i + 1) % max(1, interval) != 0 for i in range(n_layer)]
    is_list = isinstance(turned, list) and len(turned) >= n_layer
    if not is_list or not all(layer in (0, 1) for layer in turned):
        refuse('no_rope_layers', turned, f'must be {n_layer} ones and zeros')
    layers = ''.join('1' if layer else '0' for layer in turned[:n_layer])
    window = theirs.get('use_sliding_window') and number(theirs, 'sliding_window', 0)
    if window and '0' in layers and not theirs.get('layer_types'):
        refuse('use_sliding_window', True, 'our layers have all the same window, or none; of this '
                                           'model only those without rotary positions have one')
    ours = gpt_fields({**theirs, 'sliding_window': None})
    return ours | dict(rope_layers=shortest_period(layers))


def shortest_period(layers):
    """'11101110' → '1110', all ones → ''."""
    if '0' not in layers:
        return ''
    for n in range(1, len(layers) + 1):
        if (layers[:n] * len(layers))[:len(layers)] == layers:
            return layers[:n]


def phi3_fields(theirs):
    ours = gpt_fields(theirs)
    turned = turned_numbers(theirs)
    return ours | dict(rope_dim=0 if turned == head_dim_of(theirs) else turned)


def granite_fields(theirs):
    """Its multipliers go into weights, see fold_multipliers."""
    for key in MULTIPLIERS:
        if number(theirs, key, 1.0, float) == 0:
            refuse(key, 0, 'must not be 0')
    scaled = number(theirs, 'embedding_multiplier', 1.0, float) != 1
    tied = bool(theirs.get('tie_word_embeddings')) and not scaled
    return gpt_fields(theirs) | dict(tie_embeddings=tied)


def mixtral_fields(theirs):
    return gpt_fields(theirs) | dict(
        n_expert=number(theirs, 'num_local_experts'),
        n_expert_active=number(theirs, 'num_experts_per_tok'),
    )


def olmoe_fields(theirs):
    return gpt_fields(theirs) | dict(
        qk_norm=True,
        qk_norm_whole=True,
        n_expert=number(theirs, 'num_experts'),
        n_expert_active=number(theirs, 'num_experts_per_tok'),
        norm_topk=bool(theirs.get('norm_topk_prob')),
    )


def qwen3_moe_fields(theirs):
    key = 'num_local_experts' if theirs.get('num_local_experts') is not None else 'num_experts'
    inner = number(theirs, 'moe_intermediate_size')
    return qwen3_fields({**theirs, 'intermediate_size': inner}) | dict(
        n_expert=number(theirs, key),
        n_expert_active=number(theirs, 'num_experts_per_tok'),
        norm_topk=bool(theirs.get('norm_topk_prob')),
    )


def head_dim_of(theirs):
    heads = max(1, number(theirs, 'num_attention_heads'))
    return number(theirs, 'head_dim', 0) or number(theirs, 'hidden_size') // heads


# --- rotary positions -----------------------------------------------------------------------------

def rope_of(theirs):
    """→ (key, what it says of rotary positions): of rope_parameters since transformers 5, before
    that of rope_scaling."""
    key = 'rope_scaling' if theirs.get('rope_scaling') else 'rope_parameters'
    rope = theirs.get(key) or {}
    if not isinstance(rope, dict):
        refuse(key, rope, 'must say what is done with rotary positions, by names')
    if any(isinstance(value, dict) for value in rope.values()):
        refuse(key, rope, 'our layers have all the same rotary positions')
    return key, rope


def rope_fields(theirs):
    """The fields of rotary positions, but for which layers and numbers turn."""
    key, rope = rope_of(theirs)
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in list(ROPES):
        refuse(key, rope, f'its rope_type is none of {", ".join(ROPES)}')
    is_phi3 = theirs['model_type'] == 'phi3'
    if is_phi3 and kind == 'yarn':                          # as transformers reads it there
        kind = 'longrope'
    if not is_phi3 and rope.get('partial_rotary_factor') not in (None, 1):
        refuse(key, rope, ONLY['partial_rotary_factor'][1])
    if ROPES[kind] is None:
        refuse(key, rope, f'{kind} changes the rotary positions when a text grows long, those of the '
                          'tokens before too, whose keys our models have kept')
    theta = number(rope if 'rope_theta' in rope else theirs, 'rope_theta', 1e4, float)
    return dict(rope_theta=theta) | ROPES[kind](rope, theirs)


def unscaled(rope, theirs):
    return {}


def linear(rope, theirs):
    factor = number(rope, 'factor', kind=float)
    return {} if factor == 1 else dict(rope_scaling='linear', rope_factor=factor)


def rope_length_of(rope, theirs):
    """The tokens that the model was first trained on."""
    key = 'original_max_position_embeddings'
    source = theirs if theirs.get(key) is not None else rope
    return number(source, key, number(theirs, 'max_position_embeddings'))


def llama3(rope, theirs):
    return dict(
        rope_scaling='llama3',
        rope_factor=number(rope, 'factor', kind=float),
        rope_length=rope_length_of(rope, theirs),
        rope_slow=number(rope, 'low_freq_factor', kind=float),
        rope_fast=number(rope, 'high_freq_factor', kind=float),
    )


def yarn(rope, theirs):
    if rope.get('truncate') not in (None, True):
        refuse('truncate', rope['truncate'], 'the ramp of our yarn begins and ends at whole pairs')
    length = rope_length_of(rope, theirs)
    usual = number(theirs, 'max_position_embeddings') / max(1, length)
    factor = number(rope, 'factor', usual, float)
    return dict(
        rope_scaling='yarn',
        rope_factor=factor,
        rope_length=length,
        rope_slow=number(rope, 'beta_slow', 0.0, float) or 1.0,
        rope_fast=number(rope, 'beta_fast', 0.0, float) or 32.0,
        rope_amplitude=amplitude_of(rope, factor),
    )


def amplitude_of(rope, factor):
    """What yarn multiplies cos and sin by (Peng et al. 2023, eq. 22; in DeepSeek-V2 two shares)."""
    def grown(share):
        return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0
    over, under = (number(rope, key, 0.0, float) for key in ('mscale', 'mscale_all_dim'))
    usual = grown(over) / grown(under) if over and under else grown(1)
    return number(rope, 'attention_factor', usual, float)


# by rope_type; None: other frequencies beyond some length of the text
ROPES = {
    'default': unscaled, 'linear': linear, 'llama3': llama3, 'yarn': yarn,
    'dynamic': None, 'longrope': None, 'su': None,
}


def turned_numbers(theirs):
    """How many numbers of a head turn."""
    _, rope = rope_of(theirs)
    source = rope if 'partial_rotary_factor' in rope else theirs
    return int(head_dim_of(theirs) * number(source, 'partial_rotary_factor', 1.0, float))


# --- windows --------------------------------------------------------------------------------------

def window_of(theirs):
    """The attention window of all layers, 0 for none. Three keys may say which layers have one; our
    layers are all alike."""
    model_type = theirs['model_type']
    window = number(theirs, 'sliding_window', 0)
    layer_types = theirs.get('layer_types') or []
    if model_type in WITHOUT_WINDOW:
        window = 0
    if model_type in SWITCHED_WINDOW and not theirs.get('use_sliding_window'):
        window = 0
    if model_type in ('qwen2', 'qwen3') and window:         # the only families where layer_types decides
        full = number(theirs, 'max_window_layers', 28)
        if not layer_types and 0 < full < number(theirs, 'num_hidden_layers'):
            refuse('max_window_layers', full, 'our layers have all the same window, or none')
        if set(layer_types) == {'full_attention'} or (full > 0 and not layer_types):
            return 0
    expected = 'sliding_attention' if window else 'full_attention'
    if layer_types and set(layer_types) != {expected}:
        refuse('layer_types', layer_types,
               'our layers have all the same window, or none; sliding_window is '
               f'{window or "not used"}')
    return window


WITHOUT_WINDOW = {'llama', 'olmo2', 'olmoe', 'granite'}
SWITCHED_WINDOW = {'qwen2', 'qwen3', 'qwen3_moe'}


# --- weights --------------------------------------------------------------------------------------

def split_fused(weights, theirs):
    """Phi-3's matrices that are several in one, in place; the rows of heads that turn in part, in our
    order."""
    P, H = head_dim_of(theirs), number(theirs, 'num_attention_heads')
    G = number(theirs, 'num_key_value_heads', H)
    order = turned_first(P, turned_numbers(theirs))
    for name in list(weights):
        layer, _, part = name.rpartition('self_attn.qkv_proj.')
        if layer:
            q, k, v = weights.pop(name).split((H * P, G * P, G * P))
            q, k = (u.unflatten(0, (-1, P))[:, order].flatten(0, 1) for u in (q, k))
            weights[f'{layer}self_attn.q_proj.{part}'] = q
            weights[f'{layer}self_attn.k_proj.{part}'] = k
            weights[f'{layer}self_attn.v_proj.{part}'] = v
        layer, _, part = name.rpartition('mlp.gate_up_proj.')
        if layer:
            gate, up = weights.pop(name).chunk(2)
            weights[f'{layer}mlp.gate_proj.{part}'] = gate
            weights[f'{layer}mlp.up_proj.{part}'] = up


def turned_first(P, n):
    """Where each of our P numbers of a head is in theirs, of which the first n turn, the pairs
    (i, i + n/2). Ours are (i, i + P/2); those that turn come first in both halves."""
    first, second = torch.arange(n).chunk(2)
    still, still_too = torch.arange(n, P).tensor_split(2)
    return torch.cat((first, still, second, still_too))


MULTIPLIERS = (
    'embedding_multiplier', 'attention_multiplier', 'residual_multiplier', 'logits_scaling')


def fold_multipliers(weights, theirs):
    """Granite's constants become part of the weights beside them, in place."""
    scales = [number(theirs, key, 1.0, float) for key in MULTIPLIERS]
    embedding, attention, residual, logits = scales
    factors = {     # ours divides by the square root of the width of a head
        'embed_tokens': embedding,
        'q_proj': attention * math.sqrt(head_dim_of(theirs)),
        'o_proj': residual,
        'down_proj': residual,
        'model.norm': 1 / logits,
    }
    for name, tensor in weights.items():
        owner = name.rpartition('.')[0]
        factor = next((factor for end, factor in factors.items() if owner.endswith(end)), 1.0)
        if factor != 1:
            weights[name] = tensor * factor


def folded_note(theirs):
    if all(number(theirs, key, 1.0, float) == 1 for key in MULTIPLIERS):
        return ''
    return ('its multipliers become part of the weights: an adapter of this model, exported for peft, does not fit '
            'Granite itself')


class Experts(NamedTuple):
    """Where a layer's experts are on the disk, and what the three matrices of one are called."""
    block: str
    gate: str
    up: str
    down: str


EXPERTS = {
    'mixtral': Experts('block_sparse_moe', 'w1', 'w3', 'w2'),
    'qwen3_moe': Experts('mlp', 'gate_proj', 'up_proj', 'down_proj'),
    'olmoe': Experts('mlp', 'gate_proj', 'up_proj', 'down_proj'),
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
    'qwen2': Family('gpt', qwen2_fields, dict(rms_norm_eps=1e-6, sliding_window=4096), NO_MLP_BIAS),
    'qwen3': Family(
        'gpt', qwen3_fields, dict(rms_norm_eps=1e-6, head_dim=128, sliding_window=4096),
        NO_MLP_BIAS),
    'mistral': Family('gpt', gpt_fields, dict(rms_norm_eps=1e-6, sliding_window=4096), NO_BIASES),
    'olmo2': Family('gpt', olmo2_fields, dict(rms_norm_eps=1e-5), NO_MLP_BIAS),
    'smollm3': Family(
        'gpt', smollm3_fields,
        dict(rms_norm_eps=1e-6, rope_theta=2e6, tie_word_embeddings=True), ONLY),
    'phi3': Family(
        'gpt', phi3_fields, dict(rms_norm_eps=1e-5),
        NO_BIASES | dict(partial_rotary_factor=ANY), split_fused),
    'granite': Family(
        'gpt', granite_fields, dict(rms_norm_eps=1e-6), ONLY, fold_multipliers, folded_note),
    'mixtral': Family(
        'gpt', mixtral_fields,
        dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        NO_BIASES, stack_experts),
    'olmoe': Family(
        'gpt', olmoe_fields,
        dict(rms_norm_eps=1e-5, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False),
        NO_MLP_BIAS, stack_experts),
    'qwen3_moe': Family(
        'gpt', qwen3_moe_fields,
        dict(rms_norm_eps=1e-6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
             norm_topk_prob=False, sliding_window=4096),
        NO_MLP_BIAS, stack_experts),
}
