"""From ids back to text, whatever the vocabulary: no id, and no row of them, is an error.

    pieces = pieces_of(spec, vocab)                 # what each id stands for, or None
    stream = Stream(pieces, marks)                  # or WindowStream(hf, marks)
    for i in ids:
        print(stream.feed(i), end='')               # whole characters only
    print(stream.flush())

An id of most tokenizers stands for some bytes, the same wherever it is: GPT-2's alphabet, a byte
written as <0x0A>, '▁' for a space, a word that WordPiece does not mark with '##'. So the text of
ids is the text of their bytes, one after another; bytes that are no UTF-8 become U+FFFD, one for
each as Python counts them. Two things hang on the place: a space that the tokenizer puts before
every text, and one behind every word, which the last does not have.

What is understood of no decoder here is left to the tokenizers library, which decodes some ids at a
time: then an id alone stands for nothing that could be said.
"""
import codecs
import re
from typing import NamedTuple

from mambino.tokenizer_json import CHAR_TO_BYTE, prepends, without_prefix

BYTE = re.compile('<0x([0-9A-Fa-f]{2})>')
BROKEN = '\ufffd'
MOST_HELD = 8           # ids of a character that may still be incomplete, where only the library decodes
# how WordPiece's decoder writes punctuation and contractions (tokenizers' cleanup)
CLEANUP = ((' .', '.'), (' ?', '?'), (' !', '!'), (' ,', ','), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (' do not', " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


class Pieces(NamedTuple):
    """What the ids of a vocabulary stand for."""
    table: list             # of bytes, for each id; b'' for what is special, or not there
    prefixed: bool = False  # a text begins with a space that is none of its own
    suffixed: bool = False  # it ends with one


# --- what an id stands for ------------------------------------------------------------------------

def pieces_of(spec, vocab):
    """The Pieces of a tokenizer.json; None where its decoder is not understood. vocab: {token: id},
    added ones too."""
    rules = read_decoder(spec)
    if rules is None:
        return None
    added = {token['content']: token['special'] for token in spec['added_tokens']}
    alphabet = 'ByteLevel' in [step['type'] for step in steps_of(spec)]
    table = [b''] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if added.get(token):
            continue
        byte = BYTE.fullmatch(token) if rules.fallback else None
        if byte:
            table[i] = bytes([int(byte[1], 16)])
        elif alphabet and token in added:
            table[i] = token.encode('utf-8')
        elif alphabet:
            table[i] = bytes_in_alphabet(token, rules.suffix)
        else:
            for change in rules.changes:
                token = change(token)
            table[i] = token.encode('utf-8')
    return Pieces(table, rules.prefixed, rules.suffixed)


def bytes_in_alphabet(token, suffix):
    """The bytes of a token in GPT-2's alphabet; of one that is not, of its characters. suffix: what
    marks the end of a word, ''."""
    ending = b''
    if suffix and token.endswith(suffix):
        token = token.removesuffix(suffix)
        ending = b' '
    if CHAR_TO_BYTE.keys() >= set(token):
        return bytes(CHAR_TO_BYTE[c] for c in token) + ending
    return token.encode('utf-8') + ending


class Rules(NamedTuple):
    """What a decoder does."""
    changes: list           # of functions str -> str, to be done with each token
    fallback: bool          # <0x0A> is a byte
    suffix: str             # of tokens that end a word
    prefixed: bool
    suffixed: bool


def read_decoder(spec):
    """The Rules of a tokenizer.json; None where a step of its decoder is not understood."""
    model = spec['model']
    fallback = bool(model.get('byte_fallback'))
    suffix = model.get('end_of_word_suffix') or ''
    prefixed = without_prefix(spec) != spec
    changes = []
    suffixed = fused = False
    for step in steps_of(spec):
        kind = step['type']
        if kind == 'Fuse':
            fused = True
        elif kind == 'ByteFallback':
            fallback = True
        elif kind == 'ByteLevel':
            suffixed = bool(suffix)
        elif kind == 'Metaspace':
            prefixed = prefixed or prepends(step)
            changes.append(replacement(step['replacement'], ' '))
        elif kind == 'Replace' and 'String' in step['pattern'] and not (fused and len(step['pattern']['String']) > 1):
            changes.append(replacement(step['pattern']['String'], step['content']))
        elif kind == 'WordPiece':
            prefixed = True
            changes.append(joined(step['prefix'], step['cleanup']))
        elif kind == 'BPEDecoder':
            suffixed = True
            changes.append(replacement(step['suffix'], ' '))
        elif kind == 'Words':
            prefixed = True
            changes.append(joined('', cleanup=False))
        elif kind == 'Strip' and fused and step['content'] == ' ' and max(step['start'], step['stop']) <= 1:
            prefixed = prefixed or bool(step['start'])
            suffixed = suffixed or bool(step['stop'])
        else:
            return None
    return Rules(changes, fallback, suffix, prefixed, suffixed)


def steps_of(spec):
    """The steps of its decoder, one after another. Where it has none, those that undo what its
    pre-tokenizer and its model did; else the library would put a space between any two tokens."""
    decoder = spec.get('decoder')
    if decoder:
        return flat(decoder, 'decoders')
    before = {step['type']: step for step in flat(spec.get('pre_tokenizer') or {'type': ''}, 'pretokenizers')}
    model = spec['model']
    for kind in ('ByteLevel', 'Metaspace'):
        if kind in before:
            return [before[kind]]
    if model.get('end_of_word_suffix'):
        return [{'type': 'BPEDecoder', 'suffix': model['end_of_word_suffix']}]
    if model.get('continuing_subword_prefix'):
        return [{'type': 'WordPiece', 'prefix': model['continuing_subword_prefix'], 'cleanup': False}]
    return [{'type': 'Words'}]


def flat(step, name):
    """The steps of a Sequence, whose steps lie under `name`, and of those in it."""
    if step['type'] != 'Sequence':
        return [step]
    return [inner for part in step[name] for inner in flat(part, name)]


def replacement(old, new):
    """The function that replaces `old` in a token."""
    return lambda token: token.replace(old, new)


def joined(prefix, cleanup):
    """The function that puts a space before a token that does not go on with a word, which is one
    that begins with `prefix`."""
    def change(token):
        if prefix and token.startswith(prefix):
            token = token.removeprefix(prefix)
        else:
            token = ' ' + token
        for old, new in CLEANUP if cleanup else ():
            token = token.replace(old, new)
        return token
    return change


# --- id by id -------------------------------------------------------------------------------------

class Stream:
    """Decodes id by id. A character whose bytes are not complete yet is held back."""

    def __init__(self, pieces, marks, begins=True):
        """marks: ids where a text ends or begins. begins: whether the first id begins a text."""
        self.table, self.prefixed, self.suffixed = pieces
        self.marks = marks
        self.is_plain = not (self.prefixed or self.suffixed)
        self.at_beginning = begins and self.prefixed
        self.space = ''                 # the last one, which may be none of the text
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def feed(self, i):
        """The text that is complete with this id; that of an id that does not exist is U+FFFD."""
        if not 0 <= i < len(self.table):
            return self.trim(self.decoder.decode(b'', final=True) + BROKEN, i)
        return self.feed_bytes(self.table[i], i)

    def feed_bytes(self, raw, i=None):
        """The text that is complete with these bytes; i: the id that they are of, or a part of."""
        text = self.decoder.decode(raw)
        return text if self.is_plain else self.trim(text, i)

    def flush(self):
        """What was held back, now that the text is over."""
        self.space = ''
        return self.trim(self.decoder.decode(b'', final=True), None)

    def trim(self, text, i):
        """New text without spaces that are none of its own; i: the id it came with."""
        if self.at_beginning and text:
            text = text.removeprefix(' ')
            self.at_beginning = False
        if i in self.marks:
            self.at_beginning = self.prefixed
        if self.suffixed:
            text = self.space + text
            self.space = ' ' if text.endswith(' ') else ''
            text = text.removesuffix(' ')
        return text


class WindowStream:
    """A Stream where only the library can decode: it shows what some ids more add to the text of
    the last ones. What ends in U+FFFD may be half a character and is held back."""

    def __init__(self, hf, marks):
        self.hf = hf
        self.marks = marks  # as of a Stream
        self.ids = []       # the last ones
        self.shown = 0      # how many of them are in what was shown

    def feed(self, i):
        """As Stream.feed."""
        if i in self.marks:
            return ''
        self.ids.append(i)
        new = self.new_text()
        is_complete = new and not new.endswith(BROKEN)
        if is_complete or len(self.ids) - self.shown >= MOST_HELD:
            return self.show(new)
        return ''

    def flush(self):
        """As Stream.flush."""
        return self.show(self.new_text())

    def new_text(self):
        """The text of the ids that was not shown."""
        before = decode_any(self.hf, self.ids[:self.shown])
        text = decode_any(self.hf, self.ids)
        return text[len(before):]

    def show(self, new):
        self.ids = self.ids[self.shown:]
        self.shown = len(self.ids)
        return new


def decode_any(hf, ids):
    """What the library says of ids; where it fails, what it says of each, U+FFFD for those that it
    fails at."""
    try:
        return hf.decode(ids, skip_special_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:   # a panic of Rust code is no Exception
        if len(ids) == 1:
            return BROKEN
        return ''.join(decode_any(hf, [i]) for i in ids)
