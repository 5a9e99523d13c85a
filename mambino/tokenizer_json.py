"""What a tokenizer.json says, whoever made it.

    text, spec = read('folder/tokenizer.json')      # or the program ends in a line that says what to do
    spec = without_training(spec)                   # what was there to train with is off
    begin, end = marks_of(spec)                     # the ids it puts around a text: ([1], [2])
    eot = end_of_text(spec, config_beside('folder'))
    ranks = gpt2_ranks(spec)                        # {bytes: id}, where it is GPT-2's scheme

A tokenizer.json (of the tokenizers library) is a pipeline: normalizer, pre_tokenizer, model,
post_processor, and a decoder for the way back, which detokenizer.py reads.
"""
import os

from mambino.configurator import fail
from mambino.plain import json_text, parse_json

FILE = 'tokenizer.json'
EOT = '<|endoftext|>'
# what other people's tokenizers call the end of a text, in order of preference
EOT_NAMES = [EOT, '<|end_of_text|>', '</s>', '<eos>', '<|eos|>', '<｜end▁of▁sentence｜>', '<|im_end|>', '[SEP]']
# what export.py calls ids behind those of texts: what fills up a batch, what stands for nothing, and for a hole
PAD = '<|pad|>'
UNUSED = '<|unused_{}|>'
MASK = '<|mask|>'
# what tokenizer.json may say of a BPE and GPT-2's does not
NOT_GPT2 = ('continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback', 'ignore_merges')
MODELS = ('BPE', 'Unigram', 'WordPiece', 'WordLevel')
CONVERT = ("make one with transformers: python -c \"from transformers import AutoTokenizer as A; "
           "A.from_pretrained('FOLDER').save_pretrained('NEW')\", and give --tokenizer=NEW")
# what else lies where a tokenizer.json is looked for
OTHERS = ('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model', 'vocab.json', 'merges.txt', 'vocab.txt',
          'tokenizer_config.json')

# GPT-2 writes a byte as a printable character: itself where it is one, else the next free one from 256 on
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [b for b in range(256) if b not in _printable]
BYTE_TO_CHAR = {**{b: chr(b) for b in _printable}, **{b: chr(256 + i) for i, b in enumerate(_others)}}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


# --- the file -------------------------------------------------------------------------------------

def read(path):
    """(text, contents) of the tokenizer.json at `path`, a file or the folder that holds one: UTF-8,
    UTF-16 or UTF-32, with a byte order mark or without. What is none ends the program in a line."""
    file = os.path.join(path, FILE) if os.path.isdir(path) else path
    try:
        with open(file, 'rb') as f:
            raw = f.read()
    except FileNotFoundError:
        there = [name for name in OTHERS if os.path.exists(os.path.join(path, name))]
        if there:
            fail(f'{file}: missing, and {", ".join(there)} will not do; {CONVERT}')
        fail(f'{file}: no such tokenizer')
    except OSError as error:
        fail(f'{file}: cannot be used as a tokenizer: {error}')
    try:
        text = json_text(raw)
        spec = parse_json(text)
    except ValueError as error:
        fail(f'{file}: cannot be used as a tokenizer: {what_else(raw, error)}')
    if not isinstance(spec, dict) or not isinstance(spec.get('model'), dict):
        fail(f'{file}: cannot be used as a tokenizer: JSON, but no tokenizer.json, which has a model in it; where '
             f'there is none, {CONVERT}')
    return text, completed(spec)


def what_else(raw, error):
    """What a file is that is no JSON, and what to do about it. raw: its bytes; error: of json."""
    head = raw[:4096]
    if not raw:
        return 'the file is empty'
    if head[:1] == b'\n' and (b'<unk>' in head or b'<pad>' in head or '▁'.encode() in head):
        return f'a SentencePiece model; {CONVERT}'
    if head[:2] == b'\x1f\x8b' or head[:4] == b'PK\x03\x04' or head[:4] == b'\x28\xb5\x2f\xfd':
        return 'packed; unpack it first'
    if head.lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'{':
        return f'damaged JSON ({error}); copy or download it anew'
    lines = head.split(b'\n')
    if lines[0].startswith(b'#version') or all(len(line.split(b' ')) == 2 for line in lines[:3]):
        return f'a list of merges or ranks, no tokenizer.json; {CONVERT}'
    return f'no JSON ({error}); {CONVERT}'


def completed(spec):
    """The contents of a tokenizer.json, with what old ones leave out filled in."""
    model = spec['model']
    spec['added_tokens'] = spec.get('added_tokens') or []
    if 'type' not in model:
        guesses = {'Unigram': isinstance(model.get('vocab'), list), 'BPE': 'merges' in model,
                   'WordPiece': 'max_input_chars_per_word' in model}
        model['type'] = next((name for name, fits in guesses.items() if fits), 'WordLevel')
    return spec


