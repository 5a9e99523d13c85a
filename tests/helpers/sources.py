"""What prepare.py finds in made-up folders."""
import os

import pytest

from mambino.prepare.sources import find

posix = pytest.mark.skipif(os.name == 'nt', reason='links need rights on Windows')


def write(path, content='x\n'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))


def look(*inputs, **settings):
    """({path of what is read: kind}, {path of what is skipped: reason}) as they come."""
    kept, skipped = find([str(path) for path in inputs], **settings)
    assert all(set(entry) == {'file', 'reason'} for entry in skipped)
    return {source.path: source.kind for source in kept}, {
        entry['file']: entry['reason'] for entry in skipped
    }


def names(table):
    return {os.path.basename(path): value for path, value in table.items()}
