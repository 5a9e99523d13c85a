"""Overrides the settings of a script from config files and the command line.

    python train.py config/shakespeare.py --batch_size=8     # a file of assignments, then flags: the later one wins
    python train.py --help                                   # every setting, its value, and why it is there

A script's settings are the plain lower-case globals in its source above the line that calls
configure(globals()). Their values are numbers, strings, bools or None. Each argument is taken in
order:

    config/x.py        is executed; it sees the current settings, and what it assigns must be settings
    --name=value       is converted to the type of the default; a string is taken as it stands, never evaluated
    --name             turns on what may be true, a bool or a setting that is None

What goes wrong ends the program with one line and exit status 2. What differs from the defaults is
printed, and nothing else.
"""
import ast
import builtins
import codecs
import difflib
import io
import math
import os
import re
import shutil
import sys
import textwrap
import tokenize
import traceback
import types
from typing import NamedTuple

YES = ('true', '1', 'yes', 'on')
NO = ('false', '0', 'no', 'off')
SECRETS = ('api_key',)      # settings whose value no terminal or log has to show
LARGEST_CONFIG = 1 << 20    # bytes


# --- refusing -------------------------------------------------------------------------------------

def fail(message):
    """One line to stderr and exit status 2: for everything that a user can cause."""
    print('error: ' + shown(typed(' '.join(str(message).split('\n')))), file=sys.stderr)
    raise SystemExit(2)


def typed(text):
    """A text with our commands as this one was typed: python train.py, or mambino train where pip
    has made that command (mambino/__main__.py)."""
    command = os.environ.get('MAMBINO_COMMAND')
    if not command:
        return text
    text = re.sub(r'\bpython (prepare|train|sample|export|serve)\.py\b', rf'{command} \1', text)
    return re.sub(r'\b(torchrun( --\S+)*) train\.py\b', r'\1 -m mambino train', text)


def shown(text):
    r"""A text from outside as a terminal may have it: control characters, which could move its
    cursor or hide what it shows, as \x1b, and so what is no character at all."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def require(namespace, conditions):
    """Ends the program at the first setting in `namespace` that is not as it must be. conditions:
    {how it must be: {name: whether it is}}."""
    for condition, settings in conditions.items():
        for name, holds in settings.items():
            if not holds:
                fail(f'{name}={namespace[name]} must be {condition}')


def refuse_unknown(name, where, known):
    """No such setting: says which known name is nearest."""
    near = difflib.get_close_matches(name.lower()[:100], known, n=1, cutoff=0)
    hint = f' (did you mean --{near[0]}?)' if near else ''
    fail(f"{where}: unknown setting '{name}'{hint}")


# --- the command line -----------------------------------------------------------------------------

def configure(namespace, positional='config', argv=None):
    """Overrides the settings in `namespace`, the globals() of the calling script, in place.

    positional='config': arguments without -- are config files; positional='inputs': they are
    appended to the script's list `inputs`; None: refused. Returns {name: value} of what files and
    flags set explicitly, be it to the default value."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):     # a console that lacks a character must not end a run of hours
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    defaults = {name: namespace[name] for name in find_settings(namespace)}
    if '--help' in argv or '-h' in argv:
        show_help(namespace, defaults, positional)
        raise SystemExit(0)

    explicit = {}
    for arg, following in zip(argv, [*argv[1:], '']):
        if arg.startswith('-') and arg != '-':
            name, value = read_flag(arg, following, defaults)
            explicit[name] = value
        elif positional == 'inputs':
            namespace['inputs'].append(arg)
        elif positional == 'config':
            explicit.update(run_config(arg, {**defaults, **explicit}, defaults, namespace))
        else:
            fail(f'{arg}: unexpected argument, settings are written --name=value')
    namespace.update(explicit)
    if os.environ.get('RANK', '0') == '0':
        show_changes(explicit, defaults)
    return explicit


