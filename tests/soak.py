"""Asks a server for long, as many clients at once do, of whom some leave in the middle and some send what is
no request; and looks whether it stays as it was: memory, open files and sockets, threads, /health.

    python tests/soak.py --requests=10000
    python tests/soak.py --requests=10000 --clients=32 --model=out-mamba    # a run of yours; '': a tiny one

serve.py is a process of its own, on a port that is free. The first fifth of the requests warms it up: what
it has then, it must have in the end, but for GROWTH of memory.
"""
import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
TINY = os.path.join(TESTS, 'data', 'before', 'gpt')
CUT_OFF = 0.10          # of the requests
MALFORMED = 0.05
SECONDS = 120           # that one request may take
GROWTH = 24             # MB
POOL = 40               # threads that come and go as they are needed
WARM = 0.2              # of the requests, after which nothing may grow
WORDS = ('at', 'in', 'to', 'a', 'on in at', 'no, at', 'e' * 40)


class Process:
    """serve.py in a folder."""

    def __init__(self, folder, *flags):
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT}
        command = [sys.executable, os.path.join(ROOT, 'serve.py'), '--page=false', '--port=0', '--device=cpu', *flags]
        self.log = os.path.join(folder, 'serve.log')
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 120
        while 'loaded' not in self.said():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(self.said())
            time.sleep(0.05)
        self.port = int(re.search(r'API +http://127\.0\.0\.1:(\d+)', self.said())[1])

    def said(self):
        with open(self.log) as f:
            return f.read()

    def is_healthy(self):
        try:
            return urllib.request.urlopen(f'http://127.0.0.1:{self.port}/health', timeout=30).status == 200
        except OSError:
            return False

    def numbers(self):
        """{'MB', 'files', 'threads', 'rows'} as they are now; files: sockets are such, too."""
        with open(f'/proc/{self.process.pid}/status') as f:
            status = f.read()
        figures = urllib.request.urlopen(f'http://127.0.0.1:{self.port}/metrics', timeout=30).read().decode()
        rows = sum(float(n) for n in re.findall(r'mambino_model_(?:rows_used|queue){.*} (\S+)', figures))
        return dict(
            MB=int(re.search(r'VmRSS:\s*(\d+)', status)[1]) / 1024,
            files=len(os.listdir(f'/proc/{self.process.pid}/fd')),
            threads=int(re.search(r'Threads:\s*(\d+)', status)[1]),
            rows=int(rows),
        )

    def settled(self, rows=0, seconds=20):
        """The numbers, once no row is taken and all connections are closed, as far as that comes."""
        end = time.monotonic() + seconds
        numbers = [self.numbers()]
        while time.monotonic() < end:
            time.sleep(0.3)
            numbers.append(self.numbers())
            if numbers[-1]['rows'] <= rows and numbers[-1]['files'] == numbers[-2]['files']:
                break
        return numbers[-1]

    def end(self):
        """Its status, after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


# --- requests -------------------------------------------------------------------------------------

def question(rng):
    """→ (path, body) of something that a client asks."""
    prompt = ' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))
    body = dict(max_tokens=rng.randint(1, 24), seed=rng.randrange(1000), stream=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.6:
        return '/v1/completions', dict(body, prompt=prompt, n=rng.choice((1, 1, 1, 2)))
    if kind < 0.75:
        return '/v1/completions', dict(prompt=[prompt, 'at'], max_tokens=1, logprobs=1, echo=True, temperature=0)
    if kind < 0.85:
        return '/v1/chat/completions', dict(body, messages=[dict(role='user', content=prompt)])
    if kind < 0.95:
        return '/score', dict(text=prompt, top=2)
    return '/tokenize', dict(prompt=prompt)


def request_of(path, raw, more=0):
    """The bytes of a request. more: of the body that are promised and do not come."""
    head = f'POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n'
    return f'{head}Content-Length: {len(raw) + more}\r\n\r\n'.encode() + raw


def malformed(rng):
    """The bytes of what is no request, or none that can be answered."""
    path, body = question(rng)
    raw = json.dumps(body).encode()
    return rng.choice((
        rng.randbytes(200) + b'\r\n\r\n',
        request_of(path, raw[:-rng.randrange(1, 20)]),
        request_of(path, json.dumps(dict(body, max_tokens='many', prompt=5, messages=7, text=[], top='x')).encode()),
        request_of('/v1/' + 'x' * rng.randrange(200), raw),
        request_of(path, b'{"prompt": "' + b'x' * 9_000_000 + b'"}'),
    ))


async def exchange(port, data, cut_off=None):
    """→ what a server answers to some bytes. cut_off: after so many seconds the client is gone."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    try:
        writer.write(data)
        if cut_off is not None:
            await asyncio.sleep(cut_off)
            return b''
        try:
            await writer.drain()
        except ConnectionError:             # it has answered before it has read all
            pass
        return await reader.read(-1)
    except ConnectionError:
        return b''
    finally:
        writer.close()


