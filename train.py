"""Trains a model: one explicit loop, read from top to bottom.

    python train.py                                                # the dataset prepared last, sizes for this machine
    python train.py config/shakespeare_char.py --max_iters=1000    # a recipe, one thing changed
    torchrun --nproc_per_node=2 train.py                           # two processes share each batch

    settings ─► data (batches.py) ─► model ─► [ step: accumulate gradients, clip, update ] ─► out_dir/
                                              evaluate and save every eval_interval          ckpt.pt, best.pt, metrics.jsonl

A run that was stopped, by Ctrl-C or by kill -9, goes on where it was: say the same command again. On a CPU it then ends with
the very bits it would have had. Nothing but the step decides what happens in it: its data, its dropout, its learning rate.
"""
import dataclasses
import datetime
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

# libgomp's threads wait for each other by spinning, which on a busy machine keeps the core from the thread they wait for.
# Letting go after some microseconds costs nothing on an idle machine; beside one busy process steps are 2 to 10 times faster.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

import numpy as np
import torch
from torch.profiler import record_function

from mambino.weights import loading
from mambino import machine
from mambino.weights import adapters
from mambino.train import batches
from mambino.weights import checkpoint
from mambino.train import memory as fit
from mambino import kernels
from mambino.train import processes
from mambino.weights.checkpoint import MODELS
from mambino.configurator import configure, fail, find_settings, require
from mambino.machine import memory_used, peak_flops
from mambino.train.metrics import Trace, open_log, parts_of
from mambino.train.muon import Muon, row_kinds
from mambino.train.processes import leave, say, summed
from mambino.sample.generation import generate
from mambino.sample.text import Writer, encode_prompt

# --- what and where
out_dir = 'out'             # checkpoints and the log of this run
dataset = ''                # a folder in data/, or several and their shares: code:0.6,docs:0.4; '' is the one prepared last
vocab_size = 0              # only for a bare .bin without meta.json
data_dtype = 'int32'        # only for a bare .bin: 'int32', or nanoGPT's 'uint16'
init_from = 'auto'          # 'auto': go on with out_dir's run if it has one; 'resume': it must have one; 'scratch': begin anew;
                            # another out_dir, or hf:folder (of transformers): begin with the weights there, to fine-tune them
