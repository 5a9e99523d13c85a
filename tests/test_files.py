"""Files that are there whole or not at all, their checksums, and folders that one process holds."""
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runs import POSIX, ROOT

from mambino import files

HOLD = 'import sys, time; from mambino import files; files.hold(sys.argv[1]); print("held", flush=True); time.sleep(60)'


@pytest.fixture(autouse=True)
def released():
    yield
    files.release()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds out/."""
    folder = tmp_path / 'out'
    folder.mkdir()
    env = {**os.environ, 'PYTHONPATH': ROOT}
    with subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'held\n'
        yield process
        process.kill()


# --- one writer

@POSIX
def test_a_folder_is_held_until_its_process_is_dead(holder, tmp_path):
    folder = tmp_path / 'out'
    os.symlink(folder, tmp_path / 'link')
    for path in (folder, tmp_path / 'link', str(folder) + '/./'):
        with pytest.raises(files.Held) as held:
            files.hold(path)
        assert held.value.holder['pid'] == holder.pid and held.value.holder['since']
    (folder / 'ckpt.pt.123-0123456789ab.tmp').write_text('left')
    (folder / 'notes.tmp').write_text('not ours')
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    files.hold(folder)
    files.hold(tmp_path / 'link')                           # the same process may
    assert json.loads((folder / files.LOCK).read_text())['pid'] == os.getpid()
    assert sorted(os.listdir(folder)) == ['notes.tmp', files.LOCK]
    files.release()
    assert os.listdir(folder) == ['notes.tmp']


@POSIX
def test_a_forked_process_does_not_hold_on(tmp_path):
    files.hold(tmp_path)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        files.release()
        number = files.open_lock(str(tmp_path / files.LOCK))
        assert files.lock(number)
        os.close(number)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@POSIX
def test_a_lock_that_is_a_link_harms_nobody(tmp_path):
    other = tmp_path / 'precious'
    other.write_text('precious')
    for make in (os.symlink, os.link):
        make(other, tmp_path / files.LOCK)
        files.hold(tmp_path)
        files.release()
        assert other.read_text() == 'precious'


def test_without_locks_the_holder_counts(tmp_path, monkeypatch):
    """As on some network file systems."""
    monkeypatch.setattr(files, 'lock', lambda number: None)
    monkeypatch.setattr(files, 'BEAT', 0.02)
    monkeypatch.setattr(files, 'PATIENCE', 0.5)
    files.hold(tmp_path)
    mine, files.held = files.held, {}                       # as another process sees it
    path = tmp_path / files.LOCK
    foreign = dict(json.loads(path.read_text()), host='elsewhere')
    try:
        monkeypatch.setattr(files, 'is_dead', lambda pid: False)
        with pytest.raises(files.Held):
            files.hold(tmp_path)
    finally:
        for _, counting in mine.values():
            counting.set()
    time.sleep(0.1)
    path.write_text(json.dumps(foreign))
    files.hold(tmp_path)                                    # nobody counts any more
    assert json.loads(path.read_text())['host'] != 'elsewhere'
    files.release()

    def watched(path):                                      # another sees nobody either, and writes last
        monkeypatch.setattr(files, 'write_holder', lambda *_: path.write_text(json.dumps(foreign)))
    monkeypatch.setattr(files, 'watch', lambda _: watched(path))
    with pytest.raises(files.Held):
        files.hold(tmp_path)


# --- whole or not at all

def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'a'
    with files.whole(path) as f:
        f.write(b'old')
    with pytest.raises(KeyError):
        with files.whole(path) as f:
            f.write(b'new')
            raise KeyError
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a']

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)
    with pytest.raises(OSError, match='No space left'):
        with files.whole(path) as f:
            f.file = Full(f.file)
            torch.save(dict(weight=torch.zeros(10_000)), f)     # torch says something else of it
    assert path.read_bytes() == b'old'


@POSIX
def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    other = tmp_path / 'precious'
    other.write_text('precious')
    os.symlink(other, tmp_path / 'laid')
    monkeypatch.setattr(files, 'temporary', lambda path: str(tmp_path / 'laid'))
    with pytest.raises(FileExistsError):
        with files.whole(tmp_path / 'a'):
            pass
    assert other.read_text() == 'precious'


def test_no_two_temporary_names_are_alike(tmp_path):
    names = {files.temporary('a') for _ in range(1000)}
    assert len(names) == 1000 and all(files.TEMPORARY.fullmatch(name) for name in names)


# --- checksums

def test_every_bit_counts(tmp_path):
    path = tmp_path / 'a.pt'
    contents = dict(weights=dict(w=torch.arange(40.0), b=torch.ones(3, dtype=torch.int8)), step=5, name='abc')
    torch.save(contents, path)
    assert files.damage_of(path) == ''
    raw = path.read_bytes()
    n_found = 0
    for bit in range(0, len(raw) * 8, 11):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if files.damage_of(path):
            n_found += 1
            continue
        try:
            read = torch.load(path, weights_only=True)
        except Exception:
            continue
        assert str(read) == str(contents), bit              # it was padding
    assert n_found > len(raw) * 8 / 11 / 3
    for n in (0, 10, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:n])
        assert files.damage_of(path)


def test_a_bomb_is_not_unpacked(tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path / 'a.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', b'0' * 50_000_000)
    assert 'compressed' in files.damage_of(tmp_path / 'a.pt')
