"""The models of a folder: which runs there are, and those of them that are loaded.

    library = Library('.', out_dir='out', …)
    library.names()                 # [{'id', 'created', 'out_dir'}, …], the one trained last first
    served = library.get('out')     # loads it; '' is the one that answers where none is named
    served = await library.fetch('out')
    served.scheduler.submit(job, send)

    get ──► is it loaded? ──► Served
              └─ no: a thread loads it, while all who want it wait for that one, and nobody else does
              └─ its file is another now: the old one answers until the new one is loaded, whole

Where memory is short, the models that were used longest ago leave it; never one that answers.
"""
import asyncio
import os
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass, field

from mambino import files
from mambino.blocks import fills_holes
from mambino.machine import autocast, available_memory, choose_device, choose_dtype, dtype_of_run
from mambino.serve.filling import Filling
from mambino.serve.observed import Observed
from mambino.serve.runs import fills_holes_by_files
from mambino.serve.scheduler import Scheduler
from mambino.serve.tickets import settle
from mambino.serve.told import NoModel, told
from mambino.serve.turns import Turns
from mambino.weights.checkpoint import tokenizer_of
from mambino.weights.from_hf import WEIGHTS
from mambino.weights.loading import (
    attach_adapters,
    contents_of,
    fingerprint_of,
    load_adapters,
    model_of,
    prepare_model,
)

FILES = ('best.pt', 'ckpt.pt')      # of a run, the first one that is there answers
AGAIN = 10          # seconds after which a model that could not be loaded is tried again
RECENT = 5          # seconds since somebody got a model, in which it is taken to be in use
TICK = 0.5          # seconds between looks whether a model that is to leave is still in use


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
    context: object = None      # in which it computes
    precision: object = None    # in which train.py evaluates, where --score does
    size: int = 0               # bytes of its weights
    about: str = ''             # its kind, size and precision, to be read
    used: float = field(default_factory=time.monotonic)     # when somebody got it last

    @property
    def fills_holes(self):
        return fills_holes(vars(self.net.config))

    def is_in_use(self):
        return time.monotonic() - self.used < RECENT or self.scheduler.is_busy()


