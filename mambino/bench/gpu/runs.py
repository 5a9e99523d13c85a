"""Runs of train.py on tokens made here: what the parts `exhausted`, `resume` and `processes`
start."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np

from mambino.bench.gpu.running import ROOT

VOCABULARY = 512
# train.py, where this process may have only a share of the card's memory
LIMITED = ('import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(float(sys.argv.pop(1))); '
           'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")')


def make_dataset(folder, tokens=1 << 20):
    """A dataset of bare files in which the next token mostly follows from the last, so that there
    is something to learn; returns its folder."""
    os.makedirs(folder, exist_ok=True)
    random = np.random.default_rng(0)
    follower = random.permutation(VOCABULARY)
    steps = random.integers(0, 4, tokens)
    ids = np.zeros(tokens, np.int32)
    for i in range(1, tokens):
        ids[i] = (follower[ids[i - 1]] + steps[i]) % VOCABULARY
    ids[:-(tokens // 16)].tofile(os.path.join(folder, 'train.bin'))
    ids[-(tokens // 16):].tofile(os.path.join(folder, 'val.bin'))
    return folder


class Run:
    """A run of train.py: out_dir holds its log, `losses()` what it has noted so far."""

    def __init__(self, out_dir, dataset, device, settings, share=None, launcher=None):
        self.out_dir = out_dir
        named = dict(out_dir=out_dir, dataset=dataset, vocab_size=VOCABULARY, device=device,
                     log_interval=1,
                     eval_iters=8, compile=False, **settings)
        start = launcher or ([sys.executable, '-c', LIMITED,
                              str(share)] if share else [sys.executable])
        self.command = [*start, os.path.join(ROOT, 'train.py'),
                        *(f'--{name}={value}' for name, value in named.items())]

    def start(self):
        os.makedirs(self.out_dir, exist_ok=True)
        with open(self.out_dir + '.log', 'a', encoding='utf-8') as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT,
                                            stdin=subprocess.DEVNULL,
                                            cwd=os.path.dirname(self.out_dir),
                                            env=os.environ | {'PYTHONPATH': ROOT})
        return self

    def finish(self, seconds):
        """Waits for its end; RuntimeError, with what it printed last, if it failed or is not
        done."""
        try:
            status = self.process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f'not done after {seconds:.0f} s: {self.printed()[-300:]}') from None
        if status:
            raise RuntimeError(f'train.py ended with status {status}: {self.printed()[-600:]}')
        return self

    def stop_at(self, step, seconds):
        """SIGTERM when this step is in its log; returns the exit status."""
        end = time.monotonic() + seconds
        def is_early():
            return time.monotonic() < end and max(self.losses(), default=0) < step
        while self.process.poll() is None and is_early():
            time.sleep(0.05)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def printed(self):
        with open(self.out_dir + '.log', encoding='utf-8', errors='replace') as log:
            return log.read()

    def losses(self):
        """{step: training loss} of the log."""
        path = os.path.join(self.out_dir, 'metrics.jsonl')
        if not os.path.exists(path):
            return {}
        with open(path, encoding='utf-8') as f:
            rows = [json.loads(line) for line in f if line.endswith('\n')]
        return {row['step']: row['loss'] for row in rows if 'loss' in row}


def largest_difference(a, b, steps):
    """Of two runs' losses, as a share, over these steps that both have; None if there is no such
    step."""
    both = [step for step in steps if step in a and step in b]
    return max((abs(a[step] / b[step] - 1) for step in both), default=None)
