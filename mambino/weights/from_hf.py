"""Reads a model that Hugging Face's transformers saved, to train or sample it here; none of its
packages is needed.

    python train.py --init_from=hf:folder           # what save_pretrained wrote, or a downloaded repository
    kind, config, weights, tok = load_hf('folder')  # checkpoint.build(kind, config).load_state_dict(weights)

Taken are llama, qwen3, mistral, mixtral, qwen3_moe, mamba and mamba2, the original checkpoints of
state-spaces/mamba, and the hybrids that export.py wrote with a modelling file of their own, which
is not needed here:

    config.json        ──► the fields of our config. What our models would compute otherwise is refused
    *.safetensors      ──► {name: fp32 tensor}: one file or many with an index, fp64, fp32, fp16 or
                           bf16, or pytorch_model.bin; no code in a file is ever run. Names and shapes
                           must be those of our model, all of them
    tokenizer.json     ──► tokenizer.py's Tokenizer, or None

Our parameters have transformers' names, so little is mapped: experts are stacked, a tied head gets
its weight. Whatever does not fit ends the program in a line that names it.

In the code `theirs` is config.json's keys and values, `ours` the fields of our config.
"""
import dataclasses
import json
import math
import os
import re
from typing import NamedTuple

import torch

from mambino import tokenizer
from mambino.configurator import fail
from mambino.plain import LARGEST
from mambino.weights.checkpoint import HybridConfig, config_of
from mambino.weights.fitting import model_of_shapes
from mambino.weights.tensor_files import read_bin, read_json, read_safetensors

MOST_LAYERS = 1000
WEIGHTS = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)


# --- what is known of each family -----------------------------------------------------------------

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


class Family(NamedTuple):
    """A model_type of config.json."""
    kind: str                       # our model of it
    defaults: dict                  # what a missing key of config.json stands for
    version: int = 0                # of a Mamba
    experts: Experts = None
    width_key: str = 'intermediate_size'    # the inner width of an MLP, or of an expert
    qk_norm: bool = False


FAMILIES = {
    'llama': Family('gpt', dict(rms_norm_eps=1e-6)),
    'qwen3': Family('gpt', dict(rms_norm_eps=1e-6, head_dim=128), qk_norm=True),
    'mistral': Family('gpt', dict(rms_norm_eps=1e-6, sliding_window=4096)),
    'mixtral': Family(
        'gpt',
        dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        experts=EXPERTS['mixtral']),
    'qwen3_moe': Family(
        'gpt',
        dict(rms_norm_eps=1e-6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
             norm_topk_prob=False),
        experts=EXPERTS['qwen3_moe'],
        width_key='moe_intermediate_size',
        qk_norm=True),
    'mambino_hybrid': Family('hybrid', {}),
    'mamba': Family('mamba', dict(state_size=16, tie_word_embeddings=True), version=1),
    'mamba2': Family('mamba', dict(state_size=128, head_dim=64, n_groups=8), version=2),
}
# families by ssm_cfg.layer of an original checkpoint
ORIGINAL = {'Mamba1': 'mamba', 'Mamba2': 'mamba2'}

ONLY = {  # the values our models can represent, and why no other; a key may be missing or null
    'quantization_config':
        ([None], 'quantized weights cannot be read; save the model in fp32, fp16 or bf16'),
    'tie_word_embeddings': ([False, True], 'must be true or false'),
    'hidden_act': (['silu', 'swish'], 'our models have SiLU'),
    'attention_bias': ([False], 'our attention has no biases'),
    'mlp_bias': ([False], 'our MLP has no biases'),
    'partial_rotary_factor': ([1], 'our rotary positions turn whole heads'),
    'norm_topk_prob': ([True], 'the weights of the experts of a token sum to 1 in our models'),
    'decoder_sparse_step': ([1], 'our models have experts in every layer'),
    'mlp_only_layers': ([[]], 'our models have experts in every layer'),
    'use_bias': ([False], 'the projections of our Mamba have no biases'),
    'use_conv_bias': ([True], 'the convolution of our Mamba has a bias'),
    'time_step_limit': ([[0, math.inf]], 'our Mamba-2 does not limit its time steps'),
    'rms_norm': ([True], 'our Mamba norms by RMSNorm'),
    'norm_before_gate': ([False], 'our Mamba-2 gates first, then norms'),
}
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


def refuse(key, value, why):
    """ValueError about a key of config.json."""
    raise ValueError(f'{key}={json.dumps(value)}: {why}')


