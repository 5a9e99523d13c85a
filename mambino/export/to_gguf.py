"""A model as one GGUF file, for llama.cpp and what is built on it (ollama, LM Studio).

    python export.py --format=gguf                          # model-f32.gguf, of the model in out/
    python export.py --format=gguf --quantize=int8          # model-q8_0.gguf; int4: model-q4_0.gguf

    net ──► gguf_model: architecture, settings, tensors ──────────────────┬─► model-….gguf
    tok ──► gguf_tokenizer: tokens in GPT-2's alphabet, types, merges ────┘   in blocks of 32

What no model of llama.cpp computes is refused. `verify` opens the file with a real llama.cpp (pip
install xllamacpp), which tells the log-probabilities of the whole vocabulary at a position. They are
logits but for one constant, so they are compared as logits, read token by token and at once; so are
greedy tokens, ids, texts, and the bytes each id stands for. Where llama.cpp is missing gguf's own
reader compares tensor by tensor, which it does in any case.

A char vocabulary gives equal ids for all it has; where it refuses a text with other characters,
llama.cpp drops them.
"""
import os
import tempfile
import unicodedata
from importlib.metadata import version

import numpy as np
import torch

from mambino.export.compare import greedy, some_ids, some_texts
from mambino.export.gguf_model import to_llama_cpp
from mambino.export.gguf_tokenizer import is_normalizing, stand_in, vocabulary
from mambino.export.llama_server import PACKAGE, LlamaServer
from mambino.export.special_tokens import note_of, special_tokens

PACKAGES = 'gguf'
FILES = {'': 'model-f32.gguf', 'int8': 'model-q8_0.gguf', 'int4': 'model-q4_0.gguf'}
FILE_TYPES = {'': 0, 'int8': 7, 'int4': 2}                  # general.file_type
MATRIX_TYPES = {'': 'F32', 'int8': 'Q8_0', 'int4': 'Q4_0'}  # all that is no matrix stays F32
FULL = ('norm', 'ssm_conv1d', 'ssm_dt', 'ffn_gate_inp')     # and so do these weights
LIMIT = 2e-4                                # largest difference of F32 logits, in their deviations
SMALLEST = -80.0                            # logs of probabilities below have no digits in float32
VALUES = 3_000_000                          # so many logits are compared, about
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


