"""A program with a planted fault: some text of one of its files replaced, for this process alone.

    plant('model_gpt.py', 'device=idx.device', 'device="cpu"')      # in a process of on_card
    from helpers import card_models                                 # now with that fault
"""
import importlib.abc
import importlib.util
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# the program's modules, and what has imported them
OF_PROGRAM = {
    'mambino', 'model_gpt', 'model_mamba', 'model_hybrid', 'helpers.card_models', 'helpers.runs', 'helpers.jobs'}


class Loader(importlib.abc.SourceLoader):
    """Of one module: its path, and another text than its file has."""

    def __init__(self, path, text):
        self.path, self.text = path, text

    def get_filename(self, name):
        return self.path

    def get_data(self, path):
        return self.text.encode()

    def path_stats(self, path):
        raise OSError           # or what was compiled before would be taken


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name, loader):
        self.name, self.loader = name, loader

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.loader.path, loader=self.loader)


def faulty_text(file, old, new):
    """The text of a file with old, which it has, replaced by new; old may be a compiled pattern."""
    with open(os.path.join(ROOT, file), encoding='utf-8') as f:
        text = f.read()
    pattern = old if isinstance(old, re.Pattern) else re.compile(re.escape(old))
    assert pattern.search(text), f'{file} has no {old!r} any more: plant this fault elsewhere'
    return pattern.sub(new if isinstance(old, re.Pattern) else lambda match: new, text)


def plant(file, old, new):
    """From now on the module has this fault; whatever of the program was imported is imported anew."""
    text = faulty_text(file, old, new)
    name = file.removesuffix('.py').replace('/', '.')
    for module in list(sys.modules):
        if module in OF_PROGRAM or module.startswith('mambino.'):
            del sys.modules[module]
    sys.meta_path.insert(0, Finder(name, Loader(os.path.join(ROOT, file), text)))
