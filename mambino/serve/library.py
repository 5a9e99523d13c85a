"""The models of a folder: which runs there are, and those of them that are loaded.

    library = Library('.', out_dir='out', …)
    library.names()                 # [{'id', 'created', 'out_dir'}, …], the one trained last first
    served = library.get('out')     # loads it; '' is the one that answers where none is named
    served.scheduler.submit(job, send)
"""
import contextlib
import io
import os
import threading
from dataclasses import dataclass

from mambino.machine import choose_device
from mambino.serve.scheduler import Scheduler
from mambino.weights.checkpoint import fingerprint, load_checkpoint, tokenizer_of
from mambino.weights.loading import attach_adapters, load_adapters, model_of, prepare_model


class NoModel(Exception):
    """There is none of this name (status 404), or it cannot be loaded (status 400, 503)."""

    def __init__(self, message, status=404):
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def told():
    """What would end a script in a line is a NoModel with that line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        raise NoModel(said.getvalue().strip().removeprefix('error: '), 503) from None


@dataclass
class Served:
    """A model that is loaded."""
    id: str                 # what requests call it: its folder's name
    out_dir: str
    created: int            # when its checkpoint was written, in seconds since 1970
    stamp: tuple            # of that file
    net: object
    tok: object
    fingerprint: str        # of its weights: whose sessions it can go on with
    scheduler: object


class Library:
    """See the top of the file. folder: where the runs are."""

    def __init__(self, folder, out_dir, device, dtype, quantize, adapters, memory, room):
        self.folder = folder
        self.out_dir = out_dir
        self.device = device
        self.dtype = dtype
        self.quantize = quantize
        self.adapters = adapters
        self.memory = memory
        self.room = room
        self.loaded = {}                    # {id: Served}
        self.lock = threading.Lock()

    def names(self):
        """Of each run its id, its folder and when it was written, the latest first."""
        found = []
        for name in sorted(os.listdir(self.folder)):
            folder = os.path.join(self.folder, name)
            times = [os.path.getmtime(os.path.join(folder, file)) for file in ('ckpt.pt', 'best.pt')
                     if os.path.isfile(os.path.join(folder, file))]
            if times:
                found.append(dict(id=name, created=int(max(times)), out_dir=folder))
        return sorted(found, key=lambda run: -run['created'])

    def get(self, name=''):
        """The Served of this name, loaded now if it is not; NoModel if that cannot be. It takes as long
        as loading does: not for an event loop."""
        with self.lock:
            runs = {run['id']: run for run in self.names()}
            name = name or os.path.basename(os.path.normpath(self.out_dir)) if self.out_dir else next(iter(runs), '')
            if name not in runs:
                raise NoModel(f'no model {name!r}; there are: {", ".join(runs) or "none yet"}')
            if name not in self.loaded:
                self.loaded[name] = self.load(runs[name])
            return self.loaded[name]

    def load(self, run):
        with told():
            where = choose_device(self.device)
            ckpt = load_checkpoint(run['out_dir'])
            tok = tokenizer_of(ckpt)
            net = attach_adapters(model_of(ckpt), load_adapters(self.adapters), self.adapters)
            net, context = prepare_model(net, where, self.dtype, precision=self.quantize)
        mark = fingerprint({f'0.{name}.1.0': tensor for name, tensor in ckpt['weights'].items()})
        return Served(run['id'], run['out_dir'], run['created'], (), net, tok, mark,
                      Scheduler(net, tok, self.room, context))

    def close(self):
        """Ends all."""
        for served in self.loaded.values():
            served.scheduler.close()
