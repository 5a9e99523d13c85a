"""Runs of train.py, each trained once: a table over many of them goes on where it was stopped.

    runs = Runs('evidence', workers=2)
    runs.train({'next 1': ['--dataset=few', '--seed=1'], …})    # those not there yet
    runs.curve('next 1')                                        # [(step, seconds, val loss)]

    folder/data/            datasets
    folder/NAME/            what train.py writes, which goes on by itself: ckpt.pt, best.pt, metrics.jsonl
    folder/results.jsonl    a line for each result: its name, what it was asked with, the machine, and what came of it
"""
import hashlib
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from json import dumps, loads
from typing import NamedTuple

import numpy as np
import torch

from mambino.bench import energy
from mambino.bench.turns import HERE
from mambino.configurator import fail
from mambino.machine import machine_name, processor_name
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
            with open(path, 'rb+') as f:
                data = f.read()
                f.truncate(data.rfind(b'\n') + 1)               # a killed run's last line may be half of one
            try:
                lines = [loads(line) for line in data[:data.rfind(b'\n') + 1].splitlines()]
                self.lines = {line['name']: line for line in lines}
            except (ValueError, TypeError, KeyError):
                fail(f'{path}: has a line that is no result: take it out, or move the file away')

    def of(self, name, asked):
        """The line of this name, if it was asked the same; else None."""
        line = self.lines.get(name)
        return line if line and line['asked'] == asked else None

    def seconds(self):
        """Of training, all of them."""
        return sum(line['seconds'] for line in self.lines.values())

    def add(self, name, asked, **values):
        line = self.lines[name] = dict(name=name, asked=asked, **values)
        with open(self.path, 'ab') as f:
            f.write(dumps(line).encode() + b'\n')
        return line


def content_of(path):
    """A digest of a file, or of all files in a folder and their names."""
    paths = [path]
    if os.path.isdir(path):
        paths = sorted(os.path.join(where, name) for where, _, names in os.walk(path)
                       for name in names)
    state = hashlib.sha256()
    for each in paths:
        with open(each, 'rb') as f:
            own = hashlib.sha256(f.read()).hexdigest()
        state.update(f'{os.path.relpath(each, path)} {own}\n'.encode())
    return state.hexdigest()


