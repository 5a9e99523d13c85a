"""What a step of training takes in memory, counted on tensors without data.

    peaks = peaks_of(Workload('gpt', config, batch=8, T=1024))     # {part of a step: bytes}

No formula for activations is in here. One step runs on fake tensors, which have sizes and lifetimes
but no data (FakeTensorMode), and every storage that is born or dies is counted: this is the exact
peak of what is alive, whatever the models do. For another device than the CPU they take their paths
in plain PyTorch, and where a GPU's kernel keeps more or less, what stands in for it does, too
(stand_ins.py).
"""
import dataclasses
import weakref
from contextlib import nullcontext
from functools import lru_cache, partial

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambino import machine
from mambino.blocks import with_clean
from mambino.kernels import portable
from mambino.train import stand_ins
from mambino.train.building import build_optimizers
from mambino.weights import adapters, checkpoint

STRETCHES = ('step', 'forward', 'loss', 'head', 'top', 'bottom', 'embedding')


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of training that is simulated."""
    kind: str
    config: tuple               # of the model: (field, value) pairs
    batch: int                  # sequences at once
    T: int                      # tokens in each
    # 'cpu', or another kind: then without the kernels that are compiled for a CPU
    device: str = 'cuda'
    dtype: str = 'bfloat16'
    optimizer: str = 'adamw'
    checkpointing: bool = False
    accumulate: bool = True     # gradients stay from micro-step to micro-step
    adapter: tuple = ()         # (name, value) pairs of what a checkpoint says of one


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages alive, and their peak in each stretch of a step; `stretch` names
    the present one."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.stretch = 'build'
        self.peaks = {}                                     # stretch → bytes
        self.known = set()                                  # the storages that are counted

    def enter(self, stretch, *_):
        self.stretch = stretch
        self.peaks[stretch] = max(self.now, self.peaks.get(stretch, 0))

    def release(self, key, size):
        self.known.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.stretch == 'build' and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # initialisation may ask for a number; no matter which
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.enter(self.stretch)
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self.release, key, size)


def simulate(workload, fake=True):
    """One step of training → {name: bytes}: what stands (weights, gradients, optimizer,
    activations), and a peak a stretch.

    fake: on tensors without data."""
    tensors = fake_tensor.FakeTensorMode() if fake else nullcontext()
    device = workload.device
    kernels = nullcontext() if device == 'cpu' else portable(device)
    stands = stand_ins.in_place(device)                     # asks a card, if there is one
    with kernels, stands, torch.random.fork_rng(devices=[]), tensors, LiveBytes() as live:
        net = build(workload)
        sizes = dict(weights=live.now)
        targets = torch.randint(net.config.vocab_size, (workload.batch, workload.T))
        idx = with_clean(targets, net.config.block_length)
        optimizers = build_optimizers(net, workload.optimizer)

        before = live.now
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        sizes['gradients'] = live.now - before

        before = live.now
        live.enter('step')
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
        sizes['optimizer'] = live.now - before
        if not workload.accumulate:
            net.zero_grad(set_to_none=True)

        last_layer = mark_stretches(net, live)
        before = live.now
        live.enter('forward')
        # on a card rounded weights stay from micro-step to micro-step (machine.rounded_once)
        stays = device == 'cuda' and workload.dtype != 'float32'
        with torch.autocast('cpu', enabled=False) if stays else nullcontext():
            with machine.autocast('cpu', workload.dtype):
                loss = net(idx, targets)[1]
            sizes['activations'] = live.now - before
            live.enter('head')
            loss.backward()
            live.enter('embedding')
    peaks = {name: live.peaks.get(name, 0) for name in STRETCHES}
    peaks['top'] = live.peaks.get(f'backward {last_layer}', 0)
    peaks['bottom'] = live.peaks.get('backward 0', 0)
    return sizes | peaks


def build(workload):
    """The model of a workload, with its adapter."""
    net = checkpoint.build(workload.kind, dict(workload.config))
    if workload.adapter:
        adapters.add_adapter(net, dict(workload.adapter))
    net.gradient_checkpointing = workload.checkpointing
    # attention keeps a seed of its dropout, no mask; but here it would ask
    for module in net.modules():
        # for that number, or take the (T, T) path of a CPU
        if isinstance(getattr(module, 'dropout', None), float):
            module.dropout = 0.0
    return net


def mark_stretches(net, live):
    """Hooks that name the stretches from the first layer's forward to its backward; returns the
    number of the last layer."""
    layers = next(module for name, module in net.named_modules() if name.endswith('layers'))
    last_layer = len(layers) - 1

    def mark(i, layer, args, out):
        """The gradient that reaches a layer's output begins its backward; the one that leaves the
        first ends them all."""
        out = out[0] if isinstance(out, tuple) else out
        if not out.requires_grad or live.stretch not in ('forward', 'loss'):
            return
        out.register_hook(partial(live.enter, f'backward {i}'))
        if i == 0 and args[0].requires_grad:                # not under an adapter
            args[0].register_hook(partial(live.enter, 'embedding'))
        if i == last_layer:
            live.enter('loss')
    for i, layer in enumerate(layers):
        layer.register_forward_hook(partial(mark, i))
    return last_layer


@lru_cache(None)
def peaks_of(workload):
    """`simulate`, once for each workload. A model whose course depends on its data (a router's)
    runs for real."""
    try:
        return simulate(workload, fake=True)
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
        return simulate(workload, fake=False)
