"""Large pages of memory for tensors that are read whole, again and again: a finished model's
weights, for each token.

    gather(net.parameters())

A processor keeps the addresses of some thousand pages. On pages of 4 KB it looks up an address for
each 4 KB that it reads, which costs a third to a half of the time; on pages of 2 MB hardly any.
Linux gathers the small pages of a large one where it is told to; the tensors have their addresses
and numbers as before.
"""
import ctypes
import functools
import os
import sys
from collections import Counter

HUGEPAGE, COLLAPSE = 14, 25     # of madvise: some time, which Linux 4 knows, and now, which 6.1 does
SETTINGS = '/sys/kernel/mm/transparent_hugepage'
COVERED = 0.5                   # of a large page, at least, is a tensor's: the rest may take memory for nothing


@functools.cache
def large_page():
    """Bytes of a large page; 0 where the system has none, or wants none used."""
    if sys.platform != 'linux':
        return 0
    try:
        with open(os.path.join(SETTINGS, 'enabled'), encoding='ascii') as f:
            wanted = '[never]' not in f.read()
        with open(os.path.join(SETTINGS, 'hpage_pmd_size'), encoding='ascii') as f:
            return int(f.read()) * wanted
    except (OSError, ValueError):
        return 0


@functools.cache
def madvise():
    """The C library's function of this name: (address, bytes, advice) → 0, or -1 if that cannot be."""
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def gather(tensors):
    """Has the memory of these tensors, contiguous and on the CPU, in large pages, where half of one
    is theirs. Takes 0.4 ms for each page of 2 MB (a virtual machine that must first get it from its
    host, some), and hardly anything where it has been done. Returns how many there are."""
    size = large_page()
    if not size:
        return 0
    covered = Counter()                                             # {number of a large page: bytes}
    for begin, length in {(tensor.data_ptr(), tensor.nbytes) for tensor in tensors}:
        end = begin + length
        for page in range(begin // size, -(-end // size)):
            covered[page] += min(end, (page + 1) * size) - max(begin, page * size)
    done = 0
    for page, length in covered.items():
        if length >= COVERED * size:
            gathered = madvise()(page * size, size, COLLAPSE) == 0
            if not gathered:
                madvise()(page * size, size, HUGEPAGE)
            done += gathered
    return done

