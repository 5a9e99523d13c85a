"""Small language models from your own files. The commands stand a folder above; this is what they are made of."""
import os

__version__ = '0.14.0'


def script_path(name):
    """Where a script lies, or config: above this folder in a checkout; in scripts/ where pip has installed it."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, 'scripts')
    return os.path.join(installed if os.path.isdir(installed) else os.path.dirname(here), name)
