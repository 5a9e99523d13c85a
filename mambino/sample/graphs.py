"""The next token on an NVIDIA card by one launch: a CUDA graph of net.step, in place of hundreds of
kernels that Python starts one after another.

    logits, state = graphs.step(net, idx, state)    # of decode.step, for one token of each row on a card

A card reads the weights of 50M parameters in 0.05 ms; to start its 500 to 1,400 kernels takes
Python 3 to 9. So what a token computes is recorded once on the memory where the state's tensors
lie, and replayed:

    state ──► the same memory as before? ──► the first few tokens: kernel by kernel, into that memory
                        │                                  then: recorded, kept by the addresses
                        └──► idx, positions ──► replay ──► logits, the state written to

A graph is good as long as the model is what and where it was, and for any state that lies where its
own lay. Positions are numbers on the card, so that no kernel's size depends on them
(cache.DeviceKVStep); a cache that is full grows by net.step, lies elsewhere, and gets a graph of
its own. What cannot be recorded is said once and computed by net.step from then on.

Letters of the shapes: B rows, V vocabulary, S cache slots.
"""
import functools
import operator
import sys
import threading
import weakref
from contextlib import nullcontext, suppress
from itertools import chain

import torch

from mambino.language_model import whole_shape
from mambino.sample.parts import PARTS, Unknown, require
from mambino.sample.watched import Plans, Watched
from mambino.weights.adapters import add_loras

WARM = 3            # tokens in the same memory before it is worth a graph; libraries load what they need. Then 1:
                    # a cache that has grown should not cost more tokens without a graph
END = object()
recording = threading.Lock()    # of the one stream on which graphs are recorded
GRAPHS = 8          # that are kept of a model; a model's `plans` says otherwise


# --- one graph ------------------------------------------------------------------------------------

@functools.cache
def stream_of(device):
    """On which graphs are recorded: always the same one, for each stream has a workspace of cuBLAS."""
    return torch.cuda.Stream(device)


class Graph:
    """The kernels that a function launches, recorded, not run: they read and write where its
    tensors lie.

    pool: of the memory for what is in between; graphs that never run at once share one. Raises what
    the function does, or CUDA if it launches what cannot be recorded."""

    def __init__(self, function, device, pool):
        self.graph = torch.cuda.CUDAGraph()
        with recording:
            self.record(function, device, pool)

    def record(self, function, device, pool):
        stream = stream_of(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # other threads may use the card meanwhile
            self.graph.capture_begin(pool=pool, capture_error_mode='thread_local')
            try:
                self.result = function()
            except BaseException:
                with suppress(Exception):
                    self.graph.capture_end()
                with suppress(Exception):       # capture_end does not come to it after an error of CUDA's
                    torch._C._cuda_endAllocateToPool(device.index, pool)
                raise
            self.graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self):
        self.graph.replay()


def uncached_autocast(device):
    """The autocast that is on, if one is, without its cache of rounded weights: what is rounded
    while a graph is recorded is there when it is replayed, and at no other time."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


# --- a token --------------------------------------------------------------------------------------

def compute(net, idx, pos, state, window, out):
    """One token of each row, idx (B, 1) after positions pos (B,) on the card; the state's tensors
    are written to → logits (B, 1, V), which are in `out` (B, V) if there is one."""
    logits, after = net.step(idx, {**state, 'pos': pos}, window=window)
    for name, tensor in state.items():
        if name != 'pos' and after[name] is not tensor:
            tensor.copy_(after[name])
    if out is None:
        return logits
    out.copy_(logits[:, 0])
    return out[:, None]


class Token:
    """A graph of `compute` on the memory of one state, and where it finds tokens and positions. It
    keeps none of the state's memory alive."""

    def __init__(self, net, B, state, window, out, device, pool):
        self.idx = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.pos = torch.zeros(B, dtype=torch.long, device=device)
        self.next_pos = None            # (B,) on the CPU: what is in pos

        def token():
            with uncached_autocast(device):
                logits = compute(net, self.idx, self.pos, state, window, out)
            self.pos.add_(1)
            return logits if out is None else None
        self.graph = Graph(token, device, pool)

    def replay(self, idx, pos):
        """idx (B, 1) after positions pos (B,), on the CPU → logits (B, 1, V), None if they are in `out`."""
        self.idx.copy_(idx, non_blocking=True)
        if self.next_pos is None or not torch.equal(pos, self.next_pos):
            self.pos.copy_(pos, non_blocking=True)
        self.next_pos = pos + 1
        self.graph.replay()
        logits = self.graph.result
        return None if logits is None else logits.clone()   # the next token's come into the same memory


