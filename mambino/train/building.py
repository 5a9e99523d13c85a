"""What a run's model and its optimizers are made of.

    config = model_config(settings, explicit, origin, data)         # {field: value}
    require_room('gpt', config)                                     # before its weights are there
    optimizers = build_optimizers(net, 'muon', learning_rate=1e-2)
"""
import dataclasses
import inspect
import math
import sys

import torch

from mambino import machine
from mambino.blocks import fills_holes
from mambino.configurator import fail
from mambino.train.muon import Muon, row_kinds
from mambino.weights import checkpoint
from mambino.weights.checkpoint import MODELS
from mambino.weights.fitting import Undrawn

# The model's settings that only training reads: they may change from run to run.
OF_TRAINING = ('dropout', 'capacity_factor', 'aux_loss', 'z_loss')

BLOCK_LENGTH = 16       # tokens
OF_LAYERS = {       # of a hybrid: letters of `layers`, and the settings of these alone
    'mb': ('version', 'n_groups', 'mimo_rank', 'rope_fraction'),
    'mbd': ('state_size',),
    'd': ('key_heads', 'delta_max'),
    'ab': ('n_head', 'n_kv_head', 'window', 'qk_norm', 'rope_theta'),
}


def named_flags():
    """Names of the settings that the command line itself names, not a config file."""
    flags = [arg.lstrip('-').partition('=')[0] for arg in sys.argv if arg.startswith('--')]
    return [flag.replace('-', '_') for flag in flags]


def is_unset(name, value):
    """Whether this value of a setting leaves it to the machine, or to the model's own default."""
    nothing = -1 if name == 'window' else 0
    return value in ('', None) or (type(value) is int and value == nothing)


def require_room(kind, config):
    """Ends the program if the weights of a model alone are more than the memory that is free. They are
    counted before there are any, from models of one and of two layers."""
    def size(n_layer):
        with torch.device('meta'), Undrawn():
            return checkpoint.build(kind, config | dict(n_layer=n_layer)).num_params()
    try:
        one = size(1)
        parameters = one + (config['n_layer'] - 1) * (size(2) - one)
    except ValueError as error:
        fail(error)
    except (RuntimeError, OverflowError, TypeError):            # more than a tensor can have
        parameters = 1 << 62
    free = machine.available_memory('cpu') or 1 << 50
    if 4 * parameters > free:
        fail(f'a model of {parameters / 1e9:,.1f} billion parameters takes {4 * parameters / 2**30:,.0f} GB for its '
             f'weights alone, and {free / 2**30:,.1f} GB are free: lower --n_layer, --n_embd, or what else makes it '
             'large')


def model_config(settings, explicit, origin, data):
    """{field: value} for the model's config: of the model there is, what training may not change;
    else of the settings."""
    kind = settings['model']
    fields = {name: {field.name for field in dataclasses.fields(config)}
              for name, (_, config) in MODELS.items()}
    flags = [name for name in named_flags() if explicit.get(name, '') is not None]
    for name in explicit:  # a config file may serve several models, a flag is meant
        of_another = name not in fields[kind] and any(name in names for names in fields.values())
        if of_another and name in flags:
            fail(f'{name} means nothing to a {kind} model; leave it out')
    if origin.model:
        changes = {name: settings[name] for name in OF_TRAINING if name in fields[kind]}
        config = origin.model['config'] | changes | dict(block_size=settings['block_size'])
        ids = config['vocab_size'] - fills_holes(config)    # the last one stands for a hidden token
        if data.vocab_size > ids:
            holder = f'the run in {settings["out_dir"]}' if origin.ckpt else settings['init_from']
            fail(f'dataset {data.name} has a vocabulary of {data.vocab_size}, {holder} one of {ids}')
        refuse_idle(kind, config, flags)
        return config
    config = {name: value for name, value in settings.items()
              if name in fields[kind] and not is_unset(name, value)}
    hides = settings['objective'] != 'next'
    config['vocab_size'] = data.vocab_size + hides      # the last id is what stands for a hidden token
    if data.vocab_size > 1000:
        # a rounder matrix, and at least one id more: an export can make it what fills up texts
        config['vocab_size'] = math.ceil((data.vocab_size + bool(data.tokenizer) + hides) / 64) * 64
    refuse_idle(kind, config, flags)
    return config


def refuse_idle(kind, config, flags):
    """Ends the program at a flag that says something of parts that a model has not. config: one of an
    older version may have less than all."""
    if kind == 'mamba' and config.get('version', 2) == 1 and 'n_groups' in flags:
        fail('n_groups means nothing to a Mamba-1; leave it out')
    named = [name for name in ('max_weight', 'share_projections') if name in flags]
    if named and not fills_holes(config):
        fail(f'{named[0]} means nothing where the next token is learned, only with --objective=masked or block; '
             'leave it out')
    layers = config.get('layers') or 'b'
    for letters, names in OF_LAYERS.items() if kind == 'hybrid' else ():
        named = [name for name in names if name in flags]
        if named and not set(letters) & set(layers):
            fail(f'{named[0]} means nothing to a hybrid of layers={layers}, only where it has {" or ".join(letters)}; '
                 'leave it out')


class AdamW(torch.optim.AdamW):
    """torch's, without the import of torch._dynamo, two seconds: it is only told what not to compile."""

    def __init__(self, params, **settings):
        for name in ('add_param_group', 'zero_grad', 'state_dict', 'load_state_dict'):
            method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
            if not hasattr(method, '__dynamo_disable'):
                setattr(method, '__dynamo_disable', method)     # what torch._compile would import it for
        super().__init__(params, **settings)

    @torch.no_grad()
    def step(self, closure=None):
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def build_optimizers(net, optimizer, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95),
                     fused=True, dtype='float32'):
    """[AdamW], or [AdamW, Muon]: Muon for the hidden matrices, AdamW for the rest. dtype: what the run
    computes in."""
    groups = net.optim_groups(weight_decay, muon=optimizer == 'muon')
    adamw_groups = [group for group in groups if group['kind'] == 'adamw']
    muon_groups = [group for group in groups if group['kind'] == 'muon']
    optimizers = [AdamW(adamw_groups, lr=learning_rate, betas=betas, fused=fused)]
    if muon_groups:
        rows = row_kinds(net)
        for group in muon_groups:
            group['rows'] = [rows.get(p) for p in group['params']]
        muon = Muon(muon_groups, lr=learning_rate, adjust_lr_fn='match_rms_adamw')
        if dtype == 'bfloat16':         # fast here, or it would not be what the run computes in
            muon.dtype = torch.bfloat16
        optimizers.append(muon)
    return optimizers
