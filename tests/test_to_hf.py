"""to_hf.py: transformers opens what it wrote, finds our logits, our greedy tokens, our token ids;
hf.py reads it back bit for bit."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.models import (
    CONFIG,
    GPT_SIZE,
    HYBRID_SIZE,
    SSM_SIZE,
    WINDOW,
    V,
    assert_close,
    perturb,
    tokens,
)

import model_hybrid
from mambino import tokenizer
from mambino.export import to_hf
from mambino.export.compare import greedy, some_texts
from mambino.weights import from_hf as hf
from mambino.weights.tensor_files import read_safetensors
from model_gpt import GPT
from model_hybrid import Hybrid
from model_mamba import Mamba, ssd

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

transformers = pytest.importorskip('transformers')
modeling_mambino = pytest.importorskip('mambino.export.modeling_mambino')
PLAIN = dict(HYBRID_SIZE, gate=False, branch_norm=False, window=0)
EXPERTS = dict(GPT_SIZE, n_expert=4, intermediate_size=24)
UNTIED = dict(tie_embeddings=False)
CASES = {  # the class that it must become, our model, its config
    'llama': ('Llama', GPT, dict(GPT_SIZE, n_kv_head=2)),
    'llama-untied': ('Llama', GPT, dict(GPT_SIZE, head_dim=12, **UNTIED)),
    'mistral': ('Mistral', GPT, dict(GPT_SIZE, n_kv_head=2, window=WINDOW)),
    'qwen3': ('Qwen3', GPT, dict(GPT_SIZE, n_kv_head=1, qk_norm=True, **UNTIED)),
    'qwen3-window': ('Qwen3', GPT, dict(GPT_SIZE, head_dim=16, qk_norm=True, window=WINDOW)),
    'mixtral': ('Mixtral', GPT, dict(EXPERTS, n_kv_head=2)),
    'mixtral-window': ('Mixtral', GPT, dict(EXPERTS, n_expert_active=1, window=WINDOW, **UNTIED)),
    'qwen3moe': ('Qwen3Moe', GPT, dict(EXPERTS, n_kv_head=2, head_dim=12, qk_norm=True)),
    'qwen3moe-window': ('Qwen3Moe', GPT, dict(EXPERTS, n_expert_active=3, qk_norm=True, window=WINDOW,
                                              **UNTIED)),
    'mamba1': ('Mamba', Mamba, dict(SSM_SIZE, version=1)),
    'mamba1-untied': ('Mamba', Mamba, dict(SSM_SIZE, version=1, expand=3, conv_kernel=3, time_step_rank=5,
                                           **UNTIED)),
    'falcon-mamba': ('FalconMamba', Mamba, dict(SSM_SIZE, version=1, part_norm_eps=1e-4)),
    'mamba2': ('Mamba2', Mamba, dict(SSM_SIZE, head_dim=16)),
    'mamba2-untied': ('Mamba2', Mamba, dict(SSM_SIZE, head_dim=8, n_groups=2, expand=3, conv_kernel=3,
                                            **UNTIED)),
    'mamba3': ('MambinoMamba', Mamba, dict(SSM_SIZE, version=3, head_dim=16, mimo_rank=2, intermediate_size=40)),
    'falcon': ('FalconH1', Hybrid, dict(PLAIN, n_kv_head=2)),
    'falcon-untied': ('FalconH1', Hybrid, dict(PLAIN, n_groups=2, expand=3, head_dim=12, conv_kernel=3,
                                               **UNTIED)),
    'falcon-no-norms': ('FalconH1', Hybrid, dict(PLAIN, embed_norm=False, gated_norm=False, ssm_inner_size=48)),
    'granite': ('GraniteMoeHybrid', Hybrid, dict(PLAIN, layers='mam', rope_theta=0.0, gate=True, n_kv_head=2)),
    'granite-rope': ('GraniteMoeHybrid', Hybrid, dict(PLAIN, layers='am', embed_norm=False, n_groups=2, **UNTIED)),
    'hybrid': ('Mambino', Hybrid, HYBRID_SIZE),
    'hybrid-parallel': ('Mambino', Hybrid, dict(HYBRID_SIZE, layout='parallel', n_kv_head=2, qk_norm=True,
                                                n_groups=2, conv_kernel=3)),
    'hybrid-pattern': ('Mambino', Hybrid, dict(HYBRID_SIZE, layers='mab', embed_norm=False, gated_norm=False,
                                               ssm_inner_size=48, rope_dim=4, n_layer=3)),
    'hybrid-no-attention': ('Mambino', Hybrid, dict(PLAIN, layers='m')),
    'hybrid-plain-window': ('Mambino', Hybrid, dict(PLAIN, window=2, conv_kernel=1)),
    'hybrid-mamba3': ('Mambino', Hybrid, dict(HYBRID_SIZE, version=3, mimo_rank=2, window=0, low_rank=8)),
    'hybrid-low-rank': ('Mambino', Hybrid, dict(HYBRID_SIZE, low_rank=8, window=0, expand=3, **UNTIED)),
}
FOLDED = 'FalconH1', 'GraniteMoeHybrid'     # of which scales go into matrices
FILE = 'model.safetensors'


@pytest.fixture(autouse=True, scope='module')
def quiet(own_code):
    """No progress bars, and no modelling files in the cache of whoever runs this."""
    transformers.utils.logging.set_verbosity_error()


def build(name, vocab_size=V, **changes):
    _, cls, settings = CASES[name]
    # sizes that are no default
    settings = {'vocab_size': vocab_size, 'norm_eps': 1e-3, 'block_size': 50, **settings, **changes}
    if cls is not Mamba:
        settings = {'rope_theta': 500.0, **settings}
    return perturb(cls(CONFIG[cls](**settings))).eval()


def written(name, folder, tok=None, **changes):
    net = build(name, **changes)
    to_hf.write(net, tok, folder)
    return net


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def bpe(size=300):
    text = 'the quick brown fox jumps over the lazy dog. ' * 20
    return tokenizer.build_tokenizer('bpe', [text], vocab_size=size)


# --- every model ----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', CASES)
def test_transformers_computes_the_same(name, tmp_path):
    net = written(name, tmp_path)
    found = to_hf.verify(net, None, tmp_path)
    assert found['ok'] and found['logits'] <= 1e-5 and found['greedy'] == '64 of 64', found
    assert 'ids' not in found
    assert found['note'] == f'opened as {CASES[name][0]}ForCausalLM'
    assert os.path.exists(tmp_path / 'modeling_mambino.py') == (CASES[name][0] == 'Mambino')
    assert not (tmp_path / 'tokenizer.json').exists()


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case[0] not in FOLDED])
def test_read_back_bit_for_bit(name, tmp_path):
    net = written(name, tmp_path)
    kind, config, weights, _ = hf.load_hf(tmp_path)
    wanted = net.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    assert kind == {GPT: 'gpt', Mamba: 'mamba', Hybrid: 'hybrid'}[CASES[name][1]]
    # of speed and training; Mamba's classes have no such key
    lost = {'chunk_size', 'block_size'} if kind == 'mamba' else set()
    ours = {key: value for key, value in vars(net.config).items() if key not in lost}
    assert {key: value for key, value in config.items() if key not in lost} == ours


@pytest.mark.parametrize('name', ['llama', 'mixtral', 'hybrid', 'falcon', 'mamba2'])
def test_the_file_is_safetensors(name, tmp_path):
    safetensors = pytest.importorskip('safetensors')
    net = written(name, tmp_path)
    with safetensors.safe_open(tmp_path / FILE, 'pt') as f:
        assert f.metadata() == {'format': 'pt'}
        theirs = {key: f.get_tensor(key) for key in f.keys()}
    ours = dict(read_safetensors(tmp_path / FILE))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert 'lm_head.weight' not in ours or name == 'falcon'  # a tied matrix lies there once
    numbers = net.num_params() + (net.embedding().weight.numel() if name == 'falcon' else 0)
    assert 0 < os.path.getsize(tmp_path / FILE) - 4 * numbers < 20_000
    assert int.from_bytes((tmp_path / FILE).read_bytes()[:8], 'little') % 8 == 0


def test_config_says_all_that_older_readers_look_for(tmp_path):
    written('qwen3-window', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['rope_theta'] == config['rope_parameters']['rope_theta'] == 500
    assert config['torch_dtype'] == config['dtype'] == 'float32'
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    same = set(config) - {'torch_dtype', 'dtype', 'rope_theta', 'architectures', 'model_type',
                          'mlp_bias'}
    assert {key: getattr(theirs, key) for key in same} == {key: config[key] for key in same}


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case[0] in FOLDED])
def test_hybrids_of_another_form_come_back(name, tmp_path):
    net = written(name, tmp_path)
    kind, config, weights, _ = hf.load_hf(tmp_path)
    again = Hybrid(CONFIG[Hybrid](**config)).eval()
    again.load_state_dict(weights)
    idx = tokens(2, 70)
    assert kind == 'hybrid' and not config['embed_norm']
    assert_close(again(idx)[0], net(idx)[0])
    (tmp_path / 'again').mkdir()
    to_hf.write(again, None, tmp_path / 'again')    # and go out as they came in
    out = [dict(read_safetensors(folder / FILE)) for folder in (tmp_path, tmp_path / 'again')]
    assert out[0].keys() == out[1].keys() and all(torch.equal(out[0][key], out[1][key]) for key in out[0])


def test_what_cannot_be_written(tmp_path):
    net = build('llama')
    for quantize in ('int8', 'int4'):
        with pytest.raises(ValueError, match=f'quantize={quantize}.*fp32.*--format=gguf'):
            to_hf.write(net, None, tmp_path, quantize)
    with pytest.raises(ValueError, match='257 ids, the model only 97'):
        to_hf.write(net, tokenizer.build_tokenizer('byte'), tmp_path)
    net.initial_state = lambda B: {}
    with pytest.raises(ValueError, match='learned prefix'):
        to_hf.write(net, None, tmp_path)
    assert not os.listdir(tmp_path)


# --- the proof can fail ---------------------------------------------------------------------------

def change(folder, name, by=0.05):
    weights = dict(read_safetensors(folder / FILE))
    changed = weights.pop(name)
    if by:
        weights[name] = changed + by
    to_hf.save_safetensors(folder / FILE, weights, {'format': 'pt'})


def test_verify_sees_what_is_wrong(tmp_path):
    tok, net = bpe(), build('llama', 300)
    to_hf.write(net, tok, tmp_path)
    assert to_hf.verify(net, tok, tmp_path)['ok']
    change(tmp_path, 'model.norm.weight')
    found = to_hf.verify(net, tok, tmp_path)
    assert not found['ok'] and found['logits'] > found['limit'] and found['ids'] == '1000 of 1000'
    change(tmp_path, 'model.norm.weight', by=None)
    note = to_hf.verify(net, tok, tmp_path)['note']
    assert 'tensors that do not fit LlamaForCausalLM: model.norm.weight' in note
    to_hf.write(net, tok, tmp_path)
    settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    settings['split_special_tokens'] = False
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    found = to_hf.verify(net, tok, tmp_path)
    assert not found['ok'] and found['logits'] <= found['limit'] and found['ids'] != '1000 of 1000'
    other = opened(tmp_path)
    other.lm_head.weight.data = other.lm_head.weight.roll(1, 0)
    assert to_hf.same_tokens(net, other, tokens(8), 64, V, 1e-4) < 64


# --- tokenizers -----------------------------------------------------------------------------------

def foreign():
    """A tokenizer.json of another make: Llama's, which adds a token at the beginning, and cuts and
    fills up texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tok = Tokenizer(models.BPE(unk_token='<unk>'))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False)
    tok.train_from_iterator(['the quick brown fox jumps over the lazy dog'] * 3, trainer)
    tok.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    tok.enable_truncation(5)
    tok.enable_padding(pad_id=2, pad_token='</s>')
    return tokenizer.from_text(tok.to_str())


