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
import json
import math
import os
import shutil
import signal
import sys
import time

# libgomp's threads wait for each other by spinning, which on a busy machine keeps the core from the thread they wait for.
# Letting go after some microseconds costs nothing on an idle machine; beside one busy process steps are 2 to 10 times faster.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import batches
import checkpoint
from bench import memory, peak_flops
from checkpoint import MODELS
from configurator import configure, fail, find_settings
from sample import Writer, encode_prompt, generate

# --- what and where
out_dir = 'out'             # checkpoints and the log of this run
dataset = ''                # a folder in data/; '' is the one prepared last
vocab_size = 0              # only for a bare .bin without meta.json
data_dtype = 'int32'        # only for a bare .bin: 'int32', or nanoGPT's 'uint16'
init_from = 'auto'          # 'auto': go on with out_dir's run if it has one; 'resume': it must have one; 'scratch': begin anew
eval_only = False           # evaluate out_dir's checkpoint, and end
# --- model (a 0 is filled in: sizes by the machine, the rest as the model's own file says)
model = 'mamba'             # 'mamba', 'gpt' or 'hybrid'
n_layer = 0
n_embd = 0                  # width
block_size = 0              # tokens of context in training
dropout = 0.0               # 0.1 to 0.2 where the data is small and passes several times
tie_embeddings = True       # one matrix for input and output embedding
n_head = 0                  # attention (gpt, hybrid)
n_kv_head = 0               # fewer key/value heads than heads make the cache smaller
intermediate_size = 0       # inner width of the MLP
window = -1                 # attend to so many last tokens; 0: all; -1: the model's default
qk_norm = False             # normalise queries and keys: steadier at high learning rates
version = 2                 # Mamba-2, or 1
state_size = 0              # size of the SSM's state per channel
n_groups = 1                # heads that share B and C in Mamba-2
layout = ''                 # hybrid: 'sequential' or 'parallel', see model_hybrid.py
gate = True                 # hybrid: token-adaptive branch weights
branch_norm = True          # hybrid: normalise each branch
low_rank = 0                # hybrid: rank of the projections, 0 is full
# --- batch
batch_size = 0              # sequences computed at once: as many as memory holds; 0: as the machine allows
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
dtype = 'auto'              # 'float32', 'bfloat16', 'float16' (with a loss scaler); auto: the fastest that is safe here
compile = False             # torch.compile: a minute of waiting for faster steps; falls back where it does not work
seed = 1337


explicit = configure(globals())
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))      # until the loop begins there is nothing to save
names = list(find_settings(globals()))
LOCAL = 'out_dir init_from eval_only device compile tensorboard wandb_log wandb_project wandb_run_name'.split()  # not of the run

