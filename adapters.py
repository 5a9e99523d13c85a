"""LoRA and prefix tuning: a finished model stays as it is, and a few numbers beside it learn the new text.

    python train.py config/finetune_lora.py --init_from=out --dataset=mine --out_dir=out-mine
    python sample.py --out_dir=out-mine             # base and adapter together; or --out_dir=out --adapters=out-mine,out-other:0.5

LoRA (Hu et al. 2021) adds to a frozen matrix W a product of two thin ones, y = W x + (alpha / rank) B A x. Prefix tuning (Li & Liang
2021) learns the state before the first token: keys and values of so many tokens that never were, and in a Mamba the recurrence's and the
convolution's first state.

    base weights ─► build ─► lora(net, …) or prefix(net, …) ─► train.py moves the adapter alone ─► its tensors, and where the base lies
                               linear.lora: {name: LoRA}       net.initial: B ─► state             ─► attach(net, ckpt) ─► merge(net)

A LoRA hangs on its nn.Linear and a hook adds what it gives, so the base's parameters keep their names. write_peft and read_peft speak
peft's format. Letters of the shapes: B batch, T time, K key/value heads, P head size, S cache slots, n length of the prefix, r rank.
"""
import json
import math
import os
import tempfile

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import hf
import quantize
from configurator import fail

SETTINGS = 'adapter', 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets', 'prefix_length'    # of train.py, that make an adapter
# Without a LoRA if no targets are named: keys gain the least (Hu et al., table 5); peft refuses out_proj in a Mamba; and transformers
# multiplies by dt_proj's matrix itself, so that it would not see one there.
LEFT_OUT = {'k_proj', 'out_proj', 'dt_proj'}
PLAIN = {           # what peft says of a LoRA, and has here its meaning, or none
    'task_type', 'peft_type', 'auto_mapping', 'peft_version', 'base_model_name_or_path', 'revision', 'inference_mode', 'r', 'target_modules',
    'exclude_modules', 'lora_alpha', 'lora_dropout', 'fan_in_fan_out', 'bias', 'use_rslora', 'init_lora_weights', 'layers_to_transform',
    'layers_pattern', 'megatron_core', 'qalora_group_size', 'eva_config', 'ensure_weight_tying'}
UNCHANGED = (True, False, None, 'gaussian', 'orthogonal', 'eva')    # ways to begin a LoRA that leave the base as it is


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


def base_of(ckpt, source=''):
    """The base of an adapter's checkpoint, as checkpoint.load_model gives it: at `source`, else where it was in training."""
    how = ckpt['adapter']
    places = [source] if source else list(dict.fromkeys((how['base'], how['base_at'])))
    found = [place for place in places if os.path.exists(place.removeprefix('hf:'))]
    for place in found:
        base = checkpoint.load_model(place)
        if checkpoint.fingerprint(base['weights']) == how['base_fingerprint']:
            return base
    if found:
        fail(f'{found[-1]}: has other weights than the base of this adapter had, which was made for them; put those back, or train it anew')
    fail(f'{places[-1]}: the base model of this adapter is not there any more; put it back, or say where it is: in training by '
         '--init_from=its out_dir, else by --out_dir=its out_dir --adapters=the adapter\'s')


def model_of(ckpt, base=None):
    """The model of an adapter's checkpoint: its base, and the adapter attached. base: if it is loaded already."""
    base = base or base_of(ckpt)
    net = checkpoint.build(ckpt['kind'], ckpt['config'])
    net.load_state_dict(base['weights'])
    return attach(net, ckpt)


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


def merged_weights(ckpt, source):
    """The weights of an adapter's checkpoint, its base's with the adapter in them; a prefix ends the program in a line."""
    try:
        return merge(checkpoint.model_of(ckpt)).state_dict()
    except ValueError as error:
        fail(f'{source}: {error}')


def describe(net, how):
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


# --- peft's format ----------------------------------------------------------------------------------------------------

