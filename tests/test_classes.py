"""classes.py: what an exporter has not been taught is refused by its name, by every format, and no
file is left."""
import os

import pytest
import torch
import torch.nn as nn
from helpers.models import CONFIG, MODELS

import model_mamba
from mambino.export import to_gguf, to_hf, to_onnx, to_peft, to_safetensors, to_torchscript
from mambino.export.classes import check_modules, kind_of, look_up, look_up_alike
from mambino.language_model import SwiGLU
from mambino.weights import checkpoint
from model_gpt import GPT, Attention, GPTConfig
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, Mamba1Mixer, Mamba2Mixer, MambaConfig

FORMATS = dict(hf=to_hf, gguf=to_gguf, onnx=to_onnx, torchscript=to_torchscript)
every_format = pytest.mark.parametrize('name', FORMATS)
SIZES = dict(vocab_size=64, n_layer=2, n_embd=32, block_size=32)
# what llama.cpp has too
PLAIN = dict(n_head=2, gate=False, branch_norm=False, window=0, ssm_head_dim=16, state_size=16)


class NewMixer(Mamba2Mixer):
    """A third version: everything that a Mamba-2 has, and another result."""

    def forward(self, x, cache=None):
        return 2 * super().forward(x, cache)


class LinearAttention(Attention):
    pass


class GatedMLP(SwiGLU):
    pass


class Diffusion(GPT):
    pass


def gpt():
    return GPT(GPTConfig(**SIZES, n_head=2)).eval()


def refused(name, net, folder, word):
    if name == 'gguf':
        pytest.importorskip('gguf')
    if name == 'onnx':
        pytest.importorskip('onnxscript')
    with pytest.raises(ValueError, match=word):
        FORMATS[name].write(net, None, folder)
    assert not os.listdir(folder)


@every_format
def test_a_new_mamba_is_not_taken_for_an_old_one(name, tmp_path, monkeypatch):
    monkeypatch.setitem(model_mamba.MIXERS, 4, NewMixer)
    net = Mamba(MambaConfig(**SIZES, version=4, head_dim=16)).eval()
    refused(name, net, tmp_path, 'NewMixer')


@every_format
def test_a_new_mixer_in_a_hybrid(name, tmp_path):
    net = Hybrid(HybridConfig(**SIZES, **PLAIN)).eval()
    net.model.layers[1].mamba.__class__ = NewMixer
    refused(name, net, tmp_path, 'NewMixer')


@every_format
def test_a_new_kind_of_model(name, tmp_path):
    net = gpt()
    net.__class__ = Diffusion
    refused(name, net, tmp_path, 'Diffusion')


@every_format
@pytest.mark.parametrize('part, cls', [('self_attn', LinearAttention), ('mlp', GatedMLP)])
def test_a_new_part_of_a_layer(name, part, cls, tmp_path):
    net = gpt()
    getattr(net.model.layers[1], part).__class__ = cls
    refused(name, net, tmp_path, cls.__name__)


@pytest.mark.parametrize('name', MODELS)
def test_all_that_there_is_is_known(name):
    cls, settings = MODELS[name]
    net = cls(CONFIG[cls](vocab_size=64, **settings))
    check_modules(net, 'nobody')
    assert checkpoint.MODELS[kind_of(net)][0] is cls


def test_what_is_no_checkpoint_has_no_kind(tmp_path):
    net = gpt()
    net.__class__ = Diffusion
    with pytest.raises(ValueError, match='Diffusion, only GPT, Hybrid, Mamba'):
        kind_of(net)
    with pytest.raises(ValueError, match='Diffusion'):
        to_safetensors.write(net, None, tmp_path)
    assert not os.listdir(tmp_path)


def test_an_adapter_of_a_new_kind(tmp_path, monkeypatch):
    adapter = dict(type='lora', rank=1, alpha=1.0, dropout=0.0, targets='')
    config = vars(MambaConfig(**SIZES, head_dim=16))
    for changes, word in ((dict(kind='diffusion'), 'diffusion'),
                          (dict(adapter=dict(adapter, type='bottleneck')), 'bottleneck'),
                          (dict(config=dict(config, version=4)), 'NewMixer')):
        monkeypatch.setitem(model_mamba.MIXERS, 4, NewMixer)
        ckpt = dict(kind='mamba', config=config, weights={}, adapter=adapter) | changes
        with pytest.raises(ValueError, match=word):
            to_peft.write(None, None, tmp_path, ckpt=ckpt, base='base')
    assert not os.listdir(tmp_path)


def test_a_table_takes_a_class_itself():
    table = {nn.Linear: 'a matrix', nn.Embedding: 'a table'}
    assert look_up(table, nn.Linear(1, 1), 'it') == 'a matrix'
    with pytest.raises(ValueError, match='it has no TimeStep, only Embedding, Linear'):
        look_up(table, model_mamba.TimeStep(1, 1), 'it')
    assert look_up_alike(table, [nn.Linear(1, 1), nn.Linear(2, 2)], 'it') == 'a matrix'
    with pytest.raises(ValueError, match='mixes Embedding and Linear'):
        look_up_alike(table, [nn.Linear(1, 1), nn.Embedding(1, 1)], 'it')


@torch.no_grad()
def test_mixers_of_two_versions(tmp_path):
    net = Mamba(MambaConfig(**SIZES, head_dim=16)).eval()
    net.backbone.layers[1].mixer = Mamba1Mixer(MambaConfig(**SIZES, version=1), 2)
    with pytest.raises(ValueError, match='mixes Mamba1Mixer and Mamba2Mixer'):
        to_hf.write(net, None, tmp_path)
    assert not os.listdir(tmp_path)
