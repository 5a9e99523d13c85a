"""A model as TorchScript and as a torch.export program: code and weights in a file, for PyTorch
without these scripts, in Python or C++.

    python export.py --format=torchscript
    step = torch.jit.load('step.ts')
    logits, past = step(ids, step.empty(1)); logits, past = step(ids, past)
    model = torch.export.load('model.pt2').module(); logits = model(ids)

step.ts is the stateful step of graphs.py, traced: ids (B, t), the list `past` → logits (B, t, V),
the list to go on with, for any B and t. Its loops are compiled from their source, so no size and no
number of steps of the trace is left in it. `empty(B)` makes the first past. The file of
torch.jit.load(…, _extra_files={'model.json': ''}) has the settings and names of the list.

model.pt2 is the whole-sequence graph, ids (B, T) → logits (B, T, V). PyTorch means torch.export to
follow TorchScript.
"""
import copy
import io
import json
import os

import torch

from mambino.export import graphs
from mambino.export.compare import compare_steps, silent

PACKAGES = ''
FILES = 'step.ts', 'model.pt2'
LIMIT = 1e-5    # of the largest logit


class Step(torch.nn.Module):
    """What step.ts holds: a traced Graph, and how to begin."""

    def __init__(self, traced, past: list[torch.Tensor]):
        super().__init__()
        self.traced = traced
        self.has_position = past[0].dtype == torch.long
        self.sizes: list[list[int]] = [list(u.shape) for u in past]
        self.doubles: list[bool] = [u.dtype == torch.double for u in past]

    def forward(self, ids: torch.Tensor, past: list[torch.Tensor]):
        return self.traced(ids, past)

    @torch.jit.export
    def empty(self, B: int) -> list[torch.Tensor]:
        past: list[torch.Tensor] = []
        for i, size in enumerate(self.sizes):
            if self.has_position and i == 0:
                past.append(torch.zeros(1, dtype=torch.long))
            else:
                dtype = torch.double if self.doubles[i] else torch.float
                past.append(torch.zeros([B] + size[1:], dtype=dtype))
        return past


def save(path, save_to, program, **options):
    """By way of memory: where torch writes to the disk itself, a full one ends the process."""
    buffer = io.BytesIO()
    save_to(program, buffer, **options)
    with open(path, 'wb') as f:
        f.write(buffer.getbuffer())


def traced_step(net):
    """The step as TorchScript, and the names of its list where it goes in and where it comes
    out."""
    graph = graphs.Graph(net, scripted=True).eval()
    traced = torch.jit.trace(graph, graphs.example(graph), strict=False, check_trace=False)
    return torch.jit.script(Step(traced, graph.empty(1))), graph.names()


def exported_program(net):
    """The whole-sequence graph by torch.export, for any number of sequences and tokens."""
    graph = graphs.FullGraph(net).eval()
    ids, _ = graphs.example(graph.steps)
    sizes = {0: torch.export.Dim('batch'), 1: torch.export.Dim('tokens')}
    return torch.export.export(graph, (ids,), dynamic_shapes=(sizes,))


@torch.no_grad()
def write(net, tok, folder, quantize='', **_):
    """Writes step.ts, model.pt2, tokenizer.json. ValueError for what TorchScript cannot be
    given."""
    if quantize:
        raise ValueError(f'TorchScript files are written in fp32, not {quantize}: leave --quantize '
                         'empty, or take ONNX for int8')
    net = copy.deepcopy(net).requires_grad_(False)  # so that nobody has to say no_grad
    with silent():
        step, (past, present) = traced_step(net)
        facts = json.dumps(dict(graphs.metadata(net, tok), past=past, present=present))
        step_path, full_path = (os.path.join(folder, file) for file in FILES)
        save(step_path, torch.jit.save, step, _extra_files={'model.json': facts})
        save(full_path, torch.export.save, exported_program(net))
    if tok:
        tok.save(folder)


def verify(net, tok, folder, quantize='', **_):
    """Loads both files again, beside the model: logits of whole sequences and of steps, and greedy
    text. → a check, see compare.py."""
    with silent():
        step = torch.jit.load(os.path.join(folder, FILES[0]))
        full = torch.export.load(os.path.join(folder, FILES[1])).module()
        check = compare_steps(net, tok, step.empty, step, full)
    ok = check.pop('same') and check['logits'] <= LIMIT
    return dict(tool=f'torch {torch.__version__} from the files alone', limit=LIMIT, ok=ok, **check)


def opening(name, **_):
    """The lines that open step.ts, for the card."""
    return f'import torch\nstep = torch.jit.load({FILES[0]!r})'
