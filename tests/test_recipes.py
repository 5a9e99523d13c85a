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

from mambino import machine
from mambino.kernels import anywhere
from mambino.train import counting, memory
from mambino.train.sizes import SIZES
from mambino.weights import checkpoint
from mambino.weights.fitting import model_of_shapes

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
    if 'version' in settings:
        config['version'] = settings['version']
    if kind == 'gpt':
        config['qk_norm'] = settings['qk_norm']
    return config if kind == 'mamba' else dict(config, n_head=config['n_embd'] // 64)


def test_recipes_are_all_there():
    assert len(FOR_CARDS) == 19 and len(RECIPES) == 28


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
    assert (settings['model'] + str(settings.get('version', '')), settings['vram']) == (kind, gigabytes)
    with torch.device('meta'):
        parameters = checkpoint.build(settings['model'], config_of(settings)).num_params()
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
    # an evaluation, a third of the work a token, takes a tenth of the time of training at most
    assert 100 <= settings['eval_iters'] <= 0.3 * settings['eval_interval'] * tokens / T    # sequences
    assert f'GB: {size["n_layer"]} layers of width {size["n_embd"]}.\n' in text
    assert f'{tokens // T} sequences x {T} tokens = {tokens:,} tokens\n' in text
    assert (
        f'{settings["max_iters"]:,} steps x {tokens:,} tokens = {settings["max_iters"] * tokens / 1e9:.1f} billion'
        in text
    )


def free_on(gigabytes):
    """Bytes that a card sold as of so many GB has free: its driver shows less, and a context, libraries
    and a desktop have a part."""
    return int((0.965 * gigabytes - 1.0) * GB)


def said_by(name):
    """(sequences at once, whether with checkpointing, GB at the peak, GB free) of a recipe's comments."""
    with open(os.path.join(ROOT, 'config', name), encoding='utf-8') as f:
        text = f.read()
    at_once, = re.findall(r'bf16: (\d+) x \d+ tokens', text)
    peak, checkpointing, free = re.search(
        r'at the peak  ([\d.]+) GB (with|without) gradient.*\n.*of some ([\d.]+) GB that', text).groups()
    return int(at_once), checkpointing == 'with', float(peak), float(free)


@pytest.mark.parametrize('name', FOR_CARDS)
def test_a_recipe_fits_in_what_its_card_has_free(name):
    *_, peak, free = said_by(name)
    bytes_free = free_on(float(settings_of(name)['vram']))
    assert free == pytest.approx(bytes_free / GB, abs=0.06)
    assert peak <= memory.USABLE_CUDA * (bytes_free - memory.RESERVED) / GB


@pytest.mark.parametrize('name', [name for name in FOR_CARDS if '_8gb' in name] + ['gpt_48gb.py'])
def test_a_recipe_is_planned_as_its_comments_say(monkeypatch, name):
    settings = settings_of(name)
    gigabytes = float(settings['vram'])
    monkeypatch.setattr(machine, 'available_memory', lambda device: free_on(gigabytes))
    monkeypatch.setattr(machine, 'known_peak', lambda device: 50e12)
    monkeypatch.setattr(anywhere, 'card_memory', lambda: int(gigabytes * GB))
    counting.peaks_of.cache_clear()
    settings |= dict(batch_size=0, gradient_checkpointing=None, eval_only=False, dtype='bfloat16', device='cuda',
                     compile=True, expert_parallel=1)
    net = model_of_shapes(settings['model'], config_of(settings))
    (micro_batch, line), seconds = pace.seconds_of(lambda: memory.choose_micro_batch(settings, net))
    at_once, checkpointing, peak, _ = said_by(name)
    assert (micro_batch, settings['gradient_checkpointing']) == (at_once, checkpointing)
    assert float(re.search(r'= ([\d.]+) GB of', line)[1]) == pytest.approx(peak, rel=0.03)
    assert line.endswith('compiled it is less') and seconds < 20


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
