"""Processes that the page starts: train.py here is a stand-in, which says a word and waits; test_page_runs.py has
the real one."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers.runs import POSIX

from mambino import files
from mambino.serve import launch, runs

PATIENCE = 30
STAND_IN = '''
import signal, sys, time
def end(*_):
    print('stopped at step 3, saved out-a/ckpt.pt; to go on: python train.py', flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print('hello', *sys.argv[1:], flush=True)
if '--max_iters=1' in sys.argv:
    sys.exit(0)
while True:
    time.sleep(0.05)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which train.py is the stand-in; what was started ends with the test."""
    (tmp_path / 'bin').mkdir()
    for script in ('train.py', 'prepare.py'):
        (tmp_path / 'bin' / script).write_text(STAND_IN)
    monkeypatch.setattr(launch, 'script_path', lambda script: str(tmp_path / 'bin' / script))
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    yield tmp_path / 'here'
    for folder in launch.run_folders():
        if launch.holder(folder):
            os.kill(launch.holder(folder)['pid'], signal.SIGTERM)
            until(lambda folder=folder: not launch.holder(folder))


def until(condition):
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, 'it has not come'
        time.sleep(0.02)
    return value


def said(task):
    with open(task.log) as f:
        return f.read()


@pytest.mark.parametrize('name', ['', '..', '../x', 'a/b', '/etc', '.hidden', 'a b', '-x', 'a\0b', 'ä', 'a' * 99,
                                  '<img src=x>', 'x..y', 'a.'])
def test_names_that_are_none(name, here):
    for action in (launch.run_folder, launch.dataset_folder):
        with pytest.raises(launch.Refused):
            action(name)


def test_names_become_folders_of_runs_and_datasets(here):
    assert launch.run_folder(' mine ') == 'out-mine'
    assert launch.run_folder('out-mine') == 'out-mine'
    assert launch.run_folder('out') == 'out'
    assert launch.dataset_folder('mine') == os.path.join('data', 'mine')


def test_a_path_is_never_a_flag(here):
    (here / 'books' / 'old').mkdir(parents=True)
    for name in ('--out=etc', 'books/old/a.pdf', 'my [1].txt'):
        (here / name).touch()
        assert launch.input_path(name) == str(here / name)
    assert launch.input_path('hf:owner/name') == 'hf:owner/name'
    assert launch.input_path('books/**/*.pdf') == str(here / 'books/**/*.pdf')
    assert launch.input_path(f' "{here}/books" ') == str(here / 'books')      # as file managers copy it
    for name in ('bok', 'books/**/*.txt', f'{here}/books/b.pdf'):
        with pytest.raises(launch.Refused, match='no such file or folder'):
            launch.input_path(name)
    with pytest.raises(launch.Refused):
        launch.input_path(' ')


@POSIX
def test_a_double_click_starts_one(here):
    task = launch.training('out-a')
    assert launch.train('a', ['--x=1'], 'click') == 'out-a'
    pid = launch.holder('out-a')['pid']
    launch.train('a', ['--x=1'], 'click')                       # the same form once more
    assert launch.holder('out-a')['pid'] == pid
    with pytest.raises(launch.Refused, match='at work there already'):
        launch.train('a', ['--x=1'], 'another form')
    with pytest.raises(launch.Refused, match='out-a is training'):
        launch.train('b', [], 'another name')
    until(lambda: 'hello --x=1 --out_dir=out-a' in said(task))
    assert said(task).startswith('$ python train.py --x=1 --out_dir=out-a\n')
    assert said(task).count('hello') == 1


@POSIX
def test_two_at_once_if_it_is_asked_for(here):
    launch.train('a', [])
    launch.train('b', [], beside=True)
    assert launch.trainings() == ['out-a', 'out-b']


@POSIX
def test_stopped_and_gone_on_with(here):
    task = launch.training('out-a')
    launch.train('a', ['config/x.py', '--device=cpu', '--n_layer=2'])
    until(lambda: 'hello' in said(task))
    launch.stop(task)
    until(lambda: not launch.holder('out-a'))
    with pytest.raises(launch.Refused, match='nothing is at work'):
        launch.stop(task)
    launch.resume('out-a')                                      # nothing was saved: the same command again
    until(lambda: said(task).count('hello') == 2)
    assert said(task).count('hello config/x.py --device=cpu --n_layer=2 --out_dir=out-a') == 2
    launch.stop(task)
    until(lambda: not launch.holder('out-a'))
    open('out-a/ckpt.pt', 'w').close()
    launch.resume('out-a', dict(max_iters=1))                   # its settings are in the checkpoint, but the machine's
    until(lambda: 'hello --init_from=resume --device=cpu --out_dir=out-a --max_iters=1' in said(task))


@POSIX
def test_it_is_in_a_session_of_its_own_and_reads_nothing(here):
    launch.train('a', [])
    pid = launch.holder('out-a')['pid']
    assert os.getsid(pid) == pid
    if os.path.exists(f'/proc/{pid}'):
        assert os.readlink(f'/proc/{pid}/fd/0') == os.devnull


@POSIX
def test_no_zombie_is_left(here):
    launch.train('a', ['--max_iters=1'])
    pid = launch.read_record(launch.training('out-a').record)['pid']
    until(lambda: not os.path.exists(f'/proc/{pid}'))


def test_a_lock_that_was_left_behind_holds_nothing(here):
    """One of a process that is gone; of a number that another process has now; of a machine that is gone."""
    os.mkdir('out-a')
    done = subprocess.Popen([sys.executable, '-c', ''])
    done.wait()
    for pid, host in ((done.pid, socket.gethostname()), (os.getpid(), socket.gethostname()), (1, 'elsewhere')):
        with open(os.path.join('out-a', files.LOCK), 'w') as f:
            json.dump(dict(pid=pid, host=host, since='now'), f)
        assert launch.holder('out-a') == {}
    with open(os.path.join('out-a', files.LOCK), 'w') as f:
        f.write('[1, 2')
    assert launch.holder('out-a') == {}


