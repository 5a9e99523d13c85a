"""How long a token takes, and what is kept of a text, as the text grows."""
import math
import statistics
import time

import torch

from mambino.bench.evidence.learning import bytes_of
from mambino.bench.evidence.losses import at_hand, models_of
from mambino.sample import decode, generation
from mambino.sample.generation import is_cache

POSITIONS = 100, 4_000, 100_000
TOKENS = 41         # of which the middle one is told; the first ones find their plan


@torch.no_grad()
def state_at(net, n, sees_all=True):
    """A state after n tokens, of which the last ones were read; what stands in a cache of the others
    takes no part in how long a token takes."""
    if not sees_all:
        state = None
        for _ in range(0, min(n, 2 * net.config.block_size), 10):
            _, state = generation.step(net, torch.zeros(1, 10, dtype=torch.long), state)
        return state | dict(pos=torch.tensor([n]))
    _, state = net.step(torch.zeros(1, 100, dtype=torch.long))
    room = 1 << math.ceil(math.log2(n + TOKENS + 1))
    has_rings = getattr(net.config, 'window', 0) > 0
    for name, value in state.items():
        if is_cache(name) and not has_rings:
            state[name] = torch.randn(*value.shape[:2], max(room, value.shape[2]), value.shape[3])
    state['pos'] = torch.tensor([n])
    return state


@torch.no_grad()
def milliseconds(net, n, sees_all=True):
    """Of the middle one of some tokens after n others, as sample.py computes them; where sees_all, a
    GPT without its window."""
    state, times = state_at(net, n, sees_all), []
    idx = torch.zeros(1, 1, dtype=torch.long)
    step = decode.step if sees_all else generation.step
    for _ in range(TOKENS):
        begin = time.perf_counter()
        _, state = step(net, idx, state)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def speed(runs, plan):
    """Milliseconds a token on one thread and the bytes that are kept of a text, after 100, 4,000 and 100,000 tokens of
    it: of a GPT that sees all of them, and of one that sees the last 128, as sample.py has it; the hybrid's attention
    sees 256. And of the training in `losses` tokens a
    second on one core, the share of its matrix products' speed, and the memory."""
    torch.set_num_threads(1)
    corpus, seed = plan.corpora[0], plan.seeds[0]
    positions = POSITIONS[:plan.times]
    yield ('| | training: tokens/s | MFU | GB | ' + ' | '.join(f'a token after {n:,}' for n in positions) + ' | '
           + ' | '.join(f'KB at {n:,}' for n in positions) + ' |')
    yield '| --- |' + ' --- |' * (3 + 2 * len(positions))
    for model in models_of(corpus):
        name = at_hand(runs, f'{corpus} {model} {seed}')
        if name not in runs.results.lines:
            yield f'| {model} | run `--sections=losses` first |' + ' |' * (2 + 2 * len(positions))
            continue
        runs.used[name] = runs.results.lines[name]
        log = [line for line in runs.log(name) if 'mfu' in line]
        net = runs.model(name)[0].eval()
        trained = (f'{runs.speed(name):,.0f} | {statistics.median(line["mfu"] for line in log):.0%} '
                   f'| {max(line["memory"] for line in log) / 1e9:.1f}')
        ways = {model: True}
        if model == 'GPT':
            ways = {'GPT, seeing all': True, 'GPT, seeing 128': False}
        for words, sees_all in ways.items():
            times = [milliseconds(net, n, sees_all) for n in positions]
            kept = [bytes_of(state_at(net, n, sees_all), n) for n in positions]
            yield (f'| {words} | {trained} | ' + ' | '.join(f'{ms:.2f} ms' for ms in times) + ' | '
                   + ' | '.join(f'{n / 1000:,.0f}' for n in kept) + ' |')
