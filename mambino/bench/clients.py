"""Servers beside each other, as their clients see them: tokens a second, and the first token.

    python -m mambino.bench.clients ours=127.0.0.1:8000/out-mine llama.cpp=127.0.0.1:8080/any

Each argument is a name, where a server listens, and the model to ask for; all speak OpenAI's
completions. So many clients at once ask each of them for a prompt of `words` words, no two alike,
and read the stream of `tokens` tokens to its end. The servers take turns, one round each, so that a
machine whose speed drifts is unfair to none; a ratio is the median of those within a round, of the
first server to this one.
"""
import asyncio
import json
import keyword
import random
import sys
import time
from statistics import median

from mambino.configurator import configure, fail
from mambino.console import end_quietly

clients = '1,4,16'      # at once
words = 30              # of a prompt
tokens = 64             # of an answer
rounds = 3
extras = 'ignore_eos,stream_options'    # what is asked for beyond OpenAI's first parameters; a server
                                        # that knows none of it refuses: --extras=

inputs = []
end_quietly()
configure(globals(), positional='inputs')

EXTRAS = dict(ignore_eos=True, stream_options=dict(include_usage=True))
WORDS = [*keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names]


def server_of(argument):
    """name=host:port/model → (name, host, port, model)."""
    name, _, rest = argument.partition('=')
    place, _, model = rest.partition('/')
    host, _, port = place.rpartition(':')
    if not (name and host and port.isdecimal()):
        fail(f'{argument}: write it as name=127.0.0.1:8000/model')
    return name, host, int(port), model


def body_of(model, rng):
    """A request that no other one is equal to."""
    prompt = ' '.join(rng.choices(WORDS, k=words))
    wanted = {name: EXTRAS[name] for name in extras.split(',') if name}
    return dict(wanted, model=model, prompt=prompt, max_tokens=tokens, temperature=0.8, stream=True)


async def ask(host, port, body):
    """→ (seconds to the first token, tokens) of a request."""
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    head = (f'POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n'
            f'Content-Length: {len(data)}\r\nConnection: close\r\n\r\n')
    began = time.perf_counter()
    writer.write(head.encode() + data)
    status = await reader.readline()
    if b' 200 ' not in status:
        answer = await reader.read()
        fail(f'{host}:{port}: {status.decode().strip()}: {answer[-300:].decode(errors="replace")}')
    first = None
    events = 0
    usage = None
    while line := await reader.readline():
        if not line.startswith(b'data: {'):
            continue
        first = first or time.perf_counter() - began
        events += 1
        if b'"completion_tokens"' in line:
            usage = json.loads(line[6:])['usage'] or usage
    writer.close()
    return first, usage['completion_tokens'] if usage else events   # without usage a token is an event


async def load(server, n, seed):
    """→ (tokens a second, the middle of the times to the first token) of so many clients at once."""
    _, host, port, model = server
    rng = random.Random(seed)
    bodies = [body_of(model, rng) for _ in range(n)]
    began = time.perf_counter()
    answers = await asyncio.gather(*(ask(host, port, body) for body in bodies))
    seconds = time.perf_counter() - began
    return sum(count for _, count in answers) / seconds, median(first for first, _ in answers)


def main():
    if not inputs:
        fail('which servers? write them as name=127.0.0.1:8000/model')
    servers = [server_of(argument) for argument in inputs]
    width = max(len(name) for name, *_ in servers)
    try:
        for server in servers:
            asyncio.run(load(server, 1, seed=0))            # it may have to load, or to compile
        print(f'clients  {"":<{width}}  tokens/s  first token  {servers[0][0]} is')
        for n in map(int, clients.split(',')):
            results = [[] for _ in servers]
            for turn in range(rounds):
                for server, mine in zip(servers, results):
                    mine.append(asyncio.run(load(server, n, seed=1000 * n + turn)))
            for (name, *_), mine in zip(servers, results):
                ratio = median(first / other for (first, _), (other, _) in zip(results[0], mine))
                rate = median(rate for rate, _ in mine)
                wait = median(wait for _, wait in mine) * 1e3
                print(f'{n:7}  {name:<{width}}  {rate:8,.0f}  {wait:8,.0f} ms  {ratio:.2f}x as fast')
    except OSError as error:
        fail(f'no answer: {error}')


if __name__ == '__main__':
    main()
