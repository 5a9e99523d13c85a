"""The sizes of a new model: those with a name, and what suits a machine.

    named_size('mamba', '50m')          # {'n_layer': 24, 'n_embd': 512}
    sizes_for('cpu', 'gpt')             # {'n_layer': 4, …, 'max_iters': 800}
"""
import torch

from mambino import machine

SIZES = {           # of about so many parameters, with a vocabulary of 16,384
    ('gpt', '50m'): dict(n_layer=13, n_embd=512),
    ('gpt', '150m'): dict(n_layer=20, n_embd=768),
    ('gpt', '400m'): dict(n_layer=30, n_embd=1024),
    ('mamba', '50m'): dict(n_layer=24, n_embd=512),
    ('mamba', '150m'): dict(n_layer=36, n_embd=768),
    ('mamba', '400m'): dict(n_layer=36, n_embd=1280),
    ('hybrid', '50m'): dict(n_layer=9, n_embd=512),
    ('hybrid', '150m'): dict(n_layer=13, n_embd=768),
    ('hybrid', '400m'): dict(n_layer=20, n_embd=1024),
}


def named_size(model, size, mimo_rank=1):
    """{'n_layer', 'n_embd'} of a named size; {} without a name. Ranks of a Mamba-3 make its layers wider: of
    these there are fewer then."""
    named = SIZES.get((model, size), {})
    if not named or model != 'mamba' or mimo_rank <= 1:
        return named
    D, N = named['n_embd'], 128
    n_layer = named['n_layer'] * (6 * D + 2 * N) / (6 * D + 2 * N * mimo_rank)      # rows of in_proj, out_proj
    return dict(named, n_layer=max(1, round(n_layer)))


# Of a CPU: in these minutes wider models see too little of the text (docs/evidence.md, "Bare")
NARROW = 128
ON_CPU = {
    'gpt': dict(n_layer=4),
    'mamba': dict(n_layer=8, state_size=32),
    'hybrid': dict(n_layer=4, state_size=32),
}


def sizes_for(device, model, n_embd=0, is_new=True):
    """{name: value} of a model and its steps that suit the machine: some minutes on a laptop's CPU,
    an hour or some on a card, which must both hold the model and be fast enough for it. n_embd: the
    width, if it is named. On a CPU a wider model takes fewer steps, and has the state that its own
    file says; so has one that is not new, or of a named size."""
    if device == 'cpu':
        sizes = dict(ON_CPU[model], n_embd=NARROW, block_size=256, tokens_per_step=4096, max_iters=800)
        if n_embd > NARROW or not is_new:
            sizes |= dict(state_size=0, max_iters=400)
        return sizes
    gigabytes, peak = 0, 0
    if device.startswith('cuda'):
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        gigabytes = card.total_memory / 2**30
        peak = machine.known_peak(device) or 0
    if gigabytes >= 40 and peak >= 500e12:      # H100 and later
        return dict(n_layer=12, n_embd=1024, block_size=1024, tokens_per_step=2**18, max_iters=8000)
    if gigabytes >= 20 or (gigabytes >= 15 and peak >= 80e12):      # 24 GB and more; RTX 4080
        return dict(n_layer=12, n_embd=768, block_size=1024, tokens_per_step=2**17, max_iters=5000)
    # 8 to 16 GB, or Apple's
    return dict(n_layer=12, n_embd=512, block_size=512, tokens_per_step=2**15, max_iters=5000)
