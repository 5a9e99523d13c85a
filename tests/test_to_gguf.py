"""to_gguf.py: what llama.cpp, gguf's reader and transformers find in our files is our model; what
cannot be exact is refused."""
import importlib.util
import json
import sys

import jinja2
import pytest
import torch
from helpers.models import perturb

from mambino import chat, tokenizer
from mambino.export import compare, gguf_model, gguf_tokenizer, llama_server, to_gguf, to_hf
from mambino.tokenizer_json import CHAR_TO_BYTE
from model_gpt import GPT, GPTConfig
from model_hybrid import Hybrid, HybridConfig
from model_mamba import Mamba, MambaConfig

pytestmark = pytest.mark.usefixtures('quiet_and_seeded')

gguf = pytest.importorskip('gguf')
SIZES = dict(vocab_size=288, n_layer=2, n_embd=64, block_size=128)
PLAIN = dict(gate=False, branch_norm=False, window=0, n_head=4)
NETS = {
    'gpt': lambda: GPT(GPTConfig(**SIZES, n_head=4, n_kv_head=2, head_dim=32, intermediate_size=96)),
    'gpt-untied': lambda: GPT(GPTConfig(**SIZES, n_head=4, tie_embeddings=False, rope_theta=500.0)),
    'qk-norm': lambda: GPT(GPTConfig(**SIZES, n_head=2, n_kv_head=1, head_dim=128, qk_norm=True,
                                     norm_eps=1e-3)),
    'experts': lambda: GPT(GPTConfig(**SIZES, n_head=4, n_expert=4, intermediate_size=96)),
    'experts-qk-norm': lambda: GPT(GPTConfig(**SIZES, n_head=2, head_dim=128, n_expert=4, n_expert_active=3,
                                             qk_norm=True, intermediate_size=768)),
    'window': lambda: GPT(GPTConfig(**SIZES, n_head=4, n_kv_head=2, window=24, rope_theta=500.0)),
    'window-qk-norm': lambda: GPT(GPTConfig(**SIZES, n_head=4, window=24, qk_norm=True)),
    'mamba1': lambda: Mamba(MambaConfig(**SIZES, version=1)),
    'mamba2': lambda: Mamba(MambaConfig(**SIZES)),
    'mamba2-groups': lambda: Mamba(MambaConfig(**SIZES, expand=3, head_dim=32, n_groups=2, state_size=20,
                                               tie_embeddings=False)),
    'hybrid': lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, n_kv_head=2)),
    'hybrid-no-norms': lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, embed_norm=False, gated_norm=False,
                                                   ssm_inner_size=192, ssm_head_dim=32)),
    'hybrid-layers': lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, layers='ma', n_kv_head=2, rope_theta=0.0)),
    'hybrid-layers-rope': lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, layers='am', rope_theta=500.0,
                                                      tie_embeddings=False)),
    'falcon-mamba': lambda: Mamba(MambaConfig(**SIZES, version=1, norm_eps=1e-3, part_norm_eps=1e-3)),
    'hybrid-thin': lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, low_rank=16, ssm_head_dim=32, n_groups=2,
                                               tie_embeddings=False)),
}
ARCHITECTURES = {'gpt': 'llama', 'qk-norm': 'qwen3', 'experts': 'llama', 'experts-qk-norm': 'qwen3moe',
                 'window': 'mimo2', 'window-qk-norm': 'qwen3', 'mamba1': 'mamba', 'mamba2': 'mamba2',
                 'hybrid': 'falcon-h1', 'hybrid-no-norms': 'falcon-h1', 'hybrid-layers': 'granitehybrid',
                 'falcon-mamba': 'mamba'}
TEXT = ("The quick brown fox isn't naïve; it jumps over 1234 lazy dogs, we'll see: Ελλάδα, 日本語 🙂 ½ "
        "e\u0301 ...  \n\n\tfoo(bar) == {baz}\n")


@pytest.fixture(scope='module', params=NETS)
def named(request):
    """(name, a model no weight of which is 0 or 1)."""
    torch.manual_seed(0)
    with torch.no_grad():
        return request.param, perturb(NETS[request.param]().eval())


