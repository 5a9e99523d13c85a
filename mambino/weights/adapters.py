"""LoRA and prefix tuning: a finished model stays as it is, and a few numbers beside it learn the new text.

    python train.py config/finetune_lora.py --init_from=out --dataset=mine --out_dir=out-mine
    python sample.py --out_dir=out-mine             # base and adapter together; or --out_dir=out --adapters=out-mine,out-other:0.5

LoRA (Hu et al. 2021) adds to a frozen matrix W a product of two thin ones, y = W x + (alpha / rank) B A x. Prefix tuning (Li & Liang
2021) learns the state before the first token: keys and values of so many tokens that never were, and in a Mamba the recurrence's and the
convolution's first state.

    base weights ─► build ─► lora(net, …) or prefix(net, …) ─► train.py moves the adapter alone ─► its tensors, and where the base lies
                               linear.lora: {name: LoRA}       net.initial: B ─► state             ─► attach(net, ckpt) ─► merge(net)

A LoRA hangs on its nn.Linear and a hook adds what it gives, so the base's parameters keep their names. to_peft and from_peft
speak peft's format. Letters of the shapes: B batch, T time, K key/value heads, P head size, S cache slots, n length of the prefix, r rank.
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.weights import checkpoint
from mambino.weights import quantize
from mambino.configurator import fail

SETTINGS = 'adapter', 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets', 'prefix_length'    # of train.py, that make an adapter
# Without a LoRA if no targets are named: keys gain the least (Hu et al., table 5); peft refuses out_proj in a Mamba; and transformers
# multiplies by dt_proj's matrix itself, so that it would not see one there.
LEFT_OUT = {'k_proj', 'out_proj', 'dt_proj'}


# --- LoRA -------------------------------------------------------------------------------------------------------------

class LoRA(nn.Module):
    """scale * B A x, the change to a matrix (out, in). x (…, in) → (…, out)."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__()
        weight = linear.weight                                                  # of a quantised one it is computed
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))  # so the model begins as the base
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))                        # as peft
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x):
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(F.linear(x, self.A) * self.scale, self.B)


def add_loras(linear, args, out):
    """The hook of a linear that has LoRAs."""
    for lora in linear.lora.values():
        out = out + lora(args[0]).to(out.dtype)
    return out


def linears(net):
    """{path: module} of the matrices a LoRA may change: all that the layers call as modules."""
    return {path: module for path, module in net.named_modules()
            if isinstance(module, (nn.Linear, quantize.Linear)) and '.layers.' in path and not refusal(net, path)}


def refusal(net, name):
    """Why what has this path, or this last name, can have no LoRA; None if that is not known of it."""
    last = name.split('.')[-1]
    if last == 'lm_head':
        return 'the loss reads its matrix by itself, and it may be the embedding too'
    if last in ('embed_tokens', 'embeddings'):
        return 'an embedding is a look-up, no product'
    if getattr(net.config, 'n_expert', 0) and last in ('gate', 'mlp'):
        return 'a small change of the router sends tokens to other experts'
    if getattr(net.config, 'n_expert', 0) and last in ('experts', 'gate_proj', 'up_proj', 'down_proj', 'gate_up_proj'):
        return 'experts are stacks of matrices; peft has no format for a LoRA on them'


def chosen(net, targets):
    """{path: linear} of the targets, names as in 'q_proj,v_proj' or ends of paths; '' is each *_proj of the layers, save
    LEFT_OUT. ValueError if one of them is not there or cannot be."""
    found = linears(net)
    wanted = [name.strip() for name in targets.split(',') if name.strip()]
    if not wanted:
        return {path: module for path, module in found.items() if '_proj' in path and LEFT_OUT.isdisjoint(path.split('.'))}
    for name in wanted:
        if not any(matches(path, name) for path in found):
            why = refusal(net, name)
            names = sorted({short(path) for path in found})
            raise ValueError(f'lora_targets: {name} ' + (f'takes no LoRA ({why}); choose' if why else 'is no matrix of this model; it has')
                             + f' {", ".join(names)}')
    return {path: module for path, module in found.items() if any(matches(path, name) for name in wanted)}


def matches(path, name):
    return path == name or path.endswith('.' + name)


def short(path):
    """A matrix's name: q_proj; of a low-rank model q_proj.up."""
    parts = path.split('.')
    return '.'.join(parts[-2:] if parts[-1] in ('up', 'down') else parts[-1:])


