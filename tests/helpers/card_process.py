"""Tests that run in processes of their own, each forked from one that has imported torch: what a pretended card changes
in torch stays in it for good.

    @on_card
    @pytest.mark.parametrize('name', ['gpt', 'mamba'])
    def test_a_model(tmp_path, name):           # the arguments go there pickled
        with pretended() as card:
            ...

Where there can be no card they are skipped, with the reason. What a test prints is shown if it fails.
"""
import atexit
import base64
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
SECONDS = 300                   # after which a test has failed
# without native.cpp, whose dropout draws other numbers than torch's
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1', 'MAMBINO_NATIVE': '0'}


def on_card(test):
    """The test in a process of its own."""

    @functools.wraps(test)
    def there(*args, **kwargs):
        if missing():
            pytest.skip(f'no pretended card: the CUDA paths are NOT tested ({missing()})')
        file = sys.modules[test.__module__].__file__
        arguments = base64.b64encode(pickle.dumps((args, kwargs))).decode()
        result = ask(dict(file=file, module=test.__module__, name=test.__qualname__, arguments=arguments,
                          folder=os.getcwd()))
        if result.get('skip') is not None:
            pytest.skip(result['skip'])
        if not result.get('ok'):
            pytest.fail(result['error'], pytrace=False)
    return there


@functools.cache
def missing():
    """Why there can be no pretended card here, or ''."""
    return ask({})['missing']


@functools.cache
def server():
    """The process that forks those of the tests. It ends with this one."""
    env = {**os.environ, **ENVIRONMENT, 'PYTHONPATH': os.pathsep.join((ROOT, TESTS))}
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', os.path.abspath(__file__)], cwd=ROOT, env=env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def ask(job):
    process = server()
    print(json.dumps(job), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


# --- in the server --------------------------------------------------------------------------------

def serve():
    """Reads a line of JSON for each test, and answers in a line what came of it."""
    import torch

    from helpers import card, card_device  # noqa: F401, to have it before the forks
    torch.set_num_threads(1)
    reason = card_device.missing() or trial()
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run_apart(job) if job else {'missing': reason}), flush=True)


def trial():
    """'' if this torch takes the card, else why not: it reaches into what torch does not promise."""
    child = os.fork()
    if not child:
        status = 1
        try:
            import torch

            from helpers.card import pretended
            with pretended():
                x = torch.ones(2, device='cuda', requires_grad=True)
                (x * 2).sum().backward()
                status = int(x.grad.tolist() != [2, 2])
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    import torch
    return f'torch {torch.__version__} does not take it, see helpers/card_device.py' if status else ''


def run_apart(job):
    """A test in a child."""
    with tempfile.TemporaryDirectory() as folder:
        said, result = os.path.join(folder, 'said'), os.path.join(folder, 'result')
        child = os.fork()
        if not child:
            become(job, said, result)
        _, status = os.waitpid(child, 0)
        with open(said, encoding='utf-8', errors='replace') as f:
            text = f.read()[-6000:]
        try:
            with open(result, encoding='utf-8') as f:
                answer = json.load(f)
        except (OSError, ValueError):
            answer = dict(error=f'the process ended with status {os.waitstatus_to_exitcode(status)}')
    if answer.get('error'):
        answer['error'] += f'\n--- what it said:\n{text}'
    return answer


def become(job, said, result):
    """The child: runs the test, writes what came of it, and ends."""
    import importlib.util
    import signal
    import traceback
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.alarm(SECONDS)
    answer = {}
    try:
        os.chdir(job['folder'])
        sys.argv = ['pytest']
        spec = importlib.util.spec_from_file_location(job['module'], job['file'])
        module = importlib.util.module_from_spec(spec)
        sys.modules[job['module']] = module
        spec.loader.exec_module(module)
        args, kwargs = pickle.loads(base64.b64decode(job['arguments']))
        getattr(module, job['name']).__wrapped__(*args, **kwargs)
        answer = dict(ok=True)
    except pytest.skip.Exception as error:
        answer = dict(skip=str(error))
    except BaseException:
        answer = dict(error=traceback.format_exc(limit=-12))
    with open(result, 'w', encoding='utf-8') as f:
        json.dump(answer, f)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == '__main__':
    serve()
