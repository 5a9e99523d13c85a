"""Generates text from a trained model, and says how likely a text is to it.

    python sample.py                                            # from out/
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
    python sample.py --start=LINES:prompts.txt --temperature=0  # each line a prompt, side by side
    python sample.py --session=tale --start="Once upon a time"  # tomorrow: --session=tale goes on
    python sample.py --score=book.txt --html=book.html          # perplexity, and what was unexpected

out_dir's checkpoint holds the model and its tokenizer; nothing else is needed. The prompt is read
once, in chunks, then each new token costs one `step` of the model, whose state stands for all that
came before:

    prompt ids ──► step ──► logits ──► penalty, temperature, top-k, min-p, top-p ──► id ──► characters
                    ▲ state                                                          │
                    └────────────────────────────────────────────────────────────────┘

In mambino/sample/ generation.py does that, for many rows at once; text.py turns ids into text;
sessions.py keeps a state for later; score.py says how likely a text is; terminal.py is what is shown.
"""
import os
import sys
from contextlib import nullcontext
from functools import partial

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py

from mambino.configurator import configure, fail, require
from mambino.console import end_quietly

# --- what to generate
out_dir = 'out'         # folder of train.py's checkpoints (its best one is taken), or a checkpoint file;
                        # or hf:folder, a model as transformers saved it
start = '\n'            # the prompt; FILE:path: that file is it, LINES:path: each line is one;
                        # <|endoftext|> starts a new document
heal = True             # a prompt may end inside a token, as 'def ' does: its last ids are taken back,
                        # and what is drawn begins with their text; False: it goes on behind them
num_samples = 1         # of each prompt, drawn side by side
max_new_tokens = 500    # 0: without end, until a stop or Ctrl-C
stop = ''               # stop at this text; several are separated by |, a mark such as <|end|> is
                        # one; \n is a newline, \t a tab, \| a bar, \\ a backslash; end-of-text
                        # always stops
batch_size = 16         # rows at most side by side; as one is done, the next begins
# --- how to choose the next token
temperature = 0.8       # below 1 is more careful, above 1 wilder; 0: always the likeliest token
top_k = 200             # only among so many likeliest tokens; 0: all
top_p = 1.0             # only among the likeliest tokens that together have this probability
min_p = 0.0             # only tokens at least this times as likely as the likeliest
repetition_penalty = 1.0  # above 1 what is in the text already becomes less likely;
                          # 1.1 to 1.3 is usual (CTRL, Keskar et al. 2019)
seed = 1337             # each row has a generator of its own, from this and the row's number
# --- models that fill holes (train.py --objective=masked, or block); [...20...] in a prompt is one of 20 tokens
suffix = ''             # what follows a hole of max_new_tokens behind the prompt
sampler = 'first'       # 'first': one after another, in random order, which is the model's distribution;
                        # 'ancestral': many at once near the end; 'confidence', 'threshold': the surest
                        # first, which is smoother, and not the model's distribution; 'remask': may take back
steps = 0               # of a window, or a block; 0: one a token
block = 0               # masked: so many tokens are found before those behind them; 0: all of a window together
# --- beams: the likeliest text instead of a drawn one; temperature and the filters above play no part
beams = 1               # continuations followed side by side; the best num_samples are shown
length_penalty = 1.0    # a text's score is its logprob / tokens ** length_penalty:
                        # above 0 favours long ones, below 0 short ones
# --- a conversation, or a text to go on with tomorrow
interactive = False     # each line typed continues the text, is answered, and never read again;
                        # Ctrl-C ends an answer, Ctrl-D all. A \ at the end of a line: it goes on
                        # below; an empty line: the model just goes on
chat = False            # with interactive: lines and answers are messages, in the chat template that
                        # the model was tuned with (else ChatML); start is the system message
session = ''            # a name: the text's state is kept in out_dir/sessions and goes on from there
                        # the next time, with start, if given
fork = ''               # begin that session as a copy of this one
# --- what to say of a text
logprobs = 0            # show each token drawn with its logprob, and of so many likeliest
score = ''              # instead of generating: the perplexity of this file (-: standard input)
html = ''               # with score: a page to write, book.html, that shows it token by token, in the
                        # colours of how little each was expected
# --- where
device = 'auto'         # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'          # 'float32', 'bfloat16', 'float16'; auto: float32 on a CPU, bfloat16 where a
                        # GPU has it
