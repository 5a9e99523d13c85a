"""Small models of every kind, trained for some steps and asked for some tokens, on any device: what
they give on a pretended card must be what a CPU gives.

    assert_as_on_a_cpu('gpt', dtype='bfloat16')
"""
import collections
from dataclasses import dataclass, field

import torch

from helpers.card import pretended
from mambino import machine
from mambino.kernels import checked, fused
from mambino.train import building
from mambino.weights import adapters, checkpoint

V, T = 64, 40
SIZE = dict(vocab_size=V, n_layer=2, n_embd=32, block_size=64)
ONE = dict(SIZE, n_layer=1)
SSM = dict(state_size=8, ssm_head_dim=8, chunk_size=16)   # 8 heads, so that strides are what kernels ask for
MODELS = {
    'gpt': ('gpt', dict(SIZE, n_head=2, qk_norm=True)),
    'gqa': ('gpt', dict(SIZE, n_head=2, n_kv_head=1, tie_embeddings=False)),
    'window-flex': ('gpt', dict(SIZE, n_head=2, window=12)),
    'window-banded': ('gpt', dict(SIZE, n_head=2, window=24)),          # more than half of T
    'dropout': ('gpt', dict(SIZE, n_head=2, dropout=0.1)),
    'experts': ('gpt', dict(SIZE, n_head=2, n_expert=4, n_expert_active=2)),
    'experts-unlimited': ('gpt', dict(ONE, n_head=2, n_expert=4, n_expert_active=2, capacity_factor=0)),
    'mamba1': ('mamba', dict(ONE, version=1, state_size=4)),
    'mamba2': ('mamba', dict(SIZE, state_size=8, head_dim=8, chunk_size=16)),
    'mamba2-groups': ('mamba', dict(ONE, state_size=8, head_dim=8, chunk_size=16, n_groups=2)),
    'mamba3': ('mamba', dict(SIZE, version=3, state_size=8, head_dim=8, chunk_size=16, intermediate_size=16)),
    'mamba3-mimo': ('mamba', dict(ONE, version=3, state_size=8, head_dim=8, chunk_size=16, n_groups=2, mimo_rank=2,
                                  head_norm=True)),
    'hybrid': ('hybrid', dict(SIZE, n_head=2, window=12, **SSM)),
    'hybrid-parallel': ('hybrid', dict(ONE, n_head=2, window=24, layout='parallel', **SSM)),
    'hybrid-low-rank': ('hybrid', dict(ONE, n_head=2, window=12, low_rank=8, **SSM)),
    'hybrid-full': ('hybrid', dict(ONE, n_head=2, window=0, gate=False, branch_norm=False, **SSM)),
}
LORA = dict(type='lora', targets='', rank=4, alpha=8.0, dropout=0.0)
PREFIX = dict(type='prefix', length=8)
STEPS = 3
PROMPT = 30             # tokens at once; then three by one, and the rest at once


@dataclass
class Result:
    """losses: of STEPS steps. logits: (B, V) after each step of generation. waits: of the card."""
    losses: list = field(default_factory=list)
    logits: list = field(default_factory=list)
    training_waits: dict = field(default_factory=dict)
    generation_waits: dict = field(default_factory=dict)
    kernels: collections.Counter = None     # of training
    token_launches: int = 0


def build(name, adapter=None, checkpointing=False):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    net = checkpoint.build(kind, config)
    if adapter:
        adapters.add_adapter(net, adapter)
    net.gradient_checkpointing = checkpointing
    return net


def run(name, device, dtype='float32', optimizer='adamw', checkpointing=False, adapter=None, card=None):
    net = build(name, adapter, checkpointing)
    idx = torch.randint(V, (2, T))
    targets = torch.randint(V, (2, T))
    targets[0, :3] = -1
    net.to(device)
    idx, targets = idx.to(device), targets.to(device)
    result = Result()
    train(net, idx, targets, device, dtype, optimizer, result, card)
    generate(net.eval(), idx, device, dtype, result, card)
    result.losses, result.logits = ([u.float().cpu() for u in each] for each in (result.losses, result.logits))
    return result


def train(net, idx, targets, device, dtype, optimizer, result, card):
    """Steps as train.py makes them."""
    optimizers = building.build_optimizers(net, optimizer, dtype=dtype)
    scaler = torch.amp.GradScaler(device, enabled=dtype == 'float16', init_scale=2.0**10)
    net.train()
    if card:
        if not net.gradient_checkpointing:          # else the first step must do
            with machine.autocast(device, dtype):
                net(idx, targets)                   # what is tried once is tried
        card.reset()
    for step in range(STEPS):
        torch.manual_seed(step)
        with machine.autocast(device, dtype):
            loss = net(idx, targets)[1]
        scaler.scale(loss).backward()
        for opt in optimizers:
            scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in optimizers:
            scaler.step(opt)
        scaler.update()
        net.zero_grad(set_to_none=True)
        result.losses.append(loss.detach())
    if card:
        result.training_waits, result.kernels = dict(card.waits), card.kernels


def generate(net, idx, device, dtype, result, card):
    """A prompt, tokens one by one, and the rest."""
    if card:
        card.reset()
    cuts = [0, PROMPT, PROMPT + 1, PROMPT + 2, PROMPT + 3, T]
    state = None
    with machine.autocast(device, dtype):
        for begin, end in zip(cuts, cuts[1:]):
            before = card.launches if card else 0
            logits, state = net.step(idx[:, begin:end], state, last=True)
            result.logits.append(logits[:, -1])
            if card and end == begin + 1:
                result.token_launches = card.launches - before
    if card:
        result.generation_waits = dict(card.waits)


# --- against a CPU --------------------------------------------------------------------------------

# By what losses may differ from a CPU's in fp32, and logits as a share of their largest. In 16 bits a router may send
# a token elsewhere, so that its logits are others. Muon rounds to bf16 in any precision.
LOSS = {'float32': 1e-6, 'bfloat16': 1e-3, 'float16': 1e-3, 'muon': 1e-4}
LOGITS = {'float32': 2e-5, 'bfloat16': 0.05, 'float16': 0.03, 'muon': 1e-3}


def assert_as_on_a_cpu(name, dtype='float32', capability=(8, 6), compiles=True, may_wait=(), prepare=None,
                       notes=(), **options):
    """Losses and logits are a CPU's; products are of the precision; the host waits in training at
    places that begin so, alone; of others' kernels those are left out that are named in notes.
    prepare: is called with the card."""
    expected = run(name, 'cpu', **options)
    with pretended(capability=capability, compiles=compiles) as card:
        if prepare:
            prepare(card)
        result = run(name, 'cuda', dtype, card=card, **options)
        left_out = [*checked.notes.values(), *fused.fused('cuda')[1]]
    precision = 'muon' if options.get('optimizer') == 'muon' else dtype
    for a, b in zip(expected.losses, result.losses, strict=True):
        assert abs(a - b) <= LOSS[precision] * max(1, a), f'a loss of {b} instead of {a}'
    if dtype == 'float32' or 'experts' not in name:
        for a, b in zip(expected.logits, result.logits, strict=True):
            error = (a - b).abs().max() / a.abs().max()
            assert error <= LOGITS[precision], f'logits differ by {error:.1e} of the largest'
    if dtype != 'float32':
        assert set(card.products) >= {dtype}, f'no product in 16 bits: {card.products}'
    assert len(left_out) == len(notes) and all(map(str.startswith, sorted(left_out), sorted(notes))), left_out
    waits = {place: n for place, n in result.training_waits.items() if not place.startswith(tuple(may_wait))}
    assert not waits, f'the host waits for the card in a training step: {waits}'
    return result
