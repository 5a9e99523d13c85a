"""Trains a model: one explicit loop, read from top to bottom.

    python train.py                                       # the dataset prepared last, on this machine
    python train.py config/quick.py --max_iters=1000      # a recipe, one thing changed
    torchrun --nproc_per_node=2 train.py                  # two processes share each batch

    settings ─► data ─► model ─► [ step: forward, backward, clip, update, clear ] ─► out_dir/
                                 [ every eval_interval: evaluate, save          ]    ckpt.pt, best.pt,
                                                                                     metrics.jsonl

A run that was stopped, by Ctrl-C or by kill -9, goes on where it was: say the same command again.
On a CPU it then ends with the very bits it would have had. Nothing but the step decides what
happens in it: its data, its dropout, its learning rate.

Behind its steps stand, in mambino/train/: begin.py, building.py and defaults.py (what a run begins
from), identity.py (which text it knows), precision.py and memory.py (in which numbers it computes,
and how much at once), compiling.py and recovery.py (torch.compile; memory that does not suffice),
loader.py, batches.py and order.py (which tokens), processes.py, sharding.py and experts.py (one or
many), progress.py (counters and checkpoints), evaluation.py, metrics.py and log.py (what is
measured, said and noted).
"""
import datetime
import math
import os
import shlex
import sys
from contextlib import suppress
from functools import partial

# libgomp's threads wait for each other by spinning, which on a busy machine keeps the core from the
# thread they wait for. Letting go after some microseconds costs nothing on an idle machine; beside
# one busy process steps are 2 to 10 times faster.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

# A card's memory in pieces that grow: the allocator leaves fewer holes. Windows has no such pieces.
if sys.platform == 'linux' and 'PYTORCH_CUDA_ALLOC_CONF' not in os.environ:
    os.environ.setdefault('PYTORCH_ALLOC_CONF', 'expandable_segments:True')

from mambino.configurator import configure, fail, find_settings, typed
from mambino.console import end_quietly, go_on_without_stdout

# --- what and where
out_dir = 'out'             # checkpoints and the log of this run
dataset = ''                # a folder in data/, or several and their shares: code:0.6,docs:0.4;
                            # '' is the one prepared last
vocab_size = 0              # only for a bare .bin without meta.json
data_dtype = 'int32'        # only for a bare .bin: 'int32', or nanoGPT's 'uint16'
init_from = 'auto'          # 'auto': go on with out_dir's run if it has one; 'resume': it must
                            # have one; 'scratch': begin anew; another out_dir, or hf:folder (of
                            # transformers): begin with the weights there, to fine-tune them
eval_only = False           # evaluate out_dir's checkpoint, or a model that init_from names, and end
report = None               # --report: write what there is to see of out_dir's run, while it is going
                            # on too, and end: its curves, settings and samples, as
                            # out_dir/report.html; or as the file named here, .html or .png
# --- model (a 0 is filled in: sizes by the machine, the rest as the model's own file says)
model = 'mamba'             # 'mamba', 'gpt' or 'hybrid'
size = ''                   # '50m', '150m' or '400m' parameters: layers and width that suit;
                            # '' is by the machine
n_layer = 0
n_embd = 0                  # width
block_size = 0              # tokens of context in training
dropout = 0.0               # 0.1 to 0.2 where the data is small and passes several times
tie_embeddings = True       # one matrix for input and output embedding
n_head = 0                  # attention (gpt, hybrid)
n_kv_head = 0               # fewer key/value heads than heads make the cache smaller
intermediate_size = 0       # inner width of the MLP; a Mamba has one after each mixer if this is not 0
window = -1                 # attend to so many last tokens; 0: all; -1: the model's default
rope_theta = 10000.0        # base of the rotary positions: smaller tells near ones apart more
n_expert = 0                # gpt: experts in the place of each MLP (sparse MoE); 0: one MLP
n_expert_active = 2         # of them each token takes so many
capacity_factor = 1.25      # in training an expert takes at most so many times its even share
                            # of the tokens; 0: no limit
aux_loss = 0.01             # weight of the loss that evens out the experts' load
z_loss = 0.001              # weight of the loss that keeps the router's logits small
qk_norm = None              # normalise queries and keys: steadier at high rates; None: yes in a new gpt,
                            # no in others
version = 2                 # Mamba-2, or 1, or 3, whose state turns
state_size = 0              # size of the SSM's state per channel; 0: on a CPU 32 up to a width of 128,
                            # else the model's own
