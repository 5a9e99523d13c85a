"""What a text looks like as it passes on its way to the disk: what nobody wants to learn is cut or
left out, and what the person should know is counted.

    screen = screen.Screen(source, separator)
    for text, last in screen.passed(pieces): ...    # without data in base64; cut at the separator
    screen.judge(head, notes, is_beginning=True)    # Skip for keys and minified code; notes

What comes out depends on the text alone, not on the pieces in which it came.
"""
import re
import string
import zlib

from mambino.prepare.files import Skip

PLAIN = ('text', 'code', 'data')   # kinds whose files may hold several documents, by a separator
LONG_LINE = 2000                   # characters: nobody writes longer lines of code
FEWEST_BASE64 = 200                # characters: shorter ones may be an example
KEY = re.compile(r'-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----(?:.*?-----END |.*)', re.DOTALL)
BUNDLE = re.compile(r'/\*{6}/ .*webpack|// webpackBootstrap|\b(?:self|window|this)\W{1,2}webpack(?:Chunk|Jsonp)')
COUNTED = re.compile('bytes were no|were unreadable')  # what became U+FFFD, and a reader has noted
TAG = re.compile(r'</?[A-Za-z][^<>]{0,500}>|<!--|-->')
BASE64 = ';base64,'
DIGITS = r'[A-Za-z0-9+/=_%-]'
LONG_BASE64 = re.compile(f'(?<={BASE64}){DIGITS}{{{FEWEST_BASE64},}}')
BEGUN_BASE64 = re.compile(rf'{BASE64}{DIGITS}{{0,{FEWEST_BASE64 - 1}}}\Z')
MORE_BASE64 = re.compile(f'{DIGITS}*')
# what other programs put between documents: anywhere, or on a line of its own
MARKS = ('<|endoftext|>', '<|end_of_text|>', '<|eos|>', '<|eod|>', '<EOD>')
LINES = ('</s>', '<eos>', '<EOS>', '[EOS]', '<eod>')
SQUEEZED = 1 << 12  # bytes of a source that are packed, to see whether it repeats itself
SEARCHED = 1 << 20  # characters of a source, in which one of them comes or will not be looked for
LETTERS = string.ascii_letters.encode() + bytes(range(128, 256))


class Screen:
    """source: a sources.Source; separator: between the documents of a text, '' for none."""

    def __init__(self, source, separator):
        self.source = source
        self.base64 = Base64Cutter()
        self.keys = Counter('PRIVATE KEY-----')
        self.lost = Counter('\ufffd')
        self.watchers = [self.keys, self.lost]
        self.marks = {}
        self.splitter = None
        self.lines = None
        self.passed_on = 0  # characters
        if source.kind == 'text':
            self.marks = {mark: Counter(mark) for mark in MARKS}
            self.marks |= {mark: Counter(f'\n{mark}\n') for mark in LINES}
            self.marks.pop(separator.strip('\n'), None)
            self.watchers += self.marks.values()
        if source.kind == 'code' and not source.named:
            self.lines = LongLines()
        if separator and source.kind in PLAIN:
            self.splitter = Splitter(separator)

    def passed(self, pieces):
        """Yields (text, last) of what remains of the pieces."""
        for text, last in pieces:
            for watcher in self.watchers:
                watcher.add(text, last)
            if self.passed_on <= SEARCHED < self.passed_on + len(text):
                always = (self.keys, self.lost)
                self.watchers = [watcher for watcher in self.watchers if watcher.n or watcher in always]
            self.passed_on += len(text)
            text = self.base64.cut(text, last)
            if self.lines:
                self.lines.add(text, last)
            if self.splitter:
                yield from self.splitter.split(text, last)
            else:
                yield text, last

    def separators(self):
        """How many were found."""
        return self.splitter.found if self.splitter else 0

    def judge(self, head, notes, is_beginning):
        """After all has passed: Skip where the source is to be left out, else what there is to note.
        head: the beginning of the text; is_beginning: it is not that of a later part.
        """
        if not self.source.named and self.source.kind in PLAIN and is_key(head):
            raise Skip('a secret (private key); name the file to have it read')
        if self.lines and 'webpack' in head[:4000] and BUNDLE.search(head[:4000]):
            raise Skip('a bundle that webpack made; name the file to have it read')
        if self.lines and self.lines.share() > 0.5:
            raise Skip(f'minified ({100 * self.lines.share():.0f}% of it are lines of more than '
                       f'{LONG_LINE:,} characters); name the file to have it read')
        if self.base64.size:
            notes.append(f'{self.base64.size:,} characters of data in base64 were cut out')
        if self.lost.n and not any(COUNTED.search(note) for note in notes):
            notes.append(f'{self.lost.n:,} characters in it are U+FFFD, where others were lost before')
        if self.keys.n:
            notes.append(f'{self.keys.n:,} beginnings and ends of private keys in it')
        for mark, counter in self.marks.items():
            if counter.n:
                notes.append(f'{counter.n:,} marks {mark} in it: --document_separator="{mark}" makes '
                             'each part a document of its own')
        share = markup_share(head) if is_beginning else 0
        if share > 0.5 and self.source.kind not in ('code', 'data'):
            notes.append(f'{100 * share:.0f}% of its beginning is markup')