TOKENIZERS = {'bpe': bpe, 'byte': lambda: tokenizer.build_tokenizer('byte'), 'foreign': foreign,
              'char': lambda: tokenizer.build_tokenizer('char', ['the quick brown fox <|endoftext|>\n日本é😀'])}


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_tokenizers(kind, tmp_path):
    tok = TOKENIZERS[kind]()
    texts = some_texts(tok, 1000)
    assert len(texts) == 1000 and len(set(texts)) > 700
    assert kind == 'char' or sum('<|endoftext|>' in text for text in texts) > 50
    net = written('mamba2', tmp_path, tok, vocab_size=tok.vocab_size)
    assert to_hf.same_ids(tok, tmp_path, False) == (1000, 1000)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # the end of a document cannot be forged
    for text in ('the fox', '<|endoftext|>', 'fox<|endoftext|>the'):
        ids = theirs(text)['input_ids']
        assert ids == tok.encode(text).tolist() and tok.eot not in ids
    # a pad is not what ends a text, and here is no room for another
    assert theirs.eos_token_id == tok.eot and theirs.pad_token_id is None and theirs.padding_side == 'left'
    assert theirs.decode([*tok.encode('the fox'), tok.eot], skip_special_tokens=True) == 'the fox'
    assert opened(tmp_path).generation_config.eos_token_id == tok.eot
    assert hf.load_hf(tmp_path)[3].vocab_size == tok.vocab_size
    if kind != 'foreign':
        assert hf.load_hf(tmp_path)[3].sha256() == tok.sha256()
    settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    # else that of transformers 4 returns token_type_ids, and generate() refuses them
    assert settings['model_input_names'] == ['input_ids', 'attention_mask'] == list(theirs('the fox'))
    assert 'model_max_length' not in settings       # of a Mamba; of attention that sees all of a window it is that
    net = written('llama', tmp_path, tok, vocab_size=tok.vocab_size)
    assert ('Missing [UNK]' in to_hf.verify(net, tok, tmp_path)['note']) == (kind == 'char')
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).model_max_length == net.config.block_size


