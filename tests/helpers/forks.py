"""Runs of the scripts in processes of their own, made in a tenth of the time.

A process that has imported what a script imports, torch most of all, forks one or more for each
run: python alone would take a second for prepare.py and three for train.py, torchrun six. A process
that is to be killed or told to stop does it to itself, at a place of the program and not at a time
of the clock: it executes some statements before it begins.
"""
import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
IMPORTS = {
    'prepare.py': '''
import numpy, pyarrow.parquet, tiktoken, tokenizers
from mambino.prepare import account, corpus, extract, files, isolate, output, pool, report, screen, sources, spool
from mambino.prepare import stdlib, survey, trial, unused, vocabulary
''',
    # torch.distributed's take a second; of ours, `processes` has read the rank when it was imported
    'train.py': '''
import torch
import torch._dynamo, torch.distributed.checkpoint
import torch.distributed.device_mesh, torch.distributed.fsdp, torch.distributed.tensor
from mambino.train import begin, evaluation, loader, memory, metrics, processes, progress
from mambino.weights import adapters, checkpoint
torch.set_num_threads(1)
''',
}
# It reads a line of JSON for each run, and answers with its exit statuses.
SERVER = '''
import atexit, importlib, json, os, runpy, signal, sys
exec(sys.argv[1])
script = sys.argv[2]
children = {}                                               # {process id: rank}
signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, 9) for pid in children])
for line in sys.stdin:
    folder, texts, environment, port, world, argv, before = json.loads(line)
    signal.alarm(600)                                       # they wait for each other
    for rank in range(world):
        if not (pid := os.fork()):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, 'out'), (2, 'err')):
                os.dup2(os.open(f'{texts}/{name}{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if port:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
                                  MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE='True')
                importlib.reload(processes)
            sys.argv = [script, *argv]
            sys.path[0] = os.path.dirname(script)
            status = 1
            try:
                exec(before)
                runpy.run_path(script, run_name='__main__')
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                if not port:
                    atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children[pid] = rank
    statuses = {}
    while len(statuses) < world:
        pid, status = os.wait()
        statuses[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if os.WIFSIGNALED(status):                          # as torchrun does
            [os.kill(pid, 9) for pid in children]
    signal.alarm(0)
    print(json.dumps([statuses[rank] for rank in range(world)]), flush=True)
'''
ENVIRONMENT = {'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1'}
can_fork = hasattr(os, 'fork')


@functools.cache
def server(script):
    """The process that forks those that run a script. It ends with this one."""
    env = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, '-W', 'ignore', '-c', SERVER, IMPORTS[script], os.path.join(ROOT, script)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def run(script, folder, argv, before='', world=1, port=0):
    """So many processes run a script in a folder, each after the statements `before`, which know
    `rank`. port: of the TCPStore where they meet, as those that torchrun starts. Returns (their
    exit statuses, what they said: [out, err] of the first, and so on)."""
    process = server(script)
    with tempfile.TemporaryDirectory() as texts:
        job = [str(folder), texts, {**os.environ, **ENVIRONMENT}, port, world, argv, before]
        print(json.dumps(job), file=process.stdin, flush=True)
        statuses = json.loads(process.stdout.readline())
        said = []
        for rank in range(world):
            for name in ('out', 'err'):
                with open(f'{texts}/{name}{rank}', encoding='utf-8') as f:
                    said.append(f.read())
    return statuses, said
