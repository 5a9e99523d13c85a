"""A model that learned the next token, as one that learns to fill holes (Gong et al. 2025; Ye et al. 2025).

    base = begin_to_fill(base, settings, explicit)  # of loading.load_base: the same with another config, more weights

What it knows it keeps: what a token sees goes on speaking of the next one (`shifted`). A recurrence's way back
begins as a copy of the way forth whose out_proj is zero, so that at step 0 a Mamba is the model it was, asked about
texts with holes; attention sees both sides from there on. The id of a hidden token is one more, whose row of the
embedding begins as the mean of all, unless the model has ids that its tokenizer has not.
"""
import math

import torch

from mambino.configurator import fail
from mambino.train.building import BLOCK_LENGTH
from mambino.train.processes import say
from mambino.weights.fitting import model_of_shapes


def begin_to_fill(base, settings, explicit):
    """A model of the next token, as `settings` have it: it learns to fill holes from here on."""
    init_from, objective = settings['init_from'], settings['objective']
    if settings['adapter']:
        fail(f'adapter={settings["adapter"]}: {init_from} holds a model of the next token, and to fill holes it needs '
             f'weights of its own: tune it with --objective={objective} alone first, then the adapter beside that')
    if explicit.get('share_projections'):
        fail(f'share_projections=True: a model that was begun as one of the next token, as {init_from}, has its own '
             'projections for the way back: leave it out')
    block_length = (settings['block_length'] or BLOCK_LENGTH) if objective == 'block' else 0
    if settings['block_length'] and not block_length:
        fail(f'block_length={settings["block_length"]} is for --objective=block: leave it out')
    attends = '' if base['kind'] == 'mamba' else '; its attention sees both sides now, which it has to learn'
    say(f'note: {init_from} learned the next token and learns to fill holes from here on{attends}')
    config = base['config'] | dict(block_size=settings['block_size'] or base['config']['block_size'])
    try:
        return to_fill(base | dict(config=config), objective, block_length)
    except ValueError as error:
        fail(error)


def to_fill(base, objective, block_length):
    config, old = base['config'], base['weights']
    V, tok = config['vocab_size'], base['tokenizer']
    if V <= (tok.vocab_size if tok else V):
        V = V + 1 if V < 1000 else math.ceil((V + 1) / 64) * 64
    config = config | dict(vocab_size=V, objective=objective, block_length=block_length, shifted=True)
    if base['kind'] != 'gpt':
        config['share_projections'] = False
    wanted = model_of_shapes(base['kind'], config).state_dict()
    weights = {name: begun(name, len(wanted[name]) if wanted[name].ndim else 0, old) for name in wanted}
    return base | dict(config=config, weights=weights)


def begun(name, rows, old):
    """The tensor of this name, of so many rows, that such a model begins with. old: {name: tensor} of the other."""
    if name not in old:                                         # of the way back
        forth = next(old[name.replace('.back.', way)] for way in ('.mixer.', '.mamba.')
                     if name.replace('.back.', way) in old)
        is_last = name.endswith(('.out_proj.weight', '.out_proj.up.weight'))
        return torch.zeros_like(forth) if is_last else forth.clone()
    tensor = old[name]
    more = rows - len(tensor) if tensor.ndim else 0
    if not more:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat((tensor, mean.expand(more, *mean.shape[1:])))