quantize = ''           # 'int8', 'int4', 'bfloat16': smaller weights; on a CPU also faster ones
state_dtype = 'float32'  # 'bfloat16': what is kept of a text between its tokens takes half the memory,
                        # and tokens, of several rows above all, come sooner on a CPU; --score tells
                        # what it costs
adapters = ''           # out_dirs of adapters of this model, or folders of peft, each with its
                        # weight: out-a,out-b:0.5
stream = True           # show the (first) sample while it is generated

# read before torch is there: a typo is told at once
end_quietly()
explicit = configure(globals())     # of the settings those that the user gave

from mambino import failures
from mambino.blocks import fills_holes
from mambino.cache import DTYPES
from mambino.machine import autocast, choose_device, dtype_of_run
from mambino.sample.conversation import check_chat
from mambino.sample.filled import show_filled
from mambino.sample.score import show_bound, show_score
from mambino.sample.sessions import Session, check_state, open_session
from mambino.sample.terminal import Dialogue, Options, converse, say, show_beams, show_samples
from mambino.sample.text import encode_prompt, prompts_of, stops_of, without_mark
from mambino.sample.uncover import HOLE, SAMPLERS
from mambino.weights.loading import (
    attach_adapters,
    contents_of,
    fingerprint_of,
    load_adapters,
    model_of,
    prepare_model,
    require_tokenizer,
)
from mambino.weights.quantize import PRECISIONS


# --- what cannot be
def is_page(path):
    """Whether an HTML file can have this name; none has ''."""
    folder = os.path.dirname(os.path.abspath(path))
    return not path or path.lower().endswith(('.html', '.htm')) and os.path.isdir(folder)


MOST = 2**31 - 1
require(globals(), {
    f'from 1 to {MOST}': dict(
        num_samples=1 <= num_samples <= MOST,
        batch_size=1 <= batch_size <= MOST,
        beams=1 <= beams <= MOST,
    ),
    '0 or more': dict(temperature=temperature >= 0, top_k=top_k >= 0),
    f'from 1 to {MOST}, or 0: without end': dict(max_new_tokens=0 <= max_new_tokens <= MOST),
    'from 0 to 1000': dict(logprobs=0 <= logprobs <= 1000),
    'above 0 and at most 1': dict(top_p=0 < top_p <= 1),
    'from 0 to 1': dict(min_p=0 <= min_p <= 1),
    'above 0 and at most 100; 1 is none': dict(repetition_penalty=0 < repetition_penalty <= 100),
    f'one of {", ".join(SAMPLERS)}': dict(sampler=sampler in SAMPLERS),
    f'from 0 to {MOST}': dict(steps=0 <= steps <= MOST, block=0 <= block <= MOST),
    'from -10 to 10': dict(length_penalty=-10 <= length_penalty <= 10),
    'from 0 to 2**63 - 1': dict(seed=0 <= seed < 2**63),
    'a file that ends in .html, in a folder that is there': dict(html=is_page(html)),
    'int8, int4, bfloat16, or empty': dict(quantize=quantize in ('', *PRECISIONS)),
    'float32 or bfloat16': dict(state_dtype=state_dtype in DTYPES),
})
EXCLUDES = dict(
    beams='stream interactive session logprobs score',
    score='interactive session logprobs num_samples start',
    interactive='num_samples start',
    session='num_samples start',
)
used = dict(
    beams=beams > 1,
    stream=explicit.get('stream'),
    interactive=interactive,
    session=session,
    logprobs=logprobs,
    score=score,
    num_samples=num_samples > 1,
    start=start.startswith('LINES:'),
)
for one, others in EXCLUDES.items():
    for other in others.split():
        if used[one] and used[other]:
            fail(f'{one}={globals()[one]} and {other}={globals()[other]} do not go together: leave out one '
                 'of them')
if beams > 1 and (num_samples > beams or not max_new_tokens):
    fail(f'beams={beams} find as many texts, of a length that is known before: '
         f'num_samples={num_samples} must be at most beams, max_new_tokens={max_new_tokens} at least 1')
for one, other in dict(chat='interactive', fork='session', html='score').items():
    if globals()[one] and not globals()[other]:
        fail(f'{one}={globals()[one]} needs --{other} too')
if (interactive or score == '-') and sys.stdin is None:
    fail('there is no standard input to read from: it was closed')

