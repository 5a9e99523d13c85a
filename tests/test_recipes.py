"""config/: each recipe runs; those for a card of so many gigabytes are of the size they say, and
fit."""
import ast
import os
import re
import runpy

import pytest
import torch
from helpers import pace
from helpers.runs import ROOT, TINY, load, train

from mambino.train.begin import SIZES
from mambino.train.memory import USABLE, estimate
from mambino.weights import checkpoint

GB = 2**30
RECIPES = sorted(name for name in os.listdir(os.path.join(ROOT, 'config')) if name.endswith('.py'))
FOR_CARDS = [name for name in RECIPES if re.fullmatch(r'\w+_\d+gb\.py', name)]
OF_SIZE = {             # 20 tokens a parameter (Hoffmann et al. 2022): 1.0, 3.0 and 7.9 billion
    '50m': dict(tokens_per_step=2**17, learning_rate=1e-3, max_iters=8000),
    '150m': dict(tokens_per_step=2**18, learning_rate=6e-4, max_iters=11500),
    '400m': dict(tokens_per_step=2**19, learning_rate=3e-4, max_iters=15000),
}


def settings_of(name):
    """What a recipe sets."""
    settings = runpy.run_path(os.path.join(ROOT, 'config', name))
    return {key: value for key, value in settings.items() if not key.startswith('_')}


def config_of(settings):
    """The config of its model."""
    kind = settings['model']
    config = dict(
        SIZES[kind, settings['size']], vocab_size=16384, block_size=settings['block_size']
    )
    return config if kind == 'mamba' else dict(config, n_head=config['n_embd'] // 64)


def test_recipes_are_all_there():
    assert len(FOR_CARDS) == 18 and len(RECIPES) == 25


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_numbers(name):
    """Nothing of ours, or of anyone's, is needed to read one; and it calls nothing."""
    with open(os.path.join(ROOT, 'config', name), encoding='utf-8') as f:
        nodes = list(ast.walk(ast.parse(f.read())))
    assert not [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call))]


@pytest.mark.parametrize('name', FOR_CARDS)
def test_recipe_is_of_its_size(name):
    settings = settings_of(name)
    kind, gigabytes = re.fullmatch(r'(\w+)_(\d+)gb\.py', name).groups()
    assert (settings['model'], settings['vram']) == (kind, gigabytes)
    with torch.device('meta'):
        parameters = checkpoint.build(kind, config_of(settings)).num_params()
    assert parameters == pytest.approx(int(settings['size'].removesuffix('m')) * 1e6, rel=0.1)
    assert settings['max_iters'] * settings['tokens_per_step'] == pytest.approx(
        20 * parameters, rel=0.1
    )
    assert settings['tokens_per_step'] % settings['block_size'] == 0


@pytest.mark.parametrize('name', FOR_CARDS)
def test_recipe_agrees_with_its_comments_and_its_size(name):
    settings = settings_of(name)
    with open(os.path.join(ROOT, 'config', name), encoding='utf-8') as f:
        text = f.read()
    size = SIZES[settings['model'], settings['size']]
    expected = OF_SIZE[settings['size']] | dict(warmup_iters=200, eval_interval=500)
    assert {key: settings[key] for key in expected} == expected
    T, tokens = settings['block_size'], settings['tokens_per_step']
    at_once = int(re.search(rf'bf16: (\d+) x {T} tokens', text)[1])
    assert settings['eval_iters'] == 100 * at_once       # sequences
    assert f'GB: {size["n_layer"]} layers of width {size["n_embd"]}.\n' in text
    assert f'{tokens // T} sequences x {T} tokens = {tokens:,} tokens\n' in text
    assert (
        f'{settings["max_iters"]:,} steps x {tokens:,} tokens = {settings["max_iters"] * tokens / 1e9:.1f} billion'
        in text
    )


@pytest.mark.parametrize('name', [name for name in FOR_CARDS if '48' in name])
def test_largest_recipes_fit_and_are_counted_soon(name):
    settings = settings_of(name)
    size = settings['model'], config_of(settings), 1, settings['block_size']
    parts, seconds = pace.seconds_of(lambda: estimate(*size))
    assert seconds < 5
    assert parts['total'] < 0.94 * USABLE * float(settings['vram']) * GB


# --- in a size for a test: what is left of a recipe are its other settings, which must exist and
# fit its model

@pytest.mark.parametrize('name', [name for name in RECIPES if not re.search(r'[1-4].gb', name)])
# of those for cards the 8 GB ones: the others differ in numbers
def test_every_recipe_runs(here, name):
    base = name.startswith('finetune')
    if base:
        train('--n_embd=192 --max_iters=1 --out_dir=base')
    train(
        os.path.join(ROOT, 'config', name),
        TINY,
        '--n_embd=192 --max_iters=2 --out_dir=out',
        '--init_from=base' if base else '',
    )
    assert load()['counters']['step'] == 2


def test_one_recipe_serves_all_models(here):
    # in a file n_head does not disturb a mamba; as a flag it would mean nothing
    for model in ('gpt', 'mamba', 'hybrid'):
        train(
            os.path.join(ROOT, 'config', 'shakespeare_cpu.py'),
            TINY,
            f'--model={model} --n_embd=96 --max_iters=1 --out_dir={model}',
        )
