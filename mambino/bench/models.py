"""
How fast are the models on this machine, and how much memory do they take — beside what one would use instead?

    python bench.py                                                 # everything, some minutes on a small CPU
    python bench.py --models=gpt,mamba2 --sections=train --batch_size=4 --nanogpt=../nanoGPT --json=bench.json
    python bench.py --sections=train,length --plot=bench.png        # the figures as a picture, too
    python bench.py --sections= --time_to_loss=1.88 --rounds=1      # whole runs of train.py: seconds to that val loss

Five sections: `train` is whole training steps (forward, backward, AdamW); `layers` is forward and backward of two bare
Mamba-1 layers, since the peers are too slow for a whole model; `length` is training steps on ever longer sequences, at the same
tokens a step; `loss` is the cross-entropy over a large vocabulary alone; `sample` is reading a prompt and writing token by token.

Each contender (a model in a dtype) is a process of its own, so that its peak memory is its own. It warms up, then waits;
the processes take turns, one round each (A B C A B C …), so that a machine whose speed drifts is unfair to nobody. A ratio
is the median over the rounds of the two's ratio within a round. The machine's matmul speed, against which MFU is counted,
is measured each round too. A peer that is not installed is left out, and the last lines say so.
"""
import difflib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from json import dumps, loads
from statistics import median

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py; the same for every contender

import torch
import torch.nn.functional as F

from mambino.configurator import configure, fail, find_settings
from mambino.machine import copy_bandwidth, machine_name, memory_used, peak_flops, timed

# what to measure
sections = 'train,layers,length,loss,sample'  # '': none of them, for --time_to_loss alone
models = 'gpt,mamba2,mamba1,hybrid'
# Compared with the model each resembles; '': none. hf_: transformers'; cross_entropy: PyTorch's loss, for the section `loss`
peers = 'llama,litgpt,nanogpt,hf_mamba2,mamba_ssm,mambapy,hf_mamba,cross_entropy'
nanogpt = ''                     # a nanoGPT checkout to compare with: the folder of its model.py
dtypes = 'float32,bfloat16'      # float32, bfloat16 or float16; the latter two as autocast over fp32 weights
# the model: small enough for a CPU, large enough that matrix products dominate
n_layer = 6
n_embd = 384
n_head = 6
vocab_size = 4096
window = 256                     # the hybrid's attention sees so many last tokens, and that of gpt_window, which joins in `length`
# training
batch_size = 8
block_size = 256                 # tokens in a sequence
layers_batch_size = 4            # the section `layers`: sequences of block_size
compile = False                  # torch.compile the training step of every contender, peers too
# the sections `length` and `loss`, in the first of the dtypes
lengths = '1024,4096,16384'      # tokens in a sequence; a step has as many as the longest
length_n_layer = 2               # a smaller model than n_layer and n_embd say
length_n_embd = 192
loss_vocab_size = 50257
loss_batch_size = 4
loss_block_size = 2048
# sampling, one sequence
prefill = 512                    # tokens of a prompt, read at once
positions = '100,4000'           # decode there: a Mamba should not slow down, attention must
# whole runs on characters of Shakespeare, GPT, Mamba-2 and hybrid by turns, and nanoGPT's README command for a CPU
time_to_loss = 0.0               # the val loss to reach, such as 1.88; 0: no runs
time_to_loss_run = 'config/shakespeare_cpu.py --eval_interval=120'  # what train.py is given; evaluations count in its time
# how
rounds = 5                       # turns each contender takes
seconds = 1.0                    # how long one turn lasts, at least (but always whole steps)
limit = 20.0                     # seconds of turns after which a contender takes no more: some peers need 20 s a step
device = 'auto'                  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
threads = 0                      # CPU threads; 0: torch's choice
json = ''                        # a file for the raw figures
plot = ''                        # a .png for a picture of `length` and `train`; needs matplotlib

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SECTIONS = ('train', 'layers', 'length', 'loss', 'sample')
BYTES = 256                      # vocabulary of the section `length`, so that mixing the tokens is most of its work
DTYPES = ('float32', 'bfloat16', 'float16')
OURS = ('gpt', 'gpt_window', 'mamba2', 'mamba1', 'hybrid')
PEERS = {  # what to print, the model of ours it resembles, the sections it takes part in
    'llama': ('transformers Llama', 'gpt', ('train', 'sample')),
    'litgpt': ('litgpt', 'gpt', ('train',)),
    'nanogpt': ('nanoGPT', 'gpt', ('train',)),
    'hf_mamba2': ('transformers Mamba2', 'mamba2', ('train', 'sample')),
    'mamba_ssm': ('mamba-ssm Mamba2', 'mamba2', ('train',)),
    'mambapy': ('mamba.py', 'mamba1', ('layers',)),
    'hf_mamba': ('transformers Mamba', 'mamba1', ('layers',)),
    'cross_entropy': ('F.cross_entropy', 'linear_cross_entropy', ('loss',)),
}
RUNS = {'gpt': 'gpt', 'mamba2': 'mamba', 'hybrid': 'hybrid'}  # --time_to_loss: train.py's names of our models
NANOGPT_RUN = ('config/train_shakespeare_char.py --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 '
               '--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0')

