"""What lies beside a tokenizer.json and says how it is used: which tokens begin and end a text, and
the template of a conversation.

    config = config_beside('folder')        # {'eos_token': '</s>', 'chat_template': '{% for …', …}
    config = known_of(anything)             # of what a checkpoint or a dataset says the same keys

    special_tokens_map.json ──► tokenizer_config.json ──► chat_template.jinja      the later prevails
    generation_config.json  ──► eos_token_id, where there are several

Kept are known keys, with values of their types and of sizes that make sense.
"""
import math
import os
import secrets

from mambino.plain import json_text, parse_json

MODEL_TYPE = 'mambino_holes'    # in config.json, of a model that fills holes, as export.py writes it
NAMES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
LONGEST_NAME = 200          # characters of a token's name
LONGEST_LIST = 10_000       # names, or ids
LONGEST_TEMPLATE = 200_000  # characters; the longest in use have 30,000
# what no text may have in it by chance or by intent, so that it tells what a template wrote: around its answers
NONCE = secrets.token_hex(8)
BEGIN, END = f'\ufdd2{NONCE}', f'\ufdd3{NONCE}'


def config_beside(folder):
    """What the files in a folder say of its tokenizer; {} where there are none. ValueError names the
    one that is damaged."""
    said = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json', 'chat_template.json'):
        said |= read_json(os.path.join(folder, name))
    template = os.path.join(folder, 'chat_template.jinja')
    if os.path.isfile(template):
        said['chat_template'] = decoded(template).replace('\r\n', '\n')
    ends = read_json(os.path.join(folder, 'generation_config.json')).get('eos_token_id')
    config = known_of({**said, 'eos_token_id': ends})
    if said.get('chat_template') and 'chat_template' not in config:
        raise ValueError(f'{folder}: its chat template is none of at most {LONGEST_TEMPLATE:,} characters; delete it '
                         'from tokenizer_config.json, or chat_template.jinja, to do without conversations')
    return config


def text_size_beside(folder):
    """How many ids stand for text, by the config.json of a model that fills holes, as export.py writes it; else
    infinitely many."""
    try:
        said = read_json(os.path.join(folder, 'config.json'))
    except ValueError:              # who reads the model says so
        said = {}
    size = said.get('text_size') if said.get('model_type') == MODEL_TYPE else None
    return size if type(size) is int else math.inf


def read_json(path):
    """The object in a JSON file; {} where there is no file."""
    if not os.path.isfile(path):
        return {}
    try:
        value = parse_json(decoded(path))
    except ValueError as error:
        raise ValueError(f'{path}: damaged JSON ({error}); copy or download it anew, or delete it') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path}: JSON, but no object; copy or download it anew, or delete it')
    return value


def decoded(path):
    """The text of a file: UTF-8, UTF-16 or UTF-32, with a byte order mark or without."""
    try:
        with open(path, 'rb') as f:
            return json_text(f.read())
    except OSError as error:
        raise ValueError(f'{path}: cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: is no text ({error}); copy or download it anew, or delete it') from None


def known_of(said):
    """Of a dict from outside the keys that are known, with values that are what they should be."""
    if not isinstance(said, dict):
        return {}
    config = {}
    for key in NAMES:
        name = said.get(key)
        if isinstance(name, dict):              # as older versions write an added token
            name = name.get('content')
        if is_name(name):
            config[key] = name
    for key in ('additional_special_tokens', 'extra_special_tokens'):
        names = said.get(key)
        names = [name.get('content') if isinstance(name, dict) else name for name in list_of(names)]
        if names and all(map(is_name, names)):
            config['additional_special_tokens'] = names
    for key in ('add_bos_token', 'add_eos_token'):
        if isinstance(said.get(key), bool):
            config[key] = said[key]
    template = default_of(said.get('chat_template'))
    if isinstance(template, str) and 0 < len(template) <= LONGEST_TEMPLATE:
        config['chat_template'] = template
    ends = list_of(said.get('eos_token_id'))
    if ends and all(type(i) is int and 0 <= i < 2**31 for i in ends):
        config['eos_token_id'] = ends
    return config


def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME


def list_of(value):
    return value if isinstance(value, list) and len(value) <= LONGEST_LIST else []


def default_of(template):
    """Of several templates, [{'name', 'template'}], the one that is meant where none is named."""
    named = {}
    if isinstance(template, dict):
        named = template
    elif isinstance(template, list):
        named = {str(part.get('name')): part.get('template') for part in template if isinstance(part, dict)}
    else:
        return template
    return named.get('default') or (next(iter(named.values())) if len(named) == 1 else None)
