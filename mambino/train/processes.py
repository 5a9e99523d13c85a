"""One process or many: what train.py asks of torch.distributed. torchrun starts the processes and says which each one is.

    device = start('auto')             # with one process nothing is set up
    total, = summed(3.5)               # the sum over all processes
    leave()                            # the end of the program, for all together

Two ways to share the work. 'ddp': each process has all of the model, and the gradients' mean is taken once a step. 'fsdp', FSDP2 of
torch: each keeps some rows of every parameter, of its gradient and its optimizer's state; a layer is put together when it is computed
and forgotten thereafter. So no process may run the model, or read a parameter's values, without the others.
"""
import atexit
import os
import shutil
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mambino import machine
from mambino.weights import checkpoint
from mambino.configurator import fail

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
SHARDED = False             # each process has a share of the weights; `start` decides


def start(device, parallel='ddp'):
    """The device of this process, of all processes joined: 'cpu', 'mps', 'cuda' or 'cuda:1'. parallel: 'ddp' or 'fsdp'. A device that
    is not there ends the program in a line."""
    global SHARDED
    SHARDED = parallel == 'fsdp'
    if SHARDED and WORLD == 1:
        fail('parallel=fsdp shares the weights among several processes, and this is one: start it with torchrun --nproc_per_node=2 '
             'train.py, or leave it out')
    if WORLD > 1 and device == 'auto' and not torch.cuda.is_available():
        device = 'cpu'                                      # Apple's GPU has no collectives
    device = machine.choose_device(device)
    if device == 'cuda':
        device = machine.choose_device(f'cuda:{LOCAL_RANK}')
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    return device


def say(*words, **how):
    """print, by the first process alone."""
    if RANK == 0:
        print(*words, flush=True, **how)


def summed(*values):
    """The sums over all processes of some numbers, by way of the CPU: waits for no GPU."""
    total = torch.tensor(values, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(total)
    return total.tolist()


def least(value):
    """The least of all processes' values of a number."""
    least = torch.tensor(float(value), dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return least.item()


def agreed(action):
    """Calls action(); an OSError or RuntimeError in one process is one in all."""
    error = None
    try:
        action()
    except (OSError, RuntimeError) as caught:
        error = caught
    if not least(error is None):
        raise error or OSError('another process could not write its part')


def place(net, device):
    """The model goes to its device: all of it, or with fsdp the share of this process."""
    if not SHARDED:
        net.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh     # a second to import
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.partition(':')[0], (WORLD,))
    layers = next(module for name, module in net.named_modules() if name.endswith('layers'))
    for module in (*layers, net):                           # each goes there by itself, and only the share stays
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(net, 'step')


def shared(net, device):
    """The model whose backward pass ends with the mean gradient of all processes."""
    if WORLD == 1 or SHARDED:
        return net
    return DistributedDataParallel(net, device_ids=[LOCAL_RANK] if device.startswith('cuda') else None,
                                   broadcast_buffers=False)  # the only ones count, each process its own tokens


def clip(net, limit):
    """Scales the gradient down to this norm, if it is larger; returns the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
    return norm.full_tensor() if SHARDED else norm


def in_step(batches):
    """This process's batches (x, y) of an evaluation. With fsdp as many as the others have: the last may have no targets that count."""
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        if not (summed(bool(batch))[0] if SHARDED else batch):
            return
        yield batch or (torch.zeros(1, 8, dtype=torch.long), torch.full((1, 8), -1))


# --- checkpoints: their tensors are all with one process, or a share of each with every one ---------------------------

def each(contents, change):
    """The same dicts and lists, in them change(tensor) in the place of every tensor that is shared."""
    if isinstance(contents, dict):
        return {name: each(value, change) for name, value in contents.items()}
    if isinstance(contents, (list, tuple)):
        return type(contents)(each(value, change) for value in contents)
    return change(contents) if hasattr(contents, 'full_tensor') else contents


def save(path, contents, net, optimizers, shards=False):
    """Writes a checkpoint of these contents and the state of a model and its optimizers; all processes call it. shards: with fsdp
    each writes its share; else the first gets all, one tensor after another, and writes it. OSError or RuntimeError in all of them if
    one cannot write."""
    shards = shards and SHARDED
    parts = dict(weights=net.state_dict(keep_vars=SHARDED), optimizers=[opt.state_dict() for opt in optimizers])
    done = {}                                               # tied weights are one tensor, and stay one

    def change(t):
        if id(t) not in done:
            part = t.detach().to_local() if shards else t.detach().full_tensor()
            done[id(t)] = part.to('cpu', copy=True) if shards or RANK == 0 else None
        return done[id(t)]
    if SHARDED:
        parts = each(parts, change)
    if shards:
        step = contents['counters']['step']
        try:
            agreed(lambda: checkpoint.save_shard(path, parts, step, RANK, WORLD))
        except (OSError, RuntimeError):
            shutil.rmtree(os.path.dirname(checkpoint.shards_of(path, step, RANK, WORLD)), ignore_errors=True)
            raise
        parts = dict(weights=None, optimizers=None, shards=dict(step=step, world=WORLD))
    agreed(lambda: RANK or checkpoint.save_checkpoint(path, contents | parts))


def load_share(net, weights):
    """Puts this process's share of the weights, from a checkpoint in shards, into the model."""
    for name, p in net.state_dict(keep_vars=True).items():
        p.detach().to_local().copy_(weights[name])


def shares(opt, saved, in_shards):
    """A saved state of an optimizer, as it can be loaded: with fsdp, of each tensor this process's share, if `in_shards` it is not
    that already."""
    if SHARDED:
        from torch.distributed.tensor import DTensor, distribute_tensor
        params = [p for group in opt.param_groups for p in group['params']]
        for i, state in saved['state'].items():
            p = params[i]
            how = p.device_mesh, p.placements
            for name, t in state.items():
                if t.ndim and in_shards:
                    state[name] = DTensor.from_local(t.to(p.device), *how, run_check=False, shape=p.shape, stride=p.stride())
                elif t.ndim:                                # a count of steps is a number, the same for all
                    state[name] = distribute_tensor(t, *how, src_data_rank=None).clone()  # each cuts its own: nothing travels
    return saved


def leave(status=0):
    """Ends the program; several processes together. These skip the interpreter's own end, where gloo's threads now and then
    abort a run that is complete."""
    if WORLD > 1:
        summed(0)
        atexit._run_exitfuncs()                             # the loggers' last words
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
