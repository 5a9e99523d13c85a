"""Keys and values so far: how one step of t tokens reads and writes them, planned once for all
layers; and the precision of a state.

    kv_step = KVStep(state['pos'], t, window, device)
    keys, values = kv_step.append(cache, k, v)          # in each layer: {'k', 'v'} take the new ones
    y = attention(q, keys, values, mask=kv_step.mask)

Without a window slot s of a cache (B, G, S, P) holds position s, and S grows by doubling. With one
it is a ring of S = window slots: slot s holds the latest position p with p % S = s. Caches are
written in place.

    state = kept_as(state, torch.bfloat16)      # half the memory; rounded after each step from here on

A step computes in its own precision, and gives a state back in the one in which it came. Letters of
the shapes: B batch, G key heads, S slots, P head size.

    kv_step = kv_step_of(pos, t, window, device)    # a KVStep; a DeviceKVStep where pos lies on a card
"""
import functools

import torch
import torch.nn.functional as F

SMALLEST = 64   # slots of a new cache that grows
ROUNDED = 'k', 'v', 'ssm'   # nearly all of a state; a convolution's is small
DTYPES = {'float32': None, 'bfloat16': torch.bfloat16}      # of the setting state_dtype; None: as computed


def is_rounded(name):
    """Whether a part of a state, as 'ssm.3', is kept in the precision that is asked for."""
    return name.partition('.')[0] in ROUNDED


def kept_as(state, dtype):
    """A state in this precision; None: as it is."""
    if dtype is None:
        return state
    return {name: value.to(dtype) if is_rounded(name) else value for name, value in state.items()}


def is_cache(name):
    """Whether a part of a state, as 'k.3', has slots for tokens."""
    return name[:2] in ('k.', 'v.')


def resized(cache, size):
    """A key/value cache (B, G, S, P) with so many slots. As long as no ring has come round, slot s
    holds position s."""
    return F.pad(cache, (0, 0, 0, size - cache.shape[2]))   # a negative pad cuts


def bounded(net, state, t):
    """→ (the state, the window) for a net.step of t tokens: beyond block_size a model that has no window gets
    one of that length, and its caches are rings of as many slots.

    Rotary positions are relative, so this is what it was trained on; and its state stops growing. An empty
    state, or None, takes t ≤ block_size."""
    size = net.config.block_size
    if state is None or getattr(net.config, 'window', 1) or int(state['pos'].max()) + t <= size:
        return state, 0
    return {name: resized(value, size) if is_cache(name) and value.shape[2] != size else value
            for name, value in state.items()}, size


