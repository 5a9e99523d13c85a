"""Which of our classes the exporters know. What a table does not hold is refused by its name, and
never taken for something else.

    tensors = look_up({Mamba1Mixer: mamba1_tensors, …}, block.mixer, 'llama.cpp')
    check_modules(net, 'llama.cpp')         # ValueError if any part of the model is new here

A class is looked up itself, never its bases: a subclass is there because it computes something
else.
"""
import torch.nn as nn

import model_gpt
import model_hybrid
import model_mamba
from mambino.language_model import Gate, GatedRMSNorm, RMSNorm, SwiGLU
from mambino.weights.checkpoint import MODELS

CONTAINERS = {nn.ModuleDict, nn.ModuleList, nn.Dropout}  # dropout: none in a finished model
PARTS = {
    nn.Linear, nn.Embedding, RMSNorm,
    model_gpt.GPT, model_gpt.Layer, model_gpt.NormAfterLayer, model_gpt.Attention, SwiGLU,
    model_gpt.MoE, model_gpt.Experts,
    model_mamba.Mamba, model_mamba.Block, model_mamba.Mamba1Mixer, model_mamba.Mamba2Mixer,
    model_mamba.Mamba3Mixer,
    model_mamba.Conv1d, model_mamba.TimeStep, GatedRMSNorm, Gate,
    model_hybrid.Hybrid, model_hybrid.Layer, model_hybrid.LowRank, model_hybrid.DeltaMixer,
}


def check_classes(modules, classes, tool):
    """ValueError if one of the modules is of none of these classes: the tool, a name, cannot have
    it."""
    for module in modules:
        if type(module) not in classes:
            known = ', '.join(sorted(cls.__name__ for cls in classes))
            raise ValueError(f'{tool} has no {type(module).__name__}, only {known}')


def look_up(table, module, tool):
    """What a table {class: …} has for a module. ValueError if it does not hold the module's
    class."""
    check_classes([module], table, tool)
    return table[type(module)]


def look_up_alike(table, modules, tool):
    """What a table has for modules that are all of one class, such as the mixers of a model.
    ValueError if they are not."""
    check_classes(modules, table, tool)
    classes = {type(module) for module in modules}
    if len(classes) > 1:
        names = sorted(cls.__name__ for cls in classes)
        raise ValueError(f'{tool} has no model that mixes {" and ".join(names)}')
    return table[classes.pop()]


def check_modules(net, tool):
    """ValueError if a part of the model, at any depth, is of a class that no exporter knows."""
    for path, module in net.named_modules():
        if type(module) not in PARTS | CONTAINERS:
            where = f' ({path})' if path else ''
            raise ValueError(f'{tool} has no {type(module).__name__}{where}: the exporters have not '
                             'been taught what it computes')


def longest_text(config):
    """Tokens of the longest text that a model is for: those of a training window, where attention sees all
    of them; None where its state does not grow, and beyond a window nothing is other than within."""
    sees_all = getattr(config, 'window', None) == 0
    return config.block_size if sees_all else None


def kind_of(net):
    """'gpt', 'mamba', …: what a model's checkpoint calls its class. ValueError if no checkpoint has
    it."""
    return look_up({model: kind for kind, (model, _) in MODELS.items()}, net, 'a checkpoint')
