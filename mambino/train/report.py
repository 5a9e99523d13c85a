"""What there is to see of a run, in a file: its curves, its settings, what it wrote.

    write_report('out', True, 'train.py')               # out/report.html
    write_report('out', 'curves.png', 'train.py')       # a picture, by matplotlib

    metrics.jsonl ──► curves ──┐
    ckpt.pt ──► settings ──────┼──► report.html: nothing but itself is needed to look at it
    train.log ──► samples ─────┘

It only reads, so a run may be going on meanwhile. train.log is there where the page started the run.
"""
import datetime
import os
import re
import tempfile
from typing import NamedTuple

from mambino import files, standalone
from mambino.configurator import fail, settings_of, shown
from mambino.train.curves import LEFT, RIGHT, Frame, is_number, mean, read_lines, thinned

POINTS = 600                    # of a curve
WIDE, NARROW, HEIGHT = 800, 560, 340            # pixels of a chart's picture: of the loss, and of the others
SAMPLES = 20                    # of the text that it wrote, the last ones
LONGEST = 1e12                  # seconds that a log may tell of
LARGEST_LOG = 1 << 20           # bytes of the end of train.log in which they are looked for
# a line --- may stand in the text, too; its end is the one behind which train.py says something of its own
SAMPLE = re.compile(r'^--- sample at step (\d+)\n(.*?)\n---(?=\n(?:step|done|stopped|stopping|---|note|warning|error|'
                    r'out of memory|\$) ?|\n?\Z)', re.DOTALL | re.MULTILINE)


class Chart(NamedTuple):
    """Curves with the same axes."""
    title: str
    curves: dict                # {what it is called: its name in the log}
    unit: float = 1             # its values are divided by this
    join: object = mean         # what stands for neighbours where there are too many points


CHARTS = (
    Chart('loss, nats a token', {'train': 'loss', 'val': 'val_loss'}),
    Chart('learning rate', {'rate': 'lr'}),
    Chart('norm of the gradient', {'norm': 'grad_norm'}, join=max),
    Chart('tokens a second', {'tokens/s': 'tokens_per_s'}),
    Chart('memory, GB', {'GB': 'memory'}, 2**30, max),
    Chart('load of the experts, in even shares', {'most': 'expert_load_max', 'least': 'expert_load_min'}),
)
CSS = '''
figure { margin: 1rem 0 0; } svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
svg text { fill: var(--pale); font-size: 13px; } svg:focus-visible { outline: 2px solid var(--accent); }
.grid { stroke: var(--line); } .cursor { stroke: var(--pale); } .curve0 { stroke: var(--accent); }
.val { stroke: #d4542c; } .paler { stroke-opacity: .55; } .key0 { color: var(--accent); } .key1 { color: #d4542c; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 1rem; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; } output { min-height: 1.5em; }
.changed td:nth-child(2) { font-weight: bold; } details { margin: .5rem 0; }
'''
# What stands under the pointer, or where the arrow keys are, of each chart.
SCRIPT = '''
for (const figure of document.querySelectorAll('figure')) {
  const chart = JSON.parse(figure.querySelector('script').textContent)
  const svg = figure.querySelector('svg'), cursor = svg.querySelector('.cursor'), said = figure.querySelector('output')
  const steps = [...new Set(chart.curves.flatMap(curve => curve.points.map(point => point[0])))].sort((a, b) => a - b)
  const number = value => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString('en') : +value.toPrecision(4)
  const nearest = (points, step) => points.reduce((best, point) =>
    Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best)
  let place = steps.length - 1
  const show = step => {
    const x = chart.left + (step - chart.from) / (chart.to - chart.from) * chart.width
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x); cursor.removeAttribute('visibility')
    place = steps.indexOf(step)
    const values = chart.curves.map(curve => {
      const [at, value] = nearest(curve.points, step)
      return curve.name + ' ' + number(value) + (at === step ? '' : ' at ' + number(at))
    })
    said.textContent = ['step ' + number(step), ...values].join(' · ')
  }
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect()
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width
    const wanted = chart.from + (x - chart.left) / chart.width * (chart.to - chart.from)
    show(steps.reduce((best, step) => Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best))
  })
  svg.addEventListener('keydown', event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
    if (!by) return
    event.preventDefault()
    show(steps[Math.max(0, Math.min(steps.length - 1, place + by))])
  })
}
'''


# --- reading --------------------------------------------------------------------------------------

