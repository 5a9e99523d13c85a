"""Reads a web page: what a browser would show of it.

    for text, last in webpage.read_html('page.html', options, notes): ...    # one document
    text = webpage.text_of('<p>Once<br>more')                                # 'Once\nmore\n'

The rules are those of the HTML standard for cutting markup into tags, text and what is neither. The
library's html.parser has others, and other ones in each version of Python.
"""
import html
import re

from mambino.prepare.files import Skip
from mambino.prepare.texts.encodings import encoding_of, open_text

BLOCKS = '''
    address article aside body caption center dd details dialog div dt fieldset figcaption figure
    footer form head header hr html li main nav option section summary tbody tfoot thead title
    tr'''.split()
SPACED = 'blockquote dl h1 h2 h3 h4 h5 h6 ol p pre table ul'.split()  # with empty lines around
# with all tags in them: what is for browsers that cannot show them, and formulas as TeX beside MathML
FILMS = ('video', 'audio', 'canvas')
HIDDEN = ('object', 'svg', 'template', *FILMS, 'annotation', 'annotation-xml')
# between these tags there is nothing but text, none of which is shown but that of <xmp>
RAW = 'script style noscript iframe noembed noframes xmp'.split()
WITH_ENTITIES = ('title', 'textarea')   # text as well, in which only entities count
# whoever forgot </svg> meant to write it before these
ENDS_SVG = set("""
    b big blockquote body br center code dd div dl dt em embed h1 h2 h3 h4 h5 h6 head hr i img li listing menu
    meta nobr ol p pre ruby s small span strong strike sub sup table tt u ul var""".split())
# what a tag leaves in the text: \v around a block, \f around one with empty lines
MARKS = {'br': '\n', 'td': '\t', 'th': '\t'}
MARKS |= dict.fromkeys(BLOCKS, '\v') | dict.fromkeys(SPACED, '\f')
ONLY_AT_START = ('br', 'td', 'th')  # tags whose end leaves nothing
APART = ('a', 'button', 'label')  # two of them side by side are the items of a menu
# white space in <pre>, which counts, until the rest is in order
PROTECT = str.maketrans(' \n\t', '\1\2\3')
RESTORE = str.maketrans('\1\2\3', ' \n\t')

MARKUP = re.compile('<(?=[a-zA-Z/!?])')
TAG_NAME = re.compile(r'</?([a-zA-Z][^\t\n\f\r />]*)')
# the end of a tag, or a value in it, whose quotes hide any >
IN_TAG = re.compile(r""">|=[\t\n\f\r ]*(?:(["'])|[^\t\n\f\r >]*)""")
COMMENT_END = re.compile('--!?>')
IN_SCRIPT = re.compile(r'<!--(?:-?>)?|-->|<(/?)script(?=[\t\n\f\r />])', re.I)
MUCH = 200  # characters


