"""CUDA graphs of a pretended card: what is captured is noted and not done; a replay does it again,
in the same tensors.

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)                      # y is not computed: it is filled with NaN
    x.copy_(tokens)                     # into the memory that was captured
    graph.replay()                      # one launch; now y is that of these tokens

Errors as on a card are a capture that waits for the card, that reads the CPU's pageable memory, or
that is made on the default stream. A replay that reads memory which the program has freed is an
error here; a card would read whatever is there now.
"""
import contextlib

import torch

from helpers.card_rules import changed


def poison(tensor):
    """Fills a tensor with what nobody should read: NaN, or a large negative number."""
    if tensor.numel() and tensor.device.type != 'meta':
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float('nan'))
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).max // 2)


def storages(values):
    """Addresses of the storages of tensors, in lists too."""
    found = set()
    changed(values, lambda u: found.add(u.untyped_storage()._cdata) if isinstance(u, torch.Tensor) else None)
    return found


def all_of(storage, like):
    """All that a storage holds, as one tensor."""
    return torch.empty(0, dtype=torch.uint8, device=like.device).set_(storage)


def uses(key):
    """How many tensors there are of the storage at this address, whose Python object counts as one
    in some versions of torch."""
    one = torch.empty(0)
    own = torch._C._storage_Use_Count(one.untyped_storage()._cdata) - 1
    return torch._C._storage_Use_Count(key) - own


def alias(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


class Capture:
    """What happens on a card between capture_begin and capture_end, on the tensors inside."""

    def __init__(self):
        self.calls = []                 # (function, arguments, keywords, results to write or None)
        self.made = {}                  # {storage: a tensor of it} that came to be meanwhile
        self.before = {}                # {storage: (all of it, a copy)} of what is written to and was there before
        self.held = {}                  # {storage: tensors of it} that were there before and the graph has

    def will_write(self, tensors):
        for u in tensors:
            storage = u.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.before:
                whole = all_of(storage, u)
                self.before[storage._cdata] = whole, whole.clone()

    def add(self, function, args, kwargs, out, writes):
        """writes: it changes its arguments, and returns none but them."""
        there = storages((*args, *kwargs.values()))
        new = []

        def note(u):
            if isinstance(u, torch.Tensor) and u.untyped_storage()._cdata not in there:
                new.append(u)
                self.made[u.untyped_storage()._cdata] = u
        if not writes:
            changed((out,), note)
            if not new:                 # a view
                return
        # tensors of the graph's own, so that those of the program can be counted apart
        args = changed(args, alias)
        kwargs = {name: changed((value,), alias)[0] for name, value in kwargs.items()}
        self.calls.append((function, args, kwargs, None if writes else changed((out,), alias)[0]))

    def end(self, on_card):
        """Nothing of it has happened. on_card: the storages that the card has."""
        for whole, copy in self.before.values():
            whole.copy_(copy)
        self.before.clear()
        for tensor in self.made.values():
            poison(tensor)

        def hold(u):
            key = u.untyped_storage()._cdata if isinstance(u, torch.Tensor) else None
            if key in on_card and key not in self.made:
                self.held[key] = self.held.get(key, 0) + 1
        for _, args, kwargs, _ in self.calls:
            changed((*args, *kwargs.values()), hold)

    def replay(self):
        for key, count in self.held.items():
            if uses(key) <= count:
                raise RuntimeError('a graph is replayed whose memory the program has freed')
        for function, args, kwargs, out in self.calls:
            result = function(*args, **kwargs)
            if out is not None:
                overwrite(out, result)


def overwrite(old, new):
    if isinstance(old, (list, tuple)):
        for u, v in zip(old, new):
            overwrite(u, v)
    elif isinstance(old, torch.Tensor):
        if old.shape != new.shape:
            raise RuntimeError(f'a replay makes {tuple(new.shape)} of what was captured as {tuple(old.shape)}')
        old.copy_(new)


def classes(card):
    """{name: class} for torch.cuda: CUDAGraph and graph, Stream, Event and stream, of this card."""

    class CUDAGraph:
        def __init__(self, keep_graph=False):
            self.capture = None

        def capture_begin(self, pool=None, capture_error_mode='global'):
            if card.capture:
                raise RuntimeError('CUDA error: a capture is going on already')
            if current_stream() is default:
                raise RuntimeError('CUDA graphs must be captured on a non-default stream.')
            card.capture = self.capture = Capture()

        def capture_end(self):
            card.capture = None
            with card.quiet():
                self.capture.end(card.memory.blocks)

        def replay(self):
            if self.capture is None or card.capture:
                raise RuntimeError('Called CUDAGraph::replay without a preceding successful capture.')
            card.launch('graph')
            with card.quiet(), torch.no_grad():
                self.capture.replay()

        def reset(self):
            self.capture = None

        def pool(self):
            return (0, 1)

        def register_generator_state(self, generator):
            """Whose draws go on from replay to replay, as all do here."""

    class graph:                        # noqa: N801, the name in torch.cuda
        def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode='global'):
            self.graph = cuda_graph
            self.stream = stream or Stream()

        def __enter__(self):
            torch.cuda.synchronize()
            self.stream.__enter__()
            self.graph.capture_begin()

        def __exit__(self, *error):
            self.graph.capture_end()
            self.stream.__exit__(*error)

    class Stream:
        device = torch.device('cuda', 0)
        cuda_stream = 0

        def __init__(self, device=None, priority=0, **kwargs):
            pass

        def wait_stream(self, stream):
            pass

        def wait_event(self, event):
            pass

        def record_event(self, event=None):
            event = event or Event()
            event.record(self)
            return event

        def query(self):
            card.arrive()
            return True

        def synchronize(self):
            card.wait('Stream.synchronize')

        def __enter__(self):
            self.before = current_stream()
            card.local.stream = self
            return self

        def __exit__(self, *error):
            card.local.stream = self.before

    class Event:
        def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
            self.enable_timing = enable_timing
            self.at = None

        def record(self, stream=None):
            self.at = card.launches

        def wait(self, stream=None):
            pass

        def query(self):
            card.arrive()
            return True

        def synchronize(self):
            card.wait('Event.synchronize')

        def elapsed_time(self, end):
            """Milliseconds: a launch takes one."""
            if not (self.enable_timing and end.enable_timing):
                raise RuntimeError('Both events must be created with argument enable_timing=True')
            return float(end.at - self.at)

    default = Stream()

    def current_stream(device=None):
        return getattr(card.local, 'stream', default)

    return dict(
        CUDAGraph=CUDAGraph, graph=graph, Stream=Stream, Event=Event, current_stream=current_stream,
        stream=lambda stream: contextlib.nullcontext() if stream is None else stream,
        default_stream=lambda device=None: default, graph_pool_handle=lambda: (0, 1),
        is_current_stream_capturing=lambda: card.capture is not None)
