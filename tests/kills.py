"""Kills runs of train.py at their file operations and at random, says the same command again, and
compares what they leave with a run that nobody disturbed, bit by bit.

    python tests/kills.py --kills=300               # some minutes; says what was tried, and every difference

A kill is before one operation on a file of out_dir: to open it for writing, to write, to flush,
rename or remove it. Else a disk is full from then on, a signal comes, a second trainer starts, or
nobody reads stdout any more. Runs are forked from this process, which has imported torch already.
"""
import argparse
import collections
import errno
import importlib
import io
import os
import random
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

from helpers.runs import ROOT, files, load, metrics, plain, script, write_text  # noqa: E402

import mambino.files  # noqa: E402

TINY = ('--dataset=tiny --n_layer=1 --n_embd=32 --block_size=16 --batch_size=2 --tokens_per_step=64 --max_iters=6 '
        '--eval_interval=2 --log_interval=1 --device=cpu --dtype=float32')
RUNS = {
    'gpt': '--model=gpt --dropout=0.1',
    'muon': '--model=gpt --optimizer=muon',
    'mamba': '--model=mamba --tokens_per_step=128',
    'hybrid': '--model=hybrid',
    'saves': '--model=gpt --save_minutes=1e-9',             # a checkpoint after every step
    'scratch': '--model=gpt --init_from=scratch',           # over a run that is there
    'experts': '--model=gpt --n_expert=4',
}
WAYS = ('kill', 'kill', 'kill', 'random', 'full', 'hup', 'second', 'pipe')
WATCHED = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate'}


def prepare(folder):
    """The dataset, and an older run in old/."""
    os.chdir(folder)
    write_text('tiny.txt', 4000)
    run(lambda: script('prepare.py', 'tiny.txt --tokenizer=char --out=data/tiny'))
    # here, not in a forked process: those have all imports already then
    assert script('train.py', TINY, '--model=hybrid --max_iters=4 --out_dir=old') == 0


def undisturbed(name):
    """Makes a run in <name>-unbroken/, if it is not there; returns how many operations on files it has."""
    count = f'{name}-operations.txt'
    if not os.path.exists(count):
        status = train(RUNS[name], f'--out_dir={name}-unbroken', count=count)
        assert status == 0, open('complained.txt').read()
    return int(open(count).read())


