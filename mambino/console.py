"""The ends of a program that nobody planned: Ctrl-C, and a reader or a disk under stdout that takes
no more. None of them leaves a traceback.

    end_quietly()           # the first line of a script that does anything
"""
import atexit
import errno
import os
import sys


def end_quietly():
    """From here on Ctrl-C ends the program with status 130 and a word, a reader such as `head` that
    has read enough with status 0 and none, a full disk under stdout with status 2 and a line."""
    sys.excepthook = end_of
    atexit.register(flush)


def end_of(kind, error, trace):
    """As sys.excepthook; ends the process for what end_quietly() names."""
    if issubclass(kind, KeyboardInterrupt):
        flush()
        print('\ninterrupted', file=sys.stderr, flush=True)
        os._exit(130)
    if issubclass(kind, OSError) and error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):
        silence(sys.stdout)
        if error.errno == errno.EPIPE:
            os._exit(0)
        print(f'error: standard output cannot be written to: {error.strerror}', file=sys.stderr, flush=True)
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


def flush():
    """Writes what is left for stdout; where nobody takes it any more, nothing is said of that."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except (OSError, ValueError):
        silence(sys.stdout)


def silence(stream):
    """From here on a stream goes nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError, AttributeError):
        pass
