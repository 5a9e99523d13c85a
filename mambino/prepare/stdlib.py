"""The default corpus: Python's own standard library, some 10 MB of code that people have cared for.

    sources, skipped = stdlib.find_stdlib()

It is there on every machine, and a small model that has learnt from it writes functions, docstrings
and indentation. Left out are its tests, and its tables: encodings, HTML's entities, the build's
variables, pydoc's topics. They are a fifth of the library, and a model would learn to write `'}' #
0x7B`.
"""
import ast
import os
import re
import sysconfig
import warnings

from mambino.prepare.sources import Source

TESTS = {'test', 'tests', 'idle_test', 'testing'}
NOT_STDLIB = TESTS | {'site-packages', 'dist-packages', '__pycache__'}
STATEMENT = re.compile(
    rb'^[ \t]*(?:def|class|return|if|elif|else|for|while|try|except|with|raise|import|from|self)\b', re.M)
CODE = 0.16       # share of lines that begin like a statement: a file with more is code at first sight
TABLE = 0.5       # share of lines that are literals: a file with more is a table
SMALL = 2000      # bytes: what is smaller does no harm
LITERALS = (ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.JoinedStr)
OPERATORS = (ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator, ast.expr_context)


def find_stdlib():
    """The standard library's own .py files, without its tests and tables; as sources.find."""
    paths = []
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = set(folders) - NOT_STDLIB
        paths += [os.path.join(folder, name) for name in files if name.endswith('.py')]
    sources = []
    skipped = []
    for path in sorted(paths, key=os.fsencode):
        if not os.path.isfile(path):
            continue
        if is_table(path):
            skipped.append({'file': path, 'reason': 'a table, not code'})
        else:
            status = os.stat(path)
            sources.append(Source(path, 'code', status.st_size, status.st_mtime_ns))
    return sources, skipped


def is_table(path):
    """Whether most lines of a Python file are literals. Only what does not look like code is
    parsed.
    """
    with open(path, 'rb') as f:
        data = f.read()
    statements = len(STATEMENT.findall(data))
    if len(data) < SMALL or statements > CODE * data.count(b'\n'):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of invalid escapes
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError):
        return False
    lines = {number for number, line in enumerate(data.split(b'\n'), 1) if is_code(line)}
    return len(literal_lines(tree) & lines) > TABLE * len(lines)


def is_code(line):
    """Whether a line, bytes, is more than white space and a comment."""
    return line.strip() != b'' and not line.lstrip().startswith(b'#')


def literal_lines(tree):
    """The numbers of the lines that are part of a literal of several lines, docstrings apart."""
    lines = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if is_literal(node):
            if node.lineno < node.end_lineno:
                lines.update(range(node.lineno, node.end_lineno + 1))
        else:
            waiting += ast.iter_child_nodes(node)
    return lines


def is_literal(node):
    """Whether an expression holds nothing but constants."""
    return isinstance(node, ast.expr) and all(isinstance(part, LITERALS + OPERATORS) for part in ast.walk(node))
