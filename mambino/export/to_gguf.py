"""A model as one GGUF file, for llama.cpp and what is built on it (ollama, LM Studio,
llama-cpp-python).

    python export.py --format=gguf                          # model-f32.gguf, of the model in out/
    python export.py --format=gguf --quantize=int8          # model-q8_0.gguf; int4: model-q4_0.gguf

    net ──► gguf_model: architecture, settings, tensors ──────────────────┬─► model-….gguf
    tok ──► gguf_tokenizer: tokens in GPT-2's alphabet, types, merges ────┘   in blocks of 32

What no model of llama.cpp computes is refused. `verify` opens the file with llama.cpp (pip install
llama-cpp-python) and compares logits, greedy tokens and token ids, or where that is missing, with
gguf's own reader, tensor by tensor. Measured with llama-cpp-python 0.3.36: F32 logits differ by
1e-5 at most, all greedy tokens and all ids are equal; models of 50M on two CPU cores make so many
tokens a second:

                F32   Q8_0   Q4_0
    GPT         107    276    469
    Mamba-2     102    214    329

A char vocabulary gives equal ids for all it has; where it refuses a text with other characters,
llama.cpp drops them. Token ids are right, but the detokenize of llama-cpp-python 0.3.36 (not
llama.cpp) garbles tokens of more than 32 bytes.
"""
import os
from importlib.metadata import version

import numpy as np
import torch

from mambino.export.compare import difference, some_ids, some_texts
from mambino.export.gguf_model import to_llama_cpp
from mambino.export.gguf_tokenizer import vocabulary
from mambino.export.special_tokens import note_of, special_tokens

PACKAGES = 'gguf'
FILES = {'': 'model-f32.gguf', 'int8': 'model-q8_0.gguf', 'int4': 'model-q4_0.gguf'}
FILE_TYPES = {'': 0, 'int8': 7, 'int4': 2}                  # general.file_type
MATRIX_TYPES = {'': 'F32', 'int8': 'Q8_0', 'int4': 'Q4_0'}  # all that is no matrix stays F32
FULL = ('norm', 'ssm_conv1d', 'ssm_dt', 'ffn_gate_inp')     # and so do these weights
LIMIT = 2e-4                                # largest difference of F32 logits, in their deviations
CORRELATION = {'int8': 0.95, 'int4': 0.7}   # smallest of logits with those before quantisation


# --- the file -------------------------------------------------------------------------------------

def stored_type(name, shape, quantize):
    """How a tensor is stored, by gguf's name of the format. Blocks are of 32 in a row."""
    is_matrix = len(shape) >= 2 and name.endswith('.weight')
    if not quantize or not is_matrix or any(part in name for part in FULL):
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
    tokenizer = vocabulary(tok, net.config.vocab_size)
    settings |= {f'tokenizer.ggml.{key}': value for key, value in tokenizer.items()}
    if tok and tok.config.get('chat_template'):     # of a model that knows conversations
        settings['tokenizer.chat_template'] = tok.config['chat_template']
    writer = gguf.GGUFWriter(os.path.join(folder, FILES[quantize]), model.architecture)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in settings.items():
        add[type(value)](key, value)
    for name, tensor in model.tensors():
        kind = gguf.GGMLQuantizationType[stored_type(name, tensor.shape, quantize)]
        writer.add_tensor(name, gguf.quants.quantize(array(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def opening(name, tok=None, quantize='', **_):
    """The lines that open the file, for the card."""
    lines = ['from llama_cpp import Llama', f'model = Llama({FILES[quantize]!r})']
    if tok and tok.config.get('chat_template'):
        lines.append("model.create_chat_completion([{'role': 'user', 'content': 'Hello!'}])")
    return '\n'.join(lines)


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
        kind = stored[name].tensor_type
        theirs = gguf.quants.dequantize(stored[name].data, kind).reshape(ours.shape)
        same += within_rounding(np.abs(theirs - ours), ours, kind.name)
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
        same = sum(llm.tokenize(text.encode(), special=False) == [*tok.bos, *tok.encode(text).tolist()]
                   for text in texts)
        check['ids'] = f'{same} of {len(texts)}'
    return check


def verify(net, tok, folder, quantize='', **_):
    """Opens the file with llama.cpp if it is installed, in any case with gguf's reader. → a check,
    see compare.py, with its `tensors`."""
    path = os.path.join(folder, FILES[quantize])
    model = to_llama_cpp(net)
    pads = note_of(special_tokens(tok, net.config.vocab_size)) if tok else ''
    model = model._replace(note='; '.join(filter(None, (model.note, pads))))
    check = dict(tool='gguf ' + version('gguf'), logits=None, limit=None)
    check['tensors'] = same_tensors(path, model.tensors)
    try:
        import llama_cpp
    except ImportError:
        missing = ('llama.cpp itself was not there (pip install llama-cpp-python), only the file was '
                   'compared')
        note = '; '.join(filter(None, (model.note, missing)))
        return dict(check, ok=all_of(check['tensors']), note=note)

    window = model.settings.get('attention.sliding_window', 0)
    context = model.settings['context_length']
    T = window + 32 if window else min(64, (context + 1) // 2)  # of a window, to its end and beyond
    n = 32 if window else min(32, context - T)
    threads = torch.get_num_threads()
    cache_type = llama_cpp.GGML_TYPE_F32                                        # by default F16
    llm = llama_cpp.Llama(path, n_ctx=T + n, n_batch=T + n, n_threads=threads, n_threads_batch=threads,
                          logits_all=True, swa_full=False, type_k=cache_type, type_v=cache_type,
                          verbose=False)
    check |= compare_llama_cpp(llm, net, tok, quantize, T, n)
    check['tool'] = 'llama-cpp-python ' + llama_cpp.__version__
    llm.close()
    exact = ('tensors', 'ids') if quantize else ('tensors', 'ids', 'greedy')
    ok = all(all_of(check[name]) for name in exact if name in check)
    note = model.note
    correlation = check.pop('correlation')
    if quantize:
        ok = ok and correlation >= CORRELATION[quantize]
        correlates = f'its logits correlate with the unquantised ones by {correlation:.5f}'
        note = '; '.join(filter(None, (note, correlates)))
    else:
        ok = ok and check['logits'] <= check['limit']
    return dict(check, ok=ok, note=note)
