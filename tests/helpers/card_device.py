"""Makes torch believe that there is a CUDA device: compiles card.cpp, once, and loads it.

    reason = card_device.missing()      # why there can be none here; '' where there can
    card_device.install()               # for the rest of the process
"""
import ctypes
import functools
import glob
import hashlib
import os
import shutil
import subprocess

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, 'card.cpp')
SECONDS = 300                           # that the compiler may take


def missing():
    """Why there can be no pretended card here, or ''."""
    if torch.version.cuda:
        return 'this torch has CUDA of its own, whose kernels a pretended card would call'
    if not hasattr(os, 'fork'):
        return 'no fork: what a card changes in torch would stay'
    try:
        library()
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, 'stderr', b'') or b'').decode(errors='replace').partition('\n')[0]
        return f'card.cpp cannot be compiled: {error} {reason}'.strip()
    return ''


@functools.cache
def library():
    """The path of card.cpp compiled for this torch; it stays in __pycache__. OSError, SubprocessError where there is no
    compiler, or nowhere to keep it."""
    root = os.path.dirname(torch.__file__)
    with open(SOURCE, 'rb') as f:
        made_of = f.read() + repr((torch.__version__, root)).encode()
    folder = os.path.join(HERE, '__pycache__')
    path = os.path.join(folder, f'card-{hashlib.sha256(made_of).hexdigest()[:16]}.so')
    if os.path.exists(path):
        return path
    compiler = next(filter(None, map(shutil.which, ('g++', 'clang++'))), None)
    if compiler is None:
        raise FileNotFoundError('there is no C++ compiler')
    os.makedirs(folder, exist_ok=True)
    unfinished = f'{path}.{os.getpid()}'
    flags = ['-std=c++20', '-O0', '-fPIC', '-shared', '-w', f'-I{root}/include', f'-L{root}/lib']
    subprocess.run([compiler, *flags, SOURCE, '-o', unfinished, '-lc10', '-ltorch_cpu'],
                   check=True, capture_output=True, timeout=SECONDS)
    for old in glob.glob(os.path.join(folder, 'card-*.so')):
        os.remove(old)
    os.replace(unfinished, path)
    return path


@functools.cache
def install():
    """Gives torch the device, for the rest of this process."""
    if ctypes.CDLL(library()).install_card() != 1:
        raise RuntimeError('torch does not take the hooks of card.cpp')
