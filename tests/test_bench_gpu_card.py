"""Parts of the first hour on a pretended card: that they run there, and find what is planted."""
import json
import time

import pytest
import torch
from helpers.card import pretended
from helpers.card_process import on_card

from mambino.bench.gpu import check, generate, kernel_checks, machine_facts, models, outcome, profiles, waits
from mambino.kernels.registry import KERNELS


def recorded(tmp_path, part, *args):
    """What a function of a part records."""
    recorder = outcome.Recorder('x', str(tmp_path / 'x.jsonl'), time.monotonic() + 300)
    part(recorder, *args)
    return [json.loads(line) for line in (tmp_path / 'x.jsonl').read_text().splitlines()]


@on_card
@pytest.mark.parametrize('name, dtype', [('gpt', 'bfloat16'), ('mamba-2', 'float32'), ('gpt, experts', 'float16')])
def test_check(tmp_path, name, dtype):
    with pretended():
        row, = recorded(tmp_path, check.check, name, name, dtype, 'cuda', {})
    assert row['passed'], row


@on_card
def test_a_wait_is_found(tmp_path):
    plain = torch.nn.utils.clip_grad_norm_
    with pretended():
        right, = recorded(tmp_path, waits.check, 'gpt', 'gpt', 'bfloat16', 'cuda')
        assert right['passed'], right
        torch.nn.utils.clip_grad_norm_ = lambda *args: plain(*args).item()
        with pytest.raises(RuntimeError, match='sync'):
            recorded(tmp_path, waits.check, 'gpt', 'gpt', 'bfloat16', 'cuda')


@on_card
def test_kernels(tmp_path):
    """Those that the card's own paths have, where nothing is compiled."""
    with pretended():
        for operation, kernel in (('selective_scan', 'anywhere'), ('ssd', 'anywhere'), ('rms_norm', 'anywhere')):
            function = kernel_checks.kernel_in(kernel, operation)
            assert function in KERNELS[operation]
            *_, row = recorded(tmp_path, kernel_checks.check_kernel, operation, operation, function,
                               torch.float32, 'cuda')
            assert row['passed'], row


@on_card
def test_facts(tmp_path):
    for name in ('measure_products', 'measure_copies'):         # of a card's sizes: minutes on a CPU
        setattr(machine_facts, name, lambda *args: None)
    with pretended(name='NVIDIA H100', gigabytes=80):
        rows = recorded(tmp_path, machine_facts.run, 'cuda', str(tmp_path))
    named = {row['name']: row['text'] for row in rows}
    assert 'NVIDIA H100, 80.0 GiB' in named['card']


@on_card
def test_a_recipe_is_planned_for_its_card(tmp_path):
    """And has, in three steps of the planned micro-batch, a peak near the estimate. (Near: a norm of
    this card's is several operations, which keep their results; on a real one it is a kernel.)"""
    with pretended(gigabytes=80, inner='meta'):
        row, = recorded(tmp_path, profiles.measure, 'gpt, 8 GB', 'gpt', 8, 'cuda')
    figures = row['figures']
    assert figures['peak'] == pytest.approx(figures['estimate'], rel=0.3), row
    assert figures['estimate'] < figures['limit'] < 8 * 2**30
    assert row['passed'] == (abs(figures['peak'] / figures['estimate'] - 1) <= profiles.TOLERANCE)


@on_card
@pytest.mark.parametrize('kind', ['gpt', 'mamba'])
def test_generation(tmp_path, kind):
    """Reading, writing by graphs and prompts of several lengths, of a small model."""
    kind_of, config = models.MIDDLE_MODELS[kind]
    small = kind_of, config | models.tiny(kind) | dict(vocab_size=256)
    models.MIDDLE_MODELS = {kind: small}                        # in this process alone
    generate.PROMPTS, generate.NEW = (8,), 2
    generate.measure_transformers = lambda *args: None
    with pretended():
        rows = recorded(tmp_path, generate.run, 'cuda', str(tmp_path))
    assert len(rows) == 4 and not [row for row in rows if row['passed'] is False], rows
