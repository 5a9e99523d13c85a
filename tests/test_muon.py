"""The batched Muon against torch.optim.Muon, and against what orthogonal means."""
import copy

import pytest
import torch
from helpers.card import pretended
from helpers.card_process import on_card

from mambino.train.building import build_optimizers
from mambino.train.muon import Muon, orthogonalize
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig

# two batches of several, wide and tall together
SHAPES = [(16, 16), (16, 48), (48, 16), (16, 16), (24, 40)]


@pytest.mark.parametrize(
    'options', [dict(adjust_lr_fn='match_rms_adamw'), dict(), dict(nesterov=False, momentum=0.8)]
)
def test_makes_the_steps_of_torchs_muon(options):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    torchs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizers = [
        kind(params, lr=0.05, weight_decay=0.1, **options)
        for kind, params in ((Muon, ours), (torch.optim.Muon, torchs))
    ]
    for _ in range(4):
        for p, q in zip(ours, torchs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, s in zip(ours, torchs, start):  # torch computes in bf16, three digits
        assert (p - q).norm() < 0.02 * (q - s).norm()
    for p, q in zip(ours, torchs):  # so that either goes on from the other's checkpoint
        torch.testing.assert_close(
            optimizers[0].state[p]['momentum_buffer'], optimizers[1].state[q]['momentum_buffer']
        )


def test_orthogonalize_keeps_the_directions_and_evens_the_sizes():
    torch.manual_seed(0)
    g = torch.randn(3, 16, 40)
    x = orthogonalize(g, (3.4445, -4.7750, 2.0315), 5, 1e-7, torch.float32)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    in_basis = u.mT @ x @ v.mT                # diagonal where the singular vectors are g's
    sizes = in_basis.diagonal(dim1=-2, dim2=-1)
    assert 0.5 < sizes.min() and sizes.max() < 1.5
    assert (in_basis - torch.diag_embed(sizes)).abs().max() < 1e-3


@pytest.mark.parametrize('shape', [(2, 24, 32), (2, 24, 64)])    # the second by x x^T alone
def test_orthogonalize_makes_the_steps_of_float64(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    g[:, 0] *= 1e-4                                             # a singular value that is small
    options = (3.4445, -4.7750, 2.0315), 5, 1e-7
    want = orthogonalize(g.double(), *options, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):  # measured: 2e-6, 0.018
        assert (orthogonalize(g, *options, dtype) - want).norm() < tolerance * want.norm()


def test_a_parameter_without_gradient_stays():
    a, b = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    a.grad = torch.eye(4)
    Muon([a, b], lr=0.1).step()
    assert (b == 1).all() and not (a == 1).all()


@pytest.mark.parametrize('rows', [[5, 3, 12], [20]])
def test_rows_are_matrices_of_their_own(rows):
    stacked = torch.nn.Parameter(torch.randn(20, 8))
    alone = [torch.nn.Parameter(part.clone()) for part in stacked.detach().split(rows)]
    options = dict(lr=0.1, weight_decay=0.1, adjust_lr_fn='match_rms_adamw')
    optimizers = Muon([dict(params=[stacked], rows=[rows])], **options), Muon(alone, **options)
    for _ in range(3):
        gradient = torch.randn(20, 8)
        stacked.grad = gradient
        for p, part in zip(alone, gradient.split(rows)):
            p.grad = part
        for opt in optimizers:
            opt.step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in alone]))
    assert optimizers[0].state_dict()['param_groups'][0]['rows'] == [rows]


@pytest.mark.parametrize(
    'model, kinds',
    [
        (
            Mamba(MambaConfig(n_layer=2, n_embd=32, state_size=8, head_dim=16, vocab_size=20)),
            [64, 64, 8, 8, 4],
        ),
        (
            Hybrid(
                HybridConfig(
                    n_layer=2, n_embd=32, n_head=2, state_size=8, ssm_head_dim=16, vocab_size=20
                )
            ),
            [64, 64, 8, 8, 4],
        ),
        (
            Hybrid(
                HybridConfig(
                    n_layer=2, n_embd=32, n_head=2, ssm_head_dim=16, vocab_size=20, low_rank=4
                )
            ),
            None,
        ),
        (
            Mamba(MambaConfig(version=3, n_layer=2, n_embd=32, state_size=8, head_dim=16, mimo_rank=3, vocab_size=20)),
            [64, 64, 8, 8, 8, 8, 8, 8, 4, 4, 4, 2],
        ),
        (
            Hybrid(
                HybridConfig(
                    version=3, n_layer=2, n_embd=32, n_head=2, state_size=8, ssm_head_dim=16, vocab_size=20
                )
            ),
            [64, 64, 8, 8, 4, 4, 4, 2],
        ),
        (Mamba(MambaConfig(version=1, n_layer=2, n_embd=32, vocab_size=20)), None),
    ],
)
def test_the_kinds_in_a_mambas_in_proj_are_told_apart(model, kinds):
    group = build_optimizers(model, 'muon')[1].param_groups[0]
    assert len(group['rows']) == len(group['params'])
    assert [rows for rows in group['rows'] if rows] == ([kinds] * 2 if kinds else [])
    for p, rows in zip(group['params'], group['rows'], strict=True):
        assert rows is None or sum(rows) == len(p)


@on_card
def test_a_card_is_given_as_much_for_many_matrices_as_for_few():
    """And is waited for never."""
    launches = []
    for n in (1, 3):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES * n]
        for p in params:
            p.grad = torch.randn(p.shape)
        wanted = copy.deepcopy(params)
        for p, q in zip(params, wanted):
            q.grad = p.grad.clone()
        optimizer = Muon([dict(params=wanted, rows=[None, [8, 8], None, None, None] * n)], lr=0.1)
        optimizer.dtype = torch.bfloat16
        for _ in range(2):
            optimizer.step()
        with pretended() as card:
            torch.nn.ParameterList(params).to('cuda')
            optimizer = Muon([dict(params=params, rows=[None, [8, 8], None, None, None] * n)], lr=0.1)
            optimizer.step()                                # makes its state
            card.reset()
            optimizer.step()
            launches.append(card.launches)
            assert card.waits == {}
            for p, q in zip(params, wanted):
                assert (p.detach().cpu() - q.detach()).abs().max() < 1e-3
    assert launches[0] == launches[1]
