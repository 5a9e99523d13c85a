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

tokenizer_json.py reads what others wrote there, detokenizer.py makes text of any ids.

Input is always ordinary text: "<|endoftext|>" written in a document becomes the tokens of those
thirteen characters, never the end-of-text id, so that data cannot forge the end of a document. The
end-of-text id decodes to ''. So do the ids that a text begins with, `bos`, which only a foreign
tokenizer has, one whose post-processor puts them there: every document in a dataset, every text
that is scored and every prompt begins with them.
"""
import hashlib
import json
import os

import numpy as np
import tiktoken
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from mambino import files
from mambino.configurator import fail
from mambino.detokenizer import Pieces, Stream, WindowStream, pieces_of
from mambino.plain import parse_json
from mambino.seams import WORD, cut
from mambino.tokenizer_config import config_beside, known_of, text_size_beside
from mambino.tokenizer_json import (
    BYTE_TO_CHAR,
    EOT,
    EOT_NAMES,
    FILE,
    MODELS,
    completed,
    end_of_text,
    find_merges,
    going_on,
    gpt2_ranks,
    hidden,
    marks_of,
    read,
    without_names,
    without_training,
)

EVERY_CHARACTER = r'[\s\S]'  # the pattern by which a char tokenizer is known
CHAT = ['<|im_start|>', '<|im_end|>']  # ChatML's marks around a message, kept free in a BPE trained here
# GPT-2's way to cut text into words: contractions, letters, digits, other signs, white space; ++
# never gives back
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


MOST_IDS = 1 << 23      # the largest vocabularies there are have 2**18


class UnknownCharacter(ValueError):
    """A text that a tokenizer has no ids for."""


class Tokenizer:
    """What all kinds share. A subclass sets kind, vocab_size, eot, bos and pieces (id -> bytes),
    and encodes.
    """
    gives_back = True  # every text comes back from its ids, byte for byte

    def __init__(self, text, vocab_size, eot, pieces, bos=()):
        self.text = text              # the tokenizer.json
        self.vocab_size = vocab_size  # all ids are below
        self.eot = eot                # end-of-text id
        self.bos = list(bos)          # ids that a text begins with; [] for most
        self.pieces = pieces          # what ids stand for; None where only the library can decode
        self.table = pieces and pieces.table  # list of bytes, b'' for special tokens
        self.config = {}              # what else is said of its use, see tokenizer_config.py

    def opening(self):
        """The ids that a document begins with in a dataset: bos, but not if that is what the
        document before has ended with.
        """
        return [] if self.bos == [self.eot] else self.bos

    def context(self):
        """The ids that stand before every text that a model was trained on: its beginning, or the
        end of the text before.
        """
        return self.bos or [self.eot]

    def sizes(self):
        """(V,) float64: the bytes that each id stands for; all 1 where ids have no bytes of their own."""
        if self.table is None:
            return np.ones(self.vocab_size)
        return np.array([len(raw) for raw in self.table], np.float64)

    def encode_batch(self, texts, begins=True):
        """list of str -> list of int32 arrays. begins: whether they begin a text; else what a
        tokenizer would put before a text, a space, is left out.
        """
        return [self.encode(text, begins) for text in texts]

    def token_bytes(self, i):
        """The bytes that one id stands for; b'' for end-of-text and other special tokens, None
        where that hangs on the ids beside it.
        """
        i = self._checked([i])[0]
        return None if self.table is None else self.table[i]

    def decode(self, ids, begins=True):
        """Ids -> str. Bytes that are no UTF-8 become U+FFFD. ValueError for an id this vocabulary
        does not have. begins: whether the first id begins a text.
        """
        ids = self._checked(ids)
        if self.pieces and not (self.pieces.prefixed or self.pieces.suffixed):
            return b''.join([self.table[i] for i in ids]).decode('utf-8', 'replace')
        stream = self.stream(begins)
        return ''.join([stream.feed(i) for i in ids]) + stream.flush()

    def stream(self, begins=True):
        """An object with feed(id) -> str and flush() -> str, which together say what decode would.
        No id is an error.
        """
        return Stream(self.pieces, {self.eot, *self.bos}, begins)

    def name_of(self, i):
        """What the vocabulary calls an id."""
        return HFTokenizer.from_str(self.text).id_to_token(int(i)) or f'[{i}]'

    def whole(self, ids, start, end):
        """(start, end) of a part of ids, moved outwards to where characters begin and end."""
        def is_inside(i):
            raw = self.table[int(ids[i])] if self.table and 0 < i < len(ids) else b''
            return 0x80 <= raw[0] < 0xC0 if raw else False

        first, last = start, end
        while is_inside(first) and start - first < 3:
            first -= 1
        while is_inside(last) and last - end < 3:
            last += 1
        return first, last

    def state(self):
        """A dict of plain values for a checkpoint; from_state() is the way back."""
        return {'kind': self.kind, 'json': self.text, 'eot': self.eot, 'bos': self.bos, 'config': self.config}

    def sha256(self):
        return hashlib.sha256(self.text.encode('utf-8')).hexdigest()

    def save(self, folder):
        """Writes tokenizer.json into `folder`, whole or not at all, and returns its name."""
        path = os.path.join(folder, FILE)
        with files.whole(path) as f:
            f.write(self.text.encode('utf-8'))
        return FILE

    def _checked(self, ids):
        """The ids as a list of int, all of them in the vocabulary."""
        ids = np.asarray(ids).reshape(-1).tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f'token id {wrong} is outside the vocabulary (0 to {self.vocab_size - 1})')
        return ids


class CharTokenizer(Tokenizer):
    """An id for each character of the texts it was built from."""
    kind = 'char'

    def __init__(self, text):
        vocab = json.loads(text)['model']['vocab']
        if list(vocab.values()) != list(range(len(vocab))) or any(len(c) != 1 for c in vocab):
            raise ValueError('its characters do not have the ids from 0 on, in order')
        table = [c.encode('utf-8') for c in vocab] + [b'']
        super().__init__(text, len(vocab) + 1, len(vocab), Pieces(table))
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # code point -> id
        self.ids[[ord(c) for c in vocab]] = list(vocab.values())

    def encode(self, text, begins=True):
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
        super().__init__(text, 257, 256, Pieces([bytes([b]) for b in range(256)] + [b'']))

    def encode(self, text, begins=True):
        return np.frombuffer(text.encode('utf-8'), dtype=np.uint8).astype(np.int32)


class BPETokenizer(Tokenizer):
    """Byte-level BPE trained here, GPT-2's, and every foreign tokenizer.json. tiktoken's core
    encodes where it provably gives the ids that Hugging Face's library would; it is three to five
    times faster. Else that library does.
    """
    kind = 'bpe'

    def __init__(self, text, spec, eot=None, bos=()):
        """spec: the contents of text. eot: the end-of-text id; None: it is known by its name."""
        as_trained = spec
        spec = without_training(spec)
        self.hf = open_hf(text if spec is as_trained else json.dumps(spec))
        vocab = self.hf.get_vocab(with_added_tokens=True)
        if eot is None:
            eot = next((vocab[name] for name in EOT_NAMES if name in vocab), None)
        if eot is None:
            raise ValueError('it has no end-of-text token (none of ' + ' '.join(EOT_NAMES) + '); add one with '
                             "transformers: tok.add_special_tokens({'eos_token': '</s>'}), and save it anew")
        pieces = pieces_of(spec, vocab)
        for i in (eot, *bos) if pieces else ():
            pieces.table[i] = b''
        super().__init__(text, max(vocab.values()) + 1, eot, pieces, bos)

        model = spec['model']
        self.unknown = model.get('unk_id', vocab.get(model.get('unk_token')))   # the id for text without one; or None
        ranks = gpt2_ranks(spec)
        self.fast = None
        self.gives_back = ranks is not None     # others may change a text
        self.encoders = {}      # Hugging Face's for a text that begins (True) or goes on (False)
        if ranks is not None:
            self.fast = tiktoken.Encoding('bpe', pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
        else:
            secret = hidden(spec, {eot, *bos})
            self.encoders[True] = self.hf if secret is spec else open_hf(json.dumps(secret))
            goes_on = going_on(secret)
            self.encoders[False] = self.encoders[True] if goes_on == secret else open_hf(json.dumps(goes_on))

    def encode(self, text, begins=True):
        return self.encode_batch([text], begins)[0]

    def encode_batch(self, texts, begins=True):
        if self.fast:
            return [self._encode_pieces(cut(text)) for text in texts]
        return [np.array(encoding.ids, dtype=np.int32) for encoding in self._encode_hf(texts, begins)]

    def _encode_hf(self, texts, begins=True):
        try:
            return self.encoders[begins].encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # a vocabulary without anything for unknown text
            raise UnknownCharacter(f'it has no ids for this text ({error})') from None

    def there_and_back(self, text, begins=True):
        """(what comes back of a text, how many of its characters, without white space, became the id
        for unknown ones)
        """
        if self.fast:
            return self.decode(self.encode(text)), 0
        encoding = self._encode_hf([text], begins)[0]
        unknown = {span for i, span in zip(encoding.ids, encoding.offsets) if i == self.unknown}
        chars = sum(len(''.join(text[start:end].split())) for start, end in unknown)
        return self.decode(encoding.ids, begins), chars

    def _encode_pieces(self, pieces):
        ids = [self.fast.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        return np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32)

    def name_of(self, i):
        return self.hf.id_to_token(int(i)) or f'[{i}]'

    def stream(self, begins=True):
        return super().stream(begins) if self.pieces else WindowStream(self.hf, {self.eot, *self.bos})


def open_hf(text):
    """Hugging Face's tokenizer, for which special tokens written in a text are ordinary text."""
    hf = HFTokenizer.from_str(text)
    hf.encode_special_tokens = True
    hf.no_padding()
    hf.no_truncation()
    return hf


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


