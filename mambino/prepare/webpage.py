"""Reads a web page: what a browser would show of it.

    for text, last in webpage.read_html('page.html', options, notes): ...    # one document
"""
import html.parser
import re

from mambino.prepare.encodings import encoding_of, open_text

BLOCKS = '''
    address article aside body caption center dd details dialog div dt fieldset figcaption figure
    footer form head header hr html li main nav option section summary tbody tfoot thead title
    tr'''.split()
SPACED = 'blockquote dl h1 h2 h3 h4 h5 h6 ol p pre table ul'.split()  # with empty lines around
HIDDEN = 'iframe noscript object script style svg template'.split()
# what a tag leaves in the text: \v around a block, \f around one with empty lines
MARKS = {'br': '\n', 'td': '\t', 'th': '\t'}
MARKS |= dict.fromkeys(BLOCKS, '\v') | dict.fromkeys(SPACED, '\f')
ONLY_AT_START = ('br', 'td', 'th')  # tags whose end leaves nothing
# white space in <pre>, which counts, until the rest is in order
PROTECT = str.maketrans(' \n\t', '\1\2\3')
RESTORE = str.maketrans('\1\2\3', ' \n\t')


class Page(html.parser.HTMLParser):
    """Collects what a browser would show; white space counts in <pre> alone."""

    def __init__(self):
        super().__init__()
        self.parts = []
        self.hidden = 0  # how many hidden tags are open
        self.pre = 0     # how many <pre>

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in HIDDEN
        self.pre += tag == 'pre'
        self.mark(tag)

    def handle_endtag(self, tag):
        self.hidden = max(0, self.hidden - (tag in HIDDEN))
        self.pre = max(0, self.pre - (tag == 'pre'))
        if tag not in ONLY_AT_START:
            self.mark(tag)

    def mark(self, tag):
        if not self.hidden:
            self.parts.append(MARKS.get(tag, ''))

    def handle_data(self, data):
        if not self.hidden:
            if self.pre:
                data = data.translate(PROTECT)
            else:
                data = re.sub('[ \t\n\r\f]+', ' ', data)
            self.parts.append(data)

    def parse_marked_section(self, i, report=1):
        # <![ and what nobody knows: the library's own raises AssertionError
        return self.parse_bogus_comment(i)

    def text(self):
        """The text of the page; '' if nothing is to be seen."""
        def newlines(match):
            return '\n\n' if '\f' in match[0] or match[0].count('\n') > 1 else '\n'

        text = re.sub(' +', ' ', ''.join(self.parts))
        text = re.sub('[ \v\f\n]*[\v\f\n][ \v\f\n]*', newlines, text)
        text = re.sub(' ?\t ?', '\t', text)
        text = text.replace('\n\t', '\n').replace('\n\2', '\n')  # a line that ends after <pre> is none
        text = text.strip(' \n\t\2').translate(RESTORE)
        return text + '\n' if text.strip() else ''


def read_html(path, options, notes):
    """What a browser would show of it."""
    encoding = encoding_of(path, notes, options, 'html', options['max_file_mb'] * 1e6)
    page = Page()
    with open_text(path, encoding) as f:
        while text := f.read(1 << 16):
            page.feed(text)
    page.close()
    yield page.text(), True
