"""The numbers of a run as curves: read from its metrics.jsonl, thinned, and placed between axes.

    lines, damaged = read_lines('out/metrics.jsonl')
    frame = Frame.of([points, other_points], 900, 480)
    svg = [*frame.grid('step'), frame.polyline(thinned(points, 600), 'class="val"')]

    metrics.jsonl ──► lines ──► [(x, y), …] ──► thinned ──► Frame ──► SVG

Nothing is needed but Python, and torch is not imported: a curve is there at once, also of a run
that is still being trained.
"""
import math
from typing import NamedTuple

from mambino.plain import parse_json

LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50       # margins of a picture


# --- reading --------------------------------------------------------------------------------------

def read_lines(path):
    """([the values of each line, {'step': …}], how many lines could not be read) of a log. OSError
    if it is not there."""
    with open(path, 'rb') as f:
        lines = f.read().split(b'\n')
    sound = []
    damaged = 0
    for line in filter(bytes.strip, lines):
        try:
            values = parse_json(line)
            is_sound = is_number(values['step'])
        except (ValueError, KeyError, TypeError):
            is_sound = False
        if is_sound:
            sound.append(values)
        else:
            damaged += 1
    return sound, damaged


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300


# --- fewer, and round -----------------------------------------------------------------------------

def mean(values):
    return sum(values) / len(values)


def thinned(points, most, join=mean):
    """At most so many points: each stands for neighbours, at the mean of their x. join: what
    becomes of their y, as max."""
    if len(points) <= most:
        return points
    joined = []
    for i in range(most):
        xs, ys = zip(*points[i * len(points) // most:(i + 1) * len(points) // most])
        joined.append((mean(xs), join(ys)))
    return joined


def bounds(curves):
    """((least x, greatest x), (least y, greatest y)) of all points of some curves; of the highest
    values those of a beginning are left out of sight where they would press the rest flat."""
    xs = [at for points in curves for at, _ in points]
    ys = sorted(value for points in curves for _, value in points)
    low, high = ys[0], ys[-1]
    left, right = min(xs), max(xs)
    later = [value for points in curves for at, value in points if at > left + 0.2 * (right - left)]
    usual = max([ys[int(0.98 * (len(ys) - 1))], *later])      # what rises later is to be seen
    if usual > low and high - low > 2 * (usual - low):
        high = usual
    if high - low <= 1e-9 * abs(high):                      # a level: in the middle
        half = 0.5 * abs(high) or 0.5
        low, high = low - half, high + half
    if right - left <= 1e-9 * abs(left):
        right = left + max(1, 1e-9 * abs(left))
    return (left, right), (low, high)


def ticks(low, high, n):
    """About n round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= n)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value):
    """A number for an axis: 1500000 is 1.5M."""
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f'{value / size:g}{unit}'
    return f'{value:.4g}'


# --- between axes ---------------------------------------------------------------------------------

class Frame(NamedTuple):
    """Where values stand in a picture of so many pixels."""
    left: float             # values at its sides
    right: float
    low: float
    high: float
    width: int
    height: int

    @classmethod
    def of(cls, curves, width, height):
        """The one that holds all points of some curves."""
        (left, right), (low, high) = bounds(curves)
        return cls(left, right, low, high, width, height)

    def place(self, at, value):
        """(x, y) in pixels; what is too high or too low lies on the edge."""
        value = max(self.low, min(value, self.high))
        return (LEFT + (at - self.left) / (self.right - self.left) * (self.width - LEFT - RIGHT),
                TOP + (self.high - value) / (self.high - self.low) * (self.height - TOP - BOTTOM))

    def grid(self, x, line='stroke="#ddd"', columns=8, rows=6):
        """Yields lines and numbers at round values. x: what stands below; line: how lines are drawn."""
        for tick in ticks(self.low, self.high, rows):
            _, y = self.place(self.left, tick)
            yield f'<line x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" {line}/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        for tick in ticks(self.left, self.right, columns):
            at, _ = self.place(tick, self.low)
            bottom = self.height - BOTTOM
            yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}" {line} stroke-opacity="0.6"/>'
            yield f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{short(tick)}</text>'
        yield f'<text x="{self.width / 2}" y="{self.height - 12}" text-anchor="middle">{x}</text>'

    def polyline(self, points, style):
        """The line through some points."""
        places = ' '.join(f'{at:.1f},{y:.1f}' for at, y in (self.place(*point) for point in points))
        return f'<polyline points="{places}" fill="none" stroke-width="1.5" {style}/>'
