"""Generates text from a trained model, and says how likely a text is to it.

    python sample.py                                              # from out/
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0.7
    python sample.py --start=LINES:prompts.txt --temperature=0    # each line a prompt, side by side
    python sample.py --session=tale --start="Once upon a time"    # tomorrow: --session=tale, and it goes on
    python sample.py --score=book.txt                             # perplexity, and what surprised the model

out_dir's checkpoint holds the model and its tokenizer; nothing else is needed. The prompt is read once, in chunks, then each
new token costs one `step` of the model, whose state stands for all that came before:

    prompt ids ──► step ──► logits of the next token ──► penalty, temperature, top-k, min-p, top-p ──► id ──► whole characters
                    ▲ state                                                                            │
                    └──────────────────────────────────────────────────────────────────────────────────┘

generation.py does that, for many rows at once; sessions.py keeps a state for later; here is what is read and shown.
"""
import heapq
import math
import os
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py

import torch

from mambino.sample import sessions
from mambino.machine import autocast, choose_device, choose_dtype
from mambino.weights.adapters import attach_adapter
from mambino.weights.checkpoint import fingerprint, load_checkpoint, tokenizer_of
from mambino.weights.from_peft import load_adapter
from mambino.weights.loading import model_of
from mambino.configurator import configure, fail, require
from mambino.sample.generation import Rows, Writer, beam_search, chat_marks, chat_turn, encode_prompt, logprobs_of, prefill, token_losses, token_text

# --- what to generate
out_dir = 'out'         # folder of train.py's checkpoints (its best one is taken), or a checkpoint file
start = '\n'            # the prompt; FILE:path: that file is it, LINES:path: each line is one; <|endoftext|> starts a new document
num_samples = 1         # of each prompt, drawn side by side
max_new_tokens = 500    # 0: without end, until a stop or Ctrl-C
stop = ''               # stop at this text (\n is a newline); several are separated by |; end-of-text always stops
batch_size = 16         # rows at most side by side; as one is done, the next begins
# --- how to choose the next token
temperature = 0.8       # below 1 is more careful, above 1 wilder; 0 always takes the likeliest token
top_k = 200             # only among so many likeliest tokens; 0: all
top_p = 1.0             # only among the likeliest tokens that together have this probability
min_p = 0.0             # only tokens at least this times as likely as the likeliest
repetition_penalty = 1.0  # above 1 what is in the text already becomes less likely; 1.1 to 1.3 is usual (CTRL, Keskar et al. 2019)
seed = 1337             # each row has a generator of its own, from this and the row's number
# --- beams: the likeliest text instead of a drawn one; temperature and the filters above play no part
beams = 1               # continuations followed side by side; the best num_samples of them are shown
length_penalty = 1.0    # a text's score is its logprob / tokens ** length_penalty: above 0 favours long ones, below 0 short ones
# --- a conversation, or a text to go on with tomorrow
interactive = False     # each line typed continues the text, is answered, and never read again; Ctrl-C ends an answer, Ctrl-D all.
                        # A \ at the end of a line: it goes on below; an empty line: the model just goes on
chat = False            # with interactive: lines and answers are messages in ChatML (for models tuned on it); start is the system message
session = ''            # a name: the text's state is kept in out_dir/sessions and goes on from there the next time, with start, if given
fork = ''               # begin that session as a copy of this one
# --- what to say of a text
logprobs = 0            # show each token drawn with its logprob under the model, and of so many likeliest
score = ''              # instead of generating: the perplexity of this file (-: standard input)
# --- where
device = 'auto'         # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'          # 'float32', 'bfloat16', 'float16'; auto: float32 on a CPU, bfloat16 where a GPU has it
quantize = ''           # 'int8', 'int4', 'bfloat16': smaller weights; on a CPU also faster ones
adapters = ''           # out_dirs of adapters of this model, or folders of peft, each with its weight: out-a,out-b:0.5
stream = True           # show the (first) sample while it is generated

RULE = '---------------'


# --- what is read -----------------------------------------------------------------------------------------------------

