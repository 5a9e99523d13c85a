"""
Overrides the settings of a script from config files and the command line.

    python train.py config/shakespeare.py --batch_size=8     # a file of assignments, then flags: the later one wins
    python train.py --help                                   # every setting, its value, and why it is there

A script's settings are the plain lower-case globals in its source above the line that calls configure(globals()).
Their values are numbers, strings, bools or None. Each argument is taken in order:

    config/x.py        is executed; it sees the current settings, and what it assigns must be settings
    --name=value       is converted to the type of the default; a string is taken as it stands, never evaluated
    --name             turns a bool on

What goes wrong ends the program with one line and exit status 2. What differs from the defaults is printed, and
nothing else.
"""
import ast
import builtins
import difflib
import math
import os
import shutil
import sys
import textwrap
import tokenize
import traceback
import types

YES, NO = ('true', '1', 'yes', 'on'), ('false', '0', 'no', 'off')

def fail(message):
    """One line to stderr and exit status 2: for everything that a user can cause."""
    print('error: ' + ' '.join(str(message).split('\n')), file=sys.stderr)
    raise SystemExit(2)

def require(namespace, wanted):
    """Ends the program at the first setting in `namespace` that is not as it must be. wanted: {what: {name: whether it is}}."""
    for what, settings in wanted.items():
        for name, ok in settings.items():
            if not ok:
                fail(f'{name}={namespace[name]} must be {what}')

def configure(namespace, positional='config', argv=None):
    """
    Overrides the settings in `namespace`, the globals() of the calling script, in place. positional='config': arguments
    without -- are config files; positional='inputs': they are appended to the script's list `inputs`; None: refused.
    Returns {name: value} of what files and flags set explicitly, be it to the default value.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a character must not end a run of hours
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    defaults = {name: namespace[name] for name in find_settings(namespace)}
    if '--help' in argv or '-h' in argv:
        show_help(namespace, defaults, positional)
        raise SystemExit(0)

    explicit = {}
    for i, arg in enumerate(argv):
        if arg.startswith('-') and arg != '-':
            name, equals, text = arg.lstrip('-').partition('=')  # only the first = splits
            name = name.replace('-', '_')
            if not arg.startswith('--') or not name:
                fail(f'{arg}: settings are written --name=value, see --help')
            if name not in defaults:
                unknown(name, arg, defaults)
            following = argv[i + 1] if i + 1 < len(argv) else ''
            if not equals and (type(defaults[name]) is not bool or following.lower() in YES + NO):
                fail(f'{arg}: a value is missing, write --{name}={following or "value"}')
            explicit[name] = from_text(text if equals else 'true', defaults[name], arg)
        elif positional == 'inputs':
            namespace['inputs'].append(arg)
        elif positional == 'config':
            explicit.update(run_config(arg, {**defaults, **explicit}, defaults, namespace))
        else:
            fail(f'{arg}: unexpected argument, settings are written --name=value')

    namespace.update(explicit)
    changed = {k: v for k, v in explicit.items() if v != defaults[k] or type(v) is not type(defaults[k])}
    if os.environ.get('RANK', '0') == '0':
        width = max(map(len, changed), default=0)
        for name, value in changed.items():
            print(f'{name:<{width}} = {value!r}')
    return explicit

def find_settings(namespace):
    """{name: (first line, last line)} of the settings in the source of the script whose globals() these are."""
    with open(namespace['__file__'], 'rb') as f:
        tree = ast.parse(f.read())
    calls = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call)
             and getattr(node.func, 'id', getattr(node.func, 'attr', '')) == 'configure']
    settings = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.lineno < min(calls, default=math.inf):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in [target.id for target in targets if isinstance(target, ast.Name)]:
                if name == name.lower() and not name.startswith('_') and \
                        isinstance(namespace.get(name, ()), (int, float, bool, str, type(None))):
                    settings[name] = (node.lineno, node.end_lineno)
    return settings

def unknown(name, where, known):
    """No such setting: say which known name is nearest."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)
    fail(f"{where}: unknown setting '{name}'" + (f' (did you mean --{near[0]}?)' if near else ''))

def from_text(text, default, where):
    """The value of a --name=text flag, of the type of the default."""
    if isinstance(default, str):
        return text
    if default is None:  # the type is open: a number if it reads as one, else the text
        if text.lower() == 'none':
            return None
        if text.lower() in ('true', 'false'):
            return text.lower() == 'true'
    if isinstance(default, bool):
        if text.lower() not in YES + NO:
            fail(f'{where}: expected true or false, not {text!r}')
        return text.lower() in YES
    for number in (int, float):
        try:
            return checked(number(text), default, where)
        except ValueError:
            pass
    return text if default is None else checked(text, default, where)

