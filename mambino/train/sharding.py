"""How FSDP2 of torch shares a model: which of its modules are gathered together, and in which
precision.

    shard(net, 'cuda:0', 'bfloat16', world=8)   # in all processes; each keeps its rows

    a layer     its matrices, in the precision of products  ┐ put together when the layer is
                norms, routers, scans' parameters, in fp32  ┘ computed, forgotten thereafter
    the rest    embedding, last norm, head, in fp32

What autocast would round anyway travels rounded: half the bytes, the same products. Rows at rest,
gradients' sums and the optimizer stay in fp32.
"""
import torch
import torch.nn as nn

from model_gpt import Experts, MoE


def shard(net, device, dtype, world):
    """Of every parameter this process keeps its rows. dtype: what the run computes in."""
    from torch.distributed.device_mesh import init_device_mesh  # a second to import
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    mesh = init_device_mesh(device.partition(':')[0], (world,))
    rounding = MixedPrecisionPolicy(                        # gradients are added up in fp32
        param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = next(module for name, module in net.named_modules() if name.endswith('layers'))
    for layer in layers:                                    # each by itself: only its share stays
        for module in rounded_parts(layer) if dtype != 'float32' else ():
            fully_shard(module, mesh=mesh, mp_policy=rounding)
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, 'step')


def rounded_parts(module):
    """The largest modules in a module whose weights are all read by products that autocast rounds.
    A router's product is exact (model_gpt.MoE), and what has a bias or is no matrix stays."""
    for name, child in module.named_children():
        owners = [part for part in child.modules() if part._parameters]
        if isinstance(module, MoE) and name == 'gate':
            continue
        is_exact = any(isinstance(part, MoE) for part in child.modules())
        if owners and not is_exact and all(is_rounded(part) for part in owners):
            yield child
        else:
            yield from rounded_parts(child)


def is_rounded(module):
    """Whether a module is matrices alone, in products that autocast rounds."""
    return type(module) is Experts or (type(module) is nn.Linear and module.bias is None)