def read_text(path, setting):
    try:
        with open(path, encoding='utf-8') if path != '-' else open(sys.stdin.fileno(), encoding='utf-8', closefd=False) as f:
            return f.read()
    except (OSError, ValueError) as error:
        fail(f'{setting}: cannot be read as text: {error}')


def prompts_of(text):
    """The prompts that `start` asks for."""
    if text.startswith('FILE:'):
        return [read_text(text[5:], f'start={text}')]
    if text.startswith('LINES:'):
        lines = [line for line in read_text(text[6:], f'start={text}').split('\n') if line.strip()]
        return lines or fail(f'start={text}: holds no prompt; LINES: takes each line that is not empty, FILE: the whole file as one')
    return [text]


# --- showing ----------------------------------------------------------------------------------------------------------

@contextmanager
def patience():
    """A list that is no longer empty after Ctrl-C: a state must not be left half way. A second Ctrl-C ends the program."""
    hit = []

    def note(*args):
        hit.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield hit
    finally:
        signal.signal(signal.SIGINT, before)


def say(text):
    print(text, end='', flush=True)


def show_table(tok, table):
    """Prints the logprobs of tokens, [(id, (logprob, [(id, logprob), …])), …]."""
    cells = [(token_text(tok, i), f'{own:.3f}', [f'{token_text(tok, j)} {theirs:.3f}' for j, theirs in others])
             for i, (own, others) in table]
    width = max([len(cell[0]) for cell in cells] + [5])
    columns = [max(map(len, column)) for column in zip(*(cell[2] for cell in cells))]
    print(f'{"token":<{width}}  {"logprob":>8}  likeliest')
    for token, own, others in cells:
        print(f'{token:<{width}}  {own:>8}  ' + '  '.join(f'{other:<{n}}' for other, n in zip(others, columns)).rstrip())


def show_rate(tokens, seconds, reading, prompt):
    if tokens and seconds:
        print(f'{tokens} tokens, {tokens / seconds:,.0f} tokens/s; prompt of {prompt} read in {reading:.2f} s', file=sys.stderr)


# --- what can be asked for --------------------------------------------------------------------------------------------

def complete(net, tok, texts, stops, how):
    """Continues each prompt num_samples times, in rows side by side, and shows the results in order, the first as it grows."""
    prompts = [encode_prompt(tok, text) for text in texts]
    waiting = deque((text, ids) for text, ids in zip(texts, prompts) for _ in range(num_samples))
    rows, active, shown, results = Rows(net, tok.vocab_size, repetition_penalty), [], 0, {}
    last, begun, reading, tokens, began = None, 0, 0.0, 0, time.perf_counter()

    def finish(row):
        """Keeps a row's result, and shows those that are next in order."""
        nonlocal shown
        rest, results[row['number']] = row['writer'].close(), row
        while shown in results:
            row = results.pop(shown)
            if stream and shown == 0:
                say(rest + '\n')
            else:
                print((f'{RULE}\n' if shown else '') + row['text'] + row['writer'].text)
            if logprobs:
                show_table(tok, row['table'])
            shown += 1

    with patience() as interrupted:
        while (waiting or active) and not interrupted:
            fresh = []
            while waiting and len(active) < batch_size:
                text, ids = waiting.popleft()
                if last is None or last[2] is not ids:                          # samples of one prompt share what was read
                    at = time.perf_counter()
                    last = prefill(net, ids)
                    reading += time.perf_counter() - at
                fresh.append(last)
                text = text.removeprefix('<|endoftext|>')
                writer = Writer(tok, stops, ids, keep=begun > 0 or not stream)
                generator = torch.Generator().manual_seed((seed + begun * 0x9E3779B97F4A7C15) % 2**63)  # an odd factor: no two alike
                active.append(dict(number=begun, text=text, writer=writer, generator=generator, length=0, table=[]))
                if stream and begun == 0:
                    say(text)
                begun += 1
            if fresh:
                rows.add(fresh)
                last = last if waiting else None                                # its state is copied
            drawn = rows.draw(generator=[row['generator'] for row in active], **how)
            likely = logprobs_of(rows.logits, drawn, logprobs, tok.vocab_size) if logprobs else None
            stay = []
            for place, (row, i) in enumerate(zip(active, drawn.tolist())):
                new = row['writer'].feed(i)
                if stream and row['number'] == 0 and new:
                    say(new)
                if likely:
                    row['table'].append((i, likely[place]))
                row['length'] += 1
                if row['writer'].done or row['length'] == max_new_tokens:
                    finish(row)
                else:
                    stay.append(place)
            tokens += len(active)
            if len(stay) < len(active):
                active = [active[place] for place in stay]
                rows.keep(stay)
                drawn = drawn[stay]
            if active and not interrupted:
                rows.advance(drawn)
    for row in active:
        finish(row)
    if interrupted:
        print('interrupted', file=sys.stderr)
    show_rate(tokens, time.perf_counter() - began - reading, reading, sum(map(len, prompts)))


