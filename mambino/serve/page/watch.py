"""One run, as it goes on: how it stands, its figures, its curves, its samples, the end of its log.

    watch = Watch('out-mine')       # in the place where it is called
    watch.follow('out-other')       # another run in the same place

Each second its files are read, in a thread, and what is new in them is sent; nothing else is kept. A page
that is opened anew, a second one, or one of a server that was started again, shows the same.
"""
import os
from urllib.parse import urlencode

from nicegui import ui

from mambino.serve import curves, launch, runs
from mambino.serve.library import checkpoint_in
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.charts import Chart, Curve
from mambino.serve.page.words import ICONS, NOTHING, bytes_in_words, count_in_words, labelled, loss_in_words
from mambino.train.report import read_samples

SECONDS = 1.0           # from look to look
LOG_LINES = 300         # of the log that stay on the page
# of each chart its name, its height, and its curves: a number of metrics.jsonl (~: smoothed), what it is
# called, its color
CHARTS = {
    'loss': ('Loss', 300, [('~loss', 'train', '--accent'), ('val_loss', 'validation', '--second')]),
    'lr': ('Learning rate', 150, [('lr', 'learning rate', '--accent')]),
    'grad-norm': ('Gradient norm', 150, [('~grad_norm', 'gradient norm', '--accent')]),
    'speed': ('Tokens a second', 150, [('~tokens_per_s', 'tokens/s', '--accent')]),
    'memory': ('Memory, GB', 150, [('memory', 'memory', '--accent')]),
}
GIGABYTE = 2 ** 30
FIGURES = ('step', 'time left', 'loss', 'best validation', 'tokens/s', 'memory')


class View:
    """All of a run that is read in a look, in a thread. feeds: {chart: Feed}. samples: those read before."""

    def __init__(self, out_dir, feeds, lines, samples):
        log = runs.metrics_of(out_dir)
        self.updates = {name: feed.update(log) for name, feed in feeds.items()}
        self.standing = runs.standing(out_dir)
        self.progress = runs.progress_of(out_dir)
        self.is_other_log, self.lines = lines.new()
        self.samples = read_samples(out_dir) if self.lines or samples is None else samples
        self.figures = dict(
            loss=loss_in_words(log.last('loss')), best=loss_in_words(log.best()),
            speed=count_in_words(log.last('tokens_per_s')), memory=bytes_in_words(log.last('memory')),
            tokens=count_in_words(log.last('tokens')))