def write_report(out_dir, to, script):
    """Writes the report of out_dir's run: to True is out_dir/report.html, else it is a file that ends in .html
    or .png. script: the path of train.py, whose settings' defaults are told apart."""
    path = os.path.join(out_dir, 'report.html') if to is True else to
    if not isinstance(path, str) or not path.lower().endswith(('.html', '.htm', '.png')):
        fail(f'report={to}: it is a file that ends in .html or .png, or --report alone: {out_dir}/report.html')
    try:
        lines, damaged = read_lines(os.path.join(out_dir, 'metrics.jsonl'))
    except FileNotFoundError:
        lines, damaged = [], 0
    except OSError as error:
        fail(f'{out_dir}/metrics.jsonl: cannot be read: {error.strerror}')
    ckpt = read_checkpoint(out_dir)
    if not lines and not ckpt:
        fail(f'{out_dir}: there is no run in it yet, of which a report could be')
    if damaged:
        print(f'note: {out_dir}/metrics.jsonl: {damaged} lines are damaged and left out')
    points = points_of(lines)
    try:
        if path.lower().endswith('.png'):
            write_picture(path, out_dir, points)
        else:
            with files.whole(path) as f:
                title = os.path.basename(os.path.abspath(out_dir))
                body = body_of(title, lines, points, ckpt, read_samples(out_dir), defaults_of(script))
                for piece in standalone.page(f'{title}: a run of train.py', body, CSS, SCRIPT):
                    f.write(piece.encode())
    except OSError as error:
        fail(f'{path}: cannot be written: {error.strerror}')
    print(f'written: {shown(path)}')


def read_checkpoint(out_dir):
    """The latest checkpoint of a run, tensors left where they are; None before there is one."""
    for name in ('ckpt.pt', 'best.pt'):
        path = os.path.join(out_dir, name)
        if os.path.exists(path):
            from mambino.weights.checkpoint import load_checkpoint
            return load_checkpoint(path, read_shards=False)
    return None


def defaults_of(script):
    """{name: default} of the settings of a script."""
    return {setting.name: setting.default for setting in settings_of(script)}


def points_of(lines):
    """{name in the log: [(step, value), …]} in the order of steps; of a step that stands twice the last."""
    values = {}
    for line in lines:
        for name, value in line.items():
            if is_number(value):
                values.setdefault(name, {})[line['step']] = value
    return {name: sorted(of_name.items()) for name, of_name in values.items()}


def read_samples(out_dir):
    """[(step, text), …] of the samples in train.log, the last one first; of a step that stands twice the last."""
    try:
        with open(os.path.join(out_dir, 'train.log'), 'rb') as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - LARGEST_LOG))
            text = f.read().decode('utf-8', 'replace').replace('\r\n', '\n')
    except OSError:
        return []
    samples = {int(step): sample for step, sample in SAMPLE.findall(text)}
    return sorted(samples.items(), reverse=True)[:SAMPLES]


def curves_of(chart, points):
    """{what it is called: [(step, value), …]} of those curves of a chart that there are."""
    curves = {}
    for label, name in chart.curves.items():
        scaled = [(step, value / chart.unit) for step, value in points.get(name, ())]
        if scaled and any(value for _, value in scaled):
            curves[label] = thinned(scaled, POINTS, chart.join)
    return curves


# --- as a page ------------------------------------------------------------------------------------

def body_of(title, lines, points, ckpt, samples, defaults):
    """Yields the page's HTML."""
    yield f'<h1>{standalone.escaped(title)}</h1>\n'
    yield from table(facts(lines, points, ckpt))
    drawn = [(chart, curves) for chart in CHARTS if (curves := curves_of(chart, points))]
    if not drawn:
        yield '<p>Its log has no number yet.</p>\n'
    for chart, curves in drawn[:1]:
        yield from figure(chart, curves, WIDE)
    yield '<div class="charts">\n'
    for chart, curves in drawn[1:]:
        yield from figure(chart, curves, NARROW)
    yield '</div>\n'
    if samples:
        yield '<h2>What it wrote</h2>\n'
    for step, text in samples:
        yield f'<details open><summary>step {step:,}</summary><pre>{standalone.escaped(text)}</pre></details>\n'
    if ckpt:
        yield from settings_table(ckpt['settings'], defaults)


def facts(lines, points, ckpt):
    """Yields (name, text) of what is worth knowing first."""
    about = ckpt['metadata'] if ckpt else {}
    settings = ckpt['settings'] if ckpt else {}
    if ckpt:
        parameters = about.get('parameters')
        yield 'model', ckpt['kind'] + (f', {parameters:,} parameters' if is_number(parameters) else '')
        yield 'dataset', settings.get('dataset', '')
    steps = max((line['step'] for line in lines), default=about.get('step', 0))
    of = f' of {settings["max_iters"]:,}' if is_number(settings.get('max_iters')) else ''
    yield 'steps', f'{steps:,}{of}'
    if points.get('tokens'):
        yield 'tokens', f'{points["tokens"][-1][1]:,}'
    if points.get('val_loss'):
        step, best = min(points['val_loss'], key=lambda point: point[1])
        yield 'best val loss', f'{best:.4f}, at step {step:,}'
    if points.get('loss'):
        yield 'train loss', f'{points["loss"][-1][1]:.4f} at the end'
    if points.get('seconds'):
        seconds = min(points['seconds'][-1][1], LONGEST)
        yield 'time of training', str(datetime.timedelta(seconds=round(max(0, seconds))))
    if about:
        yield 'last saved', f'{about.get("time", "")}, on {about.get("device", "")}, torch {about.get("torch", "")}'


