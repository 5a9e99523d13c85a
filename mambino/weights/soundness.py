"""Whether what was read from a file is a checkpoint: every value of the kind that it must be, every
tensor no larger than what the file holds of it.

    check_contents(ckpt, GPTConfig)             # all but the tensors; ValueError names the first fault
    check_tensors(ckpt['weights'], 'weights')   # dense, on the CPU, finite
    check_optimizer(opt, saved)                 # that saved is a state of this optimizer

A file from elsewhere, or one that a disk has damaged, may say anything. What is asked here once, where
it is read, nobody has to ask again. What is there besides, a newer version has written: it may stay.
"""
import dataclasses
import math

import torch

from mambino.language_model import whole_shape
from mambino.plain import number, table, whole

DEEPEST = 16            # dicts and lists in one another
FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16
COUNT = 2**63 - 1       # the largest of a counter
STEP = dict(step=lambda v: whole(v, 0, COUNT), val_loss=lambda v: number(v) or v == math.inf)
# what must be there: {name: whether its value can be}
COUNTERS = dict(
    step=lambda v: whole(v, 0, COUNT), tokens_seen=lambda v: whole(v, 0, COUNT), best_loss=lambda v: type(v) is float,
    bad_evals=lambda v: whole(v, 0, COUNT), evaluated=lambda v: whole(v, -1, COUNT), seconds=number)
METADATA = dict(
    step=lambda v: whole(v, 0, COUNT), tokens_seen=lambda v: whole(v, 0, COUNT), seconds=number,
    device=lambda v: isinstance(v, str))
LORA = dict(
    rank=lambda v: whole(v, 1), alpha=lambda v: number(v) and v > 0, dropout=lambda v: number(v) and 0 <= v < 1,
    targets=lambda v: isinstance(v, str))
PREFIX = dict(length=lambda v: whole(v, 1))
DATA = dict(
    name=lambda v: isinstance(v, str), weight=number, train=lambda v: isinstance(v, str),
    val=lambda v: isinstance(v, str))
BASE = dict(
    base=lambda v: isinstance(v, str), base_at=lambda v: isinstance(v, str),
    base_fingerprint=lambda v: v is None or isinstance(v, str))
SCALER = dict.fromkeys(('scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker'), number)


def need(condition, fault):
    """ValueError, which names the fault, if the condition does not hold."""
    if not condition:
        raise ValueError(fault)


def need_fields(values, wanted, where):
    """ValueError unless `values` is a dict that has each of the `wanted`, {name: whether it can be}."""
    need(table(values), f'{where} is no dict of names')
    for name, can_be in wanted.items():
        need(name in values, f'{where}.{name} is missing')
        need(can_be(values[name]), f'{where}.{name} is {brief(values[name])}')


def brief(value):
    """A value in a few words."""
    if isinstance(value, torch.Tensor):
        return f'a tensor of {tuple(value.shape)}'
    return repr(value)[:60] if isinstance(value, (int, float, str, bool, type(None))) else f'a {type(value).__name__}'


# --- plain values ---------------------------------------------------------------------------------

def check_contents(ckpt, config_class):
    """ValueError if the plain values of a checkpoint are not as they must be. config_class: the
    dataclass of its kind of model."""
    check_nesting(ckpt)
    check_config(ckpt['config'], config_class)
    for part in ('weights', 'settings', 'counters', 'metadata'):
        need(table(ckpt[part]), f'{part} is no dict of names')
    settings, adapter = ckpt['settings'], ckpt.get('adapter')
    need(isinstance(settings.get('dataset'), str), 'settings.dataset is missing')
    for name, value in settings.items():
        need(isinstance(value, (str, bool, type(None))) or number(value) or value == math.inf,
             f'settings.{name} is {brief(value)}')
    need_fields(ckpt['counters'], COUNTERS, 'counters')
    need(not math.isnan(ckpt['counters']['best_loss']), 'counters.best_loss is nan')
    need_fields(ckpt['metadata'], METADATA, 'metadata')
    check_history(ckpt['counters'].get('history', []), 'counters.history')
    check_history(ckpt['metadata'].get('recent', []), 'metadata.recent')
    if ckpt['scaler']:
        need_fields(ckpt['scaler'], SCALER, 'scaler')
    check_optimizers(ckpt['optimizers'])
    check_tokenizer(ckpt['tokenizer'])
    if adapter:
        check_adapter(adapter)
    need(settings.get('model', ckpt['kind']) == ckpt['kind'], f'settings.model is {brief(settings.get("model"))}')
    need((settings.get('adapter') or '') == (adapter['type'] if adapter else ''),
         f'settings.adapter is {brief(settings.get("adapter"))}')
    if ckpt.get('data') is not None:
        parts = ckpt['data'].get('parts') if table(ckpt['data']) else None
        need(isinstance(parts, list), 'data has no parts')
        for part in parts:
            need_fields(part, DATA, 'data.parts')
    if ckpt.get('shards'):
        need(table(ckpt['shards']) and whole(ckpt['shards'].get('step', ckpt['shards'].get('world')), 0, COUNT),
             'shards has no step')


def check_nesting(value, where='it', depth=0):
    """ValueError if dicts and lists lie too deeply in one another: all else here may then recurse."""
    need(depth <= DEEPEST, f'{where} is nested too deeply')
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        return
    for part in value:
        if isinstance(part, (dict, list, tuple, set)):
            check_nesting(part, where, depth + 1)


