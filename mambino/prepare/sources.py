"""
Finds what prepare.py is to read. No file is opened here but .gitignore and the state.json of a saved dataset.

    python prepare.py my_folder notes.xyz                    # a folder, all that is in it; a file, whatever its extension
    python prepare.py 'books/**/*.txt.gz' hf:owner/name      # a pattern; a dataset of the Hugging Face Hub
    python prepare.py my_project --exclude='build/,*.log'    # as in a .gitignore; those of the project count anyway

    inputs ──► expand: patterns ──► named files ───────────────────────────────► look ──► sources, one per real file
                  │ what is missing  └► folders ──► walk ──► hidden, ignored? ──► │  kind, size, time
                  ▼ ends the program                           └► skipped ◄───────┘  cannot be used: the reason

Both results are in canonical order, that of the real paths, whatever the order of the inputs and however often and
through however many links they lead to a file. So the same files make the same dataset.

A folder that is named is walked for its own sake: neither its name, nor a .gitignore above it, nor that it lies in
another input changes what is found in it. Links are followed; a folder that is reached both ways shows its own path.
"""
import difflib
import glob
import json
import os
import re
import stat
import sysconfig
from typing import NamedTuple

from mambino.configurator import fail

class Source(NamedTuple):
    path: str   # as it is opened and shown; for hf the specification, hf:owner/name
    kind: str   # a key of EXTENSIONS, or hf
    size: int   # bytes on disk, 0 where unknown
    stamp: int  # time of the last change in ns, 0 where unknown

# kind -> extensions. Each stands in one place only, also those that several formats share (.m, .v, .pp).
EXTENSIONS = {
    'text': '''
        txt text md markdown mkd mdown mdx rmd qmd rst adoc asciidoc asc textile wiki mediawiki pod org norg typ tex latex ltx
        bib bbl sty cls dtx log srt vtt lrc po pot diff patch fountain nfo readme''',
    'code': '''
        py pyi pyw pyx pxd pxi mojo js mjs cjs jsx ts mts cts tsx vue svelte astro coffee css scss sass less styl pcss java kt
        kts scala sc sbt groovy gvy clj cljs cljc c h cc cpp cxx c++ hh hpp hxx h++ inl ipp tpp ixx cppm ino pde cu cuh hip cl
        m mm cs csx cshtml razor fs fsi fsx vb vbs bas go rs swift zig nim nims nimble d di odin vala vapi v vh sv svh vhd
        vhdl rb rake gemspec erb cr pl pm t raku rakumod php phtml inc lua luau r jl hs lhs hsc purs ml mli mll mly re rei res
        sml sig elm erl hrl ex exs eex heex gleam dart lisp lsp el scm ss sld rkt hy f for ftn f77 f90 f95 f03 f08 pas pp dpr
        lpr ada adb ads cob cbl cpy abap asm s nasm ll mlir td wat wast awk sed tcl exp sh bash zsh fish ksh csh ps1 psm1 psd1
        bat cmd ahk au3 applescript vim cmake mk mak make am ac m4 gradle bazel bzl gn gni nix tf tfvars hcl bicep dockerfile
        containerfile glsl vert frag geom comp tesc tese hlsl fx wgsl metal gd gdshader hx as qml sol vy cairo move sql psql
        cypher cql rq sparql graphql gql proto thrift capnp fbs y yy l lex g4 bnf ebnf pest coq lean agda lagda idr thy tla
        als pro plg p6 st factor fth 4th apl stan sas do ado nf wdl cwl smk feature robot jsonnet libsonnet dhall cue rego jsp
        asp aspx cfm ejs hbs mustache pug haml slim jinja jinja2 j2 njk liquid twig tmpl tpl''',
    'data': '''
        json json5 jsonc hjson geojson topojson jsonld webmanifest yaml yml toml ini cfg conf config properties env xml xsd
        xsl xslt dtd rng svg rss atom opml plist kml gpx gml wsdl resx xlf xliff csproj vbproj fsproj vcxproj sln props
        targets desktop service edn ron kdl rdf owl ttl nt n3 nq trig ics vcf ldif''',
    'html': 'html htm xhtml',
    'notebook': 'ipynb',
    'jsonl': 'jsonl ndjson',
    'csv': 'csv tsv',
    'pdf': 'pdf',
    'parquet': 'parquet',
    'arrow': 'arrow',  # of a dataset that Hugging Face's save_to_disk wrote
}
KINDS = {'.' + extension: kind for kind, extensions in EXTENSIONS.items() for extension in extensions.split()}
COMPRESSED = {'.gz', '.bz2', '.xz', '.zst'}  # around any kind but the following, which compress on their own
BINARY = {'pdf', 'parquet', 'arrow'}
STREAMED = {'jsonl', 'csv', 'parquet', 'arrow'}  # read row by row, so memory does not mind their size

