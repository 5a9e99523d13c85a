"""The loss of one or several runs over their steps, from the metrics.jsonl in their out_dirs.

    python -m mambino.bench.plot out                            # in the terminal
    python -m mambino.bench.plot out-a out-b --to=curves.svg    # … and as a picture, or as a page: curves.html
    python -m mambino.bench.plot out-a out-b --x=hours          # over the time of training, or over tokens

    metrics.jsonl ──► [(x, loss)] of train and val of each run ──► characters │ SVG │ HTML

Nothing is needed but Python, and torch is not imported: a curve is there at once, also of a run that
is still being trained.
"""
import html
import os
import shutil
import sys

from mambino.configurator import configure, fail, require, shown
from mambino.console import end_quietly
from mambino.train.curves import LEFT, Frame, bounds, is_number, read_lines, short, thinned, ticks

to = ''                 # a file to write as well: curves.svg, or curves.html
x = 'step'              # what the loss is drawn over: 'step', 'tokens' or 'hours' of training
inputs = []             # out_dirs

MARKS = '●○■□▲△◆◇'      # of a run's val and train, in the terminal
PLAIN_MARKS = '*.#:@,%;'
COLORS = ('#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf', '#8c564b', '#e377c2')
WIDTH, HEIGHT = 900, 480                                    # of a picture
POINTS = 600            # of a curve in a picture; more would not be seen


# --- what is drawn --------------------------------------------------------------------------------

def read_run(folder, x):
    """({'train': [(x, loss)], 'val': […]}, the number of lines that could not be read) of a run."""
    path = os.path.join(folder, 'metrics.jsonl') if os.path.isdir(folder) else folder
    try:
        lines, damaged = read_lines(path)
    except OSError as error:
        advice = '' if os.path.isdir(folder) else '; name the --out_dir of a run of train.py'
        fail(f'{path}: {error.strerror}{advice}')
    points = {'train': {}, 'val': {}}
    last = 0, 0                                             # an evaluation tells its step alone
    for values in lines:
        step = values['step']
        seen = {'step': step, 'tokens': values.get('tokens'), 'hours': values.get('seconds')}
        if is_number(seen['hours']):
            seen['hours'] /= 3600
        at = seen[x]
        if is_number(at):
            last = step, at
        elif last[0]:
            at = last[1] * step / last[0]
        for curve, name in (('train', 'loss'), ('val', 'val_loss')):
            if is_number(values.get(name)) and is_number(at):
                points[curve][at] = values[name]            # of a step that stands twice the last
    return {curve: sorted(of_curve.items()) for curve, of_curve in points.items()}, damaged


# --- in the terminal ------------------------------------------------------------------------------

def draw_text(curves, x, columns, rows, marks):
    """Lines of characters. curves: {label: [(x, loss)]}, a run's train before its val."""
    (left, right), (low, high) = bounds(curves.values())
    margin = 8
    width = max(20, columns - margin - 2)
    grid = [[' '] * width for _ in range(rows)]
    for mark, points in zip(marks, curves.values()):
        for at, loss in thinned(points, width):
            column = round((at - left) / (right - left) * (width - 1))
            row = round((high - min(loss, high)) / (high - low) * (rows - 1))
            grid[row][column] = mark
    labels = {round((high - tick) / (high - low) * (rows - 1)): tick for tick in ticks(low, high, max(2, rows // 4))}
    for i, row in enumerate(grid):
        label = f'{labels[i]:.4g}' if i in labels else ''
        yield f'{label:>{margin - 1}} |{"".join(row)}'.rstrip()
    yield ' ' * margin + '+' + '-' * width
    ends = short(left), short(right)
    yield ' ' * (margin + 1) + ends[0] + f'{x:^{max(1, width - len(ends[0]) - len(ends[1]))}}' + ends[1]
    for mark, (label, points) in zip(marks, curves.items()):
        best = min(loss for _, loss in points)
        yield f'  {mark} {label}: {points[-1][1]:.4f} at the end, {best:.4f} the lowest'


# --- as a picture ---------------------------------------------------------------------------------

def draw_svg(curves, x):
    """The picture as SVG. curves: as in draw_text; a run's two have one colour, its train is paler."""
    height = HEIGHT + 18 * len(curves)
    frame = Frame.of(curves.values(), WIDTH, HEIGHT)
    yield (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
           f'height="{height}" font-family="sans-serif" font-size="12">')
    yield f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    yield from frame.grid(x)
    runs = list(dict.fromkeys(label.rpartition(' ')[0] for label in curves))
    for i, (label, points) in enumerate(curves.items()):
        run, _, kind = label.rpartition(' ')
        style = f'stroke="{COLORS[runs.index(run) % len(COLORS)]}" stroke-opacity="{1 if kind == "val" else 0.4}"'
        yield frame.polyline(thinned(points, POINTS), style)
        for at, y in [frame.place(*point) for point in points] if kind == 'val' and len(points) <= 60 else []:
            yield f'<circle cx="{at:.1f}" cy="{y:.1f}" r="2.5" fill="none" {style}/>'
        y = HEIGHT + 18 * i
        yield f'<line x1="{LEFT}" x2="{LEFT + 24}" y1="{y}" y2="{y}" stroke-width="2" {style}/>'
        text = html.escape(f'{shown(label)}: {points[-1][1]:.4f} at the end, {min(loss for _, loss in points):.4f} the '
                           'lowest')
        yield f'<text x="{LEFT + 32}" y="{y + 4}">{text}</text>'
    yield '</svg>'


def write_picture(path, curves, x):
    """Writes an .svg, or an .html with it inside."""
    text = '\n'.join(draw_svg(curves, x)) + '\n'
    if path.lower().endswith(('.html', '.htm')):
        text = f'<!doctype html>\n<meta charset="utf-8">\n<title>loss</title>\n{text}'
    try:
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)
    except OSError as error:
        fail(f'to={path}: cannot be written: {error.strerror}')
    print(f'written: {path}')


def main(folders, to, x):
    """The curves of these runs in the terminal, and where `to` says so in a file."""
    curves = {}
    for folder in dict.fromkeys(folders):
        run, damaged = read_run(folder, x)
        if damaged:
            lines = 'line that is' if damaged == 1 else 'lines that are'
            print(f'note: {folder}: {damaged} {lines} damaged, left out')
        if not any(run.values()):
            print(f'note: {folder}: no loss by {x} in its log')
        name = os.path.normpath(folder)
        curves |= {f'{name} {kind}': points for kind, points in run.items() if points}
    if not curves:
        fail('nothing to draw: no run has logged a loss yet')
    size = shutil.get_terminal_size((100, 30))
    marks = MARKS
    try:
        MARKS.encode(sys.stdout.encoding or 'ascii')
    except (UnicodeError, LookupError):
        marks = PLAIN_MARKS
    pairs = -(-len(curves) // len(marks))
    for line in draw_text(curves, x, min(size.columns, 120), max(8, min(24, size.lines - 6)), marks * pairs):
        print(shown(line))
    if to:
        write_picture(to, curves, x)


if __name__ == '__main__':
    end_quietly()
    configure(globals(), positional='inputs')
    require(globals(), {
        'step, tokens or hours': dict(x=x in ('step', 'tokens', 'hours')),
        'a file that ends in .svg or .html': dict(to=not to or to.lower().endswith(('.svg', '.html', '.htm'))),
    })
    main(inputs or ['out'], to, x)
