"""prepare.py in a process that is forked from this one, which costs a fraction of a second; killed,
or without room on the disk, at the n-th change that it makes to the file system.

    python tests/helpers/kills.py        # at every change, in a folder of its own
"""
import contextlib
import errno
import io
import os
import runpy
import signal
import sys
import traceback
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CHANGES = ('replace', 'rename', 'remove', 'unlink', 'rmdir', 'mkdir', 'fsync')


def forked(folder, argv, before=lambda: None):
    """(exit status, stdout and stderr) of prepare.py with these arguments, in `folder`."""
    log = os.path.join(folder, 'log')
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # of forking where there are threads: they do nothing here
        pid = os.fork()
    if not pid:
        status = 99
        try:
            os.chdir(folder)
            with open(log, 'w', encoding='utf-8') as said, contextlib.redirect_stdout(said):
                sys.stderr = said
                sys.argv = ['prepare.py', *argv, '--workers=1']
                sys.path.insert(0, ROOT)
                before()
                runpy.run_path(os.path.join(ROOT, 'prepare.py'), run_name='__main__')
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            with open(log, 'a', encoding='utf-8') as said:
                traceback.print_exc(file=said)
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(log, encoding='utf-8') as said:
        return status, said.read()


def at_change(n, act):
    """A function for `before`: from the n-th change to the file system on, act() is called in its
    place; if that is interrupt(), at the n-th alone.
    """
    count = [0]

    def patched(function):
        def change(*args, **settings):
            count[0] += 1
            if count[0] > n and (act is not interrupt or count[0] == n + 1):
                act()
            return function(*args, **settings)
        return change

    def patch():
        from mambino.prepare import exchange
        for name in CHANGES:
            setattr(os, name, patched(getattr(os, name)))
        exchange.exchange = patched(exchange.exchange)
        real_open = io.open

        def opened(path, mode='r', *args, **settings):
            return (patched(real_open) if set(mode) & set('wax+') else real_open)(path, mode, *args, **settings)

        import builtins
        builtins.open = opened

    return patch


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def no_room():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def state_of(folder):
    """{path: bytes} of all files in a folder; None where there is none."""
    if not os.path.isdir(folder):
        return None
    files = {}
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), 'rb') as f:
                files[os.path.relpath(os.path.join(root, name), folder)] = f.read()
    return files


def prepare_inputs(folder):
    """Two folders of texts; {name of a folder: the dataset of it}, each of which has been data/x before the other."""
    states = {}
    for name in 'ab':
        os.mkdir(os.path.join(folder, name))
        for i in range(3):
            with open(os.path.join(folder, name, f'{i}.txt'), 'w', encoding='utf-8') as f:
                f.write(f'some text of {name} {i}, ' * 20)
    for name in 'ab':
        status, said = forked(folder, [name, '--out=x', '--tokenizer=byte'])
        assert status == 0, said
        states[name] = state_of(os.path.join(folder, 'x'))
    return states


def try_change(folder, states, before, wanted, n, act):
    """data/x is of the folder `before`, and is to be of `wanted`; that is stopped at its n-th
    change. Then data/x is whole, and the same command makes it that of `wanted`. Returns whether
    there were as many changes."""
    argv = [wanted, '--out=x', '--tokenizer=byte']
    status, said = forked(folder, argv, at_change(n, act))
    now = state_of(os.path.join(folder, 'x'))
    assert now in (states[before], states[wanted]), (n, 'damaged' if now else 'gone')
    assert status in (0, 2, 130, -signal.SIGKILL), (n, status, said)
    assert 'Traceback' not in said and (status != 2 or said.count('error: ') == 1), (n, said)
    assert status or now == states[wanted], n
    again, said = forked(folder, argv)
    assert again == 0, (n, said)
    assert state_of(os.path.join(folder, 'x')) == states[wanted]
    assert not os.path.exists(os.path.join(folder, 'x.partial'))
    return status != 0


def main():
    import tempfile
    sys.path.insert(0, ROOT)
    runpy.run_path(os.path.join(ROOT, 'prepare.py'), run_name='prepare')  # what it imports is there when it is forked
    with tempfile.TemporaryDirectory() as folder:
        states = prepare_inputs(folder)
        for act in die, no_room, interrupt:
            n = 0
            before, wanted = 'b', 'a'
            while try_change(folder, states, before, wanted, n, act):
                before, wanted = wanted, before
                n += 1
            print(f'{act.__name__}: {n} changes, none of which loses anything')


if __name__ == '__main__':
    main()
