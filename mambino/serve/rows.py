"""Answers side by side: rows of one state of the model, made once, in which answers come and go.

    rows = Rows(net, most=16)
    row = rows.add(state, logits)           # of one prompt, copied into the first free row
    rows.logits[:rows.live]                 # (B, V) of what comes next
    rows.advance(ids)                       # (B,) one step of the model for all of them
    state = rows.state_of(row)              # a copy (1, …)
    rows.remove(row)                        # the last row moves into its place

    rows      0    1    2    3    4    5 …
            [ a  | b  | c  | d  |    |    ]     live = 4
    remove(1) [ a  | d  | c  |    |    |  ]     live = 3

The live rows are always the first ones, so that of each number of rows there is one plan (see
sample/decode.py), on a card one graph, for good: its addresses never change. On a CPU the memory of
a row is the system's until the row is first used, and that of a cache's slot until then.

Letters of the shapes: R rows, B live rows, S cache slots, V vocabulary.
"""
import math
import mmap
from contextlib import suppress

import torch

from mambino.cache import kept_as
from mambino.machine import available_memory
from mambino.sample.generation import is_cache, step

FIRST = 1024            # slots of a cache at first, where block_size is larger
PART = 0.8              # of the free memory that rows may take


def untouched(shape, dtype, device, large=False):
    """Zeros; on a CPU none of their memory is taken before it is written to. large: it is taken in
    large pages then, which are read sooner (see kernels/pages.py)."""
    count = math.prod(shape)
    if device.type != 'cpu' or not count:
        return torch.zeros(shape, dtype=dtype, device=device)
    private = {'flags': mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, 'MAP_PRIVATE') else {}
    room = mmap.mmap(-1, count * dtype.itemsize, **private)
    if large and hasattr(mmap, 'MADV_HUGEPAGE'):
        with suppress(OSError):                     # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=dtype).view(shape)


class Rows:
    """See the top of the file. most: rows that are wanted; there are fewer where memory has no room."""

    def __init__(self, net, most):
        self.net = net
        self.most = most
        self.live = 0
        idx = torch.zeros(1, 1, dtype=torch.long, device=next(net.parameters()).device)
        logits, like = step(net, idx)
        self.like = kept_as(like, net.state_dtype)  # a state of one row: names, shapes, dtypes
        self.begin = int(self.like['pos']) - 1      # positions before the first token: a prefix's
        self.pos = torch.zeros(most, dtype=torch.long)
        self.logits = untouched((most, logits.shape[-1]), logits.dtype, logits.device)
        self.window = getattr(net.config, 'window', 0)
        self.has_caches = any(map(is_cache, self.like))
        self.state = {}
        self.make(self.slots_for(0))
        net.plans = most + 8                        # of decode.py: one of each number of rows

    def slots_for(self, tokens):
        """How many slots caches need for so many tokens; 0 if there are none."""
        if not self.has_caches:
            return 0
        longest = self.window or self.net.config.block_size
        return longest if self.window else min(longest, max(FIRST, 1 << (self.begin + tokens - 1).bit_length()))

    def bytes_a_row(self, slots):
        """How much memory a row takes at most."""
        size = 3 * self.logits.shape[1] * 4
        for name, value in self.like.items():
            size += value.numel() * value.element_size() * (slots / value.shape[2] if is_cache(name) else 1)
        return int(size)

    def that_fit(self, slots):
        """How many rows with so many slots memory has room for, one at least."""
        there = available_memory(self.logits.device)
        if there is None:
            return self.most
        there += self.live * self.bytes_a_row(self.slots)
        return max(1, min(self.most, int(there * PART) // self.bytes_a_row(slots)))

    def make(self, slots):
        """The tensors of all rows, with caches of so many slots; live rows are copied."""
        before = self.state
        self.slots = getattr(self, 'slots', slots)
        self.room = self.that_fit(slots)
        self.slots = slots
        self.state = {}
        for name, value in self.like.items():
            if name == 'pos':
                continue
            shape = [self.room, *value.shape[1:]]
            if is_cache(name):
                shape[2] = slots
            large = not is_cache(name)              # whose slots may never be used
            self.state[name] = untouched(shape, value.dtype, value.device, large)
            if self.live:
                old = before[name][:self.live]
                self.state[name][tuple(map(slice, old.shape))] = old
        self.prefixes = {}                          # {B: the first B rows of the state}

    def has_room(self, tokens):
        """Whether one more row, of so many tokens at the end, can be added; caches grow for it.
        What no memory could hold is taken where nothing else is there."""
        if self.live >= self.room:
            return False
        slots = self.slots_for(tokens)
        if slots > self.slots:
            if self.live and self.that_fit(slots) <= self.live:
                return False
            self.make(slots)
        return True

    def add(self, state, logits):
        """Copies a state (1, …) and the logits (1, V) after it into a row; returns its number."""
        row = self.live
        for name, tensor in self.state.items():
            value = state[name][0]
            if is_cache(name):
                slots = min(value.shape[1], self.slots)
                tensor[row, :, :slots].copy_(value[:, :slots])
            else:
                tensor[row].copy_(value)
        self.pos[row] = state['pos'][0]
        self.logits[row].copy_(logits[0])
        self.live += 1
        return row

    def remove(self, row):
        """Takes a row out; the last one gets its number."""
        last = self.live - 1
        if row != last:
            filled = self.filled(last)
            for name, tensor in self.state.items():
                if is_cache(name):
                    tensor[row, :, :filled].copy_(tensor[last, :, :filled])
                else:
                    tensor[row].copy_(tensor[last])
            self.pos[row] = self.pos[last]
            self.logits[row].copy_(self.logits[last])
        self.live = last

    def filled(self, row):
        """How many slots of a row's caches hold something."""
        return self.slots if self.window else min(int(self.pos[row]), self.slots)

    def clear(self, row):
        """Takes the numbers out of a row: a nan that is not seen would still be one."""
        for tensor in self.state.values():
            tensor[row].zero_()

    def free(self):
        """Gives the memory of all rows back; they are of no use then."""
        self.state, self.prefixes = {}, {}
        self.live = 0

    def state_of(self, row):
        """A copy of a row's state (1, …), with caches of no more slots than it needs."""
        filled = self.filled(row)
        state = {'pos': self.pos[row:row + 1].clone()}
        for name, tensor in self.state.items():
            part = tensor[row:row + 1, :, :filled] if is_cache(name) else tensor[row:row + 1]
            state[name] = part.clone(memory_format=torch.contiguous_format)
        return state

    def advance(self, ids):
        """Reads one token of each live row, (B,), of the CPU or the device."""
        B = self.live
        if not self.logits.is_cuda:
            ids = ids.to(self.logits.device)
        if B not in self.prefixes:
            self.prefixes[B] = {name: tensor[:B] for name, tensor in self.state.items()}
        before = self.prefixes[B]
        state = {**before, 'pos': self.pos[:B]}
        if self.logits.is_cuda:
            _, after = step(self.net, ids[:, None], state, out=self.logits[:B])
        else:
            logits, after = step(self.net, ids[:, None], state)
            self.logits[:B] = logits[:, -1]
        for name, tensor in before.items():
            if after[name] is not tensor:           # net.step's way makes new ones
                tensor.copy_(after[name])
        self.pos[:B] = after['pos']
