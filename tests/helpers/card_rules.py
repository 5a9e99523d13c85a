"""What a card does with each of torch's operations: which of them it has, where the host waits for
it, how many kernels start.

    operation = describe(torch.ops.aten.add_.Tensor)    # an Operation, the same one each time
"""
import functools
from dataclasses import dataclass

import torch
from torch._library.custom_ops import OPDEFS

# They take tensors of the CPU beside the card's: indices go over by themselves, and the host waits.
MIXED = {'copy_', '_to_copy', 'index', 'index_put', 'index_put_', '_index_put_impl_'}
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_'}
# The size of their result depends on the data, so the host waits for it.
SIZED_BY_DATA = {
    'nonzero', 'masked_select', '_unique', '_unique2', 'unique_dim', 'unique_consecutive', 'equal', 'is_nonzero',
    'bincount', 'histc'}
# They start no kernel, though they are no views for the dispatcher.
WITHOUT_KERNEL = {
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', '_unsafe_view', '_reshape_alias',
    'lift_fresh', 'record_stream', 'resize_', 'set_', 'is_same_size', 'sym_size', 'sym_stride'}
# They have a kernel for a CPU and none for CUDA (torch's native_functions.yaml).
CPU_ONLY = {
    '_add_relu', '_add_relu_', '_convert_weight_to_int4pack_for_cpu', '_dyn_quant_matmul_4bit',
    '_dyn_quant_pack_4bit_weight', '_histogramdd_bin_edges', '_histogramdd_from_bin_cts',
    '_histogramdd_from_bin_tensors', '_scaled_dot_product_flash_attention_for_cpu',
    '_scaled_dot_product_flash_attention_for_cpu_backward', '_weight_int4pack_mm_for_cpu', 'from_file', 'histogram',
    'mkldnn_linear', 'mkldnn_rnn_layer', 'mkldnn_rnn_layer_backward', 'slow_conv3d_forward', 'to_mkldnn'}
# These products know no integers on CUDA ("addmm_cuda" not implemented for 'Long'), and do on a CPU.
PRODUCTS = {'mm', 'bmm', 'addmm', 'addmm_', 'baddbmm', 'baddbmm_', 'addmv', 'addmv_', 'mv', 'dot', 'vdot'}
# Namespaces of torch's own operations; those of others are made of them.
ANYWHERE = {'aten', 'prims', 'higher_order', 'profiler'}


@dataclass(frozen=True)
class Operation:
    """name: without its overload. is_view: what it returns lies in what it is given. writes:
    (index, name) of the arguments it writes to. returns_written: it returns those. made_of: the
    Python function that it is, of torch.library.custom_op; None of torch's own. is_missing: CUDA
    does not have it."""
    function: object
    name: str
    is_view: bool
    has_kernel: bool
    made_of: object
    is_missing: bool
    writes: tuple
    returns_written: bool

    def written(self, args, kwargs):
        """The arguments that it writes to, lists of tensors too."""
        return [args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes]


@functools.cache
def describe(function):
    schema = function._schema
    name = schema.name.partition('::')[2]
    aliases = [r.alias_info for r in schema.returns]
    made_of = None if function.namespace in ANYWHERE else python_of(schema.name)
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    writes = tuple((i, a.name) for i, a in enumerate(schema.arguments)
                   if a.alias_info is not None and a.alias_info.is_write)
    return Operation(
        function, name, is_view,
        has_kernel=not is_view and name not in WITHOUT_KERNEL,
        made_of=made_of,
        is_missing=name in CPU_ONLY or function.namespace not in ANYWHERE and made_of is None,
        writes=writes,
        returns_written=bool(writes) and any(alias is not None and alias.is_write for alias in aliases))


def python_of(name):
    """What computes on a card an operation of torch.library.custom_op; None if it is none, or for a CPU alone."""
    functions = getattr(OPDEFS.get(name), '_backend_fns', {})
    return functions.get('cuda') or functions.get(None)


def tensors_in(args, kwargs):
    """The tensors among arguments, in their lists, too."""
    tensors = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += [part for part in value if isinstance(part, torch.Tensor)]
    return tensors


def changed(values, change):
    """Arguments, or what an operation returned, with change(value) for each, in lists too."""
    if isinstance(values, (list, tuple)):
        return type(values)(changed(value, change) if isinstance(value, (list, tuple)) else change(value)
                            for value in values)
    return change(values)


def sized_by_data(operation, args, kwargs):
    """Whether the host must read from the card how large the result is."""
    name = operation.name
    if name == 'repeat_interleave':
        return kwargs.get('output_size') is None and isinstance(args[-1], torch.Tensor)
    if name in INDEXING:
        return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in SIZED_BY_DATA


def refusal(operation, tensors):
    """Why CUDA has no such operation on tensors like these, as torch says it; None if it has it."""
    if operation.is_missing:
        return NotImplementedError(
            f"Could not run '{operation.function.namespace}::{operation.name}' with arguments from the 'CUDA' backend.")
    if operation.name in PRODUCTS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        dtype = str(tensors[0].dtype).removeprefix('torch.')
        return NotImplementedError(f'"{operation.name}_cuda" not implemented for \'{dtype}\'')
    return None