def read_flag(arg, following, defaults):
    """(name, value) of --name=value; following: the argument after it, which may have been meant as
    the value."""
    name, equals, text = arg.lstrip('-').partition('=')     # only the first = splits
    name = name.replace('-', '_')
    if not arg.startswith('--') or not name:
        fail(f'{arg}: settings are written --name=value, see --help')
    if name not in defaults:
        refuse_unknown(name, arg, defaults)
    is_switch = type(defaults[name]) in (bool, type(None))
    if not equals and (not is_switch or following.lower() in YES + NO):
        fail(f'{arg}: a value is missing, write --{name}={following or "value"}')
    return name, from_text(text if equals else 'true', defaults[name], arg)


def show_changes(explicit, defaults):
    """Prints what differs from the defaults, be it in type alone; of a secret only that it does."""
    changed = {name: value for name, value in explicit.items()
               if value != defaults[name] or type(value) is not type(defaults[name])}
    width = max(map(len, changed), default=0)
    for name, value in changed.items():
        print(f'{name:<{width}} = {"…" if name in SECRETS else repr(value)}')


# --- settings and their values --------------------------------------------------------------------

def find_settings(namespace):
    """{name: (first line, last line)} of the settings in the source of the script whose globals()
    these are."""
    tree = ast.parse(read_source(namespace['__file__']))
    end = min((node.lineno for node in ast.walk(tree) if is_configure(node)), default=math.inf)
    settings = {}
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.lineno >= end:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name) and is_setting(target.id, namespace):
                settings[target.id] = (node.lineno, node.end_lineno)
    return settings


def read_source(path):
    """The text of a Python file: of the encoding that it declares, else UTF-8; or, as Windows'
    editors write, with a byte order mark, UTF-16 too. SyntaxError for bytes that are neither."""
    with open(path, 'rb') as f:
        source = f.read()
    if source.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = 'utf-16'
    else:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    try:
        text = source.decode(encoding)
    except UnicodeDecodeError as error:
        line = source[:error.start].count(b'\n') + 1
        raise SyntaxError(f'not {encoding}, in which Python files are: save it so', (path, line, 0, '')) from None
    return text.replace('\r\n', '\n').replace('\r', '\n')


def is_configure(node):
    """Whether a node of a syntax tree is a call of configure."""
    if not isinstance(node, ast.Call):
        return False
    return getattr(node.func, 'id', getattr(node.func, 'attr', '')) == 'configure'


def is_setting(name, namespace):
    """Whether a global is a setting, by its name and its value."""
    if name != name.lower() or name.startswith('_'):
        return False
    return isinstance(namespace.get(name, ()), (int, float, bool, str, type(None)))


def from_text(text, default, where):
    """The value of a --name=text flag, of the type of the default."""
    if isinstance(default, str):
        return checked(text, default, where)
    if isinstance(default, bool):
        if text.lower() not in YES + NO:
            fail(f'{where}: expected true or false, not {text!r}')
        return text.lower() in YES
    if default is None:         # the type is open: a number if it reads as one, else the text
        if text.lower() == 'none':
            return None
        if text.lower() in YES + NO and not text.isdigit():
            return text.lower() in YES
    for number in (int, float):
        try:
            value = number(text)
            if type(default) is float and value in (math.inf, -math.inf) and 'inf' not in text.lower():
                fail(f'{where}: larger than any number that a computer has')
            return checked(value, default, where)
        except ValueError:
            pass
    return text if default is None else checked(text, default, where)


