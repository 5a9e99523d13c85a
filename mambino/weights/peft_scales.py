"""A LoRA that peft tuned on transformers' class, for our model of it, where constants that the class
multiplies by are in our matrices, or scales of ours are in those of the class.

    adapter = to_ours(net, adapter)     # what from_peft.read_peft returned

    theirs   factor (W + B A)           its config.json says the factor
    ours     scale (W' + B' A)          scale W' = factor W, so B' = factor / scale B

Where the numbers of a head that turn come first there, the rows of B change their order, too, and so do
the keys of a prefix.
"""
import math
import os

import torch

from mambino.weights.families import delta, gpt, hybrid
from mambino.weights.families.common import number
from mambino.weights.families.gpt import head_dim_of, turned_first
from mambino.weights.tensor_files import read_json
from model_hybrid import Hybrid

INPUT = '.shared_mlp.input_linear.'     # Granite 4's: rows of gate and up


def to_ours(net, adapter):
    """An adapter in our names and scales. ValueError where nothing tells what it was tuned on."""
    spec = adapter['adapter']
    if spec['type'] != 'lora':
        turned = getattr(net.config, 'rope_dim', 0)
        return adapter | dict(weights=ordered_keys(adapter['weights'], turned)) if turned else adapter
    path = os.path.join(spec['base'], 'config.json')
    theirs = delta.text_of(read_json(path)) if os.path.exists(path) else {}
    model_type = theirs.get('model_type')
    if type(net) is Hybrid and not theirs:
        raise ValueError(
            f'how the rows of a hybrid\'s adapter are scaled says the config.json of its base, and '
            f'{path} is not there: put the base there, or its path into base_model_name_or_path of '
            'adapter_config.json')
    if model_type not in FACTORS:
        return adapter
    factors = FACTORS[model_type]({**FAMILIES[model_type].defaults, **theirs})
    weights = split_input(adapter['weights'])
    weights = {our_name(name): tensor for name, tensor in weights.items()}
    if model_type in QWEN:
        weights = split_gates(weights, net.config.head_dim)
        if not net.config.attention_gate:                   # theirs has one that halves, and a doubled matrix
            factors = {'self_attn.o_proj': 0.5}
    if model_type in TURNED_FIRST:
        order_heads(weights, net.config.head_dim, net.config.rope_dim)
    for name in weights:
        path, _, part = name.rpartition('.lora_')
        if part == 'B.weight':
            factor = factors.get('.'.join(path.split('.')[-2:]), 1.0)
            factor = torch.as_tensor(factor, dtype=torch.float64) / scale_of(net, path)
            weights[name] = (weights[name] * (factor[:, None] if factor.ndim else factor)).float()
    targets = ','.join(sorted({name.rpartition('.lora_')[0] for name in weights}))
    return adapter | dict(adapter=spec | dict(targets=targets), weights=weights)


def split_input(weights):
    """A LoRA on the rows of gate and up is one on each."""
    result = {}
    for name, tensor in weights.items():
        if INPUT not in name:
            result[name] = tensor
            continue
        halves = tensor.chunk(2) if name.endswith('.lora_B.weight') else (tensor, tensor)
        for matrix, half in zip(('gate_proj', 'up_proj'), halves):
            result[name.replace(INPUT, f'.mlp.{matrix}.')] = half.clone()
    return result


def our_name(name):
    """Of a matrix, of Qwen's text model, too."""
    name = name.replace('model.language_model.', 'model.').replace('.linear_attn.', '.mamba.')
    return hybrid.our_name(name)


def split_gates(weights, P):
    """A LoRA on the rows of Qwen's queries, of which each second head is a gate, is one on each."""
    result = {}
    for name, tensor in weights.items():
        if '.q_proj.' not in name:
            result[name] = tensor
            continue
        halves = tensor, tensor
        if name.endswith('.lora_B.weight'):                                 # (H 2 P, r)
            halves = (half.flatten(0, 1) for half in tensor.unflatten(0, (-1, 2, P)).unbind(1))
        for matrix, half in zip(('q_proj', 'g_proj'), halves):
            result[name.replace('q_proj', matrix)] = half.clone()
    return result


def order_heads(weights, P, turned):
    """The rows of queries and keys in our order, in place; see turned_first. turned: 0 for all P."""
    order = turned_first(P, turned or P)
    for name, tensor in weights.items():
        if name.endswith(('.q_proj.lora_B.weight', '.k_proj.lora_B.weight')):
            weights[name] = tensor.unflatten(0, (-1, P))[:, order].flatten(0, 1)


def ordered_keys(weights, turned):
    """A prefix, {'prefix.k.0': (1, K, n, P), …}, with the numbers of its keys in our order."""
    return {name: tensor[..., turned_first(tensor.shape[-1], turned)] if name.startswith('prefix.k.') else tensor
            for name, tensor in weights.items()}


def scale_of(net, path):
    """What a hybrid multiplies the rows of a matrix by before they enter the stream."""
    if type(net) is not Hybrid or not path.endswith(('.o_proj', '.out_proj', '.down_proj')):
        return 1.0
    layer = net.get_submodule('.'.join(path.split('.')[:3]))                # model.layers.3
    if path.endswith('.down_proj'):
        return layer.mlp_residual_scale.detach().double()
    branches = (layer.mamba is not None) + (layer.self_attn is not None)
    return layer.residual_scale.detach().double() / branches


def granite(theirs):
    """Of its dense models, which are ours by the GPT; see families/gpt.py."""
    scale = number(theirs, 'attention_multiplier', 1.0, float)
    return {'self_attn.q_proj': scale * math.sqrt(head_dim_of(theirs))}


def with_residual(factors):
    """Their factors, and the one of what is added to the stream."""
    def factors_of(theirs):
        residual = number(theirs, 'residual_multiplier', 1.0, float)
        result = factors(theirs)
        for matrix in ('self_attn.o_proj', 'mamba.out_proj', 'mlp.down_proj'):
            result[matrix] = result.get(matrix, 1.0) * residual
        return result
    return factors_of


FAMILIES = {**gpt.FAMILIES, **hybrid.FAMILIES, **delta.FAMILIES}
QWEN = set(delta.FAMILIES)
TURNED_FIRST = {'bamba', *QWEN}
FACTORS = {     # {model_type: config.json → {end of a path: factor, of all rows or by row}}
    **dict.fromkeys(TURNED_FIRST, hybrid.no_factors),
    'granite': with_residual(granite),
    'granitemoehybrid': with_residual(hybrid.granite_factors),
    'falcon_h1': with_residual(hybrid.falcon_h1_factors),
}
