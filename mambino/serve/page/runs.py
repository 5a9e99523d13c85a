"""The panel of all runs: a table, their curves over each other, what their settings differ in; and how
to have their numbers, or to delete them.
"""
from urllib.parse import quote

from nicegui import ui

from mambino.serve import curves, launch, runs
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.charts import COLORS, Chart, Curve, dress
from mambino.serve.page.words import STATES, count_in_words, loss_in_words, time_in_words

SECONDS = 3.0           # from look to look
ACROSS = {'step': 'steps', 'tokens': 'tokens', 'hours': 'hours of training'}
COLUMNS = ('', 'name', 'state', 'kind', '#parameters', '#best loss', '#steps', '#tokens', '#time', '')


def show(library):
    """Fills the panel."""
    dress()
    look.title('Runs', 'All models that were trained here. Choose two or more to compare them.')
    RunsPanel()


def summaries():
    return [runs.summary(name) for name in launch.run_folders()]


def overlaid(names, across):
    """[(name, points of train, points of val), …] of runs."""
    found = []
    for name in names:
        log = runs.metrics_of(name)
        pairs = [curves.thinned(*curves.along(log, number, across)) for number in ('loss', 'val_loss')]
        found.append((name, *pairs))
    return found


class RunsPanel:
    """The panel."""

    def __init__(self):
        self.rows = None
        self.chosen = []
        self.is_looking = False
        self.drawn = None
        with look.sheet(test_id='runs'):
            with ui.element('div').classes('scroll-x'):
                self.table = look.mark(ui.element('table').classes('table runs-table'), 'runs-table')
            self.reading = look.note('Reading…')
            self.none = look.row()
            with self.none:
                ui.label('No run yet.').classes('muted')
                ui.link('Train a model', '/train').classes('link')
            self.none.set_visibility(False)
            self.trouble = look.trouble(test_id='runs-trouble')
        with look.sheet('Compared', 'compared') as self.compared:
            with look.row().classes('tight'):
                self.across = look.field(ui.select(ACROSS, label='Over', value='step'), 'across')
                self.log_axis = look.field(ui.switch('Logarithmic'), 'compare-log')
            self.val = Chart('Validation loss', 'chart-val', 280)
            self.train = Chart('Loss of training', 'chart-train', 220)
            look.heading('What their settings differ in', 3).classes('section')
            self.differences = ui.element('div').classes('w-full')
        self.across.on_value_change(self.compare)
        self.log_axis.on_value_change(self.compare)
        self.compared.set_visibility(False)
        with ui.dialog() as self.dialog, ui.element('div').classes('dialog-card q-card'):
            self.question = look.heading('Delete it?')
            self.warning = ui.label().classes('muted')
            self.typed = look.field(ui.input('Its name, to be sure'), 'delete-typed')
            with look.row().classes('justify-end'):
                look.mark(ui.button('Keep it', on_click=self.dialog.close).props('outline'), 'delete-no')
                self.sure = look.mark(ui.button('Delete', color='negative', on_click=self.on_delete), 'delete-yes')
        self.typed.on_value_change(lambda: self.sure.set_enabled(self.typed.value == self.doomed))
        self.doomed = ''
        ui.timer(SECONDS, self.look)
        ui.timer(0, self.look, once=True)

    async def look(self):
        """The table, and the curves of what is chosen, as they are now."""
        if self.is_looking:
            return
        self.is_looking = True
        try:
            rows = await away(summaries)
            if rows != self.rows:
                self.rows = rows
                self.fill()
                await self.compare()
        finally:
            self.is_looking = False

    def fill(self):
        self.reading.set_visibility(False)
        self.none.set_visibility(not self.rows)
        self.table.clear()
        self.chosen = [name for name in self.chosen if name in [row['name'] for row in self.rows]]
        with self.table:
            with ui.element('thead'), ui.element('tr'):
                for name in COLUMNS:
                    look.cell(name.removeprefix('#'), name.startswith('#'), 'th')
            with ui.element('tbody'):
                for row in sorted(self.rows, key=lambda row: (row['state'] != 'running', row['name'])):
                    self.add_row(row)

    def add_row(self, row):
        name = row['name']
        with ui.element('tr'):
            with ui.element('td'):
                box = ui.checkbox(value=name in self.chosen, on_change=lambda event: self.on_choose(name, event.value))
                box.props['aria-label'] = f'Compare {name}'
                look.mark(box, f'choose-{name}')
            with ui.element('td').classes('name'):
                ui.link(name, f'/train?run={quote(name)}').classes('link')
            with ui.element('td'):
                ui.label(STATES.get(row['state'], row['state'])).classes(f'state {row["state"]}').tooltip(row['words'])
            for text, is_figure in (
                    (row['kind'], False), (count_in_words(row['parameters']), True), (loss_in_words(row['best']), True),
                    (f'{row["step"]:,}', True), (count_in_words(row['tokens']), True),
                    (time_in_words(row['seconds']), True)):
                look.cell(text, is_figure, 'td')
            with ui.element('td').style('white-space: nowrap'):
                self.icon_button('download', f'Numbers of {name} as CSV', f'csv-{name}', lambda: self.on_csv(name))
                button = self.icon_button('delete', f'Delete {name}', f'delete-{name}', lambda: self.on_ask(name))
                button.set_enabled(row['state'] not in ('running', 'elsewhere'))

    def icon_button(self, icon, label, test_id, action):
        button = ui.button(icon=icon, on_click=action).props('flat dense round size=sm')
        button.props['aria-label'] = label
        return look.mark(button, test_id)

    # --- comparing

    async def on_choose(self, name, is_chosen):
        if is_chosen and name not in self.chosen:
            self.chosen.append(name)
        if not is_chosen and name in self.chosen:
            self.chosen.remove(name)
        await self.compare()

    async def compare(self):
        names = list(self.chosen)
        self.compared.set_visibility(bool(names))
        if not names:
            return
        found = await away(overlaid, names, self.across.value)
        differences = await away(runs.differences, names)
        if names != self.chosen or (found, differences, self.log_axis.value) == self.drawn:
            return
        self.drawn = found, differences, self.log_axis.value
        is_log = self.log_axis.value
        colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
        self.val.draw([Curve(name, colors[name], val, dots=len(val) < 60) for name, _, val in found], log=is_log)
        self.train.draw([Curve(name, colors[name], train) for name, train, _ in found], log=is_log)
        self.differences.clear()
        with self.differences:
            if differences:
                rows = [(name, *values) for name, values in differences]
                look.table(['setting', *names], rows, 'differences')
            else:
                ui.label('Choose another run.' if len(names) < 2 else 'Nothing.').classes('muted')

    # --- numbers, and the end

    async def on_csv(self, name):
        text = await away(runs.as_csv, name)
        ui.download.content(text, f'{name}.csv')

    def on_ask(self, name):
        self.doomed = name
        self.question.text = f'Delete {name}?'
        self.warning.text = f'The folder {name} goes, with its model and its log. Nothing brings it back.'
        self.typed.value = ''
        self.sure.set_enabled(False)
        self.dialog.open()

    async def on_delete(self):
        self.trouble.text = ''
        if self.typed.value != self.doomed:
            return
        self.dialog.close()
        try:
            await away(launch.delete_run, self.doomed)
        except launch.Refused as refusal:
            self.trouble.text = str(refusal)
        await self.look()
