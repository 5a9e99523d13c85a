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

from model_mamba import Mamba2Mixer


def row_kinds(net):
    """{parameter: [rows of each kind]} of the matrices that are several in one: each kind of rows
    gets an update of its own.

    A Mamba-2's in_proj stacks the matrices of z, x, B, C and dt."""
    kinds = {}
    for module in net.modules():
        # a low-rank one is no such stack
        if isinstance(module, Mamba2Mixer) and isinstance(module.in_proj, nn.Linear):
            E = module.out_proj.in_features
            H = module.A_log.numel()
            GN = (module.in_proj.out_features - 2 * E - H) // 2
            kinds[module.in_proj.weight] = [E, E, GN, GN, H]
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
    """The same steps on x x^T alone, whose polynomials they are: x itself, which is wide, is multiplied
    at the beginning and the end. bf16 is too coarse for that."""
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
            sharded = bool(pairs) and hasattr(pairs[0][0], 'full_tensor')
            at_once = self.AT_ONCE if sharded else len(pairs)
            for i in range(0, len(pairs), at_once):
                self.update(group, pairs[i:i + at_once])

    def update(self, group, pairs):
        """One step of some parameters. pairs: (parameter, its kinds of rows or None)."""
        updates = []
        by_shape = {}  # (rows, columns), rows <= columns → matrices
        for p, kinds in pairs:
            update = self.momentum(group, p)
            updates.append(update)
            for part in update.split(kinds or len(update)):
                by_shape.setdefault(tuple(sorted(part.shape)), []).append(part)
        for parts in by_shape.values():
            self.orthogonalize_in_place(group, parts)
        for (p, _), update in zip(pairs, updates):
            if hasattr(p, 'full_tensor'):  # this process's rows of it
                from torch.distributed.tensor import distribute_tensor  # a second to import
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            p.mul_(1 - group['lr'] * group['weight_decay'])
            p.add_(update, alpha=-group['lr'])

    def momentum(self, group, p):
        """The update of a parameter before it is orthogonalised, all rows of it."""
        state = self.state[p]
        if not state:
            state['momentum_buffer'] = torch.zeros_like(p)
        buffer = state['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
        update = p.grad.lerp(buffer, group['momentum']) if group['nesterov'] else buffer.clone()
        return update.full_tensor() if hasattr(p, 'full_tensor') else update

    def orthogonalize_in_place(self, group, parts):
        """Puts in the place of each of these matrices, all of one shape or its transpose, its
        orthogonal and scaled one."""
        dtype = self.dtype or (torch.float32 if parts[0].device.type == 'cpu' else torch.bfloat16)
        wide = torch.stack([part.mT if part.shape[0] > part.shape[1] else part for part in parts])
        orthogonal = orthogonalize(wide, group['ns_coefficients'], group['ns_steps'], group['eps'], dtype)
        for part, x in zip(parts, orthogonal):
            rows, columns = part.shape
            scale = max(1, rows / columns) ** 0.5  # the original's, for learning rates near 0.02
            if group['adjust_lr_fn'] == 'match_rms_adamw':  # as large as AdamW's (Liu et al. 2025)
                scale = 0.2 * max(rows, columns) ** 0.5
            torch.mul(x.mT if rows > columns else x, scale, out=part)
