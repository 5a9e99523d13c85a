"""The first hour on a card: one command that checks what a GPU computes, and measures how fast.

    python -m mambino.bench.gpu                         # all parts that fit into 25 minutes
    python -m mambino.bench.gpu --minutes=8             # the most telling ones; what is left out is said
    python -m mambino.bench.gpu --parts=check,kernels   # these, whatever the order below
    python -m mambino.bench.gpu --device=cpu --parts=check      # the same logic, without a card
    python -m mambino.bench.gpu --model                         # what cards should reach, by arithmetic; without one
    python -m mambino.bench.gpu --model --measures=compile,triton

    parts, one after another, each a process of its own with a limit of time
        └─► lines on the screen ─► out_dir/report.json, report.md (for docs/measured.md)

A part that fails, hangs or is killed is a line of the report; the next one begins. Its process
writes each result the moment it has it, so that what a part knew before it died is kept. The log of
a part is out_dir/NAME.log. Compiled kernels are kept in out_dir/inductor: a second run is shorter.

Exit status: 0 if all that was checked is right, 1 if something is not.
"""
import os
import shutil
import time

from mambino.bench.gpu import order, outcome, running
from mambino.configurator import configure, fail

minutes = 25.0              # in all; with fewer the least telling parts are left out
parts = ''                  # names, with commas; '': as many as fit, the most telling first
device = 'cuda'             # 'cuda', 'cuda:1', or 'cpu' to see the parts work on small models
out_dir = 'out-gpu'         # report.json, report.md, a log of each part; of --model model.json, model.md
model = False               # no card: bytes and FLOPs counted, time by a roofline (roofline/account.py)
measures = 'compile,batch,merged,weights,triton'    # of --model: what is done for speed, in this order


def show_model():
    from mambino.bench.gpu.roofline import account, table
    wanted = list(filter(None, measures.split(',')))
    for name in wanted:
        if name not in account.MEASURES:
            fail(f'measures={measures}: there is no {name}; there are {", ".join(account.MEASURES)}')
    table.show(out_dir, measures=wanted)


def main():
    known = [part.name for part in order.PARTS]
    wanted = list(filter(None, parts.split(','))) or known
    for name in wanted:
        if name not in known:
            fail(f'parts={parts}: there is no {name}; there are {", ".join(known)}')
    if not 0 < minutes:
        fail(f'minutes={minutes} must be more than 0')
    running.require(device)
    end = time.monotonic() + 60 * minutes
    os.makedirs(out_dir, exist_ok=True)
    command = running.command_line(device)
    print(f'{command}: up to {minutes:g} minutes; reports go to {out_dir}/report.md and report.json', flush=True)

    results = outcome.Results(out_dir, command)
    for name in wanted:
        part = next(part for part in order.PARTS if part.name == name)
        left = end - time.monotonic() - order.RESERVE
        if left < (order.RESERVE if parts else part.least):     # what is named begins, however short
            results.leave_out(part, f'of --minutes={minutes:g} are left {max(0, left):.0f} s, it takes {part.least}')
            continue
        running.run_part(part, min(part.most, left), device, out_dir, results)
        results.write()         # what there is so far, should this process be killed
    results.write()
    shutil.rmtree(os.path.join(out_dir, 'scratch'), ignore_errors=True)
    return results.show_sum()


if __name__ == '__main__':
    configure(globals())
    raise SystemExit(show_model() if model else main())
