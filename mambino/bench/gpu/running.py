"""A part of the first hour in a process of its own, with a limit of time."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time

from mambino.bench.gpu import outcome, part

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
POLL = 0.2          # seconds
GRACE = 5           # after a part's limit, before it is killed: its children get SIGTERM first


def command_line(device):
    """What was called, for the report."""
    return shlex.join(['python', '-m', 'mambino.bench.gpu', *sys.argv[1:]])


def require(device):
    """Ends the program in a line where a device does not compute. A process of its own asks it: this
    one takes no memory of a card that is measured."""
    if device != 'cpu':
        ask = 'import sys; from mambino.machine import choose_device; choose_device(sys.argv[1])'
        status = subprocess.run([sys.executable, '-c', ask, device], cwd=ROOT).returncode
        if status:
            raise SystemExit(status)


def run_part(each, seconds, device, out_dir, results):
    """Runs a part, adds what it finds to `results` as it comes, and one more line if it failed."""
    records, log = (os.path.join(os.path.abspath(out_dir),
                                 f'{each.name}.{ending}') for ending in ('jsonl', 'log'))
    if os.path.exists(records):
        os.remove(records)
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, [ROOT, os.environ.get('PYTHONPATH')]))}
    environment.setdefault('TORCHINDUCTOR_CACHE_DIR',
                           os.path.join(os.path.abspath(out_dir), 'inductor'))
    command = [sys.executable, '-m', 'mambino.bench.gpu.part', each.name, each.module, device,
               f'{seconds:.0f}',
               os.path.abspath(out_dir)]
    begun = time.monotonic()
    seen = 0
    with open(log, 'w', encoding='utf-8') as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL,
                                   env=environment, cwd=ROOT, start_new_session=True)
    try:
        while process.poll() is None and time.monotonic() - begun < seconds + GRACE:
            seen = read_new(records, seen, results)
            time.sleep(POLL)
        is_late = process.poll() is None
    finally:
        end_session(process)
    read_new(records, seen, results)
    results.seconds[each.name] = time.monotonic() - begun
    if is_late or process.returncode not in (0, part.LATE):
        why = f'stopped after {seconds:.0f} s' if is_late else f'ended with status {process.returncode}'
        with open(log, encoding='utf-8', errors='replace') as f:
            tail = outcome.last_lines(f.readlines()[-40:])
        results.add(dict(part=each.name, name='the part itself', passed=False,
                         text=f'{why}: {tail}', figures={}))


def read_new(path, seen, results):
    """Adds the lines past the first `seen` bytes; returns the bytes seen now. Half a line waits."""
    if not os.path.exists(path):
        return seen
    with open(path, 'rb') as f:
        f.seek(seen)
        lines = f.read()
    whole = lines[:lines.rfind(b'\n') + 1]
    for line in whole.splitlines():
        results.add(json.loads(line))
    return seen + len(whole)


def end_session(process):
    """Ends a process that was started in a session of its own, and all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
