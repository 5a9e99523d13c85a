"""Runs of the scripts as their user starts them, in this process or in one of its own, and what a run left behind."""
import hashlib
import json
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import forks
from mambino import files as whole_files

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TINY = ('--dataset=tiny --n_layer=1 --n_embd=32 --block_size=16 --batch_size=2 --tokens_per_step=64 --max_iters=20 '
        '--eval_interval=5 --log_interval=1 --device=cpu --dtype=float32')
TIMES = {'seconds', 'tokens_per_s', 'mfu', 'memory', 'time'}  # what no two runs have in common
STOPPING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
POSIX = pytest.mark.skipif(os.name != 'posix', reason='POSIX signals and limits')


def script(name, *lines):
    """Runs a script in this process; returns its exit status. Arguments: strings of flags, as on a command line."""
    argv, handlers = sys.argv, {n: signal.getsignal(n) for n in STOPPING}
    sys.argv = [name, *shlex.split(' '.join(lines))]
    try:
        runpy.run_path(os.path.join(ROOT, name), run_name='__main__')
        return 0
    except SystemExit as end:
        return end.code or 0
    finally:
        whole_files.release()                 # as the end of a process does
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(*lines, status=0):
    """A tiny run, with these flags besides; the later one wins."""
    assert script('train.py', TINY, *lines) == status


def launch(*lines, before='', module='', **options):
    """The same in a process of its own, after the Python statements `before`."""
    code = f'{before}\nimport runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    python = [sys.executable, *(['-m', *module.split()] if module else ['-c', code])]
    command = [*python, os.path.join(ROOT, 'train.py'), *shlex.split(' '.join((TINY, *lines)))]
    env = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'PYTHONIOENCODING': 'utf-8'}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8',
                            env=env, **options)


def forked(*lines, before='', world=1, joined=False):
    """The same in one or more processes, to their end. joined: as torchrun starts them. before: they know `rank`.
    Returns (exit statuses, what they said: [out, err] of the first, and so on)."""
    if not forks.can_fork:
        assert world == 1 and not joined
        process = launch(*lines, before=before)
        said = process.communicate()
        return [process.returncode], list(said)
    argv = shlex.split(' '.join((TINY, *lines)))
    if not joined:
        return forks.run('train.py', os.getcwd(), argv, before, world=world)
    # where they meet, as torchrun's do
    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    return forks.run('train.py', os.getcwd(), argv, before, world=world, port=store.port)


def at_a_call(action, lines, calls=0):
    """Statements for `before`: action, such as 'os.kill(os.getpid(), 9)', is executed once, when the log has so many
    lines and so many more functions, Python's or C's, were called in the main thread."""
    return f'''
import os, signal, sys
from mambino.train import log as log_file
open_log = log_file.open_log
def opened(*arguments):
    log, lines, calls = open_log(*arguments), [], []
    def happen(frame, event, called):
        if event.endswith('call'):
            calls.append(1)
        if len(calls) > {calls}:
            sys.setprofile(None)
            {action}
    def logged(*step, **values):
        log(*step, **values)
        lines.append(1)
        if len(lines) == {lines}:
            sys.setprofile(happen)
    return logged
log_file.open_log = opened
'''


def wait_for_lines(process, n, log='out/metrics.jsonl'):
    """Until the log of a process has so many lines, or it has ended."""
    while process.poll() is None:
        if os.path.exists(log) and len(open(log).readlines()) >= n:
            return
        time.sleep(0.01)


def metrics(out='out', key=None):
    """The lines of a run's log, without its timings; or {step: value} of one key."""
    with open(f'{out}/metrics.jsonl', encoding='utf-8') as f:
        lines = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]
    return {line['step']: line[key] for line in lines if key in line} if key else lines


def load(path='out/ckpt.pt'):
    return torch.load(path, weights_only=True)


def plain(x):
    """Contents of a checkpoint as something that == compares bit by bit; timings are left out."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items() if k not in TIMES}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def shape_of(x):
    """What a checkpoint is made of, without the values."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.device.type
    if isinstance(x, dict):
        return {k: shape_of(v) for k, v in x.items()}
    return [shape_of(v) for v in x] if isinstance(x, (list, tuple)) else type(x)


def same_run(a, b):
    assert metrics(a) == metrics(b)
    for name in ('ckpt.pt', 'best.pt'):
        assert plain(load(f'{a}/{name}')) == plain(load(f'{b}/{name}'))


def files(folder):
    """{path: content} of all files in a folder, or of a file."""
    paths = [os.path.join(d, f) for d, _, fs in os.walk(folder) for f in fs] or [folder]
    return {path: open(path, 'rb').read() for path in paths if os.path.isfile(path)}


def write_text(path, n=6000, chars='etaoin shrdlu\n.ABC12é€😀', seed=1):
    """Text that has something to learn: words of a small vocabulary, some with characters of several bytes."""
    rng = random.Random(seed)
    words = [''.join(rng.choices(chars, k=rng.randint(1, 6))) for _ in range(60)]
    with open(path, 'w', encoding='utf-8') as f:
        f.write(''.join(rng.choices(words, k=n // 3))[:n] + chars)


def refused(capsys, *words):
    """Exactly one line on stderr, and it says what it should."""
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and err.endswith('\n'), err
    for word in words:
        assert word in err


def cut(path):
    with open(path, 'rb+') as f:
        f.truncate(os.path.getsize(path) * 2 // 3)
