"""torch.compile of a run's model: whether it earns the minute that it takes, and the waiting.

    choose(settings, net, adapter, step)        # settings['compile'] is True or False then
    wrapped = compiled(net, loader, …)          # compiled on the first batch; or as it is, with a line why

On a card a step is a few thousand kernels, most of which only move memory; compiled, several are
one. On a CPU the operations are compiled already (kernels/native.cpp), and faster than what torch
makes. """
import re
import time
import warnings

from mambino import kernels, machine
from mambino.train import processes, recovery

EARNED = 180        # seconds of a run's products at USUAL_MFU, from which on some of them are saved
USUAL_MFU = 0.4     # of the speed of matrix products, what a step reaches
REASONS = {         # of what torch says where it cannot compile
    r'working triton|TritonMissing|No module named .triton': 'there is no Triton: pip install triton, on Windows '
                                                             'triton-windows',
    r'too old to be supported by the triton': 'the card is too old for Triton',
    r'find C compiler|cl is not found': 'there is no C compiler: install gcc or clang',
    r'working C\+\+ compiler': 'there is no C++ compiler: install g++ or clang++',
    r'(gcc|cc|clang)\b.*returned non-zero': "the C compiler fails: Python's headers (python3-dev) may be missing",
}


def choose(settings, net, adapter=None, step=0):
    """Gives train.py's setting `compile` its value, if it was left to the machine, and takes it
    back with a word where it cannot be. step: those that the run has made."""
    wanted = settings['compile']
    if wanted is None:
        is_worth = settings['device'].startswith('cuda') and not settings['eval_only']
        # a card's speed may be measured, in each process for itself
        wanted = is_worth and processes.least(expected_seconds(settings, net, step)) > EARNED
    obstacle = 'parallel=fsdp' if processes.SHARDED else 'expert_parallel' if processes.TOGETHER else ''
    if adapter and adapter['type'] == 'prefix':
        obstacle = 'adapter=prefix'
    if wanted and obstacle:
        processes.say(f'note: torch.compile is left out with --{obstacle}')
    settings['compile'] = bool(wanted) and not obstacle


def expected_seconds(settings, net, step):
    """About so long the steps that are left take at best, in all processes together."""
    tokens = (settings['max_iters'] - step) * settings['tokens_per_step']
    peak = machine.peak_flops(settings['device'], settings['dtype']) * processes.WORLD
    return tokens * net.flops_per_token(settings['block_size']) / (USUAL_MFU * peak)


def compiled(net, loader, settings, tokens_seen):
    """The model as torch.compile makes it, tried on the batch that loader has next; the model
    itself, and a line why, where that does not work. Where the memory does not suffice it is tried
    with smaller micro-batches, the loader's then."""
    while True:
        processes.say('torch.compile: ', end='')
        start = time.perf_counter()
        error, is_exhausted = '', False
        try:
            wrapped = kernels.compiled(net)
            try_out(wrapped, loader.peek(), settings['device'], settings['dtype'])
        except Exception as caught:
            is_exhausted = recovery.is_exhausted(caught)
            error = f'{type(caught).__name__}: {caught}'
        net.zero_grad(set_to_none=True)
        failures, exhausted = processes.summed(bool(error), is_exhausted)   # all go the same way
        if not failures:
            processes.say(f'{time.perf_counter() - start:.0f} seconds, for faster steps')
            return wrapped
        wrapped = None
        if not exhausted:
            recovery.release(net)
            processes.say(f'does not work here ({reason_of(error)}); going on without, more slowly')
            return net
        recovery.take_smaller_micro_batches(settings, net, loader, tokens_seen, is_agreed=True)


def try_out(wrapped, batch, device, dtype):
    """Both passes through a compiled model, which compile them. batch: what it is called with, as x, y (B, T)."""
    with warnings.catch_warnings(), machine.autocast(device, dtype):
        warnings.filterwarnings('ignore', message='.*TensorFloat32.*')      # fp32 is to be exact
        loss = wrapped(*batch)[1]
    loss.backward()


def reason_of(error):
    """What an error of torch.compile means, in some words."""
    for pattern, reason in REASONS.items():
        if re.search(pattern, error):
            return reason
    return error.strip().partition('\n')[0][:160] or 'in another process'
