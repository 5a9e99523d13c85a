"""Files that are there whole or not at all, and folders in which one process writes.

    with whole('out/ckpt.pt') as f:     # written to a temporary file beside it, then renamed
        f.write(data)
    hold('out')                         # until this process ends; Held says who has it already

A temporary file has a name that nobody can guess and is made exclusively: a link that lies in a
folder from somebody else is never written through. What killed processes left of them goes when a
folder is held again.

A folder is held by a lock on the file train.lock in it, which the system lifts when its process
ends, however it ends. In the file stands who holds it. Where a network's file system has no locks,
its holder counts in the file, and who comes later looks for half a minute whether it still counts.
"""
import atexit
import datetime
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

TEMPORARY = re.compile(r'.+\.\d+-[0-9a-f]{12}\.tmp')
LOCK = 'train.lock'
LOCKED_BYTE = 1 << 30           # beyond what stands in the file: Windows lets nobody read a locked byte
BEAT = 5                        # seconds from count to count, where there are no locks
PATIENCE = 6 * BEAT             # so long without a count, and its holder is dead
FULL = (errno.ENOSPC, errno.EDQUOT)

held = {}                       # {real path of a folder: (number of its open lock file, what ends the counting)}


class Held(Exception):
    """Another process holds a folder. holder: {'pid', 'host', 'since'}, or {} where nobody knows."""

    def __init__(self, holder):
        super().__init__(holder)
        self.holder = holder


# --- whole or not at all --------------------------------------------------------------------------

class Writer:
    """A binary file that remembers the error of a write: torch.save says something else of it."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name):
        return getattr(self.file, name)


def temporary(path):
    """The name of a temporary file beside a path, which no other process has or can know."""
    return f'{path}.{os.getpid()}-{secrets.token_hex(6)}.tmp'


def create(path):
    """A file that was not there before, opened to be written; nothing is followed to get there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_BINARY', 0)
    return open(os.open(path, flags, 0o666), 'wb')


def open_plain(path, flags=os.O_RDONLY, mode='rb'):
    """A file of bytes, opened. OSError for what is none: a pipe that lies in its place from
    somebody else would be waited for, for ever."""
    number = os.open(path, flags | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0), 0o666)
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return open(number, mode)
    os.close(number)
    problem = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
    raise OSError(problem, os.strerror(problem), path)


def open_log(path, anew=False):
    """A file to add bytes to, made if it is not there; anew: what it holds goes. No link is followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, 'O_NOFOLLOW', 0)
    return open_plain(path, flags | (os.O_TRUNC if anew else 0), 'ab')


@contextmanager
def whole(path):
    """A file to write bytes to, which is at `path` once all is written and on the disk. OSError
    if that cannot be; what was there before is untouched then."""
    name = temporary(path)
    writer = Writer(create(name))
    try:
        with writer.file:
            yield writer
            writer.file.flush()
            os.fsync(writer.file.fileno())
        os.replace(name, path)
    except BaseException as error:
        remove(name)
        if isinstance(error, RuntimeError) and writer.error:
            raise writer.error from None
        raise
    flush(os.path.dirname(path))


def remove(path):
    """Deletes a file, if it is there and that can be done."""
    try:
        os.remove(path)
    except OSError:
        pass


def flush(*folders):
    """What was made and renamed in a folder must reach the disk too."""
    for folder in folders if os.name == 'posix' else ():
        number = os.open(folder or '.', os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def try_to_write(path):
    """OSError if a file of this name cannot be made; its folder is made if it is not there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    name = temporary(path)
    create(name).close()
    os.remove(name)


def remove_leftovers(folder, older=0):
    """Deletes the temporary files in a folder, which killed processes left, if they were written to
    last so many seconds ago."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        try:
            if TEMPORARY.fullmatch(name) and time.time() - os.lstat(path).st_mtime >= older:
                os.remove(path)
        except OSError:
            pass


# --- what time and cables do to files -------------------------------------------------------------

def damage_of(path):
    """What is wrong with a file of torch.save, '' if nothing: all in it must be as it was written.
    torch reads it without a look at the checksums that it writes, those of every zip."""
    try:
        with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for problem in pool.map(lambda entry: damage_of_entry(archive, entry), archive.infolist()):
                if problem:
                    return problem
    except (OSError, RuntimeError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        return str(error) or type(error).__name__
    return ''


def damage_of_entry(archive, entry):
    """What is wrong with an entry of a zip that torch.save wrote, which compresses nothing."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        return f'{entry.filename} is compressed'
    try:
        with archive.open(entry) as f:
            while f.read(1 << 22):
                pass
    except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        return str(error) or type(error).__name__
    return ''


def checksum(path):
    """CRC-32 of a file, an int."""
    crc = 0
    with open(path, 'rb') as f:
        while data := f.read(1 << 22):
            crc = zlib.crc32(data, crc)
    return crc


