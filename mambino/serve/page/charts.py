"""Charts on the page, which grow point by point.

    dress()                                             # once on each page that has some
    chart = Chart('Loss', 'chart-loss')
    chart.draw([Curve('train', '--accent', [[1, 8.3], [2, 8.1]])])
    chart.append([[[3, 7.9]]])                          # to each curve its new points

charts.js draws them, in the theme's colours, with the ECharts that NiceGUI brings.
"""
import json
import os
from typing import NamedTuple

from nicegui import ui

from mambino.serve.page import look

FOLDER = os.path.dirname(os.path.abspath(__file__))
# of runs laid over each other: to be told apart in both themes
COLORS = ('#2f9e6e', '#5b7fd6', '#d9822b', '#b0559f', '#c7514b', '#3aa5b5', '#8a8f2d', '#8a6bd1')


class Curve(NamedTuple):
    """One of a chart's curves."""
    name: str
    color: str              # of CSS, or the name of a variable of look.css
    points: list            # [[x, y], …]
    dots: bool = False      # at each point
    faint: bool = False     # it stands behind another, and is not named
    dash: bool = False


def dress():
    """Puts into this page what its charts need."""
    for name, tag in (('charts.js', 'script'), ('runs.css', 'style')):
        with open(os.path.join(FOLDER, name), encoding='utf-8') as f:
            ui.add_head_html(f'<{tag}>{f.read()}</{tag}>')


class Chart:
    """See the top of the file. name: what it is called; for those who do not see it, too."""

    def __init__(self, name, test_id, height=200):
        self.client = ui.context.client
        with ui.element('figure').classes('chart'):
            look.Words('figcaption', name)
            self.element = ui.echart({}).style(f'height: {height}px; width: 100%')
            self.element.props['role'] = 'img'
            self.element.props['aria-label'] = f'Chart: {name}'
            look.mark(self.element, test_id)

    def draw(self, curves, log=False, bars=False):
        """Shows these curves in the place of those before. log: a logarithmic axis. bars: of each x, a
        text, a bar."""
        spec = dict(curves=[curve._asdict() for curve in curves], log=log, bars=bars)
        self.run('draw', spec)

    def append(self, updates):
        """Adds points, [[x, y], …], to each curve."""
        self.run('append', updates)

    def run(self, method, argument):
        self.client.run_javascript(f'mambino.charts.{method}(getElement({self.element.id}), {json.dumps(argument)})')