# --- rows: what is drawn, and where they lie -------------------------------------------------------

def placed_in(room, parts):
    """Tensors {name: (B, …)}, copied into the first rows of what the room has of this name, if they
    fit; the others become the room's. → {name: (B, …)} in the room."""
    placed, news = {}, []
    for name, new in parts.items():
        old = room.get(name)
        if old is None or len(old) < len(new) or old.shape[1:] != new.shape[1:] or old.dtype != new.dtype:
            old = room[name] = new
        placed[name] = old[:len(new)]
        if old is not new:
            news.append((placed[name], new))
    for old, new in news:
        old.copy_(new)
    return placed


class Repeated:
    """A function that is called again and again on the same memory of a card: a graph, after some
    times that are none."""

    def __init__(self):
        self.key = self.graph = self.given = None
        self.newest = None          # the graph made last, of this key or another: its pool lives as long
        self.pool = None            # of all its graphs' memory: one each would be left behind by each
        self.calls = 0              # with this key
        self.is_able = True         # to make a graph

    def __call__(self, key, function, given, device):
        """function(given (B,)), a tensor or None, which is good until the next call. given: of any
        device, None if it is not asked for. key: all that the function depends on beside it, None
        if that is different each time."""
        if key is None or key != self.key:
            self.key, self.graph, self.calls = key, None, 0
            self.given = None if given is None else torch.empty(given.shape, dtype=given.dtype, device=device)
        if given is not None:
            self.given.copy_(given, non_blocking=True)
        if self.graph is None and self.calls >= WARM and self.is_able:
            try:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.graph = self.newest = Graph(lambda: function(self.given), device, self.pool)
            except Exception:       # said where it is a model's token
                self.is_able = False
        if self.graph is None:
            self.calls += key is not None
            return function(self.given)
        self.graph.replay()
        return self.graph.result


# --- the graphs of a model ------------------------------------------------------------------------

def layers_of(net):
    return next(module for name, module in net.named_modules() if name.endswith('layers'))


class Request:
    """What a step is of: settings (B, window, autocast's dtype, whether logits are new), and
    memory. It keeps none of it alive."""

    def __init__(self, settings, tensors, slots):
        self.settings = settings
        self.slots = slots              # of the caches; 0: there are none
        self.tensors = list(map(weakref.ref, tensors))
        places = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        self.key = *settings, *places
        self.token = None               # its graph

    def is_of(self, tensors):
        """Whether these very tensors are what it is of."""
        return all(map(operator.is_, (ref() for ref in self.tensors), tensors))

    def has_room(self, pos):
        """Whether a token after these positions (B,) finds room in the caches as they are."""
        window = self.settings[1]
        if not self.slots:
            return True
        return self.slots == window if window else int(pos.max()) < self.slots


