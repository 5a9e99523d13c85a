"""The command `mambino`, which `pip install .` makes: the scripts, from any folder.

    mambino train config/quick.py                       # as python train.py config/quick.py in their own folder
    python -m mambino train                             # the same where bin/ is on no path
    torchrun --nproc_per_node=2 -m mambino train        # … and by several processes

    mambino NAME … ──► NAME.py, as Python itself runs it

In a checkout the scripts are those above mambino/; installed, they and config/ lie in mambino/scripts/. What they
read and write is in the current folder: data/, out/, and a config/ that goes before theirs.
"""
import ast
import difflib
import os
import runpy
import sys

from mambino import __version__, script_path

COMMANDS = ('prepare', 'train', 'sample', 'export', 'serve')


def overview():
    """What `mambino` alone says: of each command the first words of its script."""
    yield 'usage: mambino COMMAND [--name=value ...]'
    yield ''
    for name in COMMANDS:
        with open(script_path(f'{name}.py'), encoding='utf-8') as f:
            opening = ast.get_docstring(ast.parse(f.read()))
        yield f'  {name:<9}{" ".join(opening.partition(".")[0].partition(":")[0].split())}'
    yield ''
    yield 'mambino COMMAND --help says more; mambino --version says which this is'


def main():
    """Runs what the command line asks for."""
    name, *arguments = sys.argv[1:] or ['--help']
    if name in COMMANDS:
        os.environ['MAMBINO_COMMAND'] = 'mambino'   # what messages tell to type
        sys.argv = [script_path(f'{name}.py'), *arguments]
        runpy.run_path(sys.argv[0], run_name='__main__')
        return
    if name in ('--help', '-h', 'help'):
        print('\n'.join(overview()))
        return
    if name == '--version':
        print(f'mambino {__version__}')
        return
    near, = difflib.get_close_matches(name.lower()[:100], COMMANDS, n=1, cutoff=0)
    print(f'error: unknown command {ascii(name)} (did you mean {near}?); mambino alone lists them', file=sys.stderr)
    raise SystemExit(2)


if __name__ == '__main__':
    main()
