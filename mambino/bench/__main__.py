""" How fast is this project on this machine, and how much memory does it take — beside what one
would use instead?

    python -m mambino.bench                                 # the first five sections, some minutes
    python -m mambino.bench --models=gpt --sections=train --nanogpt=../nanoGPT --json=bench.json
    python -m mambino.bench --sections=train,length --plot=bench.png            # and as a picture
    python -m mambino.bench --sections=generate --kinds=mamba --batches=1 --rounds=5
    python -m mambino.bench --sections=precision --widths=128,384   # what --dtype=auto takes on a CPU
    python -m mambino.bench --sections=serve --kinds=mamba,gpt --ways=float32,int8  # the server's scheduler
    python -m mambino.bench --sections=train,sample,generate,goals --models=gpt,mamba2 --peers=llama,hf_mamba2 \\
        --kinds=gpt,mamba,hybrid --prompts=32,512,2000      # beside what is wanted; shorter: --rounds=2 --new_tokens=16
    python -m mambino.bench --sections=train,generate,goals --models=mamba2,mamba3,mamba3_r4 --kinds=mamba3,mamba3_r4
    python -m mambino.bench --sections=data --memory_mb=4000     # prepare.py; some minutes, 8 GB of disk
    python -m mambino.bench --sections= --time_to_loss=1.88     # whole runs: seconds to that val loss
    python -m mambino.bench --sections=train,layers,sample,generate,data --against=../before

Eleven sections: `train` is whole training steps (forward, backward, AdamW); `layers` is forward and
backward of two bare Mamba-1 layers, since the peers are too slow for a whole model; `length` is
training steps on ever longer sequences, at the same tokens a step; `loss` is the cross-entropy over
a large vocabulary alone; `precision` is what train.py takes on this CPU where `dtype` is left to it,
and whether that is right; `sample` is reading a prompt and writing token by token; `generate` is the
same in each precision, beside transformers' generate and llama.cpp; `serve` is the server's
scheduler, beside sample.py's rows; `data` is prepare.py's speed and memory; `inputs` is how many
files of a collection (--legacy, --pdfs) it reads right; `goals` is a table of what is wanted, beside
what the sections before it in --sections found.

Each contender (a model in a dtype) is a process of its own, so that its peak memory is its own. It
warms up, then waits; the processes take turns, one round each (A B C A B C …), so that a machine
whose speed drifts is unfair to nobody. A ratio is the median over the rounds of the two's ratio
within a round. The machine's matmul speed, against which MFU is counted, is measured each round
too. A peer that is not installed is left out, and the last lines say so.
"""
import difflib
import importlib.util
import os
from json import dumps
from types import SimpleNamespace

import torch

from mambino.bench import curve, data, generation, goals, inputs, pictures, precision, serving, steps
from mambino.bench.contenders import OURS, PEERS, ours
from mambino.cache import DTYPES as STATES
from mambino.configurator import configure, fail, find_settings
from mambino.machine import choose_device, copy_bandwidth, machine_name, peak_flops
from mambino.train.sizes import SIZES
from mambino.weights.quantize import PRECISIONS

# what to measure
sections = 'train,layers,length,loss,sample'  # also precision, generate, serve, data, inputs,
                                 # goals; '': --time_to_loss alone
models = 'gpt,mamba2,mamba1,mamba3,hybrid'      # also mamba3_r4, of rank 4
# Compared with the model each resembles; '': none. hf_: transformers'; cross_entropy: PyTorch's
peers = 'llama,litgpt,nanogpt,hf_mamba2,mamba_ssm,mambapy,hf_mamba,cross_entropy'
nanogpt = ''                     # a nanoGPT checkout to compare with: the folder of its model.py
against = ''                     # another checkout of this project, to compare with instead of peers,
                                 # and in generate beside them
