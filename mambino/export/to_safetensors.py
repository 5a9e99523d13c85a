"""The weights alone, under our names, as a safetensors file; in its metadata, what model they make.

    python export.py --format=safetensors
    weights = safetensors.torch.load_file('weights.safetensors')

    metadata    {'kind', 'config', 'tokenizer', 'tokenizer_config'}, all but the first as JSON:
                checkpoint.build(kind, config).load_state_dict(weights)

The file is written without the package of that name: 8 bytes for the length of a header, the header
in JSON, the tensors.
"""
import json
import os

import torch

from mambino.export.classes import kind_of
from mambino.weights import checkpoint
from mambino.weights.tensor_files import FLOATS

PACKAGES = 'safetensors'        # of which `verify` asks
FILE = 'weights.safetensors'


def save_safetensors(path, weights, metadata):
    """Writes {name: tensor} one after another behind a header that says where each lies, padded so
    that they are aligned. metadata: {str: str}."""
    dtype_names = {dtype: name for name, dtype in FLOATS.items()}
    header = {'__metadata__': metadata}
    end = 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=dtype_names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for tensor in weights.values():
            f.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def write(net, tok, folder, quantize='', **_):
    """Writes weights.safetensors into the folder. ValueError if it is to be quantised."""
    if quantize:
        raise ValueError('these weights stay in 32 bits; quantised ones go into --format=native or '
                         'gguf')
    metadata = dict(format='pt', kind=kind_of(net), config=json.dumps(checkpoint.config_of(net)))
    if tok:
        metadata['tokenizer'] = tok.text
        metadata['tokenizer_config'] = json.dumps(tok.config)       # its marks, and a template of conversations
    weights = net.state_dict()
    if net.config.tie_embeddings:                                               # it lies there once
        del weights['lm_head.weight']
    save_safetensors(os.path.join(folder, FILE), weights, metadata)


def verify(net, tok, folder, quantize='', **_):
    """Reads the file by the package safetensors; every tensor must be there, bit for bit. → a
    check, see compare.py."""
    import safetensors
    from safetensors.torch import load_file
    weights = net.state_dict()
    if net.config.tie_embeddings:
        del weights['lm_head.weight']
    read = load_file(os.path.join(folder, FILE))
    same = read.keys() == weights.keys()
    same = same and all(torch.equal(read[name], weights[name]) for name in weights)
    note = f'{len(read)} tensors, equal bit for bit' if same else 'tensors differ'
    return dict(tool=f'safetensors {safetensors.__version__}', ok=same, note=note)


def opening(name, **_):
    """The lines that open the file, for the card."""
    return f'from safetensors.torch import load_file\nweights = load_file({FILE!r})'
