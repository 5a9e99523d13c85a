"""ignore.py: --exclude and .gitignore, as git reads it."""
import os
import random
import re
import shutil
import subprocess

import pytest
from helpers.sources import look, names, write

from mambino.prepare import ignore, sources


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_exclude(here):
    for name in (
        'm/a.txt', 'm/a.log', 'm/keep.log', 'm/build/b.txt', 'm/src/build/c.txt', 'm/src/top.txt',
        'm/top.txt', 'n/top.txt', 'n/é.txt'):
        write(here / name)
    write(here / 'm' / '.gitignore', 'a.txt\n!a.log\n!build/\n')
    def kept(exclude, *inputs):
        paths = look(*(inputs or ['m', 'n']), exclude=exclude)[0]
        return {path.replace(os.sep, '/') for path in paths}

    every = kept('')
    assert len(every) == 8
    # despite the '!'
    assert every - kept('*.log, build/ ,') == {
        'm/a.log', 'm/keep.log', 'm/build/b.txt', 'm/src/build/c.txt',
    }
    assert every - kept('/top.txt') == {'m/top.txt', 'n/top.txt'}  # relative to each input
    assert every - kept('*.log,!keep.log') == {'m/a.log'}
    assert every - kept('src/**/c.txt') == {'m/src/build/c.txt'}
    # the word of the command line is above that of a file
    assert kept('!a.txt') - every == {'m/a.txt'}
    assert every - kept(r'[\,é].txt') == {'n/é.txt'}  # a comma that separates nothing
    assert every - kept('?.txt') == {'m/build/b.txt', 'm/src/build/c.txt', 'n/é.txt'}
    assert kept('*', 'm/a.txt', 'm/a.log') == {'m/a.txt', 'm/a.log'}  # named
    skipped = look('m', exclude='build,a.*')[1]
    assert names(skipped) == {
        'build': 'excluded',
        'a.txt': 'excluded',
        'a.log': 'excluded',
        '.gitignore': 'hidden',
    }
    assert sorted(map(os.path.normpath, skipped))[2:] == [
        os.path.normpath(p) for p in ('m/a.txt', 'm/build', 'm/src/build')
    ]


def test_gitignore_counts_from_the_input_down(here):
    for name in (
        'p/x.tmp', 'p/q/x.tmp', 'p/q/r/x.tmp', 'p/q/r/y.tmp', 'p/out/deep/z.txt', 'p/q/a.txt'):
        write(here / name)
    write(here / 'p' / '.gitignore', 'out/\na.txt\n')
    write(here / 'p' / 'q' / '.gitignore', '*.tmp\n!a.txt\n')
    write(here / 'p' / 'q' / 'r' / '.gitignore', '!x.tmp\n')
    def tmp(*args, **settings):
        skipped = look(*args, **settings)[1]
        return {p.replace(os.sep, '/'): r for p, r in skipped.items() if 'ignored' in r}

    assert tmp('p') == dict.fromkeys(('p/out', 'p/q/r/y.tmp', 'p/q/x.tmp'), 'ignored by .gitignore')
    assert tmp('p', gitignore=False) == {}
    assert tmp('p/q/r') == tmp('p/out') == {}
    assert list(look('p/out')[0]) == [os.path.join('p/out', 'deep', 'z.txt')]
    assert tmp('p/q/x.tmp') == {} and names(look('p', 'p/q/x.tmp')[0])['x.tmp'] == 'text'


