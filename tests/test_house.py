"""The house of docs/CONTRIBUTING.md: what stands where, who may import whom, how long files and
lines are."""
import ast
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = {'prepare', 'train', 'sample', 'export', 'serve'}
TOP = {
    'README.md', 'LICENSE', 'run.sh', 'requirements.txt', 'pyproject.toml', 'Dockerfile',
    'model_mamba.py', 'model_gpt.py', 'model_hybrid.py',
    'prepare.py', 'train.py', 'sample.py', 'export.py', 'serve.py',
    'config', 'data', 'docs', 'tests', 'mambino',
}
# A module's floor is that of the longest of these names it begins with. It imports lower floors, and its own folder.
FLOORS = {
    'prepare': 7, 'train': 7, 'sample': 7, 'export': 7, 'serve': 7, 'mambino.bench': 7,
    'mambino.__main__': 7,                          # runs the scripts, imports none
    'mambino.serve': 6,
    'mambino.train': 5, 'mambino.sample': 5, 'mambino.export': 5,
    'mambino.weights': 4,
    'model_hybrid': 3.5, 'model_mamba': 3, 'model_gpt': 3,
    'mambino.prepare': 2.5,                         # knows the tokenizer, and no torch
    'mambino.language_model': 2, 'mambino.cache': 2, 'mambino.machine': 2, 'mambino.tokenizer': 2,
    'mambino.chat': 2.2, 'mambino.templates': 1.2, 'mambino.tokenizer_config': 1,
    'mambino.detokenizer': 1.5, 'mambino.tokenizer_json': 1.2, 'mambino.seams': 1,
    'mambino.standalone': 1.2,
    'mambino.kernels': 1, 'mambino.configurator': 1, 'mambino.console': 1,
    'mambino.files': 0.5,
    'mambino.failures': 2,
    'mambino': 0,                                   # its version, and where its scripts are
}
ALSO = {('mambino.train', 'mambino.sample')}        # samples while training
# These may import each other, in no circle.
ON_ONE_FLOOR = {'mambino.language_model', 'mambino.cache', 'mambino.machine', 'mambino.tokenizer'}


def tracked(*patterns):
    """Paths of the files that git has, or would have, relative to the root."""
    if not os.path.exists(os.path.join(ROOT, '.git')):
        pytest.skip('not a checkout of git')
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '--', *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')
    return [path for path in listed if path and os.path.exists(os.path.join(ROOT, path))]


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def module_of(path):
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def source_modules():
    """{module: its path}, of all that is no test, no recipe and not for pip."""
    return {module_of(path): path for path in tracked('*.py') if not path.startswith(('tests/', 'config/', '.'))}


def imports_of(path, modules):
    """{module: first line} of our modules that a file imports, inside functions too."""
    found = {}
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # modelling files are copied, side by side, to where no package is
            is_copied = node.level == 1 and '/modeling_' in path
            assert node.level == 0 or is_copied, f'{path}:{node.lineno}: a relative import'
            module = f'{module_of(path).rpartition(".")[0]}.{node.module}' if is_copied else node.module
            names = [f'{module}.{alias.name}' for alias in node.names]
            names = [name if name in modules else module for name in names]
        else:
            continue
        for name in names:
            if name in modules:
                found.setdefault(name, node.lineno)
    return found


def room_of(module):
    """The longest name in FLOORS that this module begins with."""
    return max((name for name in FLOORS if f'{module}.'.startswith(f'{name}.')), key=len)


def test_top_level():
    top = {path.split('/')[0] for path in tracked() if not path.startswith('.')}
    assert not ({f'{name} is too much' for name in top - TOP} | {f'{name} is missing' for name in TOP - top})


def test_floors():
    modules = source_modules()
    wrong = set()
    for module, path in modules.items():
        room = room_of(module)
        for other in imports_of(path, modules):
            to = room_of(other)
            is_neighbour = room == to and room not in SCRIPTS or {room, to} <= ON_ONE_FLOOR
            if not is_neighbour and FLOORS[to] >= FLOORS[room] and (room, to) not in ALSO:
                wrong.add(f'{module} imports {other}')
    assert not wrong