async def ask(port, n, seed):
    """Request n → (its kind, the status that came, seconds)."""
    rng = random.Random(f'{seed}.{n}')
    began = time.perf_counter()
    kind = rng.random()
    if kind < CUT_OFF:
        path, body = question(rng)
        raw = json.dumps(dict(body, max_tokens=2000, ignore_eos=True)).encode()
        promised = rng.choice((0, 0, 0, 50))
        await exchange(port, request_of(path, raw, promised), rng.random() * 0.1)
        return 'cut off', 0, 0.0
    if kind < CUT_OFF + MALFORMED:
        answer = await exchange(port, malformed(rng))
        return 'malformed', status_of(answer), 0.0
    path, body = question(rng)
    answer = await asyncio.wait_for(exchange(port, request_of(path, json.dumps(body).encode())), SECONDS)
    is_whole = not body.get('stream') or b'data: [DONE]' in answer
    return 'sound', status_of(answer) if is_whole else 'cut short', time.perf_counter() - began


def status_of(answer):
    return int(answer[9:12]) if answer[9:12].isdigit() else 0


async def soak(server, numbers, clients, seed):
    """→ (Counter of (kind, status), seconds of each sound one)."""
    statuses, seconds = Counter(), []
    numbers = iter(numbers)

    async def client():
        for n in numbers:
            kind, status, took = await ask(server.port, n, seed)
            statuses[kind, status] += 1
            if kind == 'sound':
                seconds.append(took)

    await asyncio.gather(*(client() for _ in range(clients)))
    return statuses, seconds


def problems_of(statuses, before, after, status):
    """What is not as it should be, a list of lines."""
    problems = [f'{number} {kind} requests had the status {code}' for (kind, code), number in statuses.items()
                if kind == 'sound' and code != 200 or kind == 'malformed' and code >= 500]
    if after['MB'] > before['MB'] + GROWTH:
        problems.append(f'memory grew from {before["MB"]:.0f} to {after["MB"]:.0f} MB')
    problems += [f'{name} grew from {before[name]} to {after[name]}' for name, more in (('files', 2), ('threads', POOL))
                 if after[name] > before[name] + more]
    if after['rows']:
        problems.append(f'{after["rows"]} rows are taken, and nobody waits for them')
    if status:
        problems.append(f'it ended with status {status}')
    return problems


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run(requests=10000, clients=16, model='', seed=1):
    """Prints what came; returns the problems."""
    model = os.path.abspath(model or TINY)
    with tempfile.TemporaryDirectory() as folder:
        if model == TINY:
            shutil.copytree(TINY, os.path.join(folder, 'tiny'))
            model = os.path.join(folder, 'tiny')
        # states that are kept fill their memory in the first fifth, and are no leak
        server = Process(folder, f'--out_dir={model}', '--kept_memory=0.002')
        try:
            first = int(requests * WARM)
            statuses, _ = asyncio.run(soak(server, range(first), clients, seed))
            before = server.settled()
            began = time.perf_counter()
            more, seconds = asyncio.run(soak(server, range(first, requests), clients, seed))
            took = time.perf_counter() - began
            statuses += more
            after = server.settled()
            is_healthy = server.is_healthy()
            status = server.end()
            said = server.said()
        finally:
            server.process.kill()
            server.process.wait()
    print(f'{requests} requests of {clients} clients; of {requests - first} {(requests - first) / took:.0f} a second')
    for (kind, code), number in sorted(statuses.items(), key=str):
        print(f'  {kind:<10} {code or "-":>4} {number:>7,}')
    print(f'  seconds    p50 {percentile(seconds, 0.5):.3f}, p95 {percentile(seconds, 0.95):.3f}, '
          f'most {max(seconds):.3f}')
    for name in ('MB', 'files', 'threads', 'rows'):
        print(f'  {name:<10} {before[name]:,.0f} → {after[name]:,.0f}')
    problems = problems_of(statuses, before, after, status)
    if not is_healthy:
        problems.append('/health is not what it should be')
    if 'Traceback' in said:
        problems.append(said[-3000:])
    for problem in problems:
        print(problem)
    return problems


if __name__ == '__main__':
    options = dict(flag.removeprefix('--').split('=', 1) for flag in sys.argv[1:])
    whole = {name: int(value) for name, value in options.items() if name != 'model'}
    sys.exit(1 if run(**whole, model=options.get('model', '')) else 0)