class Page:
    """Collects what a browser would show; white space counts in <pre> alone."""

    def __init__(self, is_xml=False, title=True):
        self.is_xml = is_xml
        self.title = title   # whether it is part of the text
        self.parts = []
        self.inside = []     # names of the open tags that hide what is in them
        self.opened = set()  # names of all tags since the first of those
        self.hidden = 0      # characters of text in it
        self.pre = 0         # how many <pre> are open
        self.after = ''      # the tag that was closed just before: 'a' between two links
        self.shown = 0       # characters of text, the title's not counted
        self.scripts = 0     # characters of scripts and styles; one for a script that is elsewhere
        self.noscript = []   # what is only for browsers without scripts, or without frames
        self.lacking = ''    # which of the two
        self.unclosed = ('', 0)  # a tag that is not closed, and characters of the markup it hides
        self.endless = set()     # names of tags whose end does not come any more

    def read(self, markup):
        """Takes the whole page."""
        at = 0
        while at < len(markup):
            start = MARKUP.search(markup, at)
            end = start.start() if start else len(markup)
            if end > at:
                self.text(html.unescape(markup[at:end]))
            at = self.read_markup(markup, end) if start else end

    def read_markup(self, markup, at):
        """Takes the tag or comment at a <. Returns where the text goes on."""
        name = TAG_NAME.match(markup, at)
        if name is None:
            return self.read_comment(markup, at)
        end = end_of_tag(markup, name.end())
        if end is None:  # a browser waits for its end
            return self.hide_rest(markup, at, name[1].lower())
        tag = name[1].lower()
        if markup[at + 1] == '/':
            self.end_tag(tag)
            return end
        closes_itself = markup[end - 2] == '/' and (self.is_xml or 'svg' in self.inside or tag == 'svg')
        self.start_tag(tag, closes_itself)
        if closes_itself:
            self.end_tag(tag)
        elif tag in RAW:
            return self.read_raw(markup, end, tag)
        elif tag in WITH_ENTITIES and 'svg' not in self.inside and tag not in self.endless:
            return self.read_raw(markup, end, tag)
        elif tag == 'plaintext':
            self.pre += 1
            self.text(markup[end:])
            return len(markup)
        return end

    def read_comment(self, markup, at):
        """Takes what begins with <! or <? or </ and is no tag."""
        if markup.startswith('<![CDATA[', at) and (self.is_xml or 'svg' in self.inside):
            end = markup.find(']]>', at)
            self.text(markup[at + 9:end if end >= 0 else None])
            return end + 3 if end >= 0 else len(markup)
        if markup.startswith(('<!-->', '<!--->'), at):
            return markup.index('>', at) + 1
        if markup.startswith('<!--', at):
            found = COMMENT_END.search(markup, at + 4)
            return found.end() if found else self.hide_rest(markup, at, '!--')
        end = markup.find('>', at)
        return end + 1 if end >= 0 else self.hide_rest(markup, at, markup[at + 1])

    def read_raw(self, markup, at, tag):
        """Takes what stands between <tag>, at whose end we are, and </tag>, and this."""
        end = end_of_script(markup, at) if tag == 'script' else end_of_raw(markup, at, tag)
        if end is None and tag in WITH_ENTITIES:
            self.endless.add(tag)
            return at  # nobody wants all tags of the page in its title
        if end is None:
            return self.hide_rest(markup, at, tag)
        content = markup[at:end]
        if tag == 'title' and self.title:
            self.text(html.unescape(content), is_title=True)
        elif tag == 'textarea' and not content.lstrip().startswith('<'):  # markup there is for scripts
            self.text(html.unescape(content))
        elif tag == 'xmp':
            self.pre += 1
            self.text(content)
            self.pre -= 1
        elif tag in ('noscript', 'noframes'):
            self.noscript.append(content)
            self.lacking = tag.removeprefix('no') + 's' * (tag == 'noscript')
        elif tag in ('script', 'style'):
            self.scripts += max(len(content), tag == 'script')
        return end

    def hide_rest(self, markup, at, tag):
        """All that follows is not shown."""
        self.unclosed = tag, len(markup) - at
        return len(markup)

    def start_tag(self, tag, closes_itself):
        if tag in ENDS_SVG and self.inside[-1:] == ['svg'] and 'foreignobject' not in self.opened:
            self.leave('svg')
        if tag in HIDDEN:
            self.hidden = self.hidden if self.inside else 0
            self.inside.append(tag)
        elif self.inside:
            self.opened.add(tag)
        self.pre += tag in ('pre', 'listing')
        if tag in APART and self.after == tag and not self.inside:
            self.parts.append(' ')
        self.mark(tag)

    def end_tag(self, tag):
        if tag in self.inside:
            self.leave(tag)
        elif self.inside[-1:] == ['svg'] and tag not in self.opened and (tag in ENDS_SVG or tag in MARKS or tag == 'a'):
            self.leave('svg')
        elif self.inside and self.inside[-1] in FILMS and tag not in self.opened:  # of what is around it
            self.leave(self.inside[-1])
        if tag in ('pre', 'listing'):
            self.pre = max(0, self.pre - 1)
        if tag not in ONLY_AT_START or tag == 'br':
            self.mark(tag)
        self.after = tag

    def leave(self, tag):
        """The innermost such tag that is open, and those in it, are closed."""
        while self.inside and self.inside.pop() != tag:
            pass
        if not self.inside:
            self.opened.clear()

    def mark(self, tag):
        if not self.inside:
            self.parts.append(MARKS.get(tag, ''))

    def text(self, data, is_title=False):
        """Takes text."""
        self.after = ''
        if self.inside:
            self.hidden += len(data.strip())
            return
        if self.pre:
            data = data.translate(PROTECT)
        else:
            data = re.sub('[ \t\n\r\f]+', ' ', data)
        self.parts.append(data)
        if not is_title:
            self.shown += len(data.strip(' \1\2\3'))

    def result(self):
        """The text of the page; '' if nothing is to be seen."""
        def newlines(match):
            return '\n\n' if '\f' in match[0] or match[0].count('\n') > 1 else '\n'

        text = re.sub(' +', ' ', ''.join(self.parts))
        text = re.sub('[ \v\f\n]*[\v\f\n][ \v\f\n]*', newlines, text)
        text = re.sub(' ?\t ?', '\t', text)
        text = text.replace('\n\t', '\n').replace('\n\2', '\n')  # a line that ends after <pre> is none
        text = text.strip(' \n\t\2').translate(RESTORE)
        return text + '\n' if text.strip() else ''


