"""The part `waits`: a training step enqueues its work and goes on; nothing in it may wait for the
card.

torch.cuda.set_sync_debug_mode('error') makes each wait an error, with its place."""
import torch

from mambino.bench.gpu import models

B, T = 2, 128
WARM_UP = 2         # steps in which things are made once: masks, moments, compiled functions


def run(recorder, device, out_dir):
    for dtype, name in models.quick_first(('bfloat16', 'float32')):
        label = f'{name}, {dtype}'
        with recorder.item(label, 2) as wanted:
            if wanted:
                check(recorder, label, name, dtype, device)


def check(recorder, label, name, dtype, device):
    training = models.Training(models.small_model(name).to(device), device, dtype, B, T)
    for _ in range(WARM_UP):
        training.micro_step()
        training.micro_step()
        training.update()
    models.synchronize(device)
    if not device.startswith('cuda'):
        recorder.add(label, 'a CPU is not waited for')
        return
    torch.cuda.set_sync_debug_mode('error')
    try:
        training.micro_step()
        training.micro_step()
        training.update()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    recorder.add(label, 'two micro-steps and the update wait for nothing', passed=True)
