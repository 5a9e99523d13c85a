"""The families of transformers' models that our hybrid computes, and what export.py wrote of hybrids
with a modelling file of their own."""
import dataclasses

from mambino.weights.checkpoint import HybridConfig
from mambino.weights.families.common import Family, number, refuse


def own_fields(theirs):
    """The fields of our HybridConfig, which such a config.json has under their own names."""
    theirs = {'tie_embeddings': theirs.get('tie_word_embeddings'), **theirs}
    ours = {}
    for field in dataclasses.fields(HybridConfig):
        value = theirs.get(field.name)
        if value is None:
            continue
        if field.type in (int, float):
            ours[field.name] = number(theirs, field.name, kind=field.type)
            continue
        if type(value) is not field.type:
            must = 'must be true or false' if field.type is bool else 'must be a string'
            refuse(field.name, value, must)
        ours[field.name] = value
    return ours


FAMILIES = {
    'mambino_hybrid': Family('hybrid', own_fields),
}
REFUSED = {     # {model_type: what differs}
    'falcon_h1': 'its embeddings are not normed, those of our hybrid are; a model that export.py wrote in this form '
                 'goes on from its out_dir',
}
