"""The same function on many tasks: in this process, in many on this machine, or on a Ray cluster.

    pool.begin('local', processes=4)                       # or 'ray'
    for result in pool.map_tasks(function, tasks, window=16): ...                    # in their order
    for result in pool.map_tasks(function, tasks, window=16, in_order=False): ...    # as they come
    pool.stop()

No more tasks than the window holds are under way or waiting to be fetched, so that memory is
bounded however many there are. A function is one of a module, and its arguments and results can be
pickled.
"""
import collections
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from mambino.configurator import fail
from mambino.prepare import isolate

_engine = 'local'
_processes = 1
_pool = None    # the processes on this machine, once there are some
_stuck = False  # a pool did not end (seen in Python 3.10): sys.exit would wait for it


def begin(engine, processes):
    """engine: 'local' or 'ray'; processes: on this machine, 0 is one for each core."""
    global _engine, _processes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    _engine = engine
    _processes = processes or min(cores, 61)  # more Windows cannot wait for
    os.environ['RAYON_NUM_THREADS'] = str(_processes)  # of the library that trains a BPE
    if engine == 'ray':
        try:
            import ray  # noqa: F401
        except ImportError:
            fail('engine=ray: needs the package ray: pip install ray')


def processes():
    """How many there are on this machine."""
    return _processes


def map_tasks(function, tasks, window, in_order=True):
    """Yields function(task) for each task, in order or as they are done; at most `window` of them
    are under way or waiting to be fetched.
    """
    if _engine == 'local' and _processes == 1:
        yield from map(function, tasks)
        return
    start, fetch, first_done = ENGINES[_engine](function)
    if _engine == 'ray':
        window *= 4  # a cluster is wider than this machine
    waiting = collections.deque()

    def take():
        """The result of one of those that are waiting."""
        task = waiting[0] if in_order else first_done(list(waiting))
        waiting.remove(task)
        return fetch(task)

    for task in tasks:
        waiting.append(start(task))
        if len(waiting) >= window:
            yield take()
    while waiting:
        yield take()


def new_pool(n):
    """n processes that are started afresh, rather than forked."""
    context = multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(n, context, initializer=begin_worker)


def on_pool(function):
    """(function that starts a task in one of the processes; function that waits for what that
    returned, for the result; function that waits for the first of several to be done, and returns
    it)
    """
    global _pool
    if _pool is None:
        _pool = new_pool(_processes)

    def first_done(futures):
        done = wait(futures, return_when=FIRST_COMPLETED).done
        return next(future for future in futures if future in done)

    return functools.partial(submit, _pool, function), Future.result, first_done


def on_ray(function):
    """The same three on Ray."""
    import ray
    if not ray.is_initialized():
        start_ray(ray)

    def fetch(reference):
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise BrokenProcessPool(str(error)) from None

    def first_done(references):
        return ray.wait(references, num_returns=1)[0][0]

    return ray.remote(num_cpus=1, max_retries=2)(function).remote, fetch, first_done


ENGINES = {'local': on_pool, 'ray': on_ray}


def start_ray(ray):
    """Joins the cluster that there is, or makes one of this machine alone."""
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {'env_vars': {'PYTHONPATH': root}}
    settings = {'runtime_env': environment, 'log_to_driver': False, 'logging_level': 'ERROR'}
    address = os.environ.get('RAY_ADDRESS', '')
    host, _, port = address.removeprefix('ray://').rpartition(':')
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address='auto', **settings)
    except (ConnectionError, OSError) as error:
        if address:
            fail(f'engine=ray: no cluster at RAY_ADDRESS={address} ({str(error).splitlines()[0]})')
        ray.init(address='local', num_cpus=_processes, include_dashboard=False, **settings)
    print(f'ray: {ray.cluster_resources().get("CPU", 0):g} processors on {len(ray.nodes())} machines')


def apart(function, task):
    """function(task) in a process of its own, with which the memory goes that it takes."""
    pool = new_pool(1)
    try:
        return submit(pool, function, task).result()
    except BaseException:
        kill_processes()
        raise
    finally:
        pool.shutdown()


def submit(pool, function, task):
    """pool.submit, which may start a process. Ctrl-C must neither reach that process while it is
    importing, nor this one while it tells the other its orders: both would print what nobody can
    understand. So it waits.
    """
    received = []

    def remember(number, frame):
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, remember) for number in signals]
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits that
    try:
        return pool.submit(function, task)
    finally:
        if hasattr(signal, 'pthread_sigmask'):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)
        for number in received[:1]:
            signal.raise_signal(number)


def begin_worker():
    """Ctrl-C is for the process that was started by hand; and none of the others survives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def kill_processes():
    """Ends the processes that this one has started."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join(5)


def stop():
    """Ends all processes, whatever they are doing: unfinished work leaves nothing but temporary
    files. Then all is as it was before begin().
    """
    global _pool, _stuck, _engine, _processes
    kill_processes()
    if _pool is not None:
        end = threading.Thread(target=_pool.shutdown, kwargs=dict(cancel_futures=True), daemon=True)
        end.start()
        end.join(3)
        _pool = None
        _stuck = end.is_alive()
    if _engine == 'ray' and 'ray' in sys.modules:
        sys.modules['ray'].shutdown()
    _engine = 'local'
    _processes = 1
    isolate.stop_reader()


def run_program(main):
    """main(), and the end of this process with its status; kill and Ctrl-C end it as SystemExit
    would.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `finally` is reached
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(0)
    if not status:
        sys.stdout.flush()
    if _stuck:
        os._exit(status)
    sys.exit(status)
