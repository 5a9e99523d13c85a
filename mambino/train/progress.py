"""How far a run is, and what keeps it: its counters and its clock, its checkpoints, and what ends
it early.

    progress = Progress()                       # step 0; begin.restore gives that of a run that goes on
    clock = Clock(progress)                     # counts progress.seconds
    save_run(['out/ckpt.pt'], net, optimizers, scaler, progress, settings, tokenizer)
"""
import math
import os
import secrets
import shlex
import signal
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial

import torch

from mambino import machine
from mambino.configurator import fail, typed
from mambino.files import FULL
from mambino.language_model import whole_shape
from mambino.train import processes
from mambino.train.processes import say, summed
from mambino.train.recovery import checkpoint_line
from mambino.weights import adapters, checkpoint

# Settings of the call, not of the run: a checkpoint does not keep them. Who goes on by hand must
# say those of the machine again.
OF_THE_CALL = ('out_dir', 'init_from', 'eval_only', 'report')
OF_THE_MACHINE = (
    'device', 'compile', 'profile', 'vram', 'tensorboard', 'wandb_log', 'wandb_project',
    'wandb_run_name', 'parallel', 'expert_parallel')
SPACE_SECONDS = 600     # so long a finished model waits for space, if there is none anywhere


def latest_of(out_dir):
    """The path of a run's last checkpoint."""
    return os.path.join(out_dir, 'ckpt.pt')


def best_of(out_dir):
    """The path of a run's checkpoint with the lowest val loss."""
    return os.path.join(out_dir, 'best.pt')


def remembered(settings):
    """Those of train.py's settings that a checkpoint keeps."""
    left_out = OF_THE_CALL + OF_THE_MACHINE
    return {name: value for name, value in settings.items() if name not in left_out}