def lora(net, targets='', rank=8, alpha=16.0, dropout=0.0, name='default'):
    """Hangs a LoRA on each target; from then on they alone are trained. ValueError as `chosen`, or if there is one of this name, or the
    rank is none that a change of these matrices can have."""
    if rank > net.config.n_embd:
        raise ValueError(f'lora_rank={rank} is more than the width of the model, {net.config.n_embd}: lower it')
    for path, linear in chosen(net, targets).items():
        if not hasattr(linear, 'lora'):
            linear.lora = nn.ModuleDict()
            linear.lora_hook = linear.register_forward_hook(add_loras)
        if name in linear.lora:
            raise ValueError(f'an adapter with the name {name} is already attached')
        linear.lora[name] = LoRA(linear, rank, alpha, dropout).train(net.training)
    freeze(net)
    return net


def freeze(net):
    """Leaves to the optimizer what belongs to adapters."""
    for name, p in net.named_parameters():
        p.requires_grad_(is_adapter(name))


def is_adapter(name):
    return '.lora.' in name or name.startswith('prefix.')


# --- prefix tuning ----------------------------------------------------------------------------------------------------

class Prefix(nn.Module):
    """B → the state before the first token of B sequences, as LanguageModel.step has it, of parameters with B = 1."""

    def __init__(self, state, length, config):
        super().__init__()
        self.length, self.config = length, config
        self.state = nn.ModuleDict()
        for name, value in state.items():                                       # k.3 (1, K, n, P), v.3, conv.3, ssm.3
            kind, layer = name.split('.')
            if kind not in self.state:
                self.state[kind] = nn.ParameterDict()
            self.state[kind][layer] = nn.Parameter(value)

    def forward(self, B):
        out, window = {'pos': torch.full((B,), self.length)}, getattr(self.config, 'window', 0)
        for kind, layers in self.state.items():
            for layer, value in layers.items():
                value = value.repeat(B, *[1] * (value.ndim - 1))                # a copy: steps write into caches
                if kind in 'kv' and window:                                     # a ring; beyond the prefix it is still empty
                    value = F.pad(value, (0, 0, 0, window - self.length))
                out[f'{kind}.{layer}'] = value
        return out


def prefix(net, length=16, ids=None):
    """Gives the model a learned beginning, which alone is trained from then on: at first the state after `length` ids (int64), else random
    ones. ValueError if there is one already, or it is longer than what attention sees."""
    config = net.config
    longest = getattr(config, 'window', 0) or config.block_size
    if net.initial:
        raise ValueError('two prefixes cannot be attached: a model has one beginning')
    if not 1 <= length <= longest:
        raise ValueError(f'prefix_length={length} must be from 1 to {longest}, which is as far as attention sees')
    if ids is None:
        ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    training = net.training
    state = net.eval().body(ids[None, :length].to(net.lm_head.weight.device), {'pos': torch.zeros(1, dtype=torch.long)})[1]
    net.train(training)
    state = {name: (value[:, :, :length] if name[0] in 'kv' else value).detach().float().clone()
             for name, value in state.items() if name != 'pos'}
    net.prefix = Prefix(state, length, config)
    net.initial = net.prefix.forward
    freeze(net)
    return net


# --- adapters of a checkpoint -----------------------------------------------------------------------------------------

def require(settings, base):
    """Ends the program in a line where train.py's settings do not go with an adapter."""
    if not base:
        fail(f'adapter={settings["adapter"]} needs a model to stand beside: --init_from=its out_dir, or hf: and a folder of transformers')
    if settings['parallel'] == 'fsdp':
        fail('parallel=fsdp shares weights and gradients among processes, and of an adapter there is little to share: leave it out')
    if settings['optimizer'] == 'muon':
        fail('optimizer=muon makes all singular values of an update equal, which is not for the thin matrices of an adapter: leave it out')
    if settings['adapter'] == 'prefix' and settings['gradient_checkpointing']:
        fail('gradient_checkpointing computes layers twice, which caches of a prefix do not allow: leave it out, or lower --batch_size')


def begin(net, settings, source, ckpt, base, ids):
    """Puts an adapter on a model that has the base's weights: that of a run, or else of train.py's settings, on the base from `source`.
    ids: a text for a prefix to begin with. Returns what the checkpoint says of the adapter."""
    kind = 'hf:' if source.startswith('hf:') else ''
    place = dict(base=source, base_at=kind + os.path.abspath(source.removeprefix(kind)))
    try:
        if ckpt:
            attach(net, ckpt)
            return ckpt['adapter'] | ({} if source in ('auto', 'resume', 'scratch') else place)
        how = dict(type='prefix', length=settings['prefix_length']) if settings['adapter'] == 'prefix' else dict(
            type='lora', **{name: settings[f'lora_{name}'] for name in ('targets', 'rank', 'alpha', 'dropout')})
        add(net, how, ids=ids)
    except ValueError as error:
        fail(error)
    return how | place | dict(base_fingerprint=checkpoint.fingerprint(base['weights']))


