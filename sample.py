"""Generates text from a trained model.

    python sample.py                                              # from out/
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0.7

out_dir's checkpoint holds the model and its tokenizer; nothing else is needed. The prompt is read once, in chunks, then each
new token costs one `step` of the model, whose state stands for all that came before:

    prompt ids ──► step ──► logits of the next token ──► temperature, top-k, min-p, top-p ──► id ──► whole characters
                    ▲ state                                                                   │
                    └─────────────────────────────────────────────────────────────────────────┘
"""
import os
import sys
import time

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py

import torch

from checkpoint import autocast, choose_device, choose_dtype, load, model_of, tokenizer_of
from configurator import configure, fail

# --- what to generate
out_dir = 'out'         # folder of train.py's checkpoints (its best one is taken), or a checkpoint file
start = '\n'            # the prompt; FILE:path reads it from a file; <|endoftext|> starts a new document
num_samples = 1         # drawn side by side in one batch
max_new_tokens = 500
stop = ''               # stop at this text (\n is a newline); several are separated by |; end-of-text always stops
# --- how to choose the next token
temperature = 0.8       # below 1 is more careful, above 1 wilder; 0 always takes the likeliest token
top_k = 200             # only among so many likeliest tokens; 0: all
top_p = 1.0             # only among the likeliest tokens that together have this probability
min_p = 0.0             # only tokens at least this times as likely as the likeliest
seed = 1337
# --- where
device = 'auto'         # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'          # 'float32', 'bfloat16', 'float16'; auto: float32 on a CPU, bfloat16 where a GPU has it
stream = True           # show the (first) sample while it is generated