# --- what it does with a text ---------------------------------------------------------------------

def without_training(spec):
    """The contents of a tokenizer.json without what only training the tokenizer's model was to see:
    dropout, sampling, truncation, padding. `spec` itself where there is nothing of it."""
    model = spec['model']
    trained_with = [name for name in ('dropout', 'alpha', 'nbest_size') if model.get(name)]
    cut_with = [name for name in ('truncation', 'padding') if spec.get(name)]
    if not trained_with and not cut_with:
        return spec
    return {**spec, **dict.fromkeys(cut_with), 'model': {**model, **dict.fromkeys(trained_with)}}


def without_names(spec, text_size):
    """The contents of a tokenizer.json without added tokens from the id text_size on, if all of them have names
    that export.py gave them: transformers writes these into the file when it saves a tokenizer anew. `spec` itself
    where there is nothing of it."""
    behind = [token for token in spec['added_tokens'] if token['id'] >= text_size]
    if not behind or any(token['content'] not in (PAD, UNUSED.format(token['id']), MASK) for token in behind):
        return spec
    return {**spec, 'added_tokens': [token for token in spec['added_tokens'] if token['id'] < text_size]}


def marks_of(spec):
    """(ids that its post-processor puts before a text, ids that it puts behind it)."""
    return marks_around(spec.get('post_processor') or {})


def marks_around(processor):
    """As marks_of, of one processor, which may be a row of others."""
    before, after = [], []
    if processor.get('type') == 'Sequence':
        for part in processor['processors']:
            begin, end = marks_around(part)
            before = begin + before
            after = after + end
    elif processor.get('type') in ('BertProcessing', 'RobertaProcessing'):
        before = [processor['cls'][1]]
        after = [processor['sep'][1]]
    elif processor.get('type') == 'TemplateProcessing':
        side = before
        for piece in processor['single']:
            if 'Sequence' in piece:
                side = after
            else:
                side += processor['special_tokens'][piece['SpecialToken']['id']]['ids']
    return before, after


def asked_in_vain(spec, config):
    """The token that `config`, as tokenizer_config.py has it, asks for before every text, and that the
    tokenizer.json does not put there; '' where they agree. The file is obeyed, as transformers 5
    obeys it."""
    token = config.get('bos_token')
    is_asked = config.get('add_bos_token') is True and token
    return token if is_asked and not marks_of(spec)[0] else ''


def end_of_text(spec, config):
    """The id that ends a text, by what the tokenizer itself says: its post-processor, else
    `config`, as tokenizer_config.py has it; else by its name. It is not what begins a text, unless
    there is nothing else; None where there is nothing at all."""
    vocab = vocabulary(spec)
    begin, end = marks_of(spec)
    if end:
        named = [i for i in end if i in {vocab.get(name) for name in EOT_NAMES}]
        return (named or end)[-1]
    ids = [vocab[name] for name in (config.get('eos_token'), *EOT_NAMES) if name in vocab]
    return next((i for i in ids if i not in begin), begin[-1] if begin else None)


def vocabulary(spec):
    """{token: id} of the model and of what was added to it."""
    vocab = spec['model'].get('vocab') or {}
    if isinstance(vocab, list):         # of a Unigram, with scores
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    return {**vocab, **{token['content']: token['id'] for token in spec['added_tokens']}}


