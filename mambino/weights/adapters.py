"""LoRA and prefix tuning: a finished model stays as it is, and a few numbers beside it learn the
new text.

    python train.py config/finetune_lora.py --init_from=out --dataset=mine --out_dir=out-mine
    python sample.py --out_dir=out-mine         # base and adapter together; or two adapters, weighted:
    python sample.py --out_dir=out --adapters=out-mine,out-other:0.5

LoRA (Hu et al. 2021) adds to a frozen matrix W a product of two thin ones, y = W x + (alpha / rank)
B A x. Prefix tuning (Li & Liang 2021) learns the state before the first token: keys and values of
so many tokens that never were, and in a Mamba the recurrence's and the convolution's first state.

    base weights ─► build ─► add_lora(net, …): linear.lora = {name: LoRA}
                          or add_prefix(net, …): net.initial_state: B ─► state
                               │
                  train.py moves the adapter alone ─► a checkpoint: its tensors, and where the base lies
                                                        │
                        merge_adapters(net) ◄─ attach_adapter(net, ckpt) ◄─ base weights

A LoRA hangs on its nn.Linear and a hook adds what it gives, so the base's parameters keep their
names. What a checkpoint says of its adapter, ckpt['adapter'], is called its spec here: type, rank,
targets, …, and of the base its name, its place and its fingerprint. to_peft and from_peft speak
peft's format.

Letters of the shapes: B batch, K key/value heads, P head size, n length of the prefix, r rank.
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.blocks import fills_holes
from mambino.configurator import fail
from mambino.weights import checkpoint, peft_scales, quantize
from model_mamba import exact

# of train.py, that make an adapter
SETTINGS = 'adapter', 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets', 'prefix_length'

LONGEST_PREFIX = 1 << 16        # where no keys tell: its first state is computed anew
# Without a LoRA if no targets are named: keys gain the least (Hu et al., table 5); peft refuses
# out_proj in a Mamba; and transformers multiplies by dt_proj's matrix itself, so that it would not
# see one there.
LEFT_OUT = {'k_proj', 'out_proj', 'dt_proj'}


# --- LoRA -----------------------------------------------------------------------------------------

class LoRA(nn.Module):
    """(alpha / rank) B A x, the change to a matrix (out, in). x (…, in) → (…, out)."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__()
        weight = linear.weight                                          # of a quantised one it is computed
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        # zeros, so the model begins as the base
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))                # as peft
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, x):
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.A) * self.scale, self.B)


def add_loras(linear, args, out):
    """The hook of a linear that has LoRAs: adds what they give to what it gave."""
    for lora in linear.lora.values():
        out = out + lora(args[0]).to(out.dtype)
    return out


def adaptable(net):
    """{path: linear} of the matrices a LoRA may change: all that the layers call as modules."""
    return {
        path: module for path, module in net.named_modules()
        if isinstance(module, (nn.Linear, quantize.Linear))
        and '.layers.' in path and not why_not(net, path)
    }


def why_not(net, name):
    """Why what has this path, or this last name, can have no LoRA; None if nothing speaks against
    it."""
    last = name.split('.')[-1]
    if last == 'lm_head':
        return 'the loss reads its matrix by itself, and it may be the embedding too'
    if last in ('embed_tokens', 'embeddings'):
        return 'an embedding is a look-up, no product'
    if getattr(net.config, 'n_expert', 0):
        if last in ('gate', 'mlp'):
            return 'a small change of the router sends tokens to other experts'
        if last in ('experts', 'gate_proj', 'up_proj', 'down_proj', 'gate_up_proj'):
            return 'experts are stacks of matrices; peft has no format for a LoRA on them'
    return None