PREFILL = 512           # tokens of the prompt read at once: bounds the memory of their logits


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, generator=None):
    """Draws a token for each row of logits (B, V) → (B,) int64. The filters apply in the order top-k, min-p, top-p.

    min-p: Nguyen et al. 2024; top-p (nucleus): Holtzman et al. 2020."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    if top_p < 1:
        ordered, index = (probs / probs.sum(-1, keepdim=True)).sort(descending=True, dim=-1)
        outside = ordered.cumsum(-1) - ordered >= top_p                         # the token that reaches top_p stays
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), 0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(net, prompt, num_samples, max_new_tokens, vocab_size, **how):
    """Yields (num_samples,) ids again and again: the next token of each continuation of prompt (T ≥ 1 ids).

    vocab_size: the tokenizer's; a model's vocabulary may be padded beyond it, and those ids are never drawn.
    how: the filters of `pick`. The prompt is read once, its state shared by all samples."""
    state, config = None, net.config
    window = getattr(config, 'window', None)
    if window == 0 and len(prompt) + max_new_tokens > config.block_size:
        config.window = config.block_size  # rotary positions are relative: a window of the length it was trained on
    try:
        prompt = torch.as_tensor(prompt, dtype=torch.long, device=next(net.parameters()).device)
        for chunk in prompt.split(PREFILL):
            logits, state = net.step(chunk[None], state)
        state = {name: value.repeat_interleave(num_samples, 0) for name, value in state.items()}
        logits = logits[:, -1].expand(num_samples, -1)                          # (B, V)
        for i in range(max_new_tokens):
            ids = pick(logits[:, :vocab_size], **how)
            yield ids
            if i + 1 < max_new_tokens:
                logits, state = net.step(ids[:, None], state)
                logits = logits[:, -1]
    finally:
        if window is not None:
            config.window = window


class Writer:
    """Turns one sample's ids into text, whole characters only, and ends it at end-of-text or before a stop string."""

    def __init__(self, tok, stops=()):
        self.tok, self.stops, self.decoder = tok, stops, tok.stream()
        self.text, self.shown, self.done = '', 0, False

    def feed(self, i):
        """Takes the next id; returns the text that can be shown now."""
        if self.done:
            return ''
        self.done = i == self.tok.eot
        self.text += self.decoder.flush() if self.done else self.decoder.feed(i)
        return self.show(self.done)

    def close(self):
        """Returns what was held back: an incomplete character, the beginning of a stop string."""
        if self.done:
            return ''
        self.text, self.done = self.text + self.decoder.flush(), True
        return self.show(True)

    def show(self, final):
        """The text from where the last call ended, up to a stop string or what may become one."""
        ends = [at for at in (self.text.find(s, max(0, self.shown - len(s))) for s in self.stops) if at >= 0]
        end = len(self.text)
        if ends:
            end, self.done = min(ends), True
            self.text = self.text[:end]
        elif not final:
            end -= max((n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        new, self.shown = self.text[self.shown:end], max(self.shown, end)
        return new


def encode_prompt(tok, text, setting='start'):
    """Ids of a prompt; <|endoftext|> at its beginning is the end-of-text id. Unusable text ends the program in a line
    that names the setting it came from."""
    ids = []
    if not text:
        fail(f'{setting} is empty: give a prompt, as in --{setting}="Once upon a time"; a newline alone will do')
    if text.startswith('<|endoftext|>'):
        ids, text = [tok.eot], text[len('<|endoftext|>'):]
    try:
        return ids + tok.encode(text).tolist()
    except ValueError as error:
        fail(f'{setting}: {error}; choose another --{setting}')


def main():
    if not (num_samples >= 1 and max_new_tokens >= 1):
        fail(f'num_samples={num_samples} and max_new_tokens={max_new_tokens} must be at least 1')
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        fail(f'temperature={temperature} and top_k={top_k} must be 0 or more, 0 < top_p={top_p} <= 1, 0 <= min_p={min_p} <= 1')
    if not 0 <= seed < 2**63:
        fail(f'seed={seed} must be from 0 to 2**63')
    ckpt = load(out_dir)
    net, tok = model_of(ckpt), tokenizer_of(ckpt)
    if tok is None:
        fail(f'{out_dir}: trained on a bare .bin without a tokenizer, so there is nothing to read or write text with')
    text = start
    if text.startswith('FILE:'):
        try:
            with open(text[5:], encoding='utf-8') as f:
                text = f.read()
        except (OSError, ValueError) as error:
            fail(f'start={start}: cannot be read as text: {error}')
    prompt = encode_prompt(tok, text)

    where = choose_device(device)
    precision = 'float32' if dtype == 'auto' and where == 'cpu' else choose_dtype(dtype, where)
    net.to(where)
    generator = torch.Generator(where).manual_seed(seed)
    stops = [s.replace('\\n', '\n') for s in stop.split('|') if s]
    writers = [Writer(tok, stops) for _ in range(num_samples)]

    def say(s):
        if stream:
            print(s, end='', flush=True)

    say(text.removeprefix('<|endoftext|>'))
    began, first, steps = time.perf_counter(), None, 0
    try:
        with autocast(where, precision):
            for ids in generate(net, prompt, num_samples, max_new_tokens, tok.vocab_size, temperature=temperature,
                                top_k=top_k, top_p=top_p, min_p=min_p, generator=generator):
                for row, (writer, i) in enumerate(zip(writers, ids.tolist())):
                    new = writer.feed(i)
                    if row == 0:
                        say(new)
                first, steps = first or time.perf_counter(), steps + 1
                if all(writer.done for writer in writers):
                    break
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
    now = time.perf_counter()
    say(writers[0].close() + '\n')
    for row, writer in enumerate(writers):
        writer.close()
        if row or not stream:
            print(('---------------\n' if row else '') + text.removeprefix('<|endoftext|>') + writer.text)
    if steps > 1:
        rate = num_samples * (steps - 1) / (now - first)
        print(f'{num_samples * steps} tokens, {rate:,.0f} tokens/s; prompt of {len(prompt)} read in {first - began:.2f} s',
              file=sys.stderr)


if __name__ == '__main__':
    configure(globals())
    main()
