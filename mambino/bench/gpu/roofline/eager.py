"""Operations of one micro-step as PyTorch computes it without a compiler, counted where nothing is
computed: the model on fake tensors (sizes without data), each operation as a card would be sent it.

The models take their paths for any machine (mambino/kernels/anywhere.py), and where a card has one
kernel for what the CPU's tensors need several operations for, that kernel stands for them:
rms_norm. What a card's own kernels (mambino/kernels/cuda.py, triton_*.py) do better is not counted
here."""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mambino import machine
from mambino.bench.gpu.roofline import standins
from mambino.bench.gpu.roofline.cards import Op
from mambino.kernels import portable
from mambino.weights import checkpoint

aten = torch.ops.aten
FILLS = {'zeros', 'zero_', 'fill_', 'new_zeros', 'zeros_like', 'ones_like', 'full_like', 'full',
         'ones', 'new_full',
         'new_ones', 'scalar_tensor', 'arange'}
NO_KERNEL = {'empty', 'empty_like', 'new_empty', 'new_empty_strided', 'empty_strided',
             '_local_scalar_dense', 'detach',
             'lift_fresh', 'alias', '_unsafe_view', '_reshape_alias'}
GATHERS = {'embedding', 'index', 'gather', 'index_select'}
CAST = 'cast of a weight'
HALF = torch.bfloat16, torch.float16
ATTENTION = {   # and how much of the forward pass's products each has: the backward pass makes one of two again
    '_scaled_dot_product_flash_attention_for_cpu': 1.0,
    '_scaled_dot_product_flash_attention_for_cpu_backward': 2.5}


def unique_bytes(tensor):
    """Bytes of a tensor that are different memory: those of an expanded dimension count once."""
    n = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride()):
        n *= size if stride else 1
    return n


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def attention_flops(name, args):
    """Of the products of causal attention, of which a flash kernel makes half. args begin with q,
    k, v of (B, H, T, P), in the backward pass with the gradient before them."""
    q, k = args[:2] if name.endswith('_for_cpu') else args[1:3]
    B, H, T, P = q.shape
    return ATTENTION[name] * 4 * B * H * T * k.shape[2] * P / 2


def is_view(func):
    """Whether an operation makes no kernel: it gives another view of its input, or memory."""
    return func.is_view or func.namespace == 'prim' or func.overloadpacket.__name__ in NO_KERNEL


def op_of(phase, func, args, kwargs, out):
    """The Op of an operation."""
    name = func.overloadpacket.__name__
    if name == '_to_copy' and isinstance(args[0], torch.nn.Parameter) and args[0].dim() > 1:
        return Op(phase, CAST, unique_bytes(args[0]) + unique_bytes(out))
    if name in standins.COSTS:
        return Op(phase, name, *standins.COSTS[name](name, args), 'scan')
    inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
    written = sum(map(unique_bytes, outputs))
    read = sum(map(unique_bytes, inputs))
    if name in FILLS:
        read = 0
    elif name in GATHERS:
        read = written
    elif name == 'embedding_dense_backward':
        read, written = unique_bytes(inputs[0]), 2 * written
    elif name == 'copy_':
        read = sum(map(unique_bytes, inputs[1:]))
    elif kwargs.get('out') is not None:
        read -= written
    doubles = sum(t.numel() for t in outputs if t.dtype == torch.float64)
    doubles = doubles or max((t.numel() for t in inputs if t.dtype == torch.float64), default=0)
    other = ('out', 'dtype', 'out_dtype')
    given = {key: value for key, value in kwargs.items() if key not in other}
    return Op(phase, name, read + written, *products(func, args, given, out), doubles)


def products(func, args, kwargs, out):
    """(FLOPs, in which numbers) of an operation's products."""
    packet = getattr(func, 'overloadpacket', None)
    name = getattr(packet, '__name__', '')
    if name in ATTENTION:
        return attention_flops(name, args), 'attention'
    if packet not in flop_registry:
        return 0, 'half'
    flops = flop_registry[packet](*args, **kwargs, out_val=out)
    is_half = all(t.dtype in HALF for t in tensors_in(args) if t.dim() > 1)
    return flops, 'half' if is_half else 'full'


class Counter(TorchDispatchMode):
    """Notes an Op for each operation within."""

    def __init__(self):
        super().__init__()
        self.phase = None           # None: nothing is noted
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.phase is None and func is aten._local_scalar_dense.default:
            return 1.0              # what a weight's initialisation may ask for
        out = func(*args, **kwargs)
        if self.phase and not is_view(func) and (tensors_in(args) or tensors_in(out)):
            self.ops.append(op_of(self.phase, func, args, kwargs, out))
        return out


def count(kind, config, B, T, loss_chunk=0, functions=()):
    """[Op] of forward and backward of one micro-step in bf16, where gradients are there already.
    functions: standins for a card's kernels, beside rms_norm."""
    stand = standins.in_place(standins.rms_norm, *functions, loss_chunk=loss_chunk)
    with portable(), FakeTensorMode(), Counter() as counter, stand:
        net = checkpoint.build(kind, config).train()
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        idx = torch.zeros(B, T, dtype=torch.long)
        counter.phase = 'forward'
        with machine.autocast('cpu', 'bfloat16'):
            loss = net(idx, idx)[1]
        counter.phase = 'backward'
        loss.backward()
        counter.phase = None
    return counter.ops