def run(action, wait=True):
    """Calls action in a forked process; returns its exit status, or its process id."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            for number, name in ((1, 'said.txt'), (2, 'complained.txt')):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
            status = action()
            sys.stdout.flush()
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid


def train(*lines, at=0, count='', way='kill', wait=True):
    """A run in a forked process; with `at` it is disturbed before that operation."""
    def action():
        watch(at, count, way)
        sys.argv = ['train.py', *shlex.split(' '.join((TINY, *lines)))]
        try:
            runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')
        except SystemExit as end:
            return end.code
        finally:
            mambino.files.release()
        return 0
    return run(action, wait)


def watch(at, count, way):
    """Counts the operations on files of out_dir in this process, into the file `count`, and
    disturbs it before the one numbered `at`."""
    done = 0

    def next_operation():
        nonlocal done
        done += 1
        if count:
            with plain_open(count, 'w') as f:
                f.write(str(done))
        if at and done >= at:
            if way == 'kill' and done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if way == 'pipe' and done == at:
                reading, writing = os.pipe()
                os.close(reading)
                os.dup2(writing, 1)
            return way == 'full'
        return False

    def heard(event, arguments):
        path = arguments[0] if arguments and isinstance(arguments[0], str) else ''
        is_ours = os.path.dirname(path).startswith('out') or path.startswith('out') or 'unbroken' in path
        opens = event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_ours and (event in WATCHED or opens):
            next_operation()

    def disturbed(function):
        def call(*arguments):
            if next_operation():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)
        return call

    class Disturbed(io.BufferedWriter):
        write = disturbed(io.BufferedWriter.write)

    plain_open, create = open, mambino.files.create
    sys.addaudithook(heard)
    os.fsync = disturbed(os.fsync)
    mambino.files.create = lambda path: Disturbed(create(path).detach())
    importlib.import_module('mambino.train.progress').SPACE_SECONDS = 0.1


def disturb(name, way, rng, operations):
    """One run that is disturbed, in out/. Returns what was wrong at once, or ''."""
    flags = RUNS[name]
    at = rng.randint(1, operations)
    if way in ('kill', 'full', 'pipe'):
        status = train(flags, '--out_dir=out', at=at, way=way)
        return '' if status in {'kill': (-9, 0), 'full': (0, 2), 'pipe': (0,)}[way] else f'status {status}'
    pid = train(flags, '--out_dir=out', wait=False)
    if way == 'second':
        while not os.path.exists('out/train.lock') and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)
        os.symlink('out', 'also-out')
        status = train(flags, f'--out_dir={rng.choice(["out", "./out/", "also-out"])}')
        os.remove('also-out')
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return '' if status == 2 else f'the second ended with {status}'
    time.sleep(rng.random() * 1.5)
    os.kill(pid, signal.SIGKILL if way == 'random' else signal.SIGHUP)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    good = (-9, 0) if way == 'random' else (129, 0)
    return '' if status in good else f'status {status}'


def difference(name, way, rng, operations):
    """What a run that was disturbed, and then said again, has that an undisturbed one has not; '' if nothing."""
    for path in ('out', 'said.txt', 'complained.txt'):
        shutil.rmtree(path) if os.path.isdir(path) else mambino.files.remove(path)
    if name == 'scratch':
        shutil.copytree('old', 'out')
    wrong = disturb(name, way, rng, operations)
    if wrong:
        return wrong
    for path in ('out/ckpt.pt', 'out/best.pt'):
        if os.path.exists(path) and mambino.files.damage_of(path):
            return f'{path} is damaged'
    for _ in range(3):                                # a run that is complete says so
        status = train(RUNS[name], '--out_dir=out')
        if status == 0 and load('out/ckpt.pt')['counters']['step'] == 6:
            break
    if status:
        return f'said again it ends with {status}'
    # one that was begun anew and is complete is begun anew again by the same command
    a, b = f'{name}-unbroken', 'out'
    if metrics(a) != metrics(b):
        return 'metrics.jsonl differs'
    for file in ('ckpt.pt', 'best.pt'):
        if plain(load(f'{a}/{file}')) != plain(load(f'{b}/{file}')):
            return f'{file} differs'
    kept = {path: data for path, data in files('out').items() if '.old' in path}
    older = {path.replace('old/', 'out/', 1) + '.old': data for path, data in files('old').items()}
    if name == 'scratch' and not older.items() <= kept.items():
        return 'the older run is not as it was'
    stray = set(os.listdir('out')) - {'ckpt.pt', 'best.pt', 'metrics.jsonl'} - {path[4:] for path in kept}
    return f'{sorted(stray)} is left' if stray else ''


def main(kills, seed, folder, say=print):
    """Disturbs so many runs in a folder; returns {(run, way): (tried, differences)}."""
    import torch
    torch.set_num_threads(1)
    before, rng = os.getcwd(), random.Random(seed)
    tried, wrong = collections.Counter(), collections.Counter()
    try:
        prepare(folder)
        for i in range(kills):
            name, way = rng.choice(list(RUNS)), WAYS[i % len(WAYS)]
            found = difference(name, way, rng, undisturbed(name))
            tried[name, way] += 1
            if found:
                wrong[name, way] += 1
                kept = f'{folder}/wrong-{i}'
                os.makedirs(kept)
                if os.path.isdir('out'):
                    shutil.copytree('out', f'{kept}/out')
                shutil.copy('complained.txt', kept)
                shutil.copy('said.txt', kept)
                say(f'{i}: {name}, {way}: {found}; kept in {kept}', flush=True)
            if i % 20 == 19:
                say(f'{i + 1} of {kills}, {sum(wrong.values())} wrong', flush=True)
    finally:
        os.chdir(before)
    return {case: (n, wrong[case]) for case, n in sorted(tried.items())}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=300)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--folder', default='', help='a new one; what differs stays there')
    options = parser.parse_args()
    options.folder = options.folder or tempfile.mkdtemp(prefix='kills-')
    os.makedirs(options.folder, exist_ok=True)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    result = main(options.kills, options.seed, os.path.abspath(options.folder))
    ways = collections.Counter()
    bad = collections.Counter()
    for (_, way), (n, n_wrong) in result.items():
        ways[way] += n
        bad[way] += n_wrong
    for way in ways:
        print(f'{way:<8} {ways[way]:>5} tried, {bad[way]} wrong')
    sys.exit(bool(sum(bad.values())))
