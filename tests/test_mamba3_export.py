"""Mamba-3 in other tools: transformers by our modelling file, peft, PyTorch alone, onnxruntime compute what
we do; what a tool has not is refused in one line."""
import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import LORA, saved, trained
from helpers.models import SSM_SIZE, V, assert_close, perturb, tokens

from mambino.export import graphs, to_gguf, to_hf, to_onnx, to_peft, to_torchscript
from mambino.export.compare import compare_steps, greedy, silent
from mambino.export.graph_scans import mamba3_scan
from mambino.weights import adapters, from_peft, loading
from mambino.weights import from_hf as hf
from model_mamba import Mamba, MambaConfig
from model_mamba import mamba3_scan as defined_scan

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

# --- the modelling file of transformers -----------------------------------------------------------

OURS = {
    'siso': dict(intermediate_size=40, head_norm=True),
    'mimo': dict(mimo_rank=3, n_groups=2, rope_fraction=1.0, tie_embeddings=False, chunk_size=12),
}


def built(name, **changes):
    settings = dict(SSM_SIZE, version=3, head_dim=16, vocab_size=V, norm_eps=1e-3, block_size=50)
    return perturb(Mamba(MambaConfig(**{**settings, **OURS[name], **changes}))).eval()


@pytest.fixture
def opened(tmp_path, own_code):
    """A function: our model → transformers' of the folder it is written to."""
    transformers = pytest.importorskip('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def write_and_open(net, cls='AutoModelForCausalLM'):
        to_hf.write(net, None, tmp_path)
        return getattr(transformers, cls).from_pretrained(tmp_path, trust_remote_code=True).eval()
    return write_and_open


@torch.no_grad()
@pytest.mark.parametrize('name', OURS)
def test_the_modelling_file(name, opened):
    """A state of one step a token, padding on the left, beams, a state to go on from."""
    net = built(name)
    model, idx = opened(net), tokens(2, 75)
    mask = torch.ones_like(idx)
    mask[0, :5], mask[1, :30] = 0, 0
    logits = model(idx, attention_mask=mask).logits
    for row, n in ((0, 5), (1, 30)):
        assert_close(logits[row, n:], net(idx[row:row + 1, n:])[0][0], 1e-5)
    lengths = []

    def write_down(module, args):
        lengths.append(args[0].shape[1])
    model.lm_head.register_forward_pre_hook(write_down)
    model.backbone.layers[0].mixer.out_proj.register_forward_pre_hook(write_down)
    got = model.generate(idx, attention_mask=mask, max_new_tokens=20, do_sample=False,
                         return_dict_in_generate=True, pad_token_id=0)
    assert lengths == [75, 1] + [1, 1] * 19
    for row, n in ((0, 5), (1, 30)):
        assert got.sequences[row, 75:].tolist() == greedy(net, idx[row, n:].tolist(), 20)
    longer = torch.cat((got.sequences, tokens(2, 3)), 1)
    longer_mask = torch.cat((mask, mask.new_ones(2, 23)), 1)
    more = model(longer[:, 94:], past_key_values=got.past_key_values, attention_mask=longer_mask).logits
    assert_close(more[1], net(longer[1:, 30:])[0][0, -4:], 1e-5)
    settings = dict(attention_mask=torch.ones_like(idx[:, :9]), num_beams=3, max_new_tokens=9,
                    do_sample=False, pad_token_id=0)
    beams = [model.generate(idx[:, :9], use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*beams)
    with pytest.raises(ValueError, match='covers 75 tokens; it must cover all 99'):
        model(idx[:, :1], past_key_values=got.past_key_values, attention_mask=mask)
    with pytest.raises(ValueError, match='position_ids'):
        model(idx, position_ids=idx)
    rounded = model.to(torch.bfloat16)(idx).logits.float()
    assert (rounded - net(idx)[0]).norm() <= 0.05 * rounded.norm()


@pytest.mark.filterwarnings('ignore:.*gradient_checkpointing_enable:FutureWarning')
@pytest.mark.parametrize('name', OURS)
def test_trained_there_and_read_back(name, opened, tmp_path):
    """With padding after one of the texts; with and without gradient checkpointing."""
    net = built(name)
    model, idx = opened(net).train(), tokens(2, 40)
    mask, labels = torch.ones_like(idx), idx.clone()
    mask[0, 23:], labels[0, 23:] = 0, -100
    texts = idx[:1, :23], idx[1:]
    losses = [F.cross_entropy(net(text)[0][0, :-1], text[0, 1:], reduction='sum') for text in texts]
    want = sum(losses) / (22 + 39)
    want.backward()
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        got = model(idx, attention_mask=mask, labels=labels)
        assert got.past_key_values is None and abs(got.loss - want) < 1e-5
        got.loss.backward()
        for key, p in net.named_parameters():
            assert_close(model.get_parameter(key).grad, p.grad, 1e-4 * p.grad.abs().max().item())
    state = model.eval()(idx, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match='pad on the left'):
        model(idx[:, :1], past_key_values=state)
    with pytest.raises(ValueError, match='pad on the left'):
        model.generate(idx, attention_mask=mask, max_new_tokens=1, pad_token_id=0)
    mask[0, 30] = 1
    with pytest.raises(ValueError, match='padding within a text'):
        model(idx, attention_mask=mask)
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.save_pretrained(tmp_path / 'trained')
    kind, config, weights, _ = hf.load_hf(tmp_path / 'trained')
    assert (kind, config) == ('mamba', vars(net.config))
    net.load_state_dict(weights)
    assert_close(net(idx)[0], model(idx).logits)


def test_auto_model_is_the_model_without_its_head(opened):
    net, idx = built('siso'), tokens(2, 30)
    assert_close(opened(net, 'AutoModel')(idx).last_hidden_state, net.hidden_states(idx)[0])


@pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing.*:FutureWarning')
@torch.no_grad()
def test_peft_tunes_it(opened, tmp_path, monkeypatch):
    """Any of its matrices: what peft refuses on the out_proj of transformers' Mambas is none of this class."""
    peft = pytest.importorskip('peft')
    base = built('siso')
    net, settings = copy.deepcopy(base), dict(LORA, targets='in_proj,out_proj,down_proj')
    adapters.add_lora(net, settings['targets'])
    for p in trained(net).values():
        p.add_(0.1 * torch.randn_like(p))
    ckpt = saved(net, settings, base)
    (tmp_path / 'lora').mkdir()
    to_peft.write(net, None, tmp_path / 'lora', ckpt=ckpt, base=tmp_path)
    theirs, idx = peft.PeftModel.from_pretrained(opened(base), tmp_path / 'lora').eval(), tokens(2, 40)
    want = theirs(idx).logits
    assert (want - base(idx)[0]).abs().max() > 0.1
    assert_close(net(idx)[0], want)
    monkeypatch.setattr(loading, 'base_of', lambda ckpt: dict(weights=base.state_dict()))
    assert to_peft.verify(net, None, tmp_path / 'lora', ckpt=ckpt)['ok']
    theirs.save_pretrained(tmp_path / 'again')
    again = adapters.attach_adapter(copy.deepcopy(base), from_peft.read_peft(tmp_path / 'again'))
    assert_close(again(idx)[0], want)


def test_what_transformers_cannot_have_is_said(tmp_path):
    for version in (1, 2):
        net = built('siso', version=version, head_norm=False)
        with pytest.raises(ValueError, match='no MLP after the mixers.*intermediate_size=40.*onnx'):
            to_hf.write(net, None, tmp_path)
    assert not os.listdir(tmp_path)


# --- graphs ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('R, interleaved', [(1, True), (1, False), (3, False)])
def test_the_scan_of_graphs(R, interleaved):
    """From a state, by chunks, scripted, and as one chunk, which torch.export has."""
    T, H, P, G, N, A = 50, 4, 6, 2, 8, 3
    x, (B, C) = torch.randn(2, T, H, P), torch.randn(2, 2, T, R, G, N)
    dt, decay, trap = torch.rand(2, T, H), -2 * torch.rand(2, T, H), torch.rand(2, T, H)
    rate, biases = 3 * torch.randn(2, T, A), torch.randn(2, H, R, N)
    mimo_x = torch.randn(H, R, P) if R > 1 else None
    state = [torch.randn(2, H, P, N), torch.rand(2, H, A).double(), torch.randn(2, R, H, N),
             torch.randn(2, H, P)]
    inputs = x, B, C, dt, decay, trap, rate, *biases, torch.randn(H), mimo_x, interleaved
    wanted = defined_scan.definition(*inputs, 16, list(state))
    with silent():
        scripted = torch.jit.script(mamba3_scan)
    for scan, Q in ((mamba3_scan, 16), (scripted, 16), (mamba3_scan, T)):
        y, after = scan(*inputs, Q, list(state))
        assert_close(y, wanted[0], 1e-4)
        for name, ours, want in zip('htbx', after, wanted[1]):
            off = (ours - want).abs()
            off = torch.minimum(off, math.tau - off) if name == 't' else off    # angles
            assert ours.dtype == want.dtype and off.max() <= 1e-4, name


@torch.no_grad()
def test_torchscript(tmp_path):
    """The step alone: what torch.export takes weighs most, and is ONNX's too."""
    net = built('mimo', n_layer=1, intermediate_size=40, head_norm=True)
    with silent():
        step, (past, _) = to_torchscript.traced_step(net)
        to_torchscript.save(tmp_path / 'step.ts', torch.jit.save, step)
        step = torch.jit.load(tmp_path / 'step.ts')
        check = compare_steps(net, None, step.empty, step, graphs.FullGraph(net))
    assert check['same'] and check['logits'] <= 1e-5, check
    assert past == ['past_ssm.0', 'past_turn.0', 'past_last_b.0', 'past_last_x.0']
    assert [u.dtype == torch.double for u in step.empty(1)] == [False, True, False, False]


@torch.no_grad()
def test_onnx(tmp_path, monkeypatch):
    """Both files, and with int8 matrices, of which the rows of dt, A, trap and angles stay as they are."""
    for package in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    onnx, serde = pytest.importorskip('onnx'), pytest.importorskip('onnx_ir').serde
    net = built('siso', n_layer=1, n_embd=64)
    model = serde.serialize_model(to_onnx.exported_step(net, None))
    monkeypatch.setattr(to_onnx, 'exported_step', lambda *_: serde.deserialize_model(model))
    to_onnx.write(net, None, tmp_path)
    check = to_onnx.verify(net, None, tmp_path)
    assert check['ok'] and check['greedy'] == '64 of 64', check
    inputs = onnx.load(tmp_path / 'step.onnx').graph.input
    assert [value.name for value in inputs] == [
        'input_ids', 'past_ssm.0', 'past_turn.0', 'past_last_b.0', 'past_last_x.0']
    types = [value.type.tensor_type.elem_type for value in inputs]
    assert types[1:] == [onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, *[onnx.TensorProto.FLOAT] * 2]
    to_onnx.write(net, None, tmp_path, 'int8')
    check = to_onnx.verify(net, None, tmp_path, 'int8')
    assert check['ok'] and check['logits'] > 1e-4, check
    mixer = net.backbone.layers[0].mixer
    scalars = mixer.in_proj.weight[-sum(mixer.split[4:]):]
    for name in to_onnx.FILES:
        kept = [torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
                for tensor in onnx.load(tmp_path / name).graph.initializer]
        assert sum(u.shape == scalars.T.shape and torch.equal(u, scalars.T) for u in kept) == 1
        assert not any(u.dtype == torch.float and u.shape == mixer.out_proj.weight.T.shape for u in kept)


def test_what_llama_cpp_cannot_have_is_said(tmp_path):
    pytest.importorskip('gguf')
    with pytest.raises(ValueError, match='llama.cpp has no Mamba-3; --format=hf .* --format=onnx'):
        to_gguf.write(built('siso'), None, tmp_path)
    for version in (1, 2):
        net = built('siso', version=version, head_norm=False, expand=2)
        with pytest.raises(ValueError, match='no MLP after the mixers.*intermediate_size=40.*onnx'):
            to_gguf.write(net, None, tmp_path)
    assert not os.listdir(tmp_path)
