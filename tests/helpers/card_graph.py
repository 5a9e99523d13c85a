"""CUDA graphs of a pretended card: what is captured is noted and not done; a replay does it again, in the same tensors.

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)                      # y is not computed: it is filled with NaN
    x.copy_(tokens)                     # into the memory that was captured
    graph.replay()                      # one launch; now y is that of these tokens

A capture that waits for the card, or reads the CPU's pageable memory, is an error, as on a card.
"""
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


class Capture:
    """What happens on a card between capture_begin and capture_end, on the tensors inside."""

    def __init__(self):
        self.calls = []                 # (function, arguments, keywords, [results to write])
        self.made = {}                  # {storage: a tensor of it} that came to be meanwhile
        self.before = {}                # {storage: (all of it, a copy)} of what is written to and was there before

    def will_write(self, tensors):
        for u in tensors:
            storage = u.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.before:
                whole = all_of(storage, u)
                self.before[storage._cdata] = whole, whole.clone()

    def add(self, function, args, kwargs, out, writes):
        """writes: it changes its arguments, and returns none but them."""
        if writes:
            self.calls.append((function, args, kwargs, None))
            return
        there = storages((*args, *kwargs.values()))
        new = []

        def note(u):
            if isinstance(u, torch.Tensor) and u.untyped_storage()._cdata not in there:
                new.append(u)
                self.made[u.untyped_storage()._cdata] = u
        changed((out,), note)
        if new:                         # else it is a view
            self.calls.append((function, args, kwargs, out))

    def end(self):
        """Nothing of it has happened."""
        for whole, copy in self.before.values():
            whole.copy_(copy)
        for tensor in self.made.values():
            poison(tensor)

    def replay(self):
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
            card.capture = self.capture = Capture()

        def capture_end(self):
            card.capture = None
            with card.quiet():
                self.capture.end()

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

        def __enter__(self):
            torch.cuda.synchronize()
            self.graph.capture_begin()

        def __exit__(self, *error):
            self.graph.capture_end()

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
            return self

        def __exit__(self, *error):
            pass

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

    only = Stream()
    return dict(
        CUDAGraph=CUDAGraph, graph=graph, Stream=Stream, Event=Event, stream=lambda stream: stream or only,
        current_stream=lambda device=None: only, default_stream=lambda device=None: only,
        is_current_stream_capturing=lambda: card.capture is not None, graph_pool_handle=lambda: (0, 1))
