"""How long a token takes, and what is kept of a text, as the text grows."""
import math
import statistics
import time

import torch

from mambino.bench.evidence.learning import bytes_of
from mambino.bench.evidence.losses import MODELS
from mambino.sample import decode
from mambino.sample.generation import is_cache

POSITIONS = 100, 4_000, 100_000
TOKENS = 41         # of which the middle one is told; the first ones find their plan


@torch.no_grad()
def state_at(net, n):
    """A state after n tokens, of which the last 100 were read; what stands in a cache of the others takes no part in
    how long a token takes."""
    _, state = net.step(torch.zeros(1, 100, dtype=torch.long))
    room = 1 << math.ceil(math.log2(n + TOKENS + 1))
    has_rings = getattr(net.config, 'window', 0) > 0
    for name, value in state.items():
        if is_cache(name) and not has_rings:
            state[name] = torch.randn(*value.shape[:2], max(room, value.shape[2]), value.shape[3])
    state['pos'] = torch.tensor([n])
    return state


@torch.no_grad()
def milliseconds(net, n):
    """Of the middle one of some tokens after n others, as sample.py computes them."""
    state, times = state_at(net, n), []
    idx = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(TOKENS):
        begin = time.perf_counter()
        _, state = decode.step(net, idx, state)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def speed(runs, plan):
    """Milliseconds a token on one thread and the bytes that are kept of a text, after 100, 4,000 and 100,000 tokens of
    it, a GPT seeing all of them and the hybrid's attention the last 256; and of the training in `losses` tokens a
    second on one core, the share of its matrix products' speed, and the memory."""
    torch.set_num_threads(1)
    corpus, seed = plan.corpora[0], plan.seeds[0]
    positions = POSITIONS[:plan.times]
    yield ('| | training: tokens/s | MFU | GB | ' + ' | '.join(f'a token after {n:,}' for n in positions) + ' | '
           + ' | '.join(f'KB at {n:,}' for n in positions) + ' |')
    yield '| --- |' + ' --- |' * (3 + 2 * len(positions))
    for model in MODELS:
        name = f'{corpus} {model} {seed}'
        if name not in runs.results.lines:
            yield f'| {model} | run `--sections=losses` first |' + ' |' * (2 + 2 * len(positions))
            continue
        runs.used[name] = runs.results.lines[name]
        log = [line for line in runs.log(name) if 'mfu' in line]
        net = runs.model(name)[0].eval()
        times = [milliseconds(net, n) for n in positions]
        kept = [bytes_of(state_at(net, n), n) for n in positions]
        yield (f'| {model} | {runs.speed(name):,.0f} | {statistics.median(line["mfu"] for line in log):.0%} '
               f'| {max(line["memory"] for line in log) / 1e9:.1f} | ' + ' | '.join(f'{ms:.2f} ms' for ms in times)
               + ' | ' + ' | '.join(f'{n / 1000:,.0f}' for n in kept) + ' |')