def table(rows):
    """Yields a table of (name, text)."""
    yield '<table>\n'
    for name, text in rows:
        yield f'<tr><th class="pale">{standalone.escaped(name)}</th><td>{standalone.escaped(text)}</td></tr>\n'
    yield '</table>\n'


def settings_table(settings, defaults):
    """Yields all settings of a run, those first that differ from the defaults."""
    changed = {name: value for name, value in settings.items() if name in defaults and value != defaults[name]}
    yield f'<h2>Settings: {len(changed)} are not as train.py has them</h2>\n<table>\n'
    for name, value in changed.items():
        yield (f'<tr class="changed"><td>{standalone.escaped(name)}</td><td>{standalone.escaped(repr(value))}</td>'
               f'<td class="pale">{standalone.escaped(repr(defaults[name]))}</td></tr>\n')
    yield '</table>\n<details><summary>the others</summary>\n'
    yield from table((name, repr(value)) for name, value in settings.items() if name not in changed)
    yield '</details>\n'


def figure(chart, curves, width):
    """Yields a chart: its picture, and its numbers for who points at it."""
    frame = Frame.of(curves.values(), width, HEIGHT)
    keys = ''.join(f' <span class="key{i}">{name}</span>' for i, name in enumerate(curves)) if len(curves) > 1 else ''
    yield f'<figure><figcaption><b>{chart.title}</b>{keys}<output class="pale"></output></figcaption>\n'
    yield (f'<svg viewBox="0 0 {width} {HEIGHT}" tabindex="0" role="img" '
           f'aria-label="{chart.title}; arrow keys tell its values">\n')
    yield from frame.grid('step', 'class="grid"', columns=6)
    for i, (name, points) in enumerate(curves.items()):
        style = f'class="{"val" if i else "curve0"}"'
        yield frame.polyline(points, style)
        if name == 'val' and len(points) <= 60:
            for at, value in points:
                x, y = frame.place(at, value)
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="none" {style}/>'
    top, bottom = frame.place(frame.left, frame.high)[1], frame.place(frame.left, frame.low)[1]
    yield f'<line class="cursor" y1="{top}" y2="{bottom}" visibility="hidden"/>\n</svg>\n'
    sent = [dict(name=name, points=[[round(at), float(f'{value:.6g}')] for at, value in points])
            for name, points in curves.items()]
    numbers = {'from': frame.left, 'to': frame.right, 'left': LEFT, 'width': width - LEFT - RIGHT, 'curves': sent}
    yield f'<script type="application/json">{standalone.data(numbers)}</script></figure>\n'


# --- as a picture ---------------------------------------------------------------------------------

def write_picture(path, out_dir, points):
    """Writes the charts as a PNG."""
    try:
        import matplotlib
    except ImportError:
        fail(f'report={path}: a picture needs matplotlib: pip install matplotlib; report.html needs nothing')
    matplotlib.use('Agg')               # needs no screen
    from matplotlib import pyplot
    drawn = [(chart, curves) for chart in CHARTS if (curves := curves_of(chart, points))]
    if not drawn:
        fail(f'{out_dir}/metrics.jsonl: has no number yet that could be drawn')
    rows = -(-len(drawn) // 2)
    pictured, axes = pyplot.subplots(rows, 2, figsize=(12, 3.6 * rows), layout='constrained', squeeze=False)
    for axis in axes.flat[len(drawn):]:
        axis.set_axis_off()
    for axis, (chart, curves) in zip(axes.flat, drawn):
        frame = Frame.of(curves.values(), 1, 1)
        for name, its_points in curves.items():
            axis.plot(*zip(*its_points), linewidth=1.2, label=name)
        margin = 0.03 * (frame.high - frame.low)
        axis.set_ylim(frame.low - margin, frame.high + margin)
        axis.set(title=chart.title, xlabel='step')
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(frameon=False)
    with tempfile.TemporaryFile() as drawing:
        pictured.savefig(drawing, dpi=110, format='png')
        drawing.seek(0)
        with files.whole(path) as f:
            f.write(drawing.read())
    pyplot.close(pictured)