class Library:
    """See the top of the file. folder: where the runs are; memory: GB for them, 0: half of what is free;
    metrics: what the schedulers are observed with, None: nothing."""

    def __init__(self, folder, out_dir, device, dtype, quantize, adapters, memory, room, metrics=None):
        self.folder = folder
        self.out_dir = out_dir
        self.device = device
        self.dtype = dtype
        self.quantize = quantize
        self.adapters = adapters
        self.memory = memory
        self.room = room
        self.turns = Turns()            # of the models' threads
        self.metrics = metrics
        self.loaded = {}                    # {id: Served}, the one used last at the end
        self.leaving = []                   # Served in whose place others are, until their answers end
        self.loading = {}                   # {id: Future of a Served}
        self.refused = {}                   # {id: (stamp, NoModel, when)}
        self.says = print                   # what is worth a line
        self.lock = threading.RLock()
        self.is_closed = False

    # --- which there are --------------------------------------------------------------------------

    def names(self):
        """Of each run its id, its folder and when it was written: out_dir's, then those trained here, then
        copies of them, as export.py writes them; the latest first. Also of models that are loaded, whose
        folder is not there any more."""
        runs = {}
        home = os.path.realpath(self.folder)
        for name in listed(self.folder):
            path = os.path.join(self.folder, name)
            checkpoint = checkpoint_in(path)
            if checkpoint and not name.startswith('.') and is_inside(checkpoint, home):
                runs[name] = run_of(name, path, checkpoint)
        own = self.own_id()
        if own:
            checkpoint = self.out_dir if os.path.isfile(self.out_dir) else checkpoint_in(self.out_dir)
            if self.out_dir.startswith('hf:'):
                checkpoint = weights_in(self.out_dir.removeprefix('hf:'))
            if checkpoint:
                runs[own] = run_of(own, self.out_dir, checkpoint)
        runs = {name: run for name, run in runs.items() if run}
        with self.lock:
            for served in self.loaded.values():
                runs.setdefault(served.id, dict(id=served.id, created=served.created, out_dir=served.out_dir))
        return sorted(runs.values(), key=lambda run: (
            run['id'] != own, not os.path.exists(os.path.join(run['out_dir'], 'metrics.jsonl')), -run['created'],
            run['id']))

    def fills_holes(self, run):
        """Whether the model of a run of names() fills holes; where it is not loaded, by its files."""
        served = self.loaded.get(run['id'])
        return served.fills_holes if served else fills_holes_by_files(run['out_dir'])

    def own_id(self):
        """The id of out_dir's model; '' if none was named."""
        if not self.out_dir:
            return ''
        return os.path.basename(os.path.abspath(self.out_dir.removeprefix('hf:')))

    def default(self):
        """The id of the model that answers where none is named; '' if there is none."""
        return self.own_id() or next((run['id'] for run in self.names()), '')

    # --- one of them ------------------------------------------------------------------------------

    def get(self, name=''):
        """The Served of this name, loaded now if it is not; NoModel if that cannot be. It takes as
        long as loading does: not for an event loop."""
        served = self.begin(name)
        return served.result() if isinstance(served, Future) else served

    async def fetch(self, name=''):
        """The same for an event loop. However many wait for a model, they take no thread from others."""
        served = await asyncio.to_thread(self.begin, name)
        if isinstance(served, Future):
            wrapped = asyncio.wrap_future(served)
            wrapped.add_done_callback(lambda future: future.cancelled() or future.exception())
            served = await asyncio.shield(wrapped)      # else who leaves would end it for all
        return served

    def begin(self, name):
        """The Served of this name, or the Future of it; NoModel if there is none."""
        run = self.find(name)
        name = run['id']
        with self.lock:
            self.refuse_if_closed()
            served = self.loaded.get(name)
            if served:
                served.used = time.monotonic()
                self.loaded[name] = self.loaded.pop(name)
            if not served or run.get('stamp', served.stamp) != served.stamp:
                refused = self.refused_lately(run)
                if refused and not served:
                    raise NoModel(str(refused), refused.status)
                future = self.loading.get(name)
                if not (future or refused):
                    future = self.loading[name] = Future()
                    threading.Thread(target=self.load_for, args=(run, future), name=f'load {name}', daemon=True).start()
        return served or future

    def find(self, name):
        """The run of this name, with its file's stamp if that is there."""
        runs = {run['id']: run for run in self.names()}
        if not isinstance(name, str):
            raise NoModel('model must be the id of one, a text', 400)
        name = name or self.own_id() or next(iter(runs), '')
        if name in runs:
            return runs[name]
        if not runs:
            raise NoModel('there is no model yet: train one, on the page or with python train.py; it answers as soon '
                          'as its first checkpoint is written')
        raise NoModel(f'no model {name[:100]!r}; there are: {", ".join(runs)}')

    def refused_lately(self, run):
        """Why this very file could not be loaded a moment ago, a NoModel; None if it can be tried."""
        stamp, error, when = self.refused.get(run['id'], (None, None, 0))
        if error and (stamp == run.get('stamp') or run['id'] in self.loaded) and time.monotonic() - when < AGAIN:
            return error
        return None

    def refuse_if_closed(self):
        if self.is_closed:
            raise NoModel('the server is ending', 503)

    # --- loading ----------------------------------------------------------------------------------

    def load_for(self, run, future):
        """The thread that loads a run for all who wait for the future."""
        name = run['id']
        try:
            served = self.load(run)
        except NoModel as error:
            self.take_back(run, future, error)
            return
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            message = f'{name}: cannot be loaded: {type(error).__name__}: {error}'
            self.take_back(run, future, NoModel(message, 503))
            return
        with self.lock:
            self.loading.pop(name, None)
            self.refused.pop(name, None)
            if self.is_closed:
                served.scheduler.close()
                return
            before = self.loaded.pop(name, None)
            self.loaded[name] = served
            if before:
                self.leave(before)
        settle(future, served)
        if self.metrics:
            self.metrics.add('models_loaded')
        self.says(f'loaded    {name}: {served.about}' + (', in the place of what was there before' if before else ''))

    def take_back(self, run, future, error):
        """Tells all who wait why there is no such model, and where another one goes on in its place
        tells the person once."""
        name = run['id']
        with self.lock:
            self.loading.pop(name, None)
            was_said = self.refused.get(name, (None, None))[1]
            self.refused[name] = run.get('stamp'), error, time.monotonic()
            goes_on = name in self.loaded
        settle(future, error=error)
        if goes_on and not was_said:
            self.says(f'note: {error}; until there is a sound one, the model of before goes on answering')

    def load(self, run):
        """The Served of a run, with a thread of its own; NoModel if it cannot be."""
        is_own = run['id'] == self.own_id()
        adapters = self.adapters if is_own else ''
        try:
            with told(kind=NoModel):
                where = choose_device(self.device)
                ckpt = contents_of(run['out_dir'])
                extra = load_adapters(adapters)
                mark = fingerprint_of(ckpt, extra)
                ckpt.pop('optimizers', None)
                tok = tokenizer_of(ckpt)
                if tok is None:
                    raise NoModel(f'{run["id"]}: was trained on a bare .bin without a tokenizer, or its folder has no '
                                  'tokenizer.json, so there is nothing to read or write text with', 400)
                self.make_room(where, bytes_of(ckpt['weights']))
                net = attach_adapters(model_of(ckpt), extra, adapters)
                about = describe(ckpt, net, where, self.dtype, self.quantize)
                fills = fills_holes(ckpt['config'])
                about += ', fills holes' * fills
                about += ', states in bfloat16' * (self.room.state_dtype == 'bfloat16' and not fills)
                net, context = prepare_model(net, where, self.dtype, precision=self.quantize)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and 'memory' not in str(error):
                raise
            message = f'{run["id"]}: there is not enough memory for it; --quantize=int8 takes a quarter'
            raise NoModel(message, 503) from None
        is_auto = self.dtype == 'auto' and not self.quantize
        run_dtype = dtype_of_run(ckpt['settings'].get('dtype'), where)
        precision = autocast(where, run_dtype) if is_auto else None
        if fills:
            scheduler = Filling(net, tok, self.room, context, self.turns)
        else:
            scheduler = Scheduler(net, tok, self.room, context, run['out_dir'], mark, self.turns)
        scheduler = Observed(scheduler, self.metrics)
        return Served(run['id'], run['out_dir'], run['created'], run.get('stamp'), net, tok, mark, scheduler, context,
                      precision, bytes_of(net.state_dict()), about)

    # --- leaving ----------------------------------------------------------------------------------

    def make_room(self, device, wanted):
        """Lets models go that were used longest ago, until there is room for one of so many bytes, or
        all others are in use."""
        with self.lock:
            budget = self.budget(device)
            used = sum(served.size for served in self.loaded.values())
            for served in list(self.loaded.values()):
                if used + wanted <= budget:
                    break
                if served.is_in_use():
                    continue
                del self.loaded[served.id]
                used -= served.size
                self.leave(served)

    def budget(self, device):
        """Bytes for all models."""
        if self.memory:
            return self.memory * 1e9
        free = available_memory(device)
        if free is None:
            return float('inf')
        return (free + sum(served.size for served in self.loaded.values())) / 2

    def leave(self, served):
        """Ends a model that nobody gets any more, as soon as its answers have ended."""
        self.leaving.append(served)
        threading.Thread(target=self.see_off, args=(served,), name=f'leave {served.id}', daemon=True).start()

    def see_off(self, served):
        while served.is_in_use() and not self.is_closed:
            time.sleep(TICK)
        served.scheduler.close()
        with self.lock:
            if served in self.leaving:
                self.leaving.remove(served)

    # --- how it is --------------------------------------------------------------------------------

    def schedulers(self):
        """{id: scheduler} of what is loaded."""
        with self.lock:
            return {name: served.scheduler for name, served in self.loaded.items()}

    def close(self):
        """Ends all: whoever waits for a model is told so, what is answered ends."""
        with self.lock:
            self.is_closed = True
            waiting = list(self.loading.values())
            models = [*self.loaded.values(), *self.leaving]
        for future in waiting:
            settle(future, error=NoModel('the server is ending', 503))
        enders = [threading.Thread(target=served.scheduler.close, daemon=True) for served in models]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()


