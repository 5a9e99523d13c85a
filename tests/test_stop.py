"""How a run ends, or does not: closed terminals, a stdout that takes no more, torchrun killed, a second trainer; and
environments that no torchrun sets."""
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.runs import POSIX, ROOT, load, metrics, train, wait_for_lines
from helpers.runs import launch as launch_tiny

from mambino import console, files
from mambino.train import processes

pytestmark = pytest.mark.usefixtures('one_thread')
LONG = '--model=gpt --max_iters=100000 --eval_interval=100000'


@pytest.fixture
def launch():
    started = []

    def start(*lines, **options):
        started.append(launch_tiny(*lines, **options))
        return started[-1]
    yield start
    for process in started:
        process.kill()


# --- a closed terminal

@POSIX
def test_a_closed_terminal_saves(here, launch):
    """Also where the terminal says it twice, and takes no words any more."""
    reading, writing = os.openpty()
    # also where these tests run under nohup, which has it ignored
    process = launch(LONG, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    wait_for_lines(process, 3)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(300) == 129
    assert load()['counters']['step'] == metrics()[-1]['step'] > 0
    assert sorted(os.listdir('out')) == ['ckpt.pt', 'metrics.jsonl']
    os.close(reading)
    os.close(writing)


@POSIX
def test_nohup_and_a_second_trainer(here, launch):
    """SIGHUP that is ignored stays so. Meanwhile the folder has one writer, whatever it is called."""
    process = launch(LONG, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_lines(process, 3)
    process.send_signal(signal.SIGHUP)
    os.symlink('out', 'link')
    for path in ('out', './out/', 'link'):
        with pytest.raises(SystemExit) as end:
            processes.hold(path)
        assert end.value.code == 2
    assert process.poll() is None
    before = len(metrics())
    wait_for_lines(process, before + 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    processes.hold('out')
    files.release()


def test_who_holds_a_folder_is_said(here, capsys, monkeypatch):
    def held(folder):
        raise files.Held(dict(pid=123, host='far', since='2026-01-01 10:00:00'))
    with monkeypatch.context() as patch:
        patch.setattr(files, 'hold', held)
        train('--model=gpt', status=2)
    err = capsys.readouterr().err
    assert err.startswith('error: out: process 123 on far, since 2026-01-01 10:00:00, is training there: wait for')
    assert err.count('\n') == 1 and '--out_dir' in err
    train('--model=gpt --max_iters=1')
    monkeypatch.setattr(files, 'hold', held)
    train('--eval_only')                                    # who only reads needs no leave


# --- a stdout that takes no more

class Failing:
    def __init__(self, number):
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))

    flush = isatty = fileno = lambda self: False


@pytest.mark.parametrize('number', [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_training_goes_on_without_stdout(here, capsys, monkeypatch, number):
    monkeypatch.setattr(sys, 'stdout', Failing(number))
    train('--model=gpt --max_iters=3')
    assert load()['counters']['step'] == 3
    err = capsys.readouterr().err
    assert err.startswith('note: standard output takes no more') and err.count('\n') == 1


@pytest.mark.parametrize('number, status', [(errno.EPIPE, 0), (errno.EIO, 0), (errno.ENOSPC, 2)])
def test_other_scripts_end_without_stdout(capsys, number, status):
    stream = console.Stream(Failing(number), console.end_of_stdout)
    with pytest.raises(SystemExit) as end:
        print('text', file=stream)
    assert end.value.code == status
    print('more', file=stream)                              # which nobody reads
    assert capsys.readouterr().err.count('\n') == (1 if status else 0)


@POSIX
def test_what_is_written_last_is_missed(tmp_path):
    """A disk that is full when the buffer is emptied, and a stdout that was closed from the beginning."""
    code = 'from mambino.console import end_quietly; end_quietly(); print("text")'
    env = {**os.environ, 'PYTHONPATH': ROOT}
    if os.path.exists('/dev/full'):
        with open('/dev/full', 'w') as full:
            run = subprocess.run([sys.executable, '-c', code], env=env, stdout=full, stderr=subprocess.PIPE, text=True)
        assert run.returncode == 2 and run.stderr.count('\n') == 1 and 'No space left' in run.stderr
    code += '; import os; f = open("a", "w"); assert f.fileno() > 2; os.write(1, b"a library"); print("b", flush=True)'
    run = subprocess.run(['sh', '-c', '"$@" >&-', 'sh', sys.executable, '-c', code], env=env, cwd=tmp_path)
    assert run.returncode == 0 and (tmp_path / 'a').read_text() == ''


@POSIX
def test_a_slow_reader_gets_every_line():
    """… also of a pipe that somebody has set not to block."""
    code = ('from mambino.console import end_quietly; end_quietly()\n'
            'for i in range(20000): print(i, "." * 20, flush=i % 100 == 0)')
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    run = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': ROOT}, stdout=writing)
    os.close(writing)
    time.sleep(0.3)
    with open(reading) as f:
        assert len(f.readlines()) == 20000
    assert run.wait() == 0


# --- torchrun

@POSIX
def test_processes_end_with_torchrun(here, launch):
    """Which was killed; the same command then goes on."""
    torchrun = 'torch.distributed.run --standalone --nproc_per_node=2'
    flags = '--model=gpt --max_iters=100000 --eval_interval=5'
    process = launch(flags, module=torchrun)
    wait_for_lines(process, 7)
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True)
    ranks = [int(pid) for pid in listed.stdout.split()]
    assert len(ranks) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 300
    while any(os.path.exists(f'/proc/{pid}') for pid in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(os.path.exists(f'/proc/{pid}') for pid in ranks)
    step = load()['counters']['step']
    assert step == metrics()[-1]['step']                    # they saved
    assert sorted(os.listdir('out')) == ['best.pt', 'ckpt.pt', 'metrics.jsonl']
    train('--model=gpt --eval_interval=5', f'--max_iters={step + 2}')
    assert load()['counters']['step'] == step + 2


BAD = {
    'RANK=abc': 'RANK=abc',
    'WORLD_SIZE=0': 'RANK=0 WORLD_SIZE=0',
    'WORLD_SIZE=2': 'WORLD_SIZE=2 and no RANK',
    'WORLD_SIZE=-1': 'WORLD_SIZE=-1',
    'RANK=1': 'RANK=1 WORLD_SIZE=1',
    'RANK=1 WORLD_SIZE=1': 'RANK=1 WORLD_SIZE=1',
    'RANK=2 WORLD_SIZE=2': 'RANK=2',
    'RANK=0 WORLD_SIZE=2': 'no MASTER_ADDR',
    'RANK=0 WORLD_SIZE=1 LOCAL_RANK=x': 'LOCAL_RANK=x',
    'RANK=0 WORLD_SIZE=1 LOCAL_RANK=3': 'LOCAL_RANK=3',
    'RANK= WORLD_SIZE=1': 'RANK=',
    'RANK=٣ WORLD_SIZE=4': 'RANK=',
}


@pytest.mark.parametrize('text', BAD)
def test_environments_that_cannot_be(capsys, text):
    with pytest.raises(SystemExit) as end:
        processes.read_environment(dict(part.split('=') for part in text.split()))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count('\n') == 1 and BAD[text] in err and 'torchrun' in err


def test_environments_that_can_be():
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    for environment, expected in (
            ({}, (0, 1, 0)),
            (dict(RANK='0'), (0, 1, 0)),
            (dict(RANK='3', WORLD_SIZE='4', LOCAL_RANK='1', **meeting), (3, 4, 1))):
        assert processes.read_environment(environment) == expected


def test_a_process_that_waits_for_others_ends_at_once(monkeypatch):
    """… where torchrun asks for it: no handler would run meanwhile."""
    seen = []
    monkeypatch.setattr(processes, 'WORLD', 2)
    monkeypatch.setattr(processes, 'summed', lambda *values: values)
    numbers = signal.SIGINT, signal.SIGTERM
    monkeypatch.setattr(processes.dist, 'init_process_group', lambda _: seen.extend(map(signal.getsignal, numbers)))
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        processes.start('cpu')
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    assert seen == [signal.SIG_DFL] * 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_kills(tmp_path):
    """Some of those of kills.py."""
    import kills
    code = f'import kills; assert not any(n for _, n in kills.main(16, 3, {str(tmp_path)!r}).values())'
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join((ROOT, os.path.dirname(kills.__file__))), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
