"""How far a run is, and what keeps it: its counters and its clock, its checkpoints, and what ends
it early.

    progress = Progress()                       # step 0; begin.restore gives that of a run that goes on
    clock = Clock(progress)                     # counts progress.seconds
    save_run(['out/ckpt.pt'], net, optimizers, scaler, progress, settings, tokenizer)
"""
import math
import os
import shlex
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch

from mambino.configurator import fail
from mambino.train import processes
from mambino.train.processes import say, summed
from mambino.weights import adapters, checkpoint

# Settings of the call, not of the run: a checkpoint does not keep them. Who goes on by hand must
# say those of the machine again.
OF_THE_CALL = ('out_dir', 'init_from', 'eval_only')
OF_THE_MACHINE = (
    'device', 'compile', 'profile', 'vram', 'tensorboard', 'wandb_log', 'wandb_project',
    'wandb_run_name', 'parallel')


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
        self.has_other_best = False     # best.pt is of losses that cannot be compared

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
        self.best_loss = min(self.best_loss, loss)
        self.bad_evals = 0 if improved else self.bad_evals + 1
        self.evaluated = self.step
        self.history.append(dict(step=self.step, lr=lr, **result))
        return improved


class Clock:
    """Counts progress.seconds: the time that steps take, without what is done between them."""

    def __init__(self, progress, device_type):
        self.progress, self.device_type = progress, device_type
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
        self.read()
        yield
        self.read_at = time.perf_counter()


def save_run(paths, net, optimizers, scaler, progress, settings, tokenizer, adapter=None,
             data=None, shards=()):
    """Writes the run as it is to each path; with FSDP to those of `shards` in shards. A disk that
    is full does not stop the training.

    settings: all of train.py's. adapter: what adapters.begin_adapter returned. data: of
    identity.record. Returns whether all was saved."""
    parameter_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
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
            torch=str(torch.__version__), seconds=progress.seconds,
            time=time.strftime('%Y-%m-%d %H:%M:%S')))
    if adapter:
        contents['adapter'] = adapter
    trained = adapters.AdapterState(net, adapter) if adapter else net
    for path in paths:
        try:
            if progress.has_other_best and os.path.basename(path) == 'best.pt':
                processes.agreed(lambda path=path: processes.RANK or checkpoint.set_aside(path))
                progress.has_other_best = False
            processes.save(path, contents, trained, optimizers, path in shards)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            say(f'warning: {path} could not be saved ({reason}); the one before it is untouched')
            return False
    progress.saved = progress.step
    return True


# --- ends that come early -------------------------------------------------------------------------

def catch_stop_signals():
    """A list that will hold the signals that ask for a stop. The first asks for one after this
    step, a second one stops at once; torchrun hands on more than one."""
    received = []

    def receive(number, _):
        received.append(number)
        if processes.WORLD == 1:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received


def command_to_go_on(out_dir, explicit):
    """The command line that resumes a run. explicit: the settings that were said for this one."""
    again = [f' --{name}={shlex.quote(str(explicit[name]))}' for name in OF_THE_MACHINE if name in explicit]
    launcher = 'python' if processes.WORLD == 1 else f'torchrun --nproc_per_node={processes.WORLD}'
    return f'{launcher} train.py --init_from=resume --out_dir={shlex.quote(out_dir)}' + ''.join(again)


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
        checkpoint = 'no checkpoint was made yet'
        if os.path.exists(latest):
            checkpoint = f'the last good checkpoint is {latest}, of step {progress.saved}'
        fail('the loss or its gradient is not a finite number any more '
             f'at step {progress.step}; {checkpoint}. Try a lower --learning_rate, '
             'a longer --warmup_iters, or --dtype=float32')
