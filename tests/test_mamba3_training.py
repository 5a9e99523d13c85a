"""What training does for Mamba-3: its sizes, what its optimizers are told, which runs go on with it."""
import pytest
import torch
from helpers.models import V, assert_close, perturb, tokens
from helpers.runs import load, refused, train

from mambino.kernels import native
from mambino.train.metrics import odd_size_lines
from mambino.train.sizes import SIZES, named_size
from mambino.weights.fitting import model_of_shapes
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, Mamba2Mixer, Mamba3Mixer, MambaConfig

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


# --- in a hybrid, and what the optimizers are told ------------------------------------------------

HYBRID = dict(version=3, vocab_size=V, n_layer=2, n_embd=32, n_head=4, state_size=8, ssm_head_dim=16, chunk_size=16)


@pytest.mark.parametrize('changes', [{}, dict(mimo_rank=2, layout='parallel', n_groups=2), dict(low_rank=8)])
def test_a_hybrid_has_it_with_normed_heads(changes):
    """Its steps are its forward; its own initialisation leaves Mamba-3's."""
    torch.manual_seed(0)
    net = Hybrid(HybridConfig(**HYBRID, window=20, **changes)).eval()
    for layer in net.model.layers:
        assert layer.mamba.norm is not None and (layer.mamba.B_bias == 1).all() and (layer.mamba.C_bias == 1).all()
    idx = tokens(2, 40)
    with torch.no_grad():
        want = perturb(net)(idx)[0]
        state, out = None, []
        for part in idx.split([1, 9, 30], 1):
            logits, state = net.step(part, state)
            out.append(logits)
    assert_close(torch.cat(out, 1), want)
    without = Hybrid(HybridConfig(**HYBRID | dict(version=2), window=20)).mixing_flops(64)
    ours, its = net.config.ssm, HybridConfig(**HYBRID | dict(version=2)).ssm
    assert net.mixing_flops(64) - without == 2 * (Mamba3Mixer.flops(ours, 64) - Mamba2Mixer.flops(its, 64))


@pytest.mark.parametrize('net', [
    Mamba(MambaConfig(version=3, vocab_size=V, n_layer=1, n_embd=32, state_size=8, head_dim=16, mimo_rank=2)),
    Hybrid(HybridConfig(**HYBRID | dict(n_layer=1, mimo_rank=2)))], ids=['mamba', 'hybrid'])
@pytest.mark.parametrize('muon', [False, True])
def test_no_decay_and_no_muon_for_what_is_no_matrix(net, muon):
    kinds = {}
    names = {id(p): name for name, p in net.named_parameters()}
    for group in net.optim_groups(0.1, muon=muon):
        kinds |= {names[id(p)].split('.')[-1]: (group['kind'], group['weight_decay'])
                  for p in group['params'] if '_proj.' not in names[id(p)]}
        in_proj = [p for p in group['params'] if names[id(p)].endswith('in_proj.weight')]
        assert not in_proj or (group['kind'], group['weight_decay']) == ('muon' if muon else 'adamw', 0.1)
    for name in 'B_bias C_bias mimo_x mimo_z mimo_o dt_bias D'.split():
        assert kinds[name] == ('adamw', 0.0), name


@pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
@pytest.mark.parametrize('config, words', [
    (MambaConfig(version=3, state_size=36), 'state_size=36 is no multiple of 32'), (MambaConfig(version=3), ''),
    (MambaConfig(state_size=24), '32 would train'), (MambaConfig(state_size=16), ''), (MambaConfig(version=1), ''),
    (HybridConfig(state_size=24), 'note: '), (HybridConfig(state_size=24, layers='a'), '')])
def test_a_size_that_is_slow_is_said(config, words):
    lines = list(odd_size_lines(config))
    assert len(lines) == bool(words) and all(words in line for line in lines)
