"""Faults planted in the program are found by the pretended card: each in a line of the source, for one process."""
import re
from dataclasses import dataclass, field

import pytest
import torch
from helpers import card_scripts
from helpers.card import pretended
from helpers.card_mutants import faulty_text, plant
from helpers.card_process import on_card


@dataclass
class Fault:
    """old, new: text of a file, and what stands in its place. words: of the error. model, dtype, options: of the run
    that finds it, see helpers/card_models.py."""
    file: str
    old: str
    new: str
    words: str
    model: str = 'gpt'
    dtype: str = 'float32'
    options: dict = field(default_factory=dict)


SAME_DEVICE, WAITS, OTHER_NUMBERS = 'same device', 'waits for the card', 'a loss of|logits differ'
FAULTS = {
    'positions on the CPU': Fault(
        'model_gpt.py', 'torch.arange(idx.shape[1], device=idx.device)', 'torch.arange(idx.shape[1])', SAME_DEVICE),
    'a mask on the CPU': Fault(
        'mambino/kernels/anywhere.py', 'dtype=torch.bool, device=x.device)', 'dtype=torch.bool)', SAME_DEVICE,
        'mamba2'),
    'item() in a model': Fault(
        'mambino/language_model.py', 'x, state, router_losses = self.hidden_states(idx, state)',
        'x, state, router_losses = self.hidden_states(idx + 0 * idx.max().item(), state)', WAITS),
    'a tensor as a bool': Fault(
        'mambino/language_model.py', 'if targets is None:', 'if targets is None or (targets < -1).any():', WAITS),
    'nonzero in the experts': Fault(
        'model_gpt.py', 'weights = weights / weights.sum(', 'experts.nonzero(); weights = weights / weights.sum(',
        WAITS, 'experts'),
    'a boolean index': Fault(
        'mambino/kernels/anywhere.py', 'valid = (targets >= 0)[:, None]',
        'valid = (targets >= 0)[:, None]; targets[targets < 0].sum()', WAITS),
    'tolist in the experts': Fault(
        'model_gpt.py', 'capacity = n\n', 'capacity = n + 0 * counts.tolist()[0]\n', WAITS, 'experts'),
    'a copy that is waited for': Fault(
        'model_gpt.py', 'positions = torch.arange(idx.shape[1], device=idx.device)',
        'positions = torch.arange(idx.shape[1]).to(idx.device)', WAITS),
    'numpy of a tensor of the card': Fault(
        'mambino/kernels/anywhere.py', 'device = x.device.type\n', 'device = x.device.type; targets.numpy()\n',
        'numpy'),
    'an operation of a CPU': Fault(
        'mambino/kernels/anywhere.py', 'device = x.device.type\n',
        'device = x.device.type; torch.histogram(x.detach().float().cpu().to(x.device), 4)\n', 'CUDA'),
    'fp32 times bf16': Fault(
        'mambino/kernels/anywhere.py', 'part = x[i:i + chunk].to(dtype)', 'part = x[i:i + chunk].float()', 'dtype',
        dtype='bfloat16'),
    'attention of two precisions': Fault(
        'mambino/kernels/anywhere.py', 'F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,',
        'F.scaled_dot_product_attention(q.bfloat16() if q.is_cuda else q, k, v, is_causal=causal,', 'dtype'),
    'grouped products of fp32': Fault(
        'mambino/kernels/cuda.py', 'fits = x.dtype == torch.bfloat16 and ', 'fits = ', 'bfloat16', 'experts-unlimited',
        options=dict(capability=(9, 0))),
    'autocast of the CPU': Fault(
        'mambino/machine.py', "torch.autocast(device.partition(':')[0]", "torch.autocast('cpu'", 'in 16 bits',
        dtype='bfloat16'),
    'a window that is one too short': Fault(
        'mambino/kernels/cuda.py', 'block_mask(T, window, q.device)', 'block_mask(T, window - 1, q.device)',
        OTHER_NUMBERS, 'window-flex'),
    'a kernel that does not work': Fault(
        'mambino/kernels/cuda.py', 'leaves = [u.detach().clone()', 'leaves = [u.detach().clone().numpy()',
        'flex_attention does not work here', 'window-flex'),
}