def find_targets(net, targets):
    """{path: linear} of the targets, names as in 'q_proj,v_proj' or ends of paths; '' is each
    *_proj of the layers, save LEFT_OUT. ValueError if one of them is not there or cannot be."""
    linears = adaptable(net)
    names = [name.strip() for name in targets.split(',') if name.strip()]
    if not names:
        return {path: linear for path, linear in linears.items()
                if '_proj' in path and LEFT_OUT.isdisjoint(path.split('.'))}
    for name in names:
        if not any(matches(path, name) for path in linears):
            reason = why_not(net, name)
            there = ', '.join(sorted({short_name(path) for path in linears}))
            raise ValueError(
                f'lora_targets: {name} takes no LoRA ({reason}); choose {there}' if reason else
                f'lora_targets: {name} is no matrix of this model; it has {there}')
    return {path: linear for path, linear in linears.items()
            if any(matches(path, name) for name in names)}


def matches(path, name):
    """Whether a path is this one, or ends in it."""
    return path == name or path.endswith('.' + name)


def short_name(path):
    """A matrix's name: q_proj; of a low-rank model q_proj.up."""
    parts = path.split('.')
    return '.'.join(parts[-2:] if parts[-1] in ('up', 'down') else parts[-1:])


def add_lora(net, targets='', rank=8, alpha=16.0, dropout=0.0, name='default'):
    """Hangs a LoRA on each target; from then on they alone are trained. Returns the model.

    ValueError as find_targets, or if there is one of this name, or the rank is none that a change
    of these matrices can have."""
    if rank > net.config.n_embd:
        raise ValueError(f'lora_rank={rank} is more than the width of the model, {net.config.n_embd}: lower it')
    for linear in find_targets(net, targets).values():
        if not hasattr(linear, 'lora'):
            linear.lora = nn.ModuleDict()
            linear.lora_hook = linear.register_forward_hook(add_loras)
        if name in linear.lora:
            raise ValueError(f'an adapter with the name {name} is already attached')
        linear.lora[name] = LoRA(linear, rank, alpha, dropout).train(net.training)
    freeze_base(net)
    return net


def freeze_base(net):
    """Leaves to the optimizer what belongs to adapters."""
    for name, p in net.named_parameters():
        p.requires_grad_(is_adapter(name))


def is_adapter(name):
    """Whether a parameter of this name belongs to an adapter."""
    return '.lora.' in name or name.startswith('prefix.')


def with_lora(net):
    """{path: linear} of those that have LoRAs."""
    return {path: module for path, module in net.named_modules() if hasattr(module, 'lora')}


# --- prefix tuning --------------------------------------------------------------------------------

class Prefix(nn.Module):
    """B → the state before the first token of B sequences, as LanguageModel.step has it, of
    parameters with B = 1."""

    def __init__(self, state, length, config):
        super().__init__()
        self.length = length
        self.config = config
        self.state = nn.ModuleDict()
        for name, value in state.items():               # k.3 (1, K, n, P), v.3, conv.3, ssm.3
            kind, layer = name.split('.')
            if kind not in self.state:
                self.state[kind] = nn.ParameterDict()
            self.state[kind][layer] = nn.Parameter(value)

    def forward(self, B):
        window = getattr(self.config, 'window', 0)
        state = {'pos': torch.full((B,), self.length)}
        for kind, layers in self.state.items():
            for layer, value in layers.items():
                value = value.repeat(B, *[1] * (value.ndim - 1))    # a copy: steps write into caches
                if kind == 'turn':
                    value = exact(value)                # as a step leaves it
                if kind in 'kv' and window:             # a ring; beyond the prefix it is still empty
                    value = F.pad(value, (0, 0, 0, window - self.length))
                state[f'{kind}.{layer}'] = value
        return state


def add_prefix(net, length=16, ids=None):
    """Gives the model a learned beginning, which alone is trained from then on: at first the state
    after the first `length` of ids (int64), or of random ones. Returns the model.

    ValueError if there is one already, or it is longer than what attention sees."""
    config = net.config
    longest = getattr(config, 'window', 0) or config.block_size
    if net.initial_state:
        raise ValueError('two prefixes cannot be attached: a model has one beginning')
    if not 1 <= length <= longest:
        raise ValueError(f'prefix_length={length} must be from 1 to {longest}, which is as far as '
                         'attention sees')
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (length,), generator=generator)
    ids = ids[None, :length].to(net.lm_head.weight.device)              # (1, n)
    training = net.training
    state = net.eval().hidden_states(ids, {'pos': torch.zeros(1, dtype=torch.long)})[1]
    net.train(training)
    del state['pos']
    for name, value in state.items():
        if name[0] in 'kv':
            value = value[:, :, :length]                                # caches have room for more
        state[name] = value.detach().float().clone()
    net.prefix = Prefix(state, length, config)
    net.initial_state = net.prefix.forward
    freeze_base(net)
    return net


