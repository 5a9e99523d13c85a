"""Figures as a person reads them, and the signs of how a run stands."""
import math
import re

ICONS = {'running': 'directions_run', 'complete': 'check_circle', 'stopped': 'pause_circle', 'killed': 'warning',
         'elsewhere': 'lan', 'nan': 'error', 'memory': 'error', 'disk': 'error', 'failed': 'error', 'unknown': 'help'}
STATES = {'running': 'training', 'complete': 'complete', 'stopped': 'stopped', 'killed': 'killed',
          'elsewhere': 'on another machine', 'nan': 'NaN', 'memory': 'out of memory', 'disk': 'disk full',
          'failed': 'failed', 'unknown': 'no log'}
NOTHING = '—'
LABELS = {'n_layer': 'Layers', 'n_embd': 'Width', 'max_iters': 'Steps'}     # of settings, as the panel Train has them


def labelled(text):
    """A sentence of train.py with the names that settings have on the page: '--n_layer' → 'Layers'."""
    return re.sub(fr'(?:--)?\b({"|".join(LABELS)})\b', lambda found: LABELS[found[1]], text)


def loss_in_words(value):
    return f'{value:.4f}' if value is not None and math.isfinite(value) else NOTHING


def count_in_words(value):
    """2793312 → '2.79M'."""
    if value is None:
        return NOTHING
    for unit, size in (('G', 1e9), ('M', 1e6)):
        if value >= size:
            return f'{value / size:.3g}{unit}'
    return f'{value:,.0f}'


def bytes_in_words(value):
    if not value:
        return NOTHING
    for unit, size in (('GB', 2 ** 30), ('MB', 2 ** 20), ('KB', 2 ** 10)):
        if value >= size:
            return f'{value / size:.3g} {unit}' if value < 1000 * size else f'{value / size:,.0f} {unit}'
    return f'{value:.0f} bytes'


def time_in_words(seconds):
    """3700 → '1 h 1 min'."""
    if seconds is None:
        return NOTHING
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours:,} h {minutes} min'
    return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'