@on_card
@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_of_a_model_is_found(name):
    fault = FAULTS[name]
    plant(fault.file, fault.old, fault.new)
    from helpers.card_models import assert_as_on_a_cpu
    with pytest.raises(BaseException) as caught:                    # noqa: B017, each names its words
        assert_as_on_a_cpu(fault.model, fault.dtype, **fault.options)
    assert re.search(fault.words, str(caught.value)), f'found, but for another reason: {caught.value}'


OF_GENERATION = {
    'a graph that is not told what was drawn': (
        'mambino/sample/graphs.py', re.compile(r'self\.(?:u|given)\.copy_\((\w+), non_blocking=True\)'), r'\1.clone()',
        'other ids'),
    'a graph that is not told the positions': (
        'mambino/sample/graphs.py', 'self.pos.copy_(pos, non_blocking=True)', 'pos.clone()', 'other ids'),
    'a graph that is not told the tokens': (
        'mambino/sample/graphs.py', 'self.idx.copy_(idx, non_blocking=True)', 'idx.clone()', 'other ids'),
    'a wrong sign in what a card alone computes': (
        'mambino/cache.py', '(key <= query))[:, None, None]', '(key >= query))[:, None, None]', 'other ids'),
    'places on the CPU': (
        'mambino/sample/next_token.py', 'u[:, None] * cumulative[:, -1:]', 'u[:, None].cpu() * cumulative[:, -1:]',
        f'{SAME_DEVICE}|capturing'),
    'the rows to go on with, on the CPU': (
        'mambino/sample/generation.py', 'torch.tensor(rows, dtype=torch.long, device=tensor.device)',
        'torch.tensor(rows, dtype=torch.long)', SAME_DEVICE),
}


@on_card
@pytest.mark.parametrize('name', OF_GENERATION)
def test_a_fault_of_generation_is_found(name):
    *where, words = OF_GENERATION[name]
    expected = drawn('cpu')
    plant(*where)
    with pytest.raises(Exception) as caught, pretended():           # noqa: B017
        assert drawn('cuda') == expected, 'other ids'
    assert re.search(words, str(caught.value)), f'found, but for another reason: {caught.value}'


def drawn(device):
    """Ids that a model draws; then one row of two goes on."""
    from helpers.card_models import build

    from mambino.sample.generation import Rows, prefill
    net = build('gpt').eval().to(device)
    rows = Rows(net, 64)
    rows.add([prefill(net, [1, 2, 3])] * 2)
    ids = []
    for step in range(8):
        draw = rows.draw(temperature=0.9, top_p=0.9, generator=[torch.Generator().manual_seed(step)] * len(rows.logits))
        ids.append(draw.tolist())
        rows.advance(draw)
        if step == 5:
            rows.keep([1])
    return ids


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    """A folder with a prepared text."""
    return card_scripts.prepare(tmp_path_factory.mktemp('text'))


@on_card
@pytest.mark.parametrize('old, new', [
    ('total_loss += loss.detach()', 'total_loss += loss.item()'),
    ('scaler.scale(loss).backward()', 'torch.cuda.synchronize() or scaler.scale(loss).backward()'),
])
def test_a_wait_in_the_loop_of_train_is_found(text, tmp_path, old, new):
    card_scripts.begin(text, tmp_path)
    (tmp_path / 'train.py').write_text(faulty_text('train.py', old, new))
    waits = []
    for steps in (2, 4):
        with pretended() as card:
            card_scripts.run(
                str(tmp_path / 'train.py'), card_scripts.TRAIN, card_scripts.MODELS['gpt'],
                f'--max_iters={steps} --out_dir=out{steps} --log_interval=1000 --eval_interval=1000')
            waits.append(card.waits)
    assert (waits[1] - waits[0]).total() >= 4                                # two micro-batches a step
