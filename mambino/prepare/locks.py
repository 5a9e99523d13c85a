"""A file that one process at a time holds.

    lock = locks.take('out.partial/prepare.lock')    # until it is closed, or the process ends; Held: by whom
"""
import contextlib
import os
import socket

from mambino import files


class Held(Exception):
    """Another process has it; the message is which: ' (process 123 on host)', or '' where nobody can tell."""


def take(path):
    """The file, open and locked; its folder is made. On file systems without locks it is only open."""
    while True:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            lock = open(path, 'a+', encoding='utf-8', errors='replace')  # a host's name may be anything
        except FileNotFoundError:  # who had it before was just done, and has removed it
            continue
        close_unless_mine(lock)
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        lock.close()  # the same: nobody else will find this one
    with contextlib.suppress(OSError):  # it is only to be said, and on a full disk not even that
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {socket.gethostname()}')
        lock.flush()
    return lock


def close_unless_mine(lock):
    """Locks an open file; Held, and it is closed, where another process has it. Some network file systems have
    no locks."""
    if files.lock(lock.fileno()) is False:
        holder = holder_of(lock)
        lock.close()
        raise Held(holder)


def holder_of(lock):
    """Who has locked an open file, as the message of Held."""
    try:
        lock.seek(0)
        said = lock.read(200)
    except (OSError, ValueError):
        return ''
    return f' ({said})' if said else ''