def test_no_circle():
    modules = source_modules()
    graph = {module: set(imports_of(path, modules)) - {module} for module, path in modules.items()}
    while free := [module for module, others in graph.items() if not others]:
        for module in free:
            del graph[module]
        for others in graph.values():
            others.difference_update(free)
    importers = {other for others in graph.values() for other in others}
    assert not set(graph) & importers                  # who only imports a circle is not in it


def test_no_script_is_imported():
    modules = source_modules()
    for module, path in modules.items():
        assert not SCRIPTS & set(imports_of(path, modules)), module


def test_recipes_import_nothing():
    wrong = set()
    for path in tracked('config/*.py'):
        for node in ast.walk(ast.parse(read(path))):
            is_call = isinstance(node, ast.Name) and node.id in ('globals', 'exec', '__import__')
            if is_call or isinstance(node, (ast.Import, ast.ImportFrom)):
                wrong.add(path)
    assert not wrong


def test_prepare_knows_no_torch():
    """Nor Jinja, which is needed where there are conversations."""
    code = ('import sys, runpy; runpy.run_path("prepare.py", run_name="prepare"); '
            'print("torch" in sys.modules or "jinja2" in sys.modules)')
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == 'False\n', run.stderr


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'export.py', 'serve.py'])
def test_settings_are_read_before_torch_is_there(script):
    command = [sys.executable, '-X', 'importtime', script, '--no_such_setting=1']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and 'unknown setting' in run.stderr
    modules = {line.rpartition('|')[2].strip() for line in run.stderr.split('\n')}
    assert 'mambino.configurator' in modules and 'torch' not in modules


def test_length_of_files():
    paths = tracked('*.py', '*.cpp', '*.h', '*.sh')
    assert not {path for path in paths if read(path).count('\n') > 450}


def test_length_of_lines():
    too_long, lines, wide = set(), 0, 0
    for path in tracked('*.py', '*.cpp', '*.h', '*.sh'):
        lengths = [len(line) for line in read(path).split('\n')]
        if max(lengths) > 120:
            too_long.add(path)
        lines += len(lengths)
        wide += sum(length > 100 for length in lengths)
    assert not too_long
    assert wide <= 0.05 * lines, f'{wide} of {lines} lines have more than 100 columns'


def test_the_loop_of_train_is_on_one_screen():
    """At most 60 lines of loop, under at most 150 of set-up, which begins below the settings."""
    tree = ast.parse(read('train.py'))
    loop, = [node for node in tree.body if isinstance(node, ast.While)]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    below_settings = min(node.lineno for node in functions)
    assert loop.end_lineno - loop.lineno + 1 <= 60
    assert loop.lineno - below_settings <= 150


def settings_of(path):
    """Names in small letters that a script assigns above the line that calls
    configure(globals())."""
    names = set()
    for node in ast.parse(read(path)).body:
        if 'configure(globals()' in ast.unparse(node):
            break
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name) and target.id.islower()}
    return names


@pytest.mark.parametrize('path', [*(f'{script}.py' for script in sorted(SCRIPTS)), 'mambino/bench/__main__.py'])
def test_a_name_in_a_script_means_one_thing(path):
    """Nothing that a script imports has the name of a setting."""
    imported = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {alias.asname or alias.name.split('.')[0] for alias in node.names}
    assert not imported & settings_of(path)


def test_length_of_the_readme():
    assert read('README.md').count('\n') <= 150
    for name in ('measured', 'recipes', 'export', 'tried', 'CONTRIBUTING', 'CHANGELOG'):
        assert os.path.exists(os.path.join(ROOT, 'docs', f'{name}.md')), name
    assert read('data/README.md').count('\n') <= 16


def test_version():
    import mambino
    assert f'## {mambino.__version__}' in read('docs/CHANGELOG.md')
