"""One process or many: what train.py asks of torch.distributed.

torchrun starts the processes and tells each which one it is.

    device = start('auto')             # with one process nothing is set up
    hold('out')                        # no other run may write there
    total, = summed(3.5)               # the sum over all processes
    leave()                            # the end of the program, for all together

Two ways to share the work. 'ddp': each process has all of the model, and the gradients' mean is
taken once a step. 'fsdp', FSDP2 of torch: each keeps some rows of every parameter, of its gradient
and its optimizer's state; a layer is put together when it is computed and forgotten thereafter. So
no process may run the model, or read a parameter's values, without the others. With 'ddp' the
experts of a model can be spread over processes (experts.py): then, too, none runs the model without
the others.
"""
import atexit
import inspect
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mambino import files, machine
from mambino.configurator import fail
from mambino.train import experts, sharding
from mambino.weights import checkpoint, shards

UNSET = ('start several processes with torchrun --nproc_per_node=2 train.py; '
         'for one, unset RANK, WORLD_SIZE and LOCAL_RANK')


def read_environment(environment):
    """(rank, world, local rank) as torchrun tells them; what cannot be ends the program in a
    line."""
    numbers = {}
    for name, default in (('RANK', '0'), ('WORLD_SIZE', '1'), ('LOCAL_RANK', '0')):
        text = environment.get(name, default)
        if not (text.isascii() and text.isdigit()):
            fail(f'the environment has {name}={text}, which torchrun sets to a number: {UNSET}')
        numbers[name] = int(text)
    rank, world, local_rank = numbers.values()
    if not rank < world or not local_rank < world:
        given = ' '.join(f'{name}={number}' for name, number in numbers.items())
        fail(f'the environment has {given}, but there are no more processes than WORLD_SIZE, counted from 0: {UNSET}')
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in environment]
    if world > 1 and missing:
        fail(f'the environment has WORLD_SIZE={world} and no {missing[0]}: {UNSET}')
    return rank, world, local_rank


RANK, WORLD, LOCAL_RANK = read_environment(os.environ)
SHARDED = False             # each process has a share of the weights; `start` decides
TOGETHER = False            # no process may run the model without the others
PARENT = os.getppid()
# what torch's errors say where processes have lost each other
LOST = r'gloo|NCCL|(?i:connection (was )?(closed|reset|refused)|broken pipe|timed? ?out)'
GRACE = 60                  # seconds in which processes without torchrun may still save


def start(device, parallel='ddp', expert_parallel=1):
    """The device of this process, of all processes joined: 'cpu', 'mps', 'cuda' or 'cuda:1'.
    parallel: 'ddp' or 'fsdp'. expert_parallel: processes that share a layer's experts. What cannot
    be, and a device that is not there, end the program in a line."""
    global SHARDED, TOGETHER
    SHARDED = parallel == 'fsdp'
    TOGETHER = SHARDED or expert_parallel > 1
    experts.require(expert_parallel, WORLD, SHARDED)
    if SHARDED and WORLD == 1:
        fail('parallel=fsdp shares the weights among several processes, and this is one: start it '
             'with torchrun --nproc_per_node=2 train.py, or leave it out')
    if WORLD > 1 and device == 'auto' and not torch.cuda.is_available():
        device = 'cpu'                                      # Apple's GPU has no collectives
    device = machine.choose_device(device)
    if device == 'cuda':
        device = card_of(LOCAL_RANK)
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
        if SHARDED and not dist.is_nccl_available():
            fail('parallel=fsdp on GPUs needs NCCL, which this PyTorch is built without (on Windows there is none): '
                 'leave it out')
    if WORLD > 1:
        # No handler of Python's runs while this waits for another process: torchrun would wait, and kill it after
        # half a minute. There is nothing to save before the loop.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            threading.Thread(target=end_with_torchrun, daemon=True).start()
        meet(device)
        if expert_parallel > 1:
            experts.form_groups(expert_parallel, RANK, WORLD)
    return device


