"""What a .gitignore leaves out, as git reads it (after its dir.c and wildmatch.c; tested against
git itself).

    rules = ignore.compile_rules(['*.log', '!keep.log', 'build/'])
    ignore.is_ignored('src/build', True, [(0, rules)])    # True

All patterns of a file become one regular expression, the last one being its first alternative, for
the last match decides. What it is matched with is '-name/path', for a folder 'dname/path': a
pattern without a slash looks at the name, any other at the path.
"""
import os
import re
import stat

TOKEN = re.compile(r"""
    (?P<folders> (?<![^/])\*\*+/ ) |             # **/ at the beginning or after a slash
    (?P<all> (?<![^/])\*\*+(?=\\?/|\Z) ) |       # ** as a name of its own
    (?P<some> \*+ ) | (?P<one> \? ) | (?P<set> \[[!^]? ) | \\. | [^\\]""", re.DOTALL | re.VERBOSE)
MEANING = {'folders': '(?:.*/)?', 'all': '.*', 'some': '[^/]*', 'one': '[^/]'}
ITEM = re.compile(r"""
    \[:(?P<name>[^\]]*):\] |
    (?P<low> \\.|[^\\] ) (?: -(?P<high> \\.|[^\\\]] ) )?""", re.DOTALL | re.VERBOSE)
CLASSES = {
    'alnum': 'a-zA-Z0-9', 'alpha': 'a-zA-Z', 'blank': r' \t', 'cntrl': r'\0-\x1f\x7f',
    'digit': '0-9', 'graph': '!-~', 'lower': 'a-z', 'print': ' -~',
    'punct': r'!-/:-@\[-`{-~', 'space': r' \t\n\r', 'upper': 'A-Z', 'xdigit': '0-9a-fA-F',
}
# names of a group that finds what stands between two stars of a name at the first place where it is, and looks for no
# other one: else a name with many stars could be tried for years
GROUP, GROUP_AGAIN = '(?P<first>', '(?P=first)'
NEVER = '(?!)'  # matches nothing


def is_ignored(path, is_folder, rules):
    """True, False after a '!', None where no pattern matches. rules: (index in `path` where what is
    relative to the rules begins, compile_rules()), the deepest file last.
    """
    kind = 'd' if is_folder else '-'
    name = path[path.rfind('/') + 1:]
    for start, (pattern, kept) in reversed(rules):  # the deepest file decides
        match = pattern.match(f'{kind}{name}/{path[start:]}')
        if match:
            return match.lastindex not in kept
    return None


def read_gitignore(path):
    """compile_rules of a file; of nothing where it cannot be read or is a link, which git does not
    follow here.
    """
    try:
        with open(path if stat.S_ISREG(os.lstat(path).st_mode) else os.devnull, 'rb') as f:
            text = f.read().decode('utf-8-sig', 'surrogateescape')  # as Python decodes the names of files
    except OSError:
        text = ''
    return compile_rules(line.removesuffix('\r') for line in text.split('\n'))


def compile_rules(lines):
    """(regular expression, the numbers of the groups in it whose pattern began with '!')."""
    rules = [rule for rule in map(translate, lines) if rule][::-1]
    regexes = []
    kept = set()
    groups = 0
    for regex, keep in rules:
        groups += 1  # of the whole rule, which closes last
        if keep:
            kept.add(groups)
        inner = regex.count(GROUP)
        for _ in range(inner):
            groups += 1
            regex = regex.replace(GROUP, f'(?P<g{groups}>', 1).replace(GROUP_AGAIN, f'(?P=g{groups})', 1)
        regexes.append(f'({regex})')
    return re.compile('|'.join(regexes) or NEVER, re.DOTALL), kept


def translate(line):
    """(regular expression, began with '!') of one line of a .gitignore; None for comments and what
    can match nothing.
    """
    # without the spaces at its end, unless after a backslash
    trimmed = re.fullmatch(r'((?:\\.|[^\\])*?) *', line, re.DOTALL)
    if trimmed:
        line = trimmed[1]
    if line.startswith('#'):
        return None
    keep = line.startswith('!')
    line = line[keep:]
    mark = 'd' if line.endswith('/') else '[-d]'
    line = line.removesuffix('/')
    anchored = '/' in line
    line = line.removeprefix('/')

    regex = ''
    star = None  # where in it the last star of this name is
    i = 0
    while i < len(line):
        token = TOKEN.match(line, i)
        if not token:  # a backslash at the end
            return None
        i = token.end()
        if token.lastgroup == 'set':
            piece, i = character_set(line, i, negated=len(token['set']) > 1)
        elif token.lastgroup:
            piece = MEANING[token.lastgroup]
            if token.lastgroup == 'some' and star is not None:
                regex = f'{regex[:star]}(?={GROUP}[^/]*?{regex[star + len(piece):]})){GROUP_AGAIN}'
            if token.lastgroup != 'one':
                star = len(regex) if token.lastgroup == 'some' else None
        else:
            piece = re.escape(token[0][-1])  # itself, without a backslash before it
            if piece == '/':
                star = None
        regex += piece
    if not regex:
        return None
    return mark + (f'[^/]*/{regex}\\Z' if anchored else f'{regex}/'), keep


def character_set(line, start, negated):
    """(regular expression, index behind it) of the [...] whose content starts there. Without an end
    it matches nothing.
    """
    items = ''
    i = start
    while i == start or not line.startswith(']', i):  # a ] that comes first is one of the characters
        item = ITEM.match(line, i)
        if not item or item['low'] is None and item['name'] not in CLASSES:
            return NEVER, len(line)
        if item['low'] is None:
            items += CLASSES[item['name']]
        else:
            low = item['low'][-1]
            high = (item['high'] or item['low'])[-1]
            items += re.escape(low)
            if low < high:  # [z-a] is z alone
                items += f'-{re.escape(high)}'
        i = item.end()
    return f'(?!/)[{"^" * negated}{items}]', i + 1
