"""A small model that learns a task, and how often it is right: at the length it learned at, and beyond.

    line = learn(Setting(kind='mamba', config={…}, task='recall', lr=3e-3, steps=600))     # {'right': {'8': 0.99}, …}

As a program it reads a setting as JSON, and a device; and prints the line.
"""
import json
import sys
import time
from dataclasses import dataclass, field

import torch

from mambino.bench.evidence.tasks import TASKS, VOCABULARIES
from mambino.sample.generation import is_cache
from mambino.train.building import build_optimizers
from mambino.weights import checkpoint

TESTED = 256        # sequences, of each length or number of pairs


@dataclass
class Setting:
    kind: str
    config: dict
    task: str
    lr: float
    steps: int
    T: int = 128
    batch: int = 64
    seed: int = 1
    asked: list = field(default_factory=list)       # pairs of recall, lengths of the others


def asked_at(setting, step):
    """What a step asks: the trained length; of recall the numbers of pairs by turns, the few first,
    and more of them until half of the steps are made. All at once, a GPT learns none of them."""
    if setting.task != 'recall':
        return setting.T
    pairs = sorted(setting.asked)
    there = pairs[:1 + 2 * len(pairs) * step // setting.steps]
    return there[step % len(there)]


def batch_of(setting, generator, asked, n):
    """(idx, targets) of a task, of so many tokens; of recall with so many pairs, each some twice."""
    make = TASKS[setting.task]
    if setting.task == 'recall':
        return make(n, 4 * asked, generator, pairs=asked)
    return make(n, asked, generator)


@torch.no_grad()
def right(net, setting, asked, device='cpu'):
    """The share of the answers that are right."""
    idx, targets = batch_of(setting, torch.Generator().manual_seed(0), asked, TESTED)
    hits = counted = 0
    for x, y in zip(idx.split(32), targets.split(32)):
        guess = net(x.to(device))[0].argmax(-1).cpu()
        hits += int(((guess == y) & (y >= 0)).sum())
        counted += int((y >= 0).sum())
    return hits / counted


def bytes_of(state, n):
    """Of the state after n tokens, without the room for more."""
    used = [value[:, :, :n] if is_cache(name) else value for name, value in state.items() if name != 'pos']
    return sum(value.numel() * value.element_size() for value in used)


def learn(setting, device='cpu'):
    """What a model of this setting learns, drawn on the CPU whatever the device."""
    torch.manual_seed(setting.seed)
    vocab = VOCABULARIES[setting.task]
    net = checkpoint.build(setting.kind, dict(vocab_size=vocab, block_size=setting.T, **setting.config)).to(device)
    optimizers = build_optimizers(net, 'muon', setting.lr)
    generator = torch.Generator().manual_seed(setting.seed)
    begin = time.perf_counter()
    for step in range(setting.steps):
        idx, targets = batch_of(setting, generator, asked_at(setting, step), setting.batch)
        height = min(1.0, (step + 1) / 50, 2.5 * (1 - step / setting.steps))       # up, level, and down at last
        for group in (group for opt in optimizers for group in opt.param_groups):
            group['lr'] = setting.lr * height
        loss = net(idx.to(device), targets.to(device))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad()
    seconds = time.perf_counter() - begin
    net.eval()
    shares = {str(asked): right(net, setting, asked, device) for asked in setting.asked}
    _, state = net.cpu().step(torch.zeros(1, setting.T, dtype=torch.long))
    return dict(right=shares, loss=loss.item(), seconds=seconds, parameters=net.num_params(),
                state=bytes_of(state, setting.T))


if __name__ == '__main__':
    print(json.dumps(learn(Setting(**json.loads(sys.argv[1])), sys.argv[2])))