CASES = [  # (lines of a .gitignore, paths)
    ('*.log\n!keep.log\n', 'a.log keep.log d/b.log d/keep.log'),
    ('build/\n', 'build/x d/build/x e/build'), ('/build\n', 'build d/build'),
    ('d/build\n', 'd/build e/d/build'), ('d/\n!d/keep\n', 'd/keep d/other'),
    ('d/*\n!d/keep\n', 'd/keep d/other d/e/keep'), ('/*\n!/d\n', 'a d/a e/a'),
    ('**/foo\n', 'foo d/foo d/e/foo foo2'), ('foo/**\n', 'foo/a foo/b/c d/foo/a'),
    ('a/**/b\n', 'a/b a/x/b a/x/y/b a/xb d/a/b'), ('**\n!a\n', 'a b d/a'), ('/**/\n', 'a d/a'),
    ('**/\n', 'a d/a'), ('a?c\n', 'abc ac a/c abbc'), ('[abc]x\n', 'ax bx dx'),
    ('[!abc]x\n[^d-f]y\n', 'ax dx dy ay'), ('[]a]x\n[!]a]y\n', ']x ax bx ]y by'),
    ('[a-]x\n[]-a]y\n[--0]z\n', '-x ax bx ]y ^y ay -z .z 0z'), ('[z-a]x\n[!z-a]y\n', 'ax zx ay'),
    ('[[:alpha:]]1\n[[:digit:][:upper:]]2\n[[:nothing:]]3\n[[:alpha:]-z]4\n', 'a1 11 A2 12 a2 a3 :3 a4 -4 14'),
    ('[[:alpha]x\n[[:]y\n[[:alpha:]\n', '[x ax :x [y :y a ['), ('[abc\n[!\n[\n', '[abc a [ [!'),
    ('[\\]a]x\n[\\a-\\c]y\n[\\\\]z\n', ']x ax bx by \\z z'),
    ('\\#x\n#y\n\\!z\n!!w\n', '#x #y !z !w'), ('a \nb\\ \nc\\  \n d\n', 'a b b\\  c d'),
    ('\\*x\na\\?b\n\\\\c\n', '*x xx a?b acb \\c c'), ('x\\\nfoo\\/\n', 'x x\\ foo/a'),
    ('*\n!*/\n!*.c\n', 'a.c d/a.c d/b e/f/a.c'), ('d/\n!d/\n', 'd/a'), ('!a\na\n', 'a'),
    ('\n\n/\n//\n!\n', 'a d/a'), ('foo//\na//b\n', 'foo/a a/b'), ('*/x\n', 'a/x a/b/x x'),
    ('d/**\n!d/**/\n!d/**/*.c\n', 'd/a d/a.c d/e/a.c d/e/b'),
    ('a/***/b\n***c\n', 'a/b a/x/b cc d/cc'), ('a/**\\/b\n', 'a/b a/x/b a/x/y/b'),
    ('/a[!b]c\n', 'a/c axc abc'), ('x?**/b\n', 'xa/b xab/b xa/c/b xab'),
    ('**a\na**\n', 'ba ab d/ba'), ('*é\n[a-c]ü\n', 'é aé aü dü'), ('\ufeffa\n', 'a'),
    ('a\r\n*.b\r\n', 'a x.b'), ('d/.x\n', 'd/a'), ('a\tb\nc\t\n', 'a c'),
    ('/d/e/\n!/d/e/f\n', 'd/e/f d/g'), ('*.[oa]\n!lib.a\n', 'x.o x.a lib.a lib.o'),
    ('d*/e\n', 'd/e dd/e dd/x/e'), ('.\n..\n./a\n', 'a d/a'),
]


def random_cases(count):
    """Made of few letters, so that the patterns match now and then."""
    rng = random.Random(1337)
    pieces = [
        'a', 'b', 'c', 'ab', '.', '*', '?', '[ab]', '[!a]', '[a-b]', '[]b]', '\\a', '[[:alpha:]]',
        '[', '*a', 'b*', '-', ' ',
    ]
    parts = ['**', '*', 'a', 'b']
    for _ in range(count):
        lines = []
        for _ in range(rng.randint(1, 6)):
            words = [
                rng.choice(parts)
                if rng.random() < 0.5
                else ''.join(rng.choices(pieces, k=rng.randint(1, 3)))
                for _ in range(rng.choice((1, 1, 2, 2, 3)))
            ]
            line = (
                '!' * (rng.random() < 0.3)
                + '/' * (rng.random() < 0.2)
                + '/'.join(words)
                + '/' * (rng.random() < 0.2)
            )
            # git takes the ** of ab**/c as if a slash were before it, against its manual; we follow the manual
            lines.append(re.sub(r'(?<=[^/])\*\*+', '*', line))

        def name():
            return ''.join(rng.choices('aabbc.-', k=rng.randint(1, 3))).strip('.') or 'a'

        paths = {'/'.join(name() for _ in range(rng.randint(1, 4))) for _ in range(30)}
        yield '\n'.join(lines), paths


def test_gitignore_as_git_reads_it(here):
    """One repository with a folder for each .gitignore, one call of git for all of their paths."""
    if not shutil.which('git'):
        pytest.skip('git is not installed: .gitignore was NOT compared with it')
    cases = [(text, words(paths)) for text, paths in CASES] + list(random_cases(150))
    every = set()
    for number, (text, paths) in enumerate(cases):
        top = here / 'repo' / f'case{number}'
        write(top / '.gitignore', text)
        if (
            number % 3 == 0
            and any(path.startswith('a/') for path in paths)
            and number >= len(CASES)
        ):
            paths = {path for path in paths if path != 'a'}
            write(top / 'a' / '.gitignore', cases[number - 1][0] + '\n!b\n')  # one below the other
        for path in sorted(paths, key=lambda path: -path.count('/')):
            try:
                write(top / path)
            except OSError:  # a file and a folder of one name
                continue
            parts = f'case{number}/{path}'.split('/')
            every |= {'/'.join(parts[:n]) for n in range(2, len(parts) + 1)}
    env = {
        **os.environ,
        'GIT_CONFIG_GLOBAL': os.devnull,
        'GIT_CONFIG_SYSTEM': os.devnull,
        'HOME': str(here),
    }
    subprocess.run(['git', 'init', '-q', 'repo'], check=True, env=env)
    settings = ['-c', 'core.excludesFile=', '-c', 'core.ignorecase=false']
    done = subprocess.run(
        ['git', *settings, 'check-ignore', '-z', '--stdin'],
        cwd='repo', env=env, capture_output=True,
        input='\0'.join(sorted(every)).encode('utf-8'),
    )
    assert done.returncode in (0, 1), done.stderr
    git = set(done.stdout.decode('utf-8').split('\0')) - {''}

    kept, skipped = look('repo')
    ignored = {
        os.path.relpath(path, 'repo').replace(os.sep, '/')
        for path, reason in skipped.items()
        if 'ignored' in reason
    }
    hidden = {path for path in every if any(part.startswith('.') for part in path.split('/'))}
    ours = {
        path
        for path in every
        if any('/'.join(path.split('/')[:n]) in ignored for n in range(path.count('/') + 2))
    }
    wrong = sorted((git ^ ours) - hidden)
    def cause(path):
        verdict = 'git ignores it' if path in git else 'git keeps it'
        return path, verdict, cases[int(path.split('/')[0][4:])][0]

    assert not wrong, (len(wrong), [cause(path) for path in wrong[:10]])
    assert len(every) > 4000 and len(every) * 0.2 < len(git) < len(every) * 0.8


