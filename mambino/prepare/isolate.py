"""
Reads a file come what may: the formats whose parsers hang, eat all memory or crash are read in a process of their own.

    for text, last in isolate.read(source, options, notes): ...    # the documents of one source, clean
    python isolate.py                                               # the reader process; nothing for a person to type

    this process ──► a line of JSON: [kind, path, options] ──► reader process, with limits of memory and of computing time
                 ◄── frames: a letter, a length, so many bytes of UTF-8 ◄──┘
                     T a piece of text, L the last piece of a document, N a note, S skip, E end of the file

The reader process serves file after file. Where one is its end, that file is skipped with the reason, and the next gets a
new process. Where it had read other files before it crashed or ran out of memory, a new one first tries again, so that
what becomes of a file depends on the file alone.
"""
import importlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time

from mambino.prepare.readers import CHUNK, Skip, clean, guarded

ISOLATED = {'pdf', 'parquet', 'arrow', 'html'}
NO_MEMORY = 'needs too much memory'
FRAME = struct.Struct('<cI')
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
READER = f'import sys; sys.path[0] = {ROOT!r}; from mambino.prepare import isolate; isolate.serve()'     # not '', the working directory
_process = None   # the reader process that this one keeps
_deadline = None  # when to kill it, in time.monotonic()

def read(source, options, notes):
    """
    Yields (text, last): the documents of one source, the last piece of each marked, clean. Skip is all that it raises for
    a bad file (and Unreachable for hf:); what is worth knowing of a file that is taken is appended to `notes`. A file that
    breaks after some documents keeps those: then the last text may be the beginning of a document that never ends.
    options: text_column, max_file_mb, pdf ('pypdf' or 'pypdfium2'), file_seconds, file_memory_mb.
    """
    parts = isolated if source.kind in ISOLATED else guarded
    held, documents = '', 0  # a \r at the end of a piece may be half of \r\n
    try:
        for text, last in parts(source.kind, source.path, options, notes):
            if held:
                text, held = held + text, ''
            if text.endswith('\r') and not last:
                text, held = text[:-1], '\r'
            yield clean(text), last
            documents += last
    except Skip as reason:
        if not documents:
            raise
        notes.append(f'stopped after {documents:,} documents: {reason}')

def isolated(kind, path, options, notes):
    """guarded() in the reader process."""
    global _deadline
    # the reader process limits its own computing, where it can; this limit, of the clock, is for the rest
    patience = options['file_seconds'] * (4 if hasattr(signal, 'SIGXCPU') else 1)
    passed_on = 0
    while True:
        fresh, process = start_reader()
        letter, said, number = b'', [], 0
        try:
            _deadline = time.monotonic() + patience
            process.stdin.write(json.dumps([kind, path, options]).encode() + b'\n')
            process.stdin.flush()
            while letter not in (b'E', b'S'):
                letter, text = next_frame(process.stdout)
                if letter == b'N':
                    said.append(text)
                elif letter in (b'T', b'L'):
                    number += 1
                    if number > passed_on:
                        _deadline, passed_on = None, number  # whoever is slow to take a text: not the file's fault
                        yield text, letter == b'L'
                    _deadline = time.monotonic() + patience
            again = text == NO_MEMORY and letter == b'S'
        except (OSError, EOFError, ValueError):
            late = time.monotonic() > _deadline
            text, late = fate(stop_reader(patience=2), late, options)
            letter, again = b'S', not late
        finally:
            _deadline = None
            if letter not in (b'E', b'S'):  # nobody wants the rest
                stop_reader()
        if again:
            stop_reader()
            if not fresh:  # what was read before may be to blame
                continue
        notes += said
        if letter == b'S':
            raise Skip(text)
        return

def next_frame(stream):
    head = stream.read(FRAME.size)
    letter, length = FRAME.unpack(head) if len(head) == FRAME.size else (b'', 1)
    data = stream.read(length) if letter else b''
    if len(data) < length:
        raise EOFError
    return letter, data.decode('utf-8', 'surrogatepass')

