"""The part `exhausted`: train.py with more sequences at once than the card's share of memory holds.
It must go on with smaller micro-batches, and at the losses of a run that had enough."""
import os
import re

import torch

from mambino.bench.gpu import runs
from mambino.train import memory

B, T = 64, 512
MODEL = dict(n_layer=6, n_embd=384, block_size=T)
STEPS = 6
SETTINGS = dict(batch_size=B, tokens_per_step=B * T, max_iters=STEPS, eval_interval=1000,
                optimizer='adamw',
                learning_rate=1e-3, warmup_iters=1, dtype='float32', gradient_checkpointing=False)
TOLERANCE = 1e-3        # of the loss: the same sums in another order
OF_ESTIMATE = 0.6       # the share of the whole batch's estimate that the run may have


def run(recorder, device, out_dir):
    if not device.startswith('cuda'):
        recorder.add('a run', 'left out: a CPU gives all it has')
        return
    scratch = os.path.join(out_dir, 'scratch', 'exhausted')
    dataset = runs.make_dataset(os.path.join(scratch, 'data'))
    total = torch.cuda.mem_get_info(device)[1]
    for kind in ('gpt', 'mamba'):
        with recorder.item(kind, 15) as wanted:
            if wanted:
                check(recorder, kind, scratch, dataset, device, total)


def check(recorder, kind, scratch, dataset, device, total):
    model = MODEL | (dict(n_head=6) if kind == 'gpt' else {})
    estimate = memory.estimate(kind, model | dict(vocab_size=runs.VOCABULARY), B, T,
                               dtype='float32')['total']
    settings = SETTINGS | model | dict(model=kind)
    free = runs.Run(os.path.join(scratch, f'{kind}-free'), dataset, device, settings).start()
    free.finish(recorder.seconds_left())
    short = runs.Run(os.path.join(scratch, f'{kind}-short'), dataset, device, settings,
                     share=OF_ESTIMATE * estimate / total).start()
    short.finish(recorder.seconds_left())
    said = re.findall(r'out of memory: (.*)', short.printed())
    difference = runs.largest_difference(short.losses(), free.losses(), range(1, STEPS + 1))
    passed = bool(said) and difference is not None and difference <= TOLERANCE
    recorder.add(kind, f'{OF_ESTIMATE:.0%} of the {estimate / 2**30:.2f} GiB that {B} x {T} take: '
                 f'{"; ".join(said) or "no word of it"}; losses differ by {difference} at most',
                 passed=passed)