# --- the contenders: all of this runs in their processes --------------------------------------------------------------

def ours(name):
    """(class, config) of our models, at the size of the settings."""
    sizes = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd)
    if name.startswith('gpt'):
        from model_gpt import GPT, GPTConfig
        return GPT, GPTConfig(n_head=n_head, window=window if name == 'gpt_window' else 0, **sizes)
    if name == 'hybrid':
        from model_hybrid import Hybrid, HybridConfig
        return Hybrid, HybridConfig(n_head=n_head, window=window, **sizes)
    from model_mamba import Mamba, MambaConfig
    return Mamba, MambaConfig(version=int(name[-1]), **sizes)

def hf_config(name):
    """transformers' config of the same size."""
    from mambino.export import to_hf
    import transformers
    Model, config = ours(PEERS[name][1])
    with torch.device('meta'):  # no memory
        return transformers.AutoConfig.for_model(**to_hf.describe(Model(config))[0])

def library_model(name):
    """litgpt's Llama-like GPT, or mamba-ssm's Mamba-2 with its fused kernels, which run on CUDA alone."""
    like = ours(PEERS[name][1])[1]
    if name == 'litgpt':
        from litgpt.config import Config
        from litgpt.model import GPT
        model = GPT(Config(block_size=block_size, vocab_size=vocab_size, padded_vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                           n_embd=n_embd, intermediate_size=like.intermediate_size, mlp_class_name='LLaMAMLP', bias=False,
                           norm_class_name='RMSNorm', rotary_percentage=1.0, parallel_residual=False))
        model.lm_head.weight = model.transformer.wte.weight
        return model
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    ssm = dict(layer='Mamba2', d_state=like.state_size, d_conv=like.conv_kernel, expand=like.expand, headdim=like.head_dim,
               ngroups=like.n_groups)  # its own chunk_size: its kernels were tuned for it
    return MambaLMHeadModel(MambaConfig(d_model=n_embd, n_layer=n_layer, vocab_size=vocab_size, ssm_cfg=ssm, pad_vocab_size_multiple=1))

def whole_model(name):
    """(model, loss(idx, targets)) of any contender but Mamba-1's."""
    if name in ('litgpt', 'mamba_ssm'):
        model = library_model(name)
        logits = model if name == 'litgpt' else lambda idx: model(idx).logits
        return model, lambda idx, targets: F.cross_entropy(logits(idx).flatten(0, 1), targets.flatten())
    if name.startswith(('llama', 'hf_')):
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_config(hf_config(name))
        return model, lambda idx, targets: model(input_ids=idx, labels=idx, use_cache=False).loss
    if name == 'nanogpt':
        spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(nanogpt, 'model.py'))
        module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                            n_embd=n_embd, dropout=0.0, bias=False))
    else:
        Model, config = ours(name)
        model = Model(config)
    return model, lambda idx, targets: model(idx, targets)[1]

def matrix_flops(model):
    """6 a weight of every matrix product; a table of positions is none."""
    return 6 * sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.endswith(('A_log', 'wpe.weight')))

