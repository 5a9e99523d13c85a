"""The models that are checked and measured, and one training step of them."""
import torch

from mambino import machine
from mambino.train.building import build_optimizers
from mambino.weights import checkpoint

SMALL = dict(vocab_size=256, n_layer=2, n_embd=64, block_size=128)
ATTENDS = dict(n_head=2)
SMALL_MODELS = {    # name: kind, and what it has beside SMALL
    'gpt': ('gpt', ATTENDS | dict(qk_norm=True)),
    'gpt, grouped queries': ('gpt', dict(n_head=4, n_kv_head=2)),
    'gpt, window': ('gpt', ATTENDS | dict(window=32)),
    'gpt, experts': ('gpt', ATTENDS | dict(n_expert=4)),
    'gpt, experts without limit': ('gpt', ATTENDS | dict(n_expert=4, capacity_factor=0.0)),
    'mamba-2': ('mamba', dict(head_dim=32)),
    'mamba-2, two groups': ('mamba', dict(head_dim=32, n_groups=2, state_size=32)),
    'mamba-1': ('mamba', dict(version=1)),
    'hybrid': ('hybrid', ATTENDS | dict(window=32, ssm_head_dim=32)),
    'hybrid, parallel': ('hybrid', ATTENDS | dict(window=32, ssm_head_dim=32, layout='parallel')),
    'hybrid, plain': ('hybrid', ATTENDS | dict(window=0, ssm_head_dim=32, gate=False,
                                               branch_norm=False)),
    'mamba-3': ('mamba', dict(version=3, head_dim=32, state_size=32)),
    'mamba-3, rank 2': ('mamba', dict(version=3, head_dim=32, state_size=32, mimo_rank=2, intermediate_size=64)),
    'hybrid, DeltaNet': ('hybrid', ATTENDS | dict(layers='da', state_size=32, ssm_head_dim=32, window=0)),
    'gpt, holes': ('gpt', ATTENDS | dict(objective='masked')),
    'mamba-2, holes': ('mamba', dict(head_dim=32, objective='masked')),
    'gpt, holes in blocks': ('gpt', ATTENDS | dict(objective='block', block_length=16)),
    'mamba-2, holes in blocks': ('mamba', dict(head_dim=32, objective='block', block_length=16)),
    'hybrid, holes in blocks': ('hybrid', ATTENDS | dict(window=0, ssm_head_dim=32, objective='block',
                                                         block_length=16)),
}
COMPILED = ('gpt, window', 'hybrid', 'hybrid, parallel')  # a card may compile for them, which takes a while
LARGE = dict(vocab_size=16384, block_size=1024)
LARGE_MODELS = {
    'gpt': ('gpt', LARGE | dict(n_layer=20, n_embd=1024, n_head=16, qk_norm=True)),
    'mamba': ('mamba', LARGE | dict(n_layer=36, n_embd=768)),
}
MIDDLE_MODELS = {   # of some 50M parameters, for generation
    'gpt': ('gpt', LARGE | dict(n_layer=13, n_embd=512, n_head=8, qk_norm=True)),
    'mamba': ('mamba', LARGE | dict(n_layer=24, n_embd=512)),
    'hybrid': ('hybrid', LARGE | dict(n_layer=9, n_embd=512, n_head=8)),
}


def quick_first(dtypes):
    """(dtype, name) of each small model in each of these, those that make a card compile last."""
    quick = [name for name in SMALL_MODELS if name not in COMPILED]
    return [(dtype, name) for names in (quick, COMPILED) for dtype in dtypes for name in names]


def tiny(kind):
    """Sizes for a CPU, where only the work of a part is tried out."""
    return dict(n_layer=1, n_embd=64) | ({} if kind == 'mamba' else dict(n_head=2))


def small_model(name, seed=0):
    """One of SMALL_MODELS on the CPU, always with the same weights."""
    kind, config = SMALL_MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return checkpoint.build(kind, SMALL | config)


def on_device(kind, config, device):
    """A model whose weights are drawn on the device itself: soon, for large ones."""
    with torch.device(device):
        torch.manual_seed(0)
        return checkpoint.build(kind, config)


def tokens(B, T, vocab_size, device='cpu', seed=0):
    """(B, T) ids, always the same."""
    drawn = torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
    return drawn.to(device)


def read_by(net, idx):
    """What a model reads of these (B, T) in training: of blocks their clean tokens, too."""
    return torch.cat((idx, idx)) if net.config.objective == 'block' else idx


class Training:
    """A model's training steps without data: `micro_step` is forward and backward, `update` the
    optimizer's."""

    def __init__(self, net, device, dtype, B, T, forward=None):
        self.net = net.train()
        self.forward = net if forward is None else forward     # or net, compiled
        self.device, self.dtype = device, dtype
        self.idx = tokens(B, T, net.config.vocab_size, device)
        self.optimizers = build_optimizers(net, 'adamw', fused=True)

    def micro_step(self):
        with machine.autocast(self.device, self.dtype):
            loss = self.forward(read_by(self.net, self.idx), self.idx)[1]
        loss.backward()
        return loss.detach()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.net.zero_grad(set_to_none=True)


def relative_error(value, expected):
    """The largest difference, as a share of the largest expected value."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float('inf')


def synchronize(device):
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)