def checked(value, default, where):
    """`value` as the type of the default, converted where nothing is lost, else refused."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, float) and math.isnan(value):
        fail(f'{where}: nan is not a usable value')
    if isinstance(value, str) and '\0' in value:
        fail(f'{where}: holds a NUL character, which no name or text may')
    if isinstance(value, int) and abs(value) >= 2**63:
        fail(f'{where}: expected a number below 2**63')
    if isinstance(default, bool):
        wanted = 'true or false'
        fits = isinstance(value, bool) or (is_number and value in (0, 1))
    elif isinstance(default, int):
        wanted = 'a whole number'
        fits = is_number and (isinstance(value, int) or value.is_integer())     # inf is not whole
    elif isinstance(default, float):
        wanted = 'a number'
        fits = is_number and (isinstance(value, float) or abs(value) < 1e308)
    elif isinstance(default, str):
        wanted = 'a string'
        fits = isinstance(value, str)
    else:
        return value
    if not fits:
        fail(f'{where}: expected {wanted}, not {value!r}')
    return type(default)(value)


def split_list(text, separator, whole=''):
    r"""The parts of a setting that holds several, 'a,b' → ['a', 'b'], as they stand between the
    separators: spaces stay, and so do parts that are empty.

    A backslash before the separator makes it an ordinary character: r'a\,b' → ['a,b']. What else
    begins with a backslash stays as it is, r'\\' too, for in r'a\\,b' the comma separates. whole: a
    regular expression for what is never cut."""
    pieces = rf'{whole}|\\.|.' if whole else r'\\.|.'
    parts = ['']
    for piece in re.findall(pieces, text, re.DOTALL):
        if piece == separator:
            parts.append('')
        elif piece == '\\' + separator:
            parts[-1] += separator
        else:
            parts[-1] += piece
    return parts


# --- config files ---------------------------------------------------------------------------------

def run_config(path, current, defaults, namespace):
    """Executes one config file and returns what it set, as {name: value}."""
    path = config_path(path, namespace['__file__'])
    if not os.path.isfile(path) or not path.endswith('.py'):
        refuse_config(path, defaults, namespace['__file__'])
    if os.path.getsize(path) > LARGEST_CONFIG:
        fail(f'{path}: too large for a config file, which is some assignments')
    # The settings stand where builtins stand: the file can read them, and what is in `scope` afterwards
    # is exactly what the file assigned.
    scope = {'__file__': path, '__name__': 'config', '__builtins__': {**vars(builtins), **current}}
    try:
        source = read_source(path)
        tree = ast.parse(source, path)
        exec(compile(source, path, 'exec'), scope)
    except SyntaxError as error:
        fail(f'{path}:{error.lineno}: {type(error).__name__}: {error.msg}')
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path] or [1]
        fail(f'{path}:{lines[-1]}: {type(error).__name__}: {error}')

    assigned_at = {node.id: node.lineno for node in ast.walk(tree)
                   if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    values = {}
    for name, value in scope.items():
        if name.startswith('_') or isinstance(value, types.ModuleType) or callable(value):
            continue
        where = f'{path}:{assigned_at[name]}' if name in assigned_at else path
        if name not in defaults:
            refuse_unknown(name, where, defaults)
        values[name] = checked(value, defaults[name], f'{where}: {name}')
    return values


def config_path(path, script):
    """The path of a config file: config/x.py is also found beside the script, if there is none here."""
    beside = os.path.join(os.path.dirname(script), path)
    return beside if is_recipe(path) and not os.path.lexists(path) and os.path.isfile(beside) else path


def is_recipe(path):
    """Whether a path is one of config/, wherever that is."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == 'config'


def refuse_config(path, defaults, script):
    """What stands for a config file on the command line is none."""
    if path.partition('=')[0].replace('-', '_') in defaults:
        fail(f'{path}: is it a setting? write --{path}')
    trouble = 'a config file ends in .py'
    if not os.path.exists(path):
        folder = os.path.dirname(os.path.abspath(script))
        trouble = 'no such config file'
        if is_recipe(path) and folder != os.getcwd():
            trouble += f', neither here nor in {folder}'
    if os.path.exists(path) and not os.path.isfile(path):
        trouble = 'a folder, no config file' if os.path.isdir(path) else 'no ordinary file'
    fail(f'{path}: {trouble}{nearest_config(path, script)}')


