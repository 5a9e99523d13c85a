"""A model as one GGUF file, for llama.cpp and what is built on it (ollama, LM Studio,
llama-cpp-python).

    python export.py --format=gguf                          # model-f32.gguf, of the model in out/
    python export.py --format=gguf --quantize=int8          # model-q8_0.gguf; int4: model-q4_0.gguf

    net ──► to_llama_cpp: architecture, its settings, its tensors by llama.cpp's names ─┐
    tok ──► vocabulary: tokens in GPT-2's alphabet, their types, the merges ────────────┴─► quantised in blocks of 32 ─► model-….gguf

llama.cpp has no models of its own design, only those of others; ours are written as those that
compute the same:

    GPT      llama, also with experts; qwen3, qwen3moe with QK-norm; mimo2 with a sliding window
    Mamba    mamba, mamba2
    hybrid   falcon-h1: SSM and attention side by side, then an MLP; scales and the embedding's norm are folded into weights

What none of them computes is refused. `verify` opens the file with llama.cpp (pip install
llama-cpp-python) and compares logits, greedy tokens and token ids, or where that is missing, with
gguf's own reader, tensor by tensor. Measured with llama-cpp-python 0.3.36: F32 logits differ by
1e-5 at most, all greedy tokens and all ids are equal; models of 50M on two CPU cores make so many
tokens a second:

                F32   Q8_0   Q4_0               A char vocabulary gives equal ids for all it has; where it refuses a text with
    GPT         107    276    469               other characters, llama.cpp drops them. Token ids are right, but the detokenize of
    Mamba-2     102    214    329               llama-cpp-python 0.3.36 (not llama.cpp) garbles tokens of more than 32 bytes.

Letters of the shapes: D model width, E inner width, H heads, P head size, N state size, G groups, K
taps of the convolution, I inner width of an MLP, V vocabulary.
"""
import os
from importlib.metadata import version
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from mambino.export.classes import check_classes, check_modules, look_up, look_up_alike
from mambino.export.compare import difference, some_ids, some_texts
from mambino.export.gguf_tokenizer import CHATML, vocabulary
from model_gpt import GPT, MoE, SwiGLU
from model_hybrid import Hybrid, LowRank
from model_mamba import Mamba, Mamba1Mixer, Mamba2Mixer

PACKAGES = 'gguf'
TOOL = 'llama.cpp'
FILES = {'': 'model-f32.gguf', 'int8': 'model-q8_0.gguf', 'int4': 'model-q4_0.gguf'}
FILE_TYPES = {'': 0, 'int8': 7, 'int4': 2}                  # general.file_type
MATRIX_TYPES = {'': 'F32', 'int8': 'Q8_0', 'int4': 'Q4_0'}
# weights that stay F32; so does all that is no matrix
FULL = ('norm', 'ssm_conv1d', 'ssm_dt', 'ffn_gate_inp')
ENDLESS = 2 ** 20  # context of a Mamba, whose state never grows, as llama.cpp's converter says
LIMIT = 2e-4  # largest difference of F32 logits, in their standard deviations
# smallest of logits with those of the model before it was quantised
CORRELATION = {'int8': 0.95, 'int4': 0.7}


class LlamaCpp(NamedTuple):
    """A model in llama.cpp's terms."""
    architecture: str
    settings: dict          # without the architecture in front of their names
    tensors: Callable       # () → (name, tensor), one after another
    note: str = ''          # what its user should know


# --- our parts in llama.cpp's terms ---------------------------------------------------------------

def full_matrix(linear):
    return linear.weight


def low_rank_matrix(linear):
    return linear.up.weight @ linear.down.weight


MATRICES = {nn.Linear: full_matrix, LowRank: low_rank_matrix}


def matrix(linear):
    """The weight of a projection, multiplied out where it is the product of two thin ones."""
    return look_up(MATRICES, linear, TOOL)(linear)