eval_only = False           # evaluate out_dir's checkpoint, and end
# --- model (a 0 is filled in: sizes by the machine, the rest as the model's own file says)
model = 'mamba'             # 'mamba', 'gpt' or 'hybrid'
size = ''                   # '50m', '150m' or '400m' parameters: layers and width that suit; '' is by the machine
n_layer = 0
n_embd = 0                  # width
block_size = 0              # tokens of context in training
dropout = 0.0               # 0.1 to 0.2 where the data is small and passes several times
tie_embeddings = True       # one matrix for input and output embedding
n_head = 0                  # attention (gpt, hybrid)
n_kv_head = 0               # fewer key/value heads than heads make the cache smaller
intermediate_size = 0       # inner width of the MLP
window = -1                 # attend to so many last tokens; 0: all; -1: the model's default
rope_theta = 10000.0        # base of the rotary positions: smaller tells near positions apart more sharply
n_expert = 0                # gpt: experts in the place of each MLP (sparse MoE); 0: one MLP for all tokens
n_expert_active = 2         # of them each token takes so many
capacity_factor = 1.25      # in training an expert takes at most so many times its even share of the tokens; 0: no limit
aux_loss = 0.01             # weight of the loss that evens out the experts' load
z_loss = 0.001              # weight of the loss that keeps the router's logits small
qk_norm = False             # normalise queries and keys: steadier at high learning rates
version = 2                 # Mamba-2, or 1
state_size = 0              # size of the SSM's state per channel
n_groups = 1                # heads that share B and C in Mamba-2
layout = ''                 # hybrid: 'sequential' or 'parallel', see model_hybrid.py
gate = True                 # hybrid: token-adaptive branch weights
branch_norm = True          # hybrid: normalise each branch
low_rank = 0                # hybrid: rank of the projections, 0 is full
# --- adapter: a small part that is trained beside a model that stays as it is, that of --init_from
adapter = ''                # 'lora', or 'prefix': a learned beginning; '' trains all weights
lora_rank = 8
lora_alpha = 16.0           # the change counts lora_alpha / lora_rank times
lora_dropout = 0.0
lora_targets = ''           # the matrices that get one: q_proj,v_proj; '': all projections but keys', and of a Mamba those that go in
prefix_length = 16          # tokens that the beginning stands for
# --- batch
batch_size = 0              # sequences computed at once; 0: what the memory found, or `vram`, allows
gradient_checkpointing = None  # compute each layer again in the backward pass: a third slower, far less memory; None: as memory asks
vram = 'auto'               # GB of memory to plan for; auto: what is free on the device
gradient_accumulation_steps = 0  # such micro-batches in one step, over all processes; 0: from tokens_per_step
tokens_per_step = 0         # batch_size * block_size * gradient_accumulation_steps, if those are not given
# --- optimizer
optimizer = 'adamw'         # 'adamw', or 'muon': Muon on the hidden matrices and AdamW on the rest
learning_rate = 1e-3        # the peak; Muon's updates are scaled to the size of AdamW's, so one rate serves both
max_iters = 0               # steps in all; 0: by the machine
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0             # largest norm of the gradient; 0: no limit
# --- learning rate over time
schedule = 'cosine'         # 'cosine', or 'wsd': warm-up, stable, linear decay over the last decay_fraction
warmup_iters = -1           # -1: a tenth of max_iters, at most 100
lr_decay_iters = 0          # where the decay ends; 0: max_iters
min_lr = 0.0                # the rate at the end
decay_fraction = 0.3        # for 'wsd'
# --- evaluation, log, checkpoints
eval_interval = 250         # steps between evaluations; each also saves ckpt.pt, and best.pt when it is the best so far
eval_iters = 0              # batches of the val split in an evaluation, always the same; 0: all of it
patience = 0                # stop after so many evaluations without a better loss; 0: never
log_interval = 10           # steps between lines of the log
sample_interval = 0         # steps between samples of text; 0: none
sample_start = '\n'         # their prompt
tensorboard = False         # needs: pip install tensorboard
wandb_log = False           # needs: pip install wandb
wandb_project = 'mambino'
wandb_run_name = ''
# --- machine
device = 'auto'             # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
parallel = 'ddp'            # with several processes: 'ddp', or 'fsdp': each keeps a share of the weights, gradients and optimizer
dtype = 'auto'              # 'float32', 'bfloat16', 'float16' (with a loss scaler); auto: the fastest that is safe here
profile = 0                 # trace so many steps: where their time goes, and a file for chrome://tracing or Perfetto
compile = False             # torch.compile: a minute of waiting for faster steps; falls back where it does not work
seed = 1337


FREE = 'dropout', 'capacity_factor', 'aux_loss', 'z_loss'    # of the model's settings those that only training reads
explicit = configure(globals())
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))      # until the loop begins there is nothing to save
names = list(find_settings(globals()))
# not of the run:
LOCAL = 'out_dir init_from eval_only device compile profile vram tensorboard wandb_log wandb_project wandb_run_name parallel'.split()

# --- processes: one, or those that torchrun starts
rank, world, master = processes.RANK, processes.WORLD, processes.RANK == 0
device = processes.start(device, parallel)
kind_of_device = device.partition(':')[0]


def unset(name, value):
    """Whether this value of a setting leaves it to the machine or to the model's own default."""
    return value == '' or (type(value) is int and value == (-1 if name == 'window' else 0))


def unchanged(where, name, was, now):
    """Refuses to go on with a run, or a model, under another value of a setting that makes it what it is."""
    if was != now:
        fail(f'{where} holds a {"run" if where == latest else "model"} with {name}={was}, not {now}: leave the setting out to go on with '
             'it, ' + ('or choose another --out_dir' if adapter else 'choose another --out_dir, or begin anew with --init_from=scratch'))


# --- go on with a run, or begin one
latest, best = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'best.pt')
given = {name: value for name, value in explicit.items()    # an empty one of an adapter's settings has a meaning
         if name in adapters.SETTINGS or not unset(name, value) and name not in (*FREE, 'vocab_size', 'block_size')}
