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
# Other ways that llama.cpp has a name for; whether it takes a word that is a token before all merges
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace('{1,3}', '')
PRE_OF = {
    (('Digits', True), ('ByteLevel', True)): ('smollm', False),
    (('Split', LLAMA3), ('ByteLevel', False)): ('llama-bpe', True),
    (('Split', QWEN2), ('ByteLevel', False)): ('qwen2', False),
}


def merges_of_bytes(tok):
    return []


def merges_of_characters(tok):
    """Of a character's bytes, from the first on: no other pair meets."""
    merges = set()
    for token in tok.table:
        chars = [BYTE_TO_CHAR[byte] for byte in token]
        merges |= {''.join(chars[:n]) + ' ' + chars[n] for n in range(1, len(chars))}
    return sorted(merges, key=lambda merge: (len(merge), merge))


def step_of_splitting(step):
    """A step of a pre-tokenizer as PRE_OF has it; None for one that it has not."""
    if step['type'] == 'ByteLevel' and not step.get('add_prefix_space'):
        return 'ByteLevel', step.get('use_regex', True)
    if step['type'] == 'Digits':
        return 'Digits', step['individual_digits']
    if step['type'] == 'Split' and step['behavior'] == 'Isolated' and not step['invert']:
        return 'Split', step['pattern'].get('Regex')
    return None


def name_of_splitting(tok):
    """llama.cpp's name for how a tokenizer cuts a text into words. ValueError: it has none."""
    if tok.kind != 'bpe' or tok.fast is not None:
        return PRE
    spec = json.loads(tok.text)
    splitting = spec.get('pre_tokenizer') or {}
    steps = tuple(step_of_splitting(step) for step in splitting.get('pretokenizers', ()))
    name, ignores_merges = PRE_OF.get(steps, (None, False))
    model = spec['model']
    normalizer = (spec.get('normalizer') or {}).get('type')
    if (name is None or model['type'] != 'BPE' or bool(model.get('ignore_merges')) != ignores_merges
            or normalizer not in (None, 'NFC')):
        raise ValueError('its tokenizer cuts text into words otherwise than GPT-2, SmolLM, Llama 3 and Qwen 2, and '
                         'llama.cpp knows only the schemes it has a name for; --format=hf writes any, or train '
                         'on data prepared with --tokenizer=bpe')
    return name


def is_normalizing(tok):
    """Whether a tokenizer brings a text into Unicode's form NFC before it cuts it, which llama.cpp
    does not."""
    return bool(json.loads(tok.text).get('normalizer'))


def merges_of_bpe(tok):
    name_of_splitting(tok)
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
    settings = {'model': 'gpt2', 'pre': name_of_splitting(tok), 'tokens': tokens, 'token_type': types,
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
