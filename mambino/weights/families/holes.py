"""What export.py wrote of models that fill holes, with a modelling file of their own: all are of one
model_type, and of a `body`, which is our kind of model.
"""
from functools import partial

from mambino.tokenizer_config import MODEL_TYPE
from mambino.weights.checkpoint import MODELS
from mambino.weights.families.common import Family, number, own_fields, refuse


def with_body(theirs):
    """config.json whose model_type tells the body, too; of other models as it is."""
    if theirs.get('model_type') != MODEL_TYPE:
        return theirs
    return {**theirs, 'model_type': f'{MODEL_TYPE}, body={theirs.get("body")}'}


def fields(config_class, theirs):
    """The fields of our config of this class."""
    mask_id = number(theirs, 'mask_token_id')
    if mask_id != number(theirs, 'vocab_size') - 1:
        refuse('mask_token_id', mask_id, 'must be the last id, vocab_size - 1')
    if theirs.get('objective') not in ('masked', 'block'):
        refuse('objective', theirs.get('objective'), 'must be masked or block')
    return own_fields(config_class, {**theirs, 'rope_scaling': theirs.get('rope_stretched')})


def mamba_names(weights, theirs):
    """Our names of a Mamba's tensors, in place."""
    for name in [name for name in weights if name.startswith('model.')]:
        tensor = weights.pop(name)
        for part, ours in (('model.embed_tokens.', 'backbone.embeddings.'), ('model.norm.', 'backbone.norm_f.')):
            name = name.replace(part, ours)
        weights[name.replace('model.', 'backbone.', 1)] = tensor
    if theirs.get('tie_word_embeddings', True):             # transformers 4 leaves out what is its default
        weights.setdefault('lm_head.weight', weights['backbone.embeddings.weight'])


FAMILIES = {
    f'{MODEL_TYPE}, body={kind}': Family(
        kind, partial(fields, config_class), convert=mamba_names if kind == 'mamba' else None)
    for kind, (_, config_class) in MODELS.items()}
