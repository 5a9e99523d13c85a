"""The parts `speed_gpt` and `speed_mamba`: micro-steps of a full-sized model in bf16: tokens/s,
MFU, peak memory, the kernels that take most time; eager and compiled; and a peer of the same shape
beside them.

MFU counts model.flops_per_token against the sheet's peak of the card (machine.PEAKS). A micro-step
is forward and backward; a step of 131,072 tokens adds one update of the weights."""
import contextlib
import gc
import time

import torch

from mambino import kernels, machine
from mambino.bench.gpu import models
from mambino.kernels.registry import KERNELS

TOKENS_PER_STEP = 131072
SECONDS = 1.0           # of measuring
FEW_LAYERS = 12         # of a Mamba-2 that is compiled: the time that takes grows with them
OWN = ('cuda', 'fused', 'triton')   # files whose kernels only a card has
TOP = 10                # kernels that are named


def run(recorder, device, out_dir):
    torch.set_float32_matmul_precision('high')
    if not device.startswith('cuda'):
        sizes, batches, T = dict(n_layer=1, n_embd=64, vocab_size=256), (1, 2), 32
    else:
        sizes, batches, T = {}, (8, 16, 32), 1024
    measure_all = {'speed_gpt': run_gpt, 'speed_mamba': run_mamba}[recorder.part]
    measure_all(recorder, device, sizes, batches, T)


def run_gpt(recorder, device, sizes, batches, T):
    kind, config = models.LARGE_MODELS['gpt']
    config = config | sizes | (dict(n_head=2) if sizes else {})
    first, *_, most = batches
    compiling = dict(compiled=True, seconds=60 if device.startswith('cuda') else 1)
    peer_name = 'transformers Llama'
    measure(recorder, 'compiled', kind, config, device, most, T, profiled=True, **compiling)
    measure(recorder, 'eager', kind, config, device, most, T)
    peer(recorder, f'{peer_name}, compiled', config, device, most, T, **compiling)
    peer(recorder, f'{peer_name}, eager', config, device, most, T)
    measure(recorder, 'eager', kind, config, device, first, T, profiled=True)
    for B in batches[:-1]:
        measure(recorder, 'compiled', kind, config, device, B, T, **compiling)


def run_mamba(recorder, device, sizes, batches, T):
    kind, config = models.LARGE_MODELS['mamba']
    config = config | sizes
    few = config | dict(n_layer=min(FEW_LAYERS, config['n_layer']))
    compiling = dict(compiled=True, seconds=75 if device.startswith('cuda') else 1)
    first, *others = batches
    name = f'compiled, {few["n_layer"]} layers'
    measure(recorder, 'eager', kind, config, device, first, T, profiled=True)
    measure(recorder, name, kind, few, device, first, T, profiled=True, **compiling)
    measure(recorder, 'eager, PyTorch alone', kind, config, device, first, T, without=OWN)
    for B in others:
        measure(recorder, 'eager', kind, config, device, B, T)
    measure(recorder, name, kind, few, device, others[-1], T, **compiling)
    measure(recorder, f'{name}, PyTorch alone', kind, few, device, first, T, without=OWN, **compiling)
    measure(recorder, 'compiled', kind, config, device, first, T, compiled=True,
            seconds=2 * compiling['seconds'])


@contextlib.contextmanager
def without_kernels(*files):
    """Within, no kernel of the files in mambino/kernels/ whose names begin so."""
    before = {operation: list(kernels_of) for operation, kernels_of in KERNELS.items()}

    def stays(kernel):
        return not kernel.__module__.rpartition('.')[2].startswith(files)
    for kernels_of in KERNELS.values():
        kernels_of[:] = filter(stays, kernels_of) if files else kernels_of
    try:
        yield
    finally:
        KERNELS.update(before)


def measure(recorder, name, kind, config, device, B, T, compiled=False, seconds=10, profiled=False,
            without=()):
    """One configuration: a line of what it makes."""
    label = f'{name}, {B} x {T}'
    with recorder.item(label, seconds) as wanted, without_kernels(*without):
        if not wanted:
            return
        free_memory(device)
        net = models.on_device(kind, config, device)
        if compiled:
            torch._dynamo.reset()
        forward = kernels.compiled(net) if compiled else net
        training = models.Training(net, device, 'bfloat16', B, T, forward)
        try:
            time_steps(recorder, label, training, device, B * T, net.flops_per_token(T),
                       net.num_params())
        except torch.OutOfMemoryError:
            recorder.add(label, 'more than the card has')
            return
        if profiled and device.startswith('cuda'):
            recorder.add(f'{label}: kernels', top_kernels(training.micro_step, device))