class Graphs(Watched):
    """Of a model: graphs by the memory that they are of. Unknown if it can have none."""

    def __init__(self, net):
        require(type(net) in PARTS, type(net))
        self.watch(net)
        require(not self.disturbed(), 'hook or dropout')
        is_spread = any(whole_shape(p) != p.shape for p in net.parameters())
        require(not is_spread, 'experts of which other processes have some')
        self.names = [f'{name}.{i}' for i, layer in enumerate(layers_of(net)) for name in layer.state_names]
        self.caches = [name for name in self.names if name.startswith('k.')]
        self.device = next(net.parameters()).device
        self.tokens = {}                # {key: Token}, the one used last at the end
        self.warm = {}                  # {key: tokens that were computed without a graph}
        self.recorded = set()           # settings of which there was one: what a graph needs is loaded
        self.latest = None              # Request
        self.pool = None                # of the graphs' memory
        self.trouble = ''               # why there are none
        self.lock = threading.RLock()

    def watch(self, net):
        super().watch(net)
        dicts = [parts for module in net.modules() for parts in (module._parameters, module._buffers, module._modules)]
        self.empty = [hooks for hooks in self.hooks if not hooks]
        self.dicts = [parts for parts in (*self.hooks, *dicts) if parts]
        self.there = [*chain.from_iterable(map(dict.values, self.dicts)), END]

    def holds(self):
        there = chain(chain.from_iterable(map(dict.values, self.dicts)), (END,))
        return (not any(self.empty) and all(map(operator.is_, there, self.there))
                and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
                and not any(dropout.training for dropout in self.dropouts))

    def disturbed(self):
        """Whether anything hangs on a module that a graph does not hold, or drops out."""
        hooks = (hook for some in self.hooks for hook in some.values())
        return any(hook is not add_loras for hook in hooks) or any(dropout.training for dropout in self.dropouts)

    def settings(self, B, window, out):
        """What a graph depends on beside memory."""
        dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        return B, window, dtype, out is None

    def is_latest(self, state, settings, out):
        """Whether the latest Request is of this state."""
        if self.latest is None or self.latest.settings != settings:
            return False
        tensors = [state.get(name, END) for name in self.names]    # an empty state is not one that is gone
        return self.latest.is_of(tensors if out is None else [*tensors, out])

    def is_whole(self, state):
        """Whether a state is one of this model after some tokens."""
        if len(state) != len(self.names) + 1 or any(state.get(name) is None for name in self.names):
            return False
        return len({state[name].shape[2] for name in self.caches}) < 2

    def token(self, net, request, state, out):
        """The graph for a state; None as long as it is not worth one."""
        if request.token is not None:
            return request.token
        key = request.key
        token = self.tokens.pop(key, None)
        if token is None:
            count = self.warm.pop(key, 0)
            if count < (1 if request.settings in self.recorded else WARM):
                self.warm[key] = count + 1
                while len(self.warm) > 4 * GRAPHS:
                    self.warm.pop(next(iter(self.warm)))
                return None
            if not self.tokens:         # a pool lives as long as a graph does
                self.pool = torch.cuda.graph_pool_handle()
            B, window, *_ = request.settings
            token = Token(net, B, state, window, out, self.device, self.pool)
            self.recorded.add(request.settings)
            while len(self.tokens) >= getattr(net, 'plans', GRAPHS):    # not before: they keep the pool
                self.tokens.pop(next(iter(self.tokens)))
        self.tokens[key] = request.token = token
        return token

    def step(self, net, idx, state, window, out):
        """See `step`."""
        settings = self.settings(len(idx), window, out)
        if not self.is_latest(state, settings, out):
            if not self.is_whole(state):
                return None
            state = {name: value.contiguous() for name, value in state.items()}     # as kernels want it
            tensors = [state[name] for name in self.names] + ([] if out is None else [out])
            self.latest = Request(settings, tensors, state[self.caches[0]].shape[2] if self.caches else 0)
        request, pos = self.latest, state['pos']
        if not request.has_room(pos):
            return None
        token = None
        try:
            token = self.token(net, request, state, out)
        except Exception as error:      # CUDA's, of what cannot be recorded; nothing has been computed
            self.trouble = (str(error).splitlines() or [type(error).__name__])[0]
            self.tokens.clear()
            print(f'note: each token is launched kernel by kernel, which takes longer: a CUDA graph of this '
                  f'model cannot be made ({self.trouble[:120]})', file=sys.stderr)
        if token is not None:
            logits = token.replay(idx, pos)
            logits = out[:, None] if logits is None else logits
        else:
            on_card = pos.to(self.device, non_blocking=True)
            logits = compute(net, idx.to(self.device, non_blocking=True), on_card, state, window, out)
        return logits, {**state, 'pos': pos + 1}


models = Plans(Graphs)


def step(net, idx, state, window=0, out=None):
    """One token of each row, idx (B, 1), after a state on the card → logits (B, 1, V), state, whose
    tensors are those that were given, written to; None where that is net.step's. out: (B, V) for
    the logits, in their precision."""
    if net.training or net.between_layers is not None or torch.is_grad_enabled():
        return None
    try:
        graphs = models.of(net)
    except Unknown:
        return None
    window = getattr(net.config, 'window', 0) or window
    if graphs.trouble:
        return None
    with graphs.lock:
        return graphs.step(net, idx, state, window, out)
