"""Files of tensors, as safetensors and torch.save write them, read one tensor at a time.

    for name, tensor in read_safetensors('model.safetensors'):
        ...                                                     # fp32, whatever it was in the file

A safetensors file is 8 bytes for the length of a header, the header in JSON, the tensors. Its
package is not needed, and no code in a file is ever run.
"""
import math
import os
import re

import torch

from mambino.configurator import fail
from mambino.plain import parse_json, table, whole
from mambino.weights.soundness import check_tensors

FLOATS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}


def read_safetensors(path):
    """Yields (name, fp32 tensor) one by one, so that beside the result one tensor is in memory.
    ValueError if damaged."""
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        start = 8 + int.from_bytes(f.read(8), 'little')
        if start > size:
            raise ValueError(f'no safetensors file, or cut short: of {size} bytes the header alone '
                             f'would be {start}')
        header = parse_json(f.read(start - 8))
        if not table(header):
            raise ValueError('its header is no JSON object')
        header.pop('__metadata__', None)
        check_header(header, size - start)
        for name, entry in header.items():
            shape = entry['shape']
            begin, end = entry['data_offsets']
            if entry['dtype'] not in FLOATS:
                raise ValueError(f'{name} has dtype {entry["dtype"]}; read are {", ".join(FLOATS)}')
            dtype = FLOATS[entry['dtype']]
            if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'damaged: {name} of shape {shape} is said to have {end - begin} '
                                 'bytes')
            if start + end > size:
                raise ValueError(f'cut short: it has {size} bytes, and {name} ends at '
                                 f'{start + end}')
            f.seek(start + begin)
            data = bytearray(end - begin)
            f.readinto(data)
            tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0)
            tensor = tensor.view(shape).float()
            check_tensors({name: tensor}, 'it')
            yield name, tensor


def check_header(header, room):
    """ValueError if the entries of a header are no descriptions of tensors, or of more than the bytes
    that there is room for."""
    claimed = 0
    for name, entry in header.items():
        shape, offsets, dtype = (entry.get(key) if table(entry) else None for key in ('shape', 'data_offsets', 'dtype'))
        if not isinstance(shape, list) or not all(whole(n, 0) for n in shape) or not isinstance(dtype, str):
            raise ValueError(f'damaged: {name} has no shape and dtype')
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(whole(n, 0, 2**62) for n in offsets):
            raise ValueError(f'damaged: {name} has no data_offsets')
        claimed += max(0, offsets[1] - offsets[0])
    if claimed > room:
        raise ValueError(f'cut short, or damaged: its tensors have {claimed} bytes, and there are {room}')


def read_bin(path):
    """Yields (name, fp32 tensor) of a file by torch.save. ValueError if it is none, or holds more
    than tensors."""
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zip, pickle and torch errors
        if more := re.search(r'GLOBAL ([\w.]+)', str(error)):
            raise ValueError(f'holds more than tensors ({more[1]}), and could run code; nothing of it was run. Ask for '
                             'a file of tensors alone: safetensors, or a state_dict by torch.save') from None
        raise ValueError(f'not a file of PyTorch tensors, or cut short ({type(error).__name__})') from None
    if not isinstance(tensors, dict):
        raise ValueError('not a dict of tensors')
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not isinstance(name, str):
            raise ValueError(f'{name!r} is no name of a tensor')
        if not torch.is_tensor(tensor) or tensor.dtype not in FLOATS.values():
            dtype = getattr(tensor, 'dtype', type(tensor).__name__)
            raise ValueError(f'{name} is {dtype}; read are {", ".join(FLOATS)}')
        check_tensors({name: tensor}, 'it')
        yield name, tensor.float()


def infinity(entry):
    """A float as transformers 5 writes it where JSON has none: {"__float__": "Infinity"}."""
    return float(entry['__float__']) if entry.keys() == {'__float__'} else entry


def read_json(path):
    """The dict in a JSON file. The program ends in a line if there is none."""
    try:
        with open(path, encoding='utf-8') as f:
            value = parse_json(f.read(), object_hook=infinity)
    except (OSError, ValueError, TypeError) as error:
        fail(f'{path}: cannot be read: {error}')
    if not isinstance(value, dict):
        fail(f'{path}: not a JSON object')
    return value
