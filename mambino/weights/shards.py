"""A checkpoint's tensors in a folder, each process writing its own rows of them; read with caution.

    write('out/ckpt.shards/250', tensors)     # all processes call it, with {name: DTensor}
    tensors = read('out/ckpt.shards/250')     # {name: tensor}, on the CPU; any number of processes
    read('out/ckpt.shards/250', tensors)      # fills these: of a DTensor this process's rows alone

    ckpt.shards/250/.metadata                        which rows of which tensor lie where
    ckpt.shards/250/__0_0.distcp, __1_0.distcp       those of process 0, those of process 1

The format is that of torch.distributed.checkpoint, which does the work. It reads .metadata by
pickle, which would run whatever a stranger has put there: here it may name nothing but the classes
it is made of. The tensors torch reads with weights_only=True.
"""
import os
import pathlib
import pickle
import shlex
import warnings

import torch

from mambino import files
from mambino.configurator import fail

CLASSES = {
    'torch': {'Size'},
    'torch.serialization': {'_get_layout'},
    'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
    'torch.distributed.checkpoint.metadata': {
        'Metadata', 'StorageMeta', 'MetadataIndex', 'TensorStorageMetadata', 'ChunkStorageMetadata',
        'TensorProperties', '_MEM_FORMAT_ENCODING'}}


class Unpickler(pickle.Unpickler):
    """Reads .metadata, and nothing else."""

    def find_class(self, module, name):
        if module.partition('.')[0] == 'pathlib':           # the folder, perhaps of another system
            return pathlib.PurePath
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f'{module}.{name} is none of its classes')
        return super().find_class(module, name)


def write(folder, tensors):
    """Writes {name: DTensor}, in all processes the same names. OSError or RuntimeError in all of
    them if one cannot write."""
    from torch.distributed import checkpoint  # a second to import
    from torch.distributed.checkpoint.api import CheckpointException
    try:
        checkpoint.save(tensors, storage_writer=checkpoint.FileSystemWriter(folder))
    except CheckpointException as error:                    # which is no Exception
        cause, _ = next(iter(error.failures.values()))
        raise OSError(cause) from None


def read(folder, tensors=None):
    """Fills {name: tensor or DTensor} and returns it; without it, all tensors there are. What is
    missing or damaged ends the program in a line."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException
    metadata = read_metadata(folder)
    reader = checkpoint.FileSystemReader(folder)
    reader.read_metadata = lambda *_, **__: metadata
    try:
        if tensors is None:
            tensors = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
                       for name, tensor in metadata.state_dict_metadata.items()}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                 # that each process reads by itself
            checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, 'failures', {}).values()]
        kind = type(causes[0] if causes else error).__name__
        fail(f'{folder}: its shards are not readable (cut short or damaged): {kind}')
    return tensors


def checksums(folder, rank):
    """{name: checksum} of the files that a process has written into a folder of shards."""
    names = [name for name in os.listdir(folder) if name.startswith(f'__{rank}_')]
    names += ['.metadata'] if rank == 0 else []
    return {name: files.checksum(os.path.join(folder, name)) for name in names}


def require(folder, expected, rank=0, world=1):
    """Ends the program in a line if one of the files is not the one that was written for this step
    and process. expected: {name: checksum} of all, or None where that is not known; this process
    looks at its share of them."""
    read_metadata(folder)
    for name in sorted(expected or {})[rank::world]:
        path = os.path.join(folder, name)
        try:
            is_sound = files.checksum(path) == expected[name]
        except OSError:
            is_sound = False
        if not is_sound:
            fail(f'{folder}: its shards are not readable: {name} is not as it was written'
                 f'{without(folder)}')


def without(folder):
    """What to do without the shards in a folder."""
    out_dir = os.path.dirname(os.path.dirname(folder)) or '.'
    best = os.path.join(out_dir, 'best.pt')
    if not os.path.exists(best):
        return ''
    return f'; begin with {best}: --init_from={shlex.quote(out_dir)} --out_dir=another'


def read_metadata(folder):
    """What .metadata holds; ends the program in a line if it is not sound, or if a file that it
    names is missing."""
    path = os.path.join(folder, '.metadata')
    out_dir = os.path.dirname(os.path.dirname(folder)) or '.'
    latest, best = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'best.pt')
    try:
        with open(path, 'rb') as f:
            metadata = Unpickler(f).load()
        names = {piece.relative_path for piece in metadata.storage_data.values()}
    except OSError:
        names = {'.metadata'}
    except Exception as error:                              # of pickle, or of a class given nonsense
        fail(f'{path}: not readable (cut short, damaged, or not made by train.py): '
             f'{type(error).__name__}: {error}')
    for name in sorted(names):
        if os.path.basename(name) != name:
            fail(f'{path}: names {name}, a file elsewhere')
        if not os.path.exists(os.path.join(folder, name)):
            fail(f'{os.path.join(folder, name)}: is missing, and {latest} is nothing without it; begin '
                 f'with {best}: --init_from={shlex.quote(out_dir)} --out_dir=another')
    return metadata
