"""The parts of a model as calls of native.cpp, for decode.py: which function computes a module's next
token, of which weights and which tensors of the state.

    for function, *arguments in calls(net, 0, 'x', 'x'): ...

What no table here knows is `Unknown`, and so is a weight of another size than its neighbours say:
native.cpp gets addresses, and takes what lies there to be as large as it is told.

Letters of the shapes: B rows, D model width, S cache slots; others as in the models' files.
"""
from typing import NamedTuple

import torch
import torch.nn as nn

import model_gpt
import model_hybrid
import model_mamba
from mambino.kernels import cpu, native
from mambino.language_model import Gate, GatedRMSNorm, RMSNorm, SwiGLU
from mambino.weights import quantize
from mambino.weights.dense import Dense

MOST_RANKS = 16     # native.cpp's, of a Mamba-3


class Unknown(Exception):
    """Something of a model, or of a state, that has no place in a plan."""


def require(condition, subject):
    if not condition:
        raise Unknown(subject)


# --- arguments of a call ----------------------------------------------------------------------------
# They are numbers, weights (fp32 tensors), None, and what is below; and names of what a plan has: room
# for x, h, a, b, c (B, D), rstd (B), cos, sin (B, P / 2), pos (B), logits (B, V), and threads, rows = B,
# elements = B D, precision: in which the state is kept.

class State(NamedTuple):
    """A tensor of the state: its name, its shape after B, in which None stands for a cache's slots, and its dtype
    where that is no setting (cache.ROUNDED)."""
    name: str
    shape: tuple
    dtype: torch.dtype = torch.float32


class Slots(NamedTuple):
    """How many slots the cache of this name has."""
    name: str


def address(tensor, dtype=torch.float32):
    """Where a tensor's numbers begin."""
    require(tensor.dtype == dtype, tensor.dtype)
    require(tensor.device.type == 'cpu' and tensor.is_contiguous() and tensor.numel(), 'order of memory')
    return tensor.data_ptr()


def dense(linear):
    address(linear.weight)
    return native.matrix_of(linear.weight, None, linear.weight.shape[1])


def rounded(linear):
    require(linear.codes.dtype in native.FORMATS, linear.codes.dtype)
    address(linear.codes, linear.codes.dtype)
    require(len(linear.codes) == linear.rows, 'rows')
    return native.matrix_of(linear.codes, linear._buffers.get('scales'), linear.columns)


MATRICES = {nn.Linear: dense, Dense: dense, model_mamba.TimeStep: dense, quantize.Linear: rounded,
            quantize.PartlyExact: rounded}


def matrix(module, rows=None, columns=None, adds_bias=False):
    """The native.Matrix of a module that multiplies by one, of this size where it is said. adds_bias: its
    bias, if it has one, is added by whoever multiplies."""
    require(type(module) in MATRICES, type(module))
    require(adds_bias or module.bias is None or type(module) is model_mamba.TimeStep, 'bias')
    try:
        made = MATRICES[type(module)](module)
    except ValueError as error:                                             # codes and scales of other sizes
        raise Unknown(error) from None
    require(rows in (None, made.rows) and columns in (None, made.columns), 'size of a matrix')
    return made


def in_two(module, rows, exact_rows):
    """The native.Matrix of a module that multiplies by one, and that of its last rows where these are kept apart, or
    None: there are then `rows` before `exact_rows`, and else their sum."""
    if type(module) is not quantize.PartlyExact:
        return matrix(module, rows + exact_rows), None
    address(module.exact)
    sized((module.exact, (exact_rows, module.columns)))
    return matrix(module, rows), native.matrix_of(module.exact, None, module.columns)


def sized(*tensors):
    """Unknown if one of (tensor or None, shape) has another shape."""
    for tensor, shape in tensors:
        require(tensor is None or tensor.shape == shape, 'size of a weight')


# --- the parts of a model ---------------------------------------------------------------------------
# Each yields the calls that compute y = module(x) in layer i: (function of native.cpp, *arguments).
# What native.cpp has no function for is called itself: (module, x, y). ('width', D) says what x and y
# must be: native.cpp has addresses alone.

def calls(module, i, x, y):
    require(type(module) in PARTS, type(module))
    return PARTS[type(module)](module, i, x, y)


def rms_norm(norm, i, x, y):
    D = len(norm.weight)
    yield 'width', D
    yield 'norm_forward', 0, 'rows', 0, 1, D, float(norm.eps), x, None, 0, norm.weight, y, 'rstd'