ckpt = base = None                                          # a run to go on with; or a model to begin with
if init_from not in ('auto', 'resume', 'scratch') and os.path.realpath(init_from) in map(os.path.realpath, (out_dir, latest, best)):
    fail(f'init_from={init_from} is out_dir itself: name another --out_dir for what is made of that model, or leave out --init_from to '
         'go on')
if eval_only or init_from == 'resume' or (init_from != 'scratch' and os.path.exists(latest)):
    ckpt = checkpoint.refuse_quantized(checkpoint.load_checkpoint(
        out_dir if eval_only else latest, read_shards=parallel != 'fsdp'), out_dir)
    for name, value in ckpt['settings'].items():
        if name not in explicit and name not in LOCAL and name in names:
            globals()[name] = value
    given = fit.SIZES.get((model, explicit.get('size')), {}) | given
    for name, was in ({name: ckpt['settings'].get(name) for name in ('model', 'optimizer', *adapters.SETTINGS)} | ckpt['config']).items():
        if name in given or (name == 'block_size' and explicit.get(name)):
            unchanged(latest, name, was, given.get(name, block_size))
    if ckpt.get('adapter'):
        base = loading.base_of(ckpt, '' if init_from in ('auto', 'resume', 'scratch') else init_from)
elif init_from not in ('auto', 'resume', 'scratch'):
    if not os.path.exists(init_from.removeprefix('hf:')):
        fail(f'init_from={init_from} must be auto, resume or scratch, or the out_dir of another run, or hf: and a folder of transformers')
    base = loading.load_base(init_from)
    model = base['kind']
    block_size = block_size or base['block_size']
    given = fit.SIZES.get((model, size), {}) | given
    for name, was in {'model': model, **base['config']}.items():
        if name in given:
            unchanged(init_from, name, was, given[name])

require(globals(), {
    'one of ' + ', '.join(MODELS): dict(model=model in MODELS),
    'empty, or one of ' + ', '.join(sorted({size for _, size in fit.SIZES}, key=lambda size: int(size[:-1]))):
        dict(size=not size or (model, size) in fit.SIZES),
    'ddp or fsdp': dict(parallel=parallel in ('ddp', 'fsdp')),
    'empty, lora or prefix': dict(adapter=adapter in ('', 'lora', 'prefix')),
    'adamw or muon': dict(optimizer=optimizer in ('adamw', 'muon')),
    'cosine or wsd': dict(schedule=schedule in ('cosine', 'wsd')),
    "auto, or a number of GB": dict(vram=vram == 'auto' or re.fullmatch(r'\d+\.?\d*', vram) and float(vram) > 0),
    'true, false or left out': dict(gradient_checkpointing=gradient_checkpointing in (None, True, False)),
    'more than 0': {name: globals()[name] > 0 for name in '''learning_rate eval_interval log_interval n_groups rope_theta lora_rank lora_alpha
        prefix_length'''.split()},
    '-1 or more': dict(warmup_iters=warmup_iters >= -1, window=window >= -1),
    'at least 0 and below 1': {name: 0 <= globals()[name] < 1 for name in 'dropout beta1 beta2 lora_dropout'.split()},
    'from 0 to 1': dict(decay_fraction=0 <= decay_fraction <= 1),
    'from 0 to 2**31': dict(seed=0 <= seed < 2**31),
    '0 or more': {name: globals()[name] >= 0 for name in '''vocab_size n_layer n_embd block_size n_head n_kv_head state_size n_expert
        max_iters intermediate_size low_rank batch_size gradient_accumulation_steps tokens_per_step weight_decay grad_clip
        lr_decay_iters min_lr eval_iters patience sample_interval profile'''.split()},
})
if adapter:
    adapters.check_settings(globals(), base)
    gradient_checkpointing = False if adapter == 'prefix' else gradient_checkpointing

