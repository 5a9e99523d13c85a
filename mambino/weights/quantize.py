"""Smaller weights for generation: 16, 8 or 4 bits a weight in place of 32, computed with in fp32.

    python sample.py --quantize=int4                        # or int8, bfloat16
    python export.py --format=mambino --quantize=int8       # writes a checkpoint of it

    net = loading.model_of(ckpt)
    quantize.quantize(net, 'int8')                          # in place; from now on it generates, and cannot be trained

One token reads every weight once, so on a CPU its time is that of reading them: half the bytes, half the time. Nothing but weights is
rounded, and they are rounded once:

    bfloat16    the upper 16 of the 32 bits
    int8        a row's weights = its scale times -127 to 127
    int4        64 weights side by side in a row = scale times 0 to 15, plus zero; of the ways to choose the two the one whose squared
                error is least. Embeddings and the head, on which more depends, are int8

It takes the matrices of the projections, of experts, the embedding and the head. Norms, convolutions, A, D, the projections of dt, biases
and routers are small, and stay as they are. A state dict holds what is below, as it is used: `codes`, and `scales` beside them.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.kernels import native
from mambino.kernels import ops
from model_gpt import Experts
from model_mamba import TimeStep

WAYS = ('bfloat16', 'int8', 'int4')
GROUP = 64                                                  # columns that share a scale and a zero in int4
EXACT = ('gate', 'controller')                              # routers: what they choose must not depend on rounding


# --- numbers ----------------------------------------------------------------------------------------------------------

def to_int8(weight):
    """(N, K) → codes (N, K) int8, scales (N,)."""
    scales = weight.abs().amax(1) / 127
    return (weight / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8), scales


def to_int4(weight):
    """(N, K) → codes (N, K / 2 rounded up to whole groups) uint8, scales (N, groups, 2) bf16, scale and zero.

    Ranges from all of a group's down to half of it are tried, and each range's scale and zero fitted again to the codes it gives."""
    w = torch.cat((weight, weight[:, -1:].expand(-1, -weight.shape[1] % GROUP)), 1).unflatten(1, (-1, GROUP))   # (N, groups, 64)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    least, codes, best, mean = torch.full_like(low, torch.inf), None, None, w.mean(-1, keepdim=True)
    for part in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5):
        scale, zero = part * (high - low) / 15, (low + high) / 2 - part * (high - low) / 2
        for fit in range(3):
            if fit:                                                                         # least squares: w ~ scale codes + zero
                centred = codes - codes.mean(-1, keepdim=True)
                scale = (centred * (w - mean)).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp(min=1)
                zero = mean - scale * codes.mean(-1, keepdim=True)
            scale, zero = scale.bfloat16().float(), zero.bfloat16().float()
            codes = ((w - zero) / scale.clamp(min=1e-30)).round().clamp(0, 15)
            error = (codes * scale + zero - w).square().sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = [torch.where(better, new, old) for new, old in zip((codes, scale, zero), best or (codes, scale, zero))]
    codes, scale, zero = best
    low, high = codes.to(torch.uint8).unflatten(-1, (2, -1)).unbind(-2)                     # columns 0 to 31, and 32 to 63
    return (low | high << 4).flatten(1), torch.cat((scale, zero), -1).bfloat16()


class Matrix(nn.Module):
    """A matrix (rows, columns), or of E of them a stack, and how it is kept: its codes, and scales."""

    def __init__(self, shape, how):
        super().__init__()
        (*stack, rows, columns), groups = shape, -(-shape[-1] // GROUP)
        self.rows, self.columns, self.how = rows, columns, how
        kept, dtype = (columns, torch.bfloat16) if how == 'bfloat16' else (columns, torch.int8) if how == 'int8' else (groups * 32, torch.uint8)
        self.register_buffer('codes', torch.zeros(*stack, rows, kept, dtype=dtype))
        if how != 'bfloat16':
            self.register_buffer('scales', torch.zeros(*stack, rows) if how == 'int8' else
                                 torch.zeros(*stack, rows, groups, 2, dtype=torch.bfloat16))

    @torch.no_grad()
    def fill(self, weight):
        """Rounds this weight, fp32, and keeps it."""
        weight = weight.detach().float()
        if self.how == 'bfloat16':
            self.codes.copy_(weight)
        elif weight.ndim == 3:
            for codes, scales, one in zip(self.codes, self.scales, weight):
                for to, new in zip((codes, scales), (to_int8 if self.how == 'int8' else to_int4)(one)):
                    to.copy_(new)
        else:
            for to, new in zip((self.codes, self.scales), (to_int8 if self.how == 'int8' else to_int4)(weight)):
                to.copy_(new)
        return self

    @property
    def weight(self):
        """The rounded matrix in fp32."""
        return self.numbers(self.codes, getattr(self, 'scales', None))

    def numbers(self, codes, scales):
        """Rows of codes with their scales as fp32."""
        if self.how == 'bfloat16':
            return codes.float()
        if self.how == 'int8':
            return codes.float() * scales[..., None]
        codes = codes.unflatten(-1, (-1, 1, 32))
        codes = torch.cat((codes & 15, codes >> 4), -2).flatten(-2).float()                # (..., groups, 64)
        scale, zero = scales.float().unsqueeze(-1).unbind(-2)
        return (codes * scale + zero).flatten(-2)[..., :self.columns]

    def product(self, x, codes, scales):
        """x (..., columns) @ matrix.T, of these codes and scales."""
        if x.dtype == torch.float32 and native.few(x) and ops.use_native(x):
            return native.linear(x, codes, scales)
        return F.linear(x, self.numbers(codes, scales).to(x.dtype))

    def train(self, mode=True):
        if mode:
            raise ValueError(f'{self.how} weights cannot be trained; train the model they were made from')
        return super().train(mode)


class Linear(Matrix):

    def forward(self, x):
        return self.product(x, self.codes, getattr(self, 'scales', None))


class Embedding(Matrix):

    def forward(self, idx):
        return self.numbers(self.codes[idx], None if self.how == 'bfloat16' else self.scales[idx])


class QuantizedExperts(nn.Module):
    """Experts, of model_gpt.py, for generation."""

    def __init__(self, gate_up, down, how):
        super().__init__()
        self.gate_up_proj, self.down_proj = Matrix(gate_up, how), Matrix(down, how)

    def forward(self, x, counts):
        out, each = [], [list(zip(m.codes, getattr(m, 'scales', m.codes))) for m in (self.gate_up_proj, self.down_proj)]
        for rows, up, down in zip(x.split(counts.tolist()), *each):
            if len(rows):
                out.append(self.down_proj.product(ops.swiglu(*self.gate_up_proj.product(rows, *up).chunk(2, -1)), *down))
        return torch.cat(out)


# --- models -----------------------------------------------------------------------------------------------------------

def replace(net, how, fill):
    """Puts modules of this kind into the place of those that have matrices, with their rounded weights if `fill`."""
    if how not in WAYS:
        raise ValueError(f'there is no {how}, only {", ".join(WAYS)}')
    if any(isinstance(module, Matrix) for module in net.modules()):
        raise ValueError('the weights have been rounded before; begin with the model they were made from')
    careful = 'int8' if how == 'int4' else how
    embedding, tied = net.embedding(), net.lm_head.weight is net.embedding().weight

    def put(parent, name, new, *weights):
        old = getattr(parent, name)
        for module, weight in zip((new,) if isinstance(new, Matrix) else (new.gate_up_proj, new.down_proj), weights if fill else ()):
            module.fill(weight)
        for hung, part in old.named_children():                                             # an adapter stays, as it is
            new.add_module(hung, part)
        new._forward_hooks.update(old._forward_hooks)
        setattr(parent, name, new.to(weights[0].device))

    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if module is embedding:
                put(parent, name, Embedding(module.weight.shape, careful), module.weight)
            elif isinstance(module, Experts):
                put(parent, name, QuantizedExperts(module.gate_up_proj.shape, module.down_proj.shape, how), module.gate_up_proj, module.down_proj)
            elif isinstance(module, nn.Linear) and not isinstance(module, TimeStep) and name not in EXACT and not (tied and name == 'lm_head'):
                put(parent, name, Linear(module.weight.shape, careful if name == 'lm_head' else how), module.weight)
    if tied:
        net.lm_head = Linear(embedding.weight.shape, careful)
        net.lm_head._buffers = net.embedding()._buffers                                     # the same, wherever they are moved to
    net.quantized = how
    return net.eval()


@torch.no_grad()
def quantize(net, how):
    """Rounds the weights of a model in place: how is 'bfloat16', 'int8' or 'int4'. ValueError where that cannot be done."""
    return replace(net, how, True)


@torch.no_grad()
def prepare(net, how):
    """Makes a model, in place, one that loads the state dict of a quantized one."""
    return replace(net, how, False)