n_groups = 1                # heads that share B and C in Mamba-2 and -3
mimo_rank = 1               # Mamba-3: inputs that a head writes into its state at once; more learn more from a
                            # token, and take as many times longer in the recurrence
rope_fraction = 0.5         # Mamba-3: part of the state that turns, which keeps count of what repeats; 1.0: all
head_norm = False           # Mamba-3: normalise each head before its gate; in a hybrid it always is
layout = ''                 # hybrid: 'sequential' or 'parallel', see model_hybrid.py
layers = ''                 # hybrid: what its layers mix by, by turns: 'b' Mamba and attention, 'm' or 'a' one
                            # of the two, 'd' Gated DeltaNet; 'ddda' is attention in each fourth; '' is b
key_heads = 0               # hybrid's DeltaNet: heads of queries and keys; 0: each head has its own
delta_max = 1.0             # hybrid's DeltaNet: up to 2 lets a state turn over, which counts parity
gate = True                 # hybrid: token-adaptive branch weights
branch_norm = True          # hybrid: normalise each branch
low_rank = 0                # hybrid: rank of the projections, 0 is full
objective = 'next'          # token; or tokens that are hidden (diffusion): 'masked', anywhere in a window, 'block', in
                            # one block after another. What it writes is uncovered by steps, and holes can be filled
block_length = 0            # block: tokens of a block; 0: 16
share_projections = True    # masked, block: a Mamba's two directions have one in_proj and one out_proj
carry_state = False         # a Mamba of the next token: windows follow one another, and each begins with the state in
                            # which the one before ended, so that it learns to use what is far back
max_weight = 0.0            # masked, block: in training a hidden token's loss counts at most so much; 0: as in
                            # the bound that is evaluated
# --- adapter: a small part that is trained beside a model that stays as it is, that of --init_from
adapter = ''                # 'lora', or 'prefix': a learned beginning; '' trains all weights
lora_rank = 8
lora_alpha = 16.0           # the change counts lora_alpha / lora_rank times
lora_dropout = 0.0
lora_targets = ''           # the matrices that get one: q_proj,v_proj;
                            # '': all projections but keys', and of a Mamba those that go in
prefix_length = 16          # tokens that the beginning stands for
# --- batch
batch_size = 0              # sequences computed at once; 0: what the memory, or `vram`, allows
gradient_checkpointing = None  # compute each layer again in the backward pass: a third slower,
                               # far less memory; None: as memory asks
vram = 'auto'               # GB of memory to plan for; auto: what is free on the device
gradient_accumulation_steps = 0  # such micro-batches in one step, over all processes;
                                 # 0: from tokens_per_step
tokens_per_step = 0         # batch_size * block_size * gradient_accumulation_steps,
                            # if those are not given
# --- optimizer
optimizer = ''              # 'adamw', or 'muon': Muon on the hidden matrices and AdamW on the rest;
                            # '': muon for a new model of no named size on a CPU, else adamw
learning_rate = 0.0         # the peak; 0: by the optimizer, and far less for a model to tune
max_iters = 0               # steps in all; 0: by the machine. A model of hf:folder needs none to be used:
                            # sample.py, export.py and serve.py take --out_dir=hf:folder
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0             # largest norm of the gradient; 0: no limit
# --- learning rate over time
schedule = ''               # 'cosine', or 'wsd': warm-up, stable, and over the last
                            # decay_fraction linear decay; '': wsd for such a model as muon's, else cosine
warmup_iters = -1           # -1: a tenth of max_iters, at most 100
lr_decay_iters = 0          # where the decay ends; 0: max_iters
min_lr = 0.0                # the rate at the end
decay_fraction = 0.7        # for 'wsd'
# --- evaluation, log, checkpoints
eval_interval = 250         # steps between evaluations; each also saves ckpt.pt,
                            # and best.pt when it is the best so far
eval_iters = 0              # sequences (of block_size) of the val split in an evaluation, always
                            # the same; 0: all
patience = 0                # stop after so many evaluations without a better loss; 0: never
log_interval = 10           # steps between lines of the log
save_minutes = 10.0         # minutes after which ckpt.pt is saved between evaluations, too; 0: never
sample_interval = 0         # steps between samples of text; 0: none
sample_start = '\n'         # their prompt
tensorboard = False         # needs: pip install tensorboard
wandb_log = False           # needs: pip install wandb
wandb_project = 'mambino'
wandb_run_name = ''
# --- machine
device = 'auto'             # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
parallel = 'ddp'            # with several processes: 'ddp', or 'fsdp': each keeps a share
                            # of the weights, gradients and optimizer
