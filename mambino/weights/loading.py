"""Opens a model from anywhere: a run of train.py, an adapter beside its base, rounded weights, a folder of transformers.

    net = model_of(load_checkpoint('out'))      # in eval mode on the CPU; an adapter's with its base, rounded weights as they are
    base = load_base('hf:folder')               # {'kind', 'config', 'weights', 'tokenizer', …}: a model to begin a training with

    out_dir ──► load_checkpoint ──► build ──► weights, rounded or not ──► net
                                      └─ an adapter: its base by load_base, then attach
"""
import os
import re

from mambino.configurator import fail
from mambino.weights import adapters, quantize
from mambino.weights.checkpoint import build, fingerprint, load_checkpoint, refuse_quantized, tokenizer_of
from mambino.weights.from_hf import load_hf


def model_of(ckpt):
    """The model in a checkpoint, in eval mode on the CPU; an adapter's with its base."""
    try:
        if ckpt.get('adapter'):
            return with_base(ckpt).eval()
        net = build(ckpt['kind'], ckpt['config'])
        if ckpt.get('quantized'):
            quantize.prepare_quantized(net, ckpt['quantized'])
        net.load_state_dict(ckpt['weights'])
    except (TypeError, ValueError, RuntimeError) as error:
        fail(f'the checkpoint\'s weights and settings do not fit together: {str(error).splitlines()[0]}')
    return net.eval()


def load_base(source):
    """A model to begin with: of the checkpoint in an out_dir, an adapter merged into its base, or in hf:folder as transformers saved it →
    {'kind', 'config', 'weights', 'tokenizer', 'tokenizer_path', 'block_size'}."""
    if source.startswith('hf:'):
        folder = source.removeprefix('hf:')
        kind, config, weights, tok = load_hf(folder)
        return dict(kind=kind, config=config, weights=weights, tokenizer=tok, tokenizer_path=os.path.join(folder, 'tokenizer.json'),
                    block_size=0)
    ckpt = refuse_quantized(load_checkpoint(source), source)
    if ckpt.get('adapter'):
        ckpt['weights'] = merged_weights(ckpt, source)
    name = ckpt['settings']['dataset']                      # in data/, or a path; or a mixture, all of one tokenizer
    folders = [os.path.join(root, name) for name in (name, re.sub(r':[^:,]*$', '', name.split(',')[0])) for root in ('data', '')]
    return dict(kind=ckpt['kind'], config=ckpt['config'], weights=ckpt['weights'], tokenizer=tokenizer_of(ckpt),
                tokenizer_path=next(filter(os.path.isdir, folders), folders[0]), block_size=ckpt['config']['block_size'])


def base_of(ckpt, source=''):
    """The base of an adapter's checkpoint, as load_base gives it: at `source`, else where it was in training."""
    how = ckpt['adapter']
    places = [source] if source else list(dict.fromkeys((how['base'], how['base_at'])))
    found = [place for place in places if os.path.exists(place.removeprefix('hf:'))]
    for place in found:
        base = load_base(place)
        if fingerprint(base['weights']) == how['base_fingerprint']:
            return base
    if found:
        fail(f'{found[-1]}: has other weights than the base of this adapter had, which was made for them; put those back, or train it anew')
    fail(f'{places[-1]}: the base model of this adapter is not there any more; put it back, or say where it is: in training by '
         '--init_from=its out_dir, else by --out_dir=its out_dir --adapters=the adapter\'s')


def with_base(ckpt, base=None):
    """The model of an adapter's checkpoint: its base, and the adapter attached. base: if it is loaded already."""
    base = base or base_of(ckpt)
    net = build(ckpt['kind'], ckpt['config'])
    net.load_state_dict(base['weights'])
    return adapters.attach_adapter(net, ckpt)


def merged_weights(ckpt, source):
    """The weights of an adapter's checkpoint, its base's with the adapter in them; a prefix ends the program in a line."""
    try:
        return adapters.merge_adapters(model_of(ckpt)).state_dict()
    except ValueError as error:
        fail(f'{source}: {error}')
