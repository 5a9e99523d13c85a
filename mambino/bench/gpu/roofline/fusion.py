"""Which operations of a graph a compiler makes one kernel of, and what bytes each kernel then
moves.

An estimate of what Inductor does on a card, in its two stages, by its rules as far as they decide
about bytes:

    products, attention, sorts      kernels of a library, each by itself: it reads its operands and
                                    writes its result
    views                           no kernel: they name memory that is there
    all else, number by number      is written into what reads it (and so computed again there), unless
                                    it must be in memory: as an operand of a library, as a result, or
                                    where several read it and it reads more than READS tensors
    sums along a dimension          are in memory; what they sum up is written into them

    two kernels become one          if they share memory, walk over the same numbers, sum up along the
                                    same dimension if both do, and no way leads from one to the other
                                    through a third; those that share most first

A kernel reads what comes from outside it, each memory once, and writes what is read outside it.
Memory counts as shared only where both walk over it in the same order, or both in another than it
lies in. Not known here: more of the indices than that, and where Inductor splits a long sum into
two kernels."""
import operator
from collections import defaultdict
from functools import cached_property

import torch
from torch.utils.flop_counter import flop_registry

from mambino.bench.gpu.roofline import standins
from mambino.bench.gpu.roofline.cards import Op
from mambino.bench.gpu.roofline.eager import ATTENTION, CAST, GATHERS, products

VIEWS = {
    'view', 'permute', 'transpose', 't', 'expand', 'slice', 'select', 'unsqueeze', 'squeeze',
    'reshape', 'alias',
    'detach', 'as_strided', '_unsafe_view', 'unbind', 'split', 'split_with_sizes', 'diagonal',
    'unfold'}
REDUCTIONS = {'sum', 'mean', 'amax', 'amin', 'max', 'min', 'var', 'var_mean', 'prod', 'any', 'all',
              'argmax', 'cumsum',
              'prepare_softmax_online', 'logsumexp'}
ALONE = {'sort', 'topk', 'index_put', 'index_put_', 'scatter_add', 'scatter', 'convolution',
         'convolution_backward',
         'nonzero', 'index_add', 'embedding_dense_backward'}
READS = 4           # Inductor's realize_reads_threshold
OPERATIONS = 30     # … and realize_opcount_threshold


class Kernel:
    """Some nodes that are one kernel: `nodes`, those of them that would be in memory; `reads`,
    {memory: bytes}; `turned`, {memory: whether it is read in another order than it lies in};
    numbers: how many it walks over; sums: (results, terms of each) of its sums, or None."""

    def __init__(self, nodes, reads, turned, numbers, sums):
        self.nodes, self.reads, self.turned = nodes, reads, turned
        self.numbers, self.sums = numbers, sums

    def fits(self, other):
        if self.numbers is None or other.numbers is None:       # of a library
            return False
        if self.sums and other.sums:
            return self.sums == other.sums
        if self.numbers == other.numbers:
            return True
        results = (self.sums or other.sums or (None,))[0]       # what follows a sum walks over its results
        return results in (self.numbers, other.numbers) and not (self.sums and other.sums)

    def joined(self, other):
        reads = dict(self.reads)
        for memory, size in other.reads.items():
            reads[memory] = max(size, reads.get(memory, 0))
        nodes = self.nodes + other.nodes
        reads = {memory: size for memory, size in reads.items() if memory not in nodes}
        turned = other.turned | self.turned
        return Kernel(nodes, reads, turned, max(self.numbers, other.numbers),
                      self.sums or other.sums)


