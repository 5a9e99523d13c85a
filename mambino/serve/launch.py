"""Starts and stops train.py, prepare.py and export.py, as processes that outlive the server.

    task = training('out-mine')
    start(task, ['--dataset=mine', '--max_iters=30'], request='a word of the page')
    holder('out-mine')              # {'pid', 'host', 'since'} while it trains, else {}
    stop(task)                      # SIGTERM: it saves, and ends
    resume('out-mine')              # goes on where it was

    start ──► a process of its own session ──► what it says ──► out-mine/train.log
        └──► out-mine/started.json: pid, host, since, command, and where in the log it begins

Who runs is read from files alone, a run's lock and started.json, so that a server that was killed
and started again sees the same. Names that come from the page make paths nowhere else but in the
current folder, as out-…, and in data/. What cannot be done is Refused, with a sentence for the
person.
"""
import glob
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

from mambino import files, script_path
from mambino.configurator import typed
from mambino.plain import parse_json
from mambino.serve.told import Refused
from mambino.train.progress import OF_THE_MACHINE

NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]{0,63}')
LARGEST_LOG = 64 << 20      # bytes; a log that is larger begins anew with the next start
SECONDS = 120               # that a dry run may take


class Task(NamedTuple):
    """A script at work on something, and the files by which it is known."""
    script: str
    log: str
    record: str             # who was started by the page last


# --- names and paths ------------------------------------------------------------------------------

def checked_name(text):
    """A name typed on the page; Refused if it could be anything but the name of a folder."""
    text = text.strip()
    if not NAME.fullmatch(text) or text.endswith('.') or '..' in text:
        raise Refused(f'{text[:70]!r} is no name: one has letters, digits, - _ and ., first a letter or digit')
    return text


def run_folder(name):
    """The folder of a run that is called so: out-… in the current folder."""
    name = checked_name(name)
    return name if name == 'out' or name.startswith('out-') else f'out-{name}'


def dataset_folder(name):
    """The folder of a dataset that is called so, in data/."""
    return os.path.join('data', checked_name(name.removeprefix('data/')))


def training(out_dir):
    """The Task of a run."""
    return Task('train.py', os.path.join(out_dir, 'train.log'), os.path.join(out_dir, 'started.json'))


def preparing(name):
    """The Task that makes a dataset."""
    folder = dataset_folder(name)
    return Task('prepare.py', f'{folder}.log', f'{folder}.started.json')


def exporting(out_dir):
    """The Task of an export."""
    return Task('export.py', os.path.join(out_dir, 'export.log'), os.path.join(out_dir, 'export.started.json'))


def input_path(text):
    """A path, a pattern or hf:name for prepare.py, as it stands on its command line: never a flag.
    Refused where nothing is."""
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in '"\'':     # as file managers copy a path
        text = text[1:-1]
    if re.fullmatch(r'hf:[\w./:-]+', text):
        return text
    if not text or '\0' in text:
        raise Refused('a path is missing')
    path = os.path.abspath(os.path.expanduser(text))
    if not os.path.exists(path) and not any(glob.iglob(path, recursive=True)):
        raise Refused(f'{path}: there is no such file or folder on this machine')
    return path


def flags(settings):
    """['--name=value', …] of a dict."""
    return [f'--{name}={value}' for name, value in settings.items()]


def check_words(arguments):
    """Refused if one of them cannot stand on a command line."""
    for word in arguments:
        if '\0' in word or any('\ud800' <= character <= '\udfff' for character in word):
            raise Refused(f'{word[:70]!r} has a character that cannot stand on a command line')


def command_line(script, arguments):
    """What a person types for the same."""
    return typed(' '.join(['python', script, *map(shlex.quote, arguments)]))


# --- who runs -------------------------------------------------------------------------------------

