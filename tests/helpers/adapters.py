"""Adapters with weights that are not 0, and the checkpoints that train.py would make of them."""
import copy

import pytest
import torch

from helpers.models import build, perturb
from mambino.weights import adapters, checkpoint

LORA = dict(type='lora', targets='', rank=8, alpha=16.0, dropout=0.0)
PREFIX = dict(type='prefix', length=7)


def trained(net):
    """The trainable parameters by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def adapted(name, kind='lora', **settings):
    """A perturbed model, and a copy with a perturbed adapter."""
    base = perturb(build(name))
    net = copy.deepcopy(base)
    adapters.add_lora(net, **settings) if kind == 'lora' else adapters.add_prefix(net, 7)
    for p in trained(net).values():
        p.data += 0.1 * torch.randn_like(p)
    return base, net


def saved(net, spec, base):
    """A checkpoint of an adapter, as train.py makes it."""
    kind = next(kind for kind, (model, _) in checkpoint.MODELS.items() if isinstance(net, model))
    fingerprint = checkpoint.fingerprint(base.state_dict())
    spec = spec | dict(base='base', base_at='base', base_fingerprint=fingerprint)
    state = adapters.AdapterState(net, spec).state_dict()
    weights = {name: tensor.clone() for name, tensor in state.items()}
    return dict(kind=kind, config=checkpoint.config_of(net), adapter=spec, weights=weights)


def tuned_by_peft(folder, to, targets):
    """A LoRA on the model in a folder, no weight of which is 0, saved; → what the two compute."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        task_type='CAUSAL_LM', r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(to)
    return lambda idx: model(idx).logits
