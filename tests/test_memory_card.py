"""train/memory.py beside what a pretended card takes; what stands for its kernels where a step is counted."""
import pytest
import torch
from helpers.card import pretended
from helpers.card_process import on_card

from mambino import machine
from mambino.kernels import anywhere
from mambino.train import counting, memory, stand_ins
from mambino.train.building import build_optimizers
from mambino.weights import checkpoint

SIZES = dict(n_layer=3, n_embd=512, vocab_size=8192)
CASES = [
    ('gpt', dict(n_head=8, qk_norm=True), 4, 512, False),
    ('gpt', dict(n_head=8), 8, 512, True),
    ('mamba', {}, 2, 512, False),
    ('mamba', {}, 8, 512, True),
    ('hybrid', dict(n_head=8), 2, 512, False),
]


def peak_on(card, kind, config, batch, T, checkpointing):
    """The most bytes that two steps of two micro-steps have there, as train.py makes them."""
    net = checkpoint.build(kind, config).to('cuda')
    net.gradient_checkpointing = checkpointing
    optimizers = build_optimizers(net, 'adamw')
    idx = torch.zeros(batch, T, dtype=torch.long, device='cuda')
    for _ in range(2):
        card.reset()
        with machine.rounded_once('cuda', 'bfloat16'):
            for _ in range(2):
                with machine.autocast('cuda', 'bfloat16'):
                    loss = net(idx, idx)[1]
                loss.backward()
                del loss
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad(set_to_none=True)
    return card.peak_bytes


@on_card
@pytest.mark.parametrize('kind, more, batch, T, checkpointing', CASES)
def test_the_estimate_is_what_a_card_takes(kind, more, batch, T, checkpointing):
    with pretended(gigabytes=24, inner='meta', compiles=False) as card:
        peak = peak_on(card, kind, SIZES | more, batch, T, checkpointing)
        nbytes = anywhere.card_memory()
    anywhere.card_memory = lambda: nbytes               # by which the loss is cut
    total = memory.estimate(kind, SIZES | more, batch, T, checkpointing=checkpointing)['total']
    assert total == pytest.approx(peak, rel=0.15) and peak > 2**28


def total_with(monkeypatch, kind, config, **functions):
    monkeypatch.setattr(stand_ins, 'stand_ins', lambda device: dict(rms_norm=stand_ins.rms_norm) | functions)
    counting.peaks_of.cache_clear()
    return memory.estimate(kind, config, 2, 1024)['total']


def test_a_kernel_that_keeps_less_is_known_to_the_plan(monkeypatch):
    plain = total_with(monkeypatch, 'mamba', SIZES)
    asked = []

    def is_fused(name, kind):
        x = torch.ones(3)                               # with numbers: it is asked of the card itself
        asked.append((name, kind, x.sum().item()))
        return True
    monkeypatch.setattr(stand_ins.triton_kernels, 'has_triton', lambda: False)
    monkeypatch.setattr(stand_ins.fused, 'is_fused', is_fused)
    fused = total_with(monkeypatch, 'mamba', SIZES, mamba2_scan=stand_ins.mamba2_scan)
    assert fused < 0.8 * plain and set(asked) == {('ssd', 'cuda', 3.0)}
    config = SIZES | dict(n_head=8, window=256)
    blocks = total_with(monkeypatch, 'gpt', config)
    flex = total_with(monkeypatch, 'gpt', config, attention=stand_ins.attention)
    assert flex < 0.97 * blocks
    counting.peaks_of.cache_clear()


def test_our_scan_of_a_mamba_1_keeps_less_and_the_plan_knows_it(monkeypatch):
    pytest.importorskip('mambino.kernels.triton_scan', reason='needs Triton', exc_type=ImportError)
    version_1 = SIZES | dict(version=1, n_layer=2)
    plain = total_with(monkeypatch, 'mamba', version_1)
    monkeypatch.setattr(stand_ins.triton_kernels, 'takes_scan', lambda *args: True)
    ours = total_with(monkeypatch, 'mamba', version_1, mamba1_scan=stand_ins.mamba1_scan)
    assert ours < 0.9 * plain
    counting.peaks_of.cache_clear()


def test_stand_ins_stand_only_within(monkeypatch):
    from mambino.kernels.registry import KERNELS
    before = {name: list(kernels) for name, kernels in KERNELS.items()}
    with stand_ins.in_place('cuda'):
        assert KERNELS['rms_norm'][0] is stand_ins.rms_norm
    assert before == KERNELS
    with stand_ins.in_place('cpu'):
        assert before == KERNELS


@on_card
@pytest.mark.parametrize('compiles', [False, True])
def test_windows_are_counted_as_the_card_computes_them(compiles):
    with pretended(compiles=compiles):
        table = stand_ins.stand_ins('cuda')
    assert ('attention' in table) is compiles and (table['rms_norm'] is stand_ins.rms_norm)


@on_card
def test_a_run_is_planned_for_what_the_card_has_free():
    """Tensors of others that are there already are not planned with."""
    with pretended(gigabytes=8):
        before, _ = memory.budget_of('8', 'cuda')
        others = torch.zeros(2**28, device='cuda')          # 1 GiB
        machine.torch.cuda.memory_reserved = lambda device=None: 0
        after, source = memory.budget_of('8', 'cuda')
        assert before - after >= others.nbytes and source.startswith('free')
