"""What a run of train.py begins from, and what its settings come to.

    origin = find_origin(settings, explicit)    # a run to go on with, a model to tune, or neither
    data = open_data(settings, explicit, origin)
    fill_unset(settings, explicit, origin, data)    # sizes and steps that nobody named
    net, adapter = build_model(settings, explicit, origin, data)

    flags, recipe ─► settings ◄─ the checkpoint in out_dir: what the run was begun with
                         │    ◄─ the machine: sizes that suit it
                         ▼
                     the model ─► its optimizers ─► the Progress of the run

`settings` is {name: value} of all of train.py's settings; the first three functions complete it in
place. `explicit` has those that a config file or a flag named. What contradicts ends the program in
a line.
"""
import dataclasses
import math
import os
import re
import shlex

import numpy as np
import torch

from mambino import machine
from mambino.blocks import OBJECTIVES, fills_holes
from mambino.configurator import checked, fail, require
from mambino.sample.text import encode_prompt
from mambino.train import batches, identity, processes
from mambino.train.building import BLOCK_LENGTH, OF_TRAINING, is_unset, model_config, named_flags, require_room
from mambino.train.defaults import fill_recipe
from mambino.train.from_next import begin_to_fill
from mambino.train.progress import Progress, best_of, latest_of, remembered
from mambino.train.sizes import SIZES, named_size, sizes_for
from mambino.weights import adapters, checkpoint, fitting, loading, soundness
from mambino.weights.checkpoint import MODELS

BATCH_SIZE = 16     # sequences at once where memory has room for them
OF_THE_NEXT = dict(objective='next', block_length=0)    # what configs of before 0.10 have not, since all were so


@dataclasses.dataclass
class Origin:
    """What a run begins from. Neither: from nothing; both: an adapter in training, and the model it
    stands beside."""
    ckpt: dict | None = None        # the checkpoint of this very run
    base: dict | None = None        # another model, as loading.load_base gives it

    @property
    def model(self):
        """{'kind', 'config', …} of the model there is already; None where a new one is made."""
        return self.ckpt or self.base

    @property
    def step(self):
        """How many steps the run has made."""
        return self.ckpt['counters']['step'] if self.ckpt else 0

    @property
    def in_shards(self):
        """The folder from which each process reads its share of the tensors; None if all are here."""
        return self.ckpt and self.ckpt.get('shards')

    def begun(self, settings, explicit):
        """What the command named that began this run on purpose anew; None if it began otherwise.
        By it the same command, said again, is known."""
        if self.ckpt:
            return self.ckpt.get('begun')
        return remembered(explicit) if settings['init_from'] == 'scratch' else None


# --- a run to go on with, or a model to begin with ------------------------------------------------

def find_origin(settings, explicit):
    """The Origin that out_dir and init_from name. A resumed run's settings are filled in; what
    makes the model cannot change."""
    for values in (settings, explicit):
        named = [name for name in MAY_BE_LEFT_OUT if values.get(name) in (0, 1)]
        values.update({name: bool(values[name]) for name in named})
    out_dir, init_from = settings['out_dir'], settings['init_from']
    latest = latest_of(out_dir)
    names_model = init_from not in ('auto', 'resume', 'scratch')
    own_paths = [os.path.realpath(path) for path in (out_dir, latest, best_of(out_dir))]
    if names_model and os.path.realpath(init_from) in own_paths:
        fail(f'init_from={init_from} is out_dir itself: name another --out_dir for what is made '
             'of that model, or leave out --init_from to go on')
    goes_on = os.path.exists(latest)
    if init_from == 'scratch':              # the same command again, after a kill, goes on
        goes_on = checkpoint.begun_by(latest, remembered(explicit))
    if settings['eval_only'] and names_model and is_meant_alone(out_dir, explicit):
        return fine_tune(settings, explicit)
    if settings['eval_only'] or init_from == 'resume' or goes_on:
        return resume(settings, explicit)
    if init_from != 'scratch' and checkpoint.is_export(best_of(out_dir)):
        fail(f'{out_dir}: holds an exported model, whose best.pt would be lost: choose another --out_dir')
    if names_model:
        return fine_tune(settings, explicit)
    return Origin()


