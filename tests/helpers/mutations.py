"""Ways to damage what a program reads: bytes, JSON, what torch.save wrote. rng: a random.Random, all of whose
draws make the damage."""
import copy
import json
import math
import os
import pickle
import zipfile

import torch

CANARY = 'canary'       # the file that a hostile pickle makes where it is run
DEEP = 3000


def deep():
    """A list in a list, …"""
    value = []
    for _ in range(DEEP):
        value = [value]
    return value


PLAIN = [None, True, False, 0, -1, 1, 3, 2**31, 2**32, 2**63, -2**63, 10**30, 1.5, -0.5, 1e300, math.nan, math.inf, '',
         'x', '0', 'char', '\x1b[31mred', '../../elsewhere', 'a\0b', '\udcff', 'é' * 300, [], {}, [1, 2], [[]],
         {'a': 1}, 100_000, 'bfloat16', 'int8']


def plain(rng):
    """Some value of JSON, or nearly."""
    return deep() if rng.random() < 0.03 else copy.deepcopy(rng.choice(PLAIN))


def damage_bytes(data, rng):
    """Bytes with some of them changed, cut off, doubled, or put elsewhere."""
    data = bytearray(data)
    kind = rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        return bytes(data[at:])
    if kind == 2:
        return bytes(data[:at]) + os.urandom(0) + rng.randbytes(rng.randrange(1, 40)) + bytes(data[at:])
    if kind == 3:
        return bytes(data[:at]) + bytes(data[at + rng.randrange(1, 200):])
    if kind == 4:
        return b'' if rng.random() < 0.3 else rng.randbytes(rng.randrange(300))
    for _ in range(rng.choice((1, 1, 2, 20))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def places(value, path=()):
    """The paths of all values in dicts and lists in one another."""
    found = [path] if path else []
    if len(path) > 20:
        return found
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        found += places(part, (*path, key))
    return found


def damage_values(contents, rng, new_value=plain):
    """Dicts and lists with one to three values changed, left out or added."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = places(contents)
        if not paths:
            return new_value(rng)
        top = [path for path in paths if len(path) <= 2]                        # else most would be deep down
        *parents, last = rng.choice(top if rng.random() < 0.6 else paths)
        holder = contents
        for key in parents:
            holder = holder[key]
        kind = rng.random()
        if kind < 0.2:
            del holder[last]
        elif kind < 0.25 and isinstance(holder, dict):
            holder[rng.choice(('more', '', '\x1b', 'layers.99'))] = new_value(rng)
        else:
            holder[last] = new_value(rng) if not isinstance(holder[last], torch.Tensor) or rng.random() < 0.2 \
                else damage_tensor(holder[last], rng)
    return contents


def damage_json(text, rng):
    """JSON, as bytes, with other values, or other bytes."""
    if rng.random() < 0.3:
        return damage_bytes(text, rng)
    if rng.random() < 0.03:
        return b'[' * 100_000
    try:
        contents = damage_values(json.loads(text), rng)
    except (ValueError, RecursionError):    # it is damaged already
        return damage_bytes(text, rng)
    try:
        text = json.dumps(contents)
    except RecursionError:
        text = '{"model_type": ' * DEEP + '1' + '}' * DEEP
    return text.encode('utf-8', 'surrogatepass')


def damage_tensor(tensor, rng):
    """A tensor of another shape, type, kind or with other numbers."""
    changes = [
        lambda t: t.flatten(), lambda t: t[None], lambda t: t.flatten()[:0], lambda t: t.new_zeros(()),
        lambda t: t[..., :1] if t.ndim else t,
        lambda t: t.double(), lambda t: t.to(torch.int64), lambda t: t.to(torch.complex64), lambda t: t.to(torch.bool),
        lambda t: t.to(torch.uint8), lambda t: t.float() * math.nan, lambda t: t.float() + math.inf,
        lambda t: t.float() * 1e30, lambda t: -t.float().abs() - 5, lambda t: t.float().to_sparse(),
        lambda t: t.new_zeros(1).expand(2**33), lambda t: t.new_zeros(1).expand(t.shape) if t.ndim else t,
        lambda t: torch.empty(t.shape, device='meta'), lambda t: t.half(), lambda t: t.flip(0) if t.ndim else t,
        lambda t: torch.cat((t, t)) if t.ndim else t, lambda t: t.mT if t.ndim > 1 else t,
        lambda t: torch.full_like(t, -1) if t.dtype != torch.uint8 else t, lambda t: torch.full_like(t, 99)]
    return rng.choice(changes)(tensor)


class Hostile:
    """What makes the canary where it is unpickled."""

    def __reduce__(self):
        return exec, (f'open({os.environ.get("MAMBINO_CANARY", CANARY)!r}, "w").close()',)


def damage_checkpoint(path, rng):
    """A file of torch.save, damaged in its place: its bytes, its values, or something hostile."""
    kind = rng.random()
    if kind < 0.2:
        with open(path, 'rb') as f:
            data = f.read()
        data = damage_bytes(data, rng)
    elif kind < 0.27:
        data = hostile(path, rng)
    else:
        contents = torch.load(path, map_location='cpu', weights_only=True)
        contents = damage_values(contents, rng)
        try:
            torch.save(contents, path)
            return
        except (RecursionError, UnicodeEncodeError, NotImplementedError):
            data = b''
    with open(path, 'wb') as f:
        f.write(data)


def hostile(path, rng):
    """The bytes of a file that runs something where it is unpickled."""
    if rng.random() < 0.3:
        return pickle.dumps(Hostile())
    protocol = dict(pickle_protocol=rng.choice((2, 4)), _use_new_zipfile_serialization=rng.random() < 0.7)
    contents = {'format': 1, 'weights': {'a': Hostile()}, 'more': Hostile()}
    torch.save(contents, path + '.hostile', **protocol)
    with open(path + '.hostile', 'rb') as f:
        return f.read()


def damage_zip(path, rng):
    """Another member of the zip of torch.save, damaged."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = rng.choice(sorted(members))
    members[name] = damage_bytes(members[name], rng)
    with zipfile.ZipFile(path, 'w') as file:
        for name, data in members.items():
            file.writestr(name, data)
