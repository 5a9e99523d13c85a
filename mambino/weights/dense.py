"""Matrices in fp32, for generation on a CPU: a few rows, a short prompt's, are multiplied by native.cpp.

    read_few_rows(net)      # in place; loading.prepare_model does so

PyTorch packs a matrix before it multiplies, which takes longer than the products of a few rows do.
"""
import torch
import torch.nn as nn

from mambino.kernels import cpu, native
from mambino.weights.quantize import EXACT

MOST = 32       # rows of prompts that are few


class Dense(nn.Linear):
    """nn.Linear without a bias; its gradients are PyTorch's."""

    def forward(self, x):                                       # (…, K) → (…, N)
        is_few = x.numel() and native.few(x, MOST)
        plain = x.dtype == self.weight.dtype == torch.float32 and self.weight.is_contiguous()
        if is_few and plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu') and cpu.applies(x):
            return native.linear(x, self.weight, None)
        return super().forward(x)


def read_few_rows(net):
    """Makes the Linears of a model Dense, all but routers and those with a bias."""
    for name, module in net.named_modules():
        if type(module) is nn.Linear and module.bias is None and name.rpartition('.')[2] not in EXACT:
            module.__class__ = Dense
    return net
