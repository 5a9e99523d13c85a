"""The part `resume`: train.py whole. Its losses on the card in bf16 beside a CPU's in fp32; a run
that gets SIGTERM in the middle goes on and ends as one that was not stopped."""
import os

from mambino.bench.gpu import models, runs

COMPARED = 20       # steps beside a CPU's
MODELS = {'gpt': dict(n_layer=6, n_embd=384, n_head=6), 'mamba': dict(n_layer=6, n_embd=512)}   # of some 10M


def run(recorder, device, out_dir):
    scratch = os.path.join(out_dir, 'scratch', 'resume')
    dataset = runs.make_dataset(os.path.join(scratch, 'data'))
    is_cuda = device.startswith('cuda')
    for kind, sizes in MODELS.items():
        sizes = sizes if is_cuda else models.tiny(kind)
        settings = dict(
            model=kind, block_size=256 if is_cuda else 32, batch_size=8,
            tokens_per_step=2048 if is_cuda else 256,
            optimizer='adamw', learning_rate=1e-3, warmup_iters=10, lr_decay_iters=200,
            eval_interval=100, **sizes)
        with recorder.item(f'{kind}, stopped and resumed', 25) as wanted:
            if wanted:
                check(recorder, kind, scratch, dataset, device, settings, is_cuda)


def check(recorder, kind, scratch, dataset, device, settings, is_cuda):
    dtype = 'bfloat16' if is_cuda else 'float32'
    steps = 200
    left = recorder.seconds_left
    whole = runs.Run(os.path.join(scratch, f'{kind}-whole'), dataset, device,
                     settings | dict(dtype=dtype, max_iters=steps)).start()
    cpu = runs.Run(os.path.join(scratch, f'{kind}-cpu'), dataset, 'cpu',
                   settings | dict(dtype='float32', max_iters=COMPARED)).start()
    whole.finish(left())
    stopped = runs.Run(os.path.join(scratch, f'{kind}-stopped'), dataset, device,
                       settings | dict(dtype=dtype, max_iters=steps))
    status = stopped.start().stop_at(steps // 2, left())
    reached = max(stopped.losses(), default=0)
    stopped.start().finish(left())
    difference = runs.largest_difference(stopped.losses(), whole.losses(), range(1, steps + 1))
    passed = reached < steps and difference is not None and difference <= 0.02 and max(stopped.losses()) == steps
    recorder.add(f'{kind}, stopped and resumed',
                 f'SIGTERM at step {reached} (status {status}), then on to {max(stopped.losses())}: losses differ by '
                 f'{difference} at most from the run that was not stopped; last loss '
                 f'{whole.losses().get(steps)}', passed=passed)
    cpu.finish(left())
    difference = runs.largest_difference(whole.losses(), cpu.losses(), range(1, COMPARED + 1))
    recorder.add(f'{kind}, {dtype} beside a CPU in fp32',
                 f'the first {COMPARED} losses differ by {difference} at most',
                 passed=difference is not None and difference <= 0.01)