class Runs:
    def __init__(self, folder, workers=1, threads=1, results='', device='cpu'):
        """workers: runs at once, each of so many threads. results: another file for them."""
        self.folder, self.workers, self.threads, self.device = folder, workers, threads, device
        os.makedirs(folder, exist_ok=True)
        self.results = Results(results or os.path.join(folder, 'results.jsonl'))
        self.used = {}          # {name: its line} of what was asked for

    def path(self, name):
        return os.path.join(self.folder, name.replace(' ', '-').replace('=', '-').replace(',', ''))

    def machine(self):
        """What computes here, in words."""
        if self.device == 'cpu':
            name = (f'{processor_name()}, {os.cpu_count()} cores, {self.workers} runs at once of '
                    f'{self.threads} thread')
        else:
            name = machine_name(self.device)
        return f'{name}; torch {torch.__version__}'

    def script(self, script, words):
        """A script or a module of this project, run in the folder to its end, and what it said; an
        error ends the program."""
        program = [os.path.join(HERE, script)] if script.endswith('.py') else ['-m', script]
        env = os.environ | {'OMP_NUM_THREADS': str(self.threads), 'PYTHONPATH': HERE}
        done = subprocess.run([sys.executable, *program, *words], cwd=self.folder, text=True, capture_output=True,
                              env=env)
        if done.returncode:
            fail(f'{script} {shlex.join(words)}: ended with status {done.returncode}: {done.stderr.strip()[-500:]}')
        return done

    # --- data

    def prepare(self, name, inputs, flags):
        """The dataset data/name of these files, unless it is there; an error ends the program if
        that is of others."""
        asked = dumps([[content_of(path) for path in inputs], flags])
        told = os.path.join(self.folder, 'data', f'{name}.json')
        if self.has(name):
            if os.path.exists(told):
                with open(told, encoding='utf-8') as f:
                    if f.read() != asked:
                        fail(f'{self.folder}/data/{name}: was made of another text, or otherwise: name another '
                             '--folder')
            return
        os.makedirs(os.path.dirname(told), exist_ok=True)
        with open(told, 'w', encoding='utf-8') as f:    # first: a dataset without it is any text's
            f.write(asked)
        self.script('prepare.py', [*map(os.path.abspath, inputs), *flags, f'--out=data/{name}'])

    def has(self, dataset):
        return os.path.exists(os.path.join(self.folder, 'data', dataset, 'meta.json'))

    def tokens(self, dataset, split='val'):
        return np.fromfile(os.path.join(self.folder, 'data', dataset, f'{split}.bin'), dtype=np.int32)

    # --- runs

    def each(self, wanted, measure):
        """Of {name: what is asked} each that is not there yet is measured, some at once, by
        measure(name, asked) → a dict; {name: its line} of all."""
        def one(name):
            values = measure(name, wanted[name])
            return self.results.add(name, wanted[name], **values, machine=self.machine(),
                                    day=time.strftime('%Y-%m-%d'))

        left = [name for name, asked in wanted.items() if not self.results.of(name, asked)]
        with ThreadPoolExecutor(self.workers) as pool:
            for line in pool.map(one, left):
                loss = f'val loss {line["val_loss"]:.4f}' if 'val_loss' in line else ''
                print(f'{line["name"]:50} {loss} {line["seconds"] / 60:6.1f} min', flush=True)
        found = {name: self.results.lines[name] for name in wanted}
        self.used |= found
        return found

    def need(self, names, section):
        """What a section is made of; an error ends the program if one of these is not there."""
        for name in names:
            if name not in self.results.lines:
                fail(f'{section}: there is no run "{name}" yet: first --sections=losses')
            self.used[name] = self.results.lines[name]

    def told(self):
        """Where and when what was used was measured."""
        where = {}
        for line in self.used.values():
            where.setdefault(line['machine'], set()).add(line['day'])
        return '; '.join(f'{machine}, {" and ".join(sorted(days))}' for machine, days in where.items()) + '.'

    def train(self, wanted, script='train.py'):
        """Trains {name: flags}; returns {name: its line}."""
        def measure(name, _):
            # from scratch: what was begun with other flags is not gone on with; the same command is
            where = f'--out_dir={os.path.basename(self.path(name))}'
            more = [where, f'--device={self.device}', '--init_from=scratch']
            is_new = not os.path.exists(os.path.join(self.path(name), 'ckpt.pt'))
            before = energy.counters()
            said = self.script(script, [*wanted[name], *more]).stdout
            spent = energy.joules(before, energy.counters())
            own = dict(joules=spent) if spent and self.workers == 1 and is_new else {}
            told = [line.split(': ')[1].split(' ')[0] for line in said.splitlines() if ' parameters, ' in line]
            curve = self.curve(name)
            return dict(
                parameters=told[0] if told else '', val_loss=curve[-1].loss, val_error=curve[-1].error,
                best=min(point.loss for point in curve), seconds=curve[-1].seconds, speed=self.speed(name),
                dtype=self.checkpoint(name)['settings']['dtype'], **own)
        return self.each({name: sorted(flags) for name, flags in wanted.items()}, measure)

    def learned(self, wanted, module):
        """Of {name: a setting, a dataclass} what `python -m module SETTING DEVICE` prints; {name: its
        line}."""
        def measure(name, asked):
            return loads(self.script(module, [dumps(asked), self.device]).stdout)
        return self.each({name: asdict(setting) for name, setting in wanted.items()}, measure)

    def log(self, name):
        """The lines of a run's metrics.jsonl."""
        self.require_run(name)
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

    def bits(self, name, dataset):
        """Bits a byte of the val split, at a run's end."""
        with open(os.path.join(self.folder, 'data', dataset, 'meta.json'), encoding='utf-8') as f:
            val = loads(f.read())['splits']['val']
        return self.results.lines[name]['val_loss'] * val['tokens'] / val['bytes'] / math.log(2)

    def tokenizer(self, dataset):
        return load_tokenizer(os.path.join(self.folder, 'data', dataset, 'tokenizer.json'))

    def speed(self, name):
        """Tokens a second of a run, by the middle one of its log's lines."""
        said = [line['tokens_per_s'] for line in self.log(name) if 'tokens_per_s' in line]
        return statistics.median(said) if said else 0.0

    def checkpoint(self, name):
        self.require_run(name)
        return checkpoint.load_checkpoint(os.path.join(self.path(name), 'ckpt.pt'))

    def is_here(self, name):
        return os.path.isdir(self.path(name))

    def require_run(self, name):
        """Ends the program if a run is not here whose line is."""
        if not self.is_here(name):
            fail(f'{self.results.path} has the run "{name}", and {self.folder} has it not: name the --folder that it '
                 'is in, or another --out')

    def model(self, name):
        """(the model, its tokenizer) of a run's end."""
        ckpt = self.checkpoint(name)
        return loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)
