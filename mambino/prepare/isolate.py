"""Reads a file come what may: the formats whose parsers hang, eat all memory or crash are read in a
process of their own.

    for text, last in isolate.read(source, options, notes): ...    # its documents, clean

    this process ──► a line of JSON: [kind, path, options] ──► reader process, with limits of
                 ◄── frames: a letter, a length, UTF-8 ◄────── memory and of computing time
                     T a piece of text, L the last piece of a document, C that of a conversation
                     N a line for the notes, F the rest of them; E end of the file, S skip, B a bomb

The reader process serves file after file. Where one is its end, that file is skipped with the
reason, and the next gets a new process. Where it had read other files before it crashed or ran out
of memory, a new one first tries again, so that what becomes of a file depends on the file alone.
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

from mambino.prepare import files, sniff
from mambino.prepare.conversations import TALK
from mambino.prepare.files import NO_MEMORY, Bomb, Notes, Skip
from mambino.prepare.readers import guarded, reason_of
from mambino.prepare.texts.encodings import clean

# kind -> the library that its reader imports; options['pdf'] says which one for PDF
LIBRARIES = {
    'pdf': None,
    'parquet': 'pyarrow.parquet',
    'arrow': 'pyarrow.parquet',
    'html': 'html',
    'docx': 'mammoth',
    'pptx': 'pptx',
    'xlsx': 'python_calamine',
    'odt': 'xml.etree.ElementTree',
    'epub': 'xml.etree.ElementTree',
    'rtf': 'striprtf.striprtf',
    'email': 'email.message',
    'notebook': 'json',
}
STEADY = ('xlsx', 'odt')  # pieces of these come one by one, however large a sheet is
LETTERS = {False: b'T', True: b'L', TALK: b'C'}  # of a frame, by what `last` is beside its text
LAST = {letter: last for last, letter in LETTERS.items()}
HEAVY = 4_000_000  # bytes: a notebook, all of which is in memory, is read so where it has more, or may have
FRAME = struct.Struct('<cI')
ENDS = (b'E', b'S', b'B')
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# not '', the working directory
READER = f'import sys; sys.path[0] = {ROOT!r}; from mambino.prepare import isolate; isolate.serve()'
_process = None   # the reader process that this one keeps
_deadline = None  # when to kill it, in time.monotonic()


def look(source, notes):
    """The source with the kind that its content tells; a note says so. Skip where nobody reads it."""
    if source.kind == 'hf':
        return source
    try:
        return source._replace(kind=sniff.kind_of(source.kind, source.path, notes))
    except Skip:
        raise
    except Exception as error:  # of the file, or of what unpacks it
        raise Skip(reason_of(error)) from None


def read(source, options, notes):
    """Yields (text, last): the documents of one source, the last piece of each marked, clean. Skip
    is all that it raises for a bad file (and Unreachable for hf:); what is worth knowing of a file
    that is taken is appended to `notes`, a Notes. A file that breaks after some documents keeps those: then
    the last text may be the beginning of a document that never ends. options: text_column,
    max_file_mb, pdf ('pypdf' or 'pypdfium2'), file_seconds, file_memory_mb.
    """
    pieces = isolated if needs_limits(source) else guarded
    pending = ''  # a \r at the end of a piece may be half of \r\n
    documents = 0
    try:
        for text, last in pieces(source.kind, source.path, options, notes):
            if pending:
                text = pending + text
                pending = ''
            if text.endswith('\r') and not last:
                text = text[:-1]
                pending = '\r'
            yield clean(text), last
            documents += bool(last)
            notes.taken += bool(last)
    except Bomb:
        raise
    except Skip as reason:
        if not documents:
            raise
        notes.append(f'stopped after {documents:,} documents: {reason}')


def needs_limits(source):
    """Whether a source is read in the reader process."""
    if source.kind == 'notebook':
        return os.path.getsize(source.path) > HEAVY or files.is_packed(source.path)
    return source.kind in LIBRARIES


def isolated(kind, path, options, notes):
    """guarded() in the reader process."""
    global _deadline
    # the reader process limits its own computing, where it can; this limit, of the clock, is for the rest
    patience = options['file_seconds'] * (4 if hasattr(signal, 'SIGXCPU') else 1)
    lost, facts = {}, {}
    passed_on = 0  # pieces that were yielded, maybe from a process that died since
    while True:
        is_new, process = start_reader()
        letter = b''
        said = []
        number = 0
        try:
            _deadline = time.monotonic() + patience
            process.stdin.write(json.dumps([kind, path, options]).encode() + b'\n')
            process.stdin.flush()
            while letter not in ENDS:
                letter, text = next_frame(process.stdout)
                if letter == b'N':
                    said.append(text)
                elif letter == b'F':
                    lost, facts = json.loads(text)
                elif letter in LAST:
                    number += 1
                    if number > passed_on:
                        passed_on = number
                        _deadline = None  # whoever is slow to take a text: not the file's fault
                        yield text, LAST[letter]
                    _deadline = time.monotonic() + patience
            again = letter == b'S' and text == NO_MEMORY
        except (OSError, EOFError, ValueError):
            late = time.monotonic() > _deadline
            text, late = why_it_died(stop_reader(patience=2), late, options)
            letter = b'S'
            again = not late
        finally:
            _deadline = None
            if letter not in ENDS:  # nobody wants the rest
                stop_reader()
        if again:
            stop_reader()
            if not is_new:  # what was read before may be to blame
                continue
        notes += said
        notes.lost |= lost
        notes.facts |= facts
        if letter in (b'S', b'B'):
            raise (Bomb if letter == b'B' else Skip)(text)
        return


def next_frame(stream):
    """(letter, text). EOFError where the stream ends."""
    head = stream.read(FRAME.size)
    if len(head) < FRAME.size:
        raise EOFError
    letter, length = FRAME.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return letter, data.decode('utf-8', 'surrogatepass')


def start_reader():
    """Makes sure that there is a reader process. (whether it is a new one, the process)"""
    global _process
    if _process is not None:
        return False, _process
    _process = subprocess.Popen(
        [sys.executable, '-c', READER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {'ARROW_DEFAULT_MEMORY_POOL': 'system'},
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
    """Ends the reader process, if there is one, and returns its exit status. patience: s to let it
    end by itself.
    """
    global _process
    if _process is None:
        return 0
    process = _process
    _process = None
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


def why_it_died(status, late, options):
    """(why a reader process died, in words; whether that was for the time it took)"""
    if late or hasattr(signal, 'SIGXCPU') and status == -signal.SIGXCPU:
        return f'took longer than {options["file_seconds"]:g} s (--file_seconds)', True
    names = {-number: number.name for number in signal.Signals}
    return f'crashed its reader ({names.get(status, f"status {status}")})', False


# -----------------------------------------------------------------------------
# The reader process

def serve():
    """Files from stdin, frames to stdout, until stdin ends."""
    stream = os.fdopen(os.dup(1), 'wb', buffering=1 << 16)
    os.dup2(2, 1)  # what a library prints is no answer
    orders = queue.SimpleQueue()
    die_with_parent()
    limit('RLIMIT_CORE', 0)

    def listen():
        for line in sys.stdin.buffer:
            orders.put(line)
        os._exit(0)  # whoever started this one is gone: stop, in the middle of a file if need be

    threading.Thread(target=listen, daemon=True).start()
    used = address_space()  # that is no file's fault
    while True:
        kind, path, options = json.loads(orders.get())
        used += import_library(LIBRARIES[kind] or options['pdf'])
        if used:  # malloc then fails, and Python raises MemoryError
            limit('RLIMIT_AS', used + options['file_memory_mb'] * 1e6)
        answer(stream, kind, path, options)


def answer(stream, kind, path, options):
    """Reads one file and writes its frames."""
    def say(letter, text):
        data = text.encode('utf-8', 'surrogatepass')
        stream.write(FRAME.pack(letter, len(data)) + data)

    notes = Notes()
    last_frame = (b'E', '')
    seconds = options['file_seconds']
    files.allow(options.get('unpack_ratio', files.TIMES))
    chunk = files.CHUNK
    try:
        began = time.process_time()
        pages = 0
        renewed = limit_seconds(seconds)
        for text, last in guarded(kind, path, options, notes):
            for start in range(0, max(len(text), 1), chunk):
                is_end = last and start + chunk >= len(text)
                say(LETTERS[last if is_end else False], text[start:start + chunk])
            if kind == 'pdf':  # a book of thousands of pages may take its time, one page may not
                pages += not text  # it says so for each that it has read
                limit('RLIMIT_CPU', began + seconds + pages / 2 + 1)
            if (last or kind in STEADY) and time.monotonic() > renewed + seconds / 10:
                renewed = limit_seconds(seconds)  # a billion rows may take their time
    except Skip as reason:
        last_frame = (b'B' if isinstance(reason, Bomb) else b'S', str(reason))
    except MemoryError:
        last_frame = (b'S', NO_MEMORY)
    for note in notes:
        say(b'N', note)
    say(b'F', json.dumps([notes.lost, notes.facts]))
    say(*last_frame)
    stream.flush()


def import_library(name):
    """Imports what a reader stands on, without limits. Returns the addresses it takes: Arrow alone
    has 300 MB of them.
    """
    if name in sys.modules:
        return 0
    limit('RLIMIT_AS', None)
    limit('RLIMIT_CPU', None)
    before = address_space()
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # the reader will tell
    return address_space() - before


def die_with_parent():
    """Where the thread in listen() may have to wait for a library that keeps Python's lock, Linux
    does not.
    """
    try:
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (ImportError, OSError, AttributeError, TypeError):
        pass


def address_space():
    """Bytes of addresses that this process has; 0 where nobody says: Windows and macOS limit only
    the time.
    """
    try:
        import resource
        with open('/proc/self/statm') as f:
            return int(f.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return 0


def limit_seconds(seconds):
    """So many seconds of computing from now on: then SIGXCPU ends this process. Returns the time.
    """
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
