"""What a run says: to its user, a line every few steps; to metrics.jsonl, TensorBoard and W&B the
same as numbers; and where its time goes.

    log = open_log('out', step=500)             # a resumed run: lines after step 500 go, they will come again
    log(510, loss=3.21, lr=1e-3)                # {"step": 510, "loss": 3.21, "lr": 0.001}
    report = Report(log, progress, …)           # the lines on the screen, and in the log
    report.step(loss=3.21, lr=1e-3, …)
"""
import atexit
import datetime
import json
import math
import os
import shutil
import sys

import torch

from mambino import files, kernels, machine
from mambino.configurator import fail
from mambino.train import processes
from mambino.train.processes import say
from mambino.weights import adapters

# --- the log --------------------------------------------------------------------------------------

def logged_step(line):
    """The step of a line of metrics.jsonl; infinite if a kill or a full disk cut it short."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return math.inf


def open_log(folder, step=0, tensorboard=False, wandb=None):
    """Returns log(step, **numbers), which appends a line of JSON to metrics.jsonl; lines after
    `step` go.

    wandb: a dict of the arguments of wandb.init. What is not there ends the program in a line, a
    disk that fills up later does not."""
    path = os.path.join(folder, 'metrics.jsonl')
    keep_lines(path, step)
    # unbuffered: a kill loses nothing, and nothing is left to write at the end
    file = open(path, 'ab', buffering=0)
    board = wandb_run = None
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(folder, purge_step=step or None)
            atexit.register(board.close)        # it writes what it has gathered
        if wandb:
            import wandb as weights_and_biases
            wandb_run = weights_and_biases.init(**wandb)
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
        if wandb_run:
            wandb_run.log(values, step=step)

    return log


def no_log(step, **values):
    """The log of all processes but the first."""


def keep_lines(path, last_step):
    """Leaves of a log the lines up to a step; an empty one, if there was none."""
    lines = []
    if last_step and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            lines = [line for line in f if logged_step(line) <= last_step]
    with files.whole(path) as f:
        f.write(''.join(lines).encode())


# --- the lines a person reads ---------------------------------------------------------------------

class StatusLine:
    """On a terminal one line that changes; elsewhere each on a line of its own."""

    def __init__(self):
        self.columns = 0                        # of a terminal
        if sys.stdout.isatty():
            self.columns = shutil.get_terminal_size((140, 24)).columns - 1

    def show(self, line):
        """Shows a line in the place of the last one."""
        if self.columns:
            say('\r' + line[:self.columns].ljust(self.columns), end='')
        else:
            say(line)

    def end(self):
        """Leaves the last line as it is: what comes begins below."""
        if self.columns:
            say()


class Report:
    """What a run says while it trains: to its user, and to the log.

    epoch_tokens: of the train split. flops: of a token. peak_flops: a second, of all processes
    together."""

    def __init__(self, log, status, progress, max_iters, tokens_per_step, epoch_tokens, flops, peak_flops, device):
        self.log, self.status, self.progress = log, status, progress
        self.max_iters, self.tokens_per_step = max_iters, tokens_per_step
        self.epoch_tokens = epoch_tokens
        self.flops, self.peak_flops, self.device = flops, peak_flops, device
        self.last_step, self.last_seconds = progress.step, progress.seconds     # of the last line

    def step(self, loss, lr, grad_norm, expert_load):
        """A step, and how fast those since the last line were. expert_load: further values for the
        log."""
        progress = self.progress
        seconds = max(progress.seconds - self.last_seconds, 1e-9)
        rate = (progress.step - self.last_step) * self.tokens_per_step / seconds
        self.last_step, self.last_seconds = progress.step, progress.seconds
        values = dict(
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=rate,
            mfu=rate * self.flops / self.peak_flops,
            memory=machine.memory_used(self.device, peak=self.device.startswith('cuda')) or 0,
            epoch=progress.tokens_seen / self.epoch_tokens,
            tokens=progress.tokens_seen,
            seconds=progress.seconds)
        self.status.show(self.line(values))
        self.log(progress.step, **values, **(expert_load or {}))

    def line(self, values):
        """The line for a step; values: as in the log."""
        step, rate, memory = self.progress.step, values['tokens_per_s'], values['memory']
        seconds_left = (self.max_iters - step) * self.tokens_per_step / rate
        parts = [
            f'step {step:>6}/{self.max_iters}',
            f'loss {values["loss"]:.4f}',
            f'lr {values["lr"]:.2e}',
            f'norm {values["grad_norm"]:6.2f}',
            f'{rate:>9,.0f} tok/s',
            f'MFU {values["mfu"]:4.0%}',
            f'{memory / 2**30:.1f} GB' if memory else '',
            f'epoch {values["epoch"]:.2f}',
            f'left {datetime.timedelta(seconds=round(seconds_left))}',
        ]
        return ' | '.join(part for part in parts if part)

    def evaluation(self, result, improved, drawn):
        """What `evaluate` found. drawn: {name: share} of a mixture's datasets so far; {} without
        one."""
        step = self.progress.step
        self.log(step, **result, **{f'drawn/{name}': share for name, share in drawn.items()})
        values = {name.replace('_', ' '): value for name, value in result.items() if value is not None}
        line = f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in values.items())
        self.status.end()
        say(line + (' (best)' if improved else ''))
        if drawn:
            say('drawn: ' + '  '.join(f'{name} {share:.1%}' for name, share in drawn.items()))


def introduction(settings, net, data, adapter, micro_batch, memory_line, progress):
    """Lines that say what a run is: its model, data and steps.

    settings: all of train.py's. adapter: what adapters.begin_adapter returned, or None.
    memory_line: of memory.choose_micro_batch."""
    T, tokens_per_step = settings['block_size'], settings['tokens_per_step']
    max_iters, device, world = settings['max_iters'], settings['device'], processes.WORLD
    train_tokens, val_tokens = data.tokens['train'], data.tokens['val']
    micro_steps = tokens_per_step // T // world // micro_batch
    yield (f'{settings["model"]}: {net.num_params() / 1e6:.2f}M parameters, '
           f'{net.config.n_layer} layers of width {net.config.n_embd}, context {T}')
    if adapter:
        yield adapters.describe_adapter(net, adapter)
    else:
        yield from parameter_lines(net)
    yield f'{data.name}: {train_tokens:,} tokens to train on, {val_tokens:,} to evaluate, vocabulary {data.vocab_size}'
    yield (f'{max_iters} steps of {tokens_per_step:,} tokens ({world} x {micro_steps} x {micro_batch} x {T}), '
           f'{max_iters * tokens_per_step / train_tokens:.1f} epochs; {device}, {settings["dtype"]}, '
           f'{settings["optimizer"]}, {kernels.describe_kernels(device.partition(":")[0])}')
    if memory_line:
        yield memory_line
    steps_left = max(0, max_iters - progress.step)
    yield from data.mixture_lines((progress.tokens_seen + steps_left * tokens_per_step) // T, T, settings['seed'])


def parameter_lines(net):
    """Where a model's parameters are: a line for each part of a layer, all layers together, and for
    what stands alone."""
    sizes = {}
    for name, p in net.named_parameters():                  # tied weights come once
        words = name.split('.')
        part = words[-2]
        if 'layers' in words:
            at = words.index('layers')
            n_layer = len(net.get_submodule('.'.join(words[:at + 1])))
            part = f'{words[at + 2]}, {n_layer} layers'
        sizes[part] = sizes.get(part, 0) + p.numel()
    total = sum(sizes.values())
    width = max(8, *map(len, sizes))
    large = {part: size for part, size in sizes.items() if size >= 0.001 * total}
    rows = sorted(large.items(), key=lambda item: -item[1])
    rest = total - sum(large.values())                      # norms and the like
    if rest:
        rows.append(('the rest', rest))
    for part, size in rows:
        yield f'  {part:<{width}}  {size / 1e6:8.3f}M  {size / total:6.1%}'


# --- where the time goes --------------------------------------------------------------------------

class Trace:
    """Where the time of so many steps goes: says it once they are over, and writes a file for
    Perfetto. 0 steps: nothing."""
    WARM_UP = 3  # steps that are not like the rest: allocations, first calls
    MARKS = ('data', 'forward', 'backward', 'optimizer')  # what train.py calls the parts of a step

    def __init__(self, path, steps, device_type):
        self.path, self.steps, self.on_gpu = path, steps, device_type == 'cuda'
        self.done = 0                                       # steps so far
        self.profiler = None
        if steps:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.on_gpu:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, record_shapes=False)

    def step(self):
        """Counts a step that was made."""
        if self.profiler is None:
            return
        self.done += 1
        if self.done == self.WARM_UP:
            self.profiler.start()
        if self.done == self.WARM_UP + self.steps:
            self.end()

    def end(self):
        """Says what there is to tell, also where the run ends before its time."""
        if self.profiler is None or self.done < self.WARM_UP:
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        self.profiler.stop()
        profiler, self.profiler = self.profiler, None
        self.steps = min(self.steps, self.done - self.WARM_UP)
        if self.steps:
            for line in self.report(profiler):
                say(line)

    def report(self, profiler):
        """The shares of a step's parts, and the ten operations that take longest; the trace goes to
        a file."""
        rows = {row.key: row for row in profiler.key_averages()}
        parts = {name: rows[name].cpu_time_total for name in self.MARKS if name in rows}
        total = sum(parts.values())
        shares = [f'{name} {time / total:.1%}' for name, time in parts.items()]
        yield f'{self.steps} steps: ' + ', '.join(shares)
        yield f'  {"operation":<50}  share  ms a step  calls a step'
        own_time = 'self_device_time_total' if self.on_gpu else 'self_cpu_time_total'
        times = {name: getattr(row, own_time) for name, row in rows.items() if name not in parts}
        total = sum(times.values())
        for name in sorted(times, key=lambda name: -times[name])[:10]:
            milliseconds, calls = times[name] / 1e3 / self.steps, rows[name].count / self.steps
            yield f'  {name[:50]:<50}  {times[name] / total:5.1%}  {milliseconds:9.2f}  {calls:12.1f}'
        try:
            if os.path.lexists(self.path):      # a link is not written through
                # no error of export_chrome_trace tells that it could not replace it
                os.remove(self.path)
            profiler.export_chrome_trace(self.path)
            yield f'the whole trace: {self.path} (open it in https://ui.perfetto.dev)'
        except (OSError, RuntimeError) as error:
            yield f'warning: {self.path} could not be written: {error}'
