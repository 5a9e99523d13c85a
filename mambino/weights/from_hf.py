"""Reads a model that Hugging Face's transformers saved, to train or sample it here; none of its
packages is needed.

    python train.py --init_from=hf:folder              # folder: what save_pretrained wrote, or a downloaded repository
    kind, config, weights, tok = load_hf('folder')     # checkpoint.build(kind, config).load_state_dict(weights)

Taken are llama, qwen3, mistral, mixtral, qwen3_moe, mamba and mamba2, the original checkpoints of
state-spaces/mamba, and the hybrids that export.py wrote with a modelling file of their own, which
is not needed here:

    config.json        ──► the fields of our config. What our models would compute otherwise is refused
    *.safetensors      ──► {name: fp32 tensor}: one file or many with an index, fp64, fp32, fp16 or bf16, or pytorch_model.bin;
                           no code in a file is ever run. Names and shapes must be those of our model, all of them
    tokenizer.json     ──► tokenizer.py's Tokenizer, or None

Our parameters have transformers' names, so little is mapped: experts are stacked, a tied head gets
its weight. Whatever does not fit ends the program in a line that names it. """
import dataclasses
import json
import math
import os

import torch

from mambino import tokenizer
from mambino.configurator import fail
from mambino.weights import checkpoint

FLOATS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
WEIGHTS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
FAMILIES = {  # what a missing key of config.json stands for
    'llama': dict(rms_norm_eps=1e-6),
    'qwen3': dict(rms_norm_eps=1e-6, head_dim=128),
    'mistral': dict(rms_norm_eps=1e-6, sliding_window=4096),
    'mixtral': dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
    'qwen3_moe': dict(rms_norm_eps=1e-6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False),
    'mambino_hybrid': {},
    'mamba': dict(state_size=16, tie_word_embeddings=True),
    'mamba2': dict(state_size=128, head_dim=64, n_groups=8),
}
EXPERTS = {  # where a layer's experts are on the disk, and what the gate, up and down matrix of one is called
    'mixtral': ('block_sparse_moe', 'w1', 'w3', 'w2'),
    'qwen3_moe': ('mlp', 'gate_proj', 'up_proj', 'down_proj'),
}
ONLY = {  # the values our models can represent, and why no other; a key may be missing or null
    'quantization_config': ([None], 'quantized weights cannot be read; save the model in fp32, fp16 or bf16'),
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
SSM = {  # keys of an original checkpoint's ssm_cfg and transformers' names of them; others change the shapes, or nothing
    'd_state': 'state_size', 'd_conv': 'conv_kernel', 'expand': 'expand', 'headdim': 'head_dim', 'ngroups': 'n_groups',
    'dt_rank': 'time_step_rank', 'bias': 'use_bias', 'conv_bias': 'use_conv_bias', 'dt_limit': 'time_step_limit',
    'rmsnorm': 'rms_norm', 'norm_before_gate': 'norm_before_gate'}


def refuse(key, value, why):
    raise ValueError(f'{key}={json.dumps(value)}: {why}')


def number(theirs, key, default=None, kind=int):
    """A number of config.json. ValueError if it is none, or missing without a default."""
    value = default if theirs.get(key) is None else theirs[key]
    if value is None:
        raise ValueError(f'{key} is missing')
    if type(value) not in (int, float) or not math.isfinite(value) or value != kind(value):
        refuse(key, value, 'must be a whole number' if kind is int else 'must be a number')
    return kind(value)


# --- config.json ------------------------------------------------------------------------------------------------------

def from_original(theirs):
    """The config.json of an original Mamba checkpoint in transformers' keys."""
    ssm = theirs.get('ssm_cfg') or {}
    layer = ssm.get('layer', 'Mamba1')
    if layer not in ('Mamba1', 'Mamba2'):
        refuse('ssm_cfg.layer', layer, 'supported are Mamba1, Mamba2')
    multiple = number(theirs, 'pad_vocab_size_multiple', 8)
    vocab_size = -(-number(theirs, 'vocab_size') // multiple) * multiple
    return {**{SSM[key]: value for key, value in ssm.items() if key in SSM}, 'n_groups': ssm.get('ngroups', 1),
            'model_type': 'mamba' if layer == 'Mamba1' else 'mamba2', 'vocab_size': vocab_size,
            'hidden_size': theirs.get('d_model'), 'num_hidden_layers': theirs.get('n_layer'),
            'tie_word_embeddings': theirs.get('tie_embeddings', True),
            'rms_norm': theirs.get('rms_norm', True) and ssm.get('rmsnorm', True)}


def to_ours(theirs):
    """config.json → (kind, the fields of our config that it sets). ValueError says what cannot be
    represented."""
    if 'model_type' not in theirs and 'd_model' in theirs:
        theirs = from_original(theirs)
    family = theirs.get('model_type')
    if family == 'falcon_h1':
        refuse('model_type', family, 'its embeddings are not normed, those of our hybrid are; a model that export.py wrote in this form '
               'goes on from its out_dir')
    if family not in list(FAMILIES):
        refuse('model_type', family, f'supported are {", ".join(FAMILIES)}')
    theirs = {**FAMILIES[family], **theirs}
    for key, (allowed, why) in ONLY.items():
        if theirs.get(key) is not None and theirs[key] not in allowed:
            refuse(key, theirs[key], why)
    if family == 'mambino_hybrid':
        return 'hybrid', hybrid_fields(theirs)
    ours = dict(vocab_size=number(theirs, 'vocab_size'), n_layer=number(theirs, 'num_hidden_layers'),
                n_embd=number(theirs, 'hidden_size'), tie_embeddings=bool(theirs.get('tie_word_embeddings')))
    if family.startswith('mamba'):                    # chunk_size is left at ours: it decides the speed, not the result
        ours.update(version=1 + (family == 'mamba2'), state_size=number(theirs, 'state_size'), expand=number(theirs, 'expand', 2),
                    conv_kernel=number(theirs, 'conv_kernel', 4), norm_eps=number(theirs, 'layer_norm_epsilon', 1e-5, float))
        if family == 'mamba2':
            ours.update(head_dim=number(theirs, 'head_dim'), n_groups=number(theirs, 'n_groups'))
        elif theirs.get('time_step_rank') != 'auto':  # else ours is the same rule
            ours.update(time_step_rank=number(theirs, 'time_step_rank', 0))
        return 'mamba', ours
    ours.update(n_head=number(theirs, 'num_attention_heads'), n_kv_head=number(theirs, 'num_key_value_heads', 0),
                head_dim=number(theirs, 'head_dim', 0),
                intermediate_size=number(theirs, 'moe_intermediate_size' if family == 'qwen3_moe' else 'intermediate_size'),
                block_size=number(theirs, 'max_position_embeddings'), norm_eps=number(theirs, 'rms_norm_eps', kind=float),
                qk_norm=family.startswith('qwen3'), window=window_of(theirs), rope_theta=rope_theta_of(theirs))
    if family in EXPERTS:
        key = 'num_local_experts' if theirs.get('num_local_experts') is not None else 'num_experts'
        ours.update(n_expert=number(theirs, key), n_expert_active=number(theirs, 'num_experts_per_tok'))
    return 'gpt', ours


def hybrid_fields(theirs):
    """The fields of our HybridConfig, which such a config.json has under their own names."""
    theirs, ours = {'tie_embeddings': theirs.get('tie_word_embeddings'), **theirs}, {}
    for field in dataclasses.fields(checkpoint.HybridConfig):
        value = theirs.get(field.name)
        if value is not None and field.type in (int, float):
            ours[field.name] = number(theirs, field.name, kind=field.type)
        elif value is not None:
            if type(value) is not field.type:
                refuse(field.name, value, 'must be true or false' if field.type is bool else 'must be a string')
            ours[field.name] = value
    return ours


def rope_theta_of(theirs):
    """The base of the rotary positions: in rope_parameters since transformers 5, before that a key
    of its own."""
    theta = theirs
    for key in ('rope_scaling', 'rope_parameters'):
        rope = theirs.get(key) or {}
        if not isinstance(rope, dict) or rope.get('rope_type', rope.get('type', 'default')) != 'default':
            refuse(key, rope, 'our rotary positions are not scaled')
        if rope.get('partial_rotary_factor') not in (None, 1):
            refuse(key, rope, ONLY['partial_rotary_factor'][1])
        theta = rope if 'rope_theta' in rope else theta
    return number(theta, 'rope_theta', 1e4, float)


def window_of(theirs):
    """The attention window of all layers, 0 for none. Three keys may say which layers have one; our
    layers are all alike."""
    family, window, kinds = theirs['model_type'], number(theirs, 'sliding_window', 0), theirs.get('layer_types') or []
    if family == 'llama' or (family.startswith('qwen3') and not theirs.get('use_sliding_window')):
        window = 0
    if family == 'qwen3' and window:                  # the only family where layer_types decides
        full = number(theirs, 'max_window_layers', 28)
        if not kinds and 0 < full < number(theirs, 'num_hidden_layers'):
            refuse('max_window_layers', full, 'our layers have all the same window, or none')
        if set(kinds) == {'full_attention'} or (full and not kinds):
            return 0
    if kinds and set(kinds) != {'sliding_attention' if window else 'full_attention'}:
        refuse('layer_types', kinds, f'our layers have all the same window, or none; sliding_window is {window or "not used"}')
    return window


# --- weights ----------------------------------------------------------------------------------------------------------

def read_safetensors(path):
    """Yields (name, fp32 tensor) one by one, so that beside the result one tensor is in memory.
    ValueError if damaged."""
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        start = 8 + int.from_bytes(f.read(8), 'little')
        if start > size:
            raise ValueError(f'no safetensors file, or cut short: of {size} bytes the header alone would be {start}')
        header = json.loads(f.read(start - 8))
        header.pop('__metadata__', None)
        for name, entry in header.items():
            shape, (begin, end) = entry['shape'], entry['data_offsets']
            if entry['dtype'] not in FLOATS:
                raise ValueError(f'{name} has dtype {entry["dtype"]}; read are {", ".join(FLOATS)}')
            dtype = FLOATS[entry['dtype']]
            if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'damaged: {name} of shape {shape} is said to have {end - begin} bytes')
            if start + end > size:
                raise ValueError(f'cut short: it has {size} bytes, and {name} ends at {start + end}')
            f.seek(start + begin)
            data = bytearray(end - begin)
            f.readinto(data)
            yield name, torch.frombuffer(data, dtype=dtype).view(shape).float()


def read_bin(path):
    """Yields (name, fp32 tensor) of a file by torch.save. ValueError if it is none, or holds more
    than tensors."""
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zip, pickle and torch errors
        raise ValueError(f'not a file of PyTorch tensors, or cut short ({type(error).__name__})') from None
    if not isinstance(tensors, dict):
        raise ValueError('not a dict of tensors')
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not torch.is_tensor(tensor) or tensor.dtype not in FLOATS.values():
            raise ValueError(f'{name} is {getattr(tensor, "dtype", type(tensor).__name__)}; read are {", ".join(FLOATS)}')
        yield name, tensor.float()


def read_json(path):
    try:
        with open(path, encoding='utf-8') as f:  # transformers 5 writes infinity as {"__float__": "Infinity"}
            value = json.load(f, object_hook=lambda d: float(d['__float__']) if d.keys() == {'__float__'} else d)
    except (OSError, ValueError, TypeError) as error:
        fail(f'{path}: cannot be read: {error}')
    if not isinstance(value, dict):
        fail(f'{path}: not a JSON object')
    return value


def read_weights(folder):
    """{name: fp32 tensor} of all files of weights in a folder, in transformers' file names and
    tensor names."""
    found = next((name for name in WEIGHTS if os.path.exists(os.path.join(folder, name))), None)
    if found is None:
        fail(f'{folder}: holds no weights, none of {", ".join(WEIGHTS)}')
    files = [found]
    if found.endswith('.json'):
        shards = read_json(os.path.join(folder, found)).get('weight_map')
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            fail(f'{os.path.join(folder, found)}: has no weight_map')
        files = sorted(set(shards.values()))
    weights = {}
    for path in [os.path.join(folder, os.path.basename(file)) for file in files]:  # an index names no other folder
        if not os.path.exists(path):
            fail(f'{path}: no such file, but {found} names it')
        try:
            weights.update((read_safetensors if path.endswith('.safetensors') else read_bin)(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # or a header of another make
            fail(f'{path}: cannot be read: {error if isinstance(error, (OSError, ValueError)) else repr(error)}')
    return weights


def to_our_names(weights):
    """Renames in place what is called otherwise in our models, and in today's transformers."""
    for name in [name for name in weights if name.endswith('rotary_emb.inv_freq')]:  # old Llamas saved a table
        del weights[name]
    if 'backbone.embedding.weight' in weights:
        weights['backbone.embeddings.weight'] = weights.pop('backbone.embedding.weight')
    for block, gate, up, down in EXPERTS.values():
        for router in [name for name in weights if name.endswith(f'.{block}.gate.weight')]:
            old = router.removesuffix('gate.weight')
            new = old.replace(block, 'mlp')
            if new + 'experts.gate_up_proj' in weights:                         # transformers 5 can write stacks too
                continue
            n = len(weights[router])
            weights[new + 'gate.weight'] = weights.pop(router)
            gates, ups, downs = ([weights.pop(f'{old}experts.{e}.{matrix}.weight') for e in range(n)] for matrix in (gate, up, down))
            weights[new + 'experts.gate_up_proj'] = torch.cat((torch.stack(gates), torch.stack(ups)), 1)  # (experts, 2 I, D)
            weights[new + 'experts.down_proj'] = torch.stack(downs)                                       # (experts, D, I)


def load_hf(folder):
    """→ (kind, config as a dict, weights as a state dict in fp32, tokenizer or None), see the top
    of the file."""
    path = os.path.join(folder, 'config.json')
    if not os.path.exists(path):
        fail(f'{path}: no such file; hf: takes a folder that save_pretrained of transformers wrote')
    try:
        kind, config = to_ours(read_json(path))
        with torch.device('cpu' if config.get('low_rank') else 'meta'):  # meta: names and shapes, no memory. A low rank starts from values
            net = checkpoint.build(kind, config)
    except (ValueError, ArithmeticError) as error:
        fail(f'{path}: {error}')
    wanted = net.state_dict()
    weights = read_weights(folder)
    try:
        to_our_names(weights)
    except (KeyError, RuntimeError) as error:
        fail(f'{folder}: the experts are not complete or not of one shape: {str(error).splitlines()[0]}')

    if net.config.tie_embeddings:
        embedding = weights.get('backbone.embeddings.weight' if kind == 'mamba' else 'model.embed_tokens.weight')
        if embedding is not None and not torch.equal(weights.setdefault('lm_head.weight', embedding), embedding):
            fail(f'{path}: tie_word_embeddings=true, but lm_head.weight is not the embedding; if it should not be, set it to false')
    for what, names in (('is missing', wanted.keys() - weights), ('is not part of the model', weights.keys() - wanted)):
        if names:
            more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
            fail(f'{folder}: the tensor {min(names)}{more} {what} that config.json describes')
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            fail(f'{folder}: {name} has shape {tuple(tensor.shape)}, by config.json it should be {tuple(wanted[name].shape)}')

    tok, file = None, os.path.join(folder, tokenizer.FILE)
    if os.path.exists(file):
        tok = tokenizer.load_tokenizer(file)
        if tok.vocab_size > net.config.vocab_size:
            fail(f'{file}: has {tok.vocab_size} ids, more than config.json\'s vocab_size={net.config.vocab_size}')
    return kind, checkpoint.config_of(net), weights, tok
