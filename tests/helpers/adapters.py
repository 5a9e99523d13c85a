"""Adapters with weights that are not 0, and the checkpoints that train.py would make of them."""
import copy

import torch

from helpers.models import build, perturb
from mambino.weights import adapters, checkpoint

LORA = dict(type='lora', targets='', rank=8, alpha=16.0, dropout=0.0)
PREFIX = dict(type='prefix', length=7)


def trained(net):
    """The trainable parameters by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def adapted(name, kind='lora', **how):
    """A perturbed model, and a copy with a perturbed adapter."""
    base = perturb(build(name))
    net = copy.deepcopy(base)
    adapters.add_lora(net, **how) if kind == 'lora' else adapters.add_prefix(net, 7)
    for p in trained(net).values():
        p.data += 0.1 * torch.randn_like(p)
    return base, net


def saved(net, how, base):
    """A checkpoint of an adapter, as train.py makes it."""
    kind = next(kind for kind, (model, _) in checkpoint.MODELS.items() if isinstance(net, model))
    how = how | dict(base='base', base_at='base', base_fingerprint=checkpoint.fingerprint(base.state_dict()))
    return dict(kind=kind, config=checkpoint.config_of(net), adapter=how,
                weights={name: t.clone() for name, t in adapters.AdapterState(net, how).state_dict().items()})