@pytest.fixture(scope='module')
def bpe():
    return tokenizer.build_tokenizer('bpe', [TEXT * 5], 280)


@pytest.fixture
def without_llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, 'xllamacpp', None)


def build(name):
    return perturb(NETS[name]().eval())


def setting(reader, key):
    field = reader.fields.get(key)
    return field and field.contents()


@pytest.mark.parametrize('quantize', to_gguf.FILES)
def test_every_tensor_is_in_the_file(named, quantize, bpe, tmp_path, without_llama_cpp):
    name, net = named
    to_gguf.write(net, bpe, tmp_path, quantize)
    assert [path.name for path in tmp_path.iterdir()] == [to_gguf.FILES[quantize]]
    found = to_gguf.verify(net, bpe, tmp_path, quantize)
    assert found['ok'] and to_gguf.all_of(found['tensors'])
    assert 'not there' in found['note'] and found['logits'] is None
    reader = gguf.GGUFReader(tmp_path / to_gguf.FILES[quantize])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(kinds) == int(found['tensors'].split()[0])
    if name in ARCHITECTURES:
        assert setting(reader, 'general.architecture') == ARCHITECTURES[name]
    if name == 'window-qk-norm':
        assert 'ends at the window of 24' in found['note']
        assert setting(reader, 'qwen3.context_length') == 24
    matrices = {'': 'F32', 'int8': 'Q8_0', 'int4': 'Q4_0'}[quantize]
    exact = 'norm', 'conv', 'ssm_dt', 'ssm_a', 'ssm_d', 'bias', 'gate_inp'
    for tensor, kind in kinds.items():
        if any(part in tensor for part in exact):
            assert kind == 'F32', tensor
        elif tensor in ('token_embd.weight', 'output.weight') and quantize:
            assert kind == 'Q8_0', tensor
        else:
            assert kind == matrices, tensor
    before = net.embedding().weight[5, 7].item()
    net.embedding().weight.data[5, 7] += 1
    try:
        # a proof that could not fail would be none
        assert not to_gguf.verify(net, bpe, tmp_path, quantize)['ok']
    finally:
        net.embedding().weight.data[5, 7] = before


def test_odd_rows_are_f16(tmp_path):
    net = perturb(GPT(GPTConfig(vocab_size=50, n_layer=1, n_embd=40, n_head=2, block_size=1)).eval())
    to_gguf.write(net, None, tmp_path, 'int4')
    assert to_gguf.verify(net, None, tmp_path, 'int4')['ok']
    reader = gguf.GGUFReader(tmp_path / 'model-q4_0.gguf')
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds['blk.0.attn_q.weight'] == kinds['token_embd.weight'] == 'F16'
    assert kinds['blk.0.ffn_down.weight'] == 'Q4_0'


@pytest.mark.parametrize('name, quantize', [
    ('gpt', ''), ('gpt-untied', ''), ('gpt-untied', 'int8'), ('qk-norm', ''), ('experts-qk-norm', ''),
    ('mamba1', ''), ('mamba1', 'int8')])
def test_transformers_reads_it(name, quantize, bpe, tmp_path):
    transformers = pytest.importorskip('transformers')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    net, idx = build(name), torch.randint(280, (2, 60))
    to_gguf.write(net, bpe, tmp_path, quantize)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=to_gguf.FILES[quantize], dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = net(idx)[0], theirs(idx).logits
    error = ((got - want).abs().max() / want.std()).item()
    assert error < (0.2 if quantize else 1e-4), error
    assert want.std() > 0.3 and (1e-4 < error < 0.2 if quantize else error < 1e-4), error


