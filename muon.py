"""torch.optim.Muon (Jordan et al. 2024), its matrices orthogonalised in batches.

    optimizer = Muon(matrices, lr=1e-2, adjust_lr_fn='match_rms_adamw')

Muon replaces the update of a matrix by the nearest orthogonal one: U V^T instead of U S V^T, by five Newton-Schulz steps.
torch does so one matrix after another, in bf16. A small model has dozens of small matrices of few shapes; all of one shape in one
batched product, in fp32 where bf16 is slow, take a fifth of the time on a CPU. State and settings are torch's.
"""
import torch


def orthogonalize(g, coefficients, steps, eps, dtype):
    """Newton-Schulz: (n, rows, columns) with rows <= columns → about U V^T of each, singular values in 0.5 to 1.5."""
    a, b, c = coefficients
    x = g.to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)            # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT                                                         # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}                                                         # (rows, columns), rows <= columns → parameters
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in shapes.values():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state['momentum_buffer'] = torch.zeros_like(p)
                    buffer = state['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
                    update = p.grad.lerp(buffer, group['momentum']) if group['nesterov'] else buffer
                    updates.append(update.mT if p.shape[0] > p.shape[1] else update)
                updates = orthogonalize(torch.stack(updates), group['ns_coefficients'], group['ns_steps'], group['eps'],
                                        torch.float32 if updates[0].device.type == 'cpu' else torch.bfloat16)
                for p, update in zip(params, updates):
                    rows, columns = p.shape
                    scale = max(1, rows / columns) ** 0.5                       # the original's, for learning rates near 0.02
                    if group['adjust_lr_fn'] == 'match_rms_adamw':              # as large as AdamW's (Liu et al. 2025)
                        scale = 0.2 * max(rows, columns) ** 0.5
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(update.mT if rows > columns else update, alpha=-group['lr'] * scale)