@POSIX
def test_a_lock_of_another_machine(here):
    """One that is locked, as on a disk that two machines share."""
    os.mkdir('out-a')
    path = os.path.join('out-a', files.LOCK)
    with open(path, 'w') as f:
        json.dump(dict(pid=1, host='elsewhere', since='now'), f)
    other = subprocess.Popen([sys.executable, '-c', 'import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); '
                              'print(1, flush=True); sys.stdin.read()', path],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        assert launch.holder('out-a')['host'] == 'elsewhere'
        with pytest.raises(launch.Refused, match='another machine, elsewhere'):
            launch.stop(launch.training('out-a'))
    finally:
        other.communicate(b'')


@POSIX
def test_only_runs_here_that_do_not_train_are_deleted(here):
    launch.train('a', [])
    for name in ('bin', '../bin', 'data', 'out-none', '.', '/tmp', 'out-a/../out-a'):
        with pytest.raises(launch.Refused, match='not a run'):
            launch.delete_run(name)
    with pytest.raises(launch.Refused, match='is training'):
        launch.delete_run('out-a')
    os.mkdir('out-b')
    open('out-b/metrics.jsonl', 'w').close()
    os.symlink('out-b', 'out-c')
    with pytest.raises(launch.Refused, match='not a run'):
        launch.delete_run('out-c')
    launch.delete_run('out-b')
    assert not os.path.exists('out-b')


def test_a_folder_that_cannot_be_made(here):
    open('out-a', 'w').close()
    with pytest.raises(launch.Refused, match='could not be started there'):
        launch.train('a', [])


@pytest.mark.parametrize('value', ['a\0b', 'a\ud800b'])
def test_what_cannot_stand_on_a_command_line(here, value):
    with pytest.raises(launch.Refused, match='command line'):
        launch.train('a', launch.flags(dict(dataset=value)))
    with pytest.raises(launch.Refused, match='command line'):
        launch.answer_of((launch.script_path('prepare.py'),), [value])
    assert not os.path.exists('out-a')


@POSIX
def test_a_log_is_written_through_no_link_and_into_no_pipe(here):
    (here / 'mine').write_text('mine')
    for name, plant in (('a', lambda path: os.symlink('../mine', path)), ('b', os.mkfifo)):
        os.mkdir(f'out-{name}')
        plant(f'out-{name}/train.log')
        with pytest.raises(launch.Refused, match='could not be started there'):
            launch.train(name, [])
    assert (here / 'mine').read_text() == 'mine'


@POSIX
def test_nobody_waits_for_a_pipe_in_the_place_of_a_file(here):
    os.mkdir('out-a')
    for name in ('started.json', 'train.lock', 'metrics.jsonl', 'train.log'):
        os.mkfifo(f'out-a/{name}')
    assert launch.trainings() == []
    assert runs.summary('out-a')['step'] == 0


@POSIX
def test_who_starts_what_is_being_deleted_finds_no_folder(here, monkeypatch):
    import threading
    os.mkdir('out-a')
    open('out-a/metrics.jsonl', 'w').close()
    before, problems = launch.shutil.rmtree, []

    def start():
        try:
            launch.train('a', [])
        except launch.Refused as refusal:
            problems.append(refusal)

    def rmtree(folder):
        starter.start()
        starter.join(0.5)
        before(folder)

    starter = threading.Thread(target=start)
    monkeypatch.setattr(launch.shutil, 'rmtree', rmtree)
    launch.delete_run('out-a')
    starter.join()
    assert problems and not os.path.exists('out-a')


@POSIX
def test_a_process_of_which_nothing_can_be_written_down_ends(here, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(launch, 'write_record', full)
    started = []
    popen = subprocess.Popen

    def begin(*arguments, **more):
        started.append(popen(*arguments, **more))
        return started[0]

    monkeypatch.setattr(launch.subprocess, 'Popen', begin)
    with pytest.raises(launch.Refused, match='No space left'):
        launch.train('a', [])
    assert started[0].wait(PATIENCE) == -signal.SIGKILL


def test_what_takes_too_long_is_ended(here):
    with pytest.raises(launch.Refused, match='more than 1 seconds'):
        launch.answer_of((launch.script_path('prepare.py'),), [], seconds=1)
    status, text = launch.answer_of((launch.script_path('prepare.py'),), ['--max_iters=1'])
    assert (status, text) == (0, 'hello --max_iters=1\n')


def test_what_is_to_be_typed_is_what_there_is(monkeypatch):
    """Where pip has installed it, the page's command lines are those of the command."""
    assert launch.command_line('train.py', ['--out_dir=a b']) == "python train.py '--out_dir=a b'"
    monkeypatch.setenv('MAMBINO_COMMAND', 'mambino')
    assert launch.command_line('train.py', ['--out_dir=a b']) == "mambino train '--out_dir=a b'"


@POSIX
def test_what_was_stopped_before_it_said_a_word_was_not_killed(here):
    """And what was killed by somebody else was."""
    task = launch.training('out-a')
    for number, state in ((None, 'stopped'), (signal.SIGKILL, 'killed')):
        launch.train('a', ['--x=1'])
        until(lambda: 'hello' in said(task).rpartition('$ ')[2])
        assert runs.standing('out-a').words.startswith('Starting since')
        if number:
            os.kill(launch.holder('out-a')['pid'], number)
        else:
            launch.stop(task, at_once=True)
        until(lambda: not launch.holder('out-a'))
        assert runs.standing('out-a').state == state
