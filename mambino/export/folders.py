"""Where an export goes: nobody else's files are lost, and nothing half done stays.

    with new_folder(partial, folder):           # removed again if anything goes wrong within
        …                                       # the writers fill `partial`
        paths = put_in_place(partial, folder)   # renamed only once all of it is there
"""
import os
import shutil
from contextlib import contextmanager

from mambino.configurator import fail


def name_of(path):
    """out_dir as a name for what is made of it, to which more can be added: without the file in
    it, and hf: before it."""
    path = path.removeprefix('hf:')
    path = os.path.normpath(os.path.dirname(path) if os.path.isfile(path) else path)
    return os.path.abspath(path) if os.path.basename(path) in ('', '.', '..') else path


def partial_of(folder):
    """The folder to write into first. In a folder that is there already: that surely lies on the
    same disk."""
    if os.path.isdir(folder):
        return os.path.join(folder, 'partial')
    return folder.rstrip(os.sep + '/') + '.partial'


def check_folder(folder, source, is_checkpoint, force):
    """Ends the program in a line if the folder holds what may not be lost. source: the checkpoint's
    folder, or its file, or hf:folder; is_checkpoint: whether one will be written; force: whether files of
    the same names may be written over."""
    is_in_danger = is_checkpoint or source.startswith('hf:')
    source = source.removeprefix('hf:')
    source = os.path.dirname(source) if os.path.isfile(source) else source
    partial = partial_of(folder)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        fail(f'{folder}: is a file; name a folder with --to')
    if is_in_danger and os.path.realpath(folder) == os.path.realpath(source):
        fail(f'{folder}: is where the model itself lies, whose files would be lost; name another '
             'folder with --to')
    try:
        if os.path.isdir(folder) and os.listdir(folder) and not force:
            fail(f'{folder}: is not empty; name another folder with --to, or write over the files '
                 'there with --force')
    except OSError as error:
        fail(f'{folder}: cannot be read: {error.strerror}')
    if os.path.lexists(partial):
        fail(f'{partial}: is in the way. If an export left it that failed or was killed, remove '
             'it; else name another folder with --to')


@contextmanager
def new_folder(partial, folder):
    """Makes `partial`, on its way to become `folder`; whatever goes wrong within takes it away
    again. A ValueError, and what a full disk raises, end the program in a line."""
    try:
        os.makedirs(partial)
    except OSError as error:
        fail(f'{folder}: cannot be written: {error.strerror}')
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, ValueError):
            fail(error)
        if isinstance(error, (OSError, RuntimeError)):  # torch says RuntimeError of a full disk
            first_line = ''.join(str(error).splitlines()[:1])
            reason = getattr(error, 'strerror', None) or f'is the disk full? {first_line}'
            fail(f'{folder}: cannot be written: {reason}')
        raise


def put_in_place(partial, folder):
    """Renames `partial`, or the files in it, to what they should be → their paths."""
    files = sorted(os.listdir(partial))
    if os.path.isdir(folder):
        for file in files:
            os.replace(os.path.join(partial, file), os.path.join(folder, file))
        os.rmdir(partial)
    else:
        os.replace(partial, folder)
    return [os.path.join(folder, file) for file in files]


def size_of(path):
    """'1.2 MB' of a file."""
    size = os.path.getsize(path)
    return f'{size / 1e6:,.1f} MB' if size >= 1e5 else f'{size / 1e3:,.1f} kB'