# --- processes: one, or those that torchrun starts
rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                           (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
master = rank == 0
device = checkpoint.choose_device(device)
if device == 'cuda' and world > 1:
    device = f'cuda:{local_rank}'
kind_of_device = device.partition(':')[0]
if kind_of_device == 'cuda':
    torch.cuda.set_device(device)
if world > 1:
    dist.init_process_group('nccl' if kind_of_device == 'cuda' else 'gloo')


def say(*words, **how):
    if master:
        print(*words, flush=True, **how)


def summed(*values):
    """The sums over all processes of some numbers."""
    if world > 1:
        total = torch.tensor(values, dtype=torch.float64 if kind_of_device == 'cpu' else torch.float32, device=device)
        dist.all_reduce(total)
        return total.tolist()
    return list(values)


# --- go on with a run, or begin one
if init_from not in ('auto', 'resume', 'scratch'):
    fail(f'init_from={init_from} must be auto, resume or scratch')
latest, best, log_file = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt', 'metrics.jsonl'))
ckpt = None
if eval_only or init_from == 'resume' or (init_from == 'auto' and os.path.exists(latest)):
    ckpt = checkpoint.load(out_dir if eval_only else latest)
    for name, value in ckpt['settings'].items():
        if name not in explicit and name not in LOCAL and name in names:
            globals()[name] = value
    for name in explicit:
        was = (ckpt['config'] | dict(model=ckpt['kind'], optimizer=ckpt['settings']['optimizer'])).get(name, explicit[name])
        if was != explicit[name] and name not in ('dropout', 'vocab_size'):
            fail(f'{latest} holds a run with {name}={was}, not {explicit[name]}: leave the setting out to go on with it, choose '
                 'another --out_dir, or begin anew with --init_from=scratch')

for what, values in {
    'one of ' + ', '.join(MODELS): dict(model=model in MODELS),
    'adamw or muon': dict(optimizer=optimizer in ('adamw', 'muon')),
    'cosine or wsd': dict(schedule=schedule in ('cosine', 'wsd')),
    'more than 0': {name: globals()[name] > 0 for name in 'learning_rate eval_interval log_interval n_groups'.split()},
    '-1 or more': dict(warmup_iters=warmup_iters >= -1, window=window >= -1),
    'at least 0 and below 1': {name: 0 <= globals()[name] < 1 for name in 'dropout beta1 beta2'.split()},
    'more than 0 and at most 1': dict(decay_fraction=0 < decay_fraction <= 1),
    'from 0 to 2**31': dict(seed=0 <= seed < 2**31),
    '0 or more': {name: globals()[name] >= 0 for name in '''vocab_size n_layer n_embd block_size n_head n_kv_head state_size max_iters
        intermediate_size low_rank batch_size gradient_accumulation_steps tokens_per_step weight_decay grad_clip lr_decay_iters
        min_lr eval_iters patience sample_interval'''.split()},
}.items():
    for name, ok in values.items():
        if not ok:
            fail(f'{name}={globals()[name]} must be {what}')

# --- data
dataset = dataset or batches.newest_dataset()
data = batches.open_dataset(dataset, vocab_size, data_dtype)
tok = data.tokenizer
if ckpt and (ckpt['tokenizer'] and checkpoint.tokenizer_of(ckpt).sha256()) != (tok and tok.sha256()):
    fail(f'dataset {dataset} has another tokenizer than the run in {out_dir}: name the dataset that run was trained on '
         f'({ckpt["settings"]["dataset"]}), or choose another --out_dir')

# --- what the zeros stand for
gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30 if kind_of_device == 'cuda' else 0
if kind_of_device == 'cpu':    # some minutes on a laptop
    sizes = dict(n_layer=6, n_embd=256, block_size=256, batch_size=16, tokens_per_step=4096, max_iters=1000)
elif gigabytes < 20:           # 8 to 16 GB, or Apple's
    sizes = dict(n_layer=12, n_embd=512, block_size=512, batch_size=16, tokens_per_step=2**15, max_iters=5000)
else:
    sizes = dict(n_layer=12, n_embd=768, block_size=1024, batch_size=16, tokens_per_step=2**17, max_iters=10000)
if not block_size:             # a small text need not fill a large window
    shortest = min(data.tokens.values()) - 1
    block_size = min(sizes['block_size'], 1 << max(3, shortest.bit_length() - 1))
n_layer, n_embd = n_layer or sizes['n_layer'], n_embd or sizes['n_embd']
max_iters = max_iters or sizes['max_iters']
n_head = n_head or max(n for n in range(1, max(1, n_embd // 64) + 1) if n_embd % n == 0)
if not tokens_per_step and gradient_accumulation_steps:
    tokens_per_step = (batch_size or sizes['batch_size']) * block_size * gradient_accumulation_steps
elif not tokens_per_step:
    tokens_per_step = sizes['tokens_per_step']
    whole = (batch_size or 1) * block_size * world
    tokens_per_step = -(-tokens_per_step // whole) * whole
batch_size = batch_size or sizes['batch_size']
if tokens_per_step % block_size:
    fail(f'tokens_per_step={tokens_per_step} must be a multiple of block_size={block_size}, such as '
         f'{max(1, round(tokens_per_step / block_size)) * block_size}')
if gradient_accumulation_steps and tokens_per_step != batch_size * block_size * gradient_accumulation_steps:
    fail(f'tokens_per_step={tokens_per_step} is not batch_size * block_size * gradient_accumulation_steps = '
         f'{batch_size * block_size * gradient_accumulation_steps}: leave out one of them')
gradient_accumulation_steps = 0  # tokens_per_step says it; a later run may cut the same step otherwise
sequences = tokens_per_step // block_size                   # of a step, over all processes
if sequences % world:
    fail(f'{sequences} sequences a step cannot be shared by {world} processes: set --tokens_per_step to a multiple of '
         f'{block_size * world}')
micro_batch = max(n for n in range(1, sequences // world + 1) if sequences // world % n == 0 and n <= max(batch_size, 1))
micro_steps = sequences // world // micro_batch
warmup_iters = warmup_iters if warmup_iters >= 0 else min(100, max_iters // 10)
dtype = checkpoint.choose_dtype(dtype, device)
for split in data.tokens:
    if data.tokens[split] <= block_size:
        fail(f'{data.paths[split]}: has {data.tokens[split]} tokens, and one window takes block_size + 1 = {block_size + 1}: lower '
             '--block_size, or prepare more text')

# --- model
fields = {kind: {field.name for field in dataclasses.fields(config)} for kind, (_, config) in MODELS.items()}
for name in explicit:          # a config file may serve several models, a flag is meant
    if name not in fields[model] and any(name in f for f in fields.values()) and any(f'--{name}=' in a for a in sys.argv):
        fail(f'{name} means nothing to a {model} model; leave it out')
if ckpt:
    config = ckpt['config'] | dict(dropout=dropout)
    if data.vocab_size > config['vocab_size']:
        fail(f'dataset {dataset} has a vocabulary of {data.vocab_size}, the run in {out_dir} one of {config["vocab_size"]}')
else:
    config = {name: globals()[name] for name in names if name in fields[model] and globals()[name] != ''
              and (type(globals()[name]) is not int or globals()[name] != (-1 if name == 'window' else 0))}
    config['vocab_size'] = -(-data.vocab_size // 64) * 64 if data.vocab_size > 1000 else data.vocab_size  # a rounder matrix
torch.manual_seed(seed)
try:
    net = checkpoint.build(model, config)
except ValueError as error:
    fail(error)
if ckpt:
    net.load_state_dict(ckpt['weights'])
net.to(device)

# --- optimizers
groups = net.optim_groups(weight_decay, muon=optimizer == 'muon')
optimizers = [torch.optim.AdamW([g for g in groups if g['kind'] == 'adamw'], lr=learning_rate, betas=(beta1, beta2),
                                fused=kind_of_device in ('cpu', 'cuda'))]
if optimizer == 'muon':
    optimizers.append(torch.optim.Muon([g for g in groups if g['kind'] == 'muon'], lr=learning_rate,
                                       adjust_lr_fn='match_rms_adamw'))
scaler = torch.amp.GradScaler(kind_of_device, enabled=dtype == 'float16')  # fp16 gradients would vanish unscaled
step, tokens_seen, best_loss, bad_evals, evaluated, seconds, history = 0, 0, math.inf, 0, -1, 0.0, []
if ckpt:
    for opt, state in zip(optimizers, ckpt['optimizers']):
        opt.load_state_dict(state)
        for group in opt.param_groups:  # what was changed for this part of the run holds, not what was saved
            group.update({'betas': (beta1, beta2)} if 'betas' in group else {})
            group['weight_decay'] = weight_decay if group['weight_decay'] else 0.0
    scaler.load_state_dict(ckpt['scaler']) if ckpt['scaler'] else None
    step, tokens_seen, best_loss, bad_evals, evaluated, seconds, history = (ckpt['counters'][name] for name in (
        'step', 'tokens_seen', 'best_loss', 'bad_evals', 'evaluated', 'seconds', 'history'))
del ckpt  # its tensors would stay in memory for the whole run


def get_lr(step):
    """The learning rate of a step, counted from 0."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    end = lr_decay_iters or max_iters
    begin = warmup_iters if schedule == 'cosine' else max(warmup_iters, end - int(decay_fraction * end))
    done = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == 'cosine' else 1 - done
    return min_lr + (learning_rate - min_lr) * fall


def fetch(step, micro):
    """This process's micro-batch `micro` of a step: x, y (micro_batch, T) on the device."""
    first = step * sequences + rank * (sequences // world) + micro * micro_batch
    numbers = batches.np.arange(first, first + micro_batch)
    pair = data.batch(numbers, block_size, seed)
    if kind_of_device == 'cuda':  # pinned memory goes over while the GPU still works on the last batch
        return [t.pin_memory().to(device, non_blocking=True) for t in pair]
    return [t.to(device) for t in pair]


@torch.no_grad()
def evaluate():
    """{'val_loss', 'perplexity', 'bits_per_byte'} on the val split, the same tokens each time."""
    net.eval()
    nats, count, size = 0.0, 0, 0
    for x, y in data.val_batches(batch_size, block_size, eval_iters, rank, world):
        with checkpoint.autocast(device, dtype):
            loss = net(x.to(device), y.to(device))[1]
        n = int((y >= 0).sum())
        nats, count = nats + loss.item() * n, count + n
        if data.token_bytes is not None:
            size += int(data.token_bytes[y[y >= 0].numpy()].sum())
    net.train()
    nats, count, size = summed(nats, count, size)
    loss = nats / count
    return dict(val_loss=loss, perplexity=math.exp(min(loss, 700)),
                bits_per_byte=nats / math.log(2) / size if size else None)


def show_sample():
    """A piece of text from the model as it is; draws from a generator of its own."""
    net.eval()
    writer = Writer(tok)
    generator = torch.Generator(device).manual_seed(seed)
    for ids in generate(net, encode_prompt(tok, sample_start), 1, 200, tok.vocab_size, temperature=0.8, top_k=200,
                        generator=generator):
        writer.feed(int(ids))
    net.train()
    say(f'--- sample at step {step}\n{sample_start}{writer.text}\n---')


def save(*paths):
    """Writes the run as it is to each path. A disk that is full does not stop the training; returns whether all was saved."""
    if not master:
        return True
    contents = dict(
        kind=model, config=checkpoint.config_of(net), weights=net.state_dict(),
        optimizers=[opt.state_dict() for opt in optimizers], scaler=scaler.state_dict(), rng=torch.get_rng_state(),
        counters=dict(step=step, tokens_seen=tokens_seen, best_loss=best_loss, bad_evals=bad_evals, evaluated=evaluated,
                      seconds=seconds, history=history),
        settings={name: globals()[name] for name in names if name not in LOCAL},
        tokenizer=tok.state() if tok else None,
        metadata=dict(parameters=net.num_params(), parameter_bytes=sum(p.numel() * p.element_size() for p in net.parameters()),
                      step=step, tokens_seen=tokens_seen, best_loss=best_loss, recent=history[-20:], device=device,
                      torch=str(torch.__version__), seconds=seconds, time=time.strftime('%Y-%m-%d %H:%M:%S')))
    try:
        for path in paths:
            checkpoint.save(path, contents)
        return True
    except (OSError, RuntimeError) as error:
        say(f'warning: {path} could not be saved ({str(error).splitlines()[0]}); the one before it is untouched')
        return False


# --- the log
def logged_step(line):
    """The step of a line of metrics.jsonl; infinite if a kill or a full disk cut it short."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return math.inf


tb = run = None
if master:
    try:
        os.makedirs(out_dir, exist_ok=True)
        lines = []
        if step and os.path.exists(log_file):   # what a killed run logged after its last checkpoint comes again
            with open(log_file, encoding='utf-8') as f:
                lines = [line for line in f if logged_step(line) <= step]
        elif init_from == 'scratch':            # begun anew on purpose; the old run's files are kept aside
            for path in (latest, best, log_file):
                if os.path.exists(path) and not eval_only:
                    os.replace(path, path + '.old')
        if not eval_only:
            with open(log_file + '.tmp', 'w', encoding='utf-8') as f:
                f.writelines(lines)
            os.replace(log_file + '.tmp', log_file)
            log_lines = open(log_file, 'ab', buffering=0)
    except OSError as error:
        fail(f'{out_dir}: cannot be written to: {error.strerror}; choose another --out_dir')
    try:
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            tb = SummaryWriter(out_dir)
        if wandb_log:
            import wandb
            run = wandb.init(project=wandb_project, name=wandb_run_name or None, dir=out_dir,
                             config={name: globals()[name] for name in names})
    except ImportError as error:
        fail(f'{error.name} is not installed: pip install {error.name}, or leave out --tensorboard and --wandb_log')


def log(**values):
    """One line of metrics.jsonl, and the same to whoever else listens."""
    if master:
        try:
            log_lines.write((json.dumps(dict(step=step, **values)) + '\n').encode())
        except OSError as error:
            say(f'warning: {log_file} cannot be written to ({error.strerror}); training goes on')
        for name, value in values.items():
            if tb and isinstance(value, (int, float)):
                tb.add_scalar(name, value, step)
        if run:
            run.log(values, step=step)


say(f'{model}: {net.num_params() / 1e6:.2f}M parameters, {n_layer} layers of width {n_embd}, context {block_size}')
say(f'{data.name}: {data.tokens["train"]:,} tokens to train on, {data.tokens["val"]:,} to evaluate, vocabulary {data.vocab_size}')
say(f'{max_iters} steps of {tokens_per_step:,} tokens ({world} x {micro_steps} x {micro_batch} x {block_size}), '
    f'{max_iters * tokens_per_step / data.tokens["train"]:.1f} epochs; {device}, {dtype}, {optimizer}')

if eval_only:
    result = evaluate()
    say('step', step, *(f'{name} {value:.4f}' for name, value in result.items() if value is not None))
    sys.exit()
if step:
    say(f'going on from {latest} at step {step}')
if step >= max_iters:
    say(f'this run has made its {max_iters} steps: raise --max_iters to go on, or begin anew with --init_from=scratch')
    sys.exit()

# --- the loop
peak = peak_flops(device, dtype) * world
flops = net.flops_per_token(block_size)
fast = net                                                  # what computes the training steps
x, y = fetch(step, 0)
if compile:
    try:
        fast = torch.compile(net)
        with checkpoint.autocast(device, dtype):
            fast(x, y)[1].backward()
        net.zero_grad(set_to_none=True)
    except Exception as error:
        fast = net
        say(f'torch.compile does not work here ({type(error).__name__}); going on without')
if world > 1:
    fast = DistributedDataParallel(fast, device_ids=[local_rank] if kind_of_device == 'cuda' else None)

stopped = []                                                # signals that asked us to stop
for number in (signal.SIGINT, signal.SIGTERM):
    # the first asks for a stop after this step, a second one stops at once
    signal.signal(number, lambda n, _: (stopped.append(n), signal.signal(n, signal.SIG_DFL)))
columns = shutil.get_terminal_size((140, 24)).columns - 1 if sys.stdout.isatty() else 0  # one line that changes, or many
net.train()
begun = saved_step = step
watch = torch.zeros((), device=device)                      # a sum that any bad loss or gradient turns into nan
clock, clock_step = time.perf_counter(), step
while True:
    ended = step >= max_iters
    if (step % eval_interval == 0 or ended) and step and evaluated != step:
        if not math.isfinite(watch.item()):
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
        log(**result)
        say(('\n' if columns else '') + f'step {step}: ' + ', '.join(
            f'{name.replace("_", " ")} {value:.4f}' for name, value in result.items() if value is not None)
            + (' (best)' if better else ''))
        if not save(latest, *([best] if better else [])) and ended:
            fail(f'{out_dir}: the finished model could not be saved; free some space and run the same command again')
        saved_step = step
        clock, clock_step = time.perf_counter(), step
        if patience and bad_evals >= patience:
            say(f'stopping: {patience} evaluations without a better loss than {best_loss:.4f}')
            ended = True
    if sample_interval and step % sample_interval == 0 and step > begun and master and tok:
        show_sample()
        clock, clock_step = time.perf_counter(), step
    if ended:
        break
    if summed(len(stopped))[0] if world > 1 and (kind_of_device == 'cpu' or step % log_interval == 0) else world == 1 and stopped:
        seconds += time.perf_counter() - clock
        if math.isfinite(watch.item()) and (step == saved_step or save(latest)):
            say(('\n' if columns else '') + f'stopped at step {step}, saved {latest}; to go on: '
                + ('python train.py' if world == 1 else f'torchrun --nproc_per_node={world} train.py')
                + f' --init_from=resume --out_dir={out_dir}')
        sys.exit(128 + (stopped or [signal.SIGTERM])[0])

    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
    torch.manual_seed((seed * 2**40 + step * 2**10 + rank) % 2**63)  # dropout, too, depends on the step alone
    total = torch.zeros((), device=device)
    for micro in range(micro_steps):
        if world > 1:                                       # gradients travel once a step
            fast.require_backward_grad_sync = micro == micro_steps - 1
        with checkpoint.autocast(device, dtype):
            loss = fast(x, y)[1] / micro_steps
        x, y = fetch(*((step, micro + 1) if micro + 1 < micro_steps else (step + 1, 0)))
        scaler.scale(loss).backward()
        total += loss.detach()
    for opt in optimizers:
        scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    for opt in optimizers:
        scaler.step(opt)
    scaler.update()
    net.zero_grad(set_to_none=True)
    step += 1
    tokens_seen += tokens_per_step
    watch += total if dtype == 'float16' else total + norm  # the scaler skips steps of infinite gradients itself

    if step % log_interval == 0 or step == 1 or step == max_iters:
        if not math.isfinite(watch.item()):
            break
        loss = summed(total.item())[0] / world
        now = time.perf_counter()
        rate = (step - clock_step) * tokens_per_step / max(now - clock, 1e-9)
        seconds += now - clock
        clock, clock_step = now, step
        used, epoch = memory(device, peak=kind_of_device == 'cuda') or 0, tokens_seen / data.tokens['train']
        left = (max_iters - step) * tokens_per_step / rate
        line = (f'step {step:>6}/{max_iters} | loss {loss:.4f} | lr {lr:.2e} | norm {norm.item():6.2f} | {rate:>9,.0f} tok/s | '
                f'MFU {rate * flops / peak:4.0%} | ' + (f'{used / 2**30:.1f} GB | ' if used else '')
                + f'epoch {epoch:.2f} | left {datetime.timedelta(seconds=round(left))}')
        say('\r' + line[:columns].ljust(columns) if columns else line, end='' if columns else '\n')
        log(loss=loss, lr=lr, grad_norm=norm.item(), tokens_per_s=rate, mfu=rate * flops / peak, memory=used, epoch=epoch,
            tokens=tokens_seen, seconds=seconds)

if not math.isfinite(watch.item()):
    say(end='\n' if columns else '')
    good = f'the last good checkpoint is {latest}, of step {saved_step}' if os.path.exists(latest) else 'no checkpoint was made yet'
    fail(f'the loss or its gradient is not a finite number any more at step {step}; {good}. Try a lower --learning_rate, a longer '
         '--warmup_iters, or --dtype=float32')
say(f'done: {step} steps, {tokens_seen:,} tokens, {datetime.timedelta(seconds=round(seconds))} of training; best val loss {best_loss:.4f} in {best}\n'
    f'to read what it writes: python sample.py --out_dir={out_dir}')
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
