"""Smaller weights for generation: 16, 8 or 4 bits a weight in place of 32, computed with in fp32.

    python sample.py --quantize=int4                        # or int8, bfloat16
    python export.py --format=native --quantize=int8        # writes a checkpoint of it

    net = loading.model_of(ckpt)
    quantize_model(net, 'int8')         # in place; from now on it generates, and cannot be trained

One token reads every weight once, so on a CPU its time is that of reading them: half the bytes,
half the time. Nothing but weights is rounded, and they are rounded once:

    bfloat16    the upper 16 of the 32 bits
    int8        a row's weights = its scale times -127 to 127
    int4        64 weights side by side in a row = scale times 0 to 15, plus zero; of the ways to
                choose the two the one whose squared error is least. Embeddings and the head, on
                which more depends, are int8

It takes the matrices of the projections, of experts, the embedding and the head. Norms,
convolutions, A, D, the projections of dt, of all of Mamba-3's scalars (the last rows of its
in_proj), biases and routers are small, and stay as they are. A
state dict holds what is below, as it is used: `codes`, and `scales` beside them.

Letters of the shapes: N rows, K columns, E experts; a group is 64 columns.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.kernels import cpu, native
from mambino.language_model import product_dtype, swiglu
from model_gpt import Experts, experts_swiglu
from model_mamba import Mamba3Mixer, TimeStep

PRECISIONS = ('bfloat16', 'int8', 'int4')
GROUP = 64                              # columns that share a scale and a zero in int4
FEW = 64                                # tokens that experts on a GPU compute without a wait of the host
UNPACKED = 192                          # rows from which bf16 is sooner multiplied as fp32, see below
EXACT = ('gate', 'controller')          # routers: what they choose must not depend on rounding
# parts of a group's range that int4 tries to cover
RANGES = (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


# --- from fp32 to codes ---------------------------------------------------------------------------

def to_int8(weight):
    """(N, K) → codes (N, K) int8, scales (N,)."""
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales.clamp(min=1e-30)[:, None]).round()
    return codes.to(torch.int8), scales


def to_int4(weight):
    """(N, K) → codes (N, K / 2 rounded up to whole groups) uint8, scales (N, groups, 2) bf16, scale
    and zero.

    Ranges from all of a group's down to half of it are tried, and each range's scale and zero
    fitted again to the codes it gives."""
    padding = weight[:, -1:].expand(-1, -weight.shape[1] % GROUP)
    w = torch.cat((weight, padding), 1).unflatten(1, (-1, GROUP))           # (N, groups, 64)
    mean = w.mean(-1, keepdim=True)
    low = w.amin(-1, keepdim=True)
    high = w.amax(-1, keepdim=True)
    least_error = torch.full_like(low, torch.inf)
    codes = None
    best = None                                         # codes, scale, zero of the least error
    for part in RANGES:
        scale = part * (high - low) / 15
        zero = (low + high) / 2 - part * (high - low) / 2
        for fit in range(3):
            if fit:                                     # least squares: w ~ scale codes + zero
                mean_code = codes.mean(-1, keepdim=True)
                centred = codes - mean_code
                variance = centred.square().sum(-1, keepdim=True).clamp(min=1)
                scale = (centred * (w - mean)).sum(-1, keepdim=True) / variance
                zero = mean - scale * mean_code
            scale = scale.bfloat16().float()
            zero = zero.bfloat16().float()
            codes = ((w - zero) / scale.clamp(min=1e-30)).round().clamp(0, 15)
            error = (codes * scale + zero - w).square().sum(-1, keepdim=True)
            better = error < least_error
            least_error = torch.where(better, error, least_error)
            new = (codes, scale, zero)
            best = [torch.where(better, a, b) for a, b in zip(new, best or new)]
    codes, scale, zero = best
    # columns 0 to 31, and 32 to 63
    first, second = codes.to(torch.uint8).unflatten(-1, (2, -1)).unbind(-2)
    return (first | second << 4).flatten(1), torch.cat((scale, zero), -1).bfloat16()


ENCODERS = {'int8': to_int8, 'int4': to_int4}


# --- modules --------------------------------------------------------------------------------------

class Matrix(nn.Module):
    """A matrix (N, K), or a stack of E of them, (E, N, K), as it is kept in a precision: its codes,
    and scales.

                 codes                          scales
    bfloat16     (N, K) bfloat16                none
    int8         (N, K) int8                    (N,) fp32
    int4         (N, groups * 32) uint8         (N, groups, 2) bfloat16"""

    def __init__(self, shape, precision):
        super().__init__()
        *stack, rows, columns = shape
        groups = -(-columns // GROUP)
        self.rows = rows
        self.columns = columns
        self.precision = precision
        if precision == 'bfloat16':
            self.register_buffer('codes', torch.zeros(*stack, rows, columns, dtype=torch.bfloat16))
        elif precision == 'int8':
            self.register_buffer('codes', torch.zeros(*stack, rows, columns, dtype=torch.int8))
            self.register_buffer('scales', torch.zeros(*stack, rows))
        elif precision == 'int4':
            self.register_buffer('codes', torch.zeros(*stack, rows, groups * 32, dtype=torch.uint8))
            scales = torch.zeros(*stack, rows, groups, 2, dtype=torch.bfloat16)
            self.register_buffer('scales', scales)
        else:
            raise ValueError(f'there is no {precision}, only {", ".join(PRECISIONS)}')

    @torch.no_grad()
    def fill(self, weight):
        """Rounds this weight, fp32, and keeps it."""
        weight = weight.detach().float()
        if self.precision == 'bfloat16':
            self.codes.copy_(weight)
            return self
        encode = ENCODERS[self.precision]
        if weight.ndim == 2:
            codes, scales = encode(weight)
            self.codes.copy_(codes)
            self.scales.copy_(scales)
            return self
        for e, expert in enumerate(weight):
            codes, scales = encode(expert)
            self.codes[e].copy_(codes)
            self.scales[e].copy_(scales)
        return self

    @property
    def weight(self):
        """The rounded matrix in fp32."""
        return self.dequantize(self.codes, getattr(self, 'scales', None))

    def dequantize(self, codes, scales):
        """Rows of codes with their scales as fp32, (…, K)."""
        if self.precision == 'bfloat16':
            return codes.float()
        if self.precision == 'int8':
            return codes.float() * scales[..., None]
        scale, zero = scales.float().unsqueeze(-1).unbind(-2)               # (…, groups, 1)
        return (unpacked(codes).float() * scale + zero).flatten(-2)[..., :self.columns]

    def dequantize_to(self, dtype, codes, scales):
        """dequantize, rounded to dtype, on a GPU: fewer bytes are read and written on the way."""
        if self.precision == 'bfloat16':
            return codes.to(dtype)
        if self.precision == 'int8' or dtype != torch.bfloat16:
            return self.dequantize(codes, scales).to(dtype)
        scale, zero = scales.unsqueeze(-1).unbind(-2)                       # bf16, as what is made of them
        return torch.addcmul(zero, unpacked(codes).to(dtype), scale).flatten(-2)[..., :self.columns]

    def product(self, x, codes, scales):
        """x (…, K) @ matrix.T, of these codes and scales → (…, N)."""
        if x.dtype == torch.float32 and x.numel() and cpu.applies(x) and not self.is_sooner_unpacked(x):
            multiply = native.linear if native.few(x) else native.tiles
            return multiply(x, codes, scales)
        if x.device.type != 'cpu':
            return self.product_on_gpu(x, codes, scales)
        return F.linear(x, self.dequantize(codes, scales).to(x.dtype))

    def product_on_gpu(self, x, codes, scales):
        """x (…, K) → (…, N). There are no kernels of such products there: a matrix is made for each, of 16 bits."""
        dtype = product_dtype(x)
        if self.precision == 'int8' and dtype == torch.bfloat16:            # which has 127 exactly
            return (F.linear(x, codes.to(dtype)) * scales).to(dtype)
        return F.linear(x, self.dequantize_to(dtype, codes, scales))

    def is_sooner_unpacked(self, x):
        """Whether rows x (…, K) are so many that their product is sooner PyTorch's, with the matrix in fp32:
        of bf16, on a processor that does not multiply it."""
        many = x.numel() >= UNPACKED * x.shape[-1]
        return many and self.precision == 'bfloat16' and not cpu.multiplies(torch.bfloat16)

    def train(self, mode=True):
        if mode:
            raise ValueError(f'{self.precision} weights cannot be trained; train the model they were '
                             'made from')
        return super().train(mode)


def unpacked(codes):
    """int4 codes (…, groups * 32), two a byte → (…, groups, 64), one a byte."""
    codes = codes.unflatten(-1, (-1, 1, 32))                                # (…, groups, 1, 32)
    return torch.cat((codes & 15, codes >> 4), -2).flatten(-2)


class Linear(Matrix):
    """nn.Linear, for generation; its bias, if it has one, is as it was."""

    def __init__(self, shape, precision, bias=None):
        super().__init__(shape, precision)
        self.bias = bias

    def forward(self, x):
        y = self.product(x, self.codes, getattr(self, 'scales', None))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PartlyExact(Linear):
    """A Linear without a bias whose last rows are as they were, `exact` (n, K) fp32. x (…, K) → (…, rows + n)."""

    def __init__(self, shape, precision, n):
        super().__init__((shape[0] - n, shape[1]), precision)
        self.register_buffer('exact', torch.zeros(n, shape[1]))

    def fill(self, weight):
        self.exact.copy_(weight[self.rows:])
        return super().fill(weight[:self.rows])

    @property
    def weight(self):
        return torch.cat((super().weight, self.exact))

    def forward(self, x):
        if x.dtype == torch.float32 and x.numel() and cpu.applies(x) and native.few(x):
            exact = native.linear(x, self.exact, None)
        else:
            exact = F.linear(x, self.exact.to(x.dtype))
        return torch.cat((super().forward(x), exact), -1)


class Embedding(Matrix):
    """nn.Embedding, for generation."""

    def forward(self, idx):
        scales = None if self.precision == 'bfloat16' else self.scales[idx]
        codes = self.codes.index_select(0, idx.flatten()).unflatten(0, idx.shape)   # IndexError below 0, too
        return self.dequantize(codes, scales)


class QuantizedExperts(nn.Module):
    """Experts, of model_gpt.py, for generation. x (n, D) and Pairs → (n k, D)."""

    def __init__(self, gate_up_shape, down_shape, precision):
        super().__init__()
        self.gate_up_proj = Matrix(gate_up_shape, precision)
        self.down_proj = Matrix(down_shape, precision)

    def forward(self, x, pairs):
        if x.device.type != 'cpu' and len(x) <= FEW:
            return self.without_waiting(x, pairs)
        outputs = []
        for e, token in enumerate(pairs.token.split(pairs.counts.tolist())):
            if len(token):
                rows = x.index_select(0, token)
                gate, up = self.expert(self.gate_up_proj, e, rows).chunk(2, -1)
                outputs.append(self.expert(self.down_proj, e, swiglu(gate, up)))
        return torch.cat(outputs)

    def without_waiting(self, x, pairs):
        """forward of a few tokens on a GPU, which says to nobody how many pairs an expert has."""
        matrices = self.gate_up_proj, self.down_proj
        codes = [matrix.codes for matrix in matrices]
        scales = [getattr(matrix, 'scales', None) for matrix in matrices]
        are_few = len(pairs.token) < len(codes[0])
        if are_few:                                                         # only those that are asked for
            codes, scales = ([None if part is None else part.index_select(0, pairs.expert) for part in parts]
                             for parts in (codes, scales))
        gate_up, down = (matrix.dequantize_to(x.dtype, *parts) for matrix, *parts in zip(matrices, codes, scales))
        if not are_few:
            return experts_swiglu(x, pairs, gate_up, down)
        gate, up = (x.index_select(0, pairs.token)[:, None] @ gate_up.mT).chunk(2, -1)      # (n k, 1, I) each
        return (swiglu(gate, up) @ down.mT)[:, 0]

    @staticmethod
    def expert(matrix, e, x):
        """x times the matrix of expert e."""
        scales = None if matrix.precision == 'bfloat16' else matrix.scales[e]
        return matrix.product(x, matrix.codes[e], scales)


# --- models ---------------------------------------------------------------------------------------

@torch.no_grad()
def quantize_model(net, precision):
    """Rounds the weights of a model in place to 'bfloat16', 'int8' or 'int4'; returns it.
    ValueError if that cannot be done."""
    return replace_matrices(net, precision, fill=True)


@torch.no_grad()
def prepare_quantized(net, precision):
    """Makes a model, in place, one that loads the state dict of a quantised one; returns it."""
    return replace_matrices(net, precision, fill=False)


def replace_matrices(net, precision, fill):
    """Puts modules of this precision into the place of those that have matrices, with their rounded
    weights if `fill`."""
    if precision not in PRECISIONS:
        raise ValueError(f'there is no {precision}, only {", ".join(PRECISIONS)}')
    if any(isinstance(module, Matrix) for module in net.modules()):
        raise ValueError('the weights have been rounded before; begin with the model they were made '
                         'from')
    embedding = net.embedding()
    tied = net.lm_head.weight is embedding.weight
    careful = 'int8' if precision == 'int4' else precision      # of the embedding and the head
    exact_rows = rows_of_scalars(net)

    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if module is embedding:
                new = Embedding(module.weight.shape, careful)
                if fill:
                    new.fill(module.weight)
            elif isinstance(module, Experts):
                new = QuantizedExperts(module.gate_up_proj.shape, module.down_proj.shape, precision)
                if fill:
                    new.gate_up_proj.fill(module.gate_up_proj)
                    new.down_proj.fill(module.down_proj)
            elif module in exact_rows:
                new = PartlyExact(module.weight.shape, precision, exact_rows[module])
                if fill:
                    new.fill(module.weight)
            elif is_rounded(module, name, tied):
                new = Linear(module.weight.shape, careful if name == 'lm_head' else precision, module.bias)
                if fill:
                    new.fill(module.weight)
            else:
                continue
            keep_adapters(module, new)
            setattr(parent, name, new.to(next(module.parameters()).device))
    if tied:
        net.lm_head = Linear(embedding.weight.shape, careful)
        net.lm_head._buffers = net.embedding()._buffers     # the same, wherever they are moved to
    net.quantized = precision
    return net.eval()


def rows_of_scalars(net):
    """{matrix: how many of its last rows make a Mamba-3's dt, A, trap and angles}: what they say of one token all
    later ones are decayed and turned by."""
    mixers = [module for module in net.modules() if isinstance(module, Mamba3Mixer)]
    return {getattr(mixer.in_proj, 'up', mixer.in_proj): sum(mixer.split[4:]) for mixer in mixers}


def is_rounded(module, name, tied):
    """Whether a module of a layer, or the head, is a matrix that is rounded; a tied head is the
    embedding."""
    if not isinstance(module, nn.Linear) or isinstance(module, TimeStep) or name in EXACT:
        return False
    return not (tied and name == 'lm_head')


def keep_adapters(old, new):
    """An adapter that hangs on a module hangs on the new one, as it is."""
    for name, module in old.named_children():
        new.add_module(name, module)
    new._forward_hooks.update(old._forward_hooks)