def train(name, autocast):
    """Training steps. Everyone has the same optimizer: what is compared is the models."""
    model, loss = whole_model(name)
    with torch.device('meta'):  # mixing of tokens costs a peer what it costs the model of ours that it resembles
        Model, config = ours(PEERS[name][1] if name in PEERS else name)
        like = Model(config)
    facts = dict(parameters=sum(p.numel() for p in model.parameters()), tokens=batch_size * block_size,
                 flops=matrix_flops(model) + like.flops_per_token(block_size) - matrix_flops(like))
    model.to(device).train()
    facts.update(before=memory_used(device), counted=4 * facts['parameters'])  # neither libraries nor a model's making count
    if compile:
        from mambino.kernels import compiled
        loss = compiled(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    idx, targets = torch.randint(vocab_size, (2, batch_size, block_size), device=device).unbind()

    def step():
        with autocast():
            value = loss(idx, targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return facts, {'step': step}

length = train  # its sizes come with each row

def layers(name, autocast):
    """Two Mamba-1 mixers, without norms and residuals."""
    config = ours('mamba1')[1]
    if name == 'mamba1':
        from model_mamba import Mamba1Mixer
        pair = [Mamba1Mixer(config, 2) for _ in range(2)]
    elif name == 'mambapy':
        from mambapy.mamba import MambaBlock, MambaConfig
        pair = [MambaBlock(MambaConfig(d_model=n_embd, n_layers=2, d_state=config.state_size, pscan=True)) for _ in range(2)]
    else:
        from transformers.models.mamba.modeling_mamba import MambaMixer
        pair = [MambaMixer(hf_config(name), 0) for _ in range(2)]
    pair = torch.nn.ModuleList(pair).to(device).train()
    parameters = sum(p.numel() for p in pair.parameters())
    facts = dict(parameters=parameters, tokens=2 * layers_batch_size * block_size, before=memory_used(device), counted=4 * parameters)
    x = torch.randn(layers_batch_size, block_size, n_embd, device=device, requires_grad=True)

    def step():
        y = x
        with autocast():
            for layer in pair:
                y = layer(y)
                y = y[0] if isinstance(y, tuple) else y
        y.float().square().mean().backward()
        pair.zero_grad(set_to_none=True)
        x.grad = None
    return facts, {'step': step}

def loss(name, autocast):
    """Forward and backward of the loss alone, from the last hidden states. Inputs and gradients, which any way needs, count apart."""
    from mambino.language_model import linear_cross_entropy as chunked
    x = torch.randn(loss_batch_size, loss_block_size, n_embd, device=device, requires_grad=True)             # (B, T, D)
    weight = torch.nn.Parameter(0.02 * torch.randn(loss_vocab_size, n_embd, device=device))                  # (V, D)
    targets = torch.randint(loss_vocab_size, x.shape[:2], device=device)                                     # (B, T)

    def step(x=x, targets=targets):
        with autocast():
            if name == 'cross_entropy':
                value = F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten())
            else:
                value = chunked(x, weight, targets)
        value.backward()
        x.grad = weight.grad = None

    step(torch.randn(1, 8, n_embd, device=device, requires_grad=True), targets[:1, :8])  # libraries and their buffers are there now
    given = x.nbytes + weight.nbytes
    return dict(tokens=targets.numel(), given=given, before=memory_used(device), counted=-given), {'step': step}

def sample(name, autocast):
    """Reading a prompt, and one token more at each of the positions. Autocast is on all the time: it keeps its copies."""
    model = whole_model(name)[0].to(device).eval()
    autocast().__enter__()
    torch.inference_mode().__enter__() if name in PEERS else torch.no_grad().__enter__()
    cache = 'cache_params' if name == 'hf_mamba2' else 'past_key_values'

    def read(idx, state=None):
        if name in OURS:
            return model.step(idx, state)[1]
        return model(input_ids=idx, use_cache=True, **({cache: state} if state is not None else {}))[cache]

    prompt = torch.randint(vocab_size, (1, prefill), device=device)
    works, facts, states = {'prefill': lambda: read(prompt)}, dict(tokens=prefill, state=[]), {}
    for p in positions.split(','):
        states[p] = None
        for start in range(0, int(p), 512):
            states[p] = read(torch.randint(vocab_size, (1, min(512, int(p) - start)), device=device), states[p])
        if name in OURS:
            facts['state'].append(sum(v.nbytes for k, v in states[p].items() if k != 'pos'))
        works[p] = lambda p=p: states.update({p: read(prompt[:, :1], states[p])})
    return facts, works

def contender():
    """The life of a contender's process: a job on stdin, then a line for each round it shall run; answers on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    job = loads(sys.stdin.readline())
    globals().update(job['settings'])
    try:
        torch.set_num_threads(threads or torch.get_num_threads())
        torch.manual_seed(1)
        autocast = partial(torch.autocast, torch.device(device).type, getattr(torch, job['dtype'], None),
                           enabled=job['dtype'] != 'float32')
        facts, works = globals()[job['section']](job['name'], autocast)
        for run in works.values():
            end = time.perf_counter() + 2 * seconds
            while timed(device, run) and time.perf_counter() < end:  # a slow step is warm after one, and what it compiles is compiled
                pass
        print(dumps(facts), file=answers, flush=True)
        for _ in sys.stdin:
            turn = dict(times={work: [] for work in works})
            while left := [work for work, took in turn['times'].items() if sum(took) < seconds / len(works)]:
                for work in left:  # here too by turns: one at position 100, one at 4000, …
                    turn['times'][work].append(timed(device, works[work]))
            if facts.get('before'):
                turn['memory'] = memory_used(device, peak=True) - facts['before'] + facts['counted']
            print(dumps(turn), file=answers, flush=True)
    except Exception as error:
        print(dumps(dict(error=f'{type(error).__name__}: {error}'.split('\n')[0][:150])), file=answers, flush=True)

# --- the contest ------------------------------------------------------------------------------------------------------

def progress(text):
    if sys.stderr.isatty():
        print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)

def ask(process, line):
    """One line to a contender, its answer as a dict."""
    try:
        process.stdin.write(line + '\n')
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = ''
    return loads(answer) if answer else dict(error=f'its process died with status {process.wait()} (out of memory?)')

def contenders(section):
    """The rows of a section, still without figures, in groups: the processes of a group live together and take turns."""
    def row(name, dtype, **sizes):
        label = PEERS.get(name, [name])[0] + (f' at {sizes["block_size"]:,}' if sizes else '')
        return dict(section=section, name=name, label=label, dtype=dtype, sizes=sizes, times=[])
    names, chosen = [], models.split(',')
    for name in dict(layers=['mamba1'] * ('mamba1' in chosen), loss=['linear_cross_entropy']).get(section, chosen):
        names += [name] + [p for p in peers.split(',') if p and PEERS[p][1] == name and section in PEERS[p][2]]
    kinds = dtypes.split(',')
    if section == 'length':
        at, sizes = sorted({int(T) for T in lengths.split(',')}), dict(n_layer=length_n_layer, n_embd=length_n_embd, vocab_size=BYTES)
        names += ['gpt_window'] * ('gpt' in names and 'gpt_window' not in names)
        return [[row(name, kinds[0], block_size=T, batch_size=at[-1] // T, **sizes) for T in at] for name in names]
    return [[row(name, dtype) for dtype in (kinds[:1] if section == 'loss' else kinds) for name in names]]

def contest(rows, peaks):
    """Measures a group of contenders: their rows get `times`, [{work: [seconds]}] of each round, and the facts of their process."""
    section = rows[0]['section']
    settings = {name: globals()[name] for name in find_settings(globals())}
    code = f'import sys; sys.path.insert(0, {HERE!r}); from mambino.bench import models as bench; bench.contender()'
    processes = {}
    try:
        for i, row in enumerate(rows):
            if row['name'] == 'nanogpt' and not nanogpt:
                row['error'] = 'name its folder with --nanogpt='
            else:
                processes[i] = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                stderr=subprocess.DEVNULL, text=True, encoding='utf-8')
        for i, process in processes.items():  # one after another: together they would take each other's time and memory
            progress(f'{section}: warming up {rows[i]["label"]} {rows[i]["dtype"]}')
            rows[i].update(ask(process, dumps(rows[i] | dict(settings=settings | rows[i]['sizes']))))
        for turn in range(rounds):
            for dtype in peaks:
                peaks[dtype].append(peak_flops.__wrapped__(device, dtype))  # past its cache: the machine may have changed
            for i, row in enumerate(rows):
                if 'error' not in row and sum(sum(t) for times in row['times'] for t in times.values()) < limit:
                    progress(f'{section}: round {turn + 1} of {rounds}, {row["label"]} {row["dtype"]}')
                    answer = ask(processes[i], 'go')
                    row['times'] += [answer.pop('times')] if 'times' in answer else []
                    row.update(answer)
    finally:
        progress('')
        for process in processes.values():
            process.kill()
            process.wait()
    return rows

def table(title, header, lines):
    """Aligned columns: the first two to the left, figures to the right."""
    lines = [header] + lines
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f'\n{title}')
    for line in lines:
        print('  ' + '  '.join(f'{c:<{w}}' if i < 2 else f'{c:>{w}}' for i, (c, w) in enumerate(zip(line, widths))).rstrip())

def ratio(a, b, work='step'):
    """(median, lowest, highest) over the rounds of how many times faster a does this work than b."""
    each = [median(y[work]) / median(x[work]) for x, y in zip(a['times'], b['times'])]
    return median(each), min(each), max(each)

def mega(n, digits=0):
    return 'n/a' if n is None else f'{n / 1e6:,.{digits}f}'

def show(section, rows, peaks):
    """Prints a section's table; adds the medians it shows to the rows."""
    lines, places = [], positions.split(',')
    for row in rows:
        times = {work: sum((turn[work] for turn in row['times']), []) for work in row['times'][0]}
        ms = row['ms'] = {work: 1e3 * median(t) for work, t in times.items()}
        speed = row['tokens_per_second'] = row['tokens'] * 1e3 / ms['prefill' if section == 'sample' else 'step']
        line = [row['label'], row['dtype'], f'{speed:,.0f}']
        if section == 'sample':
            line += [f'{ms[p]:.2f}' for p in places] + [f'{ms[places[-1]] / ms[places[0]]:.2f}×']
            line += [' / '.join(mega(size, 2) for size in row['state']) or 'n/a']
        else:
            t = times['step']
            line += [f'{ms["step"]:.0f}', f'{1e3 * min(t):.0f}–{1e3 * max(t):.0f}', str(len(t)), mega(row.get('memory'))]
            line += [mega(row['given']) if section == 'loss' else mega(row['parameters'], 1)]
        if section == 'train':
            row['mfu'] = row['flops'] * speed / median(peaks[row['dtype']])
            line.append(f'{100 * row["mfu"]:.0f}%')
        lines.append(line)
    header = ['model', 'dtype', 'tokens/s', 'ms/step', 'min–max', 'steps', 'peak MB', 'M params', 'MFU']
    if section == 'train':
        table(f'training: {n_layer} layers, n_embd {n_embd}, {n_head} heads, vocabulary {vocab_size}; '
              f'{batch_size}×{block_size} tokens a step', header, lines)
    elif section == 'layers':
        table(f'two Mamba-1 layers, forward and backward: n_embd {n_embd}; {layers_batch_size}×{block_size} tokens; '
              'tokens/s count each layer', header[:-1], lines)
    elif section == 'loss':
        table(f'the loss alone, forward and backward: n_embd {n_embd}, vocabulary {loss_vocab_size}; {loss_batch_size}×{loss_block_size} '
              'tokens; peak MB beyond the inputs and their gradients', header[:-2] + ['inputs MB'], lines)
    elif section == 'length':
        table(f'length, {rows[0]["tokens"]:,} tokens a step: {length_n_layer} layers, n_embd {length_n_embd}, {n_head} heads, '
              f'vocabulary {BYTES}; window {window}', header[:-1], lines)
    else:
        table(f'sampling, one sequence: a prompt of {prefill} tokens, then ms for one token at position {" and ".join(places)}',
              ['model', 'dtype', 'prompt tokens/s'] + places + [f'{places[-1]} / {places[0]}', 'state MB'], lines)
    sys.stdout.flush()

def beside(a, b):
    """Whether a is compared with b: our model with its peer, Mamba-2 with our GPT, the longest sequences with the shortest."""
    if [a['section'], a['dtype']] != [b['section'], b['dtype']]:
        return False
    if a['section'] == 'length':
        T, at = [row['sizes']['block_size'] for row in (a, b)], [int(T) for T in lengths.split(',')]
        return a['name'] == b['name'] and T == [max(at), min(at)] and T[0] > T[1]
    return PEERS.get(b['name'], '  ')[1] == a['name'] or [a['section'], a['name'], b['name']] == ['train', 'mamba2', 'gpt']

def compare(rows):
    """One ratio for each pair and each kind of work that both did."""
    for a, b in [(a, b) for b in rows for a in rows if beside(a, b)]:
        for work in [work for work in a['times'][0] if all(work in turn for turn in a['times'] + b['times'])]:
            speed, low, high = ratio(a, b, work)
            yield dict(section=a['section'], work=work, dtype=a['dtype'], ours=a['label'], peer=b['label'], speed=speed, low=low, high=high,
                       size=a['parameters'] / b['parameters'] if a['section'] == 'train' else None,
                       memory=a['memory'] / b['memory'] if 'memory' in a and 'memory' in b else None)

def runs():
    """Whole runs of train.py, and of nanoGPT's, by turns: rows as contest's. Works: `loss`, if it was reached, and `whole`, the process."""
    names = [name for name in RUNS if name in models.split(',')] + ['nanogpt'] * bool(nanogpt)
    rows = [dict(section='run', name=name, label=PEERS.get(name, [name])[0], dtype='auto', times=[], losses=[]) for name in names]
    environment = os.environ | dict(PYTHONUNBUFFERED='1') | (dict(OMP_NUM_THREADS=str(threads)) if threads else {})
    for turn in range(rounds):
        for row in [row for row in rows if 'error' not in row]:
            progress(f'run {turn + 1} of {rounds}: {row["label"]}')
            theirs, took, line, start = row['name'] == 'nanogpt', {}, '', time.perf_counter()
            command = ['train.py', *NANOGPT_RUN.split()] if theirs else [
                os.path.join(HERE, 'train.py'), *shlex.split(time_to_loss_run), f'--model={RUNS[row["name"]]}']
            with tempfile.TemporaryDirectory() as out, subprocess.Popen(
                    [sys.executable, *command, f'--out_dir={out}', f'--device={device}'], cwd=nanogpt if theirs else None, text=True,
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', errors='replace') as process:
                for line in process.stdout:
                    if found := re.match(r'step \d+:.*\bval loss ([\d.]+)', line):
                        row['losses'].append(float(found[1]))
                        if row['losses'][-1] <= time_to_loss:
                            took.setdefault('loss', [time.perf_counter() - start])
                process.wait()
            took['whole'] = [time.perf_counter() - start]
            progress('')
            if process.returncode or not row['losses']:
                row['error'] = line.strip().removeprefix('error: ')
                if not theirs:
                    fail(f'train.py {time_to_loss_run}: {row["error"]}')
            row['times'].append(took)
    return rows

def show_runs(rows):
    lines = []
    for row in rows:
        whole, reached = ([turn[work][0] for turn in row['times'] if work in turn] for work in ('whole', 'loss'))
        row['seconds_to_loss'] = median(reached) if len(reached) == len(whole) else None
        lines.append([row['label'], '', f'{row["seconds_to_loss"]:.1f}' if row['seconds_to_loss'] else 'not reached',
                      f'{median(whole):.1f}', f'{min(whole):.1f}–{max(whole):.1f}', f'{min(row["losses"]):.4f}'])
    table(f'train.py {time_to_loss_run}: seconds of the process until the val loss was {time_to_loss}, and to its end',
          ['model', '', 'to the loss', 'to the end', 'min–max', 'best loss'], lines)

def draw(rows):
    """The picture: speed and memory against length, and a bar for each contender of the section `train`."""
    import matplotlib
    matplotlib.use('Agg')  # needs no screen
    from matplotlib import pyplot
    by_length, bars = ([row for row in rows if row['section'] == section] for section in ('length', 'train'))
    panels = ['tokens_per_second', 'memory'] * bool(by_length) + ['bars'] * bool(bars)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), layout='constrained', squeeze=False)
    for axis, panel in zip(axes[0], panels):
        if panel == 'bars':
            axis.barh([f'{row["label"]} {row["dtype"]}' for row in bars], [row['tokens_per_second'] for row in bars],
                      color=['C1' if row['name'] in PEERS else 'C0' for row in bars])
            axis.set(title=f'training, tokens/s: {n_layer} layers of {n_embd}, {batch_size}×{block_size} tokens')
            axis.invert_yaxis()
            continue
        for name in dict.fromkeys(row['name'] for row in by_length):
            points = [(row['sizes']['block_size'], row[panel]) for row in by_length if row['name'] == name and panel in row]
            axis.plot([T for T, _ in points], [y / 1e6 if panel == 'memory' else y for _, y in points], marker='o', label=name)
        axis.set(title='peak memory, MB' if panel == 'memory' else 'training, tokens/s', xlabel='tokens in a sequence', xscale='log')
        axis.set_xticks([int(T) for T in lengths.split(',')], lengths.split(','))
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.suptitle(machine_name(device))
    figure.savefig(plot, dpi=120)

