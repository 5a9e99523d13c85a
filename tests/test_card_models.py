"""Every model on a pretended card gives what it gives on a CPU, and no training step waits for the card."""
import pytest
from helpers.card import pretended
from helpers.card_models import LORA, MODELS, PREFIX, assert_as_on_a_cpu
from helpers.card_process import on_card

from mambino.kernels import cuda


@on_card
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', MODELS)
def test_a_card_computes_what_a_cpu_does_and_training_never_waits(name, dtype):
    may_wait = ['tolist'] if name == 'experts-unlimited' else []
    result = assert_as_on_a_cpu(name, dtype, may_wait=may_wait)
    if name in ('window-flex', 'hybrid', 'hybrid-low-rank'):
        assert result.kernels['flex_attention'] and result.kernels['flex_attention_backward']
    if name in ('gpt', 'gqa', 'experts', 'hybrid-full') and dtype == 'bfloat16':
        assert result.kernels['_scaled_dot_product_flash_attention']


@on_card
def test_experts_without_a_limit_wait_for_nothing_where_there_are_grouped_products():
    result = assert_as_on_a_cpu('experts-unlimited', 'bfloat16', capability=(9, 0))
    assert result.kernels['_grouped_mm']


@on_card
def test_grouped_products_are_tried_as_they_are_used():
    """Outside autocast, too, as where weights have 16 bits to sample with."""
    with pretended(capability=(9, 0)):
        assert cuda.has_grouped_products('cuda', 32, 64)
    with pretended(capability=(8, 9)):
        assert not cuda.has_grouped_products('cuda', 32, 64)


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


@on_card
@pytest.mark.parametrize('name', ['window-flex', 'mamba1', 'hybrid'])
def test_without_a_compiler(name):
    """No Triton, no C compiler, a card that is too old: other kernels, the same numbers."""
    result = assert_as_on_a_cpu(name, compiles=False)
    assert 'flex_attention' not in result.kernels
