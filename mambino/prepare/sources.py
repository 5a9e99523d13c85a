"""Finds what prepare.py is to read. No file is opened for that but .gitignore, the state.json of a
saved dataset, and those of a type that nobody knows, for their first bytes may be known.

    python prepare.py my_folder notes.xyz                 # a folder, all in it; a file, whatever it is
    python prepare.py 'books/**/*.txt.gz' hf:owner/name   # a pattern; a dataset of the Hugging Face Hub
    python prepare.py my_project --exclude='build/,*.log' # as in a .gitignore; those count anyway

    inputs ──► expand ──► named files ───────────────────────────────► look ──► sources
                 │         └► folders ──► walk ──► hidden, ignored? ──► │       kind, size, time
                 │                                   └► skipped ◄───────┘ cannot be used: the reason
                 ▼ what is missing ends the program

Both results are in canonical order, that of the real paths, whatever the order of the inputs and
however often and through however many links they lead to a file. So the same files make the same
dataset.

A folder that is named is walked for its own sake: neither its name, nor a .gitignore above it, nor
that it lies in another input changes what is found in it. A link that is named is followed; one
that is found in a folder is not, for it may lead to anything on this machine. Where it leads to
what is among the inputs, that is read for its own sake. In Hugging Face's cache the files lie in
blobs/, under hashes, and the links to them in snapshots/ have their names: those are followed.
"""
import difflib
import glob
import json
import os
import re
import stat
from typing import NamedTuple

from mambino.configurator import fail, split_list
from mambino.prepare import sniff
from mambino.prepare.ignore import compile_rules, is_ignored, read_gitignore


class Source(NamedTuple):
    """A file, or a dataset of the hub, that is to be read."""
    path: str   # as it is opened and shown; for hf the specification, hf:owner/name
    kind: str   # a key of EXTENSIONS, or hf
    size: int   # bytes on disk, 0 where unknown
    stamp: int  # time of the last change in ns, 0 where unknown
    named: bool = False  # by the person: then nothing speaks against it


# kind -> extensions. Each stands in one place only, also those that several formats share (.m, .pp).
EXTENSIONS = {
    'text': '''
        txt text md markdown mkd mdown mdx rmd qmd rst adoc asciidoc asc textile wiki mediawiki pod
        org norg typ tex latex ltx bib bbl sty cls dtx log srt vtt lrc po pot diff patch fountain
        nfo readme''',
    'code': '''
        py pyi pyw pyx pxd pxi mojo js mjs cjs jsx ts mts cts tsx vue svelte astro coffee css scss
        sass less styl pcss java kt kts scala sc sbt groovy gvy clj cljs cljc c h cc cpp cxx c++ hh
        hpp hxx h++ inl ipp tpp ixx cppm ino pde cu cuh hip cl m mm cs csx cshtml razor fs fsi fsx
        vb vbs bas go rs swift zig nim nims nimble d di odin vala vapi v vh sv svh vhd vhdl rb rake
        gemspec erb cr pl pm t raku rakumod php phtml inc lua luau r jl hs lhs hsc purs ml mli mll
        mly re rei res sml sig elm erl hrl ex exs eex heex gleam dart lisp lsp el scm ss sld rkt hy
        f for ftn f77 f90 f95 f03 f08 pas pp dpr lpr ada adb ads cob cbl cpy abap asm s nasm ll mlir
        td wat wast awk sed tcl exp sh bash zsh fish ksh csh ps1 psm1 psd1 bat cmd ahk au3
        applescript vim cmake mk mak make am ac m4 gradle bazel bzl gn gni nix tf tfvars hcl bicep
        dockerfile containerfile glsl vert frag geom comp tesc tese hlsl fx wgsl metal gd gdshader
        hx as qml sol vy cairo move sql psql cypher cql rq sparql graphql gql proto thrift capnp fbs
        y yy l lex g4 bnf ebnf pest coq lean agda lagda idr thy tla als pro plg p6 st factor fth 4th
        apl stan sas do ado nf wdl cwl smk feature robot jsonnet libsonnet dhall cue rego jsp asp
        aspx cfm ejs hbs mustache pug haml slim jinja jinja2 j2 njk liquid twig tmpl tpl''',
    'data': '''
        json json5 jsonc hjson geojson topojson jsonld webmanifest yaml yml toml ini cfg conf config
        properties env xml xsd xsl xslt dtd rng svg rss atom opml plist kml gpx gml wsdl resx xlf
        xliff csproj vbproj fsproj vcxproj sln props targets desktop service edn ron kdl rdf owl ttl
        nt n3 nq trig ics vcf ldif''',
    'html': 'html htm xhtml',
    'notebook': 'ipynb',
    'jsonl': 'jsonl ndjson',
    'csv': 'csv tsv',
    'pdf': 'pdf',
    'docx': 'docx docm dotx dotm',
    'pptx': 'pptx pptm ppsx ppsm potx',
    'xlsx': 'xlsx xlsm xltx xltm xlsb xls',
    'odt': 'odt ott fodt ods ots fods odp otp fodp',
    'epub': 'epub',
    'rtf': 'rtf',
    'email': 'eml mbox mht mhtml',
    'zip': 'zip',
    'tar': 'tar tgz tbz2 txz',
    'office': 'doc ppt pps msg pages numbers',  # older ones, and Apple's: what they are is said
    'parquet': 'parquet',
    'arrow': 'arrow',  # of a dataset that Hugging Face's save_to_disk wrote
}
KIND_OF = {'.' + name: kind for kind, names in EXTENSIONS.items() for name in names.split()}
COMPRESSED = {'.gz', '.gzip', '.bz2', '.xz', '.lzma', '.zst', '.zstd'}  # around any kind but the following
# they compress on their own
BINARY = {'pdf', 'parquet', 'arrow', 'docx', 'pptx', 'xlsx', 'odt', 'epub', 'zip', 'office'}
# row by row, so memory does not mind their size
STREAMED = {'jsonl', 'csv', 'parquet', 'arrow', 'xlsx', 'email', 'zip', 'tar'}
# what is junk in every folder, as in a .gitignore; --exclude='!*.lock' has those back
JUNK = ('__pycache__/,node_modules/,site-packages/,*.min.js,*.min.css,*.bundle.js,*.chunk.js,*.map,*.svg,'
        '*.lock,package-lock.json')