def time_steps(recorder, label, training, device, tokens, flops, parameters):
    """Times micro-steps of so many tokens, and updates; flops: a token's."""
    begun = time.perf_counter()
    training.micro_step()
    training.update()
    models.synchronize(device)
    first_seconds = time.perf_counter() - begun
    with machine.rounded_once(device, 'bfloat16'):          # as train.py does
        micro = seconds_of(training.micro_step, device)
    update = seconds_of(training.update, device, least=0.2)
    peak = machine.peak_flops(device, 'bfloat16')
    micro_steps = max(1, TOKENS_PER_STEP // tokens)
    step = micro_steps * micro + update
    memory = torch.cuda.max_memory_allocated(device) if device.startswith('cuda') else 0
    recorder.add(
        label, f'{parameters / 1e6:.0f}M: micro-step {micro * 1e3:.1f} ms, {tokens / micro:,.0f} tokens/s, MFU '
        f'{flops * tokens / micro / peak:.1%}; with the update ({update * 1e3:.1f} ms, every {micro_steps}) MFU '
        f'{flops * tokens * micro_steps / step / peak:.1%}; peak {memory / 2**30:.2f} GiB; first step '
        f'{first_seconds:.0f} s', micro_seconds=micro, update_seconds=update,
        tokens_per_second=tokens / micro,
        mfu=flops * tokens / micro / peak, memory=memory, parameters=parameters)


def seconds_of(work, device, least=SECONDS):
    """Seconds of one call, over so many that they take `least` seconds, after two more."""
    work()
    work()
    models.synchronize(device)
    begun, n = time.perf_counter(), 0
    while True:
        for _ in range(3):
            work()
        n += 3
        models.synchronize(device)
        spent = time.perf_counter() - begun
        if spent >= least:
            return spent / n


def free_memory(device):
    gc.collect()
    if device.startswith('cuda'):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def top_kernels(work, device):
    """The kernels of one call that take most of the card's time: name, share, count."""
    from torch.profiler import ProfilerActivity, profile
    work()
    models.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        models.synchronize(device)
    rows = [(row.key, row.self_device_time_total, row.count) for row in profiler.key_averages()
            if row.device_type == torch.autograd.DeviceType.CUDA]    # not PyTorch's operations around them
    total = sum(microseconds for _, microseconds, _ in rows) or 1
    rows.sort(key=lambda row: -row[1])
    named = ', '.join(f'{name[:60]} {microseconds / total:.0%} ({count})' for name, microseconds,
                      count in rows[:TOP])
    return f'{total / 1e3:.1f} ms of {sum(count for *_, count in rows):,} kernels: {named}'


# --- a peer ---------------------------------------------------------------------------------------

class Peer(models.Training):
    """A model of transformers instead of ours."""

    def __init__(self, net, device, dtype, idx, forward):
        self.net, self.forward = net, forward
        self.device, self.dtype = device, dtype
        self.idx = idx
        self.optimizers = [torch.optim.AdamW(net.parameters(), fused=True)]

    def micro_step(self):
        with machine.autocast(self.device, self.dtype):
            loss = self.forward(input_ids=self.idx, labels=self.idx, use_cache=False).loss
        loss.backward()
        return loss.detach()


def peer(recorder, label, config, device, B, T, compiled=False, seconds=15):
    """transformers' Llama of the same shape, with the loss over all its logits, as its users train
    it."""
    label = f'{label}, {B} x {T}'
    with recorder.item(label, seconds) as wanted:
        if not wanted:
            return
        free_memory(device)
        net = llama(config, device)
        idx = models.tokens(B, T, config['vocab_size'], device)
        training = Peer(net, device, 'bfloat16', idx, torch.compile(net) if compiled else net)
        flops = models.on_device('gpt', config, 'meta').flops_per_token(T)  # its products are those of our GPT
        time_steps(recorder, label, training, device, B * T, flops,
                   sum(p.numel() for p in net.parameters()))


def llama(config, device):
    """transformers' LlamaForCausalLM of the sizes of a GPTConfig's dict."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from model_gpt import GPTConfig
    filled = GPTConfig(**config)
    llama_config = LlamaConfig(
        vocab_size=filled.vocab_size, hidden_size=filled.n_embd,
        intermediate_size=filled.intermediate_size,
        num_hidden_layers=filled.n_layer, num_attention_heads=filled.n_head,
        num_key_value_heads=filled.n_kv_head,
        max_position_embeddings=filled.block_size, tie_word_embeddings=True,
        attn_implementation='sdpa')
    with torch.device(device):
        return LlamaForCausalLM(llama_config).train()
