"""What a run is, read from its files: its numbers, its samples, its log, and how it stands.

    log = Metrics('out/metrics.jsonl')
    log.refresh()                               # what is new in it; True if it was written anew
    log.curve('loss')                           # ([steps], [values])
    standing('out')                             # Standing('stopped', 'Stopped at step 120. …', …)

    metrics.jsonl ──► Metrics ──► curves.py         train.log ──► samples, the last words ──► Standing
    ckpt.pt ──────────────────────────────► facts ──► a row of the table of runs

Nothing is kept but what makes reading quicker: whoever reads the files anew sees the same.
"""
import csv
import io
import os
import re
import socket
import threading
import time
from typing import NamedTuple

import torch

from mambino import files
from mambino.blocks import fills_holes
from mambino.plain import parse_json, table, whole
from mambino.serve import launch
from mambino.tokenizer_config import read_json
from mambino.train.report import SAMPLE
from mambino.weights.checkpoint import is_complete
from mambino.weights.families import holes

TAIL = 64 << 10         # bytes of a log that are looked at for its end
AT_ONCE = 500           # lines that are read together
LARGEST = 1e300         # of a number that can be drawn


# --- numbers --------------------------------------------------------------------------------------

class Metrics:
    """The numbers of a metrics.jsonl, which grows; one that a run that goes on has cut is read
    anew.

    generation: how often it was read anew, by which a reader knows that what it has is of
    before."""

    def __init__(self, path):
        self.path = path
        self.lock = threading.Lock()
        self.generation = 0
        self.clear()

    def clear(self):
        self.offset = 0
        self.stamp = None               # of the file: device and number
        self.columns = {}               # name → ([steps], [values])
        self.lines = 0
        self.damaged = 0
        self.generation += 1

    def refresh(self):
        """Reads what was written since; returns whether all was read anew. A last line without its
        end is left for later."""
        with self.lock:
            before = self.generation
            try:
                with files.open_plain(self.path) as f:
                    status = os.fstat(f.fileno())
                    stamp = status.st_dev, status.st_ino
                    if stamp != self.stamp or status.st_size < self.offset:
                        if self.stamp is not None:
                            self.clear()
                        self.stamp = stamp
                    f.seek(self.offset)
                    data = f.read()
            except OSError:
                if self.stamp is not None:
                    self.clear()
                return self.generation != before
            end = data.rfind(b'\n') + 1
            self.offset += end
            lines = [line for line in data[:end].split(b'\n') if line.strip()]
            for first in range(0, len(lines), AT_ONCE):
                if first:
                    time.sleep(0.001)       # others who wait for the interpreter get it now
                self.add(lines[first:first + AT_ONCE])
            return self.generation != before

    def add(self, lines):
        """Takes some lines."""
        try:                                # many at once are read three times as fast
            found = parse_json(b'[' + b','.join(lines) + b']')
            if len(found) != len(lines):
                raise ValueError
        except ValueError:
            found = []
            for line in lines:
                try:
                    found.append(parse_json(line))
                except ValueError:
                    found.append(None)
        for values in found:
            self.take(values)

    def take(self, values):
        """Takes what a line says."""
        step = values.get('step') if isinstance(values, dict) else None
        if not whole(step, 0, 2**62):
            self.damaged += 1
            return
        self.lines += 1
        for name, value in values.items():
            # of other types there is nothing to draw; this is asked a million times, so it is written out
            if (type(value) is float or type(value) is int) and name != 'step' and -LARGEST < value < LARGEST:
                if name not in self.columns:
                    self.columns[name] = [], []
                steps, column = self.columns[name]
                steps.append(step)
                column.append(value)

    def curve(self, name, first=0):
        """([steps], [values]) of one number, from its first-th value on."""
        steps, values = self.columns.get(name, ([], []))
        n = len(values)                 # it may grow meanwhile
        return steps[first:n], values[first:n]

    def last(self, name, missing=None):
        """The last value of a number."""
        _, values = self.columns.get(name, ([], []))
        return values[-1] if values else missing

    def best(self, name='val_loss'):
        """The lowest value of a number; None if there is none."""
        return min(self.curve(name)[1], default=None)