def checked(value, default, where):
    """`value` as the type of the default, converted where nothing is lost, else refused."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and isinstance(value, float) and math.isnan(value):
        fail(f'{where}: nan is not a usable value')
    if isinstance(default, bool):
        ok, want = isinstance(value, bool) or (number and value in (0, 1)), 'true or false'
    elif isinstance(default, int):
        ok, want = number and (isinstance(value, int) or value.is_integer()), 'a whole number'  # inf is not whole
    elif isinstance(default, float):
        ok, want = number and (isinstance(value, float) or abs(value) < 1e308), 'a number'
    elif isinstance(default, str):
        ok, want = isinstance(value, str), 'a string'
    else:
        return value
    if not ok:
        fail(f'{where}: expected {want}, not {value!r}')
    return type(default)(value)

def run_config(path, current, defaults, namespace):
    """Executes one config file and returns what it set, as {name: value}."""
    if not os.path.isfile(path) or not path.endswith('.py'):
        if path.partition('=')[0].replace('-', '_') in defaults:
            fail(f'{path}: is it a setting? write --{path}')
        what = 'a config file ends in .py' if os.path.exists(path) else 'no such config file'
        fail(f'{path}: {what}{nearest_config(path, namespace["__file__"])}')
    # The settings stand where builtins stand: the file can read them, and what is in `scope` afterwards is exactly
    # what the file assigned.
    scope = {'__file__': path, '__name__': 'config', '__builtins__': {**vars(builtins), **current}}
    try:
        with open(path, 'rb') as f:
            source = f.read()
        tree = ast.parse(source, path)
        exec(compile(source, path, 'exec'), scope)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        fail(f'{path}:{line}: {type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}')
    lines = {node.id: node.lineno for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    values = {}
    for name, value in scope.items():
        if name.startswith('_') or isinstance(value, types.ModuleType) or callable(value):
            continue
        where = f'{path}:{lines[name]}' if name in lines else path
        if name not in defaults:
            unknown(name, where, defaults)
        values[name] = checked(value, defaults[name], f'{where}: {name}')
    return values

def nearest_config(path, script):
    """', did you mean config/x.py?' with the nearest file in config/ here or beside the script; '' if there is none."""
    found = {}
    for folder in ('config', os.path.join(os.path.dirname(script), 'config')):
        if os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                if name.endswith('.py'):
                    found.setdefault(name, os.path.join(folder, name))
    wanted = os.path.basename(path)
    near = difflib.get_close_matches(wanted if wanted.endswith('.py') else wanted + '.py', found, n=1, cutoff=0)
    return f', did you mean {found[near[0]]}?' if near else ''

def show_help(namespace, defaults, positional):
    """Prints the docstring, then every setting under the comment that heads its group, with its own comment beside."""
    path = namespace['__file__']
    comments, alone = {}, set()  # line -> (column, text); the lines that hold nothing but a comment
    with tokenize.open(path) as f:
        for token in tokenize.generate_tokens(f.readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.start[1], token.string.strip('# ')
                if token.line.lstrip().startswith('#'):
                    alone.add(token.start[0])

    rows = []  # (heading or None, name, value, comment)
    for name, (line, last) in find_settings(namespace).items():
        above = line
        while above - 1 in alone and comments[above - 1][0] == 0:
            above -= 1
        heading = ' '.join(comments[i][1].strip('-=~ ') for i in range(above, line)).strip()
        words = [comments[last][1]] if last in comments else []
        while words and last + 1 in alone and comments[last + 1][0] > 0:  # the comment goes on below, indented
            last += 1
            words.append(comments[last][1])
        rows.append((heading, name, repr(defaults[name]), ' '.join(words)))

    arguments = {'config': '[config/file.py ...] ', 'inputs': '[file or folder ...] '}.get(positional, '')
    print((namespace.get('__doc__') or '').strip())
    print(f'\nusage: python {os.path.basename(path)} {arguments}[--name=value ...]')
    names = max((len(row[1]) for row in rows), default=0) + 2  # + the two dashes
    values = min(24, max((len(row[2]) for row in rows), default=0))
    width = shutil.get_terminal_size((200, 24)).columns - names - values - 6
    for heading, name, value, comment in rows:
        if heading:
            print(f'\n{heading}:')
        lines = textwrap.wrap(comment, max(width, 40)) or ['']
        print(f'  {"--" + name:<{names}}  {value:<{values}}  {lines[0]}'.rstrip())
        for line in lines[1:]:
            print(' ' * (names + values + 6) + line)
