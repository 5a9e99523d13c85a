"""Reads datasets of the Hugging Face hub, streamed: hf:name, hf:name:config or
hf:name:config:split.

    for text, last in hub.read_hf('hf:owner/name', options, notes): ...    # a document a row
"""
import itertools

from mambino.prepare.columns import FIRST_ROWS, choose_column, holds_text, no_column, rows_of
from mambino.prepare.files import Skip


class Unreachable(Exception):
    """What an hf: input names cannot be had now. Unlike a broken file, that is reason to stop:
    later it may be there.
    """


def read_hf(path, options, notes):
    """A document a row, of one shard where options['shard'] is (number of shards, index)."""
    try:
        rows = open_hf(path)
        if 'shard' in options:
            rows = rows.shard(*options['shard'])
        first = list(itertools.islice(rows, FIRST_ROWS))
        names = list(dict.fromkeys(name for row in first for name in row))
        texts = [name for name in names if holds_text(first, name)]
        column = choose_column(names, texts, options['text_column'])
        if first and column is None:
            raise no_column(names, options['text_column'])
        yield from rows_of((row.get(column) for row in rows), column, notes)
    except Skip:
        raise
    except Exception as error:  # the hub, the net, the file formats behind it: anything
        raise unreachable(path, error) from None


def open_hf(spec):
    """hf:name[:config[:split]] → a streamed datasets.IterableDataset."""
    import datasets
    datasets.disable_progress_bars()
    name, config, split = (spec[3:].split(':') + ['', ''])[:3]
    return datasets.load_dataset(name, config or None, split=split or 'train', streaming=True)


def unreachable(spec, error):
    """Unreachable with what went wrong, on one line."""
    message = str(error).partition('\n')[0]
    return Unreachable(f'{spec}: {type(error).__name__}: {message}')
