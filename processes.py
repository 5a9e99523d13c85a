"""One process or many: what train.py asks of torch.distributed. torchrun starts the processes and says which each one is.

    group = start('auto')              # {'rank', 'world', 'device', …}; with one process nothing is set up
    total, = summed(3.5)               # the sum over all processes
    leave()                            # the end of the program, for all together
"""
import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))


def start(device):
    """The device of this process, of all processes joined: 'cpu', 'mps', 'cuda' or 'cuda:1'. A device that is not there ends the
    program in a line."""
    if WORLD > 1 and device == 'auto' and not torch.cuda.is_available():
        device = 'cpu'                                      # Apple's GPU has no collectives
    device = checkpoint.choose_device(device)
    if device == 'cuda':
        device = checkpoint.choose_device(f'cuda:{LOCAL_RANK}')
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


def shared(net, device):
    """The model whose backward pass ends with the mean gradient of all processes."""
    if WORLD == 1:
        return net
    return DistributedDataParallel(net, device_ids=[LOCAL_RANK] if device.startswith('cuda') else None)


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
