"""What a run says: to its user, a line every few steps, and what is worth knowing about it; the same
as numbers to the log (log.py); and where its time goes.

    journal = Report(log, progress, …)          # the lines on the screen, and in the log
    journal.step(loss=3.21, lr=1e-3, …)
"""
import datetime
import os
import shutil
import sys
import threading
from contextlib import contextmanager

import torch

from mambino import kernels, machine
from mambino.kernels import native
from mambino.kernels.cpu import LANES
from mambino.language_model import whole_shape
from mambino.train import carried, processes
from mambino.train.processes import say
from mambino.weights import adapters

SLOW_STEP = 10      # seconds of a step that is announced
USUAL_MFU = 0.4     # of the speed of matrix products, what a step reaches
MANY_EPOCHS = 20    # passes over a text that are worth a word
RISES = 3           # evaluations without a better loss that are no accident


# --- the lines a person reads ---------------------------------------------------------------------

class StatusLine:
    """On a terminal one line that changes; elsewhere each on a line of its own."""

    def __init__(self):
        self.on_terminal = sys.stdout.isatty()

    def show(self, *lines):
        """Shows a line in the place of the last one. lines: the same, ever shorter: the first that
        fits the terminal is taken."""
        if not self.on_terminal:
            say(lines[0])
            return
        columns = shutil.get_terminal_size((140, 24)).columns - 1   # it may have become another
        line = next((line for line in lines if len(line) <= columns), lines[-1])
        say('\r' + line[:columns].ljust(columns), end='')

    def end(self):
        """Leaves the last line as it is: what comes begins below."""
        if self.on_terminal:
            say()


def in_words(result):
    """[what is said of each value that `evaluate` found]; of a bound, that it is one."""
    is_bound = result.get('val_error') is not None
    relation = '<= ' if is_bound else ''
    words = [f'{name} {relation}{value:.4f}' for name, value in result.items()
             if value is not None and name != 'val_error']
    if is_bound:
        words[0] += f' +- {result["val_error"]:.4f}'
    return words


