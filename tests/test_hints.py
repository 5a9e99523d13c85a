"""What a message tells the reader to say exists."""
import ast
import os
import re

import pytest
from helpers.runs import refused, train
from test_house import SCRIPTS, read, settings_of, tracked

# what stands for any of them, and flags of other programs
OF_OTHERS = {
    'help', 'name', 'nproc_per_node', 'long', 'group',
}


def texts_of(path):
    """(line, text) of the strings of a file, what is filled in left out."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_settings_that_are_named_exist():
    known = set(OF_OTHERS)
    for path in [f'{script}.py' for script in SCRIPTS] + tracked('mambino/bench/*.py'):
        known |= settings_of(path)
    for path in tracked('*.css'):                       # the page's colours
        known |= set(re.findall(r'--([a-z][a-z0-9_]+):', read(path)))
    wrong = []
    for path in tracked('*.py'):
        if path.startswith(('tests/', 'mambino/kernels/', 'mambino/bench/')):
            continue
        for line, text in texts_of(path):
            if 'var(--' in text:                        # a style sheet, with colours of its own
                continue
            for name in re.findall(r'(?<![\w-])--([a-z][a-z0-9_]+)(?![\w-])', text):
                if name not in known:
                    wrong.append(f'{path}:{line}: --{name}')
    assert not wrong


def test_what_recipes_name_exists():
    known = settings_of('train.py') | settings_of('prepare.py') | settings_of('sample.py')
    for path in tracked('config/*.py'):
        assert set(re.findall(r'--([a-z][a-z_0-9]+)', read(path))) <= known, path


# --- a line for what is not there, and for what cannot be meant

@pytest.mark.parametrize('flags, words', {
    '--init_from=out-nope': 'init_from=out-nope no-such-folder runs-are-in-out',
    '--dataset=shakespeare_char --out_dir=new': '--tokenizer=char --out=data/shakespeare_char',
    '--dataset=stdlib --out_dir=new': 'python-prepare.py',
    '--out_dir=data': 'out_dir=data datasets',
    '--out_dir=data/tiny': 'is-a-dataset --out_dir=out',
    '--out_dir=data/tiny/run': 'is-in-the-dataset --out_dir=out',
    **{f'--out_dir=new --{flag}': flag.partition('=')[0] for flag in (
        'max_iters=1e18', 'n_embd=4e9', 'tokens_per_step=1e18', 'batch_size=1e18', 'eval_interval=1e18', 'seed=1e18',
        'learning_rate=1e300', 'rope_theta=1e300', 'vram=' + '9' * 400, 'max_iters=' + '9' * 400)},
    **{f'--out_dir=new --model=gpt --{flag}': 'billion GB-are-free --n_layer' for flag in (
        'n_layer=1000000000', 'n_embd=10000000', 'intermediate_size=100000000000',
        'n_expert=100000000')},
    '--out_dir=new --model=mamba --state_size=1000000000000': 'billion',
}.items())
def test_a_line_that_helps(here, capsys, flags, words):
    if 'out-nope' in flags:
        os.makedirs('out')
        open('out/best.pt', 'w').close()
        flags += ' --out_dir=new'
    train(flags, status=2)
    refused(capsys, *(word.replace('-', ' ') if not word.startswith('--') and '=' not in word and word != 'billion'
                      else word for word in words.split()))
    assert not os.path.exists('new') and not os.path.exists('data/tiny/train.lock')