def is_meant_alone(out_dir, explicit):
    """Whether an evaluation that names another model, by init_from, is of that one: out_dir has none, or is
    not named itself and holds no adapter, whose base the other would be."""
    paths = [path for path in (best_of(out_dir), latest_of(out_dir), out_dir) if os.path.isfile(path)]
    return not paths or 'out_dir' not in explicit and not checkpoint.has_adapter(paths[0])


def resume(settings, explicit):
    """The Origin of a run that goes on, in `settings` those it was begun with; refuses others that
    were named."""
    out_dir, init_from = settings['out_dir'], settings['init_from']
    latest = latest_of(out_dir)
    path = out_dir if settings['eval_only'] else latest
    ckpt = checkpoint.load_checkpoint(path, read_shards=settings['parallel'] != 'fsdp')
    checkpoint.refuse_quantized(ckpt, out_dir)
    for name, value in remembered(ckpt['settings']).items():
        is_left_to_it = name not in explicit or (name == 'dtype' and explicit[name] == 'auto')
        if name in settings and is_left_to_it:
            settings[name] = checked(value, settings[name], f'{latest}: its settings: {name}')
    counts_batches = not ckpt.get('data') and not settings['eval_only']     # which asks for all, or what is named now
    if counts_batches and 'eval_iters' not in explicit and settings['eval_iters']:
        settings['eval_iters'] *= max(1, int(ckpt['settings'].get('batch_size') or 1))
        processes.say(f'note: eval_iters counts sequences, and no batches any more: what the run in {out_dir} had is '
                      f'eval_iters={settings["eval_iters"]}')

    rank = ckpt['config'].get('mimo_rank', 1)
    named = named_size(settings['model'], explicit.get('size'), rank) | named_for_model(explicit)
    if explicit.get('block_size'):
        named['block_size'] = explicit['block_size']
    was = {name: ckpt['settings'].get(name) for name in ('model', 'optimizer', *adapters.SETTINGS)}
    was |= OF_THE_NEXT | ckpt['config']
    for name in [name for name in was if name in named]:
        advice = 'choose another --out_dir, or begin anew with --init_from=scratch'
        if settings['adapter']:
            advice = 'or choose another --out_dir'
        refuse_change(f'{latest} holds a run', name, was[name], named[name], advice)
    learn_what_it_learns(settings, ckpt['config'])

    base = None
    if ckpt.get('adapter'):
        source = '' if init_from in ('auto', 'resume', 'scratch') else init_from
        base = loading.base_of(ckpt, source)
    return Origin(ckpt, base)


def fine_tune(settings, explicit):
    """The Origin of a run that begins with another model's weights; refuses settings that this
    model does not have."""
    init_from = settings['init_from']
    if not os.path.exists(init_from.removeprefix('hf:')):
        fail(f'init_from={init_from}: no such folder; it must be auto, resume or scratch, or the out_dir of another '
             f'run, or hf: and a folder of transformers{runs_here()}')
    if not (settings['max_iters'] or settings['eval_only']) and 'max_iters' in named_flags():
        fail('max_iters=0 stands for as many steps as suit the machine: leave it out for these. To use a model as it '
             f'is no step is needed: sample.py, export.py and serve.py take --out_dir={shlex.quote(init_from)}')
    base = loading.load_base(init_from)
    if settings['objective'] != 'next' and not fills_holes(base['config']):
        base = begin_to_fill(base, settings, explicit)
    settings['model'] = base['kind']
    settings['block_size'] = settings['block_size'] or base['block_size']
    rank = base['config'].get('mimo_rank', 1)
    named = named_size(base['kind'], settings['size'], rank) | named_for_model(explicit)
    was = {'model': base['kind']} | OF_THE_NEXT | base['config']
    for name in [name for name in was if name in named]:
        holder = f'{init_from} holds a model'
        refuse_change(holder, name, was[name], named[name], 'or choose another model to begin with')
    learn_what_it_learns(settings, base['config'])
    if init_from.startswith('hf:') and base['config'].get('n_expert') and 'capacity_factor' not in explicit:
        settings['capacity_factor'] = 0.0
        processes.say('note: capacity_factor=0: the experts take all their tokens, as they did where they come from')
    return Origin(base=base)


