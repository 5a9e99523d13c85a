"""Reads datasets of the Hugging Face hub, streamed: hf:name, hf:name:config or
hf:name:config:split.

    for text, last in hub.read_hf('hf:owner/name', options, notes): ...    # a document a row
"""
import itertools

from mambino.configurator import fail
from mambino.prepare.files import Skip
from mambino.prepare.tables.looks import profile_of
from mambino.prepare.tables.rows import rows_of

LOOKED_AT = 200  # rows that tell which column has the text: they come over the net


class Unreachable(Exception):
    """What an hf: input names cannot be had now. Unlike a broken file, that is reason to stop:
    later it may be there.
    """


def look(spec):
    """{'kind', 'format', 'plan', 'profile', 'rows', 'facts'} of a dataset, from its first rows. Raises
    what the hub raises.
    """
    rows = list(itertools.islice(open_hf(spec), LOOKED_AT))
    return {'kind': 'hf', 'format': 'dataset of the hub', 'plan': {}, 'profile': profile_of(rows),
            'rows': len(rows), 'facts': {}}


def read_hf(path, options, notes):
    """A document a row, of one shard where options['shard'] is (number of shards, index). options: a
    plan of survey.py among them.
    """
    try:
        rows = open_hf(path)
        if 'shard' in options:
            rows = rows.shard(*options['shard'])
        yield from rows_of(rows, options, notes)
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


def or_end(function, spec):
    """function(spec), which is `look` or `open_hf`. Ends the program where the dataset cannot be had."""
    try:
        return function(spec)
    except ImportError:
        fail(f'{spec}: needs the package datasets: pip install datasets')
    except Exception as error:  # the hub, the net, the formats behind it: anything
        fail(unreachable(spec, error))


def unreachable(spec, error):
    """Unreachable with what went wrong, on one line."""
    message = str(error).partition('\n')[0]
    return Unreachable(f'{spec}: {type(error).__name__}: {message}')