def from_text(text, eot=None, bos=(), spec=None):
    """The tokenizer that a tokenizer.json describes. eot, bos: the ids that end and begin a text
    with it; by default what was so before anybody wrote them down: a known name, and none. spec:
    its contents, where they have been read. ValueError if it cannot be one.
    """
    try:
        spec = spec or completed(json.loads(text))
        model = spec['model']
        if model['type'] not in MODELS:
            raise ValueError(f'its model is a {model["type"]}, and only {", ".join(MODELS)} are known')
        split = spec.get('pre_tokenizer') or {}
        check_ids(spec)
        if model['type'] == 'WordLevel' and split.get('pattern') == {'Regex': EVERY_CHARACTER}:
            return CharTokenizer(text)
        if model['type'] == 'BPE' and model['vocab'] == {c: b for b, c in BYTE_TO_CHAR.items()}:
            return ByteTokenizer(text)
        tok = BPETokenizer(text, spec, eot, bos)
        if not all(type(i) is int and 0 <= i < tok.vocab_size for i in (tok.eot, *tok.bos)):
            raise ValueError(f'{tok.eot} and {tok.bos}, which end and begin a text, are not in its vocabulary')
        return tok
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'not a tokenizer.json ({type(error).__name__}: {error})') from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and what is none where it panics
        raise ValueError(str(error)) from None