def in_pairs(weight, P):
    """Rows of heads of P (H P, D) from our order of rotary pairs, (i, i + P/2), to (2i, 2i + 1),
    llama.cpp's `normal` one."""
    return weight.unflatten(0, (-1, 2, P // 2)).transpose(1, 2).flatten(0, 2)


def attention_tensors(prefix, attention, rope_in_pairs):
    q, k = matrix(attention.q_proj), matrix(attention.k_proj)
    if rope_in_pairs:
        q, k = in_pairs(q, attention.head_dim), in_pairs(k, attention.head_dim)
    yield prefix + 'attn_q.weight', q
    yield prefix + 'attn_k.weight', k
    yield prefix + 'attn_v.weight', matrix(attention.v_proj)
    if attention.qk_norm:
        yield prefix + 'attn_q_norm.weight', attention.q_norm.weight
        yield prefix + 'attn_k_norm.weight', attention.k_norm.weight


def mamba2_tensors(prefix, mixer):
    yield prefix + 'ssm_in.weight', matrix(mixer.in_proj)
    yield prefix + 'ssm_conv1d.weight', mixer.conv1d.weight[:, 0]               # (E + 2GN, K)
    yield prefix + 'ssm_conv1d.bias', mixer.conv1d.bias
    yield prefix + 'ssm_dt.bias', mixer.dt_bias
    yield prefix + 'ssm_a', -torch.exp(mixer.A_log)[:, None]                    # (H, 1)
    yield prefix + 'ssm_d', mixer.D[:, None]
    yield prefix + 'ssm_norm.weight', mixer.norm.weight.view(mixer.groups, -1)  # (G, E/G)


def mamba1_tensors(prefix, mixer):
    yield prefix + 'ssm_in.weight', matrix(mixer.in_proj)
    yield prefix + 'ssm_conv1d.weight', mixer.conv1d.weight[:, 0]               # (E, K)
    yield prefix + 'ssm_conv1d.bias', mixer.conv1d.bias
    yield prefix + 'ssm_x.weight', matrix(mixer.x_proj)
    yield prefix + 'ssm_dt.weight', mixer.dt_proj.weight
    yield prefix + 'ssm_dt.bias', mixer.dt_proj.bias
    yield prefix + 'ssm_a', -torch.exp(mixer.A_log)                             # (E, N)
    yield prefix + 'ssm_d', mixer.D


def swiglu_tensors(prefix, mlp):
    yield prefix + 'ffn_gate.weight', matrix(mlp.gate_proj)
    yield prefix + 'ffn_up.weight', matrix(mlp.up_proj)


def moe_tensors(prefix, moe):
    gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)  # (experts, I, D) each
    yield prefix + 'ffn_gate_inp.weight', moe.gate.weight
    yield prefix + 'ffn_gate_exps.weight', gate
    yield prefix + 'ffn_up_exps.weight', up
    yield prefix + 'ffn_down_exps.weight', moe.experts.down_proj


MLPS = {SwiGLU: swiglu_tensors, MoE: moe_tensors}


def outer_tensors(net, norm, untied=False):
    """The tensors outside the layers."""
    yield 'token_embd.weight', net.embedding().weight
    yield 'output_norm.weight', norm.weight
    if untied or net.lm_head.weight is not net.embedding().weight:
        yield 'output.weight', net.lm_head.weight


# --- our models in llama.cpp's terms --------------------------------------------------------------

def to_llama_cpp(net):
    """→ LlamaCpp. ValueError if llama.cpp has no model that computes the same."""
    check_modules(net, TOOL)
    return look_up(CONVERT, net, TOOL)(net)


def window_of(config):
    """The sliding window; 0 if there is none, or none that a sequence of block_size tokens
    notices."""
    return config.window if config.window < config.block_size else 0


def attention_settings(c):
    return {'block_count': c.n_layer, 'context_length': c.block_size, 'embedding_length': c.n_embd, 'vocab_size': c.vocab_size,
            'feed_forward_length': c.intermediate_size, 'attention.layer_norm_rms_epsilon': float(c.norm_eps),
            'attention.head_count': c.n_head, 'attention.head_count_kv': c.n_kv_head, 'attention.key_length': c.head_dim,
            'attention.value_length': c.head_dim, 'rope.dimension_count': c.head_dim, 'rope.freq_base': float(c.rope_theta)}


def ssm_settings(c, inner, rank):
    return {'ssm.conv_kernel': c.conv_kernel, 'ssm.inner_size': inner, 'ssm.state_size': c.state_size, 'ssm.time_step_rank': rank}


def gpt_architecture(c, window):
    if c.qk_norm:
        return 'qwen3moe' if c.n_expert else 'qwen3'
    return 'mimo2' if window and not c.n_expert else 'llama'


def convert_gpt(net):
    c = net.config
    window = window_of(c)
    architecture = gpt_architecture(c, window)
    settings = attention_settings(c)
    note = ''
    if architecture == 'mimo2':
        settings |= {'attention.sliding_window': window, 'attention.sliding_window_pattern': [1] * c.n_layer,
                     'rope.freq_base_swa': float(c.rope_theta), 'expert_feed_forward_length': 0}
    elif window:
        settings['context_length'] = window
        note = (f'llama.cpp has sliding windows for no such model (arch {architecture}), so its context ends at the window of {window} '
                'tokens; beyond, it would compute something else')
    if c.n_expert:
        settings |= {'expert_count': c.n_expert, 'expert_used_count': c.n_expert_active, 'expert_feed_forward_length': c.intermediate_size}
    mlp_tensors = look_up_alike(MLPS, [layer.mlp for layer in net.model.layers], TOOL)

    def tensors():
        yield from outer_tensors(net, net.model.norm, untied=architecture == 'mimo2')
        for i, layer in enumerate(net.model.layers):
            prefix = f'blk.{i}.'
            yield prefix + 'attn_norm.weight', layer.input_layernorm.weight
            yield from attention_tensors(prefix, layer.self_attn, rope_in_pairs=architecture == 'llama')
            yield prefix + 'attn_output.weight', layer.self_attn.o_proj.weight
            yield prefix + 'ffn_norm.weight', layer.post_attention_layernorm.weight
            yield from mlp_tensors(prefix, layer.mlp)
            if not c.n_expert:
                yield prefix + 'ffn_down.weight', layer.mlp.down_proj.weight
    return LlamaCpp(architecture, settings, tensors, note)


def mamba1_settings(c):
    """→ (architecture, settings of its mixers)."""
    if c.expand != 2:
        raise ValueError(f'llama.cpp computes Mamba-1 only with expand=2, not {c.expand}; --format=hf takes any')
    return 'mamba', ssm_settings(c, c.expand * c.n_embd, c.time_step_rank)


def mamba2_settings(c):
    inner = c.expand * c.n_embd
    return 'mamba2', ssm_settings(c, inner, inner // c.head_dim) | {'ssm.group_count': c.n_groups}


def convert_mamba(net):
    c = net.config
    mixer_settings, mixer_tensors = look_up_alike(MAMBA_MIXERS, [block.mixer for block in net.backbone.layers], TOOL)
    architecture, own_settings = mixer_settings(c)
    settings = {'block_count': c.n_layer, 'context_length': ENDLESS, 'embedding_length': c.n_embd, 'vocab_size': c.vocab_size,
                'feed_forward_length': 0, 'attention.head_count': 0, 'attention.layer_norm_rms_epsilon': float(c.norm_eps)}

    def tensors():
        yield from outer_tensors(net, net.backbone.norm_f)
        for i, block in enumerate(net.backbone.layers):
            prefix = f'blk.{i}.'
            yield prefix + 'attn_norm.weight', block.norm.weight
            yield from mixer_tensors(prefix, block.mixer)
            yield prefix + 'ssm_out.weight', matrix(block.mixer.out_proj)
    return LlamaCpp(architecture, settings | own_settings, tensors)


def convert_hybrid(net):
    """FalconH1, if the branches are only added up: then their scale is one of the rows of their
    last matrices."""
    c = net.config
    lacking = {f'layout={c.layout}': c.layout != 'sequential', 'gate=True': c.gate, 'branch_norm=True': c.branch_norm,
               'qk_norm=True': c.qk_norm, f'window={c.window}': window_of(c)}
    if any(lacking.values()):
        names = ', '.join(name for name, is_there in lacking.items() if is_there)
        raise ValueError(f'llama.cpp has no hybrid with {names}; --format=hf writes this one with its own modelling file')
    check_classes([layer.mamba for layer in net.model.layers], {Mamba2Mixer}, TOOL)
    check_classes([layer.mlp for layer in net.model.layers], {SwiGLU}, TOOL)
    inner = c.expand * c.n_embd
    settings = {**attention_settings(c), **ssm_settings(c, inner, inner // c.ssm_head_dim), 'ssm.group_count': c.n_groups}

    def tensors():
        for name, tensor in outer_tensors(net, net.model.norm, untied=True):
            yield name, net.model.embed_norm(tensor) if name == 'token_embd.weight' else tensor
        for i, layer in enumerate(net.model.layers):
            prefix = f'blk.{i}.'
            half_scale = layer.residual_scale[:, None] / 2
            mlp_scale = layer.mlp_residual_scale[:, None]
            yield prefix + 'attn_norm.weight', layer.input_layernorm.weight
            yield from attention_tensors(prefix, layer.self_attn, rope_in_pairs=False)
            yield prefix + 'attn_output.weight', half_scale * matrix(layer.self_attn.o_proj)
            yield from mamba2_tensors(prefix, layer.mamba)
            yield prefix + 'ssm_out.weight', half_scale * matrix(layer.mamba.out_proj)
            # without .weight: so llama.cpp calls it here
            yield prefix + 'ffn_norm', layer.pre_mlp_layernorm.weight
            yield from swiglu_tensors(prefix, layer.mlp)
            yield prefix + 'ffn_down.weight', mlp_scale * matrix(layer.mlp.down_proj)
    return LlamaCpp('falcon-h1', settings, tensors)


CONVERT = {GPT: convert_gpt, Mamba: convert_mamba, Hybrid: convert_hybrid}
MAMBA_MIXERS = {Mamba1Mixer: (mamba1_settings, mamba1_tensors), Mamba2Mixer: (mamba2_settings, mamba2_tensors)}


# --- the file -------------------------------------------------------------------------------------

def stored_type(name, shape, quantize):
    """How a tensor is stored, by gguf's name of the format. Blocks are of 32 in a row."""
    if not quantize or len(shape) < 2 or not name.endswith('.weight') or any(part in name for part in FULL):
        return 'F32'
    if shape[-1] % 32:
        return 'F16'
    if name in ('token_embd.weight', 'output.weight'):
        return 'Q8_0'
    return MATRIX_TYPES[quantize]


def array(tensor):
    return tensor.detach().float().contiguous().numpy()


def write(net, tok, folder, quantize='', **_):
    """Writes model-….gguf into the folder. ValueError: what llama.cpp cannot compute or read
    exactly."""
    import gguf
    model = to_llama_cpp(net)
    n = net.num_params()
    size = f'{n / 1e6:.0f}M' if n >= 1e6 else f'{n / 1e3:.0f}K'
    settings = {'general.name': f'mambino-{type(net).__name__.lower()}-{size}',
                'general.description': model.note or 'written by Mambino',
                'general.file_type': FILE_TYPES[quantize],
                'general.quantization_version': gguf.GGML_QUANT_VERSION}
    settings |= {f'{model.architecture}.{key}': value for key, value in model.settings.items()}
    settings |= {f'tokenizer.ggml.{key}': value for key, value in vocabulary(tok, net.config.vocab_size).items()}
    if 'tokenizer.ggml.eot_token_id' in settings:
        settings['tokenizer.chat_template'] = CHATML
    writer = gguf.GGUFWriter(os.path.join(folder, FILES[quantize]), model.architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in settings.items():
        add[type(value)](key, value)
    for name, tensor in model.tensors():
        kind = gguf.GGMLQuantizationType[stored_type(name, tensor.shape, quantize)]
        writer.add_tensor(name, gguf.quants.quantize(array(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def opening(name, quantize='', **_):
    """The lines that open the file, for the card."""
    return f'from llama_cpp import Llama\nmodel = Llama({FILES[quantize]!r})'


# --- the proof ------------------------------------------------------------------------------------

def within_rounding(error, ours, kind):
    """Whether the errors of a tensor that is stored as this kind are those of its rounding. Arrays
    of one shape."""
    # a step is 1/127 or 1/8 of the largest of 32; rounding takes half, clipping one
    if kind in ('Q8_0', 'Q4_0'):
        step = 0.6 / 127 if kind == 'Q8_0' else 1.01 / 8
        largest = np.abs(ours).reshape(-1, 32).max(1)
        return bool((error.reshape(-1, 32).max(1) <= largest * step + 4e-6).all())
    if kind == 'F16':
        return bool((error <= np.abs(ours) * 2 ** -11 + 2 ** -25).all())
    return bool((error == 0).all())


def same_tensors(path, tensors):
    """'39 of 39': tensors in the file that are ours, to what their format can hold."""
    import gguf
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    same = total = 0
    for name, tensor in tensors():
        total += 1
        ours = array(tensor)
        if name not in stored or stored[name].shape.tolist() != list(ours.shape[::-1]):
            continue
        theirs = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(ours.shape)
        same += within_rounding(np.abs(theirs - ours), ours, stored[name].tensor_type.name)
    return f'{same} of {max(total, len(stored))}'


def all_of(text):
    """Whether '39 of 40' means all."""
    return len(set(text.split(' of '))) == 1


@torch.no_grad()
def compare_llama_cpp(llm, net, tok, quantize, T, n):
    """Ours and llama.cpp's logits of T tokens, n greedy tokens after them, and the ids of 200
    texts. → a part of a check."""
    ids = some_ids(net, 1, T)
    ours, state = net.step(ids)
    llm.eval(ids[0].tolist())
    theirs = torch.from_numpy(llm.scores[:T])
    limit = None if quantize else LIMIT * float(ours.std())
    correlation = torch.corrcoef(torch.stack((theirs.flatten(), ours.flatten())))[0, 1]
    check = dict(logits=difference(theirs, ours[0]), limit=limit, correlation=float(correlation))
    agreed = 0
    for i in range(n):
        token = int(ours[0, -1].argmax())
        theirs = llm.scores[T + i - 1]
        agreed += bool(theirs[token] >= theirs.max() - (limit or 0))            # of equal ones any
        ours, state = net.step(torch.tensor([[token]]), state)
        llm.eval([token])
    check['greedy'] = f'{agreed} of {n}'
    if tok:
        texts = some_texts(tok, 200)
        same = sum(llm.tokenize(text.encode(), special=False) == tok.encode(text).tolist() for text in texts)
        check['ids'] = f'{same} of {len(texts)}'
    return check


def verify(net, tok, folder, quantize='', **_):
    """Opens the file with llama.cpp if it is installed, in any case with gguf's reader. → a check,
    see compare.py, with its `tensors`."""
    path = os.path.join(folder, FILES[quantize])
    model = to_llama_cpp(net)
    check = dict(tool='gguf ' + version('gguf'), logits=None, limit=None, tensors=same_tensors(path, model.tensors))
    try:
        import llama_cpp
    except ImportError:
        missing = 'llama.cpp itself was not there (pip install llama-cpp-python), only the file was compared'
        return dict(check, ok=all_of(check['tensors']), note='; '.join(filter(None, (model.note, missing))))

    window = model.settings.get('attention.sliding_window', 0)
    context = model.settings['context_length']
    T = window + 32 if window else min(64, (context + 1) // 2)  # of a window, to its end and beyond
    n = 32 if window else min(32, context - T)
    threads = torch.get_num_threads()
    cache_type = llama_cpp.GGML_TYPE_F32                                        # by default F16
    llm = llama_cpp.Llama(path, n_ctx=T + n, n_batch=T + n, n_threads=threads, n_threads_batch=threads, logits_all=True, swa_full=False,
                          type_k=cache_type, type_v=cache_type, verbose=False)
    check |= dict(tool='llama-cpp-python ' + llama_cpp.__version__, **compare_llama_cpp(llm, net, tok, quantize, T, n))
    llm.close()
    exact = ('tensors', 'ids') if quantize else ('tensors', 'ids', 'greedy')
    ok = all(all_of(check[name]) for name in exact if name in check)
    note = model.note
    correlation = check.pop('correlation')
    if quantize:
        ok = ok and correlation >= CORRELATION[quantize]
        note = '; '.join(filter(None, (note, f'its logits correlate with the unquantised ones by {correlation:.5f}')))
    else:
        ok = ok and check['logits'] <= check['limit']
    return dict(check, ok=ok, note=note)
