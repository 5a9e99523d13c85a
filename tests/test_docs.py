"""What README.md and docs/ say exists: settings, files, links, commands' first words."""
import ast
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCS = [name for name in sorted(os.listdir(os.path.join(ROOT, 'docs'))) if name.endswith('.md')]
PAGES = ['README.md', 'data/README.md', *(f'docs/{name}' for name in DOCS)]
SCRIPTS = {name: name for name in ('prepare.py', 'train.py', 'sample.py', 'export.py', 'serve.py')}
SCRIPTS['-m mambino.bench.plot'] = 'mambino/bench/plot.py'  # before the shorter name
SCRIPTS['-m mambino.bench.clients'] = 'mambino/bench/clients.py'
SCRIPTS['-m mambino.bench.gpu'] = 'mambino/bench/gpu/__main__.py'
SCRIPTS['-m mambino.bench.parity'] = 'mambino/bench/parity.py'
SCRIPTS['-m mambino.bench.holes'] = 'mambino/bench/holes.py'
SCRIPTS['-m mambino.bench.evidence'] = 'mambino/bench/evidence/__main__.py'
SCRIPTS['-m mambino.bench'] = 'mambino/bench/__main__.py'
NAMES = '|'.join(map(re.escape, SCRIPTS))


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def settings_of(path):
    """Names that a script or a recipe assigns at its top."""
    names = set()
    for node in ast.parse(read(path)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name) and target.id.islower()}
    return names


def commands(text):
    """(script, its arguments) of every command of ours in a page's blocks and in `…`."""
    text = text.replace('\\\n', ' ')
    blocks = ' \n'.join(re.findall(r'```sh\n(.*?)```', text, re.S) + re.findall(r'`([^`\n]+)`', text))
    for line in blocks.split('\n'):
        command = re.search(rf'(?:python|torchrun .*?) ?({NAMES})\b(.*)', line)
        if command:
            yield command[1], command[2].partition(' #')[0]


@pytest.mark.parametrize('page', PAGES)
def test_settings_exist(page):
    for script, arguments in commands(read(page)):
        if 'train_shakespeare_char.py' in arguments:        # nanoGPT's
            continue
        known = settings_of(SCRIPTS[script])
        unquoted = re.sub(r"'[^']*'", '', arguments)         # what is quoted is another command's
        for name in re.findall(r'--([A-Za-z_]+)', unquoted):
            assert name in known | {'help'}, f'{page}: {script}{arguments}'
        for recipe in re.findall(r'config/\w+\.py', arguments):
            assert os.path.exists(os.path.join(ROOT, recipe)), f'{page}: {recipe}'


@pytest.mark.parametrize('page', PAGES)
def test_settings_in_the_text_exist(page):
    known = set().union(*map(settings_of, SCRIPTS.values()))
    others = {'index-url', 'no-build-isolation', 'no-deps', 'group', 'help',                       # pip's
              'nproc_per_node', 'nnodes', 'rdzv_backend', 'rdzv_endpoint',              # torchrun's
              'eval_iters', 'lr_decay_iters', 'model_args', 'tasks',            # nanoGPT's, lm_eval's
              'cases', 'only', 'keep', 'kills', 'requests',                         # tests/fuzz.py's and others'
              'build-arg', 'rm', 'model'}                                       # docker's, lm_eval's
    for name in re.findall(r'(?<![\w-])--([A-Za-z][\w-]*)', read(page)):
        assert name in known | others, f'{page}: --{name}'


def anchors(page):
    """What GitHub calls the headings of a page."""
    for heading in re.findall(r'^#+ (.*)$', read(page), re.M):
        yield re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', read(page)):
        if link.startswith('http'):
            continue
        path, _, anchor = link.partition('#')
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, path)), f'{page}: {link}'
        assert not anchor or anchor in anchors(path), f'{page}: {link}'


@pytest.mark.parametrize('page', PAGES)
def test_files_in_the_text_exist(page):
    text = read(page).replace('…', '')
    for path in re.findall(r'`((?:mambino|config|docs|tests)/[\w/.]*)`', text):
        path = os.path.join(ROOT, path)
        assert os.path.exists(path) or os.path.exists(f'{path}.py'), f'{page}: {path}'
