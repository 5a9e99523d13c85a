"""What a model is worth so far: its loss on text it was not trained on, and a piece of its own.

Neither touches the training: evaluation draws no random numbers, a sample draws from a generator of
its own."""
import math
from contextlib import nullcontext

import torch

from mambino import machine
from mambino.configurator import fail
from mambino.holes import for_evaluation, hiding, learnable, summed_up
from mambino.sample.filled import continuation
from mambino.sample.generation import Rows, prefill
from mambino.sample.healing import look_ahead
from mambino.sample.text import Writer, encode_prompt, healed
from mambino.sample.uncover import Filler
from mambino.train import processes, recovery
from mambino.train.processes import say, summed

TOKENS = 4096   # at once: enough to keep a GPU busy, and without gradients less than a step of training
UNREAD = 256    # losses that stay on the device: each that is read lets a GPU wait for the next batch
SAMPLE = 200            # tokens of a piece of text


@torch.no_grad()
def evaluate(net, data, block_size, eval_iters, device, dtype):
    """{'val_loss', 'perplexity', 'bits_per_byte'} on the val split of each dataset in `data`, the
    same tokens each time. Of hidden tokens the loss is a bound, by the same draws each time, and
    'val_error' what other draws would change of it (one standard deviation).

    eval_iters: sequences of block_size of each split; 0: all. How many are computed at once depends
    on block_size alone, so that the last bits of the loss, too, are the same whatever the memory,
    the batch size and the number of processes: fp32 sums of another batch differ in the seventh
    digit, those of bf16 sooner."""
    at_once = max(1, TOKENS // block_size)
    hide = hiding(net.config)
    mask_id = None if hide is None else net.config.vocab_size - 1
    sums = []  # (nats, targets, bytes of text, variance of nats) of each dataset
    net.eval()
    try:
        for part in data.parts:
            nats, targets, text_bytes, variance = 0.0, 0, 0, 0.0
            losses = []                                     # (means of a batch, how many targets they are of)
            own_batches = part.val_batches(
                at_once, block_size, eval_iters, processes.RANK, processes.WORLD, mask_id)
            for x, y in processes.in_step(own_batches, block_size):     # (B, T) each
                counted = y[y >= 0] if hide is None else x[learnable(y)]
                losses += losses_of(net, x, y, device, dtype, hide)
                if len(losses) >= UNREAD:
                    (nats, variance), losses = with_losses(nats, variance, losses), []
                targets += len(counted)
                if part.token_bytes is not None:
                    text_bytes += part.token_bytes[counted.numpy()].sum()
            nats, variance = with_losses(nats, variance, losses)
            sums.append(summed(nats, targets, text_bytes, variance))
    finally:
        net.train()
    return val_result(data, sums)


def losses_of(net, x, y, device, dtype, hide=None):
    """[(mean losses of x, y (B, T), on the device: one, or one for each draw of holes; how many
    targets)]. Where the memory does not suffice for all rows at once, those of the halves."""
    targets = int((y >= 0 if hide is None else learnable(y)).sum())
    pieces = [(x, y)] if hide is None else for_evaluation(hide, x, y, targets)
    try:
        with machine.autocast(device, dtype):
            means = [net(*(machine.sent(tensor, device) for tensor in piece))[1] for piece in pieces]
        return [(torch.stack(means), targets)]
    except (RuntimeError, MemoryError) as error:
        recovery.require_exhausted(error)
    recovery.free_memory(device)                        # the error, which holds tensors, is gone
    if len(x) == 1 or processes.TOGETHER:               # which no process can do without the others
        fail(f'out of memory in the evaluation, with {len(x)} sequences of {x.shape[1]} tokens at once: another '
             'program may have taken it; else halve --block_size, --n_layer or --n_embd')
    half = len(x) // 2
    return [loss for rows in ((x[:half], y[:half]), (x[half:], y[half:]))
            for loss in losses_of(net, *rows, device, dtype, hide)]


def with_losses(nats, variance, losses):
    """nats and the sums that these losses are the means of, in fp64 and in their order; and the variance of
    these sums by their draws."""
    if not losses:
        return nats, variance
    for means, (_, targets) in zip(torch.stack([means for means, _ in losses]).tolist(), losses):
        own = summed_up(means, targets)
        nats, variance = nats + own[0], variance + own[1]
    return nats, variance


def val_result(data, sums):
    """{'val_loss', 'perplexity', 'bits_per_byte'} from the sums over each part's val split: nats,
    targets, bytes of text, variance of the nats; 'val_error' where there is one.

    The parts weigh as in training, whatever the sizes of their val splits; 'val_loss/<part>' tells
    them apart."""
    total = sum(targets for _, targets, *_ in sums)
    if not all(targets for _, targets, *_ in sums):
        fail(f'dataset={data.name}: its val split has nothing that is learned, no answer at all, so there is no loss; '
             'prepare it with more conversations, or with a larger --val_fraction')
    nats = text_bytes = variance = 0
    for weight, (part_nats, targets, part_bytes, part_variance) in zip(data.weights, sums):
        scale = weight * total / targets                            # 1 where there is one part
        nats += scale * part_nats
        text_bytes += scale * part_bytes
        variance += scale ** 2 * part_variance
    loss = nats / total
    result = dict(
        val_loss=loss,
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None)
    if variance:
        result['val_error'] = math.sqrt(variance) / total
    if len(sums) > 1:
        for part, (part_nats, targets, *_) in zip(data.parts, sums):
            result[f'val_loss/{part.name}'] = part_nats / targets
    return result


def show_sample(net, tokenizer, prompt, step, seed, device, dtype):
    """Prints a piece of text from the model as it is, the same for the same weights. Returns the
    step. dtype: what a GPU computes in; a CPU, as in sample.py, in float32, unless its weights
    are shared, which come rounded."""
    net.eval()
    ids = encode_prompt(tokenizer, prompt, 'sample_start')
    precision = nullcontext()
    if device != 'cpu' or processes.SHARDED:
        precision = machine.autocast(device, dtype, cache=not processes.SHARDED)
    if net.config.objective != 'next':
        with precision:
            text = filled(net, tokenizer, ids, seed, device)
        net.train()
        say(f'--- sample at step {step}\n{prompt}{text}\n---')
        return step
    owed = b''
    if not processes.TOGETHER:          # else all processes must take the same steps, whatever they draw
        ids, owed = healed(tokenizer, ids, prompt)
    writer = Writer(tokenizer, before=ids, owed=owed)
    generator = torch.Generator(device).manual_seed(seed)
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


def filled(net, tokenizer, ids, seed, device):
    """The text behind ids, of SAMPLE tokens or to its end, of a model that fills holes."""
    filler = Filler(net, tokenizer, device, sampling=dict(temperature=0.8, top_k=200))
    given = len(ids)
    ids = list(ids) + [filler.mask_id] * SAMPLE
    *_, ids = filler.fill(ids, torch.Generator().manual_seed(seed))
    return continuation(tokenizer, ids, given, ())