def beginning_only(processor):
    """A post-processor without the marks that it puts behind a text; None where nothing is left."""
    kind = (processor or {}).get('type')
    if kind == 'Sequence':
        parts = [part for part in map(beginning_only, processor['processors']) if part]
        return {**processor, 'processors': parts} if parts else None
    if kind in ('BertProcessing', 'RobertaProcessing'):
        name, i = processor['cls']
        single = [{'SpecialToken': {'id': name, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
        special = {name: {'id': name, 'ids': [i], 'tokens': [name]}}
    elif kind == 'TemplateProcessing':
        at = next(n for n, piece in enumerate(processor['single']) if 'Sequence' in piece)
        single = processor['single'][:at + 1]
        special = processor['special_tokens']
    else:
        return processor or None
    pair = [*single, {'Sequence': {'id': 'B', 'type_id': 0}}]
    return {'type': 'TemplateProcessing', 'single': single, 'pair': pair, 'special_tokens': special}


def without_prefix(spec):
    """The same tokenizer for text that goes on: without the space that it puts before a text; equal
    to `spec` where it puts none there."""
    steps = {name: unprefixed(spec[name]) for name in ('normalizer', 'pre_tokenizer') if spec.get(name)}
    return {**spec, **steps}


def going_on(spec):
    """The same tokenizer for text that goes on: without the space that it puts before a text, and
    with those that the text itself begins with."""
    spec = without_prefix(spec)
    return {**spec, 'normalizer': unstripped(spec['normalizer'])} if spec.get('normalizer') else spec


def unstripped(step):
    """A normalizer that takes nothing from the beginning of a text."""
    if step['type'] == 'Sequence':
        return {**step, 'normalizers': [unstripped(part) for part in step['normalizers']]}
    return {**step, 'strip_left': False} if step.get('strip_left') else step


def unprefixed(step, is_first=True):
    """A normalizer or pre-tokenizer that puts nothing before a text; None where it did nothing
    else. is_first: else others have cut the text into words, and what stands before each of them
    stays."""
    if step['type'] == 'Prepend':
        return None
    if step['type'] == 'Sequence':
        name = 'normalizers' if 'normalizers' in step else 'pretokenizers'
        parts = [unprefixed(part, is_first and n == 0) for n, part in enumerate(step[name])]
        parts = [part for part in parts if part]
        return {**step, name: parts} if parts else None
    if not is_first and step.get('prepend_scheme') != 'first':
        return step
    if step['type'] == 'Metaspace' and prepends(step):
        rest = {key: value for key, value in step.items() if key != 'add_prefix_space'}
        return {**rest, 'prepend_scheme': 'never'}
    if step['type'] == 'ByteLevel' and step.get('add_prefix_space'):
        return {**step, 'add_prefix_space': False}
    return step


def prepends(metaspace):
    """Whether a Metaspace step puts its mark before a text; old ones say it otherwise."""
    return metaspace.get('prepend_scheme', 'always') != 'never' and metaspace.get('add_prefix_space', True)


def names_in_reach(spec, marks):
    """The names of special tokens, and of those with ids in `marks`, that its model finds in a text
    by itself, but what stands for unknown text; a BPE reaches no token but by its merges."""
    model = spec['model']
    if model['type'] == 'BPE':
        return set()
    special = {token['content'] for token in spec['added_tokens'] if token['special']}
    special |= {token for token, i in vocabulary(spec).items() if i in marks}
    return special - {model.get('unk_token')}


def hidden(spec, marks):
    """The same tokenizer with names for its special tokens, and those with ids in `marks`, that no
    text has: a Unigram, a WordPiece or a list of words would take a text that says </s> for the
    end-of-text id. What stands for unknown text keeps its name."""
    model = spec['model']
    vocab = model.get('vocab')
    special = names_in_reach(spec, marks)
    if not special:
        return spec

    def rename(token):
        return f'\ufdd0{token}\ufdd1' if token in special else token

    if isinstance(vocab, list):             # of a Unigram, with scores
        known = {token for token, _ in vocab}
        renamed = [[rename(token), score] for token, score in vocab]
    else:
        known = set(vocab)
        renamed = {rename(token): i for token, i in vocab.items()}
    added = [token for token in spec['added_tokens'] if token['content'] not in special & known]
    return {**spec, 'model': {**model, 'vocab': renamed}, 'added_tokens': added, 'post_processor': None}


# --- GPT-2's scheme -------------------------------------------------------------------------------

def gpt2_ranks(spec):
    """{bytes: id} for tiktoken if this tokenizer.json is GPT-2's scheme with ids in the order of
    the merges, else None.
    """
    model = spec['model']
    added = {token['content']: token for token in spec['added_tokens']}
    split = spec.get('pre_tokenizer') or {}
    if model['type'] != 'BPE' or any(model.get(name) for name in NOT_GPT2) or spec.get('normalizer'):
        return None
    if not all(token['special'] for token in added.values()):
        return None
    if split.get('type') != 'ByteLevel' or split.get('add_prefix_space') or not split.get('use_regex', True):
        return None
    words = {token: i for token, i in model['vocab'].items() if token not in added}
    if any(c not in CHAR_TO_BYTE for token in words for c in token):
        return None
    ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in words.items()}
    merges = [tuple(merge.split(' ') if isinstance(merge, str) else merge) for merge in model['merges']]
    has_all_bytes = all(bytes([b]) in ranks for b in range(256))
    return ranks if has_all_bytes and find_merges(ranks) == merges else None


def find_merges(ranks):
    """The merge list of a byte-level BPE, as pairs of strings in GPT-2's alphabet, from its {bytes:
    rank}: a token is the merge of the two parts that are left when its bytes are merged by all
    earlier ranks. None if there are no such two.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            best = pairs.index(min(pairs))
            if pairs[best] >= rank:
                return None
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple(''.join(BYTE_TO_CHAR[b] for b in part) for part in parts))
    return merges