def main():
    global device
    for setting, known in (('sections', SECTIONS), ('models', OURS), ('peers', PEERS), ('dtypes', DTYPES)):
        if globals()[setting] or not (setting == 'peers' or setting == 'sections' and time_to_loss):
            for name in set(globals()[setting].split(',')) - set(known):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                fail(f"--{setting}: unknown '{name}' (did you mean {near}?); there are {', '.join(known)}")
    for name, value in globals().items():  # every whole number here is a size, but for threads
        if type(value) is int and name.islower() and name != 'threads' and value < 1:
            fail(f'--{name}={value}: at least 1')
    for name in ('positions', 'lengths'):
        if not all(p.isdecimal() and int(p) for p in globals()[name].split(',')):
            fail(f'--{name}={globals()[name]}: expected whole numbers of at least 1, as in 100,4000')
    if any(max(map(int, lengths.split(','))) % int(T) for T in lengths.split(',')):
        fail(f'--lengths={lengths}: the longest must be a multiple of the others, so that all have as many tokens a step')
    if time_to_loss < 0:
        fail(f'--time_to_loss={time_to_loss}: expected a val loss above 0, or 0 for no runs')
    if nanogpt and not os.path.exists(os.path.join(nanogpt, 'model.py')):
        fail(f'--nanogpt={nanogpt}: no model.py in there')
    if nanogpt and time_to_loss and not os.path.exists(os.path.join(nanogpt, 'data', 'shakespeare_char', 'train.bin')):
        fail(f'--nanogpt={nanogpt}: no data/shakespeare_char/train.bin in there; run python data/shakespeare_char/prepare.py in there')
    if plot and not importlib.util.find_spec('matplotlib'):
        fail('--plot needs matplotlib: pip install matplotlib')
    if plot and (not plot.endswith('.png') or not {'train', 'length'} & set(sections.split(','))):
        fail(f'--plot={plot}: a file that ends in .png, of the sections train, length or both')
    for name in ('json', 'plot'):
        try:
            if globals()[name]:
                open(globals()[name], 'ab').close()  # better now than after minutes of work
        except OSError as error:
            fail(f'--{name}={globals()[name]}: {error.strerror}')
    from mambino.machine import choose_device
    device = choose_device(device)
    try:
        for name in models.split(','):
            ours(name)
    except ValueError as error:
        fail(error)
    torch.set_num_threads(threads or torch.get_num_threads())

    peaks = {dtype: [peak_flops(device, dtype)] for dtype in dtypes.split(',')}
    machine = dict(name=machine_name(device), torch=torch.__version__, bandwidth=copy_bandwidth(device), peak_flops=peaks)
    print(f'{machine["name"]}; torch {torch.__version__}\nmatmul '
          + ', '.join(f'{dtype} {p[0] / 1e9:,.0f} GFLOP/s' for dtype, p in peaks.items())
          + f'; memory copy {machine["bandwidth"] / 1e9:.0f} GB/s', flush=True)
    rows, absent = [], []
    for section in [name for name in ['run' if time_to_loss else '', *sections.split(',')] if name]:
        found = runs() if section == 'run' else sum((contest(group, peaks) for group in contenders(section)), [])
        absent += [row for row in found if 'error' in row]
        found = [row for row in found if 'error' not in row]
        if found:
            show_runs(found) if section == 'run' else show(section, found, peaks)
        rows += found
    ratios = list(compare(rows))
    if ratios:
        what = {'prefill': 'prompt', 'loss': 'to the loss'}
        table('ours / peer: speed, its lowest and highest of the rounds, speed × parameters, and peak memory',
              ['ours', 'peer', '', 'speed', 'of rounds', '× size', 'memory'],
              [[f'{r["ours"]} {r["dtype"]}', r['peer'], f'{r["section"]} {what.get(r["work"], r["work"])}', f'{r["speed"]:.2f}×',
                f'{r["low"]:.2f}–{r["high"]:.2f}', f'{r["speed"] * r["size"]:.2f}×' if r['size'] else '',
                f'{r["memory"]:.2f}×' if r['memory'] else ''] for r in ratios])
    if absent:
        print('\nleft out', *dict.fromkeys(f'{row["label"]}: {row["error"]}' for row in absent), sep='\n  ')
    if json:
        settings = {name: globals()[name] for name in find_settings(globals())}
        with open(json, 'w', encoding='utf-8') as f:
            f.write(dumps(dict(machine=machine, settings=settings, rows=rows, ratios=ratios, left_out=absent), indent=1) + '\n')
    if plot and rows:
        draw(rows)
    if not rows:
        fail('nothing could be measured')

if __name__ == '__main__':
    configure(globals(), positional='config')
    main()
