"""What all families of transformers' models have in common: a Family says how one model_type's config.json
becomes our config, and its weights ours.

In the code `theirs` is config.json's keys and values, `ours` the fields of our config.
"""
import dataclasses
import json
from collections.abc import Callable
from typing import NamedTuple

from mambino.plain import LARGEST


class Family(NamedTuple):
    """A model_type of config.json."""
    kind: str                   # our model of it
    fields: Callable            # theirs → the fields of our config; ValueError says what we cannot represent
    defaults: dict = {}         # what a missing key of config.json stands for
    only: dict = {}             # as ONLY, of this family
    convert: Callable = None    # (weights, theirs): in place, what is called or computed otherwise
    note: Callable = None       # theirs → what its user should know, or ''


ONLY = {  # the values our models can represent, and why no other; a key may be missing or null
    'quantization_config':
        ([None], 'quantized weights cannot be read; save the model in fp32, fp16 or bf16'),
    'tie_word_embeddings': ([False, True], 'must be true or false'),
    'hidden_act': (['silu', 'swish'], 'our models have SiLU'),
}


def refuse(key, value, why):
    """ValueError about a key of config.json."""
    raise ValueError(f'{key}={json.dumps(value)}: {why}')


def number(theirs, key, default=None, kind=int):
    """A number of config.json. ValueError if it is none, or missing without a default."""
    value = default if theirs.get(key) is None else theirs[key]
    if value is None:
        raise ValueError(f'{key} is missing')
    largest = LARGEST if kind is int else 1e30
    if type(value) not in (int, float) or not abs(value) <= largest or value != kind(value):
        refuse(key, value, 'must be a whole number' if kind is int else 'must be a number')
    return kind(value)


def check_only(theirs, only):
    """ValueError for the first key that has another value than `only` allows; None: all."""
    for key, (allowed, why) in only.items():
        if theirs.get(key) is not None and allowed is not None and theirs[key] not in allowed:
            refuse(key, theirs[key], why)


def common_fields(theirs):
    """The fields that all but our own hybrids have in common."""
    return dict(
        vocab_size=number(theirs, 'vocab_size'),
        n_layer=number(theirs, 'num_hidden_layers'),
        n_embd=number(theirs, 'hidden_size'),
        tie_embeddings=bool(theirs.get('tie_word_embeddings')),
    )


def attention_fields(theirs):
    """The fields of attention, of an MLP and of norms, as all that have attention write them."""
    return dict(
        n_head=number(theirs, 'num_attention_heads'),
        n_kv_head=number(theirs, 'num_key_value_heads', 0),
        head_dim=number(theirs, 'head_dim', 0),
        intermediate_size=number(theirs, 'intermediate_size'),
        block_size=number(theirs, 'max_position_embeddings'),
        norm_eps=number(theirs, 'rms_norm_eps', kind=float),
    )


def own_fields(config_class, theirs):
    """The fields of one of our configs, which a config.json that export.py wrote has under their own names."""
    theirs = {'tie_embeddings': theirs.get('tie_word_embeddings'), **theirs}
    ours = {}
    for field in dataclasses.fields(config_class):
        value = theirs.get(field.name)
        if value is None:
            continue
        if field.type in (int, float):
            ours[field.name] = number(theirs, field.name, kind=field.type)
            continue
        if type(value) is not field.type:
            must = 'must be true or false' if field.type is bool else 'must be a string'
            refuse(field.name, value, must)
        ours[field.name] = value
    return ours