def end_of_tag(markup, at):
    """Where the tag ends in which `at` is, beyond its >; None where it does not."""
    while found := IN_TAG.search(markup, at):
        if found[0] == '>':
            return found.end()
        at = found.end()
        if found[1]:
            at = markup.find(found[1], at) + 1
            if not at:
                return None
    return None


def end_of_raw(markup, at, tag):
    """Where </tag> begins; None where it does not come."""
    found = re.compile(rf'</{tag}(?=[\t\n\f\r />])', re.I).search(markup, at)
    return found.start() if found else None


def end_of_script(markup, at):
    """The same for a script: between <!-- and -->, it may have <script> and </script> in it."""
    in_comment = False
    in_script = False
    while found := IN_SCRIPT.search(markup, at):
        at = found.end()
        if found[0] == '-->':
            in_comment = in_script = False
        elif found[0] == '<!--':
            in_comment = True
        elif found[1] and not in_script:
            return found.start()
        elif found[1] is not None:
            in_script = in_comment and not found[1]
    return None


def page_of(markup, is_xml=False, title=True):
    """A Page that has read it."""
    page = Page(is_xml or markup[:100].lstrip('\ufeff \n').startswith('<?xml'), title)
    page.read(markup)
    if page.inside:
        page.unclosed = page.inside[0], page.hidden
    return page


def text_of(markup, is_xml=False, title=True):
    """What a browser would show of a page or of a part of one; title: with its title."""
    return page_of(markup, is_xml, title).result()


def read_html(path, options, notes):
    """What a browser would show of it."""
    encoding = encoding_of(path, notes, options, 'html', options['max_file_mb'] * 1e6)
    with open_text(path, encoding) as f:
        markup = f.read()
    page = page_of(markup, is_xml=str(path).endswith('.xhtml'))
    text = page.result()
    without_scripts = text_of('\n'.join(page.noscript))
    if MARKUP.search(without_scripts):  # its tags are written as text, to be unpacked by a script
        without_scripts = text_of(without_scripts)
    if page.shown < len(without_scripts) and (len(without_scripts) > MUCH or not page.scripts):
        notes.append(f'its text is for browsers without {page.lacking}')
        text += without_scripts
    elif page.scripts and not page.shown:
        raise Skip('a page of scripts, which fetch its text')
    elif page.shown < 0.01 * page.scripts:
        notes.append(f'{page.shown:,} characters of text in {len(markup):,} of a page, mostly scripts')
    tag, size = page.unclosed
    if size >= MUCH:
        notes.append(f'{size:,} characters after <{tag} are hidden, which is not closed')
    yield text, True
