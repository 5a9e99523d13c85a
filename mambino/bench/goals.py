"""The section goals: where this project wants to be, and where the sections before it found it.

    python -m mambino.bench --sections=train,sample,generate,goals --models=gpt,mamba2 --peers=llama,hf_mamba2 \\
        --kinds=gpt,mamba,hybrid --prompts=32,512,2000 --new_tokens=24

Each goal is a ratio within this run, ours over theirs; what was not measured has no line. Best means the
precision that was quickest at this. With --against a column more says it of that checkout.
"""
from statistics import median

from mambino.bench.generation import speedup
from mambino.bench.turns import HERE, all_times, ratio, table

PEERS = {'gpt': ('llama', 1.25), 'mamba2': ('hf_mamba2', 3.5)}      # the model: its peer in training, the goal
OF_MAMBA2 = {'mamba3': 0.8, 'mamba3_r4': 0.45}                      # training
TOKEN_OF_MAMBA2 = {'mamba3': 0.95}                                  # one sequence's token
FILES = {'float32': 'F32', 'int8': 'Q8_0', 'int4': 'Q4_0'}          # our precisions in llama.cpp's words
MORE_ROWS = {'bfloat16': 6.0, 'int8': 5.0}                          # tokens/s of 16 rows against one's


def best(rows, work):
    """The row that does it in the least time; None of none."""
    rows = [row for row in rows if row['times'] and row['times'][0].get(work)]
    return min(rows, key=lambda row: median(all_times(row, work)), default=None)


def times_as_fast(ours, theirs, work):
    """The best of ours against the best of theirs; None where one was not measured."""
    a, b = best(ours, work), best(theirs, work)
    return ratio(a, b, work)[0] if a and b else None


def training(rows, root):
    """(what, wanted, ratio) of the section train."""
    def named(name, root=root):
        return [row for row in rows if row['name'] == name and row['root'] == root]
    for name, (peer, wanted) in PEERS.items():
        yield (f'training {name}, best precision, against transformers\' best', wanted,
               times_as_fast(named(name), named(peer, HERE), 'step'))
    for name, wanted in OF_MAMBA2.items():
        yield f'training {name} against mamba2', wanted, times_as_fast(named(name), named('mamba2'), 'step')
    a, b = best(named('mamba2'), 'step'), best(named('gpt'), 'step')
    if a and b:
        yield 'training mamba2 against gpt, × size', 0.8, ratio(a, b, 'step')[0] * a['parameters'] / b['parameters']


def sampling(rows, root, positions):
    """(what, wanted, ratio) of the section sample: wanted is the most."""
    for row in rows:
        if row['name'] == 'gpt' and row['root'] == root and 'a_byte' in row:
            yield (f'gpt {row["dtype"]}: time a byte read at position {positions[-1]} against {positions[0]}, at most',
                   1.3, row['a_byte'])


def generating(rows, root):
    """(what, wanted, ratio) of the section generate."""
    groups = dict.fromkeys((row['name'], row['batch']) for row in rows)
    for kind, batch in groups:
        group = [row for row in rows if (row['name'], row['batch']) == (kind, batch)]
        ours = [row for row in group if row['by'] == 'ours' and row['root'] == root]
        theirs = [row for row in group if row['by'] == 'transformers' and row['dtype'] == 'bfloat16']
        if batch == 1 and kind in TOKEN_OF_MAMBA2:
            yield (f'{kind} × {batch}, token, best, against mamba2', TOKEN_OF_MAMBA2[kind],
                   times_as_fast(ours, [row for row in group if row['by'] == 'Mamba-2'], 'token'))
        works = list(ours[0]['times'][0]) if ours and ours[0]['times'] else []
        for work in works:
            wanted = 1.2 if work != 'token' else 3.0 if batch == 1 else 1.5
            yield (f'{kind} × {batch}, {work}, best, against transformers bf16', wanted,
                   times_as_fast(ours, theirs, work))
        for work in works:
            for way, file in FILES.items():
                yield (f'{kind} × {batch}, {work}, {way}, against llama.cpp {file}', 1.0, times_as_fast(
                    [row for row in ours if row['dtype'] == way],
                    [row for row in group if row['by'] == 'llama.cpp' and row['dtype'] == way], work))
    for kind in dict.fromkeys(kind for kind, _ in groups):
        ours = {(row['dtype'], row['batch']): row for row in rows
                if row['by'] == 'ours' and (row['name'], row['root']) == (kind, root)}
        for way, wanted in MORE_ROWS.items():
            if (way, 1) in ours and (way, 16) in ours:
                states = ', states in bfloat16' * (ours[way, 1].get('state_dtype') == 'bfloat16')
                yield f'{kind}, {way}{states}, 16 rows against one', wanted, speedup(ours[way, 16], ours[way, 1])


def goals(rows, root, positions):
    """{what: (wanted, ratio)} of what was measured of the checkout at root."""
    found = []
    for section, of_section in (('train', training), ('generate', generating)):
        found += of_section([row for row in rows if row['section'] == section], root)
    found += sampling([row for row in rows if row['section'] == 'sample'], root, positions)
    return {what: (wanted, value) for what, wanted, value in found if value is not None}


def show(rows, settings):
    """Prints the table of goals. rows: those that were measured."""
    positions = settings.positions.split(',')
    now = goals(rows, HERE, positions)
    before = goals(rows, settings.against, positions) if settings.against else {}
    lines = []
    for what, (wanted, value) in now.items():
        is_met = value <= wanted if what.endswith('at most') else value >= wanted
        line = [what, 'yes' if is_met else 'no', f'{wanted:.2f}×', f'{value:.2f}×']
        lines.append(line + [f'{before[what][1]:.2f}×' if what in before else ''] * bool(settings.against))
    if lines:
        table('goals', ['', 'met', 'wanted', 'now', *['before'] * bool(settings.against)], lines)
