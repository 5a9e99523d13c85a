"""Text to token ids and back: characters, bytes, a BPE trained here, GPT-2's, or anybody's
tokenizer.json.

    tok = tokenizer.build_tokenizer('bpe', texts, vocab_size=4096)   # or char, byte, gpt2, a path
    tok = tokenizer.load_tokenizer('data/stdlib')                    # what prepare.py saved there

Every tokenizer, once built, is one text: a standard Hugging Face tokenizer.json, which transformers
reads unchanged and gives the same ids. That text is what lies beside a dataset and travels inside a
checkpoint, and its sha256 is the tokenizer's identity. `kind` is read off it: 'char' (a word list
of single characters), 'byte' (256 bytes, no merges), 'bpe' (everything else).

    build_tokenizer ──► tokenizer.json text ──► Tokenizer: encode, encode_batch, decode, stream
                           ▲         │
    load_tokenizer, from_state       └──► save, state, sha256

Input is always ordinary text: "<|endoftext|>" written in a document becomes the tokens of those
thirteen characters, never the end-of-text id, so that data cannot forge the end of a document. The
end-of-text id decodes to ''.
"""
import codecs
import hashlib
import json
import os
import re

import numpy as np
import tiktoken
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import DecodeStream

from mambino.configurator import fail

FILE = 'tokenizer.json'
EVERY_CHARACTER = r'[\s\S]'  # the pattern by which a char tokenizer is known
EOT = '<|endoftext|>'
CHAT = ['<|im_start|>', '<|im_end|>']  # ChatML's marks around a message, kept free in a BPE trained here
# what other people's tokenizers call the end of a text, in order of preference
EOT_NAMES = [EOT, '<|end_of_text|>', '</s>', '<eos>', '<|eos|>', '<｜end▁of▁sentence｜>', '<|im_end|>', '[SEP]']
# GPT-2's way to cut text into words: contractions, letters, digits, other signs, white space; ++
# never gives back
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# what tokenizer.json may say of a BPE and GPT-2's does not
NOT_GPT2 = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback', 'ignore_merges')
PIECE = 1 << 18  # characters that are encoded at once: little enough to stay in cache
RUN = 10_000     # a longer "word" is cut: a million spaces overflow the stack of tiktoken's regex
WORD = 256       # nothing longer is learnt: the time that a BPE takes to train grows with the square of a word's length
# no GPT-2 word goes from non-space to space, so a cut here changes no id; only Python has U+001C to
# U+001F for spaces
SEAM = re.compile(r'\S(?=[^\S\x1c-\x1f])')

# GPT-2 writes a byte as a printable character: itself where it is one, else the next free one from 256 on
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [b for b in range(256) if b not in _printable]
BYTE_TO_CHAR = {**{b: chr(b) for b in _printable}, **{b: chr(256 + i) for i, b in enumerate(_others)}}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


class UnknownCharacter(ValueError):
    """A character that a char tokenizer has no id for."""


class Tokenizer:
    """What all kinds share. A subclass sets kind, vocab_size, eot and table (id -> bytes), and
    encodes.
    """

    def __init__(self, text, vocab_size, eot, table):
        self.text = text              # the tokenizer.json
        self.vocab_size = vocab_size  # all ids are below
        self.eot = eot                # end-of-text id
        self.table = table            # list of bytes, b'' for special tokens; None if the ids are not bytes

    def encode_batch(self, texts):
        """list of str -> list of int32 arrays."""
        return [self.encode(text) for text in texts]

    def token_bytes(self, i):
        """The bytes that one id stands for; b'' for end-of-text and other special tokens."""
        return self.table[int(self._checked([i])[0])]

    def decode(self, ids):
        """Ids -> str. Bytes that are no UTF-8 become U+FFFD. ValueError for an id this vocabulary
        does not have.
        """
        return b''.join([self.table[i] for i in self._checked(ids)]).decode('utf-8', 'replace')

    def stream(self):
        """An object with feed(id) -> str and flush() -> str, which together say what decode would.
        """
        return Stream(self)

    def state(self):
        """A dict of plain values for a checkpoint; from_state() is the way back."""
        return {'kind': self.kind, 'json': self.text}

    def sha256(self):
        return hashlib.sha256(self.text.encode('utf-8')).hexdigest()

    def save(self, folder):
        """Writes tokenizer.json into `folder`, whole or not at all, and returns its name."""
        path = os.path.join(folder, FILE)
        with open(path + '.tmp', 'wb') as f:
            f.write(self.text.encode('utf-8'))
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
        return FILE

    def _checked(self, ids):
        """The ids as a list of int, all of them in the vocabulary."""
        ids = np.asarray(ids).reshape(-1).tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f'token id {wrong} is outside the vocabulary (0 to {self.vocab_size - 1})')
        return ids


class Stream:
    """Decodes id by id. A character whose bytes are not complete yet is held back."""

    def __init__(self, tok):
        self.tok = tok
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def feed(self, i):
        return self.decoder.decode(self.tok.token_bytes(i))

    def flush(self):
        return self.decoder.decode(b'', final=True)