def card_of(local_rank):
    """The card of this process on its machine."""
    cards = torch.cuda.device_count()
    if local_rank >= cards:
        fail(f'this is process {local_rank + 1} of this machine, which has {cards} GPU{"s" * (cards > 1)}: start '
             f'torchrun with --nproc_per_node={cards}, or train with --device=cpu')
    return machine.choose_device(f'cuda:{local_rank}')


def meet(device):
    """All processes find each other, and try whether what their devices send arrives."""
    is_card = device.startswith('cuda')
    through_nccl = is_card and dist.is_nccl_available()
    try:
        dist.init_process_group(f'cpu:gloo,cuda:{"nccl" if through_nccl else "gloo"}' if is_card else 'gloo')
        cards, = summed(is_card)                            # none ends while another still connects
        sys.excepthook = tell
    except (RuntimeError, ValueError) as error:
        fail(f'the {WORLD} processes do not find each other at {os.environ["MASTER_ADDR"]}:'
             f'{os.environ["MASTER_PORT"]}: {str(error).splitlines()[0]}')
    if 0 < cards < WORLD:
        fail(f'{cards:.0f} of {WORLD} processes found a GPU that works, the others none, and would wait for each '
             'other: see what nvidia-smi says on each machine, or train with --device=cpu')
    if not is_card:
        return
    if not through_nccl:
        say('note: this PyTorch is built without NCCL (on Windows there is none): what GPUs tell each other goes by '
            'gloo, through the memory of the CPU, which is slower')
        return
    require_a_card_each(device)
    try:
        dist.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize()
    except RuntimeError as error:
        fail(f'NCCL, by which GPUs exchange gradients, does not start: {str(error).splitlines()[-1].strip()}; '
             'the environment variable NCCL_DEBUG=INFO makes it say more')


def tell(kind, error, trace):
    """In the place of sys.excepthook: that another process is gone, or did other than this one, is one
    line; all else a traceback."""
    reason = str(error).strip().partition('\n')[0]
    if not issubclass(kind, RuntimeError) or not re.search(LOST, str(error)):
        sys.__excepthook__(kind, error, trace)
        return
    print(f'error: another process has ended, or does not answer any more ({reason[-160:]}): what it '
          'said tells why; to go on, run the same command again', file=sys.stderr, flush=True)
    os._exit(2)                                             # NCCL would wait for its operations


def require_a_card_each(device):
    """Ends the program in a line if two processes have one card, which NCCL does not take."""
    card = torch.cuda.get_device_properties(device)
    cards = [None] * WORLD
    dist.all_gather_object(cards, (socket.gethostname(), str(getattr(card, 'uuid', device))))
    same = cards.count(cards[RANK])
    together(lambda: same > 1 and fail(
        f'{same} processes have the same GPU, {device} of {socket.gethostname()}, and NCCL takes one a process: '
        'leave out --device, and let torchrun start as many processes as there are GPUs'))