logs = {}               # path → Metrics, shared by all who look at a run
logs_lock = threading.Lock()


def metrics_of(out_dir):
    """The Metrics of a run, brought up to now. Nothing of it changes what another reader sees."""
    path = os.path.abspath(os.path.join(out_dir, 'metrics.jsonl'))
    with logs_lock:
        log = logs.setdefault(path, Metrics(path))
    log.refresh()
    return log


def as_csv(out_dir):
    """The numbers of a run as a table for other programs: a row a step, a column a name."""
    log = metrics_of(out_dir)
    rows = {}
    names = list(log.columns)
    for name in names:
        for step, value in zip(*log.curve(name)):
            rows.setdefault(step, {})[name] = value
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['step', *names])
    for step in sorted(rows):
        writer.writerow([step, *(rows[step].get(name, '') for name in names)])
    return text.getvalue()


# --- what it says ---------------------------------------------------------------------------------

def end_of(path):
    """The end of a text file, whole lines; '' if it is not there."""
    try:
        with files.open_plain(path) as f:
            length = f.seek(0, os.SEEK_END)
            f.seek(max(0, length - TAIL))
            text = f.read(TAIL).decode(errors='replace')
    except OSError:
        return ''
    if length > TAIL:
        text = text.partition('\n')[2]
    return text


class Lines:
    """A log whose lines come one after another: of each call those that are new."""

    def __init__(self, path):
        self.path = path
        self.offset = None
        self.stamp = None

    def new(self):
        """(whether those before count no more, the new lines). The first time the last ones."""
        try:
            with files.open_plain(self.path) as f:
                status = os.fstat(f.fileno())
                stamp = status.st_dev, status.st_ino
                is_other = stamp != self.stamp or status.st_size < self.offset
                if is_other:
                    self.stamp = stamp
                    self.offset = max(0, status.st_size - TAIL)
                f.seek(self.offset)
                data = f.read(4 * TAIL)
        except OSError:
            is_other = self.stamp is not None
            self.stamp = None
            return is_other, []
        end = data.rfind(b'\n') + 1
        lines = data[:end].decode(errors='replace').split('\n')[:-1]
        if is_other and self.offset:
            lines = lines[1:]           # it is half a one
        self.offset += end
        return is_other, [last_shown(line) for line in lines]


def last_shown(line):
    """What a terminal would show of a line that was written over itself."""
    return line.rstrip('\r').rpartition('\r')[2]


STATUS = re.compile(r'^step +(\d+)/(\d+) \|.*', re.MULTILINE)


class Progress(NamedTuple):
    """How far a run is."""
    step: int
    steps: int          # in all; 0: nobody knows
    left: str           # time until the last one, h:mm:ss; '' where nobody knows


def progress_of(out_dir):
    """The Progress of a run, by its log, else by its last checkpoint."""
    log = metrics_of(out_dir)
    steps, _ = log.curve('tokens')
    step = steps[-1] if steps else facts_of(out_dir).get('step', 0)
    lines = list(STATUS.finditer(last_words(launch.training(out_dir))))
    if lines:
        left = re.search(r'left ([\d:]+)', lines[-1][0])
        return Progress(step, int(lines[-1][2]), left[1] if left else '')
    limit = settings_of(out_dir).get('max_iters', 0)
    return Progress(step, int(limit) if str(limit).isdigit() else 0, '')


# --- how it stands --------------------------------------------------------------------------------

class Standing(NamedTuple):
    """How a run, or the making of a dataset, stands."""
    state: str          # running, elsewhere, complete, stopped, nan, memory, disk, failed, killed, unknown
    words: str          # for the person
    is_done: bool       # nothing is left to do
    can_go_on: bool


OUT_OF_MEMORY = re.compile('out of memory|MemoryError|allocate memory|ALLOC_FAILED|killed by the kernel', re.I)
NO_SPACE = re.compile('no space left|no space is left|disk quota|disk is full', re.I)
FAILURE = re.compile(r'^(?:error: .*|Traceback \(most recent call last\):|\w+(?:\.\w+)*Error: .*)', re.MULTILINE)


