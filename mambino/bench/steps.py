"""The sections train, layers, length, loss and sample: their contenders, and their tables."""
from statistics import median

from mambino.bench.contenders import PEERS
from mambino.bench.turns import HERE, all_times, contest, ratio, table, with_before
from mambino.machine import peak_flops

# of our models, with which other each is compared in training
OF_OURS = {'mamba2': 'gpt', 'mamba3': 'mamba2', 'mamba3_r4': 'mamba2'}
BYTES = 256  # vocabulary of the section `length`, so that mixing the tokens is most of its work


def contenders(section, settings):
    """The rows of a section, still without figures, in groups: the processes of a group live
    together and take turns."""
    dtypes = settings.dtypes.split(',')
    names = settings.models.split(',')
    if section == 'layers':
        names = ['mamba1'] if 'mamba1' in names else []
    elif section == 'loss':
        names, dtypes = ['linear_cross_entropy'], dtypes[:1]
    elif section == 'length':
        return lengths_of_each(names, dtypes[0], settings)

    group = []
    for dtype in dtypes:
        for name in names:
            group += with_before([new_row(section, name, dtype)], settings)
            if not settings.against:
                group += peers_of(section, name, dtype, settings)
    return [group]


def new_row(section, name, dtype, **sizes):
    label = PEERS[name][0] if name in PEERS else name
    if sizes:
        label += f' at {sizes["block_size"]:,}'
    return dict(section=section, name=name, label=label, dtype=dtype, root=HERE, sizes=sizes, times=[])


def peers_of(section, name, dtype, settings):
    """Rows of the peers that resemble this model and take part in this section."""
    rows = []
    for peer in filter(None, settings.peers.split(',')):
        if PEERS[peer][1] == name and section in PEERS[peer][2]:
            rows.append(new_row(section, peer, dtype))
            if peer == 'nanogpt' and not settings.nanogpt:
                rows[-1]['error'] = 'name its folder with --nanogpt='
    return rows