def check_config(config, config_class):
    """ValueError if a dict has other than fields of a config, or values of other types than theirs."""
    need(table(config), 'config is no dict of names')
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, value in config.items():
        need(name in fields, f'config.{name} means nothing to this version')
        wanted = fields[name].type
        fits = number(value) if wanted is float else whole(value) if wanted is int else type(value) is wanted
        need(fits, f'config.{name} is {brief(value)}')
        need(name != 'norm_eps' or value > 0, f'config.{name} is {brief(value)}')
        need(name != 'rope_theta' or value >= 0, f'config.{name} is {brief(value)}')
    need(0 <= config.get('dropout', 0.0) < 1, f'config.dropout is {brief(config.get("dropout"))}')
    for name in ('vocab_size', 'block_size', 'n_layer', 'n_embd'):
        need(name in config, f'config.{name} is missing')


def check_history(records, where):
    """ValueError if these are no evaluations, dicts of numbers."""
    need(isinstance(records, list), f'{where} is no list')
    for record in records:
        need_fields(record, STEP, where)
        for name, value in record.items():
            need(value is None or type(value) in (int, float), f'{where}.{name} is {brief(value)}')


def check_optimizers(optimizers):
    """ValueError if these are no states of optimizers: {'state': {…}, 'param_groups': [{'params', …}]}."""
    need(isinstance(optimizers, list), 'optimizers is no list')
    for saved in optimizers:
        need(table(saved) and isinstance(saved.get('state'), dict), 'an optimizer has no state')
        groups = saved.get('param_groups')
        need(isinstance(groups, list), 'an optimizer has no param_groups')
        for group in groups:
            need(table(group) and isinstance(group.get('params'), list), 'a group of an optimizer has no params')
            need(all(whole(i, 0) for i in group['params']), 'params of an optimizer are no numbers of parameters')
        for i, state in saved['state'].items():
            need(whole(i, 0) and table(state), 'the state of an optimizer is no dict of numbers')


def check_tokenizer(state):
    """ValueError if this is no Tokenizer.state()."""
    if state is None:
        return
    need(table(state) and isinstance(state.get('json'), str), 'tokenizer has no json')
    need(state.get('eot') is None or whole(state['eot'], 0), f'tokenizer.eot is {brief(state.get("eot"))}')
    bos = state.get('bos', ())
    need(isinstance(bos, (list, tuple)) and all(whole(i, 0) for i in bos), f'tokenizer.bos is {brief(bos)}')
    need(table(state.get('config', {})), 'tokenizer.config is no dict of names')


def check_adapter(spec):
    """ValueError if this is not what a checkpoint says of its adapter."""
    need(table(spec), 'adapter is no dict of names')
    need(spec.get('type') in ('lora', 'prefix'), f'adapter.type is {brief(spec.get("type"))}')
    need_fields(spec, (LORA if spec['type'] == 'lora' else PREFIX) | BASE, 'adapter')


# --- tensors --------------------------------------------------------------------------------------

def check_tensors(tensors, where, floats=True, may_be=()):
    """ValueError if {name: tensor} has what is no plain tensor of finite numbers.

    floats: they are floating-point numbers; False: of any type. may_be: other types that a value
    may have, of which nothing is asked."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, may_be):
            check_tensor(tensor, f'{where}.{name}', floats)


def check_tensor(tensor, where, floats=True):
    """ValueError if this is no dense tensor on the CPU, of finite numbers, as large as its memory."""
    need(type(tensor) in (torch.Tensor, torch.nn.Parameter), f'{where} is {brief(tensor)}, no tensor')
    need(tensor.layout == torch.strided and tensor.device.type == 'cpu' and not tensor.is_quantized,
         f'{where} is not a dense tensor')
    need(tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes(), f'{where} claims more than it holds')
    if floats:
        need(tensor.dtype in FLOATS, f'{where} is of {tensor.dtype}')
    need(not tensor.dtype.is_complex, f'{where} is of {tensor.dtype}')
    if tensor.dtype in FLOATS and not is_finite(tensor):
        raise ValueError(f'{where} has numbers that are not finite')


def is_finite(tensor):
    """Whether all numbers are; most often one sum tells."""
    tensor = tensor.detach()
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def check_optimizer(optimizer, saved):
    """ValueError if this is no state of this optimizer: other groups, or tensors of other shapes."""
    groups, saved_groups = optimizer.param_groups, saved['param_groups']
    sizes = [len(group['params']) for group in groups]
    need(sizes == [len(group['params']) for group in saved_groups], 'an optimizer of other parameters')
    indices = [i for group in saved_groups for i in group['params']]
    need(len(set(indices)) == len(indices), 'an optimizer names a parameter twice')
    parameters = dict(zip(indices, (p for group in groups for p in group['params'])))
    wanted = {'momentum_buffer'} if isinstance(optimizer, torch.optim.Muon) else {'step', 'exp_avg', 'exp_avg_sq'}
    for i, state in saved['state'].items():
        need(i in parameters, f'an optimizer has a state of parameter {i}, which there is not')
        need(wanted <= state.keys(), f'optimizer.{i} has {", ".join(state)}, and not {", ".join(sorted(wanted))}')
        for name, value in state.items():
            if isinstance(value, str):                                      # in shards
                continue
            where = f'optimizer.{i}.{name}'
            if name == 'step':
                need(number(value) or (isinstance(value, torch.Tensor) and value.numel() == 1), f'{where} is no number')
            if isinstance(value, torch.Tensor):
                check_tensor(value, where)
                need(name == 'step' or value.shape == whole_shape(parameters[i]), f'{where} is {brief(value)}')
            else:
                need(name == 'step', f'{where} is {brief(value)}, no tensor')