def swiglu(mlp, i, x, y):
    gate = matrix(mlp.gate_proj)
    inner, D = gate.rows, gate.columns
    matrices = gate, matrix(mlp.up_proj, inner, D), matrix(mlp.down_proj, D, inner)
    yield 'width', D
    yield 'mlp_step', 'threads', 'rows', *matrices, x, y


def experts(moe, i, x, y):
    yield moe, x, y


def attention(layer, i, x, y):
    P = layer.head_dim
    require(P % cpu.LANES == 0 and layer.g_proj is None, 'head_dim or gate')
    projections = layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj
    q, k = (matrix(projection, adds_bias=True) for projection in projections[:2])
    H, G, D = q.rows // P, k.rows // P, q.columns
    require(G and H % G == 0 and q.rows == H * P, 'heads')
    sizes = (H * P, D), (G * P, D), (G * P, D), (D, H * P)
    matrices = [matrix(projection, *size, adds_bias=True) for projection, size in zip(projections, sizes)]
    biases = [projection.bias for projection in projections]
    sized(*[(bias, (rows,)) for bias, (rows, _) in zip(biases, sizes)])
    yield 'width', D
    norms = None, None, 0.0
    if layer.qk_norm:
        require(type(layer.q_norm) is type(layer.k_norm) is RMSNorm, 'qk_norm')
        sizes = (H * P, G * P) if layer.qk_norm_whole else (P, P)
        sized((layer.q_norm.weight, sizes[:1]), (layer.k_norm.weight, sizes[1:]))
        norms = layer.q_norm.weight, layer.k_norm.weight, float(layer.q_norm.eps)
    tables = ('cos', 'sin') if layer.turns else (None, None)
    keys, values = State(f'k.{i}', (G, None, P)), State(f'v.{i}', (G, None, P))
    yield ('attention_step', 'threads', 'precision', 'rows', H, G, P, Slots(keys.name), *matrices, *biases,
           int(layer.qk_norm_whole), *norms, 'pos', *tables, keys, values, x, y)


def convolution(conv1d, i):
    """→ the weight (E, 1, taps) and bias (E) of a mixer's convolution, and its State."""
    require(type(conv1d) is model_mamba.Conv1d, type(conv1d))
    E, _, taps = conv1d.weight.shape
    sized((conv1d.weight, (E, 1, taps)), (conv1d.bias, (E,)))
    return conv1d.weight, conv1d.bias, State(f'conv.{i}', (taps - 1, E))


def mamba1(mixer, i, x, y):
    E, N = mixer.A_log.shape
    R = mixer.dt_proj.weight.shape[1]
    in_proj = matrix(mixer.in_proj, 2 * E)
    D = in_proj.columns
    parts = matrix(mixer.x_proj, R + 2 * N, E), matrix(mixer.dt_proj, E, R), matrix(mixer.out_proj, D, E)
    weight, bias, conv = convolution(mixer.conv1d, i)
    sized((bias, (E,)), (mixer.dt_proj.bias, (E,)), (mixer.D, (E,)))
    yield 'width', D
    yield ('mamba1_step', 'threads', 'precision', 'rows', E, N, weight.shape[-1], R, in_proj, *parts, weight, bias,
           mixer.dt_proj.bias, mixer.A_log, mixer.D, float(mixer.part_norm_eps), conv, State(f'ssm.{i}', (N, E)), x, y)


def mamba2(mixer, i, x, y):
    norm = mixer.norm
    require(type(norm) in (GatedRMSNorm, Gate), type(norm))
    weight, bias, conv = convolution(mixer.conv1d, i)                       # of E + 2 G N channels
    H, E, G = len(mixer.A_log), mixer.split[0], mixer.groups
    norm_weight, eps = (norm.weight, float(norm.eps)) if type(norm) is GatedRMSNorm else (None, 0.0)
    sized((norm_weight, (E,)))
    P, N = E // H, (len(weight) - E) // (2 * G)
    require(P % cpu.LANES == N % cpu.LANES == 0, 'head_dim or state_size')
    require(P and N and E == H * P and H % G == 0 and len(weight) == E + 2 * G * N, 'heads')
    in_proj = matrix(mixer.in_proj, E + len(weight) + H)
    sized((mixer.dt_bias, (H,)), (mixer.D, (H,)))
    yield 'width', in_proj.columns
    yield ('mamba2_step', 'threads', 'precision', 'rows', H, G, P, N, weight.shape[-1], in_proj,
           matrix(mixer.out_proj, in_proj.columns, E), weight, bias, mixer.dt_bias, mixer.A_log, mixer.D, norm_weight,
           eps, conv, State(f'ssm.{i}', (H, P, N)), x, y)