OURS = {'train.bin', 'val.bin', 'train.idx', 'val.idx', 'train.hash', 'val.hash', 'meta.json', 'tokenizer.json'}
PARTIAL = '.partial'  # how the folder is called in which prepare.py works; prepare.lock in it tells it from another's
NOT_STDLIB = {'test', 'tests', 'idle_test', 'testing', 'site-packages', 'dist-packages', '__pycache__'}

# -----------------------------------------------------------------------------
# Find

def find(inputs, exclude='', gitignore=True, max_file_mb=256.0):
    """
    What there is to read in `inputs`: files, folders, patterns, hf: specifications. `exclude` holds .gitignore patterns,
    separated by commas, relative to each folder among them. Returns (list of Source, list of {'file', 'reason'}); a
    folder that is left out is one entry. Ends the program where an input leads nowhere.
    """
    files, folders, hub = {}, {}, set()  # real path -> spelling
    for path in expand(inputs):
        if path.startswith('hf:'):
            hub.add(path)
        else:
            keep(folders if os.path.isdir(path) else files, real_path(path), path)

    found, skipped, walked = {}, {}, set()  # real path -> Source; real path -> (path, reason); real paths of folders
    excludes = compile_rules(pattern.lstrip() for pattern in exclude.split(','))
    named = [(real, path, '') for real, path in files.items()]
    for limit, candidates in (None, named), (max_file_mb, walk(folders, excludes, gitignore, walked)):
        for real, path, reason in candidates:
            source, reason = (None, reason) if reason else look(path, limit)
            keep(found if source else skipped, real, source or (path, reason))

    sources = [found[real] for real in sorted(found, key=os.fsencode)] + [Source(spec, 'hf', 0, 0) for spec in sorted(hub)]
    # what is skipped on one way and read on another, say as a hidden file that was named, is read
    real_paths = sorted(skipped.keys() - found.keys() - walked, key=os.fsencode)
    return sources, [{'file': skipped[real][0], 'reason': skipped[real][1]} for real in real_paths]

def keep(table, real, item):
    """Of several spellings of a path the smallest one stays, so that it does not matter which came first."""
    table[real] = min(item, table.get(real, item))

def walk(folders, excludes, gitignore, walked):
    """Yields (real path, path, why it is skipped or '') of all that is in `folders`; adds to `walked` what it has read."""
    # Taken from the end: a folder inside another comes first, as an input of its own. Links come last of all.
    waiting, linked = [(real, path, '', ()) for real, path in sorted(folders.items())], []
    while waiting or linked:
        folder, path, inside, rules = waiting.pop() if waiting else linked.pop(0)
        if folder in walked:
            continue
        try:
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
            names = {entry.name for entry in entries}
            ours = folder.endswith(PARTIAL) and 'prepare.lock' in names or 'meta.json' in names and is_dataset(path)
        except OSError as error:
            yield folder, path, error.strerror or 'unreadable'
            continue
        if ours:
            yield folder, path, 'a prepared dataset'
            continue
        walked.add(folder)
        asides = saved_dataset(path, names)
        if gitignore and '.gitignore' in names:
            rules += ((len(inside), read_gitignore(os.path.join(path, '.gitignore'))),)

        for entry in entries:
            link = entry.is_symlink() or getattr(entry, 'is_junction', bool)()  # junctions: Windows, from Python 3.12
            real = real_path(entry.path) if link else os.path.join(folder, entry.name)
            is_folder = os.path.isdir(entry.path) if link else entry.is_dir()
            below = inside + entry.name
            excluded = is_ignored(below, is_folder, [(0, excludes)])
            if entry.name.startswith('.'):
                yield real, entry.path, 'hidden'
            elif excluded:
                yield real, entry.path, 'excluded'
            elif excluded is None and is_ignored(below, is_folder, rules):
                yield real, entry.path, 'ignored by .gitignore'
            elif is_folder:
                (linked if link else waiting).append((real, entry.path, below + '/', rules))
            else:
                yield real, entry.path, asides.get(entry.name, '')