def show_beams(net, tok, texts, stops):
    """The best num_samples of `beams` continuations of each prompt, with their scores."""
    longest = max((len(s.encode()) for s in stops), default=0)

    def ends(ids):  # a token is a byte or more
        return ids[-1] == tok.eot or any(s in tok.decode(ids[-longest - 4:]) for s in stops)

    for text in texts:
        found = beam_search(net, encode_prompt(tok, text), beams, max_new_tokens, tok.vocab_size, ends, length_penalty, repetition_penalty)
        for total, ids in found[:num_samples]:
            writer = Writer(tok, stops, encode_prompt(tok, text))
            for i in ids:
                writer.feed(i)
            writer.close()
            print(f'{RULE} score {total:.4f}, {len(ids)} tokens\n{text.removeprefix("<|endoftext|>")}{writer.text}')


def answer(net, tok, text, ids, stops, how, ends=()):
    """Goes on with a session's text: reads ids, then draws and shows tokens until one ends the answer."""
    writer = Writer(tok, stops, [*text.tokens[-16:], *ids], ends, keep=not stream)
    began, first, table = time.perf_counter(), None, []
    with patience() as interrupted:
        for n, (i, logits) in enumerate(text.go_on(net, tok, ids, repetition_penalty, ends, **how), 1):
            first = first or time.perf_counter()
            new = writer.feed(i)
            if stream and new:
                say(new)
            if logprobs:
                table.append((i, logprobs_of(logits, torch.tensor([i], device=logits.device), logprobs, tok.vocab_size)[0]))
            if writer.done or interrupted or n == max_new_tokens:
                break
    seconds, rest = time.perf_counter() - first, writer.close()
    say((rest if stream else writer.text) + '\n')
    if logprobs:
        show_table(tok, table)
    if not interactive and n > 1:                                               # what the first took, the prompt took
        show_rate(n, seconds * n / (n - 1), first - began, len(ids))
    if interrupted:
        print('interrupted', file=sys.stderr)


def typed():
    """What the user types next, lines that end in \\ taken together; None at the end of the input."""
    lines, person = [], sys.stdin.isatty()
    while not lines or lines[-1].endswith('\\'):
        try:
            lines.append(input('> ' if person else ''))
        except EOFError:
            if not lines:
                return None
            break
        except KeyboardInterrupt:                                               # meant for an answer that had just ended, or for the line
            if not person:
                raise
            lines = []
            print()
        except UnicodeDecodeError as error:
            fail(f'standard input is not UTF-8: {error}')
    return '\n'.join([line.removesuffix('\\') for line in lines[:-1]] + lines[-1:])


def converse(net, tok, text, opening, stops, how, save):
    """Reads lines and answers each, until there are no more. text: a session; opening: what stands before the first line."""
    system = [('system', opening)] if chat and opening else []
    ids = encode_prompt(tok, opening) if opening and not chat else []
    if sys.stdin.isatty():
        print('Enter sends a line, Ctrl-C ends an answer, Ctrl-D the conversation', file=sys.stderr)
    while (line := typed()) is not None:
        try:
            if chat:
                more = chat_turn(tok, system + [('user', line)], first=not text.tokens)
            else:
                more = ids + tok.encode(line).tolist()
        except ValueError as error:
            print(f'{error}; say it otherwise', file=sys.stderr)
            continue
        ids, system = [], []
        answer(net, tok, text, more, stops, how, chat_marks(tok)[1:] if chat else ())
        save()
    if sys.stdin.isatty():
        print()


