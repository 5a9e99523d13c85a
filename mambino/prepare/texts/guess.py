"""The likely encoding of bytes that say nothing of it: the one in which they are most like a
language.

    best = guess.of_lines([b'l\\x92\\xe9t\\xe9 dernier'])     # Guess('cp1252', 4.7), or None
    guess.of_wide(b'h\\0i\\0')                             # 'utf-16-le', or None

    bytes ──► words beyond ASCII ──► in each encoding, in each language written in it: bits a byte
                                       pairs of letters    letters.txt: how common they are
                                       marks, symbols      what they cost
    the fewest bits ──► few enough for a language? ──► the guess

Bits are the logarithm of how unlikely something is: a letter that one in eight times follows
another costs three. The rarer of two encodings costs a few bits more, so that it needs some letters
to win.
"""
import codecs
import collections
import functools
import math
import os
import re
import unicodedata
from typing import NamedTuple

# languages, the encodings they are in, the usual one first, and how much rarer than others that one is
WRITTEN_IN = [
    ('en fr de es pt it nl ca sv da nb fi is et sq ga', 'cp1252 iso8859-15 mac-roman cp850 cp437 cp858', 0),
    ('pt', 'cp860', 4),
    ('fr', 'cp863', 6),
    ('da nb', 'cp865', 5),
    ('is', 'cp861', 4),
    ('pl cs sk hu ro sl hr sq de', 'cp1250 iso8859-2 cp852 mac-latin2', 2),
    ('ro', 'iso8859-16', 3),
    ('tr', 'cp1254 cp857 mac-turkish', 2),
    ('lt lv et', 'cp1257 iso8859-13 iso8859-4 cp775', 2),
    ('vi', 'cp1258', 2),
    ('ru bg', 'cp1251 koi8-r cp866 iso8859-5 mac-cyrillic cp855', 3),
    ('uk be', 'cp1251 koi8-u cp866 iso8859-5 mac-cyrillic cp1125', 3),
    ('sr mk', 'cp1251 iso8859-5 mac-cyrillic cp855', 3),
    ('kk', 'cp1251 kz1048 ptcp154', 3),
    ('el', 'cp1253 iso8859-7 cp737 cp869 mac-greek', 3),
    ('he', 'cp1255 iso8859-8 cp862', 3),
    ('ar fa ur', 'cp1256 iso8859-6', 3),
    ('th', 'cp874', 3),
]
# the same for those of several bytes a character
WIDE = [
    ('zh', 'gb18030'),
    ('zh-tw', 'cp950 big5hkscs'),
    ('ja', 'cp932 euc_jp'),
    ('ko', 'cp949 johab'),
]
COMMON = {          # where the common characters of those are: first bytes up to, in an encoding
    'zh': ('gb2312', 0xd7),
    'zh-tw': ('big5', 0xc6),
    'ja': ('euc_jp', 0xcf),
    'ko': ('euc_kr', 0xc8),
}
WIDE_UNICODE = {'utf-16-le': 2, 'utf-16-be': 2, 'utf-32-le': 4, 'utf-32-be': 4}
WIDE_BYTES = 1 << 15    # so many tell those
RARER = 2               # bits
MOST_BITS = 6           # for a pair of letters: what costs more is no language
SLACK = 20              # bits more, for a text of one odd word
MOST_WIDE_BITS = 14     # for a character of Chinese, Japanese or Korean
MOST_UNICODE_BITS = 11  # for one of UTF-16 or UTF-32
ENOUGH_PAIRS = 12       # of ASCII letters tell a language
CONTEXT_LINES = 200
OTHER_SCRIPT = 6        # bits for a language that is not written like the text around
SEGMENTS = 4000     # so many words, or stretches without a blank, are looked at
SEGMENT = re.compile(rb'[0-\xff]*[\x80-\xff][0-\xff]*')     # what no character of any encoding goes beyond
WIDE_WORD = re.compile('[A-Za-z\x80-\U0010ffff]*[\x80-\U0010ffff][A-Za-z\x80-\U0010ffff]*')
LATIN = '[A-Za-z\u00c0-\u024f]'
OTHER = '[\u0370-\u1fff\u3041-\uf8ff\uff61-\uff9f\U00020000-\U0003ffff]'
SWITCHES = re.compile(f'(?<={LATIN})(?={OTHER})|(?<={OTHER})(?={LATIN})')  # words that go on in another script
WORD = re.compile(rb'[A-Za-z\x80-\xff]*[\x80-\xff][A-Za-z\x80-\xff]*')

