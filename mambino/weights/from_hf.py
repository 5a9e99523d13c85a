"""Reads a model that Hugging Face's transformers saved, to train or sample it here; none of its
packages is needed.

    python train.py --init_from=hf:folder           # what save_pretrained wrote, or a downloaded repository
    kind, config, weights, tok = load_hf('folder')  # checkpoint.build(kind, config).load_state_dict(weights)

Taken are the families that families/ has, Llama and what came of it, Mamba and hybrids, the original
checkpoints of state-spaces/mamba, Mamba-3 too, and what export.py wrote with a modelling file of its
own, which is not needed here:

    config.json        ──► the fields of our config. What our models would compute otherwise is refused
    *.safetensors      ──► {name: fp32 tensor}: one file or many with an index, fp64, fp32, fp16 or
                           bf16, or pytorch_model.bin; no code in a file is ever run. Names and shapes
                           must be those of our model, all of them
    tokenizer.json     ──► tokenizer.py's Tokenizer, or None

Our parameters have transformers' names, so little is mapped: experts are stacked, fused matrices
split, constants multiplied into weights, a tied head gets its weight. Whatever does not fit ends the
program in a line that names it, and says what differs.
"""
import functools
import os
import re
import sys

import torch

from mambino import tokenizer
from mambino.blocks import fills_holes
from mambino.configurator import fail
from mambino.weights.checkpoint import config_of, ids_of_texts
from mambino.weights.families import delta, gpt, holes, hybrid, mamba, refused
from mambino.weights.families.common import ONLY, check_only, number, refuse
from mambino.weights.fitting import model_of_shapes
from mambino.weights.tensor_files import read_bin, read_json, read_safetensors

MOST_LAYERS = 1000
WEIGHTS = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)

# {model_type: Family}
FAMILIES = {**gpt.FAMILIES, **hybrid.FAMILIES, **delta.FAMILIES, **mamba.FAMILIES, **holes.FAMILIES}
REFUSED = {**refused.REFUSED, **hybrid.REFUSED, **delta.REFUSED, **mamba.REFUSED}      # {model_type: what differs}
EMBEDDING = {
    'mamba': 'backbone.embeddings.weight',
    'gpt': 'model.embed_tokens.weight',
    'hybrid': 'model.embed_tokens.weight',
}


# --- config.json ----------------------------------------------------------------------------------

def family_of(theirs):
    """config.json → (its Family, its keys with what missing ones stand for). ValueError says what cannot
    be represented."""
    if 'model_type' not in theirs and 'd_model' in theirs:
        theirs = mamba.from_original(theirs)
    theirs = holes.with_body(delta.text_of(theirs))
    model_type = theirs.get('model_type')
    if model_type in list(REFUSED):                         # a list: it may be anything JSON has
        refuse('model_type', model_type, REFUSED[model_type])
    if model_type not in list(FAMILIES):
        refuse('model_type', model_type, f'supported are {", ".join(FAMILIES)}')
    family = FAMILIES[model_type]
    theirs = {**family.defaults, **theirs}
    check_only(theirs, {**ONLY, **family.only})
    key = 'n_layer' if model_type.startswith('mambino') else 'num_hidden_layers'
    if number(theirs, key, 1) > MOST_LAYERS:                # before there is a letter for each
        refuse(key, theirs[key], 'more layers than any model has')
    return family, theirs


def to_ours(theirs):
    """config.json → (kind, the fields of our config that it sets). ValueError as of family_of."""
    family, theirs = family_of(theirs)
    return family.kind, family.fields(theirs)


# --- weights --------------------------------------------------------------------------------------

def files_of_weights(folder):
    """(The file of weights or their index that a folder has, the paths of all files of weights)."""
    first = next((name for name in WEIGHTS if os.path.exists(os.path.join(folder, name))), None)
    if first is None:
        fail(f'{folder}: holds no weights, none of {", ".join(WEIGHTS)}')
    names = [first]
    if first.endswith('.json'):
        weight_map = read_json(os.path.join(folder, first)).get('weight_map')
        if not (isinstance(weight_map, dict)
                and all(isinstance(name, str) for name in weight_map.values())):
            fail(f'{os.path.join(folder, first)}: has no weight_map')
        names = sorted(set(weight_map.values()))
    for name in names:
        if re.search(r'[/\\\0]', name) or name in ('', '.', '..'):
            fail(f'{os.path.join(folder, first)}: names {name!r}, a file elsewhere')
    return first, [os.path.join(folder, name) for name in names]