# --- files ----------------------------------------------------------------------------------------

def listed(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def checkpoint_in(folder):
    """The path of the checkpoint of a run's folder; '' if there is none."""
    for name in FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    return ''


def weights_in(folder):
    """The path of the weights, or their index, in a folder of transformers; '' if there are none."""
    paths = (os.path.join(folder, name) for name in WEIGHTS)
    return next(filter(os.path.isfile, paths), '')


def is_inside(path, home):
    """Whether no link leads a path out of a folder."""
    return os.path.realpath(path).startswith(os.path.join(home, ''))


def run_of(name, out_dir, checkpoint):
    """What names() has of a run, and its stamp; None if its file has gone this moment."""
    try:
        stamp = files.stamp_of(checkpoint)
        return dict(id=name, created=int(os.path.getmtime(checkpoint)), out_dir=out_dir, stamp=stamp)
    except OSError:
        return None


def bytes_of(tensors):
    """The bytes of a dict of tensors, tied ones counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())


def describe(ckpt, net, device, dtype, quantize):
    """A model in a line."""
    kind = ckpt['kind']
    parameters = net.num_params()
    if ckpt.get('quantized'):               # its rounded weights are none of them
        codes = [tensor for name, tensor in net.named_buffers() if name.endswith('codes')]
        parameters += sum(tensor.numel() * (2 if ckpt['quantized'] == 'int4' else 1) for tensor in codes)
    size = f'{parameters / 1e6:.2f}M' if parameters >= 1e6 else f'{parameters / 1e3:.0f}K'
    if dtype == 'auto':                     # as prepare_model understands it
        dtype = choose_dtype(dtype, device)
    precision = quantize or ckpt.get('quantized') or dtype
    trained = ckpt['counters'].get('step', 0)
    origin = f'trained for {trained:,} steps' if trained else 'as it came from elsewhere'
    return f'{kind}, {size} parameters, {precision} on {device}, {origin}'
