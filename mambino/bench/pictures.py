"""Pictures of what was measured: the loss against seconds, cost against length, and a bar for each
contender of `train`."""
from mambino.bench.contenders import PEERS
from mambino.bench.turns import HERE
from mambino.machine import machine_name

LABELS = {'mamba2': 'Mamba-2', 'mamba1': 'Mamba-1', 'mamba3': 'Mamba-3', 'mamba3_r4': 'Mamba-3, rank 4',
          'gpt': 'GPT', 'gpt_window': 'GPT with a window',
          'hybrid': 'hybrid', 'nanogpt': 'nanoGPT'}


def draw(rows, settings):
    """Writes settings.plot, .png or .svg, with a panel for each kind of rows that there is. The
    same figures give the same bytes."""
    import matplotlib
    matplotlib.use('Agg')  # needs no screen
    from matplotlib import pyplot
    pyplot.rcParams.update({'svg.hashsalt': 'mambino', 'svg.fonttype': 'none',
                            'axes.spines.top': False, 'axes.spines.right': False})
    rows_of = {}
    for section in ('run', 'length', 'train'):
        rows_of[section] = [row for row in rows if row['section'] == section and row['root'] == HERE]
    panels = []
    if rows_of['run']:
        panels.append((loss_curves, rows_of['run']))
    if rows_of['length']:
        panels += [(speed_by_length, rows_of['length']), (memory_by_length, rows_of['length'])]
    if rows_of['train']:
        panels.append((bars, rows_of['train']))
    size = (6.5 * len(panels), 4.2)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout='constrained', squeeze=False)
    for axis, (panel, its_rows) in zip(axes[0], panels):
        panel(axis, its_rows, settings)
    figure.suptitle(machine_name(settings.device), fontsize=9, color='0.4')
    dateless = dict(Date=None) if settings.plot.endswith('.svg') else None
    figure.savefig(settings.plot, dpi=120, metadata=dateless)
    pyplot.close(figure)


def loss_curves(axis, rows, settings):
    """Val loss against seconds of the process, imports included: of each contender the run that was
    done soonest."""
    for row in rows:
        curve = min(row['curves'], key=lambda curve: curve[-1][0])
        style = dict(color='0.55', linestyle='--') if row['name'] == 'nanogpt' else {}
        axis.plot(*zip(*curve), marker='o', markersize=3, label=LABELS[row['name']], **style)
    if settings.time_to_loss < max(row['losses'][0] for row in rows):
        axis.axhline(settings.time_to_loss, color='0.8', linewidth=1, zorder=0)
    axis.set(xscale='log', xlabel='seconds since the command was typed', ylabel='val loss',
             title='characters of Shakespeare')
    axis.xaxis.set_major_formatter('{x:g}')
    axis.legend(frameon=False)


def bars(axis, rows, settings):
    names = [f'{row["label"]} {row["dtype"]}' for row in rows]
    colors = ['C1' if row['name'] in PEERS else 'C0' for row in rows]
    axis.barh(names, [row['tokens_per_second'] for row in rows], color=colors)
    axis.set(title=f'training, tokens/s: {settings.n_layer} layers of {settings.n_embd}, '
                   f'{settings.batch_size}×{settings.block_size} tokens')
    axis.invert_yaxis()


def by_length(axis, rows, settings, key, scale):
    for name in dict.fromkeys(row['name'] for row in rows):
        points = [(row['sizes']['block_size'], row[key] / scale)
                  for row in rows if row['name'] == name and key in row]
        axis.plot(*zip(*points), marker='o', label=LABELS[name])
    lengths = settings.lengths.split(',')
    axis.set(xlabel='tokens in a sequence', xscale='log')
    axis.set_xticks([int(length) for length in lengths], lengths)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.legend()


def speed_by_length(axis, rows, settings):
    by_length(axis, rows, settings, 'tokens_per_second', 1)
    axis.set_title('training, tokens/s')


def memory_by_length(axis, rows, settings):
    by_length(axis, rows, settings, 'memory', 1e6)
    axis.set_title('peak memory, MB')