def last_words(task):
    """What a task has said since it was started last."""
    return SAMPLE.sub('', end_of(task.log).rpartition('\n$ ')[2])


def standing(out_dir):
    """The Standing of a run."""
    holder = launch.holder(out_dir)
    can_go_on = os.path.exists(os.path.join(out_dir, 'ckpt.pt'))
    if holder:
        since = f'since {holder.get("since", "?")}'
        if holder.get('host') == socket.gethostname():
            text = last_words(launch.training(out_dir))
            words = 'Training' if STATUS.search(text) or not text else 'Starting'
            return Standing('running', f'{words} {since}.', False, False)
        return Standing('elsewhere', f'Trains on the machine {holder.get("host")} {since}.', False, False)
    return ended(last_words(launch.training(out_dir)), out_dir, can_go_on)


def ended(text, out_dir, can_go_on):
    """The Standing of a run that does not train, by what it said last."""
    go_on = ' It can go on from its last checkpoint.' if can_go_on else ' No checkpoint was saved.'
    failure = FAILURE.findall(text)
    sentence = failure[-1].removeprefix('error: ') if failure else ''
    if re.search(r'^done: ', text, re.MULTILINE) and not sentence:
        done = re.findall(r'^done: (.*)', text, re.MULTILINE)[-1]
        return Standing('complete', f'Complete: {done}.', True, can_go_on)
    if re.search(r'^this run has made its', text, re.MULTILINE):
        return Standing('complete', 'Complete: it has made all its steps.', True, can_go_on)
    if 'is not a finite number any more' in text:
        return Standing('nan', 'The loss became NaN (no number any more): the steps were too large. Try a lower '
                        'learning rate, a longer warm-up, or dtype float32.' + go_on, False, can_go_on)
    if NO_SPACE.search(sentence) or (NO_SPACE.search(text) and not re.search('^stopped at', text, re.MULTILINE)):
        return Standing('disk', f'The disk is full: make some space, then go on.{go_on}', False, can_go_on)
    if sentence and OUT_OF_MEMORY.search(text):
        return Standing('memory', 'Out of memory: the model and its batch did not fit. Try a smaller batch size, a '
                        'shorter context (block_size), gradient checkpointing, or a smaller model.' + go_on, False,
                        can_go_on)
    stopped = re.findall(r'^stopped at step (\d+), (saved|not saved)', text, re.MULTILINE)
    if stopped:
        return Standing('stopped', f'Stopped at step {stopped[-1][0]}.{go_on}', False, can_go_on)
    if sentence:
        if sentence.startswith('Traceback'):
            sentence = text.strip().rpartition('\n')[2]
        return Standing('failed', f'It ended with an error: {sentence}', False, can_go_on)
    if text and launch.read_record(launch.training(out_dir).record).get('stopped'):
        return Standing('stopped', f'Stopped.{go_on}', False, can_go_on)
    if text:
        return Standing('killed', 'It ended without a word: it was killed, or the machine ran out of memory or was '
                        'switched off.' + go_on, False, can_go_on)
    facts = facts_of(out_dir)           # it was trained from a terminal
    if facts.get('is_complete'):
        return Standing('complete', f'Complete: {facts["step"]:,} steps.', True, can_go_on)
    if facts:
        return Standing('stopped', f'Stopped at step {facts["step"]:,}.{go_on}', False, can_go_on)
    return Standing('unknown', 'Nothing is known of it: it has no log and no checkpoint.', False, can_go_on)