def check_ids(spec):
    """ValueError if an id of a tokenizer.json is none, or so large that a list of all ids would not fit
    in memory."""
    vocab = spec['model'].get('vocab')
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token['id'] for token in spec['added_tokens']]
    wrong = next((i for i in ids if type(i) is not int or not 0 <= i < MOST_IDS), None)
    if wrong is not None:
        raise ValueError(f'{wrong!r} is no id: they are whole numbers below {MOST_IDS}')


def from_state(state):
    """The way back from Tokenizer.state(), also from one of a version that did not know bos or config."""
    return with_config(from_text(state['json'], state.get('eot'), state.get('bos', ())), state.get('config'))


def with_config(tok, config):
    """The tokenizer, which from now on says of its use what of `config` makes sense."""
    tok.config = known_of(config)
    return tok


def load_tokenizer(path):
    """The tokenizer in a tokenizer.json, or in a folder that holds one. That of a dataset is as the
    dataset was made with it; of any other, its training settings are off, and what ends and begins
    a text is what it says itself.
    """
    file = os.path.join(path, FILE) if os.path.isdir(path) else path
    text, spec = read(path)
    folder = os.path.dirname(os.path.abspath(file))
    try:
        meta = meta_beside(folder, text)
        if meta:
            tok = from_text(text, meta.get('eot'), meta.get('bos', ()), spec)
            return with_config(tok, meta.get('tokenizer_config'))
        as_trained = spec
        spec = without_names(without_training(spec), text_size_beside(folder))
        if spec is not as_trained:
            text = json.dumps(spec, ensure_ascii=False, indent=2)
        begin, _ = marks_of(spec)
        config = config_beside(folder)
        return with_config(from_text(text, end_of_text(spec, config), begin, spec), config)
    except (KeyError, TypeError, AttributeError) as error:
        fail(f'{file}: cannot be used as a tokenizer: not a tokenizer.json ({type(error).__name__}: {error})')
    except ValueError as error:
        fail(f'{file}: cannot be used as a tokenizer: {error}')


def meta_beside(folder, text):
    """meta.json of the dataset in a folder that was made with this tokenizer.json, else None."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = parse_json(f.read())
        is_its = meta['tokenizer']['sha256'] == hashlib.sha256(text.encode('utf-8')).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if is_its else None


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