@dataclass
class Progress:
    """The counters of a run, which a checkpoint keeps."""
    step: int = 0               # steps made
    tokens_seen: int = 0        # by all processes
    best_loss: float = math.inf
    bad_evals: int = 0          # evaluations since that of the best loss
    evaluated: int = -1         # the step of the last evaluation
    seconds: float = 0.0        # of training; evaluations, saves and samples do not count
    history: list = field(default_factory=list)     # a dict for each evaluation

    def __post_init__(self):
        self.saved = self.step or -1    # the step of the last checkpoint; -1: there is none
        # whether best.pt is of losses that cannot be compared: they were compared anew, and there is no best one since
        self.has_other_best = self.evaluated >= 0 and self.best_loss == math.inf
        self.best_before = self.best_loss   # than that of the last evaluation, which may be the best
        self.is_full = False            # whether the last save failed for want of space
        self.tried_at = time.monotonic()    # when a checkpoint was written last, or could not be

    @property
    def counters(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def advance(self, tokens):
        """Counts a step of so many tokens."""
        self.step += 1
        self.tokens_seen += tokens

    def compare_anew(self):
        """From here on losses are measured in another way: none of before counts."""
        self.best_loss = math.inf
        self.bad_evals = 0
        self.has_other_best = True

    def add_evaluation(self, result, lr):
        """Notes what an evaluation found; returns whether it is the best so far."""
        loss = result['val_loss']
        improved = loss < self.best_loss
        self.best_before = self.best_loss
        self.best_loss = min(self.best_loss, loss)
        self.bad_evals = 0 if improved else self.bad_evals + 1
        self.evaluated = self.step
        self.history.append(dict(step=self.step, lr=lr, **result))
        return improved

    def is_due(self, minutes):
        """Whether a checkpoint should be written, the last one being so many minutes old; 0: never.
        The first process decides."""
        seconds = time.monotonic() - self.tried_at
        return processes.RANK == 0 and 0 < 60 * minutes <= seconds


class Clock:
    """Counts progress.seconds: the time that steps take, without what is done between them."""

    def __init__(self, progress, device_type):
        self.progress, self.device_type = progress, device_type
        self.is_paused = False
        self.start()

    def start(self):
        """The time before this does not count."""
        self.read_at = time.perf_counter()

    def read(self):
        """Brings progress.seconds up to now; waits for a GPU to be done with the steps so far."""
        if self.device_type == 'cuda':
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.progress.seconds += now - self.read_at
        self.read_at = now

    @contextmanager
    def paused(self):
        if self.is_paused:
            yield
            return
        self.read()
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False
            self.start()


def save_run(paths, clock, net, optimizers, scaler, progress, settings, tokenizer, adapter=None,
             data=None, begun=None, shards=(), quiet=False):
    """Writes the run as it is to each path, a best.pt first; with FSDP to those of `shards` in
    shards. A disk that is full does not stop the training.

    settings: all of train.py's. adapter: what adapters.begin_adapter returned. data: of
    identity.record. begun: the settings that were named for a run begun anew on purpose. quiet:
    without a word where it cannot be. Returns whether the last of the paths was saved."""
    trained = adapters.AdapterState(net, adapter) if adapter else net
    failed = {}                         # path → reason
    with clock.paused():
        for path in paths:
            try:
                contents = contents_of_run(net, scaler, progress, settings, tokenizer, adapter, data, begun)
                # what goes on is ckpt.pt
                if net.carried is not None and os.path.basename(path) != 'best.pt':
                    contents['carried'] = net.carried.saved()
                if progress.has_other_best and os.path.basename(path) == 'best.pt':
                    processes.agreed(lambda path=path: processes.RANK or checkpoint.set_aside(path))
                    progress.has_other_best = False
                processes.save(path, contents, trained, optimizers, path in shards)
            except (OSError, RuntimeError) as error:
                failed[path] = getattr(error, 'strerror', None) or str(error).splitlines()[0]
                progress.is_full = bool(summed(getattr(error, 'errno', None) in FULL)[0])
                if path != paths[-1]:   # what is not in best.pt is not the best that there is
                    progress.best_loss = progress.best_before
    progress.tried_at = time.monotonic()
    if failed and not quiet:
        say(f'warning: {failed_line(failed)}')
    is_saved = paths[-1] not in failed
    if is_saved:
        progress.saved = progress.step
    return is_saved


def failed_line(failed):
    """What could not be saved, why, and what is there in its place. failed: {path: reason}."""
    there = [path for path in failed if os.path.exists(path)]
    before = 'nothing was saved before'
    if there:
        before = 'the one before it is untouched' if len(failed) == 1 else 'those before are untouched'
    reasons = ', '.join(dict.fromkeys(failed.values()))
    return f'{" and ".join(failed)} could not be saved ({reasons}); {before}'


def contents_of_run(net, scaler, progress, settings, tokenizer, adapter, data, begun):
    """What a checkpoint says beside the weights and the optimizers; see save_run."""
    parameter_bytes = sum(whole_shape(p).numel() * p.element_size() for p in net.parameters())
    contents = dict(
        kind=settings['model'],
        config=checkpoint.config_of(net),
        scaler=scaler.state_dict(),
        rng=torch.get_rng_state(),
        counters=progress.counters,
        settings=remembered(settings),
        data=data,
        tokenizer=tokenizer.state() if tokenizer else None,
        metadata=dict(
            parameters=net.num_params(), parameter_bytes=parameter_bytes,
            step=progress.step, tokens_seen=progress.tokens_seen, best_loss=progress.best_loss,
            recent=progress.history[-20:], device=settings['device'],
            processor=machine.processor_name(), torch=str(torch.__version__), seconds=progress.seconds,
            time=time.strftime('%Y-%m-%d %H:%M:%S')))
    if adapter:
        contents['adapter'] = adapter
    if begun is not None:
        contents['begun'] = begun
    return contents


def save_at_last(save, progress, out_dir, stop_signals=None):
    """Saves a run that ends now, if need be elsewhere, rather than lose it. Returns the path of its
    checkpoint, or ''.

    save: save_run with all but the paths. stop_signals: what catch_stop_signals returned, for a run
    that may wait for space until one comes; None: it may not."""
    latest = latest_of(out_dir)
    if save([latest], quiet=True):
        return latest
    name = os.path.basename(os.path.abspath(out_dir))
    for folder in (tempfile.gettempdir(), os.path.expanduser('~')):
        # a name that nobody can have laid a link at
        path = os.path.join(folder, f'{name}-step{progress.step}-{secrets.token_hex(4)}.pt')
        if save([path], quiet=True):
            return path
    end = time.monotonic() + SPACE_SECONDS
    if progress.is_full and stop_signals is not None:
        say(f'{out_dir}: no space is left for the finished model; it waits {SPACE_SECONDS // 60} '
            'minutes for some to be freed, Ctrl-C gives it up')
        while not summed(bool(stop_signals) or time.monotonic() > end)[0]:
            time.sleep(min(5, SPACE_SECONDS / 10))
            if save([latest], quiet=True):
                return latest
    return ''


# --- ends that come early -------------------------------------------------------------------------

def catch_stop_signals():
    """A list that will hold the signals that ask for a stop. The first asks for one after this
    step, a second one stops at once; torchrun hands on more than one, and a terminal that is closed
    says it more than once."""
    received = []
    closed = getattr(signal, 'SIGHUP', getattr(signal, 'SIGBREAK', None))

    def receive(number, _):
        received.append(number)
        if processes.WORLD == 1 and number != closed:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, closed):
        if number != closed or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, receive)
    return received