# bits of what is no letter
MARKS = {
    '’': 5, '“': 6, '”': 6, '‘': 7, '„': 7, '‚': 11, '«': 7, '»': 7, '–': 6, '—': 6, '…': 6, '•': 8,
    '\xa0': 6, '·': 9, '°': 8, '§': 9, '€': 8, '№': 8, '©': 8, '®': 9, '™': 9, '¡': 8, '¿': 8, 'ª': 10,
    'º': 9, '×': 10, '±': 10, '²': 10, '³': 10, '½': 10, '¼': 11, '¾': 11, '£': 9, '´': 9, '\xad': 10,
}
SYMBOL = 13         # any other
BOX = 10            # of boxes that DOS programs draw
BOX_AGAIN = 2
NO_CHARACTER = 24   # what is undefined, or a control character
INSIDE = 6          # more, for a mark on the wrong side of a letter
OPENING = '“‘„‚«–—¡¿•§€£©№·°’'
CLOSING = '”’‘“»–—…\xa0·°ªº²³®™\xad´'
FOREIGN = 15        # a letter that the language does not have
BORROWED = 11       # one that its foreign words may have
COMMON_BORROWED = 'éèêëïöüäáàâçñôóíåøæ'
UNUSUAL = 15        # a pair that is not in letters.txt is one of 2^15
LEAST_UNUSUAL = 6   # and costs so much at least
VOWEL_MARK = 8      # a mark on a letter, which is mostly left out
CAPITAL_INSIDE = 7  # more, for a capital after a small letter
CAPITAL = 1         # more, for any other
HAN = 14            # of characters that are not in letters.txt: one of thousands
RARE_HAN = 18       # and beyond those
KANA = 10
FULL_WIDTH = 7      # punctuation of Chinese, Japanese and Korean
SWITCH = 9          # where a word goes on in another script
ASCII_LETTER = 4    # among them
ALPHABET = 6        # a letter of an alphabet that letters.txt has
OTHER_ALPHABET = 9  # of another one


class Guess(NamedTuple):
    """An encoding, how many bits the text takes in it, and whether that is few even for a long one."""
    name: str
    bits: float
    is_sure: bool = True


# -----------------------------------------------------------------------------
# Languages

class Language:
    """What is common in a language. pairs: {two letters: bits of the second after the first};
    unusual: {a letter: bits of one that does not follow it otherwise}; letters: its alphabet.
    """

    def __init__(self, joint):
        share = collections.Counter()  # of the pairs that begin with a letter
        for pair, bits in joint.items():
            share[pair[0]] += 2 ** -bits
        first = {letter: -math.log2(part) for letter, part in share.items()}
        self.pairs = {pair: bits - first[pair[0]] for pair, bits in joint.items()}
        self.unusual = {letter: max(LEAST_UNUSUAL, UNUSUAL - bits) for letter, bits in first.items()}
        self.letters = {letter for pair in joint for letter in pair}
        self.is_latin = 'e' in self.letters

    def bits(self, a, b):
        """Of letter b after letter a; either may be _, the edge of a word."""
        bits = self.pairs.get(a + b)
        if bits is not None:
            return bits
        if b in self.letters:
            return self.unusual.get(a, LEAST_UNUSUAL)
        if unicodedata.category(b) == 'Mn':
            return VOWEL_MARK
        return BORROWED if self.is_latin and b in COMMON_BORROWED else FOREIGN


@functools.cache
def tables():
    """{language: {pair of letters, or character: bits}} of letters.txt."""
    found = {}
    with open(os.path.join(os.path.dirname(__file__), 'letters.txt'), encoding='utf-8') as f:
        for line in f:
            if line.startswith('['):
                name = line.strip()[1:-1]
                table = found[name] = {}
                width = 1 if name in dict(WIDE) else 2
            elif not line.startswith('#'):
                bits, letters = line.split()
                for at in range(0, len(letters), width):
                    table[letters[at:at + width]] = int(bits)
    return found


@functools.cache
def languages():
    """{name: Language} of those with an alphabet."""
    return {name: Language(table) for name, table in tables().items() if name not in dict(WIDE)}


# -----------------------------------------------------------------------------
# Encodings of one byte a character

