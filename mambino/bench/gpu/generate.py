"""The part `generate`: how many tokens a second are written, one sequence and 16, and how fast a
prompt is read; by the models' own step and by mambino.sample.decode; and by transformers'
generate."""
import time

import torch

from mambino import machine
from mambino.bench.gpu import models, speed
from mambino.sample import decode
from mambino.weights.loading import prepare_model

PROMPTS = (512, 2000)
BATCHES = (1, 16)
NEW = 64


def run(recorder, device, out_dir):
    is_cuda = device.startswith('cuda')
    for kind, (kind_of, config) in models.MIDDLE_MODELS.items():
        if not is_cuda:
            config = config | models.tiny(kind) | dict(vocab_size=256)
        net = models.on_device(kind_of, config, device).eval()
        net, _ = prepare_model(net, device, dtype_of(device))   # as sample.py does
        for B in BATCHES:
            label = f'{kind}, {B} at once'
            with recorder.item(label, 6) as wanted:
                if wanted:
                    measure_writing(recorder, label, net, B, device)
        for T in PROMPTS if is_cuda else (32,):
            label = f'{kind}, a prompt of {T}'
            with recorder.item(label, 4) as wanted:
                if wanted:
                    measure_reading(recorder, label, net, T, device)
        with recorder.item(f'{kind}, ten lengths of prompts', 8) as wanted:
            if wanted:
                measure_lengths(recorder, f'{kind}, ten lengths of prompts', net, device)
        del net
    with recorder.item('transformers, 1 at once', 15) as wanted:
        if wanted:
            measure_transformers(recorder, device)


def dtype_of(device):
    return 'bfloat16' if device.startswith('cuda') else 'float32'


def write(step, net, B, device, dtype):
    """Seconds a token, greedy, of NEW tokens after a prompt of 32 and 8 more tokens."""
    idx = models.tokens(B, 32, net.config.vocab_size, device)
    with torch.no_grad(), machine.autocast(device, dtype):
        logits, state = step(net, idx, None, True)
        for i in range(8 + NEW):
            if i == 8:
                models.synchronize(device)
                begun = time.perf_counter()
            idx = logits[:, -1].argmax(-1, keepdim=True)
            logits, state = step(net, idx, state)
        models.synchronize(device)
    return (time.perf_counter() - begun) / NEW


def plain_step(net, idx, state=None, last=False):
    return net.step(idx, state, last)


def measure_writing(recorder, label, net, B, device):
    """By net.step under autocast, and by decode.step, which has CUDA graphs where it can."""
    dtype = dtype_of(device)
    plain = write(plain_step, net, B, device, dtype)
    planned = write(decode.step, net, B, device, dtype)
    recorder.add(label, f'{B / plain:,.0f} tokens/s by the model\'s step ({plain * 1e3:.2f} ms a token), '
                 f'{B / planned:,.0f} by decode.step ({planned * 1e3:.2f} ms): {plain / planned:.2f} x',
                 plain=B / plain, planned=B / planned)


def measure_reading(recorder, label, net, T, device):
    idx = models.tokens(1, T, net.config.vocab_size, device)
    dtype = dtype_of(device)

    def read():
        with torch.no_grad(), machine.autocast(device, dtype):
            decode.step(net, idx, None, True)
    seconds = speed.seconds_of(read, device, least=0.5)
    recorder.add(label, f'{T / seconds:,.0f} tokens/s ({seconds * 1e3:.1f} ms)',
                 tokens_per_second=T / seconds)


def measure_lengths(recorder, label, net, device):
    """A prompt of a new length must not make anything be compiled anew: the longest of ten is no
    second."""
    dtype = dtype_of(device)
    spent = []
    with torch.no_grad(), machine.autocast(device, dtype):
        for T in range(300, 1000, 70):
            idx = models.tokens(1, T, net.config.vocab_size, device)
            begun = time.perf_counter()
            decode.step(net, idx, None, True)
            models.synchronize(device)
            spent.append(time.perf_counter() - begun)
    recorder.add(label, f'the first took {spent[0] * 1e3:.0f} ms, of the others the longest '
                 f'{max(spent[1:]) * 1e3:.0f} ms', passed=max(spent[1:]) < 1)


def measure_transformers(recorder, device):
    """generate of a Llama of the GPT's sizes, bf16 weights: what its users call."""
    is_cuda = device.startswith('cuda')
    config = models.MIDDLE_MODELS['gpt'][1]
    if not is_cuda:
        config = config | models.tiny('gpt') | dict(vocab_size=256)
    net = speed.llama(config, device).eval()
    if is_cuda:
        net = net.to(torch.bfloat16)
    new = NEW if is_cuda else 4
    for B in BATCHES:
        idx = models.tokens(B, 32, config['vocab_size'], device)
        arguments = dict(attention_mask=torch.ones_like(idx), do_sample=False, pad_token_id=0,
                         eos_token_id=None)
        net.generate(idx, max_new_tokens=4, **arguments)
        models.synchronize(device)
        begun = time.perf_counter()
        net.generate(idx, max_new_tokens=new, **arguments)
        models.synchronize(device)
        seconds = (time.perf_counter() - begun) / new
        text = f'{B / seconds:,.0f} tokens/s ({seconds * 1e3:.2f} ms a token)'
        recorder.add(f'transformers Llama, {B} at once', text, tokens_per_second=B / seconds)
