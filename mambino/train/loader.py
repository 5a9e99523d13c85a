"""Brings the batches: each is read, and copied to the device, by a thread while the one before it
is computed.

    loader = Loader(data, block_size, seed, device, sequences=32)
    loader.seek(tokens_seen, micro_batch=8)     # the step after so many tokens: 4 micro-batches
    x, y = loader.next()                        # (8, T) each
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class Loader:
    """This process's micro-batches in the order in which they are computed. sequences: its share of
    a step's."""

    def __init__(self, data, block_size, seed, device, sequences, rank=0, world=1):
        self.data, self.block_size, self.seed, self.device = data, block_size, seed, device
        self.sequences, self.rank, self.world = sequences, rank, world
        self.thread = ThreadPoolExecutor(1)

    def seek(self, tokens_seen, micro_batch):
        """Begins anew with the step after so many tokens, cut into micro-batches of so many
        sequences."""
        self.micro_batch = micro_batch
        self.micro_steps = self.sequences // micro_batch
        # the number of the step's first sequence, of all processes'
        self.step_start = tokens_seen // self.block_size
        self.offset = 0  # how many of this process's sequences have been asked for
        self.coming = self.thread.submit(self.fetch, self.step_start, self.offset)

    def next(self):
        """x, y (micro_batch, T) int64 on the device; begins to fetch those that come after."""
        x, y = self.coming.result()
        self.offset += self.micro_batch
        if self.offset == self.sequences:
            self.offset = 0
            self.step_start += self.sequences * self.world
        self.coming = self.thread.submit(self.fetch, self.step_start, self.offset)
        return x, y

    def peek(self):
        """What `next` will return."""
        return self.coming.result()

    def fetch(self, step_start, offset):
        first = step_start + self.rank * self.sequences + offset
        indices = np.arange(first, first + self.micro_batch)
        x, y = self.data.batch(indices, self.block_size, self.seed)
        # pinned memory goes over while the GPU still works on the last batch
        if self.device.startswith('cuda'):
            x, y = x.pin_memory(), y.pin_memory()
            return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        return x.to(self.device), y.to(self.device)