def read_record(path):
    """What a file of JSON says; {} if it is not there, or says nothing."""
    try:
        with files.open_plain(path) as f:
            record = parse_json(f.read(1 << 20))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def words_of(pid):
    """The words of a process's command line; [] if there is no such process, or it has ended."""
    if type(pid) is not int or pid <= 0:
        return []
    if os.path.isdir('/proc/self'):
        try:
            with open(f'/proc/{pid}/cmdline', 'rb') as f:
                return f.read().decode(errors='replace').split('\0')    # of one that has ended: nothing
        except OSError:
            return []
    command = ['ps', '-o', 'command=', '-p', str(pid)]
    if os.name == 'nt':                     # which tells the program alone, and what it works on nobody
        command = ['tasklist', '/FI', f'PID eq {pid}', '/FO', 'CSV', '/NH']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.replace('"', ' ').split()
    except (OSError, subprocess.SubprocessError):
        return []


def is_alive(entry, script):
    """Whether the process that a lock or a record names is there, and is this script."""
    if not entry or entry.get('host') != socket.gethostname():
        return False
    known = {script, os.path.splitext(script)[0]}       # train.py, or as in: mambino train
    if os.name == 'nt':
        known = {'python.exe', 'pythonw.exe', 'mambino.exe'}
    return any(os.path.basename(word) in known for word in words_of(entry.get('pid')))


def holder(out_dir):
    """Who trains in a folder, {'pid', 'host', 'since', …}; {} if nobody does."""
    path = os.path.join(out_dir, files.LOCK)
    lock = files.holder_in(path)
    if is_alive(lock, 'train.py'):
        return lock
    started = read_record(training(out_dir).record)     # it takes some seconds until it holds the folder
    if is_alive(started, 'train.py'):
        return started
    if lock and lock.get('host') != socket.gethostname() and is_locked(path):
        return lock
    return {}


def is_locked(path):
    """Whether the process that wrote a lock file, on another machine, still has it."""
    try:
        number = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return files.lock(number) is False
    finally:
        os.close(number)


def worker(task):
    """Who is at work on a task, {'pid', 'host', 'since', …}; {} if nobody is."""
    if task.script == 'train.py':
        return holder(os.path.dirname(task.log))
    record = read_record(task.record)
    return record if is_alive(record, task.script) else {}


def run_folders():
    """The folders here in which something trains, or has trained."""
    marks = ('ckpt.pt', 'best.pt', 'metrics.jsonl', 'train.log', 'started.json')
    try:
        names = sorted(os.listdir('.'))
    except OSError:
        return []
    return [name for name in names if os.path.isdir(name) and any(
        os.path.exists(os.path.join(name, mark)) for mark in marks)]


def trainings():
    """The folders here in which something trains now."""
    return [name for name in run_folders() if holder(name)]


# --- starting, stopping ---------------------------------------------------------------------------

def start(task, arguments, request=''):
    """Starts a task; returns its record. Refused if it is at work already.

    request: a word that the page makes for each form that it shows; a second click says the same
    one, and starts nothing."""
    check_words(arguments)
    folder = os.path.dirname(task.log)
    try:
        os.makedirs(folder, exist_ok=True)
        with files.alone_in(folder):
            record = read_record(task.record)
            if request and record.get('request') == request:
                return record
            if found := worker(task):
                raise Refused(f'{folder}: {task.script} is at work there already, since {found.get("since", "?")}')
            return launch(task, arguments, request)
    except OSError as error:
        raise Refused(f'{folder}: {task.script} could not be started there: {error.strerror or error}') from None