def start_reader():
    """Makes sure that there is a reader process. (whether it is a new one, it)"""
    global _process
    if _process is not None:
        return False, _process
    _process = subprocess.Popen([sys.executable, '-c', READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, env=os.environ | {'ARROW_DEFAULT_MEMORY_POOL': 'system'},
                                start_new_session=True)  # Ctrl-C is for the process that was started by hand
    threading.Thread(target=guard, args=(_process,), daemon=True).start()
    return True, _process

def guard(process):
    """Kills the process when its time is up."""
    while process.poll() is None:
        time.sleep(0.2)
        if _process is process and _deadline is not None and time.monotonic() > _deadline:
            process.kill()

def stop_reader(patience=0):
    """Ends the reader process, if there is one, and returns its exit status. patience: s to let it end by itself."""
    global _process
    if _process is None:
        return 0
    process, _process = _process, None
    try:
        status = process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    process.stdout.close()
    try:
        process.stdin.close()
    except OSError:
        pass
    return status

def fate(status, late, options):
    """(why a reader process died, in words; whether that was for the time it took)"""
    if late or hasattr(signal, 'SIGXCPU') and status == -signal.SIGXCPU:
        return f'took longer than {options["file_seconds"]:g} s', True
    names = {-number: number.name for number in signal.Signals}
    return f'crashed its reader ({names.get(status, f"status {status}")})', False

# -----------------------------------------------------------------------------
# The reader process

def serve():
    """Files from stdin, frames to stdout, until stdin ends."""
    out = os.fdopen(os.dup(1), 'wb', buffering=1 << 16)
    os.dup2(2, 1)  # what a library prints is no answer
    orders = queue.SimpleQueue()
    die_with_parent()
    limit('RLIMIT_CORE', 0)

    def listen():
        for line in sys.stdin.buffer:
            orders.put(line)
        os._exit(0)  # whoever started this one is gone: stop, in the middle of a file if need be

    def say(letter, text):
        data = text.encode('utf-8', 'surrogatepass')
        out.write(FRAME.pack(letter, len(data)) + data)

    threading.Thread(target=listen, daemon=True).start()
    used = memory()
    while True:
        kind, path, options = json.loads(orders.get())
        library = options['pdf'] if kind == 'pdf' else 'pyarrow.parquet' if kind in ('parquet', 'arrow') else 'html.parser'
        if library not in sys.modules:  # Arrow alone takes 300 MB of addresses, which are no file's fault
            limit('RLIMIT_AS', None)
            limit('RLIMIT_CPU', None)
            before = memory()
            try:
                importlib.import_module(library)
            except ImportError:
                pass  # the reader will tell
            used += memory() - before
        if used:
            limit('RLIMIT_AS', used + options['file_memory_mb'] * 1e6)  # malloc then fails, and Python raises MemoryError
        notes, end = [], (b'E', '')
        try:
            began, pages = time.process_time(), 0
            renewed = limit_seconds(options['file_seconds'])
            for text, last in guarded(kind, path, options, notes):
                for start in range(0, max(len(text), 1), CHUNK):
                    say(b'L' if last and start + CHUNK >= len(text) else b'T', text[start:start + CHUNK])
                if kind == 'pdf':  # a book of thousands of pages may take its time, one page may not
                    pages += 1
                    limit('RLIMIT_CPU', began + options['file_seconds'] + pages / 2 + 1)
                if last and time.monotonic() > renewed + options['file_seconds'] / 10:
                    renewed = limit_seconds(options['file_seconds'])  # a billion rows may take their time
        except Skip as reason:
            end = b'S', str(reason)
        except MemoryError:
            end = b'S', NO_MEMORY
        for note in notes:
            say(b'N', note)
        say(*end)
        out.flush()

def die_with_parent():
    """Where the thread in listen() may have to wait for a library that keeps Python's lock, Linux does not."""
    try:
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (ImportError, OSError, AttributeError, TypeError):
        pass

def memory():
    """Bytes of addresses that this process has; 0 where nobody says: Windows and macOS limit only the time."""
    try:
        import resource
        with open('/proc/self/statm') as f:
            return int(f.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return 0

def limit_seconds(seconds):
    """So many seconds of computing from now on: then SIGXCPU ends this process. Returns the time."""
    limit('RLIMIT_CPU', time.process_time() + seconds + 1)
    return time.monotonic()

def limit(name, value):
    """Sets a limit of this process; None is the highest that it may have."""
    try:
        import resource
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        if value is None or value > 2 ** 62 or hard != resource.RLIM_INFINITY and value > hard:
            value = hard
        resource.setrlimit(which, (int(value), hard))
    except (ImportError, AttributeError, OSError, ValueError):
        pass
