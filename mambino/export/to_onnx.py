"""A model in ONNX, which onnxruntime runs in many languages and on many devices, without PyTorch.

    python export.py --format=onnx
    session = onnxruntime.InferenceSession('step.onnx')
    logits, *present = session.run(None, {'input_ids': ids, **past})

    step.onnx     input_ids (B, t), past_… ──► logits (B, t, V), present_…: a prompt, then by token
    model.onnx    input_ids (B, T) ──► logits (B, T, V): whole sequences

What a past is says graphs.py. Each present goes into the next step as the past of its place; before
the first token the caches of keys and values are empty (S = 0), all others are zeros. All sequences
of a batch have seen the same number of tokens. The model's settings are among the metadata of both
files. Both are made of one export: in model.onnx the pasts are made of zeros. Attention and Mamba-2
take time and memory with the square of the tokens of a step: a text of thousands goes faster
through step.onnx, some hundred at once.

int8: onnxruntime's dynamic quantisation of the matrix products, weights by column, activations as
they come; the projections that time steps are made of alone and routers stay in fp32, and so do the
rows of a Mamba-3's for dt, A, trap and angles. In the hidden
layers of a small model that moves logits by some percent of the largest.
"""
import importlib
import os

import torch

from mambino.export import graphs
from mambino.export.compare import compare_steps, silent

PACKAGES = 'onnx onnxscript onnxruntime'
FILES = 'step.onnx', 'model.onnx'
EXACT = ('x_proj', 'dt_proj', 'scalars', 'gate', 'controller')  # modules that int8 leaves alone
DTYPES = {'tensor(int64)': torch.long, 'tensor(float)': torch.float32, 'tensor(double)': torch.float64}
LIMIT = {'': 1e-4, 'int8': 0.1}                         # of the largest logit
# bytes of weights in the file itself, whose limit is 2 GB; more lie beside it in ….data
LARGEST = 1.8e9


# --- what is written ------------------------------------------------------------------------------

@torch.no_grad()
def exported_step(net, tok):
    """The graph of a step, an onnx_ir.Model."""
    for package in ('onnx', 'onnxscript'):  # torch.onnx needs them, and says so late
        importlib.import_module(package)
    graph = graphs.Graph(net).eval()
    ids, past = graphs.example(graph)
    past_names, present_names = graph.names()
    batch, tokens, slots = (torch.export.Dim(name) for name in ('batch', 'tokens', 'past'))
    past_shapes = []                                                            # which sizes may change
    for name, tensor in zip(past_names, past):
        if tensor.dtype == torch.long:                                          # the position
            past_shapes.append({})
        elif name.endswith(('.key', '.value')):
            past_shapes.append({0: batch, 2: slots})
        else:
            past_shapes.append({0: batch})
    with silent():
        program = torch.onnx.export(
            graph, (ids, past), dynamo=True, verbose=False,
            dynamic_shapes=dict(ids={0: batch, 1: tokens}, past=past_shapes),
            input_names=['input_ids', *past_names], output_names=['logits', *present_names])
    program.model.producer_name = 'mambino'
    program.model.metadata_props.update(graphs.metadata(net, tok))
    return program.model


