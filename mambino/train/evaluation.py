"""What a model is worth so far: its loss on text it was not trained on, and a piece of its own.

Neither touches the training: evaluation draws no random numbers, a sample draws from a generator of
its own."""
import math
from contextlib import nullcontext

import torch

from mambino import machine
from mambino.configurator import fail
from mambino.sample.generation import Rows, prefill
from mambino.sample.healing import look_ahead
from mambino.sample.text import Writer, encode_prompt, healed
from mambino.train import processes, recovery
from mambino.train.processes import say, summed

TOKENS = 4096   # at once: enough to keep a GPU busy, and without gradients less than a step of training
UNREAD = 256    # losses that stay on the device: each that is read lets a GPU wait for the next batch
SAMPLE = 200            # tokens of a piece of text


@torch.no_grad()
def evaluate(net, data, block_size, eval_iters, device, dtype):
    """{'val_loss', 'perplexity', 'bits_per_byte'} on the val split of each dataset in `data`, the
    same tokens each time.

    eval_iters: sequences of block_size of each split; 0: all. How many are computed at once depends
    on block_size alone, so that the last bits of the loss, too, are the same whatever the memory,
    the batch size and the number of processes: fp32 sums of another batch differ in the seventh
    digit, those of bf16 sooner."""
    at_once = max(1, TOKENS // block_size)
    sums = []  # (nats, targets, bytes of text) of each dataset
    net.eval()
    try:
        for part in data.parts:
            nats, targets, text_bytes = 0.0, 0, 0
            losses = []                                     # (mean of a batch, how many targets it is of)
            own_batches = part.val_batches(at_once, block_size, eval_iters, processes.RANK, processes.WORLD)
            for x, y in processes.in_step(own_batches):     # (B, T) each
                counted = y[y >= 0]
                losses += losses_of(net, x, y, device, dtype)
                if len(losses) >= UNREAD:
                    nats, losses = with_losses(nats, losses), []
                targets += len(counted)
                if part.token_bytes is not None:
                    text_bytes += part.token_bytes[counted.numpy()].sum()
            sums.append(summed(with_losses(nats, losses), targets, text_bytes))
    finally:
        net.train()
    return val_result(data, sums)


def losses_of(net, x, y, device, dtype):
    """[(mean loss of x, y (B, T), on the device; how many targets)]. Where the memory does not
    suffice for all rows at once, those of the halves."""
    try:
        with machine.autocast(device, dtype):
            loss = net(machine.sent(x, device), machine.sent(y, device))[1]
        return [(loss, int((y >= 0).sum()))]
    except (RuntimeError, MemoryError) as error:
        recovery.require_exhausted(error)
    recovery.free_memory(device)                        # the error, which holds tensors, is gone
    if len(x) == 1 or processes.TOGETHER:               # which no process can do without the others
        fail(f'out of memory in the evaluation, with {len(x)} sequences of {x.shape[1]} tokens at once: another '
             'program may have taken it; else halve --block_size, --n_layer or --n_embd')
    half = len(x) // 2
    return [loss for rows in ((x[:half], y[:half]), (x[half:], y[half:]))
            for loss in losses_of(net, *rows, device, dtype)]


def with_losses(nats, losses):
    """nats and the sums that these losses are the means of, in fp64 and in their order."""
    if not losses:
        return nats
    for loss, (_, targets) in zip(torch.stack([loss for loss, _ in losses]).tolist(), losses):
        nats += loss * targets
    return nats


def val_result(data, sums):
    """{'val_loss', 'perplexity', 'bits_per_byte'} from the sums over each part's val split: nats,
    targets, bytes of text.

    The parts weigh as in training, whatever the sizes of their val splits; 'val_loss/<part>' tells
    them apart."""
    total = sum(targets for _, targets, _ in sums)
    if not all(targets for _, targets, _ in sums):
        fail(f'dataset={data.name}: its val split has nothing that is learned, no answer at all, so there is no loss; '
             'prepare it with more conversations, or with a larger --val_fraction')
    nats = text_bytes = 0
    for weight, (part_nats, targets, part_bytes) in zip(data.weights, sums):
        scale = weight * total / targets                            # 1 where there is one part
        nats += scale * part_nats
        text_bytes += scale * part_bytes
    loss = nats / total
    result = dict(
        val_loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None)
    if len(sums) > 1:
        for part, (part_nats, targets, _) in zip(data.parts, sums):
            result[f'val_loss/{part.name}'] = part_nats / targets
    return result


def show_sample(net, tokenizer, prompt, step, seed, device, dtype):
    """Prints a piece of text from the model as it is, the same for the same weights. Returns the
    step. dtype: what a GPU computes in; a CPU, as in sample.py, in float32."""
    net.eval()
    ids = encode_prompt(tokenizer, prompt, 'sample_start')
    owed = b''
    if not processes.TOGETHER:          # else all processes must take the same steps, whatever they draw
        ids, owed = healed(tokenizer, ids, prompt)
    writer = Writer(tokenizer, before=ids, owed=owed)
    generator = torch.Generator(device).manual_seed(seed)
    precision = nullcontext() if device == 'cpu' else machine.autocast(device, dtype, cache=not processes.SHARDED)
    with precision:
        read = prefill(net, ids)
        rows = Rows(net, tokenizer.vocab_size)
        rows.add([read], [look_ahead(net, tokenizer, read, owed)])
        for _ in range(SAMPLE + len(owed)):
            drawn = rows.draw(temperature=0.8, top_k=200, generator=generator)
            writer.feed(int(drawn))
            if writer.length == SAMPLE:
                break
            rows.advance(drawn)
    net.train()
    say(f'--- sample at step {step}\n{prompt}{writer.text}\n---')
    return step
