"""The section generate: our models in each of their precisions on a CPU, beside transformers'
generate and llama.cpp.

Weights are random; models of a kind have equal sizes: GPT beside LlamaForCausalLM, Mamba beside
MambaForCausalLM and Mamba2ForCausalLM, the hybrid beside FalconH1ForCausalLM. Every contender
continues the same prompt greedily. What counts is the time of a new token once the prompt has been
read. GB/s is what a token must read at least, its weights, over the time it took.
"""
import importlib.util
import os
import tempfile
from statistics import median

from mambino.bench.turns import HERE, all_times, contest, ratio, with_before
from mambino.train.begin import SIZES

KINDS = ('gpt', 'mamba', 'hybrid', 'mamba1')


def config_of(kind, settings):
    """(family, fields) of our model: what model_<family>.py's config is made of."""
    family = 'mamba' if kind == 'mamba1' else kind
    fields = dict(SIZES[family, settings.size], vocab_size=settings.vocab_size)
    if kind == 'mamba1':
        fields['version'] = 1
    elif family != 'mamba':
        fields['n_head'] = fields['n_embd'] // 64
    return family, fields


def contenders(kind, batch, folder, settings):
    """The rows of a kind of model with so many sequences at once."""
    family, fields = config_of(kind, settings)

    def new_row(by, way, **more):
        label = f'{kind} × {batch}' if by == 'ours' else f'{by} {kind} × {batch}'
        return dict(section='generate', name=kind, label=label, dtype=way, root=HERE, times=[], by=by,
                    kind=family, fields=fields, batch=batch) | more

    ways = settings.ways.split(',')
    rows = with_before([new_row('ours', way) for way in ways], settings)
    if settings.against:
        return rows
    for dtype in filter(None, settings.their_dtypes.split(',')):
        theirs = dict(fields)
        if kind == 'hybrid':  # of hybrids the one that transformers has
            theirs |= dict(gate=False, branch_norm=False, window=0)
        rows.append(new_row('transformers', dtype, fields=theirs))
    if batch == 1 and importlib.util.find_spec('llama_cpp'):
        for way in [way for way in ways if way != 'bfloat16']:
            path = os.path.join(folder, kind, way)
            os.makedirs(path)
            rows.append(new_row('llama.cpp', way, folder=path))
    return rows


def measure(settings):
    """The rows of all kinds and batches, shown as a table each; with several batches, how much
    faster the largest is a token."""
    rows = []
    batches = [int(batch) for batch in settings.batches.split(',')]
    with tempfile.TemporaryDirectory() as folder:
        for kind in settings.kinds.split(','):
            groups = {}
            for batch in batches:
                group = contest(contenders(kind, batch, folder, settings), settings)
                groups[batch] = [row for row in group if 'error' not in row]
                show(kind, batch, groups[batch])
                rows += group
            if min(batches) < max(batches):
                show_batches(groups[min(batches)], groups[max(batches)])
    return rows


def name_of(row):
    by = row['by'] if row['root'] == HERE else 'before'
    return f'{by} {row["dtype"]}'


def show(kind, batch, rows):
    """A kind's table; adds `tokens_per_second` to the rows."""
    base = [row for row in rows if row['by'] == 'transformers']
    print(f'\n{kind}, {batch} sequence{"s" * (batch > 1)}')
    print(f'{"":<24}{"tokens/s":>10}{"ms/step":>9}{"GB/s":>7}{"prompt ms":>11}'
          + ''.join(f'{"x " + row["dtype"]:>14}' for row in base))
    for row in rows:
        seconds = median(all_times(row, 'token'))
        prompt = median(all_times(row, 'prompt'))
        row['tokens_per_second'] = batch / seconds
        line = f'{name_of(row):<24}{batch / seconds:>10,.0f}{seconds * 1e3:>9.2f}{row["weights"] / seconds / 1e9:>7.1f}'
        print(line + f'{prompt * 1e3:>11.1f}' + ''.join(f'{ratio(row, peer, "token")[0]:>14.2f}' for peer in base))
    ours = {row['dtype']: row for row in rows if row['by'] == 'ours' and row['root'] == HERE}
    if 'int8' in ours and 'bfloat16' in ours:
        print(f'{"int8 against bfloat16":<24}{ratio(ours["int8"], ours["bfloat16"], "token")[0]:>10.2f}')


def show_batches(few, many):
    """One line: tokens a second of many sequences at once against few."""
    each = []
    for a in many:
        for b in few:
            if name_of(a) == name_of(b):
                speed = a['batch'] / b['batch'] * ratio(a, b, 'token')[0]
                each.append(f'{name_of(a)} {speed:.1f}')
    if each:
        print(f'{many[0]["batch"]} sequences against {few[0]["batch"]}, tokens/s: ' + ', '.join(each), flush=True)