# --- data
data = batches.open_dataset(dataset or batches.newest_dataset(), vocab_size, data_dtype)
dataset, tok = data.name, data.tokenizer                    # of a mixture one string, however its user wrote it
if ckpt and init_from != 'resume' and not eval_only and 'dataset' in explicit:  # who says 'resume' may go on with other text
    unchanged(latest, 'dataset', ckpt['settings']['dataset'], dataset)
if sample_interval and tok:
    encode_prompt(tok, sample_start, 'sample_start')        # better now than hours into the run
if ckpt and (ckpt['tokenizer'] and checkpoint.tokenizer_of(ckpt).sha256()) != (tok and tok.sha256()):
    fail(f'dataset {dataset} has another tokenizer than the run in {out_dir}: name the dataset that run was trained on '
         f'({ckpt["settings"]["dataset"]}), or choose another --out_dir')
if base and base['tokenizer'] and base['tokenizer'].sha256() != (tok and tok.sha256()):
    fail(f'dataset {dataset} has another tokenizer than {init_from}: prepare the text anew with --tokenizer={base["tokenizer_path"]}')

# --- what the zeros stand for
globals().update(fit.fill({name: globals()[name] for name in names}, explicit, kind_of_device, world,
                          shortest=min(n for part in data.parts for n in part.tokens.values())))
sequences = tokens_per_step // block_size                   # of a step, over all processes
dtype = machine.choose_dtype(dtype, device)
for part, split in [(part, split) for part in data.parts for split in part.tokens]:
    if part.tokens[split] <= block_size:
        fail(f'{part.paths[split]}: has {part.tokens[split]} tokens, and one window takes block_size + 1 = {block_size + 1}: lower '
             '--block_size, or prepare more text')

# --- model
fields = {kind: {field.name for field in dataclasses.fields(config)} for kind, (_, config) in MODELS.items()}
for name in explicit:          # a config file may serve several models, a flag is meant
    if name not in fields[model] and any(name in f for f in fields.values()) and \
            any(a.lstrip('-').partition('=')[0].replace('-', '_') == name for a in sys.argv if a.startswith('--')):
        fail(f'{name} means nothing to a {model} model; leave it out')
held = ckpt or base
if held:
    config = held['config'] | {name: globals()[name] for name in FREE if name in fields[model]} | dict(block_size=block_size)
    if data.vocab_size > config['vocab_size']:
        fail(f'dataset {dataset} has a vocabulary of {data.vocab_size}, {f"the run in {out_dir}" if ckpt else init_from} one of '
             f'{config["vocab_size"]}')
