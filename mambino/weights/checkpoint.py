"""What train.py saves and everything else loads: one file that holds all of a model, and how to
rebuild it.

    net = build('gpt', dict(vocab_size=4096, n_layer=6))
    save_checkpoint('out/ckpt.pt', {'kind': 'gpt', 'weights': ..., ...})   # all that CONTENTS names
    ckpt = load_checkpoint('out')       # best.pt if there is one, else ckpt.pt; or a file
    tok = tokenizer_of(ckpt)            # loading.py has model_of(ckpt)

A checkpoint is read with weights_only=True: tensors and plain values, never code; and if a bit of
it is not as it was written, it is refused. It is written to a temporary name, flushed to the disk
and renamed, so a kill at any moment leaves the old one or the new one, whole. While several
processes share the weights they save in shards: each its share of the tensors, then the first
process the rest, with the tensors' names in their places:

    ckpt.shards/250/      weights, optimizers: see shards.py
    ckpt.pt               the rest, shards: {'step': 250}, and shard_files: {name: checksum}
"""
import dataclasses
import hashlib
import itertools
import os
import shlex
import shutil

import torch

from mambino import files, tokenizer
from mambino.blocks import fills_holes
from mambino.configurator import fail
from mambino.weights import shards, soundness
from model_gpt import GPT, GPTConfig
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig

FORMAT = 1              # a file that holds all
IN_SHARDS = 2           # its tensors lie in a folder beside it
CONTENTS = {'format', 'kind', 'config', 'weights', 'optimizers', 'scaler', 'rng', 'counters', 'settings',
            'tokenizer', 'metadata'}
MODELS = {'mamba': (Mamba, MambaConfig), 'gpt': (GPT, GPTConfig), 'hybrid': (Hybrid, HybridConfig)}


def build(kind, config):
    """The model of this kind with a dict of its config's fields. ValueError says what does not fit
    together."""
    model, fields = MODELS[kind]
    return model(fields(**config))


def save_checkpoint(path, contents):
    """Writes a checkpoint whole or not at all; then the shards of those before it go. OSError or
    RuntimeError (torch's word for a full disk) if it cannot."""
    shards_kept = contents.get('shards')
    with files.whole(path) as f:
        torch.save({'format': IN_SHARDS if shards_kept else FORMAT, **contents}, f)
    folder = shards_of(path)
    if os.path.islink(folder):              # what is behind it is not ours to delete
        return
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if not shards_kept or name != str(shards_kept['step']):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    if not shards_kept:
        shutil.rmtree(folder, ignore_errors=True)


def shards_of(path, step=None):
    """The folder of a checkpoint's shards; those of a step are a folder in it."""
    folder = os.path.splitext(path)[0] + '.shards'
    return folder if step is None else os.path.join(folder, str(step))


def map_values(change, contents, name=''):
    """The same dicts and lists, change(name, value) in the place of every value; a name is like
    'optimizers.0.state.3.exp_avg'."""
    prefix = name and name + '.'
    if isinstance(contents, dict):
        return {key: map_values(change, value, f'{prefix}{key}') for key, value in contents.items()}
    if isinstance(contents, (list, tuple)):
        values = (map_values(change, value, f'{prefix}{i}') for i, value in enumerate(contents))
        return type(contents)(values)
    return change(name, contents)


def set_aside(*paths):
    """Renames what is there of these files and folders, in this order, to ….old; if one of them has
    such a file already, all to ….old2, and so on. Returns the ending."""
    paths = [path for path in paths if os.path.lexists(path)]
    endings = itertools.chain(['.old'], (f'.old{i}' for i in itertools.count(2)))
    ending = next(e for e in endings if not any(os.path.lexists(path + e) for path in paths))
    for path in paths:
        os.rename(path, path + ending)
    return ending


def read_file(path):
    """The contents of a file of torch.save, on the CPU, if all in it is as it was written."""
    damage = files.damage_of(path)
    try:
        if not damage:
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # of zip, pickle, torch: all mean that it is no checkpoint of ours
        damage = type(error).__name__
    fail(f'{path}: not a readable checkpoint (cut short, damaged, or not made by train.py): {damage}'
         + others_beside(path))


def others_beside(path):
    """What to do without a damaged checkpoint, where another lies beside it."""
    folder = os.path.dirname(path)
    latest = os.path.join(folder, 'ckpt.pt')
    names = [os.path.basename(latest), 'best.pt']
    for name in names if os.path.basename(path) in names else []:
        other = os.path.join(folder, name)
        if other == path or not os.path.exists(other) or files.damage_of(other):
            continue
        if path == latest:
            return (f'; {other} is sound: to go on from there, rename {path}, copy {other} to {path} '
                    'and run the same command again')
        return f'; {other} is sound: name it, as in --out_dir={shlex.quote(other)}'
    return ''


def is_export(path):
    """Whether a checkpoint is there that export.py wrote, with nothing to go on training from."""
    try:
        return not torch.load(path, map_location='cpu', weights_only=True, mmap=True)['optimizers']
    except Exception:           # not there, or damaged
        return False


def has_adapter(path):
    """Whether a checkpoint is there that holds an adapter."""
    try:
        return bool(torch.load(path, map_location='cpu', weights_only=True, mmap=True).get('adapter'))
    except Exception:           # not there, or damaged
        return False


def is_complete(settings, counters):
    """Whether a run of these settings has made its steps, or has lost its patience."""
    patience = settings.get('patience') or 0
    return counters['step'] >= settings['max_iters'] or 0 < patience <= counters.get('bad_evals', 0)


