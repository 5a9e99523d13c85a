"""Whether the text of a page of print can be read, and what can be mended.

    problem = legible.problem_of(text)      # '', or the worst of JUNK, REVERSED, APART
    text = legible.close_up(text)           # 道 可 道 → 道可道

A PDF shows shapes of letters; which letters they are it may say wrongly or not at all. Then a reader
gives control characters, those of private use, another letter for each (a cipher), or letters of
many alphabets within one word. Right-to-left text may come in the order in which it is drawn.
"""
import re
import unicodedata

JUNK = 'junk'          # nobody can tell the letters
REVERSED = 'reversed'  # right-to-left text from the left
APART = 'apart'        # blanks between the letters of words
MOST_ODD = 0.05        # share of a page's characters
CONTROL = bytes(c for c in range(128) if (c < 32 or c == 127) and c not in b'\t\n\v\f\r')
NO_LETTERS = bytes(c for c in range(128) if not chr(c).islower())
# control characters, those of private use, and those that are none
ODD = re.compile('[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufdd0-\ufdef\ufff0-\uffff]')
# what the fonts Symbol and Wingdings have at places of private use
SYMBOLS = {0xf000 + c: chr(c) for c in b'()+,-./0123456789<=>[]{|}'}
SYMBOLS |= str.maketrans('\uf0b7\uf0a7\uf0b4\uf0a3\uf0b3\uf0b9\uf0b1\uf0b0\uf0ae\uf0d7', '••×≤≥≠±°→⋅')
COMMON = b'etaoinsr'   # two thirds of the letters of English, half of those of Polish or Turkish
FEWEST_COMMON = 0.27   # in a cipher: one letter in four
CIPHER_LETTERS = 60    # fewer letters tell nothing
WORD = re.compile(r'[^\W\d_\x00-\x7f]{2,}')  # letters beyond ASCII

HEBREW, ARABIC = '\u0590-\u05ff', '\u0600-\u06ff'
LETTER = f'[{HEBREW}{ARABIC}\ufb1d-\ufdcf\ufdf0-\ufdff\ufe70-\ufeff]'


def shaped(form):
    """The Arabic characters that are a letter in one of its shapes: 'initial' or 'final'."""
    shapes = [*range(0xfb50, 0xfdd0), *range(0xfe70, 0xff00)]
    return ''.join(chr(c) for c in shapes if unicodedata.decomposition(chr(c)).startswith(f'<{form}>'))


FINALS = 'ךםןףץةى' + shaped('final')  # these end words
INITIALS = shaped('initial')
WRONG_WAY = re.compile(f'(?<!{LETTER})[{FINALS}](?={LETTER})|(?<={LETTER})(?:[{INITIALS}]|لا)(?!{LETTER})')
RIGHT_WAY = re.compile(f'(?<={LETTER})[{FINALS}](?!{LETTER})|(?<!{LETTER})(?:[{INITIALS}]|ال)(?={LETTER})')

CJK = '\u2e80-\u2fdf\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff60'
CJK_APART = re.compile(f'(?<=[{CJK}])[ \t\u3000]+(?=[{CJK}])')
CJK_CLOSE = re.compile(f'(?<=[{CJK}])(?=[{CJK}])')


def problem_of(text):
    """What is wrong with the text of a page, the worst first; '' if nothing is."""
    size = letters_in(text)
    if not size:
        return ''
    if count_odd(text) > MOST_ODD * size or is_cipher(text, size) or is_mixed(text) or is_mojibake(text, size):
        return JUNK
    if reversed_lines(text):
        return REVERSED
    return APART if is_apart(text) else ''


def letters_in(text):
    """How many characters are no white space."""
    return len(text) - sum(map(text.count, ' \n\r\t\f\v\xa0'))


def beyond_ascii(text):
    """How many bytes more than characters a text has in UTF-8: none in English, one for é, two for 道."""
    return 0 if text.isascii() else len(text.encode('utf-8', 'surrogatepass')) - len(text)


