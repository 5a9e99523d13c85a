"""JSON as it is sent, made so that no other thread waits for it.

    json_bytes({'tokens': [7, 301]})        # b'{"tokens":[7,301]}'

The encoder of Python lets no other thread go on before it has ended, and the logprobs of a long prompt take it
seconds, in which no row would have a token and no request an answer. So long lists are written in slices.
"""
import json

SLICE = 64              # values of a list that are written at once
ENCODE = json.JSONEncoder(separators=(',', ':')).encode                             # made once, for each token
ENCODE_TEXT = json.JSONEncoder(separators=(',', ':'), ensure_ascii=False).encode


def json_bytes(value, encode=ENCODE_TEXT):
    """JSON that any client reads: what is no character stands there as an escape."""
    try:
        return b''.join(piece.encode('utf-8') for piece in pieces_of(value, encode))
    except UnicodeEncodeError:
        return b''.join(piece.encode('utf-8') for piece in pieces_of(value, ENCODE))


def pieces_of(value, encode):
    """Yields the JSON of a value, whose keys are texts, in texts."""
    if isinstance(value, dict) and value:
        before = '{'
        for key, item in value.items():
            yield f'{before}{encode(key)}:'
            yield from pieces_of(item, encode)
            before = ','
        yield '}'
    elif isinstance(value, list) and len(value) > SLICE:
        for first in range(0, len(value), SLICE):
            yield '[' if first == 0 else ','
            yield encode(value[first:first + SLICE])[1:-1]
        yield ']'
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        before = '['
        for item in value:
            yield before
            yield from pieces_of(item, encode)
            before = ','
        yield ']'
    else:
        yield encode(value)