def test_ids_that_stand_for_nothing_are_never_drawn(tmp_path):
    tok = tokenizer.build_tokenizer('byte')
    net = build('llama-untied', 300)
    # else they would be the likeliest
    net.lm_head.weight.data[257:] = 5 * net.lm_head.weight.data[:43]
    to_hf.write(net, tok, tmp_path)
    found = to_hf.verify(net, tok, tmp_path)
    assert found['ok'] and found['greedy'] == '64 of 64', found
    model, prompt = opened(tmp_path), torch.randint(256, (1, 8))
    model.generation_config.eos_token_id = None
    assert model.generate(prompt, max_new_tokens=30, do_sample=False).max() < 257
    model.generation_config.suppress_tokens = None
    assert model.generate(prompt, max_new_tokens=30, do_sample=False).max() >= 257


# --- the modelling file ---------------------------------------------------------------------------

OWN = [name for name, case in CASES.items() if case[0] == 'Mambino']


@torch.no_grad()
@pytest.mark.parametrize('name', OWN)
def test_modelling_file(name, tmp_path):
    """A cache of one step a token, padding on the left, beams, a state to go on from."""
    net = written(name, tmp_path)
    model, idx = opened(tmp_path), tokens(2, 75)
    mask = torch.ones_like(idx)
    mask[0, :5], mask[1, :30] = 0, 0
    logits = model(idx, attention_mask=mask).logits
    for row, n in ((0, 5), (1, 30)):
        assert_close(logits[row, n:], net(idx[row:row + 1, n:])[0][0])
    lengths = []

    def write_down(module, args):
        lengths.append(args[0].shape[1])
    model.lm_head.register_forward_pre_hook(write_down)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(write_down)
    got = model.generate(idx, attention_mask=mask, max_new_tokens=30, do_sample=False,
                         return_dict_in_generate=True, pad_token_id=0)
    assert lengths == [75, 1] + [1, 1] * 29
    for row, n in ((0, 5), (1, 30)):
        assert got.sequences[row, 75:].tolist() == greedy(net, idx[row, n:].tolist(), 30)
    state, window = got.past_key_values.layers[1], net.config.window
    assert got.past_key_values.seen == 104
    assert 'k' not in state or state['k'].shape[2] == (window - 1 if window else 104)
    longer = torch.cat((got.sequences, tokens(2, 3)), 1)
    longer_mask = torch.cat((mask, mask.new_ones(2, 33)), 1)
    more = model(longer[:, 104:], past_key_values=got.past_key_values, attention_mask=longer_mask).logits
    assert_close(more[1], net(longer[1:, 30:])[0][0, -4:])
    beams = [model.generate(idx[:, :9], attention_mask=torch.ones_like(idx[:, :9]), num_beams=3,
                            max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0)
             for cache in (True, False)]
    assert torch.equal(*beams)
    # padding too: a softmax over nothing is NaN
    assert model.model.masks(mask, 75, type(got.past_key_values)(2), 'cpu')[0].any(-1).all()
    with pytest.raises(ValueError, match='covers 75 tokens; it must cover all 109'):
        model(idx[:, :1], past_key_values=got.past_key_values, attention_mask=mask)
    with pytest.raises(ValueError, match='position_ids'):
        model(idx, position_ids=idx)
    rounded = model.to(torch.bfloat16)(idx).logits.float()
    assert (rounded - net(idx)[0]).norm() <= 0.05 * rounded.norm()


