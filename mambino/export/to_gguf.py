"""A model as one GGUF file, for llama.cpp and what is built on it (ollama, LM Studio, llama-cpp-python).

    python export.py --format=gguf                          # model-f32.gguf, of the model in out/
    python export.py --format=gguf --quantize=int8          # model-q8_0.gguf; int4: model-q4_0.gguf

    net ──► form: architecture, its settings, its tensors by llama.cpp's names ─┐
    tok ──► vocabulary: tokens in GPT-2's alphabet, their types, the merges ────┴──► quantised in blocks of 32 ──► model-….gguf

llama.cpp has no models of its own design, only those of others; ours are written as those that compute the same:

    GPT      llama, also with experts; qwen3, qwen3moe with QK-norm; mimo2 with a sliding window
    Mamba    mamba, mamba2
    hybrid   falcon-h1: SSM and attention side by side, then an MLP; scales and the embedding's norm are folded into weights

What none of them computes is refused. `verify` opens the file with llama.cpp (pip install llama-cpp-python) and compares logits, greedy
tokens and token ids, or where that is missing, with gguf's own reader, tensor by tensor. Measured with llama-cpp-python 0.3.36: F32 logits
differ by 1e-5 at most, all greedy tokens and all ids are equal; models of 50M on two CPU cores make so many tokens a second:

                F32   Q8_0   Q4_0               A char vocabulary gives equal ids for all it has; where it refuses a text with
    GPT         107    276    469               other characters, llama.cpp drops them. Token ids are right, but the detokenize of
    Mamba-2     102    214    329               llama-cpp-python 0.3.36 (not llama.cpp) garbles tokens of more than 32 bytes.

Letters of the shapes: D model width, E inner width, H heads, P head size, N state size, G groups, V vocabulary.
"""
import json
import os
from importlib.metadata import version

import numpy as np
import torch

from mambino.export.compare import difference, some_ids, some_texts
from mambino.tokenizer import BYTE_TO_CHAR, CHAT

FILES = {'': 'model-f32.gguf', 'int8': 'model-q8_0.gguf', 'int4': 'model-q4_0.gguf'}
NORMAL, CONTROL, UNUSED = 1, 3, 5                           # tokenizer.ggml.token_type
FULL = ('norm', 'ssm_conv1d', 'ssm_dt', 'ffn_gate_inp')     # weights that stay F32; so does all that is no matrix
ENDLESS = 2 ** 20                                           # context of a Mamba, whose state never grows, as llama.cpp's converter says
NEVER = BYTE_TO_CHAR[255] + ' ' + BYTE_TO_CHAR[255]         # a merge that UTF-8 cannot meet: llama.cpp wants a list of them, and gguf
                                                            # writes no empty one
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LIMIT = 2e-4                                                # largest difference of F32 logits, in their standard deviations
CORRELATION = {'int8': 0.95, 'int4': 0.7}       # smallest of logits with those of the model before it was quantised


# --- our models in llama.cpp's terms ----------------------------------------------------------------------------------

def matrix(linear):
    """The weight of a projection, multiplied out where it is the product of two thin ones."""
    return linear.weight if hasattr(linear, 'weight') else linear.up.weight @ linear.down.weight