def made(name):
    """The Standing of the making of a dataset; None if none was made by the page."""
    task = launch.preparing(name)
    if not os.path.exists(task.log):
        return None
    if found := launch.worker(task):
        return Standing('running', f'At work since {found.get("since", "?")}.', False, False)
    text = last_words(task)
    failure = FAILURE.findall(text)
    if 'now: python train.py' in text or 'nothing new: all' in text:
        return Standing('complete', 'The dataset is ready.', True, False)
    if NO_SPACE.search(text):
        return Standing('disk', 'The disk is full: make some space, then prepare it again; what was done stays done.',
                        False, True)
    if failure:
        sentence = failure[-1].removeprefix('error: ')
        return Standing('failed', f'It ended with an error: {sentence}', False, True)
    state = 'stopped' if launch.read_record(task.record).get('stopped') else 'killed'
    words = 'Stopped' if state == 'stopped' else 'It ended without a word: it was killed, or memory was too scarce'
    return Standing(state, f'{words}. Prepare it again, and it goes on where it was.', False, True)


# --- facts ----------------------------------------------------------------------------------------

known = {}              # path → (stamp of the file, facts)


def facts_of(out_dir):
    """{'kind', 'parameters', 'step', 'tokens', 'seconds', 'settings', 'is_complete', 'talks', …} of
    a run's last checkpoint, or of one file, whose weights stay on the disk; {} if there is none that
    can be read."""
    paths = [os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt')]
    if os.path.isfile(out_dir):
        paths = [out_dir]
    for path in map(os.path.abspath, paths):
        try:
            stamp = files.stamp_of(path)
            if path not in known or known[path][0] != stamp:
                known[path] = stamp, read_facts(path)
        except OSError:
            continue
        if known[path][1]:
            return known[path][1]
    return {}


def read_facts(path):
    """See facts_of."""
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        settings, counters, metadata = (ckpt[name] for name in ('settings', 'counters', 'metadata'))
        if not (table(settings) and table(counters) and table(metadata)):
            return {}
        return dict(
            kind=str(ckpt['kind']), parameters=int(metadata['parameters']), step=int(counters['step']),
            tokens=int(counters['tokens_seen']), seconds=float(counters['seconds']),
            best_loss=counters.get('best_loss'), settings=settings,
            is_complete=is_complete(settings, counters),
            adapter=(ckpt.get('adapter') or {}).get('type', ''),
            fills_holes=fills_holes(ckpt['config']),
            # whether it was tuned on conversations
            talks=bool((ckpt['tokenizer'] or {}).get('config', {}).get('chat_template')))
    except Exception:                   # of zip, pickle, torch: it is no checkpoint of ours, or written just now
        return {}


def fills_holes_by_files(out_dir):
    """Whether the model of a run, or of a folder of transformers, hf:folder, fills holes, by what lies on the disk."""
    if not out_dir.startswith('hf:'):
        return facts_of(out_dir).get('fills_holes', False)
    try:
        config = read_json(os.path.join(out_dir.removeprefix('hf:'), 'config.json'))
    except ValueError:                  # whoever loads it is told so
        return False
    return config.get('model_type') == holes.MODEL_TYPE


def settings_of(out_dir):
    """{name: value} of a run's settings; before its first checkpoint those that it was started with."""
    facts = facts_of(out_dir)
    if facts:
        return dict(facts['settings'])
    words = launch.read_record(launch.training(out_dir).record).get('command') or []
    pairs = [word[2:].partition('=') for word in words if isinstance(word, str) and word.startswith('--')]
    return {name: value for name, _, value in pairs}


def differences(folders):
    """[(name, [its value in each run, as text]), …] of the settings that are not the same in all."""
    settings = [settings_of(folder) for folder in folders]
    names = sorted({name for each in settings for name in each})
    rows = [(name, [str(each.get(name, '—')) for each in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def summary(out_dir):
    """{…} of a run for the table of runs."""
    log = metrics_of(out_dir)
    facts = facts_of(out_dir)
    settings = settings_of(out_dir)
    state = standing(out_dir)
    steps, _ = log.curve('tokens')
    best = log.best()
    return dict(
        name=out_dir, state=state.state, words=state.words, kind=facts.get('kind') or settings.get('model', ''),
        parameters=facts.get('parameters'), dataset=str(settings.get('dataset', '')),
        best=facts.get('best_loss') if best is None else best, step=steps[-1] if steps else facts.get('step', 0),
        tokens=log.last('tokens', facts.get('tokens')), seconds=log.last('seconds', facts.get('seconds')))
