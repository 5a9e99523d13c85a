"""Settings that were asked for and do nothing, said before the work begins.

    for line in unused.settings(explicit, inputs, tokenizer, append): print(line)
"""
import os

from mambino.prepare.files import PACKED, extension_of

OF_A_TRAINED_BPE = ('vocab_size', 'sample_mb')


def settings(explicit, inputs, tokenizer, append):
    """Yields a line for each setting in `explicit`, {name: value}, that changes nothing here.
    tokenizer: as set; append: whether a dataset is added to.
    """
    if explicit.get('inspect'):
        for name in explicit.keys() - {'inspect'}:
            yield said(name, 'it is for making a dataset, and --inspect looks at one')
        return
    for name in OF_A_TRAINED_BPE:
        if name in explicit and tokenizer != 'bpe':
            yield said(name, f'it is for a bpe that is trained here, and tokenizer={tokenizer} is not')
        elif name in explicit and append and name == 'sample_mb':
            yield said(name, '--append keeps the tokenizer of the dataset')
    folders = [path for path in inputs if os.path.isdir(path)]
    if 'gitignore' in explicit and not folders:
        yield said('gitignore', 'it is for what is found in folders, and none is among the inputs')
    packed = [path for path in inputs if extension_of(path) in PACKED]
    if 'max_file_mb' in explicit and not folders and not packed:
        yield said('max_file_mb', 'it is for files found in folders and for packed ones')


def excludes_nothing(exclude, skipped):
    """Whether none of what was left out, [{'file', 'reason'}], is for the patterns in `exclude`."""
    has_back = '!' in exclude  # then it may have changed what is taken
    return exclude and not has_back and all(entry['reason'] != 'excluded' for entry in skipped)


def said(name, why):
    """The line."""
    return f'--{name} has no effect: {why}'