def begun_by(path, command):
    """Whether a checkpoint is there of a run that is not complete, and was begun by this command,
    {name: value} of what it named."""
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return ckpt['begun'] == command and not is_complete(ckpt['settings'], ckpt['counters'])
    except Exception:           # not there, damaged, or of a version that did not note it
        return False


def load_checkpoint(path, read_shards=True):
    """The contents of a checkpoint, tensors on the CPU. A folder stands for its best.pt, or else
    its ckpt.pt.

    read_shards: of a checkpoint in shards, too, all tensors are read. Else their names are in their
    places, and `shards` is the folder to read them from."""
    if os.path.isdir(path):
        names = [name for name in ('best.pt', 'ckpt.pt') if os.path.exists(os.path.join(path, name))]
        if not names and os.path.exists(os.path.join(path, 'config.json')):
            fail(f'{path}: holds no checkpoint of train.py; a model that transformers saved is named hf:{path}')
        if not names:
            fail(f'{path}: holds no checkpoint; train one with: python train.py --out_dir={shlex.quote(path)}')
        path = os.path.join(path, names[0])
    if not os.path.exists(path):
        fail(f'{path}: no such checkpoint; train one with: python train.py, or name another '
             '--out_dir')
    ckpt = read_file(path)
    if not isinstance(ckpt, dict) or not CONTENTS <= ckpt.keys():
        fail(f'{path}: a PyTorch file, but not one of train.py\'s checkpoints')
    known = isinstance(ckpt['kind'], str) and ckpt['kind'] in MODELS and isinstance(ckpt['format'], int)
    if not known or ckpt['format'] not in (FORMAT, IN_SHARDS):
        fail(f'{path}: checkpoint format {ckpt["format"]} of a {ckpt["kind"]}; this version reads '
             f'{FORMAT} and {IN_SHARDS}')
    shared = ckpt.get('shards')
    if ckpt['format'] == FORMAT and isinstance(shared, dict) and isinstance(shared.get('world'), int):
        out_dir = os.path.dirname(path) or '.'
        fail(f'{path}: was saved in shards by {shared["world"]} processes of an older version: '
             'go on with that one, which leaves a whole file when it is stopped, or begin with '
             f'{os.path.join(out_dir, "best.pt")}: --init_from={shlex.quote(out_dir)} --out_dir=another')
    try:
        config_class = MODELS[ckpt['kind']][1]
        soundness.check_contents(ckpt, config_class)
        ckpt['config'] = dataclasses.asdict(config_class(**ckpt['config']))     # what an older version did not know
        if not ckpt.get('shards'):
            check_tensors(ckpt)
            return ckpt
        if ckpt['format'] != IN_SHARDS:
            raise ValueError(f'shards do not belong to format {FORMAT}')
    except ValueError as error:
        fail(f'{path}: damaged, or not made by train.py: {error}')

    ckpt['shards'] = shards_of(path, ckpt['shards']['step'])
    ckpt.setdefault('shard_files', None)    # an older version noted no checksums
    if read_shards:
        shards.require(ckpt['shards'], ckpt['shard_files'])
        tensors = shards.read(ckpt.pop('shards'))

        def tensor_of(_, value):
            return tensors.get(value, value) if isinstance(value, str) else value
        for part in ('weights', 'optimizers'):
            ckpt[part] = map_values(tensor_of, ckpt[part])
        try:
            check_tensors(ckpt)
        except ValueError as error:
            fail(f'{path}: its shards are damaged: {error}')
    return ckpt


def check_tensors(ckpt):
    """ValueError if the tensors of a checkpoint are none, or claim more than its file holds."""
    soundness.check_tensors(ckpt['weights'], 'weights', floats=not ckpt.get('quantized'))
    soundness.check_tensors(ckpt.get('carried') or {}, 'carried', floats=False)
    for i, saved in enumerate(ckpt['optimizers']):
        for number, state in saved['state'].items():
            soundness.check_tensors(state, f'optimizers.{i}.{number}', may_be=(int, float))


def refuse_quantized(ckpt, source):
    """The contents of a checkpoint, if its weights have all their bits; else the program ends in a
    line."""
    if ckpt.get('quantized'):
        fail(f'{source}: its weights are quantised, {ckpt["quantized"]}: sample.py writes and scores '
             'text with them, all else takes the run they were made from')
    return ckpt


def tokenizer_of(ckpt):
    """The tokenizer in a checkpoint; None if the model was trained on a bare .bin."""
    if not ckpt.get('tokenizer'):
        return None
    try:
        tok = tokenizer.from_state(ckpt['tokenizer'])
    except ValueError as error:
        fail(f'the tokenizer in the checkpoint cannot be used: {error}')
    most = ids_of_texts(ckpt['config'])
    if tok.vocab_size > most:
        fail(f'the tokenizer in the checkpoint has {tok.vocab_size} ids, more than its model, which has {most} for '
             'text')
    return tok


def ids_of_texts(config):
    """How many ids may stand for text, by a model's config as a checkpoint has it: all but the last one, where that
    stands for a hole."""
    return config['vocab_size'] - fills_holes(config)


def fingerprint(weights):
    """What tells the weights of two models apart, as a hex string: a hash of names, shapes and 256
    numbers of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        some = tensor.detach().flatten()[::max(1, tensor.numel() // 256)].cpu()
        digest.update(f'{name} {tuple(tensor.shape)} {some.tolist()}'.encode())
    return digest.hexdigest()[:16]


def config_of(net):
    """A model's config as the plain dict that goes into a checkpoint."""
    return dataclasses.asdict(net.config)
