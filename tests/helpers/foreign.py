"""Small tokenizers of the kinds that other people's models bring, as tokenizer.json files."""
import json
import os

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = 'the cat sat on mat and dog ran home then'.split()
TEXT = [' '.join(WORDS[i:] + WORDS[:i]) + '.' for i in range(len(WORDS))] * 4
MARKS = ['<unk>', '<s>', '</s>']
BERT = ['[UNK]', '[CLS]', '[SEP]']
# of KINDS, those from whose ids every text comes back
GIVES_BACK = ('llama', 'gemma', 'mistral', 'unigram_bytes', 'llama3', 'prefix', 'gpt2')


def bytes_as_tokens(special):
    """A vocabulary of special tokens and the 256 bytes as SentencePiece writes them."""
    return {token: i for i, token in enumerate([*special, *(f'<0x{b:02X}>' for b in range(256))])}


def sentencepiece(normalizer, decoder, prefix='▁'):
    """A BPE with byte fallback that knows WORDS; special tokens are ids 0 to 2."""
    vocab = bytes_as_tokens(MARKS)
    for c in ['▁', '.', *sorted(set(''.join(WORDS)))]:
        vocab.setdefault(c, len(vocab))
    merges = []
    for word in WORDS:
        left = prefix or word[0]
        for c in word if prefix else word[1:]:
            if (left, c) not in merges:
                merges.append((left, c))
            left += c
            vocab.setdefault(left, len(vocab))
    hf = Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    hf.normalizer = normalizer
    hf.decoder = decoder
    hf.add_special_tokens(MARKS)
    return hf


def llama():
    """SentencePiece's BPE with byte fallback, and a space before every text."""
    space = decoders.Replace('▁', ' ')
    return sentencepiece(
        normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]),
        decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]))


def gemma():
    """The same without that space."""
    return sentencepiece(
        normalizers.Replace(' ', '▁'),
        decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]), '')


def mistral():
    """The same by a Metaspace, which puts the space there, and a decoder that takes every byte."""
    hf = sentencepiece(None, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme='first')]))
    hf.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    return hf


def unigram(normalizer=None, pre_tokenizer=None, **more):
    """T5's and XLM-RoBERTa's: pieces with scores, '▁' for a space; no bytes, so it may be at a loss."""
    hf = Tokenizer(models.Unigram())
    if normalizer:
        hf.normalizer = normalizer
    hf.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    hf.decoder = decoders.Metaspace()
    hf.train_from_iterator(TEXT + ['ab\ncd'] * 9, trainers.UnigramTrainer(
        vocab_size=90, special_tokens=MARKS, unk_token='<unk>', show_progress=False, **more))
    return hf


def unigram_bytes():
    """A Unigram that writes as bytes what it does not know."""
    pieces = [(token, -5.0) for token in bytes_as_tokens(MARKS)]
    pieces += [(token, -2.0) for token in ['▁', *sorted(set(''.join(WORDS))), *('▁' + word for word in WORDS)]]
    hf = Tokenizer(models.Unigram(pieces, 0, True))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    hf.add_special_tokens(MARKS)
    return hf


def t5():
    """A Unigram that loses all white space but that a space stands between words."""
    return unigram(pre_tokenizer=pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]))


def wordpiece(lowercase=True):
    """BERT's."""
    hf = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    hf.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    hf.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    hf.decoder = decoders.WordPiece()
    hf.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=80, special_tokens=BERT, show_progress=False))
    return hf


def words():
    """Whole words, without a decoder."""
    hf = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*BERT, *WORDS, '.'])}, unk_token='[UNK]'))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.add_special_tokens(BERT)
    return hf


def suffixes():
    """The first GPT's: a mark where a word ends."""
    hf = Tokenizer(models.BPE(unk_token='<unk>', end_of_word_suffix='</w>'))
    hf.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    hf.decoder = decoders.BPEDecoder()
    hf.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=90, special_tokens=MARKS, end_of_word_suffix='</w>', show_progress=False))
    return hf


def byte_level(special=MARKS, **pre_tokenizer):
    """GPT-2's scheme."""
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(**pre_tokenizer)
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return hf


def llama3():
    """GPT-2's bytes, words cut otherwise."""
    special = ['<|begin_of_text|>', '<|end_of_text|>']
    hf = byte_level(special)
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r'\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+'), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.post_processor = processors.Sequence([
        processors.ByteLevel(),
        processors.TemplateProcessing(single=f'{special[0]} $A', special_tokens=[(special[0], 0)])])
    return hf


def clip():
    """GPT-2's bytes, and a mark where a word ends."""
    hf = Tokenizer(models.BPE(end_of_word_suffix='</w>', unk_token='<unk>'))
    hf.normalizer = normalizers.Lowercase()
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r'\p{L}+|[^\s\p{L}]+'), 'removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=700, special_tokens=MARKS, end_of_word_suffix='</w>', show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return hf


def strange():
    """A decoder that only the library understands."""
    hf = llama()
    hf.decoder = decoders.Sequence([decoders.Replace(Regex('▁'), ' '), decoders.ByteFallback(), decoders.Fuse()])
    return hf


KINDS = {
    'llama': llama, 'gemma': gemma, 'mistral': mistral, 'unigram': unigram, 'unigram_bytes': unigram_bytes,
    't5': t5, 'wordpiece': wordpiece, 'words': words, 'suffixes': suffixes, 'clip': clip, 'llama3': llama3,
    'prefix': lambda: byte_level(add_prefix_space=True), 'gpt2': lambda: byte_level(add_prefix_space=False),
    'strange': strange,
}


def with_marks(hf, begin='<s>', end=''):
    """The tokenizer with a post-processor that puts these around a text."""
    marks = [(mark, hf.token_to_id(mark)) for mark in (begin, end) if mark]
    hf.post_processor = processors.TemplateProcessing(single=f'{begin} $A {end}'.strip(), special_tokens=marks)
    return hf


def save(hf, folder, **changes):
    """Writes the folder's tokenizer.json, with other values of some of its parts, and returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'tokenizer.json')
    with open(path, 'w', encoding='utf-8') as f:
        json.dump({**json.loads(hf.to_str()), **changes}, f, ensure_ascii=False)
    return path
