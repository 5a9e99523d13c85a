"""The section precision: what train.py's --dtype=auto takes on this CPU, and whether it is right.

Of each model, in several widths, whole training steps take turns in float32 and in bfloat16, after
train/precision.py has measured what it chooses by. `of the better` is how fast a run of
--dtype=auto is, against one in the better precision.
"""
import time

import torch

from mambino import machine
from mambino.bench.contenders import ours
from mambino.bench.turns import HERE, progress, table
from mambino.configurator import fail
from mambino.train import precision
from mambino.train.building import build_optimizers


def measure(settings):
    """The section's rows, shown as a table."""
    if settings.device != 'cpu':
        fail(f'--sections=precision is of a CPU: a GPU computes in what its hardware has, and this is '
             f'{settings.device}')
    rows = []
    for width in map(int, settings.widths.split(',')):
        for name in settings.models.split(','):
            progress(f'precision: {name} of width {width}')
            settings.n_embd, settings.n_head = width, max(1, width // 64)
            rows.append(measured(name, settings))
    progress('')
    header = ['model', 'width', *(f'{dtype} ms' for dtype in precision.DTYPES), 'ratio', 'measured', 'in s', 'auto',
              'of the better']
    table(f'training in two precisions: {settings.n_layer} layers, vocabulary {settings.vocab_size}; '
          f'{settings.batch_size}×{settings.block_size} tokens a step; the shortest of {settings.rounds}',
          header, [line_of(row) for row in rows])
    return rows


def measured(name, settings):
    """The row of one model: seconds of a step in each precision, and what train.py chooses."""
    model_class, config = ours(name, settings)
    torch.manual_seed(0)
    net = model_class(config)
    start = time.perf_counter()
    ratio = precision.measure(net, settings.block_size, settings.batch_size)
    seconds = time.perf_counter() - start
    optimizers = build_optimizers(net, 'adamw')
    idx = torch.randint(settings.vocab_size, (settings.batch_size, settings.block_size))
    times = {dtype: [] for dtype in precision.DTYPES}
    for _ in range(1 + settings.rounds):
        for dtype in precision.DTYPES:
            times[dtype].append(machine.timed('cpu', lambda dtype=dtype: step(net, optimizers, idx, dtype)))
    times = {dtype: min(each[1:]) for dtype, each in times.items()}     # the first one wakes libraries
    chosen = precision.faster(ratio)
    return dict(section='precision', name=name, label=name, dtype=chosen, root=HERE, times=[],
                width=settings.n_embd, step=times, ratio=times['float32'] / times['bfloat16'],
                measured=ratio, seconds=seconds, of_better=min(times.values()) / times[chosen])


def step(net, optimizers, idx, dtype):
    """A step of training on idx (B, T)."""
    with machine.autocast('cpu', dtype):
        loss = net(idx, idx)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    net.zero_grad(set_to_none=True)


def line_of(row):
    return [row['name'], str(row['width']), *(f'{1e3 * row["step"][dtype]:.0f}' for dtype in precision.DTYPES),
            f'{row["ratio"]:.2f}', f'{row["measured"]:.2f}', f'{row["seconds"]:.2f}', row['dtype'],
            f'{row["of_better"]:.2f}']
