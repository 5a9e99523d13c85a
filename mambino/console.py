"""The ends of a program that nobody planned: Ctrl-C, a closed terminal, and a reader or a disk under
stdout that takes no more. None of them leaves a traceback.

    end_quietly()               # the first line of a script that does anything
    go_on_without_stdout()      # of one whose work is worth more than what it says
"""
import atexit
import errno
import os
import signal
import sys

# A reader that has enough; a terminal that is closed; Windows says EINVAL of both.
NOBODY_READS = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ESHUTDOWN, errno.ECONNRESET}
if os.name == 'nt':
    NOBODY_READS.add(errno.EINVAL)
ENDING = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]


class Stream:
    """stdout or stderr, with an end to what happens where it takes no more.

    at_failure: called with the OSError, once; from then on the stream goes nowhere."""

    def __init__(self, stream, at_failure):
        self.stream, self.at_failure = stream, at_failure
        self.is_gone = False

    def write(self, text):
        self.attempt('write', text)
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        self.attempt('flush')

    def isatty(self):
        return not self.is_gone and self.stream.isatty()

    def attempt(self, action, *arguments):
        if self.is_gone:
            return
        try:
            getattr(self.stream, action)(*arguments)
        except UnicodeError:
            raise
        except (OSError, ValueError) as error:              # ValueError: it was closed
            self.is_gone = True
            silence(self.stream)
            self.at_failure(error)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def end_quietly():
    """From here on Ctrl-C ends the program with status 130 and a word, a reader such as `head` that
    has read enough with status 0 and none, a full disk under stdout with status 2 and a line, and
    SIGTERM and a closed terminal end it as an error would, so that it can tidy up."""
    fill_gaps()
    wait_for_readers()
    sys.excepthook = end_of
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:      # under nohup SIGHUP is ignored
            signal.signal(number, end_by_signal)
    sys.stdout = Stream(plain(sys.stdout) or open(os.devnull, 'w'), end_of_stdout)
    sys.stderr = Stream(plain(sys.stderr) or open(os.devnull, 'w'), lambda error: None)
    atexit.register(flush)


def go_on_without_stdout():
    """From here on a stdout that takes no more is no reason to end; stderr hears of it once."""
    sys.stdout = Stream(plain(sys.stdout), tell_of_stdout)


def plain(stream):
    """A stream as it was before it became a Stream."""
    return stream.stream if isinstance(stream, Stream) else stream


def fill_gaps():
    """The numbers 0 to 2 are taken: else the first file that is opened would be stdout (as after
    >&-), and what a library says would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def wait_for_readers():
    """A pipe that is full is waited for. Where whoever started this has set it not to block, Python would
    lose lines without a word."""
    for number in (1, 2) if os.name == 'posix' else ():
        if not os.get_blocking(number):
            os.set_blocking(number, True)


def end_by_signal(number, _):
    signal.signal(number, signal.SIG_IGN)                   # a closed terminal says it twice
    raise SystemExit(128 + number)


def forked():
    """A worker process ends when it is told to: it has nothing to tidy up."""
    for number in ENDING:
        if signal.getsignal(number) is end_by_signal:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=forked)


def end_of_stdout(error):
    """Ends the program where stdout takes no more."""
    if getattr(error, 'errno', None) in NOBODY_READS:
        raise SystemExit(0)
    print(f'error: standard output cannot be written to: {reason_of(error)}', file=sys.stderr, flush=True)
    raise SystemExit(2)


def tell_of_stdout(error):
    print(f'note: standard output takes no more ({reason_of(error)}); going on without it',
          file=sys.stderr, flush=True)


def reason_of(error):
    return getattr(error, 'strerror', None) or str(error)


def end_of(kind, error, trace):
    """As sys.excepthook; ends the process for what end_quietly() names."""
    if issubclass(kind, KeyboardInterrupt):
        flush()
        print('\ninterrupted', file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


def flush():
    """Writes what is left for stdout. What cannot be written changes the status, here at the end,
    too."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except SystemExit as end:
        os._exit(end.code)
    except (OSError, ValueError):
        silence(sys.stdout)


def silence(stream):
    """From here on a stream goes nowhere."""
    try:
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass
