"""Builds a model for weights that there are, and never one that is larger than they are.

    net = build_with('gpt', config, weights)        # ValueError says what does not fit

A config is a few numbers, and a model of its sizes may need more memory and time than any machine
has. So the names and shapes of its parameters, which take no memory, are first compared with the
weights.
"""
import torch
from torch.overrides import TorchFunctionMode

from mambino.weights.checkpoint import MODELS, build
from mambino.weights.quantize import PRECISIONS, prepare_quantized
from mambino.weights.soundness import FLOATS


def build_with(kind, config, weights, quantized=''):
    """The model of this kind and config that has these weights, {name: tensor}; quantized: their
    precision, where they are rounded. ValueError if they are not those of such a model."""
    check_fit(kind, config, weights, quantized)
    net = build(kind, config)
    if quantized:
        prepare_quantized(net, quantized)
    net.load_state_dict(weights)
    return net


def check_fit(kind, config, weights, quantized=''):
    """ValueError unless {name: tensor} have the very names, shapes and types of such a model's."""
    wanted = parameters_of(kind, config, weights, quantized)
    for trouble, names in (('is missing', wanted.keys() - weights.keys()),
                           ('is not part of such a model', weights.keys() - wanted.keys())):
        if names:
            more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
            raise ValueError(f'the tensor {min(names)}{more} {trouble}')
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f'{name} has shape {tuple(tensor.shape)}, and should have {tuple(wanted[name].shape)}')
        if tensor.dtype != wanted[name].dtype and (quantized or tensor.dtype not in FLOATS):
            raise ValueError(f'{name} is of {tensor.dtype}, and should be of {wanted[name].dtype}')


def parameters_of(kind, config, weights, quantized=''):
    """{name: tensor without memory} of such a model. ValueError where the config cannot be, or is
    of other layers than the weights."""
    layers = {name.partition('.layers.')[2].partition('.')[0] for name in weights if '.layers.' in name}
    n_layer = MODELS[kind][1](**config).n_layer
    if n_layer != len(layers):
        raise ValueError(f'n_layer={n_layer}, and the weights are of {len(layers)} layers')
    if quantized and quantized not in PRECISIONS:
        raise ValueError(f'quantized={quantized!r} must be one of {", ".join(PRECISIONS)}')
    return model_of_shapes(kind, config, quantized).state_dict()


def model_of_shapes(kind, config, quantized=''):
    """Such a model without memory, for its names and shapes. ValueError where the config cannot be."""
    try:
        with torch.device('meta'), Undrawn():
            net = build(kind, config)
            return prepare_quantized(net, quantized) if quantized else net
    except (RuntimeError, OverflowError):       # more than a tensor can have
        raise ValueError('its config describes a model larger than any') from None


class Undrawn(TorchFunctionMode):
    """Within, nothing is drawn, nor computed of what was: for some of it torch imports its
    compiler, where tensors have no memory, which takes seconds."""
    SAME_SHAPE = {
        'normal_', 'uniform_', 'kaiming_uniform_', 'exp', 'expm1', 'log', 'log_', 'clamp', 'mul', 'add', 'neg', 'div_'}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, '__name__', '')
        if name in self.SAME_SHAPE:
            return args[0] if args else kwargs['tensor']
        if name == 'arange':
            function, args = torch.empty, [len(range(*map(int, args)))]
        if name == 'rand':
            function = torch.empty
        return function(*args, **(kwargs or {}))
