"""Opens a model from anywhere: a run of train.py, an adapter beside its base, rounded weights, a folder
of transformers.

    net = model_of(contents_of('out'))          # in eval mode on the CPU; an adapter's with its base
    net, context = prepare_model(net, 'cuda', dtype='auto', precision='int8')   # to generate with
    base = load_base('hf:folder')               # {'kind', 'config', 'weights', …}: to train on from

    out_dir ──► contents_of ──► build ──► weights, rounded or not ──► net
                                      └─ an adapter: its base by load_base, then attach_adapter
"""
import math
import os
import re
import sys

import torch

from mambino.configurator import fail, split_list
from mambino.machine import autocast, choose_dtype
from mambino.weights.adapters import attach_adapter, merge_adapters
from mambino.weights.checkpoint import fingerprint, load_checkpoint, refuse_quantized, tokenizer_of
from mambino.weights.dense import keep_rounded, lay_together, read_few_rows
from mambino.weights.fitting import build_with
from mambino.weights.from_hf import load_hf
from mambino.weights.from_peft import load_adapter
from mambino.weights.quantize import quantize_model

# --- one model ------------------------------------------------------------------------------------

def contents_of(source):
    """The contents of a checkpoint in an out_dir; or of hf:folder, as transformers saved it, what a
    checkpoint would say before the first step."""
    if not source.startswith('hf:'):
        return load_checkpoint(source)
    base = load_base(source)
    return dict(
        kind=base['kind'],
        config=base['config'],
        weights=base['weights'],
        optimizers=[],
        scaler=None,
        rng=None,
        counters=dict(step=0, tokens_seen=0, best_loss=math.inf, bad_evals=0, evaluated=-1, seconds=0.0),
        settings=dict(dataset=source.removeprefix('hf:')),  # where texts find the tokenizer
        tokenizer=base['tokenizer'].state() if base['tokenizer'] else None,
        metadata=dict(step=0, tokens_seen=0, seconds=0.0, device='cpu', recent=[]),
    )


def require_tokenizer(ckpt, source):
    """The tokenizer in a checkpoint's contents; without one the program ends in a line."""
    tok = tokenizer_of(ckpt)
    if tok is None and source.startswith('hf:'):
        fail(f'{source}: has no tokenizer.json, so there is nothing to read or write text with; save it there with '
             'transformers: tokenizer.save_pretrained(folder)')
    if tok is None:
        fail(f'{source}: trained on a bare .bin without a tokenizer, so there is nothing to read or '
             'write text with')
    return tok


def model_of(ckpt):
    """The model in a checkpoint, in eval mode on the CPU; an adapter's with its base."""
    try:
        if ckpt.get('adapter'):
            return with_base(ckpt).eval()
        net = build_with(ckpt['kind'], ckpt['config'], ckpt['weights'], ckpt.get('quantized'))
    except ValueError as error:
        fail(f'the checkpoint\'s weights and settings do not fit together: {error}')
    return net.eval()


def load_base(source):
    """A model to begin with: of the checkpoint in an out_dir, an adapter merged into its base, or
    in hf:folder as transformers saved it → {'kind', 'config', 'weights', 'tokenizer',
    'tokenizer_path', 'block_size'}."""
    if source.startswith('hf:'):
        folder = source.removeprefix('hf:')
        kind, config, weights, tok = load_hf(folder)
        return dict(
            kind=kind,
            config=config,
            weights=weights,
            tokenizer=tok,
            tokenizer_path=os.path.join(folder, 'tokenizer.json'),
            block_size=0,
        )
    ckpt = refuse_quantized(load_checkpoint(source), source)
    if ckpt.get('adapter'):
        ckpt['weights'] = merged_weights(ckpt, source)
    return dict(
        kind=ckpt['kind'],
        config=ckpt['config'],
        weights=ckpt['weights'],
        tokenizer=tokenizer_of(ckpt),
        tokenizer_path=folder_of_dataset(ckpt['settings']['dataset']),
        block_size=ckpt['config']['block_size'],
    )


def folder_of_dataset(name):
    """Where a dataset lies: in data/, or a path; of a mixture, all of one tokenizer, its first
    one."""
    first = re.sub(r':[^:,]*$', '', split_list(name, ',')[0])
    folders = [os.path.join(root, dataset) for dataset in (name, first) for root in ('data', '')]
    return next(filter(os.path.isdir, folders), folders[0])