def real_path(path):
    """Where a path leads in the end; a link that leads nowhere counts as a thing of its own."""
    if os.path.exists(path):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))

def look(path, limit):
    """(Source, '') or (None, why the file cannot be used); `limit`: MB, None for a file that was named."""
    try:
        status = os.stat(path)
    except OSError as error:
        return None, 'no regular file' if os.path.islink(path) else error.strerror or 'unreadable'
    kind, extension = kind_of(os.path.basename(path))
    if not stat.S_ISREG(status.st_mode):
        return None, 'no regular file'
    if kind is None and limit is not None:
        return None, f'unknown type {extension}'
    if status.st_size == 0:
        return None, 'empty'
    if limit is not None and kind not in STREAMED and status.st_size > limit * 1e6:
        return None, f'larger than {limit:g} MB'
    return Source(path, kind or 'text', status.st_size, status.st_mtime_ns), ''

def kind_of(name):
    """(kind or None, the extension that says so); notes.txt.gz is text, and .tar.gz nothing we know."""
    stem, extension = os.path.splitext(name.lower())
    if extension in COMPRESSED:
        inner = os.path.splitext(stem)[1]
        kind = KINDS.get(inner)
        return None if kind in BINARY else kind, inner + extension
    return KINDS.get(extension, None if extension else 'text'), extension  # Makefile, README, LICENSE are text

def expand(inputs):
    """The inputs, patterns replaced by what they match; ends the program where there is nothing."""
    paths = []
    for path in inputs:
        if path.startswith('hf:') or os.path.lexists(path) or not any(c in path for c in '*?['):
            check_input(path)
            paths.append(path)
        else:
            paths += sorted(glob.glob(path, recursive=True)) or fail(f'{path}: no file or folder matches')
    return paths

def check_input(path):
    """Ends the program if `path` is missing, with the name beside it that was probably meant."""
    if not path.startswith('hf:') and not os.path.lexists(path):
        parent = os.path.dirname(path)
        near = difflib.get_close_matches(os.path.basename(path), names_in(parent or '.'), n=1, cutoff=0.5)
        fail(f'{path}: no such file or folder' + (f', did you mean {os.path.join(parent, near[0])}?' if near else ''))

def names_in(folder):
    """What is in a folder; nothing where it is none, or may not be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []

def find_stdlib():
    """The standard library's own .py files, without its tests; as find, with nothing skipped."""
    paths = []
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = set(folders) - NOT_STDLIB
        paths += [os.path.join(folder, name) for name in files if name.endswith('.py')]
    stats = [(path, os.stat(path)) for path in sorted(paths, key=os.fsencode) if os.path.isfile(path)]
    return [Source(path, 'code', status.st_size, status.st_mtime_ns) for path, status in stats], []

# -----------------------------------------------------------------------------
# Folders with a meaning of their own

def is_dataset(folder):
    """Whether prepare.py wrote this folder, and nobody put anything else there; hidden files do not count."""
    names = {name for name in os.listdir(folder) if not name.startswith('.')}
    return {'train.bin', 'val.bin', 'meta.json'} <= names <= OURS

def is_saved(names):
    """Whether a folder with these names in it is a dataset that Hugging Face's save_to_disk wrote."""
    return {'state.json', 'dataset_info.json'} <= set(names) and any(name.endswith('.arrow') for name in names)

def saved_dataset(path, names):
    """{name: reason} for what lies in a saved dataset beside its rows; {} in every other folder."""
    asides = {}
    if 'dataset_dict.json' in names and any(is_saved(names_in(os.path.join(path, name))) for name in names):
        asides['dataset_dict.json'] = 'describes a saved dataset'
    if is_saved(names):
        asides.update(dict.fromkeys(('state.json', 'dataset_info.json'), 'describes a saved dataset'))
        arrows = {name for name in names if name.endswith('.arrow')}
        state = os.path.join(path, 'state.json')
        try:
            with open(state if os.path.isfile(state) else os.devnull, encoding='utf-8') as f:  # a pipe would wait for ever
                rows = {file['filename'] for file in json.load(f)['_data_files']}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            rows = {name for name in arrows if not name.startswith('cache-')}
        asides.update(dict.fromkeys(arrows - rows, 'cache of a saved dataset'))
    return asides

