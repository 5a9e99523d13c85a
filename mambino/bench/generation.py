"""The section generate: our models in each of their precisions on a CPU, beside transformers'
generate and llama.cpp.

    python -m mambino.bench --sections=generate --kinds=gpt --prompts=32,512,2000 --threads=1

Weights are random; models of a kind have equal sizes: GPT beside LlamaForCausalLM, Mamba beside
MambaForCausalLM and Mamba2ForCausalLM, the hybrid beside FalconH1ForCausalLM, Mamba-3 beside our own
Mamba-2, and llama.cpp has our own export in F32, Q8_0 and Q4_0. Every contender continues the same
prompts greedily. The time of a prompt and that of a new token after it count apart. The first of
--prompts is continued; the others are read alone, by one sequence. GB/s is what a token must read at
least, its weights, over the time it took.
Each has the same threads, and its own defaults otherwise: llama.cpp keys and values in F16, and its
flash attention. --state_dtype=bfloat16 keeps ours so between tokens: the state after a prompt is rounded.
"""
import importlib.util
import os
import tempfile
from statistics import median

from mambino.bench.turns import HERE, all_times, contest, ratio, table, with_before
from mambino.train.sizes import named_size

MAMBAS = {      # fields of the kinds that are a Mamba
    'mamba': {},
    'mamba1': dict(version=1),
    'mamba3': dict(version=3),
    'mamba3_r4': dict(version=3, mimo_rank=4),
}
KINDS = ('gpt', 'hybrid', *MAMBAS)


def config_of(kind, settings):
    """(family, fields) of our model: what model_<family>.py's config is made of."""
    family = 'mamba' if kind in MAMBAS else kind
    fields = MAMBAS.get(kind, {}) | dict(vocab_size=settings.vocab_size)
    fields |= named_size(family, settings.size, fields.get('mimo_rank', 1))
    if family != 'mamba':
        fields['n_head'] = fields['n_embd'] // 64
    return family, fields


def contenders(kind, batch, folder, settings):
    """The rows of a kind of model with so many sequences at once."""
    family, fields = config_of(kind, settings)
    prompts = [int(length) for length in settings.prompts.split(',')]
    prompts = prompts[:1] if batch > 1 else prompts
    fields['block_size'] = max(max(prompts), prompts[0] + settings.new_tokens) + 8

    def new_row(by, way, **more):
        label = f'{kind} × {batch}' if by == 'ours' else f'{by} {kind} × {batch}'
        return dict(section='generate', name=kind, label=label, dtype=way, root=HERE, times=[], by=by,
                    kind=family, fields=fields, batch=batch, prompts=prompts, state_dtype=settings.state_dtype) | more

    ways = settings.ways.split(',')
    rows = with_before([new_row('ours', way) for way in ways], settings)
    if fields.get('version') == 3:      # which nobody else has
        mamba2 = config_of('mamba', settings)[1] | dict(block_size=fields['block_size'])
        return rows + [new_row('Mamba-2', way, fields=mamba2) for way in ways]
    for dtype in filter(None, settings.their_dtypes.split(',')):
        theirs = dict(fields)
        if kind == 'hybrid':  # of hybrids the one that transformers has
            theirs |= dict(gate=False, branch_norm=False, window=0)
        rows.append(new_row('transformers', dtype, fields=theirs))
    if settings.llama and kind != 'hybrid' and importlib.util.find_spec('xllamacpp'):
        path = os.path.join(folder, kind, str(fields['block_size']))
        os.makedirs(path, exist_ok=True)
        rows += [new_row('llama.cpp', way, folder=path) for way in ways if way != 'bfloat16']
    return rows


def measure(settings):
    """The rows of all kinds and batches, shown as tables; with several batches, how much faster the
    largest is a token."""
    rows = []
    batches = [int(batch) for batch in settings.batches.split(',')]
    with tempfile.TemporaryDirectory() as folder:
        for kind in settings.kinds.split(','):
            groups = {}
            for batch in batches:
                group = contest(contenders(kind, batch, folder, settings), settings)
                groups[batch] = [row for row in group if 'error' not in row]
                if groups[batch]:
                    show(kind, batch, groups[batch])
                rows += group
            if min(batches) < max(batches):
                show_batches(kind, groups[min(batches)], groups[max(batches)])
    return rows


# --- tables ---------------------------------------------------------------------------------------

def name_of(row):
    by = row['by'] if row['root'] == HERE else 'before'
    return f'{by} {row["dtype"]}'


def works_of(row):
    """What it did in each round: 'token', 'prompt 32', …"""
    return list(row['times'][0])


def show(kind, batch, rows):
    """The tables of a kind with so many sequences: times, and ours over theirs. Adds
    `tokens_per_second` to the rows."""
    works = works_of(rows[0])
    lines = []
    for row in rows:
        seconds = median(all_times(row, 'token'))
        row['tokens_per_second'] = batch / seconds
        line = [name_of(row), '', f'{batch / seconds:,.0f}', f'{seconds * 1e3:.2f}',
                f'{row["weights"] / seconds / 1e9:.1f}']
        lines.append(line + [f'{1e3 * median(all_times(row, work)):.1f}' for work in works if work != 'token'])
    prompts = [f'ms {work}' for work in works if work != 'token']
    states = ', our states in bfloat16' * (rows[0].get('state_dtype') == 'bfloat16')
    table(f'{kind}, {batch} sequence{"s" * (batch > 1)}{states}',
          ['', '', 'tokens/s', 'ms/token', 'GB/s', *prompts], lines)
    lines = [[name_of(a), name_of(b), *(f'{ratio(a, b, work)[0]:.2f}×' for work in works)] for a, b in pairs(rows)]
    if lines:
        table('ours / theirs: how many times as fast', ['ours', 'theirs', *works], lines)


def pairs(rows):
    """Who is compared with whom: ours with transformers in each of its dtypes, with llama.cpp, with our
    Mamba-2 and with what it was before in the same precision, and int8 with bf16."""
    for a in rows:
        if a['by'] != 'ours' or a['root'] != HERE:
            continue
        for b in rows:
            is_before = b['root'] != HERE
            is_same = a['dtype'] == b['dtype']
            if b['by'] == 'transformers' or (b['by'] in ('llama.cpp', 'Mamba-2') or is_before) and is_same:
                yield a, b
            elif not is_before and b['by'] == 'ours' and (a['dtype'], b['dtype']) == ('int8', 'bfloat16'):
                yield a, b


def speedup(a, b):
    """How many times the tokens a second of b's sequences a's make: of one contender with more of
    them."""
    return a['batch'] / b['batch'] * ratio(a, b, 'token')[0]


def show_batches(kind, few, many):
    """Tokens a second of many sequences at once against few."""
    pairs = [(a, b) for a in many for b in few if name_of(a) == name_of(b)]
    if pairs:
        batches = f'{many[0]["batch"]} sequences against {few[0]["batch"]}'
        table(f'{kind}, {batches}: how many times the tokens a second', ['', '', ''],
              [[name_of(a), '', f'{speedup(a, b):.1f}×'] for a, b in pairs])