# what nobody means to publish, as a model may; --exclude='!*.pem' has those back
SECRETS = ('.env,.env.*,*.env,*.pem,*.key,*.ppk,*.p8,*.p12,*.pfx,*.jks,*.keystore,*.kdbx,*.ovpn,id_rsa*,'
           'id_dsa*,id_ecdsa*,id_ed25519*,.netrc,_netrc,.npmrc,.pypirc,.pgpass,.htpasswd,.git-credentials,'
           'credentials.json,client_secret*.json,service-account*.json,service_account*.json,secrets.yml,'
           'secrets.yaml,secrets.json,secrets.toml')

# the files of a dataset
OURS = {
    'train.bin', 'train.idx', 'train.hash', 'val.bin', 'val.idx', 'val.hash',
    'meta.json', 'tokenizer.json',
}
PARTIAL = '.partial'   # how the folder is called in which prepare.py works
LINK = 'a link; name it, or what it leads to, to have that read'
LOCK = 'prepare.lock'  # in it, tells it from another's
CACHE = re.compile('(datasets|models|spaces)--')  # how a folder in Hugging Face's cache is called
BLOBS = "of Hugging Face's cache: read by the names in snapshots/"
SAVED_WITH = ('state.json', 'dataset_info.json')  # what Hugging Face's save_to_disk writes beside rows


# -----------------------------------------------------------------------------
# Find

def find(inputs, exclude='', gitignore=True, max_file_mb=256.0):
    """What there is to read in `inputs`: files, folders, patterns, hf: specifications. `exclude`
    holds .gitignore patterns, separated by commas, relative to each folder among them, and adds to
    JUNK and SECRETS. Returns (list of Source, list of {'file', 'reason'}); a folder that is left
    out is one entry. Ends the program where an input leads nowhere.
    """
    files = {}    # real path -> spelling
    folders = {}
    hub = set()
    for path in expand(inputs):
        if path.startswith('hf:'):
            hub.add(path)
        else:
            keep(folders if os.path.isdir(path) else files, real_path(path), path)

    sources = {}     # real path -> Source
    skipped = {}     # real path -> (path, reason)
    walked = set()   # real paths of folders
    excludes = Excludes(exclude)
    named = [(real, path, '') for real, path in files.items()]
    for limit, candidates in (None, named), (max_file_mb, walk(folders, excludes, gitignore, walked)):
        for real, path, reason in candidates:
            source = None
            if not reason:
                source, reason = look(path, limit)
            if source:
                keep(sources, real, source)
            else:
                keep(skipped, real, (path, reason))

    in_order = [
        sources[real]._replace(named=real in files) for real in sorted(sources, key=os.fsencode)
    ]
    in_order += [Source(spec, 'hf', 0, 0) for spec in sorted(hub)]
    # what is skipped on one way and read on another, say as a hidden file that was named, is read
    real_paths = sorted(skipped.keys() - sources.keys() - walked, key=os.fsencode)
    return in_order, [{'file': skipped[real][0], 'reason': skipped[real][1]} for real in real_paths]