# -----------------------------------------------------------------------------
# .gitignore, after git's dir.c and wildmatch.c. All patterns of a file become one regular expression, the last one being
# its first alternative, for the last match decides. What it is matched with is '-name/path', for a folder 'dname/path':
# a pattern without a slash looks at the name, any other at the path.

TOKEN = re.compile(r"""
    (?P<folders> (?<![^/])\*\*+/ ) | (?P<all> (?<![^/])\*\*+(?=\\?/|\Z) ) | (?P<some> \*+ ) | (?P<one> \? ) | (?P<set> \[[!^]? )
    | \\. | [^\\]""", re.DOTALL | re.VERBOSE)
MEANING = {'folders': '(?:.*/)?', 'all': '.*', 'some': '[^/]*', 'one': '[^/]'}
ITEM = re.compile(r'\[:(?P<name>[^\]]*):\] | (?P<low> \\.|[^\\] ) (?: -(?P<high> \\.|[^\\\]] ) )?', re.DOTALL | re.VERBOSE)
NAMES = {'alnum': 'a-zA-Z0-9', 'alpha': 'a-zA-Z', 'blank': r' \t', 'cntrl': r'\0-\x1f\x7f', 'digit': '0-9', 'graph': '!-~',
         'lower': 'a-z', 'print': ' -~', 'punct': r'!-/:-@\[-`{-~', 'space': r' \t\n\r', 'upper': 'A-Z', 'xdigit': '0-9a-fA-F'}
NEVER = '(?!)'  # matches nothing

def is_ignored(path, is_folder, rules):
    """True, False after a '!', None where no pattern matches; `rules`: (where the path relative to them begins, compiled)."""
    for start, (pattern, again) in reversed(rules):  # the deepest file decides
        match = pattern.match(f'{"d" if is_folder else "-"}{path[path.rfind("/") + 1:]}/{path[start:]}')
        if match:
            return match.lastindex not in again
    return None

def read_gitignore(path):
    """compile_rules of a file; of nothing where it cannot be read or is a link, which git does not follow here."""
    try:
        with open(path if stat.S_ISREG(os.lstat(path).st_mode) else os.devnull, 'rb') as f:
            text = f.read().decode('utf-8-sig', 'surrogateescape')  # as Python decodes the names of files
    except OSError:
        text = ''
    return compile_rules(line.removesuffix('\r') for line in text.split('\n'))

def compile_rules(lines):
    """(regular expression, the numbers of the groups in it whose pattern began with '!')."""
    rules = [rule for rule in map(translate, lines) if rule][::-1]
    pattern = re.compile('|'.join(f'({regex})' for regex, _ in rules) or NEVER, re.DOTALL)
    return pattern, {number for number, (_, again) in enumerate(rules, 1) if again}

def translate(line):
    """(regular expression, began with '!') of one line of a .gitignore; None for comments and what can match nothing."""
    trimmed = re.fullmatch(r'((?:\\.|[^\\])*?) *', line, re.DOTALL)  # spaces at the end, unless after a backslash
    line = trimmed[1] if trimmed else line
    if line.startswith('#'):
        return None
    again = line.startswith('!')
    line = line[again:]
    mark = 'd' if line.endswith('/') else '[-d]'
    line = line.removesuffix('/')
    anchored = '/' in line
    line = line.removeprefix('/')
    regex, i = '', 0
    while i < len(line):
        token = TOKEN.match(line, i)
        if not token:  # a backslash at the end
            return None
        i = token.end()
        if token.lastgroup == 'set':
            piece, i = character_set(line, i, negated=len(token['set']) > 1)
        else:
            piece = MEANING.get(token.lastgroup) or re.escape(token[0][-1])  # itself, without a backslash before it
        regex += piece
    if not regex:
        return None
    return mark + (f'[^/]*/{regex}\\Z' if anchored else f'{regex}/'), again

def character_set(line, start, negated):
    """(regular expression, index behind it) of the [...] whose content starts there. Without an end it matches nothing."""
    items, i = '', start
    while i == start or not line.startswith(']', i):  # a ] that comes first is one of the characters
        item = ITEM.match(line, i)
        if not item or item['low'] is None and item['name'] not in NAMES:
            return NEVER, len(line)
        if item['low'] is None:
            items += NAMES[item['name']]
        else:
            low, high = item['low'][-1], (item['high'] or item['low'])[-1]
            items += re.escape(low) + (f'-{re.escape(high)}' if low < high else '')  # [z-a] is z alone
        i = item.end()
    return f'(?!/)[{"^" * negated}{items}]', i + 1