class CharTokenizer(Tokenizer):
    """An id for each character of the texts it was built from."""
    kind = 'char'

    def __init__(self, text):
        vocab = json.loads(text)['model']['vocab']
        table = [c.encode('utf-8') for c in vocab] + [b'']
        super().__init__(text, len(vocab) + 1, len(vocab), table)
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # code point -> id
        self.ids[[ord(c) for c in vocab]] = list(vocab.values())

    def encode(self, text):
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self.ids[points]
        if ids.size and ids.min() < 0:
            point = int(points[np.argmin(ids)])
            raise UnknownCharacter(f'the character {chr(point)!r} (U+{point:04X}) is not in this char vocabulary')
        return ids


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 are the ids."""
    kind = 'byte'

    def __init__(self, text):
        super().__init__(text, 257, 256, [bytes([b]) for b in range(256)] + [b''])

    def encode(self, text):
        return np.frombuffer(text.encode('utf-8'), dtype=np.uint8).astype(np.int32)


class BPETokenizer(Tokenizer):
    """Byte-level BPE trained here, GPT-2's, and every foreign tokenizer.json. tiktoken's core
    encodes where it provably gives the ids that Hugging Face's library would; it is three to five
    times faster. Else that library does.
    """
    kind = 'bpe'

    def __init__(self, text):
        spec = json.loads(text)
        self.hf = HFTokenizer.from_str(text)
        self.hf.encode_special_tokens = True  # special tokens written in the input are ordinary text
        self.hf.no_padding()
        self.hf.no_truncation()
        added = {token['content']: token for token in spec['added_tokens']}
        vocab = self.hf.get_vocab(with_added_tokens=True)
        eot = next((name for name in EOT_NAMES if name in vocab), None)
        if eot is None:
            raise ValueError('it has no end-of-text token (none of ' + ' '.join(EOT_NAMES) + ')')

        table = None
        if 'ByteLevel' in json.dumps(spec['decoder']):
            table = [b''] * (max(vocab.values()) + 1)
            for token, i in vocab.items():
                if token not in added and CHAR_TO_BYTE.keys() >= set(token):
                    table[i] = bytes(CHAR_TO_BYTE[c] for c in token)
                elif token not in added or not added[token]['special']:
                    table[i] = token.encode('utf-8')
        super().__init__(text, max(vocab.values()) + 1, vocab[eot], table)

        ranks = gpt2_ranks(spec, added)
        self.fast = None
        if ranks is not None:
            self.fast = tiktoken.Encoding('bpe', pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        if self.fast is None:
            encodings = self.hf.encode_batch(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return [self._encode_pieces(cut(text)) for text in texts]

    def _encode_pieces(self, pieces):
        ids = [self.fast.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        return np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32)

    def decode(self, ids):
        if self.table:
            return super().decode(ids)
        return self.hf.decode(self._checked(ids), skip_special_tokens=True)

    def token_bytes(self, i):
        if self.table:
            return super().token_bytes(i)
        return self.decode([i]).encode('utf-8')

    def stream(self):
        return super().stream() if self.table else ForeignStream(self)


class ForeignStream:
    """Stream for a tokenizer whose ids are not bytes: its own library knows what belongs together.
    """

    def __init__(self, tok):
        self.tok = tok
        self.ids = []
        self.text = ''  # what was returned
        self.decoder = DecodeStream(skip_special_tokens=True)

    def feed(self, i):
        self.ids += self.tok._checked([i])
        new = self.decoder.step(self.tok.hf, self.ids[-1]) or ''
        self.text += new
        return new

    def flush(self):
        text = self.tok.decode(self.ids)
        return text[len(self.text):] if text.startswith(self.text) else ''


def long_runs(n):
    """A GPT-2 word is all in one of two classes: regular expressions for n or more characters of
    one, and for n // 2 of one, which a run of n has at a multiple of n // 2.
    """
    long = rf'[^\W_]{{{n},}}|[\W_]{{{n},}}'
    half = rf'[^\W_]{{{n // 2}}}|[\W_]{{{n // 2}}}'
    return re.compile(long), re.compile(half)


LONG = {n: long_runs(n) for n in (RUN, WORD)}


def cut(text, longest=RUN):
    """Pieces of about PIECE characters whose ids, one after another, are the ids of the whole; only
    within a run of `longest` characters of one class, which nobody would call a word, does a cut
    change the ids (never the text they stand for).
    """
    pieces = []
    start = 0
    while len(text) - start > PIECE:
        seam = SEAM.search(text, start + PIECE)
        end = seam.end() if seam else len(text)
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return [part for piece in pieces if piece for part in cut_runs(piece, longest)]


def cut_runs(piece, longest):
    """The parts of a piece in which no run of one class is longer than `longest`."""
    long, half = LONG[longest]
    if not any(half.match(piece, i) for i in range(0, len(piece), longest // 2)):
        return [piece]  # much faster than looking for a long one
    parts = []
    done = 0
    for match in long.finditer(piece):
        for end in range(match.start() + longest, match.end(), longest):
            parts.append(piece[done:end])
            done = end
    parts.append(piece[done:])
    return parts


def gpt2_ranks(spec, added):
    """{bytes: id} for tiktoken if this tokenizer.json is GPT-2's scheme with ids in the order of
    the merges, else None.
    """
    model = spec['model']
    split = spec['pre_tokenizer'] or {}
    if model['type'] != 'BPE' or any(model.get(name) for name in NOT_GPT2) or spec['normalizer']:
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


def byte_level(vocab, merges):
    """A Hugging Face tokenizer in GPT-2's scheme, without special tokens."""
    hf = HFTokenizer(models.BPE(vocab, merges))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    hf.decoder = decoders.ByteLevel()
    return hf


