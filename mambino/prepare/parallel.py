"""
The same function on many tasks: in this process, in many on this machine, or on a Ray cluster.

    parallel.begin('local', processes=4)                       # or 'ray'
    for result in parallel.run(function, tasks, window=16): ...
    parallel.stop()

Results come in the order of the tasks, and no more tasks than the window holds are under way or waiting to be taken, so
that memory is bounded however many there are. A function is one of a module, and what it takes and gives can be pickled.
"""
import collections
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from mambino.prepare import isolate
from mambino.configurator import fail

_kind, _processes, _pool = 'local', 1, None
stuck = False  # a pool did not end (seen in Python 3.10): leave by os._exit, for sys.exit would wait for it

def begin(kind, processes):
    """kind: 'local' or 'ray'; processes: on this machine, 0 is one for each core."""
    global _kind, _processes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    _kind, _processes = kind, processes or min(cores, 61)  # more Windows cannot wait for

def processes():
    return _processes

def run(function, tasks, window):
    """Yields function(task) for each task, in order; at most `window` of them are under way or waiting to be taken."""
    if _kind == 'local' and _processes == 1:
        yield from map(function, tasks)
        return
    start, result = on_ray(function) if _kind == 'ray' else on_pool(function)
    waiting = collections.deque()
    for task in tasks:
        waiting.append(start(task))
        if len(waiting) >= window * (4 if _kind == 'ray' else 1):  # a cluster is wider than this machine
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())

def on_pool(function):
    """(function that starts a task in one of the processes; function that waits for what the former gave, and returns the result)"""
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(_processes, multiprocessing.get_context('spawn'), initializer=begin_worker)
    return functools.partial(submit, _pool, function), Future.result

def on_ray(function):
    """The same two on Ray."""
    import ray
    if not ray.is_initialized():
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
        here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        settings = dict(runtime_env={'env_vars': {'PYTHONPATH': here}}, log_to_driver=False, logging_level='ERROR')
        named = os.environ.get('RAY_ADDRESS', '')
        host, _, port = named.removeprefix('ray://').rpartition(':')
        try:
            if host and port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address='auto', **settings)
        except (ConnectionError, OSError) as error:
            if named:
                fail(f'engine=ray: no cluster at RAY_ADDRESS={named} ({str(error).splitlines()[0]})')
            ray.init(address='local', num_cpus=_processes, include_dashboard=False, **settings)
        print(f'ray: {ray.cluster_resources().get("CPU", 0):g} processors on {len(ray.nodes())} machines')

    def result(reference):
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise BrokenProcessPool(str(error)) from None

    return ray.remote(num_cpus=1, max_retries=2)(function).remote, result

def apart(function, task):
    """function(task) in a process of its own, with which the memory goes that it takes."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), initializer=begin_worker)
    try:
        return submit(pool, function, task).result()
    except BaseException:
        kill_processes()
        raise
    finally:
        pool.shutdown()

def submit(pool, function, task):
    """
    pool.submit, which may start a process. Ctrl-C must neither reach that process while it is importing, nor this one
    while it tells the other what to do: both would print what nobody can understand. So it waits.
    """
    held, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, frame: held.append(number)) for number in numbers]
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits that
    try:
        return pool.submit(function, task)
    finally:
        if hasattr(signal, 'pthread_sigmask'):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
        for number in held[:1]:
            signal.raise_signal(number)

def begin_worker():
    """Ctrl-C is for the process that was started by hand; and none of the others survives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def kill_processes():
    for process in multiprocessing.active_children():
        process.kill()
        process.join(5)

def stop():
    """Ends all processes, whatever they are doing: unfinished work leaves nothing but temporary files."""
    global _pool, stuck
    kill_processes()
    if _pool is not None:
        end = threading.Thread(target=_pool.shutdown, kwargs=dict(cancel_futures=True), daemon=True)
        end.start()
        end.join(3)
        _pool, stuck = None, end.is_alive()
    if _kind == 'ray' and 'ray' in sys.modules:
        sys.modules['ray'].shutdown()
    isolate.stop_reader()