class Report:
    """What a run says while it trains: to its user, and to the log.

    epoch_tokens: of the train split. flops: of a token. peak_flops: a second, of all processes
    together. remedies: what helps against learning by heart, see `remedies`."""

    def __init__(self, log, status, progress, max_iters, tokens_per_step, epoch_tokens, flops, peak_flops, device,
                 remedies=''):
        self.log, self.status, self.progress = log, status, progress
        self.max_iters, self.tokens_per_step = max_iters, tokens_per_step
        self.epoch_tokens, self.remedies = epoch_tokens, remedies
        self.flops, self.peak_flops, self.device = flops, peak_flops, device
        self.last_step, self.last_seconds = progress.step, progress.seconds     # of the last line
        self.losses = []                # of training, since the last evaluation
        self.loss_at_best = None        # their mean before that of the best val loss
        self.has_warned = False         # of learning by heart
        self.say_if_slow()

    def say_if_slow(self):
        """A step that takes long is announced: nothing else is said until the first one is done."""
        first = self.progress.step
        seconds = self.tokens_per_step * self.flops / (USUAL_MFU * self.peak_flops)
        if seconds >= SLOW_STEP:
            steps = self.max_iters - first
            advice = 'a smaller --size, fewer --tokens_per_step or --max_iters make it shorter'
            if self.device == 'cpu':
                advice = 'config/quick.py is of a size for a CPU; ' + advice
            say(f'a step will take about {duration(seconds)} on this machine, the {steps:,} steps about '
                f'{duration(steps * seconds)}: {advice}')

        def remind():
            if self.progress.step == first and self.last_step == first:
                say(f'(the first step is not done after {SLOW_STEP} seconds)')
        timer = threading.Timer(SLOW_STEP, remind)
        timer.daemon = True
        self.timer = timer
        timer.start()

    def step(self, loss, lr, grad_norm, expert_load):
        """A step, and how fast those since the last line were. expert_load: further values for the
        log."""
        self.timer.cancel()
        self.losses.append(loss)
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
        self.status.show(*self.lines(values))
        self.log(progress.step, **values, **(expert_load or {}))

    def lines(self, values):
        """The line for a step, and shorter ones: step, loss and the time left stay to the last.
        values: as in the log."""
        step, rate, memory = self.progress.step, values['tokens_per_s'], values['memory']
        seconds_left = (self.max_iters - step) * self.tokens_per_step / rate
        parts = dict(
            step=f'step {step:>6}/{self.max_iters}',
            loss=f'loss {values["loss"]:.4f}',
            lr=f'lr {values["lr"]:.2e}',
            norm=f'norm {values["grad_norm"]:6.2f}',
            rate=f'{rate:>9,.0f} tok/s',
            mfu=f'MFU {values["mfu"]:4.0%}',
            memory=f'{memory / 2**30:.1f} GB' if memory else '',
            epoch=f'epoch {values["epoch"]:.2f}',
            left=f'left {clock(seconds_left)}')
        yield joined(parts)
        for name in ('memory', 'mfu', 'norm', 'lr', 'epoch', 'rate'):
            parts[name] = ''
            yield joined(parts)
        parts['step'] = f'{step}/{self.max_iters}'
        yield joined(parts)
        parts['loss'] = f'{values["loss"]:.3f}'
        yield joined(parts)
        yield f'{step} {parts["loss"]} {clock(seconds_left)}'

    def evaluation(self, result, improved, drawn):
        """What `evaluate` found. drawn: {name: share} of a mixture's datasets so far; {} without
        one."""
        step = self.progress.step
        self.log(step, **result, **{f'drawn/{name}': share for name, share in drawn.items()})
        line = f'step {step}: ' + ', '.join(words.replace('_', ' ') for words in in_words(result))
        self.status.end()
        say(line + (' (best)' if improved else ''))
        if drawn:
            say('drawn: ' + '  '.join(f'{name} {share:.1%}' for name, share in drawn.items()))
        self.watch(result['val_loss'], improved)

    def watch(self, val_loss, improved):
        """Says, once, that the model learns its text by heart: the val loss has risen over some
        evaluations while that of training fell."""
        progress = self.progress
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses = []
        if improved or self.loss_at_best is None:
            self.loss_at_best = mean
            return
        rises = progress.bad_evals >= RISES and val_loss > 1.01 * progress.best_loss
        if rises and mean is not None and mean < self.loss_at_best and not self.has_warned:
            self.has_warned = True
            say(f'note: the val loss has risen from {progress.best_loss:.4f} to {val_loss:.4f} while that of training '
                f'falls: the model learns its text by heart; best.pt is the better one. What helps: {self.remedies}')


def remedies(settings):
    """What helps against learning by heart, of what is not done already. settings: all of train.py's."""
    wanted = ['fewer --max_iters', 'more text', 'a smaller model (--n_layer, --n_embd)']
    if not settings['dropout']:
        wanted.insert(0, '--dropout=0.1')
    if not settings['patience']:
        wanted.insert(0, '--patience=3')
    return ', '.join(wanted)


def joined(parts):
    return ' | '.join(part for part in parts.values() if part)


def clock(seconds):
    """h:mm:ss, also of a time that is too long for a date."""
    return str(datetime.timedelta(seconds=round(seconds))) if seconds < 86400 * 10**6 else 'ages'