class Watch:
    """See the top of the file."""

    def __init__(self, out_dir=''):
        self.out_dir = ''
        self.is_looking = False
        self.state = None
        self.samples = None
        self.build()
        self.follow(out_dir)
        self.timer = ui.timer(SECONDS, self.look)

    # --- what is seen

    def build(self):
        with look.sheet(test_id='run') as self.sheet:
            with look.row():
                self.title = look.heading('Run').classes('grow')
                self.title.props['data-testid'] = 'run-name'
                self.stop = self.button('Stop', 'stop', self.on_stop, 'stop')
                self.kill = self.button('Stop at once', 'bolt', self.on_kill, 'kill').props('outline color=negative')
                self.resume = self.button('Go on', 'play_arrow', self.on_resume, 'resume')
                self.more = look.field(ui.number('Steps in all', format='%.0f', min=1), 'more-steps',
                                       'A run that is complete goes on where there are more steps to make')
                self.more.classes('steps-more').style('max-width: 140px')
            with ui.element('div').classes('banner').props('role=status data-testid=banner') as self.banner:
                self.icon = ui.icon('info').props('aria-hidden=true')
                self.words = ui.label('').props('data-testid=state')
            with ui.element('div') as self.next:
                self.talk = look.Words('a', 'Talk to it').classes('go next').props('data-testid=talk-to-it')
            self.trouble = look.trouble(test_id='run-trouble')
            self.bar = ui.linear_progress(0, show_value=False, size='6px').props('rounded aria-label="Steps made"')
            self.stats = look.stats(dict.fromkeys(FIGURES, NOTHING), 'figures')
            for name, label in self.stats.items():
                look.mark(label, 'figure-' + name.replace(' ', '-').replace('/', '-'))
            with look.row():
                with ui.element('div').classes('slider-of'):
                    ui.label('Smoothing').classes('small muted')
                    self.smoothing = look.field(ui.slider(min=0, max=0.98, step=0.02, value=0.6), 'smoothing')
                    self.smoothing.props['aria-label'] = 'Smoothing of the curves'
                self.log_axis = look.field(ui.switch('Logarithmic loss'), 'log-axis')
                self.smoothing.on('change', self.redraw)
                self.log_axis.on_value_change(self.redraw)
            with ui.element('div').classes('w-full'):
                self.charts = {'loss': Chart('Loss', 'chart-loss', CHARTS['loss'][1])}
            with ui.element('div').classes('charts'):
                for name, (title, height, _) in list(CHARTS.items())[1:]:
                    self.charts[name] = Chart(title, f'chart-{name}', height)
            self.sample_part = ui.expansion('Samples', icon='notes', value=True)
            with look.mark(self.sample_part, 'samples-part'):
                self.older = look.field(ui.select({}, label='Written at'), 'sample-step').classes('w-auto')
                self.older.style('margin-bottom: 10px')
                self.sample = ui.label().classes('said mono').props('tabindex=0 data-testid=sample')
                self.older.on_value_change(self.show_sample)
            with look.mark(ui.expansion('Log', icon='terminal'), 'log-part'):
                self.log = look.mark(ui.log(max_lines=LOG_LINES).classes('tail'), 'log').props('tabindex=0')
                self.log.props['aria-label'] = 'Log of the run'

    def button(self, text, icon, action, test_id):
        return look.mark(ui.button(text, icon=icon, on_click=action).props('outline'), test_id)

    # --- which run

    def follow(self, out_dir):
        """Shows another run; '' none."""
        if out_dir == self.out_dir and out_dir:
            return
        self.out_dir = out_dir
        self.sheet.set_visibility(bool(out_dir))
        self.title.text = out_dir
        self.trouble.text = ''
        self.state = self.samples = None
        self.steps = 0                  # that were made when it came to stand so
        self.lines = runs.Lines(launch.training(out_dir).log)
        self.log.clear()
        self.banner.classes(replace='banner')
        self.words.set_text('Looking…')
        self.sample_part.set_visibility(False)
        for label in self.stats.values():
            label.set_text(NOTHING)
        for button in (self.stop, self.kill, self.resume, self.more, self.next):
            button.set_visibility(False)
        self.more.value = None
        self.redraw()

    def redraw(self):
        """From the next look on all curves are sent anew."""
        weight = self.smoothing.value
        self.feeds = {}
        for name, (_, _, parts) in CHARTS.items():
            numbers = [number for number, _, _ in parts]
            # behind a smoothed curve stands the one that is smoothed
            self.feeds[name] = curves.Feed([*numbers, numbers[0].removeprefix('~')], weight)

    # --- each second

    async def look(self):
        """What is new."""
        if self.is_looking or not self.out_dir:
            return
        self.is_looking = True
        try:
            feeds, out_dir = self.feeds, self.out_dir
            view = await away(View, out_dir, feeds, self.lines, self.samples)
            if feeds is self.feeds and out_dir == self.out_dir:
                self.show(view)
        finally:
            self.is_looking = False

    def show(self, view):
        for name, update in view.updates.items():
            if update:
                self.show_curves(name, *update)
        self.show_standing(view.standing, view.progress)
        progress = view.progress
        steps = f'{progress.step:,}' + (f' of {progress.steps:,}' if progress.steps else '')
        left = progress.left if view.standing.state == 'running' else ''
        values = dict(zip(self.stats, (steps, left or NOTHING, view.figures['loss'], view.figures['best'],
                                       view.figures['speed'], view.figures['memory'])))
        for name, label in self.stats.items():
            label.set_text(values[name])
        self.bar.set_value(progress.step / progress.steps if progress.steps else 0)
        if view.is_other_log:
            self.log.clear()
        for line in view.lines[-LOG_LINES:]:
            self.log.push(line or ' ')
        if view.samples != self.samples:
            self.samples = view.samples
            self.older.set_options({step: f'step {step:,}' for step, _ in view.samples},
                                   value=view.samples[0][0] if view.samples else None)
            self.sample_part.set_visibility(bool(view.samples))
            self.show_sample()

    def show_curves(self, name, is_anew, points):
        """points: of the chart's curves, and of the one behind the first."""
        *points, raw = points
        scale = GIGABYTE if name == 'memory' else 1
        points = [[[x, y / scale] for x, y in curve] for curve in points]
        parts = CHARTS[name][2]
        is_smoothed = parts[0][0].startswith('~') and self.smoothing.value > 0
        behind = [raw] if is_smoothed else []
        if not is_anew:
            self.charts[name].append([*behind, *points])
            return
        shown = [Curve('each step', parts[0][2], raw, faint=True)] if is_smoothed else []
        for (number, title, color), curve in zip(parts, points):
            shown.append(Curve(title, color, curve, dots=number == 'val_loss'))
        self.charts[name].draw(shown, log=name == 'loss' and self.log_axis.value)

    def show_standing(self, standing, progress):
        if standing == self.state:
            return
        self.state, self.steps = standing, progress.step
        self.banner.classes(replace=f'banner {standing.state}')
        self.icon.props['name'] = ICONS.get(standing.state, 'info')
        self.words.set_text(labelled(standing.words))
        is_running = standing.state == 'running'
        self.stop.set_visibility(is_running)
        self.stop.set_enabled(True)
        self.kill.set_visibility(False)
        self.next.set_visibility(not is_running and bool(checkpoint_in(self.out_dir)))
        self.talk.props['href'] = f'/generate?{urlencode(dict(model=self.out_dir))}'
        can_go_on = not is_running and standing.state != 'elsewhere'
        self.more.set_visibility(can_go_on and standing.is_done)
        self.resume.set_visibility(can_go_on and (standing.can_go_on or os.path.exists(
            launch.training(self.out_dir).record)))
        if progress.steps and not self.more.value:
            self.more.value = 2 * progress.steps

    def show_sample(self):
        texts = dict(self.samples or [])
        self.sample.set_text(texts.get(self.older.value, ''))

    # --- what the person does

    async def act(self, action, *arguments):
        """Does it in a thread; what is refused is said."""
        self.trouble.text = ''
        try:
            await away(action, *arguments)
            return True
        except launch.Refused as refusal:
            self.trouble.text = str(refusal)
            return False

    async def on_stop(self):
        self.stop.set_enabled(False)
        if await self.act(launch.stop, launch.training(self.out_dir)):
            self.words.set_text('Stopping: it finishes its step, and saves.')
            self.stop.set_visibility(False)
            self.kill.set_visibility(True)

    async def on_kill(self):
        await self.act(launch.stop, launch.training(self.out_dir), True)

    async def on_resume(self):
        more = {}
        if self.state and self.state.is_done:
            if not self.more.value or self.more.value % 1 or self.more.value <= self.steps:
                self.trouble.text = f'Steps in all: a whole number above {self.steps:,}, which it has made'
                return
            more = dict(max_iters=int(self.more.value))
        self.resume.set_enabled(False)
        await self.act(launch.resume, self.out_dir, more)
        self.resume.set_enabled(True)