def test_settings_of_the_tokenizer(bpe, tmp_path):
    net = build('gpt')
    to_gguf.write(net, bpe, tmp_path, '')
    reader = gguf.GGUFReader(tmp_path / 'model-f32.gguf')
    tokens, types = (setting(reader, f'tokenizer.ggml.{key}') for key in ('tokens', 'token_type'))
    assert len(tokens) == len(types) == 288 and len(set(tokens)) == 288
    for i, (token, kind) in enumerate(zip(tokens, types)):
        said = b''
        if kind == gguf_tokenizer.NORMAL:
            said = bytes(CHAR_TO_BYTE[c] for c in token)
        assert said == (bpe.token_bytes(i) if i < bpe.vocab_size else b'')
    assert tokens[bpe.eot] == '<|endoftext|>' and types.count(gguf_tokenizer.CONTROL) == 4
    pad = setting(reader, 'tokenizer.ggml.padding_token_id')
    assert pad == bpe.vocab_size and tokens[pad] == '<|pad|>'       # the first id beyond the tokenizer's
    assert types.count(gguf_tokenizer.UNUSED) == 288 - bpe.vocab_size - 1
    assert setting(reader, 'tokenizer.ggml.eos_token_id') == bpe.eot
    assert setting(reader, 'tokenizer.ggml.add_bos_token') is False
    assert setting(reader, 'tokenizer.ggml.pre') == 'trillion'
    # the marks of a chat are there, but nobody tuned the model on one
    assert not {'tokenizer.chat_template', 'tokenizer.ggml.eot_token_id'} & {*reader.fields}
    merges = json.loads(bpe.text)['model']['merges']
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in merges]
    assert setting(reader, 'tokenizer.ggml.merges') == merges


def test_a_conversation_is_that_of_a_hugging_face_folder(bpe, tmp_path):
    """Both say the same of a model that was tuned on some: template, ids of marks, context."""
    transformers = pytest.importorskip('transformers')
    net = Mamba(MambaConfig(**SIZES, version=2))
    bpe = tokenizer.with_config(tokenizer.from_state(bpe.state()), {'chat_template': chat.CHATML})
    to_gguf.write(net, bpe, tmp_path, '')
    to_hf.write(net, bpe, tmp_path)
    reader = gguf.GGUFReader(tmp_path / 'model-f32.gguf')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [dict(role='user', content='Hi'), dict(role='assistant', content='Ho'), dict(role='user', content='é?')]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == chat.encode_prompt_of(bpe, messages)
    template = setting(reader, 'tokenizer.chat_template')
    tokens = setting(reader, 'tokenizer.ggml.tokens')
    bos, eos = (tokens[setting(reader, f'tokenizer.ggml.{name}_token_id')] for name in ('bos', 'eos'))
    said = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(
        messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos)
    assert theirs(said)['input_ids'] == ids
    config = json.loads((tmp_path / 'config.json').read_text())
    generation = json.loads((tmp_path / 'generation_config.json').read_text())
    keys = dict(bos='bos', eos='eos', padding='pad')
    for key, name in keys.items():
        i = setting(reader, f'tokenizer.ggml.{key}_token_id')
        assert getattr(theirs, f'{name}_token_id') == i
        assert i == config[f'{name}_token_id'] or i in config[f'{name}_token_id']
        assert config[f'{name}_token_id'] == generation[f'{name}_token_id']
    turn = setting(reader, 'tokenizer.ggml.eot_token_id')
    assert tokens[turn] == '<|im_end|>' and config['eos_token_id'] == [bpe.eot, turn]
    assert theirs.pad_token == '<|pad|>' and theirs.pad_token_id not in config['eos_token_id']
    context = setting(reader, f'{setting(reader, "general.architecture")}.context_length')
    # both say, each in its word, that there is no longest text
    assert theirs.model_max_length > 10**20 and context == gguf_model.ANY_LENGTH