dtypes = 'float32,bfloat16'      # also float16; the latter two as autocast over fp32 weights
# the model: small enough for a CPU, large enough that matrix products dominate
n_layer = 6
n_embd = 384
n_head = 6
vocab_size = 0                   # 0: 4096, and 16384 in generate and data
window = 256                     # the hybrid's attention sees so many last tokens,
                                 # and that of gpt_window, which joins in `length`
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
# the section `precision`
widths = '128,384,768'           # of the models
# the section `sample`: one sequence
prefill = 512                    # tokens of a prompt, read at once
positions = '100,4000'           # decode there: a Mamba should not slow down, attention must
# the section `generate`, on a CPU
kinds = 'gpt,mamba,hybrid,mamba1'       # also mamba3, mamba3_r4: beside our own Mamba-2
ways = 'float32,bfloat16,int8,int4'     # precisions of ours
state_dtype = 'float32'          # of ours between tokens: also bfloat16
their_dtypes = 'float32,bfloat16'       # of transformers; '': without it
batches = '1,16'                 # sequences at once
size = '50m'                     # or 150m, 400m: parameters
prompts = '32,512'               # tokens; the first is continued, the others are only read
new_tokens = 64
llama = True                     # beside llama.cpp, where xllamacpp is installed
# the section `serve`, on a CPU, besides the kinds, ways, size and new_tokens above
prompt = 32                      # tokens
clients = '1,2,4,8,16,32'        # at once
long_prompt = 2000               # tokens of a prompt that is read while others run
# the section `data`
speed_mb = 200                   # size of the corpus for speed; 0 leaves that out
memory_mb = 2000                 # size of the corpus for memory; 0 leaves that out
workers = 2                      # processes of prepare.py
folder = ''                      # where to work; '': a temporary folder, deleted at the end
# the section `inputs`
legacy = ''                      # a folder of folders, each named after the encoding of the texts in it
pdfs = ''                        # a folder with PDFs
# whole runs on characters of Shakespeare, of GPT, Mamba-2 and hybrid and of nanoGPT's CPU command
time_to_loss = 0.0               # the val loss to reach, such as 1.88; 0: no runs
# What train.py is given for it; evaluations count in its time
time_to_loss_run = 'config/shakespeare_cpu.py --eval_interval=120'
# how it is measured
rounds = 0                       # turns each contender takes; 0: 5, and 3 in generate and data
seconds = 1.0                    # how long one turn lasts, at least (but always whole steps)
limit = 20.0                     # seconds of turns after which a contender takes no more:
                                 # some peers need 20 s a step
device = 'auto'                  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
threads = 0                      # CPU threads; 0: torch's choice
clock = 'wall'                   # or cpu: the processor's time, of which others on the machine take
                                 # nothing; with --threads=1, since threads that wait use it, too
json = ''                        # a file for the raw figures
plot = ''                        # a .png or .svg of `length`, `train` and the way to time_to_loss;
                                 # needs matplotlib

STEPS = ('train', 'layers', 'length', 'loss', 'sample')
SECTIONS = (*STEPS, 'precision', 'generate', 'serve', 'data', 'inputs', 'goals')
DTYPES = ('float32', 'bfloat16', 'float16')
MAY_BE_0 = ('vocab_size', 'rounds', 'threads', 'speed_mb', 'memory_mb')


def settings_of(section):
    """All settings by name, for one section: unset ones filled in, as it has them."""
    settings = SimpleNamespace(**{name: globals()[name] for name in find_settings(globals())})
    is_step = section in (*STEPS, 'precision', 'run')
    settings.vocab_size = vocab_size or (4096 if is_step else 16384)
    settings.rounds = rounds or (5 if is_step else 3)
    settings.device = choose_device(device)
    if section in ('generate', 'serve'):
        settings.limit = float('inf')
    return settings