class KVStep:
    """One step of t tokens after positions pos (B,), int64 on the CPU, so that planning never waits
    for a GPU."""

    def __init__(self, pos, t, window, device, causal=True):
        if len(pos) and int(pos.min()) < 0:
            raise ValueError(f'a token at position {int(pos.min())}')
        self.pos = pos
        self.t = t
        self.window = window
        self.device = device
        self.causal = causal            # else each new token sees all of them
        self.length = int(pos.max()) + t  # tokens of the longest row after this step
        self.is_first = causal and self.length == t             # nothing came before
        self.new_positions = pos[:, None] + torch.arange(t)     # (B, t)
        self.positions = self.on_device(self.new_positions)

    def on_device(self, tensor):
        """A tensor of the CPU there; no NVIDIA card is waited for."""
        return tensor.to(self.device, non_blocking=self.device.type == 'cuda')

    @functools.cached_property
    def slots(self):
        """Where to write: rows (B, 1) and slots (B, up to t); of a ring only the last tokens
        stay."""
        stay = self.new_positions[:, -self.window:] if self.window else self.new_positions
        rows = torch.arange(len(stay), device=self.device)[:, None]
        return rows, self.on_device(stay % self.window if self.window else stay)

    @functools.cached_property
    def mask(self):
        """(B, 1, t, keys) bool: which keys that `append` returns each new token sees; None: all of
        them."""
        query = self.new_positions
        window = self.window
        if not window:
            key = torch.arange(self.length)[None]
        elif self.t > 1 or self.is_first:  # the ring before writing, then the new tokens
            last = self.pos[:, None] - 1
            key = torch.cat((last - (last - torch.arange(window)) % window, query), 1)
        else:                                                   # the ring after writing one token
            key = query - (query - torch.arange(window)) % window
        last_seen = query if self.causal else query[:, -1:].expand_as(query)
        mask = (key[:, None] >= 0) & (key[:, None] <= last_seen[:, :, None])  # (B, t, keys)
        if window:
            mask &= key[:, None] > query[:, :, None] - window
        if window and not self.causal:
            mask &= key[:, None] < query[:, :, None] + window
        return None if self.causal and bool(mask.all()) else self.on_device(mask[:, None])

    def append(self, cache, k, v):
        """Writes k, v (B, t, G, P) to the caches {'k', 'v'}; returns keys and values (B, S, G, P)
        to attend to."""
        self.make_room(cache, k, v)
        rows, slots = self.slots
        attended = []
        for name, new in (('k', k), ('v', v)):
            old = cache[name].transpose(1, 2)                   # (B, S, G, P), a view
            overwrites = self.window and self.t > 1  # what the chunk's first tokens still see
            if overwrites:
                attended.append(torch.cat((old.to(new.dtype), new), 1))
            old[rows, slots] = new[:, -slots.shape[1]:].to(old.dtype)
            if not overwrites:
                attended.append((old if self.window else old[:, :self.length]).to(new.dtype))
        return attended

    def make_room(self, cache, k, v):
        """Makes the caches {'k', 'v'} hold all tokens; k, v (B, t, G, P) are like what will be
        written."""
        full = cache['k'] is not None and (self.window or self.length <= cache['k'].shape[2])
        if full:
            return
        size = self.window or max(SMALLEST, 1 << (self.length - 1).bit_length())
        for name, like in (('k', k), ('v', v)):
            B, _, G, P = like.shape
            old = cache[name]
            larger = (like if old is None else old).new_zeros(B, G, size, P)
            if old is not None:
                larger[:, :, :old.shape[2]] = old
            cache[name] = larger


class DeviceKVStep:
    """One token of each row after positions pos (B,), int64 on the device, into caches that have room
    for it; of a window they are rings.

    Which memory is read and written, and how much, depends on no number in pos: a graph of such a
    step is good for every token (sample/graphs.py)."""
    is_first = False

    def __init__(self, pos, window):
        self.pos = pos
        self.window = window
        self.positions = pos[:, None]                           # (B, 1)
        self.rows = torch.arange(len(pos), device=pos.device)
        self.mask = None                                        # (B, 1, 1, S) bool, made with the first cache
        self.slots = None                                       # (B,)

    def append(self, cache, k, v):
        """Writes k, v (B, 1, G, P) to the caches {'k', 'v'}; returns all slots, (B, S, G, P)."""
        if self.mask is None:
            self.look_at(cache['k'].shape[2])
        attended = []
        for name, new in (('k', k), ('v', v)):
            old = cache[name]                                   # (B, G, S, P)
            old[self.rows, :, self.slots] = new[:, 0].to(old.dtype)
            attended.append(old.transpose(1, 2).to(new.dtype))
        return attended

    def look_at(self, S):
        """Which slot of S each token takes, and which it sees."""
        query = self.positions
        slot = torch.arange(S, device=query.device)             # (S)
        key = query - (query - slot) % S if self.window else slot   # positions that are in the slots
        self.slots = self.pos % S if self.window else self.pos
        self.mask = ((key >= 0) & (key <= query))[:, None, None]
        self.mask.last = self.pos       # in other words: the slots up to there, or all


def kv_step_of(pos, t, window, device, causal=True):
    """What plans a step of t tokens after positions pos (B,); pos on a card: of one token."""
    return KVStep(pos, t, window, device, causal) if pos.device.type == 'cpu' else DeviceKVStep(pos, window)
