"""What the columns of a table look like: prose, ids, URLs, numbers, ...: counted on some of its rows.

    profile = looks.profile_of(rows)       # {column: what is counted of it}; rows: dicts
    looks.add(total, profile)              # of several files together
    looks.trouble(profile['url'])          # 'URLs': what else than text it holds; '' for none

A column in an object, or in the objects of a list, has a name with a dot: 'meta.body', 'pages.text'.
A profile is made of dicts and numbers that JSON can hold.
"""
import re
import zlib

from mambino.prepare.tables import turns
from mambino.prepare.tables.cells import text_of

WIDEST = 40    # columns in an object that are counted one by one: more are keys, not columns
DEEPEST = 3    # objects in objects in objects
LOOKED = 2000  # characters of a text that are looked at

MONTHS = 'jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec'
# what a text may be, and is nothing to learn from; the first that fits
PATTERNS = {
    'URLs': re.compile(r'(?:[a-z][a-z0-9+.-]{1,9}://|www\.|mailto:)\S+', re.I),
    'dates': re.compile(
        r'\d{4}-\d\d?-\d\d?(?:[T ][\d:.,+Z -]+)?(?:\w{3,4})?|\d{1,4}[/.]\d\d?[/.]\d{2,4}(?:,? [\d:. ]+(?:[ap]m)?)?'
        rf'|(?:\w{{3,9}},? )?(?:\d\d?\.? )?(?:{MONTHS})[a-z]{{0,6}}\.?,? (?:\d\d?,? )?\d{{4}}(?:[ ,\d:+]*\w{{0,3}})',
        re.I),
    'numbers': re.compile(r'[-+~<>]?[$€£]?\s?\d[\d.,:/ eE%+-]*(?:[$€£%]|[a-zA-Z]{1,3})?'),
    'hashes': re.compile(r'(?:0x|sha\d+:|md5:)?[0-9a-fA-F-]{16,}'),
    'base64': re.compile(r'(?:data:[\w/+.-]+;base64,)?[A-Za-z0-9+/_-]{48,}={0,2}'),
    'file names': re.compile(r'(?:[^\s\n]*[/\\][^\s\n]+|[^\n]{1,120}\.(?:[a-z]\w{0,3}|html|json|jsonl|parquet))', re.I),
    'ids': re.compile(r'(?=\S*[\d_@#:=|])[!-~]+'),
    'codes': re.compile(r'[A-Z]{2,}[A-Z.-]*'),
}
UNSURE = {'codes': 20, 'ids': 5, 'numbers': 5, 'dates': 5, 'file names': 5}  # fewer texts may look so by chance
JSON = re.compile(r'\s*(?:\{\s*"[^"]*"\s*:.*\}|\[\s*(?:["{\[]|\d+\s*,).*\]|\{\s*\}|\[\s*\])\s*', re.S)
TAG = re.compile(r'</?[a-zA-Z][^<>]{0,200}>')
# letters of scripts that put no spaces between words
UNSPACED = re.compile('[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
                      '\U00020000-\U0003ffff]')
WORD = re.compile(r'[^\W\d_]\S*')  # what stands between blanks, and has a letter


# -----------------------------------------------------------------------------
# A text

