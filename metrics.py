"""The log of a run: a line of JSON per event in out_dir/metrics.jsonl, and the same to TensorBoard or W&B if asked.

    log = open_log('out', step=500)             # a resumed run: lines after step 500 go, they will come again
    log(510, loss=3.21, lr=1e-3)                # {"step": 510, "loss": 3.21, "lr": 0.001}
"""
import atexit
import json
import math
import os

from configurator import fail


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