else:
    config = {name: globals()[name] for name in names if name in fields[model] and not unset(name, globals()[name])}
    config['vocab_size'] = -(-data.vocab_size // 64) * 64 if data.vocab_size > 1000 else data.vocab_size  # a rounder matrix
torch.manual_seed(seed)
try:
    net = checkpoint.build(model, config)
except ValueError as error:
    fail(error)
in_shards = ckpt and ckpt.get('shards')                     # the folder each process reads its share from
if held and not in_shards:
    net.load_state_dict((base or held)['weights'])          # of an adapter's run, what it adapts
how = adapter and adapters.begin_adapter(net, globals(), init_from, ckpt, base, data.batch(np.arange(1), min(prefix_length, block_size), seed)[0][0])

# --- memory: how much of a step is computed at once
mine = sequences // world                                   # of a step, this process's
free = float(vram) * 2**30 if vram != 'auto' else machine.available_memory(device)
free = free and processes.least(free)                       # all cut their steps alike
micro_batch = max(n for n in range(1, mine + 1) if mine % n == 0 and n <= (batch_size or fit.BATCH))
planned = ''
if free and not eval_only:
    micro_batch, gradient_checkpointing, planned = fit.plan(
        model, checkpoint.config_of(net), net.num_params(), micro_batch, mine, free, gradient_checkpointing, fixed=bool(batch_size),
        T=block_size, device=kind_of_device, dtype=dtype, optimizer=optimizer, processes=world, shards=world if processes.SHARDED else 1,
        adapter=how)
if batch_size >= 2 * micro_batch and micro_batch < mine:
    say(f'note: {mine} sequences a step can only be cut into micro-batches of {micro_batch}, not {batch_size}')
batch_size, micro_steps = batch_size or micro_batch, mine // micro_batch
net.gradient_checkpointing = gradient_checkpointing = bool(gradient_checkpointing)
processes.place(net, device)
if in_shards:
    processes.load_weights(net, ckpt)

# --- optimizers
groups = net.optim_groups(weight_decay, muon=optimizer == 'muon')
for group in groups:
    group['rows'] = [row_kinds(net).get(p) for p in group['params']]
optimizers = [torch.optim.AdamW([g for g in groups if g['kind'] == 'adamw'], lr=learning_rate, betas=(beta1, beta2),
                                fused=kind_of_device in ('cpu', 'cuda'))]
if optimizer == 'muon':
    optimizers.append(Muon([g for g in groups if g['kind'] == 'muon'], lr=learning_rate, adjust_lr_fn='match_rms_adamw'))
scaler = torch.amp.GradScaler(kind_of_device, enabled=dtype == 'float16')  # fp16 gradients would vanish unscaled
step, tokens_seen, best_loss, bad_evals, evaluated, seconds, history = 0, 0, math.inf, 0, -1, 0.0, []
if ckpt:
    for opt, saved in zip(optimizers, ckpt['optimizers']):
        fresh = [{name: value for name, value in group.items() if name != 'params'} for group in opt.param_groups]
        opt.load_state_dict(processes.shares(opt, saved, in_shards))
        for group, now in zip(opt.param_groups, fresh):     # what is said now holds, not what was saved
            group.update(now)
    scaler.load_state_dict(ckpt['scaler']) if ckpt['scaler'] else None
    step, tokens_seen, best_loss, bad_evals, evaluated, seconds, history = (ckpt['counters'][name] for name in (
        'step', 'tokens_seen', 'best_loss', 'bad_evals', 'evaluated', 'seconds', 'history'))
ckpt = base = held = saved = None                           # their tensors would stay in memory for the whole run
if summed(step)[0] != step * world:
    fail(f'the processes are at different steps: {out_dir} must be one folder that all machines see')


def get_lr(step):
    """The learning rate of a step, counted from 0."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    end = lr_decay_iters or max_iters
    begin = warmup_iters if schedule == 'cosine' else max(warmup_iters, end - int(decay_fraction * end))
    done = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == 'cosine' else 1 - done
    return min_lr + (learning_rate - min_lr) * fall


def fetch(tokens_seen, micro):
    """This process's micro-batch `micro` of the step after so many tokens: x, y (micro_batch, T) on the device."""
    first = tokens_seen // block_size + rank * mine + micro * micro_batch
    pair = data.batch(np.arange(first, first + micro_batch), block_size, seed)
    if kind_of_device == 'cuda':  # pinned memory goes over while the GPU still works on the last batch
        return [t.pin_memory().to(device, non_blocking=True) for t in pair]
    return [t.to(device) for t in pair]


@torch.no_grad()
def evaluate():
    """{'val_loss', 'perplexity', 'bits_per_byte'} on the val split of each dataset, the same tokens each time."""
    net.eval()
    sums = []
    for part in data.parts:
        nats, count, size = 0.0, 0, 0
        for x, y in processes.in_step(part.val_batches(batch_size, block_size, eval_iters, rank, world)):
            with machine.autocast(device, dtype):
                loss = net(x.to(device), y.to(device))[1]
            n = int((y >= 0).sum())
            nats, count = nats + loss.item() * n, count + n
            if part.token_bytes is not None:
                size += int(part.token_bytes[y[y >= 0].numpy()].sum())
        sums.append(summed(nats, count, size))
    net.train()
    return batches.val_result(data, sums)


def show_sample():
    """A piece of text from the model as it is; draws from a generator of its own."""
    net.eval()
    writer = Writer(tok)
    generator = torch.Generator(device).manual_seed(seed)
    for ids in generate(net, encode_prompt(tok, sample_start, 'sample_start'), 1, 200, tok.vocab_size, temperature=0.8, top_k=200,
                        generator=generator):
        writer.feed(int(ids))
    net.train()
    say(f'--- sample at step {step}\n{sample_start}{writer.text}\n---')


def save(*paths, shards=False):
    """Writes the run as it is to each path, to `latest` in shards if that is wanted and the weights are shared. A disk that is full does
    not stop the training; returns whether all was saved."""
    contents = dict(
        kind=model, config=checkpoint.config_of(net), scaler=scaler.state_dict(), rng=torch.get_rng_state(),
        counters=dict(step=step, tokens_seen=tokens_seen, best_loss=best_loss, bad_evals=bad_evals, evaluated=evaluated,
                      seconds=seconds, history=history),
        settings={name: globals()[name] for name in names if name not in LOCAL},
        tokenizer=tok.state() if tok else None, **(dict(adapter=how) if how else {}),
        metadata=dict(parameters=net.num_params(), parameter_bytes=sum(p.numel() * p.element_size() for p in net.parameters()),
                      step=step, tokens_seen=tokens_seen, best_loss=best_loss, recent=history[-20:], device=device,
                      torch=str(torch.__version__), seconds=seconds, time=time.strftime('%Y-%m-%d %H:%M:%S')))
    try:
        for path in paths:
            processes.save(path, contents, adapters.AdapterState(net, how) if how else net, optimizers, shards and path == latest)
        return True
    except (OSError, RuntimeError) as error:
        say(f'warning: {path} could not be saved ({str(error).splitlines()[0]}); the one before it is untouched')
        return False


say(f'{model}: {net.num_params() / 1e6:.2f}M parameters, {net.config.n_layer} layers of width {net.config.n_embd}, context {block_size}')
for line in [adapters.describe_adapter(net, how)] if how else parts_of(net):
    say(line)
say(f'{data.name}: {data.tokens["train"]:,} tokens to train on, {data.tokens["val"]:,} to evaluate, vocabulary {data.vocab_size}')
say(f'{max_iters} steps of {tokens_per_step:,} tokens ({world} x {micro_steps} x {micro_batch} x {block_size}), '
    f'{max_iters * tokens_per_step / data.tokens["train"]:.1f} epochs; {device}, {dtype}, {optimizer}, {kernels.describe_kernels(kind_of_device)}')
if planned:
    say(planned)
for line in data.plan(tokens_seen // block_size + max(0, max_iters - step) * sequences, block_size, seed):
    say(line)

if eval_only:
    if 'eval_iters' not in explicit:
        eval_iters = 0
    result = evaluate()
    say(f'{out_dir}, step {step}:', *(f'{name} {value:.4f}' for name, value in result.items() if value is not None))
    leave()
if step:
    say(f'going on from {latest} at step {step}')
if step >= max_iters or (patience and bad_evals >= patience):
    say(f'this run has made its {step} steps: raise --{"max_iters" if step >= max_iters else "patience"} to go on, or begin anew '
        'with --init_from=scratch')
    leave()

# --- the log; a run begun anew on purpose keeps the old one's files aside
log = lambda step, **values: None
if master:
    try:
        os.makedirs(out_dir, exist_ok=True)
        if init_from == 'scratch' and os.path.exists(latest):
            checkpoint.set_aside(latest, checkpoint.shards_of(latest), best, os.path.join(out_dir, 'metrics.jsonl'))
        log = open_log(out_dir, step, tensorboard, wandb_log and dict(
            project=wandb_project, name=wandb_run_name or None, dir=out_dir, config={name: globals()[name] for name in names}))
    except OSError as error:
        fail(f'{out_dir}: cannot be written to: {error.strerror}; choose another --out_dir')

# --- the loop
peak = peak_flops(device, dtype) * world
if kind_of_device == 'cuda':
    torch.cuda.reset_peak_memory_stats()
flops = net.flops_per_token(block_size) - adapters.flops_saved(net)
fast = net                                                  # what computes the training steps
loader = ThreadPoolExecutor(1)                              # fetches the next batch while this one is computed
x, y = fetch(tokens_seen, 0)
if compile and (processes.SHARDED or adapter == 'prefix'):
    say(f'note: torch.compile is left out with --{"parallel=fsdp" if processes.SHARDED else "adapter=prefix"}')
elif compile:
    try:
        fast = kernels.compiled(net)
        with machine.autocast(device, dtype):
            fast(x, y)[1].backward()
        net.zero_grad(set_to_none=True)
    except Exception as error:
        fast = net
        say(f'torch.compile does not work here ({type(error).__name__}); going on without')
fast = processes.shared(fast, device)
trace = Trace(os.path.join(out_dir, 'trace.json'), profile, kind_of_device) if profile and master else None


def sound():
    """Whether every loss and gradient so far was finite, in all processes."""
    return math.isfinite(summed(watch.item())[0])


stopped = []                                                # signals that asked us to stop
for number in (signal.SIGINT, signal.SIGTERM):
    # the first asks for a stop after this step, a second one stops at once; torchrun hands on more than one
    signal.signal(number, lambda n, _: (stopped.append(n), world == 1 and signal.signal(n, signal.SIG_DFL)))
columns = shutil.get_terminal_size((140, 24)).columns - 1 if sys.stdout.isatty() else 0  # one line that changes, or many
net.train()
begun = saved_step = step
watch = torch.zeros((), device=device)                      # a sum that any bad loss or gradient turns into nan
clock, clock_step = time.perf_counter(), step
while True:
    ended = step >= max_iters
    if (step % eval_interval == 0 or ended) and step and evaluated != step:
        if not sound():
            break
        began = time.perf_counter()
        result = evaluate()
        if not math.isfinite(result['val_loss']):           # the last update ruined the model: do not save it
            watch += math.nan
            break
        evaluated = step
        better = result['val_loss'] < best_loss
        best_loss, bad_evals = min(best_loss, result['val_loss']), 0 if better else bad_evals + 1
        seconds += began - clock
        history.append(dict(step=step, lr=get_lr(step), **result))
        drawn = data.shares(tokens_seen // block_size, seed)
        log(step, **result, **{f'drawn/{name}': share for name, share in drawn.items()})
        say(('\n' if columns else '') + f'step {step}: ' + ', '.join(
            f'{name.replace("_", " ")} {value:.4f}' for name, value in result.items() if value is not None)
            + (' (best)' if better else '')
            + ('\ndrawn: ' + '  '.join(f'{name} {share:.1%}' for name, share in drawn.items()) if drawn else ''))
        given_up = 0 < patience <= bad_evals
        if save(*([best] if better else []), latest, shards=not ended and not given_up):  # best first: a kill between the two comes back to this step
            saved_step = step
        elif ended:
            fail(f'{out_dir}: the finished model could not be saved; free some space and run the same command again')
        clock, clock_step = time.perf_counter(), step
        if given_up:
            say(f'stopping: {patience} evaluations without a better loss than {best_loss:.4f}')
            ended = True
    if sample_interval and step % sample_interval == 0 and step > begun and (master or processes.SHARDED) and tok:
        began = time.perf_counter()
        show_sample()
        clock += time.perf_counter() - began
    if ended:
        break
    if summed(len(stopped))[0]:
        seconds += time.perf_counter() - clock
        good = sound() and (step == saved_step and not processes.SHARDED or save(latest))
        again = ''.join(f' --{name}={shlex.quote(str(explicit[name]))}' for name in LOCAL[3:] if name in explicit)
        say(('\n' if columns else '') + (f'stopped at step {step}, saved {latest}' if good else f'stopped at step {step}, not saved')
            + '; to go on: ' + ('python' if world == 1 else f'torchrun --nproc_per_node={world}')
            + f' train.py --init_from=resume --out_dir={shlex.quote(out_dir)}{again}')
        leave(128 + (stopped or [signal.SIGTERM])[0])       # nobody leaves before the master has saved

    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
    logged = (step + 1) % log_interval == 0 or step + 1 in (1, max_iters)
    total = None
    while total is None:                                    # once; again in smaller pieces if memory does not suffice
        # dropout, too, depends on the step alone
        torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))
        try:
            if logged:
                net.expert_load()                           # what is counted from here is of this step, as its loss is
            total = torch.zeros((), device=device)
            for micro in range(micro_steps):
                if world > 1:                               # gradients travel once a step; with fsdp each time, not to be kept whole
                    fast.require_backward_grad_sync = micro == micro_steps - 1
                more = micro + 1 < micro_steps
                coming = loader.submit(fetch, *((tokens_seen, micro + 1) if more else (tokens_seen + tokens_per_step, 0)))
                with record_function('forward'), machine.autocast(device, dtype, cache=not processes.SHARDED):
                    loss = fast(x, y)[1] / micro_steps
                with record_function('backward'):
                    scaler.scale(loss).backward()
                total += loss.detach()
                with record_function('data'):
                    x, y = coming.result()
        except RuntimeError as error:                       # only CUDA's is an OutOfMemoryError
            if not re.search('out of memory|allocate memory|ALLOC_FAILED', str(error)):
                raise
            if micro_batch == 1 or world > 1:               # several processes cannot agree on it in the middle of a step
                fail(f'out of memory with {micro_batch} sequences at once; ' + (
                     f'go on with --batch_size={micro_batch // 2}: the steps stay the same' if micro_batch > 1 else
                     'go on with --gradient_checkpointing=True' if not gradient_checkpointing else
                     'halve --block_size, --n_layer or --n_embd'))
            total = loss = x = y = None
            net.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            batch_size = micro_batch = max(n for n in range(1, micro_batch) if mine % n == 0)
            micro_steps = mine // micro_batch
            say(f'\nout of memory: going on with micro-batches of {micro_batch}, {micro_steps} a step')
            x, y = fetch(tokens_seen, 0)
    with record_function('optimizer'):
        for opt in optimizers:
            scaler.unscale_(opt)
        norm = processes.clip(net, grad_clip or math.inf)
        if not scaler.is_enabled() or norm.isfinite():      # an fp16 overflow skips the step, for both optimizers
            for opt in optimizers:
                scaler.step(opt)
        scaler.update()
        net.zero_grad(set_to_none=True)
    step += 1
    tokens_seen += tokens_per_step
    watch += total if dtype == 'float16' else total + norm  # the scaler skips steps of infinite gradients itself

    if trace:
        for line in trace.step():
            say(line)
    if logged:
        if scaler.is_enabled() and scaler.get_scale() < 1e-3:
            watch += math.nan                               # gradients that overflow at any scale
        if not sound():
            break
        loss = summed(total.item())[0] / world
        now = time.perf_counter()
        rate = (step - clock_step) * tokens_per_step / max(now - clock, 1e-9)
        seconds += now - clock
        clock, clock_step = now, step
        used, epoch = memory_used(device, peak=kind_of_device == 'cuda') or 0, tokens_seen / data.tokens['train']
        left = (max_iters - step) * tokens_per_step / rate
        line = (f'step {step:>6}/{max_iters} | loss {loss:.4f} | lr {lr:.2e} | norm {norm.item():6.2f} | {rate:>9,.0f} tok/s | '
                f'MFU {rate * flops / peak:4.0%} | ' + (f'{used / 2**30:.1f} GB | ' if used else '')
                + f'epoch {epoch:.2f} | left {datetime.timedelta(seconds=round(left))}')
        say('\r' + line[:columns].ljust(columns) if columns else line, end='' if columns else '\n')
        load = net.expert_load() or {}
        log(step, loss=loss, lr=lr, grad_norm=norm.item(), tokens_per_s=rate, mfu=rate * flops / peak, memory=used, epoch=epoch,
            tokens=tokens_seen, seconds=seconds, **load)

if not sound():
    say(end='\n' if columns else '')
    good = f'the last good checkpoint is {latest}, of step {saved_step}' if os.path.exists(latest) else 'no checkpoint was made yet'
    fail(f'the loss or its gradient is not a finite number any more at step {step}; {good}. Try a lower --learning_rate, a longer '
         '--warmup_iters, or --dtype=float32')
for line in trace.end() if trace else ():
    say(line)
say(f'done: {step} steps, {tokens_seen:,} tokens, {datetime.timedelta(seconds=round(seconds))} of training; best val loss '
    f'{best_loss:.4f} in {best}\nto read what it writes: python sample.py --out_dir={out_dir}')
leave()
