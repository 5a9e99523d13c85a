"""The numbers of a run for other programs: metrics.jsonl, and where they are wanted TensorBoard's
files and W&B. All three keep to one rule: each step stands there once.

    log = open_log('out', step=500)             # a resumed run: what came after step 500 goes, it will come again
    log(510, loss=3.21, lr=1e-3)                # {"step": 510, "loss": 3.21, "lr": 0.001}

    step 0: a new run  ──► what an earlier one left is set aside, W&B begins a new run
    step n: it goes on ──► metrics.jsonl is cut there, TensorBoard drops what is later, W&B goes on with its run
"""
import atexit
import glob
import json
import math
import os
import secrets

from mambino import files
from mambino.configurator import fail
from mambino.plain import parse_json
from mambino.train.processes import say

RUN_FILE = 'wandb_id'           # in out_dir: which run of W&B it is


def open_log(folder, step=0, tensorboard=False, wandb=None):
    """Returns log(step, **numbers), which appends a line of JSON to metrics.jsonl; lines after
    `step` go.

    wandb: a dict of the arguments of wandb.init. What is not there ends the program in a line, what
    fails later does not."""
    path = os.path.join(folder, 'metrics.jsonl')
    if os.path.isdir(path):
        fail(f'{path}: is a folder, and the log of a run is a file of this name: move it away')
    if not step:
        set_aside_events(folder)
    keep_lines(path, step)
    # unbuffered: a kill loses nothing, and nothing is left to write at the end
    file = open(path, 'ab', buffering=0)
    sinks = {path: lambda step, values: file.write((json.dumps(dict(step=step, **values)) + '\n').encode())}
    try:
        if tensorboard:
            sinks['TensorBoard'] = tensorboard_sink(folder, step)
        if wandb:
            sinks['W&B'] = wandb_sink(folder, step, wandb)
    except ImportError as error:
        fail(f'{error.name} is not installed: pip install {error.name}, or leave out --tensorboard and --wandb_log')

    def log(step, **values):
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        for name, write in list(sinks.items()):
            try:
                write(step, values)
            except OSError as error:
                print(f'warning: {name} cannot be written to ({error.strerror or error}); training goes on', flush=True)
            except Exception as error:          # of a library that is not needed to train
                print(f'warning: {name} takes no more ({type(error).__name__}: {error}); training goes on without it',
                      flush=True)
                del sinks[name]

    return log


def no_log(step, **values):
    """The log of all processes but the first."""


# --- metrics.jsonl --------------------------------------------------------------------------------

def logged_step(line):
    """The step of a line of metrics.jsonl; None if it tells none: a kill or a full disk cut it
    short, or something has damaged it."""
    try:
        step = parse_json(line)['step']
    except (ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int and step >= 0 else None


def keep_lines(path, last_step):
    """Leaves of a log the lines up to a step; an empty one, if there was none. Says how many were
    damaged: they go."""
    lines = []
    if last_step and os.path.exists(path):
        with open(path, 'rb') as f:
            lines = f.read().split(b'\n')
    steps = [logged_step(line) for line in lines]
    damaged = [i + 1 for i, line in enumerate(lines) if line.strip() and steps[i] is None]
    kept = [line + b'\n' for line, step in zip(lines, steps) if step is not None and step <= last_step]
    if damaged:
        more = f', and so are {len(damaged) - 1} more,' if len(damaged) > 1 else ''
        say(f'note: {path}: line {damaged[0]} is damaged or cut short{more} and left out')
    with files.whole(path) as f:
        f.write(b''.join(kept))


# --- TensorBoard ----------------------------------------------------------------------------------

def set_aside_events(folder):
    """Gives the files of TensorBoard that an earlier run left names under which it does not look, and
    makes W&B begin a new run."""
    for path in glob.glob(os.path.join(glob.escape(folder), 'events.out.tfevents.*')):
        name = os.path.basename(path).replace('tfevents', 'earlier')
        os.replace(path, os.path.join(folder, name + '.old'))
    path = os.path.join(folder, RUN_FILE)
    if os.path.exists(path):
        os.replace(path, path + '.old')


def tensorboard_sink(folder, step):
    """write(step, values) to a file of TensorBoard's, which forgets what earlier ones say of later steps."""
    from torch.utils.tensorboard import SummaryWriter
    board = SummaryWriter(folder, purge_step=step + 1)
    atexit.register(board.close)                # it writes what it has gathered

    def write(step, values):
        for name, value in values.items():
            if value is not None:
                board.add_scalar(name, value, step)
    return write


# --- W&B ------------------------------------------------------------------------------------------

def wandb_sink(folder, step, arguments):
    """write(step, values) to W&B: to a run of its own, which a resumed run goes on with. What W&B does
    not like ends the program in a line."""
    import wandb
    path = os.path.join(folder, RUN_FILE)
    run_id = ''
    if step and os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            run_id = f.read(100).strip()
    if not (run_id.isascii() and run_id.isalnum()):
        run_id = secrets.token_hex(4)
    try:
        run = wandb.init(**arguments, id=run_id, resume='allow', allow_val_change=True)
    except Exception as error:                  # it has many: not logged in, no network
        fail(f'wandb: {error}; set it up, or leave out --wandb_log')
    with files.whole(path) as f:
        f.write(f'{run_id}\n'.encode())
    return lambda step, values: run.log(values, step=step)