def sha256(path):
    """Of a file, as hex."""
    state = hashlib.sha256()
    with open(path, 'rb') as f:
        while data := f.read(1 << 22):
            state.update(data)
    return state.hexdigest()


def stamp_of(file):
    """What of a file, a path or the number of an open one, stays as long as nobody writes into it,
    or puts another in its place. OSError if it is not there."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


# --- one writer -----------------------------------------------------------------------------------

def hold(folder):
    """From here until release() or the end of this process it is the only one that holds a folder,
    by whatever path. Held if another does, OSError if the folder cannot be written to."""
    key = os.path.realpath(folder)
    if key in held:
        return
    path = os.path.join(folder, LOCK)
    number, is_locked = take(path)
    counting = None
    identity = own_identity()
    if is_locked is None:
        try:
            watch(path)
            write_holder(number, identity)
            time.sleep(BEAT / 5)
            if (other := holder_in(path)) not in (identity, {}):        # who began in the same moment
                raise Held(other)
        except Held:
            os.close(number)
            raise
        counting = threading.Event()
    write_holder(number, identity)
    held[key] = number, counting
    if counting:
        threading.Thread(target=count, args=(number, identity, counting), daemon=True).start()
    remove_leftovers(folder)


def take(path):
    """→ (the number of a lock file, to be left open; whether it is locked for this process, None
    where there are no locks). Held if another process has it."""
    while True:
        number = open_lock(path)
        is_locked = lock(number)
        if is_locked is False:
            holder = holder_in(path)
            os.close(number)
            raise Held(holder)
        if is_same(number, path):
            return number, is_locked
        os.close(number)            # its holder has ended just now, and taken the file away


def own_identity():
    """What a lock file says of this process."""
    since = datetime.datetime.now().strftime('%Y-%m-%d %H:%M:%S')
    return dict(pid=os.getpid(), host=socket.gethostname(), since=since)


@contextmanager
def alone_in(folder):
    """Meanwhile no other process is in here with the same folder: it is waited for. Where the
    system has no such locks, nothing is."""
    number = None
    if os.name == 'posix':
        import fcntl
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError:             # some network file systems
            pass
    try:
        yield
    finally:
        if number is not None:
            os.close(number)


def release():
    """Gives back all that this process holds."""
    for folder, (number, counting) in list(held.items()):
        del held[folder]
        if counting:
            counting.set()
        path = os.path.join(folder, LOCK)
        if os.name == 'nt':         # there an open file cannot be deleted
            os.close(number)
            remove(path)
            continue
        if is_same(number, path):
            remove(path)
        os.close(number)


def forget():
    """In a forked process: what its parent holds is not its own."""
    for number, _ in held.values():
        os.close(number)
    held.clear()


atexit.register(release)
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=forget)


def open_lock(path):
    """The number of the lock file, opened; a link in its place goes, as does a file with a second
    name."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_BINARY', 0)
    while True:
        if os.path.islink(path):
            os.remove(path)
        number = os.open(path, flags, 0o666)
        status = os.fstat(number)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return number
        os.close(number)
        if is_same_status(status, path):
            os.remove(path)


def is_same(number, path):
    """Whether an open file is the one at this path."""
    return is_same_status(os.fstat(number), path)


def is_same_status(status, path):
    try:
        return os.path.samestat(status, os.lstat(path))
    except FileNotFoundError:
        return False


def lock(number):
    """Whether an open file is locked for this process now; None where there are no locks."""
    try:
        if os.name == 'nt':
            import msvcrt
            os.lseek(number, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def holder_in(path):
    """What a lock file says of its holder; {} if it says nothing."""
    try:
        with open_plain(path) as f:
            holder = json.loads(f.read(1000))
        return holder if isinstance(holder, dict) else {}
    except (OSError, ValueError):
        return {}


def write_holder(number, holder):
    """Writes into a lock file who holds it. A disk that is full keeps nobody from holding it."""
    try:
        os.lseek(number, 0, os.SEEK_SET)
        os.ftruncate(number, 0)
        os.write(number, json.dumps(holder).encode())
    except OSError:
        pass


def watch(path):
    """Without locks: returns once nobody counts in a lock file. Held if somebody does."""
    first = holder_in(path)
    if not first or (first.get('host') == socket.gethostname() and is_dead(first.get('pid'))):
        return
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        if holder_in(path) not in (first, {}):
            raise Held(first)


def count(number, identity, ended):
    """The thread that counts in a lock file."""
    beat = 0
    while not ended.wait(BEAT):
        beat += 1
        write_holder(number, dict(identity, count=beat))


def is_dead(pid):
    """Whether there is no such process on this machine, as far as can be told."""
    if os.name != 'posix' or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
