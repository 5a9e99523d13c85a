"""Whole runs of train.py, and of nanoGPT's CPU command, by turns: seconds to a val loss, and the
loss on the way there."""
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from statistics import median

from mambino.bench.turns import HERE, all_times, table, take_turns
from mambino.configurator import fail

KINDS = {   # what train.py is given for each of our models
    'gpt': ['--model=gpt'],
    'mamba2': ['--model=mamba'],
    'mamba3': ['--model=mamba', '--version=3'],
    'mamba3_r4': ['--model=mamba', '--version=3', '--mimo_rank=4'],
    'hybrid': ['--model=hybrid'],
}
NANOGPT_RUN = ('config/train_shakespeare_char.py --compile=False --eval_iters=20 --log_interval=100 --block_size=64 '
               '--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 '
               '--dropout=0.0')


def one_run(row, settings):
    """One process, from its start to its end; returns {work: [seconds]}: `loss`, if it was reached,
    and `whole`. Each evaluation is appended to the row's last curve as [seconds, val loss], and its
    loss to `losses`."""
    is_nanogpt = row['name'] == 'nanogpt'
    if is_nanogpt:
        command = ['train.py', *NANOGPT_RUN.split()]
    else:
        command = [os.path.join(HERE, 'train.py'), *shlex.split(settings.time_to_loss_run)]
        command += KINDS[row['name']]
    environment = os.environ | dict(PYTHONUNBUFFERED='1')
    if settings.threads:
        environment['OMP_NUM_THREADS'] = str(settings.threads)
    curve, times, line = [], {}, ''
    row['curves'].append(curve)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out, subprocess.Popen(
            [sys.executable, *command, f'--out_dir={out}', f'--device={settings.device}'],
            cwd=settings.nanogpt if is_nanogpt else None, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding='utf-8', errors='replace') as process:
        for line in process.stdout:
            evaluation = re.match(r'step \d+:.*\bval loss ([\d.]+)', line)
            if evaluation:
                seconds, loss = time.perf_counter() - start, float(evaluation[1])
                curve.append([seconds, loss])
                row['losses'].append(loss)
                if loss <= settings.time_to_loss:
                    times.setdefault('loss', [seconds])
        process.wait()
    times['whole'] = [time.perf_counter() - start]
    if process.returncode or not curve:
        row['error'] = line.strip().removeprefix('error: ')
        if not is_nanogpt:
            fail(f'train.py {settings.time_to_loss_run}: {row["error"]}')
    return times


def measure(settings):
    """The rows of all whole runs, shown as a table."""
    names = [name for name in KINDS if name in settings.models.split(',')]
    if settings.nanogpt:
        names.append('nanogpt')
    labels = dict(nanogpt='nanoGPT')
    rows = [dict(section='run', name=name, label=labels.get(name, name), dtype='auto', root=HERE,
                 times=[], losses=[], curves=[]) for name in names]
    take_turns(rows, settings.rounds, lambda row: one_run(row, settings))
    measured = [row for row in rows if 'error' not in row]
    if measured:
        show(measured, settings)
    return rows


def show(rows, settings):
    """The table of whole runs; adds `seconds_to_loss` to the rows, None where a run did not reach
    it."""
    lines = []
    for row in rows:
        whole, reached = all_times(row, 'whole'), all_times(row, 'loss')
        row['seconds_to_loss'] = median(reached) if len(reached) == len(whole) else None
        to_loss = f'{row["seconds_to_loss"]:.1f}' if row['seconds_to_loss'] else 'not reached'
        spread = f'{min(whole):.1f}–{max(whole):.1f}'
        lines.append([row['label'], '', to_loss, f'{median(whole):.1f}', spread, f'{min(row["losses"]):.4f}'])
    table(f'train.py {settings.time_to_loss_run}: seconds of the process until the val loss was '
          f'{settings.time_to_loss}, and to its end',
          ['model', '', 'to the loss', 'to the end', 'min–max', 'best loss'], lines)
