"""What would end a script in a line is an exception in a server: the line goes on to whoever asked.

    with told():
        ckpt = load_checkpoint('out')       # NoModel: out: holds no checkpoint; …

Each thread has an ear of its own: what others say meanwhile is said as ever.
"""
import contextlib
import io
import sys
import threading

ears = threading.local()        # .buffer: where what this thread says goes; None: on


class NoModel(Exception):
    """There is none of this name (status 404), or it cannot be used (400, 503)."""

    def __init__(self, message, status=404):
        super().__init__(message)
        self.status = status


class ByThread:
    """stderr, of which a thread may keep its part."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return (getattr(ears, 'buffer', None) or self.stream).write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def told(status=503):
    """Within, configurator.fail raises NoModel of this status with its line. What else is said is said
    at the end."""
    if not isinstance(sys.stderr, ByThread):
        sys.stderr = ByThread(sys.stderr)
    ears.buffer = io.StringIO()
    try:
        yield
    except SystemExit:
        lines = ears.buffer.getvalue().splitlines()
        errors = [line for line in lines if line.startswith('error: ')]
        ears.buffer = io.StringIO(''.join(f'{line}\n' for line in lines if line not in errors))
        raise NoModel(' '.join(errors).removeprefix('error: ') or 'it cannot be used', status) from None
    finally:
        said = ears.buffer.getvalue()
        ears.buffer = None
        if said:
            sys.stderr.write(said)
