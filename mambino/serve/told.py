"""What would end a script in a line is an exception in a server: the line goes on to whoever asked.

    with told():
        ckpt = load_checkpoint('out')       # Refused: out: holds no checkpoint; …

Each thread has an ear of its own: what others say meanwhile is said as ever.
"""
import contextlib
import io
import sys
import threading

ears = threading.local()        # .buffer: where what this thread says goes; None: on


class Refused(Exception):
    """What is asked for is not done; the sentence says why. status: of HTTP; param: the parameter that is
    to blame; code: a word for programs; headers: of the response."""

    def __init__(self, message, status=400, param=None, code=None, headers=None):
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


class NoModel(Refused):
    """There is none of this name (status 404), or it cannot be used (400, 503)."""

    def __init__(self, message, status=404):
        code = 'model_not_found' if status == 404 else None
        super().__init__(message, status, 'model', code, {'Retry-After': '2'} if status == 503 else None)


class ByThread:
    """stderr, of which a thread may keep its part."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return (getattr(ears, 'buffer', None) or self.stream).write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def told(status=503, kind=Refused):
    """Within, configurator.fail raises one of this kind and status with its line. What else is said is
    said at the end."""
    if not isinstance(sys.stderr, ByThread):
        sys.stderr = ByThread(sys.stderr)
    ears.buffer = io.StringIO()
    try:
        yield
    except SystemExit:
        lines = ears.buffer.getvalue().splitlines()
        errors = [line for line in lines if line.startswith('error: ')]
        ears.buffer = io.StringIO(''.join(f'{line}\n' for line in lines if line not in errors))
        raise kind(' '.join(errors).removeprefix('error: ') or 'it cannot be used', status) from None
    finally:
        said = ears.buffer.getvalue()
        ears.buffer = None
        if said:
            sys.stderr.write(said)
