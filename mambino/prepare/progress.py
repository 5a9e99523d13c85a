"""How far long work is, while it runs: on a terminal one line that is written anew every second,
elsewhere a line every ten seconds, and one at the end.

    with Progress('reading', total, inside) as progress:
        for size in results:
            progress.add(size)

A thread of its own writes it, so it moves however long a single piece of work takes; `inside` tells
it what of the unfinished work is done.
"""
import shutil
import sys
import threading
import time

ON_TERMINAL = 1.0  # seconds between two lines on a terminal,
ELSEWHERE = 10.0   # and in a file or a pipe
BEGINS = 0.5       # seconds before there is anything to see on a terminal


def in_words(n):
    """A number of files."""
    return '1 file' if n == 1 else f'{n:,} files'


def width():
    """Characters of a line on this terminal: one that wraps cannot be rewritten."""
    return min(78, shutil.get_terminal_size().columns - 1)


class Progress:
    """label: what is done; total: bytes, 0 where nobody can tell; inside: a function that returns how
    many bytes of the unfinished work are done; also: said behind the label, until the end.
    """

    def __init__(self, label, total=0, inside=None, also=''):
        self.label = label
        self.total = total
        self.inside = inside or (lambda: 0)
        self.also = also
        self.done = 0
        self.highest = 0  # what was shown: an estimate never goes back
        self.began = time.monotonic()
        self.is_terminal = sys.stdout.isatty()
        self.is_shown = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.tell, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def add(self, size):
        """So many more bytes are done."""
        self.done += size

    def tell(self):
        """The thread: a line now and then, until the end."""
        pause = BEGINS if self.is_terminal else ELSEWHERE
        while not self.ended.wait(pause):
            self.show(self.seconds_left())
            pause = ON_TERMINAL if self.is_terminal else ELSEWHERE

    def seconds_left(self):
        """'  12 s left', or where that cannot be told how long it takes already."""
        seconds = time.monotonic() - self.began
        done = self.amount()
        if not self.total or not done:
            return f'{seconds:5.0f} s'
        return f'{(self.total - done) * seconds / done:5.0f} s left'

    def amount(self):
        """Bytes that are done, those of unfinished work among them."""
        if not self.ended.is_set():
            self.highest = max(self.highest, min(self.done + self.inside(), self.total))
        return max(self.highest, self.done)

    def __exit__(self, kind, error, trace):
        self.ended.set()
        self.thread.join()
        if kind is None and self.total:
            self.highest = 0
            self.show(f'in {time.monotonic() - self.began:.1f} s', end='\n')
        elif self.is_shown and self.is_terminal:
            print(end=f'\r{"":<{width()}}\r' if kind is None else '\n', flush=True)

    def show(self, remark, end=''):
        """One line; end: '\\n' for the last one."""
        line = f'{self.label:<9} {self.also:<33}  {remark}'
        if self.total:
            done = self.amount()
            rate = done / max(time.monotonic() - self.began, 1e-3)
            amount = f'{done / 1e6:9.1f} of {self.total / 1e6:.1f} MB'
            line = f'{self.label:<9} {amount} {rate / 1e6:7.1f} MB/s  {remark}'
        try:
            if self.is_terminal:
                print(f'\r{line[:width()]:<{width()}}', end=end, flush=True)
            else:
                print(line, flush=True)
        except OSError:  # nobody reads it, or the disk under it is full: the work goes on
            return
        self.is_shown = True