def write_peft(ckpt, folder, base_folder):
    """Writes an adapter's checkpoint as adapter_config.json and adapter_model.safetensors of peft, which finds the base, as transformers
    saves it, in base_folder. ValueError if peft cannot have it."""
    how, config = ckpt['adapter'], ckpt['config']
    if ckpt['kind'] == 'hybrid':
        raise ValueError('transformers has no model with a hybrid\'s names, so peft cannot load its adapter: export the merged model')
    common = dict(task_type='CAUSAL_LM', base_model_name_or_path=str(base_folder), inference_mode=True)
    if how['type'] == 'prefix':
        if ckpt['kind'] == 'mamba':
            raise ValueError('peft has no format for a Mamba\'s prefix, a learned first state: use it with sample.py, or tune with '
                             '--adapter=lora')
        width = config['n_kv_head'] * config['head_dim']
        common |= dict(peft_type='PREFIX_TUNING', num_virtual_tokens=how['length'], token_dim=width, num_transformer_submodules=1,
                       num_attention_heads=config['n_kv_head'], num_layers=config['n_layer'], encoder_hidden_size=width,
                       prefix_projection=False)
        layers = [ckpt['weights'][f'prefix.{kind}.{i}'][0] for i in range(config['n_layer']) for kind in 'kv']  # (K, n, P) each
        tensors = {'prompt_embeddings': torch.stack(layers).permute(2, 0, 1, 3).flatten(1)}                     # (n, 2 layers K P)
    else:
        paths = {key.rpartition('.lora_')[0] for key in ckpt['weights']}
        for name, why in (('out_proj', 'peft refuses a LoRA on'), ('dt_proj', 'transformers would not see a LoRA on')):
            if ckpt['kind'] == 'mamba' and any(path.endswith(name) for path in paths):
                raise ValueError(f'{why} the {name} of a Mamba: export the merged model, or leave it out of --lora_targets')
        targets = [name.strip() for name in how['targets'].split(',') if name.strip()] or sorted({short(path) for path in paths})
        common |= dict(peft_type='LORA', r=how['rank'], lora_alpha=how['alpha'], lora_dropout=how['dropout'], target_modules=targets,
                       bias='none', fan_in_fan_out=False)
        tensors = {'base_model.model.' + key: value for key, value in ckpt['weights'].items()}
    from to_hf import save_safetensors                                          # which by others imports this file
    save_safetensors(os.path.join(folder, 'adapter_model.safetensors'), tensors, {'format': 'pt'})
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(common, f, indent=2, sort_keys=True)


@torch.no_grad()
def verify_peft(ckpt, net, folder):
    """Opens what write_peft wrote by peft, on the base as transformers has it → {'tool', 'logits', 'limit', 'ok', 'note'}. net: the model
    with the adapter."""
    import peft
    import transformers

    import to_hf
    transformers.utils.logging.disable_progress_bar()
    base = checkpoint.build(ckpt['kind'], ckpt['config']).eval()
    base.load_state_dict(base_of(ckpt)['weights'])
    with tempfile.TemporaryDirectory() as place:
        to_hf.write(base, None, place)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    idx = torch.randint(base.config.vocab_size, (2, min(48, base.config.block_size)), generator=torch.Generator().manual_seed(0))
    found = (net(idx)[0] - theirs(idx).logits).abs().max().item()
    return dict(tool=f'peft {peft.__version__}', logits=found, limit=1e-4, ok=found <= 1e-4, note='')


def load(path):
    """What `attach` takes: an adapter's checkpoint, or what peft saved in a folder. Ends the program in a line if that cannot be read."""
    if not os.path.exists(os.path.join(path, 'adapter_config.json')):
        return checkpoint.load(path)
    try:
        return read_peft(path)
    except OSError as error:
        fail(f'{error.filename}: {error.strerror}; an adapter of peft is adapter_config.json and adapter_model.safetensors')
    except ValueError as error:
        fail(f'{path}: {error}')
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        fail(f'{path}: not a sound adapter of peft ({type(error).__name__}: {error})')


def read_peft(folder):
    """An adapter that peft saved, as `attach` takes it: {'adapter', 'weights'}. ValueError if it is of another kind than those here."""
    with open(os.path.join(folder, 'adapter_config.json'), encoding='utf-8') as f:
        theirs = json.load(f)
    tensors = dict(hf.read_safetensors(os.path.join(folder, 'adapter_model.safetensors')))
    base = dict(base=theirs.get('base_model_name_or_path') or '', base_at='', base_fingerprint=None)
    kind = theirs.get('peft_type')
    if kind == 'PREFIX_TUNING' and not theirs.get('prefix_projection'):
        n, K = theirs['num_virtual_tokens'], theirs['num_attention_heads']
        parts = tensors['prompt_embeddings'].view(n, theirs['num_layers'], 2, K, theirs['token_dim'] // K).permute(1, 2, 3, 0, 4)
        weights = {f'prefix.{name}.{i}': part[None].clone() for i, pair in enumerate(parts) for name, part in zip('kv', pair)}
        return dict(adapter=dict(type='prefix', length=n) | base, weights=weights)
    odd = [name for name, value in theirs.items() if value and name not in PLAIN]
    if kind != 'LORA' or odd or theirs.get('bias', 'none') != 'none' or theirs.get('init_lora_weights', True) not in UNCHANGED:
        raise ValueError(f'a {kind} of peft with {", ".join(odd) or "its settings"} is not known here; read are plain LoRA, begun beside '
                         'the base as it is, and PREFIX_TUNING without projection')
    weights = {key.removeprefix('base_model.model.'): value for key, value in tensors.items()}
    scale = math.sqrt(theirs['r']) if theirs.get('use_rslora') else 1.0
    how = dict(type='lora', rank=theirs['r'], alpha=theirs['lora_alpha'] * scale, dropout=theirs.get('lora_dropout', 0.0),
               targets=','.join(sorted({key.rpartition('.lora_')[0] for key in weights})))
    return dict(adapter=how | base, weights=weights)
