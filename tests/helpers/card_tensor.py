"""Tensors of a pretended card: they say they are on cuda:0, and hold one of the CPU, or of no memory at all.

    x = CardTensor(torch.ones(3))       # x.device is cuda:0; x.inner is the CPU's
"""
import torch

CARD = torch.device('cuda', 0)
current = None          # the Card that is there now


class CardTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        outer = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CARD)
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return current.run(function, args, kwargs or {})

    def __repr__(self):
        return f'CardTensor({self.inner})'

    def __reduce_ex__(self, protocol):
        plain = self.inner.detach()
        if isinstance(self, torch.nn.Parameter):
            plain = torch.nn.Parameter(plain, self.requires_grad)
        return plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        raise NotImplementedError('tensor.data = … on a pretended card')

    def tolist(self):
        current.wait('tolist()')
        if self.inner.device.type == 'meta':
            return torch.ones(self.shape, dtype=self.dtype).tolist()
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                        'memory first.')
