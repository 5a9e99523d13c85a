"""The memory of a pretended card: what is alive of what the program made there, and at most so far.

As torch's allocator it rounds each tensor up to blocks; it has no holes, and keeps nothing of what is freed.
"""
import weakref

import torch

BLOCK = 512             # bytes, of which an allocation takes whole ones
CONTEXT = 2**29         # bytes that a CUDA context takes before the first tensor


class Memory:
    """total: bytes of the card."""

    def __init__(self, total):
        self.total = total
        self.fraction = 1.0             # of it that this process may have
        self.alive = self.peak = 0
        self.blocks = {}                # {address of a storage: (bytes, what tells of its end)}

    @property
    def limit(self):
        return int((self.total - CONTEXT) * self.fraction)

    @property
    def free(self):
        return max(0, self.limit - self.alive)

    def add(self, tensor):
        """Counts the storage of a tensor, until it is gone. torch.OutOfMemoryError if it is too much."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.blocks:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if size > self.free:
            raise out_of_memory(size, self)
        self.blocks[key] = size, weakref.ref(storage, lambda _: self.remove(key))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def remove(self, key):
        size, _ = self.blocks.pop(key)
        self.alive -= size

    def reset_peak(self):
        self.peak = self.alive


def out_of_memory(size, memory):
    """torch's error, in its words."""
    gibibytes = [f'{n / 2**30:.2f} GiB' for n in (size, memory.total, memory.free)]
    return torch.OutOfMemoryError(
        'CUDA out of memory. Tried to allocate {}. GPU 0 has a total capacity of {} of which {} is free.'
        .format(*gibibytes))