def words(paths):
    """Paths between single spaces; two spaces stand for one in a name."""
    return {path.replace('\0', ' ') for path in paths.replace('  ', '\0').split(' ')}


def test_no_pattern_is_an_error():
    rng = random.Random(7)
    for _ in range(8_000):
        line = ''.join(rng.choices('ab/*?[]!^-\\:# .\0\nü\udcff{}()|+$&~', k=rng.randint(0, 12)))
        rules = [(0, ignore.compile_rules([line, 'a']))]
        assert ignore.is_ignored('d/a', False, rules) is not None or line.startswith('!')
    assert ignore.compile_rules(['[[:alpha:]'] * 5000)


# -----------------------------------------------------------------------------
# What is left out by default

def test_secrets_are_left_out_unless_they_are_named(here):
    secrets = ['.env', '.env.local', 'prod.env', 'server.pem', 'server.key', 'id_rsa', 'id_ed25519.pub', 'a.p12',
               'a.pfx', 'a.jks', 'a.keystore', '.netrc', '.npmrc', '.pypirc', 'credentials.json', 'secrets.yml',
               'secrets.yaml', 'home.ovpn', 'a.kdbx', 'service-account-7.json', 'client_secret_1.json']
    for name in (*secrets, 'deep/.env', 'environment.txt', 'my_secrets.md', 'keys.py', '.other'):
        write(here / 'm' / name)
    kept, skipped = look('m')
    assert set(names(kept)) == {'environment.txt', 'my_secrets.md', 'keys.py'}
    reasons = names(skipped)
    assert reasons.pop('.other') == 'hidden' and set(reasons) == {*secrets}
    assert reasons['.env'] == 'a secret (.env); name the file to have it read'
    assert reasons['server.pem'] == 'a secret (*.pem); name the file to have it read'
    assert set(names(look('m/.env', 'm/id_rsa')[0])) == {'.env', 'id_rsa'}
    assert {'id_rsa', '.env'} <= set(names(look('m', exclude='!id_*,!.env')[0]))
    assert names(look('m', exclude='*.pem')[1])['server.pem'] == 'excluded'
    named = {source.path: source.named for source in sources.find(['m', 'm/keys.py'])[0]}
    assert [named[os.path.join('m', name)] for name in ('keys.py', 'environment.txt')] == [True, False]


def test_junk_is_left_out_by_its_name(here):
    for name in ('a.svg', 'a.min.js', 'main.bundle.js', 'poetry.lock', '__pycache__/a.py', 'a.js', 'folder.svg/a.txt'):
        write(here / 'm' / name)
    kept, skipped = look('m')
    assert names(kept) == {'a.js': 'code'}
    assert names(skipped)['main.bundle.js'] == 'excluded by default (*.bundle.js)'
    assert names(skipped)['__pycache__'] == 'excluded by default (__pycache__/)'
    assert 'a.svg' in names(look('m', exclude='!*.svg')[0]) and 'a.svg' in names(look('m/a.svg')[0])


def test_a_name_with_many_stars_takes_no_time():
    """Nor does one with many question marks between them; and what it matches stays what git says."""
    rules = [(0, ignore.compile_rules(['*a*a*a*a*a*a*a*a*b', '*?c*?c*?c*?c*?c*?c*?d', '!keep*x*y.z', '*.log']))]
    for name, verdict in ('a' * 250, None), ('a' * 250 + 'b', True), ('c' * 250, None), ('ccc' * 80 + 'dd', True), \
            ('d/keep1x2y.z', False), ('keepxy.z', False), ('keepyx.z', None), ('q.log', True):
        assert ignore.is_ignored(name, False, rules) is verdict, name
