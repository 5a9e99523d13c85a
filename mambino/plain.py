"""Plain values from outside: JSON of any depth, and whether a value is what it should be.

    header = parse_json(text)                   # ValueError for all that is none
    text = json_text(raw)                       # of the bytes of a file
    whole(value, 0)                             # an int, no bool, from 0 to LARGEST
    number(value)                               # a finite int or float
"""
import json
import math

LARGEST = 2**31 - 1         # of any size that a file may name: more than a machine could hold


def parse_json(text, **options):
    """json.loads; ValueError also where values are nested deeper than Python's stack."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError('JSON that is nested too deeply') from None


def json_text(raw):
    """The text of JSON's bytes: UTF-8, UTF-16 or UTF-32, with a byte order mark or without.
    UnicodeDecodeError, a ValueError, if they are none."""
    return raw.decode(json.detect_encoding(raw)).removeprefix('\ufeff')


def whole(value, least=None, most=LARGEST):
    """Whether a value is an int from `least` (None: -most) to `most`."""
    return type(value) is int and (-most if least is None else least) <= value <= most


def number(value):
    """Whether a value is a finite int or float."""
    return type(value) in (int, float) and abs(value) < math.inf


def table(value):
    """Whether a value is a dict whose keys are strings."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
