"""What worker processes of prepare.py are made to do in tests: functions that can be pickled, no
more.
"""
import os
import sys

from mambino.prepare import spool


def extract_and_note(task):
    """spool.extract, and the names of all modules that its process has loaded, in a file of its
    own.
    """
    with open(f'modules-{os.getpid()}', 'w') as f:
        f.write('\n'.join(sys.modules))
    return spool.extract(task)