def words_in(text):
    """About how many words a text has; of a long one the beginning tells."""
    part = text[:LOOKED]
    words = len(WORD.findall(part))
    if not part.isascii():
        unspaced = len(UNSPACED.findall(part))
        words = max(words, words // 2 + unspaced // 2)
    return words * len(text) / len(part)


def look_of(text):
    """A key of PATTERNS, 'JSON' or 'markup' that a text is; '' for a text as people write it."""
    text = text.strip()
    if text[0] in '{[' and text[-1] in '}]' and JSON.fullmatch(text[:LOOKED] + text[-1:]):
        return 'JSON'
    if len(text) < 400 or ' ' not in text[:400]:
        for name, pattern in PATTERNS.items():
            if pattern.fullmatch(text[:LOOKED]):
                return name
    part = text[:LOOKED]
    if '<' in part and 12 * len(TAG.findall(part)) > words_in(part) + 12:
        return 'markup'
    return ''


# -----------------------------------------------------------------------------
# A column

def new_column():
    """What is counted of a column."""
    return {
        'rows': 0,       # that have it, whatever is in there
        'text': 0,       # have a text in it
        'words': 0.0,    # in those
        'distinct': 0,   # different ones
        'single': 0,     # texts of no more than one word
        'looks': {},     # {look: how many of the texts}
        'other': {},     # {what else is there: how many}
        'talks': 0,      # conversations,
        'written': 0,    # of these that are written as a text,
        'answers': 0,    # have an answer,
        'asks': 0,       # a question,
        'known': 0,      # and no roles but those that are known here
        'lists': 0,      # lists of texts
        'width': [],     # [fewest, most] characters of a text
    }


def profile_of(rows, profile=None):
    """{column: new_column()} of some rows, each a dict. profile: of others, to be added to."""
    profile = {} if profile is None else profile
    seen = {}
    for row in rows:
        for name, value in flat(row):
            column = profile.setdefault(name, new_column())
            column['rows'] += 1
            count(column, value, seen.setdefault(name, set()))
    for name, texts in seen.items():
        profile[name]['distinct'] += len(texts)
    return profile


def flat(row, prefix='', depth=0):
    """Yields (column, value) of a row: objects within it by their own columns."""
    for name, value in row.items():
        name = f'{prefix}{name}'
        if isinstance(value, dict) and depth < DEEPEST and has_columns(value):
            yield from flat(value, name + '.', depth + 1)
            continue
        is_list = isinstance(value, (list, tuple)) and value and isinstance(value[0], dict)
        if is_list and depth < DEEPEST and text_of(value) is None:
            parts = {}
            for item in value[:20]:
                for key, part in flat(item, name + '.', depth + 1) if isinstance(item, dict) else ():
                    parts.setdefault(key, []).append(part)
            for key, texts in parts.items():
                kept = [text for text in texts if text is not None]
                yield key, kept or None
            if parts:
                continue
        yield name, value


def has_columns(value):
    """Whether an object is like a row of its own: not a conversation, and not objects by keys that
    every row has others of.
    """
    are_keys = len(value) >= 3 and all(isinstance(item, dict) for item in value.values())
    return 0 < len(value) <= WIDEST and not are_keys and text_of(value) is None


def count(column, value, seen):
    """Counts a cell. seen: the texts that were there before."""
    text = text_of(value)
    if isinstance(value, bytes):
        try:
            text = None if b'\0' in value else value.decode('utf-8')
        except UnicodeDecodeError:
            text = None
    if text is None:
        what = kind_of(value)
        if what:
            column['other'][what] = column['other'].get(what, 0) + 1
        return
    if not text or text.isspace():
        return
    column['text'] += 1
    words = words_in(text)
    column['words'] += words
    column['single'] += words < 2
    seen.add(zlib.crc32(text[:LOOKED].encode('utf-8', 'replace')))
    fewest, most = column['width'] or (len(text), len(text))
    column['width'] = [min(fewest, len(text)), max(most, len(text))]
    column['lists'] += turns.are_texts(value)
    is_talk, *more = turns.look(value)
    if is_talk or isinstance(value, dict) or isinstance(value, (list, tuple)) and isinstance(value[0], dict):
        column['talks'] += 1
        for name, is_so in zip(('written', 'answers', 'asks', 'known'), more):
            column[name] += is_so
    else:
        look = look_of_list(value) if isinstance(value, (list, tuple)) else look_of(text)
        if look:
            column['looks'][look] = column['looks'].get(look, 0) + 1


def look_of_list(texts):
    """What a list of texts is."""
    texts = [text for text in map(text_of, texts) if text and not text.isspace()]
    if len(texts) >= 3 and all(words_in(text) < 2 for text in texts):
        return 'single words'
    looks = [look_of(text) for text in texts[:20]]
    return max(set(looks), key=looks.count) if looks else ''


def kind_of(value):
    """What a cell holds that is no text, in words; '' for nothing at all."""
    if value is None or value != value or isinstance(value, (list, tuple, dict)) and not value:
        return ''
    if isinstance(value, bytes):
        return 'bytes'
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, int) for item in value):
            return 'lists of numbers'
        if isinstance(value[0], dict):
            return f'objects of {{{", ".join(map(str, list(value[0])[:4]))}}}'
        return 'lists'
    if isinstance(value, dict):
        return f'objects of {{{", ".join(map(str, list(value)[:4]))}}}'
    return 'numbers' if isinstance(value, (int, float)) else type(value).__name__


def add(total, profile):
    """Adds the profile of a file to that of others."""
    for name, column in profile.items():
        sum_ = total.setdefault(name, new_column())
        for key, value in column.items():
            if key in ('looks', 'other'):
                for what, n in value.items():
                    sum_[key][what] = sum_[key].get(what, 0) + n
            elif key == 'width':
                both = sum_[key] + value
                sum_[key] = [min(both), max(both)] if both else []
            else:
                sum_[key] += value


# -----------------------------------------------------------------------------
# What it holds

def words_a_row(column):
    """How many words a row has in a column, of all the rows that could."""
    return column['words'] / max(1, column['rows'])


def trouble(column):
    """What else than a text to learn from a column holds: 'URLs', 'token ids', ...; '' for none."""
    texts = column['text']
    others = sum(column['other'].values())
    if others > texts:
        return max(column['other'], key=column['other'].get)
    looks = {name: n for name, n in column['looks'].items() if name != 'markup'}
    for name, fewest in UNSURE.items():
        if texts < fewest:
            looks.pop(name, None)
    if sum(looks.values()) > 0.5 * texts:
        return max(looks, key=looks.get)
    fewest, most = column['width'] or (0, 0)
    if texts >= 20 and column['single'] > 0.9 * texts and fewest == most and most > 1:
        return 'codes'
    return ''


def is_category(column, share=0.1):
    """Whether a column has a few values again and again. share: of different ones, at most."""
    return column['text'] >= 50 and column['distinct'] < share * column['text']