def show_score(net, tok, path):
    """Prints how well the model predicts a text, as a document of its own, and the tokens that it expected least."""
    text = read_text(path, f'score={path}')
    try:
        ids = tok.encode(text)
    except ValueError as error:
        fail(f'score={path}: {error}; score another text, or with another model')
    len(ids) or fail(f'score={path}: is empty, there is nothing to score')
    total, seen, worst, began = 0.0, 0, [], time.perf_counter()
    for nats in token_losses(net, ids, tok.eot):
        nats = nats.cpu()
        total += nats.double().sum().item()
        values, index = nats.topk(min(10, len(nats)))
        worst = heapq.nlargest(10, worst + [(value, seen + at) for value, at in zip(values.tolist(), index.tolist())])
        seen += len(nats)
        if sys.stderr.isatty():
            rate = seen / (time.perf_counter() - began)
            print(f'\r{seen:,} of {len(ids):,} tokens, {rate:,.0f} tokens/s, {(len(ids) - seen) / rate:,.0f} s left   ',
                  end='\n' if seen == len(ids) else '', file=sys.stderr, flush=True)
    loss = total / len(ids)
    print(f'tokens      {len(ids):,}\nloss        {loss:.4f} nats/token\nperplexity  {math.exp(loss) if loss < 99 else math.inf:,.2f}\n'
          f'bits/byte   {total / math.log(2) / len(text.encode()):.4f}\n\nleast expected, in nats:')
    for value, at in worst:
        before, after = (repr(tok.decode(part))[1:-1] for part in (ids[max(0, at - 12):at], ids[at + 1:at + 6]))
        print(f'{value:7.2f}  {before}  >>{token_text(tok, ids[at])[1:-1]}<<  {after}')


# --- the program ------------------------------------------------------------------------------------------------------

def check_settings(explicit):
    """Ends the program at settings that cannot be, alone or together. explicit: those the user gave."""
    require(globals(), {
        'at least 1': dict(num_samples=num_samples >= 1, batch_size=batch_size >= 1, beams=beams >= 1),
        '0 or more': dict(temperature=temperature >= 0, top_k=top_k >= 0, logprobs=logprobs >= 0),
        '1 or more, or 0: without end': dict(max_new_tokens=max_new_tokens >= 0),
        'above 0 and at most 1': dict(top_p=0 < top_p <= 1),
        'from 0 to 1': dict(min_p=0 <= min_p <= 1),
        'above 0 and at most 100; 1 is none': dict(repetition_penalty=0 < repetition_penalty <= 100),
        'from -10 to 10': dict(length_penalty=-10 <= length_penalty <= 10),
        'from 0 to 2**63 - 1': dict(seed=0 <= seed < 2**63),
        'int8, int4, bfloat16, or empty': dict(quantize=quantize in ('', 'int8', 'int4', 'bfloat16')),
    })
    on = dict(beams=beams > 1, stream=explicit.get('stream'), interactive=interactive, session=session, logprobs=logprobs, score=score,
              num_samples=num_samples > 1, start=start.startswith('LINES:'))
    for one, others in dict(beams='stream interactive session logprobs score', score='interactive session logprobs num_samples start',
                            interactive='num_samples start', session='num_samples start').items():
        for other in others.split():
            if on[one] and on[other]:
                fail(f'{one}={globals()[one]} and {other}={globals()[other]} do not go together: leave out one of them')
    if beams > 1 and (num_samples > beams or not max_new_tokens):
        fail(f'beams={beams} find as many texts, of a length that is known before: num_samples={num_samples} must be at most beams, '
             f'max_new_tokens={max_new_tokens} at least 1')
    for one, needs in (('chat', 'interactive'), ('fork', 'session')):
        if globals()[one] and not globals()[needs]:
            fail(f'{one}={globals()[one]} needs --{needs} too')
    if (interactive or score == '-') and sys.stdin is None:
        fail('there is no standard input to read from: it was closed')