def begin_with_nothing(model):
    """Changes the graph of a step to that of a whole sequence: its pasts are what is there before
    the first token."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    graph = model.graph
    ids, *pasts = graph.inputs
    batch = ir.node('Shape', [ids], dict(start=0, end=1))
    nodes = [batch]

    def constant(name, values):
        tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(name=name, const_value=tensor)
        value.shape = ir.Shape([len(values)])
        value.dtype = ir.DataType.INT64
        graph.initializers[name] = value
        return value

    for past in pasts:
        if past.dtype == ir.DataType.INT64:                                     # the position
            zeros = constant(f'{past.name}.zero', [0])
        else:
            sizes = [n if isinstance(n, int) else 0 for n in past.shape[1:]]
            sizes = constant(f'{past.name}.sizes', sizes)
            shape = ir.node('Concat', [batch.outputs[0], sizes], dict(axis=0))
            zero = ir.tensor([0], dtype=past.dtype)
            fill = ir.node('ConstantOfShape', [shape.outputs[0]], dict(value=zero))
            nodes += [shape, fill]
            zeros = fill.outputs[0]
        ir.convenience.replace_all_uses_with(past, zeros)
    graph.insert_before(graph[0], nodes)
    del graph.inputs[1:], graph.outputs[1:]
    RemoveUnusedNodesPass()(model)
    for node in graph.all_nodes():  # shapes that were said of a step
        for value in node.outputs:
            if value not in graph.outputs:
                value.shape = None


def save(model, path, beside):
    """beside: whether the weights go into a file of their own."""
    import onnx_ir
    onnx_ir.save(model, path, external_data=os.path.basename(path) + '.data' if beside else None)


def save_int8(model, path, beside):
    """The file with int8 matrices; of large ones, too, the products must be with constants."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxscript.optimizer import fold_constants
    fold_constants(model, input_size_limit=2**40, output_size_limit=2**40)
    exact = [node.name for node in model.graph if node.op_type == 'MatMul' and is_exact(node)]
    unrounded = path + '.fp32'
    save(model, unrounded, beside)
    with silent():  # unsigned: the sums of signed ones overflow on a CPU without VNNI
        quantize_dynamic(unrounded, path, op_types_to_quantize=['MatMul'], per_channel=True,
                         weight_type=QuantType.QUInt8, nodes_to_exclude=exact,
                         use_external_data_format=beside)
    for file in [unrounded] + [unrounded + '.data'] * beside:
        os.remove(file)


def is_exact(node):
    """Whether a node comes from a module that int8 leaves alone."""
    scopes = node.metadata_props.get('pkg.torch.onnx.name_scopes', '')
    return any(f".{module}'" in scopes for module in EXACT)


def write(net, tok, folder, quantize='', **_):
    """Writes step.onnx, model.onnx, tokenizer.json. ValueError for what ONNX cannot be given."""
    if quantize not in LIMIT:
        raise ValueError(f'ONNX files are written in fp32 or int8, not {quantize}: take '
                         '--quantize=int8, or GGUF for 4 bits')
    if quantize:
        importlib.import_module('onnxruntime')  # before the long work
    model = exported_step(net, tok)
    beside = 4 * net.num_params() > LARGEST
    save_file = save_int8 if quantize else save
    step_file, full_file = FILES
    save_file(model, os.path.join(folder, step_file), beside)
    begin_with_nothing(model)
    save_file(model, os.path.join(folder, full_file), beside)
    if tok:
        tok.save(folder)


def opening(name, **_):
    """The lines that open the files, for the card."""
    return ('import onnxruntime\n'
            f'model = onnxruntime.InferenceSession({FILES[1]!r})     # step.onnx goes token by token')


# --- the proof ------------------------------------------------------------------------------------

def session(path):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def verify(net, tok, folder, quantize='', **_):
    """Both files in onnxruntime, beside the model: logits of whole sequences and of steps, and
    greedy text. → a check, see compare.py."""
    import onnxruntime
    step, full = (session(os.path.join(folder, name)) for name in FILES)
    pasts = step.get_inputs()[1:]

    def empty(B):
        past = []
        for tensor in pasts:
            size = [B if n == 'batch' else n if isinstance(n, int) else 0 for n in tensor.shape]
            past.append(torch.zeros(size, dtype=DTYPES[tensor.type]).numpy())
        return past

    def run_step(ids, past):
        inputs = {tensor.name: value for tensor, value in zip(pasts, past)}
        logits, *present = step.run(None, {'input_ids': ids.numpy(), **inputs})
        return torch.from_numpy(logits), present

    def run_full(ids):
        return torch.from_numpy(full.run(None, {'input_ids': ids.numpy()})[0])

    check = compare_steps(net, tok, empty, run_step, run_full)
    same = check.pop('same') or bool(quantize)  # rounding may change the text
    limit = LIMIT[quantize]
    ok = same and check['logits'] <= limit
    return dict(tool=f'onnxruntime {onnxruntime.__version__}', limit=limit, ok=ok, **check)