def separator_of(setting):
    r"""The separator that a setting names: r'\n' is a newline, r'\t' a tab, r'\f' a new page."""
    escapes = {r'\n': '\n', r'\t': '\t', r'\f': '\f', r'\\': '\\'}
    return re.sub(r'\\.', lambda match: escapes.get(match[0], match[0]), setting)


class Counter:
    """How often a text occurs, also across the pieces of a document."""

    def __init__(self, text):
        self.text = text
        self.beyond = len(text) - 1  # characters that it may reach into the next piece
        self.tail = ''
        self.n = 0

    def add(self, text, last):
        if self.text in text:
            self.n += text.count(self.text)
        if self.tail:
            self.n += (self.tail + text[:self.beyond]).count(self.text)
        if self.beyond and (self.tail or not last):
            self.tail = '' if last else (self.tail + text[-self.beyond:])[-self.beyond:]


class LongLines:
    """The share of the characters that stand in lines of more than LONG_LINE, blanks apart."""

    def __init__(self):
        self.length = 0  # of the line that goes on in the next piece,
        self.ink = 0     # and its characters without blanks
        self.long = 0
        self.total = 0

    def add(self, text, last):
        self.total += len(text)
        start = 0
        while start < len(text):
            end = -1
            if not self.length:  # to the last of the short lines that come next
                end = text.rfind('\n', start, start + LONG_LINE)
            if end < 0:
                end = text.find('\n', start)
                line = text[start:end] if end >= 0 else text[start:]
                self.length += len(line)
                self.ink += len(line) - line.count(' ')
                if end < 0:
                    break
                self.end_line()
            start = end + 1
        if last:
            self.end_line()

    def end_line(self):
        if self.ink > LONG_LINE:
            self.long += self.length
        self.length = 0
        self.ink = 0

    def share(self):
        return self.long / max(1, self.total)


class Base64Cutter:
    """Cuts what follows `;base64,`: pictures and fonts inside a text."""

    def __init__(self):
        self.held = ''          # may be the beginning of one
        self.is_inside = False  # of one that is being cut
        self.size = 0           # characters that were cut

    def cut(self, text, last):
        """The piece of text without them, but for what must wait for the next piece."""
        if not self.held and not self.is_inside and last:
            if ';' not in text or BASE64 not in text:  # the first is seen ten times as fast
                return text
        if self.is_inside:
            end = MORE_BASE64.match(text).end()
            self.size += end
            self.is_inside = end == len(text) and not last
            text = text[end:]
        text = self.held + text
        self.held = ''
        if BASE64 in text:
            text = LONG_BASE64.sub(self.drop, text)
        if last:
            self.is_inside = False
        elif not self.is_inside:
            begun = BEGUN_BASE64.search(text, max(0, len(text) - FEWEST_BASE64 - len(BASE64)))
            start = begun.start() if begun else len(text) - overlap(text, BASE64)
            self.held = text[start:]
            text = text[:start]
        return text

    def drop(self, match):
        self.size += len(match[0])
        self.is_inside = match.end() == len(match.string)
        return ''