@pytest.mark.parametrize('net, says', [
    (lambda: Mamba(MambaConfig(**SIZES, expand=3, version=1)), 'expand=2, not 3'),
    (lambda: Hybrid(HybridConfig(**SIZES, n_head=4)), 'gate=True, branch_norm=True;.*--format=hf'),
    (lambda: Hybrid(HybridConfig(**SIZES, **{**PLAIN, 'window': 32}, layout='parallel')),
     'layout=parallel, window=32'),
    (lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, qk_norm=True)), 'qk_norm=True'),
    (lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, layers='ab')), 'layers=ab'),
    (lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, layers='m')), 'layers=m'),
    (lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, layers='ma', gated_norm=False)), 'gated_norm=False'),
    (lambda: Hybrid(HybridConfig(**SIZES, **PLAIN, rope_theta=0.0)), 'rope_theta=0'),
    (lambda: Mamba(MambaConfig(**SIZES, version=1, part_norm_eps=1e-6)), 'with the eps of all norms'),
    (lambda: Mamba(MambaConfig(**SIZES, gated_norm=False)), 'without the norm after its gate'),
])
def test_models_that_llama_cpp_does_not_compute(net, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        to_gguf.write(net(), None, tmp_path, '')
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_no_bytes_is_refused(tmp_path):
    """Llama 2's kind, whose ids are pieces of text with ▁ for a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    tok = Tokenizer(models.BPE({'▁': 0, 'a': 1, '▁a': 2, '</s>': 3}, [('▁', 'a')]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.add_special_tokens(['</s>'])
    with pytest.raises(ValueError, match='otherwise than GPT-2'):
        to_gguf.write(build('gpt'), tokenizer.from_text(tok.to_str()), tmp_path, '')


def test_foreign_tokenizers_are_refused(bpe, tmp_path):
    spec = json.loads(bpe.text)
    spec['pre_tokenizer']['add_prefix_space'] = True
    with pytest.raises(ValueError, match='otherwise than GPT-2.*--format=hf'):
        to_gguf.write(build('gpt'), tokenizer.from_text(json.dumps(spec)), tmp_path, '')
    assert not list(tmp_path.iterdir())


# --- against llama.cpp, where it is installed

@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_llama_cpp_computes_the_same(named, quantize, bpe, tmp_path):
    pytest.importorskip('xllamacpp')
    net = named[1]
    to_gguf.write(net, bpe, tmp_path, quantize)
    found = to_gguf.verify(net, bpe, tmp_path, quantize)
    assert found['tool'].startswith('llama.cpp (xllamacpp ') and found['ids'] == found['texts'] == '200 of 200', found
    assert found['ok'] and 'greedy' in found, found
    if not quantize:
        assert 0 < found['logits'] <= found['limit'] < 1e-3
        weight = next(p for n, p in net.named_parameters() if 'layers.1.' in n and p.ndim == 1)
        before = weight.data.clone()
        weight.data += 0.1
        wrong = to_gguf.verify(net, bpe, tmp_path, '')
        assert wrong['logits'] > found['limit'] and not wrong['ok']
        weight.data = before


@pytest.mark.parametrize('kind', ['byte', 'char', 'gpt2-like', None])
def test_llama_cpp_gives_the_same_ids(kind, tmp_path):
    pytest.importorskip('xllamacpp')
    texts = [TEXT + ''.join(compare.PIECES)]
    if kind == 'gpt2-like':
        tok = tokenizer.build_tokenizer('bpe', texts * 3, 1200)
    else:
        tok = kind and tokenizer.build_tokenizer(kind, texts)
    sizes = dict(n_layer=1, n_embd=32, n_head=1, block_size=64)
    net = perturb(GPT(GPTConfig(vocab_size=tok.vocab_size if tok else 100, **sizes)).eval())
    to_gguf.write(net, tok, tmp_path, '')
    found = to_gguf.verify(net, tok, tmp_path, '')
    assert found['ok'] and found['greedy'] == '32 of 32', found
    if tok:
        n = sum(map(bool, tok.table))
        assert found['ids'] == found['texts'] == '200 of 200' and found['pieces'] == f'{n} of {n}', found


def test_llama_cpp_keeps_the_spaces(bpe, tmp_path):
    """Where it says a prompt again it drops them before some marks, but for tokenizers it knows better."""
    pytest.importorskip('xllamacpp')
    text = "one , two . It 's  not n't ?"
    to_gguf.write(build('gpt'), bpe, tmp_path, '')
    with llama_server.LlamaServer(tmp_path / 'model-f32.gguf', n_ctx=128) as server:
        answer, = server.complete([bpe.encode(text).tolist()], 1)
    assert answer['prompt'] == text


@pytest.mark.parametrize('name, longest', [('mamba2', 1 << 20), ('window', 1 << 20), ('gpt', 128), ('hybrid', 300)])
def test_a_text_that_llama_cpp_goes_on_with(name, longest, bpe, tmp_path):
    """A state that does not grow takes any number of tokens; else it is as many as attention sees all of."""
    pytest.importorskip('xllamacpp')
    net = build(name) if name != 'hybrid' else perturb(Hybrid(HybridConfig(**SIZES, **{**PLAIN, 'window': 300})).eval())
    assert to_gguf.to_llama_cpp(net).settings['context_length'] == longest
    to_gguf.write(net, bpe, tmp_path, '')
    with llama_server.LlamaServer(tmp_path / 'model-f32.gguf', n_ctx=400, exact=True) as server:
        answer, = server.complete([[1, 2, 3]], 350)
    assert len(answer['tokens']) == min(350, longest - 3)
    ids = [1, 2, 3, *answer['tokens']]
    with torch.no_grad():
        logits = net.step(torch.tensor([ids[:-1]]))[0][0, 2:]           # (tokens, V)
    ends = [token['id'] for token in json.loads(bpe.text)['added_tokens'] if token['content'] != '<|im_start|>']
    logits[:, ends] = -torch.inf                                        # which it was told not to choose
    chosen = logits.gather(1, torch.tensor(ids[3:])[:, None])[:, 0]
    assert (logits.max(1).values - chosen).max() < 1e-3                 # of equal ones any


def test_llama_cpp_refuses_what_it_cannot_open(tmp_path):
    pytest.importorskip('xllamacpp')
    (tmp_path / 'model.gguf').write_bytes(b'GGUF' + bytes(100))
    with pytest.raises(RuntimeError):
        llama_server.LlamaServer(tmp_path / 'model.gguf', n_ctx=128)


@pytest.mark.parametrize('name', ['smollm', 'llama-bpe', 'qwen2'])
def test_llama_cpp_has_a_name_for_how_others_cut_words(name, tmp_path):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    steps = {
        'smollm': [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)],
        'llama-bpe': [pre_tokenizers.Split(Regex(gguf_tokenizer.LLAMA3), 'isolated')],
        'qwen2': [pre_tokenizers.Split(Regex(gguf_tokenizer.QWEN2), 'isolated')]}[name]
    if name != 'smollm':
        steps.append(pre_tokenizers.ByteLevel(False, use_regex=False))
    theirs = Tokenizer(models.BPE(ignore_merges=name == 'llama-bpe'))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    if name == 'qwen2':
        theirs.normalizer = normalizers.NFC()
    texts = [TEXT.swapcase() + TEXT + ' 12345 '.join(compare.PIECES)]
    theirs.train_from_iterator(texts * 3, trainers.BpeTrainer(
        vocab_size=900, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tok = tokenizer.from_text(theirs.to_str())
    net = perturb(GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=1, n_embd=32, n_head=1, block_size=64)).eval())
    to_gguf.write(net, tok, tmp_path, '')
    assert setting(gguf.GGUFReader(tmp_path / 'model-f32.gguf'), 'tokenizer.ggml.pre') == name
    if importlib.util.find_spec('xllamacpp'):
        found = to_gguf.verify(net, tok, tmp_path, '')
        assert found['ok'] and found['ids'] == found['texts'] == '200 of 200', found
        assert ('NFC' in found['note']) == (name == 'qwen2')
    spec = json.loads(tok.text)
    spec['model']['ignore_merges'] = not spec['model']['ignore_merges']
    with pytest.raises(ValueError, match='otherwise than GPT-2'):
        gguf_tokenizer.vocabulary(tokenizer.from_text(json.dumps(spec)), tok.vocab_size)