def learn_what_it_learns(settings, config):
    """The settings say of the objective what a model that there is has."""
    known = OF_THE_NEXT | config
    settings.update({name: known[name] for name in (*OF_THE_NEXT, 'share_projections') if name in known})


def runs_here():
    """'; here are out, out-lora': the folders here that hold a run; '' if there are none."""
    runs = [name for name in sorted(os.listdir()) if os.path.exists(latest_of(name)) or os.path.exists(best_of(name))]
    return f'; runs are in {", ".join(runs[:8])}{", …" if len(runs) > 8 else ""}' if runs else ''


def refuse_dataset(out_dir):
    """Ends the program if out_dir is data/, or a dataset, or in one: the next prepare.py would take it
    for its own."""
    folder = os.path.realpath(out_dir)
    if folder == os.path.realpath('data'):
        fail(f'out_dir={out_dir}: datasets are there; choose a folder for the run, such as --out_dir=out')
    while folder != os.path.dirname(folder):
        if os.path.exists(os.path.join(folder, 'train.bin')) and not os.path.exists(latest_of(out_dir)):
            where = 'is a dataset' if folder == os.path.realpath(out_dir) else f'is in the dataset {folder}'
            fail(f'out_dir={out_dir}: {where}; choose a folder for the run, such as --out_dir=out')
        folder = os.path.dirname(folder)


def named_for_model(explicit):
    """What of `explicit` must be as it was for a model that there is. An adapter's settings mean
    something when empty, too."""
    may_change = (*OF_TRAINING, 'vocab_size', 'block_size')
    return {name: value for name, value in explicit.items()
            if name in adapters.SETTINGS or not (is_unset(name, value) or name in may_change)}


def refuse_change(holder, name, was, now, advice):
    """Ends the program if a setting that makes a run, or a model, what it is has another value
    now."""
    if was != now:
        fail(f'{holder} with {name}={was}, not {now}: leave the setting out to go on with it, {advice}')


# --- settings: what they may be, and what the unset ones stand for --------------------------------

POSITIVE = (
    'eval_interval', 'log_interval', 'n_groups', 'mimo_rank', 'rope_theta', 'lora_rank',
    'lora_alpha', 'prefix_length')
NOT_NEGATIVE = (
    'vocab_size', 'n_layer', 'n_embd', 'block_size', 'n_head', 'n_kv_head', 'state_size', 'n_expert', 'key_heads',
    'max_iters', 'intermediate_size', 'low_rank', 'batch_size', 'gradient_accumulation_steps',
    'tokens_per_step', 'learning_rate', 'weight_decay', 'grad_clip', 'lr_decay_iters', 'min_lr', 'eval_iters',
    'patience', 'sample_interval', 'profile', 'block_length', 'max_weight', 'capacity_factor', 'aux_loss', 'z_loss',
    'save_minutes')

MAY_BE_LEFT_OUT = 'qk_norm', 'gradient_checkpointing', 'compile'    # yes, no, or None

# What is larger cannot be meant, and would be counted, drawn or waited for without an end.
AT_MOST = dict(
    max_iters=10**10, tokens_per_step=2**40, batch_size=2**30, gradient_accumulation_steps=2**30, block_size=2**30,
    vocab_size=2**31, n_embd=2**24, mimo_rank=2**10, lora_rank=2**16, prefix_length=2**20, learning_rate=1e4,
    min_lr=1e4, weight_decay=1e6, lora_alpha=1e6, aux_loss=1e6, z_loss=1e6)