def count_odd(text):
    """How many characters no text has."""
    if text.isascii():
        data = text.encode()
        return len(data) - len(data.translate(None, CONTROL))
    if '\ufffd' not in text and ''.join(text.split()).isprintable():
        return 0  # which is sooner said than counted
    return len(ODD.findall(text))


def is_cipher(text, size):
    """Whether Latin letters come so seldom where they are usual that each stands for another one.
    """
    letters = text.lower().encode('ascii', 'ignore').translate(None, NO_LETTERS)
    if len(letters) < max(CIPHER_LETTERS, size / 2):
        return False
    return len(letters) - len(letters.translate(None, COMMON)) < FEWEST_COMMON * len(letters)


def is_mixed(text):
    """Whether words change their alphabet from letter to letter, or are in that of phonetics."""
    if beyond_ascii(text) < 5:
        return False
    pairs = 0
    changes = 0
    phonetic = 0
    for word in WORD.findall(text):
        alphabets = [alphabet for alphabet in map(alphabet_of, word) if alphabet]
        pairs += len(word) - 1
        changes += sum(a != b for a, b in zip(alphabets, alphabets[1:]))
        phonetic += alphabets.count('phonetic')
    return pairs > 3 and max(changes, phonetic / 2) > 0.2 * pairs


def is_mojibake(text, size):
    """Whether half of the characters are accented letters and signs: the bytes of another encoding."""
    return size >= 30 and beyond_ascii(text) > 0.45 * size and len(re.findall('[\x80-\xff]', text)) > 0.45 * size


def alphabet_of(letter):
    """A name for the alphabet of a letter, the same for those that mix within words; '' for accents."""
    c = ord(letter)
    if 0x2e80 <= c < 0xd800 or 0xf900 <= c < 0xfb00 or c >= 0xff00:
        return 'east asian'
    if 0x250 <= c < 0x2b0:
        return 'phonetic'
    if c < 0x250 or 0x1e00 <= c < 0x1f00:
        return 'latin'
    if 0x2b0 <= c < 0x370 or 0x2000 <= c < 0x2c00:
        return ''
    if c < 0x400 or 0x1f00 <= c < 0x2000:
        return 'greek'
    if 0x600 <= c < 0x780 or 0xfb50 <= c < 0xff00:
        return 'arabic'
    return f'{c >> 7:x}'


def reversed_lines(text):
    """How many lines of right-to-left text begin at their end."""
    if text.isascii() or max(text) < '\u0590' or not re.search(LETTER, text):
        return 0
    lines = text.split('\n')
    wrong = [len(WRONG_WAY.findall(line)) - len(RIGHT_WAY.findall(line)) for line in lines]
    return sum(n > 0 for n in wrong)


def is_apart(text):
    """Whether most words are one letter long, as in 'l e t t e r s'; those of CJK are."""
    words = text.split()
    if letters_in(text) > 2.5 * len(words):
        return False
    letters = sum(len(word) == 1 and word.isalpha() and not re.match(f'[{CJK}]', word) for word in words)
    return letters >= 12 and letters > 0.6 * len(words)


def close_up(text):
    """Removes the blanks between letters where that is sure: between all CJK characters, and between
    the letters of words that have wider gaps between them.
    """
    apart = 0 if text.isascii() else len(CJK_APART.findall(text))
    if apart >= 8 and apart > 3 * len(CJK_CLOSE.findall(text)):
        text = CJK_APART.sub('', text)
    return '\n'.join(map(close_up_line, text.split('\n'))) if is_apart(text) else text


def close_up_line(line):
    """'T w o  w o r d s' → 'Two words'; any other line as it is."""
    words = re.split('[ \t]{2,}', line.strip())
    letters = line.split()
    if len(words) < 2 or sum(len(letter) == 1 for letter in letters) < 0.9 * len(letters):
        return line
    return ' '.join(word.replace(' ', '') for word in words)