def prepared(ckpt, extra, where):
    """The model of a checkpoint with adapters [(checkpoint, weight), …], on its device in its precision; the context it computes in."""
    net = model_of(ckpt)
    if extra:
        try:
            for other, weight in extra:
                attach_adapter(net, other, weight)
        except ValueError as error:
            fail(f'adapters={adapters}: {error}')
    net.to(where)
    precision = 'float32' if dtype == 'auto' and where == 'cpu' else choose_dtype(dtype, where)
    how = quantize or ('bfloat16' if precision == 'bfloat16' and where == 'cpu' else '')  # there faster than autocast
    if how:
        from mambino.weights import quantize as weights                                              # the setting has the module's name
        try:
            weights.quantize_model(net, how)
        except ValueError as error:
            fail(f'quantize={how}: {error}')
        precision = 'float32' if where == 'cpu' else precision
    return net, autocast(where, precision)


def adapters_of(text):
    """[(checkpoint, weight), …] of a list as out-a,out-b:0.5."""
    found = []
    for part in filter(None, text.split(',')):
        path, _, weight = part.rpartition(':')
        if not path or os.path.exists(part):
            path, weight = part, '1'
        try:
            found.append((load_adapter(path), float(weight)))
        except ValueError:
            fail(f'adapters={text}: {weight} is not a weight; write it as --adapters=out-a,out-b:0.5')
        if not found[-1][0].get('adapter'):
            fail(f'adapters={text}: {path} holds a whole model, no adapter')
    return found


def open_session(print_of_model, where):
    """→ the session that is asked for, whether it was there before, and the function that saves it."""
    text, old, path = sessions.Session(seed), False, sessions.path_of(out_dir, session)
    if fork:
        if os.path.exists(path):
            fail(f'session={session}: is there already, and would be lost; delete {path}, or name another --session')
        text, old = sessions.load_session(sessions.path_of(out_dir, fork, 'fork'), print_of_model, where), True
        text.save(path, print_of_model)
    elif os.path.exists(path):
        text, old = sessions.load_session(path, print_of_model, where), True
    sessions.make_room(path)
    return text, old, lambda: text.save(path, print_of_model)


def main(explicit):
    check_settings(explicit)
    ckpt, extra = load_checkpoint(out_dir), adapters_of(adapters)
    tok = tokenizer_of(ckpt)
    if tok is None:
        fail(f'{out_dir}: trained on a bare .bin without a tokenizer, so there is nothing to read or write text with')
    where = choose_device(device)
    text, old, save = sessions.Session(seed), False, lambda: None
    if session:
        weights = {f'{n}.{name}.{weight}': tensor for n, (other, weight) in enumerate([(ckpt, 1.0), *extra])
                   for name, tensor in other['weights'].items()}
        text, old, save = open_session(fingerprint(weights), where)
    if old and 'seed' in explicit:
        text.generator.manual_seed(seed)
    given = start if 'start' in explicit or not (old or interactive) else ''
    texts = prompts_of(given) if given or not session else []
    net, context = prepared(ckpt, extra, where)
    stops = [s.replace('\\n', '\n') for s in stop.split('|') if s]
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with context:
        if score:
            show_score(net, tok, score)
        elif interactive:
            converse(net, tok, text, ''.join(texts), stops, how, save)
        elif session:
            ids = encode_prompt(tok, texts[0]) if texts else []
            if stream and texts:
                say(texts[0].removeprefix('<|endoftext|>'))
            answer(net, tok, text, ids, stops, how)
            save()
        elif beams > 1:
            show_beams(net, tok, texts, stops)
        else:
            complete(net, tok, texts, stops, how)


if __name__ == '__main__':
    try:
        main(configure(globals()))
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                                     # who read it, as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