def keep(table, real, item):
    """Of several spellings of a path the smallest one stays, so that it does not matter which came
    first.
    """
    table[real] = min(item, table.get(real, item))


def walk(folders, excludes, gitignore, walked):
    """Yields (real path, path, why it is skipped or '') of all that is in `folders`; adds to
    `walked` what it has read.
    """
    # Taken from the end: a folder inside another comes first, as an input of its own.
    waiting = [(real, path, '', ()) for real, path in sorted(folders.items())]
    while waiting:
        folder, path, inside, rules = waiting.pop()
        if folder in walked:
            continue
        try:
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
            names = {entry.name for entry in entries}
            working = folder.endswith(PARTIAL) and LOCK in names
            ours = working or 'meta.json' in names and is_dataset(path)
        except OSError as error:
            yield folder, path, error.strerror or 'unreadable'
            continue
        if ours:
            yield folder, path, 'a prepared dataset'
            continue
        walked.add(folder)
        asides = saved_dataset(path, names)
        if CACHE.match(os.path.basename(folder)) and 'snapshots' in names:
            asides |= dict.fromkeys(('blobs', 'refs'), BLOBS)
        if gitignore and '.gitignore' in names:
            rules += ((len(inside), read_gitignore(os.path.join(path, '.gitignore'))),)

        for entry in entries:
            is_junction = getattr(entry, 'is_junction', bool)  # of Windows, from Python 3.12
            is_link = entry.is_symlink() or is_junction()
            real = real_path(entry.path) if is_link else os.path.join(folder, entry.name)
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            below = inside + entry.name
            excluded = excludes.match(below, is_folder)
            is_secret = excluded is not True and excludes.is_secret(below, is_folder)
            if is_secret and excluded is None:
                yield real, entry.path, f'a secret ({matching(SECRETS, below)}); name the file to have it read'
            elif entry.name.startswith('.') and not is_secret:
                yield real, entry.path, 'hidden'
            elif excluded:
                yield real, entry.path, excludes.reason(below, is_folder)
            elif excluded is None and is_ignored(below, is_folder, rules):
                yield real, entry.path, 'ignored by .gitignore'
            elif is_link and not is_cached(folder, real):
                yield real, entry.path, LINK if os.path.exists(entry.path) else 'a link that leads nowhere'
            elif is_folder and not asides.get(entry.name):
                waiting.append((real, entry.path, below + '/', rules))
            else:
                yield real, entry.path, asides.get(entry.name, '')


class Excludes:
    """What is left out of folders: by the person's own patterns, and else as junk or as a secret."""

    def __init__(self, exclude):
        own = [pattern.lstrip() for pattern in split_list(exclude, ',')]
        self.own = [(0, compile_rules(own))]
        self.all = [(0, compile_rules([*JUNK.split(','), *own]))]
        self.secrets = [(0, compile_rules(SECRETS.split(',')))]

    def match(self, path, is_folder):
        """As is_ignored: True, False where a pattern with '!' has it back, or None."""
        return is_ignored(path, is_folder, self.all)

    def is_secret(self, path, is_folder):
        return not is_folder and bool(is_ignored(path, False, self.secrets))

    def reason(self, path, is_folder):
        """Why it is left out."""
        if is_ignored(path, is_folder, self.own):
            return 'excluded'
        return f'excluded by default ({matching(JUNK, path, is_folder)})'


def matching(patterns, path, is_folder=False):
    """The first of the patterns, separated by commas, that matches."""
    for pattern in patterns.split(','):
        if is_ignored(path, is_folder, [(0, compile_rules([pattern]))]):
            return pattern
    return ''