MOST = 10**15       # … of all other numbers
OF_THE_SIZE = 'n_layer', 'n_embd', 'n_head'


def check_settings(settings, origin):
    """Ends the program at the first setting that cannot be, or does not go with an adapter."""
    size, vram = settings['size'], settings['vram']
    sizes = sorted({size for _, size in SIZES}, key=lambda size: int(size[:-1]))
    gigabytes = re.fullmatch(r'\d+\.?\d*', vram)
    fractions = ('dropout', 'beta1', 'beta2', 'lora_dropout')
    require(settings, {
        'one of ' + ', '.join(MODELS): dict(model=settings['model'] in MODELS),
        'empty, or one of ' + ', '.join(sizes): dict(
            size=not size or (settings['model'], size) in SIZES),
        'ddp or fsdp': dict(parallel=settings['parallel'] in ('ddp', 'fsdp')),
        'one of ' + ', '.join(OBJECTIVES): dict(objective=settings['objective'] in OBJECTIVES),
        'empty, lora or prefix': dict(adapter=settings['adapter'] in ('', 'lora', 'prefix')),
        'empty, adamw or muon': dict(optimizer=settings['optimizer'] in ('', 'adamw', 'muon')),
        'empty, cosine or wsd': dict(schedule=settings['schedule'] in ('', 'cosine', 'wsd')),
        'auto, float32, bfloat16 or float16': dict(dtype=settings['dtype'] in ('auto', *machine.DTYPES)),
        'auto, or a number of GB': dict(vram=vram == 'auto' or (gigabytes and 0 < float(vram) < 1e9)),
        'true, false or left out': {
            name: settings[name] in (None, True, False) for name in MAY_BE_LEFT_OUT},
        'more than 0': {name: settings[name] > 0 for name in POSITIVE},
        '-1 or more': {name: settings[name] >= -1 for name in ('warmup_iters', 'window')},
        'at least 0 and below 1': {name: 0 <= settings[name] < 1 for name in fractions},
        'from 0 to 1': dict(decay_fraction=0 <= settings['decay_fraction'] <= 1),
        **{f'{most:g} at most': {name: settings[name] <= most} for name, most in AT_MOST.items()},
        f'{MOST:g} at most': {name: value <= MOST for name, value in settings.items() if type(value) in (int, float)},
        'from 0 to 2**31': dict(seed=0 <= settings['seed'] < 2**31),
        '0 or more': {name: settings[name] >= 0 for name in NOT_NEGATIVE},
    })
    if settings['adapter']:
        adapters.check_settings(settings, origin.base)