def in_pairs(weight, P):
    """Rows of heads of P (H P, D) from our order of rotary pairs, (i, i + P/2), to (2i, 2i + 1), llama.cpp's `normal` one."""
    return weight.unflatten(0, (-1, 2, P // 2)).transpose(1, 2).flatten(0, 2)


def attention_tensors(at, layer, pairs):
    q, k = matrix(layer.q_proj), matrix(layer.k_proj)
    if pairs:
        q, k = in_pairs(q, layer.head_dim), in_pairs(k, layer.head_dim)
    yield at + 'attn_q.weight', q
    yield at + 'attn_k.weight', k
    yield at + 'attn_v.weight', matrix(layer.v_proj)
    if layer.qk_norm:
        yield at + 'attn_q_norm.weight', layer.q_norm.weight
        yield at + 'attn_k_norm.weight', layer.k_norm.weight


def mamba2_tensors(at, mixer):
    yield at + 'ssm_in.weight', matrix(mixer.in_proj)
    yield at + 'ssm_conv1d.weight', mixer.conv1d.weight[:, 0]                   # (E + 2GN, K)
    yield at + 'ssm_conv1d.bias', mixer.conv1d.bias
    yield at + 'ssm_dt.bias', mixer.dt_bias
    yield at + 'ssm_a', -torch.exp(mixer.A_log)[:, None]                        # (H, 1)
    yield at + 'ssm_d', mixer.D[:, None]
    yield at + 'ssm_norm.weight', mixer.norm.weight.view(mixer.groups, -1)      # (G, E/G)


def mamba1_tensors(at, mixer):
    yield at + 'ssm_in.weight', matrix(mixer.in_proj)
    yield at + 'ssm_conv1d.weight', mixer.conv1d.weight[:, 0]                   # (E, K)
    yield at + 'ssm_conv1d.bias', mixer.conv1d.bias
    yield at + 'ssm_x.weight', matrix(mixer.x_proj)
    yield at + 'ssm_dt.weight', mixer.dt_proj.weight
    yield at + 'ssm_dt.bias', mixer.dt_proj.bias
    yield at + 'ssm_a', -torch.exp(mixer.A_log)                                 # (E, N)
    yield at + 'ssm_d', mixer.D


def mlp_tensors(at, mlp):
    if hasattr(mlp, 'experts'):
        gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)                     # (E, I, D) each
        yield at + 'ffn_gate_inp.weight', mlp.gate.weight
        yield at + 'ffn_gate_exps.weight', gate
        yield at + 'ffn_up_exps.weight', up
        yield at + 'ffn_down_exps.weight', mlp.experts.down_proj
    else:
        yield at + 'ffn_gate.weight', matrix(mlp.gate_proj)
        yield at + 'ffn_up.weight', matrix(mlp.up_proj)


def ends(net, norm, untied=False):
    """The tensors outside the layers."""
    yield 'token_embd.weight', net.embedding().weight
    yield 'output_norm.weight', norm.weight
    if untied or net.lm_head.weight is not net.embedding().weight:
        yield 'output.weight', net.lm_head.weight


def window_of(config):
    """The sliding window; 0 if there is none, or none that a sequence of block_size tokens notices."""
    return config.window if config.window < config.block_size else 0


def attention_keys(c):
    return {'block_count': c.n_layer, 'context_length': c.block_size, 'embedding_length': c.n_embd, 'vocab_size': c.vocab_size,
            'feed_forward_length': c.intermediate_size, 'attention.layer_norm_rms_epsilon': float(c.norm_eps),
            'attention.head_count': c.n_head, 'attention.head_count_kv': c.n_kv_head, 'attention.key_length': c.head_dim,
            'attention.value_length': c.head_dim, 'rope.dimension_count': c.head_dim, 'rope.freq_base': float(c.rope_theta)}


def gpt_form(net):
    c, keys, note = net.config, attention_keys(net.config), ''
    window, plain = window_of(c), not (c.qk_norm or c.n_expert)
    arch = 'mimo2' if window and plain else 'llama' if not c.qk_norm else 'qwen3moe' if c.n_expert else 'qwen3'
    if arch == 'mimo2':
        keys |= {'attention.sliding_window': window, 'attention.sliding_window_pattern': [1] * c.n_layer,
                 'rope.freq_base_swa': float(c.rope_theta), 'expert_feed_forward_length': 0}
    elif window:
        keys['context_length'] = window
        note = (f'llama.cpp has sliding windows for no such model (arch {arch}), so its context ends at the window of {window} tokens; '
                'beyond, it would compute something else')
    if c.n_expert:
        keys |= {'expert_count': c.n_expert, 'expert_used_count': c.n_expert_active, 'expert_feed_forward_length': c.intermediate_size}

    def tensors():
        yield from ends(net, net.model.norm, untied=arch == 'mimo2')
        for i, layer in enumerate(net.model.layers):
            at = f'blk.{i}.'
            yield at + 'attn_norm.weight', layer.input_layernorm.weight
            yield from attention_tensors(at, layer.self_attn, pairs=arch == 'llama')
            yield at + 'attn_output.weight', layer.self_attn.o_proj.weight
            yield at + 'ffn_norm.weight', layer.post_attention_layernorm.weight
            yield from mlp_tensors(at, layer.mlp)
            if not c.n_expert:
                yield at + 'ffn_down.weight', layer.mlp.down_proj.weight
    return arch, keys, tensors, note


def ssm_keys(c, inner, rank):
    return {'ssm.conv_kernel': c.conv_kernel, 'ssm.inner_size': inner, 'ssm.state_size': c.state_size, 'ssm.time_step_rank': rank}


def mamba_form(net):
    c = net.config
    inner = c.expand * c.n_embd
    if c.expand != 2 and c.version == 1:
        raise ValueError(f'llama.cpp computes Mamba-1 only with expand=2, not {c.expand}; --format=hf takes any')
    arch = 'mamba' if c.version == 1 else 'mamba2'
    keys = {'block_count': c.n_layer, 'context_length': ENDLESS, 'embedding_length': c.n_embd, 'vocab_size': c.vocab_size,
            'feed_forward_length': 0, 'attention.head_count': 0, 'attention.layer_norm_rms_epsilon': float(c.norm_eps),
            **ssm_keys(c, inner, c.time_step_rank if c.version == 1 else inner // c.head_dim)}
    if c.version == 2:
        keys['ssm.group_count'] = c.n_groups

    def tensors():
        yield from ends(net, net.backbone.norm_f)
        for i, block in enumerate(net.backbone.layers):
            at = f'blk.{i}.'
            yield at + 'attn_norm.weight', block.norm.weight
            yield from (mamba1_tensors if c.version == 1 else mamba2_tensors)(at, block.mixer)
            yield at + 'ssm_out.weight', matrix(block.mixer.out_proj)
    return arch, keys, tensors, ''


def hybrid_form(net):
    """FalconH1, if the branches are only added up: then their scale is one of the rows of their last matrices."""
    c = net.config
    unlike = [what for what, there in ((f'layout={c.layout}', c.layout != 'sequential'), ('gate=True', c.gate),
                                       ('branch_norm=True', c.branch_norm), ('qk_norm=True', c.qk_norm),
                                       (f'window={c.window}', window_of(c))) if there]
    if unlike:
        raise ValueError(f'llama.cpp has no hybrid with {", ".join(unlike)}; --format=hf writes this one with its own modelling file')
    inner = c.expand * c.n_embd
    keys = {**attention_keys(c), **ssm_keys(c, inner, inner // c.ssm_head_dim), 'ssm.group_count': c.n_groups}

    def tensors():
        for name, tensor in ends(net, net.model.norm, untied=True):
            yield name, net.model.embed_norm(tensor) if name == 'token_embd.weight' else tensor
        for i, layer in enumerate(net.model.layers):
            at, half, scale = f'blk.{i}.', layer.residual_scale[:, None] / 2, layer.mlp_residual_scale[:, None]
            yield at + 'attn_norm.weight', layer.input_layernorm.weight
            yield from attention_tensors(at, layer.self_attn, pairs=False)
            yield at + 'attn_output.weight', half * matrix(layer.self_attn.o_proj)
            yield from mamba2_tensors(at, layer.mamba)
            yield at + 'ssm_out.weight', half * matrix(layer.mamba.out_proj)
            yield at + 'ffn_norm', layer.pre_mlp_layernorm.weight               # without .weight: so llama.cpp calls it here
            yield from mlp_tensors(at, layer.mlp)
            yield at + 'ffn_down.weight', scale * matrix(layer.mlp.down_proj)
    return 'falcon-h1', keys, tensors, ''


def form(net):
    """→ (architecture, its settings, a function that yields (name, tensor), a note or ''). ValueError if llama.cpp has no such model."""
    return {'GPT': gpt_form, 'Mamba': mamba_form, 'Hybrid': hybrid_form}[type(net).__name__](net)


# --- the tokenizer ----------------------------------------------------------------------------------------------------

def merges_of(tok):
    """The merges of a byte-level BPE that gives tok's ids. ValueError if there are none."""
    if tok.kind == 'byte':
        return []
    if tok.kind == 'char':                                  # of a character's bytes, from the first on: no other pair meets
        parts = [[BYTE_TO_CHAR[b] for b in token] for token in tok.table]
        return sorted({''.join(p[:n]) + ' ' + p[n] for p in parts for n in range(1, len(p))}, key=len)
    if tok.fast is None:
        raise ValueError('its tokenizer cuts text into words otherwise than GPT-2, and llama.cpp knows only the schemes it has a name for; '
                         '--format=hf writes any, or train on data prepared with --tokenizer=bpe')
    return [merge if isinstance(merge, str) else ' '.join(merge) for merge in json.loads(tok.text)['model']['merges']]


def vocabulary(tok, size):
    """The settings that tell llama.cpp of a tokenizer, or that there is none; the model has `size` ids."""
    if tok is None:
        return {'model': 'no_vocab'}
    merges = merges_of(tok) or [NEVER]
    special = {token['id']: token['content'] for token in json.loads(tok.text)['added_tokens']}
    ids = {name: i for i, name in special.items()}
    tokens, types = [f'[PAD{i}]' for i in range(size)], [UNUSED] * size         # ids beyond the tokenizer's, to pad the matrix
    for i, token in enumerate(tok.table):
        if token:
            tokens[i], types[i] = ''.join(BYTE_TO_CHAR[b] for b in token), NORMAL
        elif i in special:
            tokens[i], types[i] = special[i], CONTROL
    keys = {'model': 'gpt2', 'pre': 'gpt-2', 'tokens': tokens, 'token_type': types, 'merges': merges,
            'bos_token_id': tok.eot, 'eos_token_id': tok.eot, 'add_bos_token': False}
    if all(name in ids for name in CHAT):
        keys |= {'eot_token_id': ids[CHAT[1]]}
    return keys


# --- the file ---------------------------------------------------------------------------------------------------------

def format_of(name, shape, quantize):
    """How a tensor is stored, by gguf's name of the format. Blocks are of 32 in a row."""
    if not quantize or len(shape) < 2 or not name.endswith('.weight') or any(part in name for part in FULL):
        return 'F32'
    if shape[-1] % 32:
        return 'F16'
    return 'Q8_0' if quantize == 'int8' or name in ('token_embd.weight', 'output.weight') else 'Q4_0'


def array(tensor):
    return tensor.detach().float().contiguous().numpy()


def write(net, tok, folder, quantize):
    """Writes model-….gguf into the folder. ValueError: what llama.cpp cannot compute or read exactly."""
    import gguf
    arch, keys, tensors, note = form(net)
    size = f'{net.num_params() / 1e6:.0f}M' if net.num_params() >= 1e6 else f'{net.num_params() / 1e3:.0f}K'
    settings = {'general.name': f'mambino-{type(net).__name__.lower()}-{size}', 'general.description': note or 'written by Mambino',
                'general.file_type': {'': 0, 'int8': 7, 'int4': 2}[quantize], 'general.quantization_version': gguf.GGML_QUANT_VERSION,
                **{f'{arch}.{key}': value for key, value in keys.items()},
                **{f'tokenizer.ggml.{key}': value for key, value in vocabulary(tok, net.config.vocab_size).items()}}
    if 'tokenizer.ggml.eot_token_id' in settings:
        settings['tokenizer.chat_template'] = CHATML
    writer = gguf.GGUFWriter(os.path.join(folder, FILES[quantize]), arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in settings.items():
        add[type(value)](key, value)
    for name, tensor in tensors():
        kind = gguf.GGMLQuantizationType[format_of(name, tensor.shape, quantize)]
        writer.add_tensor(name, gguf.quants.quantize(array(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the proof --------------------------------------------------------------------------------------------------------

def same_tensors(path, tensors):
    """'39 of 39': tensors in the file that are ours, to what their format can hold."""
    import gguf
    found, same, total = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}, 0, 0
    for total, (name, tensor) in enumerate(tensors(), 1):
        ours = array(tensor)
        if name not in found or found[name].shape.tolist() != list(ours.shape[::-1]):
            continue
        kind = found[name].tensor_type.name
        error = np.abs(gguf.quants.dequantize(found[name].data, found[name].tensor_type).reshape(ours.shape) - ours)
        if kind in ('Q8_0', 'Q4_0'):                        # a step is 1/127 or 1/8 of the largest of 32; rounding takes half, clipping one
            error, largest = (np.reshape(u, (-1, 32)).max(1) for u in (error, np.abs(ours)))
            same += bool((error <= largest * (0.6 / 127 if kind == 'Q8_0' else 1.01 / 8) + 4e-6).all())
        else:
            same += bool((error <= (np.abs(ours) * 2 ** -11 + 2 ** -25 if kind == 'F16' else 0)).all())
    return f'{same} of {max(total, len(found))}'


def all_of(text):
    """Whether '39 of 40' means all."""
    return len(set(text.split(' of '))) == 1


@torch.no_grad()
def against_llama_cpp(llm, net, tok, quantize, T, n):
    """Ours and llama.cpp's logits of T tokens, n greedy tokens after them, and the ids of 200 texts."""
    ids = some_ids(net, 1, T)
    ours, state = net.step(ids)
    llm.eval(ids[0].tolist())
    theirs, agree, limit = torch.from_numpy(llm.scores[:T]), 0, None if quantize else LIMIT * float(ours.std())
    found = dict(logits=difference(theirs, ours[0]), limit=limit,
                 correlation=float(torch.corrcoef(torch.stack((theirs.flatten(), ours.flatten())))[0, 1]))
    for i in range(n):
        token, theirs = int(ours[0, -1].argmax()), llm.scores[T + i - 1]
        agree += bool(theirs[token] >= theirs.max() - (limit or 0))      # of equal ones any
        ours, state = net.step(torch.tensor([[token]]), state)
        llm.eval([token])
    found['greedy'] = f'{agree} of {n}'
    if tok:
        texts = some_texts(tok, 200)
        same = sum(llm.tokenize(text.encode(), special=False) == tok.encode(text).tolist() for text in texts)
        found['ids'] = f'{same} of {len(texts)}'
    return found


def verify(net, tok, folder, quantize):
    """Opens the file with llama.cpp if it is installed, in any case with gguf's reader; see export.py for what is returned."""
    path = os.path.join(folder, FILES[quantize])
    arch, keys, tensors, note = form(net)
    found = dict(tool='gguf ' + version('gguf'), logits=None, limit=None, tensors=same_tensors(path, tensors))
    try:
        import llama_cpp
    except ImportError:
        missing = 'llama.cpp itself was not there (pip install llama-cpp-python), only the file was compared'
        return dict(found, ok=all_of(found['tensors']), note='; '.join(filter(None, (note, missing))))
    window, context = keys.get('attention.sliding_window', 0), keys['context_length']
    T = window + 32 if window else min(64, (context + 1) // 2)                  # of a window, to its end and beyond
    n = 32 if window else min(32, context - T)
    threads = torch.get_num_threads()
    llm = llama_cpp.Llama(path, n_ctx=T + n, n_batch=T + n, n_threads=threads, n_threads_batch=threads, logits_all=True, swa_full=False,
                          type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False)    # its cache is F16 by default
    found |= dict(tool='llama-cpp-python ' + llama_cpp.__version__, **against_llama_cpp(llm, net, tok, quantize, T, n))
    llm.close()
    exact = ('tensors', 'ids') if quantize else ('tensors', 'ids', 'greedy')
    ok = all(all_of(found[key]) for key in exact if key in found)
    correlation = found.pop('correlation')
    if quantize:
        ok = ok and correlation >= CORRELATION[quantize]
        note = '; '.join(filter(None, (note, f'its logits correlate with the unquantised ones by {correlation:.5f}')))
    else:
        ok = ok and found['logits'] <= found['limit']
    return dict(found, ok=ok, note=note)
