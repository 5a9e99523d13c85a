"""The parts of the first hour, the most telling first, and what time each may take."""
from dataclasses import dataclass

RESERVE = 5         # seconds for the report


@dataclass(frozen=True)
class Part:
    """least: seconds below which it is not worth beginning. most: it is stopped after so many."""
    name: str
    module: str     # of mambino.bench.gpu; its function `run` does the work
    least: int
    most: int
    what: str


PARTS = (
    Part('machine', 'machine_facts', 10, 60, 'card, versions, speed of products and copies, which kernels'),
    Part('check', 'check', 20, 150, 'each kind of model against the CPU: loss, gradients, single steps'),
    Part('kernels', 'kernel_checks', 20, 150,
         'each kernel against the definition of its operation'),
    Part('waits', 'waits', 15, 60, 'whether a training step waits for the card'),
    Part('memory', 'profiles', 20, 180, 'the recipes for 8 to 48 GB: the peak against the estimate'),
    Part('exhausted', 'exhaustion', 20, 120, 'out of memory in a run: it goes on, with the same losses'),
    Part('speed_gpt', 'speed', 45, 300, 'GPT 270M: tokens/s and MFU, eager and compiled, beside transformers'),
    Part('speed_mamba', 'speed', 45, 270, 'Mamba-2 150M: the same'),
    Part('generate', 'generate', 25, 120, 'tokens/s of writing and of reading a prompt'),
    Part('resume', 'resume', 30, 150, 'train.py: its losses beside a CPU\'s; stopped at 100 of 200 steps, and on'),
    Part('processes', 'processes_check', 20, 70, 'DDP and FSDP'),
    Part('sanitizer', 'sanitizer', 20, 70, 'compute-sanitizer on a small step'),
)