def fill_unset(settings, explicit, origin, data):
    """Gives the settings that are left to the machine, or follow from others, their values: sizes,
    steps, the optimizer and its rate. The precision waits for the model, with which it is measured
    (precision.py)."""
    device = settings['device']
    model = settings['model']
    is_new = not (origin.model or settings['size'])
    sizes = sizes_for(device, model, settings['n_embd'], is_new)
    sizes |= named_size(model, settings['size'], settings['mimo_rank'])
    if origin.model:
        config = origin.model['config']
        sizes |= {name: config[name] for name in OF_THE_SIZE if name in config}
    elif settings['version'] != 1 and 'd' not in settings['layers']:    # a state that suits its width
        settings['state_size'] = settings['state_size'] or sizes.get('state_size', 0)
    if not settings['block_size']:                  # a small text need not fill a large window
        shortest = min(n for part in data.parts for n in part.tokens.values())
        largest = 1 << max(3, (shortest - 1).bit_length() - 1)
        settings['block_size'] = min(sizes['block_size'], largest)
    for name in (*OF_THE_SIZE, 'max_iters'):
        settings[name] = settings[name] or sizes.get(name, 0)
    if settings['objective'] == 'block':
        settings['block_length'] = settings['block_length'] or BLOCK_LENGTH
    if not settings['n_head']:                      # of some 64 channels
        n_embd = settings['n_embd']
        settings['n_head'] = next(n for n in range(max(1, n_embd // 64), 0, -1) if n_embd % n == 0)
    if settings['warmup_iters'] < 0:
        settings['warmup_iters'] = min(100, settings['max_iters'] // 10)
    fill_recipe(settings, origin)
    settings['tokens_per_step'] = tokens_per_step(settings, explicit, sizes['tokens_per_step'])
    # tokens_per_step says it; a later run may cut the same step otherwise
    settings['gradient_accumulation_steps'] = 0
    if settings['adapter'] == 'prefix':
        settings['gradient_checkpointing'] = False  # its caches are written only once
    block_size = settings['block_size']
    for part in data.parts:
        for split, n in part.tokens.items():
            if n <= block_size:
                fail(f'{part.paths[split]}: has {n} tokens, and one window takes block_size + 1 = '
                     f'{block_size + 1}: lower --block_size, or prepare more text')


def tokens_per_step(settings, explicit, suggested):
    """The tokens of a step: as they were named, by themselves or as batch_size * block_size *
    gradient_accumulation_steps; else about as many as suggested. Whole sequences, as many for each
    process."""
    T, world = settings['block_size'], processes.WORLD
    # not what memory made of it in an earlier run
    batch_size = explicit.get('batch_size') or BATCH_SIZE
    product = batch_size * T * settings['gradient_accumulation_steps']
    unit = math.lcm(settings['batch_size'] or 1, world) * T
    tokens = settings['tokens_per_step'] or product or math.ceil(suggested / unit) * unit
    if tokens % T:
        nearest = max(1, round(tokens / T)) * T
        fail(f'tokens_per_step={tokens} must be a multiple of block_size={T}, such as {nearest}')
    if product not in (0, tokens):
        fail(f'tokens_per_step={tokens} is not batch_size * block_size * '
             f'gradient_accumulation_steps = {product}: leave out one of them')
    if tokens > AT_MOST['tokens_per_step']:
        fail(f'a step of {tokens:,} tokens would take years: choose a smaller --tokens_per_step, --batch_size or '
             '--gradient_accumulation_steps')
    if tokens // T % world:
        fail(f'{tokens // T} sequences a step cannot be shared by {world} processes: '
             f'set --tokens_per_step to a multiple of {T * world}')
    return tokens


# --- data -----------------------------------------------------------------------------------------

def open_data(settings, explicit, origin):
    """The dataset, or the mixture, of a run; its tokenizer must be that of the model there is, and of
    a run that goes on its content that of before."""
    ckpt, base = origin.ckpt, origin.base
    out_dir, init_from = settings['out_dir'], settings['init_from']
    known = ckpt and identity.known_parts(ckpt)
    dataset = settings['dataset'] or batches.newest_dataset()
    if known and 'dataset' not in explicit and not batches.is_there(dataset):
        dataset = identity.same_text(known) or dataset      # it was renamed
    data = batches.open_dataset(dataset, settings['vocab_size'], settings['data_dtype'])
    settings['dataset'] = data.name  # of a mixture one string, however its user wrote it
    data.identity = identity.identity_of(data)
    if ckpt:
        identity.require_same_text(ckpt, data, settings, is_named='dataset' in named_flags())
    if settings['sample_interval'] and data.tokenizer:
        # better now than hours into the run
        encode_prompt(data.tokenizer, settings['sample_start'], 'sample_start')
    tokenizer_id = data.tokenizer and data.tokenizer.sha256()
    if ckpt and (ckpt['tokenizer'] and checkpoint.tokenizer_of(ckpt).sha256()) != tokenizer_id:
        fail(f'dataset {data.name} has another tokenizer than the run in {out_dir}: name the dataset '
             f'that run was trained on ({ckpt["settings"]["dataset"]}), or choose another --out_dir')
    if base and base['tokenizer'] and base['tokenizer'].sha256() != tokenizer_id:
        fail(f'dataset {data.name} has another tokenizer than {init_from}: '
             f'prepare the text anew with --tokenizer={shlex.quote(base["tokenizer_path"])}')
    for name, tok in ((out_dir, ckpt and checkpoint.tokenizer_of(ckpt)), (init_from, base and base['tokenizer'])):
        if tok and tok.bos != data.tokenizer.bos:
            old, new = (' '.join(map(tok.name_of, bos)) or 'nothing' for bos in (tok.bos, data.tokenizer.bos))
            processes.say(f'note: before every text stands {old} in what {name} was trained on, and {new} in dataset '
                          f'{data.name}')
        if tok:                     # what the model knows of its marks and its chat it goes on to know
            data.tokenizer.config = {**tok.config, **data.tokenizer.config}
    return data


# --- the model and what moves it ------------------------------------------------------------------

def build_model(settings, explicit, origin, data):
    """(net, adapter): the model on the CPU with the weights it begins with, and what its
    checkpoints say of an adapter, or None."""
    kind, config = settings['model'], model_config(settings, explicit, origin, data)
    torch.manual_seed(settings['seed'])
    if not origin.model:
        require_room(kind, config)
    try:
        if origin.model and not origin.in_shards:
            # of an adapter's run, what it stands beside
            net = fitting.build_with(kind, config, (origin.base or origin.ckpt)['weights'])
        else:
            net = checkpoint.build(kind, config)
    except ValueError as error:
        fail(error)
    if not settings['adapter']:
        return net, None
    length = min(settings['prefix_length'], settings['block_size'])
    # (length,) a text for a prefix to begin with
    prefix_ids = data.batch(np.arange(1), length, settings['seed'])[0][0]
    source = settings['init_from']
    return net, adapters.begin_adapter(net, settings, source, origin.ckpt, origin.base, prefix_ids)


def restore(origin, optimizers, scaler, out_dir, data_record):
    """The Progress of a run; if it goes on, the optimizers and the scaler of fp16 are as they were,
    too. optimizers: none for an evaluation alone. data_record: of identity.record."""
    progress = Progress()
    ckpt = origin.ckpt
    if ckpt:
        if optimizers:
            check_moved(ckpt, optimizers, latest_of(out_dir))
        for opt, saved in zip(optimizers, ckpt['optimizers']):
            said_now = [{name: value for name, value in group.items() if name != 'params'}
                        for group in opt.param_groups]
            opt.load_state_dict(processes.shares(opt, saved, origin.in_shards))
            for group, values in zip(opt.param_groups, said_now):
                group.update(values)                # what is said now holds, not what was saved
        if ckpt['scaler']:
            scaler.load_state_dict(ckpt['scaler'])
        counters = ckpt['counters']
        progress = Progress(**{name: counters[name] for name in Progress().counters if name in counters})
        changes = identity.measure_changes(ckpt, data_record)
        if changes and progress.evaluated >= 0:
            progress.compare_anew()
            processes.say(f'note: the losses so far cannot be compared with those to come ({", ".join(changes)}): the '
                          f'best one and patience are counted anew, and {best_of(out_dir)} is set aside when there '
                          'is another')
    if processes.summed(progress.step)[0] != progress.step * processes.WORLD:
        fail('the processes are at different steps: '
             f'{out_dir} must be one folder that all machines see')
    return progress


def check_moved(ckpt, optimizers, latest):
    """Ends the program in a line if a checkpoint's optimizers are not those of this run."""
    try:
        if len(optimizers) != len(ckpt['optimizers']):
            raise ValueError(f'it has {len(ckpt["optimizers"])} optimizers, and the run {len(optimizers)}')
        for opt, saved in zip(optimizers, ckpt['optimizers']):
            soundness.check_optimizer(opt, saved)
    except ValueError as error:
        fail(f'{latest}: damaged, or not of this run: {error}')
