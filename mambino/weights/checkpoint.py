"""What train.py saves and everything else loads: one file that holds all of a model, and how to
rebuild it.

    net = build('gpt', dict(vocab_size=4096, n_layer=6))
    save_checkpoint('out/ckpt.pt', {'kind': 'gpt', 'config': ..., 'weights': ..., ...})    # CONTENTS has the full list
    ckpt = load_checkpoint('out')                 # best.pt if there is one, else ckpt.pt; or a file
    tok = tokenizer_of(ckpt)             # loading.py has model_of(ckpt)

A checkpoint is read with weights_only=True: tensors and plain values, never code. It is written to
a temporary name, flushed to the disk and renamed, so a kill at any moment leaves the old one or the
new one, whole. While several processes share the weights, they save in shards: each writes its own
part, and last, in the place of the whole, the first what they have in common:

    ckpt.shards/250/rank-0-of-2.pt, rank-1-of-2.pt      weights, optimizers
    ckpt.pt                                             the rest, and shards: {'step': 250, 'world': 2}
"""
import dataclasses
import hashlib
import os
import shlex
import shutil

import torch

from mambino import tokenizer
from mambino.configurator import fail
from model_gpt import GPT, GPTConfig
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig

FORMAT = 1
CONTENTS = {'format', 'kind', 'config', 'weights', 'optimizers', 'scaler', 'rng', 'counters', 'settings', 'tokenizer', 'metadata'}
MODELS = {'mamba': (Mamba, MambaConfig), 'gpt': (GPT, GPTConfig), 'hybrid': (Hybrid, HybridConfig)}


def build(kind, config):
    """The model of this kind with a dict of its config's fields. ValueError says what does not fit
    together."""
    model, fields = MODELS[kind]
    return model(fields(**config))


def save_checkpoint(path, contents):
    """Writes a checkpoint whole or not at all; then the shards of those before it go. OSError or
    RuntimeError (torch's word for a full disk) if it cannot."""
    temporary = path + '.tmp'
    try:
        with open(temporary, 'wb') as f:
            torch.save({'format': FORMAT, **contents}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    flush(os.path.dirname(path))
    shards, keep = shards_of(path), contents.get('shards')
    for name in os.listdir(shards) if os.path.isdir(shards) else []:
        if not keep or name != str(keep['step']):
            shutil.rmtree(os.path.join(shards, name), ignore_errors=True)
    if not keep:
        shutil.rmtree(shards, ignore_errors=True)


def flush(folder):
    """What was made and renamed in a folder must reach the disk too."""
    if os.name == 'posix':
        number = os.open(folder or '.', os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def shards_of(path, *which):
    """The folder of a checkpoint's shards; or of its shard of this step, rank and number of
    processes, the file."""
    folder = os.path.splitext(path)[0] + '.shards'
    return os.path.join(folder, '{}/rank-{}-of-{}.pt'.format(*which)) if which else folder


def save_shard(path, contents, step, rank, world):
    """Writes the part of one of so many processes, for the checkpoint that will be at `path`."""
    shard = shards_of(path, step, rank, world)
    os.makedirs(os.path.dirname(shard), exist_ok=True)
    save_checkpoint(shard, contents)
    flush(shards_of(path))
    flush(os.path.dirname(path))


def set_aside(*paths):
    """Renames what is there of these files and folders to ….old, in the place of an older one."""
    for path in paths:
        if os.path.isdir(path):
            shutil.rmtree(path + '.old', ignore_errors=True)
        if os.path.exists(path):
            os.replace(path, path + '.old')


def read_file(path):
    """The contents of a file of torch.save, on the CPU."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zip, pickle and torch errors: all mean that this is no checkpoint of ours
        fail(f'{path}: not a readable checkpoint (cut short, damaged, or not made by train.py): {type(error).__name__}')


def load_checkpoint(path, rank=0, world=1):
    """The contents of a checkpoint, tensors on the CPU. A folder stands for its best.pt, or else
    its ckpt.pt.

    rank, world: which process this is of those that share the weights. Of a checkpoint in shards it
    gets its own part, and `shards` among the contents; other numbers of processes, above all one,
    cannot load it."""
    if os.path.isdir(path):
        found = [file for file in ('best.pt', 'ckpt.pt') if os.path.exists(os.path.join(path, file))]
        if not found:
            fail(f'{path}: holds no checkpoint; train one with: python train.py --out_dir={path}')
        path = os.path.join(path, found[0])
    if not os.path.exists(path):
        fail(f'{path}: no such checkpoint; train one with: python train.py, or name another --out_dir')
    ckpt = read_file(path)
    if not isinstance(ckpt, dict) or not CONTENTS <= ckpt.keys():
        fail(f'{path}: a PyTorch file, but not one of train.py\'s checkpoints')
    if ckpt['format'] != FORMAT or ckpt['kind'] not in MODELS:
        fail(f'{path}: checkpoint format {ckpt["format"]} of a {ckpt["kind"]}; this version reads format {FORMAT}')
    if ckpt.get('shards'):
        step, saved_by = ckpt['shards']['step'], ckpt['shards']['world']
        folder = os.path.dirname(path) or '.'
        if world != saved_by:
            fail(f'{path}: was saved by {saved_by} processes in shards; go on with: torchrun --nproc_per_node={saved_by} train.py '
                 f'--parallel=fsdp --out_dir={shlex.quote(folder)}, or use {os.path.join(folder, "best.pt")}')
        for shard in (shards_of(path, step, r, world) for r in range(world)):
            if not os.path.exists(shard):
                fail(f'{shard}: is missing, and {path} is nothing without it; begin with {os.path.join(folder, "best.pt")}: '
                     f'--init_from={shlex.quote(folder)} --out_dir=another')
        ckpt |= {name: value for name, value in read_file(shards_of(path, step, rank, world)).items() if name in ('weights', 'optimizers')}
    return ckpt


def refuse_quantized(ckpt, source):
    """The contents of a checkpoint, if its weights have all their bits; else the program ends in a
    line."""
    if ckpt.get('quantized'):
        fail(f'{source}: its weights are quantised, {ckpt["quantized"]}: sample.py writes and scores text with them, all else takes the run '
             'they were made from')
    return ckpt


def tokenizer_of(ckpt):
    """The tokenizer in a checkpoint; None if the model was trained on a bare .bin."""
    return tokenizer.from_state(ckpt['tokenizer']) if ckpt.get('tokenizer') else None


def fingerprint(weights):
    """What tells the weights of two models apart, as a hex string: a hash of names, shapes and 256
    numbers of each tensor."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        some = tensor.detach().flatten()[::max(1, tensor.numel() // 256)].cpu()
        found.update(f'{name} {tuple(tensor.shape)} {some.tolist()}'.encode())
    return found.hexdigest()[:16]


def config_of(net):
    """A model's config as the plain dict that goes into a checkpoint."""
    return dataclasses.asdict(net.config)