def read_weights(folder):
    """{name: fp32 tensor} of all files of weights in a folder, in transformers' file and tensor
    names."""
    first, paths = files_of_weights(folder)
    weights = {}
    for path in paths:
        if not os.path.exists(path):
            fail(f'{path}: no such file, but {first} names it')
        read = read_safetensors if path.endswith('.safetensors') else read_bin
        try:
            weights.update(read(path))
        except (OSError, ValueError) as error:
            fail(f'{path}: cannot be read: {error}')
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            # a header of another make
            fail(f'{path}: cannot be read: {error!r}')
    return weights


def to_our_names(weights):
    """Renames in place what was called otherwise before today's transformers."""
    for name in list(weights):
        if name.endswith('rotary_emb.inv_freq'):                            # old Llamas saved a table
            del weights[name]
    if 'backbone.embedding.weight' in weights:
        weights['backbone.embeddings.weight'] = weights.pop('backbone.embedding.weight')


# --- all of it ------------------------------------------------------------------------------------

def load_hf(folder):
    """→ (kind, config as a dict, weights as a state dict in fp32, tokenizer or None), see the top
    of the file."""
    path = os.path.join(folder, 'config.json')
    if not os.path.exists(path):
        fail(f'{path}: no such file; hf: takes a folder that save_pretrained of transformers wrote')
    try:
        family, theirs = family_of(read_json(path))
        kind, config = family.kind, family.fields(theirs)
        net = model_of_shapes(kind, config)
    except (ValueError, ArithmeticError) as error:
        fail(f'{path}: {error}')
    except (AttributeError, KeyError, TypeError) as error:      # of values of another type
        fail(f'{path}: not a sound config.json ({type(error).__name__}: {error})')
    if family.note:
        say_once(path, family.note(theirs))
    weights = read_weights(folder)
    to_our_names(weights)
    if theirs['model_type'] in delta.FAMILIES:
        delta.text_names(weights)
    if net.config.tie_embeddings or theirs.get('tie_word_embeddings'):
        tie_head(weights, kind, path)
    try:
        if family.convert:
            family.convert(weights, theirs)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f'{folder}: the tensors are not complete or not of the shapes that belong together: '
             f'{str(error).splitlines()[0]}')
    check_shapes(weights, net.state_dict(), folder)
    config = config_of(net)
    return kind, config, weights, tokenizer_in(folder, config)


@functools.cache
def say_once(path, note):
    if note:
        print(f'note: {path}: {note}', file=sys.stderr)


def tie_head(weights, kind, path):
    """The head gets the embedding for its weight, in place; another one of its own is refused."""
    embedding = weights.get(EMBEDDING[kind])
    if embedding is None:
        return
    head = weights.setdefault('lm_head.weight', embedding)
    if not torch.equal(head, embedding):
        fail(f'{path}: tie_word_embeddings=true, but lm_head.weight is not the embedding; if it should '
             'not be, set it to false')


def check_shapes(weights, wanted, folder):
    """Ends the program in a line if weights do not have the very names and shapes of `wanted`."""
    differences = {
        'is missing': wanted.keys() - weights.keys(),
        'is not part of the model': weights.keys() - wanted.keys(),
    }
    for trouble, names in differences.items():
        if names:
            more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
            fail(f'{folder}: the tensor {min(names)}{more} {trouble} that config.json describes')
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            fail(f'{folder}: {name} has shape {tuple(tensor.shape)}, by config.json it should be '
                 f'{tuple(wanted[name].shape)}')


def tokenizer_in(folder, config):
    """The tokenizer in a folder, or None. It must not have more ids than may stand for text."""
    path = os.path.join(folder, tokenizer.FILE)
    if not os.path.exists(path):
        return None
    tok = tokenizer.load_tokenizer(path)
    if tok.vocab_size > ids_of_texts(config):
        hole = ', whose last one is a hole' if fills_holes(config) else ''
        fail(f'{path}: has {tok.vocab_size} ids, more than config.json\'s vocab_size={config["vocab_size"]}{hole}')
    return tok