def mamba3(mixer, i, x, y):
    H, R, N = mixer.B_bias.shape
    E, RGN, P, A = mixer.split[0], mixer.split[2], mixer.head_dim, mixer.split[-1]
    G, norm = RGN // (R * N), mixer.norm
    require(P % cpu.LANES == N % cpu.LANES == 0, 'head_dim or state_size')
    require(E == H * P and RGN == R * G * N and H % G == 0 and 0 < 2 * A <= N and R <= MOST_RANKS, 'heads')
    require(mixer.split == [E, E, RGN, RGN, H, H, H, A], 'rows of in_proj')
    norms = [mixer.B_norm, mixer.C_norm, *([] if norm is None else [norm])]
    require(all(type(each) is RMSNorm for each in norms) and mixer.B_norm.eps == mixer.C_norm.eps, 'norms')
    sized((mixer.B_norm.weight, (N,)), (mixer.C_norm.weight, (N,)), (norm and norm.weight, (E,)))
    sized((mixer.dt_bias, (H,)), (mixer.D, (H,)), (mixer.C_bias, (H, R, N)))
    mimo = mixer.mimo_x, mixer.mimo_z, mixer.mimo_o
    sized(*[(scales, (H, R, P)) for scales in mimo])
    require(len({scales is None for scales in mimo}) == 1 and (R == 1 or mimo[0] is not None), 'mimo')
    in_proj, scalars = in_two(mixer.in_proj, 2 * (E + RGN), 3 * H + A)
    D = in_proj.columns
    head_norm = (norm.weight, float(norm.eps)) if norm else (None, 0.0)
    yield 'width', D
    yield ('mamba3_step', 'threads', 'precision', 'rows', H, G, P, N, R, A, int(mixer.interleaved), in_proj, scalars,
           matrix(mixer.out_proj, D, E), mixer.dt_bias, mixer.B_bias, mixer.C_bias, mixer.B_norm.weight,
           mixer.C_norm.weight, float(mixer.B_norm.eps), mixer.D, *mimo, *head_norm, State(f'ssm.{i}', (H, P, N)),
           State(f'turn.{i}', (H, A), torch.float64), State(f'last_b.{i}', (R, H, N)), State(f'last_x.{i}', (H, P)),
           x, y)


def delta(mixer, i, x, y):
    conv1d, norm = mixer.conv1d, mixer.norm
    require(type(conv1d) is model_mamba.Conv1d and conv1d.bias is None and type(norm) is RMSNorm, 'parts')
    H, P, G = len(mixer.A_log), len(norm.weight), mixer.groups
    W, _, taps = conv1d.weight.shape
    E, N = H * P, (W - H * P) // (2 * G)
    require(P % cpu.LANES == N % cpu.LANES == 0, 'head_dim or state_size')
    require(P and N and P == mixer.head_dim and H % G == 0 and W == E + 2 * G * N, 'heads')
    require(mixer.split == [E, W, H, H], 'rows of in_proj')
    in_proj = matrix(mixer.in_proj, E + W + 2 * H)
    D = in_proj.columns
    sized((conv1d.weight, (W, 1, taps)), (mixer.dt_bias, (H,)))
    yield 'width', D
    yield ('delta_step', 'threads', 'precision', 'rows', H, G, P, N, taps, in_proj, matrix(mixer.out_proj, D, E),
           conv1d.weight, torch.zeros(W), mixer.dt_bias, mixer.A_log, float(mixer.delta_max), norm.weight,
           float(norm.eps), State(f'conv.{i}', (taps - 1, W)), State(f'ssm.{i}', (H, P, N)), x, y)


def mix(branches, norms, controller, scale):
    """x += scale * the branches, up to three: normed if there are norms, and weighted if there is a
    controller, which reads h."""
    require(all(type(norm) is RMSNorm for norm in norms), 'branch_norms')
    require(controller is None or type(controller) is nn.Linear, type(controller))
    unused = [None] * (3 - len(branches))
    weights = [norm.weight for norm in norms] or [None] * len(branches)
    eps = float(norms[0].eps) if norms else 0.0
    D = len(scale)
    sized(*[(norm.weight, (D,)) for norm in norms])
    if controller:
        sized((controller.weight, (len(branches), D)), (controller.bias, (len(branches),)))
    require(len(norms) in (0, len(branches)), 'branch_norms')
    yield 'width', D
    choice = (controller.weight, controller.bias) if controller else (None, None)
    yield ('mix_step', 'rows', len(scale), len(branches), *branches, *unused, *weights, *unused, eps,
           *choice, scale, 'h', 'x', 'x')


