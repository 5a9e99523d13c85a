"""What a chart is sent of the numbers of a run: few points of many, and of a run that goes on the
new ones alone.

    feed = Feed(['loss', 'val_loss'], smoothing=0.6)
    feed.update(log)        # (True, [points, points]) at first, and when the file was written anew
    feed.update(log)        # (False, [new points, new points]) from then on; None: nothing is new

    Metrics ──► smoothed ──► thinned ──► [[x, y], …]
"""
POINTS = 400            # of a curve in a chart that is drawn anew; more would not be seen
CALM = 0.98             # of the smoothing: more would stand still
HOURS = 3600


class Smoothing:
    """A running mean, in which what came before counts so much; it begins without a bias."""

    def __init__(self, weight):
        self.weight = min(CALM, max(0.0, weight))
        self.sum = self.share = 0.0

    def of(self, values):
        """The smoothed values, which go on where the last ones ended."""
        if not self.weight:
            return values
        smoothed = []
        for value in values:
            self.sum = self.weight * self.sum + (1 - self.weight) * value
            self.share = self.weight * self.share + (1 - self.weight)
            smoothed.append(self.sum / self.share)
        return smoothed


def thinned(xs, ys, most=POINTS):
    """[[x, y], …], at most so many: of each stretch its lowest and its highest point, in their
    order, so that no peak is lost."""
    n = len(ys)
    if n <= most:
        return [[x, y] for x, y in zip(xs, ys)]
    buckets = max(1, (most - 1) // 2)
    points = []
    for i in range(buckets):
        first, last = i * (n - 1) // buckets, (i + 1) * (n - 1) // buckets
        values = ys[first:last]
        low = first + values.index(min(values))
        high = first + values.index(max(values))
        points += [[xs[at], ys[at]] for at in sorted({low, high})]
    points.append([xs[n - 1], ys[n - 1]])
    return points


class Feed:
    """See the top of the file. names: of the numbers, one a curve; those with a ~ before them are
    smoothed."""

    def __init__(self, names, smoothing=0.0):
        self.names = [name.removeprefix('~') for name in names]
        self.weights = [smoothing if name.startswith('~') else 0.0 for name in names]
        self.generation = None

    def update(self, log):
        """(whether the chart is to be drawn anew, the points of each curve), or None if nothing is
        new."""
        is_anew = log.generation != self.generation or max(self.points) > 3 * POINTS
        if is_anew:
            self.generation = log.generation
            self.taken = [0] * len(self.names)
            self.points = [0] * len(self.names)
            self.smoothings = [Smoothing(weight) for weight in self.weights]
        curves = []
        for i, name in enumerate(self.names):
            steps, values = log.curve(name, self.taken[i])
            self.taken[i] += len(values)
            points = thinned(steps, self.smoothings[i].of(values))
            self.points[i] += len(points)
            curves.append(points)
        return (is_anew, curves) if is_anew or any(curves) else None


def along(log, name, x):
    """([x], [values]) of a number over 'step', 'tokens' or 'hours': an evaluation tells its step
    alone, so between two steps that tell it the way is straight."""
    steps, values = log.curve(name)
    if x == 'step':
        return steps, values
    at, known = log.curve('tokens' if x == 'tokens' else 'seconds')
    scale = 1 if x == 'tokens' else HOURS
    found = []
    i = 0
    for step in steps:
        while i < len(at) and at[i] < step:
            i += 1
        if i < len(at) and at[i] == step:
            found.append(known[i] / scale)
        elif 0 < i < len(at):
            share = (step - at[i - 1]) / (at[i] - at[i - 1])
            found.append((known[i - 1] + share * (known[i] - known[i - 1])) / scale)
        else:
            found.append((known[min(i, len(at) - 1)] if at else step) / scale)
    return found, values
