"""What training does for Mamba-3: its sizes, what its optimizers are told, which runs go on with it."""
import pytest
import torch
from helpers.runs import load, refused, train

from mambino.train.sizes import SIZES, named_size
from mambino.weights.fitting import model_of_shapes

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('rank', [1, 2, 4])
@pytest.mark.parametrize('size', [size for model, size in SIZES if model == 'mamba'])
def test_a_named_size_has_about_so_many_parameters(size, rank):
    sizes = named_size('mamba', size, rank)
    net = model_of_shapes('mamba', dict(sizes, vocab_size=16384, version=3, mimo_rank=rank))
    assert abs(net.num_params() / (int(size[:-1]) * 1e6) - 1) < 0.05


def test_a_run_goes_on_with_the_version_it_has(here, capsys):
    flags = '--model=mamba --max_iters=5'
    train(flags)
    train(flags, '--version=3', status=2)
    refused(capsys, 'version=2', 'not 3', '--init_from=scratch')
    train('--init_from=out --out_dir=new --version=3 --max_iters=5', status=2)
    refused(capsys, 'version=2', 'not 3')


def test_a_checkpoint_of_an_older_version_goes_on(here):
    """Which knew none of Mamba-3's settings."""
    train('--model=mamba --max_iters=5')
    ckpt = load()
    for name in ('mimo_rank', 'rope_fraction', 'head_norm', 'intermediate_size'):
        del ckpt['config'][name], ckpt['settings'][name]
    torch.save(ckpt, 'out/ckpt.pt')
    train('--model=mamba --max_iters=10')
    assert load()['counters']['step'] == 10 and load()['config']['mimo_rank'] == 1
