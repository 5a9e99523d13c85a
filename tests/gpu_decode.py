"""Generation on a real NVIDIA card: graphs against the model's own step, in numbers, tokens and
time.

    python tests/gpu_decode.py              # all cases, the most telling first: some two minutes on an H100
    python tests/gpu_decode.py gpt int8     # those whose names contain one of these

Of each case a line: how far the logits of graphs are from net.step's over tokens in which a cache
grows, how many tokens are the same, tokens a second of Rows (drawn with top_k=200, read by the
host) with graphs and without, and milliseconds of making a graph. At the end `all right`, or which
cases are not; exit status 1 then. On a machine without a card it ends in a line.
"""
import os
import sys
import time
import traceback
from dataclasses import replace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from mambino.sample import decode, graphs
from mambino.sample.generation import Rows, prefill
from mambino.weights.adapters import add_lora
from mambino.weights.loading import prepare_model
from model_gpt import GPT, GPTConfig
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig

GPT_50M = GPTConfig(vocab_size=16384, n_layer=13, n_head=8, n_embd=512)
MAMBA_50M = MambaConfig(vocab_size=16384, n_layer=24, n_embd=512)
HYBRID_50M = HybridConfig(vocab_size=16384, n_layer=12, n_head=8, n_embd=512)
CASES = {   # name: class, config, dtype, precision of rounded weights
    'gpt': (GPT, GPT_50M, 'bfloat16', ''),
    'mamba2': (Mamba, MAMBA_50M, 'bfloat16', ''),
    'hybrid': (Hybrid, HYBRID_50M, 'bfloat16', ''),
    'mamba1': (Mamba, replace(MAMBA_50M, version=1, state_size=16), 'bfloat16', ''),
    'gpt-experts': (GPT, replace(GPT_50M, n_layer=6, n_expert=8, intermediate_size=512), 'bfloat16', ''),
    'gpt-gqa-window': (GPT, replace(GPT_50M, n_kv_head=2, window=100, qk_norm=True), 'bfloat16', ''),
    'gpt-float32': (GPT, GPT_50M, 'float32', ''),
    'mamba2-float32': (Mamba, MAMBA_50M, 'float32', ''),
    'gpt-lora': (GPT, GPT_50M, 'bfloat16', ''),
    'gpt-int8': (GPT, GPT_50M, 'bfloat16', 'int8'),
    'gpt-int4': (GPT, GPT_50M, 'bfloat16', 'int4'),
    'hybrid-parallel': (Hybrid, replace(HYBRID_50M, layout='parallel', window=0), 'bfloat16', ''),
    'mamba2-groups': (Mamba, replace(MAMBA_50M, n_layer=8, n_groups=2), 'bfloat16', ''),
    'gpt-float16': (GPT, GPT_50M, 'float16', ''),
    'gpt-experts-int8': (GPT, replace(GPT_50M, n_layer=6, n_expert=8, intermediate_size=512), 'bfloat16', 'int8'),
}


def made(name):
    kind, config, dtype, precision = CASES[name]
    torch.manual_seed(0)
    net = kind(config).eval()
    if 'lora' in name:
        add_lora(net)
    return prepare_model(net, 'cuda', dtype, precision)


@torch.no_grad()
def compare(net, B=3, T=54, n=20):
    """Both ways along the same tokens → (the largest deviation as a share of the largest logit, the
    share of tokens whose likeliest next one is the same). From 54 tokens to 74 a cache grows
    once."""
    prompt = torch.randint(net.config.vocab_size, (B, T), device='cuda')
    _, state = net.step(prompt)
    other = {name: value.clone() for name, value in state.items()}
    worst, same = 0.0, []
    idx = torch.randint(net.config.vocab_size, (B, 1), device='cuda')
    for _ in range(n):
        want, other = net.step(idx, other)
        torch.cuda.set_sync_debug_mode('error')
        got, state = decode.step(net, idx, state)
        torch.cuda.set_sync_debug_mode('default')
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
        same.append((got.argmax(-1) == want.argmax(-1)).float().mean())
        idx = want[:, -1].argmax(-1, keepdim=True)
    return worst, float(torch.stack(same).mean())


@torch.no_grad()
def speed(net, B, n=200):
    """Tokens a second of B rows, drawn and read by the host, behind 8 more."""
    rows = Rows(net, net.config.vocab_size)
    rows.add([prefill(net, list(range(1, 33)))] * B)
    generators = [torch.Generator().manual_seed(row) for row in range(B)]
    for i in range(8 + n):
        if i == 8:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        rows.advance(rows.draw(temperature=0.8, top_k=200, generator=generators))
    torch.cuda.synchronize()
    return B * n / (time.perf_counter() - begun)


def run(name):
    begun = time.perf_counter()
    net, context = made(name)
    weights = sum(p.nbytes for p in {id(p): p for p in (*net.parameters(), *net.buffers())}.values())
    with context:
        worst, same = compare(net)
        times = []
        record = graphs.Token.__init__

        def timed(*args):
            begun = time.perf_counter()
            record(*args)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        graphs.Token.__init__ = timed
        with_graphs = [speed(net, B) for B in (1, 16)]
        graphs.Token.__init__ = record
        trouble = graphs.models[net].trouble
        graphs.models[net].trouble = 'left out'
        without = [speed(net, B, 8) for B in (1, 16)]
    limit = 1e-4 if 'float32' in name else 0.03
    is_right = worst < limit and same > 0.9 and not trouble
    took = f'{1e3 * sum(times) / max(1, len(times)):.0f} ms a graph, {time.perf_counter() - begun:.0f} s in all'
    print(f'{name:18} logits {worst:.1e}, {same:4.0%} the same | 1 row {with_graphs[0]:7,.0f} tokens/s, plain '
          f'{without[0]:6,.0f} | 16 rows {with_graphs[1]:7,.0f}, plain {without[1]:6,.0f} | {weights / 1e6:.0f} MB | '
          f'{took}{"" if is_right else " | WRONG " + trouble}', flush=True)
    return is_right


def main():
    if not torch.cuda.is_available():
        sys.exit('no NVIDIA card here: nothing was checked')
    print(torch.cuda.get_device_name(), torch.__version__)
    names = [name for name in CASES if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    wrong = []
    for name in names:
        try:
            if not run(name):
                wrong.append(name)
        except Exception:
            traceback.print_exc()
            torch.cuda.set_sync_debug_mode('default')
            wrong.append(name)
    print('wrong: ' + ', '.join(wrong) if wrong else 'all right')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