# --- adapters -------------------------------------------------------------------------------------

def base_of(ckpt, source=''):
    """The base of an adapter's checkpoint, as load_base gives it: at `source`, else where it was in
    training."""
    spec = ckpt['adapter']
    sources = [source] if source else list(dict.fromkeys((spec['base'], spec['base_at'])))
    existing = [path for path in sources if os.path.exists(path.removeprefix('hf:'))]
    for path in existing:
        base = load_base(path)
        if fingerprint(base['weights']) == spec['base_fingerprint']:
            return base
    if existing:
        fail(f'{existing[-1]}: has other weights than the base of this adapter had, which was made for '
             'them; put those back, or train it anew')
    fail(f'{sources[-1]}: the base model of this adapter is not there any more; put it back, or say '
         'where it is: in training by --init_from=its out_dir, else by --out_dir=its out_dir '
         '--adapters=the adapter\'s')


def with_base(ckpt, base=None):
    """The model of an adapter's checkpoint: its base, and the adapter attached. base: if it is
    loaded already."""
    base = base or base_of(ckpt)
    net = build_with(ckpt['kind'], ckpt['config'], base['weights'])
    return attach_adapter(net, ckpt)


def merged_weights(ckpt, source):
    """The weights of an adapter's checkpoint, its base's with the adapter in them; a prefix ends
    the program in a line."""
    try:
        return merge_adapters(model_of(ckpt)).state_dict()
    except ValueError as error:
        fail(f'{source}: {error}')


def load_adapters(setting):
    """[(checkpoint, weight), …] of the setting `adapters`, out-a,out-b:0.5; a comma in a name is
    written as \\,."""
    loaded = []
    parts = [setting] if os.path.exists(setting) else split_list(setting, ',')
    for part in filter(None, parts):
        path, _, weight = part.rpartition(':')
        if not path or os.path.exists(part):
            path = part
            weight = '1'
        ckpt = load_adapter(path)
        try:
            loaded.append((ckpt, float(weight)))
        except ValueError:
            fail(f'adapters={setting}: {weight} is not a weight; write it as '
                 '--adapters=out-a,out-b:0.5')
        if not ckpt.get('adapter'):
            fail(f'adapters={setting}: {path} holds a whole model, no adapter')
    return loaded


def attach_adapters(net, loaded, setting):
    """Attaches what load_adapters returned for this setting; where that cannot be, the program ends
    in a line."""
    try:
        for ckpt, weight in loaded:
            attach_adapter(net, ckpt, weight)
    except ValueError as error:
        fail(f'adapters={setting}: {error}')
    return net


def fingerprint_of(ckpt, extra=()):
    """The fingerprint of a checkpoint's model with the adapters that load_adapters returned: whose sessions
    it can go on with."""
    parts = [(ckpt, 1.0), *extra]
    return fingerprint({f'{n}.{name}.{weight}': tensor for n, (part, weight) in enumerate(parts)
                        for name, tensor in part['weights'].items()})


# --- for generation -------------------------------------------------------------------------------

def prepare_model(net, device, dtype='auto', precision=''):
    """→ (a model, in place, on its device and in its precision; the context it computes in).

    dtype: 'auto', 'float32', 'bfloat16' or 'float16'. precision: that of quantize.py which its
    weights are rounded to, or ''. What cannot be ends the program in a line."""
    on_cpu = device == 'cpu'
    dtype = choose_dtype(dtype, device)
    if device.startswith('cuda:'):              # 'cuda' is the present one
        torch.cuda.set_device(device)           # of what is asked of no device in particular nothing is on another
    if device.startswith('cuda'):
        if dtype != 'float32' and not precision:
            keep_rounded(net, dtype)
    net.to(device)
    if device.startswith('cuda'):
        lay_together(net)
    if dtype == 'bfloat16' and on_cpu and not precision:
        precision = 'bfloat16'          # rounded weights are faster there than autocast
    if precision:
        try:
            quantize_model(net, precision)
        except ValueError as error:
            fail(f'quantize={precision}: {error}')
        if on_cpu:
            dtype = 'float32'           # what rounded weights are computed with
        elif precision != 'bfloat16':
            print(f'note: quantize={precision} saves memory on a GPU, not time: a matrix is made of the codes for each '
                  'token', file=sys.stderr)
    elif on_cpu and dtype == 'float32':
        read_few_rows(net)
    return net, autocast(device, dtype)