def gpt_layer(layer, i, x, y):
    yield from calls(layer.input_layernorm, i, x, 'h')
    yield from calls(layer.self_attn, i, 'h', 'a')
    yield 'add_step', 'elements', x, 'a', y
    yield from calls(layer.post_attention_layernorm, i, y, 'h')
    yield from calls(layer.mlp, i, 'h', 'a')
    yield 'add_step', 'elements', y, 'a', y


def gpt_norm_after_layer(layer, i, x, y):
    yield from calls(layer.self_attn, i, x, 'a')
    yield from calls(layer.post_attention_layernorm, i, 'a', 'a')
    yield 'add_step', 'elements', x, 'a', y
    yield from calls(layer.mlp, i, y, 'a')
    yield from calls(layer.post_feedforward_layernorm, i, 'a', 'a')
    yield 'add_step', 'elements', y, 'a', y


def mamba_block(block, i, x, y):
    yield from calls(block.norm, i, x, 'h')
    yield from calls(block.mixer, i, 'h', 'a')
    yield 'add_step', 'elements', x, 'a', y
    if block.mlp is not None:
        yield from calls(block.norm2, i, y, 'h')
        yield from calls(block.mlp, i, 'h', 'a')
        yield 'add_step', 'elements', y, 'a', y


def hybrid_layer(layer, i, *_):
    norms = list(layer.branch_norms or [])
    yield from calls(layer.input_layernorm, i, 'x', 'h')
    branches = dict(a=layer.mamba, b=layer.self_attn, c=layer.mlp if layer.parallel else None)
    branches = {y: branch for y, branch in branches.items() if branch is not None}
    for y, branch in branches.items():
        yield from calls(branch, i, 'h', y)
    yield from mix([*branches], norms, layer.controller, layer.residual_scale)
    if not layer.parallel:
        yield from calls(layer.pre_mlp_layernorm, i, 'x', 'h')
        yield from calls(layer.mlp, i, 'h', 'a')
        norms = [layer.mlp_norm] if layer.mlp_norm else []
        yield from mix(['a'], norms, None, layer.mlp_residual_scale)


# Of a model: in x is the embedding before; the logits are written last.

def stack(layers, norm, head):
    for i, layer in enumerate(layers):
        yield from calls(layer, i, 'x', 'x')
    yield from calls(norm, 0, 'x', 'x')
    product = matrix(head)
    yield 'width', product.columns
    yield 'linear_step', 'threads', 'rows', product, 'x', 'logits'


def rope(config):
    frequencies = model_gpt.rope_frequencies(config)
    yield 'rope_step', 'rows', config.head_dim, 'pos', frequencies, config.rope_amplitude, 'cos', 'sin'


def gpt(net, *_):
    yield from rope(net.config)
    yield from stack(net.model.layers, net.model.norm, net.lm_head)


def mamba(net, *_):
    yield from stack(net.backbone.layers, net.backbone.norm_f, net.lm_head)


def hybrid(net, *_):
    yield from rope(net.attention)
    if net.config.embed_norm:
        yield from calls(net.model.embed_norm, 0, 'x', 'x')
    yield from stack(net.model.layers, net.model.norm, net.lm_head)


PARTS = {
    RMSNorm: rms_norm,
    SwiGLU: swiglu,
    model_gpt.MoE: experts,
    model_gpt.Attention: attention,
    model_mamba.Mamba1Mixer: mamba1,
    model_mamba.Mamba2Mixer: mamba2,
    model_mamba.Mamba3Mixer: mamba3,
    model_hybrid.DeltaMixer: delta,
    model_gpt.Layer: gpt_layer,
    model_gpt.NormAfterLayer: gpt_norm_after_layer,
    model_mamba.Block: mamba_block,
    model_hybrid.Layer: hybrid_layer,
    model_gpt.GPT: gpt,
    model_mamba.Mamba: mamba,
    model_hybrid.Hybrid: hybrid,
}
EMBEDDINGS = nn.Embedding, quantize.Embedding