def nearest_config(path, script):
    """', did you mean config/x.py?' with the nearest file in config/ here or beside the script; ''
    if there is none."""
    configs = set()
    for folder in ('config', os.path.join(os.path.dirname(script), 'config')):
        if os.path.isdir(folder):
            configs.update(name for name in os.listdir(folder) if name.endswith('.py'))
    wanted = os.path.basename(path)
    if not wanted.endswith('.py'):
        wanted += '.py'
    near = difflib.get_close_matches(wanted, sorted(configs), n=1, cutoff=0)
    return f', did you mean {os.path.join("config", near[0])}?' if near else ''


# --- --help ---------------------------------------------------------------------------------------

class Comment(NamedTuple):
    """A comment of a script."""
    column: int
    text: str           # without its #
    alone: bool         # nothing else stands on its line


class HelpRow(NamedTuple):
    """What --help says of a setting."""
    heading: str        # of the group that begins with it, or ''
    name: str
    value: str
    comment: str


class Setting(NamedTuple):
    """A setting of a script that is not run."""
    heading: str        # of its group
    name: str
    default: object
    comment: str


def settings_of(path):
    """[Setting, …] of a script, in its order. Nothing of it is executed."""
    namespace = {'__file__': path}
    for node in ast.parse(read_source(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                namespace[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:              # it is computed, so it is no setting
                pass
    settings = []
    heading = ''
    for row in help_rows(namespace, namespace):
        heading = row.heading or heading
        settings.append(Setting(heading, row.name, namespace[row.name], row.comment))
    return settings


def comments_of(path):
    """{line: Comment} of a script."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(read_source(path)).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            alone = token.line.lstrip().startswith('#')
            comments[line] = Comment(column, token.string.strip('# '), alone)
    return comments


def help_rows(namespace, defaults):
    """A HelpRow of each setting, its heading and comment read from the source."""
    comments = comments_of(namespace['__file__'])

    def is_heading(line):
        return line in comments and comments[line].alone and comments[line].column == 0

    def goes_on(line):
        return line in comments and comments[line].alone and comments[line].column > 0

    rows = []
    for name, (first, last) in find_settings(namespace).items():
        above = first
        while is_heading(above - 1):
            above -= 1
        heading = ' '.join(comments[line].text.strip('-=~ ') for line in range(above, first)).strip()
        words = []
        if last in comments:
            words.append(comments[last].text)
            while goes_on(last + 1):            # the comment goes on below, indented
                last += 1
                words.append(comments[last].text)
        rows.append(HelpRow(heading, name, repr(defaults[name]), ' '.join(words)))
    return rows


def show_help(namespace, defaults, positional):
    """Prints the docstring, then every setting under the comment that heads its group, with its own
    comment beside."""
    rows = help_rows(namespace, defaults)
    arguments = {'config': '[config/file.py ...] ', 'inputs': '[file or folder ...] '}.get(positional, '')
    print(typed((namespace.get('__doc__') or '').strip()))
    program = os.path.basename(namespace['__file__'])
    if namespace.get('__package__'):                # it was started by python -m
        program = '-m ' + namespace['__spec__'].name.removesuffix('.__main__')
    print(typed(f'\nusage: python {program} {arguments}[--name=value ...]'))
    name_width = max((len('--' + row.name) for row in rows), default=0)
    value_width = min(24, max((len(row.value) for row in rows), default=0))
    indent = name_width + value_width + 6
    comment_width = shutil.get_terminal_size((200, 24)).columns - indent
    for row in rows:
        if row.heading:
            print(f'\n{row.heading}:')
        lines = textwrap.wrap(row.comment, max(comment_width, 40)) or ['']
        print(f'  {"--" + row.name:<{name_width}}  {row.value:<{value_width}}  {lines[0]}'.rstrip())
        for line in lines[1:]:
            print(' ' * indent + line)
