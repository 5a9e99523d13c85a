"""mamba-ssm's Triton kernels in Triton's interpreter, on a CPU, against the definitions of model_mamba.py: a process of
its own, since Triton asks for TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/helpers/interpreted.py FOLDER '{"T": 41, "state": true}'

FOLDER has mamba_ssm/, as a source package or pip leaves it; nothing of it need be built. Prints one line of JSON: {name
of a result or gradient: its largest deviation, as a share of the largest value}.
"""
import contextlib
import json
import os
import sys
import types

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RESULTS = 'y', 'last state', 'xBC', 'dt', 'dt_bias', 'A', 'D', 'state'


def without_a_card():
    """Lets mamba-ssm's launches be where there is no card; of what Triton would try for speed, the first is taken."""
    import triton.runtime.autotuner as autotuner

    def run(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        config = self.best_config = self.configs[0]
        settings = config.all_kwargs()
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **settings})
        for name in ('num_warps', 'num_stages', 'num_ctas', 'maxnreg'):
            settings.pop(name, None)
        return self.fn.run(*args, **kwargs, **settings)

    autotuner.Autotuner.run = run
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=4)


def inputs_of(B=1, T=48, H=2, P=16, N=16, groups=1, state=False, dtype='float32', **_):
    """xBC, dt, dt_bias, A, D of mamba2_scan, and the state, if there is one."""
    torch.manual_seed(1)
    dtype = getattr(torch, dtype)
    xBC = torch.randn(B, T, H * P + 2 * groups * N).to(dtype)
    dt = torch.randn(B, T, H).to(dtype)
    inputs = [xBC, dt, torch.randn(H), -torch.rand(H) * 4 - 0.1, torch.randn(H)]
    return inputs + [torch.randn(B, H, P, N)] * state


def results_of(function, inputs, reads_state=True):
    """y, the last state, and the gradients of all inputs."""
    leaves = [u.clone().requires_grad_() for u in inputs]
    y, last = function(*leaves)
    torch.manual_seed(2)
    loss = (y.float() * torch.randn(y.shape)).sum()
    if reads_state:
        loss = loss + (last.float() * torch.randn(last.shape)).sum()
    return [u.detach().float() for u in (y, last, *torch.autograd.grad(loss, leaves))]


def deviations(folder, P=16, groups=1, chunk_size=16, reads_state=True, dtype='float32', **sizes):
    sys.path[:0] = [ROOT, folder]
    without_a_card()
    from mambino.kernels import fused
    from model_mamba import mamba2_scan
    package, module, names = fused.FUSED['ssd']
    module = fused.import_past_init(package, module)
    fused._ssd['forward'], fused._ssd['backward'] = (getattr(module, name) for name in names)
    fused.CHUNK = chunk_size

    def computed(*inputs):
        return fused.compute_ssd(*inputs[:5], groups, P, *inputs[5:] or [None])

    def expected(*inputs):
        return mamba2_scan.definition(*inputs[:5], groups, P, chunk_size, *inputs[5:])

    inputs = inputs_of(P=P, groups=groups, dtype=dtype, **sizes)
    got = results_of(computed, inputs, reads_state)
    want = results_of(expected, [u.float() for u in inputs], reads_state)
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, a, b in zip(RESULTS, got, want)}


if __name__ == '__main__':
    torch.set_num_threads(1)
    print(json.dumps(deviations(sys.argv[1], **json.loads(sys.argv[2]))))
