"""The log of a run: a line of JSON per event in out_dir/metrics.jsonl, and the same to TensorBoard or W&B if asked.

    log = open_log('out', step=500)             # a resumed run: lines after step 500 go, they will come again
    log(510, loss=3.21, lr=1e-3)                # {"step": 510, "loss": 3.21, "lr": 0.001}
"""
import atexit
import json
import math
import os

import torch

from mambino.configurator import fail


def logged_step(line):
    """The step of a line of metrics.jsonl; infinite if a kill or a full disk cut it short."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return math.inf


def open_log(folder, step=0, tensorboard=False, wandb=None):
    """Returns log(step, **numbers). wandb: a dict of the arguments of wandb.init. What is not there ends the program in a line,
    a disk that fills up later does not."""
    path, board, run = os.path.join(folder, 'metrics.jsonl'), None, None
    lines = []
    if step and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            lines = [line for line in f if logged_step(line) <= step]
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(lines)
    os.replace(path + '.tmp', path)
    file = open(path, 'ab', buffering=0)        # unbuffered: a kill loses nothing, and nothing is left to write at the end
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(folder, purge_step=step or None)
            atexit.register(board.close)        # it writes what it has gathered
        if wandb:
            import wandb as weights_and_biases
            run = weights_and_biases.init(**wandb)
    except ImportError as error:
        fail(f'{error.name} is not installed: pip install {error.name}, or leave out --tensorboard and --wandb_log')
    except Exception as error:                  # wandb has many: not logged in, no network
        fail(f'wandb: {error}; set it up, or leave out --wandb_log')

    def log(step, **values):
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        try:
            file.write((json.dumps(dict(step=step, **values)) + '\n').encode())
        except OSError as error:
            print(f'warning: {path} cannot be written to ({error.strerror}); training goes on', flush=True)
        for name, value in values.items():
            if board and value is not None:
                board.add_scalar(name, value, step)
        if run:
            run.log(values, step=step)

    return log


def parts_of(net):
    """Lines that say where a model's parameters are: a row for each part of a layer, all layers together, and for what stands alone."""
    sizes = {}
    for name, p in net.named_parameters():                  # tied weights come once
        words = name.split('.')
        at = words.index('layers') if 'layers' in words else None
        part = words[-2] if at is None else f'{words[at + 2]}, {len(net.get_submodule(".".join(words[:at + 1])))} layers'
        sizes[part] = sizes.get(part, 0) + p.numel()
    width, total = max(8, *map(len, sizes)), sum(sizes.values())
    rest = sum(size for size in sizes.values() if size < 0.001 * total)         # norms and the like
    large = sorted(((part, size) for part, size in sizes.items() if size >= 0.001 * total), key=lambda item: -item[1])
    for part, size in large + [('the rest', rest)] * bool(rest):
        yield f'  {part:<{width}}  {size / 1e6:8.3f}M  {size / total:6.1%}'


class Trace:
    """Where the time of some steps goes: `step()` after each step gives lines to print once they are over, and none before."""
    WARM = 3                                                # steps that are not like the rest: allocations, first calls

    def __init__(self, path, steps, device):
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == 'cuda')
        self.path, self.steps, self.device, self.done = path, steps, device, 0
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=False)

    def step(self):
        self.done += 1
        if self.done == self.WARM:
            self.profiler.start()
        return self.end() if self.done == self.WARM + self.steps else []

    def end(self):
        """The lines, also where the run ends before its time; none if they were given, or there is nothing to tell."""
        if self.done < self.WARM or self.profiler is None:
            return []
        if self.device == 'cuda':
            torch.cuda.synchronize()
        self.profiler.stop()
        profiler, self.profiler, self.steps = self.profiler, None, min(self.steps, self.done - self.WARM)
        return self.report(profiler) if self.steps else []

    def report(self, profiler):
        """The shares of a step's parts, and the ten operations that take longest; the trace goes to a file."""
        own = 'self_cpu_time_total' if self.device != 'cuda' else 'self_device_time_total'
        rows = {row.key: row for row in profiler.key_averages()}
        parts = {name: rows[name].cpu_time_total for name in ('data', 'forward', 'backward', 'optimizer') if name in rows}
        yield f'{self.steps} steps: ' + ', '.join(f'{name} {time / sum(parts.values()):.1%}' for name, time in parts.items())
        rows = [row for name, row in rows.items() if name not in parts]
        total = sum(getattr(row, own) for row in rows)
        yield f'  {"operation":<50}  share  ms a step  calls a step'
        for row in sorted(rows, key=lambda row: -getattr(row, own))[:10]:
            yield (f'  {row.key[:50]:<50}  {getattr(row, own) / total:5.1%}  {getattr(row, own) / 1e3 / self.steps:9.2f}  '
                   f'{row.count / self.steps:12.1f}')
        try:
            if os.path.exists(self.path):
                os.remove(self.path)                        # no error of export_chrome_trace tells that it could not replace it
            profiler.export_chrome_trace(self.path)
            yield f'the whole trace: {self.path} (open it in https://ui.perfetto.dev)'
        except (OSError, RuntimeError) as error:
            yield f'warning: {self.path} could not be written: {error}'