def lengths_of_each(names, dtype, settings):
    """The groups of the section `length`: a model each, at every length, with as many tokens a step
    as the longest has."""
    lengths = sorted({int(length) for length in settings.lengths.split(',')})
    if 'gpt' in names and 'gpt_window' not in names:
        names = [*names, 'gpt_window']
    model = dict(n_layer=settings.length_n_layer, n_embd=settings.length_n_embd, vocab_size=BYTES)
    groups = []
    for name in names:
        rows = [new_row('length', name, dtype, block_size=T, batch_size=lengths[-1] // T, **model)
                for T in lengths]
        groups.append(with_before(rows, settings))
    return groups


def measure(section, settings, peaks):
    """The section's rows with `times`, shown as a table. peaks: {dtype: [FLOP/s]}, measured each
    round too."""
    def measure_peaks():
        for dtype, each in peaks.items():
            # past its cache: the machine may have changed
            each.append(peak_flops.__wrapped__(settings.device, dtype))

    rows = []
    for group in contenders(section, settings):
        rows += contest(group, settings, measure_peaks)
    measured = [row for row in rows if 'error' not in row]
    if measured:
        show(section, measured, settings, peaks)
    return rows


# --- tables ---------------------------------------------------------------------------------------

def millions(n, digits=0):
    return 'n/a' if n is None else f'{n / 1e6:,.{digits}f}'


def show(section, rows, settings, peaks):
    """Prints a section's table; adds the medians it shows to the rows."""
    for row in rows:
        row['ms'] = {work: 1e3 * median(all_times(row, work)) for work in row['times'][0]}
        work = 'prefill' if section == 'sample' else 'step'
        row['tokens_per_second'] = 1e3 * row['tokens'] / row['ms'][work]
        if section == 'train' and settings.clock == 'wall':     # by which the peak is measured
            row['mfu'] = row['flops'] * row['tokens_per_second'] / median(peaks[row['dtype']])
    if section == 'sample':
        show_sample(rows, settings)
        return

    header = ['model', 'dtype', 'tokens/s', 'ms/step', 'min–max', 'steps', 'peak MB']
    header += dict(train=['M params', 'MFU'], loss=['inputs MB']).get(section, ['M params'])
    lines = []
    for row in rows:
        times = all_times(row, 'step')
        line = [row['label'], row['dtype']]
        line += [f'{row["tokens_per_second"]:,.0f}', f'{row["ms"]["step"]:.0f}']
        line += [f'{1e3 * min(times):.0f}–{1e3 * max(times):.0f}', str(len(times))]
        line.append(millions(row.get('memory')))
        line.append(millions(row['inputs']) if section == 'loss' else millions(row['parameters'], 1))
        if section == 'train':
            line.append(f'{100 * row["mfu"]:.0f}%' if 'mfu' in row else 'n/a')
        lines.append(line)
    table(title(section, rows, settings), header, lines)


def title(section, rows, settings):
    width = f'n_embd {settings.n_embd}'
    if section == 'train':
        return (f'training: {settings.n_layer} layers, {width}, {settings.n_head} heads, '
                f'vocabulary {settings.vocab_size}; {settings.batch_size}×{settings.block_size} tokens a step')
    if section == 'layers':
        return (f'two Mamba-1 layers, forward and backward: {width}; '
                f'{settings.layers_batch_size}×{settings.block_size} tokens; tokens/s count each layer')
    if section == 'loss':
        return (f'the loss alone, forward and backward: {width}, vocabulary {settings.loss_vocab_size}; '
                f'{settings.loss_batch_size}×{settings.loss_block_size} tokens; '
                'peak MB beyond the inputs and their gradients')
    return (f'length, {rows[0]["tokens"]:,} tokens a step: {settings.length_n_layer} layers, '
            f'n_embd {settings.length_n_embd}, {settings.n_head} heads, vocabulary {BYTES}; window {settings.window}')


def show_sample(rows, settings):
    positions = settings.positions.split(',')
    first, last = positions[0], positions[-1]
    lines = []
    for row in rows:
        ms = row['ms']
        line = [row['label'], row['dtype'], f'{row["tokens_per_second"]:,.0f}']
        line += [f'{ms[position]:.2f}' for position in positions]
        line.append(f'{ms[last] / ms[first]:.2f}×')
        line.append(' / '.join(millions(size, 2) for size in row['state']) or 'n/a')
        if row['state']:        # what a token reads: all weights, and the state
            read = [row['weights'] + size for size in row['state']]
            row['a_byte'] = (ms[last] / read[-1]) / (ms[first] / read[0])
            line += [' / '.join(millions(size, 1) for size in read), f'{row["a_byte"]:.2f}×']
        else:
            line += ['n/a', 'n/a']
        lines.append(line)
    table(f'sampling, one sequence: a prompt of {settings.prefill} tokens, '
          f'then ms for one token at position {" and ".join(positions)}',
          ['model', 'dtype', 'prompt tokens/s', *positions, f'{last} / {first}', 'state MB', 'read MB', '… a byte'],
          lines)


# --- who is compared with whom --------------------------------------------------------------------

def is_pair(a, b, settings):
    """Is row a compared with row b? The same before; our model with its peer, or with the one of OF_OURS; the
    longest with the shortest."""
    if a['root'] != HERE or any(a[key] != b[key] for key in ('section', 'dtype')):
        return False
    if b['root'] != HERE:
        return a['label'] == b['label'].removeprefix('before: ')
    if a['section'] == 'length':
        length, other = a['sizes']['block_size'], b['sizes']['block_size']
        lengths = [int(T) for T in settings.lengths.split(',')]
        is_most = [length, other] == [max(lengths), min(lengths)] and length > other
        return a['name'] == b['name'] and is_most
    if b['name'] in PEERS:
        return PEERS[b['name']][1] == a['name']
    return a['section'] == 'train' and OF_OURS.get(a['name']) == b['name']


def compare(rows, settings):
    """One ratio for each pair and each kind of work that both did in every round."""
    for b in rows:
        for a in [a for a in rows if is_pair(a, b, settings)]:
            turns = a['times'] + b['times']
            for work in [work for work in a['times'][0] if all(work in times for times in turns)]:
                speed, low, high = ratio(a, b, work)
                sizes = (a['parameters'] / b['parameters']) if a['section'] == 'train' else None
                memory = a['memory'] / b['memory'] if a.get('memory') and b.get('memory') else None
                yield dict(section=a['section'], work=work, dtype=a['dtype'], ours=a['label'], peer=b['label'],
                           speed=speed, low=low, high=high, size=sizes, memory=memory)


def show_ratios(ratios):
    names = {'prefill': 'prompt', 'loss': 'to the loss'}
    lines = []
    for each in ratios:
        line = [f'{each["ours"]} {each["dtype"]}', each['peer']]
        line += [f'{each["section"]} {names.get(each["work"], each["work"])}']
        line += [f'{each["speed"]:.2f}×', f'{each["low"]:.2f}–{each["high"]:.2f}']
        line += [f'{each["speed"] * each["size"]:.2f}×' if each['size'] else '']
        line += [f'{each["memory"]:.2f}×' if each['memory'] else '']
        lines.append(line)
    table('ours / peer: speed, its lowest and highest of the rounds, speed × parameters, and peak memory',
          ['ours', 'peer', '', 'speed', 'of rounds', '× size', 'memory'], lines)