def best_narrow(words, penalty):
    """(the Guess among encodings of one byte a character, of how many pairs). penalty: {language: bits}.
    """
    pairs = collections.Counter()
    for word in words:
        pairs.update(zip(b'_' + word, word + b'_'))
    best = None
    for names, encodings, first_rank in WRITTEN_IN:
        for rank, encoding in enumerate(encodings.split(), first_rank):
            chars = characters(encoding)
            fixed, letters = shape_of([(chars[x], chars[y], n) for (x, y), n in pairs.items()])
            fixed += RARER * rank
            if best and fixed > best.bits:
                continue
            for name in names.split():
                language = languages()[name]
                bits = fixed + penalty.get(name, 0)
                bits += sum(n * language.bits(a, b) for a, b, n in letters)
                if best is None or bits < best.bits:
                    best = Guess(encoding, bits)
    return best, sum(pairs.values())


@functools.cache
def characters(encoding):
    """What each byte is in an encoding of one byte a character; U+FFFD for none."""
    return bytes(range(256)).decode(encoding, 'replace')


def shape_of(pairs):
    """(bits of what depends on no language, [(letter, letter after it, how often)] in small
    letters) of [(character, character after it, how often)].
    """
    bits = 0
    letters = []
    for a, b, n in pairs:
        after_letter = is_letter(a)
        if b == '_' and not after_letter:
            continue
        if is_letter(b) or b == '_':
            letters.append((small(a) if after_letter else '_', small(b), n))
            if b.isupper():
                bits += n * (CAPITAL_INSIDE if a.islower() else CAPITAL)
            if b != '_' and a != '_' and not after_letter and a not in OPENING:
                bits += n * INSIDE
        else:
            bits += n * mark_bits(b, a)
            if after_letter:
                letters.append((small(a), '_', n))
                if b not in CLOSING:
                    bits += n * INSIDE
    return bits, letters


@functools.cache
def is_letter(char):
    """Whether words are made of it; accents that stand alone, and vowel marks, are."""
    return char not in MARKS and unicodedata.category(char) in ('Ll', 'Lu', 'Lo', 'Mn', 'Lt') or char in 'ๆـ'


@functools.cache
def small(char):
    """The small letter, if it is one character."""
    lower = char.lower()
    return lower if len(lower) == 1 else char


def mark_bits(char, before):
    """What a character costs that is no letter."""
    if char in MARKS:
        return MARKS[char]
    if '─' <= char <= '▟':
        return BOX_AGAIN if char == before else BOX
    if char == '\ufffd' or unicodedata.category(char)[0] == 'C':
        return NO_CHARACTER
    return SYMBOL


def penalties(text):
    """{language: bits} for how unlikely the words of ASCII are in it, of other scripts OTHER_SCRIPT."""
    pairs = collections.Counter()
    for word in dict.fromkeys(re.findall('[a-z]+', text.lower())):
        pairs.update(zip('_' + word, word + '_'))
    n = sum(pairs.values())
    if n < ENOUGH_PAIRS:
        return {}
    bits = {name: sum(k * language.bits(a, b) for (a, b), k in pairs.items()) / n
            for name, language in languages().items() if language.is_latin}
    least = min(bits.values())
    others = dict.fromkeys(tables(), OTHER_SCRIPT)
    return others | {name: (mine - least) * ENOUGH_PAIRS for name, mine in bits.items()}


# -----------------------------------------------------------------------------
# Encodings of several bytes a character

def best_wide(segments, penalty):
    """(the Guess among encodings of several bytes a character, of how many characters)"""
    best = None
    n_best = 0
    data = b'\n'.join(segments)
    for name, encodings in WIDE:
        for rank, encoding in enumerate(encodings.split()):
            text = data.decode(encoding, 'replace')
            bits = penalty + RARER * rank
            more, n = wide_bits(text, name)
            bits += more
            if best is None or bits < best.bits:
                best = Guess(encoding, bits)
                n_best = n
    return best, n_best


def wide_bits(text, name):
    """(bits of the words beyond ASCII in a text of Chinese, Japanese or Korean, their characters)"""
    words = '\n'.join(WIDE_WORD.findall(text))
    counts = collections.Counter(words)
    del counts['\n']
    bits = SWITCH * len(SWITCHES.findall(words)) + sum(n * han_bits(char, name) for char, n in counts.items())
    return bits, sum(counts.values())


