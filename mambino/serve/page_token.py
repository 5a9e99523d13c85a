"""The page's secret: who knows it may start programs here. It lies in a file that only its owner reads, so
that a page which is open goes on after the server was ended and started again.

    token = page_token('.')         # of .mambino-token, made if it is not there
"""
import os
import re
import secrets
import stat
import sys
import time

from mambino.files import remove

FILE = '.mambino-token'
TOKEN = re.compile(r'[\w-]{32,100}', re.ASCII)
PATIENCE = 1.0          # seconds in which another server, started in the same moment, has written its own


def page_token(folder):
    """The secret in a folder's file. A file that somebody else could have written or read is replaced;
    where none can be written, the secret ends with this process, and that is said."""
    path = os.path.join(folder, FILE)
    for _ in range(3):
        try:
            return made(path)
        except FileExistsError:
            pass
        except OSError as error:
            print(f'note: {path} cannot be written ({error.strerror}), so the address of the page is another one '
                  'after each start', file=sys.stderr)
            return secrets.token_urlsafe(24)
        token = read(path)
        if token:
            return token
        remove(path)
    print(f'note: {path} is no file of a token, and cannot be replaced, so the address of the page is another one '
          'after each start', file=sys.stderr)
    return secrets.token_urlsafe(24)


def made(path):
    """A new secret, in a file that was not there; no link is followed. FileExistsError: it is there."""
    token = secrets.token_urlsafe(24)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_NOFOLLOW', 0)
    number = os.open(path, flags, 0o600)
    with open(number, 'w', encoding='ascii') as f:
        f.write(token)
    return token


def read(path):
    """The secret in a file; '' if it holds none, or is not this user's alone."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            number = os.open(path, os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0))
        except OSError:
            return ''
        try:
            if not is_private(os.fstat(number)):
                return ''
            text = os.read(number, 200).decode('ascii', 'replace').strip()
        finally:
            os.close(number)
        if text or time.monotonic() > end:
            return text if TOKEN.fullmatch(text) else ''
        time.sleep(0.02)


def is_private(status):
    """Whether a file is one that only this user reads and writes, under this one name."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return False
    return os.name != 'posix' or (status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077)