expert_parallel = 1         # processes that share a layer's experts: each has n_expert / expert_parallel
dtype = 'auto'              # 'float32', 'bfloat16', 'float16' (with a loss scaler);
                            # auto: what a GPU's hardware has; on a CPU the faster one of the
                            # first two, as measured with this model; a run that goes on keeps its own
profile = 0                 # trace so many steps: where their time goes,
                            # and a file for chrome://tracing or Perfetto
compile = None              # torch.compile: a minute or more of waiting for faster steps; falls back where it
                            # does not work; None: on a card, in runs that are long enough to earn it
seed = 1337

# read before torch is there: a typo is told at once
end_quietly()  # by Ctrl-C; until the loop there is nothing to save
go_on_without_stdout()  # the model is worth more than its log on the screen
explicit = configure(globals())  # {name: value} of what config files and flags name
if report:
    from mambino.train.report import write_report
    write_report(out_dir, report, __file__)
    raise SystemExit

import numpy as np
import torch

from mambino import machine
from mambino.holes import hiding
from mambino.train import batches, begin, building, carried, compiling, identity, memory, precision, processes, recovery
from mambino.train.evaluation import evaluate, show_sample
from mambino.train.loader import Loader
from mambino.train.log import no_log, open_log
from mambino.train.metrics import Report, StatusLine, Trace, in_words, introduction, remedies
from mambino.train.processes import leave, say, summed
from mambino.train.progress import (
    Clock,
    Health,
    best_of,
    catch_stop_signals,
    end_unfinished,
    latest_of,
    require_saved,
    save_at_last,
    save_run,
)
from mambino.weights import adapters, checkpoint


def get_lr(step, schedule, peak, end_lr, warmup_iters, decay_iters, decay_fraction):
    """The learning rate of a step: it rises for warmup_iters steps, and falls until decay_iters."""
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    fall_start = warmup_iters
    if schedule == 'wsd':
        fall_start = max(warmup_iters, decay_iters - int(decay_fraction * decay_iters))
    done = min(1.0, max(0.0, (step - fall_start) / max(1, decay_iters - fall_start)))
    height = 0.5 * (1 + math.cos(math.pi * done)) if schedule == 'cosine' else 1 - done
    return end_lr + (peak - end_lr) * height


def set_lr(optimizers, lr):
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
    return lr