def number(theirs, key, default=None, kind=int):
    """A number of config.json. ValueError if it is none, or missing without a default."""
    value = default if theirs.get(key) is None else theirs[key]
    if value is None:
        raise ValueError(f'{key} is missing')
    if type(value) not in (int, float) or not abs(value) <= LARGEST or value != kind(value):
        refuse(key, value, 'must be a whole number' if kind is int else 'must be a number')
    return kind(value)


# --- config.json ----------------------------------------------------------------------------------

def to_ours(theirs):
    """config.json → (kind, the fields of our config that it sets). ValueError says what cannot be
    represented."""
    if 'model_type' not in theirs and 'd_model' in theirs:
        theirs = from_original(theirs)
    model_type = theirs.get('model_type')
    if model_type == 'falcon_h1':
        refuse('model_type', model_type, 'its embeddings are not normed, those of our hybrid are; a '
               'model that export.py wrote in this form goes on from its out_dir')
    if model_type not in list(FAMILIES):                    # a list: it may be anything JSON has
        refuse('model_type', model_type, f'supported are {", ".join(FAMILIES)}')
    family = FAMILIES[model_type]
    theirs = {**family.defaults, **theirs}
    for key, (allowed, why) in ONLY.items():
        if theirs.get(key) is not None and theirs[key] not in allowed:
            refuse(key, theirs[key], why)
    return family.kind, FIELDS[family.kind](theirs, family)


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


def common_fields(theirs):
    """The fields that all but the hybrids have in common."""
    return dict(
        vocab_size=number(theirs, 'vocab_size'),
        n_layer=number(theirs, 'num_hidden_layers'),
        n_embd=number(theirs, 'hidden_size'),
        tie_embeddings=bool(theirs.get('tie_word_embeddings')),
    )


def mamba_fields(theirs, family):
    """The fields of our MambaConfig. chunk_size is left at ours: it decides the speed, not the
    result."""
    ours = common_fields(theirs) | dict(
        version=family.version,
        state_size=number(theirs, 'state_size'),
        expand=number(theirs, 'expand', 2),
        conv_kernel=number(theirs, 'conv_kernel', 4),
        norm_eps=number(theirs, 'layer_norm_epsilon', 1e-5, float),
    )
    if family.version == 2:
        ours['head_dim'] = number(theirs, 'head_dim')
        ours['n_groups'] = number(theirs, 'n_groups')
    if family.version == 1 and theirs.get('time_step_rank') != 'auto':      # else ours is the same rule
        ours['time_step_rank'] = number(theirs, 'time_step_rank', 0)
    return ours


def gpt_fields(theirs, family):
    """The fields of our GPTConfig."""
    ours = common_fields(theirs) | dict(
        n_head=number(theirs, 'num_attention_heads'),
        n_kv_head=number(theirs, 'num_key_value_heads', 0),
        head_dim=number(theirs, 'head_dim', 0),
        intermediate_size=number(theirs, family.width_key),
        block_size=number(theirs, 'max_position_embeddings'),
        norm_eps=number(theirs, 'rms_norm_eps', kind=float),
        qk_norm=family.qk_norm,
        window=window_of(theirs),
        rope_theta=rope_theta_of(theirs),
    )
    if family.experts:
        key = 'num_local_experts' if theirs.get('num_local_experts') is not None else 'num_experts'
        ours['n_expert'] = number(theirs, key)
        ours['n_expert_active'] = number(theirs, 'num_experts_per_tok')
    return ours


def hybrid_fields(theirs, family):
    """The fields of our HybridConfig, which such a config.json has under their own names."""
    theirs = {'tie_embeddings': theirs.get('tie_word_embeddings'), **theirs}
    ours = {}
    for field in dataclasses.fields(HybridConfig):
        value = theirs.get(field.name)
        if value is None:
            continue
        if field.type in (int, float):
            ours[field.name] = number(theirs, field.name, kind=field.type)
            continue
        if type(value) is not field.type:
            must = 'must be true or false' if field.type is bool else 'must be a string'
            refuse(field.name, value, must)
        ours[field.name] = value
    return ours


# by our kind of model
FIELDS = {'mamba': mamba_fields, 'gpt': gpt_fields, 'hybrid': hybrid_fields}
EMBEDDING = {
    'mamba': 'backbone.embeddings.weight',
    'gpt': 'model.embed_tokens.weight',
    'hybrid': 'model.embed_tokens.weight',
}


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

