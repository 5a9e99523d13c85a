"""What torch asks a card of its own about, answered by a pretended one, and what it does before any operation is seen.

    with changed(card, through): ...    # through(): a mode that brings a thread's operations to the card

The list is kept short: what is changed here is not tested. An operation that is one kernel on a card is called as such
(attention, norm); flex_attention computes with its mask; a compiled function is the function.
"""
import contextlib
import functools
import sys
import threading
import types
from unittest import mock

import torch
import torch._dynamo  # noqa: F401, which looks through torch.cuda when it is imported
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.attention import flex_attention as flex
from torch.utils import _foreach_utils

from helpers import card_graph
from helpers.card_fused import attend, attend_backward, check_dtypes
from helpers.card_tensor import CARD, CardTensor

aten = torch.ops.aten
sdpa, norm, data_ptr = F.scaled_dot_product_attention, F.rms_norm, torch.Tensor.data_ptr
PlainGenerator = torch.Generator


class TritonMissing(RuntimeError):
    """As torch._inductor.exc.TritonMissing."""


# --- torch.cuda -----------------------------------------------------------------------------------

def cuda_functions(card):
    """{name: what torch.cuda has of that name}."""
    memory = card.memory
    properties = types.SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=memory.total,
        multi_processor_count=28, warp_size=32, is_integrated=False, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=101376, L2_cache_size=3 << 20)

    def set_fraction(fraction, device=None):
        memory.fraction = fraction

    def set_sync_debug_mode(mode):
        card.sync_debug = {0: 'default', 1: 'warn', 2: 'error'}.get(mode, mode)

    def nothing(*args, **kwargs):
        pass

    def alive(device=None):
        return memory.alive

    def set_device(device):
        """As torch's: 'cuda' alone, which names no card, is refused."""
        if not isinstance(device, int) and torch.device(device).index is None:
            raise ValueError(f'Expected a torch.device with a specified index or an integer, but got:{device}')

    def peak(device=None):
        return memory.peak

    return dict(
        is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        _exchange_device=lambda device: 0, _maybe_exchange_device=lambda device: 0,
        set_device=set_device, init=nothing,
        _lazy_init=nothing, _lazy_call=lambda call, **kwargs: call(), ipc_collect=nothing,
        synchronize=lambda device=None: card.wait('torch.cuda.synchronize'),
        get_device_name=lambda device=None: card.name,
        get_device_capability=lambda device=None: card.capability,
        get_device_properties=lambda device=None: properties,
        get_arch_list=lambda: ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120'],
        is_bf16_supported=lambda including_emulation=True: including_emulation or card.capability >= (8, 0),
        mem_get_info=lambda device=None: (memory.free, memory.total),
        memory_allocated=alive, memory_reserved=alive, max_memory_allocated=peak, max_memory_reserved=peak,
        memory_stats=lambda device=None: {
            'allocated_bytes.all.current': memory.alive, 'allocated_bytes.all.peak': memory.peak},
        reset_peak_memory_stats=lambda device=None: memory.reset_peak(), empty_cache=nothing,
        set_per_process_memory_fraction=set_fraction, set_sync_debug_mode=set_sync_debug_mode,
        manual_seed=nothing, manual_seed_all=nothing, seed=nothing, seed_all=nothing,
        # it draws from the CPU's generator, so that its numbers are the CPU's
        get_rng_state=lambda device='cuda': torch.get_rng_state(),
        set_rng_state=lambda state, device='cuda': torch.set_rng_state(state),
        **card_graph.classes(card))


# --- one kernel each ------------------------------------------------------------------------------

def attention_for(card):
    """F.scaled_dot_product_attention, by the kernel that a card takes."""

    @functools.wraps(sdpa)
    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(query, CardTensor):
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        q, k, v = autocast(query, key, value)
        check_dtypes('scaled_dot_product_attention', q, k, v)
        if enable_gqa:
            k, v = (u.repeat_interleave(q.shape[1] // u.shape[1], dim=1) for u in (k, v))
        mask = attn_mask
        is_half = q.dtype in (torch.float16, torch.bfloat16)
        P = q.shape[-1]
        if is_half and mask is None and P <= 256 and P % 8 == 0 and card.capability >= (8, 0):
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), float('-inf'))
        if P % (8 if is_half else 4) == 0:
            needs_sums = torch.is_grad_enabled() and any(u.requires_grad for u in (q, k, v))
            return aten._scaled_dot_product_efficient_attention(
                q, k, v, mask, needs_sums, dropout_p, is_causal, scale=scale)[0]
        return aten._scaled_dot_product_attention_math(q, k, v, mask, dropout_p, is_causal, scale=scale)[0]
    return attention


def rms_norm(input, normalized_shape, weight=None, eps=None):
    if not isinstance(input, CardTensor):
        return norm(input, normalized_shape, weight, eps)
    return aten._fused_rms_norm(input, normalized_shape, weight, eps)[0]


def autocast(*tensors):
    """As autocast gives them to a product."""
    if not torch.is_autocast_enabled('cuda'):
        return tensors
    dtype = torch.get_autocast_dtype('cuda')
    return [u.to(dtype) if u.is_floating_point() and u.dtype != torch.float64 else u for u in tensors]


def address(tensor):
    """Tensor.data_ptr, of the tensor inside."""
    return data_ptr(getattr(tensor, 'inner', tensor))


