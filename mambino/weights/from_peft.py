"""Reads an adapter: of train.py, or what peft saved in a folder.

    adapters.attach_adapter(net, load_adapter('out-mine'))          # a run of train.py --adapter=
    adapters.attach_adapter(net, load_adapter('peft-folder'))       # adapter_config.json and adapter_model.safetensors
"""
import json
import math
import os

from mambino.configurator import fail
from mambino.weights.checkpoint import load_checkpoint
from mambino.weights.from_hf import read_safetensors

PLAIN = {           # what peft says of a LoRA, and has here its meaning, or none
    'task_type', 'peft_type', 'auto_mapping', 'peft_version', 'base_model_name_or_path', 'revision', 'inference_mode', 'r', 'target_modules',
    'exclude_modules', 'lora_alpha', 'lora_dropout', 'fan_in_fan_out', 'bias', 'use_rslora', 'init_lora_weights', 'layers_to_transform',
    'layers_pattern', 'megatron_core', 'qalora_group_size', 'eva_config', 'ensure_weight_tying'}
UNCHANGED = (True, False, None, 'gaussian', 'orthogonal', 'eva')    # ways to begin a LoRA that leave the base as it is


def load_adapter(path):
    """What `attach` takes: an adapter's checkpoint, or what peft saved in a folder. Ends the
    program in a line if that cannot be read."""
    if not os.path.exists(os.path.join(path, 'adapter_config.json')):
        return load_checkpoint(path)
    try:
        return read_peft(path)
    except OSError as error:
        fail(f'{error.filename}: {error.strerror}; an adapter of peft is adapter_config.json and adapter_model.safetensors')
    except ValueError as error:
        fail(f'{path}: {error}')
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        fail(f'{path}: not a sound adapter of peft ({type(error).__name__}: {error})')


def read_peft(folder):
    """An adapter that peft saved, as `attach` takes it: {'adapter', 'weights'}. ValueError if it is
    of another kind than those here."""
    with open(os.path.join(folder, 'adapter_config.json'), encoding='utf-8') as f:
        theirs = json.load(f)
    tensors = dict(read_safetensors(os.path.join(folder, 'adapter_model.safetensors')))
    base = dict(base=theirs.get('base_model_name_or_path') or '', base_at='', base_fingerprint=None)
    kind = theirs.get('peft_type')
    if kind == 'PREFIX_TUNING' and not theirs.get('prefix_projection'):
        n, K = theirs['num_virtual_tokens'], theirs['num_attention_heads']
        parts = tensors['prompt_embeddings'].view(n, theirs['num_layers'], 2, K, theirs['token_dim'] // K).permute(1, 2, 3, 0, 4)
        weights = {f'prefix.{name}.{i}': part[None].clone() for i, pair in enumerate(parts) for name, part in zip('kv', pair)}
        return dict(adapter=dict(type='prefix', length=n) | base, weights=weights)
    odd = [name for name, value in theirs.items() if value and name not in PLAIN]
    if kind != 'LORA' or odd or theirs.get('bias', 'none') != 'none' or theirs.get('init_lora_weights', True) not in UNCHANGED:
        raise ValueError(f'a {kind} of peft with {", ".join(odd) or "its settings"} is not known here; read are plain LoRA, begun beside '
                         'the base as it is, and PREFIX_TUNING without projection')
    weights = {key.removeprefix('base_model.model.'): value for key, value in tensors.items()}
    scale = math.sqrt(theirs['r']) if theirs.get('use_rslora') else 1.0
    how = dict(type='lora', rank=theirs['r'], alpha=theirs['lora_alpha'] * scale, dropout=theirs.get('lora_dropout', 0.0),
               targets=','.join(sorted({key.rpartition('.lora_')[0] for key in weights})))
    return dict(adapter=how | base, weights=weights)
