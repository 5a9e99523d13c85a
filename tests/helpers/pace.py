"""Costs that a test may put a limit to: in seconds of computing, on whatever machine and however busy it is."""
import time


def seconds_of(action):
    """(what it returns, the seconds of computing that this process needed for it), these as on a machine for which
    2,000,000 rounds of a loop of Python take a tenth of a second: a slower or a shared core is not the program's."""
    began = time.process_time()
    for _ in range(2_000_000):
        pass
    slowness = (time.process_time() - began) / 0.1
    began = time.process_time()
    result = action()
    return result, (time.process_time() - began) / max(1.0, slowness)
