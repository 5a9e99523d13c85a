"""
Measures generation on a CPU: our models in each of their precisions, beside transformers' generate and llama.cpp.

    python bench_generate.py                                # 50M parameters, one sequence and 16 at once; some minutes
    python bench_generate.py --kinds=mamba --batches=1 --rounds=5

Weights are random; models of a kind have equal sizes: GPT beside LlamaForCausalLM, Mamba beside MambaForCausalLM and Mamba2ForCausalLM,
the hybrid beside FalconH1ForCausalLM. Every contender continues the same prompt greedily. What counts is the time of a new token once
the prompt has been read. Contenders take turns in one process, and ratios are medians of those within a round, so that what slows the
machine for a while slows all. GB/s is what a token must read at least, its weights, over the time it took; the first line has what this
machine reads and writes when it copies.
"""
import importlib.util
import os
import statistics
import tempfile
import time

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py

import torch

from mambino.weights import checkpoint
from mambino.train import memory as fit
from mambino.weights import quantize
from mambino.configurator import configure, fail
from mambino.machine import copy_bandwidth

kinds = 'gpt,mamba,hybrid,mamba1'
ways = 'float32,bfloat16,int8,int4'     # ours
their_dtypes = 'float32,bfloat16'       # transformers'
batches = '1,16'                        # sequences at once
size = '50m'                            # see SIZES in fit.py
vocab_size = 16384
prompt = 32                             # tokens
new_tokens = 64
rounds = 3
threads = 0                             # 0: as many as torch takes
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    configure(globals(), positional=None)


def config_of(kind):
    """(kind, fields) of our model."""
    family = 'mamba' if kind == 'mamba1' else kind
    fields = dict(fit.SIZES[family, size], vocab_size=vocab_size)
    fields |= dict(version=1) if kind == 'mamba1' else {} if family == 'mamba' else dict(n_head=fields['n_embd'] // 64)
    return family, fields


def ours(kind, how):
    torch.manual_seed(0)
    net = checkpoint.build(*config_of(kind)).eval()
    return net if how == 'float32' else quantize.quantize_model(net, how)


def theirs(kind, dtype):
    """transformers' model of the same shape."""
    from mambino.export import to_hf
    import transformers
    transformers.logging.set_verbosity_error()
    family, fields = config_of(kind)
    if kind == 'hybrid':                                    # of those the one that transformers has
        fields |= dict(gate=False, branch_norm=False, window=0)
    with torch.device('meta'):
        keys = to_hf.describe(checkpoint.build(family, fields))[0] | dict(tie_word_embeddings=True)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**keys)).to(getattr(torch, dtype)).eval()