# --- load
failures.end_in_a_line('lower --batch_size, --num_samples or --beams, use --quantize=int8 or a shorter text')
ckpt = contents_of(out_dir)
extra = load_adapters(adapters)                     # [(checkpoint, weight), …]
tok = require_tokenizer(ckpt, out_dir)
fills = fills_holes(ckpt['config'])
idle = dict(
    beams=beams > 1, session=session, interactive=interactive, logprobs=logprobs, html=html,
    repetition_penalty=repetition_penalty != 1, state_dtype=state_dtype != 'float32')
for name in [name for name, is_used in idle.items() if fills and is_used]:
    fail(f'{name}: the model in {out_dir} fills holes, and does not go on from token to token: leave it out')
for name in [name for name in ('suffix', 'sampler', 'steps', 'block') if name in explicit and not fills]:
    fail(f'{name}: the model in {out_dir} goes on from token to token, and fills no holes: leave it out')
own = ckpt['config'].get('block_length', 0)
if block and own:
    fail(f'block={block}: the model in {out_dir} has learned blocks of {own} tokens, and writes in these: leave it out')
if sampler == 'threshold' and steps:
    fail(f'steps={steps}: threshold takes as many steps as there are tokens it is not sure of: leave it out, or choose '
         'another --sampler')
where = choose_device(device)

# --- the text so far, and what comes next
text = Session(seed)
goes_on = False                                     # whether there was text before
save = None                                         # keeps a session
if session:
    model_fingerprint = fingerprint_of(ckpt, extra)
    text, path, goes_on = open_session(
        out_dir, session, fork, seed, model_fingerprint, where, tok.vocab_size)
    save = partial(text.save, path, model_fingerprint)
if goes_on and 'seed' in explicit:
    text.generator.manual_seed(seed)
opening = start if 'start' in explicit or not (goes_on or interactive) else ''
prompts = prompts_of(opening) if opening or not session else []
if not fills and any(HOLE.search(prompt) for prompt in prompts):
    fail(f'start: [...n...] is a hole in a text, and the model in {out_dir} has learned to go on alone: train one with '
         '--objective=masked')
if suffix and (not max_new_tokens or any(HOLE.search(prompt) for prompt in prompts)):
    fail(f'suffix: it stands behind a hole of max_new_tokens={max_new_tokens}, and a prompt with [...n...] has its '
         'own: leave one of them out')
if suffix:
    prompts = [f'{prompt}[...{max_new_tokens}...]{suffix}' for prompt in prompts]

have_holes = [bool(HOLE.search(prompt)) for prompt in prompts]
if stop and any(have_holes) and not score:
    if all(have_holes):
        fail(f'stop={stop}: holes are filled to the last one, and a text with holes ends where it ends: leave it out')
    print(f'note: stop={stop} is for the prompts without holes alone', file=sys.stderr)

# --- prepare the model
net = attach_adapters(model_of(ckpt), extra, adapters)
net, context = prepare_model(net, where, dtype, precision=quantize)
net.state_dtype = DTYPES[state_dtype]
options = Options(
    sampling=dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
    max_new_tokens=max_new_tokens,
    repetition_penalty=repetition_penalty,
    stops=stops_of(stop),
    logprobs=logprobs,
    stream=stream,
    heal=heal,
)

# --- do what is asked for
with context:
    if goes_on:
        check_state(net, text, path)
    if fork:
        save()
    if fills and not score:
        show_filled(net, tok, where, prompts, num_samples, seed, options, sampler, steps, block)
    elif score:
        is_auto = dtype == 'auto' and not quantize      # then as train.py evaluates
        run_dtype = dtype_of_run(ckpt['settings'].get('dtype'), where)
        precision = autocast(where, run_dtype) if is_auto else nullcontext()
        if fills:
            show_bound(net, tok, score, precision)
        else:
            show_score(net, tok, score, precision, html)
    elif interactive:
        end_ids = check_chat(tok) if chat else ()
        converse(Dialogue(net, tok, text, options, end_ids), ''.join(prompts), chat, save)
    elif session:
        ids = encode_prompt(tok, prompts[0], begins=not goes_on) if prompts else []
        if stream and prompts:
            say(without_mark(prompts[0]))
        try:
            Dialogue(net, tok, text, options).answer(ids, ''.join(prompts))
        finally:                                        # also where nobody reads on
            save()
    elif beams > 1:
        show_beams(net, tok, prompts, num_samples, beams, length_penalty, options)
    else:
        show_samples(net, tok, prompts, num_samples, batch_size, seed, options)