# --- adapters in training -------------------------------------------------------------------------

def check_settings(settings, base):
    """Ends the program in a line where train.py's settings do not go with an adapter."""
    if not base:
        fail(f'adapter={settings["adapter"]} needs a model to stand beside: --init_from=its out_dir, '
             'or hf: and a folder of transformers')
    if settings['parallel'] == 'fsdp':
        fail('parallel=fsdp shares weights and gradients among processes, and of an adapter there is '
             'little to share: leave it out')
    if settings['optimizer'] == 'muon':
        fail('optimizer=muon makes all singular values of an update equal, which is not for the thin '
             'matrices of an adapter: leave it out')
    if settings['adapter'] == 'prefix' and fills_holes(base['config']):
        fail('adapter=prefix is a state before the first token, and this model fills holes in windows that begin '
             'anywhere: take --adapter=lora')
    if settings['adapter'] == 'prefix' and settings['gradient_checkpointing']:
        fail('gradient_checkpointing computes layers twice, which caches of a prefix do not allow: '
             'leave it out, or lower --batch_size')


def begin_adapter(net, settings, source, ckpt, base, ids):
    """Puts an adapter on a model that has the base's weights: that of a run, or else of train.py's
    settings, on the base from `source`. ids: a text for a prefix to begin with. Returns the
    adapter's spec."""
    scheme = 'hf:' if source.startswith('hf:') else ''
    base_place = dict(base=source, base_at=scheme + os.path.abspath(source.removeprefix(scheme)))
    try:
        if ckpt:
            attach_adapter(net, ckpt)
            moved = source not in ('auto', 'resume', 'scratch')
            return ckpt['adapter'] | (base_place if moved else {})
        spec = spec_of(settings)
        add_adapter(net, spec, ids=ids)
    except ValueError as error:
        fail(error)
    return spec | base_place | dict(base_fingerprint=checkpoint.fingerprint(base['weights']))


def spec_of(settings):
    """What train.py's settings say of an adapter, as a checkpoint keeps it."""
    if settings['adapter'] == 'prefix':
        return dict(type='prefix', length=settings['prefix_length'])
    lora = {name: settings[f'lora_{name}'] for name in ('targets', 'rank', 'alpha', 'dropout')}
    return dict(type='lora', **lora)


class AdapterState:
    """An adapter in training, as something whose state a checkpoint takes in the place of the
    model's."""

    def __init__(self, net, spec):
        self.weights = adapter_state(net, 'prefix' if spec['type'] == 'prefix' else 'default')

    def state_dict(self, **_):
        return self.weights


