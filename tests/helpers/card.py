"""A CUDA card that is pretended: tensors say they are on cuda:0 and take every CUDA branch of a
program, and are computed by the CPU.

    @on_card                                            # of helpers.card_process: in a process of its own
    def test_a_step_waits_for_nothing():
        with pretended(gigabytes=8, capability=(8, 6)) as card:
            net = build('gpt').to('cuda')               # device cuda:0; autocast('cuda') casts, autograd works
            net.step(idx.to('cuda'))
            card.reset()
            net.step(idx.to('cuda', non_blocking=True))
            assert card.waits == {}                     # {'item() at mambino/cache.py:58': 1}, where the host waits
            assert card.launches < 100                  # kernels started; the replay of a graph is one
            assert card.peak_bytes < 2**30              # of what is alive on the card, in blocks of 512 bytes

What it finds: tensors of two devices, operations that CUDA lacks, unequal dtypes, where the host
waits for the card, other numbers than the CPU's in code that only CUDA runs, what is read before
its copy has come, what a graph cannot capture. What it cannot: kernels, their speed, Triton, the
compiler (a compiled function is the function itself), streams that race, what is freed under a
graph. With inner='meta' tensors have no memory and no numbers: for large models.

    program ──► Card.run: every operation ──► rules (card_rules.py), fused kernels (card_fused.py) ──► a CPU tensor
                     └─► waits, launches, bytes (card_memory.py), graphs (card_graph.py)

card_device.py gives torch the device, card_torch.py changes what of torch asks for a card of its
own.
"""
import collections
import contextlib
import os
import sys
import threading
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from helpers import card_device, card_fused, card_graph, card_memory, card_rules, card_tensor, card_torch
from helpers.card_tensor import CardTensor

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
LOST = ('CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported at some other API '
        'call, so the stacktrace below might be incorrect.')