def end_with_torchrun():
    """The thread that stops this process once torchrun, its parent, was killed: first as a signal
    does, which saves; and where that takes too long, because another process is gone, at once."""
    wait_for_end_of(PARENT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def wait_for_end_of(parent):
    """Returns once the process that has started this one is there no more."""
    if os.name == 'nt':                                     # there getppid() never changes
        import _winapi
        try:
            handle = _winapi.OpenProcess(0x100000, False, parent)           # SYNCHRONIZE
        except OSError:
            return
        _winapi.WaitForSingleObject(handle, _winapi.INFINITE)
    while os.getppid() == parent and os.name != 'nt':
        time.sleep(0.5)


def hold(out_dir, make=False):
    """From here on no other process may train in this folder; one that does so already ends the
    program in a line, in all processes. make: it is made if it is not there. The first process
    holds it."""
    def act():
        try:
            if make:
                os.makedirs(out_dir, exist_ok=True)
            if os.path.isdir(out_dir):
                files.hold(out_dir)
        except files.Held as error:
            fail(f'{out_dir}: {holder_line(error.holder, out_dir)}')
        except OSError as error:
            if make:
                fail(f'{out_dir}: cannot be written to: {error.strerror}; choose another --out_dir')
    together(act if RANK == 0 else lambda: None)


def holder_line(holder, out_dir):
    """Who trains in a folder, and what to do."""
    here = holder.get('host') == socket.gethostname()
    pid = holder.get('pid')
    process = f'process {pid} on {holder.get("host")}, since {holder.get("since")},' if pid else 'another process'
    how = f'stop it (kill {pid})' if pid and here else 'stop it'
    return (f'{process} is training there: wait for its end, or {how}, or choose another --out_dir; to look at what '
            f'it has made so far: python sample.py --out_dir={shlex.quote(out_dir)}')


def together(action):
    """What action() returns; where it ends one process, all end."""
    status, value = 0, None
    try:
        value = action()
    except SystemExit as end:
        status = end.code
    if summed(bool(status))[0]:
        leave(status or 2)
    return value


def say(*words, **options):
    """print, by the first process alone."""
    if RANK == 0:
        print(*words, flush=True, **options)


def summed(*values):
    """The sums over all processes of some numbers, by way of the CPU: waits for no GPU."""
    total = torch.tensor(values, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(total)
    return total.tolist()


def least(value):
    """The least of all processes' values of a number."""
    minimum = torch.tensor(float(value), dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(minimum, dist.ReduceOp.MIN)
    return minimum.item()


def agreed(action):
    """Calls action(); an OSError or RuntimeError in one process is one in all."""
    error = None
    try:
        action()
    except (OSError, RuntimeError) as caught:
        error = caught
    if not least(error is None):
        raise error or OSError('another process could not write its part')


def place(net, device, dtype='float32'):
    """The model goes to its device: all of it, or with fsdp the share of this process. dtype: what
    the run computes in."""
    if experts.N > 1:
        experts.divide(net)
    if not SHARDED:
        net.to(device)
        return
    sharding.shard(net, device, dtype, WORLD)


def shared(net, device):
    """The model whose backward pass ends with the mean gradient of all processes."""
    if WORLD == 1 or SHARDED:
        return net
    apart = [name for name, p in net.named_parameters() if experts.is_share(p)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, apart)
    # buffers count each process's own tokens; what leaves them alone has another name from torch 2.13 on
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
    return DistributedDataParallel(
        net, device_ids=[torch.device(device)] if device.startswith('cuda') else None, **{buffers: False})


def join_gradients(net, scaled=False):
    """After the last backward pass of a step: experts' gradients become those of all processes'
    tokens. scaled: as fp16 has them."""
    if experts.N > 1:
        experts.join_gradients(net, scaled)


def clip(net, limit):
    """Scales the gradient down to this norm, if it is larger; returns the norm it had."""
    if experts.N > 1:
        return experts.clip(net, limit)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
    return norm.full_tensor() if SHARDED else norm


def in_step(batches, T):
    """This process's batches (x, y) of an evaluation, (B, T) each. Where none may run the model alone as
    many as the others have: the last may have no targets that count."""
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        if not (summed(bool(batch))[0] if TOGETHER else batch):
            return
        # of whole windows, since some models cut them into blocks
        yield batch or (torch.zeros(1, T, dtype=torch.long), torch.full((1, T), -1))


# --- checkpoints: their tensors are all with one process, or a share of each with every one -------

def save(path, contents, net, optimizers, in_shards=False):
    """Writes a checkpoint of these contents and the state of a model and its optimizers; all
    processes call it. in_shards: with fsdp each writes its share; else the first gets all, one
    tensor after another, and writes it. OSError or RuntimeError in all of them if one cannot."""
    state = dict(weights=net.state_dict(keep_vars=TOGETHER),
                 optimizers=[optimizer.state_dict() for optimizer in optimizers])
    if SHARDED and in_shards:
        step = contents['counters']['step']
        folder = checkpoint.shards_of(path, step)
        state, tensors = take_apart(state)
        agreed(lambda: RANK or clear(folder))               # a killed run's
        try:
            shards.write(folder, tensors)
            state |= dict(shards=dict(step=step), shard_files=checksums(folder))
            parents = os.path.dirname(folder), os.path.dirname(path)
            agreed(lambda: RANK or files.flush(folder, *parents))
        except (OSError, RuntimeError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
    elif SHARDED:
        state = gather(state)
    elif experts.N > 1:
        state = experts.gather(state, optimizers)
    agreed(lambda: RANK or checkpoint.save_checkpoint(path, contents | state))


def clear(folder):
    """Deletes a folder of shards; a link in the place of it, or of the folder it is in, goes
    alone."""
    for path in (os.path.dirname(folder), folder):
        if os.path.islink(path):
            os.remove(path)
    shutil.rmtree(folder, ignore_errors=True)


def checksums(folder):
    """{name: checksum} of all shards in a folder, each told by the process that has written it."""
    told = {}
    agreed(lambda: told.update(shards.checksums(folder, RANK)))
    everybodys = [None] * WORLD
    dist.all_gather_object(everybodys, told)
    return {name: number for part in everybodys for name, number in part.items()}


def gather(state):
    """Shared tensors put together on the CPU of the first process; tied weights stay one tensor."""
    complete = {}

    def change(_, value):
        if not hasattr(value, 'full_tensor'):
            return value
        if id(value) not in complete:
            tensor = value.detach().full_tensor()
            complete[id(value)] = tensor.to('cpu', copy=True) if RANK == 0 else None
        return complete[id(value)]
    return checkpoint.map_values(change, state)


def take_apart(state):
    """Shared tensors' names in their places, and {name: tensor}; tied weights have one name."""
    names, tensors = {}, {}

    def change(name, value):
        if not hasattr(value, 'full_tensor'):
            return value
        if id(value) not in names:
            names[id(value)] = name
            tensors[name] = value.detach()
        return names[id(value)]
    return checkpoint.map_values(change, state), tensors


def load_weights(net, ckpt):
    """Reads this process's share of the weights, from a checkpoint in shards, into the model."""
    together(lambda: shards.require(ckpt['shards'], ckpt['shard_files'], RANK, WORLD))
    params = net.state_dict(keep_vars=True)
    shards.read(ckpt['shards'], {ckpt['weights'][name]: p.detach() for name, p in params.items()})


def shares(optimizer, saved, folder):
    """A saved state of an optimizer, as it can be loaded: with fsdp, of each tensor this process's
    share; else of experts that are spread those it has. folder: of the shards, if that is where
    they are."""
    if experts.N > 1:
        return experts.share(optimizer, saved)
    if not SHARDED:
        return saved
    from torch.distributed.tensor import distribute_tensor
    params = [p for group in optimizer.param_groups for p in group['params']]
    wanted = {}
    for i, state in saved['state'].items():
        mesh, placements = params[i].device_mesh, params[i].placements
        for key, value in state.items():
            if isinstance(value, str):
                wanted[value] = state[key] = torch.zeros_like(params[i]).detach()
            elif value.ndim:                                # a count of steps is the same for all
                share = distribute_tensor(value, mesh, placements, src_data_rank=None)
                state[key] = share.clone()                  # cut by each itself: nothing travels
    if wanted:
        shards.read(folder, wanted)
    return saved


def leave(status=0):
    """Ends the program; several processes together. These skip the interpreter's own end, where
    gloo's threads now and then abort a run that is complete."""
    if WORLD > 1:
        summed(0)
        atexit._run_exitfuncs()                             # the loggers' last words
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
