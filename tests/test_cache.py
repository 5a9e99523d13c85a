"""Hugging Face's cache, read as a folder."""
import os

from helpers.sources import look, names, posix, write

from mambino.prepare import sources


@posix
def test_the_cache_of_hugging_face(here):
    """The names of its files are links, to others under hashes."""
    root = here / 'hub' / 'datasets--a--b'
    for name in 'blobs/d41d8', 'refs/main', 'snapshots/1/README.md':
        write(root / name)
    write(here / 'secret.txt')
    (root / 'snapshots' / '1' / 'data').mkdir()
    os.symlink('../../../blobs/d41d8', root / 'snapshots' / '1' / 'data' / 'train.csv')
    for link, to in ('secret.txt', here / 'secret.txt'), ('up', '../../refs'), ('main', '../../refs/main'):
        os.symlink(to, root / 'snapshots' / '1' / link)
    os.symlink(root / 'snapshots' / '1', here / 'named')
    for path in 'hub', 'hub/datasets--a--b', 'hub/datasets--a--b/snapshots/1', 'named':
        kept, skipped = look(path)
        assert names(kept) == {'train.csv': 'csv', 'README.md': 'text'}, path
        assert names(skipped).items() >= {'secret.txt': sources.LINK}.items()
    assert names(look('hub')[1])['blobs'] == sources.BLOBS