def duration(seconds):
    """A time for a sentence: '95 seconds', '3 hours'."""
    for unit, size in (('years', 31557600), ('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * size:
            return f'{seconds / size:,.0f} {unit}' if seconds < 1e15 else 'ages'
    return f'{seconds:.0f} seconds'


def introduction(settings, net, data, adapter, micro_batch, memory_line, progress):
    """Lines that say what a run is: its model, data and steps.

    settings: all of train.py's. adapter: what adapters.begin_adapter returned, or None.
    memory_line: of memory.choose_micro_batch."""
    T, tokens_per_step = settings['block_size'], settings['tokens_per_step']
    max_iters, device, world = settings['max_iters'], settings['device'], processes.WORLD
    train_tokens, val_tokens = data.tokens['train'], data.tokens['val']
    micro_steps = tokens_per_step // T // world // micro_batch
    has_state = hasattr(net.config, 'state_size') and getattr(net.config, 'layers', '') != 'a'
    state = f'state {net.config.state_size}, ' if has_state else ''
    yield (f'{settings["model"]}: {net.num_params() / 1e6:.2f}M parameters, '
           f'{net.config.n_layer} layers of width {net.config.n_embd}, {state}context {T}')
    if adapter:
        yield adapters.describe_adapter(net, adapter)
    else:
        yield from parameter_lines(net)
    yield f'{data.name}: {train_tokens:,} tokens to train on, {val_tokens:,} to evaluate, vocabulary {data.vocab_size}'
    yield (f'{max_iters} steps of {tokens_per_step:,} tokens ({world} x {micro_steps} x {micro_batch} x {T}), '
           f'{max_iters * tokens_per_step / train_tokens:.1f} epochs; {device}, {settings["dtype"]}, '
           f'{settings["optimizer"]} at {settings["learning_rate"]:g}, '
           f'{kernels.describe_kernels(device, settings["compile"])}')
    if memory_line:
        yield memory_line
    if device == 'cpu':
        yield from odd_size_lines(net.config)
    steps_left = max(0, max_iters - progress.step)
    sequences = (progress.tokens_seen + steps_left * tokens_per_step) // T
    yield from data.mixture_lines(sequences, T, settings['seed'])
    yield from carried.lines(settings, data)
    if not settings['eval_only']:
        yield from epochs_lines(data.epochs(sequences, T, settings['seed']), settings)


def odd_size_lines(config):
    """A line, if need be, on a state whose size the operations compiled for this CPU do not have."""
    N = getattr(config, 'state_size', 0)
    step = LANES * (2 if getattr(config, 'version', 0) == 3 else 1)
    has_heads = getattr(config, 'version', 1) != 1 and set(getattr(config, 'layers', '') or 'b') != {'a'}
    if has_heads and N % step and native.library() is not None:
        yield (f'note: state_size={N} is no multiple of {step}, as the operations compiled for this CPU need it: '
               f'{-(-N // step) * step} would train several times as fast')


def epochs_lines(epochs, settings):
    """A line, if need be, on what is read very often. epochs: {name of a dataset: passes over it}."""
    name = max(epochs, key=epochs.get)
    if epochs[name] > MANY_EPOCHS and not settings['patience']:     # with it the run ends where that does harm
        yield (f'note: {name} is read {epochs[name]:,.0f} times: a model learns so small a text by heart, and not from '
               f'it. What helps: {remedies(settings)}')


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
        sizes[part] = sizes.get(part, 0) + whole_shape(p).numel()
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
        self.events = []                                    # (part, its begin, its end) on a card
        self.profiler = None
        if steps:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.on_gpu:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, record_shapes=False)

    @contextmanager
    def part(self, name):
        """The part of a step that is computed within. A card does it later: events say when."""
        if self.profiler is None or self.done < self.WARM_UP:
            yield
            return
        with torch.profiler.record_function(name):
            if not self.on_gpu:
                yield
                return
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((name, begin, end))

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

    def parts(self, rows):
        """{part of a step: its time}: on a card, where a launch takes no time, that between its events."""
        if not self.on_gpu:
            return {name: rows[name].cpu_time_total for name in self.MARKS if name in rows}
        times = dict.fromkeys(self.MARKS, 0.0)
        for name, begin, end in self.events:
            times[name] += begin.elapsed_time(end)
        return times

    def report(self, profiler):
        """The shares of a step's parts, and the ten operations that take longest; the trace goes to
        a file."""
        rows = {row.key: row for row in profiler.key_averages()}
        parts = self.parts(rows)
        total = sum(parts.values())
        shares = [f'{name} {time / total:.1%}' for name, time in parts.items()]
        yield f'{self.steps} steps{", on the card" * self.on_gpu}: ' + ', '.join(shares)
        yield f'  {"operation":<50}  share  ms a step  calls a step'
        own_time = 'self_device_time_total' if self.on_gpu else 'self_cpu_time_total'
        times = {name: getattr(row, own_time) for name, row in rows.items() if name not in self.MARKS}
        total = sum(times.values()) or 1
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
