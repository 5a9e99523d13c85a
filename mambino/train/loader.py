"""Brings the batches: each is read, and copied to the device, by a thread while the one before it
is computed.

    loader = Loader(data, block_size, seed, device, sequences=32)
    loader.seek(tokens_seen, micro_batch=8)     # the step after so many tokens: 4 micro-batches
    x, y, weight = loader.next()                # (8, T) each; how much their mean loss counts
    idx, targets, factors, weight = …           # where a model learns tokens that are hidden: see holes.py

Where some tokens are not learned, micro-batches have different numbers of targets. The weights make
the sum of their losses, and so the gradient, that of all targets of a step alike, however it is
cut; where all are learned they are 1.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mambino import machine
from mambino.holes import draws
from mambino.train.objective import spread


class Loader:
    """This process's micro-batches in the order in which they are computed. sequences: its share of
    a step's."""

    def __init__(self, data, block_size, seed, device, sequences, rank=0, world=1, hide=None, carried=None):
        self.hide = hide                # of holes.hiding
        self.carried = carried          # the states between windows, which are told when a step begins
        self.data, self.block_size, self.seed, self.device = data, block_size, seed, device
        self.sequences, self.rank, self.world = sequences, rank, world
        self.counted = None, 0  # the step whose targets were counted last, and how many there are
        self.thread = ThreadPoolExecutor(1)

    def seek(self, tokens_seen, micro_batch):
        """Begins anew with the step after so many tokens, cut into micro-batches of so many
        sequences."""
        self.micro_batch = micro_batch
        self.micro_steps = self.sequences // micro_batch
        # the number of the step's first sequence, of all processes'
        self.step_start = tokens_seen // self.block_size
        self.offset = 0  # how many of this process's sequences have been asked for
        if self.carried:
            self.carried.again(self.step_start)
        self.coming = self.thread.submit(self.fetch, self.step_start, self.offset)

    def next(self):
        """x, y (micro_batch, T) int64 on the device, or what `hide` makes of them, and the weight of their
        loss; begins to fetch those that come after."""
        batch = self.coming.result()
        if self.carried and self.offset == 0:
            self.carried.begin(self.step_start)
        self.offset += self.micro_batch
        if self.offset == self.sequences:
            self.offset = 0
            self.step_start += self.sequences * self.world
        self.coming = self.thread.submit(self.fetch, self.step_start, self.offset)
        return batch

    def peek(self):
        """What `next` will return, but the weight."""
        return self.coming.result()[:-1]

    def fetch(self, step_start, offset):
        first = step_start + self.rank * self.sequences + offset
        indices = np.arange(first, first + self.micro_batch)
        batch = x, y = self.data.batch(indices, self.block_size, self.seed)
        weight = self.weight_of(y, step_start)
        if self.hide is not None:
            u = spread(self.seed, step_start, indices, self.sequences * self.world)
            idx, targets, factors = self.hide(x, y, u, draws(self.seed, indices, self.block_size))
            learned = max(1, int((y >= 0).sum())) * (self.block_size - 1) / self.block_size
            batch = idx, targets, factors / learned
        return *(machine.sent(tensor, self.device) for tensor in batch), weight

    def weight_of(self, y, step_start):
        """The share of a micro-batch's targets in those of its step, of all processes, times their
        number: 1 where all are alike."""
        n = self.sequences * self.world
        if self.counted[0] != step_start:
            step = np.arange(step_start, step_start + n)
            self.counted = step_start, self.data.learned(step, self.block_size, self.seed)
        micro_batches = n // self.micro_batch
        return int((y >= 0).sum()) * micro_batches / max(1, self.counted[1])
