"""A model in ONNX, which onnxruntime runs in many languages and on many devices, without PyTorch.

    python export.py --format=onnx
    session = onnxruntime.InferenceSession('step.onnx'); logits, *present = session.run(None, {'input_ids': ids, **past})

    step.onnx     input_ids (B, t), past_… ──► logits (B, t, V), present_…: the prompt in one step or several, then token by token
    model.onnx    input_ids (B, T) ──► logits (B, T, V): whole sequences

What a past is says graphs.py. Each present goes into the next step as the past of its place; before
the first token the caches of keys and values are empty (S = 0), all others are zeros. All sequences
of a batch have seen the same number of tokens. The model's settings are among the metadata of both
files. Both are made of one export: in model.onnx the pasts are made of zeros. Attention and Mamba-2
take time and memory with the square of the tokens of a step: a text of thousands goes faster
through step.onnx, some hundred at once.

int8: onnxruntime's dynamic quantisation of the matrix products, weights by column, activations as
they come; the projections that time steps are made of alone and routers stay in fp32. In the hidden
layers of a small model that moves logits by some percent of the largest.
"""
import importlib
import os

import torch

from mambino.export import graphs

PACKAGES = 'onnx onnxscript onnxruntime'
FILES = 'step.onnx', 'model.onnx'
EXACT = ('x_proj', 'dt_proj', 'gate', 'controller')  # modules that int8 leaves alone
LIMIT = {'': 1e-4, 'int8': 0.1}     # of the largest logit
# bytes of weights in the file itself, whose limit is 2 GB; more lie beside it in ….data
INSIDE = 1.8e9


def exported(net, tok):
    """The graph of a step."""
    for package in ('onnx', 'onnxscript'):  # torch.onnx needs them, and would say so later
        importlib.import_module(package)
    graph = graphs.Graph(net).eval()
    past, present = graph.names()
    ids, state = graphs.example(graph)
    B, t, S = (torch.export.Dim(name) for name in ('batch', 'tokens', 'past'))
    shapes = [{} if u.dtype == torch.long else {0: B, 2: S} if '.key' in name or '.value' in name else {0: B}
              for u, name in zip(state, past)]
    with graphs.plain():
        program = torch.onnx.export(graph, (ids, state), dynamo=True, dynamic_shapes=dict(ids={0: B, 1: t}, past=shapes),
                                    input_names=['input_ids', *past], output_names=['logits', *present], verbose=False)
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
    nodes = [ir.node('Shape', [ids], dict(start=0, end=1))]

    def constant(name, values):
        value = ir.Value(name=name, const_value=ir.tensor(values, dtype=ir.DataType.INT64, name=name))
        value.shape, value.dtype = ir.Shape([len(values)]), ir.DataType.INT64
        graph.initializers[name] = value
        return value
    for past in pasts:
        if past.dtype == ir.DataType.INT64:
            zeros = constant(f'{past.name}.zero', [0])
        else:
            sizes = [n if isinstance(n, int) else 0 for n in past.shape[1:]]
            nodes.append(ir.node('Concat', [nodes[0].outputs[0], constant(f'{past.name}.sizes', sizes)], dict(axis=0)))
            nodes.append(ir.node('ConstantOfShape', [nodes[-1].outputs[0]]))
            zeros = nodes[-1].outputs[0]
        ir.convenience.replace_all_uses_with(past, zeros)
    graph.insert_before(graph[0], nodes)
    del graph.inputs[1:], graph.outputs[1:]
    RemoveUnusedNodesPass()(model)
    for node in graph.all_nodes():  # shapes that were said of a step
        for value in node.outputs:
            if value not in graph.outputs:
                value.shape = None


def save(model, path, outside):
    import onnx_ir
    onnx_ir.save(model, path, external_data=os.path.basename(path) + '.data' if outside else None)


def save_int8(model, path, outside):
    """The file with int8 matrices; of large ones, too, the products must be with constants."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxscript.optimizer import fold_constants
    fold_constants(model, input_size_limit=2**40, output_size_limit=2**40)
    exact = [node.name for node in model.graph if node.op_type == 'MatMul'
             and any(f".{part}'" in node.metadata_props.get('pkg.torch.onnx.name_scopes', '') for part in EXACT)]
    whole = path + '.fp32'
    save(model, whole, outside)
    with graphs.silent():
        quantize_dynamic(whole, path, op_types_to_quantize=['MatMul'], per_channel=True, weight_type=QuantType.QInt8,
                         nodes_to_exclude=exact, use_external_data_format=outside)
    for file in [whole] + [whole + '.data'] * outside:
        os.remove(file)


def write(net, tok, folder, quantize='', **_):
    """step.onnx, model.onnx, tokenizer.json. ValueError for what ONNX cannot be given."""
    if quantize not in LIMIT:
        raise ValueError(f'ONNX files are written in fp32 or int8, not {quantize}: take --quantize=int8, or GGUF for 4 bits')
    if quantize:
        importlib.import_module('onnxruntime')  # before the long work
    model = exported(net, tok)
    outside = 4 * net.num_params() > INSIDE
    for name in FILES:
        if name == 'model.onnx':
            begin_with_nothing(model)
        (save_int8 if quantize else save)(model, os.path.join(folder, name), outside)
    if tok:
        tok.save(folder)


def session(path):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def verify(net, tok, folder, quantize='', **_):
    """Both files in onnxruntime, beside the model: logits of whole sequences and of steps, and
    greedy text."""
    import onnxruntime
    step, whole = (session(os.path.join(folder, name)) for name in FILES)
    pasts = step.get_inputs()[1:]

    def start(B):
        sizes = [[B if n == 'batch' else n if isinstance(n, int) else 0 for n in past.shape] for past in pasts]
        return [torch.zeros(size, dtype=torch.long if past.type == 'tensor(int64)' else torch.float32).numpy()
                for size, past in zip(sizes, pasts)]

    def run(ids, past):
        logits, *present = step.run(None, {'input_ids': ids.numpy(), **{u.name: value for u, value in zip(pasts, past)}})
        return torch.from_numpy(logits), present
    found = graphs.beside(net, tok, start, run, lambda ids: torch.from_numpy(whole.run(None, {'input_ids': ids.numpy()})[0]))
    same = found.pop('same') or bool(quantize)
    limit = LIMIT[quantize]
    return dict(tool=f'onnxruntime {onnxruntime.__version__}', limit=limit, ok=same and found['logits'] <= limit, **found)


def opening(name, **_):
    """The lines that open the files, for the card."""
    return f'import onnxruntime\nmodel = onnxruntime.InferenceSession({FILES[1]!r})     # step.onnx goes token by token'
