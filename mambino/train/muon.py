"""torch.optim.Muon (Jordan et al. 2024), its matrices orthogonalised in batches.

    optimizer = Muon(matrices, lr=1e-2, adjust_lr_fn='match_rms_adamw')

Muon replaces the update of a matrix by the nearest orthogonal one: U V^T instead of U S V^T, by
five Newton-Schulz steps. torch does so one matrix after another, in bf16. A small model has dozens
of small matrices of few shapes; all of one shape in one batched product, in fp32 where bf16 is
slow, take a fifth of the time on a CPU. State and settings are torch's. With FSDP a process has
some rows of each matrix; it gets the others for as long as it takes.
"""
import torch
import torch.nn as nn

from model_hybrid import DeltaMixer
from model_mamba import Mamba2Mixer, Mamba3Mixer


def row_kinds(net):
    """{parameter: [rows of each kind]} of the matrices that are several in one: each kind of rows
    gets an update of its own.

    A Mamba-2's in_proj stacks the matrices of z, x, B, C and dt; a Mamba-3's also those of A, trap and the
    angles; a DeltaNet's those of z, q, k, v and what is said of each head."""
    kinds = {}
    for module in net.modules():
        # a low-rank one is no such stack
        if not isinstance(getattr(module, 'in_proj', None), nn.Linear):
            continue
        if isinstance(module, Mamba2Mixer):
            E = module.out_proj.in_features
            H = module.A_log.numel()
            GN = (module.in_proj.out_features - 2 * E - H) // 2
            kinds[module.in_proj.weight] = [E, E, GN, GN, H]
        elif isinstance(module, Mamba3Mixer):
            E, _, RGN, _, *scalars = module.split
            R = module.columns[0]                   # of B and of C each rank is a kind of its own
            kinds[module.in_proj.weight] = [E, E, *[RGN // R] * 2 * R, *scalars]
        elif isinstance(module, DeltaMixer):
            E, qkv, H, _ = module.split
            GN = (qkv - E) // 2
            kinds[module.in_proj.weight] = [E, GN, GN, E, H, H]
    return kinds


def orthogonalize(g, coefficients, steps, eps, dtype):
    """Newton-Schulz: (n, rows, columns) with rows <= columns → about U V^T of each, singular values
    in 0.5 to 1.5."""
    a, b, c = coefficients
    x = g.to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)  # no singular value above 1
    if dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        return gram_newton_schulz(x, coefficients, steps)
    for _ in range(steps):
        gram = x @ x.mT                                                         # (n, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)           # b gram + c gram²
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def gram_newton_schulz(x, coefficients, steps):
    """The same steps on x x^T alone, whose polynomials they are: x itself, which is wide, is
    multiplied at the beginning and the end. bf16 is too coarse for that."""
    a, b, c = coefficients
    gram = x @ x.mT                                                             # (n, rows, rows)
    product = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)                           # a + b gram + c gram²
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ (gram @ polynomial)
    return x if product is None else product @ x


class Muon(torch.optim.Muon):
    """torch's settings and state. A group may have 'rows': for each of its parameters None, or as
    in `row_kinds` the numbers of rows of the kinds of things that it stacks, which are
    orthogonalised by themselves."""
    dtype = None  # of the Newton-Schulz steps; None: fp32 on a CPU, else bf16
    # matrices that are complete at the same time with FSDP, whose point is that they are not
    AT_ONCE = 8

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rows = group.get('rows') or [None] * len(group['params'])
            pairs = [(p, kinds) for p, kinds in zip(group['params'], rows) if p.grad is not None]
            is_sharded = bool(pairs) and hasattr(pairs[0][0], 'full_tensor')
            at_once = self.AT_ONCE if is_sharded else max(1, len(pairs))
            for i in range(0, len(pairs), at_once):
                params, kinds = zip(*pairs[i:i + at_once])
                self.update(group, params, kinds, is_sharded)

    def update(self, group, params, kinds, is_sharded):
        """One step of some parameters. kinds: of each its rows of each kind, or None. What is
        called on a GPU does not grow with their number, where they are not sharded."""
        matrices = self.momentum(group, params)
        parts = []                                  # of all, in their order: (rows, columns) each
        places = {}                                 # (rows, columns), rows <= columns → where in parts
        for matrix, sizes in zip(matrices, kinds):
            for part in matrix.split(sizes or len(matrix)):
                places.setdefault(tuple(sorted(part.shape)), []).append(len(parts))
                parts.append(part)
        for alike in places.values():
            alike.sort(key=lambda i: parts[i].shape[0] > parts[i].shape[1])
            for i, update in zip(alike, self.orthogonalized(group, [parts[i] for i in alike])):
                parts[i] = update
        own = [p.to_local() if is_sharded else p for p in params]
        torch._foreach_mul_(own, 1 - group['lr'] * group['weight_decay'])
        if is_sharded:
            parts = own_rows(params, kinds, parts)
        else:                                       # a part is added to the rows it is of
            own = [part for p, sizes in zip(params, kinds) for part in p.split(sizes or len(p))]
        torch._foreach_add_(own, parts, alpha=-group['lr'])

    def momentum(self, group, params):
        """The updates of parameters before they are orthogonalised, all rows of each."""
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        buffers, gradients = ([getattr(u, '_local_tensor', u) for u in tensors] for tensors in (
            [self.state[p]['momentum_buffer'] for p in params], [p.grad for p in params]))
        torch._foreach_lerp_(buffers, gradients, 1 - group['momentum'])
        updates = buffers
        if group['nesterov']:
            updates = torch._foreach_lerp(gradients, buffers, group['momentum'])
        return [all_rows(p, update) for p, update in zip(params, updates)]

    def orthogonalized(self, group, parts):
        """Matrices of one shape or its transpose, wide ones first → in this order each orthogonal
        and scaled."""
        dtype = self.dtype or (torch.float32 if parts[0].device.type == 'cpu' else torch.bfloat16)
        n_wide = sum(part.shape[0] <= part.shape[1] for part in parts)
        stacks = [torch.stack(parts[:n_wide])] if n_wide else []
        if n_wide < len(parts):
            stacks.append(torch.stack(parts[n_wide:]).mT.contiguous())
        x = orthogonalize(torch.cat(stacks), group['ns_coefficients'], group['ns_steps'], group['eps'], dtype)
        updates = []
        for matrices in (x[:n_wide], x[n_wide:].mT):
            rows, columns = matrices.shape[1:]
            scale = max(1, rows / columns) ** 0.5  # the original's, for learning rates near 0.02
            if group['adjust_lr_fn'] == 'match_rms_adamw':  # as large as AdamW's (Liu et al. 2025)
                scale = 0.2 * max(rows, columns) ** 0.5
            scaled = torch.empty(matrices.shape, dtype=parts[0].dtype, device=x.device)
            updates += torch.mul(matrices, scale, out=scaled).unbind()
        return updates


def all_rows(p, update):
    """The complete update of a parameter; with FSDP from each process's rows."""
    if not hasattr(p, 'full_tensor'):
        return update
    from torch.distributed.tensor import DTensor  # a second to import
    return DTensor.from_local(update, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()


def own_rows(params, kinds, parts):
    """This process's rows of parameters' updates, which are given in their parts."""
    from torch.distributed.tensor import distribute_tensor
    parts = iter(parts)
    updates = []
    for p, sizes in zip(params, kinds):
        update = torch.cat([next(parts) for _ in sizes or [None]])
        updates.append(distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None).to_local())
    return updates