class Card:
    """name, capability: as torch.cuda tells them. inner: the device of the tensors inside."""

    def __init__(self, gigabytes, capability, name, inner, compiles):
        self.capability, self.name, self.inner = capability, name, torch.device(inner)
        self.compiles = compiles        # whether torch.compile works
        self.memory = card_memory.Memory(int(gigabytes * 2**30))
        self.sync_debug = 'default'     # torch.cuda.set_sync_debug_mode
        self.faults = []                # called with the name of each launch
        self.is_lost = False            # then every operation fails
        self.coming = []                # (tensor, its values): copied to the CPU, by nobody waited for
        self.pinned = {}                # {address of a storage: what tells of its end}: pinned memory
        self.local = threading.local()
        self.launches = 0
        self.reset()

    def reset(self):
        """Counts anew."""
        self.launches = 0
        self.kernels = collections.Counter()    # {operation: launches}
        self.waits = collections.Counter()      # {'what at file:line': how often}
        self.copies = collections.Counter()     # the same for copies that nobody waits for
        self.products = collections.Counter()   # {'bfloat16': matrix products in that precision}
        self.memory.reset_peak()

    @property
    def alive_bytes(self):
        return self.memory.alive

    @property
    def peak_bytes(self):
        return self.memory.peak

    @property
    def capture(self):
        """A card_graph.Capture while this thread makes a graph, else None."""
        return getattr(self.local, 'capture', None)

    @capture.setter
    def capture(self, capture):
        self.local.capture = capture

    # --- what the program does -----------------------------------------------------------------------

    def wait(self, what):
        """The host waits for the card."""
        if self.is_quiet():
            return
        if self.capture:
            raise RuntimeError(f'CUDA error: operation not permitted when stream is capturing ({what} at {where()})')
        if self.sync_debug == 'error':
            raise RuntimeError(f'called a synchronizing CUDA operation ({what})')
        self.check_lost()
        self.arrive()
        self.waits[f'{what} at {where()}'] += 1

    def arrive(self):
        """All that was copied to the CPU is there."""
        for tensor, values in self.coming:
            tensor.copy_(values)
        self.coming.clear()

    def launch(self, name):
        """A kernel starts; or what was planted happens."""
        if self.is_quiet():
            return
        self.check_lost()
        self.launches += 1
        self.kernels[name] += 1
        for fault in self.faults:
            fault(name)

    def plant(self, error, operation=None, nth=1, is_lost=False):
        """The nth launch from now on, of this operation only if it is named, raises an error.
        is_lost: from then on whatever is asked of the card fails."""
        left = nth

        def fault(name):
            nonlocal left
            if operation in (None, name):
                left -= 1
                if left == 0:
                    self.is_lost = is_lost
                    raise error
        self.faults.append(fault)

    def plant_out_of_memory(self, operation=None, nth=1):
        self.plant(card_memory.out_of_memory(2 << 30, self.memory), operation, nth)

    def plant_loss(self, operation=None, nth=1):
        """The card fails at that launch, and is gone."""
        self.plant(torch.AcceleratorError(LOST), operation, nth, is_lost=True)

    def check_lost(self):
        if self.is_lost:
            raise torch.AcceleratorError(LOST)

    def is_quiet(self):
        return getattr(self.local, 'quiet', False)

    @contextlib.contextmanager
    def quiet(self):
        """Within, nothing is counted and nothing fails: what happens is inside a kernel."""
        before, self.local.quiet = self.is_quiet(), True
        try:
            with _disable_current_modes():
                yield
        finally:
            self.local.quiet = before

    # --- operations ----------------------------------------------------------------------------------

    def run(self, function, args, kwargs):
        """One operation, of any device."""
        operation = card_rules.describe(function)
        tensors = card_rules.tensors_in(args, kwargs)
        on_card = [u for u in tensors if isinstance(u, CardTensor)]
        device = kwargs.get('device')
        device = None if device is None else torch.device(device)
        to_card = device is not None and device.type == 'cuda'
        if not on_card and not to_card:
            return self.run_on_cpu(operation, args, kwargs)
        if to_card and device.index not in (None, 0):
            raise torch.AcceleratorError('CUDA error: invalid device ordinal')
        if on_card and not self.is_quiet():
            self.check(operation, tensors, on_card)
        if operation.made_of:
            with Through(self):
                return operation.made_of(*args, **kwargs)
        if operation.name == '_local_scalar_dense':
            self.wait('item()')
            if self.inner.type == 'meta':
                return 1.0 if args[0].is_floating_point() else 1
        elif copies_over(operation, args, device):
            return self.copy_over(operation, args, kwargs)
        elif card_rules.sized_by_data(operation, args, kwargs):
            self.wait(f'{operation.name}, whose size depends on data')
        if operation.has_kernel and operation.name != '_local_scalar_dense':
            self.launch(operation.name)
            if operation.name in card_rules.PRODUCTS:
                self.products[str(on_card[0].dtype).removeprefix('torch.')] += 1
        return self.compute(operation, args, kwargs, on_card)

    def check(self, operation, tensors, on_card):
        """torch's errors of tensors on two devices, and of operations that CUDA has not."""
        error = card_rules.refusal(operation, on_card)
        if error:
            raise error
        apart = [u for u in tensors if not isinstance(u, CardTensor) and u.dim()]
        if apart and operation.name not in card_rules.MIXED:
            raise RuntimeError('Expected all tensors to be on the same device, but found at least two devices, cuda:0 '
                               f'and cpu! ({operation.function})')
        if apart and operation.name in card_rules.INDEXING:
            self.wait(f'{operation.name} with an index of the CPU')
        if operation.name == '_grouped_mm' and self.capability < (9, 0):
            self.wait('_grouped_mm without a kernel')       # it copies the offsets to the CPU

    def run_on_cpu(self, operation, args, kwargs):
        """An operation of the CPU; memory is pinned for the sake of the card."""
        if operation.name == 'is_pinned':
            return self.is_pinned(args[0])
        pin = operation.name == '_pin_memory' or kwargs.get('pin_memory')
        if not pin:
            return operation.function(*args, **kwargs)
        if operation.name == '_pin_memory':
            tensor = args[0].clone()
        else:
            tensor = operation.function(*args, **{**kwargs, 'pin_memory': False})
        self.pin(tensor)
        return tensor

    def pin(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.pinned[key] = weakref.ref(storage, lambda _: self.pinned.pop(key))

    def is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in self.pinned

    def compute(self, operation, args, kwargs, on_card):
        """The operation on the tensors inside; what it returns is on the card."""
        function = card_fused.FUSED.get(operation.name, operation.function)
        inner_args = card_rules.changed(args, self.inside)
        inner_kwargs = {name: card_rules.changed((value,), self.inside)[0] for name, value in kwargs.items()}
        if self.inner.type == 'meta' and inner_kwargs.get('generator') is not None:
            inner_kwargs['generator'] = None
        with _disable_current_modes():
            written = operation.written(inner_args, inner_kwargs) if self.capture else []
            if written:
                self.capture.will_write(card_rules.tensors_in(written, {}))
            out = function(*inner_args, **inner_kwargs)
            if self.capture:
                self.capture.add(function, inner_args, inner_kwargs, out, operation.returns_written or bool(written))
        if operation.returns_written:
            written = operation.written(args, kwargs)
            for u in card_rules.tensors_in(written, {}):
                assert not isinstance(u, CardTensor) or u.shape == u.inner.shape, f'{operation.name} changes a shape'
            return written[0] if len(operation.function._schema.returns) == 1 else tuple(written)
        outer = {id(u.inner): u for u in on_card}
        return card_rules.changed((out,), lambda u: self.outside(u, outer))[0]

    def inside(self, value):
        if isinstance(value, CardTensor):
            return value.inner
        if isinstance(value, torch.device):
            return self.inner if value.type == 'cuda' else value
        if isinstance(value, torch.Tensor):
            if self.inner.type == 'meta' and value.dim():
                return value.to('meta')
            return value.clone() if self.capture else value    # a graph keeps the number
        return value

    def outside(self, value, outer):
        if not isinstance(value, torch.Tensor):
            return value
        return outer.get(id(value)) if id(value) in outer else self.take(value)

    def take(self, inner):
        """A tensor of the card that holds this one."""
        if not self.is_quiet():
            self.memory.add(inner)
        return CardTensor(inner)

    def copy_over(self, operation, args, kwargs):
        """A copy between the CPU and the card, of _to_copy or copy_."""
        into = operation.name == 'copy_'
        source = args[1] if into else args[0]
        from_card = isinstance(source, CardTensor)
        non_blocking = bool(kwargs.get('non_blocking') or into and len(args) > 2 and args[2])
        # of _to_copy's result torch pins the memory by itself
        is_pinned = self.is_pinned(args[0] if into and from_card else source) if into or not from_card else True
        if source.numel() and not self.is_quiet():
            name = 'copy to the CPU' if from_card else 'copy to the card'
            if self.capture and not is_pinned:
                raise RuntimeError('CUDA error: operation not permitted when stream is capturing (pageable memory)')
            if non_blocking and (is_pinned or not from_card):
                self.copies[f'{name} at {where()}'] += 1
            else:
                self.wait(name)
            self.launch(operation.name)
        if from_card:
            return self.copy_from_card(operation, args, kwargs, into, non_blocking)
        return self.copy_to_card(operation, args, kwargs, into)

    def copy_to_card(self, operation, args, kwargs, into):
        if not into:
            kwargs = {**kwargs, 'device': self.inner}
            with _disable_current_modes():
                inner = operation.function(*args, **kwargs)
                if inner.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
                    inner = inner.clone()
                if self.capture:
                    self.capture.add(operation.function, args, kwargs, inner, False)
            return self.take(inner)
        target, source = args[0], args[1]
        if self.inner.type == 'cpu':
            with _disable_current_modes():
                if self.capture:
                    self.capture.will_write([target.inner])
                    self.capture.add(operation.function, (target.inner, source), {}, None, True)
                target.inner.copy_(source)
        return target

    def copy_from_card(self, operation, args, kwargs, into, non_blocking):
        source = args[1] if into else args[0]
        with _disable_current_modes():
            if self.inner.type == 'meta':
                values = torch.ones(source.shape, dtype=kwargs.get('dtype') or source.dtype)
            elif into:
                values = source.inner
            else:
                values = operation.function(source.inner, **{**kwargs, 'device': torch.device('cpu')})
                if values.untyped_storage()._cdata == source.inner.untyped_storage()._cdata:
                    values = values.clone()
            if not non_blocking or self.is_quiet():
                return args[0].copy_(values) if into else values
            target = args[0] if into else torch.empty_like(values)
            if self.capture:
                self.capture.add(operation.function, (target, source.inner), {}, None, True)
                return target
            self.coming.append((target, values.clone()))
            card_graph.poison(target)
        if not into:
            self.pin(target)
        return target


def copies_over(operation, args, device):
    """Whether it is a copy from the CPU to the card, or back. device: the one that is asked for, or None."""
    if operation.name == 'copy_':
        return isinstance(args[0], CardTensor) != isinstance(args[1], CardTensor)
    return operation.name == '_to_copy' and device is not None and (
        isinstance(args[0], CardTensor) != (device.type == 'cuda'))


def where():
    """The program's innermost line, as 'mambino/cache.py:58'."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT + os.sep) and not path.startswith(os.path.join(HERE, 'card')):
            relative = os.path.relpath(path, ROOT)
            if not relative.startswith('.venv'):
                return f'{relative}:{frame.f_lineno}'
        frame = frame.f_back
    return 'nowhere of the program'


class Through(TorchDispatchMode):
    """Brings a thread's operations to the card."""

    def __init__(self, card):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.card.run(function, args, kwargs or {})


@contextlib.contextmanager
def pretended(gigabytes=12, capability=(8, 6), name='NVIDIA GeForce RTX 3060', inner='cpu', compiles=True):
    """Within, torch has one card, of these GiB; yields the Card. inner: 'cpu', or 'meta' for
    tensors without memory, of which every number is 1. compiles: torch.compile gives back what it
    is given; else it fails as without Triton."""
    card_device.install()
    card = Card(gigabytes, capability, name, inner, compiles)
    before, card_tensor.current = card_tensor.current, card
    try:
        with card_torch.changed(card, lambda: Through(card)):
            yield card
    finally:
        card_tensor.current = before