class Part:
    """An adapter in training, as something whose state a checkpoint takes in the place of the model's."""

    def __init__(self, net, how):
        self.weights = state(net, 'prefix' if how['type'] == 'prefix' else 'default')

    def state_dict(self, **_):
        return self.weights


def add(net, how, name='default', ids=None):
    """An adapter as a checkpoint describes it, still untrained. ValueError as `lora` and `prefix`."""
    if how['type'] == 'lora':
        return lora(net, how['targets'], how['rank'], how['alpha'], how['dropout'], name)
    return prefix(net, how['length'], ids)


def attach(net, ckpt, weight=1.0, name=''):
    """Adds the adapter of a checkpoint to a model of its base, in place; returns the model. LoRAs add up, each times its weight. ValueError
    if it was made for another base, or does not go with what is attached already."""
    how, weights = ckpt['adapter'], ckpt['weights']
    made_for, is_now = how['base_fingerprint'], fingerprint(net)
    if made_for and is_now and made_for != is_now:
        raise ValueError(f'this adapter was made for another base model, that of {how["base"]}')
    if not math.isfinite(weight):
        raise ValueError(f'{weight} is no weight of an adapter')
    if how['type'] == 'prefix' and weight != 1:
        raise ValueError('a prefix is there or not; it has no weight')
    count = len({name for linear in with_lora(net).values() for name in linear.lora})
    name = 'prefix' if how['type'] == 'prefix' else name or (f'adapter{count}' if count else 'default')
    add(net, how, name)
    own = parameters(net, name)
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        odd = min(own.keys() ^ weights.keys() or own.keys())
        raise ValueError(f'this adapter does not fit the model: {odd}')
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(weights[key])
    if how['type'] == 'lora':
        for linear in with_lora(net).values():
            if name in linear.lora:
                linear.lora[name].scale *= weight
    return net


def with_lora(net):
    """{path: linear} of those that have LoRAs."""
    return {path: module for path, module in net.named_modules() if hasattr(module, 'lora')}


def fingerprint(net):
    """Of the base under the adapters; None if it is rounded or quantised, and nobody can tell any more."""
    weights = {name: w for name, w in net.state_dict().items() if not is_adapter(name)}
    return checkpoint.fingerprint(weights) if all(w.dtype == torch.float32 for w in weights.values()) else None


def parameters(net, name='default'):
    """{name in a checkpoint: parameter} of the LoRAs of this name, ….q_proj.lora_A.weight as in peft, or of the prefix, prefix.k.0."""
    found = {}
    for path, p in net.named_parameters():
        if name == 'prefix' and path.startswith('prefix.'):
            found[path.replace('prefix.state.', 'prefix.')] = p
        elif f'.lora.{name}.' in path:
            found[path.replace(f'.lora.{name}.', '.lora_') + '.weight'] = p
    return found


def state(net, name):
    """An adapter's tensors, what of a model a checkpoint needs beside its base."""
    return {key: p.detach() for key, p in parameters(net, name).items()}


@torch.no_grad()
def merge(net):
    """Adds the LoRAs to the matrices they hang on, in place, and takes them away; returns the model. ValueError if it has a prefix."""
    if net.initial:
        raise ValueError('a prefix is a state, not a change of the weights, so it cannot be merged into them; use the adapter as it is, or '
                         'tune with --adapter=lora')
    for path, linear in with_lora(net).items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(f'{path} is quantised: merge first, then quantise')
        for part in linear.lora.values():
            change = part.scale * (part.B.double() @ part.A.double())           # rounded alike on all machines: a base has a fingerprint
            linear.weight += change.to(linear.weight.dtype)
        linear.lora_hook.remove()
        del linear.lora, linear.lora_hook
    for p in net.parameters():
        p.requires_grad_(True)
    return net


def describe_adapter(net, how):
    """A line on an adapter in training."""
    own, all_of_them = sum(p.numel() for p in net.parameters() if p.requires_grad), net.num_params()
    if how['type'] == 'lora':
        kinds = list(dict.fromkeys(short(path) for path in with_lora(net)))
        what = f'LoRA of rank {how["rank"]} on {len(with_lora(net))} matrices ({", ".join(kinds)})'
    else:
        what = f'a prefix of {how["length"]} tokens (' + ', '.join(net.prefix.state) + ')'
    return f'{what}: {own:,} of {all_of_them:,} parameters are trained ({own / all_of_them:.2%}); the rest is {how["base"]}\'s'


def flops_saved(net):
    """Operations a token that training does not need, since it computes no gradient of frozen matrices."""
    return sum(2 * module.weight.numel() for module in net.modules() if isinstance(module, nn.Linear) and not module.weight.requires_grad)
