"""A tokenizer as a GGUF file tells llama.cpp of it: GPT-2's byte-level BPE, of which char and byte
vocabularies are special cases.

    settings = vocabulary(tok, net.config.vocab_size)       # {'model', 'tokens', 'merges', …}
"""
import json

from mambino.export.special_tokens import special_tokens
from mambino.tokenizer import BYTE_TO_CHAR

NORMAL, CONTROL, UNUSED = 1, 3, 5   # tokenizer.ggml.token_type
# A merge that UTF-8 cannot meet: llama.cpp wants a list of them, and gguf writes no empty one.
NEVER = BYTE_TO_CHAR[255] + ' ' + BYTE_TO_CHAR[255]
# GPT-2's way to cut a text into words; llama.cpp's 'gpt-2' also drops spaces where ids become text
PRE = 'trillion'


def merges_of_bytes(tok):
    return []


def merges_of_characters(tok):
    """Of a character's bytes, from the first on: no other pair meets."""
    merges = set()
    for token in tok.table:
        chars = [BYTE_TO_CHAR[byte] for byte in token]
        merges |= {''.join(chars[:n]) + ' ' + chars[n] for n in range(1, len(chars))}
    return sorted(merges, key=lambda merge: (len(merge), merge))


def merges_of_bpe(tok):
    if tok.fast is None:
        raise ValueError('its tokenizer cuts text into words otherwise than GPT-2, and llama.cpp '
                         'knows only the schemes it has a name for; --format=hf writes any, or train '
                         'on data prepared with --tokenizer=bpe')
    merges = json.loads(tok.text)['model']['merges']
    return [merge if isinstance(merge, str) else ' '.join(merge) for merge in merges]


MERGES = {'byte': merges_of_bytes, 'char': merges_of_characters, 'bpe': merges_of_bpe}


def vocabulary(tok, size):
    """The settings that tell llama.cpp of a tokenizer, or that there is none; the model has `size`
    ids. ValueError if no merges of byte-level BPE give the tokenizer's ids."""
    if tok is None:
        return {'model': 'no_vocab'}
    if tok.kind not in MERGES:
        raise ValueError(f'llama.cpp has no tokenizer like a {tok.kind}, only {", ".join(MERGES)}')
    merges = MERGES[tok.kind](tok) or [NEVER]
    special = {token['id']: token['content'] for token in json.loads(tok.text)['added_tokens']}
    tokens = [f'[PAD{i}]' for i in range(size)]  # ids beyond the tokenizer's, to pad the matrix
    types = [UNUSED] * size
    for i, token in enumerate(tok.table):
        if token:
            tokens[i], types[i] = ''.join(BYTE_TO_CHAR[byte] for byte in token), NORMAL
        elif i in special:
            tokens[i], types[i] = special[i], CONTROL
    if len(tok.bos) > 1:
        raise ValueError(f'a text begins with {len(tok.bos)} tokens, and llama.cpp puts one there; --format=hf '
                         'writes any')
    marks = special_tokens(tok, size)
    if marks.is_new:
        tokens[marks.pad], types[marks.pad] = marks.names['pad_token'], CONTROL
    settings = {'model': 'gpt2', 'pre': PRE, 'tokens': tokens, 'token_type': types,
                'merges': merges, 'bos_token_id': marks.bos, 'eos_token_id': marks.eos,
                'add_bos_token': bool(tok.bos)}
    if marks.turn is not None:
        settings['eot_token_id'] = marks.turn
    if marks.pad is not None:
        settings['padding_token_id'] = marks.pad
    return settings


def stand_in(tok, size):
    """The settings of a vocabulary for a model that has none, where something must be there."""
    return {'model': 'gpt2', 'pre': PRE, 'tokens': [f'[{i}]' for i in range(size)], 'token_type': [NORMAL] * size,
            'merges': [NEVER], 'bos_token_id': 0, 'eos_token_id': 0, 'add_bos_token': False}
