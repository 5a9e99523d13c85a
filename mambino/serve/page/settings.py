"""All settings of train.py as a form: by their groups, with a search, what is changed marked.

    form = Form(choice, changed)    # changed(): called whenever one of them is another now
    form.refresh()                  # the choice was changed elsewhere

It is made when it is opened first: it has some seventy rows, and most people need none of them.
"""
from nicegui import ui

from mambino.serve import recipes
from mambino.serve.page import look

NOT_GIVEN = 'left to train.py'


class Form:
    """See the top of the file. choice: a recipes.Choice, which is changed in place."""

    def __init__(self, choice, changed):
        self.choice = choice
        self.changed = changed
        self.rows = {}                  # name → (row, control, reset, wrong)
        self.groups = {}                # heading → (its label, names)
        self.is_filling = False
        self.part = look.mark(ui.expansion('All settings', icon='tune'), 'all-settings')
        self.part.on_value_change(self.on_open)

    def on_open(self):
        if self.part.value and not self.rows:
            with self.part:
                self.build()
            self.refresh()

    def build(self):
        with look.row().classes('tight'):
            self.search = look.field(ui.input('Search', on_change=self.filter).props('clearable'), 'settings-search')
            self.only_changed = look.field(ui.switch('Only changed', on_change=self.filter), 'settings-changed')
            self.reset_all = look.mark(ui.button('Reset all', icon='undo', on_click=self.on_reset_all).props('flat'),
                                       'settings-reset')
        with ui.element('div').classes('settings'):
            for setting in recipes.all_settings().values():
                if setting.heading not in self.groups:
                    self.groups[setting.heading] = ui.label(setting.heading).classes('group'), []
                self.groups[setting.heading][1].append(setting.name)
                self.add_row(setting)
        self.none_found = look.note('No setting has this in its name or its comment.')

    def add_row(self, setting):
        name, default = setting.name, setting.default
        with ui.element('div').classes('setting') as row:
            ui.label(name).classes('name')
            with ui.element('div').classes('value'):
                if isinstance(default, bool):
                    control = ui.switch()
                elif default is None:
                    control = ui.select({'': NOT_GIVEN, 'true': 'yes', 'false': 'no'}, value='')
                else:
                    control = ui.input()
                    if isinstance(default, (int, float)):
                        control.props('inputmode=decimal')
                control.props['aria-label'] = name
                look.mark(control, f'setting-{name}')
                reset = ui.button(icon='undo', on_click=lambda: self.on_reset(name)).props('flat dense round size=sm')
                reset.props['aria-label'] = f'Reset {name}'
                look.mark(reset, f'reset-{name}')
            ui.label(setting.comment).classes('about')
            wrong = ui.label().classes('wrong').props('role=alert')
            look.mark(wrong, f'wrong-{name}')
        control.on_value_change(lambda: self.on_change(name))
        self.rows[name] = row, control, reset, wrong

    # --- what the person does

    def on_change(self, name):
        if self.is_filling:
            return
        _, control, _, _ = self.rows[name]
        value = control.value
        self.choice.set(name, str(value).lower() if isinstance(value, bool) else value or '')
        self.mark(name)
        self.changed()

    def on_reset(self, name):
        self.choice.set(name, self.choice.base[name])
        self.refresh()
        self.changed()

    def on_reset_all(self):
        self.choice.changed.clear()
        self.refresh()
        self.changed()

    def filter(self):
        """Shows the settings that have the words of the search in them."""
        words = (self.search.value or '').lower().split()
        shown = 0
        for heading, (label, names) in self.groups.items():
            seen = False
            for name in names:
                text = f'{name} {recipes.all_settings()[name].comment} {heading}'.lower()
                is_changed = name in self.choice.changed or not self.only_changed.value
                is_seen = is_changed and all(word in text for word in words)
                self.rows[name][0].set_visibility(is_seen)
                seen |= is_seen
                shown += is_seen
            label.set_visibility(seen)
        self.none_found.set_visibility(not shown)

    # --- what is seen

    def refresh(self):
        """The controls are as the choice has it."""
        if not self.rows:
            return
        self.is_filling = True
        for name, (_, control, _, _) in self.rows.items():
            text = self.choice.value(name)
            value = text == 'true' if isinstance(control, ui.switch) else text
            if isinstance(control, ui.select) and value not in control.options:
                value = ''
            if control.value != value:
                control.set_value(value)
            self.mark(name)
        self.is_filling = False
        self.filter()

    def mark(self, name):
        """Whether it is changed, and what is wrong with it."""
        row, _, reset, wrong = self.rows[name]
        is_changed = name in self.choice.changed
        sentence = recipes.problem_with(recipes.all_settings()[name], self.choice.value(name)) if is_changed else ''
        row.classes(add='changed' if is_changed else '', remove='' if is_changed else 'changed')
        reset.set_visibility(is_changed)
        wrong.set_text(sentence)
        wrong.set_visibility(bool(sentence))
