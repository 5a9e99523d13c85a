"""from_peft.py, to_peft.py: peft reads what is written and computes the same; what it saved is read."""
import copy
import json
import os

import pytest
import torch
from helpers.adapters import LORA, PREFIX, adapted, saved, trained
from helpers.models import CONFIG, PEERS, V, assert_close, perturb, tokens

from mambino.export import to_hf, to_peft
from mambino.weights import adapters, from_peft, loading

pytestmark = pytest.mark.usefixtures('quiet_and_seeded', 'one_thread')


@pytest.fixture
def peft():
    transformers = pytest.importorskip('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pytest.importorskip('safetensors')
    return pytest.importorskip('peft')


def peers(peer, folder, kind, **how):
    """Our model of a peer's kind with a perturbed adapter, its checkpoint, and in folder/base the base by
    transformers' own class."""
    import transformers
    name, their_settings, cls, settings = PEERS[peer]
    base = perturb(cls(CONFIG[cls](vocab_size=V, n_layer=2, **settings)).eval())
    config = getattr(transformers, name + 'Config')(vocab_size=V, num_hidden_layers=2, **their_settings)
    theirs = getattr(transformers, name + 'ForCausalLM')(config)
    theirs.load_state_dict(base.state_dict())
    theirs.save_pretrained(folder / 'base')
    net = copy.deepcopy(base)
    adapters.add_adapter(net, dict(LORA, **how) if kind == 'lora' else PREFIX)
    for p in trained(net).values():
        p.data += 0.1 * torch.randn_like(p)
    return base, net, saved(net, dict(LORA, **how) if kind == 'lora' else PREFIX, base)


@pytest.mark.filterwarnings('error:.*missing adapter keys.*', 'error:.*unexpected.*')
@pytest.mark.parametrize('peer, kind, targets', [
    ('llama', 'lora', ''),
    ('qwen3', 'lora', 'q_proj,down_proj'),
    ('mistral', 'lora', ''),
    ('mixtral-gqa', 'lora', ''),
    ('mamba1', 'lora', ''),
    ('mamba2', 'lora', ''),
    ('mamba2-untied', 'lora', 'layers.1.mixer.in_proj'),
    ('llama', 'prefix', ''),
    ('qwen3-untied', 'prefix', ''),
    ('mistral', 'prefix', ''),
])
def test_peft_reads_what_is_written(peft, tmp_path, monkeypatch, peer, kind, targets):
    from transformers import AutoModelForCausalLM
    settings = dict(targets=targets) if kind == 'lora' else {}
    base, net, ckpt = peers(peer, tmp_path, kind, **settings)
    to_peft.write(net, None, tmp_path, ckpt=ckpt, base=tmp_path / 'base')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    own = sum(p.numel() for name, p in theirs.named_parameters()
              if 'lora_' in name or 'prompt_encoder' in name)
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
        read = from_peft.read_peft(tmp_path / 'again')
        again = adapters.attach_adapter(copy.deepcopy(base), read)
        assert_close(again(idx)[0], want)


@pytest.mark.filterwarnings('error:.*missing adapter keys.*', 'error:.*unexpected.*')
@pytest.mark.parametrize('name, targets', [
    ('hybrid', ''), ('hybrid-parallel', 'out_proj,o_proj,down_proj,controller'), ('hybrid-low-rank', '')])
def test_a_hybrid_by_its_modelling_file(peft, tmp_path, monkeypatch, own_code, name, targets):
    from transformers import AutoModelForCausalLM
    base, net = adapted(name, targets=targets)
    ckpt = saved(net, dict(LORA, targets=targets), base)
    os.mkdir(tmp_path / 'base')
    to_hf.write(base, None, tmp_path / 'base')
    to_peft.write(net, None, tmp_path, ckpt=ckpt, base=tmp_path / 'base')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype=torch.float32, trust_remote_code=True)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    idx = tokens(2, 40)
    with torch.no_grad():
        want = theirs(idx).logits
        assert (want - base(idx)[0]).abs().max() > 0.1
        assert_close(net(idx)[0], want)
        monkeypatch.setattr(loading, 'base_of', lambda ckpt: dict(weights=base.state_dict()))
        assert to_peft.verify(net, None, tmp_path, ckpt=ckpt)['ok']
        theirs.save_pretrained(tmp_path / 'again')
        again = adapters.attach_adapter(copy.deepcopy(base), from_peft.read_peft(tmp_path / 'again'))
        assert_close(again(idx)[0], want)


def test_what_peft_cannot_have_is_said(tmp_path):
    for name, kind, settings, word in (
            ('mamba2', 'prefix', {}, 'first state'),
            ('hybrid', 'prefix', {}, 'first state'),
            ('hybrid-plain-full', 'lora', {}, 'FalconH1.*scales.*--format=hf'),
            ('mamba1', 'lora', dict(targets='out_proj'), 'out_proj'),
            ('mamba1', 'lora', dict(targets='dt_proj'), 'would not see')):
        base, net = adapted(name, kind, **settings)
        ckpt = saved(net, dict(LORA, **settings) if kind == 'lora' else PREFIX, base)
        with pytest.raises(ValueError, match=word):
            to_peft.write(net, None, tmp_path, ckpt=ckpt, base='base')
    assert not os.listdir(tmp_path)


def test_an_adapter_of_another_make_is_refused(tmp_path, peft):
    base, net, ckpt = peers('llama', tmp_path, 'lora')
    to_peft.write(net, None, tmp_path, ckpt=ckpt, base='base')
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    for odd, word in (
            (dict(use_dora=True), 'use_dora'),
            (dict(init_lora_weights='pissa'), 'beside the base'),
            (dict(unheard_of=1), 'unheard_of')):
        (tmp_path / 'adapter_config.json').write_text(json.dumps(config | odd))
        with pytest.raises(ValueError, match=word):
            from_peft.read_peft(tmp_path)
