"""Two folders change places at once, so that whoever opens one of them finds it, at any moment.

    if not exchange.exchange('out.partial/dataset', 'out'): ...    # this system cannot
"""
import ctypes
import os
import sys

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # of Linux' renameat2,
RENAME_SWAP = 2      # and of renamex_np on macOS


def exchange(a, b):
    """Whether the two paths, which there are, have changed places; where not, nothing has happened."""
    a, b = os.fsencode(a), os.fsencode(b)
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == 'linux':
            return libc.renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0
        if sys.platform == 'darwin':
            return libc.renamex_np(a, b, RENAME_SWAP) == 0
    except (OSError, AttributeError, TypeError):  # no such library, or one of before
        pass
    return False