@functools.lru_cache(1 << 16)
def han_bits(char, name):
    """What a character costs in a text of Chinese, Japanese or Korean."""
    bits = tables()[name].get(char)
    if bits is not None:
        return bits
    if char.isascii():
        return ASCII_LETTER
    if '\u3000' <= char <= '\u303f' or '\uff01' <= char <= '\uff5e' or char in MARKS:
        return FULL_WIDTH
    if '\u3040' <= char <= '\u30ff' or '\uff61' <= char <= '\uff9f':
        return KANA
    if char == '\ufffd' or unicodedata.category(char)[0] == 'C':
        return NO_CHARACTER
    if unicodedata.category(char) != 'Lo':
        return SYMBOL
    codec, last = COMMON[name]
    code = char.encode(codec, 'ignore')
    return HAN if len(code) == 2 and code[0] <= last else RARE_HAN


# -----------------------------------------------------------------------------
# The guess

def of_lines(lines, context=b''):
    """The Guess for lines that are not UTF-8; None where they are no language in any encoding.
    context: more of the file, in which the words of ASCII tell the language.
    """
    words, segments = split(lines)
    text = (context + b' ' + b' '.join(lines[:CONTEXT_LINES])).decode('ascii', 'replace')
    penalty = penalties(text)
    narrow, pairs = best_narrow(words, penalty)
    wide, chars = best_wide(segments, penalty.get('zh', 0))
    if wide.bits < narrow.bits:
        return wide if wide.bits <= MOST_WIDE_BITS * chars else None
    if narrow.bits > MOST_BITS * pairs + SLACK:
        return None
    is_word = pairs > 2 * len(words) or narrow.name == 'cp1252'  # more than a mark
    return narrow._replace(is_sure=is_word and narrow.bits <= MOST_BITS * pairs)


def is_likelier_utf8(lines, encoding):
    """Whether lines that are UTF-8 are more like a language so than in another encoding."""
    return bits_of('utf-8', lines) < bits_of(encoding, lines)


def bits_of(encoding, lines):
    """How many bits lines take in an encoding, in the language that they are likeliest in."""
    text = '\n'.join(line.decode(encoding, 'replace') for line in lines)
    pairs = collections.Counter()
    for word in WIDE_WORD.findall(text):
        pairs.update(zip('_' + word, word + '_'))
    fixed, letters = shape_of([(a, b, n) for (a, b), n in pairs.items()])
    bits = [sum(n * language.bits(a, b) for a, b, n in letters) for language in languages().values()]
    return min(fixed + min(bits), *(wide_bits(text, name)[0] for name in dict(WIDE)))


def split(lines):
    """(the words beyond ASCII in lines, the stretches without a blank that they stand in), each once."""
    segments = dict.fromkeys(segment for line in lines for segment in SEGMENT.findall(line))
    segments = list(segments)[:SEGMENTS]
    words = [word for segment in segments for word in WORD.findall(segment)]
    return words, segments


def of_wide(head):
    """The name of UTF-16 or UTF-32 without a mark; None if it is neither."""
    best = None
    for encoding, width in WIDE_UNICODE.items():
        data = head[:WIDE_BYTES]
        data = data[:len(data) // width * width]
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(data)  # the last character may be cut
        except UnicodeDecodeError:
            continue
        if not text:
            continue
        bits = sum(map(any_bits, '\0' + text, text)) + SWITCH * len(SWITCHES.findall(text))
        bits /= len(text)
        if bits <= MOST_UNICODE_BITS and (best is None or bits < best.bits):
            best = Guess(encoding, bits)
    return best


@functools.cache
def common_characters():
    """{character: bits} of all the languages."""
    found = {}
    for name in dict(WIDE):
        for char, bits in tables()[name].items():
            found[char] = min(bits, found.get(char, bits))
    for language in languages().values():
        found |= dict.fromkeys(language.letters, ALPHABET)
    return found


@functools.lru_cache(1 << 16)
def any_bits(before, char):
    """What a character after another costs in a text of which not even the script is known."""
    if char in common_characters():
        return common_characters()[char]
    if char.isascii() and (char.isprintable() or char.isspace()):
        return ALPHABET
    category = unicodedata.category(char)
    if char == '\ufffd' or category[0] == 'C':
        return NO_CHARACTER
    if small(char) in common_characters() or '\u3040' <= char <= '\u30ff' or '\uff61' <= char <= '\uff9f':
        return ALPHABET
    if category[0] in 'LM' and ord(char) >> 7 == ord(before) >> 7 and char != before:
        return OTHER_ALPHABET
    if char in MARKS or '\u3000' <= char <= '\u303f' or '\uff01' <= char <= '\uff5e':
        return FULL_WIDTH
    return HAN
