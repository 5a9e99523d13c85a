"""metrics.py: the table of parameters says where they are."""
import re

import pytest
import torch

from mambino.train.metrics import parameter_lines
from mambino.weights import checkpoint

KINDS = {
    'mamba': {},
    'mamba-1': dict(version=1),
    'gpt': dict(n_head=4),
    'gpt-experts': dict(n_head=4, n_expert=4),
    'hybrid': dict(n_head=4),
    'hybrid-sequential': dict(n_head=4, layout='sequential'),
}


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('name', KINDS)
def test_parts_sum_to_the_model(name, tied):
    with torch.device('meta'):
        net = checkpoint.build(
            name.partition('-')[0],
            dict(vocab_size=5000, n_layer=3, n_embd=256, tie_embeddings=tied, **KINDS[name]),
        )
    rows = [
        re.fullmatch(r'  (\S.*?) +([\d.]+)M +([\d.]+)%', line).groups()
        for line in parameter_lines(net)
    ]
    sizes = {part: float(size) for part, size, _ in rows}
    assert len(sizes) == len(rows) and list(sizes.values()) == sorted(sizes.values(), reverse=True)
    # norms may be left out
    assert sum(sizes.values()) == pytest.approx(net.num_params() / 1e6, rel=0.005)
    assert sum(float(share) for _, _, share in rows) == pytest.approx(100, abs=0.5)
    assert [size for part, size in sizes.items() if 'embed' in part] == [1.28]
    assert ('lm_head' in sizes) == (not tied)
    per_layer = {}
    for part, p in net.get_submodule(
        next(n for n, _ in net.named_modules() if n.endswith('layers.1'))
    ).named_parameters():
        per_layer[part.split('.')[0]] = per_layer.get(part.split('.')[0], 0) + p.numel()
    for part, size in per_layer.items():
        if 3 * size > 0.001 * net.num_params():
            assert sizes[f'{part}, 3 layers'] == pytest.approx(3 * size / 1e6, abs=6e-4)


def test_a_row_for_all_but_the_small():
    with torch.device('meta'):
        net = checkpoint.build('gpt', dict(vocab_size=30, n_layer=1, n_head=1, n_embd=8))
    # of a tiny model norms are a part, too
    assert sum('layernorm' in line for line in parameter_lines(net)) == 2
