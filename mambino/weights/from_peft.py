"""Reads an adapter: of train.py, or what peft saved in a folder.

    attach_adapter(net, load_adapter('out-mine'))           # a run of train.py --adapter=
    attach_adapter(net, load_adapter('peft-folder'))        # adapter_config.json and its tensors
"""
import math
import os

from mambino.configurator import fail
from mambino.plain import number, parse_json, table, whole
from mambino.weights.checkpoint import load_checkpoint
from mambino.weights.soundness import check_adapter
from mambino.weights.tensor_files import read_safetensors

# what peft says of a LoRA, and has here its meaning, or none
KNOWN = {
    'task_type', 'peft_type', 'auto_mapping', 'peft_version', 'base_model_name_or_path', 'revision',
    'inference_mode', 'r', 'target_modules', 'exclude_modules', 'lora_alpha', 'lora_dropout',
    'fan_in_fan_out', 'bias', 'use_rslora', 'init_lora_weights', 'layers_to_transform',
    'layers_pattern', 'megatron_core', 'qalora_group_size', 'eva_config', 'ensure_weight_tying',
}
# ways to begin a LoRA that leave the base as it is
UNCHANGED = (True, False, None, 'gaussian', 'orthogonal', 'eva')


def load_adapter(path):
    """What attach_adapter takes: an adapter's checkpoint, or what peft saved in a folder. Ends the
    program in a line if that cannot be read."""
    if not os.path.exists(os.path.join(path, 'adapter_config.json')):
        return load_checkpoint(path)
    try:
        return read_peft(path)
    except OSError as error:
        fail(f'{error.filename}: {error.strerror}; an adapter of peft is adapter_config.json and '
             'adapter_model.safetensors')
    except ValueError as error:
        fail(f'{path}: {error}')
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        fail(f'{path}: not a sound adapter of peft ({type(error).__name__}: {error})')


def read_peft(folder):
    """An adapter that peft saved, as attach_adapter takes it: {'adapter', 'weights'}. ValueError if
    it is of another kind than those here."""
    with open(os.path.join(folder, 'adapter_config.json'), encoding='utf-8') as f:
        theirs = parse_json(f.read())
    if not table(theirs):
        raise ValueError('adapter_config.json is no JSON object')
    tensors = dict(read_safetensors(os.path.join(folder, 'adapter_model.safetensors')))
    peft_type = theirs.get('peft_type')
    if peft_type == 'PREFIX_TUNING' and not theirs.get('prefix_projection'):
        spec, weights = read_prefix(theirs, tensors)
    elif peft_type == 'LORA' and not odd_settings(theirs):
        spec, weights = read_lora(theirs, tensors)
    else:
        unknown = ', '.join(unknown_settings(theirs)) or 'its settings'
        raise ValueError(f'a {peft_type} of peft with {unknown} is not known here; read are plain LoRA, '
                         'begun beside the base as it is, and PREFIX_TUNING without projection')
    base = dict(base=theirs.get('base_model_name_or_path') or '', base_at='', base_fingerprint=None)
    check_adapter(spec | base)
    return dict(adapter=spec | base, weights=weights, is_peft=True)


def unknown_settings(theirs):
    """Names of what is set, and has no meaning here."""
    return [name for name, value in theirs.items() if value and name not in KNOWN]


def odd_settings(theirs):
    """Whether a LoRA is other than ours."""
    return bool(unknown_settings(theirs) or theirs.get('bias', 'none') != 'none'
                or theirs.get('init_lora_weights', True) not in UNCHANGED)


def read_prefix(theirs, tensors):
    """→ (the spec of a prefix, its weights): n virtual tokens, of each layer keys and values of K
    heads."""
    n = theirs['num_virtual_tokens']
    layers = theirs['num_layers']
    K = theirs['num_attention_heads']
    if not all(whole(size, 1) for size in (n, layers, K, theirs['token_dim'])):
        raise ValueError('its sizes must be whole numbers above 0')
    P = theirs['token_dim'] // K
    embeddings = tensors['prompt_embeddings'].view(n, layers, 2, K, P)
    embeddings = embeddings.permute(1, 2, 3, 0, 4)          # (layers, 2, K, n, P)
    weights = {}
    for layer, (k, v) in enumerate(embeddings):
        weights[f'prefix.k.{layer}'] = k[None].clone()
        weights[f'prefix.v.{layer}'] = v[None].clone()
    return dict(type='prefix', length=n), weights


def read_lora(theirs, tensors):
    """→ (the spec of a LoRA, its weights)."""
    weights = {key.removeprefix('base_model.model.'): value for key, value in tensors.items()}
    rank = theirs['r']
    if not whole(rank, 1) or not number(theirs['lora_alpha']):
        raise ValueError(f'r={rank!r} and lora_alpha={theirs["lora_alpha"]!r} must be numbers above 0')
    scale = math.sqrt(rank) if theirs.get('use_rslora') else 1.0
    spec = dict(
        type='lora',
        rank=rank,
        alpha=float(theirs['lora_alpha'] * scale),
        dropout=theirs.get('lora_dropout', 0.0),
        targets=','.join(sorted({key.rpartition('.lora_')[0] for key in weights})),
    )
    return spec, weights
