"""Rows within one JSON object: a list somewhere in it, objects by their keys, or lists side by side.

    layout, rows = json_objects.look_inside(values, value)     # None: it is no table
"""
import json

from mambino.prepare.tables.columns import SAMPLE_ROWS

FEWEST = 5      # rows; less is a setting
SMALL = 1 << 18  # characters of an object that is taken as a whole
DEEPEST = 5     # objects around the list
MOST = 1 << 26  # characters that are looked through
SHARE = 0.6     # of the object that its rows are, at least


class Found:
    """Values that may be rows, all at one place of an object."""

    def __init__(self):
        self.rows = []   # some
        self.keys = []   # of these, in an object
        self.n = 0
        self.chars = 0

    def add(self, row, chars, key=''):
        if len(self.rows) < SAMPLE_ROWS:
            self.rows.append(row)
            self.keys.append(key)
        self.n += 1
        self.chars += chars


def look_inside(values, value=None):
    """({'layout', ...}, some rows) of an object, of which `value` is all, or None where it is large;
    then it is read from `values`, which stand at its beginning. None for what is no table.
    """
    lists = {}   # path -> Found: the items of a list
    keyed = {}   # path -> Found: the objects in an object
    if value is None:
        walk(values, (), lists, keyed)
        size = values.position()
    else:
        look_at(value, (), lists, keyed)
        size = size_of(value)
    named = named_lists(lists)
    if named:
        return named
    lists = {path: found for path, found in lists.items() if found.n >= FEWEST}
    return side_by_side(lists, size) or lists_inside(lists, size) or by_keys(keyed, size)


def walk(values, path, lists, keyed):
    """Looks through a large object, piece by piece."""
    values.at += 1
    while values.peek() not in ('', '}') and values.position() < MOST:
        below = path + (values.key(),)
        start = values.position()
        char = values.peek()
        if char == '[':
            values.at += 1
            while values.peek() not in ('', ']') and values.position() < MOST:
                start = values.position()
                for item in values.one():
                    lists.setdefault(below, Found()).add(item, values.position() - start)
            values.at += 1
        elif char == '{':
            try:
                value = values.value(SMALL)
            except EOFError:
                if len(below) < DEEPEST:
                    walk(values, below, lists, keyed)
                    continue
                values.skip()
                continue
            keyed.setdefault(path, Found()).add(value, values.position() - start, below[-1])
            look_at(value, below, lists, keyed)
        else:
            values.skip()
    values.at += 1


def look_at(value, path, lists, keyed):
    """The same for an object that is in memory."""
    for key, child in value.items():
        below = path + (key,)
        if isinstance(child, list) and child and len(lists) < 10_000:
            for item in child:
                lists.setdefault(below, Found()).add(item, size_of(item))
        elif isinstance(child, dict) and child:
            keyed.setdefault(path, Found()).add(child, size_of(child), key)
            if len(below) < DEEPEST:
                look_at(child, below, lists, keyed)


def size_of(value):
    """Characters of a value in JSON."""
    return len(value) + 2 if isinstance(value, str) else len(json.dumps(value, ensure_ascii=False))


def are(found, type_):
    return all(isinstance(row, type_) for row in found.rows)


def lists_inside(lists, size):
    """The lists of objects, where they are most of it: of several, those with the same columns."""
    rows = {path: found for path, found in lists.items() if are(found, dict)}
    if not rows:
        return None
    largest = max(rows.values(), key=lambda found: found.chars)
    names = common_names(largest.rows)
    same = {path: found for path, found in rows.items() if common_names(found.rows) & names}
    if sum(found.chars for found in same.values()) < SHARE * size or not names:
        return None
    some = [row for found in same.values() for row in found.rows]
    return {'layout': 'object', 'inside': [list(path) for path in same]}, some


def common_names(rows):
    """The columns that most of the rows have."""
    names = {name for row in rows for name in row}
    return {name for name in names if sum(name in row for row in rows) > SHARE * len(rows)}


def by_keys(keyed, size):
    """Objects by their keys, as {"0": {...}, "1": {...}}; or columns of them, with the same keys."""
    for path, found in keyed.items():
        names = common_names(found.rows)
        if found.chars < SHARE * size or not names:
            continue
        if not path and are_columns(found.rows):
            return {'layout': 'columns'}, rows_of_columns(dict(zip(found.keys, found.rows)))
        if found.n >= FEWEST:
            return {'layout': 'object', 'inside': [list(path)], 'keyed': True}, found.rows
    return None


def are_columns(rows):
    """Whether these are columns, values by the number of their row."""
    first = list(rows[0])
    is_numbered = len(first) >= FEWEST and all(key.isdigit() for key in first)
    return is_numbered and all(list(row) == first for row in rows)


def side_by_side(lists, size):
    """Lists of one length, each a column."""
    columns = {path[0]: found for path, found in lists.items() if len(path) == 1}
    if not columns or any(are(found, (dict, list)) for found in columns.values()):
        return None
    lengths = {found.n for found in columns.values()}
    if len(lengths) > 1 or sum(found.chars for found in columns.values()) < SHARE * size:
        return None
    return {'layout': 'columns'}, rows_of_columns({name: found.rows for name, found in columns.items()})


def rows_of_columns(table):
    """The rows of {name: list, or object of the values}; of columns of one length."""
    columns = {}
    for name, column in table.items():
        if isinstance(column, (list, dict)):
            columns[name] = list(column.values()) if isinstance(column, dict) else column
    longest = max(map(len, columns.values()), default=0)
    columns = {name: column for name, column in columns.items() if len(column) == longest}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def named_lists(lists):
    """A list of lists, and one of the names of their columns beside it."""
    for path, found in lists.items():
        widths = {len(row) for row in found.rows if isinstance(row, list)}
        if len(widths) == 1 and are(found, list):
            for other, names in lists.items():
                if names.n in widths and are(names, str) and other[:-1] == path[:-1]:
                    return {'layout': 'object', 'inside': [list(path)], 'names': names.rows}, found.rows
    return None