def weights_read(net):
    """Bytes a token reads: all weights once, those of the embedding as the head."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers())}.values())


# --- contenders: functions of ids (B, T) and a number of tokens, to the seconds that reading the prompt took, and the rest

@torch.no_grad()
def run_ours(net, ids, n):
    began = time.perf_counter()
    logits, state = net.step(ids)
    token = logits[:, -1].argmax(-1)
    first = time.perf_counter()
    for _ in range(n):
        logits, state = net.step(token[:, None], state)
        token = logits[:, -1].argmax(-1)
    return first - began, time.perf_counter() - first


@torch.no_grad()
def run_theirs(model, ids, n):
    from transformers import LogitsProcessorList
    times = []

    def note(_, scores):                                    # called for every token; a streamer takes one sequence only
        times.append(time.perf_counter())
        return scores

    began = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=n + 1, max_new_tokens=n + 1, do_sample=False, pad_token_id=0,
                   logits_processor=LogitsProcessorList([note]))
    return times[0] - began, times[-1] - times[0]


def run_llama(llm, ids, n):
    llm.reset()
    began = time.perf_counter()
    llm.eval(ids[0].tolist())
    first = time.perf_counter()
    for _ in range(n):
        llm.eval([int(llm._scores[-1].argmax())])
    return first - began, time.perf_counter() - first


def open_llama(kind, how, folder):
    """A model of ours as llama.cpp reads it, written by to_gguf.py, and the size of its file."""
    import llama_cpp
    from mambino.export import to_gguf
    os.makedirs(folder, exist_ok=True)
    to_gguf.write(ours(kind, 'float32'), None, folder, '' if how == 'float32' else how)
    path = next(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.gguf'))
    return llama_cpp.Llama(path, n_ctx=prompt + new_tokens + 8, n_threads=torch.get_num_threads(), logits_all=False, verbose=False), os.path.getsize(path)


def contenders(kind, batch, folder):
    """{name: (function, model, bytes a token)}; what cannot be had is said and left out."""
    found = {}
    for how in ways.split(','):
        net = ours(kind, how)
        found[f'ours {how}'] = run_ours, net, weights_read(net)
    for dtype in filter(None, their_dtypes.split(',')):
        try:
            model = theirs(kind, dtype)
            found[f'transformers {dtype}'] = run_theirs, model, weights_read(model)
        except ImportError as error:
            print(f'transformers: left out, {error}')
    if batch == 1 and importlib.util.find_spec('llama_cpp') and importlib.util.find_spec('to_gguf'):
        for how in [how for how in ways.split(',') if how != 'bfloat16']:
            try:
                found[f'llama.cpp {how}'] = run_llama, *open_llama(kind, how, os.path.join(folder, kind, how))
            except Exception as error:                      # of a library, about a model it does not know
                print(f'llama.cpp {how}: left out, {str(error).splitlines()[0]}')
    return found


def measure(kind, batch, folder):
    """{name: [seconds a token, one a round]}, printed as a table."""
    ids = torch.randint(vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
    racers, times, firsts = contenders(kind, batch, folder), {}, {}
    for name in list(racers):
        try:
            racers[name][0](*racers[name][1:2], ids, 2)     # once, to compile and to warm up
        except Exception as error:
            print(f'{name}: left out, {type(error).__name__}: {str(error).splitlines()[0]}')
            del racers[name]
    for _ in range(rounds):
        for name, (run, model, _) in racers.items():
            first, rest = run(model, ids, new_tokens)
            times.setdefault(name, []).append(rest / new_tokens)
            firsts.setdefault(name, []).append(first)
    base = [name for name in times if name.startswith('transformers')]
    print(f'\n{kind}, {batch} sequence{"s" * (batch > 1)}\n{"":<24}{"tokens/s":>10}{"ms/step":>9}{"GB/s":>7}{"prompt ms":>11}'
          + ''.join(f'{"x " + name.removeprefix("transformers "):>14}' for name in base))
    for name, each in times.items():
        middle = statistics.median(each)
        print(f'{name:<24}{batch / middle:>10,.0f}{middle * 1e3:>9.2f}{racers[name][2] / middle / 1e9:>7.1f}'
              f'{statistics.median(firsts[name]) * 1e3:>11.1f}' + ''.join(f'{ratio(times[b], each):>14.2f}' for b in base))
    if 'ours int8' in times and 'ours bfloat16' in times:
        print(f'{"int8 against bfloat16":<24}{ratio(times["ours bfloat16"], times["ours int8"]):>10.2f}')
    return times


def ratio(a, b):
    return statistics.median(x / y for x, y in zip(a, b))


def main():
    if not (new_tokens >= 1 and rounds >= 1 and prompt >= 1 and set(ways.split(',')) <= {'float32', *quantize.PRECISIONS}):
        fail(f'new_tokens={new_tokens}, rounds={rounds} and prompt={prompt} must be at least 1, ways={ways} some of float32, '
             + ', '.join(quantize.PRECISIONS))
    torch.set_num_threads(threads or torch.get_num_threads())
    print(f'{torch.get_num_threads()} threads, memory copied at {copy_bandwidth("cpu") / 1e9:.1f} GB/s; prompts of {prompt} tokens, {new_tokens} new ones, {rounds} rounds')
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds.split(','):
            found = {batch: measure(kind, batch, folder) for batch in map(int, batches.split(','))}
            few, many = min(found), max(found)
            if few < many:
                print(f'{many} sequences against {few}, tokens/s: ' + ', '.join(
                    f'{name} {many / few * ratio(found[few][name], found[many][name]):.1f}' for name in found[few] if name in found[many]))


if __name__ == '__main__':
    main()
