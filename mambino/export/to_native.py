"""A checkpoint of our own without what only training needs; quantised it is a quarter of the size,
or less.

    python export.py --format=native --quantize=int8
    python sample.py --out_dir=out-native-int8

An adapter is merged into the weights. Whole weights can be trained on from here, quantised ones
cannot.
"""
import copy
import os
import shlex

from mambino.export.compare import agree, difference, greedy, logits_of, some_ids
from mambino.weights import checkpoint, loading
from mambino.weights import quantize as quantizer

PACKAGES = ''
FILE = 'best.pt'


def rounded(net, quantize):
    """The model with its weights rounded, if they are to be."""
    return quantizer.quantize_model(copy.deepcopy(net), quantize) if quantize else net


def write(net, tok, folder, quantize='', *, ckpt, **_):
    """Writes best.pt into the folder, with all but the weights from ckpt, the checkpoint that net
    was made of."""
    contents = {name: ckpt[name] for name in sorted(checkpoint.CONTENTS - {'format'})}
    contents |= dict(weights=rounded(net, quantize).state_dict(), config=checkpoint.config_of(net))
    contents |= dict(quantized=quantize or None, optimizers=[], scaler=None, rng=None)
    contents['settings'] = ckpt['settings'] | dict(adapter='')  # which is in the weights now
    checkpoint.save_checkpoint(os.path.join(folder, FILE), contents)


def verify(net, tok, folder, quantize='', **_):
    """Opens the checkpoint as sample.py does: it must compute what the model does, quantised or
    not, bit for bit. → a check, see compare.py."""
    read = loading.model_of(checkpoint.load_checkpoint(folder))
    ids = some_ids(net, 2, 64)
    logits = logits_of(read, ids)
    prompt = ids[0, :3].tolist()
    return dict(tool='sample.py', ok=difference(logits, logits_of(rounded(net, quantize), ids)) == 0.0,
                logits=difference(logits, logits_of(net, ids)), limit=None if quantize else 0.0,
                greedy=agree(greedy(net, prompt, 64), greedy(read, prompt, 64)),
                note=f'{quantize} rounds: its own logits differ' if quantize else '')


def opening(name, **_):
    """The command that opens the folder of this name, for the card."""
    return f'python sample.py --out_dir={shlex.quote(name)}'
