"""The part `processes`: several processes train the same as one. With two cards by NCCL, DDP and
FSDP; with one card NCCL in a group of one, since it takes no two processes of one card."""
import os
import socket
import sys

import torch

from mambino.bench.gpu import models, runs

STEPS = 20
SETTINGS = dict(
    model='gpt', n_layer=2, n_embd=128, n_head=4, block_size=64, batch_size=4, tokens_per_step=1024,
    optimizer='adamw', learning_rate=1e-3, warmup_iters=2, dtype='float32', eval_interval=1000,
    max_iters=STEPS)


def run(recorder, device, out_dir):
    is_cuda = device.startswith('cuda')
    with recorder.item('a group of one, ddp and fsdp', 10) as wanted:
        if wanted:
            check_group_of_one(recorder, device, is_cuda)
    if is_cuda and torch.cuda.device_count() < 2:
        recorder.add('two processes', 'left out: one card, and NCCL takes no two processes of one')
        return
    scratch = os.path.join(out_dir, 'scratch', 'processes')
    dataset = runs.make_dataset(os.path.join(scratch, 'data'))
    with recorder.item('two processes', 25) as wanted:
        if wanted:
            check_two(recorder, scratch, dataset, 'cuda' if is_cuda else 'cpu')


def check_group_of_one(recorder, device, is_cuda):
    """The wrappers themselves around a model: its losses with and without."""
    import torch.distributed as dist
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    dist.init_process_group('cpu:gloo,cuda:nccl' if is_cuda else 'gloo',
                            init_method=f'tcp://127.0.0.1:{port}',
                            rank=0, world_size=1)
    losses = {}
    try:
        for name in ('alone', 'ddp', 'fsdp'):
            net = models.small_model('gpt').to(device)
            wrapped = net
            if name == 'ddp':
                wrapped = torch.nn.parallel.DistributedDataParallel(net)
            elif name == 'fsdp':
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard
                mesh = init_device_mesh(torch.device(device).type, (1,))
                for layer in net.model['layers']:
                    fully_shard(layer, mesh=mesh)
                fully_shard(net, mesh=mesh)
            training = models.Training(net, device, 'float32', 2, 64, wrapped)
            losses[name] = []
            for _ in range(5):
                losses[name].append(training.micro_step().item())
                training.update()
    finally:
        dist.destroy_process_group()
    alone = losses.pop('alone')
    worst = max(abs(a - b) for each in losses.values() for a, b in zip(each, alone))
    recorder.add('a group of one, ddp and fsdp',
                 f'five losses differ from those without by {worst:.1e} at most',
                 passed=worst <= 1e-3)


def check_two(recorder, scratch, dataset, device):
    one = runs.Run(os.path.join(scratch, 'one'), dataset, device,
                   SETTINGS).start().finish(recorder.seconds_left())
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    for parallel in ('ddp', 'fsdp'):
        two = runs.Run(os.path.join(scratch, parallel), dataset, device,
                       SETTINGS | dict(parallel=parallel),
                       launcher=launcher).start().finish(recorder.seconds_left())
        difference = runs.largest_difference(two.losses(), one.losses(), range(1, STEPS + 1))
        recorder.add(f'two processes, {parallel}',
                     f'{STEPS} losses differ from one process\'s by {difference} at most',
                     passed=difference is not None and difference <= 1e-3)