def finish(hf, special=(EOT,)):
    """Adds the special tokens as the last ids and opens the result the way load_tokenizer() will.
    """
    hf.add_special_tokens(list(special))
    return from_text(hf.to_str(pretty=True))


def from_text(text):
    """The tokenizer that a tokenizer.json describes. ValueError if it cannot be one."""
    try:
        spec = json.loads(text)
        model = spec['model']
        split = spec['pre_tokenizer'] or {}
        if model['type'] == 'WordLevel' and split.get('pattern') == {'Regex': EVERY_CHARACTER}:
            return CharTokenizer(text)
        if model['type'] == 'BPE' and model['vocab'] == {c: b for b, c in BYTE_TO_CHAR.items()}:
            return ByteTokenizer(text)
        return BPETokenizer(text)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'not a tokenizer.json ({type(error).__name__}: {error})') from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(str(error)) from None


def from_state(state):
    """The way back from Tokenizer.state()."""
    return from_text(state['json'])


def load_tokenizer(path):
    """The tokenizer in a tokenizer.json, or in a folder that holds one."""
    file = os.path.join(path, FILE) if os.path.isdir(path) else path
    try:
        with open(file, 'rb') as f:
            return from_text(f.read().decode('utf-8'))
    except FileNotFoundError:
        fail(f'{file}: no such tokenizer')
    except (OSError, ValueError) as error:
        fail(f'{file}: cannot be used as a tokenizer: {error}')


def build_tokenizer(kind, texts=(), vocab_size=4096):
    """A new tokenizer. 'char': the characters of `texts`, in order. 'byte'. 'bpe': trained on
    `texts`, an iterable of str, to at most vocab_size ids; the same texts give the same ids.
    'gpt2'. Else the path of a tokenizer.json or its folder. Ends the program where it cannot be
    had.
    """
    if kind in BUILDERS:
        return BUILDERS[kind](texts, vocab_size)
    if not os.path.exists(kind):
        fail(f'tokenizer={kind}: neither char, byte, bpe, gpt2 nor the path of a tokenizer.json')
    return load_tokenizer(kind)


def build_char(texts, vocab_size):
    """The characters of the texts, in order."""
    chars = set()
    for text in texts:
        chars.update(text)
    chars = sorted(c for c in chars if not '\ud800' <= c <= '\udfff')  # half a surrogate pair is no character
    hf = HFTokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token=EOT))
    hf.pre_tokenizer = pre_tokenizers.Split(Regex(EVERY_CHARACTER), 'isolated')
    hf.decoder = decoders.Fuse()
    return finish(hf)


def build_byte(texts, vocab_size):
    """256 bytes; it needs no texts."""
    return finish(byte_level({c: b for b, c in BYTE_TO_CHAR.items()}, []))


def build_bpe(texts, vocab_size):
    """A byte-level BPE in GPT-2's scheme, trained on the texts, with the marks of a chat as well."""
    special = [*CHAT, EOT]
    least = 256 + len(special)
    if vocab_size < least:
        fail(f'vocab_size={vocab_size}: a byte-level BPE needs at least {least}: 256 bytes, {", ".join(special)}')
    hf = byte_level({}, [])
    # a merge that was seen once is memory, not language; a small text gets a small vocabulary
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    hf.train_from_iterator((piece for text in texts for piece in cut(text, WORD)), trainer)
    return finish(hf, special)


def build_gpt2(texts, vocab_size):
    """GPT-2's own, from tiktoken: downloaded once."""
    try:
        ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    except Exception as error:  # requests' many errors, or a damaged cache
        fail(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}); point TIKTOKEN_CACHE_DIR to a folder "
             'that has it, or train your own with --tokenizer=bpe')
    vocab = {''.join(BYTE_TO_CHAR[b] for b in token): rank for token, rank in ranks.items()}
    return finish(byte_level(vocab, find_merges(ranks)))


BUILDERS = {'char': build_char, 'byte': build_byte, 'bpe': build_bpe, 'gpt2': build_gpt2}
