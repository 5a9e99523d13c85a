"""Several models on one machine: their threads compute by turns, never side by side.

    turns = Turns()
    with turns:                 # waits until it is this thread's turn
        ...
        turns.give_way()        # whoever waits computes first
        ...

Two at once would each have half of the processors, and the caches to neither's good.
"""
import threading
from collections import deque


class Turns:
    """A lock that goes to those who wait in the order in which they came."""

    def __init__(self):
        self.lock = threading.Lock()
        self.is_taken = False
        self.waiting = deque()              # of each thread what it waits for

    def take(self):
        """Waits until it is this thread's turn."""
        with self.lock:
            if not self.is_taken:
                self.is_taken = True
                return
            mine = threading.Event()
            self.waiting.append(mine)
        mine.wait()

    def leave(self):
        """The turn is over: the one that waits longest has it."""
        with self.lock:
            if self.waiting:
                self.waiting.popleft().set()
            else:
                self.is_taken = False

    def give_way(self):
        """Lets the one that waits longest compute; returns when it is this thread's turn again."""
        if self.waiting:
            self.leave()
            self.take()

    def __enter__(self):
        self.take()
        return self

    def __exit__(self, *_):
        self.leave()