def files_of_weights(folder):
    """(The file of weights or their index that a folder has, the paths of all files of weights)."""
    first = next((name for name in WEIGHTS if os.path.exists(os.path.join(folder, name))), None)
    if first is None:
        fail(f'{folder}: holds no weights, none of {", ".join(WEIGHTS)}')
    names = [first]
    if first.endswith('.json'):
        weight_map = read_json(os.path.join(folder, first)).get('weight_map')
        if not (isinstance(weight_map, dict)
                and all(isinstance(name, str) for name in weight_map.values())):
            fail(f'{os.path.join(folder, first)}: has no weight_map')
        names = sorted(set(weight_map.values()))
    for name in names:
        if re.search(r'[/\\\0]', name) or name in ('', '.', '..'):
            fail(f'{os.path.join(folder, first)}: names {name!r}, a file elsewhere')
    return first, [os.path.join(folder, name) for name in names]


def read_weights(folder):
    """{name: fp32 tensor} of all files of weights in a folder, in transformers' file and tensor
    names."""
    first, paths = files_of_weights(folder)
    weights = {}
    for path in paths:
        if not os.path.exists(path):
            fail(f'{path}: no such file, but {first} names it')
        read = read_safetensors if path.endswith('.safetensors') else read_bin
        try:
            weights.update(read(path))
        except (OSError, ValueError) as error:
            fail(f'{path}: cannot be read: {error}')
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            # a header of another make
            fail(f'{path}: cannot be read: {error!r}')
    return weights


def to_our_names(weights):
    """Renames in place what is called otherwise in our models, and in today's transformers."""
    for name in list(weights):
        if name.endswith('rotary_emb.inv_freq'):                            # old Llamas saved a table
            del weights[name]
    if 'backbone.embedding.weight' in weights:
        weights['backbone.embeddings.weight'] = weights.pop('backbone.embedding.weight')
    for experts in EXPERTS.values():
        stack_experts(weights, experts)


def stack_experts(weights, experts):
    """The experts of each layer become two stacks, in place."""
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


# --- all of it ------------------------------------------------------------------------------------

def load_hf(folder):
    """→ (kind, config as a dict, weights as a state dict in fp32, tokenizer or None), see the top
    of the file."""
    path = os.path.join(folder, 'config.json')
    if not os.path.exists(path):
        fail(f'{path}: no such file; hf: takes a folder that save_pretrained of transformers wrote')
    try:
        kind, config = to_ours(read_json(path))
        layers = config.get('n_layer', 0)
        net = model_of_shapes(kind, config | dict(n_layer=min(layers, MOST_LAYERS)))
        if layers > MOST_LAYERS:
            raise ValueError(f'{layers} layers are more than any model has')
    except (ValueError, ArithmeticError) as error:
        fail(f'{path}: {error}')
    except (AttributeError, KeyError, TypeError) as error:      # of values of another type
        fail(f'{path}: not a sound config.json ({type(error).__name__}: {error})')
    weights = read_weights(folder)
    try:
        to_our_names(weights)
    except (KeyError, RuntimeError) as error:
        fail(f'{folder}: the experts are not complete or not of one shape: '
             f'{str(error).splitlines()[0]}')
    if net.config.tie_embeddings:
        tie_head(weights, kind, path)
    check_shapes(weights, net.state_dict(), folder)
    return kind, config_of(net), weights, tokenizer_in(folder, net.config.vocab_size)


def tie_head(weights, kind, path):
    """The head gets the embedding for its weight, in place; another one of its own is refused."""
    embedding = weights.get(EMBEDDING[kind])
    if embedding is None:
        return
    head = weights.setdefault('lm_head.weight', embedding)
    if not torch.equal(head, embedding):
        fail(f'{path}: tie_word_embeddings=true, but lm_head.weight is not the embedding; if it should '
             'not be, set it to false')


def check_shapes(weights, wanted, folder):
    """Ends the program in a line if weights do not have the very names and shapes of `wanted`."""
    differences = {
        'is missing': wanted.keys() - weights.keys(),
        'is not part of the model': weights.keys() - wanted.keys(),
    }
    for trouble, names in differences.items():
        if names:
            more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
            fail(f'{folder}: the tensor {min(names)}{more} {trouble} that config.json describes')
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            fail(f'{folder}: {name} has shape {tuple(tensor.shape)}, by config.json it should be '
                 f'{tuple(wanted[name].shape)}')


def tokenizer_in(folder, vocab_size):
    """The tokenizer in a folder, or None. It must not have more ids than the model."""
    path = os.path.join(folder, tokenizer.FILE)
    if not os.path.exists(path):
        return None
    tok = tokenizer.load_tokenizer(path)
    if tok.vocab_size > vocab_size:
        fail(f'{path}: has {tok.vocab_size} ids, more than config.json\'s vocab_size={vocab_size}')
    return tok