def describe_adapter(net, spec):
    """A line on an adapter in training."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    total = net.num_params()
    if spec['type'] == 'lora':
        linears = with_lora(net)
        names = ', '.join(dict.fromkeys(short_name(path) for path in linears))
        adapter = f'LoRA of rank {spec["rank"]} on {len(linears)} matrices ({names})'
    else:
        adapter = f'a prefix of {spec["length"]} tokens ({", ".join(net.prefix.state)})'
    return (f'{adapter}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%}); '
            f'the rest is {spec["base"]}\'s')


def flops_saved(net):
    """Operations a token that training does not need, since it computes no gradient of frozen
    matrices."""
    frozen = [module.weight for module in net.modules()
              if isinstance(module, nn.Linear) and not module.weight.requires_grad]
    return sum(2 * weight.numel() for weight in frozen)


# --- adapters of a checkpoint ---------------------------------------------------------------------

def add_adapter(net, spec, name='default', ids=None):
    """An adapter as a checkpoint describes it, still untrained. ValueError as add_lora and
    add_prefix."""
    if spec['type'] == 'lora':
        return add_lora(net, spec['targets'], spec['rank'], spec['alpha'], spec['dropout'], name)
    return add_prefix(net, spec['length'], ids)


def attach_adapter(net, ckpt, weight=1.0, name=''):
    """Adds the adapter of a checkpoint to a model of its base, in place; returns the model. LoRAs
    add up, each times its weight. ValueError if it was made for another base, or does not go with
    what is attached already."""
    if ckpt.get('is_peft'):
        ckpt = peft_scales.to_ours(net, ckpt)
    spec = ckpt['adapter']
    wanted_base = spec['base_fingerprint']
    actual_base = base_fingerprint(net)
    if wanted_base and actual_base and wanted_base != actual_base:
        raise ValueError(f'this adapter was made for another base model, that of {spec["base"]}')
    if not math.isfinite(weight):
        raise ValueError(f'{weight} is no weight of an adapter')
    if spec['type'] == 'prefix':
        name = 'prefix'
        kept = {tensor.shape[2] for key, tensor in ckpt['weights'].items() if key[:9] in ('prefix.k.', 'prefix.v.')
                and tensor.ndim == 4}
        if spec['length'] > (max(kept) if kept else LONGEST_PREFIX):
            raise ValueError(f'length={spec["length"]} is not that of its tensors')
        if weight != 1:
            raise ValueError('a prefix is there or not; it has no weight')
    elif not name:
        count = len({lora for linear in with_lora(net).values() for lora in linear.lora})
        name = f'adapter{count}' if count else 'default'

    add_adapter(net, spec, name)
    copy_weights(adapter_parameters(net, name), ckpt['weights'])
    if spec['type'] == 'lora':
        for linear in with_lora(net).values():
            if name in linear.lora:
                linear.lora[name].scale *= weight
    return net


@torch.no_grad()
def copy_weights(parameters, weights):
    """Fills parameters, {name: parameter}, with tensors of the same names. ValueError if they are
    not the same."""
    if parameters.keys() != weights.keys():
        odd = min(parameters.keys() ^ weights.keys())
        raise ValueError(f'this adapter does not fit the model: {odd}')
    if any(p.shape != weights[name].shape for name, p in parameters.items()):
        raise ValueError(f'this adapter does not fit the model: {min(parameters)}')
    for name, p in parameters.items():
        p.copy_(weights[name])


def base_fingerprint(net):
    """Of the base under the adapters; None if it is rounded or quantised, and nobody can tell any
    more."""
    weights = {name: w for name, w in net.state_dict().items() if not is_adapter(name)}
    if any(w.dtype != torch.float32 for w in weights.values()):
        return None
    return checkpoint.fingerprint(weights)


def adapter_parameters(net, name='default'):
    """{name in a checkpoint: parameter} of the LoRAs of this name, ….q_proj.lora_A.weight as in
    peft, or of the prefix, prefix.k.0."""
    parameters = {}
    for path, p in net.named_parameters():
        if name == 'prefix' and path.startswith('prefix.'):
            parameters[path.replace('prefix.state.', 'prefix.')] = p
        elif f'.lora.{name}.' in path:
            parameters[path.replace(f'.lora.{name}.', '.lora_') + '.weight'] = p
    return parameters


def adapter_state(net, name):
    """An adapter's tensors, what of a model a checkpoint needs beside its base."""
    return {key: p.detach() for key, p in adapter_parameters(net, name).items()}


@torch.no_grad()
def merge_adapters(net):
    """Adds the LoRAs to the matrices they hang on, in place, and takes them away; returns the
    model. ValueError if it has a prefix."""
    if net.initial_state:
        raise ValueError('a prefix is a state, not a change of the weights, so it cannot be merged into '
                         'them; use the adapter as it is, or tune with --adapter=lora')
    for path, linear in with_lora(net).items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(f'{path} is quantised: merge first, then quantise')
        for lora in linear.lora.values():
            # in fp64, rounded alike on all machines: a base has a fingerprint
            change = lora.scale * (lora.B.double() @ lora.A.double())
            linear.weight += change.to(linear.weight.dtype)
        linear.lora_hook.remove()
        del linear.lora, linear.lora_hook
    for p in net.parameters():
        p.requires_grad_(True)
    return net