def test_its_ssd_is_the_definition():
    """Within chunks and from chunk to chunk; its B and C are of heads, not of groups."""
    x, dt, A = torch.randn(2, 50, 4, 8), torch.rand(2, 50, 4), -4 * torch.rand(4)
    B, C = torch.randn(2, 2, 50, 4, 16)
    state = torch.randn(2, 4, 8, 16)
    defined = ssd.definition(x, dt, A, B, C, 16, state)
    for result, wanted in zip(modeling_mambino.ssd(x, dt, A, B, C, state, 16), defined):
        assert_close(result, wanted)


@pytest.mark.parametrize('name', OWN)
def test_trained_there_and_read_back(name, tmp_path):
    net = written(name, tmp_path)
    model, idx = opened(tmp_path).train(), tokens(2, 40)
    got = model(idx, labels=idx)
    want = F.cross_entropy(net(idx)[0][:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert got.past_key_values is None and abs(got.loss - want) < 1e-5
    got.loss.backward()
    want.backward()
    for key, p in net.named_parameters():
        assert_close(model.get_parameter(key).grad, p.grad, 1e-4 * p.grad.abs().max().item())
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval().save_pretrained(tmp_path / 'trained')
    kind, config, weights, _ = hf.load_hf(tmp_path / 'trained')
    assert (kind, config) == ('hybrid', vars(net.config))
    net.load_state_dict(weights)
    assert_close(net(idx)[0], model(idx).logits)


@pytest.mark.parametrize('name', OWN)
def test_padding_after_the_text(name, tmp_path):
    """As in training and evaluation: what is before it is as if it were not there, gradients too."""
    net = written(name, tmp_path)
    model, idx = opened(tmp_path), tokens(2, 40)
    mask, labels = torch.ones_like(idx), idx.clone()
    mask[0, 23:], labels[0, 23:] = 0, -100
    for training in (True, False):
        got = model.train(training)(idx, attention_mask=mask, labels=labels)
        assert (got.past_key_values is None) == training
    texts = idx[:1, :23], idx[1:]
    logits = [net(text)[0][0] for text in texts]
    for row, theirs in zip(got.logits, logits):
        assert_close(row[:len(theirs)], theirs)
    losses = [F.cross_entropy(ours[:-1], text[0, 1:], reduction='sum') for ours, text in zip(logits, texts)]
    want = sum(losses) / (22 + 39)
    assert abs(got.loss - want) < 1e-5
    got.loss.backward()
    want.backward()
    for key, p in net.named_parameters():
        assert_close(model.get_parameter(key).grad, p.grad, 1e-4 * p.grad.abs().max().item())
    # nothing goes on from there, and nothing is in the middle
    with pytest.raises(ValueError, match='pad on the left'):
        model(idx[:, :1], past_key_values=got.past_key_values)
    with pytest.raises(ValueError, match='pad on the left'):
        model.generate(idx, attention_mask=mask, max_new_tokens=1, pad_token_id=0)
    mask[0, 30] = 1
    with pytest.raises(ValueError, match='padding within a text'):
        model(idx, attention_mask=mask)


@pytest.mark.filterwarnings('ignore:.*gradient_checkpointing_enable:FutureWarning')
@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('name', ['hybrid', 'hybrid-parallel'])
def test_gradient_checkpointing(name, reentrant, tmp_path):
    """The gradients are those without it, and each layer is computed twice."""
    written(name, tmp_path)
    model, idx = opened(tmp_path).train(), tokens(2, 40)
    calls, gradients = [], []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model.zero_grad()
        out = model(idx, labels=idx, use_cache=True)
        out.loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    assert len(calls) == 3 and out.past_key_values is None
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_auto_model_is_the_model_without_its_head(tmp_path):
    net, idx = written('hybrid', tmp_path), tokens(2, 30)
    model = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    hidden = model(idx).last_hidden_state
    assert_close(hidden, net.hidden_states(idx)[0])
    assert_close(hidden @ net.lm_head.weight.T, net(idx)[0])


def test_a_folder_is_all_that_is_needed(tmp_path):
    """Another process that knows nothing of this project, in another folder."""
    folder, tok = tmp_path / 'model', bpe()
    folder.mkdir()
    net = written('hybrid', folder, tok, vocab_size=300)
    code = '''if True:
        import sys
        import transformers
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained('model', trust_remote_code=True)
        tok = transformers.AutoTokenizer.from_pretrained('model', trust_remote_code=True)
        inputs = tok('the fox', return_tensors='pt')
        ids = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=None)
        print(ids[0].tolist())
        assert 'model_hybrid' not in sys.modules and not any(path == ROOT for path in sys.path)
    '''.replace('ROOT', repr(os.path.dirname(os.path.abspath(model_hybrid.__file__))))
    env = os.environ | {'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-I', '-c', code], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = tok.encode('the fox').tolist()
    assert json.loads(done.stdout) == ids + greedy(net, ids, 9)
    source = (folder / 'modeling_mambino.py').read_text()
    assert len(source.splitlines()) <= 300