class Splitter:
    """Cuts a text into documents at a separator, which is removed with the newlines around it."""

    def __init__(self, mark):
        self.mark = mark
        self.held = ''         # may be the beginning of a separator, with the newlines before it
        self.is_fresh = False  # a document begins: newlines do not count
        self.found = 0

    def split(self, text, last):
        """Yields (text, whether a document ends with it)."""
        *documents, rest = (self.held + text).split(self.mark)
        for document in documents:
            yield self.begin(document.rstrip('\n')), True
            self.found += 1
            self.is_fresh = True
        end = len(rest)
        if not last:
            end = len(rest[:end - overlap(rest, self.mark)].rstrip('\n'))
        self.held = rest[end:]
        yield self.begin(rest[:end]), last
        if last:
            self.is_fresh = False

    def begin(self, text):
        """The text, without newlines where a document begins with it."""
        if self.is_fresh:
            text = text.lstrip('\n')
            self.is_fresh = not text
        return text


def overlap(text, mark):
    """How many characters at the end of `text` may be the beginning of `mark`."""
    for n in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:n]):
            return n
    return 0


# -----------------------------------------------------------------------------
# The beginning of a source

def is_key(head):
    """Whether a text begins with a private key, or half of it is one."""
    if 'PRIVATE KEY' not in head:
        return False
    keys = [match[0] for match in KEY.finditer(head)]
    return bool(KEY.match(head.lstrip())) or sum(map(len, keys)) > len(head) / 2


def markup_share(head):
    """The share of a text that is tags."""
    if head.count('<') * 20 < len(head) // 10 or len(head) < 200:
        return 0
    return sum(len(tag) for tag in TAG.findall(head)) / len(head)


def suspicion(head):
    """(score, why) a source may be no text worth learning, judged by its beginning; why is '' where
    nothing is odd.
    """
    if len(head) < 200:
        return 0, ''
    data = head.encode('utf-8')
    chars_a_line = len(head) / (head.count('\n') + 1)
    packed = len(zlib.compress(data[:SQUEEZED], 1)) / len(data[:SQUEEZED])
    broken = head.count('\ufffd') / len(head)
    letters = 1 - len(data.translate(None, LETTERS)) / len(data)
    spaces = 1 - len(data.translate(None, b' \t\n')) / len(data)
    reasons = []
    if broken > 0.001:
        reasons.append((20 * broken, f'{100 * broken:.1f}% of it are replacement characters'))
    if packed > 0.7 and len(data) > 2000:
        reasons.append((packed, f'hardly compressible ({packed:.2f}): encoded or encrypted data?'))
    if packed < 0.04:
        reasons.append((1 - packed, f'repeats itself ({1 / packed:.0f} times compressible)'))
    if letters < 0.25:
        reasons.append((1 - letters, f'only {100 * letters:.0f}% letters'))
    if spaces < 0.02:
        reasons.append((0.8 - spaces, f'hardly any spaces ({100 * spaces:.1f}%)'))
    if chars_a_line > 2000:
        reasons.append((min(1, chars_a_line / 1e4), f'lines of {int(chars_a_line):,} characters'))
    return max(reasons, default=(0, ''))


def worst(suspects, most=10):
    """The most suspicious of [score, path, why], in an order of their own."""
    return sorted(suspects, key=lambda suspect: (-suspect[0], suspect[1]))[:most]
