"""Matrices that are not quantised, for generation. In place, by loading.prepare_model:

    read_few_rows(net)              # on a CPU, fp32: a few rows, a short prompt's, by native.cpp
    keep_rounded(net, 'bfloat16')   # on a GPU: the 16 bits that autocast would make of them each time
    lay_together(net)               # there, too: q, k, v one behind another

PyTorch packs a matrix on a CPU before it multiplies, which takes longer than the products of a few rows
do. On a GPU a token reads every weight once: 2 bytes each, where autocast alone reads 4, writes and reads 2.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from mambino.kernels import cpu, native
from mambino.weights.quantize import EXACT
from model_gpt import Experts

MOST = 32       # rows of prompts that are few


class Dense(nn.Linear):
    """nn.Linear, whose gradients are PyTorch's."""

    def forward(self, x):                                       # (…, K) → (…, N)
        is_few = x.numel() and native.few(x, MOST)
        plain = x.dtype == self.weight.dtype == torch.float32 and self.weight.is_contiguous()
        if is_few and plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu') and cpu.applies(x):
            y = native.linear(x, self.weight, None)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Rounded(nn.Linear):
    """nn.Linear, whose weight has 16 bits, as autocast would round it."""

    def forward(self, x):                                       # (…, K) → (…, N)
        dtype = self.weight.dtype
        return F.linear(x.to(dtype), self.weight, None if self.bias is None else self.bias.to(dtype))


def matrices(net):
    """The Linears of a model, all but routers."""
    for name, module in net.named_modules():
        if type(module) is nn.Linear and name.rpartition('.')[2] not in EXACT:
            yield module


def read_few_rows(net):
    """Makes the matrices of a model Dense."""
    for module in matrices(net):
        module.__class__ = Dense
    return net


def keep_rounded(net, dtype):
    """Keeps the matrices of a model, experts' too, in 'bfloat16' or 'float16'; computed with under autocast of
    that precision they give what they gave. An embedding stays as it is, also where the head was the same."""
    dtype = getattr(torch, dtype)

    def rounded(weight):
        return nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    for module in list(matrices(net)):
        module.weight = rounded(module.weight)
        module.__class__ = Rounded
    for module in net.modules():
        if type(module) is Experts:
            module.gate_up_proj, module.down_proj = rounded(module.gate_up_proj), rounded(module.down_proj)
    return net


TOGETHER = ('q_proj', 'k_proj', 'v_proj'), ('gate_proj', 'up_proj')


def lay_together(net):
    """Lays matrices that read the same x behind one another: a token multiplies by them at once (kernels/one_token.py).
    For generation on a GPU; a model that is moved or copied loses it."""
    for module in net.modules():
        for names in TOGETHER:
            parts = [getattr(module, name, None) for name in names]
            if not all(isinstance(part, nn.Linear) and part.bias is None for part in parts):
                continue
            weights = torch.cat([part.weight.detach() for part in parts])
            for part, rows in zip(parts, weights.split([len(part.weight) for part in parts])):
                part.weight = nn.Parameter(rows, requires_grad=False)
    return net