# --- flex_attention -------------------------------------------------------------------------------

class Flex(Function):
    """Attention with a mask: one kernel forward, two backward; it keeps q, k, v, y and a sum for each query."""

    @staticmethod
    def forward(ctx, card, q, k, v, bias, scale):
        with card.quiet():
            y, sums, _ = attend(q.inner, k.inner, v.inner, bias, 0.0, False, scale)
        card.launch('flex_attention')
        y, sums = card.take(y), card.take(sums)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.card, ctx.bias, ctx.scale = card, bias, scale
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        card = ctx.card
        with card.quiet():
            grads = attend_backward(grad.inner, q.inner, k.inner, v.inner, ctx.bias, 0.0, False, ctx.scale, None)[:3]
        for _ in range(2):
            card.launch('flex_attention_backward')
        return None, *map(card.take, grads), None, None


def flex_for(card):
    """flex_attention and create_block_mask of torch.nn.attention.flex_attention."""

    def create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN, device='cuda', **kwargs):
        i, j = torch.arange(Q_LEN, device=card.inner), torch.arange(KV_LEN, device=card.inner)
        with card.quiet():
            seen = mask_mod(torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long), i[:, None], j)
            bias = torch.zeros(Q_LEN, KV_LEN, device=card.inner).masked_fill(~seen, float('-inf'))
        return types.SimpleNamespace(bias=bias, shape=(1, 1, Q_LEN, KV_LEN), device=torch.device(device))

    def flex_attention(query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, **kwargs):
        q, k, v = autocast(query, key, value)
        check_dtypes('flex_attention', q, k, v)
        if q.shape[-1] < 16:
            raise ValueError('NYI: embedding dimension of the query must be at least 16')
        if enable_gqa:
            k, v = (u.repeat_interleave(q.shape[1] // u.shape[1], dim=1) for u in (k, v))
        if block_mask.shape[2:] != (q.shape[2], k.shape[2]):
            raise ValueError(f'block_mask was created for {block_mask.shape}, and the scores are '
                             f'{q.shape[2], k.shape[2]}')
        return Flex.apply(card, q, k, v, block_mask.bias, scale)
    return dict(flex_attention=flex_attention, create_block_mask=create_block_mask)


def compile_for(card):
    """torch.compile: gives back the function, or one that fails as Inductor without Triton."""

    def compile(model=None, **kwargs):
        if model is None:
            return functools.partial(compile, **kwargs)
        if card.compiles:
            return model

        @functools.wraps(model)
        def fail(*args, **kwargs):
            raise TritonMissing('Cannot find a working triton installation. Either the package is not installed or it '
                                'is too old.')
        return fail
    return compile


# --- generators and threads -----------------------------------------------------------------------

class Generator(torch.Generator):
    """A generator of the card, too: a CPU's, whose device is the card."""

    @staticmethod
    def __new__(cls, device='cpu'):
        generator = PlainGenerator.__new__(cls, 'cpu')
        generator.is_on_card = torch.device(device).type == 'cuda'
        return generator

    @property
    def device(self):
        return CARD if self.is_on_card else torch.device('cpu')


def drawing(function):
    """rand and its kind: torch compares a generator's device where this one's cannot be seen."""

    @functools.wraps(function)
    def draw(*args, **kwargs):
        generator, wanted = kwargs.get('generator'), torch.device(kwargs.get('device') or 'cpu').type
        if generator is not None and generator.device.type != wanted:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'")
        return function(*args, **kwargs)
    return draw


@contextlib.contextmanager
def in_thread(through):
    """Modes, and how autograd runs, are a thread's own."""
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)       # torch.tensor(…, device='cuda') is a copy that can be seen
    try:
        with torch.autograd.set_multithreading_enabled(False), through():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)


def running(through):
    """Thread.run, through the card."""
    run = threading.Thread.run

    def run_through(self):
        with in_thread(through):
            run(self)
    return run_through


# --- all of it ------------------------------------------------------------------------------------

@contextlib.contextmanager
def changed(card, through):
    """Within, torch is as with this card."""
    from mambino.kernels import triton_kernels  # with a planted fault it is another one each time
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        def change(owner, **values):
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        change(torch.cuda, **cuda_functions(card))
        change(torch.version, cuda='13.0')
        change(torch.accelerator, synchronize=lambda device=None: card.wait('torch.accelerator.synchronize'))
        change(torch, compile=compile_for(card), Generator=Generator, rms_norm=rms_norm,
               **{name: drawing(getattr(torch, name)) for name in ('rand', 'randn', 'randint', 'randperm')})
        change(F, scaled_dot_product_attention=attention_for(card), rms_norm=rms_norm)
        change(torch.Tensor, data_ptr=address)
        change(flex, **flex_for(card))
        change(threading.Thread, run=running(through))
        change(triton_kernels, has_triton=lambda: False)        # which would start kernels
        for name in ('torch.cuda.amp.common', 'torch.amp.autocast_mode', 'torch.amp.grad_scaler'):
            module = sys.modules.get(name)
            if hasattr(module, 'amp_definitely_not_available'):
                change(module, amp_definitely_not_available=lambda: False)
        change(_foreach_utils, _foreach_supported_types=[*_foreach_utils._foreach_supported_types, CardTensor])
        # a module's parameters stay what they are while their tensors move
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(in_thread(through))
        try:
            yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