def check():
    """Refuses in a line what cannot be measured, before anything is."""
    sizes = sorted({size for _, size in SIZES})
    known_names = dict(sections=SECTIONS, models=OURS, peers=PEERS, dtypes=DTYPES, kinds=generation.KINDS,
                       ways=('float32', *PRECISIONS), state_dtype=STATES, their_dtypes=DTYPES, size=sizes,
                       clock=('wall', 'cpu'))
    may_be_empty = ['peers', 'their_dtypes'] + ['sections'] * bool(time_to_loss)
    for setting, known in known_names.items():
        if globals()[setting] or setting not in may_be_empty:
            for name in set(globals()[setting].split(',')) - set(known):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                fail(f"--{setting}: unknown '{name}' (did you mean {near}?); there are {', '.join(known)}")
    for name, value in globals().items():
        if type(value) is int and name.islower() and value < (0 if name in MAY_BE_0 else 1):
            fail(f'--{name}={value}: at least {0 if name in MAY_BE_0 else 1}')
    for name in ('positions', 'lengths', 'batches', 'clients', 'prompts', 'widths'):
        if not all(number.isdecimal() and int(number) for number in globals()[name].split(',')):
            fail(f'--{name}={globals()[name]}: expected whole numbers of at least 1, '
                 'as in 100,4000')
    if any(max(map(int, lengths.split(','))) % int(length) for length in lengths.split(',')):
        fail(f'--lengths={lengths}: the longest must be a multiple of the others, '
             'so that all have as many tokens a step')
    if time_to_loss < 0:
        fail(f'--time_to_loss={time_to_loss}: expected a val loss above 0, or 0 for no runs')
    if nanogpt and not os.path.exists(os.path.join(nanogpt, 'model.py')):
        fail(f'--nanogpt={nanogpt}: no model.py in there')
    text = os.path.join(nanogpt, 'data', 'shakespeare_char', 'train.bin')
    if nanogpt and time_to_loss and not os.path.exists(text):
        fail(f'--nanogpt={nanogpt}: no data/shakespeare_char/train.bin in there; '
             'run python data/shakespeare_char/prepare.py in there')
    if against and not os.path.exists(os.path.join(against, 'train.py')):
        fail(f'--against={against}: no train.py in there')
    if 'inputs' in sections.split(',') and not (legacy or pdfs):
        fail('--sections=inputs: name a collection of files with --legacy, --pdfs or both')
    for name in ('legacy', 'pdfs'):
        if globals()[name] and not os.path.isdir(globals()[name]):
            fail(f'--{name}={globals()[name]}: no such folder')
    check_files()


def check_files():
    if plot and not importlib.util.find_spec('matplotlib'):
        fail('--plot needs matplotlib: pip install matplotlib')
    is_drawn = time_to_loss or {'train', 'length'} & set(sections.split(','))
    if plot and not (plot.endswith(('.png', '.svg')) and is_drawn):
        fail(f'--plot={plot}: a file that ends in .png or .svg, '
             'of the sections train, length or both, or of --time_to_loss')
    for name in ('json', 'plot'):
        try:
            if globals()[name]:
                open(globals()[name], 'ab').close()  # better now than after minutes of work
        except OSError as error:
            fail(f'--{name}={globals()[name]}: {error.strerror}')


def main():
    check()
    settings = settings_of('run')
    try:
        for name in models.split(','):
            ours(name, settings_of('train'))
    except ValueError as error:
        fail(error)
    torch.set_num_threads(threads or torch.get_num_threads())

    peaks = {}
    if set(STEPS) & set(sections.split(',')):
        peaks = {dtype: [peak_flops(settings.device, dtype)] for dtype in dtypes.split(',')}
    machine = dict(name=machine_name(settings.device), torch=torch.__version__,
                   bandwidth=copy_bandwidth(settings.device), peak_flops=peaks)
    print(f'{machine["name"]}; torch {torch.__version__}')
    speeds = [f'matmul {dtype} {peak[0] / 1e9:,.0f} GFLOP/s' for dtype, peak in peaks.items()]
    print('; '.join([*speeds, f'memory copy {machine["bandwidth"] / 1e9:.0f} GB/s']), flush=True)

    rows = []
    if time_to_loss:
        rows += curve.measure(settings)
    for section in filter(None, sections.split(',')):
        if section in STEPS:
            rows += steps.measure(section, settings_of(section), peaks)
        elif section == 'precision':
            rows += precision.measure(settings_of(section))
        elif section == 'generate':
            rows += generation.measure(settings_of(section))
        elif section == 'serve':
            rows += serving.measure(settings_of(section))
        elif section == 'inputs':
            rows += inputs.measure(settings)
        elif section == 'goals':
            goals.show([row for row in rows if 'error' not in row], settings)
        else:
            rows += data.measure(settings_of(section))
    measured = [row for row in rows if 'error' not in row]
    absent = [row for row in rows if 'error' in row]
    ratios = list(steps.compare(measured, settings))
    if ratios:
        steps.show_ratios(ratios)
    if absent:
        print('\nleft out', *dict.fromkeys(f'{row["label"]}: {row["error"]}' for row in absent), sep='\n  ')
    if json:
        figures = dict(machine=machine, settings=vars(settings), rows=measured, ratios=ratios,
                       left_out=absent)
        with open(json, 'w', encoding='utf-8') as f:
            f.write(dumps(figures, indent=1) + '\n')
    if plot and measured:
        pictures.draw(measured, settings)
    if not measured and not (sections == 'data' and not speed_mb) and sections != 'inputs':
        fail('nothing could be measured')


if __name__ == '__main__':
    configure(globals(), positional='config')
    main()
