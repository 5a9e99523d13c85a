"""Runs of train.py, each trained once: a table over many of them goes on where it was stopped.

    runs = Runs('evidence', workers=2)
    runs.train({'next 1': ['--dataset=few', '--seed=1'], …})    # those not there yet
    runs.curve('next 1')                                        # [(step, seconds, val loss)]

    folder/data/            datasets
    folder/NAME/            what train.py writes, which goes on by itself: ckpt.pt, best.pt, metrics.jsonl
    folder/results.jsonl    a line for each result: its name, what it was asked with, and what came of it
"""
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from json import dumps, loads
from typing import NamedTuple

import numpy as np

from mambino.bench.turns import HERE
from mambino.configurator import fail
from mambino.tokenizer import load_tokenizer
from mambino.train.curves import read_lines
from mambino.weights import checkpoint, loading


class Point(NamedTuple):
    """An evaluation of a run."""
    step: int
    tokens: float
    epoch: float
    seconds: float              # of training so far
    loss: float
    error: float                # by the draws of a bound


class Results:
    """Lines of JSON that are written as they come; of one name the last counts."""

    def __init__(self, path):
        self.path = path
        self.lines = {}
        if os.path.exists(path):
            with open(path, 'r+', encoding='utf-8') as f:
                text = f.read()
                whole = text[:text.rfind('\n') + 1]             # a killed run's last line may be half of one
                f.seek(len(whole.encode()))
                f.truncate()
            self.lines = {line['name']: line for line in map(loads, whole.splitlines())}

    def of(self, name, asked):
        """The line of this name, if it was asked the same; else None."""
        line = self.lines.get(name)
        return line if line and line['asked'] == asked else None

    def add(self, name, asked, **values):
        line = self.lines[name] = dict(name=name, asked=asked, **values)
        with open(self.path, 'a', encoding='utf-8') as f:
            f.write(dumps(line) + '\n')
        return line


class Runs:
    def __init__(self, folder, workers=1, threads=1, results=''):
        """workers: runs at once, each of so many threads. results: another file for them."""
        self.folder, self.workers, self.threads = folder, workers, threads
        os.makedirs(folder, exist_ok=True)
        self.results = Results(results or os.path.join(folder, 'results.jsonl'))

    def path(self, name):
        return os.path.join(self.folder, name.replace(' ', '-').replace('=', '-').replace(',', ''))

    def script(self, script, words):
        """A script of this project, run in the folder to its end, and what it said; an error ends the program."""
        done = subprocess.run([sys.executable, os.path.join(HERE, script), *words], cwd=self.folder, text=True,
                              capture_output=True, env=os.environ | {'OMP_NUM_THREADS': str(self.threads)})
        if done.returncode:
            fail(f'{script} {shlex.join(words)}: ended with status {done.returncode}: {done.stderr.strip()[-500:]}')
        return done

    # --- data

    def prepare(self, name, inputs, flags):
        """The dataset data/name of these files, unless it is there."""
        if not os.path.exists(os.path.join(self.folder, 'data', name, 'meta.json')):
            self.script('prepare.py', [*map(os.path.abspath, inputs), *flags, f'--out=data/{name}'])

    def tokens(self, dataset, split='val'):
        return np.fromfile(os.path.join(self.folder, 'data', dataset, f'{split}.bin'), dtype=np.int32)

    # --- runs

    def train(self, wanted):
        """Trains {name: flags}, some at once; returns {name: its line}."""
        left = [name for name, flags in wanted.items() if not self.results.of(name, sorted(flags))]
        with ThreadPoolExecutor(self.workers) as pool:
            for line in pool.map(lambda name: self.one(name, wanted[name]), left):
                print(f'{line["name"]:40} val loss {line["val_loss"]:.4f} {line["seconds"] / 60:6.1f} min', flush=True)
        return {name: self.results.lines[name] for name in wanted}

    def one(self, name, flags):
        said = self.script('train.py', [*flags, f'--out_dir={os.path.basename(self.path(name))}']).stdout
        told = [line.split(': ')[1].split(' ')[0] for line in said.splitlines() if ' parameters, ' in line]
        curve = self.curve(name)
        return self.results.add(name, sorted(flags), parameters=told[0] if told else '', val_loss=curve[-1].loss,
                                val_error=curve[-1].error, best=min(point.loss for point in curve),
                                seconds=curve[-1].seconds)

    def log(self, name):
        """The lines of a run's metrics.jsonl."""
        return read_lines(os.path.join(self.path(name), 'metrics.jsonl'))[0]

    def curve(self, name):
        """[Point] of a run's evaluations."""
        points, at = {}, None
        for line in self.log(name):
            at = line if 'tokens' in line else at
            if 'val_loss' in line and at:
                share = line['step'] / at['step']               # of what the last step's line says
                tokens, epoch, seconds = (share * at[name] for name in ('tokens', 'epoch', 'seconds'))
                points[line['step']] = Point(line['step'], tokens, epoch, seconds, line['val_loss'],
                                             line.get('val_error', 0.0))
        return [points[step] for step in sorted(points)]

    def bits(self, name):
        """Bits a byte of a run's val split, at its end."""
        return [line['bits_per_byte'] for line in self.log(name) if 'bits_per_byte' in line][-1]

    def tokenizer(self, dataset):
        return load_tokenizer(os.path.join(self.folder, 'data', dataset, 'tokenizer.json'))

    def result(self, name, setting, measure):
        """The line of measure(setting), a dataclass; measured once."""
        asked = asdict(setting)
        line = self.results.of(name, asked)
        if not line:
            line = self.results.add(name, asked, **measure(setting))
            print(f'{name:40} {line["seconds"] / 60:6.1f} min', flush=True)
        return line

    def model(self, name):
        """(the model, its tokenizer) of a run's end."""
        ckpt = checkpoint.load_checkpoint(os.path.join(self.path(name), 'ckpt.pt'))
        return loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)