class Fused:
    """The kernels of a graph. graph: a torch.fx.GraphModule of small operations; parameters: its
    inputs that are weights."""

    def __init__(self, graph, phase, merged=False):
        self.phase = phase
        self.nodes = list(graph.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.kinds = {node: kind_of(node) for node in self.nodes}
        self.users = defaultdict(set)           # memory → nodes that read it, through views
        for node in self.nodes:
            if self.kinds[node] != 'view':
                for n in node.all_input_nodes:
                    self.users[self.source(n)].add(node)
        self.written_into = {}                  # a node that is not in memory → its reads and operations
        self.kernels = []
        for node in self.nodes:
            self.place_node(node)
        self.fuse()
        if merged:
            self.merge_products()

    def source(self, node):
        """The node whose memory a view names."""
        while self.kinds[node] == 'view':
            node = node.args[0]
        return node

    def place_node(self, node):
        """A kernel for a node that is in memory; else what it reads is noted for those that read
        it."""
        kind = self.kinds[node]
        if kind in ('input', 'view', 'output'):
            return
        reads, turned, operations = self.reads_of(node)
        if kind == 'library':
            self.kernels.append(Kernel([node], reads, turned, None, None))
            return
        users = self.users[node]
        kinds_of_users = {self.kinds[user] for user in users}
        is_large = len(reads) > READS or operations >= OPERATIONS
        in_memory = (kind == 'sums' or 'library' in kinds_of_users or 'output' in kinds_of_users
                     or (len(users) > 1 and is_large) or len(reads) > 2 * READS)
        if not in_memory:
            self.written_into[node] = reads, turned, operations
            return
        numbers = walked(node, kind)
        results = max(1, tensor_of(node).numel())
        sums = (results, numbers // results) if kind == 'sums' and name_of(node) != 'cumsum' else None
        self.kernels.append(Kernel([node], reads, turned, numbers, sums))

    def reads_of(self, node):
        """({memory: bytes}, {memory: whether it is read out of order}, operations) of a node, with
        those of all that is written into it."""
        reads, turned, operations = {}, {}, 1
        for n in node.all_input_nodes:
            s = self.source(n)
            if tensor_of(s) is None:
                continue
            if s in self.written_into:
                inner, inner_turned, more = self.written_into[s]
                operations += more
                for memory, size in inner.items():
                    reads[memory] = max(size, reads.get(memory, 0))
                    turned[memory] = inner_turned[memory] != is_turned(n, node)
                continue
            size = min(seen_bytes(n), tensor_bytes(s))
            if name_of(node) in GATHERS and n is node.args[0]:
                size = min(size, tensor_bytes(node))
            reads[s] = min(tensor_bytes(s), reads.get(s, 0) + size) if self.kinds[n] == 'view' else size
            turned[s] = is_turned(n, node)
        return reads, turned, operations

    # --- fusing ---

    def fuse(self):
        """Joins pairs that share most until there are none."""
        while True:
            maker = {node: kernel for kernel in self.kernels for node in kernel.nodes}
            pairs = self.candidates(maker)
            joined = set()
            reach = self.reachable(maker)
            for _, a, b in pairs:
                if a in joined or b in joined or self.leads_around(a, b, maker, reach):
                    continue
                self.kernels[self.kernels.index(a)] = a.joined(b)
                self.kernels.remove(b)
                joined |= {a, b}
                maker = {node: kernel for kernel in self.kernels for node in kernel.nodes}
                reach = self.reachable(maker)
            if not joined:
                return

    def candidates(self, maker):
        """[(bytes that a pair shares, kernel, kernel)], the most first."""
        near = defaultdict(set)
        for kernel in self.kernels:
            for memory in kernel.reads:
                near[memory].add(kernel)
                if memory in maker:
                    near[memory].add(maker[memory])
        order = {kernel: i for i, kernel in enumerate(self.kernels)}
        shared = defaultdict(float)
        for memory, kernels in near.items():
            kernels = sorted(kernels, key=order.get)
            for i, a in enumerate(kernels):
                for b in kernels[i + 1:]:
                    if a.fits(b) and a.turned.get(memory, False) == b.turned.get(memory, False):
                        shared[a, b] += tensor_bytes(memory)
        return sorted(((size, a, b) for (a, b), size in shared.items()), key=lambda row: -row[0])

    def reachable(self, maker):
        """{kernel: kernels that it needs, directly or not}. A kernel's number is the last of its
        nodes' places, so what it needs may come later in the list: hence by search."""
        needs = {kernel: {maker[m] for m in kernel.reads if m in maker} - {kernel} for kernel in self.kernels}
        result = {}

        def visit(kernel):
            stack = [(kernel, iter(needs[kernel]))]
            while stack:
                top, rest = stack[-1]
                for other in rest:
                    if other not in result:
                        stack.append((other, iter(needs[other])))
                        break
                else:
                    stack.pop()
                    result[top] = needs[top].union(*(result[other] for other in needs[top]))
        for kernel in self.kernels:
            if kernel not in result:
                visit(kernel)
        return result

    def leads_around(self, a, b, maker, reach):
        """Whether one needs the other through a third kernel: joined they would wait for each
        other."""
        for first, last in ((a, b), (b, a)):
            for m in last.reads:
                third = maker.get(m)
                if third is not None and third is not first and third is not last and first in reach[third]:
                    return True
        return False

    # --- products that share an operand ---

    def merge_products(self):
        """Products of the same matrix, as q, k and v are, become one; and such whose results are
        only added up, as their gradients are, one whose sum is longer."""
        for memory in list(self.nodes):
            sharing = [k for k in self.kernels if is_product(k) and memory in k.reads and memory.op != 'placeholder']
            for kernels in by_shape(sharing):
                self.merge(kernels)
        users = defaultdict(list)
        for kernel in self.kernels:
            if is_product(kernel) and len(kernel.nodes) == 1:
                readers = [k for k in self.kernels if kernel.nodes[0] in k.reads]
                if len(readers) == 1:
                    users[readers[0], tuple(tensor_of(kernel.nodes[0]).shape)].append(kernel)
        for (reader, _), kernels in users.items():
            if len(kernels) > 1 and reader.numbers is not None:
                merged = self.merge(kernels)
                for node in merged.nodes[1:]:               # there is one sum, made within the product
                    del reader.reads[node]

    def merge(self, kernels):
        """These as one kernel, unless one needs another."""
        reach = self.reachable({node: kernel for kernel in self.kernels for node in kernel.nodes})
        free = [k for k in kernels if not any(k in reach[other] for other in kernels if other is not k)]
        merged = free[0]
        for kernel in free[1:]:
            self.kernels.remove(kernel)
            reads = merged.reads | kernel.reads
            both = Kernel(merged.nodes + kernel.nodes, reads, {}, None, None)
            self.kernels[self.kernels.index(merged)] = merged = both
        return merged

    # --- bytes ---

    @cached_property
    def ops(self):
        """[Op] of the graph's kernels."""
        maker = {node: kernel for kernel in self.kernels for node in kernel.nodes}
        readers = defaultdict(set)
        for kernel in self.kernels:
            for memory in kernel.reads:
                readers[memory].add(kernel)
        results = {self.source(n) for node in self.nodes if node.op == 'output' for n in node.all_input_nodes}
        made = []
        for kernel in self.kernels:
            stored = [n for n in kernel.nodes if n in results or readers[n] - {maker[n]}]
            written = sum(tensor_bytes(n) for n in stored)
            if kernel.numbers is None:
                made.append(self.library_op(kernel, written))
            elif written:
                names = dict.fromkeys(map(name_of, kernel.nodes))
                name = CAST if self.is_cast(kernel) else '+'.join(names)
                doubles = kernel.numbers * any(t.dtype == torch.float64 for n in kernel.nodes for t in tensors_of(n))
                made.append(Op(self.phase, name, sum(kernel.reads.values()) + written,
                               doubles=doubles))
        return made

    def is_cast(self, kernel):
        """Whether a kernel does nothing but round a weight."""
        node, = kernel.nodes if len(kernel.nodes) == 1 else [None]
        return (node is not None and name_of(node) == 'convert_element_type' and len(kernel.reads) == 1
                and all(m.op == 'placeholder' and len(tensor_of(m).shape) > 1 for m in kernel.reads)
                and tensor_of(node).dtype == torch.bfloat16)

    def library_op(self, kernel, written):
        """Of one or several products of a library, which are then made at once."""
        read, flops, numbers = sum(kernel.reads.values()), 0, 'half'
        for node in kernel.nodes:
            name = name_of(node)
            args = [arg.meta['val'] if isinstance(arg, torch.fx.Node) else arg for arg in node.args]
            if name in standins.COSTS:
                return Op(self.phase, name, *standins.COSTS[name](name, args), 'scan')
            of_one, numbers = products(node.target, args, {}, node.meta['val'])
            flops += of_one
            if name == 'embedding_dense_backward':
                written *= 2
        return Op(self.phase, '+'.join(map(name_of, kernel.nodes)), read + written, flops, numbers)


def is_product(kernel):
    return kernel.numbers is None and all(name_of(node) in ('mm', 'addmm') for node in kernel.nodes)


def by_shape(kernels):
    """Lists of two or more products whose sums are equally long and whose shared side is the
    same."""
    groups = defaultdict(list)
    for kernel in kernels:
        args = [n.meta['val'] for n in kernel.nodes[0].args if isinstance(n, torch.fx.Node)][-2:]
        groups[args[0].shape[-1], args[0].shape[0] if args[0].shape[0] > args[1].shape[1] else 0].append(kernel)
    return [group for group in groups.values() if len(group) > 1]


# --- nodes ----------------------------------------------------------------------------------------

def name_of(node):
    if node.op != 'call_function':
        return node.op
    if node.target is operator.getitem:
        return 'getitem'
    return getattr(getattr(node.target, 'overloadpacket', node.target), '__name__',
                   str(node.target))


def tensors_of(node):
    value = node.meta.get('val')
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def tensor_of(node):
    tensors = tensors_of(node)
    return tensors[0] if tensors else None


def numbers_bytes(tensor, numel):
    return numel * min(4, tensor.element_size()) if tensor.dtype == torch.float64 else numel * tensor.element_size()


def tensor_bytes(node):
    """Of all a node's tensors; fp64 counts as fp32, as where a card takes those sums in fp32."""
    return sum(numbers_bytes(t, t.numel()) for t in tensors_of(node))


def seen_bytes(node):
    """Of the memory that a view shows, each number once."""
    tensor = tensor_of(node)
    if tensor is None:
        return 0
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        numel *= size if stride else 1
    return numbers_bytes(tensor, numel)


def is_turned(node, reader):
    """Whether a reader, which walks over its result as that lies in memory, walks over this node's
    memory in another order."""
    tensor, result = tensor_of(node), tensor_of(reader)
    if result is None or tensor.shape != result.shape:
        return order_of(tensor) != sorted(order_of(tensor))
    moves = [i for i in range(tensor.dim()) if tensor.stride(i) and result.stride(i) and tensor.shape[i] > 1]
    return order_of(tensor, moves) != order_of(result, moves)


def order_of(tensor, dimensions=None):
    """The dimensions of a tensor, that of the longest stride first."""
    if dimensions is None:
        dimensions = [i for i in range(tensor.dim()) if tensor.stride(i) and tensor.shape[i] > 1]
    return sorted(dimensions, key=lambda i: -tensor.stride(i))


def kind_of(node):
    """'input', 'output', 'view', 'pointwise', 'sums' or 'library'."""
    if node.op in ('placeholder', 'get_attr'):
        return 'input'
    if node.op == 'output':
        return 'output'
    name = name_of(node)
    if name == 'getitem' or name in VIEWS:
        return 'view'
    if tensor_of(node) is None:
        return 'input'
    packet = getattr(node.target, 'overloadpacket', None)
    if name in ATTENTION or name in ALONE or packet in flop_registry:
        return 'library'
    if getattr(node.target, 'namespace', '') not in ('aten', 'prims', 'inductor_prims'):
        return 'library'
    return 'sums' if name in REDUCTIONS else 'pointwise'


def walked(node, kind):
    """How many numbers a small operation walks over: those of its result, or of what it sums up."""
    if kind == 'pointwise':
        return tensor_of(node).numel()
    return max(tensor_of(n).numel() for n in node.all_input_nodes if tensor_of(n) is not None)