def real_path(path):
    """Where a path leads in the end; a link that leads nowhere counts as a thing of its own."""
    if os.path.exists(path):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def look(path, limit):
    """(Source, '') or (None, why the file cannot be used); `limit`: MB, None for a file that was
    named.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        return None, 'a link that leads nowhere' if os.path.islink(path) else error.strerror or 'unreadable'
    kind, extension = kind_of(os.path.basename(path))
    if not stat.S_ISREG(status.st_mode):
        return None, 'no regular file'
    if status.st_size == 0:  # so are those of /proc, of which some can be waited for
        return None, 'empty'
    if kind is None and limit is not None:
        kind = sniff.known_kind(path)
        if kind is None:
            return None, sniff.remedy_for(path) or f'unknown type {extension}'
    if limit is not None and kind not in STREAMED and status.st_size > limit * 1e6:
        if kind not in ('text', 'data') or not sniff.has_rows(path):
            return None, f'larger than {limit:g} MB'
        kind = 'jsonl'
    return Source(path, kind or 'text', status.st_size, last_change(status)), ''


def last_change(status):
    """When a file was last changed, in ns. cp -p and rsync bring the time of its content with it,
    and the one of its entry tells."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def kind_of(name):
    """(kind or None, the extension that says so); notes.txt.gz is text, and .tar.gz nothing we
    know.
    """
    stem, extension = os.path.splitext(name.lower())
    if extension in COMPRESSED:
        inner = os.path.splitext(stem)[1]
        kind = KIND_OF.get(inner) if inner else 'text'  # RC_2010-01.zst, dump.gz
        return None if kind in BINARY else kind, inner + extension
    if not extension:
        return 'text', extension  # Makefile, README, LICENSE
    return KIND_OF.get(extension), extension


def expand(inputs):
    """The inputs, patterns replaced by what they match; ends the program where there is nothing."""
    paths = []
    for path in inputs:
        if path.startswith('hf:') or os.path.lexists(path) or not any(c in path for c in '*?['):
            check_input(path)
            paths.append(path)
        else:
            matches = sorted(glob.glob(path, recursive=True))
            paths += matches or fail(f'{path}: no file or folder matches')
    return paths


def check_input(path):
    """Ends the program if `path` is missing, with the name beside it that was probably meant."""
    if path.startswith('hf:') or os.path.lexists(path):
        return
    parent = os.path.dirname(path)
    names = names_in(parent or '.')
    near = difflib.get_close_matches(os.path.basename(path), names, n=1, cutoff=0.5)
    hint = f', did you mean {os.path.join(parent, near[0])}?' if near else ''
    fail(f'{path}: no such file or folder{hint}')


def names_in(folder):
    """What is in a folder; nothing where it is none, or may not be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


# -----------------------------------------------------------------------------
# Folders with a meaning of their own

def is_dataset(folder):
    """Whether prepare.py wrote this folder, and nobody put anything else there; hidden files do not
    count.
    """
    names = {name for name in os.listdir(folder) if not name.startswith('.')}
    return {'train.bin', 'val.bin', 'meta.json'} <= names <= OURS


def is_saved(names):
    """Whether a folder with these names in it is a dataset that Hugging Face's save_to_disk wrote.
    """
    has_rows = any(name.endswith('.arrow') for name in names)
    return has_rows and set(SAVED_WITH) <= set(names)


def is_cached(folder, real):
    """Whether the file at `real` lies in Hugging Face's cache, and `folder` is among the snapshots
    of the same dataset there. Both are real paths."""
    root, snapshots, _ = (folder + os.sep).rpartition(f'{os.sep}snapshots{os.sep}')
    return bool(snapshots) and os.path.dirname(real) == os.path.join(root, 'blobs') and os.path.isfile(real)


def saved_dataset(path, names):
    """{name: reason} for what lies in a saved dataset beside its rows; {} in every other folder."""
    asides = {}
    if 'dataset_dict.json' in names:
        if any(is_saved(names_in(os.path.join(path, name))) for name in names):
            asides['dataset_dict.json'] = 'describes a saved dataset'
    if is_saved(names):
        asides.update(dict.fromkeys(SAVED_WITH, 'describes a saved dataset'))
        arrows = {name for name in names if name.endswith('.arrow')}
        asides.update(dict.fromkeys(arrows - rows_in(path, arrows), 'cache of a saved dataset'))
    return asides


def rows_in(path, arrows):
    """The names of the files with the rows of a saved dataset; `arrows`: all that may be some."""
    state = os.path.join(path, 'state.json')
    try:
        if not os.path.isfile(state):
            state = os.devnull  # a pipe would wait for ever
        with open(state, encoding='utf-8') as f:
            return {file['filename'] for file in json.loads(f.read(1 << 24))['_data_files']}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {name for name in arrows if not name.startswith('cache-')}