def launch(task, arguments, request):
    """The process of a task, and its record."""
    command = [sys.executable, script_path(task.script), *arguments]
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONIOENCODING': 'utf-8'}
    group = dict(start_new_session=True)
    if os.name == 'nt':
        group = dict(creationflags=subprocess.CREATE_NEW_PROCESS_GROUP)
    is_large = os.path.exists(task.log) and os.path.getsize(task.log) > LARGEST_LOG
    with files.open_log(task.log, anew=is_large) as log:
        log.write(f'$ {command_line(task.script, arguments)}\n'.encode())
        log.flush()
        begins = log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   env=environment, **group)
    threading.Thread(target=process.wait, daemon=True).start()      # whom nobody waits for stays, as a zombie
    record = dict(files.own_identity(), pid=process.pid, request=request, command=arguments, begins=begins)
    try:
        write_record(task, record)
    except OSError:             # nobody would know whose process it is
        process.kill()
        raise
    return record


def write_record(task, record):
    with files.whole(task.record) as f:
        f.write(json.dumps(record).encode())


def train(name, arguments, request='', beside=False):
    """Starts a run that is called so; returns its folder. beside: others may train meanwhile."""
    out_dir = run_folder(name)
    others = [other for other in trainings() if other != out_dir]
    if others and not beside:
        raise Refused(f'{", ".join(others)} is training: two at once share the machine, and may not fit in')
    start(training(out_dir), [*arguments, f'--out_dir={out_dir}'], request)
    return out_dir


def resume(out_dir, changes=None, request=''):
    """Goes on with a run that was stopped or died. changes: {name: value} of settings, as more
    max_iters."""
    record = read_record(training(out_dir).record)
    arguments = record.get('command') or []
    if os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
        names = tuple(f'--{name}=' for name in OF_THE_MACHINE)
        again = [word for word in arguments if word.startswith(names)]
        arguments = ['--init_from=resume', *again, f'--out_dir={out_dir}']
    elif not arguments:
        raise Refused(f'{out_dir}: there is no checkpoint to go on from')
    start(training(out_dir), [*arguments, *flags(changes or {})], request)


def stop(task, at_once=False):
    """Asks a task to end: train.py saves first. at_once: it is killed. Refused if nobody is at work."""
    found = worker(task)
    if not found:
        raise Refused('nothing is at work there')
    if found.get('host') != socket.gethostname():
        raise Refused(f'it runs on another machine, {found.get("host")}: stop it there')
    number = signal.SIGTERM
    if os.name == 'nt':
        number = signal.SIGTERM if at_once else signal.CTRL_BREAK_EVENT
    elif at_once:
        number = signal.SIGKILL
    try:
        os.kill(found['pid'], number)
        record = read_record(task.record)
        if record.get('pid') == found['pid']:       # one that ends before it has said a word was not killed by others
            write_record(task, record | dict(stopped=True))
    except OSError as error:
        raise Refused(f'process {found["pid"]} cannot be stopped: {error.strerror or error}') from None


# --- what takes no process of its own -------------------------------------------------------------

def answer_of(script, arguments, seconds=SECONDS):
    """What a script says that ends soon: (its exit status, its text). Refused if it takes too long."""
    check_words(arguments)
    command = [sys.executable, *script, *arguments]
    root = os.pathsep.join(filter(None, [script_path(''), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'PYTHONIOENCODING': 'utf-8', 'COLUMNS': '110', 'PYTHONPATH': root}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Refused(f'that takes more than {seconds} seconds; try it with less') from None
    except OSError as error:
        raise Refused(f'{script[0]} could not be started: {error.strerror or error}') from None
    return done.returncode, done.stdout.decode(errors='replace')


def delete_run(out_dir):
    """Deletes the folder of a run that is called out…, here, and does not train. Refused otherwise."""
    is_run = out_dir in run_folders() and out_dir.startswith('out') and os.sep not in out_dir
    if not is_run or os.path.islink(out_dir):
        raise Refused(f'{out_dir}: not a run in this folder that is called out…')
    try:
        with files.alone_in(out_dir):       # who starts it in this moment waits, and finds no folder
            if holder(out_dir):
                raise Refused(f'{out_dir} is training: stop it first')
            shutil.rmtree(out_dir)
    except OSError as error:
        raise Refused(f'{out_dir} could not be deleted: {error.strerror or error}') from None