def command_to_go_on(out_dir, explicit):
    """The command line that resumes a run. explicit: the settings that were said for this one."""
    again = [f' --{name}={shlex.quote(str(explicit[name]))}' for name in OF_THE_MACHINE if name in explicit]
    launcher = 'python' if processes.WORLD == 1 else f'torchrun --nproc_per_node={processes.WORLD}'
    return typed(f'{launcher} train.py --init_from=resume --out_dir={shlex.quote(out_dir)}' + ''.join(again))


def end_unfinished(out_dir, step, saved_at, explicit, changed, stop_signals):
    """Ends the program after a signal, or where its data has changed, and says how to go on.

    saved_at: the path of the run's checkpoint, or ''. changed: a file of the data that is not what
    it was, or ''."""
    latest = latest_of(out_dir)
    saved = f'saved {saved_at}' if saved_at else 'not saved'
    to_move = f'move {saved_at} to {latest}, then ' if saved_at and saved_at != latest else ''
    if summed(bool(changed) and not stop_signals)[0]:
        name = changed or 'a file of the dataset'
        reason = (f'{name}: was changed, replaced or removed while training; stopped at step {step}, '
                  f'{saved}: {to_move}put it back and run the same command again, '
                  'or train on what is there now in another --out_dir')
        processes.together(partial(fail, reason) if processes.RANK == 0 else bool)
    say(f'stopped at step {step}, {saved}; to go on: {to_move}{command_to_go_on(out_dir, explicit)}')
    # there is none before the first process has saved
    processes.leave(128 + (stop_signals or [signal.SIGTERM])[0])


def require_saved(out_dir, saved_at):
    """Ends the program in a line if a finished model is not where it should be, but elsewhere or
    nowhere ('')."""
    latest = latest_of(out_dir)
    reason = ''
    if not saved_at:
        reason = 'could not be saved; free some space and run the same command again'
    elif saved_at != latest:
        reason = (f'could not be saved there, but in {saved_at}: free some space, move that file to {latest} '
                  'and run the same command again')
    if reason:
        action = partial(fail, f'{out_dir}: the finished model {reason}')
        processes.together(action if processes.RANK == 0 else bool)


class Health:
    """Watches that losses and gradients are finite, without waiting for a GPU at each step."""

    def __init__(self, device, scaler):
        self.sum = torch.zeros((), device=device)  # any bad loss or gradient turns it into nan
        self.scaler = scaler

    def add(self, loss, norm=0.0):
        """Notes a loss, and the norm of its gradient; the scaler of fp16 skips steps of infinite
        gradients itself."""
        self.sum += loss if self.scaler.is_enabled() else loss + norm

    def is_good(self):
        """Whether all was finite so far, in all processes; and in fp16 gradients do not overflow at
        any scale."""
        return math.isfinite(summed(self.sum.item())[0]) and self.scaler.get_scale() >= 1e-3

    def require(self, progress, latest, status):
        """Ends the program in a line that names a good checkpoint, if this one is in bad health."""
        if self.is_good():
            return
        status.end()
        fail('the loss or its gradient is not a finite number any more '
             f'at step {progress.step}; {checkpoint_line(progress, latest)}. Try a lower --learning_rate, '
             'a longer --warmup_iters, or --dtype=float32')
