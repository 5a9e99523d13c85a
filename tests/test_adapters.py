"""adapters.py: what is added is what the papers say, what is written is what peft reads, and a run with it is a run like any other."""
import copy
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from mambino.weights import from_peft
from mambino.weights import loading
from mambino.export import to_peft
from mambino.weights import adapters
from mambino.weights import checkpoint
from mambino.train.begin import SIZES
from mambino.train.memory import estimate
from mambino.language_model import linear_cross_entropy
from helpers.models import CONFIG, MODELS, PEERS, V, assert_close, build, perturb, tokens
from helpers.runs import files, launch, metrics, refused, same_run, script, train

pytestmark = pytest.mark.usefixtures('quiet_and_seeded', 'one_thread')

NETS = list(MODELS)
every_net = pytest.mark.parametrize('name', NETS)
KINDS = ['gpt', 'mamba', 'hybrid']


def trained(net):
    """The trainable parameters by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def adapted(name, kind='lora', **how):
    """A perturbed model, and a copy with a perturbed adapter."""
    base = perturb(build(name))
    net = copy.deepcopy(base)
    adapters.add_lora(net, **how) if kind == 'lora' else adapters.add_prefix(net, 7)
    for p in trained(net).values():
        p.data += 0.1 * torch.randn_like(p)
    return base, net


def saved(net, how, base):
    """A checkpoint of an adapter, as train.py makes it."""
    kind = next(kind for kind, (model, _) in checkpoint.MODELS.items() if isinstance(net, model))
    how = how | dict(base='base', base_at='base', base_fingerprint=checkpoint.fingerprint(base.state_dict()))
    return dict(kind=kind, config=checkpoint.config_of(net), adapter=how,
                weights={name: t.clone() for name, t in adapters.AdapterState(net, how).state_dict().items()})


LORA = dict(type='lora', targets='', rank=8, alpha=16.0, dropout=0.0)
PREFIX = dict(type='prefix', length=7)


# --- LoRA

@pytest.mark.parametrize('name, targets', [(name, '') for name in NETS] + [
    ('mamba1', 'in_proj,x_proj,dt_proj,out_proj'), ('mamba2', 'out_proj'), ('hybrid', 'k_proj,out_proj,controller')])
def test_lora_begins_as_the_base_and_its_gradients_are_those_of_the_dense_change(name, targets):
    """Gradients of A and B are those by way of W + scale B A, made by autograd."""
    base = perturb(build(name))
    net = adapters.add_lora(copy.deepcopy(base), targets, rank=3, alpha=6.0)
    idx, targets = tokens(2, 2, 40)
    with torch.no_grad():
        assert torch.equal(net(idx)[0], base(idx)[0])
    for p in trained(net).values():
        p.data += 0.1 * torch.randn_like(p)
    dense, leaves, changed = {n: p.detach() for n, p in base.named_parameters()}, {}, 0
    for path, linear in adapters.with_lora(net).items():
        a, b = (p.detach().clone().requires_grad_() for p in linear.lora['default'].parameters())
        leaves[path] = a, b
        dense[path + '.weight'] = dense[path + '.weight'] + 2.0 * b @ a
        changed += 1
    assert changed and len(leaves) == len(adapters.with_lora(net))
    want = torch.func.functional_call(base, dense, (idx, targets))[1]
    got = net(idx, targets)[1]
    assert_close(got, want, 1e-5)
    wants = torch.autograd.grad(want, [leaf for pair in leaves.values() for leaf in pair])
    gots = torch.autograd.grad(got, [p for linear in adapters.with_lora(net).values() for p in linear.lora.parameters()])
    for a, b in zip(gots, wants):
        assert b.abs().max() > 0
        assert_close(a, b, 1e-4 * b.abs().max().item() + 1e-7)


@every_net
def test_merged_is_unmerged_and_steps_are_forward(name):
    base, net = adapted(name)
    idx = tokens(2, 33)
    with torch.no_grad():
        want = net(idx)[0]
        assert (want - base(idx)[0]).abs().max() > 0.1
        first, state = net.step(idx[:, :20])
        assert_close(torch.cat((first, net.step(idx[:, 20:], state)[0]), 1), want)
        adapters.merge_adapters(net)
        assert net.state_dict().keys() == base.state_dict().keys() and not adapters.with_lora(net)
        assert_close(net(idx)[0], want)


def test_lora_is_small_on_a_model_of_50_million():
    for kind in KINDS:
        size = SIZES[kind, '50m'] | ({} if kind == 'mamba' else dict(n_head=8))
        own, all_of_them = [], []
        for n_layer in (1, 2):                              # both grow by as much with each layer
            with torch.device('meta'):
                net = adapters.add_lora(checkpoint.build(kind, size | dict(n_layer=n_layer, vocab_size=16384)), rank=8)
            own.append(sum(p.numel() for p in trained(net).values()))
            all_of_them.append(net.num_params())
        own, all_of_them = (one + (size['n_layer'] - 1) * (two - one) for one, two in (own, all_of_them))
        assert 45e6 < all_of_them < 60e6 and 0 < own <= 0.02 * all_of_them


@pytest.mark.parametrize('name, targets, words', [
    ('gpt', 'q_proj,nothing', 'nothing is no matrix'),
    ('gpt', 'lm_head', 'lm_head takes no LoRA loss'),
    ('gpt', 'embed_tokens', 'embed_tokens look-up q_proj'),
    ('gpt-experts', 'gate', 'gate router q_proj'),
    ('gpt-experts', 'down_proj', 'down_proj stacks q_proj'),
    ('mamba1', 'conv1d', 'conv1d in_proj x_proj dt_proj out_proj'),
    ('mamba2', 'embeddings', 'embeddings look-up in_proj'),
])
def test_targets_that_cannot_be_are_named(name, targets, words):
    with pytest.raises(ValueError) as error:
        adapters.add_lora(build(name), targets)
    for word in words.split():
        assert word in str(error.value)


def test_targets_are_names_or_ends_of_paths():
    net = adapters.add_lora(build('gpt'), 'q_proj, layers.1.mlp.up_proj')
    assert list(adapters.with_lora(net)) == ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj', 'model.layers.1.mlp.up_proj']
    assert {adapters.short_name(path) for path in adapters.find_targets(build('mamba1'), '')} == {'in_proj', 'x_proj'}
    assert {adapters.short_name(path) for path in adapters.find_targets(build('mamba2'), '')} == {'in_proj'}
    assert adapters.with_lora(adapters.add_lora(build('mamba2'), 'out_proj'))


def test_dropout_is_of_training_alone():
    base, net = adapted('gpt', dropout=0.5)
    idx = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(net(idx)[0], net(idx)[0])
        net.train()
        assert not torch.equal(net(idx)[0], net(idx)[0])


@pytest.mark.parametrize('name', ['gpt', 'mamba2', 'mamba1', 'hybrid'])
def test_with_gradient_checkpointing_the_gradients_are_the_same(name):
    _, net = adapted(name)
    net.train()
    idx, targets = tokens(2, 2, 20)
    want = torch.autograd.grad(net(idx, targets)[1], trained(net).values())
    net.gradient_checkpointing = True
    for a, b in zip(torch.autograd.grad(net(idx, targets)[1], trained(net).values()), want):
        assert_close(a, b, 1e-6)


def test_head_that_is_frozen_costs_no_gradient():
    x, weight, targets = torch.randn(1, 9, 8), torch.randn(V, 8), tokens(1, 9)
    want = torch.autograd.grad(F.cross_entropy((x.requires_grad_() @ weight.t())[0], targets[0]), x)[0]
    loss = linear_cross_entropy(x, weight, targets)
    assert all(kept is None or kept.shape != weight.shape for kept in loss.grad_fn.saved_tensors)
    assert_close(torch.autograd.grad(loss, x)[0], want, 1e-6)


# --- prefix tuning

@every_net
def test_prefix_is_what_was_read(name):
    """A prefix that was made from tokens has the effect of these tokens; forward and steps agree, and gradients reach all of it."""
    base = perturb(build(name))
    ids, (idx, targets) = tokens(7), tokens(2, 2, 30)
    net = adapters.add_prefix(copy.deepcopy(base), 7, ids)
    with torch.no_grad():
        want = base(torch.cat((ids.expand(2, 7), idx), 1))[0][:, 7:]
        assert_close(net(idx)[0], want)
        for pieces in ([30], [1, 9, 20], [1] * 30):
            state, out = None, []
            for part in idx.split(pieces, 1):
                logits, state = net.step(part, state)
                out.append(logits)
            assert_close(torch.cat(out, 1), want)
        assert_close(net(idx)[0], want)                     # nothing was written into it
        assert (net(idx)[0] - base(idx)[0]).abs().max() > 0.01
    own = trained(net)
    assert set(own) == {n for n in own if n.startswith('prefix.')}
    for train in (False, True):
        for n, g in zip(own, torch.autograd.grad(net.train(train)(idx, targets)[1], own.values())):
            assert torch.isfinite(g).all() and g.abs().max() > 0, n


@pytest.mark.parametrize('name', ['gpt', 'gpt-gqa-window', 'mamba1', 'mamba2', 'hybrid'])
def test_gradient_of_a_prefix_is_the_slope_of_the_loss(name):
    _, net = adapted(name, 'prefix')
    idx, targets = tokens(2, 2, 30)
    own = list(trained(net).values())
    grads = torch.autograd.grad(net(idx, targets)[1], own)
    ways = [torch.randn_like(g) for g in grads]
    slope = sum((g * way).sum() for g, way in zip(grads, ways)).item()
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            for p, way in zip(own, ways):
                p += sign * 1e-3 * way
            losses.append(net(idx, targets)[1].item())
            for p, way in zip(own, ways):
                p -= sign * 1e-3 * way
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_what_a_prefix_cannot_be():
    net = adapters.add_prefix(build('gpt'), 7)
    for text, action in (('two prefixes', lambda: adapters.add_prefix(net, 7)), ('merged', lambda: adapters.merge_adapters(net)),
                         ('from 1 to 20', lambda: adapters.add_prefix(build('gpt-gqa-window'), 21))):
        with pytest.raises(ValueError, match=text):
            action()


# --- several adapters

def test_loras_of_one_base_add_up(monkeypatch):
    base, one = adapted('gpt')
    other = adapters.add_lora(copy.deepcopy(base), 'q_proj', 4, 4.0)
    for p in trained(other).values():
        p.data += 0.1 * torch.randn_like(p)
    a, b = saved(one, LORA, base), saved(other, dict(LORA, targets='q_proj', rank=4, alpha=4.0), base)
    net = adapters.attach_adapter(adapters.attach_adapter(copy.deepcopy(base), a), b, 0.5)
    want = {name: w.clone() for name, w in base.state_dict().items()}
    for delta, weight in ((adapters.merge_adapters(one), 1), (adapters.merge_adapters(other), 0.5)):
        for name, w in delta.state_dict().items():
            want[name] += weight * (w - base.state_dict()[name])
    for name, w in adapters.merge_adapters(net).state_dict().items():
        assert_close(w, want[name], 1e-6)
    for text, action in (('another base', lambda: adapters.attach_adapter(perturb(build('gpt')), a)),
                         ('no weight', lambda: adapters.attach_adapter(copy.deepcopy(base), a, float('nan')))):
        with pytest.raises(ValueError, match=text):
            action()


def test_merged_weights_are_the_same_bits_on_every_machine():
    """In whatever order its sums are made, for a merged model has a fingerprint when it is a base."""
    base, net = adapted('gpt')
    want = {f'{path}.weight': (linear.lora['default'].B.double()[:, :, None] * linear.lora['default'].A.double()).sum(1) * 2
            for path, linear in adapters.with_lora(net).items()}
    found = adapters.merge_adapters(net).state_dict()
    for name, change in want.items():
        assert torch.equal(found[name], base.state_dict()[name] + change.float())


def test_lora_and_prefix_stand_on_one_base():
    base, one = adapted('hybrid')
    _, two = base, adapters.add_prefix(copy.deepcopy(base), 7)
    net = copy.deepcopy(base)
    for ckpt in (saved(two, PREFIX, base), saved(one, LORA, base)):
        adapters.attach_adapter(net, ckpt)
    adapters.add_prefix(one, 7)
    for layer, value in trained(one).items():
        value.data = dict(two.named_parameters())[layer].data if layer.startswith('prefix') else value.data
    idx = tokens(2, 20)
    with torch.no_grad():
        assert_close(net(idx)[0], one(idx)[0])


# --- peft

@pytest.fixture
def peft():
    transformers = pytest.importorskip('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pytest.importorskip('safetensors')
    return pytest.importorskip('peft')


def peers(peer, folder, kind, **how):
    """Our model of a peer's kind with a perturbed adapter, its checkpoint, and in folder/base the base by transformers' own class."""
    import transformers
    name, their_settings, cls, settings = PEERS[peer]
    base = perturb(cls(CONFIG[cls](vocab_size=V, n_layer=2, **settings)).eval())
    theirs = getattr(transformers, name + 'ForCausalLM')(getattr(transformers, name + 'Config')(vocab_size=V, num_hidden_layers=2, **their_settings))
    theirs.load_state_dict(base.state_dict())
    theirs.save_pretrained(folder / 'base')
    net = copy.deepcopy(base)
    adapters.add_adapter(net, dict(LORA, **how) if kind == 'lora' else PREFIX)
    for p in trained(net).values():
        p.data += 0.1 * torch.randn_like(p)
    return base, net, saved(net, dict(LORA, **how) if kind == 'lora' else PREFIX, base)


@pytest.mark.filterwarnings('error:.*missing adapter keys.*', 'error:.*unexpected.*')
@pytest.mark.parametrize('peer, kind, targets', [
    ('llama', 'lora', ''), ('qwen3', 'lora', 'q_proj,down_proj'), ('mistral', 'lora', ''), ('mixtral-gqa', 'lora', ''), ('mamba1', 'lora', ''),
    ('mamba2', 'lora', ''), ('mamba2-untied', 'lora', 'layers.1.mixer.in_proj'), ('llama', 'prefix', ''), ('qwen3-untied', 'prefix', ''),
    ('mistral', 'prefix', '')])
def test_peft_reads_what_is_written(peft, tmp_path, monkeypatch, peer, kind, targets):
    from transformers import AutoModelForCausalLM
    base, net, ckpt = peers(peer, tmp_path, kind, targets=targets) if kind == 'lora' else peers(peer, tmp_path, kind)
    to_peft.write(net, None, tmp_path, ckpt=ckpt, base=tmp_path / 'base')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    own = sum(p.numel() for name, p in theirs.named_parameters() if 'lora_' in name or 'prompt_encoder' in name)
    assert own == sum(t.numel() for t in ckpt['weights'].values())
    idx = tokens(2, 40)
    with torch.no_grad():
        want = theirs(idx).logits
        assert (want - base(idx)[0]).abs().max() > 0.1
        assert_close(net(idx)[0], want)
        monkeypatch.setattr(loading, 'base_of', lambda ckpt: dict(weights=base.state_dict()))
        found = to_peft.verify(net, None, tmp_path, ckpt=ckpt)
        assert found['ok'] and found['logits'] <= 1e-4
        theirs.save_pretrained(tmp_path / 'again')          # and back
        again = adapters.attach_adapter(copy.deepcopy(base), from_peft.read_peft(tmp_path / 'again'))
        assert_close(again(idx)[0], want)


def test_what_peft_cannot_have_is_said(tmp_path):
    for name, kind, how, word in (('mamba2', 'prefix', {}, 'first state'), ('hybrid', 'lora', {}, 'hybrid'), ('mamba1', 'lora', dict(targets='out_proj'), 'out_proj'),
                                  ('mamba1', 'lora', dict(targets='dt_proj'), 'would not see')):
        base, net = adapted(name, kind, **how)
        with pytest.raises(ValueError, match=word):
            to_peft.write(net, None, tmp_path, ckpt=saved(net, dict(LORA, **how) if kind == 'lora' else PREFIX, base), base='base')
    assert not os.listdir(tmp_path)


def test_an_adapter_of_another_make_is_refused(tmp_path, peft):
    base, net, ckpt = peers('llama', tmp_path, 'lora')
    to_peft.write(net, None, tmp_path, ckpt=ckpt, base='base')
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    for odd, word in (dict(use_dora=True), 'use_dora'), (dict(init_lora_weights='pissa'), 'beside the base'), (dict(unheard_of=1), 'unheard_of'):
        (tmp_path / 'adapter_config.json').write_text(json.dumps(config | odd))
        with pytest.raises(ValueError, match=word):
            from_peft.read_peft(tmp_path)


def test_what_peft_saved_is_sampled_with_our_base(based, capsys):
    pytest.importorskip('safetensors')
    train('--adapter=lora --init_from=base-gpt --max_iters=5 --learning_rate=0.1')
    os.mkdir('theirs')
    to_peft.write(None, None, 'theirs', ckpt=checkpoint.load_checkpoint('out'), base='base')
    said = []
    for flags in ('--out_dir=out', '--out_dir=base-gpt --adapters=theirs', '--out_dir=base-gpt'):
        capsys.readouterr()
        assert script('sample.py', flags, '--device=cpu --max_new_tokens=20 --start=e') == 0
        said.append(capsys.readouterr().out.rpartition("'e'\n")[2])
    assert said[0] == said[1] != said[2]
    for file, content, word in (('adapter_config.json', b'{"peft_type": "LORA"}', 'KeyError'), ('adapter_config.json', b'[]', 'AttributeError'),
                                ('adapter_config.json', b'{"peft', 'theirs'), ('adapter_model.safetensors', b'7', 'cut short'),
                                ('adapter_model.safetensors', None, 'adapter_model.safetensors')):
        kept = files('theirs')
        open(f'theirs/{file}', 'wb').write(content) if content else os.remove(f'theirs/{file}')
        assert script('sample.py', '--out_dir=base-gpt --adapters=theirs --device=cpu') == 2
        refused(capsys, 'theirs', word)
        for path, content in kept.items():
            open(path, 'wb').write(content)


# --- train.py

@pytest.fixture(scope='module')
def bases(template):
    """Finished runs of each kind to begin with: base-gpt, base-mamba, base-hybrid."""
    before = os.getcwd()
    os.chdir(template)
    for kind in KINDS:
        train(f'--model={kind} --max_iters=5 --out_dir=base-{kind}')
    os.chdir(before)
    return template


@pytest.fixture
def based(bases, here):
    for kind in KINDS:
        shutil.copytree(bases / f'base-{kind}', here / f'base-{kind}')
    return here


class Killed(BaseException):
    """What a process dies of."""


@pytest.mark.parametrize('how', ['lora gpt', 'lora mamba', 'prefix gpt', 'prefix mamba', 'prefix hybrid'])
def test_run_trains_the_adapter_alone_and_goes_on_bit_by_bit(based, capsys, monkeypatch, how):
    adapter, kind = how.split()
    before = files(f'base-{kind}')
    flags = f'--adapter={adapter} --init_from=base-{kind} --prefix_length=4 --learning_rate=1e-2 --lora_dropout=0.1'
    train(flags, '--out_dir=unbroken')
    assert 'parameters are trained' in capsys.readouterr().out
    update, steps = torch.optim.AdamW.step, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 13:
            raise Killed
        return update(*args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, 'step', dies)
        train(flags)
    assert 6 <= len(metrics()) < 24
    train('--init_from=resume' if kind == 'gpt' else flags)
    same_run('unbroken', 'out')
    assert files(f'base-{kind}') == before

    ckpt, base = checkpoint.load_checkpoint('out'), checkpoint.load_checkpoint(f'base-{kind}')
    assert all('lora_' in name or name.startswith('prefix.') for name in ckpt['weights'])
    moments = [t for state in ckpt['optimizers'][0]['state'].values() for t in state.values() if t.ndim]
    assert sum(t.numel() for t in moments) == 2 * sum(t.numel() for t in ckpt['weights'].values())
    net = loading.model_of(ckpt)
    for name, w in base['weights'].items():
        assert torch.equal(net.state_dict()[name], w)
    losses = metrics('out', 'val_loss')
    assert losses[20] < metrics(f'base-{kind}', 'val_loss')[5]
    capsys.readouterr()
    train('--eval_only')
    assert f'{losses[min(losses, key=losses.get)]:.4f}' in capsys.readouterr().out
    if adapter == 'lora':                                   # to begin with: the merged model
        merged = loading.load_base('out')
        fresh = checkpoint.build(merged['kind'], merged['config']).eval()
        fresh.load_state_dict(merged['weights'])
        assert_close(fresh(idx := torch.arange(9)[None])[0], net(idx)[0], 1e-5)
        train('--init_from=out --out_dir=upon --adapter=lora --max_iters=1')
        assert loading.model_of(checkpoint.load_checkpoint('upon'))
    else:
        train('--init_from=out --out_dir=more', status=2)
        refused(capsys, 'prefix', 'merged')


@pytest.mark.parametrize('flags, words', [
    ('--adapter=lora', 'adapter=lora needs a model --init_from'),
    ('--adapter=loar --init_from=base-gpt', 'adapter=loar lora or prefix'),
    ('--adapter=lora --init_from=base-gpt --lora_targets=q_porj', 'q_porj is no matrix q_proj'),
    ('--adapter=lora --init_from=base-gpt --lora_rank=0', 'lora_rank'),
    ('--adapter=lora --init_from=base-gpt --lora_rank=33', 'lora_rank=33 width 32'),
    ('--adapter=lora --init_from=base-gpt --lora_dropout=1', 'lora_dropout'),
    ('--adapter=lora --init_from=base-gpt --optimizer=muon', 'muon adapter'),
    ('--adapter=prefix --init_from=base-gpt --prefix_length=99', 'prefix_length=99 from 1 to 16'),
    ('--adapter=prefix --init_from=base-gpt --gradient_checkpointing=True', 'gradient_checkpointing prefix'),
])
def test_settings_that_cannot_be_are_one_line(based, capsys, flags, words):
    train(flags, status=2)
    refused(capsys, *words.split())


def test_base_that_moved_or_changed_is_named(based, capsys):
    train('--adapter=lora --init_from=base-gpt --max_iters=5')
    shutil.copytree('base-mamba', 'elsewhere/base-gpt')     # another model of that name is not taken for it
    os.chdir('elsewhere')
    assert script('sample.py', '--out_dir=../out --device=cpu --max_new_tokens=5 --start=e') == 0
    os.chdir('..')
    os.rename('base-gpt', 'moved')
    capsys.readouterr()
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=5 --start=e') == 2
    refused(capsys, 'base-gpt', '--init_from=', '--adapters=')
    train('--max_iters=10', status=2)
    refused(capsys, 'base-gpt')
    train('--max_iters=10 --init_from=moved')
    assert script('sample.py', '--out_dir=moved --adapters=out --device=cpu --max_new_tokens=5 --start=e') == 0
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=5 --start=e') == 0  # the run has taken note
    train('--model=gpt --out_dir=moved --max_iters=10')     # trained further: other weights
    capsys.readouterr()
    assert script('sample.py', '--out_dir=out --device=cpu --max_new_tokens=5 --start=e') == 2
    refused(capsys, 'moved', 'other weights')


def test_run_stays_what_it_is(based, capsys):
    train('--adapter=lora --init_from=base-gpt --max_iters=5')
    for flags in ('--lora_rank=4', '--adapter=prefix', '--lora_targets=q_proj', '--adapter='):
        capsys.readouterr()
        train(flags, status=2)
        refused(capsys, flags[2:].split('=')[0], 'scratch' if flags == '--adapter=' else 'or choose')  # an adapter needs its base
    capsys.readouterr()
    train('--adapter=lora --out_dir=base-gpt', status=2)    # a whole model's run
    refused(capsys, 'adapter')


def test_two_processes_train_as_one(based):
    flags = '--adapter=lora --init_from=base-mamba --max_iters=6'
    process = launch(flags, module='torch.distributed.run --standalone --nproc_per_node=2')
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    train(flags, '--out_dir=one')
    for step, loss in metrics('one', 'loss').items():
        assert metrics('out', 'loss')[step] == pytest.approx(loss, rel=1e-5)


def test_memory_of_an_adapter():
    config = dict(n_layer=4, n_embd=64, n_head=2, vocab_size=512)
    whole, part = (estimate('gpt', config, 4, 64, device='cpu', dtype='float32', adapter=how) for how in (None, LORA))
    assert part['gradients'] < 0.2 * whole['gradients'] and part['optimizer'] < 0.2 * whole['optimizer'] and part['total'] < whole['total']
    assert estimate('mamba', dict(n_layer=4, n_embd=64, vocab_size=512), 2, 64, device='cpu', dtype='float32', adapter=PREFIX)['optimizer'] > 0