def write(net, tok, folder, quantize='', vocabulary=vocabulary, **_):
    """Writes model-….gguf into the folder. ValueError: what llama.cpp cannot compute or read
    exactly."""
    import gguf
    model = to_llama_cpp(net)
    n = net.num_params()
    size = f'{n / 1e6:.0f}M' if n >= 1e6 else f'{n / 1e3:.0f}K'
    settings = {'general.name': f'mambino-{type(net).__name__.lower()}-{size}',
                'general.description': model.note or f'trained on windows of {net.config.block_size} tokens by Mambino',
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
    lines = ['import xllamacpp', 'params = xllamacpp.CommonParams()', f'params.model.path = {FILES[quantize]!r}',
             'server = xllamacpp.Server(params)']
    if tok and tok.config.get('chat_template'):
        lines.append("server.handle_chat_completions({'messages': [{'role': 'user', 'content': 'Hello!'}]})")
    else:
        lines.append("server.handle_completions({'prompt': 'Hello', 'max_tokens': 64})")
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


def some_positions(T, n, vocab_size):
    """After how many of T + n tokens logits are compared: of each of the n, and of up to 64 spread over
    the others; fewer where a vocabulary is large (100 ms for 16,000)."""
    count = max(8, min(64, VALUES // vocab_size - n))
    spread = torch.linspace(1, T, min(count, T)).long().unique().tolist()
    return [*spread, *range(T + 1, T + n)]


def off_by(theirs, ours):
    """How far log-probabilities are apart, but for a constant, which logits have free."""
    told = ours > SMALLEST                          # below, a float32 probability has no digits left
    if not (theirs.isfinite().all() and (theirs[~told] < SMALLEST + 5).all()):
        return float('inf')
    off = (theirs - ours)[told]
    return float((off - off.mean()).abs().max())


@torch.no_grad()
def compare_llama_cpp(server, net, tok, quantize, T, n):
    """Ours and llama.cpp's logits of T tokens and of n greedy ones after them, and ids, texts and
    tokens. → a part of a check."""
    V = net.config.vocab_size
    ids = some_ids(net, 1, T)[0].tolist()
    ids += greedy(net, ids, n)
    ours = net.step(torch.tensor([ids[:-1]]))[0][0]                     # (T + n - 1, V)
    limit = None if quantize else LIMIT * float(ours.std())
    ours = ours.double().log_softmax(-1)
    complete = next((i for i in range(V) if tok and is_text(tok, i)), 0)
    positions = some_positions(T, n, V)
    theirs = [server.logprobs(ids[:read], V, complete) for read in positions]
    positions.append(len(ours))                                         # and all at once
    theirs.append(server.logprobs(ids[:-1], V, complete, reuse=False))
    theirs = torch.stack(theirs)                                        # (positions, V)
    mine = ours[torch.tensor(positions) - 1]
    told = mine > SMALLEST
    check = dict(logits=max(off_by(*pair) for pair in zip(theirs, mine)), limit=limit)
    check['correlation'] = float(torch.corrcoef(torch.stack((theirs[told], mine[told])))[0, 1])
    agreed = 0
    for read in range(T, T + n):
        of_all = theirs[positions.index(read)]
        agreed += bool(of_all[ids[read]] >= of_all.max() - (limit or 0))    # of equal ones any
    check['greedy'] = f'{agreed} of {n}'
    if tok:
        check |= compare_tokens(server, tok, V, complete)
    return check


def is_text(tok, i):
    """Whether an id stands for whole characters."""
    said = tok.table[i] if i < len(tok.table) else b''
    return bool(said) and '\ufffd' not in said.decode('utf-8', 'replace')


def compare_tokens(server, tok, vocab_size, complete):
    """Ids of 200 texts, the texts they are again, and what each id stands for."""
    texts = some_texts(tok, 200)
    if is_normalizing(tok):
        texts = [unicodedata.normalize('NFC', text) for text in texts]
    found = [server.tokenize(text) for text in texts]
    wanted = [[*tok.bos, *tok.encode(text).tolist()] for text in texts]
    same = sum(theirs == ours for theirs, ours in zip(found, wanted))
    again = sum(server.detokenize(ids[len(tok.bos):]) == text for ids, text in zip(wanted, texts))
    said = {token['id']: bytes(token['bytes']) for token in server.next_tokens([complete], vocab_size, complete)}
    known = [i for i, token in enumerate(tok.table) if token]
    pieces = sum(said.get(i) == tok.table[i] for i in known)
    return dict(ids=f'{same} of {len(texts)}', texts=f'{again} of {len(texts)}', pieces=f'{pieces} of {len(known)}')


def ask_llama_cpp(path, model, net, tok, quantize):
    """A part of a check, or why llama.cpp could not be asked."""
    window = model.settings.get('attention.sliding_window', 0)
    context = model.settings['context_length']
    T = min(window + 32 if window else 64, max(context // 2, context - 32))  # of a window, to its end and beyond
    n = min(32, context - T)        # the last of them is never read: its server wants room for one more
    if not T:
        return "llama.cpp's server takes no context of one token"
    with tempfile.TemporaryDirectory() as folder:
        if tok is None:                                 # its server takes no model without a vocabulary
            write(net, None, folder, quantize, vocabulary=stand_in)
            path = os.path.join(folder, FILES[quantize])
        try:
            server = LlamaServer(path, n_ctx=T + n, exact=True)
        except ImportError:
            return f'llama.cpp itself was not there (pip install {PACKAGE})'
        with server:
            found = compare_llama_cpp(server, net, tok, quantize, T, n)
    return dict(found, tool=f'llama.cpp ({PACKAGE} {version(PACKAGE)})')


def verify(net, tok, folder, quantize='', **_):
    """Opens the file with llama.cpp if it is installed, in any case with gguf's reader. → a check,
    see compare.py, with its `tensors`."""
    path = os.path.join(folder, FILES[quantize])
    model = to_llama_cpp(net)
    notes = [model.note, note_of(special_tokens(tok, net.config.vocab_size)) if tok else '']
    if tok and is_normalizing(tok):
        notes.append('llama.cpp takes a text as it is; the tokenizer brings it into the form NFC first, '
                     'which most are in')
    model = model._replace(note='; '.join(filter(None, notes)))
    check = dict(tool='gguf ' + version('gguf'), logits=None, limit=None)
    check['tensors'] = same_tensors(path, model.tensors)
    found = ask_llama_cpp(path, model, net, tok, quantize)
    if isinstance(found, str):
        missing = f'{found}, only the file was compared'
        note = '; '.join(filter(None, (model.note, missing)))
        return dict(check, ok=all_of(check['tensors']), note=note)

    check |= found
    exact = ['tensors', 'ids', 'texts', 'pieces', *(() if quantize else ['greedy'])]
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
