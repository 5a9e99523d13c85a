"""Every model on a pretended card gives what it gives on a CPU, and no training step waits for the card."""
import pytest
from helpers.card import pretended
from helpers.card_models import LORA, MODELS, PREFIX, run
from helpers.card_process import on_card

from mambino.kernels import checked

# By what losses may differ from a CPU's in fp32, and logits as a share of their largest. In 16 bits a router may send
# a token elsewhere, so that its logits are others. Muon rounds to bf16 in any precision.
LOSS = {'float32': 1e-6, 'bfloat16': 1e-3, 'float16': 1e-3, 'muon': 1e-4}
LOGITS = {'float32': 2e-5, 'bfloat16': 0.05, 'float16': 0.01, 'muon': 1e-3}


def assert_as_on_a_cpu(name, dtype='float32', capability=(8, 6), compiles=True, may_wait=(), **options):
    """Losses and logits are a CPU's; products are of the precision; no kernel was left out; the host waits in
    training at places that begin so, alone."""
    expected = run(name, 'cpu', **options)
    with pretended(capability=capability, compiles=compiles) as card:
        result = run(name, 'cuda', dtype, card=card, **options)
    precision = 'muon' if options.get('optimizer') == 'muon' else dtype
    for a, b in zip(expected.losses, result.losses, strict=True):
        assert abs(a - b) <= LOSS[precision] * max(1, a), f'a loss of {b} instead of {a}'
    if dtype == 'float32' or 'experts' not in name:
        for a, b in zip(expected.logits, result.logits, strict=True):
            error = (a - b).abs().max() / a.abs().max()
            assert error <= LOGITS[precision], f'logits differ by {error:.1e} of the largest'
    if dtype != 'float32':
        assert set(card.products) >= {dtype}, f'no product in 16 bits: {card.products}'
    if compiles:
        assert not checked.notes, f'{checked.notes}: going on without'
    waits = {place: n for place, n in result.training_waits.items() if not place.startswith(tuple(may_wait))}
    assert not waits, f'the host waits for the card in a training step: {waits}'
    return result


@on_card
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', MODELS)
def test_a_card_computes_what_a_cpu_does_and_training_never_waits(name, dtype):
    may_wait = ['tolist', '_grouped_mm'] if name == 'experts-unlimited' else []
    assert_as_on_a_cpu(name, dtype, may_wait=may_wait)


@on_card
def test_experts_without_a_limit_wait_for_nothing_where_there_are_grouped_products():
    assert_as_on_a_cpu('experts-unlimited', 'bfloat16', capability=(9, 0))


@on_card
@pytest.mark.parametrize('name', ['gpt', 'experts', 'mamba1', 'mamba2', 'hybrid'])
def test_fp16_with_its_scaler(name):
    assert_as_on_a_cpu(name, 'float16', capability=(7, 5), may_wait=['item() at nowhere'])


@on_card
@pytest.mark.parametrize('name', ['gpt', 'experts', 'mamba1', 'mamba2', 'hybrid'])
def test_muon(name):
    assert_as_on_a_cpu(name, optimizer='muon')


@on_card
@pytest.mark.parametrize('name', ['gpt', 'dropout', 'experts', 'mamba1', 'mamba2', 'hybrid'])
def test_gradient_checkpointing(name):
    """The first step, too, in which kernels are tried."""
    assert_as_on_a_cpu(name, checkpointing=True, may_wait=['item() at mambino/kernels/checked.py'])


@on_card
@pytest.mark.parametrize('name', ['gpt', 'mamba1', 'mamba2', 'hybrid'])
def test_lora(name):
    assert_as_on_a_cpu(name, adapter=LORA)


@on_card
@pytest.mark.parametrize('name', ['gpt', 'mamba1', 'mamba2', 'hybrid'])
def test_prefix(name):
    assert_as_on_a_cpu(name, adapter=PREFIX, may_wait=['copy to the card at mambino/cache.py'])