def step_seed(seed, step, rank):
    """The seed of a step: dropout, too, depends on the step alone."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def clip_gradients(net, optimizers, scaler, grad_clip):
    """Scales the gradient down to the norm grad_clip, if it is larger. Returns the norm it had."""
    processes.join_gradients(net, scaler.is_enabled())
    for opt in optimizers:
        scaler.unscale_(opt)  # of fp16; else there is nothing to do
    return processes.clip(net, grad_clip or math.inf)


def update_weights(optimizers, scaler, norm):
    """A step of each optimizer; if gradients overflowed in fp16, of none: then the scale falls."""
    if not scaler.is_enabled() or norm.isfinite():
        for opt in optimizers:
            scaler.step(opt)
    scaler.update()


# --- what the run begins from, and what its settings come to
settings = {name: globals()[name] for name in find_settings(globals())}
settings['device'] = processes.start(device, parallel, expert_parallel)  # one, or those that torchrun starts
begin.refuse_dataset(out_dir)
if not eval_only:
    processes.hold(out_dir)  # one run at a time; who only reads needs no leave
origin = begin.find_origin(settings, explicit)  # a run that goes on, a model to tune, or nothing
begin.check_settings(settings, origin)
data = begin.open_data(settings, explicit, origin)
begin.fill_unset(settings, explicit, origin, data)  # sizes and steps that were left to the machine
carried.check(settings, data)

# --- the model, and how many sequences of a step it computes at once
net, adapter_record = begin.build_model(settings, explicit, origin, data)
precision.choose(settings, explicit, origin, net)
compiling.choose(settings, net, adapter_record, step=origin.step)
micro_batch, memory_line = memory.choose_micro_batch(settings, net, adapter_record)
globals().update(settings)  # here, and only here, those that were left unset get their values
rank, world = processes.RANK, processes.WORLD
sequences = tokens_per_step // block_size // world  # of a step, this process's
net.gradient_checkpointing = gradient_checkpointing
processes.place(net, device, dtype)
if origin.in_shards:
    processes.load_weights(net, origin.ckpt)

# --- the optimizers, and how far the run is
device_type = device.partition(':')[0]
is_fused = device_type in ('cpu', 'cuda')
optimizers = building.build_optimizers(
    net, optimizer, learning_rate, weight_decay, betas=(beta1, beta2), fused=is_fused, dtype=dtype)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')  # they would vanish unscaled
data_record = identity.record(data, settings)
progress = begin.restore(origin, [] if eval_only else optimizers, scaler, out_dir, data_record)
lr_of = partial(
    get_lr, schedule=schedule, peak=learning_rate, end_lr=min_lr, warmup_iters=warmup_iters,
    decay_iters=lr_decay_iters or max_iters, decay_fraction=decay_fraction)
carried.prepare(net, data, settings, sequences, origin.ckpt)
clock = Clock(progress, device_type)
save = partial(
    save_run, clock=clock, net=net, optimizers=optimizers, scaler=scaler, progress=progress, settings=settings,
    tokenizer=data.tokenizer, adapter=adapter_record, data=data_record, begun=origin.begun(settings, explicit))
latest, best = latest_of(out_dir), best_of(out_dir)
is_new = origin.ckpt is None
del origin  # its tensors would stay in memory for the whole run
if device_type == 'cuda':
    machine.compute_exactly()
    recovery.tell_of_a_lost_card(progress, latest)

# --- what it is, for its user; an evaluation alone, and a run that is complete, end here
for line in introduction(settings, net, data, adapter_record, micro_batch, memory_line, progress):
    say(line)
if eval_only:
    rows = eval_iters if 'eval_iters' in explicit else 0
    try:
        result = evaluate(net, data, block_size, rows, device, dtype)
    except batches.Changed as changed:
        fail(f'{changed}: was changed while it was read; run the same command again')
    say(f'{init_from if is_new else out_dir}, step {progress.step}:', *in_words(result))
    leave()
if progress.step:
    say(f'going on from {latest} at step {progress.step}')
if progress.step >= max_iters or 0 < patience <= progress.bad_evals:
    limit = 'max_iters' if progress.step >= max_iters else 'patience'
    say(f'this run has made its {progress.step} steps: raise --{limit} to go on, '
        'or begin anew with --init_from=scratch')
    leave()

# --- the log; a run begun anew on purpose keeps the old one's files aside
log = no_log
processes.hold(out_dir, make=True)
if is_new and init_from != 'scratch' and os.path.exists(latest):
    fail(f'{out_dir}: another run has begun there meanwhile; run the same command again')
if rank == 0:
    try:
        if is_new and any(map(os.path.exists, (latest, best) if init_from == 'scratch' else ())):
            log_file = os.path.join(out_dir, 'metrics.jsonl')
            # ckpt.pt last: after a kill between them the rest follows
            ending = checkpoint.set_aside(checkpoint.shards_of(latest), best, log_file, latest)
            say(f'the run that was there is set aside: its files end in {ending} now')
        wandb_arguments = dict(
            project=wandb_project, name=wandb_run_name or None, dir=out_dir, config=settings)
        log = open_log(out_dir, progress.step, tensorboard, wandb_arguments if wandb_log else None)
    except OSError as error:
        fail(f'{out_dir}: cannot be written to: {error.strerror}; choose another --out_dir')
status = StatusLine()
journal = Report(
    log, status, progress, max_iters, tokens_per_step, epoch_tokens=data.tokens['train'],
    flops=net.flops_per_token(block_size) - adapters.flops_saved(net),
    peak_flops=machine.peak_flops(device, dtype) * world, device=device, remedies=remedies(settings))

# --- what the loop needs
loader = Loader(data, block_size, seed, device, sequences, rank, world, hiding(net.config, max_weight), net.carried)
loader.seek(progress.tokens_seen, micro_batch)
wrapped = net  # compiled, and joined to the other processes' gradients
if compile:
    wrapped = compiling.compiled(net, loader, settings, progress.tokens_seen)
wrapped = processes.shared(wrapped, device)
cache_weights = not processes.SHARDED  # rounded ones stay from layer to layer
trace = Trace(os.path.join(out_dir, 'trace.json'), profile if rank == 0 else 0, device_type)
health = Health(device, scaler)
stop_signals = catch_stop_signals()  # the first asks for a stop after this step
samples = sample_interval > 0 and data.tokenizer and (rank == 0 or processes.TOGETHER)
sampled = progress.step  # the step of the last sample
if device_type == 'cuda':
    torch.cuda.reset_peak_memory_stats()
net.train()
clock.start()

# --- the loop
while True:
    step = progress.step
    ended = step >= max_iters
    if step and step != progress.evaluated and (step % eval_interval == 0 or ended):
        with clock.paused(), suppress(batches.Changed):  # which ends the run below
            result = evaluate(net, data, block_size, eval_iters, device, dtype)
            health.add(result['val_loss'])
            health.require(progress, latest, status)  # a model that was just ruined is not saved
            improved = progress.add_evaluation(result, lr_of(step))
            ended = ended or 0 < patience <= progress.bad_evals
            journal.evaluation(result, improved, data.shares(progress.tokens_seen // block_size, seed))
            # best first: after a kill between the two the run comes back to this step
            save([best, latest] if improved else [latest], shards=[] if ended else [latest])
    if samples and step % sample_interval == 0 and step != sampled:
        with clock.paused():
            sampled = show_sample(net, data.tokenizer, sample_start, step, seed, device, dtype)
    is_stopped, is_due = summed(len(stop_signals) + bool(data.changed()), progress.is_due(save_minutes))
    if ended or is_stopped:
        break
    if is_due and health.is_good():
        save([latest], shards=[latest])

    lr = set_lr(optimizers, lr_of(step))
    logged = (step + 1) % log_interval == 0 or step + 1 in (1, max_iters)
    if logged:
        net.expert_load()  # what is counted from here is of this step, as its loss is
    torch.manual_seed(step_seed(seed, step, rank))
    total_loss = torch.zeros((), device=device)
    is_exhausted = False
    try:
        with machine.rounded_once(device, dtype):  # the weights, which do not change within a step
            for micro_step in range(loader.micro_steps):
                with trace.part('data'):
                    *batch, weight = loader.next()  # x, y (B, T) each; the next ones are fetched meanwhile
                if world > 1:  # gradients travel once a step; with fsdp each time, as shares
                    wrapped.require_backward_grad_sync = micro_step + 1 == loader.micro_steps
                with trace.part('forward'), machine.autocast(device, dtype, cache_weights):
                    loss = wrapped(*batch)[1] * weight / loader.micro_steps
                with trace.part('backward'):
                    scaler.scale(loss).backward()
                total_loss += loss.detach()
    except batches.Changed:
        break
    except (RuntimeError, MemoryError) as error:
        is_exhausted = recovery.require_exhausted(error)  # else it is raised again
    if is_exhausted:  # the step again, in smaller micro-batches; the error, which holds tensors, is gone
        loss = batch = None
        recovery.take_smaller_micro_batches(settings, net, loader, progress.tokens_seen)
        continue
    with trace.part('optimizer'), recovery.no_way_back(progress, latest):
        norm = clip_gradients(net, optimizers, scaler, grad_clip)
        update_weights(optimizers, scaler, norm)
        net.zero_grad(set_to_none=True)
    progress.advance(tokens_per_step)
    health.add(total_loss, norm)
    trace.step()
    if logged:
        health.require(progress, latest, status)
        clock.read()
        journal.step(summed(total_loss.item())[0] / world, lr, norm.item(), net.expert_load())

# --- the end
clock.read()
saved_at = latest
if progress.saved != step or (processes.SHARDED and not ended):  # which was in shards
    saved_at = health.is_good() and save_at_last(save, progress, out_dir, stop_signals if ended else None)
status.end()
if not ended:  # by a signal, or because the data is not what it was
    end_unfinished(out_dir, step, saved_at, explicit, data.changed(), stop_signals)
require_saved(out_dir, saved_at)
if 0 < patience <= progress.bad_evals:
    say(f'stopping: {patience} evaluations without a better loss than {progress.best_loss:.4f}')
trace.end()
say(f'done: {step} steps, {progress.tokens_seen:,} tokens, '
    f'{datetime.timedelta(seconds=round(progress.seconds))} of training; '
    f'best val loss {progress.best_loss:.4f} in {best}')
talks = any(part.is_masked for part in data.parts)  # of conversations the answers alone are learned
say(typed(f'to read what it writes: python sample.py --out_dir={shlex.quote(out_dir)}'
          + ' --interactive=True --chat=True' * talks))
leave()
